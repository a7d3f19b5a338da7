"""The memory of an agent's process: a machine has it for its workloads."""

from __future__ import annotations

import ctypes
from contextlib import suppress

LARGE = 128 << 10  # bytes: glibc's own, in the beginning
M_MMAP_THRESHOLD = -3  # malloc.h


def give_back() -> None:
    """From now on a large block that is freed is the kernel's again at once. By itself glibc keeps more and more of
    them for the next, up to 32 MiB each: a third of what a process has that has once read a large snapshot."""
    with suppress(AttributeError):  # a C library that has no such thing to be told
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
