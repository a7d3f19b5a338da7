"""What people write: the network file and the body of an apply, with names instead of ids.

    Manifest
      machines   {name: MachineSpec}
      tenants    {name: TenantSpec}
        quota      QuotaSpec
      networks   {name: NetworkSpec}
        grants     {tenant: GrantSpec}     whose networks its hosts may carry
        segments   {name: SegmentSpec}
        routers    {name: RouterSpec}
        links      {name: LinkSpec}        between two of its routers
        ports      {name: PortSpec}
        policies   [PolicySpec]
        networks   {name: NetworkSpec}     carried by this one
      checks     [Check]

`parse` turns data, as it comes from JSON or YAML, into these. A collection that is absent is None
and left alone, one that is present is exact (rule 39); so null is never a value. Where one value
or a list of them may stand, the model always has a tuple. What can be judged by looking at one
value is judged here, what needs two or more of them in `validate.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence, Sized
from functools import cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    WrapSerializer,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from .errors import Invalid, Problem
from .problems import Nearest, in_order, join, meant, quote
from .rates import RATE, rate_text
from .values import MAX_DEPTH, Address, Attach, Prefix, Tag

API_VERSION = "nestnet/v1"
RESERVED = ("any", "inside", "hosts")

# Published limits. A list that nobody could read is a mistake or an attack, and each of these
# bounds work that one tenant could otherwise give to every machine that holds its network.
POLICIES_PER_NETWORK = 1024  # a network's rules are written in one step, under a new version
SELECTORS_PER_SIDE = 64  # a policy is compiled to sources x targets x services rules: 64 x 64 x 64 at most
SERVICES_PER_POLICY = 64
GROUPS_PER_PORT = 64  # groups make the identity that rules are found by
OWNS_PER_PORT = 64  # each is a route on every machine of the network
ADDRESSES_PER_PORT = 16  # each is a row on every machine of the network
SEGMENTS_PER_ROUTER = 256
ROUTERS_PER_SEGMENT = 16
ROUTERS_PER_NETWORK = 4096
ROUTES_PER_NETWORK = 65536  # of all its routers together: every machine of the network has them
LINKS_PER_NETWORK = 4096  # every machine of the network finds its least-cost paths over them
DNS_PER_SEGMENT = 8  # an answer to DHCP has room for them, and no resolver asks more
NETNS = 200  # characters in the name of a namespace: the alias of an interface has it
COST = (1, 65535)
PRIORITY = (0, 65535)
LABELS = 64
LABEL = 63  # characters of a label's key; its value may have LABEL_VALUE
LABEL_VALUE = 256
QUOTA = (0, 1_000_000_000)
QUOTA_RATE = (RATE[0], 10_000 * RATE[1])  # bit/s
DESCRIPTION = 1000  # characters
MTU = (576, 65535)  # bytes of IP: RFC 791's smallest, and what a length field holds
MACHINE_MTU = (MTU[0] + 50, MTU[1])  # room for VXLAN around the smallest
TRUNKS = 64  # of a machine
VLAN = (1, 4094)  # 802.1Q, table 9-2: 0 is none, 4095 is for nobody
NICS_PER_MACHINE = 8

T = TypeVar("T")
S = TypeVar("S", bound=Sized)


def _refuse(code: str, message: str, **context: Any) -> PydanticCustomError:
    """A problem with this value. pydantic formats messages with str.format: hand the text over as an argument."""
    return PydanticCustomError(code, "{text}", {"text": message, **context})


# Text


def _control(text: str, allowed: str = "") -> str | None:
    """The first character of `text` that would do something on a terminal or in a table instead of being seen."""
    if text.isprintable():
        return None
    # Cf holds the marks that turn the direction of text, with which one line can pose as another.
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return next((c for c in text if unicodedata.category(c) in kinds and c not in allowed), None)


def _plain(text: str, allowed: str = "") -> str:
    if (c := _control(text, allowed)) is not None:
        raise _refuse("control_character", f"has the control character U+{ord(c):04X}: take it out")
    return text


_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


def read_name(text: str) -> str:
    """A DNS label (RFC 1123) that no policy uses as a word."""
    if _NAME.match(text) is None:
        limit = 63 if len(text) > 63 else None
        raise _refuse("bad_name", f"{quote(text)} is no name: {_name_fault(text)}", limit=limit)
    if text in RESERVED:
        raise _refuse("reserved_name", f"{quote(text)} is a word of policies: give it another name")
    return text


def _name_fault(text: str) -> str:
    if not text:
        return "it is empty"
    if len(text) > 63:
        return f"it has {len(text)} characters, at most 63 are allowed"
    if (c := _control(text)) is not None:
        return f"it has the control character U+{ord(c):04X}"
    if text.lower() != text:
        return "use lower case"
    if "/" in text:
        return "write the bare name, without a path"
    if re.fullmatch(r"[a-z0-9-]+", text):
        return "it begins or ends with '-'"
    return "use a-z, 0-9 and '-'"


def read_description(text: str) -> str:
    if len(text) > DESCRIPTION:
        raise _refuse("limit_exceeded", f"has {len(text)} characters: at most {DESCRIPTION}", limit=DESCRIPTION)
    return _plain(text, allowed="\n")


_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?\Z")


def read_label(text: str) -> str:
    if len(text) > LABEL:
        raise _refuse("limit_exceeded", f"the label has {len(text)} characters: at most {LABEL}", limit=LABEL)
    _plain(text)
    if _LABEL.match(text) is None:
        raise _refuse("bad_label", f"{quote(text)} is no label: use letters, digits and, inside, '-', '_', '.' and '/'")
    return text


def read_label_value(text: str) -> str:
    if len(text) > LABEL_VALUE:
        raise _refuse("limit_exceeded", f"has {len(text)} characters: at most {LABEL_VALUE}", limit=LABEL_VALUE)
    return _plain(text)


def _read_nic(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9._-]{1,15}", text) is None or text in (".", ".."):
        raise _refuse("bad_name", f"{quote(text)} is no interface: 1 to 15 letters, digits, '.', '_' and '-'", limit=15)
    if text == "lo":
        raise _refuse("bad_name", "lo leads nowhere: name the interfaces that packets leave by")
    if re.fullmatch(r"p[0-9]+|p-[0-9a-z]+", text):
        raise _refuse("bad_name", f"{quote(text)} is what the link of a workload is called: rename the interface")
    return text


_NETNS = re.compile(r"[A-Za-z0-9_@:.+][A-Za-z0-9_@:.+-]*\Z")


def _read_netns(text: str) -> str:
    if len(text) > NETNS or _NETNS.match(text) is None or text in (".", ".."):
        wanted = f"1 to {NETNS} letters, digits and, not first, '-'; '.', '_', '@', ':' and '+' too"
        raise _refuse("bad_name", f"{quote(text)} is no network namespace: {wanted}", limit=NETNS)
    return text


# Addresses

UNUSABLE: tuple[tuple[Prefix, str], ...] = (
    (IPv4Network("0.0.0.0/8"), "'this network'"),
    (IPv4Network("127.0.0.0/8"), "loopback"),
    (IPv4Network("169.254.0.0/16"), "link-local"),
    (IPv4Network("224.0.0.0/4"), "multicast"),
    (IPv4Network("240.0.0.0/4"), "reserved"),
    (IPv6Network("::/96"), "unspecified, loopback or IPv4-compatible"),
    (IPv6Network("::ffff:0:0/96"), "IPv4 written as IPv6"),
    (IPv6Network("fe80::/10"), "link-local"),
    (IPv6Network("ff00::/8"), "multicast"),
)
_MAPPED = IPv6Network("::ffff:0:0/96")


def read_address(text: object) -> Address:
    """An address that a unicast packet can bear. Raises PydanticCustomError."""
    if not isinstance(text, str):
        raise _wrong_text(text)
    try:
        address = ip_address(text)
    except ValueError:
        hint = ": leave the prefix length out, the segment has it" if "/" in text else ""
        raise _refuse("bad_address", f"{quote(text)} is no IPv4 or IPv6 address{hint}") from None
    if address.version == 6 and address.scope_id is not None:
        raise _refuse("bad_address", f"{quote(text)} is no address: leave the zone, '%...', out")
    for prefix, kind in UNUSABLE:
        if address.version == prefix.version and address in prefix:
            raise _refuse("reserved_address", f"{address} is {kind} ({prefix}): no port can have it")
    return address


def read_prefix(text: object) -> Prefix:
    """A CIDR with nothing set after its prefix length; any, even 0.0.0.0/0. Raises PydanticCustomError."""
    if not isinstance(text, str):
        raise _wrong_text(text)
    address, slash, length = text.partition("/")
    if not slash or not (length.isascii() and length.isdecimal()) or "%" in address:
        try:
            whole = ip_address(text)
        except ValueError:
            raise _refuse("bad_cidr", f"{quote(text)} is no CIDR: write one as 10.0.0.0/24 or fd00::/64") from None
        hint = f"{whole}/{whole.max_prefixlen}"
        raise _refuse("bad_cidr", f"{quote(text)} has no prefix length: for this one address write {hint}")
    try:
        prefix = ip_network(text, strict=False)
    except ValueError:
        raise _refuse("bad_cidr", f"{quote(text)} is no CIDR: write one as 10.0.0.0/24 or fd00::/64") from None
    if ip_address(address) != prefix.network_address:
        raise _refuse("host_bits", f"{text} has bits set after its prefix length: write {prefix}", nearest=str(prefix))
    if isinstance(prefix, IPv6Network) and prefix.subnet_of(_MAPPED):
        raise _refuse("reserved_address", f"{prefix} is IPv4 written as IPv6: write it as IPv4")
    return prefix


def _read_owned(text: object) -> Prefix:
    prefix = read_prefix(text)
    for unusable, kind in UNUSABLE:
        if prefix.version == unusable.version and prefix.overlaps(unusable):
            raise _refuse("reserved_address", f"{prefix} reaches into {unusable}, which is {kind}: no port can own it")
    return prefix


def read_cidr(text: object) -> Prefix:
    prefix = read_prefix(text)
    for unusable, kind in UNUSABLE:
        if prefix.version == unusable.version and prefix.overlaps(unusable):
            raise _refuse("reserved_address", f"{prefix} reaches into {unusable}, which is {kind}: choose another")
    low, high = (8, 30) if prefix.version == 4 else (16, 126)
    if prefix.prefixlen < low:
        raise _refuse("cidr_size", f"{prefix} is too large: at most /{low}", limit=low)
    if prefix.prefixlen > high:
        why = "a segment needs room for a gateway and a port"
        raise _refuse("cidr_size", f"{prefix} is too small, {why}: at least /{high}", limit=high)
    return prefix


_MAC = re.compile(r"[0-9A-Fa-f]{2}([:-])[0-9A-Fa-f]{2}(?:\1[0-9A-Fa-f]{2}){4}\Z")


def read_mac(text: object) -> int:
    """A MAC that a port may have, as 48 bits. Raises PydanticCustomError."""
    if not isinstance(text, str):
        raise _wrong_text(text)
    if _MAC.match(text) is None:
        raise _refuse("bad_mac", f"{quote(text)} is no MAC: write one as 02:00:00:00:00:01")
    mac = int(text.replace(":", "").replace("-", ""), 16)
    if mac == 0 or mac >> 40 & 1:
        raise _refuse("mac_unusable", f"{text} is {'zero' if mac == 0 else 'a group address'}: a port needs its own")
    if mac >> 40 == 0x06:
        raise _refuse("mac_unusable", f"{text}: MACs from 06:... are the routers': begin with 02")
    return mac


def mac_text(mac: int) -> str:
    """02:00:00:00:00:01"""
    return ":".join(f"{mac:012x}"[i : i + 2] for i in range(0, 12, 2))


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_RATE = re.compile(r"([0-9]{1,15})(\.[0-9]{1,9})?([kmg]?)bit\Z")


def read_rate(value: object) -> int:
    """A rate in bit/s: a number, or text as tc writes it. Raises PydanticCustomError."""
    return _read_rate(value, *RATE)


def read_quota_rate(value: object) -> int:
    """The same of many ports together."""
    return _read_rate(value, *QUOTA_RATE)


def _read_rate(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _refuse("wrong_type", f"is {_shown(value)}, must be a rate, as 10mbit")
    rate = value if isinstance(value, int) else _read_rate_text(value)
    if not low <= rate <= high:
        limit = low if rate < low else high
        message = f"is {_shown(value)}: a rate is {rate_text(low)} to {rate_text(high)}"
        raise _refuse("out_of_range", message, limit=limit, nearest=rate_text(limit))
    return rate


def _read_rate_text(text: str) -> int:
    found = _RATE.match(text)
    if found is None:
        likely = re.match(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmgKMG]?)", text)
        near = f"{likely[1]}{likely[2].lower()}bit" if likely else None
        message = f"{quote(text)} is no rate: write one as 10mbit, with bit, kbit, mbit or gbit for bit/s{meant(near)}"
        raise _refuse("bad_rate", message, nearest=near)
    whole, part, unit = found.groups()
    digits = (part or ".")[1:]
    rate, rest = divmod(int(whole + digits) * _UNITS[unit], int("1" + "0" * len(digits)))
    if rest:
        raise _refuse("bad_rate", f"{quote(text)} is no whole number of bit/s")
    return rate


def _wrong_text(value: object) -> PydanticCustomError:
    return _refuse("wrong_type", f"is {_shown(value)}, must be text{_quote_hint(value)}")


# Shapes


def _present(value: T) -> T:
    if value is None:
        raise _refuse("wrong_type", "is empty: give a value, {} or [] for none of them, or leave the key out")
    return value


def _listed(value: Any) -> Any:
    """One value, or a list of them."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        raise _refuse("wrong_type", "is a mapping, must be one value or a list of them")
    return (value,)


