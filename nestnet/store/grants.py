"""Grants: hosts of a network, or machines, on which another tenant's networks may be carried (rules 27-29).

    give       to a tenant that is below the grantor's, by name; once more: other hosts, other limits, open again
    invite     to nobody yet: whoever shows the secret redeems it for a tenant of theirs
    change     its limits; suspended: nothing new; cut: closed at once
    revoke     gone; with networks carried: refused, or cut now, and deleted with them after a time of grace

Whose a grant is to give follows from the carrier: its tenant's, or for machines the operator's. The grantee sees the
hosts' names and states, its limits and what it has, never the carrier. Limits are reserved from the grantor's own
(quotas.py); what is made from a grant counts under it, so it follows in everything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from nestnet.model.errors import Conflict, Forbidden, Invalid, NotFound, Problem
from nestnet.model.problems import Nearest, join, meant
from nestnet.model.values import FABRIC
from nestnet.store import access, objects, tables, tenancy, usage, write
from nestnet.store.identity import Identity
from nestnet.store.objects import GrantRow, NetworkRow
from nestnet.store.quotas import QUOTAS, Quota, Tree, judge
from nestnet.store.read import Reader, Resource
from nestnet.store.scope import Scope
from nestnet.store.state import load_state
from nestnet.store.usage import uses, uses_of_grants

NAME = "hosts"  # What a grant is called by whoever has it; further ones with a number.


def carrier_of(reader: Reader, network: str | None) -> int:
    """The row of what carries: a network by reference, None: the machines. Raises Forbidden unless it is one's own."""
    if network is None:
        reader.scope.to_write_all("which machines carry")
        return FABRIC
    id = reader.find("network", network)
    reader.to_write("network", id, f"network {network}")
    return id


def give(
    connection: Connection, reader: Reader, carrier: int, tenant: str, hosts: Sequence[str] | None, quota: Quota
) -> int:
    """Grant, or change what was granted. Returns the grant's row. Raises NotFound for a tenant that is not below the
    grantor, Invalid for hosts that are none, Exhausted, Conflict."""
    t, g = tables.tenant.c, tables.grant
    parents = _parents(connection)
    owner = _owner(connection, carrier)
    if tenant == owner:
        raise Conflict(f"the hosts are {tenant}'s already", "own_hosts")
    tree = Tree(parents, {}, {}, {})
    if reader.scope.writes is not None and (tenant not in parents or not tree.is_below(tenant, owner or "")):
        raise NotFound(f"tenant {tenant} below {owner}: for others there is `nestnet invite`; it")
    id = connection.scalar(select(t.id).where(t.name == tenant))
    if id is None:
        near = Nearest()(tenant, parents)
        raise NotFound(f"tenant {tenant}", near)
    there = _hosts(connection, carrier, hosts)
    row = connection.execute(select(g).where(g.c.carrier == carrier, g.c.tenant == id)).first()
    values: dict[str, Any] = {"hosts": there, **asdict(quota)}
    if row is None:
        row_id = write.reserve(connection, "grant", 1)
        connection.execute(
            insert(g).values(id=row_id, carrier=carrier, tenant=id, name=_free_name(connection, int(id)), **values)
        )
        _adopt(connection, carrier, tenant, row_id)
    else:
        row_id = row.id
        connection.execute(update(g).where(g.c.id == row_id).values(**values, suspended=False, ends=None))
    judge_under(connection, reader.scope, [int(row_id)])
    return int(row_id)


def invite(
    connection: Connection,
    reader: Reader,
    carrier: int,
    hosts: Sequence[str] | None,
    quota: Quota,
    secret: str,
    until: float,
) -> int:
    """Grant to whoever shows the secret until then, in seconds since 1970. It is reserved from now on."""
    g = tables.grant
    values = {"hosts": _hosts(connection, carrier, hosts), **asdict(quota)}
    connection.execute(delete(g).where(g.c.tenant.is_(None), g.c.until <= time.time()))
    id = write.reserve(connection, "grant", 1)
    own = {"id": id, "carrier": carrier, "tenant": None, "name": f"invitation {id}"}
    connection.execute(insert(g).values(**own, digest=access.digest(secret), until=until, **values))
    judge_under(connection, reader.scope, [id])
    return id


