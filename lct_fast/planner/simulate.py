"""Discrete-event simulation of a step of a pipeline schedule, all workers at once.

Every worker's order is fixed beforehand, and so is the order of messages on every link. So a time is known as soon as
those it waits for are, in whatever order they are found: each round takes the next entry of every worker that has what
it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lct_fast.planner import orders
from lct_fast.planner.costs import GroupCost, Link

Array = NDArray[np.float64]
# Passes drawn for a prediction with jitter, all steps together, and steps at most.
_DRAWN, _STEPS = 50_000, 100


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a schedule.

    Attributes:
        seconds: from the first forward pass to the last gradient.
        busy: seconds each worker computes.
        in_flight: bytes of activations that each worker holds at most, those that enter a chunk counted.
        nbytes: sent, by all workers together.
    """

    seconds: float
    busy: Array
    in_flight: Array
    nbytes: float


def simulate(
    schedule: orders.Schedule, costs: Sequence[GroupCost], microbatches: int, link: Link, jitter: float = 0.0
) -> Step:
    """A step of ``microbatches``, worker k holding group k; with two chunks a worker, groups are cut in equal halves.

    Half of a backward pass is for input gradients, half for weights, where a schedule parts them. Transfers go on
    beside the computation, one at a time each way between two workers, but for the workers' own part in them. The
    optimiser's step is left out.

    Args:
        jitter: how much passes vary, their standard deviation over their mean. With it a step is the mean of several
            with random passes, the same ones each time.

    Raises:
        ValueError: the schedule can't be used with so many workers and microbatches.
    """
    workers, m = len(costs), microbatches
    why = schedule.fits(workers, m)
    if why is not None:
        raise ValueError(f"{schedule.name}: {why}")
    rows = [schedule.order(rank, workers, m) for rank in range(workers)]
    codes = np.full((workers, max(map(len, rows))), orders.NOTHING, np.int16)
    micro = np.zeros(codes.shape, np.int32)
    for rank, row in enumerate(rows):
        codes[rank, : len(row)], micro[rank, : len(row)] = row, orders.microbatches(row)
    run = _Run(schedule, costs, m, link)
    lengths = np.asarray([len(r) for r in rows])
    if not jitter:
        return run.run(codes, micro, lengths, np.ones(codes.shape))
    draw = np.random.default_rng(0)
    count = min(_STEPS, max(1, _DRAWN // codes.size))
    steps = [run.run(codes, micro, lengths, factors(draw, jitter, codes.shape)) for _ in range(count)]
    seconds = float(np.mean([step.seconds for step in steps]))
    return replace(steps[0], seconds=seconds, busy=np.mean([step.busy for step in steps], axis=0))


def factors(draw: np.random.Generator, jitter: float, shape: tuple[int, ...]) -> Array:
    """Random factors, never negative, with mean 1 and standard deviation ``jitter`` (gamma distributed)."""
    return draw.gamma(jitter**-2, jitter**2, shape)


class _Run:
    """Tables by (kind of work, stage), and the loop over rounds.

    Times at which something has come lie in rows of one per microbatch: the input of each stage, the gradient at each
    stage's output, a row for what is there from the beginning, and one for what nobody waits for.
    """

    def __init__(
        self, schedule: orders.Schedule, costs: Sequence[GroupCost], microbatches: int, link: Link
    ) -> None:
        self.workers, self.microbatches = len(costs), microbatches
        chunks = schedule.chunks
        self.stages = stages = self.workers * chunks
        stage = np.arange(stages)
        lap, place = divmod(stage, self.workers)
        worker = np.where(schedule.vee & (lap % 2 == 1), self.workers - 1 - place, place)
        self.stage_of = np.full((self.workers, chunks), -1)
        self.stage_of[worker, lap] = stage
        # The group of which a stage is a part; each half's output is taken to be as large as the group's.
        group = stage // chunks
        forward, backward, nbytes = (
            np.asarray([getattr(c, name) for c in costs])[group]
            for name in ("forward_s", "backward_s", "activation_bytes")
        )
        forward, backward = forward / chunks, backward / chunks
        first, last = 0, stages - 1
        entering = np.concatenate([[0.0], nbytes[:-1]])
        inputs, gradients, there, nobody = stage, stages + stage, 2 * stages, 2 * stages + 1
        one = np.ones(stages)

        def table(f: object, b: object, w: object) -> Array:
            """A row a kind of work, a column a stage; input gradients go where whole backward passes do."""
            return np.stack([f * one, b * one, b * one, w * one])  # type: ignore[operator]

        self.waits = table(np.where(stage == first, there, inputs), gradients, there).astype(np.int64)
        self.gives = table(
            # The loss is where the last stage is.
            np.where(stage == last, gradients, np.minimum(stage + 1, last)),
            np.where(stage == first, nobody, stages + stage - 1),
            nobody,
        ).astype(np.int64)
        self.wakes = table(
            worker[np.minimum(stage + 1, last)], worker[np.maximum(stage - 1, first)], worker
        ).astype(np.int64)
        crosses = self.wakes != worker
        sent = table(nbytes, entering, 0.0) * crosses
        self.nbytes = sent
        self.transfer = sent / link.bandwidth
        self.latency = np.where(crosses, link.latency, 0.0)
        # Forward passes receive at one border of a stage and send at the other, backward passes the other way round.
        before, after = (np.where(c, 1.0, 0.0) for c in (crosses[orders.BACKWARD], crosses[orders.FORWARD]))
        messages = before + after
        copied = before * entering + after * nbytes
        own = messages * link.worker_s + copied * link.worker_s_per_byte
        halves = backward / 2
        self.seconds = np.stack([forward, backward, halves, halves]) + table(own, own, 0.0)
        # Each way between two workers is a link; what stays on a worker passes without delay.
        self.link = table(stage, stages + stage, 2 * stages + stage).astype(np.int64)
        self.held = np.stack([entering, -entering, 0 * entering, -entering])

    def run(
        self, codes: NDArray[np.int16], micro: NDArray[np.int32], lengths: NDArray[np.int64], factor: Array
    ) -> Step:
        """One step; ``factor``, shaped like ``codes``, is how many times its usual seconds each entry takes."""
        m = self.microbatches
        come = np.full((2 * self.stages + 2) * m, np.inf)
        come[2 * self.stages * m : (2 * self.stages + 1) * m] = 0.0
        kind, chunk = np.divmod(np.maximum(codes, 0), orders.CHUNKS)
        entry = kind * self.stages + self.stage_of[np.arange(self.workers)[:, None], chunk]
        seconds, waits, gives, wakes, transfer, latency, links, held = (
            t.reshape(-1)
            for t in (
                self.seconds,
                self.waits,
                self.gives,
                self.wakes,
                self.transfer,
                self.latency,
                self.link,
                self.held,
            )
        )
        at = np.zeros(self.workers, np.int64)
        free, busy, now, most = (np.zeros(self.workers) for _ in range(4))
        until = np.zeros(3 * self.stages)
        # Who may have what it needs: who went on in the last round, and who was sent something.
        awake = np.ones(self.workers, np.bool_)
        left = int(lengths.sum())
        while left:
            who = np.flatnonzero(awake & (at < lengths))
            what, batch = entry[who, at[who]], micro[who, at[who]]
            since = come[waits[what] * m + batch]
            ready = np.isfinite(since)
            awake[:] = False
            who, what, batch, since = who[ready], what[ready], batch[ready], since[ready]
            if not who.size:
                raise ValueError("the workers' orders wait for each other")
            cost = seconds[what] * factor[who, at[who]]
            end = np.maximum(free[who], since) + cost
            free[who] = end
            busy[who] += cost
            way = links[what]
            over = np.maximum(end, until[way]) + transfer[what]
            until[way] = over
            come[gives[what] * m + batch] = over + latency[what]
            # An input is held until nothing more is computed from it.
            now[who] += held[what]
            most[who] = np.maximum(most[who], now[who])
            at[who] += 1
            awake[who] = True
            awake[wakes[what]] = True
            left -= who.size
        nbytes = float(np.bincount(entry[codes >= 0], minlength=self.nbytes.size) @ self.nbytes.reshape(-1))
        return Step(float(free.max()), busy, most, nbytes)
