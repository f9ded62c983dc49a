"""Learning curves as PNG files."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lct_fast.report import plot_curves
from tests.report.conftest import MakeRun

# The first four colours of matplotlib's cycle, one an exit.
COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40))


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 800
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


@pytest.mark.parametrize("exits", [1, 3])
def test_a_line_for_each_exit(make_run: MakeRun, tmp_path: Path, exits: int) -> None:
    out = plot_curves(make_run(exits=exits), tmp_path / "new" / "curves.png")
    assert [colour in colours(out) for colour in COLOURS] == [k < exits for k in range(4)]


# An unfinished formula, and a script that the font lacks.
@pytest.mark.parametrize("name", [r"a$\frac{$b", "\u5b9f\u9a13"])
def test_names_that_are_hard_to_draw(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    assert COLOURS[0] in colours(plot_curves(make_run(name), tmp_path / "curves.png"))


def test_run_with_nothing_to_draw(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "epoch", "epoch": 1, "test_loss": [None]}))
    out = plot_curves(tmp_path, tmp_path / "curves.png")
    assert not colours(out) & set(COLOURS[1:])


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a run folder"):
        plot_curves(tmp_path, tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []
