"""The streams for people and programs: one JSON object a line, at least one every HEARTBEAT seconds.

    /v1/watch     objects as they change
        {"snapshot": "new", "revision": 7, "objects": [{"id": "port_…", "kind": "port", "object": {…}}, …]}
        {"snapshot": "new", "revision": 7, "objects": […], "token": "…"}          the last part of it has the token
        {"revision": 9, "token": "…", "objects": [{"id": "link_…", "kind": "link", "object": null}]}       null: gone
        {"revision": 9, "token": "…"}                                              nothing happened
    /v1/events    what happened
        {"token": "…", "event": {"at": …, "kind": "changed", "who": "uid:0", "text": "…", …}}

A token says where to go on, after a restart of either side too. A watch that cannot go on (the token is of another
store, as after a restore, or too old) begins anew with a snapshot that says so: `snapshot` is new, other_store or
too_old, and whatever it does not name is gone. What changes while a snapshot is read comes after it. The revision is
null for those who do not see everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool

from nestnet.api.feed import HEARTBEAT, Doorbell
from nestnet.store.read import IN_NETWORK, KINDS
from nestnet.store.scope import Scope
from nestnet.store.store import Store

PART = 500  # Objects of one line of a snapshot.
EVENTS = 200  # Events that are read at a time.


async def watch(
    store: Store, bell: Doorbell, token: str | None, kind: str | None, network: str | None, scope: Scope
) -> AsyncIterator[bytes]:
    """The lines of a watch since a token, of what is in scope."""
    identity = store.identity
    known = identity.unseal(token, "watch") if token is not None else None
    why = "new" if token is None else "other_store"
    row = await run_in_threadpool(store.network_row, network, scope) if network is not None else None
    spoke = 0.0
    while not bell.closed:
        ring = bell.listen()
        if store.identity is not identity:  # Restored: nothing from before counts.
            identity, known, why = store.identity, None, "other_store"
        changes = None
        if known is not None:
            changes = await run_in_threadpool(store.changes_of_objects, known, kind, row, scope)
        if changes is None:
            why = why if known is None else "too_old"
            known = await run_in_threadpool(lambda: store.revision)
            parts = _snapshot(store, known, why, kind, network, scope)
            while (part := await run_in_threadpool(next, parts, None)) is not None:
                yield part
            spoke = asyncio.get_running_loop().time()
            continue
        shown = _shown(changes.revision, scope)
        line: dict[str, Any] = {"revision": shown, "token": identity.seal(changes.revision, "watch")}
        objects = [
            {"id": identity.public(kind, id), "kind": kind, "object": resource}
            for kind, id, resource in changes.objects
        ]
        if objects or asyncio.get_running_loop().time() - spoke >= HEARTBEAT:
            yield _line({**line, "objects": objects} if objects else line)
            spoke = asyncio.get_running_loop().time()
        known = changes.revision
        await _wait(ring, spoke)


def _snapshot(
    store: Store, revision: int, why: str, kind: str | None, network: str | None, scope: Scope
) -> Iterator[bytes]:
    """All there is, in parts. Read page by page: what changes meanwhile is among the changes since `revision`."""
    head: dict[str, Any] = {"snapshot": why, "revision": _shown(revision, scope)}
    for each in KINDS if kind is None else (kind,):
        if network is not None and each not in IN_NETWORK:
            if each == "network":
                found = store.get("network", network, scope)
                yield _line({**head, "objects": [{"id": found["id"], "kind": each, "object": found}]})
            continue
        cursor = None
        while True:
            page, cursor = store.list(each, network, PART, cursor, scope)
            if page:
                objects = [{"id": item["id"], "kind": each, "object": item} for item in page]
                yield _line({**head, "objects": objects})
            if cursor is None:
                break
    yield _line({**head, "objects": [], "token": store.identity.seal(revision, "watch")})


async def events(store: Store, bell: Doorbell, token: str | None, last: int, on: bool) -> AsyncIterator[bytes]:
    """The lines of events since a token, or the last so many; `on`: and those to come."""
    identity = store.identity
    seq = identity.unseal(token, "events") if token is not None else None
    if seq is None:
        seq = await run_in_threadpool(store.last_events, last)
    spoke = asyncio.get_running_loop().time()
    while not bell.closed:
        ring = bell.listen()
        if store.identity is not identity:
            identity, seq = store.identity, await run_in_threadpool(store.last_events, 1)
        found = await run_in_threadpool(store.events_after, seq, EVENTS)
        for seq, event in found:
            yield _line({"token": identity.seal(seq, "events"), "event": event})
            spoke = asyncio.get_running_loop().time()
        if len(found) == EVENTS:
            continue
        if not on:
            return
        if asyncio.get_running_loop().time() - spoke >= HEARTBEAT:
            yield _line({"token": identity.seal(seq, "events")})
            spoke = asyncio.get_running_loop().time()
        await _wait(ring, spoke)


async def _wait(ring: asyncio.Event, spoke: float) -> None:
    try:
        async with asyncio.timeout(max(0.0, spoke + HEARTBEAT - asyncio.get_running_loop().time())):
            await ring.wait()
    except TimeoutError:
        pass


def _shown(revision: int, scope: Scope) -> int | None:
    return revision if scope.reads is None else None  # It counts what others change, too.


def _line(data: dict[str, Any]) -> bytes:
    return msgspec.json.encode(data) + b"\n"
