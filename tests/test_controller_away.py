"""Machines without their controller: what is secured goes on and loses nothing, what is not yet stays closed.

A lab with packets that are numbered, a thousand a second that policies allow and a thousand that they do not. The
controller is killed with its store, and its file put where nothing can read it; one machine is cut off from it; an
agent is stopped. NESTNET_AWAY is for how many seconds: 60 by scripts/soak.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killing import stop
from test_underlay import ip, lab, until, workload

from nestnet.agent import netns
from nestnet.api.client import Client
from nestnet.lab.state import Lab, Process
from nestnet.model.errors import Unreachable
from nestnet.model.manifest import parse
from nestnet.store import Store

pytestmark = pytest.mark.root
ROOT = Path(__file__).resolve().parent.parent
AWAY = float(os.environ.get("NESTNET_AWAY", "8"))
BACK = 5.0  # seconds after which a controller that starts must answer
AGAIN = 10.0  # seconds after which machines have what they missed
SHARE = 0.05  # of a CPU, for an agent that has nobody to talk to
ALLOWED, FORBIDDEN = 7, 9  # UDP ports


def port(host: str, address: str, **more: Any) -> dict[str, Any]:
    return {"segment": "s", "host": host, "address": address, **more}


PORTS = {
    "a": port("m1", "10.0.0.2"),
    "b": port("m2", "10.0.0.3"),
    "c": port("m1", "10.0.0.4"),
    "d": port("m3", "10.0.0.5"),
}


def manifest(**more: Any) -> dict[str, Any]:
    """The network, with more ports, and another one that must never hear of it."""
    segment = {"segments": {"s": {"cidr": "10.0.0.0/24"}}}
    allow = {"policies": [{"from": "any", "to": "any", "allow": f"udp/{ALLOWED}"}]}
    networks = {"n": {**segment, **allow, "ports": PORTS | more}, "x": {**segment, "ports": {"b": PORTS["b"]}}}
    return {"apiVersion": "nestnet/v1", "networks": networks}


# Sends a number to each target, a thousand times a second; when it was held up it does not send the rest at once.
SENDER = """
import signal, socket, sys, time
targets = [(address, int(port)) for address, _, port in (word.partition(":") for word in sys.argv[1:])]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
number, due = 0, time.monotonic()
while not stopped:
    for target in targets:
        try:
            out.sendto(b"%d" % number, target)
        except OSError:
            pass  # no way there
    number += 1
    now = time.monotonic()
    due = max(due + 0.001, now - 0.02)
    time.sleep(max(0, due - now))
