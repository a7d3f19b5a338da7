"""Agents that are killed or stopped at any moment, under traffic, while what they should make changes: nothing that is
allowed is lost, nothing that is forbidden arrives, and every hook has one program.

    m1: a, c         a -> b   1,000 packets/s that are allowed
    m2: b            a -> b, c 5,000 packets/s, and b -> a 1,000, that are not

They come back as they were, or with another build of the programs, or with another layout of the tables.

NESTNET_KILLS=200 NESTNET_STOP=60 NESTNET_SEED=7 .venv/bin/python -m pytest tests/test_killed_agents.py -s
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from killing import stop
from test_lab import ROOT, leftovers, nestnet

from nestnet.agent import links, netns
from nestnet.agent.attachments import ALIAS
from nestnet.api.client import Client
from nestnet.compile.tables import LAYOUT
from nestnet.datapath.libbpf import on_hook
from nestnet.lab import state
from nestnet.lab.down import down
from nestnet.lab.state import Lab

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("NESTNET_KILLS", "6"))
STOP = float(os.environ.get("NESTNET_STOP", "2"))  # seconds that an agent is stopped
SEED = int(os.environ.get("NESTNET_SEED", random.randrange(1 << 32)))
LIFE = 2.5  # seconds after its start before which an agent may be killed: some have not begun, some are done
PATIENCE = 60.0
ALLOWED, FORBIDDEN = 7, 9
NET: dict[str, Any] = {
    "apiVersion": "nestnet/v1",
    "networks": {
        "n": {
            "segments": {"s": {"cidr": "10.0.0.0/24"}},
            "ports": {
                "a": {"segment": "s", "host": "m1", "address": "10.0.0.11"},
                "b": {"segment": "s", "host": "m2", "address": "10.0.0.12"},
                "c": {"segment": "s", "host": "m1", "address": "10.0.0.13"},
            },
            "policies": [{"from": "any", "to": "any", "allow": "udp/7"}],
        }
    },
}

# Numbered datagrams at a rate, to several in turn, until SIGTERM; then how many there were, and how many were refused.
SENDER = """
import signal, socket, struct, sys, time
port, rate, targets = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
number = refused = 0
begin = time.monotonic()
while not ended:
    behind = int((time.monotonic() - begin) * rate) - number
    if behind > 100:  # it did not run for a while: go on from here, without a burst
        begin += (behind - 100) / rate
    for _ in range(min(behind, 100)):
        try:
            out.sendto(struct.pack("!Q", number), (targets[number % len(targets)], port))
        except OSError:
            refused += 1
        number += 1
    time.sleep(0.001)
print(number, refused)
"""

# Which of them arrive, until SIGTERM and half a second of silence.
RECEIVER = """
import json, signal, socket, struct, sys, time
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ear.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
ear.setsockopt(socket.SOL_SOCKET, 40, 1)  # SO_RXQ_OVFL
ear.bind(("", int(sys.argv[1])))
ear.settimeout(0.5)
print("ready", flush=True)
first, following, received, again, overflow, gaps = None, 0, 0, 0, 0, []
while True:
    try:
        data, extra, _, _ = ear.recvmsg(100, 100)
    except TimeoutError:
        if ended:
            break
        continue
    number = struct.unpack("!Q", data)[0]
    first = number if first is None else first
    following = first if not received else following
    received += 1
    overflow = struct.unpack("=I", extra[0][2])[0] if extra else overflow
    if number > following:
        gaps.append((time.monotonic(), following, number))
    again += number < following
    following = max(following, number + 1)
print(json.dumps({"first": first, "following": following, "received": received, "again": again,
                  "overflow": overflow, "gaps": gaps[:50]}))
"""


def until(true: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """The pace is of asking; the wait is for what is asked for."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


# ---- what they come back as


