"""The underlay as it changes: NICs, routes and neighbours of machines, under traffic. Real agents in a lab.

Whoever is told of a change has a second: `Echoes` sends fifty requests a second, and no pause between two answers may
be longer.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise
from pathlib import Path

import pytest
from test_lab import leftovers, nestnet

from nestnet.agent import links, netns
from nestnet.agent.underlay import (
    NDA_DST,
    NDA_LLADDR,
    RTM_DELNEIGH,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    Interest,
    Ways,
    confirm,
    nics,
)
from nestnet.api.client import Client
from nestnet.datapath.kernel import Kernel
from nestnet.lab import state
from nestnet.lab.down import down
from nestnet.lab.state import Lab
from nestnet.model.values import Machine, Tag

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples/ipv6-underlay.yaml"
SECOND = 3.0  # what is promised is one, where others leave the machine time for it
PATIENCE = 20.0  # for what has no promise of its own

# ---- what is worth a look


def neighbour(kind: int, nic: int, address: str, mac: bytes, state: int = 0x02) -> tuple[int, bytes]:
    packed = (IPv6Address if ":" in address else IPv4Address)(address).packed
    body = struct.pack("=BxxxiHBB", 10 if ":" in address else 2, nic, state, 0, 1)
    for number, value in ((NDA_DST, packed), (NDA_LLADDR, mac)):
        body += struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)
    return kind, body


MAC, OTHER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


@pytest.mark.parametrize(
    ("message", "ours"),
    [
        (neighbour(RTM_NEWNEIGH, 2, "10.0.0.1", MAC), False),  # as it is known
        (neighbour(RTM_NEWNEIGH, 2, "10.0.0.1", MAC, 0x04), False),  # stale: still known
        (neighbour(RTM_NEWNEIGH, 2, "10.0.0.1", OTHER), True),
        (neighbour(RTM_NEWNEIGH, 2, "10.0.0.1", MAC, 0x20), True),  # failed
        (neighbour(RTM_DELNEIGH, 2, "10.0.0.1", MAC), True),
        (neighbour(RTM_NEWNEIGH, 3, "10.0.0.1", OTHER), False),  # on another NIC
        (neighbour(RTM_NEWNEIGH, 2, "10.0.0.2", OTHER), False),  # somebody else
        (neighbour(RTM_NEWNEIGH, 2, "fe80::1", MAC), True),
        (neighbour(RTM_DELNEIGH, 2, "fe80::1", MAC), False),  # it was not known before
        ((RTM_NEWLINK, struct.pack("=BxHiII", 0, 1, 2, 0, 0)), True),
        ((RTM_NEWLINK, struct.pack("=BxHiII", 0, 1, 9, 0, 0)), False),
        ((RTM_NEWLINK, struct.pack("=BxHiII", 0, 1, 9, 0, 0) + struct.pack("=HH8s", 9, 3, b"eth7\0")), True),
        ((RTM_NEWROUTE, struct.pack("=BBBBBBBBI", 2, 24, 0, 0, 254, 3, 0, 1, 0)), True),
        ((RTM_NEWROUTE, struct.pack("=BBBBBBBBI", 2, 32, 0, 0, 255, 2, 254, 2, 0)), False),  # an address of ours
    ],
)
def test_only_what_may_change_a_way_is_of_interest(message: tuple[int, bytes], ours: bool) -> None:
    interest = Interest({(2, "10.0.0.1"): MAC.hex(":"), (2, "fe80::1"): None}, frozenset({"eth7"}))
    assert interest.in_message(*message) is ours


# ---- ways, without an agent


@pytest.fixture
def room() -> Iterator[str]:
    name = f"nntest-{uuid.uuid4().hex[:8]}"
    netns.create(name)
    yield name
    netns.delete(name)


def ip(namespace: str, *lines: str) -> None:
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], input="\n".join(lines), text=True, check=True)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["permanent", "noarp"])
def test_a_neighbour_that_is_set_for_good_stays(room: str, kind: str) -> None:
    ip(
        room,
        "link add name e0 type veth peer name f0",
        *(f"link set {name} up" for name in ("e0", "f0")),
        "address add 10.1.0.1/24 dev e0",
        f"neigh add 10.1.0.2 lladdr 02:00:00:00:00:02 nud {kind} dev e0",
    )

    def asked() -> dict[str, int]:
        with links.netlink() as ipr:
            (nic,) = ipr.link_lookup(ifname="e0")
            confirm(ipr, [(nic, "10.1.0.2"), (nic, "10.1.0.3")])
            found = ipr.get_neighbours(family=socket.AF_INET, ifindex=nic)
            return {one.get_attr("NDA_DST"): one["state"] for one in found}

    states = netns.run_in(netns.path(room), asked)
    assert states["10.1.0.2"] == {"permanent": 0x80, "noarp": 0x40}[kind]
    assert states["10.1.0.3"] == 0x01, "this one is asked for"


@pytest.mark.root
def test_a_way_is_all_next_hops_with_their_macs(room: str) -> None:
    near, far = IPv4Address("10.1.0.2"), IPv4Address("203.0.113.9")
    ip(
        room,
        "link add name e0 type veth peer name f0",
        "link add name e1 type veth peer name f1",
        *(f"link set {name} up" for name in ("e0", "e1", "f0", "f1")),
        "address add 10.1.0.1/24 dev e0",
        "address add 10.2.0.1/24 dev e1",
        "route add 203.0.113.0/24 nexthop via 10.1.0.254 nexthop via 10.2.0.254",
    )
    ways = Ways()

    def look() -> set[int]:
        with links.netlink() as ipr:
            return ways.look(ipr, {1: near, 2: far})

    def changed(*lines: str) -> set[int]:
        ip(room, *lines)
        return netns.run_in(netns.path(room), look)

    assert changed() == {1, 2}  # the first time everything is news
    assert changed() == set()
    assert len(ways.known[2]) == 2
    assert changed("neigh replace 10.1.0.254 lladdr 02:00:00:00:00:01 dev e0") == {2}
    assert changed("neigh replace 10.1.0.99 lladdr 02:00:00:00:00:01 dev e0") == set()
    assert changed("neigh replace 10.1.0.2 lladdr 02:00:00:00:00:02 dev e0") == {1}
    assert changed("neigh replace 10.1.0.2 lladdr 02:00:00:00:00:03 dev e0") == {1}
    assert changed("route add 198.51.100.0/24 via 10.1.0.254") == set()
    assert changed("route replace 203.0.113.9/32 via 10.2.0.254") == {2}
    assert changed("route del 203.0.113.9/32") == {2}
    assert changed("link set e1 down") == {2}
    assert changed("link set e0 address 02:00:00:00:00:77") == {1, 2}
    assert changed("route del 203.0.113.0/24") == {2}
    assert ways.known[2] == frozenset()


@pytest.mark.root
def test_nics_are_named_or_have_the_address(room: str) -> None:
    ip(room, "link add name e0 type veth peer name f0", "link set e0 up", "address add 10.1.0.1/24 dev e0")
    ip(room, "address add 10.9.0.1/32 dev lo")

    def found(address: str, *names: str, mtu: int = 1500) -> tuple[list[str], tuple[str, ...]]:
        def look() -> tuple[list[str], tuple[str, ...]]:
            with links.netlink() as ipr:
                got = nics(ipr, Machine(1, IPv4Address(address), mtu, names, vlan=Tag(17)))  # no veth filters any
            return list(got.links), got.missing

        return netns.run_in(netns.path(room), look)

    assert found("10.1.0.1") == (["e0"], ())
    assert found("10.1.0.1", mtu=9000) == (
        ["e0"],
        ("e0 has an MTU of 1500, the machine one of 9000: large packets are lost",),
    )
    assert found("10.1.0.2")[1] == ("no interface has this machine's address 10.1.0.2",)
    assert "`nic` says where they do" in found("10.9.0.1")[1][0]
    assert found("10.9.0.1", "e0", "e9", "f0") == (["e0", "f0"], ("there is no interface e9", "f0 is down"))


# ---- in a lab


@contextmanager
def lab(text: str | Path, folder: Path) -> Iterator[Lab]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    file = text if isinstance(text, Path) else folder / "net.yaml"
    if isinstance(text, str):
        file.write_text(text)
    try:
        nestnet("up", str(file), "--name", name)
        found = state.load(name)
        assert found is not None
        yield found
    finally:
        down(name)
    assert leftovers(name) == []


def workload(lab: Lab, path: str) -> Path:
    with Client(lab.controller) as client:
        return netns.path(
            lab.workload(int(re.sub(r"\D", "", client.get("port", path)["attachment"]["namespace"].rsplit(".", 1)[1])))
        )


def until(what: Callable[[], object], seconds: float = PATIENCE) -> None:
    """The pace is of asking; the wait is for what is asked for."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


