"""Objects that look legal and are not, or are and look otherwise: manifests with poison in them, and requests.

    manifests()     one of a tenant, right but for a few places that hold what nobody expects there,
    or what somebody does
    requests()      of every route of the OpenAPI document, with parameters and bodies of the same kind

What a place may hold is looked up by its name, so that about one in three is accepted: an object that every rule of the
file refuses bothers no agent.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

POISON: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**31 - 1, 2**32, 2**63, 2**64, 10**400, 65535, 65536, 1.5, 1e308, -0.0, "",
    " ", "0", "-1",
    "a\nb", "a\0b", "\r", "\x1b[2J", "\u202eevil", "\ud800", "é", "１", "$(reboot)", "`reboot`", ";reboot", "| reboot",
    "-rf", "--help",
    "-o", "../../etc", "/", "..", ".", "%00", "%s%n", "{0}", "{{7*7}}", "' OR 1=1 --", "any", "inside", "hosts",
    "null", "true", "a" * 63,
    "a" * 64, "a" * 10_000, "A", "a-", "xn--a", [], {}, [[]], [None], [{}], {"": ""}, {"a": None}, ["a"] * 1000,
    [0] * 70, {"x": {"x": {"x": {}}}},
]  # fmt: skip

WORDS: dict[str, list[Any]] = {
    "cidr": [
        "10.0.0.0/24", "10.0.0.0/8", "10.0.0.5/24", "0.0.0.0/0", "::/0", "127.0.0.0/8", "169.254.0.0/16",
        "224.0.0.0/4", "240.0.0.0/4",
        "::ffff:0:0/96", "::ffff:10.0.0.0/120", "fe80::/10", "ff00::/8", "10.0.0.0/30", "10.0.0.0/31", "10.0.0.0/32",
        "10.0.0.0/33",
        "10.0.0.0/-1", "10.0.0.0/255.255.255.0", "10.0.0.0/024", "010.0.0.0/24", "fd00::/64", "fd00::/126",
        "fd00::/127", "2000::/3",
        ["10.0.0.0/24", "fd00::/64"], ["fd00::/48", "172.16.0.0/12"], ["10.0.0.0/24", "10.1.0.0/24"],
        "255.255.255.0/24", "100.64.0.0/10",
        "192.0.2.0/24", "0.0.0.0/8", "::/96", "2002::/16", "64:ff9b::/96", "10.0.0.0/24 ", "10.0.0.0/２４", "1.0.0.0/8",
        "fc00::/16",
    ],
    "address": [
        "10.0.0.9", "10.0.0.1", "10.0.0.0", "10.0.0.255", "10.0.0.256", "10.0.0.10/24", "fd00::9", "fd00::", "fd00::1",
        "::1", "::", "0.0.0.0",
        "127.0.0.1", "255.255.255.255", "224.0.0.1", "::ffff:10.0.0.9", "fe80::1%eth0", "10.9", "0x0a000009",
        "10.0.0.09", "192.0.2.1",
        ["10.0.0.20", "10.0.0.21", "fd00::20"], [f"10.0.0.{n}" for n in range(30, 46)],
        [f"10.0.0.{n}" for n in range(30, 60)],
        ["10.0.0.9", "10.0.0.9"], "fd00:0:0:0:0:0:0:9", "169.254.169.254",
    ],
    "mac": [
        "02:00:00:00:00:99", "02-00-00-00-00-98", "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01",
        "06:00:00:00:00:01",
        "02:00:00:00:00", "020000000099", "02:00:00:00:00:9g", "33:33:00:00:00:01", "fe:ff:ff:ff:ff:ff",
        "00:00:00:00:00:01",
    ],
    "owns": [
        "0.0.0.0/0", "::/0", "10.9.0.0/16", ["10.9.0.0/16", "fd09::/32"], "10.0.0.0/24", "10.0.0.77/32",
        "::ffff:0:0/96", "192.0.2.0/24",
        [f"10.{n}.0.0/16" for n in range(20, 83)], [f"10.{n}.0.0/16" for n in range(20, 90)], "1.0.0.0/8",
        "128.0.0.0/2", "10.9.0.1/16",
    ],
    "mtu": [576, 1280, 1450, 1451, 575, 1279, 9000, 65535, 68, 0, "1400", 1400.0, 1400],
    "underlay": [4, 6, 5, "4"],
    "carriage": ["flat", "encapsulated", "FLAT"],
    "segment": ["lan", "far", "nowhere", "LAN", "lan "],
    "host": ["m1", "a", "m9", "b", "canary"],
    "groups": ["web", ["web", "db"], [f"g{n}" for n in range(64)], [f"g{n}" for n in range(65)], "any", ["web", "web"]],
    "hosts": [True, False, "yes", 1],
    "segments": [["lan"], ["far"], ["lan", "far"], {"lan": "10.0.0.254"}, {"lan": ["10.0.0.254", "fd00::fe"]},
        {"lan": "10.0.1.1"}, []],
    "between": [["core", "edge"], ["edge", "core"], ["core", "core"], ["core"], ["core", "nobody"]],
    "cost": [1, 65535, 0, 65536, -1, 1.0, "1"],
    "up": [True, False, "down", 0],
    "from": ["any", "inside", "hosts", "web", "lan", "a", "group:web", "10.0.0.0/8", "0.0.0.0/0", "::/0",
        "::ffff:0:0/96", ["a", "b"], "not a",
             ["any"] * 64, [f"10.{n}.0.0/16" for n in range(64)], [f"10.{n}.0.0/16" for n in range(65)], "port:a",
             "segment:lan", "10.0.0.5/8"],
    "allow": ["any", "tcp", "tcp/80", "tcp/80-90", "udp/53", "icmp", "icmpv6", "carriage", "icmp/8", "icmp/1-65535",
        "any/80", "tcp/0", "tcp/65536",
              "tcp/90-80", "tcp/1-65535", "sctp", "gre/1", "tcp/-1", "tcp/80-", "tcp/0x50", "tcp/８０", ["tcp/1-65535",
              "udp"],
              [f"tcp/{n}" for n in range(1, 65)], [f"udp/{n}-{n + 7}" for n in range(1, 640, 10)],
              [f"tcp/{n}" for n in range(1, 66)]],
    "priority": [0, 1, 100, 65535, 65536, -1, 2**31, 2**31 - 1, 1e3, "100", True],
    "labels": [{"a": "b"}, {"a" * 63: "b" * 256}, {"a" * 64: "b"}, {"a": "b" * 257}, {"a": "x" * 10_000},
        {f"k{n}": "v" for n in range(64)},
               {f"k{n}": "v" for n in range(65)}, {f"k{n}": "v" for n in range(10_000)}, {"a/b.c_d-e": ""},
               {"-a": "b"}, {"a": "$(reboot)"}],
    "description": ["words", "two\nlines", "a" * 1000, "a" * 1001, "\x00", "\u202e", "$(reboot)", "<script>"],
    "tenant": ["mallory", "victim", "nobody", "a" * 63],
    "name": ["x", "x-1", "0", "a" * 63, "a" * 64, "-opt", "a.b", "A", "any", "m1", "a/b", "a\n", "$(x)", "", "lan"],
}  # fmt: skip
SAME = {"to": "from", "deny": "allow", "ports": "name", "networks": "name", "routers": "name", "links": "name"}


def whole() -> dict[str, Any]:
    """A network that has one of everything, and is in order."""
    return {
        "tenant": "mallory",
        "segments": {"lan": {"cidr": ["10.0.0.0/24", "fd00::/64"]}, "far": {"cidr": "10.0.1.0/24"}},
        "routers": {"core": {"segments": ["lan"]}, "edge": {"segments": ["far"]}},
        "links": {"ce": {"between": ["core", "edge"], "cost": 5}},
        "ports": {
            "a": {"segment": "lan", "host": "m1", "hosts": True, "groups": ["web"], "mac": "02:00:00:00:00:0a"},
            "b": {"segment": "far", "host": "m1", "owns": ["10.9.0.0/16"]},
        },
        "policies": [
            {"from": "inside", "to": "web", "allow": ["tcp/80-90", "icmp"], "priority": 200},
            {"from": "hosts", "to": "hosts", "allow": "carriage"},
        ],
        "networks": {
            "deep": {
                "segments": {"lan": {"cidr": "10.0.0.0/24"}},
                "ports": {"a": {"segment": "lan", "host": "a", "address": "10.0.0.10"}},
            }
        },
    }


KEYS = [
    "tenant", "carriage", "underlay", "mtu", "segments", "routers", "links", "ports", "policies", "networks", "labels",
    "description", "cidr",
    "segment", "host", "address", "mac", "owns", "groups", "hosts", "between", "cost", "up", "from", "to", "allow",
    "deny", "priority",
    "rate", "vlan", "trunk", "enabled", "dhcp", "attach", "vni", "grants", "nobody", "__class__", "id", "revision",
]  # fmt: skip


@st.composite
def values(draw: st.DrawFn, key: str) -> Any:
    """What may stand behind a key: what somebody might mean, or what nobody does."""
    words = WORDS.get(SAME.get(key, key), [])
    if words and draw(st.integers(0, 3)):
        return draw(st.sampled_from(words))
    return draw(
        st.sampled_from(POISON)
        | st.text(max_size=20)
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.sampled_from([word for some in WORDS.values() for word in some])
    )


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a tree but itself."""
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in below:
        found += [(*path, key), *places(value, (*path, key))]
    return found


