"""How fast a TCP connection is through nestnet, as a ratio to the peer and to no overlay at all: `make bench`.

Single runs of two seconds differ by 20 % between two beds that are the same. So all paths are measured in one run, in
windows of 0.2 s that take turns, in reversed order every other round, and what is reported is the median over the
rounds of the ratio *within* a round, with a bootstrap 95 % interval. One row, A/A, is the reference path against a
second set of connections on the same bed: what it differs from 1 by is what no row may be believed to.

The run is worth something only if it was right and undisturbed: see `gates`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.beds import BEDS, MTU
from bench.traffic import Listener, Route, receiver, stay_on

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "bare": "machine to machine, no overlay",
    "peer": "Linux bridge + kernel VXLAN",
    "ours": "nestnet",
    "ours6": "nestnet, machines with IPv6 addresses",
    "tagged": "nestnet, machines in a VLAN of the wire",
    "ends": "nestnet, programs on the workloads that do nothing",
    "trunk": "nestnet, workloads on trunks",
    "riding": "nestnet, tags in a transparent segment",
}
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


KINDS = (
    Kind("stream", "TCP stream, 1 connection", Route.streamed, "all", 8e-9, "Gb/s", 2),
    Kind("request", "TCP request/response, 1 byte", Route.exchanged, "one", 1, "per second", 0),
)


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


def table(kind: Kind, where: str, samples: dict[str, list[Sample]], rows: dict[str, str], reference: str) -> list[str]:
    """The rows of one kind, as a Markdown table."""
    columns = [
        "",
        kind.unit,
        f"to {reference}",
        *(["to bare"] if "bare" in samples else []),
        f"CPU s per {cost_unit(kind)}",
    ]
    lines = [f"{kind.title}, {where}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, label in rows.items():
        middle = statistics.median(sample.rate for sample in samples[name]) * kind.scale
        cells = [label, f"{middle:.{kind.decimals}f}", str(ratio(samples[name], samples[reference]))]
        if "bare" in samples:
            cells.append(str(ratio(samples[name], samples["bare"])))
        cells.append(f"{cost(kind, samples[name]):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def cost_unit(kind: Kind) -> str:
    return "GB" if kind.name == "stream" else "100,000"


def cost(kind: Kind, samples: Sequence[Sample]) -> float:
    """CPU seconds of the whole computer, both ends and the generator, per unit of work."""
    unit = 1e9 if kind.name == "stream" else 1e5
    return (
        statistics.fmean(sample.busy for sample in samples) / statistics.fmean(sample.rate for sample in samples) * unit
    )


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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=80, help="windows of each path (80)")
    parser.add_argument("--window", type=float, default=0.2, help="seconds of a window (0.2)")
    parser.add_argument("--paths", default="bare,peer,ours", help="which beds to make (bare,peer,ours); ours6")
    parser.add_argument("--reference", default="peer", help="what ratios are to (peer)")
    parser.add_argument("--cpus", choices=("one", "all"), help="where all traffic runs (streams: all, requests: one)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (bench/results)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    names = options.paths.split(",")
    if unknown := set(names) - set(BEDS):
        sys.exit(f"unknown path {sorted(unknown)[0]!r}: one of {', '.join(BEDS)}")
    if options.reference not in names:
        sys.exit(f"the reference {options.reference!r} is not among the paths")
    twice = "ours" if "ours" in names else options.reference
    cpus = sorted(os.sched_getaffinity(0))
    placed = {kind.name: options.cpus or kind.cpus for kind in KINDS}
    with contextlib.ExitStack() as stack:
        beds = {name: stack.enter_context(BEDS[name]()) for name in names}
        paths = {name: Route(bed) for name, bed in beds.items()}
        again = f"{twice} again"
        paths[again] = Route(beds[twice])
        for path in paths.values():
            stack.callback(path.close)
        foreign = {name: Listener(bed.foreign) for name, bed in beds.items() if bed.foreign}
        for listener in foreign.values():
            stack.callback(listener.close)
        reader = stack.enter_context(receiver(list(paths.values())))
        sound = all(proves_itself(path) for path in paths.values())
        before = cpu_times()
        samples = {}
        for kind in KINDS:
            for pid in (os.getpid(), reader):
                stay_on(pid, set(cpus if placed[kind.name] == "all" else cpus[-1:]))
            samples[kind.name] = measure(kind, paths, options.rounds, options.window)
        after = cpu_times()
        heard = {name: listener.packets() for name, listener in foreign.items()}
        steal = (after[1] - before[1]) / (after[2] - before[2])
        a_a = [ratio(samples[kind.name][again], samples[kind.name][twice]) for kind in KINDS]
        wrong = gates(paths, heard, sound, steal, a_a)
        retransmitted = {name: path.retransmitted() for name, path in paths.items()}

    rows = {name: LABELS[name] for name in names}
    report = [
        f"{options.rounds} rounds of {options.window} s, MTU {MTU}, median (95 % interval) of the ratios per round",
        "",
    ]
    for kind, same in zip(KINDS, a_a, strict=True):
        where = "all CPUs" if placed[kind.name] == "all" else "one CPU"
        report += table(kind, where, samples[kind.name], rows, options.reference)
        report += [f"A/A: {LABELS[twice]} again, to itself: {same}", ""]
    report.append(
        f"Checksums {'right' if sound else 'WRONG'}; packets heard in other networks: {sum(heard.values())}; "
        f"CPU time taken by the hypervisor: {steal:.1%}; segments sent again: "
        + ", ".join(f"{name} {count}" for name, count in retransmitted.items())
    )
    report += [f"VOID: {reason}" for reason in wrong]
    print("\n".join(report))

    taken = datetime.now(UTC)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"throughput-{taken:%Y%m%d-%H%M%S}.json"
    file.write_text(
        json.dumps(
            {
                "taken": taken.isoformat(timespec="seconds"),
                "kernel": platform.release(),
                "cpus": len(cpus),
                "cpus_used": placed,
                "rounds": options.rounds,
                "window": options.window,
                "mtu": MTU,
                "reference": options.reference,
                "void": wrong,
                "steal": round(steal, 5),
                "heard_elsewhere": heard,
                "retransmitted": retransmitted,
                "ratios": {
                    kind.name: {
                        f"{name} / {below}": dataclasses.asdict(
                            ratio(samples[kind.name][name], samples[kind.name][below])
                        )
                        for below in dict.fromkeys([options.reference, *(["bare"] if "bare" in names else []), twice])
                        for name in paths
                        if name != below
                    }
                    for kind in KINDS
                },
                # Bytes or transactions per second, and busy CPUs, of each window in the order of the rounds.
                "samples": {
                    kind: {
                        name: {
                            "rate": [round(sample.rate) for sample in windows],
                            "busy": [round(sample.busy, 2) for sample in windows],
                        }
                        for name, windows in by_path.items()
                    }
                    for kind, by_path in samples.items()
                },
            },
            separators=(",", ":"),
        )
        + "\n"
    )
    print(f"{file}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
