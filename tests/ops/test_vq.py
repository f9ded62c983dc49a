"""vq on every backend that it has here, against its definition in float64."""

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from lct_fast import _native, ops
from lct_fast.reference import vq as reference
from tests.cuda.vq_order import check_order
from tests.ladder import Place, assert_same_bits
from tests.ops.vq_case import (
    DEEP_SHAPES,
    DTYPES,
    ENCODE_PLACES,
    SHAPES,
    Case,
    assert_equal_encodings,
    check,
    encoders,
    everywhere,
    fit,
    make,
)

NAN = float("nan")


@pytest.fixture
def levels() -> Iterator[list[str]]:
    """The instruction sets of this CPU; the best is set again afterwards."""
    native = _native.load()
    assert native is not None, _native.why_absent()
    yield native.simd_levels()
    native.set_simd(None)


def test_backends() -> None:
    for name in ("vq_encode", "vq_decode", "vq_update"):
        found = ops.backends(name)
        assert found["reference"] == found["cpu"] == "available"
    # Nothing to multiply in the others.
    assert ops.backends("vq_encode")["triton"] == "available"
    assert "triton" not in ops.backends("vq_decode") and "triton" not in ops.backends("vq_update")


def encodings() -> list[tuple[Place, tuple[int, int, int, int]]]:
    return [
        (place, shape)
        for place in ENCODE_PLACES
        for shape in (DEEP_SHAPES if place.backend == "triton" else SHAPES)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("place", "shape"), encodings(), ids=str, indirect=["place"])
def test_within_the_rule(place: Place, shape: tuple[int, int, int, int], dtype: str) -> None:
    # Between them the shapes and dtypes meet no, one, several and more candidates than rows.
    slots = (16, 0, 1, 100)[(sum(shape) + list(DTYPES).index(dtype)) % 4]
    case = make(*shape, DTYPES[dtype], place.device, slots)
    check(case, case.run())


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_gives_the_words(place: Place, shape: tuple[int, int, int, int], dtype: str) -> None:
    case = make(*shape, device=place.device)
    groups, codewords, depth = case.codebook.shape
    code = torch.randint(0, codewords, (shape[0], groups), generator=torch.Generator().manual_seed(1))
    codes = reference.pack(code.flatten(), reference.bits_of(codewords)).to(place.device)
    x, flag = ops.vq_decode(codes, case.codebook, shape[0], DTYPES[dtype], return_flag=True)
    words = case.codebook.cpu()[torch.arange(groups), code].to(DTYPES[dtype])
    assert torch.equal(x.cpu(), words.view(shape[0], groups * depth))
    assert not flag and flag.dtype == torch.bool


@everywhere
@pytest.mark.parametrize("codewords", [3, 5, 255, 257])
def test_a_code_beyond_the_codebook_is_clamped_and_flagged(place: Place, codewords: int) -> None:
    case = make(2000, 2, codewords, 3, device=place.device)
    code = torch.zeros(2000, 2, dtype=torch.int64)
    code[1733, 1] = codewords
    bits = reference.bits_of(codewords)
    codes = reference.pack(code.flatten(), bits).to(place.device)
    x, flag = ops.vq_decode(codes, case.codebook, 2000, return_flag=True)
    assert bool(flag)
    assert torch.equal(x[1733, 3:], case.codebook[1, codewords - 1])
    assert torch.equal(x[1732], torch.cat((case.codebook[0, 0], case.codebook[1, 0])))
    ones = torch.full_like(codes, 255)
    x, flag = ops.vq_decode(ones, case.codebook, 2000, return_flag=True)
    assert bool(flag) and torch.equal(x, case.codebook[:, -1].flatten().expand(2000, -1))


@everywhere
def test_what_is_decoded_has_the_error_that_was_reported(place: Place) -> None:
    case = make(1000, 3, 50, 8, device=place.device)
    out = case.run()
    x = ops.vq_decode(out.codes, case.codebook, 1000)
    torch.testing.assert_close((x - case.x).double().square().sum().float(), out.squared_error)


@everywhere
def test_no_rows(place: Place) -> None:
    case = make(0, 2, 5, 3, device=place.device, candidates=4)
    out = case.run()
    assert out.codes.shape == (0,) and out.counts.shape == (2, 5) and not out.counts.any()
    assert not out.sums.any() and out.squared_error == 0 and not out.flag
    assert bool(out.candidates.isnan().all()) and not out.candidate_scores.any()
    x, flag = ops.vq_decode(out.codes, case.codebook, 0, torch.float16, return_flag=True)
    assert x.shape == (0, 6) and x.dtype == torch.float16 and not flag


