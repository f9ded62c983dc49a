"""The filter that backend `cpu` searches with on AVX-512 VNNI, against the plain search: never another bit.

Inputs that a filter with a wrong bound would get wrong. From D = 8 on it works with numbers of 16 bits, from D = 24
on with 8.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lct_fast import _native, ops
from tests.ops.vq_case import assert_equal_encodings

NAN = float("nan")
DEPTHS = [8, 9, 16, 21, 24, 30, 64, 130]
ROWS, CODEWORDS = 700, 100


@pytest.fixture(autouse=True)
def best_set_again() -> Iterator[None]:
    native = _native.load()
    assert native is not None, _native.why_absent()
    if "avx512vnni" not in native.simd_levels():
        pytest.skip("this CPU has no AVX-512 VNNI")
    yield
    native.set_simd(None)


def searched(x: Tensor, codebook: Tensor) -> tuple[ops.VQEncoding, ops.VQEncoding]:
    """By the filter and plainly."""
    native = _native.load()
    assert native is not None
    with ops.use_backend("cpu"):
        native.set_simd("avx512vnni")
        filtered = ops.vq_encode(x, codebook)
        native.set_simd("avx512")
        return filtered, ops.vq_encode(x, codebook)


def assert_same(x: Tensor, codebook: Tensor) -> ops.VQEncoding:
    filtered, plain = searched(x, codebook)
    assert_equal_encodings(plain, filtered)
    return filtered


def draw(depth: int, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    """x [N, D], codebook [1, K, D], and more."""
    more = torch.Generator().manual_seed(seed * 1000 + depth)
    return (
        torch.randn(ROWS, depth, generator=more),
        torch.randn(1, CODEWORDS, depth, generator=more),
        more,
    )


def between(codebook: Tensor, more: torch.Generator) -> Tensor:
    """Rows in the middle of two words, but for the last digits."""
    first, second = torch.randint(0, CODEWORDS, (2, ROWS), generator=more)
    middle = (codebook[0, first] + codebook[0, second]) / 2
    return middle * (1 + 1e-7 * torch.randn(middle.shape, generator=more))


@pytest.mark.parametrize("depth", DEPTHS)
def test_rows_between_two_words(depth: int) -> None:
    _, codebook, more = draw(depth)
    assert_same(between(codebook, more), codebook)
    # All words nearly the same: every row is between them all.
    close = codebook[:, :1] + 1e-6 * codebook
    assert_same(between(close, more), close)
    few = codebook[:, torch.randint(0, 3, (CODEWORDS,), generator=more)] * (1 + 1e-6 * codebook)
    assert_same(between(few, more), few)


@pytest.mark.parametrize("depth", DEPTHS)
def test_ties_go_to_the_lowest_index(depth: int) -> None:
    """Words twice, in one tile of six and in two, and rows on them or as far from both."""
    _, codebook, more = draw(depth)
    codebook = codebook[:, torch.randint(0, 40, (CODEWORDS,), generator=more)].round()
    x = codebook[0, torch.randint(0, CODEWORDS, (ROWS,), generator=more)]
    out = assert_same(x, codebook)
    distance = torch.cdist(x.double(), codebook[0].double(), compute_mode="donot_use_mm_for_euclid_dist")
    lowest = (distance == distance.amin(1, keepdim=True)).int().argmax(1)
    assert torch.equal(out.counts[0], torch.bincount(lowest, minlength=CODEWORDS))
    middle = (x + x.roll(1, 0)) / 2
    assert_same(middle, codebook)


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e-19, 1e-10, 1e-6, 1e6, 1e12, 1e18, 1e19, 1e30])
@pytest.mark.parametrize("depth", [8, 11, 30])
def test_sizes_from_the_smallest_to_the_largest(depth: int, size: float) -> None:
    """Of x, of the words, of both; products that are subnormal, sums that overflow."""
    x, codebook, more = draw(depth)
    assert_same(x * size, codebook)
    assert_same(x, codebook * size)
    assert_same(x * size, codebook * size)
    assert_same(between(codebook, more) * size, codebook * size)
    assert_same(x * size, codebook / size)


@pytest.mark.parametrize("depth", [8, 11, 30, 64])
def test_rows_and_words_of_very_different_size(depth: int) -> None:
    x, codebook, more = draw(depth)
    spread = torch.logspace(-20, 20, ROWS)[torch.randperm(ROWS, generator=more), None]
    assert_same(x * spread, codebook)
    assert_same(x * torch.where(torch.rand(ROWS, 1, generator=more) < 0.02, 1e4, 1.0), codebook)
    assert_same(x, codebook * torch.logspace(-3, 3, CODEWORDS)[:, None])
    assert_same(between(codebook, more) * spread.clamp(1e-3, 1e3), codebook)


@pytest.mark.parametrize("offset", [1.0, 30.0, 1e3, 1e5])
@pytest.mark.parametrize("depth", DEPTHS)
def test_scores_that_lose_their_digits(depth: int, offset: float) -> None:
    """Far off zero the rounding of the prescribed scores decides, and not how far the words are."""
    x, codebook, more = draw(depth)
    assert_same(x + offset, codebook + offset)
    assert_same(between(codebook + offset, more), codebook + offset)
    assert_same(x.relu(), codebook.relu() + offset)


@pytest.mark.parametrize("depth", [8, 11, 30])
def test_what_is_not_finite(depth: int) -> None:
    x, codebook, _ = draw(depth)
    bad = codebook.clone()
    bad[0, ::7, 1], bad[0, 3], bad[0, 4, 2], bad[0, 5] = NAN, float("inf"), float("-inf"), 2e19
    assert_same(x, bad)
    assert_same(x, torch.full_like(codebook, NAN))
    rows = x.clone()
    rows[70, 0], rows[200], rows[201, 2], rows[400] = NAN, float("inf"), float("-inf"), 1e25
    out = assert_same(rows, codebook)
    assert bool(out.flag)
    assert_same(rows, bad)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [8, 13, 26, 64])
def test_types_and_groups(depth: int, dtype: torch.dtype, groups: int) -> None:
    more = torch.Generator().manual_seed(depth)
    x = torch.randn(ROWS, groups * depth, generator=more).to(dtype)
    codebook = torch.randn(groups, 301, depth, generator=more)
    assert_same(x, codebook)


@pytest.mark.parametrize("tiny", [1e-3, -1e-3])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_row_whose_approximate_scores_are_as_wrong_as_they_can_be(depth: int, tiny: float) -> None:
    """Two words v and -v. What rounding leaves of a row points along v, so that v seems nearer, or farther, by all
    that the bound allows for, and in truth both are as near but for `tiny` steps.
    """
    more = torch.Generator().manual_seed(depth)
    sign = torch.randint(0, 2, (ROWS, depth), generator=more, dtype=torch.float64) * 2 - 1
    sign[:] = sign[0]
    largest = 127.0 if depth >= 24 else 8190 / (-(-depth // 4) * 4) ** 0.5
    for wrong in range(1, (depth - 1) // 2 + 1, max(1, depth // 6)):
        # Whole numbers along v sum up to -wrong, and a fraction less than half in every column brings it to tiny.
        number = torch.randint(-3, 4, (ROWS, depth), generator=more, dtype=torch.float64)
        number[:, 0] -= (sign * number).sum(1) * sign[:, 0] + wrong * sign[:, 0]
        x = number + sign * (wrong + tiny) / depth
        # One row of each block sets the scale.
        x[::64] = largest
        for flip in (1, -1):
            codebook = torch.full((1, CODEWORDS, depth), NAN)
            codebook[0, 7], codebook[0, 50] = flip * sign[0].float(), -flip * sign[0].float()
            out = assert_same(x.float(), codebook)
            nearer = 7 if flip * tiny > 0 else 50
            assert int(out.counts[0, nearer]) >= ROWS - 11


def test_where_it_serves() -> None:
    """It has a workspace of its own where it does."""
    native = _native.load()
    assert native is not None

    def serves(rows: int, codewords: int, depth: int) -> bool:
        sizes = []
        for level in ("avx512", "avx512vnni"):
            native.set_simd(level)
            sizes.append(native.vq_encode_cpu_workspace(rows, 1, codewords, depth, 16, 0, 1))
        return bool(sizes[1] > sizes[0])

    assert serves(256, 48, 8) and serves(4096, 65536, 4096)
    assert not serves(255, 48, 8) and not serves(256, 47, 8)
    assert not serves(256, 48, 7) and not serves(256, 48, 4097) and not serves(4095, 65536, 8)


@pytest.mark.parametrize(("rows", "codewords"), [(256, 48), (257, 49), (400, 53), (1000, 4099)])
def test_the_smallest_that_it_serves(rows: int, codewords: int) -> None:
    more = torch.Generator().manual_seed(rows)
    for depth in (8, 25):
        x = torch.randn(rows, depth, generator=more)
        assert_same(x, torch.randn(1, codewords, depth, generator=more))
