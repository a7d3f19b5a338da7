"""How long a machine takes from the first line of its feed to its maps: all of it anew, and after a restart.

    python -m nestnet.bench.sync [--rows 100000 --rows 1000000]

The machine has many small networks: each a segment, a port here and one elsewhere, and a policy: 17 rows of tables.
Timed is what the agent does, with its own code: the snapshot's line is read into values, these get slots and are
compiled, the difference to what is in the maps is made, and written in batches. After a restart the maps are read, and
compared instead. The limit is the same rows, made already, in the same batches, into maps as empty.

Each size is a process of its own, so that memory is that size's: what it has more than before the line came, at the
end, when it keeps what an agent keeps (values, slots, tables), and at most, and what the kernel says
that the maps take.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from nestnet.agent.feed import Desired
from nestnet.agent.memory import give_back
from nestnet.api.client import read_batch
from nestnet.bench.report import computer
from nestnet.compile.compiler import compile
from nestnet.compile.diff import Action, Put, diff
from nestnet.compile.slots import Slots, assign
from nestnet.compile.tables import empty
from nestnet.datapath.kernel import BPFFS, Capacity, Kernel
from nestnet.model.values import Machine, Network, Policy, Port, Segment, Selector, Service, Value, kind_of
from nestnet.model.wire import to_wire

ROWS = (100_000, 1_000_000)
EACH = 17  # rows of a network
WANTED = {100_000: 2.0, 1_000_000: 15.0}  # seconds from connect to the kernel
AGAIN = {1_000_000: 5.0}  # seconds to compare with the kernel after a restart
BYTES = (160, 200)  # of a row, in the kernel and in the agent


def values(networks: int) -> Iterator[Value]:
    """What the machine should be."""
    yield Machine(1, IPv4Address("192.0.2.1"))
    yield Machine(2, IPv4Address("192.0.2.2"))
    cidr, here, there = IPv4Network("10.0.0.0/24"), IPv4Address("10.0.0.2"), IPv4Address("10.0.0.3")
    anybody, web = (Selector("any"),), (Service(6, 80, 80),)
    for n in range(1, networks + 1):
        yield Network(n)
        yield Segment(n, n, n, (cidr,))
        yield Port(2 * n, n, n, 1, 0x020000000000 + 2 * n, (here,))
        yield Port(2 * n + 1, n, n, 2, 0x020000000001 + 2 * n, (there,))
        yield Policy(n, n, anybody, anybody, web)


def line(networks: int) -> bytes:
    """The snapshot, as the controller sends it."""
    rows = [{"kind": kind_of(value), "id": value.id, "value": to_wire(value)} for value in values(networks)]
    return json.dumps({"revision": 1, "snapshot": True, "rows": rows}).encode()


def room(networks: int) -> Capacity:
    n = networks + 1000
    return Capacity(
        networks=n, segments=n, ports=2 * n, addresses=6 * n, members=6 * n, prefixes=3 * n, rules=3 * n, flows=n,
        connections=n,
    )  # fmt: skip


def map_bytes() -> int:
    """Of all maps, as /proc/self/fdinfo says: elements of hashes are allocated as they are used."""
    total = 0
    for entry in Path("/proc/self/fdinfo").iterdir():
        try:
            found = re.search(r"^memlock:\s+(\d+)", entry.read_text(), re.MULTILINE)
        except FileNotFoundError:  # that of this listing
            continue
        total += int(found[1]) if found else 0
    return total


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def most() -> int:
    """And had at most, since `forget_most`."""
    found = re.search(r"^VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "proc(5)"
    return int(found[1]) * 1024


def forget_most() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def one(rows: int) -> dict[str, float]:
    """All figures of one size, in this process."""
    networks = max(1, rows // EACH)
    pins = BPFFS / "nestnet" / f"bench-sync-{os.getpid()}"
    text = line(networks)
    gc.collect()
    before = resident()
    forget_most()
    found: dict[str, float] = {}
    with Kernel.open(pins / "machine", room(networks)) as kernel:
        empty_bytes, begin = map_bytes(), time.perf_counter()
        desired = Desired().after(read_batch(text))
        read = time.perf_counter()
        world = desired.world
        slots = assign(Slots(), world)
        tables = compile(world, 1, attached(networks), 0, slots)
        compiled = time.perf_counter()
        actions: list[Action] = diff(empty(), tables)
        kernel.apply(actions)
        end = time.perf_counter()
        count = sum(len(table) for table in tables.values())
        found |= {"rows": count, "read": read - begin, "compile": compiled - read, "write": end - compiled}
        found |= {"all": end - begin, "kernel": (map_bytes() - empty_bytes) / count}
        del actions  # an agent keeps all else: desired, world, slots, tables
        gc.collect()
        give_back()
        found |= {"agent": (resident() - before) / count, "agent at most": (most() - before) / count}
        begin = time.perf_counter()
        have = kernel.read()
        again = diff(have, tables)
        found["again"] = time.perf_counter() - begin
        assert not again, "what was written is what is there"
        kernel.unpin()
    with Kernel.open(pins / "limit", room(networks)) as kernel:
        puts = [Put(name, table) for name, table in tables.items() if len(table)]
        begin = time.perf_counter()
        kernel.apply(puts)
        found["limit"] = time.perf_counter() - begin
        kernel.unpin()
    for folder in (pins / "machine", pins / "limit", pins):
        folder.rmdir()
    return found


def attached(networks: int) -> dict[int, int]:
    """The interfaces of the ports that are here."""
    return dict(zip(range(2, 2 * networks + 1, 2), range(1000, 1000 + networks), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nestnet.bench.sync", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, action="append", help=f"rows of tables ({', '.join(map(str, ROWS))})")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return 0
    print(computer(), end="\n\n")
    print("| rows | connect to kernel, s | reading, compiling, writing | to raw batches | again after a restart, s |")
    print("|---|---|---|---|---|")
    missed, memory = [], []
    for rows in options.rows or ROWS:
        command = [sys.executable, "-m", "nestnet.bench.sync", "--one", str(rows)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        parts = ", ".join(f"{found[part]:.2f}" for part in ("read", "compile", "write"))
        ratio = found["all"] / found["limit"]
        print(
            f"| {found['rows']:,.0f} | {found['all']:.2f} | {parts} | {ratio:.1f} | {found['again']:.2f} |", flush=True
        )
        memory.append((rows, found))
        for limits, name in ((WANTED, "all"), (AGAIN, "again")):
            if rows in limits and found[name] > limits[rows]:
                missed.append(f"{rows:,} rows, {name}: {found[name]:.2f} s, not {limits[rows]}")
    print("\n| rows | bytes of a row in the kernel | in the agent | in the agent at most |\n|---|---|---|---|")
    for rows, found in memory:
        told = " | ".join(f"{found[name]:.0f}" for name in ("kernel", "agent", "agent at most"))
        print(f"| {found['rows']:,.0f} | {told} |")
        for name, limit in zip(("kernel", "agent"), BYTES, strict=True):
            if found[name] > limit:
                missed.append(f"{rows:,} rows: {found[name]:.0f} bytes of a row in the {name}, not {limit}")
    for reason in missed:
        print(f"MISSED: {reason}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
