"""A process that reads the lines of long batches for a controller, so that a second CPU does it.

Python computes on one CPU at a time: what lines mean by themselves (model/lines.py) takes as long as making rows of it.
The process has nothing of the controller's but the lines, one part after the other. It is there while there are such
batches, and ends when its input does: with the controller, however that ends. Should it end before, the controller
reads the lines itself.

    request, answer  +-----------------+----------------------------------------------+
                     | length, 32 bits | lines, with a line end between; or a `Lines` |
                     +-----------------+   as MessagePack, nil if they are not plain  |
                                       +----------------------------------------------+
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import msgspec
from starlette.concurrency import run_in_threadpool

from nestnet.model.lines import Lines, read

LENGTH = 4  # bytes
BUFFER = 1 << 20  # Bytes of an answer that wait to be taken.

log = logging.getLogger("nestnet.api")

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], Lines | None] = msgspec.msgpack.Decoder(Lines | None).decode


class Reader:
    """The process, as the controller has it."""

    def __init__(self) -> None:
        self._users = 0
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Inside, somebody has lines to read. The process ends with the last."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._end()

    async def read(self, lines: Sequence[bytes]) -> Lines | None:
        """What lines mean, if all of them are plain."""
        async with self._turn:
            try:
                return await self._ask(lines)
            except (OSError, asyncio.IncompleteReadError) as error:
                self._end()
                log.warning("lines are read here: who read them is gone error=%r", str(error))
            except BaseException:
                self._end()  # Its answer would be taken for that to the next.
                raise
        return await here(lines)

    async def _ask(self, lines: Sequence[bytes]) -> Lines | None:
        if self._process is None:
            command = (sys.executable, "-m", "nestnet.api.reading")
            self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=BUFFER)
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        body = b"\n".join(lines)
        to.write(len(body).to_bytes(LENGTH) + body)
        await to.drain()
        length = int.from_bytes(await back.readexactly(LENGTH))
        return _decode(await back.readexactly(length))

    def _end(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
        self._process = None


async def here(lines: Sequence[bytes]) -> Lines | None:
    """The same without a process."""
    return await run_in_threadpool(read, lines)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The controller is told, and ends this.
    while head := sys.stdin.buffer.read(LENGTH):
        body = sys.stdin.buffer.read(int.from_bytes(head))
        answer = _encode(read(body.split(b"\n")))
        sys.stdout.buffer.write(len(answer).to_bytes(LENGTH) + answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
