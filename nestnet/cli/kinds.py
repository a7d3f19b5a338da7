"""The nouns that `get`, `describe` and `delete` take."""

from __future__ import annotations

from difflib import get_close_matches

from nestnet.model.errors import Usage

KINDS = {
    "machine": "machines",
    "tenant": "tenants",
    "network": "networks",
    "segment": "segments",
    "router": "routers",
    "link": "links",
    "port": "ports",
    "policy": "policies",
    "host": "hosts",
    "token": "tokens",
    "grant": "grants",
}


def singular(kind: str) -> str:
    """'port' or 'ports' -> 'port'. Raises Usage with the nearest kind."""
    kind = kind.lower()
    if kind in KINDS:
        return kind
    for one, many in KINDS.items():
        if kind == many:
            return one
    near = get_close_matches(kind, [*KINDS, *KINDS.values()], 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise Usage(f"there is no kind {kind!r}, only {', '.join(KINDS.values())}{meant}")
