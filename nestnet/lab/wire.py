"""The wire of a lab: a namespace that joins its machines.

    nn-LAB   bridge `wire`                       a wire that everybody hears, where each machine has one NIC
               m1     m2     m3
               eth0   eth0   eth0                with the machine's address

    nn-LAB   a router                            where any machine has several
               m1  m1-1   m2  m2-1
               eth0 eth1  eth0 eth1              the machine's address is on its loopback

The router stands for a fabric of leaves and spines: every NIC is a link of its own to it, both sides have routes of
equal cost over all of a machine's NICs, and one without carrier is left out at once. So a machine with several NICs is
reached as long as one of them is up, without any protocol.

Each physical network of a lab is one more bridge, `switch1`, with a NIC of each machine that has a trunk to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_interface, ip_network
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Any

from nestnet.agent import links, netns
from nestnet.lab.addresses import pool
from nestnet.lab.state import Lab, Seat

if TYPE_CHECKING:
    from pyroute2 import IPRoute

# What a machine and the router call each other on a link between them: the same on every link. The machine's is not
# link-local: those go when the link does.
ROUTER = {4: "169.254.1.1", 6: "fe80::1"}
MACHINE = "fd00:1ab::2"
ONLINK = 4  # <linux/rtnetlink.h>, RTNH_F_ONLINK: the next hop is there, whatever addresses the link has


def make_wire(lab: Lab) -> None:
    """The namespaces of the wire and of the machines, and a veth pair for each NIC."""
    wire = netns.create(lab.wire)
    for seat in lab.machines:
        netns.create(lab.machine(seat.name))
    routed = any(len(seat.nics) > 1 for seat in lab.machines)
    netns.run_in(wire, lambda: _route(lab) if routed else _bridge(lab))
    netns.run_in(wire, lambda: _switch(lab))
    for seat in lab.machines:
        machine = netns.path(lab.machine(seat.name))
        netns.run_in(machine, lambda seat=seat: _behind_router(seat) if routed else _on_bridge(seat, lab.machines))  # type: ignore[misc]


def _plug(ipr: IPRoute, lab: Lab) -> Iterator[tuple[Seat, list[links.Link]]]:
    """Inside the wire: its ends of the links, for each machine in the order of its NICs."""
    for number, seat in enumerate(lab.machines, start=1):
        machine = netns.path(lab.machine(seat.name))
        names = [links.short_name("m", number) + (f"-{n}" if n else "") for n in range(len(seat.nics))]
        yield seat, [_veth(ipr, name, nic, machine, seat) for name, nic in zip(names, seat.nics, strict=True)]


def _veth(ipr: IPRoute, name: str, nic: str, machine: Path, seat: Seat) -> links.Link:
    return links.make_veth(ipr, name, nic, machine, mtu=seat.mtu, alias=f"machine {seat.name}")


def _nics(seat: Seat) -> None:
    """Inside a machine: IPv6 as on a server, with addresses that are there at once and nobody else's advice."""
    for nic in seat.nics:
        settings = {"accept_ra": 0, "autoconf": 0, "accept_dad": 0, "router_solicitations": 0, "keep_addr_on_down": 1}
        links.set_sysctls({f"net/ipv6/conf/{nic}/{key}": value for key, value in settings.items()})


def _raise(ipr: IPRoute, seat: Seat) -> None:
    """Inside a machine: its trunks, on which it says nothing itself."""
    for nic in seat.trunks.values():
        link = links.find(ipr, nic)
        assert link is not None, "made with the wire"
        links.set_address_generation(ipr, link.index, links.NO_ADDRESS)
        ipr.link("set", index=link.index, state="up")


# ---- a bridge


def _bridge(lab: Lab) -> None:
    with links.netlink() as ipr:
        bridge = links.make_bridge(ipr, "wire")
        for _, ends in _plug(ipr, lab):
            for end in ends:
                ipr.link("set", index=end.index, master=bridge, state="up")


