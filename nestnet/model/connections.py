"""How long a connection is remembered, in seconds after its last packet. Counted in whole seconds of the
clock (`clock.seconds`). Mirrored in bpf/state.h."""

from __future__ import annotations

TCP_SECONDS = 7200
TCP_CLOSING_SECONDS = 10  # after a FIN or RST, either way
OTHER_SECONDS = 180
FRAGMENT_SECONDS = 30  # how long the first fragment of a packet is


def lifetime(protocol: int, closing: bool) -> int:
    """Seconds after its last packet that a connection of this IP protocol lives."""
    if protocol != 6:
        return OTHER_SECONDS
    return TCP_CLOSING_SECONDS if closing else TCP_SECONDS
