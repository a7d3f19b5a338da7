"""Tenants of tenants: what a parent may do with those below it, what nobody learns of those above, and races."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import combinations, count, product
from pathlib import Path
from typing import Any

import httpx2
import pytest
from test_api import Controller, manifest
from test_retry import at_once
from test_store import store

from nestnet.api.client import Client, Credentials
from nestnet.cli.changes import _concerned
from nestnet.model.errors import Conflict, Exhausted, Forbidden, Invalid, NestnetError, NotFound, Stale, Unauthenticated
from nestnet.model.manifest import parse
from nestnet.store import Store, access, deletion, tenancy
from nestnet.store.once import Asked
from nestnet.store.quotas import Quota
from nestnet.store.scope import Scope
from nestnet.store.tenancy import One, line_in, misnamed, named_after, seen, to_administer, to_change

__all__ = ["store"]

ROOT = Path(__file__).parent.parent
names = count(1)


@dataclass
class Place:
    """A controller, and tenants of its own for each test."""

    controller: Controller
    tokens: dict[str, str] = field(default_factory=dict)

    def operator(self) -> Client:
        return Client(self.controller.url)

    def client(self, token: str) -> Client:
        return Client(self.controller.url, credentials=Credentials(self.tokens[token]))

    def ask(self, token: str, method: str, path: str, **more: Any) -> httpx2.Response:
        return self.client(token)._http.request(method, path, **more)

    def keep(self, name: str, made: dict[str, Any]) -> None:
        self.tokens[name] = made["token"]

    def tenants(self, quota: dict[str, Any] | None = None) -> str:
        """A tenant `pN` with `pN-a` and `pN-a-x` below it, and an owner's token of each, called as it is, with -own."""
        top = f"p{next(names)}"
        tree = {top: {"quota": quota or {}}, f"{top}-a": {"parent": top}, f"{top}-a-x": {"parent": f"{top}-a"}}
        with self.operator() as operator:
            operator.apply({**manifest(), "tenants": tree})
            for name in tree:
                operator.grant(None, name)
                self.keep(f"{name}-own", operator.make_token(f"{name}-own", tenants={name: "owner"}))
            self.keep(f"{top}-read", operator.make_token(f"{top}-read", tenants={top: "reader"}))
        return top


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    controller = Controller(tmp_path_factory.mktemp("tenants"))
    controller.start()
    made = Place(controller)
    with made.operator() as operator:
        for number in (1, 2):
            operator.join(f"m{number}", f"192.0.2.{number}")
    yield made
    controller.stop()


def network(ports: int = 1, rate: str | None = None, **more: Any) -> dict[str, Any]:
    port = {"segment": "s", "host": "m1", **({"rate": rate} if rate else {})}
    made = {f"p{number}": port for number in range(ports)}
    return {"segments": {"s": {"cidr": "10.0.0.0/24"}}, "ports": made, **more}


# ---- who sees whom


def test_a_tenant_sees_below_and_nobody_above(place: Place) -> None:
    top = place.tenants({"networks": 9})
    low, leaf = f"{top}-a", f"{top}-a-x"
    with place.operator() as operator:
        operator.apply(manifest(**{f"{low}-net": {"tenant": low, **network()}}))
    shown = {}
    for token in (f"{top}-own", f"{top}-read", f"{low}-own", f"{leaf}-own"):
        with place.client(token) as client:
            shown[token] = {one["name"]: one["parent"] for one in client.list("tenant")}
            if low in shown[token]:
                assert client.get("tenant", low)["used"] == {"networks": 1, "segments": 1, "ports": 1, "rate": 10**11}
            assert [one["path"] for one in client.list("network")] == (
                [f"{low}-net"] if token == f"{low}-own" else []
            ), "being above gives no right to read"
    all_of_it = {top: None, low: top, leaf: low}
    assert shown == {
        f"{top}-own": all_of_it,
        f"{top}-read": all_of_it,
        f"{low}-own": {low: None, leaf: low},
        f"{leaf}-own": {leaf: None},
    }
    told = place.ask(f"{leaf}-own", "GET", f"/v1/tenants/{leaf}").json()
    assert told["quota"] == {"networks": None, "segments": None, "ports": None, "rate": None}
    for hidden in (low, top):
        asked = (("GET", {}), ("PATCH", {"json": {"suspended": True}}), ("DELETE", {}))
        answers = []
        for name in (hidden, "absent"):
            for method, more in asked:
                answer = place.ask(f"{leaf}-own", method, f"/v1/tenants/{name}", **more).json()
                nearest = answer.pop("nearest", None)  # by its letters, among what is seen
                assert nearest in (None, leaf)
                answers.append({**answer, "detail": answer["detail"].replace(name, "it").split(";")[0]})
        assert answers[:3] == answers[3:]


def test_a_watch_tells_of_tenants_below(place: Place) -> None:
    top = place.tenants()
    with place.client(f"{top}-own") as mine, place.client(f"{top}-a-own") as low, place.operator() as operator:
        lines = low.watch(kind="tenant")
        seen_first = {one["object"]["name"] for one in next(lines)["objects"]}
        assert seen_first == {f"{top}-a", f"{top}-a-x"}
        mine.make_tenant(f"{top}-b")
        low.make_tenant(f"{top}-a-y")
        mine.set_tenant(f"{top}-a", suspended=True)
        low_id, gone = (operator.get("tenant", f"{top}-a{end}")["id"] for end in ("", "-y"))
        operator.delete("tenant", f"{top}-a-y")
        told: dict[str, Any] = {}
        for line in lines:
            told |= {one["id"]: one["object"] for one in line.get("objects", [])}
            if told.get(gone, "") is None:
                break
        assert told[low_id]["suspended"]
        assert {one["name"] for one in told.values() if one} == {f"{top}-a", f"{top}-a-x"}
        assert all(one["suspended"] for one in told.values() if one), "those below are closed with it"
        mine.set_tenant(f"{top}-a", suspended=False)


