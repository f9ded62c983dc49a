"""Serial steps: ordinary back-propagation by the groups' own optimisers, the same bits under every schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lct_fast as lct
from lct_fast.engine import checkpoint
from lct_fast.engine.schedules.serial import Part
from tests.engine import nets
from tests.engine.pipelined_cases import (
    MIDDLE,
    Case,
    _adam,
    _halving,
    run_processes,
    train_as_rank,
    train_here,
)

# Batches 2, 3, 6, 7 are serial; the middle of a case lies between blocks.
BETWEEN = lct.Hybrid(0.5, block=2)
# Batches 3, 4, 5; the middle lies inside the block.
INSIDE = lct.Hybrid(0.5, block=3, microbatches=4)

CASES = {
    "vector-quantised": Case(lct.LocalCritic, options={"codec": "vq:16,2"}, hybrid=BETWEEN),
    "greedy, in microbatches": Case(
        lct.Greedy,
        "mlp_aux",
        {"clip_norm": 1.0, "optimizer": _adam, "scheduler": _halving},
        dropout=True,
        hybrid=INSIDE,
    ),
    "everything": Case(
        lct.LocalCritic,
        "conv_fc:convs=2,filters=4",
        {
            "feedback_delay": 2,
            "accumulate": 2,
            "channels_last": True,
            "autocast": torch.bfloat16,
            "codec": "int4:32",
        },
        hybrid=lct.Hybrid(0.5, block=3, microbatches=2),
    ),
}


def _plain_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def _trainer(method: lct.Method, hybrid: lct.Hybrid, critic: str = "pooled_linear", **options: Any) -> Any:
    return lct.Trainer(nets.groups(method, critic=critic), method, schedule=hybrid, **options)


def test_a_period_ends_in_a_block_and_holds_the_share_exactly() -> None:
    hybrid = lct.Hybrid(0.1, block=16)
    assert hybrid.period == 160
    assert [t for t in range(320) if hybrid.is_serial(t)] == [*range(144, 160), *range(304, 320)]
    for serial, block in [(0.03, 16), (0.25, 1), (0.5, 7), (0.9, 30)]:
        hybrid = lct.Hybrid(serial, block=block)
        count = sum(map(hybrid.is_serial, range(3 * hybrid.period)))
        assert count == 3 * block and hybrid.share == block / hybrid.period
        assert hybrid.share == pytest.approx(serial, rel=0.5 / hybrid.period)
    never = lct.Hybrid(0)
    assert not any(map(never.is_serial, range(500))) and never.share == 0


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_are_those_of_plain_autograd(
    schedule: str, microbatches: int, soft: bool, threads: None
) -> None:
    """In float64, with labels that carry no loss in one microbatch only."""
    x, y = nets.batches(1)[0]
    x, target = x.double(), y.clone()
    target[:3] = -100
    if soft:
        target = torch.rand(16, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = nets.net().double()
    groups = lct.split(
        model,
        example_input=torch.zeros(4, 1, 8, 8).double(),
        critic="pooled_linear",
        split_points=lct.models.default_splits("digits_cnn", 4),
    )
    trainer = lct.Trainer(
        groups,
        lct.Greedy(),
        schedule=lct.Hybrid(0.5, schedule, 1, microbatches),
        optimizer=_plain_sgd,
    )
    trainer.batch = 1
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stats = trainer.step(x, target)

    reference = nets.net().double().train()
    total = torch.zeros((), dtype=torch.float64)
    for rows, labels in zip(x.chunk(microbatches), target.chunk(microbatches), strict=True):
        total = total + F.cross_entropy(reference(rows), labels, reduction="sum")
    total = total / (16 if soft else 13)
    total.backward()
    for name, parameter in reference.named_parameters():
        moved = before[name] - model.get_parameter(name).detach()
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
        # The factor 1 / 13 of the mean is fp32.
        assert torch.allclose(moved, parameter.grad, rtol=1e-7, atol=1e-9), name
    for name, buffer in reference.named_buffers():
        assert torch.allclose(model.get_buffer(name), buffer), name
    assert stats.batch == 1 and stats.losses[:-1].isnan().all()
    assert float(stats.losses[-1]) == pytest.approx(total.item(), rel=1e-6)


def test_what_crosses_has_one_layout(threads: None) -> None:
    """Kernels choose by strides, also by those of sizes of 1, and a process receives into a contiguous tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 5)
    )
    groups = lct.split(
        model, example_input=torch.zeros(4, 1, 8, 8), split_points=["2"], critic="pooled_linear"
    )
    trainer = lct.Trainer(groups, lct.Greedy(), schedule=BETWEEN, channels_last=True)
    x = nets.batches(1)[0][0]
    assert groups[0].layers(trainer.workers[0].place(x)).stride() != (8, 1, 1, 1)
    part = Part(trainer.workers[0])
    assert part(x).stride() == part.trial(x).stride() == (8, 1, 1, 1)


