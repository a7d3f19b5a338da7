"""Odd shapes of networks, up with real packets: what arrives, with which TTL, and what traceroute shows is what
networkx says of the same file.

    ring    64 routers in a circle, all costs equal, 5 of them with a segment
    star    a hub without a segment, links as costly as can be
    pair    links side by side: two that cost the same, one that costs more; and detours that add up to the same
    wide    two routers with ten segments each
    lan     two routers in one segment, without a link
    apart   two routers that nothing joins
    line    66 routers one after the other: the ends are too far apart
"""

from __future__ import annotations

import json
import select
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import yaml
from test_topology import nestnet

from nestnet.agent import netns
from nestnet.lab import state

MACHINES = ["m1", "m2", "m3"]
TTL, PORT = 64, 7000
IP_RECVTTL, IPV6_RECVHOPLIMIT, IPV6_HOPLIMIT = 12, 51, 52  # <linux/in.h>, <linux/in6.h>
NAMELESS = "192.0.0.8"  # RFC 7600

Pair = tuple[str, str]


def network(routers: dict[str, list[str]], links: list[tuple[str, str, int]], spread: int = 3) -> dict[str, Any]:
    """`routers` says which segments each joins; every segment has a port of its name, and both families."""
    segments = list(dict.fromkeys(segment for joined in routers.values() for segment in joined))
    return {
        "segments": {
            segment: {"cidr": [f"10.{number}.0.0/24", f"fd00:{number:x}::/64"]}
            for number, segment in enumerate(segments)
        },
        "routers": {router: {"segments": joined} if joined else {} for router, joined in routers.items()},
        "links": {f"l{number}": {"between": [a, b], "cost": cost} for number, (a, b, cost) in enumerate(links)},
        "ports": {
            segment: {"segment": segment, "host": MACHINES[number % spread]} for number, segment in enumerate(segments)
        },
    }


def chain(names: list[str], cost: int = 1) -> list[tuple[str, str, int]]:
    return [(a, b, cost) for a, b in pairwise(names)]


RING = [f"r{i}" for i in range(64)]
LINE = [f"r{i}" for i in range(66)]
NETWORKS = {
    "ring": network(
        {name: [f"s{i}"] if i in (0, 1, 16, 32, 33) else [] for i, name in enumerate(RING)}, chain([*RING, RING[0]])
    ),
    "star": network({"hub": [], **{f"r{i}": [f"s{i}"] for i in range(6)}}, [("hub", f"r{i}", 65535) for i in range(6)]),
    "pair": network(
        {"a": ["sa"], "b": ["sb"], "x": [], "y": []},
        [("a", "b", 10), ("b", "a", 10), ("a", "b", 20), *chain(["a", "x", "b"], 5), ("a", "y", 9), ("y", "b", 2)],
    ),
    "wide": network({"a": [f"a{i}" for i in range(10)], "b": [f"b{i}" for i in range(10)]}, [("a", "b", 1)]),
    "apart": network({"a": ["sa"], "b": ["sb"]}, []),
    "line": network(
        {name: [f"s{i}"] if i in (0, 62, 63, 65) else [] for i, name in enumerate(LINE)}, chain(LINE, 65535)
    ),
}
NETWORKS["lan"] = {
    "segments": {name: {"cidr": [f"10.{i}.0.0/24", f"fd00:{i:x}::/64"]} for i, name in enumerate(("lan", "x", "y"))},
    "routers": {
        "one": {"segments": {"lan": ["10.0.0.1", "fd00::1"], "x": []}},
        "two": {"segments": {"lan": ["10.0.0.7", "fd00::7"], "y": []}},
    },
    "links": {},
    "ports": {name: {"segment": name, "host": host} for name, host in zip(("lan", "x", "y"), MACHINES, strict=True)},
}


