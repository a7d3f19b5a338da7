"""Canonical JSON, as it is stored: what means the same is the same text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from .values import Selector, Service

Side = tuple[tuple[str, int, str | None], ...]
"""The selectors of a side of a policy in their order: kind, id, CIDR."""
About = tuple[tuple[int, int, int], ...]
"""Services: protocol, ports low and high."""


def labels_text(labels: Mapping[str, str] | None) -> str:
    return json.dumps(dict(sorted((labels or {}).items())), separators=(",", ":"), ensure_ascii=False)


def policy_text(
    sources: Sequence[str], targets: Sequence[str], allow: Sequence[str] | None, deny: Sequence[str], priority: int
) -> str:
    """A policy as people write it."""
    verb, services = ("allow", allow) if allow is not None else ("deny", deny)
    data = {"from": sources, "to": targets, verb: services, "priority": priority}
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)


def meaning_text(sources: Side, targets: Side, services: About, allow: bool, priority: int) -> str:
    """What a policy means. Short, for its index has it once more."""
    return json.dumps([sources, targets, services, int(allow), priority], separators=(",", ":"))


def side(selectors: Iterable[Selector]) -> Side:
    return tuple((one.kind, one.id, str(one.cidr) if one.cidr else None) for one in selectors)


def about(services: Iterable[Service]) -> About:
    return tuple((one.protocol, one.low, one.high) for one in services)


def selector_order(selector: Selector) -> tuple[str, int, str]:
    return (selector.kind, selector.id, str(selector.cidr or ""))
