"""Networks from lines, by `POST /v1/batch` and `nestnet batch`: a real controller process, cut off, killed and asked
again; the real client."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import pytest
from killing import opened
from killing import whole as nothing_half
from test_api import Controller, manifest
from test_cli import Command
from test_retry import at_once, running

from nestnet.api.client import Client
from nestnet.api.create import LINE, PART_BYTES
from nestnet.model.errors import Conflict, Invalid, NestnetError, NotFound, Unreachable
from nestnet.store.create import PART


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    """One for all tests that do not kill it: each has networks of its own. Whatever they send, it has no fault."""
    with running(tmp_path_factory.mktemp("batch")) as made:
        with Client(made.url) as client:
            prepare(client)
        yield made
        assert "Traceback" not in made.log.read_text()


@pytest.fixture
def client(controller: Controller) -> Iterator[Client]:
    with Client(controller.url) as made:
        yield made


@pytest.fixture
def nestnet(controller: Controller, tmp_path: Path) -> Command:
    return Command(controller.url, tmp_path)


def prepare(client: Client) -> None:
    for place in (1, 2):
        client.join(f"m{place}", f"192.0.2.{place}")
    client.apply({**manifest(), "tenants": {"acme": {}}})


def line(name: str, **more: Any) -> bytes:
    spec = {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": {"a": {"segment": "lan", "host": "m1"}}}
    return json.dumps({"name": name, **spec, **more}).encode()


def lines_of(name: str, count: int) -> list[bytes]:
    """Networks NAME-1, NAME-2, ..."""
    return [line(f"{name}-{number}") for number in range(1, count + 1)]


WRONG = {"segments": {"lan": {"cidr": "10.0.0.0/33"}}}


def send(client: Client, content: Any, key: str | None = None) -> httpx2.Response:
    headers = {"Idempotency-Key": key} if key is not None else {}
    return client._http.request("POST", "/v1/batch", content=content, headers=headers)


def told(response: httpx2.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(one) for one in response.text.splitlines()]


def named(client: Client, name: str) -> list[str]:
    """The networks that are stored and called so, in their order, as often as they are there."""
    with opened(Path(client.url.removeprefix("unix:")).with_name("store.db")) as store:
        names = [one for (one,) in store.execute("SELECT name FROM network WHERE name GLOB ?", (f"{name}-*",))]
    return sorted(names, key=lambda one: int(one.rpartition("-")[2]))


def count(name: str, last: int) -> list[str]:
    return [f"{name}-{number}" for number in range(1, last + 1)]


class Sending:
    """A batch that is sent bit by bit, while what is told of it is read."""

    def __init__(self, controller: Controller, size: int, key: str, token: str | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(controller.socket))
        more = f"Authorization: Bearer {token}\r\n" if token is not None else ""
        head = f"POST /v1/batch HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\nIdempotency-Key: {key}\r\n{more}\r\n"
        self.send(head.encode())
        self._answer: http.client.HTTPResponse | None = None

    def send(self, some: bytes) -> None:
        self._socket.sendall(some)

    def hear(self) -> bytes:
        """The next line that is told; nothing after the last."""
        if self._answer is None:
            self._answer = http.client.HTTPResponse(self._socket)
            self._answer.begin()
            assert self._answer.status == 200, self._answer.read()
        return self._answer.readline()

    def close(self) -> None:
        """Leave, and wait until the controller has noticed."""
        with suppress(OSError):  # It may have been killed.
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(1 << 16):
                pass
        self._socket.close()


@contextmanager
def sending(controller: Controller, size: int, key: str, token: str | None = None) -> Iterator[Sending]:
    made = Sending(controller, size, key, token)
    try:
        yield made
    finally:
        made.close()


# ---- parts


@pytest.mark.parametrize("size", [61, 4096, 1_000_000])
def test_parts_are_of_a_thousand_lines_wherever_chunks_end(client: Client, size: int) -> None:
    name = f"chunks{size}"
    body = b"\n".join(lines_of(name, 2 * PART + 17))
    revision = client.status()["revision"]
    parts = told(send(client, (body[at : at + size] for at in range(0, len(body), size))))
    assert [part["lines"] for part in parts] == [[1, PART], [PART + 1, 2 * PART], [2 * PART + 1, 2 * PART + 17]]
    assert [part["networks"] for part in parts] == [PART, 2 * PART, 2 * PART + 17]
    assert [part["revision"] for part in parts] == [revision + 1, revision + 2, revision + 3]
    assert named(client, name) == count(name, 2 * PART + 17)
    port = client.get("port", f"{name}-1/a")
    assert (port["machine"], port["addresses"]) == ("m1", ["10.0.0.2/24"])


def test_a_part_of_long_lines_has_fewer(client: Client) -> None:
    """The controller keeps no more of a body than that."""
    lines = [line.ljust(LINE // 2) for line in lines_of("long", 2 * PART_BYTES // LINE + 3)]
    parts = told(send(client, b"\n".join(lines)))
    first = PART_BYTES // (LINE // 2)
    assert [part["lines"] for part in parts] == [[1, first], [first + 1, len(lines)]]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n  "])
def test_the_last_line_needs_no_end(client: Client, end: bytes) -> None:
    name = f"end{len(end)}-{end.count(b' ')}"
    (part,) = told(send(client, line(name) + end))
    assert part["networks"] == 1
    assert client.get("network", name)["path"] == name


@pytest.mark.parametrize("body", [b"", b"\n", b"  \r\n \n"])
def test_a_body_without_a_line_is_refused(client: Client, body: bytes) -> None:
    revision = client.status()["revision"]
    response = send(client, body)
    assert (response.status_code, response.json()["code"]) == (422, "invalid")
    assert client.status()["revision"] == revision


def test_a_blank_line_between_others_is_a_wrong_one(client: Client) -> None:
    response = send(client, b"\n".join([line("blank-1"), b" ", line("blank-3"), b"", line("blank-5")]))
    assert response.status_code == 422
    assert [one["pointer"] for one in response.json()["problems"]] == ["/2"]
    assert named(client, "blank") == []


# ---- what is wrong


def test_a_part_with_a_wrong_line_is_not_made_and_those_before_it_are(client: Client) -> None:
    lines = lines_of("third", 3 * PART + 5)
    lines[2 * PART + 16] = line("third-2017", **WRONG)
    first = told(send(client, b"\n".join(lines), "third"))
    *made, last = first
    assert [part["networks"] for part in made] == [PART, 2 * PART]
    assert last["lines"] == [2 * PART + 1, 3 * PART]
    problem = last["problem"]
    assert (problem["status"], problem["code"]) == (422, "invalid")
    assert [(one["code"], one["pointer"]) for one in problem["problems"]] == [
        ("bad_cidr", "/2017/segments/lan/cidr"),
    ]
    assert named(client, "third") == count("third", 2 * PART)
    # Mended, it goes on: those that are there are told as before.
    lines[2 * PART + 16] = line("third-2017")
    again = told(send(client, b"\n".join(lines), "third"))
    assert again[:2] == made
    assert [part["networks"] for part in again[2:]] == [3 * PART, 3 * PART + 5]
    assert named(client, "third") == count("third", 3 * PART + 5)


def test_what_is_wrong_at_once_is_an_error_like_any_other(client: Client) -> None:
    lines = lines_of("first", PART + 5)
    lines[16] = line("first-17", **WRONG)
    lines[20] = line("first-21", ports={"a": {"segment": "none", "host": "m1"}})
    for body in (lines, lines[:25]):
        response = send(client, b"\n".join(body))
        assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
        assert {one["pointer"].split("/")[1] for one in response.json()["problems"]} <= {"17", "21"}
        assert response.json()["problems"][0]["pointer"] == "/17/segments/lan/cidr"
        assert named(client, "first") == []


def test_what_is_there_already_stops_a_batch(client: Client) -> None:
    told(send(client, line("there-1500")))
    *made, last = told(send(client, b"\n".join(lines_of("there", 2 * PART))))
    assert [part["networks"] for part in made] == [PART]
    assert (last["problem"]["status"], last["problem"]["code"]) == (409, "duplicate_name")
    assert "there-1500" in last["problem"]["detail"]
    assert named(client, "there") == [*count("there", PART), "there-1500"]


@pytest.mark.parametrize("before", [0, 1, PART + 5])
@pytest.mark.parametrize("end", [b"\n" + line("after"), b""])
def test_a_line_that_is_too_long_takes_its_part_with_it(client: Client, before: int, end: bytes) -> None:
    name = f"long{before}{len(end)}"
    long = line(f"{name}-{before + 1}") + b" " * 2 * LINE
    response = send(client, b"\n".join([*lines_of(name, before), long]) + end)
    if before < PART:
        assert response.status_code == 422
        problem = response.json()
    else:
        part, last = told(response)
        assert part["networks"] == PART
        assert last["lines"] == [PART + 1, before + 1]
        problem = last["problem"]
    (one,) = problem["problems"]
    assert (one["code"], one["pointer"], one["limit"]) == ("limit_exceeded", f"/{before + 1}", LINE)
    assert named(client, name) == count(name, before // PART * PART)


def test_a_line_of_the_greatest_length_is_one(client: Client) -> None:
    longest = line("longest").ljust(LINE)
    assert told(send(client, longest + b"\n" + line("longest-2")))[0]["networks"] == 2
    assert send(client, line("longer").ljust(LINE + 1)).status_code == 422


# ---- cut off, and again


def test_a_batch_that_is_cut_off_and_sent_again_makes_each_once(controller: Controller, client: Client) -> None:
    lines = lines_of("cut", 3 * PART)
    body = b"\n".join(lines)
    revision = client.status()["revision"]
    with sending(controller, len(body), "cut") as first:
        first.send(b"\n".join(lines[: PART + PART // 2]))
        heard = first.hear()
    with sending(controller, len(body), "cut") as second:  # in the middle of the first part
        second.send(body[: len(lines[0]) * PART // 2])
    assert named(client, "cut") == count("cut", PART)
    again = send(client, body, "cut")
    assert again.content.splitlines()[0] + b"\n" == heard
    assert [part["revision"] for part in told(again)] == [revision + 1, revision + 2, revision + 3]
    assert send(client, body, "cut").content == again.content
    assert client.status()["revision"] == revision + 3
    assert named(client, "cut") == count("cut", 3 * PART)
    other = send(client, b"\n".join([line("cut-other"), *lines[1:]]), "cut")
    assert (other.status_code, other.json()["code"]) == (409, "key_reused")


def test_a_token_that_is_revoked_meanwhile_makes_no_further_part(controller: Controller, client: Client) -> None:
    client.grant(None, "acme")
    token = client.make_token("acme-batch", tenants={"acme": "owner"})["token"]
    lines = lines_of("revoked", 2 * PART)
    body = b"\n".join(lines)
    with sending(controller, len(body), "revoked", token) as sent:
        sent.send(b"\n".join(lines[:PART]) + b"\n")
        assert json.loads(sent.hear())["networks"] == PART
        client.revoke("acme-batch")
        sent.send(b"\n".join(lines[PART:]))
        last = json.loads(sent.hear())
        assert sent.hear() == b""
    assert (last["problem"]["status"], last["problem"]["code"]) == (401, "unauthenticated")
    assert named(client, "revoked") == count("revoked", PART)


@pytest.mark.parametrize("heard", [0, 1, 2])
def test_a_controller_that_is_killed_goes_on_where_it_was(tmp_path: Path, heard: int) -> None:
    """It has all of the lines then, and is at the next part."""
    lines = lines_of("killed", 4 * PART)
    body = b"\n".join(lines)
    with running(tmp_path / "store") as controller:
        with Client(controller.url) as client:
            prepare(client)
            revision = client.status()["revision"]
        with sending(controller, len(body), "killed") as sent:
            sent.send(body)
            before = [sent.hear() for _ in range(heard)]
            controller.stop(signal.SIGKILL)
        controller.start()
        with Client(controller.url) as client:
            there = len(named(client, "killed"))
            assert there % PART == 0
            assert there >= heard * PART
            again = send(client, body, "killed")
            assert again.content.splitlines(keepends=True)[:heard] == before
            assert [part["networks"] for part in told(again)] == [PART, 2 * PART, 3 * PART, 4 * PART]
            assert client.status()["revision"] == revision + 4
            assert named(client, "killed") == count("killed", 4 * PART)
        assert controller.stop() == 0
        nothing_half(controller.db)


# ---- who follows


def rich(name: str, **more: Any) -> bytes:
    """Something of everything that a line may have."""
    ports = {
        "a": {"segment": "lan", "host": "m1", "groups": ["web"]},
        "b": {"segment": "lan", "host": "m2", "hosts": True},
    }
    policies = [{"from": "web", "to": "any", "allow": "tcp/80"}, {"from": "any", "to": "web", "allow": "icmp"}]
    return line(name, ports=ports, policies=policies, **more)


ROUTED = {"segments": {"lan": {"cidr": "10.0.0.0/24"}, "far": {"cidr": "10.0.1.0/24"}}} | {
    "routers": {"r": {"segments": ["lan"]}, "s": {"segments": ["far"]}},
    "links": {"rs": {"between": ["r", "s"]}},
}


@pytest.mark.parametrize("planned", [False, True], ids=["rows", "plan"])
def test_who_follows_is_told_every_object_of_networks_with_one_change_row(tmp_path: Path, planned: bool) -> None:
    with running(tmp_path) as controller, Client(controller.url) as client:
        prepare(client)
        told(send(client, b"\n".join(rich(f"before-{n}") for n in range(1, 4))))
        follow(controller, client, "new", ROUTED if planned else {})


def follow(controller: Controller, client: Client, name: str, more: dict[str, Any]) -> None:
    with Client(controller.url) as watching, Client(controller.url) as following:
        watch, feed = watching.watch(), following.feed("m1")
        snapshot(watch)
        rows = {(row["kind"], row["id"]): row["value"] for row in next(feed)["rows"]}
        answer = told(send(client, b"\n".join(rich(f"{name}-{n}", **more) for n in range(1, 31))))
        revision = answer[-1]["revision"]
        objects: dict[str, Any] = {}
        for each in watch:
            objects.update({one["id"]: one["object"] for one in each["objects"]})
            if each["revision"] >= revision and "token" in each:
                break
        for batch in islice(feed, 100):
            rows.update({(row["kind"], row["id"]): row["value"] for row in batch.get("rows", ())})
            if batch["revision"] >= revision:
                break
        watch.close()  # type: ignore[attr-defined]
        feed.close()  # type: ignore[attr-defined]
    with Client(controller.url) as anew:
        watch = anew.watch()
        there = {one["id"]: one["object"] for one in snapshot(watch) if one["object"].get("path", "").startswith(name)}
        watch.close()  # type: ignore[attr-defined]
    assert len(there) == 30 * (1 + 1 + 2 + 2 + (1 + 2 + 1 if more else 0))
    assert without_age(objects) == without_age(there)
    with Client(controller.url) as anew:
        feed = anew.feed("m1")
        assert rows == {(row["kind"], row["id"]): row["value"] for row in next(feed)["rows"]}
        feed.close()  # type: ignore[attr-defined]
    with opened(controller.db) as store:
        changes = store.execute("SELECT kind, whole FROM change WHERE revision = ?", (revision,)).fetchall()
    assert [one for one in changes if one[0] not in ("machine", "tenant")] == [("network", 1)] * 30


def snapshot(watch: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The objects that a watch begins with."""
    found: list[dict[str, Any]] = []
    for each in watch:
        assert "snapshot" in each
        found += each["objects"]
        if "token" in each:
            break
    return found


