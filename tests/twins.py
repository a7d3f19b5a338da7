"""Every agent twice: `Teller` says by the reference what must become of each frame, `play` has the kernel do it.

    conversation -> machine's tables -> Reference.workload    Kernel.run(workload)     frames, drops: equal
                                             | datagram               |
                                        Reference.underlay    Kernel.run(underlay)     frames, drops: equal

An agent on a host port has a number above those of machines; its datagrams are frames for the agent below.

What is told is a list of operations, values that know what they expect: it can be played at once, or again and again to
kernels that are not what they should be (test_mutants.py).
"""

from __future__ import annotations

import ctypes
import os
import random
import socket
import subprocess
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import cast

import numpy as np
from hypothesis import currently_in_test_context, note
from strategies import JUMBO, PHYSICAL, START, Step, on_the_wire

from nestnet.agent import netns
from nestnet.agent.moves import Moves
from nestnet.api.client import Client
from nestnet.compile.compiler import compile
from nestnet.compile.diff import Action, diff
from nestnet.compile.slots import Slots, assign
from nestnet.compile.tables import Tables, empty
from nestnet.datapath.kernel import BPFFS, Capacity, Kernel, ProgramName, Record
from nestnet.datapath.reference import Outputs, Reference, ToAgent, ToMachine, ToRelay, ToVlan, ToWorkload
from nestnet.model import packet as pk
from nestnet.model.clock import nanoseconds, seconds
from nestnet.model.domains import Agent, agent, domain, within
from nestnet.model.reasons import NAMES
from nestnet.model.values import CONNECTION_SHARE, FABRIC, World

LINKS = 64  # of workloads, more than a drawn world ever has
TRUNK_MAC = 0x0A0000000000  # of a machine's NIC to a physical network
MACHINES = 4
AGENTS = 12  # on host ports; no more in any world that is told
SMALL = Capacity(
    networks=128, segments=128, routers=64, ports=256, hosts=256, machines=16, addresses=4096, routes=1024,
    members=4096, prefixes=4096, rules=16384, flows=4096, connections=4096, fragments=1024, buckets=512,
)  # fmt: skip
SHORTEST = 70  # bytes of a datagram with a packet in it: what comes to agents by workloads may be anything
AGAIN = 8  # frames and datagrams that come once more after a change


class Copies:
    """What agents without a controller give each other of ports that move."""

    def __init__(self) -> None:
        self.given: dict[int, bytes] = {}

    def give_connections(self, _machine: str, port: int, connections: bytes) -> None:
        self.given[port] = connections

    def take_connections(self, _machine: str, port: int) -> bytes:
        return self.given.get(port, b"")


def copies(between: Copies | None = None) -> Moves:
    """For one agent."""
    return Moves(cast("Client", between or Copies()), "", say)


# ---- what is told


@dataclass(frozen=True)
class Forget:
    """All machines start anew, with the tables that they have."""


@dataclass(frozen=True, eq=False)
class Load:
    """A machine gets new tables."""

    machine: int
    actions: list[Action]


@dataclass(frozen=True)
class Wait:
    """It is `now`, in ns; with `sweep`, what is over is swept."""

    now: int
    sweep: bool


@dataclass(frozen=True)
class Send:
    """A frame into a program of a machine, and what must come of it: see `text`."""

    machine: int
    program: ProgramName
    ifindex: int
    frame: bytes
    expected: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Compare:
    """What a machine then holds, and has counted: drops by port slot and reason."""

    machine: int
    tables: Tables
    drops: Mapping[tuple[int, str], int]


Operation = Forget | Load | Wait | Send | Compare


class Mismatch(AssertionError):
    """The kernel did something else than the reference."""


def text(event: tuple[object, ...]) -> str:
    """One event to compare and to read."""
    return " ".join(part.hex() if isinstance(part, bytes) else str(part) for part in event)


def say(words: str) -> None:
    """For who reads how hypothesis found a failure."""
    if currently_in_test_context():
        note(words)


def told(outputs: Outputs) -> tuple[str, ...]:
    """What the reference did. The machine that a datagram is for is in its address."""
    events: list[tuple[object, ...]] = [("drop", port, reason) for port, reason in outputs.drops]
    for out in outputs.emitted:
        if isinstance(out, ToWorkload):
            events.append(("workload", out.port, out.ifindex, out.frame))
        elif isinstance(out, ToAgent):
            events.append(("asked", out.port, out.ifindex, out.frame))
        elif isinstance(out, ToRelay):
            events.append(("relayed", out.port, out.ifindex, out.frame))
        elif isinstance(out, ToVlan):
            events.append(("vlan", out.ifindex, out.frame))
        else:
            events.append(("wire", out.datagram))
    return tuple(sorted(map(text, events)))


