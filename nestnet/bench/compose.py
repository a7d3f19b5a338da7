"""What it costs to judge a packet that is no known flow, by the number of rules: `python -m nestnet.bench.compose`.

A packet that no rule allows is dropped and never cached, so the full way is taken every time: guard, destination,
connections, and the policies, which are classes and at most 27 lookups (compile/rules.py). Each row has that many
policies, all of which name the sender's group, other destinations and other ports. The median of 21 runs of 20,000
packets through BPF_PROG_TEST_RUN, interleaved.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
from ipaddress import IPv4Address, IPv4Network

from nestnet.agent import netns
from nestnet.compile.compiler import compile
from nestnet.compile.diff import diff
from nestnet.compile.slots import Slots, assign
from nestnet.compile.tables import empty
from nestnet.datapath.kernel import BPFFS, Capacity, Kernel
from nestnet.model.values import Machine, Network, Policy, Port, Segment, Selector, Service, World

RULES = (0, 1, 10, 100, 1000, 10_000)
RUNS, PACKETS = 21, 20_000
HERE, THERE = IPv4Address("10.0.0.2"), IPv4Address("10.0.0.3")


def world(rules: int) -> World:
    """Two ports, and so many policies that say nothing about a TCP packet from one to port 1 of the other."""
    policies = [
        Policy(
            n, 1, (Selector("group", 1),), (Selector("cidr", cidr=IPv4Network((n << 12 | 10 << 24, 20))),),
            (Service(6, 1000 + n % 60_000, 1000 + n % 60_000),),
        )
        for n in range(1, rules + 1)
    ]  # fmt: skip
    ports = [
        Port(1, 1, 1, 1, 0x020000000001, (HERE,), groups=(1,)),
        Port(2, 1, 1, 1, 0x020000000002, (THERE,), enabled=rules > 0),  # without rules: dropped all the same
    ]
    segment = Segment(1, 1, 1, (IPv4Network("10.0.0.0/24"),))
    return World.of([Machine(1, IPv4Address("192.0.2.1")), Network(1), segment, *ports, *policies])


def opening() -> bytes:
    """A TCP SYN from the one to the other."""
    ethernet = bytes.fromhex("020000000002 020000000001 0800")
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 1, 0, 64, 6, 0, HERE.packed, THERE.packed)
    return ethernet + ip + struct.pack("!HHIIBBHHH", 1000, 1, 1, 0, 5 << 4, 2, 8192, 0, 0)


def main() -> None:
    name = f"nnb-compose-{os.getpid()}"
    pins = BPFFS / "nestnet" / name
    room = Capacity(ports=64, rules=32_768, prefixes=32_768)
    namespace = netns.create(name)
    netns.enter(namespace)
    device = socket.if_nametoindex("lo")
    kernels = {}
    try:
        for rules in RULES:
            kernels[rules] = Kernel.open(pins / str(rules), room)
            wanted = world(rules)
            kernels[rules].apply(diff(empty(), compile(wanted, 1, {1: device}, 0, assign(Slots(), wanted))))
        times: dict[int, list[int]] = {rules: [] for rules in RULES}
        for _ in range(RUNS):
            for rules, kernel in kernels.items():
                times[rules].append(kernel.duration(opening(), device, "workload", PACKETS))
    finally:
        for rules, kernel in kernels.items():
            kernel.unpin()
            (pins / str(rules)).rmdir()
        if pins.exists():
            pins.rmdir()
        netns.delete(name)
    least = statistics.median(times[RULES[1]])
    print("| policies | ns a packet | to one policy |\n|---|---|---|")
    for rules, samples in times.items():
        middle = statistics.median(samples)
        print(f"| {rules} | {middle:.0f} | {middle / least:.2f} |")


if __name__ == "__main__":
    main()
