"""Where the workloads of this machine's ports hang, in one of three ways.

    machine's namespace          another
      p17  ------- veth -------  eth0    in PREFIX17, which is made for the port (a lab)
      p18  ------- veth -------  eth0    in one that the port names, and that is there (netns)
      vm1  ------- tap  -------          whoever opens it, a virtual machine (tap)

In a namespace the other end gets the port's MAC, addresses, MTU and default routes. On a tap nothing can be configured
from here: who hangs there asks (`inquiries.py`).

A port that moves has a link on both machines (rule 15), which on one computer are two links into one namespace: the
second has no addresses until the port is flipped; then they go over to it, routes first, and what still comes by the
first is heard. When the port has arrived the first link goes, and the second takes its name.

`wanted` says from a World what there should be, and touches nothing. `Workloads` makes it so, in three steps
around the datapath's work: `prepare` (everything there, our end down: closed), then the caller attaches programs and
writes tables, then `open` (our end up). `remove` takes away what is no longer wanted, and is only called with a whole
World. What was not made here is never deleted: an interface of ours bears an alias that says for which port.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import NamedTuple

from nestnet.agent import links, netns
from nestnet.compile.compiler import place
from nestnet.model.bootstrap import Settings, settings
from nestnet.model.icmp import DUMMY
from nestnet.model.values import Attach, Port, World

LARGEST = 65535  # MTU of our ends: what is too big for the network reaches the program, which can say so
NOBODY = ip_interface(f"{DUMMY}/32")  # of an interface that only hears (RFC 7600)
ALIAS = "nestnet port "  # + id, and what it hangs on if that was chosen: so that a new agent finds it


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a port's workload hangs on, None for a namespace of its own, and what it should use. While it moves it has a
    link on another machine, too; `elsewhere`: and sends by that."""

    port: int
    settings: Settings
    attach: Attach | None = None
    moves: bool = False
    elsewhere: bool = False

    @property
    def tap(self) -> str | None:
        """The name of its tap, if it is one."""
        return self.attach.name if self.attach is not None and self.attach.kind == "tap" else None


def attachment(world: World, port: Port, machine: int) -> Attachment | None:
    """What the workload of this port gets on a machine; None where it does not live."""
    places = place(world, port)[1], place(world, port, other=True)[1]
    if machine not in places:
        return None
    return Attachment(port.id, settings(world, port), port.attach, places[0] != places[1], places[0] != machine)


def wanted(world: World, machine: int, own: bool = True) -> dict[int, Attachment]:
    """The attachments of every port that lives on this machine, by port id; without `own` only of those that say what
    they hang on."""
    return {
        port.id: found
        for port in world.ports.values()
        if (own or port.attach is not None) and port.segment in world.segments
        if (found := attachment(world, port, machine)) is not None
    }


class End(NamedTuple):
    """An interface of ours, as its alias says: for a port that hangs on this."""

    link: links.Link
    attach: Attach | None


class Made(NamedTuple):
    """What was made so; where, if that is not ours (the inode of a namespace, the ifindex of a tap); and the workload's
    interface in a namespace."""

    attachment: Attachment
    where: int
    inside: str = ""


