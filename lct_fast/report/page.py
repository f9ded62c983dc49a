"""Runs compared in one HTML file that needs nothing else: no network, no script, no other file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lct_fast import __version__
from lct_fast.report.run import Curve, Run, number, read_run
from lct_fast.report.style import CSS
from lct_fast.report.svg import Axis, Line, axis, escape, line_chart, timeline
from lct_fast.report.table import cells, comparison_table, count, figure, table, words
from lct_fast.report.trace import Span, read_trace

# What all runs of a page share, so that it stays under a megabyte with some forty runs of eight exits.
POINTS, SPANS, TABLE_ROWS, CONFIG_CHARACTERS = 16_000, 1_200, 480, 160_000

# The page can load nothing, whatever the run folders hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# An SVG in a list: what a colour stands for.
SWATCH = '<svg viewBox="0 0 24 10" aria-hidden="true">{}</svg>'

KINDS = ("forward", "backward", "critic", "optimiser", "transfer", "other")

EXITS = (
    "Exit k is groups 1 to k with critic k, a network of its own; group k has its colour. "
    "Scales are the same for all runs."
)

# What was read of each group's own gradient, and its key in metrics.jsonl.
GRADIENTS = (("gradient norm", "gradient_norm"), ("cosine to the true gradient", "gradient_cosine"))


@dataclass(frozen=True)
class Share:
    """What one line (points) or one run (the rest) may take of the page."""

    points: int
    spans: int
    table_rows: int
    characters: int


@dataclass(frozen=True)
class Panel:
    """One chart's worth of every run: ``curves[i]`` are run i's, one a ``part``, empty where it has none."""

    name: str
    x: Axis
    y: Axis
    curves: list[list[Curve]]
    part: str = "exit"


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write a report that compares the run folders ``runs`` into the HTML file ``out``; returns ``out``.

    Raises ValueError, one line, where there are no runs, one is no run folder, or ``out`` is a folder.
    """
    if not runs:
        raise ValueError("expected at least one run folder, got none; name folders that training wrote")
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out}: expected a file to write the report to, found a folder; name a file in it")
    text = page([read_run(path) for path in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    # A folder's name may hold bytes that are no text.
    out.write_bytes(text.encode("utf-8", errors="replace"))
    return out


def page(runs: Sequence[Run]) -> str:
    """The report as HTML."""
    names = _names(runs)
    panels = _panels(runs)
    exits = max(len(curves) for panel in panels for curves in panel.curves)
    share = _share(len(runs), sum(len(curves) + 1 for panel in panels for curves in panel.curves))
    what = escape(names[0] if len(runs) == 1 else f"{len(runs)} runs")
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">',
        f"<title>{what} \u00b7 lct_fast report</title><style>{CSS}</style></head>\n<body>",
        f'<header><h1>{what}</h1><p class="soft">lct_fast {escape(__version__)} report</p></header>\n<main>',
        _section(
            "comparison",
            "Comparison" if len(runs) > 1 else "Summary",
            _scroll("Comparison of runs", comparison_table(runs, names)),
        ),
    ]
    if len(runs) > 1:
        parts.append(_section("last", "Last exits compared", _last_exits(names, panels, share)))
    styles = [_exit_style(k, exits) for k in range(exits)]
    cards = "\n".join(
        _card(i, run, name, panels, styles, share)
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    )
    legend = _legend([(f"exit {k}", style) for k, style in enumerate(styles, start=1)])
    curves = f'{legend}<p class="soft">{EXITS}</p>\n<div class="runs">{cards}</div>'
    parts.append(_section("curves", "Learning curves per exit", curves))
    timelines = _timelines(runs, names, share)
    if timelines:
        parts.append(_section("timelines", "First steps", timelines))
    return "\n".join([*parts, "</main></body></html>\n"])


def _share(runs: int, lines: int) -> Share:
    return Share(
        points=min(200, max(12, POINTS // max(1, lines))),
        spans=min(300, max(12, SPANS // runs)),
        table_rows=min(25, max(4, TABLE_ROWS // runs)),
        characters=min(16_000, max(500, CONFIG_CHARACTERS // runs)),
    )


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [str(run.path) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def _panels(runs: Sequence[Run]) -> list[Panel]:
    """Accuracy first, then one panel for each kind of loss that the runs recorded."""
    accuracy = [run.accuracy_curves() for run in runs]
    of: dict[tuple[str, str], list[list[Curve]]] = {("test accuracy, %", "epoch"): accuracy}
    for i, run in enumerate(runs):
        loss = run.loss_curves()
        of.setdefault((loss.name, loss.unit), [[] for _ in runs])[i] = loss.curves
    panels = [_panel(name, unit, curves) for (name, unit), curves in of.items()]
    for name, key in GRADIENTS:
        curves = [run.gradient_curves(key) for run in runs]
        if any(curves):
            panels.append(_panel(name, "step", curves, part="group"))
    return panels


def _panel(name: str, unit: str, curves: list[list[Curve]], part: str = "exit") -> Panel:
    points = [point for of_run in curves for curve in of_run for point in curve]
    x = axis(unit, [x for x, _ in points], tight=True, least=1.0)
    y = axis(name, [y for _, y in points if y is not None], percent=name.endswith("%"))
    return Panel(name, x, y, curves, part)


def _exit_style(k: int, exits: int) -> str:
    # Exits are ordered, so their hues run one way, violet, blue, green, red; every other one is lighter.
    return f"--h:{round(300 - 275 * k / max(1, exits - 1))};--d:{0.08 * (k % 2):g}"


def _run_style(i: int) -> str:
    # Golden angle: neighbours differ most. Dashes tell runs apart where hues don't.
    dash = ("", ";stroke-dasharray:7 4", ";stroke-dasharray:1 4")[i % 3]
    return f"--h:{round(250 + 137.5 * i) % 360}{dash}"


def _section(name: str, title: str, body: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{body}</section>'


def _legend(items: Sequence[tuple[str, str]]) -> str:
    swatches = (SWATCH.format(f'<path class="line" style="{style}" d="M2 5H22"/>') for _, style in items)
    body = "".join(
        f"<li>{s}<span>{escape(label)}</span></li>" for s, (label, _) in zip(swatches, items, strict=True)
    )
    return f'<ul class="legend">{body}</ul>' if items else ""


def _scroll(label: str, body: str, kind: str = "") -> str:
    # Focusable, so that the keyboard can scroll what is wider than a phone.
    opening = f'<div class="scroll{kind}" role="region" tabindex="0" aria-label="{escape(label)}">'
    return f"{opening}{body}</div>"


def _chart(panel: Panel, whose: str, lines: Sequence[Line], points: int) -> str:
    ends = [(line.label, [y for _, y in line.points if y is not None]) for line in lines]
    told = ", ".join(f"{label} {panel.y.text(ys[-1])}" for label, ys in ends[:20] if ys)
    if not told:
        return f'<p class="soft">No {escape(panel.name.removesuffix(", %"))} recorded yet.</p>'
    title = f"{panel.name} of {whose} against {panel.x.label}; at the end: {told}"
    chart = line_chart(title, panel.x, panel.y, lines, points)
    return f"<figure><figcaption>{escape(panel.name)}</figcaption>{chart}</figure>"


def _last_exits(names: Sequence[str], panels: Sequence[Panel], share: Share) -> str:
    styles = [_run_style(i) for i in range(len(names))]
    charts = ""
    for every in panels:
        if every.part != "exit":
            continue
        # Scales of their own: last exits lie closer together than the exits of a run.
        panel = _panel(every.name, every.x.label, [curves[-1:] for curves in every.curves])
        lines = [Line(f"#{i + 1}", styles[i], c) for i, curves in enumerate(panel.curves) for c in curves]
        # A single line is in its own run's chart already.
        if len(lines) > 1:
            charts += f'<div class="run">{_chart(panel, "the last exits", lines, share.points)}</div>'
    if not charts:
        return _note("No two runs have recorded the same measure yet.")
    legend = _legend(
        [(f"#{i} {name}", style) for i, (name, style) in enumerate(zip(names, styles, strict=True), 1)]
    )
    return f'{legend}<div class="runs">{charts}</div>'


def _card(i: int, run: Run, name: str, panels: Sequence[Panel], styles: Sequence[str], share: Share) -> str:
    parts = [f'<section class="run" id="run-{i + 1}" aria-labelledby="name-{i + 1}">']
    parts.append(
        f'<h3 id="name-{i + 1}">#{i + 1} {escape(name)}</h3><p class="soft">{escape(_facts(run))}</p>'
    )
    parts += [_note(note) for note in run.notes]
    parts.append('<div class="charts">')
    for panel in panels:
        # Another run's kind of loss is no gap of this one.
        if panel is panels[0] or panel.curves[i]:
            ends = zip(styles, panel.curves[i], strict=False)
            lines = [
                Line(f"{panel.part} {k}", style, curve) for k, (style, curve) in enumerate(ends, start=1)
            ]
            parts.append(_chart(panel, name, lines, share.points))
    parts += ["</div>", _numbers(run, name, share.table_rows), _config(run, share.characters), "</section>"]
    return "".join(parts)


def _note(text: object) -> str:
    return f'<p class="soft note">{escape(text)}</p>'


def _facts(run: Run) -> str:
    facts = []
    if not run.finished:
        last = run.intervals[-1] if run.intervals else {}
        step, speed = number(last.get("step")), number(last.get("samples_per_second"))
        facts.append("in progress" + ("" if step is None else f", step {count(step)}"))
        facts += [] if speed is None else [f"{speed:,.0f} samples/s"]
    for key in ("method", "model", "data", "schedule", "groups", "critic", "codec", "seed", "epochs"):
        value = run.value(key)
        if value is not None:
            named = key in ("groups", "critic", "codec", "seed", "epochs")
            facts.append(f"{key} {words(value)}" if named else words(value))
    return " \u00b7 ".join(facts)


def _numbers(run: Run, name: str, most: int) -> str:
    if not run.epochs:
        return ""
    accuracy, loss = run.accuracy_curves(), run.curves("test_loss")
    heads = ["epoch", *(f"accuracy {k}, %" for k in range(1, len(accuracy) + 1))]
    heads += [f"test loss {k}" for k in range(1, len(loss) + 1)]
    columns = [[figure(y, 100) for _, y in curve] for curve in accuracy]
    columns += [[figure(y, places=4) for _, y in curve] for curve in loss]
    every = -(-len(run.epochs) // most)
    kept = sorted({*range(0, len(run.epochs), every), len(run.epochs) - 1})
    rows = [(count(number(run.epochs[i]["epoch"])), cells(column[i] for column in columns)) for i in kept]
    caption = "Per exit" if every == 1 else f"Per exit, every {every} epochs and the last"
    body = _scroll(f"Numbers of {name}", table(caption, f"<tr>{cells(heads, head=True)}</tr>", rows))
    return f"<details><summary>Numbers by epoch</summary>{body}</details>"


def _config(run: Run, most: int) -> str:
    text = run.config_text.rstrip() or "no config.yaml"
    for key in ("parameters", "device", "versions", "commit"):
        if key in run.summary:
            text += f"\n# {key}: {run.summary[key]}"
    if len(text) > most:
        text = f"{text[:most]}\n... {len(text) - most} more characters in the run folder"
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"


def _timelines(runs: Sequence[Run], names: Sequence[str], share: Share) -> str:
    parts: list[str] = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True), start=1):
        path = run.path / "trace.json"
        if path.is_file():
            try:
                body = _timeline(read_trace(path, limit=share.spans), name)
            except ValueError as error:
                body = _note(error)
            parts.append(f"<h3>#{i} {escape(name)}</h3>{body}")
    if not parts:
        return ""
    swatches = ((kind, SWATCH.format(f'<rect class="{kind}" width="24" height="10"/>')) for kind in KINDS)
    legend = "".join(f"<li>{swatch}<span>{kind}</span></li>" for kind, swatch in swatches)
    return f'<ul class="legend">{legend}</ul>{"".join(parts)}'


def _timeline(spans: Sequence[Span], name: str) -> str:
    if not spans:
        return _note("The trace holds no spans.")
    busy: dict[str, float] = {}
    for span in spans:
        busy[span.kind] = busy.get(span.kind, 0.0) + span.seconds
    told = ", ".join(f"{kind} {seconds * 1e3:,.1f} ms" for kind, seconds in busy.items())
    steps = sorted({span.step for span in spans if span.step is not None})
    what = f"Steps {steps[0]} to {steps[-1]}. " if steps else ""
    chart = timeline(f"Timeline of {name}; {told}", spans)
    caption = f'<p class="soft">{what}Time by kind, all rows together: {told}.</p>'
    return _scroll(f"Timeline of {name}", chart, " timeline") + caption
