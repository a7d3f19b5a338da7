"""What one machine needs (rule 24), whole or since a revision.

    snapshot    every row
    changes     the rows that differ between two revisions, with what the machine gained or lost by moves

A machine needs all of each network that has a port on it, and of each carrier down to its domain its
segments, routers, links and policies, and those ports on which the level above lives. That is its *view*:
network -> ALL, or the ids of the ports it may see. One that is on a host port takes what is carried there for carried
by the wire, and its like on other host ports for the machines; of what is below it hears nothing but whether that is
up (rule 25). The view at an earlier revision is worked out from
the change rows, which keep where each port was; so nothing is remembered for a machine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network

from sqlalchemy import Connection, func, select

from nestnet.model.values import (
    FABRIC,
    MAX_DEPTH,
    OVERHEAD,
    Interface,
    Link,
    Machine,
    Network,
    Policy,
    Port,
    Router,
    Segment,
    Trunk,
    Value,
    Vlan,
    World,
)
from nestnet.store import objects, tables
from nestnet.store.objects import (
    LinkRow,
    MachineRow,
    NetworkRow,
    PolicyRow,
    PortRow,
    RouterRow,
    Row,
    SegmentRow,
    chunks,
)


class _All:
    """Every port of a network."""


ALL = _All()
Scope = _All | frozenset[int]
View = dict[int, Scope]
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that belong together: a value, or None for what is gone. A snapshot has everything. `networks` are those of
    which a change concerns the machine from then on: see `touched`. `on_machines` are those of the networks of its
    ports whose hosts are machines, for whom it is told."""

    snapshot: bool
    revision: int
    rows: tuple[tuple[str, int, Value | None], ...]
    networks: frozenset[int]
    on_machines: frozenset[int]


@dataclass(frozen=True, slots=True)
class Touched:
    """Whom what has changed up to a revision concerns: machines to which one of these networks is of concern, and these
    machines, where ports have come."""

    revision: int
    networks: frozenset[int]
    machines: frozenset[int]


def snapshot(connection: Connection, machine: int) -> Batch:
    """Everything that a machine needs."""
    view = _view(connection, machine, _Past())
    rows, on_machines = _of_view(connection, view, True)
    found = tuple((kind, id, value) for (kind, id), value in [*machines(connection, machine), *rows])
    return Batch(True, objects.current_revision(connection), found, _concern(connection, machine, view), on_machines)


def touched(connection: Connection, since: int) -> Touched | None:
    """What has changed since a revision, for all machines at once; None if that is too long ago or yet to come."""
    now, oldest = connection.execute(select(tables.revision.c.n, tables.revision.c.oldest)).one()
    if not oldest <= since <= now:
        return None
    c = tables.change.c
    query = select(c.network, c.kind, c.id, c.whole).where(c.revision > since, c.kind != "tenant")
    rows = connection.execute(query).all()
    ports = {row.id for row in rows if row.kind == "port"}
    ports |= _ports_in(connection, [row.id for row in rows if row.whole]).keys()
    there = {*objects.machines_of(connection, ports).values(), *objects.machines_of(connection, ports, True).values()}
    return Touched(now, frozenset(row.network for row in rows), frozenset(there))


def _concern(connection: Connection, machine: int, view: View) -> frozenset[int]:
    """The networks a change in which a machine may have to hear of: what it sees, and its domain, where the rows of
    machines are. On a host port also what is below that: whether its like are up hangs on it."""
    domain = domain_of(connection, machine)
    below = objects.with_carriers(connection, [domain]) if domain != FABRIC else [FABRIC]
    return frozenset([*view, *below])


