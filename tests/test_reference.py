"""The reference datapath on tables made by hand: each reason, each answer, and what comes out where.

   m1 192.0.2.1                     m2 192.0.2.2
+-------------------+            +-------------------+
| a 10.0.0.2   b .3 |            | c 10.0.0.4   (web)|   network 1, VNI 100, router 10.0.0.1
| h .5              |            | k 10.0.0.6        |
|                   |            | d 10.0.1.2   (db) |   network 1, VNI 200, router 10.0.1.1
| x 10.0.0.2 on h   |            | y 10.0.0.3 on k   |   network 2, carried by network 1, VNI 300
+-------------------+            +-------------------+
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLReport,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet as Scapy
from scapy.packet import Raw

from nestnet.compile.tables import (
    AGENT,
    CIDR,
    CLASS,
    DENY,
    ENABLED,
    HOSTS,
    IDENTITY,
    LINK_FORTH,
    LOCAL,
    MACHINE,
    ON_VLAN,
    OWNER_PORT,
    OWNER_ROUTER,
    PORT,
    PORT_IN,
    PORT_OUT,
    PROTOCOL,
    TABLES,
    TRUNK,
    Tables,
)
from nestnet.datapath.reference import Fabric, Outputs, Reference, ToAgent, ToMachine, ToRelay, ToVlan, ToWorkload
from nestnet.model.domains import Agent
from nestnet.model.hash import flow_hash, outer_source_port
from nestnet.model.icmp import MESSAGES
from nestnet.model.packet import parse, tag, tagged, untagged
from nestnet.model.reasons import REASONS
from nestnet.model.values import FABRIC

Spec = dict[str, dict[object, tuple[Any, ...]]]

# Slots, the same on both machines. An object's id is its slot + 1000.
A, B, C, D, H, K, X, Y = range(1, 9)
WEB, DB, LAN = 1, 2, 3
OUTER, INNER = 1, 2
M1, M2 = 1, 2
CORE = 1
HOST_M1, HOST_M2, HOST_H, HOST_K = 1, 2, 3, 4
RULES = 77  # a version of rules

WIRE = {M1: "192.0.2.1", M2: "192.0.2.2"}
VNI = {WEB: 100, DB: 200, LAN: 300}
PORTS = {
    A: (OUTER, WEB, M1, "10.0.0.2"),
    B: (OUTER, WEB, M1, "10.0.0.3"),
    C: (OUTER, WEB, M2, "10.0.0.4"),
    D: (OUTER, DB, M2, "10.0.1.2"),
    H: (OUTER, WEB, M1, "10.0.0.5"),
    K: (OUTER, WEB, M2, "10.0.0.6"),
    X: (INNER, LAN, M1, "10.0.0.2"),
    Y: (INNER, LAN, M2, "10.0.0.3"),
}
OWN_HOST = {H: HOST_H, K: HOST_K}  # of those that are hosts
LIVES_ON = {H: HOST_M1, K: HOST_M2, X: HOST_H, Y: HOST_K}
ROUTER_MAC = "06:00:89:ab:cd:01"
GATEWAY = {WEB: "10.0.0.1", DB: "10.0.1.1"}


def mac(port: int) -> str:
    return f"02:00:00:00:00:{port:02x}"


def raw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def packed(address: str) -> bytes:
    parsed = ip_address(address)
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed


def v6(port: int) -> str:
    """The address that a port of WEB has beside its IPv4 one."""
    return f"fd00::{port:x}"


def local6(port: int) -> str:
    return f"fe80::ff:fe00:{port:x}"


def spec(here: int) -> Spec:
    """The rows of one machine: table -> key -> value, in the order of the fields."""
    rows: Spec = {name: {} for name in TABLES}
    rows["self"][0] = (here, 2, 0)
    for network in (OUTER, INNER):
        rows["network"][network] = (1000 + network, 0, 0, ENABLED, 1450, 4, 0)
    for segment, vni in VNI.items():
        ports = [p for p, (_, s, *_) in PORTS.items() if s == segment]
        local = [p for p in ports if PORTS[p][2] == here]
        hosts = [HOST_H, HOST_K] if segment == LAN else [HOST_M1, HOST_M2] if segment == WEB else [HOST_M2]
        network, router = (INNER, 0) if segment == LAN else (OUTER, CORE)
        rows["segment"][segment] = (
            1000 + segment, network, vni, 5, len(hosts), 6, len(local), router, 0, 0, bytes(6), 0, 0,
        )  # fmt: skip
        rows["vni"][(vni,)] = (segment,)
        rows["flood"] |= {(segment, 5, i): (host,) for i, host in enumerate(hosts)}
        rows["local"] |= {(segment, 6, i): (port,) for i, port in enumerate(local)}
    for machine, address in WIRE.items():
        rows["machine"][machine] = (1000 + machine, packed(address), 1500, 0)
        rows["member"][(packed(address),)] = (machine,)
        rows["host"][machine] = (1000 + machine, MACHINE, 0, machine, 0)
    rows["router"][CORE] = (1001, OUTER, 0, packed(GATEWAY[WEB]), packed("fd00::ff"), raw(ROUTER_MAC), 0)
    for segment, address in GATEWAY.items():
        rows["mac"][(segment, raw(ROUTER_MAC), 0)] = (OWNER_ROUTER, CORE)
        rows["owner"][(160, segment, packed(address))] = (OWNER_ROUTER, CORE)
        rows["route"][(32 + 96 + 24, CORE, packed(address)[:-1] + b"\0")] = (segment, 0, 0, 1)
    rows["route"][(32 + 64, CORE, packed("fd00::"))] = (WEB, 0, 0, 1)
    for port, (network, segment, machine, address) in PORTS.items():
        flags, ifindex, host = ENABLED, 0, LIVES_ON.get(port, HOST_M1 if machine == M1 else HOST_M2)
        if machine == here:
            flags, ifindex = flags | LOCAL, 10 + port
            rows["attach"][(ifindex, 0)] = (port,)
        if port in OWN_HOST:
            rows["host"][OWN_HOST[port]] = (1000 + port, PORT, port, host, 0)
            flags, host = flags | HOSTS, OWN_HOST[port]
        six = packed(v6(port)) if segment == WEB else bytes(16)
        rows["port"][port] = (
            1000 + port, network, segment, host, ifindex, flags, 100, 0, 0, packed(address), six, raw(mac(port)), 0
        )  # fmt: skip
        rows["mac"][(segment, raw(mac(port)), 0)] = (OWNER_PORT, port)
        for own in (address, local6(port), *([v6(port)] if segment == WEB else [])):
            rows["owner"][(160, segment, packed(own))] = (OWNER_PORT, port)
    return rows


def build(rows: Spec) -> Tables:
    tables: Tables = {}
    for name, table in TABLES.items():
        array = np.zeros(len(rows[name]), table.row)
        for at, (key, value) in enumerate(rows[name].items()):
            for part, fields in (("key", key), ("value", value)):
                if table.key is None and part == "key":
                    array[at][part] = fields
                    continue
                assert isinstance(fields, tuple)
                array[at][part] = tuple(list(f) if isinstance(f, bytes) else f for f in fields)
        tables[name] = array
    return tables


def with_field(rows: Spec, table: str, key: object, **fields: object) -> None:
    names = TABLES[table].value.names or ()
    value = dict(zip(names, rows[table][key], strict=True)) | fields
    rows[table][key] = tuple(value.values())


def with_rules(*rules: tuple[int, int, int, int], network: int = OUTER) -> Callable[[Spec], None]:
    """Policies of a network: (source, target, service, rank)."""

    def edit(rows: Spec) -> None:
        combos = 0
        for source, target, service, rank in rules:
            combos |= 1 << (source >> 30) * 9 + (target >> 30) * 3 + (service >> 30)
            rows["rule"][(network, RULES, source, target, service)] = (1, rank, 0)
        with_field(rows, "network", network, rules=RULES, combos=combos)
        # Class 1: a. Class 2: c. Addresses: 1 is 10.0.0.0/24, 2 is 10.0.0.128/25. Services: 1 is tcp/80-81.
        rows["peer"] |= {(network, RULES, A): (1,), (network, RULES, C): (2,)}
        rows["cidr"] |= {
            (64 + 96 + 24, network, RULES, packed("10.0.0.0")): (1,),
            (64 + 96 + 25, network, RULES, packed("10.0.0.128")): (2,),
        }
        rows["service"][(72 + 15, network, RULES, 6, b"\x00\x50", 0)] = (1,)

    return edit


ALLOW, NONE = 200, 0
deny_all = with_rules()


def off(table: str, slot: int) -> Callable[[Spec], None]:
    return lambda rows: with_field(
        rows, table, slot, flags=rows[table][slot][3 if table == "network" else 5] & ~ENABLED
    )


def ether(source: int, target: int | str) -> Ether:
    return Ether(src=mac(source), dst=mac(target) if isinstance(target, int) else target)


def ip(source: int, target: int | str, **fields: Any) -> IP:
    return IP(src=PORTS[source][3], dst=PORTS[target][3] if isinstance(target, int) else target, **fields)


def udp(source: int, target: int | str, via: str = "", **fields: object) -> Scapy:
    return ether(source, via or target) / ip(source, target, **fields) / UDP(sport=1000, dport=2000) / Raw(b"hello")


def tcp(source: int, target: int, flags: str = "S", sport: int = 1000, dport: int = 80) -> Scapy:
    return ether(source, target) / ip(source, target) / TCP(sport=sport, dport=dport, flags=flags)


def six(source: int, target: int | str, to: str = "") -> Scapy:
    return ether(source, target) / IPv6(src=v6(source), dst=to or v6(C))


def wire(inner: Scapy | bytes, segment: int = WEB, source: int = M2, tos: int = 0, **vxlan: Any) -> bytes:
    header = VXLAN(**({"vni": VNI[segment], "flags": 8} | vxlan))
    outer = IP(src=WIRE[source], dst=WIRE[M1], tos=tos, flags="DF", id=0) / UDP(sport=50000, dport=4789, chksum=0)
    return bytes(outer / header / Raw(bytes(inner)))


@dataclass
class Case:
    """`what` comes from port `source` of m1, or from the wire to it; `before`: what came first, in the same second."""

    reason: str
    what: Scapy | bytes
    source: int = A
    edits: tuple[Callable[[Spec], None], ...] = ()
    before: tuple[Scapy | bytes, ...] = ()
    port: int | None = None
    now: float = 0.0


def delete(table: str, key: object) -> Callable[[Spec], None]:
    def edit(rows: Spec) -> None:
        del rows[table][key]

    return edit


def edited(table: str, key: object, **fields: object) -> Callable[[Spec], None]:
    return lambda rows: with_field(rows, table, key, **fields)


PARTS: list[Scapy] = fragment(udp(A, B) / Raw(bytes(2000)), fragsize=1000)  # type: ignore[no-untyped-call]
DISCOVERY = IPv6(src=v6(A), dst="ff02::1:ff00:3", hlim=255)
CLIENT = UDP(sport=68, dport=67)
ROUTED = Ether(src=mac(A), dst=ROUTER_MAC) / ip(A, D) / UDP()
BROADCAST_17 = ether(A, "ff:ff:ff:ff:ff:ff") / ip(A, "10.0.0.255") / UDP()
ASKED = ether(A, "ff:ff:ff:ff:ff:ff") / IP(src="0.0.0.0", dst="255.255.255.255") / CLIENT
UNREACHABLE = ether(A, B) / ip(A, B) / ICMP(type=3, code=3) / IP(src="10.0.0.3", dst="10.0.0.2")


def in_own_host(rows: Spec) -> None:
    """h and k say that they live on themselves: a chain without end."""
    with_field(rows, "host", HOST_H, at=HOST_H)
    with_field(rows, "host", HOST_K, at=HOST_K)


# With links, DB is behind more routers: core - near - far, or core - left - right - far, as the flow's hash has it.
NEAR, LEFT, RIGHT, FAR = 2, 3, 4, 5
FAR_MAC = "06:00:00:00:00:05"
CORE_ID = 7 << 32 | 1001
SEED = 0x89ABCD01  # what the core's MAC ends with


def linked(rows: Spec) -> None:
    with_field(rows, "router", CORE, id=CORE_ID)
    for router in (NEAR, LEFT, RIGHT, FAR):
        speaks = packed(f"10.255.0.{router}"), packed(f"fd00:ff::{router}")
        rows["router"][router] = (1000 + router, OUTER, 0, *speaks, raw(f"06:00:00:00:00:{router:02x}"), 0)
    rows["mac"][(DB, raw(FAR_MAC), 0)] = rows["mac"].pop((DB, raw(ROUTER_MAC), 0))[0], FAR
    rows["owner"][(160, DB, packed(GATEWAY[DB]))] = (OWNER_ROUTER, FAR)
    with_field(rows, "segment", DB, router=FAR)
    there = packed("10.0.1.0")
    nexts = {CORE: (NEAR, LEFT), NEAR: (FAR,), LEFT: (RIGHT,), RIGHT: (FAR,), FAR: ()}
    for (router, ways), hops in zip(nexts.items(), (4, 2, 3, 2, 1), strict=True):
        group = 70 + router if ways else 0
        rows["route"][(32 + 96 + 24, router, there)] = (DB, group, len(ways), hops)
        rows["hop"] |= {(router, group, index): (to, 0) for index, to in enumerate(ways)}
    back = {FAR: (NEAR,), NEAR: (CORE,)}
    for router, ways in back.items():
        rows["route"][(32 + 96 + 24, router, packed("10.0.0.0"))] = (WEB, 80, len(ways), router)
        rows["hop"] |= {(router, 80, index): (to, 0) for index, to in enumerate(ways)}


def limited(port: int, direction: str = "out") -> Callable[[Spec], None]:
    """A port with a bucket that the first packet empties."""

    def edit(rows: Spec) -> None:
        bucket = max(rows["bucket"], default=0) + 1
        with_field(rows, "port", port, **{direction: bucket})
        rows["bucket"][bucket] = (port, 8000, 0, PORT_OUT if direction == "out" else PORT_IN, 0)

    return edit


def limited_links(rows: Spec) -> None:
    """Every hop has the same bucket, which the first empties."""
    for key, value in rows["hop"].items():
        rows["hop"][key] = (value[0], 9)
    rows["bucket"][9] = (9, 8000, 0, LINK_FORTH, 0)


def with_many_buckets(rows: Spec) -> None:
    """Nine links on the way from a to d."""
    linked(rows)
    for router in range(10, 18):
        rows["router"][router] = (*rows["router"][NEAR][:5], raw(f"06:00:00:00:00:{router:02}"), 0)
        rows["route"][(32 + 96 + 24, router, packed("10.0.1.0"))] = (DB, 90, 1, 19 - router)
        rows["hop"][(router, 90, 0)] = (router + 1 if router < 17 else FAR, 0)
    with_field(rows, "route", TO_DB, count=1, hops=10)
    rows["hop"][(CORE, 70 + CORE, 0)] = (10, 0)
    limited_links(rows)


def far_host(rows: Spec) -> None:
    """k is in DB, behind links."""
    with_field(rows, "port", K, segment=DB, address4=packed("10.0.1.6"))
    rows["owner"][(160, DB, packed("10.0.1.6"))] = (OWNER_PORT, K)


def trunk(rows: Spec) -> None:
    """b is behind tag 9 of a."""
    with_field(rows, "port", A, flags=ENABLED | LOCAL | TRUNK)
    with_field(rows, "port", B, ifindex=11, tag=9)
    rows["attach"][(11, 9)] = (B,)


TO_DB = (32 + 96 + 24, CORE, packed("10.0.1.0"))
IN_A_RING = (linked, edited("hop", (NEAR, 70 + NEAR, 0), next=CORE), edited("route", TO_DB, count=1))

CASES: dict[str, Case] = {
    # ---- lines 1 and 2
    "no port": Case("not_attached", udp(A, B), 0, (delete("attach", (11, 0)),)),
    "port gone": Case("not_attached", udp(A, B), edits=(delete("port", A),)),
    "target without workload": Case("not_attached", udp(A, B), edits=(edited("port", B, ifindex=0),)),
    "port down": Case("port_disabled", udp(A, B), edits=(off("port", A),)),
    "target down": Case("port_disabled", udp(A, B), edits=(off("port", B),)),
    "network down": Case("network_disabled", udp(A, B), edits=(off("network", OUTER),)),
    "short": Case("malformed", b"\0" * 13),
    "tag": Case("tagged", ether(A, B) / Dot1Q(vlan=1) / ip(A, B)),
    "tag of a provider": Case("tagged", Ether(src=mac(A), dst=mac(B), type=0x88A8) / Raw(bytes(50))),
    "tag of no VLAN on a trunk": Case("unknown_vlan", ether(A, B) / Dot1Q(vlan=7) / ip(A, B), edits=(trunk,)),
    "priority on a trunk": Case("unknown_vlan", ether(A, B) / Dot1Q(vlan=0, prio=7) / ip(A, B), edits=(trunk,)),
    "tags on a trunk": Case(
        "too_many_tags", ether(B, A) / Dot1Q(vlan=9) / Dot1Q(vlan=9) / ip(B, A), edits=(trunk,), port=B
    ),
    "tags in a wire": Case(
        "too_many_tags", ether(A, B) / Dot1Q() / Dot1Q() / Dot1Q() / ip(A, B), edits=(edited("segment", WEB, flags=1),)
    ),
    "a tag for a router": Case(
        "tagged", Ether(src=mac(A), dst=ROUTER_MAC) / Dot1Q() / ip(A, D), edits=(edited("segment", WEB, flags=1),)
    ),
    "bridge control": Case("control_frame", ether(A, "01:80:c2:00:00:0f") / ip(A, B)),
    "no EtherType of ours": Case("ether_type", Ether(src=mac(A), dst=mac(B), type=0x88CC) / Raw(bytes(50))),
    "source MAC": Case("source_mac", ether(B, C) / ip(A, C)),
    # ---- ARP
    "ARP short": Case("malformed", bytes(ether(A, B) / ARP())[:41]),
    "ARP sender": Case("arp_spoof", ether(A, B) / ARP(hwsrc=mac(A), psrc="10.0.0.3", pdst="10.0.0.4")),
    "ARP sender MAC": Case("arp_spoof", ether(A, B) / ARP(hwsrc=mac(B), psrc="10.0.0.2", pdst="10.0.0.4")),
    "ARP reply from nobody": Case("arp_spoof", ether(A, B) / ARP(op=2, hwsrc=mac(A), psrc="0.0.0.0", pdst="10.0.0.4")),
    "ARP reply": Case("announcement", ether(A, B) / ARP(op=2, hwsrc=mac(A), psrc="10.0.0.2", pdst="10.0.0.4")),
    "ARP probe": Case("announcement", ether(A, B) / ARP(hwsrc=mac(A), psrc="0.0.0.0", pdst="10.0.0.2")),
    "gratuitous ARP": Case("announcement", ether(A, B) / ARP(hwsrc=mac(A), psrc="10.0.0.2", pdst="10.0.0.2")),
    "ARP for nobody": Case("arp_unknown", ether(A, B) / ARP(hwsrc=mac(A), psrc="10.0.0.2", pdst="10.0.0.99")),
    # ---- IP and the source guard
    "IP version": Case("malformed", ether(A, B) / ip(A, B, version=6) / UDP()),
    "total length": Case("malformed", ether(A, B) / ip(A, B, len=2000) / UDP()),
    "RA": Case("router_advertisement", six(A, B) / ICMPv6ND_RA()),
    "ND in a fragment": Case("nd_spoof", six(A, B) / IPv6ExtHdrFragment(m=1) / ICMPv6ND_NS()),
    "DHCP server": Case("dhcp_server", ether(A, B) / ip(A, B) / UDP(sport=67, dport=68)),
    "DHCPv6 server": Case("dhcp_server", six(A, B) / UDP(sport=547, dport=546)),
    "source": Case("source_address", ether(A, B) / IP(src="10.0.0.3", dst="10.0.0.4") / UDP()),
    "DHCP in a fragment": Case("malformed", ether(A, B) / IP(src="0.0.0.0", dst="255.255.255.255", flags=1) / CLIENT),
    "DHCP, too much of it": Case("malformed", ether(A, B) / ip(A, B) / CLIENT / Raw(bytes(1473))),
    "DHCP, too often": Case("ask_limit", ASKED, before=(ASKED,) * 21),
    "no source": Case("source_address", ether(A, B) / IP(src="0.0.0.0", dst="10.0.0.3") / CLIENT),
    "no source, IPv6": Case("source_address", ether(A, B) / IPv6(src="::", dst=v6(B)) / ICMPv6EchoRequest()),
    "listener to one": Case("source_address", ether(A, B) / IPv6(src="::", dst=v6(B)) / ICMPv6MLReport()),
    # ---- neighbour discovery
    "NS hop limit": Case("malformed", ether(A, B) / IPv6(src=v6(A), dst=v6(B), hlim=64) / ICMPv6ND_NS(tgt=v6(B))),
    "NS options": Case("malformed", ether(A, B) / DISCOVERY / ICMPv6ND_NS(tgt=v6(B)) / Raw(b"\1\0" + bytes(6))),
    "NS link address": Case(
        "nd_spoof", ether(A, B) / DISCOVERY / ICMPv6ND_NS(tgt=v6(B)) / ICMPv6NDOptSrcLLAddr(lladdr=mac(B))
    ),
    "NA for another": Case(
        "nd_spoof", ether(A, B) / DISCOVERY / ICMPv6ND_NA(tgt=v6(B)) / ICMPv6NDOptDstLLAddr(lladdr=mac(A))
    ),
    "NA": Case("announcement", ether(A, B) / DISCOVERY / ICMPv6ND_NA(tgt=v6(A))),
    "DAD": Case("announcement", ether(A, B) / IPv6(src="::", dst="ff02::1", hlim=255) / ICMPv6ND_NS(tgt=v6(A))),
    "DAD for another": Case("nd_spoof", ether(A, B) / IPv6(src="::", dst="ff02::1", hlim=255) / ICMPv6ND_NS(tgt=v6(B))),
    "NS for itself": Case("announcement", ether(A, B) / DISCOVERY / ICMPv6ND_NS(tgt=v6(A))),
    "NS for nobody": Case("nd_unknown", ether(A, B) / DISCOVERY / ICMPv6ND_NS(tgt="fd00::99")),
    # ---- fragments
    "later fragment alone": Case("fragment_unknown", PARTS[1]),
    "later fragment, late": Case("fragment_unknown", PARTS[1], before=(PARTS[0],), now=30.0),
    "later fragment after a dropped one": Case(
        "fragment_unknown", PARTS[1], before=(PARTS[0],), edits=(edited("network", OUTER, mtu=700),)
    ),
    # ---- switching and routing
    "nobody has the MAC": Case("unknown_unicast", ether(A, 99) / ip(A, B) / UDP()),
    "own MAC": Case("hairpin", udp(A, A)),
    "no route": Case("no_route", ether(A, ROUTER_MAC) / ip(A, "10.9.0.1") / UDP()),
    "nobody has the address": Case("unreachable", ether(A, ROUTER_MAC) / ip(A, "10.0.1.99") / UDP()),
    "to a router": Case("router_local", ether(A, ROUTER_MAC) / ip(A, GATEWAY[DB]) / UDP()),
    "TTL": Case("ttl_expired", udp(A, D, ROUTER_MAC, ttl=1)),
    "TTL over links": Case("ttl_expired", udp(A, D, ROUTER_MAC, ttl=3), edits=(linked,)),
    "TTL to a router over links": Case("ttl_expired", udp(A, GATEWAY[DB], ROUTER_MAC, ttl=2), edits=(linked,)),
    "ping to a router over links": Case(
        "ttl_expired", ether(A, ROUTER_MAC) / ip(A, GATEWAY[DB], ttl=2) / ICMP(), edits=(linked,)
    ),
    "to a router over links": Case("router_local", udp(A, GATEWAY[DB], ROUTER_MAC, ttl=4), edits=(linked,)),
    "denied before a router over links": Case(
        "policy", udp(A, GATEWAY[DB], ROUTER_MAC, ttl=1), edits=(linked, deny_all)
    ),
    "links in a ring": Case("ttl_expired", udp(A, D, ROUTER_MAC, ttl=255), edits=IN_A_RING),
    "links in a ring, to a router": Case("ttl_expired", udp(A, GATEWAY[DB], ROUTER_MAC, ttl=255), edits=IN_A_RING),
    "next router not known": Case(
        "no_route", udp(A, D, ROUTER_MAC), edits=(linked, edited("route", TO_DB, count=1, group=99))
    ),
    "next router without a route": Case(
        "no_route",
        udp(A, D, ROUTER_MAC),
        edits=(linked, edited("route", TO_DB, count=1), delete("route", (TO_DB[0], NEAR, TO_DB[2]))),
    ),
    "denied before a way that ends": Case(
        "policy", udp(A, D, ROUTER_MAC), edits=(linked, edited("route", TO_DB, count=1, group=99), deny_all)
    ),
    "size": Case("too_big", udp(A, B) / Raw(bytes(1450 - 32))),
    "size, to all": Case("too_big", ether(A, "ff:ff:ff:ff:ff:ff") / ip(A, B) / UDP() / Raw(bytes(1450 - 27))),
    "routed from a link-local address": Case(
        "source_address", ether(A, ROUTER_MAC) / IPv6(src=local6(A), dst=v6(C)) / UDP()
    ),
    # ---- policy
    "nothing allowed": Case("policy", udp(A, B), edits=(deny_all,)),
    "denied before no route": Case("policy", ether(A, ROUTER_MAC) / ip(A, "10.9.0.1") / UDP(), edits=(deny_all,)),
    "denied before a router's far side": Case(
        "policy", ether(A, ROUTER_MAC) / ip(A, GATEWAY[DB]) / ICMP(), edits=(deny_all,)
    ),
    "carriage is not tracked": Case("policy", ether(A, B) / ip(A, B) / UDP(sport=4789, dport=4789), edits=(deny_all,)),
    "ICMP that is no echo": Case("policy", ether(A, B) / ip(A, B) / ICMP(type=13), edits=(deny_all,)),
    "share": Case("connection_share", tcp(A, B, sport=3), edits=(edited("port", A, share=1),), before=(tcp(A, B),)),
    "error about nothing": Case("icmp_unrelated", UNREACHABLE / UDP(sport=2000, dport=1000)),
    "error about little": Case("icmp_unrelated", UNREACHABLE / Raw(b"1234567"), before=(tcp(A, B),)),
    # ---- what carries it
    "carrier's port down": Case("carrier_down", udp(X, Y), X, (off("port", K),)),
    "carrier down": Case("carrier_down", udp(X, Y), X, (off("network", OUTER),)),
    "carrier not known": Case("carrier_down", udp(X, Y), X, (delete("host", HOST_K),)),
    "carrier's policy": Case("carrier_policy", udp(X, Y), X, (with_rules((0, 0, PROTOCOL + 1, ALLOW)),)),
    "carrier without a route": Case("carrier_no_route", udp(X, Y), X, (edited("port", K, segment=DB),)),
    "carrier without an address": Case("carrier_no_route", udp(X, Y), X, (edited("port", K, address4=bytes(16)),)),
    "carrier with too many routers": Case(
        "carrier_ttl", udp(X, Y), X, (linked, far_host, edited("route", TO_DB, hops=64))
    ),
    "carrier's router without a route": Case(
        "carrier_no_route", udp(X, Y), X, (linked, far_host, delete("route", TO_DB))
    ),
    "carriers without end": Case("carrier_depth", udp(X, Y), X, (in_own_host,)),
    "no trunk": Case("no_trunk", udp(A, C), edits=(edited("segment", WEB, flags=ON_VLAN, vlan=17),)),
    "no trunk, routed": Case("no_trunk", ROUTED, edits=(edited("segment", DB, flags=ON_VLAN, vlan=17),)),
    # ---- from the wire
    "stranger": Case("not_a_member", wire(udp(C, A)), edits=(delete("member", (packed(WIRE[M2]),)),)),
    "VXLAN flags": Case("vxlan_header", wire(udp(C, A), flags=0)),
    "VXLAN reserved": Case("vxlan_header", wire(udp(C, A), reserved2=1)),
    "VXLAN short": Case("vxlan_header", bytes(IP(src=WIRE[M2], dst=WIRE[M1]) / UDP(dport=4789) / Raw(bytes(7)))),
    "VNI": Case("unknown_vni", wire(udp(C, A), vni=9999)),
    "network down, from the wire": Case("network_disabled", wire(udp(C, A)), edits=(off("network", OUTER),)),
    "inner short": Case("malformed", wire(bytes(udp(C, A))[:13])),
    "inner tag": Case("tagged", wire(ether(C, A) / Dot1Q() / ip(C, A))),
    "inner ARP": Case("ether_type", wire(ether(C, A) / ARP())),
    "inner IP": Case("malformed", wire(bytes(udp(C, A))[:30])),
    "inner source MAC": Case("unknown_source", wire(ether(99, A) / ip(C, A) / UDP())),
    "inner source behind a router": Case(
        "unknown_source", wire(Ether(src=ROUTER_MAC, dst=mac(A)) / IP(src="10.0.1.99", dst="10.0.0.2") / UDP())
    ),
    "from the wrong machine": Case("sender_location", wire(udp(B, A))),
    "carried, from the wrong machine": Case("sender_location", wire(udp(X, Y), LAN)),
    "source guard, from the wire": Case("source_address", wire(ether(C, A) / ip(K, A) / UDP())),
    "RA, from the wire": Case("router_advertisement", wire(six(C, A, v6(A)) / ICMPv6ND_RA())),
    "NS, from the wire": Case("nd_spoof", wire(six(C, A, v6(A)) / ICMPv6ND_NS(tgt=v6(A)))),
    "RS, from the wire": Case("asked_elsewhere", wire(six(C, A, v6(A)) / ICMPv6ND_RS())),
    "DHCP, from the wire": Case("asked_elsewhere", wire(ether(C, A) / ip(C, A) / CLIENT)),
    "later fragment, from the wire": Case("fragment_unknown", wire(udp(C, A, frag=3))),
    "not here": Case("not_here", wire(udp(C, K))),
    "not to a port": Case("not_here", wire(ether(C, ROUTER_MAC) / ip(C, A) / UDP())),
    "target down, from the wire": Case("port_disabled", wire(udp(C, A)), edits=(off("port", A),), port=A),
    "policy, from the wire": Case("policy", wire(udp(C, A)), edits=(deny_all,), port=A),
    "carrier's policy, from the wire": Case(
        "carrier_policy", wire(udp(Y, X), LAN), edits=(with_rules((0, 0, PROTOCOL + 1, ALLOW)),), port=X
    ),
    # ---- rates
    "more than the port may send": Case("rate", udp(A, B), edits=(limited(A),), before=(udp(A, C),)),
    "more than the port may send, to all": Case(
        "rate", ether(A, "ff:ff:ff:ff:ff:ff") / ip(A, B) / UDP(), edits=(limited(A),), before=(udp(A, C),)
    ),
    "more than may be sent to a port": Case("rate", udp(A, B), edits=(limited(B, "in"),), before=(tcp(A, B),), port=B),
    "more than may be sent to a port, from the wire": Case(
        "rate", wire(udp(C, A)), edits=(limited(A, "in"),), before=(wire(tcp(C, A)),), port=A
    ),
    "more than a link takes": Case("rate", udp(A, D, ROUTER_MAC), edits=(linked, limited_links)),
    "more than a host may send": Case("carrier_rate", udp(X, Y), X, (limited(H),), (udp(X, Y),)),
    "more than may be sent to a host": Case(
        "carrier_rate", wire(udp(Y, X), LAN), edits=(limited(H, "in"),), before=(wire(udp(Y, X), LAN),), port=X
    ),
    "more than a carrier's link takes": Case("carrier_rate", udp(X, Y), X, (linked, far_host, limited_links)),
    "nine rates": Case("cannot_flatten", udp(A, D, ROUTER_MAC), edits=(with_many_buckets,)),
    "congestion": Case("ecn", wire(udp(C, A), tos=3), port=A),
    "not attached, from the wire": Case("not_attached", wire(udp(C, A)), edits=(edited("port", A, ifindex=0),), port=A),
}


def give(machine: Reference, what: Scapy | bytes, source: int, now: float) -> Outputs:
    if isinstance(what, bytes) and len(what) > 20 and what[0] >> 4 == 4:
        return machine.underlay(what, now)
    return machine.workload(10 + source, bytes(what), now)


def without_complaints(outputs: Outputs) -> Outputs:
    """What routers tell the sender left out, which test_icmp.py looks at."""
    told = {port for port, reason in outputs.drops if reason in MESSAGES}
    return Outputs(
        [out for out in outputs.emitted if not (isinstance(out, ToWorkload) and out.port in told)], outputs.drops
    )


@pytest.mark.parametrize("name", CASES)
def test_dropped(name: str) -> None:
    case = CASES[name]
    rows = spec(M1)
    for edit in case.edits:
        edit(rows)
    machine = Reference(build(rows))
    for earlier in case.before:
        give(machine, earlier, case.source, 0.0)
    outputs = give(machine, case.what, case.source or A, case.now)
    from_wire = isinstance(case.what, bytes) and case.what[:1] == b"E"
    port = case.port if case.port is not None else 0 if from_wire else case.source
    assert without_complaints(outputs) == Outputs([], [(port, case.reason)])


def test_every_reason_has_a_case() -> None:
    of_the_kernel = {"no_underlay_route", "error"}  # It has neighbours to ask, and operations that can fail.
    of_the_agent = {"unanswerable"}  # It knows what to answer.
    of_the_nic = {"other_vlan"}  # Frames are untagged before these cases begin: test_tagged.py.
    assert {case.reason for case in CASES.values()} == REASONS.keys() - of_the_kernel - of_the_agent - of_the_nic


# ---- what comes out


@pytest.fixture
def m1() -> Reference:
    return Reference(build(spec(M1)))


@pytest.fixture
def both() -> Fabric:
    return Fabric({Agent(FABRIC, 1000 + machine): build(spec(machine)) for machine in (M1, M2)})


def answer(machine: Reference, frame: Scapy, port: int = A) -> Scapy:
    outputs = machine.workload(10 + port, bytes(frame), 0.0)
    assert outputs.drops == []
    (out,) = outputs.emitted
    assert isinstance(out, ToWorkload)
    assert (out.ifindex, out.port) == (10 + port, port)
    return Ether(out.frame)


def test_switched_on_one_machine(m1: Reference) -> None:
    frame = bytes(udp(A, B))
    assert m1.workload(11, frame, 0.0) == Outputs([ToWorkload(12, B, frame)], [])


def test_switched_to_another_machine(m1: Reference) -> None:
    frame = udp(A, C, tos=2)
    (out,) = m1.workload(11, bytes(frame), 0.0).emitted
    assert isinstance(out, ToMachine)
    assert out.machine == M2
    port = outer_source_port(flow_hash(packed("10.0.0.2"), packed("10.0.0.4"), 1000, 2000, 17))
    outer = IP(src=WIRE[M1], dst=WIRE[M2], tos=2, id=0, flags="DF", ttl=64)
    expected = outer / UDP(sport=port, dport=4789, chksum=0) / VXLAN(vni=100, flags=8) / frame
    assert out.datagram == bytes(expected)


def test_routed(both: Fabric) -> None:
    ((port, frame),), drops = both.send(1000 + A, bytes(udp(A, D, ROUTER_MAC, ttl=2)), 0.0)
    got = Ether(frame)
    assert (port, drops) == (1000 + D, [])
    assert (got.src, got.dst, got[IP].ttl) == (ROUTER_MAC, mac(D), 1)
    assert bytes(got)[14:34] == bytes(ip(A, D, ttl=1, len=got[IP].len) / UDP())[:20]


def test_routed_back_to_its_sender(m1: Reference) -> None:
    got = answer(m1, udp(A, A, ROUTER_MAC))
    assert (got.src, got.dst, got[IP].ttl) == (ROUTER_MAC, mac(A), 63)


@pytest.fixture
def far() -> Fabric:
    tables = {}
    for machine in (M1, M2):
        rows = spec(machine)
        linked(rows)
        tables[Agent(FABRIC, 1000 + machine)] = build(rows)
    return Fabric(tables)


def way(source_port: int) -> int:
    """How many routers there are from a to d: the core has two next routers and chooses by the flow."""
    return (3, 4)[flow_hash(packed("10.0.0.2"), packed("10.0.1.2"), source_port, 2000, 17, seed=SEED) % 2]


def test_routed_over_links(far: Fabric) -> None:
    for sport in range(50):
        for ttl in (64, way(sport), way(sport) + 1):
            frame = ether(A, ROUTER_MAC) / ip(A, D, ttl=ttl) / UDP(sport=sport, dport=2000)
            deliveries, drops = far.send(1000 + A, bytes(frame), 0.0)
            if ttl <= way(sport):
                assert [port for port, _ in deliveries] in ([], [1000 + A])  # who is told, if it was not told too much
                assert drops == ["ttl_expired"]
                continue
            expected = ether(A, D) / ip(A, D, ttl=ttl - way(sport)) / UDP(sport=sport, dport=2000)
            expected.src = FAR_MAC
            assert (deliveries, drops) == ([(1000 + D, bytes(expected))], [])


def test_all_fragments_go_one_way(far: Fabric) -> None:
    hashed = flow_hash(packed("10.0.0.2"), packed("10.0.1.2"), 0, 0, 17, seed=SEED)
    for sport in range(20):
        whole = ether(A, ROUTER_MAC) / ip(A, D, id=sport) / UDP(sport=sport, dport=2000) / Raw(bytes(2000))
        for part in fragment(whole, fragsize=1000):  # type: ignore[no-untyped-call]
            ((_, frame),), drops = far.send(1000 + A, bytes(part), 0.0)
            assert (64 - Ether(frame)[IP].ttl, drops) == ((3, 4)[hashed % 2], [])


def test_answered_over_links(far: Fabric) -> None:
    """From d back to a: m1 knows the sender behind the core's MAC, over links."""
    frame = ether(D, FAR_MAC) / ip(D, A) / UDP(sport=2000, dport=1000)
    ((port, got),), drops = far.send(1000 + D, bytes(frame), 0.0)
    assert (port, drops) == (1000 + A, [])
    assert (Ether(got).src, Ether(got)[IP].ttl) == (ROUTER_MAC, 64 - 3)


