"""The packet that a trace follows, as bytes: the first of a flow, with nothing in it."""

from __future__ import annotations

import struct

from nestnet.model.packet import IPV4, IPV6, checksum, mac_bytes
from nestnet.model.values import Address

Header = tuple[str, bytes]
"""Its name, and the bytes of it."""

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
SYN = 0x02


def opener(
    source_mac: int, target_mac: int, source: Address, target: Address, ttl: int, protocol: int, port: int, number: int
) -> list[Header]:
    """The headers of a frame: TCP with SYN, UDP or an echo request, from `port` to `number`, without payload.

    DSCP 0, identification 0, DF in IPv4; checksums filled in."""
    body = _transport(source, target, protocol, port, number)
    if source.version == 4:
        fields = (0x45, 0, 20 + len(body), 0, 0x4000, ttl, protocol, 0)
        head = struct.pack("!BBHHHBBH", *fields) + source.packed + target.packed
        head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
        ether_type = IPV4
    else:
        head = struct.pack("!IHBB", 6 << 28, len(body), protocol, ttl) + source.packed + target.packed
        ether_type = IPV6
    ethernet = mac_bytes(target_mac) + mac_bytes(source_mac) + ether_type.to_bytes(2, "big")
    names = {ICMP: "ICMP", TCP: "TCP", UDP: "UDP", ICMPV6: "ICMPv6"}
    return [("Ethernet", ethernet), (f"IPv{source.version}", head), (names[protocol], body)]


def outer(datagram: bytes, version: int) -> list[Header]:
    """The headers of a VXLAN datagram (model/packet.py, encapsulate) after Ethernet and before the frame in it."""
    size = 20 if version == 4 else 40
    ends = (14, 14 + size, 14 + size + 8, 14 + size + 16)
    names = (f"IPv{version}", "UDP", "VXLAN")
    return [(name, datagram[at:end]) for name, at, end in zip(names, ends, ends[1:], strict=False)]


def _transport(source: Address, target: Address, protocol: int, port: int, number: int) -> bytes:
    if protocol == TCP:
        at, body = 16, struct.pack("!HHIIBBHHH", port, number, 0, 0, 5 << 4, SYN, 65535, 0, 0)
    elif protocol == UDP:
        at, body = 6, struct.pack("!HHHH", port, number, 8, 0)
    else:
        at, body = 2, struct.pack("!BBHHH", 8 if protocol == ICMP else 128, 0, 0, 0, 1)
    summed = body
    if protocol != ICMP:  # all others sum a pseudo-header too (RFC 9293, 3.1; RFC 8200, 8.1)
        form = "!BBH" if source.version == 4 else "!I3xB"
        sizes = (0, protocol, len(body)) if source.version == 4 else (len(body), protocol)
        summed = source.packed + target.packed + struct.pack(form, *sizes) + body
    total = checksum(summed) or (0xFFFF if protocol == UDP else 0)
    return body[:at] + total.to_bytes(2, "big") + body[at + 2 :]