def seen(records: tuple[Record, ...]) -> tuple[str, ...]:
    """What the kernel would have done, in the same words."""
    events: list[tuple[object, ...]] = []
    for record in records:
        match record.kind:
            case "workload" | "asked" | "relayed":
                events.append((record.kind, record.slot, record.what, record.frame))
            case "wire":
                events.append(("wire", record.frame[14:]))
            case "vlan":
                events.append(("vlan", record.what, record.frame))
            case "drop":
                events.append(("drop", record.slot, NAMES[record.what]))
    return tuple(sorted(map(text, events)))


# ---- telling


class Teller:
    """All agents of worlds that change, as the reference runs them. `devices`: the ifindex of the NIC, then those of
    the links of workloads, and of trunks."""

    def __init__(self, devices: list[int], share: int = CONNECTION_SHARE) -> None:
        self.devices = devices
        self.share = share
        self.have: dict[int, Tables] = {}
        self.slots: dict[int, Slots] = {}
        self.references: dict[int, Reference] = {}
        self.drops: dict[int, Counter[tuple[int, str]]] = {}
        self.world = World.of(())
        self.above: dict[Agent, int] = {}  # the numbers of agents on host ports
        self.known: dict[int, World] = {}  # by number, those of this world: what they know

    def forget(self) -> Operation:
        self.references = {machine: Reference(tables) for machine, tables in self.have.items()}
        self.drops.clear()
        self.above.clear()
        return Forget()

    def device(self, port: int) -> int:
        """Where a port's workload hangs. There are enough for drawn worlds; of a tower the highest have one."""
        return self.devices[1 + port % (len(self.devices) - 1 - len(PHYSICAL))]

    def trunk(self, on: str) -> int:
        """The NIC to a physical network: the last ones."""
        return self.devices[PHYSICAL.index(on) - len(PHYSICAL)]

    def number(self, one: Agent) -> int:
        if one.domain == FABRIC:
            return one.machine
        return self.above.setdefault(one, MACHINES + 1 + len(self.above))

    def become(self, world: World) -> Iterator[Load]:
        """The tables that turn what there is into this world, at all its agents."""
        self.world = world
        attachments = {port: self.device(port) for port in world.ports}
        self.known = {}
        for here in sorted({FABRIC, *(domain(world, network) for network in world.networks)}):
            inside = within(world, here)
            self.known |= {self.number(Agent(here, machine)): inside for machine in inside.machines}
            for id in inside.machines:
                machine = self.number(Agent(here, id))
                self.slots[machine] = assign(self.slots.get(machine, Slots()), inside)
                trunks = {trunk.on: (self.trunk(trunk.on), TRUNK_MAC + id) for trunk in inside.machines[id].trunks}
                want = compile(inside, id, attachments, self.devices[0], self.slots[machine], trunks)
                want["port"]["value"]["share"] = self.share
                actions = diff(self.have.get(machine) or empty(), want)
                self.have[machine] = want
                if machine in self.references:
                    self.references[machine].load(want)
                else:
                    self.references[machine] = Reference(want)
                yield Load(machine, actions)

    def workload(self, machine: int, port: int, frame: bytes, now: float) -> tuple[Send, Outputs]:
        ifindex = self.device(port)
        outputs = self.references[machine].workload(ifindex, frame, now)
        return self._told(machine, "workload", ifindex, frame, outputs), outputs

    def underlay(self, machine: int, datagram: bytes, now: float) -> Send:
        return self._underlay(machine, datagram, now)[0]

    def _underlay(self, machine: int, datagram: bytes, now: float) -> tuple[Send, Outputs]:
        outputs = self.references[machine].underlay(datagram, now)
        sent = self._told(machine, "underlay", self.devices[0], ethernet(datagram) + datagram, outputs)
        return sent, outputs

    def from_trunk(self, machine: int, ifindex: int, frame: bytes, now: float) -> tuple[Send, Outputs]:
        outputs, _ = self.references[machine].trunk(ifindex, frame, now)
        return self._told(machine, "trunk", ifindex, frame, outputs), outputs

    def _told(self, machine: int, program: ProgramName, ifindex: int, frame: bytes, outputs: Outputs) -> Send:
        self.drops.setdefault(machine, Counter()).update(outputs.drops)
        return Send(machine, program, ifindex, frame, told(outputs))

    def through(self, port: int, frame: bytes, now: float, elsewhere: bool = False) -> Iterator[Send]:
        """A frame from its workload, and what comes of it at other agents, below and above."""
        if not is_runnable(frame):
            return
        here = agent(self.world, self.world.ports[port], elsewhere)
        sent, outputs = self.workload(self.number(here), port, frame, now)
        yield sent
        pending = deque([(here, outputs)])
        while pending:
            here, outputs = pending.popleft()
            reference = self.references[self.number(here)]
            for out in outputs.emitted:
                if isinstance(out, ToVlan):
                    for id in self.world.machines:
                        if id != here.machine:  # as a switch does that has not learned where that is
                            sent, outputs = self.from_trunk(id, out.ifindex, out.frame, now)
                            yield sent
                            pending.append((Agent(FABRIC, id), outputs))
                    continue
                if isinstance(out, ToMachine) and here.domain != FABRIC:
                    there = agent(self.world, self.world.ports[here.machine])
                    ifindex = self.device(here.machine)
                    lower = self.references[self.number(there)].from_agent(ifindex, out.datagram)
                    if lower is None:
                        continue
                    sent, outputs = self.workload(self.number(there), here.machine, lower, now)
                elif isinstance(out, ToMachine):
                    there = Agent(FABRIC, machine_at(self.world, out.datagram))
                    sent, outputs = self._underlay(there.machine, out.datagram, now)
                else:  # for a workload: if an agent runs there, it is the agent's too
                    port = int(reference.port[out.port].id)
                    there = Agent(self.world.ports[port].network, port)
                    if there not in self.above or not is_runnable(out.frame):
                        continue
                    sent, outputs = self._underlay(self.above[there], out.frame[14:], now)
                yield sent
                pending.append((there, outputs))

    def tell(self, steps: list[Step], hostile: random.Random | None = None, sweep: bool = True) -> Iterator[Operation]:
        """A conversation. Every frame goes through twice, so that the second time it meets the flow that the first
        left behind. After a change the last frames come once more, and so do the last datagrams, as from a machine
        that has not heard of it yet. With `hostile`, workloads and machines then send what is nearly the same."""
        yield self.forget()
        world, now = None, START
        frames: deque[tuple[int, bytes]] = deque(maxlen=AGAIN)
        datagrams: deque[tuple[int, bytes]] = deque(maxlen=AGAIN)
        for number, step in enumerate(steps):
            if step.now > now:
                yield Wait(nanoseconds(step.now), sweep and seconds(step.now) > seconds(now))
                now = step.now
            if step.world is not world:
                world = step.world
                yield from self.become(world)
                for machine, datagram in datagrams:
                    if machine in self.known:
                        yield self.underlay(machine, datagram, now)
                for port, frame in list(frames):
                    if port in world.ports:
                        yield from self.through(port, frame, now)
            say(f"{number}: port {step.port} at {now}: {step.frame.hex()}")
            frames.append((step.port, step.frame))
            for time in range(4 if hostile else 2):
                frame = step.frame if time < 2 else changed_by_workload(step.frame, hostile)
                for send in self.through(step.port, frame, now, step.elsewhere):
                    yield send
                    if send.program == "trunk":
                        for _ in range(3 if hostile else 0):
                            odd = changed_by_stranger(send.frame, self.known[send.machine], hostile)
                            if is_runnable(pk.untagged(odd, 3)[1]):
                                yield self.from_trunk(send.machine, send.ifindex, odd, now)[0]
                    if send.program == "underlay":
                        datagram = send.frame[14:]
                        datagrams.append((send.machine, datagram))
                        for _ in range(4 if hostile and len(datagram) >= SHORTEST else 0):
                            there = self.known[send.machine]
                            yield self.underlay(send.machine, changed_by_machine(datagram, there, hostile), now)
        if world is not None:
            for machine in self.known:
                yield Compare(machine, self.have[machine], dict(self.drops.get(machine, {})))


