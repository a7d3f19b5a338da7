"""Every rule that a manifest, a network file or a request can break: its code, and what the rule is.

Codes are API: programs branch on them, so one is never renamed or given another meaning.
docs/errors.md lists them, and tests/golden/errors has at least one example of each with the exact text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from .errors import Problem

CODES: dict[str, str] = {
    # the text
    "yaml_syntax": "the file is YAML 1.2 in UTF-8",
    "yaml_feature": "the file uses no tags, merge keys, directives or second document, and keys are plain text",
    "duplicate_key": "a key is given once in a mapping",
    "alias_limit": "aliases stay small: what they repeat is bounded, and none contains itself",
    "too_deep": "networks nest at most 64 levels, and the text no deeper than that needs",
    "control_character": "text has no control characters",
    "limit_exceeded": "nothing is longer, and no list has more items, than a published limit",
    # its shape
    "unknown_key": "every key is one that nestnet knows",
    "not_supported": "a key or value is one that this version can realise",
    "missing_key": "a required key is there",
    "wrong_type": "a value is of the type that its key wants: text, number, true or false, list, mapping",
    "bad_value": "a value that is one of a few is one of those",
    "out_of_range": "a number is within its range",
    "bad_rate": "a rate is a number of bit/s, or has bit, kbit, mbit or gbit behind the number",
    "bad_name": "a name is a DNS label (RFC 1123), in lower case",
    "reserved_name": "no object is called any, inside or hosts: policies use these words",
    "bad_label": "the key of a label is letters, digits, '-', '_', '.' and '/'",
    "duplicate_item": "a list does not name the same thing twice",
    "allow_and_deny": "a policy either allows or denies",
    # addresses
    "bad_address": "an address is an IPv4 or IPv6 address, without prefix length or zone",
    "bad_cidr": "a CIDR is an address, '/', and a prefix length",
    "host_bits": "a CIDR has zeros after its prefix length",
    "reserved_address": "an address is one that a unicast packet can bear (RFC 6890)",
    "cidr_size": "a segment's CIDR is /8 to /30 (IPv4) or /16 to /126 (IPv6)",
    "two_cidrs": "a segment has at most one CIDR of each family",
    "cidr_overlap": "segments under one router, or under linked ones, do not overlap",
    "owns_overlap": "what a port owns overlaps no segment, and nothing another owns, under one router or linked ones",
    "address_outside": "an address is inside a CIDR of its segment",
    "address_unusable": "an address is not the network's own (all zeros) or its broadcast address (all ones, IPv4)",
    "address_is_gateway": "a port does not have a gateway's address",
    "duplicate_address": "an address is given once in a segment, and to one machine",
    "mixed_families": "the addresses of all machines are of one family",
    "segment_full": "a segment has an address for each of its ports",
    "no_cidr": "a router joins segments that have a CIDR",
    "bad_mac": "a MAC is six pairs of hexadecimal digits, as 02:00:00:00:00:01",
    "mac_unusable": "a port's MAC is unicast, not zero, and not from 06:..., which is the routers'",
    "duplicate_mac": "a MAC is given once in a segment",
    "mtu_too_small": "a network's MTU is at least 576, and 1280 where it has IPv6 or is an IPv6 underlay",
    "mtu_too_large": "a network's MTU leaves room for VXLAN on the machines that carry it",
    # what refers to what
    "missing_machine": "the host of a port in a network that the wire carries is a machine",
    "missing_host": "the host of a port in a carried network is a port of its carrier",
    "not_a_host": "a port that others live on has `hosts: true`",
    "host_family": "a host, machine or port, has an address of the family that its network is carried in",
    "missing_segment": "a segment that a port or router names exists in its network",
    "missing_router": "a router that a link names exists in its network",
    "bad_link": "a link is between two different routers",
    "bad_vlan": "a VLAN id is a number from 1 to 4094",
    "bad_trunk": "a port has a segment, or, as a trunk, a native one and vlans",
    "vlan_overlap": "a trunk has a segment once, without a tag or behind one",
    "transparent": "no port of a transparent segment is a host, or hangs on a trunk",
    "missing_physical": "the physical network that a segment rides on is one to which a machine has a trunk",
    "missing_trunk": "a machine with ports of a segment on a VLAN has a trunk to its physical network",
    "on_vlan": "a segment on a VLAN is of a network on the wire, is not transparent, and one router joins it at most",
    "duplicate_vlan": "an id of a physical network is that of one segment",
    "duplicate_nic": "an interface leads to the underlay or to a physical network",
    "bad_attach": "a port hangs on one thing: a network namespace or a tap",
    "duplicate_attach": "a network namespace or tap of a machine is given to one port",
    "missing_tenant": "a tenant's parent exists",
    "tenant_cycle": "no tenant is its own ancestor",
    "unknown_name": "a group, segment or port that a policy names exists in its network",
    "ambiguous_name": "a bare name in a policy fits one kind of thing",
    "bad_selector": "from and to name `any`, `inside`, `hosts`, a CIDR, group, segment or port",
    "bad_service": "allow and deny name `any`, `tcp`, `udp/53`, `tcp/80-90`, `icmp`, `icmpv6` or `carriage`",
    "port_range": "a range of TCP or UDP ports is 1 to 65535 and does not run backwards",
    "no_ports": "only tcp and udp have ports",
    "too_many_rules": "the policies of a network become at most 65536 rules",
    "too_many_routes": "the routers of a network have at most 65536 routes, each one to each prefix that it reaches",
    "cannot_flatten": "the way of a packet has at most 8 rates, those of all carriers below too, and crosses no VLAN",
    "missing_port": "a check names ports by their path, and they exist",
    "bad_check": "a check sends icmp, tcp/PORT or udp/PORT from one port to another",
}

# Looking for the nearest name costs time: for a file with 20,000 typing mistakes it stops being worth it.
COMPARISONS = 200_000
SHOWN = 80  # Characters of a stranger's text that a message repeats.


def quote(text: object) -> str:
    """`text` between quotes, shortened, with nothing in it that could move a terminal's cursor."""
    shown = str(text)
    if len(shown) > SHOWN:
        shown = shown[:SHOWN] + "..."
    return "'" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + "'"