def copied(folder: Path, *edits: tuple[str, str, str]) -> Path:
    """The package, with words replaced (file, old, new), and its object built."""
    shutil.copytree(ROOT / "nestnet", folder / "nestnet", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").touch()  # it has a build folder of its own
    for name, old, new in edits:
        path = folder / "nestnet" / name
        text = path.read_text()
        assert text.count(old) == 1, (name, old)
        path.write_text(text.replace(old, new))
    subprocess.run([sys.executable, "-m", "nestnet.datapath.build"], env=_environment(folder), cwd=folder, check=True)
    return folder


def _environment(package: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packages that an agent may come from: this one, and two that differ in their programs and in their tables."""
    folder = tmp_path_factory.mktemp("versions")
    main = "datapath/bpf/nestnet.bpf.c"
    known = "\tint action = UNLIKELY(skb->vlan_present) ? known_behind_tags(skb) : known_from_workload(skb);\n"
    build = copied(
        folder / "build",
        (main, 'SEC("tc") int workload(', 'volatile const u32 version = 2;\nSEC("tc") int workload('),
        (main, known, f"{known}\n\tif (version == 3)\n\t\treturn TC_ACT_SHOT;\n"),
    )
    row = '("machine", "array", _struct(("id", "u8"), '
    layout = copied(
        folder / "layout",
        ("compile/tables.py", f"LAYOUT = {LAYOUT} ", f"LAYOUT = {LAYOUT + 1} "),
        ("compile/tables.py", row, f'{row}("more", "u8"), '),
        ("compile/compiler.py", 'self.put("machine", slot, m.id, ', 'self.put("machine", slot, m.id, 0, '),
        ("datapath/bpf/tables.h", "struct machine { u64 id;", "struct machine { u64 id, more;"),
    )
    return {"same": ROOT, "build": build, "layout": layout}


# ---- the lab, its agents and its traffic


class Agents:
    """The agents of a lab, each with its command line, and who it is now."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.commands: dict[str, list[str]] = {}
        self.pids: dict[str, int] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        for process in lab.processes:
            if process.name.startswith("agent-"):
                machine = process.name.removeprefix("agent-")
                self.commands[machine] = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[:-1]
                self.pids[machine] = process.pid

    def kill(self, machine: str) -> None:
        os.kill(self.pids[machine], signal.SIGKILL)
        if (child := self._children.pop(machine, None)) is not None:
            child.wait()
        until(lambda: state.start_time(self.pids[machine]) is None, "it lives")

    def start(self, machine: str, package: Path = ROOT) -> None:
        with (self.lab.logs / f"agent-{machine}.log").open("ab") as log:
            self._children[machine] = netns.spawn(
                netns.path(self.lab.machine(machine)),
                self.commands[machine],
                output=log,
                environment=_environment(package),
            )
        self.pids[machine] = self._children[machine].pid

    def ended(self, machine: str) -> bool:
        return machine in self._children and self._children[machine].poll() is not None

    def log(self, machine: str) -> str:
        return (self.lab.logs / f"agent-{machine}.log").read_text()[-3000:]

    def end(self) -> None:
        for machine, child in self._children.items():
            os.kill(self.pids[machine], signal.SIGCONT)
            child.terminate()
            assert child.wait(20) == 0, self.log(machine)
        self._children.clear()

    def hooks(self, machine: str, settled: bool) -> int:
        """How many hooks there are. Each has one program of ours; one whose link is down, so that nothing comes in, may
        not have it yet, unless all is `settled`."""

        def look() -> int:
            with links.netlink() as ipr:
                there = [link for link in links.links(ipr).values() if link.alias.startswith(ALIAS)]
                nic = links.find(ipr, "eth0")
            assert nic is not None
            for link in (nic, *there):
                try:
                    programs = [name for name in on_hook(link.index) if name in ("workload", "underlay")]
                except OSError:
                    continue  # it went just now
                wanted = ["underlay" if link is nic else "workload"]
                assert programs == wanted or (not programs and not link.up and not settled), (machine, link, programs)
            return 1 + len(there)

        return netns.run_in(netns.path(self.lab.machine(machine)), look)


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    file = tmp_path_factory.mktemp("lab") / "net.yaml"
    file.write_text(yaml.safe_dump({**NET, "machines": {"m1": {}, "m2": {}}}))
    try:
        nestnet("up", str(file), "--name", name)
        lab = state.load(name)
        assert lab is not None
        yield Agents(lab)
    finally:
        down(name)
    assert leftovers(name) == []


class Traffic:
    """The flows, from when what is allowed has begun to arrive."""

    def __init__(self, lab: Lab) -> None:
        with Client(lab.controller) as client:
            rooms = {name: netns.path(lab.workload(client.get("port", f"n/{name}")["row"])) for name in "abc"}
        self._receivers = {
            (name, port): self._run(rooms[name], RECEIVER, port)
            for name, port in (("b", ALLOWED), ("a", FORBIDDEN), ("b", FORBIDDEN), ("c", FORBIDDEN))
        }
        for receiver in self._receivers.values():
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "ready\n"
        # The first packet of all waits for ARP between the machines.
        ping = ["ping", "-n", "-c", "1", "-W", "2", lab.machines[1].address.partition("/")[0]]
        netns.run_in(netns.path(lab.machine("m1")), lambda: subprocess.run(ping, stdout=-3, check=True))
        self._allowed = self._run(rooms["a"], SENDER, ALLOWED, 1000, "10.0.0.12")
        self._forbidden = [
            self._run(rooms["a"], SENDER, FORBIDDEN, 5000, "10.0.0.12", "10.0.0.13"),
            self._run(rooms["b"], SENDER, FORBIDDEN, 1000, "10.0.0.11"),
        ]
        self._begin = time.monotonic()

    @staticmethod
    def _run(room: Path, program: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-S", "-c", program, *map(str, arguments)]
        return netns.run_in(room, lambda: subprocess.Popen(command, stdout=subprocess.PIPE, text=True))

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> str:
        process.terminate()
        text, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        return text

    def end(self) -> tuple[dict[str, int], list[Any]]:
        """What was sent, lost and delivered, and where there were gaps."""
        seconds = time.monotonic() - self._begin
        sent, refused = map(int, self._end(self._allowed).split())
        forbidden = sum(int(self._end(sender).split()[0]) for sender in self._forbidden)
        heard = {key: json.loads(self._end(receiver)) for key, receiver in self._receivers.items()}
        allowed = heard.pop(("b", ALLOWED))
        figures = {
            "seconds": round(seconds),
            "allowed sent": sent,
            "allowed lost": sent - allowed["received"] + allowed["again"],
            "refused by the sender's kernel": refused,
            "overflow of the receiver's socket": allowed["overflow"],
            "forbidden sent": forbidden,
            "forbidden delivered": sum(each["received"] for each in heard.values()),
        }
        return figures, allowed["gaps"]

    def kill(self) -> None:
        for process in (self._allowed, *self._forbidden, *self._receivers.values()):
            process.kill()
            process.wait()


class Churn:
    """Somebody who changes the network now and again, never what the flows are about. `revision` is the newest."""

    def __init__(self, controller: str, seed: int) -> None:
        self._controller = controller
        self._random = random.Random(seed)
        self._end = threading.Event()
        self.revision = 0
        self.changes = 0
        self.failed: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _manifest(self) -> dict[str, Any]:
        choose = self._random
        n = NET["networks"]["n"]
        ports = {
            f"x{i}": {"segment": "s", "host": choose.choice(["m1", "m2"])} for i in range(3) if choose.random() < 0.5
        }
        rules = [{"from": "any", "to": "any", "allow": f"udp/{port}"} for port in choose.sample(range(1000, 9000), 5)]
        rules += [{"from": "c", "to": "b", "deny": "udp/7"}] * choose.randrange(2)
        other = {"segments": {"s": {"cidr": "10.0.0.0/24"}}, "ports": {"y": {"segment": "s", "host": "m1"}}}
        return {
            "apiVersion": "nestnet/v1",
            "networks": {
                "n": {**n, "ports": n["ports"] | ports, "policies": n["policies"] + rules},
                "o": other if choose.random() < 0.5 else {**other, "ports": {}},
            },
        }

    def _run(self) -> None:
        with Client(self._controller) as client:
            while not self._end.wait(self._random.uniform(0.1, 1.0)):
                try:
                    self.revision = int(client.apply(self._manifest())["revision"])
                    self.changes += 1
                except Exception as error:
                    self.failed.append(repr(error))

    def end(self) -> None:
        self._end.set()
        self._thread.join()


def realised(lab: Lab, machine: str) -> int:
    with Client(lab.controller) as client:
        return int(next(m["realised"] for m in client.status()["machines"] if m["name"] == machine))


def reached(agents: Agents, machine: str, revision: int) -> None:
    try:
        until(lambda: realised(agents.lab, machine) >= revision or agents.ended(machine), "")
    except AssertionError:
        pytest.fail(f"{machine} has not realised revision {revision}:\n{agents.log(machine)}")
    assert not agents.ended(machine), agents.log(machine)


# ---- what happens to them


def test_agents_that_are_killed_leave_traffic_alone(agents: Agents, versions: dict[str, Path]) -> None:
    print(f"NESTNET_SEED={SEED}")
    choose = random.Random(SEED)
    came: Counter[str] = Counter()
    converged = hooks = 0
    kills: list[tuple[float, str, str]] = []
    with ExitStack() as stack:
        traffic = Traffic(agents.lab)
        stack.callback(traffic.kill)
        churn = Churn(agents.lab.controller, SEED)
        stack.callback(churn.end)
        for number in range(KILLS):
            machine = choose.choice(["m1", "m2"])
            threading.Event().wait(choose.uniform(0, LIFE))  # what is waited for is any moment at all
            agents.kill(machine)
            hooks += agents.hooks(machine, settled=False)
            version = choose.choice(list(versions)) if number < KILLS - 2 else "same"
            kills.append((time.monotonic(), machine, version))
            agents.start(machine, versions[version])
            came[version] += 1
            if choose.random() < 0.4:
                reached(agents, machine, churn.revision)
                hooks += agents.hooks(machine, settled=False)
                converged += 1
        churn.end()
        assert not churn.failed, churn.failed
        for machine in agents.commands:
            reached(agents, machine, churn.revision)
            until(lambda machine=machine: _settled(agents, machine), "a hook is empty")  # type: ignore[misc]
        figures, gaps = traffic.end()
    agents.end()
    for machine in agents.commands:
        agents.start(machine)
    figures = {
        "kills": KILLS,
        "converged between": converged,
        "changes": churn.changes,
        "hooks looked at": hooks,
    } | figures
    print(json.dumps({**figures, "came back as": dict(came)}))
    near = [(gap, [kill for kill in kills if gap[0] - 5 < kill[0] < gap[0] + 1]) for gap in gaps]
    assert figures["forbidden delivered"] == 0
    assert figures["allowed lost"] == 0, near
    assert figures["refused by the sender's kernel"] == 0


def _settled(agents: Agents, machine: str) -> bool:
    try:
        return agents.hooks(machine, settled=True) > 0
    except AssertionError:
        return False


def test_an_agent_that_was_stopped_is_late_and_no_more(agents: Agents, versions: dict[str, Path]) -> None:
    """While it stands, others decide other things, and somebody starts a second one, which is refused. Then it becomes
    what is wanted now, and nothing of what was wanted meanwhile."""
    lab, m1 = agents.lab, "m1"
    with ExitStack() as stack:
        client = stack.enter_context(Client(lab.controller))
        base = dict(NET["networks"]["n"])
        reached(agents, m1, int(client.apply({"apiVersion": "nestnet/v1", "networks": {"n": base}})["revision"]))
        traffic = Traffic(lab)
        stack.callback(traffic.kill)
        stop(agents.pids[m1])
        stack.callback(os.kill, agents.pids[m1], signal.SIGCONT)
        stopped = time.monotonic()
        meanwhile = {**base, "ports": base["ports"] | {"meanwhile": {"segment": "s", "host": m1}}}
        first = int(client.apply({"apiVersion": "nestnet/v1", "networks": {"n": meanwhile}})["revision"])
        second = [sys.executable, "-c", SECOND, str(lab.pins / m1)]
        refused = subprocess.run(second, env=_environment(ROOT), stderr=subprocess.PIPE, text=True, check=False)
        assert "another process writes the datapath" in refused.stderr
        row = client.get("port", "n/meanwhile")["row"]
        now = {**base, "ports": base["ports"] | {"late": {"segment": "s", "host": m1}}}
        last = int(client.apply({"apiVersion": "nestnet/v1", "networks": {"n": now}})["revision"])
        threading.Event().wait(max(0.0, STOP - (time.monotonic() - stopped)))
        assert realised(lab, m1) < first
        os.kill(agents.pids[m1], signal.SIGCONT)
        begin = time.monotonic()
        reached(agents, m1, last)
        took = time.monotonic() - begin
        assert realised(lab, m1) == last
        assert not netns.exists(lab.workload(row))
        assert netns.exists(lab.workload(client.get("port", "n/late")["row"]))
        agents.hooks(m1, settled=True)
        figures, gaps = traffic.end()
    print(json.dumps({"stopped": STOP, "late by": round(took, 2), **figures}))
    assert figures["allowed lost"] == 0, gaps
    assert figures["forbidden delivered"] == 0
    assert took < 10


SECOND = (
    "import sys; from pathlib import Path; from nestnet.datapath.kernel import Kernel; Kernel.open(Path(sys.argv[1]))"
)
