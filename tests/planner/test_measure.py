"""Measured costs: what is made of the times of a group's kinds of work, and that measuring leaves the group alone."""

from typing import Any

import pytest
import torch
from torch import nn

import lct_fast as lct
from lct_fast.planner.measure import GroupTimer, measure


def _groups() -> list[lct.Group]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    return lct.split(net, 3, torch.randn(4, 3, 8, 8), critic="pooled_linear:pool=4", split_points=["1", "2"])


def test_costs_from_times() -> None:
    timer = GroupTimer(_groups(), 1, 4, "vq:4,4")
    timer.spans = {
        "forward": [1.0, 2.0, 3.0],
        "whole backward": [5.0],
        "backward": [3.0],
        "local": [6.0],
        "encode": [0.5],
        "decode": [0.25],
        "update": [0.125],
    }
    cost = timer.cost()
    assert (cost.forward_s, cost.backward_s, cost.input_gradient_s, cost.critic_s) == (2.0, 5.0, 2.0, 1.0)
    assert (cost.encode_s, cost.decode_s, cost.update_s) == (0.5, 0.25, 0.125)
    assert cost.local_s == 6.0
    assert (cost.activation_bytes, cost.parameter_bytes) == (4 * 8 * 4 * 4 * 4, 4 * (8 * 8 * 9 + 8 + 16))
    # Only forward passes vary: by sqrt(2 / 3) of a mean of 2; the other passes not at all.
    assert timer.jitter() == pytest.approx(((2 / 3) / 4 / 3) ** 0.5)
    # A group whose passes are shared with its critic may take less than forward and backward pass: that stays so.
    timer.spans["local"] = [4.0]
    cost = timer.cost()
    assert (cost.critic_s, cost.input_gradient_s, cost.local_s) == (0.0, 3.0, 4.0)
    # The average may be another.
    timer.spans["forward"] = [1.0, 1.0, 4.0]
    assert timer.cost(max).forward_s == 4.0 and timer.cost().forward_s == 1.0


def test_every_kind_of_work_is_timed() -> None:
    groups = _groups()
    kinds = []
    for k in range(3):
        timer = GroupTimer(groups, k, 4)
        timer.round()
        assert all(s > 0 for spans in timer.spans.values() for s in spans)
        kinds.append({name: len(spans) for name, spans in timer.spans.items()})
        timer.reset()
        assert not timer.spans
    base = {"forward": 2, "backward": 2, "local": 2, "update": 1}
    assert kinds[0] == {**base, "encode": 2}
    assert kinds[1] == {**base, "forward": 4, "whole backward": 2, "encode": 2, "decode": 2}
    assert kinds[2] == {**base, "forward": 4, "whole backward": 2, "decode": 2}


def test_late_critics_are_part_of_a_local_step() -> None:
    method = lct.LocalCritic()
    heard: list[int] = []
    real = method.critic_step

    def critic_step(critic: Any, slot: Any, next_loss: Any, objective: Any) -> None:
        real(critic, slot, next_loss, objective)
        heard.append(len(timer.slots))

    method.critic_step = critic_step  # type: ignore[method-assign]
    groups = _groups()
    timer = GroupTimer(groups, 1, 4, method=method)
    timer.round()
    assert not heard and len(timer.slots) == 2
    timer.round()
    # The fourth batch is the first for which a critic hears of one, the first.
    assert heard == [3] and len(timer.slots) == 3
    # The last group has no critic that waits.
    last = GroupTimer(groups, 2, 4, method=method)
    last.round()
    assert not last.slots


def test_measuring_leaves_the_groups_as_they_were() -> None:
    groups = _groups()
    before = [{name: t.clone() for name, t in g.state_dict().items()} for g in groups]
    costs = measure(groups, 4)
    assert len(costs) == 3 and all(c.forward_s > 0 and c.backward_s > 0 for c in costs)
    for group, state in zip(groups, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in group.state_dict().items())
        assert all(p.grad is None for p in group.parameters())
