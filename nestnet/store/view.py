"""What a tenant sees of the whole: its own networks as if they were on the wire, and the hosts granted to it.

    stored                       as acme's tokens see it
    cloud
      acme/        tenant acme    acme/           carried by hosts that were granted
        test/      tenant acme      test/
          deep/    tenant other
            own/   tenant acme    own/

A manifest of a tenant's is put where its networks really are (`graft`): under what carries them, which is there with
all that it has and stays as it is. So one judge and one comparison serve everybody. What carries them has names that
nobody can write meanwhile, `HIDDEN` before each; whatever is said afterwards is told without them (`Told`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

from nestnet.model.errors import Conflict, Forbidden, Invalid, NestnetError, Problem
from nestnet.model.manifest import Manifest, NetworkSpec
from nestnet.model.problems import Nearest, join, meant
from nestnet.model.values import FABRIC
from nestnet.store.objects import GrantRow, NetworkRow, Networks
from nestnet.store.scope import Scope
from nestnet.store.state import State

HIDDEN = "\x00"
_ABOVE = re.compile(f"(?:[^/\\s'\"(]*/)*{HIDDEN}[^/\\s]*/")  # the way down to what is one's own, over own ones, too
_NAMED = re.compile(f"(?:network )?{HIDDEN}[^/\\s:,;]*")
_POINTER = re.compile(f"^(?:/networks/[^/]*)*/networks/{HIDDEN}[^/]*")

# What is said of machines, or of a carrier, is said of what carries it, whatever that is.
_BELOW = [
    (re.compile(f"the (?:machines' \\d+|\\d+ of {HIDDEN}\\S+) less \\d+ for VXLAN leave"), "what carries it leaves"),
    (re.compile(f"the machines(?: on {HIDDEN}\\S+)? leave"), "what carries it leaves"),
    (re.compile(r"may meet \d+ rates on its way \([^)]*\)"), "may meet too many rates on its way"),
]


# What a segment rides on.
_ON = re.compile(r" \(it is on [^)]*\)|: it has no trunk to \S+|, and machines could not tell two routers apart")


class Placed(NamedTuple):
    """Where a network is stored, or will be: what carries it, by which grant, and whose it is."""

    carrier: int
    grant: GrantRow | None
    owner: str | None


def is_top(row: NetworkRow, networks: Networks, scope: Scope) -> bool:
    """Is it one of those with which paths begin, for this reader?"""
    carrier = networks.get(row.carrier)
    return scope.may_read(row.tenant) and (carrier is None or not scope.may_read(carrier.tenant))


def tops(state: State, scope: Scope, names: Collection[str] | None = None) -> dict[str, NetworkRow]:
    """The networks with which a reader's paths begin, by name: all, or those called so. What carries them is known by
    `hide`."""
    if scope.reads is None:
        state.networks.know_named(FABRIC, names or ())
        found = [state.networks.named(FABRIC, name) for name in names or ()]
        return {row.name: row for row in found if row is not None}
    return {row.name: row for row in state.networks.of(scope.reads, names) if is_top(row, state.networks, scope)}


def hide(state: State, scope: Scope) -> None:
    """Give all networks that are not in scope, and carry some that are, names that nobody can write."""
    below = [grant.carrier for grant in granted(state, scope)]
    for id in sorted(state.networks.under(scope.reads or (), below)):
        row = state.networks[id]
        if not scope.may_read(row.tenant):
            state.networks.put(replace(row, name=f"{HIDDEN}{row.name}"))


def leave_out(state: State, carriers: Iterable[int], tops: Iterable[NetworkRow]) -> None:
    """Let networks carry only what somebody's manifest is about: these of theirs, and what leads down from there and
    from these carriers. All else stays as it is, however much that is."""
    own = [row.id for row in tops]
    leave_all_but(state, [*carriers, *own], state.networks.above(own))


def leave_all_but(state: State, carriers: Iterable[int], about: Iterable[int]) -> None:
    """Let networks carry only these, and what leads down from these carriers, themselves included."""
    kept = set(about)
    for here in (*carriers, *kept):
        while here != FABRIC and state.networks[here].carrier not in kept:
            kept.add(here)
            here = state.networks[here].carrier
        kept |= {here} - {FABRIC}
    state.networks.leave_out_all_but(kept)


def still(state: State, carriers: Iterable[int], scope: Scope) -> set[int]:
    """Of these carriers, and what carries them, those that stay as they are whatever this writer wants, down to the
    machines."""
    found: set[int] = set()
    for carrier in carriers:
        for id in reversed(list(state.below(carrier))):
            if scope.may_read(state.networks[id].tenant):
                break
            found.add(id)
    return found


def granted(state: State, scope: Scope) -> list[GrantRow]:
    """The grants by which a writer's networks may be carried."""
    return [row for row in state.grants.values() if row.tenant is not None and scope.may_write(row.tenant)]


