"""What runs in a virtual machine that is a host, where Linux has no hook for our programs: an agent's half by the
kernel's own means. Who it is and what it should be are the agent's own code: a join over TLS by the relay, the
certificate, the feed, reports. What it makes of that is a VXLAN device for each port here, with the port's MAC and
addresses, in a namespace `port-ID`: neighbours and where they live are told, so nobody asks.

    python -m kernel_host MACHINE CONTROLLER TOKEN-FILE

What it has not: a second port of a segment, routers, policies, another certificate when this one runs out. What the
machines on the other side judge they judge all the same.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from nestnet.agent.credentials import Own, boot, join
from nestnet.agent.feed import Desired
from nestnet.agent.links import short_name
from nestnet.api.client import Client
from nestnet.model.errors import Unreachable
from nestnet.model.values import Port, World

say = partial(print, "kernel_host:", flush=True)
STATE = Path("/state")


def batch(command: str, lines: Iterable[str], *options: str) -> None:
    subprocess.run([command, *options, "-batch", "-"], input="\n".join(lines), text=True, check=True)


def become(world: World, row: int) -> None:
    """Make this kernel so, from nothing: what was there is taken away first."""
    for name in subprocess.check_output(["ip", "netns", "list"], text=True).split("\n"):
        if place := name.partition(" ")[0]:
            subprocess.run(["ip", "-n", place, "link", "delete", "eth0"], check=True)  # at once: its VNI is free again
            subprocess.run(["ip", "netns", "delete", place], check=True)
    for port in world.ports.values():
        if port.host == row:
            _make(world, row, port)


def _make(world: World, row: int, port: Port) -> None:
    place, name, segment = f"port-{port.id}", short_name("v", port.id), world.segments[port.segment]
    others = [other for other in world.ports.values() if other.segment == port.segment and other.id != port.id]

    def device() -> Iterator[str]:
        yield f"netns add {place}"
        # Rule 1: to UDP port 4789, from one that tells flows apart, TTL 64, not to be cut, without a checksum.
        made = f"vxlan id {segment.vni} local {world.machines[row].address} dstport 4789 srcport 49152 65535"
        mtu = world.networks[port.network].mtu
        kind = f"type {made} ttl 64 df set noudpcsum nolearning"
        yield f"link add {name} netns {place} address {_mac(port)} mtu {mtu} {kind}"

    def inside() -> Iterator[str]:
        yield f"link set {name} name eth0"
        for address in port.addresses:
            length = next(cidr.prefixlen for cidr in segment.cidrs if cidr.version == address.version)
            yield f"address add {address}/{length} dev eth0 {'nodad' if address.version == 6 else ''}"
        yield "link set eth0 up"
        for other in others:
            for address in other.addresses:
                yield f"neighbour replace {address} lladdr {_mac(other)} dev eth0 nud permanent"

    def living() -> Iterator[str]:
        for other in others:
            yield f"fdb replace {_mac(other)} dev eth0 dst {world.machines[other.host].address} self permanent"

    batch("ip", device())
    batch("ip", inside(), "-n", place)
    batch("bridge", living(), "-n", place)


def _mac(port: Port) -> str:
    return port.mac.to_bytes(6, "big").hex(":")


def main(machine: str, url: str, token: str) -> None:
    while not (STATE / "own.pem").exists():
        try:
            join(url, token, {"name": machine}, STATE)
        except Unreachable as error:
            say(error)
            time.sleep(0.2)  # the pace of asking
    credentials = Own(STATE, say).credentials
    with Client(url, credentials=credentials) as client, Client(url, credentials=credentials) as following:
        row = int(client.get("machine", machine)["row"])
        desired = Desired()
        for heard in following.feed(machine, boot=boot()):
            desired = desired.after(heard)
            if heard.get("rows") or heard.get("snapshot"):
                become(desired.world, row)
                say("is at revision", desired.revision)
            client.report(machine, desired.revision)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_text().strip())
