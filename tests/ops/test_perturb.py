"""perturb and score on every backend of this machine: the reference's bits."""

import pytest
import torch

from lct_fast import _native, ops
from tests.ladder import Place, assert_same_bits
from tests.ops.perturb_case import DTYPES, OFFSETS, PLACES, SEED, SHAPES, check, make


@pytest.fixture(params=PLACES, ids=str)
def where(request: pytest.FixtureRequest) -> Place:
    """A backend of these ops on a device."""
    place: Place = request.param
    return place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "copies"), SHAPES)
def test_same_bits(where: Place, shape: tuple[int, ...], copies: int, dtype: str) -> None:
    names = list(DTYPES)
    with ops.use_backend(where.backend):
        for turn, offset in enumerate(OFFSETS):
            for antithetic in (False, True):
                if antithetic and copies * shape[0] % 2:
                    continue
                out_dtype = DTYPES[names[(names.index(dtype) + turn) % 3]]
                given = make(
                    shape, copies, DTYPES[dtype], offset=offset, antithetic=antithetic, device=where.device
                )
                check(given, out_dtype)


def test_a_part_of_the_noise_is_the_slice(where: Place) -> None:
    one = torch.ones((), device=where.device)
    with ops.use_backend(where.backend):
        whole = ops.perturb(torch.zeros(1000, device=where.device), one, SEED, 5)
        for first in (0, 1, 2, 3, 4, 257, 990):
            part = ops.perturb(torch.zeros(1000 - first, device=where.device), one, SEED, 5 + first)
            assert_same_bits("part", part, whole[first:])
        other = ops.perturb(torch.zeros(1000, device=where.device), one, SEED + 1, 5)
        assert not bool((other == whole).any())


def test_antithetic_pairs_are_exact_negatives(where: Place) -> None:
    one = torch.ones((), device=where.device)
    with ops.use_backend(where.backend):
        eps = ops.perturb(torch.zeros(6, 7, 5, device=where.device), one, SEED, 2, True)
        half = ops.perturb(torch.zeros(3, 7, 5, device=where.device), one, SEED, 2)
    assert_same_bits("first half", eps[:3], half)
    assert_same_bits("second half", eps[3:], -half)


def test_every_word_that_matters(where: Place) -> None:
    """2^18 values in a row, all regions of the normal among them."""
    with ops.use_backend(where.backend):
        check(make((4, 2**16), 1, torch.float32, device=where.device), torch.float32)


def test_special_values(where: Place) -> None:
    """NaN and Inf of z, loss and sigma go where the formula puts them."""
    device = where.device
    z = torch.tensor([[float("nan"), float("inf"), 1.0]], device=device)
    sigma = torch.tensor([1.0, 1.0, 0.0], device=device)
    loss = torch.tensor([2.0], device=device)
    with ops.use_backend(where.backend):
        out = ops.perturb(z, sigma, 1).cpu()
        back = ops.score(loss, sigma, 1, 0, (1, 3)).cpu()
    assert bool(out[0, 0].isnan()) and float(out[0, 1]) == float("inf") and float(out[0, 2]) == 1.0
    assert bool(back[0, :2].isfinite().all()) and bool(back[0, 2].isinf())


def test_strides_of_z_do_not_matter(where: Place) -> None:
    z = torch.randn(4, 6, 5, device=where.device)
    sigma = torch.rand(6, device=where.device)
    with ops.use_backend(where.backend):
        turned = z.transpose(0, 2).contiguous().transpose(0, 2)
        assert_same_bits("strided", ops.perturb(turned, sigma, 3), ops.perturb(z, sigma, 3))


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("threads", [1, 3])
def test_instruction_sets_and_thread_counts(level: str, threads: int) -> None:
    native = _native.load()
    assert native is not None, _native.why_absent()
    if level not in native.simd_levels():
        pytest.skip(f"this CPU has no {level}")
    torch.set_num_threads(threads)
    native.set_simd(level)
    try:
        with ops.use_backend("cpu"):
            for (shape, copies), offset in zip(SHAPES, OFFSETS * 2, strict=False):
                for dtype in DTYPES.values():
                    check(make(shape, copies, dtype, offset=offset), dtype)
            check(make((4, 2**16), 1, torch.float32, offset=1), torch.float32)
    finally:
        native.set_simd(None)
