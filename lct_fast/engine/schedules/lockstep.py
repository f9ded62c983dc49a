"""Lockstep: one process takes a batch through all groups. The papers' algorithm, the reference for all else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lct_fast.engine.schedules.behind import Behind
from lct_fast.engine.schedules.serial import SerialSteps
from lct_fast.engine.schedules.true_gradient import take_true_gradient
from lct_fast.engine.stats import Stats
from lct_fast.engine.worker import Worker, check_flags


class Lockstep:
    """All groups on one batch, one after the other.

    Args:
        workers: every group's, in order.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)
        self.batch = 0
        self.serial = SerialSteps(workers) if workers[0].settings.hybrid else None
        if workers[0].settings.method.asks_behind:
            for k, worker in enumerate(workers):
                worker.set_behind(Behind(workers, k))

    def step(
        self, x: Tensor, y: Tensor, refused: Tensor | None = None, samples: Tensor | None = None
    ) -> Stats:
        """Trains every group on one batch; it leaves no trace where ``refused``, 0-dim, is 1.

        After an error groups before the one that failed have been updated, and the next batch may come.
        """
        check_flags(self.workers)
        try:
            if self.serial is not None and self.serial.hybrid.is_serial(self.batch):
                stats = self.serial.step(self.batch, x, y)
            else:
                stats = self._train(self.batch, x, y, refused, samples)
        except BaseException:
            for worker in self.workers:
                worker.feedback.give_up(self.batch)
            raise
        self.batch += 1
        return stats

    def _train(
        self, batch: int, x: Tensor, y: Tensor, refused: Tensor | None, samples: Tensor | None
    ) -> Stats:
        h = x
        take_true_gradient(self.workers, batch, x, y)
        losses, answers, sent = [], [], -sum(w.meter.wire_bytes for w in self.workers)
        for k, worker in enumerate(self.workers):
            meter = worker.meter
            meter.begin(batch)
            target = y.to(worker.device)
            bad = refused if refused is None else refused.to(worker.device)
            result = worker.train(batch, worker.place(h), target, bad, samples)
            losses.append(worker.mean(result.loss, target).to(self.workers[0].device))
            answers.append(result.feedback)
            worker.update(batch)
            if not worker.last:
                h = self.workers[k + 1].decode(worker.encode(result.h))
            meter.end()
        self._give_back(batch, answers)
        for worker in self.workers:
            worker.learn(batch)
        sent += sum(w.meter.wire_bytes for w in self.workers)
        return Stats(batch, torch.stack(losses), sent, max(len(w.feedback.pending) for w in self.workers))

    def _give_back(self, batch: int, answers: list[Tensor]) -> None:
        """Each group that learns from what another answers gets it."""
        for k, worker in enumerate(self.workers):
            if worker.owes(batch):
                before = self.workers[k - 1]
                answer = answers[-1 if worker.settings.method.feedback_from_last else k].detach()
                before.feedback.receive(batch, answer.to(before.device))
                worker.feedback.owe(batch, answer)

    def drain(self) -> list[Stats]:
        """Batches on their way: none, ever."""
        return []

    def flush(self) -> None:
        """Every critic learns from all feedback it is owed."""
        for worker in self.workers:
            worker.flush(self.batch)
