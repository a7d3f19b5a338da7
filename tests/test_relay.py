"""The relay: an agent in a port's workload reaches the controller, over TLS, and nothing else of the machine below.

The controller is a process on the wire; the machine's agent is the real one, with values that this test desires.

    controller 192.0.2.254                     below, in the namespace of port ONE, as a machine of its own:
         |  wire                               INNER, whose relay is reached through that of ONE
    machine m1: ONE, TWO, GIVEN (a namespace that was there), GUEST (a tap), all with an agent; NONE without
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

import pytest
from frames import echo, ip_frame, neighbour, solicited, tcp, udp
from machines import Guest
from test_join import CONTROLLER, ROOT, Site
from test_lab import leftovers
from test_workloads import until
from twins import SMALL, copies

from nestnet.agent import links, netns, relay
from nestnet.agent.agent import Agent
from nestnet.agent.attachments import RELAY_HERE, Workloads
from nestnet.agent.feed import Desired
from nestnet.agent.inquiries import Inquiries
from nestnet.agent.metrics import families
from nestnet.agent.relay import BYTES, CONNECTIONS, Counts, Relay
from nestnet.api.client import Client, Credentials, trusted
from nestnet.datapath.kernel import BPFFS, Kernel
from nestnet.lab.down import down
from nestnet.lab.state import locked
from nestnet.model import packet as pk
from nestnet.model.errors import Forbidden, Unreachable
from nestnet.model.exposition import text
from nestnet.model.values import (
    RELAY,
    RELAY_PORT,
    Attach,
    Machine,
    Network,
    Port,
    Segment,
    World,
    link_local,
)

pytestmark = pytest.mark.root
ONE, TWO, GIVEN, GUEST, NONE, INNER = 1, 2, 3, 4, 5, 6
URL = f"https://[{RELAY}%eth0]:{RELAY_PORT}"
TENTATIVE = 0x40  # <linux/if_addr.h>: IFA_F_TENTATIVE
BOUND = 10.0  # seconds that anything may take


class Place:
    """One machine's agent, as its process has it."""

    def __init__(self, machine: int, room: Path, pins: Path, prefix: str, controller: str) -> None:
        self.machine, self.room, self.prefix, self.controller = machine, room, prefix, controller
        self.kernel = Kernel.open(pins, SMALL)
        self.world = World()
        self.start()

    def start(self) -> None:
        def begin() -> Agent:
            inquiries = Inquiries(self.kernel, print)
            return Agent(
                self.machine, self.kernel, Workloads(self.prefix), inquiries, copies(), Relay(self.controller, print)
            )

        self.agent = netns.run_in(self.room, begin)

    def end(self) -> None:
        self.agent.inquiries.close()
        assert self.agent.relay is not None
        self.agent.relay.close()

    def become(self, world: World) -> list[str]:
        """The problems that are left."""
        self.world = world
        netns.run_in(self.room, partial(self.agent.converge, Desired(world.values, 1, True)))
        return self.agent.problems

    def turn(self) -> list[str]:
        return self.become(self.world)

    def counts(self, port: int) -> Counts:
        assert self.agent.relay is not None
        return self.agent.relay.counts[port]

    def drops(self, port: int) -> dict[str, int]:
        return dict(self.agent.ports().get(str(port), {"drops": {}})["drops"])


@dataclass
class Lab:
    site: Site
    m1: Place
    world: World
    given: str
    token: str

    def room(self, port: int) -> Path:
        return netns.path(self.given if port == GIVEN else f"{self.m1.prefix}{port}")

    def credentials(self) -> Credentials:
        with self.site.client() as client:
            return Credentials(self.token, client.authority())

    def ask(self, port: int, url: str = URL, timeout: float = BOUND) -> dict[str, Any]:
        """What the controller says to somebody in a port's workload: over TLS, on a connection of its own."""

        def work() -> dict[str, Any]:
            with Client(url, timeout, patience=0, credentials=self.credentials()) as client:
                return dict(client.status())

        return netns.run_in(self.room(port), work)

    def open(self, port: int, interface: str = "eth0") -> socket.socket:
        """A connection to the relay and nothing said yet."""

        def work() -> socket.socket:
            return socket.create_connection((f"{RELAY}%{interface}", RELAY_PORT), BOUND)

        return netns.run_in(self.room(port), work)


