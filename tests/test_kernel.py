"""reference = kernel: the same tables, the same frames, byte for byte, through BPF_PROG_TEST_RUN.

    conversation -> machine's tables -> Reference.workload    Kernel.run(workload)     frames, drops: equal
                                             | datagram               |
                                        Reference.underlay    Kernel.run(underlay)     frames, drops: equal

Every frame goes through twice, so that the second time it meets the flow that the first left behind. In
between the world changes, and what the kernel then holds must be what a machine new to it would have been given:
incremental = from scratch. To look for longer, or again:

    NESTNET_EXAMPLES=20000 pytest tests/test_kernel.py [--hypothesis-seed=SEED]
"""

from __future__ import annotations

import ctypes
import os
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from strategies import Step, conversations
from test_equality import machine_of, rounds

from nestnet.agent import netns
from nestnet.compile.compiler import compile
from nestnet.compile.diff import diff
from nestnet.compile.slots import Slots, assign
from nestnet.compile.tables import Tables, empty
from nestnet.datapath.kernel import BPFFS, Capacity, Kernel, Record
from nestnet.datapath.reference import Outputs, Reference, ToMachine, ToWorkload
from nestnet.model.reasons import NAMES
from nestnet.model.values import World

pytestmark = pytest.mark.root
EXAMPLES = int(os.environ.get("NESTNET_EXAMPLES", "150"))
NAMESPACE = f"nnt-kernel-{os.getpid()}"
PAIRS = 32  # veth pairs: as many workloads as a drawn world ever has
MACHINES = 4
SMALL = Capacity(
    networks=64, segments=128, routers=64, ports=256, hosts=256, machines=16, addresses=4096, routes=1024,
    members=4096, prefixes=4096, rules=16384, flows=4096, connections=4096, fragments=1024,
)  # fmt: skip
ETHERNET = bytes(12) + b"\x08\x00"

equality = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class Twins:
    """One machine twice: its tables in the kernel and in the reference."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.have: Tables = empty()
        self.slots = Slots()
        self.reference = Reference(self.have)

    def reset(self) -> None:
        self.kernel.forget()
        self.reference = Reference(self.have)

    def become(self, world: World, machine: int, devices: list[int]) -> None:
        self.slots = assign(self.slots, world)
        attachments = {port: devices[1 + port] for port in world.ports}
        want = compile(world, machine, attachments, devices[0], self.slots)
        self.kernel.apply(diff(self.have, want))
        self.have = want
        self.reference.load(want)

    def check_tables(self) -> None:
        held = self.kernel.read()
        for name, rows in self.have.items():
            assert np.array_equal(held[name], rows), name

    def workload(self, ifindex: int, frame: bytes) -> Outputs:
        return self.same(
            self.reference.workload(ifindex, frame, 0), self.kernel.run(frame, ifindex, "workload").emitted
        )

    def underlay(self, datagram: bytes, device: int) -> Outputs:
        ran = self.kernel.run(ETHERNET + datagram, device, "underlay")
        return self.same(self.reference.underlay(datagram, 0), ran.emitted)

    def same(self, told: Outputs, emitted: tuple[Record, ...]) -> Outputs:
        """The reference's outputs, after checking that the kernel's are the same."""
        sent = [event for event in map(seen, emitted) if event is not None]
        expected = [
            *(
                ("workload", out.port, out.ifindex, out.frame)
                if isinstance(out, ToWorkload)
                else ("wire", out.datagram)
                for out in told.emitted
            ),
            *(("drop", port, reason) for port, reason in told.drops),
        ]
        got, meant = sorted(map(text, sent)), sorted(map(text, expected))
        note(f"   kernel    {got}")
        note(f"   reference {meant}")
        assert got == meant
        return told


def seen(record: Record) -> tuple[object, ...] | None:
    """What the kernel would have done, in the words of the reference. The machine is in the datagram's address."""
    match record.kind:
        case "workload":
            return "workload", record.slot, record.what, record.frame
        case "wire":
            return "wire", record.frame[14:]
        case "drop":
            return "drop", record.slot, NAMES[record.what]
        case _:
            return None


def text(event: tuple[object, ...]) -> str:
    """One event to compare and to read."""
    return " ".join(part.hex() if isinstance(part, bytes) else str(part) for part in event)


@pytest.fixture(scope="module")
def devices() -> Iterator[list[int]]:
    """The calling thread in a namespace of its own, with an underlay NIC (first) and the links of workloads."""
    netns.create(NAMESPACE)
    home = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
    try:
        netns.enter(netns.path(NAMESPACE))
        batch = ["link add wire type veth peer name wire-peer", "link set wire up", "link set wire-peer up"]
        batch += ["addr add 192.0.2.254/24 dev wire"]
        for machine in range(1, MACHINES + 1):
            batch.append(f"neigh add 192.0.2.{machine} lladdr 02:00:5e:00:00:0{machine} dev wire nud permanent")
        for n in range(PAIRS):
            batch += [f"link add a{n} type veth peer name b{n}", f"link set a{n} up", f"link set b{n} up"]
        subprocess.run(["ip", "-batch", "-"], input="\n".join(batch), text=True, check=True)
        Path("/proc/sys/net/ipv4/conf/all/forwarding").write_text("1")
        index = {name: number for number, name in socket.if_nameindex()}
        yield [index["wire"], *(index[f"{side}{n}"] for n in range(PAIRS) for side in "ab")]
    finally:
        ctypes.CDLL(None, use_errno=True).setns(home, 0x40000000)
        os.close(home)
        netns.delete(NAMESPACE)


