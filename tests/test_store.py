"""The store: what an apply does and refuses, and that nothing it does depends on what was there before."""

from __future__ import annotations

import json
import random
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from ipaddress import ip_address
from itertools import permutations
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, select
from woken import nobody_sleeps

from nestnet.model.errors import Ambiguous, Conflict, Exhausted, Invalid, NestnetError, NotFound
from nestnet.model.manifest import Manifest, parse
from nestnet.model.values import FABRIC, Attach, Link, Machine, Network, Port, Segment, Value, World, kind_of
from nestnet.model.wire import from_wire, to_wire
from nestnet.store import Store, tables
from nestnet.store.database import migrate, open_engine
from nestnet.store.identity import Identity
from nestnet.store.once import Asked

MACHINES = ("m1", "m2", "m3")
CAMPUS = {"campus": "eth1"}
KINDS = ("machine", "tenant", "network", "segment", "router", "link", "port", "policy")


@cache
def migrated() -> bytes:
    """A file that the migrations have made, and nothing is in it: they take six times as long as all else of opening
    it."""
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(Path(folder) / "store.db")
        migrate(engine)
        engine.dispose()
        return (Path(folder) / "store.db").read_bytes()


@contextmanager
def new_store(trunks: dict[str, str] | None = None, **more: Any) -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "store.db").write_bytes(migrated())
        store = Store(Path(folder) / "store.db", **more)
        for place, name in enumerate(MACHINES, 1):
            store.join(name, f"192.0.2.{place}", trunks=trunks)
        yield store
        store.close()


@pytest.fixture
def store() -> Iterator[Store]:
    with new_store() as made:
        yield made


def manifest(**networks: Any) -> Manifest:
    return parse({"apiVersion": "nestnet/v1", "networks": networks})


def acme(**more: Any) -> dict[str, Any]:
    return {
        "segments": {"web": {"cidr": "10.0.0.0/24"}, "db": {"cidr": ["10.0.1.0/24", "fd00:1::/64"]}},
        "routers": {"core": {"segments": ["web", "db"]}, "edge": {}},
        "links": {"core-edge": {"between": ["core", "edge"], "cost": 10}},
        "ports": {
            "web1": {"segment": "web", "host": "m1"},
            "web2": {"segment": "web", "host": "m2", "hosts": True, "groups": "front"},
            "db1": {"segment": "db", "host": "m3", "groups": ["back"], "owns": "172.16.0.0/16"},
        },
        "policies": [{"from": "front", "to": "back", "allow": "tcp/5432"}],
        **more,
    }


STAGING = {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": {"a": {"segment": "lan", "host": "web2"}}}


def items(store: Store, kind: str, network: str | None = None) -> dict[str, dict[str, Any]]:
    found, cursor = store.list(kind, network, limit=1000)
    assert cursor is None
    return {item["path"]: item for item in found}


def addresses(store: Store) -> dict[str, list[str]]:
    return {path: port["addresses"] for path, port in items(store, "port").items()}


# The database


def test_the_migrations_make_the_tables(store: Store) -> None:
    with store._database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []


def test_it_is_safe_by_its_pragmas(store: Store) -> None:
    with store._database.read() as connection:
        pragmas = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in PRAGMAS}
    assert pragmas == PRAGMAS


PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_it_opens_what_it_stored(tmp_path: Path) -> None:
    first = Store(tmp_path / "store.db")
    machine = first.join("m1", "192.0.2.1")
    token = first.identity.seal(1)
    first.close()
    second = Store(tmp_path / "store.db")
    assert second.get("machine", machine["id"])["name"] == "m1"
    assert second.identity.unseal(token) == 1
    second.close()


# Identities


@given(st.integers(0, 2**63 - 1))
def test_public_ids_are_a_permutation(row: int) -> None:
    identity = Identity("epoch", b"key")
    public = identity.public("port", row)
    assert identity.row("port", public) == row
    assert identity.row("segment", public) is None
    assert identity.row("segment", public.replace("port", "segment")) != row


@given(st.integers(1, 2**63 - 1), st.integers(1, 2**63 - 1))
def test_numbers_of_a_domain_are_a_permutation(row: int, domain: int) -> None:
    identity = Identity("epoch", b"key")
    number = identity.number("port", row, domain)
    assert 0 < number < 2**63
    assert identity.numbered("port", number, domain) == row
    assert identity.number("port", row, FABRIC) == identity.numbered("port", row, FABRIC) == row
    assert [identity.number("port", 0, domain), identity.numbered("port", 0, domain)] == [0, 0]
    others = [identity.number("segment", row, domain), Identity("epoch", b"another").number("port", row, domain)]
    assert number not in [*others, identity.number("port", row, domain ^ 1)]
    assert Identity("later", b"key").number("port", row, domain) == number, "a restore is no news"


def test_public_ids_and_macs_do_not_rise_or_meet() -> None:
    identity = Identity("epoch", b"key")
    ids = [identity.public("port", row) for row in range(1, 1001)]
    assert len(set(ids)) == 1000
    assert ids != sorted(ids)
    macs = {identity.mac("port", row) for row in range(1, 10001)}
    assert len(macs) == 10000
    assert {mac >> 40 for mac in macs} == {0x02}
    assert identity.mac("router", 1) >> 40 == 0x06


@pytest.mark.parametrize("token", ["", "x", "é", "AAAA", "...."])
def test_a_token_cannot_be_made_up(token: str) -> None:
    mine, other = Identity("epoch", b"key"), Identity("epoch", b"another")
    assert mine.unseal(token) is None
    assert mine.unseal(other.seal(7)) is None
    assert Identity("later", b"key").unseal(mine.seal(7)) is None


# Applying


def test_addresses_are_the_lowest_free_and_gateways_the_first(store: Store) -> None:
    store.apply(manifest(acme=acme()))
    assert addresses(store) == {
        "acme/web1": ["10.0.0.2/24"],
        "acme/web2": ["10.0.0.3/24"],
        "acme/db1": ["10.0.1.2/24", "fd00:1::2/64"],
    }
    core = store.get("router", "acme/core")
    assert core["segments"] == {"web": ["10.0.0.1"], "db": ["10.0.1.1", "fd00:1::1"]}
    assert store.get("port", "db1")["gateways"] == ["10.0.1.1", "fd00:1::1"]


