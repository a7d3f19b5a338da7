"""How long a commit takes to the machines that it concerns, while a thousand follow their feeds.

    python -m nestnet.bench.feed [--machines 1000] [--networks 500] [--changes 200]

One controller, as it is run; a network for every two machines, with a port on each. A second process has a real
connection for each machine, and reads. A change enables or disables a port. Timed is from the request to the line in
which the second of the two machines has the new row, so with the commit itself; counted are lines with rows that any
other machine got. Then all connections are closed, and all machines come back at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nestnet.api.client import Client
from nestnet.bench.alike import controller
from nestnet.bench.report import computer

WANTED = (10.0, 50.0)  # ms, the median and p99 of a commit
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
                    self.take(json.loads(line[:end]))
                    line = line[end + 1 :]
        finally:
            writer.close()

    def take(self, line: dict[str, Any]) -> None:
        self.token, self.last = line["token"], time.perf_counter()
        self.rows += bool(line.get("rows"))
        self.heard.set()


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


async def measure(operator: Client, path: Path, machines: int, networks: int, changes: int) -> dict[str, float]:
    followers = [Follower(f"f{n}") for n in range(machines)]
    loop = asyncio.get_running_loop()
    tasks, first = await all_here(followers, path)
    times, others = [], 0
    for n in range(changes):
        number = n * 7 % networks
        concerned = followers[2 * number : 2 * number + 2]
        for one in concerned:
            one.heard.clear()
        before = [one.rows for one in followers]
        had = [one.rows for one in concerned]
        change = partial(operator.set_enabled, "port", f"n{number}/a", bool(n // networks % 2))
        begin = time.perf_counter()
        asking = loop.run_in_executor(None, change)
        async with asyncio.timeout(PATIENCE):
            while any(one.rows == rows for one, rows in zip(concerned, had, strict=True)):
                for one in concerned:
                    one.heard.clear()
                await asyncio.wait(
                    [asyncio.create_task(one.heard.wait()) for one in concerned], return_when=asyncio.FIRST_COMPLETED
                )
        await asking
        times.append(max(one.last for one in concerned) - begin)
        others += sum(one.rows > rows for one, rows in zip(followers, before, strict=True) if one not in concerned)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks, back = await all_here(followers, path)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    p50, p99 = np.quantile(np.array(times) * 1000, (0.5, 0.99))
    return {"p50": float(p50), "p99": float(p99), "others": others, "first": first, "back": back}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nestnet.bench.feed", description=__doc__.split("\n")[0])
    parser.add_argument("--machines", type=int, default=1000, help="that follow (1000)")
    parser.add_argument("--networks", type=int, default=500, help="of two machines each (500)")
    parser.add_argument("--changes", type=int, default=200, help="that are timed (200)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, controller(Path(folder)) as operator:
        begin = time.perf_counter()
        for n in range(options.machines):
            operator.join(f"f{n}", f"192.0.{2 + n // 250}.{5 + n % 250}")
        for start in range(0, options.networks, 100):
            some = range(start, min(start + 100, options.networks))
            operator.apply({"apiVersion": "nestnet/v1", "networks": {f"n{n}": network(n) for n in some}})
        print(f"made in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        path = Path(folder) / "api.sock"
        found = asyncio.run(measure(operator, path, options.machines, options.networks, options.changes))
    print(computer(), end="\n\n")
    print(f"{options.machines} machines, {options.networks} networks, {options.changes} changes\n")
    print("| commit to line, ms: p50 | p99 | lines with rows to others | all connected, s | all back, s |")
    print("|---|---|---|---|---|")
    print("| {p50:.1f} | {p99:.1f} | {others:.0f} | {first:.1f} | {back:.1f} |".format(**found))
    missed = [
        f"{name}: {found[name]:.1f} ms" for name, most in zip(("p50", "p99"), WANTED, strict=True) if found[name] > most
    ]
    missed += [f"all back after {found['back']:.1f} s"] if found["back"] > SETTLED else []
    missed += [f"{found['others']:.0f} lines with rows for nobody"] if found["others"] else []
    for reason in missed:
        print(f"MISSED: {reason}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
