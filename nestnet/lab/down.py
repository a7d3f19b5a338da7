"""Taking a lab away: whatever state it is in, and whatever was killed before."""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nestnet.agent import netns
from nestnet.lab.state import BPFFS, RUN, Lab, Process, locked

GRACE = 5.0  # seconds that a controller or agent has to end by itself


@dataclass(frozen=True, slots=True)
class Removed:
    """What `down` found and took away, and what it could not."""

    processes: int = 0
    namespaces: int = 0
    pins: int = 0
    problems: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.processes or self.namespaces or self.pins)


def down(name: str) -> Removed:
    """Take a lab away: its processes, what runs inside its namespaces, the namespaces, pins and state.

    Goes on after a failure and reports it, so that calling it again is the cure; nothing there is no failure.
    """
    with locked(name) as lab:
        removed = tear_down(lab)
    for folder in (RUN, BPFFS):
        with suppress(OSError):
            folder.rmdir()  # only when no other lab is there
    return removed


def tear_down(lab: Lab) -> Removed:
    """The same for a lab that the caller has locked."""
    problems: list[str] = []

    def attempt(work: Callable[[], int], what: str) -> int:
        try:
            return work()
        except OSError as error:
            problems.append(f"{what}: {error}")
            return 0

    names = lab.namespaces()
    ended = attempt(lambda: end(lab.processes), "processes")
    ended += attempt(lambda: len(netns.kill_inside([netns.path(name) for name in names])), "processes")
    # Agents may have made workloads until they ended.
    names = lab.namespaces()
    gone = sum(attempt(lambda name=name: int(netns.delete(name)), name) for name in names)  # type: ignore[misc]
    pins = attempt(lambda: _remove_pins(lab.pins), str(lab.pins))
    if not problems:
        attempt(lambda: _remove_tree(lab.folder), str(lab.folder))
    return Removed(ended, gone, pins, tuple(problems))


def end(processes: Sequence[Process]) -> int:
    """End them: SIGTERM, SIGKILL after GRACE seconds. Returns how many were alive; raises OSError if one stays."""
    alive = [process for process in processes if process.send(signal.SIGTERM)]
    if not wait(alive, GRACE):
        for process in alive:
            process.send(signal.SIGKILL)
        if not wait(alive, GRACE):
            left = ", ".join(f"{p.name} ({p.pid})" for p in alive if p.alive())
            raise TimeoutError(f"still there after SIGKILL: {left}")
    return len(alive)


def wait(processes: Sequence[Process], seconds: float) -> bool:
    """Wait until all of them have ended. False when some have not after so long."""
    limit = time.monotonic() + seconds
    for process in processes:
        while process.alive():
            left = limit - time.monotonic()
            if left <= 0:
                return False
            _wait_for_exit(process.pid, left)
    return True


def _wait_for_exit(pid: int, seconds: float) -> None:
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        select.select([handle], [], [], seconds)
    finally:
        os.close(handle)


def _remove_pins(folder: Path) -> int:
    """Unlink every pin below a folder of bpffs, and the folders. What they pinned goes with the last reference."""
    if not folder.exists():
        return 0
    count = 0
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            count += _remove_pins(entry)
        else:
            entry.unlink()
            count += 1
    folder.rmdir()
    return count


def _remove_tree(folder: Path) -> int:
    if folder.exists():
        shutil.rmtree(folder)
    return 0
