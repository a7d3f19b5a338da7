"""The routes that make networks: one, or as many as somebody has.

    POST /v1/networks    one
    POST /v1/batch       a line each, in parts: each part is there as a whole, or not at all, before the next is made

A batch that was cut off is sent again, with the same key: the parts that are there are told again, not made again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from nestnet.api import shapes
from nestnet.api.access import Who, still, who
from nestnet.api.asked import changed, keyed
from nestnet.api.problem import problem
from nestnet.api.reading import Reader
from nestnet.model.errors import Invalid, NestnetError, Problem, Unauthenticated
from nestnet.model.lines import Lines
from nestnet.model.lines import read as columns
from nestnet.store.create import PART, Answer, Job, job
from nestnet.store.once import Asked
from nestnet.store.store import Store

Read = Callable[[Sequence[bytes]], Lines | None]

LINE = 1024 * 1024  # Bytes of one network.
PART_BYTES = 16 * 1024 * 1024  # Of a part: it ends with the line that reaches it.
PAUSE = 0.005  # Seconds that single networks wait for others.
HERE = 5  # Parts of a batch after which a process reads the others: it takes as long to start.
AT_ONCE = 4  # Answers that are sent before others' turn comes.


class Created(shapes.Changed):
    """A network that is there now."""

    id: str
    path: str


NEW = {
    "type": "object",
    "description": "A network as the network file has it, with its name and what carries it.",
    "properties": {
        "name": {"type": "string"},
        "carrier": {"type": "string", "description": "A path. Absent: the wire, or the hosts that were granted."},
    },
    "required": ["name"],
    "additionalProperties": True,
}
ONE = {"requestBody": {"required": True, "content": {"application/json": {"schema": NEW}}}}
MANY = {
    "requestBody": {
        "required": True,
        "description": "A line of JSON is a network, as the body of `POST /v1/networks`.",
        "content": {"application/x-ndjson": {}},
    }
}
PARTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "A line for each part: `PartLine`s.", "content": {"application/x-ndjson": {}}}
}


def routes(store: Store) -> APIRouter:
    found = APIRouter(tags=["resources"])
    together = _Together(store)
    reader = Reader()

    async def create_network(request: Request, how: Annotated[Asked, Depends(keyed)]) -> dict[str, Any]:
        """Make a network, with what is in it. 409 if there is one that is called so."""
        body = await request.body()
        try:
            made = await together.make(job([body], how))
        except Invalid as error:
            raise Invalid([replace(one, pointer=one.pointer.removeprefix("/1")) for one in error.problems]) from None
        said = msgspec.json.decode(body)
        path = f"{said['carrier']}/{said['name']}" if "carrier" in said else said["name"]
        return changed(store, how, made["revision"], id=store.identity.public("network", made["first"]), path=path)

    found.add_api_route(
        "/networks",
        create_network,
        methods=["POST"],
        response_model=Created,
        status_code=201,
        openapi_extra=ONE,
    )

    @found.post("/batch", response_class=StreamingResponse, responses=PARTS, openapi_extra=MANY)
    async def batch(request: Request, how: Annotated[Asked, Depends(keyed)]) -> StreamingResponse:
        """Make many networks. The answer has a line for each 1,000, and ends with a problem if one part has any; what
        was before that is there. Sent again with one key, parts are made once."""
        answers = _batch(store, who(request), how, request, reader)
        first = await anext(answers, b"")  # What is wrong at once is an error like any other.

        async def lines() -> AsyncIterator[bytes]:
            yield first
            async for line in answers:
                yield line

        return _Parts(lines(), media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    return found


class _Together:
    """Networks that several people want at once are made at once. Whoever has just had an answer asks again soon: as
    many as there were the last time are waited for, but not longer than PAUSE."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: list[tuple[Job, asyncio.Future[Answer]]] = []
        self._enough = asyncio.Event()
        self._expected = 1
        self._task: asyncio.Task[None] | None = None

    async def make(self, job: Job) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, future))
        if len(self._waiting) >= self._expected:
            self._enough.set()
        if self._task is None:
            self._task = asyncio.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        while self._waiting:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE):
                    await self._enough.wait()
            turns, self._waiting = self._waiting[:PART], self._waiting[PART:]
            self._expected = len(turns)
            self._enough.clear()
            try:
                answers = await run_in_threadpool(self._store.create_each, [job for job, _ in turns])
            except Exception as error:
                answers = [error] * len(turns)
            for place, ((_, future), answer) in enumerate(zip(turns, answers, strict=True)):
                if place % AT_ONCE == 0:
                    await asyncio.sleep(0)  # others' answers are not held up by all of these
                if future.cancelled():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
            await asyncio.sleep(0)  # they answer, and others ask
        self._task = None


