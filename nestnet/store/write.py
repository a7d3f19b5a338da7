"""A plan as rows, in the transaction that is open: set-based statements, then the revision, then change rows."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from ipaddress import ip_network
from typing import Any

from sqlalchemy import Connection, Select, Table, bindparam, delete, insert, select, update
from sqlalchemy.dialects import sqlite

from nestnet.model.canonical import selector_order
from nestnet.model.values import FABRIC, Selector
from nestnet.store import numbers, tables, usage
from nestnet.store.identity import Identity
from nestnet.store.objects import (
    IDS,
    LinkRow,
    NetworkRow,
    PolicyRow,
    PortRow,
    RouterRow,
    Row,
    SegmentRow,
    above_domains,
    agents_on,
    chunks,
    column_names,
    current_revision,
    machines_of,
    meaning_text,
)
from nestnet.store.objects import domains as domains_of
from nestnet.store.objects import ports as ports_by
from nestnet.store.plan import Pair, TenantWish
from nestnet.store.quotas import QUOTAS

KEPT_REVISIONS = 10_000  # Of change rows: an agent that is further behind gets a snapshot.
FED = ("network", "segment", "router", "link", "port", "policy")  # Kinds that agents see.
TABLES: dict[str, Table] = {
    "network": tables.network,
    "segment": tables.segment,
    "router": tables.router,
    "link": tables.link,
    "group": tables.group,
    "port": tables.port,
    "policy": tables.policy,
}
# Kinds whose rows keep the revision of the object itself; a network's is of anything in it.
OWN_REVISION: dict[str, Table] = {
    **{kind: table for kind, table in TABLES.items() if kind not in ("network", "group")},
    "machine": tables.machine,
    "tenant": tables.tenant,
}
NOTHING_WAS = {
    "was_machine": None, "was_port": None, "was_other": None, "was_carrier": None, "was_encapsulated": None,
    "was_tenant": None, "whole": False,
}  # fmt: skip


def write(connection: Connection, identity: Identity, pairs: Sequence[Pair], tenants: Sequence[TenantWish] = ()) -> int:
    """Make it so, under the next revision; that is returned, or the current one if nothing changes."""
    named = {new.tenant for _, new in pairs if isinstance(new, NetworkRow) and new.tenant is not None}
    owners = write_tenants(connection, tenants, named)
    gone = [old.id for old, new in pairs if isinstance(old, SegmentRow) and new is None]
    ended = {old.id for old, new in pairs if isinstance(old, NetworkRow) and new is None}  # as domains, too
    freed = [label for label in _labels_of(connection, gone) if label[0] not in ended]
    pairs, domains = _settle(connection, identity, pairs)
    vlans_freed, vlans_taken = _vlans(pairs)
    carriers = _carriers(connection, pairs)
    carriers_then = carriers | {old.id: old.carrier for old, _ in pairs if isinstance(old, NetworkRow)}
    seats = _Seats(connection, identity, pairs, carriers)
    with usage.changed(connection, pairs):
        for kind, table in reversed(TABLES.items()):
            rows_gone = [{"row": old.id} for old, new in pairs if old is not None and new is None and old.kind == kind]
            _many(connection, delete(table).where(table.c.id == bindparam("row")), rows_gone)
        # MACs may be exchanged, or taken over by a new port: none is below 0.
        away = [{"row": old.id, "away": -old.id} for old, new in pairs if old is not None and _mac_moves(old, new)]
        port = tables.port
        _many(connection, update(port).where(port.c.id == bindparam("row")).values(mac=bindparam("away")), away)
        for kind, table in TABLES.items():
            fresh = [
                _columns(new, carriers, owners, domains, seats)
                for old, new in pairs
                if old is None and new is not None and new.kind == kind
            ]
            _many(connection, insert(table), fresh)
            moved = [(old, new) for old, new in pairs if old is not None and new is not None and new.kind == kind]
            _update(connection, table, [_columns(new, carriers, owners, domains, seats) for _, new in moved if new])
        _parts(connection, pairs)
        _attachments(connection, pairs)
        _end_moves(connection, pairs)
        _tally(connection, pairs)
    new_networks = {new.id for old, new in pairs if isinstance(new, NetworkRow) and old is None}
    rows = [
        _change_row(row.network, row.kind, row.id, old, carriers_then, seats) | {"whole": row.network in new_networks}
        for old, new in pairs
        for row in (new or old,)
        if row is not None and row.kind in FED and (row.kind == "network" or row.network not in new_networks)
    ]
    known = {(row["kind"], row["id"]) for row in rows}
    others: list[Row] = [*seats.taken(), *_shrunk(connection, pairs)]
    rows += [
        _change_row(row.network, row.kind, row.id, row, carriers_then, seats)
        for row in others
        if (row.kind, row.id) not in known and row.network not in new_networks
    ]
    rows += [{"network": at, "kind": "machine", "id": id, **NOTHING_WAS} for at, id in seats.changed]
    rows += [{"network": FABRIC, "kind": "tenant", "id": owners[wish.name], **NOTHING_WAS} for wish in tenants]
    if not rows:
        return current_revision(connection)
    n = next_revision(connection, rows)
    numbers.release(connection, freed, n)
    numbers.take_vlans(connection, vlans_taken)
    numbers.release_vlans(connection, vlans_freed, n)
    return n


def _vlans(pairs: Sequence[Pair]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(physical network, id) of each that segments leave, and of each that they get."""
    sides: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for pair in pairs:
        labels = [
            (row.physical, row.vlan)
            if isinstance(row, SegmentRow) and row.physical is not None and row.vlan is not None
            else None
            for row in pair
        ]
        for side, label in zip(sides, labels, strict=True):
            if label is not None and labels[0] != labels[1]:
                side.append(label)
    return sides


