"""The way to other machines: which NICs lead to them, and what their next hops resolve to now.

    machine 2  <-  route  <-  next hop 10.1.0.1 on eth0  <-  its MAC, and that of eth0
                              next hop 10.2.0.1 on eth1  <-  ...

A flow keeps its outer header as it was when it was composed, with the next hop's MAC and the NIC that it leaves by. So
when a route, a neighbour or a link changes, somebody has to say so: `Watch` hears of changes from the kernel and wakes
the agent, `Ways.look` finds out for which machines the way is another one now, and their counter is raised (rule 16).
What does not change a way raises nothing, however often it happens.

From a shell: `ip route get fibmatch ADDRESS`, `ip neigh`, `ip monitor link address route neigh`.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from nestnet.agent import links
from nestnet.model.values import Address, Machine, Tag

if TYPE_CHECKING:
    from pyroute2 import IPRoute

RTM_F_FIB_MATCH = 0x2000  # <linux/rtnetlink.h>: the route with all its next hops, not the one that a packet would take
NUD_VALID = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80  # <net/neighbour.h>: reachable to permanent, its MAC is known
NUD_FIXED = 0x40 | 0x80  # no ARP, and permanent
IFF_LOOPBACK, IFF_PROMISC, IFF_LOWER_UP = 1 << 3, 1 << 8, 1 << 16  # <linux/if.h>

Hop = tuple[int, str]
"""A next hop: ifindex, and its address as text."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A next hop as packets would take it: `mac` None is one that does not answer, `flags` are those of RTNH_F_."""

    hop: Hop
    mac: str | None
    nic: str
    up: bool
    flags: int = 0


@dataclass
class Ways:
    """The ways to other machines as they were at the last look, and all their next hops with their MACs."""

    known: dict[int, frozenset[Resolved]] = field(default_factory=dict)
    hops: dict[Hop, str | None] = field(default_factory=dict)

    def look(self, ipr: IPRoute, machines: Mapping[int, Address]) -> set[int]:
        """Find out the ways to these machines. Returns the ids of those to which it is another than at the last look;
        at the first look that is all of them."""
        routes = {id: list(_next_hops(ipr, address)) for id, address in machines.items()}
        nics = {hop[0] for hops in routes.values() for hop, _ in hops}
        macs = {hop: mac for nic in nics for hop, mac in _neighbours(ipr, nic).items()}
        states = {nic: _nic(ipr, nic) for nic in nics}
        now = {
            id: frozenset(Resolved(hop, macs.get(hop), *states[hop[0]], flags) for hop, flags in hops)
            for id, hops in routes.items()
        }
        changed = {id for id, way in now.items() if self.known.get(id) != way}
        self.known = now
        self.hops = {resolved.hop: resolved.mac for way in now.values() for resolved in way}
        return changed


def _next_hops(ipr: IPRoute, target: Address) -> Iterator[tuple[Hop, int]]:
    """Where packets to an address go next, and RTNH_F_ flags: all of equal cost. None if there is no route."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        route = ipr.route("get", dst=str(target), flags=RTM_F_FIB_MATCH)[0]
    except NetlinkError:
        return
    if route["type"] != links.RTN_UNICAST:
        return
    if several := route.get_attr("RTA_MULTIPATH"):
        for way in several:
            yield (way["oif"], _gateway(way) or str(target)), way["flags"]
    elif nic := route.get_attr("RTA_OIF"):
        yield (nic, _gateway(route) or str(target)), route["flags"] & 0x1F


def _gateway(route: Any) -> str | None:
    """The next hop's address; of an IPv4 route it may be an IPv6 one (RTA_VIA)."""
    via = route.get_attr("RTA_VIA")
    gateway = route.get_attr("RTA_GATEWAY") or (via["addr"] if via else None)
    return str(ip_address(gateway)) if gateway else None


