"""What a packet means in a network: the definition that all else is held to.

    deliver     a workload sends a frame: who receives what, and what is dropped for which reason
    guard       is the frame the port's own?
    relay       from the agent in a port's workload to the controller
    judge       do the policies of a network allow it?
    switch      to a MAC in the segment; through routers to another one; to all
    route, way  to which segment, and through which routers
    track       connections: an answer may pass because the opener may
    carry       from host to host, through the network that carries this one, down to the wire
    cross       the same from agent to agent, where it is encapsulated: by what carries it, domain by domain
    pay         rates: what a packet costs on its way, from the buckets of ports and links

Written to be read, next to docs/datapath.md, which has the same checks in the same order. Time and
memory are arguments. There are no VNIs or tables here: those are how a network is made, not what it
means; and no machines, but for the hosts of networks that the wire carries, and as whose buckets are
whose. Both ends of a wire judge by the same rows, so here each packet is judged once. Nor does it matter to
what arrives how a network is carried, flat or encapsulated; only who pays, and when, goes by domains.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from typing import NamedTuple

from nestnet.model import bootstrap, icmp, rates
from nestnet.model import packet as pk
from nestnet.model.clock import nanoseconds, seconds
from nestnet.model.connections import FRAGMENT_SECONDS, lifetime
from nestnet.model.domains import agent, is_up
from nestnet.model.hash import flow_hash
from nestnet.model.packet import FlowTuple, Packet
from nestnet.model.rates import INQUIRY_BURST, INQUIRY_COST, RELAY_COST, spend
from nestnet.model.values import (
    CARRIAGE_PORT,
    CONNECTION_SHARE,
    FABRIC,
    MAX_DEPTH,
    MAX_HOPS,
    OVERHEAD,
    RELAY,
    Link,
    Network,
    Port,
    Router,
    Selector,
    Service,
    World,
    kind_of,
    link_local,
)

Owner = Port | Router | None

_NEVER_ROUTED = tuple(ip_network(prefix) for prefix in ("fe80::/10", "169.254.0.0/16", "::/128", "0.0.0.0/32"))


@dataclass(frozen=True, slots=True)
class Connection:
    """`last`: when its last packet passed, in seconds. `closing`: a FIN or RST did."""

    last: float
    closing: bool = False


@dataclass(frozen=True, slots=True)
class FirstFragment:
    """What later fragments need of the first."""

    flow: FlowTuple
    icmp_type: int
    seen: float


class Bucket(NamedTuple):
    """Whose rate it is: `kind` is port or link. What the port sends (`forth`) or is sent, what goes over the link from
    the first of its routers (`forth`) or back; on which machine of its domain."""

    kind: str
    id: int
    forth: bool
    machine: int


@dataclass(frozen=True)
class State:
    """What is remembered of the packets that passed.

    connections   by opener, the other port, and the tuple of its first packet
    fragments     by sender, source, destination, protocol and identification
    told          by port, the bucket of what routers tell it
    asked         by port: the bucket of what it asks of its machine: inquiries, and the relay
    buckets       the moment from which each is not empty, in ns
    """

    connections: Mapping[tuple[int, int, FlowTuple], Connection] = field(default_factory=dict)
    fragments: Mapping[tuple[int, bytes, bytes, int, int], FirstFragment] = field(default_factory=dict)
    told: Mapping[int, int] = field(default_factory=dict)
    asked: Mapping[int, int] = field(default_factory=dict)
    buckets: Mapping[Bucket, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """Who receives what, answers to the sender included; what was dropped, at which port (0: no such
    port) and why: of a frame for all, each copy by itself, at its receiver; what is remembered now. `relayed`: it
    went to the relay of the sender's port, and to nobody else."""

    deliveries: tuple[tuple[int, bytes], ...]
    drops: tuple[tuple[int, str], ...]
    state: State
    relayed: bool = False


class _Dropped(Exception):
    """The packet ends here: at a router that may tell its sender so, `passed` others having taken one from its TTL, or,
    without one, in silence. `mtu`: what it would have to fit."""

    def __init__(self, reason: str, at: Router | None = None, passed: int = 0, mtu: int = 0) -> None:
        self.reason, self.at, self.passed, self.mtu = reason, at, passed, mtu


class _Lost(_Dropped):
    """It ends on its way, when something has been paid: a rate refuses it, or a domain below. `state`: what is
    remembered, with what was paid before; `port`: at whom it ends."""

    def __init__(self, reason: str, state: State, port: int | None) -> None:
        super().__init__(reason)
        self.state, self.port = state, port


class _Answered(Exception):
    """The network itself answers the sender with this frame."""

    def __init__(self, frame: bytes) -> None:
        self.frame = frame


def _refuse(condition: bool, reason: str, at: Router | None = None, passed: int = 0) -> None:
    if condition:
        raise _Dropped(reason, at, passed)


