"""What machines say, in rows of the store: those on ports know them by other numbers (api/feed.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestnet.model.errors import NotFound
from nestnet.store.store import Store


def domain_of(store: Store, reference: str) -> int:
    """The domain of a machine. Raises NotFound."""
    domain = store.domain_of(store.machine_row(reference))
    if domain is None:
        raise NotFound(f"machine {reference}")
    return domain


def port_row(store: Store, reference: str, port: int) -> int:
    """The row of what a machine calls this port. Raises NotFound for an unknown machine."""
    return store.identity.numbered("port", port, domain_of(store, reference))


def by_rows(store: Store, domain: int, ports: Mapping[str, Any]) -> dict[str, Any]:
    """What a machine of a domain says of ports, by their rows. What is no number is no port."""
    return {
        str(store.identity.numbered("port", int(port), domain)): said
        for port, said in ports.items()
        if port.isascii() and port.isdecimal() and len(port) < 20
    }
