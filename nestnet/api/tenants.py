"""The routes by which a tenant administers those below it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path

from nestnet.api import shapes
from nestnet.api.asked import asked, changed, keyed
from nestnet.model.errors import Invalid, Problem
from nestnet.model.manifest import parse
from nestnet.model.problems import moved
from nestnet.store.once import Asked
from nestnet.store.quotas import Quota
from nestnet.store.store import Store

How = Annotated[Asked, Depends(asked)]


def routes(store: Store) -> APIRouter:
    """Their router."""
    routes = APIRouter(tags=["tenants"])

    @routes.post("/tenants", response_model=shapes.Tenant)
    def make_tenant(wanted: shapes.TenantWish, how: Annotated[Asked, Depends(keyed)]) -> dict[str, Any]:
        """A new tenant, below one that you own or administer: it is called PARENT-SOMETHING."""
        _judge_name(wanted.name)
        return store.make_tenant(wanted.name, wanted.parent, Quota(**wanted.quota.model_dump()), how)

    @routes.patch("/tenants/{reference:path}", response_model=shapes.Tenanted)
    def patch_tenant(
        reference: Annotated[str, Path(description="Its name or id.")], state: shapes.TenantState, how: How
    ) -> dict[str, Any]:
        """Give a tenant other limits, or suspend or resume it; doing it twice is doing it once."""
        if state.quota is None and state.suspended is None:
            raise Invalid([Problem("missing_key", "", "the body needs the key quota or suspended")])
        quota = state.quota.model_dump(exclude_unset=True) if state.quota is not None else None
        revision, tenant = store.set_tenant(reference, quota, state.suspended, how)
        return changed(store, how, revision, tenant=tenant)

    return routes


def _judge_name(name: str) -> None:
    """The rules for it are those of a manifest."""
    try:
        parse({"apiVersion": shapes.API_VERSION, "tenants": {name: {}}})
    except Invalid as error:
        raise Invalid([moved(problem, "/name") for problem in error.problems]) from None
