"""A lab as a user has it: up, checks, exec, changes, kill -9, down. Real processes, real packets.

m1: acme/web1, globex/web1     m2: acme/web2, acme/db1     m3: acme/db2, globex/db1
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestnet.agent import netns
from nestnet.api.client import Client
from nestnet.lab import state
from nestnet.lab.addresses import seats
from nestnet.lab.down import down, end
from nestnet.lab.state import Lab, Process, Seat
from nestnet.model.errors import Conflict, Exhausted
from nestnet.model.manifest import MachineSpec

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "examples/quickstart.yaml"
RING = ROOT / "examples/ring.yaml"


def nestnet(*arguments: str, stdin: bytes = b"", code: int | None = 0) -> subprocess.CompletedProcess[bytes]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("NESTNET")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nestnet", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, env=env, timeout=180, check=False)
    assert code is None or done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr.decode())
    return done


def leftovers(name: str) -> list[str]:
    """Everything on this computer that belongs to a lab."""
    wire = f"{state.PREFIX}{name}"
    found = [each for each in netns.names(wire) if each == wire or each.startswith(f"{wire}.")]
    found += [str(folder) for folder in (state.RUN / name, state.BPFFS / name) if folder.exists()]
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(word.endswith(f"/{name}/controller.sock".encode()) for word in words):
                found.append(f"process {process.name}")
    return found


@pytest.fixture(scope="module")
def lab() -> Iterator[str]:
    """A lab with the quick start in it, for tests that leave it as it is."""
    name = f"t-{uuid.uuid4().hex[:8]}"
    try:
        nestnet("up", str(QUICKSTART), "--name", name)
        yield name
    finally:
        nestnet("down", "--name", name)
    assert leftovers(name) == []


@pytest.fixture
def name() -> Iterator[str]:
    chosen = f"t-{uuid.uuid4().hex[:8]}"
    yield chosen
    down(chosen)
    assert leftovers(chosen) == []


# ---- what needs no lab


def test_machines_get_the_next_free_addresses() -> None:
    specs = {f"m{i}": MachineSpec() for i in range(3)} | {"own": MachineSpec.model_validate({"address": "192.0.2.2"})}
    assert [seat.address for seat in seats(specs)] == ["192.0.2.1/24", "192.0.2.3/24", "192.0.2.4/24", "192.0.2.2/24"]
    many = seats({f"m{i}": MachineSpec() for i in range(300)})
    assert (many[0].address, many[299].address) == ("198.18.0.1/15", "198.18.1.44/15")
    six = seats({"a": MachineSpec.model_validate({"nic": ["x", "y"]}), "b": MachineSpec(mtu=9000)}, 6)
    assert six == [Seat("a", "2001:db8::1/64", 1500, ("x", "y")), Seat("b", "2001:db8::2/64", 9000)]
    with pytest.raises(Exhausted, match="at most 131070"):
        seats(dict.fromkeys((f"m{i}" for i in range(131071)), MachineSpec()))


def test_no_lab_is_mistaken_for_another() -> None:
    """Names are labels without dots: a-b's namespaces do not begin as those of a do."""
    assert not Lab("a-b").machine("c").startswith(Lab("a").wire + ".")
    assert len({Lab("a").wire, Lab("a").machine("wire"), Lab("a").workload(1), Lab("a").machine("port")}) == 4


def test_a_pid_that_was_given_to_somebody_else_is_left_alone() -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        real = Process.of("sleep", stranger.pid)
        assert real.alive()
        assert end([Process("agent", stranger.pid, real.started - 1)]) == 0
        assert stranger.poll() is None
        assert end([real]) == 1
        assert stranger.wait() == -signal.SIGTERM
        assert not real.alive()
    finally:
        stranger.kill()
        stranger.wait()


def test_one_of_several_labs_must_be_named() -> None:
    assert state.only_lab([]) is None
    assert state.only_lab(["a"]) == "a"
    with pytest.raises(Conflict, match="several labs are up: a, b"):
        state.only_lab(["a", "b"])


