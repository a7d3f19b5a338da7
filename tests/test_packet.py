"""`model/packet.py` against scapy, and on bytes that nobody meant."""

from __future__ import annotations

import logging
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

logging.getLogger("scapy").setLevel(logging.ERROR)

from scapy.layers.inet import ICMP, IP, TCP, UDP, defragment, fragment  # noqa: E402
from scapy.layers.inet6 import (  # noqa: E402
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH  # noqa: E402
from scapy.layers.l2 import ARP, Dot1Q, Ether  # noqa: E402
from scapy.layers.vxlan import VXLAN  # noqa: E402
from scapy.packet import Packet as Scapy  # noqa: E402
from scapy.packet import Raw  # noqa: E402

from nestnet.model import packet as pk  # noqa: E402

A, B, R = "02:00:00:00:00:01", "02:00:00:00:00:02", "06:00:00:00:00:03"
MAC_A, MAC_B, MAC_R = 0x020000000001, 0x020000000002, 0x060000000003


def ether(dst: str = B) -> Scapy:
    return Ether(src=A, dst=dst)


def address(text: str) -> bytes:
    return pk.mapped(ip_address(text))


def correct(frame: bytes) -> bool:
    """Would scapy compute the same checksums?"""
    again = Ether(frame)
    for layer, name in ((IP, "chksum"), (TCP, "chksum"), (ICMP, "chksum"), (ICMPv6ND_NA, "cksum")):
        if layer in again:
            again[layer].delfieldval(name)
    for layer6 in (ICMPv6EchoReply, ICMPv6EchoRequest):
        if layer6 in again:
            again[layer6].delfieldval("cksum")
    return bytes(again) == frame


CASES: dict[str, tuple[Scapy, dict[str, object]]] = {
    "tcp": (
        ether() / IP(src="10.0.0.1", dst="10.0.0.2", ttl=7, id=9, tos=1) / TCP(sport=1, dport=2, flags="S"),
        {
            "family": 4, "ttl": 7, "ecn": 1, "is_opening": True, "is_closing": False, "size": 40, "fragment": pk.WHOLE,
            "flow": pk.FlowTuple(address("10.0.0.1"), address("10.0.0.2"), 1, 2, 6),
        },
    ),
    "tcp with IPv4 options and padding": (
        ether() / IP(src="10.0.0.1", dst="10.0.0.2", options=b"\x94\x04\0\0") / TCP(flags="FA") / Raw(b"xy"),
        {"size": 46, "is_opening": False, "is_closing": True, "offset": 38},
    ),
    "carriage": (
        ether() / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=50000, dport=4789) / VXLAN(vni=7),
        {"is_carriage": True},
    ),
    "echo": (
        ether() / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(id=77),
        {"is_echo": True, "is_echo_request": True, "icmp_code": 0,
         "flow": pk.FlowTuple(address("10.0.0.1"), address("10.0.0.2"), 77, 77, 1)},
    ),
    "echo reply": (
        ether() / IP() / ICMP(type=0, id=77), {"is_echo": True, "is_echo_request": False, "is_icmp_error": False}
    ),
    "first fragment": (
        ether() / IP(flags="MF", id=5) / UDP(sport=3, dport=4), {"fragment": pk.FIRST, "identification": 5}
    ),
    "later fragment": (
        ether() / IP(flags="MF", id=5, frag=3, proto=17) / Raw(b"abc"),
        {"fragment": pk.LATER, "flaw": None, "icmp_type": -1,
         "flow": pk.FlowTuple(address("127.0.0.1"), address("127.0.0.1"), 0, 0, 17)},
    ),
    "udp over IPv6": (
        ether() / IPv6(src="fd00::1", dst="fd00::2", hlim=3, tc=2) / UDP(sport=3, dport=4) / Raw(b"abc"),
        {"family": 6, "ttl": 3, "ecn": 2, "size": 51,
         "flow": pk.FlowTuple(address("fd00::1"), address("fd00::2"), 3, 4, 17)},
    ),
    "extension headers": (
        ether() / IPv6(dst="fd00::2", src="fd00::1") / IPv6ExtHdrHopByHop() / IPv6ExtHdrRouting(addresses=[])
        / IPv6ExtHdrDestOpt() / AH(icv=b"123456789012", nh=17, payloadlen=4) / UDP(sport=3, dport=4),
        {"protocol": 17, "flaw": None, "offset": 14 + 40 + 24 + 24},
    ),
    "seven extension headers": (
        ether() / IPv6(dst="fd00::2", src="fd00::1", nh=0) / Raw((b"\0\0" + b"\1\4" + bytes(4)) * 7),
        {"flaw": "malformed"},
    ),
    "atomic fragment": (
        ether() / IPv6(dst="fd00::2", src="fd00::1") / IPv6ExtHdrFragment(id=8) / UDP(sport=3, dport=4),
        {"fragment": pk.WHOLE, "protocol": 17},
    ),
    "later IPv6 fragment": (
        ether() / IPv6(dst="fd00::2", src="fd00::1") / IPv6ExtHdrFragment(id=8, offset=4, nh=60) / Raw(b"x"),
        {"fragment": pk.LATER, "identification": 8, "protocol": 60, "flaw": None},
    ),
    "IPv4 truncated": (ether() / Raw(bytes(IP() / UDP())[:-1]), {"ether_type": 0x9000, "link_flaw": "ether_type"}),
    "tag": (ether() / Dot1Q(vlan=3) / IP(), {"link_flaw": "tagged"}),
    "control": (ether(dst="01:80:c2:00:00:0e") / IP(), {"link_flaw": "control_frame"}),
    "tagged comes before control": (ether(dst="01:80:c2:00:00:0e") / Dot1Q() / IP(), {"link_flaw": "tagged"}),
    "UDP short": (ether() / IP(proto=17) / Raw(b"1234567"), {"flaw": "malformed"}),
    "arp": (
        ether() / ARP(hwsrc=A, psrc="10.0.0.1", pdst="10.0.0.9"),
        {"arp": pk.Arp(1, MAC_A, address("10.0.0.1"), address("10.0.0.9")), "flaw": None},
    ),
    "arp for something else": (ether() / ARP(hwsrc=A, hwtype=6), {"arp": None, "flaw": "malformed"}),
    "short": (Raw(b"1234567890123"), {"link_flaw": "malformed"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parse(name: str) -> None:
    frame, expected = CASES[name]
    found = pk.parse(bytes(frame))
    assert {field: getattr(found, field) for field in expected} == expected


@given(st.binary(max_size=200), st.sampled_from([None, 0x0800, 0x86DD, 0x0806]), st.sampled_from([0x45, 0x60, 0x4F]))
def test_never_raises(noise: bytes, ether_type: int | None, first: int) -> None:
    frame = noise
    if ether_type is not None:
        frame = bytes(12) + ether_type.to_bytes(2, "big") + bytes([first]) + noise
    packet = pk.parse(frame)
    if packet.link_flaw is None and packet.flaw is None:
        assert packet.offset <= packet.end <= len(frame)
        if packet.family:
            pk.quoted(packet)
            pk.carriage_source_port(packet)
        if packet.is_discovery:
            pk.discovery(packet)
        if packet.protocol == 17 and packet.fragment != pk.LATER:
            pk.decapsulate(packet)


@given(st.data())
def test_damaged_frames_never_raise(data: st.DataObject) -> None:
    frame = bytearray(bytes(data.draw(st.sampled_from([frame for frame, _ in CASES.values()]))))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    test_never_raises.hypothesis.inner_test(  # type: ignore[attr-defined]
        bytes(frame[: data.draw(st.integers(0, len(frame)))]), None, 0
    )


@pytest.mark.parametrize("ttl", [2, 64, 255])
@pytest.mark.parametrize("identification", range(0, 65536, 4099))
def test_routed(ttl: int, identification: int) -> None:
    for ip in (IP(src="10.0.0.1", dst="10.1.0.2", ttl=ttl, id=identification), IPv6(src="fd00::1", hlim=ttl)):
        frame = pk.routed(pk.parse(bytes(ether(dst=R) / ip / TCP(flags="S"))), MAC_B, MAC_R)
        assert correct(frame)
        seen = Ether(frame)
        assert (seen.dst, seen.src) == (B, R)
        assert pk.parse(frame).ttl == ttl - 1


def test_arp_reply() -> None:
    request = ether(dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=A, psrc="10.0.0.1", pdst="10.0.0.9") / Raw(bytes(18))
    expected = Ether(src=B, dst=A) / ARP(op=2, hwsrc=B, psrc="10.0.0.9", hwdst=A, pdst="10.0.0.1")
    assert pk.arp_reply(pk.parse(bytes(request)), MAC_B) == bytes(expected)


@pytest.mark.parametrize("router", [False, True])
def test_neighbour_advertisement(router: bool) -> None:
    ns = ether(dst="33:33:ff:00:00:09") / IPv6(src="fd00::1", dst="ff02::1:ff00:9") / ICMPv6ND_NS(tgt="fd00::9")
    expected = (
        Ether(src=B, dst=A)
        / IPv6(src="fd00::9", dst="fd00::1", hlim=255)
        / ICMPv6ND_NA(tgt="fd00::9", R=int(router), S=1, O=1)
        / ICMPv6NDOptDstLLAddr(lladdr=B)
    )
    for solicitation in (ns, ns / ICMPv6NDOptSrcLLAddr(lladdr=A)):
        assert pk.neighbour_advertisement(pk.parse(bytes(solicitation)), MAC_B, router) == bytes(expected)


def test_discovery() -> None:
    ns = ether() / IPv6(src="fd00::1", dst="fd00::9") / ICMPv6ND_NS(tgt="fd00::9")

    def found(frame: Scapy) -> pk.Discovery | None:
        packet = pk.parse(bytes(frame))
        assert packet.is_discovery
        return pk.discovery(packet)

    assert found(ns) == pk.Discovery(address("fd00::9"), None)
    assert found(ns / ICMPv6NDOptSrcLLAddr(lladdr=B)) == pk.Discovery(address("fd00::9"), MAC_B)
    assert found(ns / ICMPv6NDOptDstLLAddr(lladdr=B)) == pk.Discovery(address("fd00::9"), None)
    two = ns / ICMPv6NDOptSrcLLAddr(lladdr=A) / ICMPv6NDOptSrcLLAddr(lladdr=B)
    assert found(two) == pk.Discovery(address("fd00::9"), MAC_A), "the first counts"
    assert found(ns / Raw(b"\1\0" + bytes(6))) is None, "length 0"
    assert found(ns / Raw(b"\1\2" + bytes(6))) is None, "not whole"
    assert found(ns / Raw(b"\1")) is None
    low = ns.copy()
    low[IPv6].hlim = 254
    assert found(low) is None
    coded = ns.copy()
    coded[ICMPv6ND_NS].code = 1
    assert found(coded) is None


@pytest.mark.parametrize("size", [0, 1, 56])
def test_echo_reply(size: int) -> None:
    request = (
        ether(dst=R) / IP(src="10.0.0.1", dst="10.0.0.254", ttl=3, id=4, tos=2) / ICMP(id=3, seq=9) / Raw(b"x" * size)
    )
    reply = Ether(src=R, dst=A) / IP(src="10.0.0.254", dst="10.0.0.1", ttl=255, id=4, tos=2) / ICMP(type=0, id=3, seq=9)
    assert pk.echo_reply(pk.parse(bytes(request))) == bytes(reply / Raw(b"x" * size))
    request6 = (
        ether(dst=R) / IPv6(src="fd00::1", dst="fd00::9", hlim=3) / ICMPv6EchoRequest(id=3, seq=9, data=b"x" * size)
    )
    reply6 = (
        Ether(src=R, dst=A)
        / IPv6(src="fd00::9", dst="fd00::1", hlim=255)
        / ICMPv6EchoReply(id=3, seq=9, data=b"x" * size)
    )
    assert pk.echo_reply(pk.parse(bytes(request6))) == bytes(reply6)


def test_echo_reply_of_fragments_is_that_of_all() -> None:
    whole = IP(src="10.0.0.1", dst="10.0.0.254", id=4) / ICMP(id=3, seq=9) / Raw(bytes(range(250)) * 16)
    answers = []
    for number, part in enumerate(fragment(whole, fragsize=1448)):  # type: ignore[no-untyped-call]
        packet = pk.parse(bytes(ether(dst=R) / part))
        packet = packet if number == 0 else pk.with_first(packet, packet.flow, 8)
        assert packet.is_echo_request
        answers.append(Ether(pk.echo_reply(packet))[IP])
    assert len(answers) == 3
    expected = IP(src="10.0.0.254", dst="10.0.0.1", id=4, ttl=255) / ICMP(type=0, id=3, seq=9) / whole[Raw]
    (got,) = defragment(answers)  # type: ignore[no-untyped-call]
    del got[IP].chksum
    assert bytes(got) == bytes(expected)


def test_a_wrong_checksum_stays_wrong() -> None:
    request = ether(dst=R) / IP(src="10.0.0.1", dst="10.0.0.254") / ICMP(id=3, chksum=1)
    assert not correct(pk.echo_reply(pk.parse(bytes(request))))


QUOTES: dict[str, tuple[Scapy, pk.FlowTuple | None]] = {
    "udp": (
        IP(src="10.0.0.2", dst="10.0.0.1") / UDP(sport=5, dport=6),
        pk.FlowTuple(address("10.0.0.2"), address("10.0.0.1"), 5, 6, 17),
    ),
    "tcp, 8 bytes of it": (
        Raw(bytes(IP(src="10.0.0.2", dst="10.0.0.1") / TCP(sport=5, dport=6))[:28]),
        pk.FlowTuple(address("10.0.0.2"), address("10.0.0.1"), 5, 6, 6),
    ),
    "tcp, 7 bytes of it": (Raw(bytes(IP(src="10.0.0.2", dst="10.0.0.1") / TCP(sport=5, dport=6))[:27]), None),
    "echo": (
        IP(src="10.0.0.2", dst="10.0.0.1") / ICMP(id=5),
        pk.FlowTuple(address("10.0.0.2"), address("10.0.0.1"), 5, 5, 1),
    ),
    "another protocol": (
        IP(src="10.0.0.2", dst="10.0.0.1", proto=47),
        pk.FlowTuple(address("10.0.0.2"), address("10.0.0.1"), 0, 0, 47),
    ),
    "later fragment": (IP(src="10.0.0.2", dst="10.0.0.1", frag=2, proto=17) / Raw(bytes(8)), None),
    "nothing": (Raw(b""), None),
    "other family": (IPv6() / UDP(), None),
}


@pytest.mark.parametrize("name", QUOTES)
def test_quoted(name: str) -> None:
    quote, expected = QUOTES[name]
    packet = pk.parse(bytes(ether() / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=3) / Raw(bytes(quote))))
    assert packet.is_icmp_error
    assert pk.quoted(packet) == expected


@pytest.mark.parametrize("ecn", range(4))
def test_vxlan(ecn: int) -> None:
    inner = bytes(ether() / IP() / UDP())
    frame = pk.encapsulate(
        inner, 77, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"), 50000, ecn, source_mac=MAC_A, target_mac=MAC_B
    )
    expected = (
        ether()
        / IP(src="192.0.2.1", dst="192.0.2.2", ttl=64, id=0, flags="DF", tos=ecn)
        / UDP(sport=50000, dport=4789, chksum=0)
        / VXLAN(vni=77, flags=8)
        / Raw(inner)
    )
    assert frame == bytes(expected)
    outer = pk.parse(frame)
    assert outer.is_carriage
    assert pk.decapsulate(outer) == pk.Carried(77, inner, ecn)
    frame = pk.encapsulate(inner, 77, IPv6Address("fd00::1"), IPv6Address("fd00::2"), 50000, ecn, MAC_A, MAC_B)
    assert frame == bytes(
        ether() / IPv6(src="fd00::1", dst="fd00::2", hlim=64, tc=ecn) / UDP(sport=50000, dport=4789, chksum=0)
        / VXLAN(vni=77, flags=8) / Raw(inner)
    )  # fmt: skip
    assert pk.decapsulate(pk.parse(frame)) == pk.Carried(77, inner, ecn)


@pytest.mark.parametrize(
    "header", [b"\x00" * 8, b"\x0c" + bytes(7), b"\x08" + bytes(6) + b"\1", b"\x08\1" + bytes(6), b"\x08"]
)
def test_vxlan_refused(header: bytes) -> None:
    assert pk.decapsulate(pk.parse(bytes(ether() / IP() / UDP(dport=4789) / Raw(header)))) is None


DECAPSULATION = {0: (0, 0, 0, None), 1: (1, 1, 1, 3), 2: (2, 1, 2, 3), 3: (3, 3, 3, 3)}  # inner -> by outer


@pytest.mark.parametrize(
    ("inner", "outer", "result"),
    [(inner, outer, result) for inner, row in DECAPSULATION.items() for outer, result in enumerate(row)],
)
def test_outer_ecn(inner: int, outer: int, result: int | None) -> None:
    for ip in (IP(tos=0x54 | inner), IPv6(tc=0x54 | inner)):
        frame = pk.with_outer_ecn(pk.parse(bytes(ether() / ip / UDP())), outer)
        if result is None:
            assert frame is None
        else:
            assert frame is not None
            assert pk.parse(frame).ecn == result
            assert frame[15] & 0xFC == 0x54 or frame[14] << 8 & 0xF00 | frame[15] & 0xC0 == 0x540
            assert correct(frame)


def test_no_ipv4_address_is_in_an_ipv6_prefix() -> None:
    assert pk.contains(ip_network("0.0.0.0/0"), address("10.0.0.1"))
    assert not pk.contains(ip_network("::/0"), address("10.0.0.1"))
    assert not pk.contains(ip_network("0.0.0.0/0"), address("fd00::1"))
    assert pk.contains(ip_network("::/0"), address("fd00::1"))
    assert pk.contains(ip_network("10.0.0.0/31"), address("10.0.0.1"))
    assert not pk.contains(ip_network("10.0.0.0/31"), address("10.0.0.2"))


def test_carriage_hands_its_source_port_on() -> None:
    def port(*layers: Scapy) -> int:
        frame: Scapy = ether() / IP(src="10.0.0.1", dst="10.0.0.2")
        for layer in layers:
            frame /= layer
        return pk.carriage_source_port(pk.parse(bytes(frame)))

    assert port(UDP(sport=50001, dport=4789)) == 50001
    assert 49152 <= port(UDP(sport=5, dport=4789)) <= 65535
    assert port(UDP(sport=5, dport=6)) != port(UDP(sport=5, dport=7))
