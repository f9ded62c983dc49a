"""Layer-parallel training with auxiliary nets in place of a store (arXiv 2112.05387)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lct_fast as lct
from lct_fast.engine import checkpoint
from lct_fast.engine.storage.predictor import Predictor
from lct_fast.methods.auxiliary import AuxiliaryNet
from tests.engine import nets

WARM_UP = 4


def trainer(**options: Any) -> lct.Trainer:
    torch.manual_seed(0)
    method = lct.LayerParallel(beta=0.1, auxiliary=True, auxiliary_warm_up=WARM_UP)
    cut = nets.groups(method, 3)
    torch.manual_seed(17)
    options = {"feedback_delay": 2} | options
    return lct.Trainer(cut, method, optimizer=lambda p: torch.optim.SGD(p, 0.005, 0.9), **options)


def predictors(run: lct.Trainer) -> list[Predictor]:
    return [w.store for w in run.workers if isinstance(w.store, Predictor)]


def learned(run: lct.Trainer) -> dict[str, Tensor]:
    return {
        f"{k}.{n}": t.clone() for k, p in enumerate(predictors(run)) for n, t in p.net.state_dict().items()
    }


def test_lambda_comes_from_a_forward_pass_and_then_from_the_net() -> None:
    run = trainer(feedback_delay=0)
    assert [p.shape for p in predictors(run)] == [tuple(g.shape) for g in run.groups[:-1]]
    first: list[float] = []
    for x, y in nets.batches(WARM_UP + 2):
        # No samples' numbers are needed.
        first.append(float(run.step(x, y).losses[0]))
    assert first[:WARM_UP] == [0.0] * WARM_UP and all(loss > 0 for loss in first[WARM_UP:])


def test_the_net_learns_what_the_state_would_become() -> None:
    torch.manual_seed(0)
    method = lct.LayerParallel(auxiliary=True, auxiliary_warm_up=1)
    predictor = Predictor(method, (1, 8, 8), (4, 8, 8), torch.device("cpu"), 3)
    x = torch.randn(16, 1, 8, 8)
    wanted = torch.nn.functional.conv2d(x, torch.randn(4, 1, 3, 3), padding=1)
    assert not predictor.read(x).known.any()
    predictor.write(x, {"lambda": wanted})
    before = float((predictor.read(x).tensors["lambda"] - wanted).square().mean())
    for _ in range(200):
        predictor.write(x, {"lambda": wanted})
    state = predictor.read(x)
    assert bool(state.known.all())
    assert float((state.tensors["lambda"] - wanted).square().mean()) < 0.2 * before
    predictor.forget()
    assert predictor.era == 1 and not predictor.read(x).known.any()


def test_pipelined_is_lockstep_with_the_same_delay() -> None:
    found = []
    for schedule in ("lockstep", "pipelined"):
        run = trainer(schedule=schedule)
        x = torch.empty(16, 1, 8, 8)
        for data, y in nets.batches(10):
            # The caller may write over the batch when step has returned.
            run.step(x.copy_(data), y)
        run.drain()
        run.flush()
        found.append((nets.state(run), learned(run)))
    (a, b), (c, d) = found
    assert nets.same(a, c) and nets.same(b, d)
    assert not nets.same(b, learned(trainer()))


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_resumed_is_uninterrupted(schedule: str, tmp_path: Path) -> None:
    batches, whole, first = nets.batches(12), trainer(schedule=schedule), trainer(schedule=schedule)
    for run, part in ((whole, batches), (first, batches[:7])):
        for x, y in part:
            run.step(x, y)
    second = trainer(schedule=schedule)
    checkpoint.load(second, checkpoint.save(first, tmp_path))
    for x, y in batches[7:]:
        second.step(x, y)
    whole.drain()
    second.drain()
    assert nets.same(nets.state(whole), nets.state(second)) and nets.same(learned(whole), learned(second))


def test_serial_blocks_begin_a_warm_up() -> None:
    run = trainer(schedule=lct.Hybrid(serial=0.2, block=2), feedback_delay=0)
    first = [float(run.step(x, y).losses[0]) for x, y in nets.batches(16)]
    zero = [i for i, loss in enumerate(first) if loss == 0.0]
    # Batches 8 and 9 are serial: the others' losses are not known there.
    assert zero == [0, 1, 2, 3, 10, 11, 12, 13]


def test_shapes() -> None:
    assert AuxiliaryNet((3, 32, 32), (16, 8, 8))(torch.zeros(2, 3, 32, 32)).shape == (2, 16, 8, 8)
    assert AuxiliaryNet((3, 8, 8), (20,))(torch.zeros(2, 3, 8, 8)).shape == (2, 20)
    with pytest.raises(ValueError, match=r"make feature maps \(4, 8, 8\) of images.*is \(10,\)"):
        AuxiliaryNet((10,), (4, 8, 8))


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match="foretell lambda, not multipliers: use them with the penalty method"
    ):
        lct.LayerParallel("augmented_lagrangian", auxiliary=True)
    with pytest.raises(ValueError, match="auxiliary_warm_up: expected a number of batches >= 1, got 0"):
        lct.LayerParallel(auxiliary=True, auxiliary_warm_up=0)
