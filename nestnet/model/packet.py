"""Ethernet frames as values: what can be read from one, and the few that nestnet writes itself.

`parse` reads a frame as far as it goes and never raises: what is wrong with it is a field, because
where in the order of checks it counts is for the reader to say (docs/datapath.md, lines 2 to 7).

    link_flaw    line 2: too short, tags where none may be, a control address, no EtherType of ours
    flaw         lines 3 and 4: ARP or IP headers that do not add up

Fields are only meaningful behind a check that both are None. MACs are 48-bit numbers, addresses 16
bytes in network order, IPv4 as ::ffff:a.b.c.d, which is why no IPv6 packet may bear such an address.
Trailing bytes behind an IP packet (Ethernet padding) are no part of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from nestnet.model.hash import FIRST_SOURCE_PORT, flow_hash, outer_source_port
from nestnet.model.values import CARRIAGE_PORT, RELAY, RELAY_PORT, Address, Prefix, link_local

IPV4 = 0x0800
ARP = 0x0806
IPV6 = 0x86DD
TAGS = (0x8100, 0x88A8)  # 802.1Q, 802.1ad
TAG_BYTES = 4
RIDING = 2  # tags that may ride in a transparent segment
CONTROL_BLOCK = 0x0180C2000000  # 01:80:c2:00:00:00 to 0f: never forwarded by a bridge (802.1D)
BROADCAST = 0xFFFFFFFFFFFF
ETHERNET = 14  # bytes of an Ethernet header
NOBODY_MAC = 0x060000000000  # the network itself: no router or port has it

ICMP = 1
TCP = 6
UDP = 17
ICMPV6 = 58

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

WHOLE, FIRST, LATER = 0, 1, 2  # Packet.fragment

EXTENSIONS = frozenset((0, 43, 44, 51, 60))  # hop-by-hop, routing, fragment, authentication, destination options
MAX_EXTENSIONS = 6
_FRAGMENT, _AUTHENTICATION = 44, 51

ROUTER_SOLICITATION = 133
SOLICITATION, ADVERTISEMENT = 135, 136
INQUIRY_BYTES = 1500  # of IP: what one inquiry may have. Mirrors bpf/inquiry.h.
ERRORS = {4: frozenset((3, 4, 5, 11, 12)), 6: frozenset((1, 2, 3, 4))}  # ICMP errors of each family
ROUTER_TTL = 255  # of what routers send themselves: it reaches back over any way
ECHO = {4: (8, 0), 6: (128, 129)}  # request and reply

_NEEDED = {TCP: 20, UDP: 8}
_MAPPED = bytes(10) + b"\xff\xff"
UNSPECIFIED4 = _MAPPED + bytes(4)
UNSPECIFIED6 = bytes(16)
LIMITED_BROADCAST = _MAPPED + b"\xff\xff\xff\xff"


class FlowTuple(NamedTuple):
    """What a flow is known by. ICMP echo, request and reply: both ports are the identifier. Other ICMP,
    and protocols other than TCP and UDP: both ports are 0."""

    source: bytes
    target: bytes
    source_port: int
    target_port: int
    protocol: int

    @property
    def reversed(self) -> FlowTuple:
        """The tuple of an answer."""
        return FlowTuple(self.target, self.source, self.target_port, self.source_port, self.protocol)


_NO_FLOW = FlowTuple(UNSPECIFIED6, UNSPECIFIED6, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Arp:
    """RFC 826, for Ethernet and IPv4.

    0        8        16       24      31
    +-----------------+-----------------+
    | hardware type 1 | protocol 0x0800 |
    +--------+--------+-----------------+
    | 6      | 4      | operation       |   1 request, 2 reply
    +--------+--------+-----------------+
    | sender MAC                        |
    |                 +-----------------+
    |                 | sender address  |
    +-----------------+-----------------+
    |                 | target MAC      |
    +-----------------+                 |
    |                                   |
    +-----------------------------------+
    | target address                    |
    +-----------------------------------+
    """

    operation: int
    sender_mac: int
    sender: bytes
    target: bytes


@dataclass(frozen=True, slots=True)
class Discovery:
    """A neighbour solicitation or advertisement (RFC 4861, sections 4.3 and 4.4).

    +--------+--------+-----------------+
    |135, 136| code 0 | checksum        |
    +--------+--------+-----------------+
    |R S O reserved (flags: 136 only)   |
    +-----------------------------------+
    | target address, 16 bytes          |
    +--------+--------+-----------------+
    | type   | length | ...             |   options, length in units of 8 bytes:
    +--------+--------+-----------------+   1 source, 2 target link-layer address

    `link_address` is the MAC in the first source (135) or target (136) option, None without one.
    """

    target: bytes
    link_address: int | None


@dataclass(frozen=True, slots=True)
class Packet:
    """A frame that was read.

    family         4 or 6; 0 if not IP
    offset, end    where in the frame the transport header begins, and the IP packet ends
    fragment       WHOLE, FIRST or LATER; of a LATER one the flow has no ports, and there is no ICMP type
    protocol       what lies behind the last extension header; of a LATER one what its fragment header says
    icmp_type      of ICMP in IPv4 and ICMPv6 in IPv6, else -1, and so is icmp_code
    tags           802.1Q and 802.1ad tags that ride along, outermost first, as in `untagged`: `frame` is without them.
                   Behind them an ARP packet has the addresses that it is about in its flow, and protocol 0
    """

    frame: bytes
    link_flaw: str | None = None
    flaw: str | None = None
    target_mac: int = 0
    source_mac: int = 0
    ether_type: int = 0
    arp: Arp | None = None
    family: int = 0
    offset: int = 0
    end: int = 0
    ttl: int = 0
    ecn: int = 0
    fragment: int = WHOLE
    identification: int = 0
    flow: FlowTuple = _NO_FLOW
    tcp_flags: int = 0
    icmp_type: int = -1
    icmp_code: int = -1
    tags: bytes = b""

    @property
    def weight(self) -> int:
        """Bytes of the frame, tags that ride along among them."""
        return len(self.frame) + len(self.tags)

    @property
    def is_about_neighbours(self) -> bool:
        """ARP or neighbour discovery behind tags: it goes through the segment, and is no policy matter (rule 41)."""
        return self.tags != b"" and (self.arp is not None or self.is_discovery)

    @property
    def size(self) -> int:
        """Bytes of the IP packet."""
        return self.end - ETHERNET

    @property
    def length(self) -> int:
        """What an MTU is about: bytes behind the Ethernet header. Those behind the IP packet count: they go with it."""
        return len(self.frame) - ETHERNET

    @property
    def protocol(self) -> int:
        return self.flow.protocol

    @property
    def is_group(self) -> bool:
        """Is it for a broadcast or multicast MAC?"""
        return bool(self.target_mac >> 40 & 1)

    @property
    def is_icmp(self) -> bool:
        """ICMP of its own family, fragments too."""
        return self.family != 0 and self.flow.protocol == (ICMP if self.family == 4 else ICMPV6)

    @property
    def is_echo(self) -> bool:
        """Echo request or reply, by ICMP type alone."""
        return self.family != 0 and self.icmp_type in ECHO[self.family]

    @property
    def is_echo_request(self) -> bool:
        """One that a router answers, whole or each fragment by itself: type 8 or 128, code 0."""
        return (
            (self.icmp_code == 0 or self.fragment == LATER)
            and self.family != 0
            and self.icmp_type == ECHO[self.family][0]
        )

    @property
    def is_icmp_error_kind(self) -> bool:
        """An ICMP error by its type alone, fragments too."""
        return self.family != 0 and self.icmp_type in ERRORS[self.family]

    @property
    def is_icmp_error(self) -> bool:
        """An ICMP error that is no fragment."""
        return self.fragment == WHOLE and self.is_icmp_error_kind

    @property
    def is_discovery(self) -> bool:
        """Neighbour solicitation or advertisement."""
        return self.family == 6 and self.icmp_type in (SOLICITATION, ADVERTISEMENT)

    @property
    def is_inquiry(self) -> bool:
        """Does it ask the network how to begin: DHCPv4, DHCPv6, a router solicitation? Later fragments are none."""
        if self.icmp_type == ROUTER_SOLICITATION and self.family == 6:
            return True
        ports = (68, 67) if self.family == 4 else (546, 547)
        flow = self.flow
        return self.fragment != LATER and flow.protocol == UDP and (flow.source_port, flow.target_port) == ports

    @property
    def is_for_relay(self) -> bool:
        """Is it for the relay of the port whose MAC it comes from? From its link-local address, and without extension
        headers: no fragment either."""
        source, target, _, target_port, protocol = self.flow
        return (
            (self.family, protocol, target, target_port) == (6, TCP, RELAY.packed, RELAY_PORT)
            and (self.target_mac, self.offset) == (NOBODY_MAC, ETHERNET + 40)
            and source == link_local(self.source_mac).packed
        )

    @property
    def seeks_relay(self) -> bool:
        """Is it for the relay, or asks who that is? Not malformed, so far as was looked."""
        target = self.frame[self.offset + 8 : self.offset + 24]
        asks = self.family == 6 and self.icmp_type == SOLICITATION and self.fragment == WHOLE
        asks = asks and self.end - self.offset >= 24 and target == RELAY.packed
        return not self.link_flaw and not self.flaw and (asks or self.is_for_relay)

    @property
    def is_carriage(self) -> bool:
        """UDP to port 4789: never tracked (rule 2)."""
        return self.flow.protocol == UDP and self.flow.target_port == CARRIAGE_PORT

    @property
    def is_opening(self) -> bool:
        """Opening TCP: SYN set, ACK not set."""
        return self.flow.protocol == TCP and self.tcp_flags & (SYN | ACK) == SYN

    @property
    def is_closing(self) -> bool:
        """TCP with FIN or RST set."""
        return self.flow.protocol == TCP and self.tcp_flags & (FIN | RST) != 0


def mapped(address: Address) -> bytes:
    """An address as 16 bytes in network order, IPv4 as ::ffff:a.b.c.d."""
    return _MAPPED + address.packed if address.version == 4 else address.packed


def is_mapped(address: bytes) -> bool:
    """Are these 16 bytes an IPv4 address?"""
    return address[:12] == _MAPPED


@lru_cache(4096)
def span(prefix: Prefix) -> tuple[bytes, bytes, int]:
    """First and last address of a prefix as 16 bytes, and its length out of 128."""
    length = prefix.prefixlen + (96 if prefix.version == 4 else 0)
    return mapped(prefix.network_address), mapped(prefix.broadcast_address), length


def contains(prefix: Prefix, address: bytes) -> bool:
    """Is the address (16 bytes) in the prefix? No IPv4 address is in an IPv6 prefix, not even in ::/0."""
    first, last, length = span(prefix)
    return first <= address <= last and (length >= 96 or not is_mapped(address))


def mac_bytes(mac: int) -> bytes:
    return mac.to_bytes(6, "big")


# ---- reading


def untagged(frame: bytes, most: int) -> tuple[bytes, bytes]:
    """The outermost tags of a frame, at most so many, each the EtherType that says so and 16 bits: priority, and the id
    in the lower 12. And the frame without them."""
    end = 12
    while end < 12 + most * TAG_BYTES and len(frame) >= end + 6 and frame[end] << 8 | frame[end + 1] in TAGS:
        end += TAG_BYTES
    return frame[12:end], frame[:12] + frame[end:]


def tag(id: int) -> bytes:
    """802.1Q, priority 0: what trunks put on."""
    return struct.pack("!HH", TAGS[0], id)


def tagged(frame: bytes, tags: bytes) -> bytes:
    """The frame behind tags."""
    return frame[:12] + tags + frame[12:]


def parse(frame: bytes, tags: bytes = b"") -> Packet:
    """What the frame is, behind these tags. Never raises."""
    packet = _parse(frame)
    if not tags:
        return packet
    if packet.link_flaw == "tagged":
        packet = replace(packet, link_flaw="too_many_tags")
    if packet.arp is not None:
        packet = replace(packet, family=4, flow=FlowTuple(packet.arp.sender, packet.arp.target, 0, 0, 0))
    return replace(packet, tags=tags)


def _parse(frame: bytes) -> Packet:
    if len(frame) < ETHERNET:
        return Packet(frame, link_flaw="malformed")
    target_mac, source_mac = int.from_bytes(frame[:6], "big"), int.from_bytes(frame[6:12], "big")
    ether_type = frame[12] << 8 | frame[13]
    flaw = None
    if ether_type in TAGS:
        flaw = "tagged"
    elif target_mac & ~0xF == CONTROL_BLOCK:
        flaw = "control_frame"
    elif ether_type not in (IPV4, IPV6, ARP):
        flaw = "ether_type"
    packet = Packet(frame, flaw, None, target_mac, source_mac, ether_type)
    if ether_type == ARP:
        return _parse_arp(packet)
    if ether_type == IPV4:
        return _parse_ipv4(packet)
    if ether_type == IPV6:
        return _parse_ipv6(packet)
    return packet


def _malformed(packet: Packet) -> Packet:
    return replace(packet, flaw="malformed")


def _parse_arp(packet: Packet) -> Packet:
    if len(packet.frame) < ETHERNET + 28:
        return _malformed(packet)
    head, operation, sender_mac, sender, _, target = struct.unpack_from("!6sH6s4s6s4s", packet.frame, ETHERNET)
    if head != b"\x00\x01\x08\x00\x06\x04" or operation not in (1, 2):
        return _malformed(packet)
    return replace(packet, arp=Arp(operation, int.from_bytes(sender_mac, "big"), _MAPPED + sender, _MAPPED + target))


def _parse_ipv4(packet: Packet) -> Packet:
    """RFC 791.

    0        8        16       24      31
    +----+---+--------+-----------------+
    | 4  |IHL| DSCP,ECN| total length   |
    +----+---+--------+-----------------+
    | identification  |0DM| frag offset |   D don't fragment, M more fragments
    +--------+--------+-----------------+
    | TTL    |protocol| header checksum |
    +--------+--------+-----------------+
    | source                            |
    +-----------------------------------+
    | destination                       |
    +-----------------------------------+
    """
    frame, at = packet.frame, ETHERNET
    if len(frame) < at + 20 or frame[at] >> 4 != 4:
        return _malformed(packet)
    header = (frame[at] & 0xF) * 4
    total, identification, fragment = struct.unpack_from("!HHH", frame, at + 2)
    if header < 20 or total < header or at + total > len(frame):
        return _malformed(packet)
    return _parse_transport(
        packet,
        family=4,
        offset=at + header,
        end=at + total,
        ttl=frame[at + 8],
        ecn=frame[at + 1] & 3,
        fragment=LATER if fragment & 0x1FFF else FIRST if fragment & 0x2000 else WHOLE,
        identification=identification,
        source=_MAPPED + frame[at + 12 : at + 16],
        target=_MAPPED + frame[at + 16 : at + 20],
        protocol=frame[at + 9],
    )


def _parse_ipv6(packet: Packet) -> Packet:
    """RFC 8200.

    0        8        16       24      31
    +----+--------+---------------------+
    | 6  |DSCP,ECN| flow label          |
    +----+--------+---+--------+--------+
    | payload length  | next   | hops   |
    +-----------------+--------+--------+
    | source, 16 bytes                  |
    | destination, 16 bytes             |
    +--------+--------+-----------------+
    | next   | length | ...             |   extension headers, length in units of 8 bytes less one
    +--------+--------+-----------------+   (authentication: of 4 bytes less two); a fragment header:
    | next   | 0      | offset      |00M|
    +--------+--------+-----------------+
    | identification                    |
    +-----------------------------------+
    """
    frame, at = packet.frame, ETHERNET
    if len(frame) < at + 40 or frame[at] >> 4 != 6:
        return _malformed(packet)
    end = at + 40 + (frame[at + 4] << 8 | frame[at + 5])
    source, target = frame[at + 8 : at + 24], frame[at + 24 : at + 40]
    # Whoever bears an IPv4 address in an IPv6 header would pass for its owner in the other family.
    if end > len(frame) or is_mapped(source) or is_mapped(target):
        return _malformed(packet)
    protocol, offset = frame[at + 6], at + 40
    fragment, identification, extensions = WHOLE, 0, 0
    while protocol in EXTENSIONS and fragment != LATER:
        extensions += 1
        if extensions > MAX_EXTENSIONS or offset + 8 > end:
            return _malformed(packet)
        following, length = frame[offset], (frame[offset + 1] + 1) * 8
        if protocol == _FRAGMENT:
            length = 8
            bits, name = struct.unpack_from("!HI", frame, offset + 2)
            if bits & 0xFFF9:  # else atomic: no fragment
                fragment, identification = (LATER if bits & 0xFFF8 else FIRST), name
        elif protocol == _AUTHENTICATION:
            length = (frame[offset + 1] + 2) * 4
        if offset + length > end:
            return _malformed(packet)
        protocol, offset = following, offset + length
    return _parse_transport(
        packet,
        family=6,
        offset=offset,
        end=end,
        ttl=frame[at + 7],
        ecn=frame[at + 1] >> 4 & 3,
        fragment=fragment,
        identification=identification,
        source=source,
        target=target,
        protocol=protocol,
    )


def _parse_transport(
    packet: Packet,
    family: int,
    offset: int,
    end: int,
    ttl: int,
    ecn: int,
    fragment: int,
    identification: int,
    source: bytes,
    target: bytes,
    protocol: int,
) -> Packet:
    frame = packet.frame
    source_port = target_port = flags = 0
    icmp_type = icmp_code = -1
    flaw = None
    is_icmp = protocol == (ICMP if family == 4 else ICMPV6)
    if fragment != LATER:
        if end - offset < (8 if is_icmp else _NEEDED.get(protocol, 0)):
            flaw = "malformed"
        elif protocol in (TCP, UDP):
            source_port, target_port = struct.unpack_from("!HH", frame, offset)
            if protocol == TCP:
                flags = frame[offset + 13]
        elif is_icmp:
            icmp_type, icmp_code = frame[offset], frame[offset + 1]
            if icmp_type in ECHO[family]:
                source_port = target_port = frame[offset + 4] << 8 | frame[offset + 5]
    return Packet(
        frame,
        packet.link_flaw,
        flaw,
        packet.target_mac,
        packet.source_mac,
        packet.ether_type,
        None,
        family,
        offset,
        end,
        ttl,
        ecn,
        fragment,
        identification,
        FlowTuple(source, target, source_port, target_port, protocol),
        flags,
        icmp_type,
        icmp_code,
    )


def with_first(later: Packet, flow: FlowTuple, icmp_type: int) -> Packet:
    """A later fragment with the ports and the ICMP type that its first one had."""
    return replace(later, flow=flow, icmp_type=icmp_type)


def discovery(packet: Packet) -> Discovery | None:
    """The neighbour solicitation or advertisement in a packet that `is_discovery`; None if it is malformed:
    hop limit 255, code 0, 24 bytes at least, options whole and none of length 0."""
    frame, at, end = packet.frame, packet.offset, packet.end
    if packet.ttl != 255 or packet.icmp_code != 0 or end - at < 24:
        return None
    wanted = 1 if packet.icmp_type == SOLICITATION else 2
    link_address = None
    option = at + 24
    while option < end:
        length = frame[option + 1] * 8 if option + 1 < end else 0
        if length == 0 or option + length > end:
            return None
        if frame[option] == wanted and link_address is None:
            link_address = int.from_bytes(frame[option + 2 : option + 8], "big")
        option += length
    return Discovery(frame[at + 8 : at + 24], link_address)


def quoted(packet: Packet) -> FlowTuple | None:
    """The tuple of the packet that an ICMP error is about, as its sender sent it. None if the quote is too
    short for addresses and (TCP, UDP, ICMP) 8 bytes of transport header, has extension headers, or
    is of a later fragment or the other family."""
    quote = packet.frame[packet.offset + 8 : packet.end]
    if packet.family == 4:
        if len(quote) < 20 or quote[0] >> 4 != 4:
            return None
        offset = (quote[0] & 0xF) * 4
        if offset < 20 or len(quote) < offset or (quote[6] << 8 | quote[7]) & 0x1FFF:
            return None
        protocol, source, target = quote[9], _MAPPED + quote[12:16], _MAPPED + quote[16:20]
        icmp = ICMP
    else:
        if len(quote) < 40 or quote[0] >> 4 != 6 or quote[6] in EXTENSIONS:
            return None
        offset, protocol, source, target = 40, quote[6], quote[8:24], quote[24:40]
        icmp = ICMPV6
    if protocol not in (TCP, UDP, icmp):
        return FlowTuple(source, target, 0, 0, protocol)
    if len(quote) < offset + 8:
        return None
    if protocol != icmp:
        source_port, target_port = struct.unpack_from("!HH", quote, offset)
        return FlowTuple(source, target, source_port, target_port, protocol)
    name = quote[offset + 4] << 8 | quote[offset + 5] if quote[offset] in ECHO[packet.family] else 0
    return FlowTuple(source, target, name, name, protocol)


# ---- rewriting and answering


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def checksum_replaced(old_sum: int, old: int, new: int) -> int:
    """The checksum after a 16-bit word changed (RFC 1624, equation 3)."""
    total = (old_sum ^ 0xFFFF) + (old ^ 0xFFFF) + new
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _patch(frame: bytearray, at: int, value: int, sum_at: int) -> None:
    """Write one byte, and keep the checksum at `sum_at` as right, or as wrong, as it was."""
    even = at & ~1
    old = frame[even] << 8 | frame[even + 1]
    frame[at] = value
    new = frame[even] << 8 | frame[even + 1]
    was = frame[sum_at] << 8 | frame[sum_at + 1]
    frame[sum_at : sum_at + 2] = checksum_replaced(was, old, new).to_bytes(2, "big")


def with_ttl(packet: Packet, ttl: int) -> bytes:
    """The frame with another TTL or hop limit."""
    frame = bytearray(packet.frame)
    if packet.family == 4:
        _patch(frame, ETHERNET + 8, ttl, ETHERNET + 10)
    else:
        frame[ETHERNET + 7] = ttl
    return bytes(frame)


def with_ethernet(frame: bytes, target_mac: int, source_mac: int) -> bytes:
    """The frame with other MACs."""
    return mac_bytes(target_mac) + mac_bytes(source_mac) + frame[12:]


def routed(packet: Packet, target_mac: int, router_mac: int, routers: int = 1) -> bytes:
    """The frame as the last of so many routers sends it on: each takes one from the TTL or hop limit."""
    return with_ethernet(with_ttl(packet, packet.ttl - routers), target_mac, router_mac)


def arp_reply(request: Packet, mac: int) -> bytes:
    """The answer to an ARP request: its target address is at `mac`. 42 bytes, without padding."""
    arp = request.arp
    assert arp is not None
    asker, owner = mac_bytes(arp.sender_mac), mac_bytes(mac)
    return b"".join(
        (asker, owner, b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x02", owner, arp.target[12:], asker, arp.sender[12:])
    )


def neighbour_advertisement(solicitation: Packet, mac: int, is_router: bool) -> bytes:
    """The answer to a neighbour solicitation: its target address is at `mac`. 86 bytes: solicited, override,
    with a target link-layer address option, without extension headers."""
    found = discovery(solicitation)
    assert found is not None
    owner = mac_bytes(mac)
    body = bytes((0xE0 if is_router else 0x60, 0, 0, 0)) + found.target + b"\x02\x01" + owner
    target = solicitation.flow.source
    pseudo = found.target + target + struct.pack("!II", len(body) + 4, ICMPV6)
    total = checksum(pseudo + bytes((ADVERTISEMENT, 0, 0, 0)) + body)
    return b"".join(
        (
            mac_bytes(solicitation.source_mac) + owner + b"\x86\xdd",
            struct.pack("!IHBB", 0x60000000, len(body) + 4, ICMPV6, 255) + found.target + target,
            struct.pack("!BBH", ADVERTISEMENT, 0, total) + body,
        )
    )


def echo_reply(request: Packet, passed: int = 0) -> bytes:
    """The answer to an echo request: the same frame with MACs and addresses swapped, TTL 255 less one for each router
    that it `passed`, and the type of a reply. All else stays as it was, options and padding too. So each fragment of a
    request becomes one of the answer: the checksum in the first is over all of them, and only the type changes it."""
    frame = bytearray(with_ttl(request, ROUTER_TTL - passed))
    frame[0:12] = frame[6:12] + frame[0:6]
    at, length = (ETHERNET + 12, 4) if request.family == 4 else (ETHERNET + 8, 16)
    frame[at : at + 2 * length] = frame[at + length : at + 2 * length] + frame[at : at + length]
    # A checksum is over 16-bit words from the ICMP header on, and that header is at an even offset.
    if request.fragment != LATER:
        _patch(frame, request.offset, ECHO[request.family][1], request.offset + 2)
    return bytes(frame)


# ---- carriage


@dataclass(frozen=True, slots=True)
class Carried:
    """A frame out of its VXLAN datagram. `ecn` is what the outer header says."""

    vni: int
    frame: bytes
    ecn: int


def carriage_source_port(packet: Packet) -> int:
    """The source port of the datagram that carries this packet (rule 7). What is itself carriage hands its
    own on, so that depth loses no entropy."""
    flow = packet.flow
    if packet.fragment == WHOLE and packet.is_carriage and flow.source_port >= FIRST_SOURCE_PORT:
        return flow.source_port
    return outer_source_port(spread(packet))


def spread(packet: Packet, seed: int = 0) -> int:
    """The flow hash of a packet (rule 7)."""
    return flow_hash(*hashed(packet), seed)


def hashed(packet: Packet) -> FlowTuple:
    """What the flow hash reads: of a fragment the same for all of its datagram, and without ports."""
    flow = packet.flow
    return flow if packet.fragment == WHOLE else flow._replace(source_port=0, target_port=0)


def encapsulate(
    frame: bytes,
    vni: int,
    source: Address,
    target: Address,
    source_port: int,
    ecn: int = 0,
    source_mac: int = 0,
    target_mac: int = 0,
) -> bytes:
    """The frame in a VXLAN datagram (RFC 7348) from one machine to another.

    +----------+--------------+-------+----------------------------------------+--------+
    | Ethernet | IPv4 or IPv6 | UDP   | 0x08 | 24 bits 0 | VNI, 24 bits | 0    | frame  |
    +----------+--------------+-------+----------------------------------------+--------+

    DSCP 0, ECN as given, DF, TTL 64, identification 0, UDP checksum 0.
    """
    vxlan = struct.pack("!II", 0x08000000, vni << 8)
    udp = struct.pack("!HHHH", source_port, CARRIAGE_PORT, 16 + len(frame), 0)
    size = 16 + len(frame)
    if source.version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, ecn, 20 + size, 0, 0x4000, 64, UDP, 0) + source.packed + target.packed
        head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
        ether_type = IPV4
    else:
        head = struct.pack("!IHBB", 6 << 28 | ecn << 20, size, UDP, 64) + source.packed + target.packed
        ether_type = IPV6
    return b"".join(
        (mac_bytes(target_mac), mac_bytes(source_mac), ether_type.to_bytes(2, "big"), head, udp, vxlan, frame)
    )


def decapsulate(packet: Packet) -> Carried | None:
    """The frame in a VXLAN datagram; None if the VXLAN header is not whole, its flags are not 0x08, or a
    reserved bit is set. `packet` must be UDP and no later fragment."""
    at = packet.offset + 8
    if packet.end < at + 8:
        return None
    flags, label = struct.unpack_from("!II", packet.frame, at)
    if flags != 0x08000000 or label & 0xFF:
        return None
    return Carried(label >> 8, packet.frame[at + 8 : packet.end], packet.ecn)


STACKED_BYTES = 48  # Of a packet whose lengths are ever set. Mirrors bpf/out.h.


def made_whole(frame: bytes) -> bytes:
    """A frame from a machine that is VXLAN itself and says that it is longer than it is, with the lengths that it has.

    So arrives the last segment of a large packet, from under several levels: whoever segments it copies what is between
    the outermost headers and the innermost packet. Its UDP checksum is left out then, over IPv4."""
    there = len(frame) - ETHERNET
    if there < STACKED_BYTES:
        return frame
    is_v4 = frame[12:15] == b"\x08\x00\x45" and not frame[20] & 0x3F and not frame[21] and frame[23] == UDP
    is_v6 = frame[12:14] == b"\x86\xdd" and frame[14] >> 4 == 6 and frame[20] == UDP
    at = ETHERNET + (40 if is_v6 else 20)
    if not (is_v4 or is_v6) or int.from_bytes(frame[at + 2 : at + 4], "big") != CARRIAGE_PORT:
        return frame
    size_at = ETHERNET + (4 if is_v6 else 2)
    said = int.from_bytes(frame[size_at : size_at + 2], "big")
    size = there - 40 if is_v6 else there
    if said <= size:
        return frame
    changed = bytearray(frame)
    changed[size_at : size_at + 2] = size.to_bytes(2, "big")
    changed[at + 4 : at + 6] = (there - (at - ETHERNET)).to_bytes(2, "big")
    if is_v4:
        was = int.from_bytes(frame[ETHERNET + 10 : ETHERNET + 12], "big")
        changed[ETHERNET + 10 : ETHERNET + 12] = checksum_replaced(was, said, size).to_bytes(2, "big")
        changed[at + 6 : at + 8] = bytes(2)
    return bytes(changed)


def with_outer_ecn(packet: Packet, outer: int) -> bytes | None:
    """The inner frame with what the outer header says about congestion (RFC 6040, figure 4), or None if it
    must be dropped.

                 outer: Not-ECT(0)  ECT(1)(1)   ECT(0)(2)   CE(3)
    inner Not-ECT        Not-ECT    Not-ECT     Not-ECT     drop
          ECT(1)         ECT(1)     ECT(1)      ECT(1)      CE
          ECT(0)         ECT(0)     ECT(1)      ECT(0)      CE
          CE             CE         CE          CE          CE
    """
    inner = packet.ecn
    if outer == 3 and inner == 0:
        return None
    new = 3 if outer == 3 and inner else 1 if (inner, outer) == (2, 1) else inner
    if new == inner:
        return packet.frame
    frame = bytearray(packet.frame)
    if packet.family == 4:
        _patch(frame, ETHERNET + 1, frame[ETHERNET + 1] & 0xFC | new, ETHERNET + 10)
    else:
        frame[ETHERNET + 1] = frame[ETHERNET + 1] & 0xCF | new << 4
    return bytes(frame)
