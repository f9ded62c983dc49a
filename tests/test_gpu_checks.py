"""Sections of the GPU command that check: what they run and how they judge it. Commands are fakes here."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu.host import environ
from benchmarks.gpu.sections import CUT, Context, SectionFailed
from tests.gpu_helpers import Clock

ROOT = Path(__file__).parents[1]


JUNIT = """<testsuites><testsuite>
<testcase classname="t" name="good"/>
<testcase classname="t" name="bad"><failure message="x"/></testcase>
<testcase classname="t" name="worse"><error message="x"/></testcase>
<testcase classname="t" name="absent"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


GOOD = '<testsuites><testsuite><testcase classname="t" name="good"/></testsuite></testsuites>'


def write_reports(context: Context, status: int, xml: str) -> Callable[..., tuple[int, str]]:
    def fake(command: list[str], *_: Any) -> tuple[int, str]:
        report = next(word.removeprefix("--junitxml=") for word in command if word.startswith("--junitxml="))
        if xml:
            Path(report).write_text(xml)
        return status, "the last words\n"

    return fake


@pytest.mark.parametrize(
    ("status", "xml", "says"),
    [
        (1, JUNIT, "1 passed, 2 failed, 1 skipped, first t::bad"),
        (4, "", "pytest ended with status 4: the last words"),
        (124, "", "pytest ended with status 124"),
        # A crash after a failure: the failure is named.
        (124, JUNIT, "first t::bad"),
        (2, GOOD, "1 passed, 0 failed, 0 skipped; no time for the others"),
        (2, "", "pytest ended with status 2"),
        (5, "<testsuites/>", "no test ran: the last words"),
    ],
)
def test_correctness_fails_on_failures_crashes_and_nothing_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, xml: str, says: str
) -> None:
    context = Context(tmp_path, 60)
    monkeypatch.setattr(gpu_checks, "call", write_reports(context, status, xml))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(SectionFailed) as failure:
        gpu_checks.correctness(context)
    assert says in str(failure.value)


def test_correctness_passes_when_tests_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(tmp_path, 60)
    good = '<testsuites><testsuite><testcase classname="t" name="good"/></testsuite></testsuites>'
    monkeypatch.setattr(gpu_checks, "call", write_reports(context, 0, good))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    found = gpu_checks.correctness(context)
    assert found["shards"] == 2 and found["passed"] == 2


@pytest.fixture
def with_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "tool", lambda name: f"/bin/{name}")


EXERCISES = [("critic_head", "cuda"), ("critic_head", "triton"), ("bn_relu_pool", "triton")]


def test_the_sanitizer_reports_each_op_and_fails_on_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tools: None
) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], context: Context, log: str, *_: Any) -> tuple[int, str]:
        commands.append(command)
        bad = log == "racecheck-critic_head-triton.log"
        return (9, "RACECHECK SUMMARY: 1 hazard\n") if bad else (0, "ERROR SUMMARY: 0 errors\n")

    monkeypatch.setattr(gpu_checks, "call", fake)
    monkeypatch.setattr(gpu_checks, "exercises", lambda fake: EXERCISES)
    with pytest.raises(
        SectionFailed, match="racecheck critic_head triton: RACECHECK SUMMARY: 1 hazard"
    ) as failure:
        gpu_checks.sanitizer(Context(tmp_path, 60))
    found = failure.value.found
    assert found["memcheck bn_relu_pool triton"] == {"status": 0, "summary": "ERROR SUMMARY: 0 errors"}
    assert found["sanitizer"] == "/bin/compute-sanitizer" and found["line"] == "5 of 6 clean"
    few = [command for command in commands if "--few" in command]
    assert len(few) == 3 and all("racecheck" in command for command in few)


def test_the_sanitizer_says_what_it_had_no_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tools: None
) -> None:
    clock = Clock()

    def fake(command: list[str], *_: Any) -> tuple[int, str]:
        clock.now += 30
        return 0, "ERROR SUMMARY: 0 errors\n"

    monkeypatch.setattr(gpu_checks, "call", fake)
    monkeypatch.setattr(gpu_checks, "exercises", lambda fake: EXERCISES)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(SectionFailed, match="no time for memcheck bn_relu_pool triton, racecheck") as failure:
        gpu_checks.sanitizer(Context(tmp_path, 60, clock))
    assert failure.value.found["line"] == "2 of 6 clean"
    assert failure.value.found["racecheck critic_head cuda"]["status"] == CUT


def test_a_fault_outweighs_what_had_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tools: None
) -> None:
    statuses = {"memcheck-critic_head-triton.log": 9, "racecheck-critic_head-cuda.log": CUT}
    monkeypatch.setattr(
        gpu_checks, "call", lambda command, context, log, *_: (statuses.get(log, 0), "x SUMMARY")
    )
    monkeypatch.setattr(gpu_checks, "exercises", lambda fake: EXERCISES)
    with pytest.raises(SectionFailed, match="^memcheck critic_head triton: x SUMMARY$") as failure:
        gpu_checks.sanitizer(Context(tmp_path, 60))
    assert failure.value.found["line"] == "4 of 6 clean"


def test_a_fake_device_is_watched_by_nothing_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], *_: Any) -> tuple[int, str]:
        commands.append(command)
        return 0, "after (1, 1, 1)\n"

    monkeypatch.setattr(gpu_checks, "call", fake)
    monkeypatch.setattr(gpu_checks, "tool", lambda name: None)
    found = gpu_checks.sanitizer(Context(tmp_path, 60, fake=True))
    assert found["sanitizer"] is None and "without a sanitizer, which checks nothing" in found["line"]
    assert len(commands) == len(gpu_checks.FAKE_EXERCISES) == len(gpu_checks.exercises(True))
    assert all(command[3:] == ["cpu", "cpu", "--few"] for command in commands)


