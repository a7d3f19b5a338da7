"""What others do to a machine under its agent's hands is found, put right and told; nothing that policies forbid passes
meanwhile. Real agents in a lab; every case at once, each at a port of its own.

    m1: local, and a port for each case         m2: b, and behind two routers far

All ports of m1 send without a pause: to b what is allowed; to b, to local and to their machine itself what is not.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frames import ip_frame, udp
from test_kernel_maps import compiled
from test_lab import leftovers, nestnet

from nestnet.agent import links, netns
from nestnet.api.client import Client
from nestnet.compile.tables import GENERATIONS, LAYOUT, TABLES, Rows
from nestnet.datapath.kernel import Kernel
from nestnet.datapath.libbpf import ARRAY, TCX_INGRESS, Link, Map, Object, get, on_hook
from nestnet.lab import state
from nestnet.lab.down import down
from nestnet.lab.state import Lab
from nestnet.model import packet as pk
from nestnet.model.packet import mapped

pytestmark = pytest.mark.root

FOUND = 10.0  # seconds that anything may last
ALLOWED, FORBIDDEN = 7, 9
CASES = (
    "detached", "unpinned", "behind_another", "beside_clsact", "link_deleted", "end_down", "end_mtu", "end_alias",
    "end_renamed", "forwarding_off", "peer_down", "peer_mtu", "peer_mac", "no_address", "no_routes", "no_namespace",
)  # fmt: skip
NET = """\
apiVersion: nestnet/v1
machines: {m1: {trunks: {campus: eth1}}, m2: {trunks: {campus: eth1}}}
networks:
  n:
    segments: {s: {cidr: 10.0.0.0/24}, t: {cidr: 10.0.1.0/24}, u: {vlan: {id: 17, on: campus}}}
    routers: {r1: {segments: [s]}, r2: {segments: [t]}}
    links: {r1-r2: {between: [r1, r2], rate: 100mbit}}
    policies:
      - {from: any, to: any, allow: udp/7}
      - {from: local, to: 10.0.1.0/24, allow: udp/8}
    ports:
      b: {segment: s, host: m2}
      far: {segment: t, host: m2}
      local: {segment: s, host: m1}
      u1: {segment: u, host: m1}
      u2: {segment: u, host: m2}
"""


def until(true: Callable[[], object], what: str, seconds: float = FOUND) -> float:
    """How long it took. The pace is of asking; the wait is for what is asked for."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() < begin + seconds, what
        time.sleep(0.02)
    return time.monotonic() - begin


