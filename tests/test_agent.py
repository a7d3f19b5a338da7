"""The agent's turn, without a kernel: what it does with a wish when something fails on the way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from queue import Queue
from typing import Any, cast

import pytest

from nestnet.agent import links
from nestnet.agent.agent import SHARE, Agent, Pace, Reports
from nestnet.agent.attachments import Attachment, End, Workloads
from nestnet.agent.feed import Desired
from nestnet.agent.metrics import Measured, families
from nestnet.compile.tables import Tables, empty
from nestnet.model.errors import Unreachable
from nestnet.model.values import Machine, Network, Port, Segment, World

BEFORE = World.of(
    [
        Machine(1, IPv4Address("192.0.2.1")),
        Network(10, mtu=1450),
        Segment(20, 10, 100, (IPv4Network("10.0.0.0/24"),)),
        Port(40, 10, 20, 1, 0x020000000001, (IPv4Address("10.0.0.5"),)),
    ]
)
AFTER = BEFORE.without(("port", 40))


@dataclass
class Memory:
    """A kernel that takes everything."""

    actions: list[Any] = field(default_factory=list)
    store: str | None = None

    def read(self) -> Tables:
        return empty()

    def apply(self, actions: list[Any]) -> None:
        self.actions.append(actions)

    def pinned_again(self) -> int:
        return 0

    def drifted(self, _: Tables) -> list[str]:
        return []

    def forget_others(self) -> None: ...

    def detach(self, index: int, *, egress: bool = False) -> None: ...

    def attached(self, **_: Any) -> dict[int, str]:
        return {}


class Silent:
    """Nobody asks anything."""

    def know(self, askers: Mapping[int, Any]) -> None: ...

    def advertise(self, now: float) -> None: ...


class Still:
    """Nothing moves."""

    def before(self, *_: Any) -> None: ...

    def behind(self, *_: Any) -> None: ...


@dataclass
class Asked(Workloads):
    """Workloads that remember what was wanted, and fail to open as often as they are told."""

    wanted: list[list[int]] = field(default_factory=list)
    failures: int = 0

    def prepare(self, want: Mapping[int, Attachment]) -> tuple[dict[int, links.Link], dict[int, str]]:
        self.wanted.append(sorted(want))
        return {}, {}

    def open(self, ends: Iterable[links.Link]) -> None:
        assert not list(ends)
        if self.failures:
            self.failures -= 1
            raise OSError(19, "No such device")

    def actual(self) -> dict[int, End]:
        return {}


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    monkeypatch.setattr(Agent, "_underlay", cast("Callable[..., int]", lambda *_: 1))
    return Agent(1, cast("Any", Memory()), Asked("none."), cast("Any", Silent()), cast("Any", Still()))


def test_a_turn_that_failed_is_tried_again_with_what_is_wanted_now(agent: Agent) -> None:
    """Not with what was wanted before, and never reported as realised until it is."""
    workloads = cast("Asked", agent.workloads)
    agent.converge(Desired(BEFORE.values, 1, whole=True))
    assert agent.realised == 1
    workloads.failures = 2
    after = Desired(AFTER.values, 2, whole=True)
    for _ in range(2):
        agent.converge(after)
        assert agent.realised == 1
        assert "No such device" in agent.problems[0]
    agent.converge(after)
    assert (agent.realised, agent.problems) == (2, [])
    assert workloads.wanted == [[40], [], [], []]


def of_ports(count: int) -> World:
    """A machine with so many ports."""
    ports = [
        Port(40 + place, 10, 20, 1, 0x020000000001 + place, (IPv4Address("10.0.0.5") + place,))
        for place in range(count)
    ]
    return World.of([value for key, value in BEFORE.values.items() if key[0] != "port"] + ports)


def test_what_another_store_does_not_know_is_held_back_until_somebody_agrees(agent: Agent) -> None:
    whole = Desired(of_ports(5).values, 7, whole=True, store="before")
    agent.converge(whole)
    assert (agent.realised, agent.held, agent.kernel.store) == (7, None, "before")
    actions = len(cast("Memory", agent.kernel).actions)
    lacking = Desired(of_ports(3).values, 1_000_007, whole=True, store="restored")
    for _ in range(2):
        agent.converge(lacking)
        assert agent.held is not None
        assert "knows nothing of 2 of the 5 ports here" in agent.held
        assert (agent.realised, agent.kernel.store) == (7, "before")
        assert len(cast("Memory", agent.kernel).actions) == actions
    agent.converge(Desired(lacking.values, 1_000_008, whole=True, store="restored", confirmed=True))
    assert (agent.realised, agent.held, agent.kernel.store) == (1_000_008, None, "restored")


def test_a_store_that_lacks_little_or_has_more_is_taken_as_it_is(agent: Agent) -> None:
    agent.converge(Desired(of_ports(5).values, 7, whole=True, store="a"))
    agent.converge(Desired(of_ports(4).values, 8, whole=True, store="b"))
    assert (agent.realised, agent.held) == (8, None)
    agent.converge(Desired(of_ports(9).values, 9, whole=True, store="c"))
    assert (agent.realised, agent.held) == (9, None)
    agent.converge(Desired(of_ports(1).values, 10, whole=True, store="c"))
    assert (agent.realised, agent.held) == (10, None), "the same store may take away what it likes"


def test_a_word_for_a_revision_is_realised_like_a_number(agent: Agent, capfd: pytest.CaptureFixture[str]) -> None:
    """With every heartbeat comes another one: that is known at once, nothing is written again, and nothing said."""
    desired = Desired(BEFORE.values, "one", whole=True, token="one")
    agent.converge(desired)
    assert agent.realised == "one"
    assert "the feed: 1 workloads, 4 values" in capfd.readouterr().err
    actions = len(cast("Memory", agent.kernel).actions)
    heard = desired.after({"revision": "two", "token": "two", "store": "a", "confirmed": False})
    assert heard == Desired(BEFORE.values, "two", whole=True, token="two", store="a")
    agent.converge(heard)
    assert (agent.realised, len(cast("Memory", agent.kernel).actions)) == ("two", actions)
    assert capfd.readouterr().err == ""
    assert "nestnet_realised_revision" not in {one.name for one in families(Measured(realised=agent.realised))}
    with pytest.raises(TypeError):
        desired.after({"revision": None})


def test_a_storm_of_drops_is_told_once(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("nestnet.agent.agent.time.monotonic", lambda: now)
    for packets in (0, 100, 9000, 19000):
        agent._storms({"policy_denied": packets})
        now += 2
    assert agent.noticed == [("drops", "4,450 packets/s dropped: policy_denied")]


def test_the_underlay_is_looked_at_at_once_but_not_all_the_time() -> None:
    """A few changes are followed without a pause; if they never end, one part in SHARE of the time."""
    pace, now, looking = Pace(), 1000.0, 0.0
    for look in range(1000):
        now = max(now, pace.next)
        assert look > 15 or now == pytest.approx(1000 + 0.01 * look), "at once"
        pace.took(now, now + 0.01)
        now, looking = now + 0.01, looking + 0.01
    assert looking / (now - 1000) == pytest.approx(1 / SHARE, rel=0.1)
    pace.took(now + 60, now + 60.01)
    assert pace.next == pytest.approx(now + 60.01), "after a rest"


@dataclass
class Slow:
    """A controller that answers a report when it is let: whether it takes it is said by `answers`."""

    answers: Queue[bool] = field(default_factory=Queue)
    told: Queue[tuple[int, Any, list[tuple[str, str]], str | None]] = field(default_factory=Queue)

    def report(self, _: str, revision: int, __: Any, ports: Any, events: Any, *, key: str | None) -> None:
        self.told.put((revision, ports, list(events), key))
        if not self.answers.get():
            raise Unreachable("no controller answers")


def test_a_machine_does_not_wait_until_its_report_has_arrived(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what may not have arrived is told again, events with the key that they had."""
    ports: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(agent, "ports", lambda: dict(ports))
    slow = Slow()
    reports = Reports(cast("Any", slow), "m1")
    agent.notice("started", "one")
    agent.realised = 1
    reports.turn(agent)
    _, _, _, key = first = slow.told.get(timeout=10)
    assert first == (1, {}, [("started", "one")], key)
    assert key is not None

    for agent.realised in (2, 3):  # It has not been answered.
        ports["40"] = {"drops": {}}
        agent.notice("drops", f"at {agent.realised}")
        reports.turn(agent)
    slow.answers.put(False)
    assert slow.told.get(timeout=10) == (3, ports, [("started", "one")], key), "the last of what waited"
    reports.turn(agent)
    slow.answers.put(True)
    assert slow.told.get(timeout=10) == (3, ports, [], None), "all again, as one was lost"
    slow.answers.put(True)
    reports.turn(agent)
    revision, whole, events, other = slow.told.get(timeout=10)
    assert (revision, whole, events) == (3, None, [("drops", "at 2"), ("drops", "at 3")])
    assert other not in (None, key)
    slow.answers.put(True)
    reports.turn(agent)
    agent.realised = 4
    reports.turn(agent)
    assert slow.told.get(timeout=10)[:2] == (4, None), "nothing was told while there was no news"


def test_what_is_free_is_the_kernels_again() -> None:
    """Also in pieces between what stays."""
    code = """
import resource
from pathlib import Path
from nestnet.agent.memory import give_back

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

before = resident()
blocks = [bytearray(b"x" * (100 << 10)) for _ in range(1000)]
del blocks[::2]
kept = resident() - before
give_back()
print(kept, resident() - before)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    kept, left = map(int, said.split())
    assert left < 60 << 20 < 90 << 20 < kept
