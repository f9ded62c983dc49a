"""What benchmarks.wire makes of finished runs."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import wire


def run(codec: str, seed: int, accuracy: float, coded: float | None = None, fold: int = 0) -> dict[str, Any]:
    return {
        "method": "greedy",
        "codec": codec,
        "seed": seed,
        "options": ["--data", f"digits:fold={fold}"],
        "test_accuracy": accuracy,
        "coded_exit_test_accuracy": None if coded is None else [0.1, coded],
        "raw_bytes_per_sample": 160.0,
        "wire_bytes_per_sample": 160.0 if codec == "none" else 10.0,
    }


def rows(*runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["codec"]: row for row in wire.table(list(runs))}


def test_differences_are_between_runs_of_the_same_seed_and_fold() -> None:
    found = rows(
        run("none", 0, 0.90),
        run("none", 1, 0.80),
        run("none", 0, 0.70, fold=1),
        run("vq:256,4", 1, 0.82, coded=0.81),
        run("vq:256,4", 0, 0.91, coded=0.88),
    )
    row = found["vq:256,4"]
    assert row["runs"] == 2 and row["accuracy"] == pytest.approx(86.5)
    # +1 and +2 points; Student's 97.5 % point with one degree of freedom is 12.706.
    assert row["points_from_none"] == {
        "mean": pytest.approx(1.5),
        "half_width": pytest.approx(12.706 * 0.5, rel=1e-3),
    }
    assert row["points_from_none_coded_evaluation"]["mean"] == pytest.approx((-2 + 1) / 2)
    assert row["times_fewer_bytes"] == 16 and row["bytes_over_theory"] == pytest.approx(0)
    assert found["none"]["points_from_none"]["mean"] == 0


def test_vq_is_held_against_each_rival_in_pairs() -> None:
    found = rows(
        *(run("none", seed, 0.9) for seed in (0, 1)),
        run("vq:256,4", 0, 0.91, coded=0.90),
        run("vq:256,4", 1, 0.93, coded=0.92),
        run("int2:256", 0, 0.90, coded=0.92),
        run("int2:256", 1, 0.90, coded=0.92),
        run("none", 0, 0.9, fold=3),
        # Of a fold that vq has not seen.
        run("topk:16", 0, 0.50, fold=3),
        run("int2", 1, 0.95),
    )
    ahead = found["vq:256,4"]["points_ahead_of"]
    assert set(ahead) == {"int2", "int2:256"}
    assert ahead["int2:256"]["pairs"] == 2
    assert ahead["int2:256"]["plain"]["mean"] == pytest.approx(2)
    assert ahead["int2:256"]["coded_evaluation"]["mean"] == pytest.approx(-1)
    assert ahead["int2"]["pairs"] == 1
    assert ahead["int2"]["plain"] == {"mean": pytest.approx(-2), "half_width": None}
    assert found["int2"]["points_ahead_of"] == {} and found["none"]["points_ahead_of"] == {}
