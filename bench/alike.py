"""What the time of an answer tells a tenant of how deep its networks are carried, by route: level 6 and 16 to level 1.

Four controllers beside each other. In two of them the tenant's hosts are machines: one is the reference, the other is
what no row may be believed beyond, A/A. In the others the hosts are ports at level 5 and 15 of networks of as many
tenants, each granted by the one below; the uppermost of these is encapsulated. Each route is asked of all of them in
turn, each round beginning with another, over one connection each, and all on one CPU. A round gives one ratio; told are
medians with a bootstrap 95 % interval.

    python -m bench.alike [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.throughput import A_A, Interval, Sample, ratio
from nestnet.api.client import Client, Credentials
from nestnet.model.errors import Unreachable

LEVELS = {"level 1": 1, "A/A": 1, "level 6": 6, "level 16": 16}
REFERENCE = "level 1"
PATIENCE = 30.0  # seconds for a controller to start
PACE = 0.01  # seconds between two questions
WARM = 3  # times that each route is asked before anything counts
HEARD = 3.0  # seconds after which machines say again that they are there
TENANT = "acme"


def network(*hosts: str, **more: Any) -> dict[str, Any]:
    """Ports k1, k2, ... on these hosts, which are hosts."""
    ports = {f"k{place}": {"segment": "lan", "host": host, "hosts": True} for place, host in enumerate(hosts, 1)}
    policies = [{"from": "any", "to": "any", "allow": "any"}]
    return {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": ports, "policies": policies, **more}


def manifest(**networks: Any) -> dict[str, Any]:
    return {"apiVersion": "nestnet/v1", "networks": networks}


OWN = manifest(
    acme=network(
        "k1",
        "k2",
        routers={"core": {"segments": ["lan"]}, "edge": {}},
        links={"up": {"between": ["core", "edge"]}},
        networks={"in": network("k1", "k2")},
    )
)
ROUTES = (
    "GET /v1/networks",
    "GET /v1/networks/acme",
    "GET /v1/networks/acme/in",
    "GET /v1/networks/none",
    "GET /v1/segments",
    "GET /v1/ports",
    "GET /v1/ports/acme/k1",
    "GET /v1/policies",
    "GET /v1/hosts",
    "GET /v1/hosts?network=acme",
    "GET /v1/grants",
    "GET /v1/status",
    "GET /v1/trace?port=acme/in/k1&to=10.0.0.3",
    "POST /v1/plan",
)


class _Local(http.client.HTTPConnection):
    """Over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


class World:
    """A controller with the tenant's networks at a level and the one above."""

    def __init__(self, folder: Path, level: int) -> None:
        self.level, self.folder = level, folder
        self.socket = folder / "api.sock"
        self.operator = Client(f"unix:{self.socket}")
        self.process: subprocess.Popen[bytes] | None = None
        self.http = _Local(self.socket)
        self.token, self.heard = "", 0.0

    def start(self) -> None:
        command = [sys.executable, "-m", "nestnet", "controller", "--listen", f"unix:{self.socket}"]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen([*command, "--state", str(self.folder / "state")], stderr=log)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.operator.status()
                break
            except Unreachable:
                if time.monotonic() > end:
                    raise
                time.sleep(PACE)  # the pace of asking
        hosts = ("m1", "m2") if self.level > 1 else ("k1", "k2")
        for place, name in enumerate(hosts, 1):
            self.operator.join(name, f"192.0.2.{place}", mtu=1550 if self.level > 1 else 1500)
        below = [f"low{place}" for place in range(1, self.level)]
        tower: dict[str, Any] = {}
        for place, name in reversed(list(enumerate(below))):
            made = network(*(hosts if place == 0 else ("k1", "k2")), tenant=name, networks=tower)
            if place == len(below) - 1:
                made["carriage"] = "encapsulated" if place else "flat"
            tower = {name: made}
        self.operator.apply({**manifest(**tower), "tenants": {name: {} for name in (*below, TENANT)}})
        with contextlib.ExitStack() as stack:
            above, last = self.operator, None
            for name in (*below, TENANT):
                self.token = self.operator.make_token(f"{name}-own", tenants={name: "owner"})["token"]
                client = stack.enter_context(Client(f"unix:{self.socket}", credentials=Credentials(self.token)))
                client.redeem(above.invite_tenant(last)["invitation"])
                above, last = client, name
            above.apply(OWN)
        self.alive()

    def alive(self) -> None:
        """As agents do."""
        if time.monotonic() - self.heard > HEARD:
            self.heard = time.monotonic()
            revision = self.operator.status()["revision"]
            for machine in self.operator.list("machine"):
                self.operator.report(machine["id"], revision)

    def seconds(self, route: str) -> float:
        """How long an answer takes."""
        method, path = route.split(" ")
        body = json.dumps({"manifest": OWN}) if method == "POST" else None
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        begun = time.perf_counter()
        self.http.request(method, path, body, headers)
        answer = self.http.getresponse()
        answer.read()
        took = time.perf_counter() - begun
        if answer.status != (404 if path.endswith("/none") else 200):
            raise RuntimeError(f"{route} at level {self.level}: {answer.status}; see {self.folder}")
        return took

    def stop(self) -> None:
        self.http.close()
        self.operator.close()
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)


@contextlib.contextmanager
def worlds() -> Iterator[dict[str, World]]:
    """All of them, until they are no longer needed."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name, level in LEVELS.items():
            made = World(Path(stack.enter_context(tempfile.TemporaryDirectory())), level)
            stack.callback(made.stop)
            made.start()
            found[name] = made
        yield found


def measure(there: dict[str, World], rounds: int) -> dict[str, dict[str, list[Sample]]]:
    """Route -> world -> seconds that its answers took."""
    took: dict[str, dict[str, list[Sample]]] = {route: {name: [] for name in there} for route in ROUTES}
    for number in range(-WARM, rounds):
        for world in there.values():
            world.alive()
        for route in ROUTES:
            for name in (*list(there)[number % len(there) :], *list(there)[: number % len(there)]):
                sample = Sample(there[name].seconds(route), 0.0)
                if number >= 0:
                    took[route][name].append(sample)
        if sys.stderr.isatty():
            print(f"\r{max(number + 1, 0)} of {rounds}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return took


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.alike", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="times that each route is asked of each (100)")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # and the controllers, which inherit it
    with worlds() as there:
        took = measure(there, options.rounds)
    others = [name for name in LEVELS if name != REFERENCE]
    print(f"| | ms at {REFERENCE} | " + " | ".join(others) + " |")
    print("|---" * (len(others) + 2) + "|")
    void = []
    for route in ROUTES:
        middle = statistics.median(sample.rate for sample in took[route][REFERENCE]) * 1e3
        found: dict[str, Interval] = {name: ratio(took[route][name], took[route][REFERENCE]) for name in others}
        print(f"| {route} | {middle:.2f} | " + " | ".join(map(str, found.values())) + " |")
        if not A_A[0] <= found["A/A"].median <= A_A[1]:
            void.append(route)
    if void:
        print(f"void: A/A left {A_A[0]}-{A_A[1]} at {', '.join(void)}", file=sys.stderr)
    return 1 if void else 0


if __name__ == "__main__":
    sys.exit(main())