def _only_listed(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) else _raise(_refuse("wrong_type", f"is {_shown(value)}, must be a list"))


def _raise(error: Exception) -> Any:
    raise error


def _some(value: S) -> S:
    if not value:
        raise _refuse("bad_value", "is empty: name at least one, or leave the key out")
    return value


def _distinct(value: tuple[T, ...]) -> tuple[T, ...]:
    seen: set[T] = set()
    for index, item in enumerate(value):
        if item in seen:
            raise _refuse("duplicate_item", f"has {_readable(item)} twice", below=index)
        seen.add(item)
    return value


def _readable(item: object) -> str:
    return quote(item) if isinstance(item, str) else str(item)


def _at_most(limit: int, of: str) -> AfterValidator:
    def judge(value: Any) -> Any:
        if len(value) > limit:
            raise _refuse("limit_exceeded", f"has {len(value)} {of}: at most {limit}", limit=limit)
        return value

    return AfterValidator(judge)


def _between(low: int, high: int, unit: str = "") -> AfterValidator:
    def judge(value: int) -> int:
        if not low <= value <= high:
            limit = low if value < low else high
            raise _refuse("out_of_range", f"is {_number(value)}: must be {low} to {high}{unit}", limit=limit)
        return value

    return AfterValidator(judge)


def _one_or_list(value: tuple[Any, ...]) -> Any:
    texts = [item if isinstance(item, str) else str(item) for item in value]
    return texts[0] if len(texts) == 1 else texts


