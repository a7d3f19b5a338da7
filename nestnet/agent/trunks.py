"""The machine's NICs to physical networks, and what switches there are told.

judge       as a machine joins: whether they can be trunks
find        those that are there
hear        those on which segments ride hear what is for the MACs of ports, all others are as they were
announce    one frame with the MAC of a port and the tag of its VLAN: from then on the switches know where it is
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nestnet.agent import links
from nestnet.compile.compiler import mover, place
from nestnet.model.errors import NotFound, Usage
from nestnet.model.packet import BROADCAST, tag, tagged
from nestnet.model.values import Segment, World

if TYPE_CHECKING:
    from pyroute2 import IPRoute

IFF_PROMISC = 0x100  # <linux/if.h>
MARK = "promiscuous_"
RARP = 0x8035  # RFC 903: what hypervisors send when a guest has moved
SHORTEST = 60  # bytes of a frame without its checksum
TIMES = 5  # that a new place is told, turn by turn: the last words from the old one may come behind the first


def judge(address: str, nics: Collection[str], trunks: Mapping[str, str]) -> None:
    """Refuse what cannot be a trunk of this computer, by physical network, whose address and NICs in the underlay these
    are. Raises NotFound and Usage."""
    names = {name for _, name in socket.if_nameindex()}
    under = set(nics)
    with suppress(ValueError), links.netlink() as ipr:  # the controller says what is wrong with an address
        if not nics and (at := links.with_address(ipr, ip_address(address))) is not None:
            under.add(socket.if_indextoname(at))
    for on, nic in trunks.items():
        if nic not in names:
            raise NotFound(f"interface {nic}, the trunk to {on},", next(iter(get_close_matches(nic, names, 1)), None))
        if nic in under:
            raise Usage(f"--trunk {on}={nic}: {nic} is the way to the underlay: a trunk has an interface of its own")


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
        if not link.up:
            wrong.append(f"{trunk.nic}, the trunk to {trunk.on}, is down")
        most = max((world.networks[segment.network].mtu for segment in riding(world, trunk.on)), default=0)
        if link.mtu < most:
            wrong.append(f"{trunk.nic} has an MTU of {link.mtu}, segments on it one of {most}: large packets are lost")
        found[trunk.on] = link
    return found, wrong


def riding(world: World, on: str) -> list[Segment]:
    """Segments on VLANs of a physical network."""
    return [segment for segment in world.segments.values() if segment.vlan is not None and segment.vlan.on == on]


def hear(ipr: IPRoute, folder: Path, nics: Collection[int]) -> None:
    """Make these NICs, by ifindex, promiscuous, for each has one MAC and ports have others. Those that were made so
    before and are not among them are given back.

    Linux keeps one flag for all who set it. So what we set is marked in `folder`, before it is set: beside the pins,
    which outlive an agent as the flag does, and not a boot. One that has the flag and no mark is so by somebody else,
    and stays so."""
    from pyroute2.netlink.exceptions import NetlinkError

    marks = {int(path.name.removeprefix(MARK)): path for path in folder.glob(f"{MARK}*")}
    for index in nics:
        if not ipr.get_links(index)[0]["flags"] & IFF_PROMISC:
            if index not in marks:
                (folder / f"{MARK}{index}").symlink_to(socket.if_indextoname(index))
            ipr.link("set", index=index, flags=IFF_PROMISC, change=IFF_PROMISC)
    for index in marks.keys() - set(nics):
        try:
            ipr.link("set", index=index, flags=0, change=IFF_PROMISC)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise
        marks[index].unlink(missing_ok=True)


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
