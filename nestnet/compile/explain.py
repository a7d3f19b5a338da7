"""Why: what happens to a packet, told layer by layer, from the same compiled rules that machines run.

    explain(world, port, destination, protocol, port number, names) -> {packet, steps, verdict, reason}

Everything is modelled: nothing is sent. What a trace has to assume (that the workload uses its own
address and its gateway, that no connection is open yet) stands in its first line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

from nestnet.compile.rules import RuleSet, rules_of
from nestnet.compile.tables import CIDR, CLASS, DENY, IDENTITY, PROTOCOL
from nestnet.model.hash import flow_hash, outer_source_port
from nestnet.model.values import (
    CARRIAGE_PORT,
    FABRIC,
    MAX_DEPTH,
    Address,
    Network,
    Port,
    Prefix,
    Router,
    Segment,
    World,
)

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58}
SOURCE_PORT = 49152  # The opener's own port, which no policy can see; it only chooses the outer source port.
TTL = 64
OVERHEAD = 50  # Ethernet 14, IPv4 20, UDP 8, VXLAN 8

Names = Mapping[tuple[str, int], str]


class _Dropped(Exception):
    def __init__(self, reason: str, text: str, **more: Any) -> None:
        super().__init__(reason)
        self.reason, self.text, self.more = reason, text, more


@dataclass
class _Trace:
    """What has been found out so far. `layer` is the path of the network that is asked."""

    names: Names
    layer: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)

    def say(self, step: str, text: str, **more: Any) -> None:
        self.steps.append({"layer": self.layer, "step": step, "text": text, **more})

    def name(self, kind: str, id: int) -> str:
        return self.names.get((kind, id), f"{kind} {id}")


def explain(world: World, port: int, destination: Address, protocol: str, number: int, names: Names) -> dict[str, Any]:
    """Follow one packet of a new flow from a port to an address. `protocol` is tcp, udp or icmp, `number` the
    destination port. `verdict` is 'deliver' or 'drop'; `reason` then one of model/reasons.py."""
    sender = world.ports[port]
    source = sender.address(destination.version)
    icmp = "icmp" if destination.version == 4 else "icmpv6"
    protocol_number = PROTOCOLS[icmp if protocol.startswith("icmp") else protocol]
    trace = _Trace(names, names.get(("network", sender.network), ""))
    what = icmp if protocol.startswith("icmp") else f"{protocol}/{number}"
    packet = (
        f"{what} from {trace.name('port', port)} ({source or 'no address'}) to {destination}, TTL {TTL}, a new flow"
    )
    answer: dict[str, Any] = {"packet": packet, "steps": trace.steps}
    try:
        text = _deliver(trace, world, sender, source, destination, protocol_number, number)
    except _Dropped as drop:
        trace.say(_STAGES.get(drop.reason, "route"), drop.text, **drop.more)
        return {**answer, "verdict": "drop", "reason": drop.reason, "detail": drop.text}
    return {**answer, "verdict": "deliver", "reason": None, "detail": text}


_STAGES = {"policy": "policy", "carrier_policy": "policy", "source_address": "guard", "carrier_no_route": "route"}


def _deliver(
    trace: _Trace, world: World, sender: Port, source: Address | None, destination: Address, protocol: int, number: int
) -> str:
    network = world.networks[sender.network]
    segment = world.segments[sender.segment]
    if not sender.enabled:
        raise _Dropped("port_disabled", f"{trace.name('port', sender.id)} is disabled")
    if not network.enabled:
        raise _Dropped("network_disabled", f"{trace.layer} is disabled")
    if source is None:
        raise _Dropped("source_address", f"{trace.name('port', sender.id)} has no IPv{destination.version} address")
    trace.say("guard", f"{source} and the MAC are the port's own")

    router = None
    if any(destination in cidr for cidr in segment.cidrs):
        name = trace.name("segment", segment.id)
        trace.say("switch", f"{destination} is in the sender's segment {name}: ARP or ND is answered on this machine")
        at: Segment | None = segment
    else:
        routers = world.routers_of(segment.id)
        if not routers:
            raise _Dropped(
                "unknown_unicast", f"{destination} is outside {_cidrs(segment)}, and the segment has no router"
            )
        router = routers[0]
        at = _route(world, router, destination)
        via = f"{destination} is outside {_cidrs(segment)}: to the gateway, router {trace.name('router', router.id)}"
        trace.say("route", via + (f", which has it in segment {trace.name('segment', at.id)}" if at else ""))

    target = _owner(world, at, destination) if at else None
    own = _router_at(world, segment, destination)
    if own is not None and protocol in (PROTOCOLS["icmp"], PROTOCOLS["icmpv6"]):
        text = f"{destination} is the gateway: answered on the sender's machine, no policy asked"
        trace.say("answer", text)
        return text
    _judge(trace, world, network, sender, source, target, destination, protocol, number)
    if target is None:
        if at is None:
            raise _Dropped(
                "no_route", f"router {trace.name('router', router.id if router else 0)} has no route to {destination}"
            )
        if _router_at(world, at, destination) is not None:
            raise _Dropped("router_local", f"{destination} is a router's own address: it answers ping only")
        raise _Dropped(
            "unreachable" if router else "arp_unknown", f"nobody in {trace.name('segment', at.id)} has {destination}"
        )
    if target.id == sender.id and router is None:
        raise _Dropped("hairpin", "that is the sender itself")
    if not target.enabled:
        raise _Dropped("port_disabled", f"{trace.name('port', target.id)} is disabled")
    if router:
        trace.say("ttl", f"TTL {TTL} becomes {TTL - 1}; source MAC is the router's, destination MAC the port's")
    assert at is not None
    entropy = outer_source_port(_hash(source, destination, protocol, number))
    return _carry(trace, world, network, sender, target, at, entropy)


def _carry(trace: _Trace, world: World, network: Network, sender: Port, target: Port, at: Segment, entropy: int) -> str:
    """Down the carriers, as the datapath walks them: one decision a level, one encapsulation in the end."""
    reached = trace.name("port", target.id)
    a, b = sender.host, target.host
    for _ in range(MAX_DEPTH):
        kind = "machine" if network.carrier == FABRIC else "port"
        if a == b:
            trace.layer = "the fabric" if kind == "machine" else trace.layer
            where = f"{reached} lives on the same {'machine' if kind == 'machine' else 'host'}, {trace.name(kind, a)}"
            trace.say("deliver", f"{where}: past its queue into the workload, no encapsulation")
            return f"to {reached}"
        if kind == "machine":
            here, there = world.machines[a], world.machines[b]
            trace.layer = "the fabric"
            names = trace.name("machine", a), trace.name("machine", b)
            trace.say("carry", f"{names[0]} ({here.address}) to {names[1]} ({there.address})")
            trace.say(
                "encapsulate",
                f"VXLAN, VNI {at.vni}, UDP {entropy} to {CARRIAGE_PORT}, TTL 64: {OVERHEAD} bytes before the frame",
            )
            trace.say("deliver", f"{names[1]} finds the sender at {names[0]}, judges again, and delivers to {reached}")
            return f"to {reached}"
        pa, pb = world.ports[a], world.ports[b]
        carrier = world.networks[pa.network]
        trace.layer = trace.name("network", carrier.id)
        addresses = pa.address(network.underlay), pb.address(network.underlay)
        if not (carrier.enabled and pa.enabled and pb.enabled):
            raise _Dropped("carrier_down", f"{trace.layer}, or a host port in it, is disabled")
        if addresses[0] is None or addresses[1] is None:
            raise _Dropped("carrier_no_route", f"a host port has no IPv{network.underlay} address")
        ends = [f"{trace.name('port', id)} ({address})" for id, address in zip((a, b), addresses, strict=True)]
        trace.say("host", f"udp/{CARRIAGE_PORT} from {ends[0]} to {ends[1]}")
        try:
            _judge(trace, world, carrier, pa, addresses[0], pb, addresses[1], PROTOCOLS["udp"], CARRIAGE_PORT)
        except _Dropped as drop:
            raise _Dropped("carrier_policy", drop.text, **drop.more) from None
        if pa.segment != pb.segment:
            routers = world.routers_of(pa.segment)
            beyond = _route(world, routers[0], addresses[1]) if routers else None
            if beyond is None or beyond.id != pb.segment or _owner(world, beyond, addresses[1]) != pb:
                raise _Dropped("carrier_no_route", f"{trace.layer} has no way from {addresses[0]} to {addresses[1]}")
            names = trace.name("router", routers[0].id), trace.name("segment", beyond.id)
            trace.say("route", f"router {names[0]} has {addresses[1]} in segment {names[1]}")
        network, a, b = carrier, pa.host, pb.host
    raise _Dropped("carrier_depth", f"the chain of hosts is longer than {MAX_DEPTH}")


def _judge(
    trace: _Trace, world: World, network: Network, sender: Port, source: Address, target: Port | None,
    destination: Address, protocol: int, number: int,
) -> None:  # fmt: skip
    rules = rules_of(world.policies_of(network.id), world.ports_in(network.id))
    if not rules.version:
        trace.say("policy", f"{trace.name('network', network.id)} has no policies: everything inside may talk")
        return
    best = max(_matching(rules, sender, source, target, destination, protocol, number), default=None)
    if best is None:
        raise _Dropped("policy", "denied: no policy allows it, and there are policies")
    rank, id = best
    more = {"policy": trace.name("policy", id), "network": trace.name("network", network.id)}
    said = f"by {trace.name('policy', id)}"
    if rank & DENY:
        raise _Dropped("policy", f"denied {said}", **more)
    trace.say("policy", f"allowed {said}", **more)


def _matching(
    rules: RuleSet, sender: Port, source: Address, target: Port | None, destination: Address, protocol: int, number: int
) -> Iterator[tuple[int, int]]:
    """The rows that match, as compile/tables.py says."""
    froms = [0, _tagged(IDENTITY, rules.peers.get(sender.id)), _tagged(CIDR, _longest(rules, source))]
    tos = [
        0,
        _tagged(IDENTITY, rules.peers.get(target.id) if target else None),
        _tagged(CIDR, _longest(rules, destination)),
    ]
    ranged = _service(rules, protocol, number) if protocol in (6, 17) else None
    for f in froms:
        for t in tos:
            for about in (0, PROTOCOL + protocol, _tagged(CLASS, ranged)):
                if f is not None and t is not None and about is not None and (f, t, about) in rules.rows:
                    yield rules.rows[f, t, about]


def _tagged(tag: int, number: int | None) -> int | None:
    return tag + number if number else None


def _longest(rules: RuleSet, address: Address) -> int | None:
    value = int(address) if address.version == 6 else 0xFFFF << 32 | int(address)
    for length in range(128, -1, -1):
        if (found := rules.cidrs.get((value >> (128 - length) << (128 - length), length))) is not None:
            return found
    return None


def _service(rules: RuleSet, protocol: int, number: int) -> int | None:
    for length in range(16, -1, -1):
        if (found := rules.services.get((protocol, number >> (16 - length) << (16 - length), length))) is not None:
            return found
    return None


def _route(world: World, router: Router, destination: Address) -> Segment | None:
    """The segment whose CIDR, or one of whose ports' owned prefixes, is the longest that has the address."""
    best: tuple[int, Segment] | None = None
    for interface in router.interfaces:
        segment = world.segments.get(interface.segment)
        if segment is None:
            continue
        owned = (prefix for port in world.ports_of(segment.id) for prefix in port.owns)
        for prefix in (*segment.cidrs, *owned):
            if destination in prefix and (best is None or prefix.prefixlen > best[0]):
                best = prefix.prefixlen, segment
    return best[1] if best else None


def _owner(world: World, segment: Segment, address: Address) -> Port | None:
    best: tuple[int, Port] | None = None
    for port in world.ports_of(segment.id):
        whole: list[Prefix] = [ip_network(own) for own in port.addresses]
        for prefix in (*whole, *port.owns):
            if address in prefix and (best is None or prefix.prefixlen > best[0]):
                best = prefix.prefixlen, port
    return best[1] if best else None


def _router_at(world: World, segment: Segment, address: Address) -> Router | None:
    for router in world.routers_of(segment.id):
        if any(i.segment == segment.id and address in i.addresses for i in router.interfaces):
            return router
    return None


def _cidrs(segment: Segment) -> str:
    return " and ".join(map(str, segment.cidrs)) or "a segment without addresses"


def _hash(source: Address, destination: Address, protocol: int, number: int) -> int:
    both = [a.packed if a.version == 6 else bytes(10) + b"\xff\xff" + a.packed for a in (source, destination)]
    ports = (SOURCE_PORT, number) if protocol in (6, 17) else (0, 0)
    return flow_hash(both[0], both[1], *ports, protocol)
