"""`train --method likelihood-ratio`: options, defaults, a run and its resumption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lct_fast.cli import main
from lct_fast.cli.build_method import likelihood_ratio
from lct_fast.cli.config import ConfigError, resolve

METHOD = {"method": "likelihood-ratio"}


@pytest.fixture(autouse=True)
def _undo_global_state(threads: None) -> None:
    """`train` sets thread count and determinism for its process; the fixture undoes the first."""
    torch.use_deterministic_algorithms(False)


def test_defaults_leave_batch_norm_out() -> None:
    config = resolve(METHOD)
    assert config.model == "digits_cnn:norm=none" and config.clip_norm == 1.0 and config.copies == 32
    assert resolve(METHOD | {"data": "cifar10:somewhere"}).model == "vgg8"
    assert resolve(METHOD | {"model": "mlp", "clip_norm": 5.0}).clip_norm == 5.0
    assert resolve({}).model == "digits_cnn" and resolve({}).clip_norm is None


def test_options_reach_the_method() -> None:
    options: dict[str, Any] = {
        "noise": "hybrid",
        "copies": 9,
        "sigma": 0.2,
        "antithetic": False,
        "one_at_a_time": False,
        "sampling": "halton",
        "baseline": False,
        "learn_sigma": True,
        "storage": "sign",
    }
    method = likelihood_ratio(resolve(METHOD | options))
    assert {name: getattr(method, name) for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "pipelined"}, "likelihood-ratio has no pipelined schedule: .*use --schedule lockstep"),
        ({"schedule": "async"}, "likelihood-ratio has no async schedule"),
        ({"replicas": 2}, "replicas: 2 of them take --schedule pipelined"),
        ({"codec": "int8"}, "codec: likelihood-ratio sends what crosses as it is"),
        ({"copies": 5}, "copies: expected an even number >= 2"),
        ({"sigma": -1.0}, "sigma: expected a positive number, got -1.0"),
        ({"noise": "input"}, "noise: expected one of boundary, logits, weights, hybrid; got 'input'"),
        ({"sampling": "grid"}, "sampling: expected one of random, sobol, halton"),
        ({"compile": True, "noise": "logits"}, "compile: noise logits goes into single layers"),
        ({"method": "greedy", "copies": 4}, "copies: is for --method likelihood-ratio, this run's is greedy"),
        ({"method": "backprop", "sigma": 0.1}, "sigma: is for --method likelihood-ratio"),
        ({"method": "greedy", "learn_sigma": True}, "learn_sigma: is for --method likelihood-ratio"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(METHOD | options)


def test_batch_norm_is_refused_before_work_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", "--method", "likelihood-ratio", "--model", "digits_cnn", *out]) == 2
    assert "does not work through batch norm, got conv1.norm" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--groups", "3"],
        ["--groups", "2", "--noise", "logits", "--storage", "sign", "--learn-sigma", "--serial", "0.25"],
    ],
    ids=["boundary", "logits"],
)
def test_a_run_and_its_resumption(options: list[str], tmp_path: Path) -> None:
    command = ["train", "--method", "likelihood-ratio", "--model", "mlp:hidden=24,depth=3", "--copies", "4"]
    command += ["--limit", "320", "--epochs", "4", "--checkpoint-every", "7", "--threads", "1", *options]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main([*command, "--out", str(whole)]) == 0
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["method"] == "likelihood-ratio" and summary["test_accuracy"] > 0.3
    # Stopped after a checkpoint: the rest of the run gives the same numbers.
    assert main([*command, "--out", str(halves)]) == 0
    earlier, last = sorted((halves / "checkpoints").glob("step-*"))
    assert earlier.name != last.name
    shutil.rmtree(last)
    (halves / "summary.json").unlink()
    assert main(["train", "--resume", "--out", str(halves)]) == 0
    again = json.loads((halves / "summary.json").read_text())
    assert again["exit_test_accuracy"] == summary["exit_test_accuracy"]
