"""Workloads that nestnet did not make: on a tap, as a virtual machine, and in a namespace that was there. With the
agents' own code, real DHCP clients, and the kernel's own reading of router advertisements.

    machine 1:  VM on tap vm1 and NS in namespace `given`, both in LAN; NEAR in LAN;  LONELY on tap vm2, in ISLAND
    machine 2:  FAR in LAN; BEHIND in OTHER, behind the router
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

import pytest
from frames import ip_frame, udp
from machines import Guest
from twins import SMALL, copies

from nestnet.agent import netns
from nestnet.agent.agent import Agent
from nestnet.agent.attachments import Workloads
from nestnet.agent.feed import Desired
from nestnet.agent.inquiries import Inquiries
from nestnet.datapath.kernel import BPFFS, Kernel
from nestnet.model import packet as pk
from nestnet.model.values import Attach, Interface, Machine, Network, Port, Router, Segment, World

pytestmark = pytest.mark.root
PREFIX = f"nnt-wl-{os.getpid()}-"
LAN, OTHER, ISLAND = 1, 2, 3  # segments
VM, NS, NEAR, LONELY, FAR, BEHIND = 1, 2, 3, 4, 5, 6  # ports
BYTES = 20_000_003  # odd, and of no segment size
PATIENCE = 10.0
DNS = (IPv4Address("10.7.1.53"), IPv6Address("fd07:1::53"))


def world() -> World:
    def port(id: int, segment: int, machine: int, attach: Attach | None = None) -> Port:
        addresses = (IPv4Address(f"10.7.{segment}.{10 + id}"), IPv6Address(f"fd07:{segment}::{10 + id}"))
        return Port(id, 1, segment, machine, 0x020000000000 + id, addresses, attach=attach)

    cidrs = {s: (ip_network(f"10.7.{s}.0/24"), ip_network(f"fd07:{s}::/64")) for s in (LAN, OTHER, ISLAND)}
    joined = tuple(Interface(s, (cidrs[s][0][1], cidrs[s][1][1])) for s in (LAN, OTHER))
    return World.of(
        (
            *(Machine(m, IPv4Address(f"192.0.2.{m}")) for m in (1, 2)),
            Network(1, mtu=1430),
            *(Segment(s, 1, 100 + s, cidrs[s], DNS) for s in cidrs),
            Router(1, 1, 0x060000000001, joined),
            port(VM, LAN, 1, Attach("tap", "vm1")),
            port(NS, LAN, 1, Attach("netns", f"{PREFIX}given")),
            port(NEAR, LAN, 1),
            port(LONELY, ISLAND, 1, Attach("tap", "vm2")),
            port(FAR, LAN, 2),
            port(BEHIND, OTHER, 2),
        )
    )


def ip(namespace: str, *lines: str) -> None:
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], input="\n".join(lines), text=True, check=True)


def until(condition: Callable[[], Any], what: str) -> Any:
    """What the condition is when it holds."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.02)  # the pace of asking; the wait is for the condition
    return found


@dataclass
class Site:
    """One machine's agent, as a process would have it, and another of it after a restart."""

    machine: int
    kernel: Kernel
    inquiries: Inquiries
    agent: Agent

    @property
    def name(self) -> str:
        return f"{PREFIX}m{self.machine}"

    @property
    def room(self) -> Path:
        return netns.path(self.name)

    def become(self, world: World, revision: int = 1) -> list[str]:
        """The problems that are left."""
        netns.run_in(self.room, partial(self.agent.converge, Desired(world.values, revision, True)))
        return self.agent.problems

    def restart(self) -> None:
        self.inquiries.close()
        self.inquiries = netns.run_in(self.room, partial(Inquiries, self.kernel, print))
        self.agent = netns.run_in(
            self.room,
            partial(Agent, self.machine, self.kernel, Workloads(f"{PREFIX}w"), self.inquiries, copies()),
        )

    def drops(self, port: int) -> dict[str, int]:
        return dict(self.agent.ports().get(str(port), {"drops": {}})["drops"])


