"""Layer-parallel training through the trainer: the steps, schedules, checkpoints, serial blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lct_fast as lct
from lct_fast.engine import CheckpointError, NonFiniteError, checkpoint
from tests.engine import nets
from tests.engine.pipelined_cases import run_processes, weights

KINDS = ("penalty", "augmented_lagrangian")
COUNT = 48


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, 0.005, 0.9)


def trainer(kind: str = "penalty", groups: int = 3, **options: Any) -> lct.Trainer:
    torch.manual_seed(0)
    method = options.pop("method", None) or lct.LayerParallel(kind, beta=0.1)
    cut = nets.groups(method, groups)
    torch.manual_seed(17)
    return lct.Trainer(cut, method, samples=COUNT, optimizer=sgd, **({"feedback_delay": 3} | options))


def stream(epochs: int = 4) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Three batches of 16 an epoch, shuffled anew in each."""
    draw = torch.Generator().manual_seed(5)
    ((x, y),) = nets.batches(1, COUNT)
    order = torch.cat([torch.randperm(COUNT, generator=draw) for _ in range(epochs)])
    return [(x[s], y[s], s) for s in order.split(16)]


def train(run: lct.Trainer, batches: list[tuple[Tensor, Tensor, Tensor]]) -> list[lct.Stats]:
    stats = [run.step(x, y, s) for x, y, s in batches] + run.drain()
    return [s for s in stats if s.batch >= 0]


