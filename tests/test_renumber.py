"""What happens to a packet hangs on no id: a world with other ids, in another order, means the same, as it is told and
as it is compiled. So an agent may know other ids than the controller, which explains what agents do (api/feed.py)."""

from __future__ import annotations

import random
from dataclasses import fields, is_dataclass, replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from frames import ip_frame
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Step, conversations, crossings, detour, on_the_wire, rounds, torrents, worlds
from test_equality import EXAMPLES, check, equality

from nestnet.compile.explain import explain
from nestnet.model.domains import domain
from nestnet.model.meaning import Bucket, Outcome, State, deliver
from nestnet.model.packet import BROADCAST, LIMITED_BROADCAST, UDP, mapped
from nestnet.model.renumber import renumbered
from nestnet.model.values import FABRIC, KINDS, Machine, Network, Port, Segment, Service, Value, Vlan, World

IDS = 999  # at most, of each kind

quick = settings(equality, max_examples=max(1, EXAMPLES // 4))


class Others:
    """Other ids, at random."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self._of = {kind: rng.sample(range(1, IDS + 1), IDS) for kind in (*KINDS, "group")}
        self._worlds: dict[int, tuple[World, World]] = {}

    def __call__(self, kind: str, id: int) -> int:
        return self._of[kind][id - 1] if id else 0

    def world(self, world: World) -> World:
        """In any order, too."""
        if id(world) not in self._worlds:
            values = [renumbered(value, self, host_kind(world, value)) for value in world]
            self._worlds[id(world)] = world, World.of(sorted(values, key=lambda value: value.id))
        return self._worlds[id(world)][1]

    def step(self, step: Step) -> Step:
        return replace(step, world=self.world(step.world), port=self("port", step.port))

    def state(self, world: World, state: State) -> State:
        def bucket(one: Bucket) -> Bucket:
            owner = world.ports[one.id] if one.kind == "port" else world.links[one.id]
            below = "machine" if domain(world, owner.network) == FABRIC else "port"
            return one._replace(id=self(one.kind, one.id), machine=self(below, one.machine))

        ends = {(self("port", a), self("port", b), flow): c for (a, b, flow), c in state.connections.items()}
        fragments = {(self("port", key[0]), *key[1:]): first for key, first in state.fragments.items()}
        told, asked = ({self("port", port): n for port, n in each.items()} for each in (state.told, state.asked))
        return State(ends, fragments, told, asked, {bucket(one): until for one, until in state.buckets.items()})


def host_kind(world: World, value: Value) -> str:
    return "machine" if isinstance(value, Port) and world.networks[value.network].carrier == FABRIC else "port"


def alike(world: World, least: int = 1) -> bool:
    """Are there two links, with a rate of at least so much, that only their ids tell apart? These say which is charged
    for which flows."""
    rated = [(*sorted(link.between), link.rate) for link in world.links.values() if link.rate >= least]
    return len(rated) != len(set(rated))


def same(steps: list[Step], seed: int) -> None:
    """Play them twice, once with other ids. Copies of a frame for all come in the same order."""
    others = Others(seed)
    first, second = State(), State()
    for step in steps:
        if alike(step.world):
            return
        other = others.step(step)
        one = deliver(step.world, first, step.port, step.frame, step.now)
        two = deliver(other.world, second, other.port, other.frame, other.now)
        ports = [(others("port", port), frame) for port, frame in one.deliveries]
        drops = [(others("port", port), reason) for port, reason in one.drops]
        expected = Outcome(tuple(ports), tuple(drops), others.state(step.world, one.state), one.relayed)
        assert two == expected
        first, second = one.state, two.state


PLAIN = {"mtu", "underlay", "vni", "mac", "cost", "rate", "priority", "tag"}  # numbers that are no ids


@given(worlds())
def test_every_id_in_a_value_is_another_one(world: World) -> None:
    """Of what a value has now, and of what it will have."""
    far = 1 << 40

    def ids(value: Any) -> list[int]:
        if isinstance(value, tuple):
            return [id for each in value for id in ids(each)]
        if isinstance(value, Service | Vlan) or not is_dataclass(value):
            return [value] if isinstance(value, int) and not isinstance(value, bool) and value else []
        return [id for field in fields(value) if field.name not in PLAIN for id in ids(getattr(value, field.name))]

    for value in world:
        other = renumbered(value, lambda _, old: old + far, host_kind(world, value))
        assert ids(other) == [id + far for id in ids(value)]
        assert renumbered(other, lambda _, new: new - far, host_kind(world, value)) == value


@quick
@given(conversations(), st.integers(0, 1 << 32))
def test_conversations_mean_the_same(steps: list[Step], seed: int) -> None:
    same(steps, seed)


@quick
@given(crossings(), st.integers(0, 1 << 32))
def test_flows_take_the_same_ways_over_links(steps: list[Step], seed: int) -> None:
    same(steps, seed)


@quick
@given(torrents(carriages=True), st.integers(0, 1 << 32))
def test_the_same_is_too_much(steps: list[Step], seed: int) -> None:
    same(steps, seed)


@quick
@given(rounds(carriages=True), st.integers(0, 1 << 32))
def test_carriers_do_the_same(steps: list[Step], seed: int) -> None:
    same(steps, seed)


@quick
@given(st.one_of(crossings(), rounds(carriages=True), torrents()), st.integers(0, 1 << 32))
def test_the_tables_mean_the_same_with_other_ids(steps: list[Step], seed: int) -> None:
    others = Others(seed)
    if steps:
        check([others.step(step) for step in steps])


def crowd() -> World:
    """Five hosts of a carrier, a port on each, and what the first host sends is limited."""
    lan, macs = (ip_network("10.0.0.0/24"),), [0x020000000000 + mac for mac in (9, 3, 7, 1, 5)]
    values: list[Value] = [Machine(n, on_the_wire(n, 4)) for n in range(1, 6)]
    for network in (1, 2):
        values += [Network(network, network - 1), Segment(network, network, 100 + network, lan)]
        for n, mac in enumerate(macs, 1):
            own, host = (ip_address(f"10.0.0.{n}"),), n + 100 * (network - 1)
            values.append(Port(100 * network + n, network, network, host, mac, own, hosts=True))
    world = World.of(values)
    return world.with_(replace(world.ports[101], rate=64_000))


@pytest.mark.parametrize("seed", range(8))
def test_frames_for_all_reach_the_same_before_it_is_too_much(seed: int) -> None:
    world = crowd()
    ends = BROADCAST, world.ports[201].mac, mapped(ip_address("10.0.0.1")), LIMITED_BROADCAST
    frame = ip_frame(*ends, UDP, bytes(500))
    steps = [Step(0.0, world, 201, frame)] * 3
    assert 0 < len(deliver(world, State(), 201, frame, 0.0).deliveries) < 4
    same(steps, seed)
    check([Others(seed).step(step) for step in steps])


@pytest.mark.parametrize("seed", range(8))
def test_a_trace_takes_the_same_of_equal_ways(seed: int) -> None:
    others, world = Others(seed), detour(1)
    names = {key: " ".join(map(str, key)) for key in world.values}
    told = {(kind, others(kind, id)): name for (kind, id), name in names.items()}
    ways = set()
    for port in range(1, 40):
        asked = ip_address("10.0.1.2"), "tcp", port
        trace = explain(world, 1, *asked, names)
        assert explain(others.world(world), others("port", 1), *asked, told) == trace
        ways |= {step["text"] for step in trace["steps"] if step["step"] == "route"}
    assert len(ways) > 2


@equality
@given(st.one_of(worlds(), crossings().map(lambda steps: steps[-1].world if steps else World())), st.data())
def test_a_trace_says_the_same(world: World, data: st.DataObject) -> None:
    assume(world.ports and not alike(world, least=0))  # of those a trace says the names
    others = Others(data.draw(st.integers(0, 1 << 32)))
    other = others.world(world)
    names = {(kind, id): f"{kind} {id}" for kind, id in world.values} | {("group", 1): "g", ("group", 2): "h"}
    told = {(kind, others(kind, id)): name for (kind, id), name in names.items()}
    port = data.draw(st.sampled_from(sorted(world.ports.values(), key=lambda port: port.id)))
    near = {a for p in world.ports_in(port.network) for a in p.addresses}
    to = data.draw(st.sampled_from(sorted(near, key=str) or [ip_address("203.0.113.9")]))

    def plain(trace: dict[str, Any]) -> Any:
        """Of policies of one rank any is named."""
        steps = [{**step, "text": ""} if step["step"] == "policy" else step for step in trace["steps"]]
        return {**trace, "detail": "", "steps": [{k: v for k, v in s.items() if k != "policy"} for s in steps]}

    one = explain(world, port.id, to, "tcp", 80, names)
    assert plain(explain(other, others("port", port.id), to, "tcp", 80, told)) == plain(one)
