"""Networks carried by networks: in nestnet, and as one would build them by hand.

    ours     a tower of 16 networks, one carried by the other, on two machines; the same ports a and b at each level

        level 16   a, b      hosts: a and b of level 15
        ...
        level 1    a, b      hosts: m1 and m2                  one encapsulation on the wire, at any level

    stacked  kernel VXLAN devices on kernel VXLAN devices, all in one namespace of a machine, a bridge on the last

        workload -- bridge -- vxlan3 -- vxlan2 -- vxlan1 -- eth0      three encapsulations on the wire

A kernel of 2026 drops packets at the fourth device of one namespace (IP_TUNNEL_RECURSION_LIMIT): 3 is as deep as it
goes.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.beds import MTU, NESTNET, PREFIX, cleaned, ip, machines, namespace_of, plug, run, unfiltered
from bench.traffic import Bed, Place
from nestnet.agent import netns

LAB = "nnbench-tower"
STACKABLE = 3
OVERHEAD = 50


def tower(depth: int) -> dict[str, Any]:
    """The network file, as data."""
    networks: dict[str, Any] = {}
    inner = networks
    for level in range(1, depth + 1):
        hosts = ("m1", "m2") if level == 1 else ("a", "b")
        ports = {
            name: {"segment": "lan", "host": host, "hosts": True, "address": f"10.7.0.{number}"}
            for name, host, number in zip(("a", "b"), hosts, (2, 3), strict=True)
        }
        inner["t"] = {"segments": {"lan": {"cidr": "10.7.0.0/24"}}, "ports": ports, "networks": {}}
        inner = inner["t"]["networks"]
    foreign = {"segments": {"lan": {"cidr": "10.7.0.0/24"}}, "ports": {"x": {**ports["b"], "host": "m2"}}}
    return {
        "apiVersion": "nestnet/v1",
        "machines": {"m1": {}, "m2": {}},
        "networks": {**networks, "foreign": foreign},
    }


@contextlib.contextmanager
def ours(depths: Sequence[int]) -> Iterator[dict[int, Bed]]:
    """A bed for each of these levels, all in one lab."""
    run(*NESTNET, "down", "--name", LAB)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tower.yaml")
        file.write_text(json.dumps(tower(max(depths))))
        try:
            run(*NESTNET, "up", str(file), "--name", LAB)
            unfiltered(f"nn-{LAB}")
            foreign = namespace_of(LAB, "foreign/x")
            beds = {}
            for depth in depths:
                path = "/".join(["t"] * depth)
                ends = [Place(namespace_of(LAB, f"{path}/{n}"), f"10.7.0.{i}") for n, i in (("a", 2), ("b", 3))]
                beds[depth] = Bed(ends[0], ends[1], foreign)
            yield beds
        finally:
            run(*NESTNET, "down", "--name", LAB)


@contextlib.contextmanager
def stacked(depth: int) -> Iterator[Bed]:
    """So many kernel VXLAN devices on each other. The MTU inside is what is left."""
    prefix = f"{PREFIX}stack{depth}-"
    with cleaned(prefix):
        names = (prefix + "m1", prefix + "m2")
        machines(prefix + "wire", names, 1500)
        mtu = MTU + OVERHEAD - OVERHEAD * depth
        for number, name in enumerate(names, 1):
            below, subnet = "eth0", "192.0.2"
            for level in range(1, depth + 1):
                vxlan = f"vxlan{level}"
                ends = ("local", f"{subnet}.{number}", "remote", f"{subnet}.{3 - number}", "dev", below)
                kind = ("type", "vxlan", "id", str(100 + level), "dstport", "4789", "noudpcsum")
                ip("-n", name, "link", "add", vxlan, "mtu", str(MTU + OVERHEAD - OVERHEAD * level), *kind, *ends)
                ip("-n", name, "link", "set", vxlan, "up")
                below, subnet = vxlan, f"10.99.{level}"
                if level < depth:
                    ip("-n", name, "address", "add", f"{subnet}.{number}/24", "dev", vxlan)
            ip("-n", name, "link", "add", "br0", "mtu", str(mtu), "type", "bridge")
            ip("-n", name, "link", "set", below, "master", "br0")
            ip("-n", name, "link", "set", "br0", "up")
        for workload, machine, address in (("a", names[0], "10.7.0.2"), ("b", names[1], "10.7.0.3")):
            netns.create(prefix + workload)
            plug(prefix + workload, machine, "br0", workload, mtu, address)
        unfiltered(prefix)
        yield Bed(Place(netns.path(prefix + "a"), "10.7.0.2"), Place(netns.path(prefix + "b"), "10.7.0.3"), None)
