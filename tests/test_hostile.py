"""Hostile packets through the real datapath: nothing gets where it may not, and every drop is counted with its reason.

The world, and what is sent, is in hostile.py; docs/hostile.md lists the rows. Machines, links and workloads are those
of test_namespaces.py. Everybody listens: all workloads, what the machines' own stacks get, and the wire. Of every frame

    meaning says exactly who hears it and what is counted; and that is what is heard and counted
    the row says what may become of it at all, whatever meaning says
    the canary in it is heard by its own network, and on the wire in VXLAN between the two machines alone

    NESTNET_SEED=7 NESTNET_FRAMES=1000000 .venv/bin/python -m pytest tests/test_hostile.py
"""

from __future__ import annotations

import os
import random
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path

import pytest
from frames import arp, group_mac, icmp, ip_frame, neighbour, solicited, tcp, udp
from hostile import (
    ANSWERED,
    CANARY,
    DELIVERED,
    GUARDED,
    NOBODY,
    ROWS,
    TAG,
    UNLISTED,
    WIRE_ROWS,
    Place,
    Row,
    Wire,
    stage,
)
from strategies import wire_family
from test_equality import counted, machine_of
from test_namespaces import IGNORE_OUTGOING, MACHINES, PREFIX, WORKLOADS, Bed, bed, ip, packet_socket, pending
from twins import SMALL, START

from nestnet.agent import netns
from nestnet.datapath.kernel import BPFFS, Kernel
from nestnet.datapath.reference import Outputs, Reference, ToWorkload
from nestnet.model import packet as pk
from nestnet.model.clock import nanoseconds
from nestnet.model.meaning import Outcome, State, deliver
from nestnet.model.packet import mapped
from nestnet.model.values import Interface, Port, Segment, World

__all__ = ["bed"]
pytestmark = pytest.mark.root
SEED = int(os.environ.get("NESTNET_SEED", "1"))
PINS = BPFFS / "nestnet" / f"{PREFIX}pins"
FRAMES = int(os.environ.get("NESTNET_FRAMES", "100000"))  # of all rows
SHARE = FRAMES // (len(ROWS) + len(WIRE_ROWS)) // 2  # of each row, over IPv4 and over IPv6
BATCH = 250  # frames between two looks: what queues hold
BUFFER = 1 << 26
SO_RCVBUFFORCE = 33
MACS: dict[int, bytes] = {}  # of the machines' NICs
FOREIGN = (pk.IPV4, pk.IPV6, pk.ARP, *pk.TAGS, 0x0004, 0x0001, *UNLISTED)  # what a machine's stack might take


@dataclass
class Shot:
    """A frame of a port, and what must become of it."""

    port: int
    frame: bytes
    outcome: Outcome
    hostile: bool

    @property
    def ends(self) -> set[str]:
        others = {DELIVERED for port, _ in self.outcome.deliveries if port != self.port}
        if self.outcome.deliveries and not others and not self.outcome.drops:
            return {ANSWERED}
        return others | {reason for _, reason in self.outcome.drops} or {NOBODY}


@dataclass
class Arrival:
    """A datagram for a machine, and what must become of it there."""

    machine: int
    datagram: bytes
    outputs: Outputs

    @property
    def ends(self) -> set[str]:
        return {reason for _, reason in self.outputs.drops} | {DELIVERED for _ in self.outputs.emitted}