def is_runnable(frame: bytes) -> bool:
    """BPF_PROG_TEST_RUN makes no skb of a frame that is shorter than the header its EtherType promises."""
    return len(frame) > 14 + {b"\x08\x00": 19, b"\x86\xdd": 39}.get(frame[12:14], 0)


def ethernet(datagram: bytes) -> bytes:
    """What stands before a datagram on the wire."""
    return bytes(12) + (b"\x08\x00" if datagram[0] >> 4 == 4 else b"\x86\xdd")


def machine_at(world: World, datagram: bytes) -> int:
    """The machine that the outer header is for."""
    target = datagram[16:20] if datagram[0] >> 4 == 4 else datagram[24:40]
    return next(m.id for m in world.machines.values() if m.address.packed == target)


def changed_by_workload(frame: bytes, rng: random.Random | None) -> bytes:
    """The same flow for who does not look closely: another TTL or ECN, other TCP flags, or a bit somewhere."""
    assert rng is not None
    if not frame:
        return frame
    changed = bytearray(frame)
    is_ipv6 = frame[12:14] == b"\x86\xdd"
    match rng.randrange(5):
        case 0:
            at, byte = 21 if is_ipv6 else 22, rng.choice([0, 1, 2, 255])
        case 1:
            at = 15
            byte = rng.randrange(4) << 4 if is_ipv6 else rng.randrange(4)
        case 2:
            at, byte = 67 if is_ipv6 else 47, rng.choice([pk.FIN | pk.ACK, pk.RST, pk.SYN, pk.ACK])
        case _:
            at = rng.randrange(min(len(frame), 70))
            byte = frame[at] ^ 1 << rng.randrange(8)
    if at < len(changed):
        changed[at] = byte
    return bytes(changed)