@pytest.mark.parametrize("method", [lct.Greedy, lct.LocalCritic])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_critics_stand_still_in_serial_steps(method: type[lct.Method], optimizer: str, threads: None) -> None:
    """Greedy's critics share their group's optimiser; its momentum and weight decay must not move them."""

    def make(params: Any) -> torch.optim.Optimizer:
        if optimizer == "adam":
            return torch.optim.AdamW(params, 1e-2, weight_decay=0.1)
        return torch.optim.SGD(params, 0.05, 0.9, weight_decay=0.1)

    trainer = _trainer(method(), lct.Hybrid(0.5, block=4), "conv_fc:convs=1,filters=4", optimizer=make)
    batches = nets.batches(9)
    for x, y in batches[:4]:
        trainer.step(x, y)
    critics, optimizers = _critics(trainer), _critic_state(trainer)
    assert any(t.abs().sum() > 0 for t in optimizers.values()), "there is momentum to forget about"
    layers = {k: p.detach().clone() for k, p in enumerate(_layer_parameters(trainer))}
    for x, y in batches[4:8]:
        trainer.step(x, y)
    assert nets.same(critics, _critics(trainer))
    assert nets.same(optimizers, _critic_state(trainer))
    assert not any(torch.equal(layers[k], p) for k, p in enumerate(_layer_parameters(trainer)))
    trainer.step(*batches[8])
    assert not nets.same(critics, _critics(trainer)), "they go on learning afterwards"


def _critics(trainer: lct.Trainer) -> dict[str, Tensor]:
    """Of all groups but the last, whose head is the network's own."""
    return {
        f"{k}.{n}": t.clone()
        for k, g in enumerate(trainer.groups[:-1])
        for n, t in g.critic.state_dict().items()
    }


def _critic_state(trainer: lct.Trainer) -> dict[str, Tensor]:
    """What optimisers keep for the critics' parameters."""
    found = {}
    for worker in trainer.workers[:-1]:
        for name, parameter in worker.group.critic.named_parameters():
            for kind in (worker.optimizer, worker.critic_optimizer):
                for key, value in (kind.state.get(parameter, {}) if kind else {}).items():
                    if isinstance(value, Tensor):
                        found[f"{worker.index}.{name}.{key}"] = value.clone()
    return found


def _layer_parameters(trainer: lct.Trainer) -> list[Tensor]:
    return [p for g in trainer.groups for p in g.layers.parameters()]


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_feedback_on_its_way_is_applied_at_its_batch(schedule: str, threads: None) -> None:
    trainer = _trainer(lct.LocalCritic(), lct.Hybrid(0.5, schedule, block=4), feedback_delay=3)
    batches = nets.batches(9)
    for x, y in batches[:4]:
        trainer.step(x, y)
    trainer.settle()
    first = trainer.workers[0]
    for t in range(4, 8):
        before = _critics(trainer)
        trainer.step(*batches[t])
        assert [p.batch for p in first.feedback.pending] == [b for b in range(4) if b > t - 3]
        # Batch 0 was applied at batch 3, so batches 1, 2, 3 are at 4, 5, 6 and none at 7.
        assert nets.same(before, _critics(trainer)) == (t == 7)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", list(CASES))