def test_an_address_once_allocated_stays_unless_somebody_chooses_it(store: Store) -> None:
    segments = {"s": {"cidr": "10.0.0.0/28"}}
    ports: dict[str, dict[str, Any]] = {name: {"segment": "s", "host": "m1"} for name in ("a", "b", "c")}
    store.apply(manifest(n={"segments": segments, "ports": ports}))
    del ports["a"]
    store.apply(manifest(n={"ports": ports}))
    assert addresses(store) == {"n/b": ["10.0.0.3/28"], "n/c": ["10.0.0.4/28"]}
    mac = store.get("port", "n/b")["mac"]
    plan = store.plan(manifest(n={"ports": {**ports, "z": {"segment": "s", "host": "m1", "address": "10.0.0.3"}}}))
    assert plan.disturbs == ("n/b: address 10.0.0.3 becomes 10.0.0.2, its connections end",)
    ports["z"] = {"segment": "s", "host": "m2", "address": "10.0.0.1", "mac": mac}
    store.apply(manifest(n={"ports": ports}))
    assert addresses(store)["n/z"] == ["10.0.0.1/28"]
    assert store.get("port", "n/z")["mac"] == mac != store.get("port", "n/b")["mac"]


def test_ports_may_exchange_addresses_and_macs(store: Store) -> None:
    def port(last: int) -> dict[str, Any]:
        return {"segment": "s", "host": "m1", "address": f"10.0.0.{last}", "mac": f"02:00:00:00:00:{last:02}"}

    segments = {"s": {"cidr": "10.0.0.0/24"}}
    store.apply(manifest(n={"segments": segments, "ports": {"a": port(5), "b": port(6)}}))
    store.apply(manifest(n={"segments": segments, "ports": {"a": port(6), "b": port(5)}}))
    assert {p["name"]: (p["mac"], p["addresses"]) for p in items(store, "port").values()} == {
        "a": ("02:00:00:00:00:06", ["10.0.0.6/24"]),
        "b": ("02:00:00:00:00:05", ["10.0.0.5/24"]),
    }


def test_a_port_that_moves_to_another_segment_stays_the_same_port(store: Store) -> None:
    store.apply(manifest(acme=acme()))
    before = store.get("port", "acme/web1")
    ports = {**acme()["ports"], "web1": {"segment": "db", "host": "m1"}}
    plan = store.apply(manifest(acme={"ports": ports})).plan
    (change,) = plan.changes
    assert (change.op, change.kind, change.path) == ("~", "port", "acme/web1")
    assert change.fields["segment"] == ["web", "db"]
    assert "acme/web1: segment web becomes db, its connections end" in plan.disturbs
    after = store.get("port", "acme/web1")
    assert (after["id"], after["mac"]) == (before["id"], before["mac"])
    assert after["addresses"] == ["10.0.1.3/24", "fd00:1::3/64"]


def test_a_collection_that_is_absent_is_left_alone(store: Store) -> None:
    store.apply(manifest(acme=acme(networks={"staging": STAGING}), other=acme()))
    assert store.apply(manifest(acme={})).plan.changes == ()
    plan = store.apply(manifest(acme={"policies": []})).plan
    assert [(change.op, change.kind) for change in plan.changes] == [("-", "policy")]
    assert set(items(store, "network")) == {"acme", "acme/staging", "other"}
    plan = store.apply(manifest(acme={"networks": {}})).plan
    assert sorted(change.path for change in plan.changes) == ["acme/staging", "acme/staging/a", "acme/staging/lan"]
    assert set(items(store, "network")) == {"acme", "other"}


def test_what_is_left_alone_still_counts(store: Store) -> None:
    store.apply(manifest(acme=acme(networks={"staging": STAGING})))
    revision = store.revision
    ports = acme()["ports"]
    with pytest.raises(Invalid) as told:
        store.apply(manifest(acme={"ports": {"web1": ports["web1"], "db1": ports["db1"]}}))
    assert {problem.code for problem in told.value.problems} == {"unknown_name", "missing_host"}
    assert store.revision == revision
    assert "acme/web2" in items(store, "port")


def test_prune_deletes_other_networks_of_the_same_tenants(store: Store) -> None:
    mine = {**acme(), "tenant": "mine"}
    store.apply(manifest(a=mine, b={**mine, "networks": {"in-b": STAGING}}, c={**acme(), "tenant": "theirs"}, d=acme()))
    plan = store.apply(manifest(a=mine), prune=True).plan
    assert {change.op for change in plan.changes} == {"-"}
    assert set(items(store, "network")) == {"a", "c", "d"}


def test_what_is_fixed_at_creation_is_refused(store: Store) -> None:
    store.apply(manifest(acme={"tenant": "one"}))
    with pytest.raises(Conflict, match="tenant of network acme cannot be changed") as told:
        store.apply(manifest(acme={"tenant": "two"}))
    assert told.value.code == "immutable"


def test_machines_of_a_manifest_must_have_joined(store: Store) -> None:
    with pytest.raises(Invalid) as told:
        store.apply(parse({"apiVersion": "nestnet/v1", "machines": {"m1": {}, "m9": {}}}))
    assert [(p.code, p.pointer) for p in told.value.problems] == [("missing_machine", "/machines/m9")]


def test_a_plan_says_who_is_cut_off_and_who_gets_rows(store: Store) -> None:
    plan = store.plan(manifest(acme=acme(networks={"staging": STAGING})))
    assert plan.disturbs == ("acme/staging is cut off: no policy of acme allows carriage between its hosts",)
    assert plan.machines == ("m1", "m2", "m3")
    assert store.revision == len(MACHINES)


def test_an_mtu_follows_the_smallest_machine(store: Store) -> None:
    store.apply(manifest(acme=acme(), small={"mtu": 1300}))
    revision = store.revision
    store.join("m2", "192.0.2.2", mtu=1400)
    assert {n["name"]: n["mtu"] for n in items(store, "network").values()} == {"acme": 1350, "small": 1300}
    batch = store.changes_since(1, revision)
    assert batch is not None
    assert [(kind, id) for kind, id, _ in batch.rows] == [("machine", 2), ("network", 1)]
    with pytest.raises(Invalid) as told:
        store.join("m3", "192.0.2.3", mtu=1320)
    assert told.value.problems[0].code == "mtu_too_small"


def machines_of(**machines: Any) -> Manifest:
    return parse({"apiVersion": "nestnet/v1", "machines": machines})


