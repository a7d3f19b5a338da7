"""Buckets: what passes them in the long run and at once, and that C counts as the model does."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestnet.datapath import build
from nestnet.datapath.kernel import BPFFS, Kernel
from nestnet.model.clock import SECOND
from nestnet.model.rates import spend

BURST = SECOND // 10


def test_a_bucket_that_is_not_empty_pays_for_any_packet() -> None:
    until = spend(0, 5 * SECOND, BURST, now=SECOND)
    assert until == SECOND - BURST + 5 * SECOND
    assert spend(until, 1, BURST, now=until - 1) is None
    assert spend(until, 1, BURST, now=until) == until + 1


@given(st.lists(st.tuples(st.integers(0, 3 * BURST), st.integers(1, 2 * BURST)), min_size=1, max_size=50))
def test_in_the_long_run_the_rate_passes(packets: list[tuple[int, int]]) -> None:
    """What passes takes as long as there was time, but for a burst before and one packet behind."""
    until, now, passed, last = 0, SECOND, 0, 0
    for pause, cost in packets:
        now += pause
        after = spend(until, cost, BURST, now)
        if after is not None:
            until, passed, last = after, passed + cost, cost
        assert passed <= now - SECOND + BURST + last


@given(cost=st.integers(1, BURST), load=st.floats(1.1, 10))
def test_who_always_sends_gets_all_of_it(cost: int, load: float) -> None:
    until, now, passed = SECOND, SECOND, 0
    step = max(1, int(cost / load))
    for _ in range(200):
        now += step
        after = spend(until, cost, BURST, now)
        if after is not None:
            until, passed = after, passed + cost
    assert passed > now - SECOND - step


SPENDS = """
#include "rates.h"
SEC("tcx/ingress") int workload(struct __sk_buff *skb)
{
    u64 given[4];
    u32 slot = 1;
    u64 *until = bpf_map_lookup_elem(&opened, &slot);

    if (!until || bpf_skb_load_bytes(skb, 14, given, sizeof(given)))
        return 9;
    *until = given[0];
    return spend(until, given[1], given[2], given[3]);
}
SEC("tcx/ingress") int underlay(struct __sk_buff *skb) { return now_ns() > 0; }
char _license[] SEC("license") = "GPL";
"""


@pytest.mark.root
def test_c_spends_the_same(tmp_path: Path) -> None:
    sources = tmp_path / "bpf"
    sources.mkdir()
    for header in build.SOURCES.glob("*.h"):
        shutil.copy(header, sources)
    (sources / build.MAIN).write_text(SPENDS)
    pins = BPFFS / f"nntest-rates-{os.getpid()}"
    kernel = Kernel.open(pins, driven=True, object=build.object_path(sources))
    numbers = st.integers(0, 10 * BURST)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(numbers, numbers, numbers, numbers, st.sampled_from([0, BURST, 1 << 61]))
    def law(until: int, cost: int, burst: int, now: int, later: int) -> None:
        until, now = until + later, now + later
        frame = bytes(14) + struct.pack("<4Q", until, cost, burst, now)
        passed = kernel.run(frame, 1, "workload").answer
        left = int(kernel.rows("opened")["value"][1])
        assert (left if passed else None) == spend(until, cost, burst, now)
        assert passed or left == until

    try:
        law()
        for now in (0, 1, SECOND, 1 << 62):
            kernel.set_clock(now)
            assert kernel.clock() == now
            assert kernel.run(bytes(60), 1, "underlay").answer == (now > 0)
    finally:
        kernel.unpin()
        pins.rmdir()
