"""What the meter says of ticks whose times are known, and the trace that comes of it."""

import json
from pathlib import Path

import pytest

from lct_fast.engine import meter as metering
from lct_fast.engine.meter import Event, GroupMeter, Meter
from lct_fast.engine.trace import write_trace


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(metering.time, "perf_counter", lambda: self.now)


def _tick(clock: Clock, meter: GroupMeter, batch: int, spans: dict[str, float], exposed: float = 0.0) -> None:
    meter.begin(batch)
    for name, seconds in spans.items():
        with meter.span(name):
            clock.now += seconds
    meter.add_exposed(exposed)
    clock.now += 0.5
    meter.end()


def test_shares_of_ticks_with_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    first, last = GroupMeter(0), GroupMeter(1, last=True)
    # The first tick warms up and counts for nothing.
    _tick(clock, first, 0, {"forward": 1000.0})
    _tick(clock, last, 0, {"wait for input": 1000.0}, 900.0)
    for t in (1, 2):
        _tick(clock, first, t, {"forward": 3.0, "critic": 1.0, "backward": 5.0, "wait for room": 0.5})
        _tick(
            clock,
            last,
            t,
            {"wait for input": 2.0, "forward": 3.0, "critic": 0.5, "backward": 4.0},
            exposed=0.5,
        )
    meter = Meter([first, last])
    # Each tick lasts 10 s: its spans and half a second between them.
    assert first.total == last.total == 20
    assert first.busy == 18 and first.waiting == 1 and last.busy == 15 and last.waiting == 4
    assert meter.critic_tax() == 2 / 33, "the last group's head is the network's own"
    assert meter.bubble_fraction() == pytest.approx((1 + 4 - 1) / 40)
    assert meter.exposed_transfer_fraction() == pytest.approx(1 / 40)
    assert meter.efficiency() == pytest.approx((16 + 15) / 40)
    assert meter.imbalance() == pytest.approx(9 / 8.25 - 1)
    tick = last.ticks[-1]
    assert (tick.batch, tick.seconds, tick.busy, tick.input, tick.exposed) == (2, 10.0, 7.5, 2.0, 0.5)


def test_nothing_is_said_of_a_run_without_ticks() -> None:
    meter = Meter([GroupMeter(0), GroupMeter(1, last=True)])
    assert meter.critic_tax() is meter.bubble_fraction() is meter.imbalance() is meter.efficiency() is None
    assert meter.step_seconds_median() is None and meter.per_sample(7) == 0


def test_the_trace_keeps_some_ticks_after_the_warm_up_and_opens_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    meters = [GroupMeter(k, k == 1, trace_ticks=3) for k in range(2)]
    for t in range(8):
        for meter in meters:
            _tick(clock, meter, t, {"forward": 1.0})
            meter.trace(Event("send", "send train", clock.now - 0.25, clock.now, t))
    # Group 2's clock is 5 s ahead of group 1's.
    write_trace(tmp_path / "trace.json", meters, [0.0, 5.0])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names[1, None] == "group 1" and names[2, 20] == "group 2" and names[2, 21] == "group 2 send"
    spans = [e for e in events if e["ph"] == "X"]
    forward = [e for e in spans if e["name"] == "forward"]
    assert [e["args"]["batch"] for e in forward if e["pid"] == 1] == [1, 2, 3]
    assert all(e["dur"] == 1e6 for e in forward) and min(e["ts"] for e in spans) == 0
    one, two = (next(e["ts"] for e in forward if e["pid"] == k) for k in (1, 2))
    # Group 2 began 1.5 s later, by a clock that shows 5 s more than it should.
    assert one - two == pytest.approx((5 - 1.5) * 1e6)


def test_nothing_is_kept_once_the_trace_is_full() -> None:
    meter = GroupMeter(0, trace_ticks=2)
    for t in range(2000):
        meter.begin(t)
        with meter.span("forward"):
            pass
        meter.end()
    assert len(meter.events) == 2 and meter.timed() == 1999 and len(meter.ticks) == 1000
