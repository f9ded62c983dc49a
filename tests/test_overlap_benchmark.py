"""The benchmark of streams, on the CPU: what it runs, checks and writes; there are no streams to time here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overlap
from benchmarks.gpu import bench as gpu_bench
from benchmarks.gpu.sections import CUT, Context, SectionFailed
from benchmarks.overlap import TRIAL as SMALL
from benchmarks.overlap import Task
from lct_fast.engine.cuda import streams


@pytest.mark.slow
def test_it_writes_figures_and_traces_for_every_number_of_groups(
    tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert overlap.main(["--out", str(tmp_path), "--groups", "2,4", "--budget", "1", "--trial"]) == 0
    report = json.loads((tmp_path / "overlap.json").read_text())
    assert [row["groups"] for row in report["rows"]] == [2, 4]
    for row in report["rows"]:
        assert set(row["step_us"]) == {"plain, compiled", "decoupled"}
        assert row["step_us"]["decoupled"]["samples"] >= 1 and row["against_plain"] > 0
        # Not measured where there is no device, and not made up.
        assert row["exposed_copy"] is None and row["launch_gaps"] is None
        assert row["eager_because"] == [
            f"no CUDA graphs for group {', '.join(str(k + 1) for k in range(row['groups']))}: it runs on the cpu"
        ]
        trace = json.loads((tmp_path / f"overlap-{row['groups']}.trace.json").read_text())
        assert trace["traceEvents"]
    assert "launch gaps not measured" in capsys.readouterr().out


def test_another_computation_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(task: Task) -> None:
        raise AssertionError("tensors are not close")

    monkeypatch.setattr(overlap, "check", wrong)
    assert overlap.main(["--out", str(tmp_path), "--groups", "2"], SMALL) == 1
    assert "2 groups: not what lockstep computes" in capsys.readouterr().err
    assert not (tmp_path / "overlap.json").exists()


def test_the_check_sees_another_computation(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    trainer = Task.trainer

    def spoilt(self: Task, schedule: str = "pipelined", graphs: bool | None = None) -> Any:
        made = trainer(self, schedule, graphs)
        if schedule == "pipelined":
            made.set_learning_rate(1.0)
        return made

    monkeypatch.setattr(Task, "trainer", spoilt)
    with pytest.raises(AssertionError, match="not close"):
        overlap.check(SMALL, 4)


def test_idle_time_is_what_no_stream_covers() -> None:
    assert overlap.idle([]) is None
    assert overlap.idle([(0, 4), (1, 2), (3, 6), (8, 10)]) == pytest.approx(0.2)
    assert overlap.idle([(5, 5)]) == 0.0


def test_sampling_stops_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(overlap.time, "monotonic", lambda: now[0])

    def step() -> None:
        now[0] += 1

    task = Task(device="cpu", steps=1, samples=30, least=2)
    assert [len(v) for v in overlap.sample(task, {"a": step, "b": step}, 3).values()] == [2, 2]
    assert [len(v) for v in overlap.sample(task, {"a": step}, 8).values()] == [9]


def test_nothing_copied_means_once_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Tensor] = []
    monkeypatch.setattr(streams.CudaDevice, "copy", lambda self, target, *_: copied.append(target))
    device, slots = overlap.Uncopied(torch.device("cuda", 0)), [torch.zeros(2), torch.zeros(2)]
    for _ in range(3):
        for slot in slots:
            device.copy(slot, torch.ones(2), None)
    assert [t.data_ptr() for t in copied] == [t.data_ptr() for t in slots]


def row(**values: float | None) -> dict[str, Any]:
    return {"groups": 2, "against_plain": 1.1, "exposed_copy": 0.01, "launch_gaps": 0.02} | values


def measured(status: int, rows: list[dict[str, Any]]) -> Callable[..., tuple[int, str]]:
    def fake(command: list[str], *_: Any) -> tuple[int, str]:
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(exist_ok=True)
        (folder / "overlap.json").write_text(json.dumps({"rows": rows}))
        return status, "first\nthe last words\n"

    return fake


def test_the_section_tells_missed_aims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(), row(exposed_copy=0.2), row(launch_gaps=None)]
    monkeypatch.setattr(gpu_bench, "call", measured(0, rows))
    found = gpu_bench.overlap(Context(tmp_path, 100))
    assert found["line"] == "the last words" and found["report"]["rows"] == rows
    assert found["missed"] == [
        "2 groups, exposed_copy: 0.2, aim 0.03",
        "2 groups, launch_gaps: None, aim 0.05",
    ]


def test_the_section_fails_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "call", measured(1, []))
    with pytest.raises(SectionFailed, match="status 1: the last words"):
        gpu_bench.overlap(Context(tmp_path, 100))


def test_the_section_keeps_what_was_measured_before_its_time_was_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_bench, "call", measured(CUT, [row()]))
    with pytest.raises(SectionFailed, match="cut after 1 numbers of groups") as failure:
        gpu_bench.overlap(Context(tmp_path, 100))
    assert failure.value.found["report"]["rows"] == [row()]
