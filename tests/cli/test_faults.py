"""Faults, as a user meets them: a run ends with one line that says why, and goes on with nothing lost."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.fault_drills import Drill, _lines, _lives, _pids, compare, meet, torchrun
from lct_fast.cli import main, processes, run_folder
from lct_fast.cli.recorder import Recorder
from lct_fast.cli.run_folder import RunFolder
from lct_fast.engine import checkpoint

SMALL = [
    *("--data", "digits", "--model", "digits_cnn:width=0.25", "--limit", "320", "--threads", "1"),
    *("--groups", "2", "--steps", "12", "--checkpoint-every", "3", "--log-every", "2"),
]


@pytest.fixture(autouse=True)
def _undo_global_state(threads: None) -> None:
    torch.use_deterministic_algorithms(False)


def _train(out: Path, *more: str) -> int:
    return main(["train", *SMALL, "--out", str(out), *more])


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that is no progress bar."""
    lines = [s for s in capsys.readouterr().err.splitlines() if "lct-fast train: " in s]
    assert len(lines) == 1, lines
    return lines[0]


def _interrupt(monkeypatch: pytest.MonkeyPatch, step: int, strike: Callable[[], None]) -> None:
    record = Recorder.record

    def recorded(recorder: Recorder, stats: Any) -> None:
        record(recorder, stats)
        if recorder.done >= step:
            strike()

    monkeypatch.setattr(Recorder, "record", recorded)


def _stop_at(step: int, out: Path, *options: str) -> None:
    """A run that ends after ``step`` batches as by Ctrl-C."""

    def strike() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        _interrupt(patch, step, strike)
        assert _train(out, *options) == 130


@pytest.mark.slow
@pytest.mark.parametrize(
    "drill",
    [
        Drill("kill", 0, 3, rank=1, batch=14, delay=0.01, how="restart", part="header", codec="none"),
        Drill("stop", 0, 2, rank=1, batch=9, delay=0.01, how="alone", part="header", codec="vq:64,4"),
        Drill("full", 0, 2, rank=0, batch=9, delay=0.0, how="resume", part="header", codec="vq:64,4"),
    ],
    ids=lambda d: d.kind,
)
def test_a_run_over_processes_survives_a_fault(drill: Drill, tmp_path: Path) -> None:
    # Raises where a process stays, names nobody, or the run that goes on differs.
    measured = meet(drill, tmp_path, step_timeout=20.0, wait=False)
    assert measured["survivors_seconds"] > 0


