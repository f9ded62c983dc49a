"""Cheap critics and critic losses, beside the paper's convolutional critic and back-propagation, on CIFAR-10.

    python -m benchmarks.critics screen --data DIR --out benchmarks/results/critics.json
    python -m benchmarks.critics seeds  --data DIR --out benchmarks/results/critics.json
    python -m benchmarks.critics finals --data DIR --out benchmarks/results/critics.json

LCT's net (a) at a quarter of its width, 4 groups, no codec. `screen`: every contender once, 5,000 training images and 5
epochs. `seeds`: `FINALISTS` at that size over 3 seeds. `finals`: the same at 12,500 images and 8 epochs. --contenders
takes others by name. All write one file, after every run; run folders lie in --runs, and a run that is complete there
is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.accuracy import CONV, POOLED, Run, execute
from benchmarks.tables.critics import cells

CHEAP = (
    "pooled_linear:pool=1",
    "pooled_linear:pool=2",
    "pooled_linear:pool=8",
    "depthwise:stride=2",
    "shared",
)
# 195 batches hold 4 periods, 776 hold 19.
SERIAL = ("--serial", "0.1", "--serial-block", "4")
# Changes no bit of a run.
DIAGNOSE = ("--diagnose", "15")


@dataclass(frozen=True)
class Part:
    """How long its runs are, and over which seeds; parts of one ``folder`` share their runs."""

    folder: str
    images: int
    epochs: int
    seeds: tuple[int, ...]


PARTS = {
    "screen": Part("screen", 5000, 5, (0,)),
    "seeds": Part("screen", 5000, 5, (0, 1, 2)),
    "finals": Part("finals", 12500, 8, (0, 1, 2)),
}


@dataclass(frozen=True)
class Contender:
    """What is compared; ``loss``, ``rate`` and ``target`` are the critics' own, for local-critic."""

    method: str
    critic: str = POOLED
    loss: str = "l1"
    rate: str = "1e-3"
    target: str = "next"
    serial: bool = False

    @property
    def name(self) -> str:
        parts = [self.method]
        if self.method != "backprop":
            parts.append(self.critic)
        if self.method == "local-critic":
            parts += [self.loss, self.rate] + (["last"] if self.target == "last" else [])
        if self.serial:
            parts.append("serial")
        return "-".join(part.translate(str.maketrans(":=,", "___")) for part in parts)

    @property
    def options(self) -> list[str]:
        options = ["--method", self.method, "--critic", self.critic, *(SERIAL if self.serial else ())]
        if self.method == "local-critic":
            options += ["--critic-loss", self.loss, "--critic-lr", self.rate, "--critic-target", self.target]
        return options


def _local(critic: str = POOLED, loss: str = "half_sided", **options: Any) -> Contender:
    return Contender("local-critic", critic, loss, **options)


CONTENDERS = [
    Contender("backprop"),
    Contender("greedy", POOLED),
    Contender("greedy", CONV),
    *(_local(loss=loss) for loss in ("l1", "one_sided", "half_sided", "mixed:0.9", "mixed:1")),
    _local(CONV, "l1", rate="1e-4"),
    _local(CONV),
    *(Contender("greedy", critic) for critic in (*CHEAP, "mlp_sr_aux")),
    *(_local(critic) for critic in CHEAP[1:]),
    *(_local(loss=loss, target="last") for loss in ("l1", "half_sided")),
    Contender("greedy", POOLED, serial=True),
    *(_local(loss=loss, serial=True) for loss in ("l1", "half_sided")),
    _local(rate="1e-4"),
]
FINALISTS = [
    _local(loss="l1"),
    _local(),
    *(Contender("greedy", critic) for critic in (POOLED, "pooled_linear:pool=8", "depthwise:stride=2")),
]


def runs(part: str, contenders: list[Contender], data: str) -> list[Run]:
    """Every contender and seed of a part, seed by seed."""
    size = PARTS[part]
    return [
        Run(
            f"{size.folder}-{contender.name}-seed{seed}",
            [
                *("--data", f"cifar10:{data}", "--limit", str(size.images), "--epochs", str(size.epochs)),
                *("--model", "lct_vgg:width=0.25", "--groups", "4", "--seed", str(seed)),
                *contender.options,
                *DIAGNOSE,
            ],
        )
        for seed in size.seeds
        for contender in contenders
    ]


def table(part: str, contenders: list[Contender], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a contender: accuracy of every exit in %, its mean and deviation over the seeds, cosines, cost, seconds."""
    rows = []
    for contender in contenders:
        names = [f"{PARTS[part].folder}-{contender.name}-seed{seed}" for seed in PARTS[part].seeds]
        found = [r for r in results if r["name"] in names]
        if not found:
            continue
        exits = list(zip(*(r["exit_test_accuracy"] for r in found), strict=True))
        rows.append(
            {
                "contender": contender.name,
                **asdict(contender),
                "seeds": [r["seed"] for r in found],
                "exit_accuracy": [100 * mean(values) for values in exits],
                "exit_accuracy_sd": [100 * stdev(v) if len(v) > 1 else None for v in exits],
                "gradient_cosine": _cosines(found),
                "critic_mac_share": found[0]["critic_mac_share"],
                "critic_tax": _mean(r["critic_tax"] for r in found),
                "seconds": mean(r["seconds"] for r in found),
            }
        )
    return rows


def _cosines(found: list[dict[str, Any]]) -> list[float] | None:
    """Of each group's gradient to the true one, late in training: mean over the runs that were diagnosed."""
    known = [r["diagnosis"]["gradient_cosine"] for r in found if r.get("diagnosis")]
    return [mean(values) for values in zip(*known, strict=True)] if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def main(argv: list[str] | None = None) -> int:
    """Makes the runs of a part that are missing, and writes the file after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--data", required=True, help="CIFAR-10's PATH")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="some of them, by name")
    parser.add_argument("--runs", type=Path, default=Path("runs/critics"), help="where run folders go")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON), made or added to")
    args = parser.parse_args(argv)
    chosen = CONTENDERS if args.part == "screen" else FINALISTS
    if args.contenders:
        known = {contender.name: contender for contender in CONTENDERS}
        unknown = set(args.contenders) - known.keys()
        if unknown:
            parser.error(f"--contenders: no {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        chosen = [known[name] for name in args.contenders]
    content: dict[str, Any] = {"suite": "critics"}
    if args.out.exists():
        content = json.loads(args.out.read_text())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for run in runs(args.part, chosen, args.data):
        results.append(execute(run, args.runs, args.threads))
        content[args.part] = {"rows": table(args.part, chosen, results), "runs": results}
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    for row in content[args.part]["rows"]:
        print(f"| {' | '.join(cells(row))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
