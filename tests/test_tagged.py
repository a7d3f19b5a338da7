"""Machines whose NICs are in a VLAN of the wire: every tag that a frame can come with, through the program and the
reference; and real agents in a lab, over IPv4 in 802.1Q and over IPv6 in 802.1ad, seen by tshark.

A lab's wire is a plain bridge, which knows nothing of tags: as a switch that is not ours, all its ports are trunks.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from frames import ip_frame, udp
from killing import stop
from strategies import across, tower
from test_api import client, controller
from test_lab import leftovers, nestnet
from test_mutants import Fault, mutant
from test_namespaces import packet_socket, pending
from test_underlay import until, workload
from twins import START, Teller, devices, recording, seen, told

from nestnet.agent import netns
from nestnet.api.client import Client
from nestnet.compile.tables import LAYOUT
from nestnet.datapath.kernel import Kernel
from nestnet.datapath.libbpf import TCX_EGRESS, Link, get, on_hook
from nestnet.datapath.reference import ToMachine
from nestnet.lab import state
from nestnet.lab.down import down
from nestnet.lab.state import Lab
from nestnet.model import packet as pk
from nestnet.model.clock import nanoseconds
from nestnet.model.errors import Invalid
from nestnet.model.manifest import Manifest, parse
from nestnet.model.reasons import NAMES
from nestnet.model.values import Machine, Tag
from nestnet.store.store import Store

__all__ = ["client", "controller"]
NAME = f"nnt-tagged-{os.getpid()}"
LEFT = 0xFFFFFFFF  # TC_ACT_NEXT: for the machine's own stack

# ---- the program, and the reference

WORDS = [
    ether_type << 16 | word
    for ether_type, word in product(pk.TAGS, (0, 0xE000, 17, 0xB000 | 17, 18, 4095))  # priority and DEI; id
]
STACKS = [(), *((one,) for one in WORDS), *product(WORDS, WORDS), (WORDS[2],) * 3]
LLDP = bytes.fromhex("0180c200000e") + pk.mac_bytes(0x02FFFFFFFF00) + b"\x88\xcc" + bytes(50)


def tagged(frame: bytes, *words: int) -> bytes:
    return frame[:12] + b"".join(word.to_bytes(4, "big") for word in words) + frame[12:]


@pytest.mark.root
@pytest.mark.parametrize("vlan", [None, Tag(17), Tag(17, "802.1ad")], ids=str)
def test_the_kernel_takes_off_the_same_tags(vlan: Tag | None) -> None:
    """Here all tags are in the bytes of the frame; in the lab the first is beside them."""
    counts = with_all_tags(vlan)
    assert all(counts.values()), counts


FAULTS = [
    Fault("whatever standard", "vlan.h", "(tag & ~0xf000) == vlan", "(tag & TAG_ID) == (vlan & TAG_ID)"),
    Fault("two tags", "vlan.h", "outermost(skb) ? drop(skb, 0, REASON_OTHER_VLAN) : IN_VLAN;", "IN_VLAN;"),
    Fault("none", "vlan.h", "\treturn drop(skb, 0, REASON_OTHER_VLAN);\n}", "\treturn IN_VLAN;\n}"),
    Fault("priority is another VLAN", "vlan.h", "if (tag & TAG_ID ||", "if (tag ||"),
]  # fmt: skip


@pytest.mark.root
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found(fault: Fault, tmp_path: Path) -> None:
    with mutant(fault, tmp_path) as object, pytest.raises(AssertionError, match=" with "):
        with_all_tags(Tag(17), object)


def with_all_tags(vlan: Tag | None, object: Path | None = None) -> dict[str, int]:
    """Frames with every stack of tags, through the kernel and the reference of a machine in this VLAN. Returns how many
    got in, were dropped, and were left to the machine."""
    world = tower(1)
    world = world.with_(*(replace(machine, vlan=vlan) for machine in world.machines.values()))
    inner = across(world, 1)
    counts = dict.fromkeys(("in", "dropped", "left"), 0)
    with devices(NAME) as found, recording(NAME, object, agents=2) as kernels:
        teller = Teller(found)
        for load in teller.become(world):
            kernels[load.machine].apply(load.actions)
            kernels[load.machine].set_clock(nanoseconds(START))
        (out,) = teller.references[1].workload(teller.device(1), inner, START).emitted
        assert isinstance(out, ToMachine)
        head = pk.mac_bytes(0x02FFFFFFFF02) + pk.mac_bytes(0x02FFFFFFFF01)
        datagram = head + b"\x08\x00" + out.datagram
        frames = {
            "VXLAN": datagram,
            "VXLAN of a stranger": datagram[:29] + bytes([datagram[29] ^ 0x40]) + datagram[30:],
            "VXLAN with a reserved bit": datagram[:42] + b"\x0c" + datagram[43:],
            "another protocol": datagram[:23] + b"\x84" + datagram[24:],
            "ARP": head + b"\x08\x06" + bytes(46),
            "LLDP": LLDP,
        }
        machine, kernel = teller.references[2], kernels[2]
        for stack, (name, frame) in product(STACKS, frames.items()):
            sent = tagged(frame, *stack)
            outputs, up = machine.nic(sent, START)
            got = kernel.run(sent, found[0], "underlay")
            what = f"{name} with {[hex(word) for word in stack]}"
            assert seen(got.emitted) == told(outputs), what
            assert (got.frame if got.answer & LEFT == LEFT else None) == up, what
            counts["in" if outputs.emitted else "dropped" if outputs.drops else "left"] += 1
            if outputs.emitted:
                assert [word & ~0xF000 for word in stack] == ([] if vlan is None else [vlan.label]), what
        for stack in STACKS:  # what leaves: a tag that the program adds is beside the bytes, so it is not seen here
            sent = tagged(inner, *stack)
            assert (machine.tag(sent) == sent) == (vlan is None or bool(stack))
            got = kernel.run(sent, found[0], "tag")
            assert (got.answer & LEFT, got.frame, got.emitted) == (LEFT, sent, ())
        assert machine.tag(LLDP) == LLDP
    return counts


# ---- what is known of it


def test_a_vlan_is_stored_told_to_its_machine_alone_and_taken_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db")
    store.join("m1", "192.0.2.1", vlan=Tag(17, "802.1ad"))
    store.join("m2", "192.0.2.2")

    def heard(machine: int) -> dict[int, Tag | None]:
        batch = store.snapshot_for(machine)
        return {value.id: value.vlan for _, _, value in batch.rows if isinstance(value, Machine)}

    def machines(**specs: Any) -> Manifest:
        return parse({"apiVersion": "nestnet/v1", "machines": specs})

    assert heard(1) == {1: Tag(17, "802.1ad"), 2: None}
    assert heard(2) == {1: None, 2: None}
    assert not store.plan(machines(m1={}, m2={})), "what is not said stays"
    plan = store.plan(machines(m1={"vlan": 4094}, m2={"vlan": {"id": 4094, "type": "802.1q"}}))
    assert [change.fields for change in plan.changes] == [
        {"vlan": [{"id": 17, "type": "802.1ad"}, 4094]},
        {"vlan": [None, 4094]},
    ]
    assert not [line for line in plan.disturbs if "different wires" in line]
    store.apply(machines(m1={"vlan": {}}))
    assert heard(1) == {1: None, 2: None}
    store.close()


def test_a_machine_is_declared_with_its_vlan(client: Client) -> None:
    made = client.join("m3", "192.0.2.3", vlan={"id": 17, "type": "802.1ad"})
    assert made["vlan"] == client.get("machine", "m3")["vlan"] == {"id": 17, "type": "802.1ad"}
    assert client.join("m3", "192.0.2.3", vlan={"id": 18})["vlan"] == {"id": 18, "type": "802.1q"}
    for id in (0, 4095):
        with pytest.raises(Invalid, match=f"id is {id}: must be 1 to 4094"):
            client.join("m3", "192.0.2.3", vlan={"id": id})
    assert client.get("machine", "m3")["vlan"]["id"] == 18
    assert client.join("m3", "192.0.2.3")["vlan"] is None


# ---- in a lab

FILE = """\
apiVersion: nestnet/v1
machines:
  m1: {{address: "{m1}", vlan: {vlan}}}
  m2: {{address: "{m2}", vlan: {vlan}}}
  m3: {{address: "{m3}"}}
