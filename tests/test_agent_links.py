"""Namespaces, links and attachments on the real kernel.

machine (NAME.m)         NAME.port.17
  p17  ---- veth ----      eth0
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_interface, ip_network
from pathlib import Path

import pytest

from nestnet.agent import links, netns
from nestnet.agent.attachments import Attachment, Workloads, wanted
from nestnet.model.bootstrap import Settings
from nestnet.model.values import Interface, Machine, Network, Port, Router, Segment, World

WORLD = World.of(
    [
        Machine(1, IPv4Address("192.0.2.1")),
        Machine(2, IPv4Address("192.0.2.2")),
        Network(10, mtu=1450),
        Segment(20, 10, 100, (IPv4Network("10.0.0.0/24"), IPv6Network("fd00::/64"))),
        Router(30, 10, 0x060000000001, (Interface(20, (IPv4Address("10.0.0.1"), IPv6Address("fd00::1"))),)),
        Port(40, 10, 20, 1, 0x020000000001, (IPv4Address("10.0.0.5"), IPv6Address("fd00::5")), hosts=True),
        Port(41, 10, 20, 2, 0x020000000002, (IPv4Address("10.0.0.6"),)),
        Network(11, carrier=10, mtu=1450),
        Segment(21, 11, 101, (IPv4Network("10.0.0.0/24"),)),
        Port(42, 11, 21, 40, 0x020000000001, (IPv4Address("10.0.0.5"),)),
    ]
)


def test_what_a_workload_gets_follows_from_the_world() -> None:
    assert sorted(wanted(WORLD, 1)) == [40, 42]
    assert wanted(WORLD, 1)[40] == Attachment(
        40,
        Settings(
            0x020000000001,
            1450,
            (ip_interface("10.0.0.5/24"), ip_interface("fd00::5/64")),
            (IPv4Address("10.0.0.1"), IPv6Address("fd00::1")),
            server=0x060000000001,
        ),
    )
    # No router, no default route; and none of a family that the port has no address of.
    assert wanted(WORLD, 1)[42].settings.gateways == ()
    assert wanted(WORLD, 2)[41].settings.gateways == (IPv4Address("10.0.0.1"),)


def test_what_moves_hangs_on_two_machines_and_sends_by_one() -> None:
    """With all that lives on it."""
    moves = replace(WORLD.ports[40], other=2)
    for world, sends in ((WORLD.with_(moves), 1), (WORLD.with_(replace(moves, host=2, other=1)), 2)):
        for port in (40, 42):
            found = {machine: wanted(world, machine)[port] for machine in (1, 2)}
            assert [found[machine].moves for machine in (1, 2)] == [True, True]
            assert [machine for machine in (1, 2) if not found[machine].elsewhere] == [sends]
        assert not wanted(world, 2)[41].moves


@pytest.mark.parametrize(("number", "name"), [(17, "p17"), (10**13, "p10000000000000"), (2**64 - 1, "p-3w5e11264sgsf")])
def test_names_of_interfaces_fit(number: int, name: str) -> None:
    assert links.short_name("p", number) == name
    assert len(name) <= links.IFNAMSIZ


@pytest.mark.parametrize(
    ("trunk", "tag", "name"),
    [
        ("eth0", 17, "eth0.17"),
        ("p123456789", 4094, "p123456789.4094"),
        ("p-1y2p0ij32e8e7", 4094, "p0ij32e8e7.4094"),
        ("p-1y2p0ij32e8e7", 1, "1y2p0ij32e8e7.1"),
    ],
)
def test_names_of_interfaces_for_tags_fit(trunk: str, tag: int, name: str) -> None:
    assert links.tag_name(trunk, tag) == name


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"nntest-{uuid.uuid4().hex[:8]}"
    yield name
    for left in netns.names(name):
        netns.kill_inside([netns.path(left)], grace=0)
        netns.delete(left)


@pytest.fixture
def machine(prefix: str) -> Path:
    return netns.create(f"{prefix}.m")


def inside(namespace: Path, *command: str) -> str:
    return netns.run_in(namespace, lambda: subprocess.check_output(command, text=True))


@pytest.mark.root
def test_a_namespace_is_one_that_iproute2_knows(prefix: str) -> None:
    path = netns.create(prefix)
    assert prefix in subprocess.check_output(["ip", "netns", "list"], text=True)
    assert netns.exists(prefix)
    assert netns.inode(path) != Path("/proc/self/ns/net").stat().st_ino
    assert "LOOPBACK" in inside(path, "ip", "link", "show", "lo")
    with pytest.raises(FileExistsError):
        netns.create(prefix)
    assert netns.delete(prefix)
    assert not netns.delete(prefix)
    assert prefix not in netns.names()


@pytest.mark.root
def test_work_inside_raises_outside_and_the_caller_stays(prefix: str) -> None:
    path = netns.create(prefix)
    before = Path("/proc/self/ns/net").stat().st_ino
    assert netns.run_in(
        path, lambda: Path(f"/proc/self/task/{threading.get_native_id()}/ns/net").stat().st_ino
    ) == netns.inode(path)
    assert Path("/proc/self/ns/net").stat().st_ino == before

    def fail() -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        netns.run_in(path, fail)
    with pytest.raises(FileNotFoundError):
        netns.run_in(netns.path(f"{prefix}-no"), fail)


@pytest.mark.root
def test_what_runs_inside_is_found_and_ended(prefix: str) -> None:
    path = netns.create(prefix)
    sleeper = netns.spawn(path, ["sleep", "600"])
    deaf = netns.spawn(path, ["sh", "-c", "trap '' TERM; echo; exec sleep 600"])
    found = netns.processes({netns.inode(path)})
    # The kernel may show the thread that started them for a moment after it has ended.
    assert [pid for pid in found if pid != os.getpid()] == sorted([sleeper.pid, deaf.pid])
    assert Path("/sys/fs/bpf").exists()
    assert netns.kill_inside([path], grace=0.3) == sorted([sleeper.pid, deaf.pid])
    assert sleeper.wait() == -15
    assert deaf.wait() in (-9, -15)
    assert set(netns.processes({netns.inode(path)})) <= {os.getpid()}


@pytest.mark.root
def test_an_attachment_is_what_the_port_says(prefix: str, machine: Path) -> None:
    workloads = Workloads(f"{prefix}.port.")
    want = wanted(WORLD, 1)
    ends, failed = netns.run_in(machine, lambda: workloads.prepare(want))
    assert not failed
    assert not ends[40].up  # closed until the datapath is there
    netns.run_in(machine, lambda: workloads.open(ends.values()))

    there = netns.path(f"{prefix}.port.40")
    shown = inside(there, "ip", "addr", "show", "dev", "eth0")
    assert "link/ether 02:00:00:00:00:01" in shown
    assert "mtu 1450" in shown
    for address in ("10.0.0.5/24", "fd00::5/64", "fe80::ff:fe00:1/64"):
        assert address in shown
    # The kernel takes the mark off in a moment of its own, though it asks nobody.
    deadline = time.monotonic() + 5
    while "tentative" in inside(there, "ip", "addr", "show", "dev", "eth0"):
        assert time.monotonic() < deadline
    shown = inside(there, "ip", "addr", "show", "dev", "eth0")
    assert "default via 10.0.0.1 dev eth0" in inside(there, "ip", "route")
    assert "default via fd00::1 dev eth0" in inside(there, "ip", "-6", "route")
    assert "inet" not in inside(machine, "ip", "addr", "show", "dev", "p40")

    # Again: nothing changes, not even for an agent that has just started.
    again, _ = netns.run_in(machine, lambda: Workloads(workloads.prefix).prepare(want))
    assert {port: end.index for port, end in again.items()} == {port: end.index for port, end in ends.items()}
    assert inside(there, "ip", "addr", "show", "dev", "eth0").split() == shown.split()


@pytest.mark.root
def test_a_change_is_made_in_place_and_what_is_not_wanted_goes(prefix: str, machine: Path) -> None:
    workloads = Workloads(f"{prefix}.port.")
    want = wanted(WORLD, 1)
    ends, _ = netns.run_in(machine, lambda: workloads.prepare(want))
    there = netns.path(f"{prefix}.port.40")
    told = replace(
        want[40].settings, mac=0x020000000099, mtu=1380, addresses=(ip_interface("10.0.0.9/24"),), gateways=()
    )
    changed = replace(want[40], settings=told)
    after, failed = netns.run_in(machine, lambda: workloads.prepare({40: changed}))
    assert not failed
    assert after[40].index == ends[40].index
    shown = inside(there, "ip", "addr", "show", "dev", "eth0")
    assert "02:00:00:00:00:99" in shown
    assert "mtu 1380" in shown
    assert "10.0.0.9/24" in shown
    assert "10.0.0.5" not in shown
    assert "fd00::5" not in shown
    assert "default" not in inside(there, "ip", "route")

    runs = netns.spawn(netns.path(f"{prefix}.port.42"), ["sleep", "600"])
    assert netns.run_in(machine, lambda: workloads.remove({40: changed})) == [42]
    assert runs.wait() == -15
    assert not netns.exists(f"{prefix}.port.42")
    assert sorted(netns.run_in(machine, workloads.actual)) == [40]


@pytest.mark.root
def test_what_is_more_than_can_be_heard_is_everything(prefix: str, machine: Path) -> None:
    """Who has root in a workload's namespace can make as much noise there as he likes."""
    workloads = Workloads(f"{prefix}.port.")
    want = wanted(WORLD, 1)

    def settle() -> None:
        while workloads.prepare(want)[0] is not workloads.prepare(want)[0]:
            pass
        workloads.repaired.clear()

    netns.run_in(machine, settle)
    noise = "address add 10.77.0.1/32 dev eth0\naddress del 10.77.0.1/32 dev eth0\n" * 5000
    subprocess.run(["ip", "-n", f"{prefix}.port.40", "-batch", "-"], input=noise, text=True, check=True)
    inside(netns.path(f"{prefix}.port.42"), "ip", "link", "set", "eth0", "mtu", "1400")
    assert netns.run_in(machine, workloads._monitor.take).everything  # type: ignore[union-attr]
    assert not netns.run_in(machine, workloads._monitor.take)  # type: ignore[union-attr]
    subprocess.run(["ip", "-n", f"{prefix}.port.40", "-batch", "-"], input=noise, text=True, check=True)
    netns.run_in(machine, lambda: workloads.prepare(want))
    assert workloads.repaired == [(42, "MTU of eth0 had changed")]


