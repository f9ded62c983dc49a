"""Charts as SVG files that stand alone: white ground, plain text, places rounded to a tenth of a pixel."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lct_fast.report.svg import apart

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 200, 60, 68
# Told apart by people who see colours differently, too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#555555")
_LABEL_GAP = 15.0


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows, its ends, where its ticks stand and what they say."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float) -> float:
        """Where ``value`` lies, 0..1."""
        f: Callable[[float], float] = math.log10 if self.log else float
        return (f(value) - f(self.low)) / (f(self.high) - f(self.low))


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined if ``line``; ``label`` stands at its end, ``names`` aslant below its points."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    line: bool = True
    dashed: bool = False
    hollow: bool = False
    names: Sequence[str] = ()


def ticks(low: float, high: float, form: str = "g", most: int = 6) -> list[tuple[float, str]]:
    """Round numbers between two ends."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [(i * step, format(i * step, form)) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], note: str = "") -> str:
    """Series over two axes; labels at the right, apart from each other."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + x.place(point[0]) * (right - LEFT), bottom - y.place(point[1]) * (bottom - TOP)

    parts = _frame(title, WIDTH, HEIGHT)
    for value, text in y.ticks:
        height = at((x.low, value))[1]
        parts.append(f'<path d="M{LEFT} {height:.1f}H{right}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, height + 4, text, anchor="end"))
    for value, text in x.ticks:
        across = at((value, y.low))[0]
        parts.append(f'<path d="M{across:.1f} {bottom}v5" stroke="#333"/>')
        parts.append(_text(across, bottom + 19, text, anchor="middle"))
    parts.append(f'<path d="M{LEFT} {bottom}H{right}" stroke="#333"/>')
    parts.append(_text((LEFT + right) / 2, bottom + 40, x.label, anchor="middle"))
    parts.append(_text(12, TOP - 16, y.label))
    ends = []
    for one in series:
        placed = [at(point) for point in one.points]
        if one.line:
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py in placed)
            dash = ' stroke-dasharray="6 4"' if one.dashed else ""
            parts.append(f'<path d="M{path}" fill="none" stroke="{one.colour}" stroke-width="2"{dash}/>')
        fill = "#fff" if one.hollow else one.colour
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{fill}" stroke="{one.colour}" stroke-width="2"/>'
            for px, py in placed
        ]
        parts += [
            f'<g transform="translate({px:.1f} {py:.1f}) rotate(35)">{_text(9, 6, name, one.colour, size=11)}</g>'
            for (px, py), name in zip(placed, one.names, strict=False)
            if name
        ]
        ends.append((placed[-1][1] if one.line else TOP + 6, one))
    for height, (_, one) in zip(
        apart([end for end, _ in ends], HEIGHT - BOTTOM, _LABEL_GAP), ends, strict=True
    ):
        if not one.line:
            fill = "#fff" if one.hollow else one.colour
            parts.append(
                f'<circle cx="{right + 16}" cy="{height:.1f}" r="4" fill="{fill}" stroke="{one.colour}" '
                'stroke-width="2"/>'
            )
        parts.append(_text(right + (26 if not one.line else 10), height + 4, one.label, one.colour))
    if note:
        parts.append(_text(12, HEIGHT - 8, note, "#555", size=11))
    return "\n".join([*parts, "</svg>", ""])


def bars(title: str, rows: Sequence[tuple[str, float, str, str]], note: str = "") -> str:
    """A row a bar: name, length, what is said behind it, colour."""
    left, height, bar, top = 420, 24, 250, 40
    total = top + height * len(rows) + 26
    longest = max(length for _, length, _, _ in rows)
    parts = _frame(title, WIDTH, total)
    for i, (name, length, said, colour) in enumerate(rows):
        y = top + height * i
        wide = bar * length / longest
        parts.append(_text(left - 8, y + 13, name, anchor="end", size=12))
        parts.append(f'<rect x="{left}" y="{y}" width="{wide:.1f}" height="17" fill="{colour}"/>')
        parts.append(_text(left + wide + 6, y + 13, said, size=12))
    if note:
        parts.append(_text(12, total - 8, note, "#555", size=11))
    return "\n".join([*parts, "</svg>", ""])


def _frame(title: str, width: int, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="13" role="img" aria-label="{html.escape(title)}">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="20" font-weight="bold" fill="#111">{html.escape(title)}</text>',
    ]


def _text(x: float, y: float, text: str, colour: str = "#222", anchor: str = "start", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}">'
        f"{html.escape(text)}</text>"
    )
