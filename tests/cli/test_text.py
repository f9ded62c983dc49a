"""`lct-fast train --data text:FILE` and what reads its run: eval, export, report."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

import lct_fast as lct
from lct_fast import exported
from lct_fast.cli import main
from lct_fast.engine import checkpoint

MODELS = [
    "char_lstm:layers=2,hidden=8",
    "char_gru:layers=2,hidden=8",
    "char_transformer:layers=2,width=8,heads=2",
]


@pytest.fixture(autouse=True)
def _undo_global_state(threads: None) -> None:
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """2,000 characters in which each but a few follows from the one before."""
    g = torch.Generator().manual_seed(0)
    jumps = (torch.rand(2000, generator=g) < 0.1) * torch.randint(1, 12, (2000,), generator=g)
    file = tmp_path / "made.txt"
    file.write_text("".join("abcdefghijk\n"[i % 12] for i in (torch.arange(2000) + jumps.cumsum(0)).tolist()))
    return file


def _options(text: Path, *more: str) -> list[str]:
    return [
        *(
            "--data",
            f"text:{text}",
            "--model",
            MODELS[0],
            "--groups",
            "2",
            "--batch-size",
            "4",
            "--window",
            "16",
        ),
        *("--threads", "1", "--log-every", "5", *more),
    ]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    return {
        f"{f.name}:{n}": t for f in sorted(path.glob("group*.safetensors")) for n, t in load_file(f).items()
    }


def _metrics(run: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "samples_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


@pytest.mark.parametrize("method", ["local-critic", "greedy", "backprop"])
def test_a_run_says_what_it_learned(
    method: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = _options(text, "--method", method, "--epochs", "3", "--lr", "0.02", "--out", str(run))
    assert main(["train", *options, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    exits = 1 if method == "backprop" else 2
    bits = summary["exit_bits_per_character"]
    assert bits == [v / math.log(2) for v in summary["exit_test_loss"]] and len(bits) == exits
    # Uniform over 12 characters would be 3.58.
    assert 0.5 < bits[-1] < 3.2 and summary["test_accuracy"] > 0.2
    # (1800 - 1 - 15) // 4 // 16 windows an epoch.
    assert summary["steps"] == 3 * 27
    if method == "local-critic":
        assert summary["feedback_bytes_per_sample"] == 4 and summary["wire_bytes_per_sample"] == 32
    epochs = [r for r in _metrics(run) if r["kind"] == "epoch"]
    assert epochs[-1]["exit_bits_per_character"] == bits and len(epochs) == 3
    assert epochs[-1]["test_loss"] == summary["exit_test_loss"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["optimizer"], config["clip_norm"], config["weight_decay"]) == ("adam", 1.0, 0.0)
    assert json.loads((run / "vocabulary.json").read_text()) == sorted("abcdefghijk\n")

    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 4 * (199 // 4)
    for k in range(exits):
        row = found["results"][f"exit {k + 1}"]
        assert math.isclose(row["bits_per_character"], bits[k], rel_tol=1e-5)
        assert row["accuracy"] == summary["exit_test_accuracy"][k]
    assert main(["eval", str(run), "--exit", "last"]) == 0
    assert "196 test characters" in (told := capsys.readouterr().out) and f"{bits[-1]:.3f} bits" in told
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert "bits per character" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_exits_are_exported_as_plain_modules(model: str, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *_options(text, "--model", model, "--steps", "12", "--out", str(run))]) == 0
    ids = lct.data.load_text(text).test[:48].long().view(3, 16)
    for k in (1, 2):
        plain, traced = tmp_path / f"{k}.safetensors", tmp_path / f"{k}.pt2"
        for out in (plain, traced):
            assert main(["export", str(run), "--exit", str(k), "--out", str(out)]) == 0
        module = exported.load(plain)
        logits = module(ids)
        assert logits.shape == (3, 16, 12) and torch.equal(module(ids), logits)
        torch.testing.assert_close(torch.export.load(traced).module()(ids), logits, rtol=1e-5, atol=1e-5)
        assert module.description["classes"] == sorted("abcdefghijk\n")
        if k == 2:
            net = lct.models.build_sequence(model, 12, 16)
            net.load_state_dict(load_file(plain))
            assert torch.equal(net.eval()(ids), logits)


class _PullThePlug(Exception):
    pass


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_interrupted_and_resumed_equals_uninterrupted(
    model: str, schedule: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second epoch, where the state that goes on counts."""
    more = ["--model", model, "--limit", "700", "--epochs", "3", "--checkpoint-every", "4"]
    options = _options(text, *more, "--schedule", schedule)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", *options, "--out", str(whole)]) == 0
    step = lct.Trainer.step

    def stops(self: lct.Trainer, *batch: Any) -> lct.Stats:
        if self.batch == 18:
            raise _PullThePlug
        return step(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(_PullThePlug):
        patch.setattr(lct.Trainer, "step", stops)
        main(["train", *options, "--out", str(cut)])
    found = checkpoint.latest(cut / "checkpoints")
    assert found is not None and found.name == "step-00000016"
    assert main(["train", *options, "--resume", "--out", str(cut)]) == 0
    ours, theirs = _weights(cut), _weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert _metrics(cut) == _metrics(whole)


def test_the_state_begins_anew_with_each_epoch(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = lct.Trainer.begin_sequence

    def noted(self: lct.Trainer) -> None:
        begun.append(self.batch)
        begin(self)

    monkeypatch.setattr(lct.Trainer, "begin_sequence", noted)
    assert main(["train", *_options(text, "--epochs", "3", "--out", str(tmp_path / "run"))]) == 0
    assert begun == [0, 27, 54]


def test_another_text_is_read_by_the_run_s_own_vocabulary(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other.txt"
    assert main(["train", *_options(text, "--steps", "2", "--out", str(run))]) == 0
    other.write_text("abc" * 100)
    capsys.readouterr()
    assert main(["eval", str(run), "--data", f"text:{other}", "--exit", "last", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 28
    other.write_text("abcxyz" * 100)
    assert main(["eval", str(run), "--data", f"text:{other}"]) == 2
    assert "holds 3 characters that the run's vocabulary lacks" in capsys.readouterr().err


def test_refusals_are_one_line_with_status_2_and_leave_nothing(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, short = tmp_path / "new", tmp_path / "short.txt"
    short.write_text("abcd" * 15)
    cases = [
        (["--data", "text:"], "expected text:FILE, got 'text:'"),
        (["--data", "text:/nowhere/at/all"], "which does not exist"),
        (
            ["--data", f"text:{short}"],
            "expected 80 characters or more for 4 streams of windows of 16, got 54",
        ),
        (["--window", "0"], "window: expected a number >= 1, got 0"),
        (["--augment", "crop_flip"], "augment: a text has none, got 'crop_flip'"),
        (["--model", "lct_vgg"], "'lct_vgg' is for images"),
        (["--critic", "linear"], "for tokens critic 'token_linear'"),
        (["--schedule", "async", "--method", "greedy"], "schedule async takes batches in any order"),
        (["--serial", "0.5", "--serial-microbatches", "2"], "expected microbatches=1 in serial steps, got 2"),
    ]
    for options, message in cases:
        assert main(["train", *_options(text), *options, "--out", str(out)]) == 2, options
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1, (options, error)
        assert not out.exists(), options
    assert main(["train", "--data", "digits", "--window", "8", "--out", str(out)]) == 2
    assert "window: is for text:FILE, this run's data is digits" in capsys.readouterr().err
    assert main(["train", "--data", "digits", "--model", "char_lstm", "--out", str(out)]) == 2
    assert "'char_lstm' is for text" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_write_the_records_of_a_lockstep_run(text: Path, tmp_path: Path) -> None:
    more = ["--epochs", "2", "--limit", "900", "--feedback-delay", "3", "--checkpoint-every", "5"]
    piped, alone = tmp_path / "piped", tmp_path / "alone"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "lct_fast", "train", *_options(text, *more)]
    for start, options in (
        (launcher, ["--schedule", "pipelined", "--out", str(piped)]),
        ([sys.executable], ["--out", str(alone)]),
    ):
        done = subprocess.run([*start, *command, *options], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
    ours, theirs = _weights(piped), _weights(alone)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert _metrics(piped) == _metrics(alone)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (piped, alone)]
    keys = ("exit_bits_per_character", "feedback_bytes_per_sample", "wire_bytes_per_sample", "steps")
    for key in keys:
        assert summaries[0][key] == summaries[1][key], key


def test_loss_of_the_exported_last_exit_is_the_run_s(text: Path, tmp_path: Path) -> None:
    """By hand: windows in order, each stream as one long row."""
    run, plain = tmp_path / "run", tmp_path / "net.safetensors"
    assert main(["train", *_options(text, "--steps", "30", "--out", str(run))]) == 0
    assert main(["export", str(run), "--out", str(plain)]) == 0
    ids = lct.data.load_text(text).test.long()
    length = (len(ids) - 1) // 4
    x, y = (ids[k : k + 4 * length].view(4, length) for k in (0, 1))
    with torch.no_grad():
        loss = F.cross_entropy(exported.load(plain)(x).flatten(0, 1), y.flatten())
    summary = json.loads((run / "summary.json").read_text())
    assert math.isclose(summary["exit_test_loss"][-1], float(loss), rel_tol=1e-5)
