"""The API from the other side, for the CLI, the agent and programs.

    with Client("unix:/run/nestnet/api.sock") as client:
        client.apply(manifest)
        for port in client.list("port", network="acme"):
            print(port["path"], port["addresses"])

Errors of the API come back as the classes of nestnet.model.errors.

Every change has an idempotency key, so it is done once however often it is asked for. An answer that was lost (the
connection ended, the controller stopped or starts again, 503) is asked for again, for PATIENCE seconds; so is one that
was refused for asking too often (429).
"""

from __future__ import annotations

import os
import random
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, overload
from urllib.parse import quote
from uuid import uuid4

import httpx2
import msgspec

from nestnet.model.errors import (
    Ambiguous,
    Conflict,
    DiskFull,
    Exhausted,
    Forbidden,
    Invalid,
    NestnetError,
    NotFound,
    NotRealised,
    Problem,
    Stale,
    TooFast,
    Unauthenticated,
    Unreachable,
)

KINDS = ("machine", "tenant", "network", "segment", "router", "link", "port", "policy")
PAGE = 1000  # Items asked for at a time.
SILENCE = 15.0  # Seconds without a line after which a feed is dead: three heartbeats.
TIMEOUT = 60.0  # Seconds for an answer; an apply of 20,000 objects takes a few.
PATIENCE = 10.0  # Seconds for which an answer that was lost is asked for again: a controller is back within 5.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # Seconds between two attempts.


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client shows, and whom it trusts.

    token      a token's text, or a join token's
    authority  the certificate, PEM, of the authority whose controllers it talks to over TLS
    own        the file with a machine's key and certificate, PEM"""

    token: str | None = None
    authority: str | None = None
    own: Path | None = None

    def context(self) -> ssl.SSLContext:
        """How TLS is spoken. The controller's name does not count (api/authority.py): only a controller has a
        certificate of this authority for servers."""
        if self.authority is None:
            raise Unreachable("nobody says which controller to trust: `nestnet context add` does, or a join token")
        context = ssl.create_default_context(cadata=self.authority)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        if self.own is not None:
            context.load_cert_chain(self.own)
        return context


ANONYMOUS = Credentials()
PIN = 16  # Bytes of the fingerprint in a token: nobody makes another authority with the same.


def pin(certificate: str) -> str:
    """The beginning of the SHA-256 of an authority's certificate (PEM), as tokens have it: 32 hexadecimal digits."""
    return sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()[: 2 * PIN]


def trusted(url: str, token: str) -> Credentials:
    """What to show a controller with a token: its authority is asked for without trust, and must be the one that the
    token names. So nobody in between learns the token. Raises Forbidden if it is another one, Unreachable."""
    if not url.startswith("https:"):
        return Credentials(token)
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    try:
        response = httpx2.get(f"{url}/v1/authority", verify=anyone, trust_env=False, timeout=TIMEOUT)
        response.raise_for_status()
        said = pin(response.text)
    except (httpx2.HTTPError, ValueError) as error:
        raise Unreachable(f"no controller answers at {url}: {error}") from error
    if said != token.rpartition("_")[2]:
        raise Forbidden(f"{url} is not the controller that this token is from: its authority is another one")
    return Credentials(token, response.text)


class Rows(Sequence[dict[str, Any]]):
    """The rows of a batch, as they were sent until one is looked at."""

    def __init__(self, sent: Sequence[msgspec.Raw]) -> None:
        self._sent = sent

    def __len__(self) -> int:
        return len(self._sent)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return Rows(self._sent[index]) if isinstance(index, slice) else msgspec.json.decode(self._sent[index])


def read_batch(line: str | bytes) -> dict[str, Any]:
    """A line of a feed."""
    sent = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    rows = sent.pop("rows", None)
    said = {name: msgspec.json.decode(value) for name, value in sent.items()}
    return said | ({"rows": Rows(msgspec.json.decode(rows, type=list[msgspec.Raw]))} if rows is not None else {})