@dataclass
class Field:
    """The bed, and listeners where nobody should hear anything."""

    bed: Bed
    world: World
    stacks: dict[int, list[socket.socket]]  # by machine
    wires: dict[int, socket.socket]  # what each machine sends
    lost: dict[int, int]  # frames that went up a stack and that nobody took there, by machine
    intruder: socket.socket  # sends into the wire
    state: State = field(default_factory=State)
    references: dict[int, Reference] = field(default_factory=dict)
    now: float = float(START)
    number: int = 0

    @property
    def ether_type(self) -> bytes:
        """Of what machines send to each other."""
        return b"\x08\x00" if wire_family(self.world) == 4 else b"\x86\xdd"

    def forget(self) -> None:
        """Time has passed, and nothing is remembered."""
        self.state = State()
        self.references = {machine: Reference(tables) for machine, tables in self.bed.have.items()}
        self.now += 1.003
        for kernel in self.bed.kernels.values():
            kernel.forget()
            kernel.set_clock(nanoseconds(self.now))
        for channel in self.wires.values():
            pending(channel)

    def aim(self, port: int, frame: bytes, hostile: bool = True) -> Shot:
        outcome = deliver(self.world, self.state, port, frame, self.now)
        self.state = outcome.state
        return Shot(port, frame, outcome, hostile)

    def fire(self, shots: list[Shot]) -> None:
        """All of them, and all that comes of them."""
        before = self.bed.drops()
        for shot in shots:
            machine = machine_of(self.world, shot.port)
            self.bed.sockets[machine, self.bed.numbers[shot.port]].send(shot.frame)
        heard = Counter(each for m in range(1, MACHINES + 1) for each in self.bed.heard_before_marker(m))
        drops = self.bed.drops() - before
        expected = Counter(each for shot in shots for each in shot.outcome.deliveries)
        assert heard == expected, self.differ(shots, heard, expected)
        told = sum((counted(self.world, s.port, s.frame, s.outcome) for s in shots), Counter())
        assert drops == told, (drops - told, told - drops)
        self.add_up(shots, sum(heard.values()), sum(drops.values()))
        self.isolated(shots, heard)
        self.on_the_wire(shots)
        assert self.in_stacks() == []

    def differ(self, shots: list[Shot], heard: Counter[tuple[int, bytes]], expected: Counter[tuple[int, bytes]]) -> str:
        lines = []
        for what, some in (("leaked", heard - expected), ("missing", expected - heard)):
            for port, frame in list(some)[:3]:
                at = frame.find(TAG)
                sent = [s for s in shots if at >= 0 and frame[at : at + CANARY] in s.frame]
                lines.append(f"{what} at port {port}: {frame.hex()}")
                lines += [f"   sent by port {s.port}: {s.frame.hex()} {s.outcome.drops}" for s in sent]
        return "\n".join([f"seed {SEED}", *lines])

    def receive(self, arrivals: list[Arrival]) -> None:
        """All of these from the wire, sent by who knows whom, and all that comes of them."""
        before = self.bed.drops()
        for arrival in arrivals:
            head = MACS[arrival.machine] + pk.mac_bytes(0x02FFFFFFFF00)
            self.intruder.send(head + self.ether_type + arrival.datagram)
        heard = Counter(each for m in range(1, MACHINES + 1) for each in self.bed.heard_before_marker(m))
        drops = self.bed.drops() - before
        ports = {m: slots.ids("port") for m, slots in self.bed.slots.items()}
        emitted = [(a, out) for a in arrivals for out in a.outputs.emitted]
        assert all(isinstance(out, ToWorkload) for _, out in emitted), "what came from the wire goes back to it"
        expected = Counter((ports[a.machine][out.port], out.frame) for a, out in emitted)
        assert heard == expected, (heard - expected, expected - heard)
        told = Counter(reason for arrival in arrivals for _, reason in arrival.outputs.drops)
        assert drops == told, (drops - told, told - drops)
        assert [line for line in self.in_stacks() if "eth0" not in line] == []

    def add_up(self, shots: list[Shot], heard: int, drops: int) -> None:
        """Frames sent = delivered + answered + dropped; of one for all, each copy. What routers tell comes on top."""
        sent = 0
        for shot in shots:
            port = self.world.ports[shot.port]
            at_once = shot.outcome.drops[:1] and shot.outcome.drops[0][0] == port.id
            if pk.parse(shot.frame).is_group and not at_once:
                # Copies that no carrier takes have nobody to count them: their machine does not hear of them.
                unseen = len(shot.outcome.drops) - sum(counted(self.world, port.id, shot.frame, shot.outcome).values())
                is_answered = any(q == port.id for q, _ in shot.outcome.deliveries)
                sent += 1 if is_answered else len(self.world.ports_of(port.segment)) - 1 - unseen
            else:
                sent += 1
                sent += bool(at_once and shot.outcome.deliveries)
        assert heard + drops == sent

    def isolated(self, shots: list[Shot], heard: Counter[tuple[int, bytes]]) -> None:
        """I1, without meaning: a canary is heard in the network it comes from, and nowhere else."""
        senders = {shot.frame[at : at + CANARY]: shot for shot in shots if (at := shot.frame.find(TAG)) >= 0}
        for port, frame in heard:
            at = frame.find(TAG)
            if 0 <= at <= len(frame) - CANARY:  # else it was cut
                shot = senders[frame[at : at + CANARY]]
                assert self.world.ports[shot.port].network == self.world.ports[port].network, (shot, port)

    def on_the_wire(self, shots: list[Shot]) -> None:
        """What machines send to each other: VXLAN, once for each machine that hears of a frame, with its own label."""
        expected: Counter[tuple[int, int, int, bytes]] = Counter()
        for shot in shots:
            here = machine_of(self.world, shot.port)
            copies = set()
            for port, frame in shot.outcome.deliveries:
                there = machine_of(self.world, port)
                if there != here:
                    segment = self.world.ports[port].segment
                    copies.add((here, there, self.world.segments[segment].vni, frame))
            expected.update(copies)
        found: Counter[tuple[int, int, int, bytes]] = Counter()
        for machine, channel in self.wires.items():
            for frame in pending(channel):
                outer = pk.parse(frame)
                carried = pk.decapsulate(outer) if outer.is_carriage else None
                if carried is None:
                    assert TAG not in frame, (machine, frame.hex())
                elif TAG in carried.frame:
                    from_, to = (int(a[-1]) for a in (outer.flow.source, outer.flow.target))
                    assert from_ == machine
                    found[from_, to, carried.vni, carried.frame] += 1
        # Of a frame for all, a machine may get a copy that none of its ports may have: then it is dropped there.
        surplus = {each for each in found - expected if not pk.parse(each[3]).is_group}
        tagged = Counter({each: n for each, n in expected.items() if TAG in each[3]})
        assert not surplus, surplus
        assert not tagged - found

    def in_stacks(self) -> list[str]:
        """What the machines' own stacks got of what workloads sent."""
        found = []
        for machine, channels in self.stacks.items():
            for channel in channels:
                while True:
                    try:
                        frame, (device, *_) = channel.recvfrom(65536)
                    except BlockingIOError:
                        break
                    if device.startswith("p") or TAG in frame:
                        found.append(f"machine {machine}, {device}: {frame.hex()}")
            lost = unclaimed(machine)
            if lost != self.lost[machine]:
                found.append(f"machine {machine}: {lost - self.lost[machine]} frames that nobody wanted")
        return found


