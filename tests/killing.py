"""Controllers that start in a fraction of a second, and strace, which kills them at a system call.

`Template` is a process that has imported all that a controller needs and forks children that serve: real ones, in
processes of their own, without the import. `Strace` kills one at the n-th system call that a thread of it makes. The
call is not made: what was killed is what the n-1 calls before left behind.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# What others can see of a process, or it hears of them: whatever it does between two of these goes with it.
SEEN = (
    "write,writev,pwrite64,pwritev,pwritev2,fsync,fdatasync,sync_file_range,ftruncate,truncate,fallocate,"
    "unlink,unlinkat,rename,renameat,renameat2,link,linkat,mkdir,mkdirat,rmdir,chmod,fchmod,fchmodat,fchown,"
    "open,openat,close,flock,socket,bind,listen,accept4,connect,sendto,sendmsg,recvfrom,recvmsg,shutdown"
)

FORKING = """
import asyncio, ctypes, gc, json, os, signal, sys, tempfile
from pathlib import Path
import uvicorn, uvicorn.loops.auto
from nestnet.api import server
from nestnet.store import Store

# FastAPI takes its time to make routes, and makes them when it is first asked: the children have them from here.
# What they answer from is a store that each opens for itself.
async def first(app):
    async def receive(): return {"type": "http.request", "body": b"", "more_body": False}
    async def send(message): assert message.get("status", 200) == 200, message
    async with app.router.lifespan_context(app):
        asked = {"type": "http", "method": "GET", "path": "/v1/status", "query_string": b"", "headers": []}
        asked |= {"state": {"uid": os.getuid()}, "scheme": "http", "http_version": "1.1", "root_path": ""}
        await app(asked, receive, send)

with tempfile.TemporaryDirectory() as folder:
    store = Store(Path(folder) / "store.db")
    app = server.create_app(store)
    uvicorn.Config(app, lifespan="on", ws="none").load()
    asyncio.run(first(app))
    store.close()

def opened(db):
    store.__init__(db)
    return store

server.Store, server.create_app = opened, lambda _store, _authority: app
gc.collect()
gc.freeze()
assert os.listdir("/proc/self/task") == [str(os.getpid())], "threads do not fork"

ANYBODY = 0x59616D61, -1  # PR_SET_PTRACER: strace is no ancestor
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    db, listen, log, gate = json.loads(line)
    closed = os.open(gate, os.O_RDWR) if gate else None
    if pid := os.fork():
        print(pid, flush=True)
        if closed is not None:
            os.close(closed)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(*ANYBODY)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    if closed is not None:
        os.read(closed, 1)
        os.close(closed)
    server.serve(Path(db), listen)
    os._exit(0)
"""


class Template:
    """The process that forks."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", FORKING]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, bufsize=1
        )
        assert self._hear() == "ready"

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, folder: Path, gate: Path | None = None) -> Served:
        """A controller of the store in a folder. `gate` is a FIFO: it begins when there is something in it."""
        assert self._process.stdin is not None
        where = [str(folder / "store.db"), f"unix:{folder}/api.sock", str(folder.with_suffix(".log"))]
        self._process.stdin.write(json.dumps([*where, str(gate) if gate else None]) + "\n")
        return Served(int(self._hear()))

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


class Served:
    """A controller that a template has started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle = os.pidfd_open(pid)

    def alive(self) -> bool:
        return not self.wait(0)

    def wait(self, seconds: float = 20) -> bool:
        """Has it ended, all of it, within so many seconds?"""
        return bool(select.select([self._handle], [], [], seconds)[0])

    def kill(self) -> None:
        if self.alive():
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        assert self.wait()

    def close(self) -> None:
        os.close(self._handle)

    def waited(self) -> float:
        """Seconds that it wanted a CPU which others had."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9

    def workers(self) -> set[int]:
        """The threads that do what routes say, when they have done something: one as long as one asks, but for what
        the controller does by itself every few seconds."""
        return {int(thread.name) for thread in Path(f"/proc/{self.pid}/task").iterdir()} - {self.pid}

    def worker(self) -> int:
        (found,) = self.workers()
        return found


