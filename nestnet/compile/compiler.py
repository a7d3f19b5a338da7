"""The compiler: what one machine must know, as tables.

    compile(world, machine, attachments, underlay, slots, trunks) -> Tables

A pure function. `world` is what the feed gave this machine; everything in it becomes rows, and
nothing else does, so the tables are a function of desired state and never of history. Networks of
all depths are the same loop: where a port lives is a row in `host`, and the datapath walks the rows.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from nestnet.compile import tables as t
from nestnet.compile.routes import Route, routes_of
from nestnet.compile.rules import RuleSet, mapped, rules_of
from nestnet.compile.slots import BUCKETS, Slots
from nestnet.compile.tables import TABLES, Tables
from nestnet.model.icmp import DUMMY
from nestnet.model.rates import fill
from nestnet.model.values import (
    CONNECTION_SHARE,
    FABRIC,
    MAX_DEPTH,
    Address,
    Link,
    Network,
    Port,
    Prefix,
    Router,
    Segment,
    World,
    link_local,
)

HOST_BITS = 128


Trunks = Mapping[str, tuple[int, int]]
"""By physical network: the ifindex and the MAC of the NIC that is this machine's trunk to it."""


def compile(
    world: World,
    machine: int,
    attachments: Mapping[int, int],
    underlay: int,
    slots: Slots,
    trunks: Trunks = MappingProxyType({}),
) -> Tables:
    """The tables of `machine`. `attachments` says on which ifindex the workload of a port hangs here,
    `underlay` is the ifindex of the NIC; `slots` has a slot for everything in the world; `trunks` are those of this
    machine's that are there."""
    # A world of its own: what is found by that, and by nobody else, is gone when this is done.
    return _Compiler(World(world.values), machine, attachments, underlay, slots, trunks).tables()


def packed(address: Address) -> bytes:
    """16 bytes in network order, IPv4 as ::ffff:a.b.c.d."""
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def place(world: World, port: Port, other: bool = False) -> tuple[int, int | None]:
    """How many hosts down a port lives on which machine; None if the chain leads nowhere. `other`: where else it lives,
    if something on the way moves."""
    for step in range(MAX_DEPTH):
        network = world.networks.get(port.network)
        if network is None:
            break
        host = port.other if other and port.other else port.host
        if network.carrier == FABRIC:
            return step, host if host in world.machines else None
        below = world.ports.get(host)
        if below is None:
            break
        port = below
    return MAX_DEPTH, None


def mover(world: World, port: Port) -> Port | None:
    """Who moves when this port does: itself, or its trunk, or one that it lives on; None if it stays where it is."""
    port = world.ports.get(port.trunk, port)
    for _ in range(MAX_DEPTH):
        if port.other:
            return port
        network = world.networks.get(port.network)
        below = None if network is None or network.carrier == FABRIC else world.ports.get(port.host)
        if below is None:
            break
        port = below
    return None


