"""Real frames through real namespaces: what workloads hear is what `meaning` says, and nothing more.

          wire: a namespace with a bridge
         /          |          \\
    machine 1   machine 2 ...             eth0, 192.0.2.N and 2001:db8::N; our programs on it and on p1 p2 ...
     |                                    t1, t2: trunks to two physical networks, each a bridge that floods
     p1  p2 ...                           veths
      |                                   the other ends: in a namespace for each workload, m1 m2 ...
    workload 1, workload 2 ...            packet sockets send and hear everything there

A workload has a link from every machine, so ports may live anywhere and no device is made twice. Behind every frame
goes a marker, a broadcast from the same machine to all others. One CPU does all the work, so a queue that a frame waits
in is one that the marker waits in behind it: when that has arrived everywhere, so has all that ever will.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path

import pytest
from frames import ipv4, udp
from strategies import (
    LEAVES,
    PHYSICAL,
    Step,
    depth,
    on_the_wire,
    some_chatter,
    some_dialogues,
    some_inquiries,
    some_rounds,
    wire_family,
    with_physical,
)
from test_equality import counted, machine_of
from twins import SMALL, copies

from nestnet.agent import netns
from nestnet.agent.agent import Agent
from nestnet.agent.attachments import Workloads
from nestnet.agent.feed import Desired
from nestnet.agent.inquiries import Inquiries
from nestnet.agent.links import set_sysctls
from nestnet.compile.compiler import compile
from nestnet.compile.diff import diff
from nestnet.compile.slots import Slots, assign
from nestnet.compile.tables import Tables, empty
from nestnet.datapath.kernel import BPFFS, Kernel
from nestnet.datapath.kernel import Inquiries as Asked
from nestnet.model import packet as pk
from nestnet.model.bootstrap import answer, settings
from nestnet.model.clock import nanoseconds
from nestnet.model.meaning import State, deliver, put_on
from nestnet.model.reasons import NAMES
from nestnet.model.values import Interface, Machine, Network, Port, Router, Segment, World

pytestmark = pytest.mark.root
PREFIX = f"nnt-ns-{os.getpid()}-"
MACHINES, WORKLOADS = 4, 25  # the last workload hears the markers
MARKER = 1 << 20  # ids from here on are those of markers
PATIENCE = 5.0  # seconds in which a marker comes, or never
IGNORE_OUTGOING, AUXDATA = 23, 8  # <linux/if_packet.h>
TAG_VALID = 1 << 4  # of a status there: there is a tag
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


def speak_ipv6(device: str) -> None:
    """In a namespace that is quiet: this device has IPv6, at once, without asking anybody."""
    values = {"accept_dad": 0, "accept_ra": 0, "router_solicitations": 0, "disable_ipv6": 0}
    set_sysctls({f"net/ipv6/conf/{device}/{key}": value for key, value in values.items()})


def packet_socket(device: str) -> socket.socket:
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    found.setsockopt(263, IGNORE_OUTGOING, 1)  # SOL_PACKET
    found.setsockopt(263, AUXDATA, 1)
    found.bind((device, 3))  # ETH_P_ALL
    return found


@dataclass
class Bed:
    """Machines and workloads, and what the machines know."""

    kernels: dict[int, Kernel]
    links: dict[tuple[int, int], int]  # ifindex by machine and workload
    wires: dict[int, int]  # ifindex of eth0 by machine
    trunks: dict[int, dict[str, tuple[int, int]]]  # ifindex and MAC by machine and physical network
    sockets: dict[tuple[int, int], socket.socket]
    inquiries: dict[int, Asked]
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
            way = self.wires[machine], self.slots[machine], self.trunks[machine]
            want = compile(self.world, machine, links, *way)
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
        drops = self.drops() - before
        told = self.answers(machine)
        heard += [(port, frame) for port, frame in told if frame is not None]
        drops.update("unanswerable" for _, frame in told if frame is None)
        return heard, drops

    def answers(self, machine: int) -> list[tuple[int, bytes | None]]:
        """What the agent of a machine would answer to what was asked since."""
        ports = self.slots[machine].ids("port")
        asked = [(ports[record.slot], record.frame) for record in self.inquiries[machine].take()]
        told: list[tuple[int, bytes | None]] = []
        for id, frame in asked:
            port = self.world.ports[id]
            found = answer(settings(self.world, port), frame)
            told.append((port.trunk or id, None if found is None else pk.tagged(found, put_on(port))))
        return told

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


def trunk_mac(machine: int, number: int) -> int:
    """That of a machine's NIC to a physical network."""
    return 0x0A0000000000 | machine << 8 | number


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
            frame, extra, _, _ = channel.recvmsg(65536, 64)
        except BlockingIOError:
            return found
        # The outermost tag stands beside the bytes (struct tpacket_auxdata).
        for _, _, data in extra:
            status, _, _, _, _, tci, kind = struct.unpack_from("IIIHHHH", data)
            if status & TAG_VALID:
                frame = pk.tagged(frame, struct.pack("!HH", kind, tci))
        found.append(frame)


