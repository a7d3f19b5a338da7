"""Grants of hosts: who may be carried where, what is reserved, what becomes of it, and that nobody sees up.

m1, m2                          machines, the operator's
  cloud          tenant cloud     its ports h1, h2 are hosts
    shop         tenant shop      granted by cloud; its ports v1, v2 are hosts
      lab        tenant lab       granted by shop
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from nestnet.compile.explain import explain
from nestnet.model.errors import Conflict, Exhausted, Forbidden, Invalid, NestnetError, NotFound
from nestnet.model.manifest import Manifest, parse
from nestnet.model.values import Network
from nestnet.store import Store
from nestnet.store.once import Asked
from nestnet.store.quotas import Quota
from nestnet.store.scope import Scope

NO_LIMITS = Quota()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store.db")
    for place in (1, 2):
        made.join(f"m{place}", f"192.0.2.{place}")
    yield made
    made.close()


def by(tenant: str) -> Asked:
    """Asked for by an owner of one tenant."""
    own = frozenset([tenant])
    return Asked(f"token:{tenant}", tenant, scope=Scope(own, own))


def manifest(tenants: Mapping[str, Any] | None = None, **networks: Any) -> Manifest:
    return parse({"apiVersion": "nestnet/v1", "networks": networks, **({"tenants": tenants} if tenants else {})})


def network(*hosts: str, names: str = "p", **more: Any) -> dict[str, Any]:
    """A segment, and a port that is a host on each of these hosts."""
    ports = {f"{names}{n}": {"segment": "lan", "host": host, "hosts": True} for n, host in enumerate(hosts, 1)}
    return {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": ports, **more}


TENANTS = {"cloud": {}, "shop": {"parent": "cloud"}, "lab": {"parent": "shop"}}


@pytest.fixture
def chain(store: Store) -> Store:
    """Three levels, each made by its own tenant."""
    store.apply(manifest(TENANTS))
    for tenant in TENANTS:  # One that is only named is made with the network that names it.
        assert tenant in {one["name"] for one in store.list("tenant")[0]}
    store.grant(None, "cloud")
    store.apply(manifest(cloud=network("m1", "m2", names="h")), asked=by("cloud"))
    store.grant("cloud", "shop", asked=by("cloud"))
    store.apply(manifest(shop=network("h1", "h2", names="v")), asked=by("shop"))
    store.grant("shop", "lab", asked=by("shop"))
    store.apply(manifest(lab=network("v1", "v2")), asked=by("lab"))
    return store


def paths(store: Store, asked: Asked, kind: str = "network") -> list[str]:
    return sorted(one["path"] for one in store.list(kind, limit=1000, scope=asked.scope)[0])


def is_open(store: Store, name: str) -> bool:
    """As the machines are told."""
    id = store.identity.row("network", store.get("network", name)["id"])
    found = [value for _, _, value in store.snapshot_for(1).rows if isinstance(value, Network) and value.id == id]
    return found[0].enabled


def test_a_tenant_without_hosts_makes_nothing(store: Store) -> None:
    store.apply(manifest({"acme": {}}))
    with pytest.raises(Forbidden, match="tenant acme has no hosts: whoever runs some"):
        store.apply(manifest(a=network("m1")), asked=by("acme"))
    assert store.hosts(scope=by("acme").scope)[0] == []
    store.grant(None, "acme", ["m1"])
    store.apply(manifest(a=network("m1")), asked=by("acme"))
    with pytest.raises(Invalid, match="there is no host m2"):
        store.apply(manifest(a=network("m2")), asked=by("acme"))
    with pytest.raises(Invalid, match="there is no host m2"):
        store.move("a/p1", "m2", by("acme"))


def test_each_level_is_like_the_wire(chain: Store) -> None:
    """Paths begin with one's own networks; the operator sees them whole."""
    assert paths(chain, Asked()) == ["cloud", "cloud/shop", "cloud/shop/lab"]
    for tenant, hosts in (("cloud", ["m1", "m2"]), ("shop", ["h1", "h2"]), ("lab", ["v1", "v2"])):
        scope = by(tenant).scope
        assert paths(chain, by(tenant)) == [tenant]
        assert [host["name"] for host in chain.hosts(scope=scope)[0]] == hosts
        assert chain.get("network", tenant, scope)["carrier"] is None
        ports = chain.list("port", scope=scope)[0]
        assert [port["machine"] for port in ports] == [port["host"] for port in ports] == hosts
        with pytest.raises(NotFound):
            chain.get("network", f"cloud/{tenant}", scope)


