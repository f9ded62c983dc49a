"""The runner of `python -m benchmarks.gpu`: order, budget, failures, exit status. Sections are fakes here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu, sections
from benchmarks.sections import Context, Section, SectionFailed, call, run_sections
from tests.conftest import pytest_collection_modifyitems

ROOT = Path(__file__).parents[1]


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def passing(name: str, log: list[str], seconds: float = 0.0, clock: Clock | None = None) -> Section:
    def run(context: Context) -> dict[str, Any]:
        log.append(name)
        if clock:
            clock.now += seconds
        return {"line": f"{name} is fine", "answer": 42}

    return Section(name, f"about {name}", run, least_s=5)


def failing(name: str, error: Exception) -> Section:
    def run(context: Context) -> dict[str, Any]:
        raise error

    return Section(name, f"about {name}", run)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_section_is_written_and_the_table_comes_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []
    status = run_sections([passing("one", log), passing("two", log)], Context(tmp_path / "new", 60))
    assert status == 0 and log == ["one", "two"]
    record = read(tmp_path / "new" / "one.json")
    assert record["section"] == "one" and record["status"] == "passed" and record["found"]["answer"] == 42
    assert [r["section"] for r in read(tmp_path / "new" / "summary.json")] == ["one", "two"]
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].split() == ["one", "passed", "0.0", "s", "one", "is", "fine"]
    assert last[1].startswith("two  passed")


def test_a_section_is_written_as_it_ends(tmp_path: Path) -> None:
    def look(context: Context) -> dict[str, Any]:
        return {"seen": read(context.out / "one.json")["status"]}

    run_sections([passing("one", []), Section("two", "", look)], Context(tmp_path, 60))
    assert read(tmp_path / "two.json")["found"] == {"seen": "passed"}


@pytest.mark.parametrize(
    ("error", "said", "found"),
    [
        (SectionFailed("3 tests failed", {"failed": 3}), "3 tests failed", {"failed": 3}),
        (KeyError("gone"), "KeyError: 'gone'", {}),
    ],
)
def test_a_failure_is_recorded_and_the_next_section_runs(
    tmp_path: Path, error: Exception, said: str, found: dict[str, Any]
) -> None:
    log: list[str] = []
    status = run_sections([failing("bad", error), passing("good", log)], Context(tmp_path, 60))
    assert status == 1 and log == ["good"]
    record = read(tmp_path / "bad.json")
    assert (record["status"], record["error"], record["found"]) == ("failed", said, found)
    assert read(tmp_path / "good.json")["status"] == "passed"


def test_what_the_budget_does_not_cover_is_not_run_and_says_so(tmp_path: Path) -> None:
    clock, log = Clock(), list[str]()
    chosen = [passing("long", log, 58, clock), passing("late", log), failing("never", ValueError())]
    status = run_sections(chosen, Context(tmp_path, 60, clock))
    assert status == 1 and log == ["long"]
    assert read(tmp_path / "long.json")["seconds"] == 58
    record = read(tmp_path / "late.json")
    assert record["status"] == "not run"
    assert record["error"] == "2 s left of 60; give a larger --budget"


def test_a_command_is_cut_at_the_budget_and_its_output_kept(tmp_path: Path) -> None:
    context = Context(tmp_path, 1.0)
    code = "import time; print('began', flush=True); time.sleep(60)"
    status, text = call([sys.executable, "-c", code], context, "x.log", os.environ, tmp_path)
    assert status == 124 and text == "began\n"
    assert (tmp_path / "x.log").read_text() == "began\n"


def test_a_command_s_status_and_both_streams_come_back(tmp_path: Path) -> None:
    code = "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)"
    done = call([sys.executable, "-c", code], Context(tmp_path, 30), "x.log", os.environ, tmp_path)
    assert done == (3, "out\nerr\n")


@pytest.fixture
def with_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "no_device", lambda: "")


def test_sections_are_chosen_by_name_and_keep_their_order(with_device: None, tmp_path: Path) -> None:
    log: list[str] = []
    all_of_them = [passing(name, log) for name in ("a", "b", "c")]
    assert gpu.main(["--out", str(tmp_path), "--sections", "c,a"], all_of_them) == 0
    assert log == ["a", "c"]


def test_a_failed_section_is_exit_status_1(with_device: None, tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path)], [failing("a", ValueError("no"))]) == 1


@pytest.mark.parametrize("value", ["nonsense", "environment,nonsense", ""])
def test_an_unknown_section_is_exit_status_2(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--sections", value])
    assert stop.value.code == 2
    said = (
        "there are environment, build, correctness, sanitizer, vq, critic_head, bn_relu_pool, block_quantize"
    )
    assert said in capsys.readouterr().err


def test_without_a_device_there_is_one_line_and_exit_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--sections", "environment"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("gpu: no CUDA device") and done.stderr.count("\n") == 1


def test_list_names_the_sections_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        s.name for s in gpu.SECTIONS
    ]


JUNIT = """<testsuites><testsuite>
<testcase classname="t" name="good"/>
<testcase classname="t" name="bad"><failure message="x"/></testcase>
<testcase classname="t" name="worse"><error message="x"/></testcase>
<testcase classname="t" name="absent"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


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
        (124, JUNIT, "pytest ended with status 124"),
        (5, "<testsuites/>", "no test ran"),
    ],
)
def test_correctness_fails_on_failures_crashes_and_nothing_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, xml: str, says: str
) -> None:
    context = Context(tmp_path, 60)
    monkeypatch.setattr(gpu, "call", write_reports(context, status, xml))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(SectionFailed) as failure:
        gpu.correctness(context)
    assert says in str(failure.value)


