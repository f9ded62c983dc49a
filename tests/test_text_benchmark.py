"""The benchmark of character models: its runs and its file."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import text
from benchmarks.tables import text as tables
from lct_fast import models
from lct_fast.cli.config import add_arguments, given, resolve

ROOT = Path(__file__).parents[1]


def _result(run: text.Run, bits: float) -> dict[str, Any]:
    return {
        "name": run.name,
        "variant": run.method,
        "model": run.model,
        "groups": 1 if run.method == "backprop" else run.groups,
        "steps": run.steps,
        "exit_bits_per_character": [bits],
        "test_accuracy": 0.5,
        "feedback_bytes_per_sample": 4.0,
        "wire_bytes_per_sample": 512.0,
    }


def test_every_run_is_one_that_the_command_line_takes() -> None:
    runs = text.runs(400)
    assert len({r.name for r in runs}) == len(runs)
    for run in runs:
        words = run.command(Path("DATA"), Path("out"))
        parser = argparse.ArgumentParser()
        parser.add_argument("--config")
        add_arguments(parser)
        args, rest = parser.parse_known_args(words[words.index("train") + 1 :])
        config = resolve(given(args))
        assert rest == ["--json", "--out", "out"] and config.steps == run.steps
        assert models.default_splits(config.model, config.groups) is not None
    steps = {(r.method, r.groups): set() for r in runs if r.model == text.LSTM}
    for r in runs:
        if r.model == text.LSTM:
            steps[r.method, r.groups].add(r.steps)
    assert all(steps[m, 4] == {400, 1200, 2400} for m in text.METHODS)
    assert all(steps[m, 2] == {400, 1200} for m in text.METHODS if m != "backprop")


def test_a_run_that_is_in_the_file_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def execute(run: text.Run, data: Path) -> dict[str, Any]:
        made.append(run.name)
        if len(made) == 3:
            raise RuntimeError("the third run was lost")
        return _result(run, 3.0 - run.steps / 1000 + 0.25 * (run.method == "greedy"))

    monkeypatch.setattr(text, "execute", execute)
    out = tmp_path / "results" / "text.json"
    with pytest.raises(RuntimeError, match="the third run was lost"):
        text.main(["--data", "DATA", "--out", str(out)])
    assert len(json.loads(out.read_text())["runs"]) == 2
    assert text.main(["--data", "DATA", "--out", str(out)]) == 0
    assert len(made) == len(set(made)) + 1 == len(text.runs(500)) + 1
    for row in json.loads(out.read_text())["table"]:
        assert math.isclose(row["above_backprop"], 0.25 * (row["method"] == "greedy"), abs_tol=1e-9)


def test_points_of_a_curve_are_bits() -> None:
    assert text._point({"step": 50, "loss": [math.log(2), math.log(8)], "lr": 1}) == {
        "step": 50,
        "bits": [1.0, pytest.approx(3.0)],
    }


def test_the_table_of_the_file_is_that_of_its_runs() -> None:
    loaded = json.loads((ROOT / "benchmarks/results/text.json").read_text())
    assert loaded["table"] == text.table(loaded["runs"])
    # The names that the pages' tables look for.
    assert tuple(text.METHODS) == tables.METHODS
    assert {tables.L1_FAST, tables.ONE_SIDED_SLOW} == set(text.CRITICS)
