"""critic_head on the CPU against torch: forward, loss and every gradient in one call.

    python -m benchmarks.critic_head_cpu --out FILE [--threads 2] [--samples 15] [--shape N,D,V,DTYPE ...]

Contenders take turns (A B C, B C A, ...) over the same tensors, caches flushed before each. Each is compared
with float64 first, and one that fails gets no time and makes the exit status 1. A sample during which the
system took a core away from this process is measured again; where that does not help, `quiet` is false and
the numbers mean little. All contenders get 2 MB pages for large tensors, which is torch's own switch
(THP_MEM_ALLOC_ENABLE) and helps torch most; --small-pages leaves that off.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--small-pages" not in sys.argv:
    # Read by torch at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from tqdm import tqdm

from benchmarks.gpu_critic_head import make
from benchmarks.measure import percentiles
from lct_fast import _native, ops
from tests.ladder import assert_rule
from tests.ops.critic_head_case import Case, check

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SHAPES = (
    "65536,128,10,f32",
    "8192,512,100,f32",
    "65536,128,10,bf16",
    "256,512,10,f32",
    "128,8192,10,f32",
    "2048,2048,1000,f32",
)
# Attempts a sample before the machine is called busy.
ATTEMPTS = 4

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
Run = Callable[[], Any]


def linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(linear(h, weight, bias), target)


def torch_step(case: Case, loss_of: Callable[..., Tensor]) -> Callable[[], Gradients]:
    """Mean loss and its gradients, by autograd."""
    assert case.bias is not None
    leaves = [x.clone().requires_grad_() for x in (case.h, case.weight, case.bias)]

    def run() -> Gradients:
        loss = loss_of(*leaves, case.target)
        dh, dweight, dbias = torch.autograd.grad(loss, leaves)
        return loss.detach(), dh, dweight, dbias

    return run


def ours(case: Case) -> Callable[[], ops.CriticHead]:
    def run() -> ops.CriticHead:
        with ops.use_backend("cpu"):
            return case.run()

    return run


def contenders(case: Case) -> dict[str, Run]:
    compiled = torch.compile(linear_cross_entropy, dynamic=False)
    tuned = torch.compile(linear_cross_entropy, dynamic=False, mode="max-autotune-no-cudagraphs")
    return {
        "lct_fast": ours(case),
        "torch.compile": torch_step(case, compiled),
        "torch.compile max-autotune-no-cudagraphs": torch_step(case, tuned),
        "torch eager": torch_step(case, linear_cross_entropy),
    }


def check_torch(case: Case, out: Gradients) -> None:
    """A rival has to be right, not as exact as our own kernels are held to be."""
    exact, plain = case.exact(), case.plain()
    loss, dh, dweight, dbias = out
    eps = torch.finfo(case.h.dtype).eps
    assert_rule("loss", loss, plain.loss.mean(), exact.loss.mean(), eps, float(exact.loss.max()))
    # The compiler sums the rows of dbias one after another, and half precision rounds dlogits in between.
    for name, got in (("dh", dh), ("dweight", dweight), ("dbias", dbias)):
        assert_rule(name, got, getattr(plain, name), getattr(exact, name), 32 * eps)


def preempted() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def busy_seconds() -> float:
    """CPU time that the whole system has spent, steal included."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def sample(run: Run, flush: Tensor) -> tuple[float, bool]:
    """Microseconds, and whether no other program took a core meanwhile."""
    for _ in range(ATTEMPTS):
        flush.zero_()
        before = preempted()
        begin = time.perf_counter()
        run()
        took = (time.perf_counter() - begin) * 1e6
        if preempted() == before:
            return took, True
    return took, False


def measure(shape: str, samples: int) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each contender of one shape, and what failed its check."""
    *sizes, name = shape.split(",")
    rows, depth, classes = map(int, sizes)
    case = make(rows, depth, classes, DTYPES[name], "cpu")
    running = contenders(case)
    failed = []
    for contender, run in list(running.items()):
        out = run()
        try:
            check(case, out) if isinstance(out, ops.CriticHead) else check_torch(case, out)
        except AssertionError as error:
            failed.append(f"{shape} {contender}: {error}")
            del running[contender]
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
                "rows": rows,
                "depth": depth,
                "classes": classes,
                "dtype": name,
                "contender": contender,
                "us_p20": p.p20,
                "us_p50": p.p50,
                "us_p80": p.p80,
                "samples": p.samples,
                "undisturbed": sum(clean for _, clean in times),
            }
        )
    best = min((row["us_p50"] for row in table if row["contender"] != "lct_fast"), default=float("nan"))
    for row in table:
        row["times_as_fast_as_best_rival"] = best / row["us_p50"]
    return table, failed


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def header(threads: int) -> dict[str, Any]:
    native = _native.load()
    if native is None:
        raise SystemExit(_native.why_absent())
    return {
        "benchmark": "critic_head_cpu",
        "what": "loss, dlogits, dh, dweight and dbias of mean cross-entropy in one call, microseconds",
        "command": f"python -m benchmarks.critic_head_cpu {' '.join(sys.argv[1:])}",
        "device": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
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
    parser.add_argument("--shape", action="append", metavar="N,D,V,DTYPE", help="default: all of the table")
    parser.add_argument("--small-pages", action="store_true", help="leave THP_MEM_ALLOC_ENABLE unset")
    args = parser.parse_args()
    if args.samples < 7:
        parser.error(f"--samples must be at least 7 to say anything, got {args.samples}")
    torch.set_num_threads(args.threads)
    report = header(args.threads)
    busy, own, begun = busy_seconds(), sum(os.times()[:4]), time.perf_counter()
    table: list[dict[str, Any]] = []
    failed: list[str] = []
    for shape in args.shape or SHAPES:
        rows, wrong = measure(shape, args.samples)
        failed += wrong
        for row in rows:
            table.append(row)
            print(
                f"{shape:>20}  {row['contender']:<42} {row['us_p50']:>10.0f} us "
                f"[{row['us_p20']:.0f}, {row['us_p80']:.0f}]  {row['times_as_fast_as_best_rival']:.2f}x",
                flush=True,
            )
        torch._dynamo.reset()
    elapsed = time.perf_counter() - begun
    foreign = busy_seconds() - busy - (sum(os.times()[:4]) - own)
    report["foreign_cpu_share"] = round(max(foreign, 0.0) / elapsed / (os.cpu_count() or 1), 4)
    report["quiet"] = report["foreign_cpu_share"] <= 0.05 and all(
        row["undisturbed"] >= 0.8 * row["samples"] for row in table
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
