"""Traffic between two places, in short windows.

    Place      where an end of a connection lives: a network namespace and an address in it
    Bed        two places that can talk, and one in another network that must hear nothing
    Route      what is measured: a bed and the connections across it
    receiver   the other process: it reads, checks and echoes what is sent on every route by TCP
    Listener   counts what reaches a namespace

All connections of all routes are open from the start to the end, so that a window costs nothing to begin. This process
sends; one other process holds the receiving ends, with a thread each that sleeps while its connection is silent.
Nothing but the window that is open sends at any time. Of datagrams and of new connections this process has both ends.

A stream connection carries messages: one byte of kind, four bytes of length, the body.

    more    read and throw away
    last    read and throw away, then answer with one byte: the window is over when the last byte has been read
    check   answer with the SHA-256 of the body
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestnet.agent import netns

HEADER = struct.Struct("!BI")
MORE, LAST, CHECK = 1, 2, 3

SEND = 1 << 20  # bytes of a message, body and header: one call of send for each
CHECKED = 4 << 20  # bytes of a checked message

ETH_P_IP = 0x0800  # <linux/if_ether.h>
SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>
SOL_PACKET, PACKET_STATISTICS = 263, 6  # <linux/socket.h>, <linux/if_packet.h>

# Classic BPF, (code, jump if true, jump if false, constant): the whole frame if its protocol is TCP, else nothing.
TCP_ONLY = ((0x30, 0, 0, 23), (0x15, 0, 1, 6), (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0))


@dataclass(frozen=True)
class Place:
    """One end: a namespace and an IPv4 address that it has."""

    namespace: Path
    address: str


@dataclass(frozen=True)
class Bed:
    """Two places that can talk, and a namespace in another network, with the server's own address, that hears nothing.

    `foreign` is None where there is only one network. `during`: what else goes on while a window is open. `openers`:
    who opens new connections to the server, in turn, a window each; else the client.
    """

    client: Place
    server: Place
    foreign: Path | None
    during: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    openers: Sequence[Path] = ()


def listener(bed: Bed) -> socket.socket:
    """Where the server waits for connections: a port of the range that the rules of beds.py let in."""
    return netns.run_in(
        bed.server.namespace, lambda: socket.create_server((bed.server.address, 0), backlog=1024, reuse_port=False)
    )


def connect(bed: Bed) -> tuple[socket.socket, socket.socket]:
    """The client's and the server's end of a new TCP connection."""
    with listener(bed) as waiting:
        port = waiting.getsockname()[1]
        waiting.settimeout(10)
        client = netns.run_in(
            bed.client.namespace,
            lambda: socket.create_connection((bed.server.address, port), 10, (bed.client.address, 0)),
        )
        server, _ = waiting.accept()
    for end in (client, server):
        end.settimeout(None)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, server


class Message(ctypes.Structure):
    """struct mmsghdr of <sys/socket.h>: a struct msghdr, and how many bytes there were."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("bytes", ctypes.c_uint32),
    )


class Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Datagrams:
    """A datagram socket at each end, and room for a burst of datagrams of 18 bytes: Ethernet's shortest frames."""

    BURST = 64
    BYTES = 18

    def __init__(self, bed: Bed) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.server = netns.run_in(bed.server.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.server.bind((bed.server.address, 0))
        self.client = netns.run_in(bed.client.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.client.bind((bed.client.address, 0))
        self.client.connect(self.server.getsockname())
        self._room = ctypes.create_string_buffer(b"x" * self.BYTES)
        vector = Vector(ctypes.addressof(self._room), self.BYTES)
        self._vector = vector  # as long as the kernel may look at it
        self._messages = (Message * self.BURST)()
        for message in self._messages:
            message.vectors, message.count = ctypes.addressof(vector), 1

    def burst(self) -> int:
        """Send a burst, and say how many have arrived. The sockets' buffers have room for all of it."""
        sent = self._libc.sendmmsg(self.client.fileno(), self._messages, self.BURST, 0)
        if sent < 0:
            raise OSError(ctypes.get_errno(), "sendmmsg")
        got = self._libc.recvmmsg(self.server.fileno(), self._messages, self.BURST, socket.MSG_DONTWAIT, None)
        return max(int(got), 0)

    def close(self) -> None:
        self.client.close()
        self.server.close()


class Listener:
    """Counts the TCP packets over IPv4 that reach a namespace, from any interface; what it sends itself not."""

    def __init__(self, namespace: Path) -> None:
        self._socket = netns.run_in(
            namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
        )
        # The filter must outlive the call that gives it to the kernel, no longer.
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in TCP_ONLY))
        self._socket.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(TCP_ONLY), ctypes.addressof(program))
        )

    def packets(self) -> int:
        """How many came since the last call."""
        seen, _dropped = struct.unpack("II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        return int(seen)

    def close(self) -> None:
        self._socket.close()


STREAMS = 4
NO_WAIT = struct.pack("ii", 1, 0)  # SO_LINGER: closed at once, so that no port waits for its end


class Route:
    """A bed with its connections. Rates are per second of wall clock, of what the *receiver* has read."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        ends = [connect(bed) for _ in range(STREAMS)]
        self.streams, self._streams_far = [near for near, _ in ends], [far for _, far in ends]
        self.echo, self._echo_far = connect(bed)
        self.datagrams = Datagrams(bed)
        self._waiting = listener(bed)
        self._openers = itertools.cycle(bed.openers or [bed.client.namespace])
        body = os.urandom(SEND - HEADER.size)
        self._more = HEADER.pack(MORE, len(body)) + body
        self._last = HEADER.pack(LAST, len(body)) + body

    @property
    def stream(self) -> socket.socket:
        return self.streams[0]

    def far_ends(self) -> list[socket.socket]:
        """What the other process reads: the streams, then the echo."""
        return [*self._streams_far, self._echo_far]

    def near_ends(self) -> list[socket.socket]:
        return [*self.streams, self.echo]

    def streamed(self, seconds: float) -> float:
        """Bytes per second of one connection, from the first byte sent to the last byte read."""
        return self._streamed(seconds, self.streams[:1])

    def streamed_by_all(self, seconds: float) -> float:
        """The same, of STREAMS connections together."""
        return self._streamed(seconds, self.streams)

    def _streamed(self, seconds: float, streams: Sequence[socket.socket]) -> float:
        sent = 0
        start = time.perf_counter()
        end = start + seconds
        while time.perf_counter() < end:
            for stream in streams:
                stream.sendall(self._more)
                sent += SEND
        for stream in streams:
            stream.sendall(self._last)
            sent += SEND
        for stream in streams:
            read_exactly(stream, 1)
        return sent / (time.perf_counter() - start)

    def hurried(self, seconds: float) -> float:
        """One over the time in which 99 of 100 transactions are done, per second."""
        send, receive, clock = self.echo.send, self.echo.recv, time.perf_counter
        times = []
        end = clock() + seconds
        now = clock()
        while now < end:
            send(b"x")
            if receive(1) != b"x":
                raise ConnectionError("the other end has gone")
            begin, now = now, clock()
            times.append(now - begin)
        times.sort()
        return 1 / times[len(times) * 99 // 100]

    def small(self, seconds: float) -> float:
        """Small datagrams per second that have arrived."""
        burst = self.datagrams.burst
        arrived = 0
        start = time.perf_counter()
        end = start + seconds
        while time.perf_counter() < end:
            arrived += burst()
        return arrived / (time.perf_counter() - start)

    def connected(self, seconds: float) -> float:
        """New connections per second: each opened, one byte there, one byte back, closed."""

        def work() -> float:
            address = self._waiting.getsockname()
            accept = self._waiting.accept
            done = 0
            start = time.perf_counter()
            end = start + seconds
            while time.perf_counter() < end:
                near = socket.socket()
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_WAIT)
                near.connect(address)
                far, _ = accept()
                near.send(b"x")
                far.send(far.recv(1))
                if near.recv(1) != b"x":
                    raise ConnectionError("the other end has gone")
                near.close()
                far.close()
                done += 1
            return done / (time.perf_counter() - start)

        return netns.run_in(next(self._openers), work)

    def exchanged(self, seconds: float) -> float:
        """Transactions per second: one byte there, one byte back, then the next."""
        send, receive = self.echo.send, self.echo.recv
        done = 0
        start = time.perf_counter()
        end = start + seconds
        while time.perf_counter() < end:
            for _ in range(16):
                send(b"x")
                if receive(1) != b"x":
                    raise ConnectionError("the other end has gone")
            done += 16
        return done / (time.perf_counter() - start)

    def check(self) -> bool:
        """Did random bytes arrive as they were sent?"""
        body = os.urandom(CHECKED)
        with self.bed.during():
            self.stream.sendall(HEADER.pack(CHECK, len(body)) + body)
            return read_exactly(self.stream, 32) == hashlib.sha256(body).digest()

    def retransmitted(self) -> int:
        """Segments that either client end has sent again (tcpi_total_retrans)."""
        return sum(
            struct.unpack_from("I", end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0]
            for end in self.near_ends()
        )

    def close(self) -> None:
        for end in (*self.near_ends(), *self.far_ends(), self._waiting):
            end.close()
        self.datagrams.close()


def read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError("the other end has gone")
        data += piece
    return data


def serve_stream(connection: socket.socket) -> None:
    buffer = memoryview(bytearray(SEND))
    with contextlib.suppress(ConnectionError):
        while True:
            kind, left = HEADER.unpack(read_exactly(connection, HEADER.size))
            digest = hashlib.sha256() if kind == CHECK else None
            while left:
                got = connection.recv_into(buffer, min(left, SEND))
                if not got:
                    raise ConnectionError("the other end has gone")
                if digest:
                    digest.update(buffer[:got])
                left -= got
            if digest:
                connection.sendall(digest.digest())
            elif kind == LAST:
                connection.sendall(b".")


def serve_echo(connection: socket.socket) -> None:
    receive, send = connection.recv, connection.send
    with contextlib.suppress(ConnectionError):
        while data := receive(1):
            send(data)


def stay_on(pid: int, cpus: set[int]) -> None:
    """Let all threads of a process run on these CPUs only."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(task.name), cpus)


@contextlib.contextmanager
def receiver(routes: Sequence[Route]) -> Iterator[int]:
    """Another process reads what the routes send; it ends with the block. The process's pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            threads = []
            for route in routes:
                # This process must not hold the sending ends open when the sender dies.
                for near in route.near_ends():
                    near.close()
                *streams, _ = far = route.far_ends()
                for end in far:
                    serve = serve_stream if end in streams else serve_echo
                    threads.append(threading.Thread(target=serve, args=(end,)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            os._exit(0 if os.getppid() == parent else 1)
    for route in routes:
        for end in route.far_ends():
            end.close()
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