class _Seats:
    """The machines on host ports: made when the first port lives on one, gone with the host port."""

    def __init__(
        self, connection: Connection, identity: Identity, pairs: Sequence[Pair], carriers: Mapping[int, int]
    ) -> None:
        n, m = tables.network.c, tables.machine
        self._connection = connection
        known = {row.id: row.encapsulated for pair in pairs for row in pair if isinstance(row, NetworkRow)}
        for chunk in chunks(sorted(carriers.keys() - known.keys())):
            rows = connection.execute(select(n.id, n.encapsulated).where(n.id.in_(chunk)))
            known.update({row.id: bool(row.encapsulated) for row in rows})
        self._encapsulated = {id for id, is_so in known.items() if is_so}
        ports = [row for pair in pairs for row in pair if isinstance(row, PortRow)]
        lived_on = [row for row in ports if row.network in self._encapsulated]
        hosts = {host: carriers[row.network] for row in lived_on for host in (row.host, row.other) if host}
        self._on = agents_on(connection, hosts)
        self._new = sorted(hosts.keys() - self._on.keys())
        if self._new:
            first = reserve(connection, "machine", len(self._new))
            now = current_revision(connection)
            self._on.update({port: first + place for place, port in enumerate(self._new)})
            names = {port: identity.public("port", port) for port in self._new}
            fresh = [
                {"id": self._on[port], "name": names[port], "domain": hosts[port], "port": port, "joined": now}
                | {"address": names[port], "mtu": 0, "labels": "{}"}
                for port in self._new
            ]
            connection.execute(insert(m), fresh)
        self.changed = [(hosts[port], self._on[port]) for port in self._new]
        ended = [old for old, new in pairs if isinstance(old, PortRow) and new is None]
        gone = agents_on(connection, [row.id for row in ended])
        _many(connection, delete(m).where(m.c.id == bindparam("row")), [{"row": id} for id in gone.values()])
        self.changed += [(row.network, gone[row.id]) for row in ended if row.id in gone]

    def of(self, row: PortRow, host: int) -> int | None:
        """The machine that this host is, if it is one on a port."""
        return self._on[host] if host and row.network in self._encapsulated else None

    def taken(self) -> list[PortRow]:
        """The host ports that became machines: who is below has to know."""
        rows = ports_by(self._connection, "id", self._new)
        self._on.update(agents_on(self._connection, [row.host for row in rows]))
        return rows


def _labels_of(connection: Connection, segments: Sequence[int]) -> list[tuple[int, int]]:
    """(domain, VNI) of each segment."""
    s = tables.segment.c
    found: list[tuple[int, int]] = []
    for chunk in chunks(sorted(segments)):
        rows = connection.execute(select(s.domain, s.vni).where(s.id.in_(chunk)))
        found += [(row.domain, row.vni) for row in rows]
    return found


