"""The agent: makes one machine so, again whenever something changes.

    feed -> World -> workloads (closed) -> programs -> compile -> diff(have, want) -> kernel -> workloads open -> report

`run` is the process. `Agent.converge` is one turn: it takes the whole desired state and may be called any number
of times. What fails is a problem that is reported by name and tried again; the rest of the machine converges.
When the agent ends, its machine's datapath stays as it is and forwards on.
"""

from __future__ import annotations

import faulthandler
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from uuid import uuid4

import numpy as np

from nestnet.agent import links, trunks, underlay
from nestnet.agent.attachments import Attachment, Workloads, wanted
from nestnet.agent.credentials import Own, boot, join
from nestnet.agent.feed import Desired, Feed
from nestnet.agent.guests import Guests, Place
from nestnet.agent.inquiries import Asker, Inquiries
from nestnet.agent.memory import give_back
from nestnet.agent.metrics import Measured, serve
from nestnet.agent.moves import Moves
from nestnet.agent.relay import Relay
from nestnet.compile.compiler import compile
from nestnet.compile.diff import Action, Bump, Epoch, applied, diff
from nestnet.compile.part import parts
from nestnet.compile.slots import Slots, assign, assign_in, slots_of
from nestnet.compile.tables import TABLES, Tables
from nestnet.model.errors import NestnetError, Unreachable
from nestnet.model.reasons import NAMES
from nestnet.model.values import World

if TYPE_CHECKING:
    from nestnet.api.client import Client
    from nestnet.datapath.kernel import Kernel, ProgramName

HELD = 0.2  # of the ports that a machine knows: a store that is another than before removes no more unasked
HEARTBEAT = 5.0  # seconds between two reports when there is nothing new
ANSWER = 3.0  # seconds for an answer of the controller
WHOLE = 60.0  # seconds between two reports that say everything again
STORM, STORM_PAUSE = 1000.0, 60.0  # packets a second dropped for one reason that are told, and how often at most
LINE = 2000  # characters of a line of the log: so much is taken at once, or not at all (PIPE_BUF)
NOTICED = 100  # events that wait for the controller
SWEEP = 2.0  # seconds between two looks at what the kernel has aged out, what drifted and what was dropped
SWEPT = 50  # one part in so many of its time is what looking at connections and flows may take
CHECK = 5.0  # seconds between two looks at all tables and pins: reading 10,000 ports takes 40 ms
ROUND = 3  # turns in which every hook is looked at
TELL = 30  # repairs of one turn that are told one by one
NEIGHBOURS = 20.0  # seconds; the kernel may forget a neighbour that is not used for 60
AGAIN = 1.0  # seconds from one question to the next for a controller that does not answer
# What a machine whose routes never rest has for looking at them: one part in SHARE of its time. CREDIT seconds are
# there at once: whoever moves an agent's own NIC takes the old link away soon, and changes come in twos and threes.
SHARE, CREDIT = 5, 0.2


def say(text: str) -> None:
    """One line of the agent's log, if somebody takes it: its machine must not wait for whoever reads logs."""
    if select.select([], [sys.stderr], [], 0)[1]:
        print(f"{time.strftime('%H:%M:%S')} {text[:LINE]}", file=sys.stderr, flush=True)


