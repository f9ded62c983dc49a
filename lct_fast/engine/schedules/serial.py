"""A serial step: ordinary back-propagation through all groups, from the loss of the network's own output.

Between two groups the graph is cut and the gradient handed over, as it must be where they are in different processes.
So one process and several compute the same, in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lct_fast.engine.errors import NonFiniteError, OutOfMemoryError, first_line
from lct_fast.engine.finite import all_finite
from lct_fast.engine.hybrid import Hybrid
from lct_fast.engine.meter import Event
from lct_fast.engine.stats import Stats
from lct_fast.engine.worker import Worker, out_of_memory
from lct_fast.methods import Objective


class Part(nn.Module):
    """One group as a part of the whole network: h_{k-1} -> h_k without its critic, the last group to the logits.

    h_k is contiguous, as torch's pipelines on gloo ask of what crosses; it crosses as it is, whatever the codec.

    Attributes:
        finite: 0-dim bool, whether everything that left the group since ``begin`` was finite.
    """

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.worker = worker
        self.layers = worker.layers
        self.head = worker.group.critic if worker.last else nn.Identity()
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self.worker.group.train()
        self.finite = torch.ones((), dtype=torch.bool, device=self.worker.device)

    def forward(self, h: Tensor) -> Tensor:
        worker = self.worker
        with worker.random.active():
            h = self._through(self.layers, h)
        if not worker.last:
            # h_k to the next group, and its gradient back.
            worker.meter.serial_bytes += 2 * h.nbytes
            worker.meter.raw_bytes += h.numel() * 4
        self.finite &= torch.isfinite(h.detach()).all()
        return h

    def flags(self) -> tuple[bool, bool]:
        """Whether what left the group was finite, and its gradients are."""
        gradients = [p.grad for p in self.worker.parameters if p.grad is not None]
        return bool(self.finite), all_finite(gradients)

    @torch.no_grad()
    def trial(self, h: Tensor) -> Tensor:
        """As ``forward`` in evaluation mode, where nothing is drawn and no statistics move: to see what comes out."""
        group = self.worker.group
        group.eval()
        h = self._through(group.layers, h)
        group.train()
        return h

    def _through(self, layers: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        worker = self.worker
        with worker.autocast():
            h = self.head(layers(worker.place(h)))
        if worker.last and h.dtype != torch.float64:
            h = h.float()
        # Through one dimension: a size of 1 may have any stride, and kernels choose by strides.
        return h.contiguous().flatten().unflatten(0, h.shape)


class SerialLoss:
    """The loss of a microbatch's logits: its share of the mean over the whole batch.

    So the gradients of all microbatches add up to those of the batch, whichever rows an ignored label takes out.
    """

    def __init__(self, objective: Objective, accumulate: int) -> None:
        self.objective, self.accumulate = objective, accumulate
        self.scale = torch.ones(())

    def begin(self, target: Tensor) -> None:
        """A batch begins with these targets."""
        self.scale = self.objective.scale(target, self.accumulate)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.objective.per_sample(logits, target).sum() * self.scale

    def mean(self, losses: Sequence[Tensor]) -> Tensor:
        """The mean loss of a batch from those of its microbatches."""
        return torch.stack([loss.detach() for loss in losses]).sum() * self.accumulate


class SerialSteps:
    """Serial steps of all groups in one process.

    Args:
        workers: every group's, in order.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)
        settings = workers[0].settings
        assert settings.hybrid is not None, "the schedule has no serial steps"
        self.hybrid: Hybrid = settings.hybrid
        self.parts = [Part(worker) for worker in workers]
        self.loss = SerialLoss(settings.objective, settings.accumulate)

    def step(self, batch: int, x: Tensor, y: Tensor) -> Stats:
        """Trains the whole network on one batch; critics only learn from feedback that is due.

        Raises:
            NonFiniteError, OutOfMemoryError: they name the group; nothing was updated.
        """
        start = time.perf_counter()
        sent = sum(w.meter.serial_bytes for w in self.workers)
        for part in self.parts:
            part.begin()
        target = y.to(self.workers[-1].device)
        self.loss.begin(target)
        count = self.hybrid.microbatches
        try:
            losses = [
                back_propagate(self.parts, rows, labels, self.loss, batch)
                for rows, labels in zip(x.contiguous().chunk(count), target.chunk(count), strict=True)
            ]
        except Exception:
            # What a backward has left half way must not be added to the next batch's.
            for worker in self.workers:
                worker.group.zero_grad()
            raise
        loss = self.loss.mean(losses)
        self.parts[-1].finite &= torch.isfinite(loss)
        check_finite(self.workers, [part.flags() for part in self.parts], batch)
        for worker in self.workers:
            worker.update(batch)
        for worker in self.workers:
            worker.forget_samples()
            worker.learn(batch)
            count_step(worker, batch, y, start)
        known = torch.full((len(self.workers),), float("nan"), device=self.workers[0].device)
        known[-1] = loss
        sent = sum(w.meter.serial_bytes for w in self.workers) - sent
        return Stats(batch, known, sent, max(len(w.feedback.pending) for w in self.workers))