def test_ping_to_a_router_over_links(far: Fabric) -> None:
    for number in range(20):
        frame = ether(A, ROUTER_MAC) / ip(A, GATEWAY[DB], ttl=4) / ICMP(id=number)
        ((port, answered),), drops = far.send(1000 + A, bytes(frame), 0.0)
        got = Ether(answered)
        assert (port, drops, got.src, got[IP].src) == (1000 + A, [], ROUTER_MAC, GATEWAY[DB])
        assert got[IP].ttl in (255 - 2, 255 - 3)


def test_a_carrier_routes_over_links() -> None:
    rows = spec(M1)
    for edit in (linked, far_host, edited("route", TO_DB, hops=63)):
        edit(rows)
    outputs = Reference(build(rows)).workload(10 + X, bytes(udp(X, Y, ttl=1)), 0.0)
    (out,) = outputs.emitted
    assert isinstance(out, ToMachine)
    assert bytes(IP(out.datagram)[VXLAN].payload) == bytes(udp(X, Y, ttl=1))


def test_carried(both: Fabric) -> None:
    frame = bytes(udp(X, Y))
    assert both.send(1000 + X, frame, 0.0) == ([(1000 + Y, frame)], [])


def test_to_all(both: Fabric) -> None:
    frame = bytes(ether(A, "ff:ff:ff:ff:ff:ff") / ip(A, "255.255.255.255") / UDP())
    deliveries, drops = both.send(1000 + A, frame, 0.0)
    assert sorted(deliveries) == [(1000 + port, frame) for port in (B, C, H, K)]
    assert drops == []


