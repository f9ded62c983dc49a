"""Encoders that share a batch keep one codebook, that of an encoder of the whole batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lct_fast import codecs, ops
from lct_fast.codecs import vector_quantization
from lct_fast.codecs.vector_quantization import VectorQuantization


class _Thread:
    """A replica that is a thread."""

    count = 2

    def __init__(self, index: int, board: list[tuple[Tensor, ...]], barrier: threading.Barrier) -> None:
        self.index, self.board, self.barrier = index, board, barrier

    def _shown(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        self.board[self.index] = tuple(t.clone() for t in tensors)
        self.barrier.wait()
        shown = list(self.board)
        self.barrier.wait()
        return shown

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        return [a + b for a, b in zip(*self._shown(*tensors), strict=True)]

    def first(self, t: Tensor) -> Tensor:
        return self._shown(t)[0][0]


def _in_two(spec: str, work: Callable[[codecs.Codec, int], object]) -> list[codecs.Codec]:
    """``work(codec, replica)`` in two threads, and their codecs."""
    board: list[tuple[Tensor, ...]] = [(), ()]
    barrier = threading.Barrier(2, timeout=60)
    both = [codecs.build(spec) for _ in range(2)]
    for index, codec in enumerate(both):
        codec.join(_Thread(index, board, barrier))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, both, range(2)))
    return both


def _batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(4)
    return [torch.randn(32, 4, 8, 8, generator=g).relu() for _ in range(6)]


@pytest.mark.parametrize("spec", ["vq:16,2", "downsample:2+vq:16,2"])
def test_the_codebook_starts_and_moves_alike(
    spec: str, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    used: dict[int, list[Tensor]] = {}
    encode = ops.vq_encode

    def watched(x: Tensor, codebook: Tensor, candidates: int = 16) -> ops.VQEncoding:
        used.setdefault(threading.get_ident(), []).append(codebook.clone())
        return encode(x, codebook, candidates)

    monkeypatch.setattr(vector_quantization.ops, "vq_encode", watched)

    def work(codec: codecs.Codec, replica: int) -> None:
        for h in _batches():
            codec.encode(h.chunk(2)[replica])

    one, other = _in_two(spec, work)
    assert len(one.shared()) == 2
    for a, b in zip(one.shared(), other.shared(), strict=True):
        assert torch.equal(a, b)
    first, second = used.values()
    # Also on the way to the first codebook.
    assert len(first) == len(second) > len(_batches())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_follows_the_whole_batch(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    settings: list[tuple[float, float]] = []
    update = ops.vq_update

    def watched(*args: Any) -> None:
        settings.append((args[5], args[-1]))
        update(*args)

    monkeypatch.setattr(vector_quantization.ops, "vq_update", watched)

    def begin(codec: codecs.Codec) -> None:
        assert isinstance(codec, VectorQuantization)
        words = torch.randn(2, 128, 2, generator=torch.Generator().manual_seed(3))
        # So often chosen that none is given another vector, which would be one of the first replica's.
        codec.codebook, codec.averages = words.clone(), ops.vq_state(words, 1e6)
        codec.batches = 1000
        codec._renew()

    def work(codec: codecs.Codec, replica: int) -> None:
        begin(codec)
        for h in _batches():
            codec.encode(h.chunk(2)[replica])

    whole = codecs.build("vq:128,2")
    begin(whole)
    for h in _batches():
        whole.encode(h)
    one, other = _in_two("vq:128,2", work)
    for a, b, c in zip(one.shared(), other.shared(), whole.shared(), strict=True):
        assert torch.equal(a, b)
        # Sums over two halves in place of one pass.
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4)
    # Averages are as long, and a word is unused, by its count over the whole batch.
    assert len(settings) == 3 * len(_batches()) and len(set(settings)) == 1
    assert 0.5 < settings[0][0] < 0.99


def test_alone_nothing_is_shared() -> None:
    plain, quantized = codecs.build("int8"), codecs.build("vq:8,2")
    assert plain.replicas.count == 1 and plain.shared() == quantized.shared() == ()
