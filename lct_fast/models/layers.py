"""Units the models are made of: each is one module that a cut never splits."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from lct_fast.critics.pooling import pool_to


class ConvUnit(nn.Module):
    """Convolution 3x3 (padding 1), batch norm, ReLU.

    Args:
        in_channels, out_channels: channels before and after.
        stride: of the convolution.
        norm: "batch", or "none" for convolution with bias and ReLU only.
        pool: side of the max pool in front of the convolution, 1 for none.

    Shapes: [N, in_channels, H, W] -> [N, out_channels, H', W'], H' = ceil(floor(H / pool) / stride).
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, norm: str = "batch", pool: int = 1
    ):
        super().__init__()
        if norm not in ("batch", "none"):
            raise ValueError(f"norm must be 'batch' or 'none', got {norm!r}")
        self.pool = pool
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=norm == "none")
        self.norm = nn.BatchNorm2d(out_channels) if norm == "batch" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pool > 1:
            x = F.max_pool2d(x, self.pool)
        return F.relu(self.norm(self.conv(x)))


class LinearUnit(nn.Module):
    """Flatten, linear, optional batch norm, ReLU. Shapes: [N, ...] -> [N, out_features].

    With norm="batch" the linear layer has no bias: the norm's shift takes its place.
    """

    def __init__(self, in_features: int, out_features: int, norm: str = "none"):
        super().__init__()
        if norm not in ("batch", "none"):
            raise ValueError(f"norm must be 'batch' or 'none', got {norm!r}")
        self.linear = nn.Linear(in_features, out_features, bias=norm == "none")
        self.norm = nn.BatchNorm1d(out_features) if norm == "batch" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(x.flatten(1))))


class PoolFlatten(nn.Module):
    """Average pool to at most side x side, then flatten.

    Shapes: [N, C, H, W] -> [N, C * min(side, H) * min(side, W)].
    """

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return pool_to(x, self.side).flatten(1)


class NormPool(nn.Module):
    """Batch norm, ReLU and global average, the tail of a pre-activation network. [N, C, H, W] -> [N, C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x)).mean((2, 3))


def scaled(channels: int, width: float) -> int:
    """`channels * width`, rounded, at least 1.

    Raises:
        ValueError: width is not a positive finite number.
    """
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be a positive number, got {width}")
    return max(1, round(channels * width))


def check_image(image_size: int, smallest: int) -> None:
    """Refuse images on which the last feature map would be padding more than picture.

    Raises:
        ValueError: image_size (pixels a side) is below `smallest`.
    """
    if image_size < smallest:
        raise ValueError(f"images must be at least {smallest} pixels a side, got {image_size}")
