"""The whole GPU command on the CPU, in a device's place: every section, its record, the table, and a run cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import command as gpu
from benchmarks.gpu import table as gpu_table
from tests.gpu_helpers import runs

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "benchmarks.gpu", "--fake"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_section_runs_and_is_recorded_and_becomes_a_table(tmp_path: Path) -> None:
    out = tmp_path / "fake"
    command = [*COMMAND, "--out", str(out), "--budget", "2400"]
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=ENV, stdout=log, stderr=log, timeout=850)
    lines = (tmp_path / "log").read_text().splitlines()
    names = [section.name for section in gpu.SECTIONS]
    assert done.returncode == 0, "\n".join(lines)

    # The table is the last that is printed: a line a section.
    assert [line.split()[:2] for line in lines[-len(names) :]] == [[name, "passed"] for name in names]
    assert lines[0].startswith("fake: the CPU stands in for a device")
    assert [record["section"] for record in read(out / "summary.json")] == names

    records = {name: read(out / f"{name}.json") for name in names}
    for record in records.values():
        assert record["fake"] is True and record["device"].endswith("in a device's place")
        assert (
            record["status"] == "passed" and record["torch"] and record["sources"] and record["seconds"] > 0
        )
    found = {name: record["found"] for name, record in records.items()}
    assert found["environment"]["packages"]["torch"] and "capability" not in found["environment"]
    assert "compiler" in found["build"]["build_info"]
    assert found["correctness"]["passed"] > 20 and found["correctness"]["failed"] == 0
    for stem in ("vq", "critic_head"):
        rows = found[stem]["report"]["rows"]
        assert {row["contender"] for row in rows} == {"lct_fast", "torch eager"}
        assert found[stem]["report"]["trial"] is True and all(row["us_p50"] > 0 for row in rows)
    assert [row["groups"] for row in found["overlap"]["report"]["rows"]] == [2, 4]
    assert [run["method"] for run in found["cifar10"]["runs"]] == ["local-critic", "greedy", "backprop"]
    for run in found["cifar10"]["runs"]:
        exits = 1 if run["method"] == "backprop" else 4
        assert len(run["exit_test_accuracy"]) == exits and run["seconds"] > 0 and run["versions"]["torch"]
    assert found["sanitizer"]["sanitizer"] is None and "checks nothing" in found["sanitizer"]["line"]

    with pytest.raises(ValueError, match="fake record"):
        gpu_table.tables(out)
    tables = gpu_table.tables(out, allow_fake=True)
    assert gpu_table.NONE not in "".join(tables.values())
    for row in found["critic_head"]["report"]["rows"]:
        assert f"| `{row['op']}` | {row['shape']} | cpu |" in tables["kernels"]
    for run in found["cifar10"]["runs"]:
        assert f"| {run['method']} | 1 | {100 * run['test_accuracy']:.2f} |" in tables["cifar10"]


def children(process: int) -> list[int]:
    """The process and all that come of it."""
    found = [process]
    for tasks in Path(f"/proc/{process}/task").glob("*/children"):
        for child in tasks.read_text().split():
            found += children(int(child))
    return found


def begun(out: Path, log: str) -> subprocess.Popen[bytes]:
    """The command in the middle of a section, the one that writes this log."""
    process = subprocess.Popen(
        [*COMMAND, "--out", str(out), "--sections", "environment,build,vq,sanitizer"],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (out / log).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_loses_the_section_in_flight_alone(tmp_path: Path, how: signal.Signals) -> None:
    process = begun(tmp_path, "bench-vq.log")
    everyone = children(process.pid)
    try:
        process.send_signal(how)
        status = process.wait(60)
    finally:
        # Killed, the command cannot end what it started.
        for each in everyone if how == signal.SIGKILL else [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    assert status == (-signal.SIGKILL if how == signal.SIGKILL else 128 + signal.SIGTERM)
    # Told to end, the command takes what it started with it.
    assert [each for each in everyone[1:] if runs(each)] == []
    for name in ("environment", "build"):
        assert read(tmp_path / f"{name}.json")["status"] == "passed"
    assert not (tmp_path / "vq.json").exists() and not (tmp_path / "sanitizer.json").exists()
    assert [record["section"] for record in read(tmp_path / "summary.json")] == ["environment", "build"]
    # What is there is a record that can be read.
    assert "| `vq` | not yet measured |" in gpu_table.tables(tmp_path, allow_fake=True)["sections"]
