"""`nestnet status`: the verdict first, then the machines, then only what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from nestnet.cli import output
from nestnet.cli.waiting import plain_problem, realised

SILENT = 15.0  # seconds without a report after which a machine is taken for silent


def problems(status: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong, a line each; empty when all is well."""
    found = []
    for machine in status["machines"]:
        name, at, age = machine["name"], realised(machine), machine.get("age")
        if at < 0:
            found.append(f"{name} has never reported: is its agent running?")
            continue
        if age is not None and age > SILENT:
            found.append(f"{name} has been silent for {age:.0f} s: is its agent running?")
        wanted = machine.get("wanted")
        if wanted is not None and at < wanted:
            found.append(f"{name} is at revision {at}, and should be at {wanted}")
        found += [f"{name}: {plain_problem(problem)}" for problem in machine.get("problems") or ()]
    return found


def drops(status: Mapping[str, Any]) -> Counter[str]:
    """Dropped packets of all machines by reason."""
    total: Counter[str] = Counter()
    for machine in status["machines"]:
        for port in (machine.get("ports") or {}).values():
            if isinstance(port, Mapping):
                total.update({str(reason): int(packets) for reason, packets in (port.get("drops") or {}).items()})
    return total


def show(status: Mapping[str, Any]) -> bool:
    """Print the status for a person. True when all is well."""
    wrong = problems(status)
    machines = status["machines"]
    revision = status["revision"]
    if wrong:
        print(f"{len(wrong)} problem{'s' if len(wrong) > 1 else ''} at revision {revision}:")
        for line in wrong:
            print(f"  {line}")
    elif machines:
        print(f"well: {len(machines)} machine{'s' if len(machines) > 1 else ''} at revision {revision}")
    else:
        print(f"well: no machines, revision {revision}")
    if machines:
        print()
        output.table(("MACHINE", "ADDRESS", "REALISED", "REPORTED", "WORKLOADS", "PROBLEMS"), map(_row, machines))
    if dropped := drops(status):
        print()
        output.table(("DROPPED", "PACKETS"), ((reason, str(packets)) for reason, packets in dropped.most_common()))
    return not wrong


def _row(machine: Mapping[str, Any]) -> tuple[str, ...]:
    at, age = realised(machine), machine.get("age")
    ports = machine.get("ports")
    return (
        str(machine["name"]),
        output.plain(machine.get("address")),
        "-" if at < 0 else str(at),
        "never" if age is None else f"{age:.0f} s ago",
        "-" if ports is None else str(len([port for port in ports if port != "0"])),
        str(len(machine.get("problems") or ())),
    )
