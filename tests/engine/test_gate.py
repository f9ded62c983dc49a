"""A batch whose loss or gradients are NaN or Inf leaves no trace, and the error that comes later names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lct_fast as lct
from lct_fast.engine.cuda.gate import LATE, Gate
from lct_fast.engine.finite import all_finite
from lct_fast.engine.schedules.graphs import WARM_UP
from tests.engine import nets, test_streams
from tests.engine.fake_device import Machine
from tests.engine.test_streams import machine as machine

BAD = 4


class Marking(nn.Module):
    """Adds 100 to its output where a value exceeds 50, and nothing else of that shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.clamp(-5, 5)) + 100.0 * (x.abs().amax() > 50)


class Burst(nn.Module):
    """Passes images on; where a value exceeds 50, ``forward`` makes NaN, or ``backward`` does."""

    def __init__(self, unit: nn.Module, backward: bool) -> None:
        super().__init__()
        self.unit, self.backward = unit, backward

    def forward(self, x: Tensor) -> Tensor:
        sound = (x.abs().amax() <= 50).float()
        # 0 / 0 is NaN.
        bad = sound / sound
        y = self.unit(x.clamp(-5, 5))
        if self.backward:
            return _Spoilt.apply(y, bad)
        return y * bad


class _Spoilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bad: Tensor) -> Tensor:
        ctx.save_for_backward(bad)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g * ctx.saved_tensors[0], None


class Counting(torch.optim.SGD):
    """Counts its steps on the host, as Adam does on a GPU when it is neither fused nor capturable."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1
        return super().step(closure)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "fused adam": lambda p: torch.optim.Adam(p, 1e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "counting": lambda p: Counting(p, 0.05),
}


class Deep(nn.Sequential):
    """Cut at 1 and 2, the second group bursts."""

    def __init__(self, backward: bool) -> None:
        units = [
            Marking(),
            Burst(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()), backward),
            nn.Conv2d(4, 2, 3, padding=1),
            nn.Flatten(),
            nn.Linear(128, 5),
        ]
        super().__init__(*units)


def build(
    optimizer: str, backward: bool = False, method: lct.Method | None = None, **options: Any
) -> lct.Trainer:
    torch.manual_seed(3)
    groups = lct.split(
        Deep(backward),
        example_input=torch.zeros(4, 1, 8, 8),
        split_points=["1", "2"],
        critic="pooled_linear:pool=2",
    )
    trainer = lct.Trainer(groups, method or lct.LocalCritic(), optimizer=OPTIMIZERS[optimizer], **options)
    for k, worker in enumerate(trainer.workers):
        worker.gate = Gate(k, worker.device)
    return trainer


def batches(count: int, bad: int = BAD) -> list[tuple[Tensor, Tensor]]:
    found = nets.batches(count)
    found[bad] = (found[bad][0] * 100, found[bad][1])
    return found


def all_of(trainer: lct.Trainer, k: int) -> dict[str, Any]:
    """Copies of everything that a step of group k may change, but its critic's."""
    worker = trainer.workers[k]
    found: dict[str, Any] = {f"group.{n}": t.clone() for n, t in worker.group.layers.state_dict().items()}
    assert worker.optimizer is not None
    for i, state in worker.optimizer.state_dict()["state"].items():
        found |= {f"{i}.{n}": v.clone() if isinstance(v, Tensor) else v for n, v in state.items()}
    return found


def critic_of(trainer: lct.Trainer, k: int) -> dict[str, Any]:
    worker = trainer.workers[k]
    found: dict[str, Any] = {n: t.clone() for n, t in worker.critic.state_dict().items()}
    assert worker.critic_optimizer is not None
    for i, state in worker.critic_optimizer.state_dict()["state"].items():
        found |= {f"{i}.{n}": v.clone() for n, v in state.items() if isinstance(v, Tensor)}
    return found


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[n]) if isinstance(v, Tensor) else v == b[n] for n, v in a.items()
    )


