"""Random worlds, frames and conversations. Every feature joins here.

    worlds()                        machines, networks carried by networks to depth 6, and all that is in them
    frames(world, port, heard)      what a workload may send: nearly valid, and at interesting places
    rounds()                        a world that stays, and frames that get far in it
    chatter()                       what hosts say without being asked
    inquiries()                     workloads that ask for their addresses and talk to the relay, right and wrong
    dialogues()                     hosts that open, answer, complain, end, and come back too late
    torrents()                      more than rates allow
    conversations(world)            frames over time: answers, errors about earlier ones, changes of the world

Small things are likely and come first, so failures shrink to few objects with small numbers. Worlds keep
the rules of validation: `meaning` is defined for those only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TypeVar

from frames import (
    arp,
    echo,
    ethernet,
    extension,
    group_mac,
    icmp,
    icmp_protocol,
    ip_frame,
    ipv4,
    ipv6,
    neighbour,
    solicited,
    tcp,
    udp,
)
from hypothesis import strategies as st

from nestnet.model import bootstrap
from nestnet.model import packet as pk
from nestnet.model.domains import domain
from nestnet.model.meaning import State, deliver, reached
from nestnet.model.packet import mapped
from nestnet.model.values import (
    CARRIAGE_PORT,
    FABRIC,
    OVERHEAD,
    RELAY,
    RELAY_PORT,
    Address,
    Attach,
    Interface,
    Link,
    Machine,
    Network,
    Policy,
    Port,
    Prefix,
    Router,
    Segment,
    Selector,
    Service,
    Trunk,
    Vlan,
    World,
    link_local,
)

T = TypeVar("T")

DEPTH = 6
LEAVES = {4: 1450, 6: 1430}  # of the wire's 1500 bytes, to networks, by the family of the machines' addresses
JUMBO = 1850  # a wire with room for DEPTH levels that are encapsulated: the deepest gets about what workloads send

# ---- worlds


_upto = cache(lambda high: st.integers(0, high))  # Making a strategy costs more than drawing from it.


Draw = st.DrawFn | random.Random
"""Who chooses: hypothesis, which likes what is small and comes first, and makes failures smaller; or plain chance,
which likes nothing and gets further."""


def upto(draw: Draw, high: int) -> int:
    """0 to high, inclusive."""
    return draw.randint(0, high) if isinstance(draw, random.Random) else draw(_upto(high))


def pick(draw: Draw, things: Sequence[T]) -> T:
    """One of these; the first is the simplest."""
    return things[upto(draw, len(things) - 1)]


def rarely(draw: Draw, one_in: int = 8) -> bool:
    """False first. Not at an end of the range: hypothesis likes those better than their share."""
    return 2 * one_in <= upto(draw, 4 * one_in - 1) < 2 * one_in + 4


def on_the_wire(machine: int, family: int) -> Address:
    """The address of a machine in the underlay, from ranges for documentation."""
    return ip_network("192.0.2.0/24" if family == 4 else "2001:db8::/64")[machine]


def wire_family(world: World) -> int:
    """Of the machines' addresses; 4 if there is none."""
    return next((machine.address.version for machine in world.machines.values()), 4)


@st.composite
def worlds(
    draw: st.DrawFn,
    machines: int = 4,
    networks: int = 6,
    disabled: bool = True,
    carriages: bool = False,
    vlans: bool = True,
    physical: bool = True,
) -> World:
    """A consistent world. At most so many machines and networks. Without `disabled`
    everything is enabled. With `carriages` some networks are encapsulated, with `vlans` there are tags, with `physical`
    some segments are on VLANs of physical networks."""
    physical = physical and rarely(draw, 2)
    return a_world(draw, machines, networks, disabled, carriages=carriages, vlans=vlans, physical=physical)


def a_world(
    draw: Draw,
    machines: int = 4,
    networks: int = 6,
    disabled: bool = True,
    least: int = 1,
    policed: bool = True,
    carriages: bool = False,
    vlans: bool = False,
    physical: bool = False,
) -> World:
    """As `worlds`. Of machines and networks there are at least so many; unless `policed` there is no policy, and
    neighbours live far from each other."""
    family = pick(draw, [4, 4, 6])
    world = World.of(
        Machine(id, on_the_wire(id, family)) for id in range(1, max(least, upto(draw, machines - 1) + 1) + 1)
    )
    builder = _Builder(draw, world, disabled, policed)
    depth = {FABRIC: 0}
    for id in range(1, max(least, upto(draw, networks - 1) + 1) + 1):
        carriers = [n for n in depth if depth[n] < DEPTH and (n == FABRIC or builder.hosts_of(n))]
        # The last network first: chains are what we are here for.
        carrier = carriers[-1] if upto(draw, 1) else pick(draw, carriers)
        if physical and upto(draw, 3):  # Where nothing is carried there may be VLANs.
            carrier = FABRIC
        depth[id] = depth[carrier] + 1
        builder.network(id, carrier)
    world = with_vlans(draw, builder.world) if vlans else builder.world
    world = carried(draw, world) if carriages else world
    return with_physical(draw, world) if physical else world


TAGS = [10, 1, 4094, 20, 30]


def with_vlans(draw: Draw, world: World) -> World:
    """The same world: some segments where nobody hosts are transparent, some ports hang on a trunk with others."""
    used = {port.host for port in world.ports.values() if world.networks[port.network].carrier != FABRIC}
    for segment in list(world.segments.values()):
        ports = world.ports_of(segment.id)
        if not used & {port.id for port in ports} and pick(draw, [False, False, True]):
            silent = (replace(port, hosts=False, agent=False) for port in ports)
            world = world.with_(replace(segment, transparent=True), *silent)
    for id in sorted(world.ports):
        port = world.ports[id]
        taken = {
            trunk.id: {trunk.segment, *(v.segment for v in world.vlans_of(trunk.id))} for trunk in world.ports.values()
        }
        trunks = [
            trunk.id
            for trunk in world.ports_in(port.network)
            if not trunk.trunk and port.segment not in taken[trunk.id] and not world.segments[trunk.segment].transparent
        ]
        is_fit = id not in used and not world.vlans_of(id) and not world.segments[port.segment].transparent
        if is_fit and trunks and upto(draw, 1):
            trunk = world.ports[pick(draw, trunks)]
            free = [tag for tag in TAGS if tag not in {v.tag for v in world.vlans_of(trunk.id)}]
            port = replace(port, trunk=trunk.id, tag=pick(draw, free), hosts=False, agent=False, attach=None)
            world = together(world.with_(port), trunk)
    return world


PHYSICAL = ("campus", "lab")  # networks of switches that are not ours


def with_physical(draw: Draw, world: World) -> World:
    """The same world: some segments of networks that the wire carries are on VLANs of physical networks, to which each
    machine has a trunk; no others are, whatever they rode on before. None where what is carried flat lives, nor one
    that two routers join."""
    used = {
        host
        for port in world.ports.values()
        if world.networks[port.network].carrier != FABRIC and not world.networks[port.network].encapsulated
        for host in (port.host, port.other)
    }
    free = [Vlan(id, on) for on in PHYSICAL for id in TAGS]
    for segment in sorted(world.segments.values(), key=lambda segment: segment.id):
        is_fit = world.networks[segment.network].carrier == FABRIC and not segment.transparent
        is_fit &= len(world.routers_of(segment.id)) < 2 and not used & {p.id for p in world.ports_of(segment.id)}
        vlan = free.pop(upto(draw, len(free) - 1)) if is_fit and free and upto(draw, 3) else None
        if vlan != segment.vlan:
            world = world.with_(replace(segment, vlan=vlan))
    trunks = tuple(Trunk(on, f"eth{n}") for n, on in enumerate(PHYSICAL, start=1))
    return world.with_(*(replace(machine, trunks=trunks) for machine in world.machines.values()))


def together(world: World, trunk: Port) -> World:
    """The world with this port, and all that hang on it where it is."""
    place = {"host": trunk.host, "other": trunk.other, "leaving": trunk.leaving}
    return world.with_(trunk, *(replace(port, **place) for port in world.vlans_of(trunk.id)))


def carried(draw: Draw, world: World) -> World:
    """The same world, with some of its networks encapsulated."""
    return stacked(world, [id for id in sorted(world.networks) if upto(draw, 1)])


def stacked(world: World, chosen: Iterable[int]) -> World:
    """The same world on a wire with more room: of these networks all that can be are encapsulated, and each network has
    the MTU that its carriage leaves it (rule 9)."""
    world = world.with_(*(replace(machine, mtu=JUMBO) for machine in world.machines.values()))
    rooms = {FABRIC: JUMBO - OVERHEAD[wire_family(world)]}  # by domain: what it leaves to its networks
    for id, network in sorted(world.networks.items()):
        if id in chosen and network.carrier != FABRIC and _is_stackable(world, network):
            network = replace(network, encapsulated=True)
            rooms[network.carrier] = world.networks[network.carrier].mtu - OVERHEAD[network.underlay]
        world = world.with_(network)
        room = rooms[domain(world, id)]
        world = world.with_(replace(network, mtu=min(network.mtu, room) if network.mtu == 1280 else room))
    return world


