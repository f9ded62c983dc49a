"""The definition of vq: its properties, against loops and by hand."""

import struct

import pytest
import torch
from torch import Tensor

from lct_fast.reference import vq

NAN = float("nan")


def encode(x: Tensor, codebook: Tensor, candidates: int = 0) -> tuple[Tensor, ...]:
    return vq.vq_encode(x, codebook, candidates)


@pytest.mark.parametrize("codewords", [2, 3, 4, 5, 255, 256, 257, 4096])
def test_bits_of_a_code(codewords: int) -> None:
    bits = vq.bits_of(codewords)
    assert 2 ** (bits - 1) < codewords <= 2**bits


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8, 9, 12, 16])
def test_a_packed_stream_by_integers(bits: int) -> None:
    """The stream is one large number with code i at bit i * bits."""
    codes = torch.randint(0, 2**bits, (29,), generator=torch.Generator().manual_seed(bits))
    stream = vq.pack(codes, bits)
    number = sum(int(c) << (i * bits) for i, c in enumerate(codes))
    assert bytes(stream.tolist()) == number.to_bytes(-(-29 * bits // 8), "little")
    assert torch.equal(vq.unpack(stream, bits, 29), codes)


def hashed(error: float, place: int) -> int:
    """The number that an error is divided by, in whole numbers of Python."""
    (h,) = struct.unpack("<I", struct.pack("<f", error))
    h ^= place * 0x9E3779B1 % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return (h ^ h >> 16) >> 8 | 1


def test_by_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=draw, dtype=torch.float64)
    codebook = torch.randn(2, 5, 3, generator=draw, dtype=torch.float64)
    codes, counts, sums, squared_error, candidates, scores, flag = encode(x, codebook, 7)
    code = vq.unpack(codes, 3, 100).view(50, 2)
    total = 0.0
    best = [[(0.0, -1)] * 7 for _ in range(2)]
    wanted_counts, wanted_sums = torch.zeros_like(counts), torch.zeros_like(sums)
    for n in range(50):
        for g in range(2):
            vector = x[n, 3 * g : 3 * g + 3]
            distances = [float((vector - word).square().sum()) for word in codebook[g]]
            k = distances.index(min(distances))
            assert int(code[n, g]) == k
            wanted_counts[g, k] += 1
            wanted_sums[g, k] += vector
            total += distances[k]
            score = distances[k] / hashed(distances[k], n)
            if score > best[g][n % 7][0]:
                best[g][n % 7] = (score, n)
    assert torch.equal(counts, wanted_counts)
    torch.testing.assert_close(sums, wanted_sums)
    torch.testing.assert_close(squared_error, torch.tensor(total, dtype=torch.float64))
    assert not flag
    for g in range(2):
        for r, (score, n) in enumerate(best[g]):
            assert torch.equal(candidates[g, r], x[n, 3 * g : 3 * g + 3])
            assert abs(float(scores[g, r]) / score - 1) < 1e-6


def test_ties_go_to_the_lowest_index() -> None:
    codebook = torch.tensor([[[3.0], [1.0], [1.0], [-1.0]]])
    codes, counts, *_ = encode(torch.tensor([[1.0], [0.0], [2.0]]), codebook)
    # 0 lies between 1 and -1, 2 between 3 and 1.
    assert vq.unpack(codes, 2, 3).tolist() == [1, 1, 0]
    assert counts.tolist() == [[1, 2, 0, 0]]


def test_words_that_are_not_finite_are_not_chosen() -> None:
    codebook = torch.tensor([[[NAN], [float("inf")], [5.0], [float("-inf")]]])
    codes, counts, sums, *_, flag = encode(torch.tensor([[1.0], [0.0]]), codebook)
    assert vq.unpack(codes, 2, 2).tolist() == [2, 2]
    assert sums[0, 2].tolist() == [1.0] and not flag


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf"), 1e30])
def test_a_vector_that_is_not_finite_is_left_out_alone(value: float) -> None:
    x = torch.tensor([[1.0, 2.0], [value, 2.0], [3.0, 4.0]])
    codebook = torch.tensor([[[1.0], [9.0]], [[2.0], [4.0]]])
    codes, counts, sums, squared_error, candidates, scores, flag = encode(x, codebook, 1)
    assert bool(flag)
    assert vq.unpack(codes, 1, 6).tolist() == [0, 0, 0, 0, 0, 1]
    assert counts.tolist() == [[2, 0], [2, 1]]
    assert sums.flatten().tolist() == [4.0, 0.0, 4.0, 4.0]
    assert squared_error == 4.0
    assert candidates[0].tolist() == [[3.0]] and bool((scores[0] > 0).all())
    assert bool(candidates[1].isnan().all()) and scores[1].tolist() == [0.0]


def test_no_word_to_choose_is_code_zero_and_flagged() -> None:
    codes, counts, *_, flag = encode(torch.ones(3, 1), torch.full((1, 3, 1), NAN))
    assert codes.tolist() == [0] and not counts.any() and bool(flag)


def test_chunks_fold_in_order() -> None:
    draw = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(2 * vq.CHUNK + 100, 4, generator=draw), torch.randn(1, 7, 4, generator=draw)
    whole = encode(x, codebook, 3)
    counts, sums, error = 0, torch.zeros(1, 7, 4), torch.zeros(())
    best = torch.zeros(1, 3)
    chosen = torch.zeros(1, 3, 4)
    for part in x.split(vq.CHUNK):
        _, c, s, e, vectors, scores, _ = encode(part, codebook, 3)
        counts, sums, error = counts + c, sums + s, error + e
        better = scores > best
        best, chosen = torch.where(better, scores, best), torch.where(better[..., None], vectors, chosen)
    assert torch.equal(whole[1], counts) and torch.equal(whole[2], sums) and torch.equal(whole[3], error)
    assert torch.equal(whole[4], chosen) and torch.equal(whole[5], best)


def test_candidates_are_drawn_in_proportion_to_their_error() -> None:
    """Errors 1, 2, 4 and 9 in equal shares: how often each is the candidate, over 4096 slots."""
    draw = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 4, (64 * 4096,), generator=draw)
    # Otherwise rows of one kind would have one error, and differ in their place alone.
    jitter = 1 + 1e-3 * torch.rand(len(kind), generator=draw)
    x = (torch.tensor([1.0, 2.0, 4.0, 9.0])[kind] * jitter).sqrt()[:, None]
    chosen = encode(x, torch.tensor([[[0.0], [1e9]]]), 4096)[4][0, :, 0].square().round()
    share = torch.stack([(chosen == error).float().mean() for error in (1, 2, 4, 9)])
    # The standard deviation of a share is below 0.008.
    assert float((share - torch.tensor([1.0, 2.0, 4.0, 9.0]) / 16).abs().max()) < 0.03


