"""Routes that many ask for at once, without what FastAPI does for each request on its way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from nestnet.api.asked import KEY, keyed

Admitted = Callable[[Request], Awaitable[None]]


def direct(admitted: Admitted) -> type[APIRoute]:
    """A route whose function takes the request and how it is asked for, and reads the body itself.

    FastAPI works out anew for each request what functions stand before it, and judges the answer: a third of the time
    that making a network takes. Here they are called, and the answer is the function's own. Who sends parameters, or a
    key that cannot be one, goes the usual way, and is told there what is wrong."""

    class Direct(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            usual, status = super().get_route_handler(), self.status_code or 200

            async def handle(request: Request) -> Response:
                key = request.headers.get("idempotency-key")
                if request.scope["query_string"] or (key is not None and len(key) not in KEY):
                    return await usual(request)
                await admitted(request)
                said = await self.endpoint(request, await keyed(request, key))
                return Response(msgspec.json.encode(said), status, media_type="application/json")

            return handle

    return Direct
