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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestnet.agent import links
from nestnet.agent.attachments import Attachment, Workloads, wanted
from nestnet.agent.feed import Desired, Feed
from nestnet.agent.metrics import Measured, serve
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

HELD = 0.2  # of the ports that a machine knows: a store that is another than before removes no more unasked
HEARTBEAT = 5.0  # seconds between two reports when there is nothing new
WHOLE = 60.0  # seconds between two reports that say everything again
STORM, STORM_PAUSE = 1000.0, 60.0  # packets a second dropped for one reason that are told, and how often at most
NOTICED = 100  # events that wait for the controller
SWEEP = 2.0  # seconds between two looks at what the kernel has aged out, what drifted and what was dropped
NEIGHBOURS = 20.0  # seconds; the kernel may forget a neighbour that is not used for 60


def say(text: str) -> None:
    """One line of the agent's log."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(machine: str, controller: str, pins: Path, workloads: str | None = None, metrics: str | None = None) -> None:
    """Make this machine what `controller` wants `machine` to be, until SIGTERM or SIGINT.

    pins       folder in bpffs for programs, maps and links
    workloads  prefix of the namespaces that are made for local ports; None: none are made
    metrics    where /metrics is answered, unix:PATH or http://127.0.0.1:PORT; None: nowhere
    """
    from nestnet.api.client import Client
    from nestnet.datapath.kernel import Kernel

    # It never waits: what is reported late is reported better.
    with Client(controller, patience=0) as client, Kernel.open(pins) as kernel:
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
        if metrics is not None:
            serve(metrics, lambda: replace(agent.measured, connected=feed.problem is None))
        feed.start()
        say(f"agent of {machine}")
        agent.notice("started", f"{machine}: its agent has started")
        reports = Reports(client, machine)
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
                agent.measure()
                reports.turn(agent)
        say("ended; the datapath stays")


class Reports:
    """What the controller is told: at once when there is news, that we are here when there is none."""

    def __init__(self, client: Client, machine: str) -> None:
        self._client = client
        self._machine = machine
        self._said: tuple[int, list[str], dict[str, Any]] | None = None
        self._at = self._whole_at = 0.0

    def turn(self, agent: Agent) -> None:
        """Report if there is a reason to."""
        now = time.monotonic()
        ports, problems = agent.ports(), [*([agent.held] if agent.held else []), *agent.problems]
        said = (agent.realised, problems, ports)
        if said == self._said and not agent.noticed and now - self._at < HEARTBEAT:
            return
        whole = self._said is None or ports != self._said[2] or now - self._whole_at > WHOLE
        events = list(agent.noticed)
        try:
            self._client.report(self._machine, agent.realised, problems, ports if whole else None, events)
        except NestnetError as error:
            say(f"report: {error}")  # the next one says the same, and more
            self._said = None
            return
        del agent.noticed[: len(events)]
        self._said, self._at, self._whole_at = said, now, now if whole else self._whole_at


@dataclass
class Agent:
    """One machine: what it has, and how it becomes what is desired.

    `realised` is the last revision that is wholly so here, `problems` what is in the way of the next. `held` is why
    the machine stays as it is although the controller wants something else.
    """

    machine: int
    kernel: Kernel
    workloads: Workloads | None
    have: Tables = field(init=False)
    slots: Slots = field(init=False)
    realised: int = 0
    problems: list[str] = field(default_factory=list)
    held: str | None = None
    noticed: list[tuple[str, str]] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)
    _dropped: tuple[float, dict[str, int]] = (0.0, {})  # when, by reason
    _told: dict[str, float] = field(default_factory=dict)  # reason -> when its storm was told
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
        begun = time.monotonic()
        why = self._to_hold_back(desired)
        if why is not None and why != self.held:
            say(f"revision {desired.revision}: {why}")
        self.held = why
        if why is None:
            self._turn(desired)
            if not self.problems and desired.store is not None:
                self.kernel.store = desired.store
        elif self._desired.whole:
            self._turn(self._desired)  # what is here is kept as it should have been
        took = time.monotonic() - begun
        was = self.measured
        self.measured = replace(was, turns=was.turns + 1, turn=took, turns_took=was.turns_took + took)

    def _to_hold_back(self, desired: Desired) -> str | None:
        """Why the machine must not become so: it is another store than the one that made it what it is, perhaps one
        restored from a backup, and would remove much of what is here."""
        known = self.kernel.store
        if desired.store is None or known in (None, desired.store) or desired.confirmed:
            return None
        ports = set(self.slots.ids("port").values())
        gone = sum(("port", port) not in desired.values for port in ports)
        if gone <= HELD * len(ports):
            return None
        return (
            f"the controller has another store than before and knows nothing of {gone} of the {len(ports)} ports here: "
            "held back, traffic goes on; apply what is missing, then `nestnet confirm` lets them go"
        )

    def notice(self, kind: str, text: str) -> None:
        """Something happened that the controller should hear of: repaired, drops or started."""
        say(text)
        self.noticed.append((kind, text))
        del self.noticed[:-NOTICED]

    def measure(self) -> None:
        """What /metrics says, as of now; and a storm of drops is noticed. What cannot be read stays as it was."""
        try:
            self._measure()
        except OSError as error:
            say(f"measuring: {error}")

    def _measure(self) -> None:
        of = self.slots.ids("port")
        traffic = {}
        for row in self.kernel.stats():
            names = row["value"].dtype.names or ()
            traffic[of.get(int(row["key"]), 0)] = {name: int(row["value"][name]) for name in names}
        drops: dict[int, dict[str, int]] = {}
        total: dict[str, int] = {}
        for (slot, number), packets in self.kernel.drops().items():
            reason = NAMES.get(number, str(number))
            here = drops.setdefault(of.get(slot, 0), {})
            here[reason] = here.get(reason, 0) + packets
            total[reason] = total.get(reason, 0) + packets
        self._storms(total)
        self.measured = replace(
            self.measured,
            realised=self.realised,
            problems=len(self.problems),
            held=self.held is not None,
            remembered=dict(self.kernel.remembered),
            traffic=traffic,
            drops=drops,
        )

    def _storms(self, total: dict[str, int]) -> None:
        now = time.monotonic()
        at, before = self._dropped
        self._dropped = now, total
        if not at:
            return
        for reason, packets in total.items():
            rate = (packets - before.get(reason, 0)) / max(now - at, 0.1)
            if rate >= STORM and now - self._told.get(reason, -STORM_PAUSE) >= STORM_PAUSE:
                self._told[reason] = now
                self.notice("drops", f"{rate:,.0f} packets/s dropped: {reason}")

    def _turn(self, desired: Desired) -> None:
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
            if world is self._world:
                for port in sorted(port for port in ready if known.get(port, ready[port]) != ready[port]):
                    self.notice("repaired", f"port {port}: its link had gone, it has a new one")
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
        # Also those whose interface is gone: in a lab a port's new machine takes its workload over by itself.
        for index in [i for i, program in self._attached.items() if program == "workload" and i not in kept]:
            self.kernel.detach(index)
            del self._attached[index]
        for end in (end for port, end in there.items() if port not in want):
            self.kernel.detach(end.index)  # attached by an agent before this one
        if len(kept) < len(there):
            self.workloads.remove(want)