class Echoes:
    """ping, fifty times a second, and when the answers came."""

    def __init__(self, inside: Path, address: str) -> None:
        command = ["ping", "-n", "-D", "-i", "0.02", address]
        self._ping = netns.run_in(
            inside, lambda: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )
        self.times: list[float] = []
        self._rest = b""
        self.hear(20)

    def hear(self, answers: int) -> None:
        """So many more answers, each within PATIENCE."""
        assert self._ping.stdout is not None
        wanted = len(self.times) + answers
        while len(self.times) < wanted:
            ready, _, _ = select.select([self._ping.stdout], [], [], PATIENCE)
            assert ready, "no answers"
            *lines, self._rest = (self._rest + os.read(self._ping.stdout.fileno(), 1 << 16)).split(b"\n")
            found = (re.match(rb"\[([0-9.]+)\] \d+ bytes from", line) for line in lines)
            self.times += [float(match[1]) for match in found if match]

    def pause_after(self, moment: float) -> float:
        """The longest pause between two answers since then, with a second's worth of answers behind it."""
        self.hear(60)
        times = [moment, *(each for each in self.times if each >= moment)]
        return max(after - before for before, after in pairwise(times))

    def end(self) -> None:
        self._ping.kill()
        self._ping.communicate()


@contextmanager
def echoes(inside: Path, address: str) -> Iterator[Echoes]:
    found = Echoes(inside, address)
    try:
        yield found
    finally:
        found.end()


