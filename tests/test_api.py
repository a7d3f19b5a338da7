"""The API: a real controller process on a unix socket, and the real client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nestnet.api.client import Client
from nestnet.model.errors import Ambiguous, Conflict, Exhausted, Invalid, NestnetError, NotFound, Stale, Unreachable

SERVE = (
    "import sys; from pathlib import Path; from nestnet.api.server import serve; serve(Path(sys.argv[1]), sys.argv[2])"
)


class Controller:
    """A controller process with a folder of its own."""

    def __init__(self, folder: Path, code: str = SERVE) -> None:
        self.code = code
        self.db = folder / "store.db"
        self.socket = folder / "api.sock"
        self.url = f"unix:{self.socket}"
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-c", self.code, str(self.db), self.url]
            self.process = subprocess.Popen(command, stderr=log, cwd=Path(__file__).parent.parent)
        deadline = time.monotonic() + 30
        while True:
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(self.socket))
                return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def stop(self, how: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(20)


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    made = Controller(tmp_path)
    made.start()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.stop(signal.SIGKILL)


@pytest.fixture
def client(controller: Controller) -> Iterator[Client]:
    with Client(controller.url) as made:
        for place in (1, 2):
            made.join(f"m{place}", f"192.0.2.{place}")
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One controller for tests that change nothing."""
    made = Controller(tmp_path_factory.mktemp("shared"))
    made.start()
    with Client(made.url) as client:
        client.join("m1", "192.0.2.1")
        yield client
    made.stop(signal.SIGKILL)


def manifest(**networks: Any) -> dict[str, Any]:
    return {"apiVersion": "nestnet/v1", "networks": networks}


def network(ports: int = 1, **more: Any) -> dict[str, Any]:
    made = {f"p{i}": {"segment": "s", "host": "m1", "groups": ["g"]} for i in range(ports)}
    return {"segments": {"s": {"cidr": "10.0.0.0/16"}}, "ports": made, **more}


def raw(client: Client, method: str, path: str, **more: Any) -> httpx2.Response:
    return client._http.request(method, path, **more)


# Applying and reading


def test_an_apply_can_be_read_back(client: Client) -> None:
    plan = client.plan(manifest(n=network()))
    assert [(c["op"], c["kind"], c["path"], c["pointer"]) for c in plan["changes"]] == [
        ("+", "network", "n", "/networks/n"),
        ("+", "segment", "n/s", "/networks/n/segments/s"),
        ("+", "port", "n/p0", "/networks/n/ports/p0"),
    ]
    assert list(client.list("network")) == []
    applied = client.apply(manifest(n=network()))
    assert {**applied["plan"], "etag": plan["etag"]} == plan
    assert client.apply(manifest(n=network()))["revision"] == applied["revision"] == client.status()["revision"]
    port = client.get("port", "n/p0")
    assert client.get("port", port["id"]) == port
    assert (port["path"], port["machine"], port["addresses"], port["mtu"]) == ("n/p0", "m1", ["10.0.0.2/16"], 1450)
    assert client.delete("network", "n", cascade=True)["revision"] == applied["revision"] + 1
    assert list(client.list("port")) == []


def test_a_list_has_pages(client: Client) -> None:
    client.apply(manifest(n=network(2500)))
    assert len(list(client.list("port", network="n"))) == 2500
    page = raw(client, "GET", "/v1/ports", params={"limit": 2}).json()
    assert (page["apiVersion"], page["kind"], len(page["items"])) == ("nestnet/v1", "PortList", 2)
    following = raw(client, "GET", "/v1/ports", params={"limit": 2, "cursor": page["next"]}).json()
    assert [port["name"] for port in page["items"] + following["items"]] == ["p0", "p1", "p2", "p3"]


