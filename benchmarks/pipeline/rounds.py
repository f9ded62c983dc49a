"""The two processes of `benchmarks.pipeline`: set-up, checks, and timed visits in turns."""

import datetime
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.pipeline import balance as pipeline_balance
from benchmarks.pipeline import plan as pipeline_plan
from benchmarks.pipeline.check import Judge, merged
from benchmarks.pipeline.gather import WORKERS, gathered
from benchmarks.pipeline.local import Ceiling, Decoupled
from benchmarks.pipeline.model import CODEC, CONV, FORMATS, POOLED, Task
from benchmarks.pipeline.plan import COSTS, Costs
from benchmarks.pipeline.rivals import Backprop, Contender, DataParallel, Pipeline, Setting, TwoThreads
from lct_fast.bench.machine import FOREIGN, busy_seconds
from lct_fast.engine.trace import write_trace

BUILDERS: dict[str, type[Contender]] = {
    "backprop": Backprop,
    "two threads": TwoThreads,
    "GPipe": Pipeline,
    "1F1B": Pipeline,
    "DDP": DataParallel,
    "no link": Ceiling,
    "decoupled": Decoupled,
}
# A visit whose share of foreign CPU is above FOREIGN is made again, so often.
ATTEMPTS = 4
# Samples of every setting before the full run, and how many settings of a rival then go on; None is all.
SCREENED = 2
FINALISTS = {"backprop": 3, "two threads": 1, "GPipe": 2, "1F1B": 2, "DDP": 1}
# Steps in the trace.
TRACED = 10


@dataclass(frozen=True)
class Plan:
    """What to run: samples of each contender, timed steps of each, seconds that the repeats may fill, and the
    largest number of microbatches."""

    samples: int = 8
    steps: int = 6
    limit_s: float = 560.0
    microbatches: int = 16


def settings(most: int = 16) -> list[Setting]:
    """Every contender at every setting of up to ``most`` microbatches."""
    formats = tuple(FORMATS)
    counts = [m for m in (1, 2, 4, 8, 16) if m <= most]
    out = [Setting("backprop", f, m) for f in formats for m in counts]
    out += [Setting("two threads", f, m) for f in formats for m in counts if m <= 4]
    out += [Setting(kind, f, m) for kind in ("GPipe", "1F1B") for f in formats for m in counts if m > 1]
    out += [Setting("DDP", f) for f in formats]
    grouped = (("greedy", POOLED), ("local-critic", POOLED), ("local-critic", CONV))
    kinds = ("no link", "decoupled")
    out += [Setting(kind, "channels_last", 1, method, critic) for kind in kinds for method, critic in grouped]
    out += [
        Setting("decoupled", "channels_last", 1, method, POOLED, CODEC)
        for method in ("greedy", "local-critic")
    ]
    return out


def build(task: Task, setting: Setting, rank: int) -> Contender | None:
    """This process's part of a contender, None if it has none."""
    kind = BUILDERS[setting.kind]
    return kind(task, setting, rank) if rank < kind.processes else None


def visit(contender: Contender | None, steps: int) -> dict[str, Any]:
    """One sample: time a batch, the slowest process counting; CPU time a batch of each; what others used."""
    dist.barrier()
    busy, wall = busy_seconds(), time.perf_counter()
    own = time.process_time()
    seconds = contender.run(steps) if contender else 0.0
    own = time.process_time() - own
    loss = float(contender.loss) if contender and contender.loss is not None else None
    parts = gathered({"seconds": seconds, "own": own, "loss": loss})
    wall = time.perf_counter() - wall
    foreign = busy_seconds() - busy - sum(part["own"] for part in parts)
    return {
        "us": max(part["seconds"] for part in parts) / steps * 1e6,
        "cpu_us": [part["own"] / (1 + steps) * 1e6 for part in parts],
        "foreign": max(foreign, 0.0) / wall / (os.cpu_count() or 1),
        "loss": [part["loss"] for part in parts],
    }


def turns(count: int, rounds: int) -> Iterable[tuple[int, int]]:
    """(round, contender), each round beginning with another contender."""
    return ((r, (r + k) % count) for r in range(rounds) for k in range(count))


