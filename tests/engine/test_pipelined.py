"""Pipelined equals lockstep with the same feedback delay, bit for bit, in one process and over several."""

from __future__ import annotations

import gc
import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lct_fast as lct
from lct_fast.engine.schedules.schedule import PIPELINED_DELAY
from lct_fast.engine.schedules.stage import DEPTH
from lct_fast.engine.transport import heartbeat
from tests.engine import nets
from tests.engine.pipelined_cases import (
    CASES,
    Case,
    run_processes,
    train_as_rank,
    train_here,
    train_to_the_end,
)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", list(CASES))
def test_pipelined_in_one_process_equals_lockstep(name: str, count: int, threads: None) -> None:
    lockstep, pipelined = train_here(CASES[name], count), train_here(CASES[name], count, "pipelined")
    _same(lockstep, pipelined)
    untrained = CASES[name].trainer(count, "lockstep")
    assert not nets.same(lockstep["weights"], {k: v for k, v in _state(untrained).items()})


def _state(trainer: lct.Trainer) -> dict[str, torch.Tensor]:
    return {f"{k}.{n}": t for k, g in enumerate(trainer.groups) for n, t in g.state_dict().items()}


def test_greedy_is_the_same_whatever_the_delay(threads: None) -> None:
    plain = train_here(Case(lct.Greedy, "mlp_aux", {"feedback_delay": 0}), 4)
    _same(plain, train_here(CASES["greedy"], 4, "pipelined"))


def test_the_delay_changes_what_local_critic_learns(threads: None) -> None:
    """Otherwise equality under delay would show nothing."""
    three, one = train_here(CASES["local-critic"], 4), train_here(CASES["shortest delay"], 4)
    assert not nets.same(three["weights"], one["weights"])


@pytest.mark.parametrize("count", [2, 4])
def test_pipelined_over_processes_equals_lockstep_and_resumes(
    count: int, tmp_path: Path, threads: None
) -> None:
    results = run_processes(_every_case, count, str(tmp_path))
    for name, case in CASES.items():
        expected = train_here(case, count)
        for rank, result in enumerate(results):
            got = result[name]
            assert nets.same(got["weights"], expected["weights"]), (name, rank)
            # Adam's critics, dropout and owed feedback all come back; a scheduler's past does too.
            assert nets.same(got["resumed"], expected["weights"]), (name, rank, "resumed")
        _same(expected, results[-1][name])


def _every_case(folder: str) -> dict[str, Any]:
    count = dist.get_world_size()
    return {name: train_as_rank(case, count, Path(folder) / name) for name, case in CASES.items()}


def _same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert nets.same(a["weights"], b["weights"])
    assert torch.equal(a["losses"], b["losses"])
    assert a["middle"] == b["middle"]
    assert a["feedback"] == b["feedback"] and a["wire"] == b["wire"]


@pytest.mark.slow
def test_memory_stays_flat_over_2000_ticks(threads: None) -> None:
    for sizes in run_processes(_many_ticks, 2):
        # An activation of 64 KiB kept a tick would be 100 MB by then, a loss of 64 bytes a tick 0.1 MB.
        assert sizes["late"] - sizes["early"] < 4, sizes


def _many_ticks() -> dict[str, float]:
    """Resident megabytes after 400 ticks and after 2,000."""
    trainer = Case(lct.LocalCritic).trainer(2, "pipelined")
    batches = nets.batches(20)
    sizes = {}

    def look(batch: int) -> None:
        if batch in (400, 1999):
            sizes["early" if batch == 400 else "late"] = _resident()

    if trainer.first:
        for t in range(2000):
            look(trainer.step(*batches[t % 20]).batch)
        trainer.flush()
        trainer.stop()
    else:
        for event in trainer.events():
            assert isinstance(event, lct.Stats)
            look(event.batch)
    return sizes


# Slots of the sending and of the receiving end, and the batch the consumer is at.
FARTHEST = 2 * DEPTH + 1


@pytest.mark.parametrize("method", [lct.Greedy, lct.LocalCritic])
def test_a_slow_group_makes_the_one_before_it_wait(method: type[lct.Method], threads: None) -> None:
    first, _ = run_processes(_slow_second, 2, method)
    # Group 2's loss leaves before group 2 sleeps, so feedback holds group 1 back a batch later.
    farthest = FARTHEST if method is lct.Greedy else PIPELINED_DELAY + 1
    assert max(first["ahead"]) <= farthest
    # 20 batches at 20 ms each, less those that fit the slots.
    assert first["waited"] > 0.02 * (20 - farthest) / 2