class _Parts(StreamingResponse):
    """An answer that begins while the request is still read: nobody else takes what comes meanwhile."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await self.stream_response(send)


async def _batch(store: Store, known: Who, how: Asked, request: Request, reader: Reader) -> AsyncIterator[bytes]:
    """A line for each part. Raises what is wrong with the first. Of a long batch a part is read while the one before is
    written."""
    sent = request.stream()
    parts = _parts(sent)
    number, made, count = 1, 0, 0  # the first line of the part, networks and parts before it
    part = await _next(parts, how, number, columns)
    ahead: asyncio.Task[Job | None] | None = None
    with ExitStack() as stack:
        stack.callback(lambda: ahead is not None and ahead.cancel())
        while part is not None:
            if (count := count + 1) == HERE:
                stack.enter_context(reader.used())
            if count >= HERE:
                ahead = asyncio.create_task(_next(parts, how, number + len(part.lines), reader.read))
            at = {"lines": [number, number + len(part.lines) - 1]}
            try:
                _short(part.lines, number)
                if not await run_in_threadpool(still, store, known):
                    raise Unauthenticated("whoever sends this may not do so any more")
                (answer,) = await run_in_threadpool(store.create_each, [part])
                if isinstance(answer, Exception):
                    raise answer
            except NestnetError as error:
                if ahead is not None:
                    await ahead
                with suppress(ClientDisconnect):
                    async for _ in sent:
                        pass  # Who still sends hears nothing before they are done.
                if number == 1:
                    raise
                yield msgspec.json.encode({**at, "problem": problem(error)}) + b"\n"
                return
            number += len(part.lines)
            made += answer["count"]
            yield (
                msgspec.json.encode({**at, "networks": made, **changed(store, part.asked, answer["revision"])}) + b"\n"
            )
            part = await (ahead if ahead is not None else _next(parts, how, number, columns))
    if number == 1:
        raise Invalid([Problem("bad_value", "", "there is no line: each is a network")])


async def _next(parts: AsyncIterator[list[bytes]], how: Asked, number: int, read: Read) -> Job | None:
    """The part that begins with the line of this number; None: there is none."""
    lines = await anext(parts, None)
    if lines is None:
        return None
    asked = replace(how, key=f"{how.key} {number}" if how.key is not None else None)
    return Job(lines, asked, await run_in_threadpool(read, lines), number)


async def _parts(sent: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """The lines of a body, PART at a time, or PART_BYTES if these are fewer; what comes after the last line end is one
    if it is not blank. The first line that is too long is the last, without its end: nobody keeps more of it."""
    lines: list[bytes] = []
    rest, size = b"", 0
    try:
        async for chunk in sent:
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                lines.append(line)
                size += len(line)
                if len(lines) == PART or size >= PART_BYTES:
                    yield lines
                    lines, size = [], 0
            if len(rest) > LINE:
                break
    except ClientDisconnect:  # What came of a part is none.
        return
    if rest.strip():
        lines.append(rest)
    if lines:
        yield lines


def _short(lines: Sequence[bytes], first: int) -> None:
    """Raises Invalid for one that is too long; the number of the first is `first`."""
    for number, line in enumerate(lines, first):
        if len(line) > LINE:
            message = f"the line is longer than {LINE} bytes"
            raise Invalid([Problem("limit_exceeded", f"/{number}", message, limit=LINE)])
