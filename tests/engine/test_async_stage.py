"""Asynchronous over processes: nobody waits for a slow group, nothing but batches is lost, and all come to an end."""

from __future__ import annotations

import threading
import time
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lct_fast as lct
from lct_fast.codecs import Encoded, Layout
from lct_fast.engine import checkpoint
from lct_fast.engine.meter import GroupMeter
from lct_fast.engine.network import exits
from lct_fast.engine.schedules.intake import Intake
from lct_fast.engine.storage.replay import ReplayBuffer, ReplaySlot
from lct_fast.engine.transport.link import Inbox, Outbox
from lct_fast.engine.transport.packet import Kind, Packet
from tests.engine import nets
from tests.engine.pipelined_cases import Case, run_processes
from tests.engine.test_link import Pipe
from tests.engine.test_pipelined import FARTHEST

STEPS = 12
# Options that are the schedule's own.
PACE = {f.name for f in fields(lct.Async)}
# So many that a group is not done before the first evaluation.
LONG = 200
PATIENCE = timedelta(seconds=60)


def _trainer(seed: int = 0, **options: Any) -> lct.Trainer:
    pace = {name: options.pop(name) for name in PACE & options.keys()}
    case = Case(lct.Greedy, options={"feedback_delay": 0} | options)
    return case.trainer(dist.get_world_size(), lct.Async(**{"steps": STEPS} | pace), seed)


def _finish(trainer: lct.Trainer) -> None:
    """What the first group's process does from where it is to the end of training."""
    batches = nets.batches(20)
    while not trainer.finished:
        trainer.step(*batches[trainer.batch % 20])


# The thread between link and buffer


def _intake(size: int) -> tuple[Outbox, Intake, ReplayBuffer, Inbox]:
    pipe, cpu, buffer = Pipe(), torch.device("cpu"), ReplayBuffer(size)
    outbox = Outbox(pipe, 2, cpu, GroupMeter(0), "send", "the process of group 2")
    inbox = Inbox(pipe, 2, cpu, GroupMeter(1), "receive", "the process of group 1")

    def keep(packet: Packet) -> None:
        h = packet.tensors[0].clone()
        buffer.write(packet.batch, Encoded((h,), Layout.of(h)), h, h)

    intake = Intake(inbox, keep, buffer.sample, lambda what: None)
    intake.start()
    return outbox, intake, buffer, inbox


def _send(outbox: Outbox, kind: Kind, *batches: int) -> None:
    for batch in batches:
        outbox.put(Packet(kind, batch, [torch.full((4,), float(batch))] if kind is Kind.TRAIN else ()))


def _taken(intake: Intake) -> int:
    item = intake.next(works=True)
    assert isinstance(item, ReplaySlot)
    assert item.coded.tensors[0].tolist() == [item.batch] * 4
    return item.batch


def _met(intake: Intake, inbox: Inbox) -> tuple[Kind, int]:
    item = intake.next(works=False)
    assert isinstance(item, Packet)
    inbox.release()
    intake.met()
    return item.kind, item.batch


def test_a_producer_never_waits_and_only_batches_are_overwritten() -> None:
    outbox, intake, buffer, inbox = _intake(size=2)
    # Many more than all slots of the link, and nobody looks at them.
    _send(outbox, Kind.TRAIN, *range(30))
    _send(outbox, Kind.MARK, 29)
    _send(outbox, Kind.TRAIN, 30)
    _send(outbox, Kind.FLUSH, 30)
    assert _met(intake, inbox) == (Kind.MARK, 29)
    assert _met(intake, inbox) == (Kind.FLUSH, 30)
    assert [_taken(intake) for _ in range(3)] == [30, 29, 30]
    _send(outbox, Kind.STOP, 30)
    assert _met(intake, inbox) == (Kind.STOP, 30)
    outbox.close()
    inbox.close()


def test_a_mark_is_met_before_what_comes_behind_it() -> None:
    outbox, intake, buffer, inbox = _intake(size=5)
    _send(outbox, Kind.TRAIN, 0, 1)
    _send(outbox, Kind.MARK, 1)
    _send(outbox, Kind.TRAIN, 2)
    # What comes behind the mark has arrived, and waits.
    deadline = time.monotonic() + 30
    while not inbox.has_next():
        assert time.monotonic() < deadline, "it did not wait"
        time.sleep(0.005)
    # Also when a slot is wanted the packet comes first, as often as one asks.
    for _ in range(3):
        item = intake.next(works=False)
        assert isinstance(item, Packet) and item.kind is Kind.MARK
        assert sorted(slot.batch for slot in buffer.slots) == [0, 1]
        assert intake.next(works=True) is item
    assert _met(intake, inbox) == (Kind.MARK, 1)
    _send(outbox, Kind.STOP, 2)
    assert _met(intake, inbox) == (Kind.STOP, 2)
    assert sorted(slot.batch for slot in buffer.slots) == [0, 1, 2]


