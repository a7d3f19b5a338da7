"""What /metrics of an agent says, and the small HTTP server that says it.

The agent's own thread measures, every turn; the server's threads only read what it left. So whoever asks, and however
often, costs the datapath nothing. Ports are known by their numbers here (`row` in `nestnet get port -o json`): an agent
knows no names. Series are bounded: the first PORTS ports have their own, the others share `port="other"`.
"""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nestnet import __version__
from nestnet.model.errors import Invalid, Problem
from nestnet.model.exposition import CONTENT_TYPE, Family, one, text

PORTS = 1000  # That have series of their own.
DIRECTIONS = (
    (
        "nestnet_port_transmit_packets_total",
        "out_packets",
        "Packets that a port's workload sent.",
    ),
    ("nestnet_port_transmit_bytes_total", "out_bytes", "Bytes that a port's workload sent."),
    ("nestnet_port_receive_packets_total", "in_packets", "Packets that were delivered to a port's workload."),
    ("nestnet_port_receive_bytes_total", "in_bytes", "Bytes that were delivered to a port's workload."),
)
RELAYED = (
    ("nestnet_relay_connections", "connections", "gauge", "Connections of a port's agent that are relayed now."),
    ("nestnet_relay_accepted_total", "accepted", "counter", "Connections of a port's agent that were accepted."),
    ("nestnet_relay_failed_total", "failed", "counter", "Those that did not reach the controller."),
    ("nestnet_relay_sent_bytes_total", "sent", "counter", "Bytes relayed from a port's agent to the controller."),
    ("nestnet_relay_received_bytes_total", "received", "counter", "Bytes relayed from the controller to it."),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What an agent measured at one moment. `traffic`, `drops` and `relayed` are by port id; 0 is no port of this
    machine."""

    realised: int | str = 0
    problems: int = 0
    held: bool = False
    connected: bool = False
    turns: int = 0
    turn: float = 0.0
    turns_took: float = 0.0
    remembered: Mapping[str, int] = field(default_factory=dict)
    composed: Mapping[str, int] = field(default_factory=dict)
    traffic: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    drops: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    relayed: Mapping[int, Mapping[str, int]] = field(default_factory=dict)


def families(now: Measured) -> Iterator[Family]:
    """All of it."""
    yield Family("nestnet_build_info", "gauge", "The version that runs.", [({"version": __version__}, 1)])
    if isinstance(now.realised, int):  # An agent on a port has no number for it.
        yield one("nestnet_realised_revision", "gauge", "Last revision that is wholly so here.", now.realised)
    yield one("nestnet_problems", "gauge", "What is in the way of the next.", now.problems)
    yield one(
        "nestnet_held_back", "gauge", "1: what a restored store would remove waits for `nestnet confirm`.", now.held
    )
    yield one("nestnet_feed_connected", "gauge", "1: the controller's feed is open.", now.connected)
    yield one("nestnet_turns_total", "counter", "Turns of the agent.", now.turns)
    yield one("nestnet_turn_seconds_total", "counter", "Time that all turns took.", now.turns_took)
    yield one("nestnet_turn_seconds", "gauge", "Time that the last turn took.", now.turn)
    for name, what in (("flow", "Flows that are composed."), ("connection", "Connections that are remembered.")):
        if name in now.remembered:
            yield one(f"nestnet_{name}s", "gauge", what, now.remembered[name])
    for name, value, what in (
        ("nestnet_flows_composed_total", "flows", "Flows composed, at first or again."),
        ("nestnet_carriages_composed_total", "carriages", "Ways from host to host composed, at first or again."),
    ):
        yield one(name, "counter", what, now.composed.get(value, 0))
    shown = set(sorted({port for port in (*now.traffic, *now.drops, *now.relayed) if port})[:PORTS])
    for name, value, what in DIRECTIONS:
        total: Counter[str] = Counter()
        for port, counts in now.traffic.items():
            total[_label(port, shown)] += counts[value]
        yield Family(name, "counter", what, [({"port": port}, count) for port, count in total.items()])
    drops: Counter[tuple[str, str]] = Counter()
    for port, reasons in now.drops.items():
        for reason, packets in reasons.items():
            drops[_label(port, shown), reason] += packets
    samples = [({"port": port, "reason": reason}, packets) for (port, reason), packets in drops.items()]
    yield Family("nestnet_drops_total", "counter", "Packets dropped; port 0: of no port here.", samples)

    for name, value, kind, what in RELAYED:
        total = Counter()
        for port, counts in now.relayed.items():
            total[_label(port, shown)] += counts[value]
        yield Family(name, kind, what, [({"port": port}, count) for port, count in total.items()])


def _label(port: int, shown: set[int]) -> str:
    return str(port) if port in shown or port == 0 else "other"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: Any, family: int, measured: Callable[[], Measured]) -> None:
        self.address_family = family
        self.measured = measured
        super().__init__(address, _Answer)

    def server_bind(self) -> None:
        # HTTPServer would look up its own name.
        if self.address_family != socket.AF_UNIX:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        connection.settimeout(5)
        return connection, address or ("local", 0)


class _Answer(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        found = self.path.partition("?")[0] == "/metrics"
        body = text(families(self.server.measured())).encode() if found else b"there is only /metrics\n"
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody wants a line for each scrape."""


def serve(listen: str, measured: Callable[[], Measured]) -> None:
    """Answer at unix:PATH or http://127.0.0.1:PORT, on threads that end with the process. Raises Invalid, OSError."""
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        path.unlink(missing_ok=True)  # Of an agent before this one: two cannot have one machine's datapath open.
        server = _Server(str(path), socket.AF_UNIX, measured)
    else:
        url = urlsplit(listen)
        try:
            address, port = ip_address(url.hostname or ""), url.port
        except ValueError:
            address, port = None, None
        if url.scheme != "http" or address is None or port is None or not address.is_loopback:
            message = f"cannot listen on {listen}: write unix:/PATH or http://127.0.0.1:PORT"
            raise Invalid([Problem("bad_value", "/metrics", message)])
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        server = _Server((str(address), port), family, measured)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
