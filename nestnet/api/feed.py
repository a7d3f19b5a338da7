"""The stream that an agent follows: batches, and a heartbeat when there are none (rule 23).

    {"snapshot": true, "revision": 7, "token": "...", "store": "...", "confirmed": false,
     "rows": [{"kind": "port", "id": 3, "value": {...}}, ...]}
    {"revision": 9, "token": "...", "store": "...", "confirmed": false}

To a machine on a port no number is told that tells what others make: `revision` is the token, and all ids are those of
its domain, which only this store can turn into rows. So what it says is turned back (api/numbers.py).

`store` is another word after a restore: then an agent asks itself what it would remove (agent/feed.py). `confirmed`
says that somebody who knows has agreed.

The doorbell carries no data. The exchange hears it, reads what changed once for all machines, and wakes whom that
concerns; who is woken reads what changed since the revision it has, so ten commits in a row are one batch. A stream
that nothing happens to is one waiting task, whatever happens to others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
from starlette.concurrency import run_in_threadpool

from nestnet.model.errors import Conflict
from nestnet.model.renumber import renumbered
from nestnet.model.values import FABRIC, Port, Value
from nestnet.model.wire import to_wire
from nestnet.store.feed import Batch, Touched
from nestnet.store.identity import Identity
from nestnet.store.store import Store

log = logging.getLogger("nestnet.api")

HEARTBEAT = 5.0  # Seconds between two lines at most.
ON_PORTS = "on ports"  # What resume tokens of machines on ports are sealed for.


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


class Given(NamedTuple):
    """A batch, and its line."""

    batch: Batch
    line: dict[str, Any] | None


class Stream:
    """One that follows the feed of a machine: what it has is as of `base`, unless it is not `stale`; then as of now."""

    def __init__(self, base: int | None) -> None:
        self.base = base
        self.stale = True
        self.given: Given | None = None  # what it has to hear since `base`, if that was read for all
        self.below: frozenset[int] = frozenset()
        self.event = asyncio.Event()

    def wake(self, base: int, given: Given | None = None) -> None:
        """There is news since this revision, if it has not read that already."""
        if not self.stale:
            self.stale, self.base = True, max(base, self.base or 0)
            self.given = given if self.base == base else None
        else:
            self.given = None
        self.event.set()


class Exchange:
    """Wakes those streams that a commit concerns, and no others: it asks once for all what has changed, and which
    machines have that. Made, and used, in the event loop."""

    def __init__(self, store: Store, bell: Doorbell) -> None:
        self.now, self.bell = store.revision, bell
        self._store = store
        self._identity, self._confirmed = store.identity, store.confirmed
        self._above: dict[int, set[Stream]] = {}  # by network below: few have any but the fabric
        self._of: dict[int, set[Stream]] = {}  # by machine
        self._alike: set[int] = set()  # machines that are told rows as the store has them

    async def run(self) -> None:
        """Follow the doorbell until it is closed."""
        try:
            while not self.bell.closed:
                ring = self.bell.listen()
                try:
                    if self._of:  # whoever comes later has read all there was
                        await self._look()
                except Exception:  # Without it all would be silent: so they are asked to look themselves.
                    log.exception("what the feed's streams have to know could not be read")
                    self._wake_all(self.now)
                await ring.wait()
        finally:
            self._wake_all(self.now)

    async def _look(self) -> None:
        store = self._store
        identity, confirmed = store.identity, store.confirmed
        touched, given = await run_in_threadpool(self._news, store, self.now, frozenset(self._alike))
        was, self.now = self.now, touched.revision if touched is not None else store.revision
        if touched is None or identity is not self._identity or confirmed != self._confirmed:
            self._identity, self._confirmed = identity, confirmed
            self._wake_all(was)
            return
        for network in touched.networks & self._above.keys():
            for stream in self._above[network]:
                stream.wake(was)
        for machine in touched.machines & self._of.keys():
            for stream in self._of[machine]:
                stream.wake(was, given.get(machine))

    @staticmethod
    def _news(store: Store, since: int, alike: frozenset[int]) -> tuple[Touched | None, dict[int, Given]]:
        """Whom it concerns, and what those have to hear whose rows are the store's own: read once for all of them."""
        touched = store.touched(since)
        if touched is None or FABRIC in touched.networks:
            return touched, {}
        identity = store.identity
        batches = store.changes_for(touched.machines & alike, since) or {}
        lines: dict[int, dict[str, Any] | None] = {}
        for batch in batches.values():
            if id(batch) not in lines:
                lines[id(batch)] = _encode(batch, identity, FABRIC) if batch.rows else None
        return touched, {machine: Given(batch, lines[id(batch)]) for machine, batch in batches.items()}

    def _wake_all(self, base: int) -> None:
        for streams in self._of.values():
            for stream in streams:
                stream.wake(base)

    def join(self, machine: int, domain: int, stream: Stream) -> None:
        self._of.setdefault(machine, set()).add(stream)
        if domain == FABRIC:
            self._alike.add(machine)

    def place(self, stream: Stream, below: frozenset[int], revision: int) -> None:
        """It has all up to this revision, and these networks are below it from then on."""
        self._move(stream, below)
        stream.base = revision
        if revision < self.now:  # what came meanwhile was not known to be its affair
            stream.event.set()
        else:
            stream.stale = False

    def leave(self, machine: int, stream: Stream) -> None:
        self._move(stream, frozenset())
        self._of[machine].discard(stream)
        if not self._of[machine]:
            del self._of[machine]
            self._alike.discard(machine)

    def _move(self, stream: Stream, below: frozenset[int]) -> None:
        for network in stream.below - below:
            self._above[network].discard(stream)
            if not self._above[network]:
                del self._above[network]
        for network in below - stream.below:
            self._above.setdefault(network, set()).add(stream)
        stream.below = below


