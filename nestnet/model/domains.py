"""Domains: machines that exchange VXLAN directly, and what the agents of each know.

    domain      in which one a network is: the fabric, or a network whose host ports run agents
    agent       which agent has a port
    within      what the agents of a domain know of the world

A network that is carried flat is in its carrier's domain, however long that chain is. One that is encapsulated is in
a domain of its carrier's host ports: on each there is an agent, for which the carrier is the underlay.

    networks, each carried by the one below        domains, and whose agents know what
    D   flat                                       |  B: the host ports of B are its machines,
    C   encapsulated                               v  C and D its networks
    B   flat                                       |  FABRIC: machines, A and B
    A   of the fabric                              v
    the wire

So an agent on a host port is an agent like any other: what carries it ends at its own machines, and it is told of
nothing below. A machine below knows the host port, and nothing of what hangs above.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from nestnet.model.values import FABRIC, Machine, Network, Port, World


class Agent(NamedTuple):
    """`machine` is the id of a machine in the domain FABRIC, in any other that of a host port of the network that the
    domain is named after."""

    domain: int
    machine: int


def domain(world: World, network: int) -> int:
    """FABRIC, or the id of the network whose host ports run the agents that have this one."""
    while (here := world.networks[network]).carrier != FABRIC:
        if here.encapsulated:
            return here.carrier
        network = here.carrier
    return FABRIC


def agent(world: World, port: Port, elsewhere: bool = False) -> Agent:
    """Which agent has a port; `elsewhere`: which else, while it, or a host it lives on in this domain, moves."""
    while True:
        network = world.networks[port.network]
        host = port.other if elsewhere and port.other else port.host
        if network.carrier == FABRIC or network.encapsulated:
            return Agent(network.carrier, host)
        port = world.ports[host]


def within(world: World, domain_: int) -> World:
    """What the agents of a domain know: its machines, and its networks with all that is in them; nothing below, and
    nothing of domains above. A network that is encapsulated reads there as one that the fabric carries, for such are
    its hosts. ValueError if the networks that are encapsulated on one carrier differ in address family: a machine
    has one address."""
    networks = {id for id in world.networks if domain(world, id) == domain_}
    inside = [replace(network, carrier=FABRIC, encapsulated=False) if network.encapsulated else network
              for network in world.networks.values() if network.id in networks]  # fmt: skip
    parts = (world.segments, world.routers, world.links, world.ports, world.policies)
    held = [value for part in parts for value in part.values() if value.network in networks]
    machines = world.machines.values() if domain_ == FABRIC else _host_machines(world, world.networks[domain_])
    return World.of([*machines, *inside, *held])


def _host_machines(world: World, carrier: Network) -> list[Machine]:
    """The host ports of a carrier as machines: those with an address of the family that it is the underlay in."""
    families = {n.underlay for n in world.networks.values() if n.carrier == carrier.id and n.encapsulated}
    if len(families) > 1:
        raise ValueError(f"network {carrier.id} carries encapsulated networks of both address families")
    return [
        Machine(port.id, address, carrier.mtu, enabled=is_up(world, port))
        for family in families
        for port in world.ports_in(carrier.id)
        if port.hosts and (address := port.address(family)) is not None
    ]


def is_up(world: World, port: Port) -> bool:
    """Are a port, its network, and all that carries them enabled, down to the wire?"""
    while True:
        network = world.networks[port.network]
        if not (port.enabled and network.enabled):
            return False
        if network.carrier == FABRIC:
            return world.machines[port.host].enabled
        port = world.ports[port.host]
