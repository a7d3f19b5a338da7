"""What is stored, as rows in memory, and the reading of them.

Rows refer to each other by id. In a plan, what does not exist yet has an id below 0, which `write.py`
replaces; so a wanted row that equals the stored one is, without more ado, no change.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from ipaddress import ip_network
from typing import Any, ClassVar, Protocol

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    FromClause,
    RowMapping,
    Select,
    Table,
    bindparam,
    func,
    literal,
    literal_column,
    select,
    union_all,
)

from nestnet.model import canonical
from nestnet.model.values import FABRIC, OVERHEAD, Attach, Selector, Service, Tag
from nestnet.store import tables
from nestnet.store.quotas import Quota

GRANTED = tables.network.alias()
CHUNK = 10_000  # Parameters of one statement; SQLite takes 32,766.
IDS: BindParameter[Any] = bindparam(
    "ids", expanding=True
)  # A statement is made once: that takes longer than to execute it.


@dataclass(frozen=True, slots=True)
class NetworkRow:
    kind: ClassVar[str] = "network"
    id: int
    carrier: int
    name: str
    tenant: str | None
    underlay: int
    mtu: int | None
    enabled: bool
    labels: str
    description: str
    encapsulated: bool = False
    cut: bool = False
    grant: int | None = None

    @property
    def network(self) -> int:
        return self.id

    @property
    def is_open(self) -> bool:
        """Neither its owner nor whoever granted its hosts has closed it."""
        return self.enabled and not self.cut


WIRE = NetworkRow(FABRIC, FABRIC, "", None, 4, None, True, "{}", "")
"""The fabric, for who asks of it what is asked of networks."""


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """`vni` is None until it is written. `physical` is the physical network whose VLAN it rides on; of one that chooses
    none that is None until then."""

    kind: ClassVar[str] = "segment"
    id: int
    network: int
    name: str
    vni: int | None
    cidrs: tuple[str, ...]
    dns: tuple[str, ...]
    labels: str
    description: str
    transparent: bool = False
    physical: str | None = None
    vlan: int | None = None


@dataclass(frozen=True, slots=True)
class RouterRow:
    """`interfaces` are (segment, gateway addresses), by rising segment. `mac` is None until it is written."""

    kind: ClassVar[str] = "router"
    id: int
    network: int
    name: str
    mac: int | None
    interfaces: tuple[tuple[int, tuple[str, ...]], ...]
    labels: str
    description: str


@dataclass(frozen=True, slots=True)
class LinkRow:
    """`between` are two routers, in the order in which they were first given. `rate` in bit/s; 0: no limit."""

    kind: ClassVar[str] = "link"
    id: int
    network: int
    name: str
    between: tuple[int, int]
    cost: int
    up: bool
    rate: int
    labels: str
    description: str


@dataclass(frozen=True, slots=True)
class GroupRow:
    kind: ClassVar[str] = "group"
    id: int
    network: int
    name: str


@dataclass(frozen=True, slots=True)
class PortRow:
    """`host` is a machine's id if the fabric carries the network, else a port's of the carrier, whoever runs the agent
    there; so is `other`, where else it lives while it moves, or 0. `mac` None: to be chosen. `trunk` is the port that
    has it behind `tag`, or 0."""

    kind: ClassVar[str] = "port"
    id: int
    network: int
    segment: int
    name: str
    host: int
    mac: int | None
    addresses: tuple[str, ...]
    owns: tuple[str, ...]
    groups: tuple[int, ...]
    hosts: bool
    attach: Attach | None
    rate: int
    enabled: bool
    labels: str
    description: str
    other: int = 0
    leaving: bool = False
    trunk: int = 0
    tag: int = 0


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """`spec` is the JSON that people wrote. Two policies with the same `meaning` are the same."""

    kind: ClassVar[str] = "policy"
    id: int
    network: int
    spec: str
    sources: tuple[Selector, ...]
    targets: tuple[Selector, ...]
    services: tuple[Service, ...]
    allow: bool
    priority: int

    @property
    def meaning(self) -> tuple[Any, ...]:
        return (self.sources, self.targets, self.services, self.allow, self.priority)


Row = NetworkRow | SegmentRow | RouterRow | LinkRow | GroupRow | PortRow | PolicyRow


@dataclass
class Contents:
    """What is in one network, by name; policies by what they mean."""

    segments: dict[str, SegmentRow] = field(default_factory=dict)
    routers: dict[str, RouterRow] = field(default_factory=dict)
    links: dict[str, LinkRow] = field(default_factory=dict)
    groups: dict[str, GroupRow] = field(default_factory=dict)
    ports: dict[str, PortRow] = field(default_factory=dict)
    policies: dict[tuple[Any, ...], PolicyRow] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        for collection in (self.segments, self.routers, self.links, self.groups, self.ports, self.policies):
            yield from collection.values()


@dataclass(frozen=True, slots=True)
class MachineRow:
    """`address` is text in canonical form; `nics` are names of interfaces, `vlan` is theirs.
    `trunks` are (physical network, NIC), by name. `port`: the
    host port whose workload it is, None for a machine of the fabric; then its address and MTU are that port's."""

    id: int
    name: str
    address: str
    mtu: int
    nics: tuple[str, ...]
    fenced: bool = False
    port: int | None = None
    vlan: Tag | None = None
    trunks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class GrantRow:
    """Hosts of a carrier, None: all, for networks of a tenant. `tenant` is None while nobody has redeemed it; `ends`
    is in seconds since 1970."""

    id: int
    carrier: int
    tenant: str | None
    name: str
    hosts: frozenset[int] | None
    quota: Quota
    suspended: bool
    cut: bool
    ends: float | None
    owner: str | None = None  # whose the carrier is

    @property
    def is_open(self) -> bool:
        """May anything new be carried by it?"""
        return not self.suspended and not self.cut