class Strace:
    """One thread of a process, watched; with `inject` something is done to calls of it, as strace says it."""

    def __init__(self, thread: int, calls: str, inject: str | None = None) -> None:
        more = [] if inject is None else ["-e", f"inject={calls}:{inject}"]
        self._seen = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        command = ["strace", "-p", str(thread), "-s", "0", "-e", "signal=none", "-e", f"trace={calls}", *more]
        self._process = subprocess.Popen([*command, "-o", self._seen.name], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        first = self._process.stderr.readline()
        assert " attached" in first, first + self._process.stderr.read()

    def end(self) -> list[str]:
        """The names of the calls that it saw, when it is taken away or what it watched is gone."""
        self._process.terminate()
        self._process.communicate(timeout=20)
        with self._seen:
            return re.findall(r"^(\w+)\(", self._seen.read(), re.MULTILINE)


# What a store has


def copied(folder: Path, to: Path) -> Path:
    """The store of a controller that is gone, as it left it, somewhere else: to open it is to mend it."""
    to.mkdir()
    for name in ("store.db", "store.db-wal"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, to / name)
    return to / "store.db"


@contextmanager
def opened(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        yield connection


Dump = dict[str, list[tuple[Any, ...]]]


def dump(file: Path) -> Dump:
    """Every row of every table, and the tables; without times, and without what is drawn at random by whichever start
    comes first: the name of this life of the store, and its authority."""
    with opened(file) as connection:
        connection.execute("BEGIN")
        schema = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY type, name").fetchall()
        found: Dump = {"sqlite_master": schema}
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if table == "authority":
                continue
            columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
            kept = [f'"{name}"' for name in columns if (table, name) != ("store", "epoch") and name != "at"]
            rows = connection.execute(f'SELECT {", ".join(kept)} FROM "{table}"').fetchall()
            found[table] = [tuple(map(timeless, row)) for row in rows] if table in SPEAKING else rows
    return found


SPEAKING = ("event", "idempotency")  # Tables with texts that say how long something took.


def timeless(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return re.sub(r"\d+\.\d\d s|.reported.: [\d.]+", "TIME", value)


def difference(a: Dump, b: Dump) -> str:
    """What two stores do not have in common, to be read."""
    lines = []
    for table in sorted(a.keys() | b.keys()):
        left, right = a.get(table, []), b.get(table, [])
        lines += [f"- {table} {row}" for row in left if row not in right]
        lines += [f"+ {table} {row}" for row in right if row not in left]
        if sorted(map(repr, left)) != sorted(map(repr, right)) and not lines:
            lines.append(f"{table}: some row is there twice")
    return "\n".join(line[:400] for line in lines[:30])


def sound(file: Path) -> None:
    """As a file, and its references, of whatever version."""
    with opened(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def whole(file: Path) -> None:
    """What is kept twice is equal, and nothing is half."""
    sound(file)
    with opened(file) as connection:
        ask = connection.execute
        used = "SELECT network, coalesce(host_machine, host_port), count(*) FROM port GROUP BY 1, 2 ORDER BY 1, 2"
        assert ask(used).fetchall() == ask("SELECT network, host, count FROM host_use ORDER BY 1, 2").fetchall()
        # Each VNI is in one place: free, used, or held back.
        numbers = ask("SELECT lo, hi FROM vni_range").fetchall()
        for (vni,) in ask("SELECT vni FROM vni_quarantine UNION ALL SELECT vni FROM segment").fetchall():
            numbers.append((vni, vni))
        numbers.sort()
        assert numbers[0][0] == 1
        assert all(last + 1 == first for (_, last), (first, _) in pairwise(numbers)), numbers
        assert numbers[-1][1] == (1 << 24) - 1
        # No id is ahead of its counter, no change or event ahead of the revision; answers are there.
        for kind, last in ask("SELECT kind, last FROM counter").fetchall():
            assert (ask(f'SELECT max(id) FROM "{kind}"').fetchone()[0] or 0) <= last, kind
        (revision,) = ask("SELECT n FROM revision").fetchone()
        for table in ("change", "event", "network", "port", "machine"):
            assert (ask(f"SELECT max(revision) FROM {table}").fetchone()[0] or 0) <= revision, table
        assert ask("SELECT count(*) FROM idempotency WHERE answer = 'null'").fetchone() == (0,)
        # One entry of the audit log for each revision of it.
        told = ask("SELECT revision FROM event WHERE audit AND revision > 0").fetchall()
        assert len(set(told)) == len(told)


def put_back(file: Path, base: Path, deep: bool = False) -> None:
    """Make a store that is served what another one is, with an empty log of its own (`deep`: with one so long that the
    next commit writes it into the store)."""
    with opened(base) as source, opened(file) as target:
        source.backup(target)
        assert target.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        if deep:
            target.execute("PRAGMA wal_autocheckpoint = 0")
            target.execute("PRAGMA synchronous = OFF")
            for _ in range(CHECKPOINT):
                target.execute("UPDATE revision SET n = n")


CHECKPOINT = 1000  # Pages in the log after which SQLite writes them into the store.


def stop(pid: int) -> None:
    """SIGSTOP, and wait until every thread stands: the signal stops none before one of them has had a CPU to take it,
    and the others go on as long."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + 20
    while any(_state(task) not in "TtZX" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < end, f"{pid} does not stop"
        time.sleep(0.001)  # the pace of looking


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"  # it ended just now
