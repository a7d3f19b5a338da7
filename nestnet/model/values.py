"""The nouns, as frozen values with ids: what the store holds, the feed sends and agents compile.

    Machine          a computer that runs an agent
    Network          carried by another network, or by the wire
      Segment          one L2 broadcast domain
      Router           joins segments
      Link             joins two routers
      Port             an attachment point; lives on a host
      Policy           who may talk to whom

People write names; names live in `manifest.py` and in the store, never here. An id is a table
row number, above 0, never reused, or what an agent on a port knows it by (renumber.py). Id 0 as a carrier
is the fabric. What happens to a packet hangs on no order of ids: where there has to be one, it is of what is
in the values.

A *host* is where a port lives: a machine for networks carried by the fabric, a port of the
carrier for all others. `World` holds any number of these values and finds them by id.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from operator import itemgetter
from typing import Any, TypeVar

Address = IPv4Address | IPv6Address
Prefix = IPv4Network | IPv6Network

FABRIC = 0  # The carrier of networks that the wire carries.
MAX_HOPS = 63  # Routers on one way (rule 6). Mirrors MAX_HOPS in bpf/tables.h.
MAX_DEPTH = 64  # Levels that one walk down the carriers may take. Mirrors MAX_DEPTH in bpf/tables.h.
CARRIAGE_PORT = 4789  # RFC 7348.
CONNECTION_SHARE = 16384  # Connections that one port may have open, as their opener, on one machine.
RELAY = IPv6Address("fe80::1")  # Where a port's agent finds the relay to the controller, on its own link (rule 25).
RELAY_PORT = 4795  # TCP. No service has this number.
RIDING_BYTES = 8  # of the tags that may ride in a transparent segment
OVERHEAD = {4: 50, 6: 70}  # bytes before a frame, by family: Ethernet 14, IPv4 20 or IPv6 40, UDP 8, VXLAN 8


@dataclass(frozen=True, slots=True)
class Tag:
    """A VLAN of the wire, 1-4094, and of which standard its tags are: 802.1q, or 802.1ad, as providers have them."""

    id: int
    type: str = "802.1q"

    @property
    def label(self) -> int:
        """As the table `self` has it: EtherType << 16 | id."""
        return ETHER_TYPES[self.type] << 16 | self.id

    @property
    def short(self) -> int | dict[str, int | str]:
        """As people write it."""
        return self.id if self.type == "802.1q" else {"id": self.id, "type": self.type}

    def __str__(self) -> str:
        return str(self.id) if self.type == "802.1q" else f"{self.id} of {self.type}"


ETHER_TYPES = {"802.1q": 0x8100, "802.1ad": 0x88A8}


@dataclass(frozen=True, slots=True)
class Trunk:
    """A machine's NIC to the physical network `on`: to switches that give it VLANs with their tags. Both are names, and
    nothing else is known of them."""

    on: str
    nic: str


@dataclass(frozen=True, slots=True)
class Vlan:
    """What a segment rides on from machine to machine in place of VXLAN: the 802.1Q tag `id`, 1-4094, of the physical
    network `on`. Each machine with ports of the segment has a trunk to that."""

    id: int
    on: str


@dataclass(frozen=True, slots=True)
class Machine:
    """A computer that runs an agent, or a host port whose workload does (domains.py). `address` is its address in the
    underlay, `mtu` that of its NICs in bytes, `nics` their names; none: the one that has the address. `vlan` is
    that which all these are in: what they send and hear has its tag. `trunks` are to physical networks, one to each.
    Unless it is `enabled`, all that lives on it is closed: something that carries it is taken down (rule 12)."""

    id: int
    address: Address
    mtu: int = 1500
    nics: tuple[str, ...] = ()
    enabled: bool = True
    vlan: Tag | None = None
    trunks: tuple[Trunk, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """`carrier` is a network's id or FABRIC; `underlay` the address family (4 or 6) it is carried in there;
    `mtu` what its workloads get, in bytes of IP. `encapsulated`: its hosts run agents of their own, and the
    carrier's know nothing of it (domains.py); otherwise it is carried flat. The fabric carries nothing encapsulated."""

    id: int
    carrier: int = FABRIC
    underlay: int = 4
    mtu: int = 1450
    enabled: bool = True
    encapsulated: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """One broadcast domain. `vni` is its label in its domain (RFC 7348), `cidrs` at most one of each family, `dns` the
    servers that its workloads are told to ask for names. `transparent`: frames with tags ride in it untouched, as in a
    wire; what is inside has RIDING_BYTES less room for that. `vlan`: it rides on that, and not in VXLAN."""

    id: int
    network: int
    vni: int
    cidrs: tuple[Prefix, ...] = ()
    dns: tuple[Address, ...] = ()
    transparent: bool = False
    vlan: Vlan | None = None


