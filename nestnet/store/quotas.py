"""Quotas of tenants (rule 29): own use + what is reserved for children <= limit.

A tenant without a limit of its own draws on the nearest ancestor's. What a child may have is reserved from its
parent's the moment it is given, used or not; so nobody's limit can be used up by somebody else.

A plan judges what would be. The writer plans again when the revision has moved since, so of a hundred who want the
last port exactly one gets it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from nestnet.model.errors import Conflict, Exhausted
from nestnet.store import tables

QUOTAS = ("networks", "segments", "ports")
Uses = dict[str, Counter[str]]
"""What -> tenant -> how many it has."""


@dataclass(frozen=True, slots=True)
class Quota:
    """How many a tenant may have of each; None: as many as the tenants above it have left."""

    networks: int | None = None
    segments: int | None = None
    ports: int | None = None

    def limit(self, what: str) -> int | None:
        found: int | None = getattr(self, what)
        return found


def uses(connection: Connection) -> Uses:
    """What every tenant has now."""
    n, t = tables.network, tables.tenant
    found: Uses = {}
    for what, table in (("networks", None), ("segments", tables.segment), ("ports", tables.port)):
        query = select(t.c.name, func.count().label("n")).join(n, n.c.tenant == t.c.id)
        if table is not None:
            query = query.join(table, table.c.network == n.c.id)
        found[what] = Counter({row.name: row.n for row in connection.execute(query.group_by(t.c.id))})
    return found


def charge(
    tenant: str, what: str, own: Counter[str], children: Mapping[str, list[str]], quotas: Mapping[str, Quota]
) -> int:
    """What a tenant uses up of its limit: its own, and of each child the limit, or what that uses up without one."""
    total = own[tenant]
    for child in children.get(tenant, ()):
        limit = quotas[child].limit(what)
        total += limit if limit is not None else charge(child, what, own, children, quotas)
    return total


def judge(
    parents: Mapping[str, str | None],
    quotas: Mapping[str, Quota],
    have: Uses,
    more: Uses,
    seen: Collection[str] | None = None,
) -> None:
    """Raise Exhausted if tenants would have more than they may. `more` is what is added to what they have. Of tenants
    that are not in `seen`, None: all are, neither name nor number is told."""
    hidden = ""
    children: dict[str, list[str]] = defaultdict(list)
    for name, parent in parents.items():
        if parent is not None:
            children[parent].append(name)
    for what in QUOTAS:
        own = Counter(have[what])
        own.update(more[what])
        for name in parents:
            limit = quotas[name].limit(what)
            if limit is None or (wanted := charge(name, what, own, children, quotas)) <= limit:
                continue
            if seen is not None and name not in seen:
                hidden = hidden or what
                continue
            now = have[what][name]
            reserved = wanted - own[name]
            message = f"tenant {name} may have {limit} {what}; it has {now}"
            if reserved:
                message += f", {reserved} are reserved or used by the tenants below it"
            if added := own[name] - now:
                message += f", and this asks for {added} more"
            raise Exhausted(f"{message}: that is {wanted} in all", "quota_exceeded", limit)
    if hidden:
        raise Conflict(f"the tenants above have not so many {hidden} left: ask them for more", "quota_exceeded")
