"""Beds in maps that many networks fill: each with a segment and two ports, one on either machine.

The lab's own two networks are realised by its agents. Then the agents are ended, as they would take out again what no
controller has told them of, and the rows of all others are written from numpy. What the datapath has it keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from nestnet.bench.beds import LAB, ours
from nestnet.bench.traffic import Bed
from nestnet.compile.diff import Put
from nestnet.compile.tables import TABLES
from nestnet.datapath.kernel import Capacity, Kernel
from nestnet.lab import state
from nestnet.lab.down import end

SIZES = (1, 1_000, 100_000, 1_000_000)
FIRST = 1000  # slot: what the lab has itself comes before
FLOWS = 4_000_000  # nobody sweeps them, nor gives back what of its share a port has used
ENABLED, LOCAL = 1, 2
PORT = 1  # kind of an owner


def room(networks: int) -> Capacity:
    n = networks + FIRST
    return Capacity(networks=n, segments=n, ports=2 * n, addresses=2 * n, members=2 * n, flows=FLOWS, connections=FLOWS)


def rows(name: str, count: int) -> npt.NDArray[np.void]:
    return np.zeros(count, TABLES[name].row)


def strangers(networks: int, machine: int) -> list[Put]:
    """The rows of so many networks, as machine 1 or 2 has them."""
    n = np.arange(networks, dtype=np.uint32)
    slots = FIRST + n
    near, far = FIRST + 2 * n + machine - 1, FIRST + 2 * n + 2 - machine  # slots of ports, here and on the other one
    network, segment, port = rows("network", networks), rows("segment", networks), rows("port", 2 * networks)
    network["key"] = slots
    network["value"]["id"] = slots
    network["value"]["flags"], network["value"]["mtu"], network["value"]["underlay"] = ENABLED, 1450, 4
    segment["key"] = slots
    for field in ("id", "network"):
        segment["value"][field] = slots
    segment["value"]["vni"] = vnis = 0x800000 + n
    port["key"] = np.concatenate([near, far])
    value = port["value"]
    value["id"] = port["key"]
    value["network"] = value["segment"] = np.tile(slots, 2)
    value["flags"] = np.repeat([ENABLED | LOCAL, ENABLED], networks)
    value["share"] = 1000
    value["ifindex"][:networks] = 0x10000000 + n
    numbers = port["key"].astype(">u4")
    value["mac"] = np.concatenate(
        [np.full((2 * networks, 1), 2, np.uint8), np.zeros((2 * networks, 1), np.uint8),
         numbers.view(np.uint8).reshape(-1, 4)], axis=1,
    )  # fmt: skip
    address = np.zeros((2 * networks, 16), np.uint8)
    address[:, 10:12] = 0xFF
    address[:, 12:] = (numbers.astype(np.uint32) % 250 + 2 + (10 << 24)).astype(">u4").view(np.uint8).reshape(-1, 4)
    value["address4"] = address
    attach, vni = rows("attach", networks), rows("vni", networks)
    attach["key"]["ifindex"], attach["value"]["port"] = value["ifindex"][:networks], near
    vni["key"]["vni"], vni["value"]["segment"] = vnis, slots
    mac, owner = rows("mac", 2 * networks), rows("owner", 2 * networks)
    mac["key"]["segment"], mac["key"]["mac"] = value["segment"], value["mac"]
    owner["key"]["prefixlen"], owner["key"]["segment"], owner["key"]["address"] = 160, value["segment"], address
    for table in (mac, owner):
        table["value"]["kind"], table["value"]["slot"] = PORT, port["key"]
    made = {
        "network": network,
        "segment": segment,
        "port": port,
        "attach": attach,
        "vni": vni,
        "mac": mac,
        "owner": owner,
    }
    return [Put(name, table) for name, table in made.items()]


@contextlib.contextmanager
def crowd(networks: int) -> Iterator[Bed]:
    """A lab of our own, in whose machines' maps are so many networks, itself among them."""
    which = f"of{networks}"
    lab = state.Lab(f"{LAB}{which}")

    def prepare() -> None:
        for machine in ("m1", "m2"):
            Kernel.open(lab.pins / machine, room(networks)).close()

    with ours(which, prepare=prepare) as bed:
        found = state.load(lab.name)
        assert found is not None
        end([process for process in found.processes if process.name != "controller"])
        for number, machine in enumerate(("m1", "m2"), 1):
            with Kernel.open(lab.pins / machine) as kernel:
                own = kernel.read()["port"]
                own["value"]["share"] = FLOWS
                kernel.apply([Put("port", own)])
                kernel.apply(strangers(networks - 1, number))
        yield bed


@contextlib.contextmanager
def crowds() -> Iterator[dict[str, Bed]]:
    with contextlib.ExitStack() as stack:
        yield {said(networks): stack.enter_context(crowd(networks)) for networks in SIZES}


def said(networks: int) -> str:
    return f"{networks:,} network{'s' if networks > 1 else ''}"
