"""Who may do what: every route of the OpenAPI document, with every identity, over real TLS and a real socket.

A route that has no row in ROWS fails the test. What a row says is what each identity is answered, in this order:

    nobody   expired   reader   owner   other   agent   stranger   looker   admin       parent     child
    nothing  a token   of the   of the  of      of m1   the agent  a token  a token     owner of   owner of
    shown    that ran  tenant   tenant  another         of m2      to read  for         the one    one
             out       acme     acme    tenant                     all      everything  above acme below acme

What acme has is carried by what base has, and carries what guest has. Both are answered what any `other` is.

    low/       tenant base, identity carrier: granted its hosts m1 and m2 to acme and rival
      a/         tenant acme: granted its hosts to guest
        g/         tenant guest, identity carried
      b/         tenant rival
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from test_api import Controller, manifest

from nestnet.agent import credentials
from nestnet.api.client import Client, Credentials, trusted
from nestnet.model.errors import Conflict, Forbidden, NestnetError, NotFound, Unauthenticated, Unreachable

IDENTITIES = (
    "nobody",
    "expired",
    "reader",
    "owner",
    "other",
    "agent",
    "stranger",
    "looker",
    "admin",
    "parent",
    "child",
)
NEIGHBOURS = ("carrier", "carried")
SERVE = """
import sys
from pathlib import Path
from nestnet.api.server import serve
serve(Path(sys.argv[1]), [sys.argv[2], *sys.argv[3:4]], group="users", life=float(sys.argv[4]))
"""


class Secured(Controller):
    """A controller that also listens over TLS."""

    def __init__(self, folder: Path, life: float = 3600) -> None:
        super().__init__(folder, SERVE)
        room = Path(tempfile.mkdtemp(prefix="nestnet-"))  # pytest's own folders let nobody else in
        room.chmod(0o711)
        self.socket = room / "api.sock"
        self.url = f"unix:{self.socket}"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.https = f"https://127.0.0.1:{port}"
        self.more = [self.https, str(life)]

    def stop(self, how: int = signal.SIGTERM) -> int:
        try:
            return super().stop(how)
        finally:
            self.socket.unlink(missing_ok=True)
            self.socket.parent.rmdir()

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-c", self.code, str(self.db), self.url, *self.more]
            self.process = subprocess.Popen(command, stderr=log, cwd=Path(__file__).parent.parent)
        deadline = time.monotonic() + 30
        while True:
            with Client(self.url) as client, contextlib.suppress(Unreachable):
                client.status()
                return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)  # the pace of asking


@dataclass
class World:
    """Two tenants' networks on two machines, and somebody of each kind."""

    controller: Secured
    shown: dict[str, Credentials]
    ids: dict[str, str] = field(default_factory=dict)
    asking: dict[str, Client] = field(default_factory=dict)

    def client(self, identity: str) -> Client:
        return Client(self.controller.https, credentials=self.shown[identity], patience=0)

    def ask(self, identity: str, method: str, path: str, **more: Any) -> httpx2.Response:
        """What is answered. Of a stream only the beginning is read."""
        client = self.asking.get(identity) or self.asking.setdefault(identity, self.client(identity))
        with client._http.stream(method, path, **more) as response:
            if response.headers.get("content-type", "").startswith("application/x-ndjson"):
                next(response.iter_lines())
            else:
                response.read()
            return response


def network(tenant: str, **more: Any) -> dict[str, Any]:
    """Something of every kind."""
    return {
        "tenant": tenant,
        "segments": {"s": {"cidr": "10.0.0.0/24"}, "t": {"cidr": "10.0.1.0/24"}},
        "routers": {"r1": {"segments": ["s"]}, "r2": {"segments": ["t"]}},
        "links": {"l": {"between": ["r1", "r2"]}},
        "ports": {"p": {"segment": "s", "host": "m1", "hosts": True}, "q": {"segment": "t", "host": "m2"}},
        "policies": [{"from": "any", "to": "any", "allow": "any"}],
        **more,
    }


def whole(**networks: Any) -> dict[str, Any]:
    """A manifest of the operator's with networks in the one that carries them."""
    ports = {name: {"segment": "s", "host": name, "hosts": True} for name in ("m1", "m2")}
    low = {"tenant": "base", "segments": {"s": {"cidr": "10.0.0.0/24"}}, "ports": ports}
    return manifest(low={**low, **({"networks": networks} if networks else {})})


