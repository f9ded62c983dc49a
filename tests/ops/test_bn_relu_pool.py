"""bn_relu_pool on every backend of this machine, against its definition in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, batch_norm, relu

from lct_fast import _native, ops
from tests.ladder import Place, assert_same_bits
from tests.ops.bn_relu_pool_case import DTYPES, FORMATS, GRADIENTS, SHAPES, Case, check, make
from tests.ops.places import place_of

place = place_of("bn_relu_pool")
Shape = tuple[int, int, int, int, int]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_rule(place: Place, shape: Shape, layout: str, dtype: str) -> None:
    # Between them the shapes, formats and dtypes meet training and evaluation, with and without dy.
    turn = list(SHAPES).index(shape) + list(DTYPES).index(dtype)
    for training, with_dy in ((True, turn % 2 == 0), (turn % 2 == 1, turn % 2 == 1)):
        case = make(*shape, DTYPES[dtype], layout, place.device, training=training, with_dy=with_dy)
        check(case, case.run())


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_dy", [True, False])
def test_every_kind_of_step(place: Place, layout: str, training: bool, with_dy: bool) -> None:
    case = make(3, 18, 6, 10, 2, torch.float32, layout, place.device, training=training, with_dy=with_dy)
    check(case, case.run())


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_parameters_of_another_dtype(place: Place, dtype: str) -> None:
    case = make(3, 5, 4, 4, 2, DTYPES[dtype], device=place.device, parameters=torch.bfloat16)
    check(case, case.run())


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_statistics_of_a_mean_far_from_zero(place: Place, ratio: float, layout: str) -> None:
    """E[x^2] - E[x]^2 in fp32 would have no digit left: the squares are ratio^2 times the variance."""
    case = make(6, 5, 24, 24, 2, layout=layout, device=place.device)
    far = case.x.double() - case.x.double().mean((0, 2, 3), keepdim=True)
    far = far / far.square().mean((0, 2, 3), keepdim=True).sqrt() + ratio
    case = replace(case, x=far.float())
    out, exact = case.run(), case.exact()
    eps = torch.finfo(torch.float32).eps
    # Rounding x to fp32 is in the exact result too; what is left is a few roundings of x - mean.
    torch.testing.assert_close(out["mean"].cpu().double(), exact["mean"], rtol=2 * eps, atol=0)
    torch.testing.assert_close(out["var"].cpu().double(), exact["var"], rtol=1e-5, atol=0)
    size = float(case.gamma.abs().max())
    assert float((out["y"].cpu().double() - exact["y"]).abs().max()) <= 4 * eps * ratio * size


def test_long_sums_keep_their_digits(place: Place) -> None:
    """Thousands of terms behind each sum, in both formats, folded in chunks."""
    for layout in FORMATS:
        case = make(5, 2, 64, 96, 1, layout=layout, device=place.device, with_dy=True)
        check(case, case.run())
        case = replace(case, dy=None)
        check(case, case.run())


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_no_rows(place: Place, dtype: str) -> None:
    case = make(3, 5, 4, 6, 2, DTYPES[dtype], device=place.device, with_dy=True)
    assert case.dy is not None
    case = replace(case, x=case.x[:0], dpooled=case.dpooled[:0], dy=case.dy[:0])
    for training in (True, False):
        out = replace(case, training=training).run()
        assert out["y"].shape == (0, 5, 4, 6) and out["pooled"].shape == (0, 5, 2, 2)
        assert out["dx"].shape == (0, 5, 4, 6)
        assert not out["dgamma"].any() and not out["dbeta"].any()
        assert_same_bits("running_mean", out["running_mean"], case.running_mean)
        assert_same_bits("running_var", out["running_var"], case.running_var)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_spoils_its_channel_alone(place: Place, value: float, layout: str) -> None:
    case = make(3, 18, 4, 4, 2, layout=layout, device=place.device, with_dy=True)
    good = case.run()
    x = case.x.clone()
    x[1, 7, 2, 3] = value
    out = replace(case, x=x).run()
    others = torch.arange(18) != 7
    for name in ("y", "pooled", "dx"):
        assert bool(out[name][:, 7].isnan().all()), name
        assert_same_bits(name, out[name][:, others], good[name][:, others])
    for name in ("dgamma", "var", "running_var"):
        assert bool(out[name][7].isnan()), name
        assert_same_bits(name, out[name][others], good[name][others])
    assert not bool(out["mean"][7].isfinite())


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_in_evaluation_it_stays_alone(place: Place, value: float, layout: str) -> None:
    case = make(3, 18, 4, 4, 2, layout=layout, device=place.device, training=False, with_dy=True)
    case = replace(case, gamma=case.gamma.abs())
    good = case.run()
    x = case.x.clone()
    x[1, 7, 2, 3] = value
    case = replace(case, x=x)
    out, exact = case.run(), case.exact()
    for name in ("y", "pooled", "dx"):
        torch.testing.assert_close(
            out[name].cpu().double(), exact[name], rtol=1e-5, atol=1e-5, equal_nan=True, msg=name
        )
    alone = torch.ones_like(x, dtype=torch.bool)
    alone[1, 7, 2, 3] = False
    assert_same_bits("y", out["y"][alone], good["y"][alone])
    assert_same_bits("dx", out["dx"][alone], good["dx"][alone])


def test_gamma_of_zero(place: Place) -> None:
    """z is beta everywhere: one sign a channel, and dgamma still sums xhat."""
    case = make(4, 6, 4, 4, 2, device=place.device)
    case = replace(case, gamma=torch.zeros_like(case.gamma))
    out = case.run()
    check(case, out)
    assert not out["dx"].any() and bool(out["dgamma"].any())


def test_z_of_zero_has_no_gradient(place: Place) -> None:
    """As torch's relu has it."""
    case = make(4, 6, 4, 4, 2, device=place.device, with_dy=True)
    case = replace(case, gamma=torch.zeros_like(case.gamma), beta=torch.zeros_like(case.beta))
    out = case.run()
    for name in ("y", "pooled", *GRADIENTS):
        assert not out[name].any(), name


