"""Probes: what a check takes for having arrived, on a plain wire without nestnet.

n1 (10.0.0.1, fd00::1) ---- eth0 veth eth0 ---- n2 (10.0.0.2, fd00::2)
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest

from nestnet.agent import links, netns
from nestnet.lab.probe import AT_ONCE, Probe, Witness, checksum, run

pytestmark = pytest.mark.root


@pytest.fixture
def ends() -> Iterator[tuple[Path, Path]]:
    name = f"nntest-{uuid.uuid4().hex[:8]}"
    n1, n2 = netns.create(f"{name}.1"), netns.create(f"{name}.2")

    def make() -> None:
        with links.netlink() as ipr:
            links.make_veth(ipr, "eth0", "eth0", n2, mtu=1500)

    netns.run_in(n1, make)
    for number, path in ((1, n1), (2, n2)):
        netns.run_in(path, lambda number=number: _address(number))  # type: ignore[misc]
    limit = time.monotonic() + 30
    while not all(_hears(path, number) for number, path in ((1, n1), (2, n2))):
        assert time.monotonic() < limit
    yield n1, n2
    for left in netns.names(name):
        netns.delete(left)


def _address(number: int) -> None:
    with links.netlink() as ipr:
        link = links.find(ipr, "eth0")
        assert link is not None
        links.set_addresses(ipr, link.index, [ip_interface(f"10.0.0.{number}/24"), ip_interface(f"fd00::{number}/64")])
        ipr.link("set", index=link.index, state="up")


def _hears(path: Path, number: int) -> bool:
    """The kernel takes a while to tell IPv6 of a carrier, seconds while many other links come and go."""
    command = ["ip", "-6", "route", "show", "table", "local", f"fd00::{number}"]
    return "local" in netns.run_in(path, lambda: subprocess.check_output(command, text=True))


@pytest.mark.parametrize("address", ["10.0.0.2", "fd00::2"])
@pytest.mark.parametrize(("protocol", "port"), [("icmp", 0), ("tcp", 5432), ("udp", 53)])
def test_a_packet_that_arrives_is_seen(ends: tuple[Path, Path], address: str, protocol: str, port: int) -> None:
    n1, n2 = ends
    [seen] = run([Probe(n1, Witness(n2), ip_address(address), protocol, port)])
    assert seen.arrived
    assert seen.ms is not None
    assert seen.error is None


def test_the_kernel_takes_what_is_sent_for_good(ends: tuple[Path, Path]) -> None:
    """Checksums are right: a listener takes the SYN, and answers it."""
    n1, n2 = ends
    listener = netns.spawn(
        n2, [sys.executable, "-c", "import socket, time; s = socket.create_server(('10.0.0.2', 80)); time.sleep(60)"]
    )
    try:
        limit = time.monotonic() + 10
        while ":80 " not in netns.run_in(n2, lambda: subprocess.check_output(["ss", "-ltn"], text=True)):
            assert time.monotonic() < limit
        before = _counter(n2, "TcpPassiveOpens"), _counter(n2, "TcpInCsumErrors"), _counter(n2, "TcpOutSegs")
        assert run([Probe(n1, Witness(n2), ip_address("10.0.0.2"), "tcp", 80)])[0].arrived
        limit = time.monotonic() + 5
        while _counter(n2, "TcpOutSegs") == before[2]:
            assert time.monotonic() < limit, "nothing was answered"
        assert _counter(n2, "TcpInCsumErrors") == before[1]
    finally:
        listener.kill()
        listener.wait()


def _counter(namespace: Path, name: str) -> int:
    text = netns.run_in(namespace, lambda: subprocess.check_output(["nstat", "-asz", name], text=True))
    return int(text.split()[-2])


def test_what_nobody_delivers_is_not_seen_and_all_wait_together(ends: tuple[Path, Path]) -> None:
    n1, n2 = ends
    start = time.monotonic()
    seen = run([Probe(n1, Witness(n2), ip_address("10.0.0.77"), "icmp")] * 5, patience=0.6)
    assert [each.arrived for each in seen] == [False] * 5
    assert time.monotonic() - start < 2


def test_more_than_a_shell_lets_a_program_open(ends: tuple[Path, Path]) -> None:
    """In turns, and each finds its own."""
    n1, n2 = ends
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[0]), before[1]))
    try:
        there, nobody = Witness(n2), Witness(n2, outside=True)
        probes = [
            Probe(n1, there if n != 50 else nobody, ip_address("10.0.0.2"), "udp", 9) for n in range(AT_ONCE + 500)
        ]
        assert [each.arrived for each in run(probes)] == [n != 50 for n in range(len(probes))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_sender_without_a_route_says_so(ends: tuple[Path, Path]) -> None:
    n1, n2 = ends
    [seen] = run([Probe(n1, Witness(n2), ip_address("198.51.100.1"), "udp", 9)], patience=0.3)
    assert not seen.arrived
    assert seen.error == "Network is unreachable"


def test_only_the_workload_that_is_asked_about_is_a_witness(ends: tuple[Path, Path]) -> None:
    """n2 answers, but the question was whether n1 itself sees what it sent."""
    n1, _ = ends
    [seen] = run([Probe(n1, Witness(n1), ip_address("10.0.0.2"), "udp", 9)], patience=0.5)
    assert not seen.arrived


def test_what_leaves_can_be_watched_for(ends: tuple[Path, Path]) -> None:
    """As on a tap, where what the workload gets goes out."""
    n1, _ = ends
    witnesses = [Witness(n1, "eth0", outside=True), Witness(n1, "eth0")]
    out, into = run([Probe(n1, at, ip_address("10.0.0.2"), "udp", 9) for at in witnesses], patience=0.5)
    assert out.arrived
    assert not into.arrived


def test_checksum_of_rfc_1071() -> None:
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xDDF2 & 0xFFFF
