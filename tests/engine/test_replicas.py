"""Two replicas of two groups on four processes train as one pipeline does on whole batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lct_fast as lct
from lct_fast.codecs.vector_quantization import VectorQuantization
from lct_fast.engine import checkpoint
from lct_fast.engine.replicas import Replicas, part
from tests.engine import nets
from tests.engine.pipelined_cases import run_processes

GROUPS, REPLICAS, BATCHES, MIDDLE = 2, 2, 9, 5
MARK = 1


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 1e-3)


def _hard(rows: int) -> list[tuple[Tensor, Tensor]]:
    return nets.batches(BATCHES, rows)


def _ignoring(rows: int) -> list[tuple[Tensor, Tensor]]:
    """Labels of which most of the first replica's and few of the second's carry no loss, and once all of its."""
    batches = _hard(rows)
    for i, (_, y) in enumerate(batches):
        y[: rows // 2 - i % 3] = -100
        y[-1] = -100
    return batches


def _soft(rows: int) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.nn.functional.one_hot(y, 5) * 0.8 + 0.04) for x, y in _hard(rows)]


@dataclass(frozen=True)
class Case:
    method: Callable[[], lct.Method]
    critic: str
    net: Callable[[int], nn.Sequential] = nets.rows_apart
    options: dict[str, Any] = field(default_factory=dict)
    batches: Callable[[int], list[tuple[Tensor, Tensor]]] = _hard
    rows: int = 16
    # Whether the codec begins with words that are not made from the first batch.
    given_words: bool = False

    def trainer(self, seed: int = 0, **options: Any) -> lct.Trainer:
        """With the delay that pipelined has."""
        torch.manual_seed(seed)
        groups = lct.split(
            self.net(seed), example_input=torch.zeros(4, 1, 8, 8), critic=self.critic, split_points=["unit3"]
        )
        torch.manual_seed(17)
        defaults = {"feedback_delay": 3} | self.options
        trainer = lct.Trainer(groups, self.method(), **(defaults | options))
        encoder = trainer.workers[0].encoder
        if self.given_words and encoder is not None:
            _give_words(encoder)  # type: ignore[arg-type]
        return trainer


def _give_words(codec: VectorQuantization) -> None:
    words = torch.rand(4, 8, 2, generator=torch.Generator().manual_seed(3))
    codec.codebook, codec.sent = words.clone(), words.bfloat16().float()
    codec.averages = lct.ops.vq_state(words, 64.0)
    codec.version, codec._unsent = 1, True


# Rows do not depend on each other here, so a whole batch and its parts give the same up to the order of sums.
EQUAL = {
    "greedy": Case(lct.Greedy, "conv_fc:convs=2,filters=4"),
    "greedy, pooled": Case(lct.Greedy, "pooled_linear", options={"clip_norm": 0.5, "accumulate": 2}),
    "local-critic": Case(lct.LocalCritic, "conv_fc:convs=2,filters=4", options={"channels_last": True}),
    "local-critic, pooled": Case(
        lambda: lct.LocalCritic(critic_every=2, critic_optimizer=_adam),
        "pooled_linear",
        options={"accumulate": 2, "clip_norm": 0.5, "optimizer": _adam},
    ),
    "logits with the layers": Case(lct.LocalCritic, "linear", nets.perceptron),
    "greedy, logits with the layers": Case(lct.Greedy, "linear", nets.perceptron),
    "ignored labels": Case(lct.LocalCritic, "conv_fc:convs=1,filters=4", batches=_ignoring),
    "ignored labels, greedy": Case(lct.Greedy, "pooled_linear", options={"accumulate": 2}, batches=_ignoring),
    "soft labels": Case(lct.LocalCritic, "pooled_linear", batches=_soft),
    "vq": Case(lct.LocalCritic, "pooled_linear", options={"codec": "vq:8,2"}, given_words=True, rows=64),
}
# Batch norm, dropout and k-means starts see a replica's part: the same weights in all replicas, not those of one.
ALIKE = {
    "batch norm with the pool": Case(lct.Greedy, "pooled_linear", lambda seed: _with_units(nets.net(seed))),
    "everything": Case(
        lct.LocalCritic,
        "conv_fc:convs=1,filters=4",
        lambda seed: _with_units(nets.net(seed), 0.3),
        {"codec": "vq:8,2", "accumulate": 2, "clip_norm": 1.0, "optimizer": _adam, "feedback_delay": 4},
    ),
}


def _with_units(net: nn.Sequential, dropout: float = 0.0) -> nn.Sequential:
    """The network with the names of the others, cut in the same place."""
    modules = list(net.children())
    renamed = nn.Sequential()
    for i, module in enumerate(modules):
        name = f"unit{i + 1}"
        renamed.add_module(name, nn.Sequential(nn.Dropout(dropout), module) if dropout and i == 2 else module)
    return renamed


def _whole(case: Case) -> dict[str, Any]:
    """All batches in this process."""
    trainer = case.trainer()
    batches = case.batches(case.rows)
    losses = [trainer.step(x, y).losses for x, y in batches[:MIDDLE]]
    middle = trainer.evaluate(batches[:2])
    losses += [trainer.step(x, y).losses for x, y in batches[MIDDLE:]]
    trainer.flush()
    return {
        "weights": nets.state(trainer),
        "losses": torch.stack(losses),
        "middle": middle,
        "meter": _counts(trainer.meter),
    }


def _counts(meter: Any) -> dict[str, float]:
    counts = {n: getattr(meter, n) for n in ("wire_bytes", "raw_bytes", "feedback_bytes")}
    return {"samples": meter.samples} | {n: meter.per_sample(c) for n, c in counts.items()}


def _parts(case: Case, folder: str) -> dict[str, Any]:
    """The same in four processes, with a checkpoint in the middle from which a second training goes on."""
    trainer = case.trainer(schedule="pipelined", replicas=REPLICAS)
    losses, middle = _run(case, trainer, 0, Path(folder))
    own = _own(trainer)
    trainer.gather()
    meter, _ = trainer.gather_meter()
    result = {
        "own": own,
        "weights": nets.state(trainer),
        "losses": torch.stack(losses) if trainer.last else None,
        "middle": middle,
        "meter": _counts(meter),
    }
    resumed = case.trainer(seed=5, schedule="pipelined", replicas=REPLICAS)
    dist.barrier()
    found = checkpoint.latest(Path(folder))
    assert found is not None
    assert checkpoint.load(resumed, found) == {"epoch": 3}
    _run(case, resumed, MIDDLE, None)
    return result | {"resumed": _own(resumed)}


def _run(case: Case, trainer: lct.Trainer, start: int, folder: Path | None) -> tuple[list[Tensor], Any]:
    assert trainer.batch == start
    losses, middle = [], None
    if trainer.first:
        batches = case.batches(case.rows)
        for x, y in batches[start:]:
            if folder is not None and trainer.batch == MIDDLE:
                checkpoint.save(trainer, folder)
                trainer.mark(MARK)
                trainer.evaluate(batches[:2])
            trainer.step(*(part(t, trainer.replica, REPLICAS) for t in (x, y)))
        trainer.flush()
        trainer.stop()
    else:
        for event in trainer.events():
            if isinstance(event, lct.Mark):
                assert folder is not None
                checkpoint.save(trainer, folder, {"epoch": 3})
            elif isinstance(event, lct.Stats):
                losses.append(event.losses)
            else:
                middle = event
    return losses, middle


def _own(trainer: lct.Trainer) -> dict[str, Tensor]:
    """What this process trained: parameters, buffers, codebooks."""
    (worker,) = trainer.workers
    group = worker.group
    own = {f"parameter {n}": p.detach().clone() for n, p in group.named_parameters()}
    own |= {f"buffer {n}": b.clone() for n, b in group.named_buffers()}
    shared = worker.encoder.shared() if worker.encoder is not None else ()
    return own | {f"codebook {i}": t.clone() for i, t in enumerate(shared)}


def _every(names: list[str], folder: str) -> dict[str, Any]:
    cases = EQUAL | ALIKE
    return {name: _parts(cases[name], f"{folder}/{name}") for name in names}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the four processes made of every case."""
    folder = str(tmp_path_factory.mktemp("replicas"))
    return run_processes(_every, GROUPS * REPLICAS, [*EQUAL, *ALIKE], folder, timeout=280)