def deliver(
    world: World, state: State, port_id: int, frame: bytes, now: float, share: int = CONNECTION_SHARE
) -> Outcome:
    """A workload sends `frame` from its port, at `now` in seconds. `share` is how many connections a port may
    have open as their opener. On a trunk the frame may be that of another port, by its tag; a frame that is delivered
    to such a port has its tag put on again."""
    state = _limited(world, state)
    trunk = world.ports.get(port_id)
    if trunk is None:
        return Outcome((), ((0, "not_attached"),), state)
    port, frame, tags, flaw = take_off(world, trunk, frame)
    outcome = _deliver(world, state, port, pk.parse(frame, tags), flaw, now, share)
    arrived = ((id, pk.tagged(frame, put_on(world.ports[id]) + tags)) for id, frame in outcome.deliveries)
    return replace(outcome, deliveries=tuple(arrived))


def take_off(world: World, trunk: Port, frame: bytes) -> tuple[Port, bytes, bytes, str]:
    """Whose frame this is, of those who share an attachment; the frame without tags; those that ride along, in a
    transparent segment; and what is wrong with its tags, or nothing."""
    outermost, rest = pk.untagged(frame, 1)
    if not outermost:
        return trunk, frame, b"", ""
    for port in world.vlans_of(trunk.id):
        # The priority, and whether it may be dropped first, are the sender's own affair.
        if outermost[:2] == pk.tag(0)[:2] and int.from_bytes(outermost[2:], "big") & 0xFFF == port.tag:
            return port, rest, b"", "too_many_tags" if pk.parse(rest).link_flaw == "tagged" else ""
    if world.segments[trunk.segment].transparent:
        tags, rest = pk.untagged(frame, pk.RIDING)
        return trunk, rest, tags, ""
    return trunk, frame, b"", "unknown_vlan" if world.vlans_of(trunk.id) else "tagged"


def put_on(port: Port) -> bytes:
    """The tag of what is given to a port on its trunk."""
    return pk.tag(port.tag) if port.trunk else b""


def _deliver(world: World, state: State, port: Port, packet: Packet, flaw: str, now: float, share: int) -> Outcome:
    network = world.networks[port.network]
    frame = packet.frame
    guarded = False
    try:
        closed = "" if network.enabled else "network_disabled"
        closed = closed if world.is_on(port) else "port_disabled"
        # An agent hears from the controller all the same: else who would tell it what is closed, and open again?
        seeks = port.agent and not flaw and not packet.tags and packet.seeks_relay and packet.source_mac == port.mac
        _refuse(closed != "" and not seeks, closed)
        _refuse(flaw != "", flaw)
        guard(world, port, packet)
        guarded = True
        if packet.is_inquiry and not packet.tags:
            _refuse(packet.fragment != pk.WHOLE or packet.size > pk.INQUIRY_BYTES, "malformed")
            state = _ask(state, port, INQUIRY_COST, now)
            _answer_inquiry(world, port, packet)
        if port.agent and packet.is_for_relay and not packet.tags:
            return Outcome((), (), _ask(state, port, RELAY_COST, now), relayed=True)
        packet = _whole(state, port, packet, now)
        if packet.is_group:
            return flood(world, state, port, packet, now)
        target, routers = switch(world, port, packet)
        _refuse(not world.is_on(target), "port_disabled")
        after = track(world, state, port, target, packet, now, share)
        # The first router looks at the TTL, then at the size; those behind it at the TTL alone: one MTU is everywhere.
        _expire(routers[:1], packet)
        gateways = routers or world.routers_of(port.segment)
        mtu = world.mtu_of(port.segment, target.segment)
        if packet.length > mtu:
            raise _Dropped("too_big", next(iter(gateways), None), mtu=mtu)
        _expire(routers, packet)
        if routers:
            frame = pk.routed(packet, target.mac, routers[-1].mac, len(routers))
        carry(world, network, port.host, target.host)
        leaving, arriving = tolls(world, port, target, packet, routers)
        paid = pay(state, leaving, now)
        paid = cross(world, paid, below(world, network, port.host, target.host), packet, packet.weight, now)
        # What came to the machine has been seen, even if it does not arrive: the receiver's rates come after all else.
        after = replace(_remember(after, port, packet, now), buckets=paid.buckets)
        return Outcome(((target.id, frame),), (), pay(after, arriving, now, target.id))
    except _Lost as dropped:
        return Outcome((), ((dropped.port or port.id, dropped.reason),), dropped.state)
    except _Dropped as dropped:
        drops = ((port.id, dropped.reason),)
        if dropped.at is None or packet.tags or not icmp.may_be_told(packet, dropped.reason):
            return Outcome((), drops, state)
        until = rates.spend(state.told.get(port.id, 0), icmp.COST_NS, icmp.BURST_NS, nanoseconds(now))
        if until is None:
            return Outcome((), drops, state)
        answer = complain(world, port, packet, dropped)
        return Outcome(((port.id, answer),), drops, replace(state, told={**state.told, port.id: until}))
    except _Answered as answered:
        after = _remember(state, port, packet, now) if guarded else state
        return Outcome(((port.id, answered.frame),), (), after)


