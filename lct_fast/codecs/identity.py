"""The tensor as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from lct_fast.codecs.codec import Codec


class Identity(Codec):
    """Sends the tensor unchanged."""

    name = "none"

    def encode(self, h: Tensor) -> Tensor:
        return h

    def decode(self, packet: Tensor, dtype: torch.dtype) -> Tensor:
        return packet.to(dtype)
