"""Networks carried by networks: in nestnet, and as one would build them by hand.

    ours     a tower of 16 networks, one carried by the other, on two machines; the same ports a and b at each level

        level 16   a, b      hosts: a and b of level 15
        ...
        level 1    a, b      hosts: m1 and m2                  one encapsulation on the wire, at any level

             or, with `encapsulated`, an agent in the namespace of each host: as many encapsulations as levels. The
             machines' MTU is 9000 then, and each level has 50 bytes less

    by_hand  the same shape of kernel VXLAN devices. At each level two namespaces, each with a veth into the one below,
             where a bridge joins it to a point-to-point VXLAN device

        level 2   eth0                                eth0
                   | veth                              |
        level 1   bridge -- vxlan0       vxlan0 -- bridge
                  eth0 ----------|       |-------- eth0
                   | veth        :       :             |
        machine   bridge -- vxlan0       vxlan0 -- bridge
                  eth0 ----------|- wire |-------- eth0

    stacked  kernel VXLAN devices on kernel VXLAN devices, all in one namespace of a machine, a bridge on the last

        workload -- bridge -- vxlan3 -- vxlan2 -- vxlan1 -- eth0      three encapsulations on the wire

A kernel of 2026 drops packets at the fourth device of one namespace (IP_TUNNEL_RECURSION_LIMIT): 3 is as deep as it
goes. With a namespace a level each veth starts anew, and there is no such limit.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from nestnet.agent import netns
from nestnet.bench.beds import MTU, NESTNET, PREFIX, cleaned, ip, machines, namespaces, plug, run, unfiltered
from nestnet.bench.traffic import Bed, Place

LAB = "nnbench-tower"
DEEP_LAB = "nnbench-stacked"  # where every level is encapsulated
STACKABLE = 3
HAND = f"{PREFIX}hand-"  # begins the names of namespaces of the tower that is made by hand
OVERHEAD = 50
JUMBO = 9000  # of the wire where every level takes its 50 bytes
PATIENCE = 240  # seconds for a lab to come up


def tower(depth: int, encapsulated: bool = False, foreign: Collection[int] = (1,)) -> dict[str, Any]:
    """The network file, as data. Beside the network of each level in `foreign` is one more, with a port `x` that has
    b's address and host."""
    networks: dict[str, Any] = {}
    inner = networks
    for level in range(1, depth + 1):
        hosts = ("m1", "m2") if level == 1 else ("a", "b")
        ports = {
            name: {"segment": "lan", "host": host, "hosts": True, "address": f"10.7.0.{number}"}
            for name, host, number in zip(("a", "b"), hosts, (2, 3), strict=True)
        }
        network: dict[str, Any] = {"segments": {"lan": {"cidr": "10.7.0.0/24"}}, "ports": ports}
        if encapsulated and level > 1:
            network["carriage"] = "encapsulated"
        if level in foreign:
            inner["foreign"] = {**network, "ports": {"x": ports["b"]}}
        inner["t"] = {**network, "networks": {}}
        inner = inner["t"]["networks"]
    machine = {"mtu": JUMBO} if encapsulated else {}
    return {"apiVersion": "nestnet/v1", "machines": {"m1": machine, "m2": machine}, "networks": networks}


@contextlib.contextmanager
def ours(depths: Sequence[int], encapsulated: bool = False) -> Iterator[dict[int, Bed]]:
    """A bed for each of these levels, all in one lab."""
    lab = DEEP_LAB if encapsulated else LAB
    foreign = depths if encapsulated else depths[:1]
    run(*NESTNET, "down", "--name", lab)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tower.yaml")
        file.write_text(json.dumps(tower(max(depths), encapsulated, foreign)))
        try:
            run(*NESTNET, "up", str(file), "--name", lab, "--timeout", str(PATIENCE))
            unfiltered(f"nn-{lab}")
            inside, beds = namespaces(lab), {}
            for depth in depths:
                path = "t/" * depth
                ends = [Place(inside[f"{path}{n}"], f"10.7.0.{i}") for n, i in (("a", 2), ("b", 3))]
                silent = depth if depth in foreign else foreign[0]
                beds[depth] = Bed(ends[0], ends[1], inside["t/" * (silent - 1) + "foreign/x"])
            yield beds
        finally:
            run(*NESTNET, "down", "--name", lab)


@contextlib.contextmanager
def by_hand(depths: Sequence[int]) -> Iterator[dict[int, Bed]]:
    """A bed for each of these levels, all in one tower of kernel VXLAN devices, one namespace a level."""
    prefix = HAND
    with cleaned(prefix):
        below = (f"{prefix}m1", f"{prefix}m2")
        machines(f"{prefix}wire", below, JUMBO)
        addresses = ("192.0.2.1", "192.0.2.2")
        beds = {}
        for level in range(1, max(depths) + 1):
            above = (f"{prefix}a{level}", f"{prefix}b{level}")
            mtu = JUMBO - OVERHEAD * level
            # A subnet for each level: a namespace answers ARP for its own addresses on its bridge, too.
            inside = (f"10.7.{level}.2", f"10.7.{level}.3")
            for side in (0, 1):
                ends = ("local", addresses[side], "remote", addresses[1 - side], "dev", "eth0")
                kind = ("type", "vxlan", "id", str(100 + level), "dstport", "4789", "noudpcsum")
                ip("-n", below[side], "link", "add", "br0", "mtu", str(mtu), "type", "bridge")
                ip("-n", below[side], "link", "add", "vxlan0", "mtu", str(mtu), *kind, *ends)
                ip("-n", below[side], "link", "set", "vxlan0", "master", "br0", "up")
                ip("-n", below[side], "link", "set", "br0", "up")
                netns.create(above[side])
                plug(above[side], below[side], "br0", "workload", mtu, inside[side])
            if level in depths:
                client, server = (Place(netns.path(above[side]), inside[side]) for side in (0, 1))
                beds[level] = Bed(client, server, None)
            below, addresses = above, inside
        unfiltered(prefix)
        yield beds


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