def _expire(routers: Sequence[Router], packet: Packet) -> None:
    """Each router takes one from the TTL, and the one that would leave nothing ends the packet."""
    if routers and packet.ttl <= len(routers):
        passed = max(packet.ttl - 1, 0)
        raise _Dropped("ttl_expired", routers[passed], passed)


def complain(world: World, port: Port, packet: Packet, dropped: _Dropped) -> bytes:
    """What a router tells the port about a packet that ended there. It speaks from its address in the port's segment,
    else from the first it has; one without any from 192.0.0.8 (RFC 7600), or from its link-local address. What was
    sent to a router's address is answered from there."""
    assert dropped.at is not None
    interfaces = sorted(dropped.at.interfaces, key=lambda interface: interface.segment != port.segment)
    own = [a for interface in interfaces for a in interface.addresses if a.version == packet.family]
    nameless = icmp.DUMMY if packet.family == 4 else link_local(dropped.at.mac)
    source = packet.flow.target if dropped.reason == "router_local" else pk.mapped([*own, nameless][0])
    # It comes from where the packet went: the first router, or, from within the segment, the one that speaks.
    routers = {router.mac for router in world.routers_of(port.segment)}
    mac = packet.target_mac if packet.target_mac in routers else dropped.at.mac
    return icmp.icmp_error(packet, dropped.reason, source, mac, dropped.passed, dropped.mtu)


# ---- who has an address, and where it lies


def owner(world: World, segment: int, address: bytes) -> Owner:
    """Who has this address (16 bytes) in a segment: the longest match. A port has its addresses, the prefixes
    it owns, and the link-local address of its MAC; a router its gateway addresses and its link-local one."""
    found: Owner = None
    longest = -1
    for port in world.ports_of(segment):
        if address == pk.mapped(link_local(port.mac)) or any(address == pk.mapped(own) for own in port.addresses):
            return port
        for prefix in port.owns:
            length = pk.span(prefix)[2]
            if length > longest and pk.contains(prefix, address):
                found, longest = port, length
    for router in world.routers_of(segment):
        gateways = [a for interface in router.interfaces if interface.segment == segment for a in interface.addresses]
        if any(address == pk.mapped(own) for own in (link_local(router.mac), *gateways)):
            return router
    return found


def route(world: World, router: Router, address: bytes) -> int | None:
    """The segment that a router sends this address to: the longest match among the prefixes of its segments
    and of those of all routers it reaches, and the prefixes that their ports own."""
    found, longest = None, -1
    for joined in reached(world, router.id):
        for segment in (interface.segment for interface in world.routers[joined].interfaces):
            owned = (prefix for port in world.ports_of(segment) for prefix in port.owns)
            for prefix in (*world.segments[segment].cidrs, *owned):
                length = pk.span(prefix)[2]
                if length > longest and pk.contains(prefix, address):
                    found, longest = segment, length
    return found


def reached(world: World, router: int) -> set[int]:
    """A router and all others that chains of links which are up join it to."""
    found, ends = {router}, [router]
    while ends:
        for _, other in neighbours(world, ends.pop()):
            if other not in found:
                found.add(other)
                ends.append(other)
    return found


def neighbours(world: World, router: int) -> list[tuple[Link, int]]:
    """(link, router at the other end) of each link of a router that is up, as `links_of` has them."""
    return [
        (link, link.between[1] if link.between[0] == router else link.between[0])
        for link in world.links_of(router)
        if link.up
    ]


def distances(world: World, segment: int) -> dict[int, int]:
    """The least cost from each router that reaches a segment to any router that joins it. Nearest first (Dijkstra)."""
    found: dict[int, int] = {}
    queue = [(0, router.id) for router in world.routers_of(segment)]
    while queue:
        cost, router = heapq.heappop(queue)
        if router not in found:
            found[router] = cost
            for link, other in neighbours(world, router):
                heapq.heappush(queue, (cost + link.cost, other))
    return found


def next_hops(world: World, router: int, distance: Mapping[int, int]) -> list[tuple[Link, int]]:
    """The links that begin a path of least cost, and the router that each leads to, by its rising MAC; parallel ones
    by rate. None for a router that joins the segment."""
    return [
        (link, other) for link, other in neighbours(world, router) if link.cost + distance[other] == distance[router]
    ]


def way(world: World, router: Router, segment: int, packet: Packet) -> tuple[Router, ...]:
    """The routers that this packet passes on its way from a router to a segment that it reaches, both ends among
    them."""
    return router, *(world.routers[other] for _, other in hops(world, router.id, segment, pk.hashed(packet)))


