"""The benchmark of critic_head refuses to time what is wrong, and sums up what it timed. On the CPU here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from benchmarks import gpu_critic_head as bench
from benchmarks.measure import Roofline, percentiles
from lct_fast import ops
from tests.ops.critic_head_case import Case

ROOF = Roofline(1e9, {torch.float32: 1e9, torch.bfloat16: 1e9})
SHAPE = (32, 8, 10, "f32")


def eager(case: Case) -> Callable[[], Any]:
    """Stands in for the compiled rival, which takes long to compile."""
    leaves = [x.clone().requires_grad_() for x in (case.h, case.weight, case.bias) if x is not None]

    def run() -> Any:
        loss = cross_entropy(linear(*leaves), case.target, reduction="none")
        return loss.detach(), *torch.autograd.grad(loss.mean(), leaves)

    return run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    monkeypatch.setattr(bench, "rival", eager)
    monkeypatch.setattr(bench, "SAMPLES", 3)


def test_what_is_right_is_timed_beside_its_rival() -> None:
    rows = bench.measure(SHAPE, "cpu", ["reference"], ROOF)
    assert [row["contender"] for row in rows] == ["reference", bench.RIVAL]
    for row in rows:
        assert row["error"] == "" and row["samples"] == 3
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    assert rows[1]["speedup"] == 1.0
    assert rows[0]["speedup"] == pytest.approx(rows[1]["p50_us"] / rows[0]["p50_us"])
    # 4 (2*32*8 + 32*10 + 2*10*8) + 32*16 bytes at 1 GB/s, 6*32*8*10 operations at 1 GFLOP/s.
    assert rows[0]["roofline_share"] == pytest.approx(15.36 / rows[0]["p50_us"])


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case, backend: str) -> Callable[[], ops.CriticHead]:
        out = case.run()
        return lambda: out._replace(dh=out.dh * 1.01)

    monkeypatch.setattr(bench, "ours", wrong)
    rows = bench.measure(SHAPE, "cpu", ["reference"], ROOF)
    assert rows[0]["contender"] == "reference" and "dh: error" in rows[0]["error"]
    assert "p50_us" not in rows[0]
    assert [row["contender"] for row in rows[1:]] == [bench.RIVAL]
    assert "1 wrong or failed" in bench.conclusion(rows, 0)


def test_a_rival_that_does_another_job_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case) -> Callable[[], Any]:
        loss, *rest = eager(case)()
        return lambda: (loss * 1.01, *rest)

    monkeypatch.setattr(bench, "rival", wrong)
    rows = bench.measure(SHAPE, "cpu", ["reference"], ROOF)
    assert "torch.compile's loss is off" in rows[0]["error"]
    assert rows[1]["speedup"] is None


def test_the_conclusion_parts_few_classes_from_many() -> None:
    def row(classes: int, speedup: float) -> dict[str, Any]:
        return {"contender": "triton", "classes": classes, "speedup": speedup, "error": ""}

    said = bench.conclusion([row(10, 2.0), row(128, 8.0), row(129, 1.5)], left_out=3)
    assert "triton V<=128 4.00x (least 2.00x of 2); triton V>128 1.50x (least 1.50x of 1)" in said
    assert said.endswith("3 shapes left out for want of time")
    assert bench.conclusion([], 0) == "against torch.compile: nothing measured"


def test_percentiles() -> None:
    assert percentiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0, 11)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        percentiles([1.0])
