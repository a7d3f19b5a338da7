"""What a plan looks at: machines, tenants and grants as a whole, and of the networks those that it asks for.

A store may have a million networks, so nothing here goes through all of them: one is read, by id or by name, when it is
first asked for, with what carries it or with what it carries. How many statements that takes hangs neither on how many
networks there are nor on how deep they are carried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import BindParameter, Boolean, Connection, Select, bindparam, func, select
from sqlalchemy.engine import Engine

from nestnet.model.values import FABRIC
from nestnet.store import objects, tables
from nestnet.store.database import may_write
from nestnet.store.objects import IDS, Contents, GrantRow, MachineRow, NetworkRow, chunks
from nestnet.store.quotas import Place, Quota
from nestnet.store.still import Still

NAMES: BindParameter[Any] = bindparam("names", expanding=True)
OWNERS: BindParameter[Any] = bindparam("owners", expanding=True)


class Networks:
    """The stored networks, by id."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._rows: dict[int, NetworkRow | None] = {FABRIC: None}
        self._named: dict[tuple[int, str], int | None] = {}  # what a carrier carries under a name, if anything
        self._carried: dict[int, dict[str, NetworkRow]] = {}  # all that these carry
        self._rest = True  # May there be more than what is known here?

    def get(self, id: int, /) -> NetworkRow | None:
        """None: there is none with this id. What is not made yet has one below 0."""
        if id not in self._rows and id > FABRIC:
            self.know([id])
        return self._rows.get(id)

    def __getitem__(self, id: int, /) -> NetworkRow:
        if (row := self.get(id)) is None:
            raise KeyError(id)
        return row

    def __contains__(self, id: int, /) -> bool:
        return self.get(id) is not None

    def know(self, ids: Iterable[int]) -> None:
        """Read these with all that carries them, in one statement, also if they are known: that takes as long."""
        more = sorted({id for id in ids if id not in self._rows and id > FABRIC})
        self._rows.update(dict.fromkeys(more))
        for chunk in list(chunks(more)) or [[]]:
            self._learn(objects.with_carriers(self.connection, chunk or [FABRIC]).values())

    def carried(self, carrier: int) -> Mapping[str, NetworkRow]:
        """All that a network carries, by name. Nobody asks what the wire carries."""
        if carrier not in self._carried and carrier > FABRIC and self._rest:
            self._know_above([carrier])
        return self._carried.get(carrier, {})

    def named(self, carrier: int, name: str) -> NetworkRow | None:
        """What it carries under this name."""
        if carrier in self._carried or carrier < FABRIC or not self._rest:
            return self.carried(carrier).get(name)
        return self.named_stored(carrier, name)

    def named_stored(self, carrier: int, name: str) -> NetworkRow | None:
        """The same, whatever else is left out."""
        if (carrier, name) not in self._named:
            self.know_named(carrier, [name])
        id = self._named[carrier, name]
        return self._rows[id] if id is not None else None

    def know_named(self, carrier: int, names: Iterable[str]) -> None:
        """Read what it carries under these names, in one statement."""
        more = [name for name in names if (carrier, name) not in self._named]
        self._named.update({(carrier, name): None for name in more})
        for chunk in chunks(more):
            rows = [
                objects.as_network(row)
                for row in self.connection.execute(_named(), {"carrier": carrier, "names": chunk})
            ]
            self._learn(rows)
            for row in rows:
                if self[row.id].name == row.name:
                    self._named[carrier, row.name] = row.id

    def know_pairs(self, pairs: Iterable[tuple[int, str]]) -> None:
        """Read what is carried by one under a name, of each of these pairs."""
        more = sorted({pair for pair in pairs if pair not in self._named})
        self._named.update(dict.fromkeys(more))
        for chunk in chunks(more):
            asked = {"carriers": sorted({id for id, _ in chunk}), "names": sorted({name for _, name in chunk})}
            rows = [objects.as_network(row) for row in self.connection.execute(_paired(), asked)]
            self._learn(rows)
            for row in rows:
                if (row.carrier, row.name) in self._named and self[row.id].name == row.name:
                    self._named[row.carrier, row.name] = row.id

    def of(self, tenants: Collection[str], names: Collection[str] | None = None) -> list[NetworkRow]:
        """Those of these tenants, called so. What carries them has to be known."""
        found: list[NetworkRow] = []
        for chunk in chunks(sorted(names)) if names is not None else [None]:
            asked = {"owners": sorted(tenants)} | ({"names": chunk} if chunk is not None else {})
            rows = self.connection.execute(_owned(chunk is not None), asked)
            found += [objects.as_network(row) for row in rows]
        self._learn(found)
        return [self[row.id] for row in found]

    def on_wire_of(self, tenants: Collection[str | None]) -> list[NetworkRow]:
        """Those on the wire of these tenants, None: of none. If something is left out, only of what is not."""
        if not self._rest:
            return [row for row in self.carried(FABRIC).values() if row.tenant in tenants]
        n, t = tables.network.c, tables.tenant.c
        owned = n.tenant.in_(select(t.id).where(t.name.in_([name for name in tenants if name is not None])))
        found: dict[int, NetworkRow] = {}
        for which in (owned, n.tenant.is_(None)) if None in tenants else (owned,):
            query = objects.networks_with_owners().where(n.carrier == FABRIC, n.id != FABRIC, which)
            found.update({row.id: objects.as_network(row) for row in self.connection.execute(query)})
        self._learn(found.values())
        return [self[id] for id in sorted(found)]

    def under(self, tenants: Collection[str], carriers: Collection[int]) -> set[int]:
        """All that carries networks of these tenants, and these with all that carries them."""
        asked = {"owners": sorted(tenants), "ids": sorted(carriers)}
        rows = [objects.as_network(row) for row in self.connection.execute(_carrying(), asked)]
        self._learn(rows)
        return {row.id for row in rows}

    def above(self, roots: Iterable[int]) -> list[int]:
        """These networks and everything that they carry, carriers first."""
        order = list(roots)
        if self._rest:
            self._know_above(order)
        for network in order:
            order += [row.id for row in self.carried(network).values()]
        return order

    def put(self, new: NetworkRow) -> None:
        """Let one be called otherwise, or be carried by another one: so it is found by its name."""
        old = self[new.id]
        if old.carrier in self._carried:
            self._carried[old.carrier].pop(old.name, None)
        if new.carrier in self._carried:
            self._carried[new.carrier][new.name] = new
        self._named[old.carrier, old.name] = None
        self._named[new.carrier, new.name] = new.id
        self._rows[new.id] = new

    def leave_out_all_but(self, about: Iterable[int]) -> None:
        """Let networks carry only these."""
        kept: dict[int, dict[str, NetworkRow]] = {}
        for row in (self[id] for id in sorted(about)):
            kept.setdefault(row.carrier, {})[row.name] = row
        self._carried, self._rest = kept, False

    def _know_above(self, roots: Iterable[int]) -> None:
        more = sorted({id for id in roots if id > FABRIC and id not in self._carried})
        for chunk in chunks(more):
            rows = [objects.as_network(row) for row in self.connection.execute(_above(), {"ids": chunk})]
            self._learn(rows)
            for id in (*chunk, *(row.id for row in rows)):
                self._carried.setdefault(id, {})
            for row in (self[row.id] for row in rows):
                self._carried[row.carrier][row.name] = row

    def _learn(self, rows: Iterable[NetworkRow]) -> None:
        """What is known already may be called otherwise here."""
        for row in rows:
            if self._rows.get(row.id) is None:
                self._rows[row.id] = row


