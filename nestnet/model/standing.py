"""Which hosts of a network are down, and why: for whoever wonders why nothing passes (rule 12).

A host is down if something on its way to the wire is disabled or lost, or if what carries it takes nothing from it to
any other host in use that is up, nor from any of them to it. What is down passes no packet to another host; what is
disabled passes none at all. It is computed when somebody asks: packets are judged by `meaning.carry`, as ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from nestnet.model import packet as pk
from nestnet.model.meaning import refusal
from nestnet.model.values import FABRIC, MAX_DEPTH, Network, Port, Selector, World

DISABLED, LOST, FENCED, DEPTH = "disabled", "lost", "fenced", "carrier_depth"
ABSENT = "absent"  # of a host whose agent has never been there


class Cause(NamedTuple):
    """What is down: a `kind` (network, port, machine) and its id. `why` is disabled; lost, fenced or absent, of a
    machine or of a host port whose workload is one; else the reason why `port` reaches no other host in `network`,
    under which its packets are dropped."""

    kind: str
    id: int
    why: str
    port: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """The machines that are not there, and why: those of the fabric, and the host ports whose workloads are some."""

    machines: Mapping[int, str] = field(default_factory=dict)
    ports: Mapping[int, str] = field(default_factory=dict)


def closed(world: World, network: Network) -> Cause | None:
    """The nearest of the networks that carry this one that is disabled."""
    for _ in range(MAX_DEPTH):
        if network.carrier == FABRIC:
            break
        network = world.networks[network.carrier]
        if not network.enabled:
            return Cause("network", network.id, DISABLED)
    return None


def fallen(world: World, network: Network, hosts: Iterable[int], lost: Lost) -> dict[int, Cause]:
    """Those of the hosts in use of a network that are down."""
    return _Fallen(world, network, lost).of(sorted(set(hosts)))


class _Fallen:
    def __init__(self, world: World, network: Network, lost: Lost) -> None:
        self.world, self.network, self.lost = world, network, lost
        self._classes: dict[int, tuple[object, ...]] = {}  # by port
        self._selectors: dict[int, frozenset[Selector]] = {}
        self._refusals: dict[tuple[object, ...], str] = {}

    def of(self, hosts: list[int]) -> dict[int, Cause]:
        down = {host: cause for host in hosts if (cause := self.broken(host)) is not None}
        standing = [host for host in hosts if host not in down]
        if self.network.carrier == FABRIC or len(standing) < 2:
            return down
        # Those of one class that live on the same host are carried alike, so one or two of them stand for all.
        alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        on_wire = self.world.networks[self.network.carrier].carrier == FABRIC
        for host in standing:
            port = self.world.ports[host]
            alike[self.class_of(port), None if on_wire else port.host].append(host)
        groups = list(alike.values())
        up: set[int] = set()  # groups, by place
        for first, one in enumerate(groups):
            for second, other in enumerate(groups[first:], first):
                a, b = one[0], other[-1]
                if a != b and not {first, second} <= up and "" in (self.way(a, b)[0], self.way(b, a)[0]):
                    up |= {first, second}
        for place, group in enumerate(groups):
            for a in () if place in up else group:
                why, level, port_there = self.way(a, next(b for b in standing if b != a))
                down[a] = Cause("network", level, why, port_there)
        return down

    def broken(self, host: int) -> Cause | None:
        """What on its way to the wire is disabled or lost: the nearest."""
        network = self.network
        for _ in range(MAX_DEPTH):
            if network.carrier == FABRIC:
                return Cause("machine", host, self.lost.machines[host]) if host in self.lost.machines else None
            if network.encapsulated and host in self.lost.ports:
                return Cause("port", host, self.lost.ports[host])
            network, port = self.world.networks[network.carrier], self.world.ports[host]
            if not network.enabled:
                return Cause("network", network.id, DISABLED)
            if not port.enabled:
                return Cause("port", port.id, DISABLED)
            host = port.host
        return Cause("network", self.network.id, DEPTH)

    def way(self, a: int, b: int) -> tuple[str, int, int]:
        """Why nothing is carried from a to b, in which network and from which port of it; '' if it is."""
        network = self.network
        while a != b and network.carrier != FABRIC:
            source, target = self.world.ports[a], self.world.ports[b]
            key = (network.underlay, self.class_of(source), self.class_of(target))
            if (why := self._refusals.get(key)) is None:
                why = self._refusals[key] = refusal(self.world, network.underlay, source, target)
            if why:
                return why, network.carrier, a
            network, a, b = self.world.networks[network.carrier], source.host, target.host
        return "", 0, 0

    def selectors_of(self, network: int) -> frozenset[Selector]:
        if network not in self._selectors:
            policies = self.world.policies_of(network)
            self._selectors[network] = frozenset(s for p in policies for s in (*p.sources, *p.targets))
        return self._selectors[network]

    def class_of(self, port: Port) -> tuple[object, ...]:
        """Ports of which this is the same are the same to policies and routes."""
        if port.id not in self._classes:
            selectors = self.selectors_of(port.network)
            named = any(s.kind == "port" and s.id == port.id for s in selectors)
            first = [port.address(family) for family in (4, 6)]
            within = frozenset(
                (s.cidr, family)
                for s in selectors
                for family, address in zip((4, 6), first, strict=True)
                if s.cidr is not None and address is not None and pk.contains(s.cidr, pk.mapped(address))
            )
            has = tuple(address is not None for address in first)
            self._classes[port.id] = (port.segment, port.groups, port.hosts, named and port.id, within, has)
        return self._classes[port.id]
