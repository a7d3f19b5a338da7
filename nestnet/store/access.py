"""Tokens of people and services, tokens that let a machine join, and the authority's own rows.

A token is `nnt_SECRET_PIN`: 256 random bits, and the beginning of the SHA-256 of the authority's certificate, so that
whoever has it knows the right controller from a false one (api/authority.py). Only the SHA-256 of the secret is stored.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from sqlalchemy import Connection, delete, insert, select, update

from nestnet.model.errors import Conflict, Forbidden, NotFound, Unauthenticated
from nestnet.store import tables, write
from nestnet.store.scope import Scope

Role = Literal["reader", "owner"]
PREFIX = "nnt_"

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
    t, tt, n = tables.token, tables.token_tenant, tables.tenant
    row = connection.execute(select(t).where(t.c.digest == digest(secret))).first()
    if row is None or not hmac.compare_digest(row.digest, digest(secret)):
        return None
    if row.until is not None and row.until <= time.time():
        return None
    query = select(n.c.name, tt.c.role).join(n, n.c.id == tt.c.tenant).where(tt.c.token == row.id)
    roles = {one.name: one.role for one in connection.execute(query)}
    owned = frozenset(name for name, role in roles.items() if role == "owner")
    scope = Scope(
        None if row.everything else frozenset(roles),
        None if row.everything == "owner" else owned,
    )
    return Bearer(row.id, row.name, scope, row.until)


def is_in_force(connection: Connection, id: int) -> bool:
    """Has this token been revoked, or has its time run out?"""
    t = tables.token.c
    row = connection.execute(select(t.until).where(t.id == id)).first()
    return row is not None and (row.until is None or row.until > time.time())


def make(
    connection: Connection,
    name: str,
    secret: str,
    everything: Role | None,
    tenants: Mapping[str, Role],
    until: float | None,
    who: str,
) -> None:
    """Keep a new token. Raises Conflict for a name that is taken, NotFound for a tenant that is not there."""
    t, n = tables.token, tables.tenant.c
    if connection.scalar(select(t.c.id).where(t.c.name == name)) is not None:
        raise Conflict(f"a token is called {name} already: `nestnet delete token {name}` revokes it", "duplicate_name")
    ids = {}
    for tenant in tenants:
        found = connection.scalar(select(n.id).where(n.name == tenant))
        if found is None:
            raise NotFound(f"tenant {tenant}")
        ids[tenant] = int(found)
    id = write.reserve(connection, "token", 1)
    connection.execute(
        insert(t).values(
            id=id, name=name, digest=digest(secret), everything=everything, made=time.time(), until=until, made_by=who
        )
    )
    for tenant, role in tenants.items():
        connection.execute(insert(tables.token_tenant).values(token=id, tenant=ids[tenant], role=role))


def revoke(connection: Connection, name: str) -> None:
    """A token speaks for nobody any more. Raises NotFound."""
    if connection.execute(delete(tables.token).where(tables.token.c.name == name)).rowcount == 0:
        raise NotFound(f"token {name}")


def listed(connection: Connection, name: str | None = None) -> list[Resource]:
    """All tokens, or one, without their secrets."""
    t, tt, n = tables.token, tables.token_tenant, tables.tenant
    roles: dict[int, dict[str, str]] = {}
    for row in connection.execute(select(tt.c.token, n.c.name, tt.c.role).join(n, n.c.id == tt.c.tenant)):
        roles.setdefault(row.token, {})[row.name] = row.role
    query = select(t).order_by(t.c.id)
    return [
        {
            "name": row.name,
            "everything": row.everything,
            "tenants": roles.get(row.id, {}),
            "made": row.made,
            "until": row.until,
            "by": row.made_by,
        }
        for row in connection.execute(query if name is None else query.where(t.c.name == name))
    ]


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
