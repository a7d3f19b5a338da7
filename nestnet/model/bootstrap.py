"""What a workload is told when it asks the network how to begin: DHCPv4, DHCPv6 and router solicitations.

    Settings    what a port's workload should use: its port's own record
    settings    that of a port in a world
    answer      the frame that answers an inquiry, or None
    advertisement   the router advertisement that a workload gets unasked, when its record has changed

Pure: a record and a frame in, a frame out. The workload's own machine answers, from its own copy of the record: there
is no server, no lease that anybody keeps, and nothing to run out. Whatever a client says about itself is compared with
the record and never believed; the only thing echoed is what names the client to itself (transaction, client and IA
identifiers).

*Who answers*: the first router of the segment, with its MAC, its gateway address and its link-local address. Without
one it is `NOBODY_MAC`, which no router or port has, and 192.0.0.8, the dummy address of RFC 7600.

*Leases* have no end (RFC 2131, 3.3; RFC 8415, 7.7), so a workload keeps its addresses whatever becomes of agent and
controller. A default route over IPv6 cannot be for ever: it lives 65535 s (RFC 8319) after the last advertisement.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_interface

from nestnet.model import packet as pk
from nestnet.model.packet import ICMPV6, IPV4, IPV6, NOBODY_MAC, UDP, Packet, checksum, mac_bytes
from nestnet.model.values import Address, Port, World, link_local

NOBODY = IPv4Address("192.0.0.8")

ALL_NODES = IPv6Address("ff02::1")
ALL_ROUTERS = IPv6Address("ff02::2")
ALL_DHCP = IPv6Address("ff02::1:2")  # all DHCP relay agents and servers
BROADCAST = IPv4Address("255.255.255.255")
NO_ADDRESS4 = IPv4Address(0)

FOR_EVER = 0xFFFFFFFF
ROUTER_SECONDS = 65535  # the longest that a router may promise to be there
CLIENT4, SERVER4, CLIENT6, SERVER6 = 68, 67, 546, 547


@dataclass(frozen=True, slots=True)
class Settings:
    """What a port's workload should use.

    addresses   with the length of their segment's prefix, in the port's order
    gateways    the next hop of its default routes, one a family; none of a family that it has no address of
    dns         servers to ask for names
    server      the MAC of who tells it so: the segment's first router, or nobody
    """

    mac: int
    mtu: int
    addresses: tuple[IPv4Interface | IPv6Interface, ...] = ()
    gateways: tuple[Address, ...] = ()
    dns: tuple[Address, ...] = ()
    server: int = NOBODY_MAC

    def gateway(self, family: int) -> Address | None:
        return next((address for address in self.gateways if address.version == family), None)

    def of_family(self, family: int) -> list[IPv4Interface | IPv6Interface]:
        return [address for address in self.addresses if address.version == family]

    @property
    def server4(self) -> Address:
        """The DHCPv4 server's address and identifier."""
        return self.gateway(4) or NOBODY

    @property
    def server6(self) -> IPv6Address:
        """Where DHCPv6 and advertisements come from: a router's default route is its link-local address."""
        return link_local(self.server)


LEAST_IPV6_MTU = 1280  # RFC 8200, section 5


def settings(world: World, port: Port) -> Settings:
    """What the workload of this port should use."""
    segment = world.segments[port.segment]
    lengths = {cidr.version: cidr.prefixlen for cidr in segment.cidrs}
    routers = world.routers_of(segment.id)
    gateways: dict[int, Address] = {}
    for router in routers:
        for interface in router.interfaces:
            if interface.segment == segment.id:
                for address in interface.addresses:
                    gateways.setdefault(address.version, address)
    # Below that Linux speaks no IPv6 on an interface, and an agent its relay. What it carries there is short enough.
    least = LEAST_IPV6_MTU if port.agent else 0
    return Settings(
        port.mac,
        max(world.mtu_of(port.segment), least),
        tuple(ip_interface(f"{a}/{lengths.get(a.version, a.max_prefixlen)}") for a in port.addresses),
        # A default route needs an address of its family to leave from.
        tuple(gateways[family] for family in (4, 6) if family in gateways and port.address(family) is not None),
        segment.dns,
        routers[0].mac if routers else NOBODY_MAC,
    )


