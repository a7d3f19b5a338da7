"""The policies of one network as classes and rows: what `tables.py` calls peer, cidr, service and rule.

Policies select endpoints by who they are (a group, a segment, a port ...) or by address (a CIDR).
Endpoints that exactly the same selectors match are one *class*, so the datapath needs two small
numbers for each end, two for the service, and one look at each combination of them that any rule
uses: at most 27, however many rules there are. Intervals of ports are classes the same way.

    policies, ports  ->  classes  ->  rows (source, target, service) -> rank
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Network
from itertools import pairwise

from nestnet.compile.tables import CIDR, CLASS, DENY, IDENTITY, PROTOCOL
from nestnet.model.values import Policy, Port, Prefix, Selector, Service

V4_IN_V6 = 96  # Bits in front of an IPv4 address in its 16-byte form ::ffff:a.b.c.d.


MAPPED = IPv6Network("::ffff:0:0/96")


def mapped(prefix: Prefix) -> list[tuple[int, int]]:
    """A prefix as (128-bit integer, length) in the space where IPv4 is ::ffff:0:0/96.

    An IPv6 prefix around all of that, such as ::/0, is cut into pieces that leave it out: IPv6 never means IPv4.
    """
    if prefix.version == 4:
        return [(0xFFFF << 32 | int(prefix.network_address), prefix.prefixlen + V4_IN_V6)]
    pieces = prefix.address_exclude(MAPPED) if MAPPED.subnet_of(prefix) else [prefix]
    return [(int(piece.network_address), piece.prefixlen) for piece in pieces]


@dataclass(frozen=True)
class RuleSet:
    """One network's policies, compiled. All classes count from 1; 0 is no class.

    version   a hash of all the rest: what the network's row switches by (rule 18); 0 is "no policies"
    combos    bitmap of the combinations of kinds that exist in `rows`
    peers     port id -> class of who it is
    cidrs     (128-bit prefix, length) -> class of the longest prefix
    services  (protocol, first port, prefix length in 16) -> class
    rows      (source, target, service) -> (rank, id of the policy)
    """

    version: int
    combos: int
    peers: Mapping[int, int]
    cidrs: Mapping[tuple[int, int], int]
    services: Mapping[tuple[int, int, int], int]
    rows: Mapping[tuple[int, int, int], tuple[int, int]]


NO_POLICIES = RuleSet(0, 0, {}, {}, {}, {})


def rules_of(policies: Iterable[Policy], ports: Iterable[Port]) -> RuleSet:
    """Compile one network's policies for its ports. Order of both means nothing."""
    policies = sorted(policies, key=lambda policy: policy.id)
    if not policies:
        return NO_POLICIES
    selectors = {s for policy in policies for s in (*policy.sources, *policy.targets)}
    identities = {s for s in selectors if s.kind not in ("any", "cidr")}
    peer_sets = {port.id: frozenset(identities_of(port) & identities) for port in ports}
    peer_classes = _numbered(peer_sets.values())
    cidr_sets = _cidr_sets({s.cidr for s in selectors if s.cidr is not None})
    cidr_classes = _numbered(cidr_sets.values())
    services = {service for policy in policies for service in policy.services}
    service_sets = {p: _intervals([s for s in services if s.protocol == p and _ranged(s)]) for p in (6, 17)}
    service_classes = _numbered(members for intervals in service_sets.values() for _, _, members in intervals)

    ends: dict[Selector, list[int]] = {}
    for s in selectors:
        if s.kind == "any":
            ends[s] = [0]
        elif s.cidr is not None:
            ends[s] = [CIDR + n for members, n in cidr_classes.items() if s.cidr in members]
        else:
            ends[s] = [IDENTITY + n for members, n in peer_classes.items() if s in members]
    abouts: dict[Service, list[int]] = {}
    for service in services:
        if service.protocol < 0:
            abouts[service] = [0]
        elif not _ranged(service):
            abouts[service] = [PROTOCOL + service.protocol]
        else:
            abouts[service] = [CLASS + n for members, n in service_classes.items() if service in members]

    rows: dict[tuple[int, int, int], tuple[int, int]] = {}
    for policy in policies:
        rank = policy.priority << 1 | (0 if policy.allow else DENY)
        sources = {end for s in policy.sources for end in ends[s]}
        targets = {end for s in policy.targets for end in ends[s]}
        for about in {about for service in policy.services for about in abouts[service]}:
            for source in sources:
                for target in targets:
                    key = (source, target, about)
                    if key not in rows or rank > rows[key][0]:
                        rows[key] = (rank, policy.id)

    combos = 0
    for source, target, about in rows:
        combos |= 1 << combo(source, target, about)
    peers = {port: peer_classes[members] for port, members in peer_sets.items() if members}
    cidrs = {prefix: cidr_classes[members] for prefix, members in cidr_sets.items()}
    service_rows = {
        (protocol, first, length): service_classes[members]
        for protocol, intervals in service_sets.items()
        for low, high, members in intervals
        for first, length in port_prefixes(low, high)
    }
    # Who is in a class must be hashed too: peer rows are written under the version, one by one.
    content = repr(
        (
            sorted(rows.items()),
            sorted(cidrs.items()),
            sorted(service_rows.items()),
            sorted((n, _text(members)) for members, n in peer_classes.items()),
        )
    )
    version = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=4).digest(), "big") | 1
    return RuleSet(version, combos, peers, cidrs, service_rows, rows)


