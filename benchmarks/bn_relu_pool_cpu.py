"""The end of a convolutional group and its pooled critic on the CPU, against torch: forward and every gradient.

    python -m benchmarks.bn_relu_pool_cpu --out FILE [--threads 2] [--samples 15] [--shape N,C,H,W,P,DTYPE,FORMAT ...]

A step is batch norm in training mode, ReLU, the average over P x P windows, a linear head, mean cross-entropy
and the gradients at x, gamma, beta and the head's parameters; y is kept for the next group. Contenders take
turns (A B C, B C A, ...) over the same tensors, caches flushed before each. Each is compared with float64
first, and one that fails gets no time and makes the exit status 1. Memory is what torch allocates in a step,
at its height, y and the gradients included. As in benchmarks.critic_head_cpu, a sample that lost a core is
measured again, `quiet` is false where that does not help, and all contenders get 2 MB pages for large tensors
unless --small-pages is given.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# First: it sets how torch allocates.
from benchmarks.critic_head_cpu import busy_seconds, commit, cpu_model, sample  # isort: skip

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, batch_norm, cross_entropy, linear, relu
from tqdm import tqdm

from benchmarks.measure import percentiles
from lct_fast import _native, ops
from tests.ladder import assert_rule

CLASSES = 10
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
SHAPES = (
    "128,64,32,32,2,f32,first",
    "128,64,32,32,2,f32,last",
    "128,64,32,32,4,f32,first",
    "128,128,16,16,2,f32,first",
    "128,128,16,16,2,f32,last",
    "128,256,8,8,2,f32,first",
    "128,64,32,32,2,bf16,first",
    "128,64,32,32,2,bf16,last",
)


class Step(NamedTuple):
    """What every contender returns."""

    loss: Tensor
    y: Tensor
    dx: Tensor
    dgamma: Tensor
    dbeta: Tensor
    dweight: Tensor
    dbias: Tensor


Run = Callable[[], Step]


@dataclass(frozen=True)
class Case:
    x: Tensor
    gamma: Tensor
    beta: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    pool: int

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        tensors = (self.x, self.gamma, self.beta, self.weight, self.bias)
        return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]

    def statistics(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(self.gamma), dtype=dtype), torch.ones(len(self.gamma), dtype=dtype)


def make(samples: int, channels: int, height: int, width: int, pool: int, dtype: str, layout: str) -> Case:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(samples, channels, height, width, generator=draw).to(DTYPES[dtype])
    gamma, beta = (torch.randn(channels, generator=draw) for _ in range(2))
    for _ in range(20):
        # Where rounding decides whether z is above 0, no two programs have the same gradient.
        near = batch_norm(x.double(), None, None, gamma.double(), beta.double(), True).abs() < 1e-5
        if not bool(near.any()):
            break
        x[near] += 0.03
    else:
        raise RuntimeError("some z stays near 0")
    features = channels * pool * pool
    return Case(
        x=x.contiguous(memory_format=FORMATS[layout]),
        gamma=gamma,
        beta=beta,
        weight=torch.randn(CLASSES, features, generator=draw) / features**0.5,
        bias=torch.randn(CLASSES, generator=draw),
        target=torch.randint(0, CLASSES, (samples,), generator=draw),
        pool=pool,
    )


def forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    target: Tensor,
    pool: int,
) -> tuple[Tensor, Tensor]:
    y = relu(batch_norm(x, mean, var, gamma, beta, True))
    pooled = avg_pool2d(y, (x.shape[2] // pool, x.shape[3] // pool))
    logits = linear(pooled.flatten(1).to(weight.dtype), weight, bias)
    return cross_entropy(logits, target), y.detach()


def torch_step(
    case: Case, function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype | None = None
) -> Run:
    leaves = case.leaves(dtype)
    statistics = case.statistics(dtype or torch.float32)

    def run() -> Step:
        loss, y = function(*leaves, *statistics, case.target, case.pool)
        dx, dgamma, dbeta, dweight, dbias = torch.autograd.grad(loss, leaves)
        return Step(loss.detach(), y, dx, dgamma, dbeta, dweight, dbias)

    return run


def ours(case: Case) -> Run:
    x, gamma, beta, weight, bias = case.leaves()
    statistics = case.statistics()
    rows = len(case.target)
    scale, row_scale = torch.tensor(1 / rows), torch.full((rows,), 1 / rows)

    def run() -> Step:
        with ops.use_backend("cpu"):
            out = ops.bn_relu_pool(x, gamma, beta, *statistics, pool=case.pool)
            head = ops.critic_head(
                out.pooled.detach().flatten(1), weight.detach(), bias.detach(), case.target, scale, row_scale
            )
            dx, dgamma, dbeta = torch.autograd.grad(out.pooled, (x, gamma, beta), head.dh.view_as(out.pooled))
        assert head.dweight is not None and head.dbias is not None
        return Step(head.loss.mean(), out.y.detach(), dx, dgamma, dbeta, head.dweight, head.dbias)

    return run


def contenders(case: Case) -> dict[str, Run]:
    compiled = torch.compile(forward, dynamic=False)
    tuned = torch.compile(forward, dynamic=False, mode="max-autotune-no-cudagraphs")
    return {
        "lct_fast": ours(case),
        "torch.compile": torch_step(case, compiled),
        "torch.compile max-autotune-no-cudagraphs": torch_step(case, tuned),
        "torch eager": torch_step(case, forward),
    }


def check(got: Step, plain: Step, exact: Step, dtype: torch.dtype, slack: float) -> None:
    """The error rule, `slack` times the last places it allows: rivals have to be right, not as exact as ours."""
    coarse, fine = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    for name in Step._fields:
        # The head's gradients are made from pooled, which is rounded.
        eps = (
            fine if name in ("dgamma", "dbeta", "loss") and dtype == torch.float32 else max(coarse, 8 * fine)
        )
        assert_rule(name, getattr(got, name), getattr(plain, name), getattr(exact, name), slack * eps)


def peak_bytes(run: Run) -> int:
    """The most that torch has allocated at once during a step, beyond what was there before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = run()
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    del kept
    return most


