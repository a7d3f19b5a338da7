"""A manifest compared with what is stored.

    complete     absent collections filled in from the store (rule 39), then validated as a whole
    wanted       every object as the row it should be; addresses and MACs once allocated stay
    difference   (old row, new row) pairs, and the same told in people's words

Nothing here writes. A plan is made for one revision; `write.py` executes it if that is still the current one.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from ipaddress import ip_address, ip_network
from itertools import count
from typing import Any, Literal

from sqlalchemy import Connection, select

from nestnet.model.canonical import labels_text, policy_text, selector_order
from nestnet.model.errors import Conflict, Forbidden, Invalid, NestnetError, NotFound, Problem
from nestnet.model.manifest import (
    AttachSpec,
    GrantSpec,
    LinkSpec,
    MachineSpec,
    Manifest,
    NetworkSpec,
    PolicySpec,
    PortSpec,
    RouterSpec,
    SegmentSpec,
    SegmentVlanSpec,
    TaggedPortSpec,
    all_ports,
    mac_text,
    place_of,
)
from nestnet.model.problems import join
from nestnet.model.rates import rate_text
from nestnet.model.selectors import Names, parse_selector, parse_service
from nestnet.model.validate import Known, given_already, validate
from nestnet.model.values import CARRIAGE_PORT, FABRIC, MAX_DEPTH, Address, Attach, Prefix, Service, Tag
from nestnet.store import numbers, sharing, tables, tenancy, view
from nestnet.store.objects import (
    Contents,
    GrantRow,
    GroupRow,
    LinkRow,
    MachineRow,
    NetworkRow,
    PolicyRow,
    PortRow,
    RouterRow,
    Row,
    SegmentRow,
    domain_in,
    ports,
)
from nestnet.store.quotas import QUOTAS, Quota, Tree, Uses, judge, rate_of
from nestnet.store.scope import EVERYTHING, Scope
from nestnet.store.sharing import GrantWish
from nestnet.store.state import Paths, State, load_state
from nestnet.store.still import load
from nestnet.store.usage import uses, uses_of_grants

UDP = 17


@dataclass(frozen=True, slots=True)
class Change:
    """What would happen to one object: op is +, ~ or -. `fields` are its fields for +, field -> [old, new] for ~.
    `pointer` says where the manifest speaks of it, '' if it does not."""

    op: str
    kind: str
    path: str
    fields: dict[str, Any]
    pointer: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an apply would do. `disturbs` says what running traffic would notice, `machines` who gets rows; an apply
    with `etag` is refused if any network that the plan looked at has changed since."""

    changes: tuple[Change, ...]
    disturbs: tuple[str, ...]
    machines: tuple[str, ...]
    etag: str = ""

    def __bool__(self) -> bool:
        return bool(self.changes)


Pair = tuple[Row | None, Row | None]


@dataclass(frozen=True, slots=True)
class TenantWish:
    """A tenant to make, or to give another parent or quota."""

    name: str
    parent: str | None
    quota: Quota


@dataclass(frozen=True, slots=True)
class Work:
    """A plan with the rows that carry it out, made for `revision`."""

    plan: Plan
    revision: int
    pairs: tuple[Pair, ...]
    tenants: tuple[TenantWish, ...]
    machines: tuple[MachineRow, ...]  # as they should be, where that is new
    networks: tuple[int, ...]  # Those that it looked at and may change; what it makes is not among them.
    grants: tuple[GrantWish, ...]
    audited: tuple[Change, ...]  # The changes by whole paths, for the log.


def make(
    connection: Connection,
    manifest: Manifest,
    prune: bool,
    scope: Scope = EVERYTHING,
    new: Collection[str] | None = None,
) -> Work:
    """Compare. Raises Invalid with every problem, Conflict, Exhausted, or Forbidden where it is about what is not in
    scope; reads only.

    `new`: pointers to the networks that are to be made. Then all others that the manifest names are there, and stay as
    they are, with whatever else they carry."""
    state = load_state(connection)
    if manifest.tenants:
        manifest = manifest.model_copy(update={"tenants": tenancy.declared(manifest.tenants, state, scope)})
    if scope.writes is None:
        state.networks.know_named(FABRIC, manifest.networks or ())
        if new is not None:
            state.networks.leave_out_all_but(_there(manifest.networks or {}, FABRIC, "", "", new, state, scope))
        state.networks.above(_roots(manifest, state, False, scope))
        _names_free(manifest.networks or {}, FABRIC, "", state, scope)
        return _make(connection, manifest, prune, scope, state, [])
    # Somebody else's is put where it is stored, judged there, and what comes of it told without what carries it.
    told = view.Told()
    view.hide(state, scope)
    try:
        named = manifest.networks or {}
        tops = view.tops(state, scope, named)
        for name in named:
            if new is not None and name not in tops and join("networks", name) not in new:
                raise NotFound(f"network {name}")
        state.networks.above(row.id for row in tops.values())
        places = {name: view.carried_by(spec, name, tops.get(name), state, scope) for name, spec in named.items()}
        for carrier in {place.carrier for place in places.values()}:
            state.networks.know_named(carrier, [name for name, place in places.items() if place.carrier == carrier])
        for name, place in places.items():
            _names_free({name: named[name]}, place.carrier, "", state, scope)
        missing = list(view.beyond_grants(manifest, _granted_hosts(connection, places, state)))
        if told_of := list(view.physical(manifest.networks or {})):
            raise Invalid([*missing, *told_of])
        pruned: list[NetworkRow] = []
        if prune and (owners := _pruned_of(manifest, tops, scope)):
            others = view.tops(state, scope).items()
            pruned = [row for name, row in others if name not in named and row.tenant in owners]
        carriers = [place.carrier for place in places.values()]
        if new is None:
            view.leave_out(state, carriers, [*pruned, *tops.values()])
        else:
            about = set[int]()
            for name, spec in named.items():
                about |= _one_there(name, spec, tops.get(name), join("networks", name), new, state, scope)
            view.leave_all_but(state, carriers, about)
        grafted = view.graft(manifest, places, {row.id for row in pruned}, state, _network_spec)
        work = _make(connection, grafted, prune, scope, state, missing, view.still(state, carriers, scope))
    except NestnetError as error:
        raise told.error(error) from None
    plan = work.plan
    changes = tuple(
        replace(one, path=told.text(one.path), fields=told.data(one.fields), pointer=told.pointer(one.pointer))
        for one in plan.changes
    )
    whole = tuple(replace(one, path=one.path.replace(view.HIDDEN, "")) for one in plan.changes)
    return replace(
        work,
        audited=whole,
        plan=replace(
            plan,
            changes=changes,
            disturbs=tuple(map(told.text, plan.disturbs)),
            machines=tuple(dict.fromkeys(map(told.text, plan.machines))),
        ),
    )


def _there(
    named: Mapping[str, NetworkSpec],
    carrier: int,
    above: str,
    pointer: str,
    new: Collection[str],
    state: State,
    scope: Scope,
) -> set[int]:
    """The networks of a manifest that are there, on the way to those that are to be made. Raises Conflict if one of
    these is there too, NotFound if one of the others is not."""
    state.networks.know_named(carrier, named)
    found: set[int] = set()
    for name, spec in named.items():
        row = state.networks.named_stored(carrier, name)
        found |= _one_there(f"{above}{name}", spec, row, pointer + join("networks", name), new, state, scope)
    return found


def _one_there(
    path: str,
    spec: NetworkSpec,
    row: NetworkRow | None,
    pointer: str,
    new: Collection[str],
    state: State,
    scope: Scope,
) -> set[int]:
    if pointer in new or (row is not None and not scope.may_read(row.tenant)):
        if row is not None and scope.may_read(row.tenant):
            raise Conflict(f"there is a network {path} already: `apply` changes it", "duplicate_name")
        return set()
    if row is None:
        raise NotFound(f"network {path}")
    return {row.id} | _there(spec.networks or {}, row.id, f"{path}/", pointer, new, state, scope)


