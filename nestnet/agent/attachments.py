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
around the datapath's work: `prepare` (everything there, our end down: closed), then the caller writes tables and
attaches programs, then `open` (our end up). `remove` takes away what is no longer wanted, and is only called with a
whole World. What was not made here is never deleted: an interface of ours bears an alias that says for which port.

Others have root, too. `Monitor` hears what they do to a link, at either end, and the next `prepare` puts it right; that
a namespace has lost its name is told by nobody, so some are looked up each time. `repaired` says what was found.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Interface, ip_interface, ip_network
from pathlib import Path
from typing import NamedTuple

from nestnet.agent import links, netns
from nestnet.agent.monitor import Monitor
from nestnet.compile.compiler import place
from nestnet.model.bootstrap import Settings, settings
from nestnet.model.icmp import DUMMY
from nestnet.model.values import RELAY, Attach, Port, World, link_local

LARGEST = 65535  # MTU of our ends: what is too big for the network reaches the program, which can say so
RELAY_HERE = IPv6Interface(f"{RELAY}/64")
# Bytes of a large packet (GSO) of a workload on an agent that is on a port itself: with the headers of all levels below
# it is not more than Linux takes in one piece, 65,536.
SHORTER = 65_536 - 1_536
NOBODY = ip_interface(f"{DUMMY}/32")  # of an interface that only hears (RFC 7600)
LOOKS = 50  # workloads that are looked into in one turn, at most: others have to wait, should somebody cause more
SINGLY = 50  # links that are asked for one by one; more of them come with all the others
ROUND = 3  # turns in which every namespace is looked up
ALIAS = "nestnet port "  # + id, and what it hangs on if that was chosen: so that a new agent finds it


