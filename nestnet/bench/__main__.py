"""`nestnet bench`, and `make bench`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nestnet.bench import report
from nestnet.bench.method import KINDS, Run, compare
from nestnet.bench.rows import QUICK, ROWS, Row


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nestnet bench", description="Compares nestnet with its limit and its peers.")
    parser.add_argument("rows", nargs="*", metavar="NAME", help=f"of {', '.join(ROWS)}; without any: all")
    parser.add_argument("--rounds", type=int, help="windows of each path (of each row its own number, about 60)")
    parser.add_argument("--window", type=float, help="seconds of a window (0.2)")
    parser.add_argument("--quick", action="store_true", help="three rows, a few rounds of short windows")
    parser.add_argument("--folder", type=Path, help="where raw samples, pictures and the page go (nowhere)")
    return parser.parse_args(words)


def measure(row: Row, rounds: int, window: float) -> Run:
    with row.beds() as beds:
        return compare(beds, [KINDS[name] for name in row.kinds], row.again, rounds, window)


def main(words: Sequence[str] | None = None) -> int:
    """Run rows. 0: all stand; 1: one of them is void, or has missed what it must reach; 2: there is no such row."""
    options = arguments(words)
    names = options.rows or (QUICK if options.quick else tuple(ROWS))
    if unknown := [name for name in names if name not in ROWS]:
        print(f"nestnet bench: there is no row {unknown[0]}: one of {', '.join(ROWS)}", file=sys.stderr)
        return 2
    window = options.window or (0.1 if options.quick else 0.2)
    code = 0
    for name in names:
        row, begin = ROWS[name], time.monotonic()
        rounds = options.rounds or (3 if options.quick else row.rounds)
        print(f"{row.title}: {rounds} rounds of {window} s", file=sys.stderr)
        try:
            run = measure(row, rounds, window)
        except RuntimeError as error:  # of its beds
            print(f"{row.name}: cannot be measured here: {error}", file=sys.stderr)
            code = 1
            continue
        print("\n".join([f"## {row.title}", "", *report.text(row, run), ""]), flush=True)
        print(f"{row.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
        if options.folder:
            report.save(row, run, rounds, window, options.folder)
        if not options.quick:
            missed = any("missed" in report.verdict(run, wanted)[1] for wanted in row.wanted)
            code = 1 if run.void or missed else code
    if options.folder:
        report.write(options.folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
