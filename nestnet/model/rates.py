"""Rate limits: a bucket is one number, the moment from which it will not be empty any more.

    spend(until, cost(bytes, rate), fill(rate), now) -> until

             until            now
    ---------|---------------|--------->  time, ns
             |<- in it ----->|            at most `burst`
                 cost -->|                a packet moves `until` on by what it costs

A packet passes while there is anything in the bucket, and may take more than there is: so the largest packet passes
whole, by whatever rate, and what it took too much is waited for. In the long run exactly the rate passes. This is the
virtual scheduling of the generic cell rate algorithm (ITU-T I.371, annex A), in integers: the same in every telling,
`spend` in bpf/rates.h among them.
"""

from __future__ import annotations

from nestnet.model.clock import SECOND

# What a port may ask its machine (DHCP, router solicitations): 20 at once, then two in a second. Mirrors bpf/inquiry.h.
INQUIRY_COST, INQUIRY_BURST = SECOND // 2, 10 * SECOND
# From the same bucket: what it sends to the relay, 10,000 packets in a second. Mirrors bpf/inquiry.h.
RELAY_COST = SECOND // 10_000
RATE = (8_000, 100_000_000_000)  # the range, in bit/s: a byte a millisecond, and what whole nanoseconds still tell
PATH_BUCKETS = 8  # on the way of one packet (rule 8). Mirrors PATH_BUCKETS in bpf/state.h.

# TCP waits 200 ms when it has lost all that was on its way: what came into the bucket meanwhile must find room in it.
_BURST = SECOND // 4
_LEAST = 10 * 1514  # bytes: the first window of a TCP connection (RFC 6928)


def rate_text(rate: int) -> str:
    """10mbit: in the largest unit of which it is a whole number."""
    for unit, size in (("gbit", 10**9), ("mbit", 10**6), ("kbit", 10**3)):
        if rate % size == 0:
            return f"{rate // size}{unit}"
    return f"{rate}bit"


def cost(size: int, rate: int) -> int:
    """How long so many bytes take at a rate in bit/s: whole nanoseconds, rounded up."""
    return -(-size * 8 * SECOND // rate)


def fill(rate: int) -> int:
    """How long a bucket of this rate takes to fill, in nanoseconds: 250 ms, or what ten full packets take if that is
    longer."""
    return max(_BURST, cost(_LEAST, rate))


def spend(until: int, cost: int, burst: int, now: int) -> int | None:
    """The bucket after a packet of this `cost`; None if it is empty, and the packet does not pass. All in nanoseconds:
    `burst` is how long it takes to fill. A bucket that was never used is 0: full, once the clock is past `burst`."""
    if until > now:
        return None
    return max(until, now - burst) + cost
