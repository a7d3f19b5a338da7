"""Networks that are made from lines, straight as rows, beside a plan of the same lines: the stores are equal, row by
row, and what one refuses the other refuses.

    base                hosts h1, h2 (and h6, which has no IPv4 address)
      inner             tenant acme, hosts i1
        new ones        at any of the three levels, by the operator, an owner or who was granted hosts
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError
from sqlalchemy import func, select

from nestnet.model import lines
from nestnet.model import manifest as rules
from nestnet.model.errors import Conflict, Exhausted, Invalid, NestnetError, NotFound
from nestnet.model.manifest import parse
from nestnet.store import Store, create, tables
from nestnet.store.once import Asked
from nestnet.store.quotas import Quota
from nestnet.store.scope import Scope

NOT_COMPARED = {("event", "at"), ("store", "epoch"), ("store", "key"), ("idempotency", "at")}
OPERATOR = Asked("uid:0")
OWNER = Asked("token:acme", "acme", scope=Scope(frozenset({"acme"}), frozenset({"acme"})))
GUEST = Asked("token:guest", "guest", scope=Scope(frozenset({"guest"}), frozenset({"guest"})))
BASE = {
    "segments": {"lan": {"cidr": ["10.0.0.0/24", "fd00::/64"]}},
    "ports": {
        "h1": {"segment": "lan", "host": "m1", "hosts": True},
        "h2": {"segment": "lan", "host": "m2", "hosts": True},
        "h6": {"segment": "lan", "host": "m2", "hosts": True, "address": "fd00::66"},
        "none": {"segment": "lan", "host": "m2"},
    },
    "networks": {
        "inner": {
            "tenant": "acme",
            "segments": {"lan": {"cidr": "10.0.0.0/24"}},
            "ports": {"i1": {"segment": "lan", "host": "h1", "hosts": True}},
            "networks": {"there": {}},
        },
        "sibling": {},
    },
}


@contextmanager
def stores(folder: Path, limited: bool = False) -> Iterator[tuple[Store, Store]]:
    """Two that are the same."""
    first = Store(folder / "plain.db", vnis=50)
    for place, name in enumerate(("m1", "m2"), 1):
        first.join(name, f"192.0.2.{place}")
    quotas = ({"ports": 4, "networks": 5}, {"segments": 3}) if limited else ({}, {})
    tenants = {name: {"quota": quota} for name, quota in zip(("acme", "guest"), quotas, strict=True)}
    first.apply(parse({"apiVersion": "nestnet/v1", "networks": {"base": BASE}, "tenants": tenants}))
    first.grant("base", "guest", ["h1"], Quota(ports=2) if limited else Quota())
    first.close()
    shutil.copy(folder / "plain.db", folder / "planned.db")
    first, second = Store(folder / "plain.db"), Store(folder / "planned.db")
    try:
        yield first, second
    finally:
        first.close()
        second.close()


def rows_of(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    found = {}
    with store._database.read() as connection:
        for name, table in tables.metadata.tables.items():
            columns = [column for column in table.columns if (name, column.name) not in NOT_COMPARED]
            found[name] = sorted(map(tuple, connection.execute(select(*columns)).all()), key=repr)
    return found


def made(store: Store, lines: list[bytes], asked: Asked) -> tuple[Any, ...]:
    """What comes of it."""
    try:
        answer = store.create(lines, asked)
    except NestnetError as error:
        problems = error.problems if isinstance(error, Invalid) else ()
        return type(error), error.code, error.message, problems
    return (answer["first"], answer["count"])


@contextmanager
def by_plan() -> Iterator[None]:
    """Nothing is plain."""
    read = create.columns
    create.columns = lambda _lines: None  # type: ignore[assignment]
    try:
        yield
    finally:
        create.columns = read


def both(folder: Path, batches: list[tuple[Asked, list[bytes]]], limited: bool = False) -> int:
    """Make these in both ways, one after the other. Returns how many parts were plain."""
    count = 0
    with stores(folder, limited) as (first, second):
        for asked, lines in batches:
            planned: list[bytes] = []
            make = create.make_by_plan

            def seen(connection: Any, identity: Any, job: Any, make: Any = make, planned: Any = planned) -> Any:
                planned.extend(job.lines)
                return make(connection, identity, job)

            create.make_by_plan = seen
            try:
                one = made(first, lines, asked)
            finally:
                create.make_by_plan = make
            with by_plan():
                two = made(second, lines, asked)
            assert one == two, lines
            mine, theirs = rows_of(first), rows_of(second)
            for table in mine:
                assert mine[table] == theirs[table], (table, lines)
            count += not planned
    return count


def line(name: str = "new", **spec: Any) -> bytes:
    return json.dumps({"name": name, **spec}, ensure_ascii=False).encode()


def lan(**ports: Any) -> dict[str, Any]:
    return {"segments": {"lan": {"cidr": "10.0.0.0/24"}}, "ports": ports}


def port(host: str = "m1", **more: Any) -> dict[str, Any]:
    return {"segment": "lan", "host": host, **more}


PLAIN: dict[str, tuple[Asked, list[bytes]]] = {
    "nothing in it": (OPERATOR, [line()]),
    "several": (OPERATOR, [line(f"n{i}", **lan(a=port("m1"), b=port("m2"))) for i in range(20)]),
    "words": (OPERATOR, [line(description="für alle", labels={"b": "2", "a": "1"}, enabled=False, tenant="acme")]),
    "addresses": (
        OPERATOR,
        [line(**lan(a=port(address="10.0.0.3"), b=port(), c=port(address=["10.0.0.2"]), d=port()))],
    ),
    "two families": (
        OPERATOR,
        [
            line(
                segments={"lan": {"cidr": ["fd00::/64", "10.0.0.0/30"], "dns": ["10.0.0.1", "fd00::1"]}, "empty": {}},
                ports={"a": port(address=["fd00::9", "10.0.0.2"]), "b": {"segment": "empty", "host": "m2"}},
            )
        ],
    ),
    "groups and policies": (
        OPERATOR,
        [
            line(
                **lan(a=port(groups="web"), b=port("m2", groups=["db", "web"], hosts=True)),
                policies=[
                    {"from": "web", "to": "group:db", "allow": ["tcp/5432", "udp/53"]},
                    {"from": "any", "to": ["10.0.0.0/24", "port:a", "lan"], "deny": "icmp", "priority": 7},
                    {"from": "inside", "to": "hosts", "allow": "carriage"},
                    {"from": ["group:web"], "to": ["db"], "allow": ["udp/53", "tcp/5432", "udp/53"]},
                ],
            )
        ],
    ),
    "escapes": (OPERATOR, [b'{"name": "\\u0061", "description": "\\"\\u00fc\\""}']),
    "transparent": (OPERATOR, [line(segments={"lan": {"transparent": True}}, ports={"a": port()})]),
    "carried": (OPERATOR, [line(carrier="base", **lan(a=port("h1"), b=port("h2"), c=port("h1")))]),
    "carried twice": (OPERATOR, [line(carrier="base/inner", **lan(a=port("i1")))]),
    "an owner's": (OWNER, [line(carrier="inner", **lan(a=port("i1")))]),
    "a guest's": (GUEST, [line("a", **lan(a=port("h1"))), line("b", **lan(a=port("h1")))]),
    "a full domain, nearly": (OPERATOR, [line(f"n{i}", segments={"a": {}}) for i in range(40)]),
}
OTHERS: dict[str, tuple[Asked, list[bytes]]] = {
    "a router": (OPERATOR, [line(**lan(a=port()), routers={"r": {"segments": ["lan"]}})]),
    "a tree": (OPERATOR, [line("a", **lan(h=port(hosts=True))), line("b", carrier="a", **lan(p=port("h")))]),
    "a tree, deepest first": (
        OPERATOR,
        [line("b", carrier="a", **lan(p=port("h"))), line("a", **lan(h=port(hosts=True)))],
    ),
    "in one line": (OPERATOR, [line("a", **lan(h=port(hosts=True)), networks={"b": lan(p=port("h"))})]),
    "a new tenant": (OPERATOR, [line(tenant="fresh")]),
    "a rate": (OPERATOR, [line(**lan(a=port(rate="10mbit")))]),
    "real stacking": (OPERATOR, [line(carrier="base", carriage="encapsulated", **lan(a=port("h1")))]),
    "no such machine": (OPERATOR, [line("fine"), line(**lan(a=port("m3")))]),
    "no host": (OPERATOR, [line(carrier="base", **lan(a=port("none")))]),
    "no family": (OPERATOR, [line(carrier="base", **lan(a=port("h6")))]),
    "no carrier": (OPERATOR, [line(carrier="bse")]),
    "a carrier without a name": (OPERATOR, [line(carrier="")]),
    "a tenant without a name": (OPERATOR, [line(tenant="")]),
    "no such way": (OPERATOR, [line(carrier="base/inner/there/further")]),
    "there already": (OPERATOR, [line("other"), line("base")]),
    "there already, further up": (OPERATOR, [line("inner", carrier="base")]),
    "twice": (OPERATOR, [line("a"), line("a")]),
    "outside": (OPERATOR, [line(**lan(a=port(address="10.0.1.3")))]),
    "the gateway's": (OPERATOR, [line(**lan(a=port(address="10.0.0.0")))]),
    "full": (OPERATOR, [line(segments={"lan": {"cidr": "10.0.0.0/30"}}, ports={"a": port(), "b": port()})]),
    "two of a family": (OPERATOR, [line(segments={"lan": {"cidr": ["10.0.0.0/24", "10.1.0.0/24"]}})]),
    "no name": (OPERATOR, [line("any")]),
    "no line": (OPERATOR, [b"", b"{"]),
    "no mapping": (OPERATOR, [b"[1]"]),
    "no name at all": (OPERATOR, [b"{}"]),
    "a key twice": (OPERATOR, [b'{"name": "a", "description": "x", "description": "y"}']),
    "a segment twice": (OPERATOR, [b'{"name": "a", "segments": {"s": {}, "s": {}}}']),
    "a quote in disguise": (OPERATOR, [b'{"name": "a", "description": "\\u0022"}']),
    "an unknown key": (OPERATOR, [line(nam="x")]),
    "an unknown name": (OPERATOR, [line(policies=[{"from": "web", "to": "any", "allow": "any"}])]),
    "two things at once": (
        OPERATOR,
        [line(**lan(a=port(groups="lan")), policies=[{"from": "lan", "to": "any", "allow": "any"}])],
    ),
    "allow and deny": (OPERATOR, [line(policies=[{"from": "any", "to": "any", "allow": "any", "deny": "any"}])]),
    "neither": (OPERATOR, [line(policies=[{"from": "any", "to": "any"}])]),
    "from nobody": (OPERATOR, [line(policies=[{"from": [], "to": "any", "allow": "any"}])]),
    "an empty address": (OPERATOR, [line(**lan(a=port(address=[])))]),
    "a fraction": (OPERATOR, [b'{"name":"a","policies":[{"from":"any","to":"any","allow":"any","priority":1.0}]}']),
    "more than there are": (OPERATOR, [line(f"n{i}", segments={"a": {}}) for i in range(60)]),
    "somebody else's": (GUEST, [line(carrier="base")]),
    "not granted": (GUEST, [line(**lan(a=port("h2")))]),
    "an owner without hosts": (OWNER, [line()]),
    "an owner, further up": (OWNER, [line(carrier="inner/there", **lan(a=port("i1")))]),
    "not whose it is": (OWNER, [line(carrier="inner", tenant="guest")]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_plain_gets_the_rows_that_a_plan_gives(name: str, tmp_path: Path) -> None:
    assert both(tmp_path, [PLAIN[name]]) == 1


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_goes_by_a_plan(name: str, tmp_path: Path) -> None:
    assert both(tmp_path, [OTHERS[name]]) == 0


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_plain_counts_against_limits_as_in_a_plan(name: str, tmp_path: Path) -> None:
    """The same again and again, until somebody has no more: the last is refused in the same words."""
    asked, lines = PLAIN[name]
    batches = [(asked, [one.replace(b'"name": "', b'"name": "%d' % n, 1) for one in lines]) for n in range(4)]
    both(tmp_path, batches, limited=True)


NAMES = st.sampled_from(["a", "b", "c", "lan", "any", "x" * 64])
HOSTS = st.sampled_from(["m1", "m2", "h1", "i1", "h6", "m9"])
ADDRESSES = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.255", "10.1.0.9", "fd00::5", "x", "127.0.0.1"])
CIDRS = st.sampled_from(["10.0.0.0/24", "10.0.0.0/30", "fd00::/64", "10.1.0.0/16", "10.0.0.1/24", "0.0.0.0/0"])


def some(of: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return of | st.lists(of, max_size=3)


def maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


SELECTORS = NAMES | st.sampled_from(["any", "inside", "hosts", "10.0.0.0/8", "group:a", "port:b", "segment:lan"])
SERVICES = st.sampled_from(["any", "tcp", "tcp/80", "tcp/80-90", "udp/53", "icmp", "tcp/0", "carriage"])
LINES = st.builds(
    lambda name, rest, carrier, segments, ports: {
        "name": name,
        **rest,
        **carrier,
        "segments": segments,
        "ports": ports,
    },
    NAMES,
    maybe(
        tenant=st.sampled_from(["acme", "guest", "new"]),
        enabled=st.booleans(),
        description=st.sampled_from(["", "x", "ü", "\x07"]),
        labels=st.dictionaries(NAMES, st.sampled_from(["", "x"]), max_size=2),
        policies=st.lists(
            st.fixed_dictionaries(
                {"from": some(SELECTORS), "to": some(SELECTORS)},
                optional={"allow": some(SERVICES), "deny": some(SERVICES), "priority": st.sampled_from([0, 7, 70000])},
            ),
            max_size=3,
        ),
        mtu=st.sampled_from([1400, 9000]),
    ),
    maybe(carrier=st.sampled_from(["base", "base/inner", "inner", "nowhere"])),
    st.dictionaries(
        NAMES, maybe(cidr=some(CIDRS), dns=some(ADDRESSES), transparent=st.booleans(), description=NAMES), max_size=2
    ),
    st.dictionaries(
        NAMES,
        st.fixed_dictionaries(
            {"segment": NAMES, "host": HOSTS},
            optional={
                "address": some(ADDRESSES),
                "groups": some(NAMES),
                "hosts": st.booleans(),
                "enabled": st.booleans(),
                "mac": st.sampled_from(["02:00:00:00:00:07"]),
            },
        ),
        max_size=3,
    ),
)


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_lines_say(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    batches = data.draw(
        st.lists(
            st.tuples(st.sampled_from([OPERATOR, OWNER, GUEST]), st.lists(LINES, min_size=1, max_size=3)), max_size=3
        )
    )
    folder = tmp_path_factory.mktemp("lines")
    encoded = [(asked, [json.dumps(one).encode() for one in lines]) for asked, lines in batches]
    both(folder, encoded, data.draw(st.booleans()))


def some_cidrs() -> st.SearchStrategy[str]:
    """Right and wrong ones."""
    octets = st.lists(st.integers(0, 260).map(str) | st.sampled_from(["00", "010", "", "1e1"]), min_size=3, max_size=5)
    sizes = st.integers(-1, 33).map(str) | st.sampled_from(["024", "", "+8", "8 "])
    made = st.builds(lambda address, size: f"{'.'.join(address)}/{size}", octets, sizes)
    exact = st.builds(IPv4Network, st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)), st.just(False))
    return made | exact.map(str) | st.sampled_from(["10.0.0.0", "10.0.0.0/24/8", "fd00::/64", "10.0.0.0\0/24"])


@given(some_cidrs())
def test_a_cidr_is_read_as_the_rules_read_it(text: str) -> None:
    try:
        prefix = rules.read_cidr(text)
    except PydanticCustomError:
        assert lines._cidr(text) is None
    else:
        assert lines._cidr(text) == (str(prefix), prefix.version, int(prefix.network_address), prefix.num_addresses)


def test_a_key_makes_it_once(tmp_path: Path) -> None:
    with stores(tmp_path) as (store, _):
        asked = Asked("uid:0", key="k")
        first = store.create([line("a")], asked)
        assert store.create([line("a")], asked) == first
        with pytest.raises(Conflict) as error:
            store.create([line("b")], asked)
        assert error.value.code == "key_reused"
        for way in (NotFound, Conflict):
            with pytest.raises(way):
                store.create([line("x", carrier="nowhere") if way is NotFound else line("a")])


def test_the_last_number_is_given_out_once(tmp_path: Path) -> None:
    with stores(tmp_path) as (store, _):
        store.create([line("all", segments={f"s{place}": {} for place in range(47)})])
        store.create([line("last", segments={"s": {}})])
        with pytest.raises(Exhausted) as error:
            store.create([line("more", segments={"s": {}})])
        assert (error.value.code, error.value.limit) == ("vni_exhausted", 50)


VNIS = int(os.environ.get("NESTNET_VNIS", "8"))
EACH, PART = min(255, VNIS // 3), 20  # Segments of a network, and networks made at once.


def test_a_whole_space_of_vnis_is_given_out_once_each(tmp_path: Path) -> None:
    """And one more is refused with nothing stored, in either way. NESTNET_VNIS=16777215 is all that 24 bits have."""
    with closing(Store(tmp_path / "store.db", vnis=VNIS)) as store:
        networks = [min(EACH, VNIS - first) for first in range(0, VNIS, EACH)]
        begun = time.monotonic()
        for first in range(0, len(networks), PART):
            store.create(
                [
                    line(f"n{first + place}", segments={f"s{segment}": {} for segment in range(count)})
                    for place, count in enumerate(networks[first : first + PART])
                ]
            )
        took = time.monotonic() - begun
        full = extent(store)
        assert full["segment"] == (VNIS, sum(range(VNIS + 1)))
        assert full["vni_range"] == (0, None)
        with store._database.read() as connection:
            vni = tables.segment.c.vni
            low, high, different = connection.execute(
                select(func.min(vni), func.max(vni), func.count(vni.distinct()))
            ).one()
        assert (low, high, different) == (1, VNIS, VNIS)
        size = sum(file.stat().st_size for file in tmp_path.iterdir())
        print(f"{VNIS} VNIs in {took:.1f} s, {size:,} bytes")
        begun = time.monotonic()
        for more in ([line("more", segments={"s": {}})], [line("none"), line("more", **lan())]):
            for way in (nullcontext, by_plan):
                with way(), pytest.raises(Exhausted) as error:  # type: ignore[operator]
                    store.create(more)
                assert (error.value.code, error.value.limit) == ("vni_exhausted", VNIS)
                assert extent(store) == full
        print(f"refused four times in {time.monotonic() - begun:.1f} s")
    (tmp_path / "store.db").unlink()  # Of all 24 bits it is large, and pytest keeps folders.


def extent(store: Store) -> dict[str, tuple[int, int | None]]:
    """How many rows each table has, and the sum of a column of it."""
    columns = {"segment": "vni", "revision": "n", "counter": "last", "tally": "n", "vni_range": "lo"}
    found = {}
    with store._database.read() as connection:
        for name, table in tables.metadata.tables.items():
            column = table.c[columns.get(name, next(iter(table.c.keys())))]
            total = func.sum(column) if name in columns else func.max(column)
            count, value = connection.execute(select(func.count(), total).select_from(table)).one()
            found[name] = (count, value)
    return found
