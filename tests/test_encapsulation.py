"""One frame of examples/vlan-vxlan-vlan.yaml on the wire, seen by tshark, as docs/encapsulation.md has it.

left --802.1Q 10--> m1 --802.1Q 100, IPv4, UDP, VXLAN, Ethernet, 802.1Q 10, ...--> m2 --802.1Q 10--> right
"""

from __future__ import annotations

import json
import subprocess
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from golden_files import ROOT, same
from test_lab import leftovers, nestnet
from test_tagged import captured, inside, ping

from nestnet.agent import netns
from nestnet.api.client import Client
from nestnet.bench.tags import AD, Q, behind
from nestnet.lab.down import down
from nestnet.lab.state import Lab, load

pytestmark = pytest.mark.root
PAGE = ROOT / "docs" / "encapsulation.md"
BEGIN, END = "<!-- frame -->\n", "<!-- /frame -->"
OUTER = 14 + 4 + 20 + 8 + 8  # Ethernet, 802.1Q, IPv4, UDP, VXLAN


class Bed:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.wire = netns.path(lab.wire)
        with Client(lab.controller) as client:
            rows = {port["name"]: port["row"] for port in client.list("port")}
        self.left, self.right = (netns.path(lab.workload(rows[name])) for name in ("left", "right"))

    def nic(self, machine: str) -> str:
        (found,) = json.loads(inside(netns.path(self.lab.machine(machine)), "ip", "-j", "link", "show", "eth0").stdout)
        return str(found["address"])


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    try:
        nestnet("up", str(ROOT / "examples" / "vlan-vxlan-vlan.yaml"), "--name", name)
        found = load(name)
        assert found is not None
        yield Bed(found)
    finally:
        down(name)
    assert leftovers(name) == []


def on_the_wire(bed: Bed, file: Path, *tags: tuple[int, int], size: int = 56) -> ElementTree.Element:
    """The frame on the wire, as tshark reads it, of a ping with these tags from left to right."""
    with behind(bed.left, *tags), behind(bed.right, *tags), captured(bed.wire, "m1", file, "-s", "0"):
        assert ping(bed.left, "10.0.0.3", "-M", "do", "-s", str(size)) == 0
    command = ["tshark", "-r", str(file), "-Y", "udp.dstport == 4789 and icmp.type == 8", "-T", "pdml"]
    (packet,) = ElementTree.fromstring(subprocess.check_output(command, stderr=subprocess.DEVNULL)).findall("packet")
    return packet


def layers(packet: ElementTree.Element) -> list[tuple[str, int, Callable[[str], str]]]:
    """Name, bytes, and a reader of fields, of each header."""

    def read(layer: ElementTree.Element, field: str) -> str:
        found = layer.find(f".//field[@name='{field}']")
        assert found is not None, f"tshark has no {field}"
        return found.get("show", "")

    found = packet.findall("proto")
    return [
        (layer.get("name", ""), int(layer.get("size", "0")), partial(read, layer))
        for layer in found
        if layer.get("name") not in ("geninfo", "frame", "data", "fake-field-wrapper")
    ]


def test_the_frame_of_the_manual(bed: Bed, tmp_path: Path) -> None:
    nics = {bed.nic(name): f"{name}'s NIC" for name in ("m1", "m2")}
    packet = on_the_wire(bed, tmp_path / "wire.pcap", (Q, 10))
    words: dict[str, Callable[[Callable[[str], str]], str]] = {
        "eth": lambda f: " to ".join(nics.get(f(f"eth.{end}"), f(f"eth.{end}")) for end in ("src", "dst")),
        "vlan": lambda f: f"id {f('vlan.id')}, priority {f('vlan.priority')}",
        "ip": lambda f: f"{f('ip.src')} to {f('ip.dst')}, TTL {f('ip.ttl')}, length {f('ip.len')}",
        "udp": lambda f: ", ".join(
            [
                f"{hashed(f('udp.srcport'))} to {f('udp.dstport')}",
                f"length {f('udp.length')}",
                f"checksum {f('udp.checksum')}",
            ]
        ),
        "vxlan": lambda f: f"VNI {f('vxlan.vni')}",
        "icmp": lambda _: "echo request, 56 bytes of data",
    }
    names = {"eth": "Ethernet", "vlan": "802.1Q", "ip": "IPv4", "udp": "UDP", "vxlan": "VXLAN", "icmp": "ICMP"}
    lines, at = ["| at | header | bytes | |", "|---|---|---|---|"], 0
    for name, size, field in layers(packet):
        size += 56 * (name == "icmp" and size == 8)
        lines.append(f"| {at} | {names[name]} | {size} | {words[name](field)} |")
        at += size
    assert at == length(packet), "every byte of the frame is of a header that was named"
    text = PAGE.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    table = "\n".join([*lines, f"\n{at} bytes in all, {OUTER} of them around the tenant's frame.\n"])
    same(PAGE, text[:begin] + table + text[end:], "NESTNET_GOLDEN=rewrite scripts/test -k encapsulation")


def hashed(port: str) -> str:
    assert 49152 <= int(port) <= 65535
    return "by the flow's hash"


def length(packet: ElementTree.Element) -> int:
    found = packet.find("proto[@name='geninfo']/field[@name='len']")
    assert found is not None
    return int(found.get("show", "0"))


@pytest.mark.parametrize("tags", [(), ((Q, 10),), ((AD, 7), (Q, 10))], ids=["none", "802.1q", "qinq"])
def test_lengths_add_up(bed: Bed, tags: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    """The largest packet: 1500 of IP on the wire, less 50 for VXLAN, less 8 for two tags, with as many as it has."""
    packet = on_the_wire(bed, tmp_path / "wire.pcap", *tags, size=1500 - 50 - 8 - 28)
    names = [name for name, _, _ in layers(packet)]
    inner = [{Q: "vlan", AD: "ieee8021ad"}[kind] for kind, _ in tags]
    assert names == ["eth", "vlan", "ip", "udp", "vxlan", "eth", *inner, "ip", "icmp"]
    assert length(packet) == OUTER + 14 + 4 * len(tags) + 1500 - 50 - 8
    assert ping(bed.left, "10.0.0.3", "-M", "do", "-s", str(1500 - 50 - 8 - 27)) != 0, "and one byte more does not pass"
