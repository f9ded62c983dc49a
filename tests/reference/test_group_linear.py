"""The definition against torch's autograd in float64, and its properties."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu

from lct_fast.reference.group_linear import group_linear, group_linear_backward

ACTIVATIONS = {"none": lambda x: x, "relu": relu, "gelu": gelu}


def inputs(*sizes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=draw, dtype=torch.float64).requires_grad_() for size in sizes]


@pytest.mark.parametrize("through", ["h", "logits", "both"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_output_is_what_autograd_gives(activation: str, with_bias: bool, through: str) -> None:
    x, weight, bias, critic, shift = inputs((7, 5), (6, 5), (6,), (4, 6), (4,))
    biases = (bias, shift) if with_bias else (None, None)
    pre = linear(x, weight, biases[0])
    h = ACTIVATIONS[activation](pre)
    logits = linear(h, critic, biases[1])
    dh, dlogits = (
        torch.randn_like(t) if through in (name, "both") else None
        for name, t in (("h", h), ("logits", logits))
    )
    total = sum((t * d).sum() for t, d in ((h, dh), (logits, dlogits)) if d is not None)
    (dpre,) = torch.autograd.grad(total, pre)

    with torch.no_grad():
        got = group_linear(x, weight, biases[0], activation, critic, biases[1])
        gate = got[2] if activation == "gelu" else got[0]
        back = group_linear_backward(dh, dlogits, critic, gate, activation)
    for a, b in zip((*got[:2], *back), (h, logits, dpre, dpre.sum(0)), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slope_is_the_derivative(activation: str) -> None:
    (x,) = inputs((9, 3))
    weight = torch.eye(3, dtype=torch.float64)
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation](x).sum(), x)
    got = group_linear(x.detach(), weight, None, activation)
    assert got[1] is None
    torch.testing.assert_close(got[2], slope, rtol=1e-13, atol=1e-13)


def test_gelu_keeps_its_digits_in_the_tail() -> None:
    """1 + erf cancels there: erfc does not."""
    x = torch.tensor([[-10.0]])
    h, _, slope = group_linear(x, torch.ones(1, 1), None, "gelu")
    # x Phi(x) and Phi(x) + x phi(x) at -10.
    assert float(h) == pytest.approx(-7.61985302416e-23, rel=1e-4)
    assert float(slope) == pytest.approx(-7.61839e-22, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    x, weight, bias, critic, shift = (t.detach().float() for t in inputs((7, 5), (6, 5), (6,), (4, 6), (4,)))
    out = group_linear(x.to(dtype), weight, bias, "relu", critic, shift)
    assert [t.dtype for t in out if t is not None] == [dtype] * 3
    back = group_linear_backward(out[0], out[1], critic, out[0], "relu")
    assert [t.dtype for t in back] == [dtype, torch.float32]


def test_logits_are_of_h_as_rounded() -> None:
    x, weight, critic = (t.detach() for t in inputs((70, 50), (60, 50), (4, 60)))
    h, logits, _ = group_linear(x.bfloat16(), weight.float(), None, "none", critic.float())
    assert logits is not None
    torch.testing.assert_close(logits, linear(h.float(), critic.float()).bfloat16(), rtol=0, atol=0)


def test_a_gradient_is_needed() -> None:
    with pytest.raises(ValueError, match="expected dh or dlogits, got neither; pass one"):
        group_linear_backward(None, None, None, None, "none")


def test_no_rows() -> None:
    h, logits, slope = group_linear(torch.ones(0, 3), torch.ones(2, 3), None, "gelu", torch.ones(4, 2))
    assert logits is not None
    assert h.shape == slope.shape == (0, 2) and logits.shape == (0, 4)
    dpre, dbias = group_linear_backward(h, logits, torch.ones(4, 2), slope, "gelu")
    assert dpre.shape == (0, 2) and not dbias.any() and dbias.shape == (2,)
