"""The network file: what YAML 1.2 means, where things are, that nothing breaks the reader, that dump undoes load."""

from __future__ import annotations

import json
import string
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from golden_files import ROOT, same
from hypothesis import given
from hypothesis import strategies as st

from nestnet.file import Unreadable, dump, json_schema, load, render
from nestnet.file import reader as limits
from nestnet.file.reader import TextError, read, scalar
from nestnet.model import manifest as m
from nestnet.model.errors import Invalid, Problem
from nestnet.model.manifest import Manifest, parse, to_data
from nestnet.model.problems import CODES
from nestnet.model.validate import Known, check

QUICKSTART = (ROOT / "examples" / "quickstart.yaml").read_text()


# What YAML 1.2 means


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("y", "y"),
        ("12:30:45", "12:30:45"),
        ("02:00:00:00:00:01", "02:00:00:00:00:01"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("2026-11-22", "2026-11-22"),
        ("=", "="),
        ("10.0.0.0/24", "10.0.0.0/24"),
        ("tcp/80", "tcp/80"),
        ("-", "-"),
        (".", "."),
        ("+", "+"),
        ("0o8", "0o8"),
        ("9" * 5000, "9" * 5000),
        ("true", True),
        ("FALSE", False),
        ("", None),
        ("~", None),
        ("Null", None),
        ("10", 10),
        ("-3", -3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_quoted_scalars_are_text() -> None:
    assert read("""{a: "10", b: 'true', c: !x }""".replace("!x", "'~'")).data == {"a": "10", "b": "true", "c": "~"}


def test_keys_are_text() -> None:
    assert read("{1: a, true: b, ~: c, 1.0: d}").data == {"1": "a", "true": "b", "~": "c", "1.0": "d"}


def test_anchors_are_shared_and_may_be_given_again() -> None:
    assert read("a: &x {p: 1}\nb: *x\nc: &x [2]\nd: *x\n? &k e\n: *k\n").data == {
        "a": {"p": 1},
        "b": {"p": 1},
        "c": [2],
        "d": [2],
        "e": "e",
    }


def test_utf8_with_a_byte_order_mark() -> None:
    assert read("\ufeffa: é".encode()).data == {"a": "é"}


# Where things are


def test_positions_of_keys_values_and_what_is_missing() -> None:
    text = "a:\n  b: [x,\n    {c/d: 1}]\nanchor: &x {k: v}\nalias: *x\n"
    at = read(text).positions
    assert at[""] == (1, 1)
    assert at["/a"] == (1, 1)
    assert at.value("/a") == (2, 3)
    assert at["/a/b"] == (2, 3)
    assert at["/a/b/0"] == (2, 7)
    assert at["/a/b/1/c~1d"] == (3, 6)
    assert at.value("/a/b/1/c~1d") == (3, 11)
    assert at["/alias"] == (5, 1)
    assert at.value("/alias") == (5, 8)
    assert at["/alias/k"] == (4, 13), "what an alias repeats is where it was written"
    assert at["/a/b/1/missing/deeper"] == (3, 5), "a missing key is where its mapping is"
    assert "/a/b/1" in at
    assert "/a/b/2" not in at


def test_render_is_in_the_order_of_the_text() -> None:
    document = load(QUICKSTART, "q.yaml")
    late, early = Problem("bad_check", "/checks/2/send", "second"), Problem("unknown_key", "/machines", "first")
    line, column = document.positions["/checks/2/send"]
    assert "send: udp/8000" in QUICKSTART.splitlines()[line - 1][column - 1 :]
    assert render([late, early], document) == (
        f"q.yaml:8:1: unknown_key: first\nq.yaml:{line}:{column}: bad_check: second"
    )


def test_problems_of_an_alias_are_told_once() -> None:
    text = "apiVersion: nestnet/v1\nnetworks: {a: &n {segments: {s: {cidr: 10.0.0.1/24}}}, b: *n}\n"
    with pytest.raises(Unreadable) as raised:
        load(text)
    assert {p.code for p in raised.value.problems} == {"host_bits"}


# Load and dump


def test_quickstart_is_right() -> None:
    document = load(QUICKSTART, "quickstart.yaml", Known())
    assert document.manifest is not None
    networks = document.manifest.networks or {}
    assert networks["acme"].segments == networks["globex"].segments, "the same addresses in both"
    assert {check.expect for check in document.manifest.checks or ()} == {"allow", "deny"}


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.name)
def test_examples(file: Path) -> None:
    text = file.read_text()
    by_hand = not text.startswith("# Made by `nestnet import")
    assert not by_hand or text.startswith("# yaml-language-server: $schema=../schema/nestnet.v1.json\n")
    document = load(text, file.name, Known())
    assert document.manifest is not None
    _fixpoint(document.manifest)
    assert f"]({file.name})" in (ROOT / "examples" / "README.md").read_text()


def _fixpoint(manifest: Manifest) -> None:
    text = dump(manifest)
    again = load(text).manifest
    assert again == manifest
    assert dump(again) == text
    assert parse(json.loads(json.dumps(to_data(manifest)))) == manifest


names = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=3).filter(lambda n: n not in m.RESERVED)
tricky = st.sampled_from(
    ["yes", "0o17", "1e3", "012", "12:30", "~", "null", "=", "- x", "#", "a: b", " ", "é", "\U0001f600"]
)
texts = tricky | st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=20)
labels = st.dictionaries(names, texts, max_size=2)
octet = st.integers(2, 254)