def test_what_an_agent_says_can_be_read(client: Client) -> None:
    client.apply(manifest(n=network()))
    port = client.get("port", "n/p0")
    client.report("m1", 3, ["no NIC"], {str(port["row"]): {"state": "up"}})
    assert client.get("port", "n/p0")["attachment"] == {"state": "up"}
    client.report("m1", 4)
    (first, second) = client.status()["machines"]
    assert (first["name"], first["realised"], first["problems"], second["realised"]) == ("m1", 4, [], None)
    assert first["reported"] < 10
    assert client.get("port", "n/p0")["attachment"] == {"state": "up"}


def test_a_link_is_taken_down_and_up(client: Client) -> None:
    routers = {"a": {"segments": ["s"]}, "b": {}}
    client.apply(manifest(n=network(routers=routers, links={"ab": {"between": ["a", "b"]}})))
    link = client.get("link", "n/ab")
    assert (link["between"], link["cost"], link["up"]) == (["a", "b"], 1, True)
    revision = client.status()["revision"]
    told = client.set_link("n/ab", False)
    down = {**link, "up": False, "etag": told["link"]["etag"]}
    assert told == {"revision": revision + 1, "token": told["token"], "machines": ["m1"], "link": down}
    assert {**client.set_link(link["id"], False), "token": told["token"]} == told, "twice is once"
    assert [one["up"] for one in client.list("link", network="n")] == [False]
    with pytest.raises(Conflict) as used:
        client.delete("router", "n/b")
    assert used.value.dependants == ("link n/ab",)
    assert client.delete("link", "n/ab")["revision"] == revision + 2
    client.delete("router", "n/b")


def test_a_port_is_attached_and_detached(client: Client) -> None:
    client.apply(manifest(n=network()))
    [port, *_] = client.list("port", network="n")
    assert port["attach"] is None
    revision = client.status()["revision"]
    told = client.set_attach(port["path"], {"tap": "vm1"})
    now = {**port, "attach": {"tap": "vm1"}, "etag": told["port"]["etag"]}
    assert told == {"revision": revision + 1, "token": told["token"], "machines": [port["machine"]], "port": now}
    assert {**client.set_attach(port["id"], {"tap": "vm1"}), "token": told["token"]} == told, "twice is once"
    with pytest.raises(Invalid) as refused:
        client.set_attach(port["path"], {"tap": "vm1", "netns": "blue"})
    assert [problem.pointer for problem in refused.value.problems] == ["/attach/tap"]
    with pytest.raises(Stale, match=r"attach null became \{\"tap\": \"vm1\"\}"):
        client.set_attach(port["path"], {}, etag=port["etag"])
    assert client.set_attach(port["path"], {})["port"]["attach"] is None


# Errors