def _neighbours(ipr: IPRoute, nic: int, states: int = NUD_VALID) -> dict[Hop, str]:
    return {
        (nic, found.get_attr("NDA_DST")): found.get_attr("NDA_LLADDR") or ""
        for family in (socket.AF_INET, socket.AF_INET6)
        for found in ipr.get_neighbours(family=family, ifindex=nic)
        if found["state"] & states
    }


def _nic(ipr: IPRoute, index: int) -> tuple[str, bool]:
    """Its MAC, and whether packets can leave by it."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        found = ipr.get_links(index)[0]
    except NetlinkError:  # it went just now
        return "", False
    return found.get_attr("IFLA_ADDRESS") or "", bool(found["flags"] & IFF_LOWER_UP)


def confirm(ipr: IPRoute, hops: Iterable[Hop]) -> None:
    """Have the kernel find out, or confirm, the MACs of these next hops, without waiting for it. So they hear ours.

    Those that somebody has set for good stay: being asked for is the end of such an entry."""
    from pyroute2.netlink.exceptions import NetlinkError

    hops = list(hops)
    fixed = {hop for nic in {nic for nic, _ in hops} for hop in _neighbours(ipr, nic, NUD_FIXED)}
    for nic, address in hops:
        if (nic, address) in fixed:
            continue
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            # As if a packet had to go there now (neighbour(7), `ip neigh replace ... use`).
            ipr.neigh("replace", family=family, dst=address, ifindex=nic, flags=links.NTF_USE, state=0)
        except NetlinkError:
            continue  # the NIC is down, or gone


# ---- which NICs they are


@dataclass(frozen=True, slots=True)
class Seat:
    """Where this machine's own address is: on which interface, with which length."""

    index: int
    name: str
    interface: links.Interface

    def put_back(self, ipr: IPRoute, address: Address) -> bool:
        """Somebody took the address off: put it where it was. False if it should be another, or the interface is gone,
        for then whoever makes a new one says what it has."""
        link = links.at(ipr, self.index)
        if link is None or (link.name, self.interface.ip) != (self.name, address):
            return False
        links.add_address(ipr, self.index, self.interface)
        return True


def seat(ipr: IPRoute, address: Address) -> Seat | None:
    """Where this address is, or None."""
    index = links.with_address(ipr, address)
    link = links.at(ipr, index) if index is not None else None
    if link is None:
        return None
    found = next((each for each in links.addresses(ipr, link.index) if each.ip == address), None)
    return Seat(link.index, link.name, found) if found is not None else None


@dataclass(frozen=True, slots=True)
class Nics:
    """The interfaces to the underlay that are there, by name. `missing` says what is not as it should be."""

    links: dict[str, links.Link]
    missing: tuple[str, ...] = ()


def nics(ipr: IPRoute, machine: Machine) -> Nics:
    """Those that the machine names, else the one that has its address."""
    at = links.with_address(ipr, machine.address)
    if at is None:
        return Nics({}, (f"no interface has this machine's address {machine.address}",))
    if not machine.nics:
        found = ipr.get_links(at)[0]
        link = links.read(found)
        if found["flags"] & IFF_LOOPBACK:
            return Nics({}, (f"{machine.address} is on {link.name}, where no packets leave: `nic` says where they do",))
        return Nics({link.name: link}, tuple(_flaws(ipr, link, machine)))
    there: dict[str, links.Link] = {}
    missing: list[str] = []
    for name in machine.nics:
        named = links.find(ipr, name)
        if named is None:
            missing.append(f"there is no interface {name}")
        else:
            there[name] = named
            missing += _flaws(ipr, named, machine)
    return Nics(there, tuple(missing))


def _flaws(ipr: IPRoute, link: links.Link, machine: Machine) -> Iterator[str]:
    if not link.up:
        yield f"{link.name} is down"
    if link.mtu < machine.mtu:
        yield f"{link.name} has an MTU of {link.mtu}, the machine one of {machine.mtu}: large packets are lost"
    if machine.vlan is not None and (filter := _filter(ipr, link, machine.vlan)):
        yield f"{link.name} may not let VLAN {machine.vlan} in: ethtool -K {link.name} {filter} off"


