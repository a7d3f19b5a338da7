"""What hostile workloads and machines send: a generator of frames for each row of docs/hostile.md.

    stage()              a world in which everything is there twice, with the same MACs and addresses
    ROWS["A4"].make      frames of a row, from a port of that world; `ends` is all that may become of them
    WIRE_ROWS["B4"]      datagrams of a row, for a machine

A frame that has room for it carries a canary, so whoever hears it knows whose it is. `ends` does not come from
`meaning`: that meaning, and so the datapath, let nothing of a row end otherwise is what the row is for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from frames import (
    arp,
    echo,
    ethernet,
    extension,
    group_mac,
    icmp,
    icmp_protocol,
    ip_frame,
    ipv4,
    ipv6,
    neighbour,
    solicited,
    tcp,
    udp,
)
from strategies import LEAVES, on_the_wire

from nestnet.model import packet as pk
from nestnet.model.packet import mapped
from nestnet.model.values import (
    FABRIC,
    Address,
    Interface,
    Machine,
    Network,
    Policy,
    Port,
    Router,
    Segment,
    Selector,
    Service,
    World,
    link_local,
)

TAG = b"CANARY"
CANARY = len(TAG) + 4  # bytes

DELIVERED, ANSWERED, NOBODY = "delivered", "answered", "nobody"  # the last: for all, and nobody else is there

# ---- the world

GUARDED = 5  # the network whose policies allow tcp/80 and nothing else


def stage(family: int = 4) -> World:
    """Machines with addresses of this family, and on them five networks with the same MACs, addresses and gateways,
    side by side and in each other.

    1, 2   carried by the wire. In 2 there is a segment with the machines' own addresses
    3      carried by 1, and 4 by 3
    5      carried by the wire: tcp/80 is allowed, all else is denied
    """
    values: list[Machine | Network | Segment | Router | Port | Policy] = [
        Machine(m, on_the_wire(m, family)) for m in (1, 2, 3, 4)
    ]
    cidrs = {
        "lan": (ip_network("10.0.0.0/24"), ip_network("fd00::/64")),
        "far": (ip_network("10.0.1.0/24"), ip_network("fd00:1::/64")),
        "fake": (ip_network("192.0.2.0/24"), ip_network("fd00:1::/64")),
    }

    def network(id: int, carrier: int, *segments: str) -> None:
        values.append(Network(id, carrier, family if carrier == FABRIC else 4, LEAVES[family]))
        here = [Segment(10 * id + n, id, 100 * id + n, cidrs[name]) for n, name in enumerate(segments)]
        values.extend(here)
        if len(here) > 1:
            # In the segment of machines' addresses, the gateway has one that no machine has.
            faces = [
                Interface(s.id, tuple(c[254] if c[0] == ip_address("192.0.2.0") else c[1] for c in s.cidrs))
                for s in here
            ]
            values.append(Router(id, id, 0x060000000001, tuple(faces)))

    def port(id: int, segment: int, host: int, number: int, hosts: bool = False) -> None:
        cidrs = next(v.cidrs for v in values if isinstance(v, Segment) and v.id == segment)
        addresses = tuple(cidr[number] for cidr in cidrs)
        values.append(Port(id, segment // 10, segment, host, 0x020000000000 + number, addresses, hosts=hosts))

    network(1, 0, "lan", "far")
    port(1, 10, 1, 10, hosts=True)
    port(2, 10, 2, 11, hosts=True)
    port(3, 10, 1, 12)
    port(4, 11, 3, 13)
    network(2, 0, "lan", "fake")
    port(5, 20, 1, 10)
    port(6, 20, 2, 11)
    port(7, 21, 2, 2)
    network(3, 1, "lan", "far")
    port(8, 30, 1, 10, hosts=True)
    port(9, 30, 2, 11, hosts=True)
    port(10, 31, 1, 13)
    network(4, 3, "lan")
    port(11, 40, 8, 10)
    port(12, 40, 9, 11)
    network(5, 0, "lan", "far")
    port(13, 50, 1, 10)
    port(14, 50, 2, 11)
    port(15, 51, 3, 13)
    anybody = (Selector("any"),)
    values.append(Policy(1, GUARDED, anybody, anybody, (Service(pk.TCP, 80, 80),)))
    return World.of(values)


@dataclass(frozen=True)
class Place:
    """Where a frame begins: a port of a world, chance, and the number of the frame."""

    world: World
    port: Port
    rng: random.Random
    number: int

    @property
    def canary(self) -> bytes:
        return TAG + self.number.to_bytes(4, "big")

    @property
    def mac(self) -> int:
        return self.port.mac

    @property
    def mates(self) -> list[Port]:
        """The other ports of its segment."""
        return [other for other in self.world.ports_of(self.port.segment) if other != self.port]

    @property
    def router(self) -> Router | None:
        return next(iter(self.world.routers_of(self.port.segment)), None)

    @property
    def family(self) -> int:
        return self.rng.choice([4, 6])

    def pick(self, *things: int) -> int:
        return self.rng.choice(things)

    def own(self, family: int) -> bytes:
        address = self.port.address(family)
        assert address is not None
        return mapped(address)

    def aim(self, family: int) -> tuple[int, bytes]:
        """A MAC and an address that the port may send to and somebody listens at: in its segment, or behind its
        router."""
        mates = [(other.mac, mapped(other.address(family) or other.addresses[0])) for other in self.mates]
        if self.router is not None:
            mates += [
                (self.router.mac, mapped(address))
                for interface in self.router.interfaces
                if interface.segment != self.port.segment
                for other in self.world.ports_of(interface.segment)
                if (address := other.address(family)) is not None
            ]
        return self.rng.choice(mates)

    def foreign_mac(self) -> int:
        """Anybody's but its own."""
        others = [other.mac for other in self.world.ports.values()] + [r.mac for r in self.world.routers.values()]
        macs = [*others, 0, pk.BROADCAST, self.mac | 1 << 40, self.mac ^ 1, 0x3333000000FB, self.rng.getrandbits(48)]
        return self.rng.choice([mac for mac in macs if mac != self.mac])

    def foreign_address(self, family: int) -> bytes:
        """One that it may not send from."""
        owned = self.own(family)
        others = [mapped(a) for p in self.world.ports.values() for a in p.addresses if a.version == family]
        others += [mapped(a) for r in self.world.routers.values() for i in r.interfaces for a in i.addresses]
        others += ODD_SOURCES[family]
        if family == 6:
            others += [mapped(link_local(mac)) for mac in (self.mac ^ 1, 0x060000000001)]
            others.append(self.rng.randbytes(16))
        else:
            others.append(owned[:12] + self.rng.randbytes(4))
        others = [a for a in others if pk.is_mapped(a) == (family == 4) and a != owned]
        return self.rng.choice([a for a in others if a != mapped(link_local(self.mac))])

    def transport(self, source: bytes, target: bytes) -> tuple[int, bytes]:
        """Something ordinary with the canary in it."""
        rng = self.rng
        match rng.randrange(4):
            case 0:
                return pk.TCP, tcp(source, target, rng.randrange(1024, 60000), 80, pk.SYN, self.canary)
            case 1:
                return pk.UDP, udp(source, target, rng.randrange(1024, 60000), rng.choice([53, 80, 9]), self.canary)
            case 2:
                type = pk.ECHO[4 if pk.is_mapped(target) else 6][0]
                rest = rng.randbytes(4)
                return icmp_protocol(target), icmp(source, target, type, rest=rest, payload=self.canary)
        return rng.choice([47, 50, 132, 253]), self.canary + bytes(12)

    def packet(self, source: bytes, mac: int, address: bytes, source_mac: int | None = None) -> bytes:
        """An ordinary frame from an address to a MAC and an address."""
        protocol, payload = self.transport(source, address)
        return ip_frame(mac, self.mac if source_mac is None else source_mac, source, address, protocol, payload)

    def legal(self) -> bytes:
        """A frame that gets where it should, in every network."""
        family = self.family
        mac, address = self.aim(family)
        source = self.own(family)
        segment = tcp(source, address, self.rng.randrange(1024, 60000), 80, pk.SYN, self.canary)
        return ip_frame(mac, self.mac, source, address, pk.TCP, segment)


