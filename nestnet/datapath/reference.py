"""The compiled tables, run in Python: one `Reference` does for a machine what its BPF programs do.

It is there to be read, and to be held equal to its two siblings by tests: to `model/meaning.py` through
the compiler, and to `bpf/` over the same tables and frames. The functions have the names of
`docs/datapath.md` and of the C, in the order of a packet. It is not a production datapath: it keeps no
flow cache, never sweeps, and takes milliseconds where the kernel takes a microsecond.

    workload -> from_workload -> guard -> arp, neighbour, inquiry
                              -> fragment -> flood    -> judge, carry -> to_workload, to_machine
                                          -> unicast  -> route, connection, judge, carry -> the same
    nic -> untag -> underlay
    underlay -> from_wire     -> arrive -> sender -> guard -> fragment -> connection, judge, carry -> to_workload
    trunk                     -> arrive, the same

Policy is judged again for every packet of a connection. The kernel remembers the verdict and the
generation counters it was made from, which comes to the same.

What one machine does with a frame, in a shell:

    >>> Reference(tables).workload(ifindex=7, frame=frame, now=0.0)
    Outputs(emitted=[ToMachine(machine=2, datagram=b'E...')], drops=[])
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_network
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from nestnet.compile.tables import (
    AGENT,
    CIDR,
    CLASS,
    DENY,
    ENABLED,
    HOSTS,
    IDENTITY,
    LOCAL,
    MACHINE,
    ON_VLAN,
    OWNER_PORT,
    OWNER_ROUTER,
    PROTOCOL,
    TABLES,
    TRANSPARENT,
    TRUNK,
    Rows,
    Tables,
)
from nestnet.model.clock import nanoseconds, seconds
from nestnet.model.connections import FRAGMENT_SECONDS, lifetime
from nestnet.model.domains import Agent
from nestnet.model.hash import flow_hash
from nestnet.model.icmp import BURST_NS, COST_NS, icmp_error, may_be_told
from nestnet.model.packet import (
    ARP,
    CONTROL_BLOCK,
    ETHERNET,
    FIRST,
    INQUIRY_BYTES,
    IPV4,
    IPV6,
    LATER,
    LIMITED_BROADCAST,
    NOBODY_MAC,
    RIDING,
    SOLICITATION,
    TAGS,
    UDP,
    UNSPECIFIED4,
    UNSPECIFIED6,
    WHOLE,
    Discovery,
    FlowTuple,
    Packet,
    arp_reply,
    carriage_source_port,
    contains,
    decapsulate,
    discovery,
    echo_reply,
    encapsulate,
    hashed,
    is_mapped,
    made_whole,
    neighbour_advertisement,
    parse,
    quoted,
    routed,
    tag,
    tagged,
    untagged,
    with_ethernet,
    with_first,
    with_outer_ecn,
)
from nestnet.model.rates import INQUIRY_BURST, INQUIRY_COST, PATH_BUCKETS, RELAY_COST, cost, spend
from nestnet.model.values import CARRIAGE_PORT, FABRIC, MAX_DEPTH, MAX_HOPS, OVERHEAD, RELAY, RIDING_BYTES

Row = SimpleNamespace
"""The value of one row, its fields by name: MACs and addresses as bytes, all else as int."""

ROUTER_DISCOVERY = range(133, 138)  # ICMPv6: RS, RA, NS, NA, redirect
ADVERTISEMENTS = (134, 137)  # RA, redirect
SOURCELESS = (130, 131, 132, 133, 143)  # MLD (RFC 2710, RFC 3810), RS: may come from ::
DHCP_SERVER = {4: 67, 6: 547}
NEVER_ROUTED = [ip_network(prefix) for prefix in ("fe80::/10", "169.254.0.0/16", "::/128", "0.0.0.0/32")]
NO_ADDRESS = bytes(16)  # port.address4 and address6 where there is none
MAX_TTL = 255


class ToWorkload(NamedTuple):
    """A frame for the workload of a port of this machine; `port` is its slot."""

    ifindex: int
    port: int
    frame: bytes


class ToAgent(NamedTuple):
    """What a port of this machine asks the network; `port` is its slot. The agent answers from the port's record."""

    ifindex: int
    port: int
    frame: bytes


class ToRelay(NamedTuple):
    """What the agent in the workload of a port sends to the relay: for the machine's own stack. `port` is its slot."""

    ifindex: int
    port: int
    frame: bytes


class ToMachine(NamedTuple):
    """A datagram for another machine, from its outer IP header on; `machine` is its slot."""

    machine: int
    datagram: bytes


class ToVlan(NamedTuple):
    """A frame with its tag for a VLAN of a physical network, by this NIC; `machine` is the slot of the one that it is
    for, 0: all."""

    ifindex: int
    machine: int
    frame: bytes


@dataclass(frozen=True)
class Outputs:
    """What became of a frame. `drops` are (slot of a port or 0, reason)."""

    emitted: list[ToWorkload | ToMachine | ToVlan | ToAgent | ToRelay] = field(default_factory=list)
    drops: list[tuple[int, str]] = field(default_factory=list)


