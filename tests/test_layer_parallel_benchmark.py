"""The benchmark of layer-parallel training: what states converge to, its runs, and the tables made from its file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import layer_parallel
from lct_fast.cli.config import resolve

ROOT = Path(__file__).parents[1]
STORED = json.loads((ROOT / "benchmarks/results/layer_parallel.json").read_text())


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


def rows(heading: str) -> list[list[str]]:
    """The cells of the table that follows ``heading`` in the docs, without its head."""
    text = (ROOT / "docs" / "layer_parallel.md").read_text().partition(heading)[2]
    table = re.search(r"(\|.*\n)+", text)
    assert table is not None
    return [[c.strip() for c in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


def test_the_table_of_digits_is_the_file() -> None:
    found = rows("Digits (")
    assert len(found) == len([name for name in STORED["table"] if name.startswith("digits")])
    for name, share, accuracy, seeds, gain in found:
        method, _, k = name.replace("`", "").partition(", K = ")
        key = f"digits-{method.replace(' --', '-')}" + (f"-K{k}-q{share}" if k else "")
        row = STORED["table"][key]
        assert accuracy == f"{100 * row['test_accuracy']:.1f}", name
        assert seeds == ", ".join(f"{100 * a:.1f}" for a in row["of_seeds"]), name
        # Shares of time of a process that other programs disturb, so to one digit.
        assert gain == ("" if row["overall_gain"] is None else f"{row['overall_gain']:.1f}"), name


def test_the_table_of_states_is_the_file() -> None:
    states = STORED["states"]
    for beta, penalty, jump, error in rows("The states of a small net"):
        one, other = states["penalty"][beta], states["augmented_lagrangian"][beta]
        assert [float(v) for v in penalty.split(", ")] == [pytest.approx(r["jump"], rel=2e-3) for r in one]
        assert [float(v) for v in jump.split(", ")] == [pytest.approx(r["jump"], rel=0.05) for r in other]
        errors = [pytest.approx(r["kappa_error"], rel=0.05) for r in other]
        assert [float(v) for v in error.split(", ")] == errors


def test_the_figures_of_cifar10_are_the_file() -> None:
    text = (ROOT / "docs" / "layer_parallel.md").read_text()
    for method in ("penalty", "augmented-lagrangian", "backprop"):
        accuracy = STORED["table"][f"cifar10-{method}"]["test_accuracy"]
        assert f"`{method}` {100 * accuracy:.1f}" in text
