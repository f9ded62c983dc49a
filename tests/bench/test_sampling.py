"""Percentiles, turns, and samples that others disturbed."""

from collections.abc import Iterator

import pytest

from lct_fast.bench import machine
from lct_fast.bench.machine import Watch
from lct_fast.bench.sampling import ATTEMPTS, Sample, Sampler, percentiles, turns
from tests.bench.made import ours


def test_percentiles() -> None:
    assert percentiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0, 11)
    assert percentiles([Sample(3.0), Sample(1.0, False)]).p50 == 2.0
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        percentiles([1.0])


def test_contenders_take_turns_and_each_begins_in_turn() -> None:
    assert list(turns(3, 3)) == [0, 1, 2, 1, 2, 0, 2, 0, 1]


def counter(monkeypatch: pytest.MonkeyPatch, values: Iterator[int]) -> None:
    monkeypatch.setattr(machine, "preempted", lambda: next(values))


def test_a_sample_that_lost_a_core_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    # Before and after two attempts that were disturbed, then one that was not.
    counter(monkeypatch, iter([0, 1, 1, 3, 3, 3]))
    ((sample,),) = Sampler("cpu").take([ours()], [lambda: runs.append(1)], 1, "")
    assert sample.undisturbed and len(runs) == 3


def test_a_machine_that_stays_busy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    counter(monkeypatch, iter(range(100)))
    ((sample,),) = Sampler("cpu").take([ours()], [lambda: runs.append(1)], 1, "")
    assert not sample.undisturbed and len(runs) == ATTEMPTS


def test_what_is_changed_in_place_is_brought_back_before_every_run() -> None:
    log: list[str] = []
    contender = ours(reset=lambda: log.append("reset"))
    Sampler("cpu").take([contender], [lambda: log.append("run")], 2, "")
    assert log[0] == "reset" and log.count("run") >= 2
    assert all(before == "reset" for before, now in zip(log, log[1:], strict=False) if now == "run")


@pytest.mark.parametrize(("others", "share"), [(3.0, 0.75), (0.0, 0.0)])
def test_the_watch_subtracts_this_process(
    monkeypatch: pytest.MonkeyPatch, others: float, share: float
) -> None:
    """Two seconds on two cores, in which this process takes one second."""
    clock = {"busy": 50.0, "own": 7.0, "now": 3.0}
    monkeypatch.setattr(machine, "busy_seconds", lambda: clock["busy"])
    monkeypatch.setattr(machine.os, "times", lambda: (clock["own"], 0, 0, 0, 0))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock["now"])
    watch = Watch()
    assert watch.foreign_cpu_share == 0.0
    with watch:
        clock.update(busy=51.0 + others, own=8.0, now=5.0)
    # What happens outside the block is nobody's business.
    clock.update(busy=999.0)
    assert watch.foreign_cpu_share == pytest.approx(share)


def test_the_system_says_how_busy_it_was() -> None:
    before = machine.busy_seconds()
    sum(range(10**6))
    assert machine.busy_seconds() >= before > 0
