"""Sections of the GPU command that take times: aims, what is told, how time is shared. Commands are fakes here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import bench as gpu_bench
from benchmarks.gpu.sections import CUT, Context, SectionFailed
from tests.gpu_helpers import Clock


@pytest.fixture
def with_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "tool", lambda name: f"/bin/{name}")


def row(op: str, backend: str, rival: float | None, **sizes: int) -> dict[str, Any]:
    shape = ",".join(map(str, sizes.values()))
    times = {} if rival is None else {"torch.compile": rival, "torch eager": rival + 1}
    return {"op": op, "shape": shape, "backend": backend, "sizes": sizes, "times_as_fast_as": times}


ROWS = [
    # The best backend reaches 1.5 for few classes.
    row("critic_head", "triton", 1.6, rows=1, classes=10),
    row("critic_head", "cuda", 0.5, rows=1, classes=10),
    row("critic_head", "triton", 1.4, rows=2, classes=128),
    row("critic_head", "", None, rows=2, classes=128),
    row("critic_head", "cuda", 1.1, rows=3, classes=129),
    row("critic_head_wgrad", "cuda", 0.1, rows=4, classes=10),
]


def test_missed_aims_are_those_of_the_best_backend() -> None:
    assert [each["shape"] for each in gpu_bench.misses(ROWS)] == ["2,128"]
    assert gpu_bench.misses([row("vq_encode", "cuda", 1.9, codewords=256)])
    assert not gpu_bench.misses([row("vq_encode", "cuda", 1.9, codewords=1024)])
    assert gpu_bench.misses([row("bn_relu_pool_critic_head", "triton", 1.2, batch=1)])
    assert not gpu_bench.misses([])


def measured(status: int, rows: list[dict[str, Any]]) -> Callable[..., tuple[int, str]]:
    """Stands in for `lct-fast bench` and for ncu."""

    def fake(command: list[str], context: Context, log: str, *_: Any) -> tuple[int, str]:
        if "--out" not in command:
            return 1, "ERR_NVGPUCTRPERM\n"
        Path(command[command.index("--out") + 1]).write_text(
            json.dumps({"rows": rows, "left_out": ["a", "b"]})
        )
        return status, "against the best rival: 1.4x\n"

    return fake


def test_a_benchmark_tells_missed_aims_and_profiles_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tools: None
) -> None:
    monkeypatch.setattr(gpu_bench, "call", measured(0, ROWS))
    found = gpu_bench.bench("critic_head")(Context(tmp_path, 600))
    assert found["missed"] == ["critic_head 2,128: 1.40x"]
    assert found["line"] == "against the best rival: 1.4x; 1 aims missed, 2 shapes left out"
    # Counters that may not be read are no failure.
    assert found["profiles"][0]["said"] == "ERR_NVGPUCTRPERM" and found["profiles"][0]["status"] == 1
    assert found["report"]["rows"] == ROWS


def test_without_ncu_there_is_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "tool", lambda name: None)
    monkeypatch.setattr(gpu_bench, "call", measured(0, ROWS))
    found = gpu_bench.bench("critic_head")(Context(tmp_path, 600))
    assert [each["said"] for each in found["profiles"]] == ["ncu is not installed"]


def test_a_benchmark_with_a_wrong_output_fails_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_bench, "call", measured(1, ROWS))
    with pytest.raises(SectionFailed, match="status 1: against the best rival") as failure:
        gpu_bench.bench("vq")(Context(tmp_path, 600))
    assert failure.value.found["report"]["rows"] == ROWS


def test_a_benchmark_that_is_cut_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "call", measured(CUT, ROWS))
    with pytest.raises(SectionFailed, match="cut after 6 rows; give a larger --budget") as failure:
        gpu_bench.bench("vq")(Context(tmp_path, 600))
    assert failure.value.found["report"]["rows"] == ROWS


def test_a_graph_s_time_does_not_count_where_a_rival_has_none() -> None:
    """The rival that no graph captures may be the best there is."""
    with_graphs = row("critic_head", "triton", 3.0, rows=1, classes=10)
    without = row("critic_head", "triton", 1.2, rows=1, classes=10)
    other = row("critic_head", "cuda", 1.3, rows=1, classes=10)
    assert gpu_bench.best_rows([with_graphs, without]) == [without]
    assert gpu_bench.best_rows([with_graphs, without, other]) == [other]


@pytest.mark.parametrize("fake", [False, True])
def test_what_is_measured_and_where(fake: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def note(command: list[str], *_: Any) -> tuple[int, str]:
        commands.append(command)
        return 0, "said\n"

    monkeypatch.setattr(gpu_bench, "call", note)
    gpu_bench.bench("vq")(Context(tmp_path, 400, Clock(), fake=fake))
    (command,) = commands
    assert command[3:6] == ["vq_encode", "vq_decode", "vq_update"]
    assert command[command.index("--budget") + 1] == "300"
    assert command[command.index("--device") + 1] == ("cpu" if fake else "cuda")
    assert ("--trial" in command) is fake and ("--rivals" in command) is not fake
