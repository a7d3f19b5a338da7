"""Whether the feed wakes those to whom it has something to tell."""

from __future__ import annotations

from collections.abc import Collection

from nestnet.store.feed import Batch, Touched


def wakes(touched: Touched | None, machine: int, below: Collection[int]) -> bool:
    """Would a machine be woken that follows, and had these networks below it?"""
    return touched is None or machine in touched.machines or not touched.networks.isdisjoint(below)


def nobody_sleeps(touched: Touched | None, machine: int, below: Collection[int], batch: Batch) -> None:
    """Whoever is told something was woken, and whoever was not has the same below it."""
    if not wakes(touched, machine, below):
        assert batch.rows == ()
        assert batch.below == set(below)