@cache
def _named() -> Select[Any]:
    c = tables.network.c
    query = objects.networks_with_owners()
    return query.where(c.carrier == bindparam("carrier"), c.name.in_(NAMES), c.id != FABRIC)


@cache
def _paired() -> Select[Any]:
    c = tables.network.c
    carriers: BindParameter[Any] = bindparam("carriers", expanding=True)
    return objects.networks_with_owners().where(c.carrier.in_(carriers), c.name.in_(NAMES), c.id != FABRIC)


@cache
def _owned(named: bool) -> Select[Any]:
    c, t = tables.network.c, tables.tenant.c
    owners = select(t.id).where(t.name.in_(OWNERS))
    which = objects.called(NAMES, owners) if named else c.tenant.in_(owners)
    return objects.networks_with_owners().where(which).order_by(c.id)


@cache
def _above() -> Select[Any]:
    n, over = tables.network, tables.network.alias()
    walk = select(n.c.id).where(n.c.carrier.in_(IDS), n.c.id != FABRIC).cte(recursive=True)
    walk = walk.union(select(over.c.id).join(walk, over.c.carrier == walk.c.id))
    return objects.networks_with_owners().join(walk, walk.c.id == n.c.id).order_by(n.c.id)


@cache
def _carrying() -> Select[Any]:
    """From carrier to carrier, in the order of the index, however many networks are on each."""
    n, t = tables.network, tables.tenant.c
    first, further, below = (tables.network.alias() for _ in range(3))
    least = select(func.min(first.c.carrier)).where(first.c.tenant == t.id).scalar_subquery()
    step = select(t.id.label("tenant"), least.label("carrier")).where(t.name.in_(OWNERS)).cte(recursive=True)
    following = select(func.min(further.c.carrier)).where(
        further.c.tenant == step.c.tenant, further.c.carrier > step.c.carrier
    )
    step = step.union_all(select(step.c.tenant, following.scalar_subquery()).where(step.c.carrier.is_not(None)))
    walk = select(step.c.carrier.label("id")).where(step.c.carrier.is_not(None))
    given = select(n.c.id).where(n.c.id.in_(IDS))
    start = walk.union(given).subquery()
    down = select(start.c.id).cte(recursive=True)
    down = down.union(select(below.c.carrier).where(below.c.id == down.c.id))
    return objects.networks_with_owners().join(down, down.c.id == n.c.id).where(n.c.id != FABRIC).order_by(n.c.id)


