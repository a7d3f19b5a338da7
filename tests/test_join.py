"""Machines that join over the wire, as outside a lab: controller, TLS, tokens, certificates, and who is shut out.

nn-LAB             bridge `wire`, the controller at 192.0.2.254:7443
  m1 to m4         each joins by `nestnet join` and runs `nestnet agent` from the file that this wrote
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killing import stop
from test_lab import ROOT, leftovers
from test_operating import Flow, until

from nestnet.agent import links, netns
from nestnet.api.client import Client
from nestnet.lab.down import down
from nestnet.lab.state import Lab, Process, Seat, locked
from nestnet.lab.wire import make_wire

pytestmark = pytest.mark.root

LIFE = 27.0  # seconds that a certificate counts here; a third of it is longer than any test stops an agent
CONTROLLER = "https://192.0.2.254:7443"
NET = """\
apiVersion: nestnet/v1
networks:
  acme:
    segments: {s: {cidr: 10.0.0.0/24}}
    ports:
      a: {segment: s, host: m1}
      b: {segment: s, host: m2}
      c: {segment: s, host: m3}
      d: {segment: s, host: m4}
"""


class Site:
    """A controller and machines, each in its place."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        seats = [Seat(f"m{n}", f"192.0.2.{n}/24", 1500) for n in (1, 2, 3, 4)]
        seats[1] = replace(seats[1], trunks={"campus": "eth1"})
        self.lab = Lab(name, machines=tuple(seats))
        self.socket = folder / "controller.sock"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def build(self) -> None:
        self.lab.save()
        make_wire(self.lab)

        def controllers_address() -> None:
            with links.netlink() as ipr:
                bridge = links.find(ipr, "wire")
                assert bridge is not None
                ipr.addr("add", index=bridge.index, address="192.0.2.254", prefixlen=24)
                ipr.link("set", index=bridge.index, state="up")

        netns.run_in(netns.path(self.lab.wire), controllers_address)
        (self.folder / "controller.toml").write_text(
            f'state = "{self.folder}/state"\nlisten = ["unix:{self.socket}", "{CONTROLLER}"]\n'
            f"certificate_hours = {LIFE / 3600}\n"
        )

    def spawn(self, name: str, namespace: str, *arguments: str, bounded: bool = False) -> None:
        """Start a process; `bounded`: with no more rights than the agent's unit gives it."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "nestnet", *arguments]
        if bounded:
            unit = (ROOT / "packaging/systemd/nestnet-agent.service").read_text()
            rights = re.search(r"^CapabilityBoundingSet=(.+)$", unit, re.MULTILINE)
            assert rights is not None
            kept = ",".join(f"+{right.lower().removeprefix('cap_')}" for right in rights[1].split())
            command = ["setpriv", f"--bounding-set=-all,{kept}", "--no-new-privs", *command]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = netns.spawn(netns.path(namespace), command, output=log, environment=environment)
        self.processes[name] = process
        known = tuple(Process.of(each, one.pid) for each, one in self.processes.items() if one.poll() is None)
        Lab(self.lab.name, machines=self.lab.machines, processes=known).save()

    def start_controller(self) -> None:
        self.spawn("controller", self.lab.wire, "controller", "--config", str(self.folder / "controller.toml"))
        until(self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(Exception), self.client() as client:
            client.status()
            return True
        return False

    def join(
        self, machine: str, own: str | None = None, place: str | None = None, more: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Type `nestnet join` on a machine, with a token for it."""
        with self.client() as client:
            token = client.let_join(machine, 60)["token"]
        seat = next(seat for seat in self.lab.machines if seat.name == machine)
        command = [
            *(sys.executable, "-m", "nestnet", "join", CONTROLLER, "--machine", machine),
            *("--address", seat.address.partition("/")[0], "--token-file", "-"),
            *("--state", str(self.folder / (own or machine)), "--config", str(self.folder / f"{own or machine}.toml")),
            *more,
        ]
        work = partial(subprocess.run, command, input=token, capture_output=True, text=True, cwd=ROOT, timeout=60)
        done: subprocess.CompletedProcess[str] = netns.run_in(netns.path(self.lab.machine(place or machine)), work)
        return done

    def start_agent(self, machine: str) -> None:
        more = ("--pins", str(self.lab.pins / machine), "--workloads", self.lab.workloads)
        config = ("--config", str(self.folder / f"{machine}.toml"))
        self.spawn(machine, self.lab.machine(machine), "agent", *config, *more, bounded=True)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def client(self) -> Client:
        return Client(f"unix:{self.socket}")

    def workload(self, port: str) -> Path:
        with self.client() as client:
            return netns.path(self.lab.workload(client.get("port", port)["row"]))

    def realised(self) -> bool:
        with self.client() as client:
            status = client.status()
            return all((m["realised"] or 0) >= status["revision"] and not m["problems"] for m in status["machines"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    folder = tmp_path_factory.mktemp("site")
    made = Site(name, folder)
    try:
        with locked(name):
            made.build()
        made.start_controller()
        for seat in made.lab.machines:
            done = made.join(seat.name, more=("--trunk", "campus=eth1") if seat.name == "m2" else ())
            assert done.returncode == 0, done.stderr
            made.start_agent(seat.name)
        with made.client() as client:
            import yaml

            client.apply(yaml.safe_load(NET))
        until(made.realised)
        yield made
    finally:
        down(name)
    assert leftovers(name) == []


def test_machines_that_have_joined_forward(site: Site) -> None:
    flow = Flow(site.workload("acme/a"), site.workload("acme/b"), "10.0.0.3")
    until(lambda: len(flow.arrived) > 50)
    assert flow.end() == []
    with site.client() as client:
        told = [line["event"] for line in client.events(last=200)]
    names = {seat.name for seat in site.lab.machines}
    assert {f"machine {name} has joined" for name in names} <= {one["text"] for one in told}
    assert {one["who"] for one in told if one["kind"] == "joined"} == {f"machine:{name}" for name in names}


def test_a_machine_joins_with_its_trunks_if_they_are_there(site: Site) -> None:
    with site.client() as client:
        assert {m["name"]: m["trunks"] for m in client.list("machine")} == {
            "m1": {}, "m2": {"campus": "eth1"}, "m3": {}, "m4": {},
        }  # fmt: skip
        before = client.status()["revision"]
        own = "--trunk campus=eth0: eth0 is the way to the underlay: a trunk has an interface of its own"
        missing = "interface ethl, the trunk to campus, does not exist; did you mean eth1?"
        for said, code, text in (("campus=eth0", 2, own), ("campus=ethl", 1, missing)):
            done = site.join("m2", own="nobody", more=("--trunk", said))
            assert (done.returncode, done.stderr) == (code, f"nestnet: {text}\n")
        assert client.status()["revision"] == before
    assert not (site.folder / "nobody").exists()
    assert "eth1" not in site.log("m2"), "its agent has nothing to say against it"


@pytest.fixture(scope="module")
def off(site: Site) -> Iterator[tuple[float, Flow]]:
    """m4 without its agent, since when, and what goes to its port all the time: its certificate runs out while those
    of the others are renewed."""
    site.processes["m4"].terminate()
    site.processes["m4"].wait(20)
    flow = Flow(site.workload("acme/a"), site.workload("acme/d"), "10.0.0.5")
    yield time.time(), flow
    flow.end()


def test_certificates_are_renewed_under_traffic(site: Site, off: tuple[float, Flow]) -> None:
    """Twice on each side at least: the agents' and the controller's own; nothing is lost, and nobody falls silent."""
    flow = Flow(site.workload("acme/a"), site.workload("acme/b"), "10.0.0.3")
    serials = {serial(site)}
    names = ("m1", "m2", "m3")
    count = {name: site.log(name).count("a new certificate") for name in names}
    keys = {name: (site.folder / name / "own.pem").read_text() for name in names}

    def renewed() -> bool:
        serials.add(serial(site))
        return len(serials) > 2 and all(site.log(name).count("a new certificate") >= count[name] + 2 for name in names)

    until(renewed, LIFE * 4, pace=1.0)
    assert flow.end() == []
    with site.client() as client:
        told = [line["event"] for line in client.events(last=200)]
        assert not [one for one in told if one["kind"] in ("silent", "problem") and "m4" not in one["text"]], told
        assert all(machine["reported"] < 10 for machine in client.status()["machines"] if machine["name"] in names)
    for name, before in keys.items():
        now = (site.folder / name / "own.pem").read_text()
        assert now.partition("CERTIFICATE")[0] != before.partition("CERTIFICATE")[0], "the key is a new one, too"


def serial(site: Site) -> str:
    """What tells the controller's certificate of now from others."""
    import ssl

    def look() -> str:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("192.0.2.254", 7443), 10) as plain, context.wrap_socket(plain) as tls:
            return (tls.getpeercert(binary_form=True) or b"").hex()

    return str(netns.run_in(netns.path(site.lab.machine("m1")), look))


def test_a_certificate_that_ran_out_says_what_to_do(site: Site, off: tuple[float, Flow]) -> None:
    """The agent was off for longer than its certificate counts; its machine forwards on."""
    begun, flow = off
    until(lambda: time.time() > begun + LIFE + 1, LIFE * 2)
    site.start_agent("m4")
    assert site.processes["m4"].wait(20) == 1
    assert re.search(r"certificate ran out on .*: move .* away, and `nestnet join` anew", site.log("m4"))
    (site.folder / "m4").rename(site.folder / "m4-old")
    (site.folder / "m4.toml").unlink()
    done = site.join("m4")
    assert done.returncode == 0, done.stderr
    site.start_agent("m4")
    until(site.realised)
    assert flow.sent > 100
    assert flow.end() == []


def test_a_machine_that_is_shut_out_is_a_stranger_in_5_seconds(site: Site) -> None:
    """Its agent is stopped, so its programs go on as they are: it sends, and nobody takes it."""
    flow = Flow(site.workload("acme/c"), site.workload("acme/a"), "10.0.0.2")
    until(lambda: len(flow.arrived) > 50)
    agent = site.processes["m3"]
    stop(agent.pid)
    try:
        with site.client() as client:
            begun = time.monotonic()
            revision = client.fence("m3", True)["revision"]
            # Heard as soon as the two others have realised it: the figure is of the slower one.
            until(lambda: others_realised(client, revision), 5)
            took = time.monotonic() - begun
        heard = len(flow.arrived)
        sent = flow.sent
        until(lambda: flow.sent > sent + 100)
        assert len(flow.arrived) - heard <= 1  # one may have been on its way
        print(f"shut out by all others after {took:.2f} s")
        assert took < 5
    finally:
        agent.send_signal(signal.SIGCONT)
    # What it still says does not count, and it is told so.
    until(lambda: "does not count any more" in site.log("m3"))
    with site.client() as client:
        client.fence("m3", False)
    heard = len(flow.arrived)
    until(lambda: len(flow.arrived) > heard + 50)
    until(site.realised)
    flow.end()


def others_realised(client: Client, revision: int) -> bool:
    machines = client.status()["machines"]
    return all((m["realised"] or 0) >= revision for m in machines if m["name"] != "m3")


def test_a_copy_of_a_machine_is_refused(site: Site) -> None:
    """B12: the disk of m2, started on m3's hardware: the first is not disturbed, and the copy asks slowly."""
    flow = Flow(site.workload("acme/a"), site.workload("acme/b"), "10.0.0.3")
    site.processes["m3"].terminate()
    site.processes["m3"].wait(20)
    (site.folder / "copy.toml").write_text((site.folder / "m2.toml").read_text())
    pins = str(site.lab.pins / "copy")
    site.spawn("copy", site.lab.machine("m3"), "agent", "--config", str(site.folder / "copy.toml"), "--pins", pins)
    until(lambda: "another system is connected as machine m2" in site.log("copy"))
    begun, asked = time.monotonic(), site.log("controller").count("path='/v1/feed' status=409")
    until(lambda: time.monotonic() > begun + 3)
    attempts = site.log("controller").count("path='/v1/feed' status=409") - asked
    assert attempts <= 10, "it does not hammer"
    site.processes["copy"].kill()
    site.processes["copy"].wait(20)
    assert flow.end() == []
    site.start_agent("m3")
    until(site.realised)


def test_joining_again_needs_the_old_one_out_of_the_way(site: Site) -> None:
    done = site.join("m1")
    assert done.returncode == 1
    assert "has joined already" in done.stderr
    done = site.join("m1", own="elsewhere", place="m2")
    assert done.returncode == 0
    # Whoever has the key of before is out: the machine has joined anew, elsewhere.
    until(lambda: "does not count any more" in site.log("m1"))
    site.processes["m1"].terminate()
    site.processes["m1"].wait(20)
    for file in ("own.pem", "authority.pem"):
        (site.folder / "elsewhere" / file).replace(site.folder / "m1" / file)
    site.start_agent("m1")
    until(site.realised)


def test_the_controller_comes_back_with_the_authority_it_had(site: Site) -> None:
    site.processes["controller"].kill()
    site.processes["controller"].wait(20)
    site.start_controller()
    until(site.realised)
    # All speak again, by the certificates that they have.
    until(lambda: {m["name"] for m in status(site) if m["reported"] < 8} == {"m1", "m2", "m3", "m4"}, LIFE * 2)
    assert site.realised()


def status(site: Site) -> Sequence[dict[str, Any]]:
    with site.client() as client:
        machines: Sequence[dict[str, Any]] = client.status()["machines"]
        return machines


def hosted(hosts: dict[str, str], guests: dict[str, str], subnet: str) -> dict[str, Any]:
    """A network of host ports, each on a machine, and in it one of agents, each of whose ports is on one of these."""
    lan = {"segments": {"s": {"cidr": subnet}}}
    on = {name: {"segment": "s", "host": host} for name, host in guests.items()}
    ports = {name: {"segment": "s", "host": machine, "hosts": True} for name, machine in hosts.items()}
    return {**lan, "ports": ports, "networks": {"vms": {**lan, "carriage": "encapsulated", "ports": on}}}


HOSTED = {
    "x": hosted(
        {"left": "m1", "right": "m2", "sibling": "m1", "gone": "m2", "lost": "m2"},
        {"a": "left", "b": "right", "c": "sibling", "d": "gone", "e": "lost"},
        "10.0.0.0/24",
    ),
    "y": hosted({"stranger": "m1"}, {"f": "stranger"}, "10.1.0.0/24"),
}


def test_an_agent_in_another_ports_place_carries_nothing(site: Site) -> None:
    """Joined as `gone`, from the place of a sibling, and as `lost`, from that of a port of another network. Root there
    has the address on its interface, and knows who is next. What each hears is of whom it joined as; what it sends the
    machine below drops, and nobody else loses anything."""

    def row(port: str) -> int:
        with site.client() as client:
            return int(client.get("port", port)["row"])

    def made(port: str) -> bool:
        return netns.exists(site.lab.workload(row(port)))

    def run(port: str, *command: str) -> bool:
        work = partial(subprocess.run, command, capture_output=True, check=False, timeout=10)
        return netns.run_in(site.workload(port), work).returncode == 0

    def drops(port: str) -> int:
        with site.client() as client:
            told = client.get("port", port)["attachment"] or {}
        return int(told.get("drops", {}).get("source_address", 0))

    def start(place: str, port: str) -> None:
        """An agent in the workload of one port, with the token of another, or its own."""
        with site.client() as client:
            invited = client.let_join(port, 60)
        name = port.replace("/", "-")
        (site.folder / f"{name}.token").write_text(invited["token"])
        own = ("--state", str(site.folder / name), "--token-file", str(site.folder / f"{name}.token"))
        more = ("--pins", str(site.lab.pins / name), "--workloads", site.lab.workloads)
        at = ("--controller", "https://[fe80::1%eth0]:4795")
        site.spawn(name, site.lab.workload(row(place)), "agent", "--machine", invited["machine"], *at, *own, *more)

    def send(port: str) -> None:
        """Something to who lives on `left`, which listens to it."""
        with netns.run_in(site.workload(port), partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)) as out:
            for _ in range(5):
                with contextlib.suppress(OSError):  # the link is not up yet
                    out.sendto(port.encode(), ("10.0.0.2", 9))

    wrong = {"x/sibling": ("x/gone", "x/vms/d", "x/vms/c"), "y/stranger": ("x/lost", "x/vms/e", "y/vms/f")}
    with site.client() as client:
        client.apply({"apiVersion": "nestnet/v1", "networks": HOSTED})
        left = client.get("port", "x/left")
        beside = (left["addresses"][0].partition("/")[0], "lladdr", left["mac"], "dev", "eth0")
    others = set(site.processes)
    flow = None
    try:
        until(lambda: all(map(made, ("x/left", "x/right", *wrong))))
        for port in ("x/left", "x/right"):
            start(port, port)
        for place, (port, _, _) in wrong.items():
            start(place, port)
        until(lambda: made("x/vms/a") and made("x/vms/b") and run("x/vms/a", "ping", "-c1", "-W1", "10.0.0.3"))
        flow = Flow(site.workload("x/vms/a"), site.workload("x/vms/b"), "10.0.0.3")
        for place, (port, _, _) in wrong.items():
            with site.client() as client:
                address = client.get("port", port)["addresses"][0]
            assert run(place, "ip", "address", "add", address, "dev", "eth0")
        until(lambda: all(made(carried) for _, carried, _ in wrong.values()))
        before = {place: drops(place) for place in wrong}

        def all_dropped() -> bool:
            for place, (_, carried, _) in wrong.items():
                # Nobody tells who is next where no such address is.
                assert run(place, "ip", "neighbour", "replace", *beside)
                send(carried)
            return all(drops(place) > n + 10 for place, n in before.items())

        with netns.run_in(site.workload("x/vms/a"), partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)) as ear:
            ear.bind(("", 9))
            ear.settimeout(10)
            until(all_dropped)
            send("x/vms/b")
            assert ear.recv(100) == b"x/vms/b", "and nothing before it"
        assert not any(made(port) for _, _, port in wrong.values())
        assert not run("x/vms/a", "ping", "-c1", "-W0.3", "10.0.0.5"), "nor does it hear what is sent to its port"
        with site.client() as client:
            network = client.get("network", "y/vms")
        assert network["state"] == "down: carrier"
        assert "the agent on y/stranger has never been there" in network["cause"]
        assert flow.end() == []
    finally:
        if flow is not None:
            flow.end()
        for name in set(site.processes) - others:
            site.processes[name].terminate()
            site.processes[name].wait(20)
        with site.client() as client:
            for network in ("x", "y"):
                client.delete("network", network, cascade=True)
        until(site.realised)
