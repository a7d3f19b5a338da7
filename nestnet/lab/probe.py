"""Checks with real packets (rule 42): does the workload of `to` see a nonce that the workload of `from` sends to its
address?

    from's namespace                                     to's namespace
      ordinary socket --- eth0 ... datapath ... eth0 --- packet socket: is the nonce in it?

An answer would prove nothing: another port may have the same address, or the sender itself. So the only witness is
a packet socket in the namespace of `to`, on frames that come in. What is sent goes through the sender's own stack
(routes, ARP, ND): an ICMP echo request, a UDP datagram, or the SYN of a TCP connection, with the nonce as payload.
2,000 checks run at once, so a hundred take as long as one.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from nestnet.agent import netns
from nestnet.model.values import Address

PATIENCE = 2.0  # seconds until what has not arrived is taken as denied
SENDING = (0.0, 0.1, 0.3, 0.7, 1.3)  # seconds after the start: the first may wait for ARP or ND, one may be lost
NONCE = 16  # bytes
AT_ONCE = 2000  # probes: they are sent in a fraction of PATIENCE, and each has a socket

ETH_P_ALL = 0x0003  # <linux/if_ether.h>
SO_RCVBUFFORCE = 33  # <asm-generic/socket.h>
ROOM = AT_ONCE * 4096  # bytes of a socket's buffer: all may be for one workload, and are read when all are sent
PACKET_OUTGOING = 4  # <linux/if_packet.h>
ECHO = {4: 8, 6: 128}  # RFC 792, RFC 4443
SYN = 0x02
EPHEMERAL = (32768, 49151)  # below the source ports of VXLAN


@dataclass(frozen=True, slots=True)
class Witness:
    """Where to look for it: an interface in a namespace, at what comes in there, or `outside`, at what goes out."""

    namespace: Path
    interface: str = "eth0"
    outside: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """One packet to send: from which namespace, to which address, and who watches for it.

    `protocol` is icmp, tcp or udp, `port` its destination port (0 for icmp)."""

    source: Path
    target: Witness
    address: Address
    protocol: str
    port: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a probe: whether the nonce arrived, after how many milliseconds, and why it could not be sent."""

    arrived: bool
    ms: float | None = None
    error: str | None = None


@dataclass
class _Flight:
    """A probe that is under way."""

    probe: Probe
    nonce: bytes = field(default_factory=lambda: os.urandom(NONCE))
    source_port: int = field(default_factory=lambda: random.randint(*EPHEMERAL))
    sender: socket.socket | None = None
    first: float = 0.0
    seen: float | None = None
    error: str | None = None

    def send(self) -> None:
        """Send it once more, through the stack of the sender's namespace."""
        assert self.sender is not None
        if not self.first:
            self.first = time.monotonic()
        try:
            self.sender.send(self._bytes())
            self.error = None
        except ConnectionRefusedError:
            pass  # an ICMP error for the one before: the next one may arrive all the same
        except OSError as error:
            self.error = error.strerror or str(error)

    def _bytes(self) -> bytes:
        family, protocol = self.probe.address.version, self.probe.protocol
        if protocol == "udp":
            return self.nonce
        if protocol == "icmp":
            header = struct.pack("!BBHHH", ECHO[family], 0, 0, self.source_port, 1)
            # The kernel fills in the checksum of ICMPv6, which covers addresses that only it knows.
            total = checksum(header + self.nonce) if family == 4 else 0
            return header[:2] + struct.pack("!H", total) + header[4:] + self.nonce
        assert self.sender is not None
        own = ip_address(self.sender.getsockname()[0].partition("%")[0]).packed
        segment = _syn(self.source_port, self.probe.port, self.nonce)
        pseudo = own + self.probe.address.packed + struct.pack("!II", len(segment), socket.IPPROTO_TCP)
        return segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]


