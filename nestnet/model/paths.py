"""How many of some links the least-cost ways of a network lead over, at most.

For limits that must be known before anything is stored; what a way is, is in `meaning.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from heapq import heappop, heappush

STEPS = 1_000_000  # segments times links: above that it is not worth finding out


def most_on_a_way(
    segments: Mapping[str, Collection[str]], links: Iterable[tuple[str, str, int]], counted: Collection[int]
) -> int:
    """The largest number of `counted` links (by their place in `links`) on any least-cost way from a router that joins
    a segment to another segment, equal ones among them. `segments` are the routers that join each, `links` (router,
    router, cost) of those that are up. Of a network that is too large: how many could be on a way without a cycle."""
    edges = list(links)
    beyond: dict[str, list[tuple[str, int, bool]]] = defaultdict(list)
    for place, (a, b, cost) in enumerate(edges):
        beyond[a].append((b, cost, place in counted))
        beyond[b].append((a, cost, place in counted))
    bound = min(len(counted), max(0, len(beyond) - 1))
    if len(segments) * len(edges) > STEPS:
        return bound
    edge_routers = {router for joined in segments.values() for router in joined}
    most = 0
    for joined in segments.values():
        if most == bound:
            break
        most = max([most, *(n for router, n in _counts(joined, beyond).items() if router in edge_routers)])
    return most


def _counts(joined: Collection[str], beyond: Mapping[str, list[tuple[str, int, bool]]]) -> dict[str, int]:
    """Router -> the most counted links on its ways of least cost to any of these."""
    cost = dict.fromkeys(joined, 0)
    done: dict[str, int] = {}
    heap = [(0, router) for router in joined]
    while heap:
        far, router = heappop(heap)
        if router in done:
            continue
        done[router] = 0
        for other, more, is_counted in beyond.get(router, ()):
            if other in done and cost[other] + more == far:
                done[router] = max(done[router], done[other] + is_counted)
            elif other not in done and far + more < cost.get(other, far + more + 1):
                cost[other] = far + more
                heappush(heap, (cost[other], other))
    return done
