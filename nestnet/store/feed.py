"""What one machine needs (rule 24), whole or since a revision.

    snapshot    every row
    changes     the rows that differ between two revisions, with what the machine gained or lost by moves

A machine needs all of each network that has a port on it, down to its domain: whatever carries one that has is one of
them, for it has the port that the port lives on. One that is on a host port takes what is carried there for carried by
the wire, and its like on other host ports for the machines; of what is below it hears nothing but whether that is up
(rule 25).

Nothing is remembered for a machine. Change rows keep where each port was, so it can be told of a network whether it was
there at an earlier revision. Asked are only those that have changed, and what lives on ports of theirs that have moved,
however many are on the machine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, bindparam, func, select

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

View = set[int]  # the networks that a machine has
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that belong together: a value, or None for what is gone. A snapshot has everything. `below` are the
    networks that the machine does not have, and a change in which concerns it: see `touched`. `on_machines` are those
    of the networks of its ports whose hosts are machines, for whom it is told."""

    snapshot: bool
    revision: int
    rows: tuple[tuple[str, int, Value | None], ...]
    below: frozenset[int]
    on_machines: frozenset[int]


@dataclass(frozen=True, slots=True)
class Touched:
    """Whom what has changed up to a revision concerns: these machines, which have what has changed, or had it, and
    those that have one of these networks below them."""

    revision: int
    networks: frozenset[int]
    machines: frozenset[int]


def snapshot(connection: Connection, machine: int) -> Batch:
    """Everything that a machine needs."""
    rows, on_machines = _of_networks(connection, _on_machine(connection, machine), True)
    found = tuple((kind, id, value) for (kind, id), value in [*machines(connection, machine), *rows])
    revision = objects.current_revision(connection)
    return Batch(True, revision, found, _below(connection, domain_of(connection, machine)), on_machines)


def touched(connection: Connection, since: int) -> Touched | None:
    """What has changed since a revision, for all machines at once; None if that is too long ago or yet to come."""
    now, oldest = connection.execute(_revisions()).one()
    if not oldest <= since <= now:
        return None
    rows = [row for row in connection.execute(_moved(), {"since": since}) if row.kind != "tenant"]
    changed = {row.network for row in rows}
    machines, hosts = set[int](), set[int]()
    for end, host in _uses(connection, changed):
        (hosts if end is None else machines).add(host if end is None else end)
    for row in rows:
        if row.kind == "port" and row.was_machine is not None:
            machines |= {row.was_machine, row.was_other} - {None}
        elif row.kind == "port":
            hosts |= {row.was_port, row.was_other} - {None}
    for other in (False, True):
        machines |= set(objects.machines_of(connection, hosts, other).values()) if hosts else set()
    return Touched(now, frozenset(changed), frozenset(machines))


def _uses(connection: Connection, networks: Collection[int]) -> Iterator[tuple[int | None, int]]:
    """The hosts of these networks: the machine that each is to its agents, None for one that is no machine in its
    domain; and the host by its row id."""
    for chunk in chunks(sorted(networks)):
        for row in connection.execute(_hosts_used(), {"ids": chunk}):
            on_machine = row.carrier == FABRIC or row.encapsulated
            yield (row.agent if row.encapsulated else row.host) if on_machine else None, row.host


@cache
def _hosts_used() -> Select[Any]:
    u, n, m = tables.host_use, tables.network, tables.machine
    query = select(u.c.host, n.c.carrier, n.c.encapsulated, m.c.id.label("agent")).select_from(u)
    return query.join(n, n.c.id == u.c.network).outerjoin(m, m.c.port == u.c.host).where(u.c.network.in_(objects.IDS))


def _below(connection: Connection, domain: int) -> frozenset[int]:
    """The domain of a machine, where the rows of machines are. On a host port also what is below that: whether its
    like are up hangs on it."""
    return frozenset(objects.with_carriers(connection, [domain]) if domain != FABRIC else [FABRIC])


