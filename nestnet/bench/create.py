"""How fast networks are made: a million in a batch, and one by one for many who ask at once.

A controller with ten machines and a hundred tenants is sent a batch: each network a segment with a CIDR of its own, two
ports on two of the machines and a policy, of one of the tenants in turn. Then clients on connections of their own make
single networks, each waiting for its answer, while a tenant reads one of its networks 50 times a second.

Limits of the same run: the rows that the controller has stored, put into another file with the same tables and indexes,
in as large transactions, by SQLite's own driver; and transactions of one row. With `--depth 3` the networks of the
batch are carried by networks that other tenants' networks carry; its time is told as a ratio to that of depth 1.

The peer, where it is installed (`apt-get install ovn-central`), is OVN's northbound database, on the disk too: switches
with two ports and an ACL each, a hundred in a transaction, as many as PEER says: a database of many thousands takes
minutes.

    python -m nestnet.bench.create [--networks 1000000] [--depth 3] [--singles 5000]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nestnet.api.client import Client
from nestnet.bench.report import computer
from nestnet.bench.serve import Controller

PART = 1000  # networks of a transaction
MACHINES, TENANTS, CLIENTS = 10, 100, 32
PEER, TOGETHER = 2_000, 100  # switches of the peer, in all and in a transaction
# As the store has them (store/database.py).
PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 64000", "cache_size = -65536")
PACE = 0.02  # seconds between two reads
WANTED = {"rate": 8000.0, "of raw": 0.35, "last": 0.9, "bytes": 1024.0, "MB": 300.0}
SINGLY = {"rate": 1000.0, "p99": 0.1, "of commits": 0.25, "reads": 2.0}
DEEPER = 1.3  # times the time of depth 1
SAMPLED = 50  # parts after which memory is looked at
TABLES = (
    *("network", "segment", "segment_cidr", "group", "port", "address", "port_group", "policy", "host_use", "change"),
    "event",
)


def line(n: int, depth: int) -> bytes:
    cidr, hosts = f"10.{n >> 8 & 255}.{n & 255}.0/24", (f"m{n % MACHINES}", f"m{n * 7 % MACHINES + 1 & 7}")
    more: dict[str, Any] = {"carrier": f"base{n % TENANTS}/over"} if depth > 1 else {}
    ports = {f"p{place}": {"segment": "lan", "host": host} for place, host in enumerate(hosts)}
    policies = [{"from": "any", "to": "any", "allow": "tcp/80"}]
    network = {"name": f"n{n * 0x9E3779B1 & 0xFFFFFFFF:08x}", **more, "tenant": f"t{n % TENANTS}"}
    return json.dumps({**network, "segments": {"lan": {"cidr": cidr}}, "ports": ports, "policies": policies}).encode()


def carrier(tenant: int) -> dict[str, Any]:
    """Two levels with as many hosts as there are machines, called as these."""

    def level(**more: Any) -> dict[str, Any]:
        ports = {f"m{n}": {"segment": "lan", "host": f"m{n}", "hosts": True} for n in range(MACHINES)}
        return {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": ports, **more}

    return level(tenant=f"u{tenant}", networks={"over": level(tenant=f"v{tenant}")})


class One(Controller):
    """A controller on an empty store, with machines and tenants, and carriers for the deep."""

    most = 0  # bytes in memory while a batch was made

    def prepare(self, depth: int) -> None:
        (self._folder / "state").mkdir(parents=True)
        self.start("/v1/status")
        with Client(f"unix:{self._folder}/api.sock") as operator:
            for n in range(MACHINES):
                operator.join(f"m{n}", f"192.0.2.{n + 1}", mtu=1600)
            networks = {f"base{n}": carrier(n) for n in range(TENANTS)} if depth > 1 else {}
            tenants: dict[str, Any] = {f"t{n}": {} for n in range(TENANTS)}
            operator.apply({"apiVersion": "nestnet/v1", "tenants": tenants, "networks": networks})

    @property
    def file(self) -> Path:
        return self._folder / "state" / "store.db"

    def batch(self, file: Path) -> list[float]:
        """Seconds at which each part was there. The answer is read while the lines are sent."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self._folder / "api.sock"))
        size = file.stat().st_size
        head = f"POST /v1/batch HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\nIdempotency-Key: bench\r\n\r\n"
        begun = time.perf_counter()

        def send() -> None:
            sock.sendall(head.encode())
            with file.open("rb") as lines:
                sock.sendfile(lines)

        sender = threading.Thread(target=send)
        sender.start()
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        times = []
        for said in answer:
            if answer.status != 200 or "problem" in (part := json.loads(said)) or not part["networks"]:
                raise RuntimeError(said.decode())
            times.append(time.perf_counter() - begun)
            if len(times) % SAMPLED == 0:
                self.most = max(self.most, self.memory)
        if part["networks"] != self.networks:
            raise RuntimeError(f"{part['networks']} networks were made")
        sender.join()
        sock.close()
        return times


