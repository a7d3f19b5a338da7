"""New networks that are plain, many at once: from the lines of a batch to rows.

A plan compares, judges and tells whatever there can be, for which it takes its time. Most of what is made in bulk is
the same few things: segments, and ports and policies in them, on hosts that are there. Those are *plain*, and become
rows here by themselves:

    read     a line as a `Network`, if it says nothing but that: all that it means by itself, which needs no store
    place    what carries it, for whom, and with which hosts and numbers
    rows     its rows, in the order of the columns that `INSERTS` names

Nothing is refused here. Whatever is not plain, or is wrong in any way, is None, and goes by a plan, which has words for
everything. So one rule binds this file: what it takes gets the rows that a plan would have given it (held by
tests/test_plain.py).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address
from socket import AF_INET, inet_ntop, inet_pton
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType
from pydantic_core import PydanticCustomError
from sqlalchemy import Connection

from nestnet.model import manifest as rules
from nestnet.model.breadth import RULES_PER_NETWORK
from nestnet.model.errors import Invalid
from nestnet.model.selectors import WORDS, Names, parse_selector, parse_service
from nestnet.model.validate import SMALLEST_MTU
from nestnet.model.values import RIDING_BYTES, Selector, Service
from nestnet.store import bulk, host_use
from nestnet.store.identity import Identity
from nestnet.store.objects import PolicyRow, dump, meaning_text, selector_order
from nestnet.store.plan import policy_text

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


class Segment(NamedTuple):
    name: str
    words: tuple[str, str]  # labels and description, as columns
    cidrs: list[tuple[int, str]]  # each with its family
    dns: str  # as a column
    transparent: bool
    mtu: int  # the least that it can do with


class Port(NamedTuple):
    name: str
    words: tuple[str, str]
    segment: int  # its place among the segments
    host: str
    addresses: list[str]
    groups: Sequence[str]
    hosts: bool
    enabled: bool


@dataclass(frozen=True, slots=True)
class Network:
    """What a plain line means. `carrier`: a path, None: the wire, or what was granted; `tenant`: None: nobody says.
    `groups`: all that its ports are in."""

    name: str
    words: tuple[str, str]
    carrier: str | None
    tenant: str | None
    enabled: bool
    segments: list[Segment]
    ports: list[Port]
    groups: list[str]
    policies: list[Rule]


def read(line: bytes) -> Network | None:
    """What a line means, if it is plain."""
    if b"\\u0022" in line:
        return None  # a quote that is not to be counted
    try:
        said = _read(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    # Of a key that is there twice, one is lost; then it has more quotes than what was read.
    if _write(said).count(b'"') != line.count(b'"') or "" in (said.carrier, said.tenant):
        return None
    words, inside = _words(said), dict[str, _Inside]()
    if _name(said.name) is None or words is None:
        return None
    segments = _segments(said.segments or {}, inside)
    if segments is None:
        return None
    ports = _ports(said.ports or {}, inside)
    policies = _policies(said.policies or [], len(said.ports or {}))
    if ports is None or policies is None:
        return None
    groups = dict.fromkeys(group for port in ports for group in port.groups)
    if any(_name(group) is None for group in groups):
        return None
    carrier, tenant, enabled = said.carrier or None, said.tenant or None, said.enabled is not False
    return Network(said.name, words, carrier, tenant, enabled, segments, ports, [*groups], policies)


def _segments(given: Mapping[str, _Segment], inside: dict[str, _Inside]) -> list[Segment] | None:
    """`inside` is told of each."""
    found: list[Segment] = []
    for name, one in given.items():
        words, cidrs = _words(one), sorted(map(_cidr, _listed(one.cidr)), key=_version)
        dns = [*map(_address, _listed(one.dns))]
        if _name(name) is None or words is None or None in cidrs or None in dns:
            return None
        texts = [each.text for each in dns]
        if (len(cidrs) == 2 and cidrs[0].version == cidrs[1].version) or len(cidrs) > 2:
            return None
        if len(texts) > rules.DNS_PER_SEGMENT or len(set(texts)) < len(texts):
            return None
        transparent = bool(one.transparent)
        mtu = max((SMALLEST_MTU[cidr.version] + RIDING_BYTES * transparent for cidr in cidrs), default=0)
        known = [(cidr.version, cidr.text) for cidr in cidrs]
        inside[name] = _Inside(len(found), cidrs, transparent)
        found.append(Segment(name, words, known, json.dumps(texts) if texts else "[]", transparent, mtu))
    return found


def _ports(given: Mapping[str, _Port], segments: Mapping[str, _Inside]) -> list[Port] | None:
    found = []
    for port in given.values():  # Who chose gets that; the others what is left.
        if (inside := segments.get(port.segment)) is None:
            return None
        if port.address is not UNSET and not inside.choose(_listed(port.address)):
            return None
    for name, port in given.items():
        words, inside = _words(port), segments[port.segment]
        if _name(name) is None or words is None or port.address == [] or (port.hosts and inside.transparent):
            return None
        if (addresses := inside.addresses(_listed(port.address))) is None:
            return None
        groups = _listed(port.groups)
        if len(groups) > rules.GROUPS_PER_PORT or len(set(groups)) < len(groups):
            return None
        hosts, enabled = port.hosts is True, port.enabled is not False
        found.append(Port(name, words, inside.place, port.host, addresses, groups, hosts, enabled))
    return found


def _policies(given: Sequence[_Policy], ports: int) -> list[Rule] | None:
    found = []
    for one in given:
        if (rule := _rule_of(one)) is None:
            return None
        found.append(rule)
    return found if len(found) <= rules.POLICIES_PER_NETWORK and (not found or _is_narrow(found, ports)) else None


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
UNUSABLE = [(int(one.network_address), int(one.broadcast_address)) for one, _ in rules.UNUSABLE if one.version == 4]


def _read_cidr(text: str) -> _Cidr:
    """What the rules say; of IPv4 in a tenth of their time, where nothing is to be said about it."""
    address, _, tail = text.partition("/")
    if (length := _LENGTHS.get(tail)) is not None:
        with suppress(OSError, ValueError):  # inet_pton(3) takes no other than canonical ones
            first, size = int.from_bytes(inet_pton(AF_INET, address)), 1 << 32 - length
            last = first + size - 1
            if not first % size and all(last < low or high < first for low, high in UNUSABLE):
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
    """Its labels and description as columns."""
    if part.labels is UNSET and part.description is UNSET:
        return "{}", ""
    labels, text = part.labels or {}, part.description or ""
    sound = len(labels) <= rules.LABELS and all(
        _label(key) is not None and _value(value) is not None for key, value in labels.items()
    )
    return (dump(labels), text) if sound and _description(text) is not None else None


class Rule(NamedTuple):
    """A policy: its sides with names where they are of the network, and all of it as text where none are."""

    spec: str
    sources: tuple[Selector | str, ...]
    targets: tuple[Selector | str, ...]
    services: tuple[Service, ...]
    allow: bool
    priority: int
    value: str | None


@lru_cache(maxsize=KNOWN)
def _rule(
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    allow: tuple[str, ...] | None,
    deny: tuple[str, ...] | None,
    rank: int,
) -> Rule | None:
    """None: wrong. Names are not looked up here."""
    about = allow if allow is not None else deny
    sides = all(0 < len(side) <= rules.SELECTORS_PER_SIDE for side in (sources, targets))
    if not about or (allow is not None and deny is not None) or not sides or len(about) > rules.SERVICES_PER_POLICY:
        return None
    if not rules.PRIORITY[0] <= rank <= rules.PRIORITY[1]:
        return None
    try:
        services = tuple(sorted({parse_service(text) for text in about}))
        said = [tuple(_selector(text) for text in side) for side in (sources, targets)]
    except Invalid:
        return None
    spec = rules.PolicySpec.model_construct(sources=sources, targets=targets, allow=allow, deny=deny, priority=rank)
    rule = Rule(policy_text(spec), said[0], said[1], services, allow is not None, rank, None)
    if any(isinstance(one, str) for side in said for one in side):
        return rule
    return rule._replace(value=_meaning(rule, Names()))


def _selector(text: str) -> Selector | str:
    """What it means everywhere, or itself: then it is a name."""
    if text in WORDS or "/" in text or "." in text or text.count(":") > 1:
        return parse_selector(text, Names())
    return text


def _meaning(rule: Rule, names: Names) -> str | None:
    """The value of a policy in a network with these names; None if it names something else."""
    sides = []
    for side in (rule.sources, rule.targets):
        try:
            found = {parse_selector(one, names) if isinstance(one, str) else one for one in side}
        except Invalid:
            return None
        sides.append(tuple(sorted(found, key=selector_order)))
    return meaning_text(PolicyRow(0, 0, "", sides[0], sides[1], rule.services, rule.allow, rule.priority))


# Places


@dataclass(frozen=True, slots=True)
class Place:
    """What a new network is put on: rows of the carrier, its domain, tenant and grant; the hosts that its ports may
    have, by name, which are machines on the wire, else ports; and the bytes of IP that it will have."""

    carrier: int
    domain: int
    tenant: int | None
    grant: int | None
    underlay: int
    mtu: int
    hosts: Mapping[str, int]
    on_wire: bool


# Rows

INSERTS = {
    "network": "id, carrier, name, tenant, underlay, enabled, labels, description, revision, version, grant",
    "segment": "id, network, name, domain, vni, dns, transparent, labels, description, revision",
    "segment_cidr": "segment, family, cidr",
    "group": "id, network, name",
    "port": "id, network, segment, name, host_machine, host_port, mac, hosts, enabled, labels, description, revision",
    "address": "segment, address, port, position",
    "port_group": "port, group",
    "policy": "id, network, spec, value, revision",
    "host_use": "network, host, count",
    "change": "revision, network, kind, id, whole",
}
"""Table -> its columns that a new plain network has something in."""
KINDS = ("network", "segment", "group", "port", "policy")


@dataclass
class Rows:
    """The rows of networks that are made at one revision. `first`: the next id of each kind; `vnis`: by domain."""

    identity: Identity
    revision: int
    first: dict[str, int]
    vnis: Mapping[int, Any]
    rows: dict[str, list[tuple[Any, ...]]] = field(default_factory=lambda: {table: [] for table in INSERTS})
    on: dict[tuple[int, int, int], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def add(self, network: Network, place: Place) -> int | None:
        """Its id; None, and nothing that counts, if it is not plain there."""
        rows, revision = self.rows, self.revision
        id = self._next("network")
        on = (place.carrier, network.name, place.tenant, place.underlay, network.enabled)
        rows["network"].append((id, *on, *network.words, revision, 1, place.grant))
        rows["change"].append((revision, id, "network", id, True))
        segments = []
        for name, words, cidrs, dns, transparent, mtu in network.segments:
            if place.mtu < mtu:
                return None
            segment = self._next("segment")
            segments.append(segment)
            vni = next(self.vnis[place.domain])
            rows["segment"].append((segment, id, name, place.domain, vni, dns, transparent, *words, revision))
            for family, cidr in cidrs:
                rows["segment_cidr"].append((segment, family, cidr))
        groups = {name: self._next("group") for name in network.groups}
        rows["group"] += [(group, id, name) for name, group in groups.items()]
        ports = self._ports(id, network.ports, segments, groups, place)
        if ports is None or not self._policies(id, network, ports, segments, groups):
            return None
        return id

    def write(self, connection: Connection) -> None:
        for table, rows in self.rows.items():
            bulk.insert(connection, table, INSERTS[table], rows)
        host_use.add_sums(connection, host_use.with_everyone(self.on))

    def _next(self, kind: str) -> int:
        id = self.first[kind]
        self.first[kind] = id + 1
        return id

    def _ports(
        self, network: int, given: Sequence[Port], segments: Sequence[int], groups: Mapping[str, int], place: Place
    ) -> list[int] | None:
        rows, found, used = self.rows, list[int](), dict[int, int]()
        for name, words, inside, on, addresses, member, hosts, enabled in given:
            if (host := place.hosts.get(on)) is None:
                return None
            id, segment = self._next("port"), segments[inside]
            found.append(id)
            for group in member:
                rows["port_group"].append((id, groups[group]))
            used[host] = used.get(host, 0) + 1
            machine, port = (host, None) if place.on_wire else (None, host)
            mac = self.identity.mac("port", id)
            rows["port"].append((id, network, segment, name, machine, port, mac, hosts, enabled, *words, self.revision))
            for position, address in enumerate(addresses):
                rows["address"].append((segment, address, id, position))
        rows["host_use"] += [(network, host, count) for host, count in used.items()]
        for host, count in used.items():
            there = self.on[place.carrier, host, place.tenant or 0]
            there[0] += 1
            there[1] += count
        return found

    def _policies(
        self,
        id: int,
        network: Network,
        ports: Sequence[int],
        segments: Sequence[int],
        groups: Mapping[str, int],
    ) -> bool:
        names: Names | None = None
        values = set[str]()
        for rule in network.policies:
            value = rule.value
            if value is None:
                if names is None:
                    known = [
                        dict(zip((one.name for one in part), ids, strict=True))
                        for part, ids in ((network.segments, segments), (network.ports, ports))
                    ]
                    names = Names(groups, *known)
                if (value := _meaning(rule, names)) is None:
                    return False
            if value not in values:  # Said twice means the same as said once.
                values.add(value)
                self.rows["policy"].append((self._next("policy"), id, rule.spec, value, self.revision))
        return True


def _rule_of(policy: _Policy) -> Rule | None:
    allow = tuple(_listed(policy.allow)) if policy.allow is not UNSET else None
    deny = tuple(_listed(policy.deny)) if policy.deny is not UNSET else None
    rank = policy.priority if policy.priority is not UNSET else 100
    return _rule(tuple(_listed(policy.source)), tuple(_listed(policy.target)), allow, deny, rank)


def _is_narrow(said: Sequence[Rule], ports: int) -> bool:
    """Are these certainly few enough rules? No selector stands for more than all ports, or all prefixes; no service is
    cut into more pieces than all of them have ends."""
    prefixes = sum(len(rule.sources) + len(rule.targets) for rule in said)
    width, cuts = max(ports, prefixes, 1), 2 * sum(len(rule.services) for rule in said)
    most = sum(len(rule.sources) * len(rule.targets) * len(rule.services) for rule in said)
    return most * width * width * cuts <= RULES_PER_NETWORK


def _version(cidr: _Cidr | None) -> int:
    return cidr.version if cidr is not None else 0


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