class _Compiler:
    """One run: rows are collected as packed bytes, a method for each noun."""

    def __init__(
        self,
        world: World,
        machine: int,
        attachments: Mapping[int, int],
        underlay: int,
        slots: Slots,
        trunks: Trunks,
    ) -> None:
        self.world = world
        self.machine = machine
        self.attachments = attachments
        self.underlay = underlay
        self.slots = slots
        self.trunks = trunks
        self.rows = {name: bytearray() for name in TABLES}
        self.routes = routes_of(world)
        self.rated = {port.network for port in world.ports.values() if port.rate}
        self.rated |= {link.network for link in world.links.values() if link.rate}
        # What is routed to a segment: its own, and what its ports own.
        self.prefixes = {
            segment.id: [*segment.cidrs, *(prefix for port in world.ports_of(segment.id) for prefix in port.owns)]
            for segment in world.segments.values()
        }

    def tables(self) -> Tables:
        world = self.world
        own = world.machines.get(self.machine)
        tag = own.vlan.label if own is not None and own.vlan is not None else 0
        self.put("self", 0, self.slots["machine", self.machine], self.underlay, tag)
        for m in world.machines.values():
            slot = self.slots["machine", m.id]
            self.put("machine", slot, m.id, packed(m.address), m.mtu, 0)
            if m.id != self.machine:  # what lives here comes over no wire, whatever its sender calls itself
                self.put("member", (packed(m.address),), slot)
            self.put("host", self.slots["host_machine", m.id], m.id, t.MACHINE, 0, slot * m.enabled, 0)
        for network in world.networks.values():
            self.network(network)
        for segment in world.segments.values():
            self.segment(segment)
        for router in world.routers.values():
            self.router(router)
        for port in world.ports.values():
            self.port(port)
        for link in world.links.values():
            self.buckets(link, "link_forth", "link_back")
        return {name: _array(name, self.rows.pop(name)) for name in TABLES}

    def put(self, table: str, key: int | tuple[int | bytes, ...], *value: int | bytes) -> None:
        """One row. Of a key that is put twice, the last counts."""
        parts = (key,) if isinstance(key, int) else key
        self.rows[table] += _FORMATS[table].pack(*parts, *value)

    # ---- one method for each noun

    def network(self, network: Network) -> None:
        slot = self.slots["network", network.id]
        rules = rules_of(self.world.policies_of(network.id), self.world.ports_in(network.id))
        flags = t.ENABLED * network.enabled | t.RATED * self.is_rated(network)
        self.put("network", slot, network.id, rules.version, rules.combos, flags, network.mtu, network.underlay, 0)
        self.rule_set(slot, rules)

    def is_rated(self, network: Network | None) -> bool:
        for _ in range(MAX_DEPTH):
            if network is None or network.id in self.rated:
                break
            network = self.world.networks.get(network.carrier)
        return network is not None

    def rule_set(self, network: int, rules: RuleSet) -> None:
        version = rules.version
        for port, number in rules.peers.items():
            self.put("peer", (network, version, self.slots["port", port]), number)
        for (first, length), number in rules.cidrs.items():
            self.put("cidr", (64 + length, network, version, first.to_bytes(16, "big")), number)
        for (protocol, first_port, length), number in rules.services.items():
            self.put("service", (72 + length, network, version, protocol, first_port.to_bytes(2, "big"), 0), number)
        for (source, target, service), (rank, policy) in rules.rows.items():
            self.put("rule", (network, version, source, target, service), policy, rank, 0)

    def segment(self, segment: Segment) -> None:
        slot = self.slots["segment", segment.id]
        ports = self.world.ports_of(segment.id)
        hosts = [slot for slot in dict.fromkeys(self.host_of(port) for port in ports) if slot]
        local = [self.slots["port", port.id] for port in ports if self.hears_floods(port)]
        floods, locals_ = _version(hosts), _version(local)
        for index, host in enumerate(hosts):
            self.put("flood", (slot, floods, index), host)
        for index, port in enumerate(local):
            self.put("local", (slot, locals_, index), port)
        routers = self.world.routers_of(segment.id)
        router = self.slots.get(("router", routers[0].id)) if routers else 0
        network = self.slots.get(("network", segment.network))
        flags = t.TRANSPARENT * segment.transparent | t.ON_VLAN * (segment.vlan is not None)
        ifindex, mac, id = 0, 0, 0
        if segment.vlan is None:
            self.put("vni", (segment.vni,), slot)
        else:
            id = segment.vlan.id
            ifindex, mac = self.trunks.get(segment.vlan.on, (0, 0))
            if ifindex:
                self.put("vlan", (ifindex, id), slot)
        self.put(
            "segment", slot, segment.id, network, segment.vni, floods, len(hosts), locals_, len(local), router, flags,
            ifindex, mac.to_bytes(6, "big"), id, 0,
        )  # fmt: skip

    def router(self, router: Router) -> None:
        slot = self.slots["router", router.id]
        mac = router.mac.to_bytes(6, "big")
        speaks = self.speaks(router, [address for interface in router.interfaces for address in interface.addresses])
        self.put("router", slot, router.id, self.slots.get(("network", router.network)), 0, *speaks, mac, 0)
        for interface in router.interfaces:
            segment = self.slots.get(("segment", interface.segment))
            own = [*interface.addresses, *(a for other in router.interfaces for a in other.addresses)]
            self.put("face", (slot, segment), *self.speaks(router, own))
            self.put("mac", (segment, mac, 0), t.OWNER_ROUTER, slot)
            for address in (*interface.addresses, link_local(router.mac)):
                self.put("owner", (32 + HOST_BITS, segment, packed(address)), t.OWNER_ROUTER, slot)
        groups: dict[int, tuple[object, ...]] = {}
        for route in self.routes.get(router.id, ()):
            group = self.group(slot, route, groups)
            value = self.slots["segment", route.segment], group, len(route.nexts), route.hops
            for prefix in self.prefixes[route.segment]:
                for key in _lpm(slot, prefix):
                    self.put("route", key, *value)

    def speaks(self, router: Router, own: Sequence[Address]) -> tuple[bytes, bytes]:
        """The address of each family that a router tells errors from: the first of its own, else the one that means
        nobody (RFC 7600), and its link-local one."""
        ipv4 = next((address for address in own if address.version == 4), DUMMY)
        ipv6 = next((address for address in own if address.version == 6), link_local(router.mac))
        return packed(ipv4), packed(ipv6)

    def group(self, router: int, route: Route, groups: dict[int, tuple[object, ...]]) -> int:
        """The name of the route's next hops, with their rows: a hash of what they are, so that the same next hops have
        the same rows after any history; another hash if that one is taken among this router's."""
        if not route.nexts:
            return 0
        content = tuple((link, self.slots["router", other]) for link, other in route.nexts)
        name = _version(content)
        while groups.setdefault(name, content) != content:
            name = _version((name, content))
        for index, ((link, other), (_, slot)) in enumerate(zip(route.nexts, content, strict=True)):
            direction = "link_forth" if self.world.links[link].between[1] == other else "link_back"
            self.put("hop", (router, name, index), slot, self.slots.get((direction, link)))
        return name

    def port(self, port: Port) -> None:
        slot = self.slots["port", port.id]
        segment = self.slots.get(("segment", port.segment))
        mac = port.mac.to_bytes(6, "big")
        local = self.is_local(port)
        trunk = self.world.ports.get(port.trunk, port)
        ifindex = self.attachments.get(trunk.id, 0) if local else 0
        is_tap = ifindex and trunk.attach is not None and trunk.attach.kind == "tap"
        flags = t.ENABLED * self.world.is_on(port) | t.LOCAL * local | t.TAP * bool(is_tap)
        flags |= t.HOSTS * bool(port.hosts or port.other) | t.AGENT * (local and port.agent)
        flags |= t.TRUNK * bool(self.world.vlans_of(port.id))
        first = {family: port.address(family) for family in (4, 6)}
        host = self.host_of(port)
        if own := self.slots.get(("host_port", port.id)):
            self.put("host", own, port.id, t.PORT, slot, host, self.host_of(port, port.other))
            host = own
        self.put(
            "port", slot, port.id, self.slots.get(("network", port.network)), segment, host, ifindex, flags,
            CONNECTION_SHARE, *self.buckets(port, "port_out", "port_in"),
            *(packed(a) if a is not None else bytes(16) for a in first.values()), mac, port.tag,
        )  # fmt: skip
        if ifindex:
            self.put("attach", (ifindex, port.tag), slot)
        self.put("mac", (segment, mac, 0), t.OWNER_PORT, slot)
        for address in (*port.addresses, link_local(port.mac)):
            self.put("owner", (32 + HOST_BITS, segment, packed(address)), t.OWNER_PORT, slot)
        for prefix in port.owns:
            for key in _lpm(segment, prefix):
                self.put("owner", key, t.OWNER_PORT, slot)

    def buckets(self, owner: Port | Link, *kinds: str) -> list[int]:
        """The slots of its buckets, with their rows; 0 where it has no rate."""
        slots = [self.slots.get((kind, owner.id)) for kind in kinds]
        for kind, slot in zip(kinds, slots, strict=True):
            if slot:
                self.put("bucket", slot, owner.id, owner.rate, fill(owner.rate), BUCKETS[kind], 0)
        return slots

    # ---- where ports live

    def host_of(self, port: Port, id: int | None = None) -> int:
        """The slot of the host a port lives on, or of another one; 0 if this machine does not know it."""
        network = self.world.networks.get(port.network)
        kind = "host_machine" if network is not None and network.carrier == FABRIC else "host_port"
        return self.slots.get((kind, port.host if id is None else id))

    def is_local(self, port: Port) -> bool:
        return self.machine in (place(self.world, port)[1], place(self.world, port, other=True)[1])

    def hears_floods(self, port: Port) -> bool:
        moving = mover(self.world, port)
        return place(self.world, port)[1] == self.machine and not (moving is not None and moving.leaving)


