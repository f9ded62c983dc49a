"""`train --method penalty` and `augmented-lagrangian`: options, records, serial blocks of whole epochs, resuming."""

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

import lct_fast as lct
from lct_fast.cli import build, main
from lct_fast.cli.build_method import build_method
from lct_fast.cli.config import ConfigError, resolve
from lct_fast.engine import checkpoint
from tests.cli.test_torchrun import SMALL, _metrics, _run, _same_records, _torchrun, _weights

DEFAULT = ["--data", "digits", "--model", "digits_cnn:width=0.25", "--limit", "320", "--threads", "1"]


@pytest.fixture(autouse=True)
def _undo_global_state(threads: None) -> None:
    """`train` sets thread count and determinism for its process; the fixture undoes the first."""
    torch.use_deterministic_algorithms(False)


def test_defaults_and_options() -> None:
    config = resolve({"method": "penalty"})
    assert (config.lr, config.beta, config.eta, config.serial_block) == (0.005, 0.01, None, None)
    method = build_method(resolve({"method": "augmented-lagrangian", "beta": 0.1, "eta": 1.0}))
    assert isinstance(method, lct.LayerParallel)
    assert (method.kind, method.beta, method.eta) == ("augmented_lagrangian", 0.1, 1.0)
    # An epoch of serial batches, for these methods alone.
    assert build.serial_block(config, 22) == 22
    assert build.serial_block(resolve({"method": "penalty", "serial_block": 5}), 22) == 5
    assert build.serial_block(resolve({"method": "greedy"}), 22) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "penalty", "beta": -1.0}, "beta: expected a positive number"),
        ({"method": "penalty", "beta": 1.0, "eta": 3.0}, r"eta \* beta = 3: penalty diverges"),
        ({"method": "penalty", "lambda_codec": "zip"}, "unknown codec 'zip'"),
        ({"method": "penalty", "lambda_store": "tape"}, "lambda_store: expected one of memory, disk"),
        (
            {"method": "greedy", "lambda_codec": "int8"},
            "lambda_codec: is for penalty and augmented-lagrangian",
        ),
        ({"method": "augmented-lagrangian", "auxiliary": True}, "use them with the penalty method"),
        (
            {"method": "penalty", "auxiliary": True, "lambda_store": "disk"},
            "auxiliary: nets take the place of a store",
        ),
        ({"method": "greedy", "eta": 1.0}, "eta: is for penalty and augmented-lagrangian"),
        ({"method": "penalty", "schedule": "async"}, "penalty has no async schedule"),
        (
            {"method": "penalty", "schedule": "pipelined", "replicas": 2},
            "penalty keeps a state for each sample, which they do not share; use 1",
        ),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(options)


