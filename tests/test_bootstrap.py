"""What workloads are told in the beginning: by the fields that scapy reads, and never anything for anybody else."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_interface
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dhcp6 import (
    DUID_LL,
    DHCP6_Advertise,
    DHCP6_Confirm,
    DHCP6_Decline,
    DHCP6_InfoRequest,
    DHCP6_Rebind,
    DHCP6_Release,
    DHCP6_Renew,
    DHCP6_Reply,
    DHCP6_Request,
    DHCP6_Solicit,
    DHCP6OptClientId,
    DHCP6OptDNSServers,
    DHCP6OptIA_NA,
    DHCP6OptIA_PD,
    DHCP6OptIA_TA,
    DHCP6OptIAAddress,
    DHCP6OptRapidCommit,
    DHCP6OptServerId,
    DHCP6OptStatusCode,
)
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import (
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptMTU,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptRDNSS,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from nestnet.model.bootstrap import NOBODY_MAC, Settings, advertisement, answer
from nestnet.model.values import link_local

MAC, ROUTER = 0x020000000011, 0x060000000001
RECORD = Settings(
    MAC,
    1430,
    tuple(map(ip_interface, ("10.0.0.17/24", "fd00::11/64", "10.0.0.18/24", "fd00::12/64"))),
    (IPv4Address("10.0.0.1"), IPv6Address("fd00::1")),
    (IPv4Address("10.0.0.53"), IPv6Address("fd00::53"), IPv4Address("192.0.2.53")),
    ROUTER,
)
ALONE = replace(RECORD, gateways=(), server=NOBODY_MAC)
FOR_EVER = 0xFFFFFFFF


def text(mac: int) -> str:
    return mac.to_bytes(6, "big").hex(":")


def ask(record: Settings, asked: Any) -> Any:
    """The answer, with checksums that scapy has found right."""
    told = answer(record, bytes(asked))
    return None if told is None else right(told)


def right(told: bytes) -> Any:
    read = Ether(told)
    again = Ether(told)
    for layer in (IP, UDP, ICMPv6ND_RA):
        if layer in again:
            again[layer].fields.pop("chksum" if layer is not ICMPv6ND_RA else "cksum")
    assert bytes(Ether(bytes(again))) == told
    return read


# ---- DHCPv4


def dhcp4(kind: str, *options: Any, source: str = "0.0.0.0", target: str = "255.255.255.255", **fields: Any) -> Any:
    head = {"chaddr": MAC.to_bytes(6, "big"), "xid": 0x1234, **fields}
    frame = Ether(src=text(MAC), dst="ff:ff:ff:ff:ff:ff") / IP(src=source, dst=target) / UDP(sport=68, dport=67)
    return frame / BOOTP(**head) / DHCP(options=[("message-type", kind), *options, "end"])


def options4(told: Any) -> dict[str, Any]:
    found = {}
    for option in told[DHCP].options:
        if isinstance(option, tuple):
            found[option[0]] = option[1] if len(option) == 2 else list(option[1:])
    return found


SERVER = ("server_id", "10.0.0.1")
OWN = ("requested_addr", "10.0.0.17")


def test_discover() -> None:
    told = ask(RECORD, dhcp4("discover", ("param_req_list", [1, 3, 121]), ("client_id", b"\1who")))
    assert (told.src, told.dst) == (text(ROUTER), text(MAC))
    assert (told[IP].src, told[IP].dst, told[UDP].sport, told[UDP].dport) == ("10.0.0.1", "10.0.0.17", 67, 68)
    assert (told[BOOTP].op, told[BOOTP].xid, told[BOOTP].yiaddr, told[BOOTP].siaddr) == (
        2,
        0x1234,
        "10.0.0.17",
        "0.0.0.0",
    )
    assert told[BOOTP].chaddr[:6] == MAC.to_bytes(6, "big")
    assert options4(told) == {
        "message-type": 2,
        "server_id": "10.0.0.1",
        "lease_time": FOR_EVER,
        "subnet_mask": "255.255.255.0",
        "router": "10.0.0.1",
        "classless_static_routes": ["0.0.0.0/0:10.0.0.1"],
        "interface-mtu": 1430,
        "name_server": ["10.0.0.53", "192.0.2.53"],
        "client_id": b"\1who",
    }
    assert len(bytes(told[UDP])) >= 308


def test_without_a_router_a_server_is_named_all_the_same() -> None:
    told = ask(ALONE, dhcp4("discover", ("param_req_list", [3, 121])))
    assert (told.src, told[IP].src) == (text(NOBODY_MAC), "192.0.0.8")
    assert options4(told)["server_id"] == "192.0.0.8"
    assert not options4(told).keys() & {"router", "classless_static_routes"}


ACK, NAK = 5, 6


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dhcp4("request", OWN, SERVER), ACK),
        (dhcp4("request", ("requested_addr", "10.0.0.18"), SERVER), NAK),
        (dhcp4("request", SERVER), NAK),
        (dhcp4("request", OWN, ("server_id", "10.0.0.99")), None),
        (dhcp4("request", OWN), ACK),
        (dhcp4("request", ("requested_addr", "10.9.0.1")), NAK),
        (dhcp4("request", OWN, ciaddr="10.0.0.17"), NAK),
        (dhcp4("request", ciaddr="10.0.0.17", source="10.0.0.17", target="10.0.0.1"), ACK),
        (dhcp4("request", ciaddr="10.0.0.17", source="10.0.0.17"), ACK),
        (dhcp4("request", ciaddr="10.0.0.18", source="10.0.0.18"), NAK),
        (dhcp4("inform", ciaddr="10.0.0.17", source="10.0.0.17"), ACK),
        (dhcp4("inform", ciaddr="10.0.0.99", source="10.0.0.17"), None),
        (dhcp4("inform"), None),
        (dhcp4("release", ciaddr="10.0.0.17", source="10.0.0.17", target="10.0.0.1"), None),
        (dhcp4("decline", OWN, SERVER), None),
        (dhcp4("offer"), None),
        (dhcp4("discover", target="10.0.0.18", source="10.0.0.17"), None),
        (dhcp4("discover", chaddr=b"\2\0\0\0\0\x12"), None),
        (dhcp4("discover", giaddr="10.0.0.1"), None),
        (dhcp4("discover", op=2), None),
        (dhcp4("discover", htype=6), None),
        (dhcp4("discover", options=b"nope"), None),
        (bytes(dhcp4("discover"))[:-1], None),
        (dhcp4("discover") / Raw(bytes(40)), 2),
    ],
)
def test_who_gets_what(asked: Any, said: int | None) -> None:
    told = ask(RECORD, asked)
    if said is None:
        assert told is None
        return
    options = options4(told)
    assert options["message-type"] == said
    if said == NAK:
        assert options.keys() == {"message-type", "server_id"}
        assert (told.dst, told[IP].dst, told[BOOTP].yiaddr) == ("ff:ff:ff:ff:ff:ff", "255.255.255.255", "0.0.0.0")
    else:
        assert told[IP].dst == "10.0.0.17"


def test_who_cannot_hear_by_its_mac_is_answered_by_broadcast() -> None:
    told = ask(RECORD, dhcp4("discover", flags=0x8000))
    assert (told.dst, told[IP].dst, told[BOOTP].flags) == ("ff:ff:ff:ff:ff:ff", "255.255.255.255", 0x8000)


def test_inform_gives_no_address_and_no_lease() -> None:
    told = ask(RECORD, dhcp4("inform", ciaddr="10.0.0.17", source="10.0.0.17"))
    assert told[BOOTP].yiaddr == "0.0.0.0"
    assert "lease_time" not in options4(told)
    assert options4(told)["name_server"] == ["10.0.0.53", "192.0.2.53"]


# ---- DHCPv6

ME = DHCP6OptClientId(duid=DUID_LL(lladdr=text(MAC)))
YOU = DHCP6OptServerId(duid=DUID_LL(lladdr=text(NOBODY_MAC)))
LINK_LOCAL = str(link_local(MAC))


def dhcp6(message: Any, *options: Any, target: str = "ff02::1:2") -> Any:
    frame = Ether(src=text(MAC), dst="33:33:00:01:00:02") / IPv6(src=LINK_LOCAL, dst=target)
    frame = frame / UDP(sport=546, dport=547) / message
    for option in options:
        frame = frame / option
    return frame


def association(iaid: int, *addresses: str) -> Any:
    return DHCP6OptIA_NA(iaid=iaid, T1=1, T2=2, ianaopts=[DHCP6OptIAAddress(addr=a) for a in addresses])


def addresses6(option: Any) -> dict[str, int]:
    return {one.addr: one.validlft for one in option.ianaopts if isinstance(one, DHCP6OptIAAddress)}


def test_solicit() -> None:
    told = ask(RECORD, dhcp6(DHCP6_Solicit(trid=0x123456), ME, association(7, "fd00::99")))
    assert (told.src, told.dst) == (text(ROUTER), text(MAC))
    assert (told[IPv6].src, told[IPv6].dst) == (str(link_local(ROUTER)), LINK_LOCAL)
    assert (told[UDP].sport, told[UDP].dport) == (547, 546)
    assert told[DHCP6_Advertise].trid == 0x123456
    assert bytes(told[DHCP6OptClientId].duid) == bytes(ME.duid)
    assert bytes(told[DHCP6OptServerId].duid) == bytes(YOU.duid)
    given_ = told[DHCP6OptIA_NA]
    assert (given_.iaid, given_.T1, given_.T2) == (7, FOR_EVER, FOR_EVER)
    assert addresses6(given_) == {"fd00::11": FOR_EVER, "fd00::12": FOR_EVER}
    assert told[DHCP6OptDNSServers].dnsservers == ["fd00::53"]
    assert DHCP6OptRapidCommit not in told


def test_rapid_commit() -> None:
    told = ask(RECORD, dhcp6(DHCP6_Solicit(), ME, association(1), DHCP6OptRapidCommit()))
    assert DHCP6_Reply in told
    assert DHCP6OptRapidCommit in told


@pytest.mark.parametrize(
    ("asked", "valid"),
    [
        (dhcp6(DHCP6_Request(), ME, YOU, association(1)), {"fd00::11": FOR_EVER, "fd00::12": FOR_EVER}),
        (dhcp6(DHCP6_Request(), ME, YOU, association(1, "fd00::99")), {"fd00::11": FOR_EVER, "fd00::12": FOR_EVER}),
        (
            dhcp6(DHCP6_Renew(), ME, YOU, association(1, "fd00::12", "fd00::99")),
            {"fd00::11": FOR_EVER, "fd00::12": FOR_EVER, "fd00::99": 0},
        ),
        (
            dhcp6(DHCP6_Rebind(), ME, association(1, "fd00::99")),
            {"fd00::11": FOR_EVER, "fd00::12": FOR_EVER, "fd00::99": 0},
        ),
    ],
    ids=["request", "request of another's", "renew", "rebind"],
)
def test_addresses_are_the_ports(asked: Any, valid: dict[str, int]) -> None:
    told = ask(RECORD, asked)
    assert DHCP6_Reply in told
    assert addresses6(told[DHCP6OptIA_NA]) == valid


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (dhcp6(DHCP6_Confirm(), ME, association(1, "fd00::11")), 0),
        (dhcp6(DHCP6_Confirm(), ME, association(1, "fd00::11", "fd00::99")), 4),
        (dhcp6(DHCP6_Release(), ME, YOU, association(1, "fd00::11")), 0),
        (dhcp6(DHCP6_Decline(), ME, YOU, association(1, "fd00::11")), 0),
    ],
    ids=["confirm", "confirm of another's", "release", "decline"],
)
def test_statuses(asked: Any, status: int) -> None:
    told = ask(RECORD, asked)
    assert DHCP6_Reply in told
    assert told[DHCP6OptStatusCode].statuscode == status
    assert DHCP6OptIA_NA not in told


def test_one_association_has_all_addresses() -> None:
    others = (association(2), DHCP6OptIA_TA(iaid=3), DHCP6OptIA_PD(iaid=4))
    told = ask(RECORD, dhcp6(DHCP6_Solicit(), ME, association(1), *others))
    first = told[DHCP6OptIA_NA]
    assert addresses6(first) == {"fd00::11": FOR_EVER, "fd00::12": FOR_EVER}
    second = first.payload[DHCP6OptIA_NA]
    assert (second.iaid, second.ianaopts[0].statuscode) == (2, 2)
    assert told[DHCP6OptIA_TA].iataopts[0].statuscode == 2
    assert told[DHCP6OptIA_PD].iapdopt[0].statuscode == 6


def test_information() -> None:
    told = ask(RECORD, dhcp6(DHCP6_InfoRequest()))
    assert told[DHCP6OptDNSServers].dnsservers == ["fd00::53"]
    assert DHCP6OptIA_NA not in told


@pytest.mark.parametrize(
    "asked",
    [
        dhcp6(DHCP6_Solicit(), association(1)),
        dhcp6(DHCP6_Solicit(), ME, YOU, association(1)),
        dhcp6(DHCP6_Request(), ME, association(1)),
        dhcp6(DHCP6_Request(), ME, DHCP6OptServerId(duid=DUID_LL(lladdr=text(ROUTER))), association(1)),
        dhcp6(DHCP6_Renew(), YOU, association(1)),
        dhcp6(DHCP6_Confirm(), ME, association(1)),
        dhcp6(DHCP6_InfoRequest(), ME, association(1)),
        dhcp6(DHCP6_Reply(), ME, YOU, association(1)),
        dhcp6(DHCP6_Solicit(), ME, association(1), target="fd00::12"),
        dhcp6(DHCP6_Solicit(), DHCP6OptClientId(duid=Raw(b"x")), association(1)),
        dhcp6(DHCP6_Solicit(), DHCP6OptClientId(duid=Raw(bytes(131))), association(1)),
        dhcp6(DHCP6_Solicit(), ME, *(association(number) for number in range(9))),
        dhcp6(DHCP6_Solicit(), ME, Raw(b"\0\3\0\4abcd")),
        dhcp6(DHCP6_Solicit(), ME, Raw(b"\0\3\0\x50abcd")),
        dhcp6(DHCP6_Solicit(), ME, Raw(b"\0")),
    ],
)
def test_what_is_not_answered(asked: Any) -> None:
    assert ask(RECORD, asked) is None


# ---- router advertisements


def rs(*options: Any, source: str = LINK_LOCAL, target: str = "ff02::2", **ip: Any) -> Any:
    frame = Ether(src=text(MAC), dst="33:33:00:00:00:02") / IPv6(src=source, dst=target, hlim=255, **ip) / ICMPv6ND_RS()
    for option in options:
        frame = frame / option
    return frame


def test_advertisement() -> None:
    told = ask(RECORD, rs(ICMPv6NDOptSrcLLAddr(lladdr=text(MAC))))
    assert (told.src, told.dst) == (text(ROUTER), text(MAC))
    assert (told[IPv6].src, told[IPv6].dst, told[IPv6].hlim) == (str(link_local(ROUTER)), LINK_LOCAL, 255)
    said = told[ICMPv6ND_RA]
    assert (said.chlim, said.M, said.O, said.routerlifetime) == (64, 1, 1, 65535)
    assert told[ICMPv6NDOptSrcLLAddr].lladdr == text(ROUTER)
    assert told[ICMPv6NDOptMTU].mtu == 1430
    prefix = told[ICMPv6NDOptPrefixInfo]
    assert (prefix.prefix, prefix.prefixlen, prefix.L, prefix.A) == ("fd00::", 64, 1, 0)
    assert (prefix.validlifetime, prefix.preferredlifetime) == (FOR_EVER, FOR_EVER)
    assert ICMPv6NDOptPrefixInfo not in prefix.payload
    assert (told[ICMPv6NDOptRDNSS].dns, told[ICMPv6NDOptRDNSS].lifetime) == (["fd00::53"], FOR_EVER)


def test_without_a_router_there_is_no_default_route() -> None:
    told = ask(ALONE, rs())
    assert told[ICMPv6ND_RA].routerlifetime == 0
    assert told[ICMPv6NDOptPrefixInfo].prefix == "fd00::"


def test_who_has_no_address_is_answered_with_all_nodes() -> None:
    told = ask(RECORD, rs(source="::"))
    assert (told.dst, told[IPv6].dst) == ("33:33:00:00:00:01", "ff02::1")
    assert bytes(told) == advertisement(RECORD)


@pytest.mark.parametrize(
    "asked",
    [
        rs(ICMPv6NDOptSrcLLAddr(lladdr=text(MAC + 1))),
        rs(ICMPv6NDOptSrcLLAddr(lladdr=text(MAC)), source="::"),
        rs(target="ff02::1"),
        rs(Raw(b"\1\0" + bytes(6))),
        rs(Raw(b"\1")),
        Ether(src=text(MAC)) / IPv6(src=LINK_LOCAL, dst="ff02::2", hlim=64) / ICMPv6ND_RS(),
        Ether(src=text(MAC)) / IPv6(src=LINK_LOCAL, dst="ff02::2", hlim=255) / ICMPv6ND_RS(code=1),
        Ether(src=text(MAC)) / IPv6(src=LINK_LOCAL, dst="ff02::2", hlim=255) / IPv6ExtHdrFragment(m=1) / ICMPv6ND_RS(),
        Ether(src=text(MAC + 1)) / IPv6(src=LINK_LOCAL, dst="ff02::2", hlim=255) / ICMPv6ND_RS(),
    ],
)
def test_solicitations_that_are_not_answered(asked: Any) -> None:
    assert ask(RECORD, asked) is None


# ---- laws


def test_a_family_that_the_port_has_no_address_of_is_not_spoken_about() -> None:
    four = replace(RECORD, addresses=RECORD.addresses[:1])
    six = replace(RECORD, addresses=RECORD.addresses[1:2])
    assert ask(four, rs()) is None
    assert ask(four, dhcp6(DHCP6_Solicit(), ME, association(1))) is None
    assert ask(six, dhcp4("discover")) is None


FRAMES = [
    dhcp4("discover", ("param_req_list", [1, 3, 121]), ("client_id", b"\1who")),
    dhcp4("request", OWN, SERVER),
    dhcp6(DHCP6_Solicit(), ME, association(1, "fd00::99")),
    dhcp6(DHCP6_Renew(), ME, YOU, association(1, "fd00::12", "fd00::99"), association(2)),
    rs(ICMPv6NDOptSrcLLAddr(lladdr=text(MAC))),
]


@given(
    st.sampled_from([bytes(frame) for frame in FRAMES]), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)))
)
def test_whatever_is_asked_the_answer_is_for_this_port_and_fits(frame: bytes, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(frame)
    for at, byte in changes:
        changed[at % len(changed)] = byte
    told = answer(RECORD, bytes(changed))
    if told is None:
        return
    read = right(told)
    assert read.dst in (text(MAC), "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01")
    assert len(told) <= 14 + 1280
    if BOOTP in read:
        assert read[BOOTP].yiaddr in ("10.0.0.17", "0.0.0.0")


@given(st.binary(max_size=400))
def test_no_bytes_are_too_odd(body: bytes) -> None:
    for frame in (bytes(FRAMES[0])[:42], bytes(FRAMES[2])[:62]):
        length = len(body) + 8
        at = 24 if frame[12:14] == b"\x08\0" else 40
        whole = bytearray(frame + body)
        if at == 24:
            whole[16:18] = (20 + length).to_bytes(2, "big")
            whole[38:40] = length.to_bytes(2, "big")
        else:
            whole[18:20] = length.to_bytes(2, "big")
            whole[58:60] = length.to_bytes(2, "big")
        answer(RECORD, bytes(whole))