def test_correctness_passes_when_tests_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(tmp_path, 60)
    good = '<testsuites><testsuite><testcase classname="t" name="good"/></testsuite></testsuites>'
    monkeypatch.setattr(gpu, "call", write_reports(context, 0, good))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    found = gpu.correctness(context)
    assert found["shards"] == 2 and found["passed"] == 2


@pytest.fixture
def with_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/bin/{name}")


EXERCISES = [("critic_head", "cuda"), ("critic_head", "triton"), ("bn_relu_pool", "triton")]


def test_the_sanitizer_reports_each_op_and_fails_on_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tools: None
) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], context: Context, log: str, *_: Any) -> tuple[int, str]:
        commands.append(command)
        bad = log == "racecheck-critic_head-triton.log"
        return (9, "RACECHECK SUMMARY: 1 hazard\n") if bad else (0, "ERROR SUMMARY: 0 errors\n")

    monkeypatch.setattr(gpu, "call", fake)
    monkeypatch.setattr(gpu, "exercises", lambda: EXERCISES)
    with pytest.raises(
        SectionFailed, match="racecheck critic_head triton: RACECHECK SUMMARY: 1 hazard"
    ) as failure:
        gpu.sanitizer(Context(tmp_path, 60))
    found = failure.value.found
    assert found["memcheck bn_relu_pool triton"] == {"status": 0, "summary": "ERROR SUMMARY: 0 errors"}
    assert len(found) == 7 and found["line"] == "5 of 6 clean"
    few = [command for command in commands if "--few" in command]
    assert len(few) == 3 and all("racecheck" in command for command in few)


def test_the_sanitizer_takes_its_share_of_the_time_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tools: None
) -> None:
    clock = Clock()

    def fake(command: list[str], context: Context, *_: Any) -> tuple[int, str]:
        assert context.left() <= 100 * gpu.SANITIZER_SHARE
        clock.now += 30
        return 0, "ERROR SUMMARY: 0 errors\n"

    monkeypatch.setattr(gpu, "call", fake)
    monkeypatch.setattr(gpu, "exercises", lambda: EXERCISES)
    context = Context(tmp_path, 100, clock)
    with pytest.raises(SectionFailed, match="no time left") as failure:
        gpu.sanitizer(context)
    assert failure.value.found["line"] == "2 of 6 clean" and context.left() == 40


