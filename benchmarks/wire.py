"""Accuracy and bytes of the wire codecs, each beside the same training without one, as committed result files.

    python -m benchmarks.wire digits  --out benchmarks/results/wire_digits.json
    python -m benchmarks.wire cifar10 --data DIR --out benchmarks/results/wire_cifar10.json

Every codec is trained with the same seed and data as "none", so differences are taken in pairs: per fold of all 1,797
digits and seed, or per seed on CIFAR-10. The interval is Student's, 95 %, over the pairs. Rows of vq also say how far
they are ahead of the codecs that need no codebook, in pairs too. Each run is one `lct-fast train`; run folders lie in
--runs, and a run already complete there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

from benchmarks.accuracy import POOLED, Run, execute
from lct_fast.data.digits import FOLDS

METHODS = ("greedy", "local-critic")
# Of CIFAR-10's critics: the default for images.
LOSS = {"greedy": [], "local-critic": ["--critic-loss", "half_sided"]}
# Bits a value without codebooks.
BITS = {
    "none": 32.0,
    "int4": 4.25,
    "int2": 2.25,
    "int2:256": 2.0625,
    "topk:16": 2.0,
    "vq:256,4": 2.0,
    "vq:128,4": 1.75,
    "vq:256,8": 1.0,
}
# Without codebooks, at about two bits a value.
RIVALS = ("int2", "int2:256", "topk:16")
# The first cut of LCT's net carries 4 of 7 values. The same error at each cut, about, where vectors are patches as long
# as these say more than channels do.
PATCHES = "vq:128,4,2 vq:256,4,2 vq:256,4"
CIFAR10_BITS = BITS | {
    PATCHES: (4 * 1.75 + 3 * 2.0) / 7,
}

# By seed and fold.
Runs = dict[tuple[Any, ...], dict[str, Any]]


def digits(codecs: Iterable[str], seeds: int) -> list[Run]:
    """Every fold, codec, method and seed at the data set's default options, 4 groups."""
    return [
        Run(
            f"{method}-{_safe(codec)}-fold{fold}-seed{seed}",
            [
                *("--data", f"digits:fold={fold}", "--method", method, "--groups", "4"),
                *("--codec", codec, "--seed", str(seed)),
            ],
        )
        for seed in range(seeds)
        for fold in range(FOLDS)
        for codec in codecs
        for method in METHODS
    ]


def cifar10(
    codecs: Iterable[str], seeds: int, data: str, images: int, epochs: int, methods: Iterable[str] = METHODS
) -> list[Run]:
    """LCT's net (a) at a quarter of its width, 4 groups, critics on 4x4 pooling."""
    return [
        Run(
            f"{'-'.join([method, *LOSS[method][1:2]])}-{_safe(codec)}-seed{seed}",
            [
                *("--data", f"cifar10:{data}", "--limit", str(images), "--model", "lct_vgg:width=0.25"),
                *("--groups", "4", "--critic", POOLED, "--epochs", str(epochs), "--method", method),
                *("--critic-lr", "1e-3", *LOSS[method], "--codec", *codec.split(), "--seed", str(seed)),
            ],
        )
        for seed in range(seeds)
        for codec in codecs
        for method in methods
    ]


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and codec: accuracy of the last exit, bytes, and paired differences."""
    rows = []
    for method in METHODS:
        by_codec: dict[str, Runs] = {}
        for r in results:
            if r["method"] == method:
                pair = (r["seed"], next((o for o in r["options"] if o.startswith("digits:")), ""))
                by_codec.setdefault(r["codec"], {})[pair] = r
        for codec, runs in by_codec.items():
            plain, coded = _differences(runs, by_codec["none"])
            ratio = mean(r["raw_bytes_per_sample"] / r["wire_bytes_per_sample"] for r in runs.values())
            rows.append(
                {
                    "method": method,
                    "codec": codec,
                    "runs": len(runs),
                    "accuracy": mean(100 * r["test_accuracy"] for r in runs.values()),
                    "accuracy_coded_evaluation": mean(100 * _coded(r) for r in runs.values()),
                    "points_from_none": interval(plain),
                    "points_from_none_coded_evaluation": interval(coded),
                    "points_ahead_of": _ahead(by_codec, codec) if codec.startswith("vq:") else {},
                    "times_fewer_bytes": ratio,
                    "times_fewer_bytes_without_codebooks": 32 / CIFAR10_BITS[codec],
                    "bytes_over_theory": 32 / CIFAR10_BITS[codec] / ratio - 1,
                }
            )
    return rows


def _differences(runs: Runs, others: Runs) -> tuple[list[float], list[float]]:
    """Points from the other run of the same pair, without the codec at evaluation and with it."""
    pairs = sorted(runs.keys() & others.keys())
    return (
        [100 * (runs[p]["test_accuracy"] - others[p]["test_accuracy"]) for p in pairs],
        [100 * (_coded(runs[p]) - _coded(others[p])) for p in pairs],
    )


def _ahead(by_codec: dict[str, Runs], codec: str) -> dict[str, dict[str, Any]]:
    """Points by which a codec is ahead of each rival that was trained with a seed and fold of its own."""
    ahead = {}
    for rival in RIVALS:
        plain, coded = _differences(by_codec[codec], by_codec.get(rival, {}))
        if plain:
            ahead[rival] = {
                "pairs": len(plain),
                "plain": interval(plain),
                "coded_evaluation": interval(coded),
            }
    return ahead


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean and the half-width of its 95 % interval; no interval from one value."""
    if len(values) < 2:
        return {"mean": mean(values), "half_width": None}
    spread = stdev(values) / math.sqrt(len(values))
    return {"mean": mean(values), "half_width": float(student.ppf(0.975, len(values) - 1)) * spread}