def raw(source: Path, target: Path, networks: int) -> float:
    """Seconds for the same rows by SQLite's own driver, PART networks a transaction."""
    with contextlib.closing(sqlite3.connect(source)) as there, contextlib.closing(sqlite3.connect(target)) as here:
        for (statement,) in there.execute(
            "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
        ):
            here.execute(statement)
        here.isolation_level = None
        for pragma in PRAGMAS:
            here.execute(f"PRAGMA {pragma}")
        (last,) = there.execute("SELECT max(id) FROM network").fetchone()
        before = last - networks
        took = 0.0
        # What was there before them.
        here.execute("PRAGMA foreign_keys = OFF")
        for (table,) in there.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        ):
            if table not in TABLES:
                _copy(there, here, table, "1")
        here.execute("BEGIN")
        for table in TABLES:
            _copy(there, here, table, _between(table, -1, before))
        here.execute("COMMIT")
        here.execute("PRAGMA foreign_keys = ON")
        for start in range(before, last, PART):
            rows = {table: _rows(there, table, _between(table, start, min(start + PART, last))) for table in TABLES}
            begun = time.perf_counter()
            here.execute("BEGIN IMMEDIATE")
            for table, some in rows.items():
                if some:
                    here.executemany(_insert(table, some), some)
            here.execute("COMMIT")
            took += time.perf_counter() - begun
        return took


def _between(table: str, low: int, high: int) -> str:
    inside = f"> {low} AND {{}} <= {high}"
    by = {
        "network": "id",
        "segment_cidr": "segment",
        "address": "segment",
        "port_group": "port",
        "event": "revision",
    }.get(table, "network")
    if by == "segment":
        return f"segment IN (SELECT id FROM segment WHERE network {inside.format('network')})"
    if by == "port":
        return f"port IN (SELECT id FROM port WHERE network {inside.format('network')})"
    if by == "revision":
        return f"revision IN (SELECT revision FROM network WHERE id {inside.format('id')})"
    return f"{by} {inside.format(by)}"


def _rows(there: sqlite3.Connection, table: str, where: str) -> list[Any]:
    return there.execute(f'SELECT * FROM "{table}" WHERE {where}').fetchall()


def _insert(table: str, rows: list[Any]) -> str:
    return f'INSERT INTO "{table}" VALUES ({", ".join("?" * len(rows[0]))})'


def _copy(there: sqlite3.Connection, here: sqlite3.Connection, table: str, where: str) -> None:
    if rows := _rows(there, table, where):
        here.executemany(_insert(table, rows), rows)


def northbound(folder: Path) -> float | None:
    """Switches a second that OVN's northbound database takes; None without it."""
    schema = Path("/usr/share/ovn/ovn-nb.ovsschema")
    if not schema.exists() or shutil.which("ovn-nbctl") is None:
        return None
    file, at = folder / "nb.db", f"unix:{folder}/nb.sock"
    subprocess.run(["ovsdb-tool", "create", str(file), str(schema)], check=True)
    server = subprocess.Popen(
        ["ovsdb-server", str(file), f"--remote=p{at}", f"--unixctl={folder}/nb.ctl", "--no-chdir"],
        stderr=subprocess.DEVNULL,
    )
    try:
        ask = ["ovn-nbctl", f"--db={at}", "--no-leader-only", "--timeout=60"]
        for _ in range(100):  # until it listens
            if subprocess.run([*ask, "init"], stderr=subprocess.DEVNULL, check=False).returncode == 0:
                break
            time.sleep(0.05)
        begun = time.perf_counter()
        for start in range(0, PEER, TOGETHER):
            words: list[str] = []
            for n in range(start, start + TOGETHER):
                words += [
                    "--",
                    "ls-add",
                    f"n{n}",
                    "--",
                    "lsp-add",
                    f"n{n}",
                    f"n{n}-a",
                    "--",
                    "lsp-add",
                    f"n{n}",
                    f"n{n}-b",
                ]
                words += ["--", "acl-add", f"n{n}", "to-lport", "100", "tcp.dst == 80", "allow"]
            subprocess.run([*ask, *words[1:]], check=True)
        return PEER / (time.perf_counter() - begun)
    finally:
        server.terminate()
        server.wait()


def commits(folder: Path) -> float:
    """Transactions of one row in a second."""
    with contextlib.closing(sqlite3.connect(folder / "commits.db", isolation_level=None)) as file:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = FULL")
        file.execute("CREATE TABLE x (id INTEGER PRIMARY KEY, name TEXT UNIQUE)")
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < 2:
            file.execute("INSERT INTO x (name) VALUES (?)", (f"name {count}",))
            count += 1
        return count / (time.perf_counter() - begun)


