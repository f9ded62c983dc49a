"""Tables of a GPU record. What a whole record becomes is tested with the fake device, in test_gpu_fake."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import command as gpu
from benchmarks.gpu import table as gpu_table
from benchmarks.gpu.table import NONE, tables

FACTS = {"device": "some device", "torch": "1", "triton": "2", "cuda": "3", "python": "4", "commit": None}


def record(folder: Path, section: str, found: dict[str, Any], **more: Any) -> None:
    whole = {
        "section": section,
        **FACTS,
        "sources": "abc",
        "fake": False,
        "status": "passed",
        "seconds": 12.4,
    }
    whole |= {"error": "", "found": found} | more
    folder.mkdir(exist_ok=True)
    (folder / f"{section}.json").write_text(json.dumps(whole))


def row(backend: str, us: float, rivals: dict[str, float], **more: Any) -> dict[str, Any]:
    """A row of critic_head; rivals: microseconds of each."""
    times = {name: rival / us for name, rival in rivals.items()}
    known = {
        "op": "critic_head",
        "shape": "8,16,10,bf16",
        "contender": "lct_fast" if backend else "torch eager",
    }
    known |= {"backend": backend, "us_p50": us, "us_p20": us - 1, "us_p80": us + 1, "graphs": True}
    return known | {"share_of_roofline": 0.625, "times_as_fast_as": times, "failed": "", "skipped": ""} | more


def test_what_is_not_there_was_not_measured(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        found = tables(folder)
        assert set(found) == {"environment", "sections", "kernels", "overlap", "cifar10"}
        lines = found["sections"].splitlines()
        assert [line.split(" | ")[1] for line in lines[2:]] == [NONE] * len(gpu.SECTIONS)
        for name in ("environment", "kernels", "overlap", "cifar10"):
            assert found[name].count("\n") == 2 and found[name].splitlines()[2].startswith(f"| {NONE} |")


def test_the_best_kernel_stands_beside_its_best_rival(tmp_path: Path) -> None:
    rows = [
        row("triton", 20, {"torch eager": 90, "torch.compile": 30}),
        row("cuda", 40, {"torch eager": 90, "torch.compile": 30}),
        row("", 90, {}),
    ]
    record(tmp_path, "critic_head", {"report": {"rows": rows}})
    lines = tables(tmp_path)["kernels"].splitlines()
    assert lines[2:] == [
        "| `critic_head` | 8,16,10,bf16 | triton | 0.02 | 0.019 | 0.021 | torch.compile, 0.03 | 1.50x | 62% |"
    ]


def test_times_without_graphs_say_so(tmp_path: Path) -> None:
    rows = [
        row("triton", 20, {"torch eager": 90}),
        row("triton", 25, {"torch eager": 95, "liger": 30}, graphs=False),
    ]
    record(tmp_path, "critic_head", {"report": {"rows": rows}})
    (line,) = tables(tmp_path)["kernels"].splitlines()[2:]
    assert "| triton, without graphs | 0.025 |" in line and "| liger, 0.03 | 1.20x |" in line


def test_a_wrong_kernel_stands_in_the_table(tmp_path: Path) -> None:
    wrong = row("cuda", 1, {}, us_p50=None, failed="WrongOutput: dh is off", times_as_fast_as={})
    record(tmp_path, "critic_head", {"report": {"rows": [wrong]}}, status="failed", error="status 1")
    found = tables(tmp_path)
    assert "| `critic_head` | 8,16,10,bf16 | cuda | wrong: WrongOutput: dh is off |" in found["kernels"]
    assert "| `critic_head` | failed | 12 | status 1 |" in found["sections"]


def test_shares_that_were_not_measured_are_not_made_up(tmp_path: Path) -> None:
    measured = {
        "groups": 4, "step_us": {"decoupled": {"p50": 1234.5}}, "against_plain": 1.0625, "exposed_copy": 0.012,
        "exposed_copy_through_pinned_memory": 0.5, "launch_gaps": None,
    }  # fmt: skip
    record(tmp_path, "overlap", {"report": {"rows": [measured]}})
    assert (
        tables(tmp_path)["overlap"].splitlines()[2] == "| 4 | 1.234 | 1.062 | 1.2% | 50.0% | not measured |"
    )


def test_training_runs(tmp_path: Path) -> None:
    run = {"method": "greedy", "epochs": 5, "test_accuracy": 0.81234, "exit_test_accuracy": [0.5, 0.81234]}
    run |= {"seconds": 61.2, "step_seconds_median": 0.0123}
    record(tmp_path, "cifar10", {"runs": [run, run | {"step_seconds_median": None}]})
    lines = tables(tmp_path)["cifar10"].splitlines()[2:]
    assert lines[0] == "| greedy | 5 | 81.23 | 50.00 81.23 | 61 | 12.3 |"
    assert lines[1].endswith("| not measured |")


def test_records_of_two_machines_are_two_rows(tmp_path: Path) -> None:
    for section, device in (("vq", "one"), ("perturb", "one"), ("overlap", "two")):
        record(tmp_path, section, {}, device=device)
    lines = tables(tmp_path)["environment"].splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| one", "| two"]
    assert "not known" in lines[0] and "abc" in lines[0]


def test_what_a_section_says_keeps_to_its_cell(tmp_path: Path) -> None:
    record(tmp_path, "build", {}, status="failed", error="a | b\nc" + "x" * 300)
    (line,) = (each for each in tables(tmp_path)["sections"].splitlines() if "`build`" in each)
    assert "a \\| b cx" in line and line.endswith("x… |") and len(line) < 240


def test_a_fake_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "vq", {"report": {"rows": []}})
    record(tmp_path, "build", {}, fake=True)
    with pytest.raises(ValueError, match=r"holds a fake record \(build\), which says nothing of a device"):
        tables(tmp_path)
    assert "build" in tables(tmp_path, allow_fake=True)["sections"]
    assert gpu_table.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.gpu.table: ")


def test_the_committed_record_is_no_fake(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_table.main([]) == 0
    printed = capsys.readouterr().out
    assert [name for name in tables() if f"{name}:\n\n| " in printed] == list(tables())
