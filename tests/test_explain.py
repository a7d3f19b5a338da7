"""A trace tells the truth: its verdict, its reason and the routers on its way are those of model/meaning.py."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from frames import echo, icmp_protocol, ip_frame, tcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import bare, on_trunk, tower, worlds

from nestnet.compile.explain import SOURCE_PORT, TTL, explain
from nestnet.compile.opener import opener
from nestnet.model import packet as pk
from nestnet.model.meaning import State, deliver
from nestnet.model.values import Interface, Link, Machine, Network, Port, Router, Segment, World


def whole(step: dict[str, Any]) -> bytes:
    """A datagram as a machine gets it, with an Ethernet header."""
    kind = pk.IPV4 if step["headers"][0]["header"] == "IPv4" else pk.IPV6
    return bytes(12) + kind.to_bytes(2, "big") + bytes.fromhex("".join(part["bytes"] for part in step["headers"]))


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds(), st.data())
def test_a_trace_is_what_the_packet_means(world: World, data: st.DataObject) -> None:
    port = data.draw(st.sampled_from(sorted(world.ports.values(), key=lambda port: port.id)))
    there = sorted({a for other in world.ports_in(port.network) for a in other.addresses}, key=lambda a: (a.version, a))
    there += [a for r in world.routers.values() if r.network == port.network for i in r.interfaces for a in i.addresses]
    to = data.draw(st.sampled_from([*there, ip_address("203.0.113.9")]))
    ping = data.draw(st.booleans())
    source = port.address(to.version)
    if source is None or to == source:
        return
    told = explain(world, port.id, to, "icmp" if ping else "tcp", 0 if ping else 80, {})

    segment = world.segments[port.segment]
    near = any(to in cidr for cidr in segment.cidrs)
    here, target = pk.mapped(source), pk.mapped(to)
    owners = [other for other in world.ports_of(port.segment) if to in other.addresses] if near else []
    routers = (
        [r for r in world.routers_of(port.segment) if any(to in i.addresses for i in r.interfaces)] if near else []
    )
    gateway = owners or routers or ([] if near else world.routers_of(port.segment))
    if not gateway:
        # An address of its own segment that nobody has: ARP or ND is not answered, so the packet is never sent.
        assert told["verdict"] == "drop"
        return
    protocol = icmp_protocol(target) if ping else pk.TCP
    ends = (port.mac, gateway[0].mac, source, to, TTL, protocol, SOURCE_PORT, 0 if ping else 80)
    frame = b"".join(part for _, part in opener(*ends))
    payload = echo(here, target, 0) if ping else tcp(here, target, SOURCE_PORT, 80, pk.SYN)
    assert (
        pk.parse(frame).flow == pk.parse(ip_frame(gateway[0].mac, port.mac, here, target, protocol, payload, TTL)).flow
    )
    meant = deliver(world, State(), *on_trunk(port, frame), 0.0)
    if meant.drops:
        assert (told["verdict"], told["reason"]) == ("drop", meant.drops[0][1]), told
        return
    assert told["verdict"] == "deliver", told
    ((receiver, arrived),) = meant.deliveries
    seen = bare(arrived)
    for step in (step for step in told["steps"] if step["step"] == "wire"):
        carried = pk.decapsulate(pk.parse(whole(step)))
        assert carried is not None
        assert carried.frame == seen, "what is on the wire is what arrives"
    tags = [step["text"].split()[1] for step in told["steps"] if step["step"] == "vlan"]
    if receiver != port.id:
        assert tags == [str(p.tag) for p in (port, world.ports[receiver]) if p.trunk]
        assert told["detail"] == f"to port {receiver}"
        passed = TTL - (seen[22] if to.version == 4 else seen[21])
        own = [step for step in told["steps"] if step["step"] == "route" and step["layer"] == ""]
        way: list[str] = next((step["routers"] for step in own if "routers" in step), [""] * bool(own))
        assert len(way) == passed
        if len(way) > 1:
            own_routers = {r.mac: r.id for r in world.routers.values() if r.network == port.network}
            assert way[-1] == f"router {own_routers[_source_mac(seen)]}"


def _source_mac(frame: bytes) -> int:
    return int.from_bytes(frame[6:12], "big")


def square(**links: Any) -> World:
    """Four routers in a ring, each with a segment and a port: link N leads from router N to the next."""
    values: list[Any] = [Machine(1, ip_address("192.0.2.1")), Network(1)]
    for n in (1, 2, 3, 4):
        segment = Segment(n, 1, n, (ip_network(f"10.0.{n}.0/24"),))
        router = Router(n, 1, 0x060000000000 + n, (Interface(n, (ip_address(f"10.0.{n}.1"),)),))
        port = Port(n, 1, n, 1, 0x020000000000 + n, (ip_address(f"10.0.{n}.2"),))
        values += [segment, router, port, Link(n, 1, (n, n % 4 + 1), **links.get(f"l{n}", {}))]
    return World.of(values)


NAMES = {
    ("network", 1): "n",
    **{(kind, n): f"{kind[0]}{n}" for kind in ("router", "link", "segment") for n in range(9)},
}


def routes(world: World, to: str) -> list[str]:
    told = explain(world, 1, ip_address(to), "tcp", 80, NAMES)
    return [step["text"] for step in told["steps"] if step["step"] == "route"] + [told["detail"]]


def test_the_routers_and_links_on_the_way() -> None:
    outside = "10.0.2.2 is outside 10.0.1.0/24: to the gateway, router r1, which"
    assert routes(square(), "10.0.2.2")[:-1] == [f"{outside} reaches segment s2 at cost 1: r1 -l1- r2"]
    assert routes(square(l1={"cost": 9}), "10.0.2.2")[:-1] == [
        f"{outside} reaches segment s2 at cost 3: r1 -l4- r4 -l3- r3 -l2- r2"
    ]
    ttl = [s for s in explain(square(), 1, ip_address("10.0.3.2"), "tcp", 80, NAMES)["steps"] if s["step"] == "ttl"]
    assert ttl[0]["text"] == (
        "TTL 64 becomes 61, less 3 routers; source MAC is router r3's, destination MAC the port's"
    )


def test_ways_of_equal_cost_are_told_with_the_one_that_the_flow_takes() -> None:
    way, choice, _ = routes(square(), "10.0.3.2")
    taken = choice[-2:]
    assert choice == f"at r1 2 ways cost the same (l1, l4): a flow from port 49152 takes {taken}"
    assert way.endswith("r1 -l1- r2 -l2- r3" if taken == "l1" else "r1 -l4- r4 -l3- r3")


@pytest.mark.parametrize(
    ("links", "detail"),
    [
        ({"l1": {"up": False}, "l4": {"up": False}}, "router r1 has no route to 10.0.2.2: links l1, l4 are down"),
        ({"l1": {"up": False}, "l2": {"up": False}}, "router r1 has no route to 10.0.2.2: links l1, l2 are down"),
    ],
)
def test_links_that_are_down_are_named_when_there_is_no_route(links: dict[str, Any], detail: str) -> None:
    assert routes(square(**links), "10.0.2.2")[-1] == detail
    without = square().without(("link", 1), ("link", 4))
    assert routes(without, "10.0.2.2")[-1] == "router r1 has no route to 10.0.2.2"


def test_the_rates_on_the_way() -> None:
    world = square(l1={"rate": 10**6})
    world = world.with_(*(replace(world.ports[n], rate=rate) for n, rate in ((1, 64_000), (2, 1_500_000))))
    told = explain(world, 1, ip_address("10.0.2.2"), "tcp", 80, {**NAMES, ("port", 1): "a", ("port", 2): "b"})
    assert [step["text"] for step in told["steps"] if step["step"] == "rate"] == [
        "at most 64kbit from a; at most 1mbit over l1, of what this machine sends; at most 1500kbit to b"
    ]
    deep = tower(3)
    deep = deep.with_(replace(deep.ports[2], rate=10**9))
    told = explain(deep, 5, deep.ports[6].addresses[0], "icmp", 0, {("port", 2): "b"})
    assert [step["text"] for step in told["steps"] if step["step"] == "rate"] == [
        "at most 1gbit to b; counted with 100 bytes more for each packet"
    ]
    told = explain(
        tower(5).with_(*(replace(port, rate=10**9) for port in tower(5).ports.values())),
        9, deep.ports[6].addresses[0], "icmp", 0, {},
    )  # fmt: skip
    assert (told["reason"], told["detail"]) == ("cannot_flatten", "10 rate limits on the way: at most 8")
