"""Losses on their way from a group to the one before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lct_fast.methods import Slot


@dataclass(slots=True)
class Pending:
    """A batch whose feedback has not been applied; ``next_loss`` is None until it has come."""

    batch: int
    slot: Slot
    next_loss: Tensor | None = None


class Feedback:
    """What one group awaits of the next one, and what it owes the one before.

    Args:
        group: number of the group, from 1, for errors.
        delay: batches by which feedback is late.

    Attributes:
        pending: batches whose feedback is still to be applied, oldest first.
        owed: losses [N] of the latest ``delay`` batches that the group before learns from, oldest first.
    """

    def __init__(self, group: int, delay: int) -> None:
        self.group, self.delay = group, delay
        self.pending: deque[Pending] = deque()
        self.owed: deque[tuple[int, Tensor]] = deque()

    def awaited(self, through: int) -> list[int]:
        """Batches up to ``through`` whose feedback has not come yet."""
        return [p.batch for p in self.pending if p.batch <= through and p.next_loss is None]

    def receive(self, batch: int, next_loss: Tensor) -> None:
        """Keeps L_{k+1} [N] of ``batch`` until it is taken."""
        for pending in self.pending:
            if pending.batch == batch:
                pending.next_loss = next_loss
                return
        raise RuntimeError(f"group {self.group} keeps no slot for the feedback of batch {batch}")

    def take(self, through: int) -> Iterator[tuple[Slot, Tensor, int]]:
        """Slot, L_{k+1} [N] and number of each batch up to ``through``, oldest first; they are pending no more."""
        while self.pending and self.pending[0].batch <= through:
            pending = self.pending.popleft()
            if pending.next_loss is None:
                raise RuntimeError(f"group {self.group}: the feedback of batch {pending.batch} is missing")
            yield pending.slot, pending.next_loss, pending.batch

    def give_up(self, batch: int) -> None:
        """No feedback of ``batch``, the newest one, will come: its step failed."""
        while self.pending and self.pending[-1].batch >= batch:
            self.pending.pop()

    def owe(self, batch: int, loss: Tensor) -> None:
        """Keeps a loss that has been sent back, as long as a checkpoint may need it."""
        self.owed.append((batch, loss))
        while self.owed and self.owed[0][0] <= batch - self.delay:
            self.owed.popleft()