def _numbers(low: int, high: int) -> WithJsonSchema:
    return WithJsonSchema({"type": "integer", "minimum": low, "maximum": high})


def _rates(low: int, high: int) -> WithJsonSchema:
    text = {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?[kmg]?bit$"}
    return WithJsonSchema({"anyOf": [text, {"type": "integer", "minimum": low, "maximum": high}]})


def _either(item: dict[str, Any], **limits: Any) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item, **limits}]})


_TEXT = {"type": "string"}
Maybe = Annotated[T | None, BeforeValidator(_present)]  # absent is None; null is not allowed
Name = Annotated[
    str,
    AfterValidator(read_name),
    WithJsonSchema({"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}),
]
Description = Annotated[str, AfterValidator(read_description)]
Labels = Annotated[
    dict[
        Annotated[str, AfterValidator(read_label)],
        Annotated[str, AfterValidator(read_label_value)],
    ],
    _at_most(LABELS, "labels"),
]
Mac = Annotated[
    int,
    BeforeValidator(read_mac),
    PlainSerializer(mac_text),
    WithJsonSchema({"type": "string", "pattern": "^[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}$"}),
]
Mtu = Annotated[int, _between(*MTU, " bytes"), _numbers(*MTU)]

Rate = Annotated[int, BeforeValidator(read_rate), PlainSerializer(rate_text), _rates(*RATE)]
QuotaRate = Annotated[int, BeforeValidator(read_quota_rate), PlainSerializer(rate_text), _rates(*QUOTA_RATE)]

Addresses = Annotated[
    tuple[Annotated[Address, BeforeValidator(read_address)], ...],
    BeforeValidator(_listed),
    _at_most(ADDRESSES_PER_PORT, "addresses"),
    AfterValidator(_distinct),
    PlainSerializer(_one_or_list),
    _either(_TEXT, maxItems=ADDRESSES_PER_PORT),
]
Nics = Annotated[
    tuple[Annotated[str, AfterValidator(_read_nic)], ...],
    BeforeValidator(_listed),
    AfterValidator(_some),
    _at_most(NICS_PER_MACHINE, "interfaces"),
    AfterValidator(_distinct),
    PlainSerializer(_one_or_list),
    _either(_TEXT, minItems=1, maxItems=NICS_PER_MACHINE),
]
Texts = Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_some), PlainSerializer(_one_or_list)]


class _Spec(BaseModel):
    """`later` names the keys that DESIGN has and this version cannot realise yet, with what they would do."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, populate_by_name=True, use_attribute_docstrings=True
    )
    later: ClassVar[Mapping[str, str]] = {}


class MachineVlanSpec(_Spec):
    """A VLAN that a machine's interfaces are in."""

    id: Maybe[Annotated[int, _between(*VLAN), _numbers(*VLAN)]] = None
    """1 to 4094."""
    type: Maybe[Literal["802.1q", "802.1ad"]] = None
    """Of which standard the tags are: 802.1q unless given."""

    @model_validator(mode="after")
    def _whole(self) -> MachineVlanSpec:
        if self.id is None and self.type is not None:
            raise _refuse("missing_key", "needs the key id", below="type")
        return self

    @property
    def value(self) -> Tag | None:
        """What that is; None for none, `{}`."""
        return Tag(self.id, self.type or "802.1q") if self.id is not None else None