class Drop(Exception):
    """The packet ends here, counted under a reason, and under `port` if that is already known. `router`, if any, may
    tell the sender so, behind `passed` others; `mtu`: what it would have to fit."""

    def __init__(self, reason: str, port: int | None = None, router: int = 0, passed: int = 0, mtu: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.port = port
        self.router = router
        self.passed = passed
        self.mtu = mtu


IN_VLAN = 0x8100  # the EtherType of 802.1Q
RARP = b"\x80\x35"  # and of RFC 903
TAG_ID, TAG_PRIORITY = 0x0FFF, 0xF000  # of what follows the EtherType of a tag: priority and DEI, id
IP_TYPES = (IPV4.to_bytes(2, "big"), IPV6.to_bytes(2, "big"))


def outermost_tag(frame: bytes) -> tuple[int, bytes]:
    """EtherType << 16 | priority and id of the first tag of a frame, 0 if it has none, and the frame without it."""
    if int.from_bytes(frame[12:14], "big") not in TAGS:
        return 0, frame
    return int.from_bytes(frame[12:16], "big"), frame[:12] + frame[16:]


class Owner(NamedTuple):
    """Who has an address or a MAC: a port, a router, or nobody (kind 0)."""

    kind: int
    slot: int


NOBODY = Owner(0, 0)


Way = tuple[int, ...]
"""Slots of the routers on a way, both ends among them."""


class Toll(NamedTuple):
    """A packet pays for its bytes and those `above` it, from a bucket."""

    bucket: int
    above: int


class Key(NamedTuple):
    """What a connection is known by: the ports at its ends and the tuple of its first packet."""

    opener: int
    answerer: int
    flow: FlowTuple


class Connection(NamedTuple):
    """`closing`: a FIN or RST was seen. `expires`: the first second in which it is no longer there."""

    closing: bool
    expires: int


class Tracked(NamedTuple):
    """A connection as it is once a packet has passed."""

    key: Key
    connection: Connection


class First(NamedTuple):
    """What later fragments take from the first one."""

    flow: FlowTuple
    icmp_type: int
    expires: int


class Reference:
    """The datapath of one machine: its tables, the connections it tracks and the fragments it remembers.

    Times are seconds of any clock that never goes back.
    """

    def __init__(self, tables: Tables) -> None:
        self.connections: dict[Key, Connection] = {}
        self.fragments: dict[tuple[int, bytes, bytes, int, int], First] = {}
        self.told: dict[int, int] = {}  # by port, the bucket of what routers tell it
        self.asked: dict[int, int] = {}  # buckets of inquiries, and of the relay, by port
        self.until: dict[int, int] = {}  # by slot of a bucket: the moment from which it is not empty
        self.load(tables)

    def load(self, tables: Tables) -> None:
        """New tables; connections, fragments and what is in buckets stay."""
        self.network = _Array(tables, "network")
        self.segment = _Array(tables, "segment")
        self.router = _Array(tables, "router")
        self.port = _Array(tables, "port")
        self.host = _Array(tables, "host")
        self.machine = _Array(tables, "machine")
        self.bucket = _Array(tables, "bucket")
        self.until = {slot: until for slot, until in self.until.items() if slot in self.bucket}
        self.attachments = _hash(tables, "attach")
        self.vnis = _hash(tables, "vni")
        self.vlans = _hash(tables, "vlan")
        self.members = _hash(tables, "member")
        self.macs = _hash(tables, "mac")
        self.floods = _hash(tables, "flood")
        self.locals = _hash(tables, "local")
        self.peers = _hash(tables, "peer")
        self.rules = _hash(tables, "rule")
        self.owners = _Prefixes(tables, "owner")
        self.routes = _Prefixes(tables, "route")
        self.hops = _hash(tables, "hop")
        self.faces = _hash(tables, "face")
        self.cidrs = _Prefixes(tables, "cidr")
        self.services = _Prefixes(tables, "service")
        self.here = _Array(tables, "self")[0].machine
        self.vlan = _Array(tables, "self")[0].vlan

    # ---- where frames come in

    def workload(self, ifindex: int, frame: bytes, now: float) -> Outputs:
        """A frame from the workload that hangs on this interface."""
        out = Outputs()
        p, frame, tags, flaw = self.take_off(ifindex, frame)
        try:
            self.from_workload(p, parse(frame, tags), flaw, now, out)
        except Drop as drop:
            out.drops.append((drop.port or p, drop.reason))
        return out

    def nic(self, frame: bytes, now: float) -> tuple[Outputs, bytes | None]:
        """A frame from the wire. Beside what comes of it, the frame as the machine's own stack gets it, if it does."""
        try:
            inside = self.untag(frame)
        except Drop as drop:
            return Outputs(drops=[(0, drop.reason)]), None
        if inside is None:
            return Outputs(), frame
        out = self.underlay(inside[ETHERNET:], now) if inside[12:14] in IP_TYPES else Outputs()
        return out, inside if not out.emitted and not out.drops else None

    def untag(self, frame: bytes) -> bytes | None:
        """The frame without the tag of the VLAN that the machine's NICs are in. None: it is for none of ours, but for
        what interface the machine has in another VLAN, or for the other end of the link."""
        tag, inside = outermost_tag(frame)
        if not self.vlan:
            return None if tag else frame
        if tag & ~TAG_PRIORITY == self.vlan:
            if outermost_tag(inside)[0]:
                raise Drop("other_vlan")
            return inside
        if tag & TAG_ID or int.from_bytes(frame[:6], "big") & ~0xF == CONTROL_BLOCK:
            return None
        raise Drop("other_vlan")

    def tag(self, frame: bytes) -> bytes:
        """A frame as it leaves by a NIC, be it ours or the machine's own."""
        is_for_link = int.from_bytes(frame[:6], "big") & ~0xF == CONTROL_BLOCK
        if not self.vlan or outermost_tag(frame)[0] or is_for_link:
            return frame
        return frame[:12] + int(self.vlan).to_bytes(4, "big") + frame[12:]

    def underlay(self, datagram: bytes, now: float) -> Outputs:
        """An IP packet from the underlay NIC. What is no VXLAN for this machine is left to its own stack:
        nothing comes out, and nothing is counted."""
        out = Outputs()
        outer = parse(_ethernet_before(datagram))
        if self.is_ours(outer):
            try:
                self.from_wire(outer, now, out)
            except Drop as drop:
                out.drops.append((drop.port or 0, drop.reason))
        return out

    def trunk(self, ifindex: int, frame: bytes, now: float) -> tuple[Outputs, bytes | None]:
        """A frame from a physical network. Beside what comes of it, the frame as the machine's own stack gets it, if it
        does: the NIC may have other VLANs, and frames without any tag."""
        tag, inside = outermost_tag(frame)
        out = Outputs()
        try:
            if tag >> 16 != IN_VLAN:
                return out, frame
            if not tag & TAG_ID:
                raise Drop("unknown_vlan")
            row = self.vlans.get((ifindex, tag & TAG_ID))
            if row is None:
                return out, frame
            if outermost_tag(inside)[0]:
                raise Drop("too_many_tags")
            if inside[12:14] != RARP:  # what machines tell switches
                self.arrive(row.segment, inside, None, None, now, out)
        except Drop as drop:
            out.drops.append((drop.port or 0, drop.reason))
        return out, None

    # ---- from a workload

    def take_off(self, ifindex: int, frame: bytes) -> tuple[int, bytes, bytes, str]:
        """Tags: whose frame it is, the frame without them, those that ride along, and what is wrong with them."""
        outermost, rest = untagged(frame, 1)
        kind, id = outermost[:2], int.from_bytes(outermost[2:], "big") & 0xFFF
        if id and kind == tag(id)[:2]:
            member = self.attachments.get((ifindex, id))
            if member is not None:
                return member.port, rest, b"", "too_many_tags" if parse(rest).link_flaw == "tagged" else ""
        attached = self.attachments.get((ifindex, 0))
        p = attached.port if attached else 0
        if not outermost:
            return p, frame, b"", ""
        if self.segment[self.port[p].segment].flags & TRANSPARENT:
            tags, rest = untagged(frame, RIDING)
            return p, rest, tags, ""
        return p, frame, b"", "unknown_vlan" if self.port[p].flags & TRUNK else "tagged"

    def from_workload(self, p: int, packet: Packet, flaw: str, now: float, out: Outputs) -> None:
        """Lines 1 to 8."""
        port = self.port[p]
        if not port.id:
            raise Drop("not_attached")
        closed = "" if self.network[port.network].flags & ENABLED else "network_disabled"
        if not port.flags & ENABLED:
            closed = "port_disabled"
        is_own = not flaw and not packet.tags and packet.source_mac == _number(port.mac)
        if closed and not (port.flags & AGENT and is_own and packet.seeks_relay):
            raise Drop(closed)
        if flaw:
            raise Drop(flaw)
        if packet.link_flaw:
            raise Drop(packet.link_flaw)
        if packet.source_mac != _number(port.mac):
            raise Drop("source_mac")
        if packet.flaw:
            raise Drop(packet.flaw)
        if packet.tags:
            self.guard_behind_tags(p, port, packet)
        elif packet.ether_type == ARP:
            self.arp(p, port, packet, out)
            return
        else:
            self.guard(p, packet)
            if packet.is_discovery:
                self.neighbour(p, port, packet, out)
                return
            if packet.is_inquiry:
                self.inquiry(p, port, packet, now, out)
                return
            if port.flags & AGENT and packet.is_for_relay:
                self.ask(p, RELAY_COST, now)
                out.emitted.append(ToRelay(port.ifindex, p, packet.frame))
                return
        packet = self.fragment(p, packet, now)
        if packet.is_group:
            self.flood(p, port, packet, now, out)
            return
        try:
            self.unicast(p, port, packet, now, out)
        except Drop as drop:
            self.complain(p, port, packet, drop, now, out)
            raise

    def guard_behind_tags(self, p: int, port: Row, packet: Packet) -> None:
        """Lines 3, 5 and 6 for what rides in a transparent segment: nothing of it is answered."""
        if packet.arp is not None:
            self.guard_arp(p, port, packet)
            return
        self.guard(p, packet)
        if packet.is_discovery:
            self.guard_neighbour(p, port, packet)

    def guard_arp(self, p: int, port: Row, packet: Packet) -> None:
        arp = packet.arp
        assert arp is not None  # else there was a flaw
        is_probe = arp.operation == 1 and arp.sender == UNSPECIFIED4
        if arp.sender_mac != _number(port.mac) or not (is_probe or self.owns(p, arp.sender)):
            raise Drop("arp_spoof")

    def arp(self, p: int, port: Row, packet: Packet, out: Outputs) -> None:
        """Line 3."""
        self.guard_arp(p, port, packet)
        arp = packet.arp
        assert arp is not None
        is_request = arp.operation == 1
        if not is_request or arp.target == arp.sender or self.owns(p, arp.target):
            raise Drop("announcement")
        owner = self.owner(port.segment, arp.target)
        if owner == NOBODY:
            raise Drop("arp_unknown")
        self.to_workload(p, arp_reply(packet, self.mac_of(owner)), out)

    def guard(self, p: int, packet: Packet) -> None:
        """Line 5: nothing is sent that only others may send."""
        flow = packet.flow
        icmp = packet.icmp_type if packet.family == 6 else -1
        if icmp in ROUTER_DISCOVERY and packet.fragment != WHOLE:
            raise Drop("nd_spoof")
        if icmp in ADVERTISEMENTS:
            raise Drop("router_advertisement")
        is_udp = flow.protocol == UDP and packet.fragment != LATER
        if is_udp and flow.source_port == DHCP_SERVER[packet.family]:
            raise Drop("dhcp_server")
        if self.owns(p, flow.source):
            return
        if packet.family == 4 and flow.source == UNSPECIFIED4:
            asks = is_udp and (flow.source_port, flow.target_port) == (68, 67) and flow.target == LIMITED_BROADCAST
        elif packet.family == 6 and flow.source == UNSPECIFIED6:
            asks = icmp == SOLICITATION or (icmp in SOURCELESS and flow.target[0] == 0xFF)
        else:
            asks = False
        if not asks:
            raise Drop("source_address")

    def guard_neighbour(self, p: int, port: Row, packet: Packet) -> Discovery:
        found = discovery(packet)
        if found is None:
            raise Drop("malformed")
        if found.link_address not in (None, _number(port.mac)):
            raise Drop("nd_spoof")
        is_inquiry = packet.icmp_type == SOLICITATION and packet.flow.source != UNSPECIFIED6
        if not is_inquiry and not self.owns(p, found.target):
            raise Drop("nd_spoof")
        return found

    def neighbour(self, p: int, port: Row, packet: Packet, out: Outputs) -> None:
        """Line 6."""
        found = self.guard_neighbour(p, port, packet)
        if self.owns(p, found.target):
            raise Drop("announcement")
        if port.flags & AGENT and found.target == RELAY.packed:
            self.to_workload(p, neighbour_advertisement(packet, NOBODY_MAC, False), out)
            return
        owner = self.owner(port.segment, found.target)
        if owner == NOBODY:
            raise Drop("nd_unknown")
        answer = neighbour_advertisement(packet, self.mac_of(owner), owner.kind == OWNER_ROUTER)
        self.to_workload(p, answer, out)

    def inquiry(self, p: int, port: Row, packet: Packet, now: float, out: Outputs) -> None:
        """Line 6, for who asks the network."""
        if packet.fragment != WHOLE or packet.size > INQUIRY_BYTES:
            raise Drop("malformed")
        self.ask(p, INQUIRY_COST, now)
        out.emitted.append(ToAgent(port.ifindex, p, packet.frame))

    def ask(self, p: int, cost: int, now: float) -> None:
        """Pay for what the machine itself does for a port."""
        at = nanoseconds(now)
        until = spend(self.asked.get(p, at - INQUIRY_BURST), cost, INQUIRY_BURST, at)
        if until is None:
            raise Drop("ask_limit")
        self.asked[p] = until

    def fragment(self, p: int, packet: Packet, now: float) -> Packet:
        """Line 7: a later fragment with what its first one had."""
        if packet.fragment != LATER:
            return packet
        first = self.fragments.get(_fragment_key(p, packet))
        if first is None or seconds(now) >= first.expires:
            raise Drop("fragment_unknown")
        return with_first(packet, first.flow, first.icmp_type)

    def remember(self, p: int, packet: Packet, tracked: Tracked | None, now: float) -> None:
        """Lines 7 and 11: of a packet that passed, and of no other, its connection and what its fragments need."""
        if tracked is not None:
            self.connections[tracked.key] = tracked.connection
        if packet.fragment == FIRST:
            first = First(packet.flow, packet.icmp_type, seconds(now) + FRAGMENT_SECONDS)
            self.fragments[_fragment_key(p, packet)] = first

    def flood(self, p: int, port: Row, packet: Packet, now: float, out: Outputs) -> None:
        """Broadcast and multicast: a copy to each port here, and one to each machine with hosts of the segment."""
        if packet.is_icmp_error_kind:
            raise Drop("icmp_unrelated")
        if packet.length > self.mtu(port, port):
            raise Drop("too_big")
        self.pay([Toll(port.out, 0)], packet.weight, now)
        self.flood_here(p, port, port.segment, packet, packet.frame, now, out, leaves=True)
        segment = self.segment[port.segment]
        # Hosts on other machines that the carriers allow. One that their rates refuse takes the copy from its machine.
        machines: dict[int, bool] = {}
        for index in range(segment.floods):
            row = self.floods.get((port.segment, segment.flood, index))
            if row is None:
                continue
            try:
                machine = self.carry(port.network, self.place(port), row.host)
            except Drop:
                continue  # Only copies to ports are counted.
            if machine != self.here and machines.setdefault(machine, True):
                try:
                    leaving, arriving = self.tolls_below(port.network, self.place(port), row.host, packet)
                    few(leaving + arriving)
                    self.pay(leaving, packet.weight, now)
                except Drop as drop:
                    machines[machine] = False
                    out.drops.append((p, drop.reason))
        if segment.flags & ON_VLAN and machines:  # The switches make the copies.
            self.on_trunk(segment)
            self.to_vlan(0, segment, packet.frame, out)
            return
        for machine, gets in machines.items():
            if gets:
                self.to_machine(machine, segment, packet, packet.frame, out)

    def flood_here(
        self, p: int, port: Row, segment_slot: int, packet: Packet, frame: bytes, now: float, out: Outputs, leaves: bool
    ) -> None:
        """A copy to each port of the segment that lives here. Carriers take their toll once for each host, for both
        ends if it `leaves` here too."""
        segment = self.segment[segment_slot]
        refused: dict[int, str] = {}  # by host: why rates refuse it, or nothing
        for index in range(segment.locals):
            row = self.locals.get((segment_slot, segment.local, index))
            q = row.port if row else 0
            if q in (0, p) or not self.port[q].id:
                continue
            to = self.port[q]
            address = to.address4 if packet.family == 4 else to.address6
            a, b = self.place(port), self.place(to)
            try:
                if not to.flags & ENABLED:
                    raise Drop("port_disabled")
                at = None if address == NO_ADDRESS else address
                if not packet.is_about_neighbours and not self.judge(port.network, p, q, packet.flow, at):
                    raise Drop("policy")
                self.carry(port.network, a, b)
                self.attached(q)
                if b not in refused:
                    refused[b] = self.charge(port, b, packet, now, leaves)
                if refused[b]:
                    raise Drop(refused[b])
                self.pay([Toll(to.__dict__["in"], 0)], packet.weight, now)
                self.to_workload(q, frame, out, packet.tags)
            except Drop as drop:
                out.drops.append((q, drop.reason))

    def charge(self, port: Row, b: int, packet: Packet, now: float, leaves: bool) -> str:
        """The carriers' part of a frame for all, to a host that is here. Why not, or nothing."""
        try:
            leaving, arriving = self.tolls_below(port.network, self.place(port), b, packet)
            tolls = leaving * leaves + arriving
            few(tolls)
            self.pay(tolls, packet.weight, now)
        except Drop as drop:
            return drop.reason
        return ""

    def unicast(self, p: int, port: Row, packet: Packet, now: float, out: Outputs) -> None:
        """Lines 9 to 14."""
        way: Way
        owner = self.at_mac(port.segment, packet.target_mac)
        if owner == NOBODY:
            raise Drop("unknown_unicast")
        if owner == Owner(OWNER_PORT, p):
            raise Drop("hairpin")
        q, way = owner.slot, ()
        if owner.kind == OWNER_ROUTER:
            if packet.tags:
                raise Drop("tagged")
            behind = self.through(owner.slot, p, port, packet, now, out)
            if behind is None:
                return
            q, way = behind
            self.guard_routed(packet.flow.source)
        to = self.port[q]
        if not to.flags & ENABLED:
            raise Drop("port_disabled")
        tracked = self.connection(port.network, p, q, packet, now)
        # The first router looks at the TTL, then at the size; those behind it at the TTL alone: one MTU is everywhere.
        self.expire(way[:1], packet)
        mtu = self.mtu(port, to)
        if packet.length > mtu:
            raise Drop("too_big", router=way[0] if way else self.segment[port.segment].router, mtu=mtu)
        self.expire(way, packet)
        frame = packet.frame
        if way:
            frame = routed(packet, _number(to.mac), _number(self.router[way[-1]].mac), len(way))
        machine = self.carry(port.network, self.place(port), self.place(to))
        segment = self.segment[to.segment]
        if machine == self.here:
            self.attached(q)
        elif segment.flags & ON_VLAN:
            self.on_trunk(segment)
        leaving, arriving = self.tolls(port, to, packet, way[0] if way else 0)
        few(leaving + arriving)
        self.pay(leaving, packet.weight, now)
        self.remember(p, packet, tracked, now)
        if machine == self.here:
            self.pay(arriving, packet.weight, now, q)
            self.to_workload(q, frame, out, packet.tags)
        elif segment.flags & ON_VLAN:
            # A router's MAC is the same on all machines: switches would see it move.
            self.to_vlan(machine, segment, frame[:6] + segment.mac + frame[12:] if way else frame, out)
        else:
            self.to_machine(machine, segment, packet, frame, out)

    def through(
        self, router: int, p: int, port: Row, packet: Packet, now: float, out: Outputs
    ) -> tuple[int, Way] | None:
        """Line 10: the port behind the router, and the way there. None if a router has answered."""
        target = packet.flow.target
        itself = Owner(OWNER_ROUTER, router)
        # Its own address in this very segment may be link-local, so it is looked for before routes are.
        is_gateway = self.owner(port.segment, target) == itself
        segment = port.segment if is_gateway else self.route(router, target)
        owner = self.owner(segment, target) if segment else NOBODY
        way = (router,) if is_gateway else self.way(router, packet)
        if owner.kind == OWNER_PORT and way is not None:
            return owner.slot, way
        # Pinging the own gateway is no policy matter (rule 41).
        if not (is_gateway and packet.is_echo_request) and not self.judge(port.network, p, 0, packet.flow, target):
            raise Drop("policy")
        if way is None:
            raise Drop("no_route", router=router)
        before = len(way) - 1
        if owner == NOBODY:
            self.expire(way, packet)
            raise Drop("unreachable", router=way[-1], passed=before)
        self.expire(way[:-1], packet)
        if not packet.is_echo_request:
            raise Drop("router_local", router=way[-1], passed=before)
        self.remember(p, packet, None, now)
        self.to_workload(p, echo_reply(packet, before), out)
        return None

    def expire(self, way: Way, packet: Packet) -> None:
        """Each router takes one from the TTL, and the one that would leave nothing ends the packet."""
        if way and packet.ttl <= len(way):
            passed = max(packet.ttl - 1, 0)
            raise Drop("ttl_expired", router=way[passed], passed=passed)

    def complain(self, p: int, port: Row, packet: Packet, drop: Drop, now: float, out: Outputs) -> None:
        """ICMP errors: a router tells the sender why its packet ended there, if it may and has not told it too much."""
        if not drop.router or packet.tags or not may_be_told(packet, drop.reason):
            return
        until = spend(self.told.get(p, 0), COST_NS, BURST_NS, nanoseconds(now))
        if until is None:
            return
        self.told[p] = until
        row = self.router[drop.router]
        face = self.faces.get((drop.router, port.segment), row)
        source = face.address4 if packet.family == 4 else face.address6
        if drop.reason == "router_local":
            source = packet.flow.target
        # It comes from where the packet went: the first router, or, from within the segment, the one that speaks.
        is_routed = self.at_mac(port.segment, packet.target_mac).kind == OWNER_ROUTER
        mac = packet.target_mac if is_routed else _number(row.mac)
        self.to_workload(p, icmp_error(packet, drop.reason, source, mac, drop.passed, drop.mtu), out)

    def mtu(self, port: Row, to: Row) -> int:
        """Bytes of IP, behind all tags, that may go from one port to another."""
        flags = self.segment[port.segment].flags | self.segment[to.segment].flags
        return int(self.network[port.network].mtu) - RIDING_BYTES * bool(flags & TRANSPARENT)

    def guard_routed(self, source: bytes) -> None:
        """What means nothing in another segment passes no router, and no answer would find its way back."""
        if any(contains(prefix, source) for prefix in NEVER_ROUTED):
            raise Drop("source_address")

    # ---- whether it may

    def connection(self, network: int, p: int, q: int, packet: Packet, now: float) -> Tracked | None:
        """Line 11: connections, then policy. What is to be remembered, if anything."""
        flow = packet.flow
        if packet.is_about_neighbours:
            return None
        if packet.is_icmp_error:
            self.related(network, p, q, packet, now)
            return None
        if packet.is_carriage or (packet.is_icmp and not packet.is_echo):
            if not self.judge(network, p, q, flow, flow.target):
                raise Drop("policy")
            return None
        key = Key(p, q, flow)
        known = self.alive(key, now)
        if known is None and not packet.is_opening:
            opened = Key(q, p, flow.reversed)
            known = self.alive(opened, now)
            # One that its opener may not have any more is as good as not there.
            if known is not None and not self.judge(network, q, p, opened.flow, opened.flow.target):
                known = None
            if known is not None:
                key = opened
        if not self.judge(network, key.opener, key.answerer, key.flow, key.flow.target):
            raise Drop("policy")
        if known is None and self.opened_by(p, now) >= self.port[p].share:
            raise Drop("connection_share")
        closing = packet.is_closing or (known is not None and known.closing and not packet.is_opening)
        return Tracked(key, Connection(closing, seconds(now) + lifetime(flow.protocol, closing)))

    def related(self, network: int, p: int, q: int, packet: Packet, now: float) -> None:
        """Line 11: an ICMP error belongs to the connection of the packet it quotes, which may be gone from or
        come to its sender."""
        quote = quoted(packet)
        if quote is not None:
            for key in (Key(q, p, quote), Key(p, q, quote.reversed)):
                known = self.alive(key, now)
                if known is not None and self.judge(network, key.opener, key.answerer, key.flow, key.flow.target):
                    return
        raise Drop("icmp_unrelated")

    def alive(self, key: Key, now: float) -> Connection | None:
        connection = self.connections.get(key)
        return connection if connection is not None and seconds(now) < connection.expires else None

    def opened_by(self, p: int, now: float) -> int:
        second = seconds(now)
        return sum(1 for key, connection in self.connections.items() if key.opener == p and second < connection.expires)

    def judge(self, network: int, p: int, q: int, flow: FlowTuple, target: bytes | None) -> bool:
        """The network's policies for a packet from port `p` (or 0) to port `q` (or 0) at `target`, if that is
        known: see `tables.py`."""
        row = self.network[network]
        if row.rules == 0:
            return True
        version = (network, row.rules)
        sources = (0, IDENTITY + self.peer(version, p), CIDR + self.cidr(version, flow.source))
        targets = (0, IDENTITY + self.peer(version, q), CIDR + self.cidr(version, target))
        services = (0, PROTOCOL + flow.protocol, CLASS + self.service(version, flow))
        best = -1  # like a deny
        for combo in range(27):
            if row.combos >> combo & 1:
                source, to, service = sources[combo // 9], targets[combo // 3 % 3], services[combo % 3]
                rule = self.rules.get((*version, source, to, service))
                if rule is not None and rule.rank > best:
                    best = rule.rank
        return best & DENY == 0

    def peer(self, version: tuple[int, int], p: int) -> int:
        row = self.peers.get((*version, p)) if p else None
        return row.__dict__["class"] if row else 0

    def cidr(self, version: tuple[int, int], address: bytes | None) -> int:
        row = self.cidrs.longest(struct.pack("<II", *version) + address) if address is not None else None
        return row.__dict__["class"] if row else 0

    def service(self, version: tuple[int, int], flow: FlowTuple) -> int:
        key = struct.pack("<II", *version) + struct.pack("!BH", flow.protocol, flow.target_port)
        row = self.services.longest(key)
        return row.__dict__["class"] if row else 0

    # ---- where it goes

    def owner(self, segment: int, address: bytes) -> Owner:
        row = self.owners.longest(struct.pack("<I", segment) + address)
        return Owner(row.kind, row.slot) if row else NOBODY

    def owns(self, p: int, address: bytes) -> bool:
        return self.owner(self.port[p].segment, address) == Owner(OWNER_PORT, p)

    def at_mac(self, segment: int, mac: int) -> Owner:
        row = self.macs.get((segment, mac.to_bytes(6, "big")))
        return Owner(row.kind, row.slot) if row else NOBODY

    def mac_of(self, owner: Owner) -> int:
        return _number((self.port if owner.kind == OWNER_PORT else self.router)[owner.slot].mac)

    def route(self, router: int, target: bytes) -> int:
        """The segment that a router has for an address, or 0."""
        row = self.to_segment(router, target)
        return row.segment if row else 0

    def to_segment(self, router: int, target: bytes) -> Row | None:
        return self.routes.longest(struct.pack("<I", router) + target)

    def way(self, router: int, packet: Packet) -> Way | None:
        """The way from a router to the packet's destination, as far as a TTL lasts. None if it leads nowhere."""
        taken = self.hops_of(router, hashed(packet))
        return None if taken is None else (router, *(int(hop.next) for hop in taken))

    def hops_of(self, router: int, flow: FlowTuple) -> list[Row] | None:
        taken: list[Row] = []
        while len(taken) < MAX_TTL:
            row = self.to_segment(router, flow.target)
            if row is None:
                return None
            if row.count == 0:
                break
            choice = flow_hash(*flow, seed=int.from_bytes(self.router[router].mac[2:], "big")) % row.count
            hop = self.hops.get((router, row.group, choice))
            if hop is None:
                return None
            router = hop.next
            taken.append(hop)
        return taken

    # ---- what carries it

    def place(self, port: Row) -> int:
        """The host a port lives on."""
        return int(self.host[port.host].at if port.flags & HOSTS else port.host)

    def carry(self, network: int, a: int, b: int) -> int:
        """May what this network sends go from host `a` to host `b`, of which one is here? The machine it is for."""
        for _ in range(MAX_DEPTH):
            at, to = self.host[a], self.host[b]
            if not at.id or not to.id or at.kind != to.kind:
                raise Drop("carrier_down")
            if at.kind == MACHINE:
                if not at.at or not to.at:
                    raise Drop("carrier_down")
                return int(to.at)
            network = self.carrier(self.network[network].underlay, at.port, to.port)
            a, b = at.at, to.at
        raise Drop("carrier_depth")

    def carrier(self, underlay: int, pa: int, pb: int) -> int:
        """One step of carry: does the network of the ports `pa` and `pb` take a datagram from one to the other?"""
        a, b = self.port[pa], self.port[pb]
        if not a.flags & b.flags & self.network[a.network].flags & ENABLED:
            raise Drop("carrier_down")  # Rows that are not here yet are not enabled either.
        if pa == pb:
            return int(a.network)  # It is there, and nobody else is asked.
        source, target = (a.address6, b.address6) if underlay == 6 else (a.address4, b.address4)
        if NO_ADDRESS in (source, target):
            raise Drop("carrier_no_route")
        if not self.judge(a.network, pa, pb, FlowTuple(source, target, 0, CARRIAGE_PORT, UDP), target):
            raise Drop("carrier_policy")
        if a.segment != b.segment:
            route = self.to_segment(self.segment[a.segment].router, target)
            if route is None or route.segment != b.segment or not self.owns(pb, target):
                raise Drop("carrier_no_route")
            if route.hops > MAX_HOPS:
                raise Drop("carrier_ttl")
        return int(a.network)

    # ---- what it pays

    def tolls(self, port: Row, to: Row, packet: Packet, router: int) -> tuple[list[Toll], list[Toll]]:
        """To leave: in the network itself, by this router first, then in what carries it, level by level. To arrive:
        the same levels backwards, the network itself last."""
        leaving, arriving = self.tolls_below(port.network, self.place(port), self.place(to), packet)
        links = self.hops_of(router, hashed(packet)) if router else None
        own = [Toll(bucket, 0) for bucket in (port.out, *(hop.bucket for hop in links or ())) if bucket]
        in_bucket = to.__dict__["in"]
        return own + leaving, arriving + [Toll(in_bucket, 0)] * (in_bucket != 0)

    def tolls_below(self, network: int, a: int, b: int, packet: Packet) -> tuple[list[Toll], list[Toll]]:
        """What carriers take for what goes from host `a` to host `b`, which `carry` allows."""
        leaving: list[Toll] = []
        arriving: list[Toll] = []
        above = 0
        while a != b and self.host[a].kind != MACHINE:
            at, to = self.host[a], self.host[b]
            pa, pb = self.port[at.port], self.port[to.port]
            underlay = self.network[network].underlay
            above += OVERHEAD[underlay]
            leaving.append(Toll(pa.out, above))
            arriving.append(Toll(pb.__dict__["in"], above))
            if pa.segment != pb.segment:
                source, target = (pa.address6, pb.address6) if underlay == 6 else (pa.address4, pb.address4)
                flow = FlowTuple(source, target, carriage_source_port(packet), CARRIAGE_PORT, UDP)
                links = self.hops_of(self.segment[pa.segment].router, flow)
                leaving += [Toll(hop.bucket, above) for hop in links or ()]
            network, a, b = int(pa.network), int(at.at), int(to.at)
        return [toll for toll in leaving if toll.bucket], [toll for toll in arriving[::-1] if toll.bucket]

    def pay(self, tolls: list[Toll], size: int, now: float, q: int | None = None) -> None:
        """From each bucket in turn. What was paid stays paid when one is empty."""
        moment = nanoseconds(now)
        for toll in tolls:
            row = self.bucket[toll.bucket]
            if row.rate == 0:
                continue
            until = spend(self.until.get(toll.bucket, 0), cost(size + toll.above, row.rate), row.burst, moment)
            if until is None:
                raise Drop("carrier_rate" if toll.above else "rate", q)
            self.until[toll.bucket] = until

    # ---- out

    def attached(self, q: int) -> None:
        if not self.port[q].ifindex:
            raise Drop("not_attached")

    def to_workload(self, q: int, frame: bytes, out: Outputs, tags: bytes = b"") -> None:
        """With the tags that rode along, and the port's own in front of them."""
        self.attached(q)
        port = self.port[q]
        own = tag(port.tag) if port.tag else b""
        out.emitted.append(ToWorkload(port.ifindex, q, tagged(frame, own + tags)))

    def to_machine(self, machine: int, segment: Row, packet: Packet, frame: bytes, out: Outputs) -> None:
        """`packet` is the frame as its workload sent it: a router changes nothing that the flow hash reads."""
        datagram = encapsulate(
            tagged(frame, packet.tags),
            segment.vni,
            _address(self.machine[self.here].address),
            _address(self.machine[machine].address),
            carriage_source_port(packet),
            packet.ecn,
        )
        out.emitted.append(ToMachine(machine, datagram[ETHERNET:]))

    def on_trunk(self, segment: Row) -> None:
        if not segment.ifindex:
            raise Drop("no_trunk")

    def to_vlan(self, machine: int, segment: Row, frame: bytes, out: Outputs) -> None:
        out.emitted.append(ToVlan(segment.ifindex, machine, tagged(frame, tag(segment.vlan))))

    # ---- from an agent above

    def from_agent(self, ifindex: int, datagram: bytes) -> bytes | None:
        """The frame in which the workload on this interface, that runs an agent, sends its datagram: to who has the
        address in its segment, as ARP and ND say, else to the gateway. None if there is neither."""
        port = self.port[self.attachments[ifindex, 0].port]
        packet = parse(_ethernet_before(datagram))
        owner = self.owner(port.segment, packet.flow.target)
        if owner == NOBODY:
            owner = Owner(OWNER_ROUTER, self.segment[port.segment].router)
        return with_ethernet(packet.frame, self.mac_of(owner), _number(port.mac)) if owner.slot else None

    # ---- from the wire

    def is_ours(self, outer: Packet) -> bool:
        """UDP to port 4789 at this machine's own address. We send with DF, without options or extension headers:
        anything else is somebody else's."""
        if outer.family == 0 or outer.flaw or outer.fragment != WHOLE or not outer.is_carriage:
            return False
        if outer.offset != ETHERNET + (20 if outer.family == 4 else 40):
            return False
        here = self.machine[self.here]
        return bool(here.id) and outer.flow.target == here.address

    def from_wire(self, outer: Packet, now: float, out: Outputs) -> None:
        member = self.members.get((outer.flow.source,))
        if member is None:
            raise Drop("not_a_member")
        carried = decapsulate(outer)
        if carried is None:
            raise Drop("vxlan_header")
        vni = self.vnis.get((carried.vni,))
        if vni is None or not self.segment[vni.segment].id:
            raise Drop("unknown_vni")
        self.arrive(vni.segment, carried.frame, member.machine, carried.ecn, now, out)

    def arrive(
        self, segment: int, frame: bytes, machine: int | None, ecn: int | None, now: float, out: Outputs
    ) -> None:
        """What came for a segment. In VXLAN: from which `machine`, and its outer `ecn`; a VLAN says neither."""
        if not self.network[self.segment[segment].network].flags & ENABLED:
            raise Drop("network_disabled")
        is_transparent = self.segment[segment].flags & TRANSPARENT
        tags, frame = untagged(frame, RIDING if is_transparent else 0)
        packet = parse(frame if machine is None else made_whole(frame), tags)
        if packet.link_flaw:
            raise Drop(packet.link_flaw)
        if packet.ether_type == ARP and not tags:
            raise Drop("ether_type")
        if packet.flaw:
            raise Drop(packet.flaw)
        p, router = self.sender(segment, machine, packet)
        port = self.port[p]
        if tags:
            self.guard_behind_tags(p, port, packet)
        else:
            self.guard(p, packet)
            if packet.is_discovery:
                raise Drop("nd_spoof")
            if packet.is_inquiry:
                raise Drop("asked_elsewhere")
        packet = self.fragment(p, packet, now)
        marked = packet.frame if ecn is None else with_outer_ecn(packet, ecn)
        if machine is None and router:  # It came with the MAC of the sender's NIC.
            marked = packet.frame[:6] + self.router[router].mac + packet.frame[12:]
        if packet.is_group:
            if packet.is_icmp_error_kind:
                raise Drop("icmp_unrelated")
            if marked is None:
                raise Drop("ecn")
            self.flood_here(p, port, segment, packet, marked, now, out, leaves=False)
            return
        owner = self.at_mac(segment, packet.target_mac)
        q = owner.slot if owner.kind == OWNER_PORT else 0
        to = self.port[q]
        if not to.flags & LOCAL:
            raise Drop("not_here")
        try:
            if not to.flags & ENABLED:
                raise Drop("port_disabled")
            tracked = self.connection(port.network, p, q, packet, now)
            self.carry(port.network, self.place(port), self.place(to))
            if marked is None:
                raise Drop("ecn")
            self.attached(q)
            _, arriving = self.tolls(port, to, packet, 0)
            few(arriving)
            self.remember(p, packet, tracked, now)
            self.pay(arriving, packet.weight, now)
            self.to_workload(q, marked, out, tags)
        except Drop as drop:
            raise Drop(drop.reason, q) from drop

    def sender(self, segment: int, machine: int | None, packet: Packet) -> tuple[int, int]:
        """The port that sent what came from the wire, and the router that it came through, or 0: by its MAC, or behind
        a router's by its address. On a VLAN machines have MACs of their own for the segment's router."""
        source = packet.flow.source
        owner = self.at_mac(segment, packet.source_mac)
        router = owner.slot if owner.kind == OWNER_ROUTER else 0
        if machine is None:
            router = self.segment[segment].router if owner == NOBODY and not packet.is_group else 0
        if router:
            if packet.tags:
                raise Drop("tagged")
            behind = self.route(router, source)
            owner = self.owner(behind, source) if behind else NOBODY
        if owner.kind != OWNER_PORT or not self.port[owner.slot].id:
            raise Drop("unknown_source")
        if self.lives_only_here(owner.slot) if machine is None else not self.lives_at(owner.slot, machine):
            raise Drop("sender_location")
        if router:
            self.guard_routed(source)
        return owner.slot, router

    def lives_only_here(self, p: int) -> bool:
        host = self.port[p].host
        homes = {self.machine_of(host, leaving=False), self.machine_of(host, leaving=True)}
        return homes == {self.here}

    def lives_at(self, p: int, machine: int) -> bool:
        """Does the port live at this machine, or is it, or what carries it, moving from there?"""
        host = self.port[p].host
        return machine in (self.machine_of(host, leaving=False), self.machine_of(host, leaving=True))

    def machine_of(self, host: int, leaving: bool) -> int:
        """The machine that a host is on in the end, or 0. `leaving`: where it is moving from, if anything on the
        way there is (rule 15)."""
        for _ in range(MAX_DEPTH + 1):
            row = self.host[host]
            host = (row.__dict__["from"] if leaving else 0) or row.at
            if row.kind == MACHINE:
                return int(host)
        return 0


class Fabric:
    """Agents that exchange datagrams at once and lose none: a whole world, by the tables of each.

    The wire takes datagrams from machine to machine. Those of an agent on a host port leave as frames from the workload
    of that port, into the agent below that has it; what comes to a workload where an agent runs is the agent's, and
    what that does not take for VXLAN is for nobody. Machines, networks and ports go by their ids here, never by slots.
    """

    def __init__(
        self, tables: Mapping[Agent, Tables], answer: Callable[[int, bytes], bytes | None] = lambda *_: None
    ) -> None:
        """`answer` does what agents do: a frame for the workload of a port that asked this, or None."""
        self.agents: dict[Agent, Reference] = {}
        self.answer = answer
        self.relayed = 0  # frames, ever
        self.load(tables)

    def load(self, tables: Mapping[Agent, Tables]) -> None:
        """New tables for these agents; connections and fragments stay. All others are gone."""
        agents = self.agents
        self.agents = {}
        for agent, rows in tables.items():
            if agent in agents:
                agents[agent].load(rows)
            self.agents[agent] = agents.get(agent) or Reference(rows)
        self.attachments: dict[tuple[Agent, int], int] = {}  # ifindex
        self.having: dict[int, list[Agent]] = {}  # by port, those where its workload hangs
        for agent, reference in self.agents.items():
            for (ifindex, vlan), row in reference.attachments.items():
                if vlan:
                    continue
                port = reference.port[row.port].id
                self.attachments[agent, port] = ifindex
                self.having.setdefault(port, []).append(agent)

    def send(
        self, port: int, frame: bytes, now: float, agent: Agent | None = None
    ) -> tuple[list[tuple[int, bytes]], list[str]]:
        """What becomes of a frame from the workload of a port: (port, frame) of each delivery, and the reason of each
        drop, at all agents, those of what carries it as "below REASON". `agent`: where it is sent from, of two while
        the port moves. KeyError if the port has no workload there."""
        deliveries: list[tuple[int, bytes]] = []
        drops: list[str] = []
        if agent is None:
            (agent,) = self.having[port]
        pending = deque([(agent, self.agents[agent].workload(self.attachments[agent, port], frame, now))])
        own = agent.domain
        while pending:
            agent, outputs = pending.popleft()
            reference = self.agents[agent]
            is_own = agent.domain == own
            drops += [reason if is_own else f"below {reason}" for _, reason in outputs.drops]
            for output in outputs.emitted:
                if isinstance(output, ToMachine):
                    there = Agent(agent.domain, reference.machine[output.machine].id)
                    if agent.domain == FABRIC:
                        pending.append((there, self.agents[there].underlay(output.datagram, now)))
                    elif (sent := self.below(agent, output.datagram, now)) is not None:
                        pending.append(sent)
                    else:
                        drops.append("no_underlay_route")
                    continue
                if isinstance(output, ToVlan):  # A NIC has the same ifindex on all machines here.
                    id = reference.machine[output.machine].id
                    for there, other in self.agents.items():
                        if there.domain == FABRIC and there != agent and id in (0, there.machine):
                            pending.append((there, other.trunk(output.ifindex, output.frame, now)[0]))
                    continue
                to = reference.port[output.port].id
                if isinstance(output, ToAgent):
                    told = self.answer(to, output.frame)
                    if told is None:
                        drops.append("unanswerable")
                    else:
                        own = reference.port[output.port].tag
                        deliveries.append((to, tagged(told, tag(own) if own else b"")))
                elif isinstance(output, ToRelay):
                    self.relayed += 1
                elif is_own:
                    deliveries.append((to, output.frame))
                else:
                    there = Agent(reference.network[reference.port[output.port].network].id, to)
                    if there in self.agents:
                        pending.append((there, self.agents[there].underlay(output.frame[ETHERNET:], now)))
                    else:
                        drops.append("below nobody")
        return deliveries, drops

    def below(self, agent: Agent, datagram: bytes, now: float) -> tuple[Agent, Outputs] | None:
        """A datagram of an agent on a host port, as a frame from that port's workload where the port lives. None if
        that has no route."""
        for there in self.having[agent.machine]:
            reference = self.agents[there]
            ifindex = self.attachments[there, agent.machine]
            port = reference.port[reference.attachments[ifindex, 0].port]
            if reference.machine_of(port.host, leaving=False) == reference.here:
                break
        frame = reference.from_agent(ifindex, datagram)
        return None if frame is None else (there, reference.workload(ifindex, frame, now))


# ---- tables as dicts


def _fields(rows: Rows, part: str) -> Iterator[tuple[Any, ...]]:
    """The fields of `key` or `value` of each row, without padding: byte arrays as bytes, all else as int."""
    column = rows[part]
    columns = [
        column[name].tolist() if column[name].ndim == 1 else [bytes(each) for each in column[name]]
        for name in _names(rows, part)
    ]
    return zip(*columns, strict=True)


def _names(rows: Rows, part: str) -> list[str]:
    return [name for name in rows.dtype[part].names or () if not name.startswith("pad")]


def _values(rows: Rows) -> Iterator[Row]:
    names = _names(rows, "value")
    for fields in _fields(rows, "value"):
        yield Row(**dict(zip(names, fields, strict=True)))


class _Array(dict[int, Row]):
    """A table by slots. As in the kernel every slot can be read, and one without a row is all zeros: nobody."""

    def __init__(self, tables: Tables, name: str) -> None:
        rows = tables[name]
        super().__init__(zip(rows["key"].tolist(), _values(rows), strict=True))
        (self.nobody,) = _values(np.zeros(1, TABLES[name].row))

    def __missing__(self, slot: int) -> Row:
        return self.nobody


def _hash(tables: Tables, name: str) -> dict[tuple[Any, ...], Row]:
    rows = tables[name]
    return dict(zip(_fields(rows, "key"), _values(rows), strict=True))


class _Prefixes:
    """A table of prefixes: for each length a dict, asked from the longest on."""

    def __init__(self, tables: Tables, name: str) -> None:
        rows = tables[name]
        assert TABLES[name].kind == "lpm"
        lengths: dict[int, dict[bytes, Row]] = {}
        for length, key, value in zip(rows["key"]["prefixlen"].tolist(), rows["key"], _values(rows), strict=True):
            lengths.setdefault(length, {})[_masked(key.tobytes()[4:], length)] = value
        self.lengths = sorted(lengths.items(), reverse=True)

    def longest(self, key: bytes) -> Row | None:
        for length, rows in self.lengths:
            row = rows.get(_masked(key, length))
            if row is not None:
                return row
        return None


def _masked(key: bytes, length: int) -> bytes:
    """The first bits of a key, in whole bytes."""
    whole, bits = divmod(length, 8)
    if not bits:
        return key[:whole]
    return key[:whole] + bytes([key[whole] & 0xFF00 >> bits & 0xFF])


# ---- small things


def few(tolls: list[Toll]) -> None:
    if len(tolls) > PATH_BUCKETS:
        raise Drop("cannot_flatten")


def _number(mac: bytes) -> int:
    return int.from_bytes(mac, "big")


def _address(address: bytes) -> IPv4Address | IPv6Address:
    return IPv4Address(address[12:]) if is_mapped(address) else IPv6Address(address)


def _fragment_key(p: int, packet: Packet) -> tuple[int, bytes, bytes, int, int]:
    flow = packet.flow
    return p, flow.source, flow.target, flow.protocol, packet.identification


def _ethernet_before(datagram: bytes) -> bytes:
    ether_type = IPV6 if datagram[:1] and datagram[0] >> 4 == 6 else IPV4
    return bytes(12) + ether_type.to_bytes(2, "big") + datagram
