"""VXLAN that is really stacked: agents in the workloads of hosts, ten levels high, with real packets.

    m1 -- l1/a -- l1/l2/a -- ... -- l1/../l10/a        each on the port below it, in a namespace of its own, with an
    m2 -- l1/b -- l1/l2/b -- ... -- l1/../l10/b        agent in all but the last; 9000 bytes on the wire, less 50 a
    m3                                                 level; m3 for moves

`beside` is carried by l1 as l2 is: by the same agents, in the same domain.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from frames import tunnels
from golden_files import ROOT
from killing import stop
from test_lab import leftovers, nestnet

from nestnet.agent import netns
from nestnet.agent.credentials import boot
from nestnet.api.client import Client
from nestnet.lab.state import Lab, load

pytestmark = pytest.mark.root
DEPTH = 10
DEPTHS = (1, 2, 3, 6, 10)
JUMBO = 9000
BYTES = int(os.environ.get("NESTNET_FILE_BYTES", "20000003"))  # no multiple of any segment
SIX = (3, 6, 9)  # the levels that are carried over IPv6
SO_RCVBUFFORCE = 33  # <asm-generic/socket.h>
PATIENCE = 60.0  # seconds for what happens by itself


def level(n: int) -> dict[str, Any]:
    hosts = {"a": "m1", "b": "m2"} if n == 1 else {"a": "a", "b": "b"}
    network: dict[str, Any] = {
        "segments": {"lan": {"cidr": ["10.0.0.0/24", "fd00::/64"]}},
        "ports": {name: {"segment": "lan", "host": host, "hosts": True} for name, host in hosts.items()},
    }
    if n > 1:
        network |= {"carriage": "encapsulated", "underlay": 6 if n in SIX else 4}
    if n < DEPTH:
        network["networks"] = {f"l{n + 1}": level(n + 1)}
    if n == 1:
        ports = {name: {"segment": "lan", "host": name} for name in "ab"}
        beside = {"carriage": "encapsulated", "segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": ports}
        network["networks"]["beside"] = beside
    return network


def mtu_at(n: int) -> int:
    """What a level leaves to its workloads: each takes its header."""
    return JUMBO - sum(70 if k in SIX else 50 for k in range(1, n + 1))


def path(n: int) -> str:
    """Of the network at a level."""
    return "/".join(f"l{k}" for k in range(1, n + 1))


class Tower:
    """The lab, and where each workload is."""

    def __init__(self, name: str) -> None:
        found = load(name)
        assert found is not None
        self.lab: Lab = found
        with self.client() as client:
            self.rows = {port["path"]: port["row"] for port in client.list("port")}

    def client(self) -> Client:
        return Client(self.lab.controller)

    def place(self, port: str) -> Path:
        return netns.path(self.lab.workload(self.rows[port]))

    def agent(self, port: str) -> int:
        """The process of the agent on a port."""
        pid, _ = json.loads((self.lab.folder / "guests" / str(self.rows[port]) / "process").read_text())
        return int(pid)

    def state(self, network: str) -> tuple[str, str | None]:
        with self.client() as client:
            found = client.get("network", network)
        return found["state"], found["cause"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tower]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    machines = {machine: {"mtu": JUMBO} for machine in ("m1", "m2", "m3")}
    file = tmp_path_factory.mktemp("tower") / "net.yaml"
    file.write_text(json.dumps({"apiVersion": "nestnet/v1", "machines": machines, "networks": {"l1": level(1)}}))
    try:
        nestnet("up", str(file), "--name", name, "--timeout", "150")
        yield Tower(name)
    finally:
        nestnet("down", "--name", name)
    assert leftovers(name) == []


def until(condition: Callable[[], object], what: str) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.05)  # the pace of asking


def ping(place: Path, address: str, *options: str) -> bool:
    command = ["ping", "-c", "1", "-W", "2", *options, address]
    return netns.run_in(place, lambda: subprocess.run(command, capture_output=True, check=False)).returncode == 0


# ---- what arrives


@pytest.mark.parametrize("n", range(1, DEPTH + 1))
def test_each_level_takes_its_bytes_and_no_more(tower: Tower, n: int) -> None:
    here, mtu = tower.place(f"{path(n)}/a"), mtu_at(n)
    told = netns.run_in(here, lambda: subprocess.check_output(["ip", "-j", "link", "show", "eth0"]))
    assert json.loads(told)[0]["mtu"] == mtu
    with tower.client() as client:
        assert client.get("network", path(n))["mtu"] == mtu
    until(lambda: ping(here, "10.0.0.3"), "a first one, for which neighbours are looked for at every level")
    assert ping(here, "10.0.0.3", "-M", "do", "-s", str(mtu - 28))
    assert not ping(here, "10.0.0.3", "-M", "do", "-s", str(mtu - 27))
    assert ping(here, "fd00::3", "-M", "do", "-s", str(mtu - 48))


def transfer(tower: Tower, n: int, target: str, size: int = BYTES) -> None:
    """A file from a to b at a level, whole."""
    content = random.Random(n).randbytes(1 << 20)
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    listener = netns.run_in(tower.place(f"{path(n)}/b"), lambda: socket.create_server((target, 7000), family=family))
    got, arrived = hashlib.sha256(), [0]

    def receive() -> None:
        connection, _ = listener.accept()
        connection.settimeout(60)
        with connection:
            while data := connection.recv(1 << 18):
                got.update(data)
                arrived[0] += len(data)

    listener.settimeout(30)
    thread = threading.Thread(target=receive)
    thread.start()
    sent = hashlib.sha256()
    with listener:
        with netns.run_in(
            tower.place(f"{path(n)}/a"), lambda: socket.create_connection((target, 7000), timeout=30)
        ) as out:
            out.settimeout(60)
            for start in range(0, size, len(content)):
                part = content[: min(len(content), size - start)]
                out.sendall(part)
                sent.update(part)
        thread.join(120)
    assert (arrived[0], got.hexdigest()) == (size, sent.hexdigest())


@pytest.fixture(params=["offloads", "no-offloads"])
def wire(tower: Tower, request: pytest.FixtureRequest) -> Iterator[str]:
    """The NICs of the wire as they are made, or such as segment nothing and put nothing together."""
    features = ("tso", "gso", "gro", "tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation")

    def set_all(value: str) -> None:
        for machine in ("m1", "m2"):
            command = ["ethtool", "-K", "eth0", *(word for feature in features for word in (feature, value))]
            netns.run_in(netns.path(tower.lab.machine(machine)), lambda c=command: subprocess.check_call(c))  # type: ignore[misc]

    if request.param == "no-offloads":
        set_all("off")
    yield request.param
    if request.param == "no-offloads":
        set_all("on")


@pytest.mark.parametrize("n", DEPTHS)
@pytest.mark.parametrize("target", ["10.0.0.3", "fd00::3"])
def test_a_file_arrives_whole(tower: Tower, wire: str, n: int, target: str) -> None:
    """Large packets pass all levels in one piece; for a NIC that segments nothing Linux does, under ten headers."""
    transfer(tower, n, target)


@pytest.mark.parametrize("wire", ["no-offloads"], indirect=True)
@pytest.mark.parametrize("n", [2, 3, DEPTH])
def test_every_header_says_how_long_a_segment_is(tower: Tower, wire: str, n: int) -> None:
    """Where Linux segments for a NIC that cannot: the outermost what is there, and those inside what a full segment
    has, which is more than there is in the last one of a large packet."""
    there = netns.path(tower.lab.machine("m2"))
    with netns.run_in(there, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)) as ear:
        ear.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 26)
        ear.bind(("eth0", 3))
        transfer(tower, n, "10.0.0.3", 4_000_003)
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(ear.recv(1 << 16))
    full = inside = 0
    for frame in frames:
        levels = list(tunnels(frame))
        if len(levels) < n or len(frame) < 1000:
            continue  # what agents say to the controller, and acknowledgements
        assert len(levels) == n
        assert levels[0][0] == levels[0][1]
        beyond = {said - found for said, found in levels[1:]}
        assert len(beyond) == 1, levels
        assert min(beyond) >= 0, levels
        assert all(said <= mtu_at(k) for k, (said, _) in enumerate(levels)), levels
        full += levels[0][1] == JUMBO
        inside += levels[0][1] == JUMBO and beyond == {0}
    assert full > 100
    assert inside == full


def test_the_headers_stand_on_the_wire_one_in_the_other(tower: Tower, tmp_path: Path) -> None:
    """By another's eyes: tshark. And by ours: as many as the trace said, of the same lengths."""
    file = tmp_path / "wire.pcap"
    there = netns.path(tower.lab.machine("m2"))
    command = ["tcpdump", "-i", "eth0", "-U", "-c", "1", "-w", str(file), "udp port 4789 and greater 500"]
    watching = netns.run_in(there, lambda: subprocess.Popen(command, stderr=subprocess.PIPE))
    assert watching.stderr is not None
    assert any(b"listening" in line for line in watching.stderr)
    assert ping(tower.place(f"{path(DEPTH)}/a"), "10.0.0.3")
    watching.wait(10)
    fields = ["-T", "fields", "-e", "frame.protocols", "-e", "vxlan.vni", "-e", "udp.length"]
    told = subprocess.check_output(["tshark", "-r", str(file), *fields], text=True, stderr=subprocess.DEVNULL)
    protocols, vnis, lengths = told.split()
    headers = [f"eth:ethertype:{'ipv6' if n in SIX else 'ip'}:udp:vxlan:" for n in range(1, DEPTH + 1)]
    assert protocols == "".join(headers) + "eth:ethertype:ip:icmp:data"
    assert len(vnis.split(",")) == DEPTH
    ping_bytes = 14 + 84
    inside = [ping_bytes + mtu_at(n) - mtu_at(DEPTH) for n in range(1, DEPTH + 1)]
    assert [int(length) for length in lengths.split(",")] == [16 + size for size in inside]
    trace = nestnet("trace", f"{path(DEPTH)}/a", "10.0.0.3", "-o", "json", "--lab", tower.lab.name)
    (step,) = (step for step in json.loads(trace.stdout)["steps"] if step["step"] == "wire")
    assert [one["header"] for one in step["headers"]].count("VXLAN") == DEPTH


