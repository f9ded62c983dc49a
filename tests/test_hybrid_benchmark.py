"""The benchmark of serial steps: its runs and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import hybrid
from lct_fast.cli.config import resolve
from lct_fast.engine import Hybrid


def _result(run: hybrid.Run, accuracy: float) -> dict[str, Any]:
    serial = {"steps": 40, "seconds": 0.4} if run.share else None
    return {
        "name": run.name,
        "part": run.part,
        "method": run.method,
        "share": run.share,
        "serial": serial,
        "exit_test_accuracy": [accuracy, accuracy],
        "wire_bytes_per_sample": 100.0,
        "raw_bytes_per_sample": 50.0,
        "serial_step_seconds": 0.01 if run.share else None,
        "other_step_seconds": 0.005,
        "foreign_cpu_share": 0.0,
    }


def test_a_run_that_is_in_the_file_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def execute(run: hybrid.Run, epochs: int | None) -> dict[str, Any]:
        made.append(run.name)
        if len(made) == 3:
            raise RuntimeError("the third run was lost")
        return _result(run, 0.9 + run.seed / 100)

    monkeypatch.setattr(hybrid, "execute", execute)
    out = tmp_path / "results" / "hybrid.json"
    with pytest.raises(RuntimeError, match="the third run was lost"):
        hybrid.main(["accuracy", "--seeds", "2", "--out", str(out)])
    assert len(json.loads(out.read_text())["runs"]) == 2
    assert hybrid.main(["accuracy", "--seeds", "2", "--out", str(out)]) == 0
    assert hybrid.main(["times", "--out", str(out)]) == 0
    # The lost one was made again, no other.
    assert len(made) == len(set(made)) + 1 == 2 * 8 + 8 + 1
    table = json.loads(out.read_text())["table"]
    row = table["accuracy"]["greedy"]["0.1"]
    assert row["exit_test_accuracy"] == pytest.approx([0.905, 0.905]) and row["seeds"] == 2
    assert (row["serial_step_ms"], row["other_step_ms"]) == (10, 5)
    assert table["times"]["local-critic"]["0"]["serial_step_ms"] is None


@pytest.mark.parametrize("part", ["accuracy", "times"])
def test_every_share_has_several_blocks(part: str) -> None:
    for run in hybrid.runs(part, 1):
        words = run.command(Path("out"), None)
        assert ("torch.distributed.run" in words) == (part == "times")

        def option(name: str, words: list[str] = words) -> str:
            return words[words.index(name) + 1]

        # 1,437 digits in batches of 64 are 22 an epoch.
        epochs = int(option("--epochs")) if "--epochs" in words else resolve({}).epochs
        schedule = Hybrid(run.share, block=int(option("--serial-block")))
        assert float(option("--serial")) == run.share
        if run.share:
            assert 22 * epochs // schedule.period >= 3