@dataclass
class Lab:
    world: World
    sites: dict[int, Site]

    def room(self, port: int) -> Path:
        attach = self.world.ports[port].attach
        return netns.path(attach.name if attach is not None else f"{PREFIX}w{port}")

    def address(self, port: int, family: int) -> str:
        return str(self.world.ports[port].address(family))

    def guest(self, port: int, offloads: bool = True) -> Guest:
        there = self.world.ports[port]
        assert there.attach is not None
        mac = there.mac.to_bytes(6, "big").hex(":")
        return Guest(f"{PREFIX}guest{port}", self.sites[there.host].room, there.attach.name, mac, offloads)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    pins = BPFFS / "nestnet" / f"{PREFIX}pins"
    sites: dict[int, Site] = {}
    made = Lab(world(), sites)
    wire = f"{PREFIX}wire"
    try:
        netns.create(wire)
        ip(wire, "link add wire type bridge stp_state 0 mcast_snooping 0", "link set wire up")
        netns.create(f"{PREFIX}given")
        for machine in (1, 2):
            name = f"{PREFIX}m{machine}"
            netns.create(name)
            ip(
                name,
                f"link add eth0 type veth peer name m{machine} netns {wire}",
                f"address add 192.0.2.{machine}/24 dev eth0",
                "link set eth0 up",
            )
            ip(wire, f"link set m{machine} master wire up")
        for machine in (1, 2):
            kernel = Kernel.open(pins / str(machine), SMALL)
            room = netns.path(f"{PREFIX}m{machine}")
            inquiries = netns.run_in(room, partial(Inquiries, kernel, print))
            agent = netns.run_in(room, partial(Agent, machine, kernel, Workloads(f"{PREFIX}w"), inquiries, copies()))
            sites[machine] = Site(machine, kernel, inquiries, agent)
            assert sites[machine].become(made.world) == []
        yield made
    finally:
        for machine, site in sites.items():
            site.inquiries.close()
            site.kernel.unpin()
            (pins / str(machine)).rmdir()
        if pins.exists():
            pins.rmdir()
        for name in netns.names(PREFIX):
            netns.delete(name)


# ---- clients

SCRIPT = """#!/bin/sh
# What a distribution's script does, but for files of the system: all that was told goes to {told}.REASON.
case "${{reason:-$1}}" in
    PREINIT6) i=0; while ip -6 addr show dev $interface | grep -q tentative; do sleep 0.1; done ;;
    BOUND | RENEW | REBOOT)
        ip addr replace $new_ip_address/$new_subnet_mask dev $interface
        [ -z "$new_interface_mtu" ] || ip link set $interface mtu $new_interface_mtu
        for router in $new_routers; do ip route replace default via $router dev $interface; done ;;
    BOUND6 | RENEW6) ip -6 addr replace $new_ip6_address/$new_ip6_prefixlen dev $interface ;;
    bound | renew)
        ip addr replace $ip/$mask dev $interface
        [ -z "$mtu" ] || ip link set $interface mtu $mtu
        for router in $router; do ip route replace default via $router dev $interface; done ;;
esac
env >{told}.new
mv {told}.new {told}.${{reason:-$1}}
"""
CONFIG = """
request subnet-mask, routers, domain-name-servers, interface-mtu, dhcp6.name-servers;
timeout 10;
"""


@dataclass
class Client:
    """A DHCP client in a guest: what it was told."""

    guest: Guest
    folder: Path

    def __post_init__(self) -> None:
        script = self.folder / "script"
        script.write_text(SCRIPT.format(told=self.folder / "told"))
        script.chmod(0o755)
        (self.folder / "conf").write_text(CONFIG)

    def told(self, reason: str) -> dict[str, str]:
        text = (self.folder / f"told.{reason}").read_text()
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def udhcpc(self, *more: str) -> dict[str, str]:
        options = ("-f", "-n", "-q", "-t", "5", "-T", "1", "-O", "mtu", "-O", "staticroutes")
        self.guest.run("busybox", "udhcpc", "-i", "nic", "-s", str(self.folder / "script"), *options, *more)
        return self.told("bound")

    def dhclient(self, family: int, *more: str) -> None:
        files = [f"{option}={self.folder}/{name}{family}" for option, name in (("-lf", "leases"), ("-pf", "pid"))]
        words = [word for file in files for word in file.split("=")]
        words += ["-cf", str(self.folder / "conf"), "-sf", str(self.folder / "script")]
        self.guest.run("dhclient", f"-{family}", "-1", "-v", *words, *more, "nic")