@pytest.mark.parametrize("names", [("cloud", "top"), ("top", "cloud")])
def test_one_manifest_of_what_is_below_others_and_of_what_is_above_them(chain: Store, names: Sequence[str]) -> None:
    """cloud carries shop, which carries lab, which carries one more of cloud's: all that it says comes about."""
    secret = chain.invite("lab", None, NO_LIMITS, time.time() + 60, by("lab"))[1]
    grant = chain.redeem(secret, "cloud", by("cloud"))["name"]
    chain.apply(manifest(top={**network("p1", "p2", names="t"), "grant": grant}), asked=by("cloud"))
    assert paths(chain, Asked())[-1] == "cloud/shop/lab/top"
    specs = {
        "cloud": network("m1", "m2", names="h", description="below", networks={"own": network("h1")}),
        "top": network("p1", names="t", description="above"),
    }
    with pytest.raises(Conflict, match="networks of other tenants are carried by what would go"):
        chain.apply(manifest(**{name: specs[name] for name in names}), asked=by("cloud"))
    del specs["cloud"]["networks"]
    plan = chain.apply(manifest(**{name: specs[name] for name in names}), asked=by("cloud")).plan
    assert [(change.op, change.kind, change.path) for change in plan.changes] == [
        ("~", "network", "cloud"),
        ("~", "network", "top"),
        ("-", "port", "top/t2"),
    ]
    assert [change.pointer for change in plan.changes[:2]] == ["/networks/cloud", "/networks/top"]
    for name, word in (("cloud", "below"), ("top", "above")):
        assert chain.get("network", name, by("cloud").scope)["description"] == word
    again = chain.plan(manifest(**{name: specs[name] for name in names}), scope=by("cloud").scope)
    assert again.changes == ()


@pytest.mark.parametrize("carrier", ["none", "lab/none", "shop", "cloud/shop/lab"])
def test_what_is_to_carry_a_new_network_has_to_be_there(chain: Store, carrier: str) -> None:
    """For who sees it: a carrier that is somebody else's is none."""
    line = json.dumps({"name": "new", "carrier": carrier, **network("p1")}).encode()
    with pytest.raises(NotFound, match=f"network {carrier.split('/')[0]}"):
        chain.create([line], by("lab"))
    assert "cloud/shop/lab/new" not in paths(chain, Asked())


def test_what_carries_a_network_is_not_named_when_its_carrier_is_changed(chain: Store) -> None:
    inner = network("p1", names="q", networks={"low": network("q1", names="r")})
    chain.apply(manifest(lab=network("v1", "v2", networks={"in": inner})), asked=by("lab"))
    for name, to, hosts in (("lab/in", "lab/in/low", {}), ("lab/in", "lab", {"q1": "h1"}), ("lab/in/low", "lab", {})):
        with pytest.raises(NestnetError) as refused:
            chain.recarry(name, to, hosts, by("lab"))
        assert re.search(r"\b(cloud|shop|h1 of)\b|\x00", str(refused.value)) is None, str(refused.value)
    chain.recarry("lab/in/low", "lab", {"r1": "p2"}, by("lab"))
    assert paths(chain, by("lab")) == ["lab", "lab/in", "lab/low"]
    assert "cloud/shop/lab/low" in paths(chain, Asked())


