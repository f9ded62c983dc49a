"""The Triton kernels of vq in Triton's interpreter, or on the device where there is one.

The tests of the op reach the kernels as one backend of several. These aim at what is peculiar to them: every
tile of the tables, words in two halves, rows that are lifted, waves, runs of words, packing, folds and the race.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.kernels import vq as kernels
from lct_fast.reference import vq as reference
from tests.ladder import assert_rule, assert_same_bits
from tests.ops.vq_case import DTYPES, Case, assert_equal_encodings, check, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def surroundings(threads: None, poisoned: None) -> Iterator[None]:
    """On the Triton kernels, one thread, every output and workspace full of NaN beforehand."""
    with ops.use_backend("triton"):
        yield


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_tile_keeps_to_the_rule(
    monkeypatch: pytest.MonkeyPatch, capability: int, depth: int, dtype: str
) -> None:
    # One row past the largest block, one word past the largest tile.
    monkeypatch.setattr(kernels, "SEARCH", {80: kernels.SEARCH[capability]})
    case = make(129, 1, 65, depth, DTYPES[dtype], DEVICE)
    check(case, case.run())


def test_tiles_by_capability() -> None:
    assert {c: kernels.search_tile(128, 1024, 2, c).rows for c in (80, 86, 89, 90, 100, 103, 120)} == {
        80: 64, 86: 64, 89: 64, 90: 128, 100: 128, 103: 128, 120: 64
    }  # fmt: skip
    assert kernels.search_tile(127, 1024, 2, 90) == kernels.search_tile(128, 1024, 2, 80)
    assert [kernels.search_tile(16, k, 2, 90).words for k in (2, 16, 17, 64, 65, 4096)] == [
        16, 16, 32, 64, 64, 64
    ]  # fmt: skip
    assert [kernels.sums_tile(depth, 2).depth for depth in (16, 17, 64, 65, 129, 256)] == [
        16, 32, 64, 128, 128, 128
    ]  # fmt: skip


def test_the_most_words() -> None:
    case = make(20, 1, kernels.MAX_CODEWORDS, 16, torch.float16, DEVICE)
    check(case, case.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 4.0])
@pytest.mark.parametrize("depth", [64, 256])
def test_words_in_two_parts_are_as_good_as_fp32(depth: int, offset: float, dtype: str) -> None:
    """Rows and words within 2 % of one vector. In units of eps times the sum of the terms of a score, words rounded
    to fp16 choose words too far by up to 12, to bf16 230; in two parts 2 at depth 64, and 7 or 8 at 256, by the order
    in which the host's BLAS adds; fp32 3."""
    draw = torch.Generator().manual_seed(0)
    middle = torch.randn(1, 1, depth, generator=draw) + offset
    codebook = middle * (1 + 0.02 * torch.randn(1, 60, depth, generator=draw))
    x = (middle[0] * (1 + 0.02 * torch.randn(300, depth, generator=draw))).to(DTYPES[dtype])
    case = Case(x.to(DEVICE), codebook.to(DEVICE))
    out = case.run()
    check(case, out)

    words, rows = codebook[0].double(), x.double()
    distance = (rows[:, None] - words).square().sum(2)
    unit = EPS * float((words.square().sum(1) / 2 + rows.abs() @ words.abs().T).amax())

    def excess(code: Tensor) -> float:
        return float((distance.gather(1, code[:, None])[:, 0] - distance.amin(1)).amax()) / unit

    assert excess(case.numbers(out.codes.cpu())[:, 0]) < (8 if depth == 64 else 16)
    if depth == 64 and dtype != "f32":
        half = codebook[0].to(x.dtype).double()
        assert excess((half.square().sum(1) / 2 - rows @ half.T).argmin(1)) > 8


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_rows_and_words_of_any_size(dtype: str) -> None:
    """Each row by itself keeps to the rule, from 2^-60 to 2^60: rows and words are lifted one by one."""
    case = make(61, 1, 61, 32, DTYPES[dtype], DEVICE)
    size = 2.0 ** torch.arange(-30, 31, device=DEVICE)
    wild = replace(
        case,
        x=(case.x.float() * size.square()[:, None]).to(case.x.dtype),
        codebook=case.codebook * size.square()[:, None],
    )
    code = wild.numbers(wild.run().codes.cpu())[:, 0]
    x, words = wild.vectors()[0].cpu(), wild.codebook[0].double().cpu()
    score = words.square().sum(1) / 2 - x @ words.T
    chosen, least = score.gather(1, code[:, None])[:, 0], score.amin(1)
    # The words near in size decide; the others only have to be seen to be far.
    assert bool((chosen - least <= 8 * EPS * x.square().sum(1)).all())
    assert len(code.unique()) > 20


