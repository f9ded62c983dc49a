"""benchmarks.tables: the pages are what the committed result files give, and what differs is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.tables import chart, markdown, pipeline, wire
from benchmarks.tables.__main__ import main, pages
from benchmarks.tables.marks import MarkError, blocks, filled
from benchmarks.tables.registry import TABLES, NotMade, make
from benchmarks.tables.results import Results
from lct_fast.report.svg import apart

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Edit = Callable[[Any], None]


def stored(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return loaded


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the pages, the plots and the result files."""
    for page in pages(ROOT):
        (tmp_path / page.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    for folder in ("docs/plots", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new, 1))


def change(tree: Path, name: str, how: Edit) -> None:
    path = tree / f"benchmarks/results/{name}.json"
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def test_no_page_has_drifted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_digit_in_a_page_is_named_and_written_back(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tree / "README.md"
    before = page.read_text()
    edit(page, "| 99.17 ± 0.52 |", "| 99.18 ± 0.52 |")
    changed = page.read_text()
    assert main(["--check"], tree) == 1
    line = before[: before.index("<!-- table: digits -->")].count("\n") + 1
    said = capsys.readouterr().err
    assert f"README.md:{line}: table 'digits' has drifted from digits.json\n" in said
    assert "1 drifted: run `python -m benchmarks.tables`" in said
    # A check writes nothing.
    assert page.read_text() == changed
    assert main([], tree) == 0 and page.read_text() == before
    assert main(["--check"], tree) == 0


@pytest.mark.parametrize(
    ("name", "how", "drifted"),
    [
        ("digits", lambda c: c["over_seeds"]["greedy"]["last_exit"].update(mean=0.5), ["digits", "greedy"]),
        ("pipeline", lambda c: c["rows"][-1].update(us_p50=1e5), ["pipeline", "pipeline.svg"]),
        ("pipeline", lambda c: c.update(ratio_to_best_pipeline=1.2), ["pipeline-words", "local-critic-time"]),
        ("wire_cifar10", lambda c: c["rows"].pop(), ["wire-cifar10", "wire-words", "wire.svg"]),
        ("scaling", lambda c: c["rows"][1].update(best_pipeline_s=1e-3), ["scaling", "scaling.svg"]),
        ("fault_drills", lambda c: c["drills"][0].update(passed=False), ["fault-drills-words"]),
        ("vq_cpu", lambda c: c.update(quiet=True, commit="another"), ["vq-conditions", "files"]),
    ],
)
def test_a_change_in_a_result_file_shows_in_its_tables(
    name: str, how: Edit, drifted: list[str], tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "vq_cpu":
        change(tree, "vq_cpu_training_step", lambda c: c.update(quiet=True))
    change(tree, name, how)
    assert main(["--check"], tree) == 1
    said = capsys.readouterr().err
    for one in drifted:
        assert re.search(rf"(table '{one}'|docs/plots/{one}) has drifted from .*{name}\.json", said), one
    assert main([], tree) == 0 and main(["--check"], tree) == 0


@pytest.mark.parametrize(
    ("page", "old", "new", "message"),
    [
        ("README.md", "table: digits ", "table: digts ", r"README\.md:\d+: no table is called 'digts': take"),
        ("docs/planner.md", "<!-- end -->\n", "", "inside 'planner' of line .*: put <!-- end --> before it"),
        ("docs/codecs.md", "<!-- table: links -->\n", "", r"docs/codecs\.md:\d+: <!-- end --> ends nothing"),
        ("docs/vq.md", "<!-- table: vq -->\n", "<!-- table: vq --> \n<!-- table: vq -->\n", "inside 'vq'"),
        ("docs/hybrid.md", "<!-- table: hybrid-times -->", "<!-- table: hybrid-accuracy -->",
         r"hybrid-times: made, and on no page: put <!-- table: hybrid-times -->"),
        ("README.md", "](docs/plots/wire.svg)", "](docs/plots/bytes.svg)", r"wire\.svg: drawn, and on no page"),
    ],
)  # fmt: skip
def test_wrong_marks_are_errors_and_nothing_is_written(
    page: str, old: str, new: str, message: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(tree / page, old, new)
    # Something that a run would write.
    edit(tree / "docs/greedy.md", "99.33 ± 0.32", "99.34 ± 0.32")
    changed = (tree / "docs/greedy.md").read_text()
    for arguments in (["--check"], []):
        assert main(arguments, tree) == 1
        said = capsys.readouterr().err
        assert re.search(message, said) and said.count("\n") == 1, said
    assert (tree / "docs/greedy.md").read_text() == changed


def test_a_last_block_without_an_end() -> None:
    with pytest.raises(MarkError, match=r"P:2: table 'a' has no end: put <!-- end --> behind it"):
        blocks("P", "text\n<!-- table: a -->\n1\n")


def test_marks_in_a_fence_are_text() -> None:
    page = "```\n<!-- table: a -->\n```\n<!-- table: b -->\nold\n<!-- end -->\n"
    assert [b.name for b in blocks("P", page)] == ["b"]
    assert filled("P", page, {"b": "new\nlines"}) == page.replace("old", "new\nlines")


def test_a_missing_result_file_is_named_with_its_table(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "benchmarks/results/hybrid.json").unlink()
    assert main(["--check"], tree) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"hybrid-accuracy: .*hybrid\.json is not there: expected a committed .*\n", said)


def test_a_result_file_without_what_a_table_needs_is_named(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(tree, "digits", lambda content: content.pop("over_seeds"))
    assert main(["--check"], tree) == 1
    said = capsys.readouterr().err
    assert said.startswith("digits: digits.json does not hold what the table needs (KeyError: 'over_seeds')")


def test_a_record_makes_several_tables_and_needs_no_folder(tmp_path: Path) -> None:
    def record(folder: Path) -> dict[str, str]:
        return {
            "kernels": str(folder.relative_to(tmp_path)),
            "times": "" if folder.exists() else "not yet measured",
        }

    made = make(tmp_path, {}, {}, {"gpu": record})
    assert made.tables["gpu-kernels"] == "gpu" and made.tables["gpu-times"] == "not yet measured"
    assert made.sources["gpu-kernels"] == ["gpu/"]

    def refuses(folder: Path) -> dict[str, str]:
        raise ValueError(f"{folder.name} holds a fake record")

    with pytest.raises(NotMade, match="^gpu: gpu holds a fake record$"):
        make(tmp_path, {}, {}, {"gpu": refuses})


def test_a_trial_is_no_measurement(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(tree, "pipeline", lambda content: content.update(tiny=True))
    assert main([], tree) == 1
    assert re.match(r"pipeline-intro: .*it says that it is a trial of the code", capsys.readouterr().err)


def test_plots_that_are_missing_changed_or_nobodys(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tree / "docs/plots"
    (folder / "wire.svg").unlink()
    edit(folder / "text.svg", "#fff", "#000")
    assert main(["--check"], tree) == 1
    said = capsys.readouterr().err
    assert "wire.svg has drifted" in said and "text.svg has drifted" in said and "2 drifted" in said
    assert main([], tree) == 0 and (folder / "wire.svg").is_file()
    (folder / "stray.svg").write_text("<svg/>")
    assert main(["--check"], tree) == 1
    assert "docs/plots/stray.svg: benchmarks/tables/plots.py draws no such plot" in capsys.readouterr().err


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(SystemExit) as status:
        main(["--chekc"])
    assert status.value.code == 2


def test_plots_are_svg_with_a_white_ground_and_nothing_outside() -> None:
    for path in sorted((ROOT / "docs/plots").glob("*.svg")):
        root = ElementTree.fromstring(path.read_text())
        width, height = (float(root.attrib[key]) for key in ("width", "height"))
        assert root[0].tag.endswith("rect") and root[0].attrib["fill"] == "#fff", path.name
        for element in root.iter():
            if element.tag.endswith(("text", "circle")):
                x, y = (float(element.attrib.get(a) or element.attrib[f"c{a}"]) for a in "xy")
                assert 0 <= x <= width and 0 <= y <= height, (path.name, element.attrib)


def test_labels_at_the_right_do_not_touch() -> None:
    moved = apart([100.0, 100.0, 101.0, 400.0, 400.0], chart.HEIGHT - chart.BOTTOM, chart._LABEL_GAP)
    gaps = [b - a for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False)]
    assert min(gaps) >= 14.99 and max(moved) <= chart.HEIGHT - chart.BOTTOM


# What sentences say follows from the figures.


def words(tmp_path: Path, table: str, **files: dict[str, Any]) -> str:
    """A table's text, on one line, from the stored files with some in place of others."""
    shutil.copytree(RESULTS, tmp_path / "results", dirs_exist_ok=True)
    for name, content in files.items():
        (tmp_path / f"results/{name}.json").write_text(json.dumps(content))
    return " ".join(TABLES[table](Results(tmp_path / "results")).split())


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ((-0.05, -0.02, 0.04), ["predicted within 4 %", "too short, by 2 to 5 %", "is met by all 3 rows."]),
        ((0.05, 0.12, -0.11), ["within 11 %", "too long, by 5 to 12 %", "1F1B (1 of 1) and decoupled (1 of 1)"]),
        ((-0.3, 0.02, 0.03), ["within 3 %", "off by -30 to +2 %", "met by 2 of 3 rows, and **not met** by DDP"]),
    ],
)  # fmt: skip
def test_what_the_planner_page_says_of_the_aim(
    errors: tuple[float, ...], said: list[str], tmp_path: Path
) -> None:
    rows = [
        {"kind": kind, "us_p50": 1.0, "predicted_us": 1.0, "prediction_error": error}
        for kind, error in zip(("DDP", "1F1B", "decoupled"), errors, strict=True)
    ]
    text = words(tmp_path, "planner-words", pipeline={"rows": rows})
    assert all(part in text for part in said), text


def test_what_the_readme_says_of_the_pipeline(tmp_path: Path) -> None:
    report = stored("pipeline")
    slow = {"eta_vq": 0.1, "greedy_eta_vq": 0.1}
    assert "coding costs more than sending" in words(tmp_path, "pipeline-words", pipeline=report | slow)
    report |= {
        "eta_vq": 0.99,
        "greedy_eta_vq": 0.99,
        "conv_critic_ratio_to_best_pipeline": 0.8,
        "quiet": False,
    }
    text = words(tmp_path, "pipeline-words", pipeline=report)
    assert "coding gained" in text and "it is faster than a pipeline" in text
    assert "the times mean little" in words(tmp_path, "pipeline-intro", pipeline=report)
    text = words(tmp_path, "pipeline-words", pipeline=report | {"greedy_eta_vq": 0.1})
    assert "coding costs about as much as sending" in text


def test_other_finalists_of_the_pipeline_are_shown_without_a_change_here(tmp_path: Path) -> None:
    report = stored("pipeline")
    for row in report["rows"]:
        if row["kind"] == "1F1B":
            row["screened_only"] = row["microbatches"] != 16
            row["contender"] = row["contender"].replace("1F1B", "1F1B anew")
            row["us_p50"] = 1e3 * row["microbatches"] + (row["format"] == "contiguous")
    report["rows"] = [row for row in report["rows"] if row["kind"] != "two threads"]
    text = words(tmp_path, "pipeline", pipeline=report)
    assert text.count("1F1B anew") == 1 and "1F1B anew, channels_last, 16 microbatches | 16.0 |" in text
    assert "two threads" not in text
    kinds = [row["kind"] for row in pipeline.shown(Results(tmp_path / "results"))]
    assert kinds[:4] == ["backprop", "GPipe", "1F1B", "DDP"] and len(kinds) == len(set(kinds[:4])) + 8


def test_what_the_readme_says_of_codecs(tmp_path: Path) -> None:
    digits, cifar10 = stored("wire_digits"), stored("wire_cifar10")
    for row in digits["rows"]:
        if row["codec"] == "vq:256,8":
            row[wire.POINTS] = {"mean": -2.0, "half_width": 0.5}
    cifar10["rows"] = [
        row for row in cifar10["rows"] if row["method"] == "greedy" and row["codec"] in ("none", "int2")
    ]
    (row,) = (row for row in cifar10["rows"] if row["codec"] == "int2")
    row |= {wire.POINTS: {"mean": -1.12, "half_width": 0.13}, wire.CODED: {"mean": -0.88, "half_width": 0.4}}
    text = words(tmp_path, "wire-words", wire_digits=digits, wire_cifar10=cifar10)
    assert "costs accuracy that five folds of three seeds show (at most 2.5 points, with 95 %)" in text
    assert (
        "`greedy` does best with `int2`, -1.1 (-0.9) at 14.2 times fewer bytes, about 2.2 bits a value."
        in text
    )
    assert "One bit" not in text and "Below 0 with 95 %: `int2` with greedy." in text
    assert "the other rows are one seed" not in words(tmp_path, "wire-cifar10-intro", wire_cifar10=cifar10)
    text = words(tmp_path, "codecs-words", wire_digits=digits)
    assert "on digits no codec but `topk:16` and `vq:256,8` costs anything" in text


def test_vq_is_held_against_what_takes_as_many_bytes(tmp_path: Path) -> None:
    digits, cifar10 = stored("wire_digits"), stored("wire_cifar10")
    rows = {(row["method"], row["codec"]): row for row in digits["rows"]}
    rows["greedy", "vq:256,4"]["points_ahead_of"]["int2"]["plain"] = {"mean": 0.25, "half_width": None}
    # Twice the bytes are not as many.
    rows["greedy", "topk:16"]["times_fewer_bytes"] = 32.0
    cifar10["rows"] = [row for row in cifar10["rows"] if row["codec"] == "none"]
    text = words(tmp_path, "wire-ahead", wire_digits=digits, wire_cifar10=cifar10)
    assert re.search(r"digits \| greedy \| `vq:256,4` \| 15.4 \| `int2` \| 14.2 \| \d+ \| \+0.25 \|", text)
    assert "digits | local-critic | `vq:128,4` | 17.9 | `topk:16` | 16.0 |" in text
    assert "greedy | `vq:128,4` | 17.8 | `topk:16`" not in text and "`vq:256,8`" not in text
    assert "CIFAR-10" not in text
    text = words(tmp_path, "wire-ahead-words", wire_digits=digits, wire_cifar10=cifar10)
    assert "On digits, beside `topk`: +8.31 points, one of one told from 0 with 95 %." in text
    text = words(tmp_path, "wire-ahead-words")
    assert "On CIFAR-10, beside `topk`:" in text and "points, one seed each." in text


def test_drills_that_fail_are_said(tmp_path: Path) -> None:
    report = stored("fault_drills")
    assert "In all of them" in words(tmp_path, "fault-drills-words")
    failed = next(run for run in report["drills"] if run["kind"] == "cut")
    failed["passed"] = False
    report["kinds"]["cut"]["passed"] = 19
    text = words(tmp_path, "fault-drills-words", fault_drills=report)
    assert "In 119 of them" in text and "**Not passed**: 1, of connections cut." in text


def test_aims_of_vq_follow_from_the_times(tmp_path: Path) -> None:
    report = stored("vq_cpu")
    for row in report["rows"]:
        if row["contender"] != "lct_fast":
            row["us_p50"] *= 1.2
    text = words(tmp_path, "vq-words", vq_cpu=report)
    assert "not met" not in text and text.count(" is met (") == 4


def test_paragraphs_do_not_break_code_links_and_percentages() -> None:
    parts = "word " * 22 + "`vq:256,4 vq:128,4`", "and " * 25 + "[a link](of one.md)", "so " * 39 + "10 %"
    for part in parts:
        lines = markdown.paragraph(part, "", "End.").splitlines()
        assert len(lines) == 2 and not any(line.endswith(("4", "a", "of", "10")) for line in lines), lines


def test_rounding_up() -> None:
    assert [markdown.at_most(v) for v in (4.0, 4.01, 0.0)] == ["4", "5", "0"]
    assert [markdown.at_most(v, 0.1) for v in (0.3, 0.31, 5.61)] == ["0.3", "0.4", "5.7"]


def test_a_row_with_a_cell_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 cells, a, b; got 1"):
        markdown.table(["a", "b"], [["1"]])


# What the committed files hold.


def test_figures_rest_on_the_values_beside_them() -> None:
    assert all(row["seeds"] == len(row["values"]) for row in stored("methods")["rows"])
    # Bytes are within a tenth of what the codecs' bits come to.
    assert all(
        row["bytes_over_theory"] < 0.1
        for name in ("digits", "cifar10")
        for row in stored(f"wire_{name}")["rows"]
    )
    for file in sorted(RESULTS.glob("*.json")):
        assert not json.loads(file.read_text()).get("failed_checks"), file.name


def on_page(page: str) -> str:
    return " ".join((ROOT / "docs" / page).read_text().split())


def test_what_the_pages_say_of_cifar10_in_lists() -> None:
    gaps = stored("cifar10")["points_behind_backprop"]
    greedy = [gap for name in ("greedy-pooled", "greedy-conv") for gap in gaps[name].values()]
    local = [gap for name in gaps if name.startswith("local-critic") for gap in gaps[name].values()]
    assert f"stays {min(greedy):.0f} to {max(greedy):.0f} points behind" in on_page("greedy.md")
    longest = max(run["steps"] for run in stored("cifar10")["runs"])
    said = f"{longest:,} steps are the longest above, more than {int(min(local))} points behind"
    assert said in on_page("local_critic.md")


def test_what_the_page_says_of_critics_in_lists() -> None:
    page = on_page("critics.md")
    rows = {row["contender"]: row for row in stored("critics")["screen"]["rows"]}
    pooled = "local-critic-pooled_linear_pool_4"
    half = rows[f"{pooled}-half_sided-1e-3"]["exit_accuracy"]
    for loss in ("one_sided", "mixed_0.9", "mixed_1"):
        (row,) = (r for name, r in rows.items() if name == f"{pooled}-{loss}-1e-3")
        assert max(abs(a - b) for a, b in zip(row["exit_accuracy"], half, strict=True)) < 2.5
    assert "are about two points from it at most" in page
    wide, plain = rows["greedy-mlp_sr_aux"], rows["greedy-pooled_linear_pool_4"]
    times = max(wide["critic_mac_share"]) / max(plain["critic_mac_share"])
    assert f"behind 4x4 pooling at every exit at {times:.0f} times its cost" in page
    assert all(a < b for a, b in zip(wide["exit_accuracy"], plain["exit_accuracy"], strict=True))
    for method, name in (("greedy", ""), ("local-critic", "-half_sided-1e-3")):
        (serial,) = (r for r in rows.values() if r["serial"] and r["method"] == method)
        without = rows[f"{method}-pooled_linear_pool_4{name}"]["exit_accuracy"]
        assert all(a < b for a, b in zip(serial["exit_accuracy"], without, strict=True)), method


def test_what_the_page_says_of_likelihood_ratios_in_lists() -> None:
    file = stored("likelihood_ratio")
    variance = {kind: found["over_antithetic"] for kind, found in file["variance"].items()}
    # "about half the variance of pairs", "Halton's are several times worse" with 64 values.
    assert all(0.4 < found["independent, baseline"] < 0.6 for found in variance.values())
    assert variance["linear"]["sobol, baseline"] < 0.5 < 1 < variance["conv"]["antithetic, sobol"]
    assert variance["conv"]["antithetic, halton"] > 3
    runs = {run["name"]: run["test_accuracy"] for run in file["runs"]}
    full = "logits, mlp, K=2, 32 copies"
    assert abs(runs[full] - runs[f"{full}, signs kept"]) < 0.01
    assert runs["error rate"] < runs["cross-entropy"]


# benchmarks/README.md.


def test_every_result_file_and_every_benchmark_has_its_paragraph() -> None:
    page = (ROOT / "benchmarks/README.md").read_text()
    by_hand = re.sub(r"<!-- table: files -->.*?<!-- end -->", "", page, flags=re.S)
    for file in sorted(RESULTS.glob("*.json")):
        assert f"`{file.name}`" in by_hand, file.name
    sources = sorted((ROOT / "benchmarks").rglob("*.py"))
    programs = [
        p.relative_to(ROOT).with_suffix("") for p in sources if '__name__ == "__main__"' in p.read_text()
    ]
    assert len(programs) > 10
    for program in programs:
        assert ".".join(program.parts).removesuffix(".__main__") in by_hand, program
    for module in re.findall(r"-m (benchmarks[\w.]*\w)", page):
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), module