def run(
    machine: str,
    controller: str,
    pins: Path,
    workloads: str | None = None,
    metrics: str | None = None,
    state: Path | None = None,
    relay: str | None = None,
    token: str | None = None,
    guests: Path | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Make this machine what `controller` wants `machine` to be, until SIGTERM or SIGINT.

    pins       folder in bpffs for programs, maps and links
    workloads  prefix of the namespaces that are made for local ports which name nothing; None: none are made
    metrics    where /metrics is answered, unix:PATH or http://127.0.0.1:PORT; None: nowhere
    state      folder with who the machine is, for a controller over TLS (credentials.py)
    relay      where agents in workloads are relayed to, unix:PATH or https://HOST:PORT, to be spoken to by TLS; None:
               to `controller`, if that is over TLS
    token      to join with, unless it has joined already: of a machine on a port
    guests     folder of agents in namespaces of ports here that are to run one (guests.py); None: none are started
    ready      called when it has begun
    """
    from nestnet.api.client import ANONYMOUS, Client
    from nestnet.datapath.kernel import Kernel

    if token is not None and state is not None and not (state / "own.pem").exists():
        _join(controller, token, machine, state)
    own = Own(state, say) if state is not None else None
    here = boot()

    def connect() -> Client:
        # It hardly waits: what is reported late is reported better, and the machine needs its agent meanwhile.
        credentials = own.credentials if own is not None else ANONYMOUS
        return Client(controller, timeout=ANSWER, patience=0, credentials=credentials)

    on_port = machine.startswith("port_")  # It is called as its port.
    with connect() as client, Kernel.open(pins, on_port=on_port) as kernel:
        moves = Moves(client, machine, say)
        agent = Agent(_row(client, machine), kernel, Workloads(workloads, on_port), Inquiries(kernel, say), moves)
        if guests is not None and workloads is not None:
            agent.guests = Guests(guests, pins.parent, workloads, machine, client, say)
        if relay is not None or controller.startswith("https:"):
            agent.relay = Relay(relay or controller, say)
        feed = Feed(lambda token: connect().feed(machine, token, here), say)
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
        watch = underlay.Watch(feed.wake)
        say(f"agent of {machine}")
        agent.notice("started", f"{machine}: its agent has started")
        reports = Reports(client, machine)
        ready()
        desired = Desired()
        due, pace = 0.0, Pace()  # monotonic seconds
        while not stopped:
            first = min(due, pace.next) if desired.whole and watch.moved.is_set() else due
            news = feed.take(max(0.0, first - time.monotonic()))
            if stopped:
                break
            now = time.monotonic()
            if desired.whole and watch.moved.is_set() and now >= pace.next:
                watch.moved.clear()  # before looking: what changes meanwhile is looked at again
                if agent.follow():
                    due = now
                pace.took(now, time.monotonic())
            if news is not None or now >= due:
                desired = news or desired
                due = now + SWEEP
                if desired.whole:
                    agent.converge(desired)
                    agent.sweep()
                    agent.measure()
                    if feed.problem is None:  # else nobody would hear it
                        reports.turn(agent)
                if own is not None:
                    own.renew(client, machine)
            if watch.interest != (interest := agent.interest):
                watch.interest = interest
                watch.moved.set()  # what it was not interested in may have happened since it was looked at
        watch.close()
        agent.inquiries.close()
        if agent.relay is not None:
            agent.relay.close()
        say("ended; the datapath stays")


@dataclass
class Pace:
    """When the underlay may be looked at next, in monotonic seconds: at once, as long as looking has not taken more
    than CREDIT and one part in SHARE of the time since."""

    next: float = 0.0
    _debt: float = 0.0  # seconds of looking that are not paid for
    _at: float = 0.0  # when it was so much

    def took(self, begun: float, now: float) -> None:
        """It has been looked at."""
        self._debt = max(0.0, self._debt - (now - self._at) / SHARE) + now - begun
        self._at = now
        self.next = now + max(0.0, self._debt - CREDIT) * SHARE


def _row(client: Client, machine: str) -> int:
    """The machine's number. Waits for a controller that does not answer: traffic goes on, and of all that starts the
    machine may be first."""
    problem = None
    while True:
        try:
            return int(client.get("machine", machine)["row"])
        except Unreachable as error:
            if str(error) != problem:
                problem = str(error)
                say(f"{problem}; the datapath stays as it is")
            time.sleep(AGAIN)  # the pace of asking


def _join(controller: str, token: str, machine: str, state: Path) -> None:
    """Join as a machine that is on a port: its address is the port's. Waits for a controller that does not answer."""
    while True:
        try:
            join(controller, token, {"name": machine}, state)
            return
        except Unreachable as error:
            say(f"joining: {error}")
            time.sleep(AGAIN)  # the pace of asking


class _Report(NamedTuple):
    revision: int | str
    problems: list[str]
    ports: dict[str, dict[str, Any]] | None  # None: as they were


class Reports:
    """What the controller is told: at once when there is news, that we are here when there is none.

    A thread tells it. Where an answer stays away, as its way there is just moving, the machine does not wait for it."""

    def __init__(self, client: Client, machine: str) -> None:
        self._client = client
        self._machine = machine
        self._said = _Report(0, [], {})
        self._at = self._whole_at = 0.0
        self._changed = threading.Condition()  # of what is below
        self._next: _Report | None = None
        self._lost = True  # The last one may not have arrived: the next one says the same, and more.
        self._events: list[tuple[str, str]] = []  # On their way, with one key until they are known to have arrived.
        self._key = ""
        threading.Thread(target=self._tell, name="reports", daemon=True).start()

    def turn(self, agent: Agent) -> None:
        """Report if there is a reason to."""
        now = time.monotonic()
        problems = [*([agent.held] if agent.held else []), *agent.problems]
        said = _Report(agent.realised, problems, agent.ports())
        with self._changed:
            fresh = bool(agent.noticed) and not self._events
            if said == self._said and not fresh and not self._lost and now - self._at < HEARTBEAT:
                return
            if fresh:
                self._events, self._key = list(agent.noticed), uuid4().hex
                agent.noticed.clear()
            whole = self._lost or said.ports != self._said.ports or now - self._whole_at > WHOLE
            whole = whole or (self._next is not None and self._next.ports is not None)
            self._next = said if whole else said._replace(ports=None)
            self._said, self._at, self._whole_at = said, now, now if whole else self._whole_at
            self._lost = False
            self._changed.notify()

    def _tell(self) -> None:
        while True:
            with self._changed:
                while (report := self._next) is None:
                    self._changed.wait()
                self._next = None
                events, key = self._events, self._key if self._events else None
            try:
                self._client.report(self._machine, *report, events, key=key)
            except Exception as error:  # Whatever it is, the next one is told.
                say(f"report: {error}")
                with self._changed:
                    self._lost = True
            else:
                if events:
                    with self._changed:
                        self._events = []


@dataclass
class Agent:
    """One machine: what it has, and how it becomes what is desired.

    `realised` is the last revision that is wholly so here, `problems` what is in the way of the next. `held` is why
    the machine stays as it is although the controller wants something else. `relay`: None where the controller cannot
    be relayed to.
    """

    machine: int
    kernel: Kernel
    workloads: Workloads
    inquiries: Inquiries
    moves: Moves
    relay: Relay | None = None
    slots: Slots = field(init=False)
    realised: int | str = 0
    problems: list[str] = field(default_factory=list)
    held: str | None = None
    guests: Guests | None = None
    noticed: list[tuple[str, str]] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)
    _dropped: tuple[float, dict[str, int]] = (0.0, {})  # when, by reason
    _told: dict[str, float] = field(default_factory=dict)  # reason -> when its storm was told
    _desired: Desired = field(default_factory=Desired)
    _latest: World = field(default_factory=World)  # what is desired
    _world: World = field(default_factory=World)  # what was last made so: another one while a turn fails
    _ways: underlay.Ways = field(default_factory=underlay.Ways)
    _met: World | None = None  # whose machines were last looked for, and when, in monotonic seconds
    _met_at: float = 0.0
    _sweep_at: float = 0.0
    _nics: dict[str, links.Link] = field(default_factory=dict)
    _nic: int = 0
    _warnings: list[str] = field(default_factory=list)  # what is wrong, but nothing that a turn could not do without
    _failed: bool = True  # the last turn left something undone, or there was none
    _have: Tables = field(init=False)  # the tables as they were, and what was done to them since
    _done: list[Action] = field(default_factory=list)
    _want: tuple[World, dict[int, Attachment]] | None = None  # the attachments that a world has here
    _ends: dict[int, links.Link] = field(default_factory=dict)
    _attached: dict[int, ProgramName] = field(init=False)
    _tags: set[int] = field(init=False)  # ifindexes whose frames get the tag of the machine's VLAN as they leave
    _secured: set[int] = field(default_factory=set)  # ifindexes that this agent has seen to
    _looked: int = 0  # of the hooks that are looked at in turn, how many were
    _checked: float = 0.0  # when tables and pins were, in monotonic seconds
    _seat: underlay.Seat | None = None
    _trunks: dict[str, links.Link] = field(default_factory=dict)  # by physical network, as they are
    _trunked: dict[str, links.Link] = field(default_factory=dict)  # and as the tables have them
    _announced: dict[int, trunks.Place] = field(default_factory=dict)  # by port, what switches have been told
    _untold: dict[int, int] = field(default_factory=dict)  # by port, how often they shall be told that again
    _ids: tuple[Slots, dict[int, int]] | None = None
    _said: tuple[Any, ...] = (None, None, None, {})  # what `ports` was of, and what it was

    def __post_init__(self) -> None:
        # The kernel is the memory: after a restart the first diff is against what is really there.
        self._read()
        self._attached = dict(self.kernel.attached())
        self._tags = set(self.kernel.attached(egress=True))

    @property
    def have(self) -> Tables:
        """The tables as this agent left them."""
        if self._done:
            self._have, self._done = applied(self._have, self._done), []
        return self._have

    def _read(self) -> None:
        """Find out what is really there."""
        self._have, self._done = self.kernel.read(), []
        self.slots = slots_of(self._have)

    def converge(self, desired: Desired) -> None:
        """One turn: make it so. Cheap when neither the wish nor the links have changed since the last."""
        begun = time.monotonic()
        why = self._to_hold_back(desired)
        if why is not None and why != self.held:
            say(f"{desired.called}: {why}")
        self.held = why
        if why is None:
            self._turn(desired)
            if not self._failed and desired.store is not None:
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
        of = self._port_of()
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
            composed=self.kernel.composed(),
            traffic=traffic,
            drops=drops,
            relayed={p: asdict(counts) for p, counts in self.relay.counts.items()} if self.relay is not None else {},
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
        if self._want is None or self._want[0] is not self._latest:
            self._want = self._latest, wanted(self._latest, self.machine, own=self.workloads.prefix is not None)
        world, want = self._want
        problems: list[str] = []
        inside: list[str] = []  # what is in the way of guests: all else is done without them
        try:
            if world is not self._world:
                self.moves.before(world, self.machine, self.kernel, self.slots)  # before workloads speak from here
            checked = self._check()
            self._end_relays(want)
            ends, failed = self.workloads.prepare(want)
            problems += failed.values()
            # What happens to NICs is heard of: `follow`.
            new = world is not self._world or self._failed or self._warnings or not self._nics
            nic = self._underlay(world, problems) if new or checked else self._nic
            quiet = world is self._world and ends is self._ends and nic == self._nic
            quiet = quiet and self._trunks == self._trunked and not self._failed and not problems
            if not quiet:
                self._write(world, ends, nic)
            secured = self._secure(ends, problems, every=not quiet)
            # Frames flow from here on: the tables know every port.
            if not quiet:
                self.inquiries.know(
                    {
                        self.slots["port", id]: Asker(end.index, settings, want[port].tap is not None, tag)
                        for port, end in ends.items()
                        for id, tag, settings in ((port, 0, want[port].settings), *want[port].vlans)
                    }
                )
                self.workloads.open(secured.values())
                problems += self._relay({port: end.index for port, end in secured.items() if want[port].relays})
            self._announce(world, ends, quiet)
            self.inquiries.advertise(time.monotonic())
            if self.guests is not None:
                inside = self.guests.keep(self._places(world, want))
            if not quiet:
                self._remove(want, ends)
                self.kernel.forget_others()
                self.moves.behind(self.kernel, self.slots)
            self._repaired()
            self._world, self._ends, self._nic, self._trunked = world, ends, nic, self._trunks
        except (OSError, NestnetError) as error:
            problems.append(str(error))
            self._read()  # some of the actions may be done
            self._secure(
                self._ends, problems, every=True
            )  # what is open stays secured, whatever is in the way of the rest
        lacking = [self.workloads.lacking] if self.workloads.lacking else []
        for problem in (*problems, *self._warnings, *inside, *lacking):
            if problem not in self.problems:
                say(f"{desired.called}: {problem}")
        if not problems and desired.revision != self.realised:
            if desired.values is not self._desired.values or self._failed:
                say(f"{desired.called}: {len(want)} workloads, {len(world.values)} values")
            self.realised = desired.revision
        self._desired, self._failed = desired, bool(problems)
        self.problems = [*problems, *self._warnings, *inside, *lacking]

    def _places(self, world: World, want: Mapping[int, Attachment]) -> dict[int, Place]:
        """Where ports here have workloads of our making that are to run an agent."""
        found = {}
        for port in want:
            if world.ports[port].agent and want[port].attach is None:
                told = self.workloads.told(port)
                if told:
                    found[port] = Place(told["namespace"], told["inside"])
        return found

    def _write(self, world: World, ends: Mapping[int, links.Link], nic: int) -> None:
        """The tables, where anything is another than before: in the part that has changed, if this machine itself is as
        it was, and all that was to be done was done."""
        known = {port: end.index for port, end in self._ends.items()}
        ready = {port: end.index for port, end in ends.items()}
        ways = {on: (link.index, int(link.mac.replace(":", ""), 16)) for on, link in self._trunks.items()}
        moved = nic != self._nic or self._trunks != self._trunked
        moved = moved or world.machines.get(self.machine) != self._world.machines.get(self.machine)
        if self._failed or moved:
            slots = assign(self.slots, world)
            tables = compile(world, self.machine, ready, nic, slots, ways)
            self.kernel.apply(diff(self.have, tables))
            self._have, self._done = tables, []
            give_back()
        elif world is not self._world or ready != known:
            others = [port for port in known.keys() | ready.keys() if known.get(port) != ready.get(port)]
            old, new = parts(self._world, world, self.machine, others)
            slots = assign_in(self.slots, old, new)
            before = compile(old, self.machine, known, nic, self.slots, ways)
            actions = diff(before, compile(new, self.machine, ready, nic, slots, ways))
            self.kernel.apply(actions)
            self._done += actions
        else:
            return
        self.slots = slots

    def _end_relays(self, want: Mapping[int, Attachment]) -> None:
        """Of ports that lose theirs: while our ends have the address, so that who is connected hears of it."""
        if self.relay is not None:
            kept = {port: index for port, index in self.relay.known.items() if port in want and want[port].relays}
            if kept != self.relay.known:
                self.relay.know(kept)

    def _relay(self, ends: Mapping[int, int]) -> list[str]:
        """The relays of these ports, by id the ifindex of our end. What is in the way."""
        if self.relay is not None:
            return self.relay.know(ends)
        why = "this machine does not reach its controller over TLS, and no `relay` says how others do"
        return [f"port {port}: no relay for its agent: {why}" for port in ends]

    # ---- what others did

    def _check(self) -> bool:
        """Whether pins and tables are as this agent left them. That takes a while: False if it is too soon."""
        now = time.monotonic()
        if now - self._checked < CHECK:
            return False
        self._checked = now
        if pins := self.kernel.pinned_again():
            self.notice("repaired", f"pins were missing in {self.kernel.folder}, and are back: {pins}")
        if drifted := self.kernel.drifted(self.have):
            self.kernel.restore(self.have)
            what = "every table" if len(drifted) >= len(TABLES) else ", ".join(drifted)
            self.notice("repaired", f"somebody had written to {what}: all is as it should be again")
        return True

    def _repaired(self) -> None:
        """Tell what workloads had to have repaired."""
        found, self.workloads.repaired = self.workloads.repaired, []
        for port, what in found[:TELL]:
            self.notice("repaired", f"port {port}: {what}")
        if len(found) > TELL:
            self.notice("repaired", f"the same or the like at {len(found) - TELL} more")

    def _secure(self, ends: Mapping[int, links.Link], problems: list[str], every: bool) -> dict[int, links.Link]:
        """Our programs on our ends and the NICs, once the tables that they read are there. Returns the ends that may be
        opened; one that cannot be secured is closed.

        Who takes a program off is told by nobody. So if not `every` hook is looked at, some are each time."""
        self._secure_nics(problems)
        some = len(ends) // ROUND + 1
        self._looked = 0 if every or self._looked >= len(ends) else self._looked
        chosen = list(ends.items()) if every else list(islice(ends.items(), self._looked, self._looked + some))
        self._looked += some
        secured = {}
        for port, end in chosen:
            try:
                if self.kernel.attach(end.index, "workload") and end.index in self._secured:
                    self.workloads.repaired.append((port, f"the program of {end.name} had been taken off, it is back"))
            except (OSError, NestnetError) as error:
                problems.append(f"port {port}: closed, for there is no program on {end.name}: {error}")
                self._secured.discard(end.index)
                with suppress(OSError):  # it has gone
                    self.workloads.close(port)
            else:
                self._attached[end.index] = "workload"
                self._secured.add(end.index)
                secured[port] = end
        return secured

    def _announce(self, world: World, ends: Mapping[int, links.Link], quiet: bool) -> None:
        """Tell switches of ports that have come to live here, or have another MAC: at once, and some turns more."""
        if not quiet:
            now = trunks.places(world, self.machine, self._trunks, ends.keys())
            fresh = {port: trunks.TIMES for port, place in now.items() if self._announced.get(port) != place}
            self._untold = {port: times for port, times in (self._untold | fresh).items() if port in now}
            self._announced = now
        if not self._untold:
            return
        try:
            trunks.announce(self._announced[port] for port in self._untold)
        except OSError as error:  # its NIC went just now: we shall hear of it
            self._warnings.append(f"switches have not been told of all ports: {error}")
            return
        self._untold = {port: times - 1 for port, times in self._untold.items() if times > 1}

    def _secure_trunks(self) -> None:
        here = {link.index for link in self._trunks.values()}
        for link in self._trunks.values():
            try:
                if self.kernel.attach(link.index, "trunk") and link.index in self._secured:
                    self.notice("repaired", f"{link.name}: its program had been taken off, it is back")
            except (OSError, NestnetError) as error:
                self._warnings.append(f"no program on {link.name}: {error}")
                continue
            self._secured.add(link.index)
            self._attached[link.index] = "trunk"
        for index in [i for i, program in self._attached.items() if program == "trunk" and i not in here]:
            self.kernel.detach(index)
            del self._attached[index]
            self._secured.discard(index)

    def _secure_nics(self, problems: list[str]) -> None:
        self._secure_trunks()
        off = []
        here = set()
        machine = self._latest.machines.get(self.machine)
        vlan = machine.vlan if machine is not None else None
        for name, nic in self._nics.items():
            try:
                back = self.kernel.attach(nic.index, "underlay")
                if vlan is not None:
                    back |= self.kernel.attach(nic.index, "tag") and nic.index in self._tags
                    self._tags.add(nic.index)
                if back and nic.index in self._secured:
                    self.notice("repaired", f"{name}: its program had been taken off, it is back")
            except (OSError, NestnetError) as error:
                off.append(f"no program on {name}: {error}")
            else:
                here.add(nic.index)
        self._secured |= here
        self._attached |= dict.fromkeys(here, "underlay")
        for index in list(self._tags) if vlan is None else list(self._tags - here) if here else ():
            self.kernel.detach(index, egress=True)
            self._tags.discard(index)
        left = [i for i, program in self._attached.items() if program == "underlay" and i not in here] if here else ()
        for index in left:
            self.kernel.detach(index)
            del self._attached[index]
            self._secured.discard(index)
        if here:
            self._warnings += off
        else:
            problems += off

    def sweep(self) -> None:
        """Let the datapath forget what is old, and have the kernel know its neighbours: copies of a broadcast cannot
        wait for an answer to ARP. Who does not answer is asked again each time: behind a link that comes up it may take
        seconds until somebody can, and the kernel gives up before. What goes wrong is a problem until the next turn."""
        now = time.monotonic()
        try:
            if now >= self._sweep_at:
                self.kernel.sweep(now)
                # All that is remembered is looked at: the more there is, the less often.
                self._sweep_at = time.monotonic() + (time.monotonic() - now) * (SWEPT - 1)
            if self._met is not self._world or now - self._met_at > NEIGHBOURS:
                self._met, self._met_at = self._world, now
                self._look()
                asked = list(self._ways.hops)
            else:
                asked = [hop for hop, mac in self._ways.hops.items() if mac is None]
            if asked:
                with links.netlink() as ipr:
                    underlay.confirm(ipr, asked)
        except (OSError, NestnetError) as error:
            self.problems = [*self.problems, f"sweep: {error}"]
            self._failed = True
            say(self.problems[-1])

    def follow(self) -> bool:
        """The underlay has changed, perhaps. True if NICs came or went, or there is another error: time for a turn."""
        try:
            before, warnings = (self._nics, self._trunks), self._warnings
            self._underlay(self._world, [])
            self._look()
        except (OSError, NestnetError) as error:
            say(f"underlay: {error}")
            return True
        return (before, warnings) != ((self._nics, self._trunks), self._warnings)

    def _look(self) -> None:
        """Have flows composed again to each machine whose next hops, or their MACs, are others now (rule 16)."""
        others = {m.id: m.address for m in self._world.machines.values() if m.id != self.machine}
        ways, self._ways = self._ways, underlay.Ways()  # should this fail, all is news the next time
        with links.netlink() as ipr:
            changed = ways.look(ipr, others)
            slots = sorted(slot for id in changed if (slot := self.slots.get(("machine", id))))
            if slots:
                self.kernel.apply([Bump("machine", np.array(slots, "u4")), Epoch()])
            self._ways = ways
            # Floods cannot wait for one that is not known yet.
            underlay.confirm(ipr, {resolved.hop for id in changed for resolved in ways.known[id]})

    @property
    def interest(self) -> underlay.Interest:
        """What the underlay is watched for."""
        machine = self._world.machines.get(self.machine)
        named = {*machine.nics, *(trunk.nic for trunk in machine.trunks)} if machine else set()
        return underlay.Interest(self._ways.hops, frozenset(self._nics) | named)

    def ports(self) -> dict[str, dict[str, Any]]:
        """What the controller is told of each local port, by its id: where it hangs, and what was dropped by reason."""
        drops = self.kernel.drops()
        said = (self._ends, self.slots, drops)
        if all(new is old for new, old in zip(said[:2], self._said[:2], strict=True)) and drops == self._said[2]:
            return cast("dict[str, dict[str, Any]]", self._said[3])
        ports: dict[str, dict[str, Any]] = {
            str(port): {"interface": end.name, **self.workloads.told(port), "drops": {}}
            for port, end in self._ends.items()
        }
        for behind in self._world.ports.values():
            if behind.trunk in self._ends:
                ports[str(behind.id)] = {**ports[str(behind.trunk)], "drops": {}}
        of = self._port_of()
        for (slot, reason), packets in drops.items():
            # Slot 0: came in before its port was known, or from the wire for nobody here.
            port = ports.setdefault(str(of.get(slot, 0)), {"drops": {}})
            name = NAMES.get(reason, str(reason))
            port["drops"][name] = port["drops"].get(name, 0) + packets
        self._said = (*said, ports)
        return ports

    def _port_of(self) -> dict[int, int]:
        """Slot -> port id, worked out once for all the ports that there are."""
        if self._ids is None or self._ids[0] is not self.slots:
            self._ids = self.slots, self.slots.ids("port")
        return self._ids[1]

    def _underlay(self, world: World, problems: list[str]) -> int:
        """The ifindex of the NIC, or the first of them; 0 when there is none.

        One of several that is not there is a warning: the machine does what it should by the others."""
        machine = world.machines.get(self.machine)
        if machine is None:
            problems.append("the controller does not know this machine any more")
            return 0
        with links.netlink() as ipr:
            found = underlay.nics(ipr, machine)
            if not found.links and self._seat is not None and self._seat.put_back(ipr, machine.address):
                self.notice("repaired", f"{self._seat.interface} had gone from {self._seat.name}, it is back")
                found = underlay.nics(ipr, machine)
            self._seat = underlay.seat(ipr, machine.address) or self._seat
            nics = {link.index for link in found.links.values()}
            self._trunks, wrong = trunks.find(ipr, world, self.machine, nics)
            used = [link.index for on, link in self._trunks.items() if trunks.riding(world, on)]
            trunks.hear(ipr, self.kernel.folder.parent, used)
        links.set_sysctls(links.sysctls_of_nics(found.links, machine.address.version))
        if not self._nics:  # an agent before this one may have had others
            self._attached |= {index: name for index, name in self.kernel.attached().items() if name == "underlay"}
        self._nics = found.links
        self._warnings = [*(found.missing if found.links else ()), *wrong]
        problems += [] if found.links else found.missing
        return next((link.index for link in found.links.values()), 0)

    def _remove(self, want: Mapping[int, Attachment], ends: Mapping[int, links.Link]) -> None:
        """Workloads of ports that have gone or moved away. Only called when the world is whole."""
        there = self.workloads.actual()
        kept = {end.link.index for port, end in there.items() if port in want} | {end.index for end in ends.values()}
        if any(port not in want for port in there):
            # Before their programs come off: what then came in would be for the machine's own stack.
            self.workloads.remove(want)
        # Also those whose interface is gone: in a lab a port's new machine takes its workload over by itself.
        for index in [i for i, program in self._attached.items() if program == "workload" and i not in kept]:
            self.workloads.release(index)
            self.kernel.detach(index)
            del self._attached[index]
            self._secured.discard(index)
