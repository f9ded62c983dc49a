"""A layer's input, kept until the loss is known: as it is, or as signs (ALR, arXiv 2403.12320)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STORAGE = ("full", "sign")


@dataclass(slots=True)
class Signs:
    """One bit a value, and for each row the mean of its values above zero and of the others.

    Behind a ReLU the others are zeros and stay zeros. 32 times less than float32, but for 8 bytes a row.
    """

    bits: Tensor
    levels: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Signs:
        """x [M, ...]."""
        rows = x.reshape(len(x), -1).float()
        above = rows > 0
        count = above.sum(1)
        high = torch.where(above, rows, 0.0).sum(1) / count.clamp(min=1)
        low = torch.where(above, 0.0, rows).sum(1) / (rows.shape[1] - count).clamp(min=1)
        return cls(_pack(above.flatten()), torch.stack([high, low]), x.shape, x.dtype)

    def values(self) -> Tensor:
        """The input, as far as its signs tell."""
        above = _unpack(self.bits, self.shape.numel()).view(self.shape[0], -1)
        high, low = self.levels[:, :, None]
        return torch.where(above, high, low).view(self.shape).to(self.dtype)

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.levels.nbytes


@dataclass(slots=True)
class Whole:
    """The input itself."""

    x: Tensor

    def values(self) -> Tensor:
        return self.x

    @property
    def nbytes(self) -> int:
        return self.x.nbytes


def keep(x: Tensor, storage: str) -> Whole | Signs:
    """x in one of the ways of ``STORAGE``."""
    return Signs.of(x) if storage == "sign" else Whole(x)


def _pack(bits: Tensor) -> Tensor:
    """[n] bool as bytes, the first one lowest."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1).to(torch.uint8)


def _unpack(packed: Tensor, count: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).flatten()[:count].bool()
