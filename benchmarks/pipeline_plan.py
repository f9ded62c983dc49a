"""What the planner predicts for the contenders of `benchmarks.pipeline`, from costs measured in the same two processes.

Each process measures its own group while the other measures its own, as they will run: two busy cores share caches and
memory.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.pipeline_gather import WORKERS, gathered
from benchmarks.pipeline_model import CODEC, CONV, FORMATS, POOLED, Task, in_format
from lct_fast.planner import decoupled, orders
from lct_fast.planner.costs import GroupCost, Link
from lct_fast.planner.measure import measure_group
from lct_fast.planner.plan import DDP, plan
from lct_fast.planner.simulate import simulate

_SMALL, _LARGE, _TRIPS = 8, 1 << 21, 20
Row = dict[str, Any]


def measured(task: Task, counts: list[int], rank: int) -> dict[str, Any]:
    """Both groups' costs, {"format critic codec": {microbatches: [group 1, group 2]}}, and the link between them."""
    found: dict[str, Any] = {"link": _link(rank)}
    for format in FORMATS:
        found[_key(format, POOLED, "")] = {m: _costs(task, format, POOLED, "none", m, rank) for m in counts}
    for critic, codec in ((CONV, ""), (POOLED, CODEC)):
        found[_key("channels_last", critic, codec)] = {
            1: _costs(task, "channels_last", critic, codec or "none", 1, rank)
        }
    return found


def _key(format: str, critic: str, codec: str) -> str:
    return " ".join((format, critic, codec)).strip()


def _costs(task: Task, format: str, critic: str, codec: str, microbatches: int, rank: int) -> list[Row]:
    groups = task.groups(critic)
    in_format(groups[0].cut.model, format)
    dist.barrier()
    return gathered(asdict(measure_group(groups, rank, task.batch // microbatches, codec)))


def _link(rank: int) -> dict[str, float]:
    """Seconds until a small message has come, and bytes a second of a large one."""
    small, large = (_one_way(size, rank) for size in (_SMALL, _LARGE))
    return {"latency": small, "bandwidth": _LARGE / max(large - small, 1e-9)}


def _one_way(nbytes: int, rank: int) -> float:
    message = torch.zeros(nbytes, dtype=torch.uint8)
    calls: tuple[Callable[..., Any], ...] = (dist.send, dist.recv)
    for trip in range(_TRIPS + 1):
        if trip == 1:
            start = time.perf_counter()
        for call in calls if rank == 0 else calls[::-1]:
            call(message, 1 - rank)
    return gathered((time.perf_counter() - start) / (2 * _TRIPS))[0]


def predicted(row: Row, costs: dict[str, Any]) -> float | None:
    """Microseconds of a step of this contender; None for what is no schedule of the planner's."""
    link, kind, m = Link(**costs["link"]), row["kind"], row["microbatches"]
    if kind not in ("GPipe", "1F1B", "DDP", "decoupled"):
        return None
    table = costs[_key(row["format"], row["critic"] or POOLED, row["codec"])]

    def groups(count: int) -> list[GroupCost]:
        return [GroupCost(**cost) for cost in table[str(count)]]

    if kind == "decoupled":
        ratio = 32.0 if row["codec"] else 1.0
        return 1e6 * decoupled.pipelined(groups(1), 1, link, ratio)[0].seconds
    if kind == "DDP":
        # Each process takes one half of the batch through both groups.
        (ddp,) = (
            p for p in plan({WORKERS: groups(WORKERS)}, WORKERS, link, {}).predictions if p.schedule == DDP
        )
        return 1e6 * ddp.seconds
    (schedule,) = (s for s in orders.SCHEDULES if s.name == kind)
    return 1e6 * (simulate(schedule, groups(m), m, link).seconds + max(g.update_s for g in groups(m)))


def with_predictions(rows: list[Row], costs: dict[str, Any]) -> list[Row]:
    """The rows, those of the full run with ``predicted_us`` and ``prediction_error``, a fraction of the median."""
    out = []
    for row in rows:
        us = None if row["screened_only"] else predicted(row, costs)
        more = {} if us is None else {"predicted_us": us, "prediction_error": us / row["us_p50"] - 1}
        out.append(row | more)
    return out