@dataclass
class Workloads:
    """The workloads on this machine; those of ports that name nothing in namespaces called PREFIX<port id>. None: such
    ports have no workload.

    Works in the calling thread's network namespace, which has to be the machine's, and remembers what it has
    made there, so that a change costs what it changes.
    """

    prefix: str | None
    made: dict[int, Made] = field(default_factory=dict)

    def namespace(self, attachment: Attachment) -> str:
        """The name of the namespace of a port's workload, which is on no tap."""
        return attachment.attach.name if attachment.attach is not None else f"{self.prefix}{attachment.port}"

    def told(self, port: int) -> dict[str, str]:
        """Where a port's workload hangs, for people."""
        made = self.made.get(port)
        if made is None:
            return {}
        if made.attachment.tap is not None:
            return {"tap": made.attachment.tap}
        return {"namespace": self.namespace(made.attachment), "inside": made.inside}

    def actual(self) -> dict[int, End]:
        """The interfaces that were made for ports, as the kernel has them."""
        return _ends(_links())

    def prepare(self, want: Mapping[int, Attachment]) -> tuple[dict[int, links.Link], dict[int, str]]:
        """Make what is missing and correct what differs; what is new stays closed. A port that hangs on something else
        now is taken off what it hung on first.

        Returns our ends by port id, and for each port that failed what to do about it: the others are made."""
        there = _links()
        have = _ends(there)
        ready: dict[int, links.Link] = {}
        failed: dict[int, str] = {}
        taps = {attachment.tap for attachment in want.values()} - {None}
        moved = {port: end for port, end in have.items() if port in want and end.attach != want[port].attach}
        self._take_away(moved, taps)
        for port in moved:
            del have[port]
        for port, attachment in want.items():
            end = have.get(port)
            try:
                if attachment.tap is not None:
                    ready[port] = self._tap(attachment, attachment.tap, there.get(attachment.tap))
                else:
                    ready[port] = self._make(attachment, end.link if end is not None else None)
            except OSError as error:
                self.made.pop(port, None)
                failed[port] = f"{error.filename or self._where(attachment)}: {error.strerror or error}"
        return ready, failed

    def _where(self, attachment: Attachment) -> str:
        return str(attachment.attach) if attachment.attach is not None else self.namespace(attachment)

    def open(self, ends: Iterable[links.Link]) -> None:
        """Let frames through: our ends up. Called when the tables know the ports."""
        closed = [link for link in ends if not link.up]
        if closed:
            with links.netlink() as ipr:
                for link in closed:
                    ipr.link("set", index=link.index, state="up")

    def remove(self, want: Mapping[int, Attachment]) -> list[int]:
        """Take away the workloads of ports that are not wanted here, and end what runs in those that were made for
        them. Returns their ids."""
        gone = {port: end for port, end in self.actual().items() if port not in want}
        self._take_away(gone, {attachment.tap for attachment in want.values()})
        return sorted(gone)

    def release(self, index: int) -> None:
        """Leave alone a tap that was taken and is not wanted any more: down, so that whoever has it open does not talk
        to the machine instead."""
        with links.netlink() as ipr:
            link = next((link for link in _links().values() if link.index == index), None)
            if link is not None and not link.alias.startswith(ALIAS):
                ipr.link("set", index=index, state="down")
                links.set_sysctls(_forwarding(link.name, 0))

    def _take_away(self, gone: Mapping[int, End], kept: Collection[str | None]) -> None:
        """Delete our ends. A tap that another port wants now stays, and bears that port's alias soon."""
        if not gone:
            return
        with links.netlink() as ipr:
            links.remove_all(ipr, [end.link.index for end in gone.values() if end.link.name not in kept])
        gone_of = {f"{self.prefix}{port}": port for port, end in gone.items() if end.attach is None}
        # Another machine of the lab may have taken the namespace over: the port moved. Then it has an eth0 again.
        with ExitStack() as stack:
            left = []
            for name in sorted(gone_of):
                with suppress(FileNotFoundError):
                    if netns.exists(name):
                        stack.enter_context(netns.held(name))
                        # In this order: the one takes the other's name.
                        if not (_has(name, _second(gone_of[name])) or _has(name, "eth0")):
                            left.append(name)
            # The agent of that machine may be having a look inside.
            netns.kill_inside([netns.path(name) for name in left], visiting=False)
            for name in left:
                netns.delete(name)
        for port in gone:
            self.made.pop(port, None)

    # ---- one port

    def _make(self, attachment: Attachment, end: links.Link | None) -> links.Link:
        name = self.namespace(attachment)
        # What is not ours may have been deleted, and made again, under the same name.
        inode = _inode_of(name) if attachment.attach is not None else 0
        made = self.made.get(attachment.port)
        if end is not None and made is not None and made[:2] == (attachment, inode):
            return end
        if attachment.attach is None:
            if not netns.exists(name):
                netns.delete(name)  # a file that a crash left
                netns.create(name)
            # Held: the machine that a port moves away from deletes a namespace that it finds without eth0.
            with netns.held(name):
                end, inside = self._veth(attachment, name, end)
        else:
            end, inside = self._veth(attachment, name, end)
        self.made[attachment.port] = Made(
            attachment, inode, netns.run_in(netns.path(name), lambda: _in(attachment, inside))
        )
        return end

    def _veth(self, attachment: Attachment, name: str, end: links.Link | None) -> tuple[links.Link, str]:
        """Our end of the pair, and the name of the other, in the namespace of this name."""
        namespace = netns.path(name)
        with links.netlink() as ipr:
            inside = _other_end(name, end) if end is not None else None
            if end is not None and inside is None:
                links.remove(ipr, end.index)  # the other end is somewhere else: start anew
                end = None
            if end is None or inside is None:
                inside = "eth0"
                if _has(name, "eth0"):
                    if attachment.moves:
                        inside = _second(attachment.port)
                    elif attachment.attach is not None:
                        inside = links.short_name("p", attachment.port)
                    else:
                        netns.run_in(namespace, _clear)
                words = "" if attachment.attach is None else f" {attachment.attach}"
                end = links.make_veth(
                    ipr,
                    links.short_name("p", attachment.port),
                    inside,
                    namespace,
                    mtu=attachment.settings.mtu,
                    mac=links.mac_text(attachment.settings.mac),
                    alias=f"{ALIAS}{attachment.port}{words}",
                )
            if end.mtu != LARGEST:
                ipr.link("set", index=end.index, mtu=LARGEST)
        links.set_sysctls(_forwarding(end.name, 1))
        return end, inside

    def _tap(self, attachment: Attachment, name: str, link: links.Link | None) -> links.Link:
        """One that is there is taken as it is."""
        alias, mtu = f"{ALIAS}{attachment.port} {attachment.attach}", attachment.settings.mtu
        if link is not None and link.master:
            what_to_do = f"`ip link set {name} nomaster` ends that"
            raise OSError(errno.EBUSY, f"is part of a bridge: {what_to_do}", f"tap {name}")
        if link is not None and self.made.get(attachment.port) == Made(attachment, link.index):
            return link
        with links.netlink() as ipr:
            if link is None:
                link = links.make_tap(ipr, name, mtu=mtu, alias=alias)
            elif not links.is_tap(ipr, link.index):
                raise OSError(errno.ENODEV, "is no tap device: name another", f"tap {name}")
            elif link.alias.startswith(ALIAS):
                ipr.link("set", index=link.index, ifalias=alias, mtu=mtu)
        links.set_sysctls(_forwarding(name, 1))
        self.made[attachment.port] = Made(attachment, link.index)
        return link


