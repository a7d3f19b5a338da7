"""The routes of grants: hosts on which other tenants' networks may be carried."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from nestnet.api import shapes
from nestnet.api.access import who
from nestnet.api.asked import keyed
from nestnet.model.errors import Invalid, Problem
from nestnet.store.once import Asked
from nestnet.store.quotas import Quota
from nestnet.store.store import Store

INVITATION_PREFIX = "nng_"
MANY = 1000  # Hosts that are named at most: more are marked in the network.

How = Annotated[Asked, Depends(keyed)]
Reference = Annotated[str, Path(description="Its id or, for whoever has it, its name.")]


class _Offer(shapes.Shape):
    network: Annotated[str | None, Field(max_length=2000)] = None
    """Whose host ports: path or id; null: the machines."""
    hosts: Annotated[list[str] | None, Field(max_length=MANY)] = None
    """Their names; null: all there are, also those to come."""
    quota: shapes.Limits = shapes.Limits()
    """How much may be carried; null: what whoever grants it has left."""


class GrantWish(_Offer):
    """Hosts for the networks of a tenant. Granted already, these hosts and limits count from now on."""

    tenant: Annotated[str, Field(max_length=63)]


class InvitationWish(_Offer):
    """Hosts for the networks of whoever shows the invitation."""

    ttl: Annotated[float, Field(ge=1, le=365 * 86400)] = 7 * 86400.0
    """Seconds for which it counts."""


class GrantState(shapes.Shape):
    """What a grant is made to be. What is left out stays."""

    suspended: Annotated[bool | None, Field(strict=True)] = None
    """Nothing new is carried by it."""
    cut: Annotated[bool | None, Field(strict=True)] = None
    """What it carries is closed; false also ends the time of grace."""


class Redeemed(shapes.Shape):
    """An invitation, and for which tenant."""

    invitation: Annotated[str, Field(max_length=200)]
    tenant: Annotated[str | None, Field(max_length=63)] = None
    """null: the only one that you own."""


class Grant(shapes.Shape):
    """Hosts that were granted."""

    id: str
    kind: str
    name: str
    """What its tenant calls it; its id, for all others."""
    network: str | None
    """Whose hosts; null: the machines, or not for you to see."""
    tenant: str | None
    """Whose networks may be carried; null: of whoever redeems the invitation."""
    hosts: list[str]
    all: bool
    """Are hosts that are to come granted, too?"""
    quota: shapes.Amounts
    used: shapes.Amounts
    suspended: bool
    cut: bool
    ends: float | None
    """Then it goes, with all that it carries: seconds since 1970."""


class Invitation(Grant):
    invitation: str
    """For `nestnet redeem`. It is told only once."""


class Grants(shapes.Shape):
    api_version: Annotated[str, Field(alias="apiVersion")] = shapes.API_VERSION
    kind: str = "GrantList"
    items: list[Grant]


class Revoked(shapes.Shape):
    grant: Grant | None
    """What is left of it until its time of grace is over; null: nothing."""


def routes(store: Store) -> APIRouter:
    """All of them."""
    found = APIRouter(tags=["grants"])

    @found.get("/grants", response_model=Grants)
    def list_grants(request: Request) -> dict[str, Any]:
        """Those that you gave, and those that you have."""
        return {"apiVersion": shapes.API_VERSION, "items": store.all_grants(who(request).scope)}

    @found.get("/grants/{reference}", response_model=Grant)
    def get_grant(reference: Reference, request: Request) -> Any:
        """One of them."""
        return store.get_grant(reference, who(request).scope)

    @found.post("/grants", response_model=Grant)
    async def grant(wish: GrantWish, how: How) -> Any:
        """Grant hosts of a network of yours to a tenant below you; all others are invited."""
        return await run_in_threadpool(
            store.grant, wish.network, wish.tenant, wish.hosts, Quota(**wish.quota.model_dump()), how
        )

    @found.post("/invitations", response_model=Invitation)
    async def invite_tenant(wish: InvitationWish, how: How) -> Any:
        """Grant hosts to whoever shows the invitation first."""
        offer = (wish.network, wish.hosts, Quota(**wish.quota.model_dump()), time.time() + wish.ttl)
        made, secret = await run_in_threadpool(store.invite, *offer, how)
        return {**made, "invitation": f"{INVITATION_PREFIX}{secret}"}

    @found.post("/redeem", response_model=Grant)
    async def redeem(wish: Redeemed, how: How) -> Any:
        """What an invitation offers is your tenant's."""
        tenant = wish.tenant or how.scope.tenant
        if tenant is None:
            raise Invalid([Problem("missing_key", "/tenant", "for which tenant? give `tenant`")])
        secret = wish.invitation.removeprefix(INVITATION_PREFIX)
        return await run_in_threadpool(store.redeem, secret, tenant, how)

    @found.patch("/grants/{reference}", response_model=Grant)
    async def patch_grant(reference: Reference, state: GrantState, how: How) -> Any:
        """Suspend or cut what you gave, or open it again."""
        return await run_in_threadpool(store.change_grant, reference, state.suspended, state.cut, how)

    @found.delete("/grants/{reference}", response_model=Revoked)
    async def delete_grant(
        reference: Reference,
        how: How,
        cascade: Annotated[bool, Query(description="With all that it carries, after `grace`.")] = False,
        grace: Annotated[float, Query(ge=0, le=365 * 86400, description="Seconds.")] = 86400.0,
    ) -> dict[str, Any]:
        """Revoke what you gave. 409 if it carries anything; with `cascade` that is cut, and deleted later."""
        left = await run_in_threadpool(store.revoke_grant, reference, grace if cascade else None, how)
        return {"grant": left}

    return found
