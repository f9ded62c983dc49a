"""How well vq's codebooks follow activations in training, by the decay of their averages, as a committed result file.

    python -m benchmarks.codebooks --data DIR --out benchmarks/results/codebooks.json

Greedy on CIFAR-10: LCT's net (a) at a quarter of its width, 4 groups, critics on 4x4 pooling. Each contender is that
training with another decay; its error at a cut is |decoded - h|^2 over |h - its channel's mean|^2, of what was trained
on. The decay decides what the next group learns from, so after the first batches the activations differ too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import lct_fast as lct
from benchmarks.accuracy import POOLED
from benchmarks.wire import PATCHES
from lct_fast.bench.machine import header
from lct_fast.codecs import Encoded, VectorQuantization
from lct_fast.data import Batches

# None is the codec's own rule.
DECAYS = (0.99, 0.95, 0.9, None)
BATCH = 128


class Watched(VectorQuantization):
    """Notes the relative error of every batch; ``fixed`` takes the place of the rule."""

    def __init__(self, spec: str, fixed: float | None) -> None:
        numbers = [int(n) for n in spec.removeprefix("vq:").split(",")]
        super().__init__(*numbers)
        self.fixed, self.errors = fixed, list[float]()
        self.reader = VectorQuantization(*numbers)

    def decay(self, vectors: int) -> float:
        return super().decay(vectors) if self.fixed is None else self.fixed

    def encode(self, h: Tensor, *, learn: bool = True) -> Encoded:
        encoded = super().encode(h, learn=learn)
        if learn:
            spread = (h - h.mean((0, 2, 3), keepdim=True)).square().sum()
            self.errors.append(float((self.reader.decode(encoded) - h).square().sum() / spread))
        return encoded


def train(batches: Batches, decay: float | None, epochs: int, seed: int) -> dict[str, Any]:
    """One training; what the file keeps of it."""
    torch.manual_seed(seed)
    model = lct.models.build("lct_vgg:width=0.25", num_classes=10)
    _, example, _ = next(batches.epoch(0))
    groups = lct.split(model, 4, example, critic=POOLED, split_points=lct.models.default_splits("lct_vgg", 4))
    specs = PATCHES.split()
    trainer = lct.Trainer(groups, lct.Greedy(), codec=specs)
    watched = [Watched(spec, decay) for spec in specs]
    for worker, codec in zip(trainer.workers, watched, strict=False):
        worker.encoder = codec
    losses = []
    for epoch in tqdm(range(epochs), desc="the rule" if decay is None else f"decay {decay:g}", unit="epoch"):
        losses = [float(trainer.step(x, y).losses[-1]) for _, x, y in batches.epoch(epoch)]
    last = len(losses)
    cuts = [
        {
            "codec": spec,
            "error_of_epoch": [mean(codec.errors[e * last : (e + 1) * last]) for e in range(epochs)],
            "codebooks": codec.version,
            "codebook_share": codec.codebook_bytes / (codec.codebook_bytes + codec.code_bytes),
        }
        for spec, codec in zip(specs, watched, strict=True)
    ]
    return {"decay": decay, "loss_of_last_epoch": mean(losses), "cuts": cuts}


def main(argv: list[str] | None = None) -> int:
    """Trains with each decay and writes the file after every one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the data set's PATH")
    parser.add_argument("--images", type=int, default=12500, help="training images (default 12500)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.images < BATCH:
        parser.error(f"expected --epochs >= 1 and --images >= {BATCH}, got {args.epochs} and {args.images}")
    data = lct.data.load(f"cifar10:{args.data}", limit=args.images)
    batches = Batches(
        data.train_images,
        data.train_labels,
        BATCH,
        mean=data.mean,
        std=data.std,
        seed=args.seed,
        augment="crop_flip",
        drop_last=True,
    )
    about = {"images": args.images, "epochs": args.epochs, "seed": args.seed, "batch": BATCH}
    runs: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for decay in DECAYS:
        runs.append(train(batches, decay, args.epochs, args.seed))
        args.out.write_text(json.dumps({**about, **header("cpu"), "runs": runs}, indent=1) + "\n")
        errors = " ".join(f"{cut['error_of_epoch'][-1]:.4f}" for cut in runs[-1]["cuts"])
        tqdm.write(f"{'rule' if decay is None else decay}: error of the last epoch at the cuts {errors}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