def test_a_trace_ends_at_the_floor(chain: Store) -> None:
    """Whether what carries it lets it pass, and no more; the operator sees all."""

    def trace(path: str, to: str, asked: Asked) -> dict[str, Any]:
        world, row, names, floor = chain.world(path, asked.scope)
        return explain(world, row, ip_address(to), "tcp", 80, names, floor)

    whole = trace("cloud/shop/lab/p1", "10.0.0.3", Asked())
    assert len({step["layer"] for step in whole["steps"]}) == 4
    told = trace("lab/p1", "10.0.0.3", by("lab"))
    assert [(step["layer"], step["step"]) for step in told["steps"]] == [
        ("lab", step) for step in ("guard", "switch", "policy", "carry", "deliver")
    ]
    assert told["steps"][3]["text"] == "host v1 to host v2"
    low = trace("cloud/h1", "10.0.0.3", by("cloud"))
    rename = {"cloud": "lab", "h1": "p1", "h2": "p2", "m1": "v1", "m2": "v2"}
    text = re.sub(r"\b(cloud|h1|h2|m1|m2)\b", lambda m: rename[m[0]], json.dumps(low))
    assert json.loads(text) == told
    wish = network("h1", "h2", names="v", policies=[{"from": "hosts", "to": "hosts", "deny": "carriage"}])
    chain.apply(manifest(shop=wish), asked=by("shop"))
    shut = trace("lab/p1", "10.0.0.3", by("lab"))
    assert (shut["verdict"], shut["reason"], shut["detail"]) == (
        "drop", "carrier", "what carries lab lets nothing pass from host v1 to host v2",
    )  # fmt: skip


def test_a_grant_is_for_descendants_and_invitations_for_others(chain: Store) -> None:
    chain.apply(manifest({"stranger": {}}))
    answers = []
    for name in ("stranger", "absent"):
        with pytest.raises(NotFound) as refused:
            chain.grant("shop", name, asked=by("shop"))
        answers.append(str(refused.value).replace(name, "NAME"))
    assert answers[0] == answers[1]
    made, secret = chain.invite("shop", ["v1"], Quota(networks=1), time.time() + 60, by("shop"))
    assert (made["tenant"], made["hosts"]) == (None, ["v1"])
    got = chain.redeem(secret, "stranger", by("stranger"))
    assert (got["name"], got["network"], got["hosts"]) == ("hosts", None, ["v1"])
    with pytest.raises(NotFound, match="an invitation with this secret"):
        chain.redeem(secret, "stranger", by("stranger"))
    chain.apply(manifest(mine=network("v1")), asked=by("stranger"))
    with pytest.raises(Exhausted, match="granted for 1 networks; there are 1"):
        chain.apply(manifest(more=network("v1")), asked=by("stranger"))
    given = chain.all_grants(by("shop").scope)
    assert [(one["tenant"], one["used"]["networks"]) for one in given] == [("shop", 1), ("lab", 1), ("stranger", 1)]
    until = time.time() + 0.2
    _, secret = chain.invite("shop", None, NO_LIMITS, until, by("shop"))
    while time.time() <= until:
        time.sleep(0.01)  # the pace of looking at the clock
    with pytest.raises(NotFound, match="an invitation"):
        chain.redeem(secret, "stranger", by("stranger"))


def test_what_is_there_already_counts_under_the_grant(store: Store) -> None:
    """The operator puts networks where it likes; a grant that comes later has them."""
    deep = network("p1", names="q", tenant="acme")
    store.apply(manifest(a=network("m1", tenant="acme", networks={"in": deep})))
    store.grant(None, "acme", quota=Quota(networks=2))
    (grant,) = store.all_grants()
    assert grant["used"] == {"networks": 2, "segments": 2, "ports": 2, "rate": 2 * 10**11}
    with pytest.raises(Exhausted, match="granted for 2 networks"):
        store.apply(manifest(b=network("m1")), asked=by("acme"))
    with pytest.raises(Conflict, match="acme has 2 networks"):
        store.revoke_grant(grant["id"])


