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
import random
from collections import Counter
from dataclasses import replace

from frames import echo, ethernet, icmp_protocol, ip_frame, ipv4, tcp, udp
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from strategies import Aim, Step, aims, connected, conversations, own_addresses, worlds

from nestnet.compile.compiler import compile
from nestnet.compile.routes import routes_of
from nestnet.compile.slots import Slots, assign
from nestnet.compile.tables import Tables
from nestnet.datapath.reference import Fabric
from nestnet.model import meaning
from nestnet.model import packet as pk
from nestnet.model.meaning import Outcome, State, deliver
from nestnet.model.packet import parse
from nestnet.model.values import FABRIC, Link, World

EXAMPLES = int(os.environ.get("NESTNET_EXAMPLES", "200"))
FIRST_IFINDEX = 10

equality = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class Machines:
    """All machines of a world that changes: its tables, run."""

    def __init__(self, world: World) -> None:
        # Slots differ from machine to machine, as they do in life: nothing may depend on them being the same.
        self.slots = {id: Slots({("port", -n): n for n in range(1, id)}) for id in world.machines}
        self.world = world
        self.fabric = Fabric(self.tables())

    def become(self, world: World) -> None:
        if world is not self.world:
            self.world = world
            self.fabric.load(self.tables())

    def tables(self) -> dict[int, Tables]:
        self.slots = {id: assign(slots, self.world) for id, slots in self.slots.items()}
        attachments = {id: FIRST_IFINDEX + id for id in self.world.ports}
        return {id: compile(self.world, id, attachments, 2, slots) for id, slots in self.slots.items()}


def machine_of(world: World, port: int) -> int:
    """Where a port lives in the end."""
    here = world.ports[port]
    while world.networks[here.network].carrier != FABRIC:
        here = world.ports[here.host]
    return here.host


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
        deliveries, drops = machines.fabric.send(step.port, step.frame, step.now)
        note(f"{number}: {step.now} {step.port} {step.frame.hex()} -> {outcome.deliveries} {outcome.drops}")
        expected = sorted(outcome.deliveries), counted(step.world, step.port, step.frame, outcome)
        assert (sorted(deliveries), Counter(drops)) == expected, (number, step)


@equality
@given(conversations(moves=False))
def test_the_tables_mean_the_same(steps: list[Step]) -> None:
    if steps:
        check(steps)


@st.composite
def rounds(draw: st.DrawFn) -> list[Step]:
    """In a world that stays as it is, workloads send to where it should work, and to all: many frames that get far,
    answers among them, from the networks with the longest chains of carriers first."""
    world = draw(worlds(disabled=draw(st.booleans())))
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    ports = sorted(world.ports.values(), key=lambda port: (-depth(world, port.network), rng.random()))
    steps: list[Step] = []
    for port in ports[:10]:
        good, _ = aims(world, port)
        for aim in [*rng.sample(good, min(len(good), 6)), Aim(pk.BROADCAST, pk.LIMITED_BROADCAST)]:
            own = [a for a in own_addresses(port) if pk.is_mapped(a) == pk.is_mapped(aim.address)]
            if not own:
                continue
            flow = rng.choice(own[:2]), aim.address
            protocol, payload = rng.choice(
                [
                    (pk.TCP, tcp(*flow, 1000, rng.choice([80, 90]), pk.SYN)),
                    (pk.UDP, udp(*flow, 1000, rng.choice([53, 60, 4789]), b"x" * rng.choice([0, 1230, 1403]))),
                    (icmp_protocol(aim.address), echo(*flow, 1)),
                ]
            )
            ttl = rng.choice([64] * 6 + [1, 2, 3, 4])
            steps.append(Step(0.0, world, port.id, ip_frame(aim.mac, port.mac, *flow, protocol, payload, ttl)))
    return steps


@st.composite
def crossings(draw: st.DrawFn) -> list[Step]:
    """From all ports over links to all others, while links change: many flows, whole and in fragments, with enough TTL
    and just not."""
    world = draw(worlds(machines=2, networks=2, disabled=False))
    world = world.without(*(("policy", id) for id in world.policies))
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    steps: list[Step] = []
    for _ in range(4):
        for router in world.routers:
            other = rng.choice(sorted(connected(world, router)))
            if other != router:  # One more between routers that links connect, so nothing overlaps that did not.
                id = max(world.links) + 1
                world = world.with_(Link(id, world.routers[router].network, (router, other), rng.choice([1, 1, 2])))
        links = [replace(link, up=rng.random() < 0.8, cost=rng.choice([1, 1, 2])) for link in world.links.values()]
        world = world.with_(*links)
        for port in world.ports.values():
            joined = set(world.routers_of(port.segment))
            near = [a for a in aims(world, port)[0] if any(a.mac == router.mac for router in joined)]
            for aim in rng.sample(near, min(len(near), 8)):
                own = [a for a in own_addresses(port) if pk.is_mapped(a) == pk.is_mapped(aim.address)]
                if not own:
                    continue
                flow = own[0], aim.address
                kind = rng.choice([pk.UDP, pk.UDP, pk.TCP, pk.ICMP, 47])
                sport = rng.randrange(1, 1 << 16)
                protocol, payload = {
                    pk.UDP: (pk.UDP, udp(*flow, sport, 53)),
                    pk.TCP: (pk.TCP, tcp(*flow, sport, 80, pk.SYN)),
                    pk.ICMP: (icmp_protocol(aim.address), echo(*flow, sport)),
                    47: (47, bytes(12)),
                }[kind]
                ttl = rng.choice([64, 64, 1, 2, 3, 4, 5, 6])
                frame = ip_frame(aim.mac, port.mac, *flow, protocol, payload, ttl)
                if pk.is_mapped(aim.address) and rng.random() < 0.2:
                    parts = [(0x2000, payload), (1, bytes(8))]
                    bodies = [ipv4(*flow, protocol, part, ttl, sport, bits) for bits, part in parts]
                    steps += [Step(0.0, world, port.id, ethernet(aim.mac, port.mac, pk.IPV4, body)) for body in bodies]
                steps.append(Step(0.0, world, port.id, frame))
    return steps


def depth(world: World, network: int) -> int:
    carrier = world.networks[network].carrier
    return 1 if carrier == FABRIC else 1 + depth(world, carrier)


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
