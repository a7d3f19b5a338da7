"""Which machine of a lab gets which address on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network

from nestnet.lab.state import Seat
from nestnet.model.errors import Exhausted
from nestnet.model.manifest import MachineSpec
from nestnet.model.values import Prefix

# Ranges for documentation (RFC 5737, RFC 3849) and benchmarks (RFC 2544): no real network is shadowed by a lab.
SMALL, LARGE = IPv4Network("192.0.2.0/24"), IPv4Network("198.18.0.0/15")
IPV6 = IPv6Network("2001:db8::/64")
MTU = 1500


def pool(machines: int, family: int) -> Prefix:
    """The range that so many machines get their addresses from."""
    if family == 6:
        return IPV6
    return SMALL if machines <= SMALL.num_addresses - 2 else LARGE


def seats(machines: Mapping[str, MachineSpec], family: int = 4) -> list[Seat]:
    """A seat for each machine, in the order of the file: its own address, or the next free one of this family."""
    range_ = pool(len(machines), family)
    if len(machines) > range_.num_addresses - 2:
        limit = range_.num_addresses - 2
        raise Exhausted(
            f"{len(machines)} machines are too many for one lab: at most {limit}", "too_many_machines", limit
        )
    taken = {spec.address for spec in machines.values()}
    free = (address for address in range_.hosts() if address not in taken)
    return [
        Seat(
            *(name, f"{spec.address or next(free)}/{range_.prefixlen}", spec.mtu or MTU, spec.nic or ("eth0",)),
            vlan=spec.vlan.value if spec.vlan is not None else None,
            trunks=dict(spec.trunks or {}),
        )
        for name, spec in machines.items()
    ]