def grants(connection: Connection, *which: ColumnElement[bool]) -> list[GrantRow]:
    """Those of the grants for which this holds; if nothing is said, all there are, and the invitations that may still
    be redeemed. A condition may name `GRANTED`, the carrier."""
    return [
        GrantRow(
            row.id,
            row.carrier,
            row.grantee,
            row.name,
            frozenset(json.loads(row.hosts)) if row.hosts is not None else None,
            Quota(row.networks, row.segments, row.ports, row.rate),
            bool(row.suspended),
            bool(row.cut),
            row.ends,
            row.owner,
        )
        for row in connection.execute(_grants().where(*(which or (are_alive(),))))
    ]


@cache
def _grants() -> Select[Any]:
    g, grantee, owner = tables.grant, tables.tenant.alias(), tables.tenant.alias()
    return (
        select(g, grantee.c.name.label("grantee"), owner.c.name.label("owner"))
        .outerjoin(grantee, g.c.tenant == grantee.c.id)
        .join(GRANTED, GRANTED.c.id == g.c.carrier)
        .outerjoin(owner, owner.c.id == GRANTED.c.tenant)
        .order_by(g.c.id)
    )


def are_alive() -> ColumnElement[bool]:
    """The condition that somebody has a grant, or that it may still be redeemed."""
    return tables.grant.c.tenant.is_not(None) | (tables.grant.c.until > time.time())


def machines(connection: Connection, domain: int = FABRIC) -> list[MachineRow]:
    """Every machine of a domain: those that have joined the fabric, or those on ports of a network, joined or not."""
    return [
        MachineRow(
            *(row.id, row.name, row.address, row.mtu, tuple(json.loads(row.nics)), bool(row.fenced), row.port),
            vlan=vlan_of(row),
            trunks=tuple(sorted(json.loads(row.trunks).items())),
        )
        for row in connection.execute(_machines(), {"domain": domain})
    ]


@cache
def _machines() -> Select[Any]:
    c = tables.machine.c
    return select(tables.machine).where(c.domain == bindparam("domain")).order_by(c.id)


def vlan_of(machine: Any) -> Tag | None:
    """The VLAN that a row of `machine` says."""
    return Tag(machine.vlan, machine.vlan_type) if machine.vlan is not None else None


def vlan_columns(vlan: Tag | None) -> dict[str, Any]:
    """The same as columns."""
    return {"vlan": vlan.id if vlan else None, "vlan_type": vlan.type if vlan else None}


