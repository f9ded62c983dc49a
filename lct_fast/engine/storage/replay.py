"""The replay buffer at a cut: what lets a group learn at its own pace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lct_fast.codecs import Encoded, Layout


@dataclass(slots=True, eq=False)
class ReplaySlot:
    """A whole mini-batch, detached, as a codec made it.

    Attributes:
        batch: its number at the first group.
        coded: what stands for h [N, ...]; decoding needs nothing else.
        target: as in ``Trainer.step``.
        losses: mean loss [K] of each exit when the batch came, NaN where it is not known.
        written: number of the write that put it here, from 0.
        uses: how often it has been taken.
    """

    batch: int
    coded: Encoded
    target: Tensor
    losses: Tensor
    written: int
    uses: int = 0


class ReplayBuffer:
    """Keeps the newest ``size`` mini-batches at a cut (arXiv 2106.06401).

    A write overwrites the slot of the oldest write. ``sample`` takes, among the slots used least, the newest; it stays
    where it is and counts one use more. Ages are compared as numbers of writes, not as places in the buffer.

    Args:
        size: slots M, at least 1.
        reuse_limit: how often a slot may be taken; None for any number of times.

    Attributes:
        writes: how many there have been.
    """

    def __init__(self, size: int, reuse_limit: int | None = None) -> None:
        if size < 1:
            raise ValueError(f"buffer: expected a number of slots >= 1, got {size}")
        if reuse_limit is not None and reuse_limit < 1:
            raise ValueError(f"reuse_limit: expected a number >= 1 or None, got {reuse_limit}")
        self.size, self.reuse_limit = size, reuse_limit
        self.slots: list[ReplaySlot] = []
        self.writes = 0

    def __len__(self) -> int:
        return len(self.slots)

    def write(self, batch: int, coded: Encoded, target: Tensor, losses: Tensor) -> None:
        """Keeps a batch, in place of the oldest where there is no room.

        Args:
            coded: as ``Codec.resolve`` gave it; no one may change its tensors afterwards, nor ``target``.
        """
        if len(self.slots) == self.size:
            self.slots.remove(min(self.slots, key=lambda slot: slot.written))
        self.slots.append(ReplaySlot(batch, coded, target, losses, self.writes))
        self.writes += 1

    def sample(self, fresh: bool = False) -> ReplaySlot | None:
        """The newest of the slots used least, one use more on its count; None while there is none to take.

        With ``fresh`` only a slot that was never taken.
        """
        if not self.slots:
            return None
        slot = min(self.slots, key=lambda slot: (slot.uses, -slot.written))
        limit = 1 if fresh else self.reuse_limit
        if limit is not None and slot.uses >= limit:
            return None
        slot.uses += 1
        return slot

    def age(self, slot: ReplaySlot) -> int:
        """How many batches have been written since ``slot`` was."""
        return self.writes - 1 - slot.written

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain data. A codebook that several slots share is in it once."""
        tensors: dict[int, Tensor] = {}
        slots = []
        for slot in self.slots:
            layout = slot.coded.layout
            tensors |= {id(t): t for t in slot.coded.tensors}
            slots.append(
                {
                    "batch": slot.batch,
                    "written": slot.written,
                    "uses": slot.uses,
                    "target": slot.target,
                    "losses": slot.losses,
                    "layout": [list(layout.shape), list(layout.stride), _name(layout.dtype)],
                    "version": slot.coded.version,
                    "tensors": [list(tensors).index(id(t)) for t in slot.coded.tensors],
                }
            )
        strides = [list(t.stride()) for t in tensors.values()]
        return {
            "writes": self.writes,
            "slots": slots,
            "tensors": list(tensors.values()),
            "strides": strides,
        }

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Puts back what ``state`` gave, on ``device``.

        Raises:
            ValueError: more slots than this buffer has.
        """
        if len(state["slots"]) > self.size:
            raise ValueError(f"buffer: {len(state['slots'])} slots were saved, this run has {self.size}")
        # Kernels choose by strides, which a saved tensor has lost.
        tensors = [
            torch.empty_strided(t.shape, stride, dtype=t.dtype, device=device).copy_(t)
            for t, stride in zip(state["tensors"], state["strides"], strict=True)
        ]
        self.writes = state["writes"]
        self.slots = []
        for saved in state["slots"]:
            shape, stride, dtype = saved["layout"]
            layout = Layout(tuple(shape), tuple(stride), getattr(torch, dtype))
            coded = Encoded(tuple(tensors[i] for i in saved["tensors"]), layout, saved["version"])
            target, losses = saved["target"].to(device), saved["losses"].to(device)
            self.slots.append(
                ReplaySlot(saved["batch"], coded, target, losses, saved["written"], saved["uses"])
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
