"""A narrower floating-point type on the wire."""

from __future__ import annotations

import torch
from torch import Tensor

from lct_fast.codecs.codec import Codec

_TYPES = {"bf16": torch.bfloat16}


class Cast(Codec):
    """Rounds to a narrower type, half the bytes of fp32 with bf16."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = _TYPES[name]

    def encode(self, h: Tensor) -> Tensor:
        return h.to(self.dtype)

    def decode(self, packet: Tensor, dtype: torch.dtype) -> Tensor:
        return packet.to(dtype)
