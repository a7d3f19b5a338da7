"""Policies as rules: what the compiler makes of them, and how many there may be."""

from __future__ import annotations

from hypothesis import given
from strategies import worlds

from nestnet.compile.rules import identities_of, port_prefixes, rules_of
from nestnet.model.breadth import rules_at_most
from nestnet.model.values import World


@given(worlds())
def test_never_more_rules_than_were_counted_before(world: World) -> None:
    for network in world.networks:
        policies = world.policies_of(network)
        ports = world.ports_in(network)
        sides = [(policy.sources, policy.targets, policy.services) for policy in policies]
        bound = rules_at_most(sides, [frozenset(identities_of(port)) for port in ports])
        assert len(rules_of(policies, ports).rows) <= bound


def test_a_range_of_ports_is_few_prefixes() -> None:
    assert port_prefixes(80, 80) == [(80, 16)]
    assert port_prefixes(80, 90) == [(80, 13), (88, 15), (90, 16)]
    assert port_prefixes(0, 65535) == [(0, 0)]
    for low, high in [(1, 65535), (5, 5000), (32768, 40000)]:
        covered = {
            port for first, length in port_prefixes(low, high) for port in range(first, first + 2 ** (16 - length))
        }
        assert covered == set(range(low, high + 1))
