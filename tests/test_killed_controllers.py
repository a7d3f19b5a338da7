"""A controller is killed at every k-th system call of whatever it does, and is as it should be when it is back.

For each kind of request a store is put in place and the request made twice over: once in peace, which says how many
calls it takes and what the store is then; and once for each call at which the controller is killed, by strace, while
a client asks and, where it may, asks again. What the killed one left must be the store from before or the one from
after, and nothing between; the one from after, if it had answered. When it is back, and the client has its answer,
every row must be what it is in peace.

NESTNET_KILLS=all takes every call, thousands; a number, so many of each kind, as far as HASTE lets it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import killing
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from killing import SEEN, Dump, Served, Strace, Template, copied, difference, dump, put_back, sound, whole

from nestnet.api import client as client_module
from nestnet.api.client import PATIENCE, Client
from nestnet.model.errors import Unreachable
from nestnet.model.manifest import parse
from nestnet.store import Store, tables
from nestnet.store.database import open_engine

KILLS = os.environ.get("NESTNET_KILLS", "16")  # Points of each kind, or all.
HASTE, LEAST = 2.2, 6  # Seconds for a kind, if not all are taken, and how many are all the same.
BACK = 5.0  # Seconds after which one that starts must answer.
STAYS = {"store.db", "store.db-wal", "store.db-shm", "store.db.lock", "api.sock"}  # In the folder of a store.

Ask = Callable[[Client], Any]


def manifest(**parts: Any) -> dict[str, Any]:
    return {"apiVersion": "nestnet/v1", **parts}


def wide(ports: int, **more: Any) -> dict[str, Any]:
    made = {f"p{i}": {"segment": "s", "host": f"m{i % 3 + 1}", "groups": ["g"]} for i in range(ports)}
    return {"segments": {"s": {"cidr": "10.0.0.0/16"}}, "ports": made, **more}


LAN = {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": {"a": {"segment": "lan", "host": "web2"}}}
ACME: dict[str, Any] = {
    "tenant": "acme",
    "segments": {
        "web": {"cidr": "10.0.0.0/24"},
        "db": {"cidr": ["10.0.1.0/24", "fd00:1::/64"]},
        "spare": {"cidr": "10.0.2.0/24"},
    },
    "routers": {"core": {"segments": ["web", "db"]}, "edge": {}, "alone": {}},
    "links": {"core-edge": {"between": ["core", "edge"], "cost": 10}},
    "ports": {
        "web1": {"segment": "web", "host": "m1", "mac": "02:00:00:00:00:01"},
        "web2": {"segment": "web", "host": "m2", "hosts": True, "groups": ["front"], "mac": "02:00:00:00:00:02"},
        "db1": {"segment": "db", "host": "m3", "groups": ["back"], "owns": ["172.16.0.0/16"]},
    },
    "policies": [{"from": "front", "to": "back", "allow": "tcp/5432"}],
    "networks": {"staging": LAN},
}
CHANGED: dict[str, Any] = {
    **ACME,
    "description": "changed",
    "links": {"core-edge": {"between": ["core", "edge"], "cost": 20}, "more": {"between": ["edge", "alone"]}},
    "ports": {
        "web1": {**ACME["ports"]["web1"], "mac": "02:00:00:00:00:02", "host": "m3"},
        "web2": {**ACME["ports"]["web2"], "mac": "02:00:00:00:00:01"},
        "new": {"segment": "spare", "host": "m1", "groups": ["back"], "attach": {"tap": "tap0"}},
    },
    "policies": [{"from": "front", "to": "back", "allow": "udp/53"}],
}


class Point(NamedTuple):
    """Which thread is killed, and at which of its calls: the name, and the how many-th of that name."""

    thread: str
    call: str
    number: int


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    again   the client asks again by itself when an answer is lost
    fresh   what the controller has in memory tells on it: one for each point
    deep    the store's log is so long that the commit writes it into the store
    """

    name: str
    ask: Ask
    again: bool = True
    fresh: bool = False
    deep: bool = False


def apply(**parts: Any) -> Ask:
    prune = parts.pop("prune", False)
    return lambda client: client.apply(manifest(**parts), prune, key="key")


