"""Critics that learn from the last group's loss instead of the next one's."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lct_fast as lct
from lct_fast.engine import checkpoint
from tests.engine import nets


def _plain_sgd(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)  # type: ignore[arg-type]


def _trainer(target: str, **options: object) -> lct.Trainer:
    method = lct.LocalCritic(critic_optimizer=_plain_sgd, target=target)
    return lct.Trainer(nets.groups(method), method, optimizer=_plain_sgd, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["next", "last"])
def test_every_critic_learns_from_the_loss_it_is_told_to(target: str) -> None:
    x, y = nets.batches(1)[0]
    trainer = _trainer(target)
    before = [g.critic.head.weight.detach().clone() for g in trainer.groups[:-1]]
    trainer.step(x, y)

    h, own, losses = x, [], []
    for group in nets.groups(lct.LocalCritic()):
        h = group.layers(h).detach()
        losses.append(F.cross_entropy(group.critic(h), y, reduction="none"))
        own.append(group.critic.head.weight)
    for k, group in enumerate(trainer.groups[:-1]):
        to = losses[k + 1 if target == "next" else -1].detach()
        (expected,) = torch.autograd.grad((losses[k] - to).abs().mean(), own[k], retain_graph=True)
        moved = before[k] - group.critic.head.weight.detach()
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)
        assert moved.abs().max() > 0


def test_a_checkpoint_keeps_what_is_owed(tmp_path: Path) -> None:
    batches = nets.batches(8)
    whole, first, second = (_trainer("last", feedback_delay=2) for _ in range(3))
    for x, y in batches:
        whole.step(x, y)
    whole.flush()
    for x, y in batches[:4]:
        first.step(x, y)
    checkpoint.save(first, tmp_path)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    checkpoint.load(second, found)
    for x, y in batches[4:]:
        second.step(x, y)
    second.flush()
    assert nets.same(nets.state(second), nets.state(whole))
    other = _trainer("next", feedback_delay=2)
    for x, y in batches:
        other.step(x, y)
    other.flush()
    assert not nets.same(nets.state(other), nets.state(whole)), "with 4 groups the targets differ"


def test_only_lockstep_can() -> None:
    message = "last group's loss take schedule lockstep, got pipelined.*use target 'next'"
    with pytest.raises(ValueError, match=message):
        _trainer("last", schedule="pipelined")
    with pytest.raises(ValueError, match=message):
        _trainer("last", schedule=lct.Hybrid(0.1, schedule="pipelined"))
    _trainer("last", schedule=lct.Hybrid(0.1))