def guest(tenant: str, *names: str) -> dict[str, Any]:
    """A network with ports on p."""
    ports = {name: {"segment": "hidden", "host": "p"} for name in names}
    return {"tenant": tenant, "segments": {"hidden": {"cidr": "10.0.0.0/24"}}, "ports": ports}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("access")
    controller = Secured(folder)
    controller.start()
    shown = {}
    with Client(controller.url) as operator:
        for number, identity in enumerate(("agent", "stranger"), start=1):
            token = operator.let_join(f"m{number}", 60)["token"]
            spec = {"name": f"m{number}", "address": f"192.0.2.{number}"}
            credentials.join(controller.https, token, spec, folder / identity)
            shown[identity] = credentials.Own(folder / identity, print).credentials
        tree = {"upper": {}, "acme": {"parent": "upper"}, "acme-low": {"parent": "acme"}}
        networks = whole(a=network("acme", networks={"g": guest("guest", "x")}), b=network("rival"))
        operator.apply({**networks, "tenants": tree})
        operator.make_token("acme-taken", tenants={"acme": "reader"})
        operator.grant(None, "base")
        ids = {"grant": operator.grant("low", "acme")["id"]}
        operator.grant("low", "rival")
        operator.grant("low/a", "guest")
        asked: dict[str, dict[str, Any]] = {
            "expired": {"tenants": {"acme": "owner"}, "ttl": 0.001},
            "reader": {"tenants": {"acme": "reader"}},
            "owner": {"tenants": {"acme": "owner"}},
            "other": {"tenants": {"rival": "owner"}},
            "looker": {"everything": "reader"},
            "admin": {"everything": "owner"},
            "parent": {"tenants": {"upper": "owner"}},
            "child": {"tenants": {"acme-low": "owner"}},
            "carrier": {"tenants": {"base": "owner"}},
            "carried": {"tenants": {"guest": "owner"}},
        }
        for identity, wanted in asked.items():
            made = operator.make_token(identity, **wanted)
            shown[identity] = trusted(controller.https, made["token"])
        shown["nobody"] = Credentials(None, shown["admin"].authority)
        ids |= {kind: operator.get(kind, f"a/{name}")["id"] for kind, name in [("port", "p"), ("segment", "s")]}
        policy = next(iter(operator.list("policy", "low/a")))
        ids["policy"] = policy["path"].removeprefix("low/")
    made = World(controller, shown, ids)
    yield made
    for client in made.asking.values():
        client.close()
    controller.stop()


@dataclass(frozen=True)
class Row:
    """A request that means something, and changes nothing, and its answers in the order of IDENTITIES."""

    path: str
    answers: str
    body: Any = None
    query: Mapping[str, Any] = field(default_factory=dict)
    stale: bool = False  # with an ETag that nothing has: whoever may is told 412


# Lists have only what is in scope; what is out of it is not there.
LISTS = "401 401 200 200 200 403 403 200 200 200 200"
OF_ACME = "401 401 200 200 404 403 403 200 200 404 404"
CHANGES = "401 401 403 412 404 403 403 403 412 404 404"
OPERATOR = "401 401 403 403 403 403 403 403 {} 403 403"
LOOKERS = "401 401 403 403 403 403 403 200 200 403 403"
MACHINES = "401 401 403 403 403 {} 403 403 {} 403 403"
# acme as a tenant is for those above it; what is called as one of its own is there already.
ABOVE_ACME = "401 401 403 403 404 403 403 403 412 412 404"
TAKEN = "401 401 403 409 404 403 403 403 409 409 404"
STALE = OPERATOR.format(412)
REQUEST = credentials._new_key()[1]
LINES = ("reference:path", "reference")

TO_ABSENT = "401 401 403 404 404 403 403 403 404 404 404"

