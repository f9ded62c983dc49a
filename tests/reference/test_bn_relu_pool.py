"""The definition against torch's autograd in float64, and its properties."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, batch_norm, relu

from lct_fast.reference.bn_relu_pool import bn_relu_pool, bn_relu_pool_backward

EPS = 1e-3


def inputs(*shape: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    channels = shape[1]
    sizes = (shape, (channels,), (channels,), (channels,), (channels,))
    x, gamma, beta, mean, var = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in sizes)
    return x + 1, gamma, beta, mean, var.square() + 0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_dy", [True, False])
@pytest.mark.parametrize("pool", [1, 2])
def test_every_output_is_what_autograd_gives(pool: int, with_dy: bool, training: bool) -> None:
    x, gamma, beta, mean, var = inputs(3, 4, 6, 2)
    leaves = [t.clone().requires_grad_() for t in (x, gamma, beta)]
    y = relu(batch_norm(leaves[0], mean, var, leaves[1], leaves[2], training, 0.0, EPS))
    pooled = avg_pool2d(y, (6 // pool, 2 // pool))
    dpooled, dy = torch.randn_like(pooled), torch.randn_like(y)
    expected = torch.autograd.grad([pooled, y], leaves, [dpooled, dy if with_dy else torch.zeros_like(y)])

    given = (None, None) if training else (mean, var)
    out = bn_relu_pool(x, gamma, beta, *given, EPS, pool)
    torch.testing.assert_close(out[0], y.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[1], pooled.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[2], x.mean((0, 2, 3)) if training else mean)
    torch.testing.assert_close(out[3], x.var((0, 2, 3), correction=0) if training else var)
    got = bn_relu_pool_backward(dy if with_dy else None, dpooled, x, gamma, beta, *out[2:], training, EPS)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_moments_are_window_means_of_what_is_active() -> None:
    x, gamma, beta, _, _ = inputs(3, 4, 6, 2)
    y, _, mean, var, moments = bn_relu_pool(x, gamma, beta, None, None, EPS, 2)
    xhat = (x - mean[None, :, None, None]) / (var + EPS).sqrt()[None, :, None, None]
    active = (y > 0).double()
    torch.testing.assert_close(moments[0], avg_pool2d(active, (3, 1)))
    torch.testing.assert_close(moments[1], avg_pool2d(active * xhat, (3, 1)))


def test_dx_of_a_batch_sums_to_nothing() -> None:
    """Shifting or scaling a channel of x changes nothing, so dx is orthogonal to 1 and to xhat."""
    x, gamma, beta, _, _ = inputs(3, 4, 6, 2)
    out = bn_relu_pool(x, gamma, beta, None, None, 0.0, 2)
    dx, _, _ = bn_relu_pool_backward(None, torch.randn_like(out[1]), x, gamma, beta, *out[2:], True, 0.0)
    torch.testing.assert_close(dx.sum((0, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        (dx * x).sum((0, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    x, gamma, beta, _, _ = inputs(3, 4, 6, 2)
    x, gamma, beta = x.to(dtype), gamma.float(), beta.float()
    out = bn_relu_pool(x, gamma, beta, None, None, EPS, 2)
    assert [t.dtype for t in out] == [dtype, dtype, *[torch.float32] * 3]
    got = bn_relu_pool_backward(x, out[1], x, gamma, beta, *out[2:], True, EPS)
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.float32]


def test_no_samples() -> None:
    x, gamma, beta, _, _ = inputs(3, 4, 6, 2)
    out = bn_relu_pool(x[:0], gamma, beta, None, None, EPS, 2)
    assert [list(t.shape) for t in out] == [[0, 4, 6, 2], [0, 4, 2, 2], [4], [4], [2, 0, 4, 2, 2]]
    assert not out[2].any() and not out[3].any()