def _granted_hosts(
    connection: Connection, places: Mapping[str, view.Placed], state: State
) -> dict[str, dict[str, set[int]]]:
    """Network that is carried by a grant -> host on which it may be -> the families of that host's addresses."""
    found: dict[str, dict[str, set[int]]] = {}
    for name, (carrier, grant, _) in places.items():
        if grant is not None:
            there = {port.name: port for port in ports(connection, "network", [carrier]) if port.hosts}
            addresses = {name: port.addresses for name, port in there.items()}
            addresses |= {name: (row.address,) for name, row in state.joined.items()} if carrier == FABRIC else {}
            names = view.hosts_of(state, grant, {name: port.id for name, port in there.items()})
            found[name] = {host: {6 if ":" in one else 4 for one in addresses[host]} for host in names}
    return found


def _make(
    connection: Connection,
    manifest: Manifest,
    prune: bool,
    scope: Scope,
    state: State,
    missing: Sequence[Problem],
    still: Collection[int] = (),
) -> Work:
    """`missing`: what is wrong already. `still`: networks that the manifest has only to put others on."""
    roots = _roots(manifest, state, prune, scope)
    loaded = load(connection, state.networks.above(roots), sorted(still))
    state.contents = {id: one.contents for id, one in loaded.items()}
    state.still = {id: loaded[id] for id in still}
    moved = _moved(manifest, state)
    filled = _complete(manifest, state, moved, scope.tenant)
    at = {problem.pointer for problem in missing}
    at |= {re.sub("/ports/[^/]*/host$", "/underlay", one.pointer) for one in missing if one.code == "host_family"}
    judged = [one for one in _judge(manifest, filled, state) if view.Told().pointer(one.pointer) not in at]
    if problems := [*missing, *judged]:
        raise Invalid(problems)
    wanted = _Wanted(filled, state, scope)
    if problems := [*_too_deep(wanted), *_hosts_apart(wanted), *_given_twice(connection, wanted, state)]:
        raise Invalid(problems)
    pairs = list(_pairs(wanted, state, roots))
    wishes = _tenants(manifest, wanted, state)
    parents = {**state.parents, **{wish.name: wish.parent for wish in wishes}}
    shared = sharing.wanted(wanted.grants, wanted, parents, state, scope)
    _to_write(pairs, wishes, moved, wanted, state, scope)
    _enough_vnis(connection, pairs, wanted)
    _vlans_free(connection, pairs, wanted)
    for row in moved:
        trunks_unused(connection, state.joined[row.name], row.trunks, state.contents)
    _judge_quotas(connection, pairs, wishes, shared, wanted, state, scope)
    _nothing_new(pairs, wanted, state)
    changes = (*_told_of_machines(moved, state), *_tenants_told(wishes, state), *_told(pairs, wanted, state))
    changes += tuple(Change(op, "grant", path, fields, at) for op, path, fields, at in sharing.told(shared))
    touched = {row.network for pair in pairs for row in pair if row is not None}
    plan = Plan(
        changes,
        (*_disturbed_by_machines(manifest, moved, state), *_discreet(_disturbed(pairs, wanted, state), wanted, scope)),
        tuple(sorted(state.machines)) if moved else _machines(touched, wanted, state, roots, scope),
    )
    return Work(
        plan,
        state.revision,
        tuple(pairs),
        wishes,
        tuple(moved),
        tuple(state.networks.above(roots)),
        tuple(shared),
        changes,
    )


# Scope


def _names_free(named: Mapping[str, NetworkSpec], carrier: int, above: str, state: State, scope: Scope) -> None:
    """Refuse names that others have there. Nothing else of theirs is told."""
    for name, spec in named.items():
        if (row := state.networks.named(carrier, name)) is not None:
            if not scope.may_read(row.tenant):
                raise Conflict(f"the name of network {above}{name} is taken: choose another", "duplicate_name")
            _names_free(spec.networks or {}, row.id, f"{above}{name}/", state, scope)


def _to_write(
    pairs: Iterable[Pair],
    wishes: Iterable[TenantWish],
    moved: Iterable[MachineRow],
    wanted: _Wanted,
    state: State,
    scope: Scope,
) -> None:
    """Raise Forbidden if anything of this is not in scope."""
    if scope.writes is None:
        return
    for machine in moved:
        scope.to_write_all(f"machine {machine.name}")
    parents = {**state.parents, **{wish.name: wish.parent for wish in wishes}}
    for wish in wishes:
        if wish.name in state.parents or wish.parent is not None:
            tenancy.to_administer(tenancy.line_in(wish.name, parents, state.suspended), scope)
        else:  # Only named, by a network.
            path = next(wanted.paths[id] for id, row in wanted.networks.items() if row.tenant == wish.name)
            raise Forbidden(f"network {path} would be another tenant's: name one of your own")
    others: set[int] = set()
    for old, new in pairs:
        for row, networks in ((old, state.networks), (new, wanted.networks)):
            if row is None:
                continue
            owner = networks[row.network]
            if scope.may_read(owner.tenant):
                path = wanted.paths.get(owner.id) or state.path(owner.id)
                scope.to_write(owner.tenant, f"network {path}")
                if owner.tenant is not None:
                    tenancy.to_write(tenancy.line_in(owner.tenant, parents, state.suspended), scope)
            elif old is None:
                raise Forbidden(f"network {wanted.paths[owner.id]} would be another tenant's: name one of your own")
            else:
                others.add(owner.id)
    if others:
        raise Conflict(
            f"{len(others)} networks of other tenants are carried by what would go: leave `networks` out to keep them",
            "in_use",
        )


def _discreet(lines: Iterable[str], wanted: _Wanted, scope: Scope) -> Iterator[str]:
    """What is disturbed, other tenants' networks by their number only."""
    whose = {wanted.paths[id]: row.tenant for id, row in wanted.networks.items()}
    others = {path for path, tenant in whose.items() if not scope.may_read(tenant)}
    hit: set[str] = set()
    count = 0
    for line in lines:
        path = line.split(" ")[0].split(":")[0]
        while path not in whose and "/" in path:
            path = path.rpartition("/")[0]
        if path in others:
            count += 1
            hit.add(path)
        else:
            yield line
    if count:
        yield f"what {len(hit)} networks of other tenants that are carried would notice: {count} more"


def _roots(manifest: Manifest, state: State, prune: bool, scope: Scope) -> list[int]:
    """Ids of the networks on the wire that this is about."""
    named = manifest.networks or {}
    top = {name: row for name in named if (row := state.networks.named(FABRIC, name)) is not None}
    roots = [row.id for row in top.values()]
    if prune and (owners := _pruned_of(manifest, top, scope)):
        others = state.networks.on_wire_of(owners)
        roots += [row.id for row in others if row.name not in named and row.id not in roots]
    return roots


def _pruned_of(manifest: Manifest, top: Mapping[str, NetworkRow], scope: Scope) -> set[str | None]:
    """The tenants that a manifest names, which have no other networks after it than it has. `top`: those of its
    networks that are there."""
    named = manifest.networks or {}
    owners: set[str | None] = set(manifest.tenants or {})
    for name, spec in named.items():
        owners.add(spec.tenant or (top[name].tenant if name in top else scope.tenant))
    return {owner for owner in owners if scope.may_write(owner)}


# Machines: a manifest may say where one that has joined is now.


def _moved(manifest: Manifest, state: State) -> list[MachineRow]:
    """The machines that are not as the manifest says. What it does not say of them stays (rule 39)."""
    found = []
    for name, spec in (manifest.machines or {}).items():
        if (old := state.joined.get(name)) is not None:
            address = str(spec.address) if spec.address is not None else old.address
            vlan = spec.vlan.value if spec.vlan is not None else old.vlan
            trunks = tuple(sorted(spec.trunks.items())) if spec.trunks is not None else old.trunks
            nics = spec.nic or old.nics
            new = replace(old, address=address, mtu=spec.mtu or old.mtu, nics=nics, vlan=vlan, trunks=trunks)
            if new != old:
                found.append(new)
    return found