@st.composite
def manifests(draw: st.DrawFn, depth: int = 2) -> dict[str, Any]:
    """Files that break no rule, of every key there is."""
    machine = st.fixed_dictionaries({}, optional={"labels": labels})
    machines = draw(st.dictionaries(names, machine, min_size=1, max_size=3))
    return {
        "apiVersion": "nestnet/v1",
        "machines": machines,
        "networks": draw(st.dictionaries(names, _networks(sorted(machines), depth), max_size=2)),
    }


def _networks(hosts: list[str], depth: int) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def network(draw: st.DrawFn) -> dict[str, Any]:
        segments = draw(st.lists(names, min_size=1, max_size=3, unique=True))
        data: dict[str, Any] = draw(
            st.fixed_dictionaries({}, optional={"labels": labels, "description": texts, "tenant": names})
        )
        data["segments"] = {
            name: {"cidr": draw(st.sampled_from([f"10.{i}.0.0/24", [f"10.{i}.0.0/24", f"fd00:{i}::/64"]]))}
            for i, name in enumerate(segments)
        }
        if draw(st.booleans()):
            joined = draw(st.lists(st.sampled_from(segments), unique=True))
            data["routers"] = {draw(names): {"segments": joined}}
            for name in draw(st.lists(names, max_size=2, unique=True)):
                data["routers"].setdefault(name, {})
            pairs = list(combinations(data["routers"], 2))
            for name in draw(st.lists(names, max_size=2, unique=True)) if pairs else []:
                link: dict[str, Any] = {"between": list(draw(st.sampled_from(pairs)))}
                if draw(st.booleans()):
                    link |= {"cost": draw(st.integers(1, 65535)), "up": draw(st.booleans())}
                    link["rate"] = draw(st.sampled_from([8000, 123456789, "64kbit", "1.5gbit", "99999bit"]))
                data.setdefault("links", {})[name] = link
        ports: dict[str, Any] = {}
        for number, name in enumerate(draw(st.lists(names, max_size=4, unique=True)), 2):
            segment = draw(st.sampled_from(segments))
            port: dict[str, Any] = {"segment": segment, "host": draw(st.sampled_from(hosts))}
            if draw(st.booleans()):
                port["address"] = f"10.{segments.index(segment)}.0.{number}"
            if draw(st.booleans()):
                port["mac"] = f"02:00:00:00:00:{number:02X}"
            if draw(st.booleans()):
                port["owns"] = [f"172.16.{number}.0/24"]
            if draw(st.booleans()):
                port["groups"] = ["g1", "g2"][: draw(st.integers(1, 2))]
            port["hosts"] = draw(st.booleans())
            if not port["hosts"] and draw(st.booleans()):
                port["rate"] = draw(st.sampled_from(["10mbit", 8000]))
            others = [other for other in segments if other != segment]
            if others and draw(st.booleans()):
                port["native"] = port.pop("segment")
                vlan = {"segment": others[0], "groups": ["g1"], "owns": [f"172.17.{number}.0/24"], "enabled": False}
                port["vlans"] = {str(draw(st.integers(1, 4094))): draw(st.sampled_from([others[0], vlan]))}
            ports[name] = port
        data["ports"] = ports
        if draw(st.booleans()):
            data["policies"] = [
                {"from": "any", "to": f"segment:{segments[0]}", "allow": ["tcp/80-90", "icmp"], "priority": 7}
            ]
        carrying = [name for name, port in ports.items() if port["hosts"]]
        if carrying and depth > 1:
            data["networks"] = draw(st.dictionaries(names, _networks(carrying, depth - 1), max_size=2))
        return data

    return network()


