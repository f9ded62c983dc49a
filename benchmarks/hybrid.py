"""What a share q of serial steps does for accuracy, and what it costs in bytes and time.

    python -m benchmarks.hybrid accuracy --out benchmarks/results/hybrid.json [--seeds 3]
    python -m benchmarks.hybrid times    --out benchmarks/results/hybrid.json

Both train the digits by `lct-fast train` with the data set's defaults, greedy and local-critic, for q = 0, 0.03, 0.1
and 0.25, and add to one file; a run that is in the file is not repeated. `accuracy`: 4 groups in one process.
`times`: 2 groups in two processes of one thread, joined by torchrun, serial steps in 2 microbatches; its times mean
something where `foreign_cpu_share`, what other programs took of the machine meanwhile, is small.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

from lct_fast.bench.machine import Watch, header

METHODS = ("greedy", "local-critic")
SHARES = (0.0, 0.03, 0.1, 0.25)
# 440 batches hold 6 periods at the smallest share.
SHORT = ("--serial-block", "2")
# 1,760 batches hold 3.
LONG = ("--epochs", "80", "--serial-block", "16", "--serial-microbatches", "2")


@dataclass(frozen=True)
class Run:
    """One training run: the part of the file it belongs to, and the options after `lct-fast train`."""

    part: str
    method: str
    share: float
    seed: int
    processes: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.part}-{self.method}-q{self.share:g}-seed{self.seed}"

    def command(self, out: Path, epochs: int | None) -> list[str]:
        launcher = [sys.executable, "-m"]
        if self.processes > 1:
            torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
            launcher = [*launcher, *torchrun, "-m"]
        options = [
            *("--data", "digits", "--method", self.method, "--serial", str(self.share)),
            *("--seed", str(self.seed), "--threads", "1", *self.options),
        ]
        if epochs is not None:
            options += ["--epochs", str(epochs)]
        return [*launcher, "lct_fast", "train", *options, "--json", "--out", str(out)]


def runs(part: str, seeds: int) -> list[Run]:
    """All runs of a part."""
    if part == "accuracy":
        options: tuple[str, ...] = ("--groups", "4", *SHORT)
        return [Run(part, m, q, s, 1, options) for s in range(seeds) for m in METHODS for q in SHARES]
    options = ("--groups", "2", "--schedule", "pipelined", *LONG)
    return [Run(part, m, q, 0, 2, options) for m in METHODS for q in SHARES]


def execute(run: Run, epochs: int | None) -> dict[str, Any]:
    """Trains, and returns what the file keeps of it."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        with watch:
            done = subprocess.run(
                run.command(out, epochs),
                capture_output=True,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        if done.returncode:
            raise RuntimeError(f"{run.name}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        summary = json.loads((out / "summary.json").read_text())
    serial = summary["serial"] or {"steps": 0, "seconds": 0.0}
    others = summary["steps"] - serial["steps"]
    return {
        "name": run.name,
        "part": run.part,
        "share": run.share,
        "options": list(run.options),
        "serial_step_seconds": serial["seconds"] / serial["steps"] if serial["steps"] else None,
        "other_step_seconds": (summary["seconds"] - serial["seconds"]) / others if others else None,
        "foreign_cpu_share": watch.foreign_cpu_share,
        **summary,
    }


def table(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Per part, method and share: accuracy of each exit over the seeds, bytes a sample, milliseconds a step."""
    rows: dict[str, Any] = {}
    for part in ("accuracy", "times"):
        for method in METHODS:
            for share in SHARES:
                found = [r for r in results if (r["part"], r["method"], r["share"]) == (part, method, share)]
                if found:
                    row = _row(found)
                    rows.setdefault(part, {}).setdefault(method, {})[f"{share:g}"] = row
    return rows


def _row(found: list[dict[str, Any]]) -> dict[str, Any]:
    exits = list(zip(*(r["exit_test_accuracy"] for r in found), strict=True))
    steps = {
        kind: [r[f"{kind}_step_seconds"] for r in found if r[f"{kind}_step_seconds"]]
        for kind in ("serial", "other")
    }
    return {
        "seeds": len(found),
        "exit_test_accuracy": [mean(values) for values in exits],
        "exit_test_accuracy_sd": [stdev(values) if len(values) > 1 else None for values in exits],
        "serial_steps": [(r["serial"] or {"steps": 0})["steps"] for r in found],
        "wire_bytes_per_sample": mean(r["wire_bytes_per_sample"] for r in found),
        "raw_bytes_per_sample": mean(r["raw_bytes_per_sample"] for r in found),
        "serial_step_ms": 1e3 * mean(steps["serial"]) if steps["serial"] else None,
        "other_step_ms": 1e3 * mean(steps["other"]) if steps["other"] else None,
        "foreign_cpu_share": max(r["foreign_cpu_share"] for r in found),
    }


def main(argv: list[str] | None = None) -> int:
    """Makes the runs that are missing and writes the file after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("accuracy", "times"))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0.. of each run of accuracy (default 3)")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON), made or added to")
    parser.add_argument("--epochs", type=int, help="shorter or longer runs: a trial of the code")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    results: list[dict[str, Any]] = []
    if args.out.exists():
        results = json.loads(args.out.read_text())["runs"]
    missing = [r for r in runs(args.part, args.seeds) if r.name not in {known["name"] for known in results}]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for run in tqdm(missing, unit="run"):
        result = execute(run, args.epochs)
        results.append(result)
        content = {"suite": "hybrid", "machine": header("cpu"), "table": table(results), "runs": results}
        args.out.write_text(json.dumps(content, indent=1) + "\n")
        exits = " ".join(f"{a:.2%}" for a in result["exit_test_accuracy"])
        tqdm.write(f"{run.name:<36} exits {exits}  {result['wire_bytes_per_sample']:.0f} bytes a sample")
    return 0


if __name__ == "__main__":
    sys.exit(main())