def _machine_fields(row: MachineRow) -> dict[str, Any]:
    vlan = row.vlan.short if row.vlan is not None else None
    return {"address": row.address, "nic": list(row.nics), "mtu": row.mtu, "vlan": vlan, "trunks": dict(row.trunks)}


def _told_of_machines(moved: Iterable[MachineRow], state: State) -> Iterator[Change]:
    for row in moved:
        before, after = _machine_fields(state.joined[row.name]), _machine_fields(row)
        fields = {field: [before[field], after[field]] for field in after if before[field] != after[field]}
        yield Change("~", "machine", row.name, fields, join("machines", row.name))


def _disturbed_by_machines(manifest: Manifest, moved: Collection[MachineRow], state: State) -> Iterator[str]:
    for row in moved:
        was = state.joined[row.name]
        if row.address != was.address:
            change = f"address {was.address} becomes {row.address}"
            yield f"machine {row.name}: {change}, nothing reaches it before it has that"
        if row.vlan != was.vlan:
            change = f"{_in_vlan(was.vlan)} becomes {_in_vlan(row.vlan)}"
            yield f"machine {row.name}: {change}, all that its NICs send and hear is in that then, ssh too"
    if any(spec.vlan is not None for spec in (manifest.machines or {}).values()):
        yield from _apart([row for row in (state.joined | {row.name: row for row in moved}).values() if not row.fenced])


def _in_vlan(vlan: Tag | None) -> str:
    return f"VLAN {vlan}" if vlan is not None else "no VLAN"


def _apart(machines: Iterable[MachineRow]) -> Iterator[str]:
    """Machines in different VLANs of the wire: whether something joins these nobody here knows."""
    found: dict[Tag | None, str] = {}
    for row in machines:
        found.setdefault(row.vlan, row.name)
    if len(found) > 1:
        each = ", ".join(f"{name} in {_in_vlan(vlan)}" for vlan, name in found.items())
        yield f"machines are on different wires: {each}; they hear each other if a router or switch joins these"


# Completing


def _complete(manifest: Manifest, state: State, moved: Iterable[MachineRow], tenant: str | None) -> Manifest:
    """The manifest with everything that it leaves alone. `tenant`: whose a network is that nobody says it of."""
    machines = {
        name: MachineSpec.model_construct(
            address=ip_address(row.address), mtu=row.mtu, nic=row.nics or None, trunks=dict(row.trunks)
        )
        for name, row in (state.joined | {row.name: row for row in moved}).items()
    }
    # In the order of the manifest behind all others: of two that do not fit, the one that it names is at fault.
    named = [name for name in manifest.machines or {} if name in machines]
    machines = {
        **{name: spec for name, spec in machines.items() if name not in named},
        **{n: machines[n] for n in named},
    }
    family = next((spec.address.version for spec in machines.values() if spec.address is not None), None)
    networks = {
        name: _complete_network(spec, state, state.networks.named(FABRIC, name), tenant, family)
        for name, spec in (manifest.networks or {}).items()
    }
    return manifest.model_copy(update={"networks": networks, "machines": machines})


def _complete_network(
    spec: NetworkSpec, state: State, row: NetworkRow | None, tenant: str | None, family: int | None = None
) -> NetworkSpec:
    """`family`: of the machines that carry it, if they do and there are any."""
    stored = Contents() if row is None else state.contents[row.id]
    still = state.still.get(row.id) if row is not None else None
    tenant = spec.tenant or (row.tenant if row else tenant)
    underlay = spec.underlay or family or (row.underlay if row else 4)
    carriage = spec.carriage or (_carriage_of(row) if row else "flat")
    update: dict[str, Any] = {"tenant": tenant, "underlay": underlay, "carriage": carriage}
    if still is not None and still.said:
        update |= still.said
    else:
        said = _collections(spec, row, stored, state)
        update |= said
        if still is not None:
            still.said.update(said)
    below = spec.networks
    if below is None:
        below = {name: _network_spec(one) for name, one in state.networks.carried(row.id).items()} if row else {}
    carried = {name: state.networks.named(row.id, name) if row else None for name in below}
    update["networks"] = {name: _complete_network(one, state, carried[name], tenant) for name, one in below.items()}
    return spec.model_copy(update=update)


def _collections(spec: NetworkSpec, row: NetworkRow | None, stored: Contents, state: State) -> dict[str, Any]:
    """What is in it that the manifest leaves alone, and segments."""
    found: dict[str, Any] = {}
    segments = {name: _segment_spec(segment) for name, segment in stored.segments.items()}
    if spec.segments is None:
        found["segments"] = segments
    else:
        found["segments"] = {name: _kept(one, segments.get(name)) for name, one in spec.segments.items()}
    if spec.routers is None:
        found["routers"] = {name: _router_spec(router, stored) for name, router in stored.routers.items()}
    if spec.links is None:
        found["links"] = {name: _link_spec(link, stored) for name, link in stored.links.items()}
    if spec.ports is None:
        hosts = _host_names(row, state) if row else {}
        found["ports"] = {name: _port_spec(port, stored, hosts) for name, port in stored.ports.items()}
    if spec.policies is None:
        found["policies"] = tuple(_policy_spec(policy) for policy in stored.policies.values())
    return found


def _network_spec(row: NetworkRow) -> NetworkSpec:
    """A stored network as a manifest has it; its collections absent, so: as they are."""
    return NetworkSpec.model_construct(
        tenant=row.tenant,
        carriage=_carriage_of(row),
        underlay=6 if row.underlay == 6 else 4,
        mtu=row.mtu,
        enabled=row.enabled,
        labels=json.loads(row.labels) or None,
        description=row.description or None,
    )


def _carriage_of(row: NetworkRow) -> Literal["flat", "encapsulated"]:
    return "encapsulated" if row.encapsulated else "flat"


def _segment_spec(row: SegmentRow) -> SegmentSpec:
    cidrs = tuple(ip_network(cidr) for cidr in row.cidrs)
    dns = tuple(ip_address(text) for text in row.dns)
    vlan = SegmentVlanSpec.model_construct(id=row.vlan, on=row.physical) if row.physical is not None else None
    more = {"labels": json.loads(row.labels), "description": row.description}
    return SegmentSpec.model_construct(cidr=cidrs, dns=dns, transparent=row.transparent, vlan=vlan, **more)


def _kept(spec: SegmentSpec, stored: SegmentSpec | None) -> SegmentSpec:
    """With the VLAN that it has, unless it says another, or none."""
    was = stored.vlan if stored is not None else None
    same = spec.vlan is not None and was is not None and spec.vlan.id is None and spec.vlan.on == was.on
    return spec.model_copy(update={"vlan": was}) if spec.vlan is None or same else spec


def _router_spec(row: RouterRow, stored: Contents) -> RouterSpec:
    names = {segment.id: name for name, segment in stored.segments.items()}
    joined = {names[segment]: tuple(ip_address(text) for text in texts) for segment, texts in row.interfaces}
    return RouterSpec.model_construct(segments=joined, labels=json.loads(row.labels), description=row.description)


def _link_spec(row: LinkRow, stored: Contents) -> LinkSpec:
    names = {router.id: name for name, router in stored.routers.items()}
    return LinkSpec.model_construct(
        between=tuple(names[router] for router in row.between),
        cost=row.cost,
        up=row.up,
        rate=row.rate or None,
        labels=json.loads(row.labels),
        description=row.description,
    )


def _attach_spec(attach: Attach | None) -> AttachSpec:
    given: dict[str, Any] = {attach.kind: attach.name} if attach is not None else {}
    return AttachSpec.model_construct(**given)


