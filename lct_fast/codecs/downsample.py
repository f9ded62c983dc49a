"""Feature maps at a lower resolution (the downsampling filter of arXiv 2009.01462)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lct_fast.codecs.codec import Codec, CodecError, Encoded, Layout, dense, laid_out
from lct_fast.codecs.replicas import Replicas


class Downsample(Codec):
    """Averages F x F pixels of a feature map [N, C, H, W]; the consumer interpolates (arXiv 2009.01462).

    F^2 times fewer values, which `inner` codes: `downsample:2+vq:256,8` sends 128 times fewer bytes than fp32. Windows
    at the border average what there is. Interpolation is bilinear, by the centres of pixels.

    Args:
        factor: F >= 2.
        inner: codec of the averages.
    """

    def __init__(self, factor: int, inner: Codec) -> None:
        if factor < 2:
            raise ValueError(f"codec downsample:F: expected F >= 2, got downsample:{factor}")
        self.factor, self.inner = factor, inner
        self.recordable = inner.recordable
        self.name = f"downsample:{factor}" + ("" if inner.name == "none" else f"+{inner.name}")

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3 or min(shape[1:]) < self.factor:
            raise ValueError(
                f"codec {self.name}: expected feature maps of at least {self.factor} x {self.factor}, got "
                f"{tuple(shape)}: use another codec on this cut"
            )
        self.inner.check(self._small((1, *shape))[1:])

    def encode(self, h: Tensor, *, learn: bool = True) -> Encoded:
        x = dense(h)
        small = functional.avg_pool2d(x, self.factor, ceil_mode=True)
        coded = self.inner.encode(_as(small, _channels_last(x.stride())), learn=learn)
        return Encoded(coded.tensors, Layout.of(x), coded.version)

    def resolve(self, encoded: Encoded) -> Encoded:
        inner = self.inner.resolve(self._averages(encoded))
        return Encoded(inner.tensors, encoded.layout, inner.version)

    def decode(self, encoded: Encoded) -> Tensor:
        layout = encoded.layout
        small = self.inner.decode(self._averages(encoded))
        if layout.size == 0:
            return small.new_empty(layout.shape)
        y = functional.interpolate(small, layout.shape[2:], mode="bilinear", align_corners=False)
        return laid_out(y, layout)

    def _averages(self, encoded: Encoded) -> Encoded:
        """What came, as the inner codec's."""
        layout = encoded.layout
        if len(layout.shape) != 4:
            raise CodecError(f"{self.name}: expected a feature map, got shape {list(layout.shape)}")
        shape = self._small(layout.shape)
        stride = _as(torch.empty(shape, device="meta"), _channels_last(layout.stride)).stride()
        return Encoded(encoded.tensors, Layout(shape, stride, layout.dtype), encoded.version)

    def _small(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        n, channels, height, width = shape
        return n, channels, -(-height // self.factor), -(-width // self.factor)

    def join(self, replicas: Replicas) -> None:
        self.inner.join(replicas)

    def shared(self) -> tuple[Tensor, ...]:
        return self.inner.shared()

    @property
    def codebook_bytes(self) -> int:  # type: ignore[override]
        return self.inner.codebook_bytes

    def codebook_use(self) -> dict[str, Any] | None:
        return self.inner.codebook_use()

    def state(self) -> dict[str, object]:
        return self.inner.state()

    def load_state(self, state: dict[str, object], device: torch.device) -> None:
        self.inner.load_state(state, device)


def _channels_last(stride: tuple[int, ...]) -> bool:
    return stride[1] == 1 and stride[3] != 1


def _as(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
