"""One network beside many: what is asked for, made and deleted takes as many statements, and reads as much, beside
3,000 networks as beside ten. Counted, not timed: SQL statements, steps of SQLite's machine, and scans in its plans.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from nestnet.bench.serve import HOSTS, fill, first, manifest, network
from nestnet.model.errors import NotFound
from nestnet.model.manifest import parse
from nestnet.store import Store
from nestnet.store.once import Asked
from nestnet.store.quotas import Quota
from nestnet.store.scope import Scope

FEW, MANY = 10, 3_000
THERE = int(os.environ.get("NESTNET_NETWORKS", "3000"))  # that a controller starts with
EACH = 100  # steps that are counted as one
# What grows with the networks. An index is walked down, not along.
BIG = re.compile(
    r"SCAN (network|segment|segment_cidr|port|policy|address|owned|host_use|attachment|port_group|change|event)"
    r"(_\d+)?\b"
)
GUEST = Scope(frozenset({"guest"}), frozenset({"guest"}))
OWNER = Scope(frozenset({"t0"}), frozenset({"t0"}))


@dataclass
class Counts:
    statements: list[str] = field(default_factory=list)
    steps: int = 0
    scans: list[str] = field(default_factory=list)
    done: bool = False  # Connections go on to tell.

    def step(self) -> int:
        self.steps += not self.done
        return 0


@contextmanager
def counted() -> Iterator[Counts]:
    counts = Counts()

    def before(connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        counts.statements.append(statement)
        raw = connection.connection.dbapi_connection
        raw.set_progress_handler(None, 0)
        if statement.split()[0] in ("SELECT", "WITH", "UPDATE", "DELETE"):
            rows = raw.execute(f"EXPLAIN QUERY PLAN {statement}", parameters[0] if many else parameters).fetchall()
            counts.scans += [f"{row[3]}: {statement}" for row in rows if BIG.match(row[3])]
        raw.set_progress_handler(counts.step, EACH)

    event.listen(Engine, "before_cursor_execute", before)
    try:
        yield counts
    finally:
        counts.done = True
        event.remove(Engine, "before_cursor_execute", before)


def tower(change: int, **inner: Any) -> dict[str, Any]:
    """A network that carries one."""
    base = network(description=f"{change}")
    for port in base["ports"].values():
        port["hosts"] = True
    base |= {"policies": [], "tenant": "t0"}
    carried = network(description=f"{change}", **inner)
    carried["ports"]["alone"] = {"segment": "lan", "host": "p1"}
    for place, port in enumerate(list(carried["ports"].values())[:2], 1):
        port["host"] = f"p{place}"
    return manifest(base={**base, "networks": {"inner": carried}})


def guests(**more: Any) -> dict[str, Any]:
    made = network(**more)
    for place, port in enumerate(made["ports"].values(), 1):
        port["host"] = f"p{place}"
    return made


def asked(store: Store, one: str) -> dict[str, Callable[[], Any]]:
    """What is asked for, in this order; `one`: a network, the last of them."""

    def absent(scope: Scope | None = None) -> None:
        with pytest.raises(NotFound):
            store.get("network", "absent", scope or Scope())

    several = [json.dumps({"name": name, **network()}).encode() for name in ("one", "two", "three")]
    owner, guest = Asked("owner", scope=OWNER), Asked("guest", scope=GUEST)
    return {
        "get a network": lambda: store.get("network", one),
        "get a port": lambda: store.get("port", f"{one}/p1"),
        "get a port by the end of its path": lambda: store.get("port", "alone"),
        "get a network by the end of its path": lambda: store.get("network", "inner"),
        "list ports of one": lambda: store.list("port", one),
        "list what one carries": lambda: store.list("network", "base"),
        "plan": lambda: store.plan(parse(manifest(**{one: network(description="other")}))),
        "create": lambda: store.apply(parse(manifest(new=network()))),
        "change": lambda: store.apply(parse(manifest(new=network(description="other")))),
        "delete": lambda: store.delete("network", "new", True),
        "plan a carried one": lambda: store.plan(parse(tower(2))),
        "change a carried one": lambda: store.apply(parse(tower(3))),
        "take down": lambda: store.set_enabled("network", one, False),
        "let others carry": lambda: store.recarry("base/inner", None, {"p1": "m2", "p2": "m1", "alone": "m1"}),
        "hosts": store.hosts,
        "hosts in a network": lambda: store.hosts("base"),
        "as an owner: hosts": lambda: store.hosts(scope=OWNER),
        "as an owner: hosts in a network": lambda: store.hosts("base", scope=OWNER),
        "count": store.counts,
        "status": store.status,
        "as an owner: get": lambda: store.get("port", "n5/p1", OWNER),
        "as an owner: get by the end of its path": lambda: store.get("network", "inner", OWNER),
        "as an owner: list": lambda: store.list("port", "n5", scope=OWNER),
        "as an owner: plan": lambda: store.plan(parse(manifest(n5=network(description="other"))), scope=OWNER),
        "as an owner: create": lambda: store.apply(parse(manifest(owners=network())), asked=owner),
        "as an owner: create several": lambda: store.create(several, owner),
        "as an owner: delete": lambda: store.delete("network", "owners", True, asked=owner),
        "as a guest: create": lambda: store.apply(parse(manifest(guests=guests())), asked=guest),
        "as a guest: get": lambda: store.get("network", "guests", GUEST),
        "as a guest: list": lambda: store.list("port", scope=GUEST),
        "as a guest: what is not there": lambda: absent(GUEST),
        "as a guest: plan": lambda: store.plan(parse(manifest(guests=guests(description="other"))), scope=GUEST),
        "as a guest: status": lambda: store.status(GUEST),
        "within a quota": lambda: store.apply(parse(manifest(limited=network(tenant="limited")))),
    }


def filled(path: Path, networks: int) -> None:
    store = Store(path)
    for place, name in enumerate(HOSTS, 1):
        store.join(name, f"192.0.2.{place}")
    store.apply(parse(first(networks)))
    store.close()
    fill(path, networks)


def measured(folder: Path, networks: int) -> dict[str, Counts]:
    filled(folder / "store.db", networks)
    store = Store(folder / "store.db")
    try:
        tenants = {"guest": {}, "limited": {"quota": {"networks": 5}}}
        store.apply(parse({**tower(1), "tenants": tenants}))
        store.grant(None, "t0", None, Quota())
        store.grant("base", "guest", None, Quota())
        found = {}
        for what, ask in asked(store, f"n{networks - 1}").items():
            with counted() as found[what]:
                ask()
        assert store.counts()["network"] == networks + 7
        return found
    finally:
        store.close()


def test_one_network_costs_the_same_beside_many(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    few, many = measured(tmp_path / "few", FEW), measured(tmp_path / "many", MANY)
    assert {what: counts.scans for what, counts in many.items() if counts.scans} == {}
    for what, counts in many.items():
        assert counts.statements == few[what].statements, what
        # A tree of an index is deeper by a level, and a number longer by a byte.
        assert counts.steps <= 1.3 * few[what].steps + 5, (what, few[what].steps, counts.steps)


def started(path: Path, networks: int) -> Counts:
    """A store that is opened again: for a machine nothing has changed, then it asks for all that it needs."""
    filled(path, networks)
    store = Store(path)
    store.join("other", "192.0.2.99")
    store.apply(parse(manifest(small={**network(), "ports": {"p": {"segment": "lan", "host": "other"}}})))
    other, revision = store.machine_row("other"), store.revision
    store.close()
    with counted() as counts:
        store = Store(path)
        news = store.changes_since(other, revision)
        needed = store.snapshot_for(other)
    assert news is not None
    assert (list(news.rows), news.revision) == ([], revision), "so no agent has anything to write"
    kinds = [kind for kind, _, value in needed.rows if value]
    assert (kinds.count("network"), kinds.count("segment"), kinds.count("port")) == (1, 1, 1)
    assert store.counts()["network"] == networks + 1
    store.close()
    return counts


def test_a_start_costs_the_same_beside_many(tmp_path: Path) -> None:
    few, many = (started(tmp_path / f"{networks}.db", networks) for networks in (FEW, THERE))
    assert many.scans == []
    assert many.statements == few.statements
    assert many.steps <= 1.3 * few.steps + 5, (few.steps, many.steps)


def test_what_is_counted_is_what_there_is(tmp_path: Path) -> None:
    """That the measure itself tells a walk along an index from one down."""
    filled(tmp_path / "store.db", FEW)
    store = Store(tmp_path / "store.db")
    with counted() as counts, store._database.read() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM network WHERE description = 'none'")
    store.close()
    assert len(counts.scans) == 1
