"""What depth costs per packet: TCP at levels 1, 2, 4, 8 and 16 of a tower of networks, beside stacked VXLAN devices.

All in one run, by the windows of throughput.py. The ratio that counts is level 16 to level 1; A/A is level 1 against a
second set of connections on level 1. Header bytes are counted on the wire, with a packet of a known size on each path.

    python -m bench.depth [--rounds N]
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
import sys
from datetime import UTC, datetime
from pathlib import Path

from bench.beds import PREFIX
from bench.throughput import KINDS, RESULTS, cpu_times, gates, measure, proves_itself, ratio
from bench.towers import LAB, STACKABLE, ours, stacked
from bench.traffic import Bed, Listener, Route, receiver, stay_on
from nestnet.agent import netns

DEPTHS = (1, 2, 4, 8, 16)
REFERENCE = "level 1"
ENOUGH = 0.97  # Of level 1, unless the interval has 1 in it.
PAYLOAD = 1000  # Bytes of the datagram by which headers are counted.


def overhead(bed: Bed, wire: Path) -> int:
    """Bytes on the wire that are neither the datagram nor its own UDP, IP and Ethernet headers (42)."""

    def watch() -> socket.socket:
        watcher = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        watcher.bind(("m1", 3))
        watcher.settimeout(5)
        return watcher

    with netns.run_in(wire, watch) as watcher:
        nonce = os.urandom(PAYLOAD)
        with netns.run_in(bed.client.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            sender.sendto(nonce, (bed.server.address, 9))
        while True:
            frame = watcher.recv(65536)
            if nonce in frame:
                return len(frame) - PAYLOAD - 42


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.depth", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=80, help="windows of each path (80)")
    parser.add_argument("--window", type=float, default=0.2, help="seconds of a window (0.2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (bench/results)")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        beds = {f"level {depth}": bed for depth, bed in stack.enter_context(ours(DEPTHS)).items()}
        wires = dict.fromkeys(beds, netns.path(f"nn-{LAB}"))
        for depth in range(1, STACKABLE + 1):
            beds[f"{depth} VXLAN devices"] = stack.enter_context(stacked(depth))
            wires[f"{depth} VXLAN devices"] = netns.path(f"{PREFIX}stack{depth}-wire")
        paths = {name: Route(bed) for name, bed in beds.items()}
        again = f"{REFERENCE} again"
        paths[again] = Route(beds[REFERENCE])
        for path in paths.values():
            stack.callback(path.close)
        foreign = Listener(next(bed.foreign for bed in beds.values() if bed.foreign))
        stack.callback(foreign.close)
        reader = stack.enter_context(receiver(list(paths.values())))
        sound = all(proves_itself(path) for path in paths.values())
        headers = {name: overhead(bed, wires[name]) for name, bed in beds.items()}
        before, samples = cpu_times(), {}
        for kind in KINDS:
            for pid in (os.getpid(), reader):
                stay_on(pid, set(cpus if kind.cpus == "all" else cpus[-1:]))
            samples[kind.name] = measure(kind, paths, options.rounds, options.window)
        after = cpu_times()
        heard = {"foreign": foreign.packets()}
        steal = (after[1] - before[1]) / (after[2] - before[2])
        a_a = [ratio(samples[kind.name][again], samples[kind.name][REFERENCE]) for kind in KINDS]
        wrong = gates(paths, heard, sound, steal, a_a)

    print(f"{options.rounds} rounds of {options.window} s; ratios per round, median (95 % interval)\n")
    missed = []
    ratios = {}
    for kind, same in zip(KINDS, a_a, strict=True):
        print(f"{kind.title}, {'all CPUs' if kind.cpus == 'all' else 'one CPU'}\n")
        print(f"| | {kind.unit} | to {REFERENCE} | bytes of headers around a frame |\n|---|---|---|---|")
        for name in beds:
            found = ratio(samples[kind.name][name], samples[kind.name][REFERENCE])
            ratios[f"{kind.name}: {name} / {REFERENCE}"] = dataclasses.asdict(found)
            middle = statistics.median(sample.rate for sample in samples[kind.name][name]) * kind.scale
            print(f"| {name} | {middle:.{kind.decimals}f} | {found} | {headers[name]} |")
            if name == f"level {DEPTHS[-1]}" and not (found.low <= 1 <= found.high or found.median > ENOUGH):
                missed.append(f"{kind.title}: level {DEPTHS[-1]} has {found} of {REFERENCE}")
        print(f"\nA/A, {REFERENCE} to itself: {same}\n")
    levels = {headers[f"level {depth}"] for depth in DEPTHS}
    if len(levels) > 1:
        missed.append(f"header bytes differ by level: {sorted(levels)}")
    print(f"Packets heard in another network: {heard['foreign']}; CPU time taken by the hypervisor: {steal:.1%}")
    for line in (*(f"VOID: {reason}" for reason in wrong), *(f"MISSED: {reason}" for reason in missed)):
        print(line)
    taken = datetime.now(UTC)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"depth-{taken:%Y%m%d-%H%M%S}.json"
    said = {"taken": taken.isoformat(timespec="seconds"), "kernel": platform.release(), "cpus": len(cpus)}
    said |= {"rounds": options.rounds, "window": options.window, "void": wrong, "missed": missed}
    said |= {"headers": headers, "ratios": ratios, "steal": round(steal, 5)}
    said["samples"] = {
        kind: {name: [round(sample.rate) for sample in windows] for name, windows in by_path.items()}
        for kind, by_path in samples.items()
    }
    file.write_text(json.dumps(said, separators=(",", ":")) + "\n")
    print(file, file=sys.stderr)
    return 1 if wrong or missed else 0


if __name__ == "__main__":
    sys.exit(main())
