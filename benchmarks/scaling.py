"""Simulation: the groups of the pipeline benchmark, measured on two CPU processes, on up to 512 workers and four links.

    python -m benchmarks.scaling --out benchmarks/results/scaling.json

Every worker has a group that costs what the benchmark's two groups cost on average (benchmarks/results/pipeline.json);
a microbatch is its batch of 64. "200x" is the same network on a device that computes 200 times as fast: an assumption,
not a measurement. Nothing here was run on so many workers.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from lct_fast.planner.costs import GroupCost, Link
from lct_fast.planner.plan import ASYNC, DDP, DECOUPLED, plan

CODEC = "vq:256,8"
# Bytes a second each way, and seconds of latency.
LINKS = {
    "NVLink, 450 GB/s": Link(450e9, 2e-6),
    "InfiniBand, 50 GB/s": Link(50e9, 5e-6),
    "10 GbE": Link(1.25e9, 50e-6),
    "100 Mb/s": Link(12.5e6, 200e-6),
}
WORKERS = (8, 64, 512)
MICROBATCHES = (8, 32, 128)
# Whose costs: the groups of this setting of the pipeline benchmark, on the whole batch.
SETTING, WHOLE = f"channels_last local-critic pooled_linear:pool=4 {CODEC}", "1"
SPEEDS = {"as measured": 1.0, "200x": 200.0}
_SECONDS = [f.name for f in fields(GroupCost) if f.name.endswith("_s")]


def medians(visits: list[list[dict[str, Any]]]) -> list[dict[str, float]]:
    """What each group costs, key by key the median over visits; a visit has {"cost": ..., ...} of every group."""
    groups: list[list[dict[str, float]]] = [
        [each["cost"] for each in found] for found in zip(*visits, strict=True)
    ]
    return [{key: median(cost[key] for cost in costs) for key in costs[0]} for costs in groups]


def average(costs: list[dict[str, float]]) -> GroupCost:
    """What the groups cost on average; what crosses a cut is what the first one sends."""
    mean = {key: sum(c[key] for c in costs) / len(costs) for key in costs[0]}
    sent = {
        key: max(c[key] for c in costs) for key in ("activation_bytes", "encode_s", "decode_s", "critic_s")
    }
    inner = max(c["input_gradient_s"] for c in costs)
    return GroupCost(**(mean | sent | {"input_gradient_s": inner}))


def faster(cost: GroupCost, factor: float) -> GroupCost:
    """The same on a device ``factor`` times as fast."""
    return replace(cost, **{name: getattr(cost, name) / factor for name in _SECONDS})


def rows(cost: GroupCost) -> list[dict[str, Any]]:
    """A row for each speed, link, number of workers and of microbatches."""
    found = []
    for speed, factor in SPEEDS.items():
        group = faster(cost, factor)
        for link_name, link in LINKS.items():
            for workers in WORKERS:
                for m in MICROBATCHES:
                    made = plan({m: [group] * workers}, workers, link, {"none": 1.0, CODEC: 32.0})
                    steps = {(p.schedule, p.codec): p.seconds for p in made.predictions if not p.impossible}
                    pipelines = {n: s for (n, _), s in steps.items() if n not in (DECOUPLED, ASYNC, DDP)}
                    best = min(pipelines, key=lambda name: pipelines[name])
                    found.append(
                        {
                            "speed": speed,
                            "link": link_name,
                            "workers": workers,
                            "microbatches": m,
                            "decoupled_s": steps[DECOUPLED, "none"],
                            "decoupled_vq_s": steps[DECOUPLED, CODEC],
                            "ddp_s": steps[DDP, "none"],
                            "best_pipeline": best,
                            "best_pipeline_s": pipelines[best],
                            "pipelines_s": pipelines,
                        }
                    )
    return found


def main(argv: list[str] | None = None) -> int:
    """Simulates and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = Path("benchmarks/results/pipeline.json")
    parser.add_argument(
        "--costs", type=Path, default=source, help=f"the pipeline benchmark's file ({source})"
    )
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    args = parser.parse_args(argv)
    measured = json.loads(args.costs.read_text())
    visits = measured["costs"].get(SETTING, {}).get(WHOLE)
    # Files made before costs took turns with the contenders hold one list of groups.
    if not visits or not isinstance(visits[0], list):
        parser.error(
            f"--costs {args.costs}: expected the costs of {SETTING!r} in visits, got none: make the file anew "
            "with python -m benchmarks.pipeline"
        )
    cost = average(medians(visits))
    found = rows(cost)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "suite": "scaling",
        "simulation": True,
        "costs_from": {k: measured[k] for k in ("device", "commit")},
    }
    args.out.write_text(json.dumps(head | {"group": asdict(cost), "rows": found}, indent=1) + "\n")
    for r in found:
        print(
            f"{r['speed']:<12} {r['link']:<20} K {r['workers']:<4} m {r['microbatches']:<4} decoupled "
            f"{r['decoupled_s']:.4g} s, {CODEC} {r['decoupled_vq_s']:.4g}, {r['best_pipeline']} "
            f"{r['best_pipeline_s']:.4g}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