def changed_by_machine(datagram: bytes, world: World, rng: random.Random | None) -> bytes:
    """A datagram as a broken or hostile machine might have sent it: from somebody else, with another VNI, with bytes
    changed in its headers, outer and inner."""
    assert rng is not None
    changed = bytearray(datagram)
    family = datagram[0] >> 4
    outer, source_at = (20, 12) if family == 4 else (40, 8)
    vxlan_at, inner_at = outer + 8, outer + 16
    for _ in range(rng.randint(1, 2)):
        match rng.randrange(8):
            case 0 | 1:
                machines = [m.address for m in world.machines.values() if m.address.version == family]
                address = rng.choice([*machines, on_the_wire(99, family)])
                changed[source_at : source_at + len(address.packed)] = address.packed
            case 2:
                vni = rng.choice([0, 1 << 23, *(segment.vni for segment in world.segments.values())])
                changed[vxlan_at + 4 : vxlan_at + 7] = vni.to_bytes(3, "big")
            case 3:
                changed[rng.randrange(vxlan_at, inner_at)] ^= 1 << rng.randrange(8)
            case 4:
                changed[rng.randrange(inner_at, min(len(changed), 110))] = rng.randrange(256)
            case 5:
                macs = [port.mac for port in world.ports.values()] + [router.mac for router in world.routers.values()]
                at = inner_at + rng.choice([0, 6])
                changed[at : at + 6] = rng.choice(macs).to_bytes(6, "big")
            case 6:
                ecn = rng.randrange(4)
                changed[1] = ecn if family == 4 else ecn << 4
            case 7:
                changed[rng.randrange(source_at, outer)] ^= 1 << rng.randrange(8)  # either address
    return ended(bytes(changed), rng) if rng.random() < 0.2 else bytes(changed)


def changed_by_stranger(frame: bytes, world: World, rng: random.Random | None) -> bytes:
    """What somebody in the VLAN, or next to it, might have sent: other tags, or none, MACs of others, bytes changed."""
    assert rng is not None
    match rng.randrange(5):
        case 0 if rng.randrange(8) == 0:
            return frame[:16] + b"\x80\x35" + frame[18:]
        case 0:
            tags = [frame[12:16] * 2, b"", pk.tag(0), pk.tag(0) + frame[12:16], b"\x88\xa8" + frame[14:16], pk.tag(999)]
            return frame[:12] + rng.choice(tags) + frame[16:]
        case 1 | 2:
            macs = [port.mac for port in world.ports.values()] + [router.mac for router in world.routers.values()]
            at = rng.choice([0, 6, 6])
            return frame[:at] + rng.choice([*macs, pk.BROADCAST, 0x0A0000000099]).to_bytes(6, "big") + frame[at + 6 :]
        case _:
            changed = bytearray(frame)
            changed[rng.randrange(min(len(frame), 74))] ^= 1 << rng.randrange(8)
            return bytes(changed)


def ended(datagram: bytes, rng: random.Random) -> bytes:
    """The same that ends early, by its outer IP length, in what arrives, or both; or with something behind."""
    head, length_at = (20, 2) if datagram[0] >> 4 == 4 else (40, 4)
    size = rng.randrange(head + 8, min(len(datagram), head + 100))
    match rng.randrange(3):
        case 0:
            length = size if head == 20 else size - head
            return datagram[:length_at] + length.to_bytes(2, "big") + datagram[length_at + 2 : size]
        case 1:
            return datagram[:size]
    return datagram + bytes(rng.randrange(1, 9))


