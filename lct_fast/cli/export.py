"""lct-fast export: one exit of a run as a plain module in a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lct_fast import exported
from lct_fast.cli.config import ConfigError
from lct_fast.cli.load_run import load_run
from lct_fast.data import TextData
from lct_fast.engine.group import parameter_count


def add_parser(subparsers: Any) -> None:
    """Registers ``export``."""
    parser = subparsers.add_parser("export", help="write one exit as a plain module")
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("--exit", type=int, help="1..K (default: the last)")
    parser.add_argument("--out", type=Path, required=True, help="FILE.safetensors or FILE.pt2")
    parser.add_argument("--data", help="another place of the data set")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs ``export``."""
    if args.out.suffix not in (".safetensors", ".pt2"):
        raise ConfigError(f"--out: expected FILE.safetensors or FILE.pt2, got {args.out.name!r}")
    trained = load_run(args.folder, args.data)
    config, images, trainer = trained.config, trained.images, trained.trainer
    count = len(trainer.groups)
    k = count if args.exit is None else args.exit
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
