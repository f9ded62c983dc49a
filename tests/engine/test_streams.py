"""The schedule of one process on devices that check its order: whatever may run at once, and the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import lct_fast as lct
from lct_fast.codecs import vector_quantization
from lct_fast.engine import batch_check, gate
from lct_fast.engine.gate import Gate
from lct_fast.engine.graphs import WARM_UP
from lct_fast.engine.ticks import Ticks
from tests.engine import nets
from tests.engine.fake_device import FakeLate, Machine
from tests.engine.pipelined_cases import Case

BATCHES = 16
MIDDLE = 9


# Rates that fp32 holds exactly, as a graph's are fp32 tensors.
def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, 0.125, momentum=0.5, fused=True)


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 2**-10, fused=True)


def _halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def _local_critic(**options: Any) -> Callable[[], lct.Method]:
    return lambda: lct.LocalCritic(critic_optimizer=_adam, **options)


CASES = {
    "greedy": Case(lct.Greedy, "mlp_aux", {"scheduler": _halving}),
    **{f"delay {d}": Case(_local_critic(), options={"feedback_delay": d}) for d in (1, 2, 3, 4)},
    "every second, dropout, int4": Case(
        _local_critic(critic_every=2, loss="one_sided"),
        "conv_fc:convs=1,filters=4",
        {"codec": "int4:32", "clip_norm": 1.0},
        dropout=True,
    ),
    "vector-quantised": Case(_local_critic(), options={"codec": "vq:16,2"}),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, threads: None) -> Iterator[Callable[..., Machine]]:
    """Makes machines whose late numbers are read as on a device."""

    def make(count: int = 1, peers: bool = True) -> Machine:
        made = Machine(count, peers=peers)
        late = type("MachineLate", (FakeLate,), {"machine": made})
        for module in (batch_check, gate, vector_quantization):
            monkeypatch.setattr(module, "Late", late)
        return made

    yield make


def on_machine(case: Case, count: int, machine: Machine, graphs: bool | None = None) -> lct.Trainer:
    """The case's trainer, its groups spread over the machine's devices."""
    case = Case(case.method, case.critic, {"optimizer": _sgd} | case.options, case.dropout)
    trainer = case.trainer(count, "pipelined")
    place(trainer, machine, graphs)
    return trainer


def place(trainer: lct.Trainer, machine: Machine, graphs: bool | None = None) -> None:
    """Spreads the trainer's groups over the machine's devices."""
    trainer._check.late = True
    places, count = machine.devices, len(trainer.workers)
    for k, worker in enumerate(trainer.workers):
        worker.gate = Gate(k, worker.device)
        worker.device = places[k * len(places) // count].device
    trainer._run = Ticks(trainer.workers, graphs, lambda place: places[place.index or 0])


def train(trainer: lct.Trainer, machine: Machine) -> dict[str, Any]:
    """All batches under the machine's eyes, an evaluation and a new learning rate in the middle."""
    batches = nets.batches(BATCHES)
    stats = []
    with machine:
        for t, (x, y) in enumerate(batches):
            if t == MIDDLE:
                stats += trainer.drain()
                middle = trainer.evaluate(batches[:2])
                trainer.set_learning_rate(2**-6)
            # The caller's own work on the device; it is free to forget the batch.
            x, y = x + 0, y + 0
            with machine.step():
                stats.append(trainer.step(x, y))
            machine.warm = t >= len(trainer.workers)
        stats += trainer.drain()
        trainer.flush()
        finished = [s for s in stats if s.batch >= 0]
        losses = torch.stack([s.losses for s in finished])
    assert [s.batch for s in finished] == list(range(BATCHES))
    return {
        "weights": nets.state(trainer),
        "losses": losses,
        "middle": middle,
        "feedback": trainer.meter.feedback_bytes,
        "wire": trainer.meter.wire_bytes,
        "samples": trainer.meter.groups[-1].samples,
    }


def lockstep(case: Case, count: int) -> dict[str, Any]:
    """The same by the schedule that all else is held against, on the plain CPU."""
    case = Case(case.method, case.critic, {"optimizer": _sgd} | case.options, case.dropout)
    trainer = case.trainer(count, "lockstep")
    batches = nets.batches(BATCHES)
    stats = [trainer.step(x, y) for x, y in batches[:MIDDLE]]
    middle = trainer.evaluate(batches[:2])
    trainer.set_learning_rate(2**-6)
    stats += [trainer.step(x, y) for x, y in batches[MIDDLE:]]
    trainer.flush()
    return {
        "weights": nets.state(trainer),
        "losses": torch.stack([s.losses for s in stats]),
        "middle": middle,
        "feedback": trainer.meter.feedback_bytes,
        "wire": trainer.meter.wire_bytes,
        "samples": trainer.meter.groups[-1].samples,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert nets.same(a["weights"], b["weights"])
    assert torch.equal(a["losses"], b["losses"])
    for name in ("middle", "feedback", "wire", "samples"):
        assert a[name] == b[name], name


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("places", [1, 2])
@pytest.mark.parametrize("name", list(CASES))
def test_the_order_is_right_and_the_bits_are_lockstep_s(
    name: str, places: int, graphs: bool, machine: Callable[..., Machine]
) -> None:
    under = machine(places)
    trainer = on_machine(CASES[name], 4, under, graphs)
    result = train(trainer, under)
    same(result, lockstep(CASES[name], 4))
    assert all(w.eager_because is None for w in trainer.workers)
    # Training, and with feedback a critic's update, in most steps behind the warm-up.
    learners = 0 if name == "greedy" else 3
    most = (BATCHES - WARM_UP) * 4 + learners * (BATCHES - WARM_UP - 2 * WARM_UP)
    assert under.replays == 0 if not graphs else under.replays >= most * 0.5


@pytest.mark.parametrize("count", [2, 3])
def test_other_numbers_of_groups(count: int, machine: Callable[..., Machine]) -> None:
    under = machine(2)
    same(train(on_machine(CASES["delay 3"], count, under, True), under), lockstep(CASES["delay 3"], count))


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_devices_that_cannot_reach_each_other_copy_through_the_host(
    graphs: bool, machine: Callable[..., Machine]
) -> None:
    under = machine(2, peers=False)
    trainer = on_machine(CASES["delay 3"], 4, under, graphs)
    same(train(trainer, under), lockstep(CASES["delay 3"], 4))
    run = trainer._run
    assert isinstance(run, Ticks)
    assert [r.staged for r in run.forward[1:] if r] == [False, True, False]
