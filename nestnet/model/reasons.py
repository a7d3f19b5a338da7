"""Why a packet was dropped: one name for each reason, the same in every telling, counter, trace and manual.

The number is what the kernel datapath counts under (`enum reason` in bpf/reasons.h is generated from here).
Numbers are never reused: only add at the end.
"""

from __future__ import annotations

REASONS: dict[str, str] = {
    # where the frame came in
    "not_attached": "the interface, or the destination port, has no workload attached here",
    "port_disabled": "the port is administratively down",
    "network_disabled": "the network is disabled, or not complete on this machine yet",
    # what the frame is
    "malformed": "truncated or inconsistent headers",
    "tagged": "a VLAN tag on an access port, to or from a router, or in VXLAN of a segment that is not transparent",
    "control_frame": "a bridge control address, 01:80:c2:00:00:00 to 0f",
    "ether_type": "neither IPv4, IPv6 nor ARP",
    # source guard
    "source_mac": "the source MAC is not the port's",
    "source_address": "the source address is not the port's",
    "arp_spoof": "ARP with an address or MAC that is not the port's",
    "nd_spoof": "neighbour discovery with an address or MAC that is not the port's, or in a fragment",
    "dhcp_server": "DHCP server replies from a port",
    "router_advertisement": "router advertisement or redirect from a port",
    # answered or needed by nobody
    "announcement": "gratuitous ARP, duplicate address detection or NA for the port's own address: needs no answer",
    "arp_unknown": "ARP for an address that nobody has",
    "nd_unknown": "neighbour solicitation for an address that nobody has",
    "fragment_unknown": "a fragment whose first part was not seen in the last 30 s",
    # policy
    "policy": "no policy allows it, or one denies it",
    "connection_share": "the opener has used its share of connections",
    "icmp_unrelated": "an ICMP error that belongs to no connection",
    # switching and routing
    "unknown_unicast": "no port or router has this destination MAC",
    "hairpin": "sent to the sender's own MAC",
    "no_route": "the router has no route to the destination",
    "unreachable": "the destination's segment is known, but nobody has the address",
    "router_local": "sent to a router's own address, and not an echo request",
    "ttl_expired": "the TTL or hop limit ran out at a router",
    "too_big": "longer than the network's MTU",
    # what carries it
    "carrier_down": "a carrier, or a host port in it, is disabled",
    "carrier_policy": "a carrier's policies do not allow udp/4789 between the two hosts",
    "carrier_no_route": "a carrier has no path between the two hosts",
    "carrier_depth": "the chain of hosts is longer than 64",
    # from the wire
    "not_a_member": "VXLAN from an address that is no machine of this domain",
    "vxlan_header": "VXLAN without the I flag, or with reserved bits set",
    "unknown_vni": "no segment on this machine has this VNI",
    "unknown_source": "the inner source MAC or address belongs to no port of the network",
    "sender_location": "the inner source lives on another machine than the sender; on a VLAN, on this one",
    "not_here": "the inner destination does not live on this machine",
    "ecn": "congestion marked outside on a packet that does not support it (RFC 6040)",
    "no_underlay_route": "the underlay has no route to the machine",
    "error": "the kernel refused an operation on the packet",
    "carrier_ttl": "a carrier has more than 63 routers between the two hosts",
    "ask_limit": "DHCP, router solicitations or packets to the relay faster than a machine takes them from one port",
    "unanswerable": "DHCP or a router solicitation that needs no answer, or deserves none: see docs/workloads.md",
    "asked_elsewhere": "DHCP or a router solicitation from the wire: only the sender's own machine answers",
    "rate": "more than the rate of a port or link of the network allows",
    "carrier_rate": "more than the rate of a port or link of a carrier allows",
    "cannot_flatten": "more than 8 rate limits on the way",
    "other_vlan": "at a NIC in a VLAN: a frame from the wire without its tag, or with a second one behind it",
    "unknown_vlan": "a tag that the trunk does not have: another VLAN id, VLAN 0 (priority), or 802.1ad",
    "too_many_tags": "more than one tag on a trunk or on a physical VLAN, or more than two in a transparent segment",
    "no_trunk": "the machine has no interface to the physical network that the segment is on",
}

# What whoever does not see the carriers is told of a drop in one (rule 26): one reason, `carrier`.
CARRIERS = {name for name in REASONS if name.startswith("carrier_")}
CARRIERS |= {"no_underlay_route", "cannot_flatten", "no_trunk"}

NUMBERS: dict[str, int] = {name: number for number, name in enumerate(REASONS, start=1)}
NAMES: dict[int, str] = {number: name for name, number in NUMBERS.items()}