def delete(kind: str, path: str, cascade: bool = False) -> Ask:
    return lambda client: client.delete(kind, path, cascade, key="key")


def policy(client: Client) -> Any:
    return client.delete("policy", only_policy(client), key="key")


@cache
def only_policy(client: Client) -> str:
    """It has no name, and is not there any more when its deletion is asked for again."""
    (found,) = client.list("policy", network="acme")
    return str(found["id"])


def report(client: Client) -> Any:
    ports = {str(client.get("port", "acme/web1")["row"]): {"interface": "p1", "drops": {"policy_denied": 1}}}
    events = [("started", "m1: its agent has started")]
    return client.report("m1", client.status()["revision"], ["no NIC"], ports, events, key="key")


def backup(client: Client) -> Any:
    """What it wrote is whole, and all there is."""
    to = Path(client.url.removeprefix("unix:")).parent.with_suffix(".backup")
    to.unlink(missing_ok=True)
    try:
        client.backup(to)
        whole(to)
        return dump(to)
    finally:
        left = {each.name for each in to.parent.glob(f"{to.name}*")}
        assert left <= {to.name}


def restore(client: Client) -> Any:
    return client.restore(Path(client.url.removeprefix("unix:")).parent.with_suffix(".old"))


KINDS = [
    Kind("apply-made", apply(tenants={"new": {"quota": {"ports": 9}}}, networks={"new": {**ACME, "tenant": "new"}})),
    Kind("apply-changed", apply(tenants={"acme": {"quota": {"ports": 999}}}, networks={"acme": CHANGED})),
    Kind("apply-machines", apply(machines={"m1": {"address": "192.0.2.2"}, "m2": {"address": "192.0.2.1"}})),
    Kind("apply-deleted", apply(networks={"wide": {"ports": {}, "segments": {}}})),
    Kind("apply-pruned", apply(networks={"acme": ACME}, prune=True)),
    Kind("apply-400", apply(networks={"new": wide(400)})),
    Kind("apply-deep", apply(networks={"new": wide(20)}), deep=True),
    Kind("delete-machine", delete("machine", "m4")),
    Kind("delete-tenant", delete("tenant", "idle")),
    Kind("delete-network", delete("network", "empty")),
    Kind("delete-segment", delete("segment", "acme/spare")),
    Kind("delete-router", delete("router", "acme/alone")),
    Kind("delete-link", delete("link", "acme/core-edge")),
    Kind("delete-port", delete("port", "acme/web1")),
    Kind("delete-policy", policy),
    Kind("delete-cascade", delete("network", "acme", True)),
    Kind("join-new", lambda client: client.join("m5", "192.0.2.5", key="key")),
    Kind("join-changed", lambda client: client.join("m1", "192.0.2.9", 1450, {"row": "7"}, key="key")),
    Kind("link", lambda client: client.set_link("acme/core-edge", False, key="key")),
    Kind("attach", lambda client: client.set_attach("acme/web1", {"netns": "blue"}, key="key")),
    Kind("fence", lambda client: client.fence("m1", True, key="key")),
    Kind("disable", lambda client: client.set_enabled("network", "acme", False, key="key")),
    Kind("report", report, fresh=True),
    Kind("confirm", lambda client: client.confirm(key="key"), fresh=True),
    Kind("backup", backup, again=False),
    Kind("restore", restore, again=False, fresh=True),
]


