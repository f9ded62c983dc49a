"""The training loop over groups, lockstep: one process, one batch through all groups."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lct_fast import codecs
from lct_fast.engine.exits import Evaluation, evaluate
from lct_fast.engine.group import Group, exit_module, join
from lct_fast.engine.meter import Meter
from lct_fast.methods import Method, Objective, Slot
from lct_fast.methods.method import OptimizerFactory
from lct_fast.methods.objective import LossFunction

SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class NonFiniteError(ValueError):
    """A loss or an input is NaN or infinite; raised before the group's update."""


class OutOfMemoryError(RuntimeError):
    """A group did not fit the device's memory."""


@dataclass(slots=True)
class Stats:
    """What one step did. ``losses`` [K] is the mean loss of each exit, on the device; ``.tolist()`` waits for it."""

    batch: int
    losses: Tensor
    wire_bytes: int
    in_flight: int


@dataclass(slots=True)
class Pending:
    """A batch whose feedback has not been applied yet."""

    batch: int
    slot: Slot
    next_loss: Tensor


@dataclass(slots=True)
class Worker:
    """One group with what updates it."""

    group: Group
    device: torch.device
    optimizer: torch.optim.Optimizer | None
    critic_optimizer: torch.optim.Optimizer | None
    schedulers: list[torch.optim.lr_scheduler.LRScheduler]
    pending: deque[Pending]
    # The layers as they run: compiled, or the group's own.
    forward: nn.Module

    @property
    def layers(self) -> nn.Module:
        return self.forward

    @property
    def critic(self) -> Any:
        return self.group.critic

    @property
    def last(self) -> bool:
        return self.group.last

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for g in self.optimizer.param_groups for p in g["params"]] if self.optimizer else []


def _sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


