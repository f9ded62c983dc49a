"""Characters of a text: local critics and greedy groups beside back-propagation, at the same steps.

    python -m benchmarks.text --data tinyshakespeare.txt --out benchmarks/results/text.json [--steps 500]

A stacked LSTM of 4 layers in 2 and in 4 groups, at two lengths (``--steps`` and three times as many, each with a
learning-rate schedule of its own), in 4 groups also at six times; with other critics at the shortest, and there a
transformer of 4 blocks in 4 groups. Every run by `lct-fast train` in one process of one thread; one that is in the file
is not repeated. Bits per character are those of the last tenth of the text, the state carried through it; curves are of
training, means over intervals. Times mean something where `foreign_cpu_share`, what other programs took of the machine
meanwhile, is small.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lct_fast.bench.machine import Watch, header

LSTM = "char_lstm:layers=4,hidden=64"
TRANSFORMER = "char_transformer:layers=4,width=64,heads=4"
COMMON = ("--batch-size", "32", "--window", "32", "--log-every", "50", "--epochs", "1000")
LSTM_OPTIONS = ("--lr", "0.006")
_L1 = ("--method", "local-critic", "--critic-loss", "l1", "--critic-lr")
_ONE_SIDED = ("--method", "local-critic", "--critic-loss", "one_sided", "--critic-lr")
# Of each method, what is given beside the data set's defaults.
METHODS: dict[str, tuple[str, ...]] = {
    "backprop": ("--method", "backprop"),
    "greedy": ("--method", "greedy"),
    "local-critic l1, critic lr 5e-4": (*_L1, "0.0005"),
    "local-critic one_sided, critic lr 1e-2": (*_ONE_SIDED, "0.01"),
}
# Tried in 4 groups at the shorter length only.
CRITICS: dict[str, tuple[str, ...]] = {
    "local-critic l1, critic lr 1e-2": (*_L1, "0.01"),
    "local-critic one_sided, critic lr 5e-4": (*_ONE_SIDED, "0.0005"),
}
LONGER, LONGEST = 3, 6


@dataclass(frozen=True)
class Run:
    """One training run."""

    model: str
    method: str
    groups: int
    steps: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        kind = self.model.partition(":")[0]
        return f"{kind} {self.method} groups {self.groups} steps {self.steps}"

    def command(self, data: Path, out: Path) -> list[str]:
        options = [
            *("--data", f"text:{data}", "--model", self.model, "--groups", str(self.groups)),
            *("--steps", str(self.steps), "--threads", "1", *COMMON, *self.options),
        ]
        return [sys.executable, "-m", "lct_fast", "train", *options, "--json", "--out", str(out)]


def runs(steps: int) -> list[Run]:
    """All runs, those that say most first."""
    found = []
    for groups in (4, 2):
        for count in (steps, LONGER * steps):
            for method, options in METHODS.items():
                # Back-propagation knows no groups.
                if method != "backprop" or groups == 4:
                    found.append(Run(LSTM, method, groups, count, (*LSTM_OPTIONS, *options)))
        if groups == 4:
            critic = ("--critic", "token_linear:norm=layer")
            found += [Run(TRANSFORMER, m, 4, steps, (*critic, *options)) for m, options in METHODS.items()]
    found += [Run(LSTM, m, 4, steps, (*LSTM_OPTIONS, *options)) for m, options in CRITICS.items()]
    found += [Run(LSTM, m, 4, LONGEST * steps, (*LSTM_OPTIONS, *o)) for m, o in METHODS.items()]
    return found


def execute(run: Run, data: Path) -> dict[str, Any]:
    """Trains, and returns what the file keeps of it."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        with watch:
            done = subprocess.run(
                run.command(data, out),
                capture_output=True,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        if done.returncode:
            raise RuntimeError(f"{run.name}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        summary = json.loads((out / "summary.json").read_text())
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "name": run.name,
        "variant": run.method,
        "options": [*COMMON, *run.options],
        "curve": [_point(r) for r in records if r["kind"] == "interval"],
        "validation": [
            {"step": r["step"], "bits": r["exit_bits_per_character"]} for r in records if r["kind"] == "epoch"
        ],
        "foreign_cpu_share": watch.foreign_cpu_share,
        **summary,
    }


def _point(record: dict[str, Any]) -> dict[str, Any]:
    """Training loss of each exit, in bits, over an interval that ends with this step."""
    return {"step": record["step"], "bits": [loss / math.log(2) for loss in record["loss"]]}


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run: bits per character of each exit, and what the last is above back-propagation's at the same steps."""
    base = {(r["model"], r["steps"]): r for r in results if r["variant"] == "backprop"}
    rows = []
    for r in results:
        plain = base.get((r["model"], r["steps"]))
        bits = r["exit_bits_per_character"]
        rows.append(
            {
                "model": r["model"],
                "method": r["variant"],
                "groups": r["groups"],
                "steps": r["steps"],
                "exit_bits_per_character": bits,
                "above_backprop": bits[-1] - plain["exit_bits_per_character"][-1] if plain else None,
                "test_accuracy": r["test_accuracy"],
                "feedback_bytes_per_character": r["feedback_bytes_per_sample"],
                "wire_bytes_per_character": r["wire_bytes_per_sample"],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Makes the runs that are missing and writes the file after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the text, UTF-8")
    parser.add_argument("--steps", type=int, default=500, help="batches of the shorter runs (default 500)")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON), made or added to")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    results: list[dict[str, Any]] = []
    if args.out.exists():
        results = json.loads(args.out.read_text())["runs"]
    missing = [r for r in runs(args.steps) if r.name not in {known["name"] for known in results}]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for run in tqdm(missing, unit="run"):
        result = execute(run, args.data)
        results.append(result)
        content = {"suite": "text", "machine": header("cpu"), "table": table(results), "runs": results}
        args.out.write_text(json.dumps(content, indent=1) + "\n")
        bits = " ".join(f"{b:.3f}" for b in result["exit_bits_per_character"])
        tqdm.write(f"{run.name:<58} bits per character {bits}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
