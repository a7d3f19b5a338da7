"""The machine's NICs to physical networks, and what switches there are told.

find        those that are there, hearing what is for the MACs of ports
announce    one frame with the MAC of a port and the tag of its VLAN: from then on the switches know where it is
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

from nestnet.agent import links
from nestnet.compile.compiler import mover, place
from nestnet.model.packet import BROADCAST, tag, tagged
from nestnet.model.values import World

if TYPE_CHECKING:
    from pyroute2 import IPRoute

IFF_PROMISC = 0x100  # <linux/if.h>
RARP = 0x8035  # RFC 903: what hypervisors send when a guest has moved
SHORTEST = 60  # bytes of a frame without its checksum
TIMES = 5  # that a new place is told, turn by turn: the last words from the old one may come behind the first


def find(ipr: IPRoute, world: World, machine: int, others: Collection[int]) -> tuple[dict[str, links.Link], list[str]]:
    """By physical network, the NICs that are there; and what is wrong with those that should be. `others` are NICs to
    the underlay, by ifindex."""
    found: dict[str, links.Link] = {}
    wrong: list[str] = []
    for trunk in world.machines[machine].trunks:
        link = links.find(ipr, trunk.nic)
        if link is None:
            wrong.append(f"there is no interface {trunk.nic}, the trunk to {trunk.on}")
            continue
        if link.index in others:
            wrong.append(f"{trunk.nic} is the way to the underlay: the trunk to {trunk.on} has to be another interface")
            continue
        # It has one MAC, and ports have others.
        flags = ipr.get_links(link.index)[0]["flags"]
        if not flags & IFF_PROMISC:
            ipr.link("set", index=link.index, flags=IFF_PROMISC, change=IFF_PROMISC)
        if not link.up:
            wrong.append(f"{trunk.nic}, the trunk to {trunk.on}, is down")
        riding = (s for s in world.segments.values() if s.vlan is not None and s.vlan.on == trunk.on)
        most = max((world.networks[segment.network].mtu for segment in riding), default=0)
        if link.mtu < most:
            wrong.append(f"{trunk.nic} has an MTU of {link.mtu}, segments on it one of {most}: large packets are lost")
        found[trunk.on] = link
    return found, wrong


class Place(NamedTuple):
    """Where switches look for a port: at this NIC, by this tag and MAC. While it moves its other machine may say
    something of it, too, and they are told again when that is over."""

    nic: str
    vlan: int
    mac: int
    moves: bool


def places(world: World, machine: int, trunks: dict[str, links.Link], attached: Collection[int]) -> dict[int, Place]:
    """Those of the ports that live here and hang on something, at NICs that are up."""
    found: dict[int, Place] = {}
    for segment in world.segments.values():
        if segment.vlan is None or (link := trunks.get(segment.vlan.on)) is None or not link.up:
            continue
        for port in world.ports_of(segment.id):
            if (port.trunk or port.id) in attached and place(world, port)[1] == machine and world.is_on(port):
                found[port.id] = Place(link.name, segment.vlan.id, port.mac, mover(world, port) is not None)
    return found


def announce(new: Iterable[Place]) -> None:
    """Tell the switches. OSError if a NIC is down, or has gone."""
    for nic, vlan, mac, _ in new:
        own = mac.to_bytes(6, "big")
        asked = b"\0\1\x08\0\6\4\0\3" + 2 * (own + bytes(4))  # who am I?
        frame = tagged(BROADCAST.to_bytes(6, "big") + own + RARP.to_bytes(2, "big") + asked, tag(vlan))
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((nic, 0))
            raw.send(frame.ljust(SHORTEST, b"\0"))