def hops(world: World, router: int, segment: int, flow: FlowTuple) -> list[tuple[Link, int]]:
    """The links that a flow takes from a router to a segment that it reaches, and the router that each leads to.
    Where several paths cost the least, each router shares the flows among its links (rule 7)."""
    distance = distances(world, segment)
    taken: list[tuple[Link, int]] = []
    while choices := next_hops(world, router, distance):
        taken.append(choices[flow_hash(*flow, seed=world.routers[router].mac % 2**32) % len(choices)])
        router = taken[-1][1]
    return taken


def longest_way(world: World, router: Router, segment: int) -> int:
    """How many routers are on the longest of the ways that share the flows from a router to a segment."""
    distance = distances(world, segment)
    routers: dict[int, int] = {}
    for id in distance:  # Nearest first: whatever may come next is already there.
        routers[id] = 1 + max((routers[other] for _, other in next_hops(world, id, distance)), default=0)
    return routers[router.id]


# ---- the source guard


def guard(world: World, port: Port, packet: Packet) -> None:
    """Is the packet the port's own: MAC, IP, ARP, ND, also behind tags that ride along? Without these, ARP and ND end
    here, answered or not."""
    if packet.link_flaw:
        raise _Dropped(packet.link_flaw)
    _refuse(packet.source_mac != port.mac, "source_mac")
    if packet.flaw:
        raise _Dropped(packet.flaw)
    if packet.arp:
        _answer_arp(world, port, packet)
        return
    icmpv6 = packet.icmp_type if packet.family == 6 else -1
    # A later fragment has neither an ICMP type nor ports yet.
    _refuse(133 <= icmpv6 <= 137 and packet.fragment != pk.WHOLE, "nd_spoof")
    _refuse(icmpv6 in (134, 137), "router_advertisement")
    flow = packet.flow
    _refuse(flow.protocol == pk.UDP and flow.source_port == (67 if packet.family == 4 else 547), "dhcp_server")
    if owner(world, port.segment, flow.source) != port:
        _refuse(not _sourceless(packet), "source_address")
    if packet.is_discovery:
        _answer_discovery(world, port, packet)


def _sourceless(packet: Packet) -> bool:
    """May it come from an address that is not the port's, because it has none yet?"""
    source, target, source_port, target_port, protocol = packet.flow
    if source == pk.UNSPECIFIED4:
        bootp = (protocol, source_port, target_port) == (pk.UDP, 68, 67)
        return packet.family == 4 and bootp and target == pk.LIMITED_BROADCAST
    if source == pk.UNSPECIFIED6:
        # Multicast listeners, and who looks for routers.
        early = packet.icmp_type in (130, 131, 132, 143, pk.ROUTER_SOLICITATION) and target[0] == 0xFF
        return packet.family == 6 and (packet.icmp_type == pk.SOLICITATION or early)
    return False


def _answer_arp(world: World, port: Port, packet: Packet) -> None:
    arp = packet.arp
    assert arp is not None
    probe = arp.operation == 1 and arp.sender == pk.UNSPECIFIED4
    _refuse(arp.sender_mac != port.mac, "arp_spoof")
    _refuse(not probe and owner(world, port.segment, arp.sender) != port, "arp_spoof")
    if packet.tags:
        return
    _refuse(arp.operation == 2 or arp.target == arp.sender, "announcement")
    asked = owner(world, port.segment, arp.target)
    if asked is None:
        raise _Dropped("arp_unknown")
    _refuse(asked == port, "announcement")
    raise _Answered(pk.arp_reply(packet, asked.mac))


def _answer_discovery(world: World, port: Port, packet: Packet) -> None:
    asked = pk.discovery(packet)
    if asked is None:
        raise _Dropped("malformed")
    _refuse(asked.link_address not in (None, port.mac), "nd_spoof")
    target = owner(world, port.segment, asked.target)
    if packet.icmp_type == pk.ADVERTISEMENT or packet.flow.source == pk.UNSPECIFIED6:
        _refuse(target != port, "nd_spoof")
    if packet.tags:
        return
    _refuse(target == port, "announcement")
    if port.agent and asked.target == RELAY.packed:
        raise _Answered(pk.neighbour_advertisement(packet, pk.NOBODY_MAC, False))
    if target is None:
        raise _Dropped("nd_unknown")
    raise _Answered(pk.neighbour_advertisement(packet, target.mac, isinstance(target, Router)))


def _ask(state: State, port: Port, cost: int, now: float) -> State:
    """What a port asks of its machine is never forwarded, and so much is done for it as its bucket has."""
    at = nanoseconds(now)
    until = spend(state.asked.get(port.id, at - INQUIRY_BURST), cost, INQUIRY_BURST, at)
    if until is None:
        raise _Dropped("ask_limit")
    return replace(state, asked={**state.asked, port.id: until})


def _answer_inquiry(world: World, port: Port, packet: Packet) -> None:
    told = bootstrap.answer(bootstrap.settings(world, port), packet.frame)
    if told is None:
        raise _Dropped("unanswerable")
    raise _Answered(told)


