"""Poison: whatever a tenant sends, the controller answers, and another tenant's change on the same machine comes true.

A real controller and a real agent. Each object is applied; nothing is a fault of the controller. After each that was
accepted another tenant's network changes, and within 2 s the agent has realised it, and the accepted object before it,
without a problem. Manifests are drawn by strategies of our own (poison.py), since the OpenAPI document knows one as a
mapping, and what is poison about it is between its values; requests of all routes by schemathesis too.

    NESTNET_POISON=5000 .venv/bin/python -m pytest tests/test_poison.py -s
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from poison import POISON, WORDS, manifests, whole

from nestnet.api.client import Client
from nestnet.lab.down import down
from nestnet.lab.state import Lab
from nestnet.lab.up import up
from nestnet.model.manifest import parse

pytestmark = pytest.mark.root


@schemathesis.serializer("application/x-ndjson")
def lines(_context: Any, value: Any) -> bytes:
    """Of a batch, of which schemathesis is told only that it is lines."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


EXAMPLES = int(os.environ.get("NESTNET_POISON", "500"))
BOUND = 2.0  # seconds
poisonous = settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))


@dataclass
class Victim:
    """A tenant on the machine where all the poison goes."""

    client: Client
    turn: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)  # seconds

    def network(self) -> dict[str, Any]:
        return {
            "tenant": "victim",
            "segments": {"lan": {"cidr": "10.0.0.0/24"}},
            "ports": {"a": {"segment": "lan", "host": "m1"}},
            "policies": [{"from": "any", "to": "any", "allow": "tcp/80", "priority": 1 + self.turn % 1000}],
        }

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> httpx2.Response:
        with self.client._http.stream(method, path, content=body, headers=headers) as answer:
            # What is followed (feed, watch, events) has no end: that it begins is all there is to see.
            endless = answer.headers.get("Content-Type", "").startswith("application/x-ndjson")
            content = b"" if endless else answer.read()
        self.statuses[answer.status_code] += 1
        assert answer.status_code < 500, (answer.status_code, content, body)
        return answer

    def changes(self) -> None:
        """The victim changes something; it is so on its machine, and so is all that was accepted before."""
        self.turn += 1
        begun = time.monotonic()
        manifest = {"apiVersion": "nestnet/v1", "networks": {"canary": self.network()}}
        revision = self.client.apply(manifest)["revision"]
        while True:
            machine = next(one for one in self.client.status()["machines"] if one["name"] == "m1")
            if (machine["realised"] or 0) >= revision:
                break
            assert time.monotonic() - begun < BOUND, (revision, machine)
            time.sleep(0.002)  # the pace of asking
        self.took.append(time.monotonic() - begun)
        assert machine["problems"] == []

    def told(self, what: str) -> str:
        took = sorted(self.took)
        figures = (
            ", ".join(f"{name} {took[int(len(took) * part)] * 1000:.0f} ms" for name, part in PARTS) if took else ""
        )
        return f"{what}: answers {dict(self.statuses)}; {len(took)} accepted, another's change realised: {figures}"


PARTS = (("median", 0.5), ("p99", 0.99), ("longest", 0.9999))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    try:
        yield up(parse({"apiVersion": "nestnet/v1", "machines": {"m1": {}}}), name, "", lambda _: None)
    finally:
        down(name)


@pytest.fixture
def victim(lab: Lab) -> Iterator[Victim]:
    with ExitStack() as stack:
        found = Victim(stack.enter_context(Client(lab.controller)))
        started = time.monotonic()
        while found.client.get("machine", "m1")["realised"] is None:
            assert time.monotonic() - started < 30, "the agent does not start"
            time.sleep(0.01)  # the pace of asking
        found.changes()
        yield found


def test_what_is_whole_is_accepted(victim: Victim) -> None:
    """Else nothing that is nearly so ever would be."""
    victim.client.apply({"apiVersion": "nestnet/v1", "networks": {"poison": whole()}})
    victim.changes()


