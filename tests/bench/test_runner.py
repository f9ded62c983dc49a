"""A case from start to end: what is wrong gets no time, what is right gets all its figures."""

from typing import Any

import pytest
import torch

from lct_fast.bench import runner
from lct_fast.bench.case import Contender, Place
from lct_fast.bench.rule import Accuracy, WrongOutput
from lct_fast.bench.runner import Ready, _rounds, measure, peak_bytes
from lct_fast.bench.sampling import Sampler
from lct_fast.ops import BackendError
from tests.bench.made import ROOF, bench, contender, ours, right


def rows_of(*contenders: Contender, samples: int = 3) -> list[dict[str, Any]]:
    return measure(bench(*contenders), "4", Place(), samples, Sampler("cpu"), ROOF)


def test_what_is_right_is_timed_beside_its_rivals() -> None:
    mine, a, b = rows_of(ours(), contender("a", right), contender("b", right))
    for row in (mine, a, b):
        assert row["failed"] == "" and row["samples"] == 3
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["error"] == 0.0 and row["graphs"] is None
        # 8000 bytes at 1 GB/s are 8 us, and more than 1000 operations at 1 GFLOP/s.
        assert row["share_of_roofline"] == pytest.approx(8 / row["us_p50"])
    assert mine["times_as_fast_as"] == {
        "a": pytest.approx(a["us_p50"] / mine["us_p50"]),
        "b": pytest.approx(b["us_p50"] / mine["us_p50"]),
    }
    assert a["times_as_fast_as"] == {}


def test_a_wrong_output_gets_no_time_and_is_no_rival() -> None:
    rows = {
        row["contender"]: row
        for row in rows_of(
            ours(lambda: right() * 1.01), contender("a", right), contender("b", lambda: right(3))
        )
    }
    assert "y is off by 2.00e-02" in rows["lct_fast"]["failed"]
    assert "y is [3], expected [4]" in rows["b"]["failed"]
    for name in ("lct_fast", "b"):
        assert rows[name]["us_p50"] is None and rows[name]["samples"] == 0
    assert rows["a"]["us_p50"] > 0


def test_a_wrong_rival_does_not_count_as_one() -> None:
    rows = rows_of(ours(), contender("a", lambda: right() + 1))
    (mine,) = (row for row in rows if row["contender"] == "lct_fast")
    assert mine["times_as_fast_as"] == {}


def test_an_error_is_a_failure_and_a_refusal_is_not() -> None:
    def broken() -> torch.Tensor:
        raise KeyError("gone")

    def refused() -> torch.Tensor:
        raise BackendError("too large")

    wrong = contender("c", lambda: right() + 1, package="c")
    rows = rows_of(ours(refused), contender("a", broken), contender("b", broken, package="b"), wrong)
    assert [row["skipped"] for row in rows] == ["BackendError: too large", "", "KeyError: 'gone'", ""]
    assert [row["failed"][:12] for row in rows] == ["", "KeyError: 'g", "", "WrongOutput:"]


def test_what_is_checked_starts_from_what_reset_gives() -> None:
    x = torch.full((4,), 5.0)
    in_place = contender("a", lambda: x.mul_(2), reset=lambda: [x.fill_(1.0)])  # type: ignore[arg-type, return-value]
    (row,) = rows_of(in_place)
    assert row["failed"] == "" and row["error"] == 0.0


def test_peak_memory_counts_what_is_freed_again_and_what_is_returned() -> None:
    def run() -> torch.Tensor:
        y = torch.ones(1000)
        for _ in range(3):
            y = y + 1
        return y[:1].clone()

    # Old and new y at once.
    assert 8000 <= peak_bytes(contender("a", run), "cpu") < 9000
    (row,) = rows_of(contender("a", right, in_torch=False))
    assert row["peak_bytes"] is None


def test_what_cannot_be_captured_is_timed_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(_: Contender) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(runner, "_capture", capture)
    monkeypatch.setattr(runner, "peak_bytes", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    mine = contender("a", right)
    ready = runner.prepare(mine, bench(mine).case("4", Place()), "cuda")
    assert not ready.contender.graphs and ready.run is mine.run


def test_a_graph_s_output_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = right() * 0
    monkeypatch.setattr(runner, "_capture", lambda _: (lambda: None, stale))
    monkeypatch.setattr(runner, "peak_bytes", lambda *_: 0)
    mine = contender("a", right)
    case = bench(mine).case("4", Place())
    with pytest.raises(WrongOutput):
        runner.prepare(mine, case, "cuda")
    monkeypatch.setattr(runner, "_capture", lambda _: (lambda: stale.fill_(2.0), stale))
    assert runner.prepare(mine, case, "cuda").contender.graphs


def test_graphs_are_on_all_sides_or_on_none() -> None:
    def ready(name: str, graphs: bool) -> Ready:
        return Ready(contender(name, right, graphs=graphs), right, Accuracy(0, 0), None)

    a, b, c = ready("a", True), ready("b", False), ready("c", True)
    assert _rounds([a, b, c], "cuda") == [([a, c], True), ([a, b, c], False)]
    assert _rounds([a, c], "cuda") == [([a, c], True)]
    assert _rounds([a, b], "cpu") == [([a, b], None)]