def addresses(*texts: str) -> list[bytes]:
    return [mapped(ip_address(text)) for text in texts]


ODD_SOURCES = {
    4: addresses(
        "127.0.0.1", "127.255.255.254", "224.0.0.1", "239.255.255.250", "255.255.255.255", "10.0.0.255", "10.0.0.0",
        "169.254.169.254", "240.0.0.1", "192.0.2.1", "192.0.2.2", "8.8.8.8",
    ),
    6: addresses("::1", "ff02::1", "ff0e::1", "fe80::1", "2001:db8::1", "fd00::", "64:ff9b::7f00:1"),
}  # fmt: skip
MACHINES = addresses("192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4")
NOWHERE = addresses("169.254.169.254", "127.0.0.1", "0.0.0.0", "224.0.0.1", "198.51.100.1", "255.255.255.255")
NOWHERE += addresses("fe80::1", "::1", "ff02::1", "fd00:ec2::254", "2001:db8::1", "fe80::a9fe:a9fe")


# ---- what workloads send, row by row


def a1(at: Place) -> bytes:
    mac = at.foreign_mac()
    match at.rng.randrange(4):
        case 0:
            who = at.rng.choice([pk.BROADCAST, *(other.mac for other in at.mates)])
            frame = arp(at.pick(1, 2), mac, at.own(4), 0, mapped(IPv4Address("10.0.0.11")), who)
            return frame + at.canary
        case 1:
            about = mapped(IPv6Address("fd00::b"))
            body = neighbour(135, at.own(6), solicited(about), about, (1, mac))
            return ip_frame(group_mac(solicited(about)), mac, at.own(6), solicited(about), pk.ICMPV6, body, 255)
    target, address = at.aim(at.family)
    return at.packet(at.own(4 if pk.is_mapped(address) else 6), target, address, source_mac=mac)


def a2(at: Place) -> bytes:
    family = at.family
    mac, address = at.aim(family)
    source = at.foreign_address(family)
    if family == 6 and at.rng.random() < 0.2:  # IPv4 written as IPv6: its own too
        source = at.rng.choice([at.own(4), *ODD_SOURCES[4]])
        protocol, payload = at.transport(source, address)
        return ethernet(mac, at.mac, pk.IPV6, ipv6(source, address, protocol, payload))
    return at.packet(source, at.rng.choice([mac, mac, pk.BROADCAST]), address)


def a3(at: Place) -> bytes:
    rng = at.rng
    dst = rng.choice([pk.BROADCAST, *(other.mac for other in at.mates)])
    sender, target = at.foreign_address(4), rng.choice([at.own(4), *addresses("10.0.0.10", "10.0.0.11", "10.0.0.1")])
    match rng.randrange(5):
        case 0:  # somebody else's address, asked from or announced
            frame = arp(at.pick(1, 2), at.mac, sender, 0, rng.choice([target, sender]), dst)
        case 1:  # somebody else's MAC inside
            frame = arp(at.pick(1, 2), at.foreign_mac(), rng.choice([at.own(4), sender]), 0, target, dst)
            frame = frame[:6] + pk.mac_bytes(at.mac) + frame[12:]
        case 2:  # an operation that nobody needs here: RARP, InARP, NAK
            frame = arp(rng.choice([0, 3, 4, 8, 9, 10, 257, 65535]), at.mac, at.own(4), 0, target, dst)
        case 3:  # other hardware, another protocol, odd lengths
            frame = bytearray(arp(1, at.mac, at.own(4), 0, target, dst))
            where = rng.choice([14, 15, 16, 17, 18, 19])
            frame[where] ^= rng.randrange(1, 256)
            frame = bytes(frame)
        case _:
            return arp(1, at.mac, at.own(4), 0, target, dst)[: rng.randrange(14, 42)]
    return bytes(frame) + at.canary


