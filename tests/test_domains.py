"""Domains: which agent has what, and what it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from strategies import tower

from nestnet.compile.compiler import compile
from nestnet.compile.diff import diff, show
from nestnet.compile.slots import Slots, assign, slots_of
from nestnet.model.domains import Agent, agent, domain, within
from nestnet.model.values import FABRIC, Machine, Network, World
from nestnet.model.wire import from_wire, to_wire


def alternating() -> World:
    """Five networks one upon the other: the third and the fourth are encapsulated. Ports 2n-1 and 2n are in n."""
    world = tower(5)
    return world.with_(*(replace(world.networks[id], encapsulated=True, mtu=1450 - 50 * (id - 2)) for id in (3, 4)))


def test_a_flat_network_is_where_its_carrier_is() -> None:
    assert [domain(alternating(), id) for id in range(1, 6)] == [FABRIC, FABRIC, 2, 3, 3]
    assert {domain(tower(5), id) for id in range(1, 6)} == {FABRIC}


def test_an_agent_has_what_lives_on_its_machine_or_host_port() -> None:
    world = alternating()
    assert [agent(world, world.ports[id]) for id in (1, 3, 5, 7, 9)] == [
        Agent(FABRIC, 1),
        Agent(FABRIC, 1),
        Agent(2, 3),
        Agent(3, 5),
        Agent(3, 5),
    ]


def test_while_a_host_moves_two_agents_have_what_lives_on_it() -> None:
    """In its own domain: the agents above go with it."""
    world = alternating().with_(Machine(3, tower(1).machines[1].address + 7))
    moving = world.with_(replace(world.ports[1], other=3))
    assert agent(moving, moving.ports[3], elsewhere=True) == Agent(FABRIC, 3)
    assert agent(moving, moving.ports[5], elsewhere=True) == Agent(2, 3)
    assert agent(world, world.ports[3], elsewhere=True) == Agent(FABRIC, 1)


def test_agents_know_their_domain_and_nothing_below_or_above() -> None:
    world = alternating()
    for domain_, networks, machines in ((FABRIC, {1, 2}, {1, 2}), (2, {3}, {3, 4}), (3, {4, 5}, {5, 6})):
        inside = within(world, domain_)
        assert set(inside.networks) == networks
        assert set(inside.machines) == machines
        assert {port.network for port in inside.ports.values()} == networks
        assert {segment.network for segment in inside.segments.values()} == networks
        assert not any(network.encapsulated for network in inside.networks.values())
    top = within(world, 3)
    assert (top.networks[4].carrier, top.networks[5].carrier) == (FABRIC, 4)
    assert top.machines[5] == Machine(5, world.ports[5].addresses[0], world.networks[3].mtu)
    assert within(tower(3), FABRIC) == tower(3)


def test_a_machine_has_an_address_of_the_family_that_it_is_reached_by() -> None:
    world = tower(2)
    six = world.with_(replace(world.networks[2], encapsulated=True, underlay=6))
    assert not within(six, 1).machines, "no host has one"
    both = six.with_(Network(3, 1, 4, encapsulated=True))
    with pytest.raises(ValueError, match="network 1 carries encapsulated networks of both address families"):
        within(both, 1)


def test_what_is_disabled_anywhere_below_disables_the_machine() -> None:
    world = alternating()
    disabled = [
        world.machines[1], world.ports[1], world.ports[3], world.ports[5], *(world.networks[n] for n in (1, 2, 3))
    ]  # fmt: skip
    for value in disabled:
        inside = within(world.with_(replace(value, enabled=False)), 3)
        both = isinstance(value, Network)
        assert [inside.machines[id].enabled for id in (5, 6)] == [False, not both]
    above = world.with_(replace(world.networks[4], enabled=False), replace(world.ports[7], enabled=False))
    assert all(machine.enabled for machine in within(above, 3).machines.values())


def test_a_machine_is_disabled_by_one_row() -> None:
    """And a restarted agent finds its slot."""
    world = tower(2)
    slots = assign(Slots(), world)
    down = world.with_(replace(world.machines[2], enabled=False))
    have, want = (compile(each, 1, {}, 2, slots) for each in (world, down))
    assert [show(action) for action in diff(have, want)] == ["put 1 in host", "bump host of 1", "next epoch"]
    assert slots_of(want) == slots


def test_the_feed_carries_both() -> None:
    for value in (Machine(1, tower(1).machines[1].address, enabled=False), Network(2, 1, encapsulated=True)):
        assert from_wire(type(value).__name__.lower(), to_wire(value)) == value