class Vlan(NamedTuple):
    """A port behind a tag of a trunk, and what its workload should use there."""

    port: int
    tag: int
    settings: Settings


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a port's workload hangs on, None for a namespace of its own, and what it should use. While it moves it has a
    link on another machine, too; `elsewhere`: and sends by that. `relays`: our end has the relay's address. `vlans` are
    the ports that share it."""

    port: int
    settings: Settings
    attach: Attach | None = None
    moves: bool = False
    elsewhere: bool = False
    relays: bool = False
    vlans: tuple[Vlan, ...] = ()

    @property
    def tap(self) -> str | None:
        """The name of its tap, if it is one."""
        return self.attach.name if self.attach is not None and self.attach.kind == "tap" else None


def attachment(world: World, port: Port, machine: int) -> Attachment | None:
    """What the workload of this port gets on a machine; None where it does not live."""
    places = place(world, port)[1], place(world, port, other=True)[1]
    if machine not in places:
        return None
    moves, elsewhere = places[0] != places[1], places[0] != machine
    vlans = tuple(Vlan(behind.id, behind.tag, settings(world, behind)) for behind in world.vlans_of(port.id))
    return Attachment(port.id, settings(world, port), port.attach, moves, elsewhere, port.agent, vlans)


def wanted(world: World, machine: int, own: bool = True) -> dict[int, Attachment]:
    """The attachments of every port that lives on this machine, by port id; without `own` only of those that say what
    they hang on."""
    return {
        port.id: found
        for port in world.ports.values()
        if (own or port.attach is not None) and port.segment in world.segments and not port.trunk
        if (found := attachment(world, port, machine)) is not None
    }


class End(NamedTuple):
    """An interface of ours, as its alias says: for a port that hangs on this."""

    link: links.Link
    attach: Attach | None


class Made(NamedTuple):
    """What was made so; where (the inode of the namespace, the ifindex of a tap); our end; and the workload's interface
    in a namespace."""

    attachment: Attachment
    where: int
    end: links.Link
    inside: str = ""


@dataclass
class Workloads:
    """The workloads on this machine; those of ports that name nothing in namespaces called PREFIX<port id>. None: such
    ports have no workload.

    Works in the calling thread's network namespace, which has to be the machine's, and remembers what it has
    made there, so that a change costs what it changes.
    """

    prefix: str | None
    on_port: bool = False  # is the machine the workload of a host port itself?
    made: dict[int, Made] = field(default_factory=dict)
    repaired: list[tuple[int, str]] = field(default_factory=list)  # by port: what was not as it should have been
    _monitor: Monitor | None = None
    _there: dict[int, links.Link] = field(default_factory=dict)  # every link here, by ifindex
    _doubted: dict[int, None] = field(default_factory=dict)  # ports to look at again, the longest waiting first
    _opened: set[int] = field(default_factory=set)  # ifindexes
    lacking: str = ""  # why workloads on trunks have no interfaces for tags
    _looked_up: int = 0  # of the ports whose namespaces are looked up in turn, how many were
    _done: dict[int, links.Link] | None = (
        None  # what the last turn returned, if nothing was left and has happened since
    )
    _want: Mapping[int, Attachment] | None = (
        None  # what was wanted then, and since it is, on which ifindexes ports were
    )
    _known: dict[int, int] = field(default_factory=dict)

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
        self._hear()
        return _ends(self._there.values())

    def prepare(self, want: Mapping[int, Attachment]) -> tuple[dict[int, links.Link], dict[int, str]]:
        """Make what is missing and correct what differs; what is new stays closed. A port that hangs on something else
        now is taken off what it hung on first.

        Returns our ends by port id, the same dict as before if nothing has happened, and for each port that failed what
        to do about it: the others are made."""
        self._hear()
        self._look_up()
        if not any(attachment.vlans for attachment in want.values()):
            self.lacking = ""
        if self._done is not None and self._want is want and not self._doubted:
            return self._done, {}
        waiting = [port for port in self._doubted if port in want]
        doubted = set(waiting[:LOOKS])
        self._doubted = dict.fromkeys(waiting[LOOKS:])
        for port in doubted:
            self._name(port)
        have = _ends(self._there.values())
        there = {link.name: link for link in self._there.values()}
        ready: dict[int, links.Link] = {}
        failed: dict[int, str] = {}
        taps = {attachment.tap for attachment in want.values()} - {None}
        moved = {port: end for port, end in have.items() if port in want and end.attach != want[port].attach}
        self._take_away(moved, taps)
        for port in moved:
            del have[port]
        for port, attachment in want.items():
            end = have.get(port)
            made = self.made.get(port)
            if (
                port not in doubted
                and made is not None
                and made.attachment == attachment
                and end is not None
                and end.link.index == made.end.index
            ):
                ready[port] = end.link
                continue
            try:
                if attachment.tap is not None:
                    ready[port] = self._tap(attachment, attachment.tap, there.get(attachment.tap))
                else:
                    ready[port] = self._make(attachment, end.link if end is not None else None)
            except OSError as error:
                self.made.pop(port, None)
                failed[port] = f"{error.filename or self._where(attachment)}: {error.strerror or error}"
        known = self._known if self._want is want else {}
        for port, link in ready.items():
            if known.get(port, link.index) != link.index:
                self.repaired.append((port, "its link had gone, it has a new one"))
        self._want, self._known = want, {**known, **{port: link.index for port, link in ready.items()}}
        self._done = None if failed else ready
        return ready, failed

    # ---- what others did

    def _hear(self) -> None:
        """What has happened since the last time: the links as they are now, and ports to look at again."""
        if self._monitor is None:
            self._monitor = Monitor()  # before looking: what happens meanwhile is heard
            with links.netlink() as ipr:
                links.remove_all(ipr, [])  # half made, or half gone, when an agent before this one was killed
                self._there = {link.index: link for link in links.links(ipr).values()}
            return
        heard = self._monitor.take()
        if not heard:
            return
        if heard.links or heard.everything:
            with links.netlink() as ipr:
                if heard.everything or len(heard.links) > SINGLY:
                    self._there = {link.index: link for link in links.links(ipr).values()}
                else:
                    for index in heard.links:
                        self._there.pop(index, None)
                        if (link := links.at(ipr, index)) is not None:
                            self._there[index] = link
        self._doubted |= {
            port: None
            for port, made in self.made.items()
            if heard.everything or made.end.index in heard.links or made.end.namespace in heard.namespaces
        }
        self._done = None  # a link that comes may be one that was missing

    def _look_up(self) -> None:
        """Whether the namespaces of some ports, all of them within a ROUND, still have their names."""
        ports = list(self.made)
        some = len(ports) // ROUND + 1
        self._looked_up = 0 if self._looked_up >= len(ports) else self._looked_up
        for port in ports[self._looked_up : self._looked_up + some]:
            made = self.made[port]
            if made.attachment.tap is None and _inode(self.namespace(made.attachment)) != made.where:
                self._doubted[port] = None
            if made.attachment.relays:  # of neighbours, too, nobody tells
                with suppress(OSError):  # it has gone, or speaks no IPv6: that is told
                    if _seat_relay(made.attachment, made.end):
                        self.repaired.append((port, f"addresses of {made.end.name} had changed"))
        self._looked_up += some

    def _name(self, port: int) -> None:
        """Put the alias back on an end that somebody took it off, so that it is found."""
        made = self.made.get(port)
        link = self._there.get(made.end.index) if made is not None else None
        if made is None or link is None or link.alias == made.end.alias or not made.end.alias.startswith(ALIAS):
            return
        same = (link.peer, link.namespace) == (made.end.peer, made.end.namespace)
        if not same or (not link.peer and link.name != made.end.name):
            return  # another interface has its number now
        with links.netlink() as ipr:
            ipr.link("set", index=link.index, ifalias=made.end.alias)
        self._there[link.index] = replace(link, alias=made.end.alias)
        self.repaired.append((port, f"{link.name} had lost its alias"))

    def _where(self, attachment: Attachment) -> str:
        return str(attachment.attach) if attachment.attach is not None else self.namespace(attachment)

    def open(self, ends: Iterable[links.Link]) -> None:
        """Let frames through: our ends up. Called when the tables know the ports."""
        closed = [link for link in ends if not link.up]
        if closed:
            port_of = {made.end.index: port for port, made in self.made.items()}
            with links.netlink() as ipr:
                for link in closed:
                    ipr.link("set", index=link.index, state="up")
                    if link.index in self._opened:
                        self.repaired.append((port_of.get(link.index, 0), f"{link.name} was down"))
            self._opened |= {link.index for link in closed}

    def close(self, port: int) -> None:
        """Let nothing through from a port that cannot be secured: our end down."""
        link = self._there.get(self.made[port].end.index) if port in self.made else None
        if link is not None and link.up:
            self._opened.discard(link.index)
            with links.netlink() as ipr:
                ipr.link("set", index=link.index, state="down")

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
            link = links.at(ipr, index)
            if link is not None and not link.alias.startswith(ALIAS):
                ipr.link("set", index=index, state="down")
                links.set_sysctls({f"net/ipv6/conf/{link.name}/disable_ipv6": 1})  # forgets the relay's address
                links.set_sysctls({**_forwarding(link.name, 0), **_as_others(link.name)})

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
            for name in left:  # and what an agent in there has made
                left += [inner for inner in self._within(name) if inner not in left]
            # The agent of that machine may be having a look inside.
            netns.kill_inside([netns.path(name) for name in left], visiting=False)
            for name in left:
                netns.delete(name)
        for port in gone:
            self.made.pop(port, None)

    def _within(self, name: str) -> list[str]:
        """The namespaces that an agent in this one has made for ports, which hang on it and on nothing else."""

        def look() -> dict[int, End]:
            with links.netlink() as ipr:
                return _ends(links.links(ipr).values())

        ends = netns.run_in(netns.path(name), look)
        names = {port: f"{self.prefix}{port}" for port, end in ends.items() if end.attach is None}
        return [name for port, name in names.items() if netns.exists(name) and not _has(name, _second(port))]

    # ---- one port

    def _make(self, attachment: Attachment, end: links.Link | None) -> links.Link:
        name = self.namespace(attachment)
        made = self.made.get(attachment.port)
        if attachment.attach is None:
            if not netns.exists(name):
                netns.delete(name)  # a file that a crash left
                netns.create(name)
            # Held: the machine that a port moves away from deletes a namespace that it finds without eth0.
            with netns.held(name):
                where = _inode(name)
                end, inside, changed = self._veth(attachment, name, end)
        else:
            # What is not ours may have been deleted, and made again, under the same name.
            where = _inode_of(name)
            end, inside, changed = self._veth(attachment, name, end)
        # What a workload gave itself since stays.
        exactly = made is None or made.attachment != attachment
        largest = SHORTER if self.on_port else 0
        inside, more = netns.run_in(netns.path(name), lambda: _in(attachment, inside, exactly, largest))
        changed += more
        if not attachment.moves:  # while it does, its interface changes
            try:
                changed += netns.run_in(netns.path(name), lambda: _tagged(attachment.vlans, inside, exactly))
            except links.NoVlans as error:
                self.lacking = f"workloads on trunks have no interfaces for tags: {error}"
        if changed and made is not None and made[:2] == (attachment, where) and made.end.index == end.index:
            self.repaired.append((attachment.port, f"{', '.join(changed)} had changed"))
        self.made[attachment.port] = Made(attachment, where, end, inside)
        return end

    def _veth(self, attachment: Attachment, name: str, end: links.Link | None) -> tuple[links.Link, str, list[str]]:
        """Our end of the pair, the name of the other, in the namespace of this name, and what had to be corrected."""
        namespace = netns.path(name)
        changed = []
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
                changed.append(f"MTU of {end.name}")
        if links.set_sysctls(_behind(end.name, attachment.relays) | _forwarding(end.name, 1)):
            changed.append(f"sysctls of {end.name}")
        if attachment.relays and _seat_relay(attachment, end):
            changed.append(f"addresses of {end.name}")
        return end, inside, changed

    def _tap(self, attachment: Attachment, name: str, link: links.Link | None) -> links.Link:
        """One that is there is taken as it is."""
        alias, mtu = f"{ALIAS}{attachment.port} {attachment.attach}", attachment.settings.mtu
        if link is not None and link.master:
            what_to_do = f"`ip link set {name} nomaster` ends that"
            raise OSError(errno.EBUSY, f"is part of a bridge: {what_to_do}", f"tap {name}")
        with links.netlink() as ipr:
            if link is None:
                link = links.make_tap(ipr, name, mtu=mtu, alias=alias)
            elif not links.is_tap(ipr, link.index):
                raise OSError(errno.ENODEV, "is no tap device: name another", f"tap {name}")
            elif link.alias.startswith(ALIAS) and (link.alias, link.mtu) != (alias, mtu):
                ipr.link("set", index=link.index, ifalias=alias, mtu=mtu)
        changed = [f"sysctls of {name}"] * links.set_sysctls(_behind(name, attachment.relays) | _forwarding(name, 1))
        changed += [f"addresses of {name}"] * (attachment.relays and _seat_relay(attachment, link))
        made = self.made.get(attachment.port)
        if changed and made is not None and made[:2] == (attachment, link.index):
            self.repaired.append((attachment.port, f"{', '.join(changed)} had changed"))
        self.made[attachment.port] = Made(attachment, link.index, link)
        return link


def _ends(there: Iterable[links.Link]) -> dict[int, End]:
    """Those of the links that were made for ports."""
    ends = {}
    for link in there:
        if link.alias.startswith(ALIAS):
            port, *words = link.alias.removeprefix(ALIAS).split(" ")
            ends[int(port)] = End(link, Attach(*words) if len(words) == 2 else None)
    return ends


def _forwarding(name: str, on: int) -> dict[str, int]:
    """The datapath asks the kernel for the way to other machines as if from our end, which it answers only where
    forwarding is on. Nothing is forwarded by it: every frame that comes in there ends in our program."""
    return {f"net/ipv4/conf/{name}/forwarding": on, f"net/ipv6/conf/{name}/forwarding": on}


def _behind(name: str, relays: bool) -> dict[str, int]:
    """What keeps the machine's own stack from listening at our end, should our program be taken off: it speaks no IPv6
    there, but for the relay, knows no address of the machine's there, and nobody's address leads there."""
    return {
        f"net/ipv6/conf/{name}/addr_gen_mode": 1,
        f"net/ipv6/conf/{name}/accept_ra": 0,
        f"net/ipv6/conf/{name}/disable_ipv6": int(not relays),
        f"net/ipv4/conf/{name}/arp_ignore": 8,
        f"net/ipv4/conf/{name}/rp_filter": 1,
    }


def _seat_relay(attachment: Attachment, end: links.Link) -> bool:
    """The relay's address for our end, and who hears its answers: the port and nobody else. True when that was a
    change. Behind the sysctls: an interface that stops speaking IPv6 forgets both."""
    mac = attachment.settings.mac
    with links.netlink() as ipr:
        return links.set_only_neighbour(ipr, end.index, RELAY_HERE, link_local(mac), links.mac_text(mac))


def _as_others(name: str) -> dict[str, str]:
    """The same settings as of any other interface here."""
    keys = _behind(name, False)
    defaults = {key: Path("/proc/sys") / key.replace(f"/{name}/", "/default/") for key in keys}
    return {key: file.read_text().strip() for key, file in defaults.items() if file.exists()}


def _inode(name: str) -> int:
    """The namespace of this name; 0 if there is none."""
    try:
        found = os.stat(f"{netns.FOLDER}/{name}")  # noqa: PTH116 - of ten thousand
    except FileNotFoundError:
        return 0
    return found.st_ino


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


def _in(attachment: Attachment, inside: str, exactly: bool, largest: int) -> tuple[str, list[str]]:
    """Inside: all that the attachment says of the interface. Returns its name, which is another one when the port has
    arrived, and what was otherwise."""
    changed = _configure(attachment, inside, exactly)
    if largest:
        with links.netlink() as ipr:
            if (own := links.find(ipr, inside)) is not None:
                ipr.link("set", index=own.index, gso_max_size=largest)
    if attachment.moves or inside != _second(attachment.port):
        return inside, changed
    with links.netlink() as ipr:
        before = links.find(ipr, "eth0")
        name = "eth0" if before is None or attachment.attach is None else links.short_name("p", attachment.port)
        if before is not None and attachment.attach is None:
            links.remove(ipr, before.index)  # of a machine that is too slow, or dead
        link = links.find(ipr, inside)
        if link is not None:
            ipr.link("set", index=link.index, ifname=name)
    return name, changed


def _tagged(vlans: Sequence[Vlan], inside: str, exactly: bool) -> list[str]:
    """Inside: an interface for each tag, called as the one that it is on, a dot and the tag, with the addresses of its
    port. A default route only where there is none of its family. Returns what was otherwise; raises NoVlans."""
    changed: list[str] = []
    with links.netlink() as ipr:
        trunk = links.find(ipr, inside)
        for vlan in vlans if trunk is not None else ():
            name, mac = links.tag_name(inside, vlan.tag), links.mac_text(vlan.settings.mac)
            link = links.find(ipr, name)
            if link is None:
                link = links.make_vlan(ipr, name, trunk.index, vlan.tag, mac=mac)  # type: ignore[union-attr]
                changed.append(name)
            elif link.mac != mac:
                ipr.link("set", index=link.index, address=mac)
                changed.append(f"MAC of {name}")
            if link.mtu != vlan.settings.mtu:
                ipr.link("set", index=link.index, mtu=vlan.settings.mtu)
            links.set_sysctls({f"net/ipv6/conf/{name}/{key}": 0 for key in ("accept_ra", "accept_dad")})
            if links.set_addresses(ipr, link.index, vlan.settings.addresses, exactly):
                changed.append(f"addresses of {name}")
            if not link.up:
                ipr.link("set", index=link.index, state="up")
            ways = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
            free = (g for g in vlan.settings.gateways if not links.has_default_route(ipr, g.version, [link.index]))
            links.set_routes(ipr, link.index, {ways[gateway.version]: gateway for gateway in free})
    return changed


def _configure(attachment: Attachment, inside: str, exactly: bool) -> list[str]:
    """Inside: MAC, MTU, addresses (`exactly` these) and default routes of the interface; and in a namespace of ours,
    loopback up. Returns what was otherwise.

    In one that was there before, a default route that leads out of another interface stays the only one of its family.
    While the port moves it is heard by two interfaces, and only one of them has its addresses.
    """
    wanted = attachment.settings
    changed = []
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
            changed.append(f"MAC of {inside}")
        if link.mtu != wanted.mtu:
            ipr.link("set", index=link.index, mtu=wanted.mtu)
            changed.append(f"MTU of {inside}")
        # Behind the MTU: below 1280 bytes there is no IPv6, and when it comes back it knows nothing of this.
        sysctls = {
            f"net/ipv6/conf/{inside}/accept_ra": 0,  # gateways and addresses come from us
            f"net/ipv6/conf/{inside}/autoconf": 0,
            f"net/ipv6/conf/{inside}/accept_dad": 0,  # the source guard already makes addresses unique
            f"net/ipv6/conf/{inside}/router_solicitations": 0,
        }
        if attachment.moves:
            # Loose: answers leave by the other one. It is strict where there is no IPv4 address at all.
            sysctls[f"net/ipv4/conf/{inside}/rp_filter"] = 2
        if links.set_sysctls(sysctls):
            changed.append(f"sysctls of {inside}")
        hears = attachment.moves and links.set_addresses(ipr, link.index, [NOBODY], exactly=False)
        there = links.having(ipr, wanted.addresses, besides=link.index) if attachment.moves else []
        # The other machine may know of the flip already: what it took over while this one knew nothing new stays there.
        sends = not attachment.elsewhere and (exactly or not there)
        own = [*wanted.addresses, NOBODY] if attachment.moves else wanted.addresses
        if (sends and links.set_addresses(ipr, link.index, own, exactly)) or hears:
            changed.append(f"addresses of {inside}")
        if not link.up or link.mac != mac:
            ipr.link("set", index=link.index, state="up")
        if not link.up:
            changed.append(f"state of {inside}")
        if not sends:
            return changed
        default = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
        gateways = [
            gateway
            for gateway in wanted.gateways
            if attachment.attach is None or not links.has_default_route(ipr, gateway.version, [link.index, *there])
        ]
        if links.set_routes(ipr, link.index, {default[gateway.version]: gateway for gateway in gateways}):
            changed.append(f"default routes of {inside}")
        for index in there:  # its routes go with them; what comes in there is heard
            links.set_addresses(ipr, index, [NOBODY], exactly=False)
            links.drop_addresses(ipr, index, wanted.addresses)
    return changed
