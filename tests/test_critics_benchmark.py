"""The study of cheap critics: its contenders, its file, and what docs/critics.md says of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lct_fast as lct
from benchmarks import critics
from benchmarks.accuracy import CONV, POOLED, Run
from lct_fast.cli.config import resolve
from lct_fast.cli.costs import critic_mac_share

ROOT = Path(__file__).parents[1]


def _result(run: Run, accuracy: float) -> dict[str, Any]:
    return {
        "name": run.name,
        "seed": int(run.name[-1]),
        "exit_test_accuracy": [accuracy / 2, accuracy],
        "critic_mac_share": [0.001, 0.002],
        # The first was made without.
        "diagnosis": {"gradient_cosine": [accuracy, 1.0]} if accuracy > 0.5 else None,
        "critic_tax": 0.1,
        "seconds": 20.0,
    }


def test_contenders_are_runs_that_training_accepts() -> None:
    names = [contender.name for contender in critics.CONTENDERS]
    assert len(set(names)) == len(names)
    assert {c.name for c in critics.FINALISTS} <= set(names)
    for run in critics.runs("finals", critics.CONTENDERS, "PATH"):
        options = run.options
        keys = [o.removeprefix("--").replace("-", "_") for o in options[::2]]
        typed = dict(zip(keys, options[1::2], strict=True))
        numbers = {k: int(typed[k]) for k in ("limit", "epochs", "groups", "seed")}
        for key in ("serial", "critic_lr"):
            if key in typed:
                numbers[key] = float(typed[key])  # type: ignore[assignment]
        if "serial_block" in typed:
            numbers["serial_block"] = int(typed["serial_block"])
        numbers["diagnose"] = int(typed["diagnose"])
        assert resolve(typed | numbers).epochs == 8


def test_cheap_critics_are_cheap_and_the_reference_is_not() -> None:
    """At most 5 % of their group's MACs, each."""
    model = lct.models.build("lct_vgg:width=0.25", 10, 3, 32)
    points = lct.models.default_splits("lct_vgg:width=0.25", 4)
    for spec in (*critics.CHEAP, POOLED, "mlp_sr_aux", CONV):
        example = torch.zeros(2, 3, 32, 32)
        share = critic_mac_share(lct.split(model, example_input=example, critic=spec, split_points=points))
        assert share is not None and len(share) == 3
        assert all(0 < s <= 0.05 for s in share) == (spec != CONV), (spec, share)


def test_the_file_is_written_after_every_run_and_keeps_the_other_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def execute(run: Run, folder: Path, threads: int) -> dict[str, Any]:
        made.append(run.name)
        if len(made) == 5:
            raise RuntimeError("the fifth run was lost")
        return _result(run, 0.5 + int(run.name[-1]) / 10)

    monkeypatch.setattr(critics, "execute", execute)
    out = tmp_path / "results" / "critics.json"
    arguments = ["--data", "PATH", "--out", str(out)]
    two = [critics.CONTENDERS[1].name, critics.CONTENDERS[3].name]
    with pytest.raises(RuntimeError, match="the fifth run was lost"):
        critics.main(["finals", *arguments, "--contenders", *two])
    assert len(json.loads(out.read_text())["finals"]["runs"]) == 4
    assert critics.main(["screen", *arguments, "--contenders", two[0]]) == 0
    content = json.loads(out.read_text())
    assert len(content["screen"]["runs"]) == 1
    rows = content["finals"]["rows"]
    assert [(row["contender"], row["seeds"]) for row in rows] == [(two[0], [0, 1]), (two[1], [0, 1])]
    assert rows[0]["exit_accuracy"] == pytest.approx([27.5, 55.0])
    assert rows[0]["gradient_cosine"] == [pytest.approx(0.6), 1.0]
    assert rows[0]["exit_accuracy_sd"][1] == pytest.approx(100 * 0.1 / 2**0.5)
    assert content["screen"]["rows"][0]["exit_accuracy_sd"] == [None, None]


def test_an_unknown_contender_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        critics.main(["finals", "--data", "PATH", "--out", "x.json", "--contenders", "best"])
    assert status.value.code == 2
    assert "--contenders: no best; known: backprop, greedy-" in capsys.readouterr().err


def _file() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "benchmarks/results/critics.json").read_text())
    return loaded


def test_what_the_docs_say_of_the_losses_holds_for_every_seed() -> None:
    runs = {r["name"]: r["exit_test_accuracy"] for r in _file()["seeds"]["runs"]}
    losses = {c.loss: c.name for c in critics.FINALISTS if c.method == "local-critic"}
    for seed in critics.PARTS["seeds"].seeds:
        half, l1 = (runs[f"screen-{losses[loss]}-seed{seed}"] for loss in ("half_sided", "l1"))
        assert all(a > b for a, b in zip(half, l1, strict=True)), seed
        greedy, wide = (
            runs[f"screen-{critics.Contender('greedy', critic).name}-seed{seed}"]
            for critic in (POOLED, "pooled_linear:pool=8")
        )
        assert all(a > b for a, b in zip(greedy[:-1], half[:-1], strict=True)), seed
        assert wide[0] > greedy[0] and wide[2] < greedy[2], seed