def test_no_object_keeps_another_tenant_from_changing(victim: Victim, lab: Lab) -> None:
    @poisonous
    @given(manifests())
    def each(text: str) -> None:
        body = b'{"manifest": ' + text.encode("utf-8", "surrogatepass") + b"}"
        answer = victim.send("POST", "/v1/apply", body, **{"Content-Type": "application/json"})
        if answer.status_code == 200:
            victim.changes()

    try:
        each()
    except BaseException:
        for log in lab.logs.iterdir():
            print(log.name, log.read_text()[-3000:])
        raise
    print(victim.told(f"{EXAMPLES} objects"))
    assert len(victim.took) > EXAMPLES // 8, "too little is accepted to prove anything"


def test_no_request_that_schemathesis_draws_is_a_fault(victim: Victim) -> None:
    """What the OpenAPI document allows, and what it forbids, of every route."""
    schema = schemathesis.openapi.from_dict(victim.send("GET", "/v1/openapi.json").json())
    drawn = [
        operation.ok().as_strategy(generation_mode=mode)
        for operation in schema.get_all_operations()
        if not operation.ok().path.endswith("/status")  # what an agent says of its machine is its own
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    ]

    @poisonous
    @given(st.one_of(drawn))
    def each(case: schemathesis.Case) -> None:
        # Made ready by the library that it is made for, and sent to the controller's socket.
        request = requests.Request(**case.as_transport_kwargs(base_url="http://nestnet")).prepare()
        path = request.url.removeprefix("http://nestnet")
        body = request.body.encode() if isinstance(request.body, str) else request.body or b""
        if len(path) < 60_000:
            victim.send(request.method, path, body, **{"Content-Type": request.headers.get("Content-Type", "")})

    each()
    victim.changes()
    print(victim.told(f"{EXAMPLES} requests of schemathesis"))


def test_no_request_is_a_fault(victim: Victim) -> None:
    """Every route of the OpenAPI document, with what nobody expects in paths, queries and bodies."""
    document = victim.send("GET", "/v1/openapi.json").json()
    routes = [
        (method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if not path.endswith("/status")  # what an agent says of its machine is its own
    ]
    texts = [word for word in (*POISON, *(w for some in WORDS.values() for w in some)) if isinstance(word, str)]
    text = st.sampled_from(texts) | st.text(max_size=10)
    thing = st.sampled_from(POISON) | st.recursive(
        st.none() | st.booleans() | st.integers() | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    )

    @poisonous
    @given(st.sampled_from(routes), st.data())
    def each(route: tuple[str, str, dict[str, Any]], data: st.DataObject) -> None:
        method, path, operation = route
        query: list[tuple[str, str]] = []
        for parameter in operation.get("parameters", ()):
            value = data.draw(text).encode("utf-8", "replace").decode()
            if parameter["in"] == "path":
                path = path.replace("{" + parameter["name"] + "}", quote(value, safe=""))
            elif parameter["in"] == "query" and data.draw(st.booleans()):
                query.append((parameter["name"], value))
        path = path.partition("{")[0] if "{" in path else path
        if data.draw(st.integers(0, 9)) == 0:
            query.append((data.draw(text).encode("utf-8", "replace").decode(), "1"))
        if query:
            path += "?" + "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in query)
        body = b""
        if "requestBody" in operation:
            (content,) = operation["requestBody"]["content"].values()
            schema = content.get("schema", {})  # of lines there is none: each is anything
            name = schema.get("$ref", "").rpartition("/")[2]
            schema = document["components"]["schemas"].get(name, schema)
            made = {key: data.draw(thing) for key in schema.get("properties", {}) if data.draw(st.integers(0, 3))}
            body = json.dumps(made if data.draw(st.integers(0, 5)) else data.draw(thing)).encode()
        if not path.startswith("/v1/") or len(path) > 60_000:
            return
        victim.send(method.upper(), path, body, **{"Content-Type": "application/json"})

    each()
    victim.changes()
    print(victim.told(f"{EXAMPLES} requests"))