def test_a_fabric_has_one_family_and_networks_follow_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store.db")
        store.apply(manifest(early={}))
        store.join("m1", "2001:DB8::1", nics=["eth0", "eth1"])
        assert items(store, "machine")["m1"]["address"] == "2001:db8::1"
        store.apply(manifest(acme={"ports": {}}, said={"underlay": 6}))
        networks = items(store, "network")
        assert {n["name"]: (n["underlay"], n["mtu"]) for n in networks.values()} == dict.fromkeys(
            ("early", "acme", "said"), (6, 1430)
        )
        with pytest.raises(Invalid) as told:
            store.join("m2", "192.0.2.2")
        assert told.value.problems[0].code == "mixed_families"
        with pytest.raises(Invalid) as told:
            store.apply(manifest(acme={"underlay": 4}))
        assert told.value.problems[0].code == "host_family"
        store.join("m1", "192.0.2.1")  # the only one may change
        assert {(n["underlay"], n["mtu"]) for n in items(store, "network").values()} == {(4, 1450)}
        store.close()


def test_a_manifest_moves_machines_that_have_joined(store: Store) -> None:
    store.apply(manifest(acme=acme()))
    before = store.revision
    moved = machines_of(m1={"address": "192.0.2.2", "nic": ["eth0", "eth1"]}, m2={"address": "192.0.2.1"}, m3={})
    plan = store.plan(moved)
    assert [(c.op, c.kind, c.path, c.fields, c.pointer) for c in plan.changes] == [
        ("~", "machine", "m1", {"address": ["192.0.2.1", "192.0.2.2"], "nic": [[], ["eth0", "eth1"]]}, "/machines/m1"),
        ("~", "machine", "m2", {"address": ["192.0.2.2", "192.0.2.1"]}, "/machines/m2"),
    ]
    assert plan.machines == MACHINES
    assert "machine m1: address 192.0.2.1 becomes 192.0.2.2" in plan.disturbs[0]
    store.apply(moved)
    assert not store.plan(moved)
    assert items(store, "machine")["m1"]["nics"] == ["eth0", "eth1"]
    *_, (_, event) = store.events_after(0, 100)
    assert event["text"] == "apply: 2 changed: machine m1, machine m2"
    batch = store.changes_since(1, before)
    assert batch is not None
    # Whose it is gets the names of its NICs; others do not.
    own = {value.id: value.nics for _, _, value in batch.rows if isinstance(value, Machine)}
    assert own == {1: ("eth0", "eth1"), 2: ()}
    other = store.changes_since(2, before)
    assert other is not None
    assert not any(value.nics for _, _, value in other.rows if isinstance(value, Machine))
    for wrong, code in (
        ({"m1": {"address": "192.0.2.3"}}, "duplicate_address"),
        ({"m1": {"address": "2001:db8::1"}}, "mixed_families"),
        ({"m1": {"mtu": 1310}}, "mtu_too_small"),
        ({"m9": {}}, "missing_machine"),
    ):
        with pytest.raises(Invalid) as told:
            store.apply(machines_of(**wrong))
        assert [p.code for p in told.value.problems] == [code], wrong
    store.apply(machines_of(m1={"mtu": 1400}))
    assert items(store, "network")["acme"]["mtu"] == 1350


# Numbers


def networks_of(*names: str) -> Manifest:
    return manifest(**{name: {"segments": {"s": {}}} for name in names})


def vnis(store: Store) -> list[int]:
    return sorted(segment["vni"] for segment in items(store, "segment").values())


def test_a_vni_space_ends_in_an_error_and_comes_back_when_all_have_realised() -> None:
    with new_store(vnis=8) as store:
        store.apply(networks_of(*"abcdefgh"))
        assert vnis(store) == [1, 2, 3, 4, 5, 6, 7, 8]
        for attempt in (store.plan, store.apply):
            with pytest.raises(Exhausted) as told:
                attempt(networks_of("i"))
            assert (told.value.code, told.value.limit) == ("vni_exhausted", 8)
        store.delete("network", "c", cascade=True)
        store.delete("network", "d", cascade=True)
        freed = store.revision
        with pytest.raises(Exhausted):
            store.apply(networks_of("i"))
        for machine in MACHINES[1:]:
            store.report(machine, freed)
        store.report("m1", freed - 1)
        store.apply(networks_of("i"))
        assert vnis(store) == [1, 2, 3, 5, 6, 7, 8]
        with pytest.raises(Exhausted):
            store.apply(networks_of("i", "j"))
        store.delete("machine", "m1")
        for machine in MACHINES[1:]:
            store.report(machine, store.revision)
        store.apply(networks_of("i", "j"))
        assert vnis(store) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_ids_are_never_used_again(store: Store) -> None:
    store.apply(networks_of("a"))
    before = store.get("network", "a")["id"]
    store.delete("network", "a", cascade=True)
    store.apply(networks_of("a"))
    assert store.get("network", "a")["id"] != before
    with pytest.raises(NotFound):
        store.get("network", before)


# Idempotency


def test_a_repeated_request_gets_its_first_answer(store: Store) -> None:
    first = store.apply(manifest(acme=acme()), asked=Asked(key="k"))
    store.delete("network", "acme", cascade=True)
    assert store.apply(manifest(acme=acme()), asked=Asked(key="k")) == first
    assert items(store, "network") == {}
    with pytest.raises(Conflict) as told:
        store.apply(manifest(), asked=Asked(key="k"))
    assert told.value.code == "key_reused"


def test_a_request_that_failed_may_be_repeated(store: Store) -> None:
    with pytest.raises(Invalid):
        store.apply(manifest(n={"segments": {}, "ports": {"p": {"segment": "s", "host": "m1"}}}), asked=Asked(key="k"))
    assert store.apply(networks_of("n"), asked=Asked(key="k")).revision == store.revision


# Finding and deleting


def test_a_name_that_fits_one_thing_is_enough(store: Store) -> None:
    store.apply(manifest(acme=acme(networks={"staging": STAGING}), other=acme()))
    assert store.get("port", "a")["path"] == "acme/staging/a"
    assert store.get("port", "staging/a")["path"] == "acme/staging/a"
    with pytest.raises(Ambiguous) as told:
        store.get("port", "web1")
    assert told.value.candidates == ("acme/web1", "other/web1")
    with pytest.raises(NotFound) as missing:
        store.get("port", "acme/wbe1")
    assert missing.value.nearest == "acme/web1"
    with pytest.raises(NotFound):
        store.get("port", "")


def test_lists_are_paged_by_key(store: Store) -> None:
    ports = {f"p{i}": {"segment": "s", "host": "m1"} for i in range(25)}
    store.apply(manifest(n={"segments": {"s": {"cidr": "10.0.0.0/24"}}, "ports": ports}, other=acme()))
    seen, cursor = store.list("port", "n", 10)
    store.delete("port", "n/p3")
    while cursor is not None:
        page, cursor = store.list("port", "n", 10, cursor)
        seen += page
    assert [port["name"] for port in seen] == list(ports)
    with pytest.raises(Invalid):
        store.list("port", cursor=store.get("segment", "n/s")["id"])


