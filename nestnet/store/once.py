"""A request is done once, however often it is asked for (rule 36).

The key is claimed by the first statement of the transaction, under UNIQUE (tenant, key); the answer is written by its
last one. So a failure leaves nothing, and whoever asks again after a success gets the first answer.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, delete, select, update
from sqlalchemy.dialects.sqlite import insert

from nestnet.model.errors import Conflict
from nestnet.store import tables
from nestnet.store.scope import EVERYTHING, Scope

KEPT_ANSWERS = 24 * 3600  # Seconds for which a repeated request gets its first answer, at least
KEPT_ALWAYS = 1000  # and so many of the newest: clocks may be set forward.


@dataclass(frozen=True, slots=True)
class Asked:
    """How a change is asked for.

    who     whoever asks, as the audit log will call them
    tenant  whose idempotency keys these are; '': the operator's
    key     the idempotency key, if there is one
    etags   the change is refused (Stale) unless the object has one of these ('*': any); None: as it is now
    scope   what they may see and change
    """

    who: str = ""
    tenant: str = ""
    key: str | None = None
    etags: tuple[str, ...] | None = None
    scope: Scope = EVERYTHING

    @property
    def once(self) -> str | None:
        """What tells this request from all others, for what has to be the same in each answer to it; None: no key."""
        return None if self.key is None else f"{self.tenant} {self.key}"


def digest(request: Any) -> str:
    """What tells a request from all others."""
    return sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def said(connection: Connection, asked: Asked, request: str) -> Any | None:
    """The first answer to a request that was asked before. Raises Conflict if the key was for another one."""
    if asked.key is None:
        return None
    i = tables.idempotency.c
    query = select(i.request, i.answer).where(i.tenant == asked.tenant, i.key == asked.key)
    row = connection.execute(query).first()
    if row is None:
        return None
    if row.request != request:
        raise Conflict("this idempotency key was used for another request: use a new one", "key_reused")
    return json.loads(row.answer)


def claim(connection: Connection, asked: Asked, request: str) -> Any | None:
    """Make the key ours, or return the answer that it has. Raises Conflict if it was for another request."""
    if asked.key is None:
        return None
    i = tables.idempotency
    now = time.time()
    newest = select(i.c.at).order_by(i.c.at.desc()).offset(KEPT_ALWAYS).limit(1).scalar_subquery()
    connection.execute(delete(i).where(i.c.at < now - KEPT_ANSWERS, i.c.at <= newest))
    claimed = connection.execute(
        insert(i)
        .values(tenant=asked.tenant, key=asked.key, request=request, answer="null", at=now)
        .on_conflict_do_nothing()
    )
    return None if claimed.rowcount else said(connection, asked, request)


def keep(connection: Connection, asked: Asked, answer: Any) -> None:
    """What is answered to whoever asks again."""
    if asked.key is not None:
        i = tables.idempotency
        here = (i.c.tenant == asked.tenant) & (i.c.key == asked.key)
        connection.execute(update(i).where(here).values(answer=json.dumps(answer)))