def _whole(state: State, port: Port, packet: Packet, now: float) -> Packet:
    """A later fragment with what the first one said; anything else as it is."""
    if packet.fragment != pk.LATER:
        return packet
    first = state.fragments.get(_fragment_key(port, packet))
    if first is None or seconds(now) - seconds(first.seen) >= FRAGMENT_SECONDS:
        raise _Dropped("fragment_unknown")
    return pk.with_first(packet, first.flow, first.icmp_type)


def _fragment_key(port: Port, packet: Packet) -> tuple[int, bytes, bytes, int, int]:
    return port.id, packet.flow.source, packet.flow.target, packet.protocol, packet.identification


def _remember(state: State, port: Port, packet: Packet, now: float) -> State:
    """The first fragment of a packet, once it passed or was answered."""
    if packet.fragment != pk.FIRST:
        return state
    first = FirstFragment(packet.flow, packet.icmp_type, now)
    return replace(state, fragments={**state.fragments, _fragment_key(port, packet): first})


# ---- policy


def judge(
    world: World, network: int, source: Port | None, target: Port | None, flow: FlowTuple, to: bytes | None
) -> bool:
    """Do the network's policies allow this flow from a port (or nobody) to a port (or nobody)? `to` is the
    address it is for, None if it has none. No policies: all may talk. Otherwise the highest priority
    wins, then deny over allow, and what no policy matches is denied."""
    policies = world.policies_of(network)
    verdict = max(
        (
            (policy.priority, not policy.allow)
            for policy in policies
            if any(_selects(selector, source, flow.source) for selector in policy.sources)
            and any(_selects(selector, target, to) for selector in policy.targets)
            and any(_is_about(service, flow) for service in policy.services)
        ),
        default=(0, bool(policies)),
    )
    return not verdict[1]


def _selects(selector: Selector, port: Port | None, address: bytes | None) -> bool:
    if selector.kind == "any":
        return True
    if selector.kind == "cidr":
        return address is not None and selector.cidr is not None and pk.contains(selector.cidr, address)
    if port is None:
        return False
    return {
        "inside": True,
        "hosts": port.hosts,
        "group": selector.id in port.groups,
        "segment": selector.id == port.segment,
        "port": selector.id == port.id,
    }[selector.kind]


def _is_about(service: Service, flow: FlowTuple) -> bool:
    if service.protocol not in (-1, flow.protocol):
        return False
    return flow.protocol not in (pk.TCP, pk.UDP) or service.low <= flow.target_port <= service.high


# ---- switching and routing


def switch(world: World, port: Port, packet: Packet) -> tuple[Port, Sequence[Router]]:
    """The port that the packet is for, and the routers on the way there: none, if it is switched."""
    for other in world.ports_of(port.segment):
        if other.mac == packet.target_mac:
            _refuse(other == port, "hairpin")
            return other, ()
    for router in world.routers_of(port.segment):
        if router.mac == packet.target_mac:
            _refuse(packet.tags != b"", "tagged")
            return _through(world, port, router, packet)
    raise _Dropped("unknown_unicast")


def _through(world: World, port: Port, router: Router, packet: Packet) -> tuple[Port, Sequence[Router]]:
    """The port behind a router, and the way there. Policy comes before routing: what is denied does not learn
    whether anybody is there. But pinging the own gateway is no policy matter (rule 41)."""
    address = packet.flow.target
    is_gateway = owner(world, port.segment, address) == router
    segment = port.segment if is_gateway else route(world, router, address)
    target = None if segment is None else owner(world, segment, address)
    if isinstance(target, Port):
        # Such a source means nothing in another segment, and no answer would find its way back.
        _refuse(any(pk.contains(prefix, packet.flow.source) for prefix in _NEVER_ROUTED), "source_address")
        assert segment is not None  # else nobody would own the address
        return target, way(world, router, segment, packet)
    if not (is_gateway and packet.is_echo_request):
        _refuse(not judge(world, port.network, port, None, packet.flow, address), "policy")
    if segment is None:
        raise _Dropped("no_route", router)
    routers = (router,) if is_gateway else way(world, router, segment, packet)
    before = len(routers) - 1
    if target is None:
        _expire(routers, packet)
        raise _Dropped("unreachable", routers[-1], before)
    # A router's own address is the end of the way: the router there takes nothing from the TTL.
    _expire(routers[:-1], packet)
    if packet.is_echo_request:
        raise _Answered(pk.echo_reply(packet, before))
    raise _Dropped("router_local", routers[-1], before)


