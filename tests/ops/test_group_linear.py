"""group_linear on every backend of this machine, against its definition in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from lct_fast import _native, ops
from tests.ladder import Place, assert_same_bits
from tests.ops.group_linear_case import ACTIVATIONS, DTYPES, GRADIENTS, SHAPES, Case, check, make
from tests.ops.places import place_of

place = place_of("group_linear")
Shape = tuple[int, int, int, int]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_rule(place: Place, shape: Shape, dtypes: str) -> None:
    # Between them the shapes and dtypes meet every activation, every set of gradients, with and without bias.
    turn = list(SHAPES).index(shape) + list(DTYPES).index(dtypes)
    case = make(
        *shape,
        DTYPES[dtypes],
        ACTIVATIONS[turn % 3],
        GRADIENTS[turn // 3 % 3],
        place.device,
        bias=turn % 4 != 0,
    )
    check(case, case.run(), place)


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_kind_of_step(place: Place, activation: str, gradients: str) -> None:
    case = make(35, 18, 33, 10, DTYPES["f32"], activation, gradients, place.device)
    check(case, case.run())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_logits_are_of_h_as_rounded(place: Place, activation: str) -> None:
    """On both sides of 64 classes they mean the same: what the next group sees is what the critic judges."""
    case = make(40, 18, 33, 64, DTYPES["bf16"], activation, device=place.device)
    assert case.critic_weight is not None and case.critic_bias is not None
    unfused = case.run()
    fused = replace(
        case,
        critic_weight=case.critic_weight[:63],
        critic_bias=case.critic_bias[:63],
        dlogits=case.dlogits[:, :63],  # type: ignore[index]
    ).run()
    assert_same_bits("h", fused["h"], unfused["h"])
    exact = linear(*(t.double() for t in (unfused["h"], case.critic_weight, case.critic_bias)))
    eps = torch.finfo(torch.bfloat16).eps
    for logits in (fused["logits"], unfused["logits"][:, :63]):
        # Half a unit in the last place of each logit, but the interpreter rounds bf16 towards zero.
        allowed = eps * exact[:, :63].abs() + 1e-5
        assert bool(((logits.double() - exact[:, :63]).abs() <= allowed).all())


def test_no_rows(place: Place) -> None:
    for classes in (3, 64):
        case = make(4, 5, 7, classes, device=place.device)
        assert case.dh is not None and case.dlogits is not None
        case = replace(case, x=case.x[:0], dh=case.dh[:0], dlogits=case.dlogits[:0])
        out = case.run()
        assert out["h"].shape == (0, 7) and out["logits"].shape == (0, classes) and out["dx"].shape == (0, 5)
        for name in ("dweight", "dbias", "dcritic_weight", "dcritic_bias"):
            assert out[name].shape == getattr(case, name[1:]).shape and not out[name].any(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_alone(place: Place, value: float, activation: str) -> None:
    case = make(70, 33, 18, 10, DTYPES["f32"], activation, device=place.device)
    good = case.run()
    x = case.x.clone()
    x[37, 20] = value
    case = replace(case, x=x)
    out, exact = case.run(), case.exact()
    others = torch.arange(70) != 37
    for name in ("h", "logits", "dx"):
        assert_same_bits(name, out[name][others], good[name][others])
    torch.testing.assert_close(
        out["h"][37].cpu().double(), exact["h"][37], equal_nan=True, rtol=1e-5, atol=1e-5
    )
    assert not bool(out["logits"][37].isfinite().any())


def test_nan_passes_relus_gradient_on(place: Place) -> None:
    """As in torch: only what is <= 0 stops it."""
    case = make(6, 5, 20, 10, device=place.device, gradients="h")
    x = case.x.clone()
    x[3] = float("nan")
    assert case.dh is not None
    out = replace(case, x=x).run()
    assert bool(out["h"][3].isnan().all())
    torch.testing.assert_close(out["dx"][3].cpu(), (case.dh[3] @ case.weight).cpu(), rtol=1e-5, atol=1e-5)


def test_pre_of_zero_has_no_gradient(place: Place) -> None:
    """As torch's relu has it."""
    case = make(6, 5, 20, 10, device=place.device)
    case = replace(case, x=torch.zeros_like(case.x), bias=torch.zeros(20, device=place.device))
    out = case.run()
    for name in ("h", "dx", "dweight", "dbias"):
        assert not out[name].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gelu_over_its_whole_range(place: Place, dtype: torch.dtype) -> None:
    """Value and derivative from -20 to 20, past where either is 0 or 1, and at infinity."""
    points = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([0.0, 1e4, -1e4])])
    x = points.to(place.device, dtype)[:, None].requires_grad_()
    one = torch.ones(1, 1, dtype=dtype, device=place.device)
    out = ops.group_linear(x, one, None, "gelu")
    (dx,) = torch.autograd.grad(out.h.sum(), x)
    wide = x.detach().cpu().double().requires_grad_()
    exact = torch.nn.functional.gelu(wide)
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    eps = torch.finfo(dtype).eps
    # Relative to x where gelu is x, and absolute near 0 and in the tail.
    assert bool(
        ((out.h.detach().cpu().double() - exact).abs() <= 3 * eps * wide.abs().clamp(max=1e5) + eps).all()
    )
    assert float((dx.cpu().double() - slope).abs().max()) <= 4 * eps


