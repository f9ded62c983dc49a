"""The Triton kernels of critic_head in Triton's interpreter, or on the device where there is one.

The tests of the op reach the kernels as one backend of four. These aim at what is peculiar to them: both
forward kernels and their tiles, chunks of several row blocks, lifted fp16 operands, the order of the fold.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from lct_fast import ops
from lct_fast.kernels import critic_head as kernels
from tests.ladder import assert_rule, assert_same_bits
from tests.ops.critic_head_case import Case, check, check_wgrad, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (rows, depth, classes): why. The resident kernel takes short rows whose depth is a multiple of 16.
SHAPES = {
    (1, 16, 1): "resident; one row, one class, the smallest dot",
    (67, 64, 10): "resident, rows past two blocks by 3",
    (33, 112, 10): "resident, a depth between two tiles: masked columns",
    (19, 512, 10): "resident, the deepest tile",
    (35, 128, 33): "resident, one class past 32",
    (66, 513, 10): "tiled, one column past 512, two shares of dweight",
    (5, 1, 2): "tiled, one column",
    (65, 144, 16): "tiled for fp32, the last class count that writes shares",
    (34, 272, 17): "tiled, the first class count whose dweight is made from stored dlogits",
    (21, 80, 129): "tiled, one class past 128: the weight gradient takes two tiles of classes",
    (9, 17, 1000): "tiled, the widest tile",
}
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "f16": (torch.float16, torch.float16),
    "f16-f32": (torch.float16, torch.float32),
}


@pytest.fixture(autouse=True)
def surroundings(threads: None, poisoned: None) -> Iterator[None]:
    """On the Triton kernels, one thread, every output and workspace full of NaN beforehand."""
    with ops.use_backend("triton"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_keeps_to_the_error_rule(shape: tuple[int, int, int], dtype: str) -> None:
    odd = sum(shape) % 2 == 1
    case = make(*shape, *DTYPES[dtype], device=DEVICE, bias=odd, activation="relu" if odd else "none")
    out = case.run()
    check(case, out)
    check_wgrad(case, *case.wgrad(out.dlogits))


@pytest.mark.parametrize("depth", [48, 50])
def test_chunks_of_several_blocks_add_up(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    # Real launches have such chunks from 16384 rows on.
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    case = make(32 * 7 + 5, depth, 10, device=DEVICE, activation="relu")
    out = case.run()
    check(case, out)
    check_wgrad(case, *case.wgrad(out.dlogits))


def fold(shares: torch.Tensor, classes: int, depth: int) -> torch.Tensor:
    dweight, dbias = torch.empty(classes, depth, device=DEVICE), torch.empty(classes, device=DEVICE)
    kernels._fold(shares, dweight, dbias)
    return torch.cat([dweight.flatten(), dbias])


def test_the_fold_adds_every_chunk() -> None:
    # Three steps of the fold, the last of them partial; 93 numbers a share and padding that is not read.
    shares = torch.full((2 * kernels.FOLD[0] + 3, 96), float("nan"))
    shares[:, :93] = torch.randn(len(shares), 93, generator=torch.Generator().manual_seed(0))
    used = shares[:, :93]
    got = fold(shares.to(DEVICE), classes=3, depth=30)
    assert_rule("fold", got, used.sum(0), used.double().sum(0), torch.finfo(torch.float32).eps)


def test_the_fold_keeps_the_order() -> None:
    """A big number, its opposite and 1, in two orders that only adding from the front tells apart."""
    step = kernels.FOLD[0]
    shares = torch.zeros(3 * step, 4, device=DEVICE)
    shares[0], shares[step], shares[2 * step] = 2.0**25, -(2.0**25), 1.0
    assert fold(shares, classes=1, depth=3).tolist() == [1.0] * 4
    shares[step], shares[2 * step] = 1.0, -(2.0**25)
    assert fold(shares, classes=1, depth=3).tolist() == [0.0] * 4


@pytest.mark.parametrize("depth", [32, 7])
def test_labels_that_do_not_count(depth: int) -> None:
    classes = 10
    case = make(40, depth, classes, torch.float16, device=DEVICE, activation="relu")
    target = case.target.clone()
    bad = [classes, -1, 2**40, -(2**62)]
    target[3:7] = torch.tensor(bad)
    target[7:9] = 4
    case = replace(case, target=target, ignore_index=4)
    out = case.run()
    check(case, out)
    ignored = target == 4
    assert bool((out.loss[ignored] == 0).all())
    assert bool(out.loss[3:7].isnan().all())
    assert not bool(out.loss[~ignored][:3].isnan().any())
    silent = ignored | ((target < 0) | (target >= classes))
    assert not bool(out.dlogits[silent].any()) and not bool(out.dh[silent].any())
    assert bool(out.dlogits[~silent].any(1).all())


@pytest.mark.parametrize("depth", [32, 7])
def test_a_row_that_does_not_count_may_hold_anything(depth: int) -> None:
    case = make(40, depth, 10, device=DEVICE)
    target = case.target.clone()
    target[5] = -100
    clean = replace(case, target=target)
    h = case.h.clone()
    h[5] = float("nan")
    dirty = replace(clean, h=h)
    expected, got = clean.run(), dirty.run()
    for name in ("loss", "dlogits", "dh", "dweight", "dbias"):
        assert_same_bits(name, getattr(got, name), getattr(expected, name))
    for a, b in zip(dirty.wgrad(got.dlogits), clean.wgrad(expected.dlogits), strict=True):
        assert_same_bits("wgrad", a, b)


@pytest.mark.parametrize("depth", [32, 7])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_nan_stays_in_its_row(depth: int, activation: str) -> None:
    case = make(40, depth, 10, device=DEVICE, activation=activation)
    h = case.h.clone()
    h[5, 3] = float("nan")
    expected, got = case.run(), replace(case, h=h).run()
    others = torch.arange(40) != 5
    for name in ("loss", "dlogits", "dh"):
        assert_same_bits(name, getattr(got, name)[others], getattr(expected, name)[others])
    assert bool(got.loss[5].isnan()) and bool(got.dlogits[5].isnan().all())


@pytest.mark.parametrize("depth", [32, 7])
def test_no_rows(depth: int) -> None:
    case = make(0, depth, 10, device=DEVICE)
    out = case.run()
    assert out.loss.shape == (0,) and out.dh.shape == (0, depth)
    for gradient in (out.dweight, out.dbias, *case.wgrad(out.dlogits)):
        assert gradient is not None and not bool(gradient.any()) and not bool(gradient.isnan().any())


@pytest.mark.parametrize("depth", [32, 7])
def test_fp16_gradients_below_its_smallest_number(depth: int) -> None:
    """Confident rows and a row_scale of 1/N: both operands would be zero in fp16 were they not lifted."""
    case = make(40, depth, 10, torch.float16, torch.float32, device=DEVICE)
    # The true class is left out of both gradients: its dlogits, p - 1, has few bits in fp32 already.
    bias, weight = torch.zeros(10, device=DEVICE), case.weight.clone()
    bias[0], weight[0] = 17.0, 0.0
    case = replace(
        case,
        weight=weight,
        bias=bias,
        target=torch.zeros_like(case.target),
        scale=torch.tensor(2.0**20, device=DEVICE),
        row_scale=torch.full((40,), 1 / 65536, device=DEVICE),
    )
    out = case.run()
    exact = case.exact()
    assert out.dweight is not None and exact.dweight is not None
    for name, got, wanted in (("dh", out.dh, exact.dh), ("dweight", out.dweight[1:], exact.dweight[1:])):
        error = float((got.double() - wanted).abs().max() / wanted.abs().max())
        assert error < 0.005, f"{name}: {error:.1%} of the largest value; lifting keeps it near 0.1 %"


@pytest.mark.parametrize("exponent", [-16, 13])
@pytest.mark.parametrize("depth", [48, 50])
def test_the_scale_goes_in_before_rounding(depth: int, exponent: int) -> None:
    """Without its scale dh is subnormal in fp16, or beyond it once the dlogits operand is lifted."""
    case = make(33, depth, 10, torch.float16, device=DEVICE)
    factor = 2.0**exponent
    case = replace(
        case,
        h=case.h / max(factor, 1),
        weight=case.weight * factor,
        scale=torch.tensor(1 / factor, device=DEVICE),
    )
    check(case, case.run())


@pytest.mark.parametrize("shape", [(70, 64, 10), (70, 65, 10), (70, 64, 100)], ids=str)
def test_same_bits_every_time(shape: tuple[int, int, int]) -> None:
    case = make(*shape, device=DEVICE)
    for a, b in zip(case.run(), case.run(), strict=True):
        assert a is not None and b is not None
        assert_same_bits("run to run", a, b)


def test_shapes_beyond_the_kernels_are_refused() -> None:
    case: Case = make(4, 16, kernels.MAX_CLASSES + 1, device=DEVICE)
    assert "1024 classes" in kernels.why_not(case.h, case.weight)
    assert kernels.why_not(case.h, case.weight[:-1]) == ""
    assert "depth" in kernels.why_not(case.h, case.h.new_empty(1, kernels.MAX_DEPTH + 1))
    assert "float64" in kernels.why_not(case.h.double(), case.weight)
    out = (case.h.new_empty(0),) * 3
    with pytest.raises(ValueError, match="1024 classes; weight has 1025; choose another backend"):
        kernels.critic_head(
            case.h, case.weight, None, case.target, case.scale, None, "none", -100, *out, None, None
        )
