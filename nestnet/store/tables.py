"""The tables. What must be unique is a UNIQUE constraint here, never a check in Python.

Row ids are taken from `counter`, one row for each kind, in the transaction that uses them, so they
are known before a bulk insert and are never used twice. Row 0 of `network` is the fabric: the root
of every carrier chain, whose `mtu` and `underlay` are those of its wire.

`change` is what the feed reads. A change of a port also keeps where the port was before, one of a network
what carried it, so that what a machine needed at an earlier revision can be worked out (feed.py).

Addresses, prefixes and JSON are text in canonical form: equal things are equal text.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Id = BigInteger().with_variant(Integer, "sqlite")  # 64 bits in both; SQLite's rowid must be called INTEGER.


def _refers(target: str) -> ForeignKey:
    """Judged at COMMIT, so that a transaction may write rows in any order."""
    return ForeignKey(target, deferrable=True, initially="DEFERRED")


def _revision() -> Column[int]:
    """The last one that changed the object itself: what its ETag is made of."""
    return Column("revision", Id, nullable=False, server_default="0")


def _sparse(*columns: str, unique: bool = False) -> Index:
    """An index of those rows that have something there: most have not, and pay nothing for it."""
    first = columns[0]
    return Index(None, *columns, unique=unique, sqlite_where=text(f'"{first}" IS NOT NULL'))


def _part_of(target: str) -> ForeignKey:
    """Goes when its owner goes."""
    return ForeignKey(target, ondelete="CASCADE", deferrable=True, initially="DEFERRED")


store = Table(
    "store",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="single"), primary_key=True),
    Column("epoch", Text, nullable=False),  # Another database has another epoch: its tokens mean nothing here.
    Column("key", LargeBinary, nullable=False),
    # Did somebody say that agents may remove all that this store does not know? (a restored one: DESIGN, I6)
    Column("confirmed", Boolean(create_constraint=False), nullable=False, server_default="0"),
    Column("vnis", Integer, nullable=False, server_default=str((1 << 24) - 1)),  # How many a domain has.
    # How many ids a physical network has, and as `after` of a range of VNIs, for all of them.
    Column("vlans", Integer, nullable=False, server_default="4094"),
    Column("vlans_after", Id, nullable=False, server_default="0"),
)

revision = Table(
    "revision",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="single"), primary_key=True),
    Column("n", Id, nullable=False),
    Column("oldest", Id, nullable=False),  # Changes after this revision are still in `change`.
)

counter = Table(
    "counter",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("last", Id, nullable=False),
)

change = Table(
    "change",
    metadata,
    Column("seq", Id, primary_key=True),
    Column("revision", Id, nullable=False),
    Column("network", Id, nullable=False),  # 0: the fabric's, so every machine's
    Column("kind", Text, nullable=False),
    Column("id", Id, nullable=False),
    Column("was_machine", Id),
    Column("was_port", Id),
    Column("was_other", Id),  # Where else it was, while it moved: a machine if `was_machine` says one, else a port.
    Column("was_carrier", Id),
    Column("was_encapsulated", Boolean(create_constraint=False)),
    # A name: the tenant of a network, or the one that a tenant was below. Who could see it is told that it went.
    Column("was_tenant", Text),
    # Of a network that is new: with all that is in it, which has no rows of its own then.
    Column("whole", Boolean(create_constraint=False), nullable=False, server_default="0"),
    Index(None, "revision"),
    Index(None, "network", "revision"),
)

tenant = Table(
    "tenant",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("parent", Id, _refers("tenant.id"), index=True),
    # Its tokens may read, and nothing else; so may those of the tenants below it.
    Column("suspended", Boolean(create_constraint=False), nullable=False, server_default="0"),
    Column("networks", Id),  # Quotas; none: what the nearest tenant above has left.
    Column("segments", Id),
    Column("ports", Id),
    Column("rate", Id),  # In bit/s.
    _revision(),
)

# A computer that runs an agent: of the fabric, or on a host port (`port`) of the network that is its `domain`. That one
# is called as its port's public id; its address and MTU are the port's, and not kept here.
machine = Table(
    "machine",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("domain", Id, nullable=False, server_default="0", index=True),
    Column("port", Id),
    Column("address", Text, nullable=False, unique=True),
    Column("mtu", Integer, nullable=False),
    Column("nics", Text, nullable=False, server_default="[]"),  # JSON: names; none: the one that has the address.
    Column("vlan", Integer),  # That these are in; none: they send and hear without a tag.
    Column("vlan_type", Text),  # 802.1q or 802.1ad
    Column("trunks", Text, nullable=False, server_default="{}"),  # JSON: physical network -> NIC.
    Column("labels", Text, nullable=False),
    Column("joined", Id, nullable=False),  # The revision at which it was declared.
    # How often somebody has joined as it: a certificate says which time it is of, and only the last one's count.
    Column("joins", Integer, nullable=False, server_default="0"),
    # Shut out: a stranger to all others, whatever it still says and sends.
    Column("fenced", Boolean(create_constraint=False), nullable=False, server_default="0"),
    _revision(),
    Index(None, "port", unique=True),
)

report = Table(
    "report",
    metadata,
    Column("machine", Id, _part_of("machine.id"), primary_key=True),
    Column("realised", Id, nullable=False),
    Column("at", Float, nullable=False),  # Seconds since 1970.
    Column("problems", Text, nullable=False),
    Column("ports", Text, nullable=False),
)

network = Table(
    "network",
    metadata,
    Column("id", Id, primary_key=True),
    Column("carrier", Id, _refers("network.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("tenant", Id, _refers("tenant.id"), index=True),
    # Do the ports that carry it run agents of their own? Then those are the machines that its ports live on.
    Column("encapsulated", Boolean(create_constraint=False), nullable=False, server_default="0"),
    Column("underlay", Integer, nullable=False),
    Column("mtu", Integer),  # Chosen, at most what the domain allows; none: all of that.
    Column("enabled", Boolean(create_constraint=False), nullable=False),
    Column("labels", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("revision", Id, nullable=False),  # The last one that changed anything in it.
    # How many did: what everybody is told as its revision, as that of the store counts what others change.
    Column("version", Id, nullable=False, server_default="0"),
    # Closed by whoever granted what carries it (grants.py).
    Column("cut", Boolean(create_constraint=False), nullable=False, server_default="0"),
    # Whose limits it counts under: the grant by which it is carried, or that of what carries it.
    Column("grant", Id),
    _sparse("grant"),
    UniqueConstraint("carrier", "name"),
    Index(None, "carrier"),  # In the order of ids, as pages are.
    # Names come in no order: each new one costs a page for each index that begins with them. Those on the wire have the
    # one that is above (objects.called).
    Index(None, "name", "tenant", sqlite_where=text("carrier != 0")),
    Index(None, "tenant", "carrier"),
)

# How many there are, without counting: of all kinds that are in networks, and of these without the fabric.
tally = Table(
    "tally",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("n", Id, nullable=False),
)

# The same of what tenants have and what counts under grants, of all networks that have both in common; 0: neither.
usage = Table(
    "usage",
    metadata,
    Column("tenant", Id, primary_key=True),
    Column("grant", Id, primary_key=True),
    Column("networks", Id, nullable=False),
    Column("segments", Id, nullable=False),
    Column("ports", Id, nullable=False),
    Column("rate", Id, nullable=False),  # In bit/s.
    Index(None, "grant"),
)

# Hosts of `carrier` (0: machines), on which networks of `tenant` may be carried (grants.py).
grant = Table(
    "grant",
    metadata,
    Column("id", Id, primary_key=True),
    Column("carrier", Id, _part_of("network.id"), nullable=False),
    Column("tenant", Id, _part_of("tenant.id")),  # None: an invitation that nobody has redeemed yet.
    Column("name", Text, nullable=False),  # What the tenant calls it.
    Column("hosts", Text),  # JSON: rows of machines or ports; none: all there are.
    Column("networks", Id),  # Limits; none: what the tenant that grants has left.
    Column("segments", Id),
    Column("ports", Id),
    Column("rate", Id),  # In bit/s.
    Column("suspended", Boolean(create_constraint=False), nullable=False, server_default="0"),
    Column("cut", Boolean(create_constraint=False), nullable=False, server_default="0"),
    Column("ends", Float),  # Then it goes, with all that is carried by it. Seconds since 1970.
    Column("digest", Text, unique=True),  # Of the invitation's secret, which counts until:
    Column("until", Float),
    _revision(),
    UniqueConstraint("carrier", "tenant"),
    UniqueConstraint("tenant", "name"),
)

segment = Table(
    "segment",
    metadata,
    Column("id", Id, primary_key=True),
    Column("network", Id, _refers("network.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("domain", Id, _refers("network.id"), nullable=False),
    Column("vni", Integer, nullable=False),
    Column("dns", Text, nullable=False, server_default="[]"),  # JSON: addresses, in the order given.
    Column("transparent", Boolean(create_constraint=False), nullable=False, server_default="0"),
    Column("physical", Text),  # The physical network that it rides on, by its name, and the VLAN there; none: VXLAN.
    Column("vlan", Integer),
    Column("labels", Text, nullable=False),
    Column("description", Text, nullable=False),
    _revision(),
    UniqueConstraint("network", "name"),
    UniqueConstraint("domain", "vni"),
    Index(None, "name"),
    _sparse("physical", "vlan", unique=True),
)

segment_cidr = Table(
    "segment_cidr",
    metadata,
    Column("segment", Id, _part_of("segment.id"), primary_key=True),
    Column("family", Integer, CheckConstraint("family IN (4, 6)", name="family"), primary_key=True),
    Column("cidr", Text, nullable=False),
)

router = Table(
    "router",
    metadata,
    Column("id", Id, primary_key=True),
    Column("network", Id, _refers("network.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("mac", Id, nullable=False),
    Column("labels", Text, nullable=False),
    Column("description", Text, nullable=False),
    _revision(),
    UniqueConstraint("network", "name"),
    Index(None, "name"),
)

router_interface = Table(
    "router_interface",
    metadata,
    Column("router", Id, _part_of("router.id"), primary_key=True),
    Column("segment", Id, _refers("segment.id"), primary_key=True),
    Index(None, "segment"),
)

link = Table(
    "link",
    metadata,
    Column("id", Id, primary_key=True),
    Column("network", Id, _refers("network.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("router", Id, _refers("router.id"), nullable=False),
    Column("other", Id, _refers("router.id"), nullable=False),
    Column("cost", Integer, nullable=False),
    Column("up", Boolean(create_constraint=False), nullable=False),
    Column("rate", BigInteger, nullable=False, server_default="0"),
    Column("labels", Text, nullable=False),
    Column("description", Text, nullable=False),
    _revision(),
    UniqueConstraint("network", "name"),
    Index(None, "name"),
    CheckConstraint("router <> other", name="two_routers"),
    Index(None, "router"),
    Index(None, "other"),
)

port = Table(
    "port",
    metadata,
    Column("id", Id, primary_key=True),
    Column("network", Id, _refers("network.id"), nullable=False),
    Column("segment", Id, _refers("segment.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("host_machine", Id, _refers("machine.id")),
    Column("host_port", Id, _refers("port.id")),
    Column("other_machine", Id),  # Where else it lives while it moves (moves.py), or neither.
    Column("other_port", Id),
    Column("leaving", Boolean(create_constraint=False), nullable=False, server_default="0"),
    # Behind which tag of which other port it is; it lives where that does. Or neither.
    Column("trunk", Id),
    Column("tag", Integer),
    Column("mac", Id, nullable=False),
    Column("hosts", Boolean(create_constraint=False), nullable=False),
    Column("rate", BigInteger, nullable=False, server_default="0"),
    Column("enabled", Boolean(create_constraint=False), nullable=False),
    Column("labels", Text, nullable=False),
    Column("description", Text, nullable=False),
    _revision(),
    UniqueConstraint("network", "name"),
    Index(None, "name"),
    UniqueConstraint("segment", "mac"),
    CheckConstraint("(host_machine IS NULL) <> (host_port IS NULL)", name="one_host"),
    _sparse("trunk", "tag", unique=True),
    _sparse("host_machine"),
    _sparse("host_port"),
    _sparse("other_machine"),
    _sparse("other_port"),
)

# How far a port's move is (moves.py). One that failed stays until the next.
move = Table(
    "move",
    metadata,
    Column("port", Id, _part_of("port.id"), primary_key=True),
    Column("source", Id, nullable=False),  # The machines that it leaves and comes to; either may be gone by then.
    Column("target", Id, nullable=False),
    Column("phase", Text, nullable=False),
    Column("revision", Id, nullable=False),  # What the machines concerned have to realise before the next phase.
    Column("at", Float, nullable=False),  # When the phase began, in seconds since 1970.
    Column("problem", Text, nullable=False),  # Why it failed; '' if it has not.
    Column("connections", LargeBinary),  # What the machine that it leaves remembers, as that machine wrote it.
)

# What a port hangs on, if something was chosen, on the machine at the bottom of its hosts: kept with every change of
# those, since what a machine has is one port's, whatever network that is in.
attachment = Table(
    "attachment",
    metadata,
    Column("port", Id, _part_of("port.id"), primary_key=True),
    Column("machine", Id, _refers("machine.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    UniqueConstraint("machine", "kind", "name"),
)

# Who has an address in a segment: one of its ports, or a router that is the gateway there.
address = Table(
    "address",
    metadata,
    Column("segment", Id, _refers("segment.id"), primary_key=True),
    Column("address", Text, primary_key=True),
    Column("port", Id, _part_of("port.id")),
    Column("router", Id, _part_of("router.id")),
    Column("position", Integer, nullable=False),  # In the order given: the first of a family is the host address.
    CheckConstraint("(port IS NULL) <> (router IS NULL)", name="one_owner"),
    _sparse("port"),
    _sparse("router"),
)

owned = Table(
    "owned",
    metadata,
    Column("port", Id, _part_of("port.id"), primary_key=True),
    Column("prefix", Text, primary_key=True),
    Column("position", Integer, nullable=False),
)

group = Table(
    "group",
    metadata,
    Column("id", Id, primary_key=True),
    Column("network", Id, _refers("network.id"), nullable=False),
    Column("name", Text, nullable=False),
    UniqueConstraint("network", "name"),
)

port_group = Table(
    "port_group",
    metadata,
    Column("port", Id, _part_of("port.id"), primary_key=True),
    Column("group", Id, _refers("group.id"), primary_key=True),
    Index(None, "group"),
)

# `spec` is what people wrote, `value` the same with ids. A policy has no name: its value is its identity.
policy = Table(
    "policy",
    metadata,
    Column("id", Id, primary_key=True),
    Column("network", Id, _refers("network.id"), nullable=False),
    Column("spec", Text, nullable=False),
    Column("value", Text, nullable=False),
    _revision(),
    UniqueConstraint("network", "value"),
)

vni_range = Table(
    "vni_range",
    metadata,
    Column("domain", Id, _part_of("network.id"), primary_key=True),
    Column("lo", Integer, primary_key=True),
    Column("hi", Integer, nullable=False),
    # Usable when every machine has realised this one: numbers that a store before a restore may have given out.
    Column("after", Id, nullable=False, server_default="0"),
    CheckConstraint("lo <= hi", name="order"),
)

vni_quarantine = Table(
    "vni_quarantine",
    metadata,
    Column("domain", Id, _part_of("network.id"), primary_key=True),
    Column("vni", Integer, primary_key=True),
    Column("revision", Id, nullable=False),  # Free again when every machine has realised this one.
)

vlan_quarantine = Table(
    "vlan_quarantine",
    metadata,
    Column("physical", Text, primary_key=True),
    Column("vlan", Integer, primary_key=True),
    Column("revision", Id, nullable=False),  # Free again when every machine has realised this one.
)

# Whoever gives a network another carrier changes this first: one at a time, so that the carriers stay a forest.
carriage = Table(
    "carriage",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="single"), primary_key=True),
    Column("changes", Id, nullable=False),
)

# How many ports of `network` live on a host: a machine's row where the fabric carries it, else a port's.
host_use = Table(
    "host_use",
    metadata,
    Column("network", Id, _part_of("network.id"), primary_key=True),
    Column("host", Id, primary_key=True),
    Column("count", Integer, CheckConstraint("count > 0", name="used"), nullable=False),
)

# How many networks of a tenant (0: of none, EVERYONE: of all) in `carrier` live on a host, and how many ports of them.
host_total = Table(
    "host_total",
    metadata,
    Column("carrier", Id, primary_key=True),
    Column("host", Id, primary_key=True),
    Column("tenant", Id, primary_key=True),
    Column("networks", Id, nullable=False),
    Column("ports", Id, nullable=False),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request", Text, nullable=False),  # SHA-256 of what was asked.
    Column("answer", Text, nullable=False),
    Column("at", Float, nullable=False),
    Index(None, "at"),
)

# What happened: `audit` is who changed what, all else is what machines and the controller noticed.
event = Table(
    "event",
    metadata,
    Column("seq", Id, primary_key=True),
    Column("at", Float, nullable=False),  # Seconds since 1970.
    Column("audit", Boolean(create_constraint=False), nullable=False),
    Column("kind", Text, nullable=False),
    Column("revision", Id, nullable=False),
    Column("who", Text, nullable=False),  # Who asked for it; '' for what nobody did.
    Column("machine", Text, nullable=False),  # Its name, for it may go; '' for what is no machine's.
    Column("text", Text, nullable=False),
    Column("data", Text, nullable=False),  # JSON: the changes of a change.
    Index(None, "audit", "seq"),
    Index(None, "revision"),
)

# The authority that signs certificates of machines and of the controller. PEM.
authority = Table(
    "authority",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="single"), primary_key=True),
    Column("key", LargeBinary, nullable=False),
    Column("certificate", LargeBinary, nullable=False),
)

# What people and services show. Of a secret only the SHA-256 is here: it has 256 random bits, so nobody guesses it.
token = Table(
    "token",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("digest", Text, nullable=False, unique=True),
    Column("everything", Text),  # Its role for all there is, or none.
    Column("made", Float, nullable=False),  # Seconds since 1970.
    Column("until", Float),
    Column("made_by", Text, nullable=False),
    Column("made_in", Id),  # The tenant that its maker owned; none: the operator's, or one that is gone.
    CheckConstraint("everything IN ('reader', 'owner')", name="everything"),
)

token_tenant = Table(
    "token_tenant",
    metadata,
    Column("token", Id, _part_of("token.id"), primary_key=True),
    Column("tenant", Id, _part_of("tenant.id"), primary_key=True),
    Column("role", Text, CheckConstraint("role IN ('reader', 'owner')", name="role"), nullable=False),
    Index(None, "tenant"),
)

# What lets one machine join, once: it goes when it is used.
join_token = Table(
    "join_token",
    metadata,
    Column("id", Id, primary_key=True),
    Column("machine", Text, nullable=False, unique=True),  # The name that it will have.
    Column("digest", Text, nullable=False, unique=True),
    Column("until", Float, nullable=False),
    Column("made_by", Text, nullable=False),
)
