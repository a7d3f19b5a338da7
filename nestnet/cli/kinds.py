"""The nouns that `get`, `describe` and `delete` take."""

from __future__ import annotations

from difflib import get_close_matches

from nestnet.model.errors import NotFound

KINDS = {
    "machine": "machines",
    "tenant": "tenants",
    "network": "networks",
    "segment": "segments",
    "router": "routers",
    "port": "ports",
    "policy": "policies",
}


def plural(kind: str) -> str:
    """'port' or 'ports' -> 'ports'. Raises NotFound with the nearest kind."""
    kind = kind.lower()
    if kind in KINDS.values():
        return kind
    if kind in KINDS:
        return KINDS[kind]
    near = get_close_matches(kind, [*KINDS, *KINDS.values()], 1)
    raise NotFound(f"kind {kind!r} (there are {', '.join(KINDS.values())})", near[0] if near else None)


def noun(kinds: str) -> str:
    """'policies' -> 'Policy', as it is called in JSON."""
    return next(single for single, many in KINDS.items() if many == kinds).capitalize()
