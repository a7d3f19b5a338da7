"""The routes for ports that move: one for people, two for the agents of the machines that one leaves and comes to."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from nestnet.api import shapes
from nestnet.api.asked import asked, changed
from nestnet.api.numbers import port_row
from nestnet.store.once import Asked
from nestnet.store.store import Store


class Move(shapes.Shape):
    """Where a port shall live."""

    port: str
    """Its id, path, or the end of a path that only it has."""
    to: str
    """A machine for a network that the wire carries, else by bare name a port of the carrier with `hosts: true`."""


class Begun(shapes.Changed):
    """A move that has begun. It has ended when the port's `moving` is null, or says `failed`."""

    machines: list[str]
    """Those that get rows."""
    disturbs: list[str]
    """What running traffic will notice."""
    port: shapes.Port


def routes(store: Store) -> APIRouter:
    """All of them."""
    found = APIRouter()  # before all others: a reference may have any number of parts

    @found.post("/move", response_model=Begun, tags=["resources"])
    async def move(wish: Move, how: Annotated[Asked, Depends(asked)]) -> dict[str, Any]:
        """Move a port, with all that lives on it, to another host, under traffic."""
        begun, port = await run_in_threadpool(store.move, wish.port, wish.to, how)
        more = {"machines": begun.machines, "disturbs": begun.disturbs, "port": port}
        return changed(store, how, begun.revision, **more)

    @found.put("/machines/{reference}/moves/{port}", status_code=204, tags=["machines"])
    async def give(reference: str, port: shapes.Row, request: Request) -> None:
        """What the machine that a port leaves remembers of its connections: for the other agent to read."""
        body = await request.body()
        row = await run_in_threadpool(port_row, store, reference, port)
        await run_in_threadpool(store.give_connections, reference, row, body)

    @found.get("/machines/{reference}/moves/{port}", response_class=Response, tags=["machines"])
    def take(reference: str, port: shapes.Row) -> Response:
        """What was given last."""
        known = store.take_connections(reference, port_row(store, reference, port))
        return Response(known, media_type="application/octet-stream")

    return found