def _port_spec(row: PortRow, stored: Contents, hosts: dict[int, str]) -> PortSpec:
    segments = {segment.id: name for name, segment in stored.segments.items()}
    groups = {group.id: name for name, group in stored.groups.items()}
    trunks = {port.id: name for name, port in stored.ports.items()} if row.trunk else {}
    tagged: dict[str, Any] = {"trunk": trunks[row.trunk], "tag": row.tag} if row.trunk else {}
    return (TaggedPortSpec if row.trunk else PortSpec).model_construct(
        **tagged,
        segment=segments[row.segment],
        host=hosts[row.host],
        address=tuple(ip_address(text) for text in row.addresses),
        mac=row.mac,
        owns=tuple(ip_network(text) for text in row.owns),
        groups=tuple(groups[group] for group in row.groups),
        hosts=row.hosts,
        attach=_attach_spec(row.attach),
        rate=row.rate or None,
        enabled=row.enabled,
        labels=json.loads(row.labels),
        description=row.description,
    )


def _policy_spec(row: PolicyRow) -> PolicySpec:
    data = json.loads(row.spec)
    return PolicySpec.model_construct(
        sources=tuple(data["from"]),
        targets=tuple(data["to"]),
        allow=tuple(data["allow"]) if "allow" in data else None,
        deny=tuple(data["deny"]) if "deny" in data else None,
        priority=data["priority"],
    )


def _host_names(row: NetworkRow, state: State) -> dict[int, str]:
    """What may stand after `host:` in this network, by id."""
    if row.carrier == FABRIC:
        return {id: name for name, id in state.machines.items()}
    return {port.id: name for name, port in state.contents[row.carrier].ports.items()}


# Judging


def _judge(manifest: Manifest, filled: Manifest, state: State) -> list[Problem]:
    problems = [
        Problem("missing_machine", join("machines", name), f"machine {name} has not joined: start its agent first")
        for name in manifest.machines or {}
        if name not in state.machines
    ]
    known = Known(
        machines=state.machines.keys(),
        tenants=state.parents,
        networks=Paths(state.networks),
        still={state.path(id) for id in state.still},
    )
    return problems + validate(filled, known)


def problems_of(chain: Sequence[NetworkRow], hosts: Mapping[str, str], state: State) -> list[Problem]:
    """What would be wrong with the last of these networks, each carried by the one before it, if its ports lived on
    these hosts: port -> host, by name."""
    last = chain[-1]
    stored = state.contents[last.id]
    ports = {name: _port_spec(port, stored, {port.host: hosts[name]}) for name, port in stored.ports.items()}
    spec = _network_spec(last).model_copy(update={"ports": ports})
    for carrier, carried in zip(chain[-2::-1], chain[:0:-1], strict=True):
        spec = _network_spec(carrier).model_copy(update={"networks": {carried.name: spec}})
    manifest = Manifest.model_construct(api_version="nestnet/v1", networks={chain[0].name: spec})
    return _judge(manifest, _complete(manifest, state, (), None), state)


def _given_twice(connection: Connection, wanted: _Wanted, state: State) -> Iterator[Problem]:
    """What a machine has is given to one port: also beside networks that the manifest does not name, and when hosts
    move."""
    names: dict[Place, str] = {("machine", id): name for name, id in state.machines.items()}
    place: dict[int, Place] = {}
    given: dict[tuple[Place, Attach], int] = {}
    rows: dict[int, PortRow] = {}
    for network, row in wanted.networks.items():  # carriers first
        for port in wanted.contents[network].ports.values():
            place[port.id] = _place(row, port, place)
            if port.attach is not None and network not in state.still:
                rows[port.id] = port
    if not rows:
        return
    looked_at = [contents for network, contents in state.contents.items() if network not in state.still]
    own = {port.id for contents in looked_at for port in contents.ports.values()}
    t = tables.attachment.c
    m = tables.machine.c
    query = select(t.port, t.machine, t.kind, t.name, m.port.label("on")).join(tables.machine)
    there = {kind: sorted({id for each, id in place.values() if each == kind}) for kind in ("machine", "port")}
    query = query.where(m.id.in_(there["machine"]) | m.port.in_(there["port"]))
    for other in connection.execute(query):
        if other.port not in own:
            at = ("machine", other.machine) if other.on is None else ("port", other.on)
            given[at, Attach(other.kind, other.name)] = other.port
    for port in rows.values():
        assert port.attach is not None
        key = (place[port.id], port.attach)
        if (one := given.setdefault(key, port.id)) != port.id:
            if one in rows:
                path = f"{wanted.paths[rows[one].network]}/{rows[one].name}"
            else:
                (row_of,) = ports(connection, "id", [one])
                path = f"{state.path(row_of.network)}/{row_of.name}"
            pointer = wanted.pointers["port", port.id] + f"/attach/{port.attach.kind}"
            whose = names.get(key[0]) or wanted.path_of_port(key[0][1])
            yield Problem("duplicate_attach", pointer, given_already(port.attach, whose, path))


Place = tuple[str, int]
"""Where a port lives in the end: ("machine", id), or ("port", id) of a host port whose workload is one."""


def _place(network: NetworkRow, port: PortRow, place: Mapping[int, Place]) -> Place:
    """`place`: those of the ports of its carrier."""
    if network.carrier == FABRIC:
        return "machine", port.host
    return ("port", port.host) if network.encapsulated else place[port.host]


def _enough_vnis(connection: Connection, pairs: Iterable[Pair], wanted: _Wanted) -> None:
    made = [new.network for old, new in pairs if old is None and isinstance(new, SegmentRow)]
    more = Counter(domain_in(wanted.networks, network) for network in made)
    for domain, segments in more.items():
        if segments > numbers.free(connection, domain):
            raise numbers.exhausted(connection, domain if numbers.size(connection, domain) else FABRIC)


def _vlans_free(connection: Connection, pairs: Iterable[Pair], wanted: _Wanted) -> None:
    """Is there a VLAN for each segment that is to have another? One that is left in this very transaction is none:
    machines hold its old meaning."""
    asked: dict[str, list[SegmentRow]] = defaultdict(list)
    for old, new in pairs:
        if isinstance(new, SegmentRow) and new.physical is not None:
            was = (old.physical, old.vlan) if isinstance(old, SegmentRow) else None
            if was != (new.physical, new.vlan):
                asked[new.physical].append(new)
    for physical, rows in asked.items():
        free = set(numbers.free_vlans(connection, physical))
        for row in rows:
            if row.vlan is not None and row.vlan not in free:
                at = wanted.pointers["segment", row.id] + "/vlan/id"
                raise _vlan_taken(connection, physical, row.vlan, at)
            free.discard(row.vlan or 0)
        if sum(row.vlan is None for row in rows) > len(free):
            raise numbers.vlans_exhausted(connection, physical)


def _vlan_taken(connection: Connection, physical: str, vlan: int, at: str) -> NestnetError:
    s, n = tables.segment.c, tables.network.c
    name = f"VLAN {vlan} of {physical}"
    if vlan > (most := numbers.vlans(connection)):
        return Invalid([Problem("bad_vlan", at, f"{physical} has the VLANs 1 to {most}", limit=most)])
    other = connection.execute(
        select(n.name.label("network"), s.name)
        .join_from(tables.segment, tables.network, s.network == n.id)
        .where(s.physical == physical, s.vlan == vlan)
    ).first()
    if other is not None:
        path = f"{other.network}/{other.name}"
        return Invalid([Problem("duplicate_vlan", at, f"{name} is that of {path} already")])
    return Conflict(
        f"{name} is free when all machines have heard that it is: some may still use it as it was", "vlan_waits"
    )


def trunks_unused(
    connection: Connection, row: MachineRow, trunks: Iterable[tuple[str, str]], named: Collection[int] = ()
) -> None:
    """What takes a trunk from a machine on which segments with ports there ride is refused. `named`: the networks of
    which a manifest says by itself what they are then."""
    s, p, n = tables.segment.c, tables.port.c, tables.network.c
    gone = {on for on, _ in row.trunks} - {on for on, _ in trunks}
    query = (
        select(n.id, n.name.label("network"), p.name)
        .join_from(tables.port, tables.segment, p.segment == s.id)
        .join(tables.network, p.network == n.id)
        .where(s.physical.in_(gone), (p.host_machine == row.id) | (p.other_machine == row.id))
        .order_by(n.name, p.name)
    )
    found = [f"{each.network}/{each.name}" for each in connection.execute(query) if each.id not in named]
    if found:
        message = f"the trunks of {row.name} to {', '.join(sorted(gone))} are needed by {', '.join(found[:10])}"
        raise Conflict(message + (", ..." if len(found) > 10 else ""), "in_use", found)


