"""Simulated workers."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import paragraph, table, word
from benchmarks.tables.results import Results

# Of a step; other numbers are in the file.
MICROBATCHES = 32


def share(row: dict[str, Any]) -> float:
    """The faster of the two decoupled steps over the best pipeline schedule's."""
    return float(min(row["decoupled_s"], row["decoupled_vq_s"]) / row["best_pipeline_s"])


def scaling(results: Results) -> str:
    """Steps of every speed, link and number of workers."""
    rows = [
        [r["speed"], r["link"], str(r["workers"])]
        + [f"{r[key]:.4g}" for key in ("decoupled_s", "decoupled_vq_s", "best_pipeline_s")]
        + [r["best_pipeline"], f"{share(r):.2f}"]
        for r in results("scaling")["rows"]
        if r["microbatches"] == MICROBATCHES
    ]
    head = [
        "speed",
        "link",
        "workers",
        "decoupled, s",
        "with vq:256,8, s",
        "best pipeline, s",
        "which",
        "of its time",
    ]
    return table(head, rows)


def intro(results: Results) -> str:
    """What is simulated."""
    stored = results("scaling")
    sizes = sorted({row["workers"] for row in stored["rows"]})
    others = sorted({row["microbatches"] for row in stored["rows"]} - {MICROBATCHES})
    return paragraph(
        "**Nothing on this page was run on more than two workers.** The [planner](planner.md) takes the "
        "costs of a group "
        "that two CPU processes measured (`benchmarks.pipeline`: batch 64, a convolutional group with a pooled critic, "
        f"{stored['group']['activation_bytes'] / 1e6:.1f} MB across the cut) to {', '.join(map(str, sizes[:-1]))} and "
        f"{sizes[-1]} workers, every worker with such a group, and "
        f"{word(len({r['link'] for r in stored['rows']}))} links. "
        '"200x" is the same on a device that computes 200 times as fast: an assumption, not a measurement. A step is '
        f"{MICROBATCHES} microbatches of 64; {' and '.join(map(str, others))} are in the file. "
        "`python -m benchmarks.scaling --out FILE`; [scaling.json](../benchmarks/results/scaling.json)",
    )


def words(results: Results) -> str:
    """The ends of the table's last column."""
    rows = [r for r in results("scaling")["rows"] if r["microbatches"] == MICROBATCHES]
    lost = sum(share(r) > 1 for r in rows)
    return paragraph(
        '"of its time": the faster of the two decoupled steps over the best pipeline schedule\'s, '
        f"{min(map(share, rows)):.1g} to {max(map(share, rows)):.2f} here"
        + (f"; above 1 in {lost} of {len(rows)} rows, where a pipeline is faster." if lost else ".")
    )


TABLES = {"scaling-intro": intro, "scaling": scaling, "scaling-words": words}
