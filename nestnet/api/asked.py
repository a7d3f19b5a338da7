"""How a change is asked for and answered, how often somebody may ask, and what a connection knows of who asks."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import OrderedDict
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Header, Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nestnet.api.access import who
from nestnet.model.errors import Invalid, Problem, TooFast
from nestnet.store.once import Asked
from nestnet.store.store import Store

RATE, BURST = 100.0, 500.0  # Requests of one tenant: so many a second in the long run, so many at once.
BUCKETS = 10_000  # Of tenants that are remembered; who is forgotten begins with a full one.
HEAD = 64 * 1024  # Bytes that are kept of a request before anything of it is done: its head, or what follows its body.


class Peered(HttpToolsProtocol):
    """HTTP that knows who is at the other end: `request.state.uid` of a unix socket (SO_PEERCRED), `.certificate` (DER)
    of TLS. Who sends a head without end is answered with 400."""

    def connection_made(self, transport: object) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._kept, self._in_head = 0, False  # Bytes since the parser last had something whole.
        tls = transport.get_extra_info("ssl_object")  # type: ignore[attr-defined]
        # Over TLS whoever dials may be a relay, and speaks for nobody.
        uid = _uid(transport.get_extra_info("socket")) if tls is None else None  # type: ignore[attr-defined]
        if uid is not None:
            self.app_state = {**self.app_state, "uid": uid}
        if tls is not None and (certificate := tls.getpeercert(binary_form=True)) is not None:
            self.app_state = {**self.app_state, "certificate": certificate}

    def data_received(self, data: bytes) -> None:
        self._kept += len(data)
        super().data_received(data)
        if self._kept > HEAD and not self.transport.is_closing():
            self.send_400_response("The head of this request is too long.")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer, and nobody asks for those
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._kept, self._in_head = 0, False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._kept = 0
        super().on_message_complete()


def _uid(connection: object) -> int | None:
    if not isinstance(getattr(connection, "family", None), int) or connection.family != socket.AF_UNIX:  # type: ignore[attr-defined]
        return None
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # type: ignore[attr-defined]
    return int(struct.unpack("iII", raw)[1])  # struct ucred: pid, uid, gid


KEY = range(1, 256)  # Characters of an idempotency key.
ONCE = "Any text of yours: asked again with it, it is done once."
Key = Annotated[str | None, Header(min_length=KEY[0], max_length=KEY[-1], description=ONCE)]


async def keyed(request: Request, idempotency_key: Key = None) -> Asked:
    """How something is asked for that is no object's, so without ETags."""
    asker = who(request)
    return Asked(asker.name, asker.tenant, idempotency_key, scope=asker.scope)


async def asked(
    request: Request,
    idempotency_key: Key = None,
    if_match: Annotated[
        str | None, Header(max_length=1000, description='ETags, as "a1b2": 412 unless the object has one of them.')
    ] = None,
) -> Asked:
    """How a change is asked for."""
    return replace(await keyed(request, idempotency_key), etags=None if if_match is None else _etags(if_match))


def changed(store: Store, how: Asked, revision: int, **more: Any) -> dict[str, Any]:
    """The answer to a change: the revision since which it is so, for those who may see it, and a token that stands for
    it. Asked again with one key, it is the same."""
    shown = revision if how.scope.reads is None else None
    return {"revision": shown, "token": store.identity.seal(revision, "watch", how.once), **more}


def _etags(header: str) -> tuple[str, ...]:
    """RFC 9110, 13.1.1. A weak ETag matches nothing."""
    found = []
    for each in (part.strip() for part in header.split(",")):
        if each == "*":
            found.append(each)
        elif len(each) > 2 and each[0] == each[-1] == '"':
            found.append(each[1:-1])
        elif not each.startswith('W/"'):
            message = f'If-Match is * or ETags in quotes, as "{each.strip(chr(34))[:40]}"'
            raise Invalid([Problem("bad_value", "/if-match", message)])
    return tuple(found)


class Rates:
    """A bucket of requests for each tenant. Threads may share it."""

    def __init__(self, rate: float = RATE, burst: float = BURST) -> None:
        self._rate, self._burst = rate, burst
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tenant -> left, when; oldest first
        self.refused = 0

    def spend(self, tenant: str) -> None:
        """One request. Raises TooFast when the bucket is empty."""
        if not tenant:
            return
        now = time.monotonic()
        with self._lock:
            left, at = self._buckets.pop(tenant, (self._burst, now))
            left = min(self._burst, left + (now - at) * self._rate)
            self._buckets[tenant] = (left - 1 if left >= 1 else left, now)
            if len(self._buckets) > BUCKETS:
                self._buckets.popitem(last=False)
            if left < 1:
                self.refused += 1
                after = (1 - left) / self._rate
                raise TooFast(f"tenant {tenant} asks more than {self._rate:g} times a second: wait", after)
