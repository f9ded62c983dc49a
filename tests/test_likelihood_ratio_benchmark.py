"""The benchmark of likelihood-ratio training: its arithmetic, its file, and the tables in docs made from that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import likelihood_ratio as benchmark
from lct_fast.cli.build_method import likelihood_ratio
from lct_fast.cli.config import Config, resolve

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/likelihood_ratio.json"


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    pass


def test_slope() -> None:
    assert benchmark.slope((10, 100, 1000), [3.0, 0.3, 0.03]) == pytest.approx(-1)


@pytest.mark.parametrize("kind", benchmark.LAYERS)
def test_more_copies_are_better_for_every_layer(kind: str) -> None:
    case = benchmark.Case(kind)
    exact = case.exact()
    errors = [float((case.estimate(copies) - exact).norm() / exact.norm()) for copies in (10, 4000)]
    assert errors[1] < errors[0] / 4 and errors[1] < 0.6


def test_a_run_that_is_in_the_file_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def train(options: tuple[str, ...], seed: int) -> dict[str, Any]:
        made.append(seed)
        if len(made) == 3:
            raise RuntimeError("the third run was lost")
        return {"test_accuracy": 0.9 + seed / 100}

    monkeypatch.setattr(benchmark, "train", train)
    out = tmp_path / "results" / "file.json"
    with pytest.raises(RuntimeError, match="the third run was lost"):
        benchmark.main(["digits", "--out", str(out)])
    assert len(json.loads(out.read_text())["runs"]) == 2
    assert benchmark.main(["digits", "--seeds", "2", "--out", str(out)]) == 0
    count = 2 * len(benchmark.DIGITS)
    content = json.loads(out.read_text())
    assert len(content["runs"]) == count and len(made) == count + 1
    row = content["table"]["digits"][benchmark.DIGITS[0][0]]
    assert row["seeds"] == 2 and row["test_accuracy"] == pytest.approx(0.905)


def test_options_are_those_of_the_command_line() -> None:
    for name, options in benchmark.DIGITS:
        given: dict[str, Any] = {"method": "likelihood-ratio"}
        for flag, value in zip(options[::2], options[1::2], strict=True):
            key = flag.removeprefix("--").replace("-", "_")
            given[key] = int(value) if key in ("groups", "copies") else value
        config: Config = resolve(given)
        method = likelihood_ratio(config)
        noise, model, groups, copies, *_ = name.split(", ")
        assert (method.noise, groups, copies) == (noise, f"K={config.groups}", f"{method.copies} copies")
        assert config.model.startswith(model)


def test_the_file_holds_every_part() -> None:
    content = json.loads(RESULTS.read_text())
    assert set(content["convergence"]) == set(benchmark.LAYERS) and len(content["variance"]) == 2
    assert len(content["runs"]) == len(benchmark.DIGITS) + len(benchmark.THRESHOLDS)
