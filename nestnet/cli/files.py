"""Network files: read, judged, and errors shown as FILE:LINE:COL, whether they are found here or by the controller."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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

    try:
        # One byte more than allowed is enough to be refused: what is read may have no end.
        if file == "-":
            text = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(file).open("rb") as opened:
                text = opened.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"file {file}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise NestnetError(f"{file}: {getattr(error, 'strerror', None) or error}", "file") from None
    name = "<stdin>" if file == "-" else file
    try:
        return load(text, name, Known()) if alone else load(text, name)
    except Unreadable as error:
        raise Rendered(error, str(error)) from None


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