def unclaimed(machine: int) -> int:
    """Frames that came past our programs on links of workloads, up to where nobody took them."""
    lines = netns.run_in(netns.path(f"{PREFIX}m{machine}"), Path("/proc/thread-self/net/dev").read_text)
    # Bytes, packets, errors, drops.
    return sum(int(drops) for drops in re.findall(r"^\s*p\d+:(?:\s*\d+){3}\s+(\d+)", lines, re.MULTILINE))


def mac_of(device: str) -> bytes:
    """In the calling thread's namespace."""
    with packet_socket(device) as channel:
        found: bytes = channel.getsockname()[4]
    return found


def stack_socket(ether_type: int) -> socket.socket:
    """Hears what is handed to the stack, behind our programs. A socket for all EtherTypes hears what is before them."""
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(ether_type))
    found.setsockopt(263, IGNORE_OUTGOING, 1)
    return found


@pytest.fixture(scope="module", params=[4, 6], ids=["over-ipv4", "over-ipv6"])
def field_(bed: Bed, request: pytest.FixtureRequest) -> Iterator[Field]:
    bed.become(stage(request.param))
    stacks = {}
    wires = {}
    for machine in range(1, MACHINES + 1):
        name = netns.path(f"{PREFIX}m{machine}")
        stacks[machine] = [netns.run_in(name, partial(stack_socket, ether_type)) for ether_type in FOREIGN]
        wires[machine] = netns.run_in(netns.path(f"{PREFIX}wire"), partial(packet_socket, f"m{machine}"))
        MACS[machine] = netns.run_in(name, partial(mac_of, "eth0"))
    for channel in (*bed.sockets.values(), *wires.values()):
        channel.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    intruder = netns.run_in(netns.path(f"{PREFIX}wire"), partial(packet_socket, "wire"))
    yield Field(bed, bed.world, stacks, wires, {m: unclaimed(m) for m in stacks}, intruder)
    for channel in (intruder, *wires.values(), *(each for some in stacks.values() for each in some)):
        channel.close()


def shots(field: Field, row: Row, rng: random.Random, count: int, ends: Counter[str]) -> Iterator[Shot]:
    """Frames of a row, from all ports in turn, and among them others that are in order."""
    ports = list(stage().ports.values())
    for number in range(count):
        field.number += 1
        port = ports[number % len(ports)]
        place = Place(field.world, port, rng, field.number)
        if number % 8 == 7:
            shot = field.aim(port.id, place.legal(), hostile=False)
            assert shot.ends == {DELIVERED}, shot
        else:
            shot = field.aim(port.id, row.make(place))
            may = (row.guarded if port.network == GUARDED else row.ends) | row.rare
            assert shot.ends <= may, (shot.ends - may, shot)
            ends.update(shot.ends)
        yield shot


@pytest.mark.parametrize("name", ROWS)
def test_a_row(field_: Field, name: str) -> None:
    rng, row, left = random.Random(f"{SEED} {name}"), ROWS[name], SHARE
    ends: Counter[str] = Counter()
    while left > 0:
        field_.forget()
        field_.fire(list(shots(field_, row, rng, min(BATCH, left), ends)))
        left -= BATCH
    print(f"seed {SEED}, {name}: {dict(ends)}")
    assert row.ends | row.guarded <= set(ends), "an end that none of its frames came to"