def _is_stackable(world: World, network: Network) -> bool:
    """In a domain of a network, all hosts have an address of one family, and each one that no other has: where nothing
    joins segments, they may be the same."""
    others = [n for n in world.networks.values() if n.carrier == network.carrier and n.encapsulated]
    addresses = [port.address(network.underlay) for port in world.ports_in(network.carrier) if port.hosts]
    known = [address for address in addresses if address is not None]
    return all(other.underlay == network.underlay for other in others) and len(known) == len(set(known))


def tower(depth: int, family: int = 4) -> World:
    """Networks one upon the other, each with two ports in a segment, on two machines: at every level the two have the
    whole wire between them. `family`: of the machines' addresses."""
    values: list[Machine | Network | Segment | Port] = [Machine(id, on_the_wire(id, family)) for id in (1, 2)]
    for level in range(1, depth + 1):
        values += [
            Network(level, level - 1, family if level == 1 else 4, LEAVES[family]),
            Segment(level, level, 100 + level, (ip_network("10.0.0.0/24"),)),
        ]
        for side in (1, 2):
            host = side if level == 1 else 2 * (level - 2) + side
            address = (IPv4Address(f"10.0.0.{side}"),)
            values.append(Port(2 * (level - 1) + side, level, level, host, 0x020000000000 + side, address, hosts=True))
    return World.of(values)


def detour(levels: int = 2) -> World:
    """A tower whose lowest network has its ports in two segments, and two ways between them that cost the same."""
    world = tower(levels)
    west, east = world.segments[1], Segment(levels + 1, 1, 101 + levels, (ip_network("10.0.1.0/24"),))
    joins = ((west,), (), (), (east,))
    routers = [
        Router(n, 1, 0x060000000000 + n, tuple(Interface(s.id, (s.cidrs[0][1],)) for s in joined))
        for n, joined in enumerate(joins, 1)
    ]
    links = [Link(n, 1, between) for n, between in enumerate([(1, 2), (1, 3), (2, 4), (3, 4)], 1)]
    far = replace(world.ports[2], segment=east.id, addresses=(IPv4Address("10.0.1.2"),))
    return world.with_(east, far, *routers, *links)


def across(world: World, level: int, size: int = 8) -> bytes:
    """What the first port of a level of a tower sends to the second, with so many bytes in it."""
    first, second = world.ports_in(level)
    flow = mapped(first.addresses[0]), mapped(second.addresses[0])
    return ip_frame(second.mac, first.mac, *flow, pk.TCP, tcp(*flow, 1000, 80, pk.SYN, bytes(size)))


class _Builder:
    """Draws one network after the other, a carrier before what it carries."""

    def __init__(self, draw: Draw, world: World, disabled: bool, policed: bool) -> None:
        self.draw, self.world, self.disabled, self.policed = draw, world, disabled, policed

    def add(self, *values: Machine | Network | Segment | Router | Link | Port | Policy) -> None:
        self.world = self.world.with_(*values)

    def hosts_of(self, network: int, families: tuple[int, ...] = (4, 6)) -> list[Port]:
        ports = self.world.ports_in(network)
        return [p for p in ports if p.hosts and any(p.address(family) is not None for family in families)]

    def on(self, one_in: int) -> bool:
        return not (self.disabled and rarely(self.draw, one_in))

    def network(self, id: int, carrier: int) -> None:
        draw = self.draw
        families = (
            [wire_family(self.world)] if carrier == FABRIC else [f for f in (4, 6) if self.hosts_of(carrier, (f,))]
        )
        underlay = pick(draw, families)
        mtu = 1280 if rarely(draw) else LEAVES[wire_family(self.world)]
        self.add(Network(id, carrier, underlay, mtu, self.on(32)))
        if carrier == FABRIC:
            hosts = list(self.world.machines)
        else:
            hosts = [port.id for port in self.hosts_of(carrier, (underlay,))]
        segments = self.segments(id)
        count = pick(draw, [2, 3, 4, 1])
        ports = [self.port(id, segments, hosts) for _ in range(count)]
        self.owned(ports)
        if self.policed:
            self.policies(id)

    def segments(self, network: int) -> list[Segment]:
        """Some segments, and up to five routers that join some of them, or none, and links between those."""
        draw = self.draw
        first = len(self.world.segments) + 1
        ids = [first + i for i in range((upto(draw, 2) if self.policed else pick(draw, [0, 0, 1])) + 1)]
        count = pick(draw, [2, 1, 3, 4, 5])
        # Which routers join the segment: the ends of the chain most of the time.
        some = [(1,), (count,), (), (2,), (count,), (1,), (1, 2), (1, count)]
        joins = {id: {number for number in pick(draw, some) if number <= count} for id in ids}
        ends = self.ends(count)
        parts = components(range(1, count + 1), ends)
        segments: list[Segment] = []
        taken: dict[int, set[frozenset[int]]] = {}
        for place, id in enumerate(ids):
            # Routers that no links connect, nor join the same segment, may route to the same addresses.
            near = {part for part in parts if part & joins[id]}
            free = [number for number in range(place) if not near & taken[number]]
            number = pick(draw, [place, *free])
            taken.setdefault(place, set())
            taken[number] |= near
            cidrs = (ip_network(f"10.0.{number}.0/24"), ip_network(f"fd00:{number}::/64"))
            segments.append(Segment(id, network, 100 + id, pick(draw, [cidrs, cidrs[:1], cidrs[1:]])))
        self.add(*segments)
        ids_of_routers = {}
        for number in range(1, count + 1):
            interfaces = tuple(
                Interface(s.id, tuple(cidr.network_address + number for cidr in s.cidrs))
                for s in segments
                if number in joins[s.id]
            )
            # One that joins nothing is there for its links.
            if interfaces or any(number in pair for pair in ends):
                id = ids_of_routers[number] = max(self.world.routers, default=0) + 1
                self.add(Router(id, network, 0x06 << 40 | number * ODD % 2**40, interfaces))
        for a, b in ends:
            cost, up, rate = pick(draw, COSTS), not rarely(draw), pick(draw, RATES) if rarely(draw) else 0
            between = ids_of_routers[a], ids_of_routers[b]
            self.add(Link(len(self.world.links) + 1, network, between, cost, up, rate))
        return segments

    def ends(self, count: int) -> list[tuple[int, int]]:
        """The links between so many routers: a chain, then what makes cycles, parallel ones among them; or in parts."""
        draw = self.draw
        pairs = [(number, number + 1) for number in range(1, count)]
        if rarely(draw, 4):
            return [pair for pair in pairs if upto(draw, 1)]
        every = [(a, b) for a in range(1, count + 1) for b in range(1, count + 1) if a != b]
        if every:
            pairs += [pick(draw, every) for _ in range(pick(draw, [0, 1, 2, 4, 6]))]
        return pairs

    def port(self, network: int, segments: list[Segment], hosts: list[int]) -> Port:
        draw = self.draw
        segment = pick(draw, segments)
        turn = len(self.world.ports_in(network)) % len(hosts)
        here = len(self.world.ports_of(segment.id))
        cidrs = segment.cidrs[: 1 if rarely(draw) else None]
        addresses = tuple(cidr.network_address + 10 + here for cidr in cidrs)
        if rarely(draw):
            addresses += tuple(cidr.network_address + 30 + here for cidr in cidrs)
        port = Port(
            id=len(self.world.ports) + 1,
            network=network,
            segment=segment.id,
            host=pick(draw, hosts) if self.policed else hosts[turn],
            mac=0x020000000001 + here,  # as in any other segment
            addresses=addresses,
            groups=pick(draw, [(), (1,), (2,), (1, 2)]),
            hosts=upto(draw, 3) != 0,
            enabled=self.on(32),
            attach=Attach("tap", f"t{len(self.world.ports)}") if rarely(draw) else None,
            rate=pick(draw, RATES) if rarely(draw) else 0,
            agent=rarely(draw, 3),
        )
        self.add(port)
        return port

    def owned(self, ports: list[Port]) -> None:
        """Prefixes beyond the addresses: a port may nest its own, nothing else overlaps."""
        draw = self.draw
        left: list[tuple[Prefix, ...]] = [
            tuple(ip_network(text) for text in texts)
            for texts in (["10.9.0.0/16"], ["fd09::/32"], ["10.7.0.0/16", "10.7.1.0/24"], ["fd07::/48", "10.6.0.1/32"])
        ]
        cidrs = [cidr for port in ports for cidr in self.world.segments[port.segment].cidrs]
        for port in ports:
            if rarely(draw, 4):
                self.add(replace(port, owns=left.pop(upto(draw, len(left) - 1))))
                if not left:
                    break
        everything: Prefix = ip_network("::/0") if upto(draw, 1) else ip_network("0.0.0.0/0")
        others = [*cidrs, *(prefix for port in ports for prefix in self.world.ports[port.id].owns)]
        if rarely(draw) and not any(prefix.version == everything.version for prefix in others):
            self.add(replace(self.world.ports[ports[0].id], owns=(everything,)))

    def policies(self, network: int) -> None:
        draw = self.draw
        for _ in range(pick(draw, [0, 0, 1, 2, 4])):
            self.add(a_policy(draw, self.world, network, len(self.world.policies) + 1))
        hosting = any(port.hosts for port in self.world.ports_in(network))
        if self.world.policies_of(network) and hosting and not rarely(draw, 3):
            hosts = (Selector("hosts"),)
            carriage = (Service(pk.UDP, CARRIAGE_PORT, CARRIAGE_PORT),)
            self.add(
                Policy(
                    len(self.world.policies) + 1,
                    network,
                    hosts,
                    hosts,
                    carriage,
                    True,
                    pick(draw, [300, 100]),
                )
            )


