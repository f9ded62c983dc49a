"""Serial shares: accuracy, bytes and times."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import at_most, between, paragraph, table
from benchmarks.tables.results import Results


def accuracy(results: Results) -> str:
    """Mean accuracy of every exit."""
    rows = [
        [method, share, str(row["seeds"]), *(f"{100 * a:.2f}" for a in row["exit_test_accuracy"])]
        + [f"{row['wire_bytes_per_sample']:.0f}"]
        for method, shares in results("hybrid")["table"]["accuracy"].items()
        for share, row in shares.items()
    ]
    exits = [f"exit {k + 1}" for k in range(len(rows[0]) - 4)]
    return table(["method", "q", "seeds", *exits, "bytes a sample"], rows)


def _timed(results: Results) -> list[dict[str, Any]]:
    return [run for run in results("hybrid")["runs"] if run["name"].startswith("times")]


def times(results: Results) -> str:
    """One run of each share over two processes."""
    rows = []
    for run in _timed(results):
        serial = run["serial"] or {"steps": 0, "seconds": 0.0}
        each = f"{1e3 * serial['seconds'] / serial['steps']:.1f}" if serial["steps"] else ""
        rows.append(
            [run["method"], f"{run['share']:g}", f"{run['seconds']:.1f}", str(serial["steps"])]
            + [f"{serial['seconds']:.1f}", each, f"{run['wire_bytes_per_sample']:.0f}"]
        )
    head = ["method", "q", "seconds, 1,760 batches", "serial steps", "of them, seconds", "ms a serial step"]
    return table([*head, "bytes a sample"], rows)


def times_intro(results: Results) -> str:
    """How the times were taken."""
    foreign = max(run["foreign_cpu_share"] for run in _timed(results))
    return paragraph(
        "Time, over two processes of one thread on two cores (2 groups, blocks of 16, serial batches in 2 "
        "microbatches, "
        f"seed 0, other programs at {at_most(100 * foreign)} % of the machine or less): "
        "`python -m benchmarks.hybrid times --out FILE`, the same file."
    )


def words(results: Results) -> str:
    """Milliseconds of a batch of each kind."""
    runs = _timed(results)
    serial = [1e3 * run["serial"]["seconds"] / run["serial"]["steps"] for run in runs if run["serial"]]
    groups = [1e3 * run["step_seconds_median"] for run in runs]
    return paragraph(
        f"A serial batch of these small images takes {between(serial)} ms where a batch of groups at once takes "
        f"{between(groups)} (median of a run). One run of each share: differences of a second or two between "
        "them are no "
        "finding."
    )


TABLES = {
    "hybrid-accuracy": accuracy,
    "hybrid-times-intro": times_intro,
    "hybrid-times": times,
    "hybrid-times-words": words,
}