def test_pipelined_in_one_process_equals_lockstep(name: str, count: int, threads: None) -> None:
    _same(train_here(CASES[name], count), train_here(CASES[name], count, "pipelined"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_over_processes_equals_lockstep_and_resumes(count: int, tmp_path: Path, threads: None) -> None:
    """Bit for bit: torch's schedules hand on the gradients of microbatches in order, as one process does."""
    results = run_processes(_every_case, count, str(tmp_path), timeout=280)
    for name, case in CASES.items():
        expected = train_here(case, count)
        for rank, result in enumerate(results):
            assert nets.same(result[name]["weights"], expected["weights"]), (name, rank)
            assert nets.same(result[name]["resumed"], expected["weights"]), (name, rank, "resumed")
        _same(expected, results[-1][name])


def _every_case(folder: str) -> dict[str, Any]:
    count = dist.get_world_size()
    return {name: train_as_rank(case, count, Path(folder) / name) for name, case in CASES.items()}


def _same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert nets.same(a["weights"], b["weights"])
    assert torch.allclose(a["losses"], b["losses"], rtol=0, atol=0, equal_nan=True)
    assert a["middle"] == b["middle"]
    assert a["feedback"] == b["feedback"] and a["wire"] == b["wire"]


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
@pytest.mark.parametrize("hybrid", [BETWEEN, INSIDE], ids=["between blocks", "inside a block"])
def test_resumed_in_one_process_equals_uninterrupted(
    hybrid: lct.Hybrid, schedule: str, tmp_path: Path, threads: None
) -> None:
    case = Case(lct.LocalCritic, options={"codec": "vq:16,2"}, dropout=True, hybrid=hybrid)
    batches = nets.batches(9)
    whole = case.trainer(4, schedule)
    for x, y in batches[:MIDDLE]:
        whole.step(x, y)
    checkpoint.save(whole, tmp_path)
    resumed = case.trainer(4, schedule, seed=5)
    checkpoint.load(resumed, tmp_path / f"step-{MIDDLE:08d}")
    for trainer in (whole, resumed):
        for x, y in batches[MIDDLE:]:
            trainer.step(x, y)
        trainer.flush()
    assert nets.same(nets.state(whole), nets.state(resumed))
    assert whole.meter.serial_steps == resumed.meter.serial_steps > 0
    assert whole.meter.serial_bytes == resumed.meter.serial_bytes


def test_a_share_of_0_is_the_plain_schedule_and_another_is_not(threads: None) -> None:
    plain = train_here(Case(lct.Greedy), 4)
    _same(plain, train_here(Case(lct.Greedy, hybrid=lct.Hybrid(0)), 4))
    assert not nets.same(plain["weights"], train_here(Case(lct.Greedy, hybrid=BETWEEN), 4)["weights"])


def test_bytes_and_steps_are_counted(threads: None) -> None:
    trainer = _trainer(lct.Greedy(), BETWEEN, codec="int8:32")
    plain = lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), codec="int8:32")
    for x, y in nets.batches(8):
        stats = trainer.step(x, y)
        plain.step(x, y)
    meter = trainer.meter
    once = 16 * 4 * sum(math.prod(g.shape) for g in trainer.groups[:-1])
    # Forward and back, uncoded, on 4 batches of 8.
    assert stats.wire_bytes == 2 * once and meter.serial_bytes == 4 * 2 * once
    assert meter.wire_bytes == plain.meter.wire_bytes // 2 + meter.serial_bytes
    assert meter.raw_bytes == plain.meter.raw_bytes == 8 * once
    assert (meter.samples, meter.serial_steps) == (128, 4) and meter.serial_seconds > 0
    assert meter.groups[0].count == 4, "serial steps are no ticks"


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_losses_come_in_order_while_a_pipeline_drains(schedule: str, threads: None) -> None:
    trainer = _trainer(lct.Greedy(), lct.Hybrid(0.5, schedule, block=3))
    stats = [trainer.step(x, y) for x, y in nets.batches(13)] + trainer.drain()
    finished = [s for s in stats if s.batch >= 0]
    assert [s.batch for s in finished] == list(range(13))
    for s in finished:
        known = ~s.losses.isnan()
        assert known.tolist() == [not trainer.hybrid.is_serial(s.batch)] * 3 + [True]


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("the output", lambda p: p.data.fill_(float("inf"))),
        # Its own alone: its input's gradient, and so those of the groups before it, stay finite.
        ("a gradient", lambda p: p.register_hook(lambda g: g / 0)),
    ],
    ids=["output", "gradient"],
)
@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_nothing_is_updated_after_a_nan(
    schedule: str, what: str, spoil: Callable[[Tensor], object], threads: None
) -> None:
    trainer = _trainer(lct.Greedy(), lct.Hybrid(0.5, schedule, block=1, microbatches=2))
    trainer.batch = 1
    spoil(next(trainer.groups[2].layers.parameters()))
    before = [p.detach().clone() for g in trainer.groups for p in g.parameters()]
    with pytest.raises(lct.NonFiniteError, match=rf"{what} of group 3 at batch 1 \(a serial step\)"):
        trainer.step(*nets.batches(1)[0])
    after = [p for g in trainer.groups for p in g.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after) and trainer.batch == 1


