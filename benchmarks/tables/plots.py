"""The plots under docs/plots."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.tables import text
from benchmarks.tables.chart import COLOURS, Axis, Series, bars, chart, ticks
from benchmarks.tables.pipeline import name, shown
from benchmarks.tables.results import Results
from benchmarks.tables.scaling import MICROBATCHES, share
from benchmarks.tables.wire import METHODS, POINTS, coded

_KINDS = {"decoupled": COLOURS[0], "no link": "#9ecae1"}


def pipeline(results: Results) -> str:
    """Milliseconds a batch of each contender, the slowest first."""
    rows = sorted(shown(results), key=lambda row: -float(row["us_p50"]))
    return bars(
        "Milliseconds a batch, two CPU processes of one thread (median)",
        [
            (name(r["contender"]), r["us_p50"], f"{r['us_p50'] / 1e3:.1f}", _KINDS.get(r["kind"], "#999999"))
            for r in rows
        ],
        "Blue: groups that learn on their own (pale: without any link). Grey: back-propagation. Shorter is faster.",
    )


def _place(row: dict[str, Any]) -> tuple[float, float]:
    return float(row["times_fewer_bytes"]), float(row[POINTS]["mean"])


def wire(results: Results) -> str:
    """Points of accuracy against times fewer bytes."""
    rows = [row for file in ("wire_digits", "wire_cifar10") for row in coded(results, file)]
    places = [_place(row) for row in rows]
    # A codec's name stands once, below its lowest point.
    lowest = {row["codec"]: _place(row) for row in sorted(rows, key=lambda row: -_place(row)[1])}
    labels: dict[tuple[float, float], str] = {}
    for codec, (fewer, points) in lowest.items():
        # Where names would cross they stand together.
        near = [at for at in labels if abs(at[0] / fewer - 1) < 0.02 and abs(at[1] - points) < 0.5]
        at = near[0] if near else (fewer, points)
        labels[at] = f"{labels[at]}, {codec}" if near else codec
    series = []
    for data, file, hollow in (("digits", "wire_digits", True), ("CIFAR-10", "wire_cifar10", False)):
        for method, colour in zip(METHODS, COLOURS, strict=False):
            rows = [row for row in coded(results, file) if row["method"] == method]
            if rows:
                found = [_place(row) for row in rows]
                names = [labels.pop(place, "") for place in found]
                label = f"{data}, {method}"
                series.append(Series(label, found, colour, line=False, hollow=hollow, names=names))
    low = math.floor(min(points for _, points in places) / 5) * 5.0
    high = max(2.0, math.ceil(max(points for _, points in places)) + 1.0)
    left, right = min(b for b, _ in places) * 0.9, max(b for b, _ in places) * 1.2
    bytes_ = [
        value for value in (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64) if left <= value <= right
    ]
    x = Axis("times fewer bytes on the wire, codebooks included (log scale)", left, right,
             [(float(b), str(b)) for b in bytes_], log=True)  # fmt: skip
    y = Axis("points of test accuracy, against no codec", low, high, ticks(low, high))
    return chart("Accuracy lost against bytes saved, 4 groups", x, y, series)


def scaling(results: Results) -> str:
    """The decoupled step as a share of the best pipeline's, over workers, a line a link."""
    rows = [row for row in results("scaling")["rows"] if row["microbatches"] == MICROBATCHES]
    links = list(dict.fromkeys(row["link"] for row in rows))
    speeds = list(dict.fromkeys(row["speed"] for row in rows))
    series = []
    for speed in speeds:
        for link, colour in zip(links, COLOURS, strict=False):
            points = [
                (float(r["workers"]), share(r)) for r in rows if r["link"] == link and r["speed"] == speed
            ]
            tag = "" if speed == speeds[0] else f", {speed}"
            series.append(Series(link + tag, points, colour, dashed=speed != speeds[0]))
    workers = sorted({float(row["workers"]) for row in rows})
    shares = [share(row) for row in rows]
    low, high = math.floor(math.log10(min(shares))), max(1.0, 1.1 * max(shares))
    powers = [(10.0**k, f"{10.0**k:g}") for k in range(low, 1)]
    x = Axis(
        "workers (log scale)",
        workers[0] * 0.85,
        workers[-1] * 1.1,
        [(w, f"{w:g}") for w in workers],
        log=True,
    )
    y = Axis(
        "decoupled step over the best pipeline schedule's (log scale)", 10.0**low, high, powers, log=True
    )
    return chart(
        f"Simulation: share of the best pipeline's time, {MICROBATCHES} microbatches",
        x,
        y,
        series,
        "Solid: costs as measured on a CPU. Dashed: a device 200 times as fast, an assumption. Lower is better.",
    )


def characters(results: Results) -> str:
    """Bits per character against steps, the LSTM."""
    found = text.lengths(results)
    series = []
    for method, colour in zip(text.METHODS, COLOURS, strict=False):
        rows = found["lstm", method, 1 if method == "backprop" else 4]
        label = method.replace("local-critic ", "local-critic, ").partition(", critic lr")[0]
        series.append(Series(label, [(float(s), text.bits(rows[s])) for s in sorted(rows)], colour))
    steps = sorted({s for one in series for s, _ in one.points})
    values = [value for one in series for _, value in one.points]
    low, high = math.floor(min(values) * 5) / 5, math.ceil(max(values) * 5) / 5
    x = Axis("steps, each length with a schedule of its own (log scale)", steps[0] * 0.9, steps[-1] * 1.05,
             [(s, f"{s:,.0f}") for s in steps], log=True)  # fmt: skip
    y = Axis("bits per character, last exit (lower is better)", low, high, ticks(low, high, ".1f"))
    return chart("tinyshakespeare, LSTM of 4 layers, 4 groups, one seed", x, y, series)


PLOTS = {
    "pipeline.svg": pipeline,
    "wire.svg": wire,
    "scaling.svg": scaling,
    "text.svg": characters,
}