def test_who_waits_is_woken_by_a_batch_and_by_an_error() -> None:
    outbox, intake, _, inbox = _intake(size=1)
    got: list[Any] = []
    took = threading.Event()

    def wait() -> None:
        got.append(_taken(intake))
        took.set()
        with pytest.raises(lct.PeerError) as caught:
            intake.next(works=False)
        got.append(str(caught.value))

    waiting = threading.Thread(target=wait)
    waiting.start()
    _send(outbox, Kind.TRAIN, 7)
    assert took.wait(60)
    inbox.transport.tensors.put(RuntimeError("Connection closed"))  # type: ignore[attr-defined]
    waiting.join(60)
    assert not waiting.is_alive()
    assert got[0] == 7 and "lost the process of group 1 (Connection closed)" in got[1]


# Processes


def test_a_slow_group_does_not_slow_the_others(threads: None) -> None:
    results = run_processes(_slow_second, 3)
    assert [r["updates"] for r in results] == [STEPS] * 3
    # Group 1 went on forwarding for it; it made updates with what came after group 1 had finished.
    assert results[0]["batch"] > STEPS
    assert results[1]["newest"] >= STEPS
    assert results[2]["reused"] >= STEPS - 3


def _slow_second() -> dict[str, Any]:
    """Group 2 does not move on from its third update until groups 1 and 3 have made all of theirs."""
    assert STEPS > FARTHEST, "as many would fit the slots of a link"
    trainer = _trainer()
    store = dist.distributed_c10d._get_default_store()
    rank, newest = dist.get_rank(), -1
    if trainer.first:
        batches = nets.batches(STEPS)
        for x, y in batches:
            trainer.step(x, y)
        store.set("group 1", "done")
        _finish(trainer)
        trainer.stop()
    else:
        for event in trainer.events():
            assert isinstance(event, lct.Stats)
            if rank == 1 and event.batch == 2:
                store.wait(["group 1", "group 3"], PATIENCE)
            if rank == 2 and event.batch == STEPS - 1:
                store.set("group 3", "done")
            kept: Any = trainer.workers[0].kept
            newest = max(newest, *(slot.batch for slot in kept.buffer.slots))
    meter = trainer.workers[0].meter
    return {"updates": meter.updates, "reused": meter.reused, "batch": trainer.batch, "newest": newest}


@pytest.mark.slow
def test_all_but_batches_arrives_in_order_and_a_checkpoint_goes_on(tmp_path: Path, threads: None) -> None:
    results = run_processes(_whole_life, 3, str(tmp_path))
    for result in results:
        assert result["updates"] == result["resumed updates"] == LONG
        assert result["rate"] == 0.02
        assert result["at mark"] == result["loaded"]
        assert 0 < result["at mark"]["updates"] <= LONG
        # Nobody trains between the batches of an evaluation.
        first, second, third = result["evaluated at"]
        assert len(set(first)) == len(set(second)) == len(set(third)) == 1
        assert [len(first), len(second), len(third)] == [3, 1, 20]
    for result in results[1:]:
        assert result["marks"] == [(4, 1), (4, 2), (5, 3), (5, 4)]
    last = results[-1]
    assert len(last["evaluations"]) == 3
    # The stream's evaluation is that of the network that came out.
    assert last["evaluations"][-1] == pytest.approx(results[0]["accuracy"])
    assert sorted(last["numbers"]) == last["numbers"] == list(range(LONG))


