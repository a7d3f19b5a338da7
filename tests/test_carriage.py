"""Flat = encapsulated = meaning: in random forests where the two alternate, agents of all domains run their tables, the
datagrams of each as frames of the workload that it runs in, and what arrives is what meaning says.

To look for longer, or again: see test_equality.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from ipaddress import ip_address

import pytest
from frames import ip_frame, udp
from hypothesis import given, settings
from strategies import (
    START,
    Step,
    across,
    conversations,
    dialogues,
    rounds,
    stacked,
    torrents,
    tower,
    worlds,
)
from test_equality import EXAMPLES, Agents, check, equality

from nestnet.compile.diff import diff
from nestnet.compile.tables import Tables, empty
from nestnet.model import packet as pk
from nestnet.model.clock import nanoseconds
from nestnet.model.domains import Agent
from nestnet.model.meaning import State, deliver
from nestnet.model.rates import cost, fill
from nestnet.model.values import FABRIC, Link, Machine, Policy, Port, Selector, Service, World


@equality
@given(worlds(carriages=True).flatmap(conversations))
def test_agents_upon_agents_mean_the_same(steps: list[Step]) -> None:
    if steps:
        check(steps)


@settings(equality, max_examples=max(1, EXAMPLES // 2))
@given(rounds(carriages=True))
def test_wherever_frames_get_far(steps: list[Step]) -> None:
    if steps:
        check(steps)


@equality
@given(dialogues(moves=False, carriages=True))
def test_to_those_who_answer(steps: list[Step]) -> None:
    if steps:
        check(steps)


@settings(equality, max_examples=max(1, EXAMPLES // 2))
@given(torrents(carriages=True))
def test_limits(steps: list[Step]) -> None:
    if steps:
        check(steps)


def flat(world: World) -> World:
    return world.with_(*(replace(network, encapsulated=False) for network in world.networks.values()))


def free(world: World) -> World:
    return World.of(replace(value, rate=0) if isinstance(value, Port | Link) else value for value in world)


@equality
@given(worlds(carriages=True).flatmap(conversations))
def test_what_is_carried_flat_means_the_same(steps: list[Step]) -> None:
    """But for rates, which are charged with the bytes that there are, and for how often it is said of a frame for all
    that it was dropped: once for each copy."""
    states = State(), State()
    for step in steps:
        both = [
            deliver(kind(free(step.world)), state, step.port, step.frame, step.now)
            for kind, state in zip((flat, lambda world: world), states, strict=True)
        ]
        assert both[0].deliveries == both[1].deliveries
        assert len(both[0].drops) == len(both[1].drops) or pk.parse(step.frame).is_group
        states = both[0].state, both[1].state


# ---- one after the other


@pytest.mark.parametrize("family", [4, 6])
def test_six_agents_one_upon_the_other(family: int) -> None:
    """The wire sees a header for each."""
    world = stacked(tower(6, family), range(1, 7))
    frame = across(world, 6)
    agents = Agents(world)
    wire: list[int] = []
    receive = agents.fabric.agents[Agent(FABRIC, 2)].underlay
    agents.fabric.agents[Agent(FABRIC, 2)].underlay = lambda datagram, now: (  # type: ignore[method-assign]
        wire.append(len(datagram)) or receive(datagram, now)
    )
    assert agents.send(Step(START, world, 11, frame)) == ([(12, frame)], [])
    assert wire == [len(frame) + 5 * 50 + (50 if family == 4 else 70) - 14]
    assert check([Step(START, world, 11, frame)]) == Counter(delivered=1)


def changed(before: World, after: World) -> set[Agent]:
    """Who gets other rows."""
    agents = Agents(before)
    have = agents.tables()
    agents.become(after)
    want = agents.tables()
    nothing: Tables = empty()
    return {one for one in have.keys() | want.keys() if diff(have.get(one, nothing), want.get(one, nothing))}


def test_a_host_port_moves_below_its_agent() -> None:
    """No row of any agent above is touched, and what hangs there is heard as before."""
    world = stacked(tower(4), (2, 4)).with_(Machine(3, ip_address("192.0.2.3")))
    host = world.ports[2]
    phases = [
        replace(host, other=3), replace(host, other=3, leaving=True), replace(host, host=3, other=2),
        replace(host, host=3),
    ]  # fmt: skip
    to_one = across(world, 4)
    to_all = pk.with_ethernet(to_one, pk.BROADCAST, world.ports[7].mac)
    steps = [Step(START, world, 7, to_one)]
    for phase in phases:
        moved = world.with_(phase)
        assert {one.domain for one in changed(steps[-1].world, moved)} == {FABRIC}
        steps += [Step(START, moved, 7, frame) for frame in (to_one, to_all)]
    assert check(steps) == Counter(delivered=len(steps))


def test_a_port_moves_from_agent_to_agent() -> None:
    """What is below its domain is told nothing."""
    world = stacked(tower(2), [2])
    third = replace(world.ports[2], id=9, mac=0x020000000009, addresses=(ip_address("10.0.0.9"),))
    world = world.with_(third)
    moved = world.with_(replace(world.ports[4], host=9))
    assert {one.domain for one in changed(world, moved)} == {1}
    steps = [Step(START, each, 3, across(world, 2)) for each in (world, moved)]
    assert check(steps) == Counter(delivered=2)


def test_one_domain_knows_eight_rates() -> None:
    """Together they may have more."""
    limited = [replace(port, rate=10**9) for port in tower(6).ports.values()]
    world = tower(6).with_(*limited)
    for chosen, said in (
        ((), "cannot_flatten"),
        ((4,), "delivered"),
        ((2,), "cannot_flatten"),
        ((6,), "below cannot_flatten"),
    ):
        assert check([Step(START, stacked(world, chosen), 11, across(world, 6))]) == Counter([said])


@pytest.mark.parametrize("below", ["machine", "port", "network"])
def test_what_is_down_closes_what_lives_on_one_host(below: str) -> None:
    """Of agents above agents too, though nothing is asked between two ports of one host."""
    world = stacked(tower(3), (2, 3))
    world = world.with_(replace(world.ports[6], host=3))
    value = {"machine": world.machines[1], "port": world.ports[1], "network": world.networks[1]}[below]
    down = world.with_(replace(value, enabled=False))
    steps = [Step(START, each, 5, across(world, 3)) for each in (world, down, world)]
    assert check(steps) == Counter(delivered=2, carrier_down=1)


def test_what_a_carrier_refuses_has_been_paid_for_above() -> None:
    """Carried flat it costs nothing: see docs/recursion.md."""
    world = tower(2)
    refused = Policy(1, 1, (Selector("any"),), (Selector("any"),), (Service(),), False)
    world = world.with_(refused, *(replace(port, rate=8_000) for port in world.ports.values()))
    for chosen, said in (((), "carrier_policy"), ((2,), "below policy")):
        each = stacked(world, chosen)
        assert check([Step(START, each, 3, across(world, 2))]) == Counter([said])
        outcome = deliver(each, State(), 3, across(world, 2), START)
        assert outcome.drops == ((3, "carrier_policy"),)
        assert {bucket.id for bucket in outcome.state.buckets} == set(chosen and [3])
        assert not outcome.state.connections


def test_who_is_no_machine_of_a_domain_is_not_heard() -> None:
    """A workload beside the hosts writes VXLAN to one of them: it comes there as what it is, and no further."""
    world = stacked(tower(2), [2])
    beside = Port(9, 1, 1, 1, 0x020000000009, (ip_address("10.0.0.9"),))
    host = world.ports[2]
    world = world.with_(beside)
    agents = Agents(world)
    above = agents.fabric.agents[Agent(1, 2)]
    carried = bytes([8, 0, 0, 0]) + world.segments[2].vni.to_bytes(3, "big") + b"\0" + across(world, 2)
    for sender, said in ((beside, ["not_a_member"]), (world.ports[1], [])):
        ends = pk.mapped(sender.addresses[0]), pk.mapped(host.addresses[0])
        frame = ip_frame(host.mac, sender.mac, *ends, pk.UDP, udp(*ends, 50000, 4789, carried))
        assert agents.send(Step(START, world, sender.id, frame)) == ([(2, frame)], [])
        outputs = above.underlay(frame[14:], START)
        assert [reason for _, reason in outputs.drops] == said
        assert len(outputs.emitted) == (not said)


@pytest.mark.parametrize("chosen", [(), (2,), (3,), (2, 3)])
def test_what_arrives_pays_the_outermost_first(chosen: tuple[int, ...]) -> None:
    """What a bucket refuses has cost nothing further in, whatever is carried how."""
    world = tower(3)
    world = stacked(world.with_(*(replace(world.ports[id], rate=8_000) for id in (2, 4, 6))), chosen)
    steps = [Step(START, world, 5, across(world, 3, 100))] * 100  # short, so that headers count
    seen = check(steps)
    assert 50 < seen["delivered"] < 90
    state = State()
    for step in steps:
        state = deliver(step.world, state, step.port, step.frame, step.now).state
    paid = {bucket.id: until - (nanoseconds(START) - fill(8_000)) for bucket, until in state.buckets.items()}
    assert paid[6] == seen["delivered"] * cost(len(steps[0].frame), 8_000)
    assert paid[4] == seen["delivered"] * cost(len(steps[0].frame) + 50, 8_000)
