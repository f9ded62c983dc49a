"""`lct-fast train --schedule async`: records, resumption, refusals; and one process a group under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lct_fast.cli import main
from lct_fast.engine import checkpoint

SMALL = [
    *("--data", "digits", "--model", "digits_cnn:width=0.25", "--limit", "320", "--threads", "1"),
    *("--method", "greedy", "--schedule", "async"),
]


@pytest.fixture(autouse=True)
def _undo_global_state(threads: None) -> None:
    """`train` sets thread count and determinism for its process; the fixture undoes the first."""
    torch.use_deterministic_algorithms(False)


def _train(out: Path, *more: str) -> int:
    return main(["train", *SMALL, "--out", str(out), *more])


def _summary(run: Path) -> dict[str, object]:
    return json.loads((run / "summary.json").read_text())


def _weights(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    return {f"{f.name}:{n}": t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}


def _metrics(run: Path, kind: str) -> list[dict[str, object]]:
    """Everything logged of a kind but the clock."""
    clocks = ("seconds", "samples_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines if line["kind"] == kind]


def test_a_run_goes_on_until_the_slow_group_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--slow-group", "2", "--slow-down", "2", "--buffer", "2", "--epochs", "4", "--log-every", "2"]
    assert _train(run, *options, "--json") == 0
    summary = _summary(run)
    assert summary == json.loads(capsys.readouterr().out)
    assert (summary["steps"], summary["schedule"]) == (20, "async")
    replay = summary["replay"]
    assert isinstance(replay, dict) and replay["updates"] == [20] * 4
    assert replay["mean_age"][0] == replay["reused"][0] == 0 and max(replay["mean_age"]) > 0
    epochs, intervals = _metrics(run, "epoch"), _metrics(run, "interval")
    # Group 1 has taken more batches than it trained on; the last evaluation is that of the summary.
    assert int(str(epochs[-1]["step"])) > 20
    assert epochs[-1]["exit_test_accuracy"] == summary["exit_test_accuracy"]
    assert [e["step"] for e in epochs][:5] == [5, 10, 15, 20, 25]
    losses = [loss for interval in intervals for loss in interval["loss"]]  # type: ignore[attr-defined]
    assert all(isinstance(loss, float) for loss in losses), "a loss that is not known yet was recorded"
    assert main(["eval", str(run), "--exit", "last", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["results"]["exit 4"]["accuracy"] == summary["test_accuracy"]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    options = [
        *SMALL,
        "--epochs",
        "30",
        "--checkpoint-every",
        "3",
        "--log-every",
        "2",
        "--augment",
        "crop_flip",
    ]
    options += ["--buffer", "3", "--slow-group", "3", "--slow-down", "1.5", "--codec", "vq:16,2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "lct_fast", "train", *options, "--out"]
    subprocess.run([*command, str(whole)], check=True, capture_output=True, timeout=240)
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while sum(1 for _ in (killed / "checkpoints").glob("step-*/manifest.json")) < 2:
            assert time.monotonic() < deadline and process.poll() is None, "no checkpoint to kill it after"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    found = checkpoint.latest(killed / "checkpoints")
    assert found is not None and int(found.name[5:]) < 100
    subprocess.run([*command, str(killed), "--resume"], check=True, capture_output=True, timeout=240)
    ours, theirs = _weights(killed), _weights(whole)
    assert ours.keys() == theirs.keys()
    # A loss that is not known somewhere is NaN.
    assert all(torch.allclose(ours[n], theirs[n], 0, 0, equal_nan=True) for n in ours)
    for kind in ("epoch", "interval"):
        assert _metrics(killed, kind) == _metrics(whole, kind)
    for key in ("replay", "wire_bytes_per_sample", "test_accuracy"):
        assert _summary(killed)[key] == _summary(whole)[key], key


@pytest.mark.slow
def test_one_process_a_group(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "lct_fast", "train", *SMALL, "--groups", "2", "--split", "conv5"]
    options = [
        "--epochs",
        "3",
        "--log-every",
        "5",
        "--buffer",
        "4",
        "--reuse-limit",
        "3",
        "--checkpoint-every",
        "4",
    ]
    done = _end([*command, *options, "--out", str(run)])
    assert done.returncode == 0, done.stderr
    summary = _summary(run)
    assert (summary["steps"], summary["processes"]) == (15, 2)
    replay = summary["replay"]
    assert isinstance(replay, dict) and replay["updates"] == [15, 15] and replay["reused"][0] == 0
    assert [e["epoch"] for e in _metrics(run, "epoch")][:3] == [1, 2, 3]
    assert [i["step"] for i in _metrics(run, "interval")] == [5, 10, 15]
    evaluated = _end([sys.executable, "-m", "lct_fast", "eval", str(run), "--exit", "last", "--json"])
    assert json.loads(evaluated.stdout)["results"]["exit 2"]["accuracy"] == summary["test_accuracy"]
    # Nothing is left to do: the records stay as they are.
    before = (run / "metrics.jsonl").read_text()
    again = _end([*command, "--resume", "--out", str(run)])
    assert again.returncode == 0, again.stderr
    assert (run / "metrics.jsonl").read_text() == before
    refused = _end([*command, "--slow-group", "1", "--slow-down", "2", "--out", str(tmp_path / "no")])
    assert refused.returncode != 0 and "slow_down simulates a slow group in one process" in refused.stderr
    assert not (tmp_path / "no").exists()


def _end(command: list[str]) -> subprocess.CompletedProcess[str]:
    """The command's end; none of its processes outlives the test."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, error = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "local-critic"], "local-critic has no async schedule: use --method greedy"),
        (["--method", "backprop"], "backprop has no async schedule: use --method greedy"),
        (["--buffer", "0"], "buffer: expected a number >= 1, got 0"),
        (["--reuse-limit", "0"], "reuse_limit: expected a number >= 1, got 0"),
        (["--slow-group", "5"], "slow_group: expected 1..4, got 5"),
        (["--slow-down", "0.9", "--slow-group", "1"], "slow_down: expected a number >= 1, got 0.9"),
        (["--slow-down", "2"], "slow_down 2.0: say which group is slow with --slow-group"),
        (
            ["--schedule", "lockstep", "--buffer", "3"],
            "buffer: is for --schedule async, this run's is lockstep",
        ),
        (["--schedule", "pipelined", "--reuse-limit", "3"], "reuse_limit: is for --schedule async"),
        (["--schedule", "lockstep", "--slow-group", "2"], "slow_group: is for --schedule async"),
        (["--schedule", "lockstep", "--slow-down", "2"], "slow_down: is for --schedule async"),
    ],
)
def test_refusals(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(tmp_path / "run", *options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert not (tmp_path / "run").exists()