def a4(at: Place) -> bytes:
    """The matrix of source, target, link-layer option and MAC, without what is in order."""
    rng, own = at.rng, at.own(6)
    local = mapped(link_local(at.mac))
    mine, others = [own, local], [at.foreign_address(6), *addresses("fd00::b", "fd00::1", "fd00::a")]
    others = [a for a in others if a not in mine]
    type = at.pick(135, 136)
    kind = 1 if type == 135 else 2
    source, about, option, ttl = rng.choice(mine), rng.choice(mine), (kind, at.mac), 255
    tail = b""
    match rng.randrange(7):
        case 0:  # speaking for others
            type, kind, about, option = 136, 2, rng.choice(others), (2, at.mac)
        case 1:  # from others
            source = rng.choice(others)
        case 2:  # with the MAC of others
            option = (kind, at.foreign_mac())
        case 3:  # DAD for what is another's: nobody else could have it then
            type, source, about, option = 135, bytes(16), rng.choice(others), (1, at.mac)
        case 4:  # from behind a router
            ttl = rng.choice([0, 1, 64, 254])
        case 5:  # options without end, or too long
            tail = rng.choice(
                [b"\x01\x00" + bytes(6), b"\x05\xff" + bytes(6), b"\x01", bytes(8), b"\x01\x02" + bytes(6)]
            )
        case _:
            type, kind, source, about = 136, 2, rng.choice(others), rng.choice(others)
            option = (2, at.foreign_mac())
    target = rng.choice([solicited(about), about, mapped(IPv6Address("ff02::1"))])
    body = neighbour(type, source, target, about, option, at.pick(0, 0x20, 0x60, 0xE0)) + tail
    mac = group_mac(target) if target[0] == 0xFF else rng.choice([other.mac for other in at.mates] or [pk.BROADCAST])
    return ip_frame(mac, at.mac, source, target, pk.ICMPV6, body, ttl)


def a5(at: Place) -> bytes:
    rng, source = at.rng, at.rng.choice([at.own(6), mapped(link_local(at.mac))])
    type = rng.choice([133, 134, 135, 136, 137])
    about = mapped(IPv6Address("fd00::b"))
    target = rng.choice([mapped(IPv6Address("ff02::1")), about])
    body = neighbour(type, source, target, about, (2 if type == 136 else 1, at.foreign_mac())) + at.canary[:8]
    mac = group_mac(target) if target[0] == 0xFF else rng.choice([other.mac for other in at.mates] or [pk.BROADCAST])
    chain = [rng.choice([0, 60, 43]) for _ in range(rng.randrange(3))]
    whole = rng.random() < 0.3
    if whole:  # no fragment: hidden behind headers, and spoofed
        chain = chain or [60]
        if type == 133:
            type = 134
            body = neighbour(134, source, target, about)
    else:
        chain.insert(rng.randint(0, len(chain)), 44)
    headers, following = b"", pk.ICMPV6
    part = rng.choice([1, 1, 8, 9])  # MF; later: offset 1, with and without MF
    for kind in reversed(chain):
        headers = extension(kind, following, rng.getrandbits(32), part if kind == 44 else 0) + headers
        following = kind
    return ethernet(mac, at.mac, pk.IPV6, ipv6(source, target, following, body, 255, headers=headers))


def a6(at: Place) -> bytes:
    rng = at.rng
    everybody = mapped(IPv6Address("ff02::1"))
    local = mapped(link_local(at.mac))
    mate = rng.choice(at.mates) if at.mates else None
    match rng.randrange(5):
        case 0:  # router advertisement: lifetime, prefix, DNS
            payload = bytes(8) + b"\x03\x04\x40\xc0" + bytes(28)
            body = icmp(local, everybody, 134, rest=b"\x40\x00\x07\x08", payload=payload)
            return ip_frame(group_mac(everybody), at.mac, local, everybody, pk.ICMPV6, body, 255)
        case 1:  # redirect, to one and to all
            target = mapped(mate.address(6) or mate.addresses[0]) if mate and rng.random() < 0.7 else everybody
            mac = mate.mac if mate and target != everybody else group_mac(everybody)
            body = icmp(local, target, 137, payload=local + at.own(6) + at.canary)
            return ip_frame(mac, at.mac, local, target, pk.ICMPV6, body, 255)
        case 2:  # ICMP redirect, as if a router had sent it
            target = mapped(mate.addresses[0]) if mate else pk.LIMITED_BROADCAST
            quote = ipv4(target, at.own(4), pk.UDP, udp(target, at.own(4), 5000, 53)) + at.canary
            body = icmp(at.own(4), target, 5, at.pick(0, 1), at.own(4)[-4:], quote)
            mac = rng.choice([mate.mac, pk.BROADCAST]) if mate else pk.BROADCAST
            return ip_frame(mac, at.mac, at.own(4), target, pk.ICMP, body)
        case 3:
            target = mapped(mate.addresses[0]) if mate and rng.random() < 0.5 else pk.LIMITED_BROADCAST
            mac = pk.BROADCAST if target == pk.LIMITED_BROADCAST or mate is None else mate.mac
            offer = b"\x02\x01\x06\x00" + rng.randbytes(4) + bytes(228) + b"\x63\x82\x53\x63\x35\x01\x02\xff"
            body = udp(at.own(4), target, 67, at.pick(68, 67), offer + at.canary)
            return ip_frame(mac, at.mac, at.own(4), target, pk.UDP, body)
        case _:
            target = mapped(mate.address(6) or mate.addresses[0]) if mate else everybody
            mac = mate.mac if mate else group_mac(everybody)
            source = rng.choice([local, at.own(6)])
            body = udp(source, target, 547, 546, b"\x02" + rng.randbytes(3) + at.canary)
            return ip_frame(mac, at.mac, source, target, pk.UDP, body)