def combo(source: int, target: int, service: int) -> int:
    """Which of the 27 combinations of kinds this is: see `tables.py`."""
    return (source >> 30) * 9 + (target >> 30) * 3 + (service >> 30)


def identities_of(port: Port) -> set[Selector]:
    """Every selector by identity that matches this port (rule 40)."""
    matching = {Selector("inside"), Selector("segment", port.segment), Selector("port", port.id)}
    matching |= {Selector("group", group) for group in port.groups}
    if port.hosts:
        matching.add(Selector("hosts"))
    return matching


def _ranged(service: Service) -> bool:
    return service.protocol in (6, 17) and (service.low, service.high) != (0, 65535)


def _text(members: frozenset[object]) -> list[str]:
    return sorted(map(repr, members))


def _numbered(sets: Iterable[frozenset[object]]) -> dict[frozenset[object], int]:
    """Each distinct set that is not empty, with a number from 1 in an order that only its content decides."""
    distinct = sorted({members for members in sets if members}, key=_text)
    return {members: number for number, members in enumerate(distinct, start=1)}


def _cidr_sets(prefixes: set[Prefix]) -> dict[tuple[int, int], frozenset[object]]:
    """For each prefix, all that contain it. The longest match then knows every prefix an address is in.

    Sorted by first address, then shortest first, those that contain a prefix are a stack.
    """
    pieces: dict[tuple[int, int], set[Prefix]] = {}
    for prefix in prefixes:
        for piece in mapped(prefix):
            pieces.setdefault(piece, set()).add(prefix)
    result: dict[tuple[int, int], frozenset[object]] = {}
    stack: list[tuple[int, int]] = []
    for first, length in sorted(pieces):
        while stack and stack[-1][0] >> (128 - stack[-1][1]) != first >> (128 - stack[-1][1]):
            stack.pop()
        around = result[stack[-1]] if stack else frozenset()
        stack.append((first, length))
        result[first, length] = around | pieces[first, length]
    return result


def _intervals(services: list[Service]) -> list[tuple[int, int, frozenset[object]]]:
    """Cut overlapping port ranges into (low, high, the services that cover it); uncovered ones are left out."""
    cuts = sorted({edge for s in services for edge in (s.low, s.high + 1)})
    result: list[tuple[int, int, frozenset[object]]] = []
    for low, after in pairwise(cuts):
        covering = frozenset(s for s in services if s.low <= low and after - 1 <= s.high)
        if covering:
            result.append((low, after - 1, covering))
    return result


def port_prefixes(low: int, high: int) -> list[tuple[int, int]]:
    """The fewest (first port, length in 16 bits) that cover low to high, inclusive."""
    result = []
    while low <= high:
        size = (low & -low) or 65536
        while low + size - 1 > high:
            size >>= 1
        result.append((low, 17 - size.bit_length()))
        low += size
    return result
