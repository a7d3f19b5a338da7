"""What really stacked VXLAN costs: TCP streams through levels of `carriage: encapsulated`, beside kernel VXLAN devices.

The same shape twice (towers.py): at each level two namespaces, each with a veth into the one below, where it is
encapsulated to the other side; 50 bytes a level on a wire of MTU 9000. One is a `nestnet` lab, with an agent in each
namespace that hosts; the other a bridge and a point-to-point VXLAN device in each. All in one run, by the windows of
throughput.py; the ratio that counts is ours to the kernel at the same depth.

Twice: with the offloads that the machines' NICs on the wire are made with, and without any that segments or collects.

    python -m nestnet.bench.stacked [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import socket
import statistics
import struct
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nestnet.agent import netns
from nestnet.bench.beds import run
from nestnet.bench.depth import overhead
from nestnet.bench.method import KINDS, Interval, Sample, cpu_times, gates, measure, proves_itself, ratio
from nestnet.bench.report import RESULTS
from nestnet.bench.towers import DEEP_LAB, HAND, JUMBO, OVERHEAD, by_hand, ours
from nestnet.bench.traffic import Bed, Listener, Route, receiver

DEPTHS = (1, 2, 3, 6, 10)
WIRES = {"ours": netns.path(f"nn-{DEEP_LAB}"), "kernel": netns.path(f"{HAND}wire")}
MACHINES = {
    "ours": tuple(netns.path(f"nn-{DEEP_LAB}.{name}") for name in ("m1", "m2")),
    "kernel": tuple(netns.path(f"{HAND}{name}") for name in ("m1", "m2")),
}
TWICE, AGAIN = ("ours 3", "kernel 3"), " again"  # what the method can tell apart, of both, where there is a target
STUCK = 20  # seconds without a byte, then the run is over

# The offloads of a NIC that segments nothing and collects nothing: as ethtool sets them, and as it shows them.
OFFLOADS = {
    "tso": "tcp-segmentation-offload",
    "gso": "generic-segmentation-offload",
    "gro": "generic-receive-offload",
    "tx-udp_tnl-segmentation": "tx-udp_tnl-segmentation",
    "tx-udp_tnl-csum-segmentation": "tx-udp_tnl-csum-segmentation",
}


@dataclasses.dataclass(frozen=True)
class Half:
    """A part of the run: which offloads the NICs on the wire have, and by depth how many times the kernel's rate is
    wanted."""

    name: str
    title: str
    offloads: dict[str, bool]
    targets: dict[int, float]


AS_MADE = dict.fromkeys(OFFLOADS, True) | {"gro": False}  # of a veth
HALVES = (
    Half("on", "NICs on the wire with the offloads they are made with", AS_MADE, {3: 10, 10: 30}),
    Half("off", f"NICs on the wire with {', '.join(OFFLOADS)} off", dict.fromkeys(OFFLOADS, False), {3: 2, 10: 6}),
)


def offloads(machine: Path) -> dict[str, bool]:
    """Which of the offloads a machine's NIC has now."""
    [found] = json.loads(netns.run_in(machine, lambda: run("ethtool", "--json", "-k", "eth0")))
    return {name: found[shown]["active"] for name, shown in OFFLOADS.items()}


def switch_off(machine: Path) -> None:
    words = [word for name in OFFLOADS for word in (name, "off")]
    netns.run_in(machine, lambda: run("ethtool", "-K", "eth0", *words))


class Stuck(Exception):
    """A path carried nothing for so long that no more will come."""


class Impatient(Route):
    """A path with a name that does not wait for ever. It is the kernel that looks at the clock: no call is added."""

    def __init__(self, name: str, bed: Bed) -> None:
        self.name = name
        try:
            super().__init__(bed)
        except TimeoutError as error:
            raise Stuck(f"{name}: no connection") from error
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self.stream.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STUCK, 0))

    def streamed(self, seconds: float) -> float:
        with self._said():
            return super().streamed(seconds)

    def check(self) -> bool:
        with self._said():
            return super().check()

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:
            raise Stuck(f"{self.name}: nothing came through for {STUCK} s") from error


# As in throughput.py, through the method that a path has.
STREAM = dataclasses.replace(KINDS["stream"], window=lambda path, seconds: path.streamed(seconds))


def shape(bed: Bed, wire: Path) -> tuple[int, int]:
    """Bytes of headers on the wire around a workload's frame, and the workload's MTU."""
    [link] = json.loads(netns.run_in(bed.client.namespace, lambda: run("ip", "--json", "link", "show", "eth0")))
    return overhead(bed, wire), int(link["mtu"])


def table(
    half: Half, samples: dict[str, list[Sample]], shapes: dict[str, tuple[int, int]]
) -> tuple[list[str], list[str]]:
    """The lines of a half, and the targets that it missed."""
    lines = [
        f"{half.title}\n",
        "| depth | ours, Gb/s | kernel, Gb/s | ours to kernel | target | MTU | headers, bytes |",
    ]
    lines.append("|---" * 7 + "|")
    missed = []
    for depth in DEPTHS:
        mine, kernel = samples[f"ours {depth}"], samples[f"kernel {depth}"]
        found, target = ratio(mine, kernel), half.targets.get(depth)
        rates = (statistics.median(each.rate for each in windows) * STREAM.scale for windows in (mine, kernel))
        wanted = f"at least {target:g}" if target else ""
        cells = (str(depth), *(f"{rate:.2f}" for rate in rates), str(found), wanted)
        headers, mtu = shapes[f"ours {depth}"]
        lines.append(f"| {' | '.join(cells)} | {mtu} | {headers} |")
        if target and found.median < target:
            missed.append(f"offloads {half.name}, depth {depth}: {found} times the kernel, not {target:g}")
    return lines, missed