def without_age(objects: dict[str, Any]) -> dict[str, Any]:
    return {id: {key: value for key, value in one.items() if key != "reported"} for id, one in objects.items()}


# ---- at once


def test_batches_and_single_networks_at_once_make_each_once(controller: Controller, client: Client) -> None:
    """The one batch is sent by two, with one key."""
    bodies = [b"\n".join(lines_of(name, 2 * PART + 5)) for name in ("left", "left", "right")]
    revision = client.status()["revision"]

    def ask(place: int) -> Any:
        with Client(controller.url) as mine:
            if place < 3:
                return told(send(mine, bodies[place], ["left", "left", "right"][place]))
            name, number = ("single", place) if place < 6 else ("both", 1)  # three want the same
            made = []
            for each in range(60):
                body = line(f"{name}-{number * 100 + each}")
                made.append(mine._http.request("POST", "/v1/networks", content=body))
            return made

    answers = at_once(ask, 9)
    assert not [one for one in answers if isinstance(one, NestnetError)]
    assert answers[0] == answers[1]
    assert named(client, "left") == count("left", 2 * PART + 5)
    assert named(client, "right") == count("right", 2 * PART + 5)
    singles = [one for some in answers[3:6] for one in some]
    assert {one.status_code for one in singles} == {201}
    assert named(client, "single") == [f"single-{n * 100 + each}" for n in (3, 4, 5) for each in range(60)]
    for one in singles[::20]:
        body = one.json()
        assert client.get("network", body["id"])["path"] == body["path"]
    for each in range(60):
        statuses = sorted(some[each].status_code for some in answers[6:])
        assert statuses == [201, 409, 409]
        codes = [some[each].json().get("code") for some in answers[6:]]
        assert sorted(map(str, codes)) == ["None", "duplicate_name", "duplicate_name"]
    assert named(client, "both") == [f"both-{100 + each}" for each in range(60)]
    numbers = [one["vni"] for one in client.list("segment")]
    assert len(set(numbers)) == len(numbers)
    assert client.status()["revision"] > revision