@pytest.mark.parametrize(
    ("kind", "path", "dependants"),
    [
        ("machine", "m3", ["port acme/db1"]),
        ("tenant", "t", ["network acme", "network acme/staging"]),
        (
            "network",
            "acme",
            [
                "network acme/staging",
                *("port acme/web1", "port acme/web2", "port acme/db1"),
                *("segment acme/web", "segment acme/db", "router acme/core", "router acme/edge", "link acme/core-edge"),
                "policy acme/",
            ],
        ),
        ("network", "acme/staging", ["port acme/staging/a", "segment acme/staging/lan"]),
        ("segment", "acme/db", ["port acme/db1", "router acme/core"]),
        ("router", "acme/edge", ["link acme/core-edge"]),
        ("port", "acme/db1", ["policy acme/"]),
        ("port", "acme/web2", ["port acme/staging/a", "policy acme/"]),
    ],
)
def test_nothing_is_deleted_while_something_depends_on_it(
    store: Store, kind: str, path: str, dependants: list[str]
) -> None:
    store.apply(manifest(acme=acme(tenant="t", networks={"staging": STAGING})))
    revision = store.revision
    with pytest.raises(Conflict) as told:
        store.delete(kind, path)
    assert told.value.code == "in_use"
    found = [one if not one.startswith("policy") else one.rpartition("/")[0] + "/" for one in told.value.dependants]
    assert found == dependants
    assert store.revision == revision


def test_everything_can_be_deleted_in_order(store: Store) -> None:
    store.apply(manifest(acme=acme(tenant="t", networks={"staging": STAGING})))
    for kind, path in (
        ("port", "acme/staging/a"),
        ("network", "acme/staging"),
        ("policy", next(iter(items(store, "policy")))),
        ("port", "acme/db1"),
        ("link", "acme/core-edge"),
        ("router", "acme/core"),
        ("segment", "acme/db"),
        ("port", "acme/web1"),
        ("port", "acme/web2"),
        ("segment", "acme/web"),
        ("router", "acme/edge"),
        ("network", "acme"),
        ("tenant", "t"),
        *(("machine", name) for name in MACHINES),
    ):
        store.delete(kind, path, cascade=path == "acme/staging")
    assert not any(items(store, kind) for kind in KINDS)
    with store._database.read() as connection:
        assert not any(connection.scalars(select(tables.tally.c.n)))
        kept = {
            "carriage",
            "store",
            "revision",
            "counter",
            "change",
            "network",
            "vni_range",
            "vni_quarantine",
            "event",
            "tally",
        }
        for table in tables.metadata.sorted_tables:
            rows = connection.execute(table.select()).all()
            assert table.name in kept or rows == []


# What ports hang on


def attached(store: Store) -> dict[str, Any]:
    return {path: port["attach"] for path, port in items(store, "port").items() if port["attach"]}


def test_a_file_that_says_nothing_of_attaching_leaves_it_alone(store: Store) -> None:
    store.apply(manifest(acme=acme()))
    before = store.revision
    blue = Attach("netns", "blue")
    revision, machines, port = store.set_attach("acme/web1", blue)
    assert (revision, machines, port["attach"]) == (before + 1, ["m1"], {"netns": "blue"})
    assert store.set_attach("web1", blue)[0] == revision == store.revision, "done already"
    assert store.plan(manifest(acme=acme())).changes == ()
    batch = store.changes_since(store.machine_row("m1"), before)
    assert batch is not None
    [value] = [value for kind, _, value in batch.rows if kind == "port"]
    assert isinstance(value, Port)
    assert value.attach == blue
    assert from_wire("port", to_wire(value)) == value
    ports = acme()["ports"]
    plan = store.plan(manifest(acme=acme(ports={**ports, "web1": {**ports["web1"], "attach": {"tap": "vm1"}}})))
    assert [(c.op, c.path, c.fields) for c in plan.changes] == [
        ("~", "acme/web1", {"attach": [{"netns": "blue"}, {"tap": "vm1"}]})
    ]
    assert plan.disturbs == ("acme/web1: leaves netns blue",)
    store.apply(manifest(acme=acme(ports={**ports, "web1": {**ports["web1"], "attach": {}}})))
    assert attached(store) == {}
    assert store.set_attach("acme/web1", None)[0] == store.revision, "done already"


