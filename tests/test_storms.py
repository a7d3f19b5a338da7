"""Many at once, and again and again: a hundred who want one thing, what comes and goes before anybody looks, and more
changes than a machine can follow.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_api import Controller
from test_store import items, manifest, new_store, race

from nestnet.agent.feed import Desired
from nestnet.api.client import Client
from nestnet.compile.compiler import compile
from nestnet.compile.diff import Put, diff
from nestnet.compile.slots import Slots, assign
from nestnet.compile.tables import Tables
from nestnet.model.breadth import RULES_PER_NETWORK
from nestnet.model.errors import Invalid, NestnetError
from nestnet.model.values import World
from nestnet.store import Store

CROWD = 100
CYCLES = int(os.environ.get("NESTNET_CYCLES", "30"))
SECONDS = float(os.environ.get("NESTNET_CHANGES", "4"))  # of changes, a thousand each second at least
PORTS = 500


@pytest.fixture
def store() -> Iterator[Store]:
    with new_store() as made:
        yield made


def line(name: str, **more: Any) -> bytes:
    return json.dumps({"name": name, **more}).encode()


LAN = {"segments": {"lan": {"cidr": "10.0.0.0/24"}}}


def one_of(got: list[Any], codes: set[str]) -> None:
    assert sum(not isinstance(each, NestnetError) for each in got) == 1
    assert {each.code for each in got if isinstance(each, NestnetError)} == codes


def test_one_of_a_hundred_gets_it(store: Store) -> None:
    one_of(race(lambda _: store.create([line("n", **LAN)]), CROWD), {"duplicate_name"})
    one_of(race(lambda i: store.join(f"j{i}", "192.0.2.99"), CROWD), {"duplicate_address"})
    lan = {"lan": {"cidr": "10.0.0.0/24"}}

    def add(i: int) -> Any:
        """Each leaves the others' ports there."""
        port = {"segment": "lan", "host": "m1", "address": "10.0.0.9"}
        return store.create([line(f"a{i}", segments=lan, ports={f"p{i}": port, "q": port})])

    got = race(add, CROWD)  # the same address twice in one network: nobody
    assert {each.code for each in got} == {"invalid"}
    with new_store(vnis=1) as small:
        one_of(race(lambda i: small.create([line(f"n{i}", **LAN)]), CROWD), {"vni_exhausted"})
        assert len(items(small, "segment")) == len(items(small, "network")) == 1


def test_one_of_ten_overlapping_cidrs_joins_a_router(store: Store) -> None:
    spec = {"segments": {f"s{i}": {"cidr": f"10.{i}.0.0/16"} for i in range(10)}, "routers": {"r": {"segments": []}}}
    store.apply(manifest(n=spec))
    wide = {f"w{i}": {"cidr": "10.0.0.0/8"} for i in range(10)}
    store.apply(manifest(n={**spec, "segments": {**spec["segments"], **wide}}))
    got = race(lambda i: store.apply(manifest(n={"routers": {"r": {"segments": [f"w{i}", f"s{i}"]}}})), 10)
    assert all(isinstance(each, NestnetError) and each.code == "invalid" for each in got)
    assert {p.code for each in got if isinstance(each, NestnetError) for p in each.problems} == {"cidr_overlap"}  # type: ignore[attr-defined]
    got = race(lambda i: store.apply(manifest(n={"routers": {"r": {"segments": [f"w{i}"]}}})), 10)
    assert not any(isinstance(each, NestnetError) for each in got)
    (router,) = items(store, "router").values()
    assert len(router["segments"]) == 1


def test_one_more_of_a_thousand_members_is_a_few_rows(store: Store) -> None:
    """Rules are of groups, whoever is in them; and more rules than there is room for are refused with both numbers."""
    ports = {f"p{i}": {"segment": "lan", "host": "m1", "groups": "web"} for i in range(1000)}
    policies = [{"from": "web", "to": "web", "allow": f"tcp/{port}"} for port in range(1, 1001)]
    spec = {"segments": {"lan": {"cidr": "10.0.0.0/16"}}, "ports": ports, "policies": policies}
    store.apply(manifest(n=spec))

    def compiled(slots: Slots) -> tuple[Tables, Slots]:
        world = World({(kind, id): value for kind, id, value in store.snapshot_for(1).rows if value})
        slots = assign(slots, world)
        return compile(world, 1, {}, 0, slots), slots

    before, slots = compiled(Slots())
    assert len(before["rule"]) >= 1000
    more = {**ports, "p1000": ports["p0"]}
    store.apply(manifest(n={"ports": more}))
    after, _ = compiled(slots)
    changed = {action.table: len(action.rows) for action in diff(before, after) if isinstance(action, Put)}
    assert changed.pop("local") == 1001  # Who hears broadcasts is a list that is replaced as a whole.
    assert 0 < sum(changed.values()) <= 20
    ranges = [f"10.0.{i}.0/24" for i in range(64)]
    wide = [{"from": ranges, "to": "web", "allow": [f"tcp/{p}" for p in range(n, n + 64)]} for n in range(1, 1089, 64)]
    with pytest.raises(Invalid) as error:
        store.apply(manifest(n={"policies": wide}))
    (problem,) = error.value.problems
    assert (problem.code, problem.limit) == ("too_many_rules", RULES_PER_NETWORK)


