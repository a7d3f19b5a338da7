"""The store: desired state behind a few methods, each one transaction. Threads may share it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from nestnet.model.errors import Conflict, Invalid, Problem
from nestnet.model.manifest import Manifest, to_data
from nestnet.model.validate import SMALLEST_MTU, given_already
from nestnet.model.values import FABRIC, Attach, World
from nestnet.store import feed, numbers, objects, plan, read, tables, write
from nestnet.store.database import Database
from nestnet.store.feed import Batch
from nestnet.store.identity import Identity
from nestnet.store.objects import Fabric, MachineRow
from nestnet.store.plan import Change, Plan
from nestnet.store.read import Resource

KEPT_ANSWERS = 24 * 3600  # Seconds for which a repeated request gets its first answer.
LISTED = 20  # Dependants that an error lists at most.


@dataclass(frozen=True, slots=True)
class Applied:
    """`revision` is where it is stored; machines have realised it when they report that one or a later one."""

    revision: int
    plan: Plan


class Store:
    """Desired state in an SQLite file.

    `vnis` is the size of a domain's VNI space; it counts when the file is made. `changed` is called after
    every commit that machines need to know of, with the revision, in the thread that committed.
    """

    def __init__(self, path: Path | str, *, vnis: int = numbers.VNIS, changed: Callable[[int], None] | None = None):
        self._database = Database(Path(path), vnis)
        self.identity = Identity(self._database.epoch, self._database.key)
        self.changed: Callable[[int], None] = changed or (lambda _revision: None)

    def close(self) -> None:
        self._database.close()

    @property
    def revision(self) -> int:
        with self._database.read() as connection:
            return objects.current_revision(connection)

    # Manifests

    def plan(self, manifest: Manifest, prune: bool = False) -> Plan:
        """What `apply` would do. Raises what `apply` would raise."""
        with self._database.read() as connection:
            return plan.make(connection, manifest, prune).plan

    def apply(self, manifest: Manifest, prune: bool = False, key: str | None = None) -> Applied:
        """Make the networks that the manifest names as it says, in one transaction.

        With `key`, asking again within 24 hours gives the first answer again and does nothing. Raises Invalid,
        Conflict (also for a key that was used for something else) or Exhausted; then nothing is stored.
        """
        request = _digest({"manifest": to_data(manifest), "prune": prune})
        # The comparing is done before the writer's turn comes; it counts if nobody was faster.
        with self._database.read() as connection:
            if (answer := _answered(connection, key, request)) is not None:
                return answer
            work = plan.make(connection, manifest, prune)
        with self._database.write() as connection:
            if (answer := _answered(connection, key, request)) is not None:
                return answer
            before = objects.current_revision(connection)
            if before != work.revision:
                work = plan.make(connection, manifest, prune)
            revision = before
            if work.machines:
                revision = self._move_machines(connection, work.machines)
            if work.pairs or work.tenants:
                revision = write.write(connection, self.identity, work.pairs, work.tenants)
            applied = Applied(revision, work.plan)
            _remember(connection, key, request, applied)
        if revision != before:
            self.changed(revision)
        return applied

    # Machines

    def join(
        self,
        name: str,
        address: str,
        mtu: int = 1500,
        labels: Mapping[str, str] | None = None,
        nics: Sequence[str] = (),
    ) -> Resource:
        """Declare a machine, or change what is known of it. Raises Conflict if another one has the address, Invalid if
        others' are of another family."""
        m = tables.machine
        address = str(ip_address(address))
        with self._database.write() as connection:
            row = connection.execute(select(m).where(m.c.name == name)).first()
            others = [other for other in objects.machines(connection) if other.name != name]
            if other := next((other.name for other in others if other.address == address), None):
                raise Conflict(f"{address} is the address of machine {other} already", "duplicate_address")
            _family_fits(address, others)
            nics_text = json.dumps(list(nics))
            wanted = {"address": address, "mtu": mtu, "nics": nics_text, "labels": objects.dump(labels)}
            before = after = objects.current_revision(connection)
            if row is None or any(getattr(row, field) != value for field, value in wanted.items()):
                id = row.id if row is not None else write.reserve(connection, "machine", 1)
                if row is None:
                    connection.execute(insert(m).values(id=id, name=name, joined=before, **wanted))
                else:
                    connection.execute(update(m).where(m.c.id == id).values(**wanted))
                after = self._machines_changed(connection, [id])
            (resource,) = self._reader(connection).resources(
                "machine", [self._reader(connection).find("machine", name)]
            )
        if after != before:
            self.changed(after)
        return resource

    def _move_machines(self, connection: Connection, machines: Sequence[MachineRow]) -> int:
        """Give machines other addresses, NICs or MTUs, as a plan has judged them. Returns the revision."""
        m = tables.machine
        for row in machines:  # they may exchange addresses
            connection.execute(update(m).where(m.c.id == row.id).values(address=f"away {row.id}"))
        for row in machines:
            values = {"address": row.address, "mtu": row.mtu, "nics": json.dumps(row.nics)}
            connection.execute(update(m).where(m.c.id == row.id).values(**values))
        return self._machines_changed(connection, [row.id for row in machines])

    def _machines_changed(self, connection: Connection, ids: Sequence[int]) -> int:
        """The revision in which machines came, changed or went, and with them perhaps the fabric's MTU and family."""
        rows = [{"network": FABRIC, "kind": "machine", "id": id, **_NOTHING_WAS} for id in ids]
        now = objects.machines(connection)
        was = objects.fabric(connection)
        family = ip_address(now[0].address).version if now else was.family
        fabric = objects.Fabric(min((row.mtu for row in now), default=1500), family)
        if fabric != was:
            _mtu_fits(connection, fabric)
            n = tables.network
            connection.execute(update(n).where(n.c.id == FABRIC).values(mtu=fabric.mtu))
            connection.execute(update(n).where(n.c.carrier == FABRIC).values(underlay=fabric.family))
            networks = connection.scalars(select(n.c.id).where(n.c.id != FABRIC)).all()
            rows += [{"network": network, "kind": "network", "id": network, **_NOTHING_WAS} for network in networks]
        return write.next_revision(connection, rows)

    def report(
        self,
        machine: str,
        revision: int,
        problems: Sequence[str] = (),
        ports: Mapping[str, Any] | None = None,
    ) -> None:
        """An agent has realised `revision`; `ports` is what it says about its ports, by row id. Raises NotFound."""
        r = tables.report
        with self._database.write() as connection:
            id = self._reader(connection).find("machine", machine)
            values = {"realised": revision, "at": time.time(), "problems": json.dumps(list(problems))}
            if ports is not None:
                values["ports"] = json.dumps(dict(ports))
            if connection.execute(update(r).where(r.c.machine == id).values(**values)).rowcount == 0:
                connection.execute(insert(r).values(machine=id, **{"ports": "{}", **values}))

    def status(self) -> dict[str, Any]:
        """The revision, and for each machine what it has realised and how long ago it said so, in seconds."""
        with self._database.read() as connection:
            m = tables.machine.c
            machines = self._reader(connection).resources("machine", list(connection.scalars(select(m.id))))
            fields = ("name", "id", "address", "realised", "reported", "problems")
            return {
                "revision": objects.current_revision(connection),
                "machines": [{field: machine[field] for field in fields} for machine in machines],
            }

    # Resources

    def list(
        self, kind: str, network: str | None = None, limit: int = 100, cursor: str | None = None
    ) -> tuple[list[Resource], str | None]:
        """Up to `limit` resources of a kind, those of one network if it is given, and the next page's cursor."""
        with self._database.read() as connection:
            return self._reader(connection).page(kind, network, limit, cursor)

    def get(self, kind: str, reference: str) -> Resource:
        """One resource by public id, path, or the end of a path that only it has. Raises NotFound or Ambiguous."""
        with self._database.read() as connection:
            reader = self._reader(connection)
            (resource,) = reader.resources(kind, [reader.find(kind, reference)])
            return resource

    def delete(self, kind: str, reference: str) -> int:
        """Delete one object and what is part of it: with a network go its segments, routers, links, ports and policies.
        Returns the revision. Raises Conflict with the dependants if anything else needs it."""
        with self._database.write() as connection:
            before = objects.current_revision(connection)
            id = self._reader(connection).find(kind, reference)
            if dependants := _dependants(connection, self._reader(connection), kind, id):
                listed = ", ".join(dependants[:LISTED]) + (", ..." if len(dependants) > LISTED else "")
                raise Conflict(f"{kind} {reference} is needed by {listed}", "in_use", dependants)
            if kind == "machine":
                connection.execute(delete(tables.machine).where(tables.machine.c.id == id))
                after = self._machines_changed(connection, [id])
                numbers.fence(connection, after)
            elif kind == "tenant":
                connection.execute(delete(tables.tenant).where(tables.tenant.c.id == id))
                after = before
            else:
                after = write.write(connection, self.identity, _with_parts(connection, kind, id))
        if after != before:
            self.changed(after)
        return after

    def set_link(self, reference: str, up: bool) -> tuple[int, Sequence[str], Resource]:
        """Take a link up or down. Returns the revision since which it is so, the names of the machines that get it,
        and the link. Raises NotFound or Ambiguous."""
        with self._database.write() as connection:
            reader = self._reader(connection)
            (row,) = objects.links(connection, "id", [reader.find("link", reference)])
            n = tables.network.c
            before = objects.current_revision(connection)
            if row.up == up:
                after = before
                revision = int(connection.execute(select(n.revision).where(n.id == row.network)).scalar_one())
            else:
                revision = after = write.write(connection, self.identity, [(row, replace(row, up=up))])
            (resource,) = reader.resources("link", [row.id])
            machines = reader.machines_holding(row.network)
        if after != before:
            self.changed(after)
        return revision, machines, resource

    def set_attach(self, reference: str, attach: Attach | None) -> tuple[int, Sequence[str], Resource]:
        """Say what a port's workload hangs on; None: on nothing that was chosen. Returns the revision since which it is
        so, the name of the machine that has to make it so, and the port. Raises NotFound, Ambiguous, or Conflict when
        it is given to another port already."""
        a, n = tables.attachment.c, tables.network.c
        with self._database.write() as connection:
            reader = self._reader(connection)
            (row,) = objects.ports(connection, "id", [reader.find("port", reference)])
            (machine,) = objects.machines_of(connection, [row.id]).values()
            (name,) = [one["name"] for one in reader.resources("machine", [machine])]
            before = objects.current_revision(connection)
            if row.attach == attach:
                after = before
                revision = int(connection.execute(select(n.revision).where(n.id == row.network)).scalar_one())
            else:
                if attach is not None:
                    same = (a.machine == machine) & (a.kind == attach.kind) & (a.name == attach.name)
                    other = connection.scalar(select(a.port).where(same))
                    if other is not None:
                        (path,) = [one["path"] for one in reader.resources("port", [other])]
                        raise Conflict(given_already(attach, name, path), "duplicate_attach")
                revision = after = write.write(connection, self.identity, [(row, replace(row, attach=attach))])
            (resource,) = reader.resources("port", [row.id])
        if after != before:
            self.changed(after)
        return revision, [name], resource

    # The feed

    def machine_row(self, reference: str) -> int:
        """The row id of a machine. Raises NotFound."""
        with self._database.read() as connection:
            return self._reader(connection).find("machine", reference)

    def snapshot_for(self, machine: int) -> Batch:
        """Everything that a machine, by its row id, needs."""
        with self._database.read() as connection:
            return feed.snapshot(connection, machine)

    def changes_since(self, machine: int, revision: int) -> Batch | None:
        """What changed for a machine; None if it has to take a snapshot."""
        with self._database.read() as connection:
            return feed.changes(connection, machine, revision)

    # For trace

    def world(self, port: str) -> tuple[World, int, dict[tuple[str, int], str]]:
        """All that decides what happens to a port's packets: the values, the port's row id, and names by
        (kind, id), paths for ports."""
        with self._database.read() as connection:
            reader = self._reader(connection)
            id = reader.find("port", port)
            return feed.world(connection, id), id, _names(connection, reader)

    def _reader(self, connection: Connection) -> read.Reader:
        return read.Reader(connection, self.identity)


