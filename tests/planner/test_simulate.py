"""Simulated steps against what the papers' formulas and a few lines of arithmetic give."""

import math

import numpy as np
import pytest

from lct_fast.planner import decoupled, orders
from lct_fast.planner.costs import GroupCost, Link
from lct_fast.planner.simulate import factors, simulate

BY_NAME = {s.name: s for s in orders.SCHEDULES}
FREE = Link(math.inf)


def _even(workers: int) -> list[GroupCost]:
    return [GroupCost(1.0, 2.0, activation_bytes=100.0)] * workers


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
@pytest.mark.parametrize(("p", "m"), [(1, 3), (4, 4), (4, 32), (7, 5)])
def test_bubble_of_the_formula(name: str, p: int, m: int) -> None:
    """(p - 1) / (m + p - 1) of the time is idle (arXiv 1811.06965, 1806.03377)."""
    step = simulate(BY_NAME[name], _even(p), m, FREE)
    assert step.seconds == 3.0 * (m + p - 1)
    assert step.busy.tolist() == [3.0 * m] * p


def test_interleaving_halves_the_bubble() -> None:
    """(p - 1) / v passes of fill and drain with v chunks (arXiv 2104.04473)."""
    p, m = 4, 8
    assert simulate(BY_NAME["interleaved 1F1B"], _even(p), m, FREE).seconds == 3.0 * (m + (p - 1) / 2)


def test_zero_bubble_with_equal_passes() -> None:
    """Forward, input and weight gradients of equal length: ZB-H1's bubble is (p - 1) F, ZBV's (arXiv 2401.10241) none
    but the fill."""
    p, m = 4, 16
    assert simulate(BY_NAME["ZB1P"], _even(p), m, FREE).seconds == 3.0 * m + (p - 1)
    zbv = simulate(BY_NAME["ZBV"], _even(p), m, FREE).seconds
    assert 3.0 * m < zbv < 3.0 * m + (p - 1)


def test_one_forward_one_backward_holds_as_many_as_are_behind() -> None:
    gpipe, one = (simulate(BY_NAME[n], _even(4), 8, FREE).in_flight for n in ("GPipe", "1F1B"))
    assert gpipe.tolist() == [0.0, 800.0, 800.0, 800.0]
    assert one.tolist() == [0.0, 300.0, 200.0, 100.0]


def test_transfers_take_their_time() -> None:
    # One microbatch through two workers: 1, 100 bytes at 50 a second, latency 0.5, 1 + 2, the same back, 2.
    link = Link(50.0, 0.5)
    assert simulate(BY_NAME["GPipe"], _even(2), 1, link).seconds == 1 + 2.5 + 3 + 2.5 + 2
    # A slow link is the pace: forward passes of 4 microbatches leave every 2 seconds.
    step = simulate(BY_NAME["GPipe"], _even(2), 4, link)
    assert step.nbytes == 2 * 4 * 100
    first_arrival, pace = 1 + 2.5, 2.0
    last_forward = first_arrival + 3 * pace + 1
    # Worker 2 then takes 4 backward passes of 2; the last gradient comes 2.5 later, and takes 2.
    assert step.seconds == last_forward + 4 * 2 + 2.5 + 2


def test_uneven_groups() -> None:
    costs = [GroupCost(1, 2), GroupCost(3, 5), GroupCost(0.5, 1)]
    step = simulate(BY_NAME["1F1B"], costs, 50, FREE)
    assert step.busy.tolist() == [150.0, 400.0, 75.0]
    # The longest group is busy all the time but for the fill and the drain.
    assert 400 < step.seconds < 400 + 1 + 0.5 + 1 + 2 + 8


@pytest.mark.parametrize("name", BY_NAME)
def test_no_order_deadlocks(name: str) -> None:
    schedule = BY_NAME[name]
    for p in range(1, 10):
        for m in (1, 2, 3, 8, 9, 20, 36):
            if schedule.fits(p, m):
                continue
            step = simulate(schedule, _even(p), m, Link(1000.0, 0.01))
            np.testing.assert_allclose(step.busy, 3.0 * m)
            assert step.seconds >= 3.0 * m and np.isfinite(step.seconds)


def test_orders_that_wait_for_each_other_are_told() -> None:
    backward_first = orders.Schedule(
        "wrong", 1, False, lambda rank, workers, m: np.asarray([orders.B, orders.F], np.int16)
    )
    with pytest.raises(ValueError, match="wait for each other"):
        simulate(backward_first, _even(2), 1, FREE)
    with pytest.raises(ValueError, match="DualPipeV: needs 8 microbatches or more"):
        simulate(BY_NAME["DualPipeV"], _even(4), 7, FREE)


