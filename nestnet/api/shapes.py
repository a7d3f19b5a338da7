"""What goes in and comes out, as pydantic models: only here, at the edge."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nestnet.model.manifest import QUOTA, read_quota_rate

API_VERSION = "nestnet/v1"


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, use_attribute_docstrings=True)


class _Resource(Shape):
    id: str
    """Opaque, never used again; stands wherever a path may."""
    etag: str
    """What `If-Match` wants, in quotes; another one whenever the object itself changes."""
    kind: str
    name: str
    path: str
    """acme/staging/web1: networks, then the name."""


class MachineVlan(Shape):
    id: int
    type: Literal["802.1q", "802.1ad"] = "802.1q"


class Machine(_Resource):
    row: int | None
    """The number that the machine's agent knows it by; null: not for you to see, like all that is empty with it."""
    address: str | None
    """In the underlay."""
    mtu: int
    """Of its interfaces to the underlay, in bytes of IP."""
    nics: list[str]
    """The names of those; none: the one that has the address."""
    vlan: MachineVlan | None
    """The one that they are in: all that they send and hear has its tag."""
    trunks: dict[str, str]
    """Physical network -> the interface that leads there."""
    labels: dict[str, str]
    fenced: bool
    """Shut out: to all others it is a stranger. `PATCH` sets it."""
    realised: int | None
    """The revision that it has made so; null before its first report, or not for you to see."""
    reported: float | None
    """Seconds since its last report."""
    problems: list[str]
    """What keeps it from realising more, in its own words."""


class Amounts(Shape):
    networks: int | None = None
    segments: int | None = None
    ports: int | None = None
    rate: int | None = None
    """In bit/s."""


class Tenant(_Resource):
    parent: str | None
    """null: none, or one that is not for you to see."""
    suspended: bool
    """Its tokens may read, and nothing else: it is suspended, or one above it is. `PATCH` sets its own."""
    quota: Amounts
    """What it may have, with what it hands on; null: what the tenants above it have left."""
    used: Amounts
    """What its own networks have."""


class Network(_Resource):
    tenant: str | None
    carrier: str | None
    """Path of the network that carries it; null: the wire."""
    carriage: str
    underlay: int
    """The family, 4 or 6, of the hosts' addresses that carry it."""
    mtu: int
    """What its ports may send, in bytes of IP."""
    enabled: bool
    """Administratively: what `PATCH` says."""
    state: Literal["up", "degraded", "down: disabled", "down: carrier"]
    """degraded: some of its hosts are down. It is worked out when it is read."""
    cause: str | None
    """Why it is not up."""
    revision: int
    """How often anything in it has changed."""
    labels: dict[str, str]
    description: str


class SegmentVlan(Shape):
    """A VLAN of a physical network."""

    id: int
    on: str


class Segment(_Resource):
    network: str
    cidrs: list[str]
    dns: list[str]
    """What its workloads are told to ask for names."""
    transparent: bool
    """Do frames with VLAN tags ride in it?"""
    vni: int | None
    """null: not for you to see."""
    vlan: SegmentVlan | None
    """What it rides on from machine to machine, in place of VXLAN; null: VXLAN, or not for you to see."""
    gateways: list[str]
    """What its workloads use as default routes."""
    labels: dict[str, str]
    description: str


class Router(_Resource):
    network: str
    mac: str
    segments: dict[str, list[str]]
    """Segment -> gateway addresses there."""
    labels: dict[str, str]
    description: str


class Link(_Resource):
    network: str
    between: list[str]
    """The two routers that it joins."""
    cost: int
    up: bool
    """Administratively: what `PATCH` says."""
    rate: int | None
    """What each machine may send over it in either direction, in bit/s; null: no limit."""
    labels: dict[str, str]
    description: str


class Moving(Shape):
    phase: Literal["prepare", "leave", "flip", "settle", "failed"]
    """Until the flip `host` is where it comes from, then where it goes to."""
    problem: str | None
    """Why it failed."""
    other: str | None
    """Where else it lives meanwhile."""