networks:
  acme:
    tenant: acme
    segments: {{lan: {{cidr: 10.0.0.0/24}}}}
    ports:
      a: {{segment: lan, host: m1, address: 10.0.0.2}}
      b: {{segment: lan, host: m2, address: 10.0.0.3}}
      c: {{segment: lan, host: m3, address: 10.0.0.4}}
"""
KINDS = {
    "over-ipv4-802.1q": ("192.0.2.", Tag(17), "17"),
    "over-ipv6-802.1ad": ("2001:db8::", Tag(17, "802.1ad"), "{id: 17, type: 802.1ad}"),
}
BYTES = 8_000_003  # no multiple of any segment


@dataclass
class Site:
    lab: Lab
    file: Path
    vlan: Tag
    addresses: dict[str, str]

    @property
    def wire(self) -> Path:
        return netns.path(self.lab.wire)

    def machine(self, name: str) -> Path:
        return netns.path(self.lab.machine(name))

    def workload(self, name: str) -> Path:
        return workload(self.lab, f"acme/{name}")

    @property
    def family(self) -> int:
        return ip_address(self.addresses["m1"]).version

    @property
    def overhead(self) -> int:
        return 70 if self.family == 6 else 50


@pytest.fixture(scope="module", params=KINDS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    prefix, vlan, text = KINDS[request.param]
    name = f"t-{uuid.uuid4().hex[:8]}"
    addresses = {f"m{n}": f"{prefix}{n}" for n in (1, 2, 3)}
    file = tmp_path_factory.mktemp("tagged") / "net.yaml"
    file.write_text(FILE.format(vlan=text, **addresses))
    try:
        nestnet("up", str(file), "--name", name)
        found = state.load(name)
        assert found is not None
        yield Site(found, file, vlan, addresses)
    finally:
        down(name)
    assert leftovers(name) == []


def inside(place: Path, *command: str) -> subprocess.CompletedProcess[bytes]:
    return netns.run_in(place, partial(subprocess.run, command, capture_output=True, check=False))


def ping(place: Path, address: str, *options: str, wait: int = 2) -> int:
    return inside(place, "ping", "-n", "-c", "1", "-W", str(wait), *options, address).returncode


@contextmanager
def captured(place: Path, device: str, file: Path, *options: str) -> Iterator[None]:
    """All frames at a device, in a file of pcap, when this has ended."""
    command = ["tcpdump", "-i", device, "-U", "-Z", "root", "--immediate-mode", "-w", str(file), *options]
    with netns.run_in(place, partial(subprocess.Popen, command, stderr=subprocess.PIPE)) as running:
        assert running.stderr is not None
        assert any(b"listening" in line for line in running.stderr)
        yield
        # What it has not read yet is lost when it ends: the last frame is ours, and for nobody.
        last = uuid.uuid4().bytes
        with netns.run_in(place, partial(packet_socket, device)) as out:
            out.send(LLDP[:12] + b"\x88\xb5" + last + bytes(30))
        until(lambda: last in file.read_bytes())
        running.terminate()


def fields(file: Path, which: str, *names: str) -> list[list[str]]:
    options = [f"-e{name}" for name in names]
    command = ["tshark", "-r", str(file), "-Y", which, "-T", "fields", "-E", "separator=;", *options]
    shown = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    return [line.split(";") for line in shown.splitlines()]


@pytest.mark.root
def test_the_wire_has_ethernet_tag_ip_udp_vxlan_ethernet(site: Site, tmp_path: Path) -> None:
    here, file = site.workload("a"), tmp_path / "wire.pcap"
    assert ping(here, "10.0.0.3") == 0
    mtu = 1500 - site.overhead
    inside(here, "ip", "link", "set", "eth0", "mtu", "1500")  # so that what is too long gets as far as our program
    with captured(site.wire, "m1", file):
        assert ping(here, "10.0.0.3", "-M", "do", "-s", str(mtu - 28)) == 0
        assert ping(here, "10.0.0.3", "-M", "do", "-s", str(mtu - 27), wait=1) == 1
    inside(here, "ip", "link", "set", "eth0", "mtu", str(mtu))
    ip, tag = ("ipv6", "ieee8021ad") if site.family == 6 else ("ip", "vlan")
    asked = ("frame.protocols", f"{tag}.id", "frame.len", "udp.length")
    shown = fields(file, "udp.dstport == 4789 and frame.len > 1000", *asked)
    assert len(shown) == 2, "one that fits, its answer, and nothing of what does not"
    for protocols, number, length, udp_length in shown:
        assert protocols == f"eth:ethertype:{tag}:ethertype:{ip}:udp:vxlan:eth:ethertype:ip:icmp:data"
        assert number == "17"
        assert int(length) == 14 + 4 + 1500, "the tag is not in the MTU, and on the wire"
        assert int(udp_length) == 8 + 8 + 14 + mtu


@pytest.mark.root
def test_what_the_machine_itself_says_is_in_the_vlan_too(site: Site, tmp_path: Path) -> None:
    """ARP or ND, ping: to a machine in the VLAN, not to one in none. But LLDP is for the other end of the link."""
    file = tmp_path / "wire.pcap"
    m1, m2, m3 = (site.machine(name) for name in ("m1", "m2", "m3"))
    flush = ["ip", "neigh", "flush", "dev", "eth0"]
    with captured(site.wire, "m1", file):
        for place in (m1, m2, m3):
            inside(place, *flush)
        with netns.run_in(m1, partial(packet_socket, "eth0")) as out:
            out.send(LLDP)
        assert ping(m1, site.addresses["m2"]) == 0
        assert ping(m1, site.addresses["m3"], wait=1) == 1
        assert ping(m3, site.addresses["m2"], wait=1) == 1
    macs = [json.loads(inside(m, "ip", "-j", "link", "show", "eth0").stdout)[0]["address"] for m in (m1, m2, m3)]
    tag = "ieee8021ad" if site.family == 6 else "vlan"
    for mac in macs[:2]:
        said = fields(file, f"eth.src == {mac}", f"{tag}.id", "frame.protocols", "eth.dst")
        assert said
        assert all(number == "17" or to == "01:80:c2:00:00:0e" for number, _, to in said), said
    assert fields(file, "lldp", f"{tag}.id", "eth.dst") == [["", "01:80:c2:00:00:0e"]]
    assert all(not number for (number,) in fields(file, f"eth.src == {macs[2]}", f"{tag}.id"))


@pytest.mark.root
@pytest.mark.parametrize("offload", [True, False], ids=["nic-cuts-and-tags", "linux-cuts-and-tags"])
def test_a_stream_arrives_whole_and_large_packets_leave_whole(site: Site, offload: bool, tmp_path: Path) -> None:
    here, there, file = site.workload("a"), site.workload("b"), tmp_path / "wire.pcap"

    def set_nics(word: str) -> None:
        insert = "tx-vlan-stag-hw-insert" if site.family == 6 else "tx-vlan-hw-insert"
        for name in ("m1", "m2"):
            done = inside(site.machine(name), "ethtool", "-K", "eth0", insert, word, "tso", word, "gso", word)
            assert done.returncode == 0, done.stderr

    try:
        set_nics("on" if offload else "off")
        with captured(site.wire, "m1", file, "-s", "120"):
            transfer(here, there, "10.0.0.3")
    finally:
        set_nics("on")
    lengths = [int(length) for (length,) in fields(file, "udp.dstport == 4789", "frame.len")]
    assert max(lengths) > 9000 if offload else max(lengths) == 1518


def transfer(here: Path, there: Path, address: str) -> None:
    data = os.urandom(BYTES)
    got = hashlib.sha256()
    with netns.run_in(there, lambda: socket.create_server((address, 0))) as listener:
        listener.settimeout(20)
        port = listener.getsockname()[1]

        def read() -> None:
            with listener.accept()[0] as stream:
                while piece := stream.recv(1 << 20):
                    got.update(piece)

        reader = threading.Thread(target=read)
        reader.start()
        with netns.run_in(here, lambda: socket.create_connection((address, port), 20)) as stream:
            stream.sendall(data)
        reader.join(20)
    assert got.digest() == hashlib.sha256(data).digest()


@pytest.mark.root
def test_no_other_tags_get_in(site: Site) -> None:
    """Somebody on the wire, who knows all addresses, sends VXLAN as from m1 and plain UDP to m2, with every tag but the
    right one: neither the workload nor the machine hears it. The first tag comes beside the bytes, the next in them."""
    assert ping(site.workload("a"), "10.0.0.3") == 0, "there is a flow that is known, too"
    with Client(site.lab.controller) as client:
        ports = {port["name"]: port for port in client.list("port")}
        vni = int(client.get("segment", "acme/lan")["vni"])
    macs = {name: int(ports[name]["mac"].replace(":", ""), 16) for name in "ab"}
    first, second = (ip_address(site.addresses[name]) for name in ("m1", "m2"))
    link = json.loads(inside(site.machine("m2"), "ip", "-j", "link", "show", "eth0").stdout)[0]
    nic = bytes.fromhex(link["address"].replace(":", ""))
    ends = (pk.mapped(ip_address("10.0.0.2")), pk.mapped(ip_address("10.0.0.3")))
    right = site.vlan.label
    other = Tag(17, "802.1q" if site.family == 6 else "802.1ad").label
    wrong: list[Sequence[int]] = [(), (right & ~0xFFF,), (right & ~0xFFF | 0xE000,), (right + 1,), (other,)]
    wrong += [(right, right), (right, right + 1), (right, other), (right & ~0xFFF, right), (right + 1, right)]
    wrong += [(other, right), (right, right & ~0xFFF)]
    named = sum(not words or not words[0] & 0xFFF or words[0] == right for words in wrong)

    def vxlan(words: Sequence[int], canary: bytes) -> bytes:
        inner = ip_frame(macs["b"], macs["a"], *ends, pk.UDP, udp(*ends, 1000, 2000, canary))
        datagram = pk.encapsulate(inner, vni, first, second, 50000, 0)[pk.ETHERNET :]
        return framed(datagram, words)

    def framed(datagram: bytes, words: Sequence[int]) -> bytes:
        ether_type = b"\x86\xdd" if site.family == 6 else b"\x08\x00"
        return tagged(nic + pk.mac_bytes(0x02FFFFFFFF00) + ether_type + datagram, *words)

    def plain(words: Sequence[int], canary: bytes) -> bytes:
        outer = (pk.mapped(first), pk.mapped(second))
        return framed(ip_frame(0, 0, *outer, pk.UDP, udp(*outer, 1000, 9999, canary))[pk.ETHERNET :], words)

    def server() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if site.family == 6 else socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((str(second), 9999))
        made.settimeout(5)
        return made

    def drops() -> int:
        with netns.run_in(site.machine("m2"), lambda: Kernel.open(site.lab.pins / "m2", read_only=True)) as kernel:
            return sum(n for (_, reason), n in kernel.drops().items() if NAMES[reason] == "other_vlan")

    with (
        netns.run_in(site.wire, partial(packet_socket, "wire")) as intruder,
        netns.run_in(site.workload("b"), partial(packet_socket, "eth0")) as listener,
        netns.run_in(site.machine("m2"), server) as machine,
    ):
        before = drops()
        for words in wrong:
            intruder.send(vxlan(words, b"canary"))
            intruder.send(plain(words, b"canary"))
        for words in ((right,), (right | 0xB000,)):  # whatever its priority
            intruder.send(plain(words, b"in order"))
            assert machine.recv(100) == b"in order", "and nothing before it"
            intruder.send(vxlan(words, b"in order"))
        heard: list[bytes] = []
        until(lambda: heard.extend(pending(listener)) or sum(b"in order" in frame for frame in heard) == 2)
        assert not [frame.hex() for frame in heard if b"canary" in frame]
        assert drops() - before == 2 * named
    assert ping(site.workload("a"), "10.0.0.4", wait=1) == 1, "m3 is in no VLAN"


def hooks(site: Site, name: str) -> list[str]:
    return netns.run_in(site.machine(name), lambda: on_hook(socket.if_nametoindex("eth0"), TCX_EGRESS))


@pytest.mark.root
@pytest.mark.parametrize("site", ["over-ipv4-802.1q"], indirect=True)
def test_a_program_that_was_taken_off_is_told_of_and_put_back(site: Site) -> None:
    (agent,) = (process for process in site.lab.processes if process.name == "agent-m1")
    index = netns.run_in(site.machine("m1"), lambda: socket.if_nametoindex("eth0"))
    stop(agent.pid)
    try:
        with closing(Link(get(site.lab.pins / "m1" / f"v{LAYOUT}" / f"link_{index}_out"))) as link:
            link.detach()
        told = nestnet("doctor", "--lab", site.lab.name, code=1).stdout.decode()
        assert "machine m1: eth0 has underlay 1 times, not underlay and tag once" in told
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    until(lambda: hooks(site, "m1") == ["tag"])
    until(lambda: b"eth0: its program had been taken off" in nestnet("events", "--lab", site.lab.name).stdout)
    until(lambda: ping(site.workload("a"), "10.0.0.3") == 0)


@pytest.mark.root
@pytest.mark.parametrize("site", ["over-ipv4-802.1q"], indirect=True)
def test_a_machine_changes_its_vlan_and_loses_it(site: Site, tmp_path: Path) -> None:
    """Last: it leaves the lab without VLANs."""
    text = site.file.read_text()
    (old,) = {line.split("vlan: ")[1].removesuffix("}") for line in text.splitlines() if "vlan" in line}

    def become(first: str, second: str) -> str:
        lines = text.replace(f"vlan: {old}", f"vlan: {first}", 1).replace(f"vlan: {old}", f"vlan: {second}", 1)
        file = tmp_path / "net.yaml"
        file.write_text(lines)
        plan = nestnet("plan", str(file), "--lab", site.lab.name).stdout.decode()
        nestnet("apply", str(file), "--lab", site.lab.name)
        return plan

    plan = become("18", "18")
    assert f"machine m1: VLAN {site.vlan} becomes VLAN 18, all that its NICs send and hear is in that then" in plan
    assert "machines are on different wires: m1 in VLAN 18, m3 in no VLAN; they hear each other if" in plan
    until(lambda: ping(site.workload("a"), "10.0.0.3") == 0)
    become("19", "18")
    assert ping(site.workload("a"), "10.0.0.3", wait=1) == 1
    become("{}", "{}")
    for name in ("b", "c"):
        until(lambda name=name: ping(site.workload("a"), {"b": "10.0.0.3", "c": "10.0.0.4"}[name]) == 0)  # type: ignore[misc]
    assert hooks(site, "m1") == hooks(site, "m2") == []
    with Client(site.lab.controller) as client:
        assert [machine["vlan"] for machine in client.list("machine")] == [None] * 3


def test_a_lab_has_no_router_with_tags(tmp_path: Path) -> None:
    file = tmp_path / "net.yaml"
    file.write_text("apiVersion: nestnet/v1\nmachines: {m1: {vlan: 17}, m2: {nic: [eth0, eth1]}}\n")
    told = nestnet("up", str(file), "--name", f"t-{uuid.uuid4().hex[:8]}", code=1).stderr.decode()
    assert "net.yaml:2:17: not_supported: machines with several interfaces are behind the router of a lab" in told