def test_a_loss_that_is_not_finite_names_the_last_group(threads: None) -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none") / 0

    trainer = _trainer(lct.Greedy(), lct.Hybrid(0.5, block=1), loss=loss)
    trainer.batch = 1
    with pytest.raises(lct.NonFiniteError, match="group 4 at batch 1"):
        trainer.step(*nets.batches(1)[0])


@pytest.mark.slow
def test_every_process_hears_of_a_nan_and_of_a_lost_process(threads: None) -> None:
    for output, gradient, lost in run_processes(_fail, 2):
        assert "the output of group 2 at batch 1 (a serial step) holds NaN or Inf" in output
        assert "a gradient of group 2 at batch 1 (a serial step) holds NaN or Inf" in gradient
        assert "lost" in lost or lost == "was lost"


def _fail() -> list[str]:
    messages = []
    case = Case(lct.Greedy, hybrid=lct.Hybrid(0.5, block=1))
    for spoil in (lambda p: p.data.fill_(float("inf")), lambda p: p.register_hook(lambda g: g / 0)):
        trainer = case.trainer(2, "pipelined")
        trainer.batch = 1
        own = list(trainer.groups[dist.get_rank()].parameters())
        if trainer.last:
            spoil(own[0])
        before = [p.detach().clone() for p in own]
        with pytest.raises(lct.NonFiniteError) as caught:
            if trainer.last:
                list(trainer.events())
            else:
                trainer.step(*nets.batches(1)[0])
        messages.append(str(caught.value))
        assert all(torch.equal(a, b) for a, b in zip(before, own, strict=True))
    trainer = case.trainer(2, "pipelined")
    if trainer.last:
        next(trainer.events())
        dist.destroy_process_group(trainer._run.serial.process_group)
        return [*messages, "was lost"]
    trainer.step(*nets.batches(1)[0])
    with pytest.raises(lct.PeerError) as lost:
        trainer.step(*nets.batches(1)[0])
    return [*messages, str(lost.value)]


def test_refusals_name_the_cause(threads: None) -> None:
    for arguments, message in [
        ({"serial": 1.0}, "serial: expected a share 0 <= q < 1, got 1.0"),
        ({"serial": -0.1}, "serial: expected a share"),
        ({"serial": float("nan")}, "serial: expected a share 0 <= q < 1, got nan"),
        ({"serial": True}, "serial: expected a share 0 <= q < 1, got True"),
        ({"serial": 0.99}, "leaves no other batches"),
        ({"schedule": "async"}, "schedule of a Hybrid: expected lockstep or pipelined, got 'async'"),
        ({"block": 0}, "block: expected an integer >= 1, got 0"),
        ({"block": 2.0}, "block: expected an integer >= 1, got 2.0"),
        ({"microbatches": 0}, "microbatches: expected an integer >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            lct.Hybrid(**arguments)
    with pytest.raises(ValueError, match="backprop has no Hybrid: all of its batches are serial"):
        lct.Trainer(nets.groups(lct.Backprop()), lct.Backprop(), schedule=lct.Hybrid())
    trainer = _trainer(lct.Greedy(), lct.Hybrid(0.1, microbatches=3))
    # Before the first serial batch, so that no work is lost.
    with pytest.raises(ValueError, match="16 samples cannot be cut into 3 equal microbatches"):
        trainer.step(*nets.batches(1)[0])
