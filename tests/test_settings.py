"""How the processes are told what to do: files in /etc/nestnet, options, units; and contexts of people."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_access import Secured
from test_api import manifest

from nestnet.api.client import Client
from nestnet.cli import settings
from nestnet.cli.settings import AgentSettings, ControllerSettings
from nestnet.model.errors import Invalid, NotFound

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "packaging/systemd"


def test_the_examples_of_files_say_what_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have commented out is what is without; uncommented, everything is understood."""
    monkeypatch.setattr(settings, "FOLDER", ROOT / "packaging/etc")
    told = settings.read(ControllerSettings, None, {})
    assert told == ControllerSettings(listen=(*ControllerSettings().listen, "https://[::]:7443"), group="nestnet")
    agent = settings.read(AgentSettings, None, {"machine": "m2", "pins": None})
    assert (agent.machine, agent.pins, agent.state) == ("m2", AgentSettings().pins, "/var/lib/nestnet-agent")


@pytest.mark.parametrize("name", ["controller", "agent"])
def test_what_is_commented_out_is_understood(name: str, tmp_path: Path) -> None:
    text = (ROOT / f"packaging/etc/{name}.toml").read_text()
    uncommented = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    (tmp_path / "all.toml").write_text(uncommented)
    kind = ControllerSettings if name == "controller" else AgentSettings
    found = settings.read(kind, tmp_path / "all.toml", {})
    standard = kind()
    for line in text.splitlines():
        if line.startswith("# ") and " = " in line and "names" not in line and "metrics" not in line:
            key = line.removeprefix("# ").partition(" = ")[0]
            if key != "workloads":
                assert getattr(found, key) == getattr(standard, key)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("stat = 'x'", "unknown_key", "nobody reads stat; did you mean state?"),
        ("banana = 1", "unknown_key", "there are state, listen, group"),
        ("state = 7", "wrong_type", "state is a text"),
        ("listen = 'unix:/x'", "wrong_type", "listen is a list of texts"),
        ("listen = [1]", "wrong_type", "listen is a list of texts"),
        ("certificate_hours = 0", "wrong_type", "certificate_hours is a number above 0"),
        ("certificate_hours = true", "wrong_type", "certificate_hours is a number above 0"),
        ("state = ", "bad_value", "this is no TOML"),
    ],
)
def test_a_file_that_says_what_nobody_understands(text: str, code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "controller.toml").write_text(text)
    with pytest.raises(Invalid) as error:
        settings.read(ControllerSettings, tmp_path / "controller.toml", {})
    (problem,) = error.value.problems
    assert problem.code == code
    assert message in problem.message
    assert str(tmp_path / "controller.toml") in problem.pointer


def test_a_file_that_was_named_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        settings.read(AgentSettings, tmp_path / "none.toml", {})


def test_what_join_writes_is_what_the_agent_reads(tmp_path: Path) -> None:
    wanted = AgentSettings(controller="https://[2001:db8::1]:7443", machine="m1", state='/var/a "quoted" place')
    settings.write(wanted, tmp_path / "new" / "agent.toml")
    assert settings.read(AgentSettings, tmp_path / "new" / "agent.toml", {}) == wanted


@pytest.mark.parametrize("unit", sorted(path.name for path in UNITS.iterdir()))
def test_units_are_as_systemd_wants_them(unit: str, tmp_path: Path) -> None:
    """systemd-analyze verify has nothing to say, with the program where it is here."""
    program = Path(sys.executable).parent / "nestnet"
    text = (UNITS / unit).read_text().replace("/usr/local/bin/nestnet", str(program))
    (tmp_path / unit).write_text(text)
    assert shutil.which("systemd-analyze"), "apt-get install systemd"
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        command = [sys.executable, "-m", "nestnet", "controller"]
        command += ["--listen", f"unix:{tmp_path}/api.sock", "--state", str(tmp_path / "state")]
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            try:
                assert notify.recv(100) == b"READY=1"
                with Client(f"unix:{tmp_path}/api.sock") as client:
                    assert client.status()["revision"] == 0
            finally:
                process.terminate()
        assert process.returncode == 0
    assert stat.S_IMODE((tmp_path / "state/store.db").stat().st_mode) == 0o600


@pytest.mark.root  # Labs that are up beside it would be meant, too.
def test_contexts_say_which_controller_is_meant(tmp_path: Path) -> None:
    """Over TLS, by a token, as somebody who has nothing else of the installation."""
    controller = Secured(tmp_path)
    controller.start()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NESTNET")}
    environment |= {"XDG_CONFIG_HOME": str(tmp_path / "config")}

    def nestnet(*arguments: str, stdin: str = "", code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "nestnet", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment | more,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return done

    try:
        at_home = {"NESTNET_CONTROLLER": controller.url}
        net = {"segments": {"s": {"cidr": "10.0.0.0/24"}}, "tenant": "acme"}
        with Client(controller.url) as operator:
            operator.apply(manifest(net=net, other=net | {"tenant": "rival"}))
        token = nestnet("token", "create", "ci", "--tenant", "acme=reader", "--ttl", "1h", **at_home).stdout
        assert "nnt_" in token
        for wrong in (["--tenant", "acme=king"], ["--tenant", "acme", "--operator"], [], ["--operator", "--ttl", "1y"]):
            assert "nestnet: " in nestnet("token", "create", "x", *wrong, code=2, **at_home).stderr
        assert "ci " in nestnet("get", "tokens", **at_home).stdout
        assert json.loads(nestnet("get", "token", "ci", "-o", "json", **at_home).stdout)["tenants"] == {
            "acme": "reader"
        }
        nestnet("context", "add", "prod", "--controller", controller.https, "--token-file", "-", stdin=token)
        assert nestnet("get", "networks", "-o", "name").stdout == "net\n"
        assert "403" not in nestnet("delete", "network", "net", code=1).stderr
        assert "may not do this" in nestnet("delete", "network", "net", code=1).stderr
        nestnet("context", "add", "prod", "--controller", controller.https, "--token-file", "-", stdin=token, code=1)
        nestnet("context", "add", "open", "--controller", controller.https, stdin="", code=8)
        for secret in (tmp_path / "config/nestnet").glob("*.toml"):
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert "*  prod  https" in nestnet("context", "list").stdout
        assert "did you mean prod?" in nestnet("get", "networks", "--context", "prd", code=1).stderr
        by_environment = {"NESTNET_CONTROLLER": controller.https, "NESTNET_TOKEN": token.strip()}
        (tmp_path / "authority.pem").write_text(Client(controller.url).authority())
        by_environment["NESTNET_AUTHORITY"] = str(tmp_path / "authority.pem")
        nestnet("context", "remove", "prod")
        assert nestnet("get", "networks", "-o", "name", **by_environment).stdout == "net\n"
        nestnet("delete", "token", "ci", **at_home)
        assert "was revoked" in nestnet("get", "networks", code=1, **by_environment).stderr
        nestnet("context", "use", "prod", code=1)
    finally:
        controller.stop()
