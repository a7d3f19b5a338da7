"""The lines of a batch, each a new network, as columns: many at once, for the store to make rows of.

Most of what is made in bulk is the same few things: segments, and ports and policies in them, on hosts that are there.
A line that says nothing but that is *plain*. All that it means by itself is found out here; what needs ids, carriers
and hosts is left to the store.

Nothing is refused here. Whatever is not plain, or is wrong in any way, is None, and goes by a plan, which has words for
everything. So one rule binds this file: what it takes means what the network file would mean (held by
tests/test_plain.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from ipaddress import ip_address
from socket import AF_INET, inet_ntop, inet_pton
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType
from pydantic_core import PydanticCustomError

from . import canonical
from . import manifest as rules
from .breadth import RULES_PER_NETWORK
from .canonical import About, Side
from .errors import Invalid
from .selectors import WORDS, Names, parse_selector, parse_service
from .validate import SMALLEST_MTU
from .values import RIDING_BYTES, Selector

KNOWN = 1 << 14  # Texts whose meaning is remembered, of each kind.

Texts = str | list[str]


class _Part(Struct, forbid_unknown_fields=True):
    description: str | UnsetType = UNSET
    labels: dict[str, str] | UnsetType = UNSET


class _Segment(_Part):
    cidr: Texts | UnsetType = UNSET
    dns: Texts | UnsetType = UNSET
    transparent: bool | UnsetType = UNSET


class _Port(_Part, kw_only=True):
    segment: str
    host: str
    address: Texts | UnsetType = UNSET
    groups: Texts | UnsetType = UNSET
    hosts: bool | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class _Policy(Struct, forbid_unknown_fields=True, rename={"source": "from", "target": "to"}):
    source: Texts
    target: Texts
    allow: Texts | UnsetType = UNSET
    deny: Texts | UnsetType = UNSET
    priority: int | UnsetType = UNSET


class _Line(_Part, kw_only=True):
    """A network as a file has it, with its name and what carries it (a path; absent: the wire, or what was granted)."""

    name: str
    carrier: str | UnsetType = UNSET
    tenant: str | UnsetType = UNSET
    segments: dict[str, _Segment] | UnsetType = UNSET
    ports: dict[str, _Port] | UnsetType = UNSET
    policies: list[_Policy] | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


_read = msgspec.json.Decoder(_Line).decode
_write = msgspec.json.Encoder().encode


class Goal(Struct, array_like=True):
    """Where networks of a part go: all of one carrier (a path; None: the wire, or what was granted) and one tenant
    (None: nobody says), with what there is of them in all."""

    carrier: str | None
    tenant: str | None
    names: list[str]
    hosts: dict[str, list[int]]  # how many networks live on each, and how many ports
    segments: int
    ports: int
    mtu: int  # the least that their segments can do with


Named = tuple[Side, Side, About, bool, int]
"""What a policy means that names something of its network: instead of ids it has places."""


class Lines(Struct, array_like=True):
    """What plain lines mean. A goal, network, segment, group or port is known by its place in its list; labels and
    addresses of DNS servers are canonical JSON."""

    goals: list[Goal]
    networks: list[tuple[int, str, bool, str, str]]  # goal, name, enabled, labels, description
    segments: list[tuple[int, str, str, bool, str, str]]  # network, name, DNS, transparent, labels, description
    cidrs: list[tuple[int, int, str]]  # segment, family, CIDR
    groups: list[tuple[int, str]]  # network, name
    ports: list[tuple[int, int, str, str, bool, bool, str, str]]
    """Network, segment, name, host, hosts, enabled, labels, description."""
    addresses: list[tuple[int, str, int, int]]  # segment, address, port, how many the port has before
    members: list[tuple[int, int]]  # port, group
    policies: list[tuple[int, str, str | Named]]  # network, as people wrote it, what it means
    uses: list[tuple[int, str, int]]  # network, host, how many of its ports live there


def read(lines: Iterable[bytes]) -> Lines | None:
    """What lines mean, if all of them are plain."""
    found, goals = Lines([], [], [], [], [], [], [], [], [], []), dict[tuple[Any, Any], int]()
    for line in lines:
        if b"\\u0022" in line:
            return None  # a quote that is not to be counted
        try:
            said = _read(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        # Of a key that is there twice, one is lost; then it has more quotes than what was read.
        if _write(said).count(b'"') != line.count(b'"') or not _network(found, goals, said):
            return None
    return found


def _network(found: Lines, goals: dict[tuple[Any, Any], int], said: _Line) -> bool:
    words = _words(said)
    if _name(said.name) is None or words is None or "" in (said.carrier, said.tenant):
        return False
    key = (said.carrier or None, said.tenant or None)
    if (place := goals.get(key)) is None:
        place = goals[key] = len(goals)
        found.goals.append(Goal(*key, [], {}, 0, 0, 0))
    goal, network = found.goals[place], len(found.networks)
    goal.names.append(said.name)
    found.networks.append((place, said.name, said.enabled is not False, *words))
    inside, groups = dict[str, _Inside](), dict[str, int]()
    return (
        _segments(found, goal, network, said.segments or {}, inside)
        and _ports(found, goal, network, said.ports or {}, inside, groups)
        and _policies(found, network, said, inside, groups)
    )


def _segments(
    found: Lines, goal: Goal, network: int, given: Mapping[str, _Segment], inside: dict[str, _Inside]
) -> bool:
    """`inside` is told of each."""
    for name, one in given.items():
        words, cidrs = _words(one), [*map(_cidr, _listed(one.cidr))]
        dns = [*map(_address, _listed(one.dns))]
        if _name(name) is None or words is None or None in cidrs or None in dns or len(cidrs) > 2:
            return False
        if len(cidrs) == 2:
            if cidrs[0].version == cidrs[1].version:
                return False
            cidrs.sort(key=_version)
        texts = [each.text for each in dns]
        if len(texts) > rules.DNS_PER_SEGMENT or len(set(texts)) < len(texts):
            return False
        transparent, place = one.transparent is True, len(found.segments)
        for cidr in cidrs:
            goal.mtu = max(goal.mtu, SMALLEST_MTU[cidr.version] + RIDING_BYTES * transparent)
            found.cidrs.append((place, cidr.version, cidr.text))
        inside[name] = _Inside(place, cidrs, transparent)
        found.segments.append((network, name, json.dumps(texts) if texts else "[]", transparent, *words))
    goal.segments += len(given)
    return True


def _ports(
    found: Lines,
    goal: Goal,
    network: int,
    given: Mapping[str, _Port],
    segments: Mapping[str, _Inside],
    groups: dict[str, int],
) -> bool:
    """`groups` is told of each."""
    for port in given.values():  # Who chose gets that; the others what is left.
        if (inside := segments.get(port.segment)) is None:
            return False
        if port.address is not UNSET and not inside.choose(_listed(port.address)):
            return False
    uses: dict[str, int] = {}
    for name, port in given.items():
        words, inside, place = _words(port), segments[port.segment], len(found.ports)
        if _name(name) is None or words is None or port.address == [] or (port.hosts and inside.transparent):
            return False
        if (addresses := inside.addresses(_listed(port.address))) is None:
            return False
        for position, address in enumerate(addresses):
            found.addresses.append((inside.place, address, place, position))
        if port.groups is not UNSET and not _members(found, network, place, _listed(port.groups), groups):
            return False
        uses[port.host] = uses.get(port.host, 0) + 1
        hosts, enabled = port.hosts is True, port.enabled is not False
        found.ports.append((network, inside.place, name, port.host, hosts, enabled, *words))
    for host, count in uses.items():
        found.uses.append((network, host, count))
        there = goal.hosts.setdefault(host, [0, 0])
        there[0] += 1
        there[1] += count
    goal.ports += len(given)
    return True


def _members(found: Lines, network: int, port: int, names: Sequence[str], groups: dict[str, int]) -> bool:
    if len(names) > rules.GROUPS_PER_PORT or len(set(names)) < len(names):
        return False
    for name in names:
        if name not in groups:
            if _name(name) is None:
                return False
            groups[name] = len(found.groups)
            found.groups.append((network, name))
        found.members.append((port, groups[name]))
    return True


def _policies(
    found: Lines, network: int, said: _Line, inside: Mapping[str, _Inside], groups: Mapping[str, int]
) -> bool:
    if not said.policies:
        return True
    given = [_rule_of(one) for one in said.policies]
    ports = said.ports or {}
    if len(given) > rules.POLICIES_PER_NETWORK or not _is_narrow(given, len(ports)):
        return False
    names: Names | None = None
    meanings = set[Any]()
    for rule in given:
        if rule is None:
            return False
        meaning: str | Named | None = rule.meaning
        if meaning is None:
            if names is None:
                first = len(found.ports) - len(ports)
                segments = {name: one.place for name, one in inside.items()}
                names = Names(groups, segments, {name: first + place for place, name in enumerate(ports)})
            if (meaning := _named(rule, names)) is None:
                return False
        if meaning not in meanings:  # Said twice means the same as said once.
            meanings.add(meaning)
            found.policies.append((network, rule.spec, meaning))
    return True


# What texts mean, by the rules of the file. None: wrong, or not plain.


def _judged(judge: Callable[[str], Any]) -> Callable[[str], Any]:
    """What a rule makes of a text, remembered; None if it refuses that."""

    @lru_cache(maxsize=KNOWN)
    def judged(text: str) -> Any:
        try:
            return judge(text)
        except (PydanticCustomError, Invalid):
            return None

    return judged


class _Cidr(NamedTuple):
    text: str
    version: int
    first: int
    size: int


class _Address(NamedTuple):
    text: str
    version: int
    number: int


_LENGTHS = {str(length): length for length in range(8, 31)}  # of CIDRs that IPv4 segments may have
_UNUSABLE = [(int(one.network_address), int(one.broadcast_address)) for one, _ in rules.UNUSABLE if one.version == 4]


def _read_cidr(text: str) -> _Cidr:
    """What the rules say; of IPv4 in a tenth of their time, where nothing is to be said about it."""
    address, _, tail = text.partition("/")
    if (length := _LENGTHS.get(tail)) is not None:
        with suppress(OSError, ValueError):  # inet_pton(3) takes no other than canonical ones
            first, size = int.from_bytes(inet_pton(AF_INET, address)), 1 << 32 - length
            last = first + size - 1
            if not first % size and all(last < low or high < first for low, high in _UNUSABLE):
                return _Cidr(text, 4, first, size)
    prefix = rules.read_cidr(text)
    return _Cidr(str(prefix), prefix.version, int(prefix.network_address), prefix.num_addresses)


def _read_address(text: str) -> _Address:
    address = rules.read_address(text)
    return _Address(str(address), address.version, int(address))


_name = _judged(rules.read_name)
_cidr = _judged(_read_cidr)
_address = _judged(_read_address)
_description = _judged(rules.read_description)
_label = _judged(rules.read_label)
_value = _judged(rules.read_label_value)


@lru_cache(maxsize=KNOWN)
def _text_of(version: int, number: int) -> str:
    return inet_ntop(AF_INET, number.to_bytes(4)) if version == 4 else str(ip_address(number.to_bytes(16)))


def _listed(texts: Texts | UnsetType) -> Sequence[str]:
    return (texts,) if isinstance(texts, str) else texts if isinstance(texts, list) else ()


def _words(part: _Part) -> tuple[str, str] | None:
    """Its labels, as text, and description."""
    if part.labels is UNSET and part.description is UNSET:
        return "{}", ""
    labels, text = part.labels or {}, part.description or ""
    sound = len(labels) <= rules.LABELS and all(
        _label(key) is not None and _value(value) is not None for key, value in labels.items()
    )
    return (canonical.labels_text(labels), text) if sound and _description(text) is not None else None


class _Rule(NamedTuple):
    """A policy: its sides with names where they are of the network, and all of it as text where none are."""

    spec: str
    sources: tuple[Selector | str, ...]
    targets: tuple[Selector | str, ...]
    services: About
    allow: bool
    priority: int
    meaning: str | None


def _rule_of(policy: _Policy) -> _Rule | None:
    allow = tuple(_listed(policy.allow)) if policy.allow is not UNSET else None
    deny = tuple(_listed(policy.deny)) if policy.deny is not UNSET else None
    rank = policy.priority if policy.priority is not UNSET else 100
    return _rule(tuple(_listed(policy.source)), tuple(_listed(policy.target)), allow, deny, rank)


@lru_cache(maxsize=KNOWN)
def _rule(
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    allow: tuple[str, ...] | None,
    deny: tuple[str, ...] | None,
    rank: int,
) -> _Rule | None:
    """None: wrong. Names are not looked up here."""
    about = allow if allow is not None else deny
    sides = all(0 < len(side) <= rules.SELECTORS_PER_SIDE for side in (sources, targets))
    if not about or (allow is not None and deny is not None) or not sides or len(about) > rules.SERVICES_PER_POLICY:
        return None
    if not rules.PRIORITY[0] <= rank <= rules.PRIORITY[1]:
        return None
    try:
        services = canonical.about(sorted({parse_service(text) for text in about}))
        said = [tuple(_selector(text) for text in side) for side in (sources, targets)]
    except Invalid:
        return None
    text = canonical.policy_text(sources, targets, allow, deny or (), rank)
    rule = _Rule(text, said[0], said[1], services, allow is not None, rank, None)
    if any(isinstance(one, str) for side in said for one in side):
        return rule
    meaning = _named(rule, Names())
    return rule._replace(meaning=canonical.meaning_text(*meaning)) if meaning is not None else None


def _selector(text: str) -> Selector | str:
    """What it means everywhere, or itself: then it is a name."""
    if text in WORDS or "/" in text or "." in text or text.count(":") > 1:
        return parse_selector(text, Names())
    return text


def _named(rule: _Rule, names: Names) -> Named | None:
    """What a policy means in a network with these names; None if it names something else."""
    sides = []
    for side in (rule.sources, rule.targets):
        try:
            found = {parse_selector(one, names) if isinstance(one, str) else one for one in side}
        except Invalid:
            return None
        sides.append(canonical.side(sorted(found, key=canonical.selector_order)))
    return sides[0], sides[1], rule.services, rule.allow, rule.priority


def _is_narrow(said: Sequence[_Rule | None], ports: int) -> bool:
    """Are these certainly few enough rules? No selector stands for more than all ports, or all prefixes; no service is
    cut into more pieces than all of them have ends."""
    prefixes = services = most = 0
    for rule in said:
        if rule is None:
            return False
        prefixes += len(rule.sources) + len(rule.targets)
        services += len(rule.services)
        most += len(rule.sources) * len(rule.targets) * len(rule.services)
    width = max(ports, prefixes, 1)
    return most * width * width * 2 * services <= RULES_PER_NETWORK


def _version(cidr: _Cidr) -> int:
    return cidr.version


class _Inside:
    """A new segment, and the addresses in it that are taken."""

    def __init__(self, place: int, cidrs: Sequence[_Cidr], transparent: bool) -> None:
        self.place, self.cidrs, self.transparent = place, cidrs, transparent
        self._taken: set[tuple[int, int]] = set()
        self._next = [2] * len(cidrs)  # 0 is the network's own address, 1 the gateway's

    def choose(self, texts: Iterable[str]) -> bool:
        """Are these free addresses that a port can have here?"""
        count = 0
        for text in texts:
            address = _address(text)
            if address is None or not any(_fits(address, cidr) for cidr in self.cidrs):
                return False
            key = (address.version, address.number)
            if key in self._taken:
                return False
            self._taken.add(key)
            count += 1
        return count <= rules.ADDRESSES_PER_PORT

    def addresses(self, chosen: Sequence[str]) -> list[str] | None:
        """Those that a port has: what it chose, or else the lowest free one of each CIDR. None: one is full."""
        if chosen:
            return [_address(text).text for text in chosen]
        found = []
        for place, cidr in enumerate(self.cidrs):
            offset, end = self._next[place], cidr.size - (cidr.version == 4)
            while offset < end and (cidr.version, cidr.first + offset) in self._taken:
                offset += 1
            if offset >= end:
                return None
            self._next[place] = offset + 1
            found.append(_text_of(cidr.version, cidr.first + offset))
        return found


def _fits(address: _Address, cidr: _Cidr) -> bool:
    offset = address.number - cidr.first
    return address.version == cidr.version and 0 < offset < cidr.size - (cidr.version == 4)
