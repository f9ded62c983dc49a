"""lct-fast plan: schedule, split, critic and codec for K workers, predicted."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lct_fast import models
from lct_fast.engine import split
from lct_fast.planner.costs import GroupCost, Link, PlanError, read_costs
from lct_fast.planner.measure import measure, ratio
from lct_fast.planner.plan import DECOUPLED, Plan, plan
from lct_fast.planner.plot import svg

_MICROBATCHES = (1, 2, 4, 8, 16, 32)


def add_parser(subparsers: Any) -> None:
    """Registers ``plan``."""
    parser = subparsers.add_parser("plan", help="which split, critic, codec and schedule for K workers")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", help="a built-in model's spec, or MODULE:FACTORY; its groups are measured here"
    )
    what.add_argument("--costs", type=Path, help="JSON file with the groups' costs (docs/planner.md)")
    parser.add_argument("--workers", type=int, help="K (default: one a group of --costs; 4 for a model)")
    parser.add_argument(
        "--microbatches",
        type=int,
        nargs="+",
        help="parts of a batch, several to compare (default: 8, or 1 to 32)",
    )
    parser.add_argument(
        "--link-gbps", type=float, default=100.0, help="link between workers, gigabits a second (100)"
    )
    parser.add_argument("--link-us", type=float, default=10.0, help="its latency, microseconds (10)")
    parser.add_argument(
        "--link-worker-us", type=float, default=0.0, help="a worker's own time on a message, microseconds (0)"
    )
    parser.add_argument(
        "--link-worker-gbps",
        type=float,
        default=math.inf,
        help="speed at which a worker itself copies messages, gigabits a second (without end: others copy)",
    )
    parser.add_argument(
        "--jitter",
        type=float,
        default=0.0,
        help="how much a pass varies, %% of its mean, standard deviation (0)",
    )
    parser.add_argument("--codec", default="vq:256,8", help="codec to compare with none (vq:256,8)")
    parser.add_argument("--memory-gb", type=float, help="memory of a worker")
    parser.add_argument(
        "--critic", nargs="+", default=["pooled_linear:pool=4"], help="critics to compare (a model's)"
    )
    parser.add_argument("--batch", type=int, default=64, help="samples a batch (a model's, 64)")
    parser.add_argument("--input", default="3x32x32", help="shape of a sample (a model's, 3x32x32)")
    parser.add_argument("--classes", type=int, default=10, help="classes (a built-in model's, 10)")
    parser.add_argument("--device", default="cpu", help="where to measure (cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads to measure with (1)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="write the plan as JSON")
    parser.add_argument("--plot", type=Path, help="write a bar chart, FILE.svg")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs ``plan``."""
    _check(args)
    link = Link(
        args.link_gbps * 1e9 / 8,
        args.link_us * 1e-6,
        args.link_worker_us * 1e-6,
        8e-9 / args.link_worker_gbps,
    )
    memory = math.inf if args.memory_gb is None else args.memory_gb * 1e9
    notes: list[str] = []
    if args.costs:
        groups = read_costs(args.costs)
        workers = args.workers or len(groups)
        codecs = {"none": 1.0}
        if args.codec != "none":
            codecs[args.codec] = ratio(args.codec, (64, 8, 8), 64)
        costs = {m: groups for m in args.microbatches or [8]}
        made = plan(costs, workers, link, codecs, memory, args.jitter / 100)
    else:
        made, costs, notes = _measured(args, link, memory)
    result = _as_json(made, costs, notes)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        args.plot.write_text(svg(made))
    print(json.dumps(result) if args.json else _as_text(made, notes))
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("link_gbps", "memory_gb", "batch", "classes", "threads", "workers"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise PlanError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    for name in ("link_us", "link_worker_us", "jitter"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise PlanError(f"--{name.replace('_', '-')}: expected a number >= 0, got {value}")
    if not args.link_worker_gbps > 0:
        raise PlanError(f"--link-worker-gbps: expected a positive number, got {args.link_worker_gbps}")
    for m in args.microbatches or ():
        if m < 1:
            raise PlanError(f"--microbatches: expected 1 or more, got {m}")
    if args.plot and args.plot.suffix != ".svg":
        raise PlanError(f"--plot: expected FILE.svg, got {args.plot.name!r}")


def _measured(
    args: argparse.Namespace, link: Link, memory: float
) -> tuple[Plan, dict[int, list[GroupCost]], list[str]]:
    """The plan of a model, for the critic with which groups that learn on their own are fastest."""
    torch.set_num_threads(args.threads)
    shape = _shape(args.input)
    workers = args.workers or 4
    counts = args.microbatches or [m for m in _MICROBATCHES if args.batch % m == 0]
    for m in counts:
        if args.batch % m:
            raise PlanError(f"--microbatches: {m} equal parts of a batch of {args.batch} cannot be had")
    model = _model(args.model, shape, args.classes).to(args.device)
    example = torch.zeros(args.batch, *shape, device=args.device)
    points: list[str] | None = None
    found: list[tuple[Plan, dict[int, list[GroupCost]], str]] = []
    notes = []
    for critic in args.critic:
        groups = split(model, workers, example, critic=critic, split_points=points)
        points = [g.units[0] for g in groups[1:]]
        costs = {}
        for m in counts:
            print(
                f"measuring {workers} groups, critic {critic}, {args.batch // m} samples",
                file=sys.stderr,
                flush=True,
            )
            costs[m] = measure(groups, args.batch // m, args.codec)
        codecs = {"none": 1.0}
        if args.codec != "none" and workers > 1:
            codecs[args.codec] = ratio(args.codec, groups[0].shape, args.batch)
        found.append((plan(costs, workers, link, codecs, memory, args.jitter / 100), costs, critic))
        work = costs[counts[0]]
        tax = sum(c.critic_s for c in work) / sum(c.local_s for c in work)
        notes.append(f"critic {critic} takes {tax:.1%} of the groups' work")
    best = min(found, key=lambda f: _local_step(f[0]))
    notes.insert(0, f"groups start at {', '.join(['the input', *(points or [])])}")
    if len(found) > 1:
        notes.append(f"critic {best[2]} gives the shortest step to groups that learn on their own")
    return best[0], best[1], notes


def _local_step(made: Plan) -> float:
    return min(p.seconds for p in made.predictions if p.schedule == DECOUPLED)


def _model(spec: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    name, colon, factory = spec.partition(":")
    if name in models.names() or not colon:
        channels, size = shape[0], shape[-1]
        return models.build(spec, classes, channels, size)
    try:
        made = getattr(importlib.import_module(name), factory)()
    except (ImportError, AttributeError) as error:
        raise PlanError(
            f"--model: expected a built-in model or MODULE:FACTORY, got {spec!r}: {error}"
        ) from None
    if not isinstance(made, nn.Module):
        raise PlanError(
            f"--model {spec}: the factory must return a torch.nn.Module, got {type(made).__name__}"
        )
    return made


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise PlanError(f"--input: expected a shape such as 3x32x32, got {text!r}")
    return tuple(int(p) for p in parts)


def _as_json(made: Plan, costs: dict[int, list[GroupCost]], notes: list[str]) -> dict[str, Any]:
    # Strict JSON has no NaN.
    def clean(p: Any) -> dict[str, Any]:
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in dataclasses.asdict(p).items()
        }

    return {
        "simulation": True,
        "workers": made.workers,
        "starts": made.starts,
        "imbalance": made.imbalance,
        "chosen": clean(made.chosen),
        "reasons": [*made.reasons, *notes],
        "predictions": [clean(p) for p in made.predictions],
        "costs": {str(m): [dataclasses.asdict(g) for g in groups] for m, groups in costs.items()},
    }


def _as_text(made: Plan, notes: list[str]) -> str:
    lines = [
        f"A step on {made.workers} workers, predicted (simulation):",
        f"{'schedule':<22} {'codec':<10} {'parts':>5} {'step':>10} {'idle':>6} {'memory':>9} {'sent':>10}",
    ]
    for p in made.predictions:
        head = f"{p.schedule:<22} {p.codec:<10} {p.microbatches:>5}"
        if p.impossible:
            lines.append(f"{head} {p.impossible}")
            continue
        mark = "  <- chosen" if p == made.chosen else ""
        lines.append(
            f"{head} {1e3 * p.seconds:>7.4g} ms {p.bubble:>6.1%} {p.memory_bytes / 1e9:>6.3g} GB "
            f"{p.wire_bytes / 1e6:>7.4g} MB{mark}"
        )
    return "\n".join([*lines, *(f"- {reason}" for reason in [*made.reasons, *notes])])
