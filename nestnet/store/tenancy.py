"""Tenants as a tree: who sees and administers whom, and who is suspended (DESIGN, rule 30).

    reads    a token sees the tenants that it is for and all below them, as objects
    writes   its owner administers those below: quota, suspension, tokens, deletion; not the tenants themselves
    neither  is a right to what networks of tenants below have in them

Nobody sees up. A line is a tenant with all above it, so every question about rights is one about a line: in SQL for
one tenant (`line`), over a picture of all for a plan (`line_in`). They are asked within the transaction that writes, so
what comes after a suspension is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, FromClause, Select, literal, select, true

from nestnet.model.errors import Conflict, Exhausted, Forbidden, Invalid, NotFound, Problem
from nestnet.model.manifest import TenantSpec
from nestnet.model.problems import join
from nestnet.store import tables
from nestnet.store.quotas import QUOTAS, Quota, Tree, Uses, judge
from nestnet.store.scope import Scope
from nestnet.store.state import State, load_state
from nestnet.store.usage import uses, uses_of_grants

LONGEST = 63  # Characters of a name.
MOST = 1000  # Tenants in one tree, that others than the operator make: every plan looks at all there are.


class One(NamedTuple):
    """A tenant in a line."""

    name: str
    suspended: bool


Line = Sequence[One]
"""A tenant, and those above it, the nearest first."""


# What is seen


def below(names: Collection[str]) -> Select[tuple[int]]:
    """The rows of all tenants below these."""
    top, under, child = (tables.tenant.alias() for _ in range(3))
    tops = select(top.c.id).where(top.c.name.in_(sorted(names)))
    walk = select(under.c.id).where(under.c.parent.in_(tops)).cte(recursive=True)
    walk = walk.union(select(child.c.id).where(child.c.parent == walk.c.id))
    return select(walk.c.id)


def within(names: Collection[str] | None, of: FromClause = tables.tenant) -> ColumnElement[bool]:
    """The condition that a tenant is one of these or below them; None: it is everything."""
    return true() if names is None else of.c.name.in_(sorted(names)) | of.c.id.in_(below(names))


def closed() -> Select[tuple[int]]:
    """The rows of all tenants that are suspended themselves, or below one that is."""
    top, child = tables.tenant.alias(), tables.tenant.alias()
    walk = select(top.c.id).where(top.c.suspended).cte(recursive=True)
    walk = walk.union(select(child.c.id).where(child.c.parent == walk.c.id))
    return select(walk.c.id)


def subtree(connection: Connection, id: int) -> list[int]:
    """A tenant and all below it, if it is there, the deepest first."""
    t = tables.tenant
    walk = select(t.c.id, literal(0).label("depth")).where(t.c.id == id).cte(recursive=True)
    child = t.alias()
    walk = walk.union_all(select(child.c.id, walk.c.depth + 1).where(child.c.parent == walk.c.id))
    return list(connection.scalars(select(walk.c.id).order_by(walk.c.depth.desc(), walk.c.id)))


def line(connection: Connection, id: int) -> Line:
    """A tenant, by its row, and those above it."""
    t, up = tables.tenant, tables.tenant.alias()
    columns = (t.c.parent, t.c.name, t.c.suspended, literal(0).label("depth"))
    walk = select(*columns).where(t.c.id == id).cte(recursive=True)
    more = select(up.c.parent, up.c.name, up.c.suspended, walk.c.depth + 1).where(up.c.id == walk.c.parent)
    walk = walk.union_all(more)
    rows = connection.execute(select(walk.c.name, walk.c.suspended).order_by(walk.c.depth))
    return [One(row.name, bool(row.suspended)) for row in rows]


def line_in(name: str, parents: Mapping[str, str | None], suspended: Collection[str] = ()) -> Line:
    """The same in a picture of all tenants: name -> parent, and which are suspended."""
    found = []
    at: str | None = name
    while at is not None:
        found.append(One(at, at in suspended))
        at = parents.get(at)
    return found


def seen(parents: Mapping[str, str | None], scope: Scope) -> frozenset[str] | None:
    """The tenants among all that may be seen, by name; None: all."""
    reads = scope.reads
    if reads is None:
        return None
    return frozenset(name for name in parents if any(one.name in reads for one in line_in(name, parents)))


def find(connection: Connection, scope: Scope, name: str) -> int:
    """The row of a tenant that may be seen. Raises NotFound, the same for one that is not there."""
    t = tables.tenant.c
    row = connection.scalar(select(t.id).where(t.name == name, within(scope.reads)))
    if row is None:
        raise NotFound(f"tenant {name}")
    return int(row)


# What may be done


def to_administer(line: Line, scope: Scope) -> None:
    """Raise Forbidden unless the first of a line may be administered: by the operator, or an owner of one above it."""
    _judge(line, scope, line[1:])


def to_change(line: Line, scope: Scope) -> None:
    """Raise Forbidden unless something of the first of a line may be changed by its owner, or by one of those above."""
    _judge(line, scope, line)


def _judge(line: Line, scope: Scope, by: Line) -> None:
    if scope.writes is None:
        return
    name = line[0].name
    owned = [place for place, one in enumerate(by) if one.name in scope.writes]
    if not owned:
        raise Forbidden(f"tenant {name} is changed by whoever owns a tenant above it, or by the operator")
    if any(one.suspended for one in by[owned[-1] :]):
        raise suspended(name)


def to_write(line: Line, scope: Scope) -> None:
    """Raise Forbidden if the first of a line, whose owner this is, is suspended, or one above it."""
    if scope.writes is not None and any(one.suspended for one in line):
        raise suspended(line[0].name)


def suspended(name: str) -> Forbidden:
    """Who closed it is not told."""
    return Forbidden(f"tenant {name} is suspended: it may be read, and nothing may be changed", "suspended")


# Names: tenants and tokens share one space each, which nobody may use to find out about others.


def named_after(name: str, known: Collection[str]) -> str | None:
    """The longest of these tenants that a name begins with, a hyphen behind it."""
    parts = name.split("-")
    begins = ("-".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((each for each in begins if each in known), None)


def known_before(connection: Connection, scope: Scope, name: str) -> list[str]:
    """Those of the tenants that may be seen which a name could be named after."""
    parts = name.split("-")
    begins = ["-".join(parts[:count]) for count in range(1, len(parts))]
    t = tables.tenant.c
    return list(connection.scalars(select(t.name).where(t.name.in_(begins), within(scope.reads))))


def misnamed(kind: str, name: str, after: str, pointer: str) -> Problem:
    """What is wrong with a name that is not its tenant's."""
    message = f"{kind} {name} has to be called {after}-SOMETHING, and after no tenant below {after}"
    return Problem("bad_name", pointer, f"{message}: names are one space, and these are yours", limit=LONGEST)