def _links() -> dict[str, links.Link]:
    with links.netlink() as ipr:
        return links.links(ipr)


def _ends(there: Mapping[str, links.Link]) -> dict[int, End]:
    """Those of the links that were made for ports."""
    ends = {}
    for link in there.values():
        if link.alias.startswith(ALIAS):
            port, *words = link.alias.removeprefix(ALIAS).split(" ")
            ends[int(port)] = End(link, Attach(*words) if len(words) == 2 else None)
    return ends


def _forwarding(name: str, on: int) -> dict[str, int]:
    """The datapath asks the kernel for the way to other machines as if from our end, which it answers only where
    forwarding is on. Nothing is forwarded by it: every frame that comes in there ends in our program."""
    return {f"net/ipv4/conf/{name}/forwarding": on, f"net/ipv6/conf/{name}/forwarding": on}


def _inode_of(name: str) -> int:
    """The namespace of this name, which must be there. Raises OSError with what to do."""
    what = f"netns {name}"
    if not netns.exists(name):
        raise FileNotFoundError(errno.ENOENT, f"there is none: `ip netns add {name}` makes it", what)
    inode = netns.inode(netns.path(name))
    if inode == netns.inode(Path("/proc/thread-self/ns/net")):
        raise OSError(errno.EINVAL, "is the machine's own: name another", what)
    return inode


