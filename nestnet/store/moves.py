"""Moving a port, with all that lives on it, under traffic (DESIGN, rule 15).

    prepare   host m1, other m3   m3 gets all that hangs above: links, rows, closed to nobody, sent to by nobody
    leave     host m1, other m3   m1 hands out no frame for all any more, so that none comes twice
    flip      host m3, other m1   one row on each machine: what is for the port goes to m3, and is taken on both
    settle    host m3             m1 has nothing of it any more

A phase is a revision. The next one is begun when all machines concerned have realised it, by whoever brings the last
report: nobody drives a move, so it goes on after whatever was killed. One that is silent is not waited for, and nobody
longer than PATIENCE, so no move hangs. Until the flip it can be given up: if the new machine fails, it is.

What the old machine remembers of connections comes along in `connections`: it writes them whenever it has realised a
phase, before it says so, and the new machine reads them when it begins the next.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Any

from sqlalchemy import Connection, Select, delete, insert, select, update

from nestnet.model.errors import Conflict, Invalid, NotFound, Problem
from nestnet.model.problems import meant
from nestnet.model.validate import given_already
from nestnet.model.values import FABRIC
from nestnet.store import events, objects, tables, write
from nestnet.store.events import Happened
from nestnet.store.identity import Identity
from nestnet.store.objects import IDS, PortRow, chunks
from nestnet.store.plan import Pair
from nestnet.store.read import Reader

PATIENCE = 20.0  # Seconds that a phase waits for machines that speak.
FAILED = "failed"

Silent = Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Begun:
    """A move that has begun: where it is stored, who gets that, and what traffic will notice. Where both hosts are on
    one machine this revision is all of it."""

    revision: int
    machines: Sequence[str]
    disturbs: Sequence[str]


def begin(connection: Connection, reader: Reader, identity: Identity, id: int, to: str, silent: Silent) -> Begun:
    """Send a port on its way to another host. Raises Invalid or Conflict, and then nothing has changed."""
    (row,) = objects.ports(connection, "id", [id])
    (network,) = objects.networks(connection, "id", [row.network])
    path = _path(reader, row)
    new = _machine(connection, reader, to) if network.carrier == FABRIC else _host(connection, reader, row, to)
    if new == row.host:
        raise _invalid("bad_value", f"{path} lives on {to} already: name another host")
    above = _above(connection, [id])
    _alone(connection, reader, row, new, above)
    if row.trunk:
        (trunk,) = objects.ports(connection, "id", [row.trunk])
        raise Conflict(f"{path} hangs on the trunk {trunk.name}: move that", "on_trunk", [_path(reader, trunk)])
    on_wire = network.carrier == FABRIC
    old_machine = objects.machines_of(connection, [id])[id]
    if network.encapsulated:
        agents = objects.agents_on(connection, [row.host, new])
        old_machine, new_machine = agents[row.host], agents.get(new, 0)
        if not new_machine:
            raise Conflict(
                f"host {to} runs no agent yet: put a port of {path.rpartition('/')[0]} on it first", "no_agent"
            )
    else:
        new_machine = new if on_wire else objects.machines_of(connection, [new])[new]
    if on_wire and (physical := _beyond_trunks(connection, id, new)):
        whose = f": it has no trunk to {physical}" if reader.scope.reads is None else ""
        code = "missing_trunk" if reader.scope.reads is None else "not_a_host"
        raise _invalid(code, f"{to} cannot have {path}{whose}")
    names = {machine: _name(connection, machine) for machine in (old_machine, new_machine)}
    if reader.scope.reads is not None:  # To them the hosts are all that there is.
        names = {old_machine: f"under {path}", new_machine: f"under host {to}"}
    moves = old_machine != new_machine
    disturbs = []
    if moves:
        if taken := _taken(connection, reader, above, new_machine, names[new_machine]):
            raise _invalid("duplicate_attach", taken)
        if silent(new_machine):
            raise Conflict(f"machine {names[new_machine]} says nothing: see to its agent first", "machine_silent")
        if silent(old_machine):
            name = names[old_machine]
            disturbs = [f"machine {name} says nothing: connections of what moves are cut, for only it remembers them"]
    changed = replace(row, other=new) if moves else replace(row, host=new)
    connection.execute(delete(tables.move).where(tables.move.c.port == id))
    revision = write.write(connection, identity, _together(connection, row, changed))
    if moves:
        ends = {"source": old_machine, "target": new_machine}
        values = {"phase": "prepare", "revision": revision, "at": time.time(), "problem": "", **ends}
        connection.execute(insert(tables.move).values(port=id, **values))
    return Begun(revision, reader.machines_holding(row.network), disturbs)


def _beyond_trunks(connection: Connection, port: int, machine: int) -> str:
    """A physical network on which a segment of the port rides, or of one that hangs on it, and to which the machine has
    no trunk; '' if there is none."""
    s, p = tables.segment.c, tables.port.c
    rides = (
        select(s.physical)
        .join_from(tables.port, tables.segment, p.segment == s.id)
        .where((p.id == port) | (p.trunk == port), s.physical.is_not(None))
        .distinct()
    )
    known = json.loads(connection.scalar(select(tables.machine.c.trunks).where(tables.machine.c.id == machine)) or "{}")
    return min((each for each in connection.scalars(rides) if each not in known), default="")


def advance(connection: Connection, reader: Reader, identity: Identity, silent: Silent) -> None:
    """Take every move a phase on that need not wait."""
    for move in connection.execute(select(tables.move).where(tables.move.c.phase != FAILED)).all():
        (row,) = objects.ports(connection, "id", [move.port])
        new = move.target
        behind = _behind(connection, reader, row, move)
        late = time.time() - move.at > PATIENCE
        if not late and any(not silent(machine) for machine in behind):
            continue
        name, path = _name(connection, new), _path(reader, row)
        if move.phase in ("prepare", "leave"):
            why = ""
            if new in behind:
                why = _problems(connection, new) or f"{name} {'says nothing' if silent(new) else 'is not ready'}"
            elif move.phase == "leave":
                why = _taken(connection, reader, _above(connection, [row.id]), new, name)
            if why:
                _fail(connection, identity, row, move, f"{path} stays on {_name(connection, move.source)}: {why}")
                continue
        _next(connection, identity, row, move, f"{path} has moved to {name}")


def is_any(connection: Connection) -> bool:
    """Is anything moving?"""
    return (
        connection.execute(select(tables.move.c.port).where(tables.move.c.phase != FAILED).limit(1)).first() is not None
    )


def give(connection: Connection, machine: int, port: int, connections: bytes) -> None:
    """What a machine remembers of the connections of a port that leaves it, and of all that lives on that. Raises
    NotFound unless it moves, and lives there."""
    _judge(connection, machine, port, "source")
    connection.execute(update(tables.move).where(tables.move.c.port == port).values(connections=connections))


def take(connection: Connection, machine: int, port: int) -> bytes:
    """What was given last, for the machine that it comes to; nothing if nothing was. Raises NotFound for all others."""
    _judge(connection, machine, port, "target")
    given = connection.scalar(select(tables.move.c.connections).where(tables.move.c.port == port))
    return bytes(given or b"")


def _judge(connection: Connection, machine: int, port: int, end: str) -> None:
    m = tables.move.c
    if connection.scalar(select(m[end]).where(m.port == port, m.phase != FAILED)) != machine:
        raise NotFound(f"a move of this port with this machine as its {end}")


# ---- whether it may


def _machine(connection: Connection, reader: Reader, name: str) -> int:
    m = tables.machine.c
    found = connection.scalar(select(m.id).where(m.name == name))
    if reader.scope.reads is not None:
        granted = sorted(reader.granted().get(FABRIC, ()))
        names = connection.scalars(select(m.name).where(m.id.in_(granted))).all()
        if found not in granted:
            near = _nearest(name, names)
            raise _invalid("missing_host", f"there is no host {name}{meant(near)}", near)
    if found is None:
        near = _nearest(name, connection.scalars(select(m.name).limit(1000)).all())
        raise _invalid("missing_machine", f"there is no machine {name}{meant(near)}", near)
    return int(found)


def _host(connection: Connection, reader: Reader, row: PortRow, name: str) -> int:
    p = tables.port.c
    (network,) = objects.networks(connection, "id", [row.network])
    carrier = reader.paths([network.carrier])[network.carrier]
    found = connection.scalar(select(p.id).where(p.network == network.carrier, p.name == name))
    if not _is_seen(reader, network.carrier):
        ids = sorted(reader.granted().get(network.carrier, ()))
        names = [host.name for host in objects.ports(connection, "id", ids)]
        if found not in ids:
            near = _nearest(name, names)
            raise _invalid("missing_host", f"there is no host {name}{meant(near)}", near)
    if found is None:
        hosts = select(p.name).where(p.network == network.carrier, p.hosts.is_(True)).limit(1000)
        near = _nearest(name, connection.scalars(hosts).all())
        raise _invalid("missing_host", f"network {carrier} has no port {name} to live on{meant(near)}", near)
    (host,) = objects.ports(connection, "id", [found])
    if not host.hosts:
        raise _invalid("not_a_host", f"port {name} of {carrier} is no host: give it `hosts: true`")
    if not any((":" in address) == (network.underlay == 6) for address in host.addresses):
        path = reader.paths([network.id])[network.id]
        message = f"host {name} of {carrier} has no IPv{network.underlay} address to carry {path}"
        raise _invalid("host_family", message)
    return host.id


def _alone(connection: Connection, reader: Reader, row: PortRow, new: int, above: Sequence[int]) -> None:
    """One move at a time on a chain of hosts: each machine knows of two places for a port, not of four."""
    p = tables.port.c
    on = connection.scalar(select(p.host_port).where(p.id == row.id)) is not None
    below = connection.scalars(_down(), {"ids": [row.host, new] if on else []})
    for chunk in chunks(sorted({row.id, *above, *below})):
        busy = select(p.id).where(p.id.in_(chunk), (p.other_machine.is_not(None)) | (p.other_port.is_not(None)))
        if (other := connection.scalar(busy.limit(1))) is not None:
            (moving,) = objects.ports(connection, "id", [other])
            path = _path(reader, moving)
            named = [path] if _is_seen(reader, moving.network) else []
            raise Conflict(f"{path} is moving: wait until it has arrived", "moving", named)


@cache
def _down() -> Select[tuple[int]]:
    """These ports, and those that they live on, as far as their machines know them."""
    p, below = tables.port.c, tables.port.alias()
    walk = select(p.id).where(p.id.in_(IDS)).cte(recursive=True)
    deeper = select(below.c.host_port.label("id")).where(below.c.id == walk.c.id, below.c.host_port.is_not(None))
    return select(walk.union(deeper).c.id)


def _above(connection: Connection, ports: Sequence[int]) -> list[int]:
    """These ports and all that live on them, level by level."""
    p = tables.port.c
    found, level = list(ports), list(ports)
    while level:
        above: list[int] = []
        for chunk in chunks(level):
            above += connection.scalars(select(p.id).where(p.host_port.in_(chunk) | p.other_port.in_(chunk))).all()
        level = sorted(set(above) - set(found))
        found += level
    return found


def _taken(connection: Connection, reader: Reader, moving: Sequence[int], machine: int, name: str) -> str:
    """What is wrong if something that these ports hang on is given to another port of the machine; '' if nothing is."""
    a = tables.attachment.c
    there = {
        (row.kind, row.name): row.port
        for row in connection.execute(select(tables.attachment).where(a.machine == machine))
    }
    for port in objects.ports(connection, "id", moving):
        if port.attach is not None:
            other = there.get((port.attach.kind, port.attach.name))
            if other is not None and other not in moving:
                (holder,) = objects.ports(connection, "id", [other])
                return given_already(port.attach, name, _path(reader, holder))
    return ""


def _nearest(wrong: str, known: Sequence[str]) -> str | None:
    return next(iter(get_close_matches(wrong, known, 1)), None)


def _invalid(code: str, message: str, nearest: str | None = None) -> Invalid:
    return Invalid([Problem(code, "/to", message, nearest=nearest)])


# ---- how far it is


def _behind(connection: Connection, reader: Reader, row: PortRow, move: Any) -> list[int]:
    """The machines that have rows of the port, or had until now, and have not realised the phase."""
    m, r = tables.machine, tables.report
    names = reader.machines_holding(row.network)
    query = select(m.c.id).outerjoin(r).where(m.c.name.in_(names) | m.c.id.in_((move.source, move.target)))
    late = r.c.realised.is_(None) | (r.c.realised < move.revision)
    return list(connection.scalars(query.where(late)))


def _next(connection: Connection, identity: Identity, row: PortRow, move: Any, done: str) -> None:
    m = tables.move
    match move.phase:
        case "prepare":
            after, row_after = "leave", replace(row, leaving=True)
        case "leave":
            after, row_after = "flip", replace(row, host=row.other, other=row.host, leaving=False)
        case "flip":
            after, row_after = "settle", replace(row, other=0)
        case _:
            connection.execute(delete(m).where(m.c.port == row.id))
            events.happened(connection, [Happened("moved", done)])
            return
    _write(connection, identity, move, row, row_after, {"phase": after, "connections": move.connections})


def _fail(connection: Connection, identity: Identity, row: PortRow, move: Any, why: str) -> None:
    after = replace(row, other=0, leaving=False)
    _write(connection, identity, move, row, after, {"phase": FAILED, "problem": why[: events.TEXT]})
    events.happened(connection, [Happened("move_failed", why)])


def _write(
    connection: Connection, identity: Identity, move: Any, row: PortRow, after: PortRow, values: dict[str, Any]
) -> None:
    m = tables.move
    revision = write.write(connection, identity, _together(connection, row, after))
    ends = {"port": row.id, "source": move.source, "target": move.target}
    connection.execute(delete(m).where(m.c.port == row.id))
    connection.execute(insert(m).values(**{"problem": "", **ends, "revision": revision, "at": time.time(), **values}))


def _together(connection: Connection, row: PortRow, after: PortRow) -> list[Pair]:
    """What hangs on a trunk is where that is."""
    place = {"host": after.host, "other": after.other, "leaving": after.leaving}
    members = [(member, replace(member, **place)) for member in objects.behind(connection, [row.id])]  # type: ignore[arg-type]
    return [(row, after), *members]


def _is_seen(reader: Reader, network: int) -> bool:
    return reader.scope.may_read(reader.owner("network", network))


def _path(reader: Reader, row: PortRow) -> str:
    """What a port is called by who asks; another tenant's is not told."""
    if not _is_seen(reader, row.network):
        return "another tenant's port"
    return f"{reader.paths([row.network])[row.network]}/{row.name}"


def _name(connection: Connection, machine: int) -> str:
    return str(connection.scalar(select(tables.machine.c.name).where(tables.machine.c.id == machine)))


def _problems(connection: Connection, machine: int) -> str:
    text = connection.scalar(select(tables.report.c.problems).where(tables.report.c.machine == machine))
    return "; ".join(json.loads(text)) if text else ""
