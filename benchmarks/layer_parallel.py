"""Layer-parallel training: what its stored states converge to, and what it reaches on digits and CIFAR-10.

    python -m benchmarks.layer_parallel states  --out benchmarks/results/layer_parallel.json
    python -m benchmarks.layer_parallel digits  --out benchmarks/results/layer_parallel.json [--seeds 2]
    python -m benchmarks.layer_parallel cifar10 --data DIR --out benchmarks/results/layer_parallel.json

All add to one file. `states`: a small net with its weights held, full batch, until the states stand still; the jump
lambda_{k+1} - x_k over beta, and kappa against the adjoint that back-propagation gives. `digits`: `lct-fast train` with
the defaults of each method, K = 2 and 4, without and with one serial epoch in five, beside backprop; a run that is in
the file is not repeated. `cifar10`: one short run of each method on a small wide ResNet, to see that it trains.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lct_fast as lct
from lct_fast.bench.machine import header

BETAS = (1.0, 2.0, 4.0, 8.0, 16.0)
SAMPLES = 24
# Steps after which the states stand still to the last places of fp32.
STEPS = 3000
METHODS = ("penalty", "augmented-lagrangian")
SHARES = (0.0, 0.2)
GROUPS = (2, 4)
RESNET = "wide_resnet:depth=10,widen=1"


def small_net(seed: int = 0) -> nn.Sequential:
    """Three groups of one layer each, and data for them."""
    torch.manual_seed(seed)
    net = nn.Sequential()
    for i in range(3):
        net.add_module(f"unit{i + 1}", nn.Sequential(nn.Linear(6 if i == 0 else 10, 10), nn.Tanh()))
    net.add_module("head", nn.Linear(10, 4))
    return net


def stationary(kind: str, beta: float, steps: int = STEPS) -> list[dict[str, float]]:
    """For each cut, once states stand still with the weights held: the jump and kappa against back-propagation.

    ``jump``: root mean square over all samples and features of lambda - x. ``kappa_cosine`` and ``kappa_error``: of
    kappa, as one vector, and the gradient of the sum of all losses at x; 0 and 1 for the penalty method, which has
    none. ``change``: relative change of lambda in the last step.
    """
    net = small_net()
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(SAMPLES, 6, generator=draw), torch.randint(0, 4, (SAMPLES,), generator=draw)
    groups = lct.split(net, example_input=x, split_points=["unit2", "unit3"])
    trainer = lct.Trainer(
        groups, lct.LayerParallel(kind, beta), optimizer=lambda p: torch.optim.SGD(p, 0.0), samples=SAMPLES
    )
    every = torch.arange(SAMPLES)
    for _ in range(steps - 1):
        trainer.step(x, y, every)
    before = [_state(trainer, k)["lambda"] for k in range(2)]
    trainer.step(x, y, every)
    outputs, adjoints = back_propagated(net, x, y)
    rows = []
    for k in range(2):
        state = _state(trainer, k)
        # The output of the group from its own stored input, not from a forward pass.
        entry = x if k == 0 else _state(trainer, k - 1)["lambda"]
        jump = state["lambda"] - groups[k].layers(entry).detach()
        kappa, adjoint = state.get("kappa", torch.zeros_like(jump)), adjoints[k]
        rows.append(
            {
                "jump": float(jump.square().mean().sqrt()),
                "output": float(outputs[k].square().mean().sqrt()),
                "kappa_cosine": float(torch.cosine_similarity(kappa.flatten(), adjoint.flatten(), 0)),
                "kappa_error": float((kappa - adjoint).norm() / adjoint.norm()),
                "change": float((state["lambda"] - before[k]).norm() / state["lambda"].norm()),
            }
        )
    return rows


def back_propagated(net: nn.Sequential, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs x_k of the groups but the last, and the gradient of each sample's loss there."""
    outputs = [x]
    for layer in net:
        outputs.append(layer(outputs[-1]))
    loss = nn.functional.cross_entropy(outputs[4], y, reduction="sum")
    return [h.detach() for h in outputs[1:3]], list(torch.autograd.grad(loss, outputs[1:3]))


def _state(trainer: lct.Trainer, k: int) -> dict[str, Tensor]:
    store = trainer.workers[k].store
    assert store is not None
    return store.read(torch.arange(SAMPLES)).tensors


