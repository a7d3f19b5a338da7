"""What must hold between the parts of a manifest, before anything is stored. Pure: values in, problems out.

    check(data, known)          everything wrong with the data, shape and values too; the whole manifest if nothing is
    validate(manifest, known)   what takes two or more values to see

A collection that is absent (None) is one whose content is not known here: nothing that refers into
it is judged. The store fills in what it has before it asks, so then everything is. Every rule
costs n log n at most: 20,000 ports take well under a second.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, permutations
from typing import Any, NamedTuple

from .breadth import RULES_PER_NETWORK, rules_at_most
from .errors import Invalid, Problem
from .manifest import (
    API_VERSION,
    ROUTERS_PER_SEGMENT,
    ROUTES_PER_NETWORK,
    Check,
    Manifest,
    NetworkSpec,
    PolicySpec,
    PortSpec,
    SegmentSpec,
    TaggedPortSpec,
    all_ports,
    mac_text,
    parse,
    place_of,
)
from .paths import most_on_a_way
from .problems import Nearest, in_order, join, meant, moved, quote, split
from .rates import PATH_BUCKETS
from .selectors import Names, parse_selector, parse_service
from .values import OVERHEAD, RIDING_BYTES, Address, Attach, Prefix, Selector

MACHINE_MTU = 1500  # of a machine that says nothing else
SMALLEST_MTU = {4: 576, 6: 1280}  # RFC 791, RFC 8200


@dataclass(frozen=True)
class Known:
    """What exists outside the manifest. Of what is None it is not known what exists: any name is believed.

    machines  names of machines
    tenants   tenant -> its parent or None
    networks  paths of networks, with whatever ports a check may name
    still     paths of those networks of the manifest that are stored just so, with all that carries them
    """

    machines: Collection[str] | None = ()
    tenants: Mapping[str, str | None] | None = field(default_factory=dict)
    networks: Container[str] | None = ()
    still: Container[str] = ()


OFFLINE = Known(machines=None, tenants=None, networks=None)  # a file alone, with nobody to ask


def check(data: object, known: Known) -> Manifest:
    """The manifest in `data`. Raises Invalid with every problem, in the order of `data`.

    What is broken in itself is taken out, and the rest judged without it, so that one misspelt key does
    not hide an overlap. A rule that a missing part might break only for being missing is then left out.
    """
    try:
        manifest = parse(data)
    except Invalid as error:
        problems = list(error.problems)
        rest, origin = _without(data, problems)
        if rest is not None:
            problems += [moved(p, origin(p.pointer)) for p in validate(rest, known) if p.code not in _NEEDS_ALL]
        raise Invalid(in_order(problems, data)) from None
    problems = validate(manifest, known)
    if problems:
        raise Invalid(in_order(problems, data))
    return manifest


def underlay_family(manifest: Manifest) -> int | None:
    """Of the machines' addresses, as the manifest has it: by an address, or by what a network on the wire says."""
    addresses = (m.address for m in (manifest.machines or {}).values() if m.address is not None)
    said = (network.underlay for network in (manifest.networks or {}).values() if network.underlay is not None)
    return next(chain((address.version for address in addresses), said), None)


def validate(manifest: Manifest, known: Known) -> list[Problem]:
    """The broken rules between the parts of `manifest`; empty if it can be stored."""
    return list(_Judge(manifest, known))


class _Level(NamedTuple):
    """One network on the walk: its pointer, its path and the network that carries it (None: the wire)."""

    at: str
    path: str
    network: NetworkSpec
    carrier: NetworkSpec | None