def test_every_op_is_exercised_on_every_backend_it_has() -> None:
    found = gpu.exercises()
    assert {("critic_head", "cuda"), ("critic_head", "triton"), ("bn_relu_pool", "triton")} <= set(found)
    assert ("block_quantize", "cuda") in found and ("block_quantize", "triton") not in found
    for stem, backend in found:
        assert backend in ("cuda", "triton") and (ROOT / f"tests/ops/{stem}_exercise.py").is_file()


def test_a_missing_sanitizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    with pytest.raises(SectionFailed, match="compute-sanitizer is not on the PATH"):
        gpu.sanitizer(Context(tmp_path, 60))


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
    assert [each["shape"] for each in gpu.misses(ROWS)] == ["2,128"]
    assert gpu.misses([row("vq_encode", "cuda", 1.9, codewords=256)])
    assert not gpu.misses([row("vq_encode", "cuda", 1.9, codewords=1024)])
    assert gpu.misses([row("bn_relu_pool_critic_head", "triton", 1.2, batch=1)])
    assert not gpu.misses([])


def measured(status: int, rows: list[dict[str, Any]]) -> Callable[..., tuple[int, str]]:
    """Stands in for `lct-fast bench` and for ncu."""

    def fake(command: list[str], context: Context, log: str, *_: Any) -> tuple[int, str]:
        if "--out" not in command:
            return 1, "ERR_NVGPUCTRPERM\n"
        Path(command[command.index("--out") + 1]).write_text(json.dumps({"rows": rows}))
        return status, "against the best rival: 1.4x\n"

    return fake


def test_a_benchmark_tells_missed_aims_and_profiles_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tools: None
) -> None:
    monkeypatch.setattr(gpu, "call", measured(0, ROWS))
    found = gpu.bench("critic_head")(Context(tmp_path, 600))
    assert found["missed"] == ["critic_head 2,128: 1.40x"]
    assert found["line"] == "against the best rival: 1.4x; 1 aims missed"
    # Counters that may not be read are no failure.
    assert found["profiles"][0]["said"] == "ERR_NVGPUCTRPERM" and found["profiles"][0]["status"] == 1
    assert found["report"]["rows"] == ROWS


def test_without_ncu_there_is_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(gpu, "call", measured(0, ROWS))
    found = gpu.bench("critic_head")(Context(tmp_path, 600))
    assert [each["said"] for each in found["profiles"]] == ["ncu is not installed"]


def test_a_benchmark_with_a_wrong_output_fails_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "call", measured(1, ROWS))
    with pytest.raises(SectionFailed, match="status 1: against the best rival") as failure:
        gpu.bench("vq")(Context(tmp_path, 600))
    assert failure.value.found["report"]["rows"] == ROWS


def test_benchmarks_leave_time_to_those_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], *_: Any) -> tuple[int, str]:
        commands.append(command)
        return 0, "said\n"

    monkeypatch.setattr(gpu, "call", fake)
    for stem in gpu.STEMS:
        gpu.bench(stem)(Context(tmp_path, 400, Clock()))
    budgets = [float(command[command.index("--budget") + 1]) for command in commands]
    assert budgets[0] == round(400 * 0.8 / len(gpu.STEMS)) and budgets[-1] == 320
    assert commands[0][3:6] == ["vq_encode", "vq_decode", "vq_update"]


def test_shards_split_the_tests_without_loss() -> None:
    """What correctness runs in several processes is, together, every test once."""
    items = [f"test {i}" for i in range(11)]
    seen: list[str] = []
    for shard in range(3):
        mine: Any = list(items)
        gone: list[str] = []
        hook = SimpleNamespace(pytest_deselected=lambda items, gone=gone: gone.extend(items))
        config: Any = SimpleNamespace(getoption=lambda name, shard=shard: f"{shard}/3", hook=hook)
        pytest_collection_modifyitems(config, mine)
        assert len(mine) in (3, 4) and sorted(mine + gone) == sorted(items)
        seen += mine
    assert sorted(seen) == sorted(items)


def test_the_table_cuts_long_lines() -> None:
    record = {"section": "a", "status": "failed", "seconds": 1.0, "error": "x" * 400 + "\nmore", "found": {}}
    assert len(sections.table([record])) < 200 and "more" not in sections.table([record])