def _too_deep(wanted: _Wanted) -> Iterator[Problem]:
    """A manifest nests less than that by itself; it may stand on what is deep already."""
    depth = {FABRIC: 0}
    for id, row in wanted.networks.items():  # carriers first
        depth[id] = depth[row.carrier] + 1
        if depth[id] == MAX_DEPTH + 1:
            message = f"{wanted.paths[id]} would be carried too deep: networks nest at most {MAX_DEPTH} levels"
            yield Problem("too_deep", wanted.pointers["network", id], message, limit=MAX_DEPTH)


def _hosts_apart(wanted: _Wanted) -> Iterator[Problem]:
    """Machines of one domain have addresses of their own. What carries them may have one twice, in two segments."""
    at: dict[tuple[int, str], PortRow] = {}
    for id, row in wanted.networks.items():
        if not row.encapsulated:
            continue
        hosts = {port.id: port for port in wanted.contents[row.carrier].ports.values()}
        for port in wanted.contents[id].ports.values():
            host = hosts[port.host]
            address = next((a for a in host.addresses if (":" in a) == (row.underlay == 6)), None)
            other = at.setdefault((row.carrier, address), host) if address is not None else host
            if other.id != host.id:
                message = (
                    f"host {host.name} has the address {address}, as {other.name} has: agents need one of their own"
                )
                yield Problem("duplicate_address", wanted.pointers["port", port.id] + "/host", message)


# What should be


class _Wanted:
    """The rows that a complete manifest asks for. What is new has ids below 0."""

    def __init__(self, manifest: Manifest, state: State, scope: Scope) -> None:
        self.state = state
        self.scope = scope
        self.networks: dict[int, NetworkRow] = {}
        self.contents: dict[int, Contents] = {}
        self.paths: dict[int, str] = {}
        self.pointers: dict[tuple[str, int], str] = {}
        self.tenants: dict[str, None] = {}
        self.grants: dict[int, Mapping[str, GrantSpec] | None] = {}
        self._fresh = count(-1, -1)
        for name, spec in (manifest.networks or {}).items():
            self._network(name, spec, FABRIC, "", "")

    def _network(self, name: str, spec: NetworkSpec, carrier: int, above: str, pointer: str) -> None:
        old = self.state.networks.named(carrier, name)
        at = pointer + join("networks", name)
        path = f"{above}/{name}" if above else name
        if spec.tenant is not None:
            self.tenants[spec.tenant] = None
        underlay = spec.underlay or 4
        encapsulated = spec.carriage == "encapsulated"
        if old is not None:
            # On the wire the underlay is as the machines are.
            family = old.underlay if carrier != FABRIC else underlay
            carried = _carriage_of(old)
            for what, was, wished in (
                ("tenant", old.tenant, spec.tenant),
                ("underlay", family, underlay),
                ("carriage", carried, spec.carriage or carried),
            ):
                if was not in (wished, None):
                    raise Conflict(f"the {what} of network {path} cannot be changed: delete and create it", "immutable")
            encapsulated = old.encapsulated
        id = old.id if old is not None else next(self._fresh)
        enabled = spec.enabled if spec.enabled is not None else old is None or old.enabled
        grant = old.grant if old is not None else self._grant(spec.tenant, carrier)
        self.networks[id] = NetworkRow(
            id, carrier, name, spec.tenant, underlay, spec.mtu, enabled, labels_text(spec.labels),
            spec.description or "", encapsulated, old is not None and old.cut, grant,
        )  # fmt: skip
        self.paths[id] = path
        self.grants[id] = spec.grants
        self.pointers["network", id] = at
        if id in self.state.still:
            self.contents[id] = self.state.contents[id]
            for below, one in (spec.networks or {}).items():
                self._network(below, one, id, path, at)
            return
        self.contents[id] = contents = Contents()
        stored = self.state.contents[id] if old is not None else Contents()
        self._segments(id, spec, stored, contents, at)
        self._routers(id, spec, stored, contents, at)
        self._links(id, spec, stored, contents, at)
        self._groups(id, spec, stored, contents)
        self._ports(id, spec, stored, contents, at)
        self._policies(id, spec, stored, contents, at)
        for below, one in (spec.networks or {}).items():
            self._network(below, one, id, path, at)

    def _grant(self, tenant: str | None, carrier: int) -> int | None:
        """The grant that a new network counts under: that of its tenant for what carries it, or what that counts
        under itself. Raises Forbidden for who carries something of another tenant's there and has none."""
        below = self.networks[carrier] if carrier != FABRIC else None
        owner = below.tenant if below is not None else None
        if tenant != owner:
            own = [row for row in self.state.grants.values() if (row.carrier, row.tenant) == (carrier, tenant)]
            if own:
                return own[0].id
            if self.scope.may_write(tenant) and not self.scope.may_write(owner):
                raise Forbidden(f"tenant {tenant} has no hosts there: whoever runs some grants them to it")
        return below.grant if below is not None else None

    def path_of_port(self, port: int) -> str:
        """The path of a port that the manifest has."""
        (row,) = (row for each in self.contents.values() for row in each.ports.values() if row.id == port)
        return f"{self.paths[row.network]}/{row.name}"

    def _segments(self, network: int, spec: NetworkSpec, stored: Contents, contents: Contents, at: str) -> None:
        for name, one in (spec.segments or {}).items():
            old = stored.segments.get(name)
            id = old.id if old else next(self._fresh)
            cidrs = tuple(str(cidr) for cidr in sorted(one.cidr or (), key=lambda cidr: cidr.version))
            dns = tuple(map(str, one.dns or ()))
            vni = old.vni if old else None
            words = (labels_text(one.labels), one.description or "")
            vlan = (one.vlan.on, one.vlan.id) if one.vlan is not None else (None, None)
            contents.segments[name] = SegmentRow(
                id, network, name, vni, cidrs, dns, *words, bool(one.transparent), *vlan
            )
            self.pointers["segment", id] = f"{at}/segments/{name}"

    def _routers(self, network: int, spec: NetworkSpec, stored: Contents, contents: Contents, at: str) -> None:
        for name, one in (spec.routers or {}).items():
            old = stored.routers.get(name)
            id = old.id if old else next(self._fresh)
            interfaces = []
            for segment, given in (one.segments or {}).items():
                row = contents.segments[segment]
                gateways = {address.version: address for address in given}
                for cidr in map(ip_network, row.cidrs):
                    gateways.setdefault(cidr.version, cidr.network_address + 1)
                interfaces.append((row.id, tuple(str(gateways[family]) for family in sorted(gateways))))
            contents.routers[name] = RouterRow(
                id,
                network,
                name,
                old.mac if old else None,
                tuple(sorted(interfaces)),
                labels_text(one.labels),
                one.description or "",
            )
            self.pointers["router", id] = f"{at}/routers/{name}"

    def _links(self, network: int, spec: NetworkSpec, stored: Contents, contents: Contents, at: str) -> None:
        """Which of the two routers stands first means nothing; a state that the manifest leaves out stays."""
        for name, one in (spec.links or {}).items():
            old = stored.links.get(name)
            id = old.id if old else next(self._fresh)
            between = (contents.routers[one.between[0]].id, contents.routers[one.between[1]].id)
            if old is not None and set(old.between) == set(between):
                between = old.between
            up = one.up if one.up is not None else old is None or old.up
            contents.links[name] = LinkRow(
                id, network, name, between, one.cost, up, one.rate or 0, labels_text(one.labels), one.description or ""
            )
            self.pointers["link", id] = f"{at}/links/{name}"

    def _groups(self, network: int, spec: NetworkSpec, stored: Contents, contents: Contents) -> None:
        """A group is there while a port is in it."""
        for name in dict.fromkeys(group for port in all_ports(spec.ports).values() for group in port.groups or ()):
            old = stored.groups.get(name)
            contents.groups[name] = old or GroupRow(next(self._fresh), network, name)

    def _ports(self, network: int, spec: NetworkSpec, stored: Contents, contents: Contents, at: str) -> None:
        carrier = self.networks[network].carrier
        if carrier == FABRIC:
            hosts = self.state.machines
            may_host = set(hosts.values())
        else:
            hosts = {name: port.id for name, port in self.contents[carrier].ports.items()}
            may_host = {port.id for port in self.contents[carrier].ports.values() if port.hosts}
        specs = all_ports(spec.ports)
        addresses = _Addresses(specs, stored, contents, at)
        macs = _kept_macs(specs, stored)
        for name, one in specs.items():
            old = stored.ports.get(name)
            id = old.id if old else next(self._fresh)
            # Who is sent elsewhere meanwhile moves no longer.
            moves = old is not None and old.host == hosts[one.host] and old.other in may_host
            trunk = contents.ports[one.trunk] if isinstance(one, TaggedPortSpec) else None
            contents.ports[name] = PortRow(
                id,
                network,
                contents.segments[one.segment].id,
                name,
                hosts[one.host],
                one.mac if one.mac is not None else trunk.mac if trunk and trunk.mac else macs.get(name),
                addresses.of(name),
                tuple(map(str, one.owns or ())),
                tuple(sorted(contents.groups[group].id for group in one.groups or ())),
                bool(one.hosts),
                one.attach.value if one.attach is not None else old.attach if old else None,
                one.rate or 0,
                one.enabled if one.enabled is not None else old is None or old.enabled,
                labels_text(one.labels),
                one.description or "",
                old.other if old and moves else 0,
                old.leaving if old and moves else False,
                trunk.id if trunk else 0,
                one.tag if isinstance(one, TaggedPortSpec) else 0,
            )
            self.pointers["port", id] = f"{at}/ports/{place_of(name, one)}"

    def _policies(self, network: int, spec: NetworkSpec, stored: Contents, contents: Contents, at: str) -> None:
        names = Names(
            {name: row.id for name, row in contents.groups.items()},
            {name: row.id for name, row in contents.segments.items()},
            {name: row.id for name, row in contents.ports.items()},
        )
        for index, one in enumerate(spec.policies or ()):
            services = one.allow if one.allow is not None else one.deny or ()
            row = PolicyRow(
                0,
                network,
                policy_text(one.sources, one.targets, one.allow, one.deny or (), one.priority),
                tuple(sorted({parse_selector(text, names) for text in one.sources}, key=selector_order)),
                tuple(sorted({parse_selector(text, names) for text in one.targets}, key=selector_order)),
                tuple(sorted({parse_service(text) for text in services})),
                one.allow is not None,
                one.priority,
            )
            if row.meaning in contents.policies:
                continue  # Said twice means the same as said once.
            old = stored.policies.get(row.meaning)
            contents.policies[row.meaning] = old or replace(row, id=next(self._fresh))
            self.pointers["policy", contents.policies[row.meaning].id] = f"{at}/policies/{index}"


