"""Units of a small pre-norm transformer on token ids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionedEmbedding(nn.Module):
    """Token ids int64 [N, T] -> [N, T, width]: a learned vector of the token and one of its place, added.

    Args:
        vocabulary: number of token ids.
        width: size of a vector.
        window: number of places; T may be less.
    """

    def __init__(self, vocabulary: int, width: int, window: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(window, width) * 0.02)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > len(self.place):
            raise ValueError(
                f"expected windows of at most {len(self.place)} tokens, got {ids.shape[1]}: build the model with "
                f"a larger window"
            )
        return self.token(ids) + self.place[: ids.shape[1]]


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each behind a layer norm and added: [N, T, width] -> the same.

    Pre-norm, arXiv 2002.04745; the perceptron has 4 * width hidden units and GELU.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def _attend(self, x: Tensor) -> Tensor:
        # [N, T, 3 width] -> three of [N, heads, T, width / heads]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))
