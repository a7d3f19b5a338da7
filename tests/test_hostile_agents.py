"""Hostile workloads against real agents: on links that come and go, in storms, in loops, on machines that were removed.

    machine 1: A, D in LAN, and Z of another network with D's MAC and addresses        machine 2: B in LAN

NESTNET_PLUGS=1000 .venv/bin/python -m pytest tests/test_hostile_agents.py -s
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

import pytest
from frames import ethernet, ip_frame, udp
from hostile import TAG
from test_hostile import stack_socket
from test_namespaces import SMALL, ip, packet_socket, pending, quiet
from twins import copies

from nestnet.agent import netns
from nestnet.agent.agent import Agent
from nestnet.agent.attachments import Workloads
from nestnet.agent.feed import Desired
from nestnet.agent.inquiries import Inquiries
from nestnet.datapath.kernel import BPFFS, Kernel
from nestnet.model import packet as pk
from nestnet.model.packet import mapped
from nestnet.model.reasons import NAMES
from nestnet.model.values import Machine, Network, Port, Segment, World

pytestmark = pytest.mark.root
PLUGS = int(os.environ.get("NESTNET_PLUGS", "8"))
STORM = float(os.environ.get("NESTNET_STORM", "1"))  # seconds of each
A, B, D, Z = 1, 2, 4, 5
STAMP = 8  # bytes: when a frame was sent, monotonic ns
PATIENCE = 20.0

# Sends frames as fast as it can, each with the time in its last bytes, whenever there is an eth0.
SENDER = """
import socket, sys, time
frames = [bytes.fromhex(text)[:-8] for text in sys.argv[1:]]
while True:
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as channel:
            channel.bind(("eth0", 0))
            while True:
                for frame in frames:
                    channel.send(frame + time.monotonic_ns().to_bytes(8, "big"))
    except OSError:
        pass
"""


def world(*without: tuple[str, int]) -> World:
    def port(id: int, network: int, host: int, number: int) -> Port:
        addresses = (IPv4Address(f"10.7.0.{number}"), IPv6Address(f"fd07::{number}"))
        return Port(id, network, network, host, 0x020000000000 + number, addresses)

    cidrs = (ip_network("10.7.0.0/24"), ip_network("fd07::/64"))
    machines = [Machine(m, IPv4Address(f"192.0.2.{m}")) for m in (1, 2)]
    networks = [value for n in (1, 2) for value in (Network(n), Segment(n, n, 100 + n, cidrs))]
    ports = [port(A, 1, 1, 10), port(B, 1, 2, 11), port(D, 1, 1, 12), port(Z, 2, 1, 12)]
    return World.of([*machines, *networks, *ports]).without(*without)


@dataclass
class Farm:
    """Two machines, their agents, and what everybody hears."""

    prefix: str
    kernels: dict[int, Kernel]
    agents: dict[int, Agent] = field(default_factory=dict)
    revision: int = 0

    def machine(self, machine: int) -> Path:
        return netns.path(f"{self.prefix}m{machine}")

    def room(self, port: int) -> Path:
        return netns.path(f"{self.prefix}w{port}")

    def become(self, world: World, *machines: int) -> None:
        """Agents make it so; without `machines` all of them."""
        self.revision += 1
        for machine in machines or self.agents:
            agent = self.agents[machine]
            netns.run_in(self.machine(machine), partial(agent.converge, Desired(world.values, self.revision, True)))
            assert not agent.problems, agent.problems

    def drops(self, machine: int) -> Counter[str]:
        found: Counter[str] = Counter()
        for (_, reason), packets in self.kernels[machine].drops().items():
            found[NAMES[reason]] += packets
        return found

    @contextmanager
    def sending(self, port: int, *frames: bytes) -> Iterator[None]:
        """A process in a port's room that sends these without end."""
        process = netns.spawn(self.room(port), [sys.executable, "-S", "-c", SENDER, *(f.hex() for f in frames)])
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def listener(self, port: int) -> socket.socket:
        found = netns.run_in(self.room(port), partial(packet_socket, "eth0"))
        found.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        return found

    def stack(self, machine: int) -> list[socket.socket]:
        types = (pk.IPV4, pk.IPV6, pk.ARP, pk.TAGS[0], 0x88B5)
        return [netns.run_in(self.machine(machine), partial(stack_socket, one)) for one in types]


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        select.select([], [], [], 0.001)  # the pace of asking


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    prefix = f"nnt-host-{os.getpid()}-"
    pins = BPFFS / "nestnet" / f"{prefix}pins"
    wire = f"{prefix}wire"
    made = Farm(prefix, {})
    try:
        netns.create(wire)
        ip(wire, "link add wire type bridge stp_state 0 mcast_snooping 0", "link set wire up")
        for machine in (1, 2):
            name = f"{prefix}m{machine}"
            netns.run_in(netns.create(name), quiet)
            ip(
                name,
                f"link add eth0 type veth peer name m{machine} netns {wire}",
                f"address add 192.0.2.{machine}/24 dev eth0",
                "link set eth0 up",
            )
            ip(wire, f"link set m{machine} master wire up")
            made.kernels[machine] = Kernel.open(pins / str(machine), SMALL)
            inquiries = netns.run_in(made.machine(machine), partial(Inquiries, made.kernels[machine], print))
            made.agents[machine] = Agent(machine, made.kernels[machine], Workloads(f"{prefix}w"), inquiries, copies())
        made.become(world())
        ping = ["ping", "-n", "-c", "1", "-W", "2", "192.0.2.2"]
        netns.run_in(made.machine(1), partial(subprocess.run, ping, capture_output=True, check=True))
        yield made
    finally:
        for agent in made.agents.values():
            agent.inquiries.close()
        for number, kernel in made.kernels.items():
            kernel.unpin()
            (pins / str(number)).rmdir()
        if pins.exists():
            pins.rmdir()
        for name in netns.names(prefix):
            netns.delete(name)


