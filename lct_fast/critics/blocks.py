"""Pieces the auxiliary networks of greedy learning share."""

from __future__ import annotations

from torch import nn


def conv_blocks(channels: int, count: int, kernel: int) -> nn.Sequential:
    """`count` times convolution (kernel x kernel, channels kept, map kept), batch norm, ReLU."""
    parts: list[nn.Module] = []
    for _ in range(count):
        conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
        parts += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*parts)


def mlp_blocks(in_features: int, hidden: int, count: int) -> nn.Sequential:
    """`count` times linear to `hidden`, batch norm, ReLU, but without the last ReLU.

    The linear layers have no bias: the norm's shift takes its place.
    """
    parts: list[nn.Module] = []
    for i in range(count):
        linear = nn.Linear(hidden if i else in_features, hidden, bias=False)
        parts += [linear, nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*parts[:-1])
