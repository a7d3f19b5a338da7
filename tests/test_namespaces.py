"""Real frames through real namespaces: what workloads hear is what `meaning` says, and nothing more.

          wire: a namespace with a bridge
         /          |          \\
    machine 1   machine 2 ...             eth0, 192.0.2.N; our programs on it and on p1 p2 ...
     p1  p2 ...                           veths
      |                                   the other ends: in a namespace for each workload, m1 m2 ...
    workload 1, workload 2 ...            packet sockets send and hear everything there

A workload has a link from every machine, so ports may live anywhere and no device is made twice. Behind every frame
goes a marker, a broadcast from the same machine to all others. One CPU does all the work, so a queue that a frame waits
in is one that the marker waits in behind it: when that has arrived everywhere, so has all that ever will.
"""

from __future__ import annotations

import os
import random
import select
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address

import pytest
from frames import ipv4, udp
from strategies import Step, depth, some_chatter, some_dialogues, some_rounds
from test_equality import counted, machine_of
from twins import SMALL

from nestnet.agent import netns
from nestnet.agent.links import set_sysctls
from nestnet.compile.compiler import compile
from nestnet.compile.diff import diff
from nestnet.compile.slots import Slots, assign
from nestnet.compile.tables import Tables, empty
from nestnet.datapath.kernel import BPFFS, Kernel
from nestnet.model import packet as pk
from nestnet.model.meaning import State, deliver
from nestnet.model.reasons import NAMES
from nestnet.model.values import Machine, Network, Port, Segment, World

pytestmark = pytest.mark.root
PREFIX = f"nnt-ns-{os.getpid()}-"
MACHINES, WORKLOADS = 4, 17  # the last workload hears the markers
MARKER = 1 << 20  # ids from here on are those of markers
PATIENCE = 5.0  # seconds in which a marker comes, or never
IGNORE_OUTGOING = 23  # <linux/if_packet.h>
SEED = int(os.environ.get("NESTNET_SEED", "1"))
CASES = int(os.environ.get("NESTNET_CASES", "30"))  # of each of three kinds


def ip(namespace: str, *lines: str) -> None:
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], input="\n".join(lines), text=True, check=True)


def ping(address: str, *options: str) -> None:
    """From the calling thread's namespace. CalledProcessError without an answer."""
    subprocess.run(["ping", "-n", "-c", "1", "-W", "2", *options, address], capture_output=True, check=True)


def quiet() -> None:
    """In a namespace: nothing speaks by itself."""
    set_sysctls({f"net/ipv6/conf/{which}/disable_ipv6": 1 for which in ("all", "default")})


def packet_socket(device: str) -> socket.socket:
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    found.setsockopt(263, IGNORE_OUTGOING, 1)  # SOL_PACKET
    found.bind((device, 3))  # ETH_P_ALL
    return found


