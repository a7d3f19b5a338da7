"""Bringing a lab up: the wire, the machines, and the real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from ipaddress import ip_interface
from pathlib import Path
from typing import TYPE_CHECKING

from nestnet.agent import netns
from nestnet.lab.addresses import seats
from nestnet.lab.down import tear_down
from nestnet.lab.state import Lab, Process, locked
from nestnet.lab.wire import make_wire
from nestnet.model.errors import Conflict, Invalid, NestnetError, Problem, Unreachable
from nestnet.model.problems import join
from nestnet.model.validate import two_ways, underlay_family

if TYPE_CHECKING:
    from nestnet.model.manifest import Manifest

START = 20.0  # seconds that a process has until it is ready
LOGS, LOG_LINES = 2, 12  # of how many failed processes an error shows the logs, and how much of each

Say = Callable[[str], None]


def up(manifest: Manifest, name: str, file: str, apply: Callable[[Lab], None], say: Say = lambda _: None) -> Lab:
    """Make the machines of a manifest, start a controller and an agent on each, and `apply`.

    Raises Conflict when a lab of this name is up, Invalid when the manifest has no machines. Whatever else goes
    wrong, also in `apply`, everything is taken away again before it is raised.
    """
    if not manifest.machines:
        raise Invalid(
            [Problem("missing_key", "", "there is no machine: `machines: {m1: {}}` makes one", nearest="machines")]
        )
    if any(len(spec.nic or ()) > 1 for spec in manifest.machines.values()):
        tagged = [name for name, spec in manifest.machines.items() if spec.vlan is not None and spec.vlan.value]
        why = "machines with several interfaces are behind the router of a lab, which is in no VLAN"
        if tagged:
            raise Invalid([Problem("not_supported", join("machines", each, "vlan"), why) for each in tagged])
    for machine, spec in manifest.machines.items():
        if problems := list(two_ways(machine, spec.nic or ("eth0",), spec.trunks or {})):
            raise Invalid(problems)
    with locked(name) as found:
        if (found.folder / "lab.json").exists() or found.namespaces():
            if not any(process.alive() for process in found.processes):
                raise Conflict(
                    f"lab {name} is left over, and nothing of it runs: `nestnet down --name {name}` takes it away",
                    "lab_is_up",
                )
            raise Conflict(
                f"lab {name} is up: `nestnet apply {file or 'FILE'} --lab {name}` changes it, "
                f"`nestnet down --name {name}` takes it away",
                "lab_is_up",
            )
        lab = Lab(name, file, tuple(seats(manifest.machines, underlay_family(manifest) or 4)))
        try:
            lab.save()
            lab.logs.mkdir()
            say(f"wire and {len(lab.machines)} machines")
            make_wire(lab)
            say("controller and agents")
            lab = start(lab)
            apply(lab)
        except BaseException as error:
            # Read the logs before they are taken away.
            explained = _explain(lab, error)
            tear_down(lab)
            if explained is not None:
                raise explained from error
            raise
        return lab


def start(lab: Lab) -> Lab:
    """Start the controller, declare the machines, start the agents; wait until the controller answers."""
    from nestnet.api.client import Client

    command = [sys.executable, "-m", "nestnet"]
    controller = _spawn(
        lab,
        "controller",
        [
            *command,
            *("controller", "--listen", lab.controller, "--listen", lab.relayed),
            *("--state", str(lab.folder / "controller")),
        ],
    )
    lab = replace(lab, processes=(Process.of("controller", controller.pid),))
    lab.save()
    with Client(lab.controller) as client:
        _wait_until_ready(controller, client.status)
        for seat in lab.machines:
            vlan = asdict(seat.vlan) if seat.vlan is not None else None
            client.join(seat.name, str(ip_interface(seat.address).ip), seat.mtu, nics=seat.nics, vlan=vlan)
    for seat in lab.machines:
        agent = _spawn(
            lab,
            f"agent-{seat.name}",
            [
                *command,
                "agent",
                *("--machine", seat.name, "--controller", lab.controller),
                *("--pins", str(lab.pins / seat.name), "--workloads", lab.workloads),
                *("--metrics", f"unix:{lab.metrics(seat.name)}", "--guests", str(lab.folder / "guests")),
                *("--relay", lab.relayed.removeprefix("https+")),
            ],
            netns.path(lab.machine(seat.name)),
        )
        lab = replace(lab, processes=(*lab.processes, Process.of(f"agent-{seat.name}", agent.pid)))
        lab.save()
    return lab


def _spawn(lab: Lab, name: str, command: Sequence[str], namespace: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a process of the lab in its own session, with its log in the state folder."""
    # The package this process runs is the one its children run, installed or not.
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with (lab.logs / f"{name}.log").open("ab") as log:
        return netns.spawn(namespace or Path("/proc/self/ns/net"), command, output=log, environment=environment)


def _wait_until_ready(process: subprocess.Popen[bytes], ask: Callable[[], object]) -> None:
    """Ask until there is an answer, as long as the process lives. Raises Unreachable when there is none."""
    limit = time.monotonic() + START
    while True:
        try:
            ask()
            return
        except Unreachable:
            if process.poll() is not None:
                raise Unreachable(f"the controller ended with status {process.returncode}") from None
            if time.monotonic() > limit:
                raise Unreachable(f"the controller does not answer {START:g} s after its start") from None
            time.sleep(0.02)  # the pace of asking; the wait is for the answer


def _explain(lab: Lab, error: BaseException) -> NestnetError | None:
    """The error with the last lines of the logs of those that have ended; None when none has."""
    if not isinstance(error, NestnetError) or isinstance(error, Invalid):
        return None
    dead = [process for process in lab.processes if not process.alive()][:LOGS]
    if not dead:
        return None
    parts = [str(error)]
    for process in dead:
        log = lab.logs / f"{process.name}.log"
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
        parts += [f"{process.name} has ended; its log says:", *(f"  {line}" for line in lines)]
    explained = type(error).__new__(type(error))
    explained.__dict__.update(error.__dict__)
    explained.message = "\n".join(parts)
    return explained
