"""What routers tell the sender of a packet that ends at them: as values, by `meaning`; and what ping and traceroute
make of it in a lab.

           web            r1 ------- r2 ------- r3            db
        10.0.0.0/24    10.0.0.1   (nothing)  10.0.1.1     10.0.1.0/24
        fd00::/64      fd00::1               fd00:1::1    fd00:1::/64
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from frames import echo, group_mac, icmp, ip_frame, ipv4, tcp, udp
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet as Scapy

from nestnet.agent import netns
from nestnet.lab import state
from nestnet.model import packet as pk
from nestnet.model.icmp import PER_SECOND
from nestnet.model.meaning import Outcome, State, deliver
from nestnet.model.packet import mapped
from nestnet.model.values import (
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
)

ROOT = Path(__file__).resolve().parents[1]
R = 0x060000000000
A, Z = 1, 2
MAC = 0x020000000001
NOW = 1000.0

WORLD = World.of(
    [
        Machine(1, ip_address("192.0.2.1")),
        Network(1),
        Segment(1, 1, 101, (ip_network("10.0.0.0/24"), ip_network("fd00::/64"))),
        Segment(2, 1, 102, (ip_network("10.0.1.0/24"), ip_network("fd00:1::/64"))),
        Router(1, 1, R + 1, (Interface(1, (ip_address("10.0.0.1"), ip_address("fd00::1"))),)),
        Router(2, 1, R + 2),
        Router(3, 1, R + 3, (Interface(2, (ip_address("10.0.1.1"), ip_address("fd00:1::1"))),)),
        Link(1, 1, (1, 2)),
        Link(2, 1, (2, 3)),
        Port(A, 1, 1, 1, MAC, (ip_address("10.0.0.10"), ip_address("fd00::10"))),
        Port(Z, 1, 2, 1, MAC + 1, (ip_address("10.0.1.10"), ip_address("fd00:1::10"))),
    ]
)


def ip(text: str) -> bytes:
    return mapped(ip_address(text))


def sent(target: str, ttl: int = 64, size: int = 8, mac: int = R + 1) -> bytes:
    """A datagram from A."""
    source = ip("fd00::10" if ":" in target else "10.0.0.10")
    return ip_frame(mac, MAC, source, ip(target), 17, udp(source, ip(target), 1000, 53, bytes(size)), ttl)


def told(frame: bytes, world: World = WORLD, state: State | None = None, now: float = NOW) -> tuple[str, Scapy | None]:
    """Why A's frame was dropped, and what A was told, with checksums that are right."""
    outcome = deliver(world, state or State(), A, frame, now)
    ((port, reason),) = outcome.drops
    assert port == A
    if not outcome.deliveries:
        return reason, None
    ((receiver, answer),) = outcome.deliveries
    assert receiver == A
    parsed = pk.parse(answer)
    assert (parsed.link_flaw, parsed.flaw, parsed.target_mac, parsed.is_icmp_error) == (None, None, MAC, True)
    got = Ether(answer)
    again = Ether(answer)
    if IP in again:
        del again[IP].chksum, again[ICMP].chksum
    else:
        del again[IPv6].payload.cksum
    assert bytes(Ether(bytes(again))) == answer, "checksums"
    return reason, got


@pytest.mark.parametrize(
    ("target", "ttl", "reason", "source", "kind", "left"),
    [
        ("10.0.1.10", 1, "ttl_expired", "10.0.0.1", (11, 0), 255),
        ("10.0.1.10", 0, "ttl_expired", "10.0.0.1", (11, 0), 255),
        ("10.0.1.10", 2, "ttl_expired", "192.0.0.8", (11, 0), 254),
        ("10.0.1.10", 3, "ttl_expired", "10.0.1.1", (11, 0), 253),
        ("10.0.1.99", 2, "ttl_expired", "192.0.0.8", (11, 0), 254),
        ("10.0.1.99", 3, "ttl_expired", "10.0.1.1", (11, 0), 253),
        ("10.0.1.99", 4, "unreachable", "10.0.1.1", (3, 1), 253),
        ("10.0.1.1", 2, "ttl_expired", "192.0.0.8", (11, 0), 254),
        ("10.0.1.1", 3, "router_local", "10.0.1.1", (3, 3), 253),
        ("10.0.0.1", 1, "router_local", "10.0.0.1", (3, 3), 255),
        ("198.51.100.1", 1, "no_route", "10.0.0.1", (3, 0), 255),
        ("10.0.0.99", 64, "unreachable", "10.0.0.1", (3, 1), 255),
    ],
)
def test_ipv4(target: str, ttl: int, reason: str, source: str, kind: tuple[int, int], left: int) -> None:
    frame = sent(target, ttl)
    why, got = told(frame)
    assert why == reason
    assert got is not None
    assert (got[IP].src, got[IP].dst, got[IP].ttl) == (source, "10.0.0.10", left)
    assert (got[ICMP].type, got[ICMP].code) == kind
    # It comes from the gateway's MAC, and quotes the packet as that router met it.
    assert got.src == "06:00:00:00:00:01"
    quoted = bytes(got)[42:]
    met = max(ttl - (255 - left), 0)
    assert quoted == pk.with_ttl(pk.parse(frame), met)[14:]
    assert quoted[20:] == frame[34:]


