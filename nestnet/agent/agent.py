"""The agent: makes one machine so, again whenever something changes.

    feed -> World -> workloads (closed) -> programs -> compile -> diff(have, want) -> kernel -> workloads open -> report

`run` is the process. `Agent.converge` is one turn: it takes the whole desired state and may be called any number
of times. What fails is a problem that is reported by name and tried again; the rest of the machine converges.
When the agent ends, its machine's datapath stays as it is and forwards on.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestnet.agent import links
from nestnet.agent.attachments import Attachment, Workloads, wanted
from nestnet.agent.feed import Desired, Feed
from nestnet.compile.compiler import compile
from nestnet.compile.diff import diff
from nestnet.compile.slots import Slots, assign, slots_of
from nestnet.compile.tables import Tables
from nestnet.model.errors import NestnetError
from nestnet.model.reasons import NAMES
from nestnet.model.values import World

if TYPE_CHECKING:
    from nestnet.api.client import Client
    from nestnet.datapath.kernel import Kernel, ProgramName

SWEEP = 2.0  # seconds between two looks at what the kernel has aged out, what drifted and what was dropped
NEIGHBOURS = 20.0  # seconds; the kernel may forget a neighbour that is not used for 60


def say(text: str) -> None:
    """One line of the agent's log."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(machine: str, controller: str, pins: Path, workloads: str | None = None) -> None:
    """Make this machine what `controller` wants `machine` to be, until SIGTERM or SIGINT.

    pins       folder in bpffs for programs, maps and links
    workloads  prefix of the namespaces that are made for local ports; None: none are made
    """
    from nestnet.api.client import Client
    from nestnet.datapath.kernel import Kernel

    with Client(controller) as client, Kernel.open(pins) as kernel:
        own = client.get("machine", machine)
        agent = Agent(int(own["row"]), kernel, Workloads(workloads) if workloads else None)
        feed = Feed(lambda token: Client(controller).feed(machine, token), say)
        stopped: list[int] = []

        def stop(number: int, _: object) -> None:
            stopped.append(number)
            feed.stop()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        faulthandler.register(signal.SIGUSR1)  # an agent that hangs says where
        feed.start()
        say(f"agent of {machine}")
        desired = Desired()
        while not stopped:
            news = feed.take(SWEEP)
            if stopped:
                break
            if news is not None:
                desired = news
            if desired.whole:
                agent.converge(desired)
                agent.sweep()
                _report(client, machine, agent)
        say("ended; the datapath stays")


def _report(client: Client, machine: str, agent: Agent) -> None:
    try:
        client.report(machine, agent.realised, agent.problems, agent.ports())
    except NestnetError as error:
        say(f"report: {error}")  # the next one says the same, and more


