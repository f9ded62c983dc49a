"""A plan as a bar chart: an SVG file that stands alone."""

from __future__ import annotations

from lct_fast.planner.plan import Plan
from lct_fast.report.svg import escape

_ROW, _LEFT, _WIDTH, _BAR = 26, 250, 860, 430


def svg(plan: Plan) -> str:
    """A row a schedule: work in full colour, idle time pale, the step's milliseconds beside it."""
    possible = [p for p in plan.predictions if not p.impossible]
    longest = max(p.seconds for p in possible)
    height = _ROW * len(possible) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="22" font-weight="bold">A step on {plan.workers} workers, predicted (simulation)</text>',
    ]
    for i, p in enumerate(possible):
        y = 38 + i * _ROW
        whole = _BAR * p.seconds / longest
        work = whole * (1 - p.bubble)
        name = p.schedule if p.codec == "none" else f"{p.schedule}, {p.codec}"
        weight = ' font-weight="bold"' if p == plan.chosen else ""
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 14}" text-anchor="end"{weight}>{escape(name)}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{whole:.1f}" height="18" fill="#cfd8e3"/>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{work:.1f}" height="18" fill="#2b6cb0"/>')
        parts.append(
            f'<text x="{_LEFT + whole + 8:.1f}" y="{y + 14}"{weight}>{1e3 * p.seconds:.4g} ms, {p.bubble:.0%} idle'
            f"</text>"
        )
    end = 38 + _ROW * len(possible) + 14
    parts.append(f'<text x="12" y="{end}" fill="#555">blue: working, pale: idle</text></svg>')
    return "".join(parts)