@pytest.mark.parametrize(
    ("target", "ttl", "reason", "source", "layer", "code"),
    [
        ("fd00:1::10", 1, "ttl_expired", "fd00::1", ICMPv6TimeExceeded, 0),
        ("fd00:1::10", 2, "ttl_expired", "fe80::400:ff:fe00:2", ICMPv6TimeExceeded, 0),
        ("fd00:1::10", 3, "ttl_expired", "fd00:1::1", ICMPv6TimeExceeded, 0),
        ("fd00:1::99", 4, "unreachable", "fd00:1::1", ICMPv6DestUnreach, 3),
        ("fd00::1", 64, "router_local", "fd00::1", ICMPv6DestUnreach, 4),
        ("fd00:1::1", 64, "router_local", "fd00:1::1", ICMPv6DestUnreach, 4),
        ("2001:db8::1", 64, "no_route", "fd00::1", ICMPv6DestUnreach, 0),
    ],
)
def test_ipv6(target: str, ttl: int, reason: str, source: str, layer: type, code: int) -> None:
    why, got = told(sent(target, ttl))
    assert why == reason
    assert got is not None
    assert (got[IPv6].src, got[IPv6].dst, got[layer].code) == (source, "fd00::10", code)


def test_who_has_no_address_facing_the_sender_speaks_from_its_first() -> None:
    """And one that has addresses of the other family only, as one without any."""
    router = Router(2, 1, R + 2, (Interface(3, (ip_address("10.0.7.1"),)),))
    world = WORLD.with_(Segment(3, 1, 103, (ip_network("10.0.7.0/24"),)), router)
    _, got = told(sent("10.0.1.10", 2), world)
    assert got is not None
    assert got[IP].src == "10.0.7.1"
    _, got = told(sent("fd00:1::10", 2), world)
    assert got is not None
    assert got[IPv6].src == "fe80::400:ff:fe00:2"


def test_too_big() -> None:
    for target, mac in [("10.0.1.10", R + 1), ("10.0.0.11", MAC + 2)]:  # routed; in the segment its router says so
        world = WORLD.with_(Port(3, 1, 1, 1, MAC + 2, (ip_address("10.0.0.11"), ip_address("fd00::11"))))
        frame = sent(target, size=1451 - 28, mac=mac)
        reason, got = told(frame, world)
        assert (reason, got is not None) == ("too_big", True)
        assert got is not None
        assert (got[IP].src, got[ICMP].type, got[ICMP].code, got[ICMP].nexthopmtu) == ("10.0.0.1", 3, 4, 1450)
        assert got[IP].len == 576
        assert bytes(got)[42:] == frame[14 : 14 + 548]
    frame = sent("fd00:1::10", size=1451 - 48)
    _, got = told(frame)
    assert got is not None
    assert (got[ICMPv6PacketTooBig].mtu, len(got) - 14) == (1450, 1280)
    assert bytes(got)[62:] == frame[14 : 14 + 1232]
    # The first router looks at the TTL first, the others do not get to see it.
    assert told(sent("10.0.1.10", 1, size=1451 - 28))[0] == "ttl_expired"
    assert told(sent("10.0.1.10", 2, size=1451 - 28))[0] == "too_big"


def test_a_switch_is_silent() -> None:
    alone = World.of(
        [
            *(WORLD.values[key] for key in [("machine", 1), ("network", 1), ("segment", 1), ("port", A)]),
            Port(3, 1, 1, 1, MAC + 2, (ip_address("10.0.0.11"),)),
        ]
    )
    assert told(sent("10.0.0.11", size=1451 - 28, mac=MAC + 2), alone) == ("too_big", None)


def quiet(source: str, target: str, protocol: int, payload: bytes, ttl: int = 64) -> tuple[str, Scapy | None]:
    return told(ip_frame(R + 1, MAC, ip(source), ip(target), protocol, payload, ttl))