def _shrunk(connection: Connection, pairs: Sequence[Pair]) -> list[NetworkRow]:
    """The networks that have another MTU because one has that carries them for real."""
    changed = {
        old.id
        for old, new in pairs
        if isinstance(old, NetworkRow) and isinstance(new, NetworkRow) and old.mtu != new.mtu
    }
    return above_domains(connection, changed)


def next_revision(connection: Connection, rows: Sequence[dict[str, Any]]) -> int:
    """The revision of this transaction, with these change rows in it: network, kind, id, and what was."""
    n = connection.execute(_next_revision()).scalar_one()
    _many(connection, insert(tables.change), [{**row, "revision": n} for row in rows])
    for kind in sorted({row["kind"] for row in rows} & OWN_REVISION.keys()):
        table = OWN_REVISION[kind]
        mine = select(tables.change.c.id).where(tables.change.c.revision == n, tables.change.c.kind == kind)
        connection.execute(update(table).where(table.c.id.in_(mine)).values(revision=n))
    if any(row["whole"] for row in rows):
        new = select(tables.change.c.id).where(tables.change.c.revision == n, tables.change.c.whole)
        for kind in FED[1:]:
            table = TABLES[kind]
            connection.execute(update(table).where(table.c.network.in_(new)).values(revision=n))
    networks = sorted({row["network"] for row in rows} - {FABRIC})
    _many(
        connection,
        update(tables.network)
        .where(tables.network.c.id == bindparam("row"))
        .values(revision=n, version=tables.network.c.version + 1),
        [{"row": network} for network in networks],
    )
    oldest = n - KEPT_REVISIONS
    if oldest > 0:
        connection.execute(delete(tables.change).where(tables.change.c.revision <= oldest))
        # After a restore it is ahead: there are no older changes in this epoch.
        r = tables.revision
        connection.execute(update(r).where(r.c.oldest < oldest).values(oldest=oldest))
    return int(n)


@cache
def _next_revision() -> Any:
    c = tables.revision.c
    return update(tables.revision).values(n=c.n + 1).returning(c.n)


def reserve(connection: Connection, kind: str, count: int) -> int:
    """The first of `count` new ids of a kind. Ids are never used twice: the counter never goes back."""
    return reserve_all(connection, {kind: count})[kind]


def reserve_all(connection: Connection, counts: Mapping[str, int]) -> dict[str, int]:
    """The same of several kinds at once."""
    rows = [{"kind": kind, "last": count} for kind, count in counts.items()]
    told = connection.execute(_reserve(), rows) if rows else ()
    return {row.kind: int(row.last) - counts[row.kind] + 1 for row in told}


@cache
def _reserve() -> Any:
    c, new = tables.counter.c, sqlite.insert(tables.counter)
    return new.on_conflict_do_update(index_elements=[c.kind], set_={"last": c.last + new.excluded.last}).returning(
        c.kind, c.last
    )


def write_tenants(connection: Connection, wishes: Sequence[TenantWish], named: Iterable[str]) -> dict[str, int]:
    """Make tenants, or give them another parent or quota. Returns their ids by name, and those of the others that are
    named."""
    t = tables.tenant
    ids: dict[str, int] = {}
    known = {*named, *(wish.name for wish in wishes), *(wish.parent for wish in wishes if wish.parent is not None)}
    for chunk in list(chunks(sorted(known))) or [[]]:
        rows_there = connection.execute(select(t.c.name, t.c.id).where(t.c.name.in_(chunk)))
        ids.update({row.name: row.id for row in rows_there})
    fresh = [wish.name for wish in wishes if wish.name not in ids]
    if fresh:
        first = reserve(connection, "tenant", len(fresh))
        ids.update({name: first + place for place, name in enumerate(fresh)})
        _many(connection, insert(t), [{"id": ids[name], "name": name, "parent": None} for name in fresh])
    rows = [
        {"row": ids[wish.name], "up": ids[wish.parent] if wish.parent is not None else None, **asdict(wish.quota)}
        for wish in wishes
    ]
    limits: dict[str, Any] = {limit: bindparam(limit) for limit in QUOTAS}
    _many(connection, update(t).where(t.c.id == bindparam("row")).values(parent=bindparam("up"), **limits), rows)
    return ids


