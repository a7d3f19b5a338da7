"""Where ports can live: the machines of the fabric, or in a network the ports that are hosts. One shape for both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from sqlalchemy import BindParameter, Connection, Select, bindparam, func, literal, select, true, union_all

from nestnet.model.errors import Invalid, Problem
from nestnet.model.standing import ABSENT, FENCED
from nestnet.model.values import FABRIC
from nestnet.store import host_use, tables
from nestnet.store.objects import IDS
from nestnet.store.objects import network as network_by
from nestnet.store.read import Reader, Resource, age_of
from nestnet.store.standing import lost_machines

PORTS: BindParameter[Any] = bindparam("ports", expanding=True)


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
    uses = host_use.uses(connection, within, ids, reader.scope.reads)
    lost = lost_machines(connection, reader.heard, *((ids,) if network is None else ((), ids)))
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
    items: list[Resource] = []
    for carrier, ids in sorted(reader.granted().items()):
        uses = host_use.uses(connection, carrier, ids, reader.scope.reads)
        for id, (name, up) in _standing(connection, reader, carrier, sorted(ids)).items():
            networks, ports = uses.get(id, (0, 0))
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
    found = []
    for carrier, ids in sorted(reader.granted().items()):
        for row in connection.execute(_reports(), _these(carrier, ids)):
            age = reader.heard.age(row.machine)
            found.append(
                {
                    "id": reader.public("host", row.id << 1 | (carrier == FABRIC)),
                    "name": row.name,
                    "address": None,
                    "fenced": bool(row.fenced),
                    "realised": row.realised,
                    "reported": age if age is not None else age_of(row.at),
                    "problems": [],
                }
            )
    return found


@cache
def _reports() -> Select[Any]:
    """Of each of these hosts, machines and ports, the name, the machine that speaks for it, and what that said last."""
    m, r, p = tables.machine, tables.report, tables.port
    below, own, on = p.alias(), m.alias(), m.alias()
    machines = select(own.c.id, own.c.name, own.c.id.label("machine"), literal(0).label("port")).where(
        own.c.id.in_(IDS)
    )
    ports = select(p.c.id, p.c.name, p.c.host_machine, p.c.host_port).where(p.c.id.in_(PORTS))
    walk = select(union_all(machines, ports).subquery()).cte(recursive=True)
    deeper = select(walk.c.id, walk.c.name, below.c.host_machine, below.c.host_port)
    walk = walk.union_all(deeper.where(walk.c.machine.is_(None), below.c.id == walk.c.port))
    speaks = (on.c.port == walk.c.id) & walk.c.id.in_(PORTS)
    query = select(walk.c.id, walk.c.name, m.c.id.label("machine"), m.c.fenced, r.c.realised, r.c.at)
    query = query.select_from(walk.outerjoin(on, speaks))
    query = query.join(m, m.c.id == func.coalesce(on.c.id, walk.c.machine)).outerjoin(r, r.c.machine == m.c.id)
    return query.where(walk.c.machine.is_not(None)).order_by(walk.c.id)


def _standing(connection: Connection, reader: Reader, carrier: int, ids: Sequence[int]) -> dict[int, tuple[str, bool]]:
    """Host -> its name, and whether it is up, of these hosts of a carrier. The fabric is asked whatever other carriers
    are: how long the answer takes is not to tell which it is."""
    gone = lost_machines(connection, reader.heard, *((ids,) if carrier == FABRIC else ((), ids)))
    lost = gone.machines if carrier == FABRIC else gone.ports
    network = network_by(connection, carrier)
    _, stand = reader.standings([network])[network.id]
    return {
        row.id: (row.name, bool(row.enabled and network.enabled and row.host not in stand.down and row.id not in lost))
        for row in connection.execute(_named(), _these(carrier, ids))
    }


@cache
def _named() -> Select[Any]:
    """The name of each of these hosts, machines and ports, whether it is enabled, and what it lives on."""
    p, m = tables.port, tables.machine
    trunk, on = p.alias(), m.alias()
    enabled = (p.c.enabled & func.coalesce(trunk.c.enabled, true())).label("enabled")
    host = func.coalesce(p.c.host_port, on.c.port, p.c.host_machine).label("host")
    ports = select(p.c.id, p.c.name, enabled, host).where(p.c.id.in_(PORTS))
    ports = ports.outerjoin(trunk, trunk.c.id == p.c.trunk).outerjoin(on, on.c.id == p.c.host_machine)
    machines = select(m.c.id, m.c.name, true().label("enabled"), m.c.id.label("host")).where(m.c.id.in_(IDS))
    both = union_all(machines, ports).subquery()
    return select(both).order_by(both.c.id)


def _these(carrier: int, ids: Iterable[int]) -> dict[str, list[int]]:
    """The hosts of a carrier, for a statement that takes machines and ports."""
    machines, ports = (ids, ()) if carrier == FABRIC else ((), ids)
    return {"ids": sorted(machines), "ports": sorted(ports)}


def _of_machine(name: str, why: str | None) -> tuple[str, str | None]:
    if why is None:
        return "up", None
    if why == FENCED:
        return "down: disabled", f"{name} is fenced"
    return "down: lost", f"{name} {'has never been there' if why == ABSENT else 'says nothing'}"
