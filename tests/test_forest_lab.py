"""What happens to carriers, with real machines, workloads and packets: rows 3F of docs/hostile.md.

acme    w1 w2 w3   carries child  x y z, and that carries grand  g1 g2 (on x and y)
beta    b1 b2 b3   carries sibling  s t                    each on machine m1, m2, m3; all have the same addresses
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_api import Controller
from test_lab import ROOT, name, nestnet

from nestnet.agent import netns
from nestnet.api.client import Client
from nestnet.lab import state
from nestnet.lab.state import Lab
from nestnet.model.errors import NotFound

__all__ = ["name"]

pytestmark = pytest.mark.root

SOON = 5.0  # Seconds in which a state is told, and in which it comes back.
LAN = {"lan": {"cidr": "10.0.0.0/24"}}


def ports(hosts: str, names: str, host: bool = True) -> dict[str, Any]:
    return {
        port: {"segment": "lan", "host": at, "hosts": host}
        for port, at in zip(names.split(), hosts.split(), strict=True)
    }


GRAND = {"segments": LAN, "ports": ports("x y", "g1 g2", host=False)}
CHILD = {"segments": LAN, "ports": ports("w1 w2 w3", "x y z"), "networks": {"grand": GRAND}}
SIBLING = {"segments": LAN, "ports": ports("b1 b2", "s t", host=False)}
NETWORKS = {
    "acme": {"segments": LAN, "ports": ports("m1 m2 m3", "w1 w2 w3"), "networks": {"child": CHILD}},
    "beta": {"segments": LAN, "ports": ports("m1 m2 m3", "b1 b2 b3"), "networks": {"sibling": SIBLING}},
}


class Flow:
    """A ping from one port to another, 50 a second, until it is ended."""

    def __init__(self, lab: Lab, client: Client, source: str, target: str, log: Path) -> None:
        self.log = log
        row = client.get("port", source)["row"]
        address = client.get("port", target)["addresses"][0].partition("/")[0]
        with log.open("wb") as output:
            command = ["ping", "-n", "-D", "-i", "0.02", "-W", "1", address]
            self.ping = netns.spawn(netns.path(lab.workload(row)), command, output=output)

    def answers(self, since: float = 0.0) -> int:
        found = re.findall(r"^\[([0-9.]+)\] \d+ bytes from ", self.log.read_text(), re.MULTILINE)
        return sum(float(at) > since for at in found)

    def gap(self) -> tuple[float, float]:
        """The longest time without an answer, in seconds, and when that began."""
        at = [float(at) for at in re.findall(r"^\[([0-9.]+)\] \d+ bytes from ", self.log.read_text(), re.MULTILINE)]
        return max((late - early, early) for early, late in pairwise(at))

    def end(self) -> tuple[int, int]:
        """Packets sent and answers received."""
        self.ping.send_signal(signal.SIGINT)
        self.ping.wait(20)
        text = self.log.read_text()
        assert "DUP!" not in text
        found = re.search(r"(\d+) packets transmitted, (\d+) received", text)
        assert found, text
        return int(found[1]), int(found[2])


@contextlib.contextmanager
def unharmed(lab: Lab, client: Client, source: str, target: str, log: Path) -> Iterator[Flow]:
    """Not a packet between these is lost meanwhile."""
    flow = Flow(lab, client, source, target, log)
    try:
        until(lambda: flow.answers() > 3)
        yield flow
    finally:
        sent, received = flow.end()
    # The last may be on its way.
    assert sent - received <= 1, (source, target, sent, received, flow.gap())
    assert received > 10


def until(condition: Callable[[], bool], seconds: float = 30.0) -> float:
    """Wait until it is so; how long that took, in seconds."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)
    return time.monotonic() - begun


def passes(lab: str, source: str, target: str) -> bool:
    ping = ["ping", "-q", "-c", "1", "-W", "1", target]
    return nestnet("exec", source, "--lab", lab, "--", *ping, code=None).returncode == 0


