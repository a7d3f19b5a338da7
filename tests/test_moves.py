"""Moving ports under traffic, at each level of a tree of networks: real machines, agents, workloads and packets.

m1: h1, g1, x     m2: h2, g2, y     m3: h3, g3         (acme carries mid carries top)

Numbered packets go both ways between x and y, over IPv4 and IPv6, and a TCP connection for each of them. Only x may
open: what y sends passes because a connection is remembered, which has to come along.
"""

from __future__ import annotations

import os
import select
import socket
import statistics
import struct
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from test_lab import leftovers, nestnet

from nestnet.agent import netns
from nestnet.api.client import Client
from nestnet.lab import state
from nestnet.lab.down import down
from nestnet.lab.state import Lab

pytestmark = pytest.mark.root
ROUNDS = int(os.environ.get("NESTNET_MOVES", "1"))  # there and back at each level
PACE = 0.001  # seconds from one packet of a flow to the next
LOSS = 0.010  # seconds
ALL = 3  # ETH_P_ALL
SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>
MOVES = [("acme/h1", "m3", "m1"), ("acme/mid/g1", "h3", "h1"), ("acme/mid/top/x", "g3", "g1")]

FILE = """
apiVersion: nestnet/v1
machines: {m1: {}, m2: {}, m3: {}}
networks:
  acme:
    segments: {net: {cidr: [10.0.0.0/24, "fd00:1::/64"]}}
    ports:
      h1: {segment: net, host: m1, hosts: true}
      h2: {segment: net, host: m2, hosts: true}
      h3: {segment: net, host: m3, hosts: true}
    networks:
      mid:
        segments: {net: {cidr: [10.1.0.0/24, "fd00:2::/64"]}}
        ports:
          g1: {segment: net, host: h1, hosts: true}
          g2: {segment: net, host: h2, hosts: true}
          g3: {segment: net, host: h3, hosts: true}
        networks:
          top:
            segments: {a: {cidr: [10.2.0.0/24, "fd00:3::/64"]}, b: {cidr: [10.3.0.0/24, "fd00:4::/64"]}}
            routers: {r: {segments: [a, b]}}
            ports:
              x: {segment: a, host: g1, groups: [openers]}
              y: {segment: b, host: g2}
              z: {segment: a, host: g1}
            policies:
              - {from: openers, to: any, allow: any}
"""
FIRST = {4: ("10.2.0.2", "10.3.0.2"), 6: ("fd00:3::2", "fd00:4::2")}  # of x, of y


@dataclass
class Flow:
    """Numbered packets one way: when each was sent, and which came, as often as they came."""

    name: str
    source: socket.socket
    peer: str
    target: socket.socket
    sent: list[float] = field(default_factory=list)
    came: Counter[int] = field(default_factory=Counter)

    def send(self, now: float) -> None:
        # Not connected: the kernel looks at each packet's way as if it were the first.
        self.source.sendto(struct.pack("!I", len(self.sent)), (self.peer, 5000))
        self.sent.append(now)

    def receive(self) -> None:
        while True:
            try:
                (number,) = struct.unpack("!I", self.target.recv(2048)[:4])
            except BlockingIOError:
                return
            self.came[number] += 1

    def gap(self, since: float) -> float:
        """The longest time in which all was lost that was sent, in seconds, among what was sent after `since`."""
        got = [at for number, at in enumerate(self.sent) if at >= since and self.came[number]]
        lost = [
            (a, b)
            for a, b in pairwise(n for n, at in enumerate(self.sent) if at >= since and self.came[n])
            if b > a + 1
        ]
        assert got, self.name
        return max((self.sent[b - 1] - self.sent[a + 1] + PACE for a, b in lost), default=0.0)

    def doubled(self) -> int:
        return sum(times > 1 for times in self.came.values())


class Traffic:
    """Flows and connections between two namespaces, on a thread of their own."""

    def __init__(self, x: str, y: str, stack: ExitStack) -> None:
        self.flows: list[Flow] = []
        self.streams: list[Stream] = []
        for family, addresses in FIRST.items():
            ends = [self._udp(ns, family, address) for ns, address in zip((x, y), addresses, strict=True)]
            for end in ends:
                stack.callback(end.close)
            for one, other, peer in ((ends[0], ends[1], addresses[1]), (ends[1], ends[0], addresses[0])):
                self.flows.append(Flow(f"IPv{family} to {peer}", one, peer, other))
            self.streams.append(Stream(x, y, family, addresses, stack))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        stack.callback(self.stop)

    @staticmethod
    def _udp(namespace: str, family: int, address: str) -> socket.socket:
        def make() -> socket.socket:
            found = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
            found.setblocking(False)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            # While others keep the CPUs busy what is sent may wait, hundreds of packets of it.
            found.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 22)
            found.bind((address, 5000))
            return found

        return netns.run_in(netns.path(namespace), make)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            now = time.monotonic()
            if now >= due:
                for flow in self.flows:
                    flow.send(now)
                for stream in self.streams:
                    stream.write()
                due = max(due + PACE, now - 0.05)
            for flow in self.flows:
                flow.receive()
            for stream in self.streams:
                stream.read(now)
            select.select([], [], [], max(0.0, min(due - time.monotonic(), PACE)))

    def runs(self, seconds: float) -> None:
        """Return when so much more has been sent and answered."""
        wanted = len(self.flows[0].sent) + int(seconds / PACE)
        end = time.monotonic() + 20 * seconds + 5
        while len(self.flows[0].sent) < wanted:
            assert self._thread.is_alive()
            assert time.monotonic() < end
            self._stop.wait(0.01)


