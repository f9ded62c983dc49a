"""Auxiliary nets of layer-parallel training: they foretell a group's input from the network's (arXiv 2112.05387)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AuxiliaryNet(nn.Module):
    """A small net from the network's input to that of a group.

    To feature maps: an average pool to their size, two 3x3 convolutions with ReLU between. To vectors: two linear
    layers with ReLU between. The paper's own nets are known from its abstract alone; this is a choice of ours.

    Args:
        source: shape of the network's input without the batch, (C, H, W) or (D,).
        shape: of the group's input, (C, H, W) or (D,).
        width: channels or features in between.

    Raises:
        ValueError: feature maps out of an input that is none.
    """

    def __init__(self, source: tuple[int, ...], shape: tuple[int, ...], width: int = 32) -> None:
        super().__init__()
        self.shape = shape
        if len(shape) == 3:
            if len(source) != 3:
                raise ValueError(
                    f"auxiliary nets make feature maps {shape} of images (C, H, W); the network's input is {source}"
                )
            self.first: nn.Module = nn.Conv2d(source[0], width, 3, padding=1)
            self.second: nn.Module = nn.Conv2d(width, shape[0], 3, padding=1)
        else:
            self.first = nn.Linear(torch.Size(source).numel(), width)
            self.second = nn.Linear(width, torch.Size(shape).numel())

    def forward(self, x: Tensor) -> Tensor:
        """[N, *source] -> [N, *shape]."""
        x = F.adaptive_avg_pool2d(x, self.shape[1:]) if len(self.shape) == 3 else x.flatten(1)
        y: Tensor = self.second(F.relu(self.first(x)))
        return y.view(-1, *self.shape)
