"""What the planner predicts for the contenders of `benchmarks.pipeline`, from costs measured in the same two processes.

Each process measures its own group while the other measures its own, as they will run: two busy cores share caches and
memory. Costs take turns with the contenders, as the machine's speed changes by the minute, and are averaged likewise.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.pipeline import runtime as pipeline_runtime
from benchmarks.pipeline.gather import WORKERS, gathered
from benchmarks.pipeline.local import METHODS
from benchmarks.pipeline.model import POOLED, Task, in_format
from benchmarks.pipeline.rivals import Contender, Setting
from lct_fast.planner import decoupled, orders
from lct_fast.planner.costs import GroupCost, Link
from lct_fast.planner.measure import GroupTimer
from lct_fast.planner.plan import DDP, plan
from lct_fast.planner.simulate import simulate

COSTS = "costs"
# Kinds of contenders that the planner knows.
PREDICTED = ("GPipe", "1F1B", DDP, "decoupled")
_SMALL, _LARGE, _TRIPS = 8, 1 << 21, 20
# Bytes a second of what takes no time.
_AT_ONCE = 1e18
Row = dict[str, Any]


def needed(settings: Iterable[Setting]) -> list[Setting]:
    """The costs that the predictions of these contenders need."""
    found = {
        Setting(COSTS, s.format, _parts(s), s.method, s.critic or POOLED, s.codec)
        for s in settings
        if s.kind in PREDICTED
    }
    return sorted(found, key=lambda s: s.name)


def _parts(setting: Setting) -> int:
    # With DDP each process takes its half of the batch through both groups.
    return WORKERS if setting.kind == DDP else setting.microbatches


class Costs(Contender):
    """This process's group, timed kind by kind of work."""

    def __init__(self, task: Task, setting: Setting, rank: int) -> None:
        super().__init__(task, setting, rank)
        groups = task.groups(setting.critic)
        for group in groups:
            in_format(group, setting.format)
        rows = task.batch // setting.microbatches
        method = METHODS[setting.method]() if setting.method else None
        self.timer = GroupTimer(groups, rank, rows, setting.codec or "none", method)
        self.found: list[dict[str, Any]] = []

    def step(self) -> None:
        self.timer.round()

    def run(self, steps: int) -> float:
        """As many rounds as take the time of ``steps`` batches, more or less, after one that is not counted."""
        self.step()
        self.timer.reset()
        begin = time.perf_counter()
        for _ in range(max(1, steps * self.setting.microbatches // 4)):
            self.step()
        self.found.append({"cost": asdict(self.timer.cost(mean)), "jitter": self.timer.jitter()})
        seconds = time.perf_counter() - begin
        # The other process may have more to do, and is to do it beside a busy one.
        others = dist.barrier(async_op=True)
        while not others.is_completed():
            self.step()
        return seconds


def visits(contenders: Iterable[Costs]) -> dict[str, Any]:
    """What both groups cost, {"format method critic codec": {microbatches: [[group 1, group 2] of each visit]}}."""
    found: dict[str, Any] = {}
    for costs in contenders:
        parts = gathered(costs.found)
        found.setdefault(_key(costs.setting), {})[str(costs.setting.microbatches)] = list(
            map(list, zip(*parts, strict=True))
        )
    return found


def _key(setting: Setting) -> str:
    parts = (setting.format, setting.method, setting.critic or POOLED, setting.codec)
    return " ".join(part for part in parts if part)


def links(task: Task, rank: int) -> dict[str, dict[str, float]]:
    """Attributes of ``Link``: for the engine, for torch's pipelines, and for DDP, where the workers' own part is all
    that a step without computation takes."""
    bare = _bare(rank)
    few, many = (pipeline_runtime.pipeline_message(task, m, bare["latency"], rank) for m in (4, 16))
    sizes = [pipeline_runtime.crossing(task, m).numel() * 4 for m in (4, 16)]
    each = max(few - many, 0.0) / (sizes[0] - sizes[1])
    pipeline = {"worker_s": max(many - each * sizes[1], 0.0), "worker_s_per_byte": each}
    # Of two workers each sends two messages, and receives two.
    ddp = {"bandwidth": _AT_ONCE, "worker_s": pipeline_runtime.ddp_step(task, rank) / (2 * 2 * (WORKERS - 1))}
    return {"engine": bare, "pipeline": bare | pipeline, DDP: ddp}


def _bare(rank: int) -> dict[str, float]:
    """Of messages that nothing else disturbs."""
    (small, small_own), (large, large_own) = (_one_way(size, rank) for size in (_SMALL, _LARGE))
    return {
        "latency": small,
        "bandwidth": _LARGE / max(large - small, 1e-9),
        "worker_s": small_own,
        "worker_s_per_byte": max(large_own - small_own, 0.0) / _LARGE,
    }


def _one_way(nbytes: int, rank: int) -> tuple[float, float]:
    """Seconds until a message has come, and CPU seconds that it takes of a process, mean of sender and receiver."""
    message = torch.zeros(nbytes, dtype=torch.uint8)
    calls: tuple[Callable[..., Any], ...] = (dist.send, dist.recv)
    for trip in range(_TRIPS + 1):
        if trip == 1:
            start, own = time.perf_counter(), time.process_time()
        for call in calls if rank == 0 else calls[::-1]:
            call(message, 1 - rank)
    own = time.process_time() - own
    wall = gathered(time.perf_counter() - start)[0]
    return wall / (2 * _TRIPS), mean(gathered(own)) / (2 * _TRIPS)


def predicted(setting: Setting, visit: list[dict[str, Any]], link: Link) -> float:
    """Microseconds of a step of this contender, from what both groups cost in a visit."""
    m = setting.microbatches
    groups = [GroupCost(**each["cost"]) for each in visit]
    jitter = mean(each["jitter"] for each in visit)
    if setting.kind == "decoupled":
        ratio = 32.0 if setting.codec else 1.0
        return 1e6 * decoupled.pipelined(groups, 1, link, ratio, jitter)[0].seconds
    if setting.kind == DDP:
        (ddp,) = (
            p
            for p in plan({WORKERS: groups}, WORKERS, link, {}, jitter=jitter).predictions
            if p.schedule == DDP
        )
        return 1e6 * ddp.seconds
    (schedule,) = (s for s in orders.SCHEDULES if s.name == setting.kind)
    return 1e6 * (simulate(schedule, groups, m, link, jitter).seconds + max(g.update_s for g in groups))


def with_predictions(rows: list[Row], costs: dict[str, Any]) -> list[Row]:
    """The rows, those of the full run with ``predicted_us``, the median over the visits of their costs, and
    ``prediction_error``, a fraction of the measured median."""
    links = {name: Link(**found) for name, found in costs["links"].items()}
    out = []
    for row in rows:
        more = {}
        if not row["screened_only"] and row["kind"] in PREDICTED:
            setting = Setting(
                *(row[f] for f in ("kind", "format", "microbatches", "method", "critic", "codec"))
            )
            found = costs[_key(setting)][str(_parts(setting))]
            link = links["engine" if setting.method else DDP if setting.kind == DDP else "pipeline"]
            us = median(predicted(setting, visit, link) for visit in found)
            more = {"predicted_us": us, "prediction_error": us / row["us_p50"] - 1}
        out.append(row | more)
    return out
