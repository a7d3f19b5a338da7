"""Neighbours: other tenants' networks on the same two machines, idle or flooding.

    machine 1                                     machine 2
    a    of network bench                         b          what is measured, on the last CPU
    f    of network n1, at most 10 Mbit/s         g
    f    of network n2, at most 10 Mbit/s         g          what floods, on the first
    ...

Half of a flood are datagrams to g, each of a new flow; half are bytes at random, Ethernet header and all. It is on
while a window of the flooded bed is open, and off in all others.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from nestnet.agent import netns
from nestnet.bench.beds import LAB, NESTNET, OPENERS, PREFIX, bridged, file, namespaces, run, unfiltered
from nestnet.bench.beds import peer as by_hand
from nestnet.bench.traffic import Bed, Place, stay_on

RATE = 10_000_000  # bit/s of each neighbour
SIZES = (1, 30, 300)
BY_HAND = 30  # as many neighbours has the peer
PATIENCE = 300  # seconds for a lab to come up
HERE, THERE = "10.7.0.2", "10.7.0.3"


def crowd(neighbours: int) -> str:
    """The network file."""
    document = json.loads(file())
    for number in range(1, neighbours + 1):
        document["networks"][f"n{number}"] = {
            "segments": {"lan": {"cidr": "10.7.0.0/24"}},
            "ports": {
                "f": {"segment": "lan", "host": "m1", "address": HERE, "rate": RATE},
                "g": {"segment": "lan", "host": "m2", "address": THERE},
            },
        }
    return json.dumps(document)


def sockets(place: Path) -> tuple[socket.socket, socket.socket]:
    """One for datagrams, one for any bytes."""

    def both() -> tuple[socket.socket, socket.socket]:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        raw.bind(("eth0", 0))
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM), raw

    datagrams, raw = netns.run_in(place, both)
    for each in (datagrams, raw):
        each.setblocking(False)
    return datagrams, raw


def send(pairs: Sequence[tuple[socket.socket, socket.socket]]) -> None:
    """Never ends."""
    rng = random.Random(1)
    noise = [rng.randbytes(60) for _ in range(4096)]
    number = 0
    while True:
        for datagrams, raw in pairs:
            number += 1
            with contextlib.suppress(OSError):  # no room, or nobody listens
                datagrams.sendto(b"x" * 18, (THERE, 1024 + number % 60_000))
            with contextlib.suppress(OSError):
                raw.send(noise[number % len(noise)])


@contextlib.contextmanager
def flood(places: Sequence[Path]) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """A process that sends from all of these, but only inside of what is handed over."""
    pid = os.fork()
    if not pid:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            send([sockets(place) for place in places])
        finally:
            os._exit(1)
    stay_on(pid, {min(os.sched_getaffinity(0))})

    @contextlib.contextmanager
    def on() -> Iterator[None]:
        os.kill(pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGSTOP)

    try:
        yield on
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def ours(neighbours: int) -> Iterator[tuple[Bed, list[Path]]]:
    """A lab with so many, and where they are."""
    lab = f"{LAB}near{neighbours}"
    run(*NESTNET, "down", "--name", lab)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "near.yaml")
        written.write_text(crowd(neighbours))
        try:
            run(*NESTNET, "up", str(written), "--name", lab, "--timeout", str(PATIENCE))
            unfiltered(f"nn-{lab}")
            inside = namespaces(lab)
            places = [place for path, place in inside.items() if path.endswith("/f")]
            ends = [Place(inside[f"bench/{name}"], at) for name, at in (("a", HERE), ("b", THERE))]
            openers = [inside[f"bench/o{number}"] for number in range(OPENERS)]
            yield Bed(ends[0], ends[1], inside["foreign/x"], openers=openers), places
        finally:
            run(*NESTNET, "down", "--name", lab)


@contextlib.contextmanager
def peers(neighbours: int) -> Iterator[tuple[Bed, list[Path]]]:
    """The same by hand: a bridge and a VXLAN device for each on both machines, and the rate by htb where it sends."""
    with by_hand() as bed:
        prefix = f"{PREFIX}peer10-"
        for number in range(1, neighbours + 1):
            for side, (end, address) in enumerate((("f", HERE), ("g", THERE)), 1):
                name = f"{prefix}{end}{number}"
                netns.create(name)
                bridged(f"{prefix}m{side}", side, 1000 + number, name, f"{end}{number}", address)
            rate = ("root", "handle", "1:", "htb", "default", "1")
            sender = partial(netns.run_in, netns.path(f"{prefix}f{number}"))
            limit = ("rate", f"{RATE}bit", "ceil", f"{RATE}bit")
            for words in (
                ("qdisc", "add", "dev", "eth0", *rate),
                ("class", "add", "dev", "eth0", "parent", "1:", "classid", "1:1", "htb", *limit),
            ):
                sender(partial(subprocess.run, ["tc", *words], check=True))
        unfiltered(prefix)
        yield bed, [netns.path(f"{prefix}f{number}") for number in range(1, neighbours + 1)]


def said(neighbours: int, what: str) -> str:
    return f"{neighbours} {what}"


@contextlib.contextmanager
def beds() -> Iterator[dict[str, Bed]]:
    """Nobody beside; so many idle; the same while they flood; and the peer, alone and flooded."""
    with contextlib.ExitStack() as stack:
        found = {}
        for size in SIZES:
            bed, places = stack.enter_context(ours(size))
            found[said(size, "idle")] = bed
            found[said(size, "flooding")] = replace(bed, during=stack.enter_context(flood(places)))
        found["alone"], _ = stack.enter_context(ours(0))
        bed, places = stack.enter_context(peers(BY_HAND))
        found["peer idle"] = bed
        found["peer flooded"] = replace(bed, during=stack.enter_context(flood(places)))
        yield found
