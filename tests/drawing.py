"""docs/abilene.svg: a map of a network with links, and on it the ways that traceroute showed in a real run.

    svg(title, places, links, runs)    links as (city, city, cost); a run is what was said before or after a change

Pure: text in, text out. test_topology.py makes the runs, and compares; scripts/draw writes the picture anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, MAP, LINE = 960, 430, 17  # pixels: of all, the height of the map, of a line of text
MARGIN = 60
INK, PALE = "#24292f", "#8c959f"


@dataclass(frozen=True)
class Run:
    """One traceroute: `commands` as they were typed, it last; `hops` as (address, city) in its order, the port itself
    last; `ttl` is what of 64 a packet had when it arrived. `down`: the link that was down, by its ends."""

    commands: tuple[str, ...]
    hops: tuple[tuple[str, str], ...]
    ttl: int
    colour: str
    down: frozenset[str] = frozenset()

    @property
    def cities(self) -> list[str]:
        """The routers on the way."""
        return [city for _, city in self.hops[:-1]]


def svg(
    title: str,
    places: Mapping[str, tuple[float, float]],
    links: Sequence[tuple[str, str, int]],
    runs: Sequence[Run],
) -> str:
    """`places`: longitude and latitude by city."""
    at = _projected(places)
    costs = {frozenset((a, b)): cost for a, b, cost in links}
    down = {run.down for run in runs}
    parts = []
    for a, b, cost in links:
        dashed = ' stroke-dasharray="6 5"' if frozenset((a, b)) in down else ""
        parts.append(_line(at[a], at[b], PALE, 1.5, dashed))
        x, y = (at[a][0] + at[b][0]) / 2, (at[a][1] + at[b][1]) / 2
        parts.append(_text(x, y - 5, f"{cost}, down" if dashed else str(cost), PALE, 11, "middle"))
    for number, run in enumerate(runs):
        for a, b in zip(run.cities, run.cities[1:], strict=False):
            parts.append(_line(at[a], at[b], run.colour, 4, "", 3 * (2 * number - len(runs) + 1)))
    for city, (x, y) in at.items():
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="#ffffff" stroke="{INK}" stroke-width="2"/>')
        parts.append(_text(x, y + 20, city, INK, 12, "middle"))
    bottom = MAP
    for number, run in enumerate(runs):
        left = MARGIN / 2 + number * WIDTH / len(runs)
        y = MAP + LINE
        lines = [f"$ {command}" for command in run.commands]
        lines += [f"{hop:2}  {address:10}  {city}" for hop, (address, city) in enumerate(run.hops, 1)]
        cost = sum(costs[frozenset(pair)] for pair in zip(run.cities, run.cities[1:], strict=False))
        lines.append(f"cost {cost}; a packet of TTL 64 arrives with {run.ttl}")
        for line in lines:
            parts.append(_text(left, y, line, run.colour, 13, "start", " font-family='monospace' xml:space='preserve'"))
            y += LINE
        bottom = max(bottom, y)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" font-family="sans-serif">'
    return "\n".join(
        [
            head,
            f"<title>{escape(title)}</title>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _projected(places: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Pixels: the map is as wide and as high as there is room."""
    xs, ys = [x for x, _ in places.values()], [y for _, y in places.values()]
    wide = (WIDTH - 2 * MARGIN) / (max(xs) - min(xs))
    high = (MAP - 1.4 * MARGIN) / (max(ys) - min(ys))
    return {city: (MARGIN + (x - min(xs)) * wide, MARGIN / 2 + (max(ys) - y) * high) for city, (x, y) in places.items()}


def _line(
    a: tuple[float, float], b: tuple[float, float], colour: str, width: float, more: str = "", aside: float = 0
) -> str:
    """From a to b, or so many pixels aside of that, on the same side whichever way it leads."""
    (x1, y1), (x2, y2) = sorted((a, b))
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    dx, dy = -(y2 - y1) / length * aside, (x2 - x1) / length * aside
    where = f'x1="{x1 + dx:.1f}" y1="{y1 + dy:.1f}" x2="{x2 + dx:.1f}" y2="{y2 + dy:.1f}"'
    return f'<line {where} stroke="{colour}" stroke-width="{width}"{more}/>'


def _text(x: float, y: float, text: str, colour: str, size: int, anchor: str, more: str = "") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {where}{more}>{escape(text)}</text>"
