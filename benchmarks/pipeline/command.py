"""Decoupled training on two CPU processes of one thread against back-propagation over pipelines.

    python -m benchmarks.pipeline --out FILE [--samples 8] [--steps 6]

All contenders train the same network on the same batches with the same optimiser, malloc settings and one
thread a process. Each is set up once in two processes; its first loss and gradients are compared with float64,
and one that fails gets no time and makes the exit status 1. Then they take turns (A B C, B C A, ...): a visit
is one step untimed and `--steps` timed, the slower process counting. Two short visits of every setting decide which
settings of each rival go on to the full run. A visit during which other programs took
more than 5 % of the machine is made again while there is time; where that does not help, `quiet` is false and
the numbers mean little.

    T_1   the fastest plain back-propagation in one process of one thread, over formats and accumulation
    eta   T_1 / (2 T_2), T_2 the time of a batch on both processes; 1 is a perfect division of the work
    imbalance, critic_tax   of the two groups' CPU time, alone in one thread
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

# One thread a process; memory that a step frees stays with the process, on large pages. Without the latter each
# step faults its activations in again, 2 to 6 % of the time of whoever runs it; all contenders get the same.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
}
# Small enough for a test; its times mean nothing.
TINY_WIDTHS = (8,) * 8


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--trace", type=Path, help="also write a trace of some ticks of local-critic")
    parser.add_argument("--samples", type=int, default=8, help="of each contender (default: 8)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a sample (default: 6)")
    parser.add_argument(
        "--limit",
        type=float,
        default=560.0,
        metavar="S",
        help="no repeats that would exceed it (default: 560 s)",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny network, any --samples: a trial of the code"
    )
    args = parser.parse_args(argv)
    least = 2 if args.tiny else 7
    if args.samples < least:
        parser.error(f"--samples must be at least {least} to say anything, got {args.samples}")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.limit <= 0:
        parser.error(f"--limit must be positive seconds, got {args.limit}")
    if args.out.is_dir():
        parser.error(f"--out must be a file to write, got the folder {args.out}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    # Read by the workers' malloc and torch when they start.
    os.environ |= ENVIRONMENT
    import torch
    from torch.multiprocessing.spawn import spawn

    from benchmarks.pipeline import report
    from benchmarks.pipeline.gather import WORKERS
    from benchmarks.pipeline.model import Task
    from benchmarks.pipeline.plan import with_predictions
    from benchmarks.pipeline.rounds import Plan, work
    from lct_fast.bench.machine import commit, cpu_model

    task = Task(widths=TINY_WIDTHS, batch=32) if args.tiny else Task()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(args.samples, args.steps, args.limit, microbatches=4 if args.tiny else 16)
        spawn(work, (task, plan, folder), nprocs=WORKERS)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
        if args.trace:
            args.trace.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder, "trace-0.json"), args.trace)
    rows = [report.row(r, found["first"][r["name"]]) for r in found["rows"]]
    rows = with_predictions(rows, found["costs"])
    shares = [share for r in rows for share in r["foreign_cpu_share"]]
    summary = report.summary(rows, {critic: list(b.values()) for critic, b in found["balance"].items()})
    out = {
        "benchmark": "pipeline",
        "what": "one training step of a small CNN on a batch, microseconds; eta = T_1 / (2 T_2)",
        "command": f"python -m benchmarks.pipeline --out FILE --samples {args.samples} --steps {args.steps} "
        f"--limit {args.limit:g}",
        "tiny": args.tiny,
        "device": cpu_model(),
        "cores": os.cpu_count(),
        "workers": WORKERS,
        "threads": 1,
        "environment": ENVIRONMENT,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "batch": task.batch,
        "steps_a_sample": args.steps,
        "widths": task.widths,
        "dtype": "float32",
        "optimizer": f"SGD {task.lr}, momentum {task.momentum}, fused",
        **summary,
        "busy_s": found["balance"],
        "costs": found["costs"],
        "meter": found["meter"],
        "meter_us_a_tick": report.meter_cost(),
        "failed_checks": found["failed_checks"],
        "foreign_cpu_share": round(sum(shares) / len(shares), 4) if shares else None,
        "quiet": report.quiet(rows),
        "seconds": round(found["seconds"], 1),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(out, indent=2) + "\n")
    print(report.table(rows, summary["t1_us"]))
    for r in rows:
        if "predicted_us" in r:
            print(
                f"planned {r['contender']:<58} {r['predicted_us'] / 1e3:7.1f} ms  {r['prediction_error']:+.1%}"
            )
    for name, value in summary.items():
        print(f"{name:<40} {f'{value:.4g}' if isinstance(value, float) else value}")
    if not out["quiet"]:
        print(f"not quiet: other programs used {out['foreign_cpu_share']} of the machine")
    print("\n".join(found["failed_checks"]))
    return 1 if found["failed_checks"] else 0
