"""What lies behind a group, as a function of its output: for methods that ask the whole network for its loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lct_fast.engine.worker import Worker


class Behind:
    """h_k [M, ...] and targets -> the network's loss [M], through the groups after k and the head of the last.

    M is free: a method may send many versions of a batch. What crosses a cut is counted, forward and the loss back.

    Args:
        workers: every group's, in order; k: number of the group that asks, from 0.
    """

    def __init__(self, workers: Sequence[Worker], k: int) -> None:
        self.workers, self.k = list(workers), k

    def __call__(self, h: Tensor, target: Tensor) -> Tensor:
        here, before = h.device, self.workers[self.k]
        given, version = h, h._version
        for worker in self.workers[self.k + 1 :]:
            before.meter.wire_bytes += h.nbytes
            before.meter.raw_bytes += h.numel() * 4
            h = worker.layers(worker.place(h))
            before = worker
        if given._version != version:
            raise RuntimeError(
                f"the layers after group {self.k + 1} changed their input in place: what crosses a cut is shared, use "
                f"inplace=False in the first layer after it"
            )
        logits = before.critic(h)
        loss = before.settings.objective.per_sample(logits.float(), target.to(h.device))
        for worker in self.workers[self.k : -1]:
            worker.meter.feedback_bytes += loss.nbytes
        return loss.to(here)
