"""Serial steps over processes: torch's own pipeline schedules, one group a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lct_fast.engine.errors import first_line
from lct_fast.engine.hybrid import Hybrid
from lct_fast.engine.schedules.serial import Part, SerialLoss, check_finite, names_group
from lct_fast.engine.transport.ranks import Ranks
from lct_fast.engine.worker import Worker


class SerialStage:
    """This process's part in serial steps, on a process group of its own. Every rank makes one at the same point.

    Args:
        worker: the group.
        ranks: where it stands.
        hybrid: the schedule.
    """

    def __init__(self, worker: Worker, ranks: Ranks, hybrid: Hybrid) -> None:
        self.worker, self.ranks, self.hybrid = worker, ranks, hybrid
        backend = "nccl" if worker.device.type == "cuda" else "gloo"
        self.process_group = dist.new_group(backend=backend)
        ranks.made.append(self.process_group)
        self.part = Part(worker)
        self.loss = SerialLoss(worker.settings.objective, worker.settings.accumulate)
        self._agreed: tuple[Any, ...] | None = None
        self._example = torch.empty(0)
        self._schedule: Any = None

    def agree(self, rows: int, example: Tensor) -> Tensor:
        """Gets ready for batches of ``rows`` samples.

        Args:
            example: this group's input without rows [0, ...], in the dtype it will come in.

        Returns:
            The same of this group's output, for the process behind.
        """
        example = example.to(self.worker.device)
        agreed = (rows, example.shape, example.dtype)
        if agreed != self._agreed:
            entry = torch.zeros(
                rows // self.hybrid.microbatches,
                *example.shape[1:],
                dtype=example.dtype,
                device=example.device,
            )
            output = self.part.trial(entry)
            self._schedule = self._build(entry, output)
            self._example, self._agreed = output[:0], agreed
        return self._example

    def step(self, batch: int, x: Tensor | None, target: Tensor) -> tuple[Tensor | None, int]:
        """Forward and backward of a batch, together with all other processes; gradients are added to ``.grad``.

        Args:
            x: the model's input [N, ...] in the first group's process, None elsewhere.
            target: N targets, on the group's device.

        Returns:
            The mean loss, in the last group's process, and the bytes that this process's group put on the wire.

        Raises:
            NonFiniteError, OutOfMemoryError: they name the group; nothing was updated in any process.
            PeerError: another group's process has gone.
        """
        worker, meter = self.worker, self.worker.meter
        sent = meter.serial_bytes
        self.part.begin()
        losses: list[Tensor] = []
        arguments: dict[str, Any] = {"return_outputs": False}
        if worker.last:
            self.loss.begin(target)
            arguments |= {"target": target, "losses": losses}
        self._talk(batch, len(target), lambda: self._schedule.step(*([] if x is None else [x]), **arguments))
        mean = self.loss.mean(losses) if worker.last else None
        if mean is not None:
            self.part.finite &= torch.isfinite(mean)
        everyone = torch.zeros(self.ranks.size, 2, dtype=torch.int32)
        everyone[worker.index] = torch.tensor(self.part.flags())
        everyone = everyone.to(worker.device)
        self._talk(batch, len(target), lambda: dist.all_reduce(everyone, group=self.process_group))
        check_finite([worker], [(bool(o), bool(g)) for o, g in everyone.tolist()], batch)
        return mean, meter.serial_bytes - sent

    def _build(self, entry: Tensor, output: Tensor) -> Any:
        """torch's schedule. Given both ends' shapes it does not try them out, which would move batch statistics."""
        # Here, as this import takes long and few runs need it.
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        worker, count = self.worker, self.hybrid.microbatches
        stage = PipelineStage(
            self.part,
            worker.index,
            self.ranks.size,
            worker.device,
            input_args=entry.requires_grad_(worker.index > 0),
            output_args=output.requires_grad_(),
            group=self.process_group,
        )
        # 1F1B keeps fewer microbatches in memory, but asks for one a stage; gradients come in the same order.
        kind = Schedule1F1B if count >= self.ranks.size else ScheduleGPipe
        return kind(stage, count, loss_fn=self.loss, scale_grads=False)

    def _talk(self, batch: int, rows: int, work: Callable[[], object]) -> None:
        """``work()``, which waits for other processes; what went wrong is told as everywhere."""
        with names_group(self.worker, batch, rows // self.hybrid.microbatches):
            try:
                work()
            except RuntimeError as error:
                # torch wraps what the layers raised.
                if isinstance(error.__cause__, RuntimeError):
                    raise error.__cause__ from None
                if isinstance(error, dist.DistError) or "gloo" in str(error):
                    raise self.ranks.heart.verdict(
                        f"lost a process in the serial step of batch {batch} ({first_line(error)}): see its own "
                        f"error, then go on from the last checkpoint"
                    ) from None
                raise