def answer(record: Settings, frame: bytes) -> bytes | None:
    """The frame that the workload gets for this one. None if it needs no answer, or deserves none: it is no inquiry,
    malformed, about somebody else, for another server, or about a family that the port has no address of."""
    packet = pk.parse(frame)
    if packet.link_flaw or packet.flaw or packet.fragment != pk.WHOLE or packet.source_mac != record.mac:
        return None
    if not packet.is_inquiry or not record.of_family(packet.family):
        return None
    if packet.icmp_type == pk.ROUTER_SOLICITATION:
        return _answer_solicitation(record, packet)
    (length,) = struct.unpack_from("!H", frame, packet.offset + 4)
    body = frame[packet.offset + 8 : packet.offset + length]
    if not 8 <= length <= packet.end - packet.offset:
        return None
    return (_answer_dhcp4 if packet.family == 4 else _answer_dhcp6)(record, packet, body)


# ---- DHCPv4

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)  # RFC 2132, 9.6
_HEAD = struct.Struct("!BBBBIHH4s4s4s4s16s")
_NAMES = 64 + 128  # bytes of sname and file
_COOKIE = bytes.fromhex("63825363")
_SHORTEST = 300  # bytes of a BOOTP message (RFC 1542, 2.1)

_MASK, _ROUTER, _DNS, _MTU, _REQUESTED, _SECONDS = 1, 3, 6, 26, 50, 51
_TYPE, _SERVER, _WANTED, _CLIENT, _ROUTES, _PAD, _END = 53, 54, 55, 61, 121, 0, 255


def _answer_dhcp4(record: Settings, packet: Packet, body: bytes) -> bytes | None:
    """RFC 2131, figure 1, over UDP from port 68 to 67.

    0        8        16       24      31
    +--------+--------+--------+--------+
    | op 1   | type 1 | len 6  | hops   |   op 2: an answer
    +--------+--------+--------+--------+
    | transaction                       |
    +-----------------+-----------------+
    | seconds         |B flags          |   B: answer by broadcast
    +-----------------+-----------------+
    | client's address, if it has one   |
    +-----------------------------------+
    | your address                      |
    +-----------------------------------+
    | next server                       |
    +-----------------------------------+
    | relay agent                       |
    +-----------------------------------+
    | client's MAC, 16 bytes            |
    +-----------------------------------+
    | server name, 64 bytes             |
    +-----------------------------------+
    | boot file, 128 bytes              |
    +-----------------------------------+
    | 99     | 130    | 83     | 99     |
    +--------+--------+--------+--------+
    | code   | length | ...             |   options (RFC 2132); code 0 is padding, 255 the end
    +--------+--------+-----------------+
    """
    if packet.flow.target not in (pk.mapped(BROADCAST), pk.mapped(record.server4)):
        return None
    cookie_at = _HEAD.size + _NAMES
    if len(body) < cookie_at + 4 or body[cookie_at : cookie_at + 4] != _COOKIE:
        return None
    op, kind, length, _, transaction, _, flags, client, _, _, relay, mac = _HEAD.unpack_from(body)
    options = _options4(body[cookie_at + 4 :])
    if options is None or (op, kind, length) != (1, 1, 6) or mac[:6] != mac_bytes(record.mac) or any(relay):
        return None
    said = _verdict4(record, packet, IPv4Address(client), options)
    if said is None:
        return None
    own = record.of_family(4)[0].ip
    yours = NO_ADDRESS4 if said == NAK or options[_TYPE] == bytes([INFORM]) else own
    told = _told4(record, said, options)
    head = _HEAD.pack(2, 1, 6, 0, transaction, 0, flags, client, yours.packed, bytes(4), bytes(4), mac)
    message = (head + bytes(_NAMES) + _COOKIE + told).ljust(_SHORTEST, b"\0")
    # Who has no address yet hears by its MAC, unless it says that it cannot.
    target = BROADCAST if said == NAK or (flags & 0x8000 and not any(client)) else own
    return _udp(record, record.server4, target, SERVER4, CLIENT4, message)


