"""A virtual machine as a host: its own kernel carries a network at depth 2, and the lab's agents do not know better.

m1 -- tap -- the virtual machine, cloud/a -- vms/a       by a VXLAN device of a kernel that has none of our programs
m2 -- cloud/b, with an agent of the lab   -- vms/b, vms/c, vms/d
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from frames import ip_frame, udp
from test_encapsulated import Tower, ping, until
from test_inside import run
from test_lab import leftovers, nestnet
from vm import VM

from nestnet.agent import netns
from nestnet.model import packet as pk

pytestmark = pytest.mark.root
URL = "https://[fe80::1%eth0]:4795"
# The client imports these when it first speaks.
USED = """
from nestnet.api.client import Client, Unreachable
from nestnet.agent.credentials import _new_key
_new_key()
try: Client("http://127.0.0.1:1", patience=0).status()
except Unreachable: pass
"""
FIELDS = ["frame.protocols", "vxlan.vni", "ip.src", "ip.dst", "ip.ttl", "ip.flags.df"]
FIELDS += ["udp.srcport", "udp.dstport", "udp.checksum"]
MEGABYTES = 4
SEND = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
    for frame in sys.argv[1:]:
        out.sendto(bytes.fromhex(frame), ("eth0", 0))
"""
CLOUD: dict[str, Any] = {
    "segments": {"lan": {"cidr": "10.0.0.0/24"}},
    "ports": {
        "a": {"segment": "lan", "host": "m1", "hosts": True, "attach": {"tap": "vm"}},
        "b": {"segment": "lan", "host": "m2", "hosts": True},
    },
}


def manifest(policies: Sequence[dict[str, str]] = (), **ports: str) -> dict[str, Any]:
    """With ports of vms on these hosts."""
    vms = {
        "carriage": "encapsulated",
        "segments": {"lan": {"cidr": ["10.0.0.0/24", "fd00::/64"]}},
        "ports": {name: {"segment": "lan", "host": host} for name, host in ports.items()},
        "policies": list(policies),
    }
    cloud = CLOUD | ({"networks": {"vms": vms}} if ports else {})
    return {"apiVersion": "nestnet/v1", "machines": {"m1": {}, "m2": {}}, "networks": {"cloud": cloud}}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Tower]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    (tmp_path / "net.yaml").write_text(json.dumps(manifest()))
    try:
        nestnet("up", str(tmp_path / "net.yaml"), "--name", name)
        yield Tower(name)
    finally:
        nestnet("down", "--name", name)
    assert leftovers(name) == []


@pytest.fixture
def vm(lab: Tower, tmp_path: Path) -> Iterator[VM]:
    with lab.client() as client:
        mac = client.get("port", "cloud/a")["mac"]
    made = VM(netns.path(lab.lab.machine("m1")), "vm", mac, tmp_path, "kernel_host", USED, {"/send": SEND.encode()})
    try:
        yield made
    finally:
        made.close()
        print(made.log.read_text(errors="replace"))  # shown if the test fails


@pytest.mark.alone
def test_a_virtual_machine_is_a_host_at_depth_2(lab: Tower, vm: VM, tmp_path: Path) -> None:
    name = lab.lab.name
    with lab.client() as client:
        client.apply(manifest(a="a", b="b", c="b"))
        machine = client.get("port", "cloud/a")["id"]
        (cause,) = [one["cause"] for one in client.list("host", network="cloud") if one["name"] == "a"]
        assert cause == "the agent on cloud/a has never been there"
    token = nestnet("token", "join", "cloud/a", "--lab", name).stdout.decode().strip()
    vm.wait()

    # What it is told by its port
    vm.run("udhcpc -i eth0 -f -n -q -s /dhcp -O mtu")
    (link,) = json.loads(vm.run("ip -j address show eth0"))
    assert link["mtu"] == 1450
    assert [one["local"] for one in link["addr_info"] if one["family"] == "inet"] == ["10.0.0.2"]

    # It joins by the relay, hears its feed, and says that it has done so
    vm.run(f"echo {token} >/token")
    vm.run(f"$PYTHON -m kernel_host {machine} {URL} /token >/dev/ttyS0 2>&1 &")
    until(partial(realised, lab), "all, and the virtual machine")
    with lab.client() as client:
        assert {one["name"]: one["state"] for one in client.list("host", network="cloud")} == {"a": "up", "b": "up"}
        assert client.get("network", "cloud/vms")["state"] == "up"

    # Both ways, to the last byte, and nothing is lost
    lab = Tower(name)
    here, there = f"ip netns exec port-{lab.rows['cloud/vms/a']}", lab.place("cloud/vms/b")
    until(partial(ping, there, "10.0.0.2"), "a first one, for which neighbours are looked for below")
    options = ("-c", "20", "-i", "0.02", "-W", "2")
    for source, target in (("10.0.0.2", "10.0.0.3"), ("fd00::2", "fd00::3")):
        assert " 0% packet loss" in vm.run(f"{here} ping {' '.join(options)} {target}")
        assert " 0% packet loss" in run(there, "ping", *options, source)
    assert ping(there, "10.0.0.2", "-M", "do", "-s", "1372")
    assert " 0% packet loss" in vm.run(f"{here} ping -c 1 -W 2 -M do -s 1372 10.0.0.3")
    assert not ping(there, "10.0.0.2", "-M", "do", "-s", "1373")
    file(vm, here, there)

    # Root in there can send whatever it likes
    forged = [(4, 4, b"c"), (2, 4, b"c's address"), (4, 2, b"c's MAC"), (9, 2, b"nobody's MAC")]
    assert hears(lab, vm, here, there, (2, 2, b"first"), *forged, (2, 2, b"last")) == [b"first", b"last"]

    # On the wire VXLAN stands in VXLAN, whoever made it
    with lab.client() as client:
        vnis = {one["path"]: one["vni"] for one in client.list("segment")}
    both = wire(lab, tmp_path / "wire.pcap", partial(vm.run, f"{here} ping -c 1 -W 2 -s 600 10.0.0.3"))
    a, b = "192.0.2.1,10.0.0.2,10.0.0.2", "192.0.2.2,10.0.0.3,10.0.0.3"
    assert [(one["ip.src"], one["ip.dst"]) for one in both] == [(a, b), (b, a)]
    for one in both:
        assert one["frame.protocols"] == "eth:ethertype:ip:udp:vxlan:" * 2 + "eth:ethertype:ip:icmp:data"
        assert one["vxlan.vni"] == f"{vnis['cloud/lan']},{vnis['cloud/vms/lan']}"
        assert (one["udp.dstport"], one["udp.checksum"]) == ("4789,4789", "0x0000,0x0000")
        assert (one["ip.ttl"], one["ip.flags.df"][:4]) == ("64,64,64", "1,1,")
        assert all(int(port) >= 49152 for port in one["udp.srcport"].split(","))

    # A change: another port, and of what goes between them only ping may
    only_ping = [{"from": "inside", "to": "inside", "allow": "icmp"}]
    with lab.client() as client:
        client.apply(manifest(only_ping, a="a", b="b", c="b", d="b"))
    until(partial(realised, lab), "all have heard of it")
    assert " 0% packet loss" in vm.run(f"{here} ping -c 3 -i 0.1 -W 2 10.0.0.5")
    assert hears(lab, vm, here, there, (2, 2, b"not allowed")) == []