def test_rights_in_every_small_tree() -> None:
    """Against the words: some tenant above, or itself, is owned, and nothing from there up is suspended."""
    some = [frozenset(each) for size in range(5) for each in combinations("abcd", size)]
    ups_of = product([None], "a", "ab", "abc")  # each is below one before it, so there is no circle
    for above, owns, closed, own in product(ups_of, some, some, (False, True)):
        parents: dict[str, str | None] = dict(zip("abcd", above, strict=True))
        scope = Scope(owns, owns)
        known = seen(parents, scope)
        assert known is not None
        for name in parents:
            line = line_in(name, parents, closed)
            assert line[0] == One(name, name in closed)
            ups = [one.name for one in line]
            assert (name in known) == bool(owns & set(ups))
            entitled = [up for up in (ups if own else ups[1:]) if up in owns]
            judge: Callable[[Any, Scope], None] = to_change if own else to_administer
            if any(not closed & set(ups[ups.index(up) :]) for up in entitled):
                judge(line, scope)
                continue
            with pytest.raises(Forbidden) as refused:
                judge(line, scope)
            assert refused.value.code == ("suspended" if entitled else "forbidden")
            assert str(refused.value).startswith(f"tenant {name} is ")


# ---- making, and names


def test_a_tenant_makes_others_below_it(place: Place) -> None:
    top = place.tenants({"ports": 10})
    with place.client(f"{top}-own") as mine, place.client(f"{top}-a-own") as low:
        made = mine.make_tenant(f"{top}-b", quota={"ports": 4}, key="once")
        assert (made["name"], made["parent"], made["quota"]["ports"]) == (f"{top}-b", top, 4)
        assert mine.make_tenant(f"{top}-b", quota={"ports": 4}, key="once") == made
        with pytest.raises(Conflict, match=r"is called .* already"):
            mine.make_tenant(f"{top}-b", quota={"ports": 4})
        with pytest.raises(Conflict, match="used for another request"):
            mine.make_tenant(f"{top}-b", quota={"ports": 5}, key="once")
        assert mine.make_tenant(f"{top}-a-z", f"{top}-a")["parent"] == f"{top}-a"
        assert low.get("tenant", f"{top}-a-z")["parent"] == f"{top}-a"
        with pytest.raises(Exhausted, match=f"tenant {top} may have 10 ports; it has 0, 11 are reserved"):
            mine.make_tenant(f"{top}-c", quota={"ports": 7})
        for name, parent in ((f"{top}", None), (f"{top}x", None), ("other", None), (f"{top}-a-q", None),
                             (f"{top}-q", f"{top}-a"), (f"{top}-a", f"{top}-a")):  # fmt: skip
            with pytest.raises(Invalid) as refused:
                mine.make_tenant(name, parent)
            assert [(one.code, one.pointer) for one in refused.value.problems] == [("bad_name", "/name")]
            assert f"has to be called {parent or top}-SOMETHING" in str(refused.value)
        answers = set()
        for hidden in (top, "absent"):
            with pytest.raises(NotFound) as not_there:
                low.make_tenant(f"{top}-a-w", hidden)
            answers.add(str(not_there.value).replace(hidden, "it"))
        assert answers == {"tenant it does not exist"}
        with place.client(f"{top}-read") as reader, pytest.raises(Forbidden):
            reader.make_tenant(f"{top}-r")


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({"name": "A B"}, "bad_name", "/name"),
        ({"name": "any"}, "reserved_name", "/name"),
        ({"name": "n" * 64}, "bad_value", "/name"),
        ({"name": "x", "parent": "n" * 10_000}, "bad_value", "/parent"),
        ({"name": "x", "quota": {"ports": -1}}, "out_of_range", "/quota/ports"),
        ({"name": "x", "quota": {"ports": 10**12}}, "out_of_range", "/quota/ports"),
        ({"name": "x", "quota": {"rate": 1}}, "out_of_range", "/quota/rate"),
        ({"name": "x", "quota": {"speed": 1}}, "unknown_key", "/quota/speed"),
        ({"name": "x", "suspended": True}, "unknown_key", "/suspended"),
        ({}, "missing_key", "/name"),
    ],
)
def test_a_wish_for_a_tenant_that_means_nothing(place: Place, body: Any, code: str, pointer: str) -> None:
    top = place.tenants()
    response = place.ask(f"{top}-own", "POST", "/v1/tenants", json=body)
    assert response.status_code == 422, response.text
    assert [(one["code"], one["pointer"]) for one in response.json()["problems"]] == [(code, pointer)]


@pytest.mark.parametrize("body", [{}, {"parent": "x"}, {"suspended": "yes"}, {"quota": {"ports": "many"}}])
def test_a_change_of_a_tenant_that_means_nothing(place: Place, body: Any) -> None:
    top = place.tenants()
    assert place.ask(f"{top}-own", "PATCH", f"/v1/tenants/{top}-a", json=body).status_code == 422


def test_who_owns_several_says_whose_it_is(place: Place) -> None:
    one, two = place.tenants(), place.tenants()
    with place.operator() as operator:
        place.keep("both", operator.make_token(f"{one}-both", tenants={one: "owner", two: "owner"}))
    with place.client("both") as client:
        with pytest.raises(Invalid, match="name the parent"):
            client.make_tenant(f"{one}-n")
        assert client.make_tenant(f"{one}-n", one)["parent"] == one
        with pytest.raises(Invalid, match=f"{two}-SOMETHING"):
            client.make_tenant(f"{one}-m", two)


