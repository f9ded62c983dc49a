"""Average pooling to a fixed side, deterministic on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_to(x: Tensor, side: int) -> Tensor:
    """Average-pool [N, C, H, W] to [N, C, min(side, H), min(side, W)], the bins of `adaptive_avg_pool2d`.

    torch's adaptive pooling adds with atomics in its CUDA backward, which deterministic mode refuses. Where
    the side divides the map this is a plain average pool; elsewhere each bin is a mean over a slice. A map
    smaller than the side is returned as it is.
    """
    height, width = x.shape[-2:]
    rows, columns = min(side, height), min(side, width)
    if (rows, columns) == (height, width):
        return x
    if height % rows == 0 and width % columns == 0:
        return F.avg_pool2d(x, (height // rows, width // columns))
    x = torch.stack([x[:, :, a:b].mean(2) for a, b in _bins(height, rows)], 2)
    return torch.stack([x[:, :, :, a:b].mean(3) for a, b in _bins(width, columns)], 3)


def _bins(size: int, count: int) -> list[tuple[int, int]]:
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
