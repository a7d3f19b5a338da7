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
from ipaddress import IPv4Address, IPv4Network
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, currently_in_test_context, given, note, settings
from strategies import (
    PHYSICAL,
    Step,
    across,
    conversations,
    crossings,
    dialogues,
    inquiries,
    rounds,
    torrents,
    tower,
    worlds,
)

from nestnet.compile.compiler import compile, packed
from nestnet.compile.routes import routes_of
from nestnet.compile.slots import Slots, assign, slots_of
from nestnet.compile.tables import Tables
from nestnet.datapath.reference import Fabric, Key
from nestnet.model import bootstrap, meaning
from nestnet.model.domains import Agent, agent, domain, within
from nestnet.model.meaning import Outcome, State, deliver
from nestnet.model.packet import FlowTuple, parse
from nestnet.model.values import FABRIC, MAX_DEPTH, Machine, Network, Port, Segment, World, link_local

EXAMPLES = int(os.environ.get("NESTNET_EXAMPLES", "120"))
FIRST_IFINDEX = 10
TRUNKS, TRUNK_MAC = 3, 0x0A0000000000  # of the NIC to a physical network: its ifindex, and its MAC on a machine

equality = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class Agents:
    """All agents of a world that changes, in all its domains: their tables, run."""

    def __init__(self, world: World) -> None:
        self.slots: dict[Agent, Slots] = {}
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

    def tables(self) -> dict[Agent, Tables]:
        tables: dict[Agent, Tables] = {}
        for here in sorted({FABRIC, *(domain(self.world, id) for id in self.world.networks)}):
            inside = within(self.world, here)
            attachments = {id: FIRST_IFINDEX + id for id in inside.ports}
            for id in inside.machines:
                # Slots differ from agent to agent, as they do in life: nothing may depend on them being the same.
                slots = self.slots.get(Agent(here, id)) or Slots({("port", -n): n for n in range(1, id)})
                self.slots[Agent(here, id)] = assign(slots, inside)
                trunks = {
                    trunk.on: (TRUNKS + PHYSICAL.index(trunk.on), TRUNK_MAC + id)
                    for trunk in inside.machines[id].trunks
                }
                tables[Agent(here, id)] = compile(inside, id, attachments, 2, self.slots[Agent(here, id)], trunks)
        return tables

    def copy(self) -> None:
        """What two agents remember of a port that moves from one to the other, each gets from the other, as agents
        copy it; here at once, and fragments too."""
        for port in self.world.ports.values():
            pair = agent(self.world, port), agent(self.world, port, elsewhere=True)
            if pair[0] == pair[1]:
                continue
            known = [self.remembered(one, port.id) for one in pair]
            for key in known[0].keys() | known[1].keys():
                # Both had the same before, so the one that differs from it is news.
                values = [each[key] for each in known if key in each]
                news = next((value for value in values if value != self.copied.get(key)), values[0])
                self.copied[key] = news
                for one in pair:
                    self.remember(one, key, news)

    def remembered(self, one: Agent, port: int) -> dict[tuple[object, ...], object]:
        """By ids: the connections of a port, and first fragments that it sent."""
        reference, ids = self.fabric.agents[one], self.slots[one].ids("port")
        found: dict[tuple[object, ...], object] = {}
        for key, connection in reference.connections.items():
            ends = ids.get(key.opener, 0), ids.get(key.answerer, 0)
            if port in ends:
                found["connection", *ends, key.flow] = connection
        for (p, *what), first in reference.fragments.items():
            if ids.get(p) == port:
                found["fragment", port, *what] = first
        return found

    def remember(self, one: Agent, key: tuple[object, ...], value: Any) -> None:
        reference, slots = self.fabric.agents[one], self.slots[one]
        if key[0] == "connection":
            _, opener, answerer, flow = cast("tuple[str, int, int, FlowTuple]", key)
            if all(("port", end) in slots.of for end in (opener, answerer)):
                reference.connections[Key(slots["port", opener], slots["port", answerer], flow)] = value
        else:
            _, port, *what = cast("tuple[Any, ...]", key)
            reference.fragments[cast("Any", (slots["port", port], *what))] = value

    def send(self, step: Step) -> tuple[list[tuple[int, bytes]], list[str]]:
        """As Fabric does. What is lost below the agent that sent it is forgotten there: as over any wire that loses,
        one end would know what the other does not, and meaning has one memory for both."""
        port = step.world.ports[step.port]
        # Where else it lives on another host that runs an agent, what it sends takes the way of that host's workload,
        # which the carrier may have closed. Meaning knows the one of where it lives.
        here = agent(step.world, port, step.elsewhere and domain(step.world, port.network) == FABRIC)
        reference = self.fabric.agents[here]
        connections, fragments = dict(reference.connections), dict(reference.fragments)
        deliveries, drops = self.fabric.send(step.port, step.frame, step.now, here)
        if any(reason in BELOW for reason in drops) and not parse(step.frame).is_group:
            reference.connections, reference.fragments = connections, fragments
        return deliveries, drops


