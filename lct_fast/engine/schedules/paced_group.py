"""A group that learns at its own pace: its buffer, its count of updates, and what it does with one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lct_fast.codecs import Encoded
from lct_fast.engine.schedules.schedule import Async
from lct_fast.engine.schedules.turns import Turns
from lct_fast.engine.storage.replay import ReplayBuffer, ReplaySlot
from lct_fast.engine.worker import Worker


class PacedGroup:
    """Trains one group on ``steps`` batches, after which it only forwards.

    Args:
        worker: the group's.
        pace: of the run. groups: number of groups K.
        turns: kept with the first group of a simulation.

    Attributes:
        buffer: of what comes from the group before; None for the first group.
        updates: batches trained on so far.
        losses: mean loss [K] of each exit as known here, its own at its latest update; NaN where there is none yet.
    """

    what = "replay buffers"

    def __init__(self, worker: Worker, pace: Async, groups: int, turns: Turns | None = None) -> None:
        self.worker, self.steps = worker, pace.steps
        self.buffer = None if worker.index == 0 else ReplayBuffer(pace.buffer, pace.reuse_limit)
        self.updates = 0
        self.losses = torch.full((groups,), float("nan"), device=worker.device)
        self.turns = turns
        worker.kept = self

    @property
    def learns(self) -> bool:
        """Whether updates are left to make."""
        return self.updates < self.steps

    def keep(self, batch: int, coded: Encoded, target: Tensor, losses: Tensor) -> None:
        """Writes what came from the group before, in order of arrival; its tensors must not change any more."""
        assert self.buffer is not None and self.worker.decoder is not None
        device = self.worker.device
        resolved = self.worker.decoder.resolve(coded.to(device))
        self.buffer.write(batch, resolved, target.to(device), losses.to(device))

    def take(self) -> ReplaySlot | None:
        """A slot of the buffer; None while there is none to take.

        When the group only forwards, every slot is taken once: a second time would give the same.
        """
        assert self.buffer is not None
        slot = self.buffer.sample(fresh=not self.learns)
        if slot is None:
            return None
        if self.learns:
            self.worker.meter.took(self.buffer.age(slot), slot.uses - 1)
        index = self.worker.index
        self.losses[:index] = slot.losses[:index]
        return slot

    def work(self, h: Tensor, target: Tensor, send: Callable[[Tensor], None] | None) -> None:
        """Trains on a batch, or only forwards it in evaluation mode if all updates are made.

        Args:
            h: h_{k-1} [N, ...]. target: as in ``Trainer.step``.
            send: gets h_k, before the update; None where nobody behind learns from it.
        """
        worker, update = self.worker, self.updates
        h, target = worker.place(h), target.to(worker.device)
        if not self.learns:
            if send is not None:
                send(worker.forward(h))
            return
        result = worker.train(update, h, target)
        self.losses[worker.index] = worker.mean(result.loss, target)
        if send is not None:
            send(result.h)
        worker.update(update)
        self.updates += 1
        worker.meter.updates = self.updates

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain data."""
        buffer = None if self.buffer is None else self.buffer.state()
        turns = None if self.turns is None else self.turns.state()
        return {"updates": self.updates, "losses": self.losses, "buffer": buffer, "turns": turns}

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what ``state`` gave.

        Raises:
            ValueError: it does not fit this run's buffer.
        """
        self.updates = state["updates"]
        self.losses = state["losses"].to(self.worker.device)
        if self.buffer is not None:
            self.buffer.load_state(state["buffer"], self.worker.device)
        if self.turns is not None and state["turns"] is not None:
            self.turns.load_state(state["turns"])
