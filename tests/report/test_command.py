"""``lct-fast report`` as called from the command line."""

import argparse
import json
from pathlib import Path

import pytest

from lct_fast.cli import report
from tests.report.conftest import MakeRun


def call(*words: object) -> int:
    parser = argparse.ArgumentParser()
    report.add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", *map(str, words)])
    return args.run(args)


def test_one_run_gets_its_report(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run("a")
    assert call(path) == 0
    assert "<h1>a</h1>" in (path / "report.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"a: local-critic, 43.00% last exit\nwrote {path / 'report.html'}\n"


def test_several_runs_are_compared_here(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(make_run("a"), make_run("b", epochs=0, summary=False)) == 0
    assert "<h1>2 runs</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "b: local-critic, no accuracy yet\n" in capsys.readouterr().out


def test_json(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "x.html"
    assert call(make_run("a", exits=2), "--json", "--out", out) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"] == str(out) and out.is_file()
    (record,) = printed["runs"]
    assert record["method"] == "local-critic" and record["finished"] is True
    assert record["exit_test_accuracy"] == pytest.approx([0.13, 0.23])
    assert record["critic_tax"] == 0.123 and record["bubble_fraction"] is None


def test_bad_run_and_bad_file(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("a")
    with pytest.raises(ValueError, match="expected a run folder"):
        call(path, tmp_path / "no", "--out", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "x.html", tmp_path):
        with pytest.raises(ValueError, match=f"{out}: expected a file"):
            call(path, "--out", out)
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code == 2
