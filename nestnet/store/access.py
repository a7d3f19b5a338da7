"""Tokens of people and services, tokens that let a machine join, and the authority's own rows.

A token is `nnt_SECRET_PIN`: 256 random bits, and the beginning of the SHA-256 of the authority's certificate, so that
whoever has it knows the right controller from a false one (api/authority.py). Only the SHA-256 of the secret is stored.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from sqlalchemy import Connection, Select, delete, func, insert, select, update

from nestnet.model.errors import Conflict, Exhausted, Forbidden, Invalid, NotFound, Problem, Unauthenticated
from nestnet.store import tables, tenancy, write
from nestnet.store.once import Asked
from nestnet.store.scope import EVERYTHING, Scope

Role = Literal["reader", "owner"]
PREFIX = "nnt_"
MOST = 1000  # Tokens for one tenant that others than the operator make.

Resource = dict[str, Any]


def new_secret() -> str:
    """43 characters, 256 bits."""
    return secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """What is stored of a secret."""
    return sha256(secret.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whom a token speaks for. `until`: seconds since 1970, None for ever."""

    id: int
    name: str
    scope: Scope
    until: float | None


def bearer(connection: Connection, secret: str) -> Bearer | None:
    """Whom this secret speaks for; None for nobody, or nobody any more."""
    t = tables.token
    row = connection.execute(select(t).where(t.c.digest == digest(secret))).first()
    if row is None or not hmac.compare_digest(row.digest, digest(secret)):
        return None
    scope = scope_of(connection, row.id)
    return Bearer(row.id, row.name, scope, row.until) if scope is not None else None


def scope_of(connection: Connection, id: int) -> Scope | None:
    """What a token is for now; None when it was revoked, or its time has run out."""
    t, tt, n = tables.token, tables.token_tenant, tables.tenant
    row = connection.execute(select(t.c.everything, t.c.until).where(t.c.id == id)).first()
    if row is None or (row.until is not None and row.until <= time.time()):
        return None
    query = select(n.c.name, tt.c.role).join(n, n.c.id == tt.c.tenant).where(tt.c.token == id)
    roles = {one.name: one.role for one in connection.execute(query)}
    owned = frozenset(name for name, role in roles.items() if role == "owner")
    return Scope(
        None if row.everything else frozenset(roles),
        None if row.everything == "owner" else owned,
    )


def make(
    connection: Connection,
    name: str,
    secret: str,
    everything: Role | None,
    tenants: Mapping[str, Role],
    until: float | None,
    who: str,
    scope: Scope = EVERYTHING,
) -> None:
    """Keep a new token. Raises Conflict for a name that is taken, NotFound for a tenant that is not there or not to be
    seen, Forbidden for one that whoever asks neither owns nor administers, Invalid for a name that is not theirs."""
    t = tables.token
    if everything is not None:
        scope.to_write_all("a token for everything")
    ids = {tenant: tenancy.find(connection, scope, tenant) for tenant in tenants}
    lines = {tenant: tenancy.line(connection, id) for tenant, id in ids.items()}
    for line in lines.values():
        tenancy.to_change(line, scope)
    made_in = None
    if scope.writes is not None:
        for tenant, id in ids.items():
            _has_room(connection, tenant, id)
        made_in = tenancy.find(connection, scope, _owned_by_name(connection, name, scope, list(lines.values())))
    if connection.scalar(select(t.c.id).where(t.c.name == name)) is not None:
        raise Conflict(f"a token is called {name} already: `nestnet delete token {name}` revokes it", "duplicate_name")
    id = write.reserve(connection, "token", 1)
    values = {"id": id, "name": name, "digest": digest(secret), "everything": everything, "until": until}
    connection.execute(insert(t).values(**values, made=time.time(), made_by=who, made_in=made_in))
    for tenant, role in tenants.items():
        connection.execute(insert(tables.token_tenant).values(token=id, tenant=ids[tenant], role=role))


def _owned_by_name(connection: Connection, name: str, scope: Scope, lines: Sequence[tenancy.Line]) -> str:
    """The tenant by which somebody makes a token of this name: owned, and the nearest above the one that it is named
    after. That one is, or is above, all that the token is for, so whoever sees the token learns no name by it."""
    common = set.intersection(*({one.name for one in line} for line in lines))
    line = [one.name for one in lines[0]]
    owned = [place for place, each in enumerate(line) if each in scope.writes] if scope.writes is not None else []
    reach = [each for each in line[: owned[-1] + 1] if each in common]
    if not reach:
        raise Invalid([Problem("bad_value", "/tenants", "you own no tenant above all of these: make a token for each")])
    after = tenancy.named_after(name, tenancy.known_before(connection, scope, name))
    if after not in reach:
        raise Invalid([tenancy.misnamed("token", name, reach[0], "/name")])
    return next(line[place] for place in owned if place >= line.index(after))


def _has_room(connection: Connection, tenant: str, id: int) -> None:
    tt = tables.token_tenant.c
    if (connection.scalar(select(func.count()).where(tt.tenant == id)) or 0) >= MOST:
        raise Exhausted(f"tenant {tenant} has {MOST} tokens: revoke some", "too_many", MOST)