class _Judge:
    """One look at a manifest: what every rule needs, computed once."""

    def __init__(self, manifest: Manifest, known: Known) -> None:
        self.manifest = manifest
        self.known = known
        self.nearest = Nearest()
        self.levels = list(_levels(manifest))
        self.machines: set[str] | None = None
        if known.machines is not None:
            self.machines = {*known.machines, *(manifest.machines or {})}
        mtus = [m.mtu or MACHINE_MTU for m in (manifest.machines or {}).values()]
        self.mtu = min(mtus, default=None)
        specs = self.manifest.machines or {}
        # By machine. None: nobody knows, for the manifest says nothing of them.
        self.trunks = {name: spec.trunks for name, spec in specs.items()}
        self.vlans: dict[tuple[str, int], str] = {}  # of a physical network -> the segment that has it
        self.family = underlay_family(manifest)
        self.overhead = OVERHEAD[self.family or 4]
        self.left: dict[str, int | None] = {}  # by path: what its machines leave to a network; None: nobody knows
        self.mtus: dict[str, int | None] = {}  # and what it leaves to its own ports
        self.carriages = {level.path: level.network.carriage for level in self.levels}
        self.families: dict[
            str, tuple[str, int]
        ] = {}  # by path of a carrier: who first uses its hosts' agents, and how
        for level in self.levels:
            self._measure(level)

    def _measure(self, level: _Level) -> None:
        carrier = level.path.rpartition("/")[0]
        if level.carrier is None:
            left = self.mtu - self.overhead if self.mtu is not None else None
        elif level.network.carriage == "encapsulated":
            below = self.mtus[carrier]
            left = below - OVERHEAD[level.network.underlay or 4] if below is not None else None
        else:
            left = self.left[carrier]
        chosen = level.network.mtu
        self.left[level.path] = left
        self.mtus[level.path] = min(left, chosen) if left is not None and chosen is not None else chosen or left

    def __iter__(self) -> Iterator[Problem]:
        yield from self._machines()
        yield from self._tenants()
        for level in self.levels:
            yield from _Network(self, level) if level.path not in self.known.still else ()
        yield from self._attached()
        yield from self._rates()
        yield from self._checks()

    def _attached(self) -> Iterator[Problem]:
        """A namespace or tap is one port's, whatever network that is in, on the machine at the bottom of its hosts."""
        machines: dict[tuple[str, str], str] = {}  # (path of a network, port) -> machine
        given: dict[tuple[str, Attach], str] = {}
        for level in self.levels:
            carrier = level.path.rpartition("/")[0]
            for name, port in all_ports(level.network.ports).items():
                machine = port.host if level.carrier is None else machines.get((carrier, port.host))
                if level.carrier is not None and level.network.carriage == "encapsulated":
                    machine = f"{carrier}/{port.host}"
                if machine is None:
                    continue
                machines[level.path, name] = machine
                attach = port.attach.value if port.attach is not None else None
                path = f"{level.path}/{name}"
                if attach is not None and (other := given.setdefault((machine, attach), path)) != path:
                    at = f"{level.at}/ports/{name}/attach/{attach.kind}"
                    yield Problem("duplicate_attach", at, given_already(attach, machine, other))

    def _machines(self) -> Iterator[Problem]:
        seen: dict[Address, str] = {}
        for name, machine in (self.manifest.machines or {}).items():
            if machine.address is not None and (other := seen.setdefault(machine.address, name)) != name:
                message = f"{machine.address} is the address of machine {other} already"
                yield Problem("duplicate_address", join("machines", name, "address"), message)
            if machine.address is not None and machine.address.version != self.family:
                others = next(
                    (f"{its} of {other}" for its, other in seen.items() if its.version == self.family), "others"
                )
                message = (
                    f"{machine.address} is IPv{machine.address.version}, unlike {others}: machines reach each other "
                )
                yield Problem("mixed_families", join("machines", name, "address"), message + "over one family")
            if self.family == 6 and machine.mtu is not None and machine.mtu < SMALLEST_MTU[6]:
                message = f"mtu is {machine.mtu}, but IPv6 needs {SMALLEST_MTU[6]}"
                yield Problem("mtu_too_small", join("machines", name, "mtu"), message, limit=SMALLEST_MTU[6])

            yield from two_ways(name, machine.nic or (), machine.trunks or {})

    def _tenants(self) -> Iterator[Problem]:
        declared = self.manifest.tenants or {}
        parents = {**(self.known.tenants or {}), **{name: tenant.parent for name, tenant in declared.items()}}
        for level in self.levels:
            if level.network.tenant is not None:
                parents.setdefault(level.network.tenant, None)
        rooted: set[str] = set()  # known to end at a tenant without a parent, or reported
        for name, tenant in declared.items():
            at = join("tenants", name, "parent")
            if tenant.parent is not None and tenant.parent not in parents and self.known.tenants is not None:
                near = self.nearest(tenant.parent, parents)
                yield Problem("missing_tenant", at, f"there is no tenant {tenant.parent}{meant(near)}", nearest=near)
            chain_, here = dict[str, None](), name
            while here not in rooted and here not in chain_ and (up := parents.get(here)) is not None:
                chain_[here] = None
                here = up
            if here in chain_:
                circle = [*list(chain_)[list(chain_).index(here) :], here]
                yield Problem("tenant_cycle", at, f"{name} ends in a circle of parents: {_some(circle, ' -> ')}")
            rooted.update(chain_, [here])

    def _rates(self) -> Iterator[Problem]:
        """How many buckets a packet pays at most: those of its own network, and of all that carry it (rule 8). Over
        links that are up now: one that is taken down may make ways longer, and the datapath then drops."""
        below: dict[str, int] = {}  # what a network takes as a carrier, with all carriers under it
        told: set[str] = set()
        for level in self.levels:
            carrier = level.path.rpartition("/")[0]
            ports = [port for port in all_ports(level.network.ports).values() if port.rate]
            links = _limits_on_a_way(level.network)
            # What is really stacked pays at each level by itself.
            carried = 0 if level.network.carriage == "encapsulated" else below.get(carrier, 0)
            below[level.path] = carried + links + min(2, sum(bool(port.hosts) for port in ports))
            most = carried + links + (2 if ports else 0)
            if most > PATH_BUCKETS and carrier not in told:
                told.add(level.path)
                parts = [(2 if ports else 0, "its ports"), (links, "links on the longest way"), (carried, "carriers")]
                text = ", ".join(f"{count} of {what}" for count, what in parts if count)
                message = f"a packet of {level.path} may meet {most} rates on its way ({text}): at most {PATH_BUCKETS}"
                yield Problem("cannot_flatten", level.at, message, limit=PATH_BUCKETS)
            elif carrier in told:
                told.add(level.path)

    def _checks(self) -> Iterator[Problem]:
        ports: dict[str, dict[str, PortSpec] | None] = {}
        for level in self.levels:
            ports[level.path] = None if level.network.ports is None else all_ports(level.network.ports)
        for index, one in enumerate(self.manifest.checks or ()):
            at = join("checks", index)
            yield from self._check_port(at + "/from", one.source, ports)
            yield from self._check_port(at + "/to", one.target, ports)
            if one.source == one.target:
                yield Problem("bad_check", at + "/to", f"from and to are both {one.source}: name two ports")
            yield from _check_send(at + "/send", one)

    def _check_port(self, at: str, path: str, known: Mapping[str, Mapping[str, PortSpec] | None]) -> Iterator[Problem]:
        """`known` has the ports of each network of the file, or None where they stay as they are."""
        where, slash, name = path.rpartition("/")
        ports = known.get(where)
        outside = self.known.networks is None or where in self.known.networks
        if not slash:
            yield Problem("missing_port", at, f"{quote(path)} is no path of a port: write one as network/port")
        elif where not in known and not outside:
            near = self.nearest(where, known)
            yield Problem("missing_port", at, f"there is no network {quote(where)}{meant(near)}", nearest=near)
        elif where in known and ports is None and not outside:
            yield Problem("missing_port", at, f"network {where} has no ports")
        elif ports is not None and name not in ports:
            near = self.nearest(name, ports)
            whole = f"{where}/{near}" if near else None
            yield Problem("missing_port", at, f"network {where} has no port {quote(name)}{meant(whole)}", nearest=whole)