def test_what_is_asked_is_the_agents(m1: Reference, both: Fabric) -> None:
    for asked in (ASKED, six(A, B) / ICMPv6ND_RS(), six(A, B) / UDP(sport=546, dport=547)):
        frame = bytes(asked)
        assert m1.workload(10 + A, frame, 0.0) == Outputs([ToAgent(10 + A, A, frame)], [])
    assert both.send(1000 + A, bytes(ASKED), 0.0) == ([], ["unanswerable"])


def test_what_an_agent_says_is_for_the_relay() -> None:
    rows = spec(M1)
    with_field(rows, "port", A, flags=rows["port"][A][5] | AGENT)
    machine = Reference(build(rows))
    opening = ether(A, "06:00:00:00:00:00") / IPv6(src=local6(A), dst="fe80::1") / TCP(dport=4795)
    assert machine.workload(10 + A, bytes(opening), 0.0) == Outputs([ToRelay(10 + A, A, bytes(opening))], [])
    asked = ether(A, "33:33:ff:00:00:01") / IPv6(src=local6(A), dst="ff02::1:ff00:1", hlim=255)
    advertised = answer(machine, asked / ICMPv6ND_NS(tgt="fe80::1"))
    told = advertised[ICMPv6ND_NA]
    assert (advertised.src, told.tgt, told.R) == ("06:00:00:00:00:00", "fe80::1", 0)