def revoke(connection: Connection, name: str, scope: Scope = EVERYTHING) -> None:
    """A token speaks for nobody any more. Raises NotFound, also when it is for a tenant that whoever asks neither owns
    nor administers, and Forbidden when they are suspended."""
    t, tt = tables.token, tables.token_tenant
    id = connection.scalar(select(t.c.id).where(t.c.name == name))
    if id is None or name not in {one["name"] for one in listed(connection, name, scope)}:
        raise NotFound(f"token {name}")
    if scope.writes is not None:
        others = select(tt.c.tenant).where(tt.c.token == id, tt.c.tenant.not_in(_administered(scope.writes)))
        if connection.scalar(others) is not None:
            raise NotFound(f"token {name}")
        for tenant in connection.scalars(select(tt.c.tenant).where(tt.c.token == id)).all():
            tenancy.to_change(tenancy.line(connection, tenant), scope)
    connection.execute(delete(t).where(t.c.id == id))


def end_for(connection: Connection, tenants: Sequence[int]) -> None:
    """Tenants are about to go: so do the tokens that are for nothing else."""
    t, tt = tables.token, tables.token_tenant
    theirs = select(tt.c.token).where(tt.c.tenant.in_(tenants))
    kept = select(tt.c.token).where(tt.c.tenant.not_in(tenants))
    connection.execute(delete(t).where(t.c.id.in_(theirs), t.c.id.not_in(kept)))


def listed(connection: Connection, name: str | None = None, scope: Scope = EVERYTHING) -> list[Resource]:
    """The tokens for at least one tenant that somebody owns or administers, or one, without their secrets. Of others'
    tenants, and of makers above, nothing is told."""
    t, tt, n = tables.token, tables.token_tenant, tables.tenant
    query = select(t).order_by(t.c.id)
    tenants = select(tt.c.token, n.c.name, tt.c.role).join(n, n.c.id == tt.c.tenant)
    theirs: set[int] | None = None
    if scope.writes is not None:
        administered = _administered(scope.writes)
        theirs = set(connection.scalars(administered))
        tenants = tenants.where(n.c.id.in_(administered))
        query = query.where(t.c.id.in_(select(tt.c.token).where(tt.c.tenant.in_(administered))))
    if name is not None:
        query = query.where(t.c.name == name)
    roles: dict[int, dict[str, str]] = {}
    for row in connection.execute(tenants):
        roles.setdefault(row.token, {})[row.name] = row.role
    return [
        {
            "name": row.name,
            "everything": row.everything,
            "tenants": roles.get(row.id, {}),
            "made": row.made,
            "until": row.until,
            "by": row.made_by if theirs is None or row.made_in in theirs else "parent",
        }
        for row in connection.execute(query)
    ]


def known_to(connection: Connection, asked: Asked) -> set[str] | None:
    """Who is told by name to whoever asks, as the audit log calls them; None: all."""
    if asked.scope.reads is None:
        return None
    return {asked.who, *(f"token:{one['name']}" for one in listed(connection, scope=asked.scope))}


def _administered(writes: frozenset[str]) -> Select[tuple[int]]:
    """The rows of the tenants that somebody owns, and of all below them."""
    t = tables.tenant.alias()  # not the one of a query around it
    return select(t.c.id).where(tenancy.within(writes, t))


# Machines


def let_join(connection: Connection, machine: str, secret: str, until: float, who: str) -> None:
    """Whoever has this secret may join as this machine, once, until then. One given before no longer counts."""
    j = tables.join_token
    connection.execute(delete(j).where((j.c.machine == machine) | (j.c.until <= time.time())))
    id = write.reserve(connection, "join_token", 1)
    values = {"id": id, "machine": machine, "digest": digest(secret), "until": until, "made_by": who}
    connection.execute(insert(j).values(**values))


def use(connection: Connection, secret: str, machine: str) -> None:
    """Use a join token up. Raises Unauthenticated, Forbidden when it is for another machine."""
    j = tables.join_token
    row = connection.execute(select(j).where(j.c.digest == digest(secret))).first()
    if row is None or row.until <= time.time():
        raise Unauthenticated(
            "this join token is unknown, was used, or its time has run out: `nestnet token join` makes one"
        )
    if row.machine != machine:
        raise Forbidden(f"this join token is for machine {row.machine}, not for {machine}")
    connection.execute(delete(j).where(j.c.id == row.id))


def joined_once_more(connection: Connection, machine: int) -> int:
    """Somebody joined as this machine: from now on only certificates of this time count. Returns which time it is."""
    m = tables.machine
    connection.execute(update(m).where(m.c.id == machine).values(joins=m.c.joins + 1))
    return int(connection.execute(select(m.c.joins).where(m.c.id == machine)).scalar_one())


def machine_of(connection: Connection, id: int, joins: int) -> str | None:
    """The name of the machine that a certificate speaks for; None if it does not any more."""
    m = tables.machine.c
    row = connection.execute(select(m.name, m.joins, m.fenced).where(m.id == id)).first()
    return row.name if row is not None and row.joins == joins and not row.fenced else None


# The authority


def authority(connection: Connection) -> tuple[bytes, bytes] | None:
    """Its key and certificate, PEM; None when there is none yet."""
    a = tables.authority.c
    row = connection.execute(select(a.key, a.certificate)).first()
    return None if row is None else (row.key, row.certificate)


def found_authority(connection: Connection, made: Callable[[], tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """The same, made if there is none."""
    known = authority(connection)
    if known is None:
        known = made()
        connection.execute(insert(tables.authority).values(id=1, key=known[0], certificate=known[1]))
    return known