def states(client: Client) -> dict[str, tuple[str, str | None]]:
    return {one["path"]: (one["state"], one["cause"]) for kind in ("network", "port") for one in client.list(kind)}


def told(client: Client, wanted: Mapping[str, tuple[str, str | None]]) -> float:
    """How long it took until all of these were told, and nothing of the siblings but that they are up."""

    def so() -> bool:
        found = states(client)
        assert {state for path, state in found.items() if path.startswith("beta/sibling")} == {("up", None)}
        return all(found[path] == state for path, state in wanted.items())

    return until(so, SOON)


def dropped(client: Client, port: str, reason: str) -> int:
    found = client.get("port", port)["attachment"] or {}
    return int((found.get("drops") or {}).get(reason, 0))


ABOVE = ("acme/child/x", "acme/child/y", "acme/child/z", "acme/child/grand/g1", "acme/child/grand/g2")
UP: tuple[str, str | None] = ("up", None)


def test_what_happens_to_a_carrier_happens_to_what_it_carries_and_to_nothing_else(name: str, tmp_path: Path) -> None:
    file = tmp_path / "forest.yaml"
    machines: dict[str, Any] = {"m1": {}, "m2": {}, "m3": {}}
    file.write_text(yaml.safe_dump({"apiVersion": "nestnet/v1", "machines": machines, "networks": NETWORKS}))
    nestnet("up", str(file), "--name", name)
    lab = state.load(name)
    assert lab is not None
    with contextlib.ExitStack() as last:
        client = last.enter_context(Client(lab.controller))
        last.enter_context(unharmed(lab, client, "beta/sibling/s", "beta/sibling/t", tmp_path / "st"))
        own = {port["path"]: port["addresses"][0].partition("/")[0] for port in client.list("port")}
        y, z, g2 = own["acme/child/y"], own["acme/child/z"], own["acme/child/grand/g2"]
        assert passes(name, "acme/child/x", y)
        assert passes(name, "acme/child/grand/g1", g2)
        assert set(states(client).values()) == {UP}

        # Disabled: closed on every level above, with the reason; and it comes back as it was.
        nestnet("disable", "network", "acme", "--lab", name)
        down = ("down: carrier", "network acme is disabled")
        told(client, {"acme": ("down: disabled", down[1]), "acme/child": down, **dict.fromkeys(ABOVE, down)})
        for source, target in (("acme/child/x", y), ("acme/child/grand/g1", g2)):
            assert not passes(name, source, target)
            until(lambda source=source: dropped(client, source, "carrier_down") > 0, 15)  # type: ignore[misc]
        shown = nestnet("get", "ports", "--network", "acme/child", "--lab", name, "-o", "wide").stdout.decode()
        assert shown.count("network acme is disabled") == 3
        assert "cause:" in nestnet("describe", "port", "acme/child/x", "--lab", name).stdout.decode()
        status = nestnet("status", "--lab", name).stdout.decode()
        assert re.search(r"network acme/child +down: carrier +network acme is disabled", status), status
        assert "beta" not in status
        trace = nestnet("trace", "acme/child/x", y, "--lab", name).stdout.decode()
        assert trace.splitlines()[-1] == "drop: carrier_down: network acme is disabled"
        nestnet("enable", "network", "acme", "--lab", name)
        told(client, dict.fromkeys((*ABOVE, "acme", "acme/child"), UP))
        assert passes(name, "acme/child/grand/g1", g2)

        # One host port: what lives there is down, what does not is not touched.
        with unharmed(lab, client, "acme/child/x", "acme/child/z", tmp_path / "xz"):
            client.set_enabled("port", "acme/w2", False)
            down = ("down: carrier", "port acme/w2 is disabled")
            told(client, {"acme/child/y": down, "acme/child/grand/g2": down, "acme/child/x": UP, "acme/child/z": UP,
                          "acme/child": ("degraded", "1 of 3 hosts are down: port acme/w2 is disabled")})  # fmt: skip
            until(lambda: not passes(name, "acme/child/x", y), SOON)
            client.set_enabled("port", "acme/w2", True)
            told(client, dict.fromkeys(ABOVE, UP))
            until(lambda: passes(name, "acme/child/x", y), SOON)

        # Cut by its carrier's policies.
        tcp = {"from": "any", "to": "any", "allow": "tcp/80"}
        client.apply({"apiVersion": "nestnet/v1", "networks": {"acme": {"policies": [tcp]}}})
        cut = "in network acme no policy allows carriage between host {} and any other in use"
        on = dict(zip(ABOVE, ("w1", "w2", "w3", "w1", "w2"), strict=True))
        told(client, {path: ("down: carrier", cut.format(host)) for path, host in on.items()})
        until(lambda: not passes(name, "acme/child/x", y), SOON)
        until(lambda: dropped(client, "acme/child/x", "carrier_policy") > 0, 15)
        client.apply({"apiVersion": "nestnet/v1", "networks": {"acme": {"policies": []}}})
        told(client, dict.fromkeys(ABOVE, UP))
        until(lambda: passes(name, "acme/child/x", y), SOON)

        recarried_under_traffic(lab, client, tmp_path)

        # A machine is lost, and comes back: nobody writes anything.
        with unharmed(lab, client, "acme/child/x", "acme/child/y", tmp_path / "xy"):
            revision = client.status()["revision"]
            agent = next(process for process in lab.processes if process.name == "agent-m3")
            command = (Path("/proc") / str(agent.pid) / "cmdline").read_bytes().decode().split("\0")[:-1]
            room = lab.machine("m3")
            os.kill(agent.pid, signal.SIGKILL)
            subprocess.run(["ip", "-n", room, "link", "set", "eth0", "down"], check=True)
            down = ("down: carrier", "machine m3 says nothing")
            took = told(client, {"acme/w3": down, "acme/child/z": down, "acme/child/x": UP, "beta/b3": down})
            assert not passes(name, "acme/child/x", z)
            subprocess.run(["ip", "-n", room, "link", "set", "eth0", "up"], check=True)
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            with (lab.logs / "again.log").open("wb") as log:
                again = netns.spawn(netns.path(room), command, output=log, environment=environment)
            last.callback(lambda: (again.terminate(), again.wait(20)))
            back = told(client, dict.fromkeys((*ABOVE, "acme/w3", "beta/b3"), UP))
            print(f"a lost machine is told after {took:.2f} s, and that it is back {back:.2f} s after its agent began")
            until(lambda: passes(name, "acme/child/x", z), SOON)
            assert client.status()["revision"] == revision

        deleted(lab, client)


