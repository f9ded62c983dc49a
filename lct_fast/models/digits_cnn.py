"""A small CNN for 8x8 digits: seconds of training on a laptop."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lct_fast.models.layers import ConvUnit, PoolFlatten, check_image, scaled

# (channels, stride) of each convolution; from conv2 on every pair of neighbours costs about the same.
_CONVS = ((32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (64, 1))

SPLITS = {2: ["conv4"], 3: ["conv3", "conv5"], 4: ["conv3", "conv5", "conv6"]}


def digits_cnn(
    num_classes: int, in_channels: int, image_size: int, *, width: float = 1.0, norm: str = "batch"
) -> nn.Sequential:
    """Six 3x3 convolutions (32, 32 | 64 stride 2, 64, 64, 64), average pool to 4x4, linear.

    Args:
        num_classes, in_channels, image_size: classes; channels and side of the images, at least 8 pixels.
        width: factor on all channels.
        norm: "batch", or "none" for convolutions with bias and no batch norm.
    """
    check_image(image_size, 8)
    net: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size = in_channels, image_size
    for i, (base, stride) in enumerate(_CONVS, 1):
        out = scaled(base, width)
        net[f"conv{i}"] = ConvUnit(channels, out, stride, norm)
        channels, size = out, -(-size // stride)
    net["pool"] = PoolFlatten(4)
    net["head"] = nn.Linear(channels * min(size, 4) ** 2, num_classes)
    return nn.Sequential(net)
