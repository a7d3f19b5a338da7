"""What every tenant has, and what counts under every grant: kept as it changes, so that nobody counts to judge a quota.

A row of `usage` is the sum of all networks of one tenant that count under one grant. Whoever writes objects says what
there is more or less of (`changed`); whoever gives networks to another tenant or grant has all that is in them counted
there and not here (`moved`). Both keep what lives on hosts, too (host_use.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, case, func, select

from nestnet.model.rates import RATE
from nestnet.store import bulk, host_use, tables
from nestnet.store.objects import CHUNK, IDS, NetworkRow, PortRow, Row, chunks
from nestnet.store.quotas import QUOTAS, Uses, rate_of

Owner = tuple[int, int]
"""The rows of a tenant and of a grant; 0: neither."""


def uses(connection: Connection, tenants: Collection[int] | None = None) -> Uses:
    """What every tenant, or each of these, by row, has now, by its name; of all if these are very many."""
    u, t = tables.usage.c, tables.tenant.c
    query = select(t.name.label("who"), *_sums()).join_from(tables.usage, tables.tenant, u.tenant == t.id)
    if tenants is not None and len(tenants) <= CHUNK:
        query = query.where(u.tenant.in_(sorted(tenants)))
    return _uses(connection, query.group_by(t.id))


def uses_of_grants(connection: Connection, grants: Collection[int] | None = None) -> Uses:
    """What counts under every grant, or under each of these, now, by its row."""
    grant = tables.usage.c.grant
    counts = grant.in_(sorted(grants)) if grants is not None and len(grants) <= CHUNK else grant != 0
    return _uses(connection, select(grant.label("who"), *_sums()).where(counts).group_by(grant))


def _sums() -> Iterator[Any]:
    return (func.sum(tables.usage.c[what]).label(what) for what in QUOTAS)


def _uses(connection: Connection, query: Select[Any]) -> Uses:
    found: Uses = {what: Counter() for what in QUOTAS}
    for row in connection.execute(query):
        for what in QUOTAS:
            found[what][row.who] = getattr(row, what)
    return found


def add(connection: Connection, more: Mapping[Owner, Mapping[str, int]]) -> None:
    """There is so much more of what these have; less, if it is below 0."""
    sums = {owner: [counts.get(what, 0) for what in QUOTAS] for owner, counts in more.items() if any(owner)}
    bulk.add(connection, "usage", "tenant, grant", ", ".join(QUOTAS), sums)


@contextmanager
def changed(connection: Connection, pairs: Sequence[tuple[Row | None, Row | None]]) -> Iterator[None]:
    """Inside, these are written, but for how many ports live where."""
    # All that is in a network goes with it, or counts elsewhere when it does.
    whole = {
        old.id
        for old, new in pairs
        if isinstance(old, NetworkRow) and not (isinstance(new, NetworkRow) and _counts(old) == _counts(new))
    }
    found: dict[int, Counter[str]] = defaultdict(Counter)
    for pair in pairs:
        for row, sign in zip(pair, (-1, 1), strict=True):
            if row is not None and row.network not in whole and f"{row.kind}s" in QUOTAS:
                found[row.network][f"{row.kind}s"] += sign
                found[row.network]["rate"] += sign * rate_of(row.rate) if isinstance(row, PortRow) else 0
    by = {network: counts for network, counts in found.items() if any(counts.values())}
    with moved(connection, sorted(whole)):
        yield
        on = {key: more for key, more in host_use.write(connection, pairs).items() if key[0] not in whole}
    owners = _owners(connection, by.keys() | {network for network, _ in on})
    more: dict[Owner, Counter[str]] = defaultdict(Counter)
    for network, counts in by.items():
        for what, n in counts.items():
            more[owners[network].counts][what] += n
    add(connection, more)
    host_use.add(connection, {id: owner.place for id, owner in owners.items()}, on)


@contextmanager
def moved(connection: Connection, networks: Sequence[int]) -> Iterator[None]:
    """Inside, these get other tenants, grants or carriers, or go."""
    _count(connection, networks, -1)
    yield
    _count(connection, networks, 1)


def _counts(row: NetworkRow) -> tuple[str | None, int | None, int]:
    """Where it counts."""
    return row.tenant, row.grant, row.carrier


class _Owner(NamedTuple):
    counts: Owner
    place: host_use.Place


def _owners(connection: Connection, networks: Iterable[int]) -> dict[int, _Owner]:
    found: dict[int, _Owner] = {}
    for chunk in chunks(sorted(networks)):
        for row in connection.execute(_owner(), {"ids": chunk}):
            tenant = row.tenant or 0
            found[row.id] = _Owner((tenant, row.grant or 0), (row.carrier, tenant))
    return found


@cache
def _owner() -> Select[Any]:
    n = tables.network.c
    return select(n.id, n.tenant, n.grant, n.carrier).where(n.id.in_(IDS))


def _count(connection: Connection, networks: Sequence[int], sign: int) -> None:
    """All that there is in these counts more or, with -1, no more."""
    more: dict[Owner, Counter[str]] = defaultdict(Counter)
    owners = _owners(connection, networks)
    for owner in owners.values():
        more[owner.counts]["networks"] += sign
    for chunk in chunks(sorted(owners)):
        for query, names in _contents():
            for network, *counts in connection.execute(query, {"ids": chunk}):
                for what, n in zip(names, counts, strict=True):
                    more[owners[network].counts][what] += sign * n
    add(connection, more)
    on = host_use.all_of(connection, owners)
    host_use.add(connection, {id: owner.place for id, owner in owners.items()}, on, sign)


@cache
def _contents() -> tuple[tuple[Select[Any], tuple[str, ...]], ...]:
    s, p = tables.segment.c, tables.port.c
    rate = func.sum(case((p.rate == 0, RATE[1]), else_=p.rate))
    return (
        (select(s.network, func.count()).where(s.network.in_(IDS)).group_by(s.network), ("segments",)),
        (select(p.network, func.count(), rate).where(p.network.in_(IDS)).group_by(p.network), ("ports", "rate")),
    )