class Client:
    """A connection to a controller. `url` is unix:/PATH, https://HOST:PORT, or http://HOST:PORT on this computer; HOST
    may be a link-local address with its interface, as of a relay: https://[fe80::1%eth0]:4795. One thread may use it at
    a time.

    `patience` is how long, in seconds, it asks again for an answer that was lost; who never answered at all is not
    waited for. `key`, where a method has it, is the idempotency key, a new one unless given; `etag` the object's, or a
    plan's: then the change is refused (Stale) if it has changed since.

    Every method raises Unreachable if no controller answers, and what the API says went wrong: Invalid, NotFound,
    Ambiguous, Conflict, Exhausted. Kinds are singular: 'port', 'policy'.
    """

    def __init__(
        self,
        url: str,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        credentials: Credentials = ANONYMOUS,
    ) -> None:
        self.url = url
        self.patience = patience
        self._answered = False  # Has this controller ever?
        self._timeout = timeout
        self._http = self._connection(credentials)

    def _connection(self, credentials: Credentials) -> httpx2.Client:
        url, path = self.url, self.url.removeprefix("unix:")
        # Without TLS nobody has to be trusted: reading all the authorities that there are would take 15 ms of CPU each.
        verify = credentials.context() if url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        transport = httpx2.HTTPTransport(uds=path, verify=verify) if path != url else None
        base = "http://nestnet" if path != url else url
        token = credentials.token
        return httpx2.Client(
            base_url=base,
            transport=transport,
            timeout=self._timeout,
            trust_env=False,
            verify=verify,
            headers={"Authorization": f"Bearer {token}"} if token is not None else {},
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.close()

    def become(self, credentials: Credentials) -> None:
        """Show something else from now on."""
        self._http.close()
        self._http = self._connection(credentials)

    def close(self) -> None:
        self._http.close()

    def list(self, kind: str, network: str | None = None) -> Iterator[dict[str, Any]]:
        """All resources of a kind, or those in a network; pages are fetched as they are needed. A 'host' is where ports
        of what is carried can live: of that network, or a machine."""
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

    def delete(
        self, kind: str, reference: str, cascade: bool = False, *, key: str | None = None, etag: str | None = None
    ) -> dict[str, Any]:
        """Delete one: {"revision", "token"}. Raises Conflict with what depends on it, or is in it: `cascade` takes that
        along, of networks and tenants only."""
        query = {"cascade": True} if cascade else {}
        return self._change("DELETE", _member(kind, reference), key, etag, params=query)

    def set_link(self, reference: str, up: bool, *, key: str | None = None, etag: str | None = None) -> dict[str, Any]:
        """Take a link up or down: {"revision", "token", "machines", "link"}. Doing it twice is doing it once."""
        return self._change("PATCH", _member("link", reference), key, etag, json={"up": up})

    def set_enabled(
        self, kind: str, reference: str, enabled: bool, *, key: str | None = None, etag: str | None = None
    ) -> dict[str, Any]:
        """Take a network or port up or down: the revision, the machines that get it, and what it is now."""
        return self._change("PATCH", _member(kind, reference), key, etag, json={"enabled": enabled})

    def recarry(
        self,
        reference: str,
        carrier: str | None,
        hosts: Mapping[str, str] | None = None,
        *,
        key: str | None = None,
        etag: str | None = None,
    ) -> dict[str, Any]:
        """Let another network carry this one, None: the wire; `hosts`: port -> host. The revision, the machines that
        get it, and the network."""
        body = {"carrier": carrier, **({"hosts": dict(hosts)} if hosts else {})}
        return self._change("PATCH", _member("network", reference), key, etag, json=body)

    def set_attach(
        self, reference: str, attach: Mapping[str, str], *, key: str | None = None, etag: str | None = None
    ) -> dict[str, Any]:
        """Say what a port's workload hangs on: {"netns": NAME}, {"tap": NAME} or {}."""
        return self._change("PATCH", _member("port", reference), key, etag, json={"attach": dict(attach)})

    def move(self, reference: str, to: str, *, key: str | None = None, etag: str | None = None) -> dict[str, Any]:
        """Send a port on its way to another host: {"revision", "machines", "disturbs", "port"}. The port says in
        `moving` how far it is."""
        return self._change("POST", "/v1/move", key, etag, json={"port": reference, "to": to})

    def give_connections(self, machine: str, port: int, connections: bytes) -> None:
        """What this machine remembers of a port, by its row, that leaves it."""
        self._ask("PUT", _moving(machine, port), content=connections)

    def take_connections(self, machine: str, port: int) -> bytes:
        """What was given, for the machine that the port comes to. Raises NotFound when it does not move (any more)."""
        with self._reaching():
            response = self._http.get(_moving(machine, port))
        if response.is_error:
            raise _error(response)
        return response.content

    def plan(self, manifest: Mapping[str, Any], prune: bool = False) -> dict[str, Any]:
        """What apply would do: changes, disturbs, machines, etag. `manifest` is data, as a network file has it."""
        return self._ask("POST", "/v1/plan", json={"manifest": manifest, "prune": prune})

    def apply(
        self, manifest: Mapping[str, Any], prune: bool = False, key: str | None = None, etag: str | None = None
    ) -> dict[str, Any]:
        """Make it so: {"revision", "plan"}."""
        return self._change("POST", "/v1/apply", key, etag, json={"manifest": manifest, "prune": prune})

    def batch(self, lines: Iterable[bytes], *, key: str | None = None) -> Iterator[dict[str, Any]]:
        """Make networks: each line is one, JSON with its name. All is asked for first; then it tells what was made
        of each part, {"lines", "networks" up to here, "revision", "token"}, and raises what is wrong with the one that
        was not made: problems point to /LINE."""
        headers = {"Idempotency-Key": key or uuid4().hex}
        response = self._answer("POST", "/v1/batch", headers=headers, content=b"".join(line + b"\n" for line in lines))
        for told in msgspec.json.Decoder().decode_lines(response.content):
            if told.get("problem") is not None:
                raise _said(told["problem"])
            yield told

    def join(
        self,
        name: str,
        address: str,
        mtu: int = 1500,
        labels: Mapping[str, str] | None = None,
        nics: Sequence[str] = (),
        vlan: Mapping[str, Any] | None = None,
        trunks: Mapping[str, str] | None = None,
        *,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Declare a machine, or change what is known of it; returns it. `nics`: names of its interfaces to the
        underlay; none: the one that has the address. `vlan`: that which they are in, {"id": 17, "type": "802.1ad"}.
        `trunks`: its interfaces to physical networks, by the names of these; None: as they were."""
        body = {"name": name, "address": address, "mtu": mtu, "labels": dict(labels or {}), "nics": list(nics)}
        body |= {"vlan": dict(vlan)} if vlan is not None else {}
        body |= {"trunks": dict(trunks)} if trunks is not None else {}
        return self._change("POST", "/v1/machines", key, None, json=body)

    def fence(self, reference: str, fenced: bool, *, key: str | None = None, etag: str | None = None) -> dict[str, Any]:
        """Shut a machine out, or let it in again: {"revision", "machines", "machine"}."""
        return self._change("PATCH", _member("machine", reference), key, etag, json={"fenced": fenced})

    def make_tenant(
        self,
        name: str,
        parent: str | None = None,
        quota: Mapping[str, int | str | None] | None = None,
        *,
        key: str | None = None,
    ) -> dict[str, Any]:
        """A new tenant; returns it. `quota`: networks, segments, ports, rate; what is left out has no limit."""
        body = {"name": name, "parent": parent, "quota": dict(quota or {})}
        return self._change("POST", "/v1/tenants", key, None, json=body)

    def set_tenant(
        self,
        name: str,
        quota: Mapping[str, int | str | None] | None = None,
        suspended: bool | None = None,
        *,
        key: str | None = None,
        etag: str | None = None,
    ) -> dict[str, Any]:
        """Give a tenant other limits, None for none of its own, or suspend or resume it: {"revision", "tenant"}."""
        body = {"quota": dict(quota) if quota is not None else None, "suspended": suspended}
        return self._change("PATCH", _member("tenant", name), key, etag, json=body)

    def authority(self) -> str:
        """The certificate, PEM, of the controller's authority."""
        with self._reaching():
            response = self._http.get("/v1/authority")
        if response.is_error:
            raise _error(response)
        return response.text

    def enter(self, machine: Mapping[str, Any], request: str, *, key: str | None = None) -> dict[str, Any]:
        """Join as a machine, with a join token, and a certificate request (PEM): {"machine", "certificate"}."""
        return self._change("POST", "/v1/join", key, None, json={**machine, "request": request})

    def renew(self, machine: str, request: str) -> str:
        """A machine's next certificate (PEM), for a new key."""
        path = _member("machine", machine) + "/certificate"
        return str(self._ask("POST", path, json={"request": request})["certificate"])

    def let_join(self, machine: str, ttl: float, *, key: str | None = None) -> dict[str, Any]:
        """A token that lets one machine join, once: {"machine", "until", "token"}."""
        return self._change("POST", "/v1/join-tokens", key, None, json={"machine": machine, "ttl": ttl})

    def invite(self, machine: str, port: int, ttl: float) -> dict[str, Any]:
        """A token that lets the agent on a port of a machine join, once, within `ttl` seconds. `port` is its row."""
        path = _member("machine", machine) + "/join-tokens"
        return self._change("POST", path, None, None, json={"port": port, "ttl": ttl})

    def make_token(
        self,
        name: str,
        everything: str | None = None,
        tenants: Mapping[str, str] | None = None,
        ttl: float | None = None,
        *,
        key: str | None = None,
    ) -> dict[str, Any]:
        """A new token, with its secret: `token`. Roles are reader and owner; `ttl` in seconds, None: for ever."""
        body = {"name": name, "everything": everything, "tenants": dict(tenants or {}), "ttl": ttl}
        return self._change("POST", "/v1/tokens", key, None, json=body)

    def tokens(self) -> Sequence[dict[str, Any]]:
        """All tokens, without their secrets."""
        found: Sequence[dict[str, Any]] = self._ask("GET", "/v1/tokens")["items"]
        return found

    def revoke(self, name: str, *, key: str | None = None) -> None:
        """A token counts no more."""
        self._change("DELETE", f"/v1/tokens/{quote(name, safe='')}", key, None)

    def grants(self) -> Sequence[dict[str, Any]]:
        """Hosts that were granted, to or by whoever asks."""
        found: Sequence[dict[str, Any]] = self._ask("GET", "/v1/grants")["items"]
        return found

    def grant(
        self,
        network: str | None,
        tenant: str,
        hosts: Sequence[str] | None = None,
        quota: Mapping[str, int | str | None] | None = None,
        *,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Grant hosts of a network, None: machines, to a tenant; `hosts` by name, None: all."""
        body = {"network": network, "tenant": tenant, "hosts": hosts, "quota": dict(quota or {})}
        return self._change("POST", "/v1/grants", key, None, json=body)

    def invite_tenant(
        self,
        network: str | None,
        hosts: Sequence[str] | None = None,
        quota: Mapping[str, int | str | None] | None = None,
        ttl: float = 7 * 86400.0,
        *,
        key: str | None = None,
    ) -> dict[str, Any]:
        """The same for whoever redeems the `invitation`; `ttl` in seconds."""
        body = {"network": network, "hosts": hosts, "quota": dict(quota or {}), "ttl": ttl}
        return self._change("POST", "/v1/invitations", key, None, json=body)

    def redeem(self, invitation: str, tenant: str | None = None, *, key: str | None = None) -> dict[str, Any]:
        """What an invitation offers is a tenant's; None: the only one that is one's own."""
        return self._change("POST", "/v1/redeem", key, None, json={"invitation": invitation, "tenant": tenant})

    def change_grant(
        self, grant: str, suspended: bool | None = None, cut: bool | None = None, *, key: str | None = None
    ) -> dict[str, Any]:
        """Suspend or cut a grant, or open it again."""
        body = {"suspended": suspended, "cut": cut}
        return self._change("PATCH", f"/v1/grants/{quote(grant, safe='')}", key, None, json=body)

    def revoke_grant(
        self, grant: str, cascade: bool = False, grace: float = 86400.0, *, key: str | None = None
    ) -> dict[str, Any] | None:
        """Revoke a grant; with `cascade` all that it carries goes with it after `grace` seconds."""
        wanted = {"cascade": cascade, "grace": grace} if cascade else {}
        path = f"/v1/grants/{quote(grant, safe='')}"
        left: dict[str, Any] | None = self._change("DELETE", path, key, None, params=wanted)["grant"]
        return left

    def confirm(self, *, key: str | None = None) -> int:
        """Let agents remove what a restored store does not know; returns the revision."""
        return int(self._change("POST", "/v1/confirm", key, None)["revision"])

    def backup(self, to: Path) -> int:
        """Write a copy of the whole store to a file, which others may not read; returns its size in bytes."""
        part = to.with_name(f"{to.name}.part")
        try:
            with self._reaching(), self._http.stream("GET", "/v1/backup") as response:
                if response.is_error:
                    response.read()
                    raise _error(response)
                part.touch(0o600)
                with part.open("wb") as file:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
            part.rename(to)
        finally:
            part.unlink(missing_ok=True)
        return to.stat().st_size

    def restore(self, file: Path, force: bool = False) -> int:
        """Have the store become what a backup is; returns the revision. It is asked for once: look before again."""
        query = {"force": True} if force else {}
        with self._reaching(), file.open("rb") as body:
            response = self._http.request("POST", "/v1/restore", params=query, content=body, timeout=None)
        if response.is_error:
            raise _error(response)
        return int(msgspec.json.decode(response.content)["revision"])

    def status(self, since: str | None = None) -> dict[str, Any]:
        """{"controller", "revision", "machines": [{"name", "realised", "current", "reported", "problems", ...}]}. A
        machine is current when it has realised what `since` stands for, the token of a change; None: everything."""
        return self._ask("GET", "/v1/status", params={} if since is None else {"since": since})

    def trace(self, port: str, to: str, protocol: str = "icmp", dport: int = 0) -> dict[str, Any]:
        """What would happen to a packet, layer by layer."""
        query = {"port": port, "to": to, "protocol": protocol, "dport": dport}
        return self._ask("GET", "/v1/trace", params=query)

    def report(
        self,
        machine: str,
        revision: int | str,
        problems: Sequence[str] = (),
        ports: Mapping[str, Any] | None = None,
        events: Sequence[tuple[str, str]] = (),
        *,
        key: str | None = None,
    ) -> None:
        """An agent tells that its machine has realised a revision, as its feed calls it. `ports`, by row id, replaces
        what it said of them before; None leaves that. `events` are (kind, text): repaired, drops or started; told again
        with their `key`, they are written once."""
        body: dict[str, Any] = {"revision": revision, "problems": list(problems)}
        if isinstance(revision, str):
            body |= {"revision": 0, "token": revision}
        if ports is not None:
            body["ports"] = dict(ports)
        if events:
            body["events"] = [{"kind": kind, "text": text} for kind, text in events]
        self._change("PUT", _member("machine", machine) + "/status", key, None, json=body)

    def feed(self, machine: str, since: str | None = None, boot: str = "") -> Iterator[dict[str, Any]]:
        """The lines of a machine's feed as they come, without end: batches (with `rows`) and heartbeats. `boot` tells
        this system from others: one at a time may follow. A snapshot may be large: its rows are read one by one, when
        they are asked for.

        Raises Unreachable when the controller stops, or is silent for 15 s: begin again with the last `token`.
        """
        query = {"machine": machine, "boot": boot} | ({"since": since} if since is not None else {})
        yield from self._lines("/v1/feed", query, read_batch)
        raise Unreachable(f"the controller at {self.url} ended the feed")

    def watch(
        self, since: str | None = None, kind: str | None = None, network: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """Objects as they change, without end: lines as `/v1/watch` has them. It goes on by itself when the controller
        stops and starts again; raises Unreachable when that takes longer than `patience`."""
        query = {"kind": kind, "network": network}
        return self._resumed("/v1/watch", {k: v for k, v in query.items() if v is not None}, since)

    def events(self, since: str | None = None, last: int = 100, follow: bool = False) -> Iterator[dict[str, Any]]:
        """What happened, oldest first: since a token, or the last so many; `follow`: and what is to come, as `watch`.
        Lines as `/v1/events` has them."""
        query: dict[str, Any] = {"last": last}
        if not follow:
            return self._lines("/v1/events", query | ({"since": since} if since is not None else {}))
        return self._resumed("/v1/events", {**query, "follow": True}, since)

    def _resumed(self, path: str, query: Mapping[str, Any], since: str | None) -> Iterator[dict[str, Any]]:
        pauses = self._pauses()
        while True:
            try:
                for line in self._lines(path, {**query, **({"since": since} if since is not None else {})}):
                    since = line.get("token") or since
                    pauses = self._pauses()
                    yield line
                lost = Unreachable(f"the controller at {self.url} ended the stream")
            except Unreachable as error:
                if not self._answered:
                    raise
                lost = error
            if (pause := next(pauses, None)) is None:
                raise lost
            time.sleep(pause)  # the pace of asking; the wait is for the answer

    def _lines(
        self, path: str, query: Mapping[str, Any], read: Callable[[str], dict[str, Any]] = msgspec.json.decode
    ) -> Iterator[dict[str, Any]]:
        timeout = httpx2.Timeout(SILENCE)
        with self._reaching(), self._http.stream("GET", path, params=query, timeout=timeout) as response:
            self._answered = True
            if response.is_error:
                response.read()
                raise _error(response)
            for line in response.iter_lines():
                yield read(line)

    def _change(self, method: str, path: str, key: str | None, etag: str | None, **more: Any) -> dict[str, Any]:
        headers = {"Idempotency-Key": key or uuid4().hex}
        if etag is not None:
            headers["If-Match"] = f'"{etag}"'
        return self._ask(method, path, headers=headers, **more)

    def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        response = self._answer(method, path, **more)
        return msgspec.json.decode(response.content) if response.content else {}

    def _answer(self, method: str, path: str, **more: Any) -> httpx2.Response:
        pauses = self._pauses()
        while True:
            try:
                with self._reaching():
                    response = self._http.request(method, path, **more)
                self._answered = True
                if response.is_error:
                    raise _error(response)
                return response
            except (Unreachable, TooFast) as error:
                lost = isinstance(error.__cause__, (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError))
                # Who never answered is not there; who did is away for a moment.
                if not (self._answered or lost):
                    raise
                self._answered = True
                pause = next(pauses, None)
                if pause is None:
                    raise
                # The pace of asking; the wait is for the answer.
                time.sleep(max(pause, error.after) if isinstance(error, TooFast) else pause)

    def _pauses(self) -> Iterator[float]:
        """How long to wait before each further attempt, for as long as there is patience."""
        end, pause = time.monotonic() + self.patience, FIRST_PAUSE
        while time.monotonic() < end:
            yield pause * random.uniform(0.5, 1.0)  # many clients must not come back in step
            pause = min(pause * 2, LONGEST_PAUSE)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(f"no controller answers at {self.url}: {reason}") from error


def _collection(kind: str) -> str:
    if kind not in (*KINDS, "host"):
        raise ValueError(f"{kind!r} is no kind; there are {', '.join(KINDS)}")
    return "/v1/policies" if kind == "policy" else f"/v1/{kind}s"


def _member(kind: str, reference: str) -> str:
    return f"{_collection(kind)}/{quote(reference, safe='/')}"


def _moving(machine: str, port: int) -> str:
    return f"{_member('machine', machine)}/moves/{port}"


def _error(response: httpx2.Response) -> NestnetError:
    """What the API said went wrong."""
    try:
        data = msgspec.json.decode(response.content)
        return _said({**data, "status": response.status_code}, float(response.headers.get("Retry-After", 1)))
    except (msgspec.DecodeError, KeyError, TypeError):
        message = f"the controller answered {response.status_code}, and nothing that explains it"
        return Unreachable(message) if response.status_code in (502, 503) else NestnetError(message)


def _said(data: Mapping[str, Any], after: float = 1.0) -> NestnetError:
    """The error of a problem (RFC 9457). Raises KeyError or TypeError if it is none."""
    detail, code = str(data["detail"]), str(data["code"])
    error: NestnetError
    match data["status"]:
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
        case 401:
            error = Unauthenticated(detail)
        case 403:
            error = Forbidden(detail, code)
        case 412:
            error = Stale(detail, data.get("changes", ()))
        case 429:
            error = TooFast(detail, after)
        case 502 | 503:
            error = Unreachable(detail)
        case 504:
            error = NotRealised(detail)
        case 507:
            error = DiskFull(detail)
        case _:
            error = NestnetError(detail, code)
    error.message = detail
    return error