def agents_on(connection: Connection, ports: Iterable[int]) -> dict[int, int]:
    """Host port -> the machine that its workload is, where it is one."""
    c = tables.machine.c
    found: dict[int, int] = {}
    for chunk in chunks(sorted(set(ports))):
        rows = connection.execute(select(c.id, c.port).where(c.port.in_(chunk)))
        found.update({row.port: row.id for row in rows})
    return found


class Networks(Protocol):
    """Networks by id."""

    def __getitem__(self, id: int, /) -> NetworkRow: ...
    def get(self, id: int, /) -> NetworkRow | None: ...


def domain_in(networks: Networks, network: int) -> int:
    """Where a network has its VNIs, and which machines its ports live on: the fabric's, or those on ports of a network.
    `networks`, by id, has it and all below it."""
    while network != FABRIC:
        row = networks[network]
        if row.encapsulated:
            return row.carrier
        network = row.carrier
    return FABRIC


def domains(connection: Connection, networks: Iterable[int]) -> dict[int, int]:
    """Network -> its domain: the fabric, or the network on whose ports the machines are that its ports live on."""
    wanted = sorted(set(networks))
    found = dict.fromkeys(wanted, FABRIC)
    for chunk in list(chunks(wanted)) or [[]]:
        found.update({row.root: row.carrier for row in connection.execute(_domains(), {"ids": chunk})})
    return found


@cache
def _domains() -> Select[Any]:
    n, below = tables.network.c, tables.network.alias()
    walk = select(n.id.label("root"), n.carrier, n.encapsulated).where(n.id.in_(IDS)).cte(recursive=True)
    deeper = select(walk.c.root, below.c.carrier, below.c.encapsulated).where(below.c.id == walk.c.carrier)
    walk = walk.union_all(deeper.where(walk.c.encapsulated.is_(False), walk.c.carrier != FABRIC))
    return select(walk.c.root, walk.c.carrier).where(walk.c.encapsulated | (walk.c.carrier == FABRIC))


def with_carriers(connection: Connection, ids: Iterable[int]) -> dict[int, NetworkRow]:
    """These networks, and all that carries them, by id."""
    found: dict[int, NetworkRow] = {}
    for chunk in chunks(sorted(set(ids))):
        found.update({row.id: as_network(row) for row in connection.execute(_with_carriers(), {"ids": chunk})})
    return found


@cache
def _with_carriers() -> Select[Any]:
    n, below = tables.network, tables.network.alias()
    walk = select(n.c.id, n.c.carrier).where(n.c.id.in_(IDS)).cte(recursive=True)
    walk = walk.union(select(below.c.id, below.c.carrier).where(below.c.id == walk.c.carrier))
    query = select(n, tables.tenant.c.name.label("owner")).join(walk, walk.c.id == n.c.id)
    return query.outerjoin(tables.tenant, n.c.tenant == tables.tenant.c.id).where(n.c.id != FABRIC)


def load_contents(connection: Connection, networks: Sequence[int]) -> dict[int, Contents]:
    """What is in these networks."""
    contents = {network: Contents() for network in networks}
    networks = networks or [FABRIC]  # There is nothing in it, but to be asked for it takes as long.
    for segment in segments(connection, "network", networks):
        contents[segment.network].segments[segment.name] = segment
    for router in routers(connection, "network", networks):
        contents[router.network].routers[router.name] = router
    for link in links(connection, "network", networks):
        contents[link.network].links[link.name] = link
    for group in groups(connection, "network", networks):
        contents[group.network].groups[group.name] = group
    for port in ports(connection, "network", networks):
        contents[port.network].ports[port.name] = port
    for policy in policies(connection, "network", networks):
        contents[policy.network].policies[policy.meaning] = policy
    return contents


# One kind each, by the `network` they are in or by their own `id`, by rising id.


def segments(connection: Connection, by: str, ids: Sequence[int]) -> list[SegmentRow]:
    t = tables
    cidrs = _parts(connection, t.segment_cidr, t.segment, by, ids, "family")
    return [
        SegmentRow(
            **{**_pick(row, SegmentRow), "dns": tuple(json.loads(row["dns"]))},
            cidrs=tuple(part["cidr"] for part in cidrs[row["id"]]),
        )
        for row in _rows(connection, t.segment, by, ids)
    ]