def _options4(data: bytes) -> dict[int, bytes] | None:
    """Code -> value; values of a code that is there more than once are one (RFC 3396). None if they are not whole."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        code = data[at]
        if code == _END:
            return found
        if code == _PAD:
            at += 1
            continue
        end = at + 2 + data[at + 1] if at + 1 < len(data) else len(data) + 1
        if end > len(data):
            return None
        found[code] = found.get(code, b"") + data[at + 2 : end]
        at = end
    return None


def _verdict4(record: Settings, packet: Packet, client: IPv4Address, options: dict[int, bytes]) -> int | None:
    """OFFER, ACK or NAK (RFC 2131, 4.3); None for a message that gets no answer."""
    own, server = record.of_family(4)[0].ip, record.server4.packed
    asked, chosen = options.get(_REQUESTED), options.get(_SERVER)
    match list(options.get(_TYPE, b"")):
        case [1]:
            return OFFER
        case [3] if chosen is not None:  # it has chosen among offers
            if chosen != server:
                return None
            return ACK if asked == own.packed else NAK
        case [3] if asked is not None:  # it has begun anew
            return ACK if asked == own.packed and client == NO_ADDRESS4 else NAK
        case [3]:  # it renews
            return ACK if client == own else NAK
        case [8]:  # it has an address and wants the rest
            return ACK if client == own and packet.flow.source == pk.mapped(own) else None
        case _:  # RELEASE and DECLINE change nothing: the address is the port's
            return None


def _told4(record: Settings, said: int, options: dict[int, bytes]) -> bytes:
    """The options of an answer."""
    own = record.of_family(4)[0]
    told = [(_TYPE, bytes([said])), (_SERVER, record.server4.packed)]
    if said != NAK:
        gateway = record.gateway(4)
        if options[_TYPE] != bytes([INFORM]):
            told.append((_SECONDS, struct.pack("!I", FOR_EVER)))
        told.append((_MASK, own.netmask.packed))
        if gateway is not None:
            told.append((_ROUTER, gateway.packed))
            if _ROUTES in options.get(_WANTED, b""):
                told.append((_ROUTES, b"\0" + gateway.packed))  # RFC 3442: 0.0.0.0/0; 3 is ignored beside it
        told.append((_MTU, struct.pack("!H", record.mtu)))
        if names := b"".join(address.packed for address in record.dns if address.version == 4):
            told.append((_DNS, names))
    if _CLIENT in options:
        told.append((_CLIENT, options[_CLIENT][:255]))  # RFC 6842
    return b"".join(bytes((code, len(value))) + value for code, value in told) + bytes([_END])


# ---- DHCPv6

SOLICIT, ADVERTISE, REQUEST6, CONFIRM, RENEW, REBIND, REPLY, RELEASE6, DECLINE6 = range(1, 10)  # RFC 8415, 7.3
INFORMATION_REQUEST = 11
_CLIENT_ID, _SERVER_ID, _IA_NA, _IA_TA, _IA_ADDRESS = 1, 2, 3, 4, 5
_STATUS, _RAPID, _DNS6, _IA_PD = 13, 14, 23, 25
_SUCCESS, _NO_ADDRESSES, _NOT_ON_LINK, _NO_PREFIXES = 0, 2, 4, 6
_LONGEST_DUID = 130
_MOST_IAS, _MOST_STALE = 8, 8  # associations, and stale addresses in one, that are spoken about

# DUID-LL (RFC 8415, 11.4), the same everywhere: who moves, or gets another router, meets the same server.
_DUID = b"\0\3\0\1" + mac_bytes(NOBODY_MAC)

Option = tuple[int, bytes]


def _answer_dhcp6(record: Settings, packet: Packet, body: bytes) -> bytes | None:
    """RFC 8415, sections 8 and 21, over UDP from port 546 to 547.

    0        8        16       24      31
    +--------+--------+--------+--------+
    | type   | transaction              |
    +--------+--------+-----------------+
    | option          | length          |   options: 1 client, 2 server identifier
    +-----------------+-----------------+   3 IA_NA: an association, with its addresses as options 5 in it
    | ...                               |
    +-----------------+-----------------+
    | 3               | length          |
    +-----------------+-----------------+
    | IAID                              |
    +-----------------------------------+
    | renew after, seconds              |
    +-----------------------------------+
    | rebind after, seconds             |
    +-----------------+-----------------+
    | 5               | 24              |
    +-----------------+-----------------+
    | address, 16 bytes                 |
    +-----------------------------------+
    | preferred for, seconds            |
    +-----------------------------------+
    | valid for, seconds                |
    +-----------------------------------+
    """
    if packet.flow.target not in (pk.mapped(ALL_DHCP), pk.mapped(record.server6)):
        return None
    options = _options6(body[4:]) if len(body) >= 4 else None
    if options is None:
        return None
    kind, given = body[0], dict(options)
    client, server = given.get(_CLIENT_ID), given.get(_SERVER_ID)
    associations = [option for option in options if option[0] in (_IA_NA, _IA_TA, _IA_PD)]
    # Who must name its server, who must not, and who need not name itself: RFC 8415, 16.
    if kind in (SOLICIT, CONFIRM, REBIND) and server is not None:
        return None
    if kind in (REQUEST6, RENEW, RELEASE6, DECLINE6) and server is None:
        return None
    if server not in (None, _DUID) or len(associations) > _MOST_IAS:
        return None
    if client is None if kind != INFORMATION_REQUEST else bool(associations):
        return None
    if client is not None and not 3 <= len(client) <= _LONGEST_DUID:
        return None
    told = _told6(record, kind, associations)
    if told is None:
        return None
    said = REPLY
    if kind == SOLICIT:
        if _RAPID in given:
            told.append((_RAPID, b""))
        else:
            said = ADVERTISE
    head = [(_SERVER_ID, _DUID)] if client is None else [(_CLIENT_ID, client), (_SERVER_ID, _DUID)]
    message = bytes([said]) + body[1:4] + _packed6([*head, *told])
    return _udp(record, record.server6, _asker(packet), SERVER6, CLIENT6, message)


def _options6(data: bytes) -> list[Option] | None:
    """The options one after the other. None if they are not whole."""
    found: list[Option] = []
    at = 0
    while at < len(data):
        if at + 4 > len(data):
            return None
        code, length = struct.unpack_from("!HH", data, at)
        if at + 4 + length > len(data):
            return None
        found.append((code, data[at + 4 : at + 4 + length]))
        at += 4 + length
    return found


def _packed6(options: list[Option]) -> bytes:
    return b"".join(struct.pack("!HH", code, len(value)) + value for code, value in options)


def _told6(record: Settings, kind: int, associations: list[Option]) -> list[Option] | None:
    """The options of an answer, without identifiers; None if there is none."""
    if kind in (RELEASE6, DECLINE6):  # changes nothing: the address is the port's
        return [_status(_SUCCESS, "the addresses stay the port's")]
    if kind == CONFIRM:
        return _confirmed(record, associations)
    if kind not in (SOLICIT, REQUEST6, RENEW, REBIND, INFORMATION_REQUEST):
        return None
    told: list[Option] = []
    served = False
    for code, value in associations:
        one = _association(record, code, value, stale=kind in (RENEW, REBIND), served=served)
        if one is None:
            return None
        served |= code == _IA_NA
        told.append((code, one))
    if names := b"".join(address.packed for address in record.dns if address.version == 6):
        told.append((_DNS6, names))
    return told


def _association(record: Settings, code: int, value: bytes, stale: bool, served: bool) -> bytes | None:
    """What is said about one of the client's associations: the first of usual addresses gets all that the port has,
    for ever; others nothing. Addresses that it has and should not have, when that is asked, end now."""
    head = 4 if code == _IA_TA else 12
    inside = _options6(value[head:]) if len(value) >= head else None
    if inside is None or any(what == _IA_ADDRESS and len(one) < 24 for what, one in inside):
        return None
    if code == _IA_PD:
        return value[:4] + bytes(8) + _packed6([_status(_NO_PREFIXES, "no prefixes here")])
    if code == _IA_TA or served:
        return value[:4] + bytes(head - 4) + _packed6([_status(_NO_ADDRESSES, "one association has them all")])
    own = [address.ip.packed for address in record.of_family(6)]
    told = [(_IA_ADDRESS, address + struct.pack("!II", FOR_EVER, FOR_EVER)) for address in own]
    if stale:
        others = dict.fromkeys(one[:16] for what, one in inside if what == _IA_ADDRESS and one[:16] not in own)
        told += [(_IA_ADDRESS, address + bytes(8)) for address in list(others)[:_MOST_STALE]]
    return value[:4] + struct.pack("!II", FOR_EVER, FOR_EVER) + _packed6(told)


def _confirmed(record: Settings, associations: list[Option]) -> list[Option] | None:
    """Is the client still where its addresses are? (RFC 8415, 18.3.3)"""
    addresses: list[bytes] = []
    for code, value in associations:
        inside = _options6(value[4 if code == _IA_TA else 12 :])
        if inside is None:
            return None
        addresses += [one[:16] for what, one in inside if what == _IA_ADDRESS and len(one) >= 24]
    if not addresses:
        return None
    own = {address.ip.packed for address in record.of_family(6)}
    if all(address in own for address in addresses):
        return [_status(_SUCCESS, "all of them are right")]
    return [_status(_NOT_ON_LINK, "not all of them are this port's")]


def _status(code: int, text: str) -> Option:
    return _STATUS, struct.pack("!H", code) + text.encode()


# ---- router advertisements

_SOURCE_LINK, _PREFIX, _LINK_MTU, _RDNSS = 1, 3, 5, 25
_MANAGED, _OTHER = 0x80, 0x40
_ON_LINK = 0x80
_HOP_LIMIT = 64  # that workloads begin with


def _answer_solicitation(record: Settings, packet: Packet) -> bytes | None:
    """RFC 4861, 4.1.

    0        8        16       24      31
    +--------+--------+-----------------+
    | 133    | code 0 | checksum        |
    +--------+--------+-----------------+
    | reserved                          |
    +--------+--------+-----------------+
    | type   | length | ...             |   options, length in units of 8 bytes: 1 source link-layer address
    +--------+--------+-----------------+
    """
    frame, at, end = packet.frame, packet.offset + 8, packet.end
    if packet.ttl != 255 or packet.icmp_code != 0:
        return None
    if packet.flow.target not in (pk.mapped(ALL_ROUTERS), pk.mapped(record.server6)):
        return None
    unspecified = packet.flow.source == pk.UNSPECIFIED6
    while at < end:
        length = frame[at + 1] * 8 if at + 1 < end else 0
        if length == 0 or at + length > end:
            return None
        if frame[at] == _SOURCE_LINK and (unspecified or frame[at + 2 : at + 8] != mac_bytes(record.mac)):
            return None
        at += length
    return advertisement(record, ALL_NODES if unspecified else _asker(packet))


def advertisement(record: Settings, target: IPv6Address = ALL_NODES) -> bytes:
    """RFC 4861, 4.2 and 4.6; RFC 8106, 5.1. For one workload alone, also when it is to all nodes.

    0        8        16       24      31
    +--------+--------+-----------------+
    | 134    | 0      | checksum        |
    +--------+--------+-----------------+
    | 64     |MO      | router lifetime |   M: addresses by DHCPv6; O: the rest, too. Lifetime 0: no default route
    +--------+--------+-----------------+
    | reachable time 0                  |   0: nothing said
    +-----------------------------------+
    | retransmission time 0             |
    +--------+--------+-----------------+
    | 1      | 1      | MAC             |
    |        |        |                 |
    +--------+--------+-----------------+
    | 5      | 1      | 0               |
    +--------+--------+-----------------+
    | MTU                               |
    +--------+--------+--------+--------+
    | 3      | 4      | length |LA      |   a prefix. L: neighbours have these addresses. A, choose one there, is
    +--------+--------+--------+--------+   never set: a port has those of its record
    | valid for, for ever               |
    +-----------------------------------+
    | preferred for, for ever           |
    +-----------------------------------+
    | reserved                          |
    +-----------------------------------+
    | prefix, 16 bytes                  |
    +--------+--------+-----------------+
    | 25     | 1 + 2n | 0               |
    +--------+--------+-----------------+
    | for ever                          |
    +-----------------------------------+
    | n DNS servers, 16 bytes each      |
    +-----------------------------------+
    """
    lifetime = ROUTER_SECONDS if record.gateway(6) is not None else 0
    flags = _MANAGED | _OTHER if record.of_family(6) else 0
    parts = [
        struct.pack("!BBHII", _HOP_LIMIT, flags, lifetime, 0, 0),
        bytes((_SOURCE_LINK, 1)) + mac_bytes(record.server),
        struct.pack("!BBHI", _LINK_MTU, 1, 0, record.mtu),
    ]
    for prefix in dict.fromkeys(address.network for address in record.of_family(6)):
        head = struct.pack("!BBBBIII", _PREFIX, 4, prefix.prefixlen, _ON_LINK, FOR_EVER, FOR_EVER, 0)
        parts.append(head + prefix.network_address.packed)
    if names := [address.packed for address in record.dns if address.version == 6]:
        parts.append(struct.pack("!BBHI", _RDNSS, 1 + 2 * len(names), 0, FOR_EVER) + b"".join(names))
    return _ip(record, record.server6, target, ICMPV6, 255, bytes((134, 0, 0, 0)) + b"".join(parts), 2)


# ---- frames


def _asker(packet: Packet) -> IPv6Address:
    return IPv6Address(packet.flow.source)


def _udp(record: Settings, source: Address, target: Address, from_port: int, to_port: int, message: bytes) -> bytes:
    head = struct.pack("!HHHH", from_port, to_port, 8 + len(message), 0)
    return _ip(record, source, target, UDP, 64, head + message, 6)


def _ip(record: Settings, source: Address, target: Address, protocol: int, ttl: int, data: bytes, sum_at: int) -> bytes:
    """A frame to the workload with this transport header and data, whose checksum belongs at `sum_at`."""
    pseudo = source.packed + target.packed + struct.pack("!II", len(data), protocol)
    total = checksum(pseudo + data) or 0xFFFF  # of UDP: 0 would mean that there is none (RFC 768)
    data = data[:sum_at] + total.to_bytes(2, "big") + data[sum_at + 2 :]
    if target == BROADCAST:
        mac = pk.BROADCAST
    elif target == ALL_NODES:
        mac = 0x333300000001  # RFC 2464, 7
    else:
        mac = record.mac
    if source.version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 0, 0x4000, ttl, protocol, 0)
        head += source.packed + target.packed
        head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
        ether_type = IPV4
    else:
        head = struct.pack("!IHBB", 6 << 28, len(data), protocol, ttl) + source.packed + target.packed
        ether_type = IPV6
    return mac_bytes(mac) + mac_bytes(record.server) + ether_type.to_bytes(2, "big") + head + data
