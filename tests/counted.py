"""A controller that says of each answer, in the header `statements`, how many SQL statements it took."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nestnet.api import server

_asked: ContextVar[list[str] | None] = ContextVar("asked", default=None)


@event.listens_for(Engine, "before_cursor_execute")
def _count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
    # Which numbers are free hangs on what others took, at any depth.
    if (asked := _asked.get()) is not None and "vni_range" not in statement and "counter" not in statement:
        asked.append(statement)


class Counted:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked: list[str] = []
        _asked.set(asked)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["statements"] = str(len(asked))
            await send(message)

        await self._app(scope, receive, told)


def serve(db: str, address: str) -> None:
    made = server.create_app

    def create(*arguments: Any, **more: Any) -> Any:
        app = made(*arguments, **more)
        app.add_middleware(Counted)
        return app

    server.create_app = create
    server.serve(Path(db), address)