def a7(at: Place) -> bytes:
    """A client with another's hardware address: outside, or from an address that is not its own."""
    rng, mac = at.rng, at.foreign_mac()
    head = b"\x01\x01\x06\x00" + rng.randbytes(4) + bytes(20) + pk.mac_bytes(mac) + bytes(202)
    body = head + b"\x63\x82\x53\x63\x35\x01" + rng.choice([b"\x01", b"\x03"]) + b"\x3d\x07\x01" + pk.mac_bytes(mac)
    body += b"\xff" + at.canary
    nobody, all_ = pk.UNSPECIFIED4, pk.LIMITED_BROADCAST
    match rng.randrange(3):
        case 0:
            return ip_frame(pk.BROADCAST, mac, nobody, all_, pk.UDP, udp(nobody, all_, 68, 67, body))
        case 1:
            source = at.foreign_address(4)
            return ip_frame(pk.BROADCAST, at.mac, source, all_, pk.UDP, udp(source, all_, 68, 67, body))
    target = mapped(IPv4Address("10.0.0.11"))
    return ip_frame(pk.BROADCAST, at.mac, nobody, target, pk.UDP, udp(nobody, target, 68, 67, body))


def a8(at: Place) -> bytes:
    """One tag, two, zero; before what is in order else, so that only the tag is wrong."""
    frame = at.legal()
    tags = b"".join(
        at.rng.choice([b"\x81\x00", b"\x88\xa8"]) + at.rng.choice([0, 1, 17, 4095, 0xE000]).to_bytes(2, "big")
        for _ in range(at.pick(1, 1, 2, 3))
    )
    return frame[:12] + tags + frame[12:]


def a9(at: Place) -> bytes:
    """A length where the EtherType was, LLC and SNAP behind it, and the same packet."""
    frame = at.legal()
    snap = at.rng.choice([b"\xaa\xaa\x03\x00\x00\x00", b"\x42\x42\x03", b"\xe0\xe0\x03", b"\xff\xff"]) + frame[12:]
    length = at.rng.choice([len(snap), 0, 46, 1500, at.rng.randrange(1501)])
    return frame[:12] + length.to_bytes(2, "big") + snap


UNLISTED = (0x8847, 0x8848, 0x8863, 0x8864, 0x88E5, 0x88CC, 0x888E, 0x8906, 0x8914, 0x88E7, 0x8809, 0x9000, 0x0842)
UNLISTED += (0x22F3, 0x9100, 0x9200, 0x88F7, 0x8035, 0x8137, 0xFFFF, 0x0600, 0x05FF)


def a10(at: Place) -> bytes:
    frame = at.legal()
    known = {pk.IPV4, pk.IPV6, pk.ARP, *pk.TAGS}
    random_type = next(t for t in iter(lambda: at.rng.randrange(0x600, 0x10000), None) if t not in known)
    ether_type = at.rng.choice([*UNLISTED, random_type])
    label = at.rng.choice([b"", b"\x00\x01\x01\x40", b"\x11\x00\x00\x01\x00\x40\x00\x21"])
    return frame[:12] + ether_type.to_bytes(2, "big") + label + frame[14:]


def a11(at: Place) -> bytes:
    """STP, PAUSE, LACP, LLDP, and whatever else, to the addresses that no bridge forwards."""
    frame = at.legal()
    types = [b"\x00\x26\x42\x42\x03", b"\x88\x08\x00\x01\xff\xff", b"\x88\x09\x01\x01", b"\x88\xcc", frame[12:14]]
    if at.rng.random() < 0.2:  # RARP: not there, but to all
        return pk.mac_bytes(pk.BROADCAST) + frame[6:12] + b"\x80\x35" + frame[14:]
    return b"\x01\x80\xc2\x00\x00" + bytes([at.rng.randrange(16)]) + frame[6:12] + at.rng.choice(types) + frame[14:]


def a12(at: Place) -> bytes:
    """Headers that do not add up."""
    rng, frame = at.rng, bytearray(at.legal())
    is_ipv4 = frame[12:14] == b"\x08\x00"
    choice = rng.randrange(6)
    if choice == 0:  # as short as a frame can be sent, and a bit longer
        return bytes(frame[: rng.randrange(14, 14 + (40 if is_ipv4 else 60))])
    if choice == 1:  # the other version
        frame[14] ^= rng.choice([0x20, 0xF0, 0x10, 0x80])
    elif choice == 2 and is_ipv4:  # a header shorter than itself, or longer than all there is
        frame[14] = 0x40 | rng.choice([0, 1, 4, 15])
    elif choice == 3 and is_ipv4:  # shorter than its header
        frame[16:18] = rng.randrange(20).to_bytes(2, "big")
    elif choice == 4:  # longer than the frame
        at_length = 16 if is_ipv4 else 18
        frame[at_length : at_length + 2] = rng.choice([len(frame) - 13, 1500, 65535]).to_bytes(2, "big")
    elif is_ipv4:  # too short for TCP
        frame[16:18] = (20 + rng.randrange(20)).to_bytes(2, "big")
    else:
        frame[18:20] = rng.randrange(20).to_bytes(2, "big")
    return bytes(frame)


