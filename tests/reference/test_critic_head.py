"""The definition against torch's autograd in float64, and its properties."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lct_fast.reference.critic_head import critic_head, critic_head_wgrad


def inputs(rows: int = 7, depth: int = 5, classes: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    h, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()
        for shape in ((rows, depth), (classes, depth), (classes,))
    )
    return h, weight, bias, torch.randint(0, classes, (rows,), generator=draw)


def one(value: float = 1.0) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_every_output_is_what_autograd_gives(activation: str, with_bias: bool) -> None:
    h, weight, bias, target = inputs()
    target[3] = -100
    row_scale = torch.tensor([0.5, -0.25, 0.0, 1.0, -1.0, 2.0, 1.0], dtype=torch.float64)
    logits = linear(h.relu() if activation == "relu" else h, weight, bias if with_bias else None)
    logits.retain_grad()
    loss = cross_entropy(logits, target, reduction="none", ignore_index=-100)
    (dlogits,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (dh,) = torch.autograd.grad(loss.sum() / 7, h, retain_graph=True)
    (dweight,) = torch.autograd.grad((loss * row_scale).sum(), weight, retain_graph=True)

    with torch.no_grad():
        out = critic_head(h, weight, bias if with_bias else None, target, one(1 / 7), row_scale, activation)
    torch.testing.assert_close(out[0], loss.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out[1], dlogits, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out[2], dh, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out[3], dweight, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out[4], (row_scale[:, None] * dlogits).sum(0), rtol=1e-13, atol=1e-13)


def test_one_backward_gives_two_gradients() -> None:
    """The group's gradient of its own loss and the critic's of |L_k - L_next|, from the same dlogits."""
    h, weight, bias, target = inputs(rows=16)
    next_loss = torch.rand(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    loss = cross_entropy(linear(h.relu(), weight, bias), target, reduction="none")
    expected_dh = torch.autograd.grad(loss.mean(), h, retain_graph=True)[0]
    expected = torch.autograd.grad((loss - next_loss).abs().mean(), (weight, bias))

    with torch.no_grad():
        mine, dlogits, dh, _, _ = critic_head(h, weight, bias, target, one(1 / 16), None, "relu")
        sign = torch.sign(mine - next_loss)
        assert set(sign.tolist()) == {-1.0, 1.0}
        dweight, dbias = critic_head_wgrad(h, dlogits, sign / 16, "relu")
    torch.testing.assert_close(dh, expected_dh, rtol=0, atol=1e-12)
    torch.testing.assert_close(dweight, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(dbias, expected[1], rtol=0, atol=1e-12)


def test_two_gradients_through_a_hidden_layer() -> None:
    """A critic's hidden layer learns from dh * row_scale, while the group takes dh itself."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(9, 6, generator=draw, dtype=torch.float64)
    hidden = torch.randn(5, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    head = torch.randn(3, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (9,), generator=draw)
    next_loss = torch.rand(9, generator=draw, dtype=torch.float64) * 2
    loss = cross_entropy(linear(linear(x, hidden).relu(), head), target, reduction="none")
    expected = torch.autograd.grad((loss - next_loss).abs().mean(), hidden)[0]

    with torch.no_grad():
        mine, _, dh, _, _ = critic_head(linear(x, hidden), head, None, target, one(), None, "relu")
        sign = torch.sign(mine - next_loss)
        mine_dhidden = (dh * sign[:, None] / 9).T @ x
    torch.testing.assert_close(mine_dhidden, expected, rtol=0, atol=1e-12)


def test_rows_of_dlogits_sum_to_zero_and_losses_are_positive() -> None:
    h, weight, bias, target = (x.detach() for x in inputs(rows=50))
    loss, dlogits, _, _, _ = critic_head(h, weight, bias, target, one())
    torch.testing.assert_close(dlogits.sum(1), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-14)
    assert bool((loss > 0).all())
    assert bool((dlogits.gather(1, target[:, None]) < 0).all())


def test_dtypes_follow_h_and_weight_whatever_the_default_dtype() -> None:
    h, weight, bias, target = (x.detach() for x in inputs())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        out = critic_head(
            h.bfloat16(),
            weight.float(),
            bias.float(),
            target,
            torch.tensor(1.0).float(),
            torch.ones(7).float(),
        )
    finally:
        torch.set_default_dtype(before)
    dtypes = [x.dtype for x in out if x is not None]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
