"""How good likelihood-ratio gradients are, what they train the digits to, and what they train without derivatives.

    python -m benchmarks.likelihood_ratio estimators --out benchmarks/results/likelihood_ratio.json
    python -m benchmarks.likelihood_ratio digits     --out benchmarks/results/likelihood_ratio.json [--seeds 3]
    python -m benchmarks.likelihood_ratio thresholds --out benchmarks/results/likelihood_ratio.json [--seeds 3]

`estimators`: one linear, convolutional and recurrent layer under noise, against autograd: cosine and relative error as
copies grow, and the variance that pairs, baseline and evenly spread points leave. `digits`: `lct-fast train --method
likelihood-ratio`. `thresholds`: hidden units that are 0 or 1, with cross-entropy and with the error rate itself as the
loss. All add to one file; a run of `digits` or `thresholds` that is in the file is not repeated. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import lct_fast as lct
from lct_fast.bench.machine import header
from lct_fast.data import Batches
from lct_fast.engine.network.group import OutputHead
from lct_fast.methods import Objective
from lct_fast.methods.method import GroupLike

COPIES = (10, 100, 1000, 10000)
SAMPLES, CLASSES = 8, 5
# Small, so that the smoothed loss's gradient is the loss's own as far as 10,000 copies can tell.
SIGMA = 0.02
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(16, 8), (16,), 8),
    "conv": (lambda: nn.Conv2d(2, 4, 3), (2, 6, 6), 64),
    "recurrent": (lambda: nn.LSTM(4, 8, batch_first=True), (6, 4), 8),
}
# How noise is drawn, worst first.
DRAWS: dict[str, dict[str, Any]] = {
    "independent": {"antithetic": False, "baseline": False},
    "independent, baseline": {"antithetic": False},
    "sobol, baseline": {"antithetic": False, "sampling": "sobol"},
    "antithetic": {},
    "antithetic, sobol": {"sampling": "sobol"},
    "antithetic, halton": {"sampling": "halton"},
}
# name, options after `lct-fast train --data digits --method likelihood-ratio`
MLP = ("--model", "mlp:hidden=64,depth=3")
DIGITS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("boundary, mlp, K=2, 8 copies", ("--groups", "2", "--copies", "8", *MLP)),
    ("boundary, mlp, K=2, 32 copies", ("--groups", "2", *MLP)),
    ("boundary, mlp, K=4, 32 copies", ("--groups", "4", *MLP)),
    ("logits, mlp, K=2, 8 copies", ("--groups", "2", "--copies", "8", "--noise", "logits", *MLP)),
    ("logits, mlp, K=2, 32 copies", ("--groups", "2", "--noise", "logits", *MLP)),
    ("logits, mlp, K=4, 32 copies", ("--groups", "4", "--noise", "logits", *MLP)),
    (
        "logits, mlp, K=2, 32 copies, signs kept",
        ("--groups", "2", "--noise", "logits", "--storage", "sign", *MLP),
    ),
    ("boundary, digits_cnn:norm=none, K=2, 32 copies", ("--groups", "2")),
    ("boundary, digits_cnn:norm=none, K=4, 32 copies", ("--groups", "4")),
    ("boundary, digits_cnn:norm=none, K=2, 8 copies", ("--groups", "2", "--copies", "8")),
    ("hybrid, resnet5, K=2, 32 copies", ("--groups", "2", "--noise", "hybrid", "--model", "resnet5")),
)
THRESHOLDS = ("cross-entropy", "error rate")


class Alone:
    """A layer that is a group, with the rest of the network behind it."""

    fused, last = None, False

    def __init__(self, layer: nn.Module, behind: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.layers, self.behind, self.critic = layer, behind, OutputHead(None)


class Case:
    """One layer, a batch, and tanh, readout and cross-entropy behind it."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(1)
        make, shape, features = LAYERS[kind]
        self.layer, self.readout = make(), nn.Linear(features, CLASSES)
        self.x, self.target = torch.randn(SAMPLES, *shape), torch.randint(0, CLASSES, (SAMPLES,))
        self.objective = Objective()

    def loss(self, h: Any, target: Tensor) -> Tensor:
        """[M] from the layer's output; of a recurrent layer the last step counts."""
        h = h[0][:, -1] if isinstance(h, tuple) else h
        return F.cross_entropy(self.readout(h.tanh().flatten(1)), target, reduction="none")

    def exact(self) -> Tensor:
        self.loss(self.layer(self.x), self.target).mean().backward()
        return self._taken()

    def estimate(self, copies: int, **options: Any) -> Tensor:
        noisy = lct.LikelihoodRatio("logits", copies=copies, sigma=SIGMA, rows=2**16, **options)
        group = cast(GroupLike, Alone(_Tensors(self.layer), self.loss))
        scale = self.objective.scale(self.target)
        noisy.local_step(group, self.x, self.target, self.objective, scale)
        return self._taken()

    def _taken(self) -> Tensor:
        found = torch.cat([p.grad.flatten() for p in self.layer.parameters() if p.grad is not None])
        self.layer.zero_grad()
        return found


