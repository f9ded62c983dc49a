"""The comparison with pipelines: arithmetic, refusal of what is wrong, and one trial of the whole, tiny."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.pipeline import balance as pipeline_balance
from benchmarks.pipeline import check as pipeline_check
from benchmarks.pipeline import command as pipeline
from benchmarks.pipeline import report as pipeline_report
from benchmarks.pipeline import rounds as pipeline_rounds
from benchmarks.pipeline.balance import Balance
from benchmarks.pipeline.local import Ceiling
from benchmarks.pipeline.model import CODEC, CONV, POOLED, Task, halves, small_cnn
from benchmarks.pipeline.rivals import Backprop, Setting, TwoThreads

ROOT = Path(__file__).parents[1]
TASK = Task(widths=pipeline.TINY_WIDTHS, batch=8, batches=2)


def line(
    kind: str, us: float, microbatches: int = 1, method: str = "", critic: str = "", codec: str = ""
) -> dict[str, Any]:
    name = f"{kind} {microbatches} {method} {critic}"
    return {
        "contender": name,
        "kind": kind,
        "microbatches": microbatches,
        "method": method,
        "critic": critic,
        "codec": codec,
        "us_p20": us,
        "us_p50": us,
        "us_p80": us,
        "foreign_cpu_share": [0.0, 0.01],
    }


ROWS = [
    line("backprop", 240.0),
    line("backprop", 200.0, 2),
    line("two threads", 125.0),
    line("GPipe", 170.0, 4),
    line("1F1B", 160.0, 8),
    line("1F1B", 180.0, 16),
    line("DDP", 136.0),
    line("no link", 100.0, 1, "local-critic", POOLED),
    line("decoupled", 110.0, 1, "local-critic", POOLED),
    line("decoupled", 50.0, 1, "greedy", POOLED),
    line("decoupled", 160.0, 1, "local-critic", CONV),
    line("decoupled", 105.0, 1, "local-critic", POOLED, CODEC),
]


def test_the_figures_of_a_run() -> None:
    s = pipeline_report.summary(ROWS, {POOLED: [0.10, 0.08, 0.097]})
    # T_1 is the fastest plain one-thread run, not the first, and not the one of two threads.
    assert s["t1"] == "backprop 2  " and s["t1_us"] == 200.0
    assert s["best_pipeline"] == "1F1B 8  " and s["eta_best_pipeline"] == pytest.approx(200 / 320)
    assert s["eta_ddp"] == pytest.approx(200 / 272) and s["eta_two_threads"] == pytest.approx(0.8)
    # eta is local-critic's with the pooled critic, though another contender is faster.
    assert s["eta"] == pytest.approx(200 / 220) and s["eta_ceiling"] == pytest.approx(1.0)
    assert s["ratio_to_best_pipeline"] == pytest.approx(110 / 160)
    assert s["ratio_to_ddp"] == pytest.approx(110 / 136)
    assert s["greedy_eta"] == pytest.approx(2.0) and s["conv_critic_eta"] == pytest.approx(0.625)
    assert s["greedy_eta_ceiling"] is None and s["greedy_eta_vq"] is None
    assert s["eta_vq"] == pytest.approx(200 / 210) and s["vq_to_best_pipeline"] == pytest.approx(105 / 160)
    assert s["imbalance"] == pytest.approx(0.2) and s["critic_tax"] == pytest.approx(0.003 / 0.18)
    assert "conv_critic_critic_tax" not in s


def test_nothing_is_said_about_what_did_not_run() -> None:
    s = pipeline_report.summary(ROWS[:3], {})
    assert s["t1_us"] == 200.0
    for name in ("eta", "eta_ceiling", "best_pipeline", "ratio_to_best_pipeline", "eta_ddp"):
        assert s[name] is None
    none = pipeline_report.summary([], {})
    assert set(none.values()) == {None}


def test_the_table_holds_every_contender_and_the_fastest_comes_last() -> None:
    lines = pipeline_report.table(ROWS, 200.0).splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert lines[-1].startswith("decoupled 1 greedy") and lines[-1].endswith("2.000")


@pytest.mark.parametrize(
    ("shares", "expected"), [([0.0] * 9 + [0.2], True), ([0.06] * 10, False), ([0.0] * 7 + [0.1] * 3, False)]
)
def test_a_run_is_quiet_on_the_whole_and_mostly(shares: list[float], expected: bool) -> None:
    assert pipeline_report.quiet([{"foreign_cpu_share": shares}]) is expected


def test_no_samples_are_not_quiet() -> None:
    assert not pipeline_report.quiet([])


def test_balance() -> None:
    assert Balance(0.10, 0.08, 0.10).imbalance == pytest.approx(0.2)
    assert Balance(0.08, 0.10, 0.08).imbalance == pytest.approx(0.2)
    assert Balance(0.11, 0.09, 0.105).critic_tax == pytest.approx(0.025)
    # The bare group came out slower: noise, not a critic that saves time.
    assert Balance(0.1, 0.1, 0.11).critic_tax == 0.0


def test_parts_are_measured_in_turns_and_the_first_turn_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    ran: list[str] = []
    monkeypatch.setattr(pipeline_balance.time, "process_time", lambda: clock[0])

    def part(name: str, seconds: list[float]) -> None:
        ran.append(name)
        clock[0] += seconds.pop(0)

    a, b = [9.0, 1.0, 3.0, 2.0], [9.0, 5.0, 5.0, 4.0]
    medians = pipeline_balance.medians([lambda: part("a", a), lambda: part("b", b)], 3)
    assert medians == [2.0, 5.0] and ran == ["a", "b"] * 4


def test_balance_measures_both_groups_and_the_bare_first(threads: None) -> None:
    balance = pipeline_balance.measure(
        TASK, Setting("no link", "channels_last", 1, "local-critic", POOLED), 1
    )
    assert min(balance) > 0


@pytest.mark.parametrize("format", ["contiguous", "channels_last"])
def test_random_states_are_what_crosses_the_cut(format: str) -> None:
    setting = Setting("no link", format, 1, "greedy", POOLED)
    first = Ceiling(TASK, setting, 0)
    (x, y), states = first.data[0], TASK.states(format)
    h = first.local.backward(x, y).h
    for state in states:
        assert state.shape == h.shape and state.stride() == h.stride() and state.dtype == h.dtype
    assert Ceiling(TASK, setting, 1).data[0][0].shape == h.shape


@pytest.mark.parametrize("rows", [False, True])
def test_halves_are_the_network(rows: bool) -> None:
    model = TASK.model()
    first, second = halves(model, rows)
    x = TASK.data("channels_last")[0][0]
    h = first.to(memory_format=torch.channels_last)(x)
    assert h.is_contiguous() == rows
    assert torch.equal(second(h), model(x))
    names = [name for half in (first, second) for name, _ in half.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


def test_widths_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="widths: expected 8 of them, got 2"):
        small_cnn((8, 8))


def test_two_threads_are_only_lent(threads: None) -> None:
    contender = TwoThreads(TASK, Setting("two threads", "contiguous"), 0)
    seen = []
    step = contender.step
    contender.step = lambda: (seen.append(torch.get_num_threads()), step())  # type: ignore[method-assign,assignment,func-returns-value]
    assert contender.run(1) > 0
    assert seen == [2, 2] and torch.get_num_threads() == 1


def outputs() -> dict[str, Tensor]:
    return {"loss": torch.tensor(2.0), "weight": torch.arange(1.0, 9.0)}


EXACT = {name: value.double() for name, value in outputs().items()}


def test_what_is_right_passes() -> None:
    assert pipeline_check.check(outputs(), outputs(), EXACT) == (0.0, 0.0, None)
    near = {**outputs(), "weight": outputs()["weight"] * 1.01}
    assert pipeline_check.check(near, outputs(), EXACT).wrong is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": torch.tensor(2.001)}, "loss is off by 5.0e-04"),
        ({"loss": torch.tensor(torch.nan)}, "loss is off by nan"),
        ({"weight": torch.arange(1.0, 9.0) * 0.5}, "weight is off by 5.0e-01"),
        ({"weight": torch.arange(1.0, 9.0) * 1.02}, "weight is off by 2.0e-02"),
        ({"weight": torch.arange(1.0, 8.0)}, "weight is off by inf"),
        ({"bias": torch.zeros(1)}, "not expected ['bias']"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Tensor], said: str) -> None:
    wrong = pipeline_check.check({**outputs(), **change}, outputs(), EXACT).wrong
    assert wrong is not None and said in wrong


def test_a_missing_output_is_wrong() -> None:
    verdict = pipeline_check.check({"loss": torch.tensor(2.0)}, outputs(), EXACT)
    assert "missing ['weight']" in str(verdict.wrong)


def test_plain_torch_far_off_excuses_little() -> None:
    far = {**outputs(), "weight": torch.zeros(8)}
    got = {**outputs(), "weight": outputs()["weight"] * 1.04}
    assert "at most 3.0e-02" in str(pipeline_check.check(got, far, EXACT).wrong)


def test_an_output_belongs_to_one_process() -> None:
    assert pipeline_check.merged([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}]).keys() == {"a", "b"}
    with pytest.raises(ValueError, match=r"two processes returned \['a'\]"):
        pipeline_check.merged([{"a": torch.zeros(1)}, {"a": torch.zeros(1)}])


def test_first_outputs_leave_no_gradients(threads: None) -> None:
    contender = Backprop(TASK, Setting("backprop", "contiguous", 2), 0)
    one, other = contender.first(), contender.first()
    assert one.keys() == {"loss", *dict(contender.model.named_parameters())}
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_round_begins_with_another_contender() -> None:
    turns = list(pipeline_rounds.turns(3, 4))
    by_round = {r: [i for _, i in group] for r, group in itertools.groupby(turns, lambda turn: turn[0])}
    assert by_round == {0: [0, 1, 2], 1: [1, 2, 0], 2: [2, 0, 1], 3: [0, 1, 2]}


def test_the_fastest_settings_of_each_rival_go_on() -> None:
    def found(kind: str, *times: float) -> list[dict[str, Any]]:
        return [
            {"name": f"{kind} {us}", "setting": {"kind": kind}, "visits": [{"us": 999.0}, {"us": us}]}
            for us in times
        ]

    rows = found("DDP", 3, 1, 2) + found("backprop", 4, 1, 2, 3) + found("decoupled", 9, 8)
    names = {row["name"] for row in pipeline_rounds.kept(rows)}
    assert names == {"DDP 1", "backprop 1", "backprop 2", "backprop 3", "decoupled 9", "decoupled 8"}


def test_a_screened_setting_is_never_the_fastest() -> None:
    row = {"kind": "1F1B", "us_p50": 1.0, "screened_only": True}
    assert pipeline_report.fastest([row], ["1F1B"]) is None
    assert (
        pipeline_report.fastest([row, row | {"us_p50": 2.0, "screened_only": False}], ["1F1B"])["us_p50"]
        == 2.0
    )  # type: ignore[index]


@pytest.mark.parametrize(
    ("shares", "limit_s", "kept", "repeated"),
    [
        ([0.5, 0.3, 0.01], 1e9, 0.01, 2),
        # Never quiet: the quietest of all attempts, which is not the last.
        ([0.5, 0.2, 0.3, 0.4], 1e9, 0.2, 3),
        ([0.5], 1e-9, 0.5, 0),
    ],
)
def test_a_disturbed_visit_is_made_again_while_there_is_time(
    shares: list[float], limit_s: float, kept: float, repeated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(shares)
    monkeypatch.setattr(
        pipeline_rounds, "visit", lambda *_: {"us": 1.0, "foreign": next(left), "loss": [None, None]}
    )
    monkeypatch.setattr(pipeline_rounds.dist, "broadcast", lambda tensor, source: None)
    plan = pipeline_rounds.Plan(samples=1, steps=1, limit_s=limit_s)
    [row] = pipeline_rounds.rounds([(Setting("backprop", "contiguous"), None)], plan, 1, 0.0)
    assert [visit["foreign"] for visit in row["visits"]] == [kept] and row["repeated"] == repeated


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--out"),
        (["--out", "x.json", "--samples", "6"], "at least 7"),
        (["--out", "x.json", "--samples", "1", "--tiny"], "at least 2"),
        (["--out", "x.json", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["--out", "x.json", "--limit", "0"], "--limit must be positive"),
        (["--out", str(ROOT)], "got the folder"),
    ],
)
def test_bad_arguments_are_refused(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        pipeline.arguments(argv)
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_settings_are_distinct_and_cover_every_kind() -> None:
    settings = pipeline_rounds.settings()
    assert len({s.name for s in settings}) == len(settings)
    kinds = {s.kind for s in settings}
    assert kinds >= pipeline_rounds.BUILDERS.keys() - {"decoupled"}
    for kind in ("GPipe", "1F1B"):
        assert {s.microbatches for s in settings if s.kind == kind} == {2, 4, 8, 16}
    assert {s.microbatches for s in settings if s.kind == "backprop"} == {1, 2, 4, 8, 16}
    assert {s.microbatches for s in pipeline_rounds.settings(most=2)} == {1, 2}


@pytest.mark.slow
def test_a_tiny_run_of_the_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "pipeline.json"
    command = [sys.executable, "-m", "benchmarks.pipeline", "--tiny", "--samples", "2", "--steps", "1"]
    done = subprocess.run(
        [*command, "--limit", "1", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(out.read_text())
    assert report["failed_checks"] == [] and report["tiny"] is True
    assert (
        report["workers"] == 2 and report["threads"] == 1 and report["versions"]["torch"] == torch.__version__
    )
    assert 0 <= report["foreign_cpu_share"] <= 1 and isinstance(report["quiet"], bool)
    rows = {row["contender"]: row for row in report["rows"]}
    assert rows.keys() == {s.name for s in pipeline_rounds.settings(most=4)}
    for row in rows.values():
        assert row["samples"] == len(row["us"]) == len(row["foreign_cpu_share"]) == 2
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["cpu_us_p50"][0] > 0
        # The process that has nothing to do waits without spinning.
        if row["kind"] in ("backprop", "two threads"):
            assert row["cpu_us_p50"][1] < row["cpu_us_p50"][0] / 2
    # Batch norm sees microbatches: a pipeline's loss is that of plain accumulation over as many.
    first = {(r["kind"], r["format"], r["microbatches"]): r["first_loss"] for r in rows.values()}
    for kind, format, count in itertools.product(("GPipe", "1F1B"), ("contiguous", "channels_last"), (2, 4)):
        assert first[kind, format, count] == pytest.approx(first["backprop", format, count], rel=1e-5)
    assert first["DDP", "contiguous", 1] == pytest.approx(first["backprop", "contiguous", 2], rel=1e-5)
    assert first["backprop", "contiguous", 2] != pytest.approx(first["backprop", "contiguous", 1], rel=1e-5)
    full = [r for r in rows.values() if not r["screened_only"]]
    assert 0 < len(full) < len(rows)
    assert report["t1_us"] == min(r["us_p50"] for r in full if r["kind"] == "backprop")
    assert report["eta_ceiling"] == pytest.approx(
        report["t1_us"] / 2 / rows[f"no link, local-critic, {POOLED}, channels_last"]["us_p50"]
    )
    assert report["busy_s"].keys() == {POOLED, CONV} and 0 <= report["imbalance"] <= 1
    # The table and the progress.
    assert all(name in done.stdout for name in rows) and "visits" in done.stderr
