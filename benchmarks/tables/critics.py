"""Cheap critics compared."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import paragraph, spread, table
from benchmarks.tables.results import Results

Row = dict[str, Any]
HEAD = ["method", "critic", "critic learns from"]


def _first(row: Row) -> list[str]:
    """Method, critic, and what it learns from."""
    if row["method"] == "backprop":
        return ["backprop", "", ""]
    learns = ""
    if row["method"] == "local-critic":
        learns = f"{row['loss']}, Adam {row['rate']}" + (", target last" if row["target"] == "last" else "")
    return [row["method"] + (", serial 0.1" if row["serial"] else ""), row["critic"], learns]


def cells(row: Row) -> list[str]:
    """A row as text: the above, the dearest critic in % of its group's MACs, exits."""
    if row["method"] == "backprop":
        return [*_first(row), "", "", "", "", f"{row['exit_accuracy'][-1]:.2f}"]
    exits = [spread(m, sd) for m, sd in zip(row["exit_accuracy"], row["exit_accuracy_sd"], strict=True)]
    return [*_first(row), f"{100 * max(row['critic_mac_share']):.2f}", *exits]


def _part(results: Results, part: str) -> str:
    rows = results("critics")[part]["rows"]
    exits = [f"exit {k + 1}" for k in range(len(rows[-1]["exit_accuracy"]))]
    return table([*HEAD, "MACs, % of its group", *exits], map(cells, rows))


def screen(results: Results) -> str:
    """Every contender once."""
    return _part(results, "screen")


def seeds(results: Results) -> str:
    """The best over seeds."""
    return _part(results, "seeds")


def cosines(results: Results) -> str:
    """Of each group's gradient to the true one; the last group's own gradient is the true one."""
    rows = results("critics")["seeds"]["rows"]
    groups = [f"group {k + 1}" for k in range(len(rows[0]["gradient_cosine"]) - 1)]
    return table(
        [*HEAD, *groups], [[*_first(row), *(f"{c:.2f}" for c in row["gradient_cosine"][:-1])] for row in rows]
    )


def finals(results: Results) -> str:
    """The finalists at a greater length, once they are in the file."""
    if "finals" in results("critics"):
        return _part(results, "finals")
    return paragraph(
        "Not yet measured: the same finalists with 12,500 images and 8 epochs over three seeds (`python -m "
        "benchmarks.critics finals --data DIR --out benchmarks/results/critics.json`), and anything near the paper's "
        "80,000 updates, where its own loss may well catch up."
    )


TABLES = {
    "critics-screen": screen,
    "critics-seeds": seeds,
    "critics-cosines": cosines,
    "critics-finals": finals,
}