def payload() -> bytes:
    return TAG + bytes(STAMP)


def sent_at(frame: bytes) -> int | None:
    """When a frame of a sender was sent; None if it is another's."""
    return int.from_bytes(frame[-STAMP:], "big") if frame[-STAMP - len(TAG) : -STAMP] == TAG else None


def udp_frame(source_mac: int, source: str, target_mac: int, target: str, port: int = 9) -> bytes:
    a, b = mapped(IPv4Address(source)), mapped(IPv4Address(target))
    body = bytearray(udp(a, b, 1000, port, payload()))
    body[6:8] = b"\0\0"  # no checksum: the time is filled in later
    return ip_frame(target_mac, source_mac, a, b, pk.UDP, bytes(body))


MAC_A, MAC_B, MAC_D = 0x02000000000A, 0x02000000000B, 0x02000000000C
FROM_A = [
    udp_frame(MAC_A, "10.7.0.10", MAC_D, "10.7.0.12"),
    udp_frame(MAC_A, "10.7.0.10", MAC_B, "10.7.0.11"),
    udp_frame(MAC_A, "10.7.0.10", pk.BROADCAST, "255.255.255.255"),
    udp_frame(MAC_A, "10.7.0.10", pk.BROADCAST, "192.0.2.1"),  # to the machine, it hopes
]
HOSTILE = [
    udp_frame(MAC_D, "10.7.0.12", MAC_B, "10.7.0.11"),  # as D, whole
    udp_frame(MAC_A, "10.7.0.12", MAC_B, "10.7.0.11"),
    udp_frame(MAC_A, "192.0.2.2", pk.BROADCAST, "192.0.2.1", 4789),  # as the other machine, to this one
    ethernet(pk.BROADCAST, MAC_A, 0x88B5, payload()),
]


@dataclass
class Ears:
    """Where a workload that comes and goes may be heard."""

    farm: Farm
    others: dict[int, socket.socket]
    stack: list[socket.socket]

    def heard(self) -> dict[int, list[tuple[int, bytes]]]:
        """By port: when what it heard was sent, and the frame."""
        return {
            port: [(at, frame) for frame in pending(channel) if (at := sent_at(frame)) is not None]
            for port, channel in self.others.items()
        }

    def stack_heard(self) -> list[str]:
        """What came to the machine's own stack by a link of a workload."""
        found = []
        for channel in self.stack:
            while True:
                try:
                    frame, (device, *_) = channel.recvfrom(65536)
                except BlockingIOError:
                    break
                if device != "eth0" or TAG in frame:
                    found.append(f"{device}: {frame.hex()}")
        return found