def test_nothing_is_said() -> None:
    a, far = ip("10.0.0.10"), ip("198.51.100.1")
    inner = ipv4(far, a, 17, udp(far, a, 53, 1000))
    assert quiet("10.0.0.10", "198.51.100.1", 1, icmp(a, far, 3, payload=inner)) == ("no_route", None), "about an error"
    assert quiet("10.0.0.10", "198.51.100.1", 1, echo(a, far, 7))[1] is not None, "about a ping"
    assert quiet("10.0.0.10", "224.0.0.5", 17, udp(a, ip("224.0.0.5"), 1, 2)) == ("no_route", None), "about multicast"
    assert quiet("10.0.0.10", "255.255.255.255", 17, udp(a, ip("255.255.255.255"), 1, 2)) == ("no_route", None)
    six = ip("fd00::10")
    assert quiet("fd00::10", "ff0e::1", 17, udp(six, ip("ff0e::1"), 1, 2)) == ("no_route", None)
    local = ip("fe80::ff:fe00:1")
    assert quiet("fe80::ff:fe00:1", "2001:db8::1", 17, udp(local, ip("2001:db8::1"), 1, 2)) == ("no_route", None)
    assert quiet("10.0.0.10", "10.0.0.1", 1, icmp(a, ip("10.0.0.1"), 13, payload=bytes(12))) == ("router_local", None)
    group = ip_frame(group_mac(ip("ff02::2")), MAC, six, ip("ff02::2"), 17, udp(six, ip("ff02::2"), 1, 2, bytes(1450)))
    assert told(group) == ("too_big", None), "what is for all"


def test_other_protocols_to_a_router() -> None:
    a, gateway = ip("10.0.0.10"), ip("10.0.0.1")
    for protocol, payload, code in [(6, tcp(a, gateway, 1, 2, 2), 3), (47, bytes(8), 2)]:
        _, got = quiet("10.0.0.10", "10.0.0.1", protocol, payload)
        assert got is not None
        assert (got[ICMP].type, got[ICMP].code) == (3, code)


def test_policy_comes_first_and_says_nothing() -> None:
    closed = WORLD.with_(Policy(1, 1, (Selector("any"),), (Selector("inside"),), (Service(),)))
    for target in ("198.51.100.1", "10.0.1.99", "10.0.1.1"):
        assert told(sent(target, 1), closed) == ("policy", None)


def test_a_port_is_told_so_much_a_second() -> None:
    state, heard = State(), 0

    def send(now: float) -> Outcome:
        nonlocal state
        outcome = deliver(WORLD, state, A, sent("198.51.100.1"), now)
        state = outcome.state
        return outcome

    for _ in range(500):
        heard += len(send(NOW).deliveries)
    assert heard == 2 * PER_SECOND + 1, "so many at once"
    heard = sum(len(send(NOW + second / 1000).deliveries) for second in range(1, 5001))
    assert abs(heard - 5 * PER_SECOND) <= 1, "then so many in a second"
    other = deliver(WORLD, state, Z, ip_frame(R + 3, MAC + 1, ip("10.0.1.10"), ip("9.9.9.9"), 47, b""), NOW + 5)
    assert other.deliveries, "others have a limit of their own"


# ---- in a lab

FILE = """\
apiVersion: nestnet/v1
machines: {m1: {}, m2: {}}
networks:
  net:
    segments:
      web: {cidr: [10.0.0.0/24, "fd00::/64"]}
      db: {cidr: [10.0.1.0/24, "fd00:1::/64"]}
    routers: {r1: {segments: [web]}, r2: {}, r3: {segments: [db]}}
    links: {r1-r2: {between: [r1, r2]}, r2-r3: {between: [r2, r3]}}
    ports:
      a: {segment: web, host: m1}
      z: {segment: db, host: m2}
"""


def nestnet(*arguments: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith("NESTNET")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nestnet", *arguments]
    done = subprocess.run(command, capture_output=True, env=env, timeout=180, check=False, text=True)
    assert done.returncode == 0, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A lab's name, and the namespace of each port."""
    file = tmp_path_factory.mktemp("icmp") / "net.yaml"
    file.write_text(FILE)
    name = f"t-{uuid.uuid4().hex[:8]}"
    try:
        nestnet("up", str(file), "--name", name)
        ports = json.loads(nestnet("get", "ports", "--lab", name, "-o", "json"))["items"]
        yield name, {port["name"]: state.Lab(name).workload(port["row"]) for port in ports}
    finally:
        nestnet("down", "--name", name)


def inside(namespace: str, *command: str) -> str:
    """What it says, whether or not it succeeds."""
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, *command], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def hops(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines()[1:]]