def _syn(source: int, target: int, nonce: bytes) -> bytes:
    """A TCP SYN with data (RFC 9293 allows it), without its checksum."""
    sequence = int.from_bytes(nonce[:4], "big")
    return struct.pack("!HHIIBBHHH", source, target, sequence, 0, 5 << 4, SYN, 64240, 0, 0) + nonce


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def run(probes: Sequence[Probe], patience: float = PATIENCE) -> list[Seen]:
    """Send the probes, AT_ONCE at a time, and wait for them: until each has arrived, at most `patience` seconds."""
    targets = {probe.target for probe in probes}
    _allow(len(targets) + AT_ONCE + 100)
    watchers: dict[int, tuple[socket.socket, Witness]] = {}
    try:
        for target in targets:
            watcher = netns.run_in(target.namespace, partial(_watch, target.interface))
            watchers[watcher.fileno()] = (watcher, target)
        flights = [_Flight(probe) for probe in probes]
        for first in range(0, len(flights), AT_ONCE):
            _send(flights[first : first + AT_ONCE], watchers, patience)
    finally:
        for watcher, _ in watchers.values():
            watcher.close()
    return [
        Seen(f.seen is not None, round((f.seen - f.first) * 1000, 1) if f.seen is not None else None, f.error)
        for f in flights
    ]


@dataclass(frozen=True, slots=True)
class Passed:
    """A frame with the packet in it, seen at a place: `out` if it left there, after so many ms."""

    place: str
    out: bool
    ms: float
    frame: bytes


def follow(probe: Probe, places: Mapping[str, Witness], patience: float = PATIENCE) -> tuple[list[Passed], str | None]:
    """Send one packet, and again until it has arrived at the probe's target, and tell where it was seen: the first time
    at each place, in each direction. And why it could not be sent, if so."""
    flight = _Flight(probe)
    seen: dict[tuple[str, bool], Passed] = {}
    _allow(len(places) + 100)
    watchers: dict[int, tuple[socket.socket, str]] = {}
    poll = select.poll()
    try:
        for name, place in places.items():
            watcher = netns.run_in(place.namespace, partial(_watch, place.interface))
            watchers[watcher.fileno()] = (watcher, name)
            poll.register(watcher.fileno(), select.POLLIN)
        flight.sender = netns.run_in(probe.source, lambda: _sender(flight))
        start = time.monotonic()
        turns = [start + after for after in SENDING]
        while (now := time.monotonic()) < start + patience:
            if turns and now >= turns[0]:
                turns.pop(0)
                flight.send()
            until = min(turns[0] if turns else start + patience, start + patience)
            for descriptor, _ in poll.poll(max(until - time.monotonic(), 0) * 1000):
                watcher, name = watchers[descriptor]
                for frame, out in _heard(watcher, flight.nonce):
                    ms = round((time.monotonic() - flight.first) * 1000, 1)
                    seen.setdefault((name, out), Passed(name, out, ms, frame))
            if any(_is_target(one, probe, places) for one in seen.values()):
                break
    except OSError as error:
        flight.error = error.strerror or str(error)
    finally:
        for watcher, _ in watchers.values():
            watcher.close()
        if flight.sender is not None:
            flight.sender.close()
    return list(seen.values()), flight.error


def _is_target(one: Passed, probe: Probe, places: Mapping[str, Witness]) -> bool:
    return places[one.place] == probe.target and one.out == probe.target.outside


def _heard(watcher: socket.socket, nonce: bytes) -> Iterator[tuple[bytes, bool]]:
    """The frames at a place with the packet in it, and whether they left there."""
    while True:
        try:
            frame, (_, _, direction, *_) = watcher.recvfrom(65535)
        except BlockingIOError:
            return
        if nonce in frame and not _quoted(frame):
            yield frame, direction == PACKET_OUTGOING


