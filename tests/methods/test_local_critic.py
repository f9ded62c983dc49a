"""Local critic training against autograd in float64: the formulas of arXiv 2102.01963."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lct_fast as lct
from lct_fast.methods import LocalCritic, Objective

# Convolutional, flattened and pooled critics; with several convolutions the inner layers' late gradients count.
CRITICS = ["conv_fc:convs=1,filters=5", "conv_fc:convs=3,filters=5", "linear", "pooled_linear:pool=2"]


def _net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 7)),
    ).double()


def _batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    # Eight rows: 1/8 is exact in fp32, so float64 tolerances hold.
    g = torch.Generator().manual_seed(5)
    return torch.randn(rows, 2, 6, 6, generator=g, dtype=torch.float64), torch.randint(
        0, 7, (rows,), generator=g
    )


def _groups(spec: str) -> list[lct.Group]:
    x, _ = _batch()
    groups = lct.split(_net(), example_input=x, critic=spec, split_points=["1"])
    for group in groups:
        group.double()
    return groups


@pytest.mark.parametrize("spec", CRITICS)
def test_group_learns_from_its_critic_and_critic_from_the_next_loss(spec: str) -> None:
    x, y = _batch()
    group = _groups(spec)[0]
    objective, method = Objective(), LocalCritic()
    next_loss = torch.linspace(1.0, 3.0, len(x), dtype=torch.float64)

    step = method.local_step(group, x, y, objective, objective.scale(y).double(), keep_slot=True)
    got_group = {n: p.grad.clone() for n, p in group.layers.named_parameters()}
    assert all(p.grad is None for p in group.critic.parameters())
    assert step.slot is not None
    method.critic_step(group.critic, step.slot, next_loss, Objective())
    got_critic = {n: p.grad.clone() for n, p in group.critic.named_parameters()}

    group.zero_grad()
    h = group.layers(x)
    F.cross_entropy(group.critic(h), y).backward()
    for name, p in group.layers.named_parameters():
        torch.testing.assert_close(got_group[name], p.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.h, h.detach())

    group.zero_grad()
    own = F.cross_entropy(group.critic(h.detach()), y, reduction="none")
    assert bool((own > next_loss).any()) and bool((own < next_loss).any()), "both signs must occur"
    (own - next_loss).abs().mean().backward()
    for name, p in group.critic.named_parameters():
        torch.testing.assert_close(got_critic[name], p.grad, rtol=1e-9, atol=1e-12)


def test_late_gradient_is_that_of_the_weights_in_force_when_the_batch_passed() -> None:
    x, y = _batch()
    group = _groups("conv_fc:convs=3,filters=5")[0]
    objective, method = Objective(), LocalCritic()
    next_loss = torch.linspace(1.0, 3.0, len(x), dtype=torch.float64)
    step = method.local_step(group, x, y, objective, objective.scale(y).double(), keep_slot=True)
    own = F.cross_entropy(group.critic(step.h), y, reduction="none")
    expected = torch.autograd.grad((own - next_loss).abs().mean(), list(group.critic.parameters()))
    with torch.no_grad():
        for p in group.critic.parameters():
            p.add_(torch.randn_like(p))
    assert step.slot is not None
    method.critic_step(group.critic, step.slot, next_loss, Objective())
    for p, e in zip(group.critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-12)


def test_one_sided_loss_ignores_samples_the_critic_underrates() -> None:
    x, y = _batch()
    group = _groups("linear")[0]
    objective, method = Objective(), LocalCritic(loss="one_sided")
    step = method.local_step(group, x, y, objective, objective.scale(y).double(), keep_slot=True)
    next_loss = torch.linspace(1.0, 3.0, len(x), dtype=torch.float64)
    own = F.cross_entropy(group.critic(step.h), y, reduction="none")
    expected = torch.autograd.grad((own - next_loss).clamp(min=0).mean(), list(group.critic.parameters()))
    assert step.slot is not None
    method.critic_step(group.critic, step.slot, next_loss, Objective())
    for p, e in zip(group.critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-12)


def test_ignored_rows_reach_neither_group_nor_critic() -> None:
    x, y = _batch()
    y[4:] = -100
    whole = _groups("linear")[0]
    part = _groups("linear")[0]
    part.load_state_dict(whole.state_dict())
    objective, method = Objective(), LocalCritic()
    grads = []
    # Without batch norm's statistics, rows are independent: only the four counted rows should matter.
    for group, n in ((whole, len(x)), (part, 4)):
        group.layers.eval()
        step = method.local_step(
            group, x[:n], y[:n], objective, objective.scale(y[:n]).double(), keep_slot=True
        )
        assert step.slot is not None
        method.critic_step(group.critic, step.slot, torch.zeros(n, dtype=torch.float64), Objective())
        grads.append([p.grad for p in group.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_critics_with_batch_norm_are_refused_by_name() -> None:
    x, _ = _batch()
    with pytest.raises(ValueError, match=r"critic 1 \(MlpAuxCritic\).*use conv_fc"):
        lct.Trainer(
            lct.split(_net(), example_input=x, critic="mlp_aux", split_points=["1"]), lct.LocalCritic()
        )


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="critic_every.*got 0"):
        LocalCritic(critic_every=0)
    with pytest.raises(ValueError, match="got 'l2'"):
        LocalCritic(loss="l2")
