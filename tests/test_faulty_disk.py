"""The controller's disk is full, or fails: what is refused is told, what is there can be read, nothing is half, and it
goes on by itself when the disk does. By strace, which answers calls of the controller in the kernel's place; and on a
real file system that is full."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killing import Strace, Template, difference, dump, whole
from test_killed_controllers import KINDS, Bed, Kind, bed, manifest, said

from nestnet.api.client import PATIENCE, Client
from nestnet.model.errors import DiskFull, Unreachable

__all__ = ["bed"]  # the fixture
FAULTS = int(os.environ.get("NESTNET_FAULTS", "2"))  # Places of each kind of call in each kind of request.
AGAIN = 10.0  # Seconds after which a disk that is well again must have everything as it was.
CALLS = ("pwrite64", "fdatasync", "ftruncate", "pread64")
OF = {"apply-made", "apply-deep", "report", "backup", "restore"}


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in OF], ids=lambda kind: kind.name)
def test_a_call_that_fails_and_all_after_it(bed: Bed, kind: Kind, error: str) -> None:
    served = bed.ready(kind)
    watched = Strace(served.worker(), ",".join(CALLS))
    answer = said(bed.ask(kind.ask).result())
    counts = Counter(watched.end())
    after = dump(bed.file)
    told = Counter[str]()
    for call in CALLS:
        for number in sorted({1 + place * counts[call] // FAULTS for place in range(FAULTS)} if counts[call] else ()):
            served = bed.ready(kind)
            faulty = Strace(served.worker(), call, f"error={error}:when={number}+")
            bed.client.patience = 0
            try:
                got = said(bed.ask(kind.ask).result())
                assert got == answer
                told["done"] += 1
            except (DiskFull, Unreachable) as failed:
                told[type(failed).__name__ if "disk" in str(failed) else f"{call} {number}: {failed}"] += 1
                got = None
            finally:
                faulty.end()
                bed.client.patience = PATIENCE
            assert served.alive(), "nobody needs to start it again"
            left = bed.left({"before": bed.before, "after": after})
            assert got is None or "after" in left, (call, number)
            bed.settled()
            assert bed.stray() <= {"store.db.before-restore"}, (call, number)
            if kind.again or "after" not in left:
                assert said(bed.ask(kind.ask).result()) == answer, (call, number)
            assert dump(bed.file) == after, (call, number, difference(after, dump(bed.file)))
    print(f"\n{kind.name}, {error}: {dict(told)}")
    assert told.keys() <= {"done", "DiskFull", "Unreachable"}
    assert told["DiskFull" if error == "ENOSPC" else "Unreachable"] > 0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
def test_a_full_file_system(small: Path) -> None:
    folder = small / "store"
    folder.mkdir()
    template = Template()
    served = template.start(folder)
    filler = small / "filler"
    try:
        with Client(f"unix:{folder}/api.sock") as client:
            client._answered = True
            client.join("m1", "192.0.2.1")
            stored: dict[str, Any] = {"kept": {"segments": {"s": {"cidr": "10.0.0.0/24"}}}}
            client.apply(manifest(networks=stored))
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            refused = 0
            for turn in range(40):
                name = f"n{turn}"
                spec = {"segments": {"s": {"cidr": "10.0.0.0/24"}}, "description": "x" * 900}
                try:
                    client.apply(manifest(networks={name: spec}), key=name)
                    stored[name] = spec  # There was room in what the log has already.
                except DiskFull:
                    refused += 1
                assert {one["name"] for one in client.list("network")} == set(stored)
            assert refused > 0
            with pytest.raises(DiskFull):
                client.backup(small.parent / "no.backup")
            served.kill()
            served.close()
            begun = time.monotonic()
            served = template.start(folder)  # With a disk that is full, it may not: then it says why.
            ended = served.wait(2)
            assert not ended or "disk" in folder.with_suffix(".log").read_text()
            filler.unlink()
            if ended:
                served.close()
                served = template.start(folder)
            until = time.monotonic() + AGAIN
            client.apply(manifest(networks={"more": spec}))
            stored["more"] = spec
            assert time.monotonic() < until, begun
            assert {one["name"] for one in client.list("network")} == set(stored)
            whole(folder / "store.db")
    finally:
        served.kill()
        template.close()
