"""Links of the machine that this runs on: veth pairs, addresses, routes, sysctls.

Every function works in the network namespace of the calling thread (`netns.run_in` to be in another). All of
them are idempotent, and say in an OSError what the kernel refused. pyroute2 is imported late: it takes 0.2 s.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface, ip_network
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Any

from nestnet.model.values import Address, Prefix

if TYPE_CHECKING:
    from pyroute2 import IPRoute

Interface = IPv4Interface | IPv6Interface

NTF_USE, NUD_PERMANENT = 0x01, 0x80  # <linux/neighbour.h>
RTN_UNICAST, MAIN = 1, 254  # <linux/rtnetlink.h>
RT_SCOPE_LINK = 253
TUNSETIFF, TUNSETPERSIST, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x400454CB, 2, 0x1000  # <linux/if_tun.h>
IFNAMSIZ = 15  # characters in the name of an interface
IFA_F_NODAD = 0x02  # <linux/if_addr.h>: usable at once, no duplicate address detection
LEAVING = 0x6E6E7421  # a number that no group of interfaces has: who is in it goes, or is not finished
EUI64, NO_ADDRESS = 0, 1  # <linux/if_link.h>: in6_addr_gen_mode


@dataclass(frozen=True, slots=True)
class Link:
    """An interface as the kernel has it. `peer` is the ifindex of a veth's other end, and `namespace` the number that
    its namespace has here, if it is another; `master` that of a bridge or bond which it is a part of, or 0."""

    index: int
    name: str
    mac: str
    mtu: int
    up: bool
    alias: str = ""
    peer: int = 0
    master: int = 0
    namespace: int | None = None


@contextmanager
def netlink() -> Iterator[IPRoute]:
    """A netlink socket in the calling thread's namespace. Errors of the kernel are raised as OSError."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as ipr:
            yield ipr
    except NetlinkError as error:  # not an OSError of its own
        raise OSError(error.code, str(error.args[1] if len(error.args) > 1 else error)) from error


def short_name(prefix: str, number: int) -> str:
    """An interface name for a numbered thing: 'p17'; in base 36 when decimal would not fit in 15 characters."""
    name = f"{prefix}{number}"
    if len(name) <= IFNAMSIZ:
        return name
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return f"{prefix}-{digits}"  # 64 bits are 13 digits


def tag_name(trunk: str, tag: int) -> str:
    """The name of the interface for a tag on this one: 'eth0.17'; of a name that is too long for that only the end."""
    return f"{trunk[len(str(tag)) + 1 - IFNAMSIZ :]}.{tag}"


def mac_text(mac: int) -> str:
    """48 bits as people write them: 02:00:00:00:00:01."""
    return mac.to_bytes(6, "big").hex(":")


def read(message: Any) -> Link:
    """A link out of what netlink says of it."""
    return Link(
        message["index"],
        message.get_attr("IFLA_IFNAME"),
        message.get_attr("IFLA_ADDRESS") or "",
        message.get_attr("IFLA_MTU") or 0,
        bool(message["flags"] & 1),
        message.get_attr("IFLA_IFALIAS") or "",
        message.get_attr("IFLA_LINK") or 0,
        message.get_attr("IFLA_MASTER") or 0,
        message.get_attr("IFLA_LINK_NETNSID"),
    )


def links(ipr: IPRoute) -> dict[str, Link]:
    """Every interface of the namespace by its name."""
    found = (read(message) for message in ipr.get_links())
    return {link.name: link for link in found}


def at(ipr: IPRoute, index: int) -> Link | None:
    """The interface with this ifindex, or None."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        return read(ipr.get_links(index)[0])
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise
        return None


def find(ipr: IPRoute, name: str) -> Link | None:
    """One interface, or None."""
    index = ipr.link_lookup(ifname=name)
    return at(ipr, index[0]) if index else None  # it may have just gone


def remove(ipr: IPRoute, index: int) -> None:
    """Delete an interface. No error when it is gone: it goes with the other end of its pair, too."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        ipr.link("del", index=index)
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise


