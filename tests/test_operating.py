"""A lab under an operator's hands: restored from an old backup under traffic, its events, logs, metrics and doctor."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from test_lab import leftovers, nestnet

from nestnet.agent import links, netns
from nestnet.api.client import Client
from nestnet.lab import state
from nestnet.lab.state import Lab

pytestmark = pytest.mark.root

NET = """\
apiVersion: nestnet/v1
machines: {m1: {}, m2: {}}
networks:
  old:
    segments: {s: {cidr: 10.0.0.0/24}}
    ports:
      a: {segment: s, host: m1}
      b: {segment: s, host: m2}
"""
MORE = """\
apiVersion: nestnet/v1
networks:
  new:
    segments: {s: {cidr: 10.0.0.0/24}}
    ports:
      a: {segment: s, host: m1}
      b: {segment: s, host: m2}
    policies: [{from: any, to: any, allow: udp/7}]
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    file = tmp_path_factory.mktemp("lab") / "net.yaml"
    file.write_text(NET)
    try:
        nestnet("up", str(file), "--name", name)
        found = state.load(name)
        assert found is not None
        yield found
    finally:
        nestnet("down", "--name", name)
    assert leftovers(name) == []


def until(true: Callable[[], object], seconds: float = 20.0, pace: float = 0.05) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(pace)  # of looking


class Flow:
    """Datagrams from one workload to another, a hundred a second, and which of them have arrived."""

    def __init__(self, source: Path, target: Path, address: str) -> None:
        self.arrived: list[int] = []
        self.sent = 0
        self._stop = threading.Event()
        self._receiver = netns.run_in(target, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._receiver.bind(("", 7))
        self._receiver.settimeout(0.5)
        sender = netns.run_in(source, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sender.connect((address, 7))
        self._threads = [
            threading.Thread(target=self._send, args=(sender,)),
            threading.Thread(target=self._receive),
        ]
        for thread in self._threads:
            thread.start()

    def _send(self, sender: socket.socket) -> None:
        with sender:
            while not self._stop.wait(0.01):
                sender.send(str(self.sent).encode())
                self.sent += 1

    def _receive(self) -> None:
        with self._receiver:
            while True:
                try:
                    self.arrived.append(int(self._receiver.recv(100)))
                except TimeoutError:
                    if self._stop.is_set():
                        return

    def end(self) -> list[int]:
        """The numbers that never arrived."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return sorted(set(range(self.sent)) - set(self.arrived))


def scrape(lab: Lab, machine: str) -> dict[str, float]:
    """What an agent's /metrics says."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(lab.metrics(machine)))
        http = HTTPConnection("agent")
        http.sock = connection
        http.request("GET", "/metrics")
        lines = http.getresponse().read().decode().splitlines()
    found = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in found}


def test_a_restore_of_an_old_backup_cuts_nothing_until_somebody_agrees(lab: Lab, tmp_path: Path) -> None:
    backup = tmp_path / "old.backup"
    nestnet("backup", str(backup), "--lab", lab.name)
    nestnet("backup", str(backup), "--lab", lab.name, code=1)  # It never replaces a file.
    more = tmp_path / "more.yaml"
    more.write_text(MORE)
    nestnet("apply", str(more), "--lab", lab.name)
    with Client(lab.controller) as client:
        a, b = client.get("port", "new/a"), client.get("port", "new/b")
        target = netns.path(lab.workload(b["row"]))
        flow = Flow(netns.path(lab.workload(a["row"])), target, b["addresses"][0].partition("/")[0])
        try:
            until(lambda: flow.arrived)
            nestnet("restore", str(backup), "--lab", lab.name)
            until(lambda: all(m["problems"] for m in client.status()["machines"]))
            problem = client.status()["machines"][0]["problems"][0]
            assert "knows nothing of 2 of the 4 ports here: held back, traffic goes on" in problem
            assert scrape(lab, "m1")["nestnet_held_back"] == 1
            seen = len(flow.arrived)
            until(lambda: len(flow.arrived) > seen + 100)
            wrong = nestnet("doctor", "--lab", lab.name, code=1).stdout.decode()
            assert "\n  nestnet confirm, when what is missing has been applied\n" in wrong
        finally:
            lost = flow.end()
        # The first may wait for ARP, and a loaded machine's socket may overflow; a cut would lose hundreds.
        assert len(lost) < 20, (lost, flow.sent)
        nestnet("confirm", "--lab", lab.name)
        until(lambda: not any(m["problems"] for m in client.status()["machines"]))
        until(lambda: not netns.exists(lab.workload(a["row"])))
        now = client.status()
        until(lambda: all(m["realised"] == now["revision"] for m in client.status()["machines"]))
        kinds = [line["event"]["kind"] for line in client.events()]
        assert [kind for kind in kinds if kind in ("restored", "confirmed")] == ["restored", "confirmed"]
        assert "problem" in kinds
        assert "solved" in kinds
    assert b"well" in nestnet("status", "--lab", lab.name).stdout


def test_metrics_of_an_agent_follow_its_packets(lab: Lab) -> None:
    with Client(lab.controller) as client:
        a, b = client.get("port", "old/a"), client.get("port", "old/b")
    to = b["addresses"][0].partition("/")[0]
    nestnet("exec", "old/a", "--lab", lab.name, "--", "ping", "-c3", "-i0.2", "-W1", to)
    sent = f'nestnet_port_transmit_packets_total{{port="{a["row"]}"}}'
    until(lambda: scrape(lab, "m1").get(sent, 0) >= 3)
    found = scrape(lab, "m1")
    assert found["nestnet_feed_connected"] == 1
    assert found["nestnet_problems"] == 0
    assert found["nestnet_turns_total"] > 0
    assert found["nestnet_realised_revision"] > 0
    assert found["nestnet_flows"] >= 1
    # A workload that speaks as somebody else: counted for its port, under its reason.
    inside = netns.path(lab.workload(a["row"]))

    def lie() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("eth0", 0))
            raw.send(bytes.fromhex("ffffffffffff 020000000099 0800") + bytes(46))

    netns.run_in(inside, lie)
    until(lambda: any(f'port="{a["row"]}"' in name for name in scrape(lab, "m1") if name.startswith("nestnet_drops_")))


