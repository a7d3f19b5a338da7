"""Giving a network another carrier, with all that it carries in turn.

Its ports live on other hosts then, which are named, or are called as those before. What must hold between a network and
its carrier is judged as for a manifest. That the carriers stay a forest is judged while the one `carriage` row is held,
so that of two changes which are legal each alone, but not together, one is refused (DESIGN, rule 34).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, select, update

from nestnet.model.errors import Conflict, Invalid, NestnetError, Problem
from nestnet.model.problems import Nearest, join, meant
from nestnet.model.validate import given_already
from nestnet.model.values import FABRIC, MAX_DEPTH, Attach
from nestnet.store import objects, plan, tables, view
from nestnet.store.objects import NetworkRow, PortRow
from nestnet.store.plan import Change, Pair
from nestnet.store.scope import Scope
from nestnet.store.state import State, load_state


@dataclass(frozen=True, slots=True)
class Rehoused:
    """What it takes to change a carrier, judged at `revision`."""

    revision: int
    pairs: tuple[Pair, ...]
    changes: tuple[Change, ...]


def lock(connection: Connection) -> None:
    """Nobody else changes a carrier before this transaction ends."""
    connection.execute(update(tables.carriage).values(changes=tables.carriage.c.changes + 1))


def prepare(
    connection: Connection, id: int, carrier: int, hosts: Mapping[str, str], scope: Scope, was: str, now: str | None
) -> Rehoused:
    """Judge it. `was` is the network's path, `now` its carrier's to be, as who asks sees them. Raises Conflict or
    Invalid, in which what carries them is not named."""
    try:
        work = _prepare(connection, id, carrier, hosts, scope, was, now)
    except NestnetError as error:
        raise (view.Told().error(error) if scope.reads is not None else error) from None
    whole = tuple(replace(one, path=one.path.replace(view.HIDDEN, "")) for one in work.changes)
    return replace(work, changes=whole)


def _prepare(
    connection: Connection, id: int, carrier: int, hosts: Mapping[str, str], scope: Scope, was: str, now: str | None
) -> Rehoused:
    state = load_state(connection)
    view.hide(state, scope)
    row = state.networks[id]
    subtree = state.networks.above([id])
    _judge_place(state, row, carrier, subtree, scope, was, now)
    chain = [state.networks[each] for each in _chain(state, carrier)]
    moved = replace(row, carrier=carrier, **_granted(state, row, carrier))
    along = [state.networks[each] for each in subtree[1:]]
    counted = [(each, replace(each, grant=moved.grant)) for each in along if each.grant == row.grant != moved.grant]
    if carrier == FABRIC:
        moved = replace(moved, underlay=objects.fabric(connection).family)
    state.contents = objects.load_contents(connection, [*(each.id for each in chain), *subtree])
    for each in subtree:
        for port in state.contents[each].ports.values():
            if port.other:
                seen = f"{state.path(each)}/{port.name}" if scope.may_read(state.networks[each].tenant) else "a port"
                raise Conflict(f"{seen} that comes along is moving: wait until it has arrived", "moving")
    there_now = objects.domain_in(state.networks, id)
    there_then = carrier if row.encapsulated else objects.domain_in(state.networks, carrier)
    if there_now != there_then:
        message = f"{was} would be carried by other machines: delete it, and create it there"
        raise Conflict(message, "other_domain")
    ports = state.contents[id].ports
    named = _hosts_by_name(connection, row, state)
    names = {port.id: name for name, port in ports.items()}
    # What hangs on a trunk is where that is.
    wanted = {n: hosts.get(names.get(port.trunk, n), named[port.host]) for n, port in ports.items()}
    carrier_was = state.path(row.carrier) or None
    state.networks.put(moved)
    problems = [_missing(name, ports, was) for name in hosts if name not in ports]
    problems += [_moved_problem(p, id, state) for p in plan.problems_of([*chain, moved], wanted, state)]
    if problems:
        raise Invalid(list(dict.fromkeys(problems)))
    there = state.machines if carrier == FABRIC else {n: port.id for n, port in state.contents[carrier].ports.items()}
    rehoused = [(port, replace(port, host=there[wanted[name]])) for name, port in ports.items()]
    if problems := list(_given_twice(connection, rehoused, subtree, state)):
        raise Invalid(problems)
    if row.carrier == carrier:
        rehoused = [(old, new) for old, new in rehoused if old != new]
        pairs: list[Pair] = [*rehoused]
    else:
        pairs = [(row, moved), *counted, *rehoused]
    changes = [Change("~", "port", f"{state.path(id)}/{new.name}", {"host": [named[old.host], wanted[new.name]]})
               for old, new in rehoused]  # fmt: skip
    if row.carrier != carrier:
        fields = {"carrier": [carrier_was, now], "path": [was, state.path(id)]}
        changes.insert(0, Change("~", "network", state.path(id), fields))
    return Rehoused(state.revision, tuple(pairs), tuple(changes))


def _granted(state: State, row: NetworkRow, carrier: int) -> dict[str, Any]:
    """Which grant it counts under there, and whether that is cut."""
    below = state.networks.get(carrier)
    if (below.tenant if below is not None else None) != row.tenant:
        for grant in state.grants.values():
            if (grant.carrier, grant.tenant) == (carrier, row.tenant):
                return {"grant": grant.id, "cut": grant.cut}
    return {"grant": below.grant if below is not None else None, "cut": False}


def _chain(state: State, network: int) -> list[int]:
    """What carries something in this network, the one on the wire first, itself last."""
    found: list[int] = []
    while network != FABRIC:
        found.insert(0, network)
        network = state.networks[network].carrier
    return found


def _judge_place(
    state: State, row: NetworkRow, carrier: int, subtree: list[int], scope: Scope, was: str, now: str | None
) -> None:
    """May it hang there?"""
    if carrier == row.id:
        raise Conflict(f"network {was} cannot carry itself", "carrier_cycle")
    if carrier in subtree:
        way = " -> ".join(state.path(each) for each in _chain(state, carrier) if each in subtree)
        raise Conflict(f"network {was} carries {now} ({way}): nothing is carried by what it carries", "carrier_cycle")
    below = len(_chain(state, carrier))
    height = max(len(_chain(state, each)) for each in subtree) - len(_chain(state, row.id)) + 1
    if below + height > MAX_DEPTH:
        message = f"{was} has {height} levels, and {now} is at level {below}: networks nest at most {MAX_DEPTH} levels"
        raise Invalid([Problem("too_deep", "/carrier", message, limit=MAX_DEPTH)])
    other = state.networks.named(carrier, row.name)
    if other is not None and other.id != row.id:
        where = f"network {now} carries" if now else "the wire carries"
        seen = f" {now}/{row.name}" if scope.may_read(other.tenant) and now else ""
        raise Conflict(f"{where} a network{seen or ' ' + row.name} already: one name for one network", "duplicate_name")


def _missing(name: str, ports: Mapping[str, PortRow], path: str) -> Problem:
    near = Nearest()(name, ports)
    return Problem("missing_port", join("hosts", name), f"network {path} has no port {name}{meant(near)}", nearest=near)


def _moved_problem(problem: Problem, id: int, state: State) -> Problem:
    """A problem of the network as it would be, at the place in the request that it comes from."""
    own = "".join(join("networks", name) for name in state.path(id).split("/"))
    rest = problem.pointer.removeprefix(own).split("/")
    at = join("hosts", rest[2]) if rest[1:2] == ["ports"] and rest[3:] == ["host"] else "/carrier"
    return replace(problem, pointer=at)


def _hosts_by_name(connection: Connection, row: NetworkRow, state: State) -> dict[int, str]:
    if row.carrier == FABRIC:
        return {id: name for name, id in state.machines.items()}
    p = tables.port.c
    return {port.id: port.name for port in connection.execute(select(p.id, p.name).where(p.network == row.carrier))}


def _given_twice(
    connection: Connection, rehoused: list[tuple[PortRow, PortRow]], subtree: list[int], state: State
) -> Iterator[Problem]:
    """What a port hangs on must be nobody else's on the machine where it comes to live."""
    if state.networks[subtree[0]].carrier == FABRIC:
        place = {new.id: new.host for _, new in rehoused}
    else:
        machines = objects.machines_of(connection, {new.host for _, new in rehoused})
        place = {new.id: machines[new.host] for _, new in rehoused}
    given: dict[tuple[int, Attach], tuple[str, str]] = {}  # whose, and at which port of the network that moves
    root = {new.id: new.name for _, new in rehoused}
    names = {id: name for name, id in state.machines.items()}
    for network in subtree:  # carriers first
        for port in state.contents[network].ports.values():
            if network != subtree[0]:
                place[port.id], root[port.id] = place[port.host], root[port.host]
            if port.attach is not None:
                path = f"{state.path(network)}/{port.name}"
                first, _ = given.setdefault((place[port.id], port.attach), (path, root[port.id]))
                if first != path:
                    message = given_already(port.attach, names[place[port.id]], first)
                    yield Problem("duplicate_attach", join("hosts", root[port.id]), message)
    t = tables.attachment.c
    there = t.machine.in_({machine for machine, _ in given})
    for row in connection.execute(select(t.port, t.machine, t.kind, t.name).where(there)):
        key = (row.machine, Attach(row.kind, row.name))
        if key in given and row.port not in root:
            (other,) = objects.ports(connection, "id", [row.port])
            message = given_already(key[1], names[row.machine], f"{state.path(other.network)}/{other.name}")
            yield Problem("duplicate_attach", join("hosts", given[key][1]), message)