def test_words_that_cannot_be_chosen_are_prepared_as_padding() -> None:
    codebook = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    codebook[0, 3, 5], codebook[1, 2, 0], codebook[1, 19] = float("nan"), float("inf"), 1e20
    encoder = kernels._Encoder(torch.zeros(1, 48, dtype=torch.float16, device=DEVICE), codebook, 0)
    kernels._as_on_a_device(encoder.prepare)()
    assert encoder.padded == 32
    out = torch.ones(2, 32, dtype=torch.bool, device=DEVICE)
    out[:, :20] = False
    out[0, 3] = out[1, 2] = out[1, 19] = True
    assert torch.equal(encoder.half_norm == float("inf"), out)
    assert not bool(encoder.words[:, out].any()) and not bool(encoder.words[..., 24:].any())
    high, low = encoder.words.double()[:, ~out]
    kept = torch.nn.functional.pad(codebook.double(), (0, 0, 0, 12))[~out]
    got = ((high + low) * encoder.unlift[~out][:, None].double())[:, :24]
    largest = kept.abs().amax(1, keepdim=True)
    assert bool(((got - kept).abs() <= 2.0**-22 * kept.abs() + 2.0**-39 * largest).all())
    assert bool((high.abs().amax(1) >= 2**14).all())


def test_an_outlier_among_the_words_costs_the_others_nothing() -> None:
    case = make(130, 1, 30, 32, torch.float16, DEVICE)
    codebook = case.codebook.clone()
    codebook[0, 7] = 1e12
    out = replace(case, codebook=codebook).run()
    keep = torch.arange(30) != 7
    few = replace(case, codebook=case.codebook[:, keep.to(DEVICE)])
    check(few, few.run())
    assert int(out.counts[0, 7]) == 0
    assert torch.equal(out.counts[0, keep.to(DEVICE)], few.run().counts[0])


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_the_largest_and_the_smallest_numbers(dtype: str) -> None:
    """Zeros, subnormals and numbers whose squares overflow, among rows that are none of these."""
    case = make(70, 1, 20, 16, DTYPES[dtype], DEVICE)
    plain = case.run()
    largest = torch.finfo(case.x.dtype).max
    x = case.x.clone()
    x[3], x[4], x[5, 2] = 0, torch.finfo(case.x.dtype).smallest_normal / 4, largest
    out = replace(case, x=x).run()
    code = case.numbers(out.codes.cpu())[:, 0]
    before = case.numbers(plain.codes.cpu())[:, 0]
    others = [n for n in range(70) if n not in (3, 4, 5)]
    assert torch.equal(code[others], before[others])
    smallest = int(case.codebook[0].square().sum(1).argmin())
    assert code[3] == code[4] == smallest
    # fp16's largest has a square that fp32 holds; that of the others overflows.
    assert bool(out.flag) == (dtype != "f16")
    assert int(out.counts.sum()) == 70 - (dtype != "f16")


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_waves_give_the_bits_of_one(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    case = make(2 * 4096 + 70, 2, 13, 16, DTYPES[dtype], DEVICE, candidates=5)
    x = case.x.clone()
    x[4096 + 9, 3] = float("nan")
    case = replace(case, x=x)
    together = case.run()
    monkeypatch.setattr(kernels, "WAVE", 1)
    monkeypatch.setattr(kernels, "WAVE_LEAST", 1)
    assert kernels.wave_chunks(3, 2, 13, 16) == 1
    assert_equal_encodings(together, case.run())
    assert bool(together.flag)


def test_a_wave_fits_its_workspace() -> None:
    for groups, codewords, depth in (
        (1, 128, 128),
        (1, 1024, 128),
        (32, 1024, 128),
        (1, 2, 16),
        (64, 4096, 256),
    ):
        chunks = kernels.wave_chunks(10**9, groups, codewords, depth)
        assert chunks >= kernels.WAVE_LEAST
        sums = 4 * chunks * groups * codewords * depth
        assert sums <= max(kernels.WAVE_BYTES, kernels.WAVE_LEAST * 4 * groups * codewords * depth)
        assert chunks * groups <= max(kernels.WAVE, kernels.WAVE_LEAST * groups)
        assert kernels.wave_chunks(3, groups, codewords, depth) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_workspace_does_not_grow_with_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def workspace(rows: int) -> int:
        x, codebook = (
            torch.empty(rows, 128, dtype=dtype, device="meta"),
            torch.empty(1, 256, 128, device="meta"),
        )
        held = vars(kernels._Encoder(x, codebook, 16)).values()
        return sum(each.nbytes for each in held if isinstance(each, Tensor) and each is not codebook)

    assert workspace(10**7) == workspace(10**12) < 160 * 2**20
    assert workspace(1) < workspace(10**5) < workspace(10**7)


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (600, 1), (345, 3), (8, 67)])
def test_packing(rows: int, groups: int, bits: int) -> None:
    codewords = 2**bits
    code = torch.randint(0, codewords, (rows, groups), generator=torch.Generator().manual_seed(bits))
    x = torch.zeros(rows, groups * 16, device=DEVICE)
    encoder = kernels._Encoder(x, torch.zeros(groups, codewords, 16, device=DEVICE), 0)
    encoder.codes.copy_(code.T)
    # A vector that was left out has code 0.
    encoder.codes[0, 0] = -1
    code[0, 0] = 0
    expected = reference.pack(code.flatten(), bits)
    stream = torch.full((len(expected) + 1,), 0xAB, dtype=torch.uint8, device=DEVICE)
    encoder.pack(rows, stream)
    assert torch.equal(stream[:-1].cpu(), expected)
    assert int(stream[-1]) == 0xAB


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("hot", [0.0, 0.99, 1.0])
def test_sums_of_runs_of_words(hot: float, dtype: str) -> None:
    """Words of several runs, chosen evenly, or nearly all the same, in an order that is not theirs."""
    draw = torch.Generator().manual_seed(0)
    rows, codewords = 4096 + 300, 150
    code = torch.randint(0, codewords, (1, rows), generator=draw)
    code = torch.where(torch.rand(1, rows, generator=draw) < hot, 70, code).to(torch.int16)
    code[0, 17::100] = -1
    x = torch.randn(rows, 16, generator=draw).to(DTYPES[dtype])
    # What is left out may hold anything.
    x[17::100] = float("nan")
    encoder = kernels._Encoder(x.to(DEVICE), torch.zeros(1, codewords, 16, device=DEVICE), 0)
    encoder.codes.copy_(code)
    sums = torch.zeros(1, codewords, 16, device=DEVICE)
    counts = torch.zeros(1, codewords, dtype=torch.int64, device=DEVICE)
    encoder.sum(x.to(DEVICE), sums, counts)
    good = code[0] >= 0
    index = code[0, good].long()
    assert torch.equal(counts[0].cpu(), torch.bincount(index, minlength=codewords))
    exact = torch.zeros(codewords, 16, dtype=torch.float64).index_add(0, index, x[good].double())
    plain = torch.zeros(codewords, 16).index_add(0, index, x[good].float())
    size = torch.zeros(codewords, 16).index_add(0, index, x[good].float().abs()).amax()
    assert_rule("sums", sums[0], plain, exact, EPS, float(size))