def test_a_run_its_records_and_what_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ["--method", "augmented-lagrangian", "--groups", "3", "--epochs", "4", "--serial", "0.5"]
    options += ["--lambda-store", "disk", "--lambda-codec", "int8"]
    assert main(["train", *DEFAULT, *options, "--out", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    # 5 batches an epoch: every other epoch is serial.
    assert (summary["serial"]["block"], summary["serial"]["share"], summary["serial"]["steps"]) == (
        5,
        0.5,
        10,
    )
    assert summary["critic"] is None and len(summary["exit_test_accuracy"]) == 1
    speed = summary["speed_up"]
    assert 1 <= speed["parallel_gain"] <= 3 and speed["serial_share"] == 0.5
    assert speed["overall"] == pytest.approx(1 / (0.5 + 0.5 / speed["parallel_gain"]))
    # The adjoint of a group's input: as many fp32 numbers as lambda, in the 10 parallel batches.
    values = summary["raw_bytes_per_sample"] / 4
    assert summary["feedback_bytes_per_sample"] == pytest.approx(values * 4 * 10 / 20)
    files = sorted(p.name for p in (run / "lambda").iterdir())
    assert len(files) == 8 and files[0] == "group-1-kappa-0.bin"
    assert not any((run / "checkpoints").rglob("*.bin"))
    epochs = [r for r in _metrics(run) if r["kind"] == "epoch"]
    assert [None in r["train_loss"] for r in epochs] == [False, True, False, True]  # type: ignore[operator]
    capsys.readouterr()
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert found == {"exit 1": {"accuracy": summary["test_accuracy"]}}
    assert main(["export", str(run), "--out", str(tmp_path / "net.safetensors")]) == 0
    assert main(["export", str(run), "--exit", "1", "--out", str(tmp_path / "one.safetensors")]) == 2
    assert "the method has no critics" in capsys.readouterr().err


def test_only_serial_batches_are_augmented() -> None:
    options = {"data": "digits", "limit": 320, "augment": "crop_flip", "method": "penalty", "serial": 0.5}
    config = resolve(options | {"serial_block": 5})
    images = build.load_data(config)
    made = build.training_batches(config, images, torch.device("cpu"))
    plain = build.training_batches(resolve(options | {"augment": "none"}), images, torch.device("cpu"))
    for epoch, augmented in ((0, False), (1, True), (2, False), (3, True)):
        for (index, x, y), (_, other, labels) in zip(made.epoch(epoch), plain.epoch(epoch), strict=True):
            assert torch.equal(x, other) != augmented and torch.equal(y, labels)
            samples = made.samples(epoch, index)
            assert torch.equal(images.train_labels[samples], y)
    # Without serial batches none are; with auxiliary nets, and for other methods, all are.
    never = build.training_batches(resolve(options | {"serial": 0.0}), images, torch.device("cpu"))
    always = build.training_batches(
        resolve(options | {"serial": 0.0, "method": "greedy"}), images, torch.device("cpu")
    )
    assert torch.equal(next(never.epoch(1))[1], next(plain.epoch(1))[1])
    auxiliary = build.training_batches(resolve(options | {"auxiliary": True}), images, torch.device("cpu"))
    assert torch.equal(next(auxiliary.epoch(0))[1], next(always.epoch(0))[1])
    assert not torch.equal(next(always.epoch(0))[1], next(plain.epoch(0))[1])


@pytest.mark.slow
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_killed_run_goes_on_to_the_same_records(store: str, tmp_path: Path) -> None:
    options = [
        "--method",
        "penalty",
        "--groups",
        "2",
        "--split",
        "conv5",
        "--epochs",
        "8",
        "--serial",
        "0.25",
    ]
    options += ["--lambda-store", store]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [sys.executable, "-m", "lct_fast", "train", *SMALL, *options]
    assert _run([*command, "--out", str(whole)]).returncode == 0
    process = subprocess.Popen([*command, "--out", str(broken)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(list((broken / "checkpoints").glob("step-*/manifest.json"))) < 1:
        assert time.monotonic() < deadline and process.poll() is None, "no checkpoint"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    found = checkpoint.latest(broken / "checkpoints")
    assert found is not None and int(found.name[5:]) < 40, "the run ended before it could be killed"
    again = _run([sys.executable, "-m", "lct_fast", "train", "--resume", "--out", str(broken)])
    assert again.returncode == 0, again.stderr
    _same_records(whole, broken)


@pytest.mark.slow
def test_processes_write_the_records_of_a_lockstep_run(tmp_path: Path) -> None:
    piped, lockstep = tmp_path / "piped", tmp_path / "lockstep"
    options = ["--method", "augmented-lagrangian", "--groups", "2", "--split", "conv5", "--epochs", "4"]
    options += ["--serial", "0.5"]
    done = _run(_torchrun(2, *options, "--schedule", "pipelined", "--out", str(piped)))
    assert done.returncode == 0, done.stderr
    alone = [sys.executable, "-m", "lct_fast", "train", *SMALL, *options, "--out", str(lockstep)]
    assert _run(alone).returncode == 0
    assert len(_weights(piped)) > 10
    _same_records(piped, lockstep)