def arrivals(field: Field, row: Row, rng: random.Random, count: int, ends: Counter[str]) -> Iterator[Arrival]:
    """Datagrams of a row, from all machines to all others in turn, and among them others that are in order."""
    crossings = [
        (port, machine_of(field.world, port.id))
        for port in stage().ports.values()
        if any(
            machine_of(field.world, other.id) != machine_of(field.world, port.id)
            for other in field.world.ports_in(port.network)
        )
    ]
    made = 0
    while made < count:
        field.number += 1
        port, sender = rng.choice(crossings)
        outcome = deliver(field.world, State(), port.id, Place(field.world, port, rng, field.number).legal(), field.now)
        for target, frame in outcome.deliveries:
            machine = machine_of(field.world, target)
            if machine != sender:
                made += 1
                vni = field.world.segments[field.world.ports[target].segment].vni
                wire = Wire(field.world, machine, sender, rng, field.number, frame, vni)
                hostile = made % 8 != 7
                datagram = row.make(wire) if hostile else wire.datagram()
                arrival = Arrival(machine, datagram, field.references[machine].underlay(datagram, field.now))
                if hostile:
                    ends.update(arrival.ends)
                else:
                    assert arrival.ends == {DELIVERED}, arrival
                yield arrival


@pytest.mark.parametrize("name", WIRE_ROWS)
def test_a_row_from_the_wire(field_: Field, name: str) -> None:
    rng, row, left = random.Random(f"{SEED} {name}"), WIRE_ROWS[name], SHARE
    ends: Counter[str] = Counter()
    while left > 0:
        field_.forget()
        field_.receive(list(arrivals(field_, row, rng, min(BATCH, left), ends)))
        left -= BATCH
    print(f"seed {SEED}, {name}: {dict(ends)}")
    if name != "fuzzed":
        assert set(ends) == row.ends


# ---- what only the kernel can say of a packet: tags that it took off, segments that it has not cut yet


def a_mate(field: Field, port: int) -> Shot:
    """A frame in order, from a port to one on another machine."""
    rng = random.Random(SEED)
    while True:
        field.number += 1
        shot = field.aim(port, Place(field.world, field.world.ports[port], rng, field.number).legal())
        here = machine_of(field.world, port)
        if any(machine_of(field.world, to) != here for to, _ in shot.outcome.deliveries):
            return shot


def test_a_tag_on_a_flow_that_is_known(field_: Field) -> None:
    """A8. A veth takes the first tag off and hands it over beside the bytes: they are then those of a known flow, with
    one more tag in them or none."""
    field_.forget()
    frame, _, _ = long_frame(field_, 1, 2, 4, pk.UDP, 100)
    known = field_.aim(1, frame)
    assert known.ends == {DELIVERED}
    field_.fire([known])
    assert len(field_.bed.kernels[1].flows()) > 0
    out = field_.bed.sockets[1, field_.bed.numbers[1]]
    before = field_.bed.drops()
    tags = (b"\x81\x00\x00\x11", b"\x81\x00\x00\x00", b"\x88\xa8\x00\x11", b"\x88\xa8\x00\x11\x81\x00\x00\x00")
    for tag in tags:
        out.send(known.frame[:12] + tag + known.frame[12:])
    assert field_.bed.heard_before_marker(1) == []
    assert field_.bed.drops() - before == Counter({"tagged": len(tags)})
    assert field_.in_stacks() == []


def test_a_tagged_datagram_is_for_another_wire(field_: Field) -> None:
    """B1. With the address of a member, on a VLAN of the NIC: whoever is there is no machine of this domain. The
    machine may have it; no workload does, nor is it counted as if it had been for us."""
    field_.forget()
    shot = a_mate(field_, 1)
    ((target, frame),) = shot.outcome.deliveries
    machine = machine_of(field_.world, target)
    vni = field_.world.segments[field_.world.ports[target].segment].vni
    datagram = Wire(field_.world, machine, 1, random.Random(SEED), field_.number, frame, vni).datagram()
    head = MACS[machine] + pk.mac_bytes(0x02FFFFFFFF00)
    before = field_.bed.drops()
    for tag in (b"\x81\x00\x00\x11", b"\x81\x00\x00\x00", b"\x88\xa8\x00\x11"):
        field_.intruder.send(head + tag + field_.ether_type + datagram)
    assert field_.bed.heard_before_marker(1) == []
    assert field_.bed.drops() - before == Counter()
    field_.intruder.send(head + field_.ether_type + datagram)
    assert field_.bed.heard_before_marker(1) == [(target, frame)]
    field_.in_stacks()


# ---- tags where some may be: in a trunk and in a transparent segment

