"""Reading what strangers send: at most so much of it."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nestnet.api.access import NOBODY

STRANGERS = 64 * 1024  # Bytes that somebody may send who has not said who they are.
BODY = 32 * 1024 * 1024  # Bytes. A manifest of 20,000 ports with everything has about six million.
STREAM = 64 * 1024 * 1024 * 1024  # Bytes of what is not kept: a backup goes to the disk, a batch into the store.
STREAMS = ("/v1/restore", "/v1/batch")


class Bounded:
    """ASGI: a request with a body of more than BODY bytes, STREAM for a restore or a batch, STRANGERS of a stranger, is
    answered with 413."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0
        known = scope.get("state", {}).get("who", NOBODY)
        limit = STREAM if scope.get("path") in STREAMS else BODY
        limit = limit if known.is_person or known.machine is not None else STRANGERS

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise HTTPException(413, f"the body is longer than {limit} bytes: send fewer networks at a time")
            return message

        await self._app(scope, bounded if scope["type"] == "http" else receive, send)