def redeem(connection: Connection, reader: Reader, secret: str, tenant: str) -> int:
    """Make what was offered this tenant's. Raises NotFound for a secret that counts for nothing (any more)."""
    g, t = tables.grant, tables.tenant.c
    row = connection.execute(select(g).where(g.c.digest == access.digest(secret), g.c.tenant.is_(None))).first()
    if row is None or row.until <= time.time():
        raise NotFound("an invitation with this secret: it was used, taken back or its time has run out; it")
    id = connection.scalar(select(t.id).where(t.name == tenant)) if reader.scope.may_write(tenant) else None
    if id is None:
        if reader.scope.may_read(tenant):
            raise Forbidden(f"tenant {tenant} may be read, not changed: that takes a token with the role owner")
        raise NotFound(f"tenant {tenant}")
    if tenant == _owner(connection, row.carrier):
        raise Conflict(f"the hosts are {tenant}'s already", "own_hosts")
    if connection.scalar(select(g.c.id).where(g.c.carrier == row.carrier, g.c.tenant == id)) is not None:
        raise Conflict(f"tenant {tenant} has these hosts already", "granted_already")
    values = {"tenant": id, "name": _free_name(connection, int(id)), "digest": None, "until": None}
    connection.execute(update(g).where(g.c.id == row.id).values(**values))
    _adopt(connection, row.carrier, tenant, row.id)
    judge_under(connection, reader.scope, [row.id])
    return int(row.id)


def find(connection: Connection, reader: Reader, reference: str, given: bool) -> GrantRow:
    """A grant by public id or, for whoever has it, by name; `given`: only one's own to give. Raises NotFound."""
    for row in seen(connection, reader):
        own = gives(reader, row)
        if reference == reader.public("grant", row.id) and (own or (not given and has(reader, row))):
            return row
        if not given and reference == row.name and has(reader, row):
            return row
    raise NotFound(f"grant {reference}")


def seen(connection: Connection, reader: Reader) -> list[GrantRow]:
    """Those that are the reader's to give, or that a tenant of theirs has been given."""
    if reader.scope.reads is None:
        return objects.grants(connection)
    owners = select(tables.tenant.c.id).where(tables.tenant.c.name.in_(sorted(reader.scope.reads)))
    theirs = tables.grant.c.tenant.in_(owners) | objects.GRANTED.c.tenant.in_(owners)
    return objects.grants(connection, objects.are_alive(), theirs)


def gives(reader: Reader, row: GrantRow) -> bool:
    """Is it the reader's to give?"""
    return reader.scope.may_read(row.owner)


def has(reader: Reader, row: GrantRow) -> bool:
    """Has a tenant of the reader's been given it?"""
    return row.tenant is not None and reader.scope.reads is not None and reader.scope.may_read(row.tenant)


def change(
    connection: Connection,
    reader: Reader,
    identity: Identity,
    row: GrantRow,
    suspended: bool | None,
    cut: bool | None,
    ends: float | None = None,
) -> int | None:
    """Suspend, cut, or open again. Returns the revision if machines have to know."""
    reader.scope.to_write(row.owner, "this grant")
    g = tables.grant
    now = replace(
        row,
        suspended=row.suspended if suspended is None else suspended,
        cut=row.cut if cut is None else cut,
        ends=ends if ends is not None else None if cut is False else row.ends,
    )
    values = {"suspended": now.suspended, "cut": now.cut, "ends": now.ends}
    connection.execute(update(g).where(g.c.id == row.id).values(**values))
    pairs = [(old, replace(old, cut=now.cut)) for old in carried(connection, row) if old.cut != now.cut]
    return write.write(connection, identity, pairs) if pairs else None


def carried(connection: Connection, row: GrantRow) -> list[NetworkRow]:
    """The networks that live on the granted hosts themselves."""
    return [one for one in objects.networks(connection, "carrier", [row.carrier]) if one.grant == row.id]


def under(connection: Connection, row: GrantRow) -> list[int]:
    """All networks that would fall with it, carriers first: those that it carries, and what these carry."""
    found = [one.id for one in carried(connection, row)]
    level = found
    while level:
        level = [one.id for one in objects.networks(connection, "carrier", level)]
        found = [*found, *level]
    return found


def revoke(connection: Connection, reader: Reader, row: GrantRow) -> None:
    """It is gone, and with it grants made from it. Raises Conflict, with whose networks it carries and how many."""
    reader.scope.to_write(row.owner, "this grant")
    if networks := under(connection, row):
        raise Conflict(
            f"{row.tenant} has {len(networks)} networks on these hosts: --suspend lets nothing new in, --cut closes "
            "them, --cascade deletes them after a time of grace",
            "in_use",
        )
    connection.execute(delete(tables.grant).where(tables.grant.c.id == row.id))


