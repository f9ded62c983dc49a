"""Likelihood-ratio training through the trainer: lockstep, whole networks, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lct_fast as lct
from lct_fast.engine import checkpoint
from tests.engine import nets

SPEC = "digits_cnn:width=0.125,norm=none"


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    pass


def groups(count: int = 3, spec: str = SPEC) -> list[lct.Group]:
    torch.manual_seed(0)
    model = lct.models.build(spec, 5, 1, 8)
    points = lct.models.default_splits(spec, count)
    return lct.split(model, example_input=torch.zeros(4, 1, 8, 8), split_points=points)


def trainer(method: lct.Method, count: int = 3, spec: str = SPEC, **options: Any) -> lct.Trainer:
    made = groups(count, spec)
    options.setdefault("optimizer", lambda params: torch.optim.SGD(params, 0.02, momentum=0.9))
    return lct.Trainer(made, method, clip_norm=1.0, **options)


def learnable(count: int, rows: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Five patterns under noise: something to learn."""
    draw = torch.Generator().manual_seed(5)
    patterns = torch.randn(5, 1, 8, 8, generator=draw)
    found = []
    for _ in range(count):
        y = torch.randint(0, 5, (rows,), generator=draw)
        found.append((patterns[y] + 0.3 * torch.randn(rows, 1, 8, 8, generator=draw), y))
    return found


@pytest.mark.parametrize(
    ("noise", "options", "batches", "wanted"),
    [
        ("boundary", {}, 40, 0.95),
        ("boundary", {"learn_sigma": True, "sampling": "sobol"}, 40, 0.95),
        ("logits", {}, 40, 0.8),
        ("logits", {"one_at_a_time": False, "storage": "sign", "learn_sigma": True}, 40, 0.5),
        ("hybrid", {}, 40, 0.7),
    ],
)
def test_groups_learn(noise: str, options: dict[str, Any], batches: int, wanted: float) -> None:
    t = trainer(lct.LikelihoodRatio(noise, copies=16, **options))
    for x, y in learnable(batches):
        stats = t.step(x, y)
    assert stats.losses.shape == (3,) and bool(stats.losses.isfinite().all())
    evaluation = t.evaluate(learnable(1, rows=200))
    assert evaluation is not None and evaluation.accuracy[-1] >= wanted


@pytest.mark.parametrize("spec", ["resnet5:width=0.5", "mlp:hidden=16,depth=2", "vgg8:width=0.0625"])
@pytest.mark.parametrize("noise", ["boundary", "logits"])
def test_every_model_without_batch_norm_trains(spec: str, noise: str) -> None:
    made = lct.split(lct.models.build(spec, 5, 1, 8), 2, torch.zeros(4, 1, 8, 8), repeats=1)
    t = lct.Trainer(made, lct.LikelihoodRatio(noise, copies=4))
    before = nets.state(t)
    t.step(*learnable(1)[0])
    after = nets.state(t)
    learned = [n for n in before if "layers." in n or n.startswith("1.")]
    assert all(not torch.equal(before[n], after[n]) for n in learned)
    # Critics of earlier exits have nothing to learn from.
    assert all(torch.equal(before[n], after[n]) for n in before if n not in learned)


def test_a_group_that_branches_is_taken_whole() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            out: Tensor = self.head(h + self.b(h).tanh())
            return out

    torch.manual_seed(0)
    model = Branches()
    t = lct.Trainer(lct.split(model, 1, torch.zeros(4, 6)), lct.LikelihoodRatio("logits", copies=512))
    x, y = torch.randn(16, 6), torch.randint(0, 5, (16,))
    reference = {n: p.clone() for n, p in model.named_parameters()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, reference, x), y)
    exact = torch.autograd.grad(loss, list(reference.values()))
    t.step(x, y)
    for (name, p), g in zip(model.named_parameters(), exact, strict=True):
        moved = reference[name].detach() - p.detach()
        assert float(nn.functional.cosine_similarity(moved.flatten(), g.flatten(), 0)) > 0.8, name