_NOTHING_WAS = {"was_machine": None, "was_port": None, "was_carrier": None}


def _digest(request: Any) -> str:
    return sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _answered(connection: Connection, key: str | None, request: str) -> Applied | None:
    """The first answer to a request that was asked before."""
    if key is None:
        return None
    i = tables.idempotency.c
    row = connection.execute(select(i.request, i.answer).where(i.tenant == "", i.key == key)).first()
    if row is None:
        return None
    if row.request != request:
        raise Conflict("this idempotency key was used for another request: use a new one", "key_reused")
    data = json.loads(row.answer)
    changes = tuple(Change(**change) for change in data["plan"]["changes"])
    return Applied(data["revision"], Plan(changes, tuple(data["plan"]["disturbs"]), tuple(data["plan"]["machines"])))


def _remember(connection: Connection, key: str | None, request: str, applied: Applied) -> None:
    if key is None:
        return
    i = tables.idempotency
    now = time.time()
    connection.execute(delete(i).where(i.c.at < now - KEPT_ANSWERS))
    answer = json.dumps(asdict(applied))
    connection.execute(insert(i).values(tenant="", key=key, request=request, answer=answer, at=now))


def _family_fits(address: str, others: Sequence[MachineRow]) -> None:
    """Refuse a machine that the others could not reach."""
    version = ip_address(address).version
    for other in others[:1]:
        if ip_address(other.address).version != version:
            message = f"{address} is IPv{version}, unlike {other.address} of {other.name}: "
            message += "machines reach each other over one family"
            raise Invalid([Problem("mixed_families", "/address", message)])


