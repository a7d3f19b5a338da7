"""Traces as text: layer by layer, what happens to a packet, by which rule, and where the file says so.

tcp acme/web1 10.0.0.2 -> 10.0.1.2 port 5432

acme
  guard       10.0.0.2 and its MAC are the port's
  policy      denied: no policy allows tcp/5432                       net.yaml:31
dropped: policy
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestnet.cli.output import plain


def verdict(trace: Mapping[str, Any]) -> str:
    """The outcome in one line: what decided it."""
    if trace.get("reason"):
        detail = trace.get("detail") or trace.get("message")
        return f"{trace['reason']}: {detail}" if detail else str(trace["reason"])
    steps = trace.get("steps") or []
    outcome = str(trace.get("verdict") or "")
    return f"{outcome}: {_said(steps[-1])}" if steps and outcome else outcome or "no trace"


def text(trace: Mapping[str, Any]) -> str:
    """The whole trace, without a newline at the end."""
    lines = []
    if packet := trace.get("packet"):
        lines += [packet if isinstance(packet, str) else plain(packet), ""]
    layer = None
    for step in trace.get("steps") or []:
        where = step.get("layer") or step.get("network") or ""
        if where != layer:
            lines.append(str(where))
            layer = where
        line = f"  {step.get('step') or step.get('stage') or '':<12}{_said(step)}"
        if source := step.get("source") or step.get("pointer"):
            line += f"    {source}"
        lines.append(line.rstrip())
    lines.append(verdict(trace))
    return "\n".join(lines)


def _said(step: Mapping[str, Any]) -> str:
    return plain(step.get("text") or step.get("message") or step.get("detail"), "")
