"""Characters: bits at several lengths."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import between, bullet, listed, paragraph, table
from benchmarks.tables.results import Results

Row = dict[str, Any]
L1, ONE_SIDED = "local-critic l1, critic lr 5e-4", "local-critic one_sided, critic lr 1e-2"
METHODS = ("backprop", "greedy", L1, ONE_SIDED)
ONE_SIDED_SLOW, L1_FAST = "local-critic one_sided, critic lr 5e-4", "local-critic l1, critic lr 1e-2"


def _kind(row: Row) -> str:
    return str(row["model"].partition(":")[0].removeprefix("char_"))


def lengths(results: Results) -> dict[tuple[str, str, int], dict[int, Row]]:
    """Rows by model, method and groups, then by steps."""
    found: dict[tuple[str, str, int], dict[int, Row]] = {}
    for row in results("text")["table"]:
        found.setdefault((_kind(row), row["method"], row["groups"]), {})[row["steps"]] = row
    return found


def bits(row: Row) -> float:
    """Of the last exit."""
    return float(row["exit_bits_per_character"][-1])


def readme(results: Results) -> str:
    """The LSTM, 4 groups, every length."""
    found = lengths(results)
    chosen = {m: found["lstm", m, 1 if m == "backprop" else 4] for m in METHODS}
    steps = sorted(chosen["backprop"])
    rows = [[method, *(f"{bits(chosen[method][s]):.3f}" for s in steps)] for method in METHODS]
    return table(["method", *(f"{s:,}" for s in steps)], rows)


def page(results: Results) -> str:
    """Every run."""
    rows = []
    for row in results("text")["table"]:
        *before, last = (f"{b:.3f}" for b in row["exit_bits_per_character"])
        above = "" if row["method"] == "backprop" else f"{row['above_backprop']:+.3f}"
        rows.append(
            [_kind(row), row["method"], str(row["groups"]), str(row["steps"]), last, above, " ".join(before)]
        )
    return table(["model", "method", "groups", "steps", "last exit", "above backprop", "exits before"], rows)


def _gap(row: Row) -> str:
    """Above or below back-propagation."""
    gap = row["above_backprop"]
    return f"{abs(gap):.3f} {'above' if gap > 0 else 'below'} at {row['steps']:,}"


def _gaps(rows: dict[int, Row]) -> str:
    return listed([_gap(rows[steps]) for steps in sorted(rows)])


def words(results: Results) -> str:
    """What the runs say, one sentence a finding."""
    found = lengths(results)
    curves = {run["name"]: run["curve"] for run in results("text")["runs"]}

    def training(method: str) -> float:
        """Of the last exit after 200 of 500 steps."""
        (point,) = (p for p in curves[f"char_lstm {method} groups 4 steps 500"] if p["step"] == 200)
        return float(point["bits"][-1])

    def at_500(method: str) -> str:
        return f"{bits(found['lstm', method, 4][500]):.3f}"

    transformer = [
        rows[500]["above_backprop"]
        for (kind, m, _), rows in found.items()
        if kind == "transformer" and m != "backprop"
    ]
    one = bullet(
        "`local-critic --critic-loss one_sided` with a fast critic (Adam 1e-2), against back-propagation, in 4 groups:",
        f"{_gaps(found['lstm', ONE_SIDED, 4])} steps; in 2: {_gaps(found['lstm', ONE_SIDED, 2])}.",
        "Of the critics tried it is the one to take for an LSTM.",
    )
    l1 = bullet(
        f"With the paper's L1, in 4 groups: {_gaps(found['lstm', L1, 4])} steps; in 2: {_gaps(found['lstm', L1, 2])}."
    )
    heads = bullet(
        f"`greedy`, in 4 groups: {_gaps(found['lstm', 'greedy', 4])} steps; in 2: {_gaps(found['lstm', 'greedy', 2])}."
    )
    rates = bullet(
        f"Critics' learning rates, in 4 groups at 500 steps: one-sided {at_500(ONE_SIDED)} with 1e-2 and "
        f"{at_500(ONE_SIDED_SLOW)} with 5e-4, L1 {at_500(L1_FAST)} and {at_500(L1)}. The default, 5e-4, is "
        "for L1; give "
        "`--critic-lr 1e-2` with `one_sided`."
    )
    attention = bullet(
        f"The transformer at 500 steps: learning in 4 groups costs {between(transformer, '.3f')} bits."
    )
    first = paragraph(
        "One seed: a few hundredths are noise; one learning rate for all methods, tuned for none. At these lengths "
        "back-propagation through four LSTM layers starts slowly (its training curve is at "
        f"{training('backprop'):.2f} bits after 200 of 500 steps, the last exit of `greedy` at "
        f"{training('greedy'):.2f}), "
        "and shallow exits are as good as deep ones. So a method that is below back-propagation here is quicker at the "
        "start; more than that is not shown."
    )
    return "\n".join([first, "", one, l1, heads, rates, attention])


TABLES = {"text-readme": readme, "text": page, "text-words": words}