class Site:
    """The lab, and what is sent and heard in it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.m1, self.m2 = lab.machine("m1"), lab.machine("m2")
        self.underlay = {seat.name: seat.address.partition("/")[0] for seat in lab.machines}
        with Client(lab.controller) as client:
            self.ports = {
                name: client.get("port", f"n/{name.replace(chr(95), chr(45))}")
                for name in (*CASES, "b", "far", "local")
            }
        self.senders: dict[str, list[Callable[[], object]]] = {}
        self.ears = {
            (name, port): self.hear(self.room(name), port) for name in ("b", "local") for port in (ALLOWED, FORBIDDEN)
        }
        self.ears["m1", FORBIDDEN] = self.hear(netns.path(self.m1), FORBIDDEN)
        self.heard: dict[str, int] = {}  # by case: what is allowed, and arrived
        self.forbidden: list[tuple[str, bytes]] = []
        self.sent = 0
        for case in CASES:
            self.rewire(case)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def room(self, name: str) -> Path:
        return netns.path(self.lab.workload(self.ports[name]["row"]))

    def end(self, name: str) -> str:
        """The name of our end of a port's link."""
        return links.short_name("p", self.ports[name]["row"])

    def address(self, name: str) -> str:
        return str(self.ports[name]["addresses"][0]).partition("/")[0]

    @staticmethod
    def hear(room: Path, port: int) -> socket.socket:
        ear = netns.run_in(room, partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
        ear.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        ear.bind(("", port))
        return ear

    def rewire(self, case: str) -> None:
        """What a port sends, from the namespace that it has now."""
        room, name = self.room(case), case.encode()
        plain = netns.run_in(room, partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM))
        raw = netns.run_in(room, partial(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
        mac = int(self.ports[case]["mac"].replace(":", ""), 16)
        source, machine = (mapped(ip) for ip in (self._ip(self.address(case)), self._ip(self.underlay["m1"])))
        datagram = udp(source, machine, 1000, FORBIDDEN, b"to the machine from " + name)
        frame = ip_frame(pk.BROADCAST, mac, source, machine, pk.UDP, datagram)
        self.senders[case] = [
            lambda: plain.sendto(name, (self.address("b"), ALLOWED)),
            lambda: plain.sendto(name, (self.address("b"), FORBIDDEN)),
            lambda: plain.sendto(name, (self.address("local"), FORBIDDEN)),
            lambda: raw.sendto(frame, ("eth0", 0)),
        ]

    @staticmethod
    def _ip(text: str) -> Any:
        from ipaddress import ip_address

        return ip_address(text)

    def _send(self) -> None:
        while not self._end.wait(0.005):
            for senders in list(self.senders.values()):
                for send in senders:
                    with suppress(OSError):  # its link is down, or has no address: that is the case
                        send()
                        self.sent += 1
            self.listen()

    def listen(self) -> None:
        for (where, port), ear in self.ears.items():
            while True:
                try:
                    text = ear.recv(100)
                except BlockingIOError:
                    break
                if port == FORBIDDEN:
                    self.forbidden.append((where, text))
                else:
                    self.heard[text.decode()] = self.heard.get(text.decode(), 0) + 1

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        for ear in self.ears.values():
            ear.close()

    def arrives(self, *cases: str) -> Callable[[], bool]:
        """Does what is allowed arrive from these ports, from now on?"""
        before = dict(self.heard)
        return lambda: all(self.heard.get(case, 0) > before.get(case, 0) + 2 for case in cases)

    def told(self) -> str:
        """What machines had to repair, a line each."""
        with Client(self.lab.controller) as client:
            events = [line["event"] for line in client.events(last=500) if line.get("event")]
        return "".join(f"{event['text']}\n" for event in events if event["kind"] == "repaired")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    file = tmp_path_factory.mktemp("lab") / "net.yaml"
    file.write_text(NET + "".join(f"      {case.replace('_', '-')}: {{segment: s, host: m1}}\n" for case in CASES))
    made = None
    try:
        nestnet("up", str(file), "--name", name)
        lab = state.load(name)
        assert lab is not None
        made = Site(lab)
        until(made.arrives(*CASES), "what is allowed does not arrive", 30)
        yield made
        assert made.forbidden == []
        assert made.sent > 1000
    finally:
        if made is not None:
            made.close()
        down(name)
    assert leftovers(name) == []


# ---- at the links of workloads


def ip(namespace: str, *lines: str) -> None:
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], input="\n".join(lines), text=True, check=True)


def index(namespace: Path, name: str) -> int:
    def find() -> int:
        with links.netlink() as ipr:
            found = links.find(ipr, name)
        assert found is not None, name
        return found.index

    return netns.run_in(namespace, find)


def hooked(namespace: Path, name: str) -> list[str]:
    """The programs on an interface; none if it is not there."""

    def look() -> list[str]:
        with links.netlink() as ipr:
            found = links.find(ipr, name)
        return on_hook(found.index) if found is not None else []

    try:
        return netns.run_in(namespace, look)
    except OSError:  # it went just now
        return []


def pin_of(site: Site, machine: str, namespace: str, name: str) -> Path:
    return site.lab.pins / machine / f"v{LAYOUT}" / f"link_{index(netns.path(namespace), name)}"


def take_off(pin: Path) -> None:
    with closing(Link(get(pin))) as link:
        link.detach()


STRANGER = """
#include "state.h"
SEC("tcx/ingress") int stranger(struct __sk_buff *skb) { return TC_ACT_NEXT; }
SEC("tcx/ingress") int unused(struct __sk_buff *skb) { return TC_ACT_OK + recording + driven; }
char _license[] SEC("license") = "GPL";
"""
BPF, LINK_CREATE, BEFORE = 321, 28, 1 << 3  # <asm/unistd_64.h>, <linux/bpf.h>