class _Addresses:
    """The addresses of a network's ports. Who chose gets that; who had one keeps it; the rest get the lowest free."""

    def __init__(self, specs: dict[str, PortSpec], stored: Contents, contents: Contents, at: str) -> None:
        self._at = at
        self._cidrs: dict[str, list[Prefix]] = {}
        self._taken: dict[str, set[Address]] = defaultdict(set)
        self._next: dict[tuple[str, Prefix], int] = {}
        by_id = {row.id: name for name, row in contents.segments.items()}
        for name, segment in contents.segments.items():
            self._cidrs[name] = [ip_network(cidr) for cidr in segment.cidrs]
        for router in contents.routers.values():
            for segment_id, gateways in router.interfaces:
                self._taken[by_id[segment_id]].update(map(ip_address, gateways))
        self._given: dict[str, dict[int, Address]] = {}
        self._specs = specs
        for spec in specs.values():
            self._taken[spec.segment].update(spec.address or ())
        for name, spec in specs.items():
            if spec.address is None:
                self._given[name] = dict(self._kept(spec.segment, stored.ports.get(name)))

    def of(self, name: str) -> tuple[str, ...]:
        spec = self._specs[name]
        if spec.address is not None:
            return tuple(map(str, spec.address))
        given = self._given[name]
        for cidr in self._cidrs[spec.segment]:
            if cidr.version not in given:
                given[cidr.version] = self._lowest(spec.segment, cidr, name)
        return tuple(str(given[family]) for family in sorted(given))

    def _kept(self, segment: str, old: PortRow | None) -> Iterator[tuple[int, Address]]:
        for cidr in self._cidrs[segment] if old else ():
            for text in old.addresses if old else ():
                address = ip_address(text)
                if address.version == cidr.version and address in cidr and self._free(segment, cidr, address):
                    self._taken[segment].add(address)
                    yield cidr.version, address
                    break

    def _free(self, segment: str, cidr: Prefix, address: Address) -> bool:
        if address == cidr.network_address or (cidr.version == 4 and address == cidr.broadcast_address):
            return False
        return address not in self._taken[segment]

    def _lowest(self, segment: str, cidr: Prefix, port: str) -> Address:
        base = cidr.network_address
        size = cidr.num_addresses
        offset = self._next.get((segment, cidr), 2)  # 0 is the network's own, 1 the gateway's
        while offset < size and not self._free(segment, cidr, base + offset):
            offset += 1
        self._next[segment, cidr] = offset + 1
        if offset >= size:
            message = f"segment {segment} is full: {cidr} has no address left for {port}"
            at = f"{self._at}/ports/{place_of(port, self._specs[port])}"
            raise Invalid([Problem("segment_full", at, message, limit=size)])
        self._taken[segment].add(base + offset)
        return base + offset


def _kept_macs(specs: dict[str, PortSpec], stored: Contents) -> dict[str, int]:
    """The MACs of ports that chose none and had one, unless somebody chose it meanwhile."""
    taken = {(spec.segment, spec.mac) for spec in specs.values() if spec.mac is not None}
    kept: dict[str, int] = {}
    for name, spec in specs.items():
        old = stored.ports.get(name)
        if spec.mac is None and old is not None and old.mac is not None and (spec.segment, old.mac) not in taken:
            taken.add((spec.segment, old.mac))
            kept[name] = old.mac
    return kept


# The difference


def _pairs(wanted: _Wanted, state: State, roots: Iterable[int]) -> Iterator[Pair]:
    """(old, new) of everything that differs: carriers first, in the order of the manifest; then what goes."""
    for id, network in wanted.networks.items():
        if state.networks.get(id) != network:
            yield state.networks.get(id), network
        if id in state.still:
            continue
        stored = state.contents.get(id, Contents())
        have = {(row.kind, row.id): row for row in stored}
        for row in wanted.contents[id]:
            if (old := have.get((row.kind, row.id))) != row:
                yield old, row
    # From the top down to what is carried, so reversed: what is carried goes first.
    for id in reversed(state.networks.above(roots)):
        if id in state.still:
            continue
        keep = {(row.kind, row.id) for row in wanted.contents.get(id, ())}
        for row in reversed(list(state.contents[id])):
            if (row.kind, row.id) not in keep:
                yield row, None
        if id not in wanted.networks:
            yield state.networks[id], None


