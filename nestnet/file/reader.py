"""YAML 1.2 (core schema) to JSON-able data, with the line and column of everything in it.

libyaml, by way of PyYAML, cuts the text into events; what the events mean is decided here, since
PyYAML means YAML 1.1: there `on`, `no` and 12:30:45 are not text. Strict where people get hurt:

    duplicate keys                 refused, with both places
    tags, merge keys, directives   refused, also a second document
    aliases                        allowed, but what they repeat is counted: an alias bomb is refused unexpanded
    keys                           always text, as in JSON: `1:` is the name '1'

Nothing here recurses, and what is read is bounded by MAX_BYTES, MAX_NODES and MAX_DEPTH.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import yaml
from yaml._yaml import CParser
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from nestnet.model.errors import Problem
from nestnet.model.problems import join, quote, split
from nestnet.model.values import MAX_DEPTH as NETWORKS

# Published limits.
MAX_BYTES = 16 << 20  # 20,000 ports with all their keys take 3 MiB
MAX_NODES = 1_000_000  # values and keys, those that aliases repeat included
MAX_ALIASED = 100_000  # of these, repeated by aliases: what anchors are for needs a few hundred
MAX_DEPTH = 2 * NETWORKS + 8  # a network takes two levels; its ports, their labels and lists the rest

Position = tuple[int, int]  # line and column, from 1


@dataclass(frozen=True, slots=True)
class Found:
    """A problem of the text, with its place there."""

    problem: Problem
    position: Position


class TextError(Exception):
    """The text cannot be read on from here."""

    def __init__(self, code: str, position: Position, message: str, limit: int | None = None) -> None:
        super().__init__(message)
        self.found = Found(Problem(code, "", message, limit=limit), position)


class _Entry(NamedTuple):
    """Where a key (in a list: the item) and its value are; `below` are the entries of a value that has some."""

    key: Position
    value: Position
    below: _Entries | None


_Entries = dict[str, _Entry]


class Positions:
    """JSON pointer -> line and column in the text, from 1.

    `positions[pointer]` is the place of the key, `positions.value(pointer)` of what it stands for. A pointer
    to what is not in the text, as a key that is missing, gets the place of the innermost thing around it.
    """

    def __init__(self, root: _Entry) -> None:
        self._root = root

    def __getitem__(self, pointer: str) -> Position:
        return self._find(pointer).key

    def value(self, pointer: str) -> Position:
        return self._find(pointer).value

    def __contains__(self, pointer: str) -> bool:
        entry: _Entry | None = self._root
        for step in split(pointer):
            entry = (entry.below or {}).get(step) if entry else None
        return entry is not None

    def _find(self, pointer: str) -> _Entry:
        entry = self._root
        for step in split(pointer):
            below = (entry.below or {}).get(step)
            if below is None:
                break
            entry = below
        return entry


@dataclass
class Text:
    """What was read: `found` are problems that did not stop the reading."""

    data: Any
    positions: Positions
    found: list[Found] = field(default_factory=list)


START: Position = (1, 1)
NOWHERE = Positions(_Entry(START, START, None))

# What YAML 1.2 calls printable, less the three that YAML 1.1 (so libyaml) takes for line breaks.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")

# The core schema, YAML 1.2.2 section 10.3.2.
_MAYBE = frozenset("~-+.0123456789nNtTfF")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_SPECIAL = re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")
_LONG = 40  # digits; longer numbers are text, for Python will not turn thousands of digits into a number


def scalar(text: str) -> str | int | float | bool | None:
    """What a plain scalar means in YAML 1.2."""
    if text and text[0] not in _MAYBE:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _LONG:
        return text
    if _INT.match(text):
        return int(text)
    if _OCTAL.match(text):
        return int(text[2:], 8)
    if _HEX.match(text):
        return int(text[2:], 16)
    if _FLOAT.match(text) or _SPECIAL.match(text):
        return float(
            text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").lower().replace(".nan", "nan")
        )
    return text


def read(text: str | bytes) -> Text:
    """The data of a text, and where it is in it. Raises TextError where reading cannot go on."""
    return _Reader(_decoded(text)).read()


def _decoded(text: str | bytes) -> str:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > MAX_BYTES:
        raise TextError("limit_exceeded", START, f"the file has more than {MAX_BYTES} bytes", MAX_BYTES)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        raise TextError("yaml_syntax", _end(before), "the file is not UTF-8 from here on") from None
    text = text.removeprefix("\ufeff")
    if (match := _FORBIDDEN.search(text)) is not None:
        message = f"the file has the control character U+{ord(match[0]):04X} here: take it out"
        raise TextError("control_character", _end(text[: match.start()]), message)
    return text


def _end(text: str) -> Position:
    lines = re.split(r"\r\n|\r|\n", text)
    return len(lines), len(lines[-1]) + 1


class _Node(NamedTuple):
    """A value that is read: with how many values it has in all, itself included, and how deep they go."""

    data: Any
    position: Position
    entries: _Entries | None
    size: int
    height: int


_IN_PROGRESS = _Node(None, START, None, 0, 0)


class _Frame:
    """A mapping or list that is being read."""

    __slots__ = ("anchor", "data", "entries", "height", "key", "position", "size")

    def __init__(self, data: dict[str, Any] | list[Any], position: Position, anchor: str | None) -> None:
        self.data = data
        self.position = position
        self.anchor = anchor
        self.entries: _Entries = {}
        self.key: tuple[str, Position] | None = None  # a key that waits for its value
        self.size = 1
        self.height = 1


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.found: list[Found] = []
        self.frames: list[_Frame] = []
        self.anchors: dict[str, _Node] = {}
        self.nodes = 0
        self.aliased = 0
        self.root: _Node | None = None

    def read(self) -> Text:
        for event in self._events():
            # By how often they come.
            if isinstance(event, ScalarEvent):
                self._scalar(event)
            elif isinstance(event, MappingStartEvent):
                self._open(event, {})
            elif isinstance(event, MappingEndEvent | SequenceEndEvent):
                self._close()
            elif isinstance(event, SequenceStartEvent):
                self._open(event, [])
            elif isinstance(event, AliasEvent):
                self._alias(event)
            elif isinstance(event, DocumentStartEvent):
                self._document(event)
        root = self.root or _Node(None, START, None, 0, 0)
        return Text(root.data, Positions(_Entry(root.position, root.position, root.entries)), self.found)

    def _events(self) -> Iterator[Event]:
        parser = CParser(self.text)
        try:
            while (event := parser.get_event()) is not None:
                yield event
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line, mark.column) if mark else (0, 0)
            lines = self.text.splitlines()
            if line < len(lines) and lines[line][column : column + 1] == "\t":
                raise TextError("yaml_syntax", (line + 1, column + 1), "a tab: YAML indents with spaces") from None
            raise TextError("yaml_syntax", (line + 1, column + 1), _syntax(error)) from None
        except yaml.YAMLError as error:
            raise TextError("yaml_syntax", START, f"this is no YAML: {quote(error)}") from None
        finally:
            parser.dispose()

    def _document(self, event: DocumentStartEvent) -> None:
        at = _position(event)
        if self.root is not None:
            raise TextError("yaml_feature", at, "a second document begins here: a file has one")
        if event.tags:
            raise TextError("yaml_feature", at, "%TAG: the file needs no tags, take it out")
        if event.version is not None and tuple(event.version) != (1, 2):
            raise TextError("yaml_feature", at, "%YAML: the file is YAML 1.2, take the line out")

    def _scalar(self, event: ScalarEvent) -> None:
        at = _position(event)
        if event.tag is not None:
            self._tagged(event.tag, at)
        frame = self.frames[-1] if self.frames else None
        if frame is not None and frame.key is None and isinstance(frame.data, dict):
            if event.anchor is not None:
                self.anchors[event.anchor] = _Node(event.value, at, None, 1, 0)
            if event.value == "<<" and event.implicit[0]:
                raise TextError(
                    "yaml_feature", at, "'<<' is a merge key, which YAML 1.2 does not have: write the keys out"
                )
            self._key(frame, event.value, at)
            return
        value = scalar(event.value) if event.implicit[0] else event.value
        node = _Node(value, at, None, 1, 0)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        self._value(node)

    def _key(self, frame: _Frame, key: str, at: Position) -> None:
        if key in frame.entries:
            line, column = frame.entries[key].key
            pointer = join(*self._path(), key)
            message = f"{quote(key)} is given twice: first in line {line}, column {column}"
            self.found.append(Found(Problem("duplicate_key", pointer, message), at))
        frame.key = (key, at)

    def _path(self) -> list[str]:
        """Keys and indexes on the way to the innermost frame."""
        return [frame.key[0] if frame.key else str(len(frame.data)) for frame in self.frames[:-1]]

    def _open(self, event: MappingStartEvent | SequenceStartEvent, data: dict[str, Any] | list[Any]) -> None:
        at = _position(event)
        if event.tag is not None:
            self._tagged(event.tag, at)
        if self.frames and self.frames[-1].key is None and isinstance(self.frames[-1].data, dict):
            raise TextError("yaml_feature", at, "a key is a mapping or a list: keys are plain text")
        self._depth(len(self.frames) + 1, at)
        if event.anchor is not None:
            self.anchors[event.anchor] = _IN_PROGRESS
        self.frames.append(_Frame(data, at, event.anchor))

    def _close(self) -> None:
        frame = self.frames.pop()
        node = _Node(frame.data, frame.position, frame.entries, frame.size, frame.height)
        if frame.anchor is not None:
            self.anchors[frame.anchor] = node
        self._value(node)

    def _alias(self, event: AliasEvent) -> None:
        at, anchor = _position(event), str(event.anchor)
        node = self.anchors.get(anchor)
        if node is None:
            raise TextError("yaml_syntax", at, f"there is no anchor {quote('&' + anchor)} before this alias")
        if node is _IN_PROGRESS:
            raise TextError("alias_limit", at, f"{quote('*' + anchor)} would contain itself")
        self.aliased += node.size
        if self.aliased > MAX_ALIASED:
            message = f"aliases repeat more than {MAX_ALIASED} values up to here: write less of them"
            raise TextError("alias_limit", at, message, MAX_ALIASED)
        frame = self.frames[-1] if self.frames else None
        if frame is not None and frame.key is None and isinstance(frame.data, dict):
            if not isinstance(node.data, str):
                raise TextError("yaml_feature", at, "a key is an alias of something else than text: write it out")
            self._key(frame, node.data, at)
            return
        self._depth(len(self.frames) + node.height, at)
        self._value(node, at)

    def _value(self, node: _Node, at: Position | None = None) -> None:
        """A whole value: the root, an item, or what the waiting key stands for. `at` is where an alias stands."""
        self.nodes += 1
        if self.nodes + self.aliased > MAX_NODES:
            raise TextError("limit_exceeded", node.position, f"the file has more than {MAX_NODES} values", MAX_NODES)
        if not self.frames:
            self.root = node
            return
        frame = self.frames[-1]
        frame.size += node.size
        frame.height = max(frame.height, node.height + 1)
        here = at or node.position
        if isinstance(frame.data, list):
            frame.entries[str(len(frame.data))] = _Entry(here, here, node.entries)
            frame.data.append(node.data)
            return
        assert frame.key is not None  # libyaml gives keys and values in turn
        key, key_at = frame.key
        frame.key = None
        if key not in frame.entries:  # of a key that is given twice the first counts
            frame.data[key] = node.data
            frame.entries[key] = _Entry(key_at, here, node.entries)

    def _depth(self, depth: int, at: Position) -> None:
        if depth > MAX_DEPTH:
            message = f"this is more than {MAX_DEPTH} levels deep, enough for networks in {NETWORKS} networks"
            raise TextError("too_deep", at, message, MAX_DEPTH)

    def _tagged(self, tag: str, at: Position) -> NoReturn:
        raise TextError("yaml_feature", at, f"{quote(tag)} is a tag, and the file needs none: take it out")


def _position(event: Event) -> Position:
    mark = event.start_mark
    assert mark is not None  # libyaml marks every event
    return mark.line + 1, mark.column + 1


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """libyaml's words, which are good ones, in a single sentence."""
    parts = [quote(part)[1:-1] for part in (error.context, error.problem) if part]
    text = ": ".join(parts) or "this is no YAML"
    if "cannot start any token" in text:
        text += ": put text that begins so in quotes"
    if error.context_mark is not None and error.context_mark.line != getattr(error.problem_mark, "line", None):
        text += f" (it began in line {error.context_mark.line + 1})"
    return text
