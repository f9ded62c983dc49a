"""Accuracy of asynchronous greedy learning on the digits, over slow-down and buffer size, as a committed result file.

    python -m benchmarks.asynchrony --seeds 3 --out benchmarks/results/asynchrony.json

Greedy, 4 groups, the defaults of `lct-fast train --data digits`; group 3, in the middle, is slow. Beside them the same
in lockstep. Runs that are in the file are not repeated, so a run cut short goes on, and more seeds may follow.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tqdm import tqdm

from lct_fast.bench.machine import header
from lct_fast.cli import main as lct_fast

SLOW_GROUP = 3
SLOW_DOWNS = (1.0, 1.2, 1.5, 2.0)
BUFFERS = (1, 10, 50)
KEPT = ("steps", "test_accuracy", "exit_test_accuracy", "replay")


@dataclass(frozen=True)
class Run:
    """One training run; ``slow_down`` and ``buffer`` are None in lockstep."""

    seed: int
    slow_down: float | None = None
    buffer: int | None = None

    @property
    def contender(self) -> str:
        """What is the same over all seeds."""
        if self.slow_down is None:
            return "lockstep"
        return f"async S={self.slow_down:g} M={self.buffer}"

    @property
    def options(self) -> list[str]:
        """After `lct-fast train`."""
        common = ["--data", "digits", "--method", "greedy", "--groups", "4", "--seed", str(self.seed)]
        if self.slow_down is None:
            return common
        slow = ["--slow-group", str(SLOW_GROUP), "--slow-down", str(self.slow_down)]
        return [*common, "--schedule", "async", "--buffer", str(self.buffer), *slow]


def planned(seeds: int) -> list[Run]:
    """Every contender with one seed before the next seed."""
    return [
        run
        for seed in range(seeds)
        for run in (Run(seed), *(Run(seed, s, m) for s in SLOW_DOWNS for m in BUFFERS))
    ]


def execute(run: Run) -> dict[str, Any]:
    """Trains in this process, on one thread; what the file keeps of it."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        with contextlib.redirect_stdout(io.StringIO()):
            status = lct_fast(["train", *run.options, "--threads", "1", "--out", out, "--json"])
        if status:
            raise SystemExit(f"{run.contender}, seed {run.seed}: status {status}")
        summary = json.loads((Path(out) / "summary.json").read_text())
    found = {key: summary[key] for key in KEPT}
    return {"contender": run.contender, "seed": run.seed, "options": run.options, **found}


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per contender mean and standard deviation of every exit's test accuracy."""
    table: dict[str, Any] = {}
    for contender in dict.fromkeys(run["contender"] for run in runs):
        rows = [run["exit_test_accuracy"] for run in runs if run["contender"] == contender]
        exits = [list(column) for column in zip(*rows, strict=True)]
        table[contender] = {
            "seeds": len(rows),
            "mean": [mean(column) for column in exits],
            "sd": [stdev(column) if len(column) > 1 else None for column in exits],
        }
    return table


def main() -> int:
    """Runs what is not in the file yet, and writes the file after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0..N-1 of each contender (default 5)")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    done = {(run["contender"], run["seed"]) for run in runs}
    left = [run for run in planned(args.seeds) if (run.contender, run.seed) not in done]
    about = {"command": "python -m benchmarks.asynchrony", "slow_group": SLOW_GROUP, **header("cpu")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for run in tqdm(left, unit="run"):
        result = execute(run)
        # A file that grew over several commits says which run is of which.
        runs.append({**result, "commit": about["commit"]})
        partial = args.out.with_suffix(".partial")
        partial.write_text(
            json.dumps({**about, "over_seeds": over_seeds(runs), "runs": runs}, indent=1) + "\n"
        )
        os.replace(partial, args.out)
        exits = " ".join(f"{a:.2%}" for a in result["exit_test_accuracy"])
        tqdm.write(f"{run.contender:<18} seed {run.seed}  exits {exits}")
    print(json.dumps(over_seeds(runs), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