@pytest.fixture
def vm(lab: Lab) -> Iterator[Guest]:
    guest = lab.guest(VM)
    yield guest
    guest.close()


def test_udhcpc_is_told_everything(lab: Lab, vm: Guest, tmp_path: Path) -> None:
    told = Client(vm, tmp_path).udhcpc()
    expected = {"ip": "10.7.1.11", "mask": "24", "router": "10.7.1.1", "mtu": "1430", "dns": "10.7.1.53"}
    expected |= {"serverid": "10.7.1.1", "lease": str(0xFFFFFFFF), "staticroutes": "0.0.0.0/0 10.7.1.1"}
    assert {name: told.get(name) for name in expected} == expected
    vm.run("ping", "-c", "1", "-W", "2", lab.address(BEHIND, 4))
    assert "mtu 1430" in vm.run("ip", "link", "show", "nic")


def test_dhclient_is_told_everything_and_renews(lab: Lab, vm: Guest, tmp_path: Path) -> None:
    client = Client(vm, tmp_path)
    client.dhclient(4)
    told = client.told("BOUND")
    expected = {"new_ip_address": "10.7.1.11", "new_subnet_mask": "255.255.255.0", "new_routers": "10.7.1.1"}
    expected |= {"new_interface_mtu": "1430", "new_domain_name_servers": "10.7.1.53"}
    assert {name: told.get(name) for name in expected} == expected
    client.dhclient(4, "-x")
    client.dhclient(4)  # begins anew with what it had
    assert (tmp_path / "told.REBOOT").exists()
    client.dhclient(4, "-r")
    assert lab.sites[1].drops(VM).get("unanswerable", 0) >= 1, "a release needs no answer"


def test_the_kernel_reads_the_advertisement_and_dhclient_gets_the_address(lab: Lab, vm: Guest, tmp_path: Path) -> None:
    until(lambda: "default via fe80::400:ff:fe00:1" in vm.run("ip", "-6", "route"), "no default route")
    routes = vm.run("ip", "-6", "route")
    assert re.search(r"fd07:1::/64 dev nic proto kernel", routes), routes
    assert "mtu 1430" in vm.run("ip", "-6", "route", "get", "fd07:2::16")
    assert "fd07" not in vm.run("ip", "-6", "addr"), "nobody chooses an address"
    client = Client(vm, tmp_path)
    client.dhclient(6)
    told = client.told("BOUND6")
    assert (told["new_ip6_address"], told["new_dhcp6_name_servers"]) == ("fd07:1::11", "fd07:1::53")
    # With the kernel's own duplicate address detection.
    until(lambda: "tentative" not in vm.run("ip", "-6", "addr", "show", "dev", "nic"), "still tentative")
    assert "dadfailed" not in vm.run("ip", "-6", "addr")
    for target in (NEAR, FAR, BEHIND):
        vm.run("ping", "-6", "-c", "1", "-W", "2", lab.address(target, 6))
    client.dhclient(6, "-r")


def test_a_change_is_told_unasked(lab: Lab, vm: Guest) -> None:
    until(lambda: "default via" in vm.run("ip", "-6", "route"), "no default route")
    site, smaller = lab.sites[1], replace(lab.world.networks[1], mtu=1400)
    try:
        assert site.become(lab.world.with_(smaller).without(("router", 1)), 2) == []
        until(lambda: "default via" not in vm.run("ip", "-6", "route"), "the router has gone")
        until(lambda: vm.run("sysctl", "-n", "net.ipv6.conf.nic.mtu") == "1400\n", "the MTU is another")
    finally:
        assert site.become(lab.world, 3) == []
    until(lambda: "default via" in vm.run("ip", "-6", "route"), "the router is back")


def test_a_machine_that_runs_already_is_told_when_its_tap_is_attached(lab: Lab) -> None:
    site = lab.sites[1]
    assert site.become(lab.world.without(("port", VM)), 2) == []
    ip(site.name, "tuntap add dev vm1 mode tap vnet_hdr", "link set vm1 up")
    guest = lab.guest(VM)
    try:
        assert "default" not in guest.run("ip", "-6", "route")
        assert site.become(lab.world, 3) == []
        until(lambda: "default via" in guest.run("ip", "-6", "route"), "no default route")
    finally:
        guest.close()
        ip(site.name, "link del vm1")
        assert site.become(lab.world, 4) == []


