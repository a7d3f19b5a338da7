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

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from subprocess import PIPE, Popen

import msgspec

from nestnet.model.lines import Lines, read

LENGTH = 4  # bytes

log = logging.getLogger("nestnet.api")

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], Lines | None] = msgspec.msgpack.Decoder(Lines | None).decode


class Reader:
    """The process, as the controller has it. Threads may share it."""

    def __init__(self) -> None:
        self._users = 0
        self._process: Popen[bytes] | None = None
        self._turn = threading.Lock()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, somebody has lines to read. The process ends with the last."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._end_if_unused()

    def read(self, lines: Sequence[bytes]) -> Lines | None:
        """What lines mean, if all of them are plain."""
        try:
            with self._turn:
                return self._ask(b"\n".join(lines))
        finally:
            self._end_if_unused()

    def _ask(self, body: bytes) -> Lines | None:
        try:
            return _decode(self._answer(body))
        except (OSError, EOFError) as error:
            self._end()
            log.warning("lines are read here: who read them is gone error=%r", str(error))
        return read(body.split(b"\n"))

    def _answer(self, body: bytes) -> bytes:
        if self._process is None:
            self._process = Popen([sys.executable, "-m", "nestnet.api.reading"], stdin=PIPE, stdout=PIPE)
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        to.write(len(body).to_bytes(LENGTH) + body)
        to.flush()
        length = int.from_bytes(back.read(LENGTH))
        answer = back.read(length)
        if length == 0 or len(answer) < length:
            raise EOFError("it has ended")
        return answer

    def _end_if_unused(self) -> None:
        # Whoever has its turn does this afterwards.
        if self._users == 0 and self._turn.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._turn.release()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with suppress(OSError), self._process:  # closes and waits; what was not sent is lost
                pass
        self._process = None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The controller is told, and ends this.
    while head := sys.stdin.buffer.read(LENGTH):
        body = sys.stdin.buffer.read(int.from_bytes(head))
        answer = _encode(read(body.split(b"\n")))
        sys.stdout.buffer.write(len(answer).to_bytes(LENGTH) + answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
