"""The `nestnet controller` process: the API of one store, on a unix socket and over TLS.

    nestnet controller --state /var/lib/nestnet --listen unix:/run/nestnet/controller.sock --listen https://[::]:7443

Who asks is judged by api/access.py: at the socket by the user at its other end, over TLS by a token or a machine's
certificate. Without TLS only the loopback is listened on: a token must not be read on its way.
"""

from __future__ import annotations

import asyncio
import fcntl
import grp
import logging
import os
import select
import signal
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import TextIO
from urllib.parse import urlsplit

import uvicorn

from nestnet.api.app import create_app
from nestnet.api.asked import Peered
from nestnet.api.authority import LIFE, Authority, make_authority
from nestnet.model.errors import Conflict, Invalid, Problem
from nestnet.store.store import Store

LINE = 2000  # Characters of one entry of the log: so much is taken at once, or not at all (PIPE_BUF).
GRACE = 5  # Seconds that requests get to finish after SIGTERM.
SWITCH = 0.0005  # Seconds after which a thread that makes many networks lets one that reads go on.
GONE = 20  # Seconds after which a peer that acknowledges nothing is gone.

log = logging.getLogger("nestnet.api")


def serve(
    db: Path,
    listen: str | Sequence[str],
    group: str | None = None,
    names: Sequence[str] = (),
    life: float = LIFE,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Run until SIGTERM or SIGINT. `listen` is one or several of unix:PATH, https://ADDRESS:PORT, http://127.0.0.1:PORT
    and https+unix:PATH, which is TLS for relays on this computer.

    group  whose members are let in by the socket, to read
    names  what the controller is called beside its addresses, for who looks at its certificate
    life   seconds that certificates count
    ready  called when it answers

    Raises Conflict if another controller has the database or a socket, Invalid for another `listen` or `group`.
    """
    _log_plainly()
    sys.setswitchinterval(SWITCH)
    # uvicorn raises the signal again when it has shut down: then the rest is to be cleaned up too.
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, _exit)
    wanted = [listen] if isinstance(listen, str) else listen
    with _alone(db), _listening(wanted, _gid(group)) as listeners:
        store = Store(db)
        try:
            authority = Authority(*store.authority(make_authority), life)
            app = create_app(store, authority)
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
            log.info("listening on=%s db=%s revision=%d", ",".join(wanted), db, store.revision)
            plain = [listener for url, listener in listeners if not url.startswith("https")]
            secure = [listener for url, listener in listeners if url.startswith("https")]
            tls = Certified(authority, names) if secure else None
            _Server(config, secure, tls, ready).run(sockets=plain)
        finally:
            store.close()
            log.info("stopped")


class _Server(uvicorn.Server):
    """Serves over TLS too, and ends the feeds, which would never end by themselves, when it is told to stop."""

    def __init__(
        self, config: uvicorn.Config, secure: Sequence[socket.socket], tls: Certified | None, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._secure, self._tls, self._ready = secure, tls, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            return Peered(self.config, self.server_state, self.lifespan.state)

        if self._tls is not None:
            for listener in self._secure:
                made = await loop.create_server(protocol, sock=listener, ssl=self._tls.context, backlog=2048)
                self.servers.append(made)
            self._renewing = asyncio.create_task(self._tls.stay_certified())
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        log.info("stopping signal=%s", signal.Signals(sig).name)
        super().handle_exit(sig, frame)
        bell = getattr(self.config.app.state, "bell", None)  # type: ignore[union-attr]
        if bell is not None:
            bell.close()
            self.config.app.state.events.close()  # type: ignore[union-attr]


class Certified:
    """The controller's end of TLS: its own certificate, a new one before that runs out, and machines' judged."""

    def __init__(self, authority: Authority, names: Sequence[str]) -> None:
        self._authority, self._names = authority, [*dict.fromkeys([*names, socket.gethostname(), "localhost"])]
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.load_verify_locations(cadata=authority.certificate.decode())
        self.context.verify_mode = ssl.CERT_OPTIONAL  # People have tokens.
        self.renew()

    def renew(self) -> None:
        """Take a new certificate, for connections that are made from now on."""
        key, certificate = self._authority.sign_controller(self._names)
        with tempfile.TemporaryDirectory() as folder:  # OpenSSL reads them from a file; the folder is ours alone.
            file = Path(folder) / "both.pem"
            file.touch(0o600)
            file.write_bytes(key + certificate + self._authority.certificate)
            self.context.load_cert_chain(file)

    async def stay_certified(self) -> None:
        """Take a new one when two thirds of the time are over, again and again."""
        while True:
            await asyncio.sleep(self._authority.life * 2 / 3)
            self.renew()


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
def _listening(urls: Sequence[str], group: int | None) -> Iterator[list[tuple[str, socket.socket]]]:
    """A socket for each URL. Those in the file system go when they are closed."""
    with ExitStack() as stack:
        found = []
        for url in urls:
            if url.startswith(("unix:", "https+unix:")):
                path = Path(url.partition(":")[2])
                listener = _unix(path, group if url.startswith("unix:") else None)
                stack.callback(path.unlink, missing_ok=True)
            else:
                listener = _tcp(url)
            found.append((url, stack.enter_context(listener)))
        yield found


def _gid(group: str | None) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid if group is not None else None
    except KeyError:
        message = f"there is no group {group}: `groupadd --system {group}` makes it"
        raise Invalid([Problem("bad_value", "/group", message)]) from None


def _unix(path: Path, group: int | None) -> socket.socket:
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
    if group is not None:
        os.chown(path, -1, group)
        path.chmod(0o660)
    listener.listen(2048)
    return listener


def _tcp(listen: str) -> socket.socket:
    url = urlsplit(listen)
    try:
        address, port = ip_address(url.hostname or ""), url.port
    except ValueError:
        address, port = None, None
    if address is None or port is None or url.scheme not in ("http", "https"):
        ways = "unix:/PATH, https://ADDRESS:PORT, http://127.0.0.1:PORT or https+unix:/PATH"
        message = f"cannot listen on {listen}: write {ways}"
        raise Invalid([Problem("bad_value", "/listen", message)])
    if url.scheme == "http" and not address.is_loopback:
        message = f"cannot listen on {listen}: tokens would be read on their way; write https://{url.netloc}"
        raise Invalid([Problem("bad_value", "/listen", message)])
    listener = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if address.version == 6:  # [::] is IPv4, too
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    # Connections inherit these: a machine that lost its power is known to be gone after so many seconds.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 2)):
        listener.setsockopt(socket.IPPROTO_TCP, option, seconds)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE * 1000)
    try:
        listener.bind((str(address), port))
    except OSError as error:
        listener.close()
        raise Conflict(f"cannot listen on {listen}: {error.strerror}", "address_in_use") from None
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
