"""Trunks and transparent segments of tenants, with real packets: at depth 1 and 3, flat and really stacked.

n1            carried by the wire        n1/n2, n1/n2/n3   flat        n1/e2, n1/e2/e3   encapsulated

up   on host a: native mgmt, 10: web     far  on host b, in web         wa, wb  on a and b, in a transparent segment
up2  on host b: native mgmt, 30: web
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import select
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from frames import ip_frame, udp
from test_lab import leftovers, nestnet
from test_namespaces import packet_socket, pending

from nestnet.agent import netns
from nestnet.api.client import Client
from nestnet.bench.tags import AD, Q, behind
from nestnet.lab.state import Lab, load
from nestnet.model import packet as pk

pytestmark = pytest.mark.root
BYTES = 4_000_003  # no multiple of any segment
NETWORKS = ["n1", "n1/n2/n3", "n1/e2/e3"]


def network(host_a: str, host_b: str, carried: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "segments": {
            "lan": {"cidr": "10.0.0.0/24"},
            "mgmt": {"cidr": "10.1.0.0/24"},
            "web": {"cidr": ["10.2.0.0/24", "fd02::/64"]},
            "wire": {"cidr": ["10.3.0.0/24", "fd03::/64"], "transparent": True},
        },
        "ports": {
            "a": {"segment": "lan", "host": host_a, "hosts": True},
            "b": {"segment": "lan", "host": host_b, "hosts": True},
            "up": {"native": "mgmt", "host": host_a, "vlans": {"10": "web"}},
            "up2": {"native": "mgmt", "host": host_b, "vlans": {"30": {"segment": "web"}}},
            "far": {"segment": "web", "host": host_b},
            "wa": {"segment": "wire", "host": host_a},
            "wb": {"segment": "wire", "host": host_b},
        },
        **({"networks": carried} if carried else {}),
        **more,
    }


def file() -> dict[str, Any]:
    flat = {"n2": network("a", "b", {"n3": network("a", "b")})}
    real = {"e2": network("a", "b", {"e3": network("a", "b", carriage="encapsulated")}, carriage="encapsulated")}
    return {
        "apiVersion": "nestnet/v1",
        "machines": {"m1": {}, "m2": {}},
        "networks": {"n1": network("m1", "m2", flat | real)},
    }


class Bed:
    def __init__(self, name: str) -> None:
        found = load(name)
        assert found is not None
        self.lab: Lab = found
        with Client(self.lab.controller) as client:
            self.ports = {port["path"]: port for port in client.list("port")}

    def place(self, path: str) -> Path:
        """Where the workload of a port is, or of its trunk."""
        return netns.path(self.lab.workload(self.ports[path.partition(".")[0]]["row"]))

    def address(self, path: str, family: int = 4) -> str:
        found = (one.partition("/")[0] for one in self.ports[path]["addresses"])
        return next(one for one in found if (":" in one) == (family == 6))

    def drops(self, path: str) -> dict[str, int]:
        with Client(self.lab.controller) as client:
            return dict((client.get("port", path)["attachment"] or {}).get("drops", {}))

    @contextlib.contextmanager
    def tagged(self, path: str, *tags: tuple[int, int]) -> Iterator[None]:
        """The workload of this port on a trunk has its addresses, and all it sends has the tags."""
        place = self.place(path)
        for address in self.ports[path]["addresses"]:
            add = ["ip", "address", "add", address, "dev", "eth0", *(["nodad"] if ":" in address else [])]
            netns.run_in(place, partial(subprocess.run, add, check=False))
        with behind(place, *tags):
            yield


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    path = tmp_path_factory.mktemp("vlans") / "net.yaml"
    path.write_text(json.dumps(file()))
    try:
        nestnet("up", str(path), "--name", name, "--timeout", "150")
        yield Bed(name)
    finally:
        nestnet("down", "--name", name)
    assert leftovers(name) == []


def ping(place: Path, address: str, *options: str) -> bool:
    command = ["ping", "-n", "-c", "1", "-W", "2", *options, address]
    return netns.run_in(place, lambda: subprocess.run(command, capture_output=True, check=False)).returncode == 0


def transfer(here: Path, there: Path, target: str) -> None:
    """A file, whole, in large packets for all that the sender knows."""
    content = random.Random(1).randbytes(BYTES)
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    got = hashlib.sha256()

    def receive(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(30)
        with connection:
            while data := connection.recv(1 << 18):
                got.update(data)

    def sent() -> tuple[int, int]:
        told = netns.run_in(here, partial(subprocess.check_output, ["ip", "-s", "-j", "link", "show", "eth0"]))
        counts = json.loads(told)[0]["stats64"]["tx"]
        return counts["bytes"], counts["packets"]

    with netns.run_in(there, lambda: socket.create_server((target, 7000), family=family)) as listener:
        listener.settimeout(30)
        thread = threading.Thread(target=receive, args=[listener])
        thread.start()
        before = sent()
        with netns.run_in(here, lambda: socket.create_connection((target, 7000), timeout=30)) as out:
            out.settimeout(60)
            out.sendall(content)
        thread.join(60)
        after = sent()
    assert got.digest() == hashlib.sha256(content).digest()
    assert (after[0] - before[0]) / (after[1] - before[1]) > 3000, "not in large packets"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("path", NETWORKS)
def test_a_file_goes_by_a_trunk(bed: Bed, path: str, family: int) -> None:
    up, far = bed.place(f"{path}/up.10"), bed.place(f"{path}/far")
    with bed.tagged(f"{path}/up.10", (Q, 10)):
        transfer(up, far, bed.address(f"{path}/far", family))
        transfer(far, up, bed.address(f"{path}/up.10", family))


@pytest.mark.parametrize("path", NETWORKS)
def test_tags_are_of_a_trunk_and_end_there(bed: Bed, path: str) -> None:
    """What leaves behind one tag arrives behind another, or behind none, and the native segment is another wire."""
    up, up2 = bed.place(f"{path}/up.10"), bed.place(f"{path}/up2.30")
    assert ping(up, bed.address(f"{path}/up2"))
    assert not ping(up, bed.address(f"{path}/far"), "-W", "0.3")
    with bed.tagged(f"{path}/up.10", (Q, 10)), bed.tagged(f"{path}/up2.30", (Q, 30)):
        assert ping(up, bed.address(f"{path}/up2.30"))
        transfer(up, up2, bed.address(f"{path}/up2.30"))
        assert not ping(up, bed.address(f"{path}/up2"), "-W", "0.3")
    with bed.tagged(f"{path}/up.10", (Q, 11)):
        assert not ping(up, bed.address(f"{path}/far"), "-W", "0.3")


@pytest.mark.parametrize(
    "tags", [(), ((Q, 10),), ((Q, 0),), ((AD, 7), (Q, 7))], ids=["none", "802.1Q", "priority", "QinQ"]
)
@pytest.mark.parametrize("path", NETWORKS)
def test_a_transparent_segment_carries_any_tags(bed: Bed, path: str, tags: tuple[tuple[int, int], ...]) -> None:
    """Neighbours are asked for behind the tags: nobody answers in their place."""
    wa, wb = bed.place(f"{path}/wa"), bed.place(f"{path}/wb")
    for place in (wa, wb):
        netns.run_in(place, partial(subprocess.check_call, ["ip", "neigh", "flush", "dev", "eth0"]))
    with behind(wa, *tags), behind(wb, *tags):
        for family in (4, 6):
            transfer(wa, wb, bed.address(f"{path}/wb", family))
            mtu, head = bed.ports[f"{path}/wb"]["mtu"], 28 if family == 4 else 48
            assert ping(wa, bed.address(f"{path}/wb", family), "-M", "do", "-s", str(mtu - head))


@pytest.mark.parametrize("path", NETWORKS)
def test_a_transparent_segment_has_room_for_its_tags(bed: Bed, path: str) -> None:
    assert bed.ports[f"{path}/wa"]["mtu"] == bed.ports[f"{path}/far"]["mtu"] - 8


def discover(mac: bytes, id: int) -> bytes:
    """A client asks for its address, behind a tag (RFC 2131)."""
    body = b"\x01\x01\x06\x00xid!" + bytes(20) + mac + bytes(202) + b"\x63\x82\x53\x63" + b"\x35\x01\x01\xff"
    ends = pk.UNSPECIFIED4, pk.LIMITED_BROADCAST
    frame = ip_frame(pk.BROADCAST, int.from_bytes(mac, "big"), *ends, pk.UDP, udp(*ends, 68, 67, body))
    return pk.tagged(frame, pk.tag(id))


@pytest.mark.parametrize("path", NETWORKS)
def test_who_asks_behind_a_tag_is_answered_behind_it(bed: Bed, path: str) -> None:
    """From the record of the port there, and not from the trunk's."""
    port = bed.ports[f"{path}/up.10"]
    with netns.run_in(bed.place(f"{path}/up"), partial(packet_socket, "eth0")) as client:
        pending(client)
        client.send(discover(bytes.fromhex(port["mac"].replace(":", "")), 10))
        limit = time.monotonic() + 5
        heard: list[bytes] = []
        while not any(b"xid!" in frame for frame in heard):
            assert time.monotonic() < limit, heard
            select.select([client], [], [], 0.5)
            heard += pending(client)
    (offer,) = (frame for frame in heard if b"xid!" in frame)
    tags, rest = pk.untagged(offer, 2)
    assert tags == pk.tag(10)
    assert rest[58:62] == IPv4Address(bed.address(f"{path}/up.10")).packed  # yiaddr
