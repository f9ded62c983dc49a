"""A run's steps as rows of boxes, what each group waited for, and the words beside them."""

from collections.abc import Sequence

from lct_fast.report.run import Run
from lct_fast.report.svg import axis, escape
from lct_fast.report.table import cells, figure, table
from lct_fast.report.trace import Excerpt, Idle, Span, excerpt, idle, lanes, read_trace, rows

KINDS = ("forward", "backward", "critic", "optimiser", "coding", "transfer", "other")
# An SVG in a list: what a colour stands for. The pattern of the bubbles is defined in the first and used in all.
HATCH = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<path class="hatch" d="M0 0V6"/></pattern></defs>'
)

WIDTH, RIGHT = 1100, 16
# Letters of a row's name, and the width of one.
LONGEST, LETTER = 18, 7.5
# Heights of a group's row and of a lane below it, and the space between groups.
ROW, LANE, BETWEEN = 24, 18, 8


def legend() -> str:
    """What the colours stand for, as HTML; every page with a timeline needs it once, before them."""
    swatch = '<svg viewBox="0 0 24 12" aria-hidden="true">{}<rect class="{}" width="24" height="12"/></svg>'
    items = [("bubble", swatch.format(HATCH, "bubble"))]
    items = [*((kind, swatch.format("", kind)) for kind in KINDS), *items]
    named = {"critic": "critic, or the last group's head", "bubble": "bubble: nothing to do, or waiting"}
    body = "".join(f"<li>{svg}<span>{named.get(kind, kind)}</span></li>" for kind, svg in items)
    return f'<ul class="legend">{body}</ul>'


def section(run: Run, name: str, limit: int) -> str:
    """The timeline of ``run`` in at most ``limit`` spans, as HTML; empty where it has none.

    Raises ValueError, one line, for a trace that cannot be read.
    """
    path = run.path / "trace.json"
    if not path.is_file():
        return ""
    shown = excerpt(read_trace(path), limit=limit)
    if not shown.spans:
        raise ValueError("The trace holds no spans.")
    groups = [idle(shown.spans, row, shown.seconds) for row, _ in lanes(rows(shown.spans))]
    told = ", ".join(f"{group.row} {figure(group.share, 100, 1)} %" for group in groups[:20])
    chart = chart_of(f"Timeline of {name}; bubble: {told}", shown, groups)
    opening = (
        f'<div class="scroll timeline" role="region" tabindex="0" aria-label="Timeline of {escape(name)}">'
    )
    facts = f'<p class="soft">{_steps(shown)} Bubble: {escape(told)}. {_meaning(run)}</p>'
    return f"{facts}{opening}{chart}</div>{_table(name, groups, shown.seconds)}"


def _steps(shown: Excerpt) -> str:
    if shown.steps is None:
        return "All that was traced."
    first, last = shown.steps
    which = f"Batch {first}" if first == last else f"Batches {first} to {last}"
    others = {span.row for span in shown.spans} - {shown.of}
    return (
        f"{which} of {escape(shown.of)}, and what else was done meanwhile."
        if shown.of and others
        else f"{which}."
    )


def _meaning(run: Run) -> str:
    if str(run.config.get("device", "cpu")).startswith("cuda"):
        return "On a GPU a box is the time in which the host started the work, not the work itself."
    if run.summary.get("processes") == 1 and (run.value("groups") or 1) != 1:
        return "One process ran all groups in turn: here a group's bubble is the turn of the others."
    return ""


def chart_of(title: str, shown: Excerpt, groups: Sequence[Idle]) -> str:
    """A row a group, below it a lane for each thing it does beside; a box a span, hatched where it has a bubble."""
    scale, unit = next(
        ((s, u) for s, u in ((1.0, "s"), (1e3, "ms")) if shown.seconds * s >= 1), (1e6, "\u00b5s")
    )
    time = axis(f"time, {unit}", [0.0, shown.seconds * scale], tight=True)
    named = lanes(rows(shown.spans))
    longest = max(len(lane.removeprefix(f"{row} ")) for row, beside in named for lane in (row, *beside))
    left = round(min(longest, LONGEST) * LETTER + 16)
    factor = (WIDTH - left - RIGHT) * scale / (time.high - time.low)
    places: dict[str, tuple[int, int]] = {}
    labels: list[str] = []
    top = 2
    for row, beside in named:
        for lane in (row, *beside):
            height = ROW if lane == row else LANE
            short, kind = (row, "") if lane == row else (lane.removeprefix(f"{row} "), ' class="name"')
            cut = short if len(short) <= LONGEST else f"{short[: LONGEST - 1]}\u2026"
            y = top + height / 2 + 4.5
            labels.append(f'<text{kind} x="{left - 8}" y="{y:g}" text-anchor="end">{escape(cut)}</text>')
            places[lane] = (top, height)
            top += height
        top += BETWEEN
    parts = [f'<svg viewBox="0 0 {WIDTH} {top + 40}" role="img" aria-label="{escape(title)}">']
    for tick in time.ticks:
        at = left + tick * factor / scale
        parts.append(f'<path class="grid" d="M{at:.1f} 0V{top}"/>')
        parts.append(f'<text x="{at:.1f}" y="{top + 15}" text-anchor="middle">{time.text(tick)}</text>')
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{top + 34}" text-anchor="middle">{time.label}</text>')
    parts += labels
    for group in groups:
        y, height = places[group.row]
        drawn = "".join(
            f"M{left + start * factor:.1f} {y + 2}h{(end - start) * factor:.1f}v{height - 4}"
            f"h{(start - end) * factor:.1f}z"
            for start, end in group.gaps
        )
        parts.append(f'<path class="bubble" d="{drawn}"/>' if drawn else "")
    for span in shown.spans:
        parts.append(_box(span, places[span.row], left, factor, f"{span.seconds * scale:.3g} {unit}"))
    return "".join([*parts, "</svg>"])


def _box(span: Span, place: tuple[int, int], left: int, factor: float, length: str) -> str:
    y, height = place
    width = max(0.5, span.seconds * factor)
    step = "" if span.step is None else f", batch {span.step}"
    kind = "bubble" if span.kind == "wait" else span.kind
    box = f'x="{left + span.start * factor:.1f}" y="{y + 2}" width="{width:.1f}" height="{height - 4}"'
    return f'<rect class="{kind}" {box}><title>{escape(span.name[:60] + step)}: {length}</title></rect>'


def _table(name: str, groups: Sequence[Idle], seconds: float) -> str:
    """Where each group's time went, in shares of the excerpt."""
    waits = sorted({wait for group in groups for wait in group.waits})
    heads = ["row", "busy, %", "bubble, %", *(escape(f"{wait}, %") for wait in waits), "no span, %"]
    lines = []
    for group in groups:
        parts = [
            group.busy,
            seconds - group.busy,
            *(group.waits.get(wait, 0.0) for wait in waits),
            group.between,
        ]
        shown = cells(figure(part / seconds if seconds else 0.0, 100, 1) for part in parts)
        lines.append((escape(group.row), shown))
    body = table("Of the time shown", f"<tr>{cells(heads, head=True)}</tr>", lines)
    label = escape(f"Bubbles of {name}")
    return f'<div class="scroll fit" role="region" tabindex="0" aria-label="{label}">{body}</div>'