def test_every_error_has_the_class_it_had(client: Client) -> None:
    client.apply(manifest(n=network(), m=network()))
    with pytest.raises(NotFound, match=r"port n/p00 does not exist; did you mean n/p0\?"):
        client.get("port", "n/p00")
    with pytest.raises(Ambiguous) as many:
        client.get("port", "p0")
    assert many.value.candidates == ("m/p0", "n/p0")
    with pytest.raises(Conflict) as used:
        client.delete("machine", "m1")
    assert (used.value.code, used.value.dependants) == ("in_use", ("port n/p0", "port m/p0"))
    assert not isinstance(used.value, Exhausted)
    with pytest.raises(Invalid) as wrong:
        client.apply(manifest(n={"ports": {"p": {"segment": "x", "host": "m3"}}}))
    assert {(p.code, p.pointer) for p in wrong.value.problems} == {
        ("missing_segment", "/networks/n/ports/p/segment"),
        ("missing_machine", "/networks/n/ports/p/host"),
    }


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/ports?foo=1", None, 422, "unknown_key"),
        ("GET", "/v1/status?x", None, 422, "unknown_key"),
        ("GET", "/v1/machines?network=n", None, 422, "unknown_key"),
        ("GET", "/v1/ports?limit=0", None, 422, "out_of_range"),
        ("GET", "/v1/ports?limit=9999", None, 422, "out_of_range"),
        ("GET", "/v1/ports?cursor=x", None, 422, "bad_value"),
        ("GET", "/v1/ports?network=nope", None, 404, "not_found"),
        ("GET", "/v1/ports/nope", None, 404, "not_found"),
        ("GET", "/v1/ports/%00", None, 404, "not_found"),
        ("GET", "/v1/nope", None, 404, "no_route"),
        ("PATCH", "/v1/status", None, 405, "no_method"),
        ("POST", "/v1/apply", b"", 422, "wrong_type"),
        ("POST", "/v1/apply", b"\xff", 422, "wrong_type"),
        ("POST", "/v1/apply", b"[]", 422, "missing_key"),
        ("POST", "/v1/apply", b'{"manifest": {}, "prun": true}', 422, "unknown_key"),
        ("POST", "/v1/apply", b'{"manifest": {}, "manifest": {}}', 422, "duplicate_key"),
        ("POST", "/v1/plan", b'{"manifest": {"networks": {"a": {"mtu": NaN}}}}', 422, "wrong_type"),
        ("POST", "/v1/plan", b'{"manifest": ' + b"[" * 100_000, 422, "too_deep"),
        ("POST", "/v1/plan", b'{"manifest": {"x": ' + b"9" * 5000 + b"}}", 422, "out_of_range"),
        ("POST", "/v1/machines", b'{"name": "a"}', 422, "missing_key"),
        ("POST", "/v1/machines", b'{"name": "A_", "address": "192.0.2.9"}', 422, "bad_name"),
        ("POST", "/v1/machines", b'{"name": "a", "address": "127.0.0.1"}', 422, "reserved_address"),
        ("POST", "/v1/machines", b'{"name": "a", "address": "192.0.2.1"}', 409, "duplicate_address"),
        ("PUT", "/v1/machines/m1/status", b'{"revision": -1}', 422, "out_of_range"),
        ("PUT", "/v1/machines/nope/status", b'{"revision": 1}', 404, "not_found"),
        ("GET", "/v1/feed?machine=nope", None, 404, "not_found"),
        ("PATCH", "/v1/links/n/nope", b'{"up": true}', 404, "not_found"),
        ("PATCH", "/v1/ports/n/nope", b'{"attach": {}}', 404, "not_found"),
        ("PATCH", "/v1/ports/n/nope", b"{}", 422, "missing_key"),
        ("PATCH", "/v1/ports/n/nope", b'{"attach": null}', 422, "wrong_type"),
        ("PATCH", "/v1/ports/n/nope", b'{"attach": {"tap": "a b"}}', 422, "bad_name"),
        ("PATCH", "/v1/ports/n/nope", b'{"attach": {"tap": "a", "netns": "b"}}', 422, "bad_attach"),
        ("PATCH", "/v1/ports/n/nope", b'{"attach": {"pid": 1}}', 422, "unknown_key"),
        ("PATCH", "/v1/ports/n/nope", b'{"attach": {}, "enabled": true}', 422, "bad_value"),
        ("PATCH", "/v1/ports/n/nope", b'{"enabled": 1}', 422, "bad_value"),
        ("PATCH", "/v1/ports/n/nope", b'{"enabled": null}', 422, "missing_key"),
        ("PATCH", "/v1/networks/nope", b'{"enabled": true}', 404, "not_found"),
        ("PATCH", "/v1/networks/nope", b'{"enabled": "yes"}', 422, "bad_value"),
        ("PATCH", "/v1/networks/nope", b"{}", 422, "missing_key"),
        ("PATCH", "/v1/links/n/nope", b'{"up": "yes"}', 422, "bad_value"),
        ("PATCH", "/v1/links/n/nope", b'{"up": true, "cost": 5}', 422, "unknown_key"),
        ("PATCH", "/v1/links/n/nope", b"{}", 422, "missing_key"),
        ("POST", "/v1/plan", b"x" * (33 * 1024 * 1024), 413, "too_large"),
        ("POST", "/v1/machines", b"x" * (33 * 1024 * 1024), 413, "too_large"),
    ],
)
def test_the_shape_of_every_error(shared: Client, method: str, path: str, body: Any, status: int, code: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = raw(shared, method, path, content=body, headers=headers)
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["status"]) == (status, status)
    assert {"type", "title", "detail", "code"} <= problem.keys()
    if "problems" in problem:
        assert [one["code"] for one in problem["problems"]] == [code]
    else:
        assert problem["code"] == code


