"""`--diagnose N`: what is written of the groups' gradients, and that the run is the same without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lct_fast.cli import main
from lct_fast.cli.config import ConfigError, resolve
from lct_fast.cli.run_folder import RunFolder
from lct_fast.engine import checkpoint

SMALL = [
    *("--data", "digits", "--model", "digits_cnn:width=0.25", "--limit", "320", "--threads", "1"),
    *("--epochs", "2", "--groups", "2", "--split", "conv5", "--augment", "crop_flip"),
]


@pytest.fixture(autouse=True)
def _undo_global_state(threads: None) -> None:
    """`train` sets thread count and determinism for its process; the fixture undoes the first."""
    torch.use_deterministic_algorithms(False)


def _train(out: Path, *more: str) -> int:
    return main(["train", *SMALL, "--out", str(out), *more])


def _weights(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    return {f"{f.name}:{n}": t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}


def _lines(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """Of these kinds, everything but the clock."""
    clocks = ("seconds", "samples_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines if line["kind"] in kinds]


@pytest.mark.parametrize("method", ["local-critic", "greedy", "backprop"])
def test_what_is_written_and_that_nothing_else_changes(method: str, tmp_path: Path) -> None:
    plain, read = tmp_path / "plain", tmp_path / "read"
    assert _train(plain, "--method", method) == 0
    assert _train(read, "--method", method, "--diagnose", "3") == 0
    ours, theirs = _weights(plain), _weights(read)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert _lines(plain, "epoch", "interval") == _lines(read, "epoch", "interval")
    assert _lines(plain, "diagnosis") == []

    lines, groups = _lines(read, "diagnosis"), 1 if method == "backprop" else 2
    assert [line["step"] for line in lines] == [1, 4, 7, 10]
    for line in lines:
        assert len(line["gradient_norm"]) == len(line["gradient_cosine"]) == groups
        assert all(norm > 0 for norm in line["gradient_norm"])
        assert line["gradient_cosine"][-1] == pytest.approx(1, abs=1e-5)
        assert groups == 1 or -1 <= line["gradient_cosine"][0] < 0.999
    summary = json.loads((read / "summary.json").read_text())["diagnosis"]
    assert summary == {
        "every": 3,
        "readings": 4,
        "gradient_norm": lines[-1]["gradient_norm"],
        "gradient_cosine": lines[-1]["gradient_cosine"],
    }
    assert json.loads((plain / "summary.json").read_text())["diagnosis"] is None


def test_pipelined_tells_that_it_takes_no_cosines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path / "run", "--schedule", "pipelined", "--diagnose", "5") == 0
    said = "diagnose: gradient norms only, as cosines to the true gradient are taken in lockstep"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    lines = _lines(tmp_path / "run", "diagnosis")
    assert [line["step"] for line in lines] == [1, 6]
    assert all(line["gradient_cosine"] == [None, None] for line in lines)
    assert all(norm > 0 for line in lines for norm in line["gradient_norm"])


def test_a_run_that_was_cut_short_writes_its_readings_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert _train(whole, "--diagnose", "3") == 0

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "summary.json")

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_summary", full)
        assert _train(cut, "--diagnose", "3") != 0
    assert len(_lines(cut, "diagnosis")) == 4
    assert _train(cut, "--resume") == 0
    assert _lines(cut, "diagnosis") == _lines(whole, "diagnosis")


def test_it_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    assert _train(tmp_path / "run", "--diagnose", "3") == 0
    assert _train(tmp_path / "run", "--resume", "--diagnose", "0") == 0


def test_it_is_checked() -> None:
    assert resolve({}).diagnose == 0
    with pytest.raises(ConfigError, match="diagnose: expected a number >= 0, got -2"):
        resolve({"diagnose": -2})


@pytest.mark.slow
def test_processes_read_the_norms_of_lockstep(tmp_path: Path) -> None:
    options = [*SMALL, "--feedback-delay", "3", "--diagnose", "4"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    piped = [*launcher, "-m", "lct_fast", "train", *options, "--schedule", "pipelined"]
    done = subprocess.run(
        [*piped, "--out", str(tmp_path / "piped")], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert _train(tmp_path / "lockstep", "--feedback-delay", "3", "--diagnose", "4") == 0
    ours, theirs = (_lines(tmp_path / name, "diagnosis") for name in ("piped", "lockstep"))
    assert len(ours) == 3
    assert [line["gradient_norm"] for line in ours] == [line["gradient_norm"] for line in theirs]
    assert all(line["gradient_cosine"] == [None, None] for line in ours)