def stored(run: lct.Trainer) -> dict[str, Tensor]:
    every = torch.arange(COUNT)
    return {
        f"{w.index}.{name}": t
        for w in run.workers
        if w.store is not None
        for name, t in w.store.read(every).tensors.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_lockstep_makes_the_five_steps(kind: str) -> None:
    """Against the same steps written out, with autograd and plain SGD, on layers whose rows are independent."""
    torch.manual_seed(0)
    model = nets.rows_apart()
    groups = lct.split(model, example_input=torch.zeros(4, 1, 8, 8), split_points=["unit2", "unit4"])
    beta, eta, rate = 0.1, 1.5, 0.01
    run = lct.Trainer(
        groups,
        lct.LayerParallel(kind, beta, eta),
        optimizer=lambda params: torch.optim.SGD(params, rate),
        samples=COUNT,
    )
    parts = [torch.nn.Sequential(*list(nets.rows_apart())[a:b]) for a, b in ((0, 1), (1, 3), (3, 6))]
    shapes = [g.shape for g in groups[:-1]]
    lambdas = [torch.zeros(COUNT, *s) for s in shapes]
    kappas = [torch.zeros(COUNT, *s) for s in shapes]
    known = torch.zeros(COUNT, dtype=torch.bool)
    for x, y, s in stream(3):
        stats = run.step(x, y, s)
        entries, outputs, losses, before = [x], [], [], x
        for k, part in enumerate(parts):
            entry = before.detach().clone().requires_grad_()
            entries.append(entry)
            out = part(entry)
            outputs.append(out.detach())
            if k < 2:
                fresh = ~known[s]
                lambdas[k][s[fresh]] = out.detach()[fresh]
                before = lambdas[k][s].clone()
                d = before - out
                each = (beta / 2 * d.square() - kappas[k][s] * d).flatten(1).sum(1)
            else:
                each = torch.nn.functional.cross_entropy(out, y, reduction="none")
            losses.append(each.detach().mean())
            each.mean().backward()
        torch.testing.assert_close(stats.losses, torch.stack(losses))
        for k, (entry, out) in enumerate(zip(entries[2:], outputs, strict=False)):
            assert entry.grad is not None
            old = lambdas[k][s]
            new = old - eta * (entry.grad * len(s) + beta * (old - out) - kappas[k][s])
            lambdas[k][s] = new
            if kind != "penalty":
                kappas[k][s] -= beta * (new - out)
        known[s] = True
        for part in parts:
            for p in part.parameters():
                p.data -= rate * p.grad
            part.zero_grad()
    found = stored(run)
    for k in range(2):
        torch.testing.assert_close(found[f"{k}.lambda"], lambdas[k], rtol=1e-4, atol=1e-5)
        if kind != "penalty":
            assert found[f"{k}.kappa"].abs().max() > 1e-3
            torch.testing.assert_close(found[f"{k}.kappa"], kappas[k], rtol=1e-4, atol=1e-5)
    mine = [p for part in parts for p in part.parameters()]
    for p, q in zip(run.module().parameters(), mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_pipelined_is_lockstep_with_the_same_delay(kind: str, groups: int) -> None:
    found = []
    for schedule in ("lockstep", "pipelined"):
        run = trainer(kind, groups, schedule=schedule, codec="bf16")
        losses = torch.stack([s.losses for s in train(run, stream())])
        run.flush()
        found.append((nets.state(run), losses, stored(run), run.meter.feedback_bytes, run.meter.wire_bytes))
    (a, losses, kept, *counts), (b, other, also, *also_counts) = found
    assert nets.same(a, b) and torch.equal(losses, other) and nets.same(kept, also) and counts == also_counts
    # An adjoint of the input comes back for every cut, in fp32; lambda goes there, in bf16 here.
    values = sum(
        g.shape.numel() if isinstance(g.shape, torch.Size) else torch.Size(g.shape).numel()
        for g in run.groups[:-1]
    )
    assert counts == [12 * 16 * values * 4, 12 * 16 * values * 2]


def test_the_delay_tells_lockstep_runs_apart() -> None:
    one, three = trainer(feedback_delay=0), trainer(feedback_delay=3)
    for run in (one, three):
        train(run, stream())
    assert not nets.same(nets.state(one), nets.state(three))


def _as_rank(groups: int, codec: str) -> dict[str, Any]:
    run = trainer("augmented_lagrangian", groups, schedule="pipelined", codec=codec)
    losses: list[Tensor] = []
    middle: list[Any] = []
    if run.first:
        for i, (x, y, s) in enumerate(stream()):
            run.step(x, y, s)
            if i == 6:
                run.evaluate(nets.batches(2))
        run.flush()
        run.stop()
    else:
        for event in run.events():
            (losses if isinstance(event, lct.Stats) else middle).append(
                event.losses if isinstance(event, lct.Stats) else event
            )
    run.gather()
    return {"weights": weights(run), "losses": losses, "kept": stored(run), "middle": middle}


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "codec"), [(2, "none"), (3, "none"), (2, "vq:16,2")])
def test_over_processes_is_lockstep_with_the_same_delay(groups: int, codec: str) -> None:
    ranks = run_processes(_as_rank, groups, groups, codec)
    run = trainer("augmented_lagrangian", groups, codec=codec)
    stats, middle = [], None
    for i, (x, y, s) in enumerate(stream()):
        stats.append(run.step(x, y, s))
        if i == 6:
            middle = run.evaluate(nets.batches(2))
    run.flush()
    assert nets.same(nets.state(run), ranks[-1]["weights"])
    assert torch.equal(torch.stack([s.losses for s in stats]), torch.stack(ranks[-1]["losses"]))
    assert nets.same(stored(run), {n: t for rank in ranks for n, t in rank["kept"].items()})
    assert ranks[-1]["middle"] == [middle]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"sample_codec": "int8"}, {"schedule": "pipelined"}], ids=str)
