"""A network file that was read: the manifest, the data it came from, and where in the text each part is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nestnet.model.errors import Invalid, Problem
from nestnet.model.manifest import Manifest
from nestnet.model.validate import OFFLINE, Known, check

from .reader import NOWHERE, Position, Positions, Text, TextError, read


@dataclass(frozen=True)
class Document:
    """`manifest` is None where the file breaks rules; `name` is what messages call the file."""

    name: str
    manifest: Manifest | None
    data: Any
    positions: Positions
    _marks: Mapping[Problem, Position] = field(default_factory=dict)

    def at(self, problem: Problem) -> Position:
        """The line and column, from 1, that a problem is about."""
        return self._marks.get(problem) or self.positions[problem.pointer]


class Unreadable(Invalid):
    """A file that breaks rules. Its text is what `render` makes of all of them."""

    def __init__(self, problems: Iterable[Problem], document: Document) -> None:
        super().__init__(sorted(problems, key=document.at))
        self.document = document

    def __str__(self) -> str:
        return render(self.problems, self.document)


def load(text: str | bytes, name: str = "<text>", known: Known = OFFLINE) -> Document:
    """The file `text`, read and judged as far as `known` says what exists outside it: by default nothing, and
    what the file does not have itself is believed to exist. The document has a manifest.

    Raises Unreadable with every problem, in the order of the text.
    """
    try:
        source = read(text)
    except TextError as error:
        source = Text(None, NOWHERE, [error.found])
        raise _unreadable(source, name, []) from None
    try:
        manifest = check(source.data, known)
    except Invalid as error:
        raise _unreadable(source, name, error.problems) from None
    if source.found:
        raise _unreadable(source, name, [])
    return Document(name, manifest, source.data, source.positions)


def _unreadable(source: Text, name: str, problems: Iterable[Problem]) -> Unreadable:
    marks = {found.problem: found.position for found in source.found}
    return Unreadable([*marks, *problems], Document(name, None, source.data, source.positions, marks))


def render(problems: Iterable[Problem], document: Document) -> str:
    """A line `FILE:LINE:COL: code: message` for each problem, in the order of the text; no newline at the end."""
    placed = sorted(((document.at(problem), problem) for problem in problems), key=lambda pair: pair[0])
    return "\n".join(
        f"{document.name}:{line}:{column}: {problem.code}: {problem.message}" for (line, column), problem in placed
    )
