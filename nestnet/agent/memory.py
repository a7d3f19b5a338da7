"""The memory of an agent's process: a machine has it for its workloads."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_back() -> None:
    """What is free in the heap is the kernel's again (malloc_trim(3)): after all has been read and compiled that is a
    third of what the process has, in pieces between what stays."""
    with suppress(AttributeError):  # a C library that does not have it
        ctypes.CDLL(None).malloc_trim(0)