def test_no_tree_and_no_heap_of_tokens_grows_without_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenancy, "MOST", 4)
    monkeypatch.setattr(access, "MOST", 2)
    store.make_tenant("a")
    store.make_tenant("b")
    asked = Asked("token:a", "a", scope=Scope(frozenset({"a"}), frozenset({"a"})))
    deep = Asked("token:a-1", "a-1", scope=Scope(frozenset({"a-1"}), frozenset({"a-1"})))
    store.make_tenant("a-1", asked=asked)
    store.make_tenant("a-1-1", asked=deep)

    def of(*made: str) -> Any:
        return parse({**manifest(), "tenants": {name: {} for name in made}})

    for attempt in (
        lambda: store.apply(of("a-2", "a-3"), asked=asked),
        lambda: store.apply(of("a-1-2", "a-1-3"), asked=deep),
    ):
        with pytest.raises(Exhausted, match="into one tree"):
            attempt()
    store.apply(of("a-2"), asked=asked)
    for attempt in (
        lambda: store.make_tenant("a-4", asked=asked),
        lambda: store.make_tenant("a-1-4", asked=deep),
        lambda: store.apply(of("a-4"), asked=asked),
    ):
        with pytest.raises(Exhausted, match="into one tree") as full:
            attempt()
        assert (full.value.code, full.value.limit) == ("too_many", 4)
    store.make_tenant("more", "a")  # The operator may.
    for name in ("a-t1", "a-t2"):
        store.make_token(name, tenants={"a": "reader"}, asked=asked)
    with pytest.raises(Exhausted, match="tenant a has 2 tokens"):
        store.make_token("a-t3", tenants={"a": "reader"}, asked=asked)
    store.make_token("any", tenants={"a": "reader"})


def test_names_that_are_ones_own() -> None:
    assert named_after("a-b-c", {"a", "a-b"}) == "a-b"
    assert named_after("a-b-c", {"a", "a-b-c", "b"}) == "a"
    assert named_after("a", {"a"}) is None
    assert "a-SOMETHING" in misnamed("tenant", "x", "a", "/name").message


# ---- quota


def test_what_is_above_has_no_name_and_no_number(place: Place) -> None:
    """A tenant without a limit draws on those above; how much they have is theirs to know."""
    top = place.tenants({"ports": 3, "networks": 1})
    low, leaf = f"{top}-a", f"{top}-a-x"
    with place.client(f"{leaf}-own") as client:
        client.apply(manifest(**{leaf: network(2)}))
        for refused in (manifest(**{leaf: network(4)}), manifest(**{f"{leaf}-2": {}})):
            with pytest.raises(Conflict) as full:
                client.apply(refused)
            assert full.value.code == "quota_exceeded"
            assert not isinstance(full.value, Exhausted), "it has no number"
            assert str(full.value).startswith("the tenants above have not so many ")
            assert low not in str(full.value).replace(leaf, "")
        with pytest.raises(Conflict, match="the tenants above have not so many ports left"):
            client.make_tenant(f"{leaf}-y", quota={"ports": 2})
    with place.client(f"{top}-own") as mine, pytest.raises(Exhausted, match=f"tenant {top} may have 3 ports"):
        mine.set_tenant(low, {"ports": 4})


def test_a_quota_below_what_is_used_is_refused_with_the_numbers(place: Place) -> None:
    top = place.tenants({"ports": 10})
    low = f"{top}-a"
    with place.client(f"{low}-own") as client, place.client(f"{top}-own") as mine:
        client.apply(manifest(**{low: network(3)}))
        with pytest.raises(Exhausted) as refused:
            mine.set_tenant(low, {"ports": 2})
        assert str(refused.value) == f"tenant {low} may have 2 ports; it has 3: that is 3 in all"
        assert (refused.value.code, refused.value.limit) == ("quota_exceeded", 2)
        told = mine.set_tenant(low, {"ports": 3, "networks": 2})
        again = mine.set_tenant(low, {"ports": 3})
        assert again["tenant"]["etag"] == told["tenant"]["etag"], "doing it twice is doing it once"
        assert again["tenant"]["quota"] == {"networks": 2, "segments": None, "ports": 3, "rate": None}
        assert mine.set_tenant(low, {"networks": None})["tenant"]["quota"]["networks"] is None
        with pytest.raises(Exhausted, match=f"tenant {low} may have 3 ports"):
            client.apply(manifest(**{low: network(4)}))
        with pytest.raises(Forbidden, match="above it"):
            client.set_tenant(low, {"ports": 9})
        with pytest.raises(Stale) as stale:
            mine.set_tenant(low, {"ports": 9}, etag=told["tenant"]["etag"])
        assert f"token:{top}-own" in str(stale.value)


def test_who_changed_it_above_is_somebody(place: Place) -> None:
    """412 tells what changed, and by whom as far as that is for the reader to know."""
    top = place.tenants()
    with place.operator() as operator, place.client(f"{top}-own") as mine, place.client(f"{top}-a-own") as low:
        etag = low.get("tenant", f"{top}-a-x")["etag"]
        mine.set_tenant(f"{top}-a-x", {"ports": 5})
        operator.set_tenant(f"{top}-a-x", {"ports": 6})
        with pytest.raises(Stale) as stale:
            low.set_tenant(f"{top}-a-x", {"ports": 7}, etag=etag)
        assert len(stale.value.changes) == 2
        assert all("by somebody: " in line for line in stale.value.changes)


def test_of_a_hundred_who_want_the_last_port_of_a_child_one_gets_it(place: Place) -> None:
    top = place.tenants({"networks": 50})
    low = f"{top}-a"
    with place.client(f"{top}-own") as mine, place.client(f"{low}-own") as client:
        mine.set_tenant(low, {"networks": 2})
        client.apply(manifest(**{low: network()}))

        def want(number: int) -> Any:
            with place.client(f"{low}-own") as one:
                return one.apply(manifest(**{f"{low}-{number}": {}}))

        got = at_once(want, 100)
        assert Counter(type(one).__name__ for one in got) == {"dict": 1, "Exhausted": 99}
        assert mine.get("tenant", low)["used"]["networks"] == 2


def test_of_a_hundred_children_that_share_what_is_left_no_more_are_made_than_fit(place: Place) -> None:
    top = place.tenants({"ports": 7})

    def want(number: int) -> Any:
        with place.client(f"{top}-own") as one:
            return one.make_tenant(f"{top}-n{number}", quota={"ports": 2})

    got = at_once(want, 40)
    assert Counter(type(one).__name__ for one in got) == {"dict": 3, "Exhausted": 37}


