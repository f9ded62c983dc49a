"""A narrower floating-point type on the wire."""

from __future__ import annotations

import torch
from torch import Tensor

from lct_fast.codecs.codec import Codec, Encoded, Layout, dense


class Cast(Codec):
    """Rounds to bfloat16: half the bytes of fp32."""

    name = "bf16"
    recordable = True

    def encode(self, h: Tensor, *, learn: bool = True) -> Encoded:
        x = dense(h)
        return Encoded((x.to(torch.bfloat16),), Layout.of(x))

    def decode(self, encoded: Encoded) -> Tensor:
        return encoded.only(self.name, torch.bfloat16).to(encoded.layout.dtype)