class Port(_Resource):
    row: int | None
    """The number that agents know it by: a lab's namespace is named after it; null: not for you to see."""
    network: str
    segment: str
    host: str
    """A machine, or a port of the carrier."""
    machine: str
    """Where it is in the end: a machine, or a host that was granted to you."""
    mac: str
    addresses: list[str]
    """With prefix lengths."""
    gateways: list[str]
    mtu: int
    owns: list[str]
    groups: list[str]
    hosts: bool
    attach: dict[str, str] | None
    """What its workload should hang on, {"netns": NAME} or {"tap": NAME}; null: nothing was chosen. `PATCH` sets it."""
    trunk: str | None
    """The port on whose attachment it is behind a tag; null: it has its own."""
    vlan: int | None
    """The id of that tag."""
    rate: int | None
    """What it may send, and what may be sent to it, each, in bit/s; null: no limit."""
    enabled: bool
    """Administratively: what `PATCH` says."""
    state: Literal["up", "down: disabled", "down: carrier"]
    """down: carrier: what carries it lets nothing pass to any other host. It is worked out when it is read."""
    cause: str | None
    """Why it is not up."""
    attachment: Any
    """What the agent of its machine says about it; null: nothing yet."""
    moving: Moving | None
    """How far its move to another host is; null: it stays where it is."""
    labels: dict[str, str]
    description: str


class Host(Shape):
    """Where ports live: a machine of the fabric, or in a network a port with `hosts: true`."""

    id: str
    """Of the machine or port."""
    kind: Literal["host"]
    name: str
    """What `host:` says."""
    path: str
    network: str | None
    """null: the fabric."""
    addresses: list[str]
    """Where it is reached in what it is in; of a machine its operator sees it."""
    machine: str
    """Where it is in the end."""
    state: Literal["up", "down: disabled", "down: carrier", "down: lost"]
    cause: str | None
    networks: int
    """How many networks have ports here, as far as you may see them."""
    ports: int
    """How many those have here."""


class Policy(_Resource):
    network: str
    text: str
    """All of it in one line."""
    sources: Annotated[list[str], Field(alias="from")]
    targets: Annotated[list[str], Field(alias="to")]
    allow: list[str] | None = None
    deny: list[str] | None = None
    priority: int


Item = TypeVar("Item")


class Listed(Shape, Generic[Item]):
    """One page of a list."""

    api_version: Annotated[Literal["nestnet/v1"], Field(alias="apiVersion")] = "nestnet/v1"
    kind: str
    """PortList for ports."""
    items: list[Item]
    next: str | None
    """`cursor` of the next page; null: this is the last."""


class Manifested(Shape):
    """A manifest, as the network file has it."""

    manifest: dict[str, Any]
    prune: bool = False
    """Delete the other networks of the tenants that the manifest names."""


class Change(Shape):
    op: Literal["+", "~", "-"]
    kind: str
    path: str
    fields: dict[str, Any]
    """For + its fields, for ~ field -> [old, new]."""
    pointer: str
    """Where the manifest speaks of it (RFC 6901)."""


class Plan(Shape):
    changes: list[Change]
    disturbs: list[str]
    """What running traffic would notice."""
    machines: list[str]
    """Machines that get rows."""
    etag: str
    """`If-Match` for an apply that is to be refused if any of these networks changes before it."""


class Changed(Shape):
    """Something was changed, or was so already."""

    revision: int | None
    """The one since which it is so; null: it counts what others change, too."""
    token: str
    """`since` of `GET /v1/status`, to ask which machines have made it so, and of `GET /v1/watch`."""


class PartLine(Shape):
    """A part of a batch that is there; or, with `problem`, the one that is not, which is the last."""

    lines: list[int]
    """Its first and last line."""
    networks: int = 0
    """How many were made up to here."""
    revision: int | None = None
    token: str = ""
    problem: Problem | None = None


class Applied(Changed):
    plan: Plan


class Deleted(Changed):
    pass


class LinkState(Shape):
    """Whether routes may lead over a link."""

    up: Annotated[bool, Field(strict=True)]


class PortState(Shape):
    """What a port's workload should hang on, or whether the port is up: one of the two."""

    attach: Any = None
    """{"netns": NAME}, {"tap": NAME}, or {} for nothing."""
    enabled: Annotated[bool | None, Field(strict=True)] = None
    """false: nothing passes, nor for what lives on it."""


class Attached(Changed):
    """A port that was given something to hang on, or nothing; or taken down or up."""

    machines: list[str]
    """The machines that have to make it so."""
    port: Port


class NetworkState(Shape):
    """Whether a network is up, or what carries it: one of the two."""

    enabled: Annotated[bool | None, Field(strict=True)] = None
    """false: nothing passes, nor in what it carries."""
    carrier: str | None = None
    """Path or id of the network that is to carry it; null: the wire."""
    hosts: Annotated[dict[str, str], Field(max_length=20_000)] = {}
    """With `carrier`: port -> where it is to live, a machine or a port of the carrier, by name. A port that is not
    named goes to the host that is called as its own."""


