"""Segments on VLANs of a physical network, through a switch that is not ours: a plain bridge, with real packets.

m1  physics/a  history/a                 physics: lan on VLAN 17, lab on 18, a router joins them
m2  physics/b  history/b                 history: lan on VLAN 20, with the addresses of physics' lan
m3  physics/c  physics/idle  other/z     other: lan on VLAN 21
m4  other/y
m1, m3  hosts of physics/inner, which is encapsulated

`stranger` is a computer without any of this, on the same switch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from frames import arp, icmp, ip_frame, udp
from test_drift import until
from test_lab import ROOT, leftovers, nestnet
from test_namespaces import packet_socket, pending
from test_tagged import captured, fields
from test_vlans import Bed, ping, transfer

from nestnet.agent import netns
from nestnet.api.client import Client
from nestnet.datapath.kernel import Kernel
from nestnet.model import packet as pk
from nestnet.model.reasons import NAMES

pytestmark = pytest.mark.root
PACE, SILENCE = 0.002, 0.25  # seconds between packets, and how long none may come through while a port moves

FILE = """
apiVersion: nestnet/v1
machines:
  m1: {trunks: {campus: eth1}}
  m2: {trunks: {campus: eth1}}
  m3: {trunks: {campus: eth1}}
  m4: {trunks: {campus: eth1}}
networks:
  physics:
    segments:
      lan: {cidr: [10.0.0.0/24, "fd00:1::/64"], vlan: {id: 17, on: campus}}
      lab: {cidr: [10.0.1.0/24, "fd00:2::/64"], vlan: {id: 18, on: campus}}
    routers: {core: {segments: [lan, lab]}}
    ports:
      a: {segment: lan, host: m1, address: [10.0.0.2, "fd00:1::2"], mac: "02:00:00:00:00:0a"}
      b: {segment: lan, host: m2, address: [10.0.0.3, "fd00:1::3"], mac: "02:00:00:00:00:0b"}
      c: {segment: lab, host: m3, address: [10.0.1.3, "fd00:2::3"], mac: "02:00:00:00:00:0c"}
      idle: {segment: lan, host: m3, address: 10.0.0.9, groups: [closed]}
      h1: {segment: lan, host: m1, hosts: true, address: 10.0.0.11}
      h3: {segment: lan, host: m3, hosts: true, address: 10.0.0.13}
    policies:
      - {from: any, to: any, allow: any}
      - {from: any, to: closed, deny: any, priority: 200}
    networks:
      inner:
        carriage: encapsulated
        segments: {lan: {cidr: 10.0.0.0/24}}
        ports: {p: {segment: lan, host: h1}, q: {segment: lan, host: h3}}
  history:
    segments: {lan: {cidr: 10.0.0.0/24, vlan: {id: 20, on: campus}}}
    ports:
      a: {segment: lan, host: m1, address: 10.0.0.2}
      b: {segment: lan, host: m2, address: 10.0.0.3}
  other:
    segments: {lan: {cidr: 10.0.0.0/24, vlan: {id: 21, on: campus}}}
    ports:
      y: {segment: lan, host: m4, address: 10.0.0.4}
      z: {segment: lan, host: m3, address: 10.0.0.2}