def port(id: int, segment: int = 1, **more: Any) -> Port:
    mac = 0x020000000000 + id
    addresses = (IPv4Address(f"10.7.0.{10 + id}"), IPv6Address(f"fd07::{10 + id}"))
    return Port(id, segment, segment, 1, mac, addresses, agent=id != NONE, **more)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    site = Site(name, tmp_path_factory.mktemp("site"))
    pins = BPFFS / "nestnet" / f"nnt-relay-{os.getpid()}"
    given = f"nnt-relay-{os.getpid()}-given"
    world = World.of(
        (
            Machine(1, IPv4Address("192.0.2.1")),
            Network(1, mtu=1430),
            Segment(1, 1, 101, (ip_network("10.7.0.0/24"), ip_network("fd07::/64"))),
            port(ONE),
            port(TWO),
            port(GIVEN, attach=Attach("netns", given)),
            port(GUEST, attach=Attach("tap", "vm1")),
            port(NONE),
        )
    )
    try:
        with locked(name):
            site.build()
        netns.create(given)
        site.start_controller()
        with site.client() as client:
            token = client.make_token("inner", everything="reader")["token"]
        m1 = Place(1, netns.path(site.lab.machine("m1")), pins / "1", site.lab.workloads, CONTROLLER)
        try:
            assert m1.become(world) == []
            yield Lab(site, m1, world, given, token)
        finally:
            m1.end()
            m1.kernel.unpin()
            (pins / "1").rmdir()
            pins.rmdir()
    finally:
        down(name)
        netns.delete(given)
    assert leftovers(name) == []


def end_of(port: int) -> str:
    return "vm1" if port == GUEST else links.short_name("p", port)


# ---- who reaches the controller


@pytest.mark.parametrize("port", [ONE, TWO, GIVEN])
def test_an_agent_in_a_workload_reaches_the_controller(lab: Lab, port: int) -> None:
    before = replace(lab.m1.counts(port))
    assert "revision" in lab.ask(port)
    now = lab.m1.counts(port)
    assert now.accepted == before.accepted + 1
    assert now.sent > before.sent
    assert now.received > before.received
    assert now.failed == before.failed
    until(lambda: lab.m1.counts(port).connections == 0, "the connection has ended here, too")


def test_commands_reach_it_too(lab: Lab, tmp_path: Path) -> None:
    """With the address as people write it, and the name of the controller nowhere."""
    (tmp_path / "authority.pem").write_text(lab.credentials().authority or "")
    more = {"NESTNET_CONTROLLER": URL, "NESTNET_TOKEN": lab.token, "NESTNET_AUTHORITY": f"{tmp_path}/authority.pem"}
    command = [sys.executable, "-m", "nestnet", "get", "machine"]
    work = partial(
        subprocess.run, command, capture_output=True, text=True, cwd=ROOT, timeout=60, env={**os.environ, **more}
    )
    done = netns.run_in(lab.room(ONE), work)
    assert done.returncode == 0, done.stderr


def test_the_authority_that_counts_is_the_controllers(lab: Lab) -> None:
    """Who is not it, as a relay that would like to read, is not spoken to."""
    found = netns.run_in(lab.room(ONE), partial(trusted, URL, lab.token))
    assert found.authority == lab.credentials().authority
    with pytest.raises(Forbidden):
        netns.run_in(lab.room(ONE), partial(trusted, URL, f"{lab.token[:-1]}{'0' if lab.token[-1] != '0' else '1'}"))


def test_nobody_else_has_a_relay(lab: Lab) -> None:
    with pytest.raises(Unreachable):
        lab.ask(NONE, timeout=2)
    assert lab.m1.drops(NONE).get("nd_unknown", 0) > 0
    before = received(lab, NONE)
    for frame in right(NONE):
        send(lab, NONE, frame)
    until(lambda: lab.m1.drops(NONE).get("unknown_unicast", 0) > 0, "it is forwarded, to nobody")
    assert received(lab, NONE) == before


