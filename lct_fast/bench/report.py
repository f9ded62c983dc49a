"""A whole run: a report as JSON, written as it goes, and its rows as lines of text."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lct_fast.bench import machine, rivals, roofline
from lct_fast.bench.case import OURS, Bench, Place
from lct_fast.bench.runner import Row, measure
from lct_fast.bench.sampling import Sampler

# Fewer say too little of a median and its neighbours.
LEAST_SAMPLES = {"cpu": 7, "cuda": 30}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    shapes: none for each bench's own. budget_s: shapes that do not fit are left out. trial: a tiny shape of each
    bench, to see that it works; times mean nothing.
    """

    benches: Sequence[Bench]
    place: Place
    samples: int
    shapes: tuple[str, ...] = ()
    budget_s: float = math.inf
    out: Path | None = None
    trial: bool = False

    def shapes_of(self, bench: Bench) -> tuple[str, ...]:
        if self.trial:
            return (bench.tiny,)
        return self.shapes or bench.shapes[self.place.device]


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all of it; every line of the table goes to `say` as it is known.

    Raises:
        ValueError: a shape does not fit its op, or nothing of ours can run here.
    """
    for bench in plan.benches:
        for shape in plan.shapes:
            bench.parse(shape)
    begun = time.monotonic()
    sampler = Sampler(plan.place.device)
    roof = roofline.measure(plan.place.device, sampler, plan.trial)
    report = _head(plan, roof)
    longest = 0.0
    for bench in plan.benches:
        for shape in plan.shapes_of(bench):
            started = time.monotonic()
            name = f"{bench.name} {shape}"
            if started - begun + longest > plan.budget_s:
                report["left_out"].append(f"{name}: {plan.budget_s:.0f} s are not enough")
                continue
            try:
                rows = measure(bench, shape, plan.place, plan.samples, sampler, roof)
            except ValueError as error:
                report["left_out"].append(f"{name}: {error}")
                continue
            longest = max(longest, time.monotonic() - started)
            for row in rows:
                say(line(row))
                if row["failed"]:
                    report["failed_checks"].append(
                        f"{name} {row['contender']} {row['backend']}: {row['failed']}"
                    )
            report["rows"] += rows
            _finish(report, sampler, plan.out)
    if not report["rows"]:
        raise ValueError("; ".join(report["left_out"]))
    _finish(report, sampler, plan.out)
    return report


def _head(plan: Plan, roof: roofline.Roofline) -> dict[str, Any]:
    device = plan.place.device
    modules = sorted({m for bench in plan.benches for m in bench.rivals.get(device, ())})
    modules = modules if plan.place.rivals else []
    report: dict[str, Any] = {"benchmark": "ops", "command": " ".join(["lct-fast", *sys.argv[1:]])}
    report |= machine.header(device)
    report["versions"] |= rivals.versions(modules)
    report |= {"samples": plan.samples, "trial": plan.trial, "roofline": roof.as_json()}
    report["missing_rivals"] = rivals.missing(modules)
    return report | {"left_out": [], "failed_checks": [], "rows": []}


def _finish(report: dict[str, Any], sampler: Sampler, out: Path | None) -> None:
    share = sampler.watch.foreign_cpu_share
    report["foreign_cpu_share"] = round(share, 4)
    report["quiet"] = quiet(share, report["rows"])
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Whole at any time: who runs out of time reads what there is.
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(partial, out)


def quiet(foreign_cpu_share: float, rows: Sequence[Row]) -> bool:
    """Whether other programs left the machine alone: on the whole, and in four samples of five of every row."""
    calm = all(row["undisturbed"] >= 0.8 * row["samples"] for row in rows)
    return foreign_cpu_share <= machine.FOREIGN and calm


def best_rival(row: Row) -> float | None:
    """How many times as fast as the fastest rival a row of ours is; None for a rival's and without any."""
    return min(row["times_as_fast_as"].values(), default=None)


def line(row: Row) -> str:
    """A row as text."""
    head = f"{row['op']:<24} {row['shape']:<29} {row['contender'] + ' ' + row['backend']:<39}"
    if row["failed"] or row["skipped"]:
        return f"{head} {'FAILED' if row['failed'] else 'skipped'}: {row['failed'] or row['skipped']}"
    rival = best_rival(row)
    return (
        f"{head} {row['us_p50']:>10.1f} us [{row['us_p20']:.1f}, {row['us_p80']:.1f}] "
        f"{row['share_of_roofline']:>4.0%} of roofline"
        + (f", {rival:.2f}x the best rival" if rival else "")
        + (", without graphs" if row["graphs"] is False else "")
    )


def conclusion(rows: Sequence[Row]) -> str:
    """Geometric means over the shapes of how many times as fast as the best rival ours are."""
    found: dict[str, list[float]] = {}
    for row in rows:
        rival = best_rival(row)
        if row["contender"] == OURS and rival:
            found.setdefault(f"{row['op']} {row['backend']}", []).append(rival)
    parts = [
        f"{name} {math.exp(math.fsum(map(math.log, all_of)) / len(all_of)):.2f}x (least {min(all_of):.2f}x of "
        f"{len(all_of)})"
        for name, all_of in found.items()
    ]
    return "against the best rival: " + ("; ".join(parts) or "nothing measured")
