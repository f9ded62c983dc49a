"""Character models under every schedule: the same bits, a state that goes on, losses per token."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import lct_fast as lct
from lct_fast.engine import CheckpointError, checkpoint
from lct_fast.engine.network import carried
from lct_fast.engine.network.exits import collect
from lct_fast.engine.schedules.graphs import why_eager
from lct_fast.methods import objective
from tests.engine import nets
from tests.engine.pipelined_cases import run_processes, weights

VOCABULARY, WINDOW, ROWS = 11, 6, 4
SPECS = {
    "lstm": "char_lstm:layers=4,hidden=8",
    "gru": "char_gru:layers=4,hidden=8",
    "transformer": "char_transformer:layers=4,width=8,heads=2",
}
# An epoch ends here: from the next batch on the state begins afresh.
EPOCH, BATCHES, MARK = 5, 8, 7


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 5e-3)


def make(
    kind: str, count: int, method: lct.Method, schedule: Any = "lockstep", **options: Any
) -> lct.Trainer:
    torch.manual_seed(0)
    groups = lct.split(
        lct.models.build_sequence(SPECS[kind], VOCABULARY, WINDOW),
        example_input=torch.zeros(ROWS, WINDOW, dtype=torch.int64),
        split_points=lct.models.default_splits(SPECS[kind], count),
    )
    torch.manual_seed(17)
    options = {"optimizer": _adam, "feedback_delay": 3, "clip_norm": 1.0} | options
    return lct.Trainer(groups, method, schedule=schedule, **options)


def windows(count: int = BATCHES, rows: int = ROWS) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    text = torch.randint(0, VOCABULARY, (rows, count * WINDOW + 1), generator=g)
    x, y = text[:, :-1], text[:, 1:]
    return list(zip(x.split(WINDOW, 1), y.split(WINDOW, 1), strict=True))


# Windows of another length and the last ones of fewer rows, as the end of a text may give.
EVALUATED = [(x[:, :5], y[:, :5]) for x, y in windows(3)] + [(x[:2], y[:2]) for x, y in windows(1)]


def train(trainer: lct.Trainer, evaluate: bool = True) -> dict[str, Any]:
    """All batches, with an evaluation inside the first epoch and one at its end."""
    batches, stats, results = windows(), [], []
    for i, (x, y) in enumerate(batches):
        if i in (0, EPOCH):
            trainer.begin_sequence()
        stats.append(trainer.step(x, y))
        if evaluate and i in (2, EPOCH - 1):
            stats += trainer.drain()
            results.append(trainer.evaluate(EVALUATED))
    stats += trainer.drain()
    trainer.flush()
    losses = torch.stack([s.losses for s in stats if s.batch >= 0])
    return {"weights": weights(trainer), "losses": losses, "results": results}


@pytest.mark.parametrize("method", [lct.LocalCritic, lct.Greedy])
@pytest.mark.parametrize("kind", SPECS)
def test_pipelined_in_one_process_equals_lockstep(kind: str, method: type[lct.Method], threads: None) -> None:
    lockstep, pipelined = (train(make(kind, 4, method(), s)) for s in ("lockstep", "pipelined"))
    assert nets.same(lockstep["weights"], pipelined["weights"])
    assert (
        torch.equal(lockstep["losses"], pipelined["losses"]) and lockstep["results"] == pipelined["results"]
    )
    assert not nets.same(lockstep["weights"], weights(make(kind, 4, method())))


@pytest.mark.parametrize("kind", SPECS)
def test_evaluation_leaves_training_as_it_is(kind: str, threads: None) -> None:
    """Also inside an epoch, where the state goes on afterwards."""
    with_, without = (train(make(kind, 2, lct.LocalCritic()), evaluate) for evaluate in (True, False))
    assert nets.same(with_["weights"], without["weights"]) and torch.equal(with_["losses"], without["losses"])
    first, second = with_["results"]
    assert first.samples == sum(y.numel() for _, y in EVALUATED) and first != second


def test_the_state_goes_on_within_an_epoch_and_not_beyond(threads: None) -> None:
    """Losses of the first batch of an epoch are those of a fresh state, others are not."""
    trainer = make("lstm", 2, lct.Greedy(), optimizer=lambda p: torch.optim.SGD(p, 0.0))
    trainer.begin_sequence()
    (x, y), (u, v) = windows(2)
    fresh, later = trainer.step(x, y).losses, trainer.step(u, v).losses
    trainer.begin_sequence()
    assert torch.equal(trainer.step(x, y).losses, fresh)
    trainer.begin_sequence()
    assert not torch.equal(trainer.step(u, v).losses, later)
    # Together they are one long window.
    trainer.begin_sequence()
    both = trainer.step(torch.cat([x, u], 1), torch.cat([y, v], 1)).losses
    torch.testing.assert_close((fresh + later) / 2, both)
    evaluation = trainer.evaluate([(x, y), (u, v)])
    assert evaluation is not None
    torch.testing.assert_close(torch.tensor(evaluation.loss), both)


def test_backprop_is_torch_written_out(threads: None) -> None:
    """One group: the mean loss over all tokens, truncated at the windows."""
    trainer = make("lstm", 1, lct.Backprop(), clip_norm=None)
    torch.manual_seed(0)
    net = lct.models.build_sequence(SPECS["lstm"], VOCABULARY, WINDOW)
    optimizer = _adam(net.parameters())
    trainer.begin_sequence()
    for x, y in windows(4):
        loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(trainer.step(x, y).losses[0], loss.detach())
    for a, b in zip(net.parameters(), trainer.module().parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_tokens_are_what_is_counted(threads: None) -> None:
    trainer = make("gru", 2, lct.LocalCritic())
    x, y = windows(1)[0]
    masked = y.clone()
    masked[:, :2] = -100
    trainer.begin_sequence()
    loss = trainer.step(x, masked).losses[-1]
    trainer.flush()
    assert trainer.meter.samples == ROWS * WINDOW
    assert trainer.meter.per_sample(trainer.meter.feedback_bytes) == 4
    # 8 values of 4 bytes a token.
    assert trainer.meter.per_sample(trainer.meter.wire_bytes) == 32
    fresh = make("gru", 2, lct.LocalCritic())
    logits = fresh.module().eval()(x)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), masked.flatten()))
    evaluation = fresh.evaluate([(x, masked)])
    assert evaluation is not None and evaluation.samples == ROWS * WINDOW
    assert math.isclose(evaluation.loss[-1], float(loss), rel_tol=1e-5)
    # Ignored tokens count in neither mean.
    hits = (logits.argmax(-1) == masked)[masked != -100]
    assert evaluation.accuracy[-1] == float(hits.double().mean())


def test_collect_gives_a_row_a_token_and_goes_on(threads: None) -> None:
    trainer = make("lstm", 2, lct.Greedy())
    batches = windows(2)
    logits, labels = collect(trainer.groups, batches)
    assert labels.shape == (2 * ROWS * WINDOW,) and logits[0].shape == (2 * ROWS * WINDOW, VOCABULARY)
    evaluation = trainer.evaluate(batches)
    assert evaluation is not None
    for k in (0, 1):
        assert math.isclose(evaluation.loss[k], float(F.cross_entropy(logits[k], labels)), rel_tol=1e-5)
    # Afterwards calls begin afresh.
    x = batches[0][0]
    net = trainer.module().eval()
    assert torch.equal(net(x), net(x))
    assert trainer.module(exit=1).eval()(x).shape == (ROWS, WINDOW, VOCABULARY)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_resumed_run_goes_on_from_the_state(kind: str, tmp_path: Path, threads: None) -> None:
    whole = make(kind, 2, lct.LocalCritic())
    whole.begin_sequence()
    for x, y in windows()[:3]:
        whole.step(x, y)
    checkpoint.save(whole, tmp_path)
    resumed = make(kind, 2, lct.LocalCritic(), "pipelined")
    # A state of its own, of other rows, must not survive.
    resumed.step(*windows(1, rows=2)[0])
    found = checkpoint.latest(tmp_path)
    assert found is not None
    checkpoint.load(resumed, found)
    for layer, other in zip(_layers(whole), _layers(resumed), strict=True):
        assert layer.carried.any() and torch.equal(layer.carried, other.carried)
    for trainer in (whole, resumed):
        for x, y in windows()[3:]:
            trainer.step(x, y)
        trainer.drain()
        trainer.flush()
    assert nets.same(weights(whole), weights(resumed))
    # Weights alone, as evaluation reads them.
    other = make(kind, 2, lct.LocalCritic())
    checkpoint.load_weights(other, found)
    assert all(layer.carried.shape[1] == 0 for layer in _layers(other))


def test_a_state_is_that_of_its_replica_s_rows(tmp_path: Path, threads: None) -> None:
    for kind, refused in (("lstm", True), ("transformer", False)):
        trainer = make(kind, 2, lct.Greedy())
        trainer.step(*windows(1)[0])
        path = checkpoint.save(trainer, tmp_path / kind)
        other = make(kind, 2, lct.Greedy())
        other.replicas = 2
        if refused:
            with pytest.raises(CheckpointError, match="by 1 replicas with recurrent layers.*this run has 2"):
                checkpoint.load(other, path)
        else:
            checkpoint.load(other, path)


def test_groups_with_a_state_run_without_graphs(threads: None) -> None:
    gpu: Any = SimpleNamespace(overlaps=True)
    reasons = [why_eager(make(kind, 2, lct.Greedy()).workers[0], gpu) for kind in ("gru", "transformer")]
    assert reasons[0] == "it carries state from batch to batch" and "optimiser" in str(reasons[1])


def _layers(trainer: lct.Trainer) -> list[carried.Carrying]:
    return [layer for group in trainer.groups for layer in carried.layers(group).values()]


def test_pipelined_over_two_processes_equals_lockstep_and_resumes(tmp_path: Path, threads: None) -> None:
    results = run_processes(_every_case, 2, str(tmp_path))
    for kind in SPECS:
        for method in (lct.LocalCritic, lct.Greedy):
            name = f"{kind}-{method.name}"
            expected = train(make(kind, 2, method()))
            for result in results:
                assert nets.same(result[name]["weights"], expected["weights"]), name
                assert nets.same(result[name]["resumed"], expected["weights"]), (name, "resumed")
            assert torch.equal(results[-1][name]["losses"], expected["losses"]), name
            assert results[-1][name]["results"] == expected["results"], name


def _every_case(folder: str) -> dict[str, Any]:
    return {
        f"{kind}-{method.name}": _as_rank(kind, method, Path(folder) / f"{kind}-{method.name}")
        for kind in SPECS
        for method in (lct.LocalCritic, lct.Greedy)
    }


def _as_rank(kind: str, method: type[lct.Method], folder: Path) -> dict[str, Any]:
    """As ``train`` over processes, with a checkpoint inside the first epoch from which a second training goes on."""
    trainer = make(kind, 2, method(), "pipelined")
    losses, results = _drive(trainer, folder, 0, evaluate=True)
    trainer.gather()
    dist.barrier()
    resumed = make(kind, 2, method(), "pipelined")
    found = checkpoint.latest(folder)
    assert found is not None
    checkpoint.load(resumed, found)
    _drive(resumed, None, resumed.batch, evaluate=False)
    resumed.gather()
    return {
        "weights": weights(trainer),
        "losses": torch.stack(losses) if trainer.last else None,
        "results": results,
        "resumed": weights(resumed),
    }


def _drive(
    trainer: lct.Trainer, folder: Path | None, start: int, evaluate: bool
) -> tuple[list[Tensor], list[Any]]:
    losses, results = [], []
    if not trainer.first:
        for event in trainer.events():
            if isinstance(event, lct.Stats):
                losses.append(event.losses)
            elif isinstance(event, lct.Mark):
                assert folder is not None
                checkpoint.save(trainer, folder, wait=False)
            else:
                results.append(event)
        return losses, results
    for i, (x, y) in list(enumerate(windows()))[start:]:
        if i in (0, EPOCH):
            trainer.begin_sequence()
        trainer.step(x, y)
        if i == 3 and folder is not None:
            checkpoint.save(trainer, folder, wait=False)
            trainer.mark(MARK)
        if evaluate and i in (2, EPOCH - 1):
            trainer.evaluate(EVALUATED)
    trainer.flush()
    trainer.stop()
    return losses, results


@pytest.mark.parametrize("kind", SPECS)
def test_serial_steps_go_on_too(kind: str, threads: None) -> None:
    """In both schedules, and a run of nearly all serial steps does what back-propagation does."""
    hybrids = [lct.Hybrid(0.4, s, block=2) for s in ("lockstep", "pipelined")]
    a, b = (train(make(kind, 2, lct.Greedy(), hybrid), evaluate=False) for hybrid in hybrids)
    assert nets.same(a["weights"], b["weights"])
    plain = make(kind, 2, lct.Greedy(), optimizer=lambda p: torch.optim.SGD(p, 0.0))
    mixed = make(kind, 2, lct.Greedy(), hybrids[0], optimizer=lambda p: torch.optim.SGD(p, 0.0))
    # Nothing is learned, so the last exit's losses show the state that is carried.
    torch.testing.assert_close(
        train(plain, evaluate=False)["losses"][:, -1], train(mixed, evaluate=False)["losses"][:, -1]
    )


def test_accumulation_codecs_autocast_and_the_measured_codec(threads: None) -> None:
    options: dict[str, Any] = {"accumulate": 2, "codec": "vq:4,2", "autocast": torch.bfloat16}
    for kind in SPECS:
        a, b = (train(make(kind, 2, lct.LocalCritic(), s, **options)) for s in ("lockstep", "pipelined"))
        assert nets.same(a["weights"], b["weights"]) and a["losses"].isfinite().all(), kind
        measured = make(kind, 2, lct.LocalCritic(), codec="auto")
        assert measured.wires == ["none"]
        assert all(layer.carried.shape[1] == 0 for layer in _layers(measured))


@pytest.mark.parametrize("method", [lct.LocalCritic, lct.Greedy])
def test_a_large_vocabulary_and_a_loss_of_one_s_own(
    method: type[lct.Method], threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take a row a token, and learn what the fused head learns."""
    sgd: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, 0.5)}

    def entropy(logits: Tensor, target: Tensor) -> Tensor:
        assert logits.dim() == 2 and target.shape == logits.shape[:1]
        return F.cross_entropy(logits, target, reduction="none")

    plain, own = train(make("gru", 2, method(), **sgd)), train(make("gru", 2, method(), loss=entropy, **sgd))
    monkeypatch.setattr(objective, "LARGE", VOCABULARY)
    large = train(make("gru", 2, method(), **sgd))
    for other in (own, large):
        torch.testing.assert_close(other["losses"], plain["losses"], rtol=1e-4, atol=1e-5)
        for name, tensor in plain["weights"].items():
            torch.testing.assert_close(other["weights"][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_transformer_may_take_batches_in_any_order(threads: None) -> None:
    trainer = make("transformer", 2, lct.Greedy(), lct.Async(6, buffer=2))
    batches = windows()
    while not trainer.finished:
        trainer.step(*batches[trainer.batch % BATCHES])
    trainer.flush()
    result = trainer.evaluate(batches)
    assert result is not None and result.samples == BATCHES * ROWS * WINDOW
    assert trainer.meter.replay()["updates"] == [6, 6]
    assert trainer.meter.samples == 6 * ROWS * WINDOW


def test_refusals(threads: None) -> None:
    with pytest.raises(ValueError, match="recurrent layers go on from the batch before, and schedule async"):
        make("lstm", 2, lct.Greedy(), lct.Async(4))
    with pytest.raises(ValueError, match="expected microbatches=1 in serial steps, got 2"):
        make("gru", 2, lct.Greedy(), lct.Hybrid(0.5, block=1, microbatches=2))
    trainer = make("lstm", 2, lct.Greedy())
    x, y = windows(1)[0]
    with pytest.raises(ValueError, match=r"labels: expected int64 \[4, T\], got int64 \[4\]"):
        trainer.step(x, y[:, 0])
    with pytest.raises(ValueError, match=r"label out of range at batch 0: expected 0..10 .* got 11"):
        trainer.step(x, y.masked_fill(y == y[0, 0], VOCABULARY))
    trainer.step(x, y)
    before = weights(trainer)
    before = {n: t.clone() for n, t in before.items()}
    with pytest.raises(ValueError, match="goes on from a window of 4 rows, got 2"):
        trainer.step(x[:2], y[:2])
    assert nets.same(before, weights(trainer))
    with pytest.raises(ValueError, match="'linear'.*for tokens critic 'token_linear'"):
        lct.split(
            lct.models.build_sequence(SPECS["lstm"], VOCABULARY, WINDOW),
            2,
            x,
            critic="linear",
            split_points=["lstm3"],
        )
