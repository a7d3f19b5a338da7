"""How networks and their hosts are: up, or down and why. Worked out whenever they are read, never stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection, select

from nestnet.model import standing
from nestnet.model.standing import Cause
from nestnet.model.values import FABRIC, World
from nestnet.store import feed, objects, tables
from nestnet.store.heard import Heard
from nestnet.store.objects import NetworkRow, Row, chunks


@dataclass(frozen=True, slots=True)
class Standing:
    """Of one network: the host ports or machines that it uses, those of them that are down, and the carrier that is
    disabled, if one is."""

    hosts: frozenset[int] = frozenset()
    down: Mapping[int, Cause] = field(default_factory=dict)
    closed: Cause | None = None


def standings(connection: Connection, heard: Heard, networks: Collection[NetworkRow]) -> dict[int, Standing]:
    """How these networks are, by id."""
    uses: dict[int, set[int]] = defaultdict(set)
    c = tables.host_use.c
    for chunk in chunks(sorted(row.id for row in networks)):
        for row in connection.execute(select(c.network, c.host).where(c.network.in_(chunk))):
            uses[row.network].add(row.host)
    world = _world(connection, networks, uses)
    lost = lost_machines(connection, heard)
    return {
        row.id: Standing(
            frozenset(uses[row.id]),
            standing.fallen(world, world.networks[row.id], uses[row.id], lost),
            standing.closed(world, world.networks[row.id]),
        )
        for row in networks
    }


def lost_machines(connection: Connection, heard: Heard) -> standing.Lost:
    """The machines that are not there, and why."""
    m, r = tables.machine, tables.report
    machines: dict[int, str] = {}
    ports: dict[int, str] = {}
    for row in connection.execute(select(m.c.id, m.c.fenced, m.c.port, r.c.at).outerjoin(r)):
        unheard = row.at is not None and heard.age(row.id) is None and not heard.is_awaited()
        found, id = (machines, row.id) if row.port is None else (ports, row.port)
        if row.fenced:
            found[id] = standing.FENCED
        elif unheard or heard.is_lost(row.id):
            found[id] = standing.LOST
        elif row.port is not None and row.at is None:
            found[id] = standing.ABSENT
    return standing.Lost(machines, ports)


def _world(connection: Connection, networks: Iterable[NetworkRow], uses: Mapping[int, set[int]]) -> World:
    """The networks, and what carries them: of that the ports that are hosts of these, or of their hosts."""
    rows: dict[int, NetworkRow] = {row.id: row for row in networks}
    level: dict[int, set[int]] = defaultdict(set)  # network -> the hosts that are used in it
    for row in rows.values():
        if row.carrier != FABRIC:
            level[row.carrier] |= uses[row.id]
    carriers: dict[int, NetworkRow] = {}
    parts: list[Row] = []
    while level:
        found = {row.id: row for row in objects.networks(connection, "id", sorted(level))}
        carriers.update(found)
        hosts = objects.ports(connection, "id", sorted({id for ids in level.values() for id in ids}))
        parts += hosts
        below: dict[int, set[int]] = defaultdict(set)
        for row in found.values():
            if row.carrier != FABRIC:
                below[row.carrier] |= {port.host for port in hosts if port.network == row.id}
        level = below
    ids = sorted(carriers)
    parts += objects.segments(connection, "network", ids)
    parts += objects.routers(connection, "network", ids)
    parts += objects.links(connection, "network", ids)
    parts += objects.policies(connection, "network", ids)
    return World.of(feed.value_of(row, 0) for row in (*rows.values(), *carriers.values(), *parts))
