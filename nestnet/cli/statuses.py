"""`nestnet status`: the verdict first, then the machines, then only what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nestnet.cli import output
from nestnet.cli.waiting import plain_problem

SILENT = 15.0  # seconds without a report after which a machine is taken for silent


def problems(status: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong, a line each; empty when all is well."""
    found = []
    for machine in status["machines"]:
        name, age = machine["name"], machine.get("reported")
        if age is None:
            found.append(f"{name} has never reported: is its agent running?")
            continue
        if age > SILENT:
            found.append(f"{name} has been silent for {age:.0f} s: is its agent running?")
        found += [f"{name}: {plain_problem(problem)}" for problem in machine["problems"]]
    return found


def drops(ports: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Dropped packets by reason, of all ports that machines have reported."""
    total: Counter[str] = Counter()
    for port in ports:
        total.update((port.get("attachment") or {}).get("drops") or {})
    return total


def down(networks: Iterable[Mapping[str, Any]], ports: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Networks and ports that are not up, and why; no ports of networks that are down as a whole."""
    found = [_down(network) for network in networks if network["state"] != "up"]
    whole = {one["path"] for one in found if one["state"] != "degraded"}
    return found + [_down(port) for port in ports if port["state"] != "up" and port["network"] not in whole]


def _down(resource: Mapping[str, Any]) -> dict[str, Any]:
    return {key: resource[key] for key in ("kind", "path", "state", "cause")}


def show(status: Mapping[str, Any], ports: Sequence[Mapping[str, Any]], networks: Sequence[Mapping[str, Any]]) -> bool:
    """Print the status for a person. True when all is well."""
    wrong = problems(status)
    machines, revision = status["machines"], status["revision"]
    if wrong:
        at = "" if revision is None else f" at revision {revision}"
        print(f"{len(wrong)} {'problem' if len(wrong) == 1 else 'problems'}{at}")
        for line in wrong:
            print(f"  {line}")
    else:
        there = sum(machine["current"] for machine in machines)
        what = "what concerns you" if revision is None else f"revision {revision}"
        print(f"well: {there} of {len(machines)} machines have realised {what}")
    if machines:
        print()
        here = Counter(port["machine"] for port in ports if port.get("attachment"))
        headings = ("MACHINE", "ADDRESS", "REALISED", "REPORTED", "WORKLOADS", "PROBLEMS")
        output.table(headings, (_row(machine, here[machine["name"]]) for machine in machines))
    if fallen := down(networks, ports):
        print()
        rows = ((f"{one['kind']} {one['path']}", one["state"], one["cause"]) for one in fallen)
        output.table(("DOWN", "STATE", "CAUSE"), rows)
    if dropped := drops(ports):
        print()
        output.table(("DROPPED", "PACKETS"), ((reason, str(packets)) for reason, packets in dropped.most_common()))
    return not wrong


def _row(machine: Mapping[str, Any], workloads: int) -> tuple[str, ...]:
    at, age = machine["realised"], machine.get("reported")
    done = "all" if machine["current"] else "-" if age is None else "not all"
    return (
        str(machine["name"]),
        output.plain(machine.get("address")),
        done if at is None else str(at),
        "never" if age is None else f"{age:.0f} s ago",
        str(workloads),
        str(len(machine["problems"])),
    )