ROWS: dict[tuple[str, str], Row] = {
    ("get", "/v1/grants"): Row("/v1/grants", LISTS),
    ("get", "/v1/grants/{reference}"): Row("/v1/grants/absent", "401 401 404 404 404 403 403 404 404 404 404"),
    ("post", "/v1/grants"): Row("/v1/grants", TO_ABSENT, {"network": "a", "tenant": "absent"}),
    ("post", "/v1/invitations"): Row("/v1/invitations", TO_ABSENT, {"network": "absent"}),
    ("post", "/v1/redeem"): Row("/v1/redeem", TO_ABSENT, {"invitation": "nng_absent", "tenant": "acme"}),
    ("patch", "/v1/grants/{reference}"): Row("/v1/grants/absent", TO_ABSENT, {"cut": True}),
    ("delete", "/v1/grants/{reference}"): Row("/v1/grants/absent", TO_ABSENT),
    **{("get", f"/v1/{plural}"): Row(f"/v1/{plural}", LISTS) for plural in
       ("machines", "tenants", "networks", "segments", "routers", "links", "ports", "policies")},
    ("get", "/v1/hosts"): Row("/v1/hosts", OF_ACME, query={"network": "a"}),
    ("get", "/v1/machines/{reference}"): Row("/v1/machines/m1", "401 401 404 404 404 200 403 200 200 404 404"),
    ("get", "/v1/tenants/{reference}"): Row("/v1/tenants/acme", "401 401 200 200 404 403 403 200 200 200 404"),
    ("get", "/v1/networks/{reference}"): Row("/v1/networks/a", OF_ACME),
    ("get", "/v1/segments/{reference}"): Row("/v1/segments/a/s", OF_ACME),
    ("get", "/v1/routers/{reference}"): Row("/v1/routers/a/r1", OF_ACME),
    ("get", "/v1/links/{reference}"): Row("/v1/links/a/l", OF_ACME),
    ("get", "/v1/ports/{reference}"): Row("/v1/ports/a/p", OF_ACME),
    ("get", "/v1/policies/{reference}"): Row("/v1/policies/{policy}", OF_ACME),
    ("delete", "/v1/machines/{reference}"): Row("/v1/machines/m1", STALE, stale=True),
    ("delete", "/v1/tenants/{reference}"): Row("/v1/tenants/acme", ABOVE_ACME, stale=True),
    ("patch", "/v1/tenants/{reference}"): Row("/v1/tenants/acme", ABOVE_ACME, {"suspended": False}, stale=True),
    ("post", "/v1/tenants"): Row("/v1/tenants", TAKEN, {"name": "acme-low", "parent": "acme"}),
    ("delete", "/v1/networks/{reference}"): Row("/v1/networks/a", CHANGES, stale=True),
    ("delete", "/v1/segments/{reference}"): Row("/v1/segments/a/s", CHANGES, stale=True),
    ("delete", "/v1/routers/{reference}"): Row("/v1/routers/a/r1", CHANGES, stale=True),
    ("delete", "/v1/links/{reference}"): Row("/v1/links/a/l", CHANGES, stale=True),
    ("delete", "/v1/ports/{reference}"): Row("/v1/ports/a/q", CHANGES, stale=True),
    ("delete", "/v1/policies/{reference}"): Row("/v1/policies/{policy}", CHANGES, stale=True),
    ("patch", "/v1/links/{reference}"): Row("/v1/links/a/l", CHANGES, {"up": False}, stale=True),
    ("patch", "/v1/ports/{reference}"): Row("/v1/ports/a/q", CHANGES, {"attach": {}}, stale=True),
    ("patch", "/v1/networks/{reference}"): Row("/v1/networks/a", CHANGES, {"enabled": True}, stale=True),
    ("post", "/v1/move"): Row("/v1/move", CHANGES, {"port": "a/q", "to": "m1"}, stale=True),
    ("patch", "/v1/machines/{reference}"): Row("/v1/machines/m1", STALE, {"fenced": True}, stale=True),
    ("post", "/v1/plan"): Row("/v1/plan", "401 401 403 200 200 403 403 403 200 200 200", {"manifest": manifest()}),
    ("post", "/v1/apply"): Row("/v1/apply", "401 401 403 200 200 403 403 403 200 200 200", {"manifest": manifest()}),
    ("post", "/v1/networks"): Row("/v1/networks", TO_ABSENT, {"name": "n", "carrier": "absent"}),
    ("post", "/v1/batch"): Row("/v1/batch", TO_ABSENT, {"name": "n", "carrier": "absent"}),
    ("get", "/v1/status"): Row("/v1/status", LISTS),
    ("get", "/v1/trace"): Row("/v1/trace", OF_ACME, query={"port": "a/p", "to": "10.0.1.2"}),
    ("get", "/v1/watch"): Row("/v1/watch", OF_ACME, query={"network": "a"}),
    ("get", "/v1/events"): Row("/v1/events", LOOKERS),
    ("get", "/metrics"): Row("/metrics", LOOKERS),
    ("get", "/v1/backup"): Row("/v1/backup", OPERATOR.format(200)),
    ("post", "/v1/restore"): Row("/v1/restore", OPERATOR.format(422)),
    ("post", "/v1/confirm"): Row("/v1/confirm", OPERATOR.format(200)),
    ("post", "/v1/machines"): Row("/v1/machines", OPERATOR.format(200), {"name": "m2", "address": "192.0.2.2"}),
    ("get", "/v1/feed"): Row("/v1/feed", MACHINES.format(200, 200), query={"machine": "m1"}),
    ("put", "/v1/machines/{reference}/status"): Row(
        "/v1/machines/m1/status", MACHINES.format(204, 204), {"revision": 0}
    ),
    # Nothing moves: not there, for those who may ask.
    ("get", "/v1/machines/{reference}/moves/{port}"): Row("/v1/machines/m1/moves/1", MACHINES.format(404, 404)),
    ("put", "/v1/machines/{reference}/moves/{port}"): Row("/v1/machines/m1/moves/1", MACHINES.format(404, 404)),
    ("post", "/v1/machines/{reference}/certificate"): Row(
        "/v1/machines/m1/certificate", MACHINES.format(200, 403), {"request": REQUEST}
    ),
    ("post", "/v1/machines/{reference}/join-tokens"): Row(
        "/v1/machines/m1/join-tokens", MACHINES.format(404, 404), {"port": 999}
    ),
    # Of all who ask, only a join token is asked for here.
    ("post", "/v1/join"): Row(
        "/v1/join", " ".join(["401"] * 11), {"name": "m9", "address": "192.0.2.9", "request": REQUEST}
    ),
    ("get", "/v1/authority"): Row("/v1/authority", "200 401 200 200 200 200 200 200 200 200 200"),
    ("get", "/v1/tokens"): Row("/v1/tokens", "401 401 403 200 200 403 403 403 200 200 200"),
    ("get", "/v1/tokens/{name}"): Row("/v1/tokens/owner", "401 401 403 200 404 403 403 403 200 200 404"),
    ("post", "/v1/tokens"): Row("/v1/tokens", TAKEN, {"name": "acme-taken", "tenants": {"acme": "owner"}}),
    ("delete", "/v1/tokens/{name}"): Row("/v1/tokens/none", "401 401 403 404 404 403 403 403 404 404 404"),
    ("post", "/v1/join-tokens"): Row("/v1/join-tokens", OPERATOR.format(200), {"machine": "m8"}),
}  # fmt: skip


def document(world: World) -> dict[str, Any]:
    response = world.ask("nobody", "GET", "/v1/openapi.json")
    found: dict[str, Any] = response.json()
    return found


def operations(world: World) -> set[tuple[str, str]]:
    return {(method, path) for path, methods in document(world)["paths"].items() for method in methods}


