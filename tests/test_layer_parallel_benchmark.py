"""The benchmark of layer-parallel training: what states converge to, and its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import layer_parallel
from lct_fast.cli.config import resolve


@pytest.mark.slow
def test_the_jump_of_the_penalty_method_falls_as_1_over_beta() -> None:
    at_2, at_8 = (layer_parallel.stationary("penalty", beta, 200) for beta in (2.0, 8.0))
    for one, four in zip(at_2, at_8, strict=True):
        assert one["jump"] > 1e-3
        assert one["jump"] / four["jump"] == pytest.approx(4, rel=0.02)


@pytest.mark.slow
def test_multipliers_become_the_adjoint_and_the_jump_goes() -> None:
    early, late = (layer_parallel.stationary("augmented_lagrangian", 1.0, steps) for steps in (3, 250))
    for before, after in zip(early, late, strict=True):
        assert after["kappa_cosine"] > 0.9999 and after["kappa_error"] < 0.01
        assert before["kappa_error"] > 10 * after["kappa_error"]
        assert after["jump"] < 1e-4 * after["output"]


def test_every_run_is_one_that_train_takes() -> None:
    for part in ("digits", "cifar10"):
        for name, options in layer_parallel.runs(part, 2, "DIR").items():
            given: dict[str, Any] = {}
            for flag, value in zip(options, [*options[1:], "--"], strict=True):
                if flag.startswith("--"):
                    key = flag.removeprefix("--").replace("-", "_")
                    given[key] = True if value.startswith("--") else value
            for key in ("groups", "seed", "epochs", "batch_size", "limit"):
                given |= {key: int(given[key])} if key in given else {}
            given |= {"serial": float(given["serial"])} if "serial" in given else {}
            assert resolve(given).method == given["method"] and given["method"] in name


def test_a_run_that_is_in_the_file_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def execute(name: str, options: list[str], epochs: int | None) -> dict[str, Any]:
        made.append(name)
        return {"name": name, "test_accuracy": 0.9 + len(made) / 1000, "speed_up": None}

    monkeypatch.setattr(layer_parallel, "execute", execute)
    out = tmp_path / "results" / "layer_parallel.json"
    assert layer_parallel.main(["digits", "--seeds", "1", "--out", str(out)]) == 0
    first = len(made)
    assert layer_parallel.main(["digits", "--seeds", "2", "--out", str(out)]) == 0
    assert len(made) == 2 * first == len(set(made))
    row = json.loads(out.read_text())["table"]["digits-penalty-K2-q0"]
    assert row["of_seeds"] == pytest.approx([0.901, 0.901 + first / 1000])
