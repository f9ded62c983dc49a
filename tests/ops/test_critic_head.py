"""critic_head on every backend of this machine, against its definition in float64."""

from dataclasses import replace

import pytest
import torch

from lct_fast import _native, ops
from tests.ladder import Place, assert_same_bits
from tests.ops.critic_head_case import DTYPES, SHAPES, Case, check, check_wgrad, make

INT64 = torch.iinfo(torch.int64)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_rule(place: Place, shape: tuple[int, int, int], dtypes: str) -> None:
    dtype, weight_dtype = DTYPES[dtypes]
    # Between them the shapes and dtypes meet both activations, with and without bias and row_scale.
    turn = list(SHAPES).index(shape) + list(DTYPES).index(dtypes)
    case = make(
        *shape,
        dtype,
        weight_dtype,
        place.device,
        bias=turn % 3 != 0,
        activation=("none", "relu")[turn % 2],
        with_row_scale=turn % 4 != 1,
    )
    check(case, case.run())


LATER = [
    *((shape, dtypes) for shape in [(1, 1, 1), (33, 3, 10), (1027, 5, 3)] for dtypes in DTYPES),
    *(((67, 513, 10), dtypes) for dtypes in ("f32", "bf16", "f16-f32")),
]


# One dtype for 1000 classes: the interpreter takes seconds for it.
@pytest.mark.parametrize(("shape", "dtypes"), [*LATER, ((9, 13, 1000), "bf16-f32")], ids=str)
def test_wgrad_later_is_wgrad_in_the_pass(place: Place, shape: tuple[int, int, int], dtypes: str) -> None:
    case = make(*shape, *DTYPES[dtypes], place.device, activation="relu")
    out = case.run()
    for dtype in (None, case.weight.dtype):
        dweight, dbias = case.wgrad(out.dlogits, dtype)
        assert dweight.dtype == dbias.dtype == (dtype or torch.float32)
        check_wgrad(case, dweight, dbias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(place: Place, dtype: torch.dtype) -> None:
    case = make(0, 3, 2, dtype, device=place.device)
    out = case.run()
    assert [x.shape for x in out if x is not None] == [(0,), (0, 2), (0, 3), (2, 3), (2,)]
    assert out.dweight is not None and out.dbias is not None
    assert not out.dweight.any() and not out.dbias.any()
    dweight, dbias = case.wgrad(out.dlogits)
    assert dweight.shape == (2, 3) and dbias.shape == (2,)
    assert not dweight.any() and not dbias.any()


@pytest.mark.parametrize("dtypes", ["f32", "f16", "bf16-f32"])
def test_bad_labels_give_nan_loss_and_no_gradient(place: Place, dtypes: str) -> None:
    case = make(70, 5, 10, *DTYPES[dtypes], place.device)
    good = case.run()
    bad = torch.tensor([-1, 10, 11, -99, -101, 2**31, -(2**31), 2**32, INT64.max, INT64.min])
    rows = torch.arange(len(bad)) * 7
    target = case.target.clone()
    target[rows] = bad.to(place.device)
    case = replace(case, target=target)
    out = case.run()
    check(case, out)
    assert bool(out.loss[rows].isnan().all())
    assert not out.dlogits[rows].any() and not out.dh[rows].any()
    others = torch.ones(70, dtype=torch.bool)
    others[rows] = False
    assert_same_bits("loss of the other rows", out.loss[others], good.loss[others])
    assert_same_bits("dh of the other rows", out.dh[others], good.dh[others])


@pytest.mark.parametrize("ignore_index", [-100, 255, 0, 9, -1])
def test_ignored_rows_have_no_loss_and_no_gradient(place: Place, ignore_index: int) -> None:
    case = make(40, 6, 10, device=place.device, activation="relu")
    target = case.target.clone()
    target[::3] = ignore_index
    case = replace(case, target=target, ignore_index=ignore_index)
    out = case.run()
    ignored = target == ignore_index
    check(case, out)
    assert not out.loss[ignored].any() and bool((out.loss[~ignored] > 0).all())
    assert not out.dlogits[ignored].any() and not out.dh[ignored].any()
    assert bool(out.dlogits[~ignored].any(dim=1).all())


def test_all_rows_ignored(place: Place) -> None:
    case = make(40, 6, 10, device=place.device)
    case = replace(case, target=torch.full_like(case.target, -100))
    for x in case.run():
        assert x is not None and not x.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_stays_alone(place: Place, dtype: torch.dtype, value: float) -> None:
    case = make(70, 33, 10, dtype, device=place.device)
    good = case.run()
    h = case.h.clone()
    h[37, 20] = value
    out = replace(case, h=h).run()
    others = torch.arange(70) != 37
    for name in ("loss", "dlogits", "dh"):
        assert_same_bits(name, getattr(out, name)[others], getattr(good, name)[others])
    assert not bool(out.loss[37].isfinite())
    assert bool(out.dlogits[37].isnan().any()) and bool(out.dh[37].isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand(place: Place, dtype: torch.dtype) -> None:
    """exp of them overflows unless the row's largest is taken off first."""
    case = make(20, 8, 10, dtype, device=place.device)
    push = torch.zeros(10, dtype=torch.float64)
    push[3], push[4], push[7] = 1e4, -1e4, 1e4
    case = replace(case, bias=push.to(place.device, dtype), h=case.h * 4)
    out = case.run()
    check(case, out)
    assert float(out.loss.max()) > 9e3


def test_a_class_masked_by_minus_infinity(place: Place) -> None:
    case = make(20, 8, 10, device=place.device)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[4] = float("-inf")
    case = replace(case, bias=bias, target=torch.where(case.target == 4, 5, case.target))
    out = case.run()
    check(case, out)
    assert not out.dlogits[:, 4].any()


@pytest.mark.parametrize("shape", [(64, 32, 10), (40, 130, 100)], ids=str)
def test_a_tiny_scale_is_not_lost_in_fp16(place: Place, shape: tuple[int, int, int]) -> None:
    """dlogits * 1e-6 would vanish in fp16; dh, with weights of order 1e3, is an ordinary number."""
    case = make(*shape, torch.float16, device=place.device)
    case = replace(
        case,
        h=case.h / 1e3,
        weight=case.weight * 1e3,
        scale=torch.tensor(1e-6, device=place.device),
    )
    out = case.run()
    check(case, out)
    assert float(out.dh.abs().max()) > 1e-5


@pytest.mark.parametrize("dtypes", ["f16", "f16-f32"])
def test_a_tiny_row_scale_is_not_lost_in_fp16(place: Place, dtypes: str) -> None:
    case = make(64, 32, 10, *DTYPES[dtypes], place.device)
    assert case.row_scale is not None
    case = replace(
        case,
        h=case.h * 1e3,
        weight=case.weight / 1e3,
        row_scale=case.row_scale * 64e-7,
    )
    out = case.run()
    check(case, out)
    assert out.dweight is not None and float(out.dweight.abs().max()) > 1e-4
    check_wgrad(case, *case.wgrad(out.dlogits))


def test_a_row_of_row_scale_zero_gives_nothing(place: Place) -> None:
    case = make(50, 7, 10, device=place.device)
    assert case.row_scale is not None and 0 < int((case.row_scale == 0).sum()) < 50
    out = case.run()
    noise = torch.where(case.row_scale == 0, 3.0, 0.0)[:, None]
    other = replace(case, h=case.h + noise).run()
    assert_same_bits("dweight", out.dweight, other.dweight)  # type: ignore[arg-type]
    assert_same_bits("dbias", out.dbias, other.dbias)  # type: ignore[arg-type]


def test_row_scale_holds_the_whole_factor(place: Place) -> None:
    """scale enters dh alone."""
    case = make(50, 7, 10, device=place.device)
    out, other = case.run(), replace(case, scale=case.scale * 2).run()
    assert_same_bits("dweight", out.dweight, other.dweight)  # type: ignore[arg-type]
    assert_same_bits("dlogits", out.dlogits, other.dlogits)
    assert_same_bits("dh", out.dh * 2, other.dh)


def test_strided_inputs_give_what_dense_ones_give(place: Place) -> None:
    case = make(21, 6, 10, device=place.device)
    assert case.bias is not None and case.row_scale is not None
    strided = replace(
        case,
        h=case.h.T.contiguous().T,
        weight=case.weight.repeat_interleave(2, 0)[::2],
        bias=case.bias.repeat_interleave(2)[::2],
        target=case.target.repeat_interleave(2)[::2],
        row_scale=case.row_scale.repeat_interleave(2)[::2],
    )
    out, other = case.run(), strided.run()
    for name, a, b in zip(ops.CriticHead._fields, out, other, strict=True):
        assert_same_bits(name, a, b)
    dlogits = out.dlogits.T.contiguous().T
    for a, b in zip(case.wgrad(out.dlogits), strided.wgrad(dlogits), strict=True):
        assert_same_bits("wgrad", a, b)


def test_inputs_that_start_in_the_middle_of_a_vector(place: Place) -> None:
    """A view may start at any element: no kernel may count on alignment."""
    case = make(21, 6, 10, torch.bfloat16, device=place.device)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        buffer = x.new_zeros(x.numel() + 1)
        buffer[1:] = x.flatten()
        return buffer[1:].view(x.shape)

    other = replace(case, h=shifted(case.h), weight=shifted(case.weight))
    check(other, other.run())


@pytest.mark.parametrize("dtypes", ["f32", "f16-f32"])
@pytest.mark.parametrize("shape", [(1027, 33, 10), (140, 16, 100)], ids=str)
def test_same_bits_on_every_run(place: Place, shape: tuple[int, int, int], dtypes: str) -> None:
    case = make(*shape, *DTYPES[dtypes], place.device)
    first = case.run()
    for name, a, b in zip(ops.CriticHead._fields, first, case.run(), strict=True):
        assert_same_bits(name, a, b)
    once = case.wgrad(first.dlogits)
    for a, b in zip(once, case.wgrad(first.dlogits), strict=True):
        assert_same_bits("wgrad", a, b)


@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
@pytest.mark.parametrize("shape", [(5003, 17, 10), (1027, 64, 100), (3, 700, 10)], ids=str)
def test_cpu_gives_the_same_bits_for_any_thread_count(shape: tuple[int, int, int], dtypes: str) -> None:
    case = make(*shape, *DTYPES[dtypes])
    with ops.use_backend("cpu"):
        first = case.run()
        once = case.wgrad(first.dlogits)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for name, a, b in zip(ops.CriticHead._fields, first, case.run(), strict=True):
                assert_same_bits(f"{name} on {count} threads", a, b)
            for a, b in zip(once, case.wgrad(first.dlogits), strict=True):
                assert_same_bits(f"wgrad on {count} threads", a, b)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_of_this_cpu(shape: tuple[int, int, int], dtypes: str) -> None:
    native = _native.load()
    assert native is not None, _native.why_absent()
    case = make(*shape, *DTYPES[dtypes], activation="relu")
    levels = native.simd_levels()
    assert "scalar" in levels
    try:
        for level in levels:
            native.set_simd(level)
            with ops.use_backend("cpu"):
                out = case.run()
                check(case, out)
                check_wgrad(case, *case.wgrad(out.dlogits))
    finally:
        native.set_simd(None)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_differentiable(place: Place, dtype: torch.dtype, activation: str) -> None:
    """Autograd through loss, with any factor a row, gives the gradients that the op computes itself."""
    case = make(21, 6, 10, dtype, device=place.device, activation=activation)
    assert case.bias is not None and case.row_scale is not None
    leaves = [x.clone().requires_grad_() for x in (case.h, case.weight, case.bias)]
    live = replace(case, h=leaves[0], weight=leaves[1], bias=leaves[2])
    out = live.run()
    assert [x is not None and x.requires_grad for x in out] == [True, False, False, False, False]
    (out.loss * case.row_scale).sum().backward()
    dh, dweight, dbias = (x.grad for x in leaves)
    assert dh is not None and dweight is not None and dbias is not None
    check_wgrad(case, dweight, dbias)
    unscaled: Case = replace(case, scale=torch.ones_like(case.scale))
    exact = unscaled.exact().dh * case.row_scale.double()[:, None]
    assert float((dh.double() - exact).abs().max()) <= 2 * torch.finfo(dtype).eps * float(exact.abs().max())