def test_behind_a_tap_too(lab: Lab) -> None:
    guest = Guest(f"{lab.given}-guest", lab.m1.room, "vm1", "02:00:00:00:00:04")
    try:
        url = URL.replace("eth0", "nic")

        def work() -> dict[str, Any]:
            with Client(url, BOUND, credentials=lab.credentials()) as client:
                return dict(client.status())

        until(lambda: "fe80::" in guest.run("ip", "-6", "address", "show", "dev", "nic", "-tentative"), "no address")
        assert "revision" in netns.run_in(guest.room, work)
    finally:
        guest.close()


def test_through_one_relay_to_the_next(lab: Lab) -> None:
    """Port ONE is a machine of the network above: a port of that is relayed to it, and by it to the machine below."""
    world = World.of(
        (
            Machine(7, IPv4Address("10.7.0.11"), 1430),
            Network(2, mtu=1380),
            Segment(2, 2, 201, (ip_network("10.7.0.0/24"), ip_network("fd07::/64"))),
            replace(port(INNER, 2), host=7),
        )
    )
    pins = BPFFS / "nestnet" / f"nnt-relay-{os.getpid()}-inner"
    inner = Place(7, lab.room(ONE), pins, f"{lab.m1.prefix}inner-", URL)
    room = netns.path(f"{inner.prefix}{INNER}")
    try:
        assert inner.become(world) == []
        before = replace(lab.m1.counts(ONE))

        def work() -> dict[str, Any]:
            with Client(URL, BOUND, credentials=lab.credentials()) as client:
                return dict(client.status())

        assert "revision" in netns.run_in(room, work)
        assert inner.counts(INNER).accepted == 1
        assert lab.m1.counts(ONE).accepted == before.accepted + 1
        inner.become(world.without(("port", INNER)))
    finally:
        inner.end()
        inner.kernel.unpin()
        pins.rmdir()


# ---- and nothing else


def received(lab: Lab, port: int) -> int:
    """Packets that the machine's own stack, for IPv6, has taken from a port's link."""
    counters = Path(f"/proc/thread-self/net/dev_snmp6/{end_of(port)}")
    lines = netns.run_in(lab.m1.room, counters.read_text).splitlines()
    return int(dict(line.split() for line in lines)["Ip6InReceives"])