def flood(world: World, state: State, port: Port, packet: Packet, now: float) -> Outcome:
    """To all other ports of the segment that the policies and the carriers allow. Never tracked. A policy's
    `to` matches the receiving port, not the address.

    The port pays once for the frame; then those of its own machine are served, by rising MAC, then one copy leaves for
    each other machine. A carrier is paid once for each host that the frame is for, one below the domain once for each
    copy. If it refuses one of a machine that is not this, that machine gets no copy."""
    network = world.networks[port.network]
    # Nobody complains about what was for all, or to all, so this is about nothing (RFC 1122, 3.2.2).
    _refuse(packet.is_icmp_error_kind, "icmp_unrelated")
    _refuse(packet.length > world.mtu_of(port.segment), "too_big")
    state = pay(state, [_toll_of(world, port, True, packet)], now)
    here = _machine_of(world, port)
    others = [other for other in world.ports_of(port.segment) if other != port]
    deliveries: list[tuple[int, bytes]] = []
    drops: list[tuple[int, str]] = []

    def charge(host: int, leaves: bool, arrives: bool) -> str:
        """Why the rates of the carriers do not let the frame go to this host; empty if they do."""
        nonlocal state
        try:
            leaving, arriving = _few(*tolls_of(world, levels(world, network, port.host, host), packet, packet.weight))
            state = pay(state, leaving * leaves + arriving * arrives, now)
        except _Dropped as dropped:
            state = _paid(dropped, state)
            return dropped.reason
        return ""

    def serve(ports: Iterable[Port], leaves: bool) -> None:
        nonlocal state
        refused: dict[int, str] = {}  # by host
        for other in ports:
            if _passed_by(world, other):
                continue
            address = other.address(packet.family)
            to = None if address is None else pk.mapped(address)
            try:
                _refuse(not world.is_on(other), "port_disabled")
                judged = not packet.is_about_neighbours
                _refuse(judged and not judge(world, port.network, port, other, packet.flow, to), "policy")
                carry(world, network, port.host, other.host)
                if other.host not in refused:
                    refused[other.host] = charge(other.host, leaves, arrives=True)
                _refuse(refused[other.host] != "", refused[other.host])
                state = pay(state, [_toll_of(world, other, False, packet)], now)
                deliveries.append((other.id, packet.frame))
            except _Dropped as dropped:
                state = _paid(dropped, state)
                drops.append((other.id, dropped.reason))

    serve((other for other in others if _machine_of(world, other) == here), leaves=True)
    elsewhere = [other for other in others if _machine_of(world, other) != here]
    copies: dict[int, bool] = {}  # by machine: does it get one?
    hosts: dict[int, int] = {}  # one of each machine
    for host, machine in dict.fromkeys((other.host, _machine_of(world, other)) for other in elsewhere):
        if _is_carried(world, network, port.host, host) and copies.setdefault(machine, True):
            hosts[machine] = host
            reason = charge(host, leaves=True, arrives=False)
            if reason:
                copies[machine] = False
                drops.append((port.id, reason))
    for machine in [machine for machine, gets in copies.items() if gets]:
        try:
            rest = below(world, network, port.host, hosts[machine])
            state = cross(world, state, rest, packet, packet.weight, now)
        except _Dropped as dropped:
            state = _paid(dropped, state)
            copies[machine] = False
            drops.append((port.id, dropped.reason))
    served = dict.fromkeys(_machine_of(world, other) for other in elsewhere)
    for machine in [machine for machine in served if copies.get(machine, True)]:
        serve((other for other in elsewhere if _machine_of(world, other) == machine), leaves=False)
    return Outcome(tuple(deliveries), tuple(drops), state)


# ---- connections


def track(world: World, state: State, port: Port, target: Port, packet: Packet, now: float, share: int) -> State:
    """What is remembered if this packet passes; it is dropped unless the flow it belongs to is allowed, in the
    direction in which it was opened. "Established" alone never allows (rule 19)."""

    def allowed(source: Port, to: Port, flow: FlowTuple) -> bool:
        return judge(world, port.network, source, to, flow, flow.target)

    def connection(source: Port, to: Port, flow: FlowTuple) -> Connection | None:
        found = state.connections.get((source.id, to.id, flow))
        return found if found and _is_alive(found, flow, now) else None

    flow = packet.flow
    if packet.is_about_neighbours:
        return state
    if packet.is_icmp_error:
        about = pk.quoted(packet)
        related = about is not None and (
            (connection(target, port, about) is not None and allowed(target, port, about))
            or (connection(port, target, about.reversed) is not None and allowed(port, target, about.reversed))
        )
        _refuse(not related, "icmp_unrelated")
        return state
    if packet.is_carriage or (packet.is_icmp and not packet.is_echo):
        _refuse(not allowed(port, target, flow), "policy")
        return state

    opener, other, opened = port, target, flow
    known = connection(port, target, flow)
    if known is None and not packet.is_opening and allowed(target, port, flow.reversed):
        known = connection(target, port, flow.reversed)
        if known is not None:
            opener, other, opened = target, port, flow.reversed
    key = (opener.id, other.id, opened)
    _refuse(not allowed(opener, other, opened), "policy")
    if known is None:
        opened_by_port = [k for k, c in state.connections.items() if k[0] == port.id and _is_alive(c, k[2], now)]
        _refuse(len(opened_by_port) >= share, "connection_share")
    reopened = opener == port and packet.is_opening
    closing = packet.is_closing or (known is not None and known.closing and not reopened)
    return replace(state, connections={**state.connections, key: Connection(now, closing)})


