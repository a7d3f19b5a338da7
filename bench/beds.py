"""Where the traffic goes: the same two machines on the same kind of wire, with nothing, the peer or nestnet on them.

            wire: a namespace with a plain bridge
           /                                     \\
    machine 1: eth0, 1500                   machine 2: eth0, 1500
       |                                         |
    [ overlay ]                             [ overlay ]
       |                                         |
    a: eth0, 1450, 10.7.0.2                 b: eth0, 1450, 10.7.0.3      x: another network, 10.7.0.3, on machine 2

    bare    no overlay: from machine to machine, with an MTU of 1450 on the machines so that segments are as large
    peer    a Linux bridge and a kernel VXLAN device for each network on each machine
    ours    `nestnet up`, with two networks
    ours6   the same with machines that have IPv6 addresses, and 20 bytes more MTU
    tagged  the same as ours with machines whose NICs are in a VLAN of the wire
    ends    the same as ours, and on each workload's interface two programs that do nothing: what the next are to
    trunk   a and b are ports behind tag 10 of trunks; the two programs put it on and take it off
    riding  a and b are in a transparent segment, and all that they send bears tag 10: the same two programs

Every device has the offloads that it is made with. Look while it runs: `ip netns | grep nnbench`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.tags import Q, behind
from bench.traffic import Bed, Place
from nestnet.agent import netns

PREFIX = "nnbench-"
LAB = "nnbench"
MTU = 1450
NESTNET = (sys.executable, "-m", "nestnet")


def file(machines: dict[str, Any] | None = None, kind: str = "") -> str:
    """The network file of one of our beds."""
    both: dict[str, dict[str, Any]] = {
        "a": {"host": "m1", "address": "10.7.0.2"},
        "b": {"host": "m2", "address": "10.7.0.3"},
    }
    ports: dict[str, Any]
    if kind == "trunk":
        ports = {
            name: {
                "host": port["host"],
                "native": "bare",
                "vlans": {"10": {"segment": "lan", "address": port["address"]}},
            }
            for name, port in both.items()
        }
    else:
        ports = {name: {**port, "segment": "lan"} for name, port in both.items()}
    lan = {"cidr": "10.7.0.0/24", **({"transparent": True} if kind == "riding" else {})}
    segments = {"lan": lan, **({"bare": {"cidr": "10.6.0.0/24"}} if kind == "trunk" else {})}
    foreign = {
        "segments": {"lan": {"cidr": "10.7.0.0/24"}},
        "ports": {"x": {"segment": "lan", "host": "m2", "address": "10.7.0.3"}},
    }
    return json.dumps(
        {
            "apiVersion": "nestnet/v1",
            "machines": machines or {"m1": {}, "m2": {}},
            "networks": {"bench": {"segments": segments, "ports": ports}, "foreign": foreign},
        }
    )


OVER6 = {f"m{n}": {"address": f"2001:db8::{n}", "mtu": 1520} for n in (1, 2)}
IN_A_VLAN = {"m1": {"vlan": 17}, "m2": {"vlan": 17}}
TAG = (Q, 10)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def ip(*words: str) -> None:
    run("ip", *words)


def plug(inside: str, outside: str, bridge: str, name: str, mtu: int, address: str) -> None:
    """A veth from `eth0` in namespace `inside` to a bridge in namespace `outside`, where its end is called `name`."""
    ip(
        "-n",
        inside,
        "link",
        "add",
        "eth0",
        "mtu",
        str(mtu),
        "type",
        "veth",
        "peer",
        "name",
        name,
        "mtu",
        str(mtu),
        "netns",
        outside,
    )
    ip("-n", inside, "address", "add", f"{address}/24", "dev", "eth0")
    ip("-n", inside, "link", "set", "eth0", "up")
    ip("-n", outside, "link", "set", "dev", name, "master", bridge, "up")


def machines(wire: str, names: tuple[str, str], mtu: int) -> None:
    """Two machines, 192.0.2.1 and 192.0.2.2, on a wire of their own."""
    for name in (wire, *names):
        netns.create(name)
    ip("-n", wire, "link", "add", "wire", "type", "bridge")
    ip("-n", wire, "link", "set", "wire", "up")
    for number, name in enumerate(names, 1):
        plug(name, wire, "wire", f"m{number}", mtu, f"192.0.2.{number}")


def unfiltered(prefix: str) -> None:
    """Where br_netfilter is loaded, no bridge in these namespaces hands its packets to iptables: all beds alike."""
    for name in netns.names(prefix):
        for family in ("iptables", "ip6tables", "arptables"):
            setting = Path(f"/proc/sys/net/bridge/bridge-nf-call-{family}")
            if setting.exists():
                netns.run_in(netns.path(name), partial(setting.write_text, "0"))


@contextlib.contextmanager
def cleaned(prefix: str) -> Iterator[None]:
    """Namespaces of this prefix are gone before, even if an earlier run was killed, and after."""

    def clean() -> None:
        for name in netns.names(prefix):
            netns.delete(name)

    clean()
    try:
        yield
    finally:
        clean()


@contextlib.contextmanager
def bare() -> Iterator[Bed]:
    prefix = PREFIX + "bare-"
    with cleaned(prefix):
        names = (prefix + "m1", prefix + "m2")
        machines(prefix + "wire", names, MTU)
        first, second = (Place(netns.path(name), f"192.0.2.{number}") for number, name in enumerate(names, 1))
        unfiltered(prefix)
        yield Bed(first, second, None)


@contextlib.contextmanager
def peer() -> Iterator[Bed]:
    prefix = PREFIX + "peer-"
    with cleaned(prefix):
        names = (prefix + "m1", prefix + "m2")
        machines(prefix + "wire", names, 1500)
        for number, name in enumerate(names, 1):
            for vni in (100, 200):
                vxlan, bridge = f"vxlan{vni}", f"br{vni}"
                ip("-n", name, "link", "add", bridge, "mtu", str(MTU), "type", "bridge")
                # nestnet sends no UDP checksum either (RFC 7348 and, for IPv6, RFC 6935).
                ends = ("local", f"192.0.2.{number}", "remote", f"192.0.2.{3 - number}", "dev", "eth0")
                kind = ("type", "vxlan", "id", str(vni), "dstport", "4789", "noudpcsum")
                ip("-n", name, "link", "add", vxlan, "mtu", str(MTU), *kind, *ends)
                ip("-n", name, "link", "set", vxlan, "master", bridge, "up")
                ip("-n", name, "link", "set", bridge, "up")
        for workload, machine, vni, address in (
            ("a", names[0], 100, "10.7.0.2"),
            ("b", names[1], 100, "10.7.0.3"),
            ("x", names[1], 200, "10.7.0.3"),
        ):
            netns.create(prefix + workload)
            plug(prefix + workload, machine, f"br{vni}", workload, MTU, address)
        unfiltered(prefix)
        yield Bed(
            Place(netns.path(prefix + "a"), "10.7.0.2"),
            Place(netns.path(prefix + "b"), "10.7.0.3"),
            netns.path(prefix + "x"),
        )


def namespace_of(lab: str, port: str) -> Path:
    """The namespace of a port's workload, whatever the lab calls it: the one that a command run there is in."""
    link = run(*NESTNET, "exec", "--lab", lab, port, "--", "readlink", "/proc/self/ns/net").strip()
    for name in netns.names():
        if link == f"net:[{netns.inode(netns.path(name))}]":
            return netns.path(name)
    raise RuntimeError(f"no named namespace is {link} of port {port}")