ODD = 0x9E3779B97F  # so that MACs of routers rise in another order than their ids, and fill their bits
COSTS = [1, 1, 1, 2, 3, 65535]
RATES = [8_000, 64_000, 1_000_000, 10_000_000, 100_000_000_000]


def components(routers: Iterable[int], links: Iterable[tuple[int, int]]) -> list[frozenset[int]]:
    """The routers in parts: those of one part are connected by links."""
    parts = [frozenset({router}) for router in routers]
    for pair in links:
        touched = [part for part in parts if part & set(pair)]
        parts = [part for part in parts if part not in touched] + [frozenset().union(*touched)]
    return parts


SERVICES = [
    Service(),
    Service(pk.TCP),
    Service(pk.UDP),
    Service(pk.TCP, 80, 80),
    Service(pk.TCP, 80, 90),
    Service(pk.UDP, 53, 53),
    Service(pk.UDP, 50, 5000),
    Service(pk.UDP, CARRIAGE_PORT, CARRIAGE_PORT),
    Service(pk.ICMP),
    Service(pk.ICMPV6),
]

CIDRS = [
    ip_network(text)
    for text in (
        "10.0.0.0/24", "0.0.0.0/0", "10.0.0.0/8", "10.0.0.10/32", "10.0.0.10/31", "10.9.0.0/16",
        "fd00::/64", "::/0", "fd00::/16", "fd00::a/128", "fd09::/32", "fe80::/10",
    )
]  # fmt: skip


def selector(draw: Draw, world: World, network: int) -> Selector:
    kind = pick(draw, ["any", "inside", "hosts", "cidr", "group", "segment", "port"])
    if kind == "cidr":
        return Selector(kind, cidr=pick(draw, CIDRS))
    if kind == "group":
        return Selector(kind, pick(draw, [1, 2]))
    if kind == "segment":
        return Selector(kind, pick(draw, [s.id for s in world.segments.values() if s.network == network]))
    if kind == "port":
        ports = [port.id for port in world.ports_in(network)]
        return Selector(kind, pick(draw, ports)) if ports else Selector("any")
    return Selector(kind)


def a_policy(draw: Draw, world: World, network: int, id: int) -> Policy:
    """Of a network, from anybody to anybody of it about anything."""

    def some(one: Callable[[], T]) -> tuple[T, ...]:
        return tuple(one() for _ in range(pick(draw, [1, 1, 1, 2])))

    return Policy(
        id,
        network,
        some(lambda: selector(draw, world, network)),
        some(lambda: selector(draw, world, network)),
        some(lambda: pick(draw, SERVICES)),
        pick(draw, [True, True, False]),
        pick(draw, [100, 100, 200, 0, 65535]),
    )


@st.composite
def policies(draw: st.DrawFn, world: World, network: int, id: int) -> Policy:
    return a_policy(draw, world, network, id)


# ---- frames


@dataclass(frozen=True)
class Aim:
    """Where a frame may go: a MAC in the sender's segment, and an address."""

    mac: int
    address: bytes


UNKNOWN_MAC = 0x0200000000FF
BROADCAST4 = mapped(IPv4Address("255.255.255.255"))
ALL_NODES = mapped(IPv6Address("ff02::1"))
GROUP4 = mapped(IPv4Address("224.0.0.251"))
ALL_DHCP = mapped(bootstrap.ALL_DHCP)


def aims(world: World, port: Port) -> tuple[list[Aim], list[Aim]]:
    """Places that should work, and places that should not."""
    good: list[Aim] = []
    odd: list[Aim] = []
    for other in world.ports_of(port.segment):
        if other.id != port.id:
            good += [Aim(other.mac, mapped(address)) for address in other.addresses]
            odd.append(Aim(other.mac, mapped(link_local(other.mac))))
            odd += [Aim(other.mac, mapped(prefix[-1])) for prefix in other.owns]
    for router in world.routers_of(port.segment):
        # What links that are down lead to, too.
        behind = [i for id in sorted(connected(world, router.id)) for i in world.routers[id].interfaces]
        near = {i.segment for id in reached(world, router.id) for i in world.routers[id].interfaces}
        for interface in behind:
            if interface.segment not in near:
                odd += [Aim(router.mac, mapped(a)) for p in world.ports_of(interface.segment) for a in p.addresses]
                odd += [Aim(router.mac, mapped(address)) for address in interface.addresses]
                continue
            # Over links more often than through one router.
            weight = 1 if router in world.routers_of(interface.segment) else 4
            for other in world.ports_of(interface.segment) * weight:
                good += [Aim(router.mac, mapped(address)) for address in other.addresses]
                good += [Aim(router.mac, mapped(prefix[min(5, prefix.num_addresses - 1)])) for prefix in other.owns]
            good += [Aim(router.mac, mapped(address)) for address in interface.addresses]
            nobody = [cidr[99] for cidr in world.segments[interface.segment].cidrs]
            odd += [Aim(router.mac, mapped(address)) for address in nobody]
        odd += [Aim(router.mac, mapped(a)) for a in (link_local(router.mac), link_local(0x020000000001))]
    places = (*OUTSIDE, BROADCAST4)
    macs = [router.mac for router in world.routers_of(port.segment)]
    odd += [Aim(mac, address) for mac in (*macs, UNKNOWN_MAC) for address in places]
    odd += [Aim(pk.BROADCAST, BROADCAST4), Aim(group_mac(ALL_NODES), ALL_NODES), Aim(group_mac(GROUP4), GROUP4)]
    odd += [Aim(port.mac, mapped(address)) for address in port.addresses]
    return good or odd, odd


def connected(world: World, router: int) -> frozenset[int]:
    """The routers that links connect to this one, up or down."""
    parts = components(world.routers, (link.between for link in world.links.values()))
    return next(part for part in parts if router in part)


OUTSIDE = [mapped(ip_address(text)) for text in ("198.51.100.1", "2001:db8::1", "::ffff:10.0.0.10", "::", "0.0.0.0")]


def own_addresses(port: Port) -> list[bytes]:
    """What the port may send from: its addresses, its link-local one, and inside what it owns."""
    owned = [mapped(prefix[min(5, prefix.num_addresses - 1)]) for prefix in port.owns]
    return [*(mapped(address) for address in port.addresses), *owned, mapped(link_local(port.mac))]


PORTS = [80, 53, 1000, CARRIAGE_PORT, 90, 91, 67, 547]
FLAGS = [pk.SYN, pk.ACK, pk.SYN | pk.ACK, pk.FIN | pk.ACK, pk.RST, pk.SYN | pk.FIN, 0]
ODD_TYPES = {4: [13, 9, 10, 5, 3, 11, 12, 4], 6: [133, 130, 131, 132, 143, 134, 137, 1, 2, 3, 4, 200]}


def family_of(address: bytes) -> int:
    return 4 if pk.is_mapped(address) else 6


@st.composite
def frames(draw: st.DrawFn, world: World, port: Port, heard: tuple[bytes, ...] = ()) -> bytes:
    """A frame that the port's workload may try to send. `heard` are frames that were delivered to it: what it
    answers, and what its ICMP errors are about."""
    kind = pick(draw, _KINDS_OF_A_LISTENER if heard else _KINDS)
    if kind == "answer":
        return answers(draw, port, pick(draw, heard))
    if kind == "error":
        return errors(draw, port, pick(draw, heard))
    if kind == "noise":
        return draw(st.binary(max_size=80))
    if kind == "arp":
        return arps(draw, world, port)
    if kind == "neighbour":
        return neighbours(draw, world, port)
    if kind == "asks":
        return asks(draw, world, port)
    if kind == "relay":
        return to_relay(draw, world, port)
    frame = packets(draw, world, port)
    return damaged(draw, frame) if kind == "damaged" else frame


_KINDS = ["packet"] * 18 + ["arp"] * 2 + ["neighbour"] * 2 + ["damaged"] * 2 + ["asks", "relay", "noise"]
_KINDS_OF_A_LISTENER = ["answer"] * 12 + ["error"] * 5 + _KINDS


