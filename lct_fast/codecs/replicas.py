"""Who else codes parts of the same batch. A codec knows no process: the engine says who there is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Replicas(Protocol):
    """Encoders of one cut that code equal parts of each batch and keep one state, in step."""

    @property
    def count(self) -> int:
        """Number of replicas."""

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor summed over replicas; the same bits in all of them."""

    def first(self, t: Tensor) -> Tensor:
        """The first replica's tensor."""


class Alone:
    """One encoder, which codes all of each batch."""

    count = 1

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        return list(tensors)

    def first(self, t: Tensor) -> Tensor:
        return t
