"""How rows are measured: windows that take turns, ratios within a round, gates.

Single runs of two seconds differ by 20 % between two beds that are the same. So all paths are measured in one run, in
windows of 0.2 s that take turns, in reversed order every other round, and what is reported is the median over the
rounds of the ratio *within* a round, with a bootstrap 95 % interval. One row, A/A, is a path against a second set of
connections on the same bed: what it differs from 1 by is what no row may be believed to.

The run is worth something only if it was right and undisturbed: see `gates`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from nestnet.bench.traffic import STREAMS, Bed, Listener, Route, receiver, stay_on

A_A = (0.95, 1.05)  # outside of this the run is void
STEAL = 0.02  # of all CPU time


@dataclasses.dataclass(frozen=True)
class Kind:
    """A row of traffic: how a window of it is run, and how its rate is written."""

    name: str
    title: str
    window: Callable[[Route, float], float]
    cpus: str  # where it runs, unless --cpus says otherwise: see bench/README.md
    scale: float
    unit: str
    decimals: int


KINDS = {
    kind.name: kind
    for kind in (
        Kind("request", "TCP request/response, 1 byte", Route.exchanged, "one", 1, "per second", 0),
        Kind("hurried", "TCP request/response, one over p99", Route.hurried, "one", 1, "per second", 0),
        Kind("stream", "TCP stream, 1 connection", Route.streamed, "all", 8e-9, "Gb/s", 2),
        Kind("streams", f"TCP stream, {STREAMS} connections", Route.streamed_by_all, "all", 8e-9, "Gb/s", 2),
        Kind("small", "UDP, frames of 64 bytes", Route.small, "one", 1, "per CPU second", 0),
        Kind("connect", "new TCP connections", Route.connected, "one", 1, "per second", 0),
    )
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One window: its rate (bytes or transactions per second), and CPU seconds of the whole computer per second."""

    rate: float
    busy: float


@dataclasses.dataclass(frozen=True)
class Interval:
    """A median with its bootstrap 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def cpu_times() -> tuple[float, float, float]:
    """Seconds since boot that all CPUs were busy, were taken by the hypervisor, and all."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, idle, iowait, irq, softirq, steal = (tick / os.sysconf("SC_CLK_TCK") for tick in ticks)
    busy = user + nice + system + irq + softirq
    return busy, steal, busy + idle + iowait + steal


def window(kind: Kind, path: Route, seconds: float) -> Sample:
    busy, start = cpu_times()[0], time.perf_counter()
    with path.bed.during():
        rate = kind.window(path, seconds)
    return Sample(rate, (cpu_times()[0] - busy) / (time.perf_counter() - start))


def measure(kind: Kind, paths: dict[str, Route], rounds: int, seconds: float) -> dict[str, list[Sample]]:
    """`rounds` windows of each path, in turns."""
    samples: dict[str, list[Sample]] = {name: [] for name in paths}
    for path in paths.values():
        kind.window(path, seconds)  # windows and caches grow to their size; not counted
    for number in range(rounds):
        order = list(paths) if number % 2 == 0 else list(reversed(paths))
        for name in order:
            samples[name].append(window(kind, paths[name], seconds))
        if sys.stderr.isatty():
            print(f"\r{kind.title}: round {number + 1} of {rounds}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return samples


def ratio(above: Sequence[Sample], below: Sequence[Sample]) -> Interval:
    """The median of the ratios per round. The resampling has a fixed seed: the same samples give the same interval."""
    import numpy as np  # not before the receiver is forked: numpy starts threads

    ratios = np.array([a.rate / b.rate for a, b in zip(above, below, strict=True)])
    draws = np.random.default_rng(1).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
    return Interval(float(np.median(ratios)), float(low), float(high))


def proves_itself(path: Route) -> bool:
    """Does a listener where the traffic *does* go hear it? Else silence elsewhere would say nothing."""
    listener = Listener(path.bed.server.namespace)
    with contextlib.closing(listener):
        return path.check() and listener.packets() > 0


def gates(paths: dict[str, Route], heard: dict[str, int], sound: bool, steal: float, a_a: list[Interval]) -> list[str]:
    """Why the run is void; empty when it stands."""
    wrong = []
    if not sound:
        wrong.append("a payload did not arrive as it was sent")
    for name, count in heard.items():
        if count:
            wrong.append(f"{name}: {count} packets reached another network")
    for name, path in paths.items():
        if not path.check():
            wrong.append(f"{name}: a payload did not arrive as it was sent, after the run")
    if steal > STEAL:
        wrong.append(f"{steal:.1%} of the CPU time was taken by the hypervisor, more than {STEAL:.0%}")
    return wrong + [
        f"the same path differs from itself: A/A is {interval}"
        for interval in a_a
        if not A_A[0] <= interval.median <= A_A[1]
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """What was measured. `samples` by kind and path; `again` is the path that was measured twice, `void` why nothing
    of it counts, `steal` the part of the CPU time that a hypervisor took."""

    samples: dict[str, dict[str, list[Sample]]]
    again: str
    void: list[str]
    steal: float
    heard: dict[str, int]
    retransmitted: dict[str, int]

    def ratio(self, kind: str, path: str, below: str) -> Interval:
        return ratio(self.samples[kind][path], self.samples[kind][below])


def compare(
    beds: Mapping[str, Bed],
    kinds: Collection[Kind],
    again: str,
    rounds: int,
    seconds: float = 0.2,
    cpus: str | None = None,
) -> Run:
    """All kinds of traffic on all beds. `again` names the bed that is measured a second time, as "NAME again"."""
    own = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        paths = {name: Route(bed) for name, bed in beds.items()}
        paths[f"{again} again"] = Route(beds[again])
        for path in paths.values():
            stack.callback(path.close)
        foreign = {name: Listener(bed.foreign) for name, bed in beds.items() if bed.foreign}
        for listener in foreign.values():
            stack.callback(listener.close)
        reader = stack.enter_context(receiver(list(paths.values())))
        sound = all(proves_itself(path) for path in paths.values())
        before = cpu_times()
        samples = {}
        for kind in kinds:
            for pid in (os.getpid(), reader):
                stay_on(pid, set(own if (cpus or kind.cpus) == "all" else own[-1:]))
            samples[kind.name] = measure(kind, paths, rounds, seconds)
        for pid in (os.getpid(), reader):
            stay_on(pid, set(own))
        after = cpu_times()
        heard = {name: listener.packets() for name, listener in foreign.items()}
        steal = (after[1] - before[1]) / (after[2] - before[2])
        a_a = [ratio(samples[kind.name][f"{again} again"], samples[kind.name][again]) for kind in kinds]
        wrong = gates(paths, heard, sound, steal, a_a)
        retransmitted = {name: path.retransmitted() for name, path in paths.items()}
    return Run(samples, again, wrong, steal, heard, retransmitted)
