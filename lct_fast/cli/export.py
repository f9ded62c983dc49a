"""lct-fast export: one exit of a run as a plain module in a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lct_fast import exported
from lct_fast.cli import build
from lct_fast.cli.config import ConfigError
from lct_fast.cli.evaluate import table
from lct_fast.cli.load_run import TrainedRun, load_run
from lct_fast.data import TextData
from lct_fast.engine.network.exits import collect
from lct_fast.engine.network.group import parameter_count
from lct_fast.engine.network.structures import smallest, structures


def add_parser(subparsers: Any) -> None:
    """Registers ``export``."""
    parser = subparsers.add_parser("export", help="write one exit as a plain module")
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("--exit", type=int, help="1..K (default: the last)")
    parser.add_argument(
        "--under-macs", metavar="N", help="the most accurate exit of at most N MACs a sample, e.g. 40M"
    )
    parser.add_argument(
        "--min-accuracy",
        metavar="A",
        help="the exit of fewest MACs with this test accuracy, e.g. 0.9 or 90%%; with --under-macs, both hold",
    )
    parser.add_argument("--out", type=Path, required=True, help="FILE.safetensors or FILE.pt2")
    parser.add_argument("--data", help="another place of the data set")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs ``export``."""
    if args.out.suffix not in (".safetensors", ".pt2"):
        raise ConfigError(f"--out: expected FILE.safetensors or FILE.pt2, got {args.out.name!r}")
    limit, least = _macs(args.under_macs), _accuracy(args.min_accuracy)
    asked = limit is not None or least is not None
    if asked and args.exit is not None:
        raise ConfigError("--exit names the exit: leave it out where --under-macs or --min-accuracy chooses")
    trained = load_run(args.folder, args.data)
    config, images, trainer = trained.config, trained.images, trained.trainer
    count = len(trainer.groups)
    k = _choose(trained, limit, least) if asked else count if args.exit is None else args.exit
    module = trainer.module(exit=k)
    description = {
        "model": config.model,
        "classes": images.classes,
        "split": config.split if count > 1 else [],
        "critic": config.critic,
        "exit": k,
    }
    if isinstance(images, TextData):
        description["window"] = config.window
    else:
        description |= {
            "channels": images.train_images.shape[1],
            "size": images.train_images.shape[2],
            "mean": images.mean.flatten().tolist(),
            "std": images.std.flatten().tolist(),
        }
    exported.save(module, args.out, description)
    print(f"exit {k} of {count}: {parameter_count(module):,} parameters -> {args.out}")
    return 0


def _choose(trained: TrainedRun, limit: int | None, least: float | None) -> int:
    """The exit that meets the constraints, by its accuracy on the test set."""
    test = build.test_batches(trained.config, trained.images, trained.device)
    groups = trained.trainer.groups
    found = structures(groups, *collect(groups, ((x, y) for _, x, y in test.epoch(0))))
    chosen = smallest(found, limit, least).exit
    print(table(found, chosen))
    return chosen


def _macs(text: str | None) -> int | None:
    if text is None:
        return None
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 0)
    try:
        value = float(text[:-1]) * scale if scale else float(text)
        if 0 < value < float("inf"):
            return int(value)
    except ValueError:
        pass
    raise ConfigError(f"--under-macs: expected a positive number such as 40M or 40000000, got {text!r}")


def _accuracy(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if 0 < value <= 1:
            return value
    except ValueError:
        pass
    raise ConfigError(f"--min-accuracy: expected a fraction in (0, 1] or per cent, got {text!r}")
