"""The simulation of many workers: which costs it takes out of the pipeline benchmark's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling


def _group(forward: float, sent: float) -> dict[str, Any]:
    cost = dict.fromkeys(scaling._SECONDS, 0.001) | {"forward_s": forward, "backward_s": 0.1}
    return {"cost": cost | {"activation_bytes": sent, "parameter_bytes": 8.0}, "jitter": 0.1}


def _file(tmp_path: Path, costs: Any) -> Path:
    path = tmp_path / "pipeline.json"
    head = {"device": "a CPU", "commit": "abc"}
    path.write_text(json.dumps(head | {"costs": {"link": {}, scaling.SETTING: {"1": costs}}}))
    return path


def test_costs_are_medians_over_visits_of_each_group() -> None:
    visits = [[_group(f, 4.0), _group(10 * f, 0.0)] for f in (0.03, 0.01, 0.02)]
    first, second = scaling.medians(visits)
    assert (first["forward_s"], second["forward_s"]) == (0.02, 0.2)
    cost = scaling.average([first, second])
    assert cost.forward_s == pytest.approx(0.11) and cost.activation_bytes == 4.0


def test_the_file_is_made_from_the_pipeline_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "WORKERS", (2,))
    monkeypatch.setattr(scaling, "MICROBATCHES", (4,))
    source = _file(tmp_path, [[_group(f, 4e6), _group(f, 0.0)] for f in (0.03, 0.05, 0.04)])
    out = tmp_path / "results" / "scaling.json"
    assert scaling.main(["--costs", str(source), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["group"]["forward_s"] == pytest.approx(0.04) and found["costs_from"]["commit"] == "abc"
    assert len(found["rows"]) == len(scaling.SPEEDS) * len(scaling.LINKS)
    # 4 microbatches of a forward and a backward pass, at the least.
    assert all(row["decoupled_s"] >= 4 * 0.14 / 200 for row in found["rows"])


@pytest.mark.parametrize("costs", [[], [_group(0.03, 4.0)["cost"]] * 2])
def test_costs_of_another_form_are_refused(
    costs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        scaling.main(["--costs", str(_file(tmp_path, costs)), "--out", str(tmp_path / "out.json")])
    assert status.value.code == 2
    assert "make the file anew with python -m benchmarks.pipeline" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