def test_a_frozen_group_under_a_live_critic(place: Place) -> None:
    """Only the critic learns: its gradients alone, and h is not differentiable."""
    case = make(20, 6, 9, 4, device=place.device, gradients="logits")
    assert case.critic_weight is not None and case.critic_bias is not None and case.dlogits is not None
    leaves = [case.critic_weight.clone().requires_grad_(), case.critic_bias.clone().requires_grad_()]
    out = ops.group_linear(case.x, case.weight, case.bias, "gelu", *leaves)
    assert out.logits is not None
    got = torch.autograd.grad(out.logits, leaves, case.dlogits)
    expected = replace(case, activation="gelu").run()
    for name, value in zip(("dcritic_weight", "dcritic_bias"), got, strict=True):
        assert_same_bits(name, value, expected[name])


def test_a_frozen_layer_passes_the_gradient_on(place: Place) -> None:
    case = make(20, 6, 9, 4, device=place.device)
    x = case.x.clone().requires_grad_()
    out = ops.group_linear(x, case.weight, case.bias, "relu", case.critic_weight, case.critic_bias)
    (dx,) = torch.autograd.grad([out.h, out.logits], x, [case.dh, case.dlogits])  # type: ignore[list-item]
    assert_same_bits("dx", dx, case.run()["dx"])


def test_gradients_that_are_expanded(place: Place) -> None:
    """sum() hands out one number with stride 0."""
    case = make(20, 6, 9, 4, device=place.device)
    case = replace(
        case, dh=torch.ones(20, 9, device=place.device), dlogits=torch.ones(20, 4, device=place.device)
    )
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weight)]
    out = ops.group_linear(*leaves, case.bias, "relu", case.critic_weight, case.critic_bias)
    assert out.logits is not None
    for name, got in zip(
        ("dx", "dweight"), torch.autograd.grad(out.h.sum() + out.logits.sum(), leaves), strict=True
    ):
        assert_same_bits(name, got, case.run()[name])


def test_strided_inputs_give_what_dense_ones_give(place: Place) -> None:
    case = make(21, 6, 19, 10, device=place.device)

    def strided(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)[..., ::2]

    names = ("x", "weight", "bias", "critic_weight", "critic_bias", "dh", "dlogits")
    other = replace(case, **{name: strided(getattr(case, name)) for name in names})
    leaves = [getattr(other, name).requires_grad_() for name in names[:5]]
    assert not leaves[0].is_contiguous()
    out = ops.group_linear(*leaves[:3], "relu", *leaves[3:])
    got = torch.autograd.grad([out.h, out.logits], leaves, [other.dh, other.dlogits])  # type: ignore[list-item]
    expected = case.run()
    assert_same_bits("h", out.h, expected["h"])
    assert_same_bits("logits", out.logits, expected["logits"])  # type: ignore[arg-type]
    for name, value in zip(names[:5], got, strict=True):
        assert_same_bits(name, value, expected[f"d{name}"])


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_inputs_that_start_in_the_middle_of_a_vector(place: Place, dtypes: str) -> None:
    """A view may start at any element: no kernel may count on alignment."""
    case = make(21, 16, 32, 16, DTYPES[dtypes], device=place.device)

    def shifted(x: Tensor) -> Tensor:
        buffer = x.new_zeros(x.numel() + 1)
        buffer[1:] = x.flatten()
        return buffer[1:].view(x.shape)

    shift = {name: shifted(getattr(case, name)) for name in ("x", "weight", "critic_weight", "dh", "dlogits")}
    other = replace(case, **shift)
    assert other.x.data_ptr() % 16 != 0
    check(case, other.run(), place)


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_long_sums_keep_their_digits(place: Place, dtypes: str) -> None:
    """Thousands of inputs behind pre, thousands of rows behind dbias."""
    for shape in ((3, 5000, 17, 2), (5000, 3, 17, 2)):
        case = make(*shape, DTYPES[dtypes], "gelu", device=place.device)
        check(case, case.run(), place)


