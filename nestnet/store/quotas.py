"""Quotas of tenants (rule 29): own use + what is reserved for children <= limit.

A tenant without a limit of its own draws on the nearest ancestor's. What a child may have is reserved from its
parent's the moment it is given, used or not; so nobody's limit can be used up by somebody else.

The rate is what all ports of its networks may send, by their own `rate`; a port without one counts as the greatest rate
that there is, so under a limit each has to have one.

A plan judges what would be. The writer plans again when the revision has moved since, so of a hundred who want the
last port exactly one gets it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nestnet.model.errors import Conflict, Exhausted
from nestnet.model.rates import RATE, rate_text
from nestnet.model.values import FABRIC

QUOTAS = ("networks", "segments", "ports", "rate")
Uses = dict[str, Counter[Any]]
"""What -> tenant, or a grant's row -> how many it has."""


@dataclass(frozen=True, slots=True)
class Quota:
    """How many a tenant may have of each; None: as many as the tenants above it have left."""

    networks: int | None = None
    segments: int | None = None
    ports: int | None = None
    rate: int | None = None
    """In bit/s."""

    def limit(self, what: str) -> int | None:
        found: int | None = getattr(self, what)
        return found


def rate_of(port: int) -> int:
    """What a port of this `rate` counts, in bit/s. 0: it has none."""
    return port or RATE[1]


def amount(what: str, n: int) -> str:
    """12 ports, or a rate of 10mbit."""
    return f"a rate of {rate_text(n)}" if what == "rate" else f"{n} {what}"


class Place(Protocol):
    """A network as far as quotas go: whose it is, and which grant it counts under."""

    @property
    def tenant(self) -> str | None: ...
    @property
    def grant(self) -> int | None: ...


class Given(Protocol):
    """A grant as far as quotas go."""

    @property
    def carrier(self) -> int: ...
    @property
    def tenant(self) -> str | None: ...
    @property
    def quota(self) -> Quota: ...


class Tree:
    """Who hands on what to whom: tenants to those below them, and to those whom they grant hosts."""

    def __init__(
        self,
        parents: Mapping[str, str | None],
        quotas: Mapping[str, Quota],
        grants: Mapping[int, Given],
        networks: Mapping[int, Place],
    ) -> None:
        self.parents = parents
        self.quotas = quotas
        self.grants = grants
        self._networks = networks
        self._children: dict[str, list[str]] = defaultdict(list)
        self._given: dict[str, list[int]] = defaultdict(list)  # tenant -> its grants to those that are not below it
        self._made_from: dict[int, list[int]] = defaultdict(list)  # grant -> those made from it
        for name, parent in parents.items():
            if parent is not None:
                self._children[parent].append(name)
        for id, grant in grants.items():
            if grant.carrier == FABRIC:
                continue
            place = networks[grant.carrier]
            if place.tenant is not None and not self.is_below(grant.tenant, place.tenant):
                self._given[place.tenant].append(id)
            if place.grant is not None:
                self._made_from[place.grant].append(id)

    def gives(self, tenant: str) -> bool:
        """Has it granted hosts to tenants that are not below it?"""
        return bool(self._given.get(tenant))

    def grantor(self, id: int) -> str | None:
        """Whose hosts a grant is of; None: the operator's."""
        carrier = self.grants[id].carrier
        return self._networks[carrier].tenant if carrier != FABRIC else None

    def is_below(self, tenant: str | None, other: str) -> bool:
        """Is a tenant another one, or below it?"""
        while tenant is not None and tenant != other:
            tenant = self.parents.get(tenant)
        return tenant is not None

    def bearing(self, tenants: Iterable[str], grants: Iterable[int]) -> tuple[set[str], set[int]]:
        """The tenants and grants of whose limits something is used up when these use up more."""
        lines, given = list(tenants), list(grants)
        bear: tuple[set[str], set[int]] = (set(), set())
        while lines or given:
            if given:
                id = given.pop()
                if id in bear[1]:
                    continue
                bear[1].add(id)
                if (carrier := self.grants[id].carrier) != FABRIC:
                    place = self._networks[carrier]
                    lines += [place.tenant] if place.tenant is not None else []
                    given += [place.grant] if place.grant is not None else []
            elif (tenant := lines.pop()) not in bear[0]:
                bear[0].add(tenant)
                if (parent := self.parents.get(tenant)) is not None:
                    lines.append(parent)
        return bear

    def counted(self, tenants: Iterable[str], grants: Iterable[int]) -> tuple[set[str], set[int]]:
        """The tenants and grants whose uses say what those of these that have a limit use up: with all that is handed
        on without one."""

        def open_ended(quota: Quota) -> bool:
            return any(quota.limit(what) is None for what in QUOTAS)

        down = [name for name in tenants if self.quotas[name] != Quota()]
        given = [id for id in grants if self.grants[id].quota != Quota()]
        names, ids = set(down), set(given)
        for name in down:
            more = [one for one in self._children.get(name, ()) if one not in names and open_ended(self.quotas[one])]
            down += more
            names.update(more)
            given += (fresh := [id for id in self._given.get(name, ()) if id not in ids])
            ids.update(fresh)
        for id in given:
            given += (fresh := [one for one in self._made_from.get(id, ()) if one not in ids])
            ids.update(fresh)
        return names, ids

    def charge(self, tenant: str, what: str, own: Counter[str], under: Counter[int]) -> int:
        """What a tenant uses up of its limit: its own, and of each child the limit, or what that uses up without one;
        so of each grant to others."""
        total = own[tenant]
        for child in self._children.get(tenant, ()):
            limit = self.quotas[child].limit(what)
            total += limit if limit is not None else self.charge(child, what, own, under)
        return total + sum(self._of_grant(id, what, under) for id in self._given.get(tenant, ()))

    def charge_of_grant(self, id: int, what: str, under: Counter[int]) -> int:
        """What is used up of a grant's limit: what counts under it, and the limits of those made from it."""
        return under[id] + sum(self._of_grant(each, what, under) for each in self._made_from.get(id, ()))

    def _of_grant(self, id: int, what: str, under: Counter[int]) -> int:
        limit = self.grants[id].quota.limit(what)
        return limit if limit is not None else self.charge_of_grant(id, what, under)