def remove_all(ipr: IPRoute, indexes: Sequence[int]) -> None:
    """Delete interfaces, in about the time that one takes: the kernel waits once for all who may be using them. And
    those that somebody who was killed had begun to make or to delete."""
    from pyroute2.netlink.exceptions import NetlinkError

    for index in indexes:
        try:
            ipr.link("set", index=index, group=LEAVING)
        except NetlinkError as error:  # it goes with the other end of its pair, too
            if error.code != errno.ENODEV:
                raise
    try:
        ipr.link("del", index=0, group=LEAVING)
    except NetlinkError as error:  # nobody is left
        if error.code != errno.ENODEV:
            raise


def make_veth(
    ipr: IPRoute,
    name: str,
    peer: str,
    namespace: Path,
    *,
    mtu: int,
    mac: str | None = None,
    alias: str = "",
) -> Link:
    """A veth pair, both ends down: `name` here, which never gets an address by itself, and `peer` in `namespace`,
    which has the MAC."""
    far: dict[str, Any] = {"ifname": peer, "mtu": mtu}
    if mac is not None:
        far["address"] = mac
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # The kernel takes no alias here: whose it is is not known to others before the next but one step.
        ipr.link("add", ifname=name, kind="veth", mtu=mtu, group=LEAVING, peer={**far, "net_ns_fd": fd})
    finally:
        os.close(fd)
    link = find(ipr, name)
    assert link is not None, "the kernel has just made it"
    set_address_generation(ipr, link.index, NO_ADDRESS)
    ipr.link("set", index=link.index, ifalias=alias, group=0)
    return replace(link, alias=alias)


class NoVlans(Exception):
    """This kernel makes no interfaces for tags."""


def make_vlan(ipr: IPRoute, name: str, trunk: int, tag: int, *, mac: str) -> Link:
    """An interface, down, for the frames of another one that bear this tag (802.1Q). Raises NoVlans."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        ipr.link("add", ifname=name, kind="vlan", link=trunk, vlan_id=tag, address=mac)
    except NetlinkError as error:
        if error.code != errno.EOPNOTSUPP:
            raise
        raise NoVlans("this kernel has none, its module 8021q is not there") from None
    link = find(ipr, name)
    assert link is not None, "the kernel has just made it"
    return link


def make_tap(ipr: IPRoute, name: str, *, mtu: int, alias: str) -> Link:
    """A tap device, down, that stays when nobody has it open, and never gets an address by itself."""
    with Path("/dev/net/tun").open("r+b", buffering=0) as tun:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
        link = find(ipr, name)
        assert link is not None, "the kernel has just made it"
        set_address_generation(ipr, link.index, NO_ADDRESS)
        ipr.link("set", index=link.index, ifalias=alias, mtu=mtu)
        fcntl.ioctl(
            tun, TUNSETPERSIST, 1
        )  # last: until then it goes with this process, and leaves none that is nobody's
    return replace(link, alias=alias, mtu=mtu)


def is_tap(ipr: IPRoute, index: int) -> bool:
    """Is it a tap device, and not of another kind?"""
    info = ipr.get_links(index)[0].get_attr("IFLA_LINKINFO")
    if info is None or info.get_attr("IFLA_INFO_KIND") != "tun":
        return False
    data = info.get_attr("IFLA_INFO_DATA")
    return data is not None and data.get_attr("IFLA_TUN_TYPE") == IFF_TAP


def has_default_route(ipr: IPRoute, family: int, besides: Collection[int]) -> bool:
    """Does a default route of this family (4 or 6) lead out of another interface than these?"""
    found = ipr.get_routes(family=AF_INET if family == 4 else AF_INET6, table=MAIN)
    return any(
        route["dst_len"] == 0 and route["type"] == RTN_UNICAST and route.get_attr("RTA_OIF") not in (None, *besides)
        for route in found
    )


def set_address_generation(ipr: IPRoute, index: int, mode: int) -> None:
    """How an interface gets its IPv6 link-local address: EUI64 or NO_ADDRESS."""
    ipr.link(
        "set",
        index=index,
        IFLA_AF_SPEC={"attrs": [["AF_INET6", {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", mode]]}]]},
    )


def make_bridge(ipr: IPRoute, name: str) -> int:
    """A plain bridge: a wire that everybody hears. No STP, no snooping, no address. Returns its ifindex."""
    if (link := find(ipr, name)) is None:
        ipr.link("add", ifname=name, kind="bridge", br_stp_state=0, br_mcast_snooping=0)
        link = find(ipr, name)
    assert link is not None
    set_address_generation(ipr, link.index, NO_ADDRESS)
    ipr.link("set", index=link.index, state="up")
    return link.index


def addresses(ipr: IPRoute, index: int) -> set[Interface]:
    """The global addresses of an interface, with their prefix lengths. Link-local ones are the kernel's own affair."""
    found = set()
    for message in ipr.get_addr(index=index):
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        address = ip_address(text)
        if not (address.version == 6 and address.is_link_local):
            found.add(ip_interface(f"{text}/{message['prefixlen']}"))
    return found


