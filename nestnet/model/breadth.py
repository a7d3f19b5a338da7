"""How many rules the policies of a network become, counted without making them.

A policy is compiled to one rule for each combination of classes that its selectors and services
cover (compile/rules.py). Ports whose groups overlap a lot, or port ranges that do, make many
classes of few selectors; so this is what is limited, and judged before anything is stored.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence

from .values import Prefix, Selector, Service

RULES_PER_NETWORK = 65536
WITH_PORTS = (6, 17)

Sides = tuple[Sequence[Selector], Sequence[Selector], Sequence[Service]]


def rules_at_most(policies: Sequence[Sides], ports: Iterable[frozenset[Selector]]) -> int:
    """An upper bound of the rules that these policies, as (sources, targets, services), are compiled to.
    `ports` has the selectors by identity that match each port of the network."""
    selectors = {selector for sources, targets, _ in policies for selector in (*sources, *targets)}
    classes = {members & selectors for members in ports}
    width = Counter(selector for members in classes for selector in members)
    inside = _inside({selector.cidr for selector in selectors if selector.cidr is not None})
    for selector in selectors:
        if selector.kind == "any":
            width[selector] = 1
        elif selector.cidr is not None:
            width[selector] = inside[selector.cidr]
    services = {service for _, _, about in policies for service in about}
    cuts = {p: sorted({e for s in services if s.protocol == p for e in (s.low, s.high + 1)}) for p in WITH_PORTS}
    depth = {s: _between(cuts[s.protocol], s) if s.protocol in cuts else 1 for s in services}
    return sum(
        sum(width[s] for s in sources) * sum(width[t] for t in targets) * sum(depth[s] for s in about)
        for sources, targets, about in policies
    )


def _between(cuts: list[int], service: Service) -> int:
    return bisect_right(cuts, service.high) - bisect_left(cuts, service.low)


def _inside(prefixes: set[Prefix]) -> Counter[Prefix]:
    """How many of these lie in each, itself among them. Sorted, those around a prefix are a stack."""
    count: Counter[Prefix] = Counter()
    stack: list[Prefix] = []
    for prefix in sorted(prefixes, key=lambda p: (p.version, int(p.network_address), p.prefixlen)):
        first = int(prefix.network_address)
        while stack and (stack[-1].version != prefix.version or int(stack[-1].broadcast_address) < first):
            stack.pop()
        stack.append(prefix)
        count.update(stack)
    return count
