"""What is stored as resources: plain data with names, paths and public ids, for people and programs.

Lists are paged by key: a cursor is the public id of the last item, so a page costs the same wherever
it is, and neither an insert nor a delete shifts the next one.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    Table,
    bindparam,
    exists,
    false,
    func,
    select,
    true,
)

from nestnet.model.errors import Ambiguous, Invalid, NotFound, Problem
from nestnet.model.manifest import mac_text
from nestnet.model.reasons import CARRIERS
from nestnet.model.standing import ABSENT, DEPTH, DISABLED, FENCED, LOST, Cause
from nestnet.model.values import FABRIC, RIDING_BYTES, ranked
from nestnet.store import objects, tables, tenancy
from nestnet.store.events import Happened
from nestnet.store.feed import machines_on_ports, network_mtu
from nestnet.store.heard import Heard
from nestnet.store.identity import Identity
from nestnet.store.objects import IDS, NetworkRow, PortRow, chunks
from nestnet.store.plan import policy_words
from nestnet.store.quotas import QUOTAS
from nestnet.store.scope import EVERYTHING, Scope
from nestnet.store.standing import Chain, Chains, Standing, standings
from nestnet.store.usage import uses

KINDS = ("machine", "tenant", "network", "segment", "router", "link", "port", "policy")
IN_NETWORK = ("segment", "router", "link", "port", "policy")
TABLES: dict[str, Table] = {
    "machine": tables.machine,
    "tenant": tables.tenant,
    "network": tables.network,
    "segment": tables.segment,
    "router": tables.router,
    "link": tables.link,
    "port": tables.port,
    "policy": tables.policy,
}
OWNERS = select(tables.tenant.c.id).where(tables.tenant.c.name.in_(bindparam("reads", expanding=True)))
CANDIDATES = 20  # Names that an error lists at most.

Resource = dict[str, Any]


class _Host:
    """What a port lives on, by the two columns that say so: a machine of the fabric, or a port, perhaps by the machine
    that its workload is."""

    def __init__(self, machine: ColumnElement[int | None], port: ColumnElement[int | None]) -> None:
        self._machine, self._on, self._below = machine, tables.machine.alias(), tables.port.alias()
        self.port = func.coalesce(port, self._on.c.port)
        self.name = func.coalesce(self._below.c.name, self._on.c.name)

    def joined(self, table: FromClause) -> FromClause:
        below = table.outerjoin(self._on, self._on.c.id == self._machine)
        return below.outerjoin(self._below, self._below.c.id == self.port)


@cache
def _hosts_named() -> Select[Any]:
    p = tables.port
    here, there = _Host(p.c.host_machine, p.c.host_port), _Host(p.c.other_machine, p.c.other_port)
    query = select(p.c.id, here.name.label("here"), there.name.label("there"))
    return query.select_from(there.joined(here.joined(p))).where(p.c.id.in_(IDS))


@cache
def _seats() -> Select[Any]:
    def seat(port: FromClause, root: ColumnElement[int]) -> Select[Any]:
        """`root`, the name of the host of a port, the port that this is, and whether what that lives on is seen."""
        host = _Host(port.c.host_machine, port.c.host_port)
        n, carrier = tables.network.alias(), tables.network.alias()
        further = func.coalesce(carrier.c.tenant.in_(OWNERS), false()).label("further")
        joined = host.joined(port).join(n, n.c.id == port.c.network).join(carrier, carrier.c.id == n.c.carrier)
        columns: tuple[ColumnElement[Any], ...] = (root, host.name.label("name"), host.port.label("port"), further)
        return select(*columns).select_from(joined)

    p, below = tables.port.alias(), tables.port.alias()
    walk = seat(p, p.c.id.label("root")).where(p.c.id.in_(IDS)).cte(recursive=True)
    walk = walk.union_all(seat(below, walk.c.root).where(below.c.id == walk.c.port, walk.c.further))
    return select(walk.c.root, walk.c.name).where(walk.c.further.is_(False))


@cache
def _ways(whole: bool) -> Select[Any]:
    """These networks, and what carries them as far as it is seen; `whole`: by whoever sees all."""
    n, below = tables.network, tables.network.alias()

    def seen(table: FromClause) -> ColumnElement[bool]:
        there = table.c.id != FABRIC
        return there if whole else there & table.c.tenant.in_(OWNERS)

    walk = select(n.c.id, n.c.name, n.c.carrier).where(n.c.id.in_(IDS), seen(n)).cte(recursive=True)
    deeper = select(below.c.id, below.c.name, below.c.carrier).where(below.c.id == walk.c.carrier, seen(below))
    walk = walk.union(deeper)
    return select(walk.c.id, walk.c.name, walk.c.carrier)


class Reader:
    """One transaction's look at the store."""

    def __init__(
        self, connection: Connection, identity: Identity, heard: Heard, chains: Chains, scope: Scope = EVERYTHING
    ) -> None:
        self._connection = connection
        self.identity = self._identity = identity
        self.heard = heard
        self.chains = chains
        self.scope = scope
        self._causes: dict[Cause, str] = {}

    def row(self, kind: str, public: str) -> int | None:
        """The row of a public id, whether or not it is there."""
        return self._identity.row(kind, public)

    def public(self, kind: str, row: int) -> str:
        """The public id of a row."""
        return self._identity.public(kind, row)

    # What is in scope

    def _seen(self, kind: str) -> ColumnElement[bool]:
        """The condition that an object of this kind may be seen. Machines are the operator's: to others they are hosts
        like any others (hosts.py)."""
        t, reads = tables, self.scope.reads
        if reads is None:
            return true()
        owners = self._owners()
        if kind == "machine":
            return false()
        if kind == "grant":
            return t.grant.c.tenant.in_(owners)
        if kind == "tenant":
            return tenancy.within(reads)
        if kind == "network":
            # Those of one are in the order of ids by the index.
            only = len(self.scope.reads or ()) == 1
            return t.network.c.tenant == owners.scalar_subquery() if only else t.network.c.tenant.in_(owners)
        return TABLES[kind].c.network.in_(select(t.network.c.id).where(t.network.c.tenant.in_(owners)))

    def _called(self, name: str) -> ColumnElement[bool]:
        """The condition that a network that may be seen is called so."""
        return objects.called([name], self._owners() if self.scope.reads is not None else None)

    def _seen_there(self, kind: str) -> ColumnElement[bool]:
        """The same of few rows that are found otherwise: each is asked whose it is, instead of looking for all that
        are seen."""
        if self.scope.reads is None or kind not in IN_NETWORK:
            return self._seen(kind)
        n = tables.network.alias()
        return exists().where(n.c.id == TABLES[kind].c.network, n.c.tenant.in_(self._owners()))

    def _owners(self) -> Select[tuple[int]]:
        """The tenants whose networks may be seen, by row."""
        return select(tables.tenant.c.id).where(tables.tenant.c.name.in_(sorted(self.scope.reads or ())))

    def _reads(self) -> dict[str, list[str]]:
        """What `OWNERS` takes."""
        return {"reads": sorted(self.scope.reads)} if self.scope.reads is not None else {}

    def _granted(self, carrier: int) -> set[int]:
        """The hosts of a carrier that were granted to a reader who does not see it whole."""
        g = tables.grant.c
        found: set[int] = set()
        for row in self._connection.execute(select(g.hosts).where(g.carrier == carrier, self._seen("grant"))):
            if row.hosts is not None:
                found.update(json.loads(row.hosts))
                continue
            found.update(self._connection.scalars(objects.hosts_in(), {"carrier": carrier}))
        return found

    def granted(self) -> dict[int, set[int]]:
        """Carrier -> the hosts of it that were granted to a reader who does not see everything."""
        g = tables.grant.c
        carriers = self._connection.scalars(select(g.carrier).where(self._seen("grant")).distinct()).all()
        return {carrier: self._granted(carrier) for carrier in carriers}

    def owner(self, kind: str, id: int) -> str | None:
        """The tenant that an object in a network, or a network, belongs to."""
        n, t = tables.network.c, tables.tenant.c
        network: Any = id
        if kind != "network":
            table = TABLES[kind]
            network = select(table.c.network).where(table.c.id == id).scalar_subquery()
        return self._connection.scalar(select(t.name).join(tables.network, n.tenant == t.id).where(n.id == network))

    def to_write(self, kind: str, id: int, what: str) -> None:
        """Raise Forbidden unless this object may be changed, as it is seen."""
        if kind in ("network", *IN_NETWORK):
            owner = self.owner(kind, id)
            self.scope.to_write(owner, what)
            self._to_write_now(owner)
        elif kind == "tenant":
            tenancy.to_administer(tenancy.line(self._connection, id), self.scope)
        else:
            self.scope.to_write_all(what)

    def _to_write_now(self, owner: str | None) -> None:
        """Raise Forbidden if the tenant that something belongs to is suspended."""
        if self.scope.writes is not None and owner is not None:
            id = tenancy.find(self._connection, self.scope, owner)
            tenancy.to_write(tenancy.line(self._connection, id), self.scope)

    # Finding

    def find(self, kind: str, reference: str) -> int:
        """The row of a public id, a path, or a name that only one has. Raises NotFound or Ambiguous."""
        table = TABLES[kind]
        if reference.startswith(f"{kind}_"):  # No name is like that.
            if (row := self._identity.row(kind, reference)) is None:
                row = -1  # Nobody's; not all numbers that ids can say are.
            if (kind != "network" or row != FABRIC) and self._connection.scalar(
                select(table.c.id).where(table.c.id == row, self._seen_there(kind))
            ) is not None:
                return int(row)
            raise NotFound(f"{kind} {reference}")
        if kind == "policy":
            return self._find_policy(reference)
        *above, name = reference.split("/")
        if kind == "machine" and above:
            port = self._find_in_network("port", reference, above, name)
            found = self._connection.scalar(select(table.c.id).where(table.c.port == port))
            if found is None:
                raise NotFound(f"machine {reference}")
            return int(found)
        if kind in ("machine", "tenant"):
            named = select(table.c.id).where(table.c.name == reference, self._seen(kind))
            if (found := self._connection.scalar(named)) is None:
                near = self._nearest(select(table.c.name).where(self._seen(kind)), reference)
                raise NotFound(f"{kind} {reference}", near)
            return int(found)
        return self._find_in_network(kind, reference, above, name)

    def _find_in_network(self, kind: str, reference: str, above: list[str], name: str) -> int:
        table = TABLES[kind]
        owner = table.c.carrier if kind == "network" else table.c.network
        network = self._walk(above)
        # With which of its networks paths begin is not in `carrier`, to whoever does not see all.
        if network is not None and (kind != "network" or above or self.scope.reads is None):
            named = select(table.c.id).where(owner == network, table.c.name == name, self._seen_there(kind))
            found = self._connection.scalar(named)
            if found is not None and not (kind == "network" and found == FABRIC):
                return int(found)
        # Not a whole path: the end of one, perhaps.
        called = (table.c.name == name) & self._seen(kind) if kind != "network" else self._called(name)
        query = select(table.c.id, owner.label("owner")).where(called).limit(1000)
        rows = self._connection.execute(query).all()
        paths = self.paths(row.owner for row in rows)
        ends = {row.id: "/".join(part for part in (paths[row.owner], name) if part) for row in rows}
        fits: dict[int, str] = {id: path for id, path in ends.items() if ("/" + path).endswith("/" + reference)}
        if self.scope.reads is not None and (whole := [id for id, path in fits.items() if path == reference]):
            fits = {id: fits[id] for id in whole}
        if len(fits) == 1:
            return next(iter(fits))
        if fits:
            raise Ambiguous(f"{kind} {reference}", sorted(fits.values())[:CANDIDATES])
        names = select(table.c.name).where(self._seen(kind))
        if self.scope.reads is not None:  # What is on the way there is nobody's business.
            near = self._nearest(names.where(owner == network), name) if network is not None else None
            raise NotFound(f"{kind} {reference}", "/".join([*above, near]) if near else None)
        if above and network is None:
            raise NotFound(f"network {'/'.join(above)}", self._nearest_network(above))
        within = names.where(owner == network) if above or kind == "network" else names
        near = self._nearest(within, name)
        raise NotFound(f"{kind} {reference}", "/".join([*above, near]) if near else None)

    def _find_policy(self, reference: str) -> int:
        above, _, last = reference.rpartition("/")
        if above and (row := self._identity.row("policy", last)) is not None:
            network = self.find("network", above)
            p = tables.policy.c
            here = (p.id == row, p.network == network, self._seen_there("policy"))
            if self._connection.scalar(select(p.id).where(*here)) is not None:
                return row
        raise NotFound(f"policy {reference}")

    def _walk(self, names: Sequence[str]) -> int | None:
        c = tables.network.c
        network = FABRIC
        if names and self.scope.reads is not None:
            tops = self._connection.scalars(select(c.id).where(self._called(names[0]))).all()
            paths = self.paths(tops)
            first = [id for id in tops if paths[id] == names[0]]
            if len(first) != 1:
                return None
            network, names = first[0], names[1:]
        for name in names:
            here = (c.carrier == network, c.name == name, c.id != FABRIC, self._seen("network"))
            found = self._connection.scalar(select(c.id).where(*here))
            if found is None:
                return None
            network = int(found)
        return network

    def _nearest_network(self, names: Sequence[str]) -> str | None:
        c = tables.network.c
        return self._nearest(select(c.name).where(c.carrier == FABRIC, c.id != FABRIC), names[0])

    def _nearest(self, names: Select[tuple[str]], wrong: str) -> str | None:
        known = self._connection.scalars(names.limit(1000)).all()
        return next(iter(get_close_matches(wrong, [str(name) for name in known if name], 1)), None)

    def paths(self, networks: Iterable[int]) -> dict[int, str]:
        """Network -> path, which begins with the first network on the way that the reader does not lose sight of; that
        of the fabric, or of what the reader does not see, is ''."""
        rows: dict[int, tuple[str, int]] = {}
        wanted = sorted(set(networks))
        for chunk in chunks(wanted):
            found_there = self._connection.execute(_ways(self.scope.reads is None), {"ids": chunk, **self._reads()})
            rows.update({row.id: (row.name, row.carrier) for row in found_there})
        found: dict[int, str] = {FABRIC: ""}
        for network in (*wanted, *rows):
            names, at = [], network
            while at in rows:
                name, at = rows[at]
                names.append(name)
            found[network] = "/".join(reversed(names))
        return found

    # Lists

    def page(
        self, kind: str, network: str | None = None, limit: int = 100, cursor: str | None = None
    ) -> tuple[list[Resource], str | None]:
        """Up to `limit` resources after `cursor`, and the cursor of the next page if there is one."""
        table = TABLES[kind]
        query = select(table.c.id).order_by(table.c.id).limit(limit + 1)
        if kind not in IN_NETWORK or network is None:  # All that is in a network is seen with it.
            query = query.where(self._seen(kind))
        if kind == "network":
            query = query.where(table.c.id != FABRIC)
        if network is not None:
            if kind not in ("network", *IN_NETWORK):
                raise _bad_value(f"a {kind} is in no network: leave the filter out")
            owner = table.c.carrier if kind == "network" else table.c.network
            query = query.where(owner == self.find("network", network))
        if cursor is not None:
            last = self._identity.row(kind, cursor)
            if last is None:
                raise _bad_value("this cursor is not from a list of this kind: begin without one")
            query = query.where(table.c.id > last)
        ids = list(self._connection.scalars(query))
        more = len(ids) > limit
        ids = ids[:limit]
        return self.resources(kind, ids), self._identity.public(kind, ids[-1]) if more else None

    def resources(self, kind: str, ids: Sequence[int]) -> list[Resource]:
        """The resources of these rows, by rising row."""
        makers = {
            "machine": self._machines,
            "tenant": self._tenants,
            "network": self._networks,
            "segment": self._segments,
            "router": self._routers,
            "link": self._links,
            "port": self._ports,
            "policy": self._policies,
        }
        if not ids:
            return []
        c = TABLES[kind].c
        revisions: dict[int, int] = {}
        for chunk in chunks(sorted(ids)):
            revisions.update(
                (r.id, r.revision) for r in self._connection.execute(select(c.id, c.revision).where(c.id.in_(chunk)))
            )
        found = makers[kind](ids)
        for id, resource in zip(sorted(ids), found, strict=True):
            resource["etag"] = self._identity.etag(kind, id, revisions[id])
        return found

    def revision(self, kind: str, id: int) -> int:
        """The last revision that changed an object; a network: anything in it."""
        c = TABLES[kind].c
        return int(self._connection.execute(select(c.revision).where(c.id == id)).scalar_one())

    def _head(self, kind: str, row: int, name: str, path: str) -> Resource:
        return {"id": self._identity.public(kind, row), "kind": kind, "name": name, "path": path}

    def _machines(self, ids: Sequence[int]) -> list[Resource]:
        m, r = tables.machine, tables.report
        query = select(m, r.c.realised, r.c.at, r.c.problems).outerjoin(r).where(m.c.id.in_(ids)).order_by(m.c.id)
        whole = self.scope.reads is None  # Others see that it is there, and how far it is.
        paths = self._paths_of_agents(ids)
        known = machines_on_ports(self._connection, paths)
        addresses = {id: str(machine.address) for id, machine in known.items()}
        mtus = {id: machine.mtu for id, machine in known.items()}
        return [
            {
                **self._head("machine", row.id, *[paths.get(row.id, row.name)] * 2),
                "row": self._number("machine", row.id, row.domain),
                "address": (addresses.get(row.id, row.address)) if whole else None,
                "mtu": mtus.get(row.id, row.mtu),
                "nics": json.loads(row.nics) if whole else [],
                "vlan": asdict(vlan) if whole and (vlan := objects.vlan_of(row)) else None,
                "trunks": json.loads(row.trunks) if whole else {},
                "labels": json.loads(row.labels) if whole else {},
                "fenced": bool(row.fenced),
                "realised": row.realised,
                "reported": self.heard.age(row.id) if self.heard.age(row.id) is not None else age_of(row.at),
                "problems": json.loads(row.problems) if whole and row.problems is not None else [],
            }
            for row in self._connection.execute(query)
        ]

    def _tenants(self, ids: Sequence[int]) -> list[Resource]:
        t, up = tables.tenant, tables.tenant.alias()
        query = select(t, up.c.name.label("up")).outerjoin(up, t.c.parent == up.c.id).where(t.c.id.in_(ids))
        rows = self._connection.execute(query.order_by(t.c.id)).all()
        parents = {row.parent for row in rows}
        seen = set(self._connection.scalars(select(t.c.id).where(t.c.id.in_(parents), self._seen("tenant"))))
        closed = set(self._connection.scalars(tenancy.closed()))
        used = uses(self._connection, ids)
        return [
            {
                **self._head("tenant", row.id, row.name, row.name),
                "parent": row.up if row.parent in seen else None,
                "suspended": row.id in closed,
                "quota": {what: getattr(row, what) for what in QUOTAS},
                "used": {what: used[what][row.name] for what in QUOTAS},
            }
            for row in rows
        ]

    def _networks(self, ids: Sequence[int]) -> list[Resource]:
        rows = objects.networks(self._connection, "id", ids)
        paths = self.paths(ids)
        c = tables.network.c
        versions = {r.id: r.version for r in self._connection.execute(select(c.id, c.version).where(c.id.in_(ids)))}
        stand = self.standings(rows)
        return [
            {
                **self._head("network", row.id, row.name, paths[row.id]),
                "tenant": row.tenant,
                "carrier": paths.get(row.carrier) or None,
                # How what carries it does that is not for whoever does not see that.
                "carriage": "encapsulated" if row.encapsulated and paths.get(row.carrier) else "flat",
                "underlay": row.underlay,
                "mtu": network_mtu(row, stand[row.id][0].left_to(row)),
                "enabled": row.enabled,
                **self._state_of_network(row, paths[row.id], stand[row.id][1]),
                "revision": versions[row.id],
                "labels": json.loads(row.labels),
                "description": row.description,
            }
            for row in rows
        ]

    def _segments(self, ids: Sequence[int]) -> list[Resource]:
        rows = objects.segments(self._connection, "id", ids)
        paths = self.paths(row.network for row in rows)
        gateways = self._gateways(ids)
        return [
            {
                **self._head("segment", row.id, row.name, f"{paths[row.network]}/{row.name}"),
                "network": paths[row.network],
                "cidrs": list(row.cidrs),
                "dns": list(row.dns),
                "transparent": row.transparent,
                "vni": row.vni if self.scope.reads is None else None,
                "vlan": {"id": row.vlan, "on": row.physical} if self.scope.reads is None and row.physical else None,
                "gateways": gateways.get(row.id, []),
                "labels": json.loads(row.labels),
                "description": row.description,
            }
            for row in rows
        ]

    def _routers(self, ids: Sequence[int]) -> list[Resource]:
        rows = objects.routers(self._connection, "id", ids)
        paths = self.paths(row.network for row in rows)
        names = self._names(tables.segment, {segment for row in rows for segment, _ in row.interfaces})
        return [
            {
                **self._head("router", row.id, row.name, f"{paths[row.network]}/{row.name}"),
                "network": paths[row.network],
                "mac": mac_text(row.mac or 0),
                "segments": {names[segment]: list(addresses) for segment, addresses in row.interfaces},
                "labels": json.loads(row.labels),
                "description": row.description,
            }
            for row in rows
        ]

    def _links(self, ids: Sequence[int]) -> list[Resource]:
        rows = objects.links(self._connection, "id", ids)
        paths = self.paths(row.network for row in rows)
        names = self._names(tables.router, {router for row in rows for router in row.between})
        return [
            {
                **self._head("link", row.id, row.name, f"{paths[row.network]}/{row.name}"),
                "network": paths[row.network],
                "between": [names[router] for router in row.between],
                "cost": row.cost,
                "up": row.up,
                "rate": row.rate or None,
                "labels": json.loads(row.labels),
                "description": row.description,
            }
            for row in rows
        ]

    def _ports(self, ids: Sequence[int]) -> list[Resource]:
        rows = objects.ports(self._connection, "id", ids)
        networks = {row.id: row for row in objects.networks(self._connection, "id", sorted({r.network for r in rows}))}
        paths = self.paths(networks)
        segments = {s.id: s for s in objects.segments(self._connection, "id", sorted({r.segment for r in rows}))}
        gateways = self._gateways(list(segments))
        groups = self._names(tables.group, {group for row in rows for group in row.groups})
        places = self.machines_of([row.id for row in rows])
        hosts = self._hosts_of(ids)
        if self.scope.reads is None:
            names = self._names(tables.machine, places.values()) | self._paths_of_agents(places.values())
            seats = {port: names[machine] for port, machine in places.items()}
        else:
            seats = self.seats(ids)
        domains = self._domains(places.values()) if self.scope.reads is None else {}
        moves = self._moves(ids)
        attachments = self._attachments(places)
        behind = sorted({row.trunk for row in rows if row.trunk})
        trunks = {port.id: port for port in objects.ports(self._connection, "id", behind)}
        stand = self.standings(list(networks.values()))
        return [
            {
                **self._head("port", row.id, row.name, f"{paths[row.network]}/{row.name}"),
                "row": self._number("port", row.id, domains.get(places.get(row.id, 0), FABRIC)),
                "network": paths[row.network],
                "segment": segments[row.segment].name,
                "host": hosts[row.id][0],
                "machine": seats[row.id],
                "mac": mac_text(row.mac or 0),
                "addresses": [_with_length(address, segments[row.segment].cidrs) for address in row.addresses],
                "gateways": gateways.get(row.segment, []),
                "mtu": network_mtu(networks[row.network], stand[row.network][0].left_to(networks[row.network]))
                - RIDING_BYTES * segments[row.segment].transparent,
                "owns": list(row.owns),
                "groups": sorted(groups[group] for group in row.groups),
                "hosts": row.hosts,
                "attach": {row.attach.kind: row.attach.name} if row.attach else None,
                "trunk": trunks[row.trunk].name if row.trunk else None,
                "vlan": row.tag or None,
                "rate": row.rate or None,
                "enabled": row.enabled,
                **self._state_of_port(
                    row, networks[row.network], paths[row.network], stand[row.network][1], trunks.get(row.trunk)
                ),
                "attachment": attachments.get(row.id),
                "moving": {**moves[row.id], "other": hosts[row.id][1]} if row.id in moves else None,
                "labels": json.loads(row.labels),
                "description": row.description,
            }
            for row in rows
        ]

    def _number(self, kind: str, row: int, domain: int) -> int | None:
        """What agents of a domain know a row by, if that may be seen."""
        return self._identity.number(kind, row, domain) if self.scope.reads is None else None

    def _domains(self, machines: Iterable[int]) -> dict[int, int]:
        """Machine -> its domain."""
        m = tables.machine.c
        found: dict[int, int] = {}
        for chunk in chunks(sorted(set(machines))):
            rows = self._connection.execute(select(m.id, m.domain).where(m.id.in_(chunk)))
            found.update({row.id: row.domain for row in rows})
        return found

    def _hosts_of(self, ports: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        """Port -> the names of the host that it lives on, and of the other one while it moves."""
        found: dict[int, tuple[str, str | None]] = {}
        for chunk in chunks(sorted(ports)):
            rows = self._connection.execute(_hosts_named(), {"ids": chunk})
            found.update({row.id: (row.here, row.there) for row in rows})
        return found

    def seats(self, ports: Sequence[int]) -> dict[int, str]:
        """Port -> the name of the host that it lives on in the end, as far down as the reader sees."""
        found: dict[int, str] = {}
        for chunk in chunks(sorted(ports)):
            rows = self._connection.execute(_seats(), {"ids": chunk, **self._reads()})
            found.update({row.root: row.name for row in rows})
        return found

    def _paths_of_agents(self, machines: Iterable[int]) -> dict[int, str]:
        """Machine -> the path of the host port that it is on, where it is on one."""
        under = objects.ports_under(self._connection, set(machines))
        ports = objects.ports(self._connection, "id", list(under.values()))
        networks = self.paths({port.network for port in ports})
        paths = {port.id: f"{networks[port.network]}/{port.name}" for port in ports}
        return {machine: paths[port] for machine, port in under.items()}

    def _moves(self, ports: Sequence[int]) -> dict[int, dict[str, Any]]:
        m = tables.move.c
        found: dict[int, dict[str, Any]] = {}
        for chunk in chunks(sorted(ports)):
            rows = self._connection.execute(select(m.port, m.phase, m.problem).where(m.port.in_(chunk)))
            for row in rows:
                # What went wrong has names of machines.
                problem = row.problem if self.scope.reads is None or not row.problem else "it stays where it was"
                found[row.port] = {"phase": row.phase, "problem": problem or None}
        return found

    # How they are

    def standings(self, networks: Sequence[NetworkRow]) -> dict[int, tuple[Chain, Standing]]:
        """What carries these networks, and how they are, by id."""
        return standings(self._connection, self.chains, self.heard, networks)

    def _state_of_network(self, row: NetworkRow, path: str, stand: Standing) -> Resource:
        if not row.enabled:
            return _state("down: disabled", f"network {path} is disabled")
        if stand.closed is not None:
            return _state("down: carrier", self._told(stand.closed))
        if not stand.down:
            return _state("up")
        cause = self._told(stand.down[min(stand.down)])
        if len(stand.down) == len(stand.hosts):
            return _state("down: carrier", cause)
        return _state("degraded", f"{len(stand.down)} of {len(stand.hosts)} hosts are down: {cause}")

    def _state_of_port(
        self, row: PortRow, network: NetworkRow, path: str, stand: Standing, trunk: PortRow | None
    ) -> Resource:
        for one in (row, trunk):
            if one is not None and not one.enabled:
                return _state("down: disabled", f"port {path}/{one.name} is disabled")
        if not network.enabled:
            return _state("down: disabled", f"network {path} is disabled")
        if (cause := stand.down.get(row.host)) is not None:
            return _state("down: carrier", self._told(cause))
        return _state("up")

    def _told(self, cause: Cause) -> str:
        """A cause in words. Of what carriers are that are not in scope it is told that they are the cause, no more."""
        if cause not in self._causes:
            self._causes[cause] = self._words(cause)
        return self._causes[cause]

    def _words(self, cause: Cause) -> str:
        if cause.kind == "machine":
            (name,) = self._names(tables.machine, [cause.id]).values()  # asked whoever reads: see test_alike.py
            if self.scope.reads is not None:
                return "what carries it is down"
            return f"machine {name} " + {LOST: "says nothing", FENCED: "is fenced"}[cause.why]
        if not self.scope.may_read(self.owner(cause.kind, cause.id)):
            return "what carries it is down"
        if cause.kind == "port":
            (port,) = objects.ports(self._connection, "id", [cause.id])
            path = f"{self.paths([port.network])[port.network]}/{port.name}"
            agent = {
                LOST: "says nothing",
                FENCED: "is fenced",
                ABSENT: f"has never been there: `nestnet token join {path}` lets it in",
            }
            return f"the agent on {path} {agent[cause.why]}" if cause.why in agent else f"port {path} is disabled"
        path = self.paths([cause.id])[cause.id]
        if cause.why in (DISABLED, DEPTH):
            return f"network {path} {'is disabled' if cause.why == DISABLED else 'is carried too deep'}"
        (host,) = self._names(tables.port, [cause.port]).values()
        what = {
            "carrier_policy": "no policy allows carriage",
            "carrier_no_route": "there is no path",
            "carrier_ttl": "there is no path that is short enough",
        }[cause.why]
        return f"in network {path} {what} between host {host} and any other in use"

    def _policies(self, ids: Sequence[int]) -> list[Resource]:
        rows = objects.policies(self._connection, "id", ids)
        paths = self.paths(row.network for row in rows)
        found = []
        for row in rows:
            name = self._identity.public("policy", row.id)
            head = self._head("policy", row.id, name, f"{paths[row.network]}/{name}")
            found.append(
                {**head, "network": paths[row.network], "text": policy_words(row.spec), **json.loads(row.spec)}
            )
        return found

    def _names(self, table: Table, ids: Iterable[int]) -> dict[int, str]:
        names: dict[int, str] = {}
        for chunk in chunks(sorted(ids)):
            rows = self._connection.execute(select(table.c.id, table.c.name).where(table.c.id.in_(chunk)))
            names.update({row.id: row.name for row in rows})
        return names

    def _gateways(self, segments: Sequence[int]) -> dict[int, list[str]]:
        """Segment -> gateway addresses of its first router, one of each family: what its workloads use."""
        a = tables.address.c
        found: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        for chunk in chunks(sorted(segments)):
            query = select(a.segment, a.router, a.address).where(a.segment.in_(chunk), a.router.is_not(None))
            for row in self._connection.execute(query.order_by(a.segment, a.router, a.position)):
                found[row.segment][row.router].append(row.address)
        return {
            segment: min(routers.values(), key=lambda own: ranked(map(ip_address, own)))
            for segment, routers in found.items()
        }

    def realised_by_all(self) -> Happened | None:
        """The event that every machine has realised the current revision, unless one has not or it was told before."""
        e, m, r = tables.event.c, tables.machine, tables.report
        n = objects.current_revision(self._connection)
        behind = select(func.count()).select_from(m.outerjoin(r)).where(func.coalesce(r.c.realised, -1) < n)
        if self._connection.scalar(behind):
            return None
        known = self._connection.execute(select(e.kind, e.at).where(e.revision == n)).all()
        if any(row.kind == "realised" for row in known):
            return None
        count = self._connection.scalar(select(func.count()).select_from(m))
        after = min((max(0.0, time.time() - row.at) for row in known), default=None)
        took = f", {after:.2f} s after it was stored" if after is not None else ""
        return Happened("realised", f"all {count} machines have realised revision {n}{took}", revision=n)

    def machines_holding(self, network: int) -> list[str]:
        """The names of the machines that get a network's rows: where its ports live, and those of what it carries."""
        c, p = tables.network.c, tables.port.c
        networks = [network]
        for one in networks:
            networks += self._connection.scalars(select(c.id).where(c.carrier == one)).all()
        ports: list[int] = []
        for chunk in chunks(networks):
            ports += self._connection.scalars(select(p.id).where(p.network.in_(chunk))).all()
        if self.scope.reads is not None:  # To them it is the hosts that were granted.
            return sorted(set(self.seats(ports).values()))
        places = {*self.machines_of(ports).values(), *self.machines_of(ports, other=True).values()}
        return sorted({**self._names(tables.machine, places), **self._paths_of_agents(places)}.values())

    def machines_of(self, ports: Sequence[int], other: bool = False) -> dict[int, int]:
        """Port -> the machine at the bottom of its chain of hosts; `other`: the other one, if something there moves."""
        return objects.machines_of(self._connection, ports, other)

    def _attachments(self, places: dict[int, int]) -> dict[int, Any]:
        """Port -> what the agent of its machine says about it."""
        r = tables.report.c
        wanted = sorted(set(places.values()))
        said: dict[int, dict[str, Any]] = {}
        for chunk in chunks(wanted):
            rows = self._connection.execute(select(r.machine, r.ports).where(r.machine.in_(chunk)))
            said.update({row.machine: json.loads(row.ports) for row in rows})
        found: dict[int, Any] = {}
        for port, machine in places.items():
            found[port] = said.get(machine, {}).get(str(port))
            if (drops := self.heard.drops(machine).get(str(port))) is not None:
                found[port] = {**(found[port] or {}), "drops": self._shown(drops)}
        return found

    def _shown(self, drops: Mapping[str, int]) -> dict[str, int]:
        """Dropped packets by reason; those in carriers by none but that, for whoever does not see all of them."""
        if self.scope.reads is None:
            return dict(drops)
        found: Counter[str] = Counter()
        for reason, packets in drops.items():
            found["carrier" if reason in CARRIERS else reason] += packets
        return dict(found)


def _state(state: str, cause: str | None = None) -> Resource:
    return {"state": state, "cause": cause}


def age_of(at: float | None) -> float | None:
    """Seconds since a time."""
    return max(0.0, round(time.time() - at, 3)) if at is not None else None  # Clocks are set back.


def _bad_value(message: str) -> Invalid:
    return Invalid([Problem("bad_value", "", message)])


def _with_length(address: str, cidrs: Sequence[str]) -> str:
    """10.0.0.2/24"""
    for cidr in cidrs:
        if (":" in cidr) == (":" in address):
            return f"{address}/{ip_network(cidr).prefixlen}"
    return address