class Stream:
    """A TCP connection from x to y that carries numbers, which come back."""

    def __init__(self, x: str, y: str, family: int, addresses: tuple[str, str], stack: ExitStack) -> None:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6

        def listen() -> socket.socket:
            found = socket.socket(kind, socket.SOCK_STREAM)
            found.bind((addresses[1], 6000))
            found.listen(1)
            return found

        def connect() -> socket.socket:
            return socket.create_connection((addresses[1], 6000), 5)

        with netns.run_in(netns.path(y), listen) as listener:
            self.client = netns.run_in(netns.path(x), connect)
            self.server, _ = listener.accept()
        for end in (self.client, self.server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stack.callback(end.close)
        self.written = self.echoed = 0
        self.out, self.echo, self.back = bytearray(), bytearray(), bytearray()
        self.heard: list[float] = []

    def write(self) -> None:
        self.out += struct.pack("!I", self.written)
        self.written += 1
        self._push(self.client, self.out)

    @staticmethod
    def _push(end: socket.socket, waiting: bytearray) -> None:
        try:
            while waiting:
                del waiting[: end.send(waiting)]
        except BlockingIOError:
            pass

    def read(self, now: float) -> None:
        try:
            while True:
                self.echo += self.server.recv(1 << 16)
        except BlockingIOError:
            pass
        self._push(self.server, self.echo)
        try:
            while True:
                self.back += self.client.recv(1 << 16)
        except BlockingIOError:
            pass
        while len(self.back) >= 4:
            assert struct.unpack("!I", self.back[:4]) == (self.echoed,)
            del self.back[:4]
            self.echoed += 1
            self.heard.append(now)

    def again(self) -> int:
        """How often something was sent again, on both sides: `tcpi_total_retrans`."""
        ends = (end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104) for end in (self.client, self.server))
        return sum(struct.unpack_from("=I", info, 100)[0] for info in ends)

    def pause(self, since: float) -> float:
        heard = [at for at in self.heard if at >= since]
        return max((b - a for a, b in pairwise(heard)), default=0.0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    file = tmp_path_factory.mktemp("moves") / "moves.yaml"
    file.write_text(FILE)
    try:
        nestnet("up", str(file), "--name", name)
        found = state.load(name)
        assert found is not None
        yield found
    finally:
        down(name)
    assert leftovers(name) == []


def namespace(lab: Lab, port: str) -> str:
    with Client(lab.controller) as client:
        return str(client.get("port", port)["attachment"]["namespace"])


def machine(lab: Lab, port: str) -> str:
    with Client(lab.controller) as client:
        return str(client.get("port", port)["machine"])


def mac(lab: Lab, port: str) -> bytes:
    with Client(lab.controller) as client:
        return bytes.fromhex(client.get("port", port)["mac"].replace(":", ""))


class Old:
    """What comes to the NIC of a machine, which has an IPv4 address, for the MAC of a workload."""

    def __init__(self, lab: Lab, machine: str, mac: bytes) -> None:
        def make() -> socket.socket:
            found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(ALL))
            found.bind(("eth0", ALL))
            return found

        self._socket = netns.run_in(netns.path(lab.machine(machine)), make)
        self._mac = mac

    def heard(self) -> int:
        count = 0
        with self._socket as channel:
            while True:
                try:
                    frame = channel.recv(2048)
                except BlockingIOError:
                    return count
                count += frame[50:56] == self._mac


@pytest.mark.alone
def test_what_moves_loses_nothing(lab: Lab) -> None:
    """At each level, there and back: at most 10 ms of loss, nothing twice, nothing to the old place afterwards."""
    report: list[str] = []
    with ExitStack() as stack:
        x = namespace(lab, "top/x")
        inode = netns.inode(netns.path(x))
        traffic = Traffic(x, namespace(lab, "top/y"), stack)
        traffic.runs(0.2)
        for port, there, back in MOVES:
            measured: dict[str, list[float]] = {"lost": [], "TCP waited": [], "sent late": [], "took": []}
            again = sum(stream.again() for stream in traffic.streams)
            for to in [there, back] * ROUNDS:
                since, old = time.monotonic(), machine(lab, port)
                nestnet("move", port, "--to", to, "--lab", lab.name)
                measured["took"].append(time.monotonic() - since)
                assert machine(lab, "top/x") != old
                listening = Old(lab, old, mac(lab, "top/x"))
                traffic.runs(0.3)
                assert listening.heard() == 0, "nothing comes to the old place any more"
                gaps = {flow.name: flow.gap(since) for flow in traffic.flows}
                assert max(gaps.values()) <= LOSS, (port, to, gaps)
                sent = [at for at in traffic.flows[0].sent if at >= since]
                measured["lost"].append(max(gaps.values()))
                measured["TCP waited"].append(max(stream.pause(since) for stream in traffic.streams))
                measured["sent late"].append(max(b - a for a, b in pairwise(sent)))
            again = sum(stream.again() for stream in traffic.streams) - again
            figures = [f"{what} {statistics.median(found) * 1000:.1f} ms" for what, found in measured.items()]
            report.append(f"{port}: {', '.join(figures)}; {again} segments sent again in {2 * ROUNDS} moves")
        traffic.stop()
        for flow in traffic.flows:
            flow.receive()
        assert {flow.name: flow.doubled() for flow in traffic.flows} == dict.fromkeys(
            (f.name for f in traffic.flows), 0
        )
        assert all(stream.echoed > 0.9 * stream.written for stream in traffic.streams)
        assert netns.inode(netns.path(namespace(lab, "top/x"))) == inode, "it is the same workload"
    print(*report, sep="\n")
