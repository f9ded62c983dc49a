"""``lct-fast bench`` as called from the command line, and the pytest-benchmark suite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lct_fast import ops
from lct_fast.bench import cases, roofline
from lct_fast.cli import main

ROOT = Path(__file__).parents[2]
SMALL = ["critic_head", "--shape", "32,8,10,f32", "--samples", "7", "--threads", "1"]
REPORT = {
    "benchmark", "command", "device", "cpu", "cores", "threads", "instruction_set", "huge_pages", "versions",
    "commit", "samples", "trial", "roofline", "missing_rivals", "left_out", "failed_checks", "rows",
    "foreign_cpu_share", "quiet",
}  # fmt: skip
ROW = {
    "op", "shape", "sizes", "dtype", "bytes", "flops", "contender", "backend", "failed", "skipped", "us_p20",
    "us_p50", "us_p80", "samples", "undisturbed", "graphs", "share_of_roofline", "error", "error_of_rule",
    "peak_bytes", "times_as_fast_as",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets for its process is undone."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_a_report_has_all_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "x.json"
    assert main(["bench", *SMALL, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found) == REPORT and found["threads"] == 1 and found["failed_checks"] == []
    assert set(found["roofline"]) == {"copy_bytes_per_s", "flops_per_s_float32", "flops_per_s_bfloat16"}
    for row in found["rows"]:
        assert set(row) == ROW and row["failed"] == "" and row["samples"] == 7 and row["us_p50"] > 0
        assert row["sizes"] == {"rows": 32, "depth": 8, "classes": 10, "dtype": "f32"}
    first, *rest = found["rows"]
    assert (first["contender"], first["backend"]) == ("lct_fast", "cpu")
    assert set(first["times_as_fast_as"]) == {row["contender"] for row in rest}
    printed = capsys.readouterr().out
    assert (
        printed.count("32,8,10,f32") == len(found["rows"]) and "critic_head cpu" in printed.splitlines()[-1]
    )


def test_a_trial_takes_a_tiny_shape_of_every_op_and_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "SIZES", {})
    assert main(["bench", "critic_head", "vq", "--trial", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trial"] is True and found["samples"] == 7
    tiny = {(bench.name, bench.tiny) for bench in cases.find(["critic_head", "vq"])}
    assert {(row["op"], row["shape"]) for row in found["rows"]} == tiny and len(tiny) > 3
    assert {row["contender"] for row in found["rows"]} == {"lct_fast", "torch eager"}


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--json", "--backend", "reference"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["backend"] for row in found["rows"]} == {"reference", ""}


def test_a_wrong_output_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = ops.critic_head
    monkeypatch.setattr(ops, "critic_head", lambda *given: true(*given)._replace(dh=given[0]))
    assert main(["bench", *SMALL]) == 1
    (said,) = (each for each in capsys.readouterr().out.splitlines() if "lct_fast" in each)
    assert "FAILED: WrongOutput: dh is off" in said and " us " not in said


def test_missing_rivals_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lct_fast.bench.rivals.installed", lambda module: False)
    monkeypatch.setattr("lct_fast.bench.cases.vq.installed", lambda module: False)
    words = ["vq_encode", "--shape", "70,1,4,16,f32,uniform", "--samples", "7", "--rivals"]
    assert main(["bench", *words]) == 0
    said = capsys.readouterr().err
    assert "faiss-cpu is not installed; pip install 'lct-fast[rivals]'" in said
    assert "vector-quantize-pytorch is not installed" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["critichead"], "no benchmark named 'critichead'; there are "),
        (["critic_head", "--shape", "1,2"], "a shape of critic_head is rows,depth,classes,f32|bf16|f16"),
        (["bn_relu_pool", "--shape", "4,3,5,4,2,f32,last"], "pool has to divide height and width"),
        (["critic_head", "--samples", "6"], "--samples must be at least 7 on cpu to say anything, got 6"),
        ([*SMALL, "--trial"], "--trial has shapes of its own; leave out --shape, or --trial"),
        (["critic_head", "--threads", "0"], "--threads must be at least 1, got 0"),
        ([*SMALL, "--backend", "cuda"], "no backend of critic_head can be measured on cpu: cuda: "),
        (["critic_head", "--out", "."], "--out must be a file to write, got the folder ."),
    ],
)
def test_refusals(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lct-fast bench: ") and says in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_no_device_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--device", "cuda", *SMALL, "--samples", "30"]) == 2
    assert "--device cuda: no CUDA device" in capsys.readouterr().err


def test_it_runs_with_little_more_than_torch() -> None:
    """A GPU machine without network may lack what other commands need."""
    code = (
        "import sys, runpy\n"
        "for name in ('tqdm', 'yaml', 'safetensors', 'sklearn', 'matplotlib', 'PIL'): sys.modules[name] = None\n"
        "sys.argv = ['bench', 'nothing']\n"
        "runpy.run_module('lct_fast.cli.bench', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("lct-fast bench: no benchmark named 'nothing'")


@pytest.mark.slow
def test_the_suite_runs_over_every_op() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/bench_ops.py",
        "--tiny",
        "-q",
        "-rA",
        "-k",
        "not compile",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
    for bench in cases.find([]):
        for who in ("lct_fast", "torch eager"):
            assert f"PASSED benchmarks/bench_ops.py::test_op[{bench.name} {bench.tiny}-{who}" in done.stdout