def test_decode_gives_words() -> None:
    codebook = torch.randn(2, 5, 3)
    code = torch.tensor([[0, 4], [3, 1]])
    x, flag = vq.vq_decode(vq.pack(code.flatten(), 3), codebook, 2, torch.bfloat16)
    assert torch.equal(x[1], torch.cat((codebook[0, 3], codebook[1, 1])).bfloat16()) and not flag
    x, flag = vq.vq_decode(vq.pack(torch.tensor([0, 7, 3, 1]), 3), codebook, 2, torch.float32)
    assert torch.equal(x[0], torch.cat((codebook[0, 0], codebook[1, 4]))) and bool(flag)


def update(n: list[float], m: list[float], counts: list[int], sums: list[float], **kw: float) -> list[Tensor]:
    """One group of words of one column, from words -1, candidates 7, NaN, 8."""
    codebook = torch.full((1, len(n), 1), -1.0, dtype=torch.float64)
    state = torch.tensor([n], dtype=torch.float64), torch.tensor([m], dtype=torch.float64)[..., None]
    candidates = torch.tensor([[[7.0], [NAN], [8.0]]], dtype=torch.float64)
    options = {"decay": 0.75, "eps": 0.5, "revive_below": 0.0, **kw}
    vq.vq_update(
        codebook,
        state[0],
        state[1],
        torch.tensor([counts]),
        torch.tensor([sums], dtype=torch.float64)[..., None],
        candidates,
        **options,
    )
    return [codebook.flatten(), state[0].flatten(), state[1].flatten()]


def test_update_by_hand() -> None:
    words, n, m = update([4.0, 8.0], [2.0, 3.0], [8, 0], [4.0, 0.0])
    assert n.tolist() == [5.0, 6.0] and m.tolist() == [2.5, 2.25]
    smoothed = [5.5 / 12 * 11, 6.5 / 12 * 11]
    torch.testing.assert_close(words.tolist(), [2.5 / smoothed[0], 2.25 / smoothed[1]])


def test_update_revives_in_order_while_candidates_last() -> None:
    words, n, m = update([0.0, 8.0, 0.0, 0.0], [1.0, 8.0, 1.0, 1.0], [0, 8, 0, 0], [0.0, 8.0, 0.0, 0.0],
                         revive_below=1.0)  # fmt: skip
    assert words[0] == 7 and words[2] == 8
    # N / K = 2 is more than 1.
    assert n.tolist() == [2.0, 8.0, 2.0, 0.0] and m.tolist() == [14.0, 8.0, 16.0, 0.75]
    assert words[3] == 0.75 / (0.5 / 10 * 8)


def test_update_keeps_words_of_a_group_that_never_saw_a_row() -> None:
    words, n, m = update([0.0, 0.0], [0.0, 0.0], [0, 0], [0.0, 0.0], eps=0.0)
    assert words.tolist() == [-1.0, -1.0] and not n.any() and not m.any()
