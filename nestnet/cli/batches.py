"""`batch`: networks that are made from the lines of a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice

from nestnet.cli import files
from nestnet.cli.changes import say
from nestnet.cli.find import target
from nestnet.cli.waiting import Progress
from nestnet.model.errors import Invalid, NestnetError, Problem, Unreachable

LINES = 10_000  # of a request.
PART = 1000  # of them that the controller makes together.


def batch(file: str, key: str | None, lab: str | None) -> None:
    """Make a network of each line, and say how many there are.

    Unless `key` is given, a request's key hangs on what the file has up to the end of the request's first part: where
    a later line was mended, the parts before it are told again, and a file with another beginning is another one."""
    start = time.monotonic()
    made, first = 0, 1
    said, progress = sha256(), Progress()
    try:
        with files.lines(file) as opened, target(lab).client() as client:
            while lines := [*islice(opened, LINES)]:
                said.update(b"".join(lines[:PART]))
                mine = said.hexdigest() if key is None else f"{key} {first}"
                before = made
                with _shown_in(file, first, len(lines)):
                    for part in client.batch([line.removesuffix(b"\n") for line in lines], key=mine):
                        made = before + part["networks"]
                said.update(b"".join(lines[PART:]))
                first += len(lines)
                progress.show(f"{made} networks")
    except NestnetError:
        progress.done()
        if made:
            say(f"{made} networks are there; run it again for the others")
        raise
    progress.done()
    say(f"{made} networks made in {time.monotonic() - start:.2f} s")


@contextmanager
def _shown_in(file: str, first: int, count: int) -> Iterator[None]:
    """Problems with lines of a request, at those of the file."""
    name = files.name(file)
    try:
        yield
    except Invalid as error:
        text = "\n".join(_at(name, problem, first) for problem in error.problems)
        raise files.Rendered(error, text) from None
    except Unreachable:
        raise
    except NestnetError as error:
        error.message = f"{name}:{first}-{first + count - 1}: {error.message}"
        raise


def _at(name: str, problem: Problem, first: int) -> str:
    """`FILE:LINE: code: message (/pointer)`"""
    line, _, rest = problem.pointer.removeprefix("/").partition("/")
    where = f"{name}:{first - 1 + int(line)}" if line.isdecimal() else name
    return f"{where}: {problem.code}: {problem.message}" + (f" (/{rest})" if rest else "")