def test_a_key_is_used_once(client: Client) -> None:
    first = client.apply(manifest(n=network()), key="k")
    client.delete("network", "n", cascade=True)
    assert client.apply(manifest(n=network()), key="k") == first
    with pytest.raises(Conflict, match="used for another request"):
        client.apply(manifest(n=network(2)), key="k")


def test_the_openapi_document_names_everything(shared: Client) -> None:
    document = raw(shared, "GET", "/v1/openapi.json").json()
    assert {"/v1/ports", "/v1/ports/{reference}", "/v1/apply", "/v1/feed", "/v1/trace"} <= document["paths"].keys()
    names = [one["operationId"] for path in document["paths"].values() for one in path.values()]
    assert len(names) == len(set(names))
    for path in document["paths"].values():
        for one in path.values():
            assert one.get("summary"), one
    text = json.dumps(document)
    assert text.count('"$ref"') == sum(
        text.count(f'"#/components/schemas/{n}"') for n in document["components"]["schemas"]
    )


# The feed


def test_a_feed_follows_and_resumes(client: Client, controller: Controller) -> None:
    with Client(controller.url) as watcher:
        feed = watcher.feed("m1")
        first = next(feed)
        assert first["snapshot"]
        assert [row["kind"] for row in first["rows"]] == ["machine", "machine"]
        applied = client.apply(manifest(n=network()))
        second = next(feed)
        assert (second["snapshot"], second["revision"]) == (False, applied["revision"])
        assert {row["kind"] for row in second["rows"]} == {"network", "segment", "port"}
        begun = time.monotonic()
        assert set(next(feed)) == {"revision", "token", "store", "confirmed"}
        assert time.monotonic() - begun < 7
    controller.stop()
    controller.start()
    with Client(controller.url) as watcher:
        client.delete("port", "n/p0")
        (line,) = [next(watcher.feed("m1", second["token"]))]
        assert not line["snapshot"]
        assert all(row["value"] is None for row in line["rows"])
    with Client(controller.url) as watcher:
        assert next(watcher.feed("m1", "made-up"))["snapshot"]


def test_a_machine_hears_nothing_of_others(client: Client, controller: Controller) -> None:
    with Client(controller.url) as watcher:
        feed = watcher.feed("m2")
        token = next(feed)["token"]
        applied = client.apply(manifest(n=network()))
        line = next(feed)
        assert "rows" not in line
        assert line["revision"] == applied["revision"]
        assert line["token"] != token


def test_two_hundred_feeds_cost_nothing_and_all_hear(client: Client, controller: Controller) -> None:
    heard: list[int] = []
    ready = threading.Barrier(201)

    def watch() -> None:
        with Client(controller.url) as watcher:
            feed = watcher.feed("m1")
            next(feed)
            ready.wait(60)
            heard.append(next(line for line in feed if line.get("rows"))["revision"])

    threads = [threading.Thread(target=watch) for _ in range(200)]
    for thread in threads:
        thread.start()
    ready.wait(60)
    assert controller.process is not None
    before = _cpu(controller.process.pid)
    time.sleep(2)
    assert _cpu(controller.process.pid) - before < 1.0
    revision = client.apply(manifest(n=network()))["revision"]
    for thread in threads:
        thread.join(30)
    assert heard == [revision] * 200


def _cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# The process


def test_the_socket_is_private_and_goes(controller: Controller) -> None:
    assert stat.S_IMODE(controller.socket.stat().st_mode) == 0o600
    with Client(controller.url, patience=0) as client:
        assert client.status()["revision"] == 0
        assert controller.stop() == 0
        assert not controller.socket.exists()
        with pytest.raises(Unreachable):
            client.status()


