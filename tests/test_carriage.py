"""Flat = encapsulated = meaning: in random forests where the two alternate, agents of all domains run their tables, the
datagrams of each as frames of the workload that it runs in, and what arrives is what meaning says.

To look for longer, or again: see test_equality.py.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from strategies import Step, conversations, dialogues, rounds, torrents, worlds
from test_equality import EXAMPLES, check, equality

from nestnet.model.meaning import State, deliver
from nestnet.model.values import Link, Port, World


@equality
@given(worlds(carriages=True).flatmap(conversations))
def test_agents_upon_agents_mean_the_same(steps: list[Step]) -> None:
    if steps:
        check(steps)


@equality
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
    """But for rates: one level knows nothing of what those above it are charged."""
    states = State(), State()
    for step in steps:
        both = [
            deliver(kind(free(step.world)), state, step.port, step.frame, step.now)
            for kind, state in zip((flat, lambda world: world), states, strict=True)
        ]
        assert both[0].deliveries == both[1].deliveries
        assert len(both[0].drops) == len(both[1].drops)
        states = both[0].state, both[1].state