TRUNK, WEB, DB, FAR_WEB, FAR_DB, WIRE, FAR_WIRE = range(31, 38)  # ports
Q, AD = b"\x81\0", b"\x88\xa8"


def with_tags(world: World) -> World:
    """The stage, and in network 1: a trunk on machine 1 with two ports behind tags 10 and 20, one more port in each of
    their segments on machine 2; and a transparent segment with a port on each, and the router."""
    cidrs = {n: (ip_network(f"10.0.{n}.0/24"), ip_network(f"fd00:{n}::/64")) for n in (2, 3, 4)}
    segments = [Segment(10 + n, 1, 110 + n, cidrs[n], transparent=n == 4) for n in cidrs]

    def port(id: int, segment: int, machine: int, trunk: int = 0, tag: int = 0) -> Port:
        here = (ip_network("10.0.0.0/24"), ip_network("fd00::/64")) if segment == 10 else cidrs[segment - 10]
        addresses = tuple(cidr[id] for cidr in here)
        return Port(id, 1, segment, machine, 0x020000000100 + id, addresses, trunk=trunk, tag=tag)

    router = world.routers[1]
    faces = [Interface(s.id, tuple(c[1] for c in s.cidrs)) for s in segments]
    return world.with_(
        *segments, replace(router, interfaces=(*router.interfaces, *faces)),
        port(TRUNK, 10, 1), port(WEB, 12, 1, TRUNK, 10), port(DB, 13, 1, TRUNK, 20), port(FAR_WEB, 12, 2),
        port(FAR_DB, 13, 2), port(WIRE, 14, 1), port(FAR_WIRE, 14, 2),
    )  # fmt: skip


def between(world: World, source: int, target: int, mac: int | None = None, **wrong: int) -> bytes:
    """A frame with a canary from one port to another, over IPv4. `wrong`: the MAC or address of which port it has."""
    b = world.ports[target]
    by, at = (world.ports[wrong.get(what, source)] for what in ("mac_of", "address_of"))
    ends = mapped(at.addresses[0]), mapped(b.addresses[0])
    return ip_frame(b.mac if mac is None else mac, by.mac, *ends, pk.UDP, udp(*ends, 1000, 53, TAG + bytes(4)))


def behind(frame: bytes, *tags: bytes) -> bytes:
    return pk.tagged(frame, b"".join(tags))


def hops(world: World) -> list[tuple[int, bytes, str]]:
    """(port that sends, frame, what must become of it): rows A8 to A11 wherever a tag may be right."""
    web, db = between(world, WEB, FAR_WEB), between(world, DB, FAR_DB)
    wire, access = between(world, WIRE, FAR_WIRE), between(world, FAR_WEB, WEB)
    router = world.routers[1].mac
    far, own = world.ports[FAR_WIRE], world.ports[WIRE]
    here, there, other = mapped(own.addresses[0]), mapped(far.addresses[0]), mapped(IPv4Address("10.0.4.9"))
    here6, there6 = mapped(own.addresses[1]), mapped(far.addresses[1])
    t10, t20 = Q + b"\0\x0a", Q + b"\0\x14"
    found = [
        (TRUNK, behind(web, t10), DELIVERED),
        (TRUNK, behind(web, Q + b"\xe0\x0a"), DELIVERED),  # whatever priority
        (TRUNK, behind(db, t20), DELIVERED),
        # VLAN hopping: a second tag, another's tag, tags that nobody has
        (TRUNK, behind(db, t10, t20), "too_many_tags"),
        (TRUNK, behind(web, t10, t10), "too_many_tags"),
        (TRUNK, behind(web, t10, Q + b"\0\0"), "too_many_tags"),
        (TRUNK, behind(web, AD + b"\0\x0a", t10), "unknown_vlan"),
        (TRUNK, behind(web, t20), "source_mac"),
        (TRUNK, behind(between(world, WEB, FAR_DB, mac_of=DB), t20), "source_address"),
        (TRUNK, web, "source_mac"),
        (TRUNK, behind(web, Q + b"\0\x1e"), "unknown_vlan"),
        (TRUNK, behind(web, Q + b"\x0f\xff"), "unknown_vlan"),
        (TRUNK, behind(web, AD + b"\0\x0a"), "unknown_vlan"),
        (TRUNK, behind(between(world, TRUNK, 2), Q + b"\xe0\0"), "unknown_vlan"),  # a priority, and no VLAN
        # an access port has no tags
        *((FAR_WEB, behind(access, tag), "tagged") for tag in (t10, Q + b"\0\0", AD + b"\0\x0a", t10 + t20)),
        # in a transparent segment any tags ride, as long as what is behind them is in order
        *((WIRE, behind(wire, *tags), DELIVERED) for tags in ([t10], [AD + b"\0\1", t10], [Q + b"\0\0"], [t10, t20])),
        (WIRE, wire, DELIVERED),
        (WIRE, behind(wire, t10, t10, t10), "too_many_tags"),
        (WIRE, behind(between(world, WIRE, FAR_WIRE, mac=router), t10), "tagged"),
    ]
    for tags in ([t10], [Q + b"\0\0"], [AD + b"\0\1", t20]):
        found += [
            (WIRE, behind(between(world, WIRE, FAR_WIRE, mac_of=FAR_WIRE), *tags), "source_mac"),
            (WIRE, behind(between(world, WIRE, FAR_WIRE, address_of=FAR_WIRE), *tags), "source_address"),
            (WIRE, behind(arp(1, own.mac, here, 0, there, pk.BROADCAST), *tags), DELIVERED),
            (WIRE, behind(arp(2, own.mac, here, far.mac, there, far.mac), *tags), DELIVERED),
            (WIRE, behind(arp(1, own.mac, other, 0, there, pk.BROADCAST), *tags), "arp_spoof"),
            (WIRE, behind(arp(2, own.mac, there, 0, there, pk.BROADCAST), *tags), "arp_spoof"),
            (WIRE, behind(_neighbour(own.mac, 135, here6, there6, own.mac), *tags), DELIVERED),
            (WIRE, behind(_neighbour(own.mac, 136, here6, there6, own.mac), *tags), "nd_spoof"),
            (WIRE, behind(_neighbour(own.mac, 135, here6, there6, far.mac), *tags), "nd_spoof"),
            (WIRE, behind(_icmp(own.mac, far.mac, here6, there6, 134), *tags), "router_advertisement"),
            (WIRE, behind(_udp(own.mac, far.mac, here, there, 67, 68), *tags), "dhcp_server"),
        ]
    # LLC, other EtherTypes, what bridges keep to themselves
    for port, frame, tag in ((TRUNK, web, t10), (WIRE, wire, t10), (WIRE, wire, AD + b"\0\1" + t10)):
        for kind in (b"\0\x20\xaa\xaa\x03\0\0\0", b"\x88\x47", b"\x88\xe7", b"\x80\x35", b"\x88\xcc"):
            found.append((port, behind(frame[:12] + kind + frame[14:], tag), "ether_type"))
        for last in (0, 1, 15):
            control = b"\x01\x80\xc2\0\0" + bytes([last]) + frame[6:]
            found.append((port, behind(control, tag), "control_frame"))
    return found