# Making and setting


def place(connection: Connection, scope: Scope, name: str, parent: str | None) -> str | None:
    """The parent of a new tenant. Raises Invalid, NotFound, Forbidden, or Conflict for a name that is taken."""
    t = tables.tenant.c
    if scope.writes is not None:
        parent = parent if parent is not None else scope.tenant
        if parent is None:
            message = "name the parent, a tenant that you own or administer"
            raise Invalid([Problem("missing_key", "/parent", message)])
    if parent is not None:
        to_change(line(connection, find(connection, scope, parent)), scope)
    if parent is not None and scope.writes is not None:
        if named_after(name, known_before(connection, scope, name)) != parent:
            raise Invalid([misnamed("tenant", name, parent, "/name")])
        top = line(connection, find(connection, scope, parent))[-1].name
        _has_room(len(subtree(connection, connection.execute(select(t.id).where(t.name == top)).scalar_one())))
    if connection.scalar(select(t.id).where(t.name == name)) is not None:
        raise Conflict(f"a tenant is called {name} already: choose another name", "duplicate_name")
    return parent


def _has_room(tenants: int) -> None:
    if tenants >= MOST:
        raise Exhausted(f"{MOST} tenants are all that fit into one tree: delete some", "too_many", MOST)


def judge_quota(connection: Connection, scope: Scope, name: str, parent: str | None, quota: Quota) -> None:
    """Raise Exhausted, with the numbers, if a tenant cannot have this quota; Conflict if those above have not so much,
    of whom nothing is told."""
    state = load_state(connection)
    if not state.limited and quota == Quota():
        return
    parents, limits = {**state.parents, name: parent}, {**state.quotas, name: quota}
    nothing: Uses = {what: Counter() for what in QUOTAS}
    tree = Tree(parents, limits, state.grants, state.carriers_of(state.grants))
    bear = tree.bearing([name], [])
    names, ids = tree.counted(*bear)
    have = uses(connection, [state.tenants[one] for one in names if one in state.tenants])
    judge(tree, have, nothing, uses_of_grants(connection, ids), nothing, seen(parents, scope), bear)


# In a manifest


def declared(specs: Mapping[str, TenantSpec], state: State, scope: Scope) -> dict[str, TenantSpec]:
    """What a manifest of a tenant's token says of tenants, with the parents that it leaves out. Raises Invalid, or
    Forbidden or Conflict for what is the operator's; of tenants that are not seen as if they were not there."""
    known = seen(state.parents, scope)
    if known is None:
        return dict(specs)
    there = known | specs.keys()
    problems: list[Problem] = []
    found: dict[str, TenantSpec] = {}
    for name, spec in specs.items():
        at, up = join("tenants", name), spec.parent
        is_new = name not in known
        if is_new and up is None:
            up = scope.tenant
        if up is None and is_new:
            problems.append(Problem("missing_key", at, f"tenant {name} needs the key parent: a tenant that you own"))
        elif up is not None and up not in there:
            problems.append(Problem("missing_tenant", join("tenants", name, "parent"), f"there is no tenant {up}"))
        elif is_new and up is not None and named_after(name, there) != up:
            problems.append(misnamed("tenant", name, up, at))
        elif is_new and name in state.parents:
            raise Conflict(f"a tenant is called {name} already: choose another name", "duplicate_name")
        elif not is_new and up not in (None, state.parents[name]):
            raise Forbidden(f"the parent of tenant {name} is the operator's to change")
        found[name] = spec.model_copy(update={"parent": up if is_new else state.parents[name]})
    if problems:
        raise Invalid(problems)
    if made := found.keys() - state.parents.keys():
        parents = {**state.parents, **{name: found[name].parent for name in made}}
        tops = Counter(line_in(name, parents)[-1].name for name in parents)
        _has_room(max(tops[line_in(name, parents)[-1].name] for name in made) - 1)
    return found
