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
        if change["op"] == "~":
            line += f"  {_fields(change['fields'])}"
        lines.append(f"{COLOURS[change['op']]}{line}{PLAIN}" if coloured else line)
    if plan.get("disturbs"):
        lines += ["", "disturbs", *(f"  {each}" for each in plan["disturbs"])]
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


def _fields(fields: Mapping[str, Sequence[Any]]) -> str:
    """{'address': [['10.0.0.2'], ['10.0.0.9']]} -> address: 10.0.0.2 -> 10.0.0.9"""
    return ", ".join(f"{name}: {plain(old)} -> {plain(new)}" for name, (old, new) in fields.items())