def a13(at: Place) -> bytes:
    """Options, chains of headers, and what is behind them: what nobody can read has no ports."""
    rng, family = at.rng, at.family
    mac, address = at.aim(family)
    source = at.own(family)
    protocol, payload = rng.choice(
        [
            (pk.TCP, tcp(source, address, 1000, rng.choice([80, 81]), pk.SYN, at.canary)),
            (pk.UDP, udp(source, address, 1000, 80, at.canary)),
            *((number, at.canary + bytes(22)) for number in (0, 255, 50, 51, 59, 41, 4, 60, 43, 135, 253)),
        ]
    )
    if family == 4:
        options = rng.choice(
            [b"\x94\x04\0\0", b"\x83\x07\x04" + source[-4:] + b"\0", b"\x44\x08\x05\0" + bytes(4), b"\x01" * 40]
        )
        return ethernet(mac, at.mac, pk.IPV4, ipv4(source, address, protocol, payload, options=options))
    chain = [rng.choice([0, 43, 60, 51]) for _ in range(rng.choice([0, 1, 2, 6, 7, 9]))]
    headers, following = b"", protocol
    for kind in reversed(chain):
        headers, following = extension(kind, following) + headers, kind
    frame = ethernet(mac, at.mac, pk.IPV6, ipv6(source, address, following, payload, headers=headers))
    if rng.random() < 0.1:  # jumbogram (RFC 2675): payload length 0, and the true one in an option
        jumbo = bytes((protocol, 0, 0xC2, 4)) + len(payload).to_bytes(4, "big")
        frame = ethernet(mac, at.mac, pk.IPV6, ipv6(source, address, 0, payload, headers=jumbo))
        frame = frame[:18] + b"\0\0" + frame[20:]
    elif rng.random() < 0.1 and headers:  # a header that is longer than the packet
        frame = frame[:55] + b"\xff" + frame[56:]
    return frame


def a14(at: Place) -> bytes:
    """Fragments without a head, heads without a body, one over the other. Identifications are few, so they meet."""
    rng, family = at.rng, at.family
    mac, address = at.aim(family)
    source = at.own(family)
    name = rng.randrange(4)
    protocol, whole = rng.choice(
        [
            (pk.TCP, tcp(source, address, 1000, rng.choice([80, 81, 22]), rng.choice([pk.SYN, pk.ACK]), at.canary)),
            (pk.UDP, udp(source, address, 1000, rng.choice([80, 4789]), at.canary + bytes(14))),
            (icmp_protocol(address), echo(source, address, 7) + at.canary + bytes(6)),
        ]
    )
    offset, more = rng.choice([(0, 1), (0, 1), (1, 0), (1, 1), (2, 0), (0x1FFF, 0), (0x1FFF, 1), (3, 1)])
    part = whole[: rng.choice([len(whole), 0, 4, 7, 8, 16])] if offset == 0 else whole[8:]
    if family == 4:
        packet = ipv4(source, address, protocol, part, identification=name, fragment=more << 13 | offset)
        return ethernet(mac, at.mac, pk.IPV4, packet)
    header = extension(44, protocol, name, offset << 3 | more)
    return ethernet(mac, at.mac, pk.IPV6, ipv6(source, address, 44, part, headers=header))


def a15(at: Place) -> bytes:
    """ICMP errors about what nobody said: "fragmentation needed" above all, to one and to all."""
    rng, family = at.rng, at.family
    mac, address = at.aim(family)
    source = at.own(family)
    others = [mapped(a) for p in at.world.ports.values() for a in p.addresses if a.version == family]
    a, b = rng.choice([address, rng.choice(others)]), rng.choice([source, rng.choice(others)])
    protocol, inner = rng.choice(
        [
            # Ports that no legal frame of a row has.
            (pk.TCP, tcp(a, b, 700 + rng.randrange(99), 443, pk.ACK)),
            (pk.UDP, udp(a, b, 700 + rng.randrange(99), 53)),
            (icmp_protocol(address), echo(a, b, rng.randrange(1 << 16))),
            (47, bytes(8)),
        ]
    )
    quote = (ipv4 if family == 4 else ipv6)(a, b, protocol, inner)
    quote = quote[: rng.choice([len(quote), len(quote), 27, 19, 0, 47])] + rng.choice([b"", at.canary])
    type = rng.choice(sorted(pk.ERRORS[family]))
    mtu = rng.choice([68, 0, 1, 576, 1279, 65535]).to_bytes(4, "big")
    body = icmp(source, address, type, 4 if (family, type) == (4, 3) else 0, mtu, quote)
    mac = rng.choice([mac, mac, pk.BROADCAST])
    return ip_frame(mac, at.mac, source, address, icmp_protocol(address), body)


def a16(at: Place) -> bytes:
    """TCP that belongs to nothing, and what has ports that nobody knows."""
    rng, family = at.rng, at.family
    mac, address = at.aim(family)
    source = at.own(family)
    if rng.random() < 0.6:
        flags = rng.choice([pk.RST, pk.ACK, pk.SYN | pk.ACK, pk.FIN, 0, 0x3F, pk.SYN | pk.FIN, pk.SYN | pk.RST, 0x29])
        port = rng.choice([22, 81, 443])
        return ip_frame(mac, at.mac, source, address, pk.TCP, tcp(source, address, 80, port, flags, at.canary))
    head = (1000).to_bytes(2, "big") + (80).to_bytes(2, "big") + rng.randbytes(8)
    return ip_frame(mac, at.mac, source, address, rng.choice([132, 33, 136, 2, 89, 112, 254, 255]), head + at.canary)


def _vxlan(frame: bytes, vni: int) -> bytes:
    return b"\x08\0\0\0" + vni.to_bytes(3, "big") + b"\0" + frame