TWO = """\
apiVersion: nestnet/v1
machines: {m1: {address: FIRST}, m2: {address: SECOND}}
networks:
  n:
    segments: {s: {cidr: [10.0.0.0/24, "fd00::/64"]}}
    ports: {a: {segment: s, host: m1}, b: {segment: s, host: m2}}
"""
WIRE = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}


def two(family: int) -> str:
    first, second = WIRE[family]
    return TWO.replace("FIRST", f'"{first}"').replace("SECOND", f'"{second}"')


def epoch(lab: Lab, machine: str) -> int:
    with Kernel.open(lab.pins / machine, read_only=True) as kernel:
        return int(kernel.rows("epoch")["value"][0])


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
def test_a_neighbour_with_another_mac_is_found_within_a_second(family: int, tmp_path: Path) -> None:
    with lab(two(family), tmp_path) as up, echoes(workload(up, "n/a"), "10.0.0.3") as heard:
        shown = json.loads(subprocess.check_output(["ip", "-n", up.machine("m2"), "-j", "link", "show", "eth0"]))
        old = shown[0]["address"]
        # Frames to the old MAC get nowhere any more.
        subprocess.run(["bridge", "-n", up.wire, "fdb", "replace", old, "dev", "m1", "master", "static"], check=True)
        moment = time.time()
        ip(up.machine("m2"), "link set eth0 address 02:00:00:00:77:77")
        assert heard.pause_after(moment) < SECOND


@pytest.mark.root
def test_foreign_neighbours_raise_nothing_however_many(tmp_path: Path) -> None:
    with lab(two(4), tmp_path) as up, echoes(workload(up, "n/a"), "10.0.0.3") as heard:
        until(lambda: settled(up))
        before, moment = epoch(up, "m1"), time.time()
        for round in range(5):
            storm = (
                f"neigh replace 192.0.2.{n} lladdr 02:00:00:00:{round:02x}:{n:02x} dev eth0" for n in range(10, 250)
            )
            ip(up.machine("m1"), *storm)
        ip(up.machine("m1"), *(f"neigh del 192.0.2.{n} dev eth0" for n in range(10, 250)))
        assert heard.pause_after(moment) < SECOND
        assert epoch(up, "m1") == before
        # It does look: what is not foreign is seen.
        ip(up.machine("m1"), "route add 192.0.2.2/32 via 192.0.2.77")
        until(lambda: epoch(up, "m1") > before)


def settled(up: Lab) -> bool:
    """The agent has looked and found nothing new for as long as a look may wait."""
    before = epoch(up, "m1")
    time.sleep(1.0)  # nothing tells that nothing happened
    return epoch(up, "m1") == before