def with_address(ipr: IPRoute, address: Address) -> int | None:
    """The ifindex of the interface that has this address, or None."""
    family = AF_INET if address.version == 4 else AF_INET6
    for message in ipr.get_addr(family=family):
        if ip_address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")) == address:
            return int(message["index"])
    return None


def set_addresses(ipr: IPRoute, index: int, wanted: Sequence[Interface], exactly: bool = True) -> bool:
    """Give an interface these addresses, and `exactly` these. True when that was a change."""
    have = addresses(ipr, index)
    left = have - set(wanted) if exactly else set()
    for gone in left:
        ipr.addr("del", index=index, address=str(gone.ip), prefixlen=gone.network.prefixlen)
    missing = [new for new in wanted if new not in have]
    for new in missing:
        add_address(ipr, index, new)
    return bool(left or missing)


def add_address(ipr: IPRoute, index: int, new: Interface) -> None:
    """Give an interface an address, which it has at once."""
    flags = {"IFA_FLAGS": IFA_F_NODAD} if new.version == 6 else {}
    ipr.addr("add", index=index, address=str(new.ip), prefixlen=new.network.prefixlen, **flags)


def set_only_neighbour(ipr: IPRoute, index: int, own: IPv6Interface, other: IPv6Address, mac: str) -> bool:
    """Give an interface this link-local address and one neighbour, whose MAC nobody asks for. True when that was a
    change."""
    has = any(m.get_attr("IFA_ADDRESS") == str(own.ip) for m in ipr.get_addr(family=AF_INET6, index=index))
    if not has:
        add_address(ipr, index, own)
    known = any(
        (m.get_attr("NDA_DST"), m.get_attr("NDA_LLADDR"), m["state"]) == (str(other), mac, NUD_PERMANENT)
        for m in ipr.get_neighbours(family=AF_INET6, ifindex=index)
    )
    if not known:
        ipr.neigh("replace", dst=str(other), lladdr=mac, ifindex=index, state=NUD_PERMANENT)
    return not (has and known)


def having(ipr: IPRoute, wanted: Collection[Interface], besides: int) -> list[int]:
    """The interfaces that have any of these addresses, but for this one."""
    texts = {str(address.ip) for address in wanted}
    found = {m["index"] for m in ipr.get_addr() if (m.get_attr("IFA_LOCAL") or m.get_attr("IFA_ADDRESS")) in texts}
    return sorted(found - {besides})


