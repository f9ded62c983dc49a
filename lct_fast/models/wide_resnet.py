"""Wide residual networks."""

from __future__ import annotations

from torch import nn

from lct_fast.models.layers import scaled
from lct_fast.models.preact_resnet import BasicBlock, residual_net


def wide_resnet(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    width: float = 1.0,
    depth: int = 28,
    widen: int = 10,
) -> nn.Sequential:
    """WRN-depth-widen (arXiv 1605.07146), without dropout: three stages of pre-activation basic blocks.

    Units: stem (16 channels), layer1 .. layer3 (16, 32, 64 channels times `widen`), pool, head.

    Args:
        num_classes, in_channels, image_size: classes; channels and side of the images, at least 4 pixels.
        width: factor on all channels, the stem's too.
        depth: 6 n + 4 for n blocks a stage.
        widen: the paper's factor k on the stages' channels.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth must be 10, 16, 22, 28, ... (6 n + 4), got {depth}")
    if widen < 1:
        raise ValueError(f"widen must be at least 1, got {widen}")
    stages = [scaled(base * widen, width) for base in (16, 32, 64)]
    blocks = [(depth - 4) // 6] * 3
    return residual_net(BasicBlock, blocks, stages, scaled(16, width), num_classes, in_channels, image_size)