@pytest.mark.parametrize("name", list(EQUAL))
def test_replicas_equal_one_pipeline_on_whole_batches(
    name: str, trained: list[dict[str, Any]], threads: None
) -> None:
    expected, results = _whole(EQUAL[name]), [r[name] for r in trained]
    for result in results:
        for key, value in expected["weights"].items():
            # Sums over 2 x N / 2 rows in place of N, which nine updates carry on: 100 times what was seen is 2e-5.
            torch.testing.assert_close(result["weights"][key], value, atol=2e-5, rtol=1e-4, msg=key)
        assert result["meter"] == expected["meter"]
    for last in (results[1], results[3]):
        torch.testing.assert_close(last["losses"], expected["losses"], atol=1e-5, rtol=1e-4)
    middle, one = results[1]["middle"], expected["middle"]
    assert middle.samples == one.samples and middle.accuracy == one.accuracy
    assert middle.loss == pytest.approx(one.loss, rel=1e-4)
    assert all(r["middle"] is None for i, r in enumerate(results) if i != 1)


@pytest.mark.parametrize("name", [*EQUAL, *ALIKE])
def test_replicas_hold_the_same_bits_and_resume_to_them(name: str, trained: list[dict[str, Any]]) -> None:
    results = [r[name] for r in trained]
    for rank, result in enumerate(results):
        other, own = results[rank % GROUPS]["own"], result["own"]
        assert other.keys() == own.keys() and own
        for key in own:
            if not key.startswith("buffer"):
                assert torch.equal(own[key], other[key]), (rank, key)
        assert nets.same(own, result["resumed"]), (rank, "resumed")
        assert nets.same(result["weights"], results[0]["weights"])


def test_batch_norm_and_dropout_see_a_part(trained: list[dict[str, Any]]) -> None:
    for name in ALIKE:
        for rank in range(GROUPS):
            ours, theirs = (trained[rank + r * GROUPS][name]["own"] for r in range(REPLICAS))
            means = [key for key in ours if key.endswith("running_mean")]
            assert means and not any(torch.equal(ours[k], theirs[k]) for k in means), (name, rank)
    moved = trained[0]["everything"]["own"]
    assert {k for k in moved if k.startswith("codebook")} == {"codebook 0", "codebook 1"}
