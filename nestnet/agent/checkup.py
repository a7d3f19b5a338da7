"""What may be wrong with the computer that this runs on: each finding with what mends it. It only looks.

`nestnet doctor` runs this; agents do not need it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestnet.agent import links, netns
from nestnet.model.errors import NestnetError

KERNEL = (6, 6)  # tcx, and links on it
BPFFS = Path("/sys/fs/bpf")
CLOCK = 5.0  # seconds that the controller's clock may be away
OURS = ("workload", "underlay", "tag", "trunk")


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found, and what mends it; `fix` is empty when all is well. Warnings may stay."""

    check: str
    text: str
    fix: str = ""
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Seat:
    """A machine that runs here: its namespace (None: this one), its folder of pins, its address on the wire, if its
    NICs are in a VLAN of the wire, and the names of those that lead to physical networks."""

    name: str
    namespace: Path | None
    pins: Path
    address: str
    tagged: bool = False
    trunks: tuple[str, ...] = ()


def computer() -> Iterator[Finding]:
    """The kernel, its settings, and the library."""
    release = os.uname().release
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    needed = f"{KERNEL[0]}.{KERNEL[1]}"
    yield Finding("kernel", release, "" if numbers >= KERNEL else f"boot a kernel of {needed} or later: it has tcx")
    yield _libbpf()
    mounted = any(
        line.split()[1:3] == [str(BPFFS), "bpf"] for line in Path("/proc/self/mounts").read_text().splitlines()
    )
    fix = "" if mounted else f"mount -t bpf bpf {BPFFS}; /etc/fstab: bpf {BPFFS} bpf defaults 0 0"
    yield Finding("bpffs", f"{'mounted' if mounted else 'not mounted'} on {BPFFS}", fix)
    yield _sysctl("net/core/bpf_jit_enable", "1", "BPF is interpreted, ten times slower", warning=True)
    if os.geteuid() != 0:
        yield Finding(
            "user", "not root: hooks, pins and namespaces cannot be looked at", "run it as root", warning=True
        )


def _libbpf() -> Finding:
    try:
        ctypes.CDLL("libbpf.so.1")
    except OSError as error:
        return Finding("libbpf", str(error), "apt-get install libbpf1")
    return Finding("libbpf", "is there")


def _sysctl(key: str, wanted: str, why: str, warning: bool = False) -> Finding:
    name = key.replace("/", ".")
    try:
        value = (Path("/proc/sys") / key).read_text().strip()
    except OSError:
        return Finding(name, "this kernel does not have it")
    if value == wanted or (wanted == "1" and value == "2"):
        return Finding(name, f"is {value}")
    return Finding(name, f"is {value}: {why}", f"sysctl -w {name}={wanted}", warning)


def machine(seat: Seat, mtu: int) -> Iterator[Finding]:
    """One machine that runs here. `mtu`: what the controller counts on, in bytes of IP."""
    check = f"machine {seat.name}"
    if seat.namespace is not None and not seat.namespace.exists():
        yield Finding(
            check, f"its namespace {seat.namespace.name} has gone", "take the lab down, and bring it up again"
        )
        return
    try:
        yield from _inside(seat.namespace, lambda: list(_machine(seat, mtu, check)))
    except (OSError, NestnetError) as error:
        yield Finding(check, f"cannot be looked at: {error}", "run it as root", warning=True)


def _inside(namespace: Path | None, look: Callable[[], list[Finding]]) -> list[Finding]:
    return look() if namespace is None else netns.run_in(namespace, look)


def _machine(seat: Seat, mtu: int, check: str) -> Iterator[Finding]:
    from ipaddress import ip_address

    from nestnet.datapath.libbpf import TCX_EGRESS, on_hook

    with links.netlink() as ipr:
        index = links.with_address(ipr, ip_address(seat.address))
        here = {link.index: link for link in links.links(ipr).values()}
    if index is None:
        yield Finding(
            check, f"no interface has its address {seat.address}", f"ip addr add {seat.address}/LENGTH dev NIC"
        )
        return
    nic = here[index]
    if nic.mtu < mtu:
        yield Finding(
            check,
            f"{nic.name} has an MTU of {nic.mtu}, the controller counts on {mtu}",
            f"ip link set {nic.name} mtu {mtu}, or say --mtu {nic.mtu} when the machine joins",
        )
    wrong = 0
    workloads = {link.index: link for link in here.values() if link.alias.startswith("nestnet port ")}
    trunks = {link.index: link for link in here.values() if link.name in seat.trunks}
    for each in [nic, *trunks.values(), *workloads.values()]:
        programs = Counter(name for name in [*on_hook(each.index), *on_hook(each.index, TCX_EGRESS)] if name in OURS)
        expected = ["underlay", "tag"] if seat.tagged else ["underlay"]
        if each is not nic:
            expected = ["trunk"] if each.index in trunks else ["workload"]
        if programs != Counter(expected):
            wrong += 1
            found = ", ".join(f"{name} {count} times" for name, count in programs.items()) or "none of our programs"
            yield Finding(
                check,
                f"{each.name} has {found}, not {' and '.join(expected)} once",
                "restart the agent: it attaches what is missing",
            )
    unfinished = [path for path in seat.pins.glob("v*/unfinished") if path.is_symlink()]
    if unfinished:
        yield Finding(check, "an agent ended while it wrote tables", "start the agent: it finishes that first")
    if not wrong and not unfinished and nic.mtu >= mtu:
        hooks = len(workloads) + len(trunks) + 1
        yield Finding(check, f"{hooks} hooks have their program once; {nic.name} has an MTU of {nic.mtu}")


def leftovers(namespaces: Sequence[str], pins: Sequence[Path]) -> Iterator[Finding]:
    """What belongs to no lab that is up, by the names that labs give."""
    for name in namespaces:
        yield Finding("leftovers", f"namespace {name} is no lab's any more", f"ip netns del {name}", warning=True)
    for folder in pins:
        with contextlib.suppress(OSError):
            yield Finding("leftovers", f"pins in {folder} are no lab's any more", f"rm -r {folder}", warning=True)


def clock(ours: float, theirs: float) -> Finding:
    """Whether the controller's clock and this one agree."""
    apart = abs(ours - theirs)
    fix = "" if apart <= CLOCK else "timedatectl set-ntp true, here and there: certificates and logs need the time"
    return Finding("clock", f"{apart:.1f} s from the controller's", fix)
