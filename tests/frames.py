"""Frames for tests, built from parts: quick, with right checksums, and as wrong as one asks for.

ethernet(dst, src, IPV4, ipv4(a, b, UDP, udp(a, b, 1, 2)))
ip_frame(dst, src, a, b, UDP, udp(a, b, 1, 2), ttl=3)         either family, by the addresses
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from nestnet.model import packet as pk
from nestnet.model.packet import ARP, ICMP, ICMPV6, IPV4, IPV6, TCP, UDP, checksum, mac_bytes
from nestnet.model.values import CARRIAGE_PORT, Address


def ethernet(target_mac: int, source_mac: int, ether_type: int, payload: bytes) -> bytes:
    return mac_bytes(target_mac) + mac_bytes(source_mac) + ether_type.to_bytes(2, "big") + payload


def ipv4(
    source: bytes,
    target: bytes,
    protocol: int,
    payload: bytes,
    ttl: int = 64,
    identification: int = 1,
    fragment: int = 0,
    tos: int = 0,
    options: bytes = b"",
) -> bytes:
    """`fragment` is the 16-bit field of flags and offset; `options` a multiple of 4 bytes."""
    size = 20 + len(options)
    head = struct.pack(
        "!BBHHHBBH", 0x40 | size // 4, tos, size + len(payload), identification, fragment, ttl, protocol, 0
    )
    head += source[-4:] + target[-4:] + options
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + payload


def ipv6(
    source: bytes, target: bytes, protocol: int, payload: bytes, ttl: int = 64, tos: int = 0, headers: bytes = b""
) -> bytes:
    """`protocol` is that of the first of `headers`, if there are any."""
    head = struct.pack("!IHBB", 6 << 28 | tos << 20, len(headers) + len(payload), protocol, ttl)
    return head + source + target + headers + payload


def extension(kind: int, following: int, identification: int = 1, fragment: int = 0) -> bytes:
    """The shortest extension header of a kind. `fragment`: offset in 8 bytes << 3 | more."""
    if kind == 44:
        return struct.pack("!BBHI", following, 0, fragment, identification)
    if kind == 51:
        return struct.pack("!BBHII", following, 1, 0, 1, 1)
    return bytes((following, 0, 1, 4, 0, 0, 0, 0))


def ip_frame(
    target_mac: int,
    source_mac: int,
    source: bytes,
    target: bytes,
    protocol: int,
    payload: bytes,
    ttl: int = 64,
    tos: int = 0,
) -> bytes:
    """Either family: that of the target address (16 bytes)."""
    if pk.is_mapped(target):
        return ethernet(target_mac, source_mac, IPV4, ipv4(source, target, protocol, payload, ttl, tos=tos))
    return ethernet(target_mac, source_mac, IPV6, ipv6(source, target, protocol, payload, ttl, tos=tos))


def summed(source: bytes, target: bytes, protocol: int, data: bytes, at: int) -> bytes:
    """A transport header and what follows, with its checksum at `at`."""
    if pk.is_mapped(target):
        pseudo = source[-4:] + target[-4:] + struct.pack("!HH", protocol, len(data))
    else:
        pseudo = source + target + struct.pack("!II", len(data), protocol)
    return data[:at] + checksum(pseudo + data).to_bytes(2, "big") + data[at + 2 :]


def tcp(
    source: bytes, target: bytes, source_port: int, target_port: int, flags: int = pk.ACK, payload: bytes = b""
) -> bytes:
    head = struct.pack("!HHIIBBHHH", source_port, target_port, 1, 1, 0x50, flags, 8192, 0, 0)
    return summed(source, target, TCP, head + payload, 16)


def udp(source: bytes, target: bytes, source_port: int, target_port: int, payload: bytes = b"") -> bytes:
    return summed(source, target, UDP, struct.pack("!HHHH", source_port, target_port, 8 + len(payload), 0) + payload, 6)


def icmp(source: bytes, target: bytes, type: int, code: int = 0, rest: bytes = bytes(4), payload: bytes = b"") -> bytes:
    """ICMP or ICMPv6, by the target address. `rest` is the second word: identifier and sequence of an echo."""
    data = bytes((type, code, 0, 0)) + rest + payload
    if pk.is_mapped(target):
        return data[:2] + checksum(data).to_bytes(2, "big") + data[4:]
    return summed(source, target, ICMPV6, data, 2)


def icmp_protocol(target: bytes) -> int:
    return ICMP if pk.is_mapped(target) else ICMPV6


def echo(source: bytes, target: bytes, identifier: int, reply: bool = False) -> bytes:
    type = pk.ECHO[4 if pk.is_mapped(target) else 6][reply]
    return icmp(source, target, type, rest=struct.pack("!HH", identifier, 1), payload=b"nestnet!")


def arp(
    operation: int, sender_mac: int, sender: Address | bytes, target_mac: int, target: Address | bytes, dst: int
) -> bytes:
    addresses = [a if isinstance(a, bytes) else pk.mapped(a) for a in (sender, target)]
    body = b"\x00\x01\x08\x00\x06\x04" + operation.to_bytes(2, "big")
    body += mac_bytes(sender_mac) + addresses[0][-4:] + mac_bytes(target_mac) + addresses[1][-4:]
    return ethernet(dst, sender_mac, ARP, body)


def neighbour(
    type: int, source: bytes, target: bytes, about: bytes, option: tuple[int, int] | None = None, flags: int = 0
) -> bytes:
    """The ICMPv6 of a solicitation (135) or advertisement (136) about an address. `option` is (type, MAC)."""
    payload = about + (bytes((option[0], 1)) + mac_bytes(option[1]) if option else b"")
    return icmp(source, target, type, rest=bytes((flags, 0, 0, 0)), payload=payload)


def tunnels(frame: bytes) -> Iterator[tuple[int, int]]:
    """Of each VXLAN around a frame, the outermost first: the bytes of IP that its headers say there are, and those that
    there are. Fails where its lengths, or its checksum, do not fit each other."""
    while True:
        six = frame[12:14] == IPV6.to_bytes(2, "big")
        head = 40 if six else 20
        port = int.from_bytes(frame[14 + head + 2 : 14 + head + 4], "big")
        if frame[20 if six else 23] != UDP or port != CARRIAGE_PORT:
            return
        said = int.from_bytes(frame[18:20], "big") + 40 if six else int.from_bytes(frame[16:18], "big")
        assert int.from_bytes(frame[14 + head + 4 : 14 + head + 6], "big") == said - head
        assert six or checksum(frame[14:34]) == 0
        yield said, len(frame) - 14
        frame = frame[14 + head + 16 :]


def solicited(address: bytes) -> bytes:
    """The solicited-node multicast address (RFC 4291)."""
    return bytes.fromhex("ff0200000000000000000001ff") + address[-3:]


def group_mac(address: bytes) -> int:
    """The MAC that a multicast address is sent to."""
    if pk.is_mapped(address):
        return 0x01005E000000 | int.from_bytes(address[-3:], "big") & 0x7FFFFF
    return 0x333300000000 | int.from_bytes(address[-4:], "big")
