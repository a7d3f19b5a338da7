"""What workloads ask this machine, answered on a thread of its own: DHCP, and solicitations of routers.

    workload -> program `workload` -> ring -> this thread: bootstrap.answer(record, frame) -> packet socket -> workload

The programs judge source, form and number (docs/datapath.md, line 6). Here the port's own record makes the answer,
which leaves by the interface that the frame came in at, and by no other. What changes for a workload on a tap is told
it unasked, by a router advertisement; and again now and then, since a default route over IPv6 does not last for ever.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from nestnet.model import bootstrap
from nestnet.model.bootstrap import Settings
from nestnet.model.packet import tag, tagged
from nestnet.model.reasons import NUMBERS

if TYPE_CHECKING:
    from nestnet.datapath.kernel import Kernel, Record

AGAIN = 1800.0  # seconds between two advertisements to a tap: as a router may leave out at most (RFC 4861, 6.2.1)


class Asker(NamedTuple):
    """A port's workload: on which interface, with which record, whether it is told of changes, and behind which tag it
    is (0: none)."""

    ifindex: int
    settings: Settings
    on_tap: bool
    tag: int = 0


class Place(NamedTuple):
    """Where a workload hears: on which interface, behind which tag (0: none)."""

    ifindex: int
    tag: int


class Inquiries:
    """Answers what comes out of a kernel's ring, in the calling thread's network namespace, until it is closed."""

    def __init__(self, kernel: Kernel, say: Callable[[str], None]) -> None:
        self._kernel = kernel
        self._say = say
        self._source = kernel.inquiries()
        self._askers: Mapping[int, Asker] = {}  # by slot; replaced as a whole
        self._taps: Mapping[Place, Settings] = {}  # of those who are told
        self._told: dict[Place, tuple[Settings, float]] = {}  # what was advertised, and when
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # protocol 0: it hears nothing
        self._end, self._wake = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._listen, name="inquiries", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. What is asked from now on is answered by the next agent, if it is asked again."""
        os.write(self._wake, b".")
        self._thread.join()
        self._source.close()
        self._socket.close()
        for descriptor in (self._end, self._wake):
            os.close(descriptor)

    def know(self, askers: Mapping[int, Asker]) -> None:
        """These workloads are there, by the slots of their ports."""
        self._askers = askers
        taps = {Place(a.ifindex, a.tag): a.settings for a in askers.values() if a.on_tap}
        self._told = {place: told for place, told in self._told.items() if place in taps}
        self._taps = {place: settings for place, settings in taps.items() if settings.of_family(6)}

    def advertise(self, now: float) -> None:
        """Tell those on taps what they do not know, or were told long ago. `now`: in seconds of any clock."""
        for place, settings in self._taps.items():
            told, at = self._told.get(place, (None, 0.0))
            if told != settings or now - at > AGAIN:
                if told is not None and told.server != settings.server:
                    # Who was the router says that it is no more.
                    self._send(place, bootstrap.advertisement(replace(told, gateways=())))
                if self._send(place, bootstrap.advertisement(settings)):
                    self._told[place] = settings, now

    def _listen(self) -> None:
        poll = select.poll()
        for descriptor in (self._source.fileno(), self._end):
            poll.register(descriptor, select.POLLIN)
        while all(descriptor != self._end for descriptor, _ in poll.poll()):
            for record in self._source.take():
                try:
                    self._answer(record)
                except Exception as error:  # whatever a workload can bring about, others are answered
                    self._say(f"inquiry at interface {record.what}: {error!r}")

    def _answer(self, record: Record) -> None:
        asker = self._askers.get(record.slot)
        if asker is None or asker.ifindex != record.what:
            return  # the slot is another port's by now
        told = bootstrap.answer(asker.settings, record.frame)
        if told is None:
            self._kernel.count_drop(record.slot, NUMBERS["unanswerable"])
        else:
            self._send(Place(record.what, asker.tag), told)

    def _send(self, place: Place, frame: bytes) -> bool:
        """False if nobody is there to hear it: the interface is down, or has gone, or nobody has the tap open."""
        with suppress(OSError):
            tags = tag(place.tag) if place.tag else b""
            self._socket.sendto(tagged(frame, tags), (socket.if_indextoname(place.ifindex), 0))
            return True
        return False
