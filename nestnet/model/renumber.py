"""The same value with other ids.

What happens to a packet hangs on no id, nor on an order of them (tests/test_renumber.py), so agents may be told other
ones than the store's: those of ports are, as the store's rise with what everybody makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nestnet.model.values import Link, Machine, Network, Port, Router, Segment, Selector, Value, kind_of

Numbers = Callable[[str, int], int]
"""The new id for one of a kind: of KINDS, or group. Never asked for 0, which is nobody in both."""


def renumbered(value: Value, numbers: Numbers, host: str) -> Value:
    """All ids in a value. `host` is the kind of what a port lives on: machine or port."""

    def of(kind: str, id: int) -> int:
        return numbers(kind, id) if id else 0

    def chosen(selectors: tuple[Selector, ...]) -> tuple[Selector, ...]:
        return tuple(replace(one, id=of(one.kind, one.id)) for one in selectors)

    id = of(kind_of(value), value.id)
    if isinstance(value, Machine):
        return replace(value, id=id)
    if isinstance(value, Network):
        return replace(value, id=id, carrier=of("network", value.carrier))
    network = of("network", value.network)
    if isinstance(value, Segment):
        return replace(value, id=id, network=network)
    if isinstance(value, Router):
        joined = tuple(replace(one, segment=of("segment", one.segment)) for one in value.interfaces)
        return replace(value, id=id, network=network, interfaces=joined)
    if isinstance(value, Link):
        a, b = value.between
        return replace(value, id=id, network=network, between=(of("router", a), of("router", b)))
    if isinstance(value, Port):
        return replace(
            value,
            id=id,
            network=network,
            segment=of("segment", value.segment),
            host=of(host, value.host),
            other=of(host, value.other),
            trunk=of("port", value.trunk),
            groups=tuple(sorted(of("group", group) for group in value.groups)),
        )
    return replace(value, id=id, network=network, sources=chosen(value.sources), targets=chosen(value.targets))