def test_every_route_has_a_row(world: World) -> None:
    assert operations(world) == set(ROWS)


@pytest.mark.parametrize("identity", [*IDENTITIES, *NEIGHBOURS])
@pytest.mark.parametrize("operation", ROWS, ids=lambda operation: f"{operation[0]} {operation[1]}")
def test_the_matrix(world: World, operation: tuple[str, str], identity: str) -> None:
    row = ROWS[operation]
    known = "other" if identity in NEIGHBOURS else identity
    wanted = dict(zip(IDENTITIES, map(int, row.answers.split()), strict=True))[known]
    headers = {"If-Match": '"0000000000000"'} if row.stale else {}
    body = {} if row.body is None else {"json": row.body}
    path = row.path.format(**world.ids)
    response = world.ask(identity, operation[0].upper(), path, params=row.query, headers=headers, **body)
    assert response.status_code == wanted, response.text
    if wanted == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["code"] == "unauthenticated"


GRANTS = {
    "get": "401 401 200 200 404 403 403 200 200 404 404 200 404",
    "patch": "401 401 403 404 404 403 403 403 200 404 404 200 404",
    "delete": "401 401 403 404 404 403 403 403 409 404 404 409 404",
}


@pytest.mark.parametrize("identity", [*IDENTITIES, *NEIGHBOURS])
@pytest.mark.parametrize("method", GRANTS)
def test_a_grant_is_there_for_who_gave_it_and_who_has_it(world: World, method: str, identity: str) -> None:
    """And only who gave it changes it."""
    wanted = dict(zip((*IDENTITIES, *NEIGHBOURS), map(int, GRANTS[method].split()), strict=True))[identity]
    body = {"json": {"suspended": False}} if method == "patch" else {}
    response = world.ask(identity, method.upper(), f"/v1/grants/{world.ids['grant']}", **body)
    assert response.status_code == wanted, response.text


def test_other_methods_are_nobodys(world: World) -> None:
    """Not even for the operator: what the document does not have is not there."""
    for path, methods in document(world)["paths"].items():
        concrete = re.sub(r"{\w+}", "x", path)
        for method in {"get", "put", "post", "patch", "delete"} - methods.keys():
            status = world.ask("admin", method.upper(), concrete, json={"fenced": False}).status_code
            # A path of several parts is also that of an object called so: there it is looked for in vain.
            assert status in (404, 405), (method, path, status)


def test_what_cannot_be_seen_is_not_there(world: World) -> None:
    """Not a byte tells an object of another tenant from one that does not exist."""
    for kind, plural, theirs, none in (
        ("port", "ports", "b/p", "c/p"),
        ("segment", "segments", "b/s", "c/s"),
        ("network", "networks", "b", "c"),
        ("tenant", "tenants", "rival", "nobody"),
        ("link", "links", "b/l", "c/l"),
    ):
        with Client(world.controller.url) as operator:
            by_id = operator.get(kind, theirs)["id"]
        missing = by_id[:-1] + ("0" if by_id[-1] != "0" else "1")
        for there, absent in ((theirs, none), (by_id, missing)):
            for method in ("GET", "DELETE"):
                answers = []
                for reference in (there, absent):
                    response = world.ask("owner", method, f"/v1/{plural}/{reference}")
                    assert response.status_code == 404
                    answers.append(response.text.replace(f"{kind} {reference}", "it"))
                assert answers[0] == answers[1]


def test_lists_are_of_what_is_in_scope(world: World) -> None:
    for identity in ("reader", "owner"):
        with world.client(identity) as client:
            assert {port["path"] for port in client.list("port")} == {"a/p", "a/q"}
            assert [one["name"] for one in client.list("tenant")] == ["acme", "acme-low"]
            assert [one["path"] for one in client.list("network")] == ["a"]
            assert {one["network"] for one in client.list("policy")} == {"a"}
            assert list(client.list("machine")) == []  # They are the operator's; to others hosts like any others.
            assert {"m1", "m2"} <= {one["name"] for one in client.list("host")}
            assert {one["address"] for one in client.status()["machines"]} == {None}
    with world.client("looker") as client:
        assert {port["path"] for port in client.list("port")} == {
            "low/m1", "low/m2", "low/a/p", "low/a/q", "low/a/g/x", "low/b/p", "low/b/q",
        }  # fmt: skip
        assert client.get("machine", "m1")["address"] == "192.0.2.1"


def test_an_apply_stays_in_scope(world: World) -> None:
    with world.client("owner") as client, Client(world.controller.url) as operator:
        revision = operator.status()["revision"]
        plan = client.plan(manifest(n={"segments": {"s": {"cidr": "10.9.0.0/24"}}}))
        assert plan["changes"][0]["fields"]["tenant"] == "acme"
        for refused, text, given in (
            (Forbidden, "another tenant's", manifest(n=network("rival"))),
            (Forbidden, "another tenant's", manifest(n=network("fresh"))),
            (Conflict, "is taken", manifest(b=network("acme"))),
            (Conflict, "is taken", manifest(b={})),
            (Forbidden, "machine m1", {**manifest(), "machines": {"m1": {"address": "192.0.2.77"}}}),
            (Forbidden, "tenant acme", {**manifest(), "tenants": {"acme": {"quota": {"networks": 1}}}}),
        ):
            with pytest.raises(refused, match=text):
                client.apply(given)
        assert operator.status()["revision"] == revision
        client.apply(manifest(n={"segments": {"s": {"cidr": "10.9.0.0/24"}}}))
        client.apply(manifest(a=network("acme")), prune=True)
        assert {one["path"] for one in operator.list("network")} == {"low", "low/a", "low/a/g", "low/b"}


