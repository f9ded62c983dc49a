"""``lct-fast report``: compare runs in one HTML file."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # What argparse gives for add_subparsers() has no public name.
    from argparse import _SubParsersAction


def add_parser(subparsers: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command ``report``."""
    parser = subparsers.add_parser(
        "report",
        help="compare runs in one HTML file",
        description="Write one self-contained HTML file that compares runs: accuracy and loss per exit, "
        "gradients, bytes over the cuts, codebooks, timelines, configurations. A run may still be in progress.",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="run folder, as written by train --out"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="HTML file to write (default: report.html in RUN; here for several)",
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report; returns the exit status. Raises ValueError, one line, for a bad run or file."""
    from lct_fast.report.page import write
    from lct_fast.report.run import read_run
    from lct_fast.report.table import comparison

    runs: list[Path] = args.runs
    records = [comparison(read_run(path)) for path in runs]
    out: Path = args.out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    try:
        write(runs, out)
    except OSError as error:
        raise ValueError(
            f"{out}: expected a file that can be written: {error.strerror}; choose another --out"
        ) from error
    if args.json:
        print(json.dumps({"report": str(out), "runs": records}, indent=2, default=str))
        return 0
    for record in records:
        accuracy = record["test_accuracy"]
        which = "network" if len(record["exit_test_accuracy"]) == 1 else "last exit"
        told = "no accuracy yet" if accuracy is None else f"{accuracy:.2%} {which}"
        print(f"{record['name']}: {record['method'] or 'unknown method'}, {told}")
    print(f"wrote {out}")
    return 0
