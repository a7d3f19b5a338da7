"""Where ports can live: the machines of the fabric, or in a network the ports that are hosts. One shape for both."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, func, select

from nestnet.model.errors import Invalid, Problem
from nestnet.model.standing import ABSENT, FENCED
from nestnet.model.values import FABRIC
from nestnet.store import tables
from nestnet.store.objects import agents_on, chunks, machines_of
from nestnet.store.objects import ports as ports_by
from nestnet.store.read import Reader, Resource
from nestnet.store.standing import lost_machines


def page(
    connection: Connection, reader: Reader, network: str | None, limit: int, cursor: str | None
) -> tuple[list[Resource], str | None]:
    """Up to `limit` hosts of a network, None: of the fabric, after `cursor`, and the cursor of the next page if there
    is one. What lives on them is counted as far as the reader may see it."""
    if network is None and reader.scope.reads is not None:
        return _granted(connection, reader, limit, cursor)
    kind = "machine" if network is None else "port"
    within = FABRIC if network is None else reader.find("network", network)
    table = tables.machine if network is None else tables.port
    query = select(table.c.id).order_by(table.c.id).limit(limit + 1)
    if network is None:
        query = query.where(tables.machine.c.port.is_(None))
    if network is not None:
        query = query.where(tables.port.c.network == within, tables.port.c.hosts.is_(True))
    if cursor is not None:
        last = reader.row(kind, cursor)
        if last is None:
            message = "this cursor is not from a list of these hosts: begin without one"
            raise Invalid([Problem("bad_value", "", message)])
        query = query.where(table.c.id > last)
    ids = list(connection.scalars(query))
    resources = reader.resources(kind, ids[:limit])
    uses = _uses(connection, reader, within, ids)
    lost = lost_machines(connection, reader.heard)
    items = []
    for id, found in zip(ids[:limit], resources, strict=True):
        networks, ports = uses.get(id, (0, 0))
        how = (found.get("state"), found.get("cause"))
        if network is None:
            how = _of_machine(f"machine {found['name']}", lost.machines.get(id))
        elif how[0] == "up" and id in lost.ports:
            how = _of_machine(f"the agent on {found['path']}", lost.ports[id])
        address = found["address"] if network is None else found["addresses"]
        items.append(
            {
                "id": found["id"],
                "kind": "host",
                "name": found["name"],
                "path": found["path"],
                "network": found.get("network"),
                "addresses": [address] if isinstance(address, str) else address or [],
                "machine": found.get("machine", found["name"]),
                "state": how[0],
                "cause": how[1],
                "networks": networks,
                "ports": ports,
            }
        )
    return items, items[-1]["id"] if len(ids) > limit else None


def _granted(
    connection: Connection, reader: Reader, limit: int, cursor: str | None
) -> tuple[list[Resource], str | None]:
    """The same of the hosts that were granted to the reader: all of one shape, whatever they are."""
    whole = Reader(connection, reader.identity, reader.heard)
    lost = lost_machines(connection, reader.heard)
    items: list[Resource] = []
    for carrier, ids in sorted(reader.granted().items()):
        kind = "machine" if carrier == FABRIC else "port"
        uses = _uses(connection, reader, carrier, sorted(ids))
        for id, found in zip(sorted(ids), whole.resources(kind, sorted(ids)), strict=True):
            gone = lost.machines.get(id) if carrier == FABRIC else lost.ports.get(id)
            up = gone is None and found.get("state", "up") == "up"
            networks, ports = uses.get(id, (0, 0))
            name = found["name"]
            items.append(
                {
                    "id": reader.public("host", id << 1 | (carrier == FABRIC)),
                    "kind": "host",
                    "name": name,
                    "path": name,
                    "network": None,
                    "addresses": [],
                    "machine": name,
                    "state": "up" if up else "down: lost",
                    "cause": None if up else f"host {name} is down",
                    "networks": networks,
                    "ports": ports,
                }
            )
    place = next((place for place, item in enumerate(items, 1) if item["id"] == cursor), 0)
    if cursor is not None and not place:
        raise Invalid([Problem("bad_value", "", "this cursor is not from a list of these hosts: begin without one")])
    page = items[place : place + limit]
    return page, page[-1]["id"] if len(items) > place + limit else None


def realised(connection: Connection, reader: Reader) -> list[Resource]:
    """The hosts that were granted to the reader, with what the machines under them have realised."""
    whole = Reader(connection, reader.identity, reader.heard)
    found = []
    for carrier, ids in sorted(reader.granted().items()):
        at = {id: id for id in ids}
        if carrier != FABRIC:
            at = {**machines_of(connection, sorted(ids)), **agents_on(connection, ids)}
        machines = sorted(set(at.values()))
        under = dict(zip(machines, whole.resources("machine", machines), strict=True))
        names = under if carrier == FABRIC else {port.id: port for port in ports_by(connection, "id", sorted(ids))}
        for id in sorted(ids):
            named = names[id]
            found.append(
                {
                    **under[at[id]],
                    "name": named["name"] if isinstance(named, dict) else named.name,
                    "id": reader.public("host", id << 1 | (carrier == FABRIC)),
                    "address": None,
                    "problems": [],
                }
            )
    return found


def _of_machine(name: str, why: str | None) -> tuple[str, str | None]:
    if why is None:
        return "up", None
    if why == FENCED:
        return "down: disabled", f"{name} is fenced"
    return "down: lost", f"{name} {'has never been there' if why == ABSENT else 'says nothing'}"


def _uses(connection: Connection, reader: Reader, carrier: int, ids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Host -> how many networks have ports there, and how many ports."""
    u, n, t = tables.host_use.c, tables.network.c, tables.tenant.c
    found: dict[int, tuple[int, int]] = {}
    for chunk in chunks(ids):
        query = (
            select(u.host, func.count().label("networks"), func.sum(u.count).label("ports"))
            .join(tables.network, u.network == n.id)
            .where(n.carrier == carrier, u.host.in_(chunk))
            .group_by(u.host)
        )
        if reader.scope.reads is not None:
            seen = select(t.id).where(t.name.in_(sorted(reader.scope.reads)))
            query = query.where(n.tenant.in_(seen))
        found.update({row.host: (row.networks, row.ports) for row in connection.execute(query)})
    return found
