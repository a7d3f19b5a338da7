"""meaning = compile + reference: on random worlds and conversations the same frames arrive, and the same are dropped
for the same reasons.

Every machine of a world gets its tables from the compiler, with slots of its own, and a `Reference` runs them; what
one sends into the underlay the others receive. After a change of the world the tables are compiled again and what the
machines remember stays. To look for longer, or again:

    NESTNET_EXAMPLES=20000 pytest tests/test_equality.py
    pytest tests/test_equality.py --hypothesis-seed=SEED        the seed is printed with each run
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, currently_in_test_context, given, note, settings
from strategies import Step, across, conversations, crossings, dialogues, inquiries, rounds, torrents, tower, worlds

from nestnet.compile.compiler import compile
from nestnet.compile.routes import routes_of
from nestnet.compile.slots import Slots, assign, slots_of
from nestnet.compile.tables import Tables
from nestnet.datapath.reference import Fabric, Key
from nestnet.model import bootstrap, meaning
from nestnet.model.meaning import Outcome, State, deliver
from nestnet.model.packet import FlowTuple, parse
from nestnet.model.values import FABRIC, MAX_DEPTH, World

EXAMPLES = int(os.environ.get("NESTNET_EXAMPLES", "200"))
FIRST_IFINDEX = 10

equality = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class Machines:
    """All machines of a world that changes: its tables, run."""

    def __init__(self, world: World) -> None:
        # Slots differ from machine to machine, as they do in life: nothing may depend on them being the same.
        self.slots = {id: Slots({("port", -n): n for n in range(1, id)}) for id in world.machines}
        self.world = world
        self.fabric = Fabric(self.tables(), self.answer)
        self.copied: dict[tuple[object, ...], object] = {}

    def answer(self, port: int, frame: bytes) -> bytes | None:
        """What the agents do."""
        return bootstrap.answer(bootstrap.settings(self.world, self.world.ports[port]), frame)

    def become(self, world: World) -> None:
        if world is not self.world:
            self.world = world
            self.fabric.load(self.tables())

    def tables(self) -> dict[int, Tables]:
        self.slots = {id: assign(slots, self.world) for id, slots in self.slots.items()}
        attachments = {id: FIRST_IFINDEX + id for id in self.world.ports}
        return {id: compile(self.world, id, attachments, 2, slots) for id, slots in self.slots.items()}

    def copy(self) -> None:
        """What two machines remember of a port that moves from one to the other, each gets from the other, as agents
        copy it; here at once, and fragments too."""
        for port in self.world.ports:
            pair = machine_of(self.world, port), machine_of(self.world, port, elsewhere=True)
            if pair[0] == pair[1]:
                continue
            known = [self.remembered(machine, port) for machine in pair]
            for key in known[0].keys() | known[1].keys():
                # Both had the same before, so the one that differs from it is news.
                values = [each[key] for each in known if key in each]
                news = next((value for value in values if value != self.copied.get(key)), values[0])
                self.copied[key] = news
                for machine in pair:
                    self.remember(machine, key, news)

    def remembered(self, machine: int, port: int) -> dict[tuple[object, ...], object]:
        """By ids: the connections of a port, and first fragments that it sent."""
        reference, ids = self.fabric.machines[machine], self.slots[machine].ids("port")
        found: dict[tuple[object, ...], object] = {}
        for key, connection in reference.connections.items():
            ends = ids.get(key.opener, 0), ids.get(key.answerer, 0)
            if port in ends:
                found["connection", *ends, key.flow] = connection
        for (p, *what), first in reference.fragments.items():
            if ids.get(p) == port:
                found["fragment", port, *what] = first
        return found

    def remember(self, machine: int, key: tuple[object, ...], value: Any) -> None:
        reference, slots = self.fabric.machines[machine], self.slots[machine]
        if key[0] == "connection":
            _, opener, answerer, flow = cast("tuple[str, int, int, FlowTuple]", key)
            if all(("port", end) in slots.of for end in (opener, answerer)):
                reference.connections[Key(slots["port", opener], slots["port", answerer], flow)] = value
        else:
            _, port, *what = cast("tuple[Any, ...]", key)
            reference.fragments[cast("Any", (slots["port", port], *what))] = value


def machine_of(world: World, port: int, elsewhere: bool = False) -> int:
    """Where a port lives in the end; `elsewhere`: where else, while it moves."""
    here = world.ports[port]
    while True:
        host = here.other if elsewhere and here.other else here.host
        if world.networks[here.network].carrier == FABRIC:
            return host
        here = world.ports[host]


def counted(world: World, sender: int, frame: bytes, outcome: Outcome) -> Counter[str]:
    """The drops that machines see. Of a frame for all, one copy goes to each machine; where the carriers let none
    through, nobody is there to count for the ports of that machine."""
    if not parse(frame).is_group:
        return Counter(reason for _, reason in outcome.drops)
    port = world.ports[sender]
    network = world.networks[port.network]
    reached = {machine_of(world, sender)}
    for other in world.ports_of(port.segment):
        try:
            meaning.carry(world, network, port.host, other.host)
            reached.add(machine_of(world, other.id))
        except meaning._Dropped:
            pass
    return Counter(reason for q, reason in outcome.drops if q == 0 or machine_of(world, q) in reached)


def check(steps: list[Step]) -> None:
    state = State()
    machines = Machines(steps[0].world)
    for number, step in enumerate(steps):
        machines.become(step.world)
        outcome = deliver(step.world, state, step.port, step.frame, step.now)
        state = outcome.state
        machines.copy()
        sender = machine_of(step.world, step.port, step.elsewhere)
        relayed = machines.fabric.relayed
        deliveries, drops = machines.fabric.send(step.port, step.frame, step.now, sender)
        relayed = machines.fabric.relayed - relayed
        machines.copy()
        if currently_in_test_context():
            note(f"{number}: {step.now} {step.port} {step.frame.hex()} -> {outcome.deliveries} {outcome.drops}")
        expected = sorted(outcome.deliveries), counted(step.world, step.port, step.frame, outcome), outcome.relayed
        assert (sorted(deliveries), Counter(drops), relayed) == expected, (number, step)


@equality
@given(worlds())
def test_slots_are_found_again_in_the_tables(world: World) -> None:
    """By an agent that was restarted."""
    slots = assign(Slots(), world)
    for machine in world.machines:
        assert slots_of(compile(world, machine, {}, 2, slots)) == slots


@equality
@given(conversations(moves=False))
def test_the_tables_mean_the_same(steps: list[Step]) -> None:
    if steps:
        check(steps)


@equality
@given(inquiries())
def test_the_tables_mean_the_same_to_those_who_ask(steps: list[Step]) -> None:
    check(steps)


@equality
@given(rounds())
def test_the_tables_mean_the_same_wherever_frames_get_far(steps: list[Step]) -> None:
    if steps:
        check(steps)


@equality
@given(crossings())
def test_the_tables_mean_the_same_over_links(steps: list[Step]) -> None:
    if steps:
        check(steps)


@settings(equality, max_examples=max(1, EXAMPLES // 4))
@given(torrents())
def test_the_tables_limit_the_same(steps: list[Step]) -> None:
    if steps:
        check(steps)


@equality
@given(dialogues(moves=False))
def test_the_tables_mean_the_same_to_those_who_answer(steps: list[Step]) -> None:
    if steps:
        check(steps)


@equality
@given(crossings())
def test_routes_have_the_length_of_the_longest_way(steps: list[Step]) -> None:
    """What only carriers ask for, and packets do not show."""
    for world in {id(step.world): step.world for step in steps}.values():
        routes = routes_of(world)
        for router in world.routers.values():
            found = {route.segment: route.hops for route in routes.get(router.id, ())}
            near = {i.segment for id in meaning.reached(world, router.id) for i in world.routers[id].interfaces}
            assert found == {segment: meaning.longest_way(world, router, segment) for segment in near}


@pytest.mark.parametrize("levels", [1, 2, MAX_DEPTH])
def test_a_tower_is_as_high_as_a_walk_is_long(levels: int) -> None:
    world = tower(levels)
    step = Step(0.0, world, 2 * levels - 1, across(world, levels))
    check([step])
    assert deliver(world, State(), step.port, step.frame, 0.0).deliveries == ((2 * levels, step.frame),)