def _read_vlan(value: Any) -> Any:
    """17, or a mapping."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"id": value}
    if isinstance(value, list):
        raise _refuse("wrong_type", "is a list: one tag is all that interfaces to the underlay can have")
    if not isinstance(value, dict | MachineVlanSpec):
        raise _refuse("wrong_type", f"is {_shown(value)}, must be a VLAN, as 17 or {{id: 17, type: 802.1ad}}")
    return value


_VLAN_NUMBER = {"type": "integer", "minimum": VLAN[0], "maximum": VLAN[1]}
_VLAN_MAPPING = {
    "type": "object",
    "properties": {"id": _VLAN_NUMBER, "type": {"enum": ["802.1q", "802.1ad"]}},
    "additionalProperties": False,
}


def _write_vlan(spec: MachineVlanSpec) -> Any:
    tag = spec.value
    return tag.short if tag is not None else {}


def _one_each(value: dict[str, str]) -> dict[str, str]:
    for name, nic in value.items():
        if (other := next(on for on, its in value.items() if its == nic)) != name:
            raise _refuse("duplicate_nic", f"{nic} is the trunk to {other} already", below=name)
    return value


class MachineSpec(_Spec):
    """A computer that runs an agent; `nestnet up` makes it as a namespace."""

    address: Maybe[Annotated[Address, BeforeValidator(read_address), PlainSerializer(str), WithJsonSchema(_TEXT)]] = (
        None
    )
    """Its address in the underlay, of the same family as all other machines'. A lab chooses one by itself."""
    nic: Maybe[Nics] = None
    """Its interface to the underlay, or several. A lab's is eth0; elsewhere it is the one that has the address."""
    mtu: Maybe[Annotated[int, _between(*MACHINE_MTU, " bytes"), _numbers(*MACHINE_MTU)]] = None
    """Bytes of IP that fit its interfaces: 1500 unless given."""
    vlan: Maybe[
        Annotated[
            MachineVlanSpec,
            BeforeValidator(_read_vlan),
            PlainSerializer(_write_vlan),
            WithJsonSchema({"anyOf": [_VLAN_NUMBER, _VLAN_MAPPING]}),
        ]
    ] = None
    """The VLAN that all its interfaces are in: 17, or {id: 17, type: 802.1ad}. {}: none. Absent: as it was."""
    trunks: Maybe[
        Annotated[
            dict[Name, Annotated[str, AfterValidator(_read_nic)]], _at_most(TRUNKS, "trunks"), AfterValidator(_one_each)
        ]
    ] = None
    """Its interfaces to physical networks, {campus: eth1}: each is a trunk of switches, on which segments may ride. If
    present, these and no others."""
    labels: Maybe[Labels] = None
    """Any words of yours."""


class QuotaSpec(_Spec):
    """How much a tenant may have, with what it hands on to tenants below it. What is absent is not limited by it."""

    networks: Maybe[Annotated[int, _between(*QUOTA), _numbers(*QUOTA)]] = None
    """Networks, on whatever carries them."""
    segments: Maybe[Annotated[int, _between(*QUOTA), _numbers(*QUOTA)]] = None
    """Segments of all its networks."""
    ports: Maybe[Annotated[int, _between(*QUOTA), _numbers(*QUOTA)]] = None
    """Ports of all its networks."""
    rate: Maybe[QuotaRate] = None
    """Of all these ports together, by the `rate` of each; one without counts as 100gbit."""


class TenantSpec(_Spec):
    """Somebody who owns networks."""

    later = {"members": "people of the tenant"}

    parent: Maybe[Name] = None
    """The tenant that this one is a part of. Absent: none; with a tenant's token, as it was or, if new, that tenant."""
    quota: Maybe[QuotaSpec] = None
    """How much it may have. Absent: as it was; `{}`: no limits of its own, only those of the tenants above it."""


class SegmentVlanSpec(_Spec):
    """The VLAN of a physical network that a segment rides on."""

    id: Maybe[Annotated[int, _between(*VLAN), _numbers(*VLAN)]] = None
    """1 to 4094. If absent, the one that it has, or the lowest that is free."""
    on: Maybe[Name] = None
    """The physical network: a name that machines have among their `trunks`."""

    @model_validator(mode="after")
    def _whole(self) -> SegmentVlanSpec:
        if self.on is None and self.id is not None:
            raise _refuse("missing_key", "needs the key on, the physical network", below="id")
        return self


class SegmentSpec(_Spec):
    """One L2 broadcast domain."""

    later = {
        "vni": "a VNI of your choice",
        "learn": "learning of MACs",
    }

    cidr: Maybe[
        Annotated[
            tuple[Annotated[Prefix, BeforeValidator(read_cidr)], ...],
            BeforeValidator(_listed),
            PlainSerializer(_one_or_list),
            _either(_TEXT, maxItems=2),
        ]
    ] = None
    """10.0.0.0/24, or a list of at most one CIDR of each family. A segment without one has no addresses."""
    dns: Maybe[
        Annotated[
            tuple[Annotated[Address, BeforeValidator(read_address)], ...],
            BeforeValidator(_listed),
            _at_most(DNS_PER_SEGMENT, "servers"),
            AfterValidator(_distinct),
            PlainSerializer(_one_or_list),
            _either(_TEXT, maxItems=DNS_PER_SEGMENT),
        ]
    ] = None
    """Servers that its workloads are told to ask for names: an address or a list. Routes must lead there."""
    transparent: Maybe[bool] = None
    """true: frames with VLAN tags, 802.1ad too, ride in it untouched. Its ports get 8 bytes less of MTU for that, and
    none of them is a host or a trunk."""
    vlan: Maybe[SegmentVlanSpec] = None
    """{id: 17, on: campus}: from machine to machine it rides on this VLAN of a physical network, and not in VXLAN. {}:
    in VXLAN. Absent: as it was."""
    labels: Maybe[Labels] = None
    """Any words of yours."""
    description: Maybe[Description] = None
    """What it is for."""


def _read_joined(value: Any) -> Any:
    """[web, db] is {web: [], db: []}: gateways that are not given are the segment's first addresses."""
    if isinstance(value, list):
        for index, name in enumerate(value):
            if not isinstance(name, str):
                raise _refuse("wrong_type", f"is {_shown(name)}, must be the name of a segment", below=index)
        _distinct(tuple(value))
        return {name: [] for name in value}
    if not isinstance(value, dict):
        raise _refuse("wrong_type", f"is {_shown(value)}, must be a list of segments, or a mapping to gateways")
    return value


