"""The relay: how an agent in a port's workload reaches the controller (rule 25).

    workload                     machine
    agent -- TLS --> [fe80::1%eth0]:4795  relay -- the same bytes --> the controller, as the machine's own agent has it

The programs let nothing else through to the machine's stack, and this from no port but one with an `agent`
(docs/datapath.md, line 6). What is relayed is TLS between that agent and the controller: here it is bytes. Each port
has a listening socket of its own, on its own link, and bounds of its own: one that uses them up waits, and nobody
else does. One thread does all of it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nestnet.model.clock import SECOND
from nestnet.model.rates import spend
from nestnet.model.values import RELAY, RELAY_PORT

CONNECTIONS = 32  # of a port at once: an agent has three, and it may relay for others. More wait to be accepted.
# A port may have so many bytes in a second, each way, and open so many connections: the first 20,000 values of a feed
# are 8 MB, and each connection is a TLS handshake. All ports together have EVERYBODY times that, in turn: the thread
# must leave the processor to its agent.
BYTES, OPENED = 4_000_000, 10
EVERYBODY = 16
CHUNK = 1 << 16  # bytes of a connection in hand, each way
BUFFER = 1 << 17  # bytes that the kernel holds at each of its four ends: so much memory can a port tie up, and no more
IDLE = 60.0  # seconds without a byte either way: a feed says something every 5
GONE = 30  # seconds for an end to acknowledge what it was sent
DIAL = 5.0  # seconds for the controller to take a connection
PAUSE = 1.0  # seconds until the next is accepted, when that failed: there are no descriptors left
IPV6_FREEBIND = 78  # <linux/in6.h>: the address may be missing, and come back
AT_ONCE = struct.pack("ii", 1, 0)  # struct linger: who waits for an answer shall know that there will be none

T = TypeVar("T")


@dataclass(slots=True)
class Counts:
    """Of one port, as long as it has a relay here. `connections` are those of now; of those `accepted` some `failed` to
    reach the controller; bytes `sent` to it and `received` from it."""

    connections: int = 0
    accepted: int = 0
    failed: int = 0
    sent: int = 0
    received: int = 0


class Relay:
    """Relays to `controller`, unix:PATH or https://HOST:PORT, in the network namespace of the thread that makes it, for
    the ports that it knows, until it is closed."""

    def __init__(self, controller: str, say: Callable[[str], None]) -> None:
        self._controller = controller
        self._say = say
        self._said = ""
        self._all = [_Bucket(EVERYBODY * most) for most in (OPENED, BYTES, BYTES)]
        self._places: dict[tuple[int, int], asyncio.Task[None]] = {}  # (port id, ifindex): who serves it
        self.counts: Mapping[int, Counts] = {}  # by port id; replaced as a whole
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections."""
        self.know({})
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def known(self) -> dict[int, int]:
        """The ports that have a relay, by id the ifindex of our end."""
        return dict(self._places.keys())

    def know(self, ends: Mapping[int, int]) -> list[str]:
        """These ports have a relay, by port id the ifindex of our end; the connections of all others end. Returns what
        is in the way."""
        problems = []
        gone = self._places.keys() - ends.items()
        if gone:
            self._run(_cancelled([self._places.pop(place) for place in gone]))
        self.counts = {port: self.counts.get(port) or Counts() for port in ends}
        for port, index in ends.items() - self._places.keys():
            try:
                self._places[port, index] = self._run(self._begin(port, index))
            except OSError as error:
                problems.append(f"port {port}: no relay at [{RELAY}]:{RELAY_PORT} for its agent: {error.strerror}")
        return problems

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """On the thread; waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ---- on the thread

    async def _begin(self, port: int, index: int) -> asyncio.Task[None]:
        return asyncio.create_task(self._serve(port, _listener(index), self.counts[port]))

    async def _serve(self, port: int, listener: socket.socket, counts: Counts) -> None:
        room = asyncio.Semaphore(CONNECTIONS)
        opening, up, down = map(_Bucket, (OPENED, BYTES, BYTES), self._all)

        async def relay(connection: socket.socket) -> None:
            counts.accepted += 1
            counts.connections += 1
            try:
                with connection:
                    await self._relay(connection, up, down, counts)
            except Exception as error:  # whatever one connection can bring about, the others go on
                self._say(f"relay of port {port}: {error!r}")
            finally:
                counts.connections -= 1
                room.release()

        with listener:
            async with asyncio.TaskGroup() as connections:
                while True:
                    await room.acquire()
                    await opening.pay(1)
                    connections.create_task(relay(await self._accepted(listener)))

    async def _accepted(self, listener: socket.socket) -> socket.socket:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(PAUSE)
            else:
                return connection

    async def _relay(self, connection: socket.socket, up: _Bucket, down: _Bucket, counts: Counts) -> None:
        try:
            async with asyncio.timeout(DIAL):
                controller = await self._dial()
        except OSError as error:
            counts.failed += 1
            self._tell(f"relay: {self._controller}: {error.strerror or 'no answer'}")
            return
        self._tell("")
        with controller:
            try:
                await self._both_ways(connection, controller, up, down, counts)
            except asyncio.CancelledError:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                raise

    async def _both_ways(
        self, connection: socket.socket, controller: socket.socket, up: _Bucket, down: _Bucket, counts: Counts
    ) -> None:
        try:
            async with asyncio.timeout(IDLE) as idle, asyncio.TaskGroup() as ways:
                ways.create_task(self._copy(connection, controller, up, idle, counts, "sent"))
                ways.create_task(self._copy(controller, connection, down, idle, counts, "received"))
        except* OSError:
            pass  # one of them has gone, or none says anything

    async def _copy(
        self,
        source: socket.socket,
        target: socket.socket,
        bucket: _Bucket,
        idle: asyncio.Timeout,
        counts: Counts,
        way: str,
    ) -> None:
        while data := await self._loop.sock_recv(source, CHUNK):
            if not idle.expired():
                idle.reschedule(self._loop.time() + IDLE)
            setattr(counts, way, getattr(counts, way) + len(data))
            await bucket.pay(len(data))
            await self._loop.sock_sendall(target, data)
        target.shutdown(socket.SHUT_WR)

    async def _dial(self) -> socket.socket:
        path = self._controller.removeprefix("unix:")
        if path != self._controller:
            return await self._connected(socket.AF_UNIX, path)
        url = urlsplit(self._controller)
        found = await self._loop.getaddrinfo(url.hostname, url.port or 443, type=socket.SOCK_STREAM)
        for family, _, _, _, address in found[:-1]:
            try:
                return await self._connected(family, address)
            except OSError:
                continue
        return await self._connected(found[-1][0], found[-1][4])

    async def _connected(self, family: int, address: Any) -> socket.socket:
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            _bound(made)
            await self._loop.sock_connect(made, address)
        except BaseException:
            made.close()
            raise
        return made

    def _tell(self, text: str) -> None:
        """Once, however often it happens."""
        if text not in ("", self._said):
            self._say(text)
        self._said = text


class _Bucket:
    """For so many in a second, and as many at once (see model/rates.py), which others wait for in turn: of those in
    front of a bucket that is `behind` this one, only one waits there."""

    def __init__(self, most: int, behind: _Bucket | None = None) -> None:
        self._price = SECOND // most
        self._behind = behind
        self._turn = asyncio.Lock()
        self._until = 0  # ns

    async def pay(self, count: int) -> None:
        async with self._turn:
            while (after := spend(self._until, count * self._price, SECOND, now := time.monotonic_ns())) is None:
                await asyncio.sleep((self._until - now) / SECOND)
            self._until = after
            if self._behind is not None:
                await self._behind.pay(count)


def _listener(index: int) -> socket.socket:
    """At the relay's address, on this interface only."""
    made = socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        _bound(made)  # connections inherit it
        made.bind((str(RELAY), RELAY_PORT, 0, index))
        made.listen(CONNECTIONS)
    except OSError:
        made.close()
        raise
    return made


def _bound(made: socket.socket) -> None:
    """What one connection may tie up, and for how long when nobody is there any more."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    if made.family != socket.AF_UNIX:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE * 1000)


async def _cancelled(tasks: Collection[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
