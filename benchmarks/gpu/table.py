"""A record of `benchmarks.gpu` as Markdown tables.

python -m benchmarks.gpu.table [DIR]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import best_rows
from benchmarks.gpu.command import SECTIONS, read_records
from lct_fast.bench.case import OURS
from lct_fast.bench.report import best_rival

RECORD = Path(__file__).parents[1] / "results" / "gpu"
NONE = "not yet measured"
Records = Mapping[str, Mapping[str, Any]]


def tables(folder: Path = RECORD, allow_fake: bool = False) -> dict[str, str]:
    """Tables of a record, by name: environment, sections, kernels, overlap, cifar10.

    What the folder has no record of reads "not yet measured", also where there is no folder. allow_fake: for tests.

    Raises:
        ValueError: a record in the folder is a fake, of a CPU in a device's place.
    """
    records = read_records(folder)
    fakes = [name for name, record in records.items() if record["fake"]]
    if fakes and not allow_fake:
        raise ValueError(
            f"{folder} holds a fake record ({', '.join(fakes)}), which says nothing of a device; "
            "give the folder of a record made without --fake"
        )
    return {
        "environment": environment(records),
        "sections": sections(records),
        "kernels": kernels(records),
        "overlap": overlap(records),
        "cifar10": cifar10(records),
    }


def environment(records: Records) -> str:
    """What it ran on. Sections that were run at different times may differ; each combination is a row."""
    keys = ("device", "torch", "triton", "cuda", "python", "commit", "sources")
    seen = dict.fromkeys(
        tuple(str(record.get(key) or "not known") for key in keys) for record in records.values()
    )
    return markdown(("device", "torch", "triton", "CUDA", "Python", "commit", "sources"), list(seen))


def sections(records: Records) -> str:
    """Every section there is, run or not."""
    rows = []
    for section in SECTIONS:
        record = records.get(section.name)
        if record is None:
            rows.append((f"`{section.name}`", NONE, "", ""))
            continue
        says = record["error"] or record["found"].get("line", "")
        rows.append((f"`{section.name}`", record["status"], f"{record['seconds']:.0f}", says))
    return markdown(("section", "status", "s", "says"), rows)


def kernels(records: Records) -> str:
    """The best backend of every op and shape beside its best rival."""
    rows = [
        row
        for record in records.values()
        for row in record["found"].get("report", {}).get("rows", [])
        if "contender" in row
    ]
    lines = [_kernel(row) for row in best_rows(rows)]
    # A kernel that is wrong has no time, and must not be missing either.
    lines += [
        (f"`{row['op']}`", row["shape"], row["backend"], f"wrong: {row['failed']}", "", "", "", "", "")
        for row in rows
        if row["contender"] == OURS and row["failed"]
    ]
    head = ("op", "shape", "backend", "ms", "p20", "p80", "best rival, ms", "times as fast", "of roofline")
    return markdown(head, lines)


def _kernel(row: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = best_rival(dict(row)) or 0.0
    rival = min(row["times_as_fast_as"], key=row["times_as_fast_as"].__getitem__)
    graphs = "" if row["graphs"] is not False else ", without graphs"
    return (
        f"`{row['op']}`",
        row["shape"],
        row["backend"] + graphs,
        *(f"{row[key] / 1e3:.4g}" for key in ("us_p50", "us_p20", "us_p80")),
        f"{rival}, {row['us_p50'] * ratio / 1e3:.4g}",
        f"{ratio:.2f}x",
        f"{row['share_of_roofline']:.0%}",
    )


def overlap(records: Records) -> str:
    """Groups on streams of one device: a step, over the compiled plain step, and shares of the step."""
    found = records.get("overlap", {}).get("found", {}).get("report", {}).get("rows", [])
    rows = [
        (
            str(row["groups"]),
            f"{row['step_us']['decoupled']['p50'] / 1e3:.4g}",
            f"{row['against_plain']:.3f}",
            _share(row["exposed_copy"]),
            _share(row["exposed_copy_through_pinned_memory"]),
            _share(row["launch_gaps"]),
        )
        for row in found
    ]
    head = (
        "groups",
        "step, ms",
        "of the plain step",
        "exposed copy",
        "the same, pinned memory",
        "launch gaps",
    )
    return markdown(head, rows)


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def cifar10(records: Records) -> str:
    """Test accuracy of the finished runs, longest schedule last."""
    rows = []
    for run in records.get("cifar10", {}).get("found", {}).get("runs", []):
        step = run["step_seconds_median"]
        rows.append(
            (
                run["method"],
                str(run["epochs"]),
                f"{100 * run['test_accuracy']:.2f}",
                " ".join(f"{100 * accuracy:.2f}" for accuracy in run["exit_test_accuracy"]),
                f"{run['seconds']:.0f}",
                "not measured" if step is None else f"{1e3 * step:.3g}",
            )
        )
    head = ("method", "epochs", "last exit, %", "every exit, %", "s a run", "ms a step")
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; one row that says so where there is nothing."""
    rows = rows or [(NONE, *[""] * (len(head) - 1))]
    lines = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    said = " ".join(str(text).split()).replace("|", "\\|")
    return said if len(said) <= 200 else said[:199] + "…"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.table", description="Print a record's tables."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=RECORD, help="default benchmarks/results/gpu")
    try:
        found = tables(parser.parse_args(arguments).folder)
    except ValueError as error:
        print(f"benchmarks.gpu.table: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(f"{name}:\n\n{text}" for name, text in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