@encoders
@pytest.mark.parametrize("codewords", [2, 3, 6, 7, 100, 300])
def test_ties_go_to_the_lowest_index(place: Place, codewords: int) -> None:
    """Every word twice and more often, and x on the words: exact arithmetic, so nothing else may be chosen."""
    half = -(-codewords // 2)
    words = torch.arange(half, dtype=torch.float32).repeat(2)[:codewords]
    codebook = torch.stack((words, -2 * words, words), 1)[None].to(place.device)
    x = torch.arange(200) % half
    case = replace(make(200, 1, codewords, 3, device=place.device), codebook=codebook)
    case = fit(place, replace(case, x=codebook[0, x]))
    out = case.run()
    assert torch.equal(case.numbers(out.codes.cpu())[:, 0], x)
    assert not out.counts[0, half:].any()
    assert out.squared_error == 0 and bool(out.candidates.isnan().all())


@encoders
def test_all_words_the_same_are_all_the_first(place: Place) -> None:
    case = fit(place, make(130, 2, 257, 5, device=place.device))
    if place == Place("triton", "cpu"):
        # Interpreted, its products are BLAS's, whose rounding depends on a column's place: nothing to round here.
        case = replace(case, x=case.x.mul(8).round() / 8, codebook=case.codebook.mul(8).round() / 8)
    case = replace(case, codebook=case.codebook[:, :1].repeat(1, 257, 1))
    out = case.run()
    assert not out.codes.any() and out.counts[:, 0].tolist() == [130, 130]


@encoders
@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_that_is_not_finite_is_left_out_alone(place: Place, dtype: str, value: float) -> None:
    case = fit(place, make(100, 3, 17, 5, DTYPES[dtype], place.device, candidates=1))
    good = case.run()
    x = case.x.clone()
    x[37, case.codebook.shape[2] + 2] = value
    bad = replace(case, x=x)
    out = bad.run()
    assert bool(out.flag) and not good.flag
    code, before = case.numbers(out.codes.cpu()), case.numbers(good.codes.cpu())
    k = int(before[37, 1])
    assert int(code[37, 1]) == 0
    before[37, 1] = 0
    assert torch.equal(code, before)
    counts = good.counts.clone()
    counts[1, k] -= 1
    assert torch.equal(out.counts, counts)
    # The same rows without that one, whose place in group 1 no other vector takes.
    others = torch.arange(100) != 37
    rest = replace(case, x=case.x[others.to(place.device)]).run()
    torch.testing.assert_close(out.sums[1], rest.sums[1])
    assert_same_bits("sums of group 0", out.sums[0], good.sums[0])
    assert_same_bits("sums of group 2", out.sums[2], good.sums[2])
    assert bool(out.squared_error.isfinite()) and bool(out.candidates.isfinite().all())
    assert float(out.squared_error) < float(good.squared_error)


@encoders
def test_a_word_that_is_not_finite_is_never_chosen(place: Place) -> None:
    case = fit(place, make(100, 1, 8, 3, device=place.device))
    codebook = case.codebook.clone()
    codebook[0, 2, 1], codebook[0, 5, 0], codebook[0, 6] = NAN, float("inf"), float("-inf")
    out = replace(case, codebook=codebook).run()
    assert not out.flag and out.counts[0, [2, 5, 6]].tolist() == [0, 0, 0]
    keep = [0, 1, 3, 4, 7]
    few = replace(case, codebook=case.codebook[:, keep]).run()
    assert torch.equal(out.counts[:, keep], few.counts)


@encoders
@pytest.mark.parametrize("codewords", [2, 7, 100])
def test_without_a_finite_word_all_is_code_zero_and_flagged(place: Place, codewords: int) -> None:
    case = fit(place, make(70, 1, codewords, 3, device=place.device))
    out = replace(case, codebook=torch.full_like(case.codebook, NAN)).run()
    assert bool(out.flag) and not out.codes.any() and not out.counts.any() and not out.sums.any()
    assert out.squared_error == 0 and bool(out.candidates.isnan().all())


def chunked() -> list[tuple[Place, tuple[int, int, int, int]]]:
    shapes = [(3 * 4096 + 700, 2, 13, 4), (2 * 4096, 1, 300, 5)]
    # Interpreted, one row of programs after the other: fewer will do.
    fewer = [(2 * 4096 + 70, 2, 13, 4)]
    return [(p, s) for p in ENCODE_PLACES for s in (fewer if p == Place("triton", "cpu") else shapes)]


@pytest.mark.parametrize(("place", "shape"), chunked(), ids=str, indirect=["place"])
def test_chunks_fold_to_the_bits_of_the_whole(place: Place, shape: tuple[int, int, int, int]) -> None:
    case = fit(place, make(*shape, device=place.device, candidates=5))
    whole = case.run()
    parts = [replace(case, x=x).run() for x in case.x.split(4096)]
    assert_same_bits("codes", whole.codes, torch.cat([p.codes for p in parts]))
    counts = sum(p.counts for p in parts)
    assert torch.equal(whole.counts, counts)
    sums, error = torch.zeros_like(whole.sums), torch.zeros_like(whole.squared_error)
    best, vectors = torch.zeros_like(whole.candidate_scores), whole.candidates * NAN
    for part in parts:
        sums, error = sums + part.sums, error + part.squared_error
        better = part.candidate_scores > best
        best = torch.where(better, part.candidate_scores, best)
        vectors = torch.where(better[..., None], part.candidates, vectors)
    assert_same_bits("sums", whole.sums, sums)
    assert_same_bits("squared_error", whole.squared_error, error)
    assert_same_bits("candidate_scores", whole.candidate_scores, best)
    assert_same_bits("candidates", whole.candidates, vectors)


@encoders
@pytest.mark.parametrize("slots", [1, 7, 16, 4096])
def test_candidates_are_those_with_the_largest_score(place: Place, slots: int) -> None:
    """One column, so that an error is one rounded product and its bits, which are hashed, are known."""
    if place == Place("triton", "cpu"):
        # A program a slot, one after the other.
        slots = min(slots, 100)
    case = fit(place, make(4096 + 600, 2, 9, 1, device=place.device, candidates=slots))
    out = case.run()
    code = case.numbers(out.codes.cpu())
    x, rows = case.x.cpu()[:, :: case.codebook.shape[2]], torch.arange(len(case.x))
    nearest = case.codebook.cpu()[torch.arange(2), code][:, :, 0]
    scores = reference.candidate_scores((x - nearest).square().T, rows % 4096).T
    for group in range(2):
        for r in range(min(slots, 40)):
            members = rows[rows % 4096 % slots == r]
            best = members[scores[members, group].argmax()]
            assert_same_bits("score", out.candidate_scores[group, r].cpu(), scores[best, group])
            assert_same_bits("candidate", out.candidates[group, r, 0].cpu(), x[best, group])


@encoders
def test_sums_over_many_rows_keep_their_digits(place: Place) -> None:
    """Nearly all rows on one word: a running sum over all of them would lose digits."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(5 * 4096, 4, generator=draw)
    codebook = torch.cat((torch.full((1, 1, 4), 0.5), torch.full((1, 9, 4), 1e3)), 1)
    out = fit(place, Case(x.to(place.device), codebook.to(place.device))).run()
    assert int(out.counts[0, 0]) == len(x)
    exact = x.double().sum(0)
    error = float((out.sums[0, 0, :4].cpu().double() - exact).abs().max() / exact.max())
    # One running sum is off by 5.6e-6 here, one within each chunk by 2.0e-7.
    assert error < 1e-6


@encoders
@pytest.mark.parametrize("shape", [(5000, 2, 13, 4), (700, 1, 1024, 9)], ids=str)
def test_same_bits_on_every_run(place: Place, shape: tuple[int, int, int, int]) -> None:
    case = fit(place, make(*shape, device=place.device))
    assert_equal_encodings(case.run(), case.run())


@encoders
def test_strided_inputs_give_what_dense_ones_give(place: Place) -> None:
    case = fit(place, make(70, 2, 9, 6, device=place.device))
    strided = replace(case, x=case.x.T.contiguous().T, codebook=case.codebook.mT.contiguous().mT)
    assert not strided.x.is_contiguous() and not strided.codebook.is_contiguous()
    assert_equal_encodings(case.run(), strided.run())


@encoders
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_start_in_the_middle_of_a_vector(place: Place, dtype: str) -> None:
    case = fit(place, make(70, 2, 9, 8, DTYPES[dtype], place.device))

    def shifted(x: torch.Tensor) -> torch.Tensor:
        buffer = x.new_zeros(x.numel() + 1)
        buffer[1:] = x.flatten()
        return buffer[1:].view(x.shape)

    other = replace(case, x=shifted(case.x), codebook=shifted(case.codebook))
    assert_equal_encodings(case.run(), other.run())


BITS = [(5003, 2, 13, 4), (2100, 1, 257, 9), (1030, 1, 1024, 64), (600, 3, 3, 128), (4200, 1, 4096, 2)]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("shape", BITS, ids=str)
def test_cpu_gives_the_same_bits_for_any_thread_count(shape: tuple[int, int, int, int], dtype: str) -> None:
    case = make(*shape, DTYPES[dtype])
    with ops.use_backend("cpu"):
        first = case.run()
        decoded = ops.vq_decode(first.codes, case.codebook, shape[0], DTYPES[dtype])
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert_equal_encodings(first, case.run(), f"on {count} threads")
            again = ops.vq_decode(first.codes, case.codebook, shape[0], DTYPES[dtype])
            assert_same_bits("decoded", decoded, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*BITS, (33, 1, 5, 200)], ids=str)
def test_cpu_gives_the_same_bits_for_every_instruction_set(
    levels: list[str], shape: tuple[int, int, int, int], dtype: str
) -> None:
    native = _native.load()
    assert native is not None and "scalar" in levels
    case = make(*shape, DTYPES[dtype])
    # Vectors of very different size: products that are subnormal, sums that lose most of their digits.
    spread = torch.logspace(-30, 15, shape[0] * shape[1] * shape[3]).view_as(case.x)
    wild = replace(case, x=(case.x.float() * spread).to(case.x.dtype), codebook=case.codebook * 1e-8)
    with ops.use_backend("cpu"):
        native.set_simd("scalar")
        first, first_wild = case.run(), wild.run()
        decoded = ops.vq_decode(first.codes, case.codebook, shape[0], DTYPES[dtype])
        check(case, first)
        for level in levels[1:]:
            native.set_simd(level)
            assert_equal_encodings(first, case.run(), level)
            assert_equal_encodings(first_wild, wild.run(), level)
            again = ops.vq_decode(first.codes, case.codebook, shape[0], DTYPES[dtype])
            assert_same_bits("decoded", decoded, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*BITS, (2100, 3, 255, 2), (2100, 2, 70, 16), (900, 1, 300, 20)], ids=str)
def test_cuda_gives_the_bits_of_cpu(shape: tuple[int, int, int, int], dtype: str) -> None:
    """All but the order of sums, which is the backend's own."""
    case = make(*shape, DTYPES[dtype])
    with ops.use_backend("cpu"):
        expected = case.run()
    with ops.use_backend("cuda"):
        moved = make(*shape, DTYPES[dtype], "cuda").run()
    got = ops.VQEncoding(*(each.cpu() for each in moved))
    for name in ("codes", "counts", "candidates", "candidate_scores"):
        assert_same_bits(name, getattr(got, name), getattr(expected, name))
    check_order(case, got)


def rounded(x: Fraction) -> Fraction:
    """The nearest float of 24 bits, ties to even."""
    step = Fraction(2) ** (math.floor(math.log2(abs(x))) - 23)
    return round(x / step) * step


def test_a_fused_step_is_rounded_once(levels: list[str]) -> None:
    """Two words whose scores are equal if it is; a sum that is rounded to double first makes the second less."""
    native = _native.load()
    assert native is not None
    one, tiny = Fraction(1), Fraction(1, 2**54)
    found = 0
    for p in range(2**24 - 1, 2**24 - 60000, -2):
        # -x1 c1 = p q 2^-54 lies 2^-54 above the middle of two floats near 1, the lower of them even.
        q = pow(p, -1, 2**32) * (2**30 + 1) % 2**32
        if not 2**22 < q < 2**24 or p * q % 2**32 != 2**30 + 1:
            continue
        x1, c1 = -p * Fraction(1, 2**30), q * Fraction(1, 2**24)
        half = rounded(one + c1 * c1) / 2
        x0 = half - 1
        score = rounded(1 + p * q * tiny)
        # A word (c, 0) with the very same score.
        near = float(x0) + math.sqrt(float(x0) ** 2 + 2 * float(score))
        for i in range(-20, 21):
            c = rounded(Fraction(near)) + i * Fraction(1, 2**23)
            if rounded(rounded(c * c) / 2 - x0 * c) == score:
                break
        else:
            continue
        found += 1
        codebook = torch.tensor([[[float(c), 0.0], [1.0, float(c1)]]])
        x = torch.tensor([[float(x0), float(x1)]])
        with ops.use_backend("cpu"):
            for level in levels:
                native.set_simd(level)
                assert ops.vq_encode(x, codebook).codes.tolist() == [0], level
    assert found


def test_skewed_rows_are_counted_as_any_others() -> None:
    """All rows on one word of many, every thread count."""
    case = make(9000, 1, 256, 4)
    case = replace(case, x=case.codebook[0, 200] + case.x * 1e-3)
    with ops.use_backend("cpu"):
        first = case.run()
        check(case, first)
        assert int(first.counts[0, 200]) > 8000
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_equal_encodings(first, case.run())