# ---- what an agent knows


def test_an_agent_knows_its_domain_and_nothing_below(tower: Tower) -> None:
    port = f"{path(3)}/a"
    folder = tower.lab.folder / "guests" / str(tower.rows[port])
    # Whoever follows the feed from another system would be a copy, and shut out.
    same = f"{boot().partition('.')[0]}.{netns.inode(tower.place(port))}"
    with tower.client() as client:
        assert port in [one["name"] for one in client.list("machine")]
        rows = next(iter(client.feed((folder / "machine").read_text(), boot=same)))["rows"]
    machines = [row["value"] for row in rows if row["kind"] == "machine"]
    assert sorted(one["address"] for one in machines) == ["10.0.0.2", "10.0.0.3"]
    assert {one["mtu"] for one in machines} == {mtu_at(3)}
    networks = [row["value"] for row in rows if row["kind"] == "network"]
    assert [(one["carrier"], one["mtu"]) for one in networks] == [(0, mtu_at(4))], "level 4, and no carrier"


# ---- faults


class Flow:
    """Numbered datagrams from a to b of a network, every 5 ms, until it is closed."""

    def __init__(self, tower: Tower, network: str, port: int = 9000) -> None:
        self.sent = 0
        self.heard: set[int] = set()
        a, b = (tower.place(f"{network}/{name}") for name in "ab")
        self._in = netns.run_in(b, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._in.bind(("10.0.0.3", port))
        self._in.setblocking(False)
        self._out = netns.run_in(a, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._out.connect(("10.0.0.3", port))
        self._going = True
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        until(lambda: self.heard, f"a first datagram of {network}")

    def _run(self) -> None:
        due = time.monotonic()
        while self._going:
            due += 0.005
            self._out.send(self.sent.to_bytes(8, "big"))
            self.sent += 1
            while select.select([self._in], [], [], max(0.0, due - time.monotonic()))[0]:
                self.heard.add(int.from_bytes(self._in.recv(64), "big"))

    def close(self) -> int:
        """Returns how many were lost since the first that was heard."""
        self._going = False
        self._thread.join()
        while select.select([self._in], [], [], 0.2)[0]:
            self.heard.add(int.from_bytes(self._in.recv(64), "big"))
        self._in.close()
        self._out.close()
        return len(set(range(min(self.heard), self.sent)) - self.heard)


def test_an_agent_that_is_killed_at_any_level_costs_no_packet(tower: Tower) -> None:
    """Its datapath forwards on, for all levels; the machine below starts it again."""
    flows = [Flow(tower, network) for network in (path(2), path(4), path(DEPTH), "l1/beside")]
    for n in (1, 3, 6):
        port = f"{path(n)}/b"
        before = tower.agent(port)
        os.kill(before, signal.SIGKILL)
        until(lambda p=port, was=before: tower.agent(p) != was, f"another agent on {port}")  # type: ignore[misc]
    revision = tower.client().status()["revision"]
    until(lambda: all(m["realised"] == revision for m in tower.client().status()["machines"]), "all have realised it")
    lost = [flow.close() for flow in flows]
    assert lost == [0, 0, 0, 0]
    assert all(flow.sent > 100 for flow in flows)


def test_two_agents_on_one_port_are_one(tower: Tower) -> None:
    """The second is refused, whoever it is: the first has the pins, and the controller knows its system."""
    port = f"{path(2)}/a"
    folder = tower.lab.folder / "guests" / str(tower.rows[port])
    command = (Path("/proc") / str(tower.agent(port)) / "cmdline").read_text().rstrip("\0").split("\0")
    flow = Flow(tower, path(3))
    again = netns.run_in(
        tower.place(port), lambda: subprocess.run(command, capture_output=True, timeout=30, check=False)
    )
    assert again.returncode == 1
    assert b"another process" in again.stderr
    elsewhere = [*command, "--pins", str(tower.lab.pins / "copy")]  # of the whole, on another system
    machine = (folder / "machine").read_text()
    assert machine in elsewhere
    with netns.run_in(
        tower.place(f"{path(2)}/b"), lambda: subprocess.Popen(elsewhere, stderr=subprocess.PIPE)
    ) as copied:
        assert copied.stderr is not None
        assert any(b"another system is connected as machine" in line for line in copied.stderr)
        copied.kill()
    assert flow.close() == 0


def test_an_agent_that_hangs_is_the_cause_of_what_is_above_and_of_nothing_else(tower: Tower) -> None:
    pid = tower.agent(f"{path(2)}/a")
    stop(pid)
    try:
        until(lambda: tower.state(path(3))[0] == "degraded", "what is on it knows")
        assert tower.state(path(3))[1] == f"1 of 2 hosts are down: the agent on {path(2)}/a says nothing"
        assert tower.state(path(DEPTH))[0] == "degraded"
        assert [tower.state(network)[0] for network in (path(1), path(2), "l1/beside")] == ["up"] * 3
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: tower.state(path(3))[0] == "up", "it speaks again")


def test_what_is_disabled_below_closes_all_above_and_comes_back(tower: Tower) -> None:
    """Also between two ports on one host, which their agent has to hear of: by a relay that works on."""
    here = tower.place(f"{path(DEPTH)}/a")
    for kind, what in (("port", f"{path(2)}/b"), ("network", path(3))):
        nestnet("disable", kind, what, "--lab", tower.lab.name)
        assert not ping(here, "10.0.0.3")
        assert tower.state(path(DEPTH))[0] in ("degraded", "down: carrier")
        assert ping(tower.place("l1/beside/a"), "10.0.0.3")
        nestnet("enable", kind, what, "--lab", tower.lab.name)
        until(lambda: ping(here, "10.0.0.3"), f"{what} is back")


@pytest.mark.alone
def test_a_host_moves_with_all_that_is_stacked_on_it(tower: Tower) -> None:
    """Nothing above has another row: only the machines of the wire hear of it."""
    folder = tower.lab.folder / "guests" / str(tower.rows[f"{path(2)}/a"])
    log = (folder / "log").read_text()
    for machine in ("m3", "m1"):
        flows = [Flow(tower, network) for network in (path(2), path(DEPTH))]
        nestnet("move", "l1/a", "--to", machine, "--lab", tower.lab.name)
        assert max(flow.close() for flow in flows) <= 2, "10 ms"
    assert "workload" not in (folder / "log").read_text().removeprefix(log).replace("1 workloads, ", "")


# ---- both carriages


def test_both_carriages_along_one_chain() -> None:
    """examples/stacked.yaml, by its own checks; and what goes leaves nothing."""
    name = f"t-{uuid.uuid4().hex[:8]}"
    try:
        nestnet("up", str(ROOT / "examples/stacked.yaml"), "--name", name)
        nestnet("test", "--lab", name)
        lab = load(name)
        assert lab is not None
        with Client(lab.controller) as client:
            assert len(list(client.list("machine"))) == 6
            assert {one["name"]: one["state"] for one in client.list("host", network="cloud")} == {"a": "up", "b": "up"}
        nestnet("delete", "network", "cloud/vms", "--cascade", "--lab", name)
        until(lambda: len([n for n in lab.namespaces() if ".port." in n]) == 3, "only cloud's workloads are left")
        nestnet("delete", "network", "cloud", "--cascade", "--lab", name)
        until(lambda: not [n for n in lab.namespaces() if ".port." in n], "no workload is left")
        until(lambda: not list((lab.folder / "guests").iterdir()), "no agent's folder is left")
    finally:
        nestnet("down", "--name", name)
    assert leftovers(name) == []
