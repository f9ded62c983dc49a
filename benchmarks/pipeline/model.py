"""The task of `benchmarks.pipeline`: a small convolutional network in two equal halves, its data, its optimiser."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

import lct_fast as lct

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
POOLED = "pooled_linear:pool=4"
CONV = "conv_fc"
# What crosses the cut in a second contender of each method.
CODEC = "vq:256,8"
CLASSES = 10
SIDE = 32
# Three maps of 32, 16 and 8: the second half begins with the last stride.
STRIDES = (1, 2, 1, 1, 2, 1, 1, 1)
CUT = 4
# The first stage's width balances the halves, critic included.
WIDTHS = (32, 64, 64, 64, 128, 128, 128, 128)


Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Task:
    """What every contender trains. ``batch`` counts samples of all processes together."""

    widths: tuple[int, ...] = WIDTHS
    batch: int = 64
    batches: int = 8
    seed: int = 0
    lr: float = 0.01
    momentum: float = 0.9

    def model(self) -> nn.Sequential:
        """The network, the same weights each time."""
        torch.manual_seed(self.seed)
        return small_cnn(self.widths)

    def data(self, format: str) -> list[tuple[Tensor, Tensor]]:
        """Random images [batch, 3, 32, 32] and labels [batch], the same each time."""
        g = torch.Generator().manual_seed(self.seed + 1)
        return [
            (
                torch.randn(self.batch, 3, SIDE, SIDE, generator=g).contiguous(memory_format=FORMATS[format]),
                torch.randint(0, CLASSES, (self.batch,), generator=g),
            )
            for _ in range(self.batches)
        ]

    def states(self, format: str) -> list[Tensor]:
        """What might cross the cut, from nowhere: two random maps of the right shape and strides."""
        g = torch.Generator().manual_seed(self.seed + 2)
        side = SIDE
        for stride in STRIDES[:CUT]:
            side //= stride
        shape = (self.batch, self.widths[CUT - 1], side, side)
        return [
            torch.randn(shape, generator=g).relu().contiguous(memory_format=FORMATS[format]) for _ in range(2)
        ]

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, self.lr, momentum=self.momentum, fused=True)

    def groups(self, critic: str) -> list[lct.Group]:
        """The network's two halves, the first with a critic."""
        example = torch.zeros(self.batch, 3, SIDE, SIDE)
        return lct.split(self.model(), example_input=example, critic=critic, split_points=[f"stage{CUT + 1}"])


def small_cnn(widths: tuple[int, ...]) -> nn.Sequential:
    """Convolution 3x3, batch norm, ReLU for each width; mean over the map; one linear layer."""
    if len(widths) != len(STRIDES):
        raise ValueError(f"widths: expected {len(STRIDES)} of them, got {len(widths)}")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for i, (width, stride) in enumerate(zip(widths, STRIDES, strict=True), 1):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        parts[f"stage{i}"] = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        channels = width
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["head"] = nn.Linear(channels, CLASSES)
    return nn.Sequential(parts)


def in_format(module: Module, format: str, dtype: torch.dtype = torch.float32) -> Module:
    """The module itself, its weights in a memory format of ``FORMATS``."""
    # torch's stubs know no memory_format.
    return module.to(dtype=dtype, memory_format=FORMATS[format])  # type: ignore[call-overload]


class ToRows(nn.Module):
    """[N, C, H, W] -> [N, H, W, C], contiguous. Free where the map is channels_last already."""

    def forward(self, h: Tensor) -> Tensor:
        return h.permute(0, 2, 3, 1).contiguous()


class FromRows(nn.Module):
    """[N, H, W, C] -> [N, C, H, W] in channels_last strides, without a copy."""

    def forward(self, h: Tensor) -> Tensor:
        return h.permute(0, 3, 1, 2)


def halves(model: nn.Sequential, rows: bool) -> list[nn.Sequential]:
    """The network cut in two, under its own names; with ``rows`` the cut is crossed as [N, H, W, C].

    torch.distributed.pipelining sends contiguous tensors only: without ``rows`` a channels_last map hangs it.
    """
    named = list(model.named_children())
    first, second = OrderedDict(named[:CUT]), OrderedDict(named[CUT:])
    if rows:
        first["to_rows"] = ToRows()
        second = OrderedDict([("from_rows", FromRows()), *second.items()])
    return [nn.Sequential(first), nn.Sequential(second)]