def _coded(run: dict[str, Any]) -> float:
    coded = run["coded_exit_test_accuracy"]
    return float(coded[-1] if coded else run["test_accuracy"])


def _safe(codec: str) -> str:
    return codec.replace(":", "_").replace(",", "_").replace(" ", "-")


def main() -> int:
    """Runs a suite and writes its result file after every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=("digits", "cifar10"))
    parser.add_argument("--codecs", nargs="+", help="codecs, none among them; one for each cut in quotes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="cifar10: methods")
    parser.add_argument("--seeds", type=int, default=1, help="seeds, from 0")
    parser.add_argument(
        "--collect", action="store_true", help="start no run: the result file of those that are complete"
    )
    parser.add_argument("--data", help="cifar10: the data set's PATH")
    parser.add_argument("--images", type=int, default=12500, help="cifar10: training images")
    parser.add_argument("--epochs", type=int, default=8, help="cifar10: epochs")
    parser.add_argument("--runs", type=Path, help="where run folders go (default runs/wire-SUITE)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a run")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    args = parser.parse_args()
    if args.suite == "cifar10" and not args.data:
        parser.error("cifar10 needs --data PATH")
    known = BITS if args.suite == "digits" else CIFAR10_BITS
    codecs = args.codecs or list(known)
    if "none" not in codecs or set(codecs) - set(known):
        parser.error(f"--codecs: expected none and any of {', '.join(known)}")
    if args.suite == "digits":
        runs = digits(codecs, args.seeds)
    else:
        runs = cifar10(codecs, args.seeds, args.data, args.images, args.epochs, args.methods)
    folder = args.runs or Path("runs") / f"wire-{args.suite}"
    if args.collect:
        runs = [run for run in runs if (folder / run.name / "summary.json").exists()]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda run: execute(run, folder, args.threads), runs):
            results.append(result)
            if any(r["codec"] == "none" and r["method"] == result["method"] for r in results):
                rows = table([r for r in results if r["method"] in _based(results)])
                args.out.write_text(
                    json.dumps({"suite": args.suite, "rows": rows, "runs": results}, indent=1) + "\n"
                )
    for row in rows:
        difference, half = row["points_from_none"]["mean"], row["points_from_none"]["half_width"]
        about = "" if half is None else f" +- {half:.2f}"
        print(
            f"{row['method']:<13} {row['codec']:<9} {row['accuracy']:6.2f} %  {difference:+.2f}{about} points  "
            f"{row['times_fewer_bytes']:.1f}x fewer bytes"
        )
    return 0


def _based(results: list[dict[str, Any]]) -> set[str]:
    """Methods that have been trained without a codec."""
    return {r["method"] for r in results if r["codec"] == "none"}


if __name__ == "__main__":
    sys.exit(main())
