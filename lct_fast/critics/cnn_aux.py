"""CNN auxiliary network of decoupled greedy learning."""

from __future__ import annotations

from torch import Tensor, nn

from lct_fast._init import he_init
from lct_fast.critics.base import Critic, at_least_one, image_shape
from lct_fast.critics.blocks import conv_blocks
from lct_fast.critics.pooling import pool_to


class CnnAuxCritic(Critic):
    """CNN-aux of arXiv 2106.06401: convolutions 3x3, C -> C, with BN and ReLU; pool 2x2; BN; linear.

    The dearest of the three auxiliary networks: twice the largest layer of the paper's CIFAR network.

    Args:
        shape: (C, H, W), the group's output without the batch.
        num_classes: classes.
        convs: number of convolutions, the paper's 2.

    Raises:
        ValueError: shape is not a feature map, or convs < 1.
    """

    row_independent = False

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, convs: int = 2):
        super().__init__()
        channels, height, width = image_shape("cnn_aux", shape)
        at_least_one("cnn_aux", convs=convs)
        self.convs = conv_blocks(channels, convs, 3)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels * min(2, height) * min(2, width), num_classes)
        he_init(self, self.head)

    def features(self, h: Tensor) -> Tensor:
        u: Tensor = self.norm(pool_to(self.convs(h), 2))
        return u.flatten(1)