@pytest.mark.root
def test_a_port_that_moves_takes_its_namespace_along(prefix: str, machine: Path) -> None:
    other = netns.create(f"{prefix}.n")
    here, there = Workloads(f"{prefix}.port."), Workloads(f"{prefix}.port.")
    want = {40: wanted(WORLD, 1)[40]}
    netns.run_in(machine, lambda: here.prepare(want))
    runs = netns.spawn(netns.path(f"{prefix}.port.40"), ["sleep", "600"])
    _, failed = netns.run_in(other, lambda: there.prepare(want))
    assert not failed
    assert netns.run_in(machine, lambda: here.remove({})) == []
    assert sorted(netns.run_in(other, there.actual)) == [40]
    assert runs.poll() is None  # the workload moved with it


@pytest.mark.root
def test_who_knows_of_the_flip_later_takes_nothing_back(prefix: str, machine: Path) -> None:
    """Two machines of a lab look after one namespace while a port moves; each repairs what drifts, not the other."""
    other = netns.create(f"{prefix}.n")
    here, there = Workloads(f"{prefix}.port."), Workloads(f"{prefix}.port.")
    stays = wanted(WORLD, 1)[40]
    sends, hears = replace(stays, moves=True), replace(stays, moves=True, elsewhere=True)

    def turns(old: Attachment, new: Attachment) -> tuple[set[str], set[str]]:
        """The interfaces with the address and with the default route, after each has had two turns."""
        wants = {40: old}, {40: new}
        for at, workloads, want in ((other, there, wants[1]), (machine, here, wants[0])) * 2:
            _, failed = netns.run_in(at, lambda: workloads.prepare(want))  # noqa: B023
            assert not failed
        with_address = inside(netns.path(f"{prefix}.port.40"), "ip", "-o", "addr", "show", "to", "10.0.0.5")
        routes = inside(netns.path(f"{prefix}.port.40"), "ip", "route", "show", "default")
        return {line.split()[1] for line in with_address.splitlines()}, {
            line.split()[4] for line in routes.splitlines()
        }

    netns.run_in(machine, lambda: here.prepare({40: sends}))
    assert turns(sends, hears) == ({"eth0"}, {"eth0"})
    assert turns(sends, sends) == ({"n40"}, {"n40"}), "only the new one knows of the flip"
    inside(netns.path(f"{prefix}.port.40"), "ip", "addr", "del", "10.0.0.5/24", "dev", "n40")
    there.repaired.clear()
    assert turns(hears, sends) == ({"n40"}, {"n40"})
    assert there.repaired == [(40, "addresses of n40 had changed")]
    netns.run_in(machine, lambda: here.remove({}))
    netns.run_in(other, lambda: there.prepare({40: stays}))
    shown = inside(netns.path(f"{prefix}.port.40"), "ip", "addr")
    assert "192.0.0.8" not in shown
    assert "n40" not in shown
    assert there.told(40)["inside"] == "eth0"