def with_markers(world: World) -> World:
    """All machines, and a port for markers on each."""
    family = wire_family(world)
    machines = [Machine(m, on_the_wire(m, family)) for m in range(1, MACHINES + 1)]
    ports = [Port(MARKER + m.id, MARKER, MARKER, m.id, 0x02FF00000000 + m.id, (marked(m.id),)) for m in machines]
    return world.with_(*machines, Network(MARKER, underlay=family), Segment(MARKER, MARKER, MARKER), *ports)


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
        for number, _ in enumerate(PHYSICAL, 1):
            # It has nobody's place by heart: two VLANs may have the same MAC.
            bridge = "type bridge stp_state 0 mcast_snooping 0 ageing_time 0"
            ip(wire, f"link add s{number} {bridge}", f"link set s{number} up")
        for machine, name in names.items():
            lines = [f"link add eth0 type veth peer name m{machine} netns {wire}", "link set eth0 up"]
            lines.append(f"address add 192.0.2.{machine}/24 dev eth0")
            for number, room in rooms.items():
                lines.append(f"link add p{number} mtu 3000 type veth peer name m{machine} mtu 3000 netns {room}")
                lines.append(f"link set p{number} up")
            ip(name, *lines)
            netns.run_in(netns.path(name), partial(speak_ipv6, "eth0"))
            ip(name, f"address add 2001:db8::{machine}/64 dev eth0 nodad")
            ip(wire, f"link set m{machine} master wire up")
            for number, _ in enumerate(PHYSICAL, 1):
                mac, peer = pk.mac_bytes(trunk_mac(machine, number)).hex(":"), f"s{number}m{machine}"
                ip(name, f"link add t{number} address {mac} up type veth peer name {peer} netns {wire}")
                ip(wire, f"link set s{number}m{machine} master s{number} up")
        for room in rooms.values():
            ip(room, *(f"link set m{machine} arp off up" for machine in names))
        links: dict[tuple[int, int], int] = {}
        wires: dict[int, int] = {}
        trunks: dict[int, dict[str, tuple[int, int]]] = {machine: {} for machine in names}
        for machine, name in names.items():
            kernels[machine] = Kernel.open(pins / str(machine), SMALL, driven=True)

            def attach(machine: int = machine) -> None:
                for index, device in socket.if_nameindex():
                    if device == "eth0":
                        wires[machine] = index
                        kernels[machine].attach(index, "underlay")
                    elif device.startswith("t"):
                        number = int(device[1:])
                        trunks[machine][PHYSICAL[number - 1]] = index, trunk_mac(machine, number)
                        kernels[machine].attach(index, "trunk")
                    elif device != "lo":
                        links[machine, int(device[1:])] = index
                        set_sysctls({f"net/{family}/conf/{device}/forwarding": 1 for family in ("ipv4", "ipv6")})
                        kernels[machine].attach(index, "workload")

            netns.run_in(netns.path(name), attach)
        for number, room in rooms.items():
            for machine in names:
                sockets[machine, number] = netns.run_in(netns.path(room), partial(packet_socket, f"m{machine}"))
        asked = {machine: kernel.inquiries() for machine, kernel in kernels.items()}
        bed = Bed(kernels, links, wires, trunks, sockets, asked)
        bed.become(World())
        for machine, name in names.items():  # the machines' ARP first: markers are broadcasts, and those wait for none
            for other in names.keys() - {machine}:
                for family in (4, 6):
                    netns.run_in(netns.path(name), partial(ping, str(on_the_wire(other, family))))
        yield bed
        for source in asked.values():
            source.close()
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
    over_ipv6: int = 0
    carried: int = 0
    deepest: int = 0
    floods: int = 0
    tagged: int = 0
    switched: int = 0
    drops: Counter[str] = field(default_factory=Counter)


