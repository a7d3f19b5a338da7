"""How networks and their hosts are: up, or down and why. Worked out from what carries them, never stored.

To whoever asks, how long the answer takes must not tell how much that is. So the carriers of a network are asked for
by their *stamp*, in one statement that the database walks down with: which networks they are, and the version of each,
which every change of anything in it raises. What a carrier is like at its version, a *level*, is remembered; so is what
was worked out for a stamp. A level that changes is read anew by whoever changed it, not by whoever asks next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, FromClause, Select, Text, bindparam, case, cast, func, select

from nestnet.model import standing
from nestnet.model.standing import Cause, Lost
from nestnet.model.values import FABRIC, Network, Port, Value, World
from nestnet.store import feed, objects, tables
from nestnet.store.database import may_write
from nestnet.store.heard import Heard
from nestnet.store.kept import Kept
from nestnet.store.objects import IDS, WIRE, Fabric, NetworkRow, chunks

KEPT = 200_000  # Values in all levels that are remembered, and again in all chains.
FOUND = 1000  # Standings that one chain remembers.

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Standing:
    """Of one network: the host ports or machines that it uses, those of them that are down, and the carrier that is
    disabled, if one is."""

    hosts: frozenset[int] = frozenset()
    down: dict[int, Cause] = field(default_factory=dict)
    closed: Cause | None = None


@dataclass(frozen=True, slots=True)
class Feet:
    """What some hosts stand on: machines of the fabric, and host ports whose workloads are machines."""

    machines: frozenset[int]
    agents: frozenset[int]


_Use = tuple[int, bool, frozenset[int]]  # by a network: its underlay, whether it is encapsulated, the hosts
_Found = tuple[_Use, frozenset[tuple[int, str]], frozenset[tuple[int, str]]]  # with the lost machines and agents


@dataclass(frozen=True)
class Level:
    """A network at a version: itself and what is in it, but of its ports only those that are hosts of what it carries,
    as far as anybody has asked."""

    row: NetworkRow
    version: str
    values: dict[tuple[str, int], Value]
    ports: dict[int, Port]

    @property
    def size(self) -> int:
        return len(self.values) + len(self.ports)


@dataclass(frozen=True)
class Chain:
    """A network, or the fabric, and all that carries it, as they are at a stamp."""

    carrier: NetworkRow
    left: int  # bytes of IP that its domain leaves to the carrier
    world: World
    asked: frozenset[int]
    feet_of: dict[_Use, Feet] = field(default_factory=dict)
    found: dict[_Found, Standing] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return 1 + len(self.world.values) + len(self.asked)

    def left_to(self, row: NetworkRow) -> int:
        """Bytes of IP that its domain leaves to a network that is carried here."""
        return objects.left_by(self.carrier, self.left, row)

    def feet(self, network: Network, use: _Use) -> Feet:
        if (known := self.feet_of.get(use)) is not None:
            return known
        at, agents = set(use[2]), set[int]()
        while network.carrier != FABRIC:
            agents |= at if network.encapsulated else set()
            network, at = self.world.networks[network.carrier], {self.world.ports[host].host for host in at}
        return _keep(self.feet_of, use, Feet(frozenset(at), frozenset(agents)))

    def standing(self, network: Network, use: _Use, lost: Lost) -> Standing:
        feet = self.feet(network, use)
        gone = frozenset((id, why) for id, why in lost.machines.items() if id in feet.machines)
        away = frozenset((id, why) for id, why in lost.ports.items() if id in feet.agents)
        key = (use, gone, away)
        if (known := self.found.get(key)) is not None:
            return known
        down = standing.fallen(self.world, network, use[2], Lost(dict(gone), dict(away)))
        return _keep(self.found, key, Standing(use[2], down, standing.closed(self.world, network)))


class Chains:
    """What is remembered. Threads may share it."""

    def __init__(self, read: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._read = read  # begins a transaction that sees what is stored
        self._levels: Kept[int, Level] = Kept(KEPT)
        self._chains: Kept[str, Chain] = Kept(KEPT)

    def of(self, connection: Connection, uses: Mapping[int, Collection[int]]) -> dict[int, Chain]:
        """The chains of these carriers, which know these hosts."""
        found: dict[int, Chain] = {}
        for carrier, stamp in _stamps(connection, uses).items():
            chain, hosts = self._chains.get(stamp), frozenset(uses[carrier])
            if chain is None or not hosts <= chain.asked:
                chain = self._make(connection, carrier, stamp, hosts | (chain.asked if chain is not None else hosts))
            found[carrier] = chain
        return found

    def changed(self, networks: Iterable[int]) -> None:
        """These were: what is remembered of them is read anew."""
        known = {id: level for id in networks if (level := self._levels.get(id)) is not None}
        if not known:
            return
        with self._read() as stored:
            versions = {id: text for stamp in _stamps(stored, known).values() for id, text in _versions(stamp).items()}
            fresh = _load(stored, {id: versions[id] for id in known if id in versions})
            ports = objects.ports(stored, "id", sorted({id for level in known.values() for id in level.ports}))
        for level in _with(fresh, ports).values():
            self._levels.keep(level.row.id, level, level.size)

    def _make(self, connection: Connection, carrier: int, stamp: str, hosts: frozenset[int]) -> Chain:
        """A chain from its levels."""
        versions = _versions(stamp)
        mtu, family, _ = versions.pop(FABRIC).split("/")
        levels = {
            id: level
            for id, version in versions.items()
            if (level := self._levels.get(id)) is not None and level.version == version
        }
        remembered = True
        if len(levels) != len(versions) or not _knows(levels, carrier, hosts):
            if may_write(connection):  # What it reads may yet be undone: it is remembered if it is stored.
                with self._read() as stored:
                    if _stamps(stored, [carrier]).get(carrier) == stamp:
                        return self._make(stored, carrier, stamp, hosts)
                remembered = False
            levels |= _load(connection, {id: version for id, version in versions.items() if id not in levels})
            levels = _with_hosts(connection, levels, carrier, hosts)
        if remembered:
            for id, level in levels.items():
                self._levels.keep(id, level, level.size)
        values: dict[tuple[str, int], Value] = {}
        for level in levels.values():
            values |= level.values
            values |= {("port", id): port for id, port in level.ports.items()}
        networks = {id: level.row for id, level in levels.items()}
        left = objects.left_to(networks, Fabric(int(mtu), int(family)), carrier)
        chain = Chain(networks.get(carrier, WIRE), left, World(values), hosts)
        if remembered:
            self._chains.keep(stamp, chain, chain.size)
        return chain


def standings(
    connection: Connection, chains: Chains, heard: Heard, networks: Collection[NetworkRow]
) -> dict[int, tuple[Chain, Standing]]:
    """How these networks are, by id, and what carries them."""
    hosts: dict[int, set[int]] = defaultdict(set)
    c = tables.host_use.c
    for chunk in chunks(sorted(row.id for row in networks)):
        for used in connection.execute(select(c.network, c.host).where(c.network.in_(IDS)), {"ids": chunk}):
            hosts[used.network].add(used.host)
    of_carrier: dict[int, set[int]] = defaultdict(set)
    for row in networks:
        of_carrier[row.carrier] |= hosts[row.id]
    known = chains.of(connection, of_carrier)
    values: dict[int, tuple[Chain, Network, _Use]] = {}
    machines, agents = set[int](), set[int]()
    for row in networks:
        network = feed.value_of(row, 0)
        assert isinstance(network, Network)
        use = (row.underlay, row.encapsulated, frozenset(hosts[row.id]))
        feet = known[row.carrier].feet(network, use)
        machines |= feet.machines
        agents |= feet.agents
        values[row.id] = known[row.carrier], network, use
    lost = lost_machines(connection, heard, machines, agents)
    return {id: (chain, chain.standing(network, use, lost)) for id, (chain, network, use) in values.items()}


def lost_machines(connection: Connection, heard: Heard, ids: Iterable[int], on: Iterable[int] = ()) -> Lost:
    """Those of these machines, and of those on these host ports, that are not there, and why."""
    machines: dict[int, str] = {}
    ports: dict[int, str] = {}
    wanted = [*((True, id) for id in sorted(set(ids))), *((False, id) for id in sorted(set(on)))]
    for chunk in list(chunks(wanted)) or [[]]:
        these = {"ids": [id for own, id in chunk if own], "on": [id for own, id in chunk if not own]}
        for row in connection.execute(_reported(), these):
            unheard = row.at is not None and heard.age(row.id) is None and not heard.is_awaited()
            found, id = (machines, row.id) if row.port is None else (ports, row.port)
            if row.fenced:
                found[id] = standing.FENCED
            elif unheard or heard.is_lost(row.id):
                found[id] = standing.LOST
            elif row.port is not None and row.at is None:
                found[id] = standing.ABSENT
    return Lost(machines, ports)


@cache
def _reported() -> Select[Any]:
    m, r = tables.machine, tables.report
    these = m.c.id.in_(IDS) | m.c.port.in_(bindparam("on", expanding=True))
    return select(m.c.id, m.c.fenced, m.c.port, r.c.at).outerjoin(r).where(these)


def _stamps(connection: Connection, carriers: Iterable[int]) -> dict[int, str]:
    """By carrier. After a restore versions may come again, but not under the same epoch."""
    found: dict[int, str] = {}
    for chunk in chunks(sorted(set(carriers))):
        for row in connection.execute(_walk_of_stamps(), {"ids": chunk}):
            found[row.root] = f"{row.stamp} {row.epoch}"
    return found


def _versions(stamp: str) -> dict[int, str]:
    """Network -> its version, of those in a stamp; that of the fabric is its MTU, a slash and its family."""
    *pairs, epoch = stamp.split(" ")
    found = dict(pair.split(":") for pair in pairs)
    return {int(id): f"{version}/{epoch}" for id, version in found.items()}


@cache
def _walk_of_stamps() -> Select[Any]:
    def step(n: FromClause, root: ColumnElement[Any]) -> Select[Any]:
        wire = cast(n.c.mtu, Text) + "/" + cast(n.c.underlay, Text)
        version = case((n.c.id == FABRIC, wire), else_=cast(n.c.version, Text))
        return select(root, n.c.id, n.c.carrier, (cast(n.c.id, Text) + ":" + version).label("known"))

    n, below = tables.network.alias(), tables.network.alias()
    epoch = select(tables.store.c.epoch).scalar_subquery().label("epoch")
    walk = step(n, n.c.id.label("root")).where(n.c.id.in_(IDS)).cte(recursive=True)
    walk = walk.union_all(step(below, walk.c.root).where(below.c.id == walk.c.carrier, walk.c.id != FABRIC))
    stamp = func.aggregate_strings(walk.c.known, " ").label("stamp")
    return select(walk.c.root, stamp, epoch).group_by(walk.c.root)


def _load(connection: Connection, versions: Mapping[int, str]) -> dict[int, Level]:
    """These networks, which are at these versions, without ports."""
    ids = sorted(versions)
    networks = objects.networks(connection, "id", ids)
    rows: Sequence[objects.Row] = [
        *networks,
        *objects.segments(connection, "network", ids),
        *objects.routers(connection, "network", ids),
        *objects.links(connection, "network", ids),
        *objects.policies(connection, "network", ids),
    ]
    values: dict[int, dict[tuple[str, int], Value]] = defaultdict(dict)
    for row in rows:
        values[row.network][row.kind, row.id] = feed.value_of(row, 0)
    return {row.id: Level(row, versions[row.id], values[row.id], {}) for row in networks}


def _knows(levels: Mapping[int, Level], carrier: int, hosts: Collection[int]) -> bool:
    """Are these hosts of a carrier known, and all that they live on? New ones of the fabric are not."""
    if carrier == FABRIC:
        return not hosts
    at = set(hosts)
    while carrier != FABRIC:
        level = levels[carrier]
        if not at <= level.ports.keys():
            return False
        carrier, at = level.row.carrier, {level.ports[host].host for host in at}
    return True


def _with_hosts(
    connection: Connection, levels: dict[int, Level], carrier: int, hosts: Collection[int]
) -> dict[int, Level]:
    """The same when these hosts of a carrier are known, and what they live on. The fabric is asked for what it has not:
    that a host is new takes the same statements there."""
    if carrier == FABRIC:
        _ports_below(connection, ())
        return levels
    at = set(hosts)
    while carrier != FABRIC:
        if more := at - levels[carrier].ports.keys():
            levels = _with(levels, _ports_below(connection, more))
        level = levels[carrier]
        carrier, at = level.row.carrier, {level.ports[host].host for host in at}
    return levels


def _with(levels: Mapping[int, Level], ports: Iterable[objects.PortRow]) -> dict[int, Level]:
    """The same levels when they know these ports, too."""
    more: dict[int, dict[int, Port]] = defaultdict(dict)
    for row in ports:
        value = feed.value_of(row, 0)
        assert isinstance(value, Port)
        more[row.network][row.id] = value
    return {id: replace(level, ports=level.ports | more[id]) for id, level in levels.items()}


def _ports_below(connection: Connection, hosts: Collection[int]) -> list[objects.PortRow]:
    """These ports, and those that they live on, down to machines."""
    ids = {0}  # No port has that; so something is asked for.
    for chunk in list(chunks(sorted(hosts))) or [[]]:
        ids.update(connection.scalars(_hosts_below(), {"ids": chunk}))
    return objects.ports(connection, "id", sorted(ids))


@cache
def _hosts_below() -> Select[Any]:
    p, below, on = tables.port, tables.port.alias(), tables.machine.alias()
    walk = select(p.c.id).where(p.c.id.in_(IDS)).cte(recursive=True)
    host = func.coalesce(below.c.host_port, on.c.port).label("id")
    deeper = select(host).select_from(below.outerjoin(on, below.c.host_machine == on.c.id))
    walk = walk.union(deeper.where(below.c.id == walk.c.id, host.is_not(None)))
    return select(walk.c.id)


def _keep(kept: dict[K, V], key: K, value: V) -> V:
    if len(kept) >= FOUND:
        kept.clear()
    kept[key] = value
    return value