def states() -> dict[str, Any]:
    """Every beta, both kinds."""
    kinds = ("penalty", "augmented_lagrangian")
    return {
        kind: {f"{beta:g}": stationary(kind, beta) for beta in tqdm(BETAS, unit="beta")} for kind in kinds
    }


def runs(part: str, seeds: int, data: str | None) -> dict[str, list[str]]:
    """Options of every run of a part, by its name."""
    found = {}
    if part == "cifar10":
        shared = ["--data", f"cifar10:{data}", "--limit", "2000", "--model", RESNET, "--split", "layer2"]
        shared += ["--groups", "2", "--epochs", "10", "--batch-size", "50"]
        for method in (*METHODS, "backprop"):
            serial = [] if method == "backprop" else ["--serial", "0.2"]
            found[f"cifar10-{method}"] = [*shared, "--method", method, *serial]
        return found
    for seed in range(seeds):
        for k in GROUPS:
            for method in METHODS:
                for q in SHARES:
                    found[f"digits-{method}-K{k}-q{q:g}-seed{seed}"] = [
                        *("--data", "digits", "--method", method, "--groups", str(k)),
                        *("--serial", str(q), "--seed", str(seed)),
                    ]
        for q in SHARES:
            found[f"digits-penalty-auxiliary-K4-q{q:g}-seed{seed}"] = [
                *("--data", "digits", "--method", "penalty", "--auxiliary", "--groups", "4"),
                *("--serial", str(q), "--seed", str(seed)),
            ]
        found[f"digits-backprop-seed{seed}"] = [
            "--data",
            "digits",
            "--method",
            "backprop",
            "--seed",
            str(seed),
        ]
    return found


def execute(name: str, options: list[str], epochs: int | None) -> dict[str, Any]:
    """Trains, and returns what the file keeps of it."""
    more = [] if epochs is None else ["--epochs", str(epochs)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "lct_fast", "train", *options, "--threads", "1", *more]
        done = subprocess.run(
            [*command, "--json", "--out", str(out)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        summary = json.loads((out / "summary.json").read_text())
    return {"name": name, "options": [o for o in options if not o.startswith("cifar10:")], **summary}


def table(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one name but for the seed: their mean test accuracy, each one's, and the gain of groups at once."""
    rows: dict[str, Any] = {}
    for name in dict.fromkeys(r["name"].rpartition("-seed")[0] or r["name"] for r in results):
        found = [r for r in results if (r["name"].rpartition("-seed")[0] or r["name"]) == name]
        speed = [r["speed_up"] for r in found if r["speed_up"]]
        rows[name] = {
            "test_accuracy": mean(r["test_accuracy"] for r in found),
            "of_seeds": [r["test_accuracy"] for r in found],
            "parallel_gain": mean(s["parallel_gain"] for s in speed) if speed else None,
            "overall_gain": mean(s["overall"] for s in speed) if speed else None,
        }
    return rows


def main(argv: list[str] | None = None) -> int:
    """Makes what is missing and writes the file after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("states", "digits", "cifar10"))
    parser.add_argument("--seeds", type=int, default=2, help="seeds 0.. of each run on digits (default 2)")
    parser.add_argument("--data", help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON), made or added to")
    parser.add_argument("--epochs", type=int, help="shorter or longer runs: a trial of the code")
    args = parser.parse_args(argv)
    if args.part == "cifar10" and args.data is None:
        parser.error("cifar10 needs --data DIR")
    content: dict[str, Any] = {"suite": "layer_parallel", "states": {}, "table": {}, "runs": []}
    if args.out.exists():
        content = json.loads(args.out.read_text())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content["machine"] = header("cpu")
    if args.part == "states":
        content["states"] = states()
        args.out.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    known = {r["name"] for r in content["runs"]}
    missing = {n: o for n, o in runs(args.part, args.seeds, args.data).items() if n not in known}
    for name, options in tqdm(missing.items(), unit="run"):
        result = execute(name, options, args.epochs)
        content["runs"].append(result)
        content["table"] = table(content["runs"])
        args.out.write_text(json.dumps(content, indent=1) + "\n")
        tqdm.write(f"{name:<44} {result['test_accuracy']:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
