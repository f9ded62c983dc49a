"""The simulation of asynchronous groups: whose turn it is, what a turn does, and the same bits every time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lct_fast as lct
from lct_fast.engine import checkpoint
from lct_fast.engine.schedules.asynchronous import Asynchronous
from lct_fast.engine.schedules.turns import Turns
from tests.engine import nets
from tests.engine.pipelined_cases import Case

STEPS = 20
# Options that are the schedule's own.
PACE = {f.name for f in fields(lct.Async)}


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 1e-3)


def _scheduler(kind: str) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    made = {
        "step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [8], 0.1),
        "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, STEPS + 1, cycle_momentum=False),
    }
    return made[kind]


def _trainer(seed: int = 0, count: int = 4, **options: Any) -> lct.Trainer:
    pace = {name: options.pop(name) for name in PACE & options.keys()}
    case = Case(lct.Greedy, options={"feedback_delay": 0} | options)
    return case.trainer(count, lct.Async(**{"steps": STEPS} | pace), seed)


def _batches(start: int = 0, count: int = 10 * STEPS) -> list[tuple[Tensor, Tensor]]:
    return nets.batches(count)[start:]


def _run(trainer: lct.Trainer, batches: list[tuple[Tensor, Tensor]]) -> list[lct.Stats]:
    stats = []
    while not trainer.finished:
        stats.append(trainer.step(*batches[trainer.batch]))
    return stats


def _updates(trainer: lct.Trainer) -> list[int]:
    return [w.meter.updates for w in trainer.workers]


# Turns


def test_a_warm_start_gives_two_turns_a_group_in_order() -> None:
    turns = Turns(3, None, 1.0, seed=0)
    for _ in range(2):
        assert [turns.next() for _ in range(6)] == [0, 0, 1, 1, 2, 2]
        drawn = [turns.next() for _ in range(30)]
        assert drawn != sorted(drawn) and set(drawn) == {0, 1, 2}
        turns.warm_up()


@pytest.mark.parametrize("slow_down", [1.0, 1.2, 2.0, 10.0])
def test_a_slow_group_is_drawn_as_seldom_as_said(slow_down: float) -> None:
    turns, count = Turns(4, 2, slow_down, seed=3), 20000
    for _ in range(8):
        turns.next()
    drawn = [turns.next() for _ in range(count)]
    weights = [1, 1, 1 / slow_down, 1]
    for k, weight in enumerate(weights):
        share = weight / sum(weights)
        # Four standard deviations of a binomial count.
        room = 4 * (count * share * (1 - share)) ** 0.5
        assert abs(drawn.count(k) - count * share) < room, k


def test_turns_come_from_a_generator_of_their_own() -> None:
    def draw(seed: int, noise: int) -> list[int]:
        torch.manual_seed(noise)
        turns = Turns(4, None, 1.0, seed)
        torch.rand(noise)
        return [turns.next() for _ in range(50)]

    assert draw(1, 5) == draw(1, 6) != draw(2, 5)
    before = torch.get_rng_state()
    Turns(4, None, 1.0, 0).next()
    assert torch.equal(torch.get_rng_state(), before)


# What a turn does


def _by_hand(trainer: lct.Trainer, batches: list[tuple[Tensor, Tensor]], size: int, slow: int | None) -> int:
    """The definition, with plain lists, on the workers of a lockstep trainer; how many batches group 1 took."""
    workers, turns = trainer.workers, Turns(4, slow, 2.0, seed=17)
    buffers: list[list[dict[str, Any]]] = [[] for _ in workers]
    made, taken, writes = [0] * 4, 0, 0
    while min(made) < STEPS:
        k = turns.next()
        wanted = any(m < STEPS for m in made[k + 1 :])
        if k == 0:
            h, y = batches[taken]
            taken += 1
        else:
            free = [s for s in buffers[k] if made[k] < STEPS or (wanted and s["uses"] == 0)]
            if not free:
                continue
            slot = sorted(free, key=lambda s: (s["uses"], -s["age"]))[0]
            slot["uses"] += 1
            h, y = slot["h"], slot["y"]
        if made[k] < STEPS:
            result = workers[k].train(made[k], h, y)
            workers[k].update(made[k])
            made[k] += 1
            h = result.h
        else:
            workers[k].group.eval()
            with torch.no_grad():
                h = workers[k].group.layers(h)
        if wanted:
            buffers[k + 1] = [*buffers[k + 1], {"h": h, "y": y, "uses": 0, "age": writes}][-size:]
            writes += 1
    return taken


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("slow", [None, 0, 2])
def test_the_run_is_that_of_the_definition(size: int, slow: int | None, threads: None) -> None:
    lockstep = Case(lct.Greedy).trainer(4, "lockstep")
    taken = _by_hand(lockstep, _batches(), size, slow)
    options = {} if slow is None else {"slow_group": slow + 1, "slow_down": 2.0}
    trainer = _trainer(buffer=size, **options)
    _run(trainer, _batches())
    assert nets.same(nets.state(trainer), nets.state(lockstep))
    assert _updates(trainer) == [STEPS] * 4
    assert trainer.batch - taken in (0, 1)


def test_updates_are_those_of_the_draw(threads: None) -> None:
    trainer, turns = _trainer(slow_group=2, slow_down=10.0), Turns(4, 1, 10.0, seed=17)
    expected = [0] * 4
    for x, y in _batches()[:15]:
        trainer.step(x, y)
        k = -1
        while k != 0:
            k = turns.next()
            expected[k] = min(expected[k] + 1, STEPS)
        assert _updates(trainer) == expected
    # The slow group is behind, the others are not.
    assert expected[1] < min(expected[0], expected[2], expected[3])


def test_one_group_alone_is_lockstep(threads: None) -> None:
    trainer, lockstep = _trainer(count=1), Case(lct.Greedy).trainer(1, "lockstep")
    for x, y in _batches()[:STEPS]:
        a, b = trainer.step(x, y), lockstep.step(x, y)
        assert a.batch == b.batch and torch.equal(a.losses, b.losses)
    assert trainer.finished
    assert nets.same(nets.state(trainer), nets.state(lockstep))


def test_every_group_makes_its_updates_and_then_only_forwards(threads: None) -> None:
    trainer = _trainer(slow_group=3, slow_down=4.0, scheduler=_scheduler("onecycle"))
    batches = _batches()
    while _updates(trainer)[0] < STEPS:
        trainer.step(*batches[trainer.batch])
    first = {n: t.clone() for n, t in trainer.groups[0].state_dict().items()}
    assert not trainer.finished
    sent = sum(s.wire_bytes for s in _run(trainer, batches))
    assert sent > 0 and trainer.batch > STEPS
    # Weights, and statistics of batch norm.
    assert nets.same(trainer.groups[0].state_dict(), first)
    assert _updates(trainer) == [STEPS] * 4
    assert [w.schedulers[0].last_epoch for w in trainer.workers] == [STEPS] * 4
    with pytest.raises(RuntimeError, match=f"every group has trained on its {STEPS} batches"):
        trainer.step(*batches[0])
    trainer.flush()
    evaluated = trainer.evaluate(batches[:2])
    assert evaluated is not None and len(evaluated.accuracy) == 4


def test_stats_are_those_of_every_groups_latest_update(threads: None) -> None:
    trainer = _trainer()
    latest = torch.full((4,), float("nan"))
    for worker in trainer.workers:

        def watched(
            loss: Tensor, target: Tensor, index: int = worker.index, mean: Any = worker.mean
        ) -> Tensor:
            latest[index] = mean(loss, target)
            return latest[index].clone()

        worker.mean = watched  # type: ignore[method-assign]
    for batch, stats in enumerate(_run(trainer, _batches())):
        known = bool(latest.isfinite().all())
        if batch < 2:
            assert stats.batch == -1 and stats.losses[1:].isnan().all()
        else:
            assert known or stats.batch == -1
            assert stats.batch == batch
    assert torch.equal(stats.losses, latest)


def test_the_meter_counts_ages_and_uses(threads: None) -> None:
    one, limited, many = (_trainer(buffer=b, reuse_limit=r) for b, r in [(1, None), (1, 1), (10, None)])
    for trainer in (one, limited, many):
        _run(trainer, _batches())
    found = [t.meter.replay() for t in (one, limited, many)]
    assert all(f["updates"] == [STEPS] * 4 and f["reused"][0] == f["mean_age"][0] == 0 for f in found)
    # With one slot what is there is the newest; a limit of 1 allows nothing twice; ten slots hold older ones.
    assert found[0]["mean_age"] == [0.0] * 4 and min(found[0]["reused"][1:]) > 0
    assert found[1]["reused"] == [0] * 4
    assert max(found[2]["mean_age"]) > 0.2
    assert sum(found[2]["reused"]) < sum(found[0]["reused"])


@pytest.mark.parametrize(
    "lower, kind, warm",
    [(0.01, None, True), (0.2, None, False), (None, "step", True), (None, "onecycle", False)],
)
def test_a_drop_of_the_learning_rate_begins_a_warm_start(
    lower: float | None, kind: str | None, warm: bool, threads: None
) -> None:
    trainer = _trainer(slow_group=1, slow_down=1.0, scheduler=_scheduler(kind) if kind else None)
    run = trainer._run
    assert isinstance(run, Asynchronous)
    for x, y in _batches()[:8]:
        assert not run.turns.warming or trainer.batch < 3
        trainer.step(x, y)
    if lower is not None:
        trainer.set_learning_rate(lower)
        assert all(w.optimizer.param_groups[0]["lr"] == lower for w in trainer.workers if w.optimizer)
    assert list(run.turns.warming) == ([0, 0, 1, 1, 2, 2, 3, 3] if warm else [])


# The same bits


def _everything(seed: int = 0, dropout: bool = True) -> lct.Trainer:
    options = {
        "accumulate": 2,
        "clip_norm": 1.0,
        "optimizer": _adam,
        "scheduler": _scheduler("step"),
        "codec": "vq:16,2",
        "channels_last": True,
        "feedback_delay": 0,
    }
    pace = lct.Async(STEPS, buffer=3, slow_group=2, slow_down=2.0)
    return Case(lct.Greedy, "mlp_aux", options, dropout=dropout).trainer(4, pace, seed)


def test_a_seed_gives_the_same_bits(threads: None) -> None:
    a, b = _everything(), _everything()
    torch.manual_seed(99)  # after the trainers are made nothing else counts
    first, second = _run(a, _batches()), _run(b, _batches())
    assert nets.same(nets.state(a), nets.state(b))
    assert len(first) == len(second)
    assert all(
        s.batch == t.batch and torch.equal(s.losses.nan_to_num(), t.losses.nan_to_num())
        for s, t in zip(first, second, strict=True)
    )
    torch.manual_seed(18)
    other = lct.Trainer(_everything().groups, lct.Greedy(), schedule=lct.Async(STEPS, buffer=3))
    _run(other, _batches())
    assert other.batch != a.batch or not nets.same(nets.state(other), nets.state(a))


# In the warm start, in the middle, and when group 1 only forwards.
@pytest.mark.parametrize("cut", [1, 13, STEPS + 5])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(cut: int, tmp_path: Path, threads: None) -> None:
    whole, halted, resumed = _everything(), _everything(), _everything(seed=5)
    stats = _run(whole, _batches())
    assert len(stats) > STEPS + 5
    for x, y in _batches()[:cut]:
        halted.step(x, y)
    found = checkpoint.save(halted, tmp_path)
    halted.step(*_batches()[cut])  # what was saved must not be shared with what goes on
    checkpoint.load(resumed, found)
    assert resumed.batch == cut
    rest = _run(resumed, _batches())
    assert nets.same(nets.state(resumed), nets.state(whole))
    for a, b in zip(stats[cut:], rest, strict=True):
        assert (a.batch, a.wire_bytes, a.in_flight) == (b.batch, b.wire_bytes, b.in_flight)
        assert torch.equal(a.losses.nan_to_num(), b.losses.nan_to_num())
    assert resumed.meter.replay() == whole.meter.replay()
    assert resumed.meter.wire_bytes == whole.meter.wire_bytes


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path, threads: None) -> None:
    lockstep = Case(lct.Greedy).trainer(4, "lockstep")
    lockstep.step(*_batches()[0])
    found = checkpoint.save(lockstep, tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="holds no replay buffers"):
        checkpoint.load(_trainer(), found)
    # The other way is open: weights, optimisers and all that lockstep has are there.
    trainer = _trainer()
    trainer.step(*_batches()[0])
    checkpoint.load(lockstep, checkpoint.save(trainer, tmp_path))
    assert nets.same(nets.state(lockstep), nets.state(trainer))


def test_the_program_in_the_docs_runs(threads: None) -> None:
    page = (Path(__file__).parents[2] / "docs" / "asynchronous.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {"lct": lct, "groups": nets.groups(lct.Greedy()), "loader": nets.batches(4)}
    exec(program.replace("steps=100,", "steps=10,"), names)
    assert names["trainer"].meter.replay()["updates"] == [10] * 4  # type: ignore[attr-defined]


def test_refusals_name_the_cause(threads: None) -> None:
    for options, message in [
        ({"steps": 0}, "steps: expected a number of batches >= 1 for each group, got 0"),
        ({"buffer": 0}, "buffer: expected a number of slots >= 1, got 0"),
        ({"reuse_limit": 0}, "reuse_limit: expected a number >= 1 or None, got 0"),
        ({"slow_group": 5}, r"slow_group: expected 1\.\.4 or None, got 5"),
        ({"slow_group": 0}, "slow_group: expected the number of a group or None, got 0"),
        ({"slow_group": 1, "slow_down": 0.5}, "slow_down: expected a number >= 1, got 0.5"),
        ({"slow_group": 1, "slow_down": float("inf")}, "slow_down: expected a number >= 1, got inf"),
        ({"slow_down": 2.0}, r"slow_down 2\.0: slow_group says which group is slow, got None"),
    ]:
        with pytest.raises(ValueError, match=message):
            _trainer(**options)
    for method in (lct.LocalCritic(), lct.Backprop()):
        with pytest.raises(ValueError, match=f"{method.name} has no async schedule: use greedy"):
            lct.Trainer(nets.groups(method), method, schedule=lct.Async(3))
    with pytest.raises(ValueError, match=r"as in schedule=lct.Async\(steps=1000\)"):
        lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), schedule="async")