def fold(parts: Tensor) -> Tensor:
    total = torch.zeros(parts.shape[1], dtype=parts.dtype, device=DEVICE)
    kernels._fold(parts.to(DEVICE), total, len(parts))
    return total.cpu()


def test_the_fold_adds_one_chunk_after_the_other() -> None:
    draw = torch.Generator().manual_seed(0)
    for chunks in (1, kernels.FOLD[1] - 1, kernels.FOLD[1], 2 * kernels.FOLD[1] + 3):
        parts = torch.randn(chunks, kernels.FOLD[0] + 5, generator=draw)
        one_by_one = torch.zeros(parts.shape[1])
        for part in parts:
            one_by_one = one_by_one + part
        assert_same_bits("fold", fold(parts), one_by_one)


def test_counts_are_folded_to_64_bits() -> None:
    total = torch.full((3,), 2**40, dtype=torch.int64, device=DEVICE)
    parts = torch.full((2, 3), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    kernels._fold(parts, total, 2)
    assert total.tolist() == [2**40 + 2**32 - 2] * 3


@pytest.mark.parametrize("slots", [1, 3, 16, 64, 65])
def test_the_race(slots: int) -> None:
    """Errors of every kind: ties go to the first row, NaN and 0 never win."""
    draw = torch.Generator().manual_seed(slots)
    rows = 4096 + 500
    x = torch.randn(rows, 32, generator=draw)
    errors = torch.rand(2, rows, generator=draw)
    errors[:, ::3] = 0
    errors[0, 5::7] = float("nan")
    # Two chunks with the same errors in the same places: the same scores.
    errors[:, 4096:] = errors[:, : rows - 4096]
    encoder = kernels._Encoder(x.to(DEVICE), torch.zeros(2, 4, 16, device=DEVICE), slots)
    encoder.errors.copy_(errors)
    candidates = torch.full((2, slots, 16), float("nan"), device=DEVICE)
    scores = torch.zeros(2, slots, device=DEVICE)
    encoder.race(x.to(DEVICE), candidates, scores)
    place = torch.arange(rows) % 4096
    expected = reference.candidate_scores(errors.nan_to_num(), place)
    for group in range(2):
        for slot in range(slots):
            members = torch.arange(rows)[place % slots == slot]
            best = members[expected[group, members].argmax()]
            assert int(best) < 4096
            assert_same_bits("score", scores[group, slot].cpu(), expected[group, best])
            if expected[group, best] == 0:
                assert slots == 3 and slot == 0 and bool(candidates[group, slot].isnan().all())
                continue
            vector = x.view(rows, 2, 16)[best, group]
            assert_same_bits("candidate", candidates[group, slot].cpu(), vector)


@pytest.mark.parametrize("apart", ["in one step", "in two steps"])
def test_ties_of_the_race_go_to_the_first_row(apart: str) -> None:
    """Two rows of one chunk with the very same score, found among many errors."""
    draw = torch.Generator().manual_seed(0)
    errors = torch.rand(200_000, generator=draw)
    places = torch.randint(0, 4096, (200_000,), generator=draw)
    scores, order = reference.candidate_scores(errors, places).sort()
    step = kernels.RACE[0]
    for i in range(len(scores) - 1):
        first, second = sorted(order[i : i + 2].tolist(), key=lambda index: int(places[index]))
        a, b = int(places[first]), int(places[second])
        if scores[i] == scores[i + 1] and a < b and (a // step == b // step) == (apart == "in one step"):
            break
    else:
        raise AssertionError("no two scores are equal")
    x = torch.randn(4096, 16, generator=draw)
    encoder = kernels._Encoder(x.to(DEVICE), torch.zeros(1, 4, 16, device=DEVICE), 1)
    encoder.errors.zero_()
    encoder.errors[0, a], encoder.errors[0, b] = errors[first], errors[second]
    candidates, best = torch.empty(1, 1, 16, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    encoder.race(x.to(DEVICE), candidates, best)
    assert float(best) == float(scores[i])
    assert_same_bits("candidate", candidates[0, 0].cpu(), x[a])


def test_shapes_beyond_the_kernels_are_refused() -> None:
    x = torch.zeros(4, 64, device=DEVICE)

    def reason(groups: int, codewords: int, depth: int, like: Tensor = x) -> str:
        return kernels.why_not(like, x.new_empty(1).expand(groups, codewords, depth))

    assert reason(4, 4096, 16) == reason(1, 2, 256) == ""
    assert "16 to 256 columns; codebook has 15" in reason(1, 8, 15)
    assert "codebook has 257" in reason(1, 8, 257)
    assert "4096 words a group; codebook has 4097" in reason(1, 4097, 16)
    assert "65535 groups; codebook has 65536" in reason(65536, 8, 16)
    assert "x is torch.float64" in reason(1, 8, 64, x.double())
    with pytest.raises(ValueError, match="codebook has 8; choose another backend"):
        kernels.vq_encode(x, torch.zeros(8, 4, 8, device=DEVICE), *(x,) * 7)
