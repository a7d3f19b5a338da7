"""What tenants build inside their workloads, out of nothing that we know of: VXLAN of their own, and another nestnet.

    m1 -- cloud/a -- cloud/vms/a        cloud/vms is carried encapsulated, by agents on cloud/a and cloud/b
       -- cloud/c                       c and d, as vms/a and vms/b, have VXLAN devices of the kernel
       -- cloud/x                       a controller, and a machine of it
    m2 -- cloud/b -- cloud/vms/b
       -- cloud/d
       -- cloud/y                       another machine of that controller

The wire has 1500 bytes, so that large packets have to be segmented there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from golden_files import ROOT
from test_encapsulated import Tower, ping, until
from test_lab import leftovers, nestnet

from nestnet.agent import netns
from nestnet.api.client import Client
from nestnet.datapath.libbpf import on_hook
from nestnet.lab.down import down
from nestnet.lab.state import Lab, Process

pytestmark = pytest.mark.root
BYTES = 16_000_003  # no multiple of any segment
PLACES = {"flat": ("cloud/c", "cloud/d"), "encapsulated": ("cloud/vms/a", "cloud/vms/b")}
LAN = {"lan": {"cidr": "10.0.0.0/24"}}
MANIFEST = {
    "apiVersion": "nestnet/v1",
    "machines": {"m1": {}, "m2": {}},
    "networks": {
        "cloud": {
            "segments": LAN,
            "ports": {
                "a": {"segment": "lan", "host": "m1", "hosts": True},
                "b": {"segment": "lan", "host": "m2", "hosts": True},
                **{name: {"segment": "lan", "host": "m1"} for name in "cx"},
                **{name: {"segment": "lan", "host": "m2"} for name in "dy"},
            },
            "networks": {
                "vms": {
                    "carriage": "encapsulated",
                    "segments": LAN,
                    "ports": {name: {"segment": "lan", "host": name} for name in "ab"},
                }
            },
        }
    },
}


@pytest.fixture(scope="module")
def outer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tower]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    file = tmp_path_factory.mktemp("outer") / "net.yaml"
    file.write_text(json.dumps(MANIFEST))
    try:
        nestnet("up", str(file), "--name", name)
        yield Tower(name)
    finally:
        nestnet("down", "--name", name)
    assert leftovers(name) == []


def run(place: Path, *command: str) -> str:
    """What a command inside prints. CalledProcessError if it fails."""
    work = partial(subprocess.run, command, capture_output=True, text=True, check=True, timeout=30)
    return str(netns.run_in(place, work).stdout)


def address(outer: Tower, port: str) -> str:
    with outer.client() as client:
        return str(client.get("port", port)["addresses"][0]).partition("/")[0]


def transfer(source: Path, target: Path, there: str) -> None:
    """A file over TCP, whole."""
    content = random.Random(there).randbytes(BYTES)
    listener = netns.run_in(target, partial(socket.create_server, (there, 7000)))
    listener.settimeout(30)
    got = bytearray()

    def receive() -> None:
        connection, _ = listener.accept()
        connection.settimeout(30)
        with connection:
            while data := connection.recv(1 << 18):
                got.extend(data)

    thread = threading.Thread(target=receive)
    thread.start()
    with listener:
        with netns.run_in(source, partial(socket.create_connection, (there, 7000), 30)) as out:
            out.sendall(content)
        thread.join(60)
    assert len(got) == BYTES
    assert hashlib.sha256(got).digest() == hashlib.sha256(content).digest()


@pytest.fixture(params=["offloads", "no-offloads"])
def wire(outer: Tower, request: pytest.FixtureRequest) -> Iterator[str]:
    """The NICs of the wire as they are made, or such as segment nothing: then Linux does, under all headers."""
    features = ("tso", "gso", "tx-udp_tnl-segmentation")

    def set_all(value: str) -> None:
        for machine in ("m1", "m2"):
            words = (word for feature in features for word in (feature, value))
            run(netns.path(outer.lab.machine(machine)), "ethtool", "-K", "eth0", *words)

    if request.param == "no-offloads":
        set_all("off")
    yield request.param
    if request.param == "no-offloads":
        set_all("on")


# ---- VXLAN of a tenant's own


@pytest.fixture(params=["noudpcsum", "udpcsum"])
def checksum(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(PLACES))
def ends(outer: Tower, checksum: str, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """The places of two workloads that have a VXLAN device to each other: 172.16.0.1 and .2."""
    ports = PLACES[request.param]
    places = outer.place(ports[0]), outer.place(ports[1])
    addresses = [address(outer, port) for port in ports]
    try:
        for n, place in enumerate(places):
            kind = ("type", "vxlan", "id", "7", "local", addresses[n], "remote", addresses[1 - n])
            run(place, "ip", "link", "add", "own", *kind, "dstport", "4789", "dev", "eth0", checksum)
            run(place, "ip", "address", "add", f"172.16.0.{n + 1}/24", "dev", "own")
            run(place, "ip", "link", "set", "own", "up")
        yield places
    finally:
        for place in places:
            with contextlib.suppress(subprocess.CalledProcessError):
                run(place, "ip", "link", "delete", "own")


def test_a_tenants_own_vxlan_just_works(outer: Tower, wire: str, ends: tuple[Path, Path]) -> None:
    """Its largest packet passes, and one byte more does not; a file arrives whole."""
    here, there = ends
    mtu = json.loads(run(here, "ip", "-j", "link", "show", "own"))[0]["mtu"]
    assert mtu == json.loads(run(here, "ip", "-j", "link", "show", "eth0"))[0]["mtu"] - 50
    until(lambda: ping(here, "172.16.0.2"), "a first one, for which neighbours are looked for at every level")
    assert ping(here, "172.16.0.2", "-M", "do", "-s", str(mtu - 28))
    assert not ping(here, "172.16.0.2", "-M", "do", "-s", str(mtu - 27))
    transfer(here, there, "172.16.0.2")


@pytest.mark.parametrize("ports", PLACES.values(), ids=PLACES)
def test_to_its_carrier_it_is_udp_like_any_other(outer: Tower, ports: tuple[str, str]) -> None:
    """From a port that is no host, to 4789: whatever it holds, also a VNI that is ours."""
    with outer.client() as client:
        vnis = [segment["vni"] for segment in client.list("segment")]
    frame = bytes(12) + b"\x08\x00" + bytes(40)
    payloads = [b"x", *(b"\x08\0\0\0" + vni.to_bytes(3, "big") + b"\0" + frame for vni in vnis)]
    here, there = (outer.place(port) for port in ports)
    target = (address(outer, ports[1]), 4789)
    with (
        netns.run_in(there, partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)) as ear,
        netns.run_in(here, partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)) as out,
    ):
        ear.bind(target)
        ear.settimeout(10)
        for payload in payloads:
            out.sendto(payload, target)
            assert ear.recv(2048) == payload


# ---- nestnet inside nestnet


class Inner:
    """A nestnet of its own in the workloads x and y of the outer one, which knows nothing of it."""

    def __init__(self, outer: Tower, folder: Path) -> None:
        self.folder = folder
        self.lab = Lab(f"t-{uuid.uuid4().hex[:8]}")
        self.places = {name: outer.place(f"cloud/{name}") for name in "xy"}
        self.addresses = {name: address(outer, f"cloud/{name}") for name in "xy"}
        self.url = f"https://{self.addresses['x']}:7443"
        self.socket = folder / "controller.sock"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def client(self) -> Client:
        return Client(f"unix:{self.socket}")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "nestnet", *arguments]

    def environment(self) -> dict[str, str]:
        own = {key: value for key, value in os.environ.items() if not key.startswith("NESTNET")}
        return {**own, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "NESTNET_CONTROLLER": f"unix:{self.socket}"}

    def spawn(self, name: str, place: Path, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            command = self.command(*arguments)
            self.processes[name] = netns.spawn(place, command, output=log, environment=self.environment())
        known = tuple(Process.of(each, one.pid) for each, one in self.processes.items())
        self.lab.folder.mkdir(parents=True, exist_ok=True)
        Lab(self.lab.name, processes=known).save()

    def type(self, place: Path, *arguments: str, stdin: str = "") -> str:
        work = partial(
            subprocess.run,
            self.command(*arguments),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment(),
        )
        done = netns.run_in(place, work)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return str(done.stdout)

    def start(self) -> None:
        listen = ("--listen", f"unix:{self.socket}", "--listen", self.url)
        # No file of the computer's /etc counts: each has its own.
        (self.folder / "controller.toml").write_text(f'state = "{self.folder}/state"\n')
        config = ("--config", str(self.folder / "controller.toml"))
        self.spawn("controller", self.places["x"], "controller", *listen, *config)
        until(self.answers, "the inner controller answers")
        for name, place in self.places.items():
            token = self.type(self.places["x"], "token", "join", name).strip().splitlines()[-1]
            at = ("--address", self.addresses[name], "--mtu", "1450", "--token-file", "-")
            own = ("--state", str(self.folder / name), "--config", str(self.folder / f"{name}.toml"))
            self.type(place, "join", self.url, "--machine", name, *at, *own, stdin=token)
            more = ("--pins", str(self.lab.pins / name), "--workloads", self.lab.workloads)
            self.spawn(name, place, "agent", "--config", str(self.folder / f"{name}.toml"), *more)

    def answers(self) -> bool:
        with contextlib.suppress(Exception), self.client() as client:
            client.status()
            return True
        return False

    def realised(self) -> bool:
        with self.client() as client:
            status = client.status()
        machines = status["machines"]
        is_done = all((m["realised"] or 0) >= status["revision"] and not m["problems"] for m in machines)
        return is_done and len(machines) == 2

    def workload(self, port: str) -> Path:
        with self.client() as client:
            return netns.path(self.lab.workload(client.get("port", port)["row"]))


@pytest.fixture(scope="module")
def inner(outer: Tower, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inner]:
    made = Inner(outer, tmp_path_factory.mktemp("inner"))
    try:
        made.start()
        manifest = {
            "apiVersion": "nestnet/v1",
            "networks": {
                "acme": {
                    "segments": {"s": {"cidr": "10.0.0.0/24"}},  # those of the outer one, too
                    "ports": {"p": {"segment": "s", "host": "x"}, "q": {"segment": "s", "host": "y"}},
                }
            },
        }
        with made.client() as client:
            client.apply(manifest)
        until(made.realised, "both inner machines have realised it")
        yield made
    finally:
        down(made.lab.name)
        for process in made.processes.values():
            process.wait(20)
    assert leftovers(made.lab.name) == []


def programs(place: Path) -> list[str]:
    """What is on the hook of eth0 in there."""
    return netns.run_in(place, lambda: on_hook(socket.if_nametoindex("eth0")))


def test_nestnet_inside_nestnet(outer: Tower, inner: Inner, wire: str) -> None:
    """Ping, and a file, whole, between the inner workloads; 50 bytes for each of the two."""
    here, there = inner.workload("acme/p"), inner.workload("acme/q")
    mtu = json.loads(run(here, "ip", "-j", "link", "show", "eth0"))[0]["mtu"]
    assert mtu == 1500 - 2 * 50
    until(lambda: ping(here, "10.0.0.3"), "a first one")
    assert ping(here, "10.0.0.3", "-M", "do", "-s", str(mtu - 28))
    transfer(here, there, "10.0.0.3")


def test_the_outer_one_sees_plain_udp_between_two_of_its_ports(outer: Tower, inner: Inner, tmp_path: Path) -> None:
    file = tmp_path / "wire.pcap"
    command = ["tcpdump", "-i", "eth0", "-U", "-c", "1", "-w", str(file), "udp port 4789 and greater 500"]
    watching = netns.run_in(
        netns.path(outer.lab.machine("m2")), lambda: subprocess.Popen(command, stderr=subprocess.PIPE)
    )
    with watching:
        assert watching.stderr is not None
        assert any(b"listening" in line for line in watching.stderr)
        assert ping(inner.workload("acme/p"), "10.0.0.3", "-s", "600")
        watching.wait(10)
    fields = ["-T", "fields", "-e", "frame.protocols", "-e", "ip.src", "-e", "ip.dst"]
    told = subprocess.check_output(["tshark", "-r", str(file), *fields], text=True, stderr=subprocess.DEVNULL)
    protocols, sources, targets = told.split()
    assert protocols == "eth:ethertype:ip:udp:vxlan:" * 2 + "eth:ethertype:ip:icmp:data"
    assert sources == f"192.0.2.1,{inner.addresses['x']},10.0.0.2"
    assert targets == f"192.0.2.2,{inner.addresses['y']},10.0.0.3"
    with outer.client() as client:
        assert {one["name"] for one in client.list("machine")} == {"m1", "m2", "cloud/a", "cloud/b"}
        assert {one["path"] for one in client.list("network")} == {"cloud", "cloud/vms"}


def test_all_of_the_inner_one_goes_and_the_outer_one_stays(outer: Tower, inner: Inner) -> None:
    assert all(programs(place) for place in inner.places.values())
    with inner.client() as client:
        client.delete("network", "acme", cascade=True)
    until(lambda: netns.names(inner.lab.workloads) == [], "its workloads are gone")
    down(inner.lab.name)
    for process in inner.processes.values():
        process.wait(20)
    assert leftovers(inner.lab.name) == []
    assert [programs(place) for place in inner.places.values()] == [[], []]
    links = [json.loads(run(place, "ip", "-j", "link")) for place in inner.places.values()]
    assert [[link["ifname"] for link in each] for each in links] == [["lo", "eth0"]] * 2
    assert ping(inner.places["x"], inner.addresses["y"])
    assert nestnet("status", "--lab", outer.lab.name).stdout.decode().startswith("well: ")