def test_what_a_tenant_carries_of_others_is_not_told_and_not_taken_along(world: World) -> None:
    with world.client("owner") as client, Client(world.controller.url) as operator:
        operator.apply(whole(a=network("acme", networks={"guest": guest("rival", "x")})))
        for refused, text, given in (
            (Conflict, "1 networks of other tenants", manifest(a=network("acme", networks={}))),
            (Conflict, "is taken", manifest(a=network("acme", networks={"guest": guest("rival", "x")}))),
        ):
            with pytest.raises(refused, match=text) as error:
                client.apply(given)
            assert "hidden" not in str(error.value)
        closed = network("acme", policies=[{"from": "any", "to": "any", "deny": "any"}])
        plan = client.plan(manifest(a=closed))
        assert "guest" not in json.dumps(plan)
        assert "1 networks of other tenants" in json.dumps(plan["disturbs"])
        with pytest.raises(Conflict, match="1 networks of other tenants"):
            client.delete("network", "a", cascade=True)
        assert [one["path"] for one in client.list("network")] == ["a"]
        with world.client("other") as rival:
            assert rival.get("network", "guest")["tenant"] == "rival"
            told = rival.trace("guest/x", "10.0.0.9")
            assert told["reason"] == "arp_unknown"
            assert {step["layer"] for step in told["steps"]} == {"guest"}
        operator.apply(whole(a=network("acme", networks={"g": guest("guest", "x")})))


def test_a_port_moves_to_what_its_owner_sees(world: World) -> None:
    """What carries the network is another tenant's: its hosts are not there."""
    with world.client("other") as client, Client(world.controller.url) as operator:
        operator.apply(whole(a=network("acme", networks={"guest": guest("rival", "x")})))
        try:
            answers = []
            for to in ("q", "none"):
                with pytest.raises(NestnetError) as refused:
                    client.move("guest/x", to)
                answers.append(str(refused.value).replace(to, "HOST"))
            assert answers[0] == answers[1]
            with pytest.raises(NotFound):
                client.move("a/p", "m2")
            with world.client("reader") as reader, pytest.raises(Forbidden):
                reader.move("a/p", "m2")
        finally:
            operator.delete("network", "low/a/guest", cascade=True)


def test_a_watch_tells_what_is_in_scope(world: World) -> None:
    with world.client("owner") as client, Client(world.controller.url) as operator:
        lines = client.watch()
        seen: list[dict[str, Any]] = []
        for line in lines:
            seen += line.get("objects", [])
            if "token" in line:
                break
        assert {one["object"].get("network") or one["object"]["path"] for one in seen} == {
            "a",
            "acme",
            "acme-low",
        }
        operator.apply(manifest(b=network("rival", description="changed")))
        operator.apply(manifest(theirs={"tenant": "rival", "segments": {"s": {"cidr": "10.0.0.0/24"}}}))
        operator.apply(manifest(mine={"tenant": "acme", "segments": {"s": {"cidr": "10.0.0.0/24"}}}))
        gone = operator.get("network", "mine")["id"]
        operator.delete("network", "theirs", cascade=True)
        operator.delete("network", "mine", cascade=True)
        operator.apply(manifest(b=network("rival")))
        told: dict[str, list[Any]] = {}
        for line in lines:
            assert line["revision"] is None  # It would count what others change.
            for one in line.get("objects", []):
                told.setdefault(one["id"], []).append(one["object"])
            if told.get(gone, [{}])[-1] is None:
                break
        assert all(value is None or value["kind"] == "tenant" or value["path"].startswith("mine")
                   for values in told.values() for value in values)  # fmt: skip
        assert len(told) == 2  # the network and its segment


def test_a_token_that_is_revoked_ends_at_once(world: World) -> None:
    with Client(world.controller.url) as operator:
        made = operator.make_token("brief", tenants={"acme": "owner"})
        shown = trusted(world.controller.https, made["token"])
        with Client(world.controller.https, credentials=shown, patience=0) as client:
            lines = client._lines("/v1/watch", {})
            next(lines)
            assert client.get("network", "a")
            operator.revoke("brief")
            begun = time.monotonic()
            with pytest.raises(Unauthenticated):
                client.get("network", "a")
            for _ in lines:
                pass
            assert time.monotonic() - begun < 30
    with pytest.raises(NotFound):
        Client(world.controller.url).revoke("brief")


def secret_of(token: str) -> str:
    """KIND_SECRET_PIN, where a secret has underscores of its own."""
    secret = token.partition("_")[2].rpartition("_")[0]
    assert len(secret) == 43
    return secret