@dataclass
class Agent:
    """One machine: what it has, and how it becomes what is desired.

    `realised` is the last revision that is wholly so here, `problems` what is in the way of the next.
    """

    machine: int
    kernel: Kernel
    workloads: Workloads | None
    have: Tables = field(init=False)
    slots: Slots = field(init=False)
    realised: int = 0
    problems: list[str] = field(default_factory=list)
    _desired: Desired = field(default_factory=Desired)
    _latest: World = field(default_factory=World)  # what is desired
    _world: World = field(default_factory=World)  # what was last made so: another one while a turn fails
    _met: World | None = None  # whose machines were last asked for, and when, in monotonic seconds
    _met_at: float = 0.0
    _ends: dict[int, links.Link] = field(default_factory=dict)
    _attached: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The kernel is the memory: after a restart the first diff is against what is really there.
        self.have = self.kernel.read()
        self.slots = slots_of(self.have)

    def converge(self, desired: Desired) -> None:
        """One turn: make it so. Cheap when neither the wish nor the links have changed since the last."""
        if desired.values is not self._desired.values:
            self._latest = desired.world
        world = self._latest
        problems: list[str] = []
        want = wanted(world, self.machine) if self.workloads is not None else {}
        try:
            ends = self._prepare(want, problems)
            underlay = self._underlay(world, problems)
            known = {port: end.index for port, end in self._ends.items()}
            ready = {port: end.index for port, end in ends.items()}
            if world is not self._world or ready != known or self.problems or problems:
                slots = assign(self.slots, world)
                tables = compile(world, self.machine, ready, underlay, slots)
                self.kernel.apply(diff(self.have, tables))
                self.have, self.slots = tables, slots
            if self.workloads is not None:
                # Frames flow from here on: the tables know every port.
                self.workloads.open(ends.values())
                self._remove(want)
            self._world, self._ends = world, ends
        except (OSError, NestnetError) as error:
            problems.append(str(error))
            self.have = self.kernel.read()  # some of the actions may be done
            self.slots = slots_of(self.have)
        for problem in problems:
            if problem not in self.problems:
                say(f"revision {desired.revision}: {problem}")
        if not problems and desired.revision != self.realised:
            say(f"revision {desired.revision}: {len(want)} workloads, {len(world.values)} values")
            self.realised = desired.revision
        self._desired, self.problems = desired, problems

    def sweep(self) -> None:
        """Let the datapath forget what is old, and have the kernel know its neighbours: copies of a broadcast cannot
        wait for an answer to ARP. What goes wrong is a problem until the next turn."""
        now = time.monotonic()
        try:
            self.kernel.sweep(now)
            if self._met is not self._world or now - self._met_at > NEIGHBOURS:
                self._met, self._met_at = self._world, now
                with links.netlink() as ipr:
                    others = (m.address for m in self._world.machines.values() if m.id != self.machine)
                    links.resolve(ipr, others)
        except (OSError, NestnetError) as error:
            self.problems = [*self.problems, f"sweep: {error}"]
            say(self.problems[-1])

    def ports(self) -> dict[str, dict[str, Any]]:
        """What the controller is told of each local port, by its id: where it hangs, and what was dropped by reason."""
        ports: dict[str, dict[str, Any]] = {
            str(port): {"interface": end.name, "namespace": self.workloads.namespace(port), "drops": {}}
            for port, end in self._ends.items()
            if self.workloads is not None
        }
        of = self.slots.ids("port")
        for (slot, reason), packets in self.kernel.drops().items():
            # Slot 0: came in before its port was known, or from the wire for nobody here.
            port = ports.setdefault(str(of.get(slot, 0)), {"drops": {}})
            name = NAMES.get(reason, str(reason))
            port["drops"][name] = port["drops"].get(name, 0) + packets
        return ports

    def _prepare(self, want: Mapping[int, Attachment], problems: list[str]) -> dict[int, links.Link]:
        """Workloads that are there, with our programs on our ends, still closed if they are new."""
        if self.workloads is None:
            return {}
        ends, failed = self.workloads.prepare(want)
        problems += failed.values()
        for port, end in list(ends.items()):
            try:
                self._attach(end.index, "workload")
            except (OSError, NestnetError) as error:
                problems.append(f"port {port}: no program on {end.name}: {error}")
                del ends[port]  # stays closed
        return ends

    def _underlay(self, world: World, problems: list[str]) -> int:
        """The ifindex of the NIC that has this machine's address, with our program on it; 0 when there is none."""
        machine = world.machines.get(self.machine)
        if machine is None:
            problems.append("the controller does not know this machine any more")
            return 0
        with links.netlink() as ipr:
            index = links.with_address(ipr, machine.address)
        if index is None:
            problems.append(f"no interface has this machine's address {machine.address}")
            return 0
        self._attach(index, "underlay")
        return index

    def _attach(self, index: int, program: ProgramName) -> None:
        if self._attached.get(index) != program:
            self.kernel.attach(index, program)
            self._attached[index] = program

    def _remove(self, want: Mapping[int, Attachment]) -> None:
        """Workloads of ports that have gone or moved away. Only called when the world is whole."""
        assert self.workloads is not None
        there = self.workloads.actual()
        kept = {end.index for port, end in there.items() if port in want}
        if len(kept) < len(there):
            # Before their programs come off: what then came in would be for the machine's own stack.
            self.workloads.remove(want)
        # Also those whose interface is gone: in a lab a port's new machine takes its workload over by itself.
        for index in [i for i, program in self._attached.items() if program == "workload" and i not in kept]:
            self.kernel.detach(index)
            del self._attached[index]
        for end in (end for port, end in there.items() if port not in want):
            self.kernel.detach(end.index)  # attached by an agent before this one
