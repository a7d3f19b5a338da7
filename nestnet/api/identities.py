"""The routes by which somebody becomes known: tokens, machines that join, certificates, and who is shut out."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool

from nestnet.api import shapes
from nestnet.api.access import JOIN_PREFIX, who
from nestnet.api.asked import Key, asked, changed, keyed
from nestnet.api.authority import Authority
from nestnet.api.numbers import port_row
from nestnet.model.errors import Forbidden, Invalid, Problem, Unauthenticated
from nestnet.model.manifest import parse
from nestnet.model.values import Tag
from nestnet.store.access import PREFIX
from nestnet.store.once import Asked
from nestnet.store.store import Store

How = Annotated[Asked, Depends(keyed)]
Name = Annotated[str, Path(description="Its name.")]


def routes(store: Store, authority: Authority) -> APIRouter:
    """Their router."""
    routes = APIRouter(tags=["identities"])

    @routes.get("/authority", name="authority", response_class=PlainTextResponse)
    def certificate() -> PlainTextResponse:
        """The authority's certificate, PEM. What a token ends with is the beginning of its SHA-256."""
        return PlainTextResponse(authority.certificate, media_type="application/x-pem-file")

    @routes.get("/tokens", response_model=shapes.Tokens)
    def list_tokens(request: Request) -> dict[str, Any]:
        """The tokens for tenants that you own or administer, without their secrets."""
        items = store.tokens(scope=who(request).scope)
        return {"apiVersion": shapes.API_VERSION, "kind": "TokenList", "items": items}

    @routes.get("/tokens/{name}", response_model=shapes.Token)
    def get_token(name: Name, request: Request) -> Any:
        """One token, without its secret."""
        return store.tokens(name, who(request).scope)[0]

    @routes.post("/tokens", response_model=shapes.NewToken)
    def make_token(wanted: shapes.TokenWish, how: How, request: Request) -> dict[str, Any]:
        """A new token. Its secret is told here, and never again."""
        _judge_token(wanted)
        ends = [who(request).until, time.time() + wanted.ttl if wanted.ttl is not None else None]
        until = min((end for end in ends if end is not None), default=None)
        made, secret = store.make_token(wanted.name, wanted.everything, wanted.tenants, until, how)
        return {**made, "token": f"{PREFIX}{secret}_{authority.pin}"}

    @routes.delete("/tokens/{name}", response_model=shapes.Deleted)
    def delete_token(name: Name, how: How) -> dict[str, Any]:
        """Revoke a token: it counts no more, at once, and what follows by it ends within 10 s."""
        return changed(store, how, store.revoke(name, how))

    @routes.post("/join-tokens", response_model=shapes.NewJoinToken)
    def let_join(wanted: shapes.JoinWish, how: How) -> dict[str, Any]:
        """A token that lets one machine join, once: the operator's to make, or of one on a port of yours, yours. One
        that was made for the machine before counts no more."""
        machine = wanted.machine
        if "/" in machine:
            machine = store.guest(machine, scope=how.scope)
        else:
            how.scope.to_write_all(f"machine {machine}")
            _judge_name(machine)
        return join_token(machine, wanted.ttl, how)

    @routes.post("/machines/{reference}/join-tokens", response_model=shapes.NewJoinToken)
    def invite(reference: Name, wanted: shapes.Guest, how: How) -> dict[str, Any]:
        """A token that lets the agent on a port of this machine join, once. `port` is its number in the feed."""
        return join_token(store.guest(port_row(store, reference, wanted.port), reference), wanted.ttl, how)

    def join_token(machine: str, ttl: float, how: Asked) -> dict[str, Any]:
        until = time.time() + ttl
        secret = store.let_join(machine, until, how)
        return {"machine": machine, "until": until, "token": f"{JOIN_PREFIX}{secret}_{authority.pin}"}

    @routes.post("/join", response_model=shapes.Entered)
    async def enter(wanted: shapes.Enter, request: Request, idempotency_key: Key = None) -> dict[str, Any]:
        """A machine joins, by its join token, and gets a certificate for the key that it has made itself."""
        secret = who(request).joining
        if not secret:
            raise Unauthenticated("send a join token, as `Authorization: Bearer nnj_...`; see `nestnet token join`")
        on_port = wanted.name.startswith("port_")  # It is called as its port, and what it is follows from that.
        vlan = judge_machine(wanted) if not on_port else None
        known = (wanted.name, wanted.address, wanted.mtu, wanted.nics, vlan, wanted.trunks)
        own = (*known, wanted.labels, wanted.request)

        def sign(machine: str, joins: int) -> str:
            return authority.sign_machine(wanted.request, machine, joins)

        machine, certificate = await run_in_threadpool(store.enter, secret, *own, sign, idempotency_key)
        return {"machine": machine, "certificate": certificate}

    @routes.post("/machines/{reference}/certificate", response_model=shapes.Certificate)
    def renew(reference: Name, wanted: shapes.Renewal, request: Request) -> dict[str, Any]:
        """A machine's next certificate, for a new key, before the one that it has runs out."""
        known = who(request)
        if known.machine is None:
            raise Forbidden(f"only {reference} itself renews its certificate, by the one that it has")
        return {"certificate": authority.sign_machine(wanted.request, known.public, known.joins)}

    @routes.patch("/machines/{reference:path}", response_model=shapes.Fenced)
    def patch_machine(
        reference: str, state: shapes.MachineState, how: Annotated[Asked, Depends(asked)]
    ) -> dict[str, Any]:
        """Shut a machine out, or let it in again. To all others it is a stranger as soon as they have heard."""
        revision, machines, machine = store.fence(reference, state.fenced, how)
        return changed(store, how, revision, machines=machines, machine=machine)

    return routes


def judge_machine(machine: shapes.Join) -> Tag | None:
    """The rules for machines are those of a manifest. Returns the VLAN that its NICs are in."""
    spec: dict[str, Any] = {"address": machine.address, "mtu": machine.mtu, "labels": machine.labels}
    if machine.nics:
        spec["nic"] = machine.nics
    if machine.vlan is not None:
        spec["vlan"] = machine.vlan.model_dump()
    if machine.trunks is not None:
        spec["trunks"] = machine.trunks
    read = parse({"apiVersion": shapes.API_VERSION, "machines": {machine.name: spec}}).machines or {}
    vlan = read[machine.name].vlan
    return vlan.value if vlan is not None else None


def _judge_name(machine: str) -> None:
    parse({"apiVersion": shapes.API_VERSION, "machines": {machine: {}}})


def _judge_token(wanted: shapes.TokenWish) -> None:
    if (wanted.everything is None) == (not wanted.tenants):
        message = "a token is for everything, or for tenants: give one of `everything` and `tenants`"
        raise Invalid([Problem("missing_key", "", message)])