def over(connection: Connection) -> list[GrantRow]:
    """Those whose time has run out."""
    return [row for row in objects.grants(connection) if row.ends is not None and row.ends <= time.time()]


def resources(connection: Connection, reader: Reader, rows: Collection[GrantRow]) -> list[Resource]:
    """As the reader sees them: whoever gives sees the network, whoever has it its name; all the rest is both's."""
    under_them = uses_of_grants(connection, [row.id for row in rows])
    carriers = {row.carrier for row in rows}
    paths = reader.paths(carriers)
    names: dict[int, dict[int, str]] = {}
    for carrier in carriers:
        there = connection.execute(objects.hosts_in(), {"carrier": carrier})
        names[carrier] = {row.id: row.name for row in there}
    found = []
    for row in rows:
        own = gives(reader, row)
        hosts = [name for id, name in names[row.carrier].items() if row.hosts is None or id in row.hosts]
        name = row.name if has(reader, row) else reader.public("grant", row.id)
        found.append(
            {
                "id": reader.public("grant", row.id),
                "kind": "grant",
                "name": name,
                "network": (paths[row.carrier] or None) if own else None,
                "tenant": row.tenant,
                "hosts": sorted(hosts),
                "all": row.hosts is None,
                "quota": {what: row.quota.limit(what) for what in QUOTAS},
                "used": {what: under_them[what][row.id] for what in QUOTAS},
                "suspended": row.suspended,
                "cut": row.cut,
                "ends": row.ends,
            }
        )
    return found


def _adopt(connection: Connection, carrier: int, tenant: str, grant: int) -> None:
    """What the tenant has there already, with all that it carries, counts under the grant from now on."""
    level = [row for row in objects.networks(connection, "carrier", [carrier]) if row.tenant == tenant]
    n = tables.network
    while level:
        ids = [row.id for row in level]
        with usage.moved(connection, ids):
            for chunk in objects.chunks(ids):
                connection.execute(update(n).where(n.c.id.in_(chunk)).values(grant=grant))
        before = {row.id: row.grant for row in level}
        above = objects.networks(connection, "carrier", ids)
        level = [row for row in above if row.grant == before[row.carrier]]


def _hosts(connection: Connection, carrier: int, names: Sequence[str] | None) -> str | None:
    """The rows of hosts, as they are stored. Raises Invalid."""
    if names is None:
        return None
    there = (
        {row.name: row.id for row in objects.machines(connection)}
        if carrier == FABRIC
        else {row.name: row.id for row in objects.ports(connection, "network", [carrier]) if row.hosts}
    )
    problems, nearest = [], Nearest()
    for place, name in enumerate(names):
        if name not in there:
            near = nearest(name, there)
            message = f"there is no host {name}{meant(near)}"
            problems.append(Problem("missing_host", join("hosts", place), message, nearest=near))
    if problems:
        raise Invalid(problems)
    return json.dumps(sorted({there[name] for name in names}))


def _owner(connection: Connection, carrier: int) -> str | None:
    n, t = tables.network.c, tables.tenant.c
    query = select(t.name).join(tables.network, n.tenant == t.id).where(n.id == carrier)
    return connection.scalar(query) if carrier != FABRIC else None


def _parents(connection: Connection) -> dict[str, str | None]:
    t, up = tables.tenant, tables.tenant.alias()
    query = select(t.c.name, up.c.name.label("up")).outerjoin(up, t.c.parent == up.c.id)
    return {row.name: row.up for row in connection.execute(query)}


def _free_name(connection: Connection, tenant: int) -> str:
    g = tables.grant.c
    taken = set(connection.scalars(select(g.name).where(g.tenant == tenant)))
    names = (NAME if place == 1 else f"{NAME}-{place}" for place in count(1))
    return next(name for name in names if name not in taken)


def judge_under(connection: Connection, scope: Scope, grants: Collection[int]) -> None:
    """Raise Exhausted if more is handed on than there is, by those on whom these grants bear."""
    state = load_state(connection)
    if not state.limited:
        return
    tree = Tree(state.parents, state.quotas, state.grants, state.carriers_of(state.grants))
    nothing: Mapping[str, Any] = {what: {} for what in QUOTAS}
    bear = tree.bearing([], grants)
    names, ids = tree.counted(*bear)
    judge(
        tree,
        uses(connection, [state.tenants[name] for name in names]),
        dict(nothing),
        uses_of_grants(connection, ids),
        dict(nothing),
        tenancy.seen(state.parents, scope),
        bear,
    )