def _slow_second(method: type[lct.Method]) -> dict[str, Any]:
    trainer = Case(method).trainer(2, "pipelined")
    store = dist.distributed_c10d._get_default_store()
    result: dict[str, Any] = {"ahead": []}
    if trainer.first:
        for t, (x, y) in enumerate(nets.batches(20)):
            trainer.step(x, y)
            result["ahead"].append(t - int(store.get("done")))
        result["waited"] = trainer.meter.groups[0].waiting
        trainer.flush()
        trainer.stop()
        return result
    store.set("done", "-1")
    for event in trainer.events():
        assert isinstance(event, lct.Stats)
        time.sleep(0.02)
        store.set("done", str(event.batch))
    return result


def _resident() -> float:
    """Megabytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def test_a_lost_process_is_named_and_marks_of_misuse(threads: None) -> None:
    errors = run_processes(_lose_the_second, 2)
    assert errors[0].startswith("rank 1 (group 2, ") and "there is no checkpoint yet" in errors[0]


def _lose_the_second() -> str:
    trainer = Case(lct.Greedy).trainer(2, "pipelined")
    with pytest.raises(RuntimeError, match="this process trains one group only"):
        trainer.module()
    if not trainer.first:
        with pytest.raises(RuntimeError, match="step belongs to the first group's process"):
            trainer.step(*nets.batches(1)[0])
        next(iter(trainer.events()))
        # Gone without a word, as a killed process goes; its result is written for it.
        for link in (trainer._run.inbox.transport.data, trainer._run.inbox.transport.control):  # type: ignore[union-attr]
            dist.destroy_process_group(link)
        return ""
    with pytest.raises(RuntimeError, match="the first group's process drives"):
        next(iter(trainer.events()))
    try:
        for x, y in nets.batches(50):
            trainer.step(x, y)
    except lct.PeerError as error:
        return str(error)
    return "nothing was noticed"


def test_nan_in_one_group_is_what_all_report(threads: None) -> None:
    first, second, third = run_processes(_spoil_the_second, 3)
    assert second == (
        "the loss of group 2 at batch 4 is NaN or Inf: the group was not updated; lower its learning rate and go on "
        "from the last checkpoint"
    )
    for error in (first, third):
        assert error.startswith("rank 1 (group 2, ") and f"ended by NonFiniteError: {second}" in error


def _spoil_the_second() -> str:
    calls = 0

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        return value * float("nan") if dist.get_rank() == 1 and calls == 5 else value

    trainer = Case(lct.Greedy, options={"loss": loss}).trainer(3, "pipelined")
    try:
        if trainer.first:
            for x, y in nets.batches(200):
                trainer.step(x, y)
        for _ in trainer.events() if not trainer.first else ():
            pass
    except (lct.PeerError, lct.NonFiniteError) as error:
        heartbeat.report(error)
        # The first rank holds the store through which the others learn of it.
        store = dist.distributed_c10d._get_default_store()
        store.set(f"told {dist.get_rank()}", "")
        if trainer.first:
            store.wait(["told 1", "told 2"], timedelta(seconds=60))
        return str(error)
    return "nothing was noticed"


def test_a_loop_that_hangs_is_named_by_the_others_and_by_itself(threads: None) -> None:
    first, second = run_processes(_hang_in_the_second, 2)
    for error in (first, second):
        assert error.startswith("rank 1 (group 2, ") and "in its training loop for" in error, error
    assert "it is at threading.py:" in second


def _hang_in_the_second() -> str:
    trainer = Case(lct.Greedy, options={"step_timeout": 3.0}).trainer(2, "pipelined")
    try:
        if trainer.first:
            for x, y in nets.batches(200):
                trainer.step(x, y)
        for event in trainer.events() if not trainer.first else ():
            assert trainer.ranks is not None and isinstance(event, lct.Stats)
            if event.batch == 3:
                # Until its own watchdog has found it.
                trainer.ranks.heart._settled.wait(100)
    except lct.PeerError as error:
        return str(error)
    return "nothing was noticed"


def test_refusals_name_the_cause(threads: None) -> None:
    for arguments, message in [
        ({"schedule": "serial"}, "schedule: expected one of lockstep, pipelined, async; got 'serial'"),
        ({"step_timeout": 0.0}, "step_timeout: expected a positive number of seconds, got 0.0"),
        ({"start_timeout": float("inf")}, "start_timeout: expected a positive number of seconds, got inf"),
        ({"schedule": "pipelined", "feedback_delay": 0}, "feedback_delay: expected an integer >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backprop has no pipelined schedule here"):
        lct.Trainer(nets.groups(lct.Backprop()), lct.Backprop(), schedule="pipelined")
    alone = lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy())
    for call in (lambda: alone.mark(1), alone.stop, lambda: next(iter(alone.events()))):
        with pytest.raises(RuntimeError, match="is for a pipelined run over processes"):
            call()
    messages = run_processes(_mismatches, 2)
    assert all("expected 4 processes for 4 groups, got 2" in m[0] for m in messages)
    assert all("rank 1 cuts the model differently from rank 0" in m[1] for m in messages)
    for said, expected in zip(messages[0][2:], _DIFFERENT, strict=True):
        assert said == f"{expected}: give every process the same"
    assert messages[0] == messages[1]


_DIFFERENT = [
    "method: rank 0 has greedy, rank 1 has local-critic",
    "accumulate: rank 0 has 1, rank 1 has 2",
    "feedback_delay: rank 0 has 3, rank 1 has 4",
    "codec: rank 0 has none, rank 1 has int8",
    "schedule: rank 0 has 'pipelined', rank 1 has Hybrid(serial=0.1, schedule='pipelined', block=16, microbatches=1)",
]


def _mismatches() -> list[str]:
    messages = []
    with pytest.raises(ValueError) as caught:
        Case(lct.Greedy).trainer(4, "pipelined")
    messages.append(str(caught.value))
    points = [["conv3"], ["conv5"]][dist.get_rank()]
    groups = lct.split(nets.net(), example_input=torch.zeros(4, 1, 8, 8), split_points=points)
    with pytest.raises(ValueError) as caught:
        lct.Trainer(groups, lct.Greedy(), schedule="pipelined")
    messages.append(str(caught.value))
    other: list[dict[str, Any]] = [
        {"method": lct.LocalCritic()},
        {"accumulate": 2},
        {"feedback_delay": 4},
        {"codec": "int8"},
        {"schedule": lct.Hybrid(0.1, "pipelined")},
    ]
    for more in other:
        arguments = {"method": lct.Greedy(), "schedule": "pipelined"} | (more if dist.get_rank() else {})
        with pytest.raises(ValueError) as caught:
            lct.Trainer(nets.groups(lct.Greedy(), 2), **arguments)
        messages.append(str(caught.value))
    return messages


def test_nothing_goes_down_a_stream_that_has_ended(threads: None) -> None:
    first, last = run_processes(_after_the_end, 2)
    assert [m.partition(":")[0] for m in first] == ["step", "flush", "evaluate", "mark", "set_learning_rate"]
    assert all("the stream has ended with stop(); build the trainer anew" in m for m in (*first, *last))
    assert len(last) == 1


def _after_the_end() -> list[str]:
    trainer = Case(lct.LocalCritic).trainer(2, "pipelined")
    x, y = nets.batches(1)[0]
    if not trainer.first:
        list(trainer.events())
        calls: list[Any] = [lambda: next(trainer.events())]
    else:
        trainer.step(x, y)
        trainer.flush()
        trainer.stop()
        trainer.stop()
        calls = [
            lambda: trainer.step(x, y),
            trainer.flush,
            lambda: trainer.evaluate([(x, y)]),
            lambda: trainer.mark(1),
            lambda: trainer.set_learning_rate(0.1),
        ]
    before = nets.state(trainer)
    messages = []
    for call in calls:
        with pytest.raises(RuntimeError) as caught:
            call()
        messages.append(str(caught.value))
    assert nets.same(nets.state(trainer), before)
    return messages


def test_a_closed_trainer_leaves_no_connection_and_no_thread(threads: None) -> None:
    for found in run_processes(_one_after_the_other, 2):
        assert found["early"] == "close comes after stop(), or the end of events()"
        # Each trainer holds some 30 files; one or two of the store's close a moment later.
        files = [f for f, *_ in found["held"]]
        assert max(files) - min(files) < 10, files
        # No thread, and no process group but the program's own.
        assert [rest for _, *rest in found["held"]] == [[0, 1]] * 3


def _one_after_the_other() -> dict[str, Any]:
    held, early = [], ""
    for hybrid in (None, None, lct.Hybrid(0.5, block=1)):
        trainer = Case(lct.LocalCritic, hybrid=hybrid).trainer(2, "pipelined")
        if not early:
            with pytest.raises(RuntimeError) as caught:
                trainer.close()
            early = str(caught.value)
        train_to_the_end(trainer, nets.batches(3))
        trainer.close()
        trainer.close()
        del trainer
        gc.collect()
        heartbeats = sum(t.name == "heartbeat" for t in threading.enumerate())
        groups = len(dist.distributed_c10d._world.pg_map)
        held.append((len(os.listdir("/proc/self/fd")), heartbeats, groups))
    return {"held": held, "early": early}