def a17(at: Place) -> bytes:
    """Tunnels of its own: into other networks, it hopes, to a port, to a machine, or to whoever is in between."""
    rng = at.rng
    family = at.family
    mac, address = at.aim(family)
    if family == 4 and rng.random() < 0.5:
        address = rng.choice(MACHINES)
    source = at.own(family)
    victim = rng.choice(list(at.world.ports.values()))
    a, b = (mapped(IPv4Address(text)) for text in ("10.0.0.10", "10.0.0.11"))
    inner = ip_frame(victim.mac, 0x02000000000A, a, b, pk.UDP, udp(a, b, 1000, 9, at.canary))
    vni = at.world.segments[victim.segment].vni
    match rng.randrange(6):
        case 0 | 1:
            body = udp(source, address, rng.choice([49152, 4789, 1000]), 4789, _vxlan(inner, vni))
            protocol = pk.UDP
        case 2:  # in itself
            again = ip_frame(
                mac, at.mac, source, address, pk.UDP, udp(source, address, 49152, 4789, _vxlan(inner, vni))
            )
            protocol, body = pk.UDP, udp(source, address, 49152, 4789, _vxlan(again, 100))
        case 3:  # Geneve, LISP-GPE, STT, WireGuard, L2TP, BFD, GTP
            port = rng.choice([6081, 4790, 7471, 51820, 1701, 3784, 2152, 4789])
            protocol, body = pk.UDP, udp(source, address, 49152, port, bytes(8) + inner)
        case 4:
            protocol, body = 47, b"\x20\x00\x65\x58" + vni.to_bytes(3, "big") + b"\0" + inner
        case _:
            protocol, body = rng.choice(
                [(4, inner[14:]), (41, inner[14:]), (50, bytes(8) + inner), (97, bytes(2) + inner)]
            )
    return ip_frame(mac, at.mac, source, address, protocol, body)


def a18(at: Place) -> bytes:
    """BFD, health probes, BGP, and what an agent or a controller might listen to."""
    rng, family = at.rng, at.family
    mac, address = at.aim(family)
    if rng.random() < 0.6:
        address = rng.choice([a for a in (*MACHINES, *NOWHERE) if pk.is_mapped(a) == (family == 4)])
    source = at.own(family)
    port = rng.choice([3784, 3785, 4784, 6784, 179, 646, 1985, 5353, 5355, 8472, 6640, 6641, 6642, 2379, 8080])
    ttl = rng.choice([255, 1, 64])
    if rng.random() < 0.8:
        bfd = b"\x20\xc0\x03\x18" + rng.randbytes(20)
        return ip_frame(mac, at.mac, source, address, pk.UDP, udp(source, address, 49152, port, bfd + at.canary), ttl)
    return ip_frame(mac, at.mac, source, address, pk.TCP, tcp(source, address, 1000, port, pk.SYN, at.canary), ttl)


def a19(at: Place) -> bytes:
    """To machines, to link-local addresses, to metadata services: by the router, at once, and to all."""
    rng, family = at.rng, at.family
    address = rng.choice([a for a in (*MACHINES, *NOWHERE) if pk.is_mapped(a) == (family == 4)])
    macs = [other.mac for other in at.mates] + [0x02DEADBEEF00, pk.BROADCAST, group_mac(address)]
    if at.router is not None:
        macs += [at.router.mac] * 3
    return at.packet(at.own(family), rng.choice(macs), address)


def a20(at: Place) -> bytes:
    """From the ports that answers come from."""
    family = at.family
    mac, address = at.aim(family)
    source = at.own(family)
    sport, dport = (
        at.pick(53, 67, 68, 80, 123, 443, 4789, 0) if family == 6 else at.pick(53, 68, 80, 123),
        at.pick(1024, 53, 68, 546, 0),
    )
    if at.rng.random() < 0.5:
        return ip_frame(mac, at.mac, source, address, pk.UDP, udp(source, address, sport, dport, at.canary))
    flags = at.pick(pk.ACK, pk.SYN | pk.ACK)
    return ip_frame(mac, at.mac, source, address, pk.TCP, tcp(source, address, sport, dport, flags, at.canary))


def a21(at: Place) -> bytes:
    """A MAC that nobody has had before, each time."""
    mac = 0x02A000000000 | at.number
    target, address = at.aim(at.family)
    return at.packet(at.own(4 if pk.is_mapped(address) else 6), at.rng.choice([target, pk.BROADCAST]), address, mac)


def a23(at: Place) -> bytes:
    """Headers by chance, addresses and ports above all: what fills a cache that is not asked about tenants."""
    rng, family = at.rng, at.family
    mac, address = at.aim(family)
    source = at.own(family)
    if rng.random() < 0.5:
        address = (address[:12] + rng.randbytes(4)) if family == 4 else (address[:8] + rng.randbytes(8))
    protocol = rng.choice([pk.TCP, pk.UDP, rng.randrange(256)])
    body = rng.randbytes(4) + rng.randbytes(8) + bytes([0x50, rng.randrange(64)]) + rng.randbytes(6) + at.canary
    tos, ttl = rng.randrange(256), rng.randrange(256)
    if family == 4:
        packet = ipv4(source, address, protocol, body, ttl, rng.getrandbits(16), tos=tos)
        return ethernet(mac, at.mac, pk.IPV4, packet)
    return ethernet(mac, at.mac, pk.IPV6, ipv6(source, address, protocol, body, ttl, tos))


def a24(at: Place) -> bytes:
    """What is for all, or answered by the network: as much of it as there is."""
    rng = at.rng
    match rng.randrange(3):
        case 0:
            return (
                arp(1, at.mac, at.own(4), 0, mapped(IPv4Address("10.0.0.0") + rng.randrange(256)), pk.BROADCAST)
                + at.canary
            )
        case 1:
            about = mapped(IPv6Address("fd00::") + rng.randrange(256))
            body = neighbour(135, at.own(6), solicited(about), about, (1, at.mac))
            return ip_frame(group_mac(solicited(about)), at.mac, at.own(6), solicited(about), pk.ICMPV6, body, 255)
    address = rng.choice(addresses("255.255.255.255", "224.0.0.251", "239.1.1.1"))
    payload = udp(at.own(4), address, 5353, 5353, at.canary)
    mac = pk.BROADCAST if address[-1] == 255 else group_mac(address)
    return ip_frame(mac, at.mac, at.own(4), address, pk.UDP, payload)