def packets(draw: st.DrawFn, world: World, port: Port) -> bytes:
    """An IP packet, most of the time one that nothing but policy may refuse."""
    good, odd = aims(world, port)
    aim = pick(draw, odd if rarely(draw, 5) else good)
    family = family_of(aim.address)
    own = [address for address in own_addresses(port) if family_of(address) == family]
    if own and not rarely(draw, 10):
        source = own[0] if upto(draw, 1) else pick(draw, own)
    else:  # somebody else's, or none
        others = [a.address for a in (*good, *odd) if family_of(a.address) == family]
        source = pick(draw, [*others, bytes(16) if family == 6 else pk.UNSPECIFIED4])
    protocol, payload = transports(draw, source, aim.address)
    if rarely(draw, 20):
        payload += bytes(pick(draw, [1230, 1400, 1452]))
    source_mac = UNKNOWN_MAC if rarely(draw, 24) else port.mac
    target_mac = pk.BROADCAST if rarely(draw, 24) else aim.mac
    ttl = pick(draw, [64] * 8 + [255, 2, 1, 0, 3, 4, 5])
    tos = pick(draw, [0, 0, 1, 2, 3, 0xB8])
    identification = 1 + upto(draw, 1)
    padding = bytes(pick(draw, [6, 6, 1500])) if rarely(draw, 10) else b""
    shape = pick(draw, ["whole"] * 10 + ["first", "later", "headers"])
    more = {"first": 0x2000, "later": pick(draw, [1, 0x2001])}.get(shape, 0) if shape != "headers" else 0
    if shape == "later":
        payload = payload[8:]
    if family == 4:
        options = b"\x94\x04\0\0" if shape == "headers" else b""
        body = ipv4(source, aim.address, protocol, payload, ttl, identification, more, tos, options)
        return ethernet(target_mac, source_mac, pk.IPV4, body + padding)
    kinds = [pick(draw, [60, 0, 43, 51, 44]) for _ in range(upto(draw, 7))] if shape == "headers" else []
    if more:
        kinds.append(44)
    headers, following = b"", protocol
    for place, header in enumerate(reversed(kinds)):
        bits = 0
        if more and place == 0:
            bits = (more & 0x1FFF) << 3 | more >> 13
        headers = extension(header, following, identification, bits) + headers
        following = header
    ends = [source, aim.address]
    if rarely(draw, 12):  # IPv4 written as IPv6
        ends[upto(draw, 1)] = pick(draw, [*(mapped(a) for a in port.addresses if a.version == 4), GROUP4])
    body = ipv6(ends[0], ends[1], following, payload, ttl, tos, headers)
    return ethernet(target_mac, source_mac, pk.IPV6, body + padding)


def transports(draw: st.DrawFn, source: bytes, target: bytes) -> tuple[int, bytes]:
    kind = pick(draw, ["tcp", "udp", "echo"] * 4 + ["icmp"] * 2 + ["other", "short"])
    if kind == "tcp":
        ports = pick(draw, [1000, 1001]), pick(draw, PORTS[:5])
        return pk.TCP, tcp(source, target, *ports, pick(draw, FLAGS))
    if kind == "udp":
        source_port = pick(draw, [1000, 1001, 49152, 67, 547, CARRIAGE_PORT])
        return pk.UDP, udp(source, target, source_port, pick(draw, PORTS), b"x" * upto(draw, 2))
    if kind == "echo":
        reply = pick(draw, [False, False, True])
        return icmp_protocol(target), echo(source, target, 1 + upto(draw, 1), reply)
    if kind == "icmp":
        quote = pick(draw, [b"", bytes(8), ipv4(target, source, 17, udp(target, source, 53, 1000))])
        type = pick(draw, ODD_TYPES[family_of(target)])
        return icmp_protocol(target), icmp(source, target, type, upto(draw, 1), payload=quote)
    if kind == "other":
        return pick(draw, [47, 50, 59, 132, 1, 58]), bytes(12)
    return pick(draw, [6, 17, 1, 58]), bytes(pick(draw, [0, 7, 19]))


def arps(draw: Draw, world: World, port: Port) -> bytes:
    known = [a.address for part in aims(world, port) for a in part if family_of(a.address) == 4]
    own = [mapped(address) for address in port.addresses if address.version == 4]
    sender = pick(draw, [*own * 8, *known, pk.UNSPECIFIED4])
    gateways = [a for r in world.routers_of(port.segment) for i in r.interfaces for a in i.addresses if a.version == 4]
    target = pick(draw, [*known, *(mapped(a) for a in gateways), *own, mapped(IPv4Address("10.0.0.99"))])
    mac = UNKNOWN_MAC if rarely(draw, 12) else port.mac
    operation = pick(draw, [1, 1, 1, 2, 3])
    frame = arp(operation, mac, sender, 0, target, pick(draw, [pk.BROADCAST, UNKNOWN_MAC]))
    frame = pk.with_ethernet(frame, int.from_bytes(frame[:6], "big"), port.mac)
    return frame + bytes(pick(draw, [0, 18]))


def neighbours(draw: Draw, world: World, port: Port) -> bytes:
    known = [a.address for part in aims(world, port) for a in part if family_of(a.address) == 6]
    gateways = [a for r in world.routers_of(port.segment) for i in r.interfaces for a in i.addresses if a.version == 6]
    gateways += [link_local(router.mac) for router in world.routers_of(port.segment)]
    own = [address for address in own_addresses(port) if family_of(address) == 6]
    type = pick(draw, [135, 135, 135, 136])
    about = pick(draw, [*(mapped(g) for g in gateways), *known, *own, RELAY.packed])
    if type == 136:
        about = pick(draw, [*own, about])
    source = pick(draw, [*own * 4, bytes(16), about])
    target = pick(draw, [solicited(about), about, ALL_NODES])
    mac = UNKNOWN_MAC if rarely(draw, 5) else port.mac
    option = pick(draw, [(1 if type == 135 else 2, mac), None, (2, mac), (14, mac)])
    body = neighbour(type, source, target, about, option, pick(draw, [0, 0xE0]))
    body += pick(draw, [b""] * 6 + [b"\x01", bytes(8), b"\x01\x02" + bytes(6), b"\x05\x01" + bytes(6)])
    ttl = pick(draw, [255, 255, 255, 255, 64])
    target_mac = group_mac(target) if target[0] == 0xFF else UNKNOWN_MAC
    if rarely(draw, 12):
        headers = extension(44, 58, fragment=pick(draw, [0, 1]))
        return ethernet(target_mac, port.mac, pk.IPV6, ipv6(source, target, 44, body, ttl, headers=headers))
    return ip_frame(target_mac, port.mac, source, target, 58, body, ttl)


def dhcps(draw: Draw, port: Port) -> bytes:
    """UDP of DHCP's ports, whole or in fragments, and mostly with nothing in it."""
    source_port, target_port = pick(draw, [(68, 67), (67, 68), (68, 68), (546, 547), (547, 546)])
    source = pick(draw, [pk.UNSPECIFIED4, *own_addresses(port)])
    target = BROADCAST4 if pk.is_mapped(source) else ALL_DHCP
    body = udp(source, target, source_port, target_port, bytes(pick(draw, [20, 20, 1460, 1480])))
    mac = group_mac(target) if target[0] == 0xFF else pk.BROADCAST
    if pk.is_mapped(source) and rarely(draw):
        return ethernet(mac, port.mac, pk.IPV4, ipv4(source, target, pk.UDP, body, fragment=pick(draw, [0x2000, 1])))
    return ip_frame(mac, port.mac, source, target, pk.UDP, body)


def asks(draw: Draw, world: World, port: Port) -> bytes:
    """What clients ask their network in the beginning, right, nearly right, and as others would like it."""
    kind = pick(draw, ["dhcp4"] * 3 + ["dhcp6"] * 3 + ["solicitation"] * 2 + ["empty"])
    if kind == "empty":
        return dhcps(draw, port)
    frame = {"dhcp4": _dhcp4, "dhcp6": _dhcp6, "solicitation": _solicitation}[kind](draw, world, port)
    return damaged(draw, frame) if rarely(draw) else frame


def _others(world: World, port: Port, family: int) -> list[bytes]:
    """Addresses that clients may speak of: the port's, its neighbours', and none of anybody's."""
    known = [a for other in (port, *world.ports_of(port.segment)) for a in other.addresses if a.version == family]
    return [a.packed for a in known] or [ip_address("10.9.9.9" if family == 4 else "fd09::9").packed]


def _server(world: World, port: Port) -> bootstrap.Settings:
    return bootstrap.settings(world, port)


