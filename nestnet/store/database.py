"""SQLite, opened so that an acknowledged write is on the disk and a reader never waits for a writer.

WAL with synchronous=FULL: a commit survives a power cut (with NORMAL the last ones may not).
Writers begin with BEGIN IMMEDIATE, one at a time; a reader sees one state for its whole transaction. What waits
for the writer is committed together, with a savepoint each: a commit costs a flush of the disk, however much is in it.
"""

from __future__ import annotations

import errno
import logging
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, event, insert, select
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from nestnet.model.errors import DiskFull, Unreachable
from nestnet.store import numbers, tables

BUSY_SECONDS = 30  # How long a writer waits for another process before it gives up.
TOGETHER, TOGETHER_SECONDS = 100, 0.1  # A commit takes no more turns after so many, or when they took so long.

# Pages that many transactions write are written into the file once: it takes them when the log has 256 MB.
PRAGMAS = (
    *("journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 64000"),
    *("foreign_keys = ON", "cache_size = -65536"),
)

FULL = (errno.ENOSPC, errno.EDQUOT)
FAILING = (errno.EIO, errno.EROFS)
SQLITE_FAILING = (
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_CORRUPT,  # It also says so of what it could not read.
    sqlite3.SQLITE_NOTADB,
)

WRITING = "BEGIN IMMEDIATE"

log = logging.getLogger("nestnet.store")
T = TypeVar("T")


