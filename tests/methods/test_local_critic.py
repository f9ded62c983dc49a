"""Local critic training against autograd in float64: the formulas of arXiv 2102.01963."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lct_fast as lct
from lct_fast.methods import LocalCritic, Objective
from lct_fast.methods.local_critic import own_share

# Convolutional, flattened and pooled critics; with several convolutions the inner layers' late gradients count.
CRITICS = [
    "conv_fc:convs=1,filters=5",
    "conv_fc:convs=3,filters=5",
    "linear",
    "pooled_linear:pool=2",
    "depthwise:pool=2",
]


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


MIXED_LOSSES = {
    "one_sided": lambda own, to: (own - to).clamp(min=0),
    "half_sided": lambda own, to: torch.maximum(own - to, (own - to) / 2),
    "mixed:0.3": lambda own, to: 0.7 * (own - to).abs() + 0.3 * own,
    "mixed:0": lambda own, to: (own - to).abs(),
    "mixed:1": lambda own, to: own,
}


@pytest.mark.parametrize("spec", CRITICS)
@pytest.mark.parametrize("loss", MIXED_LOSSES)
def test_losses_that_mix_in_the_critics_own(loss: str, spec: str) -> None:
    x, y = _batch()
    group = _groups(spec)[0]
    objective, method = Objective(), LocalCritic(loss=loss)
    step = method.local_step(group, x, y, objective, objective.scale(y).double(), keep_slot=True)
    group_gradients = [p.grad.clone() for p in group.layers.parameters()]
    next_loss = torch.linspace(1.0, 3.0, len(x), dtype=torch.float64)
    own = F.cross_entropy(group.critic(step.h), y, reduction="none")
    assert bool((own > next_loss).any()) and bool((own < next_loss).any()), "both signs must occur"
    expected = torch.autograd.grad(MIXED_LOSSES[loss](own, next_loss).mean(), list(group.critic.parameters()))
    assert step.slot is not None
    method.critic_step(group.critic, step.slot, next_loss, Objective())
    for p, e in zip(group.critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-12)
    # The group learns from its critic's loss, whatever the critic learns from.
    for p, g in zip(group.layers.parameters(), group_gradients, strict=True):
        assert torch.equal(p.grad, g)


def test_the_named_losses_are_shares_of_the_critics_own() -> None:
    assert [own_share(loss) for loss in ("l1", "one_sided", "half_sided", "mixed:0.1")] == [0, 0.5, 0.75, 0.1]
    assert LocalCritic().own_share == 0, "the paper's"


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
    for loss in ("l2", "mixed", "mixed:", "mixed:1.5", "mixed:-0.1", "mixed:nan", "mixed:x", "l1:0.5"):
        with pytest.raises(ValueError, match=f"or mixed:W with W from 0 to 1, got '{loss}'$"):
            LocalCritic(loss=loss)
    with pytest.raises(ValueError, match="critic target: expected 'next' or 'last', got 'first'"):
        LocalCritic(target="first")


def test_a_shared_critics_head_stays_and_its_projection_learns() -> None:
    x, y = _batch()
    group = _groups("shared:pool=2,channels=6")[0]
    objective, method = Objective(), LocalCritic()
    next_loss = torch.linspace(1.0, 3.0, len(x), dtype=torch.float64)
    step = method.local_step(group, x, y, objective, objective.scale(y).double(), keep_slot=True)
    assert step.slot is not None
    method.critic_step(group.critic, step.slot, next_loss, Objective())
    critic = group.critic
    assert critic.head.weight.grad is None and critic.head.bias.grad is None
    own = F.cross_entropy(critic(step.h), y, reduction="none")
    learned = [critic.project.weight, critic.project.bias]
    expected = torch.autograd.grad((own - next_loss).abs().mean(), learned)
    for p, e in zip(learned, expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-12)
