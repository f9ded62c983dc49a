"""The small residual network of likelihood-ratio training."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from lct_fast.models.layers import ConvUnit, PoolFlatten, check_image, scaled

SPLITS = {2: ["block2"], 3: ["block2", "pool"], 4: ["block1", "block2", "pool"]}


class PlainBlock(nn.Module):
    """relu(conv 3x3 (stride) + shortcut), without batch norm; the shortcut is a 1x1 convolution.

    Shapes: [N, in_channels, H, W] -> [N, channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.shortcut(x))


def resnet5(num_classes: int, in_channels: int, image_size: int, *, width: float = 1.0) -> nn.Sequential:
    """Four convolutions of 8, 16, 32 and 32 channels, the last three with shortcuts, average pool to 4x4, linear.

    The five layers with weights of arXiv 2305.08960's ResNet-5, without batch norm. Units: stem, block1 .. block3,
    pool, head.

    Args:
        num_classes, in_channels, image_size: classes; channels and side of the images, at least 8 pixels.
        width: factor on all channels.
    """
    check_image(image_size, 8)
    net: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size = scaled(8, width), image_size
    net["stem"] = ConvUnit(in_channels, channels, norm="none")
    for i, (base, stride) in enumerate(((16, 2), (32, 2), (32, 1)), 1):
        net[f"block{i}"] = PlainBlock(channels, scaled(base, width), stride)
        channels, size = scaled(base, width), -(-size // stride)
    net["pool"] = PoolFlatten(4)
    net["head"] = nn.Linear(channels * min(size, 4) ** 2, num_classes)
    return nn.Sequential(net)
