"""The agent's end of the feed: what the controller wants of this machine, kept as a World.

`Desired` is that value: it takes batches, and a batch is all or nothing. `Feed` keeps a connection on a thread of
its own, comes back after an interruption with the token of the last batch it has, and puts what it heard where
`take` finds it: many batches that came meanwhile are one change. An interruption changes nothing here: what is
secured stays (DESIGN, I6).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nestnet.model.errors import NestnetError
from nestnet.model.values import Value, World, kind_of
from nestnet.model.wire import from_wire

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two attempts to connect

Batch = Mapping[str, Any]
Open = Callable[[str | None], Iterable[Batch]]
"""Opens a feed from a resume token, or from nothing: an endless stream of batches and heartbeats."""


@dataclass(frozen=True)
class Desired:
    """What one machine should be at a revision: a number, or a word for it that tells nothing (then every line has
    another). `whole` says that nothing is missing from it: before, only add.

    `store` is which store says so, `confirmed` that somebody agreed to what that one does not know being removed."""

    values: dict[tuple[str, int], Value] = field(default_factory=dict)
    revision: int | str = 0
    whole: bool = False
    token: str | None = None
    store: str | None = None
    confirmed: bool = False

    @property
    def world(self) -> World:
        return World(self.values)

    def after(self, batch: Batch) -> Desired:
        """This, when a batch or a heartbeat has been heard.

        Raises KeyError, TypeError or ValueError for a batch that is not one: nothing of it counts."""
        values = self.values
        snapshot = bool(batch.get("snapshot", False))
        rows = batch.get("rows")
        if snapshot or rows:
            new = {} if snapshot else dict(values)
            same: dict[int, int] = {}  # a network's id in all that is in it is one object
            for row in rows or ():
                if row["value"] is None:
                    new.pop((row["kind"], int(row["id"])), None)
                else:
                    value = from_wire(row["kind"], row["value"], same)
                    new[kind_of(value), value.id] = value  # not the row's own: they would be kept a million times
            values = new
        token, store = batch.get("token", self.token), batch.get("store", self.store)
        confirmed = bool(batch.get("confirmed", self.confirmed))
        revision = batch["revision"]
        if not isinstance(revision, int | str):
            raise TypeError(f"a revision is no {type(revision).__name__}")
        return Desired(values, revision, self.whole or snapshot, token, store, confirmed)

    @property
    def called(self) -> str:
        """For the log."""
        return f"revision {self.revision}" if isinstance(self.revision, int) else "the feed"


class Feed:
    """Follows the controller until it is stopped. `problem` is why it is not connected, or None."""

    def __init__(self, open: Open, say: Callable[[str], None]) -> None:
        self._open = open
        self._say = say
        self._changed = threading.Condition()
        self._desired = Desired()
        self._taken = self._desired
        self._stopped = threading.Event()
        self._woken = False
        self.problem: str | None = "not connected yet"
        self._thread = threading.Thread(target=self._follow, name="feed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wake whoever waits in `take`. The thread ends with its process: it may be waiting for the network."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    def wake(self) -> None:
        """Let `take` return, now or when it is next called: there is something else to do."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def take(self, timeout: float) -> Desired | None:
        """What is desired now, if that has changed since the last call; None after `timeout` seconds without, or
        when it was woken."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._desired is not self._taken or self._stopped.is_set() or self._woken, timeout
            )
            self._woken = False
            if self._desired is self._taken:
                return None
            self._taken = self._desired
            return self._taken

    def _follow(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopped.is_set():
            try:
                for batch in self._open(self._desired.token):
                    desired = self._desired.after(batch)
                    pause = FIRST_PAUSE
                    if self.problem is not None:
                        self._say(f"connected, {desired.called}")
                        self.problem = None
                    with self._changed:
                        # A heartbeat without news wakes nobody. A word that is new may stand for the same revision.
                        news = desired.revision, desired.confirmed
                        old = self._desired.revision, self._desired.confirmed
                        if batch.get("rows") or batch.get("snapshot") or news != old:
                            self._desired = desired
                            self._changed.notify_all()
                    if self._stopped.is_set():
                        return
                self._lost("the controller closed the feed")
            except (NestnetError, OSError) as error:
                self._lost(str(error))
            except Exception as error:
                # Not a feed that this version can read. This thread must not end, or the machine would never hear
                # again: ask for all of it anew. If that cannot be read either, what is there stays as it is.
                self._lost(f"cannot be read: {error!r}")
                self._desired = Desired(self._desired.values, self._desired.revision, self._desired.whole, None)
            self._stopped.wait(pause * random.uniform(0.5, 1.0))  # many agents must not come back in step
            pause = min(pause * 2, LONGEST_PAUSE)

    def _lost(self, why: str) -> None:
        if self.problem != why:
            self._say(f"feed: {why}")
            self.problem = why