def _has(name: str, interface: str) -> bool:
    def look() -> bool:
        with links.netlink() as ipr:
            return links.find(ipr, interface) is not None

    return netns.run_in(netns.path(name), look)


def _other_end(name: str, end: links.Link) -> str | None:
    """The name that the other end of a pair has in a namespace; None if it is not there."""

    def look() -> str | None:
        with links.netlink() as ipr:
            found = (link for link in links.links(ipr).values() if (link.index, link.peer) == (end.peer, end.index))
            return next((link.name for link in found), None)

    return netns.run_in(netns.path(name), look)


def _second(port: int) -> str:
    """What the other end is called inside as long as the one on the machine that the port leaves has its name."""
    return links.short_name("n", port)


def _clear() -> None:
    """Inside: take an eth0 that hangs on another machine away, for a port that moved here."""
    with links.netlink() as ipr:
        if (link := links.find(ipr, "eth0")) is not None:
            links.remove(ipr, link.index)


def _in(attachment: Attachment, inside: str) -> str:
    """Inside: all that the attachment says of the interface. Returns its name, which is another one when the port has
    arrived."""
    _configure(attachment, inside)
    if attachment.moves or inside != _second(attachment.port):
        return inside
    with links.netlink() as ipr:
        before = links.find(ipr, "eth0")
        name = "eth0" if before is None or attachment.attach is None else links.short_name("p", attachment.port)
        if before is not None and attachment.attach is None:
            links.remove(ipr, before.index)  # of a machine that is too slow, or dead
        link = links.find(ipr, inside)
        if link is not None:
            ipr.link("set", index=link.index, ifname=name)
    return name


def _configure(attachment: Attachment, inside: str) -> None:
    """Inside: MAC, MTU, addresses and default routes of the interface; and in a namespace of ours, loopback up.

    In one that was there before, a default route that leads out of another interface stays the only one of its family.
    While the port moves it is heard by two interfaces, and only one of them has its addresses.
    """
    wanted = attachment.settings
    links.set_sysctls(
        {
            f"net/ipv6/conf/{inside}/accept_ra": 0,  # gateways and addresses come from us
            f"net/ipv6/conf/{inside}/autoconf": 0,
            f"net/ipv6/conf/{inside}/accept_dad": 0,  # the source guard already makes addresses unique
            f"net/ipv6/conf/{inside}/router_solicitations": 0,
        }
    )
    if attachment.moves:  # loose: answers leave by the other one. It is strict where there is no IPv4 address at all
        links.set_sysctls({f"net/ipv4/conf/{inside}/rp_filter": 2})
    mac = links.mac_text(wanted.mac)
    with links.netlink() as ipr:
        if attachment.attach is None:
            ipr.link("set", index=1, state="up")
        link = links.find(ipr, inside)
        if link is None:
            raise OSError(0, f"{inside} has gone from inside the workload's namespace")
        if link.mac != mac:
            ipr.link("set", index=link.index, state="down")  # a new link-local address, too
            ipr.link("set", index=link.index, address=mac)
        if link.mtu != wanted.mtu:
            ipr.link("set", index=link.index, mtu=wanted.mtu)
        if attachment.moves:
            links.add_address(ipr, link.index, NOBODY)
        if attachment.elsewhere:
            ipr.link("set", index=link.index, state="up")
            return
        own = [*wanted.addresses, NOBODY] if attachment.moves else wanted.addresses
        links.set_addresses(ipr, link.index, own)
        ipr.link("set", index=link.index, state="up")
        left = links.having(ipr, wanted.addresses, besides=link.index) if attachment.moves else []
        default = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
        gateways = [
            gateway
            for gateway in wanted.gateways
            if attachment.attach is None or not links.has_default_route(ipr, gateway.version, [link.index, *left])
        ]
        links.set_routes(ipr, link.index, {default[gateway.version]: gateway for gateway in gateways})
        for index in left:  # its routes go with them; what comes in there is heard
            links.add_address(ipr, index, NOBODY)
            links.drop_addresses(ipr, index, wanted.addresses)
