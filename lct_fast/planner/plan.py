"""What to run on K workers: every candidate's step, predicted, and the fastest that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lct_fast.planner import decoupled, orders
from lct_fast.planner.costs import GroupCost, Link, PlanError, merge
from lct_fast.planner.simulate import Array, Step, factors, simulate

# A slower step than the shortest by this part is worth an exact wire.
_SLACK = 0.02
# Weights, gradients and one moment of the optimiser.
_COPIES = 3
DECOUPLED = "decoupled, pipelined"
ASYNC = "decoupled, async"
DDP = "DDP"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One way to train on K workers. Simulation, not measurement.

    Attributes:
        schedule, codec: what runs, and what crosses the cuts.
        microbatches: parts of a batch.
        seconds: a step, every microbatch through every group, optimiser included.
        bubble: part of the workers' time that they are idle.
        fill_s: seconds before the first step is done, once a run.
        memory_bytes: of the worker that holds most: weights, gradients, one moment, and activations that wait.
        wire_bytes: a step, by all workers together.
        impossible: why it can't be used, then all numbers are NaN.
    """

    schedule: str
    codec: str
    microbatches: int
    seconds: float = math.nan
    bubble: float = math.nan
    fill_s: float = math.nan
    memory_bytes: float = math.nan
    wire_bytes: float = math.nan
    impossible: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Predictions, fastest first, those that are impossible last; the one to take, and why.

    ``starts`` are the groups (from 1) that each worker begins with, ``imbalance`` how much longer than the average the
    longest worker's own work is.
    """

    workers: int
    predictions: list[Prediction]
    chosen: Prediction
    reasons: list[str]
    starts: list[int]
    imbalance: float


def plan(
    costs: Mapping[int, Sequence[GroupCost]],
    workers: int,
    link: Link,
    codecs: Mapping[str, float],
    memory_bytes: float = math.inf,
    jitter: float = 0.0,
) -> Plan:
    """The plan for ``workers`` of them.

    Args:
        costs: by number of microbatches, the groups' costs for one of them; one or more groups a worker.
        link: between neighbours.
        codecs: by spec, how many times fewer bytes; "none" is 1 and costs no time.
        memory_bytes: of one worker.
        jitter: how much passes vary, their standard deviation over their mean.

    Raises:
        PlanError: no worker, more workers than groups, or nothing that fits the memory.
    """
    if workers < 1:
        raise PlanError(f"workers: expected 1 or more, got {workers}")
    if any(m < 1 for m in costs) or not costs:
        raise PlanError(f"microbatches: expected 1 or more, got {', '.join(map(str, costs)) or 'none'}")
    found: list[Prediction] = []
    starts: list[int] = []
    imbalance = 0.0
    for m, groups in costs.items():
        parts, starts = merge(groups, workers)
        work = [p.local_s for p in parts]
        imbalance = max(work) * len(work) / sum(work) - 1
        found += _with_groups(parts, m, link, codecs, jitter)
        found.append(_data_parallel(groups, workers, m, link, jitter))
    best: dict[tuple[str, str], Prediction] = {}
    for p in found:
        key = (p.schedule, p.codec)
        if key not in best or _rank(p) < _rank(best[key]):
            best[key] = p
    ranked = sorted(best.values(), key=_rank)
    chosen, reasons = _choose(ranked, memory_bytes, imbalance)
    return Plan(workers, ranked, chosen, reasons, starts, imbalance)


def _rank(p: Prediction) -> float:
    return math.inf if p.impossible else p.seconds


def _with_groups(
    parts: Sequence[GroupCost], m: int, link: Link, codecs: Mapping[str, float], jitter: float
) -> list[Prediction]:
    found = []
    for schedule in orders.SCHEDULES:
        why = schedule.fits(len(parts), m)
        if why is not None:
            found.append(Prediction(schedule.name, "none", m, impossible=why))
            continue
        step = simulate(schedule, parts, m, link, jitter)
        update = max(p.update_s for p in parts)
        found.append(_prediction(schedule.name, "none", m, parts, step, 0.0, update))
    for codec, ratio in codecs.items():
        coded = [replace(p, encode_s=0.0, decode_s=0.0) for p in parts] if codec == "none" else parts
        step, fill = decoupled.pipelined(coded, m, link, ratio, jitter)
        found.append(_prediction(DECOUPLED, codec, m, parts, step, fill))
        step = decoupled.asynchronous(coded, m, link, ratio)
        found.append(_prediction(ASYNC, codec, m, parts, step, fill))
    return found


def _prediction(
    name: str, codec: str, m: int, parts: Sequence[GroupCost], step: Step, fill: float, update: float = 0.0
) -> Prediction:
    held = [_COPIES * p.parameter_bytes + float(a) for p, a in zip(parts, step.in_flight, strict=True)]
    bubble = max(0.0, 1 - float(step.busy.sum()) / (len(parts) * step.seconds))
    return Prediction(name, codec, m, step.seconds + update, bubble, fill, max(held), step.nbytes)


def _data_parallel(
    groups: Sequence[GroupCost], workers: int, m: int, link: Link, jitter: float
) -> Prediction:
    """Every worker has the whole network and a share of the microbatches; gradients go round a ring while the last
    backward pass goes on, but for the workers' own part in the messages."""
    rounds = math.ceil(m / workers)
    weights = sum(g.parameter_bytes for g in groups)
    messages, part = 2 * (workers - 1), weights / workers
    ring = messages * (link.seconds(part) + link.latency)
    # Of every message that a worker sends it receives another.
    own = 2 * messages * link.worker_seconds(part)
    work, backward = sum(g.work_s for g in groups), sum(g.backward_s for g in groups)
    exposed = max(0.0, ring - backward)
    passes = np.asarray([s for g in groups for s in (g.forward_s, g.backward_s)])
    seconds = (
        rounds * work * _slowest(passes, rounds, workers, jitter)
        + exposed
        + own
        + sum(g.update_s for g in groups)
    )
    memory = _COPIES * weights + sum(g.activation_bytes for g in groups)
    bubble = max(0.0, 1 - (m * work / workers) / seconds)
    return Prediction(DDP, "none", m, seconds, bubble, 0.0, memory, 2 * (workers - 1) * weights)