def two_ways(machine: str, nics: Collection[str], trunks: Mapping[str, str]) -> Iterator[Problem]:
    """An interface is a trunk or a way to the underlay."""
    for on, nic in trunks.items():
        if nic in nics:
            message = f"{nic} is {machine}'s way to the underlay: a trunk has an interface of its own"
            yield Problem("duplicate_nic", join("machines", machine, "trunks", on), message)


def given_already(attach: Attach, machine: str, port: str) -> str:
    """What is wrong when another port hangs there."""
    return f"{attach} of {machine} is given to {port} already: detach that, or name another"


def _check_send(at: str, one: Check) -> Iterator[Problem]:
    protocol, _, port = one.send.partition("/")
    if one.send == "icmp":
        return
    if protocol in ("tcp", "udp") and port.isascii() and port.isdecimal():
        if not (len(port) <= 5 and 1 <= int(port) <= 65535):
            yield Problem("port_range", at, f"{quote(one.send)}: ports are 1 to 65535", limit=65535)
        return
    yield Problem("bad_check", at, f"{quote(one.send)} cannot be sent: write icmp, tcp/80 or udp/53")


def _levels(manifest: Manifest) -> Iterator[_Level]:
    """Every network, a carrier before what it carries, in the order of the text."""
    todo = [_Level(join("networks", name), name, network, None) for name, network in (manifest.networks or {}).items()][
        ::-1
    ]
    while todo:
        level = todo.pop()
        yield level
        below = (level.network.networks or {}).items()
        todo += [
            _Level(f"{level.at}/networks/{name}", f"{level.path}/{name}", network, level.network)
            for name, network in below
        ][::-1]


def _limits_on_a_way(network: NetworkSpec) -> int:
    """How many links with a rate a packet of this network passes at most."""
    links = [link for link in (network.links or {}).values() if link.up is not False and len(link.between) == 2]
    limited = {place for place, link in enumerate(links) if link.rate}
    if not limited:
        return 0
    joins: dict[str, list[str]] = defaultdict(list)
    for name, router in (network.routers or {}).items():
        for segment in router.segments or {}:
            joins[segment].append(name)
    return most_on_a_way(joins, [(link.between[0], link.between[1], link.cost) for link in links], limited)


class _Gateway(NamedTuple):
    address: Address
    router: str
    at: str