def test_without_a_router(lab: Lab, tmp_path: Path) -> None:
    guest = lab.guest(LONELY)
    try:
        told = Client(guest, tmp_path).udhcpc()
        assert (told["ip"], told["serverid"]) == ("10.7.3.14", "192.0.0.8")
        assert "router" not in told
        assert "staticroutes" not in told
        until(lambda: "fd07:3::/64" in guest.run("ip", "-6", "route"), "no prefix")
        assert "default" not in guest.run("ip", "-6", "route")
        Client(guest, tmp_path).dhclient(6)
        assert "fd07:3::14" in guest.run("ip", "-6", "addr")
    finally:
        guest.close()


def test_who_asks_too_much_costs_others_nothing(lab: Lab, vm: Guest, tmp_path: Path) -> None:
    site = lab.sites[1]
    mac = lab.world.ports[VM].mac
    body = bytes([1, 1, 6, 0]) + bytes(24) + pk.mac_bytes(mac) + bytes(202) + b"\x63\x82\x53\x63\x35\1\1\xff"
    flow = pk.UNSPECIFIED4, pk.LIMITED_BROADCAST
    discover = ip_frame(pk.BROADCAST, mac, *flow, pk.UDP, udp(*flow, 68, 67, body))

    def flood() -> int:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(pk.IPV4)) as raw:
            raw.bind(("nic", pk.IPV4))
            for _ in range(500):
                raw.send(discover)
            raw.settimeout(0.5)
            heard = 0
            with contextlib.suppress(TimeoutError):
                while True:
                    heard += raw.recv(2000)[36:38] == b"\0\x44"
            return heard

    before = site.drops(VM).get("ask_limit", 0)
    heard = netns.run_in(vm.room, flood)
    assert 1 <= heard <= 25
    assert site.drops(VM)["ask_limit"] - before > 400
    other = lab.guest(LONELY)
    try:
        begun = time.monotonic()
        Client(other, tmp_path).udhcpc()
        assert time.monotonic() - begun < 2
    finally:
        other.close()


# ---- what a machine has


def inside(room: Path, *command: str) -> str:
    run = partial(subprocess.run, command, capture_output=True, text=True, check=True)
    return str(netns.run_in(room, run).stdout)


def names(room: Path) -> set[str]:
    return {line.split()[0].split("@")[0] for line in inside(room, "ip", "-br", "link").splitlines()}


def hung(lab: Lab, port: int, attach: Attach | None) -> World:
    return lab.world.with_(replace(lab.world.ports[port], attach=attach))


@pytest.fixture
def site(lab: Lab) -> Iterator[Site]:
    """Machine 1, which is as it was afterwards."""
    yield lab.sites[1]
    assert lab.sites[1].become(lab.world, 99) == []


def test_a_namespace_that_was_there_gets_an_interface(lab: Lab, site: Site) -> None:
    room = lab.room(NS)
    shown = inside(room, "ip", "addr", "show", "dev", "eth0")
    for text in ("link/ether 02:00:00:00:00:02", "mtu 1430", "10.7.1.12/24", "fd07:1::12/64"):
        assert text in shown
    assert "default via 10.7.1.1 dev eth0" in inside(room, "ip", "route")
    inside(room, "ping", "-c", "1", "-W", "2", lab.address(FAR, 4))
    assert site.agent.ports()[str(NS)] | {"drops": {}} == {
        "interface": "p2", "namespace": f"{PREFIX}given", "inside": "eth0", "drops": {},
    }  # fmt: skip
    # It hangs there no more: nothing of ours is left, and what is not ours stays. Its own namespace has what it had.
    assert site.become(hung(lab, NS, None), 2) == []
    assert names(room) == {"lo"}
    assert "10.7.1.12/24" in inside(netns.path(f"{PREFIX}w{NS}"), "ip", "addr", "show", "dev", "eth0")
    assert site.become(lab.world, 3) == []
    assert not netns.exists(f"{PREFIX}w{NS}")
    assert "10.7.1.12/24" in inside(room, "ip", "addr", "show", "dev", "eth0")