def put_before(program: int, ifindex: int) -> int:
    """A program at the head of a hook. Returns the link, which keeps it there."""
    attribute = ctypes.create_string_buffer(struct.pack("=IIIIIxxxxQ", program, ifindex, TCX_INGRESS, BEFORE, 0, 0), 64)
    made = ctypes.CDLL(None, use_errno=True).syscall(BPF, LINK_CREATE, attribute, 64)
    assert made >= 0, os.strerror(ctypes.get_errno())
    return int(made)


def break_all(site: Site, stranger: int) -> list[int]:
    """Each case at its own port. Returns what keeps the stranger's program on its hook."""
    m1 = netns.path(site.m1)
    end = site.end
    there = index(m1, end("behind_another"))
    kept = netns.run_in(m1, lambda: put_before(stranger, there))
    netns.run_in(m1, lambda: subprocess.run(["tc", "qdisc", "add", "dev", end("beside_clsact"), "clsact"], check=True))
    every = "protocol all u32 match u32 0 0 flowid 1:1"
    allow = ["tc", "filter", "add", "dev", end("beside_clsact"), "ingress", *every.split()]
    netns.run_in(m1, lambda: subprocess.run(allow, check=True))
    for case in ("detached", "behind_another", "beside_clsact"):
        take_off(pin_of(site, "m1", site.m1, end(case)))
    pin_of(site, "m1", site.m1, end("unpinned")).unlink()
    ip(
        site.m1,
        f"link del {end('link_deleted')}",
        f"link set {end('end_down')} down",
        f"link set {end('end_mtu')} mtu 1000",
        f"link set {end('end_alias')} alias mine",
        f"link set {end('end_renamed')} down",
        f"link set {end('end_renamed')} name mine0",
        "link set mine0 up",
    )
    off = {f"net/{family}/conf/{end('forwarding_off')}/forwarding": 0 for family in ("ipv4", "ipv6")}
    netns.run_in(m1, partial(links.set_sysctls, off))
    for case, line in (
        ("peer_down", "link set eth0 down"),
        ("peer_mtu", "link set eth0 mtu 700"),
        ("peer_mac", "link set eth0 address 02:00:00:00:99:99"),
        ("no_address", f"address del {site.address('no_address')}/24 dev eth0"),
        ("no_address", "address add 10.9.9.9/32 dev eth0"),
        ("no_routes", "route flush default"),
    ):
        ip(site.room(case).name, line)
    assert netns.delete(site.room("no_namespace").name)
    return [kept]


TOLD = {
    "detached": "the program of {end} had been taken off, it is back",
    "behind_another": "the program of {end} had been taken off, it is back",
    "beside_clsact": "the program of {end} had been taken off, it is back",
    "link_deleted": "its link had gone, it has a new one",
    "end_down": "{end} was down",
    "end_mtu": "MTU of {end}, sysctls of {end} had changed",
    "end_alias": "{end} had lost its alias",
    "forwarding_off": "sysctls of {end} had changed",
    "peer_down": "state of eth0, default routes of eth0 had changed",
    "peer_mtu": "MTU of eth0(, .*)? had changed",
    "peer_mac": "MAC of eth0, default routes of eth0 had changed",
    "no_address": "addresses of eth0, default routes of eth0 had changed",
    "no_routes": "default routes of eth0 had changed",
    "no_namespace": "its link had gone, it has a new one",
}


