"""MLP auxiliary network of decoupled greedy learning."""

from __future__ import annotations

from torch import Tensor, nn

from lct_fast._init import he_init
from lct_fast.critics.base import Critic, at_least_one, image_shape
from lct_fast.critics.blocks import mlp_blocks


class MlpAuxCritic(Critic):
    """MLP-aux of arXiv 2106.06401: average pool 2x2; linear layers to 4C with BN and ReLU; linear.

    0.5 to 8.3 % of the largest layer of the paper's CIFAR network. Needs at least two rows in training mode.

    Args:
        shape: (C, H, W), the group's output without the batch.
        num_classes: classes.
        layers: number of hidden layers, the paper's 3.

    Raises:
        ValueError: shape is not a feature map, or layers < 1.
    """

    activation = "relu"
    row_independent = False
    pool = 2

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, layers: int = 3):
        super().__init__()
        channels, height, width = image_shape("mlp_aux", shape)
        at_least_one("mlp_aux", layers=layers)
        self.mlp = mlp_blocks(channels * min(2, height) * min(2, width), 4 * channels, layers)
        self.head = nn.Linear(4 * channels, num_classes)
        he_init(self, self.head)

    def from_pooled(self, pooled: Tensor) -> Tensor:
        u: Tensor = self.mlp(pooled.flatten(1))
        return u
