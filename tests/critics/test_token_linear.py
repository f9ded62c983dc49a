"""token_linear: linear to the vocabulary at every token, its gradients those of autograd."""

import pytest
import torch
import torch.nn.functional as F

from lct_fast import critics
from lct_fast.critics import Critic
from lct_fast.methods import LocalCritic, Objective


def build(norm: str = "none") -> Critic:
    torch.manual_seed(0)
    return critics.build(f"token_linear:norm={norm}", (5, 8), 7)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_row_a_token(norm: str) -> None:
    critic, h = build(norm), torch.randn(3, 5, 8)
    rows = h.reshape(15, 8)
    if norm == "layer":
        rows = F.layer_norm(rows, (8,))
    assert torch.equal(critic.features(h), rows)
    assert critic(h).shape == (3, 5, 7)
    torch.testing.assert_close(critic(h).flatten(0, 1), rows @ critic.head.weight.t() + critic.head.bias)
    # Windows of another length, and a tensor that is not contiguous.
    assert critic(torch.randn(2, 9, 8)).shape == (2, 9, 7)
    assert torch.equal(critic.features(h.transpose(0, 1)), critic.features(h.transpose(0, 1).contiguous()))
    assert [n for n, _ in critic.named_parameters()] == ["head.weight", "head.bias"]
    LocalCritic().check([critic])


class _Group:
    """Layers and head as a method sees them."""

    last, fused = False, None

    def __init__(self, critic: Critic) -> None:
        self.layers, self.critic = torch.nn.Linear(4, 8).double(), critic


@pytest.mark.parametrize("loss", ["l1", "one_sided"])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_both_gradients_are_those_of_autograd(norm: str, loss: str) -> None:
    group = _Group(build(norm).double())
    g = torch.Generator().manual_seed(1)
    x, next_loss = (
        torch.randn(4, 4, 4, generator=g, dtype=torch.float64),
        4 * torch.rand(16, generator=g).double(),
    )
    target = torch.randint(0, 7, (4, 4), generator=g)
    target[1, 2] = -100
    next_loss[6] = 0
    objective = Objective()
    method = LocalCritic(loss=loss)
    # 15 tokens count.
    scale = objective.scale(target)
    torch.testing.assert_close(scale, torch.tensor(1 / 15))
    # Tokens of both signs.
    step = method.local_step(group, x, target, objective, scale.double(), keep_slot=True)
    assert step.slot is not None and step.loss.shape == (16,) and step.h.shape == (4, 4, 8)
    method.critic_step(group.critic, step.slot, next_loss, objective)

    h = group.layers(x)
    per_token = F.cross_entropy(group.critic(h).flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(step.loss, per_token)
    (dweight,) = torch.autograd.grad(
        per_token.sum() * scale.double(), [group.layers.weight], retain_graph=True
    )
    torch.testing.assert_close(group.layers.weight.grad, dweight)
    difference = per_token - next_loss
    assert (difference > 0).any() and (difference < 0).any()
    distance = difference.abs() if loss == "l1" else difference.clamp(min=0)
    wanted = torch.autograd.grad(distance.sum() * scale.double(), list(group.critic.head.parameters()))
    for parameter, gradient in zip(group.critic.head.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="norm must be 'none' or 'layer', got 'batch'"):
        critics.build("token_linear:norm=batch", (5, 8), 7)
    for shape in [(8,), (4, 8, 8)]:
        with pytest.raises(ValueError, match=r"critic 'token_linear': expected a positive shape \(T, D\)"):
            critics.build("token_linear", shape, 7)
    with pytest.raises(ValueError, match="'pooled_linear'.*for tokens critic 'token_linear', got"):
        critics.build("pooled_linear", (5, 8), 7)
