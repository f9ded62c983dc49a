"""Charts put every value where it belongs."""

import re

import pytest

from lct_fast.report.run import Curve
from lct_fast.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, axis, escape, line_chart


def path_of(points: Curve, most: int = 100) -> str:
    x, y = axis("epoch", [0, 10], tight=True), axis("loss", [0, 1])
    chart = line_chart("t", x, y, [Line("exit 1", "--h:1", points)], most)
    found = re.search(r'class="line" style="--h:1" d="([^"]*)"', chart)
    assert found is not None
    return found[1]


def test_corners() -> None:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    assert path_of([(0, 0), (10, 1)]) == f"M{LEFT:.1f} {bottom:.1f}L{right:.1f} {TOP:.1f}"


def test_gaps_and_lone_points() -> None:
    path = path_of([(0, 0.5), (1, None), (2, 0.5), (3, 0.5), (4, None), (5, None), (6, 0.5)])
    # A dot, a line, a dot.
    assert re.sub(r"[0-9. ]+", "_", path) == "M_h_M_L_M_h_"


def test_thinned_lines_keep_their_ends() -> None:
    points: Curve = [(i / 100, 0.5) for i in range(1001)]
    path = path_of(points, most=50)
    assert 45 <= len(re.findall("[ML]", path)) <= 55
    assert path.startswith(f"M{LEFT:.1f} ") and f"L{WIDTH - RIGHT:.1f} " in path


def test_labels_stay_apart_and_inside() -> None:
    lines = [Line(f"exit {k}", "", [(0, 0.0), (10, 0.001 * k)]) for k in range(8)]
    chart = line_chart("t", axis("epoch", [0, 10], tight=True), axis("loss", [0, 1]), lines, 100)
    found = re.findall(r'class="end"[^>]* y="([0-9.]+)">exit (\d)<', chart)
    heights = [float(y) for y, _ in sorted(found, key=lambda pair: -int(pair[1]))]
    # A greater value stands higher up: a smaller y.
    assert all(low - high >= 12 - 0.2 for high, low in zip(heights, heights[1:], strict=False))
    assert heights[0] >= TOP and heights[-1] <= HEIGHT - BOTTOM + 5


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([0.31, 0.94], [0.2, 0.4, 0.6, 0.8, 1.0]),
        ([-3.0, 12.0], [-5, 0, 5, 10, 15]),
        ([2.0, 2.0], [1.9, 1.95, 2.0, 2.05, 2.1]),
        ([], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round_and_cover_the_data(values: list[float], ticks: list[float]) -> None:
    assert list(axis("loss", values).ticks) == pytest.approx(ticks)


@pytest.mark.parametrize("values", [[1e99, -1e99], [5e-324, 1e-323], [1e15, 1e15 + 0.125], [0.0, 1e-200]])
def test_extreme_ranges(values: list[float]) -> None:
    made = axis("loss", values)
    assert 2 <= len(made.ticks) <= 12
    assert all(-1e-9 <= made.place(value) <= 1 + 1e-9 for value in values)


def test_ticks_of_few_epochs_are_whole() -> None:
    assert list(axis("epoch", [1, 3], tight=True, least=1).ticks) == [1, 2, 3]
    assert list(axis("epoch", [4, 4], tight=True, least=1).ticks) == [3, 4, 5]


def test_percent() -> None:
    made = axis("accuracy", [0.0, 1.0], percent=True)
    assert [made.text(tick) for tick in made.ticks] == ["0", "20", "40", "60", "80", "100"]


def test_escape() -> None:
    assert (
        escape("<a href=\"x\" id='y'>&\x00\x1b")
        == "&lt;a href=&quot;x&quot; id=&#x27;y&#x27;&gt;&amp;\ufffd\ufffd"
    )


def test_nothing_is_above_all() -> None:
    made = axis("in use, %", [1.0, 1.0], percent=True)
    assert made.high == 1 and [made.text(tick) for tick in made.ticks][-1] == "100"


@pytest.mark.parametrize("last", [10, 1_000, 250_000])
def test_labels_below_leave_room_for_each_other(last: int) -> None:
    line = Line("exit 1", "", [(0, 0.5), (last, 0.5)])
    chart = line_chart("t", axis("step", [0, last], tight=True), axis("loss", [0, 1]), [line], 100)
    found = re.findall(rf'x="([0-9.]+)" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">([0-9,]+)<', chart)
    places = [(float(x), len(text) * 8) for x, text in found]
    assert len(places) >= 2
    for (x, width), (after, wide) in zip(places, places[1:], strict=False):
        assert after - x >= (width + wide) / 2