def test_a_token_is_made_once_and_kept_by_nobody(world: World) -> None:
    with Client(world.controller.url) as operator:
        first = operator.make_token("twice", tenants={"acme": "reader"}, key="k1")
        assert operator.make_token("twice", tenants={"acme": "reader"}, key="k1")["token"] == first["token"]
        with pytest.raises(Conflict, match="is called twice already"):
            operator.make_token("twice", tenants={"acme": "reader"})
        secret = secret_of(first["token"])
        with Client(world.controller.https, credentials=trusted(world.controller.https, first["token"])) as client:
            assert client.get("network", "a")
    with contextlib.closing(sqlite3.connect(world.controller.db)) as store:
        dump = "\n".join(store.iterdump())
    assert secret not in dump
    assert "twice" in dump


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "",
        "nnt_",
        "nnt__",
        "nnt_" + "A" * 43 + "_" + "0" * 32,
        "nnj_" + "A" * 43 + "_" + "0" * 32,
        "\u00fc",
        "n" * 9000,
    ],
)
def test_a_token_that_nobody_made(world: World, token: str) -> None:
    with Client(world.controller.https, credentials=Credentials(None, world.shown["admin"].authority)) as client:
        for scheme in ("Bearer", "bearer", "Basic", ""):
            header = f"{scheme} {token}".strip().encode()
            response = client._http.get("/v1/status", headers={b"Authorization": header})
            assert response.status_code == 401, response.text


def test_the_socket_tells_users_apart(world: World) -> None:
    """Its group may look, nobody else may even connect, and looking does not mean the store's keys."""
    import grp

    path = world.controller.socket
    group = grp.getgrnam("users").gr_gid
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) == (0o660, group)
    code = (
        "import os, socket, sys; os.setgroups([int(sys.argv[2])] if sys.argv[2] else [])\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "def ask(what):\n"
        "    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "    head = 'HTTP/1.1|Host: x|Content-Length: 0|Connection: close||'.replace('|', '\\r\\n')\n"
        "    s.sendall(f'{what} {head}'.encode())\n"
        "    return s.recv(100).split()[1].decode()\n"
        "try:\n"
        "    print(*map(ask, ['GET /v1/ports', 'GET /v1/events', 'GET /v1/backup', 'DELETE /v1/networks/a',\n"
        "                     'POST /v1/confirm', 'GET /v1/feed?machine=m1', 'GET /v1/tokens']))\n"
        "except PermissionError: print('no')\n"
    )

    def as_nobody(groups: str) -> str:
        command = [sys.executable, "-I", "-c", code, str(path), groups]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, cwd="/").stdout.strip()

    assert as_nobody(str(group)) == "200 200 403 403 403 403 403"
    assert as_nobody("") == "no"


def test_who_is_in_between_learns_nothing(world: World, tmp_path: Path) -> None:
    """Another controller, with an authority of its own, at the address that somebody was told."""
    false = Secured(tmp_path)
    false.start()
    try:
        with Client(world.controller.url) as operator:
            token = operator.let_join("m7", 60)["token"]
        spec = {"name": "m7", "address": "192.0.2.7"}
        with pytest.raises(Forbidden, match="its authority is another one"):
            credentials.join(false.https, token, spec, tmp_path / "own")
        with pytest.raises(Unreachable, match="certificate verify failed"):
            Client(false.https, credentials=world.shown["agent"], patience=0).status()
        with pytest.raises(Unreachable, match="certificate verify failed"):
            Client(false.https, credentials=world.shown["admin"], patience=0).status()
        assert secret_of(token) not in false.log.read_text()
    finally:
        false.stop()
    assert not (tmp_path / "own").exists()


def test_a_machine_is_no_controller(world: World, tmp_path: Path) -> None:
    """Its certificate is of the same authority, and does not count for a server."""
    import ssl
    import threading

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own = world.shown["agent"].own
    assert own is not None
    context.load_cert_chain(own)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True):
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Unreachable, match=r"uns\w+ certificate purpose"):
            Client(url, credentials=world.shown["admin"], patience=0).status()
        thread.join(10)


def test_a_join_token_is_for_one_machine_and_once(world: World, tmp_path: Path) -> None:
    url = world.controller.https
    with Client(world.controller.url) as operator:
        token = operator.let_join("m5", 60)["token"]
        with pytest.raises(Forbidden, match="is for machine m5, not for m6"):
            credentials.join(url, token, {"name": "m6", "address": "192.0.2.6"}, tmp_path / "m6")
        with pytest.raises(Conflict, match=r"192\.0\.2\.1 is the address of machine m1"):  # and is not used up by it
            credentials.join(url, token, {"name": "m5", "address": "192.0.2.1"}, tmp_path / "m5")
        joined = credentials.join(url, token, {"name": "m5", "address": "192.0.2.5"}, tmp_path / "m5")
        assert (joined["name"], joined["address"]) == ("m5", "192.0.2.5")
        for file in (tmp_path / "m5").iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        with pytest.raises(Unauthenticated, match="was used"):
            credentials.join(url, token, {"name": "m5", "address": "192.0.2.5"}, tmp_path / "again")
        with pytest.raises(Conflict, match="has joined already"):
            credentials.join(url, token, {"name": "m5", "address": "192.0.2.5"}, tmp_path / "m5")
        late = operator.let_join("m6", 0.001)["token"]
        with pytest.raises(Unauthenticated, match="time has run out"):
            credentials.join(url, late, {"name": "m6", "address": "192.0.2.6"}, tmp_path / "late")
        first, second = (operator.let_join("m6", 60)["token"] for _ in range(2))
        with pytest.raises(Unauthenticated):
            credentials.join(url, first, {"name": "m6", "address": "192.0.2.6"}, tmp_path / "first")
        credentials.join(url, second, {"name": "m6", "address": "192.0.2.6"}, tmp_path / "second")
        operator.delete("machine", "m5")
        operator.delete("machine", "m6")
        own = credentials.Own(tmp_path / "m5", print).credentials
        with pytest.raises(Unauthenticated, match="removed or fenced"), Client(url, credentials=own) as client:
            client.get("machine", "m5")