@pytest.mark.parametrize("backward", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_bad_batch_leaves_no_trace_and_is_named_two_batches_later(optimizer: str, backward: bool) -> None:
    trainer, data = build(optimizer, backward), batches(BAD + LATE + 1)
    for x, y in data[:BAD]:
        trainer.step(x, y)
    before = [all_of(trainer, k) for k in range(3)]
    critics = [critic_of(trainer, k) for k in range(2)]
    trainer.step(*data[BAD])
    if optimizer != "counting":
        # What the host counts is put back with the error.
        assert equal(before[1], all_of(trainer, 1))
    assert equal(critics[1], critic_of(trainer, 1))
    # The group before it is sound, and goes on; its critic learns nothing from a loss that is none.
    assert not equal(before[0], all_of(trainer, 0))
    assert equal(critics[0], critic_of(trainer, 0)) is not backward
    for x, y in data[BAD + 1 : BAD + LATE]:
        trainer.step(x, y)
    assert not equal(critics[0], critic_of(trainer, 0))
    with pytest.raises(lct.NonFiniteError, match=f"gradient of group 2 at batch {BAD} is NaN or Inf"):
        trainer.step(*data[BAD + LATE])
    assert equal(before[1], all_of(trainer, 1)) and equal(critics[1], critic_of(trainer, 1))


@pytest.mark.parametrize("optimizer", ["sgd", "fused sgd", "fused adam"])
def test_the_very_first_batch_may_be_bad(optimizer: str) -> None:
    trainer = build(optimizer)
    first = {n: t.clone() for n, t in trainer.workers[1].group.state_dict().items()}
    for x, y in batches(LATE, bad=0):
        trainer.step(x, y)
    assert nets.same(first, dict(trainer.workers[1].group.state_dict()))
    assert trainer.workers[1].optimizer is not None
    for state in trainer.workers[1].optimizer.state.values():
        # State that was made on the way stands for none.
        assert all(not v.any() for v in state.values() if isinstance(v, Tensor))


def test_training_goes_on_after_the_error() -> None:
    """Whoever catches it: the flags are down again."""
    trainer, data = build("fused sgd"), batches(12)
    for x, y in data[: BAD + LATE]:
        trainer.step(x, y)
    with pytest.raises(lct.NonFiniteError):
        trainer.step(*data[6])
    before = all_of(trainer, 1)
    for x, y in data[6:]:
        trainer.step(x, y)
    trainer.flush()
    assert not equal(before, all_of(trainer, 1))


@pytest.mark.parametrize("call", ["flush", "settle", "drain"])
def test_a_flag_that_nobody_has_read_yet_is_not_lost(call: str) -> None:
    trainer = build("fused sgd")
    for x, y in batches(BAD + 1):
        trainer.step(x, y)
    with pytest.raises(lct.NonFiniteError, match=f"group 2 at batch {BAD}"):
        getattr(trainer, call)()


def test_pipelined_names_the_first_group_that_failed() -> None:
    trainer = build("fused sgd", schedule="pipelined")
    with pytest.raises(lct.NonFiniteError, match=f"group 2 at batch {BAD}"):
        for x, y in batches(20):
            trainer.step(x, y)
    assert trainer.batch == BAD + LATE + 1


def test_accumulated_gradients_are_not_used_either() -> None:
    trainer, data = build("fused sgd", accumulate=2), batches(BAD + 2)
    for x, y in data[:BAD]:
        trainer.step(x, y)
    before = all_of(trainer, 1)
    for x, y in data[BAD:]:
        trainer.step(x, y)
    assert equal(before, all_of(trainer, 1))
    # Group 1's critic has heard of it, and is not the one to blame.
    with pytest.raises(lct.NonFiniteError, match=f"group 2 at batch {BAD}"):
        trainer.settle()


def test_a_sound_run_is_not_changed_by_the_gate() -> None:
    states = []
    for gated in (False, True):
        for optimizer in OPTIMIZERS:
            trainer = build(optimizer)
            for worker in trainer.workers:
                worker.gate = worker.gate if gated else None
            for x, y in nets.batches(5):
                trainer.step(x, y)
            trainer.flush()
            states.append(nets.state(trainer))
    half = len(states) // 2
    assert all(nets.same(a, b) for a, b in zip(states[:half], states[half:], strict=True))


@pytest.mark.parametrize("backward", [False, True])
def test_on_the_host_the_error_comes_at_once(backward: bool) -> None:
    trainer, data = build("sgd", backward), batches(BAD + 2)
    for worker in trainer.workers:
        worker.gate = None
    for x, y in data[:BAD]:
        trainer.step(x, y)
    before = all_of(trainer, 1)
    what = "a gradient" if backward else "the loss"
    with pytest.raises(lct.NonFiniteError, match=f"{what} of group 2 at batch {BAD} is NaN or Inf"):
        trainer.step(*data[BAD])
    # Nor has batch norm seen it; and who leaves the batch out goes on.
    assert equal(before, all_of(trainer, 1))
    assert torch.isfinite(trainer.step(*data[BAD + 1]).losses).all()


def test_the_host_finds_what_is_not_finite() -> None:
    huge = torch.full((4,), 3e38)
    assert all_finite([]) and all_finite([torch.ones(2), torch.ones((), dtype=torch.bfloat16)])
    # The sum is Inf, the values are not.
    assert all_finite([huge, torch.zeros(3)])
    for bad in ("nan", "inf", "-inf"):
        odd = torch.zeros(2, 3)
        odd[1, 1] = float(bad)
        assert not all_finite([torch.zeros(3), odd]) and not all_finite([huge, odd.bfloat16()])
    assert not all_finite([torch.tensor([float("inf"), float("-inf")])])


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
@pytest.mark.parametrize("what", ["input", "label"])
def test_a_batch_that_cannot_be_trained_on_is_left_out_by_every_group(what: str, schedule: str) -> None:
    delay = 0 if schedule == "lockstep" else 1
    trainer = build("fused sgd", schedule=schedule, feedback_delay=delay)
    trainer._check.late = True
    data = nets.batches(BAD + 4)
    x, y = (t.clone() for t in data[BAD])
    if what == "input":
        x[3, 0, 2, 2] = float("nan")
    else:
        y[5] = 7
    data[BAD] = (x, y)
    error, message = {
        "input": (lct.NonFiniteError, f"the input of batch {BAD} holds NaN"),
        "label": (ValueError, rf"label out of range at batch {BAD}: expected 0..4 or -100 \(ignored\)"),
    }[what]
    for x, y in data[:BAD]:
        trainer.step(x, y)
    trainer.settle()
    before = [all_of(trainer, k) for k in range(3)]
    critics = [critic_of(trainer, k) for k in range(2)]
    trainer.step(*data[BAD])
    with pytest.raises(error, match=message):
        trainer.settle()
    assert all(equal(before[k], all_of(trainer, k)) for k in range(3))
    # With a delay the critics have just learned from the batch before.
    assert delay or all(equal(critics[k], critic_of(trainer, k)) for k in range(2))
    # It is nobody's fault but the batch's: no group is broken, and the next batch is learned from.
    trainer.step(*data[BAD + 1])
    trainer.flush()
    assert not any(equal(before[k], all_of(trainer, k)) for k in range(3))


def test_a_bad_batch_in_a_graph(machine: Callable[..., Machine]) -> None:
    under = machine(2)
    bad = WARM_UP + 4
    trainer = build(
        "fused sgd", method=lct.LocalCritic(critic_optimizer=OPTIMIZERS["fused adam"]), feedback_delay=2
    )
    test_streams.place(trainer, under, graphs=True)
    before: dict[str, Any] = {}
    with under, pytest.raises(lct.NonFiniteError, match=f"group 2 at batch {bad} "):
        for t, (x, y) in enumerate(batches(30, bad)):
            if t == bad:
                trainer.settle()
                before = all_of(trainer, 1)
            with under.step():
                trainer.step(x + 0, y + 0)
    assert under.replays and equal(before, all_of(trainer, 1))