def realised(lab: Tower) -> bool:
    with lab.client() as client:
        status = client.status()
    return all((one["realised"] or 0) >= status["revision"] and not one["problems"] for one in status["machines"])


def file(vm: VM, here: str, there: Path) -> None:
    """One goes over TCP from the virtual machine, and comes back as it was."""
    listener = netns.run_in(there, partial(socket.create_server, ("10.0.0.3", 7000)))
    listener.settimeout(30)

    def answer() -> None:
        connection, _ = listener.accept()
        connection.settimeout(30)
        got = bytearray()
        with connection:
            while data := connection.recv(1 << 18):
                got.extend(data)
            connection.sendall(got)

    thread = threading.Thread(target=answer)
    thread.start()
    with listener:
        vm.run(f"dd if=/dev/urandom of=/tmp/one bs=1M count={MEGABYTES}")
        vm.run(f"{here} nc 10.0.0.3 7000 </tmp/one >/tmp/back")
        thread.join(60)
    vm.run("cmp /tmp/one /tmp/back")


def hears(lab: Tower, vm: VM, here: str, there: Path, *datagrams: tuple[int, int, bytes]) -> list[bytes]:
    """What b hears of UDP datagrams to it that the virtual machine sends, each with the MAC of one port, the address of
    another (2 is a, 4 is c; 9 is nobody) and a payload. A ping comes behind them, so that none is on its way."""
    with lab.client() as client:
        ports = {n: client.get("port", f"cloud/vms/{name}") for n, name in ((2, "a"), (3, "b"), (4, "c"))}
    macs = {n: int(port["mac"].replace(":", ""), 16) for n, port in ports.items()} | {9: 0x020000000099}

    def frame(mac: int, address: int, payload: bytes) -> str:
        flow = pk.mapped(IPv4Address(f"10.0.0.{address}")), pk.mapped(IPv4Address("10.0.0.3"))
        return ip_frame(macs[3], macs[mac], *flow, pk.UDP, udp(*flow, 1000, 9, payload)).hex()

    with netns.run_in(there, partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)) as ear:
        ear.bind(("10.0.0.3", 9))
        ear.setblocking(False)
        vm.run(f"{here} $PYTHON /send {' '.join(frame(*one) for one in datagrams)}")
        vm.run(f"{here} ping -c 1 -W 2 10.0.0.3")
        heard = []
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.append(ear.recv(64))
        return heard


def wire(lab: Tower, target: Path, ask: Callable[[], object]) -> list[dict[str, str]]:
    """What one ping and its answer are on m2's NIC, by tshark's fields."""
    command = ["tcpdump", "-i", "eth0", "-U", "-c", "2", "-w", str(target), "udp port 4789 and greater 500"]
    start = partial(subprocess.Popen, command, stderr=subprocess.PIPE)
    with netns.run_in(netns.path(lab.lab.machine("m2")), start) as watching:
        try:
            assert watching.stderr is not None
            assert any(b"listening" in line for line in watching.stderr)
            ask()
            watching.wait(10)
        finally:
            watching.kill()
    asked = [word for field in FIELDS for word in ("-e", field)]
    shown = ["tshark", "-r", str(target), "-T", "fields", *asked]
    told = subprocess.check_output(shown, text=True, stderr=subprocess.DEVNULL)
    return [dict(zip(FIELDS, line.split("\t"), strict=True)) for line in told.splitlines()]
