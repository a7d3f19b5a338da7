"""Clients that ask again, look again and follow: a real controller process, killed and restarted; the real client."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text as sql
from test_api import Controller, manifest, network, raw

from nestnet.api.asked import Rates
from nestnet.api.client import Client, Credentials
from nestnet.model.errors import Conflict, Exhausted, Invalid, NestnetError, NotFound, Stale, TooFast, Unreachable
from nestnet.model.exposition import Family, text
from nestnet.store import Store, events
from nestnet.store.database import Database

RATED = """
import sys; from pathlib import Path
from nestnet.api import app, server
from nestnet.api.asked import Rates
made = app.create_app
server.create_app = lambda store, authority: made(store, authority, Rates(20, 3))
server.serve(Path(sys.argv[1]), sys.argv[2])
"""
FORGETFUL = """
import sys; from pathlib import Path
from nestnet.api.server import serve
from nestnet.store import write
write.KEPT_REVISIONS = 3
serve(Path(sys.argv[1]), sys.argv[2])
"""
JUMPING = """
import sys, time; from pathlib import Path
real, ahead = time.time, Path(sys.argv[1]).with_name("ahead")
time.time = lambda: real() + float(ahead.read_text())
from nestnet.api.server import serve
serve(Path(sys.argv[1]), sys.argv[2])
"""


@contextmanager
def running(folder: Path, code: str | None = None) -> Iterator[Controller]:
    folder.mkdir(exist_ok=True)
    made = Controller(folder) if code is None else Controller(folder, code)
    made.start()
    try:
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    """One for all tests that neither stop it nor restore it: each has networks of its own."""
    with running(tmp_path_factory.mktemp("retry")) as made:
        with Client(made.url) as client:
            for place in (1, 2):
                client.join(f"m{place}", f"192.0.2.{place}")
        yield made


@pytest.fixture
def client(controller: Controller) -> Iterator[Client]:
    with Client(controller.url) as made:
        yield made


LINKED = {"routers": {"a": {}, "b": {}}, "links": {"ab": {"between": ["a", "b"]}}}


def at_once(attempt: Callable[[int], Any], runners: int) -> list[Any]:
    """What each of so many threads got, an error too."""
    start = threading.Barrier(runners)

    def run(place: int) -> Any:
        start.wait()
        try:
            return attempt(place)
        except NestnetError as error:
            return error

    with ThreadPoolExecutor(runners) as pool:
        return list(pool.map(run, range(runners)))


# Answers that are lost


class Thief:
    """A socket before the controller's: it throws the first `stolen` answers away, when they are there."""

    def __init__(self, path: Path, to: Path, stolen: int) -> None:
        self.left = stolen
        self._to = to
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._to))
                threading.Thread(target=self._carry, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._carry, args=(far, near, True), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if answers and self.left > 0:
                    self.left -= 1  # The controller has committed.
                    break
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


Step = Callable[[Client], Any]
CHANGES: dict[str, tuple[Step, Step]] = {
    "apply": (lambda c: c.apply(manifest(lost={})), lambda c: c.apply(manifest(lost=network(2)))),
    "link": (lambda c: c.apply(manifest(lost=LINKED)), lambda c: c.set_link("lost/ab", False)),
    "delete": (lambda c: c.apply(manifest(lost=LINKED)), lambda c: c.delete("link", "lost/ab")),
    "cascade": (lambda c: c.apply(manifest(lost=LINKED)), lambda c: c.delete("network", "lost", cascade=True)),
    "join": (Client.status, lambda c: c.join("m9", "192.0.2.9")),
    "machine": (lambda c: c.join("m8", "192.0.2.8"), lambda c: c.delete("machine", "m8")),
    "confirm": (Client.status, lambda c: c.confirm()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_whose_answer_is_lost_twice_is_done_once(
    client: Client, controller: Controller, tmp_path: Path, name: str
) -> None:
    prepare, change = CHANGES[name]
    prepare(client)
    before = client.status()["revision"]
    thief = Thief(tmp_path / "thief.sock", controller.socket, 2)
    try:
        with Client(f"unix:{tmp_path}/thief.sock") as robbed:
            answer = change(robbed)
    finally:
        thief.close()
    assert thief.left == 0
    after = client.status()["revision"]
    assert after == before + 1
    assert (answer["revision"] if isinstance(answer, dict) and "revision" in answer else after) == after
    with suppress(NotFound):
        client.delete("network", "lost", cascade=True)
    with suppress(NotFound):
        client.delete("machine", "m9")


def test_a_key_belongs_to_one_request(client: Client) -> None:
    client.apply(manifest(k=LINKED))
    first = client.set_link("k/ab", False, key="key")
    client.set_link("k/ab", True)
    assert client.set_link("k/ab", False, key="key") == first, "the first answer, and nothing done"
    assert client.get("link", "k/ab")["up"]
    for other in (
        lambda: client.set_link("k/ab", True, key="key"),
        lambda: client.delete("link", "k/ab", key="key"),
        lambda: client.apply(manifest(k=LINKED), key="key"),
    ):
        with pytest.raises(Conflict, match="used for another request"):
            other()
    with pytest.raises(NotFound):
        client.delete("link", "k/none", key="again")
    client.delete("link", "k/ab", key="again")  # Only successes are kept.


@pytest.mark.parametrize("years", [1, -1])
def test_a_wall_clock_that_jumps_changes_nothing(tmp_path: Path, years: int) -> None:
    ahead = tmp_path / "ahead"
    ahead.write_text("0")
    with running(tmp_path, JUMPING) as controller, Client(controller.url) as client, Client(controller.url) as follower:
        client.join("m1", "192.0.2.1")
        client.apply(manifest(k=LINKED))
        feed = follower.feed("m1")
        token = next(feed)["token"]
        first = client.set_link("k/ab", False, key="key")
        client.report("m1", first["revision"])
        client.set_link("k/ab", True)
        ahead.write_text(str(years * 365 * 86400))
        assert client.set_link("k/ab", False, key="key") == first
        assert client.get("link", "k/ab")["up"], "asked for before the jump, done before it, too"
        assert client.set_link("k/ab", False)["revision"] == first["revision"] + 2
        while next(feed)["revision"] < first["revision"] + 2:
            pass
        with Client(controller.url) as again:
            assert not next(again.feed("m1", token)).get("snapshot"), "tokens hold"
        client.report("m1", first["revision"] + 2)
        (machine,) = client.status()["machines"]
        assert 0 <= machine["reported"] < 60
        controller.stop(signal.SIGKILL)
        controller.start()
        assert client.set_link("k/ab", False, key="key") == first
        (machine,) = client.status()["machines"]
        assert 0 <= machine["reported"] < 60
        told = [line["event"]["text"] for line in client.events()]
        assert not any("-" in text for text in told if "after it was stored" in text), told


def test_a_restart_in_the_middle_is_only_a_pause(tmp_path: Path) -> None:
    with running(tmp_path) as controller, Client(controller.url) as client:
        client.join("m1", "192.0.2.1")
        controller.stop(signal.SIGKILL)
        with ThreadPoolExecutor(1) as pool:
            applying = pool.submit(client.apply, manifest(n=network()))
            controller.start()
            assert applying.result(30)["revision"] == client.status()["revision"]
        controller.stop()
        client.patience = 0.2
        with pytest.raises(Unreachable):
            client.status()


def test_who_never_answered_is_not_waited_for(tmp_path: Path) -> None:
    with Client(f"unix:{tmp_path}/none.sock", patience=600) as client, pytest.raises(Unreachable):
        client.status()


# Concurrent edits


def test_of_many_who_looked_at_once_one_wins(controller: Controller, client: Client) -> None:
    client.apply(manifest(race=LINKED))
    etag = client.get("link", "race/ab")["etag"]
    assert raw(client, "GET", "/v1/links/race/ab").headers["etag"] == f'"{etag}"'

    def edit(_: int) -> Any:
        with Client(controller.url) as mine:
            return mine.set_link("race/ab", False, etag=etag)

    got = at_once(edit, 20)
    lost = [one for one in got if isinstance(one, Stale)]
    assert len(lost) == 19
    assert lost[0].code == "stale"
    assert re.search(
        r"link race/ab has changed since .*: revision \d+ by uid:0: link race/ab: up true became", str(lost[0])
    )
    now = client.get("link", "race/ab")["etag"]
    with pytest.raises(Stale):
        client.delete("link", "race/ab", etag=etag)
    with pytest.raises(Stale):
        client.delete("link", "race/ab", etag="no-such-etag")
    client.apply(manifest(race={**LINKED, "description": "more"}))
    assert client.get("link", "race/ab")["etag"] == now, "its own revision, not its network's"
    client.delete("link", "race/ab", etag=now)


def test_a_plan_holds_as_long_as_nothing_moves(client: Client) -> None:
    inner = {"segments": {"s": {}}}
    hosts = {"segments": {"s": {"cidr": "10.0.0.0/16"}}, "ports": {"h": {"segment": "s", "host": "m1", "hosts": True}}}
    first = manifest(planned={**hosts, "networks": {"in": inner}})
    client.apply(first)
    second = manifest(planned={**hosts, "description": "changed", "networks": {"in": inner}})
    plan = client.plan(second)
    client.apply(manifest(foreign=network()))
    client.delete("segment", "planned/in/s")
    with pytest.raises(Stale, match="plan again") as stale:
        client.apply(second, etag=plan["etag"])
    assert any("segment planned/in/s: deleted" in one for one in stale.value.changes)
    again = client.plan(second)
    applied = client.apply(second, etag=again["etag"], key="held")
    assert client.apply(second, etag=again["etag"], key="held") == applied, "asked again, though it has moved by itself"
    client.delete("network", "planned/in", cascade=True)
    with pytest.raises(Stale):
        client.apply(second, etag=applied["plan"]["etag"])
    own = client.get("network", "planned")["etag"]
    client.apply(manifest(planned=hosts), etag=own)
    with pytest.raises(Stale):
        client.apply(manifest(planned=hosts), etag=own)
    assert raw(client, "POST", "/v1/apply", json={"manifest": second}, headers={"If-Match": "*"}).is_success
    absent = {"name": "m7", "address": "192.0.2.7"}
    assert raw(client, "POST", "/v1/machines", json=absent, headers={"If-Match": "*"}).status_code == 412
    wrong = raw(client, "DELETE", "/v1/networks/planned", headers={"If-Match": "bare"})
    assert (wrong.status_code, wrong.json()["problems"][0]["code"]) == (422, "bad_value")


# Watching


class Mirror:
    """A picture of the store, from nothing but the lines of a watch."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.revision = 0
        self.snapshots: list[str] = []

    def take(self, line: dict[str, Any]) -> None:
        if reason := line.get("snapshot"):
            if not self.snapshots or self._whole:
                self.objects, self.revision = {}, 0
                self.snapshots.append(reason)
            self._whole = "token" in line
        else:
            assert line["revision"] > self.revision or "objects" not in line, "told twice"
        self.revision = line["revision"]
        for one in line.get("objects", ()):
            if one["object"] is None:
                self.objects.pop(one["id"], None)
            else:
                self.objects[one["id"]] = one["object"]

    _whole = True


def test_a_watch_goes_on_across_a_restart_without_gap_or_duplicate(tmp_path: Path) -> None:
    with running(tmp_path) as controller, Client(controller.url) as client, Client(controller.url) as watcher:
        client.join("m1", "192.0.2.1")
        mirror, names = Mirror(), {f"n{i}" for i in range(12)}
        done = threading.Event()

        def follow() -> None:
            for line in watcher.watch():
                mirror.take(line)
                if names <= {o["name"] for o in mirror.objects.values()} and mirror.revision >= 15 + len(names):
                    break
            done.set()

        watching = threading.Thread(target=follow, daemon=True)
        watching.start()
        client.apply(manifest(gone=network(3)))
        for turn, name in enumerate(sorted(names)):
            client.apply(manifest(**{name: network(2)}))
            if turn in (3, 7):
                controller.stop(signal.SIGKILL if turn == 3 else signal.SIGTERM)
                controller.start()
        client.delete("network", "gone", cascade=True)
        for name in sorted(names):
            client.apply(manifest(**{name: network(1)}))
        assert done.wait(30)
        assert mirror.snapshots == ["new"]
        stored = {one["id"]: one for kind in ("machine", "network", "segment", "port") for one in client.list(kind)}
        for one in (*stored.values(), *mirror.objects.values()):
            one.pop("reported", None)
        assert mirror.objects == stored


def test_a_watch_that_cannot_go_on_says_so(tmp_path: Path, client: Client) -> None:
    with running(tmp_path, FORGETFUL) as controller, Client(controller.url) as mine:
        mine.join("m1", "192.0.2.1")
        first = next(line for line in mine.watch() if "token" in line)
        assert first["snapshot"] == "new"
        for count in range(6):
            mine.apply(manifest(n=network(count)))
        assert next(mine.watch(first["token"]))["snapshot"] == "too_old"
    foreign = next(line for line in client.watch() if "token" in line)["token"]
    with running(tmp_path) as controller, Client(controller.url) as mine:
        assert next(mine.watch(foreign))["snapshot"] == "other_store"
        assert next(mine.watch("made-up"))["snapshot"] == "other_store"
        token = next(mine.feed("m1"))["token"]
        assert next(mine.watch(token))["snapshot"] == "other_store", "a token is for one stream"
        lines = mine.watch(kind="port", network="n")
        assert {one["kind"] for one in next(lines)["objects"]} == {"port"}
        with pytest.raises(NotFound):
            next(mine.watch(network="none"))


# What depends, and quotas


def test_a_network_goes_with_what_is_in_it_only_when_told_to(client: Client) -> None:
    deep = {"in": {"segments": {"s": {}}, "ports": {"x": {"segment": "s", "host": "h"}}}}
    client.apply(
        manifest(
            full={
                "segments": {"s": {"cidr": "10.0.0.0/24"}},
                "ports": {"h": {"segment": "s", "host": "m1", "hosts": True}},
                "networks": deep,
            }
        )
    )
    with pytest.raises(Conflict) as used:
        client.delete("network", "full")
    assert used.value.dependants == ("network full/in", "port full/h", "segment full/s")
    assert "--cascade deletes them" in str(used.value)
    with pytest.raises(Conflict) as host:
        client.delete("port", "full/h")
    assert host.value.dependants == ("port full/in/x",)
    refused = raw(client, "DELETE", "/v1/segments/full/s", params={"cascade": True})
    assert refused.json()["problems"][0]["code"] == "unknown_key"
    client.delete("network", "full", cascade=True)
    assert not [one for one in client.list("port") if one["path"].startswith("full/")]


def tenants(**specs: Any) -> dict[str, Any]:
    return {"apiVersion": "nestnet/v1", "tenants": specs}


def owned(tenant: str, ports: int) -> dict[str, Any]:
    return {"tenant": tenant, **network(ports)}


def test_of_a_hundred_who_want_the_last_one_exactly_one_gets_it(controller: Controller, client: Client) -> None:
    client.apply({**tenants(racer={"quota": {"networks": 3}}), **manifest()})
    client.apply(manifest(**{"racer-0": owned("racer", 0), "racer-1": owned("racer", 0)}))

    def want(place: int) -> Any:
        with Client(controller.url) as mine:
            return mine.apply(manifest(**{f"racer-x{place}": {"tenant": "racer"}}))

    got = at_once(want, 100)
    lost = [one for one in got if isinstance(one, Exhausted)]
    assert len(lost) == 99
    assert len([one for one in client.list("network") if one["tenant"] == "racer"]) == 3
    assert (lost[0].code, lost[0].limit) == ("quota_exceeded", 3)
    assert str(lost[0]) == "tenant racer may have 3 networks; it has 3, and this asks for 1 more: that is 4 in all"
    assert client.get("tenant", "racer")["used"] == {"networks": 3, "segments": 2, "ports": 0, "rate": 0}


def test_what_children_may_have_is_reserved(client: Client) -> None:
    client.apply({**tenants(up={"quota": {"ports": 10}}, sub={"parent": "up", "quota": {"ports": 6}})})
    client.apply(manifest(upper=owned("up", 4)))
    with pytest.raises(Exhausted, match="6 are reserved or used by the tenants below it, and this asks for 1 more"):
        client.apply(manifest(upper=owned("up", 5)))
    client.apply(manifest(suber=owned("sub", 6)))
    with pytest.raises(Exhausted, match="tenant sub may have 6 ports"):
        client.apply(manifest(suber=owned("sub", 7)))
    with pytest.raises(Exhausted, match="tenant up may have 9 ports; it has 4, 6 are reserved"):
        client.apply(tenants(up={"quota": {"ports": 9}}))
    client.apply(tenants(leaf={"parent": "sub"}))
    with pytest.raises(Exhausted, match="tenant sub may have 6 ports; it has 6, 1 are reserved or used"):
        client.apply(manifest(leafy=owned("leaf", 1)))
    plan = (
        client.plan(
            tenants(
                sub={
                    "parent": "up",
                    "quota": {"ports": 5},
                }
            )
        )
        if False
        else None
    )
    assert plan is None
    changed = client.plan(tenants(sub={"parent": "up", "quota": {"ports": 6, "networks": 2}}))["changes"]
    assert [(c["op"], c["path"], c["fields"]) for c in changed] == [
        ("~", "sub", {"quota": [{"ports": 6}, {"networks": 2, "ports": 6}]})
    ]
    client.apply(tenants(sub={"parent": "up"}))
    assert client.get("tenant", "sub")["quota"]["ports"] == 6, "what the file leaves out stays"
    client.apply(tenants(sub={"parent": "up", "quota": {}}))
    assert client.get("tenant", "sub")["quota"]["ports"] is None


def test_a_tenant_that_asks_too_often_waits(tmp_path: Path) -> None:
    with running(tmp_path, RATED) as controller, Client(controller.url) as client:
        with Client(controller.url) as operator:
            operator.apply({**manifest(), "tenants": {"acme": {"quota": {"ports": 9}}}})
            token = operator.make_token("ci", tenants={"acme": "owner"})["token"]
        client.become(Credentials(token))
        answers = [raw(client, "GET", "/v1/status") for _ in range(8)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert refused[0].headers["retry-after"] == "1"
        assert refused[0].json()["code"] == "too_fast"
        assert client.status()["controller"], "the client waits as long as it is told"
        client.patience = 0
        with pytest.raises(TooFast):
            list(iter(client.status, None))
        with Client(controller.url) as operator:
            assert all(raw(operator, "GET", "/v1/status").is_success for _ in range(30))
            assert re.search(r"^nestnet_http_rate_limited_total [1-9]", raw(operator, "GET", "/metrics").text, re.M)


def test_the_buckets_of_tenants_are_bounded() -> None:
    rates = Rates(1, 1)
    for place in range(10_500):
        rates.spend(f"t{place}")
    assert len(rates._buckets) == 10_000
    with pytest.raises(TooFast):
        rates.spend("t10499")


# What happened


def test_events_tell_who_changed_what_and_what_machines_notice(client: Client, controller: Controller) -> None:
    client.apply(manifest(told=network(2)))
    client.apply(manifest(told=network(1)))
    client.report("m1", 0, ["no NIC"], events=[("started", "m1: its agent has started")])
    client.report("m1", 0, [])
    found = [line["event"] for line in client.events(last=6)]
    assert [event["kind"] for event in found][-5:] == ["changed", "changed", "started", "problem", "solved"]
    changed = found[-4]
    assert (changed["who"], changed["text"], changed["count"]) == ("uid:0", "apply: 1 deleted: port told/p1", 1)
    assert changed["changes"] == [{"op": "-", "kind": "port", "path": "told/p1"}]
    now = client.status()["revision"]
    token = list(client.events(last=1))[-1]["token"]
    for name in ("m1", "m2", "m9"):
        with suppress(NotFound):
            client.report(name, now)
    assert next(line for line in client.events(token, follow=True))["event"]["text"].endswith("after it was stored")


def test_events_are_bounded_and_the_audit_log_is_not_pushed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEPT_EVENTS", 50)
    store = Store(tmp_path / "store.db")
    store.join("m1", "192.0.2.1")
    for turn in range(20):
        store.report("m1", 0, [f"problem {turn} {place}" for place in range(10)])
    found = store.events_after(0, 1000)
    assert found[0][1]["kind"] == "changed"
    assert 50 <= len(found) <= 151
    store.close()


def test_reports_without_news_write_nothing(client: Client) -> None:
    def commits() -> int:
        return int(re.search(r"^nestnet_store_commits_total (\d+)", raw(client, "GET", "/metrics").text, re.M)[1])  # type: ignore[index]

    client.apply(manifest(quiet=network(1)))
    port = str(client.get("port", "quiet/p0")["row"])
    client.report("m1", 5, [], {port: {"interface": "p1", "drops": {"policy_denied": 1}}})
    before = commits()
    for packets in range(20):
        client.report("m1", 5, [], {port: {"interface": "p1", "drops": {"policy_denied": packets}}})
        client.report("m1", 5)
    assert commits() == before
    assert client.get("port", "quiet/p0")["attachment"] == {"interface": "p1", "drops": {"policy_denied": 19}}
    assert client.get("machine", "m1")["reported"] < 5


def test_nobody_waits_for_who_reads_the_logs(tmp_path: Path) -> None:
    """A pipe that is never read: it is full after 64 KiB."""
    made = Controller(tmp_path)
    command = [sys.executable, "-c", made.code, str(made.db), made.url]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert process.stderr is not None
    try:
        assert b"listening" in process.stderr.readline()
        with Client(made.url, timeout=10) as client:
            client._answered = True
            for _ in range(1000):
                client.status()
            fcntl.fcntl(process.stderr, fcntl.F_SETFL, os.O_NONBLOCK)
            said = process.stderr.read()
            client.status()
            os.set_blocking(process.stderr.fileno(), True)
            said += process.stderr.readline()
        assert 60_000 < len(said) < 70_000
        assert re.search(rb"^\d+ lines are missing here: nobody took them$", said, re.M)
    finally:
        process.kill()
        process.communicate()
    loud = "from nestnet.agent.agent import say\nfor _ in range(3000): say('x' * 100)\nprint('done')"
    both = subprocess.Popen([sys.executable, "-c", loud], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert both.wait(30) == 0
    finally:
        both.kill()
        both.communicate()


# Metrics


SAMPLE = re.compile(r'[a-z_]+(\{([a-z_]+="([^"\\\n]|\\.)*",?)+\})? -?[0-9.e+-]+')


def test_metrics_can_be_read_by_prometheus(client: Client) -> None:
    raw(client, "PATCH", "/v1/status")
    raw(client, "PROPFIND", "/v1/nowhere")
    assert raw(client, "BREW", "/v1/nowhere").status_code == 400, "no method"
    answer = raw(client, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families: dict[str, str] = {}
    for line in answer.text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in families
            families[name] = kind
            assert kind != "counter" or name.endswith("_total")
        elif not line.startswith("# HELP "):
            assert SAMPLE.fullmatch(line), line
            assert line.partition("{")[0].split(" ")[0] in families
    assert 'route="none"' in answer.text
    assert "nowhere" not in answer.text
    assert 'nestnet_machine_report_age_seconds{machine="m1"}' in answer.text


def test_labels_are_escaped() -> None:
    assert text([Family("a", "gauge", "x\ny", [({"l": 'a"\\\n'}, 1.5)])]) == (
        '# HELP a x\\ny\n# TYPE a gauge\na{l="a\\"\\\\\\n"} 1.5\n'
    )


# Commits that are shared


def test_who_waits_is_committed_together_and_fails_alone(tmp_path: Path) -> None:
    database = Database(tmp_path / "store.db", 100, 10)
    first = threading.Event()

    def work(place: int) -> int:
        if place == 0:
            first.wait(10)

        def turn(connection: Any) -> int:
            connection.execute(sql("INSERT INTO counter (kind, last) VALUES (:k, 1)"), {"k": f"k{place}"})
            if place % 5 == 1:
                raise Conflict("no")
            if place % 5 == 2:  # Judged at COMMIT only.
                connection.execute(sql("INSERT INTO tenant (id, name, parent) VALUES (:i, :i, 99999)"), {"i": place})
            return place

        try:
            return database.transact(turn)
        finally:
            first.set()

    results: list[Any] = [None] * 40

    def run(place: int) -> None:
        try:
            results[place] = work(place)
        except Exception as error:
            results[place] = type(error).__name__

    with database.alone():
        threads = [threading.Thread(target=run, args=(place,)) for place in range(40)]
        for thread in threads:
            thread.start()
        while len(database._waiting) < 39:  # the others wait for the one that holds it
            first.set()
    for thread in threads:
        thread.join(30)
    assert results == [p if p % 5 not in (1, 2) else "Conflict" if p % 5 == 1 else "IntegrityError" for p in range(40)]
    with database.read() as connection:
        stored = set(connection.execute(sql("SELECT kind FROM counter")).scalars())
    assert stored == {f"k{place}" for place in range(40) if place % 5 not in (1, 2)}
    assert database.turns == 40
    assert database.commits < 10
    database.close()


# Backup and restore


def test_a_restored_store_is_another_one(tmp_path: Path) -> None:
    with running(tmp_path) as controller, Client(controller.url) as client:
        client.join("m1", "192.0.2.1")
        client.apply(manifest(kept=network(2)))
        kept = client.get("network", "kept")
        client.report("m1", client.status()["revision"])
        backup = tmp_path / "a.backup"
        assert client.backup(backup) == backup.stat().st_size
        assert backup.stat().st_mode & 0o777 == 0o600
        lost = client.apply(manifest(lost=network(3)))["revision"]
        lost_vni, lost_row = client.get("segment", "lost/s")["vni"], client.get("port", "lost/p0")["row"]
        client.report("m1", lost)
        with Client(controller.url) as follower, Client(controller.url) as watcher:
            feed, watch = follower.feed("m1"), watcher.watch()
            before = next(feed)
            token = next(line for line in watch if "token" in line)["token"]
            revision = client.restore(backup)
            after = next(line for line in feed if line.get("rows"))
            assert after["snapshot"]
            assert (after["store"] != before["store"], after["confirmed"]) == (True, False)
            assert next(line for line in watch if "snapshot" in line)["snapshot"] == "other_store"
            assert client.confirm() == revision + 1
            assert next(line for line in feed if line["confirmed"])
        assert revision > lost + 1000
        assert [one["path"] for one in client.list("network")] == ["kept"]
        assert client.get("network", kept["id"])["path"] == "kept", "ids are as they were"
        with pytest.raises(Stale):
            client.delete("network", "kept", cascade=True, etag=kept["etag"])
        assert next(client.watch(token))["snapshot"] == "other_store"
        assert (tmp_path / "store.db.before-restore").exists()
        client.apply(manifest(new=network(1)))
        assert client.get("port", "new/p0")["row"] > lost_row + 1000
        assert client.get("segment", "new/s")["vni"] > lost_vni + 1000, "a machine may still hold the lost one"
        client.report("m1", client.status()["revision"])
        client.apply(manifest(newer=network(1)))
        assert client.get("segment", "newer/s")["vni"] == lost_vni, "all machines have realised the restore"
        assert "restored" in [line["event"]["kind"] for line in client.events()]
        controller.stop(signal.SIGKILL)
        controller.start()
        assert {one["path"] for one in client.list("network")} == {"kept", "new", "newer"}
        wrong = tmp_path / "wrong"
        wrong.write_bytes(b"SQLite format 3\0 and nothing else")
        for file in (wrong, controller.log):
            with pytest.raises(Invalid, match="cannot be restored"):
                client.restore(file)
        assert len(list(client.list("network"))) == 3


def test_who_hangs_up_is_no_longer_followed(client: Client) -> None:
    def streams() -> int:
        found = re.search(r'^nestnet_streams\{stream="watch"\} (\d+)', raw(client, "GET", "/metrics").text, re.M)
        return int(found[1]) if found is not None else 0

    with Client(client.url) as short:
        lines = short.watch()
        next(lines)
        assert streams() >= 1
        lines.close()
    for _ in range(200):
        if not streams():
            break
        client.apply(manifest(ring=network(streams())))  # What it writes to tells it.
    assert not streams()
