"""Encapsulated networks in the store: the machines on host ports, what each of them is told, and what is refused.

cloud on m1, m2, m3     its ports a, b, c are machines to
  vms                   encapsulated; and its ports to
    deep                encapsulated
  beside                encapsulated, on a and b
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from woken import nobody_sleeps

from nestnet.api.feed import _encode
from nestnet.model import domains
from nestnet.model.errors import Conflict, Exhausted, Forbidden, Invalid, NestnetError, NotFound
from nestnet.model.manifest import parse
from nestnet.model.renumber import renumbered
from nestnet.model.values import FABRIC, Machine, Network, Port, Value, World, kind_of
from nestnet.model.wire import from_wire
from nestnet.store import feed, objects, tables
from nestnet.store.feed import Teller
from nestnet.store.scope import Scope
from nestnet.store.store import Store

LAN = {"lan": {"cidr": "10.0.0.0/24"}}
NAMES = "abc"


def network(hosts: dict[str, str], **more: Any) -> dict[str, Any]:
    ports = {name: {"segment": "lan", "host": host, "hosts": True} for name, host in hosts.items()}
    return {"segments": LAN, "ports": ports, **more}


def on(names: str, **more: Any) -> dict[str, Any]:
    return network({name: name for name in names}, carriage="encapsulated", **more)


def whole(**more: Any) -> dict[str, Any]:
    vms = on(NAMES, networks={"deep": on(NAMES), "flat": network({name: name for name in NAMES})})
    hosts = {name: f"m{n}" for n, name in enumerate(NAMES, 1)}
    return manifest(cloud=network(hosts, networks={"vms": vms, "beside": on("ab")}, **more))


def manifest(**networks: Any) -> dict[str, Any]:
    return {"apiVersion": "nestnet/v1", "networks": networks}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store.db")
    for n in (1, 2, 3):
        made.join(f"m{n}", f"192.0.2.{n}", 9000)
    yield made
    made.close()


def apply(store: Store, data: dict[str, Any]) -> int:
    return store.apply(parse(data)).revision


def everything(store: Store) -> World:
    """All that is stored, as one world."""
    with store._database.read() as connection:
        ids = connection.scalars(select(tables.network.c.id).where(tables.network.c.id != FABRIC)).all()
        rows = [
            *objects.networks(connection, "id", ids),
            *objects.segments(connection, "network", ids),
            *objects.routers(connection, "network", ids),
            *objects.links(connection, "network", ids),
            *objects.ports(connection, "network", ids),
            *objects.policies(connection, "network", ids),
        ]
        told = Teller(connection, rows, False)
        machines = [value for _, value in feed.machines(connection, 0)]
        return World.of([*machines, *(told.value(row) for row in rows)])


def machines(store: Store) -> dict[int, tuple[int, int | None]]:
    """Every machine: its domain, and its port."""
    with store._database.read() as connection:
        found = {}
        for domain in connection.scalars(select(tables.network.c.id)).all():
            found.update({row.id: (domain, row.port) for row in objects.machines(connection, domain)})
        return found


def test_every_machine_is_told_what_its_domain_knows(store: Store) -> None:
    """The feed is `domains.within`, by other numbers."""
    apply(store, whole())
    world = everything(store)
    known = machines(store)
    assert len(known) == 9
    for machine, (domain, port) in known.items():
        told = {(kind, id): value for kind, id, value in store.snapshot_for(machine).rows}
        expected = domains.within(world, domain)
        by_port = {at: row for row, (of, at) in known.items() if of == domain and at is not None}

        def numbered(value: Value, by_port: dict[int, int] = by_port, inside: World = expected) -> Value:
            if isinstance(value, Machine) and domain != FABRIC:  # noqa: B023
                return replace(value, id=by_port[value.id])
            if isinstance(value, Port) and inside.networks[value.network].carrier == FABRIC:
                return replace(value, host=by_port.get(value.host, value.host))
            return value

        wanted = {}
        for value in expected:
            if isinstance(value, Machine) and domain != FABRIC and value.id not in by_port:
                continue  # nothing lives there
            one = numbered(value)
            wanted[type(one).__name__.lower(), one.id] = one
        if domain != FABRIC and "beside" in {store.get("network", n["id"])["name"] for n in store.list("network")[0]}:
            has = {
                v.network for v in expected.ports.values() if domains.agent(world, world.ports[v.id]).machine == port
            }
            wanted = {
                key: value
                for key, value in wanted.items()
                if isinstance(value, Machine) or (value.id if isinstance(value, Network) else value.network) in has
            }
        assert told == wanted


def test_what_is_told_bit_by_bit_is_what_is_told_at_once(store: Store) -> None:
    """Whatever happens at any level, whoever follows the feed knows what one who comes now is told."""
    rng = random.Random(20261128)
    apply(store, whole())
    known: dict[int, tuple[int, dict[tuple[str, int], Value]]] = {}
    below: dict[int, frozenset[int]] = {}

    def catch_up() -> None:
        for machine in machines(store):
            if machine not in known:
                batch = store.snapshot_for(machine)
                known[machine] = batch.revision, {(k, i): v for k, i, v in batch.rows if v is not None}
                below[machine] = batch.below
                continue
            since, have = known[machine]
            changes = store.changes_since(machine, since)
            assert changes is not None
            for kind, id, value in changes.rows:
                if value is None:
                    have.pop((kind, id), None)
                else:
                    have[kind, id] = value
            known[machine] = changes.revision, have
            now = {(k, i): v for k, i, v in store.snapshot_for(machine).rows}
            assert have == now, (machine, machines(store)[machine])
            nobody_sleeps(store.touched(since), machine, below[machine], changes)
            below[machine] = changes.below

    catch_up()
    paths = ["cloud", "cloud/vms", "cloud/vms/deep", "cloud/vms/flat", "cloud/beside"]
    is_short = False
    for turn in range(60):
        path, name = rng.choice(paths), rng.choice(NAMES)
        try:
            match rng.randrange(7):
                case 0:
                    store.set_enabled("network", path, rng.random() < 0.5)
                case 1:
                    store.set_enabled("port", f"{path}/{name}", rng.random() < 0.5)
                case 2:
                    _patch(store, path, {f"x{turn}": {"segment": "lan", "host": "m1" if path == "cloud" else "a"}})
                case 3:
                    store.delete("port", f"{path}/x{turn - 1}")
                case 4:
                    is_short = not is_short
                    apply(store, whole(**({"mtu": 8000} if is_short else {})))
                case 5:
                    store.fence(f"cloud/{name}", rng.random() < 0.5)
                case 6:
                    store.delete("network", "cloud/beside", cascade=True)
        except (NotFound, Conflict, Invalid):
            pass
        catch_up()


def test_machines_on_ports_are_told_the_same_by_numbers_of_their_domain(store: Store) -> None:
    """Every id, of every kind; and each stands for one row in one domain, in what is told bit by bit too."""
    vms = on(NAMES, networks={"deep": on(NAMES), "flat": network({name: name for name in NAMES})})
    vms["segments"] = {**LAN, "far": {"cidr": "10.0.1.0/24"}}
    vms["routers"] = {"r": {"segments": ["lan"]}, "s": {"segments": ["far"]}}
    vms["links"] = {"rs": {"between": ["r", "s"]}}
    vms["ports"]["t"] = {"native": "lan", "host": "a", "vlans": {"10": {"segment": "far", "groups": ["g", "h", "i"]}}}
    vms["policies"] = [{"from": ["group:g", "segment:far"], "to": ["port:a", "hosts", "10.0.0.0/8"], "allow": "any"}]
    hosts = {name: f"m{n}" for n, name in enumerate(NAMES, 1)}
    apply(store, manifest(cloud=network(hosts, networks={"vms": vms})))
    before = store.revision
    del vms["ports"]["t"]
    vms["policies"] = []
    vms["ports"]["u"] = {"segment": "lan", "host": "b"}
    seen: dict[tuple[str, int], tuple[str, int, int]] = {}  # what a number stands for, whoever is told

    def hear(machine: int, domain: int, batch: feed.Batch, world: dict[Any, Value]) -> None:
        told = json.loads(bytes(_encode(batch, store.identity, domain)["rows"]))
        for row, (kind, id, value) in zip(told, batch.rows, strict=True):
            assert row["id"] > 1 << 32, "or one in 2^31"
            assert seen.setdefault((kind, row["id"]), (kind, id, domain)) == (kind, id, domain)
            assert store.identity.numbered(kind, row["id"], domain) == id
            world.pop((kind, row["id"]), None)
            if value is not None:
                world[kind, row["id"]] = from_wire(kind, row["value"])
        back = {}
        networks = {value.id: value for value in world.values() if isinstance(value, Network)}
        for value in world.values():
            on_machine = isinstance(value, Port) and networks[value.network].carrier == FABRIC
            row = renumbered(
                value,
                lambda kind, number: store.identity.numbered(kind, number, domain),
                "machine" if on_machine else "port",
            )
            back[kind_of(row), row.id] = row
        assert back == {(kind, id): value for kind, id, value in store.snapshot_for(machine).rows}

    worlds: dict[int, dict[Any, Value]] = {}
    guests = {machine: domain for machine, (domain, _) in machines(store).items() if domain != FABRIC}
    assert len(guests) == 6
    for machine, domain in guests.items():
        hear(machine, domain, store.snapshot_for(machine), worlds.setdefault(machine, {}))
    apply(store, manifest(cloud=network(hosts, networks={"vms": vms})))
    for machine, domain in guests.items():
        batch = store.changes_since(machine, before)
        assert batch is not None
        hear(machine, domain, batch, worlds[machine])


def _patch(store: Store, path: str, ports: dict[str, Any]) -> None:
    """A few ports more in a network: the whole of it is said again."""
    data = whole()
    here = data["networks"]["cloud"]
    for part in path.split("/")[1:]:
        here = here["networks"][part]
    here["ports"] = {**here["ports"], **ports}
    apply(store, data)


def test_each_domain_has_its_own_vnis(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db", vnis=3)
    for n in (1, 2, 3):
        store.join(f"m{n}", f"192.0.2.{n}", 9000)
    apply(store, whole())
    vnis = {one["path"]: one["vni"] for one in store.list("segment")[0]}
    assert vnis["cloud/lan"] == vnis["cloud/vms/deep/lan"] == 1
    assert sorted(vnis[f"cloud/{path}/lan"] for path in ("vms", "vms/flat", "beside")) == [1, 2, 3]
    data = whole()
    data["networks"]["cloud"]["networks"]["more"] = on("a")
    before = store.revision
    with pytest.raises(Exhausted, match="no VNI is free: all 3 are used"):
        apply(store, data)
    assert store.revision == before
    apply(store, {**manifest(), "networks": {**whole()["networks"], "wired": {"segments": LAN}}})
    store.delete("network", "cloud/beside", cascade=True)
    with pytest.raises(Exhausted, match="wait for machines that may still use them"):
        apply(store, data)
    for machine in (f"cloud/{name}" for name in NAMES):  # those of the domain, and no others
        store.report(machine, store.revision)
    del data["networks"]["cloud"]["networks"]["beside"]
    apply(store, data)
    store.close()


def tower(levels: int, cidr: Any, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] | None = None
    for n in range(levels, 0, -1):
        one = network({"a": "m1"}) if n == 1 else on("a")
        one["segments"] = {"lan": {"cidr": cidr if n == levels else "10.0.0.0/24"}}
        if found is not None:
            one["networks"] = {f"l{n + 1}": found}
        found = one | (more if n == levels else {})
    return manifest(l1=found)


def test_the_wire_ends_somewhere(tmp_path: Path) -> None:
    """1500 bytes: three encapsulated levels over a flat one have IPv6, and seventeen IPv4."""
    store = Store(tmp_path / "store.db")
    store.join("m1", "192.0.2.1", 1500)
    for levels, cidr, least in ((4, "fd00::/64", 1280), (18, "10.0.0.0/24", 576)):
        apply(store, tower(levels, cidr))
        with pytest.raises(Invalid) as error:
            apply(store, tower(levels + 1, cidr))
        (problem,) = error.value.problems
        left = 1450 - 50 * levels
        family = "IPv6" if ":" in cidr else "IPv4"
        below = "/".join(f"l{n}" for n in range(1, levels + 1))
        assert problem.code == "mtu_too_small"
        assert problem.message == f"the machines on {below} leave an MTU of {left}, but {family} needs {least}"
        assert store.get("network", "/".join(f"l{n}" for n in range(1, levels + 1)))["mtu"] == 1450 - 50 * (levels - 1)
    with pytest.raises(Invalid, match="mtu is 1360, but the 1400 of l1/l2 less 50 for VXLAN leave 1350"):
        apply(store, tower(3, "10.0.0.0/24", mtu=1360))
    store.close()


def test_what_is_lowered_below_must_leave_enough_above(store: Store) -> None:
    apply(store, tower(4, "fd00::/64"))
    before = store.revision
    with pytest.raises(Invalid, match="segment lan needs an MTU of 1280, and 1250 would be left for it"):
        store.join("m1", "192.0.2.1", 1450)
    data = tower(4, "fd00::/64")
    data["networks"]["l1"]["mtu"] = 1400
    with pytest.raises(Invalid, match="the machines on l1/l2/l3 leave an MTU of 1250, but IPv6 needs 1280"):
        apply(store, data)
    assert store.revision == before


def wrong(path: str, **more: Any) -> dict[str, Any]:
    data = whole()
    here = data["networks"]["cloud"]
    for part in path.split("/")[1:]:
        here = here["networks"][part]
    here |= more
    return data


@pytest.mark.parametrize(
    ("data", "what", "text"),
    [
        (manifest(n=network({"a": "m1"}, carriage="encapsulated")), Invalid, "the wire carries it"),
        (wrong("cloud/beside", underlay=6), Invalid, "underlay is 6, but cloud/vms has 4 on the same hosts"),
        (wrong("cloud/beside", carriage="flat"), Conflict, "the carriage of network cloud/beside cannot be changed"),
        (wrong("cloud/beside", ports={"x": {"segment": "lan", "host": "d"}}), Invalid, "no port d"),
        (wrong("cloud/beside", carriage="Encapsulated"), Invalid, "carriage"),
    ],
    ids=["on the wire", "another family", "another carriage", "no such host", "no such word"],
)
def test_what_cannot_be_is_refused_and_nothing_is_stored(
    store: Store, data: dict[str, Any], what: type[NestnetError], text: str
) -> None:
    apply(store, whole())
    before = store.revision
    with pytest.raises(what, match=text):
        apply(store, data)
    assert store.revision == before
    assert len(machines(store)) == 9


def test_two_hosts_of_one_address_cannot_be_told_apart(store: Store) -> None:
    data = whole()
    cloud = data["networks"]["cloud"]
    cloud["segments"] = {"lan": {"cidr": "10.0.0.0/24"}, "other": {"cidr": "10.0.0.0/24"}}
    for name, segment in (("a", "lan"), ("b", "other")):
        cloud["ports"][name] |= {"segment": segment, "address": "10.0.0.9"}
    with pytest.raises(Invalid, match=r"host b has the address 10\.0\.0\.9, as a has") as error:
        apply(store, data)
    assert {problem.code for problem in error.value.problems} == {"duplicate_address"}


def test_a_network_stays_among_its_machines(store: Store) -> None:
    """Its VNIs are theirs, and nobody else knows what they mean."""
    apply(store, whole())
    for carrier in ("cloud/vms", None):
        with pytest.raises(Conflict, match="cloud/beside would be carried by other machines"):
            store.recarry("cloud/beside", carrier, {"a": "m1", "b": "m2"} if carrier is None else None)
    with pytest.raises(Conflict, match="would be carried by other machines"):
        store.recarry("cloud/vms/flat", "cloud")


def test_who_may_join_on_a_port(store: Store) -> None:
    """The machine below may let in who is on its ports, and no others; nobody where nothing needs an agent."""
    apply(store, whole())
    rows = {one["path"]: one["row"] for one in store.list("port")[0]}
    name = store.guest("cloud/a")
    assert store.guest(rows["cloud/a"], "m1") == name == store.get("port", "cloud/a")["id"]
    for port, machine in (("cloud/b", "m1"), ("cloud/vms/a", "m1"), ("cloud/vms/a", "cloud/b")):
        with pytest.raises(NotFound):
            store.guest(rows[port], machine)
    domain = store.domain_of(store.machine_row("cloud/a"))
    assert domain == store.network_row("cloud")
    row = store.identity.numbered("port", rows["cloud/vms/a"], domain)
    assert store.guest(row, "cloud/a") == store.get("port", "cloud/vms/a")["id"]
    with pytest.raises(Conflict, match="cloud/vms/flat/a runs no agent"):
        store.guest("cloud/vms/flat/a")
    with pytest.raises(Conflict, match="is on a port"):
        store.join(name, "192.0.2.9")
    # People too: whoever may write the port's network, and to all others it is not there.
    store.make_tenant("t")
    store.make_tenant("u")
    apply(store, whole(tenant="t"))
    own, other = frozenset({"t"}), frozenset({"u"})
    assert store.guest("cloud/a", scope=Scope(own, own)) == name
    with pytest.raises(Forbidden):
        store.guest("cloud/a", scope=Scope(own, frozenset()))
    with pytest.raises(NotFound, match="port cloud/a does not exist"):
        store.guest("cloud/a", scope=Scope(other, other))


def test_what_lives_on_an_agent_says_why_it_is_down(store: Store) -> None:
    apply(store, whole())
    absent = "the agent on cloud/a has never been there: `nestnet token join cloud/a` lets it in"
    assert store.get("network", "cloud")["state"] == "up"
    assert (store.get("network", "cloud/beside")["state"], store.get("network", "cloud/beside")["cause"]) == (
        "down: carrier",
        absent,
    )
    for machine in ("cloud/a", "cloud/b"):
        store.report(machine, store.revision)
    assert store.get("network", "cloud/beside")["state"] == "up"
    store.fence("cloud/b", True)
    found = store.get("network", "cloud/beside")
    assert (found["state"], found["cause"]) == ("degraded", "1 of 2 hosts are down: the agent on cloud/b is fenced")
    with pytest.raises(Conflict, match="is needed by port cloud/vms/a, port cloud/beside/a"):
        store.delete("port", "cloud/a")