def test_to_all_that_the_policies_allow() -> None:
    edit = with_rules((IDENTITY + 1, IDENTITY + 2, 0, ALLOW))
    tables = {}
    for machine in (M1, M2):
        rows = spec(machine)
        edit(rows)
        tables[Agent(FABRIC, 1000 + machine)] = build(rows)
    frame = bytes(ether(A, "ff:ff:ff:ff:ff:ff") / ip(A, "10.0.0.255") / UDP())
    assert Fabric(tables).send(1000 + A, frame, 0.0) == ([(1000 + C, frame)], ["policy"] * 3)


def test_arp_is_answered(m1: Reference) -> None:
    asked = ether(A, "ff:ff:ff:ff:ff:ff") / ARP(hwsrc=mac(A), psrc="10.0.0.2", pdst="10.0.0.4")
    assert answer(m1, asked)[ARP].hwsrc == mac(C)
    assert answer(m1, asked / Raw(bytes(18)))[ARP].op == 2
    asked[ARP].pdst = GATEWAY[WEB]
    assert answer(m1, asked)[ARP].hwsrc == ROUTER_MAC


def test_neighbour_solicitation_is_answered(m1: Reference) -> None:
    got = answer(m1, ether(A, "33:33:ff:00:00:03") / DISCOVERY / ICMPv6ND_NS(tgt=v6(C)))
    assert (got[ICMPv6ND_NA].tgt, got[ICMPv6NDOptDstLLAddr].lladdr, got[ICMPv6ND_NA].R) == (v6(C), mac(C), 0)


