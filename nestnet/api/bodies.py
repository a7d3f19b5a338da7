"""Reading what strangers send: at most so much of it, and JSON that says one thing only."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nestnet.api.access import NOBODY
from nestnet.model.errors import Invalid, Problem

STRANGERS = 64 * 1024  # Bytes that somebody may send who has not said who they are.
BODY = 32 * 1024 * 1024  # Bytes. A manifest of 20,000 ports with everything has about six million.
BACKUP = 64 * 1024 * 1024 * 1024  # Bytes of a backup that is restored: it goes to the disk as it comes.


class Bounded:
    """ASGI: a request with a body of more than BODY bytes, BACKUP for a restore, STRANGERS of a stranger, is answered
    with 413."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0
        known = scope.get("state", {}).get("who", NOBODY)
        limit = BACKUP if scope.get("path") == "/v1/restore" else BODY
        limit = limit if known.is_person or known.machine is not None else STRANGERS

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise HTTPException(413, f"the body is longer than {limit} bytes: send fewer networks at a time")
            return message

        await self._app(scope, bounded if scope["type"] == "http" else receive, send)


def read_json(body: bytes) -> Any:
    """The JSON in a body. Raises Invalid: for duplicate keys too, of which one would silently win, and NaN."""
    try:
        return json.loads(body, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise _invalid("too_deep", "the JSON is nested too deep") from None
    except UnicodeDecodeError:
        raise _invalid("wrong_type", "the body is no JSON: it is not UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _invalid("wrong_type", f"the body is no JSON: {where}: {error.msg}") from None
    except ValueError as error:  # Numbers of thousands of digits.
        raise _invalid("out_of_range", f"the body has a number that is too long: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _invalid("duplicate_key", f"the key {twice[:80]!r} is given twice in one mapping")
    return found


def _constant(text: str) -> NoReturn:
    raise _invalid("wrong_type", f"{text} is no JSON value")


def _invalid(code: str, message: str) -> Invalid:
    return Invalid([Problem(code, "", message)])
