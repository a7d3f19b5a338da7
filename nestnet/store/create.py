"""New networks, many at once: plain ones become rows by themselves (plain.py), all others go by a plan.

What several people want at once is made in one transaction: its statements are the same for one network and for a
thousand. If one of these is not plain, or fails, each is made by itself.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Select, Update, bindparam, func, select, update
from sqlalchemy.exc import IntegrityError

from nestnet.model.errors import Exhausted, Forbidden, Invalid, NestnetError, Problem
from nestnet.model.lines import Lines
from nestnet.model.lines import read as columns
from nestnet.model.manifest import API_VERSION, parse
from nestnet.model.problems import join, split
from nestnet.model.strict import read_json
from nestnet.model.values import FABRIC, MAX_DEPTH
from nestnet.store import events, numbers, objects, once, plain, plan, tables, tenancy, usage, view, write
from nestnet.store.identity import Identity
from nestnet.store.objects import WIRE, GrantRow, NetworkRow
from nestnet.store.once import Asked
from nestnet.store.plain import Place
from nestnet.store.plan import Change
from nestnet.store.quotas import QUOTAS, Tree, Uses, judge, rate_of
from nestnet.store.scope import Scope
from nestnet.store.state import NAMES, State, load_owners

PART = 1000  # Networks of a batch that are made in one transaction.

Commit = Callable[[Callable[[Connection], Any]], Any]
Answer = dict[str, int]
"""`revision`, and `first` and `count`: the row of the first network, and how many there are."""


class NotPlain(Exception):
    """Something of this goes by a plan."""


@dataclass(frozen=True)
class Job:
    """Lines, each a network, that somebody wants made: all of them or none. `plain`: what they say, if all of them may
    be plain."""

    lines: Sequence[bytes]
    asked: Asked
    plain: Lines | None
    first_line: int = 1

    @property
    def request(self) -> str:
        """What tells it from all others."""
        return sha256(b"create\n" + b"\n".join(self.lines)).hexdigest()


def job(lines: Sequence[bytes], asked: Asked, first_line: int = 1) -> Job:
    """What somebody wants. Problems point to lines, by numbers from `first_line`."""
    return Job(lines, asked, columns(lines), first_line)


def make_plain(connection: Connection, identity: Identity, jobs: Sequence[Job]) -> list[Answer]:
    """Make what all of these want. Raises NotPlain, or what claiming a key raises; then nothing of it may be kept."""
    answers: list[Answer | None] = [once.claim(connection, one.asked, one.request) for one in jobs]
    todo = [place for place, answer in enumerate(answers) if answer is None]
    try:
        for place, answer in zip(todo, _make(connection, identity, [jobs[place] for place in todo]), strict=True):
            once.keep(connection, jobs[place].asked, answer)
            answers[place] = answer
    except (IntegrityError, Exhausted):
        raise NotPlain from None
    return [answer for answer in answers if answer is not None]


def _make(connection: Connection, identity: Identity, jobs: Sequence[Job]) -> list[Answer]:
    wanted: dict[_Key, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    keyed: list[tuple[Job, Lines, list[_Key]]] = []
    counts: Counter[str] = Counter()
    for one in jobs:
        if one.plain is None or one.asked.etags is not None:
            raise NotPlain
        keys = [(one.asked.scope, goal.carrier, goal.tenant) for goal in one.plain.goals]
        keyed.append((one, one.plain, keys))
        for key, goal in zip(keys, one.plain.goals, strict=True):
            names, hosts = wanted[key]
            names.update(goal.names)
            hosts.update(goal.hosts)
        counts.update(plain.count(one.plain))
    if not keyed:
        return []
    state = load_owners(connection)
    places = _Places(connection, state, wanted).found
    domains: Counter[int] = Counter()
    used: dict[usage.Owner, Counter[str]] = defaultdict(Counter)
    for _, lines, keys in keyed:
        for key, goal in zip(keys, lines.goals, strict=True):
            place = places[key]
            domains[place.domain] += goal.segments
            there = used[place.tenant or 0, place.grant or 0]
            there["networks"] += len(goal.names)
            there["segments"] += goal.segments
            there["ports"] += goal.ports
            there["rate"] += goal.ports * rate_of(0)
    if state.limited:
        _judge(connection, state, used)
    domains = +domains
    numbers.open_new(connection, domains)
    vnis = {domain: iter(numbers.cut(connection, domain, count)) for domain, count in domains.items()}
    first = write.reserve_all(connection, {kind: counts[kind] for kind in plain.KINDS if counts[kind]})
    revision = write.next_revision(connection, [])
    rows = plain.Rows(identity, revision, dict(first), vnis)
    answers: list[Answer] = []
    told: list[tuple[str, Sequence[Change]]] = []
    for one, lines, keys in keyed:
        answers.append({"revision": revision, "first": rows.first["network"], "count": len(lines.networks)})
        if not rows.add(lines, [places[key] for key in keys]):
            raise NotPlain
        above = [state.path(places[key].carrier) for key in keys]
        paths = [f"{above[goal]}/{name}" if above[goal] else name for goal, name, *_ in lines.networks]
        told.append((one.asked.who, [Change("+", "network", path, {}) for path in paths]))
    rows.write(connection)
    made = [{"counted": kind, "more": len(rows.rows[kind])} for kind in plain.KINDS if kind != "group"]
    connection.execute(_counted(), made)
    usage.add(connection, used)
    events.all_changed(connection, "create", revision, told)
    return answers


@cache
def _counted() -> Update:
    c = tables.tally.c
    return update(tables.tally).where(c.kind == bindparam("counted")).values(n=c.n + bindparam("more"))


def _judge(connection: Connection, state: State, used: Mapping[usage.Owner, Mapping[str, int]]) -> None:
    """Raises Exhausted if so much more is more than somebody may have. Who may know what of it, a plan knows."""
    names = {id: name for name, id in state.tenants.items()}
    more: Uses = {what: Counter() for what in QUOTAS}
    under: Uses = {what: Counter() for what in QUOTAS}
    for (tenant, grant), counts in used.items():
        for what, n in counts.items():
            more[what].update({names[tenant]: n} if tenant else {})
            under[what].update({grant: n} if grant else {})
    tree = Tree(state.parents, state.quotas, state.grants, state.carriers_of(state.grants))
    bear = tree.bearing(more["networks"], under["networks"])
    owners, grants = tree.counted(*bear)
    have = usage.uses(connection, [state.tenants[name] for name in owners])
    judge(tree, have, more, usage.uses_of_grants(connection, grants), under, None, bear)


def make_each(commit: Commit, identity: Identity, jobs: Sequence[Job]) -> list[Answer | Exception]:
    """What comes of each: its answer, or why nothing of it is there. `commit` does something in one transaction."""
    found: dict[int, Answer | Exception] = {}
    plain_ones = [place for place, one in enumerate(jobs) if one.plain is not None]
    if len(plain_ones) > 1:
        try:
            answers = commit(lambda connection: make_plain(connection, identity, [jobs[place] for place in plain_ones]))
            found = dict(zip(plain_ones, answers, strict=True))
        except (NotPlain, NestnetError):  # Whose fault it is, and what to say to them, is found out one by one.
            pass
    return [found[place] if place in found else _make_one(commit, identity, one) for place, one in enumerate(jobs)]


def _make_one(commit: Commit, identity: Identity, one: Job) -> Answer | Exception:
    def plainly(connection: Connection) -> Answer:
        return make_plain(connection, identity, [one])[0]

    def planned(connection: Connection) -> Answer:
        if (said := once.claim(connection, one.asked, one.request)) is not None:
            return said  # type: ignore[no-any-return]
        answer = make_by_plan(connection, identity, one)
        once.keep(connection, one.asked, answer)
        return answer

    try:
        if one.plain is not None:
            with contextlib.suppress(NotPlain):
                return commit(plainly)  # type: ignore[no-any-return]
        return commit(planned)  # type: ignore[no-any-return]
    except Exception as error:
        return error


# Where they go

_Key = tuple[Scope, str | None, str | None]
"""Whose, on what (a path, None: the wire or what was granted), and for which tenant (None: nobody says)."""


class _Places:
    """What new networks are put on. Raises NotPlain unless all of it is there and open."""

    def __init__(self, connection: Connection, state: State, wanted: Mapping[_Key, tuple[set[str], set[str]]]) -> None:
        """`wanted`: the names of the networks, and of the hosts that they name, by where they go."""
        self._connection, self._state = connection, state
        self._fabric = objects.fabric(connection)
        self._left: dict[int, int] = {FABRIC: self._fabric.left}
        self._depth: dict[int, int] = {FABRIC: 0}
        below = self._carriers(wanted)
        # On the wire there is nothing to read; a tenant that is there is answered in as many statements all the same.
        self._asked = [key for key in wanted if below[key][0].id != FABRIC or key[0].writes is not None]
        if self._asked:
            state.networks.know(below[key][0].id for key in self._asked)
        hosts = self._hosts(below, wanted)
        self.found = {key: self._place(key, *below[key], hosts) for key in wanted}

    def _carriers(
        self, wanted: Mapping[_Key, tuple[set[str], set[str]]]
    ) -> dict[_Key, tuple[NetworkRow, GrantRow | None]]:
        """What carries them, and the grant by which it does, to who does not see it."""
        found: dict[_Key, tuple[NetworkRow, GrantRow | None]] = {}
        paths: dict[Scope, dict[str, list[_Key]]] = defaultdict(lambda: defaultdict(list))
        for key in wanted:
            scope, path, tenant = key
            if path is not None:
                paths[scope][path].append(key)
            elif scope.writes is None:
                found[key] = (WIRE, None)
            else:
                found[key] = self._granted(scope, tenant, wanted[key][0])
        for scope, keys in paths.items():
            for path, row in self._walk(scope, [*keys]).items():
                found.update(dict.fromkeys(keys[path], (row, None)))
        return found

    def _granted(self, scope: Scope, tenant: str | None, names: set[str]) -> tuple[NetworkRow, GrantRow]:
        """What a tenant was granted, if that is hosts of one carrier, and nothing of its own is called so anywhere."""
        owner = tenant or scope.tenant
        own = [row for row in self._state.grants.values() if row.tenant == owner]
        if owner is None or not scope.may_write(owner) or len(own) != 1:
            raise NotPlain
        if scope.reads is None or self._state.networks.of(scope.reads, names):
            raise NotPlain
        self._state.networks.know([own[0].carrier])
        return self._state.networks.get(own[0].carrier) or WIRE, own[0]

    def _walk(self, scope: Scope, paths: Sequence[str]) -> dict[str, NetworkRow]:
        """The networks of these paths, a level at a time."""
        at: dict[str, int] = dict.fromkeys(paths, FABRIC)
        steps = {path: path.split("/") for path in paths}
        networks = self._state.networks
        if scope.reads is not None:
            tops: dict[str, list[NetworkRow]] = defaultdict(list)
            rows = networks.of(scope.reads, {parts[0] for parts in steps.values()})
            networks.know(row.carrier for row in rows)
            for row in rows:
                if view.is_top(row, networks, scope):
                    tops[row.name].append(row)
            if any(len(tops[parts[0]]) != 1 for parts in steps.values()):
                raise NotPlain
            at = {path: tops[parts.pop(0)][0].id for path, parts in steps.items()}
        found: dict[str, NetworkRow] = {}
        for depth in range(MAX_DEPTH + 1):
            going = {path: (at[path], parts[depth]) for path, parts in steps.items() if depth < len(parts)}
            networks.know_pairs(going.values())
            for path, (carrier, name) in going.items():
                there = networks.named_stored(carrier, name)
                if there is None or not scope.may_read(there.tenant):
                    raise NotPlain
                at[path] = there.id
        for path, id in at.items():
            found[path] = networks[id]
            if not scope.may_write(found[path].tenant):
                raise NotPlain
        return found

    def _hosts(
        self,
        below: Mapping[_Key, tuple[NetworkRow, GrantRow | None]],
        wanted: Mapping[_Key, tuple[set[str], set[str]]],
    ) -> dict[int, dict[str, int]]:
        """Carrier -> its hosts that something of this may live on, by name."""
        carriers = sorted({below[key][0].id for key in self._asked})
        found: dict[int, dict[str, int]] = {carrier: {} for carrier in (FABRIC, *carriers)}
        for some in objects.chunks(carriers):
            for few in objects.chunks(sorted({name for key in self._asked for name in wanted[key][1]})):
                for row in self._connection.execute(_ports(), {"networks": some, "names": few}):
                    found[row.network][row.name] = row.id
        for few in list(objects.chunks(sorted({name for _, hosts in wanted.values() for name in hosts}))) or [[]]:
            found[FABRIC].update((row.name, row.id) for row in self._connection.execute(_machines(), {"names": few}))
        return found

    def _place(
        self, key: _Key, carrier: NetworkRow, granted: GrantRow | None, hosts: Mapping[int, dict[str, int]]
    ) -> Place:
        (scope, path, tenant), state = key, self._state
        owner = carrier.tenant if carrier.id != FABRIC else None
        if granted is not None:
            whose: str | None = granted.tenant
            grant: int | None = granted.id
        else:
            whose = tenant or (owner if path is not None else None)
            if whose != owner and scope.writes is not None:
                raise NotPlain
            own = [row.id for row in state.grants.values() if (row.carrier, row.tenant) == (carrier.id, whose)]
            grant = own[0] if own and whose != owner else carrier.grant
        if whose is not None and whose not in state.tenants:
            raise NotPlain
        self._open(scope, whose, grant)
        if self._deep(carrier.id) >= MAX_DEPTH:
            raise NotPlain
        there = hosts[carrier.id]
        if granted is not None and granted.hosts is not None:
            there = {name: id for name, id in there.items() if id in granted.hosts}
        return Place(
            carrier.id,
            objects.domain_in(state.networks, carrier.id),
            state.tenants[whose] if whose is not None else None,
            grant,
            self._fabric.family if carrier.id == FABRIC and there else 4,
            self._leaves(carrier.id),
            there,
            carrier.id == FABRIC,
        )

    def _open(self, scope: Scope, tenant: str | None, grant: int | None) -> None:
        """Raises NotPlain if something is closed."""
        state = self._state
        if tenant is not None and scope.writes is not None:
            try:
                tenancy.to_write(tenancy.line_in(tenant, state.parents, state.suspended), scope)
            except Forbidden:
                raise NotPlain from None
        here = grant
        while here is not None:
            if not state.grants[here].is_open:
                raise NotPlain
            below = state.networks.get(state.grants[here].carrier)
            here = below.grant if below is not None else None

    def _deep(self, network: int) -> int:
        if network not in self._depth:
            self._depth[network] = self._deep(self._state.networks[network].carrier) + 1
        return self._depth[network]

    def _leaves(self, network: int) -> int:
        """Bytes of IP that a network that this one carries gets."""
        if network not in self._left:
            row = self._state.networks[network]
            carrier = self._state.networks.get(row.carrier) or WIRE
            self._left[network] = objects.left_by(carrier, self._leaves(row.carrier), row)
        return self._left[network]


@cache
def _ports() -> Select[Any]:
    """Hosts in networks, by their names."""
    p, a, s = tables.port.c, tables.address.c, tables.segment.c
    return (
        select(p.network, p.id, p.name)
        .join_from(tables.port, tables.segment, p.segment == s.id)
        .join(tables.address, a.port == p.id)
        .where(p.hosts.is_(True), s.physical.is_(None), a.address.not_like("%:%"))
        .where(p.network.in_(bindparam("networks", expanding=True)), p.name.in_(NAMES))
    )


@cache
def _machines() -> Select[Any]:
    """Machines by their names, and one of all that there are."""
    c, any = tables.machine.c, tables.machine.alias()
    one = select(func.min(any.c.id)).where(any.c.domain == FABRIC).scalar_subquery()
    return select(c.id, c.name).where(c.domain == FABRIC, c.name.in_(NAMES) | (c.id == one))


# The long way


def make_by_plan(connection: Connection, identity: Identity, one: Job) -> Answer:
    """Make what a job wants by a plan. Raises what that raises; problems point into the lines."""
    first_line = one.first_line
    data = [_read(line, number) for number, line in enumerate(one.lines, first_line)]
    tree, lines = _tree(data, first_line)
    try:
        manifest = parse({"apiVersion": API_VERSION, "networks": tree})
        work = plan.make(connection, manifest, False, one.asked.scope, new=set(lines))
    except Invalid as error:
        raise Invalid([_moved(problem, lines) for problem in error.problems]) from None
    revision = write.write(connection, identity, work.pairs, work.tenants)
    made = [change for change in work.audited if change.op == "+" and change.kind == "network"]
    events.all_changed(connection, "create", revision, [(one.asked.who, made)])
    n = tables.network.c
    rows = connection.scalars(select(n.id).where(n.revision == revision, n.version == 1).order_by(n.id)).all()
    return {"revision": revision, "first": rows[0], "count": len(made)}


def _read(line: bytes, number: int) -> dict[str, Any]:
    at = f"/{number}"
    try:
        data = read_json(line)
    except Invalid as error:
        raise Invalid([Problem(one.code, at, one.message) for one in error.problems]) from None
    if not isinstance(data, dict):
        raise Invalid([Problem("wrong_type", at, "is no mapping: a line is a network, with its name")])
    problems = []
    if not isinstance(data.get("name"), str):
        problems.append(Problem("missing_key", at, "needs the key name"))
    if not isinstance(data.get("carrier", ""), str) or data.get("carrier") == "":
        problems.append(
            Problem("bad_value", f"{at}/carrier", "carrier is the path of a network: leave it out for none")
        )
    if problems:
        raise Invalid(problems)
    return data


def _tree(data: Sequence[dict[str, Any]], first_line: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The networks as those of a manifest, and pointer -> line of each that is to be made."""
    top: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for number, given in enumerate(data, first_line):
        spec = {key: value for key, value in given.items() if key not in ("name", "carrier")}
        level, at = top, ""
        for name in given["carrier"].split("/") if "carrier" in given else ():
            at += join("networks", name)
            level = level.setdefault(name, {}).setdefault("networks", {})
            if not isinstance(level, dict):  # It is wrong, and is told so where it stands.
                level = {}
        at += join("networks", given["name"])
        if at in lines:
            message = f"line {lines[at]} has network {given['name']} there already: names are unique"
            raise Invalid([Problem("duplicate_key", f"/{number}/name", message)])
        lines[at] = number
        there = level.get(given["name"], {})
        level[given["name"]] = {**spec, **({"networks": _both(spec, there)} if "networks" in there else {})}
    return top, lines


def _both(spec: Mapping[str, Any], there: Mapping[str, Any]) -> Any:
    """What a line says it carries, and what other lines say that it does."""
    own = spec.get("networks", {})
    return {**there["networks"], **own} if isinstance(own, dict) else own


def _moved(problem: Problem, lines: Mapping[str, int]) -> Problem:
    """The same, with the number of its line in place of the way to its network."""
    parts = split(problem.pointer)
    for end in range(len(parts), 0, -1):
        if (line := lines.get(join(*parts[:end]))) is not None:
            rest = join(*parts[end:]) if parts[end:] else ""
            return Problem(problem.code, f"/{line}{rest}", problem.message, problem.limit, problem.nearest)
    return problem
