"""The tensor as it is."""

from __future__ import annotations

from torch import Tensor

from lct_fast.codecs.codec import Codec, Encoded, Layout, dense


class Identity(Codec):
    """Sends the tensor unchanged."""

    name = "none"
    recordable = True

    def encode(self, h: Tensor, *, learn: bool = True) -> Encoded:
        x = dense(h)
        return Encoded((x,), Layout.of(x))

    def decode(self, encoded: Encoded) -> Tensor:
        return encoded.only(self.name)