# ---- suspended


def test_a_suspended_tenant_may_read_and_nothing_else(place: Place) -> None:
    top = place.tenants()
    low, leaf = f"{top}-a", f"{top}-a-x"
    with place.client(f"{low}-own") as client, place.client(f"{top}-own") as mine, place.operator() as operator:
        spec = network(2, routers={"r": {"segments": ["s"]}, "q": {}}, links={"l": {"between": ["r", "q"]}})
        client.apply(manifest(**{low: spec}))
        with place.client(f"{leaf}-own") as deep:
            deep.apply(manifest(**{leaf: network()}))
        before = [operator.get("network", name) for name in (low, leaf)]
        told = mine.set_tenant(low, suspended=True)["tenant"]
        assert told["suspended"]
        assert [operator.get("network", name) for name in (low, leaf)] == before, "its networks go on as they are"
        wanted: dict[str, list[tuple[str, str, Any]]] = {
            f"{low}-own": [
                ("POST", "/v1/apply", {"manifest": manifest(**{f"{low}-new": {}})}),
                ("POST", "/v1/plan", {"manifest": manifest(**{f"{low}-new": {}})}),
                ("PATCH", f"/v1/networks/{low}", {"enabled": False}),
                ("PATCH", f"/v1/ports/{low}/p0", {"attach": {"tap": "t0"}}),
                ("PATCH", f"/v1/links/{low}/l", {"up": False}),
                ("POST", "/v1/move", {"port": f"{low}/p0", "to": "m2"}),
                ("DELETE", f"/v1/ports/{low}/p1", None),
                ("DELETE", f"/v1/networks/{low}?cascade=true", None),
                ("POST", "/v1/tokens", {"name": f"{low}-t", "tenants": {low: "reader"}}),
                ("DELETE", f"/v1/tokens/{low}-own", None),
                ("POST", "/v1/tenants", {"name": f"{low}-y"}),
                ("PATCH", f"/v1/tenants/{leaf}", {"quota": {"ports": 1}}),
                ("DELETE", f"/v1/tenants/{leaf}?cascade=true", None),
                ("POST", "/v1/apply", {"manifest": {**manifest(), "tenants": {f"{low}-y": {}}}}),
            ],
            f"{leaf}-own": [
                ("DELETE", f"/v1/ports/{leaf}/p0", None),
                ("POST", "/v1/apply", {"manifest": manifest(**{leaf: network(3)})}),
                ("POST", "/v1/tokens", {"name": f"{leaf}-t", "tenants": {leaf: "reader"}}),
            ],
        }
        for token, requests in wanted.items():
            whose = token.removesuffix("-own")
            for method, path, body in requests:
                response = place.ask(token, method, path, **({} if body is None else {"json": body}))
                assert (response.status_code, response.json()["code"]) == (403, "suspended"), (path, response.text)
                said = response.json()["detail"]
                named = {word for word in said.split() if word.startswith("p") and word[1:2].isdigit()}
                assert named in ({whose}, {leaf}, {f"{low}-y"}), "nothing above is named"
            assert place.ask(token, "GET", f"/v1/networks/{whose}").status_code == 200
            assert place.ask(token, "GET", f"/v1/tenants/{whose}").json()["suspended"]
        assert [operator.get("network", name)["revision"] for name in (low, leaf)] == [
            one["revision"] for one in before
        ]
        mine.set_tenant(leaf, {"ports": 9})
        mine.make_token(f"{low}-given", tenants={low: "reader"})
        operator.set_enabled("network", low, False)
        assert not mine.set_tenant(low, suspended=False)["tenant"]["suspended"]
        client.set_enabled("network", low, True)
        with pytest.raises(Forbidden) as itself:
            client.set_tenant(low, suspended=True)
        assert itself.value.code == "forbidden"


def test_a_write_comes_before_a_suspension_or_is_refused(place: Place) -> None:
    """Ten writers, and one who suspends and resumes: no change by the writers lies in between."""
    top = place.tenants()
    low = f"{top}-a"
    with place.client(f"{low}-own") as client:
        client.apply(manifest(**{low: network(10)}))
    ended = threading.Event()
    refused: Counter[str] = Counter()

    def write(number: int) -> None:
        with place.client(f"{low}-own") as one:
            for turn in range(12):
                try:
                    if number % 2:
                        one.set_attach(f"{low}/p{number}", {"tap": f"t{number}x{turn}"})
                    else:  # It is planned before the writer's turn comes.
                        one.apply(manifest(**{f"{low}-{number}": {"description": f"{turn}"}}))
                    refused["written"] += 1
                except Forbidden as error:
                    refused[error.code] += 1

    def suspend() -> None:
        with place.client(f"{top}-own") as mine:
            while not ended.is_set():
                mine.set_tenant(low, suspended=True)
                mine.set_tenant(low, suspended=False)

    with ThreadPoolExecutor(11) as pool:
        suspending = pool.submit(suspend)
        for done in [pool.submit(write, number) for number in range(10)]:
            done.result(60)
        ended.set()
        suspending.result(60)
    with place.operator() as operator:
        lines = [line["event"] for line in operator.events(last=1000) if line.get("event")]
    lines = [one for one in lines if one["kind"] == "changed"]
    written = [one["revision"] for one in lines if one["who"] == f"token:{low}-own"]
    turns = [one["revision"] for one in lines if one["who"] == f"token:{top}-own"]
    closed = list(zip(turns[::2], turns[1::2], strict=True))
    assert closed
    assert len(written) == refused["written"] + 1
    assert refused["written"], "some came before"
    assert refused["suspended"], "and some were refused"
    assert set(refused) == {"written", "suspended"}
    assert not [(first, n, last) for first, last in closed for n in written if first < n < last]