def test_groups_that_learn_alone_wait_for_the_longest_only() -> None:
    costs = [
        GroupCost(1, 2, 0.5, 0.1, 0.0, 100, input_gradient_s=0.0, update_s=0.8),
        GroupCost(1, 2, 0.0, 0.0, 0.2, 0, input_gradient_s=1.0, update_s=0.0),
    ]
    step, fill = decoupled.pipelined(costs, 4, FREE)
    assert step.seconds == pytest.approx(4 * (1 + 2 + 0.5 + 0.1) + 0.8)
    assert step.busy.tolist() == pytest.approx([15.2, 4 * (1 + 1 + 0.2)])
    assert fill == pytest.approx(3.8 + 2.2)
    assert decoupled.asynchronous(costs, 4, FREE).seconds == pytest.approx(step.seconds)


def test_a_slow_link_is_the_pace_of_all_but_async() -> None:
    costs, link = [GroupCost(1, 2, activation_bytes=100)] * 3, Link(20.0)
    step, _ = decoupled.pipelined(costs, 1, link)
    assert step.seconds == pytest.approx(5.0) and step.nbytes == 200
    coded, _ = decoupled.pipelined(costs, 1, link, ratio=16)
    assert coded.seconds == pytest.approx(3.0) and coded.nbytes == pytest.approx(200 / 16)
    free = decoupled.asynchronous(costs, 1, link)
    assert free.seconds == 3.0 and free.nbytes == 2 * 60


def test_a_slot_is_free_once_its_batch_is_trained_on() -> None:
    # Two slots: every second batch waits for 1 of transfer, 10 of latency and 3 of work.
    costs = [GroupCost(1, 2, activation_bytes=100)] * 2
    step, fill = decoupled.pipelined(costs, 1, Link(100.0, 10.0))
    assert step.seconds == pytest.approx((1 + 10 + 3) / 2) and fill == 3 + 1 + 10 + 3


def test_a_slow_consumer_holds_up_its_producer() -> None:
    costs = [GroupCost(1, 1), GroupCost(1, 1), GroupCost(2, 3)]
    step, fill = decoupled.pipelined(costs, 1, FREE)
    assert step.seconds == pytest.approx(5.0) and fill == 9.0


def test_a_workers_own_part_in_messages() -> None:
    # Seconds of a message of 100 bytes at each end: 0.25 + 100 * 0.0025.
    link, own = Link(math.inf, 0.0, 0.25, 0.0025), 0.5
    # One microbatch: four passes of two workers, each at one border.
    assert simulate(BY_NAME["1F1B"], _even(2), 1, link).seconds == 2 * 3.0 + 4 * own
    # Between two others a worker has two borders.
    step = simulate(BY_NAME["1F1B"], _even(3), 1, link)
    assert step.busy.tolist() == [3 + 2 * own, 3 + 4 * own, 3 + 2 * own]
    # A codec spares copying, not the message.
    paces = [decoupled.pipelined(_even(3), 1, link, ratio)[0].seconds for ratio in (1.0, 4.0)]
    assert paces == [3 + 2 * own, 3 + 2 * (0.25 + 0.0625)]


def test_what_stays_on_a_worker_is_no_message() -> None:
    # ZBV's two chunks meet on the last worker.
    link = Link(math.inf, 0.0, 1.0)
    busy = simulate(BY_NAME["ZBV"], _even(2), 4, link).busy - simulate(BY_NAME["ZBV"], _even(2), 4, FREE).busy
    # Worker 1: both chunks' one border; worker 2 likewise; each is crossed forward and back by 4 microbatches.
    assert busy.tolist() == [16.0, 16.0]


def test_jitter() -> None:
    drawn = factors(np.random.default_rng(1), 0.2, (200_000,))
    assert drawn.min() > 0 and abs(drawn.mean() - 1) < 0.003 and abs(drawn.std() - 0.2) < 0.003
    plain = simulate(BY_NAME["1F1B"], _even(4), 8, FREE).seconds
    some, again, more = (simulate(BY_NAME["1F1B"], _even(4), 8, FREE, j).seconds for j in (0.1, 0.1, 0.3))
    assert some == again
    assert 1.01 * plain < some < more
    # One worker waits for nobody: what varies about a mean takes the mean.
    assert abs(simulate(BY_NAME["1F1B"], _even(1), 8, FREE, 0.1).seconds / 24 - 1) < 0.01
    # Slots between the groups even out what a schedule that waits has to pay for.
    local = decoupled.pipelined(_even(4), 1, FREE, jitter=0.1)[0].seconds
    assert 3.0 < local < 3.0 * some / plain
