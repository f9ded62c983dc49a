"""A critic that sees edges and textures for the price of one channel: depthwise convolution, pool, linear."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from lct_fast._init import he_init
from lct_fast.critics.base import Critic, at_least_one, image_shape
from lct_fast.critics.pooling import pool_to


class DepthwiseCritic(Critic):
    """Depthwise convolution 3x3, C -> C, no bias; ReLU; average pool to pool x pool; flatten; linear.

    The convolution of arXiv 1704.04861 without its 1x1 part: 9 C H W multiply-accumulates at stride 1, where a full
    convolution takes 9 C^2 H W. Rows are independent, so every method can train it.

    Args:
        shape: (C, H, W), the group's output without the batch.
        num_classes: classes.
        pool: side of the pooled map.
        stride: of the convolution; 2 divides its cost by 4.

    Raises:
        ValueError: shape is not a feature map, pool or stride < 1.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, pool: int = 4, stride: int = 1):
        super().__init__()
        channels, height, width = image_shape("depthwise", shape)
        at_least_one("depthwise", pool=pool, stride=stride)
        # Not `pool`: that says that the features begin with one.
        self.side = pool
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        rows, columns = (min(pool, -(-size // stride)) for size in (height, width))
        self.head = nn.Linear(channels * rows * columns, num_classes)
        he_init(self, self.head)

    def features(self, h: Tensor) -> Tensor:
        return pool_to(relu(self.conv(h)), self.side).flatten(1)