def changes(connection: Connection, machines: Collection[int], since: int) -> dict[int, Batch] | None:
    """What machines that have realised `since` need to know, by machine; None if that is too long ago or yet to come.
    What several need is read once, and is the same tuple of rows."""
    now, oldest = connection.execute(_revisions()).one()
    if not oldest <= since <= now:
        return None
    seats = _seats(connection, machines)
    below = {domain: _below(connection, domain) for domain in {seat.domain for seat in seats}}
    if since == now:
        return {seat.machine: Batch(False, now, (), below[seat.domain], frozenset()) for seat in seats}
    moved = connection.execute(_moved(), {"since": since}).all()
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
    places = _places(connection, was.ports)
    gone = [id for id, place in was.ports.items() if places.get(id) != place]
    asked = set(changed) | _networks_on(connection, gone, was)
    carriers = _carriers(connection, asked)
    after = _present(connection, seats, asked, carriers, _Past(), places)
    before = after
    if gone or was.carriers or new:
        before = _present(connection, seats, asked - new, carriers, was, places)
    found: dict[int, Batch] = {}
    read: dict[Any, Batch] = {}
    for seat in seats:
        had, has = before[seat.machine], after[seat.machine]
        own = seat.machine if ("machine", seat.machine) in changed[seat.domain] else None  # it knows more of itself
        alike = (seat.domain, own, frozenset(had), frozenset(has))
        if alike not in read:
            rows, on_machines = _news(connection, seat, had, has, changed)
            read[alike] = Batch(False, now, rows, below[seat.domain], on_machines)
        found[seat.machine] = read[alike]
    return found


def _news(
    connection: Connection, seat: _Seat, had: View, has: View, changed: Mapping[int, set[Key]]
) -> tuple[tuple[tuple[str, int, Value | None], ...], frozenset[int]]:
    """The rows for a machine that had these networks and has those."""
    wanted: set[Key] = set()
    for network in had | has:
        wanted |= _differing(connection, network, network in had, network in has, changed[network])
    told, on_machines = _values(connection, wanted, has)
    values = dict(told)
    if others := _machines_changed(connection, seat.domain, changed):
        wanted |= others
        values.update({key: value for key, value in machines(connection, seat.machine) if key in wanted})
    return tuple((kind, id, values.get((kind, id))) for kind, id in sorted(wanted)), on_machines


@cache
def _revisions() -> Select[Any]:
    return select(tables.revision.c.n, tables.revision.c.oldest)


@cache
def _moved() -> Select[Any]:
    c = tables.change.c
    return select(tables.change).where(c.revision > bindparam("since")).order_by(c.revision, c.seq)


def _machines_changed(connection: Connection, domain: int, changed: Mapping[int, set[Key]]) -> set[Key]:
    """Those machines of a domain that a machine in it must hear of. On host ports, those are all of them if one of
    these ports has changed, or something on their way down."""
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
    """What the change rows say about an earlier revision: where ports were, and what carried networks in their domains.
    The oldest change tells."""

    ports: dict[int, _Was] = field(default_factory=dict)
    carriers: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Was:
    """Where a port was, or is: on a machine, on a port, or on neither, for it did not exist; where else, while it
    moved."""

    network: int
    machine: int | None = None
    port: int | None = None
    other: int | None = None

    def on(self, column: str) -> set[int]:
        """The machines, or the ports, that it was on."""
        host = getattr(self, column)
        return {each for each in (host, self.other) if each is not None} if host is not None else set()


@dataclass(frozen=True, slots=True)
class _Seat:
    """A machine in its domain, and the host port that it is on; None: it is on the wire."""

    machine: int
    domain: int
    port: int | None

    @property
    def host(self) -> int:
        """What the ports of networks at the bottom of its domain live on, if they live here."""
        return self.machine if self.port is None else self.port


def _seats(connection: Connection, machines: Collection[int]) -> list[_Seat]:
    """Of these machines; one that is not there any more is on the wire."""
    found = {id: _Seat(id, FABRIC, None) for id in machines}
    for chunk in chunks(sorted(machines)):
        for row in connection.execute(_seats_of(), {"ids": chunk}):
            found[row.id] = _Seat(row.id, int(row.domain or FABRIC), row.port)
    return list(found.values())


