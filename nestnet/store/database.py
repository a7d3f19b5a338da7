"""SQLite, opened so that an acknowledged write is on the disk and a reader never waits for a writer.

WAL with synchronous=FULL: a commit survives a power cut (with NORMAL the last ones may not).
Writers begin with BEGIN IMMEDIATE, one at a time; a reader sees one state for its whole transaction.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, event, insert, select
from sqlalchemy.engine import Engine

from nestnet.store import numbers, tables

BUSY_SECONDS = 30  # How long a writer waits for another process before it gives up.


class Database:
    """An SQLite file with the tables of this version. Threads may share it."""

    def __init__(self, path: Path, vnis: int) -> None:
        self.engine = _engine(path)
        self._writer = threading.Lock()
        migrate(self.engine)
        with self.write() as connection:
            if connection.execute(select(tables.store)).first() is None:
                _first_rows(connection, vnis)
            self.epoch, self.key = connection.execute(select(tables.store.c.epoch, tables.store.c.key)).one()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write: committed when the block ends, undone when it raises."""
        with self._writer, self.engine.connect() as plain:
            connection = plain.execution_options(begin="BEGIN IMMEDIATE")
            with connection.begin():
                yield connection

    def close(self) -> None:
        self.engine.dispose()


def migrate(engine: Engine) -> None:
    """Bring the tables to this version. A newer database than this program raises alembic's CommandError."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS}, pool_size=8, max_overflow=32)

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # The driver must not begin transactions: on_begin does.
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "cache_size = -65536"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def _first_rows(connection: Connection, vnis: int) -> None:
    """A new store: its epoch and key, revision 0, the fabric, and the fabric's free VNIs."""
    connection.execute(insert(tables.store).values(id=1, epoch=secrets.token_hex(8), key=secrets.token_bytes(32)))
    connection.execute(insert(tables.revision).values(id=1, n=0, oldest=0))
    connection.execute(
        insert(tables.network).values(
            id=0, carrier=0, name="", underlay=4, mtu=1500, enabled=True, labels="{}", description="", revision=0
        )
    )
    numbers.open_domain(connection, 0, vnis)
