"""Segments on VLANs of physical networks, in the store: which ids they get, when these come back, what needs a trunk,
and who may say and see any of it."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from test_api import client, controller
from test_grants import by
from test_store import MACHINES, held, items, machines_of, manifest, new_store

from nestnet.api.client import Client
from nestnet.model.errors import Conflict, Exhausted, Invalid, NestnetError
from nestnet.model.manifest import Manifest, parse
from nestnet.model.values import Machine, Segment, Trunk, Vlan, kind_of
from nestnet.model.wire import from_wire, to_wire
from nestnet.store import Store

__all__ = ["client", "controller"]
CAMPUS = {"trunks": {"campus": "eth1"}}


@pytest.fixture
def store() -> Any:
    with new_store(vlans=4) as made:
        made.apply(machines_of(m1=CAMPUS, m2=CAMPUS))
        yield made


def lan(on: dict[str, Any] | None, **ports: str) -> dict[str, Any]:
    """A network with one segment, and ports on machines."""
    segment = {"cidr": "10.0.0.0/24"} if on is None else {"cidr": "10.0.0.0/24", "vlan": on}
    return {
        "segments": {"lan": segment},
        "ports": {name: {"segment": "lan", "host": host} for name, host in ports.items()},
    }


def vlan(store: Store, network: str) -> Any:
    return items(store, "segment")[f"{network}/lan"]["vlan"]


def refused(store: Store, asked: Manifest) -> tuple[type[NestnetError], list[str], str]:
    """What both a plan and an apply are told, and nothing is stored."""
    before = items(store, "segment")
    found = []
    for attempt in (store.plan, store.apply):
        with pytest.raises(NestnetError) as told:
            attempt(asked)
        error = told.value
        codes = [p.code for p in error.problems] if isinstance(error, Invalid) else [error.code]
        found.append((type(error), codes, str(error)))
    assert found[0] == found[1]
    assert items(store, "segment") == before
    return found[0]


def realise(store: Store, *machines: str) -> None:
    for name in machines:
        store.report(name, store.revision)


def test_ids_are_chosen_or_the_lowest_that_is_free(store: Store) -> None:
    store.apply(manifest(a=lan({"id": 2, "on": "campus"})))
    store.apply(manifest(b=lan({"on": "campus"}), c=lan({"on": "campus"}), d=lan({"id": 1, "on": "campus"})))
    assert [vlan(store, each)["id"] for each in "abcd"] == [2, 3, 4, 1]
    # Said again, or not at all, it stays as it is.
    for on in ({"on": "campus"}, {"id": 2, "on": "campus"}, None):
        assert not store.plan(manifest(a=lan(on))).changes
    kind, codes, text = refused(store, manifest(e=lan({"id": 2, "on": "campus"})))
    assert (kind, codes) == (Invalid, ["duplicate_vlan"])
    assert "VLAN 2 of campus is that of a/lan already" in text
    kind, codes, _ = refused(store, manifest(a=lan({"id": 5, "on": "campus"})))
    assert (kind, codes) == (Invalid, ["bad_vlan"])


def test_a_physical_network_ends_in_an_error_and_an_id_comes_back_when_all_have_realised(store: Store) -> None:
    realise(store, "m1", "m2", "m3")
    store.apply(manifest(**{each: lan({"on": "campus"}) for each in "abcd"}))
    kind, codes, text = refused(store, manifest(e=lan({"on": "campus"})))
    assert (kind, codes) == (Exhausted, ["vlan_exhausted"])
    assert "all 4 are used by 4 segments" in text
    store.delete("segment", "b/lan")
    store.apply(manifest(c=lan({})))  # another way to leave one
    assert vlan(store, "c") is None
    assert refused(store, manifest(e=lan({"on": "campus"})))[1] == ["vlan_exhausted"]
    assert refused(store, manifest(e=lan({"id": 2, "on": "campus"})))[:2] == (Conflict, ["vlan_waits"])
    realise(store, "m1", "m2")
    assert refused(store, manifest(e=lan({"on": "campus"})))[1] == ["vlan_exhausted"]
    store.fence("m3", True)
    realise(store, "m1", "m2")
    store.apply(manifest(e=lan({"on": "campus"}), f=lan({"id": 3, "on": "campus"})))
    assert [vlan(store, each)["id"] for each in "ef"] == [2, 3]
    # Each physical network has its own.
    store.apply(machines_of(m1={"trunks": {"campus": "eth1", "lab": "eth2"}}))
    store.apply(manifest(g=lan({"id": 3, "on": "lab"})))


def test_what_is_left_in_one_transaction_cannot_be_had_in_it(store: Store) -> None:
    store.apply(manifest(a=lan({"id": 1, "on": "campus"}), b=lan({"id": 2, "on": "campus"})))
    swapped = manifest(a=lan({"id": 2, "on": "campus"}), b=lan({"id": 1, "on": "campus"}))
    assert refused(store, swapped)[1] == ["duplicate_vlan"]


def test_ports_need_a_trunk_and_hold_it(store: Store) -> None:
    store.apply(manifest(a=lan({"id": 1, "on": "campus"}, x="m1", y="m2")))
    kind, codes, text = refused(store, manifest(a=lan({"id": 1, "on": "campus"}, x="m1", y="m2", z="m3")))
    assert (kind, codes) == (Invalid, ["missing_trunk"])
    assert "m3 cannot have ports of segment lan: it has no trunk to campus" in text
    with pytest.raises(Invalid) as told:
        store.move("a/x", "m3")
    assert [p.code for p in told.value.problems] == ["missing_trunk"]
    with pytest.raises(Conflict) as held:
        store.apply(machines_of(m2={"trunks": {"lab": "eth1"}}))
    assert (held.value.code, held.value.dependants) == ("in_use", ("a/y",))
    # One that names the network, too, is told where.
    both = parse({"apiVersion": "nestnet/v1", "machines": {"m2": {"trunks": {}}}, "networks": {"a": {}}})
    with pytest.raises(Invalid) as told:
        store.apply(both)
    assert {p.code for p in told.value.problems} == {"missing_trunk"}
    # What it does not say of a machine stays; another interface for the same network is none of the ports' business.
    store.apply(machines_of(m2={"mtu": 1500}))
    store.apply(machines_of(m2={"trunks": {"campus": "eth7"}}))
    assert items(store, "machine")["m2"]["trunks"] == {"campus": "eth7"}


def test_a_machine_that_joins_may_bring_trunks_and_loses_none_that_is_needed(store: Store) -> None:
    def trunks(name: str) -> dict[str, str]:
        found: dict[str, str] = items(store, "machine")[name]["trunks"]
        return found

    store.join("m4", "192.0.2.4", trunks={"campus": "eth1", "lab": "eth2"})
    store.apply(manifest(a=lan({"id": 1, "on": "campus"}, x="m4")))
    before = store.revision
    store.join("m4", "192.0.2.4")
    assert trunks("m4") == {"campus": "eth1", "lab": "eth2"}, "what is not said stays"
    assert store.revision == before
    with pytest.raises(Conflict) as held:
        store.join("m4", "192.0.2.4", trunks={"lab": "eth2"})
    assert (held.value.code, held.value.dependants) == ("in_use", ("a/x",))
    with pytest.raises(Invalid) as told:
        store.join("m4", "192.0.2.4", nics=["eth0", "eth1"])
    assert [p.code for p in told.value.problems] == ["duplicate_nic"]
    with pytest.raises(Invalid):
        store.join("m5", "192.0.2.5", nics=["eth1"], trunks={"campus": "eth1"})
    assert "m5" not in items(store, "machine")
    assert (store.revision, trunks("m4")) == (before, {"campus": "eth1", "lab": "eth2"})
    store.join("m4", "192.0.2.4", trunks={"campus": "eth7"})
    assert trunks("m4") == {"campus": "eth7"}
    store.delete("port", "a/x")
    store.join("m4", "192.0.2.4", trunks={})
    assert trunks("m4") == {}


def test_what_is_no_trunk_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    """One line each, and nothing is written: here the controller could not be reached at all."""
    lines = {
        "campus": "--trunk campus: write a physical network and the interface that leads there, as campus=eth1",
        "campus=": "--trunk campus=: write a physical network and the interface that leads there, as campus=eth1",
        "=lo": "--trunk =lo: write a physical network and the interface that leads there, as campus=eth1",
        "campus=lo": "--trunk campus=lo: lo is the way to the underlay: a trunk has an interface of its own",
        "campus=lo0": "interface lo0, the trunk to campus, does not exist; did you mean lo?",
        "campus=x campus=y": "--trunk campus=y: x is the trunk to campus already",
    }
    for said, line in lines.items():
        options = [word for each in said.split() for word in ("--trunk", each)]
        where = ("--state", str(tmp_path / "own"), "--config", str(tmp_path / "agent.toml"), "--address", "127.0.0.1")
        command = [sys.executable, "-m", "nestnet", "join", f"unix:{tmp_path}/none", "--machine", "m1"]
        done = subprocess.run(
            [*command, *where, *options],
            env={**os.environ, "NESTNET_TOKEN": "nnj_none"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode in (1, 2), done.stdout, done.stderr) == (True, "", f"nestnet: {line}\n")
    assert list(tmp_path.iterdir()) == []


def test_the_api_takes_trunks_of_a_machine_that_joins(client: Client) -> None:
    made = client.join("m3", "192.0.2.3", trunks={"campus": "eth1"})
    assert made["trunks"] == client.get("machine", "m3")["trunks"] == {"campus": "eth1"}
    assert client.join("m3", "192.0.2.3", 1400)["trunks"] == {"campus": "eth1"}
    refusals: dict[str, dict[str, str]] = {
        "bad_name": {"campus": "no interface"},
        "duplicate_nic": {"campus": "eth1", "lab": "eth1"},
    }
    for code, trunks in refusals.items():
        with pytest.raises(Invalid) as told:
            client.join("m3", "192.0.2.3", trunks=trunks)
        assert [p.code for p in told.value.problems] == [code]
    assert client.get("machine", "m3")["trunks"] == {"campus": "eth1"}
    assert client.join("m3", "192.0.2.3", trunks={})["trunks"] == {}


def test_nothing_is_carried_flat_over_one_in_either_order(store: Store) -> None:
    host = lan({"id": 1, "on": "campus"}, h="m1")
    host["ports"]["h"]["hosts"] = True
    inner = {"segments": {"lan": {}}, "ports": {"p": {"segment": "lan", "host": "h"}}}
    store.apply(manifest(a=host))
    carried = copy.deepcopy(host) | {"networks": {"in": inner}}
    assert refused(store, manifest(a=carried))[:2] == (Invalid, ["cannot_flatten"])
    store.apply(manifest(a={**carried, "networks": {"in": {**inner, "carriage": "encapsulated"}}}))
    plain = lan(None, h="m2")
    plain["ports"]["h"]["hosts"] = True
    store.apply(manifest(b={**plain, "networks": {"in": inner}}))
    later = lan({"id": 2, "on": "campus"}, h="m2")
    later["ports"]["h"]["hosts"] = True
    assert refused(store, manifest(b=later))[:2] == (Invalid, ["cannot_flatten"])


def test_plans_say_what_traffic_notices(store: Store) -> None:
    store.apply(manifest(a=lan(None, x="m1")))
    (line,) = store.plan(manifest(a=lan({"id": 3, "on": "campus"}, x="m1"))).disturbs
    assert line == "a/lan: VXLAN becomes VLAN 3 of campus, its frames between machines are lost until all have it so"


def test_machines_are_told_of_their_own_trunks_alone(store: Store) -> None:
    store.apply(manifest(a=lan({"id": 3, "on": "campus"}, x="m1", y="m2")))
    rows = {(kind, id): value for kind, id, value in store.snapshot_for(store.machine_row("m1")).rows}
    machines = {id: value.trunks for (kind, id), value in rows.items() if isinstance(value, Machine)}
    assert machines == {1: (Trunk("campus", "eth1"),), 2: (), 3: ()}
    (segment,) = (value for value in rows.values() if isinstance(value, Segment))
    assert segment.vlan == Vlan(3, "campus")
    for value in rows.values():
        assert value is None or from_wire(kind_of(value), to_wire(value)) == value


def test_tenants_neither_say_nor_see_what_segments_ride_on(store: Store) -> None:
    """What they write leaves it as it is, and what they are told has no word of it."""
    store.apply(manifest(a={**lan({"id": 1, "on": "campus"}, x="m1"), "tenant": "physics"}))
    store.grant(None, "physics")
    asked = by("physics")
    for found in (store.get("segment", "a/lan", asked.scope), store.list("segment", scope=asked.scope)[0][0]):
        assert found["vlan"] is None
        assert "campus" not in str(found)
    for said in ({"id": 1, "on": "campus"}, {"on": "nowhere"}, {}):
        for where in (lan(said), lan(None) | {"networks": {"in": lan(said)}}):
            with pytest.raises(Invalid) as told:
                store.apply(manifest(a=where), asked=asked)
            assert [p.code for p in told.value.problems] == ["bad_value"]
            assert "leave vlan out" in str(told.value)
    store.apply(manifest(a=lan(None, x="m1", y="m2")), asked=asked)
    assert vlan(store, "a") == {"id": 1, "on": "campus"}
    host = lan(None, x="m1")
    host["ports"]["x"]["hosts"] = True
    inner = {"segments": {"lan": {}}, "ports": {"p": {"segment": "lan", "host": "x"}}}
    routers = {"r": {"segments": ["lan"]}, "q": {"segments": {"lan": "10.0.0.9"}}}
    transparent = lan(None)
    transparent["segments"]["lan"]["transparent"] = True
    refusals = {
        "not_a_host": lan(None, x="m1", z="m3"),
        "cannot_flatten": host | {"networks": {"in": inner}},
        "on_vlan": lan(None) | {"routers": routers},
    }
    for code, where in refusals.items():
        with pytest.raises(Invalid) as told:
            store.apply(manifest(a=where), asked=asked)
        assert [p.code for p in told.value.problems] == [code]
        assert not re.search("campus|VLAN|trunk", str(told.value)), str(told.value)
    with pytest.raises(Invalid) as told:
        store.move("a/x", "m3", asked)
    assert str(told.value).endswith("m3 cannot have a/x")


IDS, NETWORKS = 3, "abcd"
BOTH = "ab"  # of which the ports are on m1 and m2, and of the others on m1 only


class Campus:
    """What a history should have come to: who has which id, which ids wait until when, and whether m2 has its trunk."""

    def __init__(self) -> None:
        self.has: dict[str, int] = {}
        self.waits: dict[int, int] = {}  # revision
        self.realised = dict.fromkeys(MACHINES, 0)
        self.trunk = True

    def free(self) -> list[int]:
        waiting = {id for id, revision in self.waits.items() if revision > min(self.realised.values())}
        return [id for id in range(1, IDS + 1) if id not in {*self.has.values(), *waiting}]

    def ride(self, network: str, id: int | None) -> str | None:
        """Which error it is, or None: then it is so."""
        if network in BOTH and not self.trunk:
            return "missing_trunk"
        if network in self.has and id in (None, self.has[network]):
            return None
        if id in self.has.values():
            return "duplicate_vlan"
        if id is not None and id not in self.free():
            return "vlan_waits"
        if not self.free():
            return "vlan_exhausted"
        self.has[network] = id or self.free()[0]
        return None


STEPS = st.one_of(
    st.tuples(st.just("ride"), st.sampled_from(NETWORKS), st.one_of(st.none(), st.integers(1, IDS))),
    st.tuples(st.just("ride"), st.sampled_from(NETWORKS), st.none()),
    st.tuples(st.sampled_from(("back", "delete")), st.sampled_from(NETWORKS), st.none()),
    st.tuples(st.just("realise"), st.sampled_from((*MACHINES, "all")), st.none()),
    st.tuples(st.just("trunk"), st.sampled_from(("take", "give")), st.none()),
)


@settings(max_examples=25)
@given(st.lists(STEPS, min_size=10, max_size=30))
def test_ids_in_any_history(history: list[tuple[str, str, int | None]]) -> None:
    """Chosen, next free, left, deleted, quarantined until all have realised, and trunks that come and go: each step
    is done, or refused for its reason with nothing stored, and a machine that hears changes has what it should."""
    campus = Campus()
    with new_store({"campus": "eth1"}, vlans=IDS) as store:
        heard, at = held(store.snapshot_for(2)), store.revision
        for what, which, id in history:
            before, error = dict(campus.has), None
            asked: Manifest | None = None
            match what:
                case "ride" | "back":
                    ports = {"x": "m1", **({"y": "m2"} if which in BOTH else {})}
                    on: dict[str, Any] = {"on": "campus"} if what == "ride" else {}
                    asked = manifest(**{which: lan(on | ({"id": id} if id else {}), **ports)})
                    if what == "ride":
                        error = campus.ride(which, id)
                    else:
                        campus.has.pop(which, None)
                case "trunk":
                    needed = any(network in BOTH for network in campus.has)
                    asked = machines_of(m2={"trunks": {"campus": "eth1"} if which == "give" else {}})
                    error = "in_use" if which == "take" and needed else None
                    campus.trunk = which == "give" or error is not None
                case "delete":
                    if which in items(store, "network"):
                        store.delete("network", which, cascade=True)
                        campus.has.pop(which, None)
                case "realise":
                    names = MACHINES if which == "all" else [which]
                    realise(store, *names)
                    campus.realised |= dict.fromkeys(names, store.revision)
            event(f"{what}: {error}")
            if error is not None and asked is not None:
                assert refused(store, asked)[1] == [error]
            elif asked is not None:
                store.apply(asked)
            left = {before[network] for network in before if campus.has.get(network) != before[network]}
            campus.waits |= dict.fromkeys(left, store.revision)
            found = {path.partition("/")[0]: item["vlan"] for path, item in items(store, "segment").items()}
            assert {network: vlan["id"] for network, vlan in found.items() if vlan} == campus.has, (what, which, id)
            batch = store.changes_since(2, at)
            assert batch is not None
            heard, at = held(batch, heard), store.revision
            assert heard == held(store.snapshot_for(2))


def test_a_restored_store_gives_no_id_that_was_given_since(tmp_path: Path) -> None:
    """Anybody may have had any of those that are free in the backup: they wait until all machines have heard of it."""
    with new_store(vlans=4) as store:
        store.apply(machines_of(m1=CAMPUS))
        store.apply(manifest(a=lan({"id": 2, "on": "campus"})))
        store.backup(tmp_path / "backup")
        store.apply(manifest(b=lan({"on": "campus"})))
        assert vlan(store, "b")["id"] == 1
        store.restore(tmp_path / "backup")
        assert vlan(store, "a") == {"id": 2, "on": "campus"}
        assert refused(store, manifest(c=lan({"on": "campus"})))[1] == ["vlan_exhausted"]
        realise(store, "m1", "m2", "m3")
        store.apply(manifest(c=lan({"on": "campus"})))
        assert vlan(store, "c")["id"] == 1