class Paths:
    """The paths of all networks, to ask whether there is one."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    def __contains__(self, path: object) -> bool:
        here = FABRIC
        for name in str(path).split("/"):
            if (row := self._networks.named_stored(here, name)) is None:
                return False
            here = row.id
        return True


@dataclass(frozen=True, slots=True)
class Tenants:
    """All tenants by name, as they are at a stamp. Plans share it."""

    stamp: tuple[Any, ...]
    ids: dict[str, int]
    parents: dict[str, str | None]
    quotas: dict[str, Quota]
    suspended: frozenset[str]
    limited: bool  # Has one of them a limit?


_known: WeakKeyDictionary[Engine, Tenants] = WeakKeyDictionary()


def _tenants(connection: Connection) -> Tenants:
    """Read when something has changed: whatever makes or changes a tenant gives it a revision that none had, and
    whatever deletes one leaves fewer."""
    stamp = tuple(connection.execute(_stamp_of_tenants()).one())
    known = _known.get(connection.engine)
    if (known is None or known.stamp != stamp) and may_write(connection):
        # What such a one reads, nobody may ever have stored. What is stored is remembered, for the next.
        with connection.engine.connect() as stored, stored.begin():
            known = _tenants(stored)
    is_known = known is not None and known.stamp == stamp
    # Asked for none when all are known: what others change is in no count of statements.
    rows = connection.execute(_all_tenants(), {"all": not is_known}).all()
    if known is not None and is_known:
        return known
    names = {row.id: row.name for row in rows}
    quotas = {row.name: Quota(row.networks, row.segments, row.ports, row.rate) for row in rows}
    found = Tenants(
        stamp,
        {row.name: row.id for row in rows},
        {row.name: names.get(row.parent) for row in rows},
        quotas,
        frozenset(row.name for row in rows if row.suspended),
        any(quota != Quota() for quota in quotas.values()),
    )
    if not may_write(connection):
        _known[connection.engine] = found
    return found


@cache
def _all_tenants() -> Select[Any]:
    t = tables.tenant.c
    columns = (t.id, t.name, t.parent, t.suspended, t.networks, t.segments, t.ports, t.rate)
    return select(*columns).where(bindparam("all", type_=Boolean)).order_by(t.id)


@cache
def _stamp_of_tenants() -> Select[Any]:
    t = tables.tenant.c
    epoch = select(tables.store.c.epoch).scalar_subquery()
    return select(epoch, func.count(), func.max(t.revision), func.max(t.id)).select_from(tables.tenant)


@dataclass
class State:
    """All tenants and grants, the machines and networks that are asked for, and the contents of some."""

    revision: int
    tenants: Mapping[str, int]
    parents: Mapping[str, str | None]
    quotas: Mapping[str, Quota]
    grants: dict[int, GrantRow]
    networks: Networks
    suspended: frozenset[str]  # Tenants; also those below them are closed to their own tokens.
    limited: bool  # Has a tenant or a grant a limit?
    contents: dict[int, Contents] = field(default_factory=dict)
    still: dict[int, Still] = field(default_factory=dict)  # Of these the networks that a manifest only puts others on.

    @cached_property
    def joined(self) -> dict[str, MachineRow]:
        """All machines of the fabric."""
        return {row.name: row for row in objects.machines(self.networks.connection)}

    @cached_property
    def machines(self) -> dict[str, int]:
        return {name: row.id for name, row in self.joined.items()}

    def below(self, network: int) -> Iterator[int]:
        """It and all that carries it, but the wire."""
        while network != FABRIC:
            yield network
            network = self.networks[network].carrier

    def path(self, network: int) -> str:
        """acme/staging"""
        names: list[str] = []
        while network != FABRIC:
            row = self.networks[network]
            names.append(row.name)
            network = row.carrier
        return "/".join(reversed(names))

    def carriers_of(
        self, grants: Mapping[int, GrantRow], wanted: Mapping[int, NetworkRow] | None = None
    ) -> dict[int, Place]:
        """The networks whose hosts are granted, as they are or as they are wanted, by id."""
        carriers = {row.carrier for row in grants.values()} - {FABRIC}
        self.networks.know(carriers)
        return {id: (wanted or {}).get(id) or self.networks[id] for id in carriers}


def load_state(connection: Connection) -> State:
    """Everything but networks and what is in them: these are read when they are asked for."""
    state = load_owners(connection)
    _ = state.joined  # Also where there is no need: how many statements a plan takes must not tell what carries it.
    return state


def load_owners(connection: Connection) -> State:
    """The same, but machines too are read when they are asked for."""
    tenants = _tenants(connection)
    grants = {row.id: row for row in objects.grants(connection)}
    return State(
        revision=objects.current_revision(connection),
        tenants=tenants.ids,
        parents=tenants.parents,
        quotas=tenants.quotas,
        grants=grants,
        networks=Networks(connection),
        suspended=tenants.suspended,
        limited=tenants.limited or any(row.quota != Quota() for row in grants.values()),
    )