class Bed:
    """Where it happens: a folder with a store, a controller of it, and a client in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "store"
        self.file = self.folder / "store.db"
        self.base = folder / "base.db"
        self.scratch = folder / "scratch"
        self.template = Template()
        self.client = Client(f"unix:{self.folder}/api.sock")
        self.client._answered = True  # It waits for one that starts.
        self.asking = ThreadPoolExecutor(1)
        self.served: Served | None = None
        self._make_base()
        self.before = dump(self.base)

    def _make_base(self) -> None:
        made = self.base.parent / "made"
        made.mkdir()
        store = Store(made / "store.db")
        for place in range(1, 5):
            store.join(f"m{place}", f"192.0.2.{place}")
        store.apply(parse(manifest(tenants={"acme": {}, "idle": {}}, networks={"acme": ACME, "gone": wide(2)})))
        store.delete("network", "gone", cascade=True)
        for place in range(1, 4):
            store.report(f"m{place}", store.revision)
        store.backup(self.folder.with_suffix(".old"))
        store.apply(parse(manifest(networks={"wide": wide(150, tenant="acme"), "empty": {}})))
        store.backup(self.base)
        store.close()

    def close(self) -> None:
        self.end()
        self.template.close()
        self.client.close()
        self.asking.shutdown()

    def end(self) -> None:
        if self.served is not None:
            self.served.kill()
            self.served.close()
            self.served = None

    def wipe(self, store: Path | None) -> None:
        """Nobody serves; the folder has this store, or none, and nothing else."""
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        if store is not None:
            shutil.copyfile(store, self.file)

    def start(self) -> float:
        """Serve, and return the seconds until there is an answer, to what was asked before and is asked again too; but
        for those when others had the CPUs."""
        begun = time.monotonic()
        assert self.served is None
        self.served = self.template.start(self.folder)
        self.asking.submit(self.client.status).result()
        return time.monotonic() - begun - self.served.waited()

    def ready(self, kind: Kind) -> Served:
        """A controller that has answered before, of a store as it is at first."""
        if kind.fresh or self.served is None or len(self.served.workers()) != 1:
            self.wipe(self.base)
            self.start()
        put_back(self.file, self.base, kind.deep)
        assert self.served is not None
        return self.served

    def stray(self) -> set[str]:
        """What is in the folder that should not be."""
        return {each.name for each in self.folder.iterdir()} - STAYS

    def settled(self) -> None:
        """What a backup needed is cleared away when its answer is out."""
        limit = time.monotonic() + 5
        while self.stray() - {"store.db.before-restore"} and time.monotonic() < limit:
            time.sleep(0.01)

    def log(self) -> str:
        return self.folder.with_suffix(".log").read_text()[-3000:]

    def left(self, states: dict[str, Dump], of: Callable[[Path], Dump] = dump) -> set[str]:
        """Which of these states a killed controller has left behind."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        file = copied(self.folder, self.scratch)
        sound(file)
        found = of(file)
        names = {name for name, state in states.items() if found == state}
        assert names, "\n".join(f"not {name}:\n{difference(state, found)}" for name, state in states.items())
        return names

    def ask(self, what: Ask) -> Future[Any]:
        return self.asking.submit(what, self.client)

    def struck(self, thread: int, point: Point, begin: Callable[[], Future[Any]]) -> tuple[Future[Any], bool]:
        """Begin, with a thread of the controller killed at that point. Returns what was begun, and whether it came
        to that."""
        assert self.served is not None
        strace = Strace(thread, point.call, f"signal=KILL:when={point.number}")
        try:
            asked = begin()
            while not (asked.done() or self.served.wait(0.005)):  # the pace of looking; the client has no more patience
                pass
        finally:
            strace.end()
        return asked, not self._lives()

    def _lives(self) -> bool:
        """One that has answered may be hit right after that; not one that answers again."""
        assert self.served is not None
        if not self.served.alive():
            return False
        self.client.patience = 0
        try:
            self.asking.submit(self.client.status).result()
        except Unreachable:
            assert self.served.wait()
        finally:
            self.client.patience = PATIENCE
        return self.served.alive()


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "FIRST_PAUSE", 0.01)
        patch.setattr(client_module, "LONGEST_PAUSE", 0.02)
        made = Bed(tmp_path_factory.mktemp("killed"))
        try:
            made.ready(KINDS[0])
            made.ask(only_policy).result()
            yield made
        finally:
            made.close()