async def follow(store: Store, exchange: Exchange, machine: int, token: str | None) -> AsyncGenerator[bytes]:
    """The lines for a machine, by its row id, since a resume token; everything if that is not valid."""
    loop = asyncio.get_running_loop()
    identity, confirmed = store.identity, store.confirmed
    domain = await run_in_threadpool(store.domain_of, machine)
    if domain is None:
        return
    told: dict[int, Value | None] | None = None if domain == FABRIC else {}
    stream = Stream(identity.unseal(token, sealed_for(domain)) if token is not None else None)
    fresh = stream.base is None
    spoke = 0.0
    exchange.join(machine, domain, stream)
    try:
        while not exchange.bell.closed:
            stream.event.clear()
            if store.identity is not identity:  # Restored: what it had, it had from another store.
                identity, stream.base, stream.stale, stream.given = store.identity, None, True, None
            line, gone = None, False
            if stream.stale:
                given, stream.given = stream.given, None
                if given is None:
                    batch = await run_in_threadpool(_read, store, machine, stream.base, told)
                    if batch.rows or batch.snapshot:  # what others hear does not wait for that
                        line = await run_in_threadpool(_encode, batch, identity, domain)
                else:
                    batch, line = given
                exchange.place(stream, batch.below, batch.revision)
                gone = any((kind, id, value) == ("machine", machine, None) for kind, id, value in batch.rows)
            due = loop.time() - spoke >= HEARTBEAT or store.confirmed != confirmed
            if line is not None or due or fresh:
                confirmed, fresh = store.confirmed, False
                has = stream.base or 0
                revision = has if stream.stale else max(has, exchange.now)
                yield _line({**_head(store, revision, domain), **(line or {})})
                spoke = loop.time()
            if gone:
                return
            try:
                async with asyncio.timeout(max(0.0, spoke + HEARTBEAT - loop.time())):
                    await stream.event.wait()
            except TimeoutError:
                pass
    finally:
        exchange.leave(machine, stream)


def _read(store: Store, machine: int, since: int | None, told: dict[int, Value | None] | None) -> Batch:
    """What is new for a machine; everything if it must have that. `told`, of one on a port: the machines of its domain
    as this stream has told them."""
    batch = store.changes_since(machine, since) if since is not None else None
    if batch is None:
        batch = store.snapshot_for(machine)
    return batch if told is None else replace(batch, rows=_news(store, machine, batch, told))


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


def sealed_for(domain: int) -> str:
    """What resume tokens of machines in a domain are for: none of another kind is one."""
    return "" if domain == FABRIC else ON_PORTS


def _head(store: Store, revision: int, domain: int) -> dict[str, Any]:
    token = store.identity.seal(revision, sealed_for(domain))
    return {
        "revision": revision if domain == FABRIC else token,
        "token": token,
        "store": store.identity.store,
        "confirmed": store.confirmed,
    }


def _encode(batch: Batch, identity: Identity, domain: int) -> dict[str, Any]:
    """The rows by the numbers of a domain."""

    def number(kind: str, row: int) -> int:
        return identity.number(kind, row, domain)

    def told(value: Value) -> Value:
        if domain == FABRIC:
            return value
        is_on_machine = isinstance(value, Port) and value.network in batch.on_machines
        return renumbered(value, number, "machine" if is_on_machine else "port")

    rows = ((kind, number(kind, id), value and to_wire(told(value))) for kind, id, value in batch.rows)
    told_of = [{"kind": kind, "id": id, "value": value} for kind, id, value in rows]
    return {"snapshot": batch.snapshot, "rows": msgspec.Raw(msgspec.json.encode(told_of))}


def _line(data: dict[str, Any]) -> bytes:
    return msgspec.json.encode(data) + b"\n"
