"""What routers say about packets that end at them: ICMP errors (RFC 792, RFC 1812; ICMPv6: RFC 4443).

    may_be_told     is this a packet whose sender may be told anything?
    icmp_error      the frame that tells it
    MESSAGES        which type and code tells which reason

    0                14               34 (54)                    42 (62)
    | Ethernet       | IPv4 (IPv6)    | type code sum  rest      | the packet, from its IP header on
    | to the sender  | router, sender |                MTU or 0  |
    +----------------+----------------+--------------------------+---------------------------------+

The packet is quoted as the router met it, each router before having taken one from its TTL, as far as the whole
message has at most 576 bytes (IPv4, RFC 1812 section 4.3.2.3) or 1280 (IPv6, RFC 4443 section 2.4).
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, ip_network

from nestnet.model.clock import SECOND
from nestnet.model.packet import (
    ETHERNET,
    ICMP,
    ICMPV6,
    LATER,
    ROUTER_TTL,
    TCP,
    UDP,
    Packet,
    checksum,
    contains,
    mac_bytes,
    with_ttl,
)

DUMMY = IPv4Address("192.0.0.8")
"""Who says it, if a router has no IPv4 address at all (RFC 7600)."""

LONGEST = {4: 576, 6: 1280}  # bytes of a message, its IP header among them

# Every machine limits what it tells a port: so many in a second, twice as many at once, which is more than traceroute
# asks of the 63 routers of a way, three times each.
PER_SECOND = 100
COST_NS = SECOND // PER_SECOND
BURST_NS = 2 * SECOND

MESSAGES: dict[str, dict[int, tuple[int, int]]] = {
    "no_route": {4: (3, 0), 6: (1, 0)},  # network unreachable; no route to destination
    "unreachable": {4: (3, 1), 6: (1, 3)},  # host unreachable; address unreachable
    "router_local": {4: (3, 3), 6: (1, 4)},  # port unreachable
    "too_big": {4: (3, 4), 6: (2, 0)},  # fragmentation needed; packet too big
    "ttl_expired": {4: (11, 0), 6: (3, 0)},  # TTL, or hop limit, exceeded in transit
}
"""Reason of a drop -> family -> type and code. For all other reasons a network is silent."""

PROTOCOL_UNREACHABLE = (3, 2)  # IPv4; what a router is sent that is neither TCP nor UDP. IPv6 has no such code.

_NO_SENDER = tuple(ip_network(p) for p in ("fe80::/10", "169.254.0.0/16", "::/128", "0.0.0.0/32"))
_NO_DESTINATION = tuple(ip_network(p) for p in ("224.0.0.0/4", "255.255.255.255/32", "ff00::/8"))


def may_be_told(packet: Packet, reason: str) -> bool:
    """Not about ICMP errors and later fragments, nor what is for many, nor to a source that is nobody's or passes no
    router (RFC 1122 section 3.2.2, RFC 4443 section 2.4e); and a router's own address ignores ICMP that it does
    not know."""
    source, target = packet.flow.source, packet.flow.target
    return not (
        packet.is_icmp_error_kind
        or packet.fragment == LATER
        or (reason == "router_local" and packet.is_icmp)
        or any(contains(prefix, source) for prefix in _NO_SENDER)
        or any(contains(prefix, target) for prefix in _NO_DESTINATION)
    )


def icmp_error(packet: Packet, reason: str, source: bytes, router_mac: int, passed: int, mtu: int = 0) -> bytes:
    """What the sender of a packet gets for this reason from a router at `source` (16 bytes), `passed` routers before it
    having taken one from the TTL. `mtu` in bytes is told of what is too big."""
    family = packet.family
    kind, code = MESSAGES[reason][family]
    if reason == "router_local" and family == 4 and packet.protocol not in (TCP, UDP):
        kind, code = PROTOCOL_UNREACHABLE
    room = LONGEST[family] - 8 - (20 if family == 4 else 40)
    quote = with_ttl(packet, packet.ttl - passed)[ETHERNET : packet.end][:room]
    rest = mtu if reason == "too_big" else 0
    body = struct.pack("!I", rest) + quote
    target, ttl = packet.flow.source, ROUTER_TTL - passed
    head = mac_bytes(packet.source_mac) + mac_bytes(router_mac)
    if family == 4:
        sum_ = checksum(struct.pack("!BBH", kind, code, 0) + body)
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 24 + len(body), 0, 0x4000, ttl, ICMP, 0) + source[12:] + target[12:]
        head += b"\x08\x00" + ip[:10] + checksum(ip).to_bytes(2, "big") + ip[12:]
    else:
        pseudo = source + target + struct.pack("!II", 4 + len(body), ICMPV6)
        sum_ = checksum(pseudo + struct.pack("!BBH", kind, code, 0) + body)
        head += b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, 4 + len(body), ICMPV6, ttl) + source + target
    return head + struct.pack("!BBH", kind, code, sum_) + body