# ---- one


def test_one_network_is_made_and_told(client: Client) -> None:
    def ask(body: bytes, key: str = "one") -> httpx2.Response:
        return client._http.request("POST", "/v1/networks", content=body, headers={"Idempotency-Key": key})

    first = ask(line("one"))
    assert first.status_code == 201
    made = first.json()
    assert (made["path"], client.get("network", made["id"])["name"]) == ("one", "one")
    assert (made["revision"], bool(made["token"])) == (client.status()["revision"], True)
    assert ask(line("one")).json() == made
    assert (ask(line("two")).status_code, ask(line("one"), "other").status_code) == (409, 409)
    wrong = ask(line("wrong", **WRONG), "wrong")
    assert (wrong.status_code, wrong.json()["problems"][0]["pointer"]) == (422, "/segments/lan/cidr")
    assert (ask(line("far", carrier="nowhere"), "far").status_code, ask(b"", "none").status_code) == (404, 422)


# ---- the client, and the command


def test_the_client_tells_parts_and_then_what_is_wrong(client: Client) -> None:
    def ask(lines: Sequence[bytes], key: str | None = None) -> tuple[int, NestnetError | None]:
        made = 0
        try:
            for part in client.batch(lines, key=key):
                made = part["networks"]
        except NestnetError as error:
            return made, error
        return made, None

    lines = lines_of("client", PART + 5)
    assert ask([*lines[:PART], b"{}"], "k")[0] == PART
    assert ask(lines, "k") == (PART + 5, None)
    for last, wanted in (
        (line("client-x", **WRONG), Invalid),
        (line("client-1"), Conflict),
        (line("client-x", carrier="nowhere"), NotFound),
    ):
        for before in (0, PART):
            made, error = ask([*lines_of(f"client-{wanted.__name__.lower()}{before}", before), last])
            assert (made, type(error)) == (before, wanted)
    with pytest.raises(Unreachable), Client(f"{client.url}-not") as nobody:
        list(nobody.batch(lines))