def test_the_doctor_finds_what_is_wrong_and_says_what_mends_it(lab: Lab) -> None:
    ran = nestnet("doctor", "--lab", lab.name, "-o", "json", code=None)
    found = json.loads(ran.stdout)
    assert [one for one in found["findings"] if one["fix"] and not one["warning"]] == []
    assert {"kernel", "libbpf", "bpffs", "controller", "clock", "agents"} <= {one["check"] for one in found["findings"]}
    namespace = netns.path(lab.machine("m1"))

    def shrink(mtu: int) -> None:
        with links.netlink() as ipr:
            link = links.find(ipr, "eth0")
            assert link is not None
            ipr.link("set", index=link.index, mtu=mtu)

    netns.run_in(namespace, lambda: shrink(1300))
    try:
        said = nestnet("doctor", "--lab", lab.name, code=1).stdout.decode()
    finally:
        netns.run_in(namespace, lambda: shrink(1500))
    assert "eth0 has an MTU of 1300, the controller counts on 1500" in said
    assert "\n  ip link set eth0 mtu 1500, or say --mtu 1300 when the machine joins\n" in said


def test_events_and_logs_can_be_followed(lab: Lab) -> None:
    said = nestnet("events", "--last", "100", "--lab", lab.name).stdout.decode()
    assert re.search(r"^\d\d:\d\d:\d\d  started   m1: its agent has started$", said, re.M)
    assert re.search(
        r"^\d\d:\d\d:\d\d  changed   uid:0  apply: 4 made: network old, segment old/s, port old/a, ...$", said, re.M
    )
    assert re.search(r"  realised  all 2 machines have realised revision \d+, \d+\.\d\d s after it was stored", said)
    event = json.loads(nestnet("events", "--last", "1", "-o", "json", "--lab", lab.name).stdout)
    assert event["kind"]
    assert "listening on=unix:" in nestnet("logs", "controller", "--last", "1000", "--lab", lab.name).stdout.decode()
    assert "m1: " in nestnet("logs", "--lab", lab.name).stdout.decode()
    assert nestnet("logs", "m9", "--lab", lab.name, code=1).stderr == b"nestnet: machine m9 does not exist\n"
    command = ["events", "-f", "--last", "0", "--lab", lab.name]
    following = _started(*command)
    try:
        assert following.stdout is not None
        heard: list[str] = []
        threading.Thread(target=lambda: heard.extend([following.stdout.readline()]), daemon=True).start()  # type: ignore[union-attr]

        def change() -> bool:
            with Client(lab.controller) as client:
                client.join(
                    "m1",
                    client.get("machine", "m1")["address"],
                    labels={"turn": str(len(heard)), "at": str(time.time())},
                )
            return bool(heard)

        until(change)
        assert re.match(r"\d\d:\d\d:\d\d  (changed|realised) ", heard[0])
    finally:
        following.terminate()
        following.wait()


def _started(*arguments: str) -> subprocess.Popen[str]:
    import sys

    root = Path(__file__).resolve().parent.parent
    return subprocess.Popen([sys.executable, "-m", "nestnet", *arguments], stdout=subprocess.PIPE, text=True, cwd=root)