def _neighbour(mac: int, type: int, source: bytes, about: bytes, said: int) -> bytes:
    target = solicited(about) if type == 135 else mapped(IPv6Address("ff02::1"))
    body = neighbour(type, source, target, about, (1 if type == 135 else 2, said))
    return ip_frame(group_mac(target), mac, source, target, pk.ICMPV6, body, 255)


def _icmp(mac: int, to: int, source: bytes, target: bytes, type: int) -> bytes:
    return ip_frame(to, mac, source, target, pk.ICMPV6, icmp(source, target, type, payload=bytes(16)), 255)


def _udp(mac: int, to: int, source: bytes, target: bytes, here: int, there: int) -> bytes:
    return ip_frame(to, mac, source, target, pk.UDP, udp(source, target, here, there, TAG + bytes(4)))


def test_tags_end_where_they_should(field_: Field) -> None:
    """A8 to A11, behind tags; twice, so that the second meets the flows of the first."""
    bed, before = field_.bed, field_.bed.world
    world = with_tags(stage(wire_family(before)))
    try:
        bed.become(world)
        state = State()
        for kernel in bed.kernels.values():
            kernel.forget()
            kernel.set_clock(nanoseconds(field_.now))
        composed: list[int] = []
        for _ in range(2):
            for port, frame, end in hops(world):
                outcome = deliver(world, state, port, frame, field_.now)
                state = outcome.state
                shot = Shot(port, frame, outcome, True)
                assert shot.ends == {end}, (frame.hex(), shot.ends, end)
                heard, drops = bed.send(port, frame)
                deliveries = [(world.ports[id].trunk or id, got) for id, got in outcome.deliveries]
                assert (sorted(heard), drops) == (sorted(deliveries), Counter({end: 1} if end != DELIVERED else {})), (
                    end
                )
            composed.append(sum(kernel.composed()["flows"] for kernel in bed.kernels.values()))
        assert composed[0] == composed[1], "what is known is not composed again"
        assert field_.in_stacks() == []
    finally:
        bed.become(stage(wire_family(before)))
        for channel in field_.wires.values():
            pending(channel)


