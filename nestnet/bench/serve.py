"""What one network costs a controller that holds many: a thousand beside a hundred thousand, or a million.

Each store has networks of a segment, two ports on two machines and a policy, a thousand of each tenant. The first is
made by the store itself; the rest is copied from its rows by SQL, which is not measured. Then a controller is started
on each of the stores, and they are asked in turn over one connection each, all on one CPU: to show a network, the ports
of one, to plan a change of one, to make one and to delete it with all that is in it. Told are medians and their ratio,
how long a restart takes until the first answer, the memory of the controller and the bytes on the disk.

    python -m nestnet.bench.serve [--networks 1000 --networks 100000] [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nestnet.api.client import Client
from nestnet.bench.report import computer
from nestnet.model.rates import RATE

NETWORKS = (1_000, 1_000_000)
OF_A_TENANT = 1_000  # networks
EVERYONE = -1  # whose row of host_total is the sum of all
HOSTS = ("m1", "m2")
MOST = {"get": 1.5, "page": 1.5, "plan": 1.5, "create": 1.5, "delete": 1.5}  # times what it costs in the smallest
RESTART = 2.0  # seconds to the first answer
PATIENCE = 60.0  # seconds for a controller to start
WARM = 5  # rounds before anything counts
STEP = 1 << 32  # rows that are copied have ids from here; those of each kind are as far apart as their number


def network(**more: Any) -> dict[str, Any]:
    ports = {f"p{place}": {"segment": "lan", "host": host} for place, host in enumerate(HOSTS, 1)}
    policies = [{"from": "any", "to": "any", "allow": "tcp/80"}]
    return {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": ports, "policies": policies, **more}


def manifest(**networks: Any) -> dict[str, Any]:
    return {"apiVersion": "nestnet/v1", "networks": networks}


def first(networks: int) -> dict[str, Any]:
    """The first of so many networks, and the tenants of all."""
    tenants = -(-networks // OF_A_TENANT)
    return {**manifest(n0=network(tenant="t0")), "tenants": {f"t{n}": {} for n in range(tenants)}}


def fill(path: Path, networks: int) -> None:
    """Let a store that has the first one have so many networks, n0, n1, ... Nobody has it open."""
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA synchronous = OFF")
        file.execute("PRAGMA cache_size = -500000")
        (id, tenant) = file.execute("SELECT id, tenant FROM network WHERE name = 'n0'").fetchone()
        (vni,) = file.execute("SELECT vni FROM segment WHERE network = ?", (id,)).fetchone()
        one = {"network": f"{id} + i", "segment": "segment + i", "port": f"CASE WHEN port THEN port * {STEP} + i END"}
        own: dict[str, dict[str, str]] = {
            "network": {"id": f"{id} + i", "name": "'n' || i", "tenant": f"{tenant} + i / {OF_A_TENANT}"},
            "segment": {"id": "id + i", "network": one["network"], "vni": f"{vni} + i"},
            "segment_cidr": {"segment": one["segment"]},
            "port": {"id": f"id * {STEP} + i", "network": one["network"], "segment": one["segment"]},
            "address": {"segment": one["segment"], "port": one["port"]},
            "policy": {"id": "id + i", "network": one["network"]},
            "host_use": {"network": one["network"]},
        }
        numbers = f"WITH RECURSIVE number(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM number WHERE i + 1 < {networks})"
        for table, changed in own.items():
            names = [row[1] for row in file.execute(f'PRAGMA table_info("{table}")')]
            into = ", ".join(f'"{name}"' for name in names)
            values = ", ".join(changed.get(name, f'x."{name}"') for name in names)
            file.execute(f"CREATE TEMP TABLE x AS SELECT * FROM {table} WHERE {_of_first(table, id)}")
            file.execute(f"{numbers} INSERT INTO {table} ({into}) SELECT {values} FROM number, x ORDER BY i")
            file.execute("DROP TABLE x")
        for kind in ("network", "segment", "port", "policy"):
            file.execute(f"UPDATE counter SET last = (SELECT max(id) FROM {kind}) WHERE kind = ?", (kind,))
            file.execute(f"UPDATE tally SET n = (SELECT count(*) FROM {kind} WHERE id <> 0) WHERE kind = ?", (kind,))
        file.execute("DELETE FROM usage")
        each = f"count(*), count(*), {len(HOSTS)} * count(*), {len(HOSTS) * RATE[1]} * count(*)"
        file.execute(f"INSERT INTO usage SELECT tenant, 0, {each} FROM network WHERE tenant NOT NULL GROUP BY tenant")
        file.execute("DELETE FROM host_total")
        for tenant in ("tenant", str(EVERYONE)):
            sums = f"SELECT carrier, host, {tenant}, count(*), sum(count) FROM host_use JOIN network ON id = network"
            file.execute(f"INSERT INTO host_total {sums} WHERE tenant NOT NULL GROUP BY 1, 2, 3")
        file.execute("DELETE FROM vni_range WHERE hi < ?", (vni + networks,))
        file.execute("UPDATE vni_range SET lo = max(lo, ?)", (vni + networks,))
        file.commit()
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _of_first(table: str, network: int) -> str:
    """The condition that a row belongs to the first network."""
    if table == "network":
        return f"id = {network}"
    if table in ("segment_cidr", "address"):
        return f"segment IN (SELECT id FROM segment WHERE network = {network})"
    return f"network = {network}"


class Controller(http.client.HTTPConnection):
    """One on a store, and a connection to it: a unix socket."""

    def __init__(self, folder: Path, networks: int) -> None:
        super().__init__("localhost")
        self.networks = networks
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._folder / "api.sock"))

    def start(self, asked: str | None = None) -> float:
        """Seconds until it has shown its last network, or what is asked."""
        url, state = f"unix:{self._folder}/api.sock", str(self._folder / "state")
        command = [sys.executable, "-m", "nestnet", "controller", "--listen", url, "--state", state]
        begun = time.perf_counter()
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stderr=log)
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionError):
                self.ask("GET", asked or f"/v1/networks/n{self.networks - 1}")
                took = time.perf_counter() - begun
                self.close()  # It would not be kept while others are filled.
                return took
            self.close()
            if time.perf_counter() - begun > PATIENCE:
                raise TimeoutError((self._folder / "log").read_text())
            time.sleep(0.01)  # the pace of asking

    def stop(self) -> None:
        self.close()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        self.request(method, path, json.dumps(body) if body is not None else None, {"Content-Type": "application/json"})
        answer = self.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {text.decode()}")

    def seconds(self, *question: Any) -> float:
        begun = time.perf_counter()
        self.ask(*question)
        return time.perf_counter() - begun

    @property
    def memory(self) -> int:
        """Bytes that it has in memory, with the processes that it has made."""
        assert self._process is not None
        pid, found = str(self._process.pid), 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # It may have ended.
                status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                if folder.name == pid or status["PPid"].strip() == pid:
                    found += int(status.get("VmRSS", "0 kB").split()[0]) * 1024
        return found


def measure(controllers: list[Controller], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Networks -> question -> seconds that the answers took."""
    took: dict[int, dict[str, list[float]]] = {one.networks: defaultdict(list) for one in controllers}
    draws = random.Random(1)
    for number in range(-WARM, rounds):
        for one in draws.sample(controllers, len(controllers)):
            name, new = f"n{draws.randrange(one.networks)}", f"new{number + WARM}"
            tenant = f"t{int(name[1:]) // OF_A_TENANT}"
            wish = {"manifest": manifest(**{name: network(tenant=tenant, description=f"{number}")})}
            for what, question in {
                "get": ("GET", f"/v1/networks/{name}"),
                "page": ("GET", f"/v1/ports?network={name}"),
                "plan": ("POST", "/v1/plan", wish),
                "create": ("POST", "/v1/apply", {"manifest": manifest(**{new: network(tenant=tenant)})}),
                "delete": ("DELETE", f"/v1/networks/{new}?cascade=true"),
                "status": ("GET", "/v1/status"),
                "metrics": ("GET", "/metrics"),
            }.items():
                seconds = one.seconds(*question)
                if number >= 0:
                    took[one.networks][what].append(seconds)
    return took


