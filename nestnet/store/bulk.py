"""Many rows in few statements.

A statement for each row takes Python's lock and gives it back for each: beside a thread that computes, that is a wait
for every row. One that has a thousand rows lets others compute while it is carried out; and it takes half the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, TypeVar

from sqlalchemy import Connection

Key = TypeVar("Key", bound=tuple[int, ...])

TOGETHER = (1000, 100)
"""Rows of one statement; what is left goes row by row. They are few numbers, as SQLite has to read the text of each
once, which takes as long as its rows, one by one; and so that no statement has more than 32,766 values, in tables of up
to 32 columns."""


def insert(connection: Connection, table: str, columns: str, rows: Sequence[tuple[Any, ...]], then: str = "") -> None:
    """Write rows, in the order of the columns (their names, with commas). `then`: what else the statement says, as what
    is done with a row that is there."""
    start = 0
    for size in TOGETHER:
        while len(rows) - start >= size:
            values = tuple(chain.from_iterable(rows[start : start + size]))
            connection.exec_driver_sql(_statement(table, columns, size, then), values)
            start += size
    if start < len(rows):
        connection.exec_driver_sql(_statement(table, columns, 1, then), list(rows[start:]))


@cache
def _statement(table: str, columns: str, rows: int, then: str) -> str:
    names = columns.split(", ")
    into = ", ".join(f'"{name}"' for name in names)
    row = f"({', '.join('?' for _ in names)})"
    return f'INSERT INTO "{table}" ({into}) VALUES {", ".join([row] * rows)} {then}'.rstrip()


def add(connection: Connection, table: str, keys: str, sums: str, more: Mapping[Key, Sequence[int]]) -> None:
    """There is so much more of the sums of these keys; less, if it is below 0. A row goes when its first sum is 0."""
    rows = [(*key, *counts) for key, counts in more.items() if any(counts)]
    insert(connection, table, f"{keys}, {sums}", rows, _added(keys, sums))
    empty = [key for key, counts in more.items() if counts[0] < 0]
    if empty:
        connection.exec_driver_sql(_forget(table, keys, sums), empty)


@cache
def _added(keys: str, sums: str) -> str:
    on = ", ".join(f'"{name}"' for name in keys.split(", "))
    return f"ON CONFLICT ({on}) DO UPDATE SET " + ", ".join(
        f'"{name}" = "{name}" + excluded."{name}"' for name in sums.split(", ")
    )


@cache
def _forget(table: str, keys: str, sums: str) -> str:
    here = " AND ".join(f'"{name}" = ?' for name in keys.split(", "))
    return f'DELETE FROM "{table}" WHERE {here} AND "{sums.split(", ", 1)[0]}" = 0'
