"""Runs compared in one HTML file that needs nothing else: no network, no script, no other file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lct_fast import __version__
from lct_fast.report import cuts, timeline
from lct_fast.report.run import Curve, Run, exit_name, number, read_run
from lct_fast.report.style import CSS
from lct_fast.report.svg import Axis, Line, axis, escape, line_chart
from lct_fast.report.table import cells, comparison_table, count, figure, table, words

# What all runs of a page share, so that it stays under two megabytes with some forty runs of eight exits.
POINTS, SPANS, TABLE_ROWS, CONFIG_CHARACTERS = 24_000, 3_600, 480, 160_000

# The page can load nothing, whatever the run folders hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# An SVG in a list: what a colour stands for.
SWATCH = '<svg viewBox="0 0 24 12" aria-hidden="true">{}</svg>'

EXITS = (
    "Exit k is groups 1 to k with critic k, a network of its own; group k and the cut behind it have its colour. "
    "A run without exits has the network alone. Scales are the same for all runs."
)
GRADIENTS = "Of each group's own gradient, before clipping. "
COSINES = (
    "The true gradient is what back-propagation of the network's loss gives on the same batch; 1: the group goes where "
    "back-propagation would."
)
BYTES = "What crossed each cut of the network, over the whole run, and what it would have been in fp32."
CODEBOOKS = (
    "Of the codes that crossed each cut since the epoch before: the share of codewords chosen at least once, and the "
    "perplexity of the choices, at most the number of codewords."
)
TIMELINE = (
    "Some steps once the pipeline is full. A group's row is its own work, hatched where it had none; rows below it are "
    "what its process sent and received meanwhile."
)

# What was read of groups and of codebooks: name of the panel, key and kind in metrics.jsonl.
GRADIENT_PANELS = (
    ("gradient norm", "gradient_norm", "diagnosis"),
    ("cosine to the true gradient", "gradient_cosine", "diagnosis"),
)
CODEBOOK_PANELS = (
    ("codewords in use, %", "used", "codebook"),
    ("perplexity of the codes", "perplexity", "codebook"),
)
# The only exit of a run is no exit of another: it has a colour of its own.
NETWORK = "--h:0;--c:0"


@dataclass(frozen=True)
class Share:
    """What one line (points) or one run (the rest) may take of the page."""

    points: int
    spans: int
    table_rows: int
    characters: int


@dataclass(frozen=True)
class Panel:
    """One chart's worth of every run: ``curves[i]`` are run i's, one a ``part`` (exit, group or cut), or none."""

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
    gradients, codebooks = (
        [panel for what in of if (panel := _read_panel(runs, *what, part=part)) is not None]
        for of, part in ((GRADIENT_PANELS, "group"), (CODEBOOK_PANELS, "cut"))
    )
    every = [*panels, *gradients, *codebooks]
    exits = max(len(curves) for panel in every for curves in panel.curves)
    share = _share(len(runs), sum(len(curves) + 1 for panel in every for curves in panel.curves))
    what = escape(names[0] if len(runs) == 1 else f"{len(runs)} runs")
    head = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">',
        f"<title>{what} \u00b7 lct_fast report</title><style>{CSS}</style></head>\n<body>",
        f'<header><h1>{what}</h1><p class="soft">lct_fast {escape(__version__)} report</p></header>',
    ]
    styles = [_exit_style(k, exits) for k in range(exits)]
    cards = "\n".join(
        _card(i, run, name, panels, styles, share)
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    )
    curves = f'{_exits_legend(panels, styles)}<p class="soft">{EXITS}</p>\n<div class="runs">{cards}</div>'
    bytes_tables = [cuts.bytes_table(run, name) for run, name in zip(runs, names, strict=True)]
    codebook_tables = [cuts.codebook_table(run, name) for run, name in zip(runs, names, strict=True)]
    sections = [
        (
            "comparison",
            "Comparison" if len(runs) > 1 else "Summary",
            _scroll("Comparison of runs", comparison_table(runs, names)),
        ),
        (
            "last",
            "Networks compared",
            _last_exits(names, panels, share) if len(runs) > 1 else "",
        ),
        ("curves", "Learning curves per exit", curves),
        (
            "gradients",
            "Gradients of the groups",
            _readings(
                GRADIENTS + COSINES * (len(gradients) > 1), names, gradients, styles, share, [""] * len(runs)
            ),
        ),
        ("bytes", "Bytes over the cuts", _of_runs(f"{_soft(BYTES)}{cuts.legend()}", names, bytes_tables)),
        (
            "codebooks",
            "Codebook use",
            _readings(CODEBOOKS, names, codebooks, styles, share, codebook_tables),
        ),
        ("timelines", "Timeline", _timelines(runs, names, share)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections)
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>'
    body = [_section(*section) for section in sections]
    return "\n".join([*head, nav, *body, "</main></body></html>\n"])


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
    return [_panel(name, unit, curves) for (name, unit), curves in of.items()]


def _read_panel(runs: Sequence[Run], name: str, key: str, kind: str, part: str) -> Panel | None:
    """What was read of groups or cuts; None if nothing was in any run."""
    curves = [run.readings(key, kind) for run in runs]
    return _panel(name, "step", curves, part) if any(curves) else None


def _panel(name: str, unit: str, curves: list[list[Curve]], part: str = "exit") -> Panel:
    points = [point for of_run in curves for curve in of_run for point in curve]
    x = axis(unit, [x for x, _ in points], tight=True, least=1.0)
    y = axis(name, [y for _, y in points if y is not None], percent=name.endswith("%"))
    return Panel(name, x, y, curves, part)


def _exit_style(k: int, exits: int) -> str:
    # Exits are ordered, so their hues run one way, violet, blue, green, red; every other one is lighter.
    return f"--h:{round(300 - 275 * k / max(1, exits - 1))};--d:{0.08 * (k % 2):g}"


def _lines(panel: Panel, i: int, styles: Sequence[str]) -> list[Line]:
    """The lines of run ``i``."""
    curves = panel.curves[i]
    if panel.part == "exit":
        names = [exit_name(k, len(curves)) for k in range(1, len(curves) + 1)]
        styles = [NETWORK] if len(curves) == 1 else styles
    else:
        names = [f"{panel.part} {k}" for k in range(1, len(curves) + 1)]
    drawn = zip(names, styles, curves, strict=False)
    return [Line(*line) for line in drawn if any(y is not None for _, y in line[2])]


def _exits_legend(panels: Sequence[Panel], styles: Sequence[str]) -> str:
    counts = {len(curves) for panel in panels for curves in panel.curves}
    most = max(counts)
    items = [(f"exit {k}", style) for k, style in enumerate(styles[:most], start=1)] if most > 1 else []
    return _legend([*items, *([("network", NETWORK)] if 1 in counts else [])])


def _run_style(i: int) -> str:
    # Golden angle: neighbours differ most. Dashes tell runs apart where hues don't.
    dash = ("", ";stroke-dasharray:7 4", ";stroke-dasharray:1 4")[i % 3]
    return f"--h:{round(250 + 137.5 * i) % 360}{dash}"


def _section(name: str, title: str, body: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{body}</section>'


def _legend(items: Sequence[tuple[str, str]]) -> str:
    swatches = (SWATCH.format(f'<path class="line" style="{style}" d="M2 6H22"/>') for _, style in items)
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
        # Scales of their own: last exits lie closer together than the exits of a run.
        panel = _panel(every.name, every.x.label, [curves[-1:] for curves in every.curves])
        lines = [Line(f"#{i + 1}", styles[i], c) for i, curves in enumerate(panel.curves) for c in curves]
        # A single line is in its own run's chart already.
        if len(lines) > 1:
            charts += f'<div class="run">{_chart(panel, "the networks", lines, share.points)}</div>'
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
            parts.append(_chart(panel, name, _lines(panel, i, styles), share.points))
    parts += ["</div>", _numbers(run, name, share.table_rows), _config(run, share.characters), "</section>"]
    return "".join(parts)


def _readings(
    intro: str,
    names: Sequence[str],
    panels: Sequence[Panel],
    styles: Sequence[str],
    share: Share,
    tables: Sequence[str],
) -> str:
    """A card for each run that has any of ``panels``, with its table below; empty where none has."""
    cards = ""
    for i, (name, below) in enumerate(zip(names, tables, strict=True)):
        drawn = [
            _chart(panel, name, _lines(panel, i, styles), share.points) for panel in panels if panel.curves[i]
        ]
        if drawn:
            heading = f"<h3>#{i + 1} {escape(name)}</h3>"
            cards += f'<div class="run">{heading}<div class="charts">{"".join(drawn)}</div>{below}</div>'
    return f'{_soft(intro)}<div class="runs">{cards}</div>' if cards else ""


def _of_runs(intro: str, names: Sequence[str], bodies: Sequence[str]) -> str:
    """``bodies``, one a run, under the runs' names; empty where all are."""
    named = zip(names, bodies, strict=True)
    parts = [f"<h3>#{i} {escape(name)}</h3>{body}" for i, (name, body) in enumerate(named, start=1) if body]
    return intro + "".join(parts) if parts else ""