def play(bed: Bed, steps: list[Step], tally: Tally, switching: random.Random | None = None) -> None:
    """A conversation, by the meaning of its worlds and by the machines. With `switching`, segments leave VLANs and come
    to others in the middle of it, which means nothing."""
    state, world, said = State(), World(), None
    for kernel in bed.kernels.values():
        kernel.forget()
    tally.cases += 1
    for number, step in enumerate(steps):
        if step.world is not said:
            world = said = step.world
            bed.become(world)
        elif switching is not None and switching.random() < 0.1:
            world = with_physical(switching, world)
            bed.become(world)
        for kernel in bed.kernels.values():
            kernel.set_clock(nanoseconds(step.now))
        if not is_sendable(step.frame):
            continue
        outcome = deliver(world, state, step.port, step.frame, step.now)
        state = outcome.state
        heard, drops = bed.send(step.port, step.frame)
        # What is for a port on a trunk is heard there.
        deliveries = [(world.ports[id].trunk or id, frame) for id, frame in outcome.deliveries]
        meant = counted(world, step.port, step.frame, outcome)
        # What a switch floods comes to all other machines: those where its port is not say so.
        if (flooded := drops - meant) and any(segment.vlan for segment in world.segments.values()):
            assert flooded in [Counter({reason: MACHINES - 2}) for reason in ("not_here", "fragment_unknown")]
            drops -= flooded
            tally.switched += 1
        assert (sorted(heard), drops) == (sorted(deliveries), meant), (number, step.port, step.frame.hex())
        here = machine_of(world, step.port)
        level = depth(world, world.ports[step.port].network)
        others = [port for port, _ in heard if port != step.port]
        tally.frames += 1
        tally.heard += len(heard)
        crossed = sum(machine_of(world, port) != here for port in others)
        tally.crossed += crossed
        tally.over_ipv6 += crossed if wire_family(world) == 6 else 0
        tally.carried += sum(level > 1 and machine_of(world, port) != here for port in others)
        tally.deepest = max(tally.deepest, level if others else 0)
        tally.floods += len(others) > 1
        tally.tagged += sum(frame[12:14] in (b"\x81\0", b"\x88\xa8") for _, frame in heard)
        tally.drops += drops


def is_sendable(frame: bytes) -> bool:
    """A packet socket sends no frame without a whole Ethernet header. One whose tag has not two bytes behind it the
    kernel of the machine throws away before it comes to a hook (skb_vlan_untag)."""
    tagged = int.from_bytes(frame[12:14]) in pk.TAGS
    return len(frame) >= pk.ETHERNET + (6 if tagged else 0)