def test_tags_from_the_wire_are_for_transparent_segments(field_: Field) -> None:
    """B7. From a member, in its own segment and in others."""
    bed, before = field_.bed, field_.bed.world
    world = with_tags(stage(wire_family(before)))
    t10, t20 = Q + b"\0\x0a", Q + b"\0\x14"
    web, wire = between(world, WEB, FAR_WEB), between(world, WIRE, FAR_WIRE)
    own, far = world.ports[WIRE], world.ports[FAR_WIRE]
    here, there = mapped(own.addresses[0]), mapped(far.addresses[0])
    spoofed = arp(2, own.mac, there, 0, there, pk.BROADCAST)
    found = [
        (112, web, DELIVERED), (112, behind(web, t10), "tagged"), (112, behind(web, Q + b"\0\0"), "tagged"),
        (112, behind(web, AD + b"\0\1", t10), "tagged"), (112, behind(wire, t10), "tagged"),
        (114, wire, DELIVERED), (114, behind(wire, t10), DELIVERED), (114, behind(wire, AD + b"\0\1", t20), DELIVERED),
        (114, behind(wire, t10, t10, t10), "too_many_tags"), (114, behind(web, t10), "unknown_source"),
        (114, behind(wire, AD + b"\0\1", b"\x81\xca\0\x14"), "ether_type"),
        (114, behind(spoofed, t10), "arp_spoof"), (114, spoofed, "ether_type"),
        (114, behind(arp(1, own.mac, here, 0, there, pk.BROADCAST), t10), DELIVERED),
        (114, behind(arp(1, own.mac, here, 0, there, pk.BROADCAST)[:30], t10), "malformed"),
        (114, behind(wire, t10)[:20], "malformed"), (114, behind(wire, t10)[:16], "tagged"),
        (114, behind(wire, AD + b"\0\1", t10)[:30], "malformed"),
        (114, behind(between(world, WIRE, FAR_WIRE, address_of=FAR_WIRE), t10), "source_address"),
    ]  # fmt: skip
    try:
        bed.become(world)
        field_.forget()
        for vni, frame, end in found * 2:
            ends = (world.machines[m].address for m in (1, 2))
            datagram = pk.encapsulate(frame, vni, *ends, 50000)[pk.ETHERNET :]
            arrival = Arrival(2, datagram, field_.references[2].underlay(datagram, field_.now))
            assert arrival.ends == {end}, (frame.hex(), arrival.ends, end)
            field_.receive([arrival])
    finally:
        bed.become(stage(wire_family(before)))
        for channel in field_.wires.values():
            pending(channel)


VNET_HDR = 15  # <linux/if_packet.h>
NEEDS_SUM = 1  # <linux/virtio_net.h>
GSO = {4: 1, 6: 4, "uso": 5}  # TCP over IPv4 and IPv6; UDP


def offloaded(frame: bytes, kind: int, size: int, start: int, offset: int) -> bytes:
    """A frame with the header that says what is left to do: its checksum from `start`, segments of `size` bytes."""
    headers = start + (20 if offset == 16 else 8)
    return struct.pack("<BBHHHH", NEEDS_SUM, kind, headers, size, start, offset) + frame