def _settle(connection: Connection, identity: Identity, pairs: Sequence[Pair]) -> tuple[Sequence[Pair], dict[int, int]]:
    """Real ids for those below 0, VNIs and MACs for those that have none; and the domains of networks with segments."""
    real: dict[tuple[str, int], int] = {}
    for kind in TABLES:
        fresh = [new.id for _, new in pairs if new is not None and new.kind == kind and new.id < 0]
        if fresh:
            first = reserve(connection, kind, len(fresh))
            real.update({(kind, id): first + place for place, id in enumerate(fresh)})
    settled = [(old, _real(new, real) if new is not None else None) for old, new in pairs]
    domains = _domains(connection, settled)
    wanted = Counter(domains[new.network] for _, new in settled if isinstance(new, SegmentRow) and new.vni is None)
    numbers.open_new(connection, wanted)
    vnis = {domain: iter(numbers.cut(connection, domain, count)) for domain, count in wanted.items()}
    chosen = {(new.physical, new.vlan) for _, new in settled if isinstance(new, SegmentRow) and new.vlan}
    physical = {new.physical for _, new in settled if isinstance(new, SegmentRow) and new.physical and not new.vlan}
    vlans = {
        on: iter([vlan for vlan in numbers.free_vlans(connection, on) if (on, vlan) not in chosen]) for on in physical
    }
    taken = _taken_macs(connection, [new for _, new in settled if isinstance(new, PortRow)])
    out: list[Pair] = []
    trunks = {new.trunk for _, new in settled if isinstance(new, PortRow) and new.mac is None and new.trunk}
    macs = {port.id: port.mac or 0 for port in ports_by(connection, "id", sorted(trunks))}
    for old, new in settled:
        if isinstance(new, SegmentRow) and new.vni is None:
            new = replace(new, vni=next(vnis[domains[new.network]]))
        if isinstance(new, SegmentRow) and new.physical and not new.vlan:
            new = replace(new, vlan=next(vlans[new.physical]))
        elif isinstance(new, RouterRow) and new.mac is None:
            new = replace(new, mac=identity.mac("router", new.id))
        elif isinstance(new, PortRow) and new.mac is None:
            attempt = 0
            if new.trunk and (new.segment, mac := macs[new.trunk]) not in taken:
                attempt = -1
            while attempt >= 0 and (new.segment, mac := identity.mac("port", new.id, attempt)) in taken:
                attempt += 1
            taken.add((new.segment, mac))
            new = replace(new, mac=mac)
        if isinstance(new, PortRow) and new.mac is not None:
            macs[new.id] = new.mac
        out.append((old, new))
    return out, domains


def _domains(connection: Connection, pairs: Sequence[Pair]) -> dict[int, int]:
    """Network -> its domain, of those with segments here."""
    rows = {new.id: new for _, new in pairs if isinstance(new, NetworkRow)}
    found: dict[int, int] = {}
    walks: dict[int, list[int]] = defaultdict(list)  # stored network -> those whose domain is its
    for network in {new.network for _, new in pairs if isinstance(new, SegmentRow)}:
        here = network
        while here in rows and not rows[here].encapsulated and rows[here].carrier != FABRIC:
            here = rows[here].carrier
        if here in rows:
            found[network] = rows[here].carrier if rows[here].encapsulated else FABRIC
        else:
            walks[here].append(network)
    for here, domain in domains_of(connection, walks).items():
        found.update(dict.fromkeys(walks[here], domain))
    return found


def _taken_macs(connection: Connection, ports: Sequence[PortRow]) -> set[tuple[int, int]]:
    """(segment, MAC) that cannot be chosen for those among `ports` that have none."""
    segments = sorted({port.segment for port in ports if port.mac is None})
    taken = {(port.segment, port.mac) for port in ports if port.mac is not None}
    for chunk in chunks(segments):
        rows = connection.execute(
            select(tables.port.c.segment, tables.port.c.mac).where(tables.port.c.segment.in_(chunk))
        )
        taken.update((row.segment, row.mac) for row in rows)
    return taken


def _real(row: Row, real: dict[tuple[str, int], int]) -> Row:
    def of(kind: str, id: int) -> int:
        return real.get((kind, id), id)

    if isinstance(row, NetworkRow):
        return replace(row, id=of("network", row.id), carrier=of("network", row.carrier))
    row = replace(row, id=of(row.kind, row.id), network=of("network", row.network))
    if isinstance(row, RouterRow):
        joined = ((of("segment", segment), addresses) for segment, addresses in row.interfaces)
        return replace(row, interfaces=tuple(sorted(joined)))
    if isinstance(row, LinkRow):
        return replace(row, between=(of("router", row.between[0]), of("router", row.between[1])))
    if isinstance(row, PortRow):
        return replace(
            row,
            segment=of("segment", row.segment),
            host=of("port", row.host) if row.host < 0 else row.host,
            trunk=of("port", row.trunk),
            groups=tuple(sorted(of("group", group) for group in row.groups)),
        )
    if isinstance(row, PolicyRow):

        def side(selectors: tuple[Selector, ...]) -> tuple[Selector, ...]:
            return tuple(sorted((replace(s, id=of(s.kind, s.id)) for s in selectors), key=selector_order))

        return replace(row, sources=side(row.sources), targets=side(row.targets))
    return row