@st.composite
def networks(draw: st.DrawFn) -> dict[str, Any]:
    """`whole`, with one to three places changed: replaced, renamed, added, taken away, or many times there."""
    tree = whole()
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path = draw(st.sampled_from(places(tree)))
        *above, last = path
        at: Any = tree
        for step in above:
            at = at[step]
        key = next((step for step in reversed(path) if isinstance(step, str)), "name")
        what = draw(st.sampled_from(["replace"] * 5 + ["add"] * 3 + ["rename", "remove", "again", "many"]))
        here = at[last]
        if what == "replace":
            at[last] = copy.deepcopy(draw(values(key)))
        elif what == "add" and isinstance(here, dict):
            name = draw(st.sampled_from(KEYS))
            here[name] = copy.deepcopy(draw(values(name)))
        elif what == "rename" and isinstance(at, dict):
            name = draw(values("name"))
            at[name if isinstance(name, str) else json.dumps(name)] = at.pop(last)
        elif what == "remove":
            del at[last]
        elif what == "again" and isinstance(at, list):
            at.append(copy.deepcopy(here))
        elif what == "many" and isinstance(at, dict) and isinstance(here, dict):
            at.update({f"{last}{n}": copy.deepcopy(here) for n in range(draw(st.sampled_from([2, 8])))})
        if not places(tree):
            break
    return tree


TEXTS = [
    '{"apiVersion": "nestnet/v1", "apiVersion": "nestnet/v1"}', '{"apiVersion": NaN}', '{"networks": 1e400}',
    "[" * 10_000, '{"a":' * 10_000,
    '"\\ud800"', "{}", "null", "[]", '""', "1", "{", "\xff", "9" * 10_000,
    '{"apiVersion": "nestnet/v1", "networks": {"p": {}, "p": {}}}',
    '{"apiVersion": "nestnet/v2"}', '{"apiVersion": "nestnet/v1", "networks": -Infinity}',
    '{"apiVersion": "nestnet/v1", "networks": {"\\u0000": {}}}',
]  # fmt: skip


@st.composite
def manifests(draw: st.DrawFn) -> str:
    """The text of what is behind "manifest" in the body of an apply."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.sampled_from(TEXTS))
    manifest: dict[str, Any] = {"apiVersion": "nestnet/v1", "networks": {"poison": draw(networks())}}
    if draw(st.integers(0, 9)) == 0:
        key = draw(st.sampled_from(["tenants", "checks", "networks", "apiVersion", "remotes"]))
        manifest[key] = copy.deepcopy(draw(values(key)))
    return json.dumps(manifest)