@pytest.fixture(scope="module")
def machines(devices: list[int]) -> Iterator[dict[int, Twins]]:
    pins = BPFFS / "nestnet" / NAMESPACE
    twins = {n: Twins(Kernel.open(pins / str(n), SMALL, recording=True)) for n in range(1, MACHINES + 1)}
    try:
        yield twins
    finally:
        for twin in twins.values():
            twin.kernel.unpin()
        for n in twins:
            (pins / str(n)).rmdir()
        pins.rmdir()


def check(steps: list[Step], machines: dict[int, Twins], devices: list[int]) -> None:
    world = None
    for twin in machines.values():
        twin.reset()
    for number, step in enumerate(steps):
        if step.world is not world:
            world = step.world
            for id in world.machines:
                machines[id].become(world, id, devices)
        if not is_runnable(step.frame):
            continue
        here = machine_of(world, step.port)
        for again in range(2):
            note(f"{number}: port {step.port} of machine {here}, time {again + 1}: {step.frame.hex()}")
            told = machines[here].workload(devices[1 + step.port], step.frame)
            for out in told.emitted:
                if isinstance(out, ToMachine):
                    there = machine_at(world, out.datagram)
                    note(f"   to machine {there}: {out.datagram.hex()}")
                    machines[there].underlay(out.datagram, devices[0])
    if world is not None:
        for id in world.machines:
            machines[id].check_tables()


def is_runnable(frame: bytes) -> bool:
    """BPF_PROG_TEST_RUN makes no skb of a frame that is shorter than the header its EtherType promises."""
    return len(frame) > 14 + {b"\x08\x00": 19, b"\x86\xdd": 39}.get(frame[12:14], 0)


def machine_at(world: World, datagram: bytes) -> int:
    """The machine that the outer IPv4 header is for."""
    return next(m.id for m in world.machines.values() if m.address.packed == datagram[16:20])


@equality
@given(steps=conversations())
def test_the_kernel_does_the_same(steps: list[Step], machines: dict[int, Twins], devices: list[int]) -> None:
    check(steps, machines, devices)


@equality
@given(steps=rounds())
def test_the_kernel_does_the_same_wherever_frames_get_far(
    steps: list[Step], machines: dict[int, Twins], devices: list[int]
) -> None:
    check(steps, machines, devices)


def damaged(datagram: bytes, world: World, rng: random.Random) -> bytes:
    """A datagram as a broken or hostile machine might have sent it: from somebody else, with another VNI, with bytes
    changed in its headers, outer and inner, or cut off."""
    spoiled = bytearray(datagram)
    for _ in range(rng.randint(1, 2)):
        match rng.randrange(6):
            case 0:
                address = rng.choice([*(m.address for m in world.machines.values()), IPv4Address("192.0.2.99")])
                spoiled[12:16] = address.packed
            case 1:
                vni = rng.choice([0, 1 << 23, *(segment.vni for segment in world.segments.values())])
                spoiled[32:35] = vni.to_bytes(3, "big")
            case 2:
                spoiled[rng.randrange(28, 36)] ^= 1 << rng.randrange(8)  # VXLAN
            case 3:
                spoiled[rng.randrange(36, min(len(spoiled), 110))] = rng.randrange(256)  # inside
            case 4:
                macs = [port.mac for port in world.ports.values()] + [router.mac for router in world.routers.values()]
                at = rng.choice([36, 42])
                spoiled[at : at + 6] = rng.choice(macs).to_bytes(6, "big")
            case 5:
                spoiled[1] = rng.randrange(4)  # ECN
    return bytes(spoiled)


@equality
@given(steps=rounds(), seed=st.integers(0, 1 << 32))
def test_the_kernel_takes_the_same_from_the_wire(
    steps: list[Step], seed: int, machines: dict[int, Twins], devices: list[int]
) -> None:
    rng = random.Random(seed)
    if not steps:
        return
    world = steps[0].world
    for id in world.machines:
        machines[id].reset()
        machines[id].become(world, id, devices)
    for step in steps:
        for out in machines[machine_of(world, step.port)].workload(devices[1 + step.port], step.frame).emitted:
            if isinstance(out, ToMachine):
                there = machines[machine_at(world, out.datagram)]
                for _ in range(4):
                    datagram = damaged(out.datagram, world, rng)
                    note(f"to machine {machine_at(world, out.datagram)}: {datagram.hex()}")
                    there.underlay(datagram, devices[0])