@dataclass
class Bed:
    """Machines and workloads, and what the machines know."""

    kernels: dict[int, Kernel]
    links: dict[tuple[int, int], int]  # ifindex by machine and workload
    wires: dict[int, int]  # ifindex of eth0 by machine
    sockets: dict[tuple[int, int], socket.socket]
    slots: dict[int, Slots] = field(default_factory=dict)
    have: dict[int, Tables] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)  # workload by port
    world: World = field(default_factory=World)
    sent: int = 0

    def become(self, world: World) -> None:
        self.world = with_markers(world)
        self.numbers = {port: number for number, port in enumerate(sorted(world.ports), 1)}
        for machine in range(1, MACHINES + 1):
            self.slots[machine] = assign(self.slots.get(machine, Slots()), self.world)
            links = {port: self.links[machine, number] for port, number in self.numbers.items()}
            links |= {MARKER + m: self.links[machine, WORKLOADS] for m in range(1, MACHINES + 1)}
            want = compile(self.world, machine, links, self.wires[machine], self.slots[machine])
            self.kernels[machine].apply(diff(self.have.get(machine) or empty(), want))
            self.have[machine] = want

    def drops(self) -> Counter[str]:
        """On all machines, by reason."""
        found: Counter[str] = Counter()
        for kernel in self.kernels.values():
            for (_, reason), packets in kernel.drops().items():
                found[NAMES[reason]] += packets
        return found

    def send(self, port: int, frame: bytes) -> tuple[list[tuple[int, bytes]], Counter[str]]:
        """What every workload heard, by port and in no order, and what was dropped."""
        machine = machine_of(self.world, port)
        before = self.drops()
        self.sockets[machine, self.numbers[port]].send(frame)
        heard = self.heard_before_marker(machine)
        return heard, self.drops() - before

    def heard_before_marker(self, machine: int) -> list[tuple[int, bytes]]:
        """Send a marker from this machine, and hear everything until it has come to all others."""
        self.sent += 1
        own = self.world.ports[MARKER + machine]
        marker = pk.mac_bytes(pk.BROADCAST) + pk.mac_bytes(own.mac) + b"\x08\x00" + marker_packet(machine, self.sent)
        self.sockets[machine, WORKLOADS].send(marker)
        missing = set(range(1, MACHINES + 1)) - {machine}
        end = time.monotonic() + PATIENCE
        ports = {number: port for port, number in self.numbers.items()}
        heard: list[tuple[int, bytes]] = []
        while missing:
            ready, _, _ = select.select(
                [self.sockets[m, WORKLOADS] for m in missing], [], [], max(0, end - time.monotonic())
            )
            assert ready, f"no marker came from machine {machine} to {missing}; dropped: {self.drops()}"
            for m in list(missing):
                if marker in pending(self.sockets[m, WORKLOADS]):
                    missing.remove(m)
        for (at, number), channel in self.sockets.items():
            if number != WORKLOADS:
                for frame in pending(channel):
                    port = ports[number]  # KeyError: one without a port has heard something
                    # Only on the link to the machine where it lives.
                    assert at == machine_of(self.world, port), (at, port, frame.hex())
                    heard.append((port, frame))
        return heard


def marked(machine: int) -> IPv4Address:
    """Where a machine's markers come from."""
    return IPv4Address("10.255.0.0") + machine


def marker_packet(machine: int, number: int) -> bytes:
    """An IPv4 broadcast that has not been before."""
    source, target = pk.mapped(marked(machine)), pk.LIMITED_BROADCAST
    return ipv4(source, target, pk.UDP, udp(source, target, 9, 9, number.to_bytes(8, "big")))


def pending(channel: socket.socket) -> list[bytes]:
    """What has come in already."""
    found: list[bytes] = []
    while True:
        try:
            found.append(channel.recv(65536))
        except BlockingIOError:
            return found