class _Network:
    """The rules inside one network."""

    def __init__(self, judge: _Judge, level: _Level) -> None:
        self.judge = judge
        self.at, self.path, self.network, self.carrier = level
        self.segments = self.network.segments or {}
        self.routers = self.network.routers or {}
        self.links = self.network.links or {}
        self.ports = all_ports(self.network.ports)
        self.underlay = self.network.underlay or 4
        self.gateways: dict[str, list[_Gateway]] = defaultdict(list)  # segment -> its gateways

    def __iter__(self) -> Iterator[Problem]:
        yield from self._whole()
        yield from self._two_cidrs()
        yield from self._on_vlans()
        yield from self._routers()
        yield from self._links()
        yield from self._ports()
        yield from self._full()
        yield from self._overlaps()
        yield from self._routes()
        yield from self._policies()

    def _whole(self) -> Iterator[Problem]:
        family, overhead = self.judge.family, self.judge.overhead
        if self.carrier is None and self.network.underlay not in (None, family):
            message = f"underlay is {self.network.underlay}, but the machines' addresses are IPv{family}: leave it out"
            yield Problem("host_family", self.at + "/underlay", message)
        yield from self._carriage()
        most = self.judge.left[self.path]
        mtu = self.network.mtu if self.network.mtu is not None else most
        if mtu is None:
            return
        carrier = self.path.rpartition("/")[0]
        is_stacked = carrier and self.network.carriage == "encapsulated"
        if most is not None and mtu > most:
            if is_stacked:
                less = OVERHEAD[self.underlay]
                what = f"the {most + less} of {carrier} less {less} for VXLAN leave {most}"
            elif self._domain():
                what = f"the machines on {self._domain()} leave {most}"
            else:
                what = f"the machines' {self.judge.mtu} less {overhead} for VXLAN leave {most}"
            yield Problem("mtu_too_large", self.at + "/mtu", f"mtu is {mtu}, but {what}", limit=most)
        leasts = {
            SMALLEST_MTU[cidr.version] + RIDING_BYTES * bool(segment.transparent)
            for segment in self.segments.values()
            for cidr in segment.cidr or ()
        }
        least = max(leasts, default=0)
        if mtu < least:
            machines = f"the machines on {self._domain()}" if self._domain() else "the machines"
            whose = "mtu is" if self.network.mtu is not None else f"{machines} leave an MTU of"
            message = f"{whose} {mtu}, but {'IPv6' if least >= SMALLEST_MTU[6] else 'IPv4'} needs {least}"
            at = self.at + ("/mtu" if self.network.mtu is not None else "")
            yield Problem("mtu_too_small", at, message, limit=least)

    def _domain(self) -> str:
        """The path of the network whose ports are the machines that its ports live on; '' if it is the fabric."""
        path = self.path
        while "/" in path and self.judge.carriages[path] != "encapsulated":
            path = path.rpartition("/")[0]
        return path.rpartition("/")[0]

    def _carriage(self) -> Iterator[Problem]:
        """What is encapsulated needs hosts with agents, which reach each other over one family."""
        if self.network.carriage != "encapsulated":
            return
        if self.carrier is None:
            message = "the wire carries it, and its machines run agents anyhow: leave carriage out"
            yield Problem("bad_value", self.at + "/carriage", message)
            return
        carrier = self.path.rpartition("/")[0]
        first, family = self.judge.families.setdefault(carrier, (self.path, self.underlay))
        if family != self.underlay:
            message = (
                f"underlay is {self.underlay}, but {first} has {family} on the same hosts: agents reach each other "
            )
            yield Problem("mixed_families", self.at + "/underlay", message + "over one family")

    def _two_cidrs(self) -> Iterator[Problem]:
        for name, segment in self.segments.items():
            seen: dict[int, Prefix] = {}
            for at, cidr in _items(f"{self.at}/segments/{name}/cidr", segment.cidr or ()):
                if cidr.version in seen:
                    message = f"{name} has {seen[cidr.version]} already: one CIDR of each family, or make a segment"
                    yield Problem("two_cidrs", at, message, limit=1)
                seen.setdefault(cidr.version, cidr)

    def _on_vlans(self) -> Iterator[Problem]:
        for name, segment in self.segments.items():
            on, at = _physical(segment), f"{self.at}/segments/{name}/vlan"
            if on is None or segment.vlan is None:
                continue
            said = _on(segment)
            if self.carrier is not None:
                message = f"{self.path} is carried by another network: VLANs are of machines{said}"
                yield Problem("on_vlan", at, message)
                continue
            if segment.transparent:
                yield Problem("on_vlan", at, f"{name} is transparent, and would have tags behind a tag{said}")
            trunks = self.judge.trunks.values()
            known = sorted({each for its in trunks for each in its or ()})
            if on not in known and (self.judge.machines is not None or known):
                near = self.judge.nearest(on, known)
                message = f"no machine has a trunk to {on}{meant(near)}"
                yield Problem("missing_physical", at + "/on", message, nearest=near)
            if segment.vlan.id is not None:
                path = f"{self.path}/{name}"
                other = self.judge.vlans.setdefault((on, segment.vlan.id), path)
                if other != path:
                    message = f"VLAN {segment.vlan.id} of {on} is that of {other} already"
                    yield Problem("duplicate_vlan", at + "/id", message)

    def _missing_segment(self, at: str, name: str) -> Iterator[Problem]:
        if self.network.segments is not None and name not in self.segments:
            near = self.judge.nearest(name, self.segments)
            message = f"network {self.path} has no segment {name}{meant(near)}"
            yield Problem("missing_segment", at, message, nearest=near)

    # Routers

    def _routers(self) -> Iterator[Problem]:
        for name, router in self.routers.items():
            as_list = not any((router.segments or {}).values())
            for index, (segment, given) in enumerate((router.segments or {}).items()):
                at = f"{self.at}/routers/{name}/segments/{index if as_list else segment}"
                yield from self._missing_segment(at, segment)
                if segment in self.segments:
                    yield from self._join(at, name, segment, given)

    def _join(self, at: str, router: str, segment: str, given: tuple[Address, ...]) -> Iterator[Problem]:
        """A router joins a segment: are its gateways addresses that it can have there?"""
        cidrs = _by_family(self.segments[segment])
        if not cidrs:
            message = f"{segment} has no CIDR, so {router} cannot route there: give it one"
            yield Problem("no_cidr", at, message)
            return
        joined = {gateway.router for gateway in self.gateways[segment]}
        if joined and _physical(self.segments[segment]) is not None:
            message = f"{segment} is joined by {min(joined)} already, and machines could not tell two routers apart"
            yield Problem("on_vlan", at, message + _on(self.segments[segment]), limit=1)
            return
        if len(joined) >= ROUTERS_PER_SEGMENT:
            message = f"{segment} is joined by {ROUTERS_PER_SEGMENT} routers already"
            yield Problem("limit_exceeded", at, message, limit=ROUTERS_PER_SEGMENT)
            return
        chosen: dict[int, Address] = {}
        for place, address in _items(at, given):
            if address.version in chosen:
                message = f"{router} has {chosen[address.version]} in {segment} already: one gateway of each family"
                yield Problem("bad_value", place, message, limit=1)
                continue
            chosen[address.version] = address
            yield from _fits(place, address, segment, cidrs, "the gateway")
            yield from self._new_gateway(place, _Gateway(address, router, place), segment)
        for family, cidr in cidrs.items():
            if family not in chosen:
                yield from self._new_gateway(at, _Gateway(_first(cidr), router, at), segment)

    def _new_gateway(self, at: str, gateway: _Gateway, segment: str) -> Iterator[Problem]:
        for other in self.gateways[segment]:
            if other.address == gateway.address:
                message = f"{gateway.address} is the gateway of {other.router} in {segment} already: choose another"
                yield Problem("duplicate_address", at, message)
        self.gateways[segment].append(gateway)

    # Links

    def _links(self) -> Iterator[Problem]:
        if self.network.routers is None:
            return
        for name, link in self.links.items():
            for index, router in enumerate(link.between):
                if router not in self.routers:
                    near = self.judge.nearest(router, self.routers)
                    message = f"network {self.path} has no router {router} for link {name} to join{meant(near)}"
                    yield Problem("missing_router", f"{self.at}/links/{name}/between/{index}", message, nearest=near)

    def _connected(self) -> list[list[str]]:
        """The routers in groups: those that links connect, up or down, are one; in the order of the text."""
        beyond: dict[str, list[str]] = defaultdict(list)
        for link in self.links.values():
            if all(router in self.routers for router in link.between):
                for here, there in permutations(link.between):
                    beyond[here].append(there)
        seen: set[str] = set()
        groups = []
        for router in self.routers:
            if router not in seen:
                group = [router]
                seen.add(router)
                for here in group:
                    new = dict.fromkeys(there for there in beyond[here] if there not in seen)
                    seen.update(new)
                    group += new
                groups.append(group)
        return groups

    @cached_property
    def _groups(self) -> list[tuple[list[str], list[str]]]:
        """Routers that links connect, and the segments that they join."""
        return [
            (group, list(dict.fromkeys(segment for name in group for segment in self.routers[name].segments or ())))
            for group in self._connected()
        ]

    def _routes(self) -> Iterator[Problem]:
        """Each router has a route to each prefix that it reaches when all links are up."""
        prefixes = Counter({name: len(segment.cidr or ()) for name, segment in self.segments.items()})
        prefixes.update(port.segment for port in self.ports.values() for _ in port.owns or ())
        sizes = [(len(group), sum(prefixes[name] for name in segments)) for group, segments in self._groups]
        count = sum(routers * known for routers, known in sizes)
        if count > ROUTES_PER_NETWORK:
            routers, known = max(sizes, key=lambda size: size[0] * size[1])
            message = f"its routers have {count} routes, and a network has at most {ROUTES_PER_NETWORK}: "
            message += f"links connect {routers} of them, which reach {known} prefixes; split the network"
            yield Problem("too_many_routes", f"{self.at}/routers", message, limit=ROUTES_PER_NETWORK)

    # Ports

    def _ports(self) -> Iterator[Problem]:
        cidrs = {name: _by_family(segment) for name, segment in self.segments.items()}
        gateways = {(segment, g.address): g.router for segment, all_ in self.gateways.items() for g in all_}
        addresses: dict[tuple[str, Address], str] = {}
        macs: dict[tuple[str, int], str] = {}
        on_trunk: dict[tuple[str, str], str] = {}  # (trunk, segment) -> how
        for name, port in self.ports.items():
            at = f"{self.at}/ports/{place_of(name, port)}"
            word = "/native" if port.vlans else "/segment"
            yield from self._missing_segment(at + word, port.segment)
            if not isinstance(port, TaggedPortSpec):
                yield from self._host(at + "/host", port)
            yield from self._trunk(at, port)
            yield from self._tags(at, name, port, on_trunk)
            for place, address in _items(at + "/address", port.address or ()):
                if port.segment in cidrs:
                    yield from _fits(place, address, port.segment, cidrs[port.segment], name)
                key = (port.segment, address)
                if key in gateways:
                    message = f"{address} is the gateway of {gateways[key]} in {port.segment}: choose another"
                    yield Problem("address_is_gateway", place, message)
                if (other := addresses.setdefault(key, name)) != name:
                    message = f"{address} is the address of {other} in {port.segment} already"
                    yield Problem("duplicate_address", place, message)
            mac = port.mac
            if mac is None and isinstance(port, TaggedPortSpec):
                mac = self.ports[port.trunk].mac
            if mac is not None and (other := macs.setdefault((port.segment, mac), name)) != name:
                message = f"{mac_text(mac)} is the MAC of {other} in {port.segment} already"
                yield Problem("duplicate_mac", at + "/mac", message)

    def _tags(self, at: str, name: str, port: PortSpec, on_trunk: dict[tuple[str, str], str]) -> Iterator[Problem]:
        trunk = port.trunk if isinstance(port, TaggedPortSpec) else name
        how = f"VLAN {port.tag}" if isinstance(port, TaggedPortSpec) else "native"
        if (other := on_trunk.setdefault((trunk, port.segment), how)) != how:
            message = f"{trunk} has segment {port.segment} already, as {other}: frames would have two ways in"
            yield Problem("vlan_overlap", at, message)
        segment = self.segments.get(port.segment)
        if segment is not None and segment.transparent:
            if port.vlans or isinstance(port, TaggedPortSpec):
                message = f"segment {port.segment} is transparent, all tags are its own: no trunk takes any off there"
                yield Problem("transparent", at, message)
            if port.hosts:
                message = f"{name} is in the transparent segment {port.segment}: a host is on an access port or a trunk"
                yield Problem("transparent", at + "/hosts", message)

    def _trunk(self, at: str, port: PortSpec) -> Iterator[Problem]:
        segment = self.segments.get(port.segment)
        on = _physical(segment) if segment is not None else None
        trunks = self.judge.trunks.get(port.host)
        if on is None or segment is None or self.carrier is not None:
            return
        known = {each for its in self.judge.trunks.values() for each in its or ()}
        if on in known and port.host in self.judge.trunks and on not in (trunks or ()):
            at += "" if isinstance(port, TaggedPortSpec) else "/host"
            message = f"{port.host} cannot have ports of segment {port.segment}: it has no trunk to {on}"
            yield Problem("missing_trunk", at, message)

    def _host(self, at: str, port: PortSpec) -> Iterator[Problem]:
        if self.carrier is None:
            machines = self.judge.machines
            if machines is not None and port.host not in machines:
                near = self.judge.nearest(port.host, machines)
                yield Problem("missing_machine", at, f"there is no machine {port.host}{meant(near)}", nearest=near)
            return
        if self.carrier.ports is None:
            return
        host = self.carrier.ports.get(port.host)
        carrier = self.path.rpartition("/")[0]
        if host is None:
            near = self.judge.nearest(port.host, self._hosts)
            message = f"network {carrier} has no port {port.host} to live on{meant(near)}"
            yield Problem("missing_host", at, message, nearest=near)
            return
        if not host.hosts:
            message = f"port {port.host} of {carrier} is no host: give it `hosts: true`"
            yield Problem("not_a_host", at, message)
        if self.carrier.segments is None or host.segment not in self.carrier.segments:
            return
        rides = self.carrier.segments[host.segment]
        if _physical(rides) is not None and self.network.carriage != "encapsulated":
            message = f"host {port.host} of {carrier} is in segment {host.segment}, over which nothing is carried flat"
            yield Problem("cannot_flatten", at, message + _on(rides))
        families = {a.version for a in host.address or self.carrier.segments[host.segment].cidr or ()}
        if self.underlay not in families:
            other = 10 - self.underlay
            hint = f"give it one, or write underlay: {other}" if other in families else "give it one"
            message = f"host {port.host} of {carrier} has no IPv{self.underlay} address to carry {self.path}: {hint}"
            yield Problem("host_family", at, message)

    @cached_property
    def _hosts(self) -> list[str]:
        return [name for name, port in (self.carrier.ports or {}).items() if port.hosts] if self.carrier else []

    def _full(self) -> Iterator[Problem]:
        """Next free is never the segment's first address (rule 32)."""
        wanting: dict[str, list[str]] = defaultdict(list)
        taken: dict[str, set[Address]] = defaultdict(set)
        for name, port in self.ports.items():
            if port.address is None:
                wanting[port.segment].append(name)
            else:
                taken[port.segment].update(port.address)
        for segment, names in wanting.items():
            if segment not in self.segments:
                continue
            gone = taken[segment].union(gateway.address for gateway in self.gateways[segment])
            for cidr in self.segments[segment].cidr or ():
                never = {_first(cidr), cidr.network_address, *_last(cidr)}
                used = sum(1 for address in gone if address in cidr and address not in never)
                free = cidr.num_addresses - len(never) - used
                if len(names) > free:
                    left = f"{cidr} has {free} addresses left for {len(names)} ports that want the next free one"
                    at = f"{self.at}/ports/{place_of(names[free], self.ports[names[free]])}"
                    yield Problem("segment_full", at, f"segment {segment} is full: {left}", limit=free)

    # Overlaps

    def _overlaps(self) -> Iterator[Problem]:
        owned: dict[str, list[_Range]] = defaultdict(list)
        order = 0
        for name, port in self.ports.items():
            for at, prefix in _items(f"{self.at}/ports/{place_of(name, port)}/owns", port.owns or ()):
                order += 1
                owned[port.segment].append(_Range.of(prefix, order, "owns_overlap", f"port {name}", at))
        own: dict[str, list[_Range]] = {}
        for place, (name, segment) in enumerate(self.segments.items()):
            own[name] = [
                _Range.of(cidr, place - len(self.segments), "cidr_overlap", f"segment {name}", at)
                for at, cidr in _items(f"{self.at}/segments/{name}/cidr", segment.cidr or ())
            ]
        scopes = [
            (
                f"router {group[0]}" if len(group) == 1 else f"routers that links connect ({_some(group, ', ')})",
                segments,
            )
            for group, segments in self._groups
        ]
        routed = set(chain.from_iterable(names for _, names in scopes))
        scopes += [(f"segment {name}", [name]) for name in own if name not in routed]
        reported: set[tuple[str, str]] = set()
        for scope, names in scopes:
            ranges = [r for name in names for r in chain(own.get(name, ()), owned.get(name, ()))]
            for outer, inner in _overlapping(ranges):
                # A segment's own second CIDR is told by two_cidrs.
                early, late = sorted((outer, inner), key=lambda r: r.order)
                if early.what == late.what or (early.at, late.at) in reported:
                    continue
                reported.add((early.at, late.at))
                verb = "overlaps" if late.code == "cidr_overlap" else "cannot be owned: it overlaps"
                message = f"{late.prefix} {verb} {early.prefix} of {early.what}, both under {scope}"
                if late.code == "owns_overlap" and early.code == "cidr_overlap":
                    message += ": inside a segment give the port an address"
                yield Problem(late.code, late.at, message)

    # Policies

    def _policies(self) -> Iterator[Problem]:
        if not self.network.policies:
            return
        names = Names(
            _numbered(group for port in self.ports.values() for group in port.groups or ()),
            _numbered(self.segments),
            _numbered(self.ports),
        )
        # With ports or segments unknown here, a name that is not found may well be one of them.
        complete = self.network.ports is not None and self.network.segments is not None
        sound = True
        for index, policy in enumerate(self.network.policies):
            for problem in self._policy(f"{self.at}/policies/{index}", policy, names):
                sound = False
                if complete or problem.code not in ("unknown_name", "ambiguous_name"):
                    yield problem
        if sound:
            yield from self._breadth(self.network.policies, names)

    def _breadth(self, policies: tuple[PolicySpec, ...], names: Names) -> Iterator[Problem]:
        sides = [
            (
                [parse_selector(text, names) for text in policy.sources],
                [parse_selector(text, names) for text in policy.targets],
                [parse_service(text) for text in policy.allow or policy.deny or ()],
            )
            for policy in policies
        ]
        count = rules_at_most(sides, (_identity(name, port, names) for name, port in self.ports.items()))
        if count > RULES_PER_NETWORK:
            message = f"these policies become {count} rules, and a network has at most {RULES_PER_NETWORK}: "
            message += "use fewer combinations of selectors and services, or split the network"
            yield Problem("too_many_rules", f"{self.at}/policies", message, limit=RULES_PER_NETWORK)

    def _policy(self, at: str, policy: PolicySpec, names: Names) -> Iterator[Problem]:
        for key, texts in (("from", policy.sources), ("to", policy.targets)):
            for place, text in _items(f"{at}/{key}", texts):
                try:
                    parse_selector(text, names, self.judge.nearest)
                except Invalid as error:
                    yield moved(error.problems[0], place)
        for key, services in (("allow", policy.allow), ("deny", policy.deny)):
            for place, text in _items(f"{at}/{key}", services or ()):
                try:
                    parse_service(text)
                except Invalid as error:
                    yield moved(error.problems[0], place)


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}


