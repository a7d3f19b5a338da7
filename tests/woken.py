"""Whether the feed wakes those to whom it has something to tell."""

from __future__ import annotations

from collections.abc import Collection

from nestnet.store.feed import Batch, Touched


def wakes(touched: Touched | None, machine: int, concern: Collection[int]) -> bool:
    """Would a machine be woken that follows, and to which these networks were of concern?"""
    return touched is None or machine in touched.machines or not touched.networks.isdisjoint(concern)


def nobody_sleeps(touched: Touched | None, machine: int, concern: Collection[int], batch: Batch) -> None:
    """Whoever is told something was woken, and whoever was not has all it will want to hear of in its concern."""
    if not wakes(touched, machine, concern):
        assert batch.rows == ()
        assert batch.networks <= set(concern)