def _slowest(passes: Array, rounds: int, workers: int, jitter: float) -> float:
    """How many times its usual time the slowest of ``workers`` takes for ``rounds`` of ``passes`` that vary."""
    spread = jitter * float(np.linalg.norm(passes) / passes.sum()) / math.sqrt(rounds)
    if not spread:
        return 1.0
    return float(factors(np.random.default_rng(0), spread, (1000, workers)).max(axis=1).mean())


def _choose(
    ranked: Sequence[Prediction], memory_bytes: float, imbalance: float
) -> tuple[Prediction, list[str]]:
    possible = [p for p in ranked if not p.impossible]
    fits = [p for p in possible if p.memory_bytes <= memory_bytes]
    if not fits:
        least = min(possible, key=lambda p: p.memory_bytes)
        raise PlanError(
            f"nothing fits a worker's {memory_bytes / 1e9:.3g} GB: {least.schedule} takes least, "
            f"{least.memory_bytes / 1e9:.3g} GB; use more workers"
        )
    # Async needs replay and trains later groups on older batches: it is for groups that cannot keep pace.
    steady = [p for p in fits if p.schedule != ASYNC] or fits
    fastest = steady[0]
    # Of the codecs of one schedule the exact one, unless it costs time.
    same = [
        p for p in steady if p.schedule == fastest.schedule and p.seconds <= (1 + _SLACK) * fastest.seconds
    ]
    chosen = next((p for p in same if p.codec == "none"), fastest)
    reasons = [f"{chosen.schedule} has the shortest predicted step, {_ms(chosen.seconds)}"]
    others = [p for p in steady if p.schedule != chosen.schedule]
    if others:
        second = others[0]
        reasons.append(
            f"next is {second.schedule} with {_ms(second.seconds)}, idle for {second.bubble:.1%} of the time "
            f"(here {chosen.bubble:.1%})"
        )
    coded = [p for p in steady if p.schedule == chosen.schedule and p.codec != chosen.codec]
    for p in coded:
        gain = chosen.seconds / p.seconds
        says = "would not shorten it" if gain < 1 + _SLACK else "would shorten it"
        if chosen.codec != "none":
            says = "would lengthen it"
        reasons.append(f"codec {p.codec} {says}: {_ms(p.seconds)}")
    if len(fits) < len(possible):
        reasons.append(f"{len(possible) - len(fits)} of {len(possible)} do not fit a worker's memory")
    if chosen.schedule == DDP:
        cut = next((p for p in steady if p.schedule != DDP), None)
        if cut is not None:
            reasons.append(
                f"DDP keeps the whole network on every worker; of what cuts it, {cut.schedule} is fastest"
            )
    if imbalance > 0.05:
        reasons.append(
            f"the longest group works {imbalance:.0%} more than the average: another split would be faster"
        )
    return chosen, reasons


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"
