"""VNIs: which are free in a domain, and which are not yet. The same of the VLANs of physical networks.

Free ones are rows `(domain, lo, hi)`, 64 ranges at first, so that writers on a database that locks
rows rarely meet. One that is freed stays in quarantine until every machine has realised the revision
that freed it: until then a machine may still hold its old meaning (I8).

A physical network has 4094 ids at most, and people choose them: the free ones are those that nothing else has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from sqlalchemy import (
    BindParameter,
    Connection,
    Delete,
    Select,
    Update,
    bindparam,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    union_all,
    update,
)

from nestnet.model.errors import Exhausted
from nestnet.model.values import FABRIC
from nestnet.store import tables
from nestnet.store.tables import machine, report, segment, vlan_quarantine, vni_quarantine, vni_range

VNIS = (1 << 24) - 1  # 1 to 16777215 (RFC 7348).
VLANS = 4094  # 802.1Q
RANGES = 64
DOMAIN: BindParameter[Any] = bindparam("of")


def open_domain(connection: Connection, domain: int, size: int = VNIS) -> None:
    """Make all VNIs from 1 to `size` free in a new domain."""
    ranges = min(RANGES, size)
    bounds = [size * place // ranges for place in range(ranges + 1)]
    rows = [{"domain": domain, "lo": lo + 1, "hi": hi} for lo, hi in pairwise(bounds)]
    connection.execute(insert(vni_range), rows)


def open_new(connection: Connection, domains: Iterable[int]) -> None:
    """Those that have had no VNIs yet have as many as the fabric. Called before any are cut in a transaction: until
    their segments are written, what was cut is in no count."""
    for domain in domains:
        if not is_open(connection, domain):
            open_domain(connection, domain, size(connection, FABRIC))


def is_open(connection: Connection, domain: int) -> bool:
    """Has it had VNIs: free, in use, or waiting?"""
    return bool(connection.scalar(_is_open(), {"of": domain}))


@cache
def _is_open() -> Select[Any]:
    there = (vni_range.c.domain, segment.c.domain, vni_quarantine.c.domain)
    return select(or_(*(exists().where(column == DOMAIN) for column in there)))


def size(connection: Connection, domain: int) -> int:
    """How many there are in all; 0 if the domain has not been opened."""
    total = int(connection.scalar(select(tables.store.c.vnis)) or VNIS)
    return total if domain == FABRIC or is_open(connection, domain) else 0


def free(connection: Connection, domain: int) -> int:
    """How many could be cut now, those counted whose quarantine is over."""
    realised = _realised_by_all(connection, domain)
    ranges = _in_ranges(domain).where(vni_range.c.after <= realised)
    over = select(func.count()).where(vni_quarantine.c.domain == domain, vni_quarantine.c.revision <= realised)
    found = int(connection.scalar(ranges) or 0) + int(connection.scalar(over) or 0)
    return found or (0 if is_open(connection, domain) else size(connection, FABRIC))


def _in_ranges(domain: int) -> Select[Any]:
    """How many numbers are in free ranges."""
    return select(func.coalesce(func.sum(vni_range.c.hi - vni_range.c.lo + 1), 0)).where(vni_range.c.domain == domain)


def cut(connection: Connection, domain: int, count: int) -> list[int]:
    """Take `count` free VNIs.

    Raises Exhausted (vni_exhausted) if there are not so many.
    """
    if count == 0:
        return []
    realised = _realised_by_all(connection, domain)
    _end_quarantine(connection, domain, realised)
    taken: list[int] = []
    while len(taken) < count:
        row = connection.execute(_lowest_range(), {"of": domain, "realised": realised}).first()
        if row is None:
            raise exhausted(connection, domain)
        used = min(row.hi - row.lo + 1, count - len(taken))
        taken += range(row.lo, row.lo + used)
        if row.lo + used > row.hi:
            here = (vni_range.c.domain == domain) & (vni_range.c.lo == row.lo)
            connection.execute(delete(vni_range).where(here))
        else:
            connection.execute(_shorter_range(), {"of": domain, "at": row.lo, "used": used})
    return taken


@cache
def _lowest_range() -> Select[Any]:
    return (
        select(vni_range.c.lo, vni_range.c.hi)
        .where(vni_range.c.domain == DOMAIN, vni_range.c.after <= bindparam("realised"))
        .order_by(vni_range.c.lo)
        .limit(1)
        .with_for_update(skip_locked=True)
    )


@cache
def _shorter_range() -> Update:
    here = (vni_range.c.domain == DOMAIN) & (vni_range.c.lo == bindparam("at"))
    return update(vni_range).where(here).values(lo=vni_range.c.lo + bindparam("used"))


def exhausted(connection: Connection, domain: int) -> Exhausted:
    """The error for a domain that has none left, with the number there are in all."""
    waiting = connection.scalar(select(func.count()).where(vni_quarantine.c.domain == domain)) or 0
    unused = connection.scalar(_in_ranges(domain)) or 0
    total = size(connection, domain)
    used = total - waiting - unused  # Not counted: there may be millions, and many who ask.
    message = f"no VNI is free: all {total} are used by {used} segments, or wait for machines that may still use them"
    return Exhausted(f"{message} ({waiting}); delete segments, or bring those machines back", "vni_exhausted", total)


def release(connection: Connection, vnis: list[tuple[int, int]], revision: int) -> None:
    """Quarantine (domain, vni) pairs that `revision` frees."""
    if vnis:
        rows = [{"domain": domain, "vni": vni, "revision": revision} for domain, vni in vnis]
        connection.execute(insert(vni_quarantine), rows)


def fence(connection: Connection, domain: int, revision: int) -> None:
    """A machine of the domain was removed at `revision`: what it may still hold is free when all others have realised
    that."""
    connection.execute(update(vni_quarantine).where(vni_quarantine.c.domain == domain).values(revision=revision))
    if domain == FABRIC:
        connection.execute(update(vlan_quarantine).values(revision=revision))


def hold_back(connection: Connection, count: int, revision: int) -> None:
    """The next `count` free VNIs of every domain wait until all machines have realised `revision`.

    After a restore: the store that was there before may have given them out since the backup, lowest first."""
    for domain in connection.scalars(select(vni_range.c.domain).distinct()).all():
        in_domain, left = vni_range.c.domain == domain, count
        rows = connection.execute(select(vni_range.c.lo, vni_range.c.hi).where(in_domain).order_by(vni_range.c.lo))
        for row in rows.all():
            last = min(row.hi, row.lo + left - 1)
            connection.execute(
                update(vni_range).where(in_domain, vni_range.c.lo == row.lo).values(hi=last, after=revision)
            )
            if last < row.hi:
                connection.execute(insert(vni_range).values(domain=domain, lo=last + 1, hi=row.hi))
            left -= last - row.lo + 1
            if left <= 0:
                break
    connection.execute(update(vni_quarantine).values(revision=revision))
    connection.execute(update(vlan_quarantine).values(revision=revision))
    connection.execute(update(tables.store).values(vlans_after=revision))  # any of them may have been chosen since


def free_vlans(connection: Connection, physical: str) -> list[int]:
    """The ids that a segment could have now, rising."""
    realised = _realised_by_all(connection, FABRIC)
    if realised < (connection.scalar(select(tables.store.c.vlans_after)) or 0):
        return []
    waiting = vlan_quarantine.c.revision > realised
    used = union_all(
        select(segment.c.vlan).where(segment.c.physical == physical),
        select(vlan_quarantine.c.vlan).where(vlan_quarantine.c.physical == physical, waiting),
    )
    taken = set(connection.scalars(used))
    return [vlan for vlan in range(1, vlans(connection) + 1) if vlan not in taken]


def vlans(connection: Connection) -> int:
    """How many ids a physical network has."""
    return int(connection.scalar(select(tables.store.c.vlans)) or VLANS)


def vlans_exhausted(connection: Connection, physical: str) -> Exhausted:
    used = connection.scalar(select(func.count()).where(segment.c.physical == physical)) or 0
    total = vlans(connection)
    message = f"no VLAN of {physical} is free: all {total} are used by {used} segments, or wait for machines that may "
    return Exhausted(f"{message}still use them; delete segments, or bring those machines back", "vlan_exhausted", total)


def take_vlans(connection: Connection, taken: Iterable[tuple[str, int]]) -> None:
    """Segments have these now: what is said of them from before is over."""
    q = vlan_quarantine.c
    for physical, vlan in taken:
        connection.execute(delete(vlan_quarantine).where(q.physical == physical, q.vlan == vlan))


def release_vlans(connection: Connection, freed: Sequence[tuple[str, int]], revision: int) -> None:
    """Quarantine (physical network, id) pairs that `revision` frees."""
    if freed:
        take_vlans(connection, freed)
        rows = [{"physical": physical, "vlan": vlan, "revision": revision} for physical, vlan in freed]
        connection.execute(insert(vlan_quarantine), rows)


def _realised_by_all(connection: Connection, domain: int) -> int:
    """The revision that every machine of a domain has realised. A machine that never reported holds nothing older than
    the revision it joined at."""
    lowest = connection.scalar(_lowest(), {"of": domain})
    return int(lowest) if lowest is not None else 1 << 62


@cache
def _lowest() -> Select[Any]:
    realised = func.max(func.coalesce(report.c.realised, 0), machine.c.joined, type_=tables.Id)
    each = (
        select(realised.label("n"))
        .select_from(machine.outerjoin(report))
        .where(machine.c.fenced.is_(False), machine.c.domain == DOMAIN)
        .subquery()
    )
    return select(func.min(each.c.n))


def _end_quarantine(connection: Connection, domain: int, realised: int) -> None:
    """Make ranges of what is free again, joined with their neighbours."""
    read, remove = _over()
    over = {"of": domain, "realised": realised}
    for vni in connection.scalars(read, over).all():
        lo = hi = vni
        in_domain = vni_range.c.domain == domain
        for row in connection.execute(
            select(vni_range.c.lo, vni_range.c.hi).where(
                in_domain, vni_range.c.after == 0, (vni_range.c.hi == vni - 1) | (vni_range.c.lo == vni + 1)
            )
        ).all():
            lo, hi = min(lo, row.lo), max(hi, row.hi)
            connection.execute(delete(vni_range).where(in_domain, vni_range.c.lo == row.lo))
        connection.execute(insert(vni_range).values(domain=domain, lo=lo, hi=hi))
    # Also if there is none: how many statements it takes must not tell what others have freed.
    connection.execute(remove, over)


@cache
def _over() -> tuple[Select[Any], Delete]:
    """What reads the VNIs that are free again, and what removes them."""
    q = vni_quarantine.c
    here = (q.domain == DOMAIN) & (q.revision <= bindparam("realised"))
    return select(q.vni).where(here), delete(vni_quarantine).where(here)
