"""`nestnet trace --live`: one marked packet, and where it was seen."""

from __future__ import annotations

import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestnet.cli.find import Target, listening, needs_lab, workload
from nestnet.model.errors import Conflict

if TYPE_CHECKING:
    from nestnet.lab.probe import Passed, Witness
    from nestnet.lab.state import Lab

LATE = 5.0  # seconds that an agent needs at most until its metrics tell of a drop
PACE = 0.1  # seconds between two looks at them


def follow(found: Target, port: str, address: str, protocol: str, number: int) -> dict[str, Any]:
    """Send a packet from a port's workload and say where it went: `seen`, in order, `delivered` to a port that has the
    address, or else `dropped` by which machine, for which reason."""
    from nestnet.lab import probe

    lab = needs_lab(found)
    with found.client() as client:
        sender = client.get("port", port)
        network = sender["network"]
        places, target = {}, None
        for one in client.list("port"):
            try:
                at = listening(lab, one)
            except Conflict:  # it has no workload
                continue
            places[f"port {one['path']}"] = probe.Witness(at.path, at.interface, at.outside)
            if one["network"] == network and address in [text.partition("/")[0] for text in one["addresses"]]:
                target = f"port {one['path']}"
    for machine, nic, witness in _nics(lab):
        places[f"{machine} {nic}"] = witness
    nowhere = probe.Witness(workload(lab, sender).path, "lo")
    what = probe.Probe(
        workload(lab, sender).path, places[target] if target else nowhere, ip_address(address), protocol, number
    )
    before = _drops(lab)
    seen, error = probe.follow(what, places)
    # Whoever is pinged answers with the same bytes: what goes back is another packet.
    seen = [one for one in seen if not _answers(one, str(address))]
    seen.sort(key=lambda one: (one.place.startswith("port "), not one.out, one.ms))  # on its way, as it passes them
    arrived = [one.place for one in seen if places[one.place].outside == one.out and one.place.startswith("port ")]
    steps = [_told(one) for one in seen if one.place in arrived or not one.place.startswith("port ")]
    return {
        "seen": steps,
        "delivered": arrived,
        "dropped": [] if target in arrived else _new_drops(lab, before),
        "error": error,
    }


def text(live: Mapping[str, Any]) -> str:
    """The same for a person."""
    seen = [
        f"  {one['ms']:7.1f} ms  {one['what']} {one['place']}  {one['bytes']} bytes{one['outer']}"
        for one in live["seen"]
    ]
    dropped = [f"  {one['machine']} dropped {one['packets']}: {one['reason']}" for one in live["dropped"]]
    error = [f"  could not be sent: {live['error']}"] if live["error"] else []
    lines = ["", "live: a packet that nobody else sends, now", *seen, *error, *dropped]
    lines.append(f"live: delivered to {', '.join(live['delivered'])}" if live["delivered"] else "live: not delivered")
    return "\n".join(lines)


def _answers(one: Passed, address: str) -> bool:
    """Does this come from where the packet was sent to?"""
    from nestnet.model import packet as pk

    read = pk.parse(one.frame)
    if not one.place.startswith("port ") and read.is_carriage and (carried := pk.decapsulate(read)) is not None:
        read = pk.parse(carried.frame)
    return read.flow.source == pk.mapped(ip_address(address))


def _nics(lab: Lab) -> Iterator[tuple[str, str, Witness]]:
    from nestnet.agent import netns
    from nestnet.lab.probe import Witness

    for seat in lab.machines:
        for nic in seat.nics:
            yield seat.name, nic, Witness(netns.path(lab.machine(seat.name)), nic)


def _told(one: Passed) -> dict[str, Any]:
    from nestnet.model import packet as pk

    outer = ""
    read = pk.parse(one.frame)
    if not one.place.startswith("port ") and read.is_carriage and (carried := pk.decapsulate(read)) is not None:
        outer = f", UDP {read.flow.source_port} to {read.flow.target_port}, VXLAN, VNI {carried.vni}"
    what = "leaves" if one.out and not one.place.startswith("port ") else "reaches"
    return {
        "place": one.place,
        "what": what,
        "ms": one.ms,
        "bytes": len(one.frame),
        "outer": outer,
        "frame": one.frame.hex(),
    }


def _new_drops(lab: Lab, before: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    """What machines have dropped since, as soon as one tells of any."""
    end = time.monotonic() + LATE
    while not (new := _drops(lab) - before) and time.monotonic() < end:
        time.sleep(PACE)  # the pace of looking
    return [{"machine": m, "reason": reason, "packets": packets} for (m, reason), packets in sorted(new.items())]


def _drops(lab: Lab) -> Counter[tuple[str, str]]:
    """(machine, reason) -> packets, as agents' metrics tell now."""
    found: Counter[tuple[str, str]] = Counter()
    for seat in lab.machines:
        for reason, packets in re.findall(
            r'^nestnet_drops_total\{.*reason="(\w+)"\} (\d+)', _metrics(lab, seat.name), re.M
        ):
            found[seat.name, reason] += int(packets)
    return found


def _metrics(lab: Lab, machine: str) -> str:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(LATE)
            connection.connect(str(Path(lab.metrics(machine))))
            http = HTTPConnection("agent")
            http.sock = connection
            http.request("GET", "/metrics")
            return http.getresponse().read().decode()
    except OSError:
        return ""  # its agent has ended: it counts on, and tells nobody
