"""Accuracy of the methods beside back-propagation, as committed result files.

    python -m benchmarks.accuracy digits  --out benchmarks/results/digits.json
    python -m benchmarks.accuracy cifar10 --data DIR --out benchmarks/results/cifar10.json

Each run is one `lct-fast train` in a process of its own; run folders lie in --runs, and a run already complete
there is not repeated. `--jobs 2 --threads 1` runs two at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

POOLED = "pooled_linear:pool=4"
CONV = "conv_fc:convs=1,filters=32"
# The paper's critic loss; the command line has another for images.
L1 = ("--critic-loss", "l1")


@dataclass(frozen=True)
class Run:
    """One training run: a name that is also its folder, and the options after `lct-fast train`."""

    name: str
    options: list[str]


def digits() -> list[Run]:
    """Five seeds of each method at the data set's default options, 4 groups."""
    return [
        Run(
            f"{method}-seed{seed}",
            ["--data", "digits", "--method", method, "--groups", "4", "--seed", str(seed)],
        )
        for method in ("backprop", "greedy", "local-critic")
        for seed in range(5)
    ]


def cifar10(data: str, images: int, epochs: int, seed: int) -> list[Run]:
    """LCT's net (a) at a quarter of its width, 4 groups, at two schedule lengths."""
    contenders = {
        "backprop": ["--method", "backprop"],
        "greedy-pooled": ["--method", "greedy", "--critic", POOLED],
        "local-critic-pooled": ["--method", "local-critic", "--critic", POOLED, "--critic-lr", "1e-3", *L1],
        "local-critic-pooled-lr1e-4": [
            "--method",
            "local-critic",
            "--critic",
            POOLED,
            "--critic-lr",
            "1e-4",
            *L1,
        ],
        "local-critic-conv": ["--method", "local-critic", "--critic", CONV, "--critic-lr", "1e-4", *L1],
        "greedy-conv": ["--method", "greedy", "--critic", CONV],
    }
    common = [
        "--data",
        f"cifar10:{data}",
        "--limit",
        str(images),
        "--model",
        "lct_vgg:width=0.25",
        "--groups",
        "4",
        "--seed",
        str(seed),
    ]
    return [
        Run(f"{name}-{length}x", [*common, *options, "--epochs", str(epochs * length)])
        for length in (1, 3)
        for name, options in contenders.items()
    ]


def command_of(run: Run, out: Path) -> list[str]:
    """The command that trains into the folder ``out``."""
    return [sys.executable, "-m", "lct_fast", "train", *run.options, "--out", str(out)]


def result_of(run: Run, out: Path) -> dict[str, Any]:
    """The summary of a complete run, its name and its options, without the machine's paths."""
    summary = json.loads((out / "summary.json").read_text())
    options = [o if "/" not in o else o.partition(":")[0] + ":PATH" for o in run.options]
    return {"name": run.name, "options": options, **summary}


def execute(run: Run, folder: Path, threads: int) -> dict[str, Any]:
    """Trains, or reads the summary of a run that is complete; a run cut short goes on."""
    out = folder / run.name
    if not (out / "summary.json").exists():
        command = [*command_of(run, out), "--threads", str(threads)]
        if (out / "config.yaml").exists():
            command.append("--resume")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{run.name}: {done.stderr.strip().splitlines()[-1]}")
    result = result_of(run, out)
    exits = " ".join(f"{a:.2%}" for a in result["exit_test_accuracy"])
    print(
        f"{run.name:<26} {result['test_accuracy']:7.2%}  exits {exits}  {result['seconds']:.0f} s",
        flush=True,
    )
    return result


def over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and all values of last and first exit, per method."""
    table: dict[str, Any] = {}
    for method in dict.fromkeys(r["method"] for r in results):
        last = [r["test_accuracy"] for r in results if r["method"] == method]
        first = [r["exit_test_accuracy"][0] for r in results if r["method"] == method]
        table[method] = {
            "last_exit": {"mean": mean(last), "sd": stdev(last), "values": last},
            "first_exit": {"mean": mean(first), "sd": stdev(first), "values": first},
        }
    return table


def gaps(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Points behind back-propagation at each schedule length."""
    accuracy = {r["name"]: r["test_accuracy"] for r in results}
    table: dict[str, dict[str, float]] = {}
    for name, value in accuracy.items():
        contender, _, length = name.rpartition("-")
        if contender != "backprop":
            table.setdefault(contender, {})[length] = round(100 * (accuracy[f"backprop-{length}"] - value), 2)
    return table


def main() -> int:
    """Runs a suite and writes its result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=("digits", "cifar10"))
    parser.add_argument("--data", help="cifar10: the data set's PATH")
    parser.add_argument("--images", type=int, default=12500, help="cifar10: training images")
    parser.add_argument("--epochs", type=int, default=8, help="cifar10: epochs of the short schedule")
    parser.add_argument("--seed", type=int, default=0, help="cifar10: seed")
    parser.add_argument("--runs", type=Path, help="where run folders go (default runs/SUITE)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a run")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    args = parser.parse_args()
    if args.suite == "cifar10" and not args.data:
        parser.error("cifar10 needs --data PATH")
    runs = digits() if args.suite == "digits" else cifar10(args.data, args.images, args.epochs, args.seed)
    folder = args.runs or Path("runs") / args.suite
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda run: execute(run, folder, args.threads), runs))
    table = over_seeds(results) if args.suite == "digits" else gaps(results)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    key = "over_seeds" if args.suite == "digits" else "points_behind_backprop"
    args.out.write_text(json.dumps({"suite": args.suite, key: table, "runs": results}, indent=1) + "\n")
    print(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
