"""A copy of the store in one file, and the way back.

A backup is an SQLite file that VACUUM INTO wrote: one moment, whole, without what was deleted. It has the store's key.

A restore goes back in time, and machines do not: they hold what was made since the backup. So the restored store

    has a new epoch           tokens and ETags of the one before mean nothing; agents notice
    counts on, far ahead      revisions and row ids that the lost store gave out are not given out again
    holds VNIs back           those that it may have given out since wait until every machine has realised the restore

It is written into the open database by SQLite's own backup, in one transaction: a crash leaves either store, whole.
"""

from __future__ import annotations

import secrets
import sqlite3
from contextlib import closing
from pathlib import Path

from alembic.util.exc import CommandError
from sqlalchemy import Connection, delete, select, update

from nestnet.model.errors import Invalid, Problem
from nestnet.store import events, numbers, tables
from nestnet.store.database import Database, explained, migrate, open_engine
from nestnet.store.objects import chunks

AHEAD = 1_000_000  # Revisions and rows of a kind that may have been made since the backup.
HELD_BACK = 1 << 16  # VNIs that may have been, lowest first, as they are given out.


@explained()
def write(database: Database, to: Path) -> None:
    """Write a copy of what is committed now."""
    with closing(sqlite3.connect(database.path)) as source:
        source.execute("VACUUM INTO ?", (str(to),))
    to.chmod(0o600)


@explained()
def restore(database: Database, file: Path, confirmed: bool, who: str) -> int:
    """Become what `file` has. The file is changed. Returns the revision. Raises Invalid if it is no store's copy."""
    _judge(file)
    engine = open_engine(file)
    try:
        try:
            migrate(engine)
        except CommandError:
            raise _invalid("it was made by a newer version of nestnet: restore it with that one") from None
        with database.alone():  # Nothing may be acknowledged any more that the copy does not have.
            aside = database.path.with_name(f"{database.path.name}.before-restore")
            before = file.with_name("before")
            write(database, before)
            before.replace(aside)  # Whole, or not there yet.
            with database.read() as live, engine.connect() as copy, copy.begin():
                n = _renew(copy, live, confirmed, who)
            engine.dispose()
            database.become(file)
    finally:
        engine.dispose()
    return n


def _renew(copy: Connection, live: Connection, confirmed: bool, who: str) -> int:
    """Make the copy a store of its own, ahead of everything that machines may have heard."""
    r, c = tables.revision.c, tables.counter.c
    was = int(copy.execute(select(r.n)).scalar_one())
    n = max(was, int(live.execute(select(r.n)).scalar_one())) + AHEAD
    copy.execute(update(tables.store).values(epoch=secrets.token_hex(8), confirmed=confirmed))
    copy.execute(update(tables.revision).values(n=n, oldest=n))
    copy.execute(delete(tables.change))
    given = {row.kind: row.last for row in live.execute(select(tables.counter))}
    for row in copy.execute(select(tables.counter)).all():
        last = max(row.last, given.get(row.kind, 0)) + AHEAD
        copy.execute(update(tables.counter).where(c.kind == row.kind).values(last=last))
    if copy.scalar(select(tables.store.c.key)) == live.scalar(select(tables.store.c.key)):
        _keep_out(copy, live)
    copy.execute(delete(tables.join_token))
    numbers.hold_back(copy, HELD_BACK, n)
    events.audited(copy, who, "restored", n, f"restored from a backup made at revision {was}")
    return n


def _keep_out(copy: Connection, live: Connection) -> None:
    """Whoever was kept out since the backup stays out: a restore gives nobody back what was taken from them."""
    t, m, n = tables.token, tables.machine, tables.tenant
    copy.execute(delete(t).where(t.c.digest.not_in(live.scalars(select(t.c.digest)).all())))
    for row in live.execute(select(m.c.id, m.c.joins, m.c.fenced)):
        copy.execute(update(m).where(m.c.id == row.id).values(joins=row.joins, fenced=row.fenced))
    closed = live.scalars(select(n.c.id).where(n.c.suspended)).all()
    for chunk in chunks(closed):
        copy.execute(update(n).where(n.c.id.in_(chunk)).values(suspended=True))


def _judge(file: Path) -> None:
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=rw", uri=True)) as copy:
            if copy.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                raise _invalid("it is damaged: take an older one")
            copy.execute("SELECT epoch, key FROM store").fetchone()[0]
    except sqlite3.Error as error:
        # That it is no database, or one of something else, is the file's fault; all else the disk's.
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):
            raise _invalid("it is not what `nestnet backup` writes") from None
        with explained():
            raise
    except TypeError:
        raise _invalid("it is not what `nestnet backup` writes") from None


def _invalid(why: str) -> Invalid:
    return Invalid([Problem("bad_value", "", f"this file cannot be restored: {why}")])
