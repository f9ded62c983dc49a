"""Run folders are read whatever state they are in; what is no run folder is refused."""

import json
from pathlib import Path

import pytest

from lct_fast.report import read_run
from tests.report.conftest import MakeRun


def test_finished_run(make_run: MakeRun) -> None:
    run = read_run(make_run("a", exits=3, epochs=2))
    assert (run.name, run.finished, run.notes) == ("a", True, [])
    assert run.exit_accuracy() == pytest.approx([0.12, 0.22, 0.32])
    assert run.value("method") == "local-critic"
    assert run.accuracy_curves()[2] == [(1.0, pytest.approx(0.31)), (2.0, pytest.approx(0.32))]
    loss = run.loss_curves()
    assert (loss.name, loss.unit, len(loss.curves)) == ("test loss", "epoch", 3)
    assert loss.curves[0] == [(1.0, 2.0), (2.0, 1.5)]


def test_run_in_progress_with_its_last_line_cut_short(make_run: MakeRun) -> None:
    path = make_run("a", exits=2, epochs=2, summary=False)
    with (path / "metrics.jsonl").open("ab") as file:
        # Ends inside the two bytes of an e with an accent.
        file.write('{"kind": "epoch", "epoch": 3, "note": "\u00e9'.encode()[:-1])
    run = read_run(path)
    assert not run.finished
    assert [record["epoch"] for record in run.epochs] == [1, 2]
    assert run.exit_accuracy() == pytest.approx([0.12, 0.22])
    assert run.value("groups") == 2
    assert len(run.notes) == 1 and "1 line of metrics.jsonl" in run.notes[0]


def test_resumed_run_keeps_the_later_line(tmp_path: Path) -> None:
    lines = [
        {"kind": "epoch", "epoch": e, "test_loss": [x]} for e, x in ((1, 3.0), (2, 2.0), (2, 1.5), (3, 1.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_run(tmp_path).loss_curves().curves == [[(1.0, 3.0), (2.0, 1.5), (3.0, 1.0)]]


def test_values_that_cannot_be_drawn_leave_gaps(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "epoch", "epoch": 1, "test_loss": [null, 1]}\n'
        '{"kind": "epoch", "epoch": 2, "test_loss": [NaN, -Infinity]}\n'
        '{"kind": "epoch", "epoch": 3, "test_loss": [2.5, true]}\n'
        '{"kind": "epoch", "epoch": 4, "test_loss": [1e308, "x"]}\n'
        '{"kind": "epoch", "epoch": 5, "test_loss": [0.5]}\n'
        '{"kind": "epoch", "epoch": 6}\n'
        '{"kind": "epoch", "epoch": null, "test_loss": [9, 9]}\n'
        '{"kind": "of another version", "epoch": 7}\n[1]\n'
    )
    run = read_run(tmp_path)
    first, second = run.loss_curves().curves
    assert [y for _, y in first] == [None, None, 2.5, None, 0.5, None]
    assert [y for _, y in second] == [1.0, None, None, None, None, None]
    assert len(run.notes) == 1 and "1 line of" in run.notes[0]


def test_loss_that_is_drawn(tmp_path: Path) -> None:
    lines = ['{"kind": "interval", "step": 5, "epoch": 1, "loss": [2.0, 1.0]}']

    def drawn() -> tuple[str, str, list[list[tuple[float, float | None]]]]:
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        loss = read_run(tmp_path).loss_curves()
        return loss.name, loss.unit, loss.curves

    assert drawn() == ("train loss", "step", [[(5.0, 2.0)], [(5.0, 1.0)]])
    lines.append('{"kind": "epoch", "epoch": 1, "train_loss": [0.5], "test_loss": [null]}')
    assert drawn() == ("train loss", "epoch", [[(1.0, 0.5)]])
    lines.append('{"kind": "epoch", "epoch": 1, "train_loss": [0.5], "test_loss": [0.75]}')
    assert drawn() == ("test loss", "epoch", [[(1.0, 0.75)]])


def test_one_number_where_a_list_is_usual(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "epoch", "epoch": 1, "test_loss": 2, "test_accuracy": 0.5}'
    )
    run = read_run(tmp_path)
    assert run.loss_curves().curves == [[(1.0, 2.0)]]
    assert run.accuracy_curves() == [[(1.0, 0.5)]]
    assert run.exit_accuracy() == [0.5]


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000])
def test_unreadable_summary_is_told(make_run: MakeRun, text: str) -> None:
    path = make_run("a", epochs=2)
    (path / "summary.json").write_text(text)
    run = read_run(path)
    assert not run.finished and "summary.json" in run.notes[0]
    assert run.exit_accuracy()[0] == pytest.approx(0.12)


@pytest.mark.parametrize("text", ["a: [", "- a\n- b", "!!python/object:os.system x", "day: 2024-99-99"])
def test_unreadable_config_is_shown_as_it_stands(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    run = read_run(tmp_path)
    assert run.config_text == text and run.config == {} and "config.yaml" in run.notes[0]


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, found in (
        ("other", "thesis.tex"),
        ("empty", "nothing"),
        ("file", "a file"),
        ("no", "nothing there"),
    ):
        with pytest.raises(ValueError, match="expected a run folder") as error:
            read_run(tmp_path / name)
        assert f"found {found}" in str(error.value)
        assert "\n" not in str(error.value)
        if name in ("other", "empty"):
            assert "config.yaml, metrics.jsonl, summary.json" in str(error.value)