def test_a_constant_channel_has_variance_zero(place: Place) -> None:
    case = make(4, 6, 5, 5, 1, device=place.device)
    x = case.x.clone()
    x[:, 2] = 0.125
    out = replace(case, x=x).run()
    assert float(out["var"][2]) == 0.0
    torch.testing.assert_close(
        out["y"][:, 2].cpu(), case.beta[2].relu().cpu().expand(4, 5, 5), rtol=0, atol=1e-5
    )


def test_y_alone_has_a_gradient(place: Place) -> None:
    case = make(3, 5, 4, 6, 2, device=place.device, with_dy=True)
    assert case.dy is not None
    x = case.x.clone().requires_grad_()
    out = ops.bn_relu_pool(x, case.gamma, case.beta, pool=2)
    (dx,) = torch.autograd.grad(out.y, x, case.dy)
    expected = replace(case, dpooled=torch.zeros_like(case.dpooled)).exact()["dx"]
    torch.testing.assert_close(dx.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_running_statistics_are_those_of_batch_norm_2d(place: Place) -> None:
    layer = torch.nn.BatchNorm2d(5, momentum=0.3)
    mean, var = (t.clone().to(place.device) for t in (layer.running_mean, layer.running_var) if t is not None)
    for seed in range(3):
        x = torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(seed)) * 3 + 1
        layer(x)
        ops.bn_relu_pool(
            x.to(place.device),
            *(torch.ones(5, device=place.device) for _ in range(2)),
            mean,
            var,
            momentum=0.3,
        )
    torch.testing.assert_close(mean.cpu(), layer.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.cpu(), layer.running_var, rtol=1e-5, atol=1e-6)


def test_without_running_statistics_the_batchs_are_used_in_evaluation(place: Place) -> None:
    case = make(4, 6, 4, 4, 2, device=place.device)
    out = ops.bn_relu_pool(case.x, case.gamma, case.beta, training=False, pool=2)
    assert_same_bits("y", out.y, case.run()["y"])


@pytest.mark.parametrize("layout", FORMATS)
def test_strided_inputs_give_what_dense_ones_give(place: Place, layout: str) -> None:
    case = make(4, 6, 4, 6, 2, layout=layout, device=place.device, with_dy=True)
    assert case.dy is not None

    def strided(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)[..., ::2]

    other = replace(case, dpooled=strided(case.dpooled), gamma=strided(case.gamma), beta=strided(case.beta))
    dense = make(4, 6, 4, 6, 2, device=place.device, with_dy=True)
    for name, value in case.run().items():
        assert_same_bits(name, other.run()[name], value)
    wide = replace(dense, x=strided(dense.x), dy=strided(dense.dy))  # type: ignore[arg-type]
    x = wide.x.requires_grad_()
    assert not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    out = ops.bn_relu_pool(x, wide.gamma, wide.beta, pool=2)
    (dx,) = torch.autograd.grad([out.pooled, out.y], x, [wide.dpooled, wide.dy])  # type: ignore[list-item]
    expected = dense.run()
    assert_same_bits("y", out.y, expected["y"])
    assert_same_bits("dx", dx, expected["dx"])


@pytest.mark.parametrize("layout", FORMATS)
def test_a_dy_in_the_other_format(place: Place, layout: str) -> None:
    case = make(4, 6, 4, 6, 2, layout=layout, device=place.device, with_dy=True)
    assert case.dy is not None
    turned = case.dy.contiguous(memory_format=FORMATS["first" if layout == "last" else "last"])
    for name, value in case.run().items():
        assert_same_bits(name, replace(case, dy=turned).run()[name], value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
def test_inputs_that_start_in_the_middle_of_a_vector(place: Place, layout: str, dtype: str) -> None:
    """A view may start at any element: no kernel may count on alignment."""
    case = make(3, 18, 4, 4, 2, DTYPES[dtype], layout, place.device, with_dy=True)

    def shifted(x: Tensor) -> Tensor:
        buffer = x.new_zeros(x.numel() + 1)
        return buffer[1:].as_strided(x.shape, x.stride(), 1).copy_(x)

    assert case.dy is not None
    other = replace(case, x=shifted(case.x), dy=shifted(case.dy), dpooled=shifted(case.dpooled))
    assert other.x.data_ptr() % 16 != 0
    leaf = other.x.requires_grad_()
    out = ops.bn_relu_pool(leaf, case.gamma, case.beta, pool=2)
    (dx,) = torch.autograd.grad([out.pooled, out.y], leaf, [other.dpooled, other.dy])  # type: ignore[list-item]
    expected = case.run()
    assert_same_bits("y", out.y, expected["y"])
    assert_same_bits("dx", dx, expected["dx"])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(70, 5, 8, 8, 1), (3, 40, 16, 16, 2)], ids=str)
def test_same_bits_on_every_run(place: Place, shape: Shape, layout: str) -> None:
    case = make(*shape, layout=layout, device=place.device, with_dy=True)
    first, second = case.run(), case.run()
    for name in first:
        assert_same_bits(name, first[name], second[name])


# Few channels and many, few samples and many: every way of sharing out the work.
@pytest.mark.parametrize(
    "shape", [(3, 2, 72, 70, 2), (70, 64, 8, 8, 2), (2, 200, 4, 4, 4), (1, 3, 8, 8, 1)], ids=str
)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_cpu_gives_the_same_bits_for_any_thread_count(shape: Shape, layout: str, dtype: str) -> None:
    cases = [make(*shape, DTYPES[dtype], layout, with_dy=with_dy) for with_dy in (True, False)]
    with ops.use_backend("cpu"):
        for case in cases:
            torch.set_num_threads(1)
            first = case.run()
            for count in (2, 3, 7, 64):
                torch.set_num_threads(count)
                for name, value in case.run().items():
                    assert_same_bits(f"{name} on {count} threads", value, first[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_of_this_cpu(shape: Shape, layout: str, dtype: str) -> None:
    native = _native.load()
    assert native is not None, _native.why_absent()
    levels = native.simd_levels()
    assert "scalar" in levels
    turn = list(SHAPES).index(shape) + list(DTYPES).index(dtype)
    case = make(*shape, DTYPES[dtype], layout, training=turn % 4 != 3, with_dy=turn % 2 == 0)
    try:
        for level in levels:
            native.set_simd(level)
            with ops.use_backend("cpu"):
                check(case, case.run())
    finally:
        native.set_simd(None)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("sizes", [(300, 16, 32, 32), (290, 17, 32, 34)], ids=str)
def test_cpu_writes_past_the_cache_where_tensors_are_large(sizes: tuple[int, ...], layout: str) -> None:
    """More than 32 MiB of x and y: another kind of store, and planes that don't fit a thread's scratch."""
    draw = torch.Generator().manual_seed(0)
    channels, window = sizes[1], (sizes[2] // 2, sizes[3] // 2)
    x = torch.randn(sizes, generator=draw).contiguous(memory_format=FORMATS[layout]).requires_grad_()
    gamma, beta = torch.randn(channels, generator=draw), torch.randn(channels, generator=draw)
    with ops.use_backend("cpu"):
        out = ops.bn_relu_pool(x, gamma, beta, pool=2)
        (dx,) = torch.autograd.grad(out.pooled.square().sum(), x)
    # In float64: torch's own fp32 sums over channels_last are off by more than the bound.
    wide = [t.detach().double().requires_grad_() for t in (x, gamma, beta)]
    y = relu(batch_norm(wide[0], None, None, wide[1], wide[2], True))
    (exact,) = torch.autograd.grad(avg_pool2d(y, window).square().sum(), wide[0])
    torch.testing.assert_close(out.y.double(), y, rtol=1e-5, atol=1e-5)
    # An element whose z rounds to the other side of 0 has another gradient: there may be a few.
    wrong = ~torch.isclose(dx.double(), exact, rtol=1e-3, atol=1e-6)
    assert int(wrong.sum()) <= 10


def test_no_gradient_of_the_map_is_made_for_the_critic() -> None:
    """What the backward of pooled allocates is dx and small change."""
    case: Case = make(8, 64, 32, 32, 2)
    x = case.x.clone().requires_grad_()
    out = ops.bn_relu_pool(x, case.gamma, case.beta, pool=2)
    with ops.use_backend("cpu"), torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        torch.autograd.grad(out.pooled, x, case.dpooled)
    allocated = sum(
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.nbytes() > 0  # type: ignore[union-attr]
    )
    map_bytes = x.numel() * 4
    assert map_bytes <= allocated < 1.1 * map_bytes


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("with_dy", [True, False])
def test_dx_may_be_written_over_x(place: Place, with_dy: bool, layout: str) -> None:
    """Whole and partial vectors, several windows; the bits are those of a dx of its own."""
    for shape, dtype in (((3, 35, 2, 10, 2), "bf16"), ((2, 5, 4, 72, 4), "f32")):
        case = make(*shape, DTYPES[dtype], layout, place.device, with_dy=with_dy)
        apart, over = case.run(), replace(case, reuse_input=True).run()
        for name in (*GRADIENTS, "y", "pooled"):
            assert_same_bits(name, over[name], apart[name])
        assert_same_bits("x", apart["x afterwards"], case.x)
        assert_same_bits("x", over["x afterwards"], over["dx"])
        assert not torch.equal(over["dx"], case.x)


def test_a_second_pass_over_what_was_written_is_refused() -> None:
    case = make(3, 5, 4, 6, 2)
    x = case.x.clone().requires_grad_()
    pooled = ops.bn_relu_pool(x * 1, case.gamma, case.beta, pool=2, reuse_input=True).pooled
    pooled.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pooled.sum().backward()


def test_an_x_without_a_gradient_is_left_alone() -> None:
    case = make(3, 5, 4, 6, 2)
    x, gamma = case.x.clone(), case.gamma.clone().requires_grad_()
    ops.bn_relu_pool(x, gamma, case.beta, pool=2, reuse_input=True).pooled.sum().backward()
    assert gamma.grad is not None and torch.equal(x, case.x)