def _carriers(connection: Connection, pairs: Sequence[Pair]) -> dict[int, int]:
    """Network -> carrier, of all networks that occur, and of what carries them."""
    known: dict[int, int] = {}
    new = {row.id: row.carrier for pair in pairs for row in pair if isinstance(row, NetworkRow)}
    wanted = {row.network for pair in pairs for row in pair if row is not None} | set(new.values())
    for chunk in chunks(sorted(wanted)):  # The fabric is asked for like the others: that takes as long.
        for row in connection.execute(_two_below(), {"ids": chunk}):
            known |= {row.id: row.carrier, row.carrier: row.lower}
    return known | new


@cache
def _two_below() -> Select[Any]:
    n, below = tables.network, tables.network.alias()
    query = select(n.c.id, n.c.carrier, below.c.carrier.label("lower")).join(below, below.c.id == n.c.carrier)
    return query.where(n.c.id.in_(IDS))


def _columns(
    row: Row, carriers: dict[int, int], owners: dict[str, int], domains: dict[int, int], seats: _Seats
) -> dict[str, Any]:
    """The row of its own table."""
    if isinstance(row, PolicyRow):
        return {"id": row.id, "network": row.network, "spec": row.spec, "value": meaning_text(row)}
    columns = {name: getattr(row, name) for name in column_names(TABLES[row.kind]) if hasattr(row, name)}
    if isinstance(row, NetworkRow):
        columns.pop("network", None)
        columns |= {"tenant": owners[row.tenant] if row.tenant else None, "revision": 0}
    elif isinstance(row, SegmentRow):
        columns["domain"] = domains[row.network]
        columns["dns"] = json.dumps(list(row.dns))
    elif isinstance(row, LinkRow):
        columns["router"], columns["other"] = row.between
    elif isinstance(row, PortRow):
        on_wire = carriers[row.network] == FABRIC
        for side, host in (("host", row.host), ("other", row.other)):
            machine = host or None if on_wire else seats.of(row, host)
            columns[f"{side}_machine"] = machine
            columns[f"{side}_port"] = host or None if machine is None and not on_wire else None
        columns |= {"trunk": row.trunk or None, "tag": row.tag or None}
    return columns