def routers(connection: Connection, by: str, ids: Sequence[int]) -> list[RouterRow]:
    t = tables
    joined = _parts(connection, t.router_interface, t.router, by, ids, "segment")
    addresses = _parts(connection, t.address, t.router, by, ids, "position")
    found = []
    for row in _rows(connection, t.router, by, ids):
        gateways: dict[int, tuple[str, ...]] = {part["segment"]: () for part in joined[row["id"]]}
        for part in addresses[row["id"]]:
            gateways[part["segment"]] += (part["address"],)
        found.append(RouterRow(**_pick(row, RouterRow), interfaces=tuple(gateways.items())))
    return found


def links(connection: Connection, by: str, ids: Sequence[int]) -> list[LinkRow]:
    return [
        LinkRow(**_pick(row, LinkRow), between=(row["router"], row["other"]))
        for row in _rows(connection, tables.link, by, ids)
    ]


def groups(connection: Connection, by: str, ids: Sequence[int]) -> list[GroupRow]:
    return [GroupRow(**row) for row in _rows(connection, tables.group, by, ids)]


def ports(connection: Connection, by: str, ids: Sequence[int]) -> list[PortRow]:
    t = tables
    addresses = _parts(connection, t.address, t.port, by, ids, "position")
    owned = _parts(connection, t.owned, t.port, by, ids, "position")
    members = _parts(connection, t.port_group, t.port, by, ids, "group")
    given = _parts(connection, t.attachment, t.port, by, ids, "name")

    def host(row: RowMapping, side: str) -> int:
        return int(row[f"{side}_port"] or row[f"{side}_on"] or row[f"{side}_machine"] or 0)

    return [
        PortRow(
            **{**_pick(row, PortRow), "trunk": row["trunk"] or 0, "tag": row["tag"] or 0},
            host=host(row, "host"),
            other=host(row, "other"),
            addresses=tuple(part["address"] for part in addresses[row["id"]]),
            owns=tuple(part["prefix"] for part in owned[row["id"]]),
            groups=tuple(part["group"] for part in members[row["id"]]),
            attach=next((Attach(part["kind"], part["name"]) for part in given[row["id"]]), None),
        )
        for chunk in chunks(sorted(ids))
        for row in connection.execute(_ports(by), {"ids": chunk}).mappings()
    ]


@cache
def _ports(by: str) -> Select[Any]:
    # Who lives on a machine that is on a port lives on that port, to all but agents.
    p, here, there = tables.port, tables.machine.alias(), tables.machine.alias()
    return (
        select(p, here.c.port.label("host_on"), there.c.port.label("other_on"))
        .outerjoin(here, p.c.host_machine == here.c.id)
        .outerjoin(there, p.c.other_machine == there.c.id)
        .where(p.c[by].in_(IDS))
        .order_by(p.c.id)
    )


@cache
def hosts_in() -> Select[Any]:
    """The hosts of `carrier`: one statement for machines and ports. Their rows and names."""
    m, p = tables.machine.c, tables.port.c
    carrier: BindParameter[int] = bindparam("carrier")
    machines = select(m.id, m.name).where(carrier == literal(FABRIC), m.port.is_(None))
    both = union_all(machines, select(p.id, p.name).where(p.network == carrier, p.hosts.is_(True))).subquery()
    return select(both).order_by(both.c.id)


def behind(connection: Connection, trunks: Sequence[int]) -> list[PortRow]:
    """The ports behind the tags of these."""
    return ports(connection, "trunk", trunks)


def ports_under(connection: Connection, machines: Iterable[int]) -> dict[int, int]:
    """Machine -> the host port that it is on, where it is on one."""
    c = tables.machine.c
    found: dict[int, int] = {}
    for chunk in chunks(sorted(machines)):
        rows = connection.execute(select(c.id, c.port).where(c.id.in_(chunk), c.port.is_not(None)))
        found.update({row.id: row.port for row in rows})
    return found


def policies(connection: Connection, by: str, ids: Sequence[int]) -> list[PolicyRow]:
    return [
        PolicyRow(row["id"], row["network"], row["spec"], **_read_meaning(row["value"]))
        for row in _rows(connection, tables.policy, by, ids)
    ]