def _is_alive(connection: Connection, flow: FlowTuple, now: float) -> bool:
    return seconds(now) - seconds(connection.last) < lifetime(flow.protocol, connection.closing)


# ---- what carries it


def carry(world: World, network: Network, a: int, b: int) -> None:
    """From host a to host b of what carries `network`, down to the machines of its domain: over the wire, or what is
    one for them; otherwise as a UDP datagram from port a to port b of the carrier, which may refuse it as it may any
    other, and which is carried in turn. If they are the same it is there, and nobody is asked; but what is taken down
    closes all that hangs above (rule 12)."""
    for _ in range(MAX_DEPTH):
        if network.carrier == FABRIC:
            _refuse(not all(world.machines[host].enabled for host in (a, b)), "carrier_down")
            return
        carrier, source, target = world.networks[network.carrier], world.ports[a], world.ports[b]
        if network.encapsulated:
            _refuse(not all(is_up(world, port) for port in (source, target)), "carrier_down")
            return
        _refuse(not (carrier.enabled and source.enabled and target.enabled), "carrier_down")
        if a != b:
            _carry_in(world, network.underlay, source, target)
        network, a, b = carrier, source.host, target.host
    raise _Dropped("carrier_depth")


class Level(NamedTuple):
    """`network` is carried from host `a` to host `b` of its carrier."""

    network: Network
    a: int
    b: int


def levels(world: World, network: Network, a: int, b: int) -> list[Level]:
    """Who is asked on the way from host a to host b in the domain of `network`: each level that is carried flat, as
    long as the hosts are not the same."""
    found: list[Level] = []
    while a != b and network.carrier != FABRIC and not network.encapsulated:
        found.append(Level(network, a, b))
        network, a, b = world.networks[network.carrier], world.ports[a].host, world.ports[b].host
    return found


def below(world: World, network: Network, a: int, b: int) -> Level:
    """What is left to do then: nothing, if the hosts are the same or the network is the fabric's; else it is
    encapsulated."""
    for level in levels(world, network, a, b):
        network, a, b = world.networks[level.network.carrier], world.ports[level.a].host, world.ports[level.b].host
    return Level(network, a, b)


def cross(world: World, state: State, level: Level, packet: Packet, size: int, now: float) -> State:
    """From agent to agent of a domain, what the `size` bytes of one of its ports have become: a frame from the workload
    of host port a of the carrier to that of host port b, in the carrier's own domain, and so on down to the wire.
    `packet` is what the very first sent. What arrives has been paid for at every level; nothing of it is remembered."""
    network, a, b = level
    if network.carrier == FABRIC or a == b:
        return state
    carrier, source, target = world.networks[network.carrier], world.ports[a], world.ports[b]
    size += OVERHEAD[network.underlay]
    try:
        _carry_in(world, network.underlay, source, target)
        carry(world, carrier, source.host, target.host)
        way_down = [level, *levels(world, carrier, source.host, target.host)]
        leaving, arriving = _few(*tolls_of(world, way_down, packet, size - OVERHEAD[network.underlay]))
        state = pay(state, leaving, now)
        state = cross(world, state, below(world, carrier, source.host, target.host), packet, size, now)
    except _Dropped as dropped:
        raise _Lost(dropped.reason, _paid(dropped, state), None) from dropped
    return pay(state, arriving, now)


def _carry_in(world: World, family: int, source: Port, target: Port) -> None:
    """One datagram between two hosts of one carrier. Never tracked, never judged for size."""
    here, there = source.address(family), target.address(family)
    if here is None or there is None:  # Refused where networks are made; here it must not pass.
        raise _Dropped("carrier_no_route")
    # No policy can match a source port, so that of the datagram does not matter.
    datagram = FlowTuple(pk.mapped(here), pk.mapped(there), 0, CARRIAGE_PORT, pk.UDP)
    _refuse(not judge(world, source.network, source, target, datagram, datagram.target), "carrier_policy")
    if source.segment != target.segment:
        routers = world.routers_of(source.segment)
        segment = route(world, routers[0], datagram.target) if routers else None
        if segment is None or owner(world, segment, datagram.target) != target:
            raise _Dropped("carrier_no_route")
        # Which of the ways it takes depends on what it carries: the longest must do.
        _refuse(longest_way(world, routers[0], segment) > MAX_HOPS, "carrier_ttl")


def refusal(world: World, family: int, source: Port, target: Port) -> str:
    """Why their network would not carry from one host port of its to another, both enabled; '' if it would."""
    try:
        _carry_in(world, family, source, target)
    except _Dropped as dropped:
        return dropped.reason
    return ""


def _is_carried(world: World, network: Network, a: int, b: int) -> bool:
    try:
        carry(world, network, a, b)
    except _Dropped:
        return False
    return True