@contextlib.contextmanager
def serving(folder: Path, networks: int) -> Iterator[Controller]:
    (folder / "state").mkdir(parents=True)
    path = folder / "state" / "store.db"
    one = Controller(folder, networks)
    begun = time.perf_counter()
    try:
        one.start("/v1/status")
        with Client(f"unix:{folder}/api.sock") as operator:
            for place, name in enumerate(HOSTS, 1):
                operator.join(name, f"192.0.2.{place}", mtu=1600)
            operator.apply(first(networks))
    finally:
        one.stop()
    fill(path, networks)
    size = path.stat().st_size
    print(f"{networks:,} networks: filled in {time.perf_counter() - begun:.0f} s, {size / networks:,.0f} bytes of each")
    try:
        one.start()
        yield one
    finally:
        one.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nestnet.bench.serve", description=__doc__.split("\n")[0])
    parser.add_argument("--networks", type=int, action="append", help="how many, may be repeated (1000, 1000000)")
    parser.add_argument("--rounds", type=int, default=100, help="times that each is asked (100)")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # and the controllers, which inherit it
    missed = []
    print(computer())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sizes = sorted(options.networks or NETWORKS)
        controllers = [stack.enter_context(serving(Path(folder) / str(n), n)) for n in sizes]
        took = measure(controllers, options.rounds)
        print(f"\n| ms | {' | '.join(f'{n:,}' for n in sizes)} | ratio |\n|{'---|' * (len(sizes) + 2)}")
        for what in took[sizes[0]]:
            middle = [statistics.median(took[n][what]) * 1e3 for n in sizes]
            ratio = middle[-1] / middle[0]
            print(f"| {what} | {' | '.join(f'{one:.2f}' for one in middle)} | {ratio:.2f} |")
            missed += [f"{what}: {ratio:.2f} times"] if ratio > MOST.get(what, ratio) else []
        print(f"| MB in memory | {' | '.join(f'{one.memory / 1e6:.0f}' for one in controllers)} | |")
        for one in controllers:
            one.stop()
        again = [one.start() for one in controllers]
        print(f"| s to the first answer after a restart | {' | '.join(f'{one:.2f}' for one in again)} | |")
        missed += [f"restart: {one:.1f} s" for one in again if one > RESTART]
    for text in missed:
        print(f"MISSED: {text}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
