"""MLP auxiliary network with staged spatial resolution, of decoupled greedy learning."""

from __future__ import annotations

from torch import Tensor, nn

from lct_fast._init import he_init
from lct_fast.critics.base import Critic, at_least_one, image_shape
from lct_fast.critics.blocks import conv_blocks, mlp_blocks
from lct_fast.critics.pooling import pool_to


class MlpSrAuxCritic(Critic):
    """MLP-SR-aux of arXiv 2106.06401: 1x1 convolutions on a map pooled to a quarter of its side, then an MLP.

    In full: average pool to ceil(H / 4) squared; conv 1x1, C -> C, with BN and ReLU; average pool 2x2; linear
    layers to 4C with BN and ReLU; linear to the classes. 2.6 to 10.4 % of the largest layer of the paper's
    CIFAR network. Needs at least two rows in training mode.

    Args:
        shape: (C, H, W), the group's output without the batch.
        num_classes: classes.
        convs: number of 1x1 convolutions, the paper's 3.
        layers: number of hidden linear layers, the paper's 3.

    Raises:
        ValueError: shape is not a feature map, convs or layers < 1.
    """

    activation = "relu"
    row_independent = False

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, convs: int = 3, layers: int = 3):
        super().__init__()
        channels, height, width = image_shape("mlp_sr_aux", shape)
        at_least_one("mlp_sr_aux", convs=convs, layers=layers)
        self.pool = -(-height // 4)
        self.convs = conv_blocks(channels, convs, 1)
        pooled = min(2, self.pool) * min(2, self.pool, width)
        self.mlp = mlp_blocks(channels * pooled, 4 * channels, layers)
        self.head = nn.Linear(4 * channels, num_classes)
        he_init(self, self.head)

    def from_pooled(self, pooled: Tensor) -> Tensor:
        u: Tensor = self.mlp(pool_to(self.convs(pooled), 2).flatten(1))
        return u
