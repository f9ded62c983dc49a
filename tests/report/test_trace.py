"""Traces become rows of spans, a row a group."""

import json
from pathlib import Path
from typing import Any

import pytest

from lct_fast.report import trace
from lct_fast.report.trace import Span, excerpt, idle, lanes, read_trace, rows
from tests.report.conftest import MakeRun


def written(path: Path, events: Any) -> Path:
    (path / "trace.json").write_text(json.dumps(events))
    return path / "trace.json"


def event(row: str, name: str, start: float, end: float, batch: int | None = None) -> Span:
    """Times in ms."""
    return Span(row, name, KIND.get(name, "other"), start / 1e3, (end - start) / 1e3, batch)


KIND = {"forward": "forward", "wait for input": "wait", "send": "transfer"}


def pipeline(batches: int = 9) -> list[Span]:
    """Two groups that take 10 ms a batch, in ms: group 1 works 0..9; group 2, 20 later, waits 0..3 and works 3..8."""
    spans = []
    for t in range(batches):
        at = 10 * t
        spans.append(event("group 1", "forward", at, at + 9, t))
        spans.append(event("group 1 send", "send", at + 9, at + 12, t))
        spans.append(event("group 2", "wait for input", at + 20, at + 23, t))
        spans.append(event("group 2", "forward", at + 23, at + 28, t))
    return sorted(spans, key=lambda span: (span.start, span.row))


def test_spans_by_group(make_run: MakeRun) -> None:
    spans = read_trace(make_run(exits=11) / "trace.json")
    assert rows(spans) == [f"group {k}" for k in range(1, 12)]
    assert len(spans) == 6 * 11 * 5
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("critic update", "critic"),
        ("head", "critic"),
        ("optimizer", "optimiser"),
        ("wait for feedback", "wait"),
        ("send feedback", "transfer"),
        ("receive train", "transfer"),
        ("encode", "coding"),
        ("decode", "coding"),
        ("pack", "coding"),
        ("sample state", "other"),
    ],
)
def test_kinds_of_what_the_engine_records(tmp_path: Path, name: str, kind: str) -> None:
    (span,) = read_trace(written(tmp_path, [{"ph": "X", "name": name, "ts": 0, "dur": 1}]))
    assert span.kind == kind


def test_bubbles_by_hand() -> None:
    shown = excerpt(pipeline())
    # Both are at work from 20 ms, where group 2 begins, to 89; it begins batches 0 to 6 there. Of these the later half,
    # 3 to 6, has three whole steps: 50 to 80 ms.
    assert (shown.steps, shown.of) == ((3, 5), "group 2")
    assert shown.seconds == pytest.approx(0.03)
    one, two = (idle(shown.spans, f"group {k}", shown.seconds) for k in (1, 2))
    # Group 1 works 9 ms in 10 and records nothing in the tenth; group 2 waits 3, works 5, and 2 are not recorded.
    assert (one.busy, one.between) == (pytest.approx(0.027), pytest.approx(0.003)) and one.waits == {}
    assert one.share == pytest.approx(0.1)
    assert two.busy == pytest.approx(0.015) and two.waits == {"wait for input": pytest.approx(0.009)}
    assert two.between == pytest.approx(0.006) and two.share == pytest.approx(0.5)
    assert [(round(a, 6), round(b, 6)) for a, b in two.gaps] == [(0.008, 0.01), (0.018, 0.02), (0.028, 0.03)]
    # What a group sends meanwhile is neither its work nor its bubble; cut off at both ends.
    sends = [span for span in shown.spans if span.kind == "transfer"]
    assert [(round(s.start, 6), round(s.end, 6)) for s in sends] == [
        (0.0, 0.002),
        (0.009, 0.012),
        (0.019, 0.022),
        (0.029, 0.03),
    ]
    assert lanes(rows(shown.spans)) == [("group 1", ["group 1 send"]), ("group 2", [])]


def test_spans_that_overlap_count_once() -> None:
    spans = [event("a", "forward", 0, 6), event("a", "wait for input", 4, 8), event("a", "send", 7, 7.5)]
    found = idle(spans, "a", 0.01)
    assert (found.busy, found.waits, found.between) == (
        pytest.approx(0.006),
        {"wait for input": pytest.approx(0.002)},
        pytest.approx(0.002),
    )
    assert idle([], "a", 0.01).share == 1 and idle([], "a", 0.0).share == 0


def test_steps_of_median_length_are_taken() -> None:
    # Steps of 10 ms, but for one with a pause of 500 in it and one of 5.
    starts = [0, 10, 20, 30, 40, 50, 60, 70, 75, 575, 585, 595]
    spans = [event("group 1", "forward", at, at + 4, t) for t, at in enumerate(starts)]
    shown = excerpt(spans, steps=1)
    assert shown.steps in [(t, t) for t in (5, 6, 9, 10)] and shown.seconds == pytest.approx(0.01)


def test_fewer_steps_where_more_would_be_too_many_spans() -> None:
    assert excerpt(pipeline(), steps=2).seconds == pytest.approx(0.02)
    shown = excerpt(pipeline(), limit=6)
    assert shown.steps is not None and shown.steps[0] == shown.steps[1] and len(shown.spans) <= 6
    # Not even one step: the longest of all.
    few = excerpt(pipeline(), limit=2)
    assert [span.seconds for span in few.spans] == [pytest.approx(0.009)] * 2
    assert few.seconds == pytest.approx(0.108)


def test_a_trace_without_steps_or_of_one_is_shown_whole() -> None:
    plain = [event("loader", "forward", 0, 5), event("loader", "forward", 7, 9)]
    shown = excerpt(plain)
    assert (shown.spans, shown.steps, shown.of) == (plain, None, "") and shown.seconds == pytest.approx(0.009)
    assert excerpt([event("group 1", "forward", 0, 5, 3)]).steps == (3, 3)
    assert excerpt([]).spans == []


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
        ("thread 9", "wait", None),
    ]


def test_steps_may_be_named_by_their_batch(tmp_path: Path) -> None:
    events = [{"ph": "X", "name": "forward", "ts": t, "dur": 1, "args": {"batch": t}} for t in range(9)]
    assert [span.step for span in read_trace(written(tmp_path, events))] == list(range(9))


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
