"""Line charts as inline SVG; colours are CSS classes and variables of the page around them."""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lct_fast.report.run import Curve

# In pixels of a chart as wide as a phone, on which text of 14 has to be readable.
WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 72, 10, 44
# Beyond this many lines their names at the right edge no longer fit one above the other.
MOST_LABELS = 12


@dataclass(frozen=True)
class Line:
    """One line of a chart: the ``label`` at its end, its CSS ``style`` (``--h`` is the hue), its points."""

    label: str
    style: str
    points: Curve


@dataclass(frozen=True)
class Axis:
    """One axis: its ``label``, range and ticks; ``percent`` shows fractions as percentages."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    percent: bool = False

    def place(self, value: float) -> float:
        """Where ``value`` lies, 0..1."""
        return (value - self.low) / (self.high - self.low)

    def text(self, tick: float) -> str:
        """A tick as text."""
        return f"{tick * 100 if self.percent else tick:,.6g}"


def escape(text: object) -> str:
    """Text for HTML content and attributes; control characters, for which HTML has no form, are replaced."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", str(text)), quote=True)


def axis(
    label: str, values: Sequence[float], *, tight: bool = False, least: float = 0.0, percent: bool = False
) -> Axis:
    """An axis over ``values`` with about five ticks at round numbers, at least ``least`` apart.

    It ends at ticks, or at the data's own ends where it is ``tight``.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        room = max(least, 0.01, 0.05 * abs(low))
        # There is nothing above 100 %.
        low, high = low - room, min(high + room, max(high, 1.0)) if percent else high + room
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(least, next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999))
    if not tight:
        # 1.9 / 0.05 is a little less than 38.
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(label, low, high, ticks, percent)


def line_chart(title: str, x: Axis, y: Axis, lines: Sequence[Line], most_points: int) -> str:
    """A chart of ``lines``, each thinned to about ``most_points``; a gap is left where a value is missing."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y.ticks:
        at = bottom - y.place(tick) * (bottom - TOP)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4.5:.1f}" text-anchor="end">{y.text(tick)}</text>')
    # Digits are some 8 wide; of labels that would touch some are left out.
    widest = 8 * max((len(x.text(tick)) for tick in x.ticks), default=1) + 8
    every = math.ceil(widest * max(1, len(x.ticks) - 1) / (right - LEFT))
    for i, tick in enumerate(x.ticks):
        at = LEFT + x.place(tick) * (right - LEFT)
        parts.append(f'<path class="grid" d="M{at:.1f} {bottom}v4"/>')
        if i % every:
            continue
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{x.text(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    middle = (LEFT + right) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x.label)}</text>'
    )
    ends: list[tuple[float, Line]] = []
    for line in lines:
        placed = [
            (LEFT + x.place(at) * (right - LEFT), None if v is None else bottom - y.place(v) * (bottom - TOP))
            for at, v in _thin(line.points, most_points)
        ]
        parts.append(f'<path class="line" style="{line.style}" d="{_path(placed)}"/>')
        last = [height for _, height in placed if height is not None]
        if last:
            ends.append((last[-1], line))
    if len(ends) <= MOST_LABELS:
        for at, (_, line) in zip(apart([end for end, _ in ends], HEIGHT - BOTTOM), ends, strict=True):
            place = f'x="{right + 5}" y="{at + 4.5:.1f}"'
            parts.append(f'<text class="end" style="{line.style}" {place}>{escape(line.label)}</text>')
    return "".join([*parts, "</svg>"])


def _thin(points: Curve, most: int) -> Curve:
    every = max(1, math.ceil(len(points) / most))
    return [*points[:-1:every], *points[-1:]]


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    parts: list[str] = []
    alone = False
    pen = "M"
    for x, y in points:
        if y is None:
            # A line of no length is drawn as a dot by its round cap.
            parts.append("h0" if alone else "")
            pen, alone = "M", False
        else:
            alone = pen == "M"
            parts.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
    return "".join([*parts, "h0" if alone else ""])


def apart(heights: Sequence[float], floor: float, gap: float = 15.0) -> list[float]:
    """``heights`` moved so that labels there do not overlap: down in order, then up again from ``floor``."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for above, below in zip(order, order[1:], strict=False):
        moved[below] = max(moved[below], moved[above] + gap)
    for i in reversed(order):
        moved[i] = min(moved[i], floor)
        floor = moved[i] - gap
    return moved