def _mtu_fits(connection: Connection, fabric: Fabric) -> None:
    """Refuse a machine that would leave some network too little (rule 9)."""
    n, s, c = tables.network.c, tables.segment.c, tables.segment_cidr.c
    left, overhead = fabric.left, fabric.mtu - fabric.left
    family = connection.scalar(select(func.max(c.family)))
    least = SMALLEST_MTU[family] if family is not None else 0
    chosen = connection.execute(
        select(n.name, n.mtu).where(n.id != FABRIC, n.mtu > left).order_by(n.mtu.desc()).limit(1)
    ).first()
    said = f"an MTU of {fabric.mtu} leaves {left} for networks"
    if chosen is not None:
        message = f"{said}, but {chosen.name} has chosen {chosen.mtu}"
        raise Invalid([Problem("mtu_too_small", "/mtu", message, limit=chosen.mtu + overhead)])
    if left < least:
        name = connection.scalar(
            select(s.name).join(tables.segment_cidr, c.segment == s.id).where(c.family == family).limit(1)
        )
        message = f"{said}, but segment {name} needs {least}"
        raise Invalid([Problem("mtu_too_small", "/mtu", message, limit=least + overhead)])


def _dependants(connection: Connection, reader: read.Reader, kind: str, id: int) -> list[str]:
    """Paths of what would have nothing to stand on."""
    t = tables
    found: list[tuple[str, int, str]] = []  # kind, network, name

    def ask(kind: str, table: Any, where: Any, network: Any) -> None:
        query = select(table.c.name, network.label("network")).where(where).order_by(table.c.id)
        found.extend((kind, row.network, row.name) for row in connection.execute(query))

    policies: list[int] = []
    match kind:
        case "machine":
            ask("port", t.port, t.port.c.host_machine == id, t.port.c.network)
        case "tenant":
            ask("network", t.network, t.network.c.tenant == id, t.network.c.carrier)
            children = connection.scalars(select(t.tenant.c.name).where(t.tenant.c.parent == id)).all()
            return [f"tenant {name}" for name in children] + _written(found, reader)
        case "network":
            ask("network", t.network, (t.network.c.carrier == id) & (t.network.c.id != FABRIC), t.network.c.carrier)
        case "segment":
            ask("port", t.port, t.port.c.segment == id, t.port.c.network)
            joined = select(t.router_interface.c.router).where(t.router_interface.c.segment == id)
            ask("router", t.router, t.router.c.id.in_(joined), t.router.c.network)
            policies = _policies_naming(connection, t.segment, "segment", id)
        case "router":
            ask("link", t.link, (t.link.c.router == id) | (t.link.c.other == id), t.link.c.network)
        case "port":
            ask("port", t.port, t.port.c.host_port == id, t.port.c.network)
            policies = _policies_naming(connection, t.port, "port", id)
            for group in connection.scalars(select(t.port_group.c.group).where(t.port_group.c.port == id)).all():
                members = select(func.count()).where(t.port_group.c.group == group)
                if connection.scalar(members) == 1:  # Nobody would be left in it.
                    policies += _policies_naming(connection, t.group, "group", group)
    named = [resource["path"] for resource in reader.resources("policy", sorted(set(policies)))]
    return _written(found, reader) + [f"policy {path}" for path in named]


