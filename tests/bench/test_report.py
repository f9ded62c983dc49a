"""A run as a whole: written as it goes, within its budget, honest about who else used the machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from lct_fast.bench import report
from lct_fast.bench.case import Place
from lct_fast.bench.report import Plan, best_rival, conclusion, line, quiet
from tests.bench.made import bench, contender, ours, right


def row(undisturbed: int = 7, **more: Any) -> dict[str, Any]:
    return {"samples": 7, "undisturbed": undisturbed, "times_as_fast_as": {}, **more}


@pytest.mark.parametrize(
    ("share", "undisturbed", "calm"), [(0.05, 7, True), (0.051, 7, False), (0.0, 6, True), (0.0, 5, False)]
)
def test_foreign_load_and_lost_cores_are_not_quiet(share: float, undisturbed: int, calm: bool) -> None:
    assert quiet(share, [row(), row(undisturbed)]) is calm


def test_a_busy_machine_is_written_into_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 10**9, 1000))
    monkeypatch.setattr("lct_fast.bench.machine.busy_seconds", lambda: next(seconds))
    found = report.run(Plan([bench(ours())], Place(), 2), lambda text: None)
    assert found["foreign_cpu_share"] > 0.05 and found["quiet"] is False


def test_every_shape_is_written_as_it_ends(tmp_path: Path) -> None:
    out, seen = tmp_path / "new" / "report.json", list[int]()

    def say(text: str) -> None:
        seen.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)

    found = report.run(Plan([bench(ours())], Place(), 2, out=out), say)
    assert seen == [0, 1] and json.loads(out.read_text())["rows"] == found["rows"]


def test_shapes_beyond_the_budget_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 40.0, 40.0])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(now))
    found = report.run(Plan([bench(ours())], Place(), 2, budget_s=60), lambda text: None)
    assert [r["shape"] for r in found["rows"]] == ["4"]
    assert found["left_out"] == ["doubled 5: 60 s are not enough"]


def test_a_failed_check_is_listed() -> None:
    found = report.run(Plan([bench(ours(), contender("a", lambda: right() + 1))], Place(), 2, ("4",)), str)
    assert len(found["failed_checks"]) == 1
    assert found["failed_checks"][0].startswith("doubled 4 a : WrongOutput: y is off by")


def test_lines() -> None:
    known = {"op": "doubled", "shape": "4", "contender": "lct_fast", "backend": "cpu"}
    known |= {"failed": "", "skipped": "", "us_p20": 1.0, "us_p50": 2.0, "us_p80": 3.0, "graphs": False}
    said = line(row(**known) | {"share_of_roofline": 0.5, "times_as_fast_as": {"a": 3.0, "b": 1.5}})
    assert "2.0 us [1.0, 3.0]  50% of roofline, 1.50x the best rival, without graphs" in said
    said = line(row(**known) | {"failed": "WrongOutput: y", "us_p50": None})
    assert said.endswith("FAILED: WrongOutput: y") and " us " not in said


def test_the_conclusion_is_of_ours_against_the_best_rival() -> None:
    def mine(backend: str, *ratios: float) -> dict[str, Any]:
        found = row(op="doubled", contender="lct_fast", backend=backend)
        return found | {"times_as_fast_as": dict(zip("abc", ratios, strict=False))}

    rows = [mine("cpu", 2.0, 9.0), mine("cpu", 8.0), mine("cuda", 1.5), mine("cuda"), row(contender="a")]
    assert best_rival(rows[0]) == 2.0 and best_rival(rows[3]) is None
    said = conclusion(rows)
    assert "doubled cpu 4.00x (least 2.00x of 2); doubled cuda 1.50x (least 1.50x of 1)" in said
    assert conclusion([]) == "against the best rival: nothing measured"
