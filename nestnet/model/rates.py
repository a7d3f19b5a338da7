"""Rate limits: a bucket is one number, the moment from which it will not be empty any more.

    spend(until, cost, burst, now) -> until

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


def spend(until: int, cost: int, burst: int, now: int) -> int | None:
    """The bucket after a packet of this `cost`; None if it is empty, and the packet does not pass. All in nanoseconds:
    `burst` is how long it takes to fill. A bucket that was never used is 0: full, once the clock is past `burst`."""
    if until > now:
        return None
    return max(until, now - burst) + cost