@pytest.mark.root
def test_routes_and_gateways_that_change_are_followed_within_a_second(tmp_path: Path) -> None:
    """m1 192.0.2.1 -- eth0 -- wire, a gateway -- eth0 -- 203.0.113.9 m2
    \\- eth9 -/"""
    text = TWO.replace("FIRST", "192.0.2.1").replace("SECOND", "203.0.113.9")
    with lab(text, tmp_path) as up:
        m1, m2 = up.machine("m1"), up.machine("m2")
        ip(
            up.wire,
            "link set m2 nomaster",
            "address add 192.0.2.254/24 dev wire",
            "address add 203.0.113.1/24 dev m2",
            f"link add g9 type veth peer name eth9 netns {m1}",
            "link set g9 up",
            "address add 10.9.0.254/24 dev g9",
        )
        netns.run_in(netns.path(up.wire), partial(links.set_sysctls, {"net/ipv4/ip_forward": 1}))
        ip(m2, "route flush proto 78", "route add default via 203.0.113.1")
        ip(m1, "link set eth9 up", "address add 10.9.0.1/24 dev eth9")
        ip(m1, "route flush proto 78", "route add 203.0.113.0/24 via 192.0.2.254")
        with echoes(workload(up, "n/a"), "10.0.0.3") as heard:  # behind a router

            def moved(*lines: str, dead: str, alive: str) -> None:
                """The route is elsewhere, and nothing passes any more where it was."""
                moment = time.time()
                before = sent(m1, alive)
                ip(m1, *lines)
                ip(up.wire, f"rule add iif {dead} to 203.0.113.9 blackhole")
                assert heard.pause_after(moment) < SECOND
                assert sent(m1, alive) - before > 40
                ip(up.wire, f"rule del iif {dead} to 203.0.113.9 blackhole")

            # To another gateway by another NIC, by a longer prefix, and back by its removal.
            moved("route add 203.0.113.9/32 via 10.9.0.254", dead="wire", alive="eth9")
            moved("route del 203.0.113.9/32", dead="g9", alive="eth0")
            # By a rule and another table.
            moved(
                "route add default via 10.9.0.254 table 9", "rule add to 203.0.113.9 table 9", dead="wire", alive="eth9"
            )
            moved("rule del to 203.0.113.9 table 9", dead="g9", alive="eth0")


def sent(machine: str, nic: str) -> int:
    """Packets that left by a NIC."""
    shown = json.loads(subprocess.check_output(["ip", "-n", machine, "-j", "-s", "link", "show", nic]))
    return int(shown[0]["stats64"]["tx"]["packets"])


@pytest.mark.root
def test_a_nic_that_comes_back_gets_its_program(tmp_path: Path) -> None:
    with lab(two(4), tmp_path) as up, Client(up.controller) as client:

        def problems() -> list[str]:
            (found,) = [m["problems"] for m in client.status()["machines"] if m["name"] == "m2"]
            return list(found)

        inside = workload(up, "n/a")
        ping = partial(subprocess.run, ["ping", "-n", "-c", "1", "-W", "1", "10.0.0.3"], capture_output=True)
        assert netns.run_in(inside, ping).returncode == 0
        ip(up.machine("m2"), "link del eth0")
        until(problems)
        assert problems() == ["no interface has this machine's address 192.0.2.2"]
        ip(
            up.machine("m2"),
            f"link add eth0 type veth peer name m2 netns {up.wire}",
            "address add 192.0.2.2/24 dev eth0",
        )
        ip(up.wire, "link set m2 master wire up")
        until(lambda: problems() == ["eth0 is down"])
        ip(up.machine("m2"), "link set eth0 up")
        until(lambda: netns.run_in(inside, ping).returncode == 0)
        until(lambda: problems() == [])
        # Taken off by somebody, too.
        (link,) = (path for path in (up.pins / "m2").glob("v*/link_*") if underlay_link(up, path))
        subprocess.run(["bpftool", "link", "detach", "pinned", str(link)], check=True)
        until(lambda: netns.run_in(inside, ping).returncode == 0)


def underlay_link(up: Lab, path: Path) -> bool:
    shown = json.loads(subprocess.check_output(["ip", "-n", up.machine("m2"), "-j", "link", "show", "eth0"]))
    return path.name == f"link_{shown[0]['ifindex']}"


# ---- several NICs

FLOWS, EACH = 64, 0.02  # and seconds between two rounds


class Flows:
    """Many flows from one workload to another, each told by its source port, and when something of each last came."""

    def __init__(self, source: Path, target: Path, address: str) -> None:
        self._address = address
        self._in = netns.run_in(target, partial(self._bound, "10.0.0.0"))
        self._out = [
            netns.run_in(source, partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(FLOWS)
        ]
        self.last = dict.fromkeys(range(FLOWS), 0.0)
        self.longest = dict.fromkeys(range(FLOWS), 0.0)

    def _bound(self, _: str) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("", 4000))
        made.setblocking(False)
        return made

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            for number, out in enumerate(self._out):
                out.sendto(bytes([number]), (self._address, 4000))
            time.sleep(EACH)  # their pace
            try:
                while got := self._in.recv(10):
                    flow, now = got[0], time.monotonic()
                    self.longest[flow] = max(self.longest[flow], now - (self.last[flow] or now))
                    self.last[flow] = now
            except BlockingIOError:
                pass

    def again(self) -> None:
        """Run until all have come again; what was on its way does not count."""
        moment = time.monotonic() + 0.1
        while min(self.last.values()) < moment:
            assert time.monotonic() < moment + SECOND, "a flow has ended"
            self.run(EACH)

    def pause(self) -> float:
        """The longest that any flow had since the last call, all of them alive."""
        now = time.monotonic()
        worst = max(max(self.longest[flow], now - self.last[flow]) for flow in self.last)
        self.longest = dict.fromkeys(range(FLOWS), 0.0)
        return worst

    def close(self) -> None:
        for each in (self._in, *self._out):
            each.close()