def recarried_under_traffic(lab: Lab, client: Client, folder: Path) -> None:
    """To another carrier and back. Nothing comes twice, and what was realised does not depend on the old one."""
    flow = Flow(lab, client, "acme/child/grand/g1", "acme/child/grand/g2", folder / "moving")
    until(lambda: flow.answers() > 3)
    same = [word for pair in ("x=b1", "y=b2", "z=b3") for word in ("--host", pair)]
    done = nestnet("recarry", "acme/child", "--carrier", "beta", *same, "--lab", lab.name)
    assert b"network beta/child is carried by beta" in done.stderr
    realised = time.time()
    until(lambda: flow.answers(realised) > 20)
    client.set_enabled("network", "acme", False)
    disabled = time.time()
    until(lambda: flow.answers(disabled) > 20)
    print(f"on the same machines another carrier costs {flow.gap()[0]:.3f} s")
    sent, received = flow.end()
    assert received > sent - 50 * SOON
    client.set_enabled("network", "acme", True)

    # To hosts on other machines: its ports live there and nowhere else.
    other = [word for pair in ("x=w2", "y=w3", "z=w1") for word in ("--host", pair)]
    nestnet("recarry", "beta/child", "--carrier", "acme", *other, "--lab", lab.name)
    places = {port["path"]: port["machine"] for port in client.list("port") if port["path"].startswith("acme/child")}
    assert places == dict(zip(ABOVE, ("m2", "m3", "m1", "m2", "m3"), strict=True))
    target = client.get("port", "acme/child/grand/g2")["addresses"][0].partition("/")[0]
    # What was on m1 is not there any more: m2 and m3 exchange it, and m1 sees nothing of it.
    vni = client.get("segment", "acme/child/grand/lan")["vni"]
    only = f"udp port 4789 and ether[46:4] & 0xffffff00 = {vni << 8}"
    seen = {machine: folder / f"seen-{machine}" for machine in ("m1", "m2")}
    with contextlib.ExitStack() as watching:
        for machine, file in seen.items():
            output = watching.enter_context(file.open("wb"))
            command = ["tcpdump", "-nlqi", "eth0", "--immediate-mode", only]
            dump = netns.spawn(netns.path(lab.machine(machine)), command, output=output)
            watching.callback(lambda dump=dump: (dump.terminate(), dump.wait(20)))
            until(lambda file=file: "listening on" in file.read_text())  # type: ignore[misc]
        with unharmed(lab, client, "acme/child/grand/g1", "acme/child/grand/g2", folder / "moved"):
            until(lambda: seen["m2"].read_text().count(".4789: ") > 40)
    assert seen["m1"].read_text().count(".4789: ") == 0
    nestnet("disable", "port", "acme/w3", "--lab", lab.name)
    assert not passes(lab.name, "acme/child/grand/g1", target)
    nestnet("enable", "port", "acme/w3", "--lab", lab.name)
    back = [word for pair in ("x=w1", "y=w2", "z=w3") for word in ("--host", pair)]
    nestnet("recarry", "acme/child", "--carrier", "acme", *back, "--lab", lab.name)
    assert passes(lab.name, "acme/child/grand/g1", target)