@cache
def _seats_of() -> Select[Any]:
    c = tables.machine.c
    return select(c.id, c.domain, c.port).where(c.id.in_(objects.IDS))


def _on_machine(connection: Connection, machine: int) -> View:
    """The networks that have ports on a machine."""
    view = View()
    here = _ports_on(connection, "machine", [machine], _Past())
    for _ in range(MAX_DEPTH):  # Up: who lives on the ports that live here?
        view.update(here.values())
        if not here:
            break
        here = _ports_on(connection, "port", list(here), _Past())
    return view


def _networks_on(connection: Connection, ports: Sequence[int], was: _Past) -> View:
    """The networks of what lives on these ports, or lived on them, and of what is on that."""
    view = View()
    here = list(ports)
    for _ in range(MAX_DEPTH):
        if not here:
            break
        above = _ports_on(connection, "port", here, _Past())
        view.update(above.values())
        then = _ports_on(connection, "port", here, was) if was.ports else {}
        view.update(then.values())
        here = sorted({*above, *then})
    return view


def _ports_on(connection: Connection, column: str, hosts: Sequence[int], was: _Past) -> dict[int, int]:
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


def _places(connection: Connection, ports: Collection[int]) -> dict[int, _Was]:
    """Where these ports are; those that are not there are left out."""
    found: dict[int, _Was] = {}
    for chunk in chunks(sorted(ports)):
        for row in connection.execute(_place_of(), {"ids": chunk}):
            found[row.id] = _Was(row.network, row.host_machine, row.host_port, row.other)
    return found


@cache
def _place_of() -> Select[Any]:
    p = tables.port.c
    other = func.coalesce(p.other_machine, p.other_port).label("other")
    return select(p.id, p.network, p.host_machine, p.host_port, other).where(p.id.in_(objects.IDS))


def _present(
    connection: Connection,
    seats: Sequence[_Seat],
    networks: Collection[int],
    carriers: Mapping[int, _Carrier],
    was: _Past,
    places: Mapping[int, _Was],
) -> dict[int, View]:
    """Those of these networks that have a port on a machine, by machine; with what was, had one then. `carriers` are
    what carries them now, `places` where the ports that have moved are now."""
    then = {id: carrier.id for id, carrier in carriers.items()} | was.carriers
    bottom = {id for id in networks if then.get(id) == FABRIC}
    flat = {id for id in networks if id in then} - bottom
    # Of what has come from the wire to ports, or back, all ports have moved.
    same = {id for id in networks if id in carriers and (carriers[id].id == FABRIC) == (id in bottom)}
    uses: dict[int, Counter[int]] = defaultdict(Counter)
    wire = {seat.machine: seat.machine for seat in seats if seat.port is None}
    on_ports = {seat.port: seat.machine for seat in seats if seat.port is not None}
    ends = {id for id in bottom & same if carriers[id].encapsulated}
    for ids, hosts in ((bottom & same - ends, wire), (ends, on_ports)):
        for row in _counts(connection, ids, hosts):
            uses[row.network][hosts[row.host]] += row.ports
    for row in _counts(connection, flat & same):
        uses[row.network][row.host] += row.ports
    for id, place in was.ports.items():
        if (now := places.get(id)) is not None and now.network in same:
            uses[now.network].subtract(now.on("machine" if now.network in bottom else "port"))
        if place.network in networks:
            uses[place.network].update(place.on("machine" if place.network in bottom else "port"))
    used = {id: {host for host, ports in uses[id].items() if ports > 0} for id in bottom | flat}
    lives = _living_on(connection, set().union(*(used[id] for id in flat)), was.ports or places)
    for id in flat:
        used[id] = set().union(*(lives.get(host, ()) for host in used[id]))
    return {seat.machine: {id for id, machines in used.items() if seat.machine in machines} for seat in seats}


