"""How resources are shown: -o table, wide, json, yaml or name. Data goes to stdout, all else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from nestnet.cli.formats import Format
from nestnet.cli.kinds import KINDS
from nestnet.model.rates import rate_text

if TYPE_CHECKING:
    from rich.console import Console

API_VERSION = "nestnet/v1"
UNBOUNDED = 100_000  # columns of an output that is no terminal: lines are never folded for a program


Resource = Mapping[str, Any]
Cell = Callable[[Resource], str]


def _text(key: str, missing: str = "-") -> Cell:
    def cell(resource: Resource) -> str:
        return plain(resource.get(key), missing)

    return cell


def _rate(resource: Resource) -> str:
    rate = resource.get("rate")
    return rate_text(rate) if rate else "-"


def _until(token: Resource) -> str:
    until = token["until"]
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(until)) if until is not None else "-"


def _of_quota(what: str) -> Cell:
    def cell(tenant: Resource) -> str:
        limit, text = tenant["quota"][what], rate_text if what == "rate" else str
        if what == "rate" and limit is None:
            return "-"  # What it would count under a limit says nothing.
        return text(tenant["used"][what]) + (f" of {text(limit)}" if limit is not None else "")

    return cell


def plain(value: object, missing: str = "-") -> str:
    """One value as a person reads it."""
    if value is None or value == [] or value == {} or value == "":
        return missing
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={plain(each)}" for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(each) for each in value)
    return str(value)


def _used(resource: Resource) -> str:
    """'3 of 5 networks, 7 ports'"""
    told = []
    for what, used in resource["used"].items():
        limit = resource["quota"][what]
        if used or limit is not None:
            told.append(f"{used}{'' if limit is None else f' of {limit}'} {what}")
    return ", ".join(told) or "-"


def _state_of_grant(grant: Resource) -> str:
    if grant["ends"] is not None:
        return "gone " + time.strftime("%Y-%m-%d %H:%M", time.localtime(grant["ends"]))
    return "cut" if grant["cut"] else "suspended" if grant["suspended"] else "open"


def _vlan(machine: Resource) -> str:
    vlan = machine["vlan"]
    return "-" if vlan is None else f"{vlan['id']}" if vlan["type"] == "802.1q" else f"{vlan['id']} {vlan['type']}"


def _rides_on(segment: Resource) -> str:
    vlan = segment["vlan"]
    return f"{vlan['on']}/{vlan['id']}" if vlan is not None else _text("vni")(segment)


def _trunks(machine: Resource) -> str:
    return ", ".join(f"{on} by {nic}" for on, nic in machine["trunks"].items()) or "-"


# Columns of each kind: heading, cell, and whether only `wide` has it.
COLUMNS: dict[str, tuple[tuple[str, Cell, bool], ...]] = {
    "machine": (
        ("NAME", _text("name"), False),
        ("ADDRESS", _text("address"), False),
        ("MTU", _text("mtu"), False),
        ("NIC", _text("nics", "-"), True),
        ("VLAN", _vlan, True),
        ("TRUNKS", _trunks, True),
        ("REALISED", _text("realised"), False),
        ("FENCED", _text("fenced"), True),
        ("LABELS", _text("labels"), True),
        ("ID", _text("id"), True),
    ),
    "token": (
        ("NAME", _text("name"), False),
        ("EVERYTHING", _text("everything"), False),
        ("TENANTS", _text("tenants"), False),
        ("UNTIL", _until, False),
        ("MADE BY", _text("by"), True),
    ),
    "grant": (
        ("NAME", _text("name"), False),
        ("TENANT", _text("tenant", "not redeemed"), False),
        ("NETWORK", _text("network"), False),
        ("HOSTS", lambda grant: f"all {len(grant['hosts'])}" if grant["all"] else plain(grant["hosts"]), False),
        ("USED", _used, False),
        ("STATE", _state_of_grant, False),
        ("ID", _text("id"), True),
    ),
    "host": (
        ("NAME", _text("name"), False),
        ("ADDRESS", _text("addresses"), False),
        ("STATE", _text("state"), False),
        ("NETWORKS", lambda host: str(host["networks"]), False),
        ("PORTS", lambda host: str(host["ports"]), False),
        ("CAUSE", _text("cause"), True),
        ("NETWORK", _text("network", "the fabric"), True),
        ("MACHINE", _text("machine"), True),
        ("ID", _text("id"), True),
    ),
    "tenant": (
        ("NAME", _text("name"), False),
        ("PARENT", _text("parent"), False),
        ("SUSPENDED", _text("suspended"), True),
        ("NETWORKS", _of_quota("networks"), True),
        ("SEGMENTS", _of_quota("segments"), True),
        ("PORTS", _of_quota("ports"), True),
        ("RATE", _of_quota("rate"), True),
        ("ID", _text("id"), True),
    ),
    "network": (
        ("PATH", _text("path"), False),
        ("TENANT", _text("tenant"), False),
        ("CARRIER", _text("carrier", "the wire"), False),
        ("MTU", _text("mtu"), False),
        ("REVISION", _text("revision"), False),
        ("STATE", _text("state"), True),
        ("CAUSE", _text("cause"), True),
        ("UNDERLAY", _text("underlay"), True),
        ("DESCRIPTION", _text("description"), True),
        ("ID", _text("id"), True),
    ),
    "segment": (
        ("PATH", _text("path"), False),
        ("CIDR", _text("cidrs"), False),
        ("GATEWAY", _text("gateways"), False),
        ("VNI", _rides_on, False),
        ("DNS", _text("dns"), True),
        ("DESCRIPTION", _text("description"), True),
        ("ID", _text("id"), True),
    ),
    "router": (
        ("PATH", _text("path"), False),
        ("SEGMENTS", _text("segments"), False),
        ("MAC", _text("mac"), False),
        ("DESCRIPTION", _text("description"), True),
        ("ID", _text("id"), True),
    ),
    "link": (
        ("PATH", _text("path"), False),
        ("BETWEEN", _text("between"), False),
        ("COST", _text("cost"), False),
        ("RATE", _rate, False),
        ("STATE", lambda link: "up" if link["up"] else "down", False),
        ("DESCRIPTION", _text("description"), True),
        ("ID", _text("id"), True),
    ),
    "port": (
        ("PATH", _text("path"), False),
        ("SEGMENT", _text("segment"), False),
        ("ADDRESS", _text("addresses"), False),
        ("MAC", _text("mac"), False),
        ("HOST", _text("host"), False),
        ("GROUPS", _text("groups"), False),
        ("MACHINE", _text("machine"), True),
        ("STATE", _text("state"), True),
        ("CAUSE", _text("cause"), True),
        ("OWNS", _text("owns"), True),
        ("HOSTS", _text("hosts"), True),
        ("ATTACH", _text("attach"), True),
        ("RATE", _rate, True),
        ("MTU", _text("mtu"), True),
        ("ID", _text("id"), True),
    ),
    "policy": (
        ("NETWORK", _text("network"), False),
        ("FROM", _text("from"), False),
        ("TO", _text("to"), False),
        ("ALLOW", _text("allow"), False),
        ("DENY", _text("deny"), False),
        ("PRIORITY", _text("priority"), False),
        ("ID", _text("id"), True),
    ),
}


def console(file: IO[str] | None = None) -> Console:
    """A console that folds lines only for a terminal, and has colours only there and without NO_COLOR."""
    from rich.console import Console

    file = file or sys.stdout
    terminal = file.isatty()
    width = None if terminal else UNBOUNDED
    return Console(
        file=file,
        width=width,
        no_color=not colours(file),
        highlight=False,
        soft_wrap=not terminal,
        force_terminal=terminal,
        emoji=False,
        markup=False,
    )


def colours(file: IO[str]) -> bool:
    """May this output be coloured?"""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], styles: Mapping[str, str] | None = None) -> None:
    """Rows under headings. `styles` gives a style for a cell's text: {'failed': 'red'}."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell, (styles or {}).get(cell, "")) for cell in row))
    out = console()
    if out.is_terminal:
        out.print(shown)
        return
    # rich fills lines up to the width of the column: of no use to a program, and in the way of a diff.
    with out.capture() as capture:
        out.print(shown)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def data(value: object, format: Format) -> None:
    """A value as JSON or YAML."""
    if format is Format.yaml:
        import yaml

        yaml.safe_dump(value, sys.stdout, sort_keys=False, allow_unicode=True, default_flow_style=False)
        return
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def versioned(kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """An object for programs: it says what it is, and in which version of the API."""
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        **{k: v for k, v in value.items() if k not in ("apiVersion", "kind")},
    }


def resources(kind: str, items: Sequence[Resource], format: Format, single: bool = False) -> None:
    """Resources of one kind, or a single one."""
    if format is Format.name:
        for item in items:
            print(item.get("path") or item.get("name") or item["id"])
    elif format in (Format.json, Format.yaml):
        whole = [versioned(kind.capitalize(), item) for item in items]
        data(whole[0] if single else versioned(f"{kind.capitalize()}List", {"items": whole}), format)
    else:
        columns = [c for c in COLUMNS[kind] if format is Format.wide or not c[2]]
        if not items:
            print(f"no {KINDS[kind]}", file=sys.stderr)
            return
        table([heading for heading, _, _ in columns], ([cell(item) for _, cell, _ in columns] for item in items))


def described(resource: Resource) -> None:
    """Everything about one resource, a field a line, lists below their name."""
    width = max(len(key) for key in resource) + 2
    for key, value in resource.items():
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 1:
            print(f"{key}:")
            for each in value:
                print(f"  - {plain(each)}")
        else:
            print(f"{key + ':':<{width}}{_rate(resource) if key == 'rate' else plain(value)}")
