"""Timelines put every span and every bubble where it belongs, and say what they mean."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lct_fast.report import read_run, write
from lct_fast.report.timeline import RIGHT, WIDTH, section
from tests.report.conftest import MakeRun


def events() -> list[dict[str, Any]]:
    """Two groups, 10 ms a batch: group 1 works 8 ms and sends 4; group 2 waits 3 and works 5. In microseconds."""
    made = [
        {"ph": "M", "name": "thread_name", "pid": k, "tid": 10 * k + i, "args": {"name": f"group {k}{what}"}}
        for k in (1, 2)
        for i, what in enumerate(("", " send"))
    ]
    for batch in range(10):
        at = 10_000 * batch
        spans = [(1, 0, "forward", at, 8000), (1, 1, "send train", at + 6000, 4000)]
        spans += [(2, 0, "wait for input", at + 10_000, 3000), (2, 0, "forward", at + 13_000, 5000)]
        for k, i, name, start, length in spans:
            where = {"ph": "X", "pid": k, "tid": 10 * k + i, "ts": start, "dur": length}
            made.append({**where, "name": name, "args": {"batch": batch}})
    return made


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    path = make_run("a", exits=2, trace=False)
    (path / "trace.json").write_text(json.dumps({"traceEvents": events()}))
    return path


def test_boxes_and_bubbles(run: Path) -> None:
    text = section(read_run(run), "a", 300)
    assert (
        "Batches 4 to 7 of group 2, and what else was done meanwhile. Bubble: group 1 20.0 %, group 2 50.0 %."
        in text
    )
    boxes = [
        (kind, float(x), float(width), float(y))
        for kind, x, y, width in re.findall(
            r'<rect class="(\w+)" x="([0-9.]+)" y="([0-9]+)" width="([0-9.]+)"', text
        )
    ]
    left = min(x for _, x, _, _ in boxes)
    ten = (WIDTH - RIGHT - left) / 4
    rows = sorted({y for *_, y in boxes})
    assert len(rows) == 3, "group 1, what it sends, group 2"
    of_row = [sorted((x, width, kind) for kind, x, width, row in boxes if row == y) for y in rows]
    for row, kinds in zip(of_row, (["forward"], ["transfer"], ["bubble", "forward"]), strict=True):
        assert [kind for *_, kind in row] == kinds * 4
    for i in range(4):
        at = left + i * ten
        assert of_row[0][i][:2] == pytest.approx((at, 0.8 * ten), abs=0.11)
        assert of_row[1][i][:2] == pytest.approx((at + 0.6 * ten, 0.4 * ten), abs=0.11)
        assert of_row[2][2 * i][:2] == pytest.approx((at, 0.3 * ten), abs=0.11)
        assert of_row[2][2 * i + 1][:2] == pytest.approx((at + 0.3 * ten, 0.5 * ten), abs=0.11)
    # What no span covers: 8 to 10 of every ten, in both groups.
    paths = re.findall(r'<path class="bubble" d="([^"]*)"', text)
    assert len(paths) == 2
    for path in paths:
        gaps = re.findall(r"M([0-9.]+) [0-9]+h([0-9.]+)v", path)
        assert [(float(x), float(width)) for x, width in gaps] == [
            (pytest.approx(left + (i + 0.8) * ten, abs=0.11), pytest.approx(0.2 * ten, abs=0.11))
            for i in range(4)
        ]


def test_table_of_where_the_time_went(run: Path) -> None:
    text = section(read_run(run), "a", 300)
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)</t", row) for row in re.findall("<tr>(.*?)</tr>", text)]
    assert cells == [
        ["row", "busy, %", "bubble, %", "wait for input, %", "no span, %"],
        ["group 1", "80.0", "20.0", "0.0", "20.0"],
        ["group 2", "50.0", "50.0", "30.0", "20.0"],
    ]


def test_it_says_where_a_bubble_is_none(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())

    def told(device: str = "cpu", **more: Any) -> str:
        (run / "summary.json").write_text(json.dumps({**summary, **more}))
        (run / "config.yaml").write_text(json.dumps({"groups": 2, "device": device}))
        return section(read_run(run), "a", 300)

    turn, started = "bubble is the turn of the others", "the time in which the host started the work"
    assert turn in told(processes=1) and turn not in told(processes=2)
    assert turn not in told(processes=1, groups=1)
    assert started in told("cuda:0,cuda:1", processes=2) and started not in told(processes=2)


def test_no_trace_and_an_empty_one(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("a", trace=False)
    assert section(read_run(path), "a", 300) == ""
    (path / "trace.json").write_text("[]")
    assert "The trace holds no spans." in write([path], tmp_path / "x.html").read_text()