SEVERAL = """\
apiVersion: nestnet/v1
machines: {m1: {address: FIRST, nic: [eth0, eth1]}, m2: {nic: [up0, up1]}, m3: {}}
networks:
  n:
    segments: {s: {cidr: 10.0.0.0/24}}
    ports: {a: {segment: s, host: m1}, b: {segment: s, host: m2}, c: {segment: s, host: m3}}
checks:
  - {from: n/a, to: n/c, send: icmp, expect: allow}
  - {from: n/c, to: n/b, send: tcp/80, expect: allow}
"""


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
def test_flows_share_two_nics_and_survive_the_loss_of_either(family: int, tmp_path: Path) -> None:
    with lab(SEVERAL.replace("FIRST", f'"{WIRE[family][0]}"'), tmp_path) as up:
        nestnet("test", "--lab", up.name)
        flows = Flows(workload(up, "n/a"), workload(up, "n/b"), "10.0.0.3")
        try:
            m1, m2 = up.machine("m1"), up.machine("m2")
            flows.run(0.5)
            flows.pause()

            def shares() -> list[float]:
                before = [sent(m1, nic) for nic in ("eth0", "eth1")]
                flows.run(0.5)
                counts = [sent(m1, nic) - was for nic, was in zip(("eth0", "eth1"), before, strict=True)]
                return [count / sum(counts) for count in counts]

            assert min(shares()) > 0.2
            for machine, nic, alive in ((m1, "eth0", 1), (m1, "eth1", 0), (m2, "up0", None), (m2, "up1", None)):
                ip(machine, f"link set {nic} down")
                flows.again()
                assert flows.pause() < SECOND, (machine, nic)
                if alive is not None:
                    assert shares()[alive] > 0.99
                ip(machine, f"link set {nic} up")
                until(lambda: min(shares()) > 0.2, 3 * SECOND)
                flows.again()
                assert flows.pause() < SECOND, (machine, nic, "up again")
        finally:
            flows.close()


@pytest.mark.root
def test_the_example_over_ipv6(tmp_path: Path) -> None:
    with lab(EXAMPLE, tmp_path) as up:
        nestnet("test", "--lab", up.name)
        assert nestnet("status", "--lab", up.name).stdout.startswith(b"well: ")
        inside = workload(up, "acme/web2")
        ping = ["ping", "-n", "-c", "1", "-W", "2", "-M", "do", "-s"]
        netns.run_in(inside, partial(subprocess.run, ["ip", "link", "set", "eth0", "mtu", "1500"], check=True))
        for size, code in ((1430, 0), (1431, 1)):
            command = [*ping, str(size - 28), "10.0.0.2"]
            assert netns.run_in(inside, partial(subprocess.run, command, capture_output=True)).returncode == code, size
        file = tmp_path / "frames.pcap"
        command = ["tcpdump", "-i", "eth0", "-U", "-Z", "root", "-c", "1", "-w", str(file), "udp", "port", "4789"]
        capture = netns.run_in(netns.path(up.machine("m3")), partial(subprocess.Popen, command, stderr=subprocess.PIPE))
        assert capture.stderr is not None
        assert b"listening" in capture.stderr.readline()
        nestnet("exec", "acme/db1", "--lab", up.name, "--", "ping", "-c", "1", "fd00:a::2")
        assert capture.wait(20) == 0
        capture.stderr.close()
        fields = (
            "eth.type",
            "ipv6.src",
            "ipv6.dst",
            "ipv6.hlim",
            "udp.dstport",
            "udp.checksum",
            "vxlan.flags",
            "icmpv6.type",
        )
        command = ["tshark", "-r", str(file), "-T", "fields", "-E", "separator=;", *(f"-e{field}" for field in fields)]
        shown = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip().split(";")
        assert shown[0].split(",") == ["0x86dd", "0x86dd"]
        assert [shown[i].split(",")[0] for i in range(1, 7)] == [
            "2001:db8::2",
            "2001:db8::11",
            "64",
            "4789",
            "0x0000",
            "0x0800",
        ]
        assert shown[7] == "128"