def _lpm(slot: int, prefix: Prefix) -> list[tuple[int | bytes, ...]]:
    """Keys of an LPM table over (slot, address)."""
    return [(32 + length, slot, first.to_bytes(16, "big")) for first, length in mapped(prefix)]


def _version(members: Iterable[object]) -> int:
    """A name for a list by its content: the same list has the same rows, on any machine, after any history."""
    return int.from_bytes(hashlib.blake2b(repr(list(members)).encode(), digest_size=4).digest(), "big")


def _format(table: t.Table) -> struct.Struct:
    """The struct format of a row. Byte arrays are bytes; everything else is a number."""
    codes = {1: "B", 2: "H", 4: "I", 8: "Q"}
    parts = "I" if table.key is None else ""
    for dtype in (table.value,) if table.key is None else (table.key, table.value):
        for field in (dtype[name] for name in dtype.names or ()):
            parts += f"{field.itemsize}s" if field.shape else codes[field.itemsize]
    return struct.Struct("<" + parts)


_FORMATS = {name: _format(table) for name, table in TABLES.items()}


def _array(name: str, content: bytearray) -> t.Rows:
    rows = t.ordered(TABLES[name], np.frombuffer(content, TABLES[name].row))
    keys = t.keys(TABLES[name], rows)
    again = keys[:-1] == keys[1:]
    return np.delete(rows, np.flatnonzero(again)) if again.any() else rows