def _update(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    for row in rows:
        row.pop("revision", None)
        row["row"] = row.pop("id")
    values: dict[str, Any] = {name: bindparam(name) for name in rows[0] if name != "row"}
    _many(connection, update(table).where(table.c.id == bindparam("row")).values(values), rows)


def _mac_moves(old: Row | None, new: Row | None) -> bool:
    return isinstance(old, PortRow) and isinstance(new, PortRow) and (old.segment, old.mac) != (new.segment, new.mac)


def _parts(connection: Connection, pairs: Sequence[Pair]) -> None:
    """The rows that belong to segments, routers and ports: the old ones go first, for addresses may be exchanged."""
    changed = [
        (old, new) for old, new in pairs if new is not None and (old is None or _part_rows(old) != _part_rows(new))
    ]
    t = tables
    owners: tuple[tuple[Table, str], ...] = (
        (t.segment_cidr, "segment"),
        (t.router_interface, "router"),
        (t.address, "router"),
        (t.address, "port"),
        (t.owned, "port"),
        (t.port_group, "port"),
    )
    for table, owner in owners:
        ids = [{"row": new.id} for old, new in changed if old is not None and new.kind == owner]
        _many(connection, delete(table).where(table.c[owner] == bindparam("row")), ids)
    rows: dict[Table, list[dict[str, Any]]] = defaultdict(list)
    for _, new in changed:
        for table, parts in _part_rows(new).items():
            rows[table] += parts
    for table, parts in rows.items():
        _many(connection, insert(table), parts)


def _part_rows(row: Row | None) -> dict[Table, list[dict[str, Any]]]:
    t = tables
    if isinstance(row, SegmentRow):
        return {t.segment_cidr: [{"segment": row.id, "family": ip_network(c).version, "cidr": c} for c in row.cidrs]}
    if isinstance(row, RouterRow):
        return {
            t.router_interface: [{"router": row.id, "segment": segment} for segment, _ in row.interfaces],
            t.address: [
                {"segment": segment, "address": address, "port": None, "router": row.id, "position": place}
                for segment, addresses in row.interfaces
                for place, address in enumerate(addresses)
            ],
        }
    if isinstance(row, PortRow):
        return {
            t.address: [
                {"segment": row.segment, "address": address, "port": row.id, "router": None, "position": place}
                for place, address in enumerate(row.addresses)
            ],
            t.owned: [{"port": row.id, "prefix": p, "position": place} for place, p in enumerate(row.owns)],
            t.port_group: [{"port": row.id, "group": group} for group in row.groups],
        }
    return {}


def _attachments(connection: Connection, pairs: Sequence[Pair]) -> None:
    """What ports hang on, and on which machine: also of those above a host that moves."""
    a, p = tables.attachment, tables.port.c
    given: dict[int, tuple[str, str] | None] = {}
    moved: list[int] = []
    # Hosts of another carrier are others, though their numbers may be the same.
    recarried = {new.id for old, new in pairs if old and isinstance(new, NetworkRow) and old != new}
    for old, new in pairs:
        if not isinstance(new, PortRow):
            continue
        before = old if isinstance(old, PortRow) else None
        moves = before is not None and (before.host != new.host or new.network in recarried)
        if new.attach != (before.attach if before else None) or (new.attach and moves):
            given[new.id] = (new.attach.kind, new.attach.name) if new.attach else None
        if moves:
            moved.append(new.id)
    while moved:  # up, level by level
        above: list[int] = []
        for chunk in chunks(moved):
            above += connection.scalars(select(p.id).where(p.host_port.in_(chunk))).all()
        for chunk in chunks(above):
            for row in connection.execute(select(a).where(a.c.port.in_(chunk))):
                given.setdefault(row.port, (row.kind, row.name))
        moved = above
    _many(connection, delete(a).where(a.c.port == bindparam("row")), [{"row": port} for port in given])
    machines = machines_of(connection, [port for port, what in given.items() if what is not None])
    rows = [
        {"port": port, "machine": machines[port], "kind": what[0], "name": what[1]}
        for port, what in given.items()
        if what is not None
    ]
    _many(connection, insert(a), rows)


def _end_moves(connection: Connection, pairs: Sequence[Pair]) -> None:
    """Who is sent elsewhere meanwhile, or stays, moves no longer."""
    ended = [
        {"row": old.id}
        for old, new in pairs
        if isinstance(old, PortRow) and isinstance(new, PortRow) and old.other and not new.other
    ]
    _many(connection, delete(tables.move).where(tables.move.c.port == bindparam("row")), ended)


def _tally(connection: Connection, pairs: Sequence[Pair]) -> None:
    """Keep the count of what there is."""
    more: Counter[str] = Counter()
    for old, new in pairs:
        row = new or old
        if row is not None and row.kind in FED:
            more[row.kind] += (old is None) - (new is None)
    c = tables.tally.c
    statement = update(tables.tally).where(c.kind == bindparam("counted")).values(n=c.n + bindparam("more"))
    _many(connection, statement, [{"counted": kind, "more": n} for kind, n in more.items() if n])


def _change_row(
    network: int, kind: str, id: int, old: Row | None, carriers: dict[int, int], seats: _Seats
) -> dict[str, Any]:
    was = other = machine = None
    if isinstance(old, PortRow):
        was, other = old.host, old.other or None
        machine = was if carriers[network] == FABRIC else seats.of(old, was)
        other = seats.of(old, old.other) or other
    return {
        "network": network,
        "kind": kind,
        "id": id,
        "was_machine": machine,
        "was_port": was if machine is None else None,
        "was_other": other,
        "was_carrier": old.carrier if isinstance(old, NetworkRow) else None,
        "was_encapsulated": old.encapsulated if isinstance(old, NetworkRow) else None,
        "was_tenant": old.tenant if isinstance(old, NetworkRow) else None,
        "whole": False,
    }


def _many(connection: Connection, statement: Any, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        connection.execute(statement, rows)