def send(lab: Lab, port: int, frame: bytes) -> None:
    raw = netns.run_in(lab.room(port), partial(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
    with raw:
        raw.sendto(frame, ("eth0", 0))


def right(port: int) -> list[bytes]:
    """What the relay takes: the beginning of a connection."""
    mac = 0x020000000000 + port
    own, there = link_local(mac).packed, RELAY.packed
    return [ip_frame(pk.NOBODY_MAC, mac, own, there, pk.TCP, tcp(own, there, 1000, RELAY_PORT, pk.SYN))]


def wrong(lab: Lab) -> Iterator[bytes]:
    """What else ONE may try with the machine: each to the relay's MAC, to that of its end, and to all."""
    mac = 0x020000000000 + ONE
    link, mine, mine4 = link_local(mac).packed, IPv6Address("fd07::11").packed, pk.mapped(IPv4Address("10.7.0.11"))
    here, there = RELAY.packed, IPv6Address("2001:db8::254").packed
    machine, controller = (pk.mapped(IPv4Address(f"192.0.2.{n}")) for n in (1, 254))
    pairs = [(link, here), (mine, here), (link, there), (mine, there), (mine, IPv6Address("2001:db8::1").packed)]
    pairs += [(link, IPv6Address("ff02::1").packed), (link, IPv6Address("ff02::2").packed), (link, bytes(15) + b"\1")]
    pairs += [(mine4, machine), (mine4, controller)]
    with links.netlink() as ipr:
        end = links.find(ipr, end_of(ONE))
    assert end is not None
    for target_mac in (pk.NOBODY_MAC, int(end.mac.replace(":", ""), 16), pk.BROADCAST, 0x333300000001):
        for source, target in pairs:
            family6 = not pk.is_mapped(target)
            flow = source, target
            bodies = [(pk.UDP, udp(*flow, 1000, number, b"x")) for number in (RELAY_PORT, 9, 53)]
            bodies += [(pk.TCP, tcp(*flow, 1000, number, pk.SYN)) for number in (9, 22, 7443)]
            if flow != (link, here) or target_mac != pk.NOBODY_MAC:
                bodies.append((pk.TCP, tcp(*flow, 1000, RELAY_PORT, pk.SYN)))
            bodies.append((pk.ICMPV6 if family6 else pk.ICMP, echo(*flow, 7)))
            for protocol, body in bodies:
                yield ip_frame(target_mac, mac, *flow, protocol, body)
        for kind in (135, 136):
            body = neighbour(kind, link, here, here if kind == 135 else link, (kind - 134, mac), 0x60)
            yield ip_frame(target_mac, mac, link, here, pk.ICMPV6, body, 255)
    body = neighbour(135, link, solicited(here), here, (1, mac))
    yield ip_frame(0x333300000001, mac, link, solicited(here), pk.ICMPV6, body, 255)


def test_nothing_else_of_the_machine_is_reached(lab: Lab) -> None:
    """The machine forwards for others, and somebody listens there to everything: neither shows."""
    before = received(lab, ONE)
    lab.ask(ONE)
    assert received(lab, ONE) > before, "what is for the relay is counted there"

    def listen() -> list[socket.socket]:
        for key in ("net/ipv6/conf/all/forwarding", "net/ipv4/ip_forward"):
            (Path("/proc/sys") / key).write_text("1")
        ears = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                ear = socket.socket(family, kind | socket.SOCK_NONBLOCK)
                if family == socket.AF_INET6:
                    ear.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                ear.bind(("", 9))
                if kind == socket.SOCK_STREAM:
                    ear.listen()
                ears.append(ear)
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
        raw.bind(("eth0", 3))
        return [*ears, raw]

    *ears, wire = netns.run_in(lab.m1.room, listen)
    frames = netns.run_in(lab.m1.room, lambda: list(wrong(lab)))
    with contextlib.ExitStack() as stack:
        for ear in (*ears, wire):
            stack.enter_context(ear)
        answers = netns.run_in(
            lab.room(ONE),
            partial(socket.socket, socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3)),
        )
        stack.enter_context(answers)
        answers.bind(("eth0", 3))
        raw = netns.run_in(lab.room(ONE), partial(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
        stack.enter_context(raw)
        before = received(lab, ONE)
        for frame in frames:
            raw.sendto(frame, ("eth0", 0))
        taken = received(lab, ONE) - before
        assert len(frames) > 300
        assert taken == 0, f"{taken} of {len(frames)} frames came to the machine's own stack"
        for ear in ears:
            with pytest.raises(BlockingIOError):
                ear.recv(1) if ear.type == socket.SOCK_DGRAM else ear.accept()
        marks = pk.mac_bytes(0x020000000000 + ONE), IPv4Address("10.7.0.11").packed, IPv6Address("fd07::11").packed
        left = [frame for frame in drained(wire, outgoing=True) if any(mark in frame[:54] for mark in marks)]
        assert left == [], "the machine forwarded"
        others = {port.mac for port in lab.world.ports.values()}  # who were sent what is for all, and may answer
        answered = [pk.parse(frame) for frame in drained(answers)]
        told = {(packet.protocol, packet.icmp_type) for packet in answered if packet.source_mac not in others}
        assert told == {(pk.ICMPV6, 136)}, "ND is answered by the datapath, and nothing else by anybody"
    assert "revision" in lab.ask(ONE)


def drained(ear: socket.socket, outgoing: bool = False) -> list[bytes]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            data, (_, _, kind, *_) = ear.recvfrom(1 << 16)
            if (kind == socket.PACKET_OUTGOING) == outgoing:
                found.append(data)
    return found


def test_what_is_right_is_counted_and_bounded(lab: Lab) -> None:
    """More packets than an agent sends do not come to the machine's stack either."""
    before, drops = received(lab, TWO), lab.m1.drops(TWO).get("ask_limit", 0)
    (frame,) = right(TWO)
    raw = netns.run_in(lab.room(TWO), partial(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
    with raw:
        begun = time.monotonic()
        while lab.m1.drops(TWO).get("ask_limit", 0) == drops:
            for _ in range(5000):
                raw.sendto(frame, ("eth0", 0))
        took = time.monotonic() - begun
    assert received(lab, TWO) - before <= 100_000 + 10_000 * took + 1
    assert "revision" in lab.ask(ONE), "the others have theirs"
    until(lambda: "revision" in lab.ask(TWO), "it has its own again")


# ---- one port and the next


def test_a_flood_of_connections_hurts_its_own_port_only(lab: Lab) -> None:
    ended = threading.Event()
    opened: list[socket.socket] = []

    def flood() -> None:
        while not ended.is_set():
            one = socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            opened.append(one)
            with contextlib.suppress(OSError):
                one.connect_ex((str(RELAY), RELAY_PORT, 0, socket.if_nametoindex("eth0")))
                one.send(b"hello?")
            if len(opened) > 200:
                opened.pop(0).close()

    thread = threading.Thread(target=netns.run_in, args=(lab.room(ONE), flood))
    thread.start()
    try:
        until(lambda: lab.m1.counts(ONE).accepted > CONNECTIONS, "it does flood")
        for _ in range(5):
            assert "revision" in lab.ask(TWO)
        assert lab.m1.counts(ONE).connections <= CONNECTIONS
    finally:
        ended.set()
        thread.join()
        for one in opened:
            one.close()
    until(lambda: lab.m1.counts(ONE).connections == 0, "all have ended")
    assert "revision" in lab.ask(ONE)


@dataclass
class Bench:
    relay: Relay
    ends: dict[int, int]
    dial: Callable[[int], socket.socket]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A relay without an agent, of two ports, to one who echoes."""
    name = f"nnt-relay-{os.getpid()}"
    room = netns.create(f"{name}-bench")
    rooms = {n: netns.create(f"{name}-bench{n}") for n in (1, 2)}
    loop = asyncio.new_event_loop()

    async def echo_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    def build() -> dict[int, int]:
        ends = {}
        with links.netlink() as ipr:
            for n in rooms:
                end = links.make_veth(ipr, f"p{n}", "eth0", rooms[n], mtu=1500, mac=f"02:00:00:00:00:0{n}")
                links.set_only_neighbour(
                    ipr, end.index, RELAY_HERE, link_local(0x020000000000 + n), f"02:00:00:00:00:0{n}"
                )
                ipr.link("set", index=end.index, state="up")
                ends[n] = end.index
        return ends

    def inside() -> None:
        with links.netlink() as ipr:
            link = links.find(ipr, "eth0")
            assert link is not None
            links.set_sysctls({"net/ipv6/conf/eth0/accept_dad": 0})
            ipr.link("set", index=link.index, state="up")

    def ready() -> bool:
        rows = [line.split() for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines()]
        return any(name == "eth0" and not int(flags, 16) & TENTATIVE for *_, flags, name in rows)

    server = loop.run_until_complete(asyncio.start_unix_server(echo_back, str(tmp_path / "echo")))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    made: Relay | None = None
    try:
        ends = netns.run_in(room, build)
        for each in rooms.values():
            netns.run_in(each, inside)
            until(partial(netns.run_in, each, ready), "no address")

        def dial(n: int) -> socket.socket:
            work = partial(socket.create_connection, (f"{RELAY}%eth0", RELAY_PORT), BOUND)
            return netns.run_in(rooms[n], work)

        def begin() -> Relay:
            relay = Relay(f"unix:{tmp_path}/echo", print)
            assert relay.know(ends) == []
            return relay

        made = netns.run_in(room, begin)
        yield Bench(made, ends, dial)
    finally:
        if made is not None:
            made.close()
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        for each in (f"{name}-bench", *(f"{name}-bench{n}" for n in rooms)):
            netns.delete(each)


def echoed(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    found = b""
    while len(found) < len(data):
        part = connection.recv(1 << 16)
        assert part, "it ended"
        found += part
    return found


def test_a_flood_of_bytes_hurts_its_own_port_only(bench: Bench) -> None:
    """Port 1 sends as much as it can on as many connections as it gets, and hears it all: it has its rate each way, and
    its connections; port 2 is answered meanwhile."""
    ended = threading.Event()
    flooding = [bench.dial(1) for _ in range(CONNECTIONS + 8)]  # the kernel takes more than the relay does

    def pump(connection: socket.socket) -> None:
        connection.setblocking(False)
        data = os.urandom(1 << 16)
        while not ended.is_set():
            for work in (partial(connection.send, data), partial(connection.recv, 1 << 16)):
                with contextlib.suppress(OSError):
                    work()
            ended.wait(0.005)  # leaves the computer to others

    begun = time.monotonic()
    threads = [threading.Thread(target=pump, args=(one,)) for one in flooding]
    for thread in threads:
        thread.start()
    try:
        counts = bench.relay.counts[1]
        until(lambda: counts.received > 2 * BYTES, "it does flood")
        with bench.dial(2) as connection:
            for number in range(20):
                assert echoed(connection, data := bytes([number]) * 100_000) == data
        until(lambda: counts.connections == CONNECTIONS, "all that it may have")
        sent, received, took = counts.sent, counts.received, time.monotonic() - begun
        bound = BYTES * (took + 1) + (CONNECTIONS + 1) * relay.CHUNK  # in hand
        assert sent <= bound
        assert received <= bound
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        for one in flooding:
            one.close()
    with bench.dial(1) as connection:
        assert echoed(connection, b"again") == b"again"


def test_what_was_said_before_the_end_arrives(bench: Bench) -> None:
    with bench.dial(1) as connection:
        connection.sendall(data := os.urandom(300_000))
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
    assert found == data
    assert bench.relay.counts[1].sent == bench.relay.counts[1].received == len(data)


def test_who_says_nothing_is_not_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "IDLE", 0.3)
    with bench.dial(1) as connection:
        assert echoed(connection, b"something") == b"something"
        connection.settimeout(BOUND)
        assert connection.recv(1) == b""


def test_a_port_that_has_no_relay_any_more_is_told_at_once(bench: Bench) -> None:
    with bench.dial(1) as first, bench.dial(2) as second:
        assert echoed(first, b"1") == b"1"
        assert echoed(second, b"2") == b"2"
        assert bench.relay.know({2: bench.ends[2]}) == []
        first.settimeout(BOUND)
        with pytest.raises(ConnectionResetError):
            first.recv(1)
        with pytest.raises(ConnectionRefusedError):
            bench.dial(1)
        assert echoed(second, b"still") == b"still"
        assert bench.relay.know(bench.ends) == []
        with bench.dial(1) as again:
            assert echoed(again, b"again") == b"again"


def test_a_controller_that_is_not_there(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "echo").rename(tmp_path / "away")
    with bench.dial(1) as connection:
        connection.settimeout(BOUND)
        assert connection.recv(1) == b""
    assert bench.relay.counts[1].failed == 1
    (tmp_path / "away").rename(tmp_path / "echo")
    with bench.dial(1) as connection:
        assert echoed(connection, b"back") == b"back"


# ---- changes


def test_a_connection_lasts_through_turns_and_changes_of_others(lab: Lab) -> None:
    with lab.open(ONE) as connection:
        until(lambda: lab.m1.counts(ONE).connections == 1, "it is relayed")
        lab.m1.turn()
        lab.m1.turn()
        other = replace(lab.world.ports[TWO], agent=False, groups=(1,))
        assert lab.m1.become(lab.world.with_(other)) == []
        assert lab.m1.become(lab.world) == []
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)
        assert lab.m1.counts(ONE).connections == 1
        assert "revision" in lab.ask(TWO)


def test_the_flag_is_taken_away_and_given_back(lab: Lab) -> None:
    with lab.open(ONE) as connection:
        until(lambda: lab.m1.counts(ONE).connections == 1, "it is relayed")
        without = lab.world.with_(replace(lab.world.ports[ONE], agent=False))
        try:
            assert lab.m1.become(without) == []
            connection.settimeout(BOUND)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
            with pytest.raises(Unreachable):
                lab.ask(ONE, timeout=2)
            assert "revision" in lab.ask(TWO)
            assert seat(lab, ONE) == []
        finally:
            assert lab.m1.become(lab.world) == []
    assert "revision" in lab.ask(ONE)


def test_after_the_agent_was_away(lab: Lab) -> None:
    """Without it nobody listens, whoever else does on this machine; with the next one all is as before."""
    lab.ask(ONE)
    lab.m1.end()
    try:
        with pytest.raises(Unreachable):
            lab.ask(ONE, timeout=2)
    finally:
        lab.m1.start()
    assert lab.m1.become(lab.world) == []
    for port in (ONE, TWO, GIVEN):
        assert "revision" in lab.ask(port)


def seat(lab: Lab, port: int) -> list[str]:
    """The addresses and neighbours of a port's end."""

    def look() -> list[str]:
        with links.netlink() as ipr:
            end = links.find(ipr, end_of(port))
            assert end is not None
            found = [m.get_attr("IFA_ADDRESS") for m in ipr.get_addr(family=socket.AF_INET6, index=end.index)]
            known = ipr.get_neighbours(family=socket.AF_INET6, ifindex=end.index)
            return [*found, *(m.get_attr("NDA_DST") for m in known if m["state"] == links.NUD_PERMANENT)]

    return netns.run_in(lab.m1.room, look)


@pytest.mark.parametrize(
    "damage",
    [
        ["ip", "address", "del", "fe80::1/64", "dev", "{end}"],
        ["ip", "neigh", "del", "{own}", "dev", "{end}"],
        ["sysctl", "-qw", "net.ipv6.conf.{end}.disable_ipv6=1"],
        ["ip", "link", "set", "{end}", "down"],
        ["ip", "link", "del", "{end}"],
    ],
    ids=["address", "neighbour", "ipv6", "down", "link"],
)
@pytest.mark.parametrize("port", [TWO, GUEST], ids=["veth", "tap"])
def test_what_others_take_away_comes_back(lab: Lab, port: int, damage: list[str]) -> None:
    own = str(link_local(lab.world.ports[port].mac))
    if port == GUEST and damage[:3] == ["ip", "link", "del"]:
        damage = ["ip", "tuntap", "del", "{end}", "mode", "tap"]
    command = [word.format(end=end_of(port), own=own) for word in damage]
    wanted = [str(RELAY), own]
    assert seat(lab, port) == wanted
    netns.run_in(lab.m1.room, partial(subprocess.run, command, check=True))
    lab.m1.agent.noticed.clear()
    until(lambda: lab.m1.turn() == [] and seat(lab, port) == wanted, "it comes back")
    assert any(f"port {port}:" in what for _, what in lab.m1.agent.noticed), lab.m1.agent.noticed
    if port == TWO:
        assert "revision" in lab.ask(TWO)


def test_a_machine_that_has_no_tls_says_so(lab: Lab) -> None:
    known, lab.m1.agent.relay = lab.m1.agent.relay, None
    try:
        changed = lab.world.with_(replace(lab.world.ports[NONE], groups=(1,)))
        problems = lab.m1.become(changed)
        assert len(problems) == 4
        assert "does not reach its controller over TLS" in problems[0]
    finally:
        lab.m1.agent.relay = known
        assert lab.m1.become(lab.world) == []


def test_metrics_have_what_was_relayed(lab: Lab) -> None:
    lab.ask(ONE)
    lab.m1.agent.measure()
    counts = lab.m1.counts(ONE)
    told = text(families(lab.m1.agent.measured))
    assert f'nestnet_relay_accepted_total{{port="{ONE}"}} {counts.accepted}\n' in told
    assert f'nestnet_relay_sent_bytes_total{{port="{ONE}"}} {counts.sent}\n' in told
    assert 'nestnet_relay_connections{port="5"}' not in told
