"""What was measured, as files: raw samples, and docs/performance.md with its pictures, made of the samples alone."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from nestnet.bench.method import KINDS, Interval, Run, Sample, ratio
from nestnet.bench.rows import ROWS, Row, Wanted

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "performance"


def computer() -> str:
    """The machine in a few words: its processor, how many of them, memory, kernel."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} x {model}, {memory:.0f} GiB, Linux {platform.release()}"


def save(row: Row, run: Run, rounds: int, seconds: float, folder: Path) -> Path:
    """The raw samples, in the order of rounds: bytes, datagrams, connections or transactions per second; busy CPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{row.name}.json"
    said: dict[str, Any] = {
        "row": row.name,
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "computer": computer(),
        "rounds": rounds,
        "window": seconds,
        "void": run.void,
        "steal": round(run.steal, 5),
        "heard_elsewhere": run.heard,
        "retransmitted": run.retransmitted,
        "again": run.again,
        "samples": {
            kind: {
                path: {"rate": [round(s.rate) for s in windows], "busy": [round(s.busy, 2) for s in windows]}
                for path, windows in by_path.items()
            }
            for kind, by_path in run.samples.items()
        },
    }
    file.write_text(json.dumps(said, separators=(",", ":")) + "\n")
    return file


def load(file: Path) -> tuple[dict[str, Any], Run]:
    """What `save` wrote, and the run again."""
    said = json.loads(file.read_text())
    samples = {
        kind: {
            path: [Sample(*pair) for pair in zip(told["rate"], told["busy"], strict=True)]
            for path, told in by_path.items()
        }
        for kind, by_path in said["samples"].items()
    }
    heard, again = said["heard_elsewhere"], said["retransmitted"]
    return said, Run(samples, said["again"], said["void"], said["steal"], heard, again)


def verdict(run: Run, wanted: Wanted) -> tuple[Interval, str]:
    """What was reached, and in a word whether that is enough."""
    found = run.ratio(wanted.kind, wanted.path, wanted.below)
    if wanted.aim is not None and found.median >= wanted.aim:
        return found, "aim"
    if wanted.least is None:
        return found, ""
    if found.median >= wanted.least or (wanted.even and found.low <= 1 <= found.high):
        return found, "yes"
    return found, "**missed**"


def judged(row: Row, run: Run) -> list[str]:
    """The table of what a row must reach."""
    lines = ["| | | must | aim | is | |", "|---|---|---|---|---|---|"]
    for wanted in row.wanted:
        if wanted.kind not in run.samples:
            continue
        found, word = verdict(run, wanted)
        aim = f"{wanted.aim:.3g}" if wanted.aim is not None else ""
        least = f"{wanted.least:.3g}{' or even' if wanted.even else ''}" if wanted.least is not None else ""
        cells = (KINDS[wanted.kind].title, f"{wanted.path} / {wanted.below}", least, aim, str(found), word)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measured(row: Row, run: Run) -> list[str]:
    """A table for each kind of traffic."""
    lines = []
    for name, by_path in run.samples.items():
        kind = KINDS[name]
        lines += ["", f"{kind.title}, on {'all CPUs' if kind.cpus == 'all' else 'one CPU'}:", ""]
        lines += [f"| | {kind.unit} | to {row.reference} |", "|---|---|---|"]
        for path, label in row.paths.items():
            middle = statistics.median(sample.rate for sample in by_path[path]) * kind.scale
            lines.append(f"| {label} | {middle:,.{kind.decimals}f} | {run.ratio(name, path, row.reference)} |")
        same = ratio(by_path[f"{run.again} again"], by_path[run.again])
        lines.append(f"| A/A: {run.again} to itself | | {same} |")
    return lines


def text(row: Row, run: Run) -> list[str]:
    """All that there is to say of a run."""
    lines = [*judged(row, run), *measured(row, run), ""]
    heard = f"packets heard in other networks: {sum(run.heard.values())}; " if run.heard else ""
    lines.append(f"Payloads checked; {heard}CPU time taken by the hypervisor: {run.steal:.1%}.")
    return [*lines, *(f"VOID: {reason}." for reason in run.void)]


# ---- pictures

WIDTH, LEFT, RIGHT, LINE = 860, 330, 70, 24
INK, GOOD, BAD, RULE = "#24292f", "#1a7f37", "#cf222e", "#d0d7de"


def picture(row: Row, run: Run) -> str:
    """Ratios with their intervals; a tick where they must be, a ring where they shall be. Drawn as SVG."""
    found = [(wanted, *verdict(run, wanted)) for wanted in row.wanted if wanted.kind in run.samples]
    most = max(max(1, wanted.aim or 0, wanted.least or 0, interval.high) for wanted, interval, _ in found)
    scale = (WIDTH - LEFT - RIGHT) / (most * 1.05)

    def x(value: float) -> float:
        return round(LEFT + value * scale, 1)

    height = LINE * (len(found) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        "<style>text { font: 12px sans-serif }</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<path d="M{x(1)} {LINE / 2} V{height - LINE}" stroke="{RULE}" stroke-width="2"/>',
        f'<text x="{x(1)}" y="{height - 8}" text-anchor="middle" fill="{INK}">1</text>',
    ]
    for number, (wanted, interval, word) in enumerate(found, 1):
        y, colour = LINE * number, BAD if "missed" in word else GOOD
        label = f"{KINDS[wanted.kind].title}: {wanted.path} / {wanted.below}"
        parts += [
            f'<text x="8" y="{y + 4}" fill="{INK}">{escape(label)}</text>',
            f'<path d="M{x(interval.low)} {y} H{x(interval.high)}" stroke="{colour}" stroke-width="3"/>',
            f'<circle cx="{x(interval.median)}" cy="{y}" r="4" fill="{colour}"/>',
            f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4}" fill="{colour}">{interval.median:.3f}</text>',
        ]
        if wanted.least is not None:
            parts.append(f'<path d="M{x(wanted.least)} {y - 8} v16" stroke="{INK}" stroke-width="2"/>')
        if wanted.aim is not None:
            parts.append(f'<circle cx="{x(wanted.aim)}" cy="{y}" r="5" fill="none" stroke="{INK}"/>')
    return "\n".join([*parts, "</svg>", ""])


# ---- the page

HEAD = """\
# Performance

