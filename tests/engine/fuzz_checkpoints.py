"""Damaged checkpoints, loaded as a resumed run would: refused by name or loaded, nothing else.

    python -m tests.engine.fuzz_checkpoints --count 10000 [--native lct_fast/_C...so]

Hashes are made to fit most of the time, so that what they protect is read. ``--native`` as in ``fuzz_packets``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import lct_fast as lct
from lct_fast.engine import checkpoint
from lct_fast.engine.checkpoint import CheckpointError
from tests.engine import nets
from tests.engine.fuzz_packets import use_native

ODD: tuple[Any, ...] = (None, True, -1, 0, 1 << 40, 1 << 70, 1e308, "", "x", [], {}, [[]], {"tensor": "x"})


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 1e-3)


def _halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def make(folder: Path) -> tuple[lct.Trainer, Path]:
    """A trainer, and a checkpoint with something of everything in it."""
    trainer = lct.Trainer(
        nets.groups(lct.LocalCritic(), 2),
        lct.LocalCritic(),
        feedback_delay=2,
        accumulate=2,
        optimizer=_adam,
        scheduler=_halving,
        codec="vq:4,2",
    )
    for x, y in nets.batches(5, rows=4):
        trainer.step(x, y)
    return trainer, checkpoint.save(trainer, folder, {"seconds": 1.5, "interval": [[0.5]]})


def damage(path: Path, draw: random.Random) -> None:
    """Changes one file of a checkpoint; most of the time the hashes are made to fit."""
    file = draw.choice(sorted(path.iterdir()))
    how = draw.randrange(6)
    if how == 0:
        file.unlink()
    elif file.suffix == ".json" and how > 1:
        tree = json.loads(file.read_text())
        for _ in range(draw.randint(1, 3)):
            _change(tree, draw)
        file.write_text(json.dumps(tree))
    else:
        data = bytearray(file.read_bytes())
        for _ in range(draw.randint(1, 4)):
            # What is at the beginning of a file decides how the rest is read.
            place = draw.randrange(len(data) if draw.random() < 0.3 else min(len(data), 2000))
            data[place] = draw.randrange(256)
        file.write_bytes(bytes(data[: draw.randrange(len(data))] if how == 1 else data))
    if draw.random() < 0.9:
        _fit_hashes(path)


def _change(tree: Any, draw: random.Random) -> None:
    """Replaces, drops or doubles something somewhere in a JSON value."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = draw.choice(keys)
        inner = tree[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.8:
            tree = inner
            continue
        how = draw.randrange(4)
        if how == 0:
            del tree[key]
        elif how == 1 and isinstance(tree, list):
            tree.append(copy.deepcopy(inner))
        else:
            tree[key] = copy.deepcopy(draw.choice(ODD))
        return


def _fit_hashes(path: Path) -> None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for file in sorted(path.glob("group-*.json")):
            description = json.loads(file.read_text())
            tensors = file.with_suffix(".safetensors")
            if isinstance(description, dict) and tensors.exists():
                description["sha256"] = _sha256(tensors)
                file.write_text(json.dumps(description))
        for name in list(manifest["sha256"]):
            if (path / name).exists():
                manifest["sha256"][name] = _sha256(path / name)
        (path / "manifest.json").write_text(json.dumps(manifest))
    except (OSError, ValueError, KeyError, TypeError):
        # Too broken to have hashes.
        return


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def run(count: int, seed: int) -> Counter[str]:
    """``count`` damaged checkpoints; how many were loaded and how many refused."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer, good = make(Path(folder) / "good")
        for i in range(count):
            bad = Path(folder) / "bad" / good.name
            shutil.copytree(good, bad)
            damage(bad, draw)
            try:
                checkpoint.load(trainer, bad)
                ends["loaded"] += 1
            except CheckpointError as error:
                assert "\n" not in str(error), error
                ends["refused"] += 1
            except Exception as error:
                raise AssertionError(f"checkpoint {i} of seed {seed}: {error!r}") from error
            shutil.rmtree(bad)
        # Whatever was tried, the good one is read.
        checkpoint.load(trainer, good)
    return ends


def main() -> int:
    """Prints how the checkpoints ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--native", type=Path)
    args = parser.parse_args()
    if args.native is not None:
        use_native(args.native)
    torch.set_num_threads(1)
    for end, count in run(args.count, args.seed).most_common():
        print(f"{count:6d}  {end}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
