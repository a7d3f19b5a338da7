"""Traces as text: layer by layer what happens to a packet, by which policy, and where the file says so.

tcp/5432 from acme/web1 (10.0.0.2) to 10.0.1.2, TTL 64, a new flow

acme
  guard        10.0.0.2 and the MAC are the port's own
  policy       allowed by frontend -> database allow tcp/5432 (net.yaml:31)
the fabric
  carry        m1 (192.0.2.1) to m2 (192.0.2.2)
deliver: to acme/db1
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestnet.file import Document

Places = Mapping[tuple[str, object], str]
"""(path of a network, a policy's words in any order) -> FILE:LINE."""

WIDTH = 12  # of the column with the names of steps: as wide as the longest


def verdict(trace: Mapping[str, Any]) -> str:
    """The outcome in one line: `deliver: to acme/db1`, `drop: policy: denied by ...`."""
    reason = f"{trace['reason']}: " if trace.get("reason") else ""
    return f"{trace['verdict']}: {reason}{trace['detail']}"


def text(trace: Mapping[str, Any], places: Places | None = None) -> str:
    """The whole trace, without a newline at the end."""
    lines = [trace["packet"], ""]
    layer = None
    for step in trace["steps"]:
        if step["layer"] != layer:
            layer = step["layer"]
            lines.append(layer)
        place = (places or {}).get((step.get("network", ""), _key(step.get("policy", ""))))
        lines.append(f"  {step['step']:<{WIDTH}} {step['text']}{f' ({place})' if place else ''}")
        lines += [f"  {'':<{WIDTH}} {part['header']:<9} {part['bytes']}" for part in step.get("headers", ())]
    return "\n".join([*lines, verdict(trace)])


def places(document: Document) -> Places:
    """Where a file has its policies."""
    from nestnet.model.problems import join

    found: dict[tuple[str, object], str] = {}

    def walk(networks: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for name, network in networks.items():
            here = (*path, name)
            at = [step for each in here for step in ("networks", each)]
            for index, policy in enumerate(network.policies or ()):
                line, _ = document.positions[join(*at, "policies", index)]
                verb, services = ("allow", policy.allow) if policy.allow is not None else ("deny", policy.deny)
                key = _parts(policy.sources, policy.targets, verb, services, policy.priority)
                found["/".join(here), key] = f"{document.name}:{line}"
            walk(network.networks or {}, here)

    if document.manifest is not None:
        walk(document.manifest.networks or {}, ())
    return found


def _key(words: str) -> object:
    """'a,b -> c allow tcp/80 priority 7', in an order of its own, so that it can be compared."""
    match = re.fullmatch(r"(\S+) -> (\S+) (allow|deny) (\S+)(?: priority (\d+))?", words)
    if match is None:
        return None
    sources, targets, verb, services, priority = match.groups()
    return _parts(sources.split(","), targets.split(","), verb, services.split(","), int(priority or 100))


def _parts(sources: Any, targets: Any, verb: str, services: Any, priority: int) -> object:
    return frozenset(sources), frozenset(targets), verb, frozenset(services), priority
