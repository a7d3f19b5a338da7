"""Networks that a plan only puts others on: they stay as they are.

A tenant's manifest is compared where it is stored, on all that carries it (view.py). How long that takes must not tell
how much that is: so what is in those networks is remembered, at the version that every change of anything in them
raises, with what a manifest says of them. One that changes is read anew by whoever changed it, not by whoever asks
next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Select, select
from sqlalchemy.engine import Engine

from nestnet.store import tables
from nestnet.store.database import may_write
from nestnet.store.kept import Kept
from nestnet.store.objects import IDS, Contents, chunks, load_contents

KEPT = 50_000  # Rows in all networks that are remembered.

Version = tuple[str, int]
"""The epoch of the store, and the version of a network. After a restore versions may come again, but not with it."""


@dataclass(frozen=True, slots=True)
class Still:
    """What is in a network at a version; `said`: as a manifest has it, as soon as somebody has worked that out."""

    version: Version
    contents: Contents
    said: dict[str, Any] = field(default_factory=dict)


_known: WeakKeyDictionary[Engine, Kept[int, Still]] = WeakKeyDictionary()


def load(connection: Connection, networks: Sequence[int], still: Sequence[int]) -> dict[int, Still]:
    """What is in these networks, of which `still` may be remembered. Takes the same statements when they are."""
    known = _known.setdefault(connection.engine, Kept(KEPT))
    versions = _versions(connection, still)
    found = {id: one for id in still if (one := known.get(id)) is not None and one.version == versions[id]}
    contents = load_contents(connection, [id for id in networks if id not in found])
    for id in networks:
        if id not in found:
            found[id] = Still(versions.get(id, ("", 0)), contents[id])
            if id in versions and not may_write(connection):  # What such a one reads, nobody may ever have stored.
                _keep(known, id, found[id])
    return {id: found[id] for id in networks}


def changed(connection: Connection, networks: Iterable[int]) -> None:
    """These were: what is remembered of them is read anew."""
    known = _known.get(connection.engine)
    ids = [id for id in networks if known is not None and known.get(id) is not None]
    if known is None or not ids:
        return
    versions = _versions(connection, ids)
    for id, contents in load_contents(connection, sorted(versions)).items():
        _keep(known, id, Still(versions[id], contents))


def _keep(known: Kept[int, Still], id: int, one: Still) -> None:
    known.keep(id, one, 1 + sum(1 for _ in one.contents))


def _versions(connection: Connection, networks: Sequence[int]) -> dict[int, Version]:
    found: dict[int, Version] = {}
    for chunk in list(chunks(sorted(networks))) or [[]]:
        found.update({row.id: (row.epoch, row.version) for row in connection.execute(_ask(), {"ids": chunk})})
    return found


@cache
def _ask() -> Select[Any]:
    n = tables.network.c
    epoch = select(tables.store.c.epoch).scalar_subquery().label("epoch")
    return select(n.id, n.version, epoch).where(n.id.in_(IDS))
