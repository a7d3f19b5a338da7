"""Of a change, what one machine compiles is the part that it is about: the same actions, and the same slots."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CHANGES, a_change, worlds

from nestnet.compile.compiler import compile
from nestnet.compile.diff import Action, Bump, Delete, Put, diff
from nestnet.compile.part import parts
from nestnet.compile.slots import Slots, assign, assign_in
from nestnet.model.values import Machine, Network, Port, Segment, World

EXAMPLES = int(os.environ.get("NESTNET_EXAMPLES", "250"))
DEEP = ("rate", "move")  # of what carries others, these are told in rows of theirs
ELSEWHERE = 100  # what is added to ifindexes of workloads


def told(actions: Iterable[Action]) -> list[tuple[str, str, list[Any]]]:
    """Each with its rows in order: which come first within an action means nothing."""
    found = []
    for action in actions:
        match action:
            case Put(table, rows):
                found.append(("put", table, sorted(row.tobytes() for row in rows)))
            case Delete(table, keys):
                found.append(("delete", table, sorted(key.tobytes() for key in keys)))
            case Bump(counter, slots):
                found.append(("bump", counter, sorted(slots.tolist())))
            case _:
                found.append(("epoch", "", []))
    return found


def another_machine(draw: st.DrawFn, world: World, machine: int) -> World:
    """One comes, or is up or down, or goes on which nothing lives."""
    number = max(world.machines) + 1
    alone = Machine(number, type(world.machines[machine].address)(int(world.machines[machine].address) + 77 + number))
    busy = {host for port in world.ports.values() for host in (port.host, port.other)}
    unused = [("machine", id) for id in world.machines if id not in busy and id != machine]
    return draw(st.sampled_from([world.with_(alone), *(world.without(key) for key in unused)]))


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_part_has_all_that_a_change_does(data: st.DataObject) -> None:
    draw = data.draw
    old = draw(worlds())
    machine = draw(st.sampled_from(sorted(old.machines)))
    slots = assign(Slots(), old)
    hangs = {port.id: 1000 + port.id for port in old.ports.values() if draw(st.booleans())}
    for _ in range(draw(st.integers(1, 3))):
        new = old
        for _ in range(draw(st.integers(0, 2))):
            new = (
                another_machine(draw, new, machine)
                if draw(st.integers(0, 5)) == 0
                else a_change(draw, new, kinds=draw(st.sampled_from([CHANGES, DEEP])))
            )
        other = {id: index + ELSEWHERE * draw(st.booleans()) for id, index in hangs.items() if id in new.ports}
        otherwise = [id for id in hangs.keys() | other.keys() if hangs.get(id) != other.get(id)]
        before, after = parts(old, new, machine, otherwise)
        now = assign(slots, new)
        assert assign_in(slots, before, after) == now
        whole = diff(compile(old, machine, hangs, 2, slots), compile(new, machine, other, 2, now))
        assert told(diff(compile(before, machine, hangs, 2, slots), compile(after, machine, other, 2, now))) == told(
            whole
        )
        old, slots, hangs = new, now, other


def test_what_a_change_is_not_about_is_not_in_its_part() -> None:
    """Of a hundred networks and machines, those of the one that has changed."""
    machines = [Machine(number, IPv4Address(f"192.0.2.{number}")) for number in range(1, 101)]
    networks = [
        value
        for number in range(1, 101)
        for value in (
            Network(number),
            Segment(number, number, number, (IPv4Network("10.0.0.0/24"),)),
            Port(number, number, number, 1 + number % 100, number, (IPv4Address("10.0.0.2"),)),
        )
    ]
    old = World.of([*machines, *networks])
    new = old.with_(replace(old.ports[7], rate=1_000_000))
    assert parts(old, new, 1)[0].values.keys() == {
        *(("network", 7), ("segment", 7), ("port", 7)),
        *(("machine", 1), ("machine", 8)),
    }
    assert assign_in(assign(Slots(), old), *parts(old, new, 1)) == assign(assign(Slots(), old), new)