def rounds(
    contenders: list[tuple[Setting, Contender | None]], plan: Plan, rank: int, since: float
) -> list[Any]:
    """``plan.samples`` visits of each contender; a visit that others disturbed is made again if time allows."""
    taken: list[list[dict[str, Any]]] = [[] for _ in contenders]
    repeated = [0] * len(contenders)
    begun = time.monotonic() - since
    total = plan.samples * len(contenders)
    bar = tqdm(turns(len(contenders), plan.samples), total=total, disable=rank > 0, desc="visits")
    for done, (_, i) in enumerate(bar):
        best: dict[str, Any] = {}
        for attempt in range(ATTEMPTS):
            sample = visit(contenders[i][1], plan.steps)
            if not best or sample["foreign"] < best["foreign"]:
                best = sample
            repeated[i] += attempt > 0
            spent = time.monotonic() - since
            ahead = spent < begun + (plan.limit_s - begun) * (done + 1) / total
            # Both processes must agree on going on, and their clocks may not.
            again = torch.tensor(best["foreign"] > FOREIGN and ahead)
            dist.broadcast(again, 0)
            if not bool(again):
                break
        taken[i].append(best)
    return [
        {"setting": asdict(setting), "name": setting.name, "repeated": repeated[i], "visits": taken[i]}
        for i, (setting, _) in enumerate(contenders)
    ]


def metered(contenders: list[tuple[Setting, Contender | None]], folder: Path) -> dict[str, Any]:
    """What the engine's own meter says of its timed ticks, group by group; a trace of local-critic after that."""
    out = {}
    for setting, contender in contenders:
        if isinstance(contender, Decoupled):
            out[setting.name] = gathered(contender.shares())
            if (setting.method, setting.critic, setting.codec) == ("local-critic", POOLED, ""):
                contender.trainer.meter.groups[0].trace_from_here(TRACED)
                contender.run(TRACED)
                meter, offsets = contender.trainer.gather_meter()
                write_trace(folder / f"trace-{contender.rank}.json", meter.groups, offsets)
    return out


def kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that go on to the full run: of each rival the fastest settings, everything else."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: min(visit["us"] for visit in row["visits"])):
        by_kind.setdefault(row["setting"]["kind"], []).append(row)
    return [row for kind, found in by_kind.items() for row in found[: FINALISTS.get(kind)]]


def work(rank: int, task: Task, plan: Plan, folder: str) -> None:
    """Process ``rank``. Process 0 writes ``found.json`` into ``folder``."""
    since = time.monotonic()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORKERS,
        timeout=datetime.timedelta(minutes=3),
    )
    found: dict[str, Any] = {"balance": {}, "first": {}, "failed_checks": []}
    if rank == 0:
        # The other process has nothing to build for the first contender, and waits.
        for critic in tqdm((POOLED, CONV), desc="balance"):
            setting = Setting("no link", "channels_last", 1, "local-critic", critic)
            found["balance"][critic] = pipeline_balance.measure(task, setting, plan.samples)._asdict()
    links = pipeline_plan.links(task, rank)
    judge = Judge(task)
    contenders = []
    for setting in tqdm(settings(plan.microbatches), disable=rank > 0, desc="set-up and checks"):
        contender = build(task, setting, rank)
        got = merged(gathered(contender.first() if contender else {}))
        verdict = gathered(judge(setting, got) if rank == 0 else None)[0]
        if verdict.wrong is None:
            contenders.append((setting, contender))
        else:
            found["failed_checks"].append(f"{setting.name}: {verdict.wrong}")
            if contender:
                contender.close()
        found["first"][setting.name] = {
            "first_loss": [float(v) for k, v in got.items() if k.endswith("loss")],
            "loss_error": verdict.loss,
            "gradient_error": verdict.gradient,
        }
    screen = replace(plan, samples=SCREENED, steps=max(plan.steps // 2, 1), limit_s=plan.limit_s / 3)
    rows = rounds(contenders, screen, rank, since)
    names = gathered([row["name"] for row in kept(rows)])[0]
    rows = [row | {"screened_only": True} for row in rows if row["name"] not in names]
    chosen = [c for c in contenders if c[0].name in names]
    needed = pipeline_plan.needed(setting for setting, _ in chosen)
    costs = [Costs(task, setting, rank) for setting in needed]
    rows += rounds([*chosen, *zip(needed, costs, strict=True)], plan, rank, since)
    found["rows"] = [row for row in rows if row["setting"]["kind"] != COSTS]
    found["costs"] = {"links": links, **pipeline_plan.visits(costs)}
    found["meter"] = metered(contenders, Path(folder))
    found["seconds"] = time.monotonic() - since
    for _, contender in contenders:
        if contender:
            contender.close()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