def chosen(seen: dict[str, list[str]]) -> list[Point]:
    """All the calls that each thread made, or so many of them, evenly."""
    points = []
    for thread, names in seen.items():
        counts = Counter[str]()
        for name in names:
            counts[name] += 1
            points.append(Point(thread, name, counts[name]))
    many = len(points) if KILLS == "all" else min(int(KILLS), len(points))
    found = [points[place * len(points) // many] for place in range(many)]
    random.Random(0).shuffle(found)  # Some of them are from everywhere, too.
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_killed_in_the_middle_of_a_request(bed: Bed, kind: Kind) -> None:
    served = bed.ready(kind)
    watched = {"main": Strace(served.pid, SEEN), "worker": Strace(served.worker(), SEEN)}
    answer = said(bed.ask(kind.ask).result())
    seen = {thread: strace.end() for thread, strace in watched.items()}
    after = dump(bed.file)
    whole(bed.file)
    assert (after == bed.before) == (kind.name == "backup")
    tally = Tally(kind.name, seen)
    states = {"before": bed.before, "after": after}
    for point in tally.points():
        served = bed.ready(kind)
        thread = served.pid if point.thread == "main" else served.worker()
        asked, killed = bed.struck(thread, point, lambda: bed.ask(kind.ask))
        if killed:
            answered = asked.done() and asked.exception() is None
            left = bed.left(states)
            assert "after" in left or not answered, point
            bed.end()
            tally.add(point, bed.start())
        try:
            assert said(asked.result()) == answer, point
        except Unreachable:
            assert not kind.again, point
        if kind.again:
            assert said(bed.ask(kind.ask).result()) == answer, point
        found = dump(bed.file)
        assert found == after or (not kind.again and found == bed.before), (point, difference(after, found))
        if not killed:
            bed.settled()
        assert bed.stray() <= {"store.db.before-restore"}, point
        aside = bed.folder / "store.db.before-restore"
        assert not aside.exists() or dump(aside) == bed.before, point
    tally.judge()


class Tally:
    """The points of a kind, and what became of them."""

    def __init__(self, name: str, seen: dict[str, list[str]]) -> None:
        self.name = name
        self.all = sum(map(len, seen.values()))
        self._chosen = chosen(seen)
        self.tried = 0
        self.killed = Counter[str]()
        self.slowest = 0.0

    def points(self) -> Iterator[Point]:
        limit = time.monotonic() + HASTE
        for point in self._chosen:
            if KILLS != "all" and self.tried >= LEAST and time.monotonic() > limit:
                return
            self.tried += 1
            yield point

    def add(self, point: Point, took: float) -> None:
        self.killed[point.call] += 1
        self.slowest = max(self.slowest, took)

    def judge(self) -> None:
        killed = self.killed.total()
        calls = ", ".join(f"{count} {name}" for name, count in self.killed.most_common())
        print(f"\n{self.name}: killed at {killed} of {self.all} calls, back within {self.slowest:.2f} s: {calls}")
        assert self.slowest < BACK
        # Now and then one gets by with fewer calls than it made in peace.
        assert killed >= 0.75 * self.tried


def said(answer: Any) -> Any:
    """An answer, without how long ago things were."""
    return killing.timeless(repr(answer))


# Starting and stopping

MIGRATIONS = str(Path(tables.__file__).parent / "migrations")
VERSIONS = [each.revision for each in reversed(list(ScriptDirectory(MIGRATIONS).walk_revisions()))]


def upgraded(to: Path, version: str, base: Path | None = None) -> Path:
    """A copy of a store, or a new one, with the tables of a version."""
    if base is not None:
        shutil.copyfile(base, to)
    engine = open_engine(to)
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, version)
    engine.dispose()
    return to


def columns(connection: sqlite3.Connection, schema: str, table: str) -> list[str]:
    return [row[1] for row in connection.execute(f'PRAGMA {schema}.table_info("{table}")')]


def common(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """The tables of a store that another one, `other`, has too, each with the columns that both have."""
    tables = "SELECT name FROM {}.sqlite_master WHERE type = 'table' AND name <> 'alembic_version'"
    mine = connection.execute(f"{tables.format('main')} INTERSECT {tables.format('other')}").fetchall()
    for (table,) in mine:
        others = columns(connection, "other", table)
        yield table, ", ".join(f'"{name}"' for name in columns(connection, "main", table) if name in others)


def of_version(to: Path, version: str, base: Path) -> Path:
    """A store of an older version, with all of another one that it can have."""
    with killing.opened(upgraded(to, version)) as connection:
        connection.execute("ATTACH ? AS other", (str(base),))
        for table, names in common(connection):
            connection.execute(f'INSERT OR REPLACE INTO main."{table}" ({names}) SELECT {names} FROM other."{table}"')
    return to


def lost(old: Path, new: Path) -> list[str]:
    """Tables of which something is no longer there."""
    with killing.opened(old) as connection:
        connection.execute("ATTACH ? AS other", (str(new),))
        ask = 'SELECT count(*) FROM (SELECT {1} FROM main."{0}" EXCEPT SELECT {1} FROM other."{0}")'
        return [
            table for table, names in common(connection) if connection.execute(ask.format(table, names)).fetchone()[0]
        ]


def keyless(file: Path) -> Dump:
    """What a store has but its key, which each new one has by chance."""
    found = dump(file)
    return {**found, "store": [()] * len(found.get("store", ()))}


STARTS = ["new", "stopped", "crashed", *VERSIONS[:-1]]


@pytest.fixture
def found(bed: Bed, tmp_path: Path, name: str) -> tuple[Path, dict[str, Dump]]:
    """A folder as one that starts finds it, and what may be there while it starts, but the end."""
    folder = tmp_path / "found"
    folder.mkdir()
    file = folder / "store.db"
    match name:
        case "new":
            states = {v: keyless(upgraded(tmp_path / v, v)) for v in VERSIONS}
            return folder, {"nothing": keyless(tmp_path / "nothing"), **states}
        case "stopped":
            shutil.copyfile(bed.base, file)
            return folder, {}
        case "crashed":
            served = bed.ready(KINDS[0])
            bed.ask(KINDS[0].ask).result()
            served.kill()
            folder.rmdir()
            copied(bed.folder, folder)
            assert (folder / "store.db-wal").stat().st_size > 0
            return folder, {}
    of_version(file, name, bed.base)
    later = VERSIONS[VERSIONS.index(name) :]
    return folder, {v: keyless(upgraded(tmp_path / v, v, file)) for v in later}


@pytest.mark.parametrize("name", STARTS)
def test_killed_while_it_starts(bed: Bed, tmp_path: Path, name: str, found: tuple[Path, dict[str, Dump]]) -> None:
    """The store is wholly at some version of its tables, with all that was in it, and the next one goes on."""
    folder, states = found
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def lay() -> Served:
        bed.wipe(None)
        shutil.copytree(folder, bed.folder, dirs_exist_ok=True)
        bed.served = bed.template.start(bed.folder, gate)
        return bed.served

    def begin() -> Future[Any]:
        opened = os.open(gate, os.O_RDWR)  # Whoever waits there may be gone.
        os.write(opened, b"!")
        asked = bed.ask(Client.status)
        os.close(opened)
        return asked

    watched = Strace(lay().pid, SEEN)
    begin().result()
    tally = Tally(f"start-{name}", {"main": watched.end()})
    whole(bed.file)
    after = keyless(bed.file)
    if name != "new":
        bed.end()
        assert lost(copied(folder, tmp_path / "first"), copied(bed.folder, tmp_path / "last")) == []
    for point in tally.points():
        asked, killed = bed.struck(lay().pid, point, begin)
        if killed:
            bed.left({**states, "after": after}, keyless)
            bed.end()
            tally.add(point, bed.start())
        asked.result()
        assert keyless(bed.file) == after, (point, difference(after, keyless(bed.file)))
        assert bed.stray() == set(), point
    tally.judge()


def test_killed_while_it_stops(bed: Bed) -> None:
    """With much in the log, which goes into the store."""
    kind = Kind("stop", Client.status, deep=True)

    def begin(served: Served) -> Future[Any]:
        os.kill(served.pid, signal.SIGTERM)
        return bed.asking.submit(served.wait)

    served = bed.ready(kind)
    watched = Strace(served.pid, SEEN)
    assert begin(served).result()
    tally = Tally(kind.name, {"main": watched.end()})
    bed.end()
    assert not (bed.folder / "store.db-wal").exists()
    for point in tally.points():
        served = bed.ready(kind)
        bed.struck(served.pid, point, lambda served=served: begin(served))  # type: ignore[misc]
        bed.left({"before": bed.before})
        bed.end()
        tally.add(point, bed.start())
        assert dump(bed.file) == bed.before, point
        assert bed.stray() == set(), point
    tally.judge()
