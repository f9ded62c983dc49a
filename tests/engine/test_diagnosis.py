"""Reading gradients: exact, in every schedule, and without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lct_fast as lct
from lct_fast.engine import checkpoint
from lct_fast.engine.diagnosis import Diagnosis, late_means, rows
from lct_fast.engine.group_state import snapshot
from lct_fast.engine.meter import GroupMeter
from tests.engine import nets
from tests.engine.pipelined_cases import BATCHES, Case, _adam, _halving

CASES = {
    "local-critic": Case(lct.LocalCritic, dropout=True),
    "greedy": Case(lct.Greedy, "mlp_aux", dropout=True),
    "backprop": Case(lct.Backprop, dropout=True),
    "everything": Case(
        lambda: lct.LocalCritic(critic_every=2, loss="half_sided"),
        "depthwise:pool=2",
        {"accumulate": 2, "clip_norm": 0.1, "optimizer": _adam, "scheduler": _halving, "codec": "vq:16,2"},
        dropout=True,
    ),
    "bf16, channels last": Case(lct.Greedy, options={"channels_last": True, "autocast": torch.bfloat16}),
    "serial steps": Case(lct.LocalCritic, hybrid=lct.Hybrid(0.5, block=2)),
}


def _trained(case: Case, schedule: str, diagnose: int, count: int = 4) -> lct.Trainer:
    case = Case(case.method, case.critic, case.options | {"diagnose": diagnose}, case.dropout, case.hybrid)
    trainer = case.trainer(count, schedule)
    for x, y in nets.batches(BATCHES):
        trainer.step(x, y)
    trainer.flush()
    return trainer


def _everything(trainer: lct.Trainer) -> list[Tensor]:
    """All that a checkpoint keeps of every group but what was read, as tensors; and torch's own random state."""
    tensors: list[Tensor] = [torch.get_rng_state()]
    for worker in trainer.workers:
        saved, description = snapshot(worker)
        description["meter"].pop("readings")
        description["meter"].pop("serial_seconds")
        tensors += [saved[n] for n in sorted(saved)]
        tensors.append(torch.tensor(list(repr(description).encode())))
    return tensors


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("backprop", "lockstep"),
        *((n, s) for n in CASES if n != "backprop" for s in ("lockstep", "pipelined")),
    ],
)
def test_reading_changes_no_bit(name: str, schedule: str, threads: None) -> None:
    with_it, without = (_trained(CASES[name], schedule, n) for n in (1, 0))
    assert all(w.meter.readings for w in with_it.workers)
    assert not any(w.meter.readings for w in without.workers)
    ours, theirs = _everything(with_it), _everything(without)
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _reference(
    net: nn.Module, critics: list[nn.Module], parts: list[list[str]], batches: list[tuple[Tensor, Tensor]]
) -> list[tuple[float, float]]:
    """Norm and cosine of each group, by plain autograd: heads' mean losses against the network's own, summed."""
    own = [[torch.zeros(())] * 0 for _ in parts]
    true = [[torch.zeros(())] * 0 for _ in parts]
    units = dict(net.named_children())
    for x, y in batches:
        outs, h = [], x
        for names in parts:
            for name in names:
                h = units[name](h)
            outs.append(h)
        for k, names in enumerate(parts):
            weights = [p for name in names for p in units[name].parameters()]
            last = k == len(parts) - 1
            # Only the group's own layers: gradients of earlier ones are not asked for.
            local = F.cross_entropy(outs[k] if last else critics[k](outs[k]), y)
            whole = F.cross_entropy(outs[-1], y)
            for into, loss in ((own, local), (true, whole)):
                found = list(torch.autograd.grad(loss / len(batches), weights, retain_graph=True))
                into[k] = [a + b for a, b in zip(into[k], found, strict=True)] if into[k] else found
    result = []
    for mine, theirs in zip(own, true, strict=True):
        a, b = (torch.cat([g.flatten() for g in side]) for side in (mine, theirs))
        result.append((float(a.norm()), float(a @ b / (a.norm() * b.norm()))))
    return result


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", [lct.Greedy, lct.LocalCritic])
def test_norms_and_cosines_are_those_of_plain_autograd(method: Any, accumulate: int, threads: None) -> None:
    """In float64, with batch norm, over every batch of the update, before clipping."""
    model = nets.net().double()
    points = lct.models.default_splits("digits_cnn", 4)
    example = torch.zeros(4, 1, 8, 8).double()
    groups = lct.split(model, example_input=example, critic="pooled_linear", split_points=points)
    for group in groups:
        group.double()
    batches = [(x.double(), y) for x, y in nets.batches(accumulate)]
    names = [name for name, _ in model.named_children()]
    starts = [0, *(names.index(point) for point in points or []), len(names)]
    parts = [names[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    model.train()
    expected = _reference(model, [g.critic for g in groups], parts, batches)
    trainer = lct.Trainer(groups, method(), accumulate=accumulate, clip_norm=1e-3, diagnose=1)
    for x, y in batches:
        trainer.step(x, y)
    for worker, (norm, cosine) in zip(trainer.workers, expected, strict=True):
        # The factor of the mean is fp32, exact for 16 rows.
        assert worker.meter.readings == [
            [accumulate - 1, pytest.approx(norm, rel=1e-9), pytest.approx(cosine, abs=1e-9)]
        ]
    assert expected[-1][1] == pytest.approx(1, abs=1e-9), "the last group learns from the network's own loss"
    assert all(abs(cosine) < 0.999 for _, cosine in expected[:-1]), "the others do not"


def test_the_true_gradient_sees_the_same_dropout(threads: None) -> None:
    """Back-propagation's own gradient is the true one only if both drew the same."""
    (worker,) = _trained(CASES["backprop"], "lockstep", 1).workers
    assert len(worker.meter.readings) == BATCHES
    assert all(cosine == pytest.approx(1, abs=1e-5) for _, _, cosine in worker.meter.readings)


def test_pipelined_reads_the_norms_of_lockstep_and_no_cosines(threads: None) -> None:
    case = CASES["everything"]
    piped, lockstep = (_trained(case, how, 3) for how in ("pipelined", "lockstep"))
    for a, b in zip(piped.workers, lockstep.workers, strict=True):
        assert [r[:2] for r in a.meter.readings] == [r[:2] for r in b.meter.readings]
        assert all(r[2] is None for r in a.meter.readings) and all(r[2] for r in b.meter.readings)


def test_asynchronous_groups_count_their_own_updates(threads: None) -> None:
    method = lct.Greedy()
    trainer = lct.Trainer(nets.groups(method), method, schedule=lct.Async(BATCHES), diagnose=4)
    batches = iter(nets.batches(100))
    while not trainer.finished:
        trainer.step(*next(batches))
    for worker in trainer.workers:
        assert [r[0] for r in worker.meter.readings] == [0, 4, 8]
        assert all(r[1] > 0 and r[2] is None for r in worker.meter.readings)


def _wanted(every: int, accumulate: int, hybrid: lct.Hybrid | None = None) -> list[int]:
    diagnosis = Diagnosis([], every, accumulate, hybrid, GroupMeter(0))
    return [t for t in range(24) if diagnosis.wants(t)]


def test_which_updates_are_read() -> None:
    assert _wanted(10, 1) == [0, 10, 20]
    # Every batch of an update that holds batch 0, 10 or 20.
    assert _wanted(10, 4) == [0, 1, 2, 3, 8, 9, 10, 11, 20, 21, 22, 23]
    assert _wanted(2, 4) == list(range(24))
    # Batches 6, 7, 14, 15, 22, 23 are serial.
    assert _wanted(2, 1, lct.Hybrid(0.25, block=2)) == [0, 2, 4, 8, 10, 12, 16, 18, 20]
    # Batches 3, 4, 5, 9, 10, 11 and so on: none of the updates is without.
    assert _wanted(1, 4, lct.Hybrid(0.5, block=3)) == []
    assert _wanted(1, 4, lct.Hybrid(0.25, block=2)) == [*range(4), *range(8, 12), *range(16, 20)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_keeps_what_was_read(accumulate: int, tmp_path: Path, threads: None) -> None:
    batches = nets.batches(8)
    method = lct.Greedy()
    options: dict[str, Any] = {"diagnose": 1, "accumulate": accumulate}
    whole, first, second = (lct.Trainer(nets.groups(method), method, **options) for _ in range(3))
    for x, y in batches:
        whole.step(x, y)
    for x, y in batches[:3]:
        first.step(x, y)
    checkpoint.save(first, tmp_path, wait=False)
    # What is read later is no part of a checkpoint that is still being written.
    first.step(*batches[3])
    first.finish_saving()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    checkpoint.load(second, found)
    for x, y in batches[3:]:
        second.step(x, y)
    for a, b in zip(second.workers, whole.workers, strict=True):
        # Of an update that the checkpoint cut in two the true gradient is known in part.
        cut = [] if accumulate == 1 else [3]
        expected = [[t, norm, None if t in cut else cosine] for t, norm, cosine in b.meter.readings]
        assert a.meter.readings == expected


def test_frozen_groups_and_gradients_that_vanish(threads: None) -> None:
    method = lct.Greedy()
    groups = nets.groups(method)
    for p in groups[1].parameters():
        p.requires_grad_(False)
    trainer = lct.Trainer(groups, method, diagnose=1)
    trainer.step(*nets.batches(1)[0])
    assert [len(w.meter.readings) for w in trainer.workers] == [1, 0, 1, 1]

    weight = nn.Parameter(torch.ones(2))
    meter = GroupMeter(0)
    diagnosis = Diagnosis([weight], 1, 1, None, meter)
    for gradient, true in [(None, [1.0, 0.0]), ([0.0, 3.0], [0.0, 0.0]), ([float("inf"), 1.0], [1.0, 1.0])]:
        weight.grad = None if gradient is None else torch.tensor(gradient)
        diagnosis.add_true([torch.tensor(true)])
        diagnosis.read(0)
    assert meter.readings == [[0, 0.0, None], [0, 3.0, None], [0, None, None]]


def test_rows_and_means_over_the_last_quarter() -> None:
    readings: list[list[list[Any]]] = [
        [[0, 1.0, None], [4, 2.0, None], [8, 3.0, None], [12, 5.0, None], [16, 7.0, None]],
        [[0, 1.0, 0.5], [8, 1.0, 0.25], [12, 3.0, 0.75]],
    ]
    table = rows(readings)
    assert [row["batch"] for row in table] == [0, 4, 8, 12, 16]
    assert table[1] == {"batch": 4, "gradient_norm": [2.0, None], "gradient_cosine": [None, None]}
    assert late_means(table, "gradient_norm") == [6.0, 3.0]
    assert late_means(table, "gradient_cosine") == [None, 0.75]
    assert late_means(table[:1], "gradient_norm") == [1.0, 1.0]
    assert late_means([], "gradient_norm") == [] and rows([[], []]) == []


def test_refusals() -> None:
    method = lct.Greedy()
    with pytest.raises(ValueError, match="diagnose: expected an integer >= 0, got -1"):
        lct.Trainer(nets.groups(method), method, diagnose=-1)
