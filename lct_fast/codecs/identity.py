"""The tensor as it is."""

from __future__ import annotations

from torch import Tensor

from lct_fast.codecs.codec import Codec, Encoded, Layout, dense


class Identity(Codec):
    """Sends the tensor unchanged."""

    name = "none"

    def encode(self, h: Tensor) -> Encoded:
        return Encoded((dense(h),), Layout.of(h))

    def decode(self, encoded: Encoded) -> Tensor:
        return encoded.only(self.name)