def test_the_command_makes_networks_and_goes_on(nestnet: Command, client: Client) -> None:
    lines = lines_of("cli", 11_600)
    wrong = [*lines]
    wrong[11_500] = line("cli-11501", **WRONG)
    wrong[11_550] = line("cli-11551", nam="x")
    file = nestnet.folder / "networks.jsonl"
    file.write_bytes(b"\n".join(wrong) + b"\n")
    ran = nestnet("batch", "networks.jsonl")
    assert (ran.code, ran.out) == (1, "")
    assert re.search(r"^networks.jsonl:11501: bad_cidr: .* \(/segments/lan/cidr\)$", ran.err, re.MULTILINE), ran.err
    assert "11000 networks are there" in ran.err
    assert named(client, "cli") == count("cli", 11_000)
    file.write_bytes(b"\n".join(lines) + b"\n")
    ran = nestnet("batch", "networks.jsonl")
    assert (ran.code, ran.out) == (0, "")
    assert re.search(r"^11600 networks made in [\d.]+ s$", ran.err, re.MULTILINE), ran.err
    assert named(client, "cli") == count("cli", 11_600)
    revision = client.status()["revision"]
    assert nestnet("batch", "-", stdin=file.read_text()).code == 0
    assert client.status()["revision"] == revision
    other = nestnet("batch", "networks.jsonl", "--key", "other")
    assert other.code == 1
    assert other.err == "nestnet: networks.jsonl:1-10000: there is a network cli-1 already: `apply` changes it\n"


