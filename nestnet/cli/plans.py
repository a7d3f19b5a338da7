"""Plans as text: a line for each object, what is disturbed, and a count.

+ port acme/web9
~ port acme/web1  address: 10.0.0.2 -> 10.0.0.9
- segment acme/old

disturbs
  port acme/web1: new address, its connections are cut

1 to add, 1 to change, 1 to delete
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from nestnet.cli.output import colours, plain

COLOURS = {"+": "\x1b[32m", "~": "\x1b[33m", "-": "\x1b[31m"}
PLAIN = "\x1b[0m"


def text(plan: Mapping[str, Any], coloured: bool = False) -> str:
    """The plan, ready to print, without a newline at the end."""
    lines = []
    for change in plan["changes"]:
        line = f"{change['op']} {change['kind']} {change['path']}"
        if fields := _fields(change.get("fields")):
            line += f"  {fields}"
        lines.append(f"{COLOURS[change['op']]}{line}{PLAIN}" if coloured else line)
    if plan.get("disturbs"):
        lines += ["", "disturbs", *(f"  {_disturbance(each)}" for each in plan["disturbs"])]
    if lines:
        lines.append("")
    return "\n".join([*lines, count(plan)])


def show(plan: Mapping[str, Any], file: IO[str] | None = None) -> None:
    """Print the plan."""
    file = file or sys.stdout
    print(text(plan, colours(file)), file=file)


def count(plan: Mapping[str, Any]) -> str:
    """1 to add, 0 to change, 2 to delete; or: no changes."""
    ops = [change["op"] for change in plan["changes"]]
    if not ops:
        return "no changes"
    return f"{ops.count('+')} to add, {ops.count('~')} to change, {ops.count('-')} to delete"


def _fields(fields: object) -> str:
    """{'address': ['10.0.0.2', '10.0.0.9']} -> address: 10.0.0.2 -> 10.0.0.9"""
    if not fields:
        return ""
    if not isinstance(fields, Mapping):
        return plain(fields)
    return ", ".join(
        f"{name}: {plain(value[0])} -> {plain(value[1])}"
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
        else f"{name}: {plain(value)}"
        for name, value in fields.items()
    )


def _disturbance(each: object) -> str:
    if isinstance(each, Mapping):
        what = each.get("path") or each.get("what") or ""
        why = each.get("reason") or each.get("why") or each.get("message") or ""
        return f"{what}: {why}" if what and why else str(what or why)
    return str(each)
