"""Agents inside: in a lab, the workload of a port that is to run an agent gets one, in the port's own namespace.

    machine m1
      agent of m1, which has these guests
      p17 --- eth0   in PREFIX17
                     agent on port 17, which has guests in turn
                     p23 --- eth0   in PREFIX23
                                    agent on port 23

Outside a lab whoever has the workload, a container or a virtual machine, starts its agent there by itself. Here the
machine below does: it asks the controller for a join token (it vouches for what hangs on its ports; its root could read
all of that anyhow), and starts the process, which joins and works by the relay on its own port like any other.

A guest outlives the agent that started it, and its own datapath outlives the guest. One that has ended is started
again; one whose port has moved, and its namespace with it, is the new machine's guest. So all agents of a lab have one
folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nestnet.agent import netns
from nestnet.model.errors import NestnetError
from nestnet.model.values import RELAY, RELAY_PORT

if TYPE_CHECKING:
    from nestnet.api.client import Client

PAUSE = 2.0  # Seconds from one start to the next, at least.
TTL = 600.0  # Seconds that a join token counts.


@dataclass(frozen=True, slots=True)
class Place:
    """Where a guest runs: the namespace of its port's workload, and the port's interface in there."""

    namespace: str
    interface: str


class Guests:
    """`folder` keeps their keys and logs, `pins` is a folder of bpffs; `prefix` is of the names of the namespaces of
    workloads, theirs and their own."""

    def __init__(
        self, folder: Path, pins: Path, prefix: str, machine: str, client: Client, say: Callable[[str], None]
    ) -> None:
        self._folder, self._pins, self._prefix = folder, pins, prefix
        self._machine, self._client, self._say = machine, client, say
        self._started: dict[int, float] = {}  # by port, in monotonic seconds

    def keep(self, places: Mapping[int, Place]) -> list[str]:
        """See to it that these ports have a guest, and that nothing is left of those whose ports are gone. Returns what
        is in the way."""
        problems = []
        for port, place in places.items():
            if self._lives(port) or time.monotonic() - self._started.get(port, -PAUSE) < PAUSE:
                continue
            self._started[port] = time.monotonic()
            try:
                with netns.held(place.namespace):  # while it moves, another machine has it, too
                    if not self._lives(port):
                        self._start(port, place)
            except (OSError, NestnetError) as error:
                problems.append(f"port {port}: no agent inside: {error}")
        for port in [int(entry.name) for entry in self._kept() if int(entry.name) not in places]:
            if not netns.exists(f"{self._prefix}{port}") and not self._lives(port):
                shutil.rmtree(self._pins / f"guest-{port}", ignore_errors=True)
                shutil.rmtree(self._folder / str(port), ignore_errors=True)
                self._started.pop(port, None)
        return problems

    def _kept(self) -> list[Path]:
        with suppress(FileNotFoundError):
            return [entry for entry in self._folder.iterdir() if entry.name.isdecimal()]
        return []

    def _start(self, port: int, place: Place) -> None:
        folder = self._folder / str(port)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        url = f"https://[{RELAY}%{place.interface}]:{RELAY_PORT}"
        state, token = folder / "state", folder / "token"
        if not (state / "own.pem").exists():
            invited = self._client.invite(self._machine, port, TTL)
            token.touch(0o600)
            token.write_text(invited["token"])
            (folder / "machine").write_text(invited["machine"])
        command = [sys.executable, "-m", "nestnet", "agent", "--machine", (folder / "machine").read_text()]
        command += ["--controller", url, "--state", str(state), "--token-file", str(token)]
        command += ["--pins", str(self._pins / f"guest-{port}"), "--workloads", self._prefix]
        command += ["--guests", str(self._folder)]
        with (folder / "log").open("ab") as log:
            process = netns.spawn(netns.path(place.namespace), command, output=log, environment=os.environ)
        started = _start_time(process.pid)
        (folder / "process").write_text(json.dumps([process.pid, started]))
        self._say(f"port {port}: started an agent inside {place.namespace}, process {process.pid}")

    def _lives(self, port: int) -> bool:
        pid, started = self._process(port)
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # One that this agent has started, and that has ended.
        return bool(pid) and _start_time(pid) == started

    def _process(self, port: int) -> tuple[int, int]:
        try:
            pid, started = json.loads((self._folder / str(port) / "process").read_text())
        except (FileNotFoundError, ValueError):
            return 0, 0
        return int(pid), int(started)


def _start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when there is none, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
