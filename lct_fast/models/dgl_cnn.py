"""The six-layer CIFAR network of decoupled greedy learning."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lct_fast.models.layers import ConvUnit, LinearUnit, PoolFlatten, check_image, scaled

# (channels, side of the max pool in front) of each convolution.
_CONVS = ((128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1))

# The authors give every convolution its own auxiliary network, or every block of two or three.
SPLITS = {
    2: ["conv4"],
    3: ["conv3", "conv5"],
    6: ["conv2", "conv3", "conv4", "conv5", "conv6"],
}


def dgl_cnn(
    num_classes: int, in_channels: int, image_size: int, *, width: float = 1.0, norm: str = "batch"
) -> nn.Sequential:
    """The CIFAR network of arXiv 2106.06401: conv 3x3 + BN + ReLU, 128 | pool 256, 256 | pool 512, 512, 512.

    The tail is average pooling to 2x2, two linear layers of 4C with BN and ReLU, and a linear layer. Layers
    in front of a batch norm have no bias here (the authors' have one, which the norm cancels).

    Args:
        num_classes, in_channels, image_size: classes; channels and side of the images, at least 8 pixels.
        width: factor on all channels.
        norm: "batch", or "none" for layers with bias and no batch norm.
    """
    check_image(image_size, 8)
    net: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for i, (base, pool) in enumerate(_CONVS, 1):
        out = scaled(base, width)
        net[f"conv{i}"] = ConvUnit(channels, out, norm=norm, pool=pool)
        channels = out
    net["pool"] = PoolFlatten(2)
    for i in (1, 2):
        net[f"fc{i}"] = LinearUnit(4 * channels, 4 * channels, norm)
    net["head"] = nn.Linear(4 * channels, num_classes)
    return nn.Sequential(net)
