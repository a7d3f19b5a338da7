"""Time as the datapath counts it: whole nanoseconds, and whole seconds, of a clock that never goes back.

`now` is a float of seconds wherever a person or a test says it. Here alone it becomes integers, so that every telling
decides alike at the last instant of a lifetime and of a bucket.
"""

from __future__ import annotations

SECOND = 1_000_000_000


def nanoseconds(now: float) -> int:
    """What buckets are counted in (`rates.spend`)."""
    return round(now * SECOND)


def seconds(now: float) -> int:
    """What lifetimes are counted in: the last whole second."""
    return nanoseconds(now) // SECOND