def test_a_restore_resumes_nobody(tmp_path: Path) -> None:
    made = Store(tmp_path / "store.db")
    made.make_tenant("a")
    made.backup(tmp_path / "copy")
    made.set_tenant("a", suspended=True)
    made.restore(tmp_path / "copy")
    assert made.get("tenant", "a")["suspended"]
    made.close()


# ---- deleting


def test_a_tenant_with_something_is_not_deleted(place: Place) -> None:
    top = place.tenants()
    low, leaf = f"{top}-a", f"{top}-a-x"
    with place.client(f"{top}-own") as mine, place.client(f"{low}-own") as client, place.operator() as operator:
        client.apply(manifest(**{f"{low}-secret": network(), f"{low}-hidden": {}}))
        with pytest.raises(Conflict) as refused:
            mine.delete("tenant", low)
        text = f"tenant {low} has 2 networks, 1 tenants below it and 1 grants; --cascade deletes them"
        assert (refused.value.code, str(refused.value), refused.value.dependants) == ("in_use", text, ())
        with pytest.raises(Conflict) as told:
            operator.delete("tenant", low)
        assert "--cascade deletes them" in str(told.value)
        assert {one for one in told.value.dependants if not one.startswith("grant grant_")} == {
            f"tenant {leaf}",
            f"network {low}-secret",
            f"network {low}-hidden",
        }
        with pytest.raises(Forbidden):
            client.delete("tenant", low, cascade=True)
        mine.delete("tenant", leaf, cascade=True)
        with pytest.raises(Unauthenticated), place.client(f"{leaf}-own") as ended:
            ended.status()
        assert f"{leaf}-own" not in {one["name"] for one in operator.tokens()}
        key = "again"
        gone = mine.delete("tenant", low, cascade=True, key=key)
        assert mine.delete("tenant", low, cascade=True, key=key) == gone
        assert [one["name"] for one in mine.list("tenant")] == [top]
        assert not [one for one in operator.list("network") if one["path"].startswith(low)]
        with pytest.raises(NotFound):
            mine.delete("tenant", low, cascade=True)
        made = mine.make_tenant(low)
        assert made["used"]["networks"] == 0
        assert not made["suspended"]


def test_what_others_live_on_stays(place: Place) -> None:
    one, two = place.tenants(), place.tenants()
    with place.operator() as operator, place.client(f"{one}-own") as mine:
        guest = {"tenant": two, "segments": {"s": {"cidr": "10.0.0.0/24"}}}
        hosts = {"p0": {"segment": "s", "host": "m1", "hosts": True}}
        spec = {**network(0), "tenant": f"{one}-a", "ports": hosts, "networks": {"in": guest}}
        operator.apply(manifest(**{f"{one}-a": spec}))
        with pytest.raises(Conflict, match="carry 1 networks of other tenants") as refused:
            mine.delete("tenant", f"{one}-a", cascade=True)
        assert two not in str(refused.value)
        assert not mine.get("tenant", f"{one}-a")["suspended"]
        assert operator.get("network", f"{one}-a/in")


def test_deleting_a_tenant_against_making_a_network_in_it(place: Place) -> None:
    """The one or the other is first; there is never a network of nobody."""
    outcomes: Counter[str] = Counter()
    for turn in range(6):
        top = place.tenants()
        leaf = f"{top}-a-x"

        def act(number: int, top: str = top, leaf: str = leaf, turn: int = turn) -> Any:
            if number == 0:
                with place.client(f"{top}-own") as mine:
                    return mine.delete("tenant", leaf, cascade=bool(turn % 2))
            with place.client(f"{leaf}-own") as client:
                return client.apply(manifest(**{f"{leaf}-{number}": network(tenant=leaf)}))

        got = at_once(act, 6)
        with place.operator() as operator:
            left = [one for one in operator.list("network") if one["path"].startswith(leaf)]
            there = [one for one in operator.list("tenant") if one["name"] == leaf]
        made = [one for one in got[1:] if isinstance(one, dict)]
        if there:
            assert isinstance(got[0], Conflict)
            assert {one["tenant"] for one in left} == {leaf}
            assert len(left) == len(made)
            outcomes["stayed"] += 1
        else:
            assert set(got[0]) == {"revision", "token"}
            assert left == []
            outcomes["gone"] += 1
        assert all(isinstance(one, dict | Forbidden | Unauthenticated) for one in got[1:]), got
    assert outcomes["gone"], outcomes
    with closing(sqlite3.connect(place.controller.db)) as base:
        assert base.execute("PRAGMA foreign_key_check").fetchall() == []


def test_deleting_a_tenant_against_granting_it_hosts(place: Place) -> None:
    """The one or the other is first; there is never a grant to nobody."""
    outcomes: Counter[str] = Counter()
    for turn in range(6):
        top = place.tenants()
        low, leaf = f"{top}-a", f"{top}-a-x"
        hosts = {"p0": {"segment": "s", "host": "m1", "hosts": True}}
        with place.client(f"{low}-own") as mine:
            mine.apply(manifest(**{low: {**network(0), "ports": hosts}}))

        def act(number: int, top: str = top, low: str = low, leaf: str = leaf, turn: int = turn) -> Any:
            with place.client(f"{top}-own" if number == 0 else f"{low}-own") as mine:
                if number == 0:
                    return mine.delete("tenant", leaf, cascade=bool(turn % 2))
                return mine.grant(low, leaf, None, {"networks": number})

        got = at_once(act, 4)
        with place.operator() as operator:
            there = [one for one in operator.list("tenant") if one["name"] == leaf]
            given = [one for one in operator.grants() if one["network"] == low]
        gone = isinstance(got[0], dict)
        assert bool(there) != gone
        assert [one["tenant"] for one in given] in ([], [leaf])
        assert not (gone and given)
        assert all(isinstance(one, dict | NotFound | Forbidden) for one in got[1:]), got
        outcomes["gone" if gone else "stayed"] += 1
    assert outcomes["gone"], outcomes
    with closing(sqlite3.connect(place.controller.db)) as base:
        assert base.execute("PRAGMA foreign_key_check").fetchall() == []