def long_frame(field: Field, port: int, target: int, family: int, protocol: int, size: int) -> tuple[bytes, int, int]:
    """A packet of so many bytes of IP, from a port to one in its segment; where its checksum is."""
    field.number += 1
    sender, receiver = field.world.ports[port], field.world.ports[target]
    a, b = (mapped(p.address(family) or p.addresses[0]) for p in (sender, receiver))
    header = 20 if family == 4 else 40
    data = (TAG + field.number.to_bytes(4, "big")).ljust(size - header - (20 if protocol == pk.TCP else 8), b"x")
    body = tcp(a, b, 1000, 80, pk.ACK, data) if protocol == pk.TCP else udp(a, b, 1000, 80, data)
    return ip_frame(receiver.mac, sender.mac, a, b, protocol, body), 14 + header, 16 if protocol == pk.TCP else 6


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("target", [2, 3], ids=["another machine", "this machine"])
def test_what_is_longer_than_a_segment(field_: Field, target: int, family: int) -> None:
    """A26. Of a large packet with segments that fit, all bytes arrive; one whose segments do not fit, or that has none,
    is counted, and its sender told. None goes anywhere else, whatever its header says about itself."""
    port, machine, mtu = 1, 1, field_.world.networks[1].mtu
    header = 20 if family == 4 else 40
    number = field_.bed.numbers[port]
    room = f"{PREFIX}w{number}"
    out = netns.run_in(netns.path(room), partial(packet_socket, f"m{machine}"))
    ip(room, f"link set m{machine} mtu 65535")
    ip(f"{PREFIX}m{machine}", f"link set p{number} mtu 65535")
    out.setsockopt(263, VNET_HDR, 1)

    def send(protocol: int, size: int, kind: int, segment: int) -> tuple[list[tuple[int, bytes]], Counter[str]]:
        frame, start, offset = long_frame(field_, port, target, family, protocol, size)
        before = field_.bed.drops()
        out.send(offloaded(frame, kind, segment, start, offset))
        heard = field_.bed.heard_before_marker(machine)
        assert field_.in_stacks() == []
        return heard, field_.bed.drops() - before

    try:
        field_.forget()
        tcp_gso, fits = GSO[family], mtu - header - 20
        for size in (fits * 3 + header + 20, 30_000, 60_000):
            heard, drops = send(pk.TCP, size, tcp_gso, fits)
            assert not drops
            assert {to for to, _ in heard} == {target}
            # It comes whole, or in segments: each byte once.
            assert sum(pk.parse(frame).size - header - 20 for _, frame in heard) == size - header - 20
        for size, kind, segment in (
            (30_000, tcp_gso, fits + 1),
            (mtu + 1, 0, 0),
            (9000, 0, 0),
            (30_000, tcp_gso, 8000),
        ):
            field_.forget()
            heard, drops = send(pk.TCP, size, kind, segment)
            assert drops == Counter({"too_big": 1}), (size, kind, segment, heard)
            ((to, told),) = heard
            packet = pk.parse(told)
            assert to == port
            assert packet.is_icmp_error
            assert int.from_bytes(told[packet.offset + 4 : packet.offset + 8], "big") == mtu
        # What no host sends: segments of one byte, other protocols' segments, headers that are elsewhere.
        for protocol, kind, segment in ((pk.TCP, tcp_gso, 1), (pk.UDP, GSO["uso"], 100), (pk.UDP, GSO["uso"], 2000)):
            heard, drops = send(protocol, 4000, kind, segment)
            assert {to for to, _ in heard} <= {target, port}
            assert set(drops) <= {"too_big"}
    finally:
        out.close()
        ip(f"{PREFIX}m{machine}", f"link set p{number} mtu 3000")
        ip(room, f"link set m{machine} mtu 3000")


def test_what_follows_a_packet_is_no_way_around_its_size(field_: Field) -> None:
    """A26. A small packet in a large frame would be too large for the wire, and nobody would have counted it."""
    for size in (field_.world.networks[1].mtu + 1, 1500, 2900):
        field_.forget()
        shot = a_mate(field_, 1)
        long = field_.aim(1, shot.frame + bytes(size - len(shot.frame) + 14))
        assert {reason for _, reason in long.outcome.drops} == {"too_big"}
        field_.forget()
        field_.fire([field_.aim(1, long.frame)])


def test_a_link_without_a_port_is_a_wall(field_: Field) -> None:
    """A28. The program is there, and the tables do not know it: nothing passes, whoever the sender says it is."""
    field_.forget()
    free = next(n for n in range(1, WORKLOADS) if n not in field_.bed.numbers.values())
    before = field_.bed.drops()
    sent = 0
    for port in stage().ports.values():
        machine = machine_of(field_.world, port.id)
        place = Place(field_.world, port, random.Random(SEED), sent)
        for make in (Place.legal, *(row.make for row in ROWS.values())):
            field_.bed.sockets[machine, free].send(make(place))
            sent += 1
    assert [each for m in range(1, MACHINES + 1) for each in field_.bed.heard_before_marker(m)] == []
    assert field_.bed.drops() - before == Counter({"not_attached": sent})
    assert field_.in_stacks() == []


def onslaught(field: Field, share: int) -> None:
    """Some of everything, for who wants to know whether it is noticed: AssertionError at the first that goes wrong."""
    rng = random.Random(SEED)
    for row in ROWS.values():
        field.forget()
        field.fire(list(shots(field, row, rng, share, Counter())))
    for row in WIRE_ROWS.values():
        field.forget()
        field.receive(list(arrivals(field, row, rng, share, Counter())))
    test_a_tag_on_a_flow_that_is_known(field)
    test_a_tagged_datagram_is_for_another_wire(field)
    test_tags_end_where_they_should(field)
    test_tags_from_the_wire_are_for_transparent_segments(field)
    test_what_is_longer_than_a_segment(field, 2, 4)
    test_a_link_without_a_port_is_a_wall(field)


def change(field: Field, object: Path) -> None:
    """All machines run these programs from now on, and nobody has heard anything."""
    for machine, kernel in field.bed.kernels.items():
        kernel.close()
        field.bed.kernels[machine] = Kernel.open(PINS / str(machine), SMALL, driven=True, object=object)
    stacks = (each for some in field.stacks.values() for each in some)
    for channel in (*field.bed.sockets.values(), *field.wires.values(), *stacks):
        pending(channel)
    for machine in field.stacks:
        field.lost[machine] = unclaimed(machine)
