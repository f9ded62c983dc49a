"""Critics without hidden layers: the cheapest ones."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lct_fast._init import he_init
from lct_fast.critics.base import Critic, at_least_one, image_shape


class LinearCritic(Critic):
    """One linear layer on the flattened output of a group, feature map [N, C, H, W] or vectors [N, D].

    The simplest auxiliary head that greedy and local learning use (arXiv 1901.08164).

    Args:
        shape: (C, H, W) or (D,), the group's output without the batch.
        num_classes: classes.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int):
        super().__init__()
        self.head = nn.Linear(math.prod(shape), num_classes)
        he_init(self, self.head)

    def features(self, h: Tensor) -> Tensor:
        return h.flatten(1)


class PooledLinearCritic(Critic):
    """Average pool to pool x pool, flatten, one linear layer. Under 3 % of a VGG-like network's cost.

    Such linear heads on pooled maps are common in greedy learning (arXiv 1901.08164). A map smaller than
    pool x pool is taken as it is; where pool does not divide the map, the bins are those of adaptive average
    pooling.

    Args:
        shape: (C, H, W), the group's output without the batch.
        num_classes: classes.
        pool: side of the pooled map.

    Raises:
        ValueError: shape is not a feature map, or pool < 1.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, pool: int = 2):
        super().__init__()
        channels, height, width = image_shape("pooled_linear", shape)
        at_least_one("pooled_linear", pool=pool)
        self.pool = pool
        self.head = nn.Linear(channels * min(pool, height) * min(pool, width), num_classes)
        he_init(self, self.head)

    def from_pooled(self, pooled: Tensor) -> Tensor:
        return pooled.flatten(1)
