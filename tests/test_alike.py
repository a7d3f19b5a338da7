"""Nobody sees up: a tenant is answered the same, byte for byte, on the wire and five networks up, by every route.

                                     k1, k2           acme's hosts
    k1, k2   acme's hosts            west             tenant west, encapsulated
                                     south            tenant south
                                     east             tenant east
                                     north            tenant north
    machines k1, k2                  machines m1, m2

Ids, ETags, tokens, MACs and times are other ones in each store; each is replaced by the place at which it was first
seen, so what is equal stays equal. All else has to be the same, headers and errors too, and how many statements the
store was asked: the time that an answer takes hangs on that. Meanwhile those below change what is theirs.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import pytest
from test_api import Controller, manifest
from test_workloads import until

from nestnet.api.client import Client, Credentials

LEVELS = ("north", "east", "south", "west")


@dataclass
class World:
    """A controller with acme's two hosts, its tokens, and what those below can do that must not be seen."""

    controller: Controller
    clients: dict[str, Client]
    below: Callable[[int], None]
    alive: Callable[[], None]
    lose: Callable[[], None]
    heard: float = field(default_factory=time.monotonic)
    said: list[str] = field(default_factory=list)
    statements: list[tuple[str, str]] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)

    def ask(self, operation: str, who: str = "owner", /, **more: Any) -> Any:
        """Ask as acme, keep what was answered, and return its body if it is JSON."""
        method, path = operation.split(" ")
        if time.monotonic() - self.heard > 3:  # Whoever says nothing is lost.
            self.alive()
            self.heard = time.monotonic()
        http = self.clients[who]._http
        if path in ("/v1/watch", "/v1/events", "/v1/feed"):
            return self._stream(http, method, path, more)
        response = http.request(method, path, **more)
        text = "" if path == "/v1/authority" else response.text  # the store's own certificate
        self._keep(operation, response, text)
        return response.json() if "json" in response.headers.get("content-type", "") else None

    def _stream(self, http: httpx2.Client, method: str, path: str, more: dict[str, Any]) -> str | None:
        """As far as the first token."""
        with http.stream(method, path, **more) as response:
            lines = []
            if response.headers["content-type"].startswith("application/x-ndjson"):
                for line in response.iter_lines():
                    lines.append(line)
                    if '"token"' in line:
                        break
            else:
                response.read()
                lines = [response.text]
            self._keep(f"{method} {path}", response, "\n".join(lines))
        found = re.search(r'"token": ?"([^"]+)"', lines[-1])
        return found[1] if found else None

    def _keep(self, operation: str, response: httpx2.Response, text: str) -> None:
        self.statements.append((self._plain(f"{operation} {response.status_code}"), response.headers["statements"]))
        headers = [f"{name}: {value}" for name, value in sorted(response.headers.items()) if name not in OF_TIME]
        self.said.append(self._plain("\n".join([operation, str(response.status_code), *headers, text])))

    def _plain(self, text: str) -> str:
        def known(found: re.Match[str]) -> str:
            return self.seen.setdefault(found[0], f"<{len(self.seen)}>")

        return OWN.sub(known, TIMES.sub(r'"\1":<time>', text))


OF_TIME = ("date", "content-length", "statements")  # times are not of one length
COUNTED = "import sys; sys.path.insert(0, 'tests'); import counted; counted.serve(*sys.argv[1:])"
TIMES = re.compile(r'"(time|made|until|reported|ends|at)": ?[0-9][0-9.e+-]*')
OWN = re.compile(
    r"\b(?:machine|tenant|network|segment|router|link|port|policy|grant|host)_[0-9a-z]{13}\b"  # ids
    r'|(?<=")[0-9a-z]{13}(?=")'  # ETags
    r"|\b(?:0[26])(?::[0-9a-f]{2}){5}\b"  # MACs that nestnet chooses
    r"|\bnn[a-z]_[A-Za-z0-9_-]{30,}|[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])"  # tokens, sealed and secret
)