# ---- playing


def play(operation: Operation, kernels: Mapping[int, Kernel]) -> int:
    """Raises Mismatch unless the kernel does what it should. Returns how many flows it composed."""
    match operation:
        case Forget():
            for kernel in kernels.values():
                kernel.forget()
                kernel.set_clock(nanoseconds(START))
        case Load(machine, actions):
            kernels[machine].apply(actions)
        case Wait(now, sweep):
            for kernel in kernels.values():
                kernel.set_clock(now)
                if sweep:
                    kernel.sweep()
        case Send(machine, program, ifindex, frame, expected):
            records = kernels[machine].run(frame, ifindex, program).emitted
            got = seen(records)
            if got != expected:
                say(f"machine {machine}, {program}: {frame.hex()}\n   kernel    {got}\n   reference {expected}")
                raise Mismatch(f"machine {machine}, {program}: kernel {got}, reference {expected}")
            return sum(record.kind == "composed" for record in records)
        case Compare(machine, tables, drops):
            held = kernels[machine].read()
            for name, rows in tables.items():
                if not np.array_equal(held[name], rows):
                    raise Mismatch(f"machine {machine}: table {name} is not as compiled")
            counted = {(port, NAMES[reason]): n for (port, reason), n in kernels[machine].drops().items()}
            if counted != drops:
                raise Mismatch(f"machine {machine}: counted {counted}, dropped {drops}")
    return 0


# ---- where it plays


@contextmanager
def devices(name: str) -> Iterator[list[int]]:
    """The calling thread in a namespace of its own, with an underlay NIC (first), the links of workloads, and a NIC to
    each physical network (last)."""
    netns.create(name)
    home = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
    try:
        netns.enter(netns.path(name))
        batch = [
            f"link add wire mtu {JUMBO} type veth peer name wire-peer",
            "link set wire up",
            "link set wire-peer up",
        ]
        batch += ["addr add 192.0.2.254/24 dev wire", "addr add 2001:db8::fe/64 dev wire nodad"]
        for machine in range(1, MACHINES + 1):
            for address in (on_the_wire(machine, family) for family in (4, 6)):
                batch.append(f"neigh add {address} lladdr 02:00:5e:00:00:0{machine} dev wire nud permanent")
        # Host addresses, of agents upon agents: they too leave by this NIC.
        batch += ["route add 10.0.0.0/8 dev wire", "route add fd00::/8 dev wire"]
        for n, last in product(range(3), [1, 2, *range(10, 14), *range(30, 34)]):
            for address in (f"10.0.{n}.{last}", f"fd00:{n}::{last:x}"):
                batch.append(f"neigh add {address} lladdr 02:00:5e:00:01:{last:02x} dev wire nud permanent")
        for n in range(LINKS // 2):
            batch += [f"link add a{n} type veth peer name b{n}", f"link set a{n} up", f"link set b{n} up"]
        subprocess.run(["ip", "-batch", "-"], input="\n".join(batch), text=True, check=True)
        batch = ["link add trunk1 type veth peer name trunk2", "link set trunk1 up", "link set trunk2 up"]
        subprocess.run(["ip", "-batch", "-"], input="\n".join(batch), text=True, check=True)
        for family in ("ipv4", "ipv6"):
            Path(f"/proc/sys/net/{family}/conf/all/forwarding").write_text("1")
        index = {name: number for number, name in socket.if_nameindex()}
        workloads = [index[f"{side}{n}"] for n in range(LINKS // 2) for side in "ab"]
        yield [index["wire"], *workloads, *(index[f"trunk{n}"] for n in (1, 2))]
    finally:
        ctypes.CDLL(None, use_errno=True).setns(home, 0x40000000)
        os.close(home)
        netns.delete(name)


@contextmanager
def recording(name: str, object: Path | None = None, agents: int = MACHINES) -> Iterator[dict[int, Kernel]]:
    """A kernel for each machine, or for so many agents, that tells what it would do. `name`: of a folder for their
    pins."""
    pins = BPFFS / "nestnet" / name
    kernels: dict[int, Kernel] = {}
    try:
        for machine in range(1, agents + 1):
            kernels[machine] = Kernel.open(pins / str(machine), SMALL, recording=True, object=object)
        yield kernels
    finally:
        for machine, kernel in kernels.items():
            kernel.unpin()
            (pins / str(machine)).rmdir()
        if pins.exists():
            pins.rmdir()