def _dhcp4(draw: Draw, world: World, port: Port) -> bytes:
    record = _server(world, port)
    addresses = _others(world, port, 4)
    server = pick(draw, [record.server4.packed] * 4 + [b"\x0a\0\0\x63"])
    kind = pick(draw, [1, 3, 3, 3, 8, 4, 7, 2, 0])
    client = pick(draw, [bytes(4), bytes(4), *addresses])
    options = [(53, bytes([kind]))]
    if upto(draw, 1):
        options.append((50, pick(draw, addresses)))
    if upto(draw, 1):
        options.append((54, server))
    options += pick(draw, [[], [(55, b"\x01\x03\x06\x1a\x79")], [(61, b"\1" + pk.mac_bytes(port.mac)), (0, b"")]])
    mac = UNKNOWN_MAC if rarely(draw) else port.mac
    relay = pick(draw, [bytes(4)] * 8 + [addresses[0]])
    head = bytes([pick(draw, [1] * 8 + [2]), 1, 6, 0]) + b"xid!" + bytes(2) + pick(draw, [bytes(2), b"\x80\0"])
    head += client + bytes(8) + relay + pk.mac_bytes(mac) + bytes(10 + 192)
    body = head + pick(draw, [b"\x63\x82\x53\x63"] * 8 + [b"\x63\x82\x53\x64"])
    body += b"".join(bytes([code, len(value)]) + value if code else b"\0" for code, value in options)
    body += pick(draw, [b"\xff"] * 6 + [b"", b"\x0c\x20short\xff", b"\xff" + bytes(60)])
    own = [a for a in own_addresses(port) if family_of(a) == 4]
    source = pick(draw, [pk.UNSPECIFIED4, pk.UNSPECIFIED4, *own])
    to_server = source != pk.UNSPECIFIED4 and upto(draw, 1)
    target = mapped(record.server4) if to_server else BROADCAST4
    target_mac = record.server if to_server else pk.BROADCAST
    payload = udp(source, target, 68, 67, body)
    if rarely(draw):
        return ethernet(target_mac, port.mac, pk.IPV4, ipv4(source, target, pk.UDP, payload, fragment=0x2000))
    return ip_frame(target_mac, port.mac, source, target, pk.UDP, payload)


def _dhcp6(draw: Draw, world: World, port: Port) -> bytes:
    record = _server(world, port)
    addresses = _others(world, port, 6)

    def option(code: int, value: bytes) -> bytes:
        return code.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value

    kind = pick(draw, [1, 3, 4, 5, 6, 8, 9, 11, 2, 7, 12])
    named = kind in (3, 5, 8, 9) if not rarely(draw) else bool(upto(draw, 1))
    body = bytes([kind]) + b"xid"
    if not rarely(draw):
        body += option(1, pick(draw, [b"\0\3\0\1" + pk.mac_bytes(port.mac)] * 4 + [b"x", bytes(131)]))
    if named:
        body += option(2, b"\0\3\0\1" + pk.mac_bytes(pick(draw, [bootstrap.NOBODY_MAC] * 4 + [port.mac])))
    for number in range(pick(draw, [1, 1, 0, 2, 9]) if kind != 11 or rarely(draw) else 0):
        inside = b"".join(option(5, pick(draw, addresses) + bytes(8)) for _ in range(pick(draw, [0, 1, 2])))
        inside += pick(draw, [b""] * 6 + [b"\0\5\0\x40", option(5, bytes(3))])
        code = pick(draw, [3, 3, 3, 4, 25])
        body += option(code, number.to_bytes(4, "big") + (b"" if code == 4 else bytes(8)) + inside)
    body += pick(draw, [b"", option(14, b""), option(6, b"\0\x17"), option(8, b"\0\0"), b"\0"])
    own = [a for a in own_addresses(port) if family_of(a) == 6]
    source = pick(draw, own)
    target = pick(draw, [ALL_DHCP] * 4 + [mapped(record.server6)])
    target_mac = group_mac(target) if target[0] == 0xFF else record.server
    return ip_frame(target_mac, port.mac, source, target, pk.UDP, udp(source, target, 546, 547, body))


def _solicitation(draw: Draw, world: World, port: Port) -> bytes:
    record = _server(world, port)
    own = [a for a in own_addresses(port) if family_of(a) == 6]
    source = pick(draw, [*own, bytes(16)])
    target = pick(draw, [mapped(bootstrap.ALL_ROUTERS)] * 4 + [mapped(record.server6), ALL_NODES])
    mac = UNKNOWN_MAC if rarely(draw) else port.mac
    options = pick(draw, [b"", b"\1\1" + pk.mac_bytes(mac), b"\x0e\1nonce!", b"\1\0", b"\1"])
    body = icmp(source, target, 133, pick(draw, [0] * 8 + [1]), payload=options)
    ttl = pick(draw, [255] * 6 + [64])
    target_mac = group_mac(target) if target[0] == 0xFF else record.server
    if rarely(draw, 12):
        headers = extension(44, 58, fragment=pick(draw, [0, 1]))
        return ethernet(target_mac, port.mac, pk.IPV6, ipv6(source, target, 44, body, ttl, headers=headers))
    return ip_frame(target_mac, port.mac, source, target, pk.ICMPV6, body, ttl)


def to_relay(draw: Draw, world: World, port: Port) -> bytes:
    """What an agent in a workload sends to its relay, right, or wrong in one thing."""
    own = link_local(port.mac).packed
    source, target, target_mac, sport, dport = own, RELAY.packed, pk.NOBODY_MAC, 1000 + upto(draw, 1), RELAY_PORT
    flags, headers, size = pick(draw, FLAGS), b"", pick(draw, [0, 0, 12, 1500])
    wrong = pick(draw, ["", "", "", "source", "target", "mac", "port", "udp", "echo", "headers", "damaged"])
    if wrong == "source":
        others = [a.packed for p in world.ports.values() for a in (*p.addresses, link_local(p.mac)) if a.version == 6]
        source = pick(draw, [*others, bytes(16), own[:15] + bytes([own[15] ^ 1])])
    elif wrong == "target":
        near = ("fe80::2", "fe80:1::1", "fe80::1:0:0:1", "ff02::1", "fd00::1")
        target = IPv6Address(pick(draw, near)).packed
    elif wrong == "mac":
        macs = [other.mac for other in (*world.ports_of(port.segment), *world.routers_of(port.segment))]
        target_mac = pick(draw, [*macs, pk.BROADCAST, group_mac(target), pk.NOBODY_MAC + 1])
    elif wrong == "port":
        sport, dport = pick(draw, [(RELAY_PORT, 1000), (1000, RELAY_PORT + 1), (1000, 22), (1000, 7443)])
    payload = tcp(source, target, sport, dport, flags, bytes(size))
    protocol = pk.TCP
    if wrong == "udp":
        protocol, payload = pk.UDP, udp(source, target, sport, dport, bytes(size))
    elif wrong == "echo":
        protocol, payload = pk.ICMPV6, echo(source, target, 1)
    next_header = protocol
    if wrong == "headers":
        next_header = pick(draw, [44, 44, 0, 43, 60])
        headers = extension(next_header, protocol, fragment=pick(draw, [0, 1, 8, 9]))
    body = ipv6(source, target, next_header, payload, pick(draw, [64, 255, 1, 0]), pick(draw, [0, 2]), headers)
    mac = UNKNOWN_MAC if rarely(draw, 16) else port.mac
    frame = ethernet(target_mac, mac, pk.IPV6, body + bytes(pick(draw, [0, 0, 6])))
    return damaged(draw, frame) if wrong == "damaged" else frame


def damaged(draw: Draw, frame: bytes) -> bytes:
    """Cut, tagged, called something else, or with bits flipped."""
    kind = pick(draw, ["flip", "cut", "tag", "type", "control", "group"])
    if kind == "flip":
        copy = bytearray(frame)
        for _ in range(1 + upto(draw, 1)):
            copy[12 + upto(draw, min(len(copy), 80) - 13)] ^= 1 << upto(draw, 7)
        return bytes(copy)
    if kind == "cut":
        return frame[: upto(draw, min(len(frame), 80))]
    if kind == "tag":
        return frame[:12] + pick(draw, [b"\x81\x00", b"\x88\xa8"]) + b"\0\1" + frame[12:]
    if kind == "type":
        return frame[:12] + pick(draw, [b"\x08\x00", b"\x86\xdd", b"\x08\x06", b"\x88\xcc"]) + frame[14:]
    if kind == "control":
        return b"\x01\x80\xc2\x00\x00" + bytes([pick(draw, [0, 15, 16])]) + frame[6:]
    return b"\x01" + frame[1:]


def answers(draw: Draw, port: Port, heard: bytes) -> bytes:
    """What a workload answers to a frame it got: back to where it came from, as a host would."""
    packet = pk.parse(heard)
    if packet.family == 0 or packet.flaw:
        return pk.with_ethernet(heard, packet.source_mac, port.mac)
    flow = packet.flow.reversed
    if packet.fragment == pk.LATER:
        payload = b"x" * 8
    elif packet.protocol == pk.TCP:
        flags = pick(draw, [pk.SYN | pk.ACK, pk.ACK, pk.FIN | pk.ACK, pk.RST, pk.SYN])
        payload = tcp(flow.source, flow.target, flow.source_port, flow.target_port, flags)
    elif packet.protocol == pk.UDP:
        payload = udp(flow.source, flow.target, flow.source_port, flow.target_port, b"answer")
    elif packet.is_echo:
        payload = echo(flow.source, flow.target, flow.source_port, reply=pick(draw, [True, True, False]))
    else:
        payload = b"x" * 12
    return ip_frame(packet.source_mac, port.mac, flow.source, flow.target, flow.protocol, payload)


