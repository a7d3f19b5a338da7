"""What lives on every host: how many ports of each network, and sums of that, kept as it changes: nobody counts.

`host_use` has a row for a network and a host, `host_total` one for a host and a tenant, and one for a host and
EVERYONE. A host is the row of a machine where the fabric carries the network, else of a port of its carrier.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Connection, Delete, Select, bindparam, delete, func, insert, select

from nestnet.store import bulk, tables
from nestnet.store.objects import IDS, NetworkRow, PortRow, Row, chunks

EVERYONE = -1
"""The tenant of a row of `host_total` that is the sum of the others."""

Place = tuple[int, int]
"""The rows of a carrier and of a tenant; 0: the fabric, none."""

_Whose = tuple[int, int, int]
"""The rows of a carrier, a host and a tenant."""

Uses = dict[tuple[int, int], tuple[int, int]]
"""(network, host) -> how many networks and ports more live there: the network counts as one, from its first port."""


def uses(
    connection: Connection, carrier: int, hosts: Iterable[int], tenants: Collection[str] | None
) -> dict[int, tuple[int, int]]:
    """Host -> how many networks live there, and how many ports. `tenants`: only what these have, None: all."""
    c, t = tables.host_total.c, tables.tenant.c
    found: dict[int, tuple[int, int]] = {}
    for chunk in chunks(sorted(hosts)):
        sums = func.sum(c.networks).label("networks"), func.sum(c.ports).label("ports")
        query = select(c.host, *sums).where(c.carrier == carrier, c.host.in_(chunk)).group_by(c.host)
        if tenants is None:
            query = query.where(c.tenant == EVERYONE)
        else:
            query = query.where(c.tenant.in_(select(t.id).where(t.name.in_(sorted(tenants)))))
        found.update({row.host: (row.networks, row.ports) for row in connection.execute(query)})
    return found


def write(connection: Connection, pairs: Sequence[tuple[Row | None, Row | None]]) -> Uses:
    """Keep the count of ports for each (network, host). Returns what there is more of, less if it is below 0. What a
    network that goes had is gone with it."""
    gone = {old.id for old, new in pairs if isinstance(old, NetworkRow) and new is None}
    by: Counter[tuple[int, int]] = Counter()
    for pair in pairs:
        for row, more in zip(pair, (-1, 1), strict=True):
            if isinstance(row, PortRow) and row.network not in gone:
                for host in {row.host, row.other} - {0}:
                    by[row.network, host] += more
    changed = {key: more for key, more in by.items() if more}
    have = _used(connection, {network for network, _ in changed})
    old_rows = [{"n": n, "h": h} for n, h in changed if (n, h) in have]
    if old_rows:
        connection.execute(_delete(), old_rows)
    counts = {key: have.get(key, 0) + more for key, more in changed.items()}
    rows_now = [{"network": n, "host": h, "count": k} for (n, h), k in counts.items() if k]
    if rows_now:
        connection.execute(insert(tables.host_use), rows_now)
    return {key: ((counts[key] > 0) - (key in have), more) for key, more in changed.items()}


def all_of(connection: Connection, networks: Collection[int]) -> Uses:
    """All that lives somewhere of these networks."""
    return {key: (1, ports) for key, ports in _used(connection, networks).items()}


def add(connection: Connection, places: Mapping[int, Place], more: Uses, sign: int = 1) -> None:
    """There is so much more of these networks on their hosts. `places`: where each is."""
    sums: dict[_Whose, list[int]] = defaultdict(lambda: [0, 0])
    for (network, host), counts in more.items():
        carrier, tenant = places[network]
        for place, n in enumerate(counts):
            sums[carrier, host, tenant][place] += sign * n
    add_sums(connection, with_everyone(sums))


def with_everyone(sums: Mapping[_Whose, Sequence[int]]) -> dict[_Whose, Sequence[int]]:
    """Sums of tenants, and those of all of them."""
    found: dict[_Whose, Sequence[int]] = dict(sums)
    for (carrier, host, _), (networks, ports) in sums.items():
        before = found.get((carrier, host, EVERYONE), (0, 0))
        found[carrier, host, EVERYONE] = (before[0] + networks, before[1] + ports)
    return found


def add_sums(connection: Connection, more: Mapping[_Whose, Sequence[int]]) -> None:
    """There is so much more, networks and ports, of these."""
    bulk.add(connection, "host_total", "carrier, host, tenant", "networks, ports", more)


def _used(connection: Connection, networks: Collection[int]) -> dict[tuple[int, int], int]:
    have: dict[tuple[int, int], int] = {}
    for chunk in chunks(sorted(networks)):
        have.update({(row.network, row.host): row.count for row in connection.execute(_select(), {"ids": chunk})})
    return have


@cache
def _select() -> Select[Any]:
    c = tables.host_use.c
    return select(c.network, c.host, c.count).where(c.network.in_(IDS))


@cache
def _delete() -> Delete:
    c = tables.host_use.c
    return delete(tables.host_use).where(c.network == bindparam("n"), c.host == bindparam("h"))
