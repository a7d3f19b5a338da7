"""Moves as the store drives them: who may be moved where, what machines are told in each phase, and that none hangs."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import MACHINES, Held, held, manifest, new_store
from woken import nobody_sleeps

from nestnet.model.errors import Conflict, Invalid, NestnetError, NotFound
from nestnet.model.values import Port
from nestnet.store import Store, heard, moves


def nested(**ports: Any) -> dict[str, Any]:
    """acme carries mid carries top; h1 to h3 live on m1 to m3, g1 and g2 on h1 and h2, x and y on those."""
    lan = {"lan": {"cidr": "10.0.0.0/24"}}
    top = {"segments": lan, "ports": {"x": {"segment": "lan", "host": "g1"}, "y": {"segment": "lan", "host": "g2"}}}
    hosts = {f"g{n}": {"segment": "lan", "host": f"h{n}", "hosts": True} for n in (1, 2, 3)}
    mid = {
        "segments": lan,
        "ports": {**hosts, "g4": {"segment": "lan", "host": "h1", "hosts": True}},
        "networks": {"top": top},
    }
    fabric = {f"h{n}": {"segment": "lan", "host": f"m{n}", "hosts": True} for n in (1, 2, 3)}
    fabric["plain"] = {"segment": "lan", "host": "m3"}
    return {"segments": lan, "ports": {**fabric, **ports}, "networks": {"mid": mid}}


@pytest.fixture
def store() -> Iterator[Store]:
    with new_store() as made:
        made.apply(manifest(acme=nested()))
        realise(made)
        yield made


def realise(store: Store, *machines: str) -> None:
    """These machines, or all, report that they are as they should be."""
    for machine in machines or MACHINES:
        store.report(machine, store.revision)


def port(store: Store, path: str) -> dict[str, Any]:
    return store.get("port", path)


def phase(store: Store, path: str) -> str | None:
    moving = port(store, path)["moving"]
    return moving["phase"] if moving else None


def value(store: Store, machine: str, path: str) -> tuple[str | None, str | None, bool] | None:
    """How a machine knows a port: host, other, leaving."""
    found = held(store.snapshot_for(store.machine_row(machine))).get(("port", port(store, path)["row"]))
    if not isinstance(found, Port):
        return None
    kind = "machine" if path.count("/") == 1 else "port"
    items, _ = store.list(kind, limit=1000)
    names = {item["row"]: item["name"] for item in items}
    return names.get(found.host), names.get(found.other), found.leaving


@pytest.mark.parametrize(
    ("path", "to", "hosts"),
    [("acme/h1", "m3", ("m1", "m3")), ("acme/mid/g1", "h3", ("h1", "h3")), ("acme/mid/top/x", "g3", ("g1", "g3"))],
)
def test_a_move_goes_from_phase_to_phase_as_machines_are_with_it(
    path: str, to: str, hosts: tuple[str, str], store: Store
) -> None:
    old, new = hosts
    store.move(path, to)
    seen = []
    while (now := phase(store, path)) is not None:
        for machine in ("m1", "m3"):
            realise(store, machine)
            assert phase(store, path) == now, "it waits for all"
        seen.append((now, value(store, "m2", path), value(store, "m3", path)))
        realise(store, "m2")
    assert [each[0] for each in seen] == ["prepare", "leave", "flip", "settle"]
    both = [(old, new, False), (old, new, True), (new, old, False), (new, None, False)]
    assert [each[1] for each in seen] == both
    assert [each[2] for each in seen] == both
    assert (port(store, path)["host"], port(store, path)["machine"]) == (new, "m3")
    assert value(store, "m1", "acme/mid/top/x") is None, "nothing of it is left"
    events = [event["text"] for _, event in store.events_after(0, 1000) if event["kind"] == "moved"]
    assert events == [f"{path} has moved to m3"]


def test_what_hangs_on_a_trunk_moves_with_it() -> None:
    with new_store() as store:
        segments = {"lan": {"cidr": "10.0.0.0/24"}, "web": {"cidr": "10.0.1.0/24"}}
        ports = {"up": {"native": "lan", "host": "m1", "vlans": {"10": "web"}}, "x": {"segment": "web", "host": "m2"}}
        store.apply(manifest(acme={"segments": segments, "ports": ports}))
        realise(store)
        store.move("acme/up", "m3")
        seen = []
        while phase(store, "acme/up") is not None:
            both = [value(store, "m2", path) for path in ("acme/up", "acme/up.10")]
            assert both[0] == both[1], "always where its trunk is"
            seen.append(both[0])
            realise(store)
        assert seen == [("m1", "m3", False), ("m1", "m3", True), ("m3", "m1", False), ("m3", None, False)]
        assert {port(store, path)["machine"] for path in ("acme/up", "acme/up.10")} == {"m3"}


def test_between_hosts_of_one_machine_a_move_is_one_change(store: Store) -> None:
    begun, told = store.move("acme/mid/top/x", "g4")
    assert (told["host"], told["machine"], told["moving"]) == ("g4", "m1", None)
    assert begun.machines == ["m1", "m2"]


def test_a_network_in_which_something_moves_is_not_given_another_carrier(store: Store) -> None:
    hosts = {"g1": "m1", "g2": "m2", "g3": "m3", "g4": "m1"}
    store.move("acme/mid/top/x", "g3")
    before = store.revision
    with pytest.raises(Conflict, match="acme/mid/top/x that comes along is moving") as caught:
        store.recarry("acme/mid", None, hosts)
    assert (caught.value.code, store.revision) == ("moving", before)
    while phase(store, "acme/mid/top/x"):
        realise(store)
    assert store.recarry("acme/mid", None, hosts)[2]["path"] == "mid"
    assert port(store, "mid/top/x")["machine"] == "m3"


@pytest.mark.parametrize(
    ("path", "to", "code", "text"),
    [
        ("acme/h1", "m9", "missing_machine", "there is no machine m9; did you mean m3?"),
        ("acme/h1", "h2", "missing_machine", "there is no machine h2; did you mean m2?"),
        ("acme/h1", "m1", "bad_value", "acme/h1 lives on m1 already: name another host"),
        ("acme/mid/g1", "h9", "missing_host", "network acme has no port h9 to live on; did you mean h3?"),
        ("acme/mid/g1", "m2", "missing_host", "network acme has no port m2 to live on; did you mean h2?"),
        ("acme/mid/g1", "plain", "not_a_host", "port plain of acme is no host: give it `hosts: true`"),
        ("acme/mid/g1", "x", "missing_host", "network acme has no port x to live on"),
        ("acme/mid/g1", "g1", "missing_host", "network acme has no port g1 to live on"),
    ],
)
def test_what_cannot_be_is_one_error_and_nothing_is_stored(
    path: str, to: str, code: str, text: str, store: Store
) -> None:
    before = store.revision
    with pytest.raises(Invalid) as caught:
        store.move(path, to)
    (problem,) = caught.value.problems
    assert (problem.code, problem.pointer) == (code, "/to")
    assert problem.message.startswith(text.split(";")[0])
    assert store.revision == before
    assert phase(store, path) is None


def test_a_host_without_an_address_of_the_family_carries_nobody(store: Store) -> None:
    six = {"segments": {"lan": {"cidr": "fd00::/64"}}, "ports": {"s1": {"segment": "lan", "host": "h6"}}, "underlay": 6}
    dual = {"lan": {"cidr": "10.0.0.0/24"}, "two": {"cidr": ["10.1.0.0/24", "fd00:1::/64"]}}
    ports = {
        "h6": {"segment": "two", "host": "m1", "hosts": True},
        "h4": {"segment": "lan", "host": "m2", "hosts": True},
    }
    store.apply(manifest(other={"segments": dual, "ports": ports, "networks": {"six": six}}))
    with pytest.raises(Invalid, match="host h4 of other has no IPv6 address to carry other/six"):
        store.move("six/s1", "h4")


def test_one_move_at_a_time_on_a_chain(store: Store) -> None:
    store.move("acme/mid/g1", "h3")
    for path, to in (("acme/mid/top/x", "g2"), ("acme/h1", "m2"), ("acme/h3", "m2"), ("acme/mid/g1", "h2")):
        with pytest.raises(Conflict, match="acme/mid/g1 is moving: wait until it has arrived"):
            store.move(path, to)
    with pytest.raises(Conflict, match="acme/mid/g1 is moving"):
        store.move("acme/mid/top/y", "g1")
    store.move("acme/h2", "m3")


def test_what_a_machine_has_is_given_to_nobody_else(store: Store) -> None:
    tap = {"segment": "lan", "attach": {"tap": "vm0"}}
    store.apply(manifest(acme=nested(a={**tap, "host": "m1"}, b={**tap, "host": "m3"})))
    with pytest.raises(Invalid, match="tap vm0 of m3 is given to acme/b already: detach that, or name another"):
        store.move("acme/a", "m3")
    store.move("acme/a", "m2")
    realise(store)  # prepared
    store.apply(manifest(acme=nested(a={**tap, "host": "m1"}, b={**tap, "host": "m2"})))
    realise(store)  # the name was taken meanwhile
    assert port(store, "acme/a")["host"] == "m1"
    assert "tap vm0 of m2 is given to acme/b already" in port(store, "acme/a")["moving"]["problem"]


def test_a_file_that_says_the_same_goes_along_and_another_host_ends_it(store: Store) -> None:
    store.move("acme/h1", "m3")
    assert not store.apply(manifest(acme=nested())).plan
    assert phase(store, "acme/h1") == "prepare"
    moved = nested()
    moved["ports"]["h1"]["host"] = "m2"
    store.apply(manifest(acme=moved))
    assert (port(store, "acme/h1")["host"], phase(store, "acme/h1")) == ("m2", None)
    realise(store)
    assert value(store, "m2", "acme/h1") == ("m2", None, False)


def test_where_somebody_moves_to_is_needed(store: Store) -> None:
    store.move("acme/mid/top/x", "g3")
    with pytest.raises(Conflict, match="acme/mid/g3 is needed by port acme/mid/top/x"):
        store.delete("port", "acme/mid/g3")
    less = nested()
    del less["networks"]["mid"]["ports"]["g3"]
    store.apply(manifest(acme=less))
    assert (port(store, "acme/mid/top/x")["host"], phase(store, "acme/mid/top/x")) == ("g1", None)


def test_a_port_that_goes_moves_no_longer(store: Store) -> None:
    store.move("acme/mid/top/x", "g3")
    store.delete("port", "acme/mid/top/x")
    realise(store)
    with pytest.raises(NotFound):
        port(store, "acme/mid/top/x")


# ---- machines that are dead, slow or in trouble


def fall_silent(store: Store, *machines: str) -> None:
    for machine in machines:
        store.heard._at[store.machine_row(machine)] -= heard.SILENT + 1


def test_a_new_machine_that_says_nothing_is_refused(store: Store) -> None:
    fall_silent(store, "m3")
    with pytest.raises(Conflict, match="machine m3 says nothing: see to its agent first"):
        store.move("acme/h1", "m3")


def test_an_old_machine_that_says_nothing_is_not_waited_for(store: Store) -> None:
    fall_silent(store, "m1")
    begun, _ = store.move("acme/h1", "m3")
    assert begun.disturbs == ["machine m1 says nothing: connections of what moves are cut, for only it remembers them"]
    for _ in range(4):
        realise(store, "m2", "m3")
    assert (port(store, "acme/h1")["host"], phase(store, "acme/h1")) == ("m3", None)


def test_who_falls_silent_on_the_way_is_not_waited_for(store: Store) -> None:
    store.move("acme/h1", "m3")
    realise(store)
    realise(store, "m2", "m3")
    assert phase(store, "acme/h1") == "leave"
    fall_silent(store, "m1")
    store.look_around()
    assert phase(store, "acme/h1") == "flip"
    realise(store, "m2", "m3")
    realise(store, "m2", "m3")
    assert (port(store, "acme/h1")["host"], phase(store, "acme/h1")) == ("m3", None)


def test_a_move_to_a_machine_that_dies_is_given_up(store: Store) -> None:
    store.move("acme/h1", "m3")
    realise(store, "m1", "m2")
    fall_silent(store, "m3")
    store.look_around()
    assert port(store, "acme/h1")["moving"] == {
        "phase": "failed", "problem": "acme/h1 stays on m1: m3 says nothing", "other": None,
    }  # fmt: skip
    assert value(store, "m2", "acme/h1") == ("m1", None, False)
    assert value(store, "m3", "acme/mid/top/x") is None
    realise(store)
    store.move("acme/h1", "m3")
    assert phase(store, "acme/h1") == "prepare"


def test_a_move_to_a_machine_that_cannot_is_given_up_with_its_reasons(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.move("acme/h1", "m3")
    realise(store, "m1", "m2")
    store.report("m3", store.revision - 1, ["netns web: there is none"])
    assert phase(store, "acme/h1") == "prepare"
    monkeypatch.setattr(moves, "PATIENCE", -1.0)
    store.look_around()
    assert port(store, "acme/h1")["moving"]["problem"] == "acme/h1 stays on m1: netns web: there is none"


def test_behind_the_flip_nobody_is_waited_for_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.move("acme/h1", "m3")
    for _ in range(2):
        realise(store)
    assert phase(store, "acme/h1") == "flip"
    monkeypatch.setattr(moves, "PATIENCE", -1.0)
    for _ in range(2):
        store.look_around()
    assert (port(store, "acme/h1")["host"], phase(store, "acme/h1")) == ("m3", None)


def test_a_move_goes_on_after_its_controller_was_killed(store: Store) -> None:
    store.move("acme/h1", "m3")
    realise(store)
    store.give_connections("m1", port(store, "acme/h1")["row"], b"of m1")
    again = Store(store._database.path)
    try:
        assert phase(again, "acme/h1") == "leave"
        realise(again)
        assert again.take_connections("m3", port(again, "acme/h1")["row"]) == b"of m1"
        for _ in range(2):
            realise(again)
        assert (port(again, "acme/h1")["host"], phase(again, "acme/h1")) == ("m3", None)
    finally:
        again.close()


def test_connections_are_given_by_the_one_and_taken_by_the_other(store: Store) -> None:
    row = port(store, "acme/h1")["row"]
    with pytest.raises(NotFound):
        store.give_connections("m1", row, b"")
    store.move("acme/h1", "m3")
    for machine in ("m2", "m3"):
        with pytest.raises(NotFound):
            store.give_connections(machine, row, b"lies")
    for machine in ("m1", "m2"):
        with pytest.raises(NotFound):
            store.take_connections(machine, row)
    assert store.take_connections("m3", row) == b""
    for known in (b"one", b"two"):
        store.give_connections("m1", row, known)
        realise(store)
        assert store.take_connections("m3", row) == known


# ---- the feed


@settings(max_examples=int(os.environ.get("NESTNET_EXAMPLES", "12")), deadline=None)
@given(st.integers(0, 1 << 32))
def test_batches_replayed_are_the_snapshot(seed: int) -> None:
    """Whatever moves, and however far: changes since any revision lead to what a snapshot has (I5)."""
    rng = random.Random(seed)
    with new_store() as store:
        store.apply(manifest(acme=nested()))
        rows = [store.machine_row(name) for name in MACHINES]
        past: dict[int, dict[int, Held]] = {row: {} for row in rows}
        below: dict[tuple[int, int], frozenset[int]] = {}
        for _ in range(14):
            match rng.randrange(5):
                case 0 | 1:
                    path, to = rng.choice(
                        [("acme/h1", "m"), ("acme/h2", "m"), ("acme/mid/g1", "h"), ("acme/mid/top/x", "g")]
                    )
                    with suppress(NestnetError):  # it is there, or moves
                        store.move(path, f"{to}{rng.randint(1, 3)}")
                case 2:
                    made = nested()
                    made["networks"]["mid"]["ports"]["g1"]["host"] = rng.choice(["h1", "h2", "h3"])
                    store.apply(manifest(acme=made))
                case _:
                    realise(store)
            for row in rows:
                now = store.snapshot_for(row)
                for revision, was in past[row].items():
                    batch = store.changes_since(row, revision)
                    assert batch is not None
                    assert held(batch, was) == held(now), f"{row=} from {revision} to {now.revision}"
                    nobody_sleeps(store.touched(revision), row, below[row, revision], batch)
                past[row][now.revision] = held(now)
                below[row, now.revision] = now.below