def errors(draw: Draw, port: Port, heard: bytes) -> bytes:
    """An ICMP error about a frame that the workload got, the quote whole, cut, or not quite what it was."""
    packet = pk.parse(heard)
    if packet.family == 0 or packet.flaw:
        return heard
    quote = bytearray(heard[pk.ETHERNET : packet.end])
    change = pick(draw, ["", "", "cut", "flip", "reverse"])
    if change == "cut":
        quote = quote[: pick(draw, [packet.offset - 14 + 8, packet.offset - 14 + 7, 19, 39, 0])]
    elif change == "flip":
        quote[upto(draw, len(quote) - 1)] ^= 1
    elif change == "reverse":
        quote = bytearray(answers(draw, port, heard)[pk.ETHERNET :])
    type = pick(draw, [3, 11, 12, 5, 4] if packet.family == 4 else [1, 3, 2, 4])
    source, target = packet.flow.target, packet.flow.source
    body = icmp(source, target, type, payload=bytes(quote[:512]))
    target_mac = pk.BROADCAST if rarely(draw) else packet.source_mac
    return ip_frame(target_mac, port.mac, source, target, icmp_protocol(target), body)


# ---- conversations


@dataclass(frozen=True)
class Step:
    """At `now` (seconds) the workload of `port` sends `frame`, in this world; while it moves perhaps from where else
    it lives."""

    now: float
    world: World
    port: int
    frame: bytes
    elsewhere: bool = False


def a_step(draw: Draw, now: float, world: World, port: int, frame: bytes, elsewhere: bool = False) -> Step:
    """With the tags that the frame bears where its port hangs: in a transparent segment any, or none."""
    sender = world.ports[port]
    if world.segments[sender.segment].transparent:
        frame = pk.tagged(frame, pick(draw, RIDING))
    return Step(now, world, *on_trunk(sender, frame), elsewhere)


RIDING = [
    b"", b"", b"\x81\0\0\x0a", b"\x88\xa8\0\x0a\x81\0\0\x01", b"\x81\0\0\0", b"\x88\xa8\xef\xff",
    b"\x81\0\0\x01\x81\0\0\x01", b"\x88\xa8\0\x01\x81\0\0\x01\x81\0\0\x01",
]  # fmt: skip


def on_trunk(port: Port, frame: bytes) -> tuple[int, bytes]:
    """Whose attachment a frame of this port is sent on, and how: with a tag of any priority."""
    return (port.trunk, pk.tagged(frame, pk.tag(len(frame) % 16 << 12 | port.tag))) if port.trunk else (port.id, frame)


def bare(frame: bytes) -> bytes:
    """What arrives, without tags."""
    return pk.untagged(frame, 3)[1]


START = 1000.0  # Seconds: buckets were filled long ago.

# Never sums to a lifetime exactly: the last instant of one is nobody's business.
PAUSES = [0.0, 0.001, 0.001, 0.01, 0.13, 1.003, 11.007, 31.013, 181.017, 7201.019]


@st.composite
def conversations(
    draw: st.DrawFn, world: World | None = None, steps: int = 12, changes: bool = True, moves: bool = True
) -> list[Step]:
    """Frames over time. Workloads answer what they got and complain about it; between frames the world may
    change: policies, administrative state, links, places, ports that go."""
    if world is None:
        world = draw(worlds())
    state, now = State(), START
    heard: dict[int, tuple[bytes, ...]] = {}
    done: list[Step] = []
    for _ in range(1 + upto(draw, steps - 1)):
        now += pick(draw, PAUSES)
        if changes and rarely(draw, 6):
            world = a_change(draw, world, moves)
        if not world.ports:
            break
        listeners = [id for id in heard if id in world.ports]
        # Every other time one of the last network, which lies deepest more often than not.
        everyone = sorted(world.ports) if upto(draw, 1) else [p.id for p in world.ports_in(max(world.networks))]
        everyone = everyone or sorted(world.ports)
        id = pick(draw, listeners if listeners and upto(draw, 1) else everyone)
        frame = draw(frames(world, world.ports[id], heard.get(id, ())))
        if done and rarely(draw, 8):  # the same once more
            again = pick(draw, done)
            if again.port in world.ports:
                id, frame = again.port, again.frame
        done.append(a_step(draw, now, world, id, frame, elsewhere=sends_elsewhere(draw, world)))
        outcome = deliver(world, state, done[-1].port, done[-1].frame, now)
        state = outcome.state
        for receiver, got in outcome.deliveries:
            heard[receiver] = (*heard.get(receiver, ())[-3:], bare(got))
    return done


@st.composite
def rounds(draw: st.DrawFn, carriages: bool = False) -> list[Step]:
    rng = random.Random(draw(st.integers(0, 1 << 64)))
    return some_rounds(rng, carriages, vlans=True, physical=rng.random() < 0.4)


def some_rounds(rng: random.Random, carriages: bool = False, vlans: bool = False, physical: bool = False) -> list[Step]:
    """In a world that stays as it is, workloads send to where it should work, and to all: many frames that get far,
    answers among them, from the networks with the longest chains of carriers first. In the end every network that
    carries another refuses to, for a while."""
    disabled, policed = rng.random() < 0.3, rng.random() < 0.5
    least = rng.choice([1, 3, 3])
    parts = {"carriages": carriages, "vlans": vlans, "physical": physical}
    world = a_world(rng, disabled=disabled, least=least, policed=policed, **parts)
    ports = sorted(world.ports.values(), key=lambda port: (-depth(world, port.network), rng.random()))
    steps: list[Step] = []
    for port in ports[:10]:
        good, _ = aims(world, port)
        for aim in [*rng.sample(good, min(len(good), 6)), Aim(pk.BROADCAST, pk.LIMITED_BROADCAST)]:
            own = [a for a in own_addresses(port) if pk.is_mapped(a) == pk.is_mapped(aim.address)]
            if not own:
                continue
            flow = rng.choice(own[:2]), aim.address
            protocol, payload = rng.choice(
                [
                    (pk.TCP, tcp(*flow, 1000, rng.choice([80, 90]), pk.SYN)),
                    (
                        pk.UDP,
                        udp(
                            *flow,
                            rng.choice([1000, 50000]),
                            rng.choice([53, 60, 4789]),
                            b"x" * rng.choice([0, 1230, 1403]),
                        ),
                    ),
                    (icmp_protocol(aim.address), echo(*flow, 1)),
                ]
            )
            ttl = rng.choice([64] * 6 + [1, 2, 3, 4])
            steps.append(a_step(rng, START, world, port.id, ip_frame(aim.mac, port.mac, *flow, protocol, payload, ttl)))
    carriers = sorted({network.carrier for network in world.networks.values()} - {FABRIC})
    for id, last in [(id, step) for id in carriers for step in steps[-6:]]:
        number = max(world.policies, default=0) + 1
        refused = Policy(number, id, (Selector("any"),), (Selector("any"),), (Service(pk.UDP),), False, 65535)
        steps.append(replace(last, world=world.with_(refused)))
        steps.append(last)
    return steps


def depth(world: World, network: int) -> int:
    carrier = world.networks[network].carrier
    return 1 if carrier == FABRIC else 1 + depth(world, carrier)


@st.composite
def crossings(draw: st.DrawFn) -> list[Step]:
    rng = random.Random(draw(st.integers(0, 1 << 64)))
    return some_crossings(rng, vlans=True, physical=rng.random() < 0.4)


