"""Pre-activation residual networks for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lct_fast.models.layers import NormPool, check_image, scaled


class BasicBlock(nn.Module):
    """BN, ReLU, conv 3x3 (stride), BN, ReLU, conv 3x3, plus the input (arXiv 1603.05027).

    Where the shape changes, the shortcut is a 1x1 convolution of the first ReLU's output.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor = F.relu(self.norm1(x))
        skip: Tensor = x if self.shortcut is None else self.shortcut(a)
        a = self.conv2(F.relu(self.norm2(self.conv1(a))))
        return a + skip


class BottleneckBlock(nn.Module):
    """BN, ReLU, conv 1x1, BN, ReLU, conv 3x3 (stride), BN, ReLU, conv 1x1 to 4 x channels, plus the input.

    Where the shape changes, the shortcut is a 1x1 convolution of the first ReLU's output (arXiv 1603.05027).
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out = self.expansion * channels
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.shortcut = _shortcut(in_channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor = F.relu(self.norm1(x))
        skip: Tensor = x if self.shortcut is None else self.shortcut(a)
        a = self.conv2(F.relu(self.norm2(self.conv1(a))))
        a = self.conv3(F.relu(self.norm3(a)))
        return a + skip


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


# depth -> block, blocks a stage, channels of the first stage (each later stage doubles them).
_NETS: dict[int, tuple[type[BasicBlock] | type[BottleneckBlock], tuple[int, ...], int]] = {
    18: (BasicBlock, (2, 2, 2, 2), 64),
    34: (BasicBlock, (3, 4, 6, 3), 64),
    50: (BottleneckBlock, (3, 4, 6, 3), 64),
    101: (BottleneckBlock, (3, 4, 23, 3), 64),
    110: (BasicBlock, (18, 18, 18), 16),
    152: (BottleneckBlock, (3, 8, 36, 3), 64),
}

DEPTHS = tuple(_NETS)

# 50 and 101: the cuts of local critic training's authors (arXiv 2102.01963). 110: decoupled greedy learning's
# two halves (arXiv 2106.06401), counted there on the post-activation network of the same blocks.
SPLITS: dict[int, dict[int, list[str]]] = {
    50: {4: ["layer2", "layer3", "layer4"]},
    101: {2: ["layer3.10"], 4: ["layer3", "layer3.8", "layer3.16"]},
    110: {2: ["layer2.8"]},
}


def preact_resnet(
    depth: int, num_classes: int, in_channels: int, image_size: int, *, width: float = 1.0
) -> nn.Sequential:
    """Pre-activation ResNet (arXiv 1603.05027) with a 3x3 stride-1 stem and no max pool.

    Units: stem, layer1 .. layer4 (`nn.Sequential`s of blocks), pool (BN, ReLU, global average), head. Depth
    110 is the CIFAR network of three stages of 18 basic blocks at 16, 32, 64 channels.

    Args:
        depth: one of DEPTHS.
        num_classes, in_channels, image_size: classes; channels and side of the images, at least 8 pixels
            (4 at depth 110).
        width: factor on all channels.
    """
    block, blocks, base = _NETS[depth]
    stages = [scaled(base * 2**i, width) for i in range(len(blocks))]
    return residual_net(block, blocks, stages, stages[0], num_classes, in_channels, image_size)


def residual_net(
    block: type[BasicBlock] | type[BottleneckBlock],
    blocks: Sequence[int],
    stages: Sequence[int],
    stem: int,
    num_classes: int,
    in_channels: int,
    image_size: int,
) -> nn.Sequential:
    """Stem, stages of `blocks[i]` blocks at `stages[i]` channels (stride 2 from the second on), pool, head.

    Raises:
        ValueError: image_size is below the product of the strides.
    """
    check_image(image_size, 2 ** (len(stages) - 1))
    net: OrderedDict[str, nn.Module] = OrderedDict()
    net["stem"] = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
    channels = stem
    for i, (count, planes) in enumerate(zip(blocks, stages, strict=True)):
        stage = []
        for j in range(count):
            stage.append(block(channels, planes, 2 if i and not j else 1))
            channels = planes * block.expansion
        net[f"layer{i + 1}"] = nn.Sequential(*stage)
    net["pool"] = NormPool(channels)
    net["head"] = nn.Linear(channels, num_classes)
    return nn.Sequential(net)
