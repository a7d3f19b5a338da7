"""`nestnet doctor`: what is wrong, and what mends it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from ipaddress import ip_interface

from nestnet.agent import checkup
from nestnet.agent.checkup import Finding, Seat
from nestnet.cli import output as out
from nestnet.cli import statuses
from nestnet.cli.find import Target, target
from nestnet.cli.formats import Format
from nestnet.model.errors import NestnetError, Unreachable

LATE = 10.0  # seconds that a machine may need for a revision


def doctor(lab: str | None, output: Format) -> bool:
    """Print every finding. True when nothing is wrong that has to be mended."""
    found = list(_all(lab))
    wrong = [finding for finding in found if finding.fix and not finding.warning]
    warned = [finding for finding in found if finding.fix and finding.warning]
    if output in (Format.json, Format.yaml):
        out.data(out.versioned("Checkup", {"well": not wrong, "findings": [asdict(one) for one in found]}), output)
        return not wrong
    rows = []
    for finding in sorted(found, key=lambda one: (not one.fix, one.warning)):
        word = "well" if not finding.fix else "warning" if finding.warning else "WRONG"
        rows.append((word, finding.check, finding.text))
    out.table(("", "CHECK", "FOUND"), rows, {"WRONG": "red", "warning": "yellow"})
    for finding in [*wrong, *warned]:
        print(f"\n{finding.check}: {finding.text}\n  {finding.fix}")
    return not wrong


def _all(lab: str | None) -> Iterator[Finding]:
    yield from checkup.computer()
    yield from _leftovers()
    try:
        found = target(lab)
    except Unreachable as error:
        yield Finding("controller", str(error), "nestnet up FILE, or set NESTNET_CONTROLLER", warning=True)
        return
    try:
        yield from _controller(found)
    except NestnetError as error:
        yield Finding("controller", str(error), _start(found))


def _start(found: Target) -> str:
    if found.lab is not None:
        return f"nestnet down --name {found.lab.name}, then up again; its log is in {found.lab.logs}"
    return "systemctl restart nestnet-controller; journalctl -u nestnet-controller says why it ended"


def _controller(found: Target) -> Iterator[Finding]:
    with found.client() as client:
        begun = time.monotonic()
        status = client.status()
        took = (time.monotonic() - begun) * 1000
        machines = {machine["name"]: machine for machine in client.list("machine")}
    yield Finding("controller", f"version {status['controller']}, answers in {took:.0f} ms")
    yield checkup.clock(time.time(), status["time"])
    wrong = statuses.problems(status)
    for problem in wrong:
        fix = "nestnet confirm, when what is missing has been applied" if "held back" in problem else "nestnet logs"
        yield Finding("agents", problem, fix)
    what = "what concerns you" if status["revision"] is None else f"revision {status['revision']}"
    late = [m["name"] for m in status["machines"] if not m["current"]]
    if late and not wrong:
        yield Finding("agents", f"{', '.join(late[:10])} are behind {what}", "nestnet logs", True)
    if not late and not wrong:
        yield Finding("agents", f"all {len(machines)} have realised {what}")
    if found.lab is None:
        return
    from nestnet.agent import netns

    for seat in found.lab.machines:
        namespace = netns.path(found.lab.machine(seat.name))
        known = machines.get(seat.name, {"mtu": seat.mtu, "vlan": seat.vlan, "trunks": seat.trunks})
        address, tagged = str(ip_interface(seat.address).ip), known["vlan"] is not None
        trunks = tuple(known["trunks"].values())
        place = Seat(seat.name, namespace, found.lab.pins / seat.name, address, tagged, trunks)
        yield from checkup.machine(place, known["mtu"])
        if not found.lab.has_agent(seat.name):
            log = found.lab.logs / f"agent-{seat.name}.log"
            yield Finding(
                "agents", f"the agent of {seat.name} has ended: what it forwards it forwards on", f"tail {log}"
            )


def _leftovers() -> Iterator[Finding]:
    from nestnet.agent import netns
    from nestnet.lab import state

    known = [state.load(name) for name in state.labs()]
    alive = {lab.name for lab in known if lab is not None and (lab.folder / "lab.json").exists()}
    spaces = {name for lab in known if lab is not None and lab.name in alive for name in lab.namespaces()}
    strays = [name for name in netns.names(state.PREFIX) if name not in spaces]
    pins = []
    if state.BPFFS.exists():
        pins = [folder for folder in sorted(state.BPFFS.iterdir()) if folder.is_dir() and folder.name not in alive]
    yield from checkup.leftovers(strays, pins)
    for lab in known:
        if lab is not None and lab.name in alive and lab.processes and not any(p.alive() for p in lab.processes):
            text = f"lab {lab.name} has no process left"
            yield Finding("leftovers", text, f"nestnet down --name {lab.name}", warning=True)
