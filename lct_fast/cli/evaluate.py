"""lct-fast eval: a trained run's exits, progressive inference and ensemble."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from lct_fast.cli import build
from lct_fast.cli.config import ConfigError
from lct_fast.cli.load_run import load_run
from lct_fast.cli.recorder import bits_per_character
from lct_fast.data import TextData
from lct_fast.engine.exits import accuracy, collect, ensemble, progressive


def add_parser(subparsers: Any) -> None:
    """Registers ``eval``."""
    parser = subparsers.add_parser("eval", help="test accuracy of a run's exits")
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("--exit", help="K | last | progressive:T | ensemble; default: all of them")
    parser.add_argument("--data", help="another place of the data set")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs ``eval``."""
    trained = load_run(args.folder, args.data)
    test = build.test_batches(trained.config, trained.images, trained.device)
    count = len(trained.trainer.groups)
    wanted = _parse(args.exit, count)
    logits, labels = collect(trained.trainer.groups, ((x, y) for _, x, y in test.epoch(0)))
    result: dict[str, Any] = {}
    for name in wanted:
        kind, _, value = name.partition(":")
        if kind == "progressive":
            p = progressive(logits, labels, float(value))
            result[name] = {"accuracy": p.accuracy, "leaving": p.leaving}
        elif kind == "ensemble":
            result[name] = {"accuracy": ensemble(logits, labels)}
        else:
            result[f"exit {value}"] = {"accuracy": accuracy(logits[int(value) - 1], labels)}
            if isinstance(trained.images, TextData):
                loss = float(F.cross_entropy(logits[int(value) - 1], labels))
                result[f"exit {value}"] |= {"loss": loss, "bits_per_character": bits_per_character(loss)}
    if args.json:
        print(json.dumps({"samples": len(labels), "results": result}))
        return 0
    what = "characters" if isinstance(trained.images, TextData) else "images"
    print(f"{trained.images.name}, {len(labels)} test {what}")
    for name, row in result.items():
        leaving = (
            "  leaving at each exit: " + " ".join(f"{s:.1%}" for s in row["leaving"])
            if "leaving" in row
            else ""
        )
        bits = f"  {row['bits_per_character']:.3f} bits per character" if "bits_per_character" in row else ""
        print(f"{name:<18} {row['accuracy']:7.2%}{bits}{leaving}")
    return 0


def _parse(text: str | None, count: int) -> list[str]:
    """Names like "exit:2", "progressive:0.9", "ensemble"."""
    if text is None:
        every = [f"exit:{k}" for k in range(1, count + 1)]
        return every + (["progressive:0.9", "progressive:0.95", "ensemble"] if count > 1 else [])
    kind, _, value = text.partition(":")
    if text == "last":
        return [f"exit:{count}"]
    if text == "ensemble":
        return [text]
    if text.isdigit() and 1 <= int(text) <= count:
        return [f"exit:{text}"]
    if kind == "progressive":
        try:
            if 0 < float(value) <= 1:
                return [text]
        except ValueError:
            pass
        raise ConfigError(f"--exit progressive:T: expected T in (0, 1], got {value!r}")
    raise ConfigError(f"--exit: expected 1..{count}, last, progressive:T or ensemble; got {text!r}")