@pytest.mark.root
@pytest.mark.parametrize("by", [["-I"], ["-U"], ["-T"], []], ids=["ICMP", "UDP", "TCP", "ports"])
def test_traceroute_shows_the_path(by: list[str], lab: tuple[str, dict[str, str]]) -> None:
    _, namespaces = lab
    for limit in ("net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0"):
        inside(namespaces["z"], "sysctl", "-w", limit)  # of the workload's own kernel
    shown = inside(namespaces["a"], "traceroute", "-n", "-w", "2", *by, "10.0.1.2")
    assert hops(shown) == ["10.0.0.1", "192.0.0.8", "10.0.1.1", "10.0.1.2"], shown
    shown = inside(namespaces["a"], "traceroute", "-6", "-n", "-w", "2", *by, "fd00:1::2")
    transit = hops(shown)[1]
    assert transit.startswith("fe80::"), shown
    assert hops(shown) == ["fd00::1", transit, "fd00:1::1", "fd00:1::2"], shown


@pytest.mark.root
def test_ping_says_why(lab: tuple[str, dict[str, str]]) -> None:
    _, namespaces = lab
    a = namespaces["a"]
    assert "From 10.0.1.1 icmp_seq=1 Destination Host Unreachable" in inside(a, "ping", "-c1", "-W2", "10.0.1.99")
    assert "From 10.0.0.1 icmp_seq=1 Destination Net Unreachable" in inside(a, "ping", "-c1", "-W2", "198.51.100.1")
    assert "From 192.0.0.8 icmp_seq=1 Time to live exceeded" in inside(a, "ping", "-c1", "-W2", "-t2", "10.0.1.2")
    assert "From fd00:1::1 icmp_seq=1 Destination unreachable: Address" in inside(a, "ping", "-c1", "-W2", "fd00:1::99")
    assert "From fd00::1 icmp_seq=1 Destination unreachable: No route" in inside(a, "ping", "-c1", "-W2", "2001:db8::1")
    shown = inside(a, "ping", "-c1", "-W2", "10.0.1.1")
    assert re.search(r"ttl=253\b", shown), shown


@pytest.mark.root
@pytest.mark.parametrize("size", [1472, 9000])
@pytest.mark.parametrize("router", ["10.0.0.1", "10.0.1.1", "fd00::1", "fd00:1::1"])
def test_routers_answer_pings_in_fragments(router: str, size: int, lab: tuple[str, dict[str, str]]) -> None:
    _, namespaces = lab
    shown = inside(namespaces["a"], "ping", "-c1", "-W2", "-s", str(size), router)
    assert f"{size + 8} bytes from {router}: icmp_seq=1" in shown, shown
    assert "wrong data byte" not in shown


@pytest.mark.root
def test_who_sends_too_much_learns_the_size(lab: tuple[str, dict[str, str]]) -> None:
    """A workload that believes in 1500: each packet that is too big is answered, then the kernel knows better."""
    _, namespaces = lab
    a = namespaces["a"]
    inside(a, "ip", "link", "set", "eth0", "mtu", "1500")
    try:
        shown = inside(a, "ping", "-c1", "-W2", "-M", "do", "-s", str(1451 - 28), "10.0.1.2")
        assert "From 10.0.0.1 icmp_seq=1 Frag needed and DF set (mtu = 1450)" in shown
        assert "mtu 1450" in inside(a, "ip", "route", "get", "10.0.1.2")
        assert " 0% packet loss" in inside(a, "ping", "-c1", "-W2", "-M", "do", "-s", str(1450 - 28), "10.0.1.2")
        shown = inside(a, "ping", "-c1", "-W2", "-M", "do", "-s", str(1451 - 48), "fd00:1::2")
        assert "From fd00::1 icmp_seq=1 Packet too big: mtu=1450" in shown
        # TCP, with segments made for 1500 at first, and so large packets for the program: it gets through.
        with ExitStack() as stack:
            server = netns.run_in(netns.path(namespaces["z"]), lambda: socket.create_server(("10.0.1.2", 7001)))
            stack.enter_context(server)
            client = netns.run_in(netns.path(a), lambda: socket.create_connection(("10.0.1.2", 7001), 5))
            stack.enter_context(client)
            accepted, _ = server.accept()
            stack.enter_context(accepted)
            accepted.settimeout(10)
            client.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(accepted.recv(65536))
    finally:
        inside(a, "ip", "link", "set", "eth0", "mtu", "1450")


@pytest.mark.root
def test_a_routers_closed_port_is_refused(lab: tuple[str, dict[str, str]]) -> None:
    _, namespaces = lab

    def ask(family: socket.AddressFamily, address: str) -> int:
        with socket.socket(family, socket.SOCK_DGRAM) as asker:
            asker.settimeout(5)
            asker.connect((address, 53))
            asker.send(b"?")
            try:
                asker.recv(1)
            except OSError as error:
                return error.errno or 0
        return 0

    for family, address in [(socket.AF_INET, "10.0.1.1"), (socket.AF_INET6, "fd00:1::1")]:
        found = netns.run_in(netns.path(namespaces["a"]), lambda f=family, a=address: ask(f, a))  # type: ignore[misc]
        assert found == errno.ECONNREFUSED
