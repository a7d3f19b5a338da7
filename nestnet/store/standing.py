"""How networks and their hosts are: up, or down and why. Worked out from what carries them, never stored.

To whoever asks, how long the answer takes must not tell how much that is. So what carries a network is asked for by its
*stamp*, in one statement that the database walks down with: which networks those are, and the version of each, which
every change of anything in them raises. What was worked out for a stamp is kept, and holds as long as that is the
stamp. What is not known yet takes the same statements at any depth, on the wire too.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from threading import Lock
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, FromClause, Select, Text, bindparam, case, cast, func, select

from nestnet.model import standing
from nestnet.model.standing import Cause, Lost
from nestnet.model.values import FABRIC, Network, World
from nestnet.store import feed, objects, tables
from nestnet.store.database import may_write
from nestnet.store.heard import Heard
from nestnet.store.objects import IDS, WIRE, NetworkRow, chunks

KEPT = 200_000  # Values in all chains that are remembered.
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
class Chain:
    """A network, or the fabric, and all that carries it, as they are at a stamp; of the ports those that are hosts of
    what it carries, as far as anybody has asked."""

    carrier: NetworkRow
    left: int  # bytes of IP that its domain leaves to the carrier
    world: World
    asked: frozenset[int] = frozenset()
    feet_of: dict[_Use, Feet] = field(default_factory=dict)
    found: dict[_Found, Standing] = field(default_factory=dict)

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
    """The chains that are remembered, by stamp. Threads may share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[str, Chain] = OrderedDict()
        self._size = 0

    def of(self, connection: Connection, uses: dict[int, set[int]]) -> dict[int, Chain]:
        """The chains of these carriers, which know these hosts."""
        found: dict[int, Chain] = {}
        for carrier, stamp in _stamps(connection, uses).items():
            with self._lock:
                if (chain := self._kept.get(stamp)) is not None:
                    self._kept.move_to_end(stamp)
            more = uses[carrier] - (chain.asked if chain is not None else set())
            if chain is None or more:
                chain = _with_hosts(connection, chain or _load(connection, carrier), more)
                if not may_write(connection):
                    self._remember(stamp, chain)
            found[carrier] = chain
        return found

    def _remember(self, stamp: str, chain: Chain) -> None:
        with self._lock:
            if (old := self._kept.pop(stamp, None)) is not None:
                self._size -= _size(old)
            self._kept[stamp] = chain
            self._size += _size(chain)
            while self._size > KEPT and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._size -= _size(oldest)


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
    """Carrier -> what tells any change of it, or of what carries it, down to the wire. After a restore versions may
    come again, but not under the same epoch."""
    found: dict[int, str] = {}
    for chunk in chunks(sorted(set(carriers))):
        rows = connection.execute(_walk_of_stamps(), {"ids": chunk})
        found.update({row.root: f"{row.epoch} {row.root} {row.stamp}" for row in rows})
    return found


@cache
def _walk_of_stamps() -> Select[Any]:
    def step(n: FromClause, root: ColumnElement[Any]) -> Select[Any]:
        wire = cast(n.c.mtu, Text) + "/" + cast(n.c.underlay, Text)
        known = cast(n.c.id, Text) + ":" + cast(n.c.version, Text)
        return select(root, n.c.id, n.c.carrier, case((n.c.id == FABRIC, wire), else_=known).label("known"))

    n, below = tables.network.alias(), tables.network.alias()
    epoch = select(tables.store.c.epoch).scalar_subquery().label("epoch")
    walk = step(n, n.c.id.label("root")).where(n.c.id.in_(IDS)).cte(recursive=True)
    walk = walk.union_all(step(below, walk.c.root).where(below.c.id == walk.c.carrier, walk.c.id != FABRIC))
    stamp = func.aggregate_strings(walk.c.known, " ").label("stamp")
    return select(walk.c.root, stamp, epoch).group_by(walk.c.root)


def _load(connection: Connection, carrier: int) -> Chain:
    networks = objects.with_carriers(connection, [carrier])
    ids = [FABRIC, *networks]  # There is nothing in the fabric, but to be asked for it: on the wire, too.
    rows: Sequence[objects.Row] = [
        *networks.values(),
        *objects.segments(connection, "network", ids),
        *objects.routers(connection, "network", ids),
        *objects.links(connection, "network", ids),
        *objects.policies(connection, "network", ids),
    ]
    world = World.of(feed.value_of(row, 0) for row in rows)
    left = objects.left_to(networks, objects.fabric(connection), carrier)
    return Chain(networks.get(carrier, WIRE), left, world)


def _with_hosts(connection: Connection, chain: Chain, hosts: Collection[int]) -> Chain:
    """The same when these hosts of its are known, and what they live on."""
    ids = {0}  # No port has that: on the wire nothing is asked for, but asked.
    for chunk in chunks(sorted(hosts)):
        ids.update(connection.scalars(_hosts_below(), {"ids": [] if chain.carrier.id == FABRIC else chunk}))
    ports = [feed.value_of(row, 0) for row in objects.ports(connection, "id", sorted(ids))]
    asked = chain.asked | frozenset(hosts)
    return replace(chain, world=chain.world.with_(*ports), asked=asked, feet_of={}, found={})


@cache
def _hosts_below() -> Select[Any]:
    p, below, on = tables.port, tables.port.alias(), tables.machine.alias()
    walk = select(p.c.id).where(p.c.id.in_(IDS)).cte(recursive=True)
    host = func.coalesce(below.c.host_port, on.c.port).label("id")
    deeper = select(host).select_from(below.outerjoin(on, below.c.host_machine == on.c.id))
    walk = walk.union(deeper.where(below.c.id == walk.c.id, host.is_not(None)))
    return select(walk.c.id)


def _size(chain: Chain) -> int:
    return 1 + len(chain.world.values) + len(chain.asked)


def _keep(kept: dict[K, V], key: K, value: V) -> V:
    if len(kept) >= FOUND:
        kept.clear()
    kept[key] = value
    return value
