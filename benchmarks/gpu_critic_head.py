"""critic_head on a device against torch.compile(max-autotune) of linear and cross-entropy with backward.

    python -m benchmarks.gpu_critic_head --out ROWS.jsonl [--budget SECONDS] [--device cuda]

All contenders read the same tensors, run as CUDA graphs, take turns, and start with a flushed L2. Outputs
are checked against float64 first; a contender that fails its check gets no time, and the exit status is 1.
A row a shape and contender is written as it is measured. The last line printed sums it up.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks.measure import Replay, Roofline, interleaved, ready, roofline
from lct_fast import ops
from tests.ops.critic_head_case import Case, check

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
RIVAL = "torch.compile"
SAMPLES = 50

Shape = tuple[int, int, int, str]

# (rows, depth, classes, dtype), what tells most first: the claims are >= 1.5x for up to 128 classes and
# >= 1.0x for up to 1000, over rows 256..65536 and depth up to 2048.
SHAPES: tuple[Shape, ...] = (
    (65536, 128, 10, "bf16"),
    (65536, 512, 100, "bf16"),
    (65536, 512, 1000, "bf16"),
    (4096, 2048, 10, "bf16"),
    (256, 512, 10, "bf16"),
    (65536, 2048, 10, "bf16"),
    (65536, 128, 10, "f32"),
    (4096, 512, 1000, "bf16"),
    (16384, 512, 100, "f32"),
    (256, 128, 100, "bf16"),
    (16384, 2048, 128, "bf16"),
    (16384, 1024, 200, "bf16"),
    (256, 2048, 1000, "bf16"),
    (4096, 512, 10, "f32"),
    (65536, 2048, 100, "bf16"),
    (65536, 2048, 1000, "bf16"),
    (16384, 512, 1000, "f32"),
    (256, 128, 10, "f32"),
)


def make(rows: int, depth: int, classes: int, dtype: torch.dtype, device: str) -> Case:
    """A greedy step: every row counts 1/N. Weights of order 1/sqrt(D), or softmax/N is full of denormals."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    return Case(
        h=normal(rows, depth).to(dtype),
        weight=(normal(classes, depth) / math.sqrt(depth)).to(dtype),
        bias=normal(classes).to(dtype),
        target=torch.randint(0, classes, (rows,), generator=draw, device=device),
        scale=torch.tensor(1 / rows, device=device),
        row_scale=torch.full((rows,), 1 / rows, device=device),
    )


def ours(case: Case, backend: str) -> Callable[[], ops.CriticHead]:
    def run() -> ops.CriticHead:
        with ops.use_backend(backend):
            return case.run()

    return run


