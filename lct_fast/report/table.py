"""What is compared of runs, as records and as an HTML table."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lct_fast.report.run import Run, number
from lct_fast.report.svg import escape

OPTIONS = ("method", "model", "data", "groups", "critic", "codec", "schedule", "seed", "steps", "epochs")

NOTHING = "\u2013"


def figure(value: float | None, scale: float = 1.0, places: int = 2) -> str:
    """``value * scale`` with ``places`` decimals; a dash for None."""
    return NOTHING if value is None else f"{value * scale:,.{places}f}"


def count(value: float | None) -> str:
    """A count with as many decimals as it has; a dash for None."""
    return NOTHING if value is None else f"{value:,.10g}"


def bytes_count(value: float | None) -> str:
    """Bytes a sample, to a tenth; a dash for None."""
    return NOTHING if value is None else count(round(value, 1))


def plain(value: Any) -> str:
    """An option as HTML, a list as its items; a dash for None."""
    return NOTHING if value is None else escape(words(value))


def words(value: Any) -> str:
    """An option as text, a list as its items."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# Key of the record, head of the column, cell. The columns of the exits stand between the two.
Column = tuple[str, str, Callable[[Any], str]]
BEFORE_EXITS: tuple[Column, ...] = (
    ("method", "method", plain),
    ("groups", "groups", plain),
    ("codec", "codec", plain),
    ("seed", "seed", plain),
    ("test_accuracy", "accuracy of the network, %", lambda value: figure(value, 100)),
)
AFTER_EXITS: tuple[Column, ...] = (
    ("step_seconds_median", "step, ms", lambda value: figure(value, 1e3)),
    ("seconds", "whole run, s", lambda value: figure(value, places=1)),
    ("wire_bytes_per_sample", "wire, B/sample", bytes_count),
    ("raw_bytes_per_sample", "uncoded, B/sample", bytes_count),
    ("feedback_bytes_per_sample", "feedback, B/sample", bytes_count),
    ("critic_tax", "critic tax, %", lambda value: figure(value, 100, 1)),
    ("bubble_fraction", "bubble, %", lambda value: figure(value, 100, 1)),
    ("exposed_transfer_fraction", "exposed transfer, %", lambda value: figure(value, 100, 1)),
)


def comparison(run: Run) -> dict[str, Any]:
    """What is compared of a run: options, accuracies 0..1, seconds, bytes a sample; None where unknown."""
    accuracy = run.exit_accuracy()
    return {
        "name": run.name,
        "path": str(run.path),
        "finished": run.finished,
        **{key: run.value(key) for key in OPTIONS},
        "test_accuracy": accuracy[-1] if accuracy else None,
        "exit_test_accuracy": accuracy,
        **{key: number(run.summary.get(key)) for key, _, _ in AFTER_EXITS},
    }


def cells(values: Iterable[str], head: bool = False) -> str:
    """Table cells of HTML ``values``."""
    return "".join(f'<th scope="col">{v}</th>' if head else f"<td>{v}</td>" for v in values)


def table(caption: str, head: str, rows: Iterable[tuple[str, str]]) -> str:
    """A table whose ``rows`` are pairs: what the row is, and its cells."""
    body = "\n".join(f'<tr><th scope="row">{name}</th>{row}</tr>' for name, row in rows)
    return f"<table><caption>{caption}</caption><thead>{head}</thead>\n<tbody>{body}</tbody></table>"


def comparison_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """A row a run; the run's name links to its curves, ``#run-1`` and so on."""
    records = [comparison(run) for run in runs]
    # The only exit of a run is the network, which has a column already.
    several = [values if len(values) > 1 else [] for values in (r["exit_test_accuracy"] for r in records)]
    exits = max(map(len, several))
    rows = []
    for i, (record, name, values) in enumerate(zip(records, names, several, strict=True), start=1):
        accuracy = [*values, *[None] * exits][:exits]
        row = cells(show(record[key]) for key, _, show in BEFORE_EXITS)
        row += cells(figure(value, 100) for value in accuracy)
        row += cells(show(record[key]) for key, _, show in AFTER_EXITS)
        state = "" if record["finished"] else " <small>in progress</small>"
        rows.append((f'<a href="#run-{i}">#{i} {escape(name)}</a>{state}', row))
    caption = f"{NOTHING}: not measured, or does not apply"
    return table(caption, _head(exits), rows)


def _head(exits: int) -> str:
    before = ["run", *(title for _, title, _ in BEFORE_EXITS)]
    after = [title for _, title, _ in AFTER_EXITS]
    if not exits:
        return f"<tr>{cells([*before, *after], head=True)}</tr>"
    high, end = '<th scope="col" rowspan="2">', "</th>"
    middle = f'<th scope="colgroup" colspan="{exits}">accuracy of exit, %</th>'
    top = "".join(
        [*(high + title + end for title in before), middle, *(high + title + end for title in after)]
    )
    return f"<tr>{top}</tr>\n<tr>{cells(map(str, range(1, exits + 1)), head=True)}</tr>"