def test_what_a_machine_has_is_one_ports(store: Store) -> None:
    vm = {"attach": {"tap": "vm1"}}
    ports = {"a": {"segment": "web", "host": "m1", "hosts": True}, "b": {"segment": "web", "host": "m2", **vm}}
    ports["c"] = {"segment": "web", "host": "m3", "hosts": True}
    inner = {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": {"x": {"segment": "lan", "host": "a", **vm}}}
    spec = acme(ports=ports, policies=[], networks={"in": inner})
    store.apply(manifest(acme=spec))
    other = {"segments": {"s": {"cidr": "10.0.0.0/24"}}, "ports": {"y": {"segment": "s", "host": "m1", **vm}}}
    with pytest.raises(Invalid) as told:
        store.apply(manifest(other=other))
    [problem] = told.value.problems
    assert (problem.code, problem.pointer) == ("duplicate_attach", "/networks/other/ports/y/attach/tap")
    assert problem.message == "tap vm1 of m1 is given to acme/in/x already: detach that, or name another"
    other["ports"]["y"].pop("attach")
    store.apply(manifest(other=other))
    with pytest.raises(Conflict, match="tap vm1 of m1 is given to acme/in/x already"):
        store.set_attach("other/y", Attach("tap", "vm1"))
    store.set_attach("other/y", Attach("netns", "vm1"))
    # What hangs above a host goes where that goes.
    ports["a"] = {**ports["a"], "host": "m2"}
    with pytest.raises(Invalid, match="tap vm1 of m2 is given to acme"):
        store.apply(manifest(acme=spec))
    ports["b"] = {**ports["b"], "host": "m1"}
    store.apply(manifest(acme=spec))
    assert attached(store) == {"acme/b": {"tap": "vm1"}, "acme/in/x": {"tap": "vm1"}, "other/y": {"netns": "vm1"}}
    with pytest.raises(Conflict, match="tap vm1 of m1 is given to acme/b already"):
        store.set_attach("other/y", Attach("tap", "vm1"))
    store.delete("port", "acme/b")
    store.set_attach("other/y", Attach("tap", "vm1"))


def test_segments_have_servers_for_names(store: Store) -> None:
    segments = {**acme()["segments"], "web": {"cidr": "10.0.0.0/24", "dns": ["10.0.1.53", "fd00:1::53"]}}
    store.apply(manifest(acme=acme(segments=segments)))
    assert items(store, "segment")["acme/web"]["dns"] == ["10.0.1.53", "fd00:1::53"]
    world = store.world("acme/web1").world
    assert [str(a) for s in world.segments.values() for a in s.dns] == ["10.0.1.53", "fd00:1::53"]
    assert store.plan(manifest(acme=acme(segments=segments))).changes == ()
    plan = store.plan(manifest(acme=acme()))
    assert [(c.path, c.fields) for c in plan.changes] == [("acme/web", {"dns": [["10.0.1.53", "fd00:1::53"], []]})]


# Links


def test_a_file_that_says_nothing_of_a_links_state_leaves_it_alone(store: Store) -> None:
    up = {"between": ["core", "edge"], "cost": 10}
    store.apply(manifest(acme=acme()))
    assert items(store, "link")["acme/core-edge"]["up"] is True
    before = store.revision
    revision, machines, link = store.set_link("acme/core-edge", False)
    assert (revision, machines, link["up"]) == (before + 1, ["m1", "m2", "m3"], False)
    assert store.set_link("core-edge", False)[0] == revision == store.revision, "done already"
    assert store.plan(manifest(acme=acme())).changes == ()
    store.apply(manifest(acme=acme(links={"core-edge": {**up, "cost": 20}})))
    assert items(store, "link")["acme/core-edge"]["up"] is False
    plan = store.plan(manifest(acme=acme(links={"core-edge": {**up, "up": True, "cost": 20}})))
    assert [(c.op, c.kind, c.path, c.fields) for c in plan.changes] == [
        ("~", "link", "acme/core-edge", {"up": [False, True]})
    ]
    assert plan.disturbs == ("acme/core-edge: comes up, routes change",)
    assert plan.machines == ("m1", "m2", "m3")
    store.apply(manifest(acme=acme(links={"new": {**up, "up": False}})))
    assert {path: link["up"] for path, link in items(store, "link").items()} == {"acme/new": False}


def test_which_router_of_a_link_stands_first_is_no_change(store: Store) -> None:
    store.apply(manifest(acme=acme()))
    turned = {"core-edge": {"between": ["edge", "core"], "cost": 10}}
    assert store.plan(manifest(acme=acme(links=turned))).changes == ()
    dear = {"core-edge": {"between": ["edge", "core"], "cost": 20}}
    plan = store.plan(manifest(acme=acme(links=dear)))
    assert [(c.op, c.fields) for c in plan.changes] == [("~", {"cost": [10, 20]})]
    assert plan.disturbs == ("acme/core-edge: cost 10 becomes 20, routes change",)


def test_rates_are_fields_like_others(store: Store) -> None:
    store.apply(manifest(acme=acme()))
    rated = acme(links={"core-edge": {"between": ["core", "edge"], "cost": 10, "rate": "1gbit"}})
    rated["ports"]["web1"]["rate"] = "1.5mbit"
    plan = store.plan(manifest(acme=rated))
    assert [(c.op, c.path, c.fields) for c in plan.changes] == [
        ("~", "acme/core-edge", {"rate": [None, "1gbit"]}),
        ("~", "acme/web1", {"rate": [None, "1500kbit"]}),
    ]
    assert plan.disturbs == ("acme/core-edge: rate none becomes 1gbit", "acme/web1: rate none becomes 1500kbit")
    store.apply(manifest(acme=rated))
    assert items(store, "link")["acme/core-edge"]["rate"] == 10**9
    assert items(store, "port")["acme/web1"]["rate"] == 1_500_000
    assert store.plan(manifest(acme={"ports": rated["ports"]})).changes == (), "a collection left out stays"
    values = held(store.snapshot_for(1)).values()
    assert sorted(v.rate for v in values if isinstance(v, Link | Port) and v.rate) == [1_500_000, 10**9]
    store.apply(manifest(acme=acme()))
    assert items(store, "port")["acme/web1"]["rate"] is None


def test_a_router_goes_with_its_links_or_not_at_all(store: Store) -> None:
    store.apply(manifest(acme=acme()))
    without = acme(routers={"core": {"segments": ["web", "db"]}})
    del without["links"]
    with pytest.raises(Invalid) as told:
        store.apply(manifest(acme=without))
    assert [(p.code, p.pointer) for p in told.value.problems] == [
        ("missing_router", "/networks/acme/links/core-edge/between/1")
    ]
    plan = store.apply(manifest(acme={**without, "links": {}})).plan
    assert [(c.op, c.path) for c in plan.changes] == [("-", "acme/core-edge"), ("-", "acme/edge")]
    assert plan.disturbs == ("acme/core-edge: goes down, routes change", "acme/edge: routes change")


def test_who_holds_what_a_network_carries_hears_of_its_links(store: Store) -> None:
    """Rule 24: links of carriers too. m2 has no port of acme but the host; m1 has none at all."""
    ports = {"a": {"segment": "web", "host": "m2", "hosts": True}, "b": {"segment": "web", "host": "m3", "hosts": True}}
    inner = {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": {"x": {"segment": "lan", "host": "a"}}}
    spec = acme(ports=ports, policies=[], networks={"in": inner})
    store.apply(manifest(acme=spec))
    since = store.revision
    _, machines, _ = store.set_link("acme/core-edge", False)
    assert machines == ["m2", "m3"]
    for name in MACHINES:
        batch = store.changes_since(store.machine_row(name), since)
        assert batch is not None
        links = [value for kind, _, value in batch.rows if kind == "link"]
        assert len(links) == (name in machines)
        assert not any(isinstance(link, Link) and link.up for link in links)
    world, _, names, _ = store.world("acme/in/x")
    assert [names["link", id] for id in world.links] == ["core-edge"]


def test_an_older_store_gets_links(tmp_path: Path) -> None:
    """A store of the first version opens, keeps what it has and takes links."""
    config = Config()
    config.set_main_option("script_location", str(Path(tables.__file__).parent / "migrations"))
    file = tmp_path / "store.db"
    engine = create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.commit()
    engine.dispose()
    old = sqlite3.connect(file)
    assert ("link",) not in old.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    old.execute("INSERT INTO tenant (id, name) VALUES (1, 'kept')")
    more = "underlay, enabled, labels, description, revision"
    old.execute(f"INSERT INTO network (id, carrier, name, {more}) VALUES (1, 0, 'old', 4, 1, '{{}}', '', 0)")
    spec = '{"from":["any"],"to":["10.0.0.0/8"],"deny":["tcp/80"],"priority":7}'
    means = {"sources": [["any", 0, None]], "targets": [["cidr", 0, "10.0.0.0/8"]], "services": [[6, 80, 80]]}
    value = json.dumps({**means, "allow": False, "priority": 7}, separators=(",", ":"))
    old.execute("INSERT INTO policy (id, network, spec, value) VALUES (1, 1, ?, ?)", (spec, value))
    old.execute("INSERT INTO counter (kind, last) VALUES ('network', 1), ('policy', 1), ('tenant', 1)")
    old.commit()
    old.close()
    store = Store(file)
    for place, name in enumerate(MACHINES, 1):
        store.join(name, f"192.0.2.{place}")
    store.apply(manifest(acme=acme()))
    assert list(items(store, "link")) == ["acme/core-edge"]
    assert list(items(store, "tenant")) == ["kept"]
    policy = {"from": "any", "to": "10.0.0.0/8", "deny": "tcp/80", "priority": 7}
    assert not store.plan(manifest(old={"policies": [policy]}))
    assert store.plan(manifest(old={"policies": [{**policy, "priority": 8}]}))
    store.close()


# Races


def race(attempt: Callable[[int], Any], runners: int = 20) -> list[Any]:
    """What each thread got, all starting at once."""
    start = Barrier(runners)

    def run(place: int) -> Any:
        start.wait()
        try:
            return attempt(place)
        except NestnetError as error:
            return error

    with ThreadPoolExecutor(runners) as pool:
        return list(pool.map(run, range(runners)))


def test_one_of_twenty_gets_the_name(store: Store) -> None:
    got = race(lambda i: store.apply(manifest(n={"tenant": f"t{i}"})))
    assert sum(not isinstance(one, NestnetError) for one in got) == 1
    assert {one.code for one in got if isinstance(one, NestnetError)} == {"immutable"}


def test_one_of_twenty_gets_the_address(store: Store) -> None:
    got = race(lambda i: store.join(f"n{i}", "192.0.2.99"))
    assert sum(not isinstance(one, NestnetError) for one in got) == 1
    store.apply(manifest(n={"segments": {"s": {"cidr": "10.0.0.0/24"}}}))
    port = {"segment": "s", "host": "m1", "address": "10.0.0.9"}
    got = race(lambda i: store.apply(manifest(n={"ports": {f"p{i}": port}})))
    assert not any(isinstance(one, NestnetError) for one in got)
    revisions = sorted(one.revision for one in got)
    assert revisions == list(range(revisions[0], revisions[0] + 20))
    assert len(items(store, "port")) == 1


def test_twenty_different_networks_all_come(store: Store) -> None:
    got = race(lambda i: store.apply(manifest(**{f"n{i}": acme()})))
    assert not any(isinstance(one, NestnetError) for one in got)
    assert len(items(store, "network")) == 20
    assert len(set(vnis(store))) == 40


def test_one_key_asked_twenty_times_is_done_once(store: Store) -> None:
    before = store.revision
    got = race(lambda _: store.apply(manifest(n=acme()), asked=Asked(key="k")))
    assert {one.revision for one in got} == {before + 1} == {store.revision}


# Laws, on any manifests


NAMES = ("web", "db", "lan")


@st.composite
def some_network(draw: st.DrawFn, hosts: tuple[str, ...], depth: int) -> dict[str, Any]:
    segments = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    spec: dict[str, Any] = {"segments": {}, "ports": {}, "routers": {}, "links": {}, "policies": []}
    for name in segments:
        place = NAMES.index(name)
        v4 = f"10.0.{place}.0/{draw(st.sampled_from((24, 25)))}"
        spec["segments"][name] = {"cidr": [v4, f"fd00:{place}::/64"] if draw(st.booleans()) else v4}
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True)):
        port: dict[str, Any] = {"segment": draw(st.sampled_from(segments)), "host": draw(st.sampled_from(hosts))}
        if draw(st.booleans()):
            port["address"] = (
                f"10.0.{NAMES.index(port['segment'])}.{draw(st.sampled_from((1, 2, 3)))}{'abcd'.index(name)}"
            )
        if draw(st.booleans()):
            port["mac"] = f"02:00:00:00:00:0{'abcd'.index(name)}"
        if draw(st.booleans()):
            port["groups"] = draw(st.lists(st.sampled_from(("g1", "g2")), unique=True, min_size=1))
        port["hosts"] = draw(st.booleans())
        if not port["hosts"] and draw(st.booleans()):
            port["rate"] = draw(st.sampled_from(("1mbit", 64000)))
        others = [other for other in segments if other != port["segment"]]
        if others and draw(st.booleans()):
            port["native"] = port.pop("segment")
            behind = draw(st.lists(st.sampled_from(others), min_size=1, unique=True))
            port["vlans"] = {str(10 + n): draw(st.sampled_from((s, {"segment": s}))) for n, s in enumerate(behind)}
        spec["ports"][name] = port
    for port in spec["ports"].values():
        spec["segments"][port.get("segment") or port["native"]]["transparent"] = False
        for vlan in port.get("vlans", {}).values():
            spec["segments"][vlan if isinstance(vlan, str) else vlan["segment"]]["transparent"] = False
    for segment in spec["segments"].values():
        segment.setdefault("transparent", draw(st.booleans()))
    if draw(st.booleans()):
        spec["routers"]["r"] = {"segments": draw(st.lists(st.sampled_from(segments), unique=True))}
        others = draw(st.lists(st.sampled_from(("r1", "r2")), unique=True))
        spec["routers"] |= {other: {} for other in others}
        for name in draw(st.lists(st.sampled_from(("l1", "l2")), unique=True)) if others else []:
            between = draw(st.sampled_from(list(permutations(spec["routers"], 2))))
            link = {"between": list(between), "cost": draw(st.integers(1, 3)), "up": draw(st.booleans())}
            if draw(st.booleans()):
                link["rate"] = draw(st.sampled_from(("1mbit", 64000)))
            spec["links"][name] = link
    groups = sorted({group for port in spec["ports"].values() for group in port.get("groups", ())})
    selectors = ["any", "inside", "10.0.0.0/8", *(f"segment:{name}" for name in segments)]
    selectors += [f"port:{name}" for name in spec["ports"]] + [f"group:{name}" for name in groups]
    side = st.lists(st.sampled_from(selectors), min_size=1, max_size=2, unique=True).map(sorted)
    for _ in range(draw(st.integers(0, 2))):
        verb = draw(st.sampled_from(("allow", "deny")))
        policy = {"from": draw(side), "to": draw(side), verb: draw(st.sampled_from((["any"], ["icmp"], ["tcp/80"])))}
        if policy not in spec["policies"]:
            spec["policies"].append(policy)
    below = tuple(name for name, port in spec["ports"].items() if port["hosts"])
    spec["networks"] = {}
    if below and depth:
        for name in draw(st.lists(st.sampled_from("xy"), unique=True)):
            spec["networks"][name] = draw(some_network(below, depth - 1))
    return spec