def test_resumed_is_uninterrupted(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    batches, whole = stream(), trainer(kind, **options)
    train(whole, batches)
    first = trainer(kind, **options)
    train(first, batches[:7])
    path = checkpoint.save(first, tmp_path)
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    train(first, batches[7:])
    # The stored state moves on in a copy; a checkpoint is never written to again.
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before
    second = trainer(kind, **options)
    checkpoint.load(second, path)
    train(second, batches[7:])
    assert nets.same(nets.state(whole), nets.state(second))
    assert nets.same(stored(whole), stored(second))
    assert nets.same(nets.state(whole), nets.state(first))


def test_state_in_files_gives_the_same_bits(tmp_path: Path) -> None:
    here, there = trainer(), trainer(sample_folder=tmp_path)
    for run in (here, there):
        train(run, stream())
    assert nets.same(nets.state(here), nets.state(there)) and nets.same(stored(here), stored(there))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["group-1-lambda-0.bin", "group-2-lambda-0.bin"]


def test_a_checkpoint_of_another_kind_or_codec_is_refused(tmp_path: Path) -> None:
    run = trainer()
    train(run, stream(1))
    path = checkpoint.save(run, tmp_path)
    with pytest.raises(
        CheckpointError, match="made by method 'penalty', this run uses 'augmented-lagrangian'"
    ):
        checkpoint.load(trainer("augmented_lagrangian"), path)
    with pytest.raises(CheckpointError, match="state of samples"):
        checkpoint.load(trainer(sample_codec="int8"), path)


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_serial_blocks_give_the_state_up(schedule: str) -> None:
    hybrid = lct.Hybrid(serial=0.25, schedule=schedule, block=3)
    run, batches = trainer(schedule=hybrid), stream(5)
    train(run, batches[:9])
    assert all(w.store.known.any() for w in run.workers if w.store is not None)
    # The answers to the last batches before the block come during it: they are of the era before.
    train(run, batches[9:12])
    assert not any(w.store.known.any() for w in run.workers if w.store is not None)
    (stats,) = train(run, batches[12:13])
    # Every sample starts from a forward pass again: no group but the last has anything to learn from.
    assert stats.losses[:-1].tolist() == [0.0, 0.0] and stats.losses[-1] > 0


def test_hybrid_pipelined_is_hybrid_lockstep() -> None:
    found = []
    for schedule in ("lockstep", "pipelined"):
        run = trainer("augmented_lagrangian", schedule=lct.Hybrid(serial=0.25, schedule=schedule, block=2))
        train(run, stream())
        found.append(nets.state(run))
    assert nets.same(*found)


def test_only_the_last_exit_exists() -> None:
    run = trainer()
    train(run, stream(1))
    result = run.evaluate(nets.batches(2))
    assert result is not None and len(result.accuracy) == len(result.loss) == 1
    with pytest.raises(
        ValueError, match="exit 1: the method has no critics, so the only exit is the last, 3"
    ):
        run.module(exit=1)
    x, y = nets.batches(1)[0]
    net = run.module().eval()
    assert result.samples == 32 and net(x).shape == (16, 5)
    # The user's groups keep their critics.
    assert not any("critic" in n for g in run.groups[:-1] for n in g.state_dict())


def test_nan_in_a_group_is_refused_before_it_is_updated() -> None:
    run = trainer(feedback_delay=0)
    train(run, stream(1))
    before = stored(run)
    with torch.no_grad():
        next(run.groups[1].layers.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the loss of group 2 at batch 3 is NaN or Inf"):
        train(run, stream(1))
    assert nets.same(stored(run), before)


def test_a_state_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(feedback_delay=0)
    late = lct.LayerParallel.late_state
    monkeypatch.setattr(
        lct.LayerParallel, "late_state", lambda *a: {n: t * float("inf") for n, t in late(*a).items()}
    )
    message = (
        "what group 1 keeps for the samples of batch 0 is NaN or Inf: lower the learning rate, beta or eta"
    )
    with pytest.raises(NonFiniteError, match=message):
        train(run, stream(1))
    assert not any(w.store.known.any() for w in run.workers if w.store is not None)


def test_what_a_trainer_refuses() -> None:
    x, y, s = stream(1)[0]
    with pytest.raises(ValueError, match="say which ones the batch holds"):
        trainer().step(x, y)
    with pytest.raises(ValueError, match="expected numbers 0..47"):
        trainer().step(x, y, s + 40)
    groups = nets.groups(lct.LayerParallel(), 2)
    with pytest.raises(ValueError, match="say how many there are"):
        lct.Trainer(groups, lct.LayerParallel()).step(x, y, s)
    with pytest.raises(ValueError, match="codec auto measures steps that penalty does not make"):
        trainer(codec="auto")
    with pytest.raises(ValueError, match="penalty has no async schedule"):
        trainer(schedule=lct.Async(steps=3), feedback_delay=None)
    with pytest.raises(ValueError, match="keeps a state for each sample, which replicas do not share"):
        trainer(schedule="pipelined", replicas=2)


def test_other_methods_take_no_notice_of_samples() -> None:
    x, y, s = stream(1)[0]
    run = lct.Trainer(nets.groups(lct.Greedy(), 2), lct.Greedy())
    run.step(x, y, s)
    assert all(w.store is None for w in run.workers)
