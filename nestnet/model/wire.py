"""Values as plain data for the feed, and back: addresses and prefixes as text, tuples as lists.

    {"kind": "port", "id": 7, "value": {"id": 7, "network": 1, ..., "addresses": ["10.0.0.2"]}}

`from_wire(kind, to_wire(value)) == value`, for every value. A field that is not sent has its default, so
a newer reader understands an older writer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from nestnet.model.values import (
    KINDS,
    Attach,
    Interface,
    Selector,
    Service,
    Tag,
    Trunk,
    Value,
    Vlan,
)

_TEXT = (IPv4Address, IPv6Address, IPv4Network, IPv6Network)


def to_wire(value: Value) -> dict[str, Any]:
    """Plain data for JSON: numbers, texts, lists, dicts."""
    return _record(value)


def from_wire(kind: str, data: Mapping[str, Any], same: dict[int, int] | None = None) -> Value:
    """The value again. Raises KeyError for an unknown kind, TypeError or ValueError for data that is no such value.
    `same` is for who keeps many: numbers that are equal become one object, of all values that it is given for."""
    plain = dict(data)
    for name, read in _READERS.get(kind, {}).items():
        if name in plain:
            plain[name] = read(plain[name])
    if same is not None:
        for name in _NUMBERS.get(kind, ()):
            if name in plain:
                plain[name] = same.setdefault(plain[name], plain[name])
    return KINDS[kind](**plain)


def _record(value: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}


def _plain(item: Any) -> Any:
    if item is None or isinstance(item, (bool, int, str)):
        return item
    if isinstance(item, _TEXT):
        return str(item)
    if isinstance(item, tuple):
        return [_plain(each) for each in item]
    return _record(item)


# Tenants choose the same few, and values are never changed: one object serves all of them.
_address = lru_cache(1 << 16)(ip_address)
_prefix = lru_cache(1 << 16)(ip_network)
_shared_selector = lru_cache(1 << 16)(Selector)
_shared_service = lru_cache(1 << 16)(Service)


@lru_cache(1 << 16)
def _shared(items: tuple[Any, ...]) -> tuple[Any, ...]:
    return items


def _each(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda items: _shared(tuple(read(item) for item in items))


def _interface(data: Mapping[str, Any]) -> Interface:
    return Interface(data["segment"], tuple(_address(text) for text in data["addresses"]))


def _selector(data: Mapping[str, Any]) -> Selector:
    cidr = data.get("cidr")
    return _shared_selector(data["kind"], data.get("id", 0), _prefix(cidr) if cidr is not None else None)


def _attach(data: Mapping[str, Any] | None) -> Attach | None:
    return Attach(**data) if data is not None else None


def _tag(data: Mapping[str, Any] | None) -> Tag | None:
    return Tag(**data) if data is not None else None


def _trunk(data: Mapping[str, Any]) -> Trunk:
    return Trunk(**data)


def _vlan(data: Mapping[str, Any] | None) -> Vlan | None:
    return Vlan(**data) if data is not None else None


def _service(data: Mapping[str, Any]) -> Service:
    return _shared_service(**data)


_READERS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "machine": {"address": _address, "nics": tuple, "vlan": _tag, "trunks": _each(_trunk)},
    "segment": {"cidrs": _each(_prefix), "dns": _each(_address), "vlan": _vlan},
    "router": {"interfaces": _each(_interface)},
    "link": {"between": tuple},
    "port": {"addresses": _each(_address), "owns": _each(_prefix), "groups": tuple, "attach": _attach},
    "policy": {"sources": _each(_selector), "targets": _each(_selector), "services": _each(_service)},
}

_NUMBERS = {kind: [field.name for field in fields(type) if field.type == "int"] for kind, type in KINDS.items()}