def _tenants(manifest: Manifest, wanted: _Wanted, state: State) -> tuple[TenantWish, ...]:
    """Those that are only named are made; a quota that the manifest leaves out stays."""
    parents = {name: spec.parent for name, spec in (manifest.tenants or {}).items()}
    wished = {**dict.fromkeys(name for name in wanted.tenants if name not in state.parents), **parents}
    wishes = []
    for name, up in wished.items():
        spec = (manifest.tenants or {}).get(name)
        had = state.quotas.get(name, Quota())
        given = spec.quota if spec is not None else None
        quota = Quota(given.networks, given.segments, given.ports, given.rate) if given is not None else had
        if name not in state.parents or (state.parents[name], had) != (up, quota):
            wishes.append(TenantWish(name, up, quota))
    return tuple(wishes)


def _judge_quotas(
    connection: Connection,
    pairs: Iterable[Pair],
    wishes: Iterable[TenantWish],
    shared: Sequence[GrantWish],
    wanted: _Wanted,
    state: State,
    scope: Scope,
) -> None:
    grants = sharing.after(shared, state)
    parents, limits = dict(state.parents), dict(state.quotas)
    for wish in wishes:
        parents[wish.name], limits[wish.name] = wish.parent, wish.quota
    given = (*(wish.quota for wish in wishes), *(wish.quota for wish in shared))
    if not state.limited and all(quota in (None, Quota()) for quota in given):
        return
    more: Uses = {what: Counter() for what in QUOTAS}
    under: Uses = {what: Counter() for what in QUOTAS}  # of grants
    for old, new in pairs:
        for row, sign in ((old, -1), (new, 1)):
            counted = {f"{row.kind}s": sign} if row is not None and f"{row.kind}s" in QUOTAS else {}
            if row is None or not counted:
                continue
            if isinstance(row, PortRow):
                counted["rate"] = sign * rate_of(row.rate)
            place = (wanted.networks if sign == 1 else state.networks)[row.network]
            for what, n in counted.items():
                if place.tenant is not None:
                    more[what][place.tenant] += n
                if place.grant is not None:
                    under[what][place.grant] += n
    # What a new grant finds there already, or comes with it, counts under it, and no more under the one that it is of.
    for id, grant in grants.items():
        if id < 0:
            for network in _adopted(grant, wanted.networks):
                rows = [*wanted.contents[network.id]]
                held = Counter(f"{row.kind}s" for row in (network, *rows) if f"{row.kind}s" in QUOTAS)
                held["rate"] = sum(rate_of(row.rate) for row in rows if isinstance(row, PortRow))
                for what, n in held.items():
                    under[what][id] += n
                    if network.grant is not None:
                        under[what][network.grant] -= n
    if any(count > 0 for each in (*more.values(), *under.values()) for count in each.values()) or wishes or shared:
        tree = Tree(parents, limits, grants, state.carriers_of(grants, wanted.networks))
        seen = tenancy.seen(parents, scope)
        bear = tree.bearing(_growing(more), _growing(under))
        names, ids = tree.counted(*bear)
        if wishes or shared:
            judge(tree, uses(connection), more, uses_of_grants(connection), under, seen)
        else:
            have = uses(connection, [state.tenants[name] for name in names])
            judge(tree, have, more, uses_of_grants(connection, ids), under, seen, bear)


def _growing(more: Uses) -> set[Any]:
    """Whose use grows."""
    return {who for each in more.values() for who, n in each.items() if n > 0}


def _adopted(grant: GrantRow, networks: Mapping[int, NetworkRow]) -> Iterator[NetworkRow]:
    """The networks that will count under a new grant: its tenant's on these hosts, with all that they carry (grants.py
    has the same in the store)."""
    carried: dict[int, list[NetworkRow]] = defaultdict(list)
    for row in networks.values():
        carried[row.carrier].append(row)
    level = [row for row in carried[grant.carrier] if row.tenant == grant.tenant]
    while level:
        yield from level
        level = [above for row in level for above in carried[row.id] if above.grant == row.grant]


def _nothing_new(pairs: Iterable[Pair], wanted: _Wanted, state: State) -> None:
    """Raise Conflict for what is new and would be carried by a grant that is suspended, or made from one."""
    shut: dict[int, bool] = {}
    for old, new in pairs:
        if old is None and new is not None and f"{new.kind}s" in QUOTAS:
            grant = wanted.networks[new.network].grant
            while grant is not None and not shut.setdefault(grant, not state.grants[grant].is_open):
                grant = below.grant if (below := state.networks.get(state.grants[grant].carrier)) is not None else None
            if grant is not None:
                what = f"{new.kind} {wanted.paths[new.network]}"
                what += f"/{new.name}" if new.kind != "network" and not isinstance(new, PolicyRow) else ""
                raise Conflict(f"{what} cannot be made: nothing new is carried on these hosts now", "suspended")


def _tenants_told(wishes: Iterable[TenantWish], state: State) -> Iterator[Change]:
    """Tenants that change. One that is only named comes with the network that does."""
    for wish in wishes:
        quota = {what: n for what, n in asdict(wish.quota).items() if n is not None}
        at = join("tenants", wish.name)
        if wish.name not in state.parents:
            if quota or wish.parent is not None:
                yield Change("+", "tenant", wish.name, {"parent": wish.parent, "quota": quota}, at)
            continue
        had = {what: n for what, n in asdict(state.quotas[wish.name]).items() if n is not None}
        fields: dict[str, list[Any]] = {"parent": [state.parents[wish.name], wish.parent], "quota": [had, quota]}
        yield Change("~", "tenant", wish.name, {k: v for k, v in fields.items() if v[0] != v[1]}, at)


def _told(pairs: Iterable[Pair], wanted: _Wanted, state: State) -> Iterator[Change]:
    tell = _Teller(wanted, state)
    for old, new in pairs:
        row = new or old
        assert row is not None
        if isinstance(row, GroupRow):
            continue
        before = tell.fields(old, False) if old else {}
        after = tell.fields(new, True) if new else {}
        pointer = wanted.pointers.get((row.kind, row.id), "") if new else ""
        if old is None:
            fields = {k: v for k, v in after.items() if (v is not True if k == "enabled" else v or k == "up")}
            yield Change("+", row.kind, tell.path(row, True), fields, pointer)
        elif new is None:
            yield Change("-", row.kind, tell.path(row, False), {})
        else:
            fields = {k: [before[k], after[k]] for k in after if before[k] != after[k]}
            yield Change("~", row.kind, tell.path(row, True), fields, pointer)


class _Teller:
    """Rows in the words of the manifest."""

    def __init__(self, wanted: _Wanted, state: State) -> None:
        self._wanted = wanted
        self._state = state
        self._names: dict[tuple[int, bool], dict[tuple[str, int], str]] = {}
        self._hosts = {id: name for name, id in state.machines.items()}

    def _names_in(self, network: int, after: bool) -> dict[tuple[str, int], str]:
        """What is called how in a network, by kind and id."""
        if (network, after) not in self._names:
            contents = (self._wanted if after else self._state).contents[network]
            self._names[network, after] = {
                (row.kind, row.id): row.name for row in contents if not isinstance(row, PolicyRow)
            }
        return self._names[network, after]

    def path(self, row: Row, after: bool) -> str:
        paths = self._wanted.paths
        network = paths[row.network] if after else self._state.path(row.network)
        if isinstance(row, NetworkRow):
            return network
        return f"{network}/{row.name if not isinstance(row, PolicyRow) else policy_words(row.spec)}"

    def fields(self, row: Row, after: bool) -> dict[str, Any]:
        if isinstance(row, PolicyRow):
            return dict(json.loads(row.spec))
        if isinstance(row, GroupRow):
            return {}
        more: dict[str, Any] = {"labels": json.loads(row.labels), "description": row.description}
        if isinstance(row, NetworkRow):
            return {
                "tenant": row.tenant,
                "carriage": _carriage_of(row),
                "underlay": row.underlay,
                "mtu": row.mtu,
                "enabled": row.enabled,
                **more,
            }
        if isinstance(row, SegmentRow):
            vlan = {"id": row.vlan, "on": row.physical} if row.physical is not None else None
            return {
                "cidr": list(row.cidrs), "dns": list(row.dns), "transparent": row.transparent, "vlan": vlan, **more
            }  # fmt: skip
        names = self._names_in(row.network, after)
        if isinstance(row, RouterRow):
            return {"segments": {names["segment", id]: list(texts) for id, texts in row.interfaces}, **more}
        if isinstance(row, LinkRow):
            between = [names["router", id] for id in row.between]
            return {"between": between, "cost": row.cost, "rate": _rate_text(row.rate), "up": row.up, **more}
        carrier = (self._wanted.networks if after else self._state.networks)[row.network].carrier
        more |= {"trunk": names["port", row.trunk], "vlan": row.tag} if row.trunk else {}
        return {
            "segment": names["segment", row.segment],
            "host": self._hosts[row.host] if carrier == FABRIC else self._names_in(carrier, after)["port", row.host],
            "address": list(row.addresses),
            "mac": mac_text(row.mac) if row.mac is not None else None,
            "owns": list(row.owns),
            "groups": sorted(names["group", group] for group in row.groups),
            "hosts": row.hosts,
            "attach": {row.attach.kind: row.attach.name} if row.attach else {},
            "rate": _rate_text(row.rate),
            "enabled": row.enabled,
            **more,
        }