# ---- one that is up


@pytest.mark.root
def test_every_check_of_the_quick_start_passes(lab: str) -> None:
    results = json.loads(nestnet("test", "--lab", lab, "-o", "json").stdout)
    assert results["kind"] == "CheckList"
    assert results["passed"]
    assert len(results["items"]) == 11


@pytest.mark.root
def test_a_check_that_fails_is_named_and_exits_4(lab: str, tmp_path: Path) -> None:
    text = QUICKSTART.read_text()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(
        text[: text.index("checks:")]
        + "checks:\n"
        + "  - {from: acme/web1, to: acme/web2, send: icmp, expect: deny}\n"
        + "  - {from: acme/web1, to: acme/web2, send: udp/7000, expect: allow}\n"
    )
    ran = nestnet("test", str(wrong), "--lab", lab, code=4)
    assert "FAILED" in ran.stdout.decode()
    assert "acme/web1 -> acme/web2 icmp: expected deny, got allow\n  deliver: to acme/web2\n" in ran.stdout.decode()
    assert ran.stdout.decode().endswith("1 of 2 checks passed\n")


@pytest.mark.root
def test_exec_passes_stdin_status_and_signals(lab: str) -> None:
    assert nestnet("exec", "acme/web1", "--lab", lab, "--", "cat", stdin=b"a\0b").stdout == b"a\0b"
    nestnet("exec", "m1", "--lab", lab, "sh", "-c", "exit 9", code=9)
    shown = nestnet("exec", "acme/web1", "--lab", lab, "--", "ip", "-br", "addr", "show", "eth0").stdout.decode()
    assert "10.0.0.2/24" in shown
    env = {key: value for key, value in os.environ.items() if not key.startswith("NESTNET")} | {"PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "nestnet",
        "exec",
        "acme/web1",
        "--lab",
        lab,
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 600",
    ]
    running = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == -signal.SIGTERM
    running.stdout.close()
    assert b"machine m9 does not exist; did you mean" in nestnet("exec", "m9", "--lab", lab, "true", code=1).stderr


@pytest.mark.root
def test_capture_shows_vxlan_on_the_wire(lab: str, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("NESTNET")} | {"PYTHONPATH": str(ROOT)}
    file = tmp_path / "frames.pcap"
    command = [sys.executable, "-m", "nestnet", "capture", "m1", "--lab", lab, "-w", str(file), "-c", "2"]
    capture = subprocess.Popen([*command, "udp", "port", "4789"], cwd=ROOT, env=env, stderr=subprocess.PIPE)
    assert capture.stderr is not None
    equivalent = capture.stderr.readline().decode()
    assert equivalent.startswith(f"ip netns exec nn-{lab}.m1 tcpdump -i eth0")
    while b"listening on" not in capture.stderr.readline():
        assert capture.poll() is None
    nestnet("exec", "acme/web1", "--lab", lab, "--", "ping", "-q", "-c", "3", "-i", "0.2", "10.0.0.3")
    assert capture.wait(20) == 0
    capture.stderr.close()
    shown = subprocess.check_output(["tcpdump", "-n", "-r", str(file)], text=True, stderr=subprocess.DEVNULL)
    assert "VXLAN, flags [I] (0x08)" in shown
    assert "10.0.0.2 > 10.0.0.3: ICMP echo request" in shown


@pytest.mark.root
def test_a_trace_names_the_policy_and_its_line(lab: str) -> None:
    line = next(n for n, text in enumerate(QUICKSTART.read_text().splitlines(), 1) if "allow: tcp/5432" in text)
    told = nestnet("trace", "acme/web1", "acme/db1", "--tcp", "5432", "--lab", lab).stdout.decode()
    assert told.startswith("tcp/5432 from acme/web1 (10.0.0.2) to 10.0.1.2")
    assert f"allowed by frontend -> database allow tcp/5432 ({QUICKSTART}:{line})" in told
    assert told.endswith("deliver: to acme/db1\n")
    told = nestnet("trace", "acme/web1", "10.0.1.2", "--lab", lab).stdout.decode()
    assert told.splitlines()[-1].startswith("drop: policy: denied")