class Net:
    """One of the networks, up. Ports are called as their segments."""

    def __init__(self, lab: str, name: str, ports: list[dict[str, Any]]) -> None:
        self.file = NETWORKS[name]
        self.rooms = {port["name"]: netns.path(state.Lab(lab).workload(port["row"])) for port in ports}
        self.addresses = {
            family: {
                port["name"]: next(a.partition("/")[0] for a in port["addresses"] if (":" in a) == (family == 6))
                for port in ports
            }
            for family in (4, 6)
        }
        self.graph = nx.MultiGraph()
        self.graph.add_nodes_from(self.file["routers"])
        for link in self.file["links"].values():
            self.graph.add_edge(*link["between"], cost=link["cost"])
        self.routers: dict[str, list[str]] = defaultdict(list)  # by segment; the first is its gateway
        for router, joined in self.file["routers"].items():
            for segment in joined.get("segments", ()):
                self.routers[segment].append(router)

    def ways(self, a: str, b: str) -> list[list[str]]:
        """The routers of each cheapest way between the segments of two ports. None if there is none."""
        first = self.routers[a][0]
        last = first if first in self.routers[b] else self.routers[b][0]
        if not nx.has_path(self.graph, first, last):
            return []
        simple = nx.Graph()
        simple.add_nodes_from(self.graph)
        for x, y, cost in self.graph.edges(data="cost"):
            if cost < simple.get_edge_data(x, y, {"cost": cost + 1})["cost"]:
                simple.add_edge(x, y, cost=cost)
        return list(nx.all_shortest_paths(simple, first, last, weight="cost"))

    def speaks(self, router: str, facing: str, family: int) -> str:
        """The address that a router tells errors from to a port; the beginning of it where it is link-local."""
        joined = self.file["routers"][router].get("segments", [])
        own = facing if facing in joined else next(iter(joined), None)
        if own is None:
            return NAMELESS if family == 4 else "fe80::"
        given = joined[own] if isinstance(joined, dict) else []
        number = list(self.file["segments"]).index(own)
        if given:
            return str(given[family == 6])
        return f"10.{number}.0.1" if family == 4 else f"fd00:{number:x}::1".replace("fd00:0::", "fd00::")


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Net]]:
    file: Path = tmp_path_factory.mktemp("shapes") / "shapes.yaml"
    content = {"apiVersion": "nestnet/v1", "machines": {name: {} for name in MACHINES}, "networks": NETWORKS}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    lab = f"t-{uuid.uuid4().hex[:8]}"
    try:
        nestnet("up", str(file), "--name", lab)
        ports = json.loads(nestnet("get", "ports", "--lab", lab, "-o", "json"))["items"]
        yield {
            name: Net(lab, name, [port for port in ports if port["path"] == f"{name}/{port['name']}"])
            for name in NETWORKS
        }
    finally:
        nestnet("down", "--name", lab)


def listener(family: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    opened.bind(("", PORT))
    if family == 4:
        opened.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, TTL)
    else:
        opened.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, TTL)
    opened.setblocking(False)
    return opened


def arriving(net: Net, family: int, want: set[Pair], seconds: float) -> dict[Pair, int]:
    """(from, to) -> the TTL with which a datagram of each port to each other arrives, until all that is wanted has."""
    found: dict[Pair, int] = {}
    with ExitStack() as stack:
        sockets = {
            name: stack.enter_context(netns.run_in(room, lambda: listener(family))) for name, room in net.rooms.items()
        }
        at = {opened.fileno(): name for name, opened in sockets.items()}
        poll = select.poll()
        for descriptor in at:
            poll.register(descriptor, select.POLLIN)
        end = time.monotonic() + seconds
        turn = 0.0
        while (now := time.monotonic()) < end and want - found.keys():
            if now >= turn:
                turn = now + 0.5  # what waits for ARP or ND may be lost
                for a, b in set(permutations(net.rooms, 2)) - found.keys():
                    try:
                        sockets[a].sendto(a.encode(), (net.addresses[family][b], PORT))
                    except OSError:
                        continue  # a router has said that nothing leads there
            for descriptor, _ in poll.poll(50):
                try:
                    data, control, _, _ = sockets[at[descriptor]].recvmsg(64, 64)
                except OSError:
                    continue
                found[data.decode(), at[descriptor]] = int.from_bytes(control[0][2][:4], sys.byteorder)
    return found


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_router_takes_one(name: str, family: int, nets: dict[str, Net]) -> None:
    net = nets[name]
    expected = {
        (a, b): {TTL - len(way) for way in net.ways(a, b) if len(way) < TTL} for a, b in permutations(net.rooms, 2)
    }
    reached = {pair for pair, ttls in expected.items() if ttls}
    got = arriving(net, family, reached, 20)
    assert got.keys() == reached
    assert {pair: ttl for pair, ttl in got.items() if ttl not in expected[pair]} == {}


def said(net: Net, port: str, *command: str) -> str:
    """Whether or not it succeeds."""

    def run() -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    return netns.run_in(net.rooms[port], run)


