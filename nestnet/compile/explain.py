"""Why: what happens to a packet, told layer by layer, from the same compiled rules that machines run.

    explain(world, port, destination, protocol, port number, names) -> {packet, steps, verdict, reason}

Everything is modelled: nothing is sent. What a trace has to assume (that the workload uses its own
address and its gateway, that no connection is open yet) stands in its first line. Where several paths
have the same cost, the way told is that of a flow from source port 49152, or of a ping with identifier 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

from nestnet.compile.opener import Header, opener, outer
from nestnet.compile.routes import neighbours, routes_to
from nestnet.compile.rules import RuleSet, rules_of
from nestnet.compile.tables import CIDR, CLASS, DENY, IDENTITY, PROTOCOL
from nestnet.model import rates
from nestnet.model.hash import flow_hash, outer_source_port
from nestnet.model.packet import encapsulate, parse, routed, tag
from nestnet.model.values import (
    CARRIAGE_PORT,
    FABRIC,
    MAX_DEPTH,
    MAX_HOPS,
    OVERHEAD,
    Address,
    Link,
    Network,
    Port,
    Prefix,
    Router,
    Segment,
    World,
)

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58}
SOURCE_PORT = 49152  # The opener's own port, which no policy can see: it chooses among equal ways, and the outer port.
TTL = 64

Names = Mapping[tuple[str, int], str]


class _Dropped(Exception):
    def __init__(self, reason: str, text: str, **more: Any) -> None:
        super().__init__(reason)
        self.reason, self.text, self.more = reason, text, more


@dataclass(frozen=True)
class _Way:
    """From a router to a segment: the routers in order, the links between them, and where the flow's hash chose:
    (router, the links that share the flows there, the one of this flow). `most` is the number of routers on the longest
    of the ways that share the flows, `flow` says what the hash saw that nobody asked for."""

    routers: tuple[Router, ...]
    links: tuple[Link, ...]
    choices: tuple[tuple[int, tuple[int, ...], int], ...]
    most: int
    flow: str


@dataclass
class _Trace:
    """What has been found out so far. `layer` is the path of the network that is asked, `rates` how many limits there
    are on the way. Of what carries the network `floor` nothing is told but whether it lets the packet pass."""

    names: Names
    layer: str = ""
    rates: int = 0
    floor: int | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    def say(self, step: str, text: str, **more: Any) -> None:
        self.steps.append({"layer": self.layer, "step": step, "text": text, **more})

    def name(self, kind: str, id: int) -> str:
        return self.names.get((kind, id), f"{kind} {id}")


def explain(
    world: World, port: int, destination: Address, protocol: str, number: int, names: Names, floor: int | None = None
) -> dict[str, Any]:
    """Follow one packet of a new flow from a port to an address. `protocol` is tcp, udp or icmp, `number` the
    destination port. `verdict` is 'deliver' or 'drop'; `reason` then one of model/reasons.py, or `carrier` for
    whatever is below the network `floor`, of which no more is told."""
    sender = world.ports[port]
    source = sender.address(destination.version)
    icmp = "icmp" if destination.version == 4 else "icmpv6"
    protocol_number = PROTOCOLS[icmp if protocol.startswith("icmp") else protocol]
    trace = _Trace(names, names.get(("network", sender.network), ""), floor=floor)
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


_STAGES = {"policy": "policy", "carrier_policy": "policy", "source_address": "guard"}
_STAGES |= {"ttl_expired": "ttl", "carrier_ttl": "ttl", "cannot_flatten": "rate", "carrier": "carry"}


def _deliver(
    trace: _Trace, world: World, sender: Port, source: Address | None, destination: Address, protocol: int, number: int
) -> str:
    network = world.networks[sender.network]
    segment = world.segments[sender.segment]
    _on(trace, world, sender)
    if not network.enabled:
        raise _Dropped("network_disabled", f"{trace.layer} is disabled")
    if source is None:
        raise _Dropped("source_address", f"{trace.name('port', sender.id)} has no IPv{destination.version} address")
    if sender.trunk:
        trunk, name = trace.name("port", sender.trunk), trace.name("port", sender.id)
        trace.say("vlan", f"tag {sender.tag} is taken off: on the trunk {trunk} it is that of {name}")
    trace.say("guard", f"{source} and the MAC are the port's own")

    router = way = None
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
        if at is None:
            trace.say("route", via)
        else:
            way = _way(world, router, at, source, destination, protocol, SOURCE_PORT, number)
            _tell_way(trace, via + ", which", way, at)

    target = _owner(world, at, destination) if at else None
    own = _router_at(world, segment, destination)
    if own is not None and protocol in (PROTOCOLS["icmp"], PROTOCOLS["icmpv6"]):
        text = f"{destination} is the gateway: answered on the sender's machine, no policy asked"
        trace.say("answer", text)
        return text
    if target is not None and target.id == sender.id and router is None:
        raise _Dropped("hairpin", "that is the sender itself")
    if target is not None:
        _on(trace, world, target)
    _judge(trace, world, network, sender, source, target, destination, protocol, number)
    if target is None:
        if at is None:
            raise _Dropped("no_route", _no_route(trace, world, router, destination))
        # A router's own address is the end of the way: the router there takes nothing from the TTL.
        is_router = _router_at(world, at, destination) is not None
        hops = len(way.routers) - is_router if way is not None else 0
        if hops >= TTL:
            raise _Dropped("ttl_expired", f"TTL {TTL} runs out: there are {hops + is_router} routers on the way")
        if is_router:
            if protocol in (PROTOCOLS["icmp"], PROTOCOLS["icmpv6"]):
                text = f"{destination} is a router's own address: answered on the sender's machine"
                trace.say("answer", text)
                return text
            raise _Dropped("router_local", f"{destination} is a router's own address: it answers ping only")
        raise _Dropped(
            "unreachable" if router else "arp_unknown", f"nobody in {trace.name('segment', at.id)} has {destination}"
        )
    if way is not None:
        hops = len(way.routers)
        if hops >= TTL:
            raise _Dropped("ttl_expired", f"TTL {TTL} runs out: there are {hops} routers on the way")
        whose = f"router {trace.name('router', way.routers[-1].id)}'s" if way.links else "the router's"
        less = f", less {hops} routers" if way.links else ""
        trace.say("ttl", f"TTL {TTL} becomes {TTL - hops}{less}; source MAC is {whose}, destination MAC the port's")
    assert at is not None
    _tell_rates(trace, sender, way.links if way is not None else (), target, 0)
    entropy = outer_source_port(_hash(source, destination, protocol, SOURCE_PORT, number))
    ttl, mac = (TTL - len(way.routers), way.routers[-1].mac) if way is not None else (TTL, sender.mac)
    frame = opener(mac, target.mac, source, destination, ttl, protocol, SOURCE_PORT, number)
    return _carry(trace, world, network, sender, target, at, entropy, frame)


def _carry(
    trace: _Trace, world: World, network: Network, sender: Port, target: Port, at: Segment, entropy: int,
    frame: Sequence[Header],
) -> str:  # fmt: skip
    """Down the carriers, as the datapath walks them: one decision a level, one encapsulation at the end of a domain."""
    reached, layer = trace.name("port", target.id), trace.layer
    said = _descend(trace, world, network, (sender.host, target.host), reached, at, entropy, frame, 0)
    if target.trunk:
        trace.layer = layer
        trace.say("vlan", f"tag {target.tag} is put on, for the trunk {trace.name('port', target.trunk)}")
    return said


def _on(trace: _Trace, world: World, port: Port) -> None:
    """Raise unless a port, and the trunk that it hangs on, is enabled."""
    for id in (port.id, port.trunk):
        if id and not world.ports[id].enabled:
            raise _Dropped("port_disabled", f"{trace.name('port', id)} is disabled")


def _below(
    trace: _Trace, world: World, network: Network, hosts: tuple[int, int], reached: str, at: Segment, entropy: int,
    frame: Sequence[Header], above: int,
) -> str:  # fmt: skip
    """What carries this network, told as one thing: it lets the packet pass, or it does not."""
    kind = "machine" if network.carrier == FABRIC else "port"
    names = [trace.name(kind, host).rpartition("/")[2] for host in hosts]
    try:
        _descend(_Trace(trace.names, rates=trace.rates), world, network, hosts, reached, at, entropy, frame, above)
    except _Dropped:
        text = f"what carries {trace.layer} lets nothing pass from host {names[0]} to host {names[1]}"
        raise _Dropped("carrier", text) from None
    if names[0] == names[1]:
        trace.say("deliver", f"{reached} lives on the same host, {names[0]}: past its queue into the workload")
    else:
        trace.say("carry", f"host {names[0]} to host {names[1]}")
        trace.say("deliver", f"{names[1]} finds the sender at {names[0]}, judges again, and delivers to {reached}")
    return f"to {reached}"


def _descend(
    trace: _Trace, world: World, network: Network, hosts: tuple[int, int], reached: str, at: Segment, entropy: int,
    frame: Sequence[Header], above: int,
) -> str:  # fmt: skip
    a, b = hosts
    for _ in range(MAX_DEPTH):
        if network.id == trace.floor:
            return _below(trace, world, network, (a, b), reached, at, entropy, frame, above)
        kind = "machine" if network.carrier == FABRIC else "port"
        if kind == "machine" or a == b or network.encapsulated:
            _few(trace)
        if a == b:
            trace.layer = "the fabric" if kind == "machine" else trace.layer
            where = f"{reached} lives on the same {'machine' if kind == 'machine' else 'host'}, {trace.name(kind, a)}"
            _stand(trace, world, network, a)
            trace.say("deliver", f"{where}: past its queue into the workload, no encapsulation")
            return f"to {reached}"
        if kind == "machine":
            here, there = world.machines[a], world.machines[b]
            trace.layer = "the fabric"
            names = trace.name("machine", a), trace.name("machine", b)
            if at.vlan is not None:
                trace.say("carry", f"{names[0]} to {names[1]}, by their trunks to {at.vlan.on}")
                label = tag(at.vlan.id)
                trace.say("encapsulate", f"802.1Q, VLAN {at.vlan.id} of {at.vlan.on}: {len(label)} bytes in the frame")
                found = f"{names[1]} finds the sender on another machine, judges again, and delivers to {reached}"
                trace.say("deliver", found)
                return f"to {reached}"
            trace.say("carry", f"{names[0]} ({here.address}) to {names[1]} ({there.address})")
            before = OVERHEAD[here.address.version]
            trace.say(
                "encapsulate",
                f"VXLAN, VNI {at.vni}, UDP {entropy} to {CARRIAGE_PORT}, TTL 64: {before} bytes before the frame",
            )
            datagram = encapsulate(b"".join(part for _, part in frame), at.vni, here.address, there.address, entropy)
            headers = [*outer(datagram, here.address.version), *frame]
            told = [{"header": name, "bytes": part.hex(" ")} for name, part in headers]
            trace.say("wire", f"{len(datagram) - 14} bytes after the Ethernet header to the next hop", headers=told)
            trace.say("deliver", f"{names[1]} finds the sender at {names[0]}, judges again, and delivers to {reached}")
            return f"to {reached}"
        pa, pb = world.ports[a], world.ports[b]
        carrier = world.networks[pa.network]
        trace.layer = trace.name("network", carrier.id)
        addresses = pa.address(network.underlay), pb.address(network.underlay)
        _up(trace, carrier, pa, pb)
        if addresses[0] is None or addresses[1] is None:
            raise _Dropped("carrier_no_route", f"a host port has no IPv{network.underlay} address")
        ends = [f"{trace.name('port', id)} ({address})" for id, address in zip((a, b), addresses, strict=True)]
        trace.say("host", f"udp/{CARRIAGE_PORT} from {ends[0]} to {ends[1]}")
        try:
            _judge(trace, world, carrier, pa, addresses[0], pb, addresses[1], PROTOCOLS["udp"], CARRIAGE_PORT)
        except _Dropped as drop:
            raise _Dropped("carrier_policy", drop.text, **drop.more) from None
        links: tuple[Link, ...] = ()
        way = None
        if pa.segment != pb.segment:
            routers = world.routers_of(pa.segment)
            beyond = _route(world, routers[0], addresses[1]) if routers else None
            if beyond is None or beyond.id != pb.segment or _owner(world, beyond, addresses[1]) != pb:
                down = _down(trace, world, routers[0]) if routers else ""
                text = f"{trace.layer} has no way from {addresses[0]} to {addresses[1]}{down}"
                raise _Dropped("carrier_no_route", text)
            ends_at = (addresses[0], addresses[1], PROTOCOLS["udp"], entropy, CARRIAGE_PORT)
            way = _way(world, routers[0], beyond, *ends_at)
            if way.most > MAX_HOPS:
                text = f"{way.most} routers between {addresses[0]} and {addresses[1]}: at most {MAX_HOPS}"
                raise _Dropped("carrier_ttl", text)
            subject = f"{addresses[1]} is beyond router {trace.name('router', routers[0].id)}, which"
            _tell_way(trace, subject, way, beyond)
            links = way.links
        if network.encapsulated:
            ends_of = (trace.name("port", a), trace.name("port", b))
            before = OVERHEAD[network.underlay]
            trace.say(
                "encapsulate",
                f"by the agent on {ends_of[0]}, for that on {ends_of[1]}: VXLAN, VNI {at.vni}, UDP {entropy} to "
                f"{CARRIAGE_PORT}: {before} bytes before the frame",
            )
            frame = _enclosed(frame, at.vni, pa, pb, (addresses[0], addresses[1]), entropy, way)
            at, above, trace.rates = world.segments[pb.segment], 0, 0
            if way is not None and len(way.routers) >= TTL:
                raise _Dropped("carrier_ttl", f"{len(way.routers)} routers between {addresses[0]} and {addresses[1]}")
        else:
            above += OVERHEAD[network.underlay]
        _tell_rates(trace, pa, links, pb, above)
        network, a, b = carrier, pa.host, pb.host
    raise _Dropped("carrier_depth", f"the chain of hosts is longer than {MAX_DEPTH}")


def _enclosed(
    frame: Sequence[Header], vni: int, sender: Port, target: Port, ends: tuple[Address, Address], entropy: int,
    way: _Way | None,
) -> Sequence[Header]:  # fmt: skip
    """The frame in a datagram from one host port to another, as that arrives there."""
    inside = b"".join(part for _, part in frame)
    datagram = encapsulate(inside, vni, *ends, entropy, source_mac=sender.mac, target_mac=target.mac)
    if way is not None:
        datagram = routed(parse(datagram), target.mac, way.routers[-1].mac, len(way.routers))
    return [("Ethernet", datagram[:14]), *outer(datagram, ends[0].version), *frame]


def _up(trace: _Trace, carrier: Network, *hosts: Port) -> None:
    """Raise unless the carrier and these ports of it are enabled."""
    off = [f"network {trace.name('network', carrier.id)}"] if not carrier.enabled else []
    off += [f"host port {trace.name('port', port.id)}" for port in dict.fromkeys(hosts) if not port.enabled]
    if off:
        raise _Dropped("carrier_down", f"{' and '.join(off)} {'is' if len(off) == 1 else 'are'} disabled")


def _stand(trace: _Trace, world: World, network: Network, host: int) -> None:
    """Raise unless a host, and all that it lives on, is enabled."""
    for _ in range(MAX_DEPTH):
        if network.carrier == FABRIC:
            return
        network, port = world.networks[network.carrier], world.ports[host]
        _up(trace, network, port)
        host = port.host


def _tell_rates(trace: _Trace, sender: Port, links: tuple[Link, ...], target: Port, above: int) -> None:
    """The limits of one level; `above` is how many bytes more it sees of each packet."""
    limits = [(sender.rate, f"from {trace.name('port', sender.id)}")]
    limits += [(link.rate, f"over {trace.name('link', link.id)}, of what this machine sends") for link in links]
    limits += [(target.rate, f"to {trace.name('port', target.id)}")]
    told = [f"at most {rates.rate_text(rate)} {what}" for rate, what in limits if rate]
    trace.rates += len(told)
    if told:
        trace.say("rate", "; ".join(told) + (f"; counted with {above} bytes more for each packet" if above else ""))


def _few(trace: _Trace) -> None:
    if trace.rates > rates.PATH_BUCKETS:
        raise _Dropped("cannot_flatten", f"{trace.rates} rate limits on the way: at most {rates.PATH_BUCKETS}")


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
    for length in sorted({length for _, length in rules.cidrs}, reverse=True):
        if (found := rules.cidrs.get((value >> (128 - length) << (128 - length), length))) is not None:
            return found
    return None


def _service(rules: RuleSet, protocol: int, number: int) -> int | None:
    for length in range(16, -1, -1):
        if (found := rules.services.get((protocol, number >> (16 - length) << (16 - length), length))) is not None:
            return found
    return None


def _reached(world: World, router: Router) -> dict[int, Router]:
    """The routers that this one reaches over links that are up, itself first, by id."""
    found = {router.id: router}
    for here in (order := [router.id]):
        for _, other in neighbours(world, here):
            if other not in found:
                found[other] = world.routers[other]
                order.append(other)
    return found


def _way(
    world: World, router: Router, segment: Segment, source: Address, destination: Address, protocol: int,
    source_port: int, number: int,
) -> _Way:  # fmt: skip
    """The way of one flow from a router to a segment that it reaches (docs/datapath.md, *way*)."""
    routes = routes_to(segment, world)
    most = routes[router.id].hops
    routers, links, choices = [router], [], []
    while nexts := routes[router.id].nexts:
        chosen = _hash(source, destination, protocol, source_port, number, router.mac & 0xFFFFFFFF) % len(nexts)
        if len(nexts) > 1:
            choices.append((router.id, tuple(link for link, _ in nexts), nexts[chosen][0]))
        router = world.routers[nexts[chosen][1]]
        routers.append(router)
        links.append(world.links[nexts[chosen][0]])
    flow = f"a flow from port {source_port}" if protocol in (6, 17) else "a ping with identifier 0"
    return _Way(tuple(routers), tuple(links), tuple(choices), most, flow)


def _tell_way(trace: _Trace, subject: str, way: _Way, segment: Segment) -> None:
    where = f"segment {trace.name('segment', segment.id)}"
    if not way.links:
        trace.say("route", f"{subject} has it in {where}")
        return
    routers = [trace.name("router", router.id) for router in way.routers]
    links = [trace.name("link", link.id) for link in way.links]
    path = routers[0] + "".join(f" -{link}- {router}" for link, router in zip(links, routers[1:], strict=True))
    cost = sum(link.cost for link in way.links)
    trace.say("route", f"{subject} reaches {where} at cost {cost}: {path}", routers=routers, links=links, cost=cost)
    for router, among, chosen in way.choices:
        equal = ", ".join(trace.name("link", link) for link in among)
        text = f"at {trace.name('router', router)} {len(among)} ways cost the same ({equal})"
        trace.say("route", f"{text}: {way.flow} takes {trace.name('link', chosen)}")


def _no_route(trace: _Trace, world: World, router: Router | None, destination: Address) -> str:
    if router is None:
        return f"there is no route to {destination}"
    name = trace.name("router", router.id)
    return f"router {name} has no route to {destination}{_down(trace, world, router)}"


def _down(trace: _Trace, world: World, router: Router) -> str:
    """The links that are down at the edge of what a router reaches: one of them may be the cause."""
    reached = _reached(world, router)
    links = {
        link.id for id in reached for link in world.links_of(id) if not link.up and set(link.between) - set(reached)
    }
    names = [trace.name("link", id) for id in sorted(links)]
    if not names:
        return ""
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f": {'link' if len(names) == 1 else 'links'} {shown} {'is' if len(names) == 1 else 'are'} down"


def _route(world: World, router: Router, destination: Address) -> Segment | None:
    """The segment whose CIDR, or one of whose ports' owned prefixes, is the longest that has the address, among those
    that the router joins or reaches."""
    best: tuple[int, Segment] | None = None
    joined = {interface.segment for each in _reached(world, router).values() for interface in each.interfaces}
    for id in sorted(joined):
        segment = world.segments.get(id)
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


def _hash(source: Address, destination: Address, protocol: int, source_port: int, number: int, seed: int = 0) -> int:
    both = [a.packed if a.version == 6 else bytes(10) + b"\xff\xff" + a.packed for a in (source, destination)]
    ports = (source_port, number) if protocol in (6, 17) else (0, 0)
    return flow_hash(both[0], both[1], *ports, protocol, seed)