def test_what_is_in_a_namespace_already_stays_as_it_is(lab: Lab, site: Site) -> None:
    name = f"{PREFIX}busy"
    room = netns.create(name)
    ip(
        name,
        "link add eth0 type veth peer name other",
        "address add 172.16.0.2/24 dev eth0",
        "link set eth0 up",
        "link set other up",
        "route add default via 172.16.0.1",
    )
    before = inside(room, "ip", "addr", "show", "dev", "eth0"), inside(room, "ip", "route", "show", "default")
    assert site.become(hung(lab, NS, Attach("netns", name)), 2) == []
    assert names(room) == {"lo", "eth0", "other", "p2"}
    assert before == (
        inside(room, "ip", "addr", "show", "dev", "eth0"),
        inside(room, "ip", "route", "show", "default"),
    )
    # Of the family that had none, there is one now.
    assert "default via fd07:1::1 dev p2" in inside(room, "ip", "-6", "route")
    inside(room, "ping", "-c", "1", "-W", "2", lab.address(FAR, 4))
    inside(room, "ping", "-6", "-c", "1", "-W", "2", lab.address(BEHIND, 6))
    site.restart()
    assert site.become(hung(lab, NS, Attach("netns", name)), 3) == []
    assert names(room) == {"lo", "eth0", "other", "p2"}
    assert site.agent.ports()[str(NS)]["inside"] == "p2"
    assert site.become(lab.world, 4) == []
    assert names(room) == {"lo", "eth0", "other"}
    netns.delete(name)


def test_a_namespace_that_is_not_there_is_waited_for(lab: Lab, site: Site) -> None:
    name = f"{PREFIX}late"
    later = hung(lab, NS, Attach("netns", name))
    assert site.become(later, 2) == [f"netns {name}: there is none: `ip netns add {name}` makes it"]
    assert site.agent.realised != 2
    assert names(lab.room(NS)) == {"lo"}, "what it hung on it hangs on no more"
    room = netns.create(name)
    assert site.become(later, 2) == []
    assert site.agent.realised == 2
    inside(room, "ping", "-c", "1", "-W", "2", lab.address(FAR, 4))
    # It goes, and comes again under the same name.
    netns.delete(name)
    assert len(site.become(later, 2)) == 1
    room = netns.create(name)
    assert site.become(later, 2) == []
    inside(room, "ping", "-c", "1", "-W", "2", lab.address(FAR, 4))
    netns.delete(name)
    [problem] = site.become(hung(lab, NS, Attach("netns", site.name)), 3)
    assert problem == f"netns {site.name}: is the machine's own: name another"


def test_a_tap_that_was_there_stays(lab: Lab, site: Site) -> None:
    ip(site.name, "tuntap add dev theirs mode tap", "link set theirs address 02:aa:aa:aa:aa:aa mtu 1300")
    theirs = hung(lab, NS, Attach("tap", "theirs"))
    assert site.become(theirs, 2) == []
    shown = inside(site.room, "ip", "-d", "link", "show", "theirs")
    for text in ("02:aa:aa:aa:aa:aa", "mtu 1300", "<NO-CARRIER,BROADCAST,MULTICAST,UP>"):
        assert text in shown
    assert "nestnet" not in shown
    index = int(shown.split(":")[0])
    site.restart()
    assert site.become(theirs, 3) == []
    assert netns.run_in(site.room, site.kernel.attached)[index] == "workload"
    # An agent that knows nothing of it lets it go, too: down, so that nobody talks to the machine by it.
    site.restart()
    assert site.become(lab.world, 4) == []
    assert index not in netns.run_in(site.room, site.kernel.attached)
    assert "UP" not in inside(site.room, "ip", "link", "show", "theirs").split(">")[0].split("<")[1].split(",")
    ip(site.name, "link del theirs")


