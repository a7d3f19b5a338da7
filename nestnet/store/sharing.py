"""Grants as a manifest wants them: in a network that has the key `grants`, these and no others (rule 39).

`wanted` compares them with what is stored; nothing here writes. `grants.py` carries the wishes out when the networks
are there, for a grant needs its carrier's row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from nestnet.model.errors import Conflict, Invalid, Problem
from nestnet.model.manifest import GrantSpec
from nestnet.model.problems import Nearest, join, meant
from nestnet.store import tenancy
from nestnet.store.objects import GrantRow
from nestnet.store.quotas import Quota
from nestnet.store.scope import Scope
from nestnet.store.state import State

if TYPE_CHECKING:
    from nestnet.store.plan import _Wanted


@dataclass(frozen=True, slots=True)
class GrantWish:
    """A grant to make, to change (`old`), or to take back (`quota` None). `network`: the carrier's row, or below 0
    while it is new; `path`: what leads to it from the wire; `hosts`: their names, None: all."""

    network: int
    path: str
    pointer: str
    tenant: str
    hosts: tuple[str, ...] | None
    quota: Quota | None
    old: GrantRow | None


def wanted(
    specs: Mapping[int, Mapping[str, GrantSpec] | None],
    should: _Wanted,
    parents: Mapping[str, str | None],
    state: State,
    scope: Scope,
) -> list[GrantWish]:
    """What is to change. `specs`: by network; `parents`: tenant -> parent, as it will be. Raises Invalid for tenants
    and hosts that are not there, Conflict, Forbidden."""
    problems: list[Problem] = []
    wishes: list[GrantWish] = []
    nearest, stay = Nearest(), ""
    for network, grants in specs.items():
        if grants is None:
            continue
        at, path = should.pointers["network", network], should.paths[network]
        ports = {port.name: port for port in should.contents[network].ports.values()}
        have = {row.tenant: row for row in state.grants.values() if row.carrier == network and row.tenant is not None}
        owner = should.networks[network].tenant
        for tenant, spec in grants.items():
            pointer = at + join("grants", tenant)
            there = [
                name
                for name in parents
                if scope.writes is None or any(one.name == owner for one in tenancy.line_in(name, parents)[1:])
            ]
            if tenant not in there or tenant == owner:
                near = nearest(tenant, there)
                why = (
                    f"{tenant} has the hosts already"
                    if tenant == owner
                    else f"there is no tenant {tenant}{meant(near)}"
                )
                problems.append(Problem("missing_tenant", pointer, why, nearest=near if tenant != owner else None))
                continue
            for place, host in enumerate(spec.hosts or ()):
                if host not in ports or not ports[host].hosts:
                    near = nearest(host, [name for name, port in ports.items() if port.hosts])
                    message = f"there is no host {host}{meant(near)}"
                    problems.append(Problem("missing_host", f"{pointer}/hosts/{place}", message, nearest=near))
            old = have.get(tenant)
            quota = Quota(spec.networks, spec.segments, spec.ports, spec.rate)
            hosts = tuple(sorted(spec.hosts)) if spec.hosts is not None else None
            names = {port.id: name for name, port in ports.items()}
            had = tuple(sorted(names.get(id, "") for id in old.hosts)) if old and old.hosts is not None else None
            if old is None or (old.quota, had) != (quota, hosts):
                wishes.append(GrantWish(network, path, pointer, tenant, hosts, quota, old))
        if any(wish.network == network for wish in wishes) or have.keys() - grants.keys():
            scope.to_write(owner, f"network {path}")
        for tenant, old in have.items():
            if tenant not in grants:
                left = [row for row in should.networks.values() if row.grant == old.id]
                if left:
                    stay = stay or f"{tenant} has {len(left)} networks on the hosts of {path}: its grant stays"
                wishes.append(GrantWish(network, path, at + "/grants", tenant, None, None, old))
    if problems:
        raise Invalid(problems)
    if stay:
        raise Conflict(stay, "in_use")
    return wishes


def after(wishes: Iterable[GrantWish], state: State) -> dict[int, GrantRow]:
    """All grants as they would be; new ones have rows below 0."""
    found = dict(state.grants)
    for place, wish in enumerate(wishes, 1):
        if wish.quota is None:
            assert wish.old is not None
            del found[wish.old.id]
        elif wish.old is not None:
            found[wish.old.id] = replace(wish.old, quota=wish.quota)
        else:
            found[-place] = GrantRow(-place, wish.network, wish.tenant, "", None, wish.quota, False, False, None)
    return found


def told(wishes: Sequence[GrantWish]) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """op, path, fields and pointer of each change."""
    for wish in wishes:
        path = f"{wish.path}/{wish.tenant}"
        if wish.quota is None:
            yield "-", path, {}, ""
            continue
        limits = {what: n for what, n in asdict(wish.quota).items() if n is not None}
        now = {"hosts": list(wish.hosts) if wish.hosts is not None else "all", "limits": limits}
        if wish.old is None:
            yield "+", path, now, wish.pointer
            continue
        was = {what: n for what, n in asdict(wish.old.quota).items() if n is not None}
        fields = {"limits": [was, limits]} if was != limits else {"hosts": ["others", now["hosts"]]}
        yield "~", path, fields, wish.pointer