def _whole_life(folder: str) -> dict[str, Any]:
    options: dict[str, Any] = {"buffer": 3, "codec": "vq:16,2", "steps": LONG}
    trainer = _trainer(**options)
    batches = nets.batches(20)
    result: dict[str, Any] = {"marks": [], "evaluations": [], "numbers": []}
    result["evaluated at"] = _watch_evaluations(trainer)
    if trainer.first:
        for t in range(5):
            trainer.step(*batches[t])
        trainer.mark(1)
        trainer.mark(2)
        trainer.evaluate(batches[:3])
        trainer.set_learning_rate(0.02)
        trainer.step(*batches[5])
        checkpoint.save(trainer, Path(folder))
        result["at mark"] = _plain(trainer)
        trainer.mark(3)
        trainer.mark(4)
        trainer.evaluate(batches[3:4])
        _finish(trainer)
        trainer.flush()
        trainer.evaluate(batches)
        trainer.stop()
    else:
        for event in trainer.events():
            if isinstance(event, lct.Mark):
                result["marks"].append((event.batch, event.code))
                assert trainer.batch == event.batch + 1
                if event.code == 3:
                    checkpoint.save(trainer, Path(folder), {"position": 5})
                    result["at mark"] = _plain(trainer)
            elif isinstance(event, lct.Stats):
                result["numbers"].append(event.batch)
                assert event.losses[: dist.get_rank() + 1].isfinite().all()
            else:
                result["evaluations"].append(event.accuracy)
    (worker,) = trainer.workers
    assert worker.optimizer is not None
    result["rate"] = worker.optimizer.param_groups[0]["lr"]
    result["updates"] = worker.meter.updates
    trainer.gather()
    logits, labels = exits.collect(trainer.groups, batches)
    result["accuracy"] = [exits.accuracy(z, labels) for z in logits]
    return result | _resume(folder, options)


def _watch_evaluations(trainer: lct.Trainer) -> list[list[int]]:
    """How many updates the group had made at each batch of each evaluation."""
    run: Any = trainer._run
    found: list[list[int]] = [[]]
    evaluate, evaluated = run._evaluate, run._evaluated

    def batch(*args: Any) -> None:
        found[-1].append(run.group.updates)
        evaluate(*args)

    def end() -> Any:
        if len(found) < 3:
            found.append([])
        return evaluated()

    run._evaluate, run._evaluated = batch, end
    return found


def _resume(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    trainer = _trainer(seed=5, **options)
    dist.barrier()
    found = checkpoint.latest(Path(folder))
    assert found is not None
    assert checkpoint.load(trainer, found) == {"position": 5}
    assert trainer.batch == 6
    loaded = _plain(trainer)
    if trainer.first:
        _finish(trainer)
        trainer.stop()
    else:
        list(trainer.events())
    return {"loaded": loaded, "resumed updates": trainer.workers[0].meter.updates}


def _plain(trainer: lct.Trainer) -> Any:
    """What the group keeps beside its weights, in a form that compares."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.nan_to_num(nan=-1.0).tolist()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list) else value

    (worker,) = trainer.workers
    assert worker.kept is not None
    decoder = {} if worker.decoder is None else worker.decoder.state()
    return plain(worker.kept.state() | {"version": decoder.get("known_version")})


def test_early_ends_and_limits(threads: None) -> None:
    assert run_processes(_ends, 2) == ["ended", "ended"]


def _ends() -> str:
    with pytest.raises(ValueError, match="slow_down simulates a slow group in one process"):
        _trainer(slow_group=1, slow_down=2.0)

    # Stopped before the groups have finished.
    trainer = _trainer()
    if trainer.first:
        for x, y in nets.batches(3):
            trainer.step(x, y)
        assert not trainer.finished
        trainer.stop()
    else:
        assert len(list(trainer.events())) <= STEPS

    # With a limit a group idles until there is something new, and still everyone finishes.
    trainer = _trainer(reuse_limit=1)
    if trainer.first:
        _finish(trainer)
        assert trainer.batch >= STEPS
        with pytest.raises(RuntimeError, match=f"every group has trained on its {STEPS} batches"):
            trainer.step(*nets.batches(1)[0])
        trainer.stop()
    else:
        list(trainer.events())
    replay = trainer.meter.replay()
    assert replay["updates"] == [STEPS] and replay["reused"] == [0]
    return "ended"


@pytest.mark.parametrize("gone", [0, 1])
def test_a_lost_process_is_named(gone: int, threads: None) -> None:
    errors = run_processes(_lose, 2, gone)
    assert errors[1 - gone].startswith(f"rank {gone} (group {gone + 1}, ")
    assert "there is no checkpoint yet" in errors[1 - gone]


def _lose(gone: int) -> str:
    trainer = _trainer(steps=100000)
    try:
        if trainer.first:
            for t in range(100000 if gone else 3):
                trainer.step(*nets.batches(1, seed=t)[0])
        else:
            for _ in trainer.events():
                if gone:
                    break
    except lct.PeerError as error:
        return str(error)
    # The process ends here, without a word.
    return "nothing was noticed"
