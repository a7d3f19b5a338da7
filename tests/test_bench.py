"""The bench measures what it says: its arithmetic, its gates, and a very short run of the two beds that need no lab."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import beds, throughput
from bench.throughput import Interval, Sample
from bench.traffic import Listener, Route, receiver
from nestnet.agent import netns

ROOT = Path(__file__).resolve().parent.parent


def samples(*rates: float) -> list[Sample]:
    return [Sample(rate, 1.0) for rate in rates]


def test_a_ratio_is_of_rounds_not_of_medians() -> None:
    """The computer was three times as slow in one round: both paths were, so the ratio does not move."""
    found = throughput.ratio(samples(20, 60, 22), samples(10, 30, 11))
    assert found == Interval(2.0, 2.0, 2.0)


def test_an_interval_holds_its_median_and_is_repeatable() -> None:
    above, below = samples(*range(100, 140)), samples(*[100] * 40)
    found = throughput.ratio(above, below)
    assert 1.0 <= found.low < found.median < found.high <= 1.39
    assert found == throughput.ratio(above, below)


def test_what_makes_a_run_void() -> None:
    fine = Interval(1.0, 0.99, 1.01)
    assert throughput.gates({}, {"peer": 0}, True, 0.0, [fine]) == []
    assert len(throughput.gates({}, {"peer": 1}, False, 0.03, [fine, Interval(0.94, 0.9, 1.0)])) == 4


@pytest.mark.root
def test_a_listener_hears_what_is_sent_to_it_and_a_foreign_one_does_not() -> None:
    with beds.peer() as bed:
        assert bed.foreign is not None
        route, near, foreign = Route(bed), Listener(bed.server.namespace), Listener(bed.foreign)
        with receiver([route]):
            assert route.check()
            assert route.streamed(0.02) > 0
            assert route.exchanged(0.02) > 0
        assert near.packets() > 0
        assert foreign.packets() == 0
        for end in (route, near, foreign):
            end.close()
    assert netns.names(beds.PREFIX) == []


@pytest.mark.root
def test_a_short_run(tmp_path: Path) -> None:
    """Whether so short a run stands is chance; that it is right is not."""
    command = ("-m", "bench.throughput", "--paths", "bare,peer", "--rounds", "3", "--window", "0.02", "--output")
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (0, 1), done.stderr
    assert "TCP stream, 1 connection" in done.stdout
    [file] = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert result["heard_elsewhere"] == {"peer": 0}
    assert not [reason for reason in result["void"] if "payload" in reason]
    assert len(result["samples"]["stream"]["peer again"]["rate"]) == 3
    assert set(result["ratios"]["request"]) == {"bare / peer", "peer again / peer", "peer / bare", "peer again / bare"}
