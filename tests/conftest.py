"""What all tests share: hypothesis profiles, and a place of its own for each worker.

A test (or a module, by `pytestmark`) marked `root` makes namespaces, loads BPF or starts processes. It fails where it
cannot run; it is never skipped. `pytest -m "not root"` leaves these out.

Workers (`-n 2`) run at the same time, and so do their labs. Each worker has a /run and a bpffs of its own, so that two
labs of one name never meet: what a lab has is namespaces and processes, and files in these two.

A test marked `alone` is about time: a few milliseconds of loss, changes a second. While it runs no other worker does,
for what it would measure is who has the CPUs.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from sums import check

from nestnet.model.errors import DiskFull, Unreachable
from nestnet.store import Store

settings.register_profile("nestnet", deadline=None, print_blob=True)
settings.register_profile("soak", parent=settings.get_profile("nestnet"), max_examples=2000)
settings.load_profile("nestnet")

CLONE_NEWNS = 0x00020000  # <linux/sched.h>
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18  # <linux/mount.h>
KEPT = ("lock", "netns", "user")  # folders that programs expect in /run


# Files that take a minute or more: first, so that no worker is left alone with one at the end.
LONG = (
    "test_mutants.py",
    "test_alike.py",
    "test_join.py",
    "test_docs.py",
    "test_kernel.py",
    "test_equality.py",
    "test_controller_away.py",
    "test_lab.py",
    "test_underlay.py",
    "test_access.py",
    "test_store.py",
    "test_forest.py",
    "test_api.py",
    "test_killed_controllers.py",
    "test_hostile.py",
    "test_forest_lab.py",
    "test_namespaces.py",
    "test_switches.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def pytest_configure() -> None:
    """Of a worker: away from the others, before it runs anything."""
    if "PYTEST_XDIST_WORKER" in os.environ and os.geteuid() == 0:
        _own_place()


@pytest.fixture(scope="session", autouse=True)
def sums() -> Iterator[None]:
    """What a store keeps a count of is right when a test closes it, whatever was done to it."""
    close = Store.close

    def looked_at(store: Store) -> None:
        try:
            with suppress(DiskFull, Unreachable):
                check(store)
        finally:
            close(store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "close", looked_at)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Of a worker: one test with the others', or alone. Who wants to be alone holds the door, so it is let in next."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    # These two files of the repository are only held: nothing is read or written.
    with Path(__file__).open() as door, Path(__file__).with_name("README.md").open() as room:
        is_alone = item.get_closest_marker("alone") is not None
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        if not is_alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


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