def _soft(text: str) -> str:
    return f'<p class="soft">{text}</p>'


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
    heads = ["epoch", *_columns("accuracy{}, %", len(accuracy)), *_columns("test loss{}", len(loss))]
    columns = [[figure(y, 100) for _, y in curve] for curve in accuracy]
    columns += [[figure(y, places=4) for _, y in curve] for curve in loss]
    every = -(-len(run.epochs) // most)
    kept = sorted({*range(0, len(run.epochs), every), len(run.epochs) - 1})
    rows = [(count(number(run.epochs[i]["epoch"])), cells(column[i] for column in columns)) for i in kept]
    what = "Per exit" if len(accuracy) > 1 else "Of the network"
    caption = what if every == 1 else f"{what}, every {every} epochs and the last"
    body = _scroll(f"Numbers of {name}", table(caption, f"<tr>{cells(heads, head=True)}</tr>", rows))
    return f"<details><summary>Numbers by epoch</summary>{body}</details>"


def _columns(head: str, exits: int) -> list[str]:
    return [head.format("" if exits == 1 else f" {k}") for k in range(1, exits + 1)]


def _config(run: Run, most: int) -> str:
    text = run.config_text.rstrip() or "no config.yaml"
    for key in ("parameters", "device", "versions", "commit"):
        if key in run.summary:
            text += f"\n# {key}: {run.summary[key]}"
    if len(text) > most:
        text = f"{text[:most]}\n... {len(text) - most} more characters in the run folder"
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"


def _timelines(runs: Sequence[Run], names: Sequence[str], share: Share) -> str:
    bodies = []
    for run, name in zip(runs, names, strict=True):
        try:
            bodies.append(timeline.section(run, name, share.spans))
        except ValueError as error:
            bodies.append(_note(error))
    return _of_runs(f"{_soft(TIMELINE)}{timeline.legend()}", names, bodies)