@pytest.mark.root
def test_status_is_well_and_counts(lab: str) -> None:
    assert nestnet("status", "--lab", lab).stdout.decode().startswith("well: ")


@pytest.mark.root
def test_up_again_is_refused_and_touches_nothing(lab: str) -> None:
    ran = nestnet("up", str(QUICKSTART), "--name", lab, code=1)
    assert f"nestnet: lab {lab} is up: `nestnet apply {QUICKSTART} --lab {lab}`" in ran.stderr.decode()
    assert nestnet("status", "--lab", lab).returncode == 0


# ---- from up to down


@pytest.mark.root
def test_a_change_is_realised_when_apply_returns(name: str, tmp_path: Path) -> None:
    text = QUICKSTART.read_text()
    file = tmp_path / "net.yaml"
    file.write_text(text)
    nestnet("up", str(file), "--name", name)
    denied = ["exec", "acme/web1", "--lab", name, "--", "ping", "-q", "-c", "1", "-W", "1", "10.0.1.2"]
    nestnet(*denied, code=1)
    file.write_text(text.replace("to: database, allow: tcp/5432", "to: database, allow: [tcp/5432, icmp]"))
    ran = nestnet("apply", str(file), "--lab", name)
    assert "realised in" in ran.stderr.decode()
    nestnet(*denied)
    assert nestnet("plan", str(file), "--lab", name, "--exit-code").stdout == b"no changes\n"

    # A port that goes takes its workload along; one that comes, gets one.
    nestnet("delete", "port", "globex/db1", "--lab", name)
    nestnet("exec", "globex/db1", "--lab", name, "true", code=1)
    nestnet("apply", str(file), "--lab", name)
    nestnet("exec", "globex/web1", "--lab", name, "--", "ping", "-q", "-c", "1", "-W", "2", "10.0.1.2")


@pytest.mark.root
def test_routes_follow_a_link_within_a_second(name: str, tmp_path: Path) -> None:
    """A ping runs while links go down and come up: the TTL of its answers counts the routers on their way back."""
    nestnet("up", str(RING), "--name", name)
    nestnet("test", "--lab", name)
    answers = tmp_path / "ping"
    lab = state.load(name)
    assert lab is not None
    with Client(lab.controller) as client, answers.open("wb") as output:
        row = client.get("port", "ring/n")["row"]
        command = ["ping", "-D", "-n", "-i", "0.05", "-W", "1", client.get("port", "ring/e")["addresses"][0][:-3]]
        ping = netns.spawn(netns.path(lab.workload(row)), command, output=output)
        try:
            _answered_within(answers, time.time(), ttl=64 - 2, seconds=10)

            since = time.time()
            client.set_link("ring/north-east", False)
            _answered_within(answers, since, ttl=64 - 4)

            nestnet("link", "down", "ring/west-north", "--lab", name)
            silent = time.time()
            told = nestnet("trace", "ring/n", "ring/e", "--lab", name).stdout.decode()
            assert told.splitlines()[-1] == (
                "drop: no_route: router north has no route to 10.2.0.2: links north-east, west-north are down"
            )
            assert _answers(answers, silent) == [], "realised means that nothing passes any more"

            since = time.time()
            client.set_link("ring/north-east", True)
            _answered_within(answers, since, ttl=64 - 2)
        finally:
            ping.terminate()
            ping.wait(20)
    # The file says nothing of states: applying it again leaves west-north down.
    assert nestnet("plan", str(RING), "--lab", name).stdout == b"no changes\n"
    assert "west-north  west, north  1     -     down" in nestnet("get", "links", "--lab", name).stdout.decode()
    nestnet("test", "--lab", name)