def drop_addresses(ipr: IPRoute, index: int, unwanted: Collection[Interface]) -> None:
    """Take these addresses from an interface, as far as it has them."""
    for gone in addresses(ipr, index) & set(unwanted):
        ipr.addr("del", index=index, address=str(gone.ip), prefixlen=gone.network.prefixlen)


Gateways = Mapping[Prefix, Address | None]
"""Routes of one interface: prefix -> next hop, None for what is directly there."""

RTPROT_NESTNET = 78  # <linux/rtnetlink.h> leaves these numbers to users: marks the routes that are ours


def routes(ipr: IPRoute, index: int) -> dict[Prefix, Address | None]:
    """The routes out of an interface that `set_routes` made."""
    found: dict[Prefix, Address | None] = {}
    for family, nowhere in ((AF_INET, "0.0.0.0/0"), (AF_INET6, "::/0")):
        for message in ipr.get_routes(family=family, oif=index):
            if message["proto"] != RTPROT_NESTNET:
                continue
            target = message.get_attr("RTA_DST")
            prefix = ip_network(f"{target}/{message['dst_len']}" if target else nowhere)
            gateway = message.get_attr("RTA_GATEWAY")
            found[prefix] = ip_address(gateway) if gateway else None
    return found


def set_routes(ipr: IPRoute, index: int, wanted: Gateways) -> bool:
    """Make the routes out of an interface exactly these; others' routes stay. True when that was a change.

    The interface must be up: the kernel forgets its routes when it goes down."""
    have = routes(ipr, index)
    for prefix, gateway in have.items():
        if prefix not in wanted or wanted[prefix] != gateway:
            ipr.route("del", **_route(index, prefix, gateway))
    for prefix, gateway in wanted.items():
        if prefix not in have or have[prefix] != gateway:
            ipr.route("replace", **_route(index, prefix, gateway))
    return have != dict(wanted)


def _route(index: int, prefix: Prefix, gateway: Address | None) -> dict[str, Any]:
    route: dict[str, Any] = {
        "family": AF_INET if prefix.version == 4 else AF_INET6,
        "dst": str(prefix),
        "oif": index,
        "proto": RTPROT_NESTNET,
    }
    if gateway is not None:
        route["gateway"] = str(gateway)
    elif prefix.version == 4:
        route["scope"] = RT_SCOPE_LINK
    return route


RETRY = 250  # milliseconds from one question for a neighbour to the next: the kernel's own 1000 are a second lost


def sysctls_of_nics(names: Collection[str], version: int) -> dict[str, int]:
    """What the NICs of the underlay need, for addresses of this version of IP: for `set_sysctls`.

    All announce a new MAC, so that others need not find out by asking. Where there are several, the kernel chooses
    among routes of equal cost by ports too, since they are all that differs between the flows of two machines, takes
    none by a NIC without carrier or, in IPv4, by a next hop that does not answer, and asks next hops again soon.
    """
    family, notify = ("ipv4", "arp_notify") if version == 4 else ("ipv6", "ndisc_notify")
    found = {f"net/{family}/conf/{name}/{notify}": 1 for name in names}
    if len(names) > 1:
        found |= {f"net/{family}/fib_multipath_hash_policy": 1}
        found |= {f"net/{family}/conf/{name}/ignore_routes_with_linkdown": 1 for name in names}
        found |= {f"net/{family}/neigh/{name}/retrans_time_ms": RETRY for name in names}
        if version == 4:
            found["net/ipv4/fib_multipath_use_neigh"] = 1  # IPv6 does so anyway
    return found


def set_sysctls(values: Mapping[str, int | str]) -> bool:
    """Write sysctls of the calling thread's namespace: {'net/ipv6/conf/eth0/accept_ra': 0}. True if any was otherwise.

    Keys that this kernel does not have (no IPv6) are passed over."""
    changed = False
    for key, value in values.items():
        file = Path("/proc/sys") / key
        try:
            if file.read_text().strip() != str(value):
                file.write_text(str(value))
                changed = True
        except FileNotFoundError:
            continue
    return changed