class Away(Exception):
    """The controller ends here."""


def test_a_cascade_that_was_cut_off_anywhere_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks again, with the same key or without one, finishes it."""
    monkeypatch.setattr(deletion, "PART", 4)
    owner = Scope(frozenset({"t"}), frozenset({"t"}))
    store.make_tenant("t")
    store.make_token("t-own", tenants={"t": "owner"})
    store.make_tenant("t-b", "t")
    store.make_token("t-b-own", tenants={"t-b": "owner"})
    store.apply(parse(manifest(**{"t-b": network(5, tenant="t-b")})))
    for steps in count(1):
        asked = Asked("token:t-own", "t", f"key {steps}" if steps % 2 else None, scope=owner)
        for name, up in (("t-a", "t"), ("t-a-x", "t-a"), ("t-a-x-y", "t-a-x"), ("t-a-z", "t-a")):
            store.make_tenant(name, up)
        for name in ("t-a", "t-a-x-y"):
            store.apply(parse(manifest(**{name: network(5, tenant=name), f"{name}-2": {"tenant": name}})))
            store.make_token(f"{name}-own", tenants={name: "owner"})
        left, real = [steps], store._database.transact

        def cut(work: Any, left: list[int] = left, real: Any = real) -> Any:
            if not left[0]:
                raise Away
            left[0] -= 1
            return real(work)

        with monkeypatch.context() as patch:
            patch.setattr(store._database, "transact", cut)
            try:
                store.delete("tenant", "t-a", True, asked)
                whole = True
            except Away:
                whole = False
        if not whole:
            assert store.get("tenant", "t-a")["suspended"], "nothing new comes into what is half gone"
            gone = store.delete("tenant", "t-a", True, asked)
            if asked.key:
                assert store.delete("tenant", "t-a", True, asked) == gone
        assert [one["name"] for one in store.list("tenant")[0]] == ["t", "t-b"]
        assert {one["path"] for one in store.list("network")[0]} == {"t-b"}
        assert {one["name"] for one in store.tokens()} == {"t-own", "t-b-own"}
        if whole:
            break
    assert steps > 7, f"{steps}: it was cut off after each of its transactions"


@pytest.mark.parametrize("when", [2, 3])
def test_what_the_operator_puts_in_while_it_goes_is_seen(
    store: Store, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """A cascade of three transactions: it begins, takes the network, ends the tenant. Suspension stops the operator
    from nothing; what he makes in between is taken along."""
    store.make_tenant("t")
    store.apply(parse(manifest(first=network(tenant="t"))))
    real, turns, made = store._database.transact, count(1), []

    def meanwhile(work: Any) -> Any:
        if next(turns) == when:
            made.append(store.apply(parse(manifest(late=network(tenant="t")))).revision)
        return real(work)

    monkeypatch.setattr(store._database, "transact", meanwhile)
    store.delete("tenant", "t", True)
    assert len(made) == 1
    assert store.list("tenant")[0] == []
    assert store.list("network")[0] == []


# ---- tokens


def test_owners_issue_list_and_revoke_tokens_below(place: Place) -> None:
    top = place.tenants()
    low, leaf = f"{top}-a", f"{top}-a-x"
    with place.client(f"{top}-own") as mine, place.client(f"{low}-own") as client, place.operator() as operator:
        made = mine.make_token(f"{low}-ci", tenants={low: "owner"}, key="k")
        assert mine.make_token(f"{low}-ci", tenants={low: "owner"}, key="k") == made
        wide = mine.make_token(f"{top}-wide", tenants={top: "reader", low: "owner", leaf: "reader"})
        assert wide["tenants"] == {top: "reader", low: "owner", leaf: "reader"}
        own = client.make_token(f"{low}-mine", tenants={low: "reader", leaf: "owner"})
        assert own["by"] == f"token:{low}-own"
        listed = {one["name"]: one for one in client.tokens()}
        assert set(listed) == {f"{low}-own", f"{low}-ci", f"{top}-wide", f"{low}-mine", f"{leaf}-own"}
        assert listed[f"{top}-wide"]["tenants"] == {low: "owner", leaf: "reader"}, "of others nothing is told"
        assert {name: one["by"] for name, one in listed.items() if name != f"{low}-mine"} == dict.fromkeys(
            set(listed) - {f"{low}-mine"}, "parent"
        )
        assert listed[f"{low}-mine"]["by"] == f"token:{low}-own"
        assert {one["name"]: one["by"] for one in mine.tokens()}[f"{low}-ci"] == f"token:{top}-own"
        with place.client(f"{leaf}-own") as deep:
            assert {one["name"]: one["by"] for one in deep.tokens()} == {
                f"{leaf}-own": "parent", f"{top}-wide": "parent", f"{low}-mine": "parent"
            }  # fmt: skip
        for hidden in (f"{top}-own", f"{top}-read", f"{top}-wide", "absent"):  # the third is seen, and not theirs alone
            with pytest.raises(NotFound) as refused:
                client.revoke(hidden)
            assert str(refused.value) == f"token {hidden} does not exist"
        client.revoke(f"{low}-ci")
        place.keep("ci", made)
        with pytest.raises(Unauthenticated), place.client("ci") as ended:
            ended.status()
        mine.revoke(f"{low}-mine")
        operator.revoke(f"{top}-wide")


def test_what_no_owner_may_issue(place: Place) -> None:
    top, other = place.tenants(), place.tenants()
    low = f"{top}-a"
    with place.client(f"{low}-own") as client, place.client(f"{top}-own") as mine:
        for everything in ("reader", "owner"):
            with pytest.raises(Forbidden, match="the operator's"):
                client.make_token(f"{low}-all", everything=everything)
        answers = set()
        for hidden in (top, other, "absent"):
            with pytest.raises(NotFound) as refused:
                client.make_token(f"{low}-x", tenants={hidden: "reader", low: "reader"})
            answers.add(str(refused.value).replace(hidden, "it"))
        assert answers == {"tenant it does not exist"}
        for name, tenant in (("x", low), (f"{top}-x", low), (low, low), (f"{low}-x-t", low)):
            with pytest.raises(Invalid, match="has to be called"):
                client.make_token(name, tenants={tenant: "reader"})
        with pytest.raises(Conflict, match="already"):
            client.make_token(f"{low}-own", tenants={low: "reader"})
        mine.make_tenant(f"{top}-b")
        for name in (f"{low}-wide", f"{top}-b-wide"):  # Each of the two would learn of the other.
            with pytest.raises(Invalid, match=f"has to be called {top}-SOMETHING"):
                mine.make_token(name, tenants={low: "reader", f"{top}-b": "reader"})
        mine.make_token(f"{top}-all", tenants={low: "reader", f"{top}-b": "reader"})
        with place.operator() as operator:
            place.keep("roots", operator.make_token(f"roots-of-{top}", tenants={top: "owner", other: "owner"}))
        with place.client("roots") as roots, pytest.raises(Invalid, match="make a token for each"):
            roots.make_token(f"{top}-two", tenants={top: "reader", other: "reader"})
        with place.client(f"{top}-read") as reader, pytest.raises(Forbidden):
            reader.make_token(f"{top}-x", tenants={top: "reader"})
        half = mine.make_token(f"{top}-half", tenants={top: "reader", low: "owner"})
        place.keep("half", half)
        with place.client("half") as one, pytest.raises(Forbidden, match="above it"):
            one.make_token(f"{top}-more", tenants={top: "reader"})
        body = {"name": f"{low}-x", "tenants": {"n" * 64: "owner"}}
        assert place.ask(f"{low}-own", "POST", "/v1/tokens", json=body).status_code == 422


def test_a_token_outlives_none_that_asked_for_it(place: Place) -> None:
    top = place.tenants()
    with place.client(f"{top}-own") as mine:
        brief = mine.make_token(f"{top}-brief", tenants={top: "owner"}, ttl=600)
        place.keep("brief", brief)
    with place.client("brief") as client:
        for ttl in (None, 10_000.0):
            made = client.make_token(f"{top}-from-{ttl or 0:.0f}", tenants={f"{top}-a": "owner", top: "owner"}, ttl=ttl)
            assert made["until"] == brief["until"]
        assert client.make_token(f"{top}-short", tenants={top: "owner"}, ttl=1)["until"] < time.time() + 2


def test_a_stream_ends_when_its_token_is_for_less(place: Place) -> None:
    """A tenant of the same name that somebody makes later is another one."""
    top = place.tenants()
    with place.client(f"{top}-own") as mine:
        place.keep("two", mine.make_token(f"{top}-a-two", tenants={f"{top}-a": "reader", f"{top}-a-x": "reader"}))
        with place.client("two") as client:
            lines = client._lines("/v1/watch", {})
            next(lines)
            mine.delete("tenant", f"{top}-a-x", True)
            begun = time.monotonic()
            for _ in lines:  # one every 5 s at least
                assert time.monotonic() - begun < 30
            assert [one["name"] for one in client.list("tenant")] == [f"{top}-a"]


# ---- manifests


def test_a_manifest_of_an_owner_declares_what_is_below(place: Place) -> None:
    top, other = place.tenants({"ports": 20}), place.tenants()
    low, leaf = f"{top}-a", f"{top}-a-x"
    with place.client(f"{top}-own") as mine, place.client(f"{low}-own") as client, place.operator() as operator:

        def of(**tenants: Any) -> dict[str, Any]:
            return {**manifest(), "tenants": {name.replace("_", "-"): spec for name, spec in tenants.items()}}

        wanted = of(**{top: {}, low: {"quota": {"ports": 5}}, f"{top}_b": {}, f"{top}_b_c": {"parent": f"{top}-b"}})
        plan = mine.plan(wanted)["changes"]
        assert [(one["op"], one["path"]) for one in plan] == [("~", low), ("+", f"{top}-b"), ("+", f"{top}-b-c")]
        mine.apply(wanted)
        assert mine.plan(wanted)["changes"] == []
        shown = {one["name"]: (one["parent"], one["quota"]["ports"]) for one in mine.list("tenant")}
        assert shown == {top: (None, 20), low: (top, 5), leaf: (low, None), f"{top}-b": (top, None),
                         f"{top}-b-c": (f"{top}-b", None)}  # fmt: skip
        client.apply(of(**{low: {}, leaf: {"parent": low, "quota": {"ports": 2}}}))
        assert operator.get("tenant", low)["parent"] == top, "what its own file leaves out stays"
        before = operator.status()["revision"]
        refusals: list[tuple[type[NestnetError], str, dict[str, Any]]] = [
            (Forbidden, "above it", of(**{low: {"quota": {"ports": 6}}})),
            (Forbidden, "above it", of(**{low: {"quota": {}}})),
            (Forbidden, "the operator's to change", of(**{leaf: {"parent": leaf}})),
            (Forbidden, "the operator's to change", of(**{low: {"parent": leaf}})),
            (Invalid, "has to be called", of(fresh={})),
            (Invalid, "has to be called", of(**{other: {}})),
            (Invalid, "has to be called", of(**{top: {"parent": low}})),
            (Invalid, "has to be called", of(**{f"{low}_q": {"parent": f"{low}-q-q"}, f"{low}_q_q": {"parent": low}})),
            (Exhausted, f"tenant {low} may have 5 ports", of(**{f"{low}_w": {"quota": {"ports": 4}}})),
            (Forbidden, "another tenant's", manifest(n={"tenant": leaf})),
            (Forbidden, "another tenant's", {**of(**{f"{low}_v": {}}), **manifest(n={"tenant": f"{low}-v"})}),
        ]
        for refused, text, given_ in refusals:
            with pytest.raises(refused, match=text):
                client.apply(given_)
        for question in ({"parent": "NAME"}, {"parent": "NAME", "quota": {}}):
            answers = set()
            for name in (top, other, "absent"):
                for one in (low, leaf, f"{low}-new"):
                    spec = {key: name if value == "NAME" else value for key, value in question.items()}
                    with pytest.raises(NestnetError) as error:
                        client.apply({**manifest(), "tenants": {one: spec}})
                    answers.add(str(error.value).replace(name, "it"))
            assert answers == {"there is no tenant it"}
        assert operator.status()["revision"] == before
        both = set()
        for name in (other, "absent"):
            with pytest.raises(Forbidden) as forbidden:
                client.apply(manifest(n={"tenant": name}))
            both.add(str(forbidden.value))
        assert len(both) == 1, "a network's tenant is no question, either"
        with pytest.raises(Forbidden), place.client(f"{top}-read") as reader:
            reader.apply(of(**{f"{top}_r": {"parent": top}}))


# ---- the command


def test_the_command(place: Place, tmp_path: Path) -> None:
    top = place.tenants({"ports": 20})

    def run(token: str, *arguments: str) -> tuple[int, str, str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("NESTNET")}
        env |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NESTNET_TOKEN": place.tokens[token]}
        env["NESTNET_CONTROLLER"] = place.controller.url
        done = subprocess.run([sys.executable, "-m", "nestnet", *arguments], capture_output=True, check=False,
                              text=True, cwd=tmp_path, env=env, timeout=60)  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    own = f"{top}-own"
    made = run(own, "tenant", "create", f"{top}-b", "--networks", "3", "--ports", "4")
    assert made == (0, "", f"tenant {top}-b is made, below {top}\n")
    assert run(own, "tenant", "set", f"{top}-b", "--networks", "none", "--segments", "2", "--rate", "5gbit") == (
        0, "", f"tenant {top}-b may have any number of networks, 2 segments, 4 ports, a rate of 5gbit\n"
    )  # fmt: skip
    code, token, _ = run(own, "token", "create", f"{top}-b-ci", "--tenant", f"{top}-b=owner")
    assert code == 0
    place.tokens["made"] = token.strip()
    with place.operator() as operator:
        operator.grant(None, f"{top}-b")
    with place.client("made") as client:
        client.apply(manifest(**{f"{top}-b": network(2, rate="1mbit")}))
    assert run(own, "tenant", "suspend", f"{top}-b")[2] == f"tenant {top}-b is suspended\n"
    code, table, _ = run(own, "get", "tenants", "-o", "wide")
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["NAME", "PARENT", "SUSPENDED", "NETWORKS", "SEGMENTS", "PORTS", "RATE", "ID"]
    shown = [f"{top}-b", top, "yes", "1", "1", "of", "2", "2", "of", "4", "2mbit", "of", "5gbit"]
    assert shown in [row[:-1] for row in rows]
    (tmp_path / "more.yaml").write_text(json.dumps(manifest(**{f"{top}-b": network(1)})))
    code, _, said = run("made", "apply", "more.yaml", "--no-wait")
    assert code == 1
    assert f"tenant {top}-b is suspended" in said
    assert run(own, "tenant", "resume", f"{top}-b")[2] == f"tenant {top}-b is resumed\n"
    for arguments, wrong in (
        (("tenant", "set", f"{top}-b"), "give at least one of --networks, --segments, --ports, --rate"),
        (("tenant", "set", f"{top}-b", "--ports", "x"), "--ports is a number, or none"),
    ):
        code, _, said = run(own, *arguments)
        assert code == 2
        assert wrong in said
    with place.operator() as operator, place.client(own) as mine:  # Whom `delete` waits for, as far as they are seen.
        assert _concerned(operator, "tenant", top) == {"m1"}
        assert _concerned(mine, "tenant", f"{top}-b") == set()
    code, _, said = run(own, "delete", "tenant", f"{top}-b")
    assert (code, "has 1 networks and 1 grants; --cascade deletes them" in said) == (1, True)
    code, _, said = run(own, "delete", "tenant", f"{top}-b", "--cascade")
    assert code == 0, said
    assert f"tenant {top}-b deleted" in said


def test_the_operator_gives_tenants_any_name_and_parent(store: Store) -> None:
    store.make_tenant("a", quota=Quota(networks=2))
    store.make_tenant("b", "a", Quota(networks=2))
    assert store.get("tenant", "b")["parent"] == "a"
    with pytest.raises(NotFound):
        store.make_tenant("c", "nobody")
    revision, changed = store.set_tenant("b", {"networks": 1}, True)
    assert (changed["quota"]["networks"], changed["suspended"], revision) == (1, True, store.revision)


def test_diagnostics_tell_no_secret_and_of_nobody_else(place: Place, tmp_path: Path) -> None:
    """What `doctor` and `status` print, and the log of the controller, which people send around."""
    top, other = place.tenants(), place.tenants()
    with place.client(f"{top}-own") as mine, place.operator() as operator:
        mine.apply(manifest(**{top: network()}))
        operator.apply(manifest(**{f"{other}-hidden": {"tenant": other, **network()}}))
        invitation = operator.invite_tenant(None)["invitation"]
        joining = operator.let_join("m7", 60)["token"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("NESTNET")}
    env |= {"PYTHONPATH": str(ROOT), "NESTNET_TOKEN": place.tokens[f"{top}-own"], "COLUMNS": "200"}
    env["NESTNET_CONTROLLER"] = place.controller.url
    for command in ("doctor", "status"):
        done = subprocess.run([sys.executable, "-m", "nestnet", command], capture_output=True, check=False,
                              text=True, cwd=tmp_path, env=env, timeout=60)  # fmt: skip
        said = done.stdout + done.stderr
        assert said
        assert other not in said
        assert "192.0.2." not in said, "addresses of machines are below"
        assert place.tokens[f"{top}-own"] not in said
    log = place.controller.log.read_text()
    for secret in (invitation, joining, *place.tokens.values()):
        assert secret.split("_", 1)[1][:40] not in log