class ReluLinear(nn.Module):
    """In place once ``split`` has looked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.in_place = nn.Linear(8, 8), False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.relu_() if self.in_place else x.relu())
        return out


def test_layers_that_change_what_crosses_are_refused() -> None:
    unit = ReluLinear()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), unit, nn.Linear(8, 5))
    made = lct.split(model, example_input=torch.zeros(4, 1, 8, 8), split_points=["2"])
    unit.in_place = True
    with pytest.raises(RuntimeError, match="the layers after group 1 changed their input in place"):
        lct.Trainer(made, lct.LikelihoodRatio(copies=4)).step(*learnable(1)[0])


@pytest.mark.parametrize("noise", ["boundary", "logits", "weights"])
def test_mixed_precision(noise: str) -> None:
    t = trainer(lct.LikelihoodRatio(noise, copies=4), autocast=torch.bfloat16)
    before = nets.state(t)
    for x, y in learnable(2):
        stats = t.step(x, y)
    assert bool(stats.losses.isfinite().all())
    assert not torch.equal(before["0.layers.conv1.conv.weight"], nets.state(t)["0.layers.conv1.conv.weight"])


def test_a_group_of_the_head_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 5))
    for noise in ("boundary", "logits"):
        made = lct.split(model, example_input=torch.zeros(4, 1, 8, 8), split_points=["3"])
        t = lct.Trainer(made, lct.LikelihoodRatio(noise, copies=4, learn_sigma=True))
        before = nets.state(t)
        t.step(*learnable(1)[0])
        assert not torch.equal(before["1.critic.head.weight"], nets.state(t)["1.critic.head.weight"])


def test_runs_repeat_bit_for_bit_and_resume(tmp_path: Path) -> None:
    batches = learnable(4)
    states = []
    for turn in range(2):
        torch.manual_seed(7)
        t = trainer(lct.LikelihoodRatio("logits", copies=4, learn_sigma=True))
        for k, (x, y) in enumerate(batches):
            if turn and k == 2:
                checkpoint.save(t, tmp_path)
                torch.manual_seed(99)
                t = trainer(lct.LikelihoodRatio("logits", copies=4, learn_sigma=True))
                found = checkpoint.whole(tmp_path, lambda line: None)
                assert found is not None
                checkpoint.load(t, found)
            t.step(x, y)
        states.append(nets.state(t))
    assert nets.same(*states)
    assert any("log_sigma" in name for name in states[0])


def test_serial_steps_mix_in() -> None:
    t = trainer(lct.LikelihoodRatio(copies=4), schedule=lct.Hybrid(0.5, block=2))
    losses = [t.step(x, y).losses for x, y in learnable(8)]
    assert [bool(loss.isfinite().all()) for loss in losses] == [True, True, False, False] * 2


def test_bytes_that_cross_are_counted() -> None:
    t = trainer(lct.LikelihoodRatio(copies=4), 2)
    x, y = learnable(1)[0]
    stats = t.step(x, y)
    crossing = 32 * torch.Size(t.groups[0].shape).numel() * 4
    # The batch without noise to ask and to go on, and four copies.
    assert stats.wire_bytes == 6 * crossing
    assert t.meter.wire_bytes == 6 * crossing
    assert t.meter.feedback_bytes == 5 * 32 * 4


def test_a_batch_with_nan_leaves_no_trace() -> None:
    t = trainer(lct.LikelihoodRatio(copies=4))
    before = nets.state(t)
    x, y = learnable(1)[0]
    for p in t.groups[2].layers.parameters():
        p.data.fill_(float("nan"))
    before = nets.state(t)
    with pytest.raises(lct.NonFiniteError, match="group 1 at batch 0 is NaN"):
        t.step(x, y)
    after = nets.state(t)
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith(("0.", "1.")))


def test_what_does_not_fit_is_refused() -> None:
    for options, message in [
        ({"schedule": "pipelined"}, "likelihood-ratio has no pipelined schedule: .* use lockstep"),
        ({"schedule": lct.Async(5)}, "likelihood-ratio has no async schedule"),
        ({"schedule": lct.Hybrid(0.5, "pipelined")}, "likelihood-ratio has no pipelined schedule"),
        ({"replicas": 2}, "replicas=2 takes the pipelined schedule"),
        (
            {"codec": "int8"},
            "codec: likelihood-ratio sends what crosses as it is, expected none, got int8, int8",
        ),
        ({"codec": "auto"}, "codec: likelihood-ratio sends what crosses as it is"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(lct.LikelihoodRatio(), **options)
    with pytest.raises(ValueError, match="does not work through batch norm, got conv1.norm"):
        trainer(lct.LikelihoodRatio(), spec="digits_cnn:width=0.125")
    t = trainer(lct.LikelihoodRatio("logits"), compile=True)
    with pytest.raises(ValueError, match="noise='logits' goes into single layers.*use compile=False"):
        t.step(*learnable(1)[0])
