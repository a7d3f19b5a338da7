"""A route that many ask for at once, without what FastAPI and Starlette do for each request on its way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from nestnet.api.asked import KEY, keyed
from nestnet.model.errors import NestnetError

Admitted = Callable[[Request], Awaitable[None]]
Told = Callable[[Request, Exception], Response]


class Direct:
    """ASGI: one route with no parameters in its path, whose function takes the request and how it is asked for, and
    reads the body itself.

    To find a route among all, to work out what functions stand before it and to judge the answer takes half the time
    that making a network does. Here it is called, and its answer is the function's own. Who sends parameters, or a key
    that cannot be one, goes the usual way, and is told there what is wrong."""

    def __init__(self, app: ASGIApp, route: APIRoute, path: str, admitted: Admitted, told: Told) -> None:
        self._app, self._route, self._admitted, self._told = app, route, admitted, told
        self._path, (self._method,) = path, route.methods or {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != self._method:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        key = request.headers.get("idempotency-key")
        if scope["query_string"] or (key is not None and len(key) not in KEY):
            await self._app(scope, receive, send)
            return
        scope["route"], scope["path_params"] = self._route, {}
        try:
            await self._admitted(request)
            said = await self._route.endpoint(request, await keyed(request, key))
            answer = Response(msgspec.json.encode(said), self._route.status_code or 200, media_type="application/json")
        except (NestnetError, HTTPException) as error:
            answer = self._told(request, error)
        await answer(scope, receive, send)