def test_grants_in_a_file(chain: Store) -> None:
    """A network that has the key has these grants and no others; without it they stay."""

    def shop(**more: Any) -> Manifest:
        return manifest(shop=network("h1", "h2", names="v", **more))

    chain.apply(manifest({"shop-more": {"parent": "shop"}}), asked=by("shop"))
    assert not chain.plan(shop(), scope=by("shop").scope)
    wish = shop(grants={"lab": {"networks": 3}, "shop-more": {"hosts": ["v2"]}})
    made = chain.apply(wish, asked=by("shop")).plan
    assert [(one.op, one.kind, one.path, one.pointer) for one in made.changes] == [
        ("~", "grant", "shop/lab", "/networks/shop/grants/lab"),
        ("+", "grant", "shop/shop-more", "/networks/shop/grants/shop-more"),
    ]
    assert not chain.apply(wish, asked=by("shop")).plan
    assert [host["name"] for host in chain.hosts(scope=by("shop-more").scope)[0]] == ["v2"]
    for refused, text, grants in (
        (Conflict, "lab has 1 networks on the hosts of shop: its grant stays", {}),
        (Invalid, "there is no tenant cloud", {"cloud": {}}),
        (Invalid, "shop has the hosts already", {"shop": {}}),
        (Invalid, "there is no host v3", {"lab": {"hosts": ["v3"]}}),
    ):
        with pytest.raises(refused, match=text):
            chain.apply(shop(grants=grants), asked=by("shop"))
    with pytest.raises(Exhausted, match="granted for 0 networks; there are 1"):
        chain.apply(shop(grants={"lab": {"networks": 0}}), asked=by("shop"))
    chain.apply(shop(grants={"lab": {}}), asked=by("shop"))
    assert chain.hosts(scope=by("shop-more").scope)[0] == []
    whole = network("m1", names="w", tenant="cloud", grants={"lab": {"networks": 1}})
    whole["networks"] = {"inner": {**network("w1"), "tenant": "lab"}}
    chain.apply(manifest(fresh=whole))
    (grant,) = [one for one in chain.all_grants() if one["network"] == "fresh"]
    assert grant["used"] == {"networks": 1, "segments": 1, "ports": 1, "rate": 10**11}


def test_limits_are_reserved_along_the_chain(chain: Store) -> None:
    chain.grant("cloud", "shop", quota=Quota(networks=4), asked=by("cloud"))
    with pytest.raises(Exhausted, match="granted for 4 networks; there are 1, 4 are reserved"):
        chain.grant("shop", "lab", quota=Quota(networks=4), asked=by("shop"))
    chain.grant("shop", "lab", quota=Quota(networks=2), asked=by("shop"))
    chain.apply(manifest(b=network("v1")), asked=by("lab"))
    with pytest.raises(Exhausted, match="granted for 2 networks; there are 2, and this asks for 1 more") as full:
        chain.apply(manifest(c=network("v1")), asked=by("lab"))
    assert full.value.limit == 2
    with pytest.raises(Exhausted, match="granted for 4 networks; there are 1, 2 are reserved"):
        chain.apply(manifest(x=network("h1"), y=network("h1")), asked=by("shop"))  # 1 + 2 + 2 reserved
    with pytest.raises(Exhausted, match="granted for 1 networks; there are 2"):
        chain.grant("shop", "lab", quota=Quota(networks=1), asked=by("shop"))
    chain.grant("shop", "lab", asked=by("shop"))  # no limit of its own: what shop has left
    chain.apply(manifest(c=network("v1")), asked=by("lab"))
    with pytest.raises(Conflict, match=r"^the tenants above have not so many networks left: ask them for more$"):
        chain.apply(manifest(d=network("v1")), asked=by("lab"))


def test_revoking(chain: Store) -> None:
    (grant,) = [one for one in chain.all_grants(by("cloud").scope) if one["tenant"] == "shop"]
    with pytest.raises(Conflict, match="shop has 2 networks on these hosts"):
        chain.revoke_grant(grant["id"], asked=by("cloud"))
    with pytest.raises(NotFound):
        chain.revoke_grant(grant["id"], asked=by("shop"))
    chain.change_grant(grant["id"], True, None, by("cloud"))
    for tenant, host in (("shop", "h1"), ("lab", "v1")):  # the grant that was made from it follows
        with pytest.raises(Conflict, match="nothing new is carried on these hosts now"):
            chain.apply(manifest(new=network(host)), asked=by(tenant))
    assert chain.apply(manifest(lab=network("v1")), asked=by("lab")).plan.changes  # less, and other, may be
    assert is_open(chain, "cloud/shop")
    chain.change_grant(grant["id"], None, True, by("cloud"))
    assert [is_open(chain, path) for path in ("cloud/shop", "cloud")] == [False, True]
    seen = chain.get("network", "lab", by("lab").scope)
    assert (seen["state"], seen["cause"]) == ("down: carrier", "what carries it is down")
    chain.change_grant(grant["id"], False, False, by("cloud"))
    assert is_open(chain, "cloud/shop")
    chain.apply(manifest(new=network("v1")), asked=by("lab"))