# ---- rows


@dataclass(frozen=True)
class Row:
    """What may become of its frames: each of `ends` does become of some, each of `rare` of some if there are enough.
    `guarded` instead of `ends` where policies allow tcp/80 alone."""

    make: Callable[[Place], bytes]
    ends: frozenset[str]
    guarded: frozenset[str]
    rare: frozenset[str]


def row(make: Callable[[Place], bytes], ends: str, guarded: str | None = None, rare: str = "") -> Row:
    return Row(make, *(frozenset(words.split()) for words in (ends, ends if guarded is None else guarded, rare)))


QUESTIONS = "announcement arp_unknown nd_unknown"
ROWS = {
    "A1": row(a1, "source_mac"),
    "A2": row(a2, "source_address malformed"),
    "A3": row(a3, "arp_spoof malformed"),
    "A4": row(a4, "nd_spoof source_address malformed"),
    "A5": row(a5, "nd_spoof router_advertisement fragment_unknown malformed"),
    "A6": row(a6, "router_advertisement icmp_unrelated dhcp_server"),
    "A7": row(a7, "source_mac source_address"),
    "A8": row(a8, "tagged"),
    "A9": row(a9, "ether_type"),
    "A10": row(a10, "ether_type"),
    "A11": row(a11, "control_frame ether_type"),
    "A12": row(a12, "malformed"),
    "A13": row(a13, "delivered malformed", "malformed policy", "delivered"),
    "A14": row(a14, "delivered malformed fragment_unknown", "malformed fragment_unknown policy", "delivered"),
    "A15": row(a15, "icmp_unrelated"),
    "A16": row(a16, "delivered", "policy"),
    "A17": row(a17, "delivered no_route unreachable", "policy", "answered"),
    "A18": row(a18, "delivered no_route ttl_expired", "policy", "answered unreachable"),
    "A19": row(
        a19,
        "delivered no_route unknown_unicast",
        "policy unknown_unicast",
        "answered nobody unreachable no_route delivered",
    ),
    "A20": row(a20, "delivered", "policy"),
    "A21": row(a21, "source_mac"),
    "A23": row(
        a23,
        "delivered no_route unreachable",
        "policy",
        "delivered malformed answered ttl_expired router_local icmp_unrelated fragment_unknown nd_spoof "
        "router_advertisement dhcp_server",
    ),
    "A24": row(a24, f"delivered nobody {QUESTIONS}", f"policy nobody {QUESTIONS}", "answered"),
}


# ---- what machines send, row by row


@dataclass(frozen=True)
class Wire:
    """Where a datagram ends: a machine, and who may send to it. `inner`: a frame that `sender` may carry to `machine`,
    and its VNI."""

    world: World
    machine: int
    sender: int
    rng: random.Random
    number: int
    inner: bytes
    vni: int

    @property
    def canary(self) -> bytes:
        return TAG + self.number.to_bytes(4, "big")

    def datagram(
        self, frame: bytes | None = None, vni: int | None = None, source: Address | None = None, ecn: int = 0
    ) -> bytes:
        """An outer IP packet to the machine; with everything in order unless given."""
        frame, vni = self.inner if frame is None else frame, self.vni if vni is None else vni
        machines = self.world.machines
        source = machines[self.sender].address if source is None else source
        port = 49152 + self.number % 16384
        return pk.encapsulate(frame, vni, source, machines[self.machine].address, port, ecn)[pk.ETHERNET :]

    @property
    def family(self) -> int:
        """Of the outer header."""
        return self.world.machines[self.machine].address.version

    @property
    def vxlan_at(self) -> int:
        """Where the VXLAN header begins: behind the outer IP and UDP headers."""
        return 28 if self.family == 4 else 48

    def elsewhere(self) -> Port:
        """A port that does not live at the sender."""
        ports = [p for p in self.world.ports.values() if p.address(6) is not None]  # not those of markers
        return self.rng.choice([p for p in ports if home(self.world, p) != self.sender])


def home(world: World, port: Port) -> int:
    """The machine where a port lives in the end."""
    while world.networks[port.network].carrier:
        port = world.ports[port.host]
    return port.host


def b1(at: Wire) -> bytes:
    if at.family == 4:
        texts = ["192.0.2.99", "10.0.0.10", "127.0.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1", "203.0.113.5"]
        other: Address = IPv4Address(at.rng.getrandbits(32))
    else:
        texts = ["2001:db8::99", "fd00::a", "::1", "::", "ff02::1", "fe80::1", "2001:db8:1::1"]
        other = IPv6Address(at.rng.getrandbits(128))
    # From itself: what lives here sends nothing over the wire to here.
    own = at.world.machines[at.machine].address
    return at.datagram(source=at.rng.choice([*map(ip_address, texts), own, other]))


def b3(at: Wire) -> bytes:
    known = {segment.vni for segment in at.world.segments.values()}
    vni = at.rng.choice([0, 1, 0xFFFFFF, 0x800000, at.vni ^ 0x10000, at.vni << 8 & 0xFFFFFF, at.rng.getrandbits(24)])
    return at.datagram(vni=vni if vni not in known else 0)