@dataclass
class Running:
    """A run of two processes under torchrun that has a checkpoint and would go on for ever.

    Attributes:
        logs: of its ranks, a folder each. pids: of its ranks. deadline: of the test, by the monotonic clock.
    """

    launcher: subprocess.Popen[bytes]
    logs: Path
    pids: list[int]
    deadline: float

    def said(self, rank: int) -> Path:
        return self.logs / str(rank) / "stderr.log"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    options = [*SMALL[:-6], *("--steps", "100000", "--epochs", "100000", "--schedule", "pipelined")]
    command = torchrun(2, 0, tmp_path / "logs", "lct_fast", [*options, "--out", str(tmp_path / "run")])
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    pids: list[int] = []
    try:
        while not checkpoint.latest(tmp_path / "run" / "checkpoints"):
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        (logs,) = (tmp_path / "logs").glob("*/attempt_0")
        pids = list(_pids(logs).values())
        assert len(pids) == 2 and all(map(_lives, pids))
        yield Running(launcher, logs, pids, deadline)
    finally:
        launcher.kill()
        for pid in filter(_lives, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_no_process_outlives_its_launcher(running: Running) -> None:
    running.launcher.kill()
    while any(map(_lives, running.pids)):
        assert time.monotonic() < running.deadline, "a worker lives on"
        time.sleep(0.1)
    for rank in range(2):
        (said,) = _lines(running.said(rank))
        assert "the launcher (torchrun) is gone" in said and "go on with --resume" in said


@pytest.mark.slow
@pytest.mark.parametrize("to", ["all", "one"])
def test_ctrl_c_ends_every_process_and_is_what_they_say(to: str, running: Running) -> None:
    # From a terminal the launcher gets it, and passes it on.
    os.kill(running.launcher.pid if to == "all" else running.pids[1], signal.SIGINT)
    assert running.launcher.wait(240) == 1
    assert not any(map(_lives, running.pids))
    said = [running.said(rank).read_text() for rank in range(2)]
    assert not any("Traceback" in text or "trainer.stop()" in text for text in said)
    interrupted = [text.count("lct-fast train: interrupted") for text in said]
    if to == "all":
        assert interrupted == [1, 0]
    else:
        assert interrupted == [0, 0] and "rank 1" in said[0] and "KeyboardInterrupt" in said[0]


@pytest.mark.parametrize(("before", "after"), [("pipelined", "lockstep"), ("lockstep", "pipelined")])
@pytest.mark.parametrize("method", ["local-critic", "greedy"])
def test_a_run_goes_on_under_the_other_schedule(before: str, after: str, method: str, tmp_path: Path) -> None:
    options = ["--method", method, "--feedback-delay", "3"] + ["--critic", "pooled_linear:pool=2"]
    assert _train(tmp_path / "whole", *options, "--schedule", "lockstep") == 0
    _stop_at(8, tmp_path / "run", *options, "--schedule", before)
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.name == "step-00000006"
    assert _train(tmp_path / "run", "--schedule", after, "--resume") == 0
    assert compare(tmp_path / "run", tmp_path / "whole") == ""


def test_a_delay_that_pipelining_cannot_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _stop_at(5, tmp_path / "run")
    capsys.readouterr()
    assert _train(tmp_path / "run", "--schedule", "pipelined", "--resume") == 2
    assert "this run has --feedback-delay 0, and --schedule pipelined needs 1 or more" in _said(capsys)
    # Greedy has no feedback to delay.
    assert _train(tmp_path / "greedy", "--method", "greedy") == 0
    _stop_at(5, tmp_path / "run2", "--method", "greedy")
    assert _train(tmp_path / "run2", "--schedule", "pipelined", "--resume") == 0
    assert compare(tmp_path / "run2", tmp_path / "greedy") == ""


def test_a_damaged_checkpoint_is_passed_over_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(tmp_path / "whole") == 0
    _stop_at(8, tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    file = newest / "group-2.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    capsys.readouterr()
    assert _train(tmp_path / "run", "--resume") == 0
    said = _said(capsys)
    assert "group-2.safetensors is damaged" in said and "step-00000006 is passed over" in said
    assert compare(tmp_path / "run", tmp_path / "whole") == ""


def test_two_runs_never_write_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.3)
    _stop_at(5, tmp_path / "run")
    context = multiprocessing.get_context("spawn")
    locked, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run", locked, leave))
    other.start()
    try:
        assert locked.wait(120)
        capsys.readouterr()
        assert _train(tmp_path / "run", "--resume") == 2
        said = _said(capsys)
        assert f"is being written by process {other.pid} on " in said and "end it first" in said
    finally:
        leave.set()
        other.join(120)
        other.kill()
    # Ended without a word, it holds nothing any more.
    assert _train(tmp_path / "run", "--resume") == 0


def _hold(path: Path, locked: Any, leave: Any) -> None:
    folder = RunFolder(path)
    folder.lock()
    locked.set()
    leave.wait(120)
    os._exit(0)


def test_a_full_disk_under_the_records_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, opened = tmp_path / "run", RunFolder.open

    def full(folder: RunFolder, step: int, batch: int) -> None:
        opened(folder, step, batch)
        folder.metrics.unlink()
        folder.metrics.symlink_to("/dev/full")

    monkeypatch.setattr(RunFolder, "open", full)
    assert _train(run) == 2
    assert _said(capsys) == f"lct-fast train: {run / 'metrics.jsonl'}: {os.strerror(errno.ENOSPC)}"


def test_a_full_disk_under_a_checkpoint_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill() -> None:
        # What is being written behind the loop's back is let through: the disk is full for the next one.
        for thread in threading.enumerate():
            if thread.name == "checkpoint writer":
                thread.join(60)
        monkeypatch.setattr(checkpoint, "_write_group", full)

    with monkeypatch.context() as patch:
        _interrupt(patch, 8, fill)
        patch.setattr(checkpoint, "_write_group", checkpoint._write_group)
        assert _train(tmp_path / "run") == 2
    said = _said(capsys)
    assert "step-00000009 could not be written (No space left on device): the previous one, " in said
    assert "step-00000006, is whole" in said and "--resume" in said
    assert _train(tmp_path / "whole") == _train(tmp_path / "run", "--resume") == 0
    assert compare(tmp_path / "run", tmp_path / "whole") == ""


def test_a_run_that_goes_on_says_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _stop_at(5, tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert _train(tmp_path / "run", "--resume") == 0
    assert f"goes on from {newest}\n" in capsys.readouterr().out
    _stop_at(1, tmp_path / "early")
    assert _train(tmp_path / "early", "--resume") == 0
    assert "there is no checkpoint yet: begins anew\n" in capsys.readouterr().out


def test_what_a_killed_run_left_is_removed_when_the_run_goes_on(tmp_path: Path) -> None:
    _stop_at(5, tmp_path / "run")
    left = tmp_path / "run" / "checkpoints" / ".partial-9-step-00000005"
    left.mkdir()
    (left / "group-1.safetensors").write_bytes(b"half")
    assert _train(tmp_path / "run", "--resume") == 0
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_an_interrupted_run_completes_the_checkpoint_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint._write_group

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        write(*args)

    monkeypatch.setattr(checkpoint, "_write_group", slow)
    _stop_at(4, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_nothing_is_in_the_writing_when_a_run_ends(tmp_path: Path) -> None:
    assert _train(tmp_path / "run", "--schedule", "pipelined") == 0
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000009", "step-00000012"]
    assert not any(t.name == "checkpoint writer" for t in threading.enumerate())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 12


def test_ranks_of_an_attempt_meet_past_what_dead_ones_left() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    # An earlier attempt, of which rank 2 was never answered.
    for rank in (1, 2):
        store.set(f"lct_fast/question/{rank}", f"old{rank}")
    store.set("lct_fast/answer/old1", "lct_fast/attempt/old")
    names: dict[int, str] = {}

    def ask(rank: int) -> None:
        names[rank] = processes._ask(store, rank)

    first = threading.Thread(target=lambda: names.update({0: processes._answer(store, 3, 20)}))
    others = [threading.Thread(target=ask, args=(rank,)) for rank in (1, 2)]
    for thread in (first, *others):
        thread.start()
    for thread in (first, *others):
        thread.join(60)
    assert len(names) == 3 and set(names.values()) == {names[0]}
    assert names[0] != "lct_fast/attempt/old"
    with pytest.raises(RuntimeError, match=r"ranks \[1\] are missing"):
        processes._answer(dist.HashStore(), 2, 0.1)
