"""The interface of a codec, and what travels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lct_fast.codecs.replicas import Alone, Replicas


@dataclass(frozen=True, slots=True)
class Layout:
    """What a tensor looked like before it was coded."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(h: Tensor) -> Layout:
        """That of a dense tensor; of another one, the layout of its contiguous copy."""
        return Layout(tuple(h.shape), tuple(dense(h).stride()), h.dtype)

    @property
    def size(self) -> int:
        """Elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count


class CodecError(ValueError):
    """What came cannot be decoded."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What travels of a tensor.

    Attributes:
        tensors: dense, one to three.
        layout: of the tensor that they stand for.
        version: of the state that the consumer decodes with, 0 where a codec has none.
    """

    tensors: tuple[Tensor, ...]
    layout: Layout
    version: int = 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def to(self, device: torch.device) -> Encoded:
        """The same on a device."""
        return Encoded(tuple(t.to(device) for t in self.tensors), self.layout, self.version)

    def only(self, codec: str, dtype: torch.dtype | None = None) -> Tensor:
        """The one tensor, which has the layout's shape and `dtype`, by default the layout's too.

        Raises:
            CodecError: it is something else.
        """
        layout, dtype = self.layout, dtype or self.layout.dtype
        found = [(tuple(t.shape), t.dtype) for t in self.tensors]
        if found != [(layout.shape, dtype)]:
            raise CodecError(f"{codec}: expected one tensor {list(layout.shape)} of {dtype}, got {found}")
        return self.tensors[0]


class Codec:
    """Encodes what leaves a group and decodes it at the consumer.

    A cut has two of them, one at each end. State, where a codec has any, is changed by encoding at the producer, and
    reaches the consumer in what travels.

    Attributes:
        name: the spec that builds it.
        replicas: who else encodes parts of the same batch; see ``join``.
        codebook_bytes: sent so far of what decoding needs beside the codes.
        recordable: whether coding is the same work for the device each time, with nothing for the host to decide or
            count; it can then be part of a CUDA graph.
    """

    name: str
    replicas: Replicas = Alone()
    recordable = False
    codebook_bytes = 0

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses what it cannot code: `shape` is the tensor's without the batch.

        Raises:
            ValueError: says what would fit.
        """

    def encode(self, h: Tensor, *, learn: bool = True) -> Encoded:
        """What travels of `h`, which is detached.

        Without `learn` no state changes: for evaluation, in training's own code.

        Raises:
            CodecError: without `learn`, before a codec that learns has seen its first batch.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no encode()")

    def decode(self, encoded: Encoded) -> Tensor:
        """What the consumer computes on: shape, strides and dtype are those of the layout.

        Raises:
            CodecError: tensors that do not belong together, or another version of the state.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no decode()")

    @property
    def exact(self) -> bool:
        """Whether decoding gives back the tensor itself."""
        return self.name == "none"

    def resolve(self, encoded: Encoded) -> Encoded:
        """At the consumer, in order of arrival: the same with all that decoding needs, so it may be decoded later,
        in any order and as often as one likes.

        Raises:
            CodecError: as ``decode``.
        """
        return encoded

    def codebook_use(self) -> dict[str, Any] | None:
        """At the producer, how its codebook was used since the last call; None without one, or if it was not.

        ``codewords``, K; ``batches`` coded; ``used``, share of words chosen at least once, and ``perplexity`` of the
        choices, 1 to K, means over codebooks; ``drift`` of the codebook from the one sent, as a part of the
        quantisation error, at the last batch, None where not finite; ``codebooks`` sent since the start. The host
        waits for the device.
        """
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain data."""
        return {}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Puts back what `state` gave."""

    def join(self, replicas: Replicas) -> None:
        """From now on each batch is coded in parts, by these."""
        self.replicas = replicas

    def shared(self) -> tuple[Tensor, ...]:
        """State of the producer's end that all replicas must hold bit for bit."""
        return ()


def dense(t: Tensor) -> Tensor:
    """`t` if its elements fill one run of memory in some order of dimensions, else a contiguous copy."""
    return t if torch.ops.aten.is_non_overlapping_and_dense(t) else t.contiguous()


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """`x`, of the layout's shape, with its strides and dtype: itself if it has them, else a copy."""
    if x.dtype == layout.dtype and x.stride() == layout.stride:
        return x
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=x.device).copy_(x)
