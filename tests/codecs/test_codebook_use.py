"""How codebooks were used: against hand computations, and without a trace in what is coded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lct_fast import codecs
from lct_fast.codecs.codebook_use import perplexity, used


def _rows(seed: int, rows: int = 64) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def _counted(coded: codecs.Encoded, codebooks: int, codewords: int) -> Tensor:
    """[G, K] from the codes themselves, 4 bits each, least significant first."""
    bits = np.unpackbits(coded.tensors[0].numpy().view(np.uint8), bitorder="little")
    codes = (bits[: len(bits) // 4 * 4].reshape(-1, 4) * [1, 2, 4, 8]).sum(1).reshape(-1, codebooks)
    return torch.stack([torch.tensor(np.bincount(column, minlength=codewords)) for column in codes.T])


def test_shares_and_perplexity_by_hand() -> None:
    assert perplexity(torch.tensor([[5, 5, 5, 5]])) == pytest.approx(4)
    assert perplexity(torch.tensor([[0, 9, 0, 0]])) == pytest.approx(1)
    # Three of four choices are one word: 4 / 3^(3/4).
    assert perplexity(torch.tensor([[3, 1]])) == pytest.approx(4 / 3**0.75)
    assert perplexity(torch.tensor([[2, 2, 0, 0], [1, 1, 1, 1]])) == pytest.approx((2 + 4) / 2)
    assert used(torch.tensor([[2, 2, 0, 0], [1, 1, 1, 1]])) == 6 / 8


@pytest.mark.parametrize("spec", ["vq:16,2", "downsample:2+vq:16,2"])
def test_all_choices_since_the_last_reading_count(spec: str) -> None:
    codec = codecs.build(spec)
    assert codec.codebook_use() is None, "nothing is coded yet"
    maps = spec.startswith("down")
    for batches in (3, 1):
        chosen = torch.zeros(2, 16, dtype=torch.int64)
        for seed in range(batches):
            x = _rows(seed, 256).reshape(4, 8, 8, 4).permute(0, 3, 1, 2) if maps else _rows(seed)
            chosen += _counted(codec.encode(x), 2, 16)
        codec.encode(x, learn=False)
        use = codec.codebook_use()
        assert use is not None and (use["codewords"], use["batches"]) == (16, batches)
        assert use["used"] == pytest.approx(float((chosen > 0).double().mean()))
        p = chosen / chosen.sum(1, keepdim=True)
        entropy = [-sum(q * math.log(q) for q in row if q > 0) for row in p.tolist()]
        assert use["perplexity"] == pytest.approx(sum(map(math.exp, entropy)) / 2)
        assert codec.codebook_use() is None
    assert codecs.build("int8").codebook_use() is None


def test_drift_and_codebooks_sent() -> None:
    codec = codecs.build("vq:4,2")
    assert isinstance(codec, codecs.VectorQuantization)
    books = bytes_sent = 0
    for seed in range(40):
        coded = codec.encode(_rows(seed, 256) + seed / 4)
        _, *book = coded.tensors
        books += len(book) == 2
        bytes_sent += sum(t.nbytes for t in book)
    use = codec.codebook_use()
    assert use is not None and books > 1
    assert use["codebooks"] == books and codec.codebook_bytes == bytes_sent
    assert use["drift"] == codec.drifts[-1].value() > 0
    # Batches that the codebook fits without an error have no drift to tell.
    exact = codecs.build("vq:2,2")
    exact.encode(torch.zeros(8, 2))
    use = exact.codebook_use()
    assert use is not None and use["drift"] is None and use["perplexity"] == 1


def test_reading_changes_no_bit_and_goes_on_from_a_checkpoint() -> None:
    read, plain, resumed = (codecs.build("vq:16,2") for _ in range(3))
    for seed in range(12):
        ours, theirs = read.encode(_rows(seed)), plain.encode(_rows(seed))
        assert ours.version == theirs.version
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors, theirs.tensors, strict=True))
        if seed < 11:
            read.codebook_use()
    ours, theirs = read.state(), plain.state()
    assert ours.pop("chosen_batches") == 1 and theirs.pop("chosen_batches") == 12
    assert not torch.equal(ours.pop("chosen"), theirs.pop("chosen"))
    assert all(torch.equal(torch.as_tensor(ours[n]), torch.as_tensor(theirs[n])) for n in theirs)
    resumed.load_state(plain.state(), torch.device("cpu"))
    assert resumed.codebook_use() == plain.codebook_use()
    # A checkpoint of an earlier version counted nothing.
    old = {n: v for n, v in plain.state().items() if not n.startswith("chosen")}
    resumed.load_state(old, torch.device("cpu"))
    assert resumed.codebook_use() is None
    resumed.encode(_rows(1))
    use = resumed.codebook_use()
    assert use is not None and use["batches"] == 1