def _write_joined(value: dict[str, tuple[Address, ...]]) -> Any:
    if not any(value.values()):
        return list(value)
    return {name: _one_or_list(addresses) for name, addresses in value.items()}


class RouterSpec(_Spec):
    """One distributed L3 instance."""

    segments: Maybe[
        Annotated[
            dict[Name, Addresses],
            BeforeValidator(_read_joined),
            _at_most(SEGMENTS_PER_ROUTER, "segments"),
            PlainSerializer(_write_joined),
            WithJsonSchema(
                {
                    "anyOf": [
                        {"type": "array", "items": _TEXT, "uniqueItems": True, "maxItems": SEGMENTS_PER_ROUTER},
                        {
                            "type": "object",
                            "additionalProperties": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
                            "maxProperties": SEGMENTS_PER_ROUTER,
                        },
                    ]
                }
            ),
        ]
    ] = None
    """What it joins: [web, db], or {web: 10.0.0.254, db: []} with gateways. A gateway not given is the segment's
    first address of that family. Of several routers in a segment the one with the lowest address is what its
    workloads use."""
    labels: Maybe[Labels] = None
    """Any words of yours."""
    description: Maybe[Description] = None
    """What it is for."""

    later = {"policies": "policies of a router"}


def _two_routers(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(value) != 2:
        raise _refuse(
            "bad_link", f"has {len(value)} {'router' if len(value) == 1 else 'routers'}: a link has two", limit=2
        )
    if value[0] == value[1]:
        raise _refuse("bad_link", f"has {value[0]} twice: a link joins two different routers", below=1)
    return value


class LinkSpec(_Spec):
    """Joins two routers, both ways. Routes follow the least sum of costs over links that are up."""

    between: Annotated[
        tuple[Name, ...],
        BeforeValidator(_only_listed),
        AfterValidator(_two_routers),
        PlainSerializer(list),
        WithJsonSchema({"type": "array", "items": _TEXT, "minItems": 2, "maxItems": 2, "uniqueItems": True}),
    ]
    """The two routers of this network that it joins."""
    cost: Annotated[int, _between(*COST), _numbers(*COST)] = 1
    """1 to 65535, for each packet in either direction. Paths of equal cost share the flows."""
    rate: Maybe[Rate] = None
    """1gbit, 10mbit, 64kbit: what each machine may send over it, in either direction. If absent, no limit."""
    up: Maybe[bool] = None
    """false: nothing is routed over it. If absent, as it is: up when it is made, then as `nestnet link` left it."""
    labels: Maybe[Labels] = None
    """Any words of yours."""
    description: Maybe[Description] = None
    """What it is for."""


class AttachSpec(_Spec):
    """What a port's workload hangs on, on the port's machine."""

    model_config = ConfigDict(json_schema_extra={"maxProperties": 1})

    netns: Maybe[Annotated[str, AfterValidator(_read_netns)]] = None
    """A network namespace that exists, as `ip netns` names it."""
    tap: Maybe[Annotated[str, AfterValidator(_read_nic)]] = None
    """A tap device: made if it does not exist."""

    @model_validator(mode="after")
    def _one_thing(self) -> AttachSpec:
        if self.netns is not None and self.tap is not None:
            raise _refuse("bad_attach", "has a netns and a tap: a port hangs on one of the two", below="tap")
        return self

    @property
    def value(self) -> Attach | None:
        """What that is; None for nothing, `{}`."""
        if self.netns is not None:
            return Attach("netns", self.netns)
        return Attach("tap", self.tap) if self.tap is not None else None


Owned = Annotated[
    tuple[Annotated[Prefix, BeforeValidator(_read_owned)], ...],
    BeforeValidator(_listed),
    _at_most(OWNS_PER_PORT, "prefixes"),
    AfterValidator(_distinct),
    PlainSerializer(_one_or_list),
    _either(_TEXT, maxItems=OWNS_PER_PORT),
]
Groups = Annotated[
    tuple[Name, ...],
    BeforeValidator(_listed),
    _at_most(GROUPS_PER_PORT, "groups"),
    AfterValidator(_distinct),
    PlainSerializer(_one_or_list),
    _either(_TEXT, maxItems=GROUPS_PER_PORT),
]


class VlanSpec(_Spec):
    """A port behind a tag of a trunk. It is called TRUNK.ID, lives where that does, and is up only when that is."""

    segment: Name
    """The segment it is in."""
    address: Maybe[Annotated[Addresses, AfterValidator(_some)]] = None
    """One address or a list: exactly these. If absent, the next free one of each family of the segment."""
    mac: Maybe[Mac] = None
    """02:00:00:00:00:01. If absent, that of the trunk."""
    owns: Maybe[Owned] = None
    """Further prefixes that it may send from, and that routers send to it."""
    groups: Maybe[Groups] = None
    """Groups it belongs to; policies name them."""
    rate: Maybe[Rate] = None
    """1gbit, 10mbit, 64kbit: what it may send, and what may be sent to it, each. If absent, no limit."""
    enabled: Maybe[bool] = None
    """false: nothing passes. If absent, as it is: true when it is made, then as `nestnet enable` and `disable` left
    it."""
    labels: Maybe[Labels] = None
    """Any words of yours."""
    description: Maybe[Description] = None
    """What it is for."""


def _read_tagged(value: Any) -> Any:
    """web is {segment: web}."""
    return {"segment": value} if isinstance(value, str) else value


def _write_tagged(spec: VlanSpec, handler: SerializerFunctionWrapHandler) -> Any:
    data = handler(spec)
    return data["segment"] if list(data) == ["segment"] else data


class _OfVlans:
    """For the schema: keys are ids, and a value may be the name of a segment."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        own = handler(schema)
        return {
            "type": "object",
            "propertyNames": {"pattern": "^[1-9][0-9]{0,3}$"},
            "additionalProperties": {"anyOf": [_TEXT, own["additionalProperties"]]},
            "minProperties": 1,
        }


def _read_vlan_id(text: object) -> int:
    """A VLAN id (802.1Q), as the key of a mapping. Raises PydanticCustomError."""
    low, high = VLAN
    if isinstance(text, int) or not isinstance(text, str) or re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise _refuse("bad_vlan", f"{_shown(text)} is no VLAN id: write a number from {low} to {high}", limit=high)
    if not low <= int(text) <= high or text[0] == "0":
        why = {0: "VLAN 0 is no VLAN, but a priority", 4095: "VLAN 4095 is reserved"}.get(int(text), f"VLAN {text}")
        raise _refuse("bad_vlan", f"{why}: ids are {low} to {high}", limit=high)
    return int(text)


Vlans = Annotated[
    dict[
        Annotated[int, BeforeValidator(_read_vlan_id)],
        Annotated[VlanSpec, BeforeValidator(_read_tagged), WrapSerializer(_write_tagged)],
    ],
    AfterValidator(_some),
    _OfVlans(),
]


def _with_native(schema: dict[str, Any]) -> None:
    schema["properties"]["native"] = {
        "type": "string",
        "description": "In place of `segment`, for a port with `vlans`: the segment of its frames without a tag.",
    }
    schema["required"] = ["host"]
    schema["oneOf"] = [{"required": ["segment"]}, {"required": ["native", "vlans"]}]


class PortSpec(_Spec):
    """An attachment point: a workload's MAC and addresses."""

    model_config = ConfigDict(json_schema_extra=_with_native)
    later = {"vlan": "a VLAN on a physical NIC"}

    segment: Name
    """The segment it is in. A trunk has `native` in its place: the segment of its frames without a tag."""
    host: Name
    """Where it lives: a machine, or in a carried network a port of the carrier with `hosts: true`."""
    address: Maybe[Annotated[Addresses, AfterValidator(_some)]] = None
    """One address or a list: exactly these. If absent, the next free one of each family of the segment."""
    mac: Maybe[Mac] = None
    """02:00:00:00:00:01. If absent, nestnet chooses one."""
    owns: Maybe[Owned] = None
    """Further prefixes that it may send from, and that routers send to it."""
    groups: Maybe[Groups] = None
    """Groups it belongs to; policies name them."""
    hosts: Maybe[bool] = None
    """true: networks carried by this one may have ports here."""
    attach: Maybe[AttachSpec] = None
    """What its workload hangs on: {netns: NAME} or {tap: NAME}, or {} for what a lab makes by itself. If absent, as it
    is: as `nestnet attach` and `detach` left it."""
    vlans: Maybe[Vlans] = None
    """What makes it a trunk: {10: web, 20: {segment: db, address: 10.2.0.9}}. Frames with a tag of these are those of
    further ports, each in its own segment."""
    rate: Maybe[Rate] = None
    """1gbit, 10mbit, 64kbit: what it may send, and what may be sent to it, each. If absent, no limit."""
    enabled: Maybe[bool] = None
    """false: nothing passes, nor for what lives on it. If absent, as it is: true when it is made, then as `nestnet
    enable` and `disable` left it."""
    labels: Maybe[Labels] = None
    """Any words of yours."""
    description: Maybe[Description] = None
    """What it is for."""

    @model_validator(mode="before")
    @classmethod
    def _read_native(cls, data: Any) -> Any:
        """What a trunk has as `native` is a segment like any other's: one word for each, and one field for both."""
        if not isinstance(data, dict) or ("native" not in data and "vlans" not in data):
            return data
        if "vlans" not in data:
            raise _refuse(
                "bad_trunk", "native is the segment of a trunk: write segment, or give it vlans", below="native"
            )
        if "segment" in data:
            raise _refuse("bad_trunk", "a port with vlans has its own segment as native: write that", below="segment")
        if "native" not in data:
            raise _refuse("missing_key", "needs the key native, the segment of frames without a tag")
        return {"segment" if key == "native" else key: value for key, value in data.items()}

    @model_serializer(mode="wrap")
    def _write_native(self, handler: SerializerFunctionWrapHandler) -> Any:
        data = handler(self)
        return {"native" if key == "segment" and self.vlans else key: value for key, value in data.items()}


class TaggedPortSpec(PortSpec):
    """A port behind a tag of a trunk as one of its network's ports: made of a VlanSpec, never read."""

    trunk: str
    tag: int


def all_ports(ports: Mapping[str, PortSpec] | None) -> dict[str, PortSpec]:
    """The ports of a network and, each behind its trunk, those behind tags, called TRUNK.ID."""
    found: dict[str, PortSpec] = {}
    for name, port in (ports or {}).items():
        found[name] = port
        for id, vlan in (port.vlans or {}).items():
            own = {key: getattr(vlan, key) for key in VlanSpec.model_fields}
            found[f"{name}.{id}"] = TaggedPortSpec.model_construct(**own, host=port.host, trunk=name, tag=id)
    return found


def place_of(name: str, port: PortSpec) -> str:
    """Where a port stands among the `ports` of its network, as part of a pointer."""
    return f"{port.trunk}/vlans/{port.tag}" if isinstance(port, TaggedPortSpec) else name


_Selectors = Annotated[
    Texts, _at_most(SELECTORS_PER_SIDE, "selectors"), _either(_TEXT, minItems=1, maxItems=SELECTORS_PER_SIDE)
]
_Services = Annotated[
    Texts, _at_most(SERVICES_PER_POLICY, "services"), _either(_TEXT, minItems=1, maxItems=SERVICES_PER_POLICY)
]


class PolicySpec(_Spec):
    """Who may talk to whom. The highest priority wins, then deny over allow."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["allow"]}, {"required": ["deny"]}]},
    )

    sources: _Selectors = Field(alias="from")
    """any, inside, hosts, a CIDR, a group, segment or port of this network, or a list. group:web decides."""
    targets: _Selectors = Field(alias="to")
    """As `from`."""
    allow: Maybe[_Services] = None
    """any, tcp, tcp/80, tcp/80-90, udp/53, icmp, icmpv6, carriage, or a list."""
    deny: Maybe[_Services] = None
    """As `allow`. A policy has one of the two."""
    priority: Annotated[int, _between(*PRIORITY), _numbers(*PRIORITY)] = 100
    """0 to 65535: the highest wins."""

    @model_validator(mode="after")
    def _one_verdict(self) -> PolicySpec:
        if self.allow is not None and self.deny is not None:
            raise _refuse("allow_and_deny", "a policy either allows or denies: make two of it", below="deny")
        if self.allow is None and self.deny is None:
            raise _refuse("missing_key", "needs the key allow or deny")
        return self


class GrantSpec(_Spec):
    """Hosts of a network for networks of another tenant, and how much of each may be carried by them in all; what is
    absent is not limited by it."""

    hosts: Maybe[
        Annotated[
            tuple[Name, ...],
            BeforeValidator(_only_listed),
            AfterValidator(_some),
            PlainSerializer(list),
            WithJsonSchema({"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True}),
        ]
    ] = None
    """Ports of this network with `hosts: true`. If absent, all there are, also those to come."""
    networks: Maybe[Annotated[int, _between(*QUOTA), _numbers(*QUOTA)]] = None
    """Networks on these hosts, and all that they carry in turn."""
    segments: Maybe[Annotated[int, _between(*QUOTA), _numbers(*QUOTA)]] = None
    """Segments of these."""
    ports: Maybe[Annotated[int, _between(*QUOTA), _numbers(*QUOTA)]] = None
    """Ports of these."""
    rate: Maybe[QuotaRate] = None
    """Of all these ports together, by the `rate` of each; one without counts as 100gbit."""


class NetworkSpec(_Spec):
    """A network, carried by the one it stands in, or by the wire."""

    later = {
        "quota": "a limit on what is carried here",
        "encrypt": "encryption between machines",
        "dns": "answering DNS",
        "routes": "routes that you write",
        "peers": "routing with other networks",
        "external": "ways out to other networks",
        "services": "load balancing",
        "remotes": "foreign VTEPs",
    }

    tenant: Maybe[Name] = None
    """Who owns it. If absent, the tenant of the network it stands in."""
    grant: Maybe[Name] = None
    """The hosts that carry it, when its tenant was granted those of several and it is new: a name from `nestnet get
    grants`."""
    carriage: Maybe[Literal["flat", "encapsulated"]] = None
    """flat, unless given: one encapsulation at any depth. encapsulated: its hosts run agents of their own, and VXLAN is
    really stacked; 50 bytes a level, or 70 over IPv6. Fixed when it is made."""
    underlay: Maybe[Literal[4, 6]] = None
    """The family of the hosts' addresses that carry it: that of the machines; in a carried network 4 unless given, and
    fixed when it is made."""
    mtu: Maybe[Mtu] = None
    """Bytes of IP that its ports may send: that of the machines less 50, or 70 if their addresses are IPv6, unless
    given. Of one that is encapsulated: as much less than what carries it."""
    grants: Maybe[dict[Name, GrantSpec]] = None
    """Tenants whose networks may be carried by hosts of this one. If present, these and no others."""
    segments: Maybe[dict[Name, SegmentSpec]] = None
    """Its broadcast domains."""
    routers: Maybe[Annotated[dict[Name, RouterSpec], _at_most(ROUTERS_PER_NETWORK, "routers")]] = None
    """What joins its segments."""
    links: Maybe[Annotated[dict[Name, LinkSpec], _at_most(LINKS_PER_NETWORK, "links")]] = None
    """What joins its routers."""
    ports: Maybe[dict[Name, PortSpec]] = None
    """Its attachment points."""
    policies: Maybe[
        Annotated[tuple[PolicySpec, ...], BeforeValidator(_only_listed), _at_most(POLICIES_PER_NETWORK, "policies")]
    ] = None
    """None: everything inside may talk. One or more: what none allows is denied."""
    networks: Maybe[dict[Name, NetworkSpec]] = None
    """Networks that this one carries; their ports live on its ports."""
    enabled: Maybe[bool] = None
    """false: nothing passes, nor in what it carries. If absent, as it is: true when it is made, then as `nestnet
    enable` and `disable` left it."""
    labels: Maybe[Labels] = None
    """Any words of yours."""
    description: Maybe[Description] = None
    """What it is for."""


class Check(_Spec):
    """What `nestnet test` proves with a real packet."""

    source: str = Field(alias="from")
    """The path of the port that sends."""
    target: str = Field(alias="to")
    """The path of the port whose workload should see it, or not."""
    send: str
    """icmp, tcp/PORT or udp/PORT."""
    expect: Literal["allow", "deny"]
    """allow: it arrives. deny: it has not after 2 s."""


class Manifest(_Spec):
    """Machines, tenants, networks and checks: the file, or the body of an apply."""

    later = {"remotes": "foreign VTEPs", "services": "load balancing", "peers": "routing with other networks"}

    api_version: Literal["nestnet/v1"] = Field(alias="apiVersion")
    """nestnet/v1"""
    machines: Maybe[dict[Name, MachineSpec]] = None
    """The computers. `up` makes them, `apply` expects them to exist."""
    tenants: Maybe[dict[Name, TenantSpec]] = None
    """Who owns networks. One that a network names need not be listed."""
    networks: Maybe[dict[Name, NetworkSpec]] = None
    """The networks that the wire carries, and in them those that they carry."""
    checks: Maybe[Annotated[tuple[Check, ...], BeforeValidator(_only_listed)]] = None
    """What `nestnet test` proves."""


def parse(data: object) -> Manifest:
    """The manifest in `data`, which is what JSON or YAML gave. Raises Invalid with every problem of shape and value."""
    _bound_depth(data)
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        nearest = Nearest()
        problems = [_problem(e, data, nearest) for e in error.errors(include_url=False)]
        raise Invalid(in_order(problems, data)) from None


def to_data(manifest: Manifest) -> dict[str, Any]:
    """JSON-able data that `parse` turns into the same manifest: what is absent stays absent."""
    return manifest.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def _bound_depth(data: object) -> None:
    """Networks nest by recursion, ours and pydantic's: bound it before anything recurses."""
    level: list[tuple[str, object]] = [("", data)]
    for _ in range(MAX_DEPTH + 1):
        below: list[tuple[str, object]] = []
        for pointer, at in level:
            networks = at.get("networks") if isinstance(at, dict) else None
            if isinstance(networks, dict):
                below += [(pointer + join("networks", name), network) for name, network in networks.items()]
        if not below:
            return
        level = below
    message = f"networks nest at most {MAX_DEPTH} levels deep: every packet walks down all of them"
    raise Invalid([Problem("too_deep", level[0][0], message, limit=MAX_DEPTH)])


# pydantic's errors as ours

_WANTED = {
    "string_type": "text",
    "string_sub_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BOOLS = ("yes", "no", "on", "off", "y", "n")


def _problem(error: ErrorDetails, data: object, nearest: Nearest) -> Problem:
    kind, loc, value = error["type"], error["loc"], error["input"]
    context: dict[str, Any] = error.get("ctx") or {}
    path, spec = _place(loc, data)
    pointer = join(*path)
    key = str(path[-1]) if path else "the manifest"
    subject = _owner(path) + " "

    if kind == "extra_forbidden":
        return _unknown_key(pointer, key, spec, nearest)
    if kind == "missing":
        missing = str(loc[-1])
        return Problem("missing_key", pointer, f"{_owner(path)} needs the key {missing}")
    if kind == "literal_error":
        allowed = _allowed(context)
        near = nearest(value, allowed) if isinstance(value, str) else None
        message = f"{subject}is {_shown(value)}: must be {' or '.join(allowed)}"
        return Problem("bad_value", pointer, message, nearest=near)
    if not path and data is None:
        return Problem("wrong_type", "", "the manifest is empty: it begins with `apiVersion: nestnet/v1`")
    if kind in _WANTED:
        message = f"{subject}is {_shown(value)}, must be {_WANTED[kind]}{_hint(kind, value)}"
        return Problem("wrong_type", pointer, message)
    if kind == "string_unicode":
        return Problem("control_character", pointer, f"{subject}is not valid Unicode")
    if kind == "recursion_loop":
        return Problem("too_deep", pointer, f"{subject}contains itself")
    if "text" in context:  # ours, from _refuse
        if "below" in context:
            pointer += join(context["below"])
        text = str(context["text"])
        if text.startswith(("is ", "has ", "needs ")):
            text = subject + text
        return Problem(kind, pointer, text, limit=context.get("limit"), nearest=context.get("nearest"))
    return Problem("wrong_type", pointer, f"{subject}is {_shown(value)}, which cannot stand here")


def _place(loc: Sequence[int | str], data: object) -> tuple[list[int | str], type[_Spec]]:
    """Where in `data` pydantic's `loc` is, and the model of the innermost mapping on the way."""
    at: Any = data
    path: list[int | str] = []
    for step in loc:
        if isinstance(at, list):
            inside = isinstance(step, int) and step < len(at)
        elif step == "segment" and isinstance(at, dict) and "native" in at and "vlans" in at:
            inside, step = True, "native"
        else:
            inside = isinstance(at, dict) and step in at
        if not inside:
            break  # '[key]', the index in a list that was given as one value, or a missing key
        at = at[step]
        path.append(step)
    return path, _spec_at(path)


@cache
def _members() -> dict[tuple[type[_Spec], str], type[_Spec]]:
    """(model, collection's key) -> model of a member."""
    return {
        (Manifest, "machines"): MachineSpec,
        (Manifest, "tenants"): TenantSpec,
        (Manifest, "networks"): NetworkSpec,
        (Manifest, "checks"): Check,
        (NetworkSpec, "grants"): GrantSpec,
        (NetworkSpec, "segments"): SegmentSpec,
        (NetworkSpec, "routers"): RouterSpec,
        (NetworkSpec, "links"): LinkSpec,
        (NetworkSpec, "ports"): PortSpec,
        (PortSpec, "vlans"): VlanSpec,
        (NetworkSpec, "policies"): PolicySpec,
        (NetworkSpec, "networks"): NetworkSpec,
    }


def _spec_at(path: Sequence[int | str]) -> type[_Spec]:
    """The model of the mapping that the last key of `path` stands in."""
    spec: type[_Spec] = Manifest
    for i in range(0, len(path) - 2, 2):
        below = _members().get((spec, str(path[i])))
        if below is None:
            break
        spec = below
    if spec is TenantSpec and len(path) > 3 and path[2] == "quota":
        return QuotaSpec
    if spec is MachineSpec and len(path) > 3 and path[2] == "vlan":
        return MachineVlanSpec
    if spec is SegmentSpec and len(path) > 2 and path[-2] == "vlan":
        return SegmentVlanSpec
    return AttachSpec if spec is PortSpec and len(path) > 2 and path[-2] == "attach" else spec


def _unknown_key(pointer: str, key: str, spec: type[_Spec], nearest: Nearest) -> Problem:
    if key in spec.later:
        message = f"{key} ({spec.later[key]}) is not supported by this version: take it out"
        return Problem("not_supported", pointer, message)
    known = [field.alias or name for name, field in spec.model_fields.items()]
    known += ["native"] * (spec is PortSpec)
    near = nearest(key, known)
    end = meant(near) or f"; there are {', '.join(known)}"
    return Problem("unknown_key", pointer, f"{quote(key)} is no key here{end}", nearest=near)


def _owner(path: Sequence[int | str]) -> str:
    if not path:
        return "the manifest"
    if isinstance(path[-1], int) and len(path) > 1:
        singular = {"policies": "policy", "checks": "check"}.get(str(path[-2]), str(path[-2]))
        return f"{singular} {path[-1] + 1}"
    return quote(path[-1])[1:-1]


def _allowed(context: Mapping[str, Any]) -> list[str]:
    return [part.strip("'") for part in re.split(r", | or ", str(context.get("expected", "")))]


def _shown(value: object) -> str:
    """What somebody wrote, in a few words."""
    if value is None:
        return "empty"
    if value is True or value is False:
        return str(value).lower()
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, int):
        return _number(value)
    if isinstance(value, float):
        return str(value)
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list | tuple) else "something else"


def _number(value: int) -> str:
    # Python refuses to write out very long integers.
    return str(value) if abs(value) < 10**30 else "a number of more than 30 digits"


def _quote_hint(value: object) -> str:
    if isinstance(value, bool | int | float):
        return ": put it in quotes"
    return ""


def _hint(kind: str, value: object) -> str:
    if kind.startswith("string"):
        return _quote_hint(value)
    if kind.startswith("bool") and isinstance(value, str) and value.lower() in _BOOLS:
        word = "true" if value.lower() in ("yes", "on", "y") else "false"
        return f": YAML 1.2 writes {word}"
    if value is None and _WANTED[kind] == "a mapping":
        return ": write {} for one without anything of its own"
    return ""
