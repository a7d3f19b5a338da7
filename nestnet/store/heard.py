"""What agents say every few seconds and nobody needs after a restart: that they are there, and what they dropped.

Kept in memory, so that a thousand agents with nothing new to say cost no write. It is as large as what machines drop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from threading import Lock
from typing import Any

SILENT = 15.0  # Seconds without a word after which a machine is silent: three of its heartbeats.
GONE = (
    2.0  # Seconds after which one that has hung up is taken for lost: an agent that is started again is back by then.
)

Drops = Mapping[str, Mapping[str, int]]
"""Port row -> reason -> packets."""


class Heard:
    """The last word of each machine, by its row id. Threads may share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._at: dict[int, float] = {}
        self._drops: dict[int, Drops] = {}
        self._silent: set[int] = set()
        self._left: dict[int, float] = {}  # whose last stream has ended, and when
        self._since = time.monotonic()

    def come(self, machine: int) -> None:
        """It follows its feed."""
        with self._lock:
            self._left.pop(machine, None)

    def leave(self, machine: int) -> None:
        """It follows its feed no more."""
        with self._lock:
            self._left[machine] = time.monotonic()

    def is_lost(self, machine: int) -> bool:
        """Has it gone, and not come back, or said nothing for too long? One that has never spoken is not lost."""
        now = time.monotonic()
        with self._lock:
            left, at = self._left.get(machine), self._at.get(machine)
        return (left is not None and now - left > GONE) or (at is not None and now - at > SILENT)

    def is_awaited(self) -> bool:
        """Is it too early to say that a machine which spoke before this process started is lost?"""
        return time.monotonic() - self._since <= SILENT

    def is_silent(self, machine: int) -> bool:
        """Has it said nothing for so long that nobody should wait for it?"""
        return time.monotonic() - self._at.get(machine, self._since) > SILENT

    def say(self, machine: int, drops: Drops | None) -> bool:
        """A machine has spoken; `drops` None: as before. True if it had been silent."""
        with self._lock:
            self._at[machine] = time.monotonic()
            if drops is not None:
                self._drops[machine] = drops
            back = machine in self._silent
            self._silent.discard(machine)
            return back

    def age(self, machine: int) -> float | None:
        """Seconds since its last word; None if there was none since this process started."""
        at = self._at.get(machine)
        return round(time.monotonic() - at, 3) if at is not None else None

    def drops(self, machine: int) -> Drops:
        """What it dropped, as it said last."""
        return self._drops.get(machine, {})

    def fallen_silent(self) -> list[int]:
        """Those that have become silent since the last call."""
        with self._lock:
            late = time.monotonic() - SILENT
            new = [machine for machine, at in self._at.items() if at < late and machine not in self._silent]
            self._silent.update(new)
            return new

    def forget(self, machine: int | None = None) -> None:
        """A machine is gone; None: all of them, for the store is another one."""
        with self._lock:
            for each in [machine] if machine is not None else [*self._at, *self._left]:
                self._at.pop(each, None)
                self._drops.pop(each, None)
                self._left.pop(each, None)
                self._silent.discard(each)


def split(ports: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an agent says of its ports: what is to be stored, and the drops."""
    stored: dict[str, Any] = {}
    drops: dict[str, Any] = {}
    for port, said in ports.items():
        if isinstance(said, Mapping):
            if isinstance(said.get("drops"), Mapping):
                drops[port] = dict(said["drops"])
            said = {key: value for key, value in said.items() if key != "drops"}
        if said:
            stored[port] = said
    return stored, drops
