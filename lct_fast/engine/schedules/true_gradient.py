"""The true gradient: back-propagation of the network's own loss through all groups, which leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lct_fast.engine.worker import Worker


def take_true_gradient(workers: Sequence[Worker], batch: int, x: Tensor, y: Tensor) -> None:
    """Gives each group's ``diagnosis`` its part of the true gradient on batch number ``batch``, if it is wanted.

    Called before any group has trained on the batch, so it is that of the same weights, the same batch statistics and
    the same dropout as the groups' own gradients. No codec is used: it is the network's own.

    Args:
        workers: every group's, in order.
        x: [N, ...]. y: as in ``Trainer.step``.
    """
    parts = [w.diagnosis for w in workers if w.diagnosis is not None]
    if len(parts) < len(workers) or not parts[0].wants(batch):
        return
    settings, last = workers[0].settings, workers[-1]
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(_untouched(worker))
        h = x
        with torch.enable_grad():
            for worker in workers:
                with worker.random.active(), worker.autocast():
                    h = worker.group.layers(worker.place(h))
                    if worker.last:
                        h = worker.group.critic(h)
            target = y.to(last.device)
            logits = h if h.dtype == torch.float64 else h.float()
            objective = settings.objective
            loss = objective.per_sample(logits, target).sum() * objective.scale(target)
            parameters = [p for part in parts for p in part.parameters]
            if not parameters:
                return
            gradients = iter(torch.autograd.grad(loss, parameters, materialize_grads=True))
    for part in parts:
        part.add_true([next(gradients) for _ in part.parameters])


@contextmanager
def _untouched(worker: Worker) -> Iterator[None]:
    """Puts a group into training mode; its buffers and random stream are as they were afterwards."""
    buffers = [(b, b.clone()) for b in worker.group.buffers()]
    drawn = worker.random.state
    worker.group.train()
    try:
        yield
    finally:
        worker.random.state = drawn
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
