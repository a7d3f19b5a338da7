"""How `from`, `to`, `allow` and `deny` of a policy are read (rule 40).

    from, to       any  inside  hosts  10.0.0.0/8  web  group:web  segment:web  port:web1
    allow, deny    any  tcp  udp  tcp/80  tcp/80-90  udp/53  icmp  icmpv6  carriage

`Names` says which groups, segments and ports a network has and what their ids are. A bare name
that fits two kinds is an error; a kind and a colon before it decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from pydantic_core import PydanticCustomError

from .errors import Invalid, Problem
from .manifest import read_prefix
from .problems import Nearest, meant, quote
from .values import CARRIAGE_PORT, Selector, Service

WORDS = ("any", "inside", "hosts")
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
SERVICES: dict[str, Service] = {
    "any": Service(),
    "tcp": Service(TCP),
    "udp": Service(UDP),
    "icmp": Service(ICMP),
    "icmpv6": Service(ICMPV6),
    "carriage": Service(UDP, CARRIAGE_PORT, CARRIAGE_PORT),
}


@dataclass(frozen=True)
class Names:
    """Name -> id of what policies of one network can name."""

    groups: Mapping[str, int] = field(default_factory=dict)
    segments: Mapping[str, int] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, Mapping[str, int]]:
        return {"group": self.groups, "segment": self.segments, "port": self.ports}


def parse_selector(text: str, names: Names, nearest: Nearest | None = None) -> Selector:
    """One `from` or `to`. Raises Invalid with one problem, whose pointer is ''."""
    if text in WORDS:
        return Selector(text)
    if "/" in text or _is_address(text):
        try:
            return Selector("cidr", cidr=read_prefix(text))
        except PydanticCustomError as error:
            context = error.context or {}
            raise _invalid(error.type, str(context["text"]), context.get("nearest")) from None
    kind, colon, name = text.partition(":")
    if colon and kind in names.kinds:
        if name in names.kinds[kind]:
            return Selector(kind, names.kinds[kind][name])
        near = (nearest or Nearest())(name, names.kinds[kind])
        raise _invalid("unknown_name", f"there is no {kind} {quote(name)} in this network{meant(near)}", near)
    fits = [kind for kind, ids in names.kinds.items() if text in ids]
    if len(fits) == 1:
        return Selector(fits[0], names.kinds[fits[0]][text])
    if fits:
        candidates = " or ".join(f"{kind}:{text}" for kind in fits)
        raise _invalid("ambiguous_name", f"{quote(text)} is a {' and a '.join(fits)}: write {candidates}")
    if _could_be_a_name(text):
        near = _nearest(text, names, nearest or Nearest())
        message = f"there is no group, segment or port {quote(text)} in this network{meant(near)}"
        raise _invalid("unknown_name", message, near)
    hint = "any, inside, hosts, a CIDR as 10.0.0.0/8, or a group, segment or port"
    raise _invalid("bad_selector", f"{quote(text)} is nothing that a policy can name: write {hint}")


def parse_service(text: str) -> Service:
    """One `allow` or `deny`. Raises Invalid with one problem, whose pointer is ''."""
    if text in SERVICES:
        return SERVICES[text]
    protocol, slash, ports = text.partition("/")
    if slash and protocol in SERVICES and protocol not in ("tcp", "udp"):
        raise _invalid("no_ports", f"{quote(text)}: {protocol} has no ports, only tcp and udp do: write {protocol}")
    if not slash or protocol not in ("tcp", "udp"):
        near = Nearest()(protocol.lower(), SERVICES)
        known = "any, tcp, tcp/80, tcp/80-90, udp/53, icmp, icmpv6 and carriage"
        raise _invalid("bad_service", f"{quote(text)} is no service{meant(near) or f'; there are {known}'}", near)
    low, dash, high = ports.partition("-")
    if not _is_number(low) or (dash and not _is_number(high)):
        raise _invalid("bad_service", f"{quote(text)}: after {protocol}/ comes a port or a range, as 80 or 80-90")
    first, last = int(low), int(high if dash else low)
    if not (1 <= first <= 65535 and 1 <= last <= 65535):
        raise _invalid("port_range", f"{quote(text)}: ports are 1 to 65535")
    if first > last:
        raise _invalid("port_range", f"{quote(text)} runs backwards: write {protocol}/{last}-{first}")
    return Service(SERVICES[protocol].protocol, first, last)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9


def _could_be_a_name(text: str) -> bool:
    return text.replace("-", "").replace("_", "").isalnum()


def _nearest(text: str, names: Names, nearest: Nearest) -> str | None:
    for candidates in (WORDS, names.groups, names.segments, names.ports):
        if (near := nearest(text, candidates)) is not None:
            return near
    return None


def _invalid(code: str, message: str, nearest: str | None = None) -> Invalid:
    return Invalid([Problem(code, "", message, nearest=nearest)])