def test_the_command_goes_on_where_it_was_killed(controller: Controller, nestnet: Command, client: Client) -> None:
    lines = lines_of("halt", 4000)
    (nestnet.folder / "l").write_bytes(b"\n".join(lines))
    env = {"NESTNET_CONTROLLER": nestnet.url, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "nestnet", "batch", "l", "--key", "halt"]
    watching = Client(controller.url)
    watch = watching.watch(kind="network")
    snapshot(watch)
    ran = subprocess.Popen(command, cwd=nestnet.folder, env=env, stderr=subprocess.PIPE)
    for each in watch:
        if any((one["object"] or {}).get("name") == "halt-1" for one in each["objects"]):
            break
    ran.kill()
    ran.communicate()
    watching.close()
    done = nestnet("batch", "l", "--key", "halt")
    assert (done.code, "4000 networks made in" in done.err) == (0, True), done.err
    assert named(client, "halt") == count("halt", 4000)


@pytest.mark.parametrize(
    ("content", "arguments", "code", "err"),
    [
        (None, ["batch", "none"], 1, "nestnet: file none does not exist\n"),
        (None, ["batch", "."], 1, "nestnet: .: Is a directory\n"),
        ("", ["batch", "l"], 0, None),
        ("{}\n", ["batch", "l"], 1, "l:1: missing_key: needs the key name\n"),
        ("\n", ["batch", "l"], 1, None),
    ],
)
def test_what_the_command_says(
    nestnet: Command, content: str | None, arguments: list[str], code: int, err: str | None
) -> None:
    if content is not None:
        nestnet.file(content, "l")
    ran = nestnet(*arguments)
    assert (ran.code, ran.out) == (code, "")
    assert err is None or ran.err == err