def _identity(name: str, port: PortSpec, names: Names) -> frozenset[Selector]:
    """The selectors that match this port by what it is."""
    matching = [Selector("inside"), Selector("port", names.ports[name])]
    matching += [Selector("group", names.groups[group]) for group in port.groups or ()]
    if port.segment in names.segments:
        matching.append(Selector("segment", names.segments[port.segment]))
    return frozenset([*matching, Selector("hosts")] if port.hosts else matching)


class _Range(NamedTuple):
    """A prefix as numbers. `order` is its place in the text, segments before ports."""

    version: int
    low: int
    size: int  # bits after the prefix
    order: int
    code: str
    what: str
    at: str
    prefix: Prefix

    @classmethod
    def of(cls, prefix: Prefix, order: int, code: str, what: str, at: str) -> _Range:
        low = int(prefix.network_address)
        return cls(prefix.version, low, prefix.max_prefixlen - prefix.prefixlen, order, code, what, at, prefix)

    def contains(self, other: _Range) -> bool:
        return self.version == other.version and self.low >> self.size == other.low >> self.size


def _overlapping(ranges: Iterable[_Range]) -> Iterator[tuple[_Range, _Range]]:
    """Each range that lies in another, with the innermost one around it. Prefixes nest or are disjoint, so sorted
    by their start, the wider first, those around the current one are a stack."""
    around: list[_Range] = []
    for here in sorted(ranges, key=lambda r: (r.version, r.low, -r.size, r.order)):
        while around and not around[-1].contains(here):
            around.pop()
        if around:
            yield around[-1], here
        around.append(here)