ENDLESS = {
    "header": (b"GET /v1/ports HTTP/1.1\r\nHost: x\r\nX: ", b"x" * 4096),
    "headers": (b"GET /v1/ports HTTP/1.1\r\nHost: x\r\n", b"X: x\r\n" * 700),
    "path": (b"GET /v1/", b"x" * 4096),
    "trailer": (b"POST /v1/plan HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"x" * 4096),
    "trailers": (b"POST /v1/plan HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: x\r\n" * 700),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_head_has_an_end(client: Client, controller: Controller, what: str) -> None:
    """Nobody's memory is filled by what comes before a request is whole, or after its body."""
    first, more = ENDLESS[what]
    with connected(controller) as channel:
        channel.sendall(first)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            channel.sendall(more * 1000)
    assert client.status()["machines"], "it is there for others"


def test_requests_come_one_after_another(controller: Controller) -> None:
    """Several that are sent at once are answered in order; one with two lengths is none."""
    ask = b"GET /v1/%s HTTP/1.1\r\nHost: x\r\n%s\r\n"
    with connected(controller) as channel:
        channel.sendall(ask % (b"status", b"") + ask % (b"nothing", b"") + ask % (b"ports", b"Connection: close\r\n"))
        said = b"".join(iter(lambda: channel.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200", b"404", b"200"]
    with connected(controller) as channel:
        two = b"POST /v1/plan HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        channel.sendall(two + b"0\r\n\r\nGET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"".join(iter(lambda: channel.recv(65536), b"")).startswith(b"HTTP/1.1 400")


@contextlib.contextmanager
def connected(controller: Controller) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(20)
        channel.connect(str(controller.socket))
        yield channel


def test_sigterm_ends_feeds_and_leaves_at_once(client: Client, controller: Controller) -> None:
    with Client(controller.url) as watcher:
        feed = watcher.feed("m1")
        next(feed)
        begun = time.monotonic()
        assert controller.stop() == 0
        assert time.monotonic() - begun < 3
        with pytest.raises(Unreachable):
            list(feed)


def test_a_second_controller_is_refused(controller: Controller) -> None:
    command = [sys.executable, "-c", SERVE, str(controller.db), controller.url + "2"]
    other = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, cwd=Path(__file__).parent.parent
    )
    assert other.returncode == 1
    assert "another controller runs on" in other.stderr


@pytest.mark.parametrize("listen", ["http://0.0.0.0:8000", "http://192.0.2.1:8000", "ftp://127.0.0.1:1", "x", ""])
def test_only_loopback_is_listened_on_without_tls(tmp_path: Path, listen: str) -> None:
    from nestnet.api.server import _listening

    with pytest.raises(Invalid, match="cannot listen on"), _listening([listen], None):
        pass


def test_kill_9_loses_nothing_that_was_acknowledged(client: Client, controller: Controller) -> None:
    """I3: killed in the middle of applies, again and again."""
    acknowledged: dict[str, int] = {}
    stopping = threading.Event()

    def write(place: int) -> None:
        with Client(controller.url) as mine:
            turn = 0
            while not stopping.is_set():
                name = f"n{place}-{turn}"
                try:
                    acknowledged[name] = mine.apply(manifest(**{name: network(20)}), key=name)["revision"]
                    turn += 1
                except NestnetError:
                    continue  # Asked again with the same key until there is an answer.

    threads = [threading.Thread(target=write, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        before, limit = len(acknowledged), time.monotonic() + 60
        while len(acknowledged) < before + 3:
            assert time.monotonic() < limit, acknowledged
            time.sleep(0.01)
        controller.stop(signal.SIGKILL)
        controller.start()
    stopping.set()
    for thread in threads:
        thread.join(60)
    controller.stop(signal.SIGKILL)
    controller.start()
    with Client(controller.url) as fresh:
        networks = {one["name"] for one in fresh.list("network")}
        ports = [one["network"] for one in fresh.list("port")]
    assert len(acknowledged) > 4
    assert acknowledged.keys() <= networks
    assert all(ports.count(name) == 20 for name in networks), "half of an apply is visible"
    assert len(set(acknowledged.values())) == len(acknowledged), "two applies have one revision"
