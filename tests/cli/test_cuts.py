"""What a run writes of its cuts: bytes that add up, and a line an epoch of how codebooks were used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lct_fast as lct
from lct_fast.cli import main
from lct_fast.cli.run_folder import RunFolder
from lct_fast.engine.worker import Worker
from tests.engine import nets

SMALL = [
    *("--data", "digits", "--model", "digits_cnn:width=0.25", "--limit", "320", "--threads", "1"),
    *("--epochs", "2", "--groups", "3", "--split", "conv3", "conv5", "--codec", "vq:16,2", "bf16"),
    *("--feedback-delay", "3"),
]


@pytest.fixture(autouse=True)
def _undo_global_state(threads: None) -> None:
    """`train` sets thread count and determinism for its process; the fixture undoes the first."""
    torch.use_deterministic_algorithms(False)


def _summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "codebook"]


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_bytes_of_cuts_add_up_and_codebooks_have_a_line_an_epoch(schedule: str, tmp_path: Path) -> None:
    options = [*SMALL, "--schedule", schedule, "--serial", "0.2", "--serial-block", "2"]
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 0
    summary, lines = _summary(tmp_path / "run"), _lines(tmp_path / "run")
    cuts = summary["cuts"]
    assert [cut["codec"] for cut in cuts] == ["vq:16,2", "bf16"]

    def total(key: str) -> float:
        return sum(cut[key] for cut in cuts)

    for key in ("raw_bytes_per_sample", "feedback_bytes_per_sample"):
        assert total(key) == pytest.approx(summary[key]) and total(key) > 0
    sent = total("wire_bytes_per_sample") + total("serial_bytes_per_sample")
    assert sent == pytest.approx(summary["wire_bytes_per_sample"])
    assert total("serial_bytes_per_sample") == pytest.approx(summary["serial"]["bytes_per_sample"])
    # bf16 halves what is not serial; raw bytes are of all batches.
    coded = cuts[1]["raw_bytes_per_sample"] - cuts[1]["serial_bytes_per_sample"] / 2
    assert cuts[1]["wire_bytes_per_sample"] == pytest.approx(coded / 2)
    assert 0 < cuts[0]["codebook_bytes_per_sample"] < cuts[0]["wire_bytes_per_sample"]
    assert cuts[1]["codebook_bytes_per_sample"] == 0
    assert [(line["step"], line["epoch"]) for line in lines] == [(5, 1), (10, 2)]
    for line in lines:
        assert line["codewords"] == [16, None] and line["perplexity"][1] is None
        assert 0 < line["used"][0] <= 1 and 1 <= line["perplexity"][0] <= 16
    serial = summary["serial"]["steps"]
    assert serial > 0 and sum(line["batches"][0] for line in lines) == 10 - serial


@pytest.mark.slow
def test_a_resumed_run_writes_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [*SMALL, "--checkpoint-every", "3"]
    assert main(["train", *options, "--out", str(whole)]) == 0
    step = lct.Trainer.step

    def dies(trainer: lct.Trainer, *batch: Any) -> Any:
        if trainer.batch == 8:
            raise RuntimeError("killed")
        return step(trainer, *batch)

    with monkeypatch.context() as patched:
        patched.setattr(lct.Trainer, "step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            main(["train", *options, "--out", str(cut)])
    with monkeypatch.context() as patched:
        # The lines are there, the summary is not: the next attempt writes both.
        patched.setattr(RunFolder, "write_summary", lambda folder, summary: None)
        assert main(["train", "--resume", "--out", str(cut)]) == 0
    assert len(_lines(cut)) == 2
    assert main(["train", "--resume", "--out", str(cut)]) == 0
    assert len(_lines(whole)) == 2 and _lines(cut) == _lines(whole)
    assert _summary(cut)["cuts"] == _summary(whole)["cuts"]


def test_runs_without_cuts_or_codebooks_have_no_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in {"whole": ["--method", "backprop"], "plain": ["--groups", "2"]}.items():
        small = [*SMALL[:8], *options, "--epochs", "1", "--out", str(tmp_path / name)]
        assert main(["train", *small]) == 0
        assert _lines(tmp_path / name) == []
    assert _summary(tmp_path / "whole")["cuts"] == []
    # Whose only exit is the network itself.
    printed = capsys.readouterr().out
    assert "(network " in printed and "(exit 1 " in printed
    (cut,) = _summary(tmp_path / "plain")["cuts"]
    assert cut["codec"] == "none" and cut["wire_bytes_per_sample"] == cut["raw_bytes_per_sample"]


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_training_is_the_same_without_readings(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> lct.Trainer:
        torch.manual_seed(5)
        method = lct.LocalCritic()
        trainer = lct.Trainer(nets.groups(method), method, codec="vq:16,2", schedule=schedule)
        for x, y in nets.batches(9):
            trainer.step(x, y)
            if trainer.batch % 4 == 0:
                trainer.evaluate(nets.batches(1))
        trainer.flush()
        return trainer

    read = trained()
    with monkeypatch.context() as patched:
        patched.setattr(Worker, "read_codebook", lambda worker, batch: None)
        plain = trained()
    assert nets.same(nets.state(read), nets.state(plain))
    assert [g.wire_bytes for g in read.meter.groups] == [g.wire_bytes for g in plain.meter.groups]
    assert [[r["batch"] for r in g.codebook] for g in read.meter.groups] == [[4, 8]] * 3 + [[]]
    assert all(not g.codebook for g in plain.meter.groups)


@pytest.mark.slow
def test_processes_write_what_lockstep_writes(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    piped = [*launcher, "-m", "lct_fast", "train", *SMALL, "--schedule", "pipelined"]
    done = subprocess.run(
        [*piped, "--out", str(tmp_path / "piped")], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert main(["train", *SMALL, "--out", str(tmp_path / "lockstep")]) == 0
    assert len(_lines(tmp_path / "piped")) == 2
    assert _lines(tmp_path / "piped") == _lines(tmp_path / "lockstep")
    assert _summary(tmp_path / "piped")["cuts"] == _summary(tmp_path / "lockstep")["cuts"]