def some_crossings(rng: random.Random, vlans: bool = False, physical: bool = False) -> list[Step]:
    """From all ports over links to all others, while links change: many flows, whole and in fragments, with enough TTL
    and just not."""
    world = a_world(rng, machines=2, networks=2, disabled=False, vlans=vlans, physical=physical)
    world = world.without(*(("policy", id) for id in world.policies))
    steps: list[Step] = []
    for _ in range(4):
        for router in world.routers:
            other = rng.choice(sorted(connected(world, router)))
            if other != router:  # One more between routers that links connect, so nothing overlaps that did not.
                id = max(world.links) + 1
                world = world.with_(Link(id, world.routers[router].network, (router, other), rng.choice([1, 1, 2])))
        links = [replace(link, up=rng.random() < 0.8, cost=rng.choice([1, 1, 2])) for link in world.links.values()]
        world = world.with_(*links)
        for port in world.ports.values():
            joined = set(world.routers_of(port.segment))
            near, odd = ([a for a in part if any(a.mac == r.mac for r in joined)] for part in aims(world, port))
            # And where nobody is: routers say so.
            for aim in [*rng.sample(near, min(len(near), 8)), *rng.sample(odd, min(len(odd), 3))]:
                own = [a for a in own_addresses(port) if pk.is_mapped(a) == pk.is_mapped(aim.address)]
                if not own:
                    continue
                flow = own[0], aim.address
                kind = rng.choice([pk.UDP, pk.UDP, pk.TCP, pk.ICMP, 47])
                sport = rng.randrange(1, 1 << 16)
                data = bytes(rng.choice([0, 0, 0, 1, 501, 1200, 1410, 1500]))
                protocol, payload = {
                    pk.UDP: (pk.UDP, udp(*flow, sport, 53, data)),
                    pk.TCP: (pk.TCP, tcp(*flow, sport, 80, pk.SYN)),
                    pk.ICMP: (icmp_protocol(aim.address), echo(*flow, sport)),
                    47: (47, bytes(12)),
                }[kind]
                ttl = rng.choice([64, 64, 1, 2, 3, 4, 5, 6])
                frame = ip_frame(aim.mac, port.mac, *flow, protocol, payload, ttl)
                if rng.random() < 0.4:  # in parts, of which each may have another TTL
                    for bits, part_ttl in ((0x2000, ttl), (1, rng.choice([ttl, ttl, 1, 2, 3]))):
                        part = _fragment(aim.mac, port.mac, *flow, protocol, payload, bits, part_ttl, sport)
                        steps.append(a_step(rng, START, world, port.id, part))
                steps.append(a_step(rng, START, world, port.id, frame))
    # One that does not listen: routers tell it so often and no more, and again after a while.
    refused = [step for step in steps if step.frame[12:14] == b"\x08\x00" and step.frame[22] < 3]
    if refused and rng.random() < 0.3:
        last = rng.choice(refused)
        steps += [replace(last, now=START + n / 1000) for n in range(230)]
    return steps


@st.composite
def torrents(draw: st.DrawFn, carriages: bool = False) -> list[Step]:
    rng = random.Random(draw(st.integers(0, 1 << 64)))
    return some_torrents(rng, carriages, vlans=True, physical=rng.random() < 0.4)


def some_torrents(
    rng: random.Random, carriages: bool = False, vlans: bool = False, physical: bool = False
) -> list[Step]:
    """More than rates allow: a few flows of long packets, one way and back, and frames for all, fast and less so, while
    rates, links and places change."""
    kind, often = rng.random(), rng.choice([0.2, 0.5, 1.0])
    if kind < 0.2:
        world = detour(rng.choice([2, 3]))
    elif kind < 0.4:
        world, often = tower(rng.choice([4, 5, 5])), 1.0
    else:
        least, policed = rng.choice([1, 2, 3]), rng.random() < 0.3
        world = a_world(rng, disabled=False, least=least, policed=policed, vlans=vlans)
    if carriages:
        world = carried(rng, world)
    if physical:
        world = with_physical(rng, world)
    limitable: list[Port | Link] = [*world.ports.values(), *world.links.values()]
    for value in limitable:
        if rng.random() < often:
            world = world.with_(replace(value, rate=rng.choice(RATES)))
    free = World.of(replace(value, rate=0) if isinstance(value, Port | Link) else value for value in world)
    flows: list[tuple[int, bytes]] = []
    deepest = sorted(world.ports.values(), key=lambda port: (-depth(world, port.network), rng.random()))
    for port in deepest[:3]:
        found: list[tuple[int, bytes, int, bytes]] = []  # sent, and what arrives
        good = aims(world, port)[0]
        for aim in [*rng.sample(good, min(len(good), 8)), Aim(pk.BROADCAST, pk.LIMITED_BROADCAST)]:
            own = [a for a in own_addresses(port) if pk.is_mapped(a) == pk.is_mapped(aim.address)]
            if own:
                frame = _torrent(rng, port, aim.mac, own[0], aim.address)
                arrived = deliver(free, State(), *on_trunk(port, frame), START).deliveries
                found += [(port.id, frame, to, bare(got)) for to, got in arrived if to != port.id]
        found.sort(key=lambda each: pk.parse(each[3]).ttl)
        # Over as many links as there are, and to all.
        for sender, frame, receiver, got in [*found[:1], *found[-1:], *rng.sample(found, min(len(found), 1))]:
            flows.append((sender, frame))
            if not pk.parse(got).is_group:
                flow = pk.parse(frame).flow
                back = _torrent(rng, world.ports[receiver], pk.parse(got).source_mac, flow.target, flow.source)
                flows.append((receiver, back))
    steps: list[Step] = []
    now = START
    for _ in range(60 if flows else 0):
        now += rng.choice([0, 0, 0, 0.000_001, 0.000_1, 0.001, 0.01, 0.1, 1.003])
        if rng.random() < 0.1:
            world = a_change(rng, world, moves=False, kinds=["rate", "rate", "rate", "link", "cost"])
        port_id, frame = rng.choice(flows)
        steps += [a_step(rng, now, world, port_id, frame)] * rng.choice([1, 1, 1, 12])
    return steps


def _torrent(rng: random.Random, port: Port, mac: int, source: bytes, target: bytes) -> bytes:
    """One packet of a flow that is the same in both directions, a long one most of the time."""
    some = rng.randrange(49152, 65536)
    ports = rng.choice([(1000, 1000), (some, some), (some, CARRIAGE_PORT)])
    payload = udp(source, target, *ports, bytes(rng.choice([1, 1200, 1200])))
    return ip_frame(mac, port.mac, source, target, pk.UDP, payload)


@st.composite
def chatter(draw: st.DrawFn) -> list[Step]:
    return some_chatter(draw, vlans=True, physical=rarely(draw, 2))


def some_chatter(draw: Draw, vlans: bool = False, physical: bool = False) -> list[Step]:
    """What hosts say without being asked, and what is nearly that: ARP, neighbour discovery, DHCP, odd ICMP."""
    world = a_world(draw, disabled=False, vlans=vlans, physical=physical)
    steps: list[Step] = []
    for _ in range(30):
        port = pick(draw, sorted(world.ports.values(), key=lambda port: port.id))
        kind = pick(draw, ["neighbour", "arp", "icmp", "asks", "relay"])
        if kind == "neighbour":
            frame = neighbours(draw, world, port)
        elif kind == "arp":
            frame = arps(draw, world, port)
        elif kind == "asks":
            frame = asks(draw, world, port)
        elif kind == "relay":
            frame = to_relay(draw, world, port)
        else:
            good, odd = aims(world, port)
            aim = pick(draw, [*good, *odd])
            family = family_of(aim.address)
            own = [address for address in own_addresses(port) if family_of(address) == family]
            if not own:
                continue
            source = pick(draw, own)
            body = icmp(source, aim.address, pick(draw, ODD_TYPES[family]), payload=bytes(16))
            frame = ip_frame(aim.mac, port.mac, source, aim.address, icmp_protocol(aim.address), body)
        steps.append(a_step(draw, START, world, port.id, frame))
    return steps


@st.composite
def inquiries(draw: st.DrawFn) -> list[Step]:
    return some_inquiries(draw, closing=draw(st.booleans()), vlans=True)


def some_inquiries(draw: Draw, closing: bool = False, vlans: bool = False) -> list[Step]:
    """Workloads that ask how to begin: the first more often than it is answered, then others now and then; and agents
    in them that talk to the relay, while ports get and lose theirs. `closing`: they, or their network, are disabled now
    and then."""
    world = a_world(draw, machines=2, networks=2, disabled=False, vlans=vlans)
    servers = tuple(ip_address(text) for text in ("10.0.0.53", "fd00::53"))
    world = world.with_(*(replace(s, dns=pick(draw, [servers, ()])) for s in world.segments.values()))
    if upto(draw, 1):
        world = world.with_(_given_agent(world, min(world.ports), True))
    ports = sorted(world.ports.values(), key=lambda port: port.id)
    now = START
    steps: list[Step] = []
    for _ in range(pick(draw, [1, 15, 30])):
        one = pick(draw, [asks, asks, asks, to_relay])
        steps.append(a_step(draw, now, world, ports[0].id, one(draw, world, ports[0])))
    for _ in range(20):
        now += pick(draw, [0.0, 0.3, 0.5, 1.003, 11.007])
        if rarely(draw, 6):
            changed = world.ports[pick(draw, ports[:3]).id]
            world = world.with_(_given_agent(world, changed.id, not changed.agent))
        if closing and rarely(draw, 4):  # what is disabled hears from the controller all the same
            changed = world.ports[pick(draw, ports[:3]).id]
            world = world.with_(replace(changed, enabled=not changed.enabled))
        if closing and rarely(draw, 12):
            whole = world.networks[ports[0].network]
            world = world.with_(replace(whole, enabled=not whole.enabled))
        port = pick(draw, ports[:3])
        one = pick(draw, [asks, to_relay, to_relay, neighbours])
        steps.append(a_step(draw, now, world, port.id, one(draw, world, port)))
    return steps


def _given_agent(world: World, port: int, agent: bool) -> Port:
    """Hosts alone run agents: no port with a tag, nor in a transparent segment, is one."""
    found = world.ports[port]
    fit = not found.trunk and not world.segments[found.segment].transparent
    return replace(found, agent=agent and fit)


