"""What happened, in order: who changed what (the audit log), and what machines and the controller noticed.

    changed     somebody changed objects: in the transaction that did it
    restored    the store is another one than before;  confirmed: agents may remove what it does not know
    realised    every machine has realised a revision
    problem     something is in a machine's way;  solved: it no longer is
    repaired    a machine's agent found something missing or changed under its hands, and put it right
    moved       a port has arrived on another machine;  move_failed: it stays where it was
    drops       a machine drops many packets for one reason
    started     an agent began to run;  silent: it says nothing;  back: it speaks again

The two parts are bounded each for itself, so that a machine in trouble cannot push the audit log out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, Insert, Select, delete, func, insert, select

from nestnet.store import tables
from nestnet.store.plan import Change

KEPT_AUDIT, KEPT_EVENTS = 100_000, 10_000  # Events of the audit log, and all others.
TOLD = 50  # Changes that one event lists; it counts all of them.
TEXT = 500  # Characters of a text that an agent sends.
LOOKED_AT = 200  # Events that are searched for what changed an object.
MACHINE_KINDS = ("repaired", "drops", "started")  # What an agent may say happened.

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Happened:
    """One event that is to be written."""

    kind: str
    text: str
    machine: str = ""
    revision: int = 0


def changed(connection: Connection, who: str, verb: str, revision: int, changes: Sequence[Change]) -> None:
    """Somebody changed objects."""
    all_changed(connection, verb, revision, [(who, changes)])


def all_changed(
    connection: Connection, verb: str, revision: int, changes: Iterable[tuple[str, Sequence[Change]]]
) -> None:
    """The same of several who changed something at once: who, and what."""
    rows = [_changed(who, verb, revision, each) for who, each in changes]
    last = newest(connection)
    connection.execute(_insert(), rows)
    if last // 100 != (last + len(rows)) // 100:
        _bound(connection)


def audited(connection: Connection, who: str, kind: str, revision: int, text: str) -> None:
    """Somebody did something to the store that is no change of an object."""
    _write(connection, True, kind, revision, who, "", text, {})


def happened(connection: Connection, events: Sequence[Happened]) -> None:
    """Machines or the controller noticed something."""
    for one in events:
        _write(connection, False, one.kind, one.revision, "", one.machine, one.text[:TEXT], {})


def _changed(who: str, verb: str, revision: int, changes: Sequence[Change]) -> dict[str, Any]:
    listed = [
        {"op": c.op, "kind": c.kind, "path": c.path, **({"fields": _short(c.fields)} if c.op == "~" else {})}
        for c in changes[:TOLD]
    ]
    data = {"verb": verb, "count": len(changes), "changes": listed}
    return _row(True, "changed", revision, who, "", f"{verb}: {_words(changes)}", data)


def _row(audit: bool, kind: str, revision: int, who: str, machine: str, text: str, data: Any) -> dict[str, Any]:
    values = {"audit": audit, "kind": kind, "revision": revision, "who": who, "machine": machine, "text": text}
    return {"at": time.time(), "data": json.dumps(data), **values}


def _write(
    connection: Connection, audit: bool, kind: str, revision: int, who: str, machine: str, text: str, data: Any
) -> None:
    done = connection.execute(insert(tables.event).values(_row(audit, kind, revision, who, machine, text, data)))
    seq = int(done.inserted_primary_key[0])  # type: ignore[index]
    if seq % 100 == 0:
        _bound(connection)


def _bound(connection: Connection) -> None:
    e = tables.event
    for each, kept in ((True, KEPT_AUDIT), (False, KEPT_EVENTS)):
        last = select(e.c.seq).where(e.c.audit == each).order_by(e.c.seq.desc()).offset(kept).limit(1)
        connection.execute(delete(e).where(e.c.audit == each, e.c.seq <= last.scalar_subquery()))


def newest(connection: Connection) -> int:
    """The number of the last event; 0 if there is none."""
    return int(connection.scalar(_newest()) or 0)


@cache
def _newest() -> Select[Any]:
    return select(func.max(tables.event.c.seq))


@cache
def _insert() -> Insert:
    return insert(tables.event)


def after(connection: Connection, seq: int, limit: int) -> list[tuple[int, Event]]:
    """Up to `limit` events after one, with their numbers, oldest first."""
    e = tables.event
    return [
        (row.seq, _event(row))
        for row in connection.execute(select(e).where(e.c.seq > seq).order_by(e.c.seq).limit(limit))
    ]


def before_last(connection: Connection, count: int) -> int:
    """The number after which there are `count` events, or as many as there are."""
    e = tables.event.c
    seq = connection.scalar(select(e.seq).order_by(e.seq.desc()).offset(count).limit(1))
    return int(seq or 0)


def what_changed(
    connection: Connection, kind: str, path: str, since: int, known: Collection[str] | None = None
) -> list[str]:
    """Who changed an object after a revision, newest first: as far as the audit log lists it. Whoever is not in
    `known`, None: all are, is somebody; and of a network they learn what is in it, not what it carries, and no revision
    of the store."""
    e = tables.event
    query = select(e).where(e.c.audit, e.c.revision > since).order_by(e.c.revision.desc()).limit(LOOKED_AT)
    found = []
    for row in connection.execute(query):
        for change in json.loads(row.data).get("changes", ()):
            inside = kind == "network" and str(change["path"]).startswith(f"{path}/")
            if inside and known is not None:
                name = str(change["path"]).removeprefix(f"{path}/").split(" ")[0]
                inside = change["kind"] != "network" and "/" not in name
            if inside or (change["kind"], change["path"]) == (kind, path):
                fields = ", ".join(
                    f"{name} {_plain(old)} became {_plain(new)}"
                    for name, (old, new) in change.get("fields", {}).items()
                    if known is None or name != "carriage"
                )
                what = {"+": "made", "-": "deleted", "~": fields or "changed"}[change["op"]]
                who = row.who if row.who and (known is None or row.who in known) else "somebody"
                when = f"revision {row.revision} " if known is None else ""
                found.append(f"{when}by {who}: {change['kind']} {change['path']}: {what}")
    return found[:TOLD]


def _event(row: Any) -> Event:
    event: Event = {
        "at": row.at,
        "kind": row.kind,
        "text": row.text,
        "who": row.who or None,
        "machine": row.machine or None,
        "revision": row.revision or None,
    }
    data = json.loads(row.data)
    return {**event, "count": data.get("count"), "changes": data.get("changes", [])}


def _words(changes: Sequence[Change]) -> str:
    """1 made, 2 changed: port acme/web1, ..."""
    counts = {
        word: sum(c.op == op for c in changes) for op, word in (("+", "made"), ("~", "changed"), ("-", "deleted"))
    }
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    names = ", ".join(f"{c.kind} {c.path}" for c in changes[:3])
    return f"{told}: {names}{', ...' if len(changes) > 3 else ''}"


def _short(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Old and new values, but of long ones only the beginning: the log is bounded."""

    def short(value: Any) -> Any:
        text = json.dumps(value)
        return value if len(text) <= 200 else f"{text[:200]}..."

    return {name: [short(old), short(new)] for name, (old, new) in fields.items()}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