def test_ping_to_the_gateway_is_no_policy_matter() -> None:
    rows = spec(M1)
    deny_all(rows)
    got = answer(Reference(build(rows)), ether(A, ROUTER_MAC) / ip(A, GATEWAY[WEB], ttl=9) / ICMP(id=5))
    assert (got[IP].src, got[IP].ttl, got[ICMP].type, got[ICMP].id) == (GATEWAY[WEB], 255, 0, 5)


def test_what_is_no_vxlan_for_this_machine_is_left_alone(m1: Reference) -> None:
    datagram = wire(udp(C, A))
    for other in (
        b"",
        datagram[:-1],
        bytes(IP(src=WIRE[M2], dst=WIRE[M1]) / UDP(dport=4790)),
        bytes(IP(src=WIRE[M2], dst="192.0.2.9") / UDP(dport=4789) / Raw(bytes(50))),
        bytes(IP(src=WIRE[M2], dst=WIRE[M1], flags="MF") / UDP(dport=4789) / Raw(bytes(50))),
        bytes(IPv6(src="::1", dst="::1") / UDP(dport=4789)),
    ):
        assert m1.underlay(other, 0.0) == Outputs([], [])


def test_from_where_it_is_moving() -> None:
    rows = spec(M1)
    with_field(rows, "host", HOST_K, at=HOST_M1, **{"from": HOST_M2})
    frame = bytes(udp(Y, X))
    assert Reference(build(rows)).underlay(wire(frame, LAN), 0.0) == Outputs([ToWorkload(10 + X, X, frame)], [])


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [(0, 0, 0), (0, 2, 0), (1, 3, 3), (2, 1, 1), (2, 3, 3), (3, 0, 3), (1, 2, 1)],
)
def test_congestion(m1: Reference, inner: int, outer: int, expected: int) -> None:
    (out,) = m1.underlay(wire(udp(C, A, tos=inner), tos=outer), 0.0).emitted
    assert isinstance(out, ToWorkload)
    assert out.frame == bytes(udp(C, A, tos=expected))