def test_workloads_hear_what_they_should_and_nothing_more(bed: Bed) -> None:
    tally, rng = Tally(), random.Random(SEED)
    for case in range(CASES):
        vlans, physical = case % 2 == 1, case % 4 >= 2
        switching = random.Random(case) if physical else None
        play(bed, some_rounds(rng, vlans=vlans, physical=physical), tally, switching)
        play(bed, some_dialogues(rng, moves=False, live=False, vlans=vlans, physical=physical), tally, switching)
        play(bed, some_chatter(rng, vlans=vlans, physical=physical), tally, switching)
        play(bed, some_inquiries(rng, vlans=vlans), tally)
    print(f"seed {SEED}: {tally}")
    assert tally.crossed > 100, tally
    assert tally.over_ipv6 > 30, tally
    assert tally.carried > 20, tally
    assert tally.deepest > 2, tally
    assert tally.floods > 20, tally
    assert tally.tagged > 50, tally
    assert tally.switched > 15, tally
    assert len(tally.drops) > 15, tally


# ---- with the machines' own stacks, and offloads as they are

BYTES = 20_000_003  # odd, and of no segment size
OFFLOADS = ("tso", "gso", "gro", "tx")
LAN, OTHER = 1, 2  # segments
A, B, C, D, E = 1, 2, 3, 4, 5  # ports