def _counts(connection: Connection, networks: Collection[int], hosts: Collection[int] | None = None) -> Iterator[Any]:
    """How many ports of these networks are on which host, of these."""
    few = hosts is not None and len(hosts) <= objects.CHUNK
    for chunk in chunks(sorted(networks)) if hosts is None or hosts else ():
        rows = connection.execute(_counted(few), {"ids": chunk, **({"hosts": list(hosts or ())} if few else {})})
        yield from (row for row in rows if hosts is None or row.host in hosts)


@cache
def _counted(few: bool) -> Select[Any]:
    c = tables.host_use.c
    query = select(c.network, c.host, c.count.label("ports")).where(c.network.in_(objects.IDS))
    return query.where(c.host.in_(bindparam("hosts", expanding=True))) if few else query


def _living_on(connection: Connection, ports: Collection[int], known: Mapping[int, _Was]) -> dict[int, set[int]]:
    """The machines at the bottom of these ports, and of those that they live on. `known`: where some are, or were."""
    places: dict[int, _Was] = {}
    levels = [set(ports)]
    while levels[-1]:
        told = {id: known[id] for id in levels[-1] if id in known}
        found = told | _places(connection, levels[-1] - told.keys())
        places |= found
        levels.append({host for place in found.values() for host in place.on("port")} - places.keys())
    lives = {id: place.on("machine") for id, place in places.items()}
    for level in reversed(levels):
        for id in level & places.keys():
            lives[id] = lives[id].union(*(lives.get(host, ()) for host in places[id].on("port")))
    return lives


class _Carrier(NamedTuple):
    """What carries a network within its domain, and whether the network is encapsulated."""

    id: int
    encapsulated: bool


def _carriers(connection: Connection, networks: Collection[int]) -> dict[int, _Carrier]:
    found: dict[int, _Carrier] = {}
    for chunk in chunks(sorted(networks)):
        for row in connection.execute(_carriers_of(), {"ids": chunk}):
            found[row.id] = _Carrier(FABRIC if row.encapsulated else int(row.carrier), bool(row.encapsulated))
    return found


@cache
def _carriers_of() -> Select[Any]:
    n = tables.network.c
    return select(n.id, n.carrier, n.encapsulated).where(n.id.in_(objects.IDS), n.id != FABRIC)


def _differing(connection: Connection, network: int, old: bool, new: bool, changed: set[Key]) -> set[Key]:
    """The keys of a network, which a machine had or has, of which it must hear."""
    changed = {key for key in changed if key[0] != "machine"}  # of what is on its ports
    if old and new:
        return changed
    ports = {("port", id) for id in _ports_in(connection, [network])}
    keys = changed | _other_keys(connection, network) | ports
    # What it gets has no ports that are gone.
    return keys if old else {key for key in keys if key[0] != "port"} | ports


def _other_keys(connection: Connection, network: int) -> set[Key]:
    keys: set[Key] = {("network", network)}
    for kind in ("segment", "router", "link", "policy"):
        table = tables.metadata.tables[kind]
        keys |= {(kind, id) for id in connection.scalars(select(table.c.id).where(table.c.network == network))}
    return keys


# Values


Told = tuple[list[tuple[Key, Value]], frozenset[int]]
"""Values, and those of the networks of ports among them whose hosts are machines."""


def _of_networks(connection: Connection, networks: Iterable[int], for_agent: bool) -> Told:
    """Everything that is in these networks."""
    ids = sorted(networks)
    rows: list[Row] = [
        *objects.networks(connection, "id", ids),
        *objects.segments(connection, "network", ids),
        *objects.routers(connection, "network", ids),
        *objects.links(connection, "network", ids),
        *objects.ports(connection, "network", ids),
        *objects.policies(connection, "network", ids),
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
    rows = [row for row in rows if row.network in view]
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
        below = objects.with_carriers(connection, told)
        fabric = objects.fabric(connection) if told else None
        self._left = {network: objects.left_to(below, fabric, network) for network in told if fabric is not None}
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
    return World(dict([*machines(connection, 0), *_of_networks(connection, networks, False)[0]]))