def test_a_token_for_one_port_is_that_ports_alone(world: World, tmp_path: Path) -> None:
    """Neither a sibling's, nor another network's, nor for a machine of the wire. Who has joined by it may do what that
    port's agent may, wherever it is, and hears of its own domain and nothing else."""
    hosts = {"p": {"segment": "s", "host": "m1", "hosts": True}, "q": {"segment": "s", "host": "m2", "hosts": True}}
    lives = {"v": {"segment": "s", "host": "p"}, "w": {"segment": "s", "host": "q"}}
    lan = {"segments": {"s": {"cidr": "10.0.0.0/24"}}}
    inner = {**lan, "carriage": "encapsulated", "ports": lives}
    wired = {"ports": hosts, "networks": {"vms": inner}}
    url = world.controller.https
    with Client(world.controller.url) as operator:
        operator.apply(manifest(x={**lan, **wired}, y={"segments": {"s": {"cidr": "10.9.0.0/24"}}, **wired}))
        rows = {path: operator.get("port", path)["row"] for path in ("x/p", "x/q", "y/p", "y/q")}
        names = {path: operator.get("port", path)["id"] for path in rows}
        with world.client("agent") as m1:  # who lets in whom is on its ports
            for path in ("x/p", "y/p"):
                assert m1.invite("m1", rows[path], 60)["machine"] == names[path]
            for path in ("x/q", "y/q"):
                with pytest.raises(NotFound):
                    m1.invite("m1", rows[path], 60)
        made = operator.let_join("x/q", 60)
        own = names.pop("x/q")
        assert made["machine"] == own
        wrong = [{"name": name} for name in names.values()]
        wrong += [{"name": f"m{n}", "address": f"192.0.2.{n}"} for n in (1, 9)]
        for n, spec in enumerate(wrong):
            with pytest.raises(Forbidden, match=f"is for machine {own}, not for {spec['name']}"):
                credentials.join(url, made["token"], spec, tmp_path / f"wrong{n}")
            assert not (tmp_path / f"wrong{n}" / "own.pem").exists()
        assert credentials.join(url, made["token"], {"name": own}, tmp_path / "own")["row"], "it is not used up"
        shown = credentials.Own(tmp_path / "own", print).credentials
        with Client(url, credentials=shown, patience=0) as client:
            attempts = (
                lambda name: next(client.feed(name)),
                lambda name: client.report(name, 1),
                lambda name: client.renew(name, REQUEST),
                lambda name: client.invite(name, rows["x/p"], 60),
                lambda name: client.get("machine", name),
            )
            for name in (*names.values(), "m1", "m2"):
                for attempt in attempts:
                    with pytest.raises(Forbidden):
                        attempt(name)
            for row in rows.values():
                with pytest.raises(NotFound, match=r"^this port on machine port_\w+ does not exist"):
                    client.invite(own, row, 60)
            client.report(own, 1)
            shown_to_it, row = client.get("machine", own), operator.get("machine", "x/q")["row"]
            assert {shown_to_it[key] for key in ("name", "path")} == {own}, "not the path of its port"
            kept = {"id", "kind", "name", "path", "etag", "mtu", "fenced"}
            assert {key: value for key, value in shown_to_it.items() if value and key not in kept} == {"row": row}
            told: dict[str, list[dict[str, Any]]] = {}
            line = next(client.feed(own))
            for row in line["rows"]:
                told.setdefault(row["kind"], []).append(row["value"])
            assert operator.get("machine", "x/q")["realised"] == 0, "a number of its own making says nothing"
            client.report(own, line["revision"])
            with world.client("agent") as m1:
                rows_of_the_store = next(m1.feed("m1"))["token"]
                assert next(m1.feed("m1", line["token"]))["snapshot"]
            assert next(client.feed(own, rows_of_the_store))["snapshot"], "what it has, it has by other numbers"
            assert not next(client.feed(own, line["token"])).get("snapshot")
        assert line["revision"] == line["token"]
        assert told.keys() == {"machine", "network", "segment", "port"}
        assert {one["address"] for one in told["machine"]} == {"10.0.0.2", "10.0.0.3"}
        assert {one["id"] for one in told["port"]} == {operator.get("port", f"x/vms/{name}")["row"] for name in "vw"}
        assert [one["id"] for one in told["network"]] == list({one["network"] for one in told["port"]})
        assert [one["id"] for one in told["segment"]] == list({one["segment"] for one in told["port"]})
        now = operator.status()["revision"]
        assert [operator.get("machine", path)["realised"] for path in ("x/p", "x/q", "y/q")] == [None, now, None]
        operator.report(own, "of-another-store")
        assert operator.get("machine", "x/q")["realised"] == 0
        operator.fence("x/q", True)
        with pytest.raises(Unauthenticated, match="removed or fenced"), Client(url, credentials=shown) as client:
            client.report(own, 2)
        for network in "xy":
            operator.delete("network", network, cascade=True)


