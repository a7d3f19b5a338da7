"""Where each router of a network sends what: shortest paths over links that are up.

    routers, links, segments  ->  router -> prefix -> Route(segment, next routers, hops)

One run of Dijkstra's algorithm for each segment, from all routers that join it at once; a router's
next hops are then its links that lead downhill. All that begin a path of least cost are kept, in the
order of `World.links_of`: flows share them by hash (rule 7).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from heapq import heappop, heappush

from nestnet.model.values import Link, Segment, World


@dataclass(frozen=True, slots=True)
class Route:
    """From one router to one segment. `nexts` are (link, router) ids, none if the router joins the segment;
    `hops` is the number of routers on the longest of the ways that share the flows, itself among them."""

    segment: int
    nexts: tuple[tuple[int, int], ...]
    hops: int


def routes_to(segment: Segment, world: World) -> dict[int, Route]:
    """Router id -> its route to this segment, for all routers that reach it."""
    cost = {router.id: 0 for router in world.routers_of(segment.id)}
    order: list[int] = []
    heap = [(0, router) for router in sorted(cost)]
    done: set[int] = set()
    while heap:
        far, router = heappop(heap)
        if router in done:
            continue
        done.add(router)
        order.append(router)
        for link, other in neighbours(world, router):
            if other not in cost or far + link.cost < cost[other]:
                cost[other] = far + link.cost
                heappush(heap, (cost[other], other))
    routes: dict[int, Route] = {}
    for router in order:  # nearest first, so that the next hops' own routes are there
        if cost[router] == 0:
            routes[router] = Route(segment.id, (), 1)
            continue
        nexts = tuple(
            (link.id, other)
            for link, other in neighbours(world, router)
            if other in cost and cost[other] + link.cost == cost[router]
        )
        routes[router] = Route(segment.id, nexts, 1 + max(routes[other].hops for _, other in nexts))
    return routes


def routes_of(world: World) -> dict[int, list[Route]]:
    """Router id -> its routes to all segments it reaches, by rising segment id."""
    found: dict[int, list[Route]] = defaultdict(list)
    for id in sorted(world.segments):
        for router, route in routes_to(world.segments[id], world).items():
            found[router].append(route)
    return found


def neighbours(world: World, router: int) -> list[tuple[Link, int]]:
    """The links of a router that are up, with the router at the other end that this world knows."""
    ends = []
    for link in world.links_of(router):
        a, b = link.between
        other = b if a == router else a
        if link.up and other in world.routers:
            ends.append((link, other))
    return ends