def _allow(files: int) -> None:
    """So many may be open: a shell's limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        most = hard if hard == resource.RLIM_INFINITY else max(hard, files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))


def _send(flights: list[_Flight], watchers: dict[int, tuple[socket.socket, Witness]], patience: float) -> None:
    try:
        for flight in flights:
            try:
                flight.sender = netns.run_in(flight.probe.source, lambda f=flight: _sender(f))  # type: ignore[misc]
            except OSError as error:
                flight.error = error.strerror or str(error)  # no route to it
        _fly(flights, watchers, patience)
    finally:
        for flight in flights:
            if flight.sender is not None:
                flight.sender.close()


def _fly(flights: list[_Flight], watchers: dict[int, tuple[socket.socket, Witness]], patience: float) -> None:
    poll = select.poll()
    for descriptor in watchers:
        poll.register(descriptor, select.POLLIN)
    waiting: dict[Witness, dict[bytes, _Flight]] = {}
    for flight in flights:
        if flight.sender is not None:
            waiting.setdefault(flight.probe.target, {})[flight.nonce] = flight
    start = time.monotonic()
    turns = [start + after for after in SENDING]
    end = start + patience
    while any(waiting.values()) and (now := time.monotonic()) < end:
        if turns and now >= turns[0]:
            turns.pop(0)
            for flight in _all(waiting):
                flight.send()
            continue
        until = min(turns[0] if turns else end, end)
        for descriptor, _ in poll.poll(max(until - now, 0) * 1000):
            watcher, target = watchers[descriptor]
            _look(watcher, waiting.get(target, {}), target.outside)


def _all(waiting: dict[Witness, dict[bytes, _Flight]]) -> Iterable[_Flight]:
    return [flight for flights in waiting.values() for flight in flights.values()]


def _look(watcher: socket.socket, waiting: dict[bytes, _Flight], outside: bool) -> None:
    """Read every frame that the workload has got, and mark the flights whose nonce is in one."""
    while True:
        try:
            frame, (_, _, direction, *_) = watcher.recvfrom(65535)
        except BlockingIOError:
            return
        if (direction == PACKET_OUTGOING) != outside:
            continue
        nonce = frame[-NONCE:]
        # Ethernet pads short frames; and an ICMP error that quotes the nonce would be for its sender.
        flight = waiting.get(nonce) or next((f for n, f in waiting.items() if n in frame), None)
        if flight is not None and not _quoted(frame):
            flight.seen = time.monotonic()
            del waiting[flight.nonce]


def _quoted(frame: bytes) -> bool:
    """Is this an ICMP error? Then the nonce in it is a quotation."""
    if frame[12:14] == b"\x08\x00" and frame[23] == 1:
        return frame[14 + (frame[14] & 15) * 4] in (3, 4, 5, 11, 12)
    return frame[12:14] == b"\x86\xdd" and frame[20] == 58 and frame[54] < 128


def _watch(interface: str) -> socket.socket:
    """Where `to` is: a socket that gets a copy of every frame on its interface."""
    watcher = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    watcher.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
    watcher.bind((interface, ETH_P_ALL))
    watcher.setblocking(False)
    return watcher


def _sender(flight: _Flight) -> socket.socket:
    """Inside `from`: a socket to the address of `to`. Raises OSError when there is no route to it."""
    probe = flight.probe
    family = socket.AF_INET if probe.address.version == 4 else socket.AF_INET6
    if probe.protocol == "udp":
        sender = socket.socket(family, socket.SOCK_DGRAM)
    elif probe.protocol == "tcp":
        sender = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP)
    else:
        icmp = socket.IPPROTO_ICMP if probe.address.version == 4 else socket.IPPROTO_ICMPV6
        sender = socket.socket(family, socket.SOCK_RAW, icmp)
    try:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # nobody reads answers
        sender.setblocking(False)
        if probe.protocol == "udp":
            _bind(sender, flight)
        sender.connect((str(probe.address), probe.port if probe.protocol == "udp" else 0))
    except OSError:
        sender.close()
        raise
    return sender


def _bind(sender: socket.socket, flight: _Flight) -> None:
    """To its source port, or to another one that nobody in this namespace has."""
    anywhere = "::" if sender.family == socket.AF_INET6 else "0.0.0.0"
    low, high = EPHEMERAL
    first = flight.source_port
    for flight.source_port in (*range(first, high + 1), *range(low, first)):
        try:
            sender.bind((anywhere, flight.source_port))
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, "no source port is free")
