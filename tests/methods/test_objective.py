"""Objective: the fused op, soft labels and a loss of one's own give autograd's gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lct_fast.methods import Objective


def _case() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(6, 5).double(), torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 5, (8,))


def _brier(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.softmax(1) - F.one_hot(target, logits.shape[1])).square().sum(1)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("kind", ["labels", "soft", "own"])
def test_gradients_are_those_of_the_mean_loss(kind: str, activation: str) -> None:
    head, u, y = _case()
    target = torch.randn(8, 5, dtype=torch.float64).softmax(1) if kind == "soft" else y
    objective = Objective(_brier if kind == "own" else None)
    scale = objective.scale(target).double()
    got = objective(head, u, target, scale, activation=activation, with_weight_gradient=True)

    u.requires_grad_()
    logits = head(u.relu() if activation == "relu" else u)
    loss = _brier(logits, y) if kind == "own" else F.cross_entropy(logits, target, reduction="none")
    du, dweight, dbias = torch.autograd.grad(loss.mean(), [u, head.weight, head.bias])
    # The scale 1/8 is exact in fp32, so float64 tolerances hold.
    for a, b in ((got.loss, loss.detach()), (got.du, du), (got.dweight, dweight), (got.dbias, dbias)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_mean_runs_over_rows_that_count() -> None:
    y = torch.tensor([1, -100, 2, -100])
    assert Objective().scale(y).item() == 0.5
    assert Objective(ignore_index=2).scale(y, divisor=2).item() == pytest.approx(1 / 6)
    assert Objective().scale(torch.full((3,), -100)).item() == 1.0


def test_a_reduced_loss_is_refused() -> None:
    head, u, y = _case()
    with pytest.raises(ValueError, match="one value a sample"):
        Objective(lambda logits, target: F.cross_entropy(logits, target))(head, u, y, torch.tensor(1.0))