@st.composite
def dialogues(draw: st.DrawFn, moves: bool = True, carriages: bool = False) -> list[Step]:
    rng = random.Random(draw(st.integers(0, 1 << 64)))
    return some_dialogues(rng, moves, carriages=carriages, vlans=True, physical=rng.random() < 0.4)


def some_dialogues(
    rng: random.Random,
    moves: bool = True,
    live: bool = True,
    carriages: bool = False,
    vlans: bool = False,
    physical: bool = False,
) -> list[Step]:
    """Two that talk, as hosts do: one opens, the other answers and complains; fragments, ends, pauses that are longer
    than lifetimes, and changes of the world in between. `moves`: ports may be elsewhere all at once, without what was
    known of their connections; `live`: phase by phase."""
    kinds = CHANGES if live else [kind for kind in CHANGES if kind != "live"]
    policed = rng.random() < 0.7
    parts = {"carriages": carriages, "vlans": vlans, "physical": physical}
    world = a_world(rng, disabled=False, least=rng.choice([1, 3]), policed=policed, **parts)
    state, now = State(), START
    steps: list[Step] = []

    def send(port: int, frame: bytes) -> list[tuple[int, bytes]]:
        nonlocal state
        if port not in world.ports:
            return []
        steps.append(a_step(rng, now, world, port, frame, elsewhere=sends_elsewhere(rng, world)))
        outcome = deliver(world, state, steps[-1].port, steps[-1].frame, now)
        state = outcome.state
        return [(receiver, bare(got)) for receiver, got in outcome.deliveries if receiver != port]

    for _ in range(6):
        if not world.ports:
            break
        port = rng.choice(sorted(world.ports.values(), key=lambda port: port.id))
        aim = rng.choice(aims(world, port)[0] or [Aim(UNKNOWN_MAC, OUTSIDE[0])])
        own = [a for a in own_addresses(port) if family_of(a) == family_of(aim.address)]
        if not own:
            continue
        flow = own[0], aim.address
        fragments = [0x2000, 1] if rng.random() < 0.3 else [0]
        kind = rng.choice(["tcp", "tcp", "udp", "echo"])
        first = opening(kind, *flow)
        frames_ = [_fragment(aim.mac, port.mac, *flow, *first, bits) for bits in fragments]
        if fragments != [0] and rng.random() < 0.3:
            del frames_[0]  # its first part was another's
        heard = [got for frame in frames_ for got in send(port.id, frame)]
        if fragments != [0]:
            for twin, mac in _twins(world, port, own[0], aim.address):  # who sent no first part
                send(twin.id, _fragment(mac, twin.mac, *flow, *first, fragments[-1]))
        for turn in range(rng.randint(1, 4)):
            if turn:
                now += rng.choice(PAUSES)
                if rng.random() < 0.4:
                    world = a_change(rng, world, moves, kinds)
            for receiver, got in heard[:1]:
                if receiver in world.ports:
                    other = world.ports[receiver]
                    send(receiver, answers(rng, other, got))
                    if rng.random() < 0.3:
                        send(receiver, errors(rng, other, got))
            for frame in frames_[-1:]:
                send(port.id, frame)
            if kind == "tcp" and rng.random() < 0.5:
                end = tcp(*flow, 1000, 80, rng.choice([pk.FIN | pk.ACK, pk.RST]))
                send(port.id, ip_frame(aim.mac, port.mac, *flow, pk.TCP, end))
    return steps


def _twins(world: World, port: Port, own: bytes, address: bytes) -> list[tuple[Port, int]]:
    """Ports elsewhere with the same address, and where they send what is for `address`."""
    found: list[tuple[Port, int]] = []
    for twin in world.ports.values():
        if twin.id != port.id and own in own_addresses(twin):
            found += [(twin, aim.mac) for aim in aims(world, twin)[0] if aim.address == address][:1]
    return found


def opening(kind: str, source: bytes, target: bytes) -> tuple[int, bytes]:
    """The first packet of a host that wants something: protocol and payload, 32 bytes and more."""
    if kind == "tcp":
        return pk.TCP, tcp(source, target, 1000, 80, pk.SYN, bytes(12))
    if kind == "udp":
        return pk.UDP, udp(source, target, 1000, 53, bytes(24))
    return icmp_protocol(target), echo(source, target, 7)


def _fragment(
    target_mac: int,
    source_mac: int,
    source: bytes,
    target: bytes,
    protocol: int,
    payload: bytes,
    bits: int,
    ttl: int = 64,
    name: int = 1,
) -> bytes:
    """A packet, or a part of it. `bits`: IPv4's flags and offset."""
    if not bits:
        return ip_frame(target_mac, source_mac, source, target, protocol, payload, ttl)
    if bits & 0x1FFF:
        payload = payload[8:]
    if pk.is_mapped(target):
        body = ipv4(source, target, protocol, payload, ttl, name, bits)
        return ethernet(target_mac, source_mac, pk.IPV4, body)
    header = extension(44, protocol, name, (bits & 0x1FFF) << 3 | bits >> 13)
    return ethernet(target_mac, source_mac, pk.IPV6, ipv6(source, target, 44, payload, ttl, headers=header))


CHANGES = ["add policy", "remove policy", "move", "live", "live", "link"] * 2 + [
    "port", "network", "delete", "cost", "rate",
]  # fmt: skip


def a_change(draw: Draw, world: World, moves: bool = True, kinds: Sequence[str] = CHANGES) -> World:
    """The same world after one change, of one of these kinds, that validation lets through."""
    kind = pick(draw, kinds)
    if kind == "rate" and world.ports:
        limitable: list[Port | Link] = [*world.ports.values(), *world.links.values()]
        return world.with_(replace(pick(draw, limitable), rate=pick(draw, [0, *RATES])))
    if kind in ("link", "cost") and world.links:
        link = world.links[pick(draw, sorted(world.links))]
        return world.with_(replace(link, up=not link.up) if kind == "link" else replace(link, cost=pick(draw, COSTS)))
    moving = next((port for port in world.ports.values() if port.other and not port.trunk), None)
    if kind == "live" and moving is not None:
        return together(world, further(draw, moving))
    network = world.networks[pick(draw, sorted(world.networks))]
    ports = world.ports_in(network.id)
    if kind == "add policy":
        return world.with_(a_policy(draw, world, network.id, max(world.policies, default=0) + 1))
    if kind == "remove policy" and world.policies:
        return world.without(("policy", pick(draw, sorted(world.policies))))
    if kind == "network":
        return world.with_(replace(network, enabled=not network.enabled))
    if not ports:
        return world
    port: Port = pick(draw, ports)
    if kind == "port":
        return world.with_(replace(port, enabled=not port.enabled))
    if kind in ("move", "live"):  # what hangs on a trunk moves with that
        port = world.ports.get(port.trunk, port)
    if kind == "move" and moves:
        return together(world, replace(port, host=pick(draw, homes(world, network)), other=0, leaving=False))
    if kind == "live" and (others := [home for home in homes(world, network) if home != port.host]):
        return together(world, replace(port, other=pick(draw, others)))
    if kind == "delete" and not _is_needed(world, port):
        return world.without(("port", port.id))
    return world


def further(draw: Draw, port: Port) -> Port:
    """A port that moves (rule 15), one phase on: prepared, it leaves, or is given up; then it is flipped; settled."""
    if port.leaving:
        return replace(port, host=port.other, other=port.host, leaving=False)
    return replace(port, leaving=True) if upto(draw, 1) else replace(port, other=0)


def sends_elsewhere(draw: Draw, world: World) -> bool:
    """Rates are of a machine: what there is of those is sent from where a port lives."""
    rated = any(value.rate for value in (*world.ports.values(), *world.links.values()))
    return not rated and any(port.other for port in world.ports.values()) and upto(draw, 1) == 1


def homes(world: World, network: Network) -> list[int]:
    """Where ports of a network may live."""
    if network.carrier == FABRIC:
        return sorted(world.machines)
    return [p.id for p in world.ports_in(network.carrier) if p.hosts and p.address(network.underlay) is not None]


def _is_needed(world: World, port: Port) -> bool:
    carried = any(
        port.id in (other.host, other.other) and world.networks[other.network].carrier == port.network
        for other in world.ports.values()
    )
    named = any(
        selector.kind == "port" and selector.id == port.id
        for policy in world.policies_of(port.network)
        for selector in (*policy.sources, *policy.targets)
    )
    return carried or named or bool(world.vlans_of(port.id))


__all__ = [
    "Address",
    "Aim",
    "Step",
    "a_change",
    "a_step",
    "aims",
    "chatter",
    "conversations",
    "dialogues",
    "frames",
    "homes",
    "inquiries",
    "policies",
    "rounds",
    "some_chatter",
    "some_dialogues",
    "some_inquiries",
    "some_rounds",
    "some_torrents",
    "torrents",
    "tower",
    "worlds",
]
