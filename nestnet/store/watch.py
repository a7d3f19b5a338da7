"""What changed since a revision, as resources: for those who keep a picture of what is stored.

Like the feed it remembers nobody: the change rows say which objects, and what is told is what they are now. Two changes
of one object are told as one; an object that came and went again in between is told as gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from nestnet.model.values import FABRIC
from nestnet.store import tables
from nestnet.store.objects import chunks
from nestnet.store.read import IN_NETWORK, KINDS, TABLES, Reader
from nestnet.store.tenancy import within

Told = tuple[str, int, dict[str, Any] | None]
"""Kind, row and resource; None: gone."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything that changed up to `revision`, whole: what was done in one transaction is in one of these."""

    revision: int
    objects: tuple[Told, ...]


def changes(
    connection: Connection, reader: Reader, since: int, kind: str | None = None, network: int | None = None
) -> Changes | None:
    """What changed after `since`; only of a kind, only in a network (itself included). None if it cannot be told."""
    now, oldest = connection.execute(select(tables.revision.c.n, tables.revision.c.oldest)).one()
    if not oldest <= since <= now:
        return None
    c = tables.change.c
    query = select(c.network, c.kind, c.id, c.was_tenant, c.whole).where(c.revision > since, c.kind.in_(KINDS))
    if network is not None:
        query = query.where(c.network == network)
    touched: dict[str, set[int]] = defaultdict(set)
    if since != now:
        rows = connection.execute(query).all()
        if reader.scope.reads is not None:
            seen, tenants = _seen(connection, reader, rows), _tenants_seen(connection, reader, rows)
            rows = [
                row
                for row in rows
                if row.network in seen or (row.kind == "tenant" and (row.id in tenants or row.was_tenant in tenants))
            ]
        for row in rows:
            touched[row.kind].add(row.id)
            touched["network"].add(row.network)  # Its revision, and its ETag, are of anything in it.
        for each in IN_NETWORK:
            touched[each].update(_in(connection, each, [row.id for row in rows if row.whole]))
    told: list[Told] = []
    for each in KINDS if kind is None else (kind,):  # What others stand on comes first.
        ids = sorted(touched[each] - ({FABRIC} if each == "network" else set()))
        there = _there(connection, each, ids)
        resources = dict(zip(there, reader.resources(each, there), strict=True))
        told += [(each, id, resources.get(id)) for id in ids]
    return Changes(now, tuple(told))


def _seen(connection: Connection, reader: Reader, rows: Sequence[Any]) -> set[int]:
    """Those of the networks that changed which the reader may see, or might see before they went."""
    n, t = tables.network.c, tables.tenant.c
    seen = {row.id for row in rows if row.kind == "network" and reader.scope.may_read(row.was_tenant)}
    for chunk in chunks(sorted({row.network for row in rows})):
        query = select(n.id, t.name).join(tables.tenant, n.tenant == t.id).where(n.id.in_(chunk))
        seen |= {row.id for row in connection.execute(query) if reader.scope.may_read(row.name)}
    return seen


def _tenants_seen(connection: Connection, reader: Reader, rows: Sequence[Any]) -> set[int | str]:
    """Those of the tenants that changed which the reader may see, by row, or that such were below, by name."""
    t = tables.tenant.c
    changed = [row for row in rows if row.kind == "tenant"]
    found: set[int | str] = set()
    for column, values in (
        (t.id, {row.id for row in changed}),
        (t.name, {row.was_tenant for row in changed if row.was_tenant is not None}),
    ):
        for chunk in chunks(sorted(values)):
            found |= set(connection.scalars(select(column).where(column.in_(chunk), within(reader.scope.reads))))
    return found


def _in(connection: Connection, kind: str, networks: Sequence[int]) -> Iterator[int]:
    """All of a kind that is in these networks."""
    c = TABLES[kind].c
    for chunk in chunks(networks):
        yield from connection.scalars(select(c.id).where(c.network.in_(chunk)))


def _there(connection: Connection, kind: str, ids: list[int]) -> list[int]:
    table = TABLES[kind]
    found: list[int] = []
    for chunk in chunks(ids):
        found += connection.scalars(select(table.c.id).where(table.c.id.in_(chunk)).order_by(table.c.id)).all()
    return found
