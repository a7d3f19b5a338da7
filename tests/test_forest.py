"""Networks in networks, when something happens to what carries them: the rows 3F of docs/hostile.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import a_change, worlds
from test_store import MACHINES, acme, items, manifest, store

from nestnet.model.meaning import _is_carried
from nestnet.model.standing import fallen
from nestnet.model.values import FABRIC, Network, World
from nestnet.store import Store, heard
from nestnet.store.plan import Plan
from nestnet.store.scope import Scope

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
    port = store.get("port", "acme/in/b", guest)
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
        down = fallen(world, network, hosts, lost)
        standing = {host for host in hosts if stands(world, network, host, lost)}
        for host in hosts:
            others = standing - {host}
            passes = any(
                _is_carried(world, network, *pair) for other in others for pair in ((host, other), (other, host))
            )
            assert (host in down) == (host not in standing or bool(others and not passes)), (network, host, down)