def test_an_answer_that_was_lost_is_the_same_join(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is used up, the answer never came: asked again it is the first one's certificate."""
    url, spec = world.controller.https, {"name": "m4", "address": "192.0.2.4"}
    with Client(world.controller.url) as operator:
        token = operator.let_join("m4", 60)["token"]
        answers = []

        def lost(self: Client, *args: Any, **more: Any) -> dict[str, Any]:
            answers.append(enter(self, *args, **more))
            raise Unreachable("lost")

        enter = Client.enter
        with monkeypatch.context() as patch:
            patch.setattr(Client, "enter", lost)
            with pytest.raises(Unreachable):
                credentials.join(url, token, spec, tmp_path / "own")
        credentials.join(url, token, spec, tmp_path / "own")
        assert (tmp_path / "own" / "own.pem").read_text().endswith(answers[0]["certificate"])
        own = credentials.Own(tmp_path / "own", print).credentials
        with Client(url, credentials=own) as client:
            assert client.get("machine", "m4")["row"] == operator.get("machine", "m4")["row"]
        operator.delete("machine", "m4")


def test_joining_anew_ends_what_was_before(world: World, tmp_path: Path) -> None:
    """Whoever has a copy of the old disk is nobody from then on; so is a machine that is shut out."""
    url, spec = world.controller.https, {"name": "m4", "address": "192.0.2.4"}
    with Client(world.controller.url) as operator:
        for name in ("old", "new"):
            token = operator.let_join("m4", 60)["token"]
            credentials.join(url, token, spec, tmp_path / name)
        clients = {name: Client(url, credentials=credentials.Own(tmp_path / name, print).credentials, patience=0)
                   for name in ("old", "new")}  # fmt: skip
        with pytest.raises(Unauthenticated, match="has joined anew"):
            clients["old"].get("machine", "m4")
        feed = clients["new"].feed("m4", boot="one")
        next(feed)
        with pytest.raises(Conflict, match="another system is connected as machine m4"):
            next(clients["new"].feed("m4", boot="two"))
        operator.fence("m4", True)
        begun = time.monotonic()
        with pytest.raises(Unauthenticated):
            clients["new"].report("m4", 1)
        with pytest.raises(Unreachable, match="ended the feed"):
            list(feed)
        assert time.monotonic() - begun < 6
        assert operator.get("machine", "m4")["fenced"]
        operator.fence("m4", False)
        next(clients["new"].feed("m4", boot="two"))
        operator.delete("machine", "m4")


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"name": "x"}, "missing_key"),
        ({"name": "x", "everything": "owner", "tenants": {"acme": "owner"}}, "missing_key"),
        ({"name": "x", "tenants": {"acme": "king"}}, "bad_value"),
        ({"name": "X y", "everything": "owner"}, "bad_value"),
        ({"name": "x", "everything": "owner", "ttl": -1}, "out_of_range"),
        ({"name": "x", "everything": "owner", "more": 1}, "unknown_key"),
    ],
)
def test_a_wish_for_a_token_that_means_nothing(world: World, given: dict[str, Any], code: str) -> None:
    response = world.ask("admin", "POST", "/v1/tokens", json=given)
    assert response.status_code == 422, response.text
    assert [problem["code"] for problem in response.json()["problems"]] == [code]


def test_strangers_may_send_little(world: World) -> None:
    for identity, wanted in (("nobody", 413), ("admin", 422)):
        response = world.ask(identity, "POST", "/v1/join" if wanted == 413 else "/v1/plan", content=b" " * 100_000)
        assert response.status_code == wanted, response.text


@pytest.mark.parametrize("request_", ["", "x", REQUEST.replace("MI", "MA"), "-----BEGIN CERTIFICATE REQUEST-----"])
def test_a_certificate_request_that_is_none(world: World, request_: str) -> None:
    with world.client("agent") as client, pytest.raises(NestnetError, match="certificate request"):
        client.renew("m1", request_)


def test_a_route_that_nobody_thought_of_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nestnet.api import access
    from nestnet.api.app import create_app
    from nestnet.store.store import Store

    store = Store(tmp_path / "store.db")
    monkeypatch.delitem(access.RIGHTS, "backup")
    with pytest.raises(RuntimeError, match="nobody may use backup"):
        create_app(store)
    store.close()


def test_a_restore_gives_nobody_back_what_was_taken(tmp_path: Path) -> None:
    controller = Secured(tmp_path)
    controller.start()
    try:
        with Client(controller.url) as operator:
            kept, gone = (operator.make_token(name, everything="owner")["token"] for name in ("kept", "gone"))
            operator.join("m1", "192.0.2.1")
            operator.backup(tmp_path / "old")
            operator.revoke("gone")
            operator.fence("m1", True)
            operator.make_token("later", everything="owner")
            operator.restore(tmp_path / "old")
            assert [token["name"] for token in operator.tokens()] == ["kept"]
            assert operator.get("machine", "m1")["fenced"]
        with Client(controller.https, credentials=trusted(controller.https, kept)) as client:
            assert client.status()
        with pytest.raises(Unauthenticated):
            Client(controller.https, credentials=trusted(controller.https, gone)).status()
    finally:
        controller.stop()
    assert (tmp_path / "store.db").stat().st_mode & 0o077 == 0
