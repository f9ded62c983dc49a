"""The interface of a codec."""

from __future__ import annotations

import torch
from torch import Tensor


class Codec:
    """Encodes what leaves a group and decodes it at the consumer. Codecs here carry no state."""

    name: str

    def encode(self, h: Tensor) -> Tensor:
        """The tensor that travels."""
        raise NotImplementedError(f"{type(self).__name__} defines no encode()")

    def decode(self, packet: Tensor, dtype: torch.dtype) -> Tensor:
        """What the consumer computes on, in ``dtype``."""
        raise NotImplementedError(f"{type(self).__name__} defines no decode()")
