"""Writes every table and plot anew from the committed result files, or checks that none has drifted.

    python -m benchmarks.tables [--check]

Exit status 0: written, or nothing has drifted; 1: something has, or a mark or a result file is wrong; 2: wrong option.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables.marks import MarkError, blocks, filled
from benchmarks.tables.registry import Made, NotMade, make
from benchmarks.tables.results import MissingResult

ROOT = Path(__file__).parents[2]


def pages(root: Path) -> list[Path]:
    """The pages that may hold marks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "benchmarks" / "README.md"]


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """``root``: the folder of README.md, docs/ and benchmarks/results/."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description="Tables and plots of README, docs/ and benchmarks/README.md, from benchmarks/results/*.json.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; name what has drifted, exit status 1"
    )
    args = parser.parse_args(argv)
    try:
        made = make(root / "benchmarks" / "results")
        drifted = _in_pages(root, made) + _plots(root, made)
    except (MarkError, MissingResult, NotMade) as error:
        print(error, file=sys.stderr)
        return 1
    if args.check and drifted:
        for one in drifted:
            print(f"{one.where} has drifted from {', '.join(made.sources[one.name])}", file=sys.stderr)
        print(f"{len(drifted)} drifted: run `python -m benchmarks.tables`", file=sys.stderr)
        return 1
    for one in drifted:
        one.path.parent.mkdir(parents=True, exist_ok=True)
        one.path.write_text(one.content)
        print(f"{one.where} is written")
    print(f"{len(made.tables)} tables and {len(made.plots)} plots agree with the result files")
    return 0


@dataclass(frozen=True)
class Drift:
    """A table or plot that differs: its ``name``, ``where`` it stands, and the whole file as it should be."""

    name: str
    where: str
    path: Path
    content: str


def _in_pages(root: Path, made: Made) -> list[Drift]:
    """Every block that differs. Raises `MarkError` for a wrong mark, and for what was made and stands on no page."""
    drifted: list[Drift] = []
    # What stands on pages: tables by name, and the text of all of them, where plots are shown.
    standing: set[str] = set()
    texts = ""
    for path in pages(root):
        page, content = str(path.relative_to(root)), path.read_text()
        new = filled(page, content, made.tables)
        for block in blocks(page, content):
            standing.add(block.name)
            if block.text != made.tables[block.name]:
                where = f"{page}:{block.line}: table {block.name!r}"
                drifted.append(Drift(block.name, where, path, new))
        texts += content
    for name in made.tables:
        if name not in standing:
            raise MarkError(
                f"{name}: made, and on no page: put <!-- table: {name} --> and <!-- end --> there, or take it out of "
                "benchmarks/tables"
            )
    for name in made.plots:
        if f"plots/{name})" not in texts:
            raise MarkError(
                f"{name}: drawn, and on no page: put ![what it shows](docs/plots/{name}) there, or take it out of "
                "benchmarks/tables/plots.py"
            )
    return drifted


def _plots(root: Path, made: Made) -> list[Drift]:
    """Every plot that differs or is missing. Raises `MarkError` for one that nothing draws."""
    folder = root / "docs" / "plots"
    for path in sorted(folder.glob("*")):
        if path.name not in made.plots:
            raise MarkError(
                f"docs/plots/{path.name}: benchmarks/tables/plots.py draws no such plot: delete it, or draw it"
            )
    return [
        Drift(name, f"docs/plots/{name}", folder / name, content)
        for name, content in made.plots.items()
        if not (folder / name).is_file() or (folder / name).read_text() != content
    ]


if __name__ == "__main__":
    sys.exit(main())