@given(manifests())
def test_dump_undoes_load(data: dict[str, Any]) -> None:
    _fixpoint(check(data, Known()))


# Nothing but Unreadable


@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_text(text: str | bytes) -> None:
    _judged(text)


@given(st.text(st.sampled_from("ab:-? []{}&*!|>'\"#%@`,\n\t 01~<\\x"), max_size=60))
def test_any_text_of_yaml_characters(text: str) -> None:
    _judged(text)


@given(st.data())
def test_any_damage(data: st.DataObject) -> None:
    """The quickstart with a piece cut out or something put in."""
    start = data.draw(st.integers(0, len(QUICKSTART)))
    end = data.draw(st.integers(start, min(start + 30, len(QUICKSTART))))
    _judged(QUICKSTART[:start] + data.draw(st.text(max_size=5)) + QUICKSTART[end:])


def _judged(text: str | bytes) -> None:
    try:
        assert load(text, "f.yaml", Known()).manifest is not None
    except Unreadable as unreadable:
        error = unreadable
    else:
        return
    assert error.problems
    for problem, line in zip(error.problems, str(error).splitlines(), strict=True):
        assert problem.code in CODES
        assert line.startswith("f.yaml:")
        assert line.isprintable()
    str(error).encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_any_json(data: object) -> None:
    with pytest.raises(Invalid):
        check(data, Known())


@given(st.data())
def test_any_json_somewhere_in_a_manifest(data: st.DataObject) -> None:
    """Whatever stands in any one place, the answer is a manifest or a list of problems that can be sent."""
    whole = json.loads(json.dumps(read(QUICKSTART).data))
    at, junk = whole, data.draw(json_values | st.sampled_from(["10.0.0.0/24", "web", -1, 2**70, "\ud800", "a" * 99]))
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans())):
            break
        at = at[key]
    if isinstance(at, dict) and data.draw(st.booleans()):
        key = data.draw(st.text(max_size=5) | st.just("\ud800"))
    at[key] = junk
    try:
        check(whole, Known())
    except Invalid as error:
        for problem in error.problems:
            assert problem.code in CODES
            f"{problem.pointer} {problem.message} {problem.nearest}".encode()


# Bounds


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 100_000,
        "? " * 100_000,
        "- " * 100_000,
        "\n".join(" " * i + "a:" for i in range(2_000)),
        "a: &a [x]\n" + "b: [" + "*a, " * 200_000 + "]",
        "[" + "a," * 1_100_000 + "]",
        "a" * (limits.MAX_BYTES + 1),
        "'" * 1_000_000,
        "#" * 1_000_000 + "\n",
        "a: |\n" + " x\n" * 200_000,
        "\n" * 1_000_000 + "a: [",
    ],
    ids=lambda text: text[:12].encode("unicode_escape").decode(),
)
def test_hostile_text_is_judged_quickly(text: str) -> None:
    began = time.perf_counter()
    with pytest.raises(Unreadable):
        load(text)
    assert time.perf_counter() - began < 30  # measured: at most 5 s, for a million values


def test_networks_to_the_published_depth_and_no_deeper() -> None:
    def nested(levels: int) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for _ in range(levels):
            data = {"networks": {"n": data}}
        return {"apiVersion": "nestnet/v1", **data}

    manifest = check(nested(64), Known())
    _fixpoint(manifest)
    for levels in (65, 5_000):
        with pytest.raises(Invalid) as raised:
            check(nested(levels), Known())
        assert [problem.code for problem in raised.value.problems] == ["too_deep"]


def many_ports(count: int = 20_000) -> str:
    lines = [
        f"      p{i}: {{segment: s{i % 10}, host: m{i % 100}, address: 10.{i % 10}.{i >> 8}.{i & 255}, "
        f"mac: '02:00:00:00:{i >> 8:02x}:{i & 255:02x}', groups: [g{i % 50}], "
        f"owns: 172.{16 + i % 10}.{i >> 8}.{i & 255}/32}}"
        for i in range(256, 256 + count)
    ]
    segments = ", ".join(f"s{i}: {{cidr: 10.{i}.0.0/16}}" for i in range(10))
    routers = f"core: {{segments: [{', '.join(f's{i}' for i in range(10))}]}}"
    machines = ", ".join(f"m{i}: {{}}" for i in range(100))
    head = f"apiVersion: nestnet/v1\nmachines: {{{machines}}}\nnetworks:\n  n:\n"
    return head + f"    segments: {{{segments}}}\n    routers: {{{routers}}}\n    ports:\n" + "\n".join(lines) + "\n"


