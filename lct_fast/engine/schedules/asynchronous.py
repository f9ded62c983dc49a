"""Asynchronous in one process: a seeded simulation of groups that each work at their own pace (arXiv 2106.06401)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lct_fast.engine.schedules.paced_group import PacedGroup
from lct_fast.engine.schedules.schedule import Async
from lct_fast.engine.schedules.turns import Turns
from lct_fast.engine.stats import Stats
from lct_fast.engine.worker import Worker, learning_rate

# A learning rate that falls to this part of itself or below in one update has dropped.
DROP = 0.5


class Asynchronous:
    """Groups that take turns at random, each out of the replay buffer before it.

    In its turn group 1 takes the next batch, every other group a slot of its buffer. It trains, and what it makes of
    the batch goes into the buffer behind it. A group that has made all its updates goes on forwarding, in evaluation
    mode, as long as one behind it learns. The whole of it depends on the seed only.

    Args:
        workers: every group's, in order.
        pace: of the run, checked.
        seed: of the run.

    Attributes:
        batch: how many batches group 1 has taken; more than it trained on, once it only forwards.
    """

    def __init__(self, workers: Sequence[Worker], pace: Async, seed: int) -> None:
        slow = None if pace.slow_group is None else pace.slow_group - 1
        self.turns = Turns(len(workers), slow, pace.slow_down, seed)
        self.groups = [
            PacedGroup(worker, pace, len(workers), self.turns if worker.index == 0 else None)
            for worker in workers
        ]
        self.batch = 0

    @property
    def finished(self) -> bool:
        """Whether every group has made its updates."""
        return not any(group.learns for group in self.groups)

    def step(self, x: Tensor, y: Tensor) -> Stats:
        """Turns up to and with the one in which group 1 takes this batch, or until every group is finished."""
        if self.finished:
            raise RuntimeError(
                f"every group has trained on its {self.groups[0].steps} batches: end with trainer.finished, or give "
                f"the trainer more steps"
            )
        sent = 0
        while not self.finished:
            k = self.turns.next()
            if k == 0:
                sent += self._first(x, y)
                break
            sent += self._other(k)
        self.batch += 1
        losses = torch.stack([g.losses[k].to(x.device) for k, g in enumerate(self.groups)])
        known = bool(losses.isfinite().all())
        held = sum(len(g.buffer) for g in self.groups if g.buffer is not None)
        return Stats(self.batch - 1 if known else -1, losses, sent, held)

    def drain(self) -> list[Stats]:
        """Batches on their way: those in buffers stay there."""
        return []

    def flush(self) -> None:
        """Nothing is owed to anyone."""

    def set_learning_rate(self, rate: float) -> None:
        """Every group's; a lower one begins with a warm start."""
        before = learning_rate(g.worker for g in self.groups)
        for group in self.groups:
            group.worker.set_learning_rate(rate)
        if before is not None and rate < before:
            self.turns.warm_up()

    def _first(self, x: Tensor, y: Tensor) -> int:
        """Group 1's turn; the bytes it sent."""
        group = self.groups[0]
        before = learning_rate([group.worker])
        group.worker.meter.begin(group.updates)
        sent = self._work(0, self.batch, x, y)
        after = learning_rate([group.worker])
        if before is not None and after is not None and after <= DROP * before:
            self.turns.warm_up()
        return sent

    def _other(self, k: int) -> int:
        """The turn of another group; the bytes it sent."""
        group = self.groups[k]
        if not group.learns and not self._wanted(k):
            return 0
        group.worker.meter.begin(group.updates)
        slot = group.take()
        if slot is None:
            return 0
        return self._work(k, slot.batch, group.worker.decode(slot.coded), slot.target)

    def _wanted(self, k: int) -> bool:
        """Whether a group behind ``k`` learns."""
        return any(group.learns for group in self.groups[k + 1 :])

    def _work(self, k: int, batch: int, h: Tensor, target: Tensor) -> int:
        group, sent = self.groups[k], 0

        def send(h: Tensor) -> None:
            nonlocal sent
            coded = group.worker.encode(h)
            sent = coded.nbytes
            self.groups[k + 1].keep(batch, coded, target, group.losses.clone())

        to: Callable[[Tensor], None] | None = send if self._wanted(k) else None
        group.work(h, target, to)
        group.worker.meter.end()
        return sent
