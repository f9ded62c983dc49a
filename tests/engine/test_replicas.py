"""Two replicas of two groups on four processes train as one pipeline does on whole batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lct_fast as lct
from lct_fast.codecs.vector_quantization import VectorQuantization
from lct_fast.engine import checkpoint
from lct_fast.engine.cuda.gate import Gate
from lct_fast.engine.schedules import stage
from lct_fast.engine.transport.replicas import part
from tests.engine import nets
from tests.engine.pipelined_cases import run_processes

# Nearly all of them read what four processes trained.
pytestmark = pytest.mark.slow

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
    # So often chosen that none is given another vector, which would be one of the first replica's.
    codec.codebook, codec.averages = words.clone(), lct.ops.vq_state(words, 1e6)
    codec._renew()


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


WITH_CRITICS = Case(lct.LocalCritic, "pooled_linear", lambda seed: _with_units(nets.net(seed)))
DROPPING = Case(lct.Greedy, "pooled_linear", lambda seed: _with_units(nets.net(seed), 0.3))


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
        "random": trainer.workers[0].random.state["cpu"],
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
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each case has its checkpoint."""
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def trained(folders: Path) -> list[dict[str, Any]]:
    """What the four processes made of every case."""
    return run_processes(_every, GROUPS * REPLICAS, [*EQUAL, *ALIKE], str(folders), timeout=280)


@pytest.mark.parametrize("name", list(EQUAL))
def test_replicas_equal_one_pipeline_on_whole_batches(
    name: str, trained: list[dict[str, Any]], threads: None
) -> None:
    expected, results = _whole(EQUAL[name]), [r[name] for r in trained]
    for result in results:
        for key, value in expected["weights"].items():
            # Sums over N / 2 rows twice in place of N once, which nine updates carry on; up to 9e-6 was seen.
            torch.testing.assert_close(result["weights"][key], value, atol=1e-4, rtol=1e-3, msg=key)
        _same_meter(result["meter"], expected["meter"], name == "vq")
    for last in (results[1], results[3]):
        torch.testing.assert_close(last["losses"], expected["losses"], atol=1e-4, rtol=1e-4)
    middle, one = results[1]["middle"], expected["middle"]
    assert middle.samples == one.samples and middle.accuracy == one.accuracy
    assert middle.loss == pytest.approx(one.loss, rel=1e-4)
    assert all(r["middle"] is None for i, r in enumerate(results) if i != 1)


def _same_meter(ours: dict[str, float], one: dict[str, float], codebooks: bool) -> None:
    if codebooks:
        # 8 x 8 positions of 4 codes of 3 bits; each pipeline sends the codebooks on top.
        assert one["wire_bytes"] > 96
        assert ours["wire_bytes"] - 96 == pytest.approx(REPLICAS * (one["wire_bytes"] - 96))
        ours = ours | {"wire_bytes": one["wire_bytes"]}
    assert ours == one


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
        streams = [result[name]["random"] for result in trained]
        assert all(not torch.equal(a, b) for i, a in enumerate(streams) for b in streams[:i])
    moved = trained[0]["everything"]["own"]
    assert {k for k in moved if k.startswith("codebook")} == {"codebook 0", "codebook 1"}


def test_a_checkpoint_of_replicas_goes_on_in_one_process_if_nothing_is_open(
    trained: list[dict[str, Any]], folders: Path, threads: None
) -> None:
    case = EQUAL["greedy"]
    expected, alone = _whole(case), case.trainer(seed=5)
    found = checkpoint.latest(folders / "greedy")
    assert found is not None
    assert (found / "group-2-replica-1.json").is_file()
    checkpoint.load(alone, found)
    for x, y in case.batches(case.rows)[MIDDLE:]:
        alone.step(x, y)
    for key, value in nets.state(alone).items():
        torch.testing.assert_close(value, expected["weights"][key], atol=1e-4, rtol=1e-3, msg=key)
    for name, message in [("local-critic", "2 replicas, with feedback"), ("greedy, pooled", "accumulation")]:
        found = checkpoint.latest(folders / name)
        assert found is not None
        before = EQUAL[name].trainer(seed=5)
        weights = nets.state(before)
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.load(before, found)
        assert nets.same(nets.state(before), weights)


def test_a_lost_file_of_a_replica_makes_a_checkpoint_damaged(
    trained: list[dict[str, Any]], folders: Path
) -> None:
    found = checkpoint.latest(folders / "soft labels")
    assert found is not None
    assert set(checkpoint.files(GROUPS, REPLICAS)) < set(checkpoint.read_manifest(found)["sha256"])
    (found / "group-1-replica-1.safetensors").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"group-1-replica-1.safetensors is missing"):
        checkpoint._read_group(found, 0, checkpoint.read_manifest(found), 1)