def network(*hosts: str, **more: Any) -> dict[str, Any]:
    """A port k1, k2, ... on each of these hosts, which is a host."""
    ports = {f"k{place}": {"segment": "lan", "host": host, "hosts": True} for place, host in enumerate(hosts, 1)}
    return {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": ports, **more}


def lower(name: str, change: int) -> dict[str, Any]:
    """One of the networks below, after so many changes."""
    made = network(*(("m1", "m2") if name == LEVELS[0] else ("k1", "k2")), tenant=name, description=f"{change}")
    made["segments"][f"spare{change}"] = {"cidr": "10.9.0.0/24"}
    return {**made, "policies": [{"from": "any", "to": "any", "allow": "any", "priority": 100 + change}]}


def nested(names: tuple[str, ...]) -> dict[str, Any]:
    """Each in the one before; the hosts of the last carry by themselves."""
    if not names:
        return {}
    made = {**lower(names[0], 0), "networks": nested(names[1:])}
    return {names[0]: {**made, **({"carriage": "encapsulated"} if names[0] == "west" else {})}}


@contextmanager
def world(folder: Path, deep: bool) -> Iterator[World]:
    controller = Controller(folder, COUNTED)
    controller.start()
    try:
        with ExitStack() as stack:
            operator = stack.enter_context(Client(controller.url))
            names = ("m1", "m2") if deep else ("k1", "k2")
            for place, name in enumerate(names, 1):
                operator.join(name, f"192.0.2.{place}", mtu=1550 if deep else 1500)  # One more header is real.
            operator.apply({**manifest(), "tenants": {"acme": {}, "rival": {}}})
            levels = LEVELS if deep else ()
            operator.apply({**manifest(**nested(levels)), "tenants": {one: {} for one in levels}})

            def known(name: str, tenant: str, role: str) -> Client:
                token = operator.make_token(name, tenants={tenant: role})["token"]
                return stack.enter_context(Client(controller.url, credentials=Credentials(token), patience=0))

            owners = {one: known(f"{one}-own", one, "owner") for one in (*levels, "rival")}
            above, lowest = operator, None
            for tenant in levels:
                owners[tenant].redeem(above.invite_tenant(lowest)["invitation"])
                above, lowest = owners[tenant], tenant
            clients = {role: known(f"acme-{role}", "acme", role) for role in ("owner", "reader")}
            for client in (owners["rival"], clients["owner"]):
                client.redeem(above.invite_tenant(lowest)["invitation"])

            def below(change: int) -> None:
                for name in levels:
                    owners[name].apply(manifest(**{name: lower(name, change)}))
                owners["rival"].apply(manifest(rival=network("k1", description=f"{change}")))  # on the same hosts
                operator.make_tenant(f"other{change}")
                revision[0] = operator.status()["revision"]
                alive()

            revision = [operator.status()["revision"]]

            def alive() -> None:
                """As agents do."""
                for machine in operator.list("machine"):
                    operator.report(machine["id"], revision[0])

            def lose() -> None:
                """The agent of the second machine comes, and goes for good."""
                following = operator.feed(names[1])
                next(following)
                following.close()
                until(lambda: [one["state"] for one in operator.list("host")] == ["up", "down: lost"], "it is lost")

            alive()
            yield World(controller, clients, below, alive, lose)
    finally:
        controller.stop()


def ask_everything(world: World) -> None:
    """Every route, rightly and wrongly."""
    ask = world.ask
    own = network("k1", "k2")
    own["segments"]["far"] = {"cidr": "10.0.1.0/24"}
    own["routers"] = {"a": {"segments": ["lan"]}, "b": {"segments": ["far"]}}
    own["links"] = {"ab": {"between": ["a", "b"]}}
    own["ports"]["k3"] = {"segment": "far", "host": "k2"}
    own["policies"] = [{"from": "any", "to": "any", "allow": "any"}]
    inner = network("k1", "k2")

    def apply(wish: dict[str, Any], **more: Any) -> Any:
        ask("POST /v1/plan", json={"manifest": wish})
        return ask("POST /v1/apply", json={"manifest": wish}, **more)

    ask("GET /v1/openapi.json")
    ask("GET /v1/authority")
    ask("POST /v1/tenants", json={"name": "acme-low", "parent": "acme", "quota": {"networks": 3}})
    ask("POST /v1/tenants", json={"name": "west", "parent": "acme"})
    apply(manifest(acme=own), headers={"Idempotency-Key": "first"})
    apply(manifest(acme=own), headers={"Idempotency-Key": "first"})
    again = apply(manifest(acme=own))
    for wrong in (
        network("k1", "k3"),
        network("m1"),
        network("k1", mtu=9000),
        network("k1", mtu=1451),
        network("k1", tenant="rival"),
        network("k1", tenant="west"),
        network("k1", grant="hosts"),
        network("k1", carriage="encapsulated"),
        network("k1", underlay=6),
        {**own, "segments": {}},
        {**own, "networks": {"in": network("k3")}},
    ):
        for name in ("acme", "second"):
            ask("POST /v1/plan", json={"manifest": manifest(**{name: wrong})})
    apply(manifest(acme=network("k1", "k3")))
    world.below(1)
    ask("POST /v1/plan", json={"manifest": manifest(acme=own)}, headers={"If-Match": again["plan"]["etag"]})
    apply(manifest(acme={**own, "networks": {"in": inner}}), headers={"If-Match": f'"{again["plan"]["etag"]}"'})
    stale = {"If-Match": f'"{again["plan"]["etag"]}"'}
    ask("POST /v1/apply", json={"manifest": manifest(acme=network("k2", "k1"))}, headers=stale)
    ask_for_networks(ask)
    token = ask("GET /v1/watch")
    kinds = {"tenant": "acme", "network": "acme", "segment": "acme/lan", "router": "acme/a", "link": "acme/ab"}
    kinds |= {"port": "acme/k1", "policy": None, "machine": "k1"}
    for who in ("owner", "reader"):
        for kind, name in kinds.items():
            plural = "policies" if kind == "policy" else f"{kind}s"
            listed = ask(f"GET /v1/{plural}", who, params={"limit": 2})
            if name is None:
                name = listed["items"][0]["path"]
            if listed["items"]:
                ask(f"GET /v1/{plural}", who, params={"limit": 1, "cursor": listed["items"][0]["id"]})
                ask(f"GET /v1/{plural}/{listed['items'][0]['id']}", who)
            ask(f"GET /v1/{plural}", who, params={"network": "acme"})
            ask(f"GET /v1/{plural}", who, params={"network": "west"})
            for reference in (name, "west", "west/k1", "north/east", "m1", f"{kind}_0000000000000", "k1"):
                ask(f"GET /v1/{plural}/{reference}", who)
                ask(f"DELETE /v1/{plural}/{reference}", who, headers={"If-Match": '"0000000000000"'})
        for query in ({}, {"network": "acme"}, {"network": "west"}, {"limit": 1}):
            ask("GET /v1/hosts", who, params=query)
        for since in (None, again["token"], "A" * 43, token):
            ask("GET /v1/status", who, params={} if since is None else {"since": since})
        for port, to in (
            ("acme/k1", "10.0.0.3"),
            ("acme/k3", "10.0.0.2"),
            ("acme/in/k1", "10.0.0.3"),
            ("k1", "1.1.1.1"),
        ):
            ask("GET /v1/trace", who, params={"port": port, "to": to, "protocol": "tcp", "dport": "80"})
        ask("GET /v1/trace", who, params={"port": "west/k1", "to": "10.0.0.3"})
        for query in ({}, {"kind": "port"}, {"network": "acme"}, {"network": "west"}, {"since": "A" * 43}):
            ask("GET /v1/watch", who, params=query)
        ask("GET /v1/grants", who)
        ask("GET /v1/tokens", who)
        ask("GET /v1/tokens/acme-owner", who)
        ask("GET /v1/tokens/west", who)
        for operation in OTHERS:
            ask(operation, who, json={})
    # What can be changed, and whether anybody can.
    world.below(2)
    for port, change in (
        ("acme/k3", {"enabled": False}),
        ("acme/k3", {"attach": {"tap": "t"}}),
        ("west/k1", {"enabled": False}),
    ):
        ask(f"PATCH /v1/ports/{port}", json=change)
        ask(f"PATCH /v1/ports/{port}", json=change, headers={"If-Match": '"0000000000000"'})
    ask("PATCH /v1/links/acme/ab", json={"up": False})
    for name in ("acme", "west"):
        for change in (
            {"enabled": False},
            {"enabled": True},
            {"carrier": None},
            {"carrier": "west"},
            {"carrier": "acme"},
        ):
            ask(f"PATCH /v1/networks/{name}", json=change)
    for port, to in (("acme/k3", "k1"), ("acme/k3", "k9"), ("acme/k3", "m1"), ("acme/in/k1", "k2"), ("west/k1", "k2")):
        ask("POST /v1/move", json={"port": port, "to": to})
    for tenant in ("acme", "acme-low", "west", "acme-none"):
        ask(f"PATCH /v1/tenants/{tenant}", json={"quota": {"ports": 1}})
        ask(f"PATCH /v1/tenants/{tenant}", json={"suspended": False})
    for grant in (
        {"tenant": "acme-low"},
        {"tenant": "acme-low", "network": "acme", "hosts": ["k1"]},
        {"tenant": "rival", "network": "acme"},
        {"tenant": "west", "network": "west"},
        {"tenant": "acme-low", "network": "acme", "hosts": ["k1"], "quota": {"networks": 2, "ports": 10_000}},
        {"tenant": "acme-low", "network": "acme", "quota": {"networks": 2}},
    ):
        made = ask("POST /v1/grants", json=grant)
    ask(f"PATCH /v1/grants/{made['id']}", json={"suspended": True})
    for reference in (made["id"], "grant_0000000000000", "hosts"):
        ask(f"GET /v1/grants/{reference}")
        ask(f"PATCH /v1/grants/{reference}", json={"cut": False})
        ask(f"DELETE /v1/grants/{reference}")
    invited = ask("POST /v1/invitations", json={"network": "acme", "hosts": ["k2"]})
    ask("POST /v1/invitations", json={"network": "west"})
    ask("POST /v1/redeem", json={"invitation": invited["invitation"], "tenant": "acme"})
    ask("POST /v1/redeem", json={"invitation": "nng_" + "A" * 43})
    for name in ("acme-ci", "acme-reader", "west-x", "x"):
        ask("POST /v1/tokens", json={"name": name, "tenants": {"acme": "reader"}})
    ask("POST /v1/tokens", json={"name": "acme-x", "tenants": {"west": "reader"}})
    ask("DELETE /v1/tokens/acme-ci")
    ask("DELETE /v1/tokens/west")
    world.below(3)
    ask("GET /v1/watch", params={"since": token})
    ask("GET /v1/status")
    world.lose()
    for who in ("owner", "reader"):
        for path in ("hosts", "status", "networks", "networks/acme", "networks/acme/in", "ports", "ports/acme/in/k2"):
            ask(f"GET /v1/{path}", who)
    down = ask("GET /v1/ports/acme/k2")
    assert (down["state"], down["cause"]) == ("down: carrier", "what carries it is down")
    for path in (
        "ports/acme/k1",
        "segments/acme/far",
        "ports/acme/k3",
        "links/acme/ab",
        "routers/acme/a",
        "networks/acme",
    ):
        ask(f"DELETE /v1/{path}")
    ask("DELETE /v1/tenants/acme-low")
    ask("DELETE /v1/tenants/acme-low", params={"cascade": True})
    ask("DELETE /v1/networks/acme", params={"cascade": True})
    ask("DELETE /v1/networks/acme", params={"cascade": True})


def ask_for_networks(ask: Callable[..., Any]) -> None:
    """By lines: plain ones, one that goes by a plan, and wrong ones; they are deleted again."""
    segments = {"lan": {"cidr": "10.0.0.0/24"}}
    ports = {"a": {"segment": "lan", "host": "k1"}, "b": {"segment": "lan", "host": "k2"}}
    plain = {"segments": segments, "ports": ports}
    new: tuple[dict[str, Any], ...] = (
        {"name": "one", **plain},
        {"name": "one", **plain},
        {"name": "above", "carrier": "acme", **plain},
        {"name": "routed", "carrier": "acme", **plain, "routers": {"r": {"segments": ["lan"]}}},
        {"name": "two", "carrier": "west", **plain},
        {"name": "two", "carrier": "acme/west", **plain},
        {"name": "two", "carrier": "north/east", **plain},
        {"name": "west", **plain},
        {"name": "rival", **plain},
        {"name": "two", "tenant": "west"},
        {"name": "two", "tenant": "rival", "carrier": "acme"},
        {"name": "two", **plain, "ports": {"a": {"segment": "lan", "host": "m1"}}},
        {"name": "two", **plain, "ports": {"a": {"segment": "lan", "host": "k9"}}},
        {"name": "two", "segments": {"lan": {"cidr": "10.0.0.0"}}},
        {},
    )
    for who in ("owner", "reader"):
        for place, one in enumerate(new):
            ask("POST /v1/networks", who, json=one, headers={"Idempotency-Key": f"new {place}"})
            ask("POST /v1/networks", who, json=one, headers={"Idempotency-Key": f"new {place}"})
        for name in ("one", "acme/above", "acme/routed", "west", "rival"):
            ask(f"DELETE /v1/networks/{name}", who, params={"cascade": True})
        for place, one in enumerate((*new[2:], new[0])):
            lines = "\n".join(json.dumps(line) for line in (new[0], one))
            ask("POST /v1/batch", who, content=lines, headers={"Idempotency-Key": f"new lines {place}"})
            ask("POST /v1/batch", who, content=lines, headers={"Idempotency-Key": f"new lines {place}"})
            for name in ("one", "acme/above", "acme/routed", "west", "rival"):
                ask(f"DELETE /v1/networks/{name}", who, params={"cascade": True})
        ask("POST /v1/batch", who, content="")


OTHERS = (
    "GET /v1/events",
    "GET /v1/feed",
    "GET /metrics",
    "GET /v1/backup",
    "POST /v1/restore",
    "POST /v1/confirm",
    "POST /v1/machines",
    "PATCH /v1/machines/k1",
    "PUT /v1/machines/k1/status",
    "GET /v1/machines/k1/moves/1",
    "PUT /v1/machines/k1/moves/1",
    "POST /v1/machines/k1/certificate",
    "POST /v1/machines/k1/join-tokens",
    "POST /v1/join",
    "POST /v1/join-tokens",
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, World]:
    """On the wire, and deep; both have been asked everything."""
    found = []
    for deep in (False, True):
        with world(tmp_path_factory.mktemp("alike"), deep) as one:
            ask_everything(one)
            found.append(one)
    return found[0], found[1]


@pytest.fixture(scope="module")
def told(both: tuple[World, World]) -> tuple[list[str], list[str]]:
    return both[0].said, both[1].said


def test_every_route_is_asked(told: tuple[list[str], list[str]]) -> None:
    document = told[0][0].split("\n")
    assert document[0] == "GET /v1/openapi.json"
    asked = {text.split("\n")[0] for text in told[0]}
    for path, methods in json.loads(document[-1])["paths"].items():
        pattern = re.sub(r"\\{\w+\\}", ".+", re.escape(path))
        for method in methods:
            assert any(re.fullmatch(f"{method.upper()} {pattern}", each) for each in asked), (method, path)


def test_the_same_calls_have_the_same_answers_at_any_depth(told: tuple[list[str], list[str]]) -> None:
    for low, high in zip(*told, strict=True):
        assert low == high


def test_the_same_calls_take_as_many_statements_at_any_depth(both: tuple[World, World]) -> None:
    """A count is exact where a time is not: nestnet/bench/alike.py has the times. A move asks machines, or ports."""
    counted = [[one for one in world.statements if one[0].split()[1] != "/v1/move"] for world in both]
    for low, high in zip(*counted, strict=True):
        assert low == high


# ---- agents on ports

IDS = {"id", "network", "carrier", "segment", "host", "other", "trunk", "groups", "between"}
OTHERS_OF_ITS_OWN = {"mac", "vni", "token", "revision", "store"}


def lines_of_an_agent(world: World) -> list[str]:
    """What the agent on acme's first host is told in its life, its ids, MACs and VNIs by the place at which they were
    first seen: a snapshot, changes, and what happened while it was away. No id tells of what others make: they are not
    small, and do not rise."""
    said: list[str] = []
    seen: dict[tuple[str, Any], str] = {}
    ids: dict[str, list[int]] = defaultdict(list)

    def plain(data: Any, key: str = "") -> Any:
        if isinstance(data, dict):
            kind = data.get("kind", "")
            return {k: plain(v, kind if k == "value" else f"{kind or key} {k}".strip()) for k, v in data.items()}
        if isinstance(data, list):
            return [plain(one, key) for one in data]
        word = key.split()[-1]
        if data and word in IDS:
            ids[key].append(data)
        named = word in IDS | OTHERS_OF_ITS_OWN
        return seen.setdefault((key, data), f"<{len(seen)}>") if data and named else data

    def hear(lines: Iterator[dict[str, Any]]) -> str:
        """The next line that has rows, kept; its token. One of the first three: they come at least every 5 s."""
        for line in islice(lines, 3):
            if line.get("rows"):
                break
            assert line.keys() == {"revision", "token", "store", "confirmed"}
            assert line["revision"] == line["token"]
        assert line.get("rows")
        assert line["revision"] == line["token"]
        said.append(json.dumps(plain({**line, "rows": [*line["rows"]]})))
        return str(line["token"])

    acme = world.clients["owner"]

    def change(*ports: str) -> None:
        inner = {"segments": {"lan": {"cidr": "10.1.0.0/24"}, "far": {"cidr": "10.2.0.0/24"}}}
        inner |= {"carriage": "encapsulated", "links": {"rs": {"between": ["r", "s"]}}}
        inner["routers"] = {"r": {"segments": ["lan"]}, "s": {"segments": ["far"]}}
        inner["ports"] = {
            port: {"segment": "lan", "host": f"k{1 + place % 2}", "groups": ["g" if place else "h"]}
            for place, port in enumerate(ports)
        }
        inner["policies"] = [{"from": ["group:g", "segment:far"], "to": f"port:{ports[0]}", "allow": "any"}]
        acme.apply(manifest(acme={**network("k1", "k2"), "networks": {"in": inner}}))

    change(*"abmnopqrs")
    with Client(world.controller.url) as operator:
        agent = next(one["id"] for one in operator.list("port", "acme") if one["name"] == "k1")
        lines = operator.feed(agent, boot="one")
        hear(lines)
        for turn, ports in enumerate(("abcmn", "abm", "abdm"), 1):
            world.below(turn)
            change(*ports)
            token = hear(lines)
        lines.close()
        for turn, ports in ((4, "ad"), (5, "ad"), (6, "ad")):
            world.below(turn)
            change(*ports)
            lines = operator.feed(agent, token, boot="one")
            token = hear(lines)
            lines.close()
    told = {"machine", "network", "segment", "router", "link", "port", "policy", "group"}
    assert {key.split()[0] for key in ids} >= told
    assert min(number for numbers in ids.values() for number in numbers) > 1 << 32, "one in 2^31 is not"
    made = list(dict.fromkeys(ids["port id"]))
    assert len(made) > 10
    assert made != sorted(made)
    return said


def test_an_agent_on_a_port_is_told_the_same_at_any_depth(tmp_path: Path) -> None:
    """Meanwhile those below and beside change what is theirs."""
    told = []
    for deep in (False, True):
        folder = tmp_path / str(deep)
        folder.mkdir()
        with world(folder, deep) as one:
            told.append(lines_of_an_agent(one))
    for low, high in zip(*told, strict=True):
        assert low == high