@pytest.mark.root
def test_who_has_only_a_look_inside_is_not_ended_with_a_workload(prefix: str, machine: Path) -> None:
    """As the agent of the machine that a port moves to."""
    workloads = Workloads(f"{prefix}.port.")
    netns.run_in(machine, lambda: workloads.prepare({40: wanted(WORLD, 1)[40]}))
    inside = netns.path(f"{prefix}.port.40")
    look = "import sys, threading; from pathlib import Path; from nestnet.agent import netns\n"
    look += "def wait(): print('in', flush=True); threading.Event().wait()\n"
    look += "netns.run_in(Path(sys.argv[1]), wait)"
    with subprocess.Popen([sys.executable, "-c", look, str(inside)], stdout=subprocess.PIPE) as visitor:
        try:
            assert visitor.stdout is not None
            assert visitor.stdout.readline() == b"in\n"
            runs = netns.spawn(inside, ["sleep", "600"])
            assert netns.run_in(machine, lambda: workloads.remove({})) == [40]
            assert runs.wait(5) == -signal.SIGTERM
            assert visitor.poll() is None
        finally:
            visitor.kill()


@pytest.mark.root
def test_one_that_fails_does_not_stop_the_others(prefix: str, machine: Path) -> None:
    workloads = Workloads(f"{prefix}.port.")
    want = dict(wanted(WORLD, 1))
    want[40] = replace(want[40], settings=replace(want[40].settings, mtu=70000))
    ends, failed = netns.run_in(machine, lambda: workloads.prepare(want))
    assert list(ends) == [42]
    assert f"{prefix}.port.40" in failed[40]