def judge(
    tree: Tree,
    have: Uses,
    more: Uses,
    under: Uses,
    more_under: Uses,
    seen: Collection[str] | None = None,
    only: tuple[Collection[str], Collection[int]] | None = None,
) -> None:
    """Raise Exhausted if tenants, or grants, would have more than they may: `only` these, None: any. `more` is what is
    added to what they have. Of tenants that are not in `seen`, None: all are, neither name nor number is told."""
    hidden = ""
    for what in QUOTAS:
        own, granted = Counter(have[what]), Counter(under[what])
        own.update(more[what])
        granted.update(more_under[what])
        text = rate_text if what == "rate" else str
        hint = f"; a port without `rate` counts as {rate_text(RATE[1])}" if what == "rate" else ""
        for name in tree.parents if only is None else [name for name in tree.parents if name in only[0]]:
            limit = tree.quotas[name].limit(what)
            if limit is None or (wanted := tree.charge(name, what, own, granted)) <= limit:
                continue
            if seen is not None and name not in seen:
                hidden = hidden or what
                continue
            now = have[what][name]
            reserved = wanted - own[name]
            message = f"tenant {name} may have {amount(what, limit)}; it has {text(now)}"
            if reserved:
                message += f", {text(reserved)} are reserved or used by the tenants below it"
                message += " and those that it has granted hosts" if tree.gives(name) else ""
            if added := own[name] - now:
                message += f", and this asks for {text(added)} more"
            raise Exhausted(f"{message}: that is {text(wanted)} in all{hint}", "quota_exceeded", limit)
        for id in tree.grants if only is None else [id for id in tree.grants if id in only[1]]:
            grant = tree.grants[id]
            limit = grant.quota.limit(what)
            if limit is None or (wanted := tree.charge_of_grant(id, what, granted)) <= limit:
                continue
            if seen is not None and not {grant.tenant, tree.grantor(id)} & set(seen):
                hidden = hidden or what
                continue
            now = under[what][id]
            reserved = wanted - granted[id]
            message = f"these hosts are granted for {amount(what, limit)}; there are {text(now)}"
            message += (
                f", {text(reserved)} are reserved or used by those to whom they were handed on" if reserved else ""
            )
            if added := granted[id] - now:
                message += f", and this asks for {text(added)} more"
            raise Exhausted(f"{message}: that is {text(wanted)} in all{hint}", "quota_exceeded", limit)
    if hidden:
        much = "high a rate" if hidden == "rate" else f"many {hidden}"
        raise Conflict(f"the tenants above have not so {much} left: ask them for more", "quota_exceeded")