@dataclasses.dataclass
class Part:
    """What a half measured: windows of each path, the A/A ratios, and why it is void."""

    samples: dict[str, list[Sample]]
    a_a: dict[str, Interval]
    steal: float
    wrong: list[str]


def part(half: Half, paths: dict[str, Route], foreign: dict[str, Listener], rounds: int, window: float) -> Part:
    sound = not [name for name, path in paths.items() if not proves_itself(path)]  # each is tried
    before = cpu_times()
    samples = measure(STREAM, paths, rounds, window)
    after = cpu_times()
    steal = (after[1] - before[1]) / (after[2] - before[2])
    heard = {name: listener.packets() for name, listener in foreign.items()}
    a_a = {name: ratio(samples[name + AGAIN], samples[name]) for name in TWICE}
    wrong = gates(paths, heard, sound, steal, list(a_a.values()))
    for name, machines in MACHINES.items():
        for machine in machines:
            if (found := offloads(machine)) != half.offloads:
                wrong.append(f"{name}: the NIC of {machine.name} has {found}, not {half.offloads}")
    return Part(samples, a_a, steal, [f"offloads {half.name}: {reason}" for reason in wrong])


def run_all(rounds: int, window: float) -> tuple[list[Part], dict[str, tuple[int, int]], list[str]]:
    """Both halves, the shape of each path, and what is wrong with the shapes. Raises Stuck."""
    with contextlib.ExitStack() as stack:
        towers = {"ours": stack.enter_context(ours(DEPTHS, encapsulated=True))}
        towers["kernel"] = stack.enter_context(by_hand(DEPTHS))
        beds = {f"{name} {depth}": towers[name][depth] for depth in DEPTHS for name in towers}
        paths: dict[str, Route] = {}
        for name, bed in (*beds.items(), *((name + AGAIN, beds[name]) for name in TWICE)):
            paths[name] = Impatient(name, bed)
            stack.callback(paths[name].close)
        foreign = {name: Listener(bed.foreign) for name, bed in beds.items() if bed.foreign}
        for listener in foreign.values():
            stack.callback(listener.close)
        stack.enter_context(receiver(list(paths.values())))
        shapes = {name: shape(bed, WIRES[name.split()[0]]) for name, bed in beds.items()}
        wrong = []
        for name, (headers, mtu) in shapes.items():
            depth = int(name.split()[1])
            if (headers, mtu) != (OVERHEAD * depth, JUMBO - OVERHEAD * depth):
                wrong.append(f"{name}: {headers} bytes of headers, and an MTU of {mtu}")
        parts = []
        for half in HALVES:
            if half.name == "off":
                for machines in MACHINES.values():
                    for machine in machines:
                        switch_off(machine)
            parts.append(part(half, paths, foreign, rounds, window))
    return parts, shapes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nestnet.bench.stacked", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=80, help="windows of each path in each half (80)")
    parser.add_argument("--window", type=float, default=0.2, help="seconds of a window, at least (0.2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (docs/performance)")
    options = parser.parse_args()
    try:
        parts, shapes, wrong = run_all(options.rounds, options.window)
    except Stuck as error:
        print(f"VOID: {error}")
        return 1
    missed = []
    ratios = {}
    print(
        f"{options.rounds} rounds of {options.window} s; TCP stream, 1 connection, all CPUs; ratios per round, ", end=""
    )
    print("median (95 % interval)\n")
    for half, found in zip(HALVES, parts, strict=True):
        lines, short = table(half, found.samples, shapes)
        print("\n".join(lines))
        for name, same in found.a_a.items():
            print(f"\nA/A, {name} to itself: {same}", end="")
        print(f"\nCPU time taken by the hypervisor: {found.steal:.1%}\n")
        missed += short
        wrong += found.wrong
        pairs = [(f"ours {depth}", f"kernel {depth}") for depth in DEPTHS] + [(name + AGAIN, name) for name in TWICE]
        ratios[half.name] = {
            f"{above} / {below}": dataclasses.asdict(ratio(found.samples[above], found.samples[below]))
            for above, below in pairs
        }
    for line in (*(f"VOID: {reason}" for reason in wrong), *(f"MISSED: {reason}" for reason in missed)):
        print(line)
    taken = datetime.now(UTC)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"stacked-{taken:%Y%m%d-%H%M%S}.json"
    said: dict[str, Any] = {
        "taken": taken.isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
    }
    said |= {"rounds": options.rounds, "window": options.window, "void": wrong, "missed": missed}
    said |= {"off": list(OFFLOADS), "targets": {half.name: half.targets for half in HALVES}}
    said |= {"shapes": shapes, "ratios": ratios}
    said["steal"] = {half.name: round(found.steal, 5) for half, found in zip(HALVES, parts, strict=True)}
    # Bytes per second of each window in the order of the rounds.
    said["samples"] = {
        half.name: {name: [round(sample.rate) for sample in windows] for name, windows in found.samples.items()}
        for half, found in zip(HALVES, parts, strict=True)
    }
    file.write_text(json.dumps(said, separators=(",", ":")) + "\n")
    print(file, file=sys.stderr)
    return 1 if wrong or missed else 0


if __name__ == "__main__":
    sys.exit(main())