@dataclass(frozen=True, slots=True)
class Interface:
    """A router's place in a segment: the gateway addresses there, one of each family of the segment."""

    segment: int
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Router:
    """One distributed L3 instance. It has the same `mac` (48 bits) in all its segments, on every machine."""

    id: int
    network: int
    mac: int
    interfaces: tuple[Interface, ...] = ()


@dataclass(frozen=True, slots=True)
class Link:
    """Joins two routers of a network (by id), both ways. Routes follow the least sum of `cost` (1 to 65535) over links
    that are `up`; several paths of equal cost share the flows (rule 7). `rate` is what each machine may send over it in
    either direction, in bit/s (rule 8); 0: no limit."""

    id: int
    network: int
    between: tuple[int, int]
    cost: int = 1
    up: bool = True
    rate: int = 0


@dataclass(frozen=True, slots=True)
class Attach:
    """What a port's workload hangs on, by its name on the port's machine. `kind` is netns, a network namespace as `ip
    netns` knows it, or tap, a device of that machine."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Port:
    """An attachment point.

    host       id of a machine if the fabric carries the network, else of a port of the carrier
    addresses  its own, in the order given: the first of a family is its host address (rule 1)
    owns       further prefixes it may send from; a router on its segment routes them to it
    groups     ids of the groups it belongs to, rising
    hosts      may networks carried by this one live here?
    attach     what its workload hangs on; None: what the agent makes for it by itself, if it makes any
    rate       what it may send, and what may be sent to it, each, in bit/s (rule 8); 0: no limit
    other      where else it lives while it moves (rule 15): frames are taken from both, and go to `host`; 0: nowhere
    leaving    while it moves: frames for all pass it by, so that none comes twice
    agent      its workload runs an agent, a machine to what is carried there for real, which reaches the controller
               by a relay on the port (rule 25)
    trunk      the port whose attachment it shares: the frames that bear the 802.1Q `tag` there are its own; 0: it has
               one of its own. It lives and moves with its trunk, as its own `host`, `other` and `leaving` say
    """

    id: int
    network: int
    segment: int
    host: int
    mac: int
    addresses: tuple[Address, ...] = ()
    owns: tuple[Prefix, ...] = ()
    groups: tuple[int, ...] = ()
    hosts: bool = False
    enabled: bool = True
    attach: Attach | None = None
    rate: int = 0
    other: int = 0
    leaving: bool = False
    agent: bool = False
    trunk: int = 0
    tag: int = 0

    def address(self, family: int) -> Address | None:
        """Its first address of that family (4 or 6), or None."""
        return next((a for a in self.addresses if a.version == family), None)


@dataclass(frozen=True, slots=True, order=True)
class Selector:
    """One `from` or `to` of a policy (rule 40). `kind` is any, inside, hosts, cidr, group, segment or port;
    `id` names the group, segment or port, `cidr` the prefix."""

    kind: str
    id: int = 0
    cidr: Prefix | None = None


@dataclass(frozen=True, slots=True, order=True)
class Service:
    """What a policy is about: an IP protocol number, or -1 for any; destination ports low to high, inclusive.
    Only TCP and UDP have ports: for all else they are 0 to 65535."""

    protocol: int = -1
    low: int = 0
    high: int = 65535


@dataclass(frozen=True, slots=True)
class Policy:
    """Highest priority wins, then deny over allow (rule 41). Every `sources` to every `targets`."""

    id: int
    network: int
    sources: tuple[Selector, ...]
    targets: tuple[Selector, ...]
    services: tuple[Service, ...]
    allow: bool = True
    priority: int = 100


Value = Machine | Network | Segment | Router | Link | Port | Policy
KINDS: dict[str, type[Value]] = {
    "machine": Machine,
    "network": Network,
    "segment": Segment,
    "router": Router,
    "link": Link,
    "port": Port,
    "policy": Policy,
}


_WORDS = {type: word for word, type in KINDS.items()}


def kind_of(value: Value) -> str:
    """The word for what this is: 'port' for a Port. For all ports it is one and the same string."""
    return _WORDS[type(value)]


def link_local(mac: int) -> IPv6Address:
    """The only link-local address a MAC may use: EUI-64 (RFC 4291, appendix A)."""
    eui = ((mac >> 24) ^ 0x020000) << 40 | 0xFFFE << 24 | mac & 0xFFFFFF
    return IPv6Address(0xFE80 << 112 | eui)


def ranked(addresses: Iterable[Address]) -> list[tuple[int, int]]:
    """Who has these, among others in a segment: the least comes first."""
    return sorted((address.version, int(address)) for address in addresses)


@dataclass(frozen=True)
class World:
    """Some machines, networks and what is in them: all of it in a test, what one machine needs on an agent."""

    values: dict[tuple[str, int], Value] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Iterable[Value]) -> World:
        return cls({(kind_of(value), value.id): value for value in values})

    def with_(self, *values: Value) -> World:
        """The same world with these values added or replaced."""
        return World({**self.values, **{(kind_of(value), value.id): value for value in values}})

    def without(self, *keys: tuple[str, int]) -> World:
        gone = set(keys)
        return World({key: value for key, value in self.values.items() if key not in gone})

    def __iter__(self) -> Iterator[Value]:
        return iter(self.values.values())

    @cached_property
    def machines(self) -> dict[int, Machine]:
        return {v.id: v for v in self if isinstance(v, Machine)}

    @cached_property
    def networks(self) -> dict[int, Network]:
        return {v.id: v for v in self if isinstance(v, Network)}

    @cached_property
    def segments(self) -> dict[int, Segment]:
        return {v.id: v for v in self if isinstance(v, Segment)}

    @cached_property
    def routers(self) -> dict[int, Router]:
        return {v.id: v for v in self if isinstance(v, Router)}

    @cached_property
    def links(self) -> dict[int, Link]:
        return {v.id: v for v in self if isinstance(v, Link)}

    @cached_property
    def ports(self) -> dict[int, Port]:
        return {v.id: v for v in self if isinstance(v, Port)}

    @cached_property
    def policies(self) -> dict[int, Policy]:
        return {v.id: v for v in self if isinstance(v, Policy)}

    @cached_property
    def _ports_of_network(self) -> dict[int, list[Port]]:
        return _grouped((port.network, port.id, port) for port in self.ports.values())

    @cached_property
    def _ports_of_segment(self) -> dict[int, list[Port]]:
        return _grouped((port.segment, port.mac, port) for port in self.ports.values())

    @cached_property
    def _ports_of_trunk(self) -> dict[int, list[Port]]:
        return _grouped((port.trunk, port.tag, port) for port in self.ports.values() if port.trunk)

    @cached_property
    def _routers_of_segment(self) -> dict[int, list[Router]]:
        joined = ((i, router) for router in self.routers.values() for i in router.interfaces)
        return _grouped((i.segment, (ranked(i.addresses), router.mac), router) for i, router in joined)

    @cached_property
    def _links_of_router(self) -> dict[int, list[Link]]:
        ends = ((link, *way) for link in self.links.values() for way in (link.between, link.between[::-1]))
        # Those that are alike in all but the id are alike to every packet, too.
        return _grouped((near, (self._mac(far), link.rate, link.id), link) for link, near, far in ends)

    def _mac(self, router: int) -> int:
        return self.routers[router].mac if router in self.routers else 0

    @cached_property
    def _policies_of_network(self) -> dict[int, list[Policy]]:
        return _grouped((policy.network, policy.id, policy) for policy in self.policies.values())

    def ports_of(self, segment: int) -> list[Port]:
        """The ports of a segment, by rising MAC."""
        return self._ports_of_segment.get(segment, [])

    def ports_in(self, network: int) -> list[Port]:
        """The ports of a network, by rising id."""
        return self._ports_of_network.get(network, [])

    def vlans_of(self, trunk: int) -> list[Port]:
        """The ports that share the attachment of this one, each behind its tag, by rising tag."""
        return self._ports_of_trunk.get(trunk, [])

    def is_on(self, port: Port) -> bool:
        """Is it enabled, and the trunk that it hangs on?"""
        return port.enabled and (not port.trunk or self.ports[port.trunk].enabled)

    def mtu_of(self, *segments: int) -> int:
        """Bytes of IP, behind all tags, that may go from one of these segments of a network to another."""
        found = [self.segments[id] for id in segments]
        return self.networks[found[0].network].mtu - RIDING_BYTES * any(segment.transparent for segment in found)

    def routers_of(self, segment: int) -> list[Router]:
        """The routers joined to a segment, by rising address there, then MAC. The first is where its workloads' default
        route goes."""
        return self._routers_of_segment.get(segment, [])

    def links_of(self, router: int) -> list[Link]:
        """The links of a router, up or down, by rising MAC of the router at the other end, then rate, then id."""
        return self._links_of_router.get(router, [])

    def policies_of(self, network: int) -> list[Policy]:
        return self._policies_of_network.get(network, [])


T = TypeVar("T")


def _grouped(members: Iterable[tuple[int, Any, T]]) -> dict[int, list[T]]:
    """By the first of each three, in the order of the second."""
    groups: dict[int, list[tuple[Any, T]]] = defaultdict(list)
    for key, rank, value in members:
        groups[key].append((rank, value))
    return {key: [value for _, value in sorted(group, key=itemgetter(0))] for key, group in groups.items()}