def changes(connection: Connection, machine: int, since: int) -> Batch | None:
    """What a machine that has realised `since` needs to know; None if that is too long ago or yet to come."""
    now, oldest = connection.execute(select(tables.revision.c.n, tables.revision.c.oldest)).one()
    if not oldest <= since <= now:
        return None
    if since == now:
        here = _view(connection, machine, _Past())
        return Batch(False, now, (), _concern(connection, machine, here), frozenset())
    c = tables.change.c
    moved = connection.execute(select(tables.change).where(c.revision > since).order_by(c.revision, c.seq)).all()
    was = _Past()
    changed: dict[int, set[Key]] = defaultdict(set)
    new = {row.id for row in moved if row.whole}  # What is in them was nowhere then.
    was.ports.update({id: _Was(network) for id, network in _ports_in(connection, sorted(new)).items()})
    for row in moved:
        changed[row.network].add((row.kind, row.id))
        if row.kind == "port":
            there = (row.was_machine, row.was_port, row.was_other) if row.network not in new else ()
            was.ports.setdefault(row.id, _Was(row.network, *there))
        elif row.was_carrier is not None:
            was.carriers.setdefault(row.id, FABRIC if row.was_encapsulated else row.was_carrier)
    before, after = _view(connection, machine, was), _view(connection, machine, _Past())
    wanted: set[Key] = set()
    for network in before.keys() | after.keys():
        wanted |= _differing(connection, network, before.get(network), after.get(network), changed[network])
    told, on_machines = _values(connection, wanted, after)
    values = dict(told)
    if others := _machines_changed(connection, machine, changed):
        wanted |= others
        values.update({key: value for key, value in machines(connection, machine) if key in wanted})
    rows = tuple((kind, id, values.get((kind, id))) for kind, id in sorted(wanted))
    return Batch(False, now, rows, _concern(connection, machine, after), on_machines)


def _machines_changed(connection: Connection, reader: int, changed: Mapping[int, set[Key]]) -> set[Key]:
    """Those machines of its domain that a machine must hear of. On host ports, those are all of them if one of these
    ports has changed, or something on their way down."""
    domain = domain_of(connection, reader)
    found = {key for key in changed.get(domain, ()) if key[0] == "machine"}  # Tenants are no agent's affair.
    if domain == FABRIC:
        return found
    members = objects.machines(connection, domain)
    hosts = {row.port for row in members}
    network = domain
    while network != FABRIC:
        below = {("network", network), *(("port", host) for host in hosts)}
        if not below.isdisjoint(changed.get(network, ())):
            return found | {("machine", row.id) for row in members}
        hosts = {port.host for port in objects.ports(connection, "id", sorted(host for host in hosts if host))}
        (row,) = objects.networks(connection, "id", [network])
        network = row.carrier
    return found


@dataclass(frozen=True)
class _Past:
    """What the change rows say about an earlier revision: where ports were, and what carried networks. The oldest
    change tells."""

    ports: dict[int, _Was] = field(default_factory=dict)
    carriers: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Was:
    """Where a port was: on a machine, on a port, or on neither, for it did not exist; where else, while it moved."""

    network: int
    machine: int | None = None
    port: int | None = None
    other: int | None = None

    def on(self, column: str) -> set[int]:
        """The machines, or the ports, that it was on."""
        host = getattr(self, column)
        return {each for each in (host, self.other) if each is not None} if host is not None else set()


def _view(connection: Connection, machine: int, was: _Past) -> View:
    """What a machine needs; with what was, what it needed then."""
    view: View = {}
    here = _ports_on(connection, "machine", [machine], was)
    for _ in range(MAX_DEPTH):  # Up: who lives on the ports that live here?
        view.update(dict.fromkeys(here.values(), ALL))
        if not here:
            break
        here = _ports_on(connection, "port", list(here), was)
    for network in list(view):  # Down: what carries it, with the hosts that the level above uses.
        level, used = network, None
        for _ in range(MAX_DEPTH):
            carrier = _carrier(connection, level, was)
            if carrier == FABRIC:
                break
            used = _hosts_of(connection, level, was, used)
            scope = view.get(carrier, frozenset())
            if not isinstance(scope, _All):
                view[carrier] = scope | used
            level = carrier
    return view


def _ports_on(connection: Connection, column: str, hosts: list[int], was: _Past) -> dict[int, int]:
    """Port -> network of the ports on these hosts, machines or ports. One that moves is on two."""
    c = tables.port.c
    found: dict[int, int] = {}
    for chunk in chunks(hosts):
        for where in (c[f"host_{column}"], c[f"other_{column}"]):
            rows = connection.execute(select(c.id, c.network).where(where.in_(chunk)))
            found.update({row.id: row.network for row in rows if row.id not in was.ports})
    wanted = set(hosts)
    found.update({id: place.network for id, place in was.ports.items() if not wanted.isdisjoint(place.on(column))})
    return found