PAIRS = {
    "ring": [("s0", "s1"), ("s0", "s16"), ("s0", "s32"), ("s33", "s1")],
    "star": [("s0", "s5"), ("s3", "s1")],
    "pair": [("sa", "sb"), ("sb", "sa")],
    "wide": [("a0", "a9"), ("a9", "b3"), ("b0", "a0")],
    "lan": [("lan", "x"), ("x", "lan")],
    "line": [("s0", "s62"), ("s65", "s63")],
}


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", PAIRS)
def test_traceroute_shows_each_router_in_turn(name: str, family: int, nets: dict[str, Net]) -> None:
    net = nets[name]
    for a, b in PAIRS[name]:
        target = net.addresses[family][b]
        shown = said(net, a, "traceroute", f"-{family}", "-n", "-I", "-q1", "-w3", "-m", "70", target)
        hops = [line.split()[1] for line in shown.splitlines()[1:]]
        hops = ["fe80::" if hop.startswith("fe80::") else hop for hop in hops]
        allowed = [[*(net.speaks(router, a, family) for router in way), target] for way in net.ways(a, b)]
        assert hops in allowed, shown


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("name", "a", "b", "by", "words"),
    [
        ("apart", "sa", "sb", "a", ["Destination Net Unreachable", "Destination unreachable: No route"]),
        ("lan", "lan", "y", "one", ["Destination Net Unreachable", "Destination unreachable: No route"]),
        ("line", "s0", "s65", "r63", ["Time to live exceeded", "Time exceeded: Hop limit"]),
        ("line", "s0", "s63", "r63", ["Time to live exceeded", "Time exceeded: Hop limit"]),
    ],
)
def test_ping_says_why_it_does_not_get_there(
    name: str, a: str, b: str, by: str, words: list[str], family: int, nets: dict[str, Net]
) -> None:
    net = nets[name]
    shown = said(net, a, "ping", "-n", "-c1", "-W3", net.addresses[family][b])
    assert words[family == 6] in shown
    assert f"From {net.speaks(by, a, family)}" in shown
    assert "100% packet loss" in shown


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
def test_equal_ways_are_shared_by_flow_and_a_flow_keeps_its_own(family: int, nets: dict[str, Net]) -> None:
    """Half of the way round the ring there are two; where they lead shows a packet that ends on the way."""
    net = nets["ring"]
    target = net.addresses[family]["s32"]
    level, limit = (
        (socket.IPPROTO_IP, socket.IP_TTL) if family == 4 else (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
    )
    took: dict[int, set[str]] = defaultdict(set)
    with netns.run_in(net.rooms["s0"], lambda: raw(family)) as hears:
        hears.settimeout(1)
        for port in [*range(20000, 20032)] * 3:
            with netns.run_in(net.rooms["s0"], lambda: datagrams(family)) as sends:
                sends.bind(("", port))
                sends.setsockopt(level, limit, 2)
                took[port].add(ended_at(sends, hears, target))
    assert all(len(routers) == 1 for routers in took.values()), "a flow keeps its way"
    if family == 4:  # the router with a segment on one side, the one without an address on the other
        assert {router for routers in took.values() for router in routers} == {net.speaks("r1", "s0", 4), NAMELESS}
    counts = [sum(routers == {router} for routers in took.values()) for router in set.union(*took.values())]
    assert len(counts) == 2
    assert min(counts) >= 4, "of 32 flows"


def ended_at(sends: socket.socket, hears: socket.socket, target: str) -> str:
    """The router that says that this datagram ended there. A port is told so much in a second, and no more."""
    port = sends.getsockname()[1]
    for _ in range(5):
        sends.sendto(b"?", (target, PORT))
        try:
            while True:
                data, (router, *_) = hears.recvfrom(2048)
                at = (data[0] & 15) * 4 if sends.family == socket.AF_INET else 0  # IPv6 comes without its header
                quoted = data[at + 8 + (20 if sends.family == socket.AF_INET else 40) :]
                if data[at] in (11, 3) and struct.unpack("!H", quoted[:2])[0] == port:
                    return str(router).partition("%")[0]
        except TimeoutError:
            continue
    raise AssertionError(f"nobody said anything of {port}")


def raw(family: int) -> socket.socket:
    if family == 4:
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    return socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)


def datagrams(family: int) -> socket.socket:
    return socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("name", "a", "b"), [("ring", "s0", "s32"), ("star", "s0", "s5"), ("wide", "a0", "a9")])
def test_what_is_too_big_is_told_by_the_first_router(
    name: str, a: str, b: str, family: int, nets: dict[str, Net]
) -> None:
    net = nets[name]
    said(net, a, "ip", "link", "set", "eth0", "mtu", "1500")
    try:
        size = str(1451 - {4: 28, 6: 48}[family])
        shown = said(net, a, "ping", "-n", "-c1", "-W3", "-M", "do", "-s", size, net.addresses[family][b])
        words = "Frag needed and DF set (mtu = 1450)" if family == 4 else "Packet too big: mtu=1450"
        assert f"From {net.speaks(net.routers[a][0], a, family)} icmp_seq=1 {words}" in shown
    finally:
        said(net, a, "ip", "link", "set", "eth0", "mtu", "1450")