@pytest.mark.root
def test_routes_of_others_stay(machine: Path) -> None:
    def work() -> None:
        with links.netlink() as ipr:
            bridge = links.make_bridge(ipr, "wire")
            assert links.make_bridge(ipr, "wire") == bridge
            links.set_addresses(ipr, bridge, [ip_interface("192.0.2.1/24")])
            assert links.set_routes(ipr, bridge, {ip_network("198.51.100.0/24"): None})
            assert not links.set_routes(ipr, bridge, {ip_network("198.51.100.0/24"): None})
            assert links.set_routes(ipr, bridge, {})
            assert not links.set_addresses(ipr, bridge, [ip_interface("192.0.2.1/24")])

    netns.run_in(machine, work)
    assert "192.0.2.0/24" in inside(machine, "ip", "route")


@pytest.mark.root
def test_links_go_together_and_may_be_gone() -> None:
    name = f"nnt-group-{os.getpid()}"
    netns.create(name)

    def work() -> None:
        with links.netlink() as ipr:
            for n in range(3):
                ipr.link("add", ifname=f"a{n}", kind="veth", peer={"ifname": f"b{n}"})
            found = links.links(ipr)
            # Both ends of a pair, one that is not there, and once more when nothing is.
            for _ in range(2):
                links.remove_all(ipr, [found["a0"].index, found["b0"].index, 9999, found["a1"].index])
                assert set(links.links(ipr)) == {"lo", "a2", "b2"}
            links.remove_all(ipr, [])

    try:
        netns.run_in(netns.path(name), work)
    finally:
        netns.delete(name)
