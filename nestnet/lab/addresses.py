"""Which machine of a lab gets which address on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network

from nestnet.lab.state import Seat
from nestnet.model.errors import Exhausted
from nestnet.model.manifest import MachineSpec

# Ranges for documentation (RFC 5737) and benchmarks (RFC 2544): no real network is shadowed by a lab.
SMALL, LARGE = IPv4Network("192.0.2.0/24"), IPv4Network("198.18.0.0/15")
MTU = 1500


def seats(machines: Mapping[str, MachineSpec]) -> list[Seat]:
    """A seat for each machine, in the order of the file: its own address, or the next free one."""
    pool = SMALL if len(machines) <= SMALL.num_addresses - 2 else LARGE
    if len(machines) > pool.num_addresses - 2:
        limit = pool.num_addresses - 2
        raise Exhausted(
            f"{len(machines)} machines are too many for one lab: at most {limit}", "too_many_machines", limit
        )
    taken = {spec.address for spec in machines.values()}
    free = (address for address in pool.hosts() if address not in taken)
    return [
        Seat(name, f"{spec.address or next(free)}/{pool.prefixlen}", spec.mtu or MTU) for name, spec in machines.items()
    ]
