"""`train --serial Q`: options, records with losses that a serial step does not know, and torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lct_fast.cli import main
from lct_fast.cli.config import Config, ConfigError, resolve
from lct_fast.cli.recorder import Recorder
from lct_fast.cli.run_folder import RunFolder
from lct_fast.engine import Hybrid, Stats, Trainer, checkpoint
from lct_fast.methods import Greedy
from tests.cli.test_torchrun import SMALL, _metrics, _run, _same_records, _torchrun
from tests.engine import nets

SERIAL = ["--serial", "0.25", "--serial-block", "3", "--serial-microbatches", "2"]


@pytest.fixture(autouse=True)
def _undo_global_state(threads: None) -> None:
    """`train` sets thread count and determinism for its process; the fixture undoes the first."""
    torch.use_deterministic_algorithms(False)


def test_options_are_checked() -> None:
    config = resolve({"serial": 0.1, "schedule": "pipelined"})
    assert (config.serial, config.serial_block, config.serial_microbatches) == (0.1, 16, 1)
    assert resolve({}).serial == 0
    for options, message in [
        ({"serial": 1.0}, "expected a share 0 <= q < 1, got 1.0"),
        ({"serial": -0.5}, "expected a share 0 <= q < 1"),
        ({"serial": 0.1, "serial_block": 0}, "block: expected an integer >= 1, got 0"),
        ({"serial_microbatches": 0}, "microbatches: expected an integer >= 1, got 0"),
        ({"serial": 0.1, "batch_size": 10, "serial_microbatches": 4}, "10 samples cannot be cut into 4"),
        ({"serial": 0.1, "method": "backprop"}, "all batches of backprop are serial"),
        ({"serial": "many"}, "serial: expected float, got 'many'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            resolve(options)


def test_a_run_tells_what_its_serial_steps_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = {}
    for schedule in ("lockstep", "pipelined"):
        run = tmp_path / schedule
        options = ["--method", "greedy", "--epochs", "3", "--schedule", schedule, *SERIAL, "--log-every", "1"]
        assert main(["train", *SMALL, *options, "--out", str(run)]) == 0
        records[schedule] = _metrics(run)
        summary = json.loads((run / "summary.json").read_text())
        assert summary["steps"] == 15
        serial = summary["serial"]
        # The last 3 of each 12.
        assert (serial["share"], serial["block"], serial["microbatches"]) == (0.25, 3, 2)
        assert serial["steps"] == 3 and 0 < serial["seconds"] < summary["seconds"]
        raw = summary["raw_bytes_per_sample"]
        # Forward and back, in 3 of 15 batches; the others go forward as they are.
        assert serial["bytes_per_sample"] == pytest.approx(2 * raw * 3 / 15)
        assert summary["wire_bytes_per_sample"] == pytest.approx(raw * (12 + 2 * 3) / 15)
    # Where a pipeline tells of several batches at once, it gives the learning rate of the last.
    lockstep, pipelined = ([r | {"lr": 0} for r in records[s]] for s in ("lockstep", "pipelined"))
    assert lockstep == pipelined
    intervals = [r for r in records["lockstep"] if r["kind"] == "interval"]
    for record in intervals:
        losses = record["loss"]
        assert isinstance(losses, list)
        known = [value is not None for value in losses]
        assert known == ([False] * 3 + [True] if record["step"] in (10, 11, 12) else [True] * 4)
    epochs = [r for r in records["lockstep"] if r["kind"] == "epoch"]
    for k, record in enumerate(epochs):
        steps = [r["loss"] for r in intervals[5 * k : 5 * k + 5]]
        for exit_ in range(4):
            known_losses = [v[exit_] for v in steps if v[exit_] is not None]
            mean = sum(known_losses) / len(known_losses)
            assert record["train_loss"][exit_] == pytest.approx(mean, rel=1e-5)  # type: ignore[index]
    assert main(["report", str(tmp_path / "lockstep"), "--out", str(tmp_path / "report.html")]) == 0


def test_the_recorder_goes_on_inside_an_interval_with_unknown_losses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = Trainer(nets.groups(Greedy(), 2), Greedy(), schedule=Hybrid(0.5, block=1))
    nan = float("nan")
    folder = RunFolder(tmp_path / "run")
    folder.create(Config())

    def recorder() -> Recorder:
        made = Recorder(Config(log_every=3), folder, trainer, 3, 3, True)
        made.begin()
        return made

    first = recorder()
    first.record(Stats(0, torch.tensor([4.0, 2.0]), 0, 0))
    first.record(Stats(1, torch.tensor([nan, 1.0]), 0, 0))
    second = recorder()
    second.restore(json.loads(json.dumps(first.position(), allow_nan=False)))
    second.done = 2
    for each in (first, second):
        each.record(Stats(2, torch.tensor([2.0, 3.0]), 0, 0))
        assert torch.equal(each.epoch_sum / each.epoch_count, torch.tensor([3.0, 2.0]))
    one, other = _metrics(folder.path)
    assert one == other and one["loss"] == [3.0, 2.0]
    folder.unlock()


@pytest.mark.slow
def test_processes_write_the_records_of_a_lockstep_run_and_resume(tmp_path: Path) -> None:
    piped, lockstep = tmp_path / "piped", tmp_path / "lockstep"
    options = ["--groups", "2", "--split", "conv5", "--epochs", "30", *SERIAL]
    alone = [sys.executable, "-m", "lct_fast", "train", *SMALL, *options, "--out", str(lockstep)]
    assert _run(alone).returncode == 0
    command = _torchrun(2, *options, "--schedule", "pipelined", "--out", str(piped))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline().rpartition(" ")[2]) for _ in range(2)]
    deadline = time.monotonic() + 200
    # Checkpoints come every 4 batches, blocks end every 12: some lie inside a block.
    while not (piped / "checkpoints").is_dir() or not list(
        (piped / "checkpoints").glob("step-*/manifest.json")
    ):
        assert time.monotonic() < deadline and process.poll() is None, "no checkpoint"
        time.sleep(0.005)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    found = checkpoint.latest(piped / "checkpoints")
    assert found is not None and int(found.name[5:]) < 150, "the run ended before it could be killed"
    again = _run(_torchrun(2, "--groups", "2", "--resume", "--out", str(piped)))
    assert again.returncode == 0, again.stderr
    _same_records(piped, lockstep)
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (piped, lockstep))
    for key in ("test_accuracy", "wire_bytes_per_sample", "raw_bytes_per_sample"):
        assert ours[key] == theirs[key], key
    for key in ("share", "block", "microbatches", "steps", "bytes_per_sample"):
        assert ours["serial"][key] == theirs["serial"][key], key
    # The last 3 of each 12 of 150 batches.
    assert ours["serial"]["steps"] == 36 and ours["serial"]["seconds"] > 0
