"""Deleting a network with all that is in it and all that it carries, deepest first.

What is more than a part is deleted in several transactions, so that none holds the writer for long (DESIGN, rule 35).
Before the first of them the network is disabled: it is closed as a whole, and no half of its policies ever speaks for
it. What is left when the controller dies in between is deleted by whoever asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, func, select

from nestnet.model.errors import Conflict
from nestnet.store import objects, tables
from nestnet.store.objects import NetworkRow, Row, chunks
from nestnet.store.scope import Scope

PART = 1000  # Objects that one transaction deletes at most.
ROUNDS = 20  # How often it is looked again for what others have added meanwhile.

LOADERS: dict[str, Callable[[Connection, str, Sequence[int]], Sequence[Row]]] = {
    "policy": objects.policies,
    "port": objects.ports,
    "group": objects.groups,
    "link": objects.links,
    "router": objects.routers,
    "segment": objects.segments,
    "network": objects.networks,
}
"""By kind, in the order in which what is in a network can go."""

Batch = list[tuple[str, int]]


def all_of(connection: Connection, network: int) -> Batch:
    """Kind and row of everything that goes, in the order in which it can."""
    found: Batch = []
    for each in reversed(_subtree(connection, network)):  # what is carried goes first
        for kind in LOADERS:
            if kind == "network":
                found.append((kind, each))
            else:
                table: Any = tables.metadata.tables[kind]
                ids = connection.scalars(select(table.c.id).where(table.c.network == each).order_by(table.c.id))
                found += [(kind, id) for id in ids]
    return found


def count_of(connection: Connection, network: int) -> int:
    """How many objects that is."""
    count, networks = 0, _subtree(connection, network)
    for kind in LOADERS:
        table: Any = tables.metadata.tables[kind]
        for chunk in chunks(networks):
            within = table.c.id if kind == "network" else table.c.network
            count += connection.scalar(select(func.count()).where(within.in_(chunk))) or 0
    return count


def rows_of(connection: Connection, batch: Batch) -> list[Row]:
    """Those of a batch that are still there, but for networks that have something more."""
    found: list[Row] = []
    for kind, load in LOADERS.items():
        ids = [id for each, id in batch if each == kind]
        if kind == "network":
            ids = [id for id in ids if set(all_of(connection, id)) <= set(batch)]
        found += load(connection, "id", ids)
    order = {key: place for place, key in enumerate(batch)}
    return sorted(found, key=lambda row: order[row.kind, row.id])


def only_own(connection: Connection, network: int, scope: Scope) -> None:
    """Raise Conflict if what goes carries other tenants' networks."""
    rows: list[NetworkRow] = []
    for chunk in chunks(_subtree(connection, network)):
        rows += objects.networks(connection, "id", chunk)
    if others := sum(not scope.may_write(row.tenant) for row in rows):
        raise Conflict(f"it carries {others} networks of other tenants: they have to go first", "in_use")


def roots_of(connection: Connection, tenants: Sequence[int]) -> list[int]:
    """The networks of these tenants that are not carried by another of theirs."""
    rows = _of(connection, tenants)
    own = {row.id for row in rows}
    return [row.id for row in rows if row.carrier not in own]


def only_of(connection: Connection, tenants: Sequence[int]) -> None:
    """Raise Conflict if what these tenants' networks carry is of others."""
    own = {row.id for row in _of(connection, tenants)}
    if others := sum(id not in own for root in roots_of(connection, tenants) for id in _subtree(connection, root)):
        raise Conflict(f"their networks carry {others} networks of other tenants: they have to go first", "in_use")


def _of(connection: Connection, tenants: Sequence[int]) -> list[Any]:
    c = tables.network.c
    found: list[Any] = []
    for chunk in chunks(sorted(tenants)):
        found += connection.execute(select(c.id, c.carrier).where(c.tenant.in_(chunk)).order_by(c.id)).all()
    return found


def _subtree(connection: Connection, network: int) -> list[int]:
    """The network, if it is there, and all that it carries, carriers first."""
    c = tables.network.c
    level = list(connection.scalars(select(c.id).where(c.id == network)))
    found = list(level)
    while level:
        above: list[int] = []
        for chunk in chunks(level):
            above += connection.scalars(select(c.id).where(c.carrier.in_(chunk)).order_by(c.id)).all()
        found += above
        level = above
    return found