def test_our_taps_come_and_go(lab: Lab, site: Site) -> None:
    assert "vm1" in names(site.room)
    assert site.become(hung(lab, VM, None), 2) == []
    assert "vm1" not in names(site.room)
    # Given to another port in the same change it stays, with whoever has it open.
    assert site.become(lab.world, 3) == []
    index = netns.run_in(site.room, partial(socket.if_nametoindex, "vm1"))
    swapped = hung(lab, VM, None).with_(replace(lab.world.ports[NS], attach=Attach("tap", "vm1")))
    assert site.become(swapped, 4) == []
    assert netns.run_in(site.room, partial(socket.if_nametoindex, "vm1")) == index
    assert site.agent.ports()[str(NS)]["tap"] == "vm1"
    assert site.become(lab.world, 5) == []


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (["link add odd type veth peer name odder"], "tap odd: is no tap device: name another"),
        (
            ["tuntap add dev odd mode tap", "link add odder type bridge", "link set odd master odder"],
            "tap odd: is part of a bridge: `ip link set odd nomaster` ends that",
        ),
        (["tuntap add dev odd mode tun"], "tap odd: is no tap device: name another"),
    ],
    ids=["veth", "bridged", "tun"],
)
def test_what_is_no_free_tap_is_left_alone(lab: Lab, site: Site, make: list[str], problem: str) -> None:
    ip(site.name, *make)
    try:
        assert site.become(hung(lab, NS, Attach("tap", "odd")), 2) == [problem]
        assert "odd" in names(site.room)
    finally:
        ip(site.name, "link del odd")
        if "odder" in names(site.room):
            ip(site.name, "link del odder")


def test_an_agent_without_a_prefix_makes_only_what_is_named(lab: Lab, site: Site) -> None:
    site.inquiries.close()
    site.inquiries = netns.run_in(site.room, partial(Inquiries, site.kernel, print))
    site.agent = netns.run_in(site.room, partial(Agent, 1, site.kernel, Workloads(None), site.inquiries, copies()))
    assert site.become(lab.world, 2) == []
    hanging = {port for port, said in site.agent.ports().items() if "interface" in said}
    assert hanging == {str(VM), str(NS), str(LONELY)}
    assert "p3" not in names(site.room)
    site.restart()


# ---- traffic


def channel(kind: socket.SocketKind, family: int) -> socket.socket:
    made = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
    made.settimeout(20)
    return made


def arrives(sender_room: Path, listener_room: Path, address: str) -> None:
    """BYTES of TCP, from one to the other, as they were sent."""
    family = 6 if ":" in address else 4
    data = random.Random(1).randbytes(BYTES)
    with (
        netns.run_in(listener_room, partial(channel, socket.SOCK_STREAM, family)) as listener,
        netns.run_in(sender_room, partial(channel, socket.SOCK_STREAM, family)) as sender,
    ):
        listener.bind((address, 0))
        listener.listen()
        sender.connect(listener.getsockname()[:2])
        receiver, _ = listener.accept()
        receiver.settimeout(20)

        def send() -> None:
            sender.sendall(data)
            sender.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        digest, length = hashlib.sha256(), 0
        with receiver:
            while got := receiver.recv(1 << 18):
                digest.update(got)
                length += len(got)
        thread.join()
    assert (length, digest.digest()) == (BYTES, hashlib.sha256(data).digest())


@pytest.fixture(scope="module", params=["offloads", "plain"])
def talker(lab: Lab, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest that has its addresses, with the offloads of a virtio card and without."""
    guest = lab.guest(VM, offloads=request.param == "offloads")
    client = Client(guest, tmp_path_factory.mktemp("client"))
    try:
        client.udhcpc()
        client.dhclient(6)
        until(lambda: "tentative" not in guest.run("ip", "-6", "addr", "show", "dev", "nic"), "still tentative")
        yield guest
    finally:
        guest.close()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("target", [NEAR, NS, FAR, BEHIND], ids=["near", "namespace", "far", "behind"])
def test_tcp_arrives_byte_for_byte(lab: Lab, talker: Guest, target: int, family: int) -> None:
    arrives(talker.room, lab.room(target), lab.address(target, family))
    arrives(lab.room(target), talker.room, lab.address(VM, family))


@pytest.mark.parametrize("family", [4, 6])
def test_the_mtu_is_what_it_says_and_fragments_are_put_together(lab: Lab, talker: Guest, family: int) -> None:
    header = 28 if family == 4 else 48
    for target in (NEAR, FAR, BEHIND):
        there = (f"-{family}", "-c", "1", "-W", "2", lab.address(target, family))
        talker.run("ping", "-M", "do", "-s", str(1430 - header), *there)
        talker.run("ping", "-s", "4000", *there)
