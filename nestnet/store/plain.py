"""New networks that are plain, many at once: from what their lines mean to rows.

    model/lines.py   all that lines mean by themselves, as columns
    Place            what carries networks, for whom, and with which hosts and numbers
    Rows             their rows, in the order of the columns that `INSERTS` names

Nothing is refused here. Whatever is not plain, or is wrong in any way, is None, and goes by a plan, which has words for
everything. So one rule binds this file: what it takes gets the rows that a plan would have given it (held by
tests/test_plain.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from nestnet.model.canonical import Side, meaning_text
from nestnet.model.lines import Lines, Named
from nestnet.store import bulk, host_use
from nestnet.store.identity import Identity


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


def count(lines: Lines) -> dict[str, int]:
    """How many of each kind there are."""
    columns: tuple[Sized, ...] = (lines.networks, lines.segments, lines.groups, lines.ports, lines.policies)
    return dict(zip(KINDS, map(len, columns), strict=True))


@dataclass
class Rows:
    """The rows of networks that are made at one revision. `first`: the next id of each kind; `vnis`: by domain."""

    identity: Identity
    revision: int
    first: dict[str, int]
    vnis: Mapping[int, Iterator[int]]
    rows: dict[str, list[tuple[Any, ...]]] = field(default_factory=lambda: {table: [] for table in INSERTS})
    on: dict[tuple[int, int, int], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def add(self, lines: Lines, places: Sequence[Place]) -> bool:
        """`places`: of each goal. False, and nothing that counts, if something is not plain there."""
        for goal, place in zip(lines.goals, places, strict=True):
            if place.mtu < goal.mtu or not goal.hosts.keys() <= place.hosts.keys():
                return False
            for host, (networks, ports) in goal.hosts.items():
                there = self.on[place.carrier, place.hosts[host], place.tenant or 0]
                there[0] += networks
                there[1] += ports
        first = dict(self.first)
        for kind, n in count(lines).items():
            self.first[kind] = first.get(kind, 0) + n
        self._networks(lines, places, first)
        self._segments(lines, places, first)
        self._ports(lines, places, first)
        network = first["network"]
        self.rows["policy"] += [
            (id, network + inside, spec, said if isinstance(said, str) else _text(said, first), self.revision)
            for id, (inside, spec, said) in enumerate(lines.policies, first.get("policy", 0))
        ]
        return True

    def write(self, connection: Connection) -> None:
        for table, rows in self.rows.items():
            bulk.insert(connection, table, INSERTS[table], rows)
        host_use.add_sums(connection, host_use.with_everyone(self.on))

    def _networks(self, lines: Lines, places: Sequence[Place], first: Mapping[str, int]) -> None:
        revision = self.revision
        on = [(place.carrier, place.tenant, place.underlay, place.grant) for place in places]
        self.rows["network"] += [
            (id, carrier, name, tenant, underlay, enabled, labels, text, revision, 1, grant)
            for id, (goal, name, enabled, labels, text) in enumerate(lines.networks, first["network"])
            for carrier, tenant, underlay, grant in (on[goal],)
        ]
        ids = range(first["network"], first["network"] + len(lines.networks))
        self.rows["change"] += [(revision, id, "network", id, True) for id in ids]

    def _segments(self, lines: Lines, places: Sequence[Place], first: Mapping[str, int]) -> None:
        network, segment, revision = first["network"], first.get("segment", 0), self.revision
        domains = [(place.domain, self.vnis.get(place.domain, iter(()))) for place in places]
        self.rows["segment"] += [
            (id, network + inside, name, domain, next(vnis), dns, transparent, labels, text, revision)
            for id, (inside, name, dns, transparent, labels, text) in enumerate(lines.segments, segment)
            for domain, vnis in (domains[lines.networks[inside][0]],)
        ]
        self.rows["segment_cidr"] += [(segment + inside, family, cidr) for inside, family, cidr in lines.cidrs]

    def _ports(self, lines: Lines, places: Sequence[Place], first: Mapping[str, int]) -> None:
        network, segment, revision = first["network"], first.get("segment", 0), self.revision
        port, group = first.get("port", 0), first.get("group", 0)
        hosts = [place.hosts for place in places]
        seats = [
            {host: (place.hosts[host], None) if place.on_wire else (None, place.hosts[host]) for host in goal.hosts}
            for goal, place in zip(lines.goals, places, strict=True)
        ]
        goals = [goal for goal, *_ in lines.networks]
        ids = range(port, port + len(lines.ports))
        self.rows["port"] += [
            (id, network + inside, segment + at, name, machine, above, mac, carries, enabled, labels, text, revision)
            for id, mac, (inside, at, name, host, carries, enabled, labels, text) in zip(
                ids, self.identity.macs(ids), lines.ports, strict=True
            )
            for machine, above in (seats[goals[inside]][host],)
        ]
        self.rows["address"] += [
            (segment + at, address, port + owner, position) for at, address, owner, position in lines.addresses
        ]
        self.rows["group"] += [(id, network + inside, name) for id, (inside, name) in enumerate(lines.groups, group)]
        self.rows["port_group"] += [(port + member, group + of) for member, of in lines.members]
        self.rows["host_use"] += [(network + inside, hosts[goals[inside]][host], n) for inside, host, n in lines.uses]


def _text(named: Named, first: Mapping[str, int]) -> str:
    """The value of a policy, with ids in place of places."""

    def side(given: Side) -> Side:
        return tuple((kind, first[kind] + at if kind in KINDS else 0, cidr) for kind, at, cidr in given)

    sources, targets, services, allow, priority = named
    return meaning_text(side(sources), side(targets), services, allow, priority)