class Networked(Changed):
    """A network that was taken down or up, or was given another carrier."""

    machines: list[str]
    """Machines that get rows."""
    network: Network


class Linked(Changed):
    """A link that was taken up or down."""

    machines: list[str]
    """Machines that get rows."""
    link: Link


Row = Annotated[int, Field(ge=0, lt=1 << 63)]
"""What a column of the store can hold."""
Limit = Annotated[int | None, Field(ge=QUOTA[0], le=QUOTA[1])]
MostRate = Annotated[int | None, BeforeValidator(lambda value: None if value is None else read_quota_rate(value))]


class Limits(Shape):
    """How much a tenant may have of each; null: what the tenants above it have left."""

    networks: Limit = None
    segments: Limit = None
    ports: Limit = None
    rate: MostRate = None
    """Of all ports together: bit/s, or as 10mbit."""


class TenantWish(Shape):
    """A tenant that somebody wants."""

    name: Annotated[str, Field(max_length=63)]
    """Of all but the operator's: its parent's, a hyphen, and more."""
    parent: Annotated[str | None, Field(max_length=63)] = None
    """The tenant that it is a part of; of whoever owns only one, that one unless given."""
    quota: Limits = Limits()


class TenantState(Shape):
    """What a tenant may have, and whether its tokens may change anything."""

    quota: Limits | None = None
    """Limits that are left out stay as they are."""
    suspended: Annotated[bool | None, Field(strict=True)] = None
    """true: its tokens, and those of the tenants below it, may read and nothing else. Its networks go on."""


class Tenanted(Changed):
    """A tenant that was given other limits, suspended or resumed."""

    tenant: Tenant


class Join(Shape):
    """A machine that is to carry ports."""

    name: Annotated[str, Field(max_length=63)]
    address: str
    mtu: Annotated[int, Field(ge=626, le=65535)] = 1500
    nics: list[str] = []
    vlan: MachineVlan | None = None
    trunks: dict[str, str] | None = None
    """Physical network -> the interface that leads there. Absent: as they were."""
    labels: dict[str, str] = {}


class Enter(Join):
    """A machine that joins by itself, with its join token. One on a port has that port's address, and says none."""

    address: str = ""

    request: Annotated[str, Field(max_length=10_000)]
    """A certificate request, PEM, for the key that it has made: one on the curve P-256."""


class Entered(Shape):
    machine: Machine
    certificate: str
    """PEM."""


class Renewal(Shape):
    request: Annotated[str, Field(max_length=10_000)]
    """A certificate request, PEM, for a new key."""


class Certificate(Shape):
    certificate: str
    """PEM."""


class MachineState(Shape):
    """Whether a machine is shut out."""

    fenced: Annotated[bool, Field(strict=True)]


class Fenced(Changed):
    """A machine that was shut out, or let in again."""

    machines: list[str]
    """Machines that get rows: all others."""
    machine: Machine


Role = Literal["reader", "owner"]