def measure(shape: str, samples: int) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each contender of one shape, and what failed its check."""
    *sizes, dtype, layout = shape.split(",")
    case = make(*map(int, sizes), dtype, layout)  # type: ignore[call-arg, arg-type]
    exact = torch_step(case, forward, torch.float64)()
    plain = torch_step(case, forward)()
    running = contenders(case)
    failed = []
    for contender, run in list(running.items()):
        try:
            # The compiler adds up a channel's gradients one after another.
            slack = 2.0 if contender == "lct_fast" else 512.0
            check(run(), plain, exact, DTYPES[dtype], slack)
        except AssertionError as error:
            failed.append(f"{shape} {contender}: {error}")
            del running[contender]
    del exact, plain
    memory = {}
    for contender, run in running.items():
        run()
        memory[contender] = peak_bytes(run)
    flush = torch.empty(1 << 26, dtype=torch.int8)
    taken: dict[str, list[tuple[float, bool]]] = {contender: [] for contender in running}
    names = list(running)
    for turn in tqdm(range(samples), desc=shape, leave=False, disable=None):
        for k in range(len(names)):
            contender = names[(turn + k) % len(names)]
            taken[contender].append(sample(running[contender], flush))
    table: list[dict[str, Any]] = []
    for contender, times in taken.items():
        p = percentiles([us for us, _ in times])
        table.append(
            {
                **dict(zip(("samples", "channels", "height", "width", "pool"), map(int, sizes), strict=True)),
                "dtype": dtype,
                "format": layout,
                "contender": contender,
                "us_least": min(us for us, _ in times),
                "us_p20": p.p20,
                "us_p50": p.p50,
                "us_p80": p.p80,
                "measured": p.samples,
                "undisturbed": sum(clean for _, clean in times),
                "peak_bytes": memory[contender],
                "x_bytes": case.x.numel() * case.x.element_size(),
            }
        )
    rivals = [row for row in table if row["contender"] != "lct_fast"]
    best = min((row["us_p50"] for row in rivals), default=float("nan"))
    least = min((row["us_least"] for row in rivals), default=float("nan"))
    for row in table:
        row["times_as_fast_as_best_rival"] = best / row["us_p50"]
        row["by_least_times"] = least / row["us_least"]
    return table, failed


def header(threads: int) -> dict[str, Any]:
    native = _native.load()
    if native is None:
        raise SystemExit(_native.why_absent())
    return {
        "benchmark": "bn_relu_pool_cpu",
        "what": "batch norm, ReLU, pool, linear head, cross-entropy and every gradient, microseconds and bytes",
        "command": f"python -m benchmarks.bn_relu_pool_cpu {' '.join(sys.argv[1:])}",
        "device": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "classes": CLASSES,
        "instruction_set": native.simd_levels()[-1],
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "compiler": native.build_info()["compiler"],
        },
        "commit": commit(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=15, help="of each contender and shape (default: 15)")
    parser.add_argument(
        "--shape", action="append", metavar="N,C,H,W,P,DTYPE,FORMAT", help="default: all of the table"
    )
    parser.add_argument("--small-pages", action="store_true", help="leave THP_MEM_ALLOC_ENABLE unset")
    args = parser.parse_args()
    if args.samples < 7:
        parser.error(f"--samples must be at least 7 to say anything, got {args.samples}")
    torch.set_num_threads(args.threads)
    report = header(args.threads)
    table: list[dict[str, Any]] = []
    failed: list[str] = []
    busy, own, begun = busy_seconds(), sum(os.times()[:4]), time.perf_counter()
    for shape in args.shape or SHAPES:
        rows, wrong = measure(shape, args.samples)
        failed += wrong
        for row in rows:
            table.append(row)
            print(
                f"{shape:>26}  {row['contender']:<42} {row['us_p50']:>8.0f} us "
                f"[{row['us_p20']:.0f}, {row['us_p80']:.0f}, least {row['us_least']:.0f}]  "
                f"{row['times_as_fast_as_best_rival']:.2f}x  {row['peak_bytes'] / 2**20:.1f} MiB",
                flush=True,
            )
        torch._dynamo.reset()
    elapsed = time.perf_counter() - begun
    foreign = busy_seconds() - busy - (sum(os.times()[:4]) - own)
    report["foreign_cpu_share"] = round(max(foreign, 0.0) / elapsed / (os.cpu_count() or 1), 4)
    report["quiet"] = report["foreign_cpu_share"] <= 0.05 and all(
        row["undisturbed"] >= 0.8 * row["measured"] for row in table
    )
    report["failed_checks"] = failed
    report["rows"] = table
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    if not report["quiet"]:
        print(f"not quiet: other programs used {report['foreign_cpu_share']:.0%} of the machine")
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
