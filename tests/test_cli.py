"""The command: help, exit codes, where it finds its controller, and what it prints, to the letter.

The controller is the real process with a store of its own; no machine runs, so nothing here needs root.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from nestnet.api.client import Client
from nestnet.cli.app import app
from nestnet.cli.plans import text as plan_text
from nestnet.model.errors import Unreachable

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    command.name or (command.callback.__name__ if command.callback else "") for command in app.registered_commands
]
SLOW = {"rich", "pydantic", "pyroute2", "sqlalchemy", "numpy", "yaml", "httpx2", "msgspec", "fastapi", "asyncio"}

NET = """\
apiVersion: nestnet/v1
machines: {m1: {}, m2: {}}
networks:
  acme:
    segments:
      web: {cidr: 10.0.0.0/24}
    routers:
      core: {segments: [web]}
      edge: {}
    links:
      core-edge: {between: [core, edge], cost: 10}
    ports:
      web1: {segment: web, host: m1, mac: "02:00:00:00:00:01"}
      web2: {segment: web, host: m2, mac: "02:00:00:00:00:02", groups: [blue, green]}
    policies:
      - {from: blue, to: any, allow: [tcp/80, icmp]}
"""


LINKS = "    links:\n      core-edge: {between: [core, edge], cost: 10}\n"


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    """`nestnet` with a controller, in a folder of its own."""

    url: str
    folder: Path

    def __call__(self, *arguments: str, stdin: str = "", **environment: str) -> Ran:
        env = {key: value for key, value in os.environ.items() if not key.startswith("NESTNET")}
        env |= {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | ({"NESTNET_CONTROLLER": self.url} if self.url else {})
        done = subprocess.run(
            [sys.executable, "-m", "nestnet", *arguments],
            input=stdin,
            capture_output=True,
            check=False,
            text=True,
            cwd=self.folder,
            env=env | environment,
            timeout=120,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    def file(self, text: str, name: str = "net.yaml") -> str:
        (self.folder / name).write_text(text)
        return name


@pytest.fixture
def nestnet(tmp_path: Path) -> Iterator[Command]:
    url = f"unix:{tmp_path}/api.sock"
    with (tmp_path / "log").open("wb") as log:
        controller = subprocess.Popen(
            [sys.executable, "-m", "nestnet", "controller", "--listen", url, "--state", str(tmp_path / "state")],
            cwd=ROOT,
            stderr=log,
        )
    try:
        limit = time.monotonic() + 30
        with Client(url) as client:
            while True:
                try:
                    client.status()
                    break
                except Unreachable:
                    assert controller.poll() is None, (tmp_path / "log").read_text()
                    assert time.monotonic() < limit
                    time.sleep(0.05)
            client.join("m1", "192.0.2.1")
            client.join("m2", "192.0.2.2")
        yield Command(url, tmp_path)
    finally:
        controller.terminate()
        assert controller.wait(20) == 0


# ---- help


def test_help_imports_nothing_that_takes_long() -> None:
    code = "import sys\nfrom nestnet.cli.__main__ import main\ntry: main()\nexcept SystemExit: print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Commands:" in ran.stdout
    assert set(ran.stdout.split()) & SLOW == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_in_help_and_manual(command: str) -> None:
    ran = Command("", ROOT)(command, "--help")
    assert ran.code == 0
    assert f"Usage: nestnet {command}" in ran.out
    manual = (ROOT / "docs/cli.md").read_text()
    section = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", manual, re.DOTALL | re.MULTILINE)
    assert section, f"docs/cli.md has no section {command}"
    options = set(re.findall(r"--[a-z][a-z-]+", ran.out)) - {
        "--help",
        "--lab",
        "--context",
        "--wait",
        "--output",
        "--network",
    }
    missing = {option for option in options if option not in section[1]} - {"--write", "--count"}
    assert not missing, f"docs/cli.md, {command}: {missing}"


def test_no_line_of_the_list_of_commands_is_cut_off() -> None:
    assert "..." not in Command("", ROOT)("--help").out.partition("Commands:")[2]


# ---- exit codes


EXIT_CODES: list[tuple[list[str], int]] = [
    (["version"], 0),
    (["get", "ports"], 0),
    (["plan", "net.yaml"], 0),
    (["plan", "net.yaml", "--exit-code"], 3),
    (["plan", "empty.yaml", "--exit-code"], 0),
    (["apply", "net.yaml", "--timeout", "0.2"], 7),
    (["apply", "net.yaml", "--no-wait"], 0),
    (["apply", "wrong.yaml"], 1),
    (["apply", "absent.yaml"], 1),
    (["get", "port", "acme/none"], 1),
    (["get", "cucumbers"], 2),
    (["delete", "port", "acme/none"], 1),
    (["exec", "m1", "--", "true"], 1),
    (["link", "down", "acme/core-edge", "--timeout", "0.2"], 7),
    (["link", "up", "acme/core-edge", "--no-wait"], 0),
    (["link", "up", "acme/none"], 1),
    (["link", "sideways", "acme/core-edge"], 2),
    (["get"], 2),
    (["frobnicate"], 2),
    (["get", "ports", "-o", "html"], 2),
    (["trace", "a/b", "10.0.0.1", "--tcp", "1", "--udp", "2"], 2),
    (["trace", "a/b", "10.0.0.1", "--tcp", "99999"], 2),
    (["get", "ports", "--lab", "no-such-lab"], 1),
    (["status"], 1),
]


def test_exit_codes(nestnet: Command) -> None:
    nestnet.file(NET)
    nestnet.file("apiVersion: nestnet/v1\n", "empty.yaml")
    nestnet.file("apiVersion: nestnet/v1\nnetwork: {}\n", "wrong.yaml")
    for arguments, code in EXIT_CODES:
        ran = nestnet(*arguments)
        assert ran.code == code, (arguments, ran)
        # Data on stdout, the rest on stderr: a failure leaves stdout empty, but for what a status is.
        assert not (code in (1, 2, 8) and arguments != ["status"] and ran.out), (arguments, ran)
        assert "Traceback" not in ran.err


def test_no_controller_is_exit_8(tmp_path: Path) -> None:
    ran = Command(f"unix:{tmp_path}/none.sock", tmp_path)("get", "ports")
    assert ran.code == 8
    assert ran.err.startswith(f"nestnet: no controller answers at unix:{tmp_path}/none.sock")


# ---- what it prints


def test_a_plan_and_its_files_place(nestnet: Command) -> None:
    nestnet.file(NET)
    assert nestnet("plan", "net.yaml").out == dedent("""\
        + network acme
        + segment acme/web
        + router acme/core
        + router acme/edge
        + link acme/core-edge
        + port acme/web1
        + port acme/web2
        + policy acme/blue -> any allow tcp/80,icmp

        8 to add, 0 to change, 0 to delete
        """)
    applied = nestnet("apply", "net.yaml", "--no-wait")
    assert re.fullmatch(r"revision \d+ stored in \d+\.\d\d s\n", applied.err)
    assert nestnet("plan", "net.yaml").out == "no changes\n"

    nestnet.file(NET.replace("cost: 10", "cost: 20"))
    assert nestnet("plan", "net.yaml").out == dedent("""\
        ~ link acme/core-edge  cost: 10 -> 20

        disturbs
          acme/core-edge: cost 10 becomes 20, routes change

        0 to add, 1 to change, 0 to delete
        """)
    nestnet.file(NET.replace("host: m2", "host: m1").replace("      edge: {}\n", "").replace(LINKS, "    links: {}\n"))
    assert nestnet("plan", "net.yaml").out == dedent("""\
        ~ port acme/web2  host: m2 -> m1
        - link acme/core-edge
        - router acme/edge

        disturbs
          acme/web2: host m2 becomes m1, its connections end
          acme/core-edge: goes down, routes change
          acme/edge: routes change

        0 to add, 1 to change, 2 to delete
        """)
    plan = json.loads(nestnet("plan", "net.yaml", "-o", "json").out)
    assert (plan["apiVersion"], plan["kind"], len(plan["changes"])) == ("nestnet/v1", "Plan", 3)
    assert nestnet("plan", "net.yaml", "-o", "name").out == "acme/web2\nacme/core-edge\nacme/edge\n"


def test_tables(nestnet: Command) -> None:
    nestnet("apply", nestnet.file(NET), "--no-wait")
    assert nestnet("get", "ports").out == dedent("""\
        PATH       SEGMENT  ADDRESS      MAC                HOST  GROUPS
        acme/web1  web      10.0.0.2/24  02:00:00:00:00:01  m1    -
        acme/web2  web      10.0.0.3/24  02:00:00:00:00:02  m2    blue, green
        """)
    assert nestnet("get", "machine").out == dedent("""\
        NAME  ADDRESS    MTU   REALISED
        m1    192.0.2.1  1500  -
        m2    192.0.2.2  1500  -
        """)
    assert nestnet("get", "policies").out == dedent("""\
        NETWORK  FROM  TO   ALLOW         DENY  PRIORITY
        acme     blue  any  tcp/80, icmp  -     100
        """)
    assert nestnet("get", "segments", "-o", "name").out == "acme/web\n"
    assert nestnet("get", "networks").out.splitlines()[1].split() == ["acme", "-", "the", "wire", "1450", "1"]
    assert nestnet("get", "tenants") == Ran(0, "", "no tenants\n")


def test_a_link_goes_down_and_stays_down_until_somebody_says_otherwise(nestnet: Command) -> None:
    nestnet("apply", nestnet.file(NET), "--no-wait")
    ran = nestnet("link", "down", "acme/core-edge", "--no-wait")
    assert re.fullmatch(r"link acme/core-edge is down\nrevision 4 stored in \d+\.\d\d s\n", ran.err)
    assert nestnet("get", "links").out == dedent("""\
        PATH            BETWEEN     COST  RATE  STATE
        acme/core-edge  core, edge  10    -     down
        """)
    assert nestnet("plan", "net.yaml").out == "no changes\n"
    with Client(nestnet.url) as client:
        client.report("m1", 4)
    late = nestnet("link", "down", "acme/core-edge", "--timeout", "0.2")
    assert late.code == 7
    assert "1 machines have not realised it after 0.2 s:\n  m2 has never reported" in late.err
    lines = nestnet("describe", "link", "acme/core-edge").out.splitlines()
    assert "up:          no" in lines
    nestnet.file(NET.replace("cost: 10", "cost: 10, up: true"))
    assert nestnet("plan", "net.yaml").out.startswith("~ link acme/core-edge  up: no -> yes\n")
    assert nestnet("delete", "router", "acme/edge").err == (
        "nestnet: router acme/edge is needed by link acme/core-edge\n"
    )
    assert nestnet("delete", "link", "acme/core-edge", "--no-wait").code == 0
    assert nestnet("get", "links") == Ran(0, "", "no links\n")


def test_attaching_stays_until_somebody_says_otherwise(nestnet: Command) -> None:
    nestnet("apply", nestnet.file(NET), "--no-wait")
    ran = nestnet("attach", "acme/web1", "--tap", "vm1", "--no-wait")
    assert re.fullmatch(r"port acme/web1 hangs on tap vm1 of m1\nrevision 4 stored in \d+\.\d\d s\n", ran.err)
    assert nestnet("plan", "net.yaml").out == "no changes\n"
    assert "attach:      tap=vm1" in nestnet("describe", "port", "acme/web1").out
    assert "tap=vm1" in nestnet("get", "ports", "-o", "wide").out
    for options in ((), ("--tap", "a", "--netns", "b")):
        assert nestnet("attach", "acme/web1", *options).code == 2
    assert "bad_name" in nestnet("attach", "acme/web1", "--netns", "a/b").err
    late = nestnet("attach", "acme/web1", "--netns", "blue", "--timeout", "0.2")
    assert late.code == 7
    ran = nestnet("detach", "acme/web1", "--no-wait")
    assert re.fullmatch(r"port acme/web1 is detached\nrevision 6 stored in \d+\.\d\d s\n", ran.err)


def test_rates_are_shown_as_they_are_written(nestnet: Command) -> None:
    nestnet.file(NET.replace("cost: 10", "cost: 10, rate: 1.5mbit"))
    nestnet("apply", "net.yaml", "--no-wait")
    nestnet.file(NET.replace("cost: 10", "cost: 10, rate: 2000000"))
    plan = nestnet("plan", "net.yaml").out
    assert "~ link acme/core-edge  rate: 1500kbit -> 2mbit\n" in plan
    assert "acme/core-edge: rate 1500kbit becomes 2mbit\n" in plan
    assert nestnet("get", "links").out.splitlines()[1].split()[-3:] == ["10", "1500kbit", "up"]
    assert "rate:        1500kbit" in nestnet("describe", "link", "acme/core-edge").out.splitlines()
    assert json.loads(nestnet("get", "link", "acme/core-edge", "-o", "json").out)["rate"] == 1_500_000


def test_data_for_programs(nestnet: Command) -> None:
    nestnet("apply", nestnet.file(NET), "--no-wait")
    ports = json.loads(nestnet("get", "ports", "-o", "json").out)
    assert (ports["apiVersion"], ports["kind"]) == ("nestnet/v1", "PortList")
    assert [port["path"] for port in ports["items"]] == ["acme/web1", "acme/web2"]
    one = json.loads(nestnet("get", "port", ports["items"][0]["id"], "-o", "json").out)
    assert (one["apiVersion"], one["kind"], one["path"]) == ("nestnet/v1", "Port", "acme/web1")
    assert "apiVersion: nestnet/v1\nkind: Port\n" in nestnet("get", "port", "acme/web1", "-o", "yaml").out
    status = json.loads(nestnet("status", "-o", "json").out)
    assert (status["kind"], status["well"], len(status["machines"])) == ("Status", False, 2)


def test_describe_says_everything(nestnet: Command) -> None:
    nestnet("apply", nestnet.file(NET), "--no-wait")
    lines = nestnet("describe", "port", "acme/web2").out.splitlines()
    assert "mac:         02:00:00:00:00:02" in lines
    assert "gateways:    10.0.0.1" in lines
    assert lines[lines.index("groups:") + 1 :][:2] == ["  - blue", "  - green"]


def test_names_that_are_nearly_right(nestnet: Command) -> None:
    nestnet("apply", nestnet.file(NET), "--no-wait")
    assert (
        nestnet("get", "port", "acme/wbe1").err == "nestnet: port acme/wbe1 does not exist; did you mean acme/web1?\n"
    )
    assert nestnet("get", "prot").err.endswith("did you mean port?\n")


def test_what_depends_is_named(nestnet: Command) -> None:
    nestnet("apply", nestnet.file(NET), "--no-wait")
    ran = nestnet("delete", "segment", "acme/web")
    assert ran.code == 1
    assert ran.err == ("nestnet: segment acme/web is needed by port acme/web1, port acme/web2, router acme/core\n")
    assert nestnet("delete", "port", "acme/web1", "--no-wait").code == 0
    assert nestnet("get", "ports", "-o", "name").out == "acme/web2\n"


def test_errors_of_the_file_have_its_lines_whoever_finds_them(nestnet: Command) -> None:
    here = nestnet("apply", nestnet.file(NET.replace("cidr: 10.0.0.0/24", "cidr: 10.0.0.1/24"), "here.yaml"))
    assert here.err == (
        "here.yaml:6:13: host_bits: 10.0.0.1/24 has bits set after its prefix length: write 10.0.0.0/24\n"
    ), here
    there = nestnet(
        "plan", nestnet.file(NET.replace("machines: {m1: {}, m2: {}}\n", "").replace("m2", "m9"), "there.yaml")
    )
    assert there.err.startswith("there.yaml:13:28: missing_machine: there is no machine m9"), there
    assert there.code == 1
    stdin = nestnet("plan", "-", stdin="apiVersion: nestnet/v1\nnetworks: {acme: {sgements: {}}}\n")
    assert stdin.err.startswith("<stdin>:2:19: unknown_key: 'sgements' is no key here; did you mean segments?"), stdin


def test_late_machines_are_named_with_their_problems(nestnet: Command) -> None:
    nestnet("apply", nestnet.file(NET), "--no-wait")
    with Client(nestnet.url) as client:
        client.report("m1", 2, ["port 1: no space left"])
    late = nestnet("apply", nestnet.file(NET.replace("tcp/80", "tcp/81")), "--timeout", "0.2")
    assert late.code == 7
    assert late.err.endswith(
        dedent("""\
        nestnet: revision 4 is stored, but 2 machines have not realised it after 0.2 s:
          m1 is at revision 2
            port 1: no space left
          m2 has never reported
        """)
    )


def test_packets_are_looked_at_in_a_lab_of_this_computer_and_nowhere_else(nestnet: Command) -> None:
    """Nothing that a controller tells has packets in it: no command reads them through it."""
    assert nestnet("apply", nestnet.file(NET), "--no-wait").code == 0
    for command in ("capture acme/web1", "capture m1", "exec acme/web1 -- true", "trace acme/web1 10.0.0.3 --live"):
        ran = nestnet(*command.split())
        assert (ran.code, ran.out) == (1, ""), command
        assert "only those of a lab can be entered from here" in ran.err


def test_status_begins_with_the_verdict(nestnet: Command) -> None:
    with Client(nestnet.url) as client:
        client.apply({"apiVersion": "nestnet/v1", "networks": {}})
        for machine in ("m1", "m2"):
            client.report(machine, client.status()["revision"], [], {"0": {"drops": {"not_a_member": 3}}})
    ran = nestnet("status")
    assert ran.code == 0
    assert ran.out.startswith("well: 2 of 2 machines have realised revision 2\n\nMACHINE")
    with Client(nestnet.url) as client:
        client.report("m2", 2, ["eth0 has gone"])
    ran = nestnet("status")
    assert ran.code == 1
    assert ran.out.startswith("1 problem at revision 2\n  m2: eth0 has gone\n")


def test_colours_are_for_terminals_only(nestnet: Command) -> None:
    nestnet.file(NET)
    assert "\x1b" not in nestnet("plan", "net.yaml").out
    assert "\x1b[32m+ network acme" in _on_a_terminal(nestnet, "plan", "net.yaml")
    assert "\x1b[32m" not in _on_a_terminal(nestnet, "plan", "net.yaml", NO_COLOR="1")


def _on_a_terminal(nestnet: Command, *arguments: str, **environment: str) -> str:
    command = " ".join([sys.executable, "-m", "nestnet", *arguments])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NESTNET_CONTROLLER": nestnet.url, "TERM": "xterm"} | environment
    if "NO_COLOR" not in environment:
        env.pop("NO_COLOR", None)
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        capture_output=True,
        text=True,
        cwd=nestnet.folder,
        env=env,
        check=False,
    )
    return done.stdout


def test_the_text_of_a_plan_with_nothing_in_it() -> None:
    assert plan_text({"changes": [], "disturbs": [], "machines": []}) == "no changes"


@pytest.mark.parametrize(("file", "says"), [("/dev/zero", "more than 16777216 bytes"), ("/proc/self/mem", "error")])
def test_what_has_no_end_or_cannot_be_read_is_one_message(nestnet: Command, file: str, says: str) -> None:
    ran = nestnet("plan", file)
    assert ran.code == 1
    assert says in ran.err
    assert ran.err.count("\n") == 1