def test_a_grant_goes_with_all_that_it_carries(chain: Store) -> None:
    (grant,) = [one for one in chain.all_grants(by("cloud").scope) if one["tenant"] == "shop"]
    left = chain.revoke_grant(grant["id"], 3600.0, by("cloud"))
    assert left is not None
    assert left["ends"] > time.time()
    (had,) = [one for one in chain.all_grants(by("shop").scope) if one["network"] is None]
    assert had["ends"] == left["ends"]
    chain.look_around()
    assert paths(chain, by("lab")) == ["lab"]
    chain.revoke_grant(grant["id"], 0.0, by("cloud"))
    chain.look_around()
    assert paths(chain, Asked()) == ["cloud"]
    assert [one["tenant"] for one in chain.all_grants()] == ["cloud"]


def test_the_last_unit_goes_to_one(chain: Store) -> None:
    chain.grant("shop", "lab", quota=Quota(networks=2), asked=by("shop"))
    start = Barrier(100)

    def want(place: int) -> str:
        start.wait()
        try:
            chain.apply(manifest(**{f"n{place}": network("v1")}), asked=by("lab"))
        except Exhausted as error:
            return error.code
        return "made"

    with ThreadPoolExecutor(100) as pool:
        got = list(pool.map(want, range(100)))
    assert sorted(got) == ["made", *["quota_exceeded"] * 99]


def test_revoking_against_creating(chain: Store) -> None:
    """Whatever comes first: never a network without a grant."""
    for turn in range(10):
        chain.apply(manifest(lab={}), prune=True, asked=by("lab"))
        chain.delete("network", "lab", True, by("lab"))
        (grant,) = [one for one in chain.all_grants(by("shop").scope) if one["tenant"] == "lab"]
        start = Barrier(2)

        def attempt(work: Callable[[], Any], start: Barrier = start) -> bool:
            start.wait()
            try:
                work()
            except (Conflict, Forbidden, NotFound):
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            made = pool.submit(attempt, lambda: chain.apply(manifest(lab=network("v1")), asked=by("lab")))
            gone = pool.submit(attempt, lambda its=grant["id"]: chain.revoke_grant(its, asked=by("shop")))
            assert made.result() != gone.result(), turn
        if gone.result():
            chain.grant("shop", "lab", asked=by("shop"))
            chain.apply(manifest(lab=network("v1")), asked=by("lab"))


def test_a_tenant_brings_its_network_only_where_it_has_hosts(chain: Store) -> None:
    with pytest.raises((Forbidden, NotFound, Invalid)) as refused:
        chain.recarry("lab", None, {"p1": "m1", "p2": "m2"}, by("lab"))
    assert "m1" not in str(refused.value).replace("m1 is no host", "")
    assert paths(chain, Asked()) == ["cloud", "cloud/shop", "cloud/shop/lab"]


