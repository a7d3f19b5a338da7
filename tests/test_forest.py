"""Networks in networks, when something happens to what carries them: the rows 3F of docs/hostile.md."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from golden_files import same
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, event, select
from strategies import a_change, worlds
from test_store import MACHINES, acme, content, items, manifest, store
from woken import nobody_sleeps

from nestnet.model.errors import Conflict, Exhausted, Forbidden, Invalid, NestnetError, NotFound, Stale
from nestnet.model.manifest import parse
from nestnet.model.meaning import _is_carried
from nestnet.model.standing import Lost, fallen
from nestnet.model.values import FABRIC, Attach, Network, World
from nestnet.store import Store, deletion, heard, objects, still, tables, write
from nestnet.store.once import Asked
from nestnet.store.plan import Plan
from nestnet.store.scope import Scope
from nestnet.store.standing import Chains

__all__ = ["store"]

CARRIAGE = {"from": "hosts", "to": "hosts", "allow": "carriage"}
HOSTS = {
    "web1": {"segment": "web", "host": "m1", "hosts": True},
    "web2": {"segment": "web", "host": "m2", "hosts": True},
    "db1": {"segment": "db", "host": "m3", "hosts": True},
}
LAN = {"lan": {"cidr": "10.0.0.0/24"}}


def carrier(**more: Any) -> dict[str, Any]:
    """acme with three hosts, one of them behind a router, that carries `in` on all of them."""
    ports = {name: {"segment": "lan", "host": host, "hosts": True} for name, host in zip("abc", HOSTS, strict=True)}
    return acme(**{"ports": HOSTS, "policies": [], "networks": {"in": {"segments": LAN, "ports": ports}}, **more})


def changes(plan: Plan) -> list[tuple[str, str, str]]:
    return [(change.op, change.kind, change.path) for change in plan.changes]


def states(store: Store, kind: str) -> dict[str, tuple[str, str | None]]:
    return {path: (one["state"], one["cause"]) for path, one in items(store, kind).items()}


# ---- administrative state


@pytest.mark.parametrize(("kind", "path"), [("network", "acme"), ("network", "acme/in"), ("port", "acme/web2")])
def test_what_is_disabled_comes_back_unchanged(store: Store, kind: str, path: str) -> None:
    store.apply(manifest(acme=carrier(), other=acme()))
    before = {each: items(store, each) for each in ("network", "port")}
    revision, machines, resource = store.set_enabled(kind, path, False)
    assert (revision, resource["enabled"], resource["state"]) == (store.revision, False, "down: disabled")
    assert machines == ["m1", "m2", "m3"], "who holds anything of it, or of what hangs above"
    assert store.set_enabled(kind, path, False)[0] == revision == store.revision, "done already"
    for name in MACHINES:
        batch = store.changes_since(store.machine_row(name), revision - 1)
        assert batch is not None
        assert [(each, value.enabled) for each, _, value in batch.rows if value is not None] == [(kind, False)]  # type: ignore[union-attr]
    assert store.plan(manifest(acme=carrier())).changes == (), "a file that does not say leaves it"
    assert store.set_enabled(kind, path, True)[0] == revision + 1
    for each, was in before.items():
        for now, then in zip(items(store, each).values(), was.values(), strict=True):
            assert {**now, "etag": "", "revision": 0} == {**then, "etag": "", "revision": 0}


def test_a_file_takes_down_and_up(store: Store) -> None:
    store.apply(manifest(acme=carrier()))
    ports = {**HOSTS, "web2": {**HOSTS["web2"], "enabled": False}}
    plan = store.plan(manifest(acme=carrier(ports=ports)))
    assert changes(plan) == [("~", "port", "acme/web2")]
    assert plan.changes[0].fields == {"enabled": [True, False]}
    assert plan.disturbs == (
        "acme/web2 is disabled: its workload cut off",
        "acme/in goes down with acme/web2",
    )
    store.apply(manifest(acme=carrier(ports=ports)))
    store.apply(manifest(acme=carrier()))
    assert items(store, "port")["acme/web2"]["enabled"] is False, "what a file leaves out stays"
    plan = store.plan(manifest(acme=carrier(ports=HOSTS, enabled=False)))
    assert plan.changes[0].fields == {"enabled": [True, False]}
    assert plan.disturbs == ("acme is disabled: 3 ports cut off", "acme/in goes down with acme")
    new = acme(enabled=False, ports={"x": {"segment": "web", "host": "m1", "enabled": False}}, policies=[])
    store.apply(manifest(new=new))
    assert states(store, "port")["new/x"] == ("down: disabled", "port new/x is disabled")
    up = {**new, "enabled": True, "ports": {"x": {"segment": "web", "host": "m1", "enabled": True}}}
    assert len(store.apply(manifest(new=up)).plan.changes) == 2
    assert states(store, "port")["new/x"] == ("up", None)


def test_children_say_why_they_are_down_and_siblings_do_not(store: Store) -> None:
    deep = {"segments": LAN, "ports": {name: {"segment": "lan", "host": name} for name in "abc"}}
    parts = {name: {"segment": "lan", "host": host, "hosts": True} for name, host in zip("abc", HOSTS, strict=True)}
    within = {"in": {"segments": LAN, "ports": parts, "networks": {"deep": deep}}, "beside": {**deep, "ports": {}}}
    store.apply(manifest(acme=carrier(networks=within), other=acme()))
    assert set(states(store, "network").values()) | set(states(store, "port").values()) == {("up", None)}

    store.set_enabled("network", "acme", False)
    cause = "network acme is disabled"
    ports = states(store, "port")
    assert states(store, "network") == {
        "acme": ("down: disabled", cause),
        **dict.fromkeys(("acme/in", "acme/in/deep", "acme/beside"), ("down: carrier", cause)),
        "other": ("up", None),
    }
    assert {ports[f"acme/in/{name}"] for name in "abc"} == {("down: carrier", cause)}
    assert {ports[f"acme/in/deep/{name}"] for name in "abc"} == {("down: carrier", cause)}
    assert {ports[f"other/{name}"] for name in ("web1", "web2", "db1")} == {("up", None)}

    store.set_enabled("network", "acme", True)
    store.set_enabled("port", "acme/web2", False)
    cause = "port acme/web2 is disabled"
    ports = states(store, "port")
    assert ports["acme/in/b"] == ports["acme/in/deep/b"] == ("down: carrier", cause)
    assert {ports[f"acme/in/{where}{name}"] for where in ("", "deep/") for name in "ac"} == {("up", None)}
    assert states(store, "network")["acme/in/deep"] == ("degraded", f"1 of 3 hosts are down: {cause}")
    store.set_enabled("port", "acme/web2", True)
    assert set(states(store, "port").values()) == {("up", None)}


def test_what_a_carrier_cuts_is_down(store: Store) -> None:
    store.apply(manifest(acme=carrier(policies=[{"from": "any", "to": "any", "allow": "tcp/80"}])))
    said = "in network acme no policy allows carriage between host {} and any other in use"
    ports = states(store, "port")
    for name, host in zip("abc", HOSTS, strict=True):
        assert ports[f"acme/in/{name}"] == ("down: carrier", said.format(host))
    assert states(store, "network")["acme/in"] == ("down: carrier", said.format("web1"))
    allowed = {"from": "web1", "to": "web2", "allow": "carriage"}  # one way is a way: packets pass
    store.apply(manifest(acme=carrier(policies=[allowed])))
    ports = states(store, "port")
    assert [ports[f"acme/in/{name}"] for name in "abc"] == [
        ("up", None),
        ("up", None),
        ("down: carrier", said.format("db1")),
    ]
    store.apply(manifest(acme=carrier(policies=[CARRIAGE])))
    assert set(states(store, "port").values()) == {("up", None)}
    store.apply(manifest(acme=carrier(policies=[CARRIAGE], routers={}, links={})))
    path = "in network acme there is no path between host db1 and any other in use"
    assert states(store, "port")["acme/in/c"] == ("down: carrier", path)


def test_a_lost_machine_takes_down_what_lives_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heard, "GONE", -1.0)
    store.apply(manifest(acme=carrier(), other=acme()))
    machine = store.machine_row("m2")
    assert states(store, "port")["acme/in/b"] == ("up", None), "who never came is not lost"
    store.report("m2", store.revision)
    store.heard.leave(machine)
    ports = states(store, "port")
    down = {path for path, state in ports.items() if state == ("down: carrier", "machine m2 says nothing")}
    assert down == {"acme/web2", "acme/in/b", "other/web2"}
    assert {state for path, state in ports.items() if path not in down} == {("up", None)}
    store.heard.come(machine)
    assert set(states(store, "port").values()) == {("up", None)}
    store.fence("m2", True)
    assert states(store, "port")["acme/in/b"] == ("down: carrier", "machine m2 is fenced")


def test_who_may_not_see_a_carrier_is_not_told_what_it_is(store: Store) -> None:
    theirs = {**carrier()["networks"]["in"], "tenant": "guest"}
    store.apply(manifest(acme=carrier(tenant="owner", networks={"in": theirs})))
    store.set_enabled("port", "acme/web2", False)
    guest = Scope(frozenset({"guest"}), frozenset({"guest"}))
    port = store.get("port", "in/b", guest)
    assert (port["state"], port["cause"]) == ("down: carrier", "what carries it is down")
    (found, _) = store.list("network", scope=guest)
    assert [one["cause"] for one in found] == ["1 of 3 hosts are down: what carries it is down"]
    owner = Scope(frozenset({"owner"}), frozenset({"owner"}))
    closed = {key: value for key, value in carrier(tenant="owner", enabled=False).items() if key != "networks"}
    plan = store.plan(manifest(acme=closed), scope=owner)
    assert plan.disturbs == (
        "acme is disabled: 3 ports cut off",
        "what 1 networks of other tenants that are carried would notice: 1 more",
    )


def stands(world: World, network: Network, host: int, lost: Mapping[int, str]) -> bool:
    at, below = host, network
    while below.carrier != FABRIC:
        at, below = world.ports[at].host, world.networks[below.carrier]
    return at not in lost and _is_carried(world, network, host, host)


@settings(max_examples=100)
@given(st.data())
def test_down_is_what_passes_nothing(data: st.DataObject) -> None:
    """By the definition: a host is down if and only if it is disabled, or lost, or reaches no other that is not."""
    world: World = data.draw(worlds())
    for _ in range(data.draw(st.integers(0, 4))):
        world = a_change(data.draw, world, kinds=["network", "port", "add policy", "link"])
    lost = {machine: "lost" for machine in world.machines if data.draw(st.integers(0, 5)) == 0}
    for network in world.networks.values():
        hosts = {port.host for port in world.ports_in(network.id)}
        if network.carrier != FABRIC and any(world.ports[h].network != network.carrier for h in hosts):
            continue
        down = fallen(world, network, hosts, Lost(lost))
        standing = {host for host in hosts if stands(world, network, host, lost)}
        for host in hosts:
            others = standing - {host}
            passes = any(
                _is_carried(world, network, *pair) for other in others for pair in ((host, other), (other, host))
            )
            assert (host in down) == (host not in standing or bool(others and not passes)), (network, host, down)


# ---- another carrier


LEAF = {"segments": LAN, "ports": {name: {"segment": "lan", "host": name} for name in "abc"}}
BESIDE = {
    name: {"segment": "lan", "host": f"m{place}", "hosts": True} for place, name in enumerate(("x", "y", "web1"), 1)
}


def forest(store: Store) -> None:
    """acme carries `in` on three hosts, and that `deep`; beside it another network with hosts."""
    within = {**carrier()["networks"]["in"], "networks": {"deep": LEAF}}
    store.apply(manifest(acme=carrier(networks={"in": within}), beta={"segments": LAN, "ports": BESIDE}))


def carried_by(store: Store) -> dict[str, str | None]:
    return {path: one["carrier"] for path, one in items(store, "network").items()}


def test_a_network_goes_to_another_carrier_with_all_that_it_carries(store: Store) -> None:
    forest(store)
    ids = {path: port["id"] for path, port in items(store, "port").items()}
    vnis = {path: one["vni"] for path, one in items(store, "segment").items()}
    before = store.revision
    revision, machines, network = store.recarry("acme/in", "beta", {"a": "y", "b": "x", "c": "web1"})
    assert (revision, network["path"], network["carrier"]) == (before + 1, "beta/in", "beta")
    assert machines == ["m1", "m2", "m3"]
    assert carried_by(store) == {"acme": None, "beta": None, "beta/in": "beta", "beta/in/deep": "beta/in"}
    ports = items(store, "port")
    places = {path: (port["host"], port["machine"]) for path, port in ports.items() if path.startswith("beta/in/")}
    on_in = {"a": ("y", "m2"), "b": ("x", "m1"), "c": ("web1", "m3")}
    assert places == {
        **{f"beta/in/{name}": place for name, place in on_in.items()},
        **{f"beta/in/deep/{name}": (name, machine) for name, (_, machine) in on_in.items()},
    }
    assert ports["beta/in/a"]["id"] == ids["acme/in/a"], "the same objects"
    assert items(store, "segment")["beta/in/lan"]["vni"] == vnis["acme/in/lan"]
    told = store.events_after(store.last_events(1), 1)[0][1]
    assert told["text"].startswith("recarry: 4 changed: network beta/in")
    assert told["changes"][0]["fields"] == {"carrier": ["acme", "beta"], "path": ["acme/in", "beta/in"]}
    assert store.recarry("beta/in", "beta")[0] == revision == store.revision, "done already"

    assert store.recarry("beta/in/deep", None, {"a": "m1", "b": "m1", "c": "m3"})[2]["path"] == "deep"
    assert store.recarry("deep", "acme", {"a": "web1", "b": "web1", "c": "db1"})[2]["path"] == "acme/deep"
    assert items(store, "port")["acme/deep/c"]["machine"] == "m3"


def test_a_host_that_has_the_same_name_is_taken(store: Store) -> None:
    store.apply(manifest(acme=carrier(), beta=carrier(networks={})))
    store.recarry("acme/in", "beta")
    assert {path: port["host"] for path, port in items(store, "port", "beta/in").items()} == {
        f"beta/in/{name}": host for name, host in zip("abc", HOSTS, strict=True)
    }


def test_what_machines_need_follows(store: Store) -> None:
    """After any changes of carriers, changes since any revision and a snapshot are the same for every machine."""
    forest(store)
    worlds: dict[tuple[str, int], World] = {}
    below: dict[tuple[str, int], frozenset[int]] = {}
    for turn in range(7):
        for name in MACHINES:
            row = store.machine_row(name)
            snapshot = store.snapshot_for(row)
            whole = {(kind, id): value for kind, id, value in snapshot.rows if value is not None}
            below[name, store.revision] = snapshot.below
            for since in range(store.revision - turn, store.revision):
                known = dict(worlds[name, since].values)
                batch = store.changes_since(row, since)
                assert batch is not None
                for kind, id, value in batch.rows:
                    if value is None:
                        known.pop((kind, id), None)
                    else:
                        known[kind, id] = value
                assert known == whole, (name, since, turn)
                nobody_sleeps(store.touched(since), row, below[name, since], batch)
            worlds[name, store.revision] = World(whole)
        match turn:
            case 0:
                store.recarry("acme/in", "beta", {"a": "x", "b": "x", "c": "y"})
            case 1:
                store.recarry("beta/in/deep", "beta", {"a": "x", "b": "y", "c": "web1"})
            case 2:
                store.recarry("beta/in", None, {"a": "m3", "b": "m3", "c": "m2"})
            case 3:
                store.recarry("beta/deep", "in", {"a": "a", "b": "b", "c": "a"})
            case 4:
                store.recarry("in", "acme", {"a": "web1", "b": "db1", "c": "db1"})
            case 5:
                store.delete("network", "acme/in", cascade=True)


def refusals(store: Store) -> Iterator[tuple[str, str, str | None, dict[str, str]]]:
    """What cannot be: what it is, a network, its carrier to be, hosts."""
    yield "itself", "acme", "acme", {}
    yield "what it carries", "acme", "acme/in", {}
    yield "what that carries", "acme", "acme/in/deep", {}
    yield "a carrier that is not there", "acme/in", "bets", {}
    yield "a host that is not there", "acme/in", "beta", {"a": "x", "b": "y", "c": "web2"}
    yield "hosts that are called otherwise", "acme/in/deep", "beta", {"a": "x"}
    yield "a host of another network", "acme/in/deep", "beta", {"a": "x", "b": "y", "c": "db1"}
    yield "a port that is no host", "acme/in/deep", "plain", {"a": "p", "b": "p", "c": "p"}
    yield "a host of the other family", "acme/in/deep", "six", {"a": "p", "b": "p", "c": "p"}
    yield "a machine that is not there", "acme/in", None, {"a": "m1", "b": "m4", "c": "m1"}
    yield "a port for a machine", "acme/in", None, {"a": "m1", "b": "web2", "c": "m1"}
    yield "a port that it does not have", "acme/in", "beta", {"a": "x", "b": "x", "c": "x", "aa": "x"}
    yield "a name that is taken", "acme/in", "plain", {"a": "p", "b": "p", "c": "p"}
    yield "a name that the wire has", "plain/beta", None, {}
    yield "more rates than one way has", "rated", "line", {"p": "p"}
    yield "what a machine has given away", "acme/in/deep", "beta", {"a": "x", "b": "x", "c": "x"}


def test_golden_what_cannot_be_carried_so(store: Store) -> None:
    forest(store)
    port = {"segment": "lan", "host": "m1", "hosts": True}
    six = {"lan": {"cidr": "fd00::/64"}}
    store.apply(
        manifest(
            plain={
                "segments": LAN,
                "ports": {"p": {**port, "hosts": False}, "q": port},
                "networks": {"in": {}, "beta": {}},
            },
            six={"segments": six, "ports": {"p": port}},
            rated={"segments": LAN, "ports": {"p": {"segment": "lan", "host": "m1", "rate": "1gbit"}}},
            line={
                "segments": {**LAN, "far": {"cidr": "10.0.1.0/24"}},
                "routers": {
                    "r0": {"segments": ["lan"]},
                    **{f"r{n}": {} for n in range(1, 7)},
                    "r7": {"segments": ["far"]},
                },
                "links": {f"l{n}": {"between": [f"r{n}", f"r{n + 1}"], "rate": "1gbit"} for n in range(7)},
                "ports": {"p": port},
            },
            taken={"segments": LAN, "ports": {"p": {"segment": "lan", "host": "m1", "attach": {"netns": "shop"}}}},
        )
    )
    store.set_attach("acme/in/deep/b", Attach("netns", "shop"))
    before = (store.revision, {kind: items(store, kind) for kind in ("network", "port")})
    lines = []
    for what, network, to, hosts in refusals(store):
        with pytest.raises(NestnetError) as error:
            store.recarry(network, to, hosts)
        lines.append(f"{what}: {error.value.code}")
        told = [f"{p.pointer}: {p.code}: {p.message}" for p in getattr(error.value, "problems", ())] or [
            str(error.value)
        ]
        lines += [f"    {line}" for line in told]
        assert (store.revision, {kind: items(store, kind) for kind in ("network", "port")}) == before
    same(Path(__file__).parent / "golden" / "carriage.txt", "\n".join(lines) + "\n")


def test_of_two_edits_that_are_legal_alone_one_is_refused(store: Store) -> None:
    one = {"segments": LAN, "ports": {"p": {"segment": "lan", "host": "m1", "hosts": True}}}
    for first, second in (("a", "b"), ("b", "a")):
        store.apply(manifest(a=one, b=one), prune=True)
        store.recarry(first, second, {"p": "p"})
        with pytest.raises(Conflict) as error:
            store.recarry(second, f"{second}/{first}", {"p": "p"})
        assert error.value.code == "carrier_cycle"
        store.recarry(f"{second}/{first}", None, {"p": "m1"})
    for _ in range(20):
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(lambda pair: tried(store, *pair, {"p": "p"}), (("a", "b"), ("b", "a"))))
        assert sorted(done) == ["", "carrier_cycle"], done
        (inner,) = (path for path, up in carried_by(store).items() if up is not None)
        store.recarry(inner, None, {"p": "m1"})


def tried(store: Store, network: str, carrier: str | None, hosts: dict[str, str]) -> str:
    try:
        store.recarry(network, carrier, hosts)
    except NestnetError as error:
        return error.code
    return ""


EDITS = int(os.environ.get("NESTNET_RECARRIES", "240"))


def test_random_concurrent_edits_leave_a_forest(tmp_path: Path) -> None:
    """Eight threads give networks other carriers at random, by id. After each commit the carriers are a forest."""
    one = {"segments": LAN, "ports": {"p": {"segment": "lan", "host": "m1", "hosts": True}}}
    store = Store(tmp_path / "store.db")
    store.join("m1", "192.0.2.1")
    store.apply(manifest(**{f"n{place}": one for place in range(12)}))
    ids = [network["id"] for network in items(store, "network").values()]
    rows = {id: store.identity.row("network", id) for id in ids}
    looked: list[int] = []
    broken: list[str] = []

    def look(revision: int) -> None:
        with contextlib.closing(sqlite3.connect(store.folder / "store.db")) as connection:
            carriers = dict(connection.execute("SELECT id, carrier FROM network WHERE id > 0").fetchall())
        for network in carriers:
            way = [network]
            while (up := carriers[way[-1]]) != FABRIC:
                if up in way or len(way) > len(carriers):
                    broken.append(f"revision {revision}: {way}")
                    break
                way.append(up)
        looked.append(revision)

    store.changed = look
    outcomes: Counter[str] = Counter()

    def edit(seed: int) -> Counter[str]:
        rng = random.Random(seed)
        done: Counter[str] = Counter()
        for _ in range(EDITS // 8):
            network, to = rng.choice(ids), rng.choice([*ids, None])
            done[tried(store, network, to, {"p": "m1" if to is None else "p"})] += 1
        return done

    with ThreadPoolExecutor(8) as pool:
        for done in pool.map(edit, range(8)):
            outcomes.update(done)
    assert not broken
    assert outcomes.keys() <= {"", "carrier_cycle", "duplicate_name"}, outcomes
    assert outcomes["carrier_cycle"] > EDITS // 20
    assert len(looked) > EDITS // 10
    assert set(rows.values()) == {store.identity.row("network", one["id"]) for one in items(store, "network").values()}
    for path, port in items(store, "port").items():  # every chain of hosts ends at the machine
        assert port["machine"] == "m1", path
    store.close()


def test_a_tree_is_at_most_64_levels_high(store: Store) -> None:
    one = {"segments": LAN, "ports": {"p": {"segment": "lan", "host": "p", "hosts": True}}}

    def tower(levels: int) -> dict[str, Any]:
        spec: dict[str, Any] = one
        for _ in range(levels - 1):
            spec = {**one, "networks": {"n": spec}}
        return {**spec, "ports": {"p": {"segment": "lan", "host": "m1", "hosts": True}}}

    store.apply(manifest(a=tower(32), b=tower(32), c=tower(33)))
    top = "/".join(["a", *["n"] * 31])
    with pytest.raises(Invalid) as error:
        store.recarry("c", top, {"p": "p"})
    (problem,) = error.value.problems
    assert (problem.code, problem.pointer, problem.limit) == ("too_deep", "/carrier", 64)
    assert "c has 33 levels" in problem.message
    store.recarry("b", top, {"p": "p"})
    assert max(len(path.split("/")) for path in items(store, "network")) == 64
    assert store.plan(manifest(c=tower(33))).changes == ()
    with pytest.raises(Conflict, match="nothing is carried by what it carries"):
        store.recarry("a", f"{top}/b", {"p": "p"})


def test_nobody_is_carried_by_what_is_not_theirs(store: Store) -> None:
    mine, theirs = {"tenant": "mine"}, {"tenant": "theirs"}
    leaf = {"segments": LAN, "ports": {"p": {"segment": "lan", "host": "m1", "hosts": True}}}
    store.apply(manifest(a={**leaf, **mine}, b={**leaf, **theirs}, c={**leaf, **mine, "networks": {"a": theirs}}))
    me = Asked(scope=Scope(frozenset({"mine"}), frozenset({"mine"})))
    before = store.revision
    with pytest.raises(NotFound) as missing:
        store.recarry("a", "nowhere", {"p": "p"}, me)
    with pytest.raises(NotFound) as hidden:
        store.recarry("a", "b", {"p": "p"}, me)
    assert str(hidden.value) == str(missing.value).replace("nowhere", "b")
    with pytest.raises(NotFound):
        store.recarry("b", "a", {"p": "p"}, me)
    reader = Asked(scope=Scope(frozenset({"mine", "theirs"}), frozenset({"mine"})))
    with pytest.raises(Forbidden):
        store.recarry("a", "b", {"p": "p"}, reader)
    with pytest.raises(Forbidden):
        store.recarry("b", "a", {"p": "p"}, reader)
    with pytest.raises(Conflict) as taken:
        store.recarry("a", "c", {"p": "p"}, me)
    assert taken.value.code == "duplicate_name"
    assert store.revision == before


def test_asked_twice_it_is_done_once_and_a_stale_plan_is_refused(store: Store) -> None:
    forest(store)
    plan = store.plan(manifest(beta={"description": "changed"}))
    etag = store.get("network", "acme/in")["etag"]
    asked = Asked(key="k", etags=(etag,))
    to = {"a": "x", "b": "x", "c": "x"}
    first = store.recarry("acme/in", "beta", to, asked)
    assert store.recarry("acme/in", "beta", to, asked) == first
    assert store.revision == first[0]
    with pytest.raises(Stale):
        store.recarry("beta/in", "acme", dict(zip("abc", HOSTS, strict=True)), Asked(etags=(etag,)))
    with pytest.raises(Stale):
        store.apply(manifest(beta={"description": "changed"}), asked=Asked(etags=(plan.etag,)))
    plan = store.plan(manifest(beta={"networks": {}}))
    store.recarry("beta/in", "acme", dict(zip("abc", HOSTS, strict=True)))
    with pytest.raises(Stale):
        store.apply(manifest(beta={"networks": {}}), asked=Asked(etags=(plan.etag,)))


# ---- deleting


def test_what_is_needed_says_by_what(store: Store) -> None:
    """Every kind: refused with the list, and nothing is gone."""
    within = {**carrier()["networks"]["in"], "tenant": "acme", "networks": {"deep": LEAF}}
    policies = [{"from": "port:web1", "to": "segment:db", "allow": "any"}, CARRIAGE]
    store.apply(manifest(acme=carrier(tenant="acme", policies=policies, networks={"in": within})))
    before = content(store)
    policy = next(path for path, one in items(store, "policy").items() if one["from"] == ["port:web1"])
    for kind, path, needed in (
        ("machine", "m1", {"port acme/web1"}),
        ("tenant", "acme", {"network acme", "network acme/in", "network acme/in/deep"}),
        ("network", "acme", {"network acme/in", "port acme/web1", "segment acme/web", "router acme/core",
                             "link acme/core-edge", f"policy {policy}"}),
        ("network", "acme/in", {"network acme/in/deep", "port acme/in/a", "segment acme/in/lan"}),
        ("segment", "acme/db", {"port acme/db1", "router acme/core", f"policy {policy}"}),
        ("router", "acme/edge", {"link acme/core-edge"}),
        ("port", "acme/web1", {"port acme/in/a", f"policy {policy}"}),
        ("port", "acme/in/b", {"port acme/in/deep/b"}),
    ):  # fmt: skip
        with pytest.raises(Conflict) as error:
            store.delete(kind, path)
        assert error.value.code == "in_use"
        assert needed <= set(error.value.dependants), (kind, path)
        assert all(one in str(error.value) for one in needed)
    assert content(store) == before


def big(ports: int) -> dict[str, Any]:
    """A network with so many ports, half of them in another that it carries, and policies that name some."""
    lan = {"lan": {"cidr": "10.0.0.0/16"}}
    below = {f"q{n}": {"segment": "lan", "host": "p0"} for n in range(ports // 2)}
    own = {f"p{n}": {"segment": "lan", "host": "m1", "hosts": n == 0, "groups": f"g{n % 9}"} for n in range(ports // 2)}
    policies = [{"from": f"port:p{n}", "to": f"group:g{n % 9}", "allow": "any"} for n in range(20)]
    return {
        "segments": lan,
        "ports": own,
        "policies": policies,
        "networks": {"below": {"segments": lan, "ports": below}},
    }


def test_a_large_network_goes_in_parts_deepest_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion, "PART", 50)
    store.apply(manifest(large=big(300), other=acme()))
    before = {path: item for path, item in content(store).items() if " other" in path}
    seen: list[tuple[int, int, int]] = []
    open_: list[bool] = []

    def look(_revision: int) -> None:
        paths = items(store, "network")
        if "large" in paths:
            open_.append(paths["large"]["enabled"])
        seen.append((len(items(store, "port", "large/below")) if "large/below" in paths else 0,
                     len(items(store, "port", "large")) if "large" in paths else 0, len(paths)))  # fmt: skip

    store.changed = look
    revision = store.delete("network", "large", cascade=True, asked=Asked(key="k"))
    assert len(seen) >= 7
    assert seen == sorted(seen, reverse=True)
    assert all(above == 150 for below, above, _ in seen if below), "what is carried goes first"
    assert open_ == [False] * len(open_), "closed from the first part on"
    assert revision == store.revision
    assert content(store) == before
    assert store.delete("network", "large", cascade=True, asked=Asked(key="k")) == revision, "done once"
    with pytest.raises(NotFound):
        store.delete("network", "large", cascade=True, asked=Asked(key="another"))


def test_a_large_deletion_that_was_interrupted_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever part it ends: the same request, ETag and all, finishes it."""
    monkeypatch.setattr(deletion, "PART", 50)
    for parts in range(1, 8):
        store.apply(manifest(large=big(300)))
        etag = store.get("network", "large")["etag"]
        asked = Asked(key=f"k{parts}", etags=(etag,))
        left = [parts]

        def stop(_revision: int, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        store.changed = stop
        with pytest.raises(KeyboardInterrupt):
            store.delete("network", "large", cascade=True, asked=asked)
        store.changed = lambda _revision: None
        assert items(store, "network")["large"]["state"] == "down: disabled"
        # Somebody puts something into it meanwhile: that goes, too.
        store.apply(manifest(large={"networks": {"below": {}, "new": {"segments": LAN}}}))
        revision = store.delete("network", "large", cascade=True, asked=asked)
        assert revision == store.revision
        assert content(store) == {}
        assert store.delete("network", "large", cascade=True, asked=asked) == revision


def test_no_part_of_a_deletion_holds_the_writer_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wants to write meanwhile waits for the part that is being written, not for all."""
    store = Store(tmp_path / "store.db")
    store.join("m1", "192.0.2.1")
    store.apply(manifest(large=big(6_000), other={"segments": LAN}))
    passed: list[int] = []  # by how many revisions others were before a write that had asked for its turn
    done, real = Event(), store._database.transact

    def transact(work: Callable[[Connection], Any]) -> Any:
        if threading.current_thread() is threading.main_thread():
            return real(work)
        asked = store.revision

        def turn(connection: Connection) -> Any:
            passed.append(objects.current_revision(connection) - asked)
            return work(connection)

        return real(turn)

    monkeypatch.setattr(store._database, "transact", transact)

    def keep_writing() -> None:
        for turn in count():
            store.apply(manifest(other={"description": f"turn {turn}"}))
            if done.wait(0.01):
                return

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(keep_writing)
        before = store.revision
        store.delete("network", "large", cascade=True)
        done.set()
        writing.result()
    parts = store.revision - before - len(passed)
    print(
        f"6,000 ports gone in {parts} parts; before each of {len(passed)} other writes so many had their turn: {passed}"
    )
    assert parts >= 6
    assert max(passed) <= 2, passed
    assert list(items(store, "network")) == ["other"]
    store.close()


# ---- hosts are ports


def test_hosts_of_the_fabric_and_of_a_network_have_one_shape(store: Store) -> None:
    theirs = {**LEAF, "tenant": "guest", "ports": {"v": {"segment": "lan", "host": "a"}}}
    within = {**carrier()["networks"]["in"], "tenant": "owner", "networks": {"deep": theirs}}
    store.apply(
        manifest(acme=carrier(tenant="owner", networks={"in": within}), other={"tenant": "guest", "segments": LAN})
    )
    fabric, _ = store.hosts()
    acme_hosts, _ = store.hosts("acme")
    in_hosts, _ = store.hosts("acme/in")
    assert {tuple(host) for host in (*fabric, *acme_hosts, *in_hosts)} == {tuple(fabric[0])}
    assert [(one["name"], one["network"], one["networks"], one["ports"]) for one in fabric] == [
        (name, None, 1, 1) for name in MACHINES
    ]
    assert [(one["path"], one["machine"], one["networks"], one["ports"]) for one in acme_hosts] == [
        ("acme/web1", "m1", 1, 1),
        ("acme/web2", "m2", 1, 1),
        ("acme/db1", "m3", 1, 1),
    ]
    assert next((one["name"], one["ports"], one["addresses"]) for one in in_hosts) == ("a", 1, ["10.0.0.2/24"])
    assert store.hosts("other") == ([], None)

    pages, cursor = [], None
    while True:
        page, cursor = store.hosts("acme", limit=2, cursor=cursor)
        pages.append([one["name"] for one in page])
        if cursor is None:
            break
    assert pages == [["web1", "web2"], ["db1"]]
    with pytest.raises(Invalid, match="cursor"):
        store.hosts(cursor=store.hosts("acme", limit=1)[1])

    store.set_enabled("port", "acme/web1", False)
    said = [(one["state"], one["cause"]) for one in (store.hosts("acme")[0][0], store.hosts("acme/in")[0][0])]
    assert said == [("down: disabled", "port acme/web1 is disabled"), ("down: carrier", "port acme/web1 is disabled")]
    store.fence("m2", True)
    assert [one["state"] for one in store.hosts()[0]] == ["up", "down: disabled", "up"]

    guest = Scope(frozenset({"guest"}), frozenset({"guest"}))
    with pytest.raises(NotFound):
        store.hosts("acme", scope=guest)
    assert store.hosts(scope=guest) == ([], None)
    store.grant(None, "guest")
    seen, _ = store.hosts(scope=guest)
    assert [(one["name"], one["addresses"], one["networks"], one["ports"]) for one in seen] == [
        (name, [], 0, 0) for name in MACHINES
    ]
    owner = Scope(frozenset({"owner"}), frozenset({"owner"}))
    assert [one["ports"] for one in store.hosts("acme/in", scope=owner)[0]] == [0, 0, 0], (
        "what is others' is not counted"
    )


# ---- limits


def test_a_bomb_of_networks_is_refused_by_quota(store: Store) -> None:
    """64 levels, and 30 networks on each: counted, not made."""
    spec: dict[str, Any] = {}
    for _ in range(63):
        spec = {"networks": {"n": spec, **{f"m{place}": {} for place in range(29)}}}
    bomb = {
        "apiVersion": "nestnet/v1",
        "tenants": {"t": {"quota": {"networks": 100}}},
        "networks": {"n": {"tenant": "t", **spec}},
    }
    before = store.revision
    begun = time.monotonic()
    with pytest.raises(Exhausted) as error:
        store.apply(parse(bomb))
    assert time.monotonic() - begun < 20
    assert (error.value.code, error.value.limit) == ("quota_exceeded", 100)
    assert "1891" in str(error.value)
    assert store.revision == before
    assert items(store, "network") == {}


def test_nothing_leaves_a_carried_network_too_little(store: Store) -> None:
    """One MTU is everywhere in flat carriage: the machines'. None goes below what a network needs, at any depth."""
    small = {**carrier()["networks"]["in"], "mtu": 1400}
    store.apply(manifest(acme=carrier(networks={"in": small})))
    before = content(store)
    with pytest.raises(Invalid) as error:
        store.join("m1", "192.0.2.1", mtu=1440)
    (problem,) = error.value.problems
    assert (problem.code, problem.limit) == ("mtu_too_small", 1450)
    assert "in has chosen 1400" in problem.message
    assert content(store) == before
    store.join("m1", "192.0.2.1", mtu=1450)
    with pytest.raises(Invalid) as error:
        store.apply(manifest(acme={"networks": {"in": {**small, "mtu": 1401}}}))
    assert [(p.code, p.limit) for p in error.value.problems] == [("mtu_too_large", 1400)]


# What is remembered of carriers (store/standing.py, store/still.py)


class _Undone(Exception):
    pass


def seen(store: Store) -> Any:
    return [store.list(kind)[0] for kind in ("network", "port")], store.hosts("acme")[0]


def afresh(store: Store) -> Any:
    """The same from one that remembers nothing."""
    remembered, store._chains = store._chains, Chains(store._database.read)
    try:
        return seen(store)
    finally:
        store._chains = remembered


def is_still(connection: Connection) -> bool:
    """Is what a plan remembers what is there?"""
    ids = connection.scalars(select(tables.network.c.id).where(tables.network.c.id != FABRIC)).all()
    remembered = {id: one.contents for id, one in still.load(connection, ids, ids).items()}
    return remembered == objects.load_contents(connection, ids)


def edit(store: Store, rng: random.Random) -> None:
    """Something that may take something down, or up, or is refused."""
    network, port = (rng.choice(list(items(store, kind))) for kind in ("network", "port"))
    top = rng.choice(("acme", "beta"))
    policies: list[Any] = rng.choice(([], [CARRIAGE], [{"from": "any", "to": "any", "deny": "tcp/1"}]))
    with contextlib.suppress(NestnetError):
        match rng.randrange(12):
            case 8:
                store.set_attach(port, Attach("tap", f"t{rng.randrange(3)}"))
            case 9:
                store.move(port, rng.choice(("m1", "m2", "web1", "a", "b")))
            case 10:
                links = {"l": {"between": ["r1", "r2"], "cost": rng.randrange(1, 9)}} if rng.random() < 0.7 else {}
                store.apply(manifest(**{top: {"routers": {"r1": {}, "r2": {}}, "links": links}}))
            case 11:
                store.set_link(f"{top}/l", rng.random() < 0.5)
            case 0 | 1:
                store.set_enabled("network", network, rng.random() < 0.5)
            case 2:
                store.set_enabled("port", port, rng.random() < 0.5)
            case 3:
                store.apply(manifest(**{top: {"policies": policies, "mtu": rng.choice((1400, 1450))}}))
            case 4:
                store.recarry("acme/in", rng.choice(("acme", "beta")), {"a": "web1", "b": "web1", "c": "web1"})
            case 5:
                host = rng.choice(("a", "b", "c"))
                store.apply(manifest(acme={"networks": {"in": {"networks": {"top": top_on(host)}}}}))
            case 6:
                store.delete("port", port)
            case _:
                store.join("m3", "192.0.2.3", mtu=rng.choice((1500, 1600)))


def top_on(host: str) -> dict[str, Any]:
    return {"carriage": "encapsulated", "segments": LAN, "ports": {"p": {"segment": "lan", "host": host}}}


@pytest.mark.parametrize("seed", range(3))
def test_what_is_remembered_of_carriers_is_what_is_stored(
    store: Store, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every change, one that was undone in the middle, and a restore."""
    monkeypatch.setattr(still, "changed", lambda *_: None)  # It is the version that tells, whoever reads first.
    rng = random.Random(seed)
    forest(store)
    told = set()
    for place in range(45):
        if place == 15:
            store.backup(tmp_path / "backup")
        edit(store, rng)
        assert seen(store) == afresh(store)
        with store._database.read() as connection:
            assert is_still(connection)
        told |= {one["state"] for many in seen(store)[0] for one in many}
        with contextlib.suppress(_Undone), store._database.write() as connection:
            (row,) = objects.networks(
                connection, "id", [store.identity.row("network", items(store, "network")["acme"]["id"])]
            )
            write.write(connection, store.identity, [(row, replace(row, enabled=not row.enabled))])
            within = store._reader(connection)
            within.chains = Chains(store._database.read)
            expected = within.page("network")
            assert store._reader(connection).page("network") == expected != store.list("network")
            assert is_still(connection)
            raise _Undone
        assert seen(store) == afresh(store)
    assert {"up", "down: carrier"} <= told
    store.restore(tmp_path / "backup")
    assert seen(store) == afresh(store)
    with store._database.read() as connection:
        assert is_still(connection)


def test_what_is_below_is_read_by_whoever_changed_it(store: Store) -> None:
    """Who asks next finds it read: their answer takes as many statements as the one before."""
    forest(store)
    asked: list[str] = []
    event.listen(
        store._database.engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: asked.append(statement)
    )

    def look() -> int:
        asked.clear()
        assert items(store, "network", "acme/in")
        return len(asked)

    look()
    remembered = look()
    for up in (False, True):
        store.set_link("acme/core-edge", up)
        assert look() == remembered
        store.set_enabled("network", "beta", up)
        assert look() == remembered
    with (
        store._database.write() as connection
    ):  # By somebody else, a restored file perhaps: then it is read when asked.
        connection.execute(tables.network.update().values(version=tables.network.c.version + 1))
    assert look() > remembered == look()
