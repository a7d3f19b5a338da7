"""The `nestnet controller` process: the API of one store on a unix socket, or on a loopback TCP port.

    nestnet controller --db /var/lib/nestnet/store.db --listen unix:/run/nestnet/api.sock

The socket is mode 0600: who may open it may do everything. Over TCP there is nothing yet that asks
who somebody is, so only loopback is listened on.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import TextIO
from urllib.parse import urlsplit

import uvicorn

from nestnet.api.app import create_app
from nestnet.api.asked import Peered
from nestnet.model.errors import Conflict, Invalid, Problem
from nestnet.store.store import Store

LINE = 2000  # Characters of one entry of the log: so much is taken at once, or not at all (PIPE_BUF).
GRACE = 5  # Seconds that requests get to finish after SIGTERM.

log = logging.getLogger("nestnet.api")


def serve(db: Path, listen: str) -> None:
    """Run until SIGTERM or SIGINT. `listen` is unix:PATH or http://127.0.0.1:PORT.

    Raises Conflict if another controller has the database or the socket, Invalid for another `listen`.
    """
    _log_plainly()
    # uvicorn raises the signal again when it has shut down: then the rest is to be cleaned up too.
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, _exit)
    with _alone(db), _listening(listen) as listener:
        store = Store(db)
        try:
            app = create_app(store)
            config = uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE,
                timeout_keep_alive=75,
                lifespan="on",
                http=Peered,
                ws="none",
            )
            log.info("listening on=%s db=%s revision=%d", listen, db, store.revision)
            _Server(config).run(sockets=[listener])
        finally:
            store.close()
            log.info("stopped")


class _Server(uvicorn.Server):
    """Ends the feeds, which would never end by themselves, when it is told to stop."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        log.info("stopping signal=%s", signal.Signals(sig).name)
        super().handle_exit(sig, frame)
        bell = getattr(self.config.app.state, "bell", None)  # type: ignore[union-attr]
        if bell is not None:
            bell.close()
            self.config.app.state.events.close()  # type: ignore[union-attr]


def _exit(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


@contextmanager
def _alone(db: Path) -> Iterator[None]:
    """Two controllers of one SQLite file would not hear each other's doorbells."""
    db.parent.mkdir(parents=True, exist_ok=True)
    lock = db.with_name(db.name + ".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another controller runs on {db}: stop it first", "already_running") from None
        yield


@contextmanager
def _listening(listen: str) -> Iterator[socket.socket]:
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        listener = _unix(path)
    else:
        listener = _loopback(listen)
    with listener:
        try:
            yield listener
        finally:
            if listen.startswith("unix:"):
                path.unlink(missing_ok=True)


def _unix(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink()  # Its process was killed.
            else:
                raise Conflict(f"another process listens on {path}: stop it first", "already_running")
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(2048)
    return listener


def _loopback(listen: str) -> socket.socket:
    url = urlsplit(listen)
    try:
        address, port = ip_address(url.hostname or ""), url.port
    except ValueError:
        address, port = None, None
    if url.scheme != "http" or address is None or port is None or not address.is_loopback:
        message = f"cannot listen on {listen}: write unix:/PATH or http://127.0.0.1:PORT"
        raise Invalid([Problem("bad_value", "/listen", message)])
    listener = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((str(address), port))
    listener.listen(2048)
    return listener


class _Lossy(logging.StreamHandler[TextIO]):
    """Leaves out what nobody takes, and counts it: who asks must not wait for whoever reads the log."""

    lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if not select.select([], [self.stream], [], 0)[1]:
            self.lost += 1
            return
        if self.lost:
            lost, self.lost = self.lost, 0
            self.stream.write(f"{lost} lines are missing here: nobody took them\n")
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record)[:LINE]


def _log_plainly() -> None:
    """One line an event on stderr: time, level, what, key=value."""
    handler = _Lossy(sys.stderr)
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
