"""What packets mean: a table of cases in one small world, and laws in any world.

              wire: machines 1, 2, 3
                        |
network 1     segment 1 10.0.0.0/24 fd00::/64 -- router 1 -- segment 2 10.0.1.0/24
              a  b  c(hosts)  d(hosts)                       e (owns 10.9.0.0/16)
                      |         |
network 2     segment 3: p      q          the addresses of network 1 once more
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from itertools import pairwise

import pytest
from frames import arp, echo, ethernet, extension, icmp, ip_frame, ipv4, neighbour, solicited, tcp, udp
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import Step, aims, conversations, frames, policies, worlds

from nestnet.model import packet as pk
from nestnet.model.hash import flow_hash
from nestnet.model.meaning import Outcome, State, carry, deliver, judge, longest_way, put_on, take_off, way
from nestnet.model.packet import FlowTuple, mapped
from nestnet.model.values import (
    RELAY,
    Interface,
    Link,
    Machine,
    Network,
    Policy,
    Port,
    Router,
    Segment,
    Selector,
    Service,
    World,
    link_local,
)


def ip(text: str) -> bytes:
    return mapped(ip_address(text))


R = 0x060000000001
A, B, C, D, E, P, Q = range(1, 8)
ANY = (Selector("any"),)
ALL = (Service(),)


def mac(port: int) -> int:
    return 0x020000000000 + port


def port(id: int, network: int, segment: int, host: int, *addresses: str, **more: object) -> Port:
    return Port(id, network, segment, host, mac(id), tuple(ip_address(a) for a in addresses), **more)  # type: ignore[arg-type]


WORLD = World.of(
    [
        *(Machine(n, ip_address(f"192.0.2.{n}")) for n in (1, 2, 3)),
        Network(1),
        Segment(1, 1, 101, (ip_network("10.0.0.0/24"), ip_network("fd00::/64"))),
        Segment(2, 1, 102, (ip_network("10.0.1.0/24"),)),
        Router(
            1,
            1,
            R,
            (
                Interface(1, (ip_address("10.0.0.1"), ip_address("fd00::1"))),
                Interface(2, (ip_address("10.0.1.1"),)),
            ),
        ),
        port(A, 1, 1, 1, "10.0.0.11", "fd00::11", groups=(1,)),
        port(B, 1, 1, 2, "10.0.0.12", "fd00::12"),
        port(C, 1, 1, 2, "10.0.0.13", hosts=True),
        port(D, 1, 1, 3, "10.0.0.14", hosts=True),
        port(E, 1, 2, 3, "10.0.1.15", owns=(ip_network("10.9.0.0/16"),)),
        Network(2, carrier=1),
        Segment(3, 2, 103, (ip_network("10.0.0.0/24"),)),
        port(P, 2, 3, C, "10.0.0.11"),
        port(Q, 2, 3, D, "10.0.0.12"),
    ]
)


def policy(id: int, sources: tuple[Selector, ...] = ANY, targets: tuple[Selector, ...] = ANY, *services: Service,
           network: int = 1, allow: bool = True, priority: int = 100) -> Policy:  # fmt: skip
    return Policy(id, network, sources, targets, services or ALL, allow, priority)


def send(
    world: World, port: int, frame: bytes, state: State | None = None, now: float = 0.0, share: int = 16384
) -> Outcome:
    return deliver(world, state or State(), port, frame, now, share)


def to(source: int, target: int, ttl: int = 64) -> bytes:
    """A UDP packet from 1000 to 53 between two ports, by the router if that is the way."""
    return to_with(source, target, lambda a, b: (pk.UDP, udp(a, b, 1000, 53)), ttl)


def to_with(source: int, target: int, what: Callable[[bytes, bytes], tuple[int, bytes]], ttl: int = 64) -> bytes:
    a, b = WORLD.ports[source], WORLD.ports[target]
    here, there = mapped(a.addresses[0]), mapped(b.addresses[0])
    return ip_frame(b.mac if a.segment == b.segment else R, a.mac, here, there, *what(here, there), ttl)


def verdict(outcome: Outcome) -> str | list[int]:
    """The receivers, or the reason, of which a router may have told the sender."""
    receivers = [id for id, _ in outcome.deliveries]
    is_dropped = receivers in ([], [id for id, _ in outcome.drops])
    return outcome.drops[0][1] if is_dropped else receivers


def plain(mac_to: int, source: str, target: str, protocol: int = 17, body: bytes | None = None, ttl: int = 64) -> bytes:
    a, b = ip(source), ip(target)
    return ip_frame(mac_to, mac(A), a, b, protocol, udp(a, b, 1000, 53) if body is None else body, ttl)


def later(frame: bytes, offset: int = 1) -> bytes:
    packet = pk.parse(frame)
    flow = packet.flow
    body = ipv4(flow.source, flow.target, flow.protocol, b"x" * 8, fragment=offset)
    return ethernet(packet.target_mac, packet.source_mac, pk.IPV4, body)


def ns(about: str, source: str = "fd00::11", ttl: int = 255, option: tuple[int, int] | None = (1, mac(A))) -> bytes:
    a, b = ip(source), solicited(ip(about))
    return ip_frame(pk.BROADCAST, mac(A), a, b, 58, neighbour(135, a, b, ip(about), option), ttl)


def na(about: str, option: tuple[int, int] | None = (2, mac(A))) -> bytes:
    a, b = ip("fd00::11"), ip("ff02::1")
    return ip_frame(pk.BROADCAST, mac(A), a, b, 58, neighbour(136, a, b, ip(about), option), 255)


def ping(target: str, mac_to: int = R) -> bytes:
    a = ip("10.0.0.11" if ":" not in target else "fd00::11")
    return ip_frame(mac_to, mac(A), a, ip(target), 1 if ":" not in target else 58, echo(a, ip(target), 5))


def who_has(target: str, sender: str = "10.0.0.11", sender_mac: int = mac(A), operation: int = 1) -> bytes:
    return pk.with_ethernet(arp(operation, sender_mac, ip(sender), 0, ip(target), pk.BROADCAST), pk.BROADCAST, mac(A))


DISCOVER = b"\1\1\6" + bytes(25) + pk.mac_bytes(mac(A)) + bytes(202) + b"\x63\x82\x53\x63\x35\1\1\xff"


def from_dhcp_client(body: bytes = b"", target: str = "255.255.255.255") -> bytes:
    a, b = ip("0.0.0.0"), ip(target)
    return ip_frame(pk.BROADCAST, mac(A), a, b, 17, udp(a, b, 68, 67, body))


def solicitation(source: str = "fd00::11") -> bytes:
    a, b = ip(source), ip("ff02::2")
    return ip_frame(0x333300000002, mac(A), a, b, 58, icmp(a, b, 133), ttl=255)


SWITCHED = to(A, B)

# What A sends, and who receives it, or why not.
CASES: dict[str, tuple[bytes, list[int] | str]] = {
    "switched": (SWITCHED, [B]),
    "routed": (to(A, E), [E]),
    "to what a port owns": (plain(R, "10.0.0.11", "10.9.3.4"), [E]),
    "to all": (plain(pk.BROADCAST, "10.0.0.11", "10.0.0.255"), [B, C, D]),
    "to itself through the router": (plain(R, "10.0.0.11", "10.0.0.11"), [A]),
    "IPv6, link-local": (plain(mac(B), str(link_local(mac(A))), str(link_local(mac(B)))), [B]),
    "ping the gateway": (ping("10.0.0.1"), [A]),
    "ping the gateway, IPv6": (ping("fd00::1"), [A]),
    "ping the gateway, link-local": (ping(str(link_local(R))), [A]),
    "ping the gateway of another segment": (ping("10.0.1.1"), [A]),
    "ARP for a port": (who_has("10.0.0.12"), [A]),
    "ARP for the gateway": (who_has("10.0.0.1"), [A]),
    "ARP probe": (who_has("10.0.0.12", "0.0.0.0"), [A]),
    "NS for a port": (ns("fd00::12"), [A]),
    "NS for the gateway": (ns("fd00::1"), [A]),
    "DHCP": (from_dhcp_client(DISCOVER), [A]),
    "DHCP without anything in it": (from_dhcp_client(), "unanswerable"),
    "a solicitation of routers": (solicitation(), [A]),
    "one from no address": (solicitation("::"), [A]),
    "short": (SWITCHED[:13], "malformed"),
    "tagged": (SWITCHED[:12] + b"\x81\0\0\1" + SWITCHED[12:], "tagged"),
    "control": (pk.with_ethernet(SWITCHED, 0x0180C2000000, mac(A)), "control_frame"),
    "LLDP": (SWITCHED[:12] + b"\x88\xcc" + SWITCHED[14:], "ether_type"),
    "other's MAC": (pk.with_ethernet(SWITCHED, mac(B), mac(C)), "source_mac"),
    "other's address": (plain(mac(B), "10.0.0.13", "10.0.0.12"), "source_address"),
    "other's link-local address": (plain(mac(B), str(link_local(mac(B))), "fd00::12"), "source_address"),
    "no address": (plain(mac(B), "0.0.0.0", "10.0.0.12"), "source_address"),
    "DHCP request to one": (from_dhcp_client(target="10.0.0.12"), "source_address"),
    "cut": (SWITCHED[:-1], "malformed"),
    "seven extension headers": (
        plain(mac(B), "fd00::11", "fd00::12", 60, extension(60, 60) * 6 + extension(60, 59)), "malformed"
    ),
    "ARP with other's address": (who_has("10.0.0.1", "10.0.0.12"), "arp_spoof"),
    "ARP with other's MAC": (who_has("10.0.0.1", sender_mac=mac(B)), "arp_spoof"),
    "ARP reply from nowhere": (who_has("10.0.0.1", "0.0.0.0", operation=2), "arp_spoof"),
    "ARP reply": (who_has("10.0.0.1", operation=2), "announcement"),
    "gratuitous ARP": (who_has("10.0.0.11"), "announcement"),
    "ARP probe for its own": (who_has("10.0.0.11", "0.0.0.0"), "announcement"),
    "ARP for nobody": (who_has("10.0.0.99"), "arp_unknown"),
    "ARP for a port elsewhere": (who_has("10.0.1.15"), "arp_unknown"),
    "NS for nobody": (ns("fd00::99"), "nd_unknown"),
    "NS with other's MAC": (ns("fd00::12", option=(1, mac(B))), "nd_spoof"),
    "NS with low hop limit": (ns("fd00::12", ttl=254), "malformed"),
    "DAD": (ns("fd00::11", "::", option=None), "announcement"),
    "DAD for other's": (ns("fd00::12", "::", option=None), "nd_spoof"),
    "NA": (na("fd00::11"), "announcement"),
    "NA with other's MAC": (na("fd00::11", (2, mac(B))), "nd_spoof"),
    "NA for other's": (na("fd00::12"), "nd_spoof"),
    "RA": (
        plain(mac(B), "fd00::11", "fd00::12", 58, icmp(ip("fd00::11"), ip("fd00::12"), 134)), "router_advertisement"
    ),
    "DHCP server": (
        plain(mac(B), "10.0.0.11", "10.0.0.12", body=udp(ip("10.0.0.11"), ip("10.0.0.12"), 67, 68)), "dhcp_server"
    ),
    "later fragment": (later(SWITCHED), "fragment_unknown"),
    "unknown MAC": (pk.with_ethernet(SWITCHED, mac(99), mac(A)), "unknown_unicast"),
    "MAC in another segment": (pk.with_ethernet(SWITCHED, mac(E), mac(A)), "unknown_unicast"),
    "MAC in another network": (pk.with_ethernet(SWITCHED, mac(Q), mac(A)), "unknown_unicast"),
    "own MAC": (pk.with_ethernet(SWITCHED, mac(A), mac(A)), "hairpin"),
    "no route": (plain(R, "10.0.0.11", "198.51.100.1"), "no_route"),
    "nobody there": (plain(R, "10.0.0.11", "10.0.1.99"), "unreachable"),
    "for the router": (plain(R, "10.0.0.11", "10.0.0.1"), "router_local"),
    "for the router elsewhere": (plain(R, "10.0.0.11", "10.0.1.1"), "router_local"),
    "TTL 1, switched": (to(A, B, ttl=1), [B]),
    "TTL 1, routed": (to(A, E, ttl=1), "ttl_expired"),
    "TTL 2, routed": (to(A, E, ttl=2), [E]),
    "link-local source, routed": (plain(R, str(link_local(mac(A))), "fd00::12"), "source_address"),
    "as big as can be": (plain(mac(B), "10.0.0.11", "10.0.0.12", 47, bytes(1430)), [B]),
    "too big": (plain(mac(B), "10.0.0.11", "10.0.0.12", 47, bytes(1431)), "too_big"),
    "too big for all": (plain(pk.BROADCAST, "10.0.0.11", "10.0.0.12", 47, bytes(1431)), "too_big"),
    "an error about nothing": (
        plain(mac(B), "10.0.0.11", "10.0.0.12", 1, icmp(ip("10.0.0.11"), ip("10.0.0.12"), 3, payload=SWITCHED[14:])),
        "icmp_unrelated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    frame, expected = CASES[name]
    assert verdict(send(WORLD, A, frame)) == expected


def test_what_is_delivered() -> None:
    assert send(WORLD, A, SWITCHED).deliveries == ((B, SWITCHED),)
    ((_, frame),) = send(WORLD, A, to(A, E)).deliveries
    assert frame == pk.with_ethernet(to(A, E, ttl=63), mac(E), R)
    ((_, answer),) = send(WORLD, A, who_has("10.0.0.12")).deliveries
    assert answer == arp(2, mac(B), ip("10.0.0.12"), mac(A), ip("10.0.0.11"), mac(A))


def test_what_is_disabled() -> None:
    assert verdict(send(WORLD, 99, SWITCHED)) == "not_attached"
    assert verdict(send(WORLD.with_(replace(WORLD.ports[A], enabled=False)), A, SWITCHED)) == "port_disabled"
    assert verdict(send(WORLD.with_(replace(WORLD.ports[B], enabled=False)), A, SWITCHED)) == "port_disabled"
    assert verdict(send(WORLD.with_(replace(WORLD.networks[1], enabled=False)), A, SWITCHED)) == "network_disabled"


# ---- policies


def a_to(flow_to: int, *policies: Policy) -> str | list[int]:
    return verdict(send(WORLD.with_(*policies), A, to(A, flow_to)))


DNS = Service(17, 53, 53)


def test_policies() -> None:
    assert a_to(B) == [B]
    assert a_to(B, policy(1, ANY, ANY, Service(6))) == "policy", "one policy makes the rest denied"
    assert a_to(B, policy(1, ANY, ANY, DNS)) == [B]
    assert a_to(B, policy(1, ANY, ANY, Service(17, 54, 60))) == "policy"
    assert a_to(B, policy(1), policy(2, allow=False)) == "policy", "deny wins"
    assert a_to(B, policy(1, priority=101), policy(2, allow=False)) == [B], "priority comes first"
    assert a_to(B, policy(1), policy(2, allow=False, priority=0)) == [B]
    assert a_to(B, policy(1, (Selector("group", 1),), (Selector("port", B),))) == [B]
    assert a_to(B, policy(1, (Selector("group", 2),))) == "policy"
    assert a_to(E, policy(1, (Selector("segment", 1),), (Selector("segment", 2),))) == [E]
    assert a_to(B, policy(1, ANY, (Selector("hosts"),))) == "policy"
    assert a_to(C, policy(1, ANY, (Selector("hosts"),))) == [C]
    assert a_to(B, policy(1, ANY, (Selector("cidr", cidr=ip_network("10.0.0.12/31")),))) == [B]
    assert a_to(B, policy(1, ANY, (Selector("cidr", cidr=ip_network("::/0")),))) == "policy", "::/0 is IPv6 only"
    assert a_to(B, policy(1, (Selector("inside"),), (Selector("inside"),))) == [B]
    assert a_to(B, policy(1, network=2, allow=False)) == [B], "other networks' policies are not asked"


def test_policy_comes_before_routing() -> None:
    closed = WORLD.with_(policy(1, ANY, (Selector("inside"),)))
    for target in ("198.51.100.1", "10.0.1.99", "10.0.0.1"):
        assert verdict(send(closed, A, plain(R, "10.0.0.11", target))) == "policy"
    assert verdict(send(closed, A, ping("10.0.0.1"))) == [A], "the own gateway is no policy matter"
    assert verdict(send(closed, A, ping("10.0.1.1"))) == "policy"


# ---- connections

ONE_WAY = WORLD.with_(policy(1, (Selector("port", A),), (Selector("port", B),)))


def tcp_to(source: int, target: int, flags: int, ports: tuple[int, int] = (1000, 80)) -> bytes:
    return to_with(source, target, lambda a, b: (pk.TCP, tcp(a, b, *ports, flags)))


def udp_to(source: int, target: int, ports: tuple[int, int] = (1000, 53)) -> bytes:
    return to_with(source, target, lambda a, b: (pk.UDP, udp(a, b, *ports)))


OPEN, ANSWER = tcp_to(A, B, pk.SYN), tcp_to(B, A, pk.SYN | pk.ACK, (80, 1000))


def test_an_answer_passes_because_its_opener_may() -> None:
    assert verdict(send(ONE_WAY, B, ANSWER)) == "policy"
    opened = send(ONE_WAY, A, OPEN)
    assert verdict(send(ONE_WAY, B, ANSWER, opened.state, 7199.0)) == [A]
    assert verdict(send(ONE_WAY, B, ANSWER, opened.state, 7200.0)) == "policy"
    assert verdict(send(ONE_WAY, B, tcp_to(B, A, pk.SYN, (80, 1000)), opened.state)) == "policy", "opening is no answer"


def test_what_is_denied_is_as_good_as_not_there() -> None:
    opened = send(ONE_WAY, A, OPEN)
    denied = ONE_WAY.with_(policy(2, allow=False))
    cut = send(denied, B, ANSWER, opened.state)
    assert verdict(cut) == "policy"
    assert verdict(send(ONE_WAY, B, ANSWER, cut.state)) == [A], "allowed again, as long as it lives"


def test_a_connection_closes() -> None:
    opened = send(ONE_WAY, A, OPEN)
    closed = send(ONE_WAY, B, tcp_to(B, A, pk.FIN | pk.ACK, (80, 1000)), opened.state, 1.0)
    assert verdict(send(ONE_WAY, B, ANSWER, closed.state, 10.9)) == [A]
    assert verdict(send(ONE_WAY, B, ANSWER, closed.state, 11.0)) == "policy"
    again = send(ONE_WAY, A, OPEN, closed.state, 2.0)
    assert verdict(send(ONE_WAY, B, ANSWER, again.state, 7000.0)) == [A]


def test_udp_lives_180_s_after_its_last_packet() -> None:
    opened = send(ONE_WAY, A, udp_to(A, B))
    answer = udp_to(B, A, (53, 1000))
    answered = send(ONE_WAY, B, answer, opened.state, 179.0)
    assert verdict(answered) == [A]
    assert verdict(send(ONE_WAY, B, answer, answered.state, 358.0)) == [A]
    assert verdict(send(ONE_WAY, B, answer, answered.state, 359.0)) == "policy"


def test_share() -> None:
    state = State()
    for number in range(3):
        outcome = send(ONE_WAY, A, udp_to(A, B, (number, 53)), state, share=2)
        state = outcome.state
    assert verdict(outcome) == "connection_share"
    assert verdict(send(ONE_WAY, A, udp_to(A, B, (0, 53)), state, 1.0, share=2)) == [B]
    assert verdict(send(ONE_WAY, A, udp_to(A, B, (9, 53)), state, 180.0, share=2)) == [B]


def test_carriage_is_never_tracked() -> None:
    outcome = send(ONE_WAY, A, udp_to(A, B, (4789, 4789)))
    assert verdict(outcome) == [B]
    assert outcome.state == State()
    assert verdict(send(ONE_WAY, B, udp_to(B, A, (4789, 4789)), outcome.state)) == "policy"


def test_related_errors_pass() -> None:
    def error(frame: bytes, source: int = B, target: int = A) -> bytes:
        quote = frame[pk.ETHERNET : pk.ETHERNET + 28]
        return to_with(source, target, lambda a, b: (pk.ICMP, icmp(a, b, 3, 3, payload=quote)))

    opened = send(ONE_WAY, A, udp_to(A, B))
    assert verdict(send(ONE_WAY, B, error(udp_to(A, B)), opened.state)) == [A]
    assert verdict(send(ONE_WAY, B, error(udp_to(A, B, (1, 1))), opened.state)) == "icmp_unrelated"
    assert verdict(send(ONE_WAY, B, error(udp_to(B, A, (53, 1000))), opened.state)) == "icmp_unrelated", "its own"
    assert verdict(send(ONE_WAY, A, error(udp_to(B, A, (53, 1000)), A, B), opened.state)) == [B], "about an answer"
    denied = ONE_WAY.with_(policy(2, allow=False))
    assert verdict(send(denied, B, error(udp_to(A, B)), opened.state)) == "icmp_unrelated"


def test_fragments() -> None:
    a, b = ip("10.0.0.11"), ip("10.0.0.12")
    first = ethernet(mac(B), mac(A), pk.IPV4, ipv4(a, b, 17, udp(a, b, 1000, 53), fragment=0x2000))
    seen = send(ONE_WAY, A, first)
    assert verdict(send(ONE_WAY, A, later(first), seen.state, 29.9)) == [B]
    assert verdict(send(ONE_WAY, A, later(first), seen.state, 30.0)) == "fragment_unknown"
    refused = send(WORLD.with_(policy(1, allow=False)), A, first)
    assert verdict(send(ONE_WAY, A, later(first), refused.state)) == "fragment_unknown", "it did not pass"


# ---- what carries it

INNER = to(P, Q)


def p_to_q(*changes: Network | Port | Policy) -> str | list[int]:
    return verdict(send(WORLD.with_(*changes), P, INNER))


CARRIAGE = Service(17, 4789, 4789)
HOSTS = (Selector("hosts"),)


def test_the_relay_of_a_port_whose_workload_runs_an_agent() -> None:
    own, mine = link_local(mac(A)).packed, ip("fd00::11")

    def relayed(
        world: World, port: int = A, source: bytes = own, to: int = pk.NOBODY_MAC, number: int = 4795
    ) -> Outcome:
        body = tcp(source, RELAY.packed, 1000, number, pk.SYN)
        return send(world, port, ip_frame(to, mac(port), source, RELAY.packed, pk.TCP, body))

    solicitation = neighbour(135, own, solicited(RELAY.packed), RELAY.packed, (1, mac(A)))
    ask = ip_frame(0x3333FF000001, mac(A), own, solicited(RELAY.packed), pk.ICMPV6, solicitation, 255)
    world = WORLD.with_(replace(WORLD.ports[A], agent=True))
    outcome = relayed(world)
    assert (outcome.relayed, outcome.deliveries, outcome.drops) == (True, (), ())
    ((port, answer),) = send(world, A, ask).deliveries
    assert (port, pk.parse(answer).source_mac, pk.parse(answer).icmp_type) == (A, pk.NOBODY_MAC, pk.ADVERTISEMENT)
    # Nobody else has one, and it has no other door.
    nobody = ((A, "unknown_unicast"),)
    assert relayed(WORLD).drops == nobody
    assert send(WORLD, A, ask).drops == ((A, "nd_unknown"),)
    assert relayed(world, source=mine).drops == nobody
    assert relayed(world, number=4796).drops == nobody
    assert relayed(world, to=mac(B)).deliveries != (), "who has that MAC is sent what is sent to it"
    other = link_local(mac(B)).packed
    assert relayed(world, B, other).drops == ((B, "unknown_unicast"),)
    assert relayed(world, source=other).drops == ((A, "source_address"),)


def test_carriers_are_asked() -> None:
    assert p_to_q() == [Q]
    assert p_to_q(policy(1, ANY, ANY, Service(6))) == "carrier_policy", "not allowed is denied, for carriage too"
    assert p_to_q(policy(1, HOSTS, HOSTS, CARRIAGE)) == [Q]
    assert p_to_q(policy(1, (Selector("port", D),), (Selector("port", C),), CARRIAGE)) == "carrier_policy", "one way"
    assert p_to_q(replace(WORLD.networks[1], enabled=False)) == "carrier_down"
    assert p_to_q(replace(WORLD.ports[D], enabled=False)) == "carrier_down"
    assert p_to_q(replace(WORLD.ports[C], enabled=False)) == "carrier_down"
    same = replace(WORLD.ports[Q], host=C)
    assert p_to_q(same, policy(1, allow=False)) == [Q], "nothing is carried between ports of one host"
    assert p_to_q(same, replace(WORLD.networks[1], enabled=False)) == "carrier_down", "closed is closed (rule 12)"
    assert p_to_q(same, replace(WORLD.ports[C], enabled=False)) == "carrier_down"


def test_a_carrier_routes() -> None:
    elsewhere = replace(WORLD.ports[E], hosts=True)
    moved = replace(WORLD.ports[Q], host=E)
    assert p_to_q(elsewhere, moved) == [Q]
    assert verdict(send(WORLD.with_(elsewhere, moved).without(("router", 1)), P, INNER)) == "carrier_no_route"


def test_for_all_is_carried_to_each() -> None:
    frame = plain(pk.BROADCAST, "10.0.0.11", "10.0.0.255")
    frame = pk.with_ethernet(frame, pk.BROADCAST, mac(P))
    assert verdict(send(WORLD, P, frame)) == [Q]
    assert send(WORLD.with_(policy(1, allow=False)), P, frame).drops == ((Q, "carrier_policy"),)


# ---- links
#
#   segment 1 -- R1 --1-- R2 --1-- R4 -- segment 4     links 1, 2: R1-R2-R4    links 3, 4: R1-R3-R4
#   A, 10.1.0.0/24 `--1-- R3 --1--'      Z, 10.4.0.0/24    cost 1 each; R2 and R3 join nothing

Z = 2
CORE = [0x060000000000 + number for number in range(5)]


def linked(*more: Link | Policy | Port | Router) -> World:
    return World.of(
        [
            Machine(1, ip_address("192.0.2.1")),
            Network(1),
            *(Segment(n, 1, 100 + n, (ip_network(f"10.{n}.0.0/24"),)) for n in (1, 4)),
            *(Router(n, 1, CORE[n], (Interface(n, (ip_address(f"10.{n}.0.1"),)),)) for n in (1, 4)),
            *(Router(n, 1, CORE[n]) for n in (2, 3)),
            *(Link(n, 1, ends) for n, ends in enumerate([(1, 2), (4, 2), (1, 3), (3, 4)], start=1)),
            port(A, 1, 1, 1, "10.1.0.11"),
            port(Z, 1, 4, 1, "10.4.0.12", owns=(ip_network("10.9.0.0/16"),)),
        ]
    ).with_(*more)


def across(target: str = "10.4.0.12", ttl: int = 64, source_port: int = 1000, body: bytes | None = None) -> bytes:
    """From A to what its router must find."""
    a, b = ip("10.1.0.11"), ip(target)
    protocol, payload = (17, udp(a, b, source_port, 53)) if body is None else (1, body)
    return ip_frame(CORE[1], mac(A), a, b, protocol, payload, ttl)


def echo_across(target: str, ttl: int = 64) -> bytes:
    return across(target, ttl, body=echo(ip("10.1.0.11"), ip(target), 5))


def passed(world: World, frame: bytes, segment: int = 4) -> list[int]:
    return [router.id for router in way(world, world.routers[1], segment, pk.parse(frame))]


def down(*ids: int) -> list[Link]:
    return [replace(linked().links[id], up=False) for id in ids]


def test_routed_over_links() -> None:
    ((receiver, frame),) = send(linked(), A, across()).deliveries
    assert (receiver, frame) == (Z, pk.with_ethernet(across(ttl=61), mac(Z), CORE[4]))
    assert verdict(send(linked(), A, across(ttl=4))) == [Z]
    assert verdict(send(linked(), A, across(ttl=3))) == "ttl_expired"
    assert verdict(send(linked(), A, across("10.9.3.4"))) == [Z], "what a port owns, too"
    assert verdict(send(linked(), A, across("10.4.0.99"))) == "unreachable"


def test_links_that_are_down_lead_nowhere() -> None:
    for link in (1, 2):
        world = linked(*down(link))
        assert {tuple(passed(world, across(source_port=n))) for n in range(50)} == {(1, 3, 4)}
    cut = linked(*down(1, 4))
    assert verdict(send(cut, A, across())) == "no_route"
    assert verdict(send(cut.with_(policy(1, ANY, (Selector("port", Z),))), A, across())) == "policy", "judged first"
    assert verdict(send(cut.with_(*(linked().links[n] for n in (1, 2))), A, across())) == [Z]


def test_the_least_cost_wins_not_the_fewest_routers() -> None:
    world = linked(Link(5, 1, (4, 1), cost=3))
    assert len(passed(world, across())) == 3
    assert passed(linked(Link(5, 1, (4, 1))), across()) == [1, 4]
    both = linked(Link(5, 1, (4, 1), cost=2))
    assert {tuple(passed(both, across(source_port=n))) for n in range(99)} == {(1, 2, 4), (1, 3, 4), (1, 4)}
    assert longest_way(both, both.routers[1], 4) == 3


def test_equal_costs_share_the_flows() -> None:
    """By the hash over the flow, seeded by the router, modulo the links by rising MAC of the next; parallel links count
    each."""
    world = linked(Link(9, 1, (2, 1)))
    nexts = [2, 2, 3]  # over links 1, 9 and 3
    for source_port in range(200):
        number = flow_hash(ip("10.1.0.11"), ip("10.4.0.12"), source_port, 53, 17, seed=1) % 3
        assert passed(world, across(source_port=source_port)) == [1, nexts[number], 4]
        assert passed(world, across(source_port=source_port, ttl=9)) == [1, nexts[number], 4]


def test_each_router_has_a_seed_of_its_own() -> None:
    """Otherwise all flows that come to the second router would go on by one link."""
    world = linked(Link(9, 1, (4, 2)), Link(10, 1, (4, 2)), *down(3))
    world = world.with_(Router(5, 1, 0x060000000005), Link(11, 1, (1, 5)), Link(12, 1, (5, 4)))
    ways = {tuple(passed(world, across(source_port=n))) for n in range(50)}
    assert ways == {(1, 2, 4), (1, 5, 4)}
    seen = set()
    for n in range(200):
        packet = pk.parse(across(source_port=n))
        if way(world, world.routers[1], 4, packet)[1].id == 2:
            seen.add(pk.spread(packet, seed=2) % 3)
    assert seen == {0, 1, 2}


def test_a_mac_of_a_router_is_cut_to_32_bits() -> None:
    big = 2**32 + 1
    world = linked(Router(big, 1, 0x060900000001, (Interface(1, (ip_address("10.1.0.9"),)),)))
    world = world.with_(Link(21, 1, (big, 2)), Link(22, 1, (big, 3)))
    for n in range(50):
        packet = pk.parse(across(source_port=n))
        ways = [way(world, world.routers[id], 4, packet) for id in (1, big)]
        assert ways[0][1:] == ways[1][1:]


def test_fragments_take_the_way_of_their_datagram() -> None:
    a, b = ip("10.1.0.11"), ip("10.4.0.12")
    ways = set()
    for n in range(50):
        head = ipv4(a, b, 17, udp(a, b, n, 53), fragment=0x2000, identification=n)
        tail = ipv4(a, b, 17, b"x" * 8, fragment=1, identification=n)
        first = send(linked(), A, ethernet(CORE[1], mac(A), pk.IPV4, head))
        assert verdict(first) == [Z]
        assert verdict(send(linked(), A, ethernet(CORE[1], mac(A), pk.IPV4, tail), first.state)) == [Z]
        for body in (head, tail):
            packet = pk.parse(ethernet(CORE[1], mac(A), pk.IPV4, body))
            for each in (packet, pk.with_first(packet, FlowTuple(a, b, n, 53, 17), -1)):
                ways.add(way(linked(), linked().routers[1], 4, each))
    assert len(ways) == 1, "ports mean nothing"


def test_every_router_that_is_reached_answers() -> None:
    ((receiver, frame),) = send(linked(), A, echo_across("10.4.0.1", ttl=3)).deliveries
    got = pk.parse(frame)
    assert (receiver, got.ttl, got.source_mac, got.flow.source) == (A, 255 - 2, CORE[1], ip("10.4.0.1"))
    assert verdict(send(linked(), A, echo_across("10.4.0.1", ttl=2))) == "ttl_expired"
    assert verdict(send(linked(), A, across("10.4.0.1"))) == "router_local"
    assert verdict(send(linked(), A, across("10.4.0.1", ttl=2))) == "ttl_expired"
    assert verdict(send(linked(*down(1, 3)), A, echo_across("10.4.0.1"))) == "no_route"
    closed = linked(policy(1, ANY, (Selector("inside"),)))
    assert verdict(send(closed, A, echo_across("10.4.0.1"))) == "policy"
    assert verdict(send(closed, A, echo_across("10.4.0.1", ttl=1))) == "policy", "judged first"
    # Another router of the own segment, whether links lead to it or not.
    other = linked(Router(5, 1, 0x060000000005, (Interface(1, (ip_address("10.1.0.2"),)),)))
    assert verdict(send(other, A, echo_across("10.1.0.2", ttl=1))) == [A]


def test_one_segment_with_two_routers_is_no_link() -> None:
    apart = linked(
        *down(1, 3), Router(5, 1, 0x060000000005, (Interface(1, (ip_address("10.1.0.2"),)),)), Link(9, 1, (5, 4))
    )
    assert verdict(send(apart, A, across())) == "no_route"
    assert verdict(send(apart, A, pk.with_ethernet(across(), 0x060000000005, mac(A)))) == [Z]


def test_a_carrier_routes_over_links() -> None:
    hosts = [replace(linked().ports[id], hosts=True) for id in (A, Z)]
    world = linked().with_(
        *hosts,
        Network(2, carrier=1),
        Segment(7, 2, 107, (ip_network("10.0.0.0/24"),)),
        port(P, 2, 7, A, "10.0.0.11"),
        port(Q, 2, 7, Z, "10.0.0.12"),
    )
    assert verdict(send(world, P, INNER)) == [Q]
    ((_, frame),) = send(world, P, to(P, Q, ttl=1)).deliveries
    assert frame == to(P, Q, ttl=1), "the inner TTL is no business of a carrier"
    assert verdict(send(world.with_(*down(1, 4)), P, INNER)) == "carrier_no_route"


@pytest.mark.parametrize(("routers", "expected"), [(63, [Q]), (64, "carrier_ttl")])
def test_a_carrier_has_63_routers_in_a_row_at_most(routers: int, expected: str | list[int]) -> None:
    """On the longest of the ways that share its flows, whichever this one takes."""
    world = linked(*down(1, 3)).with_(
        *(replace(linked().ports[id], hosts=True) for id in (A, Z)),
        Network(2, carrier=1),
        Segment(7, 2, 107, (ip_network("10.0.0.0/24"),)),
        port(P, 2, 7, A, "10.0.0.11"),
        port(Q, 2, 7, Z, "10.0.0.12"),
        Link(1000, 1, (1, 4), cost=routers - 1),
    )
    row = [1, *range(100, 100 + routers - 2), 4]
    world = world.with_(
        *(Router(id, 1, 0x060000000000 + id) for id in row[1:-1]),
        *(Link(id, 1, (id, other)) for id, other in pairwise(row[1:])),
        Link(99, 1, (1, 100)),
    )
    assert longest_way(world, world.routers[1], 4) == routers
    assert verdict(send(world, P, INNER)) == expected
    assert {len(passed(world, across(source_port=n))) for n in range(50)} == {2, routers}
    assert verdict(send(world.with_(Link(1000, 1, (1, 4))), P, INNER)) == [Q]


# ---- laws

few = settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])  # half the worlds have no depth


def outcomes(steps: list[Step]) -> list[Outcome]:
    state, result = State(), []
    for step in steps:
        result.append(deliver(step.world, state, step.port, step.frame, step.now))
        state = result[-1].state
    return result


@few
@given(conversations())
def test_every_frame_has_an_outcome(steps: list[Step]) -> None:
    """Delivered or dropped, in the network it was sent in and nowhere else (I1), and each time the same."""
    both = zip(outcomes(steps), outcomes(steps), strict=True)
    for step, (outcome, again) in zip(steps, both, strict=True):
        assert outcome == again
        sender, _, _, _ = take_off(step.world, step.world.ports[step.port], step.frame)
        is_group = len(step.frame) >= 14 and step.frame[0] & 1
        told = is_group or [id for id, _ in outcome.deliveries] == [id for id, _ in outcome.drops] == [sender.id]
        assert told or len(outcome.deliveries) + len(outcome.drops) + outcome.relayed == 1
        assert not outcome.relayed or step.world.ports[step.port].agent
        for receiver, frame in outcome.deliveries:
            port = step.world.ports[receiver]
            assert port.network == sender.network
            assert port.enabled
            packet = pk.parse(frame)
            assert packet.is_group or packet.target_mac == port.mac
            # What the network itself answers, it answers as it was asked.
            assert receiver == sender.id or packet.size <= step.world.networks[port.network].mtu


@few
@given(conversations())
def test_no_source_but_the_own(steps: list[Step]) -> None:
    """I2: what others receive bears an address of the sender, or none."""
    for step, outcome in zip(steps, outcomes(steps), strict=True):
        sender, _, _, _ = take_off(step.world, step.world.ports[step.port], step.frame)
        own = {mapped(a) for a in (*sender.addresses, link_local(sender.mac))}
        for receiver, frame in outcome.deliveries:
            tags, rest = pk.untagged(frame, pk.RIDING)
            packet = pk.parse(rest, tags)
            if receiver != sender.id:
                source = packet.flow.source
                owned = source in own or any(pk.contains(prefix, source) for prefix in sender.owns)
                assert owned or source in (pk.UNSPECIFIED4, pk.UNSPECIFIED6)


@few
@given(st.data())
def test_order_means_nothing(data: st.DataObject) -> None:
    """Policies are a set: their ids and their order decide nothing."""
    world = data.draw(worlds())
    old = list(world.policies.values())
    new = [replace(p, id=id) for p, id in zip(data.draw(st.permutations(old)), sorted(world.policies), strict=True)]
    shuffled = world.without(*(("policy", id) for id in world.policies)).with_(*new)
    for step in data.draw(conversations(world, changes=False)):
        found = deliver(world, State(), step.port, step.frame, step.now)
        assert deliver(shuffled, State(), step.port, step.frame, step.now) == found


def reached(world: World, port: Port, frame: bytes) -> set[int]:
    return {receiver for receiver, _ in deliver(world, State(), port.id, frame, 0.0).deliveries}


@st.composite
def one_frame(draw: st.DrawFn) -> tuple[World, Port, bytes]:
    world = draw(worlds())
    assume(world.ports)
    port = draw(st.sampled_from(list(world.ports.values())))
    return world, port, draw(frames(world, port))


@few
@given(one_frame(), st.data())
def test_one_more_allow_takes_nothing(case: tuple[World, Port, bytes], data: st.DataObject) -> None:
    """... from a network that has policies; one more deny gives nothing."""
    world, port, frame = case
    network = data.draw(st.sampled_from(sorted(world.networks)))
    assume(world.policies_of(network))
    more = data.draw(policies(world, network, max(world.policies) + 1))
    before, after = reached(world, port, frame), reached(world.with_(more), port, frame)
    assert before <= after if more.allow else after <= before


@few
@given(one_frame())
def test_an_outer_deny_wins(case: tuple[World, Port, bytes]) -> None:
    """What a carrier denies no network above can open: only ports on the same host are reached."""
    world, port, frame = case
    carrier = world.networks[port.network].carrier
    assume(carrier)
    denied = world.with_(Policy(10**6, carrier, ANY, ANY, ALL, False, 65535))
    for id in reached(denied, port, frame):
        assert world.ports[id].host == port.host


@few
@given(one_frame())
def test_depth_means_nothing(case: tuple[World, Port, bytes]) -> None:
    """A network means at any depth what it means on the wire, as long as its carriers let everything pass."""
    world, port, frame = case
    carriers, chain = set(), [world.networks[port.network]]
    while chain[-1].carrier:
        chain.append(world.networks[chain[-1].carrier])
        carriers.add(chain[-1].id)
    assume(carriers)
    free = world.with_(
        *(replace(world.networks[id], enabled=True) for id in carriers),
        *(replace(p, enabled=p.enabled or p.network in carriers, rate=0) for p in world.ports.values()),
        *(replace(link, up=link.up or link.network in carriers, rate=0) for link in world.links.values()),
    ).without(*(("policy", p.id) for p in world.policies.values() if p.network in carriers))
    for carried in chain[:-1]:
        hosts = {p.host for p in free.ports_in(carried.id)}
        assume(all(_joined(free, free.networks[carried.id], a, b) for a in hosts for b in hosts))
    surface = free.with_(
        replace(free.networks[port.network], carrier=0),
        *(replace(p, host=1) for p in free.ports_in(port.network)),
    )
    deep, shallow = (deliver(w, State(), port.id, frame, 0.0) for w in (free, surface))
    assert deep == shallow


def _joined(world: World, carried: Network, a: int, b: int) -> bool:
    try:
        carry(world, carried, a, b)
    except Exception:
        return False
    return True


@few
@given(one_frame())
def test_each_router_takes_one_from_the_ttl(case: tuple[World, Port, bytes]) -> None:
    world, port, frame = case
    before = pk.parse(frame)
    routers = {router.mac: router for router in world.routers_of(port.segment)}
    for id, told in deliver(world, State(), port.id, frame, 0.0).deliveries:
        tag, got = pk.untagged(told, 1) if world.ports[id].trunk else (b"", told)
        assert tag == put_on(world.ports[id])
        after = pk.parse(got)
        if id != port.id and before.target_mac in routers:
            segment = world.ports[id].segment
            passed = way(world, routers[before.target_mac], segment, before)
            assert passed[-1] in world.routers_of(segment)
            assert not any(router in world.routers_of(segment) for router in passed[:-1])
            assert (after.ttl, after.source_mac) == (before.ttl - len(passed), passed[-1].mac)
            assert got[after.offset :] == frame[before.offset :]
        elif id != port.id:
            assert got == frame, "a switch changes nothing"


@few
@given(worlds(), st.data())
def test_whom_nobody_names_nobody_judges(world: World, data: st.DataObject) -> None:
    """Without policies all may talk; a deny of everything at the top ends that."""
    network = data.draw(st.sampled_from(sorted(world.networks)))
    flow = FlowTuple(ip("10.0.0.10"), ip("10.0.0.11"), 1, 2, data.draw(st.sampled_from([1, 6, 17, 47])))
    ports = [None, *world.ports_in(network)]
    a, b = data.draw(st.sampled_from(ports)), data.draw(st.sampled_from(ports))
    bare = world.without(*(("policy", p.id) for p in world.policies_of(network)))
    assert judge(bare, network, a, b, flow, flow.target)
    top = Policy(10**6, network, ANY, ANY, ALL, False, 65535)
    assert not judge(world.with_(top), network, a, b, flow, flow.target)


def test_aims_are_inside() -> None:
    """The strategies themselves: what should work, does."""
    good, _ = aims(WORLD, WORLD.ports[A])
    reached = [
        verdict(send(WORLD, A, ip_frame(aim.mac, mac(A), ip("10.0.0.11"), aim.address, 47, b"")))
        for aim in good
        if pk.is_mapped(aim.address)
    ]
    assert [B] in reached
    assert [E] in reached


# ---- laws of links


@st.composite
def graphs(draw: st.DrawFn, costs: st.SearchStrategy[int]) -> World:
    """Up to eight routers, each with a segment and a port in it, and links between them."""
    count = draw(st.integers(2, 8))
    numbers = range(1, count + 1)
    pairs = st.tuples(st.sampled_from(numbers), st.sampled_from(numbers)).filter(lambda pair: pair[0] != pair[1])
    links = draw(st.lists(st.tuples(pairs, costs, st.sampled_from([True, True, True, False])), max_size=3 * count))
    return World.of(
        [
            Machine(1, ip_address("192.0.2.1")),
            Network(1),
            *(Segment(n, 1, 100 + n, (ip_network(f"10.{n}.0.0/24"),)) for n in numbers),
            *(Router(n, 1, 0x060000000000 + n, (Interface(n, (ip_address(f"10.{n}.0.1"),)),)) for n in numbers),
            *(port(n, 1, n, 1, f"10.{n}.0.10") for n in numbers),
            *(Link(id, 1, pair, cost, up) for id, (pair, cost, up) in enumerate(links, start=1)),
        ]
    )


def steps_from(world: World, start: int) -> dict[int, int]:
    """Router -> how few links that are up lead there, by walking outwards."""
    found, edge, steps = {start: 0}, {start}, 0
    while edge:
        steps += 1
        ends = {end for link in world.links.values() if link.up and edge & set(link.between) for end in link.between}
        edge = ends - found.keys()
        found |= dict.fromkeys(edge, steps)
    return found


def datagram(source: int, target: int, source_port: int = 1000) -> bytes:
    a, b = ip(f"10.{source}.0.10"), ip(f"10.{target}.0.10")
    return ip_frame(0x060000000000 + source, mac(source), a, b, 17, udp(a, b, source_port, 53))


@few
@given(graphs(st.just(1)))
def test_all_reach_all_that_links_lead_to(world: World) -> None:
    """... and no others; where all links cost 1, the TTL falls by the length of a shortest path."""
    for source in world.ports:
        near = steps_from(world, source)
        for target in world.ports:
            outcome = send(world, source, datagram(source, target))
            assert verdict(outcome) == ([target] if target in near else "no_route")
            for _, frame in outcome.deliveries if target in near else ():
                assert pk.parse(frame).ttl == 64 - 1 - near[target]


@few
@given(graphs(st.integers(1, 4)), st.data())
def test_no_way_costs_less(world: World, data: st.DataObject) -> None:
    """Every way is over links that are up, costs what the cheapest does (by trying all), and is the flow's own."""
    source, target = (data.draw(st.sampled_from(sorted(world.ports))) for _ in range(2))
    cheapest = {source: 0}
    for _ in world.routers:  # Bellman and Ford, not Dijkstra.
        for link in world.links.values():
            for a, b in (link.between, link.between[::-1]):
                if link.up and a in cheapest:
                    cheapest[b] = min(cheapest.get(b, 1 << 30), cheapest[a] + link.cost)
    assume(target in cheapest)
    lengths = set()
    for source_port in range(20):
        packet = pk.parse(datagram(source, target, source_port))
        routers = [router.id for router in way(world, world.routers[source], target, packet)]
        assert routers == [router.id for router in way(world, world.routers[source], target, packet)]
        costs = [
            min(link.cost for link in world.links.values() if link.up and set(link.between) == {a, b})
            for a, b in pairwise(routers)
        ]
        assert (routers[0], routers[-1], sum(costs)) == (source, target, cheapest[target])
        lengths.add(len(routers))
    assert max(lengths) <= longest_way(world, world.routers[source], target) <= len(world.routers)


@few
@given(st.integers(2, 6), st.binary(min_size=2, max_size=2))
def test_equal_ways_are_all_taken(count: int, host: bytes) -> None:
    """Many flows over a few ways of equal cost: each has its share, more or less."""
    world = linked(*(replace(link, up=False) for link in linked().links.values()))
    middle = range(100, 100 + count)
    world = world.with_(
        *(Router(id, 1, 0x060000000000 + id) for id in middle),
        *(Link(100 + 2 * id + end, 1, (id, (1, 4)[end])) for id in middle for end in (0, 1)),
    )
    target = f"10.4.{host[0]}.{host[1]}"
    taken = Counter(passed(world, across(target, source_port=n))[1] for n in range(1000))
    assert sorted(taken) == list(middle)
    assert min(taken.values()) > 1000 / count / 2