def _ports_in(connection: Connection, networks: Sequence[int]) -> dict[int, int]:
    """Port -> network of all the ports in these."""
    c = tables.port.c
    found: dict[int, int] = {}
    for chunk in chunks(networks):
        rows = connection.execute(select(c.id, c.network).where(c.network.in_(chunk)))
        found.update({row.id: row.network for row in rows})
    return found


def _hosts_of(connection: Connection, network: int, was: _Past, ports: set[int] | None) -> set[int]:
    """The hosts of a network's ports, or of these ones."""
    c = tables.host_use.c
    moved = {
        id: place for id, place in was.ports.items() if place.network == network and (ports is None or id in ports)
    }
    if ports is None:
        rows = connection.execute(select(c.host, c.count).where(c.network == network))
        uses = Counter({row.host: row.count for row in rows})
        uses.subtract(_hosts_now(connection, list(moved)))
    else:
        uses = _hosts_now(connection, sorted(ports - moved.keys()))
    for place in moved.values():
        uses.update(place.on("port"))
    return {host for host, uses_ in uses.items() if uses_ > 0}


def _hosts_now(connection: Connection, ports: list[int]) -> Counter[int]:
    """The hosts that these ports live on, each as often as it is lived on."""
    p = tables.port.c
    found: Counter[int] = Counter()
    # They may be on the wire now, and have been on ports.
    host, other = func.coalesce(p.host_port, p.host_machine), func.coalesce(p.other_port, p.other_machine)
    for chunk in chunks(ports):
        for row in connection.execute(select(host, other).where(p.id.in_(chunk))):
            found.update(set(row) - {None})
    return found


def _carrier(connection: Connection, network: int, was: _Past) -> int:
    """What carries it within its domain."""
    if network in was.carriers:
        return was.carriers[network]
    n = tables.network.c
    row = connection.execute(select(n.carrier, n.encapsulated).where(n.id == network)).one()
    return FABRIC if row.encapsulated else int(row.carrier)


def _differing(
    connection: Connection, network: int, old: Scope | None, new: Scope | None, changed: set[Key]
) -> set[Key]:
    """The keys of a network that a machine must hear of."""
    ports = _port_keys(connection, network) if isinstance(old, _All) != isinstance(new, _All) else set()
    was, now = _within(old, ports), _within(new, ports)
    changed = {key for key in changed if key[0] != "machine"}  # of what is on its ports
    if old is None or new is None:
        keys = changed | _other_keys(connection, network) | was | now
    else:
        keys = {key for key in changed if key[0] != "port"} | (was ^ now)
    if old is None:
        return {key for key in keys if key[0] != "port"} | now
    if isinstance(old, _All) or isinstance(new, _All):
        return keys | {key for key in changed if key[0] == "port"}
    return keys | {key for key in changed if key in was | now}


def _within(scope: Scope | None, ports: set[Key]) -> set[Key]:
    if scope is None:
        return set()
    return ports if isinstance(scope, _All) else {("port", id) for id in scope}


def _port_keys(connection: Connection, network: int) -> set[Key]:
    return {("port", id) for id in connection.scalars(select(tables.port.c.id).where(tables.port.c.network == network))}


def _other_keys(connection: Connection, network: int) -> set[Key]:
    keys: set[Key] = {("network", network)}
    for kind in ("segment", "router", "link", "policy"):
        table = tables.metadata.tables[kind]
        keys |= {(kind, id) for id in connection.scalars(select(table.c.id).where(table.c.network == network))}
    return keys


# Values


Told = tuple[list[tuple[Key, Value]], frozenset[int]]
"""Values, and those of the networks of ports among them whose hosts are machines."""


