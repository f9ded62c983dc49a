"""Simulation of groups that learn on their own: pipelined (arXiv 2102.01963, 2106.06401) and asynchronous."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lct_fast.planner.costs import GroupCost, Link
from lct_fast.planner.simulate import Step, factors

# Slots at each end of a link, as the engine has them.
DEPTH = 2


def pipelined(
    costs: Sequence[GroupCost], microbatches: int, link: Link, ratio: float = 1.0, jitter: float = 0.0
) -> tuple[Step, float]:
    """A step of ``microbatches`` once the pipeline is full, and the seconds that filling it takes, once a run.

    Group k works on batch t - k at tick t: it decodes, trains on its own loss, encodes and sends on. It waits for its
    input, and what it sends for a free slot at the next group. Nothing but losses travels back; they are not counted.

    Args:
        ratio: how many times fewer bytes the codec sends.
        jitter: how much a pass varies, as for ``simulate``; a step on a group's own loss is two passes.
    """
    count = len(costs)
    work = _work(costs, microbatches, link, ratio)
    transfer = np.asarray([link.seconds(c.activation_bytes / ratio) for c in costs])
    # Long enough that the slowest group or link sets the pace at the end.
    batches = 4 * DEPTH + 2 * count + (512 if jitter else 32)
    factor = np.ones((count, batches))
    if jitter:
        factor = factors(np.random.default_rng(0), jitter / math.sqrt(2), factor.shape)
    taken = np.zeros((count, DEPTH))
    arrival = np.zeros(count)
    finished = np.zeros(batches)
    last = np.zeros(count)
    sent_until = np.zeros(count)
    for tick in range(batches + count - 1):
        k = np.arange(max(0, tick - batches + 1), min(count, tick + 1))
        batch = tick - k
        slot = batch % DEPTH
        done = np.maximum(last[k], arrival[k]) + work[k] * factor[k, batch]
        last[k] = taken[k, slot] = done
        # It leaves when the link is free and the next group has let go of the slot it goes to.
        after = np.minimum(k + 1, count - 1)
        room = np.where((batch >= DEPTH) & (k < count - 1), taken[after, slot], 0.0)
        leaves = np.maximum(np.maximum(done, sent_until[k]), room)
        sent_until[k] = leaves + transfer[k]
        inner = k < count - 1
        arrival[k[inner] + 1] = sent_until[k[inner]] + link.latency
        if k[-1] == count - 1:
            finished[batch[-1]] = done[-1]
    # Whole rounds of slots: batches of a round may come close together.
    late = DEPTH * (batches // (2 * DEPTH))
    pace = float(finished[-1] - finished[-1 - late]) / late
    # The last group sends nothing.
    nbytes = microbatches * sum(c.activation_bytes for c in costs[:-1]) / ratio
    inputs = np.asarray([0.0, *(c.activation_bytes for c in costs[:-1])])
    step = Step(microbatches * pace, microbatches * work, (1 + DEPTH / ratio) * inputs, nbytes)
    return step, float(finished[0])


def asynchronous(costs: Sequence[GroupCost], microbatches: int, link: Link, ratio: float = 1.0) -> Step:
    """A step when every group goes at its own pace out of a replay buffer (arXiv 2106.06401).

    No group waits for another; the step is over when the slowest has made its updates. A slow link makes groups train
    on the same batch again, which costs accuracy and no time.
    """
    work = _work(costs, microbatches, link, ratio)
    seconds = microbatches * float(work.max())
    nbytes = sum(min(microbatches * c.activation_bytes / ratio, seconds * link.bandwidth) for c in costs[:-1])
    inputs = np.asarray([0.0, *(c.activation_bytes for c in costs[:-1])])
    return Step(seconds, microbatches * work, (1 + DEPTH / ratio) * inputs, nbytes)


def _work(costs: Sequence[GroupCost], microbatches: int, link: Link, ratio: float) -> NDArray[np.float64]:
    """Seconds of each group for a microbatch, with its share of the optimiser's step and its part in the transfers."""
    own = [link.worker_seconds(c.activation_bytes / ratio) for c in costs[:-1]]
    return np.asarray(
        [
            c.decode_s + c.local_s + c.encode_s + c.update_s / microbatches + received + sent
            for c, received, sent in zip(costs, [0.0, *own], [*own, 0.0], strict=True)
        ]
    )