def test_every_op_is_exercised_on_every_backend_it_has() -> None:
    found = gpu_checks.exercises()
    assert {("critic_head", "cuda"), ("critic_head", "triton"), ("bn_relu_pool", "triton")} <= set(found)
    assert ("block_quantize", "cuda") in found and ("block_quantize", "triton") not in found
    for stem, backend in found:
        assert backend in ("cuda", "triton") and (ROOT / f"tests/ops/{stem}_exercise.py").is_file()


def test_a_missing_sanitizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "tool", lambda name: None)
    with pytest.raises(SectionFailed, match="compute-sanitizer is not on the PATH"):
        gpu_checks.sanitizer(Context(tmp_path, 60))


def commands_of_a_build(monkeypatch: pytest.MonkeyPatch, **statuses: int) -> list[str]:
    """Stands in for pip, setup.py and the probe on an H200; the names of what was called, in order."""
    called: list[str] = []

    def fake(command: list[str], context: Context, log: str, env: dict[str, str], *_: Any) -> tuple[int, str]:
        name = log.removeprefix("build-").removesuffix(".log")
        called.append(name)
        if name != "probe":
            assert env["LCT_CUDA"] == "1" and env["LCT_CUDA_ARCHS"] == "90a"
        info = '{"cuda": true, "compiler": "13.0"}' if name == "probe" else f"{name} said"
        return statuses.get(name.removesuffix(".py"), 0), f"first\n{info}\n"

    monkeypatch.setattr(gpu_checks, "call", fake)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_checks, "put_kernels_in", lambda root: called.append("kernels"))
    return called


def test_the_build_is_pip_s_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = commands_of_a_build(monkeypatch)
    found = gpu_checks.build(Context(tmp_path, 60))
    assert called == ["pip", "probe"] and found["line"] == "sm_90a, 13.0" and "pip_said" not in found


def test_without_pip_the_tree_itself_is_made_importable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = commands_of_a_build(monkeypatch, pip=1)
    found = gpu_checks.build(Context(tmp_path, 60))
    assert called == ["pip", "setup.py", "kernels", "probe"]
    assert found["pip_said"] == "first\npip said\n" and found["setup.py"] == 0


def test_a_build_that_fails_twice_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = commands_of_a_build(monkeypatch, pip=1, setup=1)
    with pytest.raises(SectionFailed, match="neither pip nor setup.py builds it: setup.py said") as failure:
        gpu_checks.build(Context(tmp_path, 60))
    assert called == ["pip", "setup.py"] and failure.value.found["setup.py"] == 1


@pytest.mark.parametrize(
    ("status", "said", "says"),
    [
        (1, "ModuleNotFoundError: no", "does not import after the build: ModuleNotFoundError: no"),
        (0, '{"absent": "not built"}', "^not built$"),
        (0, '{"cuda": false}', "has no CUDA kernels"),
    ],
)
def test_a_module_that_is_of_no_use_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, said: str, says: str
) -> None:
    monkeypatch.setattr(gpu_checks, "_compile", lambda context: {"archs": "90a"})
    monkeypatch.setattr(gpu_checks, "call", lambda *_: (status, said))
    with pytest.raises(SectionFailed, match=says):
        gpu_checks.build(Context(tmp_path, 60))


def test_kernels_become_a_part_of_the_package(tmp_path: Path) -> None:
    for folder in ("lct_fast", "kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels" / "vq.py").write_text("")
    for _ in range(2):
        gpu_checks.put_kernels_in(tmp_path)
    assert (tmp_path / "lct_fast" / "kernels" / "vq.py").is_file()


def test_commands_choose_their_own_backend_and_a_fake_device_hides_true_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCT_BACKEND", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    env = environ(Context(tmp_path, 1), OMP_NUM_THREADS="1")
    assert "LCT_BACKEND" not in env and "TRITON_INTERPRET" not in env and env["OMP_NUM_THREADS"] == "1"
    assert env["CUDA_VISIBLE_DEVICES"] == "3" and env["PATH"].endswith("/usr/local/cuda/bin")
    assert environ(Context(tmp_path, 1, fake=True))["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.slow
def test_pytest_ends_by_itself_when_its_time_is_up(tmp_path: Path) -> None:
    """With a report of what it ran, and what runs on a device first."""
    body = "import pytest, time\n@pytest.mark.parametrize('place', ['cpu-cpu', 'triton-cuda'])\n"
    body += "def test_one(place):\n    time.sleep(0.4)\n"
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_made.py").write_text(body)
    (tmp_path / "pytest.ini").write_text(gpu_checks.PYTEST_INI)
    outcomes = {}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for seconds in ("0.2", "60"):
        report = tmp_path / f"{seconds}.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            "pytest.ini",
            f"--seconds={seconds}",
            f"--junitxml={report}",
        ]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        names = [case.get("name") for case in ElementTree.parse(report).getroot().iter("testcase")]
        outcomes[seconds] = done.returncode, names
    assert outcomes["0.2"] == (2, ["test_one[triton-cuda]"])
    assert outcomes["60"] == (0, ["test_one[triton-cuda]", "test_one[cpu-cpu]"])
