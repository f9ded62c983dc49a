"""Every method on the digits, 2 and 4 groups, five seeds: accuracy, seconds and bytes, as a committed result file.

    python -m benchmarks.methods --out benchmarks/results/methods.json

Each run is one `lct-fast train` at the data set's default options; run folders lie in --runs, and a run already
complete there is not repeated. `--jobs 2 --threads 1` runs two at a time. Seconds are of a run as it was, beside
whatever else ran.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.accuracy import Run, execute

GROUPS = (2, 4)
# By label, the options after --data digits.
METHODS = {
    "backprop": ["--method", "backprop"],
    "local-critic": ["--method", "local-critic"],
    "greedy": ["--method", "greedy"],
    "local-critic, vq:128,4": ["--method", "local-critic", "--codec", "vq:128,4"],
    "greedy, vq:128,4": ["--method", "greedy", "--codec", "vq:128,4"],
    "penalty": ["--method", "penalty"],
    "penalty, q = 0.2": ["--method", "penalty", "--serial", "0.2"],
    "augmented-lagrangian": ["--method", "augmented-lagrangian"],
    "augmented-lagrangian, q = 0.2": ["--method", "augmented-lagrangian", "--serial", "0.2"],
    "likelihood-ratio, boundary, 8 copies": ["--method", "likelihood-ratio", "--copies", "8"],
    "likelihood-ratio, layer-wise, 8 copies, mlp": [
        *("--method", "likelihood-ratio", "--noise", "logits", "--copies", "8"),
        *("--model", "mlp:hidden=64,depth=3"),
    ],
}


def runs(seeds: int, labels: list[str]) -> list[Run]:
    """Seeds outermost, so that a run cut short has all methods."""
    return [
        Run(
            f"{label.replace(', ', '-').replace(' ', '').replace(':', '_').replace(',', '_')}-k{k}-seed{seed}",
            ["--data", "digits", *METHODS[label], "--groups", str(k), "--seed", str(seed)],
        )
        for seed in range(seeds)
        for label in labels
        for k in GROUPS
        # Back-propagation has one group whatever is asked for.
        if label != "backprop" or k == GROUPS[0]
    ]


def table(results: list[dict[str, Any]], labels: list[str]) -> list[dict[str, Any]]:
    """A row for each method and number of groups."""
    rows = []
    for label in labels:
        for k in GROUPS:
            wanted = METHODS[label]
            found = [
                r
                for r in results
                if r["options"][2:-4] == wanted and r["options"][-4:-2] == ["--groups", str(k)]
            ]
            if not found:
                continue
            accuracy = [100 * r["test_accuracy"] for r in found]
            rows.append(
                {
                    "method": label,
                    "groups": found[0]["groups"],
                    "seeds": len(found),
                    "accuracy": mean(accuracy),
                    "sd": stdev(accuracy) if len(found) > 1 else None,
                    "values": accuracy,
                    "seconds": mean(r["seconds"] for r in found),
                    "wire_bytes_per_sample": mean(r["wire_bytes_per_sample"] for r in found),
                    "feedback_bytes_per_sample": mean(r["feedback_bytes_per_sample"] for r in found),
                }
            )
    return rows


def main() -> int:
    """Runs all methods and writes the result file after every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds, from 0")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="where run folders go")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(
            lambda run: execute(run, args.runs, args.threads), runs(args.seeds, args.methods)
        ):
            results.append(result)
            rows = table(results, args.methods)
            args.out.write_text(
                json.dumps({"suite": "methods", "rows": rows, "runs": results}, indent=1) + "\n"
            )
    for row in rows:
        spread = "" if row["sd"] is None else f" +- {row['sd']:.2f}"
        print(
            f"{row['method']:<32} {row['groups']} groups {row['accuracy']:6.2f}{spread} %  {row['seconds']:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
