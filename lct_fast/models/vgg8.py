"""The VGG-8 of likelihood-ratio training."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lct_fast.models.layers import ConvUnit, LinearUnit, PoolFlatten, check_image, scaled

# (channels, side of the max pool in front) of each convolution.
_CONVS = ((64, 1), (128, 2), (256, 2), (256, 1), (512, 2), (512, 1))

SPLITS = {2: ["conv4"], 3: ["conv3", "conv5"], 4: ["conv2", "conv4", "conv6"]}


def vgg8(num_classes: int, in_channels: int, image_size: int, *, width: float = 1.0) -> nn.Sequential:
    """Six 3x3 convolutions (64 | 128 | 256, 256 | 512, 512) with max pools between, pool to 2x2, two linear layers.

    Eight layers with weights and no batch norm, as arXiv 2305.08960 trains; its channels are not known here, so these
    are VGG's.

    Args:
        num_classes, in_channels, image_size: classes; channels and side of the images, at least 8 pixels.
        width: factor on all channels.
    """
    check_image(image_size, 8)
    net: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size = in_channels, image_size
    for i, (base, pool) in enumerate(_CONVS, 1):
        out = scaled(base, width)
        net[f"conv{i}"] = ConvUnit(channels, out, norm="none", pool=pool)
        channels, size = out, size // pool
    net["pool"] = PoolFlatten(2)
    hidden = scaled(512, width)
    net["fc"] = LinearUnit(channels * min(size, 2) ** 2, hidden)
    net["head"] = nn.Linear(hidden, num_classes)
    return nn.Sequential(net)
