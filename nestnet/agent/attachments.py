"""Where the workloads of this machine's ports hang: for each a namespace PREFIX<port id> with `eth0` in it.

    machine's namespace          PREFIX17
      p17  ------- veth -------  eth0    MAC, addresses, MTU and default routes of port 17

`wanted` says from a World what there should be, and touches nothing. `Workloads` makes it so, in three steps
around the datapath's work: `prepare` (everything there, our end of the pair down: closed), then the caller
attaches programs and writes tables, then `open` (our end up). `remove` takes away what is no longer wanted, and
is only called with a whole World.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from ipaddress import ip_interface, ip_network

from nestnet.agent import links, netns
from nestnet.compile.compiler import place
from nestnet.model.values import Address, Port, World

LARGEST = 65535  # MTU of our ends: what is too big for the network reaches the program, which can say so
ALIAS = "nestnet port "  # + id: marks our end of a pair, so that a new agent finds it


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a port's workload finds on its interface. `gateways`: the next hop of its default routes, one a family."""

    port: int
    mac: int
    mtu: int
    addresses: tuple[links.Interface, ...] = ()
    gateways: tuple[Address, ...] = ()


def attachment(world: World, port: Port) -> Attachment:
    """What the workload of this port gets."""
    segment = world.segments[port.segment]
    lengths = {cidr.version: cidr.prefixlen for cidr in segment.cidrs}
    gateways: dict[int, Address] = {}
    for router in world.routers_of(segment.id):
        for interface in router.interfaces:
            if interface.segment == segment.id:
                for address in interface.addresses:
                    gateways.setdefault(address.version, address)
    return Attachment(
        port.id,
        port.mac,
        world.networks[port.network].mtu,
        tuple(ip_interface(f"{a}/{lengths.get(a.version, a.max_prefixlen)}") for a in port.addresses),
        # A default route needs an address of its family to leave from.
        tuple(gateways[family] for family in (4, 6) if family in gateways and port.address(family) is not None),
    )


def wanted(world: World, machine: int) -> dict[int, Attachment]:
    """The attachments of every port that lives on this machine, by port id."""
    return {
        port.id: attachment(world, port)
        for port in world.ports.values()
        if place(world, port)[1] == machine and port.segment in world.segments
    }