# What agents count of a carrier that knows nothing of what it carries, and what that means above. Policy comes before
# routing, so of a host that is out of reach either may be said.
NO_WAY = {"carrier_policy", "carrier_no_route"}
BELOW = {
    "below policy": NO_WAY,
    "below no_route": NO_WAY,
    "below unreachable": NO_WAY,
    "below nobody": NO_WAY,
    "no_underlay_route": NO_WAY,
    "below rate": {"carrier_rate"},
    "below cannot_flatten": {"cannot_flatten"},
    **{f"below {reason}": {reason} for reason in ("carrier_policy", "carrier_no_route", "carrier_rate")},
}


def means(counted: list[str], meant: Counter[str]) -> bool:
    """Is this, drop by drop, what was meant?"""
    left = meant.copy()
    for reason in sorted(counted, key=lambda reason: len(BELOW.get(reason, " "))):
        found = next((each for each in sorted(BELOW.get(reason, {reason})) if left[each] > 0), None)
        if found is None:
            return False
        left[found] -= 1
    return not +left


def machine_of(world: World, port: int, elsewhere: bool = False) -> int:
    """Where a port lives in the end; `elsewhere`: where else, while it moves."""
    here = world.ports[port]
    while True:
        host = here.other if elsewhere and here.other else here.host
        if world.networks[here.network].carrier == FABRIC:
            return host
        here = world.ports[host]


def counted(world: World, sender: int, frame: bytes, outcome: Outcome) -> Counter[str]:
    """The drops that agents see. Of a frame for all, one copy goes to each machine; where the carriers let none
    through, nobody is there to count for the ports of that machine."""
    if not parse(frame).is_group:
        return Counter(reason for _, reason in outcome.drops)
    port = meaning.take_off(world, world.ports[sender], frame)[0]
    network = world.networks[port.network]
    reached = {agent(world, port)}
    for other in world.ports_of(port.segment):
        try:
            meaning.carry(world, network, port.host, other.host)
            reached.add(agent(world, other))
        except meaning._Dropped:
            pass
    if world.segments[port.segment].vlan is not None and len(reached) > 1:  # switches copy it to all
        reached |= {agent(world, other) for other in world.ports_of(port.segment)}
    return Counter(reason for q, reason in outcome.drops if q == 0 or agent(world, world.ports[q]) in reached)


def check(steps: list[Step]) -> Counter[str]:
    """Returns what came of the frames: how many were delivered, or dropped for each reason."""
    state = State()
    agents = Agents(steps[0].world)
    seen: Counter[str] = Counter()
    for number, step in enumerate(steps):
        agents.become(step.world)
        outcome = deliver(step.world, state, step.port, step.frame, step.now)
        state = outcome.state
        agents.copy()
        relayed = agents.fabric.relayed
        deliveries, drops = agents.send(step)
        relayed = agents.fabric.relayed - relayed
        agents.copy()
        if currently_in_test_context():
            note(f"{number}: {step.now} {step.port} {step.frame.hex()} -> {outcome.deliveries} {outcome.drops}")
        meant = counted(step.world, step.port, step.frame, outcome)
        assert sorted(deliveries) == sorted(outcome.deliveries), (number, step)
        assert means(drops, meant), (number, drops, meant, step)
        assert relayed == outcome.relayed, (number, step)
        seen.update(drops)
        seen["delivered"] += len(deliveries)
    return seen


@equality
@given(worlds())
def test_slots_are_found_again_in_the_tables(world: World) -> None:
    """By an agent that was restarted."""
    slots = assign(Slots(), world)
    for machine in world.machines:
        assert slots_of(compile(world, machine, {}, 2, slots)) == slots


def test_of_rows_with_one_key_the_last_counts() -> None:
    """No file makes two ports own one address, but no table has two rows for it either."""
    address = IPv4Address("10.0.0.5")
    first = Port(40, 10, 20, 1, 0x020000000001, (address, link_local(0x020000000001)))
    second = Port(41, 10, 20, 1, 0x020000000002, (), (IPv4Network(address),))
    around = [Machine(1, IPv4Address("192.0.2.1")), Network(10), Segment(20, 10, 100, (IPv4Network("10.0.0.0/24"),))]
    for ports in ((first, second), (second, first)):
        world = World.of([*around, *ports])
        slots = assign(Slots(), world)
        tables = compile(world, 1, {}, 2, slots)
        owners = {bytes(row["key"]["address"]): int(row["value"]["slot"]) for row in tables["owner"]}
        assert len(owners) == len(tables["owner"]) == 3
        assert owners[packed(address)] == slots["port", ports[-1].id]


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
