"""Asynchronous learning on the digits."""

from __future__ import annotations

import re

from benchmarks.tables.markdown import at_most, between, paragraph, table, word
from benchmarks.tables.results import Results


def exits(results: Results) -> str:
    """Each exit's accuracy, mean over seeds; a row for each slow-down and buffer."""
    rows = []
    for name, row in results("asynchrony")["over_seeds"].items():
        found = re.fullmatch(r"async S=([\d.]+) M=(\d+)", name)
        rows.append([*(found.groups() if found else (name, "")), *(f"{100 * m:.2f}" for m in row["mean"])])
    count = len(rows[0]) - 2
    return table(["S", "M", *(f"exit {k}, %" for k in range(1, count + 1))], rows)


def words(results: Results) -> str:
    """The largest difference from lockstep, at any exit and setting."""
    report = results("asynchrony")
    found = dict(report["over_seeds"])
    lockstep = found.pop("lockstep")
    slow, slots = (
        [float(re.search(rf"{key}=([\d.]+)", name)[1]) for name in found]  # type: ignore[index]
        for key in ("S", "M")
    )
    most = max(
        100 * abs(mean - plain)
        for row in found.values()
        for mean, plain in zip(row["mean"], lockstep["mean"], strict=True)
    )
    too_easy = " That says no more than that digits are too easy to show a loss." if most < 1 else ""
    return paragraph(
        "[asynchrony.json](../benchmarks/results/asynchrony.json), by "
        "`python -m benchmarks.asynchrony --seeds 2 --out FILE`: accuracy on the digits for S from "
        f"{between(slow, 'g')} and M from {between(slots, 'g')}, group {report['slow_group']} of 4 slow. At every exit "
        f"and setting the mean of {word(lockstep['seeds'])} seeds is within {at_most(most, 0.1)} points of "
        "lockstep; one "
        f"of the 360 test images is 0.28.{too_easy}"
    )


TABLES = {"asynchrony-words": words, "asynchrony": exits}
