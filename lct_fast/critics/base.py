"""What every critic is: features, then one linear layer to the classes."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lct_fast.critics.pooling import pool_to


class Critic(nn.Module):
    """A small classifier on a group's output: `forward(h) = head(act(features(h)))`.

    The last step is kept apart because `lct_fast.ops.critic_head` fuses activation, linear layer,
    cross-entropy and their gradients; a training loop calls `features` and hands `head`'s tensors to the op.

    Attributes:
        head: the linear layer, D features -> classes.
        activation: "relu" or "none", applied to the features before `head`.
        row_independent: False where batch norm couples the rows of a batch. Only with True does one backward
            pass give both the group's and the critic's gradient, because arXiv 2102.01963's L1 loss weighs
            rows by a sign.
        pool: side of the average pool that `features` begins with, None where it begins otherwise. A group that
            ends in batch norm and ReLU makes that pool in shared passes and calls `from_pooled` alone.
    """

    head: nn.Linear
    activation: Literal["none", "relu"] = "none"
    row_independent: bool = True
    pool: int | None = None

    def features(self, h: Tensor) -> Tensor:
        """The input of `activation`: [N, C, H, W] or [N, D'] -> [N, D], h's dtype, contiguous."""
        if self.pool is None:
            raise NotImplementedError(f"{type(self).__name__} defines no features()")
        return self.from_pooled(pool_to(h, self.pool))

    def from_pooled(self, pooled: Tensor) -> Tensor:
        """`features` of h, given `pool_to(h, pool)`."""
        raise NotImplementedError(f"{type(self).__name__} defines no from_pooled()")

    def forward(self, h: Tensor) -> Tensor:
        """Logits [N, classes]."""
        u = self.features(h)
        logits: Tensor = self.head(F.relu(u) if self.activation == "relu" else u)
        return logits


def image_shape(critic: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The (C, H, W) a critic on feature maps needs.

    Raises:
        ValueError: the group's output is not a feature map.
    """
    if len(shape) != 3:
        raise ValueError(
            f"critic {critic!r} needs a feature map (C, H, W), got shape {tuple(shape)}: use 'linear' there"
        )
    return shape[0], shape[1], shape[2]


def at_least_one(critic: str, **values: int) -> None:
    """Raises ValueError for the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"critic {critic!r}: {name} must be at least 1, got {value}")