@contextmanager
def ears(farm: Farm) -> Iterator[Ears]:
    with ExitStack() as stack:
        others = {port: stack.enter_context(farm.listener(port)) for port in (B, D, Z)}
        yield Ears(farm, others, [stack.enter_context(channel) for channel in farm.stack(1)])


def test_a_link_is_closed_until_the_tables_know_it_and_after_they_forgot_it(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workload sends from before its link is there until after it is gone. Of what it sends, others hear what is its
    own, and that only while the tables have its port; its machine's stack hears nothing, ever."""
    begun: list[int] = []
    apply = Kernel.apply

    def timed(kernel: Kernel, actions: Any) -> None:
        if kernel is farm.kernels[1]:
            begun.append(time.monotonic_ns())
        apply(kernel, actions)

    monkeypatch.setattr(Kernel, "apply", timed)
    without = world(("port", A))
    took: list[float] = []
    for _ in range(PLUGS):
        farm.become(without)
        name = f"{farm.prefix}w{A}"
        netns.create(name)
        with ears(farm) as at, farm.sending(A, *FROM_A, *HOSTILE):
            begun.clear()
            before = farm.drops(1)
            farm.become(world())
            known = begun[0]
            heard = []

            def both(at: Ears = at, heard: list[Any] = heard) -> bool:
                heard.append(at.heard())
                return all(any(found[port] for found in heard) for port in (B, D))

            until(both, "nothing that is in order arrived")
            took.append((min(at for found in heard for at, _ in found[D]) - known) / 1e6)
            until(lambda before=before: (farm.drops(1) - before)["source_mac"], "nothing was refused")
            farm.become(without)
            gone = time.monotonic_ns()
            heard.append(at.heard())
            for found in heard:
                assert not found[Z]
                for port in (B, D):
                    # The sender may have been stopped between looking at its clock and sending: one frame at a time.
                    early = {when for when, _ in found[port] if not known <= when <= gone}
                    assert len(early) <= 1, "heard without tables"
                    for _, frame in found[port]:
                        assert frame[6:12] == pk.mac_bytes(MAC_A)
                        assert frame[26:30] == bytes((10, 7, 0, 10))
            assert at.stack_heard() == []
            assert "error" not in farm.drops(1) - before
    farm.become(world())
    took.sort()
    print(f"{PLUGS} plugs: first frame after the tables were written began, median {took[len(took) // 2]:.1f} ms")


def test_a_machine_that_was_removed_is_a_stranger(farm: Farm) -> None:
    """Its agent runs on, and knows nothing of it; so does its datapath, and its workloads talk."""
    rest = world(("machine", 2), ("port", B))
    farm.become(world())
    with farm.listener(D) as at, farm.sending(B, udp_frame(MAC_B, "10.7.0.11", MAC_D, "10.7.0.12")):
        until(lambda: [f for f in pending(at) if sent_at(f)], "B is not heard")
        before = farm.drops(1)["not_a_member"]
        farm.become(rest, 1)
        now = time.monotonic_ns()
        until(lambda: farm.drops(1)["not_a_member"] > before + 100, "nothing is refused")
        assert [when for f in pending(at) if (when := sent_at(f)) and when > now] == []
    farm.become(world())


def stormy(farm: Farm) -> dict[str, list[bytes]]:
    """What one port may send as much of as it can, to bother others."""
    a = mapped(IPv4Address("10.7.0.10"))
    ask = b"\x00\x01\x08\x00\x06\x04\x00\x01" + pk.mac_bytes(MAC_A) + a[-4:] + bytes(6)
    return {
        "A21": [
            udp_frame(0x02A000000000 | n << 16 | m, "10.7.0.10", MAC_D, "10.7.0.12") for n in range(8) for m in range(8)
        ],
        "A23": [udp_frame(MAC_A, "10.7.0.10", MAC_B, "10.7.0.11", port) for port in range(1, 65536, 997)],
        "A24": [
            ethernet(pk.BROADCAST, MAC_A, pk.ARP, ask + bytes((10, 7, 0, 12)) + payload()),
            ethernet(pk.BROADCAST, MAC_A, pk.ARP, ask + bytes((10, 7, 0, 99)) + payload()),
            udp_frame(MAC_A, "10.7.0.10", pk.BROADCAST, "255.255.255.255"),
        ],
    }


def round_trips(farm: Farm, count: int = 300) -> list[float]:
    """Milliseconds of echo requests from D to B, rising. Raises when one is lost."""
    command = ["ping", "-n", "-i", "0.002", "-c", str(count), "-W", "2", "10.7.0.11"]
    done = netns.run_in(farm.room(D), partial(subprocess.run, command, capture_output=True, text=True, check=True))
    found = sorted(float(ms) for ms in re.findall(r"time=([\d.]+)", done.stdout))
    assert len(found) == count, done.stdout[-300:]
    return found


@pytest.mark.parametrize("row", ["A21", "A23", "A24"])
def test_a_storm_of_one_port_is_no_trouble_for_others(farm: Farm, row: str) -> None:
    """While it storms, others lose nothing, and nobody hears what is not for them. The bound is wide: two CPUs do all
    of this, tests beside it too."""
    farm.become(world())
    farm.kernels[1].forget()
    quiet_ms = round_trips(farm)
    before = farm.kernels[1].stats()
    start, lost = time.monotonic(), farm.drops(1)
    with farm.listener(Z) as at, farm.sending(A, *stormy(farm)[row]):
        until(lambda: (farm.drops(1) - lost) or len(farm.kernels[1].flows()) > 20, "there is no storm")
        stormy_ms = round_trips(farm, int(300 * STORM))
        assert [f for f in pending(at) if sent_at(f)] == []
    seconds = time.monotonic() - start
    frames = sum((farm.drops(1) - lost).values())
    if not frames:
        column = "out_packets"
        frames = int(farm.kernels[1].stats()["value"][column].sum() - before["value"][column].sum())
    p99 = [times[int(len(times) * 0.99)] for times in (quiet_ms, stormy_ms)]
    figures = {"frames/s": round(frames / seconds), "p99 before": p99[0], "p99 in it": p99[1]}
    print(f"{row}: {json.dumps(figures)}")
    assert p99[1] < max(20.0, 10 * p99[0]), figures


def test_two_ports_that_are_bridged_are_no_loop(farm: Farm) -> None:
    """B and D are joined by a cable, behind bridges that they have become: what comes out of one goes into the other.
    None of it has the MAC of the port it goes into, so nothing goes round. What a bridge itself says would: it speaks
    by the port's own MAC, so it is silent here."""
    farm.become(world())
    rooms = {port: f"{farm.prefix}w{port}" for port in (B, D)}
    for room in rooms.values():
        netns.run_in(netns.path(room), quiet)
    ip(rooms[B], f"link add cable type veth peer name cable netns {rooms[D]}")
    for room in rooms.values():
        ip(
            room,
            "link add loop type bridge stp_state 0 mcast_snooping 0",
            "link set eth0 master loop",
            "link set cable master loop up",
            "link set loop up",
        )

    def forwarding() -> bool:
        shown = [
            subprocess.run(["bridge", "-n", room, "link"], capture_output=True, text=True, check=True).stdout
            for room in rooms.values()
        ]
        return all(text.count("state forwarding") == 2 for text in shown)

    try:
        until(forwarding, "the bridges do not forward")
        wire = netns.run_in(netns.path(f"{farm.prefix}wire"), partial(packet_socket, "m1"))
        back = netns.run_in(netns.path(f"{farm.prefix}wire"), partial(packet_socket, "m2"))
        before = farm.drops(1), farm.drops(2)
        with wire, back, farm.listener(A) as at, netns.run_in(farm.room(A), partial(packet_socket, "eth0")) as out:
            for n in range(100):
                out.send(FROM_A[2][:-8] + n.to_bytes(8, "big"))
            # What B gets comes to D by the cable, and the other way round; each is refused where it goes in.
            until(lambda: (farm.drops(1) - before[0])["source_mac"] >= 100, "D's bridge sends nothing")
            until(lambda: (farm.drops(2) - before[1])["source_mac"] >= 100, "B's bridge sends nothing")
            assert [f for f in pending(at) if TAG in f] == []
            assert sum(TAG in f for f in pending(wire)) == 100
            assert sum(TAG in f for f in pending(back)) == 0
    finally:
        ip(rooms[B], "link del cable")
        for room in rooms.values():
            ip(room, "link del loop")