def _answers(file: Path, since: float) -> list[tuple[float, int]]:
    """(when, TTL) of the answers that `ping -D` wrote after a time."""
    found = re.findall(r"^\[([0-9.]+)\] .* ttl=(\d+) ", file.read_text(), re.MULTILINE)
    return [(float(at), int(ttl)) for at, ttl in found if float(at) > since]


def _answered_within(file: Path, since: float, ttl: int, seconds: float = 1.0) -> None:
    """An answer with this TTL came within so many seconds."""
    limit = time.monotonic() + max(10, 2 * seconds)
    while not (found := [at for at, had in _answers(file, since) if had == ttl]):
        assert time.monotonic() < limit, (ttl, _answers(file, since))
        time.sleep(0.02)
    assert found[0] - since < seconds


@pytest.mark.root
def test_a_port_hangs_on_what_it_is_given(name: str) -> None:
    """A tap, which has no namespace to enter, and a namespace that comes later; then on nothing of these again."""
    nestnet("up", str(ROOT / "examples/workloads.yaml"), "--name", name)
    assert "vm1" in nestnet("exec", "m1", "--lab", name, "--", "ip", "-br", "link").stdout.decode()
    ran = nestnet("exec", "office/vm", "--lab", name, "true", code=1)
    assert "port office/vm hangs on tap vm1 of m1: there is no namespace to enter" in ran.stderr.decode()
    shown = nestnet("capture", "office/vm", "--lab", name, "--help").stdout
    assert b"tcpdump" in shown
    blue = f"{name}-blue"
    try:
        late = nestnet("attach", "office/app", "--netns", blue, "--lab", name, "--timeout", "1", code=7)
        assert f"netns {blue}: there is none: `ip netns add {blue}` makes it" in late.stderr.decode()
        assert f"netns {blue}: there is none" in nestnet("status", "--lab", name, code=1).stdout.decode()
        netns.create(blue)
        nestnet("attach", "office/app", "--netns", blue, "--lab", name)
        assert "10.0.0.3/24" in nestnet("exec", "office/app", "--lab", name, "ip", "addr").stdout.decode()
        assert f"namespace={blue}" in nestnet("describe", "port", "office/app", "--lab", name).stdout.decode()
        nestnet("test", "--lab", name)
        nestnet("detach", "office/app", "--lab", name)
        assert (
            "eth0" not in subprocess.run(["ip", "-n", blue, "link"], capture_output=True, text=True, check=True).stdout
        )
        nestnet("test", "--lab", name)
        assert nestnet("plan", str(ROOT / "examples/workloads.yaml"), "--lab", name).stdout == b"no changes\n"
    finally:
        netns.delete(blue)


