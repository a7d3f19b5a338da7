"""Rules between the parts of a manifest: by brute force where a rule is clever; and one mistake is one problem.

What each message says is in tests/golden/errors.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from ipaddress import IPv4Network
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_file import manifests

from nestnet.model.errors import Invalid, Problem
from nestnet.model.manifest import parse
from nestnet.model.paths import most_on_a_way
from nestnet.model.problems import in_order, join, split
from nestnet.model.selectors import Names, parse_selector, parse_service
from nestnet.model.validate import OFFLINE, Known, check, validate
from nestnet.model.values import Selector, Service


def problems(data: dict[str, Any], known: Known | None = None) -> list[Problem]:
    try:
        check({"apiVersion": "nestnet/v1", **data}, known or Known(machines=["m1", "m2"]))
    except Invalid as error:
        return list(error.problems)
    return []


def codes(data: dict[str, Any], known: Known | None = None) -> list[str]:
    return [problem.code for problem in problems(data, known)]


# Laws


class Broken(float):
    """A value that is right nowhere."""


@settings(max_examples=300)
@given(manifests(), st.data())
def test_one_mistake_is_one_problem(data: dict[str, Any], draw: st.DataObject) -> None:
    """Put something impossible anywhere into a right manifest: nothing else is complained about."""
    place: list[str] = []
    at: Any = data
    while True:
        key = draw.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        place.append(str(key))
        if not (isinstance(at[key], dict | list) and at[key] and draw.draw(st.integers(0, 4))):
            break
        at = at[key]
    if isinstance(at, dict) and draw.draw(st.booleans()):
        place[-1] = key = "unheard-of"
    at[key] = Broken(1.5)
    with pytest.raises(Invalid) as raised:
        check(data, Known())
    for problem in raised.value.problems:
        assert split(problem.pointer) == place[: len(split(problem.pointer))], problem


prefixes = st.builds(
    lambda low, length: str(IPv4Network((low << 16 | 10 << 24, length), strict=False)),
    st.integers(0, 15),
    st.integers(12, 18),
)


@given(
    st.lists(prefixes, min_size=1, max_size=6),
    st.lists(st.lists(st.integers(0, 5), max_size=6, unique=True), max_size=3),
    st.lists(st.tuples(st.integers(0, 5), prefixes), max_size=6),
)
def test_overlaps_are_those_that_brute_force_finds(
    cidrs: list[str], joins: list[list[int]], owns: list[tuple[int, str]]
) -> None:
    """There is a complaint exactly if two prefixes under one router overlap, or under an unrouted segment alone."""
    network = {
        "segments": {f"s{i}": {"cidr": cidr} for i, cidr in enumerate(cidrs)},
        "routers": {
            f"r{r}": {"segments": {f"s{i}": _address(cidrs[i], r + 1) for i in joined if i < len(cidrs)}}
            for r, joined in enumerate(joins)
        },
        "ports": {
            f"p{p}": {"segment": f"s{s % len(cidrs)}", "host": "m1", "owns": prefix}
            for p, (s, prefix) in enumerate(owns)
        },
    }
    scopes = [{i for i in joined if i < len(cidrs)} for joined in joins]
    routed = set().union(*scopes)
    scopes += [{i} for i in range(len(cidrs)) if i not in routed]
    expected = False
    for scope in scopes:
        ranges = [IPv4Network(cidrs[i]) for i in scope]
        ranges += [IPv4Network(prefix) for s, prefix in owns if s % len(cidrs) in scope]
        expected |= any(a.overlaps(b) for a, b in combinations(ranges, 2))
    found = {code for code in codes({"networks": {"n": network}}) if code.endswith("overlap")}
    assert bool(found) == expected


@given(
    st.lists(prefixes, min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), max_size=4),
)
def test_overlaps_under_linked_routers_are_those_that_brute_force_finds(
    cidrs: list[str], links: list[tuple[int, int, bool]]
) -> None:
    """A router for each segment: those that links connect, whatever their state, are as one router."""
    count = len(cidrs)
    ends = [(a, b, up) for a, b, up in links if a != b and a < count and b < count]
    network = {
        "segments": {f"s{i}": {"cidr": cidr} for i, cidr in enumerate(cidrs)},
        "routers": {f"r{i}": {"segments": [f"s{i}"]} for i in range(count)},
        "links": {f"l{i}": {"between": [f"r{a}", f"r{b}"], "up": up} for i, (a, b, up) in enumerate(ends)},
    }
    near = {(i, i) for i in range(count)} | {(x, y) for a, b, _ in ends for x, y in ((a, b), (b, a))}
    for k in range(count):
        near |= {(i, j) for i in range(count) for j in range(count) if (i, k) in near and (k, j) in near}
    expected = any(
        IPv4Network(cidrs[i]).overlaps(IPv4Network(cidrs[j]))
        for i, j in combinations(range(count), 2)
        if (i, j) in near
    )
    assert ("cidr_overlap" in codes({"networks": {"n": network}})) == expected


def test_a_network_has_so_many_links_and_no_more() -> None:
    links = {f"l{i}": {"between": ["a", "b"]} for i in range(4096)}
    network: dict[str, Any] = {"routers": {"a": {}, "b": {}}, "links": links}
    assert codes({"networks": {"n": network}}) == []
    links["one-more"] = {"between": ["a", "b"]}
    ((code, pointer, limit),) = [(p.code, p.pointer, p.limit) for p in problems({"networks": {"n": network}})]
    assert (code, pointer, limit) == ("limit_exceeded", "/networks/n/links", 4096)


def _address(cidr: str, number: int) -> str:
    return str(IPv4Network(cidr)[number])


@given(st.lists(st.integers(0, 20), unique=True, max_size=8), st.integers(0, 12), st.booleans(), st.integers(28, 30))
def test_a_segment_is_full_when_next_free_finds_none(chosen: list[int], count: int, routed: bool, length: int) -> None:
    cidr = IPv4Network(f"10.0.0.0/{length}")
    hosts = list(cidr.hosts())
    taken = {hosts[i] for i in chosen if i < len(hosts) and not (routed and i == 0)}
    ports = {f"c{i}": {"segment": "s", "host": "m1", "address": str(a)} for i, a in enumerate(sorted(taken))}
    ports |= {f"n{i}": {"segment": "s", "host": "m1"} for i in range(count)}
    network: dict[str, Any] = {"segments": {"s": {"cidr": str(cidr)}}, "ports": ports}
    if routed:
        network["routers"] = {"r": {"segments": ["s"]}}
    free = [host for host in hosts[1:] if host not in taken]
    assert codes({"networks": {"n": network}}) == (["segment_full"] if count > len(free) else [])


# What is not there


def test_absent_collections_are_not_judged() -> None:
    ports = {"p": {"segment": "s", "host": "m1", "groups": ["g"]}}
    policies = [{"from": "web", "to": "port:p", "allow": "any"}]
    assert codes({"networks": {"n": {"ports": ports}}}) == []
    assert codes({"networks": {"n": {"ports": ports, "segments": {}}}}) == ["missing_segment"]
    assert codes({"networks": {"n": {"policies": policies}}}) == []
    assert codes({"networks": {"n": {"ports": ports, "policies": policies}}}) == []
    assert codes({"networks": {"n": {"ports": {}, "segments": {}, "policies": policies}}}) == ["unknown_name"] * 2
    links = {"l": {"between": ["a", "b"]}}
    assert codes({"networks": {"n": {"links": links}}}) == []
    assert codes({"networks": {"n": {"links": links, "routers": {}}}}) == ["missing_router"] * 2
    inner = {"a": {"ports": {"x": {"segment": "s", "host": "nobody"}}}}
    assert codes({"networks": {"n": {"networks": inner}}}) == []
    assert codes({"networks": {"n": {"ports": {}, "networks": inner}}}) == ["missing_host"]


def test_what_is_known_outside() -> None:
    data = {
        "tenants": {"child": {"parent": "old"}},
        "networks": {"n": {"segments": {"s": {}}, "ports": {"p": {"segment": "s", "host": "m9"}}}},
        "checks": [{"from": "n/p", "to": "other/p", "send": "icmp", "expect": "deny"}],
    }
    assert codes(data, Known()) == ["missing_tenant", "missing_machine", "missing_port"]
    assert codes(data, Known(machines=["m9"], tenants={"old": None}, networks=["other"])) == []
    assert codes(data, OFFLINE) == []
    assert codes(data, Known(machines=["m9"], tenants={"old": "child"}, networks=["other"])) == ["tenant_cycle"]


def test_mtu_of_the_machines() -> None:
    network = {"n": {"mtu": 1450, "segments": {"s": {"cidr": "fd00::/64"}}}}
    assert codes({"machines": {"m": {"mtu": 1500}}, "networks": network}) == []
    assert codes({"machines": {"m": {"mtu": 1400}}, "networks": network}) == ["mtu_too_large"]
    assert codes({"machines": {"m": {"mtu": 1499}, "n": {"mtu": 9000}}, "networks": network}) == ["mtu_too_large"]
    del network["n"]["mtu"]
    assert codes({"machines": {"m": {"mtu": 1329}}, "networks": network}) == ["mtu_too_small"]
    assert codes({"machines": {"m": {"mtu": 1330}}, "networks": network}) == []


def test_machines_have_addresses_of_one_family() -> None:
    four, six = {"address": "192.0.2.1"}, {"address": "2001:db8::1"}
    assert codes({"machines": {"a": four, "b": six, "c": {}}}) == ["mixed_families"]
    assert codes({"machines": {"a": six, "b": {"address": "2001:db8::1"}}}) == ["duplicate_address"]
    assert codes({"machines": {"a": {**six, "mtu": 1279}}}) == ["mtu_too_small"]
    # A network on the wire is carried in the machines' family, so it need not say which; and costs 20 bytes more.
    for underlay, wrong in ((None, []), (6, []), (4, ["host_family"])):
        network = {} if underlay is None else {"underlay": underlay}
        assert codes({"machines": {"a": six}, "networks": {"n": network}}) == wrong
    assert codes({"networks": {"n": {"underlay": 6}, "o": {"underlay": 4}}}) == ["host_family"]
    for mtu, wrong in ((1430, []), (1431, ["mtu_too_large"])):
        assert (
            codes({"machines": {"a": six}, "networks": {"n": {"mtu": mtu, "networks": {"o": {"mtu": mtu}}}}})
            == wrong * 2
        )


@pytest.mark.parametrize(
    ("nic", "wrong"),
    [
        ("eth0", []),
        (["eth0", "enp3s0.100"], []),
        ("x" * 15, []),
        ("x" * 16, ["bad_name"]),
        ("", ["bad_name"]),
        ("..", ["bad_name"]),
        ("a/b", ["bad_name"]),
        ("eth 0", ["bad_name"]),
        ("lo", ["bad_name"]),
        ("p17", ["bad_name"]),
        ("p4p1", []),
        ([], ["bad_value"]),
        (["eth0", "eth0"], ["duplicate_item"]),
        ([f"eth{n}" for n in range(9)], ["limit_exceeded"]),
        (7, ["wrong_type"]),
    ],
)
def test_names_of_nics(nic: object, wrong: list[str]) -> None:
    assert codes({"machines": {"a": {"nic": nic}}}) == wrong


def test_a_tenant_that_only_a_network_names_is_a_parent() -> None:
    assert codes({"tenants": {"b": {"parent": "a"}}, "networks": {"n": {"tenant": "a"}}}) == []


def test_validate_judges_what_the_store_filled_in() -> None:
    manifest = parse({"apiVersion": "nestnet/v1", "networks": {"n": {"ports": {"p": {"segment": "s", "host": "m1"}}}}})
    network = (manifest.networks or {})["n"]
    assert validate(manifest, Known(machines=["m1"])) == []
    filled = manifest.model_copy(update={"networks": {"n": network.model_copy(update={"segments": {}})}})
    found = validate(filled, Known(machines=["m1"]))
    assert [(problem.code, problem.pointer) for problem in found] == [
        ("missing_segment", "/networks/n/ports/p/segment")
    ]


# Policies


NAMES = Names(groups={"web": 1, "db": 2}, segments={"web": 3, "lan": 4}, ports={"web1": 5})


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("any", Selector("any")),
        ("inside", Selector("inside")),
        ("hosts", Selector("hosts")),
        ("db", Selector("group", 2)),
        ("lan", Selector("segment", 4)),
        ("web1", Selector("port", 5)),
        ("group:web", Selector("group", 1)),
        ("segment:web", Selector("segment", 3)),
        ("port:web1", Selector("port", 5)),
        ("0.0.0.0/0", Selector("cidr", cidr=IPv4Network("0.0.0.0/0"))),
        ("10.0.0.9/32", Selector("cidr", cidr=IPv4Network("10.0.0.9/32"))),
    ],
)
def test_selectors(text: str, selector: Selector) -> None:
    assert parse_selector(text, NAMES) == selector


@pytest.mark.parametrize(
    ("text", "service"),
    [
        ("any", Service(-1, 0, 65535)),
        ("tcp", Service(6, 0, 65535)),
        ("tcp/80", Service(6, 80, 80)),
        ("tcp/80-90", Service(6, 80, 90)),
        ("udp/53", Service(17, 53, 53)),
        ("udp/1-65535", Service(17, 1, 65535)),
        ("icmp", Service(1, 0, 65535)),
        ("icmpv6", Service(58, 0, 65535)),
        ("carriage", Service(17, 4789, 4789)),
    ],
)
def test_services(text: str, service: Service) -> None:
    assert parse_service(text) == service


def test_an_ambiguous_name_lists_the_candidates() -> None:
    with pytest.raises(Invalid, match="group:web or segment:web"):
        parse_selector("web", NAMES)


@given(st.text(max_size=20) | st.from_regex(r"(tcp|udp|icmp|any)(/[0-9]{0,6}(-[0-9]{0,6})?)?", fullmatch=True))
def test_any_selector_and_service(text: str) -> None:
    for read in (lambda: parse_selector(text, NAMES), lambda: parse_service(text)):
        try:
            read()
        except Invalid as error:
            problem = error.problems[0]
        else:
            continue
        assert problem.pointer == ""
        assert problem.message.isprintable()


# Pointers


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_pointers_split_as_they_were_joined(steps: list[str]) -> None:
    assert split(join(*steps)) == steps


def test_problems_are_in_the_order_of_the_data() -> None:
    data = {"z": [0, {"y": 1, "x": 2}], "a": 3}
    pointers = ["/z", "/z/1/y", "/z/1/x", "/z/2", "/a", "/missing"]
    shuffled = [Problem("bad_value", pointer, "") for pointer in reversed(pointers)]
    assert [problem.pointer for problem in in_order(shuffled * 2, data)] == pointers
    assert json.dumps(pointers)


# Rates


def chain(links: int, **more: Any) -> dict[str, Any]:
    """Routers in a row, a segment at either end, a rate on every link."""
    names = [f"r{n}" for n in range(links + 1)]
    routers: dict[str, Any] = {name: {} for name in names}
    routers[names[0]], routers[names[-1]] = {"segments": ["a"]}, {"segments": ["z"]}
    return {
        "segments": {"a": {"cidr": "10.0.0.0/24"}, "z": {"cidr": "10.0.1.0/24"}},
        "routers": routers,
        "links": {f"l{n}": {"between": [f"r{n}", f"r{n + 1}"], "rate": "1mbit"} for n in range(links)},
        **more,
    }


def test_eight_rates_on_a_way_are_not_too_many() -> None:
    hosts = {name: {"segment": segment, "host": "m1", "hosts": True} for name, segment in (("p", "a"), ("q", "z"))}
    limited = {name: {**port, "rate": "1mbit"} for name, port in hosts.items()}
    inside = {"segments": {"s": {"cidr": "10.0.0.0/24"}}, "ports": {"x": {"segment": "s", "host": "p"}}}
    rated = {"segments": inside["segments"], "ports": {"x": {"segment": "s", "host": "p", "rate": "1mbit"}}}
    for network, too_many in [
        (chain(8), False),
        (chain(9), True),
        (chain(6, ports=limited), False),
        (chain(7, ports=limited), True),
        (chain(6, ports=limited, networks={"n": inside}), False),
        (chain(5, ports=limited, networks={"n": rated}), True),
        (chain(6, ports=hosts, networks={"n": rated}), False),
        (chain(4, ports=limited, networks={"n": rated}), False),
    ]:
        assert codes({"networks": {"n": network}}) == ["cannot_flatten"] * too_many
    down = chain(9)
    down["links"]["l4"]["up"] = False
    assert "cannot_flatten" not in codes({"networks": {"n": down}})


@given(st.data())
def test_the_longest_way_is_what_brute_force_finds(data: st.DataObject) -> None:
    routers = "abcdef"
    pair = st.lists(st.sampled_from(routers), min_size=2, max_size=2, unique=True)
    links = data.draw(st.lists(st.tuples(pair, st.integers(1, 3)), max_size=9))
    edges = [(a, b, cost) for (a, b), cost in links]
    counted = data.draw(st.sets(st.sampled_from(range(len(edges))))) if edges else set()
    joins = st.lists(st.sampled_from(routers), max_size=3, unique=True)
    segments = data.draw(st.dictionaries(st.sampled_from("xyz"), joins, max_size=3))

    def ways(router: str, passed: tuple[int, ...], to: Collection[str]) -> Iterator[tuple[int, int]]:
        """Cost and counted links of every way that passes no router twice."""
        been = {router} | {end for place in passed for end in edges[place][:2]}
        if router in to:
            yield sum(edges[place][2] for place in passed), sum(place in counted for place in passed)
        for place, (a, b, _) in enumerate(edges):
            if router in (a, b) and (other := b if router == a else a) not in been:
                yield from ways(other, (*passed, place), to)

    most = 0
    for joined in segments.values():
        for router in {router for each in segments.values() for router in each}:
            found = list(ways(router, (), joined))
            least = min((cost for cost, _ in found), default=0)
            most = max([most, *(count for cost, count in found if cost == least)])
    assert most_on_a_way(segments, edges, counted) == most
