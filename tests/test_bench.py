"""The bench measures what it says: its arithmetic, its gates, and a very short run of the two beds that need no lab."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nestnet.agent import netns
from nestnet.bench import beds, method, report, rows
from nestnet.bench.method import Interval, Sample
from nestnet.bench.traffic import Listener, Route, receiver

ROOT = Path(__file__).resolve().parent.parent


def samples(*rates: float) -> list[Sample]:
    return [Sample(rate, 1.0) for rate in rates]


def test_a_ratio_is_of_rounds_not_of_medians() -> None:
    """The computer was three times as slow in one round: both paths were, so the ratio does not move."""
    found = method.ratio(samples(20, 60, 22), samples(10, 30, 11))
    assert found == Interval(2.0, 2.0, 2.0)


def test_an_interval_holds_its_median_and_is_repeatable() -> None:
    above, below = samples(*range(100, 140)), samples(*[100] * 40)
    found = method.ratio(above, below)
    assert 1.0 <= found.low < found.median < found.high <= 1.39
    assert found == method.ratio(above, below)


def test_what_makes_a_run_void() -> None:
    fine = Interval(1.0, 0.99, 1.01)
    assert method.gates({}, {"peer": 0}, True, 0.0, [fine]) == []
    assert len(method.gates({}, {"peer": 1}, False, 0.03, [fine, Interval(0.94, 0.9, 1.0)])) == 4


@pytest.mark.root
def test_a_listener_hears_what_is_sent_to_it_and_a_foreign_one_does_not() -> None:
    with beds.peer() as bed:
        assert bed.foreign is not None
        route, near, foreign = Route(bed), Listener(bed.server.namespace), Listener(bed.foreign)
        with receiver([route]):
            assert route.check()
            assert route.streamed(0.02) > 0
            assert route.streamed_by_all(0.02) > 0
            for window in (route.exchanged, route.hurried, route.small, route.connected):
                assert window(0.02) > 0
        assert near.packets() > 0
        assert foreign.packets() == 0
        for end in (route, near, foreign):
            end.close()
    assert netns.names(beds.PREFIX) == []


@pytest.mark.root
def test_a_short_run(tmp_path: Path) -> None:
    """Whether so short a run stands, and reaches what it must, is chance; that it is right is not."""
    command = ("bench", "machine", "--rounds", "3", "--folder", str(tmp_path / "found"))
    done = subprocess.run(
        [sys.executable, "-m", "nestnet", *command], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1), done.stderr
    assert "## On one machine" in done.stdout
    said, run = report.load(tmp_path / "found" / "machine.json")
    assert run.heard == {"nestnet": 0}
    assert not [reason for reason in run.void if "payload" in reason]
    assert {len(windows) for by_path in run.samples.values() for windows in by_path.values()} == {3}
    assert set(run.samples["request"]) == {"limit", "peer", "nestnet", "nestnet again"}
    page = (tmp_path / "found.md").read_text()
    assert f"on {said['computer']}" in page
    assert "](found/machine.svg)" in page
    ElementTree.parse(tmp_path / "found" / "machine.svg")


def test_the_page_is_of_what_was_measured(tmp_path: Path) -> None:
    """docs/performance.md and its pictures are what their raw samples say, with today's rows."""
    for file in report.RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path)
    report.write(tmp_path / ".." / tmp_path.name)
    for name in rows.ROWS:
        assert (tmp_path / f"{name}.svg").read_text() == (report.RESULTS / f"{name}.svg").read_text()
    made = tmp_path.with_suffix(".md").read_text().replace(f"({tmp_path.name}/", "(performance/")
    assert made == report.RESULTS.with_suffix(".md").read_text()
    assert all(f"`nestnet bench {name}`" in made for name in rows.ROWS)


def test_what_is_missed_says_so() -> None:
    found = method.Run(
        {"request": {"a": samples(9, 9), "b": samples(10, 10), "a again": samples(9, 9)}}, "a", [], 0, {}, {}
    )
    for wanted, word in (
        (rows.Wanted("request", "a", "b", 0.8, 0.9), "aim"),
        (rows.Wanted("request", "a", "b", 0.8, 1.0), "yes"),
        (rows.Wanted("request", "a", "b", 0.95), "**missed**"),
        (rows.Wanted("request", "a", "a again", 2, even=True), "yes"),
    ):
        assert report.verdict(found, wanted)[1] == word