def _written(found: Sequence[tuple[str, int, str]], reader: read.Reader) -> list[str]:
    paths = reader.paths(network for _, network, _ in found)
    return [f"{kind} {'/'.join(part for part in (paths[network], name) if part)}" for kind, network, name in found]


def _policies_naming(connection: Connection, table: Any, kind: str, id: int) -> list[int]:
    network = connection.scalar(select(table.c.network).where(table.c.id == id))
    rows = objects.policies(connection, "network", [network]) if network is not None else []
    return [row.id for row in rows if any((s.kind, s.id) == (kind, id) for s in (*row.sources, *row.targets))]


def _with_parts(connection: Connection, kind: str, id: int) -> list[plan.Pair]:
    """The pairs that delete an object with what is part of it."""
    if kind == "network":
        parts = reversed([*objects.networks(connection, "id", [id]), *objects.load_contents(connection, [id])[id]])
        return [(row, None) for row in parts]
    loaders: dict[str, Callable[[Connection, str, Sequence[int]], Sequence[objects.Row]]] = {
        "segment": objects.segments,
        "router": objects.routers,
        "link": objects.links,
        "port": objects.ports,
        "policy": objects.policies,
    }
    pairs: list[plan.Pair] = [(row, None) for row in loaders[kind](connection, "id", [id])]
    for row, _ in list(pairs):
        if isinstance(row, objects.PortRow):
            members = tables.port_group.c
            others = select(members.group).where(members.group.in_(row.groups), members.port != id)
            kept = set(connection.scalars(others))
            pairs += [(group, None) for group in objects.groups(connection, "id", sorted(set(row.groups) - kept))]
    return pairs


def _names(connection: Connection, reader: read.Reader) -> dict[tuple[str, int], str]:
    names: dict[tuple[str, int], str] = {}
    t = tables
    for kind in ("machine", "group", "segment", "router", "link"):
        table = t.metadata.tables[kind]
        names.update({(kind, row.id): row.name for row in connection.execute(select(table.c.id, table.c.name))})
    paths = reader.paths(connection.scalars(select(t.network.c.id)))
    names.update({("network", id): path for id, path in paths.items()})
    ports = connection.execute(select(t.port.c.id, t.port.c.network, t.port.c.name))
    names.update({("port", row.id): f"{paths[row.network]}/{row.name}" for row in ports})
    policies = connection.execute(select(t.policy.c.id, t.policy.c.spec))
    names.update({("policy", row.id): plan.policy_words(row.spec) for row in policies})
    return names
