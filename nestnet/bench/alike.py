"""What the time of an answer tells a tenant of how deep its networks are carried, by route: level 6 and 16 to level 1.

One controller. In it a tower of 15 networks of as many tenants, each granted hosts by the one below, two of them
encapsulated; and four tenants that have the same networks. Two have been granted the machines: one is the reference,
the other is what no row may be believed beyond, A/A. The others have been granted ports at level 5 and 15. Each route
is asked by all of them in turn, in an order drawn anew each time, over one connection each, and all on one CPU. A round
gives one ratio; told are medians with a bootstrap 95 % interval.

    python -m nestnet.bench.alike [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nestnet.api.client import Client, Credentials
from nestnet.bench.method import A_A, Sample, ratio
from nestnet.model.errors import Unreachable

LEVELS = {"one": 1, "two": 1, "six": 6, "top": 16}
REFERENCE, SAME = "one", "two"
TITLES = {"two": "A/A", "six": "level 6", "top": "level 16"}
HOSTS = ("k1", "k2")
ENCAPSULATED = (5, 15)  # levels
PATIENCE = 30.0  # seconds for a controller to start
PACE = 0.01  # seconds between two questions
WARM = 3  # times that each route is asked before anything counts
HEARD = 3.0  # seconds after which machines say again that they are there
ROUTES = (
    "GET /v1/networks",
    "GET /v1/networks/{}",
    "GET /v1/networks/{}/in",
    "GET /v1/networks/none",
    "GET /v1/segments",
    "GET /v1/ports",
    "GET /v1/ports/{}/k1",
    "GET /v1/policies",
    "GET /v1/hosts",
    "GET /v1/hosts?network={}",
    "GET /v1/grants",
    "GET /v1/status",
    "GET /v1/trace?port={}/in/k1&to=10.0.0.3",
    "POST /v1/plan",
)


def network(**more: Any) -> dict[str, Any]:
    """A port on each host, which is a host itself."""
    ports = {name: {"segment": "lan", "host": name, "hosts": True} for name in HOSTS}
    policies = [{"from": "any", "to": "any", "allow": "any"}]
    return {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": ports, "policies": policies, **more}


def manifest(networks: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "nestnet/v1", "networks": networks}


def own(name: str) -> dict[str, Any]:
    """What each of the four has."""
    routers = {"core": {"segments": ["lan"]}, "edge": {}}
    links = {"up": {"between": ["core", "edge"]}}
    return manifest({name: network(routers=routers, links=links, networks={"in": network()})})


class Tenant(http.client.HTTPConnection):
    """One of the four, and its connection: a unix socket."""

    def __init__(self, name: str, path: Path, token: str) -> None:
        super().__init__("localhost")
        self.name, self._path, self._token = name, path, token

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))

    def seconds(self, route: str) -> float:
        """How long the answer takes."""
        method, path = route.format(self.name).split(" ")
        body = json.dumps({"manifest": own(self.name)}) if method == "POST" else None
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        begun = time.perf_counter()
        self.request(method, path, body, headers)
        answer = self.getresponse()
        text = answer.read()
        took = time.perf_counter() - begun
        if answer.status != (404 if path.endswith("/none") else 200):
            raise RuntimeError(f"{method} {path}: {answer.status} {text.decode()}")
        return took


@contextlib.contextmanager
def controller(folder: Path) -> Iterator[Client]:
    """One with two machines, until it is no longer needed; its operator."""
    url = f"unix:{folder}/api.sock"
    command = [sys.executable, "-m", "nestnet", "controller", "--listen", url, "--state", str(folder / "state")]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process, Client(url) as operator:
        try:
            end = time.monotonic() + PATIENCE
            while True:
                try:
                    operator.status()
                    break
                except Unreachable:
                    if time.monotonic() > end:
                        raise
                    time.sleep(PACE)  # the pace of asking
            for place, name in enumerate(HOSTS, 1):
                operator.join(name, f"192.0.2.{place}", mtu=1600)
            yield operator
        finally:
            process.terminate()


def populate(operator: Client, path: Path) -> list[Tenant]:
    """The tower, and the four beside it."""
    line = [f"low{level}" for level in range(1, max(LEVELS.values()))]
    tower: dict[str, Any] = {}
    for level, name in reversed(list(enumerate(line, 1))):
        carriage = "encapsulated" if level in ENCAPSULATED else "flat"
        tower = {name: network(tenant=name, carriage=carriage, networks=tower)}
    operator.apply({**manifest(tower), "tenants": {name: {} for name in (*line, *LEVELS)}})
    tenants = []
    with contextlib.ExitStack() as stack:
        clients = {0: operator}  # by level
        for level, name in [*enumerate(line, 1), *((level, name) for name, level in LEVELS.items())]:
            token = operator.make_token(f"{name}-own", tenants={name: "owner"})["token"]
            client = stack.enter_context(Client(f"unix:{path}", credentials=Credentials(token)))
            below = None if level == 1 else line[level - 2]
            client.redeem(clients[level - 1].invite_tenant(below)["invitation"])
            if name in LEVELS:
                client.apply(own(name))
                tenants.append(Tenant(name, path, token))
            else:
                clients[level] = client
    return tenants


def measure(operator: Client, tenants: list[Tenant], rounds: int) -> dict[str, dict[str, list[Sample]]]:
    """Route -> tenant -> seconds that the answers took."""
    took: dict[str, dict[str, list[Sample]]] = {route: {one.name: [] for one in tenants} for route in ROUTES}
    draws, heard = random.Random(1), 0.0
    for number in range(-WARM, rounds):
        if time.monotonic() - heard > HEARD:  # as agents do
            heard, revision = time.monotonic(), operator.status()["revision"]
            for machine in operator.list("machine"):
                operator.report(machine["id"], revision)
        for route in ROUTES:
            for one in draws.sample(tenants, len(tenants)):
                sample = Sample(one.seconds(route), 0.0)
                if number >= 0:
                    took[route][one.name].append(sample)
        if sys.stderr.isatty():
            print(f"\r{max(number + 1, 0)} of {rounds}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return took


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nestnet.bench.alike", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=150, help="times that each route is asked by each (150)")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # and the controller, which inherits it
    with tempfile.TemporaryDirectory() as folder, controller(Path(folder)) as operator:
        tenants = populate(operator, Path(folder) / "api.sock")
        took = measure(operator, tenants, options.rounds)
        for one in tenants:
            one.close()
    print("| | ms at level 1 | " + " | ".join(TITLES.values()) + " |")
    print("|---" * (len(TITLES) + 2) + "|")
    void = []
    for route, samples in took.items():
        middle = statistics.median(sample.rate for sample in samples[REFERENCE]) * 1e3
        found = {name: ratio(samples[name], samples[REFERENCE]) for name in TITLES}
        print(f"| {route.format('acme')} | {middle:.2f} | " + " | ".join(map(str, found.values())) + " |")
        if not A_A[0] <= found[SAME].median <= A_A[1]:
            void.append(route)
    if void:
        print(f"void: A/A left {A_A[0]}-{A_A[1]} at {', '.join(void)}", file=sys.stderr)
    return 1 if void else 0


if __name__ == "__main__":
    sys.exit(main())