def test_the_rate_of_all_ports_is_limited_and_reserved(chain: Store) -> None:
    def rated(host: str, *rates: str | None) -> dict[str, Any]:
        ports = {
            f"r{n}": {"segment": "lan", "host": host, **({"rate": rate} if rate else {})}
            for n, rate in enumerate(rates)
        }
        return {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": ports}

    chain.apply(manifest(shop={**network("h1", "h2", names="v")}), asked=by("shop"))
    with pytest.raises(Exhausted, match=r"granted for a rate of 1gbit; there are 200gbit: .*without `rate` counts as"):
        chain.grant("shop", "lab", quota=Quota(rate=10**9), asked=by("shop"))
    chain.apply(manifest(lab=rated("v1", "300mbit", "300mbit")), asked=by("lab"))
    chain.grant("shop", "lab", quota=Quota(rate=10**9), asked=by("shop"))
    (one,) = chain.all_grants(by("lab").scope)
    assert (one["quota"]["rate"], one["used"]["rate"]) == (10**9, 600_000_000)
    with pytest.raises(Exhausted) as full:
        chain.apply(manifest(lab=rated("v1", "300mbit", "900mbit")), asked=by("lab"))
    assert str(full.value) == (
        "these hosts are granted for a rate of 1gbit; there are 600mbit, and this asks for 600mbit more: that is "
        "1200mbit in all; a port without `rate` counts as 100gbit"
    )
    with pytest.raises(Exhausted):
        chain.apply(manifest(lab=rated("v1", "300mbit", None)), asked=by("lab"))
    chain.apply(manifest(lab=rated("v1", "100mbit", "900mbit")), asked=by("lab"))
    # A tenant's own, and what it hands on is reserved: 1 Gb/s for lab, whatever lab uses.
    with pytest.raises(Exhausted, match="tenant shop may have a rate of 2gbit; it has 200gbit, 1gbit are reserved"):
        chain.set_tenant("shop", {"rate": 2 * 10**9}, asked=by("cloud"))
    slow = network("h1", "h2", names="v")
    for port in slow["ports"].values():
        port["rate"] = "500mbit"
    chain.apply(manifest(shop=slow), asked=by("shop"))
    chain.set_tenant("shop", {"rate": 2 * 10**9}, asked=by("cloud"))
    slow["ports"]["v1"]["rate"] = "501mbit"
    with pytest.raises(Exhausted, match="this asks for 1mbit more: that is 2001mbit in all"):
        chain.apply(manifest(shop=slow), asked=by("shop"))
    chain.grant("shop", "lab", asked=by("shop"))
    with pytest.raises(Conflict, match=r"^the tenants above have not so high a rate left: ask them for more$"):
        chain.apply(manifest(lab=rated("v1", "600mbit", "900mbit")), asked=by("lab"))


def test_what_carriers_drop_is_one_number(chain: Store) -> None:
    """For whoever does not see them; the operator sees why."""
    port = chain.get("port", "cloud/shop/lab/p1")
    (machine,) = [one["name"] for one in chain.list("machine")[0] if one["name"] == port["machine"]]
    drops = {"policy": 1, "carrier_policy": 2, "carrier_down": 3, "no_underlay_route": 4, "carrier_rate": 5}
    chain.report(machine, 1, ports={str(port["row"]): {"interface": "x", "drops": drops}})
    assert chain.get("port", "lab/p1", by("lab").scope)["attachment"]["drops"] == {"policy": 1, "carrier": 14}
    assert chain.get("port", "cloud/shop/lab/p1")["attachment"]["drops"] == drops


def test_a_plan_judges_what_comes_with_a_grant(store: Store) -> None:
    """Grant and networks in one file: the plan says what apply would, of new carriers and of those that are there."""
    store.apply(manifest({"cloud": {}, "lab": {"parent": "cloud"}}))
    store.grant(None, "cloud", quota=Quota(ports=5))

    def wish(ports: int, limit: int | None) -> Manifest:
        inner = {**network(*["w1"] * ports, names="x"), "tenant": "lab"}
        deep = {**network("x1", names="y"), "tenant": "lab"}
        grants = {"lab": {"ports": limit}} if limit is not None else {}
        whole = network("m1", names="w", tenant="cloud", grants=grants)
        return manifest(fresh={**whole, "networks": {"in": {**inner, "networks": {"deep": deep}}}})

    for _ in range(2):
        with pytest.raises(Exhausted, match="granted for 2 ports; there are 0, and this asks for 3 more"):
            store.plan(wish(2, 2))
        with pytest.raises(Exhausted, match=r"granted for 5 ports; there are (0|4), 5 are reserved"):
            store.plan(wish(2, 5))
        assert store.plan(wish(2, 4)).changes
        store.apply(wish(2, None))  # and now all of it is there, and counts under the grant that it is of
    store.apply(wish(2, 4))
    assert sorted(one["used"]["ports"] for one in store.all_grants()) == [1, 3]
