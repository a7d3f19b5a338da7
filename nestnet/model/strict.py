"""JSON that says one thing only."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from .errors import Invalid, Problem


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
