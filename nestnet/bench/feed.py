"""How long a commit takes to the maps of the machines that it concerns, while a thousand follow their feeds.

    python -m nestnet.bench.feed [--machines 1000] [--networks 500] [--stored 1000000] [--changes 200]

One controller, as it is run; a million networks, on two machines that nobody follows; and a network for every two of
the others, with a port on each. A second process has a real connection for each of these, and reads. Eight of them
become what they are told, with an agent's own code, in maps of the kernel. A change enables or disables a port of
theirs. Timed is to the moment when the second of the two machines has it in its maps: from the commit, which is when
the controller writes to the log of its store, so with the fsync; and from the request. Counted are lines with rows that
any other machine got. Then all connections are closed, and all machines come back at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nestnet.agent.feed import Batch, Desired
from nestnet.api.client import Client, read_batch
from nestnet.bench.alike import controller
from nestnet.bench.report import computer
from nestnet.compile.compiler import compile
from nestnet.compile.diff import diff
from nestnet.compile.part import parts
from nestnet.compile.slots import Slots, assign, assign_in
from nestnet.compile.tables import Tables, empty
from nestnet.datapath.kernel import BPFFS, Capacity, Kernel
from nestnet.model.values import World

WANTED = (10.0, 50.0)  # ms, the median and p99 from a commit to the maps
MAPPED = 4  # networks whose machines have maps
PART = 20_000  # networks of a batch
IN_MODIFY = 2  # <sys/inotify.h>
SETTLED = 30.0  # seconds until all are back
PATIENCE = 60.0


def network(number: int) -> dict[str, Any]:
    """Of machines 2n and 2n+1."""
    hosts = (f"f{2 * number}", f"f{2 * number + 1}")
    return {
        "segments": {"lan": {"cidr": "10.0.0.0/24"}},
        "ports": {name: {"segment": "lan", "host": host} for name, host in zip("ab", hosts, strict=True)},
        "policies": [{"from": "any", "to": "any", "allow": "tcp/80"}],
    }


class Follower:
    """A machine's connection. `rows`: lines with rows that it has been told, and when the last came."""

    def __init__(self, name: str) -> None:
        self.name, self.rows, self.last = name, 0, 0.0
        self.token: str | None = None
        self.heard = asyncio.Event()

    async def follow(self, path: Path) -> None:
        """Until it is cancelled. The answer comes in chunks (RFC 9112, section 7.1); a line is in one or more."""
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 24)
        since = f"&since={self.token}" if self.token is not None else ""
        writer.write(f"GET /v1/feed?machine={self.name}&boot=bench{since} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.split(b"\r\n")[0]:
                raise RuntimeError(head.decode())
            line = b""
            while size := int(await reader.readline(), 16):
                line += (await reader.readexactly(size + 2))[:-2]
                while (end := line.find(b"\n")) >= 0:
                    self.take(line[:end])
                    line = line[end + 1 :]
        finally:
            writer.close()

    def take(self, line: bytes) -> None:
        batch = read_batch(line)
        self.token = batch["token"]
        self.become(batch)
        self.last = time.perf_counter()
        self.rows += bool(batch.get("rows"))
        self.heard.set()

    def become(self, batch: Batch) -> None:
        """One without maps does nothing with it."""


class Mapped(Follower):
    """One with maps: what agent/agent.py does with tables, without workloads."""

    def __init__(self, name: str, number: int, kernel: Kernel) -> None:
        super().__init__(name)
        self._number, self._kernel = number, kernel
        self._desired, self._slots = Desired(), Slots()
        self._world: World | None = None

    def become(self, batch: Batch) -> None:
        self._desired = self._desired.after(batch)
        if not batch.get("rows"):
            return
        old, new = self._world, self._desired.world
        self._world = new
        if old is None:
            slots = assign(self._slots, new)
            had, has = empty(), self._tables(new, slots)
        else:
            old, new = parts(old, new, self._number)
            slots = assign_in(self._slots, old, new)
            had, has = self._tables(old, self._slots), self._tables(new, slots)
        self._slots = slots
        self._kernel.apply(diff(had, has))

    def _tables(self, world: World, slots: Slots) -> Tables:
        here = [port.id for port in world.ports.values() if port.host == self._number]
        return compile(world, self._number, {id: 1000 + id for id in here}, 0, slots)


class Log:
    """Hears when a file is written to (inotify(7)), on a thread of its own."""

    def __init__(self, file: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_CLOEXEC)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, str(file).encode(), IN_MODIFY) < 0:
            raise OSError(ctypes.get_errno(), f"{file} cannot be watched")
        self.first = 0.0  # when it was first written to since that was 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while os.read(self._fd, 1 << 16):
            self.first = self.first or time.perf_counter()


async def all_here(followers: list[Follower], path: Path) -> tuple[list[asyncio.Task[None]], float]:
    """All connect at once. The connections, and the seconds until each has heard its first line."""
    begin = time.perf_counter()
    for one in followers:
        one.heard.clear()
    tasks = [asyncio.create_task(one.follow(path)) for one in followers]
    async with asyncio.timeout(PATIENCE):
        for task, one in zip(tasks, followers, strict=True):
            waiting = asyncio.create_task(one.heard.wait())
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if task.done():
                task.result()
    return tasks, time.perf_counter() - begin