def hosts_of(state: State, grant: GrantRow, ports: Mapping[str, int]) -> dict[str, int]:
    """The hosts of a grant, by name. `ports`: the carrier's host ports, by name."""
    there = state.machines if grant.carrier == FABRIC else ports
    return {name: id for name, id in there.items() if grant.hosts is None or id in grant.hosts}


def carried_by(spec: NetworkSpec, name: str, old: NetworkRow | None, state: State, scope: Scope) -> Placed:
    """Where a network with which a manifest begins belongs; `old`: as it is. Raises Forbidden, Invalid."""
    owner = (old.tenant if old is not None else None) or spec.tenant or scope.tenant
    if not scope.may_write(owner):
        if old is None and owner is not None:
            raise Forbidden(f"network {name} would be another tenant's: name one of your own")
        return Placed(old.carrier if old is not None else FABRIC, None, owner)  # whoever judges the scope says so
    own = [row for row in state.grants.values() if row.tenant == owner]
    if old is not None:
        return Placed(old.carrier, next((row for row in own if row.carrier == old.carrier), None), owner)
    if spec.grant is not None:
        one = next((row for row in own if row.name == spec.grant), None)
        if one is None:
            near = Nearest()(spec.grant, [row.name for row in own])
            message = f"tenant {owner} has no grant {spec.grant}{meant(near)}"
            raise Invalid([Problem("missing_grant", join("networks", name, "grant"), message, nearest=near)])
        return Placed(one.carrier, one, owner)
    if not own:
        raise Forbidden(
            f"tenant {owner} has no hosts: whoever runs some grants them to it, or sends an invitation for "
            "`nestnet redeem`"
        )
    if len(own) > 1:
        names = ", ".join(sorted(row.name for row in own))
        message = f"which hosts carry {name}? give `grant`, one of {names}"
        raise Invalid([Problem("missing_key", join("networks", name), message)])
    return Placed(own[0].carrier, own[0], owner)


def graft(
    manifest: Manifest,
    places: Mapping[str, Placed],
    gone: Collection[int],
    state: State,
    spec_of: Callable[[NetworkRow], NetworkSpec],
) -> Manifest:
    """The manifest with its networks where they are stored. `gone`: networks to leave out; `spec_of` says a stored
    network as a manifest has it, its collections absent."""
    at: dict[int, dict[str, NetworkSpec]] = {}

    def within(network: int) -> dict[str, NetworkSpec]:
        """What is carried there, to be completed; itself is put where it belongs first."""
        if network not in at:
            at[network] = {}
            if network != FABRIC:
                there = state.networks.carried(network)
                left = {name: row for name, row in there.items() if row.id not in gone and row.id not in at}
                at[network].update({name: spec_of(row) for name, row in left.items()})
                row = state.networks[network]
                above = within(row.carrier)
                above[row.name] = spec_of(row).model_copy(update={"networks": at[network]})
        return at[network]

    for carrier in (*(place.carrier for place in places.values()), *(state.networks[id].carrier for id in gone)):
        within(carrier)
    for name, spec in (manifest.networks or {}).items():
        place, old = places[name], state.networks.named(places[name].carrier, name)
        # On granted hosts carriage is not the tenant's to say: it stays.
        fixed = {"carriage": None} if place.grant is not None else {}
        mine = spec.model_copy(update={"tenant": spec.tenant or place.owner, **fixed})
        within(place.carrier)[name] = _carrying(mine, at.get(old.id) if old is not None else None)
    return manifest.model_copy(update={"networks": within(FABRIC)})


