"""Who asks, and what they may ask for.

    who                     how they are known                                    what is theirs
    the operator            the user of the controller, or root, at its socket;   everything
                            a token for everything
    a local user            any other user whom the socket's group lets in        to read, but not the store's keys
    a token's holder        Authorization: Bearer nnt_SECRET_PIN                  its tenants, by its role for each; of
                                                                                  those below them what they are, and as
                                                                                  an owner what they may
    a machine               the certificate of its agent                          its own feed, reports and certificate,
                                                                                  and letting in who is on its ports
    a machine that joins    Authorization: Bearer nnj_SECRET_PIN                  to join, once
    nobody                                                                        the authority's certificate

`RIGHTS` has a row for each route; a route without one is nobody's, and `create_app` refuses to make it. What is in
scope within a route is the store's to judge (store/scope.py): what somebody cannot see is not there.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from fastapi import Request

from nestnet.api.authority import Speaks, speaks_for
from nestnet.model.errors import Forbidden, Unauthenticated
from nestnet.store.access import PREFIX
from nestnet.store.scope import EVERYTHING, NOTHING, Scope
from nestnet.store.store import Store

JOIN_PREFIX = "nnj_"
LOOKER = Scope(None, frozenset())


@dataclass(frozen=True, slots=True)
class Who:
    """Somebody who asks. `name` is for the audit log: 'uid:1000', 'token:ci', 'machine:m1'.

    `tenant` is whose idempotency keys and rate they use; '' is the operator, who has no limit. `token` is the row of
    theirs, `machine` the name of the machine that they are, `joins` which time that joined, `joining` the secret of a
    join token. `until`: after that, in seconds since 1970, they are nobody."""

    name: str
    tenant: str
    scope: Scope
    token: int | None = None
    machine: str | None = None
    public: str = ""
    joins: int = 0
    joining: str = ""
    until: float | None = None

    @property
    def is_person(self) -> bool:
        return self is not NOBODY and self.machine is None and not self.joining


NOBODY = Who("nobody", "nobody", NOTHING)


class Right(Enum):
    """Who may use a route at all."""

    ANYBODY = "anybody"
    PERSON = "whoever has a token, or is let in by the socket"
    CHANGER = "whoever owns something"
    LOOKER = "whoever may read everything"
    OPERATOR = "the operator"
    MACHINE = "the machine that it is about"
    EITHER = "whoever has a token, and the machine that it is about"


_KINDS = ("machine", "tenant", "network", "segment", "router", "link", "port", "policy")
_PLURALS = (*(f"{kind}s" for kind in _KINDS if kind != "policy"), "policies")

RIGHTS: dict[str, Right] = {
    "openapi": Right.ANYBODY,
    "authority": Right.ANYBODY,
    "enter": Right.ANYBODY,
    **{f"list_{plural}": Right.PERSON for plural in _PLURALS},
    **{f"get_{kind}": Right.PERSON for kind in _KINDS},
    "list_hosts": Right.PERSON,
    "get_machine": Right.EITHER,
    "status": Right.PERSON,
    "trace": Right.PERSON,
    "watch": Right.PERSON,
    "plan": Right.CHANGER,
    "apply": Right.CHANGER,
    "create_network": Right.CHANGER,
    "batch": Right.CHANGER,
    **{f"delete_{kind}": Right.CHANGER for kind in _KINDS},
    "patch_link": Right.CHANGER,
    "patch_port": Right.CHANGER,
    "move": Right.CHANGER,
    "list_grants": Right.PERSON,
    "get_grant": Right.PERSON,
    "grant": Right.CHANGER,
    "invite_tenant": Right.CHANGER,
    "redeem": Right.CHANGER,
    "patch_grant": Right.CHANGER,
    "delete_grant": Right.CHANGER,
    "patch_network": Right.CHANGER,
    "make_tenant": Right.CHANGER,
    "patch_tenant": Right.CHANGER,
    "list_tokens": Right.CHANGER,
    "get_token": Right.CHANGER,
    "make_token": Right.CHANGER,
    "delete_token": Right.CHANGER,
    "let_join": Right.CHANGER,
    "events": Right.LOOKER,
    "metrics": Right.LOOKER,
    "join_machine": Right.OPERATOR,
    "delete_machine": Right.OPERATOR,
    "patch_machine": Right.OPERATOR,
    "confirm": Right.OPERATOR,
    "backup": Right.OPERATOR,
    "restore": Right.OPERATOR,
    "feed": Right.MACHINE,
    "report": Right.MACHINE,
    "renew": Right.MACHINE,
    "give": Right.MACHINE,
    "take": Right.MACHINE,
    "invite": Right.MACHINE,
}


def judge(known: Who, name: str, machine: str | None) -> None:
    """May they use the route of this name, which is about this machine? Raises Unauthenticated or Forbidden."""
    right = RIGHTS.get(name)
    if right is Right.ANYBODY:
        return
    if known is NOBODY or known.joining:
        raise Unauthenticated("nobody knows who you are: send a token, as `Authorization: Bearer nnt_...`")
    own = known.machine is not None and machine in (known.machine, known.public)
    may = {
        Right.PERSON: known.is_person,
        Right.CHANGER: known.is_person and known.scope.writes != frozenset(),
        Right.LOOKER: known.is_person and known.scope.reads is None,
        Right.OPERATOR: known.is_person and known.scope.writes is None,
        Right.MACHINE: own or (known.is_person and known.scope.writes is None),
        Right.EITHER: own or known.is_person,
    }
    if right is None or not may[right]:
        raise Forbidden(f"{known.name} may not do this: it is for {right.value if right else 'nobody'}")


def recognise(store: Store, state: dict[str, object], authorization: str | None) -> Who:
    """Who asks: by a header, by what the connection knows (`uid`, `certificate`), or nobody. Raises Unauthenticated for
    a token or certificate that does not count."""
    if authorization is not None:
        return _bearer(store, authorization)
    if isinstance(certificate := state.get("certificate"), bytes):
        return _machine(store, _speaks(certificate))
    return recognised(state) or NOBODY


def recognised(state: dict[str, object]) -> Who | None:
    """The same for the user at the other end of a socket, for whom nothing needs to be read; None for others."""
    if isinstance(state.get("certificate"), bytes) or not isinstance(uid := state.get("uid"), int):
        return None
    own = uid in (0, os.geteuid())
    return Who(f"uid:{uid}", "" if own else f"uid:{uid}", EVERYTHING if own else LOOKER)


def still(store: Store, known: Who) -> bool:
    """Are they still who they were when they came, and may they see the same?"""
    if known.until is not None and known.until <= time.time():
        return False
    if known.token is not None:
        return store.scope_of(known.token) == known.scope
    return known.machine is None or store.machine_of(known.public, known.joins) == known.machine


def _bearer(store: Store, authorization: str) -> Who:
    scheme, _, token = authorization.partition(" ")
    secret = token.strip()[len(PREFIX) :].rpartition("_")[0]
    if scheme.lower() == "bearer" and token.startswith(JOIN_PREFIX):
        return Who("join token", "nobody", NOTHING, joining=secret)
    found = store.bearer(secret) if scheme.lower() == "bearer" and token.startswith(PREFIX) else None
    if found is None:
        raise Unauthenticated("this token is unknown, was revoked, or its time has run out")
    scope = found.scope
    one = next(iter(scope.reads)) if scope.reads is not None and len(scope.reads) == 1 else None
    tenant = one if one is not None else "" if scope.writes is None else f"token:{found.name}"
    return Who(f"token:{found.name}", tenant, scope, token=found.id, until=found.until)


def _machine(store: Store, speaks: Speaks | None) -> Who:
    name = store.machine_of(speaks.machine, speaks.joins) if speaks is not None else None
    if speaks is None or name is None or speaks.until <= time.time():
        raise Unauthenticated(
            "this certificate does not count any more: the machine was removed or fenced, has joined anew, or its time "
            "has run out; `nestnet join` with a new join token lets it in"
        )
    who = f"machine:{name}"
    return Who(who, who, NOTHING, machine=name, public=speaks.machine, joins=speaks.joins, until=speaks.until)


@lru_cache(maxsize=4096)
def _speaks(certificate: bytes) -> Speaks | None:
    return speaks_for(certificate)


def who(request: Request) -> Who:
    """Who asks."""
    found = getattr(request.state, "who", None)
    return found if isinstance(found, Who) else NOBODY