def networks(connection: Connection, by: str, ids: Sequence[int]) -> list[NetworkRow]:
    """By `id` or by `carrier`."""
    found: list[NetworkRow] = []
    for chunk in chunks(sorted(ids)):
        found += [as_network(row) for row in connection.execute(_networks(by), {"ids": chunk})]
    return found


def network(connection: Connection, id: int) -> NetworkRow:
    """A network that is there, or the fabric."""
    return as_network(connection.execute(_one_network(), {"id": id}).one())


@cache
def _one_network() -> Select[Any]:
    n = tables.network
    return select(n, tables.tenant.c.name.label("owner")).outerjoin(tables.tenant).where(n.c.id == bindparam("id"))


@cache
def _networks(by: str) -> Select[Any]:
    n = tables.network
    return networks_with_owners().where(n.c[by].in_(IDS), n.c.id != FABRIC).order_by(n.c.id)


def called(names: Sequence[str] | BindParameter[Any], owners: Select[tuple[int]] | None) -> ColumnElement[bool]:
    """The condition that a network is called so, wherever, and is one of these tenants', by row; None: of anybody.

    On the wire no two are called the same, so the unique index finds them; all others have an index of their own."""
    # SQLite knows by the number itself that the index will do, and by the plus not to look at all that one owns.
    c = tables.network.c
    wire: ColumnElement[int] = literal_column(str(FABRIC))
    owner: ColumnElement[int] = literal_column("+network.tenant")
    there, elsewhere = (
        select(c.id).where(which, c.name.in_(names)) for which in (c.carrier == wire, c.carrier != wire)
    )
    there = there.where(c.id != FABRIC)
    if owners is not None:
        there, elsewhere = there.where(owner.in_(owners)), elsewhere.where(c.tenant.in_(owners))
    return c.id.in_(there.union_all(elsewhere))


def networks_with_owners() -> Select[Any]:
    """What `as_network` takes."""
    n, t = tables.network, tables.tenant
    return select(n, t.c.name.label("owner")).outerjoin(t, n.c.tenant == t.c.id)


def as_network(row: Any) -> NetworkRow:
    """A row of `networks_with_owners`."""
    return NetworkRow(**{**_pick(row._mapping, NetworkRow), "tenant": row.owner})


def _rows(connection: Connection, table: Table, by: str, ids: Sequence[int]) -> Iterator[RowMapping]:
    for chunk in chunks(sorted(ids)):
        yield from connection.execute(_rows_of(table, by), {"ids": chunk}).mappings()


@cache
def _rows_of(table: Table, by: str) -> Select[Any]:
    return select(table).where(table.c[by].in_(IDS)).order_by(table.c.id)


def _parts(
    connection: Connection, table: Table, owner: Table, by: str, ids: Sequence[int], order: str
) -> Mapping[int, list[RowMapping]]:
    """Rows that belong to rows of `owner`, by the owner's id."""
    found: dict[int, list[RowMapping]] = defaultdict(list)
    for chunk in chunks(sorted(ids)):
        for row in connection.execute(_parts_of(table, owner, by, order), {"ids": chunk}).mappings():
            found[row[owner.name]].append(row)
    return found


@cache
def _parts_of(table: Table, owner: Table, by: str, order: str) -> Select[Any]:
    column = table.c[owner.name]
    query = select(table).join(owner, column == owner.c.id).where(owner.c[by].in_(IDS))
    return query.order_by(column, table.c[order])


def machines_of(connection: Connection, ports: Iterable[int], other: bool = False) -> dict[int, int]:
    """Port -> the machine whose agent has it, at the end of its chain of hosts; `other`: the other one, if something
    there moves."""
    found: dict[int, int] = {}
    for chunk in chunks(sorted(set(ports))):
        found.update({row.root: row.machine for row in connection.execute(_machines_of(other), {"ids": chunk})})
    return found


@cache
def _machines_of(other: bool) -> Select[Any]:
    p, below = tables.port, tables.port.alias()

    def host(table: FromClause) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
        machine, port = table.c.host_machine, table.c.host_port
        if not other:
            return machine, port
        return func.coalesce(table.c.other_machine, machine), func.coalesce(table.c.other_port, port)

    machine, port = host(p)
    first = select(p.c.id.label("root"), machine.label("machine"), port.label("port")).where(p.c.id.in_(IDS))
    walk = first.cte(recursive=True)
    deeper = select(walk.c.root, *host(below)).where(below.c.id == walk.c.port, walk.c.machine.is_(None))
    walk = walk.union_all(deeper)
    return select(walk.c.root, walk.c.machine).where(walk.c.machine.is_not(None))


def chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def above_domains(connection: Connection, domains: Iterable[int]) -> list[NetworkRow]:
    """All networks in these domains, and in those that are on ports of theirs."""
    found: dict[int, NetworkRow] = {}
    at = sorted(domains)
    while at:
        level = [row for row in networks(connection, "carrier", at) if row.encapsulated or row.carrier in found]
        level = [row for row in level if row.id not in found]
        found.update({row.id: row for row in level})
        at = [row.id for row in level]
    return list(found.values())


def left(connection: Connection, domain: int) -> int:
    """Bytes of IP that the machines of a domain leave to networks: those of the wire, or of the network whose ports
    they are on, less one encapsulation (rule 9)."""
    most = left_to(with_carriers(connection, [domain]), fabric(connection), domain)
    if domain == FABRIC:
        return most
    (row,) = networks(connection, "id", [domain])
    return _mtu(row, most) - OVERHEAD[family(connection, domain)]


def left_to(networks: Mapping[int, NetworkRow], fabric: Fabric, network: int) -> int:
    """Bytes of IP that its domain leaves to a network. `networks`, by id, has it and all below it."""
    way = []
    while network != FABRIC:
        way.append(row := networks[network])
        network = row.carrier
    left = fabric.left
    for row in reversed(way):
        left = left_by(networks.get(row.carrier, WIRE), left, row)
    return left


def left_by(carrier: NetworkRow, left: int, row: NetworkRow) -> int:
    """What a carrier to which so much is left leaves to a network that it carries."""
    return _mtu(carrier, left) - OVERHEAD[row.underlay] if row.encapsulated else left


def _mtu(row: NetworkRow, left: int) -> int:
    return min(left, row.mtu) if row.mtu is not None else left


def family(connection: Connection, domain: int) -> int:
    """Of the addresses by which the machines of a domain reach each other: 4 or 6."""
    if domain == FABRIC:
        return fabric(connection).family
    c = tables.network.c
    query = select(c.underlay).where(c.carrier == domain, c.encapsulated.is_(True)).limit(1)
    return int(connection.scalar(query) or 4)


def current_revision(connection: Connection) -> int:
    return int(connection.execute(_revision()).scalar_one())


@cache
def _revision() -> Select[Any]:
    return select(tables.revision.c.n)


@dataclass(frozen=True, slots=True)
class Fabric:
    """The wire: `mtu` is what the machine with the smallest NIC can send, in bytes of IP, `family` (4 or 6) that of the
    machines' addresses."""

    mtu: int
    family: int

    @property
    def left(self) -> int:
        """Bytes of IP that it leaves to networks."""
        return self.mtu - OVERHEAD[self.family]


def fabric(connection: Connection) -> Fabric:
    """The wire as it is."""
    row = connection.execute(_fabric()).one()
    return Fabric(row.mtu, row.underlay)


@cache
def _fabric() -> Select[Any]:
    c = tables.network.c
    return select(c.mtu, c.underlay).where(c.id == FABRIC)


def meaning_text(row: PolicyRow) -> str:
    """Equal policies are equal text."""
    sides = canonical.side(row.sources), canonical.side(row.targets)
    return canonical.meaning_text(*sides, canonical.about(row.services), row.allow, row.priority)


def _read_meaning(text: str) -> dict[str, Any]:
    *sides, services, allow, priority = json.loads(text)
    sources, targets = (
        tuple(Selector(kind, id, ip_network(cidr) if cidr else None) for kind, id, cidr in side) for side in sides
    )
    about = tuple(Service(*each) for each in services)
    return {"sources": sources, "targets": targets, "services": about, "allow": bool(allow), "priority": priority}


def _pick(row: Mapping[Any, Any], kind: Any) -> dict[str, Any]:
    return {name: row[name] for name in kind.__slots__ if name in row}


def column_names(table: Table) -> list[str]:
    return [column.name for column in table.columns]
