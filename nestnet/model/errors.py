"""Every error that nestnet tells a person or a program.

    NestnetError            exit 1, HTTP 500
    +- Invalid              exit 1, HTTP 422   a manifest, file or request that breaks a rule: all its problems
    +- Usage                exit 2, HTTP 400   asked for in a way that means nothing
    +- NotFound             exit 1, HTTP 404
    +- Ambiguous            exit 1, HTTP 400   a name that fits several things, with the candidates
    +- Conflict             exit 1, HTTP 409   something depends on it, or somebody was faster
    |  +- Exhausted         exit 1, HTTP 409   a number space, segment or quota is full
    +- Unauthenticated      exit 1, HTTP 401   nobody knows who asks: no token, or none that counts
    +- Forbidden            exit 1, HTTP 403   somebody who may not do this
    +- Stale                exit 1, HTTP 412   it has changed since it was looked at, with what changed
    +- TooFast              exit 1, HTTP 429   a tenant asks too often: come back after so many seconds
    +- DiskFull             exit 1, HTTP 507   the controller's disk has no room: nothing of it is stored
    +- NotRealised          exit 7, HTTP 504   not done by all machines before --timeout
    +- Unreachable          exit 8, HTTP 503   no controller, or no agent, answers, or its disk does not

A `Problem` is one broken rule: where (a JSON pointer into the manifest), which (`code`), what to
do about it (`message`), and what was nearest or what the limit is. Codes are API: they are listed
in `problems.py`, and a test demands a golden example of every one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule. `pointer` is an RFC 6901 JSON pointer into what was sent, '' for all of it."""

    code: str
    pointer: str
    message: str
    limit: int | str | None = None
    nearest: str | None = None


@dataclass
class NestnetError(Exception):
    """What went wrong, in one sentence that says what to do next."""

    message: str
    code: str = "internal"
    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500

    def __str__(self) -> str:
        return self.message


class Invalid(NestnetError):
    """Breaks rules: `problems` has every one of them, in the order of the text."""

    status = 422

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(p.message for p in self.problems), "invalid")


class Usage(NestnetError):
    exit_code = 2
    status = 400

    def __init__(self, message: str) -> None:
        super().__init__(message, "usage")


class NotFound(NestnetError):
    status = 404

    def __init__(self, what: str, nearest: str | None = None) -> None:
        self.nearest = nearest
        super().__init__(f"{what} does not exist" + (f"; did you mean {nearest}?" if nearest else ""), "not_found")


class Ambiguous(NestnetError):
    status = 400

    def __init__(self, what: str, candidates: Sequence[str]) -> None:
        self.candidates = tuple(candidates)
        super().__init__(f"{what} could be any of {', '.join(self.candidates)}: give the whole path", "ambiguous")


class Conflict(NestnetError):
    """`dependants` lists the paths that stand in the way, if any do."""

    status = 409

    def __init__(self, message: str, code: str = "conflict", dependants: Sequence[str] = ()) -> None:
        self.dependants = tuple(dependants)
        super().__init__(message, code)


class Exhausted(Conflict):
    """`limit` is how many there are in all."""

    def __init__(self, message: str, code: str, limit: int) -> None:
        self.limit = limit
        super().__init__(message, code)


class Unauthenticated(NestnetError):
    status = 401

    def __init__(self, message: str) -> None:
        super().__init__(message, "unauthenticated")


class Forbidden(NestnetError):
    status = 403

    def __init__(self, message: str, code: str = "forbidden") -> None:
        super().__init__(message, code)


class Stale(NestnetError):
    """`changes` says what changed since, a sentence each, newest first."""

    status = 412

    def __init__(self, message: str, changes: Sequence[str] = ()) -> None:
        self.changes = tuple(changes)
        super().__init__(message, "stale")


class TooFast(NestnetError):
    """`after` is how many seconds to wait."""

    status = 429

    def __init__(self, message: str, after: float) -> None:
        self.after = after
        super().__init__(message, "too_fast")


class DiskFull(NestnetError):
    status = 507

    def __init__(self, message: str) -> None:
        super().__init__(message, "disk_full")


class NotRealised(NestnetError):
    exit_code = 7
    status = 504

    def __init__(self, message: str) -> None:
        super().__init__(message, "not_realised")


class Unreachable(NestnetError):
    exit_code = 8
    status = 503

    def __init__(self, message: str) -> None:
        super().__init__(message, "unreachable")
