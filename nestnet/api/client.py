"""The API from the other side, for the CLI, the agent and programs.

    with Client("unix:/run/nestnet/api.sock") as client:
        client.apply(manifest)
        for port in client.list("port", network="acme"):
            print(port["path"], port["addresses"])

Errors of the API come back as the classes of nestnet.model.errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx2
import msgspec

from nestnet.model.errors import (
    Ambiguous,
    Conflict,
    Exhausted,
    Invalid,
    NestnetError,
    NotFound,
    NotRealised,
    Problem,
    Unreachable,
)

KINDS = ("machine", "tenant", "network", "segment", "router", "link", "port", "policy")
PAGE = 1000  # Items asked for at a time.
SILENCE = 15.0  # Seconds without a line after which a feed is dead: three heartbeats.
TIMEOUT = 60.0  # Seconds for an answer; an apply of 20,000 objects takes a few.


class Client:
    """A connection to a controller. `url` is unix:/PATH or http://HOST:PORT. One thread may use it at a time.

    Every method raises Unreachable if no controller answers, and what the API says went wrong: Invalid, NotFound,
    Ambiguous, Conflict, Exhausted. Kinds are singular: 'port', 'policy'.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT) -> None:
        self.url = url
        path = url.removeprefix("unix:")
        transport = httpx2.HTTPTransport(uds=path) if path != url else None
        base = "http://nestnet" if path != url else url
        self._http = httpx2.Client(base_url=base, transport=transport, timeout=timeout, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def list(self, kind: str, network: str | None = None) -> Iterator[dict[str, Any]]:
        """All resources of a kind, or those in a network; pages are fetched as they are needed."""
        query: dict[str, Any] = {"limit": PAGE}
        if network is not None:
            query["network"] = network
        while True:
            page = self._ask("GET", _collection(kind), params=query)
            yield from page["items"]
            if page["next"] is None:
                return
            query["cursor"] = page["next"]

    def get(self, kind: str, reference: str) -> dict[str, Any]:
        """One resource by id, path, or the end of a path that only it has."""
        return self._ask("GET", _member(kind, reference))

    def delete(self, kind: str, reference: str) -> int:
        """Delete one; returns the revision. Raises Conflict with what depends on it."""
        return int(self._ask("DELETE", _member(kind, reference))["revision"])

    def set_link(self, reference: str, up: bool) -> dict[str, Any]:
        """Take a link up or down: {"revision", "machines", "link"}. Doing it twice is doing it once."""
        return self._ask("PATCH", _member("link", reference), json={"up": up})

    def set_attach(self, reference: str, attach: Mapping[str, str]) -> dict[str, Any]:
        """Say what a port's workload hangs on: {"netns": NAME}, {"tap": NAME} or {}."""
        return self._ask("PATCH", _member("port", reference), json={"attach": dict(attach)})

    def plan(self, manifest: Mapping[str, Any], prune: bool = False) -> dict[str, Any]:
        """What apply would do: changes, disturbs, machines. `manifest` is data, as a network file has it."""
        return self._ask("POST", "/v1/plan", json={"manifest": manifest, "prune": prune})

    def apply(self, manifest: Mapping[str, Any], prune: bool = False, key: str | None = None) -> dict[str, Any]:
        """Make it so: {"revision", "plan"}. Asks again if the answer is lost; `key` makes sure it is done once."""
        headers = {"Idempotency-Key": key or uuid4().hex}
        body = {"manifest": manifest, "prune": prune}
        try:
            return self._ask("POST", "/v1/apply", json=body, headers=headers)
        except Unreachable:
            return self._ask("POST", "/v1/apply", json=body, headers=headers)

    def join(
        self,
        name: str,
        address: str,
        mtu: int = 1500,
        labels: Mapping[str, str] | None = None,
        nics: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Declare a machine, or change what is known of it; returns it. `nics`: names of its interfaces to the
        underlay; none: the one that has the address."""
        body = {"name": name, "address": address, "mtu": mtu, "labels": dict(labels or {}), "nics": list(nics)}
        return self._ask("POST", "/v1/machines", json=body)

    def status(self) -> dict[str, Any]:
        """{"controller", "revision", "machines": [{"name", "realised", "reported", "problems", ...}]}"""
        return self._ask("GET", "/v1/status")

    def trace(self, port: str, to: str, protocol: str = "icmp", dport: int = 0) -> dict[str, Any]:
        """What would happen to a packet, layer by layer."""
        query = {"port": port, "to": to, "protocol": protocol, "dport": dport}
        return self._ask("GET", "/v1/trace", params=query)

    def report(
        self,
        machine: str,
        revision: int,
        problems: Sequence[str] = (),
        ports: Mapping[str, Any] | None = None,
    ) -> None:
        """An agent tells that its machine has realised a revision. `ports`, by row id, replaces what it said of
        them before; None leaves that."""
        body: dict[str, Any] = {"revision": revision, "problems": list(problems)}
        if ports is not None:
            body["ports"] = dict(ports)
        self._ask("PUT", _member("machine", machine) + "/status", json=body)

    def feed(self, machine: str, since: str | None = None) -> Iterator[dict[str, Any]]:
        """The lines of a machine's feed as they come, without end: batches (with `rows`) and heartbeats.

        Raises Unreachable when the controller stops, or is silent for 15 s: begin again with the last `token`.
        """
        query = {"machine": machine} | ({"since": since} if since is not None else {})
        timeout = httpx2.Timeout(SILENCE)
        with self._reaching(), self._http.stream("GET", "/v1/feed", params=query, timeout=timeout) as response:
            if response.is_error:
                response.read()
                raise _error(response)
            for line in response.iter_lines():
                yield msgspec.json.decode(line)
        raise Unreachable(f"the controller at {self.url} ended the feed")

    def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        with self._reaching():
            response = self._http.request(method, path, **more)
        if response.is_error:
            raise _error(response)
        return msgspec.json.decode(response.content) if response.content else {}

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(f"no controller answers at {self.url}: {reason}") from error


def _collection(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind; there are {', '.join(KINDS)}")
    return "/v1/policies" if kind == "policy" else f"/v1/{kind}s"


def _member(kind: str, reference: str) -> str:
    return f"{_collection(kind)}/{quote(reference, safe='/')}"


def _error(response: httpx2.Response) -> NestnetError:
    """What the API said went wrong."""
    try:
        data = msgspec.json.decode(response.content)
        detail, code = str(data["detail"]), str(data["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return NestnetError(f"the controller answered {response.status_code}, and nothing that explains it")
    error: NestnetError
    match response.status_code:
        case 422 if data.get("problems"):
            return Invalid([Problem(**problem) for problem in data["problems"]])
        case 404 if code == "not_found":
            error = NotFound(detail, data.get("nearest"))
        case 400 if code == "ambiguous":
            error = Ambiguous(detail, data.get("candidates", ()))
        case 409 if "limit" in data:
            error = Exhausted(detail, code, data["limit"])
        case 409:
            error = Conflict(detail, code, data.get("dependants", ()))
        case 503:
            error = Unreachable(detail)
        case 504:
            error = NotRealised(detail)
        case _:
            error = NestnetError(detail, code)
    error.message = detail
    return error
