"""The flow hash (rule 7): ours, so that every machine, every boot and every telling agrees.

The kernel's own skb hash is keyed per boot. This one runs over the 5-tuple as 32-bit words,
addresses as 16 bytes (IPv4 as ::ffff:a.b.c.d), and must stay equal to `flow_hash` in bpf/hash.h:

    source address (4 words) | destination address (4) | source port << 16 | destination port | protocol

Every fragment is hashed with ports 0, so that all of a datagram takes one path.
"""

from __future__ import annotations

from collections.abc import Iterable

FIRST_SOURCE_PORT = 49152  # RFC 7348 recommends the dynamic range.
SOURCE_PORTS = 16384

_MULTIPLIER = 0x9E3779B1  # 2^32 / golden ratio, odd: Knuth's multiplicative hash.


def mix(words: Iterable[int], seed: int = 0) -> int:
    """32-bit hash of 32-bit words."""
    h = seed ^ 0x811C9DC5
    for word in words:
        h = ((h ^ word) * _MULTIPLIER) & 0xFFFFFFFF
        h ^= h >> 15
    h = (h * 0x85EBCA6B) & 0xFFFFFFFF
    return h ^ h >> 13


def flow_hash(source: bytes, target: bytes, source_port: int, target_port: int, protocol: int, seed: int = 0) -> int:
    """32-bit hash of a 5-tuple; `source` and `target` are 16 bytes in network order."""
    both = source + target
    words = [int.from_bytes(both[i : i + 4], "big") for i in range(0, 32, 4)]
    return mix([*words, source_port << 16 | target_port, protocol], seed)


def outer_source_port(flow: int) -> int:
    """The UDP source port of the VXLAN datagram that carries a frame with this flow hash."""
    return FIRST_SOURCE_PORT + flow % SOURCE_PORTS
