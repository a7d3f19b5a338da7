"""What all tests share: hypothesis profiles, a place of its own for each worker, and which worker does what.

A test (or a module, by `pytestmark`) marked `root` makes namespaces, loads BPF or starts processes. It fails where it
cannot run; it is never skipped. `pytest -m "not root"` leaves these out.

Workers (`-n 2`) run at the same time, and so do their labs. Each worker has a /run and a bpffs of its own, so that two
labs of one name never meet: what a lab has is namespaces and processes, and files in these two.

The third worker (`-n 3`) takes what the others leave of the CPUs, while they wait for timers, disks and packets: only
modules that just calculate, so that nothing in them is late, and at a low priority, so that nothing else is.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

settings.register_profile("nestnet", deadline=None, print_blob=True)
settings.register_profile("soak", parent=settings.get_profile("nestnet"), max_examples=2000)
settings.load_profile("nestnet")

CLONE_NEWNS = 0x00020000  # <linux/sched.h>
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18  # <linux/mount.h>
KEPT = ("lock", "netns", "user")  # folders that programs expect in /run
CALM = "gw2"  # the third worker

# They start no process and look at no clock.
CALCULATING = (
    "equality", "move_phases", "carriage", "meaning", "store", "stacking", "reference", "explain", "validate", "packet",
    "bootstrap", "domains", "golden_errors", "manuals", "rules",
)  # fmt: skip
# These begin first, so that no worker is left with a long one in the end. Moves are measured while no other lab runs.
LONG = (
    "mutants", "join", "moves", "underlay", "encapsulated", "forest_lab", "kernel", "controller_away", "topology", "vm",
    "killed_agents", "lab", "poison", "drift", "inside", "turtles",
)  # fmt: skip


def pytest_configure() -> None:
    """Of a worker: away from the others, before it runs anything."""
    if "PYTEST_XDIST_WORKER" in os.environ and os.geteuid() == 0:
        _own_place()


def pytest_collection_finish() -> None:
    if os.environ.get("PYTEST_XDIST_WORKER") == CALM:
        os.nice(10)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    return Scheduling(config, log)


class Scheduling(LoadFileScheduling):
    """A module is one worker's. `loadscope` would take a test for one of another if its id has an address with ::"""

    def _assign_work_unit(self, node: WorkerController) -> None:
        def place(file: str) -> int:
            name = Path(file).stem.removeprefix("test_")
            if name in CALCULATING:
                return len(LONG) + 1 + CALCULATING.index(name)
            return LONG.index(name) if name in LONG else len(LONG)

        # What begins first, of what has most tests; the calm one only takes what calculates.
        files = [file for file in self.workqueue if node.gateway.id != CALM or place(file) > len(LONG)]
        if not files:
            node.shutdown()
            return
        self.workqueue.move_to_end(min(files, key=place), last=False)
        super()._assign_work_unit(node)


def _own_place() -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def must(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    must(libc.unshare(CLONE_NEWNS))
    must(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    must(libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, None))
    must(libc.mount(b"bpf", b"/sys/fs/bpf", b"bpf", 0, None))
    for name in KEPT:
        (Path("/run") / name).mkdir()