async def measure(
    operator: Client, path: Path, followers: list[Follower], log: Log, networks: int, changes: int
) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    tasks, first = await all_here(followers, path)
    times, asked, others = [], [], 0
    for n in range(changes):
        number = n % min(MAPPED, networks)
        concerned = followers[2 * number : 2 * number + 2]
        for one in concerned:
            one.heard.clear()
        before = [one.rows for one in followers]
        had = [one.rows for one in concerned]
        change = partial(operator.set_enabled, "port", f"n{number}/a", bool(n // MAPPED % 2))
        log.first, begin = 0.0, time.perf_counter()
        asking = loop.run_in_executor(None, change)
        async with asyncio.timeout(PATIENCE):
            while any(one.rows == rows for one, rows in zip(concerned, had, strict=True)):
                for one in concerned:
                    one.heard.clear()
                await asyncio.wait(
                    [asyncio.create_task(one.heard.wait()) for one in concerned], return_when=asyncio.FIRST_COMPLETED
                )
        await asking
        end = max(one.last for one in concerned)
        times.append(end - log.first)
        asked.append(end - begin)
        others += sum(one.rows > rows for one, rows in zip(followers, before, strict=True) if one not in concerned)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks, back = await all_here(followers, path)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    found = {"others": float(others), "first": first, "back": back}
    for name, seconds in (("commit", times), ("request", asked)):
        p50, p99 = np.quantile(np.array(seconds) * 1000, (0.5, 0.99))
        found |= {f"{name} p50": float(p50), f"{name} p99": float(p99)}
    return found


def line(number: int) -> bytes:
    """One of those that are only stored."""
    stored = network(0) | {"ports": {f"p{n}": {"segment": "lan", "host": f"s{n}"} for n in range(2)}}
    return json.dumps({"name": f"s{number}", **stored}).encode()


def store(operator: Client, stored: int) -> None:
    for n in range(2):
        operator.join(f"s{n}", f"192.0.250.{n + 1}")
    for begin in range(0, stored, PART):
        for _ in operator.batch(line(n) for n in range(begin, min(stored, begin + PART))):
            pass


@contextlib.contextmanager
def mapped(operator: Client, names: Iterable[str]) -> Iterator[list[Mapped]]:
    """Machines with maps of their own."""
    room = Capacity(networks=64, segments=64, ports=64, machines=2048)
    pins = BPFFS / "nestnet" / f"bench-feed-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        stack.callback(pins.rmdir)
        found = []
        for name in names:
            kernel = stack.enter_context(Kernel.open(pins / name, room))
            stack.callback((pins / name).rmdir)
            stack.callback(kernel.unpin)
            found.append(Mapped(name, int(operator.get("machine", name)["row"]), kernel))
        yield found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nestnet.bench.feed", description=__doc__.split("\n")[0])
    parser.add_argument("--machines", type=int, default=1000, help="that follow (1000)")
    parser.add_argument("--networks", type=int, default=500, help="of two machines each (500)")
    parser.add_argument("--changes", type=int, default=200, help="that are timed (200)")
    parser.add_argument("--stored", type=int, default=1_000_000, help="networks beside them (1000000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, controller(Path(folder)) as operator:
        begin = time.perf_counter()
        for n in range(options.machines):
            operator.join(f"f{n}", f"192.0.{2 + n // 250}.{5 + n % 250}")
        for start in range(0, options.networks, 100):
            some = range(start, min(start + 100, options.networks))
            operator.apply({"apiVersion": "nestnet/v1", "networks": {f"n{n}": network(n) for n in some}})
        store(operator, options.stored)
        print(f"made in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        path = Path(folder) / "api.sock"
        with mapped(operator, [f"f{n}" for n in range(2 * min(MAPPED, options.networks))]) as first:
            followers = [*first, *(Follower(f"f{n}") for n in range(len(first), options.machines))]
            log = Log(Path(folder) / "state" / "store.db-wal")
            found = asyncio.run(measure(operator, path, followers, log, options.networks, options.changes))
    print(computer(), end="\n\n")
    there = options.networks + options.stored
    print(f"{options.machines} machines that follow, {there:,} networks stored, {options.changes} changes\n")
    print("| commit to maps, ms: p50 | p99 | request to maps, ms: p50 | p99 |")
    print("|---|---|---|---|")
    told = [found[f"{since} {part}"] for since in ("commit", "request") for part in ("p50", "p99")]
    print("| " + " | ".join(f"{one:.1f}" for one in told) + " |\n")
    print("| lines with rows to others | all connected, s | all back, s |")
    print("|---|---|---|")
    print("| {others:.0f} | {first:.1f} | {back:.1f} |".format(**found))
    missed = [
        f"{name}: {found[f'commit {name}']:.1f} ms"
        for name, most in zip(("p50", "p99"), WANTED, strict=True)
        if found[f"commit {name}"] > most
    ]
    missed += [f"all back after {found['back']:.1f} s"] if found["back"] > SETTLED else []
    missed += [f"{found['others']:.0f} lines with rows for nobody"] if found["others"] else []
    for reason in missed:
        print(f"MISSED: {reason}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
