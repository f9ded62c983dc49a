"""A critic whose head is the same at every cut, and never learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lct_fast._init import he_init
from lct_fast.critics.base import Critic, at_least_one, image_shape

_SEED = 20210


class SharedCritic(Critic):
    """Average pool to pool x pool; a 1x1 convolution to `channels`; ReLU; a fixed random linear head.

    All cuts have the same head, so their groups and critics learn towards one common space of `channels` x pool x pool
    features. The head is drawn from a seed of its own and stays: a head that learned from several groups at once would
    tie them together, which neither local learning nor one process a group allows. The 1x1 convolution is the cut's
    own and learns. Fixed random heads as targets are related to feedback alignment (arXiv 1411.0247).

    Args:
        shape: (C, H, W), the group's output without the batch. A map smaller than pool x pool has a smaller head, cut
            from the same numbers.
        num_classes: classes.
        pool: side of the pooled map.
        channels: that the 1x1 convolution makes.

    Raises:
        ValueError: shape is not a feature map, pool or channels < 1.
    """

    activation = "relu"

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, pool: int = 2, channels: int = 64):
        super().__init__()
        inputs, height, width = image_shape("shared", shape)
        at_least_one("shared", pool=pool, channels=channels)
        self.pool = pool
        self.project = nn.Conv2d(inputs, channels, 1)
        self.head = nn.Linear(channels * min(pool, height) * min(pool, width), num_classes)
        he_init(self, self.head)
        everywhere = torch.randn(
            num_classes, channels * pool * pool, generator=torch.Generator().manual_seed(_SEED)
        )
        with torch.no_grad():
            # As `he_init` scales a head's weights.
            self.head.weight.copy_(everywhere[:, : self.head.in_features] / self.head.in_features**0.5)
        self.head.requires_grad_(False)

    def from_pooled(self, pooled: Tensor) -> Tensor:
        u: Tensor = self.project(pooled)
        return u.flatten(1)