Made by `make bench` from [what was measured](performance), which has every window. Method and beds:
[nestnet/bench](../nestnet/bench/README.md). In short: all paths of a row are open at once and take turns of 0.2 s, in
reversed order every other round; a figure is the median of the ratios within a round, with its bootstrap 95 % interval.
A/A is a path against a second set of connections on itself: nobody is to believe less than that. A run is void if a
payload was wrong, a packet was heard in another network, A/A left 0.95-1.05, or a hypervisor took more than 2 % of the
CPU time.
Ratios inside one run may carry over to other computers, rates do not.

In the pictures a bar is an interval and its dot the median; the line across is what must be reached, the ring what is
aimed at.
"""


def page(folder: Path, rows: Sequence[Row]) -> str:
    """docs/performance.md, from what is in the folder. Pictures are written beside."""
    lines = [HEAD]
    for row in rows:
        file = folder / f"{row.name}.json"
        if not file.exists():
            continue
        said, run = load(file)
        (folder / f"{row.name}.svg").write_text(picture(row, run))
        missed = any("missed" in verdict(run, wanted)[1] for wanted in row.wanted if wanted.kind in run.samples)
        lines += [f"## {row.title}", "", f"`nestnet bench {row.name}`", ""]
        lines += [f"![{row.title}]({folder.name}/{row.name}.svg)", "", *text(row, run), ""]
        if missed and row.missed:
            lines += [row.missed, ""]
        taken = f"{said['rounds']} rounds of {said['window']} s on {said['computer']}, {said['taken'][:10]}"
        lines += [f"{taken}: [all windows]({folder.name}/{row.name}.json).", ""]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """The page beside the folder, with the same name."""
    folder.with_suffix(".md").write_text(page(folder, list(ROWS.values())))