def test_what_comes_and_goes_at_once_leaves_nothing(store: Store) -> None:
    """Made, deleted, made again, by two who know nothing of each other, while a machine follows."""
    port = {"segment": "lan", "host": "m1"}
    desired, machine = Desired(), store.machine_row("m1")
    done, refused = threading.Event(), set[str]()

    def make(_: int) -> int:
        made = 0
        for _cycle in range(CYCLES):
            try:
                store.create([line("n", **LAN, ports={"a": port, "b": port})])
                made += 1
                store.delete("network", "n", cascade=True)
            except NestnetError as error:
                refused.add(error.code)
        return made

    def follow() -> None:
        nonlocal desired
        while True:
            last = done.is_set()
            since = desired.revision if desired.whole else None
            batch = store.changes_since(machine, int(since)) if since is not None else None
            batch = batch or store.snapshot_for(machine)
            desired = desired.after(_as_line(batch))
            if last:
                return

    follower = threading.Thread(target=follow)
    follower.start()
    assert sum(race(make, 2)) >= CYCLES
    done.set()
    follower.join(60)
    assert refused <= {"duplicate_name", "not_found", "in_use"}
    if "n" in items(store, "network"):
        store.delete("network", "n", cascade=True)
        desired = desired.after(_as_line(store.changes_since(machine, int(desired.revision))))
    assert {kind for kind, _ in desired.values} == {"machine"}
    assert all(not items(store, kind) for kind in ("network", "segment", "port", "policy"))
    assert store.counts()["network"] == store.counts()["port"] == 0


def _as_line(batch: Any) -> dict[str, Any]:
    from nestnet.model.wire import to_wire

    rows = [{"kind": kind, "id": id, "value": to_wire(value) if value else None} for kind, id, value in batch.rows]
    return {"snapshot": batch.snapshot, "revision": batch.revision, "token": "t", "rows": rows}


@pytest.mark.alone
def test_a_machine_that_is_slow_misses_nothing(tmp_path: Path) -> None:
    """A thousand changes a second of its ports: lines wait for nobody, and the last state is the state."""
    controller = Controller(tmp_path)
    controller.start()
    try:
        with Client(controller.url) as client, Client(controller.url) as watcher:
            client.join("m1", "192.0.2.1")
            ports = {f"p{i}": {"segment": "lan", "host": "m1"} for i in range(PORTS)}
            spec = {"segments": {"lan": {"cidr": "10.0.0.0/16"}}, "ports": ports}
            client.apply({"apiVersion": "nestnet/v1", "networks": {"n": spec}})
            desired, lines, changes = Desired(), 0, 0
            feed = watcher.feed("m1")
            desired = desired.after(next(feed))
            assert controller.process is not None
            before = _memory(controller.process.pid)
            done = threading.Event()

            def storm() -> None:
                nonlocal changes
                end, turn = time.monotonic() + SECONDS, 0
                while time.monotonic() < end:
                    turn += 1
                    rated = {name: {**port, "rate": f"{turn}mbit"} for name, port in ports.items()}
                    client.apply({"apiVersion": "nestnet/v1", "networks": {"n": {**spec, "ports": rated}}})
                    changes += PORTS
                done.set()

            thread = threading.Thread(target=storm)
            thread.start()
            last: Any = None
            while last is None or desired.revision != last:
                desired, lines = desired.after(next(feed)), lines + 1
                if done.is_set() and last is None:
                    last = client.status()["revision"]
                done.wait(0.5)  # It takes its time over each.
            thread.join()
            fresh = Desired().after(next(Client(controller.url).feed("m1", "none")))
            assert desired.values == fresh.values
            assert len({port.rate for port in desired.world.ports.values()}) == 1
            assert changes >= 1000 * SECONDS
            assert lines <= SECONDS / 0.5 + 5
            assert _memory(controller.process.pid) - before < 100e6
    finally:
        controller.stop()


def _memory(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024
