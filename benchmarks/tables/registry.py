"""Every table, sentence and plot that is made from result files, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import (
    accuracy,
    asynchrony,
    codebooks,
    critics,
    drills,
    files,
    hybrid,
    layer_parallel,
    likelihood_ratio,
    ops,
    pipeline,
    plots,
    roofline,
    scaling,
    text,
    wire,
)
from benchmarks.tables.results import MissingResult, Results

Maker = Callable[[Results], str]
# Each module's functions, {name: function of the results that gives Markdown}.
TABLES: dict[str, Maker] = {
    **accuracy.TABLES,
    **pipeline.TABLES,
    **wire.TABLES,
    **codebooks.TABLES,
    **ops.TABLES,
    **roofline.TABLES,
    **scaling.TABLES,
    **drills.TABLES,
    **critics.TABLES,
    **hybrid.TABLES,
    **layer_parallel.TABLES,
    **likelihood_ratio.TABLES,
    **text.TABLES,
    **asynchrony.TABLES,
}
PLOTS: Mapping[str, Maker] = plots.PLOTS


def _gpu(folder: Path) -> Mapping[str, str]:
    # Needs torch, which the other tables do not.
    from benchmarks.gpu import table as gpu_table

    return gpu_table.tables(folder)


# Records that make several tables at once: a function of their folder under benchmarks/results, by its name, that gives
# {name: Markdown}. On the pages they are FOLDER-NAME.
RECORDS: dict[str, Callable[[Path], Mapping[str, str]]] = {"gpu": _gpu}
# The one table that says what all others are made from.
FILES = "files"


class NotMade(ValueError):
    """A table cannot be made from what the result files hold."""


@dataclass(frozen=True)
class Made:
    """Markdown of every table, SVG of every plot, and the result files that each was made from."""

    tables: dict[str, str]
    plots: dict[str, str]
    sources: dict[str, list[str]]


def make(
    folder: Path,
    tables: Mapping[str, Maker] = TABLES,
    plots: Mapping[str, Maker] = PLOTS,
    records: Mapping[str, Callable[[Path], Mapping[str, str]]] = RECORDS,
) -> Made:
    """Everything, from the result files in ``folder``. Raises `MissingResult` or `NotMade`, with the table's name."""
    sources: dict[str, list[str]] = {}

    def run(name: str, maker: Maker) -> str:
        results = Results(folder)
        try:
            made = maker(results)
        except MissingResult as error:
            raise MissingResult(f"{name}: {error}") from error
        except (LookupError, TypeError, ValueError) as error:
            raise NotMade(
                f"{name}: {', '.join(results.used)} does not hold what the table needs "
                f"({type(error).__name__}: {error}): make the file anew, or change the table"
            ) from error
        sources[name] = results.used
        return made

    texts = {name: run(name, maker) for name, maker in tables.items()}
    drawn = {name: run(name, maker) for name, maker in plots.items()}
    for record, several in records.items():
        try:
            found = several(folder / record)
        except ValueError as error:
            raise NotMade(f"{record}: {error}") from error
        for name, made in found.items():
            texts[f"{record}-{name}"] = made
            sources[f"{record}-{name}"] = [f"{record}/"]
    uses: dict[str, list[str]] = {}
    for name, used in sources.items():
        for file in used:
            uses.setdefault(file, []).append(f"`{name}`")
    texts[FILES] = run(FILES, lambda results: files.files(results.folder, uses))
    sources[FILES] = sorted(path.name for path in folder.glob("*.json"))
    return Made(texts, drawn, sources)