def _rate_text(rate: int) -> str | None:
    return rate_text(rate) if rate else None


def policy_words(spec: str) -> str:
    """A policy in one line, for it has no name: 'frontend -> database allow tcp/5432'."""
    data = json.loads(spec)
    verb = "allow" if "allow" in data else "deny"
    priority = "" if data["priority"] == 100 else f" priority {data['priority']}"
    return f"{','.join(data['from'])} -> {','.join(data['to'])} {verb} {','.join(data[verb])}{priority}"


def _label(row: SegmentRow) -> str:
    """What it rides on."""
    if row.physical is None:
        return "VXLAN"
    return f"VLAN {row.vlan} of {row.physical}" if row.vlan is not None else f"another VLAN of {row.physical}"


def _disturbed(pairs: list[Pair], wanted: _Wanted, state: State) -> Iterator[str]:
    """What running traffic would notice."""
    tell = _Teller(wanted, state)
    policies: Counter[int] = Counter()
    for old, new in pairs:
        if isinstance(old, PortRow | LinkRow) and isinstance(new, PortRow | LinkRow) and old.rate != new.rate:
            rates = [_rate_text(row.rate) or "none" for row in (old, new)]
            yield f"{tell.path(new, True)}: rate {rates[0]} becomes {rates[1]}"
        if isinstance(new, PortRow | NetworkRow) and getattr(old, "enabled", new.enabled) != new.enabled:
            yield from _switched(new, tell.path(new, True), wanted)
        if isinstance(old, PortRow) and new is None:
            yield f"{tell.path(old, False)} goes: its workload is cut off"
        elif isinstance(old, PortRow) and isinstance(new, PortRow):
            path = tell.path(new, True)
            before, after = tell.fields(old, False), tell.fields(new, True)
            for field in ("segment", "address", "mac", "host"):
                if before[field] != after[field]:
                    now = after[field] if after[field] is not None else "another"
                    yield f"{path}: {field} {_brief(before[field])} becomes {_brief(now)}, its connections end"
            if old.attach != new.attach:
                yield f"{path}: {f'leaves {old.attach}' if old.attach else 'the workload made for it ends'}"
        elif isinstance(old, SegmentRow) and isinstance(new, SegmentRow) and old.cidrs != new.cidrs:
            yield f"{tell.path(new, True)}: cidr {_brief(list(old.cidrs))} becomes {_brief(list(new.cidrs))}"
        elif isinstance(old, SegmentRow) and isinstance(new, SegmentRow) and _label(old) != _label(new):
            change = f"{_label(old)} becomes {_label(new)}"
            yield f"{tell.path(new, True)}: {change}, its frames between machines are lost until all have it so"
        elif isinstance(old, RouterRow) and (new is None or old.interfaces != getattr(new, "interfaces", None)):
            yield f"{tell.path(old, False)}: routes change"
        elif isinstance(link := new or old, LinkRow):
            if link.network in state.networks and (told := _rerouted(old, new)):
                yield f"{tell.path(link, new is not None)}: {told}, routes change"
        elif isinstance(old or new, PolicyRow):
            row = new or old
            assert row is not None
            policies[row.network] += 1
    for network in policies:
        if network in state.networks and network in wanted.networks:
            yield f"{wanted.paths[network]}: policies change, open connections are judged again"
    for network, carried in wanted.networks.items():
        affected = network < 0 or carried.carrier in policies
        if carried.carrier != FABRIC and affected and not _lets_carriage_pass(wanted.contents[carried.carrier]):
            path = wanted.paths[carried.carrier]
            yield f"{wanted.paths[network]} is cut off: no policy of {path} allows carriage between its hosts"


def _switched(row: PortRow | NetworkRow, path: str, wanted: _Wanted) -> Iterator[str]:
    """What goes down or comes back with a network, or with a port and what lives on it."""
    whose = f"{len(wanted.contents[row.id].ports)} ports" if isinstance(row, NetworkRow) else "its workload"
    if row.enabled:
        yield f"{path} is enabled: {whose} can talk again"
    else:
        yield f"{path} is disabled: {whose} cut off"
    above = {row.network} if isinstance(row, NetworkRow) else set()
    for id, network in wanted.networks.items():  # carriers first
        on_it = network.carrier == row.network and any(p.host == row.id for p in wanted.contents[id].ports.values())
        if network.carrier in above or (isinstance(row, PortRow) and on_it):
            above.add(id)
            yield f"{wanted.paths[id]} {'comes back' if row.enabled else 'goes down'} with {path}"


def _rerouted(old: Row | None, new: Row | None) -> str:
    """What happens to the traffic of a link; nothing, if it had none and gets none."""
    was = old if isinstance(old, LinkRow) and old.up else None
    now = new if isinstance(new, LinkRow) and new.up else None
    if was is None or now is None:
        return "comes up" if now is not None else "goes down" if was is not None else ""
    if was.between != now.between:
        return "joins other routers"
    return f"cost {was.cost} becomes {now.cost}" if was.cost != now.cost else ""


def _brief(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _lets_carriage_pass(contents: Contents) -> bool:
    """Is there no policy, or one that allows udp/4789 somewhere? (rule 3)"""

    def fits(service: Service) -> bool:
        return service.protocol == -1 or (service.protocol == UDP and service.low <= CARRIAGE_PORT <= service.high)

    return not contents.policies or any(
        policy.allow and any(map(fits, policy.services)) for policy in contents.policies.values()
    )


def _machines(touched: set[int], wanted: _Wanted, state: State, roots: list[int], scope: Scope) -> tuple[str, ...]:
    """Names of the machines that get rows: those with ports of what changes, or of what is carried by it. One on a host
    port is called by the path of that; to those who do not see what carries their networks it is the host."""
    names = {id: name for name, id in state.machines.items()}
    found: set[str] = set()
    for networks, contents in ((state.networks, state.contents), (wanted.networks, wanted.contents)):
        reached = set(touched)
        order = state.networks.above(roots) if networks is state.networks else list(wanted.networks)
        place: dict[int, Place] = {}  # of all levels
        paths: dict[int, str] = {}
        path = state.path if networks is state.networks else wanted.paths.__getitem__
        for network in order:  # carriers first
            if network in state.still:
                continue  # Somebody else's, and who is on them is told by their ports.
            carrier = networks[network].carrier
            if carrier in reached:
                reached.add(network)
            is_top = carrier != FABRIC and view.is_top(networks[network], networks, scope)
            hosts = {port.id: port.name for port in contents[carrier].ports.values()} if is_top else {}
            for port in contents[network].ports.values():
                place[port.id] = ("port", port.host) if is_top else _place(networks[network], port, place)
                paths[port.id] = f"{path(network)}/{port.name}"
                if is_top:
                    paths[port.host] = hosts[port.host]
                if network in reached:
                    kind, id = place[port.id]
                    found.add(names[id] if kind == "machine" else paths[id])
    return tuple(sorted(found))