@contextlib.contextmanager
def ours(
    which: str = "", machines: dict[str, Any] | None = None, tags: Sequence[tuple[int, int]] | None = None
) -> Iterator[Bed]:
    lab = f"{LAB}{which}"
    run(*NESTNET, "down", "--name", lab)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        written = Path(folder, "bench.yaml")
        written.write_text(file(machines, which))
        try:
            run(*NESTNET, "up", str(written), "--name", lab)
            unfiltered(f"nn-{lab}")
            first, second = (
                Place(namespace_of(lab, f"bench/{name}"), address)
                for name, address in (("a", "10.7.0.2"), ("b", "10.7.0.3"))
            )
            if tags is not None:
                for place in (first, second):
                    if which == "trunk":  # addresses of ports behind tags are for an interface of the workload's own
                        ip("-n", place.namespace.name, "address", "add", f"{place.address}/24", "dev", "eth0")
                    ends.enter_context(behind(place.namespace, *tags))
            yield Bed(first, second, namespace_of(lab, "foreign/x"))
        finally:
            run(*NESTNET, "down", "--name", lab)


BEDS: dict[str, Callable[[], contextlib.AbstractContextManager[Bed]]] = {
    "bare": bare,
    "peer": peer,
    "ours": ours,
    "ours6": partial(ours, "6", OVER6),
    "tagged": partial(ours, "tagged", IN_A_VLAN),
    "ends": partial(ours, "ends", tags=()),
    "trunk": partial(ours, "trunk", tags=[TAG]),
    "riding": partial(ours, "riding", tags=[TAG]),
}