def b4(at: Wire) -> bytes:
    """In the name of a port that lives elsewhere, at the machine it is for even; of nobody; of one behind a router."""
    rng, victim = at.rng, at.elsewhere()
    segment = at.world.segments[victim.segment]
    family = rng.choice([4, 6])
    source = victim.address(family)
    mates = [p for p in at.world.ports_of(segment.id) if p != victim] or [victim]
    target = rng.choice(mates)
    address = target.address(family)
    assert source is not None
    assert address is not None
    a, b, mac = mapped(source), mapped(address), victim.mac
    match rng.randrange(4):
        case 0:
            mac = rng.choice([0, pk.BROADCAST, rng.getrandbits(48), 0x02DEADBEEF00])
        case 1:
            routers = at.world.routers_of(segment.id)
            mac = routers[0].mac if routers else mac
        case 2:  # a port of the sender, with another's address
            here = [p for p in at.world.ports_of(segment.id) if home(at.world, p) == at.sender]
            mac = here[0].mac if here else mac
    body = udp(a, b, 1000, 80, at.canary)
    return at.datagram(ip_frame(target.mac, mac, a, b, pk.UDP, body), segment.vni)


def b7(at: Wire) -> bytes:
    """Header bits, headers that end early, and frames that no workload may send."""
    rng, frame = at.rng, at.inner
    good = bytearray(at.datagram())
    packet = pk.parse(frame)
    match rng.randrange(7):
        case 0:
            good[at.vxlan_at] = rng.choice([0, 0x09, 0x0C, 0x88, 0x48, 0xFF, 0x04])
            return bytes(good)
        case 1:
            good[at.vxlan_at + rng.choice([1, 2, 3, 7])] ^= rng.randrange(1, 256)
            return bytes(good)
        case 2:  # the outer packet ends in the VXLAN header, or in the inner Ethernet header
            return resized(bytes(good), rng.randrange(at.vxlan_at, at.vxlan_at + 22))
        case 3:  # the inner packet ends early
            return at.datagram(frame[: rng.randrange(14, 14 + 40)])
        case 4:
            tag = rng.choice([b"\x81\x00", b"\x88\xa8"]) + rng.choice([0, 1, 17]).to_bytes(2, "big")
            return at.datagram(frame[:12] + tag + frame[12:])
        case 5:  # a complaint to all
            a, b = packet.flow.source, packet.flow.target
            body = icmp(a, b, rng.choice(sorted(pk.ERRORS[packet.family])), payload=frame[14:70] + at.canary)
            return at.datagram(ip_frame(pk.BROADCAST, packet.source_mac, a, b, icmp_protocol(b), body))
    head = rng.choice([frame[:6], b"\x01\x80\xc2\x00\x00" + bytes([rng.randrange(16)])])
    types = [b"\x08\x06", b"\x88\xcc", b"\x80\x35", b"\x00\x26", b"\x88\x47"]
    return at.datagram(head + frame[6:12] + rng.choice(types) + frame[14:])


def resized(datagram: bytes, size: int) -> bytes:
    """So many bytes of it, with outer lengths that say so."""
    cut = bytearray(datagram[:size])
    if datagram[0] >> 4 == 6:
        cut[4:6] = cut[44:46] = (size - 40).to_bytes(2, "big")
        return bytes(cut)
    cut[2:4], cut[24:26] = size.to_bytes(2, "big"), (size - 20).to_bytes(2, "big")
    cut[10:12] = b"\0\0"
    cut[10:12] = pk.checksum(bytes(cut[:20])).to_bytes(2, "big")
    return bytes(cut)


def b8(at: Wire) -> bytes:
    """VXLAN in VXLAN, to our own address: whoever opens twice would believe anybody."""
    rng, packet = at.rng, pk.parse(at.inner)
    a, b = packet.flow.source, packet.flow.target
    victim = at.elsewhere()
    frame = ip_frame(victim.mac, 0x02000000000A, *addresses("10.0.0.12", "10.0.0.11"), pk.UDP, bytes(8) + at.canary)
    for _ in range(rng.choice([1, 1, 2, 20])):
        ours = mapped(at.world.machines[at.machine].address)
        target = rng.choice([b, ours]) if packet.family == at.family else b
        body = udp(a, target, 49152, 4789, _vxlan(frame, rng.choice([at.vni, at.world.segments[victim.segment].vni])))
        frame = ip_frame(packet.target_mac, packet.source_mac, a, target, pk.UDP, body)
        if len(frame) > 1300:
            break
    return at.datagram(frame)


def fuzzed(at: Wire) -> bytes:
    """Anything: bits flipped in what was in order, cut, stretched, or never in order."""
    rng = at.rng
    good = bytearray(at.datagram(source=rng.choice([None, None, on_the_wire(99, at.family)]), ecn=rng.randrange(4)))
    for _ in range(rng.choice([0, 1, 1, 2, 8])):
        good[rng.randrange(len(good))] = rng.randrange(256)
    if rng.random() < 0.3:
        good = bytearray(resized(bytes(good), rng.randrange(at.vxlan_at, len(good))))
    if rng.random() < 0.1:
        good[at.vxlan_at + 8 :] = rng.randbytes(rng.randrange(200))
    return bytes(good)


WIRE_LINK = "tagged ether_type control_frame malformed"
WIRE_ROWS = {
    "B1": Row(b1, frozenset({"not_a_member"}), frozenset(), frozenset()),
    "B3": Row(b3, frozenset({"unknown_vni"}), frozenset(), frozenset()),
    "B4": Row(b4, frozenset(["sender_location", "unknown_source", "source_address"]), frozenset(), frozenset()),
    "B7": Row(b7, frozenset(f"vxlan_header icmp_unrelated {WIRE_LINK}".split()), frozenset(), frozenset()),
    "B8": Row(b8, frozenset({"delivered", "policy"}), frozenset(), frozenset()),
    "fuzzed": Row(fuzzed, frozenset({"delivered"}), frozenset(), frozenset()),
}
