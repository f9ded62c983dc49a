"""lct-fast eval: a trained run's exits, progressive inference and ensemble."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lct_fast.cli import build
from lct_fast.cli.config import ConfigError
from lct_fast.cli.load_run import load_run
from lct_fast.cli.recorder import bits_per_character
from lct_fast.data import ImageData, TextData
from lct_fast.engine.network.exits import accuracy, collect, ensemble, progressive
from lct_fast.engine.network.structures import Structure, progressive_macs, structures


def add_parser(subparsers: Any) -> None:
    """Registers ``eval``."""
    parser = subparsers.add_parser("eval", help="test accuracy of a run's exits")
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("--exit", help="K | last | progressive:T | ensemble; default: all of them")
    parser.add_argument(
        "--table", action="store_true", help="every exit with accuracy, parameters, MACs and latency"
    )
    parser.add_argument(
        "--latency-batch", type=int, default=1, help="samples in the batch that --table times (default 1)"
    )
    parser.add_argument("--data", help="another place of the data set")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs ``eval``."""
    trained = load_run(args.folder, args.data)
    test = build.test_batches(trained.config, trained.images, trained.device)
    count = sum(group.has_exit for group in trained.trainer.groups)
    wanted = _parse(args.exit, count)
    logits, labels = collect(trained.trainer.groups, ((x, y) for _, x, y in test.epoch(0)))
    if args.table:
        found = structures(trained.trainer.groups, logits, labels, args.latency_batch)
        _print_table(found, args, _of(trained.images, labels))
        return 0
    result: dict[str, Any] = {}
    for name in wanted:
        kind, _, value = name.partition(":")
        if kind == "progressive":
            p = progressive(logits, labels, float(value))
            cost = progressive_macs(trained.trainer.groups, p)
            result[name] = {"accuracy": p.accuracy, "leaving": p.leaving, "macs": cost}
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
    print(_of(trained.images, labels))
    for name, row in result.items():
        leaving = (
            "  leaving at each exit: "
            + " ".join(f"{s:.1%}" for s in row["leaving"])
            + f", {count_of(row['macs'])} MACs on average"
            if "leaving" in row
            else ""
        )
        bits = f"  {row['bits_per_character']:.3f} bits per character" if "bits_per_character" in row else ""
        print(f"{name:<18} {row['accuracy']:7.2%}{bits}{leaving}")
    return 0


def _of(data: ImageData | TextData, labels: Tensor) -> str:
    return f"{data.name}, {len(labels)} test {'characters' if isinstance(data, TextData) else 'images'}"


def _print_table(found: list[Structure], args: argparse.Namespace, data: str) -> None:
    if args.json:
        rows = [dataclasses.asdict(s) for s in found]
        print(json.dumps({"data": data, "latency_batch": args.latency_batch, "structures": rows}))
        return
    print(f"{data}; latency of a batch of {args.latency_batch}, 20th to 80th percentile")
    print(table(found))


def table(found: list[Structure], chosen: int | None = None) -> str:
    """A line for each exit; ``chosen`` is marked."""
    lines = [f"{'exit':<5} {'accuracy':>8} {'parameters':>11} {'MACs':>9} {'latency':>9}"]
    for s in found:
        low, middle, high = (1e3 * v for v in s.latency)
        mark = "  <- chosen" if s.exit == chosen else ""
        lines.append(
            f"{s.exit:<5} {s.accuracy:>8.2%} {s.parameters:>11,} {count_of(s.macs):>9} {middle:>6.2f} ms "
            f"({low:.2f} - {high:.2f}){mark}"
        )
    return "\n".join(lines)


def count_of(value: float) -> str:
    """A count as people say it: 1.43 M."""
    for factor, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{name}"
    return f"{value:.3g}"


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