def _passed_by(world: World, port: Port) -> bool:
    """While it, or a host that it lives on, leaves one machine for another, frames for all pass it by (rule 15). Agents
    on a host that moves do not move."""
    while not port.leaving and (network := world.networks[port.network]).carrier != FABRIC and not network.encapsulated:
        port = world.ports[port.host]
    return port.leaving


def _machine_of(world: World, port: Port) -> int:
    """The machine of its domain where a port lives in the end."""
    return agent(world, port).machine


# ---- rates


class Toll(NamedTuple):
    """So many bytes, from a bucket of this rate. `reason`: why the packet is dropped if it is empty."""

    bucket: Bucket
    rate: int
    size: int
    reason: str


def tolls(
    world: World, port: Port, target: Port, packet: Packet, routers: Sequence[Router]
) -> tuple[list[Toll], list[Toll]]:
    """What a packet pays in its domain. To leave: the port and the links on its way, then level by level the host port
    and the links on the way of what carries it. To arrive: the same levels backwards, the port last. Each level is
    charged what it sees."""
    way_down = levels(world, world.networks[port.network], port.host, target.host)
    leaving, arriving = tolls_of(world, way_down, packet, packet.weight)
    leaving.insert(0, _toll_of(world, port, True, packet))
    arriving.append(_toll_of(world, target, False, packet))
    if routers:
        here = _machine_of(world, port)
        taken = hops(world, routers[0].id, target.segment, pk.hashed(packet))
        leaving[1:1] = [_toll_over(*hop, here, packet.weight, "rate") for hop in taken]
    return _few(leaving, arriving)


def tolls_of(world: World, way_down: list[Level], packet: Packet, size: int) -> tuple[list[Toll], list[Toll]]:
    """What carriers take for the way of so many bytes, all in one domain: `carry` allows it."""
    leaving: list[Toll] = []
    arriving: list[Toll] = []
    for network, a, b in way_down:
        source, target = world.ports[a], world.ports[b]
        here, there = _machine_of(world, source), _machine_of(world, target)
        size += OVERHEAD[network.underlay]
        leaving.append(Toll(Bucket("port", a, True, here), source.rate, size, "carrier_rate"))
        arriving.insert(0, Toll(Bucket("port", b, False, there), target.rate, size, "carrier_rate"))
        if source.segment != target.segment:
            ends = _host_address(source, network.underlay), _host_address(target, network.underlay)
            flow = FlowTuple(*ends, pk.carriage_source_port(packet), CARRIAGE_PORT, pk.UDP)
            router = world.routers_of(source.segment)[0].id
            taken = hops(world, router, target.segment, flow)
            leaving += [_toll_over(*hop, here, size, "carrier_rate") for hop in taken]
    return leaving, arriving


def _few(leaving: list[Toll], arriving: list[Toll]) -> tuple[list[Toll], list[Toll]]:
    """Those that have a rate: one domain knows so many for a packet and no more."""
    leaving, arriving = ([toll for toll in tolls if toll.rate] for tolls in (leaving, arriving))
    _refuse(len(leaving) + len(arriving) > rates.PATH_BUCKETS, "cannot_flatten")
    return leaving, arriving


def _host_address(port: Port, family: int) -> bytes:
    address = port.address(family)
    assert address is not None  # or `carry` refuses
    return pk.mapped(address)


def _toll_of(world: World, port: Port, forth: bool, packet: Packet) -> Toll:
    """What a port pays for a packet that it sends (`forth`) or is sent."""
    return Toll(Bucket("port", port.id, forth, _machine_of(world, port)), port.rate, packet.weight, "rate")


def _toll_over(link: Link, router: int, machine: int, size: int, reason: str) -> Toll:
    """What a machine pays for a packet over a link to this router."""
    return Toll(Bucket("link", link.id, router == link.between[1], machine), link.rate, size, reason)


def pay(state: State, tolls: Iterable[Toll], now: float, port: int | None = None) -> State:
    """What is left in the buckets. The first that is empty drops the packet; what was paid before stays paid."""
    buckets, moment = dict(state.buckets), nanoseconds(now)
    for toll in tolls:
        if toll.rate:
            price, burst = rates.cost(toll.size, toll.rate), rates.fill(toll.rate)
            until = rates.spend(buckets.get(toll.bucket, 0), price, burst, moment)
            if until is None:
                raise _Lost(toll.reason, replace(state, buckets=buckets), port)
            buckets[toll.bucket] = until
    return replace(state, buckets=buckets)


def _paid(dropped: _Dropped, before: State) -> State:
    return dropped.state if isinstance(dropped, _Lost) else before


def _limited(world: World, state: State) -> State:
    """A bucket is there as long as its port or link has a rate."""
    rated = {(kind_of(value), value.id) for value in world if isinstance(value, Port | Link) and value.rate}
    return replace(state, buckets={key: until for key, until in state.buckets.items() if key[:2] in rated})
