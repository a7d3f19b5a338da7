"""The stream that an agent follows: batches, and a heartbeat when there are none (rule 23).

    {"snapshot": true, "revision": 7, "token": "...", "rows": [{"kind": "port", "id": 3, "value": {...}}, ...]}
    {"revision": 9, "token": "..."}

The doorbell carries no data. Whoever it wakes reads what changed since the revision it has, so ten
commits in a row are one batch. A stream that nothing happens to is one waiting task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool

from nestnet.model.wire import to_wire
from nestnet.store.feed import Batch
from nestnet.store.store import Store

HEARTBEAT = 5.0  # Seconds between two lines at most.


class Doorbell:
    """Wakes all who wait. Made in the event loop, rung from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self.closed = False

    def ring(self) -> None:
        self._loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        """End all streams: the controller stops."""
        self.closed = True
        self.ring()

    def _wake(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def listen(self) -> asyncio.Event:
        """Set when it next rings. Take it before reading, so that no ring is missed."""
        return self._event


async def follow(store: Store, bell: Doorbell, machine: int, token: str | None) -> AsyncIterator[bytes]:
    """The lines for a machine, by its row id, since a resume token; everything if that is not valid."""
    loop = asyncio.get_running_loop()
    known = store.identity.unseal(token) if token is not None else None
    spoke = 0.0
    while not bell.closed:
        ring = bell.listen()
        revision, line, gone = await run_in_threadpool(_read, store, machine, known)
        due = loop.time() - spoke >= HEARTBEAT
        if line is not None or due or known is None:
            yield line or _line({"revision": revision, "token": store.identity.seal(revision)})
            spoke = loop.time()
        known = revision
        if gone:
            return
        try:
            async with asyncio.timeout(max(0.0, spoke + HEARTBEAT - loop.time())):
                await ring.wait()
        except TimeoutError:
            pass


def _read(store: Store, machine: int, since: int | None) -> tuple[int, bytes | None, bool]:
    """(revision, line or None if nothing changed, whether the machine is gone)."""
    batch = store.changes_since(machine, since) if since is not None else None
    if batch is None:
        batch = store.snapshot_for(machine)
    gone = any((kind, id, value) == ("machine", machine, None) for kind, id, value in batch.rows)
    line = _encode(store, batch) if batch.rows or batch.snapshot else None
    return batch.revision, line, gone


def _encode(store: Store, batch: Batch) -> bytes:
    rows = [{"kind": kind, "id": id, "value": value and to_wire(value)} for kind, id, value in batch.rows]
    token = store.identity.seal(batch.revision)
    return _line({"snapshot": batch.snapshot, "revision": batch.revision, "token": token, "rows": rows})


def _line(data: dict[str, Any]) -> bytes:
    return msgspec.json.encode(data) + b"\n"
