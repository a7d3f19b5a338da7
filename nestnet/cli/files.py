"""Network files: read, judged, and errors shown as FILE:LINE:COL, whether they are found here or by the controller."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from nestnet.model.errors import Invalid, NestnetError, NotFound

if TYPE_CHECKING:
    from nestnet.file import Document
    from nestnet.model.manifest import Manifest


class Rendered(Invalid):
    """Problems with the text that shows where each of them is."""

    def __init__(self, error: Invalid, text: str) -> None:
        super().__init__(error.problems)
        self.text = text


def read(file: str, alone: bool = False) -> Document:
    """The network file, `-` for stdin, without errors that can be found without a controller.

    `alone` says that nothing exists but what the file names. Raises Rendered with every problem, NotFound when there
    is no such file.
    """
    from nestnet.file import Unreadable, load
    from nestnet.file.reader import MAX_BYTES
    from nestnet.model.validate import Known

    # One byte more than allowed is enough to be refused: what is read may have no end.
    data = content(file, MAX_BYTES + 1)
    try:
        return load(data, name(file), Known()) if alone else load(data, name(file))
    except Unreadable as error:
        raise Rendered(error, str(error)) from None


def content(file: str, most: int = -1) -> bytes:
    """The bytes of a file, `-` for stdin; of a large one the first `most`. Raises NotFound when there is none."""
    with lines(file) as opened:
        return opened.read(most)


@contextmanager
def lines(file: str) -> Iterator[IO[bytes]]:
    """A file to be read a line at a time, `-` for stdin. Raises NotFound when there is none."""
    with _readable(file), nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as opened:
        yield opened


@contextmanager
def _readable(file: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"file {file}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise NestnetError(f"{file}: {getattr(error, 'strerror', None) or error}", "file") from None


def name(file: str) -> str:
    """What messages call the file."""
    return "<stdin>" if file == "-" else file


def manifest(document: Document) -> Manifest:
    """What the document says: one that was read without problems says something."""
    assert document.manifest is not None
    return document.manifest


def body(document: Document) -> dict[str, Any]:
    """What the API is sent: problems that it finds point into this, and so into the document."""
    return cast("dict[str, Any]", document.data)


@contextmanager
def shown_in(document: Document) -> Iterator[None]:
    """Problems that the controller finds, at the lines of the file they are about."""
    from nestnet.file import render

    try:
        yield
    except Invalid as error:
        if isinstance(error, Rendered):
            raise
        raise Rendered(error, render(error.problems, document)) from None