def _carrying(mine: NetworkSpec, there: dict[str, NetworkSpec] | None) -> NetworkSpec:
    """A network as its owner wants it, with what is carried `there` where others' networks on it carry more of that
    manifest. None: they do not. What the owner leaves out stays out."""
    if there is None:
        return mine
    if mine.networks is None:
        return mine.model_copy(update={"networks": there})
    inside = {
        name: _carrying(one, there[name].networks if name in there else None) for name, one in mine.networks.items()
    }
    return mine.model_copy(update={"networks": inside})


class Told:
    """What is said to somebody who must not learn of what carries their networks."""

    def text(self, text: str) -> str:
        for what, words in _BELOW:
            text = what.sub(words, text)
        text = _ON.sub("", text)
        return _NAMED.sub("what carries it", _ABOVE.sub("", text))

    def pointer(self, pointer: str) -> str:
        return _POINTER.sub("", pointer)

    def data(self, value: Any) -> Any:
        """The same in all texts of plain data."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list | tuple):
            return [self.data(one) for one in value]
        if isinstance(value, dict):
            return {self.text(key) if isinstance(key, str) else key: self.data(one) for key, one in value.items()}
        return value

    def error(self, error: NestnetError) -> NestnetError:
        if isinstance(error, Invalid):
            return Invalid(list(dict.fromkeys(self.problem(one) for one in error.problems)))
        told = copy(error)
        told.message = self.text(error.message)
        if isinstance(told, Conflict):
            told.dependants = tuple(map(self.text, told.dependants))
        return told

    def problem(self, problem: Problem) -> Problem:
        if problem.code == "missing_trunk":
            problem = replace(problem, code="not_a_host")
        near = self.text(problem.nearest) if problem.nearest is not None else None
        return replace(problem, pointer=self.pointer(problem.pointer), message=self.text(problem.message), nearest=near)


def physical(networks: Mapping[str, NetworkSpec], above: str = "") -> Iterator[Problem]:
    """Where a manifest of who runs no machines says what a segment rides on."""
    for name, spec in networks.items():
        at = above + join("networks", name)
        for segment, one in (spec.segments or {}).items():
            if one.vlan is not None:
                message = "what segments ride on is for whoever runs the machines to say: leave vlan out"
                yield Problem("bad_value", f"{at}/segments/{segment}/vlan", message)
        yield from physical(spec.networks or {}, at)


def beyond_grants(manifest: Manifest, hosts: Mapping[str, Mapping[str, Collection[int]]]) -> Iterator[Problem]:
    """What networks with which a manifest begins want of hosts that these do not give, said in one way whether they are
    machines or ports. `hosts`: network -> name of a granted host -> the families of its addresses."""
    nearest = Nearest()
    for network, there in hosts.items():
        spec = (manifest.networks or {})[network]
        for name, port in (spec.ports or {}).items():
            at = join("networks", network, "ports", name, "host")
            if port.host not in there:
                near = nearest(port.host, there)
                yield Problem("missing_host", at, f"there is no host {port.host}{meant(near)}", nearest=near)
            elif spec.underlay not in (None, *there[port.host]):
                yield Problem(
                    "host_family", at, f"host {port.host} has no IPv{spec.underlay} address to carry {network}"
                )
        if spec.carriage == "encapsulated":
            message = "how granted hosts carry it is for whoever granted them to say: leave carriage out"
            yield Problem("bad_value", join("networks", network, "carriage"), message)