@dataclass
class Workloads:
    """The workloads on this machine, in namespaces named PREFIX<port id>.

    Works in the calling thread's network namespace, which has to be the machine's, and remembers what it has
    made there, so that a change costs what it changes.
    """

    prefix: str
    made: dict[int, Attachment] = field(default_factory=dict)

    def namespace(self, port: int) -> str:
        """The name of the namespace of a port's workload."""
        return f"{self.prefix}{port}"

    def actual(self) -> dict[int, links.Link]:
        """Our ends of the pairs, by port id, as the kernel has them."""
        with links.netlink() as ipr:
            found = links.links(ipr).values()
        return {int(link.alias[len(ALIAS) :]): link for link in found if link.alias.startswith(ALIAS)}

    def prepare(self, want: Mapping[int, Attachment]) -> tuple[dict[int, links.Link], dict[int, str]]:
        """Make what is missing and correct what differs; what is new stays closed.

        Returns our ends by port id, and for each port that failed what the kernel said: the others are made."""
        have = self.actual()
        ready: dict[int, links.Link] = {}
        failed: dict[int, str] = {}
        for port, attachment in want.items():
            link = have.get(port)
            if link is not None and self.made.get(port) == attachment:
                ready[port] = link
                continue
            try:
                ready[port] = self._make(attachment, link)
                self.made[port] = attachment
            except OSError as error:
                self.made.pop(port, None)
                failed[port] = f"{self.namespace(port)}: {error.strerror or error}"
        return ready, failed

    def open(self, ends: Iterable[links.Link]) -> None:
        """Let frames through: our ends up. Called when the tables know the ports."""
        closed = [link for link in ends if not link.up]
        if closed:
            with links.netlink() as ipr:
                for link in closed:
                    ipr.link("set", index=link.index, state="up")

    def remove(self, want: Mapping[int, Attachment]) -> list[int]:
        """Take away the workloads of ports that are not wanted here, and end what runs in them. Returns their ids."""
        gone = {port: link for port, link in self.actual().items() if port not in want}
        if not gone:
            return []
        with links.netlink() as ipr:
            links.remove_all(ipr, [link.index for link in gone.values()])
        # Another machine of the lab may have taken the namespace over: the port moved. Then it has an eth0 again.
        with ExitStack() as stack:
            left = []
            for name in map(self.namespace, sorted(gone)):
                with suppress(FileNotFoundError):
                    if netns.exists(name):
                        stack.enter_context(netns.held(name))
                        if not self._has_link(name):
                            left.append(name)
            # The agent of that machine may be having a look inside.
            netns.kill_inside([netns.path(name) for name in left], visiting=False)
            for name in left:
                netns.delete(name)
        for port in gone:
            self.made.pop(port, None)
        return sorted(gone)

    def _make(self, attachment: Attachment, end: links.Link | None) -> links.Link:
        name = self.namespace(attachment.port)
        if not netns.exists(name):
            netns.delete(name)  # a file that a crash left
            netns.create(name)
        namespace = netns.path(name)
        with links.netlink() as ipr:
            if end is not None and not self._has_link(name):
                links.remove(ipr, end.index)  # the other end is somewhere else, or renamed: start anew
                end = None
            if end is None:
                # Held: the machine that a port moves away from deletes a namespace that it finds without eth0.
                with netns.held(name):
                    netns.run_in(namespace, _clear)
                    end = links.make_veth(
                        ipr,
                        links.short_name("p", attachment.port),
                        "eth0",
                        namespace,
                        mtu=attachment.mtu,
                        mac=links.mac_text(attachment.mac),
                        alias=f"{ALIAS}{attachment.port}",
                    )
                # The program asks the machine's routes where a frame goes, as if it had come in here to be forwarded.
                # Nothing is: whatever comes in here ends in the program.
                links.set_sysctls({f"net/ipv4/conf/{end.name}/forwarding": 1})
            if end.mtu != LARGEST:
                ipr.link("set", index=end.index, mtu=LARGEST)
        # The datapath asks the kernel for the way to other machines as if from here, which it answers only where
        # forwarding is on. Nothing is forwarded by it: every frame that comes in here ends in our program.
        links.set_sysctls({f"net/ipv4/conf/{end.name}/forwarding": 1, f"net/ipv6/conf/{end.name}/forwarding": 1})
        netns.run_in(namespace, lambda: _configure(attachment))
        return end

    def _has_link(self, name: str) -> bool:
        def look() -> bool:
            with links.netlink() as ipr:
                return links.find(ipr, "eth0") is not None

        return netns.run_in(netns.path(name), look)


def _clear() -> None:
    """Inside: take an eth0 that hangs on another machine away, for a port that moved here."""
    with links.netlink() as ipr:
        if (link := links.find(ipr, "eth0")) is not None:
            links.remove(ipr, link.index)


def _configure(attachment: Attachment) -> None:
    """Inside: loopback up; MAC, MTU, addresses and default routes of eth0."""
    links.set_sysctls(
        {
            "net/ipv6/conf/eth0/accept_ra": 0,  # gateways and addresses come from us
            "net/ipv6/conf/eth0/autoconf": 0,
            "net/ipv6/conf/eth0/accept_dad": 0,  # the source guard already makes addresses unique
            "net/ipv6/conf/eth0/router_solicitations": 0,
        }
    )
    mac = links.mac_text(attachment.mac)
    with links.netlink() as ipr:
        ipr.link("set", index=1, state="up")
        link = links.find(ipr, "eth0")
        if link is None:
            raise OSError(0, "eth0 has gone from inside the workload's namespace")
        if link.mac != mac:
            ipr.link("set", index=link.index, state="down")  # a new link-local address, too
            ipr.link("set", index=link.index, address=mac)
        if link.mtu != attachment.mtu:
            ipr.link("set", index=link.index, mtu=attachment.mtu)
        links.set_addresses(ipr, link.index, attachment.addresses)
        ipr.link("set", index=link.index, state="up")
        default = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
        links.set_routes(ipr, link.index, {default[gateway.version]: gateway for gateway in attachment.gateways})