def test_20000_ports_take_seconds() -> None:
    text = many_ports()
    began = time.perf_counter()
    document = load(text, "many.yaml", Known())
    taken = time.perf_counter() - began
    assert document.manifest is not None
    assert taken < 20, f"{taken:.1f} s"  # measured: 3 s; a quadratic rule takes minutes


def test_20000_mistakes_take_seconds() -> None:
    text = many_ports().replace("host: m", "hots: x").replace("segment: s", "segment: t")
    began = time.perf_counter()
    with pytest.raises(Unreadable) as raised:
        load(text, "many.yaml", Known())
    assert len(raised.value.problems) >= 40_000
    assert time.perf_counter() - began < 30


def test_reading_stops_at_the_first_thing_that_is_no_yaml() -> None:
    with pytest.raises(TextError) as raised:
        read(b"a: \xff")
    assert raised.value.found.position == (1, 4)


# What is published


def test_golden_schema_is_current() -> None:
    same(ROOT / "schema" / "nestnet.v1.json", json.dumps(json_schema(), indent=2) + "\n")


def test_golden_errors_page_is_current() -> None:
    rows = "".join(f"| `{code}` | {rule} |\n" for code, rule in CODES.items())
    page = ROOT / "docs" / "errors.md"
    same(page, _between(page.read_text(), "codes", "| code | the rule |\n|---|---|\n" + rows))


KINDS: list[tuple[str, type[Any]]] = [
    ("The file", m.Manifest),
    ("machines: NAME", m.MachineSpec),
    ("tenants: NAME", m.TenantSpec),
    ("tenants: NAME: quota", m.QuotaSpec),
    ("networks: NAME", m.NetworkSpec),
    ("networks: NAME: grants: NAME", m.GrantSpec),
    ("segments: NAME", m.SegmentSpec),
    ("routers: NAME", m.RouterSpec),
    ("links: NAME", m.LinkSpec),
    ("ports: NAME", m.PortSpec),
    ("ports: NAME: vlans: ID", m.VlanSpec),
    ("policies: an item", m.PolicySpec),
    ("checks: an item", m.Check),
]
LIMITS = [
    (limits.MAX_BYTES, "bytes of text"),
    (limits.MAX_NODES, "keys and values, with what aliases repeat"),
    (limits.MAX_ALIASED, "values that aliases repeat"),
    (64, "levels of networks in networks"),
    (m.POLICIES_PER_NETWORK, "policies in a network"),
    (m.SELECTORS_PER_SIDE, "items in a `from` or `to`"),
    (m.SERVICES_PER_POLICY, "items in an `allow` or `deny`"),
    (m.GROUPS_PER_PORT, "groups of a port"),
    (m.OWNS_PER_PORT, "owned prefixes of a port"),
    (m.ADDRESSES_PER_PORT, "addresses of a port"),
    (m.SEGMENTS_PER_ROUTER, "segments of a router"),
    (m.ROUTERS_PER_SEGMENT, "routers in a segment"),
    (m.ROUTERS_PER_NETWORK, "routers in a network"),
    (m.LINKS_PER_NETWORK, "links in a network"),
    (m.ROUTES_PER_NETWORK, "routes of all routers in a network"),
    (m.LABELS, "labels of an object"),
    (m.LABEL, "characters in the key of a label"),
    (m.LABEL_VALUE, "characters in its value"),
    (m.DESCRIPTION, "characters in a description"),
]


def test_golden_file_page_is_current() -> None:
    page = ROOT / "docs" / "file.md"
    tables = []
    for title, spec in KINDS:
        rows = ["| key | |", "|---|---|"]
        for name, field in spec.model_fields.items():
            assert field.description, f"{spec.__name__}.{name} says nothing"
            needed = " **Required.**" if field.is_required() else ""
            rows.append(f"| `{field.alias or name}` | {' '.join(field.description.split())}{needed} |")
        tables.append(f"### {title}\n\n{' '.join((spec.__doc__ or '').split())}\n\n" + "\n".join(rows) + "\n")
    text = _between(page.read_text(), "keys", "\n".join(tables))
    rows = ["| at most | |", "|---|---|", *(f"| {number:,} | {what} |" for number, what in LIMITS)]
    same(page, _between(text, "limits", "\n".join(rows) + "\n"))


def _between(page: str, mark: str, text: str) -> str:
    before, _, rest = page.partition(f"<!-- {mark} -->\n")
    return f"{before}<!-- {mark} -->\n{text}<!-- /{mark} -->\n" + rest.partition(f"<!-- /{mark} -->\n")[2]