def back_propagate(
    parts: Sequence[Part],
    x: Tensor,
    target: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    batch: int,
) -> Tensor:
    """Forward and backward of one microbatch through ``parts``; gradients are added to ``.grad``.

    Args:
        x: [n, ...]. target: its n targets, on the last part's device. batch: number of the batch, for errors.

    Returns:
        The loss, detached.
    """
    entries, outputs, h = [], [], x
    for k, part in enumerate(parts):
        entry = h.detach().to(part.worker.device).requires_grad_(k > 0)
        with names_group(part.worker, batch, len(x)):
            h = part(entry)
        entries.append(entry)
        outputs.append(h)
    loss = loss_of(h, target)
    outputs[-1] = loss
    gradient: Tensor | None = None
    for part, entry, output in zip(reversed(parts), reversed(entries), reversed(outputs), strict=True):
        with names_group(part.worker, batch, len(x)):
            output.backward(None if gradient is None else gradient.to(output.device))
        gradient = entry.grad
    return loss.detach()


def check_finite(workers: Sequence[Worker], flags: Sequence[tuple[bool, bool]], batch: int) -> None:
    """Refuses to update after a serial step with NaN or Inf, as ``Part.flags`` of every group tell.

    Raises:
        NonFiniteError: names the first group whose output, or the last whose gradients were not finite, as they travel
            backward; the gradients of ``workers`` are dropped.
    """
    outputs, gradients = zip(*flags, strict=True)
    if all(outputs) and all(gradients):
        return
    for worker in workers:
        worker.group.zero_grad()
    if not all(outputs):
        what = f"the output of group {outputs.index(False) + 1}"
    else:
        what = f"a gradient of group {len(gradients) - gradients[::-1].index(False)}"
    raise NonFiniteError(
        f"{what} at batch {batch} (a serial step) holds NaN or Inf: no group was updated; lower the learning rate and "
        f"go on from the last checkpoint"
    )


def count_step(worker: Worker, batch: int, target: Tensor, start: float) -> None:
    """Notes in the group's meter a serial step that began at ``start``."""
    meter, now = worker.meter, time.perf_counter()
    meter.samples += worker.settings.objective.rows(target)
    meter.serial_steps += 1
    meter.serial_seconds += now - start
    meter.trace(Event("compute", "serial step", start, now, batch))


@contextmanager
def names_group(worker: Worker, batch: int, rows: int) -> Iterator[None]:
    """Turns a lack of memory inside into an error that names the group; ``rows`` are those of a microbatch."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"group {worker.index + 1} ran out of memory in the serial step of batch {batch}, microbatches of "
            f"{rows} samples ({first_line(error)}): use more microbatches, a smaller batch, or more groups"
        ) from None