def test_fragments_take_the_way_of_the_first(m1: Reference) -> None:
    assert [bool(m1.workload(11, bytes(part), 0.0).emitted) for part in PARTS] == [True] * len(PARTS)


def test_a_frame_that_is_carriage_hands_its_source_port_on(m1: Reference) -> None:
    frame = ether(A, C) / ip(A, C) / UDP(sport=60000, dport=4789) / Raw(bytes(50))
    (out,) = m1.workload(11, bytes(frame), 0.0).emitted
    assert isinstance(out, ToMachine)
    assert IP(out.datagram)[UDP].sport == 60000


# ---- policy, piece by piece


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ([], False),
        ([(0, 0, 0, ALLOW)], True),
        ([(0, 0, 0, ALLOW), (0, 0, PROTOCOL + 6, ALLOW | DENY)], False),
        ([(0, 0, 0, ALLOW + 2), (0, 0, PROTOCOL + 6, ALLOW | DENY)], True),
        ([(0, 0, PROTOCOL + 17, ALLOW)], False),
        ([(IDENTITY + 1, IDENTITY + 2, CLASS + 1, ALLOW)], True),
        ([(IDENTITY + 2, IDENTITY + 1, CLASS + 1, ALLOW)], False),
        ([(CIDR + 1, CIDR + 1, 0, ALLOW)], True),
        ([(CIDR + 2, CIDR + 1, 0, ALLOW)], False),
        ([(0, 0, CLASS + 2, ALLOW)], False),
        ([(0, 0, 0, 0)], True),
        ([(0, 0, 0, DENY)], False),
    ],
)
def test_policy(rules: list[tuple[int, int, int, int]], allowed: bool) -> None:
    rows = spec(M1)
    with_rules(*rules)(rows)
    assert bool(Reference(build(rows)).workload(11, bytes(tcp(A, C)), 0.0).emitted) is allowed


