"""The store: desired state behind a few methods, each one transaction. Threads may share it."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Select, bindparam, delete, func, insert, select, true, update

from nestnet.model.canonical import labels_text
from nestnet.model.errors import Conflict, DiskFull, Forbidden, Invalid, NotFound, Problem, Stale, Unreachable
from nestnet.model.manifest import Manifest, to_data
from nestnet.model.validate import SMALLEST_MTU, given_already, two_ways
from nestnet.model.values import FABRIC, Attach, Tag, Value, World
from nestnet.store import (
    access,
    backup,
    carriage,
    deletion,
    events,
    feed,
    grants,
    heard,
    hosts,
    moves,
    numbers,
    objects,
    once,
    plan,
    read,
    still,
    tables,
    tenancy,
    view,
    watch,
    write,
)
from nestnet.store.create import Answer, Job, job, make_each
from nestnet.store.database import Database
from nestnet.store.events import Happened
from nestnet.store.feed import Batch, Touched
from nestnet.store.heard import Heard
from nestnet.store.identity import Identity
from nestnet.store.objects import Fabric, GrantRow, MachineRow, NetworkRow, PortRow
from nestnet.store.once import Asked
from nestnet.store.plan import Change, Plan, TenantWish, Work
from nestnet.store.quotas import QUOTAS, Quota
from nestnet.store.read import Resource
from nestnet.store.scope import EVERYTHING, NOTHING, Scope
from nestnet.store.sharing import GrantWish
from nestnet.store.standing import Chains
from nestnet.store.watch import Changes

LISTED = 20  # Dependants that the text of an error lists at most; the error itself has DEPENDANTS.
DEPENDANTS = 1000
NOBODY = Asked()
NO_QUOTA = Quota()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Applied:
    """`revision` is where it is stored; machines have realised it when they report that one or a later one."""

    revision: int
    plan: Plan


class Around(NamedTuple):
    """What a packet of a port may meet: the values, the port's row id, names by (kind, id), paths for ports, and the
    lowest network under it that the reader sees, and all down to it; None: down to the wire, and the wire, too."""

    world: World
    port: int
    names: dict[tuple[str, int], str]
    floor: int | None


class Store:
    """Desired state in an SQLite file.

    `vnis` is the size of a domain's VNI space, `vlans` that of a physical network; they count when the file is made.
    `changed` is called after every commit
    that machines need to know of, with the revision, in the thread that committed; `happened` after every commit that
    wrote events.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        vnis: int = numbers.VNIS,
        vlans: int = numbers.VLANS,
        changed: Callable[[int], None] | None = None,
    ):
        self._database = Database(Path(path), vnis, vlans)
        self.identity = Identity(self._database.epoch, self._database.key)
        self.changed: Callable[[int], None] = changed or (lambda _revision: None)
        self.happened: Callable[[], None] = lambda: None
        with self._database.read() as connection:
            # May agents remove whatever this store does not know? After a restore, when somebody says so.
            self.confirmed = bool(connection.scalar(select(tables.store.c.confirmed)))
            self._moving = moves.is_any(connection)
        self.heard = Heard()
        self._chains = Chains(self._database.read)
        self._reports: dict[int, str] = {}  # Machine -> what of its last report is stored.

    def close(self) -> None:
        self._database.close()

    @property
    def folder(self) -> Path:
        """Where the file is."""
        return self._database.path.parent

    @property
    def revision(self) -> int:
        with self._database.read() as connection:
            return objects.current_revision(connection)

    def _change(self, asked: Asked, request: Any, work: Callable[[Connection], Any]) -> Any:
        """What `work` answers, which JSON can say, or what it answered when this was first asked for."""
        wanted = once.digest(request)

        def turn(connection: Connection) -> Any:
            if (said := once.claim(connection, asked, wanted)) is not None:
                return said
            answer = work(connection)
            once.keep(connection, asked, answer)
            return answer

        return self._committed(turn)

    def _committed(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, in one transaction; whoever has to know of a new revision is told."""

        def turn(connection: Connection) -> tuple[T, int, int]:
            before = objects.current_revision(connection)
            answer = work(connection)
            return answer, before, objects.current_revision(connection)

        answer, before, after = self._database.transact(turn)
        if after != before:
            self.changed(after)
            self.happened()
            self._changed_since(before)
        return answer

    def _changed_since(self, revision: int) -> None:
        """What is remembered is read anew. It is stored by now: what cannot be read is, when somebody asks for it."""
        with contextlib.suppress(DiskFull, Unreachable):
            with self._database.read() as connection:
                networks = set(connection.scalars(_changed_after(), {"revision": revision}))
                still.changed(connection, networks)
            self._chains.changed(networks)

    # Manifests

    def plan(self, manifest: Manifest, prune: bool = False, scope: Scope = EVERYTHING) -> Plan:
        """What `apply` would do. Raises what `apply` would raise."""
        with self._database.read() as connection:
            work = plan.make(connection, manifest, prune, scope)
            return replace(work.plan, etag=self.identity.seal(work.revision, "plan"))

    def apply(self, manifest: Manifest, prune: bool = False, asked: Asked = NOBODY) -> Applied:
        """Make the networks that the manifest names as it says, in one transaction.

        With a key, asking again within 24 hours gives the first answer again and does nothing. With ETags, of a plan
        or of the one network that the manifest names, it raises Stale if a network concerned has changed since. Raises
        Invalid, Conflict (also for a key that was used for something else) or Exhausted; then nothing is stored.
        """
        request = {"manifest": to_data(manifest), "prune": prune}
        # The comparing is done before the writer's turn comes; it counts if nobody was faster.
        with self._database.read() as connection:
            if (said := once.said(connection, asked, once.digest(request))) is not None:
                return _applied(said)
            planned = plan.make(connection, manifest, prune, asked.scope)

        def turn(connection: Connection) -> Any:
            before = objects.current_revision(connection)
            work = planned if before == planned.revision else plan.make(connection, manifest, prune, asked.scope)
            self._unchanged(connection, asked, work)
            revision = before
            if work.machines:
                revision = self._move_machines(connection, work.machines)
            if work.pairs or work.tenants:
                revision = write.write(connection, self.identity, work.pairs, work.tenants)
            if work.grants:
                self._share(connection, asked, work.grants)
                revision = write.next_revision(connection, [])
            if revision != before:
                events.changed(connection, asked.who, "apply", revision, work.audited)
            etag = self.identity.seal(revision, "plan", asked.once)
            return asdict(Applied(revision, replace(work.plan, etag=etag)))

        return _applied(self._change(asked, request, turn))

    def create(self, lines: Sequence[bytes], asked: Asked = NOBODY, first_line: int = 1) -> Answer:
        """Make new networks, all of these or none: a line of JSON is a network as a file has it, with its `name`, and
        its `carrier` unless the wire carries it, or what was granted. Problems point to lines, by numbers from
        `first_line`. Raises what apply raises, and Conflict for a network that is there."""
        (answer,) = self.create_each([job(lines, asked, first_line)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def create_each(self, jobs: Sequence[Job]) -> Sequence[Answer | Exception]:
        """The same for several who want something at once. Each has an answer, or what it would raise."""
        return make_each(self._committed, self.identity, jobs)

    def _unchanged(self, connection: Connection, asked: Asked, work: Work) -> None:
        """Raise Stale unless all that the plan looked at, as far as who asks may see it, is as it was for one of the
        ETags."""
        if asked.etags is None or "*" in asked.etags:
            return
        c, g, t = tables.network.c, tables.change.c, tables.tenant.c
        reads = asked.scope.reads
        theirs = c.tenant.in_(select(t.id).where(t.name.in_(sorted(reads)))) if reads is not None else true()
        oldest = connection.scalar(select(tables.revision.c.oldest)) or 0
        moved = {
            row.id: row.revision
            for chunk in objects.chunks(sorted(work.networks))
            for row in connection.execute(select(c.id, c.revision).where(c.id.in_(chunk), theirs))
        }
        m = tables.machine.c
        machines = {
            row.name: row.revision
            for row in connection.execute(
                select(m.name, m.revision).where(m.id.in_([machine.id for machine in work.machines]))
            )
        }
        since = work.revision
        for etag in asked.etags:
            seen = self.identity.unseal(etag, "plan")
            if seen is not None and oldest <= seen <= work.revision:
                since = min(since, seen)
                # A network that is gone is in nobody's list; its change says what carried it.
                carriers = (*work.networks, FABRIC)
                gone = select(g.id).where(g.revision > seen, g.kind == "network", g.was_carrier.in_(carriers))
                if reads is not None:
                    gone = gone.where(g.was_tenant.in_(sorted(reads)))
                there = select(c.id).where(c.carrier == g.was_carrier)
                fewer = connection.scalar(select(func.count()).select_from(gone.where(g.id.not_in(there)).subquery()))
                if all(revision <= seen for revision in (*moved.values(), *machines.values())) and not fewer:
                    return
            elif len(moved) == 1:
                ((id, revision),) = moved.items()
                if etag == self.identity.etag("network", id, revision):
                    return
        reader = self._reader(connection)
        paths = reader.paths(id for id, revision in moved.items() if revision > since)
        shown = self._reader(connection, asked.scope).paths(paths)
        known = access.known_to(connection, asked)
        changes = [
            one.replace(path, shown[id])
            for id, path in paths.items()
            if path and shown[id]
            for one in events.what_changed(connection, "network", path, since, known)
        ]
        for name in (name for name, revision in machines.items() if revision > since):
            changes += events.what_changed(connection, "machine", name, since)
        what = f": {changes[0]}" if changes else ""
        raise Stale(f"something of this has changed since it was looked at{what}; plan again", changes)

    # Machines

    def join(
        self,
        name: str,
        address: str,
        mtu: int = 1500,
        labels: Mapping[str, str] | None = None,
        nics: Sequence[str] = (),
        vlan: Tag | None = None,
        trunks: Mapping[str, str] | None = None,
        asked: Asked = NOBODY,
    ) -> Resource:
        """Declare a machine, or change what is known of it. `trunks` None: as they were. Raises Conflict if another
        one has the address, or ports need a trunk that it would lose, Invalid if others' are of another family, or a
        trunk is a way to the underlay."""
        what = {"join": name, "address": str(ip_address(address)), "mtu": mtu, "nics": list(nics), "vlan": str(vlan)}
        what |= {"trunks": dict(trunks)} if trunks is not None else {}
        resource: Resource = self._change(
            asked,
            {**what, "labels": dict(labels or {})},
            lambda connection: self._join(connection, asked, name, address, mtu, labels, nics, vlan, trunks),
        )
        return resource

    def _join(
        self,
        connection: Connection,
        asked: Asked,
        name: str,
        address: str,
        mtu: int,
        labels: Mapping[str, str] | None,
        nics: Sequence[str],
        vlan: Tag | None,
        trunks: Mapping[str, str] | None,
    ) -> Resource:
        m = tables.machine
        address = str(ip_address(address))
        wanted = {"address": address, "mtu": mtu, "nics": json.dumps(list(nics)), "labels": labels_text(labels)}
        wanted |= objects.vlan_columns(vlan)
        row = connection.execute(select(m).where(m.c.name == name)).first()
        if row is not None:
            self._fresh(connection, asked, "machine", row.id)
        elif asked.etags is not None:
            raise Stale(f"machine {name} is not there (any more)")
        if row is not None and row.port is not None:
            raise Conflict(f"{name} is on a port: what it is follows from that", "on_a_port")
        known = {each.name: each for each in objects.machines(connection)}
        old = known.pop(name, None)
        others = list(known.values())
        if other := next((other.name for other in others if other.address == address), None):
            raise Conflict(f"{address} is the address of machine {other} already", "duplicate_address")
        _family_fits(address, others)
        had = old.trunks if old is not None else ()
        ways = tuple(sorted(trunks.items())) if trunks is not None else had
        if problems := list(two_ways(name, nics, dict(ways))):
            raise Invalid(problems)
        if old is not None:
            plan.trunks_unused(connection, old, ways)
        if ways != had:
            wanted["trunks"] = json.dumps(dict(ways))
        fields = {
            key: [getattr(row, key, None), value]
            for key, value in wanted.items()
            if row is None or getattr(row, key) != value
        }
        if fields:
            id = row.id if row is not None else write.reserve(connection, "machine", 1)
            if row is None:
                joined = objects.current_revision(connection)
                connection.execute(insert(m).values(id=id, name=name, joined=joined, **wanted))
            else:
                connection.execute(update(m).where(m.c.id == id).values(**wanted))
            after = self._machines_changed(connection, [id])
            change = Change("+" if row is None else "~", "machine", name, fields)
            events.changed(connection, asked.who, "join", after, [change])
        reader = self._reader(connection)
        (resource,) = reader.resources("machine", [reader.find("machine", name)])
        return resource

    def _move_machines(self, connection: Connection, machines: Sequence[MachineRow]) -> int:
        """Give machines other addresses, NICs, MTUs or VLANs, as a plan has judged them. Returns the revision."""
        m = tables.machine
        for row in machines:  # they may exchange addresses
            connection.execute(update(m).where(m.c.id == row.id).values(address=f"away {row.id}"))
        for row in machines:
            values = {"address": row.address, "mtu": row.mtu, "nics": json.dumps(row.nics)}
            values |= {**objects.vlan_columns(row.vlan), "trunks": json.dumps(dict(row.trunks))}
            connection.execute(update(m).where(m.c.id == row.id).values(**values))
        return self._machines_changed(connection, [row.id for row in machines])

    def _machines_changed(self, connection: Connection, ids: Sequence[int]) -> int:
        """The revision in which machines came, changed or went, and with them perhaps the fabric's MTU and family."""
        rows = [{"network": FABRIC, "kind": "machine", "id": id, **write.NOTHING_WAS} for id in ids]
        now = objects.machines(connection)
        was = objects.fabric(connection)
        family = ip_address(now[0].address).version if now else was.family
        fabric = objects.Fabric(min((row.mtu for row in now), default=1500), family)
        if fabric != was:
            _mtu_fits(connection, fabric)
            n = tables.network
            connection.execute(update(n).where(n.c.id == FABRIC).values(mtu=fabric.mtu))
            _domains_fit(connection)
            connection.execute(update(n).where(n.c.carrier == FABRIC).values(underlay=fabric.family))
            networks = connection.scalars(select(n.c.id).where(n.c.id != FABRIC)).all()
            rows += [
                {"network": network, "kind": "network", "id": network, **write.NOTHING_WAS} for network in networks
            ]
        return write.next_revision(connection, rows)

    def report(
        self,
        machine: str,
        revision: int,
        problems: Sequence[str] = (),
        ports: Mapping[str, Any] | None = None,
        noticed: Sequence[tuple[str, str]] = (),
        asked: Asked = NOBODY,
    ) -> None:
        """An agent has realised `revision`; `ports` is what it says about its ports, by row id, and `noticed` what
        happened, (kind, text): written once for a key. Raises NotFound.

        Only news is written: that the machine is there and what it drops is kept in memory."""
        with self._database.read() as connection:
            id = self._reader(connection).find("machine", machine)
        stored, drops = heard.split(ports) if ports is not None else (None, None)
        back = self.heard.say(id, drops)
        told = [Happened(kind, text, machine) for kind, text in noticed[: events.TOLD] if kind in events.MACHINE_KINDS]
        news = [Happened("back", f"{machine} speaks again", machine)] if back else []
        said = json.dumps([revision, list(problems)])
        known = self._reports.get(id, "")
        what = json.dumps(stored) if stored is not None else known.partition("\n")[2]
        if not told and not news and known == f"{said}\n{what}":
            return

        request = once.digest({"report": machine, "noticed": [list(one) for one in noticed]})

        def turn(connection: Connection) -> None:
            again = told and once.claim(connection, asked, request) is not None
            self._write_report(connection, id, revision, problems, stored, [*([] if again else told), *news])
            if told:
                once.keep(connection, asked, True)

        self._database.transact(turn)
        self._reports[id] = f"{said}\n{what}"
        self.happened()
        self._advance()

    def _write_report(
        self,
        connection: Connection,
        id: int,
        revision: int,
        problems: Sequence[str],
        ports: Mapping[str, Any] | None,
        news: Sequence[Happened],
    ) -> None:
        r = tables.report
        reader = self._reader(connection)
        name = connection.scalar(select(tables.machine.c.name).where(tables.machine.c.id == id))
        if name is None:
            return  # It was deleted just now.
        row = connection.execute(select(r.c.realised, r.c.problems).where(r.c.machine == id)).first()
        before = json.loads(row.problems) if row is not None else []
        values = {"realised": revision, "at": time.time(), "problems": json.dumps(list(problems))}
        if ports is not None:
            values["ports"] = json.dumps(dict(ports))
        if connection.execute(update(r).where(r.c.machine == id).values(**values)).rowcount == 0:
            connection.execute(insert(r).values(machine=id, **{"ports": "{}", **values}))
        found = list(news)
        found += [Happened("problem", f"{name}: {text}", name) for text in problems if text not in before]
        found += [Happened("solved", f"{name}: no longer: {text}", name) for text in before if text not in problems]
        if (row is None or row.realised != revision) and (told := reader.realised_by_all()) is not None:
            found.append(told)
        events.happened(connection, found[: events.TOLD])

    def look_around(self) -> None:
        """Notice machines that have fallen silent, and what has run out. Called every few seconds by whoever runs the
        store."""
        self._advance()
        self._end_grants()
        late = self.heard.fallen_silent()
        if not late:
            return
        m = tables.machine.c

        def turn(connection: Connection) -> None:
            names = {row.id: row.name for row in connection.execute(select(m.id, m.name).where(m.id.in_(late)))}
            for machine in set(late) - names.keys():
                self.heard.forget(machine)
            silent = f"has said nothing for {heard.SILENT:.0f} s: what it forwards it forwards on"
            events.happened(connection, [Happened("silent", f"{name} {silent}", name) for name in names.values()])

        self._database.transact(turn)
        self.happened()

    def status(self, scope: Scope = EVERYTHING, since: int | None = None) -> dict[str, Any]:
        """For each machine what it has realised, how long ago it said so, in seconds, and whether it is `current`: has
        realised the revision `since`, None: all that the reader may see. To those who do not see machines it is the
        hosts that were granted to them, and no revision: that counts what others change."""
        with self._database.read() as connection:
            m, n = tables.machine.c, tables.network.c
            reader = self._reader(connection, scope)
            if scope.reads is None:
                machines = reader.resources("machine", list(connection.scalars(select(m.id))))
                last = objects.current_revision(connection)
            else:
                machines = hosts.realised(connection, reader)
                theirs = select(tables.tenant.c.id).where(tables.tenant.c.name.in_(sorted(scope.reads)))
                last = connection.scalar(select(func.max(n.revision)).where(n.tenant.in_(theirs))) or 0
            wanted = last if since is None else since
            fields = ("name", "id", "address", "fenced", "realised", "reported", "problems")
            shown = []
            for machine in machines:
                done = machine["realised"]
                told = {field: machine[field] for field in fields}
                told |= {"current": done is not None and done >= wanted}
                shown.append(told if scope.reads is None else {**told, "realised": None})
            return {"revision": last if scope.reads is None else None, "time": time.time(), "machines": shown}

    # Resources

    def list(
        self,
        kind: str,
        network: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
        scope: Scope = EVERYTHING,
    ) -> tuple[list[Resource], str | None]:
        """Up to `limit` resources of a kind, those of one network if it is given, and the next page's cursor."""
        with self._database.read() as connection:
            return self._reader(connection, scope).page(kind, network, limit, cursor)

    def hosts(
        self, network: str | None = None, limit: int = 100, cursor: str | None = None, scope: Scope = EVERYTHING
    ) -> tuple[Sequence[Resource], str | None]:
        """Up to `limit` hosts of a network, None: of the fabric, and the next page's cursor. Raises NotFound."""
        with self._database.read() as connection:
            return hosts.page(connection, self._reader(connection, scope), network, limit, cursor)

    def get(self, kind: str, reference: str, scope: Scope = EVERYTHING) -> Resource:
        """One resource by public id, path, or the end of a path that only it has. Raises NotFound or Ambiguous."""
        with self._database.read() as connection:
            reader = self._reader(connection, scope)
            (resource,) = reader.resources(kind, [reader.find(kind, reference)])
            return resource

    def get_own(self, machine: str) -> Resource:
        """What a machine is told of itself: that it is there, and what its feed has it by. Raises NotFound."""
        with self._database.read() as connection:
            return self._own(connection, machine)

    def _own(self, connection: Connection, machine: str) -> Resource:
        reader = self._reader(connection, NOTHING)
        row = self._reader(connection).find("machine", machine)
        (resource,) = reader.resources("machine", [row])
        number = self.identity.number("machine", row, feed.domain_of(connection, row))
        return {**resource, "name": machine, "path": machine, "row": number, "realised": None, "reported": None}

    def delete(self, kind: str, reference: str, cascade: bool = False, asked: Asked = NOBODY) -> int:
        """Delete one object. Returns the revision. Raises Conflict with the dependants if anything needs it or, of a
        network, if anything is in it or carried by it; with `cascade` a network takes all of that along, and a tenant
        those below it, with all their networks."""
        request = {"delete": kind, "reference": reference, "cascade": cascade}
        if kind in ("network", "tenant") and cascade:
            return (self._delete_all if kind == "network" else self._delete_tenants)(reference, asked, request)

        def turn(connection: Connection) -> Any:
            before = objects.current_revision(connection)
            reader = self._reader(connection, asked.scope)
            id = reader.find(kind, reference)
            reader.to_write(kind, id, f"{kind} {reference}")
            self._fresh(connection, asked, kind, id)
            dependants = _dependants(connection, reader, kind, id)
            if dependants and kind == "tenant" and asked.scope.reads is not None:  # Of theirs it is told how many.
                raise Conflict(f"tenant {reference} has {_counted(dependants)}; --cascade deletes them", "in_use")
            if dependants:
                listed = ", ".join(dependants[:LISTED]) + (", ..." if len(dependants) > LISTED else "")
                more = "; --cascade deletes them, too" if kind in ("network", "tenant") else ""
                raise Conflict(f"{kind} {reference} is needed by {listed}{more}", "in_use", dependants[:DEPENDANTS])
            if kind in ("machine", "tenant"):
                table = tables.metadata.tables[kind]
                changes = [Change("-", kind, str(connection.scalar(select(table.c.name).where(table.c.id == id))), {})]
                if kind == "tenant":
                    access.end_for(connection, [id])
                    above = tenancy.line(connection, id)[1:2]
                connection.execute(delete(table).where(table.c.id == id))
                if kind == "machine":
                    after = self._machines_changed(connection, [id])
                    numbers.fence(connection, FABRIC, after)
                    self.heard.forget(id)
                else:
                    after = write.next_revision(connection, [_tenant_row(id, above)])
            else:
                pairs = _with_parts(connection, kind, id)
                changes = _deleted(self._reader(connection), pairs)
                after = write.write(connection, self.identity, pairs)
            if after != before:
                events.changed(connection, asked.who, "delete", after, changes)
            return after

        return int(self._change(asked, request, turn))

    def _delete_all(self, reference: str, asked: Asked, request: Any) -> int:
        """A network with all that is in it and all that it carries: in one transaction or, deepest first, in several.
        Until the last of them the key's answer says of which network something is left."""
        wanted = once.digest(request)

        def begin(connection: Connection) -> tuple[int, int | None]:
            """The revision, and the network that is left."""
            said = once.claim(connection, asked, wanted)
            if isinstance(said, int):
                return said, None
            if said is not None:
                return objects.current_revision(connection), said["rest_of"]
            reader = self._reader(connection, asked.scope)
            id = reader.find("network", reference)
            reader.to_write("network", id, f"network {reference}")
            self._fresh(connection, asked, "network", id)
            deletion.only_own(connection, id, asked.scope)
            return self._begin_to_delete(connection, asked, id)

        revision, network = self._committed(begin)
        return self._delete_rest(reference, asked, revision, network)

    def _begin_to_delete(self, connection: Connection, asked: Asked, id: int) -> tuple[int, int | None]:
        """A network goes at once if it is small enough, else it is closed. The revision, and the network that is left
        then."""
        if deletion.count_of(connection, id) <= deletion.PART:
            return self._delete_part(connection, asked, id, deletion.all_of(connection, id)), None
        once.keep(connection, asked, {"rest_of": id})
        (row,) = objects.networks(connection, "id", [id])
        pairs: list[plan.Pair] = [(row, replace(row, enabled=False))] if row.enabled else []
        after = write.write(connection, self.identity, pairs)
        if pairs:
            change = Change("~", "network", self._reader(connection).paths([id])[id], {"enabled": [True, False]})
            events.changed(connection, asked.who, "delete", after, [change])
        return after, id

    def _delete_rest(self, reference: str, asked: Asked, revision: int, network: int | None) -> int:
        for _ in range(deletion.ROUNDS):
            with self._database.read() as connection:
                rest = deletion.all_of(connection, network) if network is not None else []
            if not rest:
                return revision
            for start in range(0, len(rest), deletion.PART):
                part = rest[start : start + deletion.PART]
                revision = self._committed(partial(self._delete_part, asked=asked, network=network or 0, part=part))
        raise Conflict(f"others put into {reference} what is taken out of it: end them first", "in_use")

    def _delete_part(self, connection: Connection, asked: Asked, network: int, part: deletion.Batch) -> int:
        """What is still there of a part goes, but for networks that have got something new. Returns the revision. The
        key has its answer when the network itself goes."""
        pairs: list[plan.Pair] = [(row, None) for row in deletion.rows_of(connection, part)]
        if not pairs:
            return objects.current_revision(connection)
        changes = _deleted(self._reader(connection), pairs)
        after = write.write(connection, self.identity, pairs)
        events.changed(connection, asked.who, "delete", after, changes)
        if any(isinstance(row, NetworkRow) and row.id == network for row, _ in pairs):
            once.keep(connection, asked, after)
        return after

    # Tenants

    def make_tenant(
        self, name: str, parent: str | None = None, quota: Quota | None = None, asked: Asked = NOBODY
    ) -> Resource:
        """A new tenant, below one that whoever asks owns or administers. Raises Invalid for a name that is not the
        parent's, Conflict for one that is taken, Exhausted for a quota that those above have not."""
        wanted = quota or Quota()

        def turn(connection: Connection) -> Any:
            up = tenancy.place(connection, asked.scope, name, parent)
            tenancy.judge_quota(connection, asked.scope, name, up, wanted)
            after = write.write(connection, self.identity, (), [TenantWish(name, up, wanted)])
            change = Change("+", "tenant", name, {"parent": up, "quota": asdict(wanted)})
            events.changed(connection, asked.who, "create", after, [change])
            reader = self._reader(connection, asked.scope)
            (resource,) = reader.resources("tenant", [reader.find("tenant", name)])
            return resource

        made: Resource = self._change(asked, {"tenant": name, "parent": parent, "quota": asdict(wanted)}, turn)
        return made

    def set_tenant(
        self,
        reference: str,
        quota: Mapping[str, int | None] | None = None,
        suspended: bool | None = None,
        asked: Asked = NOBODY,
    ) -> tuple[int, Resource]:
        """Give a tenant other limits, those that `quota` names, or suspend or resume it. Returns the revision since
        which it is so, and the tenant. Raises NotFound, Forbidden, or Exhausted with the numbers."""

        def turn(connection: Connection) -> Any:
            t = tables.tenant
            reader = self._reader(connection, asked.scope)
            id = reader.find("tenant", reference)
            reader.to_write("tenant", id, f"tenant {reference}")
            self._fresh(connection, asked, "tenant", id)
            up = t.alias()
            query = select(t, up.c.name.label("up")).outerjoin(up, t.c.parent == up.c.id).where(t.c.id == id)
            row = connection.execute(query).one()
            was = {what: getattr(row, what) for what in QUOTAS}
            now = {**was, **(quota or {})}
            if now != was:
                tenancy.judge_quota(connection, asked.scope, row.name, row.up, Quota(**now))
            fields: dict[str, Any] = {"quota": [was, now]} if now != was else {}
            if suspended is not None and suspended != row.suspended:
                fields["suspended"] = [bool(row.suspended), suspended]
            revision = int(row.revision)
            if fields:
                values = {**now, "suspended": row.suspended if suspended is None else suspended}
                revision = self._tenant_changed(connection, asked, "tenant", id, row.name, values, fields)
            (resource,) = reader.resources("tenant", [id])
            return revision, resource

        request = {"tenant": reference, "quota": dict(quota or {}), "suspended": suspended}
        revision, resource = self._change(asked, request, turn)
        return revision, resource

    def _tenant_changed(
        self,
        connection: Connection,
        asked: Asked,
        verb: str,
        id: int,
        name: str,
        values: Mapping[str, Any],
        fields: dict[str, Any],
    ) -> int:
        t = tables.tenant
        connection.execute(update(t).where(t.c.id == id).values(**values))
        # Those below are closed, or open again, with it.
        concerned = tenancy.subtree(connection, id) if "suspended" in fields else [id]
        after = write.next_revision(connection, [_tenant_row(each) for each in concerned])
        events.changed(connection, asked.who, verb, after, [Change("~", "tenant", name, fields)])
        return after

    def _delete_tenants(self, reference: str, asked: Asked, request: Any) -> int:
        """A tenant with all below it, their networks and tokens, deepest first, in several transactions. In the first
        it is suspended: nothing new comes in by its tokens. Whoever asks again finishes what was cut off."""
        wanted = once.digest(request)

        def begin(connection: Connection) -> tuple[int, int | None]:
            said = once.claim(connection, asked, wanted)
            if isinstance(said, int):
                return said, None
            if said is not None:
                return objects.current_revision(connection), said["rest_of"]
            reader = self._reader(connection, asked.scope)
            id = reader.find("tenant", reference)
            reader.to_write("tenant", id, f"tenant {reference}")
            self._fresh(connection, asked, "tenant", id)
            deletion.only_of(connection, tenancy.subtree(connection, id))
            once.keep(connection, asked, {"rest_of": id})
            row = connection.execute(select(tables.tenant).where(tables.tenant.c.id == id)).one()
            if row.suspended:
                return objects.current_revision(connection), id
            fields = {"suspended": [False, True]}
            return self._tenant_changed(connection, asked, "delete", id, row.name, {"suspended": True}, fields), id

        revision, tenant = self._committed(begin)
        if tenant is None:
            return revision
        part = replace(asked, key=None)  # The answer is that of the whole.
        for _ in range(deletion.ROUNDS):
            with self._database.read() as connection:
                networks = deletion.roots_of(connection, tenancy.subtree(connection, tenant))
            for network in networks:
                revision, rest = self._committed(partial(self._begin_with, asked=part, tenant=tenant, network=network))
                self._delete_rest(reference, part, revision, rest)
            done = True
            while done:
                done, revision, more = self._committed(partial(self._end_tenants, asked=asked, tenant=tenant))
                if not more:
                    return revision
        raise Conflict(f"others put into tenant {reference} what is taken out of it: end them first", "in_use")

    def _begin_with(self, connection: Connection, asked: Asked, tenant: int, network: int) -> tuple[int, int | None]:
        """Begin with one of the networks of a tenant that goes."""
        if not objects.networks(connection, "id", [network]):
            return objects.current_revision(connection), None
        deletion.only_of(connection, tenancy.subtree(connection, tenant))
        return self._begin_to_delete(connection, asked, network)

    def _end_tenants(self, connection: Connection, asked: Asked, tenant: int) -> tuple[bool, int, bool]:
        """The deepest of a tenant's subtree go, a part at most, with the tokens that are for nothing else. Did they, at
        which revision, and is something left?"""
        t = tables.tenant
        rest = tenancy.subtree(connection, tenant)
        part = rest[: deletion.PART]
        if deletion.roots_of(connection, part):
            return False, 0, True
        after = objects.current_revision(connection)
        if part:
            access.end_for(connection, part)
            names = connection.scalars(select(t.c.name).where(t.c.id.in_(part)).order_by(t.c.id)).all()
            above = tenancy.line(connection, tenant)[1:2]
            connection.execute(delete(t).where(t.c.id.in_(part)))
            after = write.next_revision(connection, [_tenant_row(id, above) for id in part])
            events.changed(connection, asked.who, "delete", after, [Change("-", "tenant", name, {}) for name in names])
        if len(part) == len(rest):
            once.keep(connection, asked, after)
        return True, after, len(part) < len(rest)

    def set_link(self, reference: str, up: bool, asked: Asked = NOBODY) -> tuple[int, Sequence[str], Resource]:
        """Take a link up or down. Returns the revision since which it is so, the names of the machines that get it,
        and the link. Raises NotFound or Ambiguous."""

        def turn(connection: Connection) -> Any:
            reader = self._reader(connection, asked.scope)
            (row,) = objects.links(connection, "id", [reader.find("link", reference)])
            reader.to_write("link", row.id, f"link {reference}")
            self._fresh(connection, asked, "link", row.id)
            n = tables.network.c
            if row.up == up:
                revision = int(connection.execute(select(n.revision).where(n.id == row.network)).scalar_one())
            else:
                revision = write.write(connection, self.identity, [(row, replace(row, up=up))])
            (resource,) = reader.resources("link", [row.id])
            if row.up != up:
                change = Change("~", "link", self._path(connection, "link", row.id), {"up": [row.up, up]})
                events.changed(connection, asked.who, "link", revision, [change])
            return revision, reader.machines_holding(row.network), resource

        revision, machines, resource = self._change(asked, {"link": reference, "up": up}, turn)
        return revision, machines, resource

    def set_attach(
        self, reference: str, attach: Attach | None, asked: Asked = NOBODY
    ) -> tuple[int, Sequence[str], Resource]:
        """Say what a port's workload hangs on; None: on nothing that was chosen. Returns the revision since which it is
        so, the name of the machine that has to make it so, and the port. Raises NotFound, Ambiguous, or Conflict when
        it is given to another port already."""
        a, n = tables.attachment.c, tables.network.c

        def turn(connection: Connection) -> Any:
            reader = self._reader(connection, asked.scope)
            (row,) = objects.ports(connection, "id", [reader.find("port", reference)])
            reader.to_write("port", row.id, f"port {reference}")
            self._fresh(connection, asked, "port", row.id)
            if row.trunk:
                raise Conflict(f"{reference} hangs on a trunk: attach that", "on_trunk")
            (machine,) = objects.machines_of(connection, [row.id]).values()
            if reader.scope.reads is None:
                (name,) = [one["name"] for one in reader.resources("machine", [machine])]
            else:
                name = reader.seats([row.id])[row.id]
            if row.attach == attach:
                revision = int(connection.execute(select(n.revision).where(n.id == row.network)).scalar_one())
            else:
                if attach is not None:
                    same = (a.machine == machine) & (a.kind == attach.kind) & (a.name == attach.name)
                    other = connection.scalar(select(a.port).where(same))
                    if other is not None:
                        path = "another tenant's port"
                        if reader.scope.may_read(reader.owner("port", other)):
                            (path,) = [one["path"] for one in reader.resources("port", [other])]
                        raise Conflict(given_already(attach, name, path), "duplicate_attach")
                revision = write.write(connection, self.identity, [(row, replace(row, attach=attach))])
            (resource,) = reader.resources("port", [row.id])
            if row.attach != attach:
                fields = {"attach": [_attach_data(row.attach), _attach_data(attach)]}
                change = Change("~", "port", self._path(connection, "port", row.id), fields)
                events.changed(connection, asked.who, "attach", revision, [change])
            return revision, [name], resource

        revision, machines, resource = self._change(asked, {"port": reference, "attach": _attach_data(attach)}, turn)
        return revision, machines, resource

    def move(self, reference: str, to: str, asked: Asked = NOBODY) -> tuple[moves.Begun, Resource]:
        """Send a port, with all that lives on it, on its way to another host: see moves.py. The resource says in
        `moving` how far it is. Raises NotFound, Ambiguous, Invalid for a host that cannot be, Conflict when something
        on the way moves already or the new machine says nothing."""

        def turn(connection: Connection) -> Any:
            reader = self._reader(connection, asked.scope)
            id = reader.find("port", reference)
            reader.to_write("port", id, f"port {reference}")
            self._fresh(connection, asked, "port", id)
            (before,) = reader.resources("port", [id])
            begun = moves.begin(connection, reader, self.identity, id, to, self.heard.is_silent)
            change = Change("~", "port", self._path(connection, "port", id), {"host": [before["host"], to]})
            events.changed(connection, asked.who, "move", begun.revision, [change])
            (resource,) = reader.resources("port", [id])
            return asdict(begun), resource

        begun, resource = self._change(asked, {"move": reference, "to": to}, turn)
        self._moving = True
        return moves.Begun(**begun), resource

    def _advance(self) -> None:
        """Take moves on, as far as machines are with them."""
        if not self._moving:
            return

        def turn(connection: Connection) -> tuple[int, int, bool]:
            before = objects.current_revision(connection)
            moves.advance(connection, self._reader(connection), self.identity, self.heard.is_silent)
            return before, objects.current_revision(connection), moves.is_any(connection)

        self._moving = False  # before looking: what begins meanwhile says so behind it
        try:
            before, after, more = self._database.transact(turn)
        except BaseException:
            self._moving = True
            raise
        self._moving |= more
        if after != before:
            self.changed(after)
        self.happened()
        if after != before:
            self._changed_since(before)

    def give_connections(self, machine: str, port: int, connections: bytes) -> None:
        """What a machine remembers of a port that leaves it, by its row: see moves.py. Raises NotFound."""

        def turn(connection: Connection) -> None:
            moves.give(connection, self._reader(connection).find("machine", machine), port, connections)

        self._database.transact(turn)

    def take_connections(self, machine: str, port: int) -> bytes:
        """What was given, for the machine that the port comes to. Raises NotFound."""
        with self._database.read() as connection:
            return moves.take(connection, self._reader(connection).find("machine", machine), port)

    def set_enabled(
        self, kind: str, reference: str, enabled: bool, asked: Asked = NOBODY
    ) -> tuple[int, Sequence[str], Resource]:
        """Take a network or port up or down, with all that hangs above it. Returns the revision since which it is so,
        the names of the machines that get it, and the resource. Raises NotFound or Ambiguous."""

        def turn(connection: Connection) -> Any:
            reader = self._reader(connection, asked.scope)
            id = reader.find(kind, reference)
            reader.to_write(kind, id, f"{kind} {reference}")
            self._fresh(connection, asked, kind, id)
            row: NetworkRow | PortRow
            (row,) = (
                objects.networks(connection, "id", [id]) if kind == "network" else objects.ports(connection, "id", [id])
            )
            revision = reader.revision("network", row.network)
            if row.enabled != enabled:
                revision = write.write(connection, self.identity, [(row, replace(row, enabled=enabled))])
            (resource,) = reader.resources(kind, [id])
            if row.enabled != enabled:
                change = Change("~", kind, self._path(connection, kind, id), {"enabled": [row.enabled, enabled]})
                events.changed(connection, asked.who, "enable" if enabled else "disable", revision, [change])
            return revision, reader.machines_holding(row.network), resource

        revision, machines, resource = self._change(asked, {kind: reference, "enabled": enabled}, turn)
        return revision, machines, resource

    def recarry(
        self, reference: str, carrier: str | None, places: Mapping[str, str] | None = None, asked: Asked = NOBODY
    ) -> tuple[int, Sequence[str], Resource]:
        """Let another network carry this one with all that it carries in turn; None: the wire. `places`: port -> host,
        by name; a port that is not named goes to the host that is called as its own. Returns the revision since which
        it is so, the machines that get it, and the network. Raises NotFound, Ambiguous, Conflict or Invalid."""
        places = dict(places or {})

        def prepare(connection: Connection, reader: read.Reader) -> carriage.Rehoused:
            id = reader.find("network", reference)
            reader.to_write("network", id, f"network {reference}")
            self._fresh(connection, asked, "network", id)
            to = reader.find("network", carrier) if carrier is not None else FABRIC
            if to != FABRIC:
                reader.to_write("network", to, f"network {carrier}")
            elif asked.scope.writes is not None:
                message = (
                    "on which granted hosts a network is, is chosen when it is made: delete it, and create it there"
                )
                raise Forbidden(message)
            paths = reader.paths([id, to])
            return carriage.prepare(connection, id, to, places, asked.scope, paths[id], paths[to] or None)

        with self._database.read() as connection:  # before the writer's turn, as for apply
            said = once.said(connection, asked, once.digest(self._recarried(reference, carrier, places)))
            planned = prepare(connection, self._reader(connection, asked.scope)) if said is None else None

        def turn(connection: Connection) -> Any:
            carriage.lock(connection)
            reader = self._reader(connection, asked.scope)
            id = reader.find("network", reference)
            before = objects.current_revision(connection)
            work = planned
            if work is None or work.revision != before:
                work = prepare(connection, reader)
            machines = set(reader.machines_holding(id))
            revision = reader.revision("network", id)
            if work.pairs:
                revision = write.write(connection, self.identity, work.pairs)
                new = [row for _, row in work.pairs if isinstance(row, NetworkRow)]
                grants.judge_under(connection, asked.scope, [row.grant for row in new if row.grant is not None])
                events.changed(connection, asked.who, "recarry", revision, work.changes)
                machines.update(reader.machines_holding(id))
            (resource,) = reader.resources("network", [id])
            return revision, sorted(machines), resource

        revision, machines, resource = self._change(asked, self._recarried(reference, carrier, places), turn)
        return revision, machines, resource

    @staticmethod
    def _recarried(reference: str, carrier: str | None, places: Mapping[str, str]) -> dict[str, Any]:
        return {"network": reference, "carrier": carrier, "hosts": places}

    def _path(self, connection: Connection, kind: str, id: int) -> str:
        """The whole path of an object, which the audit log calls it by."""
        reader, table = self._reader(connection), tables.metadata.tables[kind]
        if kind == "network":
            return reader.paths([id])[id]
        if kind not in ("port", "link"):
            (resource,) = reader.resources(kind, [id])
            return str(resource["path"])
        row = connection.execute(select(table.c.network, table.c.name).where(table.c.id == id)).one()
        return f"{reader.paths([row.network])[row.network]}/{row.name}"

    def _fresh(self, connection: Connection, asked: Asked, kind: str, id: int) -> None:
        """Raise Stale, with what changed, unless the object has one of the ETags that the request wants."""
        if asked.etags is None or "*" in asked.etags:
            return
        reader = self._reader(connection)
        now = reader.revision(kind, id)
        if self.identity.etag(kind, id, now) in asked.etags:
            return
        seen = [self.identity.revision_in(etag, kind, id) for etag in asked.etags]
        since = max((n for n in seen if n is not None and n <= now), default=0)
        path = self._path(connection, kind, id)
        (shown,) = self._reader(connection, asked.scope).resources(kind, [id])
        known = access.known_to(connection, asked)
        changes = [
            one.replace(path, shown["path"]) for one in events.what_changed(connection, kind, path, since, known)
        ]
        what = f": {changes[0]}" if changes else ""
        raise Stale(f"{kind} {shown['path']} has changed since it was looked at{what}", changes)

    # Grants

    def grant(
        self,
        network: str | None,
        tenant: str,
        hosts: Sequence[str] | None = None,
        quota: Quota = NO_QUOTA,
        asked: Asked = NOBODY,
    ) -> Resource:
        """Let a tenant's networks be carried by hosts (names, None: all) of a network, None: by machines. Granted
        already, it has these hosts and limits now, and is open again. Raises NotFound, Invalid, Exhausted, Conflict."""

        def turn(connection: Connection) -> Any:
            reader = self._reader(connection, asked.scope)
            carrier = grants.carrier_of(reader, network)
            id = grants.give(connection, reader, carrier, tenant, hosts, quota)
            row = self._grant_row(connection, id)
            if row.cut:
                grants.change(connection, reader, self.identity, row, False, False)
            self._granted(connection, asked, row, f"granted to {tenant}")
            return self._grant(connection, reader, id)

        request = {"grant": tenant, "network": network, "hosts": hosts, "quota": asdict(quota)}
        made: Resource = self._change(asked, request, turn)
        return made

    def invite(
        self,
        network: str | None,
        hosts: Sequence[str] | None,
        quota: Quota,
        until: float,
        asked: Asked = NOBODY,
    ) -> tuple[Resource, str]:
        """The same for a tenant that is yet to show: whoever has the secret, until then (seconds since 1970), once."""
        secret = self._secret(asked, f"invitation {network}")

        def turn(connection: Connection) -> Any:
            reader = self._reader(connection, asked.scope)
            carrier = grants.carrier_of(reader, network)
            id = grants.invite(connection, reader, carrier, hosts, quota, secret, until)
            self._granted(connection, asked, self._grant_row(connection, id), "offered by an invitation")
            return self._grant(connection, reader, id)

        made: Resource = self._change(asked, {"invite": network, "hosts": hosts, "quota": asdict(quota)}, turn)
        return made, secret

    def redeem(self, secret: str, tenant: str, asked: Asked = NOBODY) -> Resource:
        """What an invitation offers is this tenant's now. Raises NotFound, Forbidden, Conflict."""

        def turn(connection: Connection) -> Any:
            reader = self._reader(connection, asked.scope)
            id = grants.redeem(connection, reader, secret, tenant)
            self._granted(connection, asked, self._grant_row(connection, id), f"redeemed for {tenant}")
            return self._grant(connection, reader, id)

        made: Resource = self._change(asked, {"redeem": access.digest(secret), "tenant": tenant}, turn)
        return made

    def all_grants(self, scope: Scope = EVERYTHING) -> Sequence[Resource]:
        """Those that somebody gave, and those that they have."""
        with self._database.read() as connection:
            reader = self._reader(connection, scope)
            return grants.resources(connection, reader, grants.seen(connection, reader))

    def get_grant(self, reference: str, scope: Scope = EVERYTHING) -> Resource:
        """One of them, by public id or, for whoever has it, by name. Raises NotFound."""
        with self._database.read() as connection:
            reader = self._reader(connection, scope)
            return self._grant(connection, reader, grants.find(connection, reader, reference, False).id)

    def change_grant(self, reference: str, suspended: bool | None, cut: bool | None, asked: Asked = NOBODY) -> Resource:
        """Suspended: nothing new is carried by it. Cut: all that it carries is closed. Raises NotFound."""

        def turn(connection: Connection) -> Any:
            reader = self._reader(connection, asked.scope)
            row = grants.find(connection, reader, reference, True)
            grants.change(connection, reader, self.identity, row, suspended, cut)
            words = [f"{word} {value}" for word, value in (("suspended", suspended), ("cut", cut)) if value is not None]
            self._granted(connection, asked, row, ", ".join(words).lower())
            return self._grant(connection, reader, row.id)

        changed: Resource = self._change(asked, {"grant": reference, "suspended": suspended, "cut": cut}, turn)
        return changed

    def revoke_grant(self, reference: str, grace: float | None = None, asked: Asked = NOBODY) -> Resource | None:
        """It is gone. With networks carried: Conflict or, with a time of grace in seconds, cut now, and gone with them
        after that; then what it is until then is returned."""

        def turn(connection: Connection) -> Any:
            reader = self._reader(connection, asked.scope)
            row = grants.find(connection, reader, reference, True)
            if grace is None or not grants.under(connection, row):
                grants.revoke(connection, reader, row)
                self._granted(connection, asked, row, "revoked")
                return None
            grants.change(connection, reader, self.identity, row, True, True, time.time() + grace)
            self._granted(connection, asked, row, f"cut, and gone in {grace:.0f} s")
            return self._grant(connection, reader, row.id)

        left: Resource | None = self._change(asked, {"revoke": reference, "grace": grace}, turn)
        return left

    def _end_grants(self) -> None:
        """Those whose time has run out go, with all that they carry, grants made from them included."""
        with self._database.read() as connection:
            over = grants.over(connection)
            networks = {row.id: [one.id for one in grants.carried(connection, row)] for row in over}
        for row in over:
            for network in networks[row.id]:
                self._delete_all(self.identity.public("network", network), Asked("grant"), {"grant": row.id})

            def turn(connection: Connection, row: GrantRow = row) -> None:
                if not grants.under(connection, row):
                    grants.revoke(connection, self._reader(connection), row)
                    self._granted(connection, Asked("grant"), row, "gone: its time had run out")

            self._committed(turn)

    def _share(self, connection: Connection, asked: Asked, wishes: Sequence[GrantWish]) -> None:
        """Grant, and take back, what a manifest wants; its networks are there by now."""
        reader = self._reader(connection, asked.scope)
        for wish in sorted(wishes, key=lambda wish: wish.quota is not None):  # What goes makes room.
            if wish.quota is None:
                assert wish.old is not None
                grants.revoke(connection, reader, wish.old)
                continue
            carrier = self._reader(connection).find("network", wish.path.replace(view.HIDDEN, ""))
            grants.give(connection, reader, carrier, wish.tenant, wish.hosts, wish.quota)

    def _grant_row(self, connection: Connection, id: int) -> GrantRow:
        (row,) = objects.grants(connection, tables.grant.c.id == id)
        return row

    def _grant(self, connection: Connection, reader: read.Reader, id: int) -> Resource:
        return grants.resources(connection, reader, [self._grant_row(connection, id)])[0]

    def _granted(self, connection: Connection, asked: Asked, row: GrantRow, what: str) -> None:
        """What became of a grant, for the audit log."""
        path = self._reader(connection).paths([row.carrier])[row.carrier] or "the machines"
        n = write.next_revision(connection, [])  # What was planned before is planned again.
        events.audited(connection, asked.who, "grant", n, f"hosts of {path}: {what}")

    # The feed

    def machine_row(self, reference: str) -> int:
        """The row id of a machine. Raises NotFound."""
        with self._database.read() as connection:
            return self._reader(connection).find("machine", reference)

    def domain_of(self, machine: int) -> int | None:
        """The domain that a machine is in, by its row id; None: it is gone."""
        m = tables.machine.c
        with self._database.read() as connection:
            return connection.scalar(select(m.domain).where(m.id == machine))

    def snapshot_for(self, machine: int) -> Batch:
        """Everything that a machine, by its row id, needs."""
        with self._database.read() as connection:
            return feed.snapshot(connection, machine)

    def changes_since(self, machine: int, revision: int) -> Batch | None:
        """What changed for a machine; None if it has to take a snapshot."""
        with self._database.read() as connection:
            found = feed.changes(connection, [machine], revision)
            return found[machine] if found is not None else None

    def changes_for(self, machines: Collection[int], revision: int) -> Mapping[int, Batch] | None:
        """What changed for machines, all of whom have that revision; None if they have to take snapshots."""
        with self._database.read() as connection:
            return feed.changes(connection, machines, revision)

    def touched(self, since: int) -> Touched | None:
        """Whom the feed's changes since a revision concern; None: perhaps everybody."""
        with self._database.read() as connection:
            return feed.touched(connection, since)

    def machines_for(self, machine: int) -> Sequence[tuple[int, Value]]:
        """The machines of its domain, by their row ids, as a machine knows them."""
        with self._database.read() as connection:
            return [(id, value) for (_, id), value in feed.machines(connection, machine)]

    # Watching

    def changes_of_objects(
        self, since: int, kind: str | None = None, network: int | None = None, scope: Scope = EVERYTHING
    ) -> Changes | None:
        """The objects that changed since a revision, as they are now; None if that is too long ago or yet to come."""
        with self._database.read() as connection:
            return watch.changes(connection, self._reader(connection, scope), since, kind, network)

    def network_row(self, reference: str, scope: Scope = EVERYTHING) -> int:
        """The row id of a network. Raises NotFound."""
        with self._database.read() as connection:
            return self._reader(connection, scope).find("network", reference)

    def events_after(self, seq: int, limit: int) -> Sequence[tuple[int, events.Event]]:
        """Up to `limit` events after one, with their numbers, oldest first."""
        with self._database.read() as connection:
            return events.after(connection, seq, limit)

    def last_events(self, count: int) -> int:
        """The number of the event after which there are `count` at most."""
        with self._database.read() as connection:
            return events.before_last(connection, count)

    # The whole store

    def confirm(self, asked: Asked = NOBODY) -> int:
        """Let agents remove what this store does not know. Returns the revision, a new one so that all hear of it."""

        def turn(connection: Connection) -> Any:
            connection.execute(update(tables.store).values(confirmed=True))
            n = write.next_revision(connection, [])
            events.audited(connection, asked.who, "confirmed", n, "agents may remove what this store does not know")
            return n

        n = int(self._change(asked, {"confirm": True}, turn))
        self.confirmed = True
        self.changed(n)
        return n

    def backup(self, to: Path) -> None:
        """Write a copy, as it is now, to a file that is not there yet."""
        backup.write(self._database, to)

    def restore(self, file: Path, force: bool = False, asked: Asked = NOBODY) -> int:
        """Become what the copy in `file` is, which this uses up, under a new epoch. Returns the revision.

        What there was stays beside the store, as *.before-restore. Raises Invalid if the file is no copy of a store.
        """
        n = backup.restore(self._database, file, force, asked.who)
        self.identity = Identity(self._database.epoch, self._database.key)
        self.confirmed = force
        self.heard.forget()
        self._reports.clear()
        self.changed(n)
        self.happened()
        return n

    def counts(self) -> dict[str, int]:
        """How many objects of each kind there are."""
        with self._database.read() as connection:
            found: dict[str, int] = dict.fromkeys(read.KINDS, 0)
            for kind in ("machine", "tenant"):
                found[kind] = int(connection.scalar(select(func.count()).select_from(read.TABLES[kind])) or 0)
            return found | {row.kind: row.n for row in connection.execute(select(tables.tally))}

    @property
    def commits(self) -> tuple[int, int]:
        """How many commits there were since the start, and how many requests they were for."""
        return self._database.commits, self._database.turns

    # For trace

    def world(self, port: str, scope: Scope = EVERYTHING) -> Around:
        """All that decides what happens to a port's packets, as far as somebody may know it."""
        with self._database.read() as connection:
            reader = self._reader(connection, scope)
            id = reader.find("port", port)
            here = connection.execute(select(tables.port.c.network).where(tables.port.c.id == id)).scalar_one()
            networks = objects.with_carriers(connection, [here])
            seen = [networks[here]]
            while (below := networks.get(seen[-1].carrier)) is not None and scope.may_read(below.tenant):
                seen.append(below)
            world = feed.world(connection, [row.id for row in seen])
            if scope.reads is None:
                return Around(world, id, _names(connection, reader, world), None)
            # What is below is asked for as what stands on it asks for it: that takes as long however much it is.
            floor = seen[-1]
            hosts = {host for port in world.ports_in(floor.id) for host in (port.host, port.other) if host}
            chain = self._chains.of(connection, {floor.carrier: hosts})[floor.carrier]
            names = _names(connection, reader, world, hosts if floor.carrier != FABRIC else ())
            return Around(World({**chain.world.values, **world.values}), id, names, floor.id)

    def _reader(self, connection: Connection, scope: Scope = EVERYTHING) -> read.Reader:
        return read.Reader(connection, self.identity, self.heard, self._chains, scope)

    # Who may do what

    def authority(self, made: Callable[[], tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
        """The key and certificate (PEM) of the authority that signs machines; `made` makes them when there are none."""
        with self._database.read() as connection:
            known = access.authority(connection)
        return known or self._database.transact(lambda connection: access.found_authority(connection, made))

    def bearer(self, secret: str) -> access.Bearer | None:
        """Whom a token's secret speaks for; None: for nobody."""
        with self._database.read() as connection:
            return access.bearer(connection, secret)

    def scope_of(self, token: int) -> Scope | None:
        """What a token, by its row, is for now; None: it speaks for nobody any more."""
        with self._database.read() as connection:
            return access.scope_of(connection, token)

    def machine_of(self, public: str, joins: int) -> str | None:
        """The name of the machine that a certificate speaks for, by public id; None: for none any more."""
        row = self.identity.row("machine", public)
        with self._database.read() as connection:
            return None if row is None else access.machine_of(connection, row, joins)

    def make_token(
        self,
        name: str,
        everything: access.Role | None = None,
        tenants: Mapping[str, access.Role] | None = None,
        until: float | None = None,
        asked: Asked = NOBODY,
    ) -> tuple[Resource, str]:
        """A new token for tenants, or for all, and its secret, which is told only here. Raises Conflict for a name that
        is taken, NotFound for an unknown tenant, Forbidden for one that whoever asks neither owns nor administers."""
        roles, secret = dict(tenants or {}), self._secret(asked, f"token {name}")

        def turn(connection: Connection) -> Any:
            access.make(connection, name, secret, everything, roles, until, asked.who, asked.scope)
            n = objects.current_revision(connection)
            what = f"token {name}: " + (f"everything, {everything}" if everything else _roles(roles))
            events.audited(connection, asked.who, "token", n, f"{what}, made")
            return access.listed(connection, name, asked.scope)[0]

        request = {"token": name, "everything": everything, "tenants": roles}
        made: Resource = self._change(asked, request, turn)
        self.happened()
        return made, secret

    def _secret(self, asked: Asked, what: str) -> str:
        """A new secret. Of a request that is asked again it is the first one's, which nobody keeps."""
        return access.new_secret() if asked.key is None else self.identity.secret(f"{asked.tenant} {asked.key} {what}")

    def tokens(self, name: str | None = None, scope: Scope = EVERYTHING) -> Sequence[Resource]:
        """The tokens for tenants that somebody owns or administers, or one, without their secrets. Raises NotFound."""
        with self._database.read() as connection:
            found = access.listed(connection, name, scope)
        if name is not None and not found:
            raise NotFound(f"token {name}")
        return found

    def revoke(self, name: str, asked: Asked = NOBODY) -> int:
        """A token counts no more, at once. Returns the revision. Raises NotFound."""

        def turn(connection: Connection) -> Any:
            access.revoke(connection, name, asked.scope)
            n = objects.current_revision(connection)
            events.audited(connection, asked.who, "token", n, f"token {name}, revoked")
            return n

        n = int(self._change(asked, {"revoke": name}, turn))
        self.happened()
        return n

    def guest(self, port: str | int, below: str | None = None, scope: Scope = EVERYTHING) -> str:
        """The name of the machine that the workload of a host port is, by the port's path, or by its row for the
        machine `below` that has it. Raises NotFound, Forbidden unless the port may be changed, Conflict when nothing
        lives there that needs an agent."""
        with self._database.read() as connection:
            reader = self._reader(connection, scope)
            id = port if isinstance(port, int) else reader.find("port", port)
            called = f"port {port}" if isinstance(port, str) else "this port"  # no rows to those who know numbers
            reader.to_write("port", id, called)
            if below is not None:
                machine = reader.find("machine", below)
                there = [row.id for row in objects.ports(connection, "id", [id])]
                places = {*objects.machines_of(connection, there).values()}
                places |= {*objects.machines_of(connection, there, other=True).values()}
                if machine not in places:
                    raise NotFound(f"{called} on machine {below}")
            name = connection.scalar(select(tables.machine.c.name).where(tables.machine.c.port == id))
            if name is None:
                message = f"{called} runs no agent: a network with `carriage: encapsulated` has to live on it first"
                raise Conflict(message, "no_agent")
            return str(name)

    def let_join(self, machine: str, until: float, asked: Asked = NOBODY) -> str:
        """A secret: whoever has it may join as this machine, once, until then (seconds since 1970)."""
        secret = self._secret(asked, f"join {machine}")

        def turn(connection: Connection) -> Any:
            access.let_join(connection, machine, secret, until, asked.who)
            n = objects.current_revision(connection)
            events.audited(connection, asked.who, "token", n, f"machine {machine} may join")
            return n

        self._change(asked, {"let_join": machine}, turn)
        self.happened()
        return secret

    def enter(
        self,
        secret: str,
        name: str,
        address: str,
        mtu: int,
        nics: Sequence[str],
        vlan: Tag | None,
        trunks: Mapping[str, str] | None,
        labels: Mapping[str, str],
        request: str,
        sign: Callable[[str, int], str],
        key: str | None,
    ) -> tuple[Resource, str]:
        """A machine joins with its join token, which is used up. `request` is its certificate request, which `sign`
        signs for a machine's public id and the number of the time. Returns the machine, one on a port as it is told
        of itself, and the certificate: the same again for the same request. Certificates of earlier times, as of a copy
        of its disk, count no more."""
        asked = Asked(f"machine:{name}", "", None if key is None else f"join {key}")
        what = {"enter": name, "address": address, "mtu": mtu, "nics": list(nics), "vlan": str(vlan)}
        what |= {"request": request, **({"trunks": dict(trunks)} if trunks is not None else {})}

        def turn(connection: Connection) -> Any:
            access.use(connection, secret, name)
            under = select(tables.machine.c.port).where(tables.machine.c.name == name)
            if address and connection.scalar(under) is None:
                resource = self._join(connection, Asked(asked.who), name, address, mtu, labels, nics, vlan, trunks)
            else:  # Its address and MTU are its port's.
                resource = self._own(connection, name)
            row = connection.execute(select(tables.machine.c.id).where(tables.machine.c.name == name)).scalar_one()
            if resource["fenced"]:
                self._fence(connection, row, False)
            joins = access.joined_once_more(connection, row)
            events.audited(
                connection, asked.who, "joined", objects.current_revision(connection), f"machine {name} has joined"
            )
            return {**resource, "fenced": False}, sign(resource["id"], joins)

        resource, certificate = self._change(asked, {**what, "secret": access.digest(secret)}, turn)
        self.happened()
        return resource, certificate

    def fence(self, reference: str, fenced: bool, asked: Asked = NOBODY) -> tuple[int, Sequence[str], Resource]:
        """Shut a machine out, or let it in again: to all others it is a stranger, and nothing that it says counts. What
        lives on it stays as it is stored. Returns the revision, the machines that get it, and the machine."""

        def turn(connection: Connection) -> Any:
            reader = self._reader(connection)
            id = reader.find("machine", reference)
            self._fresh(connection, asked, "machine", id)
            (was,) = reader.resources("machine", [id])
            revision = objects.current_revision(connection)
            if was["fenced"] != fenced:
                revision = self._fence(connection, id, fenced)
                change = Change("~", "machine", was["name"], {"fenced": [was["fenced"], fenced]})
                events.changed(connection, asked.who, "fence", revision, [change])
            (resource,) = reader.resources("machine", [id])
            m = tables.machine.c
            others = (m.id != id, m.fenced.is_(False), m.domain == feed.domain_of(connection, id))
            names = connection.scalars(select(m.name).where(*others).order_by(m.name)).all()
            return revision, list(names), resource

        revision, machines, resource = self._change(asked, {"fence": reference, "fenced": fenced}, turn)
        return revision, machines, resource

    def _fence(self, connection: Connection, id: int, fenced: bool) -> int:
        m = tables.machine
        connection.execute(update(m).where(m.c.id == id).values(fenced=fenced))
        domain = feed.domain_of(connection, id)
        if domain == FABRIC:
            after = self._machines_changed(connection, [id])
        else:
            row = {"network": domain, "kind": "machine", "id": id, **write.NOTHING_WAS}
            after = write.next_revision(connection, [row])
        if fenced:
            numbers.fence(connection, domain, after)
        return after


def _applied(data: Mapping[str, Any]) -> Applied:
    made = data["plan"]
    changes = tuple(Change(**change) for change in made["changes"])
    found = Plan(changes, tuple(made["disturbs"]), tuple(made["machines"]), made.get("etag", ""))
    return Applied(data["revision"], found)


def _attach_data(attach: Attach | None) -> dict[str, str] | None:
    return {attach.kind: attach.name} if attach is not None else None


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
    flat = select(s.id).where(s.domain == FABRIC)
    family = connection.scalar(select(func.max(c.family)).where(c.segment.in_(flat)))
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
            select(s.name)
            .join(tables.segment_cidr, c.segment == s.id)
            .where(c.family == family, s.domain == FABRIC)
            .limit(1)
        )
        message = f"{said}, but segment {name} needs {least}"
        raise Invalid([Problem("mtu_too_small", "/mtu", message, limit=least + overhead)])


def _domains_fit(connection: Connection) -> None:
    """The same for what is carried by networks for real: each level takes as much again."""
    n, s, c, m = tables.network.c, tables.segment.c, tables.segment_cidr.c, tables.machine.c
    for domain in connection.scalars(select(m.domain).where(m.domain != FABRIC).distinct()).all():
        left = objects.left(connection, domain)
        inside = select(s.network).where(s.domain == domain)
        chosen = connection.execute(select(n.name, n.mtu).where(n.id.in_(inside), n.mtu > left).limit(1)).first()
        if chosen is not None:
            message = f"network {chosen.name} has chosen an MTU of {chosen.mtu}, and {left} would be left for it"
            raise Invalid([Problem("mtu_too_small", "/mtu", message, limit=chosen.mtu)])
        query = select(s.name, c.family).join(tables.segment_cidr, c.segment == s.id).where(s.domain == domain)
        for row in connection.execute(query.order_by(c.family.desc()).limit(1)):
            if left < (least := SMALLEST_MTU[row.family]):
                message = f"segment {row.name} needs an MTU of {least}, and {left} would be left for it"
                raise Invalid([Problem("mtu_too_small", "/mtu", message, limit=least)])


@cache
def _changed_after() -> Select[Any]:
    """The networks of these changes, but for new ones: nothing is remembered of those."""
    c = tables.change.c
    return select(c.network).where(c.revision > bindparam("revision"), c.whole.is_(False))


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
            ask("port", t.port, (t.port.c.host_machine == id) | (t.port.c.other_machine == id), t.port.c.network)
        case "tenant":
            ask("network", t.network, t.network.c.tenant == id, t.network.c.carrier)
            children = connection.scalars(select(t.tenant.c.name).where(t.tenant.c.parent == id)).all()
            g = t.grant.c
            had = connection.scalars(select(g.id).where(g.tenant == id).order_by(g.id)).all()
            grants = [f"grant {reader.public('grant', grant)}" for grant in had]
            return [f"tenant {name}" for name in children] + _written(found, reader) + grants
        case "network":
            ask("network", t.network, (t.network.c.carrier == id) & (t.network.c.id != FABRIC), t.network.c.carrier)
            for each in ("port", "segment", "router", "link"):
                table = t.metadata.tables[each]
                ask(each, table, table.c.network == id, table.c.network)
            policies = [row.id for row in objects.policies(connection, "network", [id])]
        case "segment":
            ask("port", t.port, t.port.c.segment == id, t.port.c.network)
            joined = select(t.router_interface.c.router).where(t.router_interface.c.segment == id)
            ask("router", t.router, t.router.c.id.in_(joined), t.router.c.network)
            policies = _policies_naming(connection, t.segment, "segment", id)
        case "router":
            ask("link", t.link, (t.link.c.router == id) | (t.link.c.other == id), t.link.c.network)
        case "port":
            agent = select(t.machine.c.id).where(t.machine.c.port == id).scalar_subquery()
            on_it = (t.port.c.host_port == id) | (t.port.c.other_port == id)
            on_it |= t.port.c.trunk == id
            on_it |= (t.port.c.host_machine == agent) | (t.port.c.other_machine == agent)
            ask("port", t.port, on_it, t.port.c.network)
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
    loaders = deletion.LOADERS
    pairs: list[plan.Pair] = [(row, None) for row in loaders[kind](connection, "id", [id])]
    for row, _ in list(pairs):
        if isinstance(row, objects.PortRow):
            members = tables.port_group.c
            others = select(members.group).where(members.group.in_(row.groups), members.port != id)
            kept = set(connection.scalars(others))
            pairs += [(group, None) for group in objects.groups(connection, "id", sorted(set(row.groups) - kept))]
    return pairs


def _tenant_row(id: int, above: tenancy.Line = ()) -> dict[str, Any]:
    """The change row of a tenant; of one that goes, with the one that it was below, if that stays."""
    was = above[0].name if above else None
    return {"network": FABRIC, "kind": "tenant", "id": id, **write.NOTHING_WAS, "was_tenant": was}


def _counted(dependants: Sequence[str]) -> str:
    """2 networks, 1 tenants below it and 1 grants"""
    kinds = Counter(one.split(" ")[0] for one in dependants)
    words = {"network": "networks", "tenant": "tenants below it", "grant": "grants"}
    *told, last = [f"{kinds[kind]} {what}" for kind, what in words.items() if kinds[kind]]
    return f"{', '.join(told)} and {last}" if told else last


def _roles(tenants: Mapping[str, str]) -> str:
    return ", ".join(f"{tenant} {role}" for tenant, role in sorted(tenants.items()))


def _deleted(reader: read.Reader, pairs: Sequence[plan.Pair]) -> list[Change]:
    """What goes, in people's words."""
    gone = [row for row, _ in pairs if row is not None and not isinstance(row, objects.GroupRow)]
    paths = reader.paths(row.network for row in gone)
    changes = []
    for row in gone:
        path = paths[row.network]
        if isinstance(row, objects.PolicyRow):
            path = f"{path}/{plan.policy_words(row.spec)}"
        elif not isinstance(row, objects.NetworkRow):
            path = f"{path}/{row.name}"
        changes.append(Change("-", row.kind, path, {}))
    return changes


def _rows(connection: Connection, kind: str, ids: Collection[int], *columns: str) -> Iterator[Any]:
    """These columns of rows of a kind."""
    c = tables.metadata.tables[kind].c
    query = select(c.id, *(c[column] for column in columns)).where(c.id.in_(objects.IDS))
    for chunk in list(objects.chunks(sorted(ids))) or [[]]:
        yield from connection.execute(query, {"ids": chunk})


def _names(
    connection: Connection, reader: read.Reader, world: World, hosts: Collection[int] = ()
) -> dict[tuple[str, int], str]:
    """What is in a world by name, paths of networks and ports; and the names of these host ports, not in it."""
    names: dict[tuple[str, int], str] = {}
    ids: dict[str, set[int]] = defaultdict(set)
    for kind, id in world.values:
        ids[kind].add(id)
    ids["group"] = {group for port in world.ports.values() for group in port.groups}
    ids["group"] |= {
        one.id for rule in world.policies.values() for one in (*rule.sources, *rule.targets) if one.kind == "group"
    }
    for kind in ("machine", "group", "segment", "router", "link"):
        names.update({(kind, row.id): row.name for row in _rows(connection, kind, ids[kind], "name")})
    paths = reader.paths(ids["network"])
    names.update({("network", id): path for id, path in paths.items()})
    ports = _rows(connection, "port", ids["port"], "network", "name")
    names.update({("port", row.id): f"{paths[row.network]}/{row.name}" for row in ports})
    names.update({("port", row.id): row.name for row in _rows(connection, "port", hosts, "name")})
    policies = _rows(connection, "policy", ids["policy"], "spec")
    names.update({("policy", row.id): plan.policy_words(row.spec) for row in policies})
    return names
