"""The contract between the compiler and the datapaths: every table, its key and its value.

The compiler fills these tables, the reference datapath reads them in Python, the kernel
datapath in BPF. The C structs in `bpf/tables.h` have the same fields in the same order; a test
reads the object's BTF and compares offsets. Look at the kernel's from a shell with
`bpftool map dump pinned /sys/fs/bpf/nestnet/LAB/MACHINE/vN/port`.

Integers are little-endian, ports of TCP and UDP too. An *address* is 16 bytes in network order,
IPv4 as ::ffff:a.b.c.d. A *slot* is a small number this machine gave to an object, an index into
the arrays; slot 0 is nobody. An array's row is there if its `id` is not 0.

    port -> host -> host -> ... -> machine         where a port lives (rule 14)
    attach, vni, vlan, member                      where a frame comes in
    mac, owner, route, hop                         where it goes
    face                                           who says so if it does not
    peer, cidr, service -> rule                    whether it may
    bucket                                         how much of it (rule 8)
    flood, local                                   who gets what is for all

**Policy.** A network whose `rules` is 0 has no policies: all may talk. Otherwise `rules` is the
version of its rule set (a hash of its content), and part of every key, so that one write to the
network's row switches all of them (rule 18). A packet from an endpoint to an endpoint has

    from     each of: 0 | IDENTITY + peer[port] | CIDR + cidr[address]
    to       the same for the destination
    service  each of: 0 | PROTOCOL + protocol | CLASS + service[protocol, destination port]

and the verdict is that of the row `rule[from, to, service]` with the highest `rank` among all
combinations that exist: rank = priority << 1 | deny, so a deny wins at equal priority. `combos`
of the network has bit (from * 9 + to * 3 + service) set where a row with these three kinds
exists. No row: denied. A class is 0 where a lookup finds nothing, and is then left out. An address
that no port has has no peer.

**Where a port lives.** `port.host` is a slot in `host`. For a machine's row (kind MACHINE) `at` is
a slot in `machine`, or 0 if it is disabled. For a port that is itself a host, or is moving, its own
row in `host` (kind PORT) says where it lives, in `at`, and `port.host` is that row: so moving it is
one row. For any other port `port.host` is the place itself. While something on the way down moves, a
port is here (LOCAL, with `ifindex`) on two machines; only where it lives by `at` is it in a list `local`.

**Rates.** A port that has a rate has two buckets, a link one for each direction: rows of `bucket`, pointed to by `out`
and `in` of the port and by `bucket` of the hops over the link; 0: no limit. What is in a bucket is the datapath's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LAYOUT = 4  # The version of this layout, part of the path of every pin.

Rows = npt.NDArray[np.void]

ADDRESS = ("u1", (16,))
MAC = ("u1", (6,))

# port.flags
ENABLED = 1  # also network.flags
LOCAL = 2  # lives on this machine
HOSTS = 4  # has a row of its own in `host`, for it is itself a host, or moves: see `port.host`
TAP = 8  # hangs on a tap: what is for its workload goes out there, and not to the other end of a veth
AGENT = 16  # its workload runs an agent, and lives on this machine: it may reach the relay
TRUNK = 32  # other ports share its attachment, each behind a tag
# segment.flags
TRANSPARENT = 1  # frames with tags ride in it
ON_VLAN = 2  # it rides on a VLAN of a physical network, and not in VXLAN
# network.flags
RATED = 2  # a port or a link of it, or of what carries it, has a rate

# host.kind
MACHINE = 1
PORT = 2

# owner.kind, mac.kind
OWNER_PORT = 1
OWNER_ROUTER = 2

# bucket.kind
PORT_OUT = 1
PORT_IN = 2
LINK_FORTH = 3  # from the first of the routers that it joins to the second
LINK_BACK = 4

# rule.source and rule.target
IDENTITY = 0x40000000
CIDR = 0x80000000
# rule.service
PROTOCOL = 0x40000000
CLASS = 0x80000000

DENY = 1  # bit 0 of rule.rank


@dataclass(frozen=True)
class Table:
    """One table. `key` is None for an array: its key is the slot. An LPM key begins with `prefixlen`,
    which counts the bits after itself."""

    name: str
    kind: str  # array, hash, lpm
    value: np.dtype[np.void]
    key: np.dtype[np.void] | None = None

    @property
    def row(self) -> np.dtype[np.void]:
        """Key and value side by side, as the compiler makes them: fields `key` (a slot for an array) and `value`."""
        return np.dtype([("key", self.key if self.key is not None else "u4"), ("value", self.value)])


def _struct(*fields: tuple[object, ...]) -> np.dtype[np.void]:
    return np.dtype([(name, *what) for name, *what in fields])


TABLES: dict[str, Table] = {
    table.name: table
    for table in [
        Table(
            "network",
            "array",
            _struct(
                ("id", "u8"),
                ("rules", "u4"),
                ("combos", "u4"),
                ("flags", "u4"),
                ("mtu", "u4"),
                ("underlay", "u4"),
                ("pad", "u4"),
            ),
        ),
        Table(
            "segment",
            "array",
            # flood, local: versions of the lists of hosts and of ports here, with their lengths.
            # router: the one its workloads' default route goes to, or 0. Of one that is ON_VLAN: the NIC of this
            # machine's trunk, or 0 if it is not there, its MAC, and the VLAN's id.
            _struct(
                ("id", "u8"),
                ("network", "u4"),
                ("vni", "u4"),
                ("flood", "u4"),
                ("floods", "u4"),
                ("local", "u4"),
                ("locals", "u4"),
                ("router", "u4"),
                ("flags", "u4"),
                ("ifindex", "u4"),
                ("mac", *MAC),
                ("vlan", "u2"),
                ("pad", "u4"),
            ),
        ),
        Table(
            "router",
            "array",
            # address4, address6: where it speaks from to those that none of its interfaces faces.
            _struct(
                ("id", "u8"),
                ("network", "u4"),
                ("pad", "u4"),
                ("address4", *ADDRESS),
                ("address6", *ADDRESS),
                ("mac", *MAC),
                ("pad2", "u2"),
            ),
        ),
        Table(
            "port",
            "array",
            # ifindex: where its workload hangs on this machine, or 0. share: connections it may open here.
            # address4, address6: its first of each family, or zeros. out, in: buckets, or 0. tag: the VLAN id that its
            # frames bear where they hang, or 0.
            _struct(
                ("id", "u8"),
                ("network", "u4"),
                ("segment", "u4"),
                ("host", "u4"),
                ("ifindex", "u4"),
                ("flags", "u4"),
                ("share", "u4"),
                ("out", "u4"),
                ("in", "u4"),
                ("address4", *ADDRESS),
                ("address6", *ADDRESS),
                ("mac", *MAC),
                ("tag", "u2"),
            ),
        ),
        Table(
            "host",
            "array",
            # MACHINE: id of the machine, `at` its slot, or 0 if it is disabled. PORT: id of the port, `port` its slot
            # in its own network, at and from are host slots. `from` is where else it lives while it moves, or 0.
            _struct(("id", "u8"), ("kind", "u4"), ("port", "u4"), ("at", "u4"), ("from", "u4")),
        ),
        Table("machine", "array", _struct(("id", "u8"), ("address", *ADDRESS), ("mtu", "u4"), ("pad", "u4"))),
        # ---- where a frame comes in
        # tag: the VLAN id of the frame, 0: it has no tag
        Table("attach", "hash", _struct(("port", "u4")), _struct(("ifindex", "u4"), ("tag", "u4"))),
        Table("vni", "hash", _struct(("segment", "u4")), _struct(("vni", "u4"))),
        # A VLAN of a physical network, by the NIC to that.
        Table("vlan", "hash", _struct(("segment", "u4")), _struct(("ifindex", "u4"), ("id", "u4"))),
        Table("member", "hash", _struct(("machine", "u4")), _struct(("address", *ADDRESS))),
        # ---- where it goes
        Table(
            "mac",
            "hash",
            _struct(("kind", "u4"), ("slot", "u4")),
            _struct(("segment", "u4"), ("mac", *MAC), ("pad", "u2")),
        ),
        Table(
            "owner",
            "lpm",
            _struct(("kind", "u4"), ("slot", "u4")),
            _struct(("prefixlen", "u4"), ("segment", "u4"), ("address", *ADDRESS)),
        ),
        Table(
            "route",
            "lpm",
            # segment: where the prefix is. count: next routers that share the flows, in `hop` under (router, group);
            # 0: this router joins the segment. hops: routers on the longest way there, this one among them.
            _struct(("segment", "u4"), ("group", "u4"), ("count", "u4"), ("hops", "u4")),
            _struct(("prefixlen", "u4"), ("router", "u4"), ("address", *ADDRESS)),
        ),
        Table(
            "hop",
            "hash",
            # bucket: of the link in this direction, or 0
            _struct(("next", "u4"), ("bucket", "u4")),
            _struct(("router", "u4"), ("group", "u4"), ("index", "u4")),
        ),
        # Where a router speaks from in a segment it joins; for a family it has no address of there, as everywhere.
        Table(
            "face",
            "hash",
            _struct(("address4", *ADDRESS), ("address6", *ADDRESS)),
            _struct(("router", "u4"), ("segment", "u4")),
        ),
        # ---- who gets what is for all: hosts with ports in the segment; ports in it that live here. By
        # rising MAC of the ports.
        Table("flood", "hash", _struct(("host", "u4")), _struct(("segment", "u4"), ("version", "u4"), ("index", "u4"))),
        Table("local", "hash", _struct(("port", "u4")), _struct(("segment", "u4"), ("version", "u4"), ("index", "u4"))),
        # ---- whether it may
        Table("peer", "hash", _struct(("class", "u4")), _struct(("network", "u4"), ("rules", "u4"), ("port", "u4"))),
        Table(
            "cidr",
            "lpm",
            _struct(("class", "u4")),
            _struct(("prefixlen", "u4"), ("network", "u4"), ("rules", "u4"), ("address", *ADDRESS)),
        ),
        Table(
            "service",
            "lpm",
            _struct(("class", "u4")),
            # port_be: the destination port in network order, so that a prefix of it is a range.
            _struct(
                ("prefixlen", "u4"),
                ("network", "u4"),
                ("rules", "u4"),
                ("protocol", "u1"),
                ("port_be", "u1", (2,)),
                ("pad", "u1"),
            ),
        ),
        Table(
            "rule",
            "hash",
            _struct(("id", "u8"), ("rank", "u4"), ("pad", "u4")),
            _struct(("network", "u4"), ("rules", "u4"), ("source", "u4"), ("target", "u4"), ("service", "u4")),
        ),
        # ---- how much: rate in bit/s, and how long it takes to fill, in ns; id is that of the port or link
        Table("bucket", "array", _struct(("id", "u8"), ("rate", "u8"), ("burst", "u8"), ("kind", "u4"), ("pad", "u4"))),
        # ---- this machine: one row. Which slot in `machine` it is, the NIC the wire hangs on, and the VLAN that its
        # NICs are in: EtherType of the tag << 16 | id, or 0.
        Table("self", "array", _struct(("machine", "u4"), ("ifindex", "u4"), ("vlan", "u4"))),
    ]
}

# Generation counters (rule 16): arrays of u64, indexed by slot. They only rise. `epoch` is one u64 at index 0.
GENERATIONS = ("port", "policy", "route", "flood", "host", "machine")

Tables = dict[str, Rows]
"""Rows of each table by its name, sorted by key, every key once. Arrays hold only the rows that are there."""


def empty() -> Tables:
    """No row in any table: what a machine has before it knows anything."""
    return {name: np.zeros(0, table.row) for name, table in TABLES.items()}


def ordered(table: Table, rows: Rows) -> Rows:
    """The rows in canonical order: an array's by slot, all others' by the bytes of their keys."""
    return rows[np.argsort(keys(table, rows), kind="stable")]


def keys(table: Table, rows: Rows) -> npt.NDArray[np.generic]:
    """The keys of rows, as something that numpy compares."""
    found = np.ascontiguousarray(rows["key"])
    # Bytes of one length: numpy's blindness to trailing zeros in S cannot confuse them.
    return found.view(f"S{table.key.itemsize}") if table.key is not None else found