def fabric(family: int) -> World:
    """Two machines, with addresses of this family, and a network of two segments with a router.

    machine 1: A in LAN, D in LAN, E in OTHER        machine 2: B in LAN, C in OTHER
    """

    def port(id: int, segment: int, machine: int) -> Port:
        addresses = (IPv4Address(f"10.7.{segment}.{10 + id}"), IPv6Address(f"fd07:{segment}::{10 + id}"))
        return Port(id, 1, segment, machine, 0x020000000000 + id, addresses)

    cidrs = {s: (ip_network(f"10.7.{s}.0/24"), ip_network(f"fd07:{s}::/64")) for s in (LAN, OTHER)}
    return World.of(
        (
            *(Machine(m, on_the_wire(m, family)) for m in (1, 2)),
            Network(1, underlay=family, mtu=LEAVES[family]),
            *(Segment(s, 1, 100 + s, cidrs[s]) for s in cidrs),
            Router(1, 1, 0x060000000001, tuple(Interface(s, (c[0][1], c[1][1])) for s, c in cidrs.items())),
            port(A, LAN, 1), port(B, LAN, 2), port(C, OTHER, 2), port(D, LAN, 1), port(E, OTHER, 1),
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """What agents made of `fabric`."""

    world: World
    prefix: str

    def room(self, port: int) -> Path:
        return netns.path(f"{self.prefix}w{port}")

    def machine(self, machine: int) -> Path:
        return netns.path(f"{self.prefix}m{machine}")

    @property
    def mtu(self) -> int:
        return self.world.networks[1].mtu

    def address(self, port: int, family: int) -> str:
        return str(self.world.ports[port].address(family))


@pytest.fixture(scope="module", params=[4, 6], ids=["over-ipv4", "over-ipv6"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    prefix = f"nnt-lab-{os.getpid()}-"
    pins = BPFFS / "nestnet" / f"{prefix}pins"
    wire = f"{prefix}wire"
    kernels: list[Kernel] = []
    inquiries: list[Inquiries] = []
    family = request.param
    world = fabric(family)
    try:
        netns.create(wire)
        ip(wire, "link add wire type bridge stp_state 0 mcast_snooping 0", "link set wire up")
        for machine in (1, 2):
            name = f"{prefix}m{machine}"
            netns.run_in(netns.create(name), quiet)
            ip(
                name,
                f"link add eth0 type veth peer name m{machine} netns {wire}",
                "link set eth0 up",
            )
            netns.run_in(netns.path(name), partial(speak_ipv6, "eth0"))
            length = "24" if family == 4 else "64 nodad"
            ip(name, f"address add {on_the_wire(machine, family)}/{length} dev eth0")
            ip(wire, f"link set m{machine} master wire up")
        for machine in (1, 2):
            kernel = Kernel.open(pins / str(machine), SMALL)
            kernels.append(kernel)
            room = netns.path(f"{prefix}m{machine}")
            inquiries.append(netns.run_in(room, partial(Inquiries, kernel, print)))
            agent = Agent(machine, kernel, Workloads(f"{prefix}w"), inquiries[-1], copies())
            desired = Desired(world.values, 1, True)
            netns.run_in(room, partial(agent.converge, desired))
            assert not agent.problems
        netns.run_in(netns.path(f"{prefix}m1"), partial(ping, str(on_the_wire(2, family))))
        yield Lab(world, prefix)
    finally:
        for each in inquiries:
            each.close()
        for number, kernel in enumerate(kernels, 1):
            kernel.unpin()
            (pins / str(number)).rmdir()
        if pins.exists():
            pins.rmdir()
        for name in netns.names(prefix):
            netns.delete(name)


@pytest.fixture(params=["on", "off"])
def offloads(lab: Lab, request: pytest.FixtureRequest) -> Iterator[None]:
    """As the devices are made, and with none."""

    def switch(to: str) -> None:
        for namespace in (*map(lab.room, lab.world.ports), *map(lab.machine, (1, 2))):
            words = [word for name in OFFLOADS for word in (name, to)]
            netns.run_in(namespace, partial(subprocess.run, ["ethtool", "-K", "eth0", *words], check=True))

    if request.param == "off":
        switch("off")
    yield
    if request.param == "off":
        switch("on")


def channel(kind: socket.SocketKind, family: int) -> socket.socket:
    made = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
    made.settimeout(20)
    return made


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("source", "target"),
    [(A, B), (A, C), (A, D), (A, E)],
    ids=["switched-far", "routed-far", "switched-near", "routed-near"],
)
def test_tcp_arrives_byte_for_byte(lab: Lab, offloads: None, source: int, target: int, family: int) -> None:
    data = random.Random(SEED).randbytes(BYTES)
    with (
        netns.run_in(lab.room(target), partial(channel, socket.SOCK_STREAM, family)) as listener,
        netns.run_in(lab.room(source), partial(channel, socket.SOCK_STREAM, family)) as sender,
    ):
        listener.bind((lab.address(target, family), 0))
        listener.listen()
        sender.connect(listener.getsockname()[:2])
        receiver, _ = listener.accept()
        receiver.settimeout(20)

        def send() -> None:
            sender.sendall(data)
            sender.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        digest, length = hashlib.sha256(), 0
        with receiver:
            while got := receiver.recv(1 << 18):
                digest.update(got)
                length += len(got)
        thread.join()
    assert (length, digest.digest()) == (BYTES, hashlib.sha256(data).digest())


def options(family: int) -> tuple[str, ...]:
    return ("-6",) if family == 6 else ("-4",)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("target", [B, C, D, E])
def test_fragments_are_put_together(lab: Lab, target: int, family: int) -> None:
    netns.run_in(lab.room(A), partial(ping, lab.address(target, family), *options(family), "-s", "4000"))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("target", [B, C, D, E])
def test_the_mtu_is_what_it_says(lab: Lab, target: int, family: int) -> None:
    header = 28 if family == 4 else 48
    here = lab.room(A)
    try:
        # What the workload's own stack would refuse to send it sends now.
        netns.run_in(here, partial(subprocess.run, ["ip", "link", "set", "eth0", "mtu", "1500"], check=True))
        ip(f"{lab.prefix}m1", "link set p1 mtu 1500")
        whole = (*options(family), "-M", "do", "-s")
        netns.run_in(here, partial(ping, lab.address(target, family), *whole, str(lab.mtu - header)))
        with pytest.raises(subprocess.CalledProcessError):
            netns.run_in(
                here, partial(ping, lab.address(target, family), *whole, str(lab.mtu + 1 - header), "-W", "0.2")
            )
    finally:
        ip(f"{lab.prefix}m1", f"link set p1 mtu {lab.mtu}")
        netns.run_in(here, partial(subprocess.run, ["ip", "link", "set", "eth0", "mtu", str(lab.mtu)], check=True))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("target", "left"), [(B, 64), (C, 63), (D, 64), (E, 63)])
def test_a_router_takes_one_hop(lab: Lab, target: int, left: int, family: int) -> None:
    def answer() -> str:
        command = ["ping", *options(family), "-n", "-c", "1", "-W", "2", lab.address(target, family)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert f"ttl={left} " in netns.run_in(lab.room(A), answer)


@pytest.mark.parametrize("gateway", ["10.7.1.1", "10.7.2.1", "fd07:1::1", "fd07:2::1"])
def test_gateways_answer(lab: Lab, gateway: str) -> None:
    netns.run_in(lab.room(A), partial(ping, gateway))


@contextlib.contextmanager
def overheard(lab: Lab) -> Iterator[list[pk.Packet]]:
    """The datagrams that machines send to each other meanwhile. In the end, all of them: a marker comes behind."""
    found: list[pk.Packet] = []
    at = netns.run_in(netns.path(f"{lab.prefix}wire"), partial(packet_socket, "m1"))
    with at:
        yield found
        marker = b"the last"
        target = lab.world.machines[2].address
        with netns.run_in(lab.machine(1), partial(channel, socket.SOCK_DGRAM, target.version)) as last:
            last.sendto(marker, (str(target), 9))
        end = time.monotonic() + PATIENCE
        while True:
            ready, _, _ = select.select([at], [], [], max(0, end - time.monotonic()))
            assert ready, "the marker did not come"
            for frame in pending(at):
                packet = pk.parse(frame)
                if marker in frame:
                    return
                if packet.flow.protocol == pk.UDP and packet.flow.target_port == 4789:
                    found.append(packet)


def udp_to(lab: Lab, port: int, address: str, count: int, size: int = 10) -> None:
    """From the workload of a port, from so many source ports."""
    family = 6 if ":" in address else 4
    for _ in range(count):
        with netns.run_in(lab.room(port), partial(channel, socket.SOCK_DGRAM, family)) as from_:
            from_.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            from_.sendto(bytes(size), (address, 4000))


@pytest.mark.parametrize("family", [4, 6])
def test_flows_spread_and_fragments_stay_together(lab: Lab, family: int) -> None:
    with overheard(lab) as found:
        udp_to(lab, A, lab.address(B, family), 50)
    assert len(found) == 50
    assert len({packet.flow.source_port for packet in found}) > 40
    with overheard(lab) as found:
        udp_to(lab, A, lab.address(B, family), 1, 5000)
    assert len(found) == 4
    assert len({packet.flow.source_port for packet in found}) == 1


def test_who_has_an_address_is_answered_at_home(lab: Lab) -> None:
    here = lab.room(A)
    with overheard(lab) as found:
        for family in (4, 6):
            netns.run_in(
                here, partial(subprocess.run, ["ip", f"-{family}", "neigh", "flush", "dev", "eth0"], check=True)
            )
            for address in (lab.address(B, family), "10.7.1.1" if family == 4 else "fd07:1::1"):
                netns.run_in(here, partial(ping, address))
    # One echo request to B and one family: from machine 1 nothing else came.
    assert [packet.flow.protocol for packet in found] == [pk.UDP] * 2
    inner = [carried for packet in found if (carried := pk.decapsulate(packet)) is not None]
    assert [pk.parse(carried.frame).is_echo_request for carried in inner] == [True, True]


def test_a_broadcast_leaves_one_copy_for_each_machine(lab: Lab) -> None:
    def listener() -> socket.socket:
        made = channel(socket.SOCK_DGRAM, 4)
        made.bind(("10.7.1.255", 4000))
        return made

    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(netns.run_in(lab.room(port), listener)) for port in (B, D)]
        with overheard(lab) as found:
            udp_to(lab, A, "10.7.1.255", 1)
        assert [other.recv(100) for other in others] == [bytes(10)] * 2
    assert len(found) == 1