def _of_view(connection: Connection, view: View, for_agent: bool) -> Told:
    every = list(view)
    whole = [network for network, scope in view.items() if isinstance(scope, _All)]
    some = sorted(id for scope in view.values() if not isinstance(scope, _All) for id in scope)
    rows: list[Row] = [
        *objects.networks(connection, "id", every),
        *objects.segments(connection, "network", every),
        *objects.routers(connection, "network", every),
        *objects.links(connection, "network", every),
        *objects.ports(connection, "network", whole),
        *objects.ports(connection, "id", some),
        *objects.policies(connection, "network", every),
    ]
    told = Teller(connection, rows, for_agent)
    return [((row.kind, row.id), told.value(row)) for row in rows], told.on_machines


def _values(connection: Connection, keys: set[Key], view: View) -> Told:
    """The values of these keys, as far as they exist and the view has them."""
    ids: dict[str, list[int]] = defaultdict(list)
    for kind, id in sorted(keys):
        ids[kind].append(id)
    rows: list[Row] = [
        *objects.networks(connection, "id", ids["network"]),
        *objects.segments(connection, "id", ids["segment"]),
        *objects.routers(connection, "id", ids["router"]),
        *objects.links(connection, "id", ids["link"]),
        *objects.ports(connection, "id", ids["port"]),
        *objects.policies(connection, "id", ids["policy"]),
    ]
    rows = [row for row in rows if _sees(view, row)]
    told = Teller(connection, rows, True)
    return [((row.kind, row.id), told.value(row)) for row in rows], told.on_machines


class Teller:
    """Rows as values. `for_agent`: as those of its domain know them, else as all is."""

    def __init__(self, connection: Connection, rows: Iterable[Row], for_agent: bool) -> None:
        networks = {row.network for row in rows if isinstance(row, NetworkRow | PortRow)}
        self._for_agent = for_agent
        known = objects.networks(connection, "id", sorted(networks))
        self._encapsulated = {row.id for row in known if row.encapsulated}
        self.on_machines = frozenset(
            row.id for row in known if row.carrier == FABRIC or (for_agent and row.encapsulated)
        )
        told = {row.id for row in rows if isinstance(row, NetworkRow)}
        below, fabric = objects.with_carriers(connection, told), objects.fabric(connection)
        self._left = {network: objects.left_to(below, fabric, network) for network in told}
        ports = [row for row in rows if isinstance(row, PortRow)]
        hosts = {each for row in ports if row.network in self._encapsulated for each in (row.host, row.other)}
        self._machines = objects.agents_on(connection, {*hosts, *(row.id for row in ports if row.hosts)})

    def value(self, row: Row) -> Value:
        value = value_of(row, self._left.get(row.network, 0))
        if isinstance(value, Port):
            value = replace(value, agent=value.id in self._machines)
        if not self._for_agent or row.network not in self._encapsulated:
            return value
        if isinstance(value, Network):
            return replace(value, carrier=FABRIC, encapsulated=False)
        if isinstance(value, Port):
            return replace(value, host=self._machines[value.host], other=self._machines.get(value.other, 0))
        return value


def _sees(view: View, row: Row) -> bool:
    scope = view.get(row.network)
    if scope is None:
        return False
    return isinstance(scope, _All) or not isinstance(row, PortRow) or row.id in scope


def domain_of(connection: Connection, machine: int) -> int:
    """The domain that a machine is in: the fabric, or the network on one of whose ports it is."""
    domain = connection.scalar(select(tables.machine.c.domain).where(tables.machine.c.id == machine))
    return int(domain or FABRIC)


def machines(connection: Connection, reader: int) -> list[tuple[Key, Value]]:
    """The machines of the reader's domain, without those that are shut out. Of the reader alone it has the NICs, and
    the VLAN that they are in."""
    domain = domain_of(connection, reader)
    rows = [row for row in objects.machines(connection, domain) if not row.fenced]
    if domain != FABRIC:
        return _on_ports(connection, domain, rows)
    found = {row.id: Machine(row.id, ip_address(row.address), row.mtu) for row in rows}
    for own in (row for row in rows if row.id == reader):
        trunks = tuple(Trunk(on, nic) for on, nic in own.trunks)
        found[reader] = replace(found[reader], nics=own.nics, vlan=own.vlan, trunks=trunks)
    return [(("machine", id), value) for id, value in found.items()]