def _filter(ipr: IPRoute, link: links.Link, vlan: Tag) -> str | None:
    """What makes a NIC drop tags by itself, but for those of devices that Linux has for them; None if nothing does."""
    from pyroute2 import Ethtool

    name = "rx-vlan-filter" if vlan.type == "802.1q" else "rx-vlan-stag-filter"
    with closing(Ethtool()) as ethtool:
        features = ethtool.get_features(link.name).features
    hears_all = ipr.get_links(link.index)[0]["flags"] & IFF_PROMISC
    return name if name in features and features[name].enable and not hears_all else None


# ---- hearing of changes

RTM_NEWLINK, RTM_DELLINK = 16, 17  # <linux/rtnetlink.h>
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
RTM_NEWNEIGH, RTM_DELNEIGH = 28, 29
RT_TABLE_LOCAL = 255
IFLA_IFNAME, NDA_DST, NDA_LLADDR = 3, 1, 2
# Links 1, neighbours 3, IPv4 and IPv6 addresses 5 and 9, routes 7 and 11, rules 8 and 19, next hop objects 32.
GROUPS = (1, 3, 5, 7, 8, 9, 11, 19, 32)
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1  # <linux/netlink.h>


@dataclass(frozen=True)
class Interest:
    """What a change has to be about: these next hops and NICs. Whatever else happens to neighbours and links is not
    for us, and there may be a lot of it. Routes, rules and addresses always are."""

    hops: Mapping[Hop, str | None] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    def in_message(self, kind: int, body: bytes) -> bool:
        """Might this message of the kernel be about a way of ours?

        A netlink message: length u32, kind u16, flags u16, sequence u32, port u32; then the body (RFC 3549): a header
        by kind, and attributes of length u16, type u16 and value, each padded to 4 bytes.
        """
        if kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
            # struct ndmsg: family u8, 3 unused, ifindex i32, state u16, flags u8, type u8
            nic, state = struct.unpack_from("=4xiH", body)
            found = _attributes(body[12:])
            target = found.get(NDA_DST, b"")
            hop = (nic, str(ip_address(target))) if len(target) in (4, 16) else (nic, "")
            valid = kind == RTM_NEWNEIGH and state & NUD_VALID
            mac = found.get(NDA_LLADDR, b"").hex(":") if valid else None
            return hop in self.hops and self.hops[hop] != mac
        if kind in (RTM_NEWLINK, RTM_DELLINK):
            # struct ifinfomsg: family u8, unused u8, type u16, index i32, flags u32, change u32
            (nic,) = struct.unpack_from("=4xi", body)
            name = _attributes(body[16:]).get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
            return name in self.names or any(nic == ours for ours, _ in self.hops)
        # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, all u8; flags u32
        return not (kind in (RTM_NEWROUTE, RTM_DELROUTE) and body[4] == RT_TABLE_LOCAL)


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


class Watch:
    """Listens on a thread of its own, in the network namespace of the thread that makes it.

    `moved` is set when something has happened that may have changed a way, and `wake` called, once for each time that
    somebody has cleared it: who is slow to look hears of a thousand changes as of one.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self.moved = threading.Event()
        self.interest = Interest()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind((0, 0))
        for group in GROUPS:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._listen, name="underlay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._end, 1)
        self._thread.join()
        self._socket.close()
        os.close(self._end)

    def _listen(self) -> None:
        poll = select.poll()
        for descriptor in (self._socket.fileno(), self._end):
            poll.register(descriptor, select.POLLIN)
        while all(descriptor != self._end for descriptor, _ in poll.poll()):
            try:
                data = self._socket.recv(1 << 16)
                ours = any(self.interest.in_message(kind, body) for kind, body in _messages(data))
            except OSError:  # ENOBUFS: there were more than it could hold
                ours = True
            if ours and not self.moved.is_set():
                self.moved.set()
                self._wake()


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if length < 16:
            return
        yield kind, data[at + 16 : at + length]
        at += (length + 3) & ~3