class Trainer:
    """Trains the groups of ``lct.split`` on batches, one call of ``step`` a batch.

    Args:
        groups: what ``lct.split`` returned.
        method: ``LocalCritic()``, ``Greedy()`` or ``Backprop()``; the last joins all groups into one.
        codec: what crosses each cut: a name of ``lct.codecs``.
        devices: group k runs on ``devices[k * len(devices) // K]``; default: where the model is.
        num_classes: checked against the model's output when given.
        optimizer: factory ``params -> torch.optim.Optimizer`` for each group; default SGD 0.1, Nesterov 0.9,
            weight decay 5e-4 (arXiv 2102.01963).
        scheduler: factory ``optimizer -> LR scheduler`` for each group's optimiser, stepped once an update.
        feedback_delay: critic k learns from batch t after group k's update on batch t + d.
        accumulate: batches to an update.
        clip_norm: largest gradient norm of a group, clipped group by group.
        loss: a loss of one's own, ``loss(logits, target) -> [N]``; default cross-entropy with integer labels or
            soft labels [N, V].
        ignore_index: integer label that carries no loss.
        autocast: ``torch.bfloat16`` to run layers and critics under autocast.
        compile: run each group's layers through ``torch.compile``.
        channels_last: keep 4-d tensors in channels-last memory.

    Raises:
        ValueError: an argument that does not fit, in one line.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        method: Method,
        *,
        codec: str = "none",
        devices: Sequence[str | torch.device] | None = None,
        num_classes: int | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        feedback_delay: int = 0,
        accumulate: int = 1,
        clip_norm: float | None = None,
        loss: LossFunction | None = None,
        ignore_index: int = -100,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        if not groups:
            raise ValueError("groups: expected at least one group of lct.split, got none")
        self.num_classes = groups[0].cut.num_classes
        if num_classes is not None and num_classes != self.num_classes:
            raise ValueError(
                f"num_classes={num_classes}, but the model's output has {self.num_classes} classes"
            )
        if feedback_delay < 0:
            raise ValueError(f"feedback_delay: expected an integer >= 0, got {feedback_delay}")
        if accumulate < 1:
            raise ValueError(f"accumulate: expected an integer >= 1, got {accumulate}")
        if autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast: expected torch.bfloat16 or None, got {autocast}")
        self.method = method
        self.groups = list(groups) if method.uses_critics else [join(list(groups))]
        method.check([g.critic for g in self.groups[:-1]])
        self.codec = codecs.build(codec)
        self.feedback_delay = feedback_delay
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.objective = Objective(loss, ignore_index)
        self.autocast = autocast
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.batch = 0
        self.meter = Meter(len(self.groups))
        places = [torch.device(d) for d in devices] if devices else [_device_of(self.groups[0])]
        self.workers = [
            self._worker(
                g, places[k * len(places) // len(self.groups)], optimizer or _sgd, scheduler, compile
            )
            for k, g in enumerate(self.groups)
        ]

    def _worker(
        self,
        group: Group,
        device: torch.device,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        compiled: bool,
    ) -> Worker:
        group.to(device=device, memory_format=self.memory_format)  # type: ignore[call-overload]
        joint = self.method.joint_optimizer or group.last
        params = [p for p in (group if joint else group.layers).parameters() if p.requires_grad]
        main = optimizer(params) if params else None
        critic_optimizer = None
        if not joint and self.method.critic_optimizer is not None:
            critic_optimizer = self.method.critic_optimizer(group.critic.parameters())
        schedulers = [scheduler(main)] if scheduler and main else []
        forward = torch.compile(group.layers) if compiled else group.layers
        return Worker(group, device, main, critic_optimizer, schedulers, deque(), forward)  # type: ignore[arg-type]

    def step(self, x: Tensor, y: Tensor) -> Stats:
        """Train every group on one batch.

        Args:
            x: the model's input, [N, ...], floating point or token ids.
            y: int64 labels [N], or soft labels [N, V] in floating point.

        Raises:
            ValueError: shapes or labels that do not fit.
            NonFiniteError: NaN or Inf in the input or in a group's loss; that group is not updated.
            OutOfMemoryError: names the group.
        """
        self._check_batch(x, y)
        with self.meter.step(len(x)):
            return self._step(x, y)

    def _step(self, x: Tensor, y: Tensor) -> Stats:
        t = self.batch
        update, updates_now = t // self.accumulate, (t + 1) % self.accumulate == 0
        keep = self.method.uses_feedback and self.method.wants_feedback(update)
        losses: list[Tensor] = []
        sent = 0
        previous: tuple[Worker, Slot] | None = None
        h = x
        for k, worker in enumerate(self.workers):
            span = partial(self.meter.span, k)
            h = h.to(
                worker.device, memory_format=self.memory_format if h.dim() == 4 else torch.preserve_format
            )
            target = y.to(worker.device)
            scale = self.objective.scale(target, self.accumulate)
            worker.group.train()
            version = h._version
            try:
                with self._autocast(worker.device):
                    result = self.method.local_step(
                        worker, h, target, self.objective, scale, keep_slot=keep, span=span
                    )
            except RuntimeError as error:
                if _out_of_memory(error):
                    raise OutOfMemoryError(
                        f"group {k + 1} ran out of memory at batch {t} of {len(x)} samples ({_first_line(error)}): "
                        f"use a smaller batch, accumulation, or more groups"
                    ) from None
                raise
            if h._version != version:
                raise RuntimeError(
                    f"group {k + 1} changed its input in place ({worker.group.units[0]}): what crosses a cut is "
                    f"shared, use inplace=False in the first layer after it"
                )
            self._check_finite(k, worker, result.loss)
            if updates_now:
                with span("optimizer"):
                    self._update(worker)
            if previous is not None:
                self._queue(previous[0], t, previous[1], result.loss)
            previous = (worker, result.slot) if result.slot is not None else None
            losses.append(result.loss.detach())
            if not worker.last:
                with span("encode"):
                    packet = self.codec.encode(result.h)
                    sent += packet.numel() * packet.element_size()
                    self.meter.raw_bytes += result.h.numel() * 4
                    h = self.codec.decode(packet, result.h.dtype)
        self.batch += 1
        for k, worker in enumerate(self.workers):
            self._apply_feedback(k, worker, t - self.feedback_delay)
            if updates_now and worker.critic_optimizer is not None:
                self._update_critic(k, worker, t)
        self.meter.wire_bytes += sent
        in_flight = max((len(w.pending) for w in self.workers), default=0)
        means = [self._mean(loss, y) for loss in losses]
        return Stats(t, torch.stack(means), sent, in_flight)

    def _mean(self, loss: Tensor, y: Tensor) -> Tensor:
        counted = self.objective.scale(y.to(loss.device))
        return (loss.sum() * counted).to(self.workers[0].device)

    def _update(self, worker: Worker) -> None:
        if worker.optimizer is None:
            return
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(worker.parameters, self.clip_norm)
        worker.optimizer.step()
        worker.optimizer.zero_grad(set_to_none=True)
        for scheduler in worker.schedulers:
            scheduler.step()

    def _queue(self, worker: Worker, batch: int, slot: Slot, next_loss: Tensor) -> None:
        next_loss = next_loss.detach().to(worker.device)
        self.meter.feedback_bytes += next_loss.numel() * next_loss.element_size()
        worker.pending.append(Pending(batch, slot, next_loss))

    def _apply_feedback(self, k: int, worker: Worker, through: int) -> None:
        """Adds the critic's gradients of every pending batch up to ``through``."""
        while worker.pending and worker.pending[0].batch <= through:
            pending = worker.pending.popleft()
            with self.meter.span(k, "critic update"):
                self.method.critic_step(worker.critic, pending.slot, pending.next_loss)

    def _update_critic(self, k: int, worker: Worker, batch: int) -> None:
        """Critics update when the last batch of an accumulation has had its feedback."""
        optimizer = worker.critic_optimizer
        if optimizer is None or all(p.grad is None for p in worker.critic.parameters()):
            return
        with self.meter.span(k, "critic update"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def flush(self) -> None:
        """Applies the feedback still in flight. For the end of a run, not between epochs."""
        for k, worker in enumerate(self.workers):
            if worker.pending:
                self._apply_feedback(k, worker, self.batch)
                self._update_critic(k, worker, self.batch)

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
        """Loss and accuracy of every exit over ``batches`` of (x, y), in evaluation mode."""
        return evaluate(self.groups, batches, self.objective)

    def module(self, exit: int | None = None) -> nn.Module:
        """The network, or its exit ``exit`` (1-based), as a plain module that shares the trained parameters.

        None gives the user's own model. Exit k < K is groups 1..k and critic k.
        """
        return exit_module(self.groups, len(self.groups) if exit is None else exit)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()

    def _check_batch(self, x: Tensor, y: Tensor) -> None:
        if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
            raise ValueError(
                f"expected inputs and targets of one batch, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if len(x) == 0:
            raise ValueError("expected at least one sample in the batch, got none")
        # Before group 1 runs: its batch norm would take a bad input into its running statistics.
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                f"the input of batch {self.batch} holds NaN or Inf: nothing was updated; clean the data"
            )
        if self.objective.loss is not None:
            return
        if y.is_floating_point():
            if y.dim() != 2 or y.shape[1] != self.num_classes:
                raise ValueError(f"soft labels: expected [{len(x)}, {self.num_classes}], got {list(y.shape)}")
        elif y.dtype != torch.int64 or y.dim() != 1:
            raise ValueError(
                f"labels: expected int64 [{len(x)}], got {str(y.dtype).removeprefix('torch.')} {list(y.shape)}"
            )
        else:
            bad = (y != self.objective.ignore_index) & ((y < 0) | (y >= self.num_classes))
            if bool(bad.any()):
                raise ValueError(
                    f"label out of range at batch {self.batch}: expected 0..{self.num_classes - 1} or "
                    f"{self.objective.ignore_index} (ignored), got {int(y[bad][0])}; nothing was updated"
                )

    def _check_finite(self, k: int, worker: Worker, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss).all()):
            worker.group.zero_grad()
            raise NonFiniteError(
                f"the loss of group {k + 1} at batch {self.batch} is NaN or Inf: the group was not updated; lower its "
                f"learning rate and go on from the last checkpoint"
            )


def _device_of(group: Group) -> torch.device:
    return next((p.device for p in group.parameters()), torch.device("cpu"))


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search("can't allocate memory|not enough memory", str(error))
    )


def _first_line(error: BaseException) -> str:
    return re.sub(r"^\[enforce fail at [^\]]*\]\s*\.?\s*", "", str(error).splitlines()[0])