@contextmanager
def explained() -> Iterator[None]:
    """What the disk refuses is told as what it is: DiskFull, or Unreachable, as it may go well the next time.

    After either, what was to be written is there wholly or not at all: whoever asks again, with the same idempotency
    key, finds out."""
    try:
        yield
    except (DBAPIError, sqlite3.Error, OSError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        code, number = getattr(cause, "sqlite_errorcode", 0) & 0xFF, getattr(cause, "errno", None)
        if code == sqlite3.SQLITE_FULL or number in FULL:
            told: Exception = DiskFull("the controller's disk is full: make room there, and ask again")
        elif code in SQLITE_FAILING or number in FAILING:
            what_to_do = "ask again; should it stay so, restore a backup"
            told = Unreachable(f"the controller's disk does not do what it should: {cause}; {what_to_do}")
        else:
            raise
        log.error("disk error=%r", str(cause))
        raise told from error


@dataclass
class _Turn(Generic[T]):
    """What one thread wants written, and what came of it. Whoever does it, does it in that thread's context."""

    work: Callable[[Connection], T]
    context: Context = field(default_factory=copy_context)
    done: bool = False
    result: list[T] = field(default_factory=list)
    error: BaseException | None = None

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        return self.result[0]


class Database:
    """An SQLite file with the tables of this version. Threads may share it."""

    @explained()
    def __init__(self, path: Path, vnis: int, vlans: int) -> None:
        self.path = path
        path.touch(0o600)  # It has keys. What SQLite puts beside it is as private.
        path.chmod(0o600)
        self.engine = open_engine(path)
        self._writer = threading.Lock()
        self._writing: Connection | None = None
        self._waiting: deque[_Turn[Any]] = deque()
        self.commits = self.turns = 0
        migrate(self.engine)
        with self.write() as connection:
            if connection.execute(select(tables.store)).first() is None:
                _first_rows(connection, vnis, vlans)
        self._know()

    def _know(self) -> None:
        with self.read() as connection:
            self.epoch, self.key = connection.execute(select(tables.store.c.epoch, tables.store.c.key)).one()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state."""
        with explained(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write: committed when the block ends, undone when it raises."""
        with self._writer, self._begun() as connection:
            yield connection

    def transact(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, when what it wrote is committed; what it raises, when that is undone.

        It may share its commit with others' work, and may be called again when one of theirs breaks the commit.
        """
        turn = _Turn(work)
        self._waiting.append(turn)
        with self._writer:
            # Whoever comes first writes for all who wait; the others find it done.
            while not turn.done:
                self._commit_together()
        with explained():
            return turn.outcome()

    def _commit_together(self) -> None:
        turns = [self._waiting.popleft() for _ in range(min(len(self._waiting), TOGETHER))]
        if len(turns) == 1:
            turns[0].error = self._alone(turns[0])
        else:
            turns = self._share(turns)
        self.commits, self.turns = self.commits + 1, self.turns + len(turns)
        for turn in turns:
            turn.done = True

    def _share(self, turns: list[_Turn[Any]]) -> list[_Turn[Any]]:
        """Commit them together. Returns those that were taken: the others wait again, first in line."""
        begun, taken = time.monotonic(), 0
        try:
            with self._begun() as connection:
                while taken < len(turns) and time.monotonic() - begun < TOGETHER_SECONDS:
                    self._attempt(connection, turns[taken])
                    taken += 1
        except (IntegrityError, OperationalError):
            # Foreign keys are judged at COMMIT, and a full disk ends the transaction. Whose it is, is found out one
            # by one.
            for turn in turns[:taken]:
                turn.result.clear()
                turn.error = self._alone(turn)
        except BaseException as error:
            for turn in turns[:taken]:
                turn.error = error
        self._waiting.extendleft(reversed(turns[taken:]))
        return turns[:taken]

    def _alone(self, turn: _Turn[Any]) -> BaseException | None:
        try:
            with self._begun() as connection:
                turn.result.append(turn.context.run(turn.work, connection))
        except Exception as error:
            turn.result.clear()
            return error
        return None

    @staticmethod
    def _attempt(connection: Connection, turn: _Turn[Any]) -> None:
        try:
            with connection.begin_nested():
                turn.result.append(turn.context.run(turn.work, connection))
        except Exception as error:
            turn.result.clear()
            turn.error = error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody writes meanwhile."""
        with self._writer:
            yield

    @explained()
    def become(self, file: Path) -> None:
        """Take over everything that another file has, in one transaction. Called by who is `alone`."""
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(self.path)) as target:
            target.execute("PRAGMA synchronous = FULL")
            source.backup(target)
        self._know()

    @contextmanager
    def _begun(self) -> Iterator[Connection]:
        # All writing is done by one connection: it knows the pages that it has written, any other would read them.
        connection = self._writing or self.engine.connect().execution_options(begin=WRITING)
        self._writing = None
        try:
            with connection.begin():
                yield connection
        except DBAPIError:
            connection.close()  # whatever state it is in
            raise
        except BaseException:
            self._writing = connection
            raise
        self._writing = connection

    def close(self) -> None:
        if self._writing is not None:
            self._writing.close()
        self.engine.dispose()


def may_write(connection: Connection) -> bool:
    """Is this a transaction that may write? What such a one reads, nobody may ever have stored."""
    return connection.get_execution_options().get("begin") == WRITING


def migrate(engine: Engine) -> None:
    """Bring the tables to this version. A newer database than this program raises alembic's CommandError."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def open_engine(path: Path) -> Engine:
    """An engine whose connections are as this module says."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS}, pool_size=8, max_overflow=32)

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # The driver must not begin transactions: on_begin does.
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def _first_rows(connection: Connection, vnis: int, vlans: int) -> None:
    """A new store: its epoch and key, revision 0, the fabric, and the fabric's free VNIs."""
    own = {"epoch": secrets.token_hex(8), "key": secrets.token_bytes(32), "vnis": vnis, "vlans": vlans}
    connection.execute(insert(tables.store).values(id=1, **own))
    connection.execute(insert(tables.revision).values(id=1, n=0, oldest=0))
    connection.execute(
        insert(tables.network).values(
            id=0, carrier=0, name="", underlay=4, mtu=1500, enabled=True, labels="{}", description="", revision=0
        )
    )
    numbers.open_domain(connection, 0, vnis)
