"""group_linear on one CPU thread against torch: the forward alone, and a step whose gradient comes through the logits.

    python -m benchmarks.group_linear_cpu --out FILE [--samples 9] [--shape N,I,O,V,DTYPE,ACTIVATION ...]

Contenders take turns (A B C, B C A, ...) over the same tensors. Times are CPU time of the one thread that works,
which other programs disturb through the caches alone. Each contender is compared with float64 first, and one that
fails gets no time and makes the exit status 1. All get 2 MB pages for large tensors, torch's own switch
(THP_MEM_ALLOC_ENABLE).
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First: it sets how torch allocates.
from benchmarks.critic_head_cpu import commit, cpu_model  # isort: skip

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu
from tqdm import tqdm

from benchmarks.measure import percentiles
from lct_fast import _native, ops
from tests.ladder import assert_rule
from tests.ops.group_linear_case import Case, make

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu}
SHAPES = (
    "64,1024,1024,10,f32,relu",
    "4096,256,256,10,f32,relu",
    "1024,1024,1024,10,f32,relu",
    "1024,1024,1024,10,f32,gelu",
    "512,4096,1024,63,f32,relu",
    "64,1024,1024,10,bf16,relu",
    "4096,256,256,10,bf16,relu",
    "1024,1024,1024,10,bf16,relu",
    "512,4096,1024,63,bf16,relu",
    "256,512,512,10,f16,relu",
)

Layer = Callable[..., tuple[Tensor, Tensor]]
Run = Callable[[], dict[str, Tensor]]


def ours(case: Case) -> Layer:
    def layer(
        x: Tensor, weight: Tensor, bias: Tensor, critic: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        with ops.use_backend("cpu"):
            h, logits = ops.group_linear(x, weight, bias, case.activation, critic, shift)
        assert logits is not None
        return h, logits

    return layer


def by_torch(case: Case) -> Layer:
    act = ACTIVATIONS[case.activation]

    def layer(
        x: Tensor, weight: Tensor, bias: Tensor, critic: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = act(linear(x, weight, bias))
        return h, linear(h, critic, shift)

    return layer


def forward(case: Case, layer: Layer) -> Run:
    arguments = (case.x, case.weight, case.bias, case.critic_weight, case.critic_bias)

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            h, logits = layer(*arguments)
        return {"h": h, "logits": logits}

    return run


def step(case: Case, layer: Layer) -> Run:
    names = ("x", "weight", "bias", "critic_weight", "critic_bias")
    wanted = [f"d{name}" for name in names]
    leaves = [getattr(case, name).clone().requires_grad_() for name in names]

    def run() -> dict[str, Tensor]:
        h, logits = layer(*leaves)
        with ops.use_backend("cpu"):
            gradients = torch.autograd.grad(logits, leaves, case.dlogits)
        return {"h": h.detach(), "logits": logits.detach(), **dict(zip(wanted, gradients, strict=True))}

    return run


def wrong(case: Case, run: Run) -> str:
    """Why what it gives is not what float64 gives, or "". It has to be right, not as exact as the tests ask."""
    exact, plain, terms = case.exact(), case.plain(), case.terms()
    for name, got in run().items():
        try:
            assert_rule(name, got, plain[name], exact[name], 4 * torch.finfo(case.x.dtype).eps, terms[name])
        except AssertionError as error:
            return str(error)
    return ""


def measure(shape: str, samples: int) -> tuple[list[dict[str, Any]], list[str]]:
    rows, inputs, outputs, classes = map(int, shape.split(",")[:4])
    dtype, activation = shape.split(",")[4:]
    case = make(rows, inputs, outputs, classes, (DTYPES[dtype],) * 3, activation, "logits")
    table: list[dict[str, Any]] = []
    failed: list[str] = []
    for part, made in (("forward", forward), ("step", step)):
        compiled = torch.compile(by_torch(case), dynamic=False)
        layers = {"lct_fast": ours(case), "torch eager": by_torch(case), "torch.compile": compiled}
        runs = {name: made(case, layer) for name, layer in layers.items()}
        reasons = {name: wrong(case, run) for name, run in runs.items()}
        failed += [f"{shape} {part} {name}: {reason}" for name, reason in reasons.items() if reason]
        names = [name for name, reason in reasons.items() if not reason]
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in tqdm(range(samples), desc=f"{shape} {part}", leave=False):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                begun = time.thread_time()
                runs[name]()
                times[name].append((time.thread_time() - begun) * 1e6)
        rivals = [percentiles(times[name]).p50 for name in names if name != "lct_fast"]
        for name in names:
            p20, p50, p80, _ = percentiles(times[name])
            table.append(
                {
                    "shape": shape,
                    "part": part,
                    "contender": name,
                    "cpu_us_p20": round(p20, 1),
                    "cpu_us_p50": round(p50, 1),
                    "cpu_us_p80": round(p80, 1),
                    "samples": samples,
                    "times_as_fast_as_best_rival": round(min(rivals) / p50, 3) if rivals else None,
                }
            )
        torch._dynamo.reset()
    return table, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=9, help="of each contender and shape (default: 9)")
    parser.add_argument("--shape", action="append", metavar="N,I,O,V,DTYPE,ACTIVATION", help="default: all")
    args = parser.parse_args()
    if args.samples < 7:
        parser.error(f"--samples must be at least 7 to say anything, got {args.samples}")
    torch.set_num_threads(1)
    native: Any = _native.load()
    table: list[dict[str, Any]] = []
    failed: list[str] = []
    for shape in args.shape or SHAPES:
        rows, reasons = measure(shape, args.samples)
        table += rows
        failed += reasons
        for row in rows:
            print(
                f"{shape:>28} {row['part']:<8} {row['contender']:<14} {row['cpu_us_p50']:>9.0f} us of CPU "
                f"[{row['cpu_us_p20']:.0f}, {row['cpu_us_p80']:.0f}]  {row['times_as_fast_as_best_rival']}x",
                flush=True,
            )
    report = {
        "op": "group_linear",
        "measured": "CPU time of one thread",
        "cpu": cpu_model(),
        "simd": native.simd_levels()[-1],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "compiler": native.build_info()["compiler"],
        },
        "commit": commit(),
        "failed_checks": failed,
        "rows": table,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