@st.composite
def some_networks(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(("n1", "n2")), unique=True))
    networks = {name: draw(some_network(MACHINES, 2)) for name in names}
    for network in networks.values():
        # Over these something is carried flat, perhaps.
        ports = network["ports"].values() if network["networks"] else ()
        under = {port.get("segment") or port["native"] for port in ports if port["hosts"]}
        for name, segment in network["segments"].items():
            switched = name not in under and not segment["transparent"] and draw(st.booleans())
            segment["vlan"] = {"on": "campus"} if switched else {}
    return networks


def content(store: Store) -> dict[str, dict[str, Any]]:
    """All that is stored, without what history may decide: ids, VNIs, VLANs, revisions, chosen MACs and addresses, and
    which of several causes is told."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("network", "segment", "router", "link", "port", "policy"):
        for path, item in items(store, kind).items():
            for name in ("id", "row", "vni", "revision", "mac", "etag", "cause"):
                item.pop(name, None)
            if kind == "policy":
                path = f"{item['network']}/{item['text']}"
                item.pop("name"), item.pop("path")
            if kind == "segment" and item["vlan"]:
                item["vlan"].pop("id")
            if kind == "link":
                item["between"] = sorted(item["between"])
            if kind == "port":
                item["addresses"] = [ip_address(text.split("/")[0]).version for text in item["addresses"]]
            found[f"{kind} {path}"] = item
    return found


@settings(max_examples=50)
@given(some_networks(), some_networks())
def test_what_is_stored_is_what_the_last_manifest_says(first: dict[str, Any], second: dict[str, Any]) -> None:
    with new_store(CAMPUS) as store, new_store(CAMPUS) as fresh:
        store.apply(manifest(**first))
        store.apply(manifest(**second), prune=True)
        if second or not first:
            fresh.apply(manifest(**second))
            assert content(store) == content(fresh)
        assert store.plan(manifest(**second), prune=True).changes == ()
        chosen = {
            path: port["addresses"] for path, port in items(store, "port").items() if "address" in _port(second, path)
        }
        assert all(_port(second, path)["address"] == had[0].split("/")[0] for path, had in chosen.items())


def _port(networks: dict[str, Any], path: str) -> dict[str, Any]:
    *above, name = path.split("/")
    spec: dict[str, Any] = {"networks": networks}
    for network in above:
        spec = spec["networks"].get(network, {"networks": {}, "ports": {}})
    found: dict[str, Any] = spec.get("ports", {}).get(name, {})
    return found


Held = dict[tuple[str, int], Value | None]


def held(batch: Any, before: Held | None = None) -> Held:
    """What a machine holds after a batch."""
    after: Held = {} if batch.snapshot else dict(before or {})
    for kind, id, value in batch.rows:
        if value is None:
            after.pop((kind, id), None)
        else:
            after[kind, id] = value
    return after


@settings(max_examples=40)
@given(st.lists(some_networks(), min_size=1, max_size=4), st.randoms())
def test_batches_replayed_are_the_snapshot(applies: list[dict[str, Any]], rng: random.Random) -> None:
    """Whatever is applied, whoever joins: changes since any revision lead to what a snapshot has (I5)."""
    with new_store(CAMPUS) as store:
        rows = [store.machine_row(name) for name in MACHINES]
        past: dict[int, dict[int, Held]] = {row: {} for row in rows}
        below: dict[tuple[int, int], frozenset[int]] = {}
        for turn, networks in enumerate([{}, *applies, {}]):
            names = rng.sample(("n1", "n2"), 1) if turn % 3 == 2 else list(networks)
            store.apply(manifest(**{name: networks[name] for name in names if name in networks}), prune=True)
            if turn == 1:
                store.join("late", "192.0.2.77")
            for row in rows:
                now = store.snapshot_for(row)
                for revision, was in past[row].items():
                    batch = store.changes_since(row, revision)
                    assert batch is not None
                    assert held(batch, was) == held(now), f"{row=} from {revision} to {now.revision}"
                    nobody_sleeps(store.touched(revision), row, below[row, revision], batch)
                past[row][now.revision] = held(now)
                below[row, now.revision] = now.below


def test_a_machine_gets_what_it_needs_and_no_more(store: Store) -> None:
    inner: dict[str, Any] = {
        "segments": {"lan": {"cidr": "10.9.0.0/24"}},
        "ports": {"a": {"segment": "lan", "host": "web2"}},
    }
    ports = acme()["ports"]
    ports["web3"] = {"segment": "web", "host": "m3", "hosts": True}
    store.apply(manifest(acme=acme(ports=ports, networks={"in": inner}), other={"segments": {"s": {}}}))
    world = World(held(store.snapshot_for(2)))  # type: ignore[arg-type]
    assert len(world.networks) == 2
    assert len(world.ports) == 5

    # m1 leaves acme: nothing of it is left there.
    del ports["web1"]
    before = store.revision
    store.apply(manifest(acme=acme(ports=ports, networks={"in": inner})))
    batch = store.changes_since(1, before)
    assert batch is not None
    assert {kind for kind, _, value in batch.rows if value is None} == {
        "network",
        "segment",
        "router",
        "link",
        "port",
        "policy",
    }
    assert {kind for kind, _ in held(store.snapshot_for(1))} == {"machine"}

    # A machine that has only ports of what a network carries sees that network's hosts in use.
    ports["web2"]["host"] = "m1"
    store.apply(manifest(acme=acme(ports=ports, networks={"in": inner})))
    inner["ports"]["b"] = {"segment": "lan", "host": "web3"}
    inner["networks"] = {"deep": {"segments": {"x": {}}, "ports": {"p": {"segment": "x", "host": "b"}}}}
    inner["ports"]["b"]["hosts"] = True
    store.apply(manifest(acme=acme(ports=ports, networks={"in": inner})))
    names = store.world("acme/in/deep/p").names
    held_by_2 = held(store.snapshot_for(2))
    assert {names[key] for key in held_by_2 if key[0] == "port"} == set()
    everything = {names["port", v.id] for v in held(store.snapshot_for(3)).values() if isinstance(v, Port)}
    assert everything == {"acme/db1", "acme/web2", "acme/web3", "acme/in/a", "acme/in/b", "acme/in/deep/p"}


def test_an_agent_far_behind_or_from_another_store_gets_a_snapshot(store: Store) -> None:
    assert store.changes_since(1, store.revision + 1) is None
    with store._database.write() as connection:
        connection.execute(tables.revision.update().values(oldest=2))
    assert store.changes_since(1, 1) is None
    assert store.changes_since(1, 2) is not None


# On the wire


def test_values_survive_the_wire(store: Store) -> None:
    store.apply(manifest(acme=acme(networks={"staging": STAGING})))
    world = store.world("acme/staging/a").world
    kinds = {kind for kind, _ in world.values}
    assert kinds == {"machine", "network", "segment", "router", "link", "port", "policy"}
    for (kind, _), value in world.values.items():
        assert from_wire(kind, to_wire(value)) == value


def test_equal_numbers_of_many_values_are_one_object() -> None:
    network, segment = Network(70_000), Segment(70_001, 70_000, 70_000)
    same: dict[int, int] = {}
    sent = [(kind_of(value), json.loads(json.dumps(to_wire(value)))) for value in (network, segment)]
    read = [from_wire(kind, data, same) for kind, data in sent]
    assert read == [network, segment]
    assert isinstance(read[1], Segment)
    assert read[1].network is read[0].id
    assert read[1].vni is read[0].id


# Size


def test_twenty_thousand_objects_are_one_transaction_of_seconds(store: Store) -> None:
    ports = {f"p{i}": {"segment": "s", "host": MACHINES[i % 3], "groups": ["g"]} for i in range(2000)}
    networks = {f"n{i}": {"segments": {"s": {"cidr": "10.0.0.0/16"}}, "ports": ports} for i in range(10)}
    before = store.revision
    applied = store.apply(manifest(**networks))
    assert applied.revision == before + 1
    assert len(applied.plan.changes) == 20_020
    assert len(store.snapshot_for(1).rows) == 20_020 + len(MACHINES)


def test_readers_do_not_wait_for_a_writer(store: Store) -> None:
    store.apply(manifest(acme=acme()))
    with store._database.write() as connection:
        connection.execute(tables.revision.update().values(n=99))
        assert store.revision != 99
        with pytest.raises(sqlite3.OperationalError):
            sqlite3.connect(store._database.engine.url.database or "", timeout=0).execute("BEGIN IMMEDIATE")


# Trunks


def trunks(**ports: Any) -> dict[str, Any]:
    segments = {name: {"cidr": f"10.0.{n}.0/24"} for n, name in enumerate(("mgmt", "web", "db"))}
    vlans = {"10": "web", "20": {"segment": "db", "address": "10.0.2.9", "groups": ["store"]}}
    up = {"native": "mgmt", "host": "m1", "vlans": vlans}
    return {"segments": segments, "ports": {"up": up, "web1": {"segment": "web", "host": "m2"}, **ports}}


def test_ports_behind_tags_are_ports(store: Store) -> None:
    policies = [{"from": "segment:web", "to": ["store", "up.10"], "allow": "tcp/80"}]
    store.apply(manifest(n=trunks() | {"policies": policies}))
    ports = items(store, "port")
    assert {path: (p["segment"], p["trunk"], p["vlan"], p["host"]) for path, p in ports.items()} == {
        "n/up": ("mgmt", None, None, "m1"), "n/up.10": ("web", "up", 10, "m1"), "n/up.20": ("db", "up", 20, "m1"),
        "n/web1": ("web", None, None, "m2"),
    }  # fmt: skip
    assert ports["n/up.20"]["addresses"] == ["10.0.2.9/24"]
    assert len({ports[f"n/up{tag}"]["mac"] for tag in ("", ".10", ".20")}) == 1, "what a Linux interface has by itself"
    assert store.plan(manifest(n=trunks() | {"policies": policies})).changes == ()
    assert store.plan(manifest(n={})).changes == (), "what is absent stays"
    known = held(store.snapshot_for(store.machine_row("m2")))
    row = ports["n/up.10"]["row"]
    value = known["port", row]
    assert isinstance(value, Port)
    assert (value.trunk, value.tag, value.host) == (ports["n/up"]["row"], 10, store.machine_row("m1"))


def test_what_hangs_on_a_trunk_goes_with_it(store: Store) -> None:
    store.apply(manifest(n=trunks()))
    with pytest.raises(Conflict, match=r"n/up is needed by port n/up.10, port n/up.20"):
        store.delete("port", "n/up")
    with pytest.raises(Conflict, match=r"n/up.10 hangs on the trunk up: move that"):
        store.move("n/up.10", "m2")
    with pytest.raises(Conflict, match=r"n/up.10 hangs on a trunk: attach that"):
        store.set_attach("n/up.10", Attach("tap", "t"))
    store.set_enabled("port", "n/up", False)
    states = {path: port["state"] for path, port in items(store, "port").items() if "up" in path}
    assert set(states.values()) == {"down: disabled"}
    assert store.get("port", "n/up.10")["cause"] == "port n/up is disabled"
    store.set_enabled("port", "n/up", True)
    elsewhere = trunks()
    elsewhere["ports"]["up"]["host"] = "m3"
    store.apply(manifest(n=elsewhere))
    assert {port["host"] for path, port in items(store, "port").items() if "up" in path} == {"m3"}
    store.delete("port", "n/up.20")
    store.delete("port", "n/up.10")
    store.delete("port", "n/up")


def test_each_tag_counts_as_a_port(store: Store) -> None:
    limits = {"t": {"quota": {"ports": 3}}}
    wanted = {"apiVersion": "nestnet/v1", "tenants": limits, "networks": {"n": {"tenant": "t"} | trunks()}}
    with pytest.raises(Exhausted, match="3"):
        store.apply(parse(wanted))
    limits["t"]["quota"]["ports"] = 4
    store.apply(parse(wanted))


def test_tags_change_and_stay_what_they_are(store: Store) -> None:
    store.apply(manifest(n=trunks()))
    before = items(store, "port")
    other = trunks()
    other["ports"]["up"]["vlans"] = {"10": "web", "30": "db"}
    plan = store.plan(manifest(n=other))
    assert sorted(f"{change.op} {change.path}" for change in plan.changes) == ["+ n/up.30", "- n/up.20"]
    store.apply(manifest(n=other))
    after = items(store, "port")
    assert after["n/up.10"]["row"] == before["n/up.10"]["row"]
    assert after["n/up.30"]["mac"] == after["n/up"]["mac"]