class Nearest:
    """Finds the name that somebody meant; gives up quietly when it has compared COMPARISONS names."""

    def __init__(self) -> None:
        self._left = COMPARISONS

    def __call__(self, wrong: str, names: Iterable[str]) -> str | None:
        if self._left <= 0 or len(wrong) > SHOWN:
            return None
        candidates = list(names)
        self._left -= len(candidates)
        return next(iter(get_close_matches(wrong, candidates, 1)), None)


def meant(nearest: str | None) -> str:
    """The end of a message that has a better idea."""
    return f"; did you mean {nearest}?" if nearest else ""


def join(*steps: object) -> str:
    """The RFC 6901 pointer of these keys and indexes."""
    return "".join("/" + _escape(str(step)) for step in steps)


def split(pointer: str) -> list[str]:
    """The keys and indexes of an RFC 6901 pointer."""
    return [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]


def _escape(step: str) -> str:
    step = step.replace("~", "~0").replace("/", "~1")
    # A lone surrogate, legal in JSON's \u escapes, cannot be sent back as UTF-8.
    return step.encode("utf-8", "replace").decode()


def in_order(problems: Iterable[Problem], data: object) -> list[Problem]:
    """`problems` without repetitions, in the order in which `data` has the places they point to."""
    indexes: dict[int, dict[str, int]] = {}

    def place(problem: Problem) -> tuple[int, ...]:
        at: Any = data
        path: list[int] = []
        for step in split(problem.pointer):
            if isinstance(at, Mapping):
                index = indexes.get(id(at))
                if index is None:
                    index = indexes[id(at)] = {_escape(str(key)): i for i, key in enumerate(at)}
                path.append(index.get(_escape(step), len(index)))
                at = at.get(step)
            elif isinstance(at, Sequence) and not isinstance(at, str) and step.isdecimal():
                path.append(int(step))
                at = at[int(step)] if int(step) < len(at) else None
            else:
                break
        return tuple(path)

    unique = dict.fromkeys(problems)
    return sorted(unique, key=place)


def moved(problem: Problem, pointer: str) -> Problem:
    """The same problem at another place."""
    return replace(problem, pointer=pointer)