def rival(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """Loss a row, and the gradients of its mean, by autograd through a compiled forward."""
    leaves = [x.detach().clone().requires_grad_() for x in (case.h, case.weight, case.bias) if x is not None]

    def forward(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        loss = cross_entropy(linear(h, weight, bias), case.target, reduction="none")
        return loss.mean(), loss

    torch.compiler.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")

    def run() -> tuple[Tensor, ...]:
        mean, loss = compiled(*leaves)
        return loss.detach(), *torch.autograd.grad(mean, leaves)

    return run


def check_rival(case: Case, out: tuple[Tensor, ...]) -> None:
    """Within what rounding logits to the input's format may cost: a rival does the same job."""
    exact = case.exact()
    # Float32 products in TF32 would be off by 1e-3.
    limit = 1e-4 if case.h.dtype == torch.float32 else 8 * torch.finfo(case.h.dtype).eps
    for name, got in zip(("loss", "dh", "dweight", "dbias"), out, strict=True):
        right = getattr(exact, name)
        error = float((got.double() - right).abs().max() / right.abs().max())
        if not error <= limit:
            raise AssertionError(f"{RIVAL}'s {name} is off by {error:.2e} of its largest value")


def traffic_and_flops(case: Case) -> tuple[float, float]:
    """Bytes that must be read and written once, and operations of the three products."""
    rows, depth = case.h.shape
    classes = case.weight.shape[0]
    size = case.h.element_size()
    traffic = size * (2 * rows * depth + rows * classes + 2 * classes * depth) + rows * (8 + 4 + 4)
    return traffic, 6 * rows * classes * depth


def measure(shape: Shape, device: str, backends: list[str], roof: Roofline) -> list[dict[str, Any]]:
    """A row a contender: time and roofline share, or the error that disqualified it."""
    rows, depth, classes, name = shape
    case = make(rows, depth, classes, DTYPES[name], device)
    facts = {"rows": rows, "depth": depth, "classes": classes, "dtype": name}
    contenders: dict[str, Replay] = {}
    failed: list[dict[str, Any]] = []
    for contender in [*backends, RIVAL]:
        try:
            made = ready(rival(case) if contender == RIVAL else ours(case, contender), device)
            if contender == RIVAL:
                check_rival(case, made.out)
            else:
                check(case, made.out)
            contenders[contender] = made
        except Exception as error:
            failed.append({**facts, "contender": contender, "error": f"{type(error).__name__}: {error}"})
    if not contenders:
        return failed
    times = interleaved({key: made.run for key, made in contenders.items()}, SAMPLES, device)
    least = roof.least_us(*traffic_and_flops(case), DTYPES[name])
    against = times[RIVAL].p50 if RIVAL in times else None
    return failed + [
        {
            **facts,
            "contender": key,
            "error": "",
            "p20_us": took.p20,
            "p50_us": took.p50,
            "p80_us": took.p80,
            "samples": took.samples,
            "roofline_share": least / took.p50,
            "speedup": against / took.p50 if against else None,
        }
        for key, took in times.items()
    ]


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['rows']:6} x {row['depth']:4} x {row['classes']:4} {row['dtype']:4} {row['contender']:13}"
    if row["error"]:
        return f"{head} {row['error'].splitlines()[0]}"
    speedup = f"{row['speedup']:.2f}x" if row["speedup"] else "-"
    return (
        f"{head} {row['p50_us']:9.1f} us [{row['p20_us']:.1f} {row['p80_us']:.1f}] "
        f"{row['roofline_share']:4.0%} of roofline {speedup}"
    )


def conclusion(rows: list[dict[str, Any]], left_out: int) -> str:
    """Geometric means of the speedups, by contender and range of classes."""
    parts = []
    for contender in sorted({row["contender"] for row in rows} - {RIVAL}):
        for label, low, high in (("V<=128", 0, 128), ("V>128", 129, 1 << 30)):
            found = [
                row["speedup"]
                for row in rows
                if row["contender"] == contender and row.get("speedup") and low <= row["classes"] <= high
            ]
            if found:
                mean = math.exp(sum(map(math.log, found)) / len(found))
                parts.append(f"{contender} {label} {mean:.2f}x (least {min(found):.2f}x of {len(found)})")
    wrong = sum(bool(row["error"]) for row in rows)
    if wrong:
        parts.append(f"{wrong} wrong or failed")
    if left_out:
        parts.append(f"{left_out} shapes left out for want of time")
    return "against torch.compile: " + "; ".join(parts or ["nothing measured"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_critic_head")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--budget", type=float, default=400.0, help="seconds; shapes that do not fit are left out"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", help="as 65536x128x10xbf16,...; default: the built-in list")
    options = parser.parse_args()
    begin = time.monotonic()
    shapes = SHAPES
    if options.shapes:
        split = [text.split("x") for text in options.shapes.split(",")]
        shapes = tuple((int(n), int(d), int(v), dtype) for n, d, v, dtype in split)
    device = options.device
    wanted = ("triton", "cuda") if device == "cuda" else ("cpu",)
    reasons = ops.backends("critic_head")
    backends = [name for name in wanted if reasons[name] == "available"]
    for name in wanted:
        if name not in backends:
            print(f"{name} does not run: {reasons[name]}", flush=True)
    small = {"size": 512, "copied": 1 << 26} if device == "cpu" else {}
    roof = roofline(device, tuple(DTYPES.values()), **small)
    speeds = ", ".join(f"{str(d)[6:]} {rate / 1e12:.3g} TFLOP/s" for d, rate in roof.flops_per_s.items())
    print(f"roofline: copy {roof.bytes_per_s / 1e9:.0f} GB/s, {speeds}", flush=True)

    rows: list[dict[str, Any]] = []
    longest = 0.0
    done = 0
    with options.out.open("w") as file:
        for shape in shapes:
            started = time.monotonic()
            if done and started - begin + longest > options.budget:
                break
            measured = measure(shape, device, backends, roof)
            for row in measured:
                print(line(row), flush=True)
                file.write(json.dumps({**row, "copy_bytes_per_s": roof.bytes_per_s}) + "\n")
            file.flush()
            rows += measured
            done += 1
            longest = max(longest, time.monotonic() - started)
            if device == "cuda":
                torch.cuda.empty_cache()
    print(conclusion(rows, len(shapes) - done), flush=True)
    return 1 if any(row["error"] for row in rows) or not backends else 0


if __name__ == "__main__":
    sys.exit(main())
