"""A multi-layer perceptron on flattened images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lct_fast.models.layers import LinearUnit, scaled


def mlp(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    width: float = 1.0,
    hidden: int = 512,
    depth: int = 4,
    norm: str = "none",
) -> nn.Sequential:
    """`depth` hidden layers of `hidden` units with ReLU, then linear; the first flattens its input.

    Args:
        num_classes, in_channels, image_size: classes; channels and side of the images.
        width: factor on `hidden`.
        hidden: units of a hidden layer.
        depth: number of hidden layers.
        norm: "none", or "batch" for batch norm in front of each ReLU.
    """
    if hidden < 1 or depth < 1:
        raise ValueError(f"hidden and depth must be at least 1, got hidden={hidden}, depth={depth}")
    net: OrderedDict[str, nn.Module] = OrderedDict()
    features, out = in_channels * image_size**2, scaled(hidden, width)
    for i in range(1, depth + 1):
        net[f"fc{i}"] = LinearUnit(features, out, norm)
        features = out
    net["head"] = nn.Linear(features, num_classes)
    return nn.Sequential(net)