def test_what_happens_to_links_and_hooks_of_workloads_is_put_right(site: Site, tmp_path: Path) -> None:
    opened = Object(compiled(tmp_path / "bpf", STRANGER))
    opened.load()
    (stranger,) = (program for name, program in opened.programs().items() if name == "stranger")
    m1 = netns.path(site.m1)
    kept = break_all(site, stranger.fd)

    def whole(case: str) -> bool:
        name = "mine0" if case == "end_renamed" else site.end(case)
        return hooked(m1, name).count("workload") == 1 and case_is_right(case)

    def inside(case: str, *command: str) -> str:
        if not netns.exists(site.room(case).name):
            return ""
        return netns.run_in(
            site.room(case), lambda: subprocess.run(["ip", *command], stdout=-1, text=True, check=False).stdout
        )

    def case_is_right(case: str) -> bool:
        eth0 = inside(case, "address", "show", "dev", "eth0")
        return (
            f"inet {site.address(case)}/24" in eth0
            and f"link/ether {site.ports[case]['mac']}" in eth0
            and "mtu 1450" in eth0
            and ",UP" in eth0
            and "default via 10.0.0.1 dev eth0" in inside(case, "route")
        )

    broken = {case for case in CASES if case != "end_renamed"}
    took = {}
    begin = time.monotonic()

    while took.keys() != broken and time.monotonic() < begin + FOUND:
        told = site.told()
        for case in sorted(broken - took.keys()):
            if re.search(wanted(site, case), told, re.M) and whole(case):
                took[case] = time.monotonic() - begin
    print({case: round(seconds, 1) for case, seconds in took.items()})
    assert took.keys() == broken, [*problems(site), site.told()]
    # What others have put there is theirs.
    assert "inet 10.9.9.9/32" in inside("no_address", "address", "show", "dev", "eth0")
    assert hooked(m1, site.end("behind_another")) == ["stranger", "workload"]
    shown = ["tc", "filter", "show", "dev", site.end("beside_clsact"), "ingress"]
    assert "u32" in netns.run_in(m1, lambda: subprocess.check_output(shown, text=True))
    site.rewire("no_namespace")
    site.rewire("link_deleted")
    until(site.arrives(*CASES), "what is allowed does not arrive")
    for each in (*kept, stranger.fd):
        os.close(each)
    opened.close()


def wanted(site: Site, case: str) -> str:
    """What people are told of a case."""
    if case == "unpinned":
        return rf"^pins were missing in /sys/fs/bpf/\S+/m1/v{LAYOUT}, and are back: 1$"
    return f"^port {site.ports[case]['row']}: {TOLD[case].format(end=site.end(case))}$"


# ---- in the tables


COUNTED = (*(f"generation_{name}" for name in GENERATIONS), "epoch")


class Rewriting:
    """One machine's maps, under an agent that thinks them its own."""

    def __init__(self, site: Site, machine: str) -> None:
        self._pins = site.lab.pins / machine
        self.told = site.told

    def rows(self) -> dict[str, Rows]:
        with Kernel.open(self._pins, read_only=True) as kernel:
            return kernel.read()

    def write(self, name: str, keys: Any, values: Any) -> None:
        """Over what is there, or instead of it."""
        with closing(self._map(name, keys.dtype, values.dtype)) as opened:
            opened.update(keys, values)

    def delete(self, name: str, keys: Any) -> None:
        with closing(self._map(name, keys.dtype, TABLES[name].value)) as opened:
            if opened.type == ARRAY:
                opened.update(keys, np.zeros(len(keys), TABLES[name].value))
            else:
                assert opened.delete(keys) == len(keys)

    def _map(self, name: str, key: Any, value: Any) -> Map:
        return Map(get(self._pins / f"v{LAYOUT}" / name), key, value)

    def mended(self, before: dict[str, Rows], names: set[str]) -> bool:
        """Is all as it was, and has somebody been told of exactly these?"""
        now = self.rows()
        found = re.findall(r"^somebody had written to (.*): all is as it should be again$", self.told(), re.M)
        return all(now[name].tobytes() == before[name].tobytes() for name in TABLES) and any(
            (set(TABLES) if text == "every table" else set(text.split(", "))) == names for text in found
        )


def test_rows_that_are_deleted_come_back(site: Site) -> None:
    """All of every table but one after the other would not be quicker, so it is one of each at once. What is gone is
    closed: nothing is forwarded, or nothing allowed."""
    tables = Rewriting(site, "m1")
    before = tables.rows()
    assert all(len(rows) for rows in before.values()), {name: len(rows) for name, rows in before.items()}
    for name, rows in before.items():
        tables.delete(name, rows["key"][:1].copy())
    took = until(lambda: tables.mended(before, set(TABLES)), "rows are still missing")
    print(f"a row of each table is back after {took:.1f} s")
    until(site.arrives(*CASES), "what is allowed does not arrive")