@pytest.fixture(scope="module")
def troubles(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four processes said when something was wrong."""
    folder = tmp_path_factory.mktemp("troubles")
    alone = DROPPING.trainer()
    for x, y in nets.batches(4):
        alone.step(x, y)
    checkpoint.save(alone, folder / "alone")
    return run_processes(_troubles, GROUPS * REPLICAS, str(folder), timeout=200)


def _troubles(folder: str) -> dict[str, Any]:
    said: dict[str, Any] = {"processes": _message(lambda: EQUAL["greedy"].trainer(schedule="pipelined"))}
    said["one process"] = _message(lambda: EQUAL["greedy"].trainer(replicas=2))
    said["from one"] = _go_on_from_one(Path(folder))
    stage.COMPARE_EVERY = 3
    said["codebooks"] = _drift(EQUAL["vq"], lambda t: t.workers[0].encoder.averages.sums, None)
    weights = lambda t: t.workers[0].parameters[0].detach()  # noqa: E731
    said["weights"] = _drift(EQUAL["greedy"], weights, Path(folder) / "drifted")
    said["rested"] = _rest_while_one_evaluates()
    said["flagged"] = _flag_one()
    said["lost"] = _lose_one()
    return said


def _rest_while_one_evaluates() -> int:
    """Batches done, with an evaluation between them that takes longer than a step may."""
    trainer = EQUAL["greedy"].trainer(schedule="pipelined", replicas=REPLICAS, step_timeout=4.0)

    def slowly() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(6):
            time.sleep(1.0)
            yield _hard(8)[0]

    if not trainer.first:
        return sum(isinstance(event, lct.Stats) for event in trainer.events())
    for x, y in _hard(8)[:2]:
        trainer.step(x, y)
        trainer.evaluate(slowly())
    trainer.stop()
    return trainer.batch


def _message(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was noticed"


def _go_on_from_one(folder: Path) -> dict[str, Any]:
    trainer = DROPPING.trainer(seed=5, schedule="pipelined", replicas=REPLICAS)
    fresh = trainer.workers[0].random.state["cpu"]
    found = checkpoint.latest(folder / "alone")
    assert found is not None
    checkpoint.load(trainer, found)
    random = trainer.workers[0].random.state["cpu"]
    result = {"own": _own(trainer), "batch": trainer.batch, "fresh": torch.equal(fresh, random)}
    _run(DROPPING, trainer, 4, None)
    return result


def _drift(case: Case, what: Callable[[lct.Trainer], Tensor], folder: Path | None) -> str:
    """Rank 2's ``what`` changes by itself; then a few batches, or a checkpoint."""
    trainer = case.trainer(schedule="pipelined", replicas=REPLICAS)
    rank = dist.get_rank()

    def work() -> None:
        for i, (x, y) in enumerate(case.batches(case.rows)[:3]):
            if i == 1 and rank == 2:
                what(trainer).view(-1)[0] += 1
            if i == 2 and folder is not None:
                checkpoint.save(trainer, folder)
            trainer.step(*(part(t, trainer.replica, REPLICAS) for t in (x, y)))

    if trainer.first:
        return _message(work)
    next(iter(trainer.events()))
    return ""


def _spoilt(case: Case, spoil: Callable[[Tensor], Tensor]) -> tuple[lct.Trainer, list[list[Tensor]]]:
    """A trainer in which rank 2 spoils the second batch's losses, and the batches of this replica."""
    calls = []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        rows = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        return spoil(rows) if dist.get_rank() == 2 and len(calls) == 2 else rows

    trainer = case.trainer(schedule="pipelined", replicas=REPLICAS, loss=loss)
    return trainer, [[part(t, trainer.replica, REPLICAS) for t in batch] for batch in case.batches(case.rows)]


def _flag_one() -> dict[str, Any]:
    """As on a device, where nobody waits for the flag of one replica. Gradients are sound, so rank 2 alone sees it."""
    trainer, batches = _spoilt(WITH_CRITICS, lambda rows: rows + rows.detach() * float("nan"))
    worker = trainer.workers[0]
    worker.gate = Gate(worker.index, worker.device, worker.replicas.any)
    if not trainer.first:
        for _ in zip(range(3), trainer.events(), strict=False):
            pass
        return {}
    trainer.step(*batches[0])
    before = _own(trainer)
    trainer.step(*batches[1])
    kept = nets.same(before, _own(trainer))
    said = _message(lambda: [trainer.step(*batch) for batch in batches[2:]])
    return {"said": said, "batch": trainer.batch, "kept": kept and nets.same(before, _own(trainer))}


def _lose_one() -> dict[str, Any]:
    """Rank 2 ends in its second batch."""

    def end(rows: Tensor) -> Tensor:
        raise ValueError("no more of this")

    trainer, batches = _spoilt(EQUAL["greedy"], end)
    if not trainer.first:
        next(iter(trainer.events()))
        return {}
    trainer.step(*batches[0])
    before = _own(trainer)
    said = _message(lambda: [trainer.step(*batch) for batch in batches])
    return {"said": said, "updated": not nets.same(before, _own(trainer))}


def test_refusals_name_the_cause(troubles: list[dict[str, Any]]) -> None:
    assert all(
        "ValueError: pipelined over processes takes one process a group: expected 2 processes for 2 groups, got 4"
        in said["processes"]
        for said in troubles
    )
    assert all("replicas=2 takes the pipelined schedule" in said["one process"] for said in troubles)
    for arguments, message in [
        ({"replicas": 0}, "replicas: expected an integer >= 1, got 0"),
        (
            {"replicas": 2},
            "replicas=2 takes the pipelined schedule, without serial steps, over 2 processes a group",
        ),
        ({"replicas": 2, "schedule": "pipelined"}, "start with torchrun"),
    ]:
        with pytest.raises(ValueError, match=message):
            EQUAL["greedy"].trainer(**arguments)
    with pytest.raises(ValueError, match="expected rows that 2 replicas divide, got 5"):
        part(torch.zeros(5, 2), 0, 2)


def test_parts_are_contiguous_and_make_the_whole() -> None:
    whole = torch.arange(12).view(6, 2)
    parts = [part(whole, r, 3) for r in range(3)]
    assert [p[:, 0].tolist() for p in parts] == [[0, 2], [4, 6], [8, 10]]


def test_replicas_that_drift_apart_are_named(troubles: list[dict[str, Any]]) -> None:
    for rank in (0, 2):
        said = troubles[rank]
        message = (
            "ReplicaError: replicas have drifted apart: expected the {} of group 1 to be that of rank 0, got "
            "another on rank 2; "
        )
        assert said["codebooks"].startswith(message.format("codebook"))
        assert said["weights"].startswith(message.format("weights"))


def test_a_replica_that_ends_stops_the_others_before_they_update(troubles: list[dict[str, Any]]) -> None:
    ended, other = troubles[2]["lost"], troubles[0]["lost"]
    assert ended["said"] == "ValueError: no more of this"
    assert other["said"].startswith("PeerError: lost a replica of this group, rank 2 (")
    assert "go on from the last checkpoint" in other["said"]
    assert not ended["updated"] and not other["updated"]


def test_replicas_leave_out_the_same_batch(troubles: list[dict[str, Any]]) -> None:
    flagged = [troubles[rank]["flagged"] for rank in (0, 2)]
    for one in flagged:
        assert one["said"].startswith(
            "NonFiniteError: the loss or a gradient of group 1 at batch 1 is NaN or Inf"
        )
        assert one["kept"]
    assert flagged[0]["batch"] == flagged[1]["batch"]


def test_replicas_rest_while_one_evaluates(troubles: list[dict[str, Any]]) -> None:
    assert [said["rested"] for said in troubles] == [2] * len(troubles)


def test_replicas_go_on_from_one_process(troubles: list[dict[str, Any]]) -> None:
    results = [said["from one"] for said in troubles]
    for rank, result in enumerate(results):
        assert result["batch"] == 4
        # Batch norm's statistics are there too.
        assert nets.same(result["own"], results[rank % GROUPS]["own"])
    # Only the random numbers of the second replica are new, where any were drawn.
    assert not results[0]["fresh"] and results[2]["fresh"]


@pytest.mark.parametrize(
    ("device", "replicas"),
    [
        ("cpu", 3),
        pytest.param(
            "cuda",
            2,
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs, joined by NCCL"),
            ],
        ),
    ],
)
def test_replicas_of_one_group_equal_the_whole_batch(device: str, replicas: int, threads: None) -> None:
    """Plain data parallelism, over gloo or NCCL."""
    expected = lct.Trainer(_one_group(torch.device(device)), lct.Greedy())
    losses = [expected.step(x, y).losses.cpu() for x, y in _hard(12)]
    for result in run_processes(_train_one_group, replicas, device):
        torch.testing.assert_close(result["losses"], torch.stack(losses), atol=1e-4, rtol=1e-4)
        for key, value in nets.state(expected).items():
            torch.testing.assert_close(result["weights"][key], value.cpu(), atol=1e-4, rtol=1e-3, msg=key)


def _one_group(device: torch.device) -> list[lct.Group]:
    example = torch.zeros(4, 1, 8, 8, device=device)
    return lct.split(nets.rows_apart().to(device), example_input=example, split_points=[])


def _train_one_group(kind: str) -> dict[str, Any]:
    device, replicas = torch.device(kind), dist.get_world_size()
    if kind == "cuda":
        device = torch.device(kind, dist.get_rank())
        torch.cuda.set_device(device)
    trainer = lct.Trainer(
        _one_group(device), lct.Greedy(), schedule="pipelined", replicas=replicas, devices=[device]
    )
    losses = []
    for batch in _hard(12):
        x, y = (part(t, trainer.replica, replicas).to(device) for t in batch)
        losses.append(trainer.step(x, y).losses.cpu())
    trainer.flush()
    trainer.stop()
    return {"losses": torch.stack(losses), "weights": {n: t.cpu() for n, t in nets.state(trainer).items()}}
