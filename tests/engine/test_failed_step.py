"""A step that fails: what it leaves behind, and how training goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lct_fast as lct
from lct_fast.engine import checkpoint
from lct_fast.engine.worker import Worker
from tests.engine import nets


def _train(trainer: lct.Trainer, batches: list[tuple[Tensor, Tensor]]) -> list[lct.Stats]:
    return [trainer.step(x, y) for x, y in batches]


def _fail_once(worker: Worker, at: int) -> None:
    """The group's forward and backward of batch ``at`` run, and then there is an error, once."""
    compute = worker.compute
    failed: list[int] = []

    def computed(batch: int, *more: Any, **options: Any) -> Any:
        result = compute(batch, *more, **options)
        if batch == at and not failed:
            failed.append(at)
            raise RuntimeError("a layer failed")
        return result

    worker.compute = computed  # type: ignore[method-assign]


@pytest.mark.parametrize("delay", [0, 2])
def test_lockstep_goes_on_behind_a_step_that_failed(delay: int) -> None:
    trainer = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic(), feedback_delay=delay)
    batches = nets.batches(8)
    _train(trainer, batches[:3])
    _fail_once(trainer.workers[2], at=3)
    with pytest.raises(RuntimeError, match="a layer failed"):
        trainer.step(*batches[3])
    # Groups 1 and 2 had kept what their critics need of the batch, and are owed nothing for it.
    assert [[p.batch for p in w.feedback.pending] for w in trainer.workers[:3]] == [[1, 2][2 - delay :]] * 3
    for x, y in batches[4:]:
        trainer.step(x[:9], y[:9])
    trainer.flush()
    assert trainer.batch == 7 and not any(w.feedback.pending for w in trainer.workers)


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined", lct.Hybrid(0.5, block=1, microbatches=2)])
def test_a_group_that_fails_leaves_no_gradient_and_is_named(schedule: str | lct.Hybrid) -> None:
    trainer = lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), schedule=schedule)
    trainer.step(*nets.batches(1)[0])
    failing = trainer.groups[0].layers.get_submodule("conv2")
    failing.register_full_backward_hook(_raise)
    with pytest.raises(RuntimeError, match="a layer failed") as caught:
        trainer.step(*nets.batches(1)[0])
    assert all(p.grad is None for g in trainer.groups for p in g.parameters())
    if isinstance(schedule, str):
        assert caught.value.__notes__ == ["in group 1 at batch 1, input float32 [16, 1, 8, 8]"]


def _raise(*anything: object) -> None:
    raise RuntimeError("a layer failed")


@pytest.mark.parametrize("method", [lct.LocalCritic, lct.Greedy])
def test_a_pipeline_that_lost_batches_goes_on_from_a_checkpoint_only(
    method: type[lct.Method], tmp_path: Path
) -> None:
    batches = nets.batches(12)
    trainer = lct.Trainer(nets.groups(method()), method(), schedule="pipelined")
    _train(trainer, batches[:5])
    path = checkpoint.save(trainer, tmp_path)
    _train(trainer, batches[5:])
    trainer.flush()
    after = nets.state(trainer)

    _fail_once(trainer.workers[2], at=13)
    with pytest.raises(RuntimeError, match="a layer failed"):
        _train(trainer, batches)
    for refused in (
        lambda: trainer.step(*batches[0]),
        trainer.flush,
        lambda: checkpoint.save(trainer, tmp_path),
    ):
        with pytest.raises(RuntimeError, match="an earlier step failed.* load a checkpoint"):
            refused()
    assert trainer.evaluate(batches) is not None, "what was trained so far can be looked at"
    checkpoint.load(trainer, path)
    again = _train(trainer, batches[5:])
    trainer.flush()
    assert nets.same(nets.state(trainer), after)
    assert [s.batch for s in again] == [-1, -1, -1, *range(5, 9)]
    # Batches from before a checkpoint is loaded are told no more.
    checkpoint.load(trainer, path)
    assert trainer.step(*batches[5]).batch == -1


def test_a_pipeline_loses_nothing_by_a_batch_that_group_1_refuses() -> None:
    batches = nets.batches(6)
    trainer = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic(), schedule="pipelined")
    undisturbed = lct.Trainer(nets.groups(lct.LocalCritic()), lct.LocalCritic(), schedule="pipelined")
    _train(undisturbed, batches)
    _train(trainer, batches[:3])
    with pytest.raises(RuntimeError, match="channels"):
        trainer.step(torch.randn(16, 2, 8, 8), batches[0][1])
    _train(trainer, batches[3:])
    for each in (trainer, undisturbed):
        each.flush()
    assert nets.same(nets.state(trainer), nets.state(undisturbed))