"""
A, B, C = 0x02000000000A, 0x02000000000B, 0x02000000000C


class Site(Bed):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.stranger = netns.path(f"{name}-stranger")
        self.wire = netns.path(self.lab.wire)

    def machine(self, name: str) -> Path:
        return netns.path(self.lab.machine(name))

    def mac(self, machine: str) -> int:
        told = netns.run_in(
            self.machine(machine), partial(subprocess.check_output, ["ip", "-j", "link", "show", "eth1"])
        )
        return int(json.loads(told)[0]["address"].replace(":", ""), 16)

    def counted(self, machine: str) -> dict[str, int]:
        """What a machine has dropped, of whomever, by reason."""
        with netns.run_in(
            self.machine(machine), lambda: Kernel.open(self.lab.pins / machine, read_only=True)
        ) as kernel:
            found: dict[str, int] = {}
            for (_, reason), n in kernel.drops().items():
                found[NAMES[reason]] = found.get(NAMES[reason], 0) + n
            return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    path = tmp_path_factory.mktemp("switches") / "net.yaml"
    path.write_text(FILE)
    try:
        nestnet("up", str(path), "--name", name)
        netns.create(f"{name}-stranger")
        batch = ["link add plug type veth peer name eth0", "link set plug master switch1", "link set plug up"]
        netns.run_in(netns.path(f"nn-{name}"), partial(run, "ip", "-batch", "-", input="\n".join(batch), text=True))
        move = f"link set eth0 netns {name}-stranger"
        netns.run_in(netns.path(f"nn-{name}"), partial(run, "ip", "-batch", "-", input=move, text=True))
        netns.run_in(netns.path(f"{name}-stranger"), partial(run, "ip", "link", "set", "eth0", "up", "promisc", "on"))
        yield Site(name)
    finally:
        netns.delete(f"{name}-stranger")
        nestnet("down", "--name", name)
    assert leftovers(name) == []


def run(*command: str, **more: Any) -> None:
    done = subprocess.run(command, capture_output=True, check=False, **more)
    assert done.returncode == 0, done.stderr


def datagram(
    to_mac: int, from_mac: int, source: str, target: str, content: bytes, port: int = 5000, own: int = 4000
) -> bytes:
    ends = pk.mapped(ip_address(source)), pk.mapped(ip_address(target))
    return ip_frame(to_mac, from_mac, *ends, pk.UDP, udp(*ends, own, port, content))


def advertised(kind: int, rest: bytes) -> bytes:
    """ICMPv6 for b, as if a had sent it."""
    ends = pk.mapped(ip_address("fe80::ff:fe00:a")), pk.mapped(ip_address("fd00:1::3"))
    return ip_frame(B, A, *ends, pk.ICMPV6, icmp(*ends, kind, rest=rest[:4], payload=rest[4:]), 255)


def status(site: Site) -> bytes:
    return nestnet("status", "--lab", site.lab.name, code=None).stdout


def listening(place: Path, stack: ExitStack) -> socket.socket:
    found = netns.run_in(place, partial(packet_socket, "eth0"))
    stack.callback(found.close)
    pending(found)
    return found


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("there", ["physics/b", "physics/c"], ids=["switched", "routed"])
def test_a_file_goes_whole_in_large_packets_with_the_tag(site: Site, there: str, family: int, tmp_path: Path) -> None:
    """What is routed leaves with the MAC of the machine's NIC, and arrives with the router's."""
    here, file = site.place("physics/a"), tmp_path / "switch.pcap"
    with captured(site.wire, "s1m1", file, "-s", "120"):
        transfer(here, site.place(there), site.address(there, family))
    out = 17 if there == "physics/b" else 18
    shown = fields(file, "tcp.dstport == 7000", "vlan.id", "eth.src", "eth.dst", "frame.len", "frame.protocols")
    ip = "ip" if family == 4 else "ipv6"
    nic, own = (f"{site.mac('m1'):012x}", f"{A:012x}")
    expected = own if there == "physics/b" else nic
    target = B if there == "physics/b" else C
    for vlan, source, to, _, protocols in shown:
        assert (int(vlan), source.replace(":", "")) == (out, expected)
        assert int(to.replace(":", ""), 16) == target
        assert protocols.startswith(f"eth:ethertype:vlan:ethertype:{ip}:tcp")
    assert max(int(length) for *_, length, _ in shown) > 9000
    back = {int(vlan) for (vlan,) in fields(file, "tcp.srcport == 7000", "vlan.id")}
    assert back == {17}
    others = "not ip.addr == 10.0.0.11"  # what agents on h1 and h3 exchange is VXLAN of their own
    assert fields(file, f"(vxlan or udp.port == 4789) and {others}", "frame.number") == []


def test_what_is_encapsulated_upon_it_rides_as_any_other_traffic(site: Site, tmp_path: Path) -> None:
    here, there, file = site.place("physics/inner/p"), site.place("physics/inner/q"), tmp_path / "switch.pcap"
    until(lambda: ping(here, "10.0.0.3"), "agents in h1 and h3")
    with captured(site.wire, "s1m1", file, "-s", "160"):
        transfer(here, there, "10.0.0.3")
    shown = fields(file, "udp.dstport == 4789 and tcp.dstport == 7000", "vlan.id", "frame.protocols")
    assert shown
    for number, protocols in shown:
        assert number == "17"
        assert protocols.startswith("eth:ethertype:vlan:ethertype:ip:udp:vxlan:eth:ethertype:ip:tcp")


def test_a_frame_for_all_reaches_all_of_its_vlan_and_nobody_else(site: Site) -> None:
    with ExitStack() as stack:
        names = ["physics/b", "physics/c", "physics/idle", "history/a", "history/b", "other/z"]
        heard = {name: listening(site.place(name), stack) for name in names}
        heard["stranger"] = listening(site.stranger, stack)
        own = netns.run_in(site.place("physics/a"), partial(packet_socket, "eth0"))
        stack.callback(own.close)
        nonce = os.urandom(16)
        own.send(datagram(pk.BROADCAST, A, "10.0.0.2", "255.255.255.255", nonce))
        arrived: dict[str, list[bytes]] = {name: [] for name in heard}

        def all_there() -> bool:
            for name, one in heard.items():
                arrived[name] += [frame for frame in pending(one) if nonce in frame]
            return bool(arrived["physics/b"] and arrived["stranger"])

        until(all_there, "a broadcast")
        end = os.urandom(16)  # behind it on every way
        own.send(datagram(B, A, "10.0.0.2", "10.0.0.3", end))
        until(lambda: any(end in frame for frame in pending(heard["physics/b"])), "what comes behind it")
        all_there()
        counts = {name: len(frames) for name, frames in arrived.items()}
        assert counts == {**dict.fromkeys(names, 0), "physics/b": 1, "stranger": 1}
        (frame,) = arrived["stranger"]
        assert pk.untagged(frame, 2)[0] == pk.tag(17)
        (frame,) = arrived["physics/b"]
        assert pk.untagged(frame, 2)[0] == b""


@pytest.mark.parametrize("there", ["physics/b", "physics/c"])
def test_neighbours_of_both_families_are_answered_and_reached(site: Site, there: str) -> None:
    here = site.place("physics/a")
    netns.run_in(here, partial(run, "ip", "neigh", "flush", "dev", "eth0"))
    for family in (4, 6):
        mtu, head = site.ports[there]["mtu"], 28 if family == 4 else 48
        assert ping(here, site.address(there, family), "-M", "do", "-s", str(mtu - head))


def test_tenants_with_the_same_addresses_and_a_policy(site: Site) -> None:
    with ExitStack() as stack:
        heard = {
            name: listening(site.place(name), stack) for name in ("physics/b", "history/b", "other/z", "physics/idle")
        }
        assert ping(site.place("history/a"), "10.0.0.3")
        assert ping(site.place("physics/a"), "10.0.0.3")
        before = site.counted("m1").get("policy", 0)
        assert not ping(site.place("physics/a"), "10.0.0.9", "-W", "0.3")
        assert site.counted("m1")["policy"] == before + 1
        echo = {name: [f for f in pending(one) if pk.parse(f).is_echo_request] for name, one in heard.items()}
        assert {name: len(frames) for name, frames in echo.items()} == {
            "physics/b": 1, "history/b": 1, "other/z": 0, "physics/idle": 0,
        }  # fmt: skip
        assert not ping(site.place("other/z"), "10.0.0.3", "-W", "0.3"), "nobody has it there"


def test_what_others_send_into_a_vlan(site: Site) -> None:
    """Only what its ports could have sent from elsewhere gets in; who is in the VLAN can speak for these. What is no
    VLAN of ours is left to the machine."""
    with ExitStack() as stack:
        b = listening(site.place("physics/b"), stack)
        out = netns.run_in(site.stranger, partial(packet_socket, "eth0"))
        stack.callback(out.close)
        netns.run_in(site.machine("m2"), partial(run, "ip", "addr", "add", "10.99.0.2/24", "dev", "eth1"))
        stack.callback(
            lambda: netns.run_in(site.machine("m2"), partial(run, "ip", "addr", "del", "10.99.0.2/24", "dev", "eth1"))
        )
        theirs = netns.run_in(site.machine("m2"), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        stack.callback(theirs.close)
        theirs.bind(("10.99.0.2", 5000))
        theirs.settimeout(5)

        with Client(site.lab.controller) as client:
            router = int(client.get("router", "physics/core")["mac"].replace(":", ""), 16)
        right = datagram(B, A, "10.0.0.2", "10.0.0.3", b"canary")
        rows: list[tuple[str | None, bytes, bytes]] = [
            ("too_many_tags", pk.tag(17) + pk.tag(17), right),
            ("too_many_tags", pk.tag(17) + b"\x88\xa8\0\x05", right),
            ("unknown_vlan", pk.tag(0), right),
            ("unknown_vlan", pk.tag(0) + pk.tag(17), right),
            (None, b"", right),
            (None, pk.tag(30), right),
            (None, b"\x88\xa8\0\x11", right),
            ("unknown_source", pk.tag(17), datagram(B, 0x02FFFFFFFF01, "10.0.0.77", "10.0.0.3", b"canary")),
            ("unknown_source", pk.tag(20), datagram(B, A, "10.0.0.2", "10.0.0.3", b"canary")),
            ("source_address", pk.tag(17), datagram(B, A, "10.0.0.77", "10.0.0.3", b"canary")),
            ("not_here", pk.tag(17), datagram(0x02FFFFFFFF02, A, "10.0.0.2", "10.0.0.3", b"canary")),
            ("ether_type", pk.tag(17), arp(2, A, ip_address("10.0.0.2"), B, ip_address("10.0.0.3"), B)),
            # For a router: by its MAC, its address, or as one that was not there before.
            ("unknown_source", pk.tag(17), datagram(B, router, "10.0.1.3", "10.0.0.3", b"canary")),
            ("unknown_source", pk.tag(17), datagram(B, 0x02FFFFFFFF01, "10.0.0.1", "10.0.0.3", b"canary")),
            ("router_advertisement", pk.tag(17), advertised(134, bytes(12))),
            ("nd_spoof", pk.tag(17), advertised(136, bytes(4) + pk.mapped(ip_address("fd00:1::2")))),
            ("dhcp_server", pk.tag(17), datagram(B, A, "10.0.0.2", "10.0.0.3", b"canary", 68, 67)),
            # What machines tell switches is for switches.
            (None, pk.tag(17), pk.mac_bytes(pk.BROADCAST) + pk.mac_bytes(A) + b"\x80\x35" + bytes(46)),
            # Last: switches believe that b is here now, as they do in any VLAN.
            ("sender_location", pk.tag(17), datagram(pk.BROADCAST, B, "10.0.0.3", "255.255.255.255", b"canary")),
        ]
        before = site.counted("m2")
        for _, tags, frame in rows:
            out.send(pk.tagged(frame, tags))
        out.send(datagram(site.mac("m2"), 0x02FFFFFFFF03, "10.99.0.9", "10.99.0.2", b"left alone"))
        assert theirs.recv(100) == b"left alone"
        own = netns.run_in(site.place("physics/b"), partial(packet_socket, "eth0"))
        stack.callback(own.close)
        own.send(datagram(pk.BROADCAST, B, "10.0.0.3", "255.255.255.255", b"here I am"))
        out.send(pk.tagged(right.replace(b"canary", b"order!"), pk.tag(17 | 0xA000)))  # whatever its priority
        heard: list[bytes] = []
        until(lambda: heard.extend(pending(b)) or any(b"order!" in frame for frame in heard), "what is in order")
        # By whatever MAC that is nobody's there: of whom a router joins to the segment, with that router's.
        out.send(pk.tagged(datagram(B, 0x02FFFFFFFF01, "10.0.1.3", "10.0.0.3", b"routed!"), pk.tag(17)))
        until(lambda: heard.extend(pending(b)) or any(b"routed!" in frame for frame in heard), "what is routed")
        (routed,) = (frame for frame in heard if b"routed!" in frame)
        assert int.from_bytes(routed[6:12]) == router
        assert not [frame.hex() for frame in heard if b"canary" in frame]
        after = site.counted("m2")
        told = {reason: n - before.get(reason, 0) for reason, n in after.items() if n != before.get(reason, 0)}
        expected: dict[str, int] = {}
        for reason, _, _ in rows:
            if reason is not None:
                expected[reason] = expected.get(reason, 0) + 1
        assert told == expected
    assert ping(site.place("physics/a"), "10.0.0.3"), "and the switch finds them again"


def up_to(channel: socket.socket, end: bytes) -> list[bytes]:
    """What comes in until something has this in it."""
    found: list[bytes] = []
    until(lambda: found.extend(pending(channel)) or any(end in frame for frame in found), "what comes behind it")
    return found


@pytest.mark.parametrize("target", [B, pk.BROADCAST], ids=["one", "all"])
def test_a_workload_puts_no_tag_of_its_own_on_the_wire(site: Site, target: int) -> None:
    """Not its segment's, nor another's, nor one behind which a switch would find another."""
    with ExitStack() as stack:
        b = listening(site.place("physics/b"), stack)
        others = [listening(site.place(name), stack) for name in ("history/b", "other/z")]
        others.append(listening(site.stranger, stack))
        own = netns.run_in(site.place("physics/a"), partial(packet_socket, "eth0"))
        stack.callback(own.close)
        before = site.counted("m1").get("tagged", 0)
        frame = datagram(target, A, "10.0.0.2", "10.0.0.3", b"canary")
        hops = [pk.tag(17), pk.tag(20), pk.tag(0), b"\x88\xa8\0\x14", pk.tag(17) + pk.tag(20), pk.tag(0) + pk.tag(20)]
        for tags in hops:
            own.send(pk.tagged(frame, tags))
        own.send(datagram(pk.BROADCAST, A, "10.0.0.2", "255.255.255.255", b"behind them"))
        got = [*up_to(b, b"behind"), *up_to(others[-1], b"behind")]
        got += [frame for one in others for frame in pending(one)]
        assert site.counted("m1")["tagged"] == before + len(hops)
        assert not [frame.hex() for frame in got if b"canary" in frame]


def numbered(here: Path, there: Path, target: str, moving: Any) -> tuple[Sequence[float], Sequence[int]]:
    """Numbered packets one way while something happens: when each was sent, and which came."""

    def receiver() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((target, 5000))
        made.setblocking(False)
        return made

    sent: list[float] = []
    came: list[int] = []
    over = threading.Event()
    with (
        netns.run_in(here, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as out,
        netns.run_in(there, receiver) as into,
    ):

        def stream() -> None:
            while not over.wait(PACE):
                out.sendto(struct.pack("!I", len(sent)), (target, 5000))
                sent.append(time.monotonic())
                while True:
                    try:
                        came.append(struct.unpack("!I", into.recv(100))[0])
                    except BlockingIOError:
                        break

        thread = threading.Thread(target=stream)
        thread.start()
        until(lambda: len(came) > 50, "the first packets")
        moving()
        there_now = len(sent)
        until(lambda: came[-1] > there_now + 50, "packets at the new place")
        over.set()
        thread.join()
    return sent, came


def test_a_port_that_says_nothing_moves_and_switches_know(site: Site) -> None:
    """Nothing comes from it: only what its new machine says for it tells the switch where it is."""
    fdb = partial(subprocess.check_output, ["bridge", "-j", "fdb", "show", "br", "switch1"])

    def at(mac: str) -> set[str]:
        return {row["ifname"] for row in json.loads(netns.run_in(site.wire, fdb)) if row["mac"] == mac}

    assert ping(site.place("physics/a"), "10.0.0.3")
    assert at("02:00:00:00:00:0b") == {"s1m2"}
    for machine, plug in (("m3", "s1m3"), ("m2", "s1m2")):
        move = partial(nestnet, "move", "physics/b", "--to", machine, "--lab", site.lab.name)
        sent, came = numbered(site.place("physics/a"), site.place("physics/b"), "10.0.0.3", move)
        assert at("02:00:00:00:00:0b") == {plug}
        assert len(came) == len(set(came)), "none comes twice"
        gaps = [sent[b] - sent[a] for a, b in pairwise(came)]
        assert max(gaps) < SILENCE, max(gaps)
    assert ping(site.place("physics/c"), "10.0.0.3"), "routed, too"


def test_a_trunk_hears_all_macs_while_it_has_to_and_is_given_back(site: Site, tmp_path: Path) -> None:
    """Whatever agent did it, killed or not; not when it was so already."""
    machine, ports = site.machine("m4"), yaml.safe_load(FILE)["networks"]["other"]["ports"]

    def promiscuous() -> bool:
        shown = netns.run_in(machine, partial(subprocess.check_output, ["ip", "-j", "link", "show", "eth1"]))
        return "PROMISC" in json.loads(shown)[0]["flags"]

    with Client(site.lab.controller) as client:

        def rides(yes: bool) -> None:
            """All that lives on m4 is one port, or nothing."""
            if yes:
                told = client.apply({"apiVersion": "nestnet/v1", "networks": {"other": {"ports": ports}}})["token"]
            else:
                told = client.delete("port", "other/y")["token"]
            until(lambda: {m["name"]: m["current"] for m in client.status(told)["machines"]}["m4"], "m4 is so")

        assert promiscuous()
        agent = next(process for process in site.lab.processes if process.name == "agent-m4")
        command = (Path("/proc") / str(agent.pid) / "cmdline").read_bytes().decode().split("\0")[:-1]
        os.kill(agent.pid, signal.SIGKILL)
        until(lambda: not agent.alive(), "its end")
        assert ping(site.place("other/z"), "10.0.0.4"), "frames for its MAC come in without an agent"
        assert promiscuous()
        with (tmp_path / "again.log").open("wb") as log:
            netns.spawn(machine, command, output=log, environment={**os.environ, "PYTHONPATH": str(ROOT)})
        for expected in (False, True, False):
            rides(expected)
            assert promiscuous() == expected
        netns.run_in(machine, partial(run, "ip", "link", "set", "eth1", "promisc", "on"))
        for yes in (True, False):
            rides(yes)
            assert promiscuous(), "somebody else did that"
        netns.run_in(machine, partial(run, "ip", "link", "set", "eth1", "promisc", "off"))
        rides(True)
        assert promiscuous()


def test_a_trunk_that_goes_and_comes_back(site: Site) -> None:
    """Its segments are closed and told of, nothing else is; and when it is back they work again."""
    netns.run_in(site.wire, partial(run, "ip", "link", "del", "s1m1"))
    try:
        until(
            lambda: b"there is no interface eth1, the trunk to campus" in status(site),
            "a trunk that is missing",
        )
        before = site.counted("m1").get("no_trunk", 0)
        assert not ping(site.place("physics/a"), "10.0.0.3", "-W", "0.3")
        assert site.counted("m1")["no_trunk"] > before
    finally:
        batch = [
            f"link add s1m1 type veth peer name eth1 netns {site.lab.machine('m1')}",
            "link set s1m1 master switch1 up",
        ]
        netns.run_in(site.wire, partial(run, "ip", "-batch", "-", input="\n".join(batch), text=True))
        netns.run_in(site.machine("m1"), partial(run, "ip", "link", "set", "eth1", "up"))
    until(lambda: ping(site.place("physics/a"), "10.0.0.3", "-W", "0.3"), "a trunk that is back")
