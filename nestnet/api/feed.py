"""The stream that an agent follows: batches, and a heartbeat when there are none (rule 23).

    {"snapshot": true, "revision": 7, "token": "...", "store": "...", "confirmed": false,
     "rows": [{"kind": "port", "id": 3, "value": {...}}, ...]}
    {"revision": 9, "token": "...", "store": "...", "confirmed": false}

For a machine on a port `revision` is the token: a number would count what others change.

`store` is another word after a restore: then an agent asks itself what it would remove (agent/feed.py). `confirmed`
says that somebody who knows has agreed.

The doorbell carries no data. Whoever it wakes reads what changed since the revision it has, so ten
commits in a row are one batch. A stream that nothing happens to is one waiting task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool

from nestnet.model.errors import Conflict
from nestnet.model.values import Value
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


class Followers:
    """Which system follows the feed of a machine: one that has a copy of its disk must not take turns with it. The
    store is told who comes and who goes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._following: dict[int, tuple[str, int]] = {}  # machine -> boot, streams; all in the event loop

    def judge(self, machine: int, name: str, boot: str) -> None:
        """Raise Conflict if another system follows it now. The same one may come back before its old connection is
        known to have ended."""
        if self._following.get(machine, (boot, 0))[0] != boot:
            raise Conflict(
                f"another system is connected as machine {name}: a copy of its disk, perhaps? "
                "`nestnet join` with a join token of its own makes this one another machine",
                "already_connected",
            )

    async def following(
        self, machine: int, name: str, boot: str, lines: AsyncGenerator[bytes]
    ) -> AsyncGenerator[bytes]:
        """The lines, while it is known who follows them."""
        self.judge(machine, name, boot)
        self._following[machine] = boot, self._following.get(machine, (boot, 0))[1] + 1
        self._store.heard.come(machine)
        try:
            async for line in lines:
                yield line
        finally:
            await lines.aclose()
            _, streams = self._following.pop(machine)
            if streams > 1:
                self._following[machine] = boot, streams - 1
            else:
                self._store.heard.leave(machine)


async def follow(store: Store, bell: Doorbell, machine: int, token: str | None) -> AsyncGenerator[bytes]:
    """The lines for a machine, by its row id, since a resume token; everything if that is not valid."""
    loop = asyncio.get_running_loop()
    identity, confirmed = store.identity, store.confirmed
    numbered = not await run_in_threadpool(store.is_on_port, machine)
    known = identity.unseal(token) if token is not None else None
    told: dict[int, Value | None] | None = None if numbered else {}
    spoke = 0.0
    while not bell.closed:
        ring = bell.listen()
        if store.identity is not identity:  # Restored: what it had, it had from another store.
            identity, known = store.identity, None
        revision, line, gone = await run_in_threadpool(_read, store, machine, known, told)
        due = loop.time() - spoke >= HEARTBEAT or store.confirmed != confirmed
        if line is not None or due or known is None:
            confirmed = store.confirmed
            yield _line({**_head(store, revision, numbered), **(line or {})})
            spoke = loop.time()
        known = revision
        if gone:
            return
        try:
            async with asyncio.timeout(max(0.0, spoke + HEARTBEAT - loop.time())):
                await ring.wait()
        except TimeoutError:
            pass


def _read(
    store: Store, machine: int, since: int | None, told: dict[int, Value | None] | None
) -> tuple[int, dict[str, Any] | None, bool]:
    """(revision, line or None if nothing changed, whether the machine is gone). `told`, of one on a port: the machines
    of its domain as this stream has told them."""
    batch = store.changes_since(machine, since) if since is not None else None
    if batch is None:
        batch = store.snapshot_for(machine)
    gone = any((kind, id, value) == ("machine", machine, None) for kind, id, value in batch.rows)
    if told is not None:
        batch = replace(batch, rows=_news(store, machine, batch, told))
    line = _encode(batch) if batch.rows or batch.snapshot else None
    return batch.revision, line, gone


def _news(
    store: Store, machine: int, batch: Batch, told: dict[int, Value | None]
) -> tuple[tuple[str, int, Value | None], ...]:
    """The rows without machines that are as they were told: the store has them all for any change below. A stream that
    goes on begins with all of them, whatever has happened below."""
    machines = {id: value for kind, id, value in batch.rows if kind == "machine"}
    if batch.snapshot:
        told.clear()
        told.update(machines)
        return batch.rows
    if not told:
        machines |= dict(store.machines_for(machine))
    news = [("machine", id, value) for id, value in sorted(machines.items()) if id not in told or told[id] != value]
    told.update(machines)
    return (*news, *(row for row in batch.rows if row[0] != "machine"))


def _head(store: Store, revision: int, numbered: bool) -> dict[str, Any]:
    token = store.identity.seal(revision)
    return {
        "revision": revision if numbered else token,
        "token": token,
        "store": store.identity.store,
        "confirmed": store.confirmed,
    }


def _encode(batch: Batch) -> dict[str, Any]:
    rows = [{"kind": kind, "id": id, "value": value and to_wire(value)} for kind, id, value in batch.rows]
    return {"snapshot": batch.snapshot, "rows": rows}


def _line(data: dict[str, Any]) -> bytes:
    return msgspec.json.encode(data) + b"\n"
