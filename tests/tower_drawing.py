"""docs/turtles.svg: what `nestnet trace` says of two packets, level by level, and the one header that is left of five.

Pure: what was traced in, text out. test_turtles.py makes the runs and compares; scripts/draw writes the picture anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, MARGIN, LINE = 960, 20, 16  # pixels
INK, PALE, GOOD, BAD = "#24292f", "#57606a", "#1a7f37", "#cf222e"
FILLS = ("#ddf4ff", "#fff8c5", "#dafbe1", "#ffeff7", "#fbefff", "#f6f8fa")


@dataclass(frozen=True)
class Level:
    """A network on the way, by path, and what it decided."""

    path: str
    said: Sequence[str]


Run = tuple[str, Sequence[Level], Sequence[tuple[str, int]], str]
"""What was typed, the levels from the top down, headers on the wire with their bytes, the verdict."""


def svg(runs: Sequence[Run]) -> str:
    wide = (WIDTH - MARGIN * (len(runs) + 1)) // len(runs)
    parts, bottom = [], 0
    for number, (typed, levels, headers, verdict) in enumerate(runs):
        left, y = MARGIN + number * (wide + MARGIN), MARGIN + LINE
        parts.append(_text(left, y, f"$ {typed}", INK, " font-family='monospace'"))
        y += LINE
        for depth, level in enumerate(levels):
            high = LINE * (len(level.said) + 1) + 10
            stopped = verdict.startswith("drop") and depth == len(levels) - 1
            edge = BAD if stopped else PALE
            parts.append(
                f'<rect x="{left}" y="{y}" width="{wide}" height="{high}" rx="6" '
                f'fill="{FILLS[depth]}" stroke="{edge}"/>'
            )
            name = level.path.rpartition("/")[2]
            where = name if level.path == "the fabric" else f"{name}, level {level.path.count('/') + 1}"
            parts.append(_text(left + 10, y + LINE, where, INK, " font-weight='bold'"))
            for line, said in enumerate(level.said, 1):
                parts.append(_text(left + 10, y + LINE * (line + 1), _short(said), PALE))
            y += high + 6
        if headers:
            y = _wire(parts, headers, left, y, wide)
        parts.append(_text(left, y + LINE, verdict, BAD if verdict.startswith("drop") else GOOD, " font-weight='bold'"))
        bottom = max(bottom, y + 2 * LINE)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" font-family="sans-serif">'
    title = "<title>Two packets through five networks, each carried by the one below</title>"
    return "\n".join([head, title, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>\n"])


def _wire(parts: list[str], headers: Sequence[tuple[str, int]], left: float, y: float, wide: float) -> float:
    """The packet as it crosses the wire, each header as wide as it is long."""
    total, x = sum(size for _, size in headers), float(left)
    parts.append(_text(left, y + LINE, "on the wire: one header, whatever the level", INK))
    for place, (name, size) in enumerate(headers):
        across = wide * size / total
        fill = FILLS[-1] if place < 3 else FILLS[0]
        parts.append(
            f'<rect x="{x:.1f}" y="{y + LINE + 6}" width="{across:.1f}" height="36" fill="{fill}" stroke="{PALE}"/>'
        )
        parts.append(_text(x + 3, y + 2 * LINE + 6, name, INK, size=10))
        parts.append(_text(x + 3, y + 2 * LINE + 20, str(size), PALE, size=10))
        x += across
    return y + LINE + 50


def _short(text: str) -> str:
    """A step, with the last part of each path."""
    words = (word.rpartition("/")[2] if "/" in word and not word.startswith("udp/") else word for word in text.split())
    line = " ".join(words)
    return line if len(line) <= 72 else f"{line[:70]}..."


def _text(x: float, y: float, text: str, colour: str, more: str = "", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}"{more}>{escape(text)}</text>'