print(number)
"""


class Ears:
    """What comes to some workloads, by (who listens, on which port, who sent it): numbers in the order they came."""

    def __init__(self, **places: Path) -> None:
        self.heard: dict[tuple[str, int, str], list[int]] = defaultdict(list)
        self._closed = threading.Event()
        self._threads = []
        for name, inside in places.items():
            for number in (ALLOWED, FORBIDDEN):
                channel = netns.run_in(inside, partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM))
                channel.setsockopt(socket.SOL_SOCKET, 33, 1 << 25)  # SO_RCVBUFFORCE: this process may be held up
                channel.bind(("", number))
                channel.settimeout(0.2)
                self._threads.append(threading.Thread(target=self._listen, args=(name, number, channel)))
        for thread in self._threads:
            thread.start()

    def _listen(self, name: str, number: int, channel: socket.socket) -> None:
        with channel:
            while True:
                try:
                    text, (source, _) = channel.recvfrom(100)
                except TimeoutError:
                    if self._closed.is_set():
                        return
                else:
                    self.heard[name, number, source].append(int(text))

    def close(self) -> None:
        """When all that was sent has come."""
        self._closed.set()
        for thread in self._threads:
            thread.join()


class Site:
    """A lab, its processes, and what they were started with."""

    def __init__(self, up: Lab) -> None:
        self.up = up
        self.commands = {process.name: self._command(process) for process in up.processes}
        self.children: list[subprocess.Popen[bytes]] = []

    @staticmethod
    def _command(process: Process) -> list[str]:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().decode().split("\0")[:-1]

    def process(self, name: str) -> Process:
        (found,) = [process for process in self.up.processes if process.name == name]
        return found

    def kill(self, name: str) -> None:
        process = self.process(name)
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not process.alive())

    def start(self, name: str, **other: str) -> None:
        """Start it again as it was, but for some options."""
        command = list(self.commands[name])
        for option, value in other.items():
            command[command.index(f"--{option}") + 1] = value
        machine = name.removeprefix("agent-")
        namespace = netns.path(self.up.machine(machine)) if machine != name else Path("/proc/self/ns/net")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with (self.up.logs / f"{name}.log").open("ab") as log:
            self.children.append(netns.spawn(namespace, command, output=log, environment=environment))
        again = Process.of(name, self.children[-1].pid)
        others = tuple(process for process in self.up.processes if process.name != name)
        self.up = replace(self.up, processes=(*others, again))
        self.up.save()

    def cpu(self, name: str) -> float:
        """Seconds of CPU that it has used."""
        fields = Path(f"/proc/{self.process(name).pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @contextmanager
    def traffic(self) -> Iterator[Ears]:
        """Streams from a to workloads on all machines, of which nothing that is allowed may be lost, and nothing else
        may arrive."""
        inside = {path: workload(self.up, path) for path in ("n/a", "n/b", "n/c", "n/d", "x/b")}
        ears = Ears(**{path.replace("/", "_"): inside[path] for path in ("n/b", "n/c", "n/d", "x/b")})
        targets = [f"10.0.0.{host}:{number}" for host in (3, 4, 5) for number in (ALLOWED, FORBIDDEN)]
        heard = [ears.heard["n_" + name, ALLOWED, "10.0.0.2"] for name in "bcd"]
        try:
            with sending(inside["n/a"], *targets) as sent:
                until(lambda: all(len(numbers) > 100 for numbers in heard))
                begun = time.monotonic()
                yield ears
                took = time.monotonic() - begun
                count = sent()
        finally:
            ears.close()
        for numbers in heard:
            lost = set(range(numbers[0], count)) - set(numbers)
            assert not lost, (len(lost), sorted(lost)[:20], count)
            assert len(numbers) == len(set(numbers)), "twice"
        rest = {where: numbers for where, numbers in ears.heard.items() if where[2] == "10.0.0.2" and numbers}
        assert len(rest) == len(heard), [where for where in rest if where[1] == FORBIDDEN or where[0] == "x_b"]
        print(f"\n{took:.1f} s: {3 * count} packets allowed, none lost; {3 * count} forbidden, none delivered")


@contextmanager
def sending(inside: Path, *targets: str) -> Iterator[Callable[[], int]]:
    """A process that sends; what is yielded ends it and returns how many it sent to each."""
    command = [sys.executable, "-S", "-c", SENDER, *targets]
    process = netns.run_in(inside, partial(subprocess.Popen, command, stdout=subprocess.PIPE))

    def end() -> int:
        process.terminate()
        return int(process.communicate(timeout=20)[0])

    try:
        yield end
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    text = json.dumps({**manifest(), "machines": {"m1": {}, "m2": {}, "m3": {}}})
    with lab(text, tmp_path_factory.mktemp("away")) as up:
        made = Site(up)
        try:
            yield made
        finally:
            for process in made.children:
                process.kill()
                process.wait()


def settled(client: Client) -> bool:
    now = client.status()
    return all(machine["realised"] == now["revision"] and not machine["problems"] for machine in now["machines"])


def begins(client: Client, machine: str) -> int:
    """How often its agent has said that it began."""
    events = [line["event"] for line in client.events(last=1000)]
    return sum((event["kind"], event["machine"]) == ("started", machine) for event in events)


def test_nothing_is_lost_while_controller_and_store_are_away(site: Site) -> None:
    folder = site.up.folder / "controller"
    away = folder.with_name("controller.away")
    agents = [f"agent-m{number}" for number in (1, 2, 3)]
    late = f"{site.up.name}-late"
    machine = site.up.machine("m1")
    netns.create(late)
    try:
        with site.traffic() as ears, Client(site.up.controller, patience=0) as client:
            site.kill("controller")
            folder.rename(away)
            begun, before = time.monotonic(), {name: site.cpu(name) for name in agents}
            with pytest.raises(Unreachable):
                client.status()
            # A port is stored that no machine has heard of, and its workload is there already, on a veth of its own.
            store = Store(away / "store.db")
            store.apply(parse(manifest(late=port("m1", "10.0.0.9", attach={"netns": late}))))
            (mac,) = [one["mac"] for one in store.list("port", "n")[0] if one["name"] == "b"]
            store.close()
            ip(machine, f"link add hand0 type veth peer name eth9 netns {late}", "link set hand0 up")
            ip(late, "address add 10.0.0.9/24 dev eth9", "link set eth9 up", "link set lo up")
            ip(late, f"neighbour add 10.0.0.3 lladdr {mac} dev eth9")
            with sending(netns.path(late), f"10.0.0.3:{ALLOWED}"):
                until(lambda: time.monotonic() - begun >= AWAY, AWAY + 20)
                took = time.monotonic() - begun
                shares = {name: (site.cpu(name) - before[name]) / took for name in agents}
                assert all(site.process(name).alive() for name in agents)
                assert not ears.heard["n_b", ALLOWED, "10.0.0.9"], "it was not known yet"
                ip(machine, "link del hand0")
                away.rename(folder)
                started = time.monotonic()
                site.start("controller")
                client.patience = client.timeout = 20
                client._answered = True
                client.status()
                back = time.monotonic() - started
                until(lambda: ears.heard["n_b", ALLOWED, "10.0.0.9"], AGAIN)
                opened = time.monotonic() - started
                until(lambda: settled(client), AGAIN)
                realised = time.monotonic() - started
                client.apply(manifest())
    finally:
        netns.delete(late)
    words = ", ".join(f"{share:.1%}" for share in shares.values())
    print(f"away {took:.1f} s: agents used {words} of a CPU; it answered after {back:.2f} s,")
    print(f"the new port was open after {opened:.2f} s, all machines had realised it after {realised:.2f} s")
    assert back < BACK
    assert max(shares.values()) < SHARE
    with Client(site.up.controller) as client:
        assert [begins(client, name) for name in ("m1", "m2", "m3")] == [1, 1, 1]


class Relay:
    """A socket before the controller's, for one machine. While `cut` it refuses everybody; while it is a `hole` it
    takes what comes and says nothing, as a network does that has lost its way."""

    def __init__(self, path: Path, to: Path) -> None:
        self.cut = self.hole = False
        self.swallowed = 0  # bytes of the machine's
        self.taken = self.refused = 0  # connections
        self._to = to
        self._open: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.cut:
                    self.refused += 1
                    near.close()
                    continue
                self.taken += 1
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._to))
                self._open |= {near, far}
                for pair in ((near, far, 1), (far, near, 0)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, counts: int) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.hole:
                    self.swallowed += len(data) * counts
                else:
                    target.sendall(data)
        if not self.hole:
            self._end(source, target)

    def _end(self, *ends: socket.socket) -> None:
        for each in ends:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            self._open.discard(each)

    def now(self, *, cut: bool = False, hole: bool = False) -> None:
        """What was lost in a hole does not come out of it again: those connections end."""
        healed = self.hole and not hole
        self.cut, self.hole = cut, hole
        if cut or healed:
            self._end(*list(self._open))

    def close(self) -> None:
        self._listener.close()
        self.now(cut=True)


def test_a_machine_that_is_cut_off_goes_on_and_comes_back(site: Site) -> None:
    relay = Relay(site.up.folder / "relay.sock", site.up.socket)
    machine = site.up.machine("m2")
    try:
        with Client(site.up.controller) as client:
            until(lambda: settled(client))
            site.kill("agent-m2")
            site.start("agent-m2", controller=f"unix:{site.up.folder}/relay.sock")
            until(lambda: begins(client, "m2") == 2 and settled(client))
            row = client.get("port", "x/b")["row"]
            with site.traffic():
                # Nothing comes out of it, not even that nobody is there; the agent still sees to its machine.
                relay.now(hole=True)
                until(lambda: relay.swallowed)
                ip(machine, f"link del p{row}")
                until(lambda: f"p{row}" in links(machine), AGAIN)
                client.apply(manifest(more=port("m2", "10.0.0.7")))
                until(lambda: not settled(client))
                relay.now()
                until(lambda: settled(client), AGAIN)
                # It comes and goes.
                for _ in range(2):
                    refused, taken = relay.refused, relay.taken
                    relay.now(cut=True)
                    until(lambda refused=refused: relay.refused > refused + 2)  # type: ignore[misc]
                    relay.now()
                    until(lambda taken=taken: relay.taken > taken, AGAIN)  # type: ignore[misc]
                client.apply(manifest())
                until(lambda: settled(client), AGAIN)
    finally:
        relay.close()
        site.kill("agent-m2")
        site.start("agent-m2")


def links(machine: str) -> list[str]:
    shown = subprocess.check_output(["ip", "-n", machine, "-j", "link"])
    return [link["ifname"] for link in json.loads(shown)]


def test_an_agent_that_was_stopped_is_late_and_nothing_else(site: Site) -> None:
    """What it may still hold is not given to anybody meanwhile."""
    with Client(site.up.controller) as client:
        until(lambda: settled(client))
        other = {"segments": {"s": {"cidr": "10.0.0.0/24"}}, "ports": {"p": port("m3", "10.0.0.2")}}
        client.apply({"apiVersion": "nestnet/v1", "networks": {"old": other}})
        until(lambda: settled(client))
        vni = client.get("segment", "old/s")["vni"]
        stopped = site.process("agent-m3")
        with site.traffic():
            stop(stopped.pid)
            try:
                client.delete("network", "old", cascade=True)
                client.apply({"apiVersion": "nestnet/v1", "networks": {"new": other}})
                assert client.get("segment", "new/s")["vni"] != vni, "m3 may hold it"
                now = client.status()["revision"]
                until(lambda: {m["name"] for m in client.status()["machines"] if m["realised"] == now} == {"m1", "m2"})
            finally:
                os.kill(stopped.pid, signal.SIGCONT)
            until(lambda: settled(client), AGAIN)
            client.delete("network", "new", cascade=True)
            until(lambda: settled(client), AGAIN)