@pytest.mark.root
def test_an_agent_that_was_killed_finds_its_machine_as_it_is(name: str) -> None:
    """Traffic goes on without it, and a new one changes nothing that is right."""
    nestnet("up", str(QUICKSTART), "--name", name)
    lab = state.load(name)
    assert lab is not None
    agent = next(process for process in lab.processes if process.name == "agent-m1")
    command = (Path("/proc") / str(agent.pid) / "cmdline").read_bytes().decode().split("\0")[:-1]
    os.kill(agent.pid, signal.SIGKILL)
    assert "m1: its agent has ended" in nestnet("status", "--lab", name, code=1).stdout.decode()
    ping = ["exec", "acme/web1", "--lab", name, "--", "ping", "-q", "-c", "2", "-i", "0.2", "-W", "1", "10.0.0.3"]
    nestnet(*ping)
    with (lab.logs / "again.log").open("wb") as log:
        again = netns.spawn(
            netns.path(lab.machine("m1")), command, output=log, environment={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    try:
        _wait_for_line(lab.logs / "again.log", "2 workloads")
        nestnet(*ping)
        nestnet("test", "--lab", name)
    finally:
        again.terminate()
        assert again.wait(20) == 0


def _wait_for_line(file: Path, text: str, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while text not in file.read_text():
        assert time.monotonic() < limit, file.read_text()
        time.sleep(0.05)


@pytest.mark.root
def test_down_after_kill_9_of_everything_leaves_nothing(name: str) -> None:
    nestnet("up", str(QUICKSTART), "--name", name)
    lab = state.load(name)
    assert lab is not None
    inside = netns.spawn(netns.path(lab.machine("m2")), ["sh", "-c", "trap '' TERM; sleep 600"])
    for process in lab.processes:
        os.kill(process.pid, signal.SIGKILL)
    ran = nestnet("down", "--name", name)
    assert b"is down" in ran.stderr
    assert inside.wait(10) == -signal.SIGKILL
    assert leftovers(name) == []
    assert b"was not up" in nestnet("down", "--name", name).stderr


@pytest.mark.root
def test_down_works_without_its_own_state(name: str) -> None:
    nestnet("up", str(QUICKSTART), "--name", name)
    lab = state.load(name)
    assert lab is not None
    (state.RUN / name / "lab.json").unlink()
    nestnet("down", "--name", name)
    assert [each for each in leftovers(name) if not each.startswith("process")] == []
    assert end(lab.processes) <= 1  # the controller is in no namespace of the lab: only its state knew it


@pytest.mark.root
def test_a_failure_in_the_middle_takes_everything_away_again(name: str, tmp_path: Path) -> None:
    blocked = f"nn-{name}.m2"  # somebody has a namespace of that name already
    netns.create(blocked)
    try:
        ran = nestnet("up", str(QUICKSTART), "--name", name, code=1)
        assert "is left over" in ran.stderr.decode()
        assert netns.exists(blocked)
    finally:
        netns.delete(blocked)
    machine = "m" + "x" * 62
    file = tmp_path / "net.yaml"
    file.write_text(f"apiVersion: nestnet/v1\nmachines: {{{machine}: {{}}}}\n")
    ran = nestnet("up", str(file), "--name", name, "--timeout", "0", code=None)
    if ran.returncode:
        assert leftovers(name) == []


@pytest.mark.root
def test_long_names_and_two_labs_at_once(lab: str, name: str, tmp_path: Path) -> None:
    machine = "a" * 63
    file = tmp_path / "net.yaml"
    file.write_text(
        "apiVersion: nestnet/v1\n"
        f"machines: {{{machine}: {{mtu: 9000}}, m2: {{address: 203.0.113.9}}}}\n"
        "networks:\n"
        "  n:\n"
        "    segments: {s: {cidr: [10.0.0.0/24, 'fd00::/64']}}\n"
        f"    ports: {{a: {{segment: s, host: {machine}}}, b: {{segment: s, host: m2}}}}\n"
        "checks:\n"
        "  - {from: n/a, to: n/b, send: udp/9, expect: allow}\n"
        "  - {from: n/b, to: n/a, send: icmp, expect: allow}\n"
    )
    nestnet("up", str(file), "--name", name)
    nestnet("test", "--lab", name)
    nestnet("test", "--lab", lab)
    ran = nestnet("get", "ports", code=1)
    assert b"several labs are up" in ran.stderr


@pytest.mark.root
def test_down_of_nothing_is_no_failure() -> None:
    assert nestnet("down", "--name", f"t-{uuid.uuid4().hex[:8]}").returncode == 0


@pytest.mark.root
def test_a_wrong_file_makes_nothing(tmp_path: Path, name: str) -> None:
    file = tmp_path / "net.yaml"
    file.write_text("apiVersion: nestnet/v1\nmachines: {m1: {}}\nnetworks: {a: {segments: {s: {cidr: 10.0.0.1/24}}}}\n")
    ran = nestnet("up", str(file), "--name", name, code=1)
    assert ran.stderr.decode().startswith(f"{file}:3:31: host_bits:"), ran.stderr
    assert leftovers(name) == []
    file.write_text("apiVersion: nestnet/v1\n")
    assert b"there is no machine" in nestnet("up", str(file), "--name", name, code=1).stderr
    assert leftovers(name) == []
