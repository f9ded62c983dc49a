"""Traces become rows of spans, a row a group."""

import json
from pathlib import Path
from typing import Any

import pytest

from lct_fast.report import trace
from lct_fast.report.trace import read_trace, rows
from tests.report.conftest import MakeRun


def written(path: Path, events: Any) -> Path:
    (path / "trace.json").write_text(json.dumps(events))
    return path / "trace.json"


def test_first_steps_by_group(make_run: MakeRun) -> None:
    spans = read_trace(make_run(exits=11) / "trace.json")
    assert rows(spans) == [f"group {k}" for k in range(1, 12)]
    assert {span.step for span in spans} == {0, 1, 2}
    assert len(spans) == 3 * 11 * 5
    first = spans[:3]
    assert [(s.name, s.kind) for s in first] == [
        ("forward", "forward"),
        ("critic backward", "critic"),
        ("backward", "backward"),
    ]
    assert [(s.start, s.seconds) for s in first] == [
        (pytest.approx(0.0), pytest.approx(3e-4)),
        (pytest.approx(3e-4, rel=1e-3), pytest.approx(1e-4)),
        (pytest.approx(4e-4, rel=1e-3), pytest.approx(4e-4)),
    ]


def test_limit(make_run: MakeRun) -> None:
    assert len(read_trace(make_run() / "trace.json", limit=7)) == 7


def test_rows_of_threads_and_a_bare_list(tmp_path: Path) -> None:
    spans = read_trace(
        written(
            tmp_path,
            [
                {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "loader"}},
                {"ph": "X", "name": "Optimizer.step", "pid": 1, "tid": 2, "ts": 5, "dur": 1},
                {"ph": "X", "name": "wait", "pid": 1, "tid": 9, "ts": 6, "dur": 1, "args": None},
                {"ph": "B", "name": "forward", "pid": 1, "tid": 9, "ts": 6},
                {"ph": "X", "name": "forward", "ts": None, "dur": 3},
                {"ph": "X", "name": "forward", "ts": 3, "dur": -3},
                "no event",
            ],
        )
    )
    assert [(s.row, s.kind, s.step) for s in spans] == [
        ("loader", "optimiser", None),
        ("thread 9", "other", None),
    ]


def test_steps_may_be_named_by_their_batch(tmp_path: Path) -> None:
    events = [{"ph": "X", "name": "forward", "ts": t, "dur": 1, "args": {"batch": t}} for t in range(9)]
    assert [span.step for span in read_trace(written(tmp_path, events))] == [0, 1, 2]


@pytest.mark.parametrize("text", ['{"traceEvents": [{"ph": "X"', '{"traceEvents": 3}', '"x"', ""])
def test_what_is_no_trace(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ValueError, match=r"trace\.json could not be read: expected"):
        read_trace(tmp_path / "trace.json")


def test_large_trace_is_left_to_a_viewer(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run() / "trace.json"
    monkeypatch.setattr(trace, "LARGEST_BYTES", path.stat().st_size - 1)
    with pytest.raises(ValueError, match="trace viewer"):
        read_trace(path)