def machines_on_ports(connection: Connection, ids: Iterable[int]) -> dict[int, Machine]:
    """Those of these machines that are on host ports, as others in their domains know them."""
    found: dict[int, Machine] = {}
    domains = {domain_of(connection, id) for id in ids}
    for domain in domains - {FABRIC}:
        for (_, id), value in _on_ports(connection, domain, objects.machines(connection, domain)):
            if isinstance(value, Machine):
                found[id] = value
    return found


def _on_ports(connection: Connection, domain: int, rows: Sequence[MachineRow]) -> list[tuple[Key, Value]]:
    """The machines that the workloads of these host ports are, as far as the ports have an address to be reached by."""
    family = objects.family(connection, domain)
    mtu = objects.left(connection, domain) + OVERHEAD[family]
    ports = {port.id: port for port in objects.ports(connection, "id", [row.port for row in rows if row.port])}
    up = _up(connection, domain, ports.values())
    found: list[tuple[Key, Value]] = []
    for row in rows:
        addresses = [ip_address(text) for text in ports[row.port].addresses] if row.port in ports else []
        own = next((address for address in addresses if address.version == family), None)
        if own is not None:
            found.append((("machine", row.id), Machine(row.id, own, mtu, (), row.port in up)))
    return found


def _up(connection: Connection, network: int, ports: Iterable[PortRow]) -> set[int]:
    """Those of these ports of a network with nothing disabled on their way down to the wire, themselves included."""
    at: dict[int, PortRow] = {port.id: port for port in ports}
    while network != FABRIC and at:
        (row,) = objects.networks(connection, "id", [network])
        at = {port: here for port, here in at.items() if row.is_open and here.enabled}
        if row.carrier == FABRIC:
            break
        hosts = objects.ports(connection, "id", sorted({here.host for here in at.values()}))
        below = {host.id: host for host in hosts}
        at = {port: below[here.host] for port, here in at.items()}
        network = row.carrier
    return set(at)


def value_of(row: Row, left: int) -> Value:
    """A row as a value. `left`: what the domain of a network leaves to it, in bytes of IP."""
    match row:
        case NetworkRow():
            return Network(row.id, row.carrier, row.underlay, network_mtu(row, left), row.is_open, row.encapsulated)
        case SegmentRow():
            dns = tuple(map(ip_address, row.dns))
            vlan = Vlan(row.vlan or 0, row.physical) if row.physical is not None else None
            own = (dns, row.transparent, vlan)
            return Segment(row.id, row.network, row.vni or 0, tuple(map(ip_network, row.cidrs)), *own)
        case RouterRow():
            joined = (Interface(segment, tuple(map(ip_address, texts))) for segment, texts in row.interfaces)
            return Router(row.id, row.network, row.mac or 0, tuple(joined))
        case LinkRow():
            return Link(row.id, row.network, row.between, row.cost, row.up, row.rate)
        case PortRow():
            addresses, owns = tuple(map(ip_address, row.addresses)), tuple(map(ip_network, row.owns))
            place = (row.segment, row.host, row.mac or 0)
            port = Port(row.id, row.network, *place, addresses, owns, row.groups, row.hosts)
            port = replace(port, enabled=row.enabled, attach=row.attach, rate=row.rate)
            return replace(port, other=row.other, leaving=row.leaving, trunk=row.trunk, tag=row.tag)
        case PolicyRow():
            sides = (row.sources, row.targets, row.services)
            return Policy(row.id, row.network, *sides, row.allow, row.priority)
        case _:
            raise TypeError(f"agents do not get rows of kind {row.kind}")


def network_mtu(row: NetworkRow, left: int) -> int:
    """Bytes of IP that its ports may send: in one domain the same at any depth (rule 9)."""
    return min(left, row.mtu) if row.mtu is not None else left


def world(connection: Connection, networks: Iterable[int]) -> World:
    """All that decides what happens to packets in these networks: what the machines know that hold their ports."""
    view: View = dict.fromkeys(networks, ALL)
    return World(dict([*machines(connection, 0), *_of_view(connection, view, False)[0]]))