def _items(at: str, values: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Each value with its pointer: a single one may stand without a list."""
    if len(values) == 1:
        yield at, values[0]
    else:
        for index, value in enumerate(values):
            yield f"{at}/{index}", value


def _physical(segment: SegmentSpec) -> str | None:
    """The physical network that it rides on, if it does."""
    return segment.vlan.on if segment.vlan is not None else None


def _on(segment: SegmentSpec) -> str:
    """Why that is so: not for who does not see machines (store/view.py)."""
    vlan = segment.vlan
    if vlan is None:
        return ""
    return f" (it is on VLAN {vlan.id} of {vlan.on})" if vlan.id is not None else f" (it is on a VLAN of {vlan.on})"


def _by_family(segment: SegmentSpec) -> dict[int, Prefix]:
    """Its CIDRs, the first of a family if it has several."""
    return {cidr.version: cidr for cidr in reversed(segment.cidr or ())}


def _first(cidr: Prefix) -> Address:
    return cidr.network_address + 1


def _last(cidr: Prefix) -> tuple[Address, ...]:
    """The broadcast address, which only IPv4 has."""
    return (cidr.broadcast_address,) if cidr.version == 4 else ()


def _fits(at: str, address: Address, segment: str, cidrs: Mapping[int, Prefix], whose: str) -> Iterator[Problem]:
    cidr = cidrs.get(address.version)
    if cidr is None or address not in cidr:
        has = f"has {' and '.join(map(str, cidrs.values()))}" if cidrs else "has no CIDR"
        yield Problem("address_outside", at, f"{address} of {whose} is outside segment {segment}, which {has}")
    elif address == cidr.network_address:
        yield Problem("address_unusable", at, f"{address} is the network's own address in {cidr}: choose another")
    elif address in _last(cidr):
        yield Problem("address_unusable", at, f"{address} is the broadcast address of {cidr}: choose another")


def _some(items: list[str], between: str) -> str:
    return between.join(items if len(items) <= 8 else [*items[:7], "...", items[-1]])


# What is left when broken parts are taken out

# Rules that a whole manifest may keep although the rest of it breaks them.
_NEEDS_ALL = frozenset(
    {"missing_machine", "missing_host", "not_a_host", "host_family", "missing_segment", "missing_tenant"}
    | {"missing_router", "cannot_flatten"}
    | {"unknown_name", "missing_port", "address_outside", "address_is_gateway", "segment_full", "no_cidr"}
)


def _without(data: object, problems: list[Problem]) -> tuple[Manifest | None, Any]:
    """What can be judged of `data` once what `problems` point to is gone; and a function from pointers into that
    to pointers into `data`."""
    here = {**data, "apiVersion": API_VERSION} if isinstance(data, dict) else data
    problems = [p for p in problems if p.pointer != "/apiVersion" and (p.code, p.pointer) != ("missing_key", "")]
    origins: list[Any] = []  # the last cut first
    for _ in range(6):
        here, origin = _cut(here, [split(problem.pointer) for problem in problems])
        origins.insert(0, origin)
        if here is None:
            break
        try:
            manifest = parse(here)
        except Invalid as error:
            problems = list(error.problems)
            continue

        def back(pointer: str) -> str:
            for one in origins:
                pointer = one(pointer)
            return pointer

        return manifest, back
    return None, None


def _cut(data: object, places: list[list[str]]) -> tuple[object, Any]:
    """`data` without these places; and a function from pointers into the result to pointers into `data`."""
    gone = {tuple(place) for place in places}
    around = {place[:i] for place in gone for i in range(len(place))}
    kept: dict[str, list[int]] = {}

    def rebuild(at: Any, place: tuple[str, ...]) -> Any:
        if place not in around:
            return at
        if isinstance(at, dict):
            return {key: rebuild(value, (*place, key)) for key, value in at.items() if (*place, key) not in gone}
        if isinstance(at, list):
            left = [i for i in range(len(at)) if (*place, str(i)) not in gone]
            kept[join(*place)] = left
            return [rebuild(at[i], (*place, str(i))) for i in left]
        return at

    def origin(pointer: str) -> str:
        out = ""
        for step in split(pointer):
            indexes = kept.get(out)
            out += join(indexes[int(step)] if indexes and step.isdecimal() and int(step) < len(indexes) else step)
        return out

    return (None if () in gone else rebuild(data, ())), origin