class Reader(threading.Thread):
    """Reads one network, again and again, until it is told to stop."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__()
        self._folder, self._name = folder, name
        self.took: list[float] = []
        self.done = threading.Event()

    def run(self) -> None:
        with contextlib.closing(Controller(self._folder, 1)) as connection:
            while not self.done.wait(PACE):
                self.took.append(connection.seconds("GET", f"/v1/networks/{self._name}"))

    def p99(self) -> float:
        self.done.set()
        self.join()
        return statistics.quantiles(self.took, n=100)[98]


@contextlib.contextmanager
def reading(folder: Path, name: str) -> Iterator[Reader]:
    reader = Reader(folder, name)
    reader.start()
    try:
        yield reader
    finally:
        reader.done.set()
        reader.join()


def singly(folder: Path, count: int) -> tuple[float, list[float]]:
    """Networks a second, and seconds of each."""
    took: list[float] = []
    errors: list[str] = []

    def client(number: int) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(folder / "api.sock"))
        for n in range(number, count, CLIENTS):
            body = line(n, 1).replace(b'"name": "n', b'"name": "s', 1)
            head = f"POST /v1/networks HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            begun = time.perf_counter()
            sock.sendall(head.encode() + body)
            answer = sock.recv(65536)
            while answer and not answer.endswith(b"}"):
                answer += sock.recv(65536)
            took.append(time.perf_counter() - begun)
            if not answer.startswith(b"HTTP/1.1 201"):
                errors.append(answer.decode())
                break
        sock.close()

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    begun = time.perf_counter()
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    seconds = time.perf_counter() - begun
    if errors:
        raise RuntimeError(errors[0])
    return count / seconds, took


def batch(folder: Path, networks: int, depth: int) -> tuple[One, list[float]]:
    folder.mkdir()
    lines = folder / "lines"
    with lines.open("wb") as file:
        for n in range(networks):
            file.write(line(n, depth) + b"\n")
    one = One(folder, networks)
    one.prepare(depth)
    return one, one.batch(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nestnet.bench.create", description=__doc__.split("\n")[0])
    parser.add_argument("--networks", type=int, default=1_000_000, help="of the batch (1000000)")
    parser.add_argument("--singles", type=int, default=5_000, help="networks that are made one by one (5000)")
    parser.add_argument("--depth", type=int, default=3, choices=(1, 3), help="3: and once more on carried networks (3)")
    options = parser.parse_args()
    missed: list[str] = []

    def must(what: str, value: float, least: float | None = None, most: float | None = None) -> None:
        if (least is not None and value < least) or (most is not None and value > most):
            missed.append(f"{what}: {value:,.2f}, wanted {'at least' if least else 'at most'} {least or most:,.2f}")

    print(computer())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "one"
        one, times = batch(folder, options.networks, 1)
        try:
            seconds, memory = times[-1], max(one.most, one.memory)
            tenth = max(1, len(times) // 10)
            first, last = times[tenth - 1], times[-1] - times[-tenth - 1] if len(times) > tenth else times[-1]
            print(f"\n| networks in a batch | {options.networks:,} |\n|---|---|")
            print(f"| a second | {options.networks / seconds:,.0f} |")
            print(f"| the last tenth, to the first | {first / last:.2f} |")
            print(f"| MB in the controller's memory, and in that of who reads for it | {memory / 1e6:.0f} |")
            must("networks a second", options.networks / seconds, least=WANTED["rate"])
            must("last tenth", first / last, least=WANTED["last"])
            must("MB", memory / 1e6, most=WANTED["MB"])
            one.stop()
            size = one.file.stat().st_size / options.networks
            print(f"| bytes on the disk, each | {size:,.0f} |")
            must("bytes", size, most=WANTED["bytes"])
            bare = raw(one.file, Path(place) / "raw.db", options.networks)
            print(f"| SQLite alone, a second | {options.networks / bare:,.0f} |\n| ratio | {bare / seconds:.2f} |")
            must("of raw", bare / seconds, least=WANTED["of raw"])
            if (peer := northbound(Path(place))) is not None:
                print(f"| OVN's northbound database, a second | {peer:,.0f} |")
            one.start("/v1/status")
            name = json.loads(line(0, 1))["name"]
            with reading(folder, name) as reader:
                time.sleep(5)
                idle = reader.p99()
            alone = commits(Path(place))
            with reading(folder, name) as reader:
                rate, took = singly(folder, options.singles)
                busy = reader.p99()
            p99 = statistics.quantiles(took, n=100)[98]
            print(f"\n| networks, one by one, {CLIENTS} clients | {options.singles:,} |\n|---|---|")
            print(
                f"| a second | {rate:,.0f} |\n"
                f"| ms, p50 and p99 | {statistics.median(took) * 1e3:.0f}, {p99 * 1e3:.0f} |"
            )
            print(f"| SQLite alone, commits of one row a second | {alone:,.0f} |\n| ratio | {rate / alone:.2f} |")
            print(f"| ms of another's reads, p99, idle and meanwhile | {idle * 1e3:.1f}, {busy * 1e3:.1f} |")
            must("one by one, a second", rate, least=SINGLY["rate"])
            must("p99", p99, most=SINGLY["p99"])
            must("of commits", rate / alone, least=SINGLY["of commits"])
            must("reads", busy / idle, most=SINGLY["reads"])
        finally:
            one.stop()
        if options.depth > 1:
            deep, later = batch(Path(place) / "deep", options.networks, options.depth)
            deep.stop()
            print(f"\n| the batch at depth {options.depth}, to depth 1 | {later[-1] / seconds:.2f} |\n|---|---|")
            must("depth", later[-1] / seconds, most=DEEPER)
    for text in missed:
        print(f"MISSED: {text}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