def test_rows_that_are_altered_or_added_are_put_right(site: Site) -> None:
    """Each table's first row gets another value. Who turns policies off on one machine is obeyed until that is found,
    on that machine and on no other."""
    tables = Rewriting(site, "m2")  # where all that is forbidden goes, if its own machine lets it pass
    before = tables.rows()
    for name, rows in before.items():
        some = rows[:1].copy()
        raw = some["value"].view("u1").copy()
        raw[-1 if name == "machine" else 0] ^= 1
        tables.write(name, some["key"].copy(), raw.view(TABLES[name].value))
    for name in COUNTED:
        tables.write(name, np.array([0], "u4"), np.array([1 << 40], "u8"))
    took = until(lambda: tables.mended(before, set(TABLES)), "rows are still altered")
    print(f"a row of each table is as it was after {took:.1f} s")
    with Kernel.open(site.lab.pins / "m2", read_only=True) as kernel:
        assert all(int(kernel.rows(name)["value"][0]) < 1 << 40 for name in COUNTED)
    tables = Rewriting(site, "m1")
    before = tables.rows()
    everything = before["network"].copy()
    everything["value"]["rules"] = 0
    assert site.forbidden == []
    tables.write("network", everything["key"].copy(), everything["value"].copy())
    until(lambda: site.forbidden, "policies are not off")
    until(lambda: tables.mended(before, {"network"}), "policies are still off")
    until(site.arrives(*CASES), "what is allowed does not arrive")  # and what was on its way has been heard
    passed, site.forbidden = site.forbidden, []
    assert {where for where, _ in passed} == {"local"}


# ---- at the underlay, and in bpffs


def problems(site: Site) -> list[str]:
    with Client(site.lab.controller) as client:
        return [problem for machine in client.status()["machines"] for problem in machine["problems"]]


def test_the_underlay_is_put_right(site: Site) -> None:
    """The program on the NIC, and the address that others send to."""
    take_off(pin_of(site, "m2", site.m2, "eth0"))
    until(lambda: "eth0: its program had been taken off, it is back\n" in site.told(), "its program is still off")
    assert hooked(netns.path(site.m2), "eth0") == ["underlay"]
    until(site.arrives(*CASES), "what is allowed does not arrive")
    seat = next(seat for seat in site.lab.machines if seat.name == "m2")
    ip(site.m2, f"address del {seat.address} dev eth0")
    until(lambda: f"{seat.address} had gone from eth0, it is back\n" in site.told(), "its address is still gone")
    until(site.arrives(*CASES), "what is allowed does not arrive")
    until(lambda: problems(site) == [], "there are still problems")


def test_pins_that_are_gone_are_made_again(site: Site) -> None:
    """All of a machine's, folder and all. Programs stay where they are while their agent lives, so nothing is lost."""
    folder = site.lab.pins / "m1" / f"v{LAYOUT}"
    before = {path.name: path.readlink() if path.is_symlink() else None for path in folder.iterdir()}
    heard = dict(site.heard)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert hooked(netns.path(site.m1), site.end("detached")) == ["workload"]
    back = rf"^pins were missing in \S+/m1/v{LAYOUT}, and are back: \d{{2,}}$"
    until(lambda: re.search(back, site.told(), re.M), "no pins")
    assert {path.name: path.readlink() if path.is_symlink() else None for path in folder.iterdir()} == before
    until(site.arrives(*CASES), "what is allowed does not arrive")
    assert all(site.heard[case] > heard[case] for case in CASES)


def test_all_of_it_is_visible_in_events(site: Site) -> None:
    text = nestnet("events", "--last", "500", "--lab", site.lab.name).stdout.decode()
    assert re.search(r"^\d\d:\d\d:\d\d  repaired  m1: port \d+: \S+ was down$", text, re.M), text