class TokenWish(Shape):
    """A token that somebody wants."""

    name: Annotated[str, Field(pattern="^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    """What the audit log will call its holder. Of all but the operator's: the name of a tenant that all its
    tenants are, or are below, a hyphen, and more."""
    everything: Role | None = None
    """Its role for all there is: `owner` is the operator."""
    tenants: Annotated[dict[Annotated[str, Field(max_length=63)], Role], Field(max_length=1000)] = {}
    """Its role for each of these, and nothing else."""
    ttl: Annotated[float | None, Field(gt=0, le=100 * 365 * 86400)] = None
    """Seconds for which it counts; null: until it is deleted. It never outlives the token that asks for it."""


class Token(Shape):
    name: str
    everything: Role | None
    tenants: dict[str, Role]
    made: float
    """Seconds since 1970."""
    until: float | None
    by: str
    """Who made it; 'parent': somebody above, who is not for you to see."""


class NewToken(Token):
    token: str
    """What to send as `Authorization: Bearer ...`."""


class Tokens(Shape):
    api_version: Annotated[Literal["nestnet/v1"], Field(alias="apiVersion")] = "nestnet/v1"
    kind: str
    items: list[Token]


class Guest(Shape):
    """The agent on a port of a machine, which shall be able to join."""

    port: Row
    """The port's number in the machine's feed."""
    ttl: Annotated[float, Field(gt=0, le=30 * 86400)] = 600.0
    """Seconds for which the token counts."""


class JoinWish(Shape):
    """A machine that shall be able to join."""

    machine: Annotated[str, Field(max_length=2000)]
    """Its name; of one on a host port the path of that port."""
    ttl: Annotated[float, Field(gt=0, le=30 * 86400)] = 3600.0
    """Seconds for which the token counts."""


class NewJoinToken(Shape):
    machine: str
    until: float
    """Seconds since 1970."""
    token: str
    """For `nestnet join`."""


class Noticed(Shape):
    """Something that an agent noticed."""

    kind: Literal["repaired", "drops", "started"]
    text: Annotated[str, Field(max_length=1000)]


class Report(Shape):
    """What an agent says of its machine."""

    revision: Row
    """The one that it has realised; 0: none, or it has a token instead."""
    token: Annotated[str, Field(max_length=200)] | None = None
    """What the feed of a machine on a port has for a number."""
    problems: list[str] = []
    ports: dict[str, Any] | None = None
    """Port, by its number in the machine's feed -> anything it knows of that attachment. Absent: as said before."""
    events: Annotated[list[Noticed], Field(max_length=100)] = []
    """What happened since the last report."""


class MachineStatus(Shape):
    name: str
    id: str
    address: str | None
    fenced: bool
    realised: int | None
    current: bool
    """It has realised `since`; without that, all that you may see."""
    reported: float | None
    problems: list[str]


class Status(Shape):
    api_version: Annotated[Literal["nestnet/v1"], Field(alias="apiVersion")] = "nestnet/v1"
    controller: str
    """The version that runs."""
    revision: int | None
    """null: not for you to see."""
    time: float
    """Its clock: seconds since 1970."""
    machines: list[MachineStatus]


class FeedRow(Shape):
    kind: str
    id: int
    value: dict[str, Any] | None
    """null: gone."""


class FeedLine(Shape):
    """A batch; or, without `rows`, a heartbeat."""

    revision: int | str
    """What is told by this line is so then. To machines on ports it is the token: a number would count what others
    change."""
    token: str
    """`since` for the next time."""
    store: str
    """Which store this is: another one after a restore."""
    confirmed: bool
    """Somebody agrees that what this store does not know is removed."""
    snapshot: bool = False
    rows: list[FeedRow] = []


class WatchedObject(Shape):
    id: str
    kind: str
    object: dict[str, Any] | None
    """As GET has it; null: gone."""


class WatchLine(Shape):
    """Objects that changed; or, without `objects`, a heartbeat."""

    revision: int | None
    """null: not for you to see."""
    token: str | None = None
    """`since` for the next time. Only the last line of a snapshot has one."""
    snapshot: Literal["new", "other_store", "too_old"] | None = None
    """Part of everything there is, and why; what no part names is gone."""
    objects: list[WatchedObject] = []


class EventChange(Shape):
    op: Literal["+", "~", "-"]
    kind: str
    path: str
    fields: dict[str, Any] = {}


class Event(Shape):
    at: float
    """Seconds since 1970."""
    kind: str
    text: str
    who: str | None
    """Who asked for it."""
    machine: str | None
    revision: int | None
    count: int | None
    """Of a change: how many objects."""
    changes: list[EventChange]
    """Of a change: the first 50 of them."""


class EventLine(Shape):
    """An event; or, without, a heartbeat."""

    token: str
    """`since` for the next time."""
    event: Event | None = None


class Confirmed(Shape):
    revision: int


class Restored(Shape):
    revision: int
    """Far above all before: agents and clients notice."""


class Broken(Shape):
    """One broken rule."""

    code: str
    pointer: str
    """RFC 6901, into the manifest or the body."""
    message: str
    limit: int | str | None = None
    nearest: str | None = None


class Problem(Shape):
    """An error (RFC 9457). `code` is what programs branch on."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    problems: list[Broken] | None = None
    dependants: list[str] | None = None
    """What stands in the way."""
    candidates: list[str] | None = None
    """What an ambiguous name could mean."""
    changes: list[str] | None = None
    """What changed since it was looked at."""
    limit: int | None = None
    nearest: str | None = None


RESOURCES: dict[str, type[_Resource]] = {
    "machine": Machine,
    "tenant": Tenant,
    "network": Network,
    "segment": Segment,
    "router": Router,
    "link": Link,
    "port": Port,
    "policy": Policy,
}
