"""The runner of `python -m benchmarks.gpu`: order, budget, failures, exit status. Sections are fakes here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import command as gpu
from benchmarks.gpu import sections
from benchmarks.gpu.host import sources
from benchmarks.gpu.sections import CUT, Context, Section, SectionFailed, call, run_sections
from lct_fast.bench.cases import by_stem
from tests.conftest import pytest_collection_modifyitems
from tests.gpu_helpers import Clock, runs

ROOT = Path(__file__).parents[1]


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


def test_what_the_budget_does_not_cover_is_not_run_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, log = Clock(), list[str]()
    chosen = [passing("long", log, 58, clock), passing("late", log), failing("never", ValueError("no"))]
    status = run_sections(chosen, Context(tmp_path, 60, clock))
    assert status == 1 and log == ["long"]
    assert read(tmp_path / "long.json")["seconds"] == 58
    assert read(tmp_path / "long.json")["status"] == "passed"
    named = {record["section"]: record for record in read(tmp_path / "summary.json")}
    assert [named[name]["status"] for name in ("long", "late", "never")] == ["passed", "not run", "not run"]
    assert named["late"]["error"] == "2 s left of 60; give a larger --budget"
    assert not (tmp_path / "late.json").exists()
    # The table names it too.
    assert "late   not run" in capsys.readouterr().out


def test_what_is_not_run_leaves_an_earlier_record(tmp_path: Path) -> None:
    run_sections([passing("late", [])], Context(tmp_path, 60))
    assert run_sections([passing("late", [])], Context(tmp_path, 2)) == 1
    assert read(tmp_path / "late.json")["status"] == "passed"


def test_a_record_that_is_begun_again_is_gone_until_it_ends(tmp_path: Path) -> None:
    def look(context: Context) -> dict[str, Any]:
        return {"there": (context.out / "one.json").exists()}

    for _ in range(2):
        run_sections([Section("one", "", look)], Context(tmp_path, 60))
        assert read(tmp_path / "one.json")["found"] == {"there": False}
    assert not list(tmp_path.glob("*.partial"))


def test_what_lacks_something_is_skipped_and_is_no_failure(tmp_path: Path) -> None:
    ran = list[str]()
    lacking = replace(passing("one", ran), lacks=lambda context: "add --data")
    assert run_sections([lacking, passing("two", ran)], Context(tmp_path, 60)) == 0
    assert ran == ["two"] and not (tmp_path / "one.json").exists()
    skipped = read(tmp_path / "summary.json")[0]
    assert (skipped["status"], skipped["error"]) == ("skipped", "add --data")


def test_a_section_gets_its_share_and_what_others_left(tmp_path: Path) -> None:
    clock, given = Clock(), list[float]()

    def run(context: Context) -> dict[str, Any]:
        given.append(context.left())
        clock.now += 10
        return {}

    weights = {"heavy": 6.0, "light": 1.0, "last": 1.0}
    chosen = [Section(name, "", run, 5, weight) for name, weight in weights.items()]
    run_sections(chosen, Context(tmp_path, 80, clock))
    # 6 of 8 parts of 80 s, then half of the 70 s that are left, then all.
    assert given == [60, 35, 60]


def test_no_section_gets_less_than_it_needs_nor_more_than_there_is(tmp_path: Path) -> None:
    given = list[float]()

    def run(context: Context) -> dict[str, Any]:
        given.append(context.left())
        return {}

    chosen = [Section("small", "", run, 30, 1), Section("large", "", run, 5, 99)]
    run_sections(chosen, Context(tmp_path, 40, Clock()))
    assert given == [30, 40]


def test_every_record_says_what_it_is_about(tmp_path: Path) -> None:
    context = Context(tmp_path, 60, fake=True, facts={"device": "a machine"})
    run_sections([passing("good", []), failing("bad", ValueError("no"))], context)
    for name in ("good", "bad"):
        record = read(tmp_path / f"{name}.json")
        assert record["fake"] is True and record["device"] == "a machine" and record["began"].endswith("Z")


def test_a_command_is_cut_at_the_budget_and_its_output_kept(tmp_path: Path) -> None:
    context = Context(tmp_path, 1.0)
    code = "import time; print('began', flush=True); time.sleep(60)"
    status, text = call([sys.executable, "-c", code], context, "x.log", os.environ, tmp_path)
    assert status == 124 and text == "began\n"
    assert (tmp_path / "x.log").read_text() == "began\n"


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    """Else a compiler or a watched program would go on beside the next section."""
    child = "import time; print('alive', flush=True); time.sleep(60)"
    code = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)"
    )
    for seconds, rest in ((30.0, "; import time; time.sleep(0.5)"), (3.0, "; import time; time.sleep(60)")):
        status, text = call(
            [sys.executable, "-c", code + rest], Context(tmp_path, seconds), "x.log", os.environ, tmp_path
        )
        assert status == (0 if seconds == 30 else CUT)
        assert not runs(int(text.splitlines()[0]))


def test_a_command_s_status_and_both_streams_come_back(tmp_path: Path) -> None:
    code = "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)"
    done = call([sys.executable, "-c", code], Context(tmp_path, 30), "x.log", os.environ, tmp_path)
    assert done == (3, "out\nerr\n")


@pytest.fixture
def with_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "no_device", lambda: "")
    monkeypatch.setattr(gpu, "facts", lambda fake: {"device": "none"})


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
    said = "there are environment, build, correctness, vq, critic_head, bn_relu_pool, block_quantize, overlap, cifar10"
    assert said in capsys.readouterr().err


def test_a_time_that_ends_is_exit_status_1_and_names_what_is_left(
    with_device: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path), "--budget", "3"], [passing("a", []), passing("b", [])]) == 1
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["a", "not", "run"],
        ["b", "not", "run"],
    ]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("cifar10:/no/such/folder", "--data: /no/such/folder does not exist"),
        ("/tmp", "--data is cifar10:PATH, got '/tmp'"),
        ("cifar10:", "--data is cifar10:PATH, got 'cifar10:'"),
        ("digits:x", "--data is cifar10:PATH, got 'digits:x'"),
    ],
)
def test_wrong_images_are_refused_before_any_work(
    data: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--data", data])
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("fake", [False, True])
def test_fake_and_true_records_do_not_mix(
    fake: bool, with_device: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(tmp_path)]
    first, second = (["--fake"], []) if fake else ([], ["--fake"])
    assert gpu.main([*options, *first], [passing("a", [])]) == 0
    before = (tmp_path / "a.json").read_bytes()
    ran = list[str]()
    assert gpu.main([*options, *second], [passing("a", ran)]) == 2
    there, here = ("fake", "true") if fake else ("true", "fake")
    assert f"holds a {there} record, and this is a {here} one" in capsys.readouterr().err
    assert not ran and (tmp_path / "a.json").read_bytes() == before
    # Once more of the same kind is fine.
    assert gpu.main([*options, *first], [passing("a", ran)]) == 0


def test_a_record_that_does_not_say_so_is_no_fake(tmp_path: Path) -> None:
    (tmp_path / "vq.json").write_text('{"section": "vq", "status": "passed"}')
    (tmp_path / "bench-vq.json").write_text('{"rows": []}')
    assert gpu.read_records(tmp_path) == {"vq": {"section": "vq", "status": "passed", "fake": False}}
    assert gpu.other_kind(tmp_path, True) and not gpu.other_kind(tmp_path, False)
    assert not gpu.other_kind(tmp_path / "nowhere", True)


def test_sources_are_known_without_git(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    kernel = tmp_path / "csrc" / "a.cu"
    kernel.write_text("one")
    first = sources(tmp_path)
    (tmp_path / "csrc" / "notes.txt").write_text("of no importance")
    assert sources(tmp_path) == first
    kernel.write_text("two")
    assert sources(tmp_path) != first


def test_what_is_most_telling_comes_first_and_has_its_part_of_the_time() -> None:
    names = [section.name for section in gpu.SECTIONS]
    assert names[:4] == ["environment", "build", "correctness", "vq"]
    assert set(by_stem()) | {"overlap", "cifar10", "sanitizer"} < set(names) and len(set(names)) == len(names)
    # The worst case: everyone takes all of its part.
    total, left, ran = sum(section.weight for section in gpu.SECTIONS), 540.0, list[str]()
    for section in gpu.SECTIONS:
        share = min(left, max(section.least_s, section.weight / total * left))
        assert share <= 0.35 * 540
        if left >= section.least_s:
            ran.append(section.name)
            left -= share
        total -= section.weight
    assert ran[:9] == names[:9] and names[8] == "cifar10"


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
