"""The VGG-like network of local critic training."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lct_fast.models.layers import ConvUnit, check_image, scaled

# (channels, stride) of each convolution.
_CONVS = (
    (64, 1), (64, 1),
    (128, 2), (128, 1), (128, 1),
    (256, 2), (256, 1), (256, 1),
    (512, 2), (512, 1), (512, 1),
)  # fmt: skip

# Critics stand after convolutions 2, 5 and 8; with one critic, after 5.
SPLITS = {2: ["conv6"], 4: ["conv3", "conv6", "conv9"]}


def lct_vgg(
    num_classes: int, in_channels: int, image_size: int, *, width: float = 1.0, norm: str = "batch"
) -> nn.Sequential:
    """The VGG-like network of arXiv 2102.01963: eleven 3x3 conv + BN + ReLU, 64 to 512 channels, linear.

    Stride 2 at each doubling of the channels. The paper's 7.862 M parameters (sub-models 1.423 / 0.882 /
    2.259 M) are reached by convolutions without bias, a linear layer on the whole flattened 4x4 map, and
    leaving batch norm's scale and shift out of the count.

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
    net["flatten"] = nn.Flatten()
    net["head"] = nn.Linear(channels * size**2, num_classes)
    return nn.Sequential(net)