@pytest.mark.parametrize("dtypes", ["f32", "f16-f32-f16"])
def test_same_bits_on_every_run(place: Place, dtypes: str) -> None:
    case = make(300, 33, 270, 10, DTYPES[dtypes], "gelu", device=place.device)
    first, again = case.run(), case.run()
    for name, value in first.items():
        assert_same_bits(name, value, again[name])


def kernel_outputs(case: Case) -> tuple[Tensor, ...]:
    """What the kernels write; the matrix products behind them are torch's."""
    arguments = (case.x, case.weight, case.bias, case.activation, case.critic_weight, case.critic_bias)
    h, logits, slope = torch.ops.lct.group_linear(*arguments, case.activation == "gelu")
    gate = slope if case.activation == "gelu" else h
    back = (case.dh, case.dlogits, case.critic_weight, gate, case.activation)
    return h, logits, slope, *torch.ops.lct.group_linear_backward(*back)


@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
@pytest.mark.parametrize("shape", [(1003, 17, 33, 10), (40, 300, 1100, 20), (3, 700, 530, 10)], ids=str)
def test_cpu_gives_the_same_bits_for_any_thread_count(shape: Shape, dtypes: str) -> None:
    """Whether threads share rows out, or outputs too, where shares of the logits are folded later."""
    case = make(*shape, DTYPES[dtypes], "gelu")
    with ops.use_backend("cpu"):
        first = kernel_outputs(case)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for index, (a, b) in enumerate(zip(first, kernel_outputs(case), strict=True)):
                assert_same_bits(f"output {index} on {count} threads", a, b)


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_cpu_chunks_of_several_blocks_add_up(gradients: str) -> None:
    """From 24577 rows on a chunk of dbias has more than one block of 96 rows."""
    case = make(24700, 2, 17, 2, DTYPES["f32"], "gelu", gradients)
    with ops.use_backend("cpu"):
        check(case, case.run())


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_of_this_cpu(shape: Shape, dtypes: str) -> None:
    native = _native.load()
    assert native is not None, _native.why_absent()
    levels = native.simd_levels()
    assert "scalar" in levels
    turn = list(SHAPES).index(shape) + list(DTYPES).index(dtypes)
    case = make(*shape, DTYPES[dtypes], ACTIVATIONS[turn // 2 % 3], GRADIENTS[turn % 3])
    try:
        for level in levels:
            native.set_simd(level)
            with ops.use_backend("cpu"):
                check(case, case.run())
    finally:
        native.set_simd(None)


def test_no_gradient_of_h_is_made_for_the_critic() -> None:
    """What the backward of logits allocates is dpre, dx, the weights' gradients and small change."""
    case = make(2000, 8, 256, 10, gradients="logits")
    assert case.critic_weight is not None and case.dlogits is not None
    x = case.x.clone().requires_grad_()
    out = ops.group_linear(x, case.weight, case.bias, "relu", case.critic_weight, case.critic_bias)
    assert out.logits is not None
    with ops.use_backend("cpu"), torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        torch.autograd.grad(out.logits, x, case.dlogits)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    allocated = sum(event.nbytes() for event in events if event.nbytes() > 0)
    h_bytes = 2000 * 256 * 4
    assert h_bytes <= allocated < 1.5 * h_bytes


def test_fp16_gradients_follow_a_loss_scale(place: Place) -> None:
    """With the loss scaled as a GradScaler does, gradients of 1/N survive fp16 and scale back exactly."""
    case = make(64, 20, 17, 10, DTYPES["f16-f32-f16"], "relu", "logits", place.device)
    assert case.dlogits is not None
    scaled = replace(case, dlogits=case.dlogits * 2.0**-6)
    out, other = case.run(), scaled.run()
    for name in ("dx", "dweight"):
        exact = case.exact()[name]
        bound = 8 * torch.finfo(torch.float16).eps * float(exact.abs().max())
        assert float((other[name].cpu().double() * 64 - exact).abs().max()) <= bound, name
        assert math.isfinite(float(out[name].abs().max()))


def test_rule_sees_a_wrong_bias(place: Place) -> None:
    """The checks above can fail: one bias off by one part in a thousand does."""
    case = make(33, 20, 17, 10, device=place.device)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[3] *= 1.001
    with pytest.raises(AssertionError, match="h: error"):
        check(case, replace(case, bias=bias).run())
