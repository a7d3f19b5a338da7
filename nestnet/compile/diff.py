"""What to change: `diff(have, want)` is a list of actions, in an order that never misdirects a packet.

An action is a value: it can be printed, counted, tested and sent. The order (DESIGN, rule 18):

    1. add what nothing points to yet: machines, hosts, rules under their new version, lists
    2. rows that point to it, networks and segments last: one row switches a network's rules
    3. where frames come in, last of all: closed until everything behind it is there
    4. remove in reverse: where frames come in first
    5. counters of everything touched, then the epoch: a flow built across the change is born stale
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nestnet.compile.tables import OWNER_PORT, OWNER_ROUTER, PORT, TABLES, Rows, Tables, ordered


@dataclass(frozen=True, eq=False)
class Put:
    """Write these rows (fields `key` and `value`) whether or not their keys are there."""

    table: str
    rows: Rows


@dataclass(frozen=True, eq=False)
class Delete:
    """Remove these keys; in an array, write zeros at these slots. A key that is gone is no error."""

    table: str
    keys: npt.NDArray[np.void] | npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Bump:
    """Add one to these slots of a generation counter (rule 16)."""

    counter: str
    slots: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Epoch:
    """Add one to the epoch: every flow compares its counters before its next packet."""


Action = Put | Delete | Bump | Epoch

# Adding: what nothing points to yet comes first, where frames come in comes last. Removing goes the other way.
# A network's row switches its rules, a segment's its lists, so both stand behind what they switch to.
ORDER = (
    "machine", "host", "bucket", "rule", "cidr", "service", "peer", "flood", "local", "hop", "face", "router", "port",
    "segment", "network", "owner", "mac", "route", "self", "vni", "vlan", "attach", "member",
)  # fmt: skip


def diff(have: Tables, want: Tables) -> list[Action]:
    """The actions that turn `have` into `want`; none if they are equal. Both in any order of rows."""
    puts: list[Action] = []
    deletes: list[Action] = []
    touched: dict[str, Rows] = {}
    for name in ORDER:
        old, new = have[name], want[name]
        if _same(old, new):  # the rule when little has changed, and what follows is sorting
            touched[name] = old[:0]
            continue
        add = new[~np.isin(_bytes(new), _bytes(old))]
        gone = old[~np.isin(_bytes(old["key"]), _bytes(new["key"]))]
        if len(add):
            puts.append(Put(name, add))
        if len(gone):
            deletes.append(Delete(name, gone["key"].copy()))
        # A row that changed counts as it was and as it is: both may name a slot whose flows must look again.
        before = old[np.isin(_bytes(old["key"]), _bytes(add["key"]))]
        touched[name] = np.concatenate([add, gone, before])
    actions = puts + deletes[::-1]
    if actions:
        actions += [Bump(counter, slots) for counter, slots in _counters(touched, have, want) if len(slots)]
        actions.append(Epoch())
    return actions


def applied(have: Tables, actions: Iterable[Action]) -> Tables:
    """The tables when these actions are done, those that they change in canonical order."""
    tables = dict(have)
    for action in actions:
        if isinstance(action, Put | Delete):
            keys = action.rows["key"] if isinstance(action, Put) else action.keys
            rows = tables[action.table]
            kept = rows[~np.isin(_bytes(rows["key"]), _bytes(keys))]
            tables[action.table] = np.concatenate([kept, action.rows]) if isinstance(action, Put) else kept
    return {name: rows if rows is have[name] else ordered(TABLES[name], rows) for name, rows in tables.items()}


def _counters(touched: Tables, have: Tables, want: Tables) -> list[tuple[str, npt.NDArray[np.uint32]]]:
    """Which counters these rows are built into (rule 16)."""
    value = {name: rows["value"] for name, rows in touched.items()}
    key = {name: rows["key"] for name, rows in touched.items()}
    owner, mac, host = value["owner"], value["mac"], value["host"]
    routers = np.concatenate(
        [
            key["router"],
            key["route"]["router"],
            key["hop"]["router"],
            owner["slot"][owner["kind"] == OWNER_ROUTER],
            mac["slot"][mac["kind"] == OWNER_ROUTER],
        ]
    )
    ports = [
        key["port"],
        key["peer"]["port"],
        value["attach"]["port"],
        host["port"][host["kind"] == PORT],  # where it lives itself: its own flows begin below its row
        owner["slot"][owner["kind"] == OWNER_PORT],
        mac["slot"][mac["kind"] == OWNER_PORT],
    ]
    routes = [value["segment"]["network"]]
    for tables in (have, want):
        rows = tables["router"]
        routes.append(rows["value"]["network"][np.isin(rows["key"], routers)])
    return [
        ("port", _slots(ports)),
        ("policy", _slots([key["network"]])),
        ("route", _slots(routes)),
        ("flood", _slots([key["segment"]])),
        ("host", _slots([key["host"]])),
        ("machine", _slots([key["machine"], value["member"]["machine"], value["self"]["machine"]])),
    ]


def _same(old: Rows, new: Rows) -> bool:
    """Are these rows the same, in the same order?"""
    return len(old) == len(new) and np.array_equal(_bytes(old), _bytes(new))


def _slots(parts: list[npt.NDArray[np.uint32]]) -> npt.NDArray[np.uint32]:
    slots: npt.NDArray[np.uint32] = np.unique(np.concatenate([np.zeros(1, "u4"), *parts]))
    return slots[1:]  # slot 0 is nobody


def _bytes(rows: npt.NDArray[np.void] | npt.NDArray[np.uint32]) -> npt.NDArray[np.bytes_]:
    """Each row as bytes that compare as a whole: all have one length, so trailing zeros cannot confuse numpy."""
    return np.ascontiguousarray(rows).view(f"S{rows.dtype.itemsize}")


def show(action: Action) -> str:
    """One action in a line, for logs and plans."""
    match action:
        case Put(table, rows):
            return f"put {len(rows)} in {table}"
        case Delete(table, keys):
            return f"delete {len(keys)} from {table}"
        case Bump(counter, slots):
            return f"bump {counter} of {len(slots)}"
        case Epoch():
            return "next epoch"
