"""Where the traffic goes: the same two machines on the same kind of wire, with nothing, the peer or nestnet on them.

            wire: a namespace with a plain bridge
           /                                     \\
    machine 1: eth0, 1500                   machine 2: eth0, 1500
       |                                         |
    [ overlay ]                             [ overlay ]
       |                                         |
    a: eth0, 1450, 10.7.0.2                 b: eth0, 1450, 10.7.0.3      x: another network, 10.7.0.3, on machine 2

    bare    no overlay and no rules: from machine to machine, with an MTU of 1450 on the machines: segments as large
    peer    a Linux bridge and a kernel VXLAN device for each network on each machine, and the rules in nftables
    ours    `nestnet up`, with two networks, and the rules as policies
    ours6   the same with machines that have IPv6 addresses, and 20 bytes more MTU
    tagged  the same as ours with machines whose NICs are in a VLAN of the wire
    ends    the same as ours, and on each workload's interface two programs that do nothing: what the next are to
    trunk   a and b are ports behind tag 10 of trunks; the two programs put it on and take it off
    riding  a and b are in a transparent segment, and all that they send bears tag 10: the same two programs

On one machine alone:

    pair    one veth from workload to workload, no rules
    bridge  a Linux bridge, and the rules in nftables
    machine ours, with both on m1

The rules, the same for all, are `RULES` (10): some that none of the traffic needs, then one for each kind; what no rule
allows is denied. On the peers a table of the family ip has them, with connection tracking, by br_netfilter.

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

from nestnet.agent import netns
from nestnet.bench.tags import Q, behind
from nestnet.bench.traffic import Bed, Place
from nestnet.lab import state

PREFIX = "nnbench-"
LAB = "nnbench"
MTU = 1450
NESTNET = (sys.executable, "-m", "nestnet")


# Whoever opens many connections uses up his share (16,384 that are open or were in the last 10 s): so there are some to
# take turns. Bridges have no shares.
OPENERS = 8
RULES = 10
PORTS = "32768-60999"  # that listeners here are on


def policies(rules: int) -> list[dict[str, Any]]:
    """So many: the last three let in what is measured."""
    allowed = [*(f"tcp/{1000 + n}" for n in range(rules - 3)), f"tcp/{PORTS}", f"udp/{PORTS}", "icmp"]
    return [{"from": "any", "to": "any", "allow": each} for each in allowed]


def nftables(rules: int) -> str:
    """The same for nft: each a rule of its own, or when they are many all ports in one set."""
    ports = [str(1000 + n) for n in range(rules - 3)]
    few = [f"tcp dport {port} accept" for port in ports]
    many = [f"tcp dport {{ {', '.join(ports)} }} accept"]
    lines = ["ct state established,related accept", *(few if rules <= 100 else many)]
    lines += [f"tcp dport {PORTS} accept", f"udp dport {PORTS} accept", "ip protocol icmp accept"]
    chain = "\n".join(["type filter hook forward priority 0; policy drop;", *lines])
    return f"table ip bench {{\nchain forward {{\n{chain}\n}}\n}}\n"


def filtered(namespace: str, rules: int) -> None:
    """What bridges forward in this namespace goes by the rules. Raises RuntimeError where Linux lacks br_netfilter."""

    def work() -> None:
        setting = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
        if not setting.exists():
            raise RuntimeError("the peer needs br_netfilter: `modprobe br_netfilter`")
        setting.write_text("1")
        done = subprocess.run(["nft", "-f", "-"], input=nftables(rules), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nft: {done.stderr.strip()}")

    netns.run_in(netns.path(namespace), work)


def file(machines: dict[str, Any] | None = None, kind: str = "", rules: int = RULES) -> str:
    """The network file of one of our beds."""
    there = "m1" if kind == "machine" else "m2"
    both: dict[str, dict[str, Any]] = {
        "a": {"host": "m1", "address": "10.7.0.2"},
        "b": {"host": there, "address": "10.7.0.3"},
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
        for number in range(OPENERS):
            both[f"o{number}"] = {"host": "m1", "address": f"10.7.0.{10 + number}"}
        ports = {name: {**port, "segment": "lan"} for name, port in both.items()}
    lan = {"cidr": "10.7.0.0/24", **({"transparent": True} if kind == "riding" else {})}
    segments = {"lan": lan, **({"bare": {"cidr": "10.6.0.0/24"}} if kind == "trunk" else {})}
    foreign = {
        "segments": {"lan": {"cidr": "10.7.0.0/24"}},
        "ports": {"x": {"segment": "lan", "host": there, "address": "10.7.0.3"}},
    }
    return json.dumps(
        {
            "apiVersion": "nestnet/v1",
            "machines": machines or {"m1": {}, "m2": {}},
            "networks": {
                "bench": {"segments": segments, "ports": ports, "policies": policies(rules)},
                "foreign": foreign,
            },
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


def bridged(machine: str, number: int, vni: int, workload: str, name: str, address: str) -> None:
    """A network of one workload on machine 1 or 2: a bridge, a VXLAN device to the other, a veth called `name`."""
    vxlan, bridge = f"vxlan{vni}", f"br{vni}"
    ip("-n", machine, "link", "add", bridge, "mtu", str(MTU), "type", "bridge")
    # nestnet sends no UDP checksum either (RFC 7348 and, for IPv6, RFC 6935).
    ends = ("local", f"192.0.2.{number}", "remote", f"192.0.2.{3 - number}", "dev", "eth0")
    ip(
        "-n",
        machine,
        "link",
        "add",
        vxlan,
        "mtu",
        str(MTU),
        "type",
        "vxlan",
        "id",
        str(vni),
        "dstport",
        "4789",
        "noudpcsum",
        *ends,
    )
    ip("-n", machine, "link", "set", vxlan, "master", bridge, "up")
    ip("-n", machine, "link", "set", bridge, "up")
    plug(workload, machine, bridge, name, MTU, address)


@contextlib.contextmanager
def peer(rules: int = RULES) -> Iterator[Bed]:
    prefix = f"{PREFIX}peer{rules}-"
    with cleaned(prefix):
        names = (prefix + "m1", prefix + "m2")
        machines(prefix + "wire", names, 1500)
        for workload, side, vni, address in (
            ("a", 1, 100, "10.7.0.2"),
            ("b", 2, 100, "10.7.0.3"),
            ("x", 2, 200, "10.7.0.3"),
        ):
            netns.create(prefix + workload)
            bridged(names[side - 1], side, vni, prefix + workload, workload, address)
        unfiltered(prefix)
        for name in names:
            filtered(name, rules)
        yield Bed(
            Place(netns.path(prefix + "a"), "10.7.0.2"),
            Place(netns.path(prefix + "b"), "10.7.0.3"),
            netns.path(prefix + "x"),
        )


@contextlib.contextmanager
def pair() -> Iterator[Bed]:
    """One veth, from workload to workload."""
    prefix = PREFIX + "pair-"
    with cleaned(prefix):
        a, b = prefix + "a", prefix + "b"
        netns.create(a)
        netns.create(b)
        far = ("peer", "name", "eth0", "mtu", str(MTU), "netns", b)
        ip("-n", a, "link", "add", "eth0", "mtu", str(MTU), "type", "veth", *far)
        for name, address in ((a, "10.7.0.2"), (b, "10.7.0.3")):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield Bed(Place(netns.path(a), "10.7.0.2"), Place(netns.path(b), "10.7.0.3"), None)


@contextlib.contextmanager
def bridge() -> Iterator[Bed]:
    """One bridge, with the rules."""
    prefix = PREFIX + "bridge-"
    with cleaned(prefix):
        machine = prefix + "m1"
        netns.create(machine)
        ip("-n", machine, "link", "add", "br0", "mtu", str(MTU), "type", "bridge")
        ip("-n", machine, "link", "set", "br0", "up")
        for name, address in (("a", "10.7.0.2"), ("b", "10.7.0.3")):
            netns.create(prefix + name)
            plug(prefix + name, machine, "br0", name, MTU, address)
        filtered(machine, RULES)
        yield Bed(Place(netns.path(prefix + "a"), "10.7.0.2"), Place(netns.path(prefix + "b"), "10.7.0.3"), None)


def namespaces(lab: str) -> dict[str, Path]:
    """Those of all workloads, by the paths of their ports."""
    found = state.load(lab)
    assert found is not None
    ports = json.loads(run(*NESTNET, "get", "ports", "--lab", lab, "-o", "json"))["items"]
    return {port["path"]: netns.path(found.workload(int(port["row"]))) for port in ports}


@contextlib.contextmanager
def ours(
    which: str = "",
    machines: dict[str, Any] | None = None,
    tags: Sequence[tuple[int, int]] | None = None,
    rules: int = RULES,
    prepare: Callable[[], None] = lambda: None,
) -> Iterator[Bed]:
    """A lab of its own for each `which`, which says what is different in it. `prepare` is called before it is made."""
    lab = f"{LAB}{which}"
    run(*NESTNET, "down", "--name", lab)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        written = Path(folder, "bench.yaml")
        written.write_text(file(machines, which, rules))
        try:
            prepare()
            run(*NESTNET, "up", str(written), "--name", lab)
            unfiltered(f"nn-{lab}")
            inside = namespaces(lab)
            first, second = (
                Place(inside[f"bench/{name}"], address) for name, address in (("a", "10.7.0.2"), ("b", "10.7.0.3"))
            )
            for place in (first, second) if tags is not None else ():
                if which == "trunk":  # addresses of ports behind tags are for an interface of the workload's own
                    ip("-n", place.namespace.name, "address", "add", f"{place.address}/24", "dev", "eth0")
                ends.enter_context(behind(place.namespace, *tags or ()))
            openers = [inside[f"bench/o{number}"] for number in range(OPENERS if tags is None else 0)]
            yield Bed(first, second, inside["foreign/x"], openers=openers)
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
    "peer1000": partial(peer, 1000),
    "ours1000": partial(ours, "rules", rules=1000),
    "pair": pair,
    "bridge": bridge,
    "machine": partial(ours, "machine"),
}