# ---- connections


@dataclass
class Talk:
    """a may open to b, and b may not open to a. Asks whether what comes next passes."""

    machine: Reference = field(init=False)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.machine = Reference(build(self.rows(IDENTITY + 1)))

    @staticmethod
    def rows(source: int) -> Spec:
        rows = copy.deepcopy(spec(M1))
        with_rules((source, 0, 0, ALLOW))(rows)
        return rows

    def passes(self, frame: Scapy, source: int, after: float = 0.0) -> bool:
        self.now += after
        return not self.machine.workload(10 + source, bytes(frame), self.now).drops


def test_answers_pass_until_the_connection_expires() -> None:
    talk = Talk()
    back = tcp(B, A, "A", 80, 1000)
    assert not talk.passes(back, B)
    assert talk.passes(tcp(A, B), A)
    assert talk.passes(back, B, after=7199)
    assert talk.passes(back, B, after=7199)
    assert not talk.passes(back, B, after=7200)


def test_an_opening_answer_is_no_answer() -> None:
    talk = Talk()
    assert talk.passes(tcp(A, B), A)
    assert not talk.passes(tcp(B, A, "S", 80, 1000), B)
    assert talk.passes(tcp(B, A, "SA", 80, 1000), B)


def test_a_closing_connection_is_short_and_can_be_opened_again() -> None:
    talk = Talk()
    back = tcp(B, A, "A", 80, 1000)
    assert talk.passes(tcp(A, B), A)
    assert talk.passes(tcp(B, A, "FA", 80, 1000), B)
    assert talk.passes(tcp(A, B, "A"), A, after=9)
    assert not talk.passes(back, B, after=10)
    assert talk.passes(tcp(A, B), A)
    assert talk.passes(tcp(A, B, "R"), A)
    assert talk.passes(tcp(A, B), A, after=5)
    assert talk.passes(back, B, after=100)