def deleted(lab: Lab, client: Client) -> None:
    """With what it carries, and the workloads with it."""
    rows = [port["row"] for port in client.list("port") if port["path"].startswith("acme/")]
    refused = nestnet("delete", "network", "acme", "--lab", lab.name, code=1).stderr.decode()
    assert "is needed by network acme/child" in refused
    client.delete("network", "acme", cascade=True)
    until(lambda: not any(netns.exists(lab.workload(row)) for row in rows))
    with pytest.raises(NotFound):
        client.get("network", "acme/child")


def stored_ports(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / "store.db")) as store:
        return int(store.execute("SELECT count(*) FROM port").fetchone()[0])


def test_a_deletion_in_parts_outlives_its_controller(tmp_path: Path) -> None:
    """Killed in the middle, again and again: whoever asked asks again with the same key, and it ends as if nothing had
    been."""
    lan = {"lan": {"cidr": "10.0.0.0/16"}}
    below = {f"q{n}": {"segment": "lan", "host": "p"} for n in range(8000)}
    large = {
        "segments": lan,
        "ports": {"p": {"segment": "lan", "host": "m1", "hosts": True}},
        "networks": {"below": {"segments": lan, "ports": below}},
    }
    controller = Controller(tmp_path)
    controller.start()
    try:
        with Client(controller.url, patience=120) as client, Client(controller.url, patience=120) as looking:
            client.join("m1", "192.0.2.1")
            client.apply({"apiVersion": "nestnet/v1", "networks": {"large": large, "other": {"segments": lan}}})

            def is_begun() -> bool:
                found = [one for one in looking.list("network") if one["path"] == "large"]
                return not found or not found[0]["enabled"]

            killed = 0
            with ThreadPoolExecutor(1) as pool:
                deleting = pool.submit(client.delete, "network", "large", True, key="k")
                for _ in range(2):
                    until(lambda: deleting.done() or is_begun())
                    if not deleting.done():
                        controller.stop(signal.SIGKILL)
                        killed += bool(stored_ports(tmp_path))
                        controller.start()
                done = deleting.result()
            assert killed, "it was over before it could be interrupted"
            assert done["revision"] == looking.status()["revision"]
            assert [one["path"] for one in looking.list("network")] == ["other"]
            assert list(looking.list("port")) == []
    finally:
        controller.stop(signal.SIGKILL)
