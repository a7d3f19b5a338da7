"""What depth costs: levels 1 to 16 of a tower of networks, beside stacked VXLAN devices; and routers on the way."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nestnet.agent import netns
from nestnet.bench.beds import LAB as OURS
from nestnet.bench.beds import NESTNET, namespaces, run, unfiltered
from nestnet.bench.towers import LAB, STACKABLE, ours, stacked
from nestnet.bench.traffic import Bed, Place

DEPTHS = (1, 2, 4, 8, 16)
PAYLOAD = 1000  # bytes of the datagram by which headers are counted


def overhead(bed: Bed, wire: Path) -> int:
    """Bytes on the wire that are neither the datagram nor its own UDP, IP and Ethernet headers (42)."""

    def watch() -> socket.socket:
        watcher = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        watcher.bind(("m1", 3))
        watcher.settimeout(5)
        return watcher

    with netns.run_in(wire, watch) as watcher:
        nonce = os.urandom(PAYLOAD)
        with netns.run_in(bed.client.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            sender.sendto(nonce, (bed.server.address, 9))
        while True:
            frame = watcher.recv(65536)
            if nonce in frame:
                return len(frame) - PAYLOAD - 42


@contextlib.contextmanager
def levels() -> Iterator[dict[str, Bed]]:
    """The levels of our tower, and as many VXLAN devices on each other as Linux allows. RuntimeError if our levels have
    not all the same number of bytes around a frame."""
    with contextlib.ExitStack() as stack:
        beds = {f"level {depth}": bed for depth, bed in stack.enter_context(ours(DEPTHS)).items()}
        headers = {name: overhead(bed, netns.path(f"nn-{LAB}")) for name, bed in beds.items()}
        if len(set(headers.values())) > 1:
            raise RuntimeError(f"header bytes differ by level: {headers}")
        for depth in range(1, STACKABLE + 1):
            beds[f"{depth} VXLAN devices"] = stack.enter_context(stacked(depth))
        yield beds


HOPS = (1, 2, 4, 8, 16)


def chain() -> dict[str, Any]:
    """The network file: a is behind the first router of a chain, and behind some others is a port each.

    a - r1 - r2 - r3 - r4 ... r16
         |    |         |      |
         b1   b2        b4     b16
    """
    routers = {f"r{n}": {"segments": [f"s{n}"] if n in HOPS else []} for n in range(1, max(HOPS) + 1)}
    routers["r1"]["segments"].append("home")
    segments = {"home": {"cidr": "10.7.0.0/24"}} | {f"s{n}": {"cidr": f"10.7.{n}.0/24"} for n in HOPS}
    ports = {"a": {"segment": "home", "host": "m1", "address": "10.7.0.2"}} | {
        f"b{n}": {"segment": f"s{n}", "host": "m2", "address": f"10.7.{n}.2"} for n in HOPS
    }
    links = {f"l{n}": {"between": [f"r{n}", f"r{n + 1}"]} for n in range(1, max(HOPS))}
    network = {"segments": segments, "routers": routers, "links": links, "ports": ports}
    return {"apiVersion": "nestnet/v1", "machines": {"m1": {}, "m2": {}}, "networks": {"chain": network}}


@contextlib.contextmanager
def hops() -> Iterator[dict[str, Bed]]:
    """From one port to others, behind more and more routers of one network."""
    lab = f"{OURS}hops"
    run(*NESTNET, "down", "--name", lab)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "chain.yaml")
        file.write_text(json.dumps(chain()))
        try:
            run(*NESTNET, "up", str(file), "--name", lab)
            unfiltered(f"nn-{lab}")
            inside = namespaces(lab)
            near = Place(inside["chain/a"], "10.7.0.2")
            yield {said(n): Bed(near, Place(inside[f"chain/b{n}"], f"10.7.{n}.2"), None) for n in HOPS}
        finally:
            run(*NESTNET, "down", "--name", lab)


def said(hops: int) -> str:
    return f"{hops} router{'s' if hops > 1 else ''}"