def test_udp_and_echo_live_180_seconds() -> None:
    talk = Talk()
    back = ether(B, A) / ip(B, A) / ICMP(type=0, id=9)
    assert talk.passes(ether(A, B) / ip(A, B) / ICMP(id=9), A)
    assert talk.passes(back, B, after=179)
    assert not talk.passes(back, B, after=180)


def test_established_alone_never_allows() -> None:
    talk = Talk()
    assert talk.passes(tcp(A, B), A)
    talk.machine.load(build(talk.rows(IDENTITY + 2)))
    assert not talk.passes(tcp(B, A, "A", 80, 1000), B)
    talk.machine.load(build(talk.rows(IDENTITY + 1)))
    assert talk.passes(tcp(B, A, "A", 80, 1000), B)  # It was as good as not there, and is again.


def test_what_was_dropped_is_not_remembered() -> None:
    rows = Talk.rows(IDENTITY + 1)
    with_field(rows, "network", OUTER, mtu=30)
    talk = Talk()
    talk.machine.load(build(rows))
    assert not talk.passes(tcp(A, B), A)
    talk.machine.load(build(Talk.rows(IDENTITY + 1)))
    assert not talk.passes(tcp(B, A, "SA", 80, 1000), B)


def test_errors_about_a_connection_pass_both_ways() -> None:
    talk = Talk()
    assert talk.passes(udp(A, B), A)
    from_b = ether(B, A) / ip(B, A) / ICMP(type=3, code=3) / udp(A, B)[IP]
    from_a = ether(A, B) / ip(A, B) / ICMP(type=3, code=3) / udp(B, A)[IP]
    from_a[ICMP][UDP].sport, from_a[ICMP][UDP].dport = 2000, 1000
    assert talk.passes(from_b, B)
    assert talk.passes(from_a, A)
    assert not talk.passes(from_b, B, after=180)


NIC_MACS = {M1: 0x0A0000000001, M2: 0x0A0000000002}


def on_vlans(here: int) -> Spec:
    """WEB is VLAN 17 and DB 18, by NIC 3 of either machine."""
    rows = spec(here)
    for segment, id in ((WEB, 17), (DB, 18)):
        with_field(rows, "segment", segment, flags=ON_VLAN, ifindex=3, mac=NIC_MACS[here].to_bytes(6, "big"), vlan=id)
        del rows["vni"][(VNI[segment],)]
        rows["vlan"][(3, id)] = (segment,)
    return rows


def test_a_segment_on_a_vlan_is_left_and_entered_with_its_tag() -> None:
    here, there = (Reference(build(on_vlans(machine))) for machine in (M1, M2))
    switched, routed_ = bytes(udp(A, C)), bytes(ROUTED)
    (out,) = here.workload(10 + A, switched, 0.0).emitted
    assert out == ToVlan(3, M2, tagged(switched, tag(17)))
    (got,) = there.trunk(3, out.frame, 0.0)[0].emitted
    assert isinstance(got, ToWorkload)
    assert (got.port, got.frame) == (C, switched)
    # A router's MAC is the NIC's on the way, and its own at the end.
    (out,) = here.workload(10 + A, routed_, 0.0).emitted
    assert isinstance(out, ToVlan)
    assert untagged(out.frame, 2)[0] == tag(18)
    assert parse(untagged(out.frame, 2)[1]).source_mac == NIC_MACS[M1]
    (got,) = there.trunk(3, out.frame, 0.0)[0].emitted
    assert isinstance(got, ToWorkload)
    assert got.port == D
    assert parse(got.frame).source_mac == int(ROUTER_MAC.replace(":", ""), 16)
    (out,) = (each for each in here.workload(10 + A, bytes(BROADCAST_17), 0.0).emitted if isinstance(each, ToVlan))
    assert out.machine == 0


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        (tag(17) * 2, "too_many_tags"), (tag(0), "unknown_vlan"), (tag(0) + tag(17), "unknown_vlan"),
        (b"", None), (tag(19), None), (b"\x88\xa8\0\x11", None),
    ],
)  # fmt: skip
def test_what_else_comes_by_a_trunk(tags: bytes, reason: str | None) -> None:
    frame = tagged(bytes(udp(A, C)), tags)
    outputs, left = Reference(build(on_vlans(M2))).trunk(3, frame, 0.0)
    assert outputs.emitted == []
    assert outputs.drops == ([(0, reason)] if reason else [])
    assert left == (None if reason else frame)


def test_what_machines_tell_switches_ends_in_silence() -> None:
    frame = tagged(bytes(ether(C, "ff:ff:ff:ff:ff:ff"))[:12] + b"\x80\x35" + bytes(46), tag(17))
    assert Reference(build(on_vlans(M1))).trunk(3, frame, 0.0) == (Outputs(), None)


def test_who_lives_here_comes_by_no_trunk() -> None:
    frame = tagged(bytes(udp(C, K)), tag(17))
    assert Reference(build(on_vlans(M2))).trunk(3, frame, 0.0)[0].drops == [(0, "sender_location")]