def with_markers(world: World) -> World:
    """All machines, and a port for markers on each."""
    machines = [Machine(m, IPv4Address(f"192.0.2.{m}")) for m in range(1, MACHINES + 1)]
    ports = [Port(MARKER + m.id, MARKER, MARKER, m.id, 0x02FF00000000 + m.id, (marked(m.id),)) for m in machines]
    return world.with_(*machines, Network(MARKER), Segment(MARKER, MARKER, MARKER), *ports)


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    cpus = os.sched_getaffinity(0)
    pins = BPFFS / "nestnet" / f"{PREFIX}pins"
    kernels: dict[int, Kernel] = {}
    sockets: dict[tuple[int, int], socket.socket] = {}
    os.sched_setaffinity(0, {min(cpus)})
    try:
        wire = f"{PREFIX}wire"
        names = {machine: f"{PREFIX}m{machine}" for machine in range(1, MACHINES + 1)}
        rooms = {number: f"{PREFIX}w{number}" for number in range(1, WORKLOADS + 1)}
        for name in (wire, *names.values(), *rooms.values()):
            netns.run_in(netns.create(name), quiet)
        ip(wire, "link add wire type bridge stp_state 0 mcast_snooping 0", "link set wire up")
        for machine, name in names.items():
            lines = [f"link add eth0 type veth peer name m{machine} netns {wire}", "link set eth0 up"]
            lines.append(f"address add 192.0.2.{machine}/24 dev eth0")
            for number, room in rooms.items():
                lines.append(f"link add p{number} mtu 3000 type veth peer name m{machine} mtu 3000 netns {room}")
                lines.append(f"link set p{number} up")
            ip(name, *lines)
            ip(wire, f"link set m{machine} master wire up")
        for room in rooms.values():
            ip(room, *(f"link set m{machine} arp off up" for machine in names))
        links: dict[tuple[int, int], int] = {}
        wires: dict[int, int] = {}
        for machine, name in names.items():
            kernels[machine] = Kernel.open(pins / str(machine), SMALL)

            def attach(machine: int = machine) -> None:
                for index, device in socket.if_nameindex():
                    if device == "eth0":
                        wires[machine] = index
                        kernels[machine].attach(index, "underlay")
                    elif device != "lo":
                        links[machine, int(device[1:])] = index
                        set_sysctls({f"net/ipv4/conf/{device}/forwarding": 1})
                        kernels[machine].attach(index, "workload")

            netns.run_in(netns.path(name), attach)
        for number, room in rooms.items():
            for machine in names:
                sockets[machine, number] = netns.run_in(netns.path(room), partial(packet_socket, f"m{machine}"))
        bed = Bed(kernels, links, wires, sockets)
        bed.become(World())
        for machine, name in names.items():  # the machines' ARP first: markers are broadcasts, and those wait for none
            for other in names.keys() - {machine}:
                netns.run_in(netns.path(name), partial(ping, f"192.0.2.{other}"))
        yield bed
    finally:
        os.sched_setaffinity(0, cpus)
        for channel in sockets.values():
            channel.close()
        for machine, kernel in kernels.items():
            kernel.unpin()
            (pins / str(machine)).rmdir()
        if pins.exists():
            pins.rmdir()
        for name in netns.names(PREFIX):
            netns.delete(name)


@dataclass
class Tally:
    """What there was to see, so that nobody takes silence for a proof."""

    cases: int = 0
    frames: int = 0
    heard: int = 0
    crossed: int = 0
    carried: int = 0
    deepest: int = 0
    floods: int = 0
    drops: Counter[str] = field(default_factory=Counter)


def play(bed: Bed, steps: list[Step], tally: Tally) -> None:
    """A conversation, by the meaning of its worlds and by the machines."""
    state, world, now = State(), None, 0
    for kernel in bed.kernels.values():
        kernel.forget()
    tally.cases += 1
    for number, step in enumerate(steps):
        if step.world is not world:
            world = step.world
            bed.become(world)
        if int(step.now) > now:
            for kernel in bed.kernels.values():
                kernel.age(int(step.now) - now)
            now = int(step.now)
        if not is_sendable(step.frame):
            continue
        outcome = deliver(world, state, step.port, step.frame, now)
        state = outcome.state
        heard, drops = bed.send(step.port, step.frame)
        expected = sorted(outcome.deliveries), counted(world, step.port, step.frame, outcome)
        assert (sorted(heard), drops) == expected, (number, step.port, step.frame.hex())
        here = machine_of(world, step.port)
        level = depth(world, world.ports[step.port].network)
        others = [port for port, _ in heard if port != step.port]
        tally.frames += 1
        tally.heard += len(heard)
        tally.crossed += sum(machine_of(world, port) != here for port in others)
        tally.carried += sum(level > 1 and machine_of(world, port) != here for port in others)
        tally.deepest = max(tally.deepest, level if others else 0)
        tally.floods += len(others) > 1
        tally.drops += drops


def is_sendable(frame: bytes) -> bool:
    """A packet socket sends no frame without a whole Ethernet header."""
    return len(frame) >= pk.ETHERNET


def test_workloads_hear_what_they_should_and_nothing_more(bed: Bed) -> None:
    tally, rng = Tally(), random.Random(SEED)
    for _ in range(CASES):
        play(bed, some_rounds(rng), tally)
        play(bed, some_dialogues(rng, moves=False), tally)
        play(bed, some_chatter(rng), tally)
    print(f"seed {SEED}: {tally}")
    assert tally.crossed > 100, tally
    assert tally.carried > 20, tally
    assert tally.deepest > 2, tally
    assert tally.floods > 20, tally
    assert len(tally.drops) > 15, tally
