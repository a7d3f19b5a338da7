"""What depth costs a change: one port more in a network of 10,000, at level 1 and at level 16.

Two installations beside each other, each with a controller and an agent on each of two machines. In one the network
is carried by the wire, in the other by a tower of 15. In turns, in reversed order every other round, a port is
added and taken away; what counts is the time from `apply` until both machines have realised it: its ratio per round.
Workloads are none: what is measured is the store, the feed, the compiler and the maps.

    python -m nestnet.bench.adding [--rounds N] [--ports N]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nestnet.agent import netns
from nestnet.api.client import Client
from nestnet.bench.beds import PREFIX, cleaned, machines
from nestnet.bench.method import Interval, Sample, ratio
from nestnet.model.errors import Unreachable

LEVELS = (1, 16)
ENOUGH = 1.5  # times level 1
PATIENCE = 120.0  # seconds for a machine to realise something
PACE = 0.005  # seconds between two questions
BPFFS = Path("/sys/fs/bpf/nestnet-bench")


class Installation:
    """A controller and two agents, and the network at a level."""

    def __init__(self, level: int, ports: int, folder: Path) -> None:
        self.level, self.folder = level, folder
        self.ports = {f"p{n}": {"segment": "lan", "host": ("a", "b")[n % 2]} for n in range(ports)}
        self.url = f"unix:{folder}/api.sock"
        self.client = Client(self.url, timeout=PATIENCE)
        self.pids: list[int] = []

    def start(self) -> None:
        """Its processes, and everything but the one port."""
        prefix = f"{PREFIX}add{self.level}-"
        names = (f"{prefix}m1", f"{prefix}m2")
        machines(f"{prefix}wire", names, 1500)
        self._spawn("controller", "--listen", self.url, "--state", str(self.folder / "state"))
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.client.status()
                break
            except Unreachable:
                if time.monotonic() > end:
                    raise
                time.sleep(PACE)  # the pace of asking
        for number, name in enumerate(names, 1):
            self.client.join(f"m{number}", f"192.0.2.{number}")
            pins = ("--pins", str(BPFFS / f"{self.level}-{number}"))
            self._spawn("agent", "--machine", f"m{number}", "--controller", self.url, *pins, place=netns.path(name))
        self._apply(self._tower())
        self._apply(self._network(self.ports))

    def _spawn(self, *words: str, place: Path = Path("/proc/self/ns/net")) -> None:
        with (self.folder / f"{words[0]}{len(self.pids)}.log").open("ab") as log:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            process = netns.spawn(place, [sys.executable, "-m", "nestnet", *words], output=log, environment=environment)
        self.pids.append(process.pid)

    def _tower(self) -> dict[str, Any]:
        """All levels below the network, with the ports that are hosts."""
        networks: dict[str, Any] = {}
        inner = networks
        for level in range(1, self.level):
            hosts = ("m1", "m2") if level == 1 else ("a", "b")
            ends = {
                name: {"segment": "lan", "host": host, "hosts": True} for name, host in zip("ab", hosts, strict=True)
            }
            inner["t"] = {"segments": {"lan": {"cidr": "10.7.0.0/24"}}, "ports": ends, "networks": {}}
            inner = inner["t"]["networks"]
        return networks

    def _network(self, ports: dict[str, Any]) -> dict[str, Any]:
        if self.level == 1:
            ports = {name: {**port, "host": {"a": "m1", "b": "m2"}[port["host"]]} for name, port in ports.items()}
        networks: dict[str, Any] = {"big": {"segments": {"lan": {"cidr": "10.0.0.0/16"}}, "ports": ports}}
        for _ in range(1, self.level):
            networks = {"t": {"networks": networks}}
        return networks

    def _apply(self, networks: dict[str, Any]) -> None:
        revision = self.client.apply({"apiVersion": "nestnet/v1", "networks": networks})["revision"]
        end = time.monotonic() + PATIENCE
        while any((machine["realised"] or 0) < revision for machine in self.client.status()["machines"]):
            if time.monotonic() > end:
                raise TimeoutError(f"level {self.level}: revision {revision} is not realised; see {self.folder}")
            time.sleep(PACE)  # the pace of asking

    def changed(self, more: bool) -> float:
        """Seconds that it takes until the one port is there, or gone."""
        ports = {**self.ports, "one": {"segment": "lan", "host": "b"}} if more else self.ports
        begun = time.perf_counter()
        self._apply(self._network(ports))
        return time.perf_counter() - begun

    def stop(self) -> None:
        """Its processes end; what they made goes with the namespaces, and their pins."""
        self.client.close()
        for pid in reversed(self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
                os.waitpid(pid, 0)


@contextlib.contextmanager
def installations(ports: int) -> Iterator[dict[int, Installation]]:
    """Both, until they are no longer needed."""
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, BPFFS, ignore_errors=True)
        found = {}
        for level in LEVELS:
            stack.enter_context(cleaned(f"{PREFIX}add{level}-"))
            made = Installation(level, ports, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            stack.callback(made.stop)
            made.start()
            found[level] = made
        yield found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nestnet.bench.adding", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="times that the port comes and goes, each (10)")
    parser.add_argument("--ports", type=int, default=10_000, help="ports around it (10,000)")
    options = parser.parse_args()
    took: dict[int, list[Sample]] = {level: [] for level in LEVELS}
    with installations(options.ports) as both:
        for level in LEVELS:  # once for nothing: what is first is slower
            both[level].changed(True)
            both[level].changed(False)
        for turn in range(options.rounds):
            for more in (True, False):
                for level in LEVELS if turn % 2 == 0 else LEVELS[::-1]:
                    took[level].append(Sample(both[level].changed(more), 0.0))
            if sys.stderr.isatty():
                print(f"\r{turn + 1} of {options.rounds}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    found: Interval = ratio(took[LEVELS[1]], took[LEVELS[0]])
    for level in LEVELS:
        middle = statistics.median(sample.rate for sample in took[level])
        print(f"level {level}: one port more or less among {options.ports}: {middle:.2f} s until realised (median)")
    print(f"level {LEVELS[1]} / level {LEVELS[0]}: {found}; at most {ENOUGH} is wanted")
    return 0 if found.median <= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