class _Tensors(nn.Module):
    """A layer whose output is one tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        out: Tensor = h[0][:, -1] if isinstance(h, tuple) else h
        return out


def convergence(kind: str, repeats: int = 10) -> dict[str, Any]:
    """Cosine and relative error against autograd at each number of copies, means over `repeats`."""
    case = Case(kind)
    exact = case.exact()
    cosines, errors = [], []
    for copies in COPIES:
        found = [case.estimate(copies) for _ in range(repeats)]
        cosines.append(mean(float(F.cosine_similarity(g, exact, 0)) for g in found))
        errors.append(mean(float((g - exact).norm() / exact.norm()) for g in found))
    return {
        "copies": list(COPIES),
        "cosine": cosines,
        "relative_error": errors,
        "slope": slope(COPIES, errors),
    }


def slope(x: tuple[int, ...], y: list[float]) -> float:
    """Of the line through the points in logarithms."""
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    top = sum((p - mean(a)) * (q - mean(b)) for p, q in zip(a, b, strict=True))
    return top / sum((p - mean(a)) ** 2 for p in a)


def variances(kind: str, copies: int = 64, draws: int = 200) -> dict[str, Any]:
    """Variance of the estimate, summed over parameters, for each way to draw noise, over that of pairs."""
    case = Case(kind)
    found = {
        name: float(torch.stack([case.estimate(copies, **options) for _ in range(draws)]).var(0).sum())
        for name, options in DRAWS.items()
    }
    return {
        "copies": copies,
        "draws": draws,
        "over_antithetic": {name: v / found["antithetic"] for name, v in found.items()},
    }


def train(options: tuple[str, ...], seed: int) -> dict[str, Any]:
    """One run of the command line; what the file keeps of it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "lct_fast",
            "train",
            "--data",
            "digits",
            "--method",
            "likelihood-ratio",
        ]
        command += [*options, "--seed", str(seed), "--threads", "1", "--json", "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{options}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        summary = json.loads((out / "summary.json").read_text())
    kept = (
        "test_accuracy",
        "steps",
        "epochs",
        "seconds",
        "wire_bytes_per_sample",
        "feedback_bytes_per_sample",
    )
    return {key: summary[key] for key in kept}


class Threshold(nn.Module):
    """1 above zero, else 0: its derivative is zero wherever there is one."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)


def error_rate(logits: Tensor, target: Tensor) -> Tensor:
    """[N]: 1 where the answer is wrong."""
    return (logits.argmax(1) != target).float()


def thresholds(loss: str, seed: int, epochs: int = 25) -> dict[str, Any]:
    """64 inputs, 128 threshold units, 10 classes, in two groups; noise on every pre-activation, 64 copies."""
    torch.manual_seed(seed)
    digits = lct.data.load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), Threshold(), nn.Linear(128, 10))
    groups = lct.split(model, example_input=torch.zeros(64, 1, 8, 8), split_points=["3"])

    def batches(train: bool) -> Batches:
        images, labels = (
            (digits.train_images, digits.train_labels) if train else (digits.test_images, digits.test_labels)
        )
        return Batches(
            images,
            labels,
            64,
            mean=digits.mean,
            std=digits.std,
            seed=seed,
            shuffle=train,
            augment="none",
            drop_last=train,
            device=torch.device("cpu"),
        )

    training, test = batches(True), batches(False)
    steps = epochs * len(training)
    lr, sigma = (0.05, 1.0) if loss == "error rate" else (0.1, 0.5)
    trainer = lct.Trainer(
        groups,
        lct.LikelihoodRatio("logits", copies=64, sigma=sigma),
        loss=error_rate if loss == "error rate" else None,
        clip_norm=1.0,
        optimizer=lambda params: torch.optim.SGD(params, lr, momentum=0.9),
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, lr, steps + 1, cycle_momentum=False),
    )
    accuracies = [_accuracy(trainer, test)]
    for epoch in range(epochs):
        for _, x, y in training.epoch(epoch):
            trainer.step(x, y)
    accuracies.append(_accuracy(trainer, test))
    return {"untrained_accuracy": accuracies[0], "test_accuracy": accuracies[1], "steps": steps}


def _accuracy(trainer: lct.Trainer, test: Batches) -> float:
    result = trainer.evaluate((x, y) for _, x, y in test.epoch(0))
    assert result is not None
    return result.accuracy[-1]


def table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per part and name: mean and standard deviation of the test accuracy over the seeds."""
    rows: dict[str, Any] = {}
    for run in runs:
        rows.setdefault(run["part"], {}).setdefault(run["name"], []).append(run["test_accuracy"])
    return {
        part: {
            name: {"seeds": len(a), "test_accuracy": mean(a), "sd": stdev(a) if len(a) > 1 else None}
            for name, a in named.items()
        }
        for part, named in rows.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Makes what is missing and writes the file after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("estimators", "digits", "thresholds"))
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0.. of each training run (default 1)")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON), made or added to")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    torch.set_num_threads(1)
    content: dict[str, Any] = {"suite": "likelihood_ratio", "runs": []}
    if args.out.exists():
        content = json.loads(args.out.read_text())
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        content["machine"], content["table"] = header("cpu"), table(content["runs"])
        args.out.write_text(json.dumps(content, indent=1) + "\n")

    if args.part == "estimators":
        content["convergence"] = {kind: convergence(kind) for kind in tqdm(LAYERS, unit="layer")}
        content["variance"] = {kind: variances(kind) for kind in ("linear", "conv")}
        write()
        return 0
    known = {(run["part"], run["name"], run["seed"]) for run in content["runs"]}
    wanted: list[tuple[str, Callable[[int], dict[str, Any]]]] = (
        [(name, lambda seed, options=options: train(options, seed)) for name, options in DIGITS]  # type: ignore[misc]
        if args.part == "digits"
        else [(name, lambda seed, name=name: thresholds(name, seed)) for name in THRESHOLDS]  # type: ignore[misc]
    )
    turns = [(name, run, seed) for seed in range(args.seeds) for name, run in wanted]
    for name, run, seed in tqdm(turns, unit="run"):
        if (args.part, name, seed) in known:
            continue
        result = {"part": args.part, "name": name, "seed": seed, **run(seed)}
        content["runs"].append(result)
        write()
        tqdm.write(f"{name:<50} seed {seed}: {result['test_accuracy']:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