def _on_bridge(seat: Seat, everybody: Sequence[Seat]) -> None:
    """Inside a machine: loopback, address, and routes to the machines that chose an address outside the range."""
    own = ip_interface(seat.address)
    _nics(seat)
    with links.netlink() as ipr:
        ipr.link("set", index=1, state="up")
        _raise(ipr, seat)
        link = links.find(ipr, seat.nics[0])
        assert link is not None, "made with the wire"
        links.set_addresses(ipr, link.index, [own])
        ipr.link("set", index=link.index, state="up")
        range_ = pool(len(everybody), own.version)
        addresses = [ip_interface(other.address) for other in everybody]
        strangers = [other for other in addresses if other.ip not in own.network]
        routes = {ip_network(f"{other.ip}/{other.max_prefixlen}"): None for other in strangers}
        if own.ip not in range_:
            routes[range_] = None
        links.set_routes(ipr, link.index, routes)


# ---- switches


def switches(lab: Lab) -> dict[str, str]:
    """By physical network, the bridge in the wire's namespace that is its switch."""
    names = sorted({on for seat in lab.machines for on in seat.trunks})
    return {on: links.short_name("switch", number) for number, on in enumerate(names, start=1)}


def _switch(lab: Lab) -> None:
    """For each physical network a plain bridge, which knows nothing of us: it learns MACs, and leaves tags alone."""
    with links.netlink() as ipr:
        for number, (on, name) in enumerate(switches(lab).items(), start=1):
            bridge = links.make_bridge(ipr, name)
            for place, seat in enumerate(lab.machines, start=1):
                if on in seat.trunks:
                    machine = netns.path(lab.machine(seat.name))
                    end = _veth(ipr, f"s{number}m{place}", seat.trunks[on], machine, seat)
                    ipr.link("set", index=end.index, master=bridge, state="up")


# ---- a router


def _route(lab: Lab) -> None:
    links.set_sysctls({"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1})
    with links.netlink() as ipr:
        ipr.link("set", index=1, state="up")
        _address(ipr, 1, ROUTER[4], 32)  # answered for on every link
        for seat, ends in _plug(ipr, lab):
            own = ip_interface(seat.address)
            links.set_sysctls(links.sysctls_of_nics([end.name for end in ends], own.version))
            for end in ends:
                ipr.link("set", index=end.index, state="up")
                _address(ipr, end.index, ROUTER[6], 64)
            hops: list[dict[str, Any]] = [{"oif": end.index} for end in ends]
            if own.version == 6:
                hops = [{"oif": end.index, "gateway": MACHINE, "flags": ONLINK} for end in ends]
            _add_route(ipr, f"{own.ip}/{own.max_prefixlen}", own.version, hops)


def _behind_router(seat: Seat) -> None:
    """Inside a machine: its address, on the loopback if it has several NICs, and all else by the router."""
    own = ip_interface(seat.address)
    _nics(seat)
    with links.netlink() as ipr:
        ipr.link("set", index=1, state="up")
        _raise(ipr, seat)
        ends = [link for link in (links.find(ipr, nic) for nic in seat.nics) if link is not None]
        _address(ipr, ends[0].index if len(ends) == 1 else 1, str(own.ip), own.max_prefixlen)
        for end in ends:
            ipr.link("set", index=end.index, state="up")
            _address(ipr, end.index, MACHINE, 128)
        gateway = {"gateway": ROUTER[own.version], "flags": ONLINK}
        _add_route(
            ipr, "0.0.0.0/0" if own.version == 4 else "::/0", own.version, [{"oif": e.index, **gateway} for e in ends]
        )


def _address(ipr: IPRoute, index: int, address: str, length: int) -> None:
    flags = {"IFA_FLAGS": links.IFA_F_NODAD} if ":" in address else {}
    ipr.addr("add", index=index, address=address, prefixlen=length, **flags)


def _add_route(ipr: IPRoute, prefix: str, version: int, hops: list[dict[str, Any]]) -> None:
    """One route, of so many next hops of equal cost."""
    scope = {"scope": links.RT_SCOPE_LINK} if version == 4 and "gateway" not in hops[0] else {}
    family = AF_INET if version == 4 else AF_INET6
    ipr.route("add", family=family, dst=prefix, proto=links.RTPROT_NESTNET, multipath=hops, **scope)
