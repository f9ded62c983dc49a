"""The orders of pipeline schedules against those that torch makes."""

from typing import Any

import numpy as np
import pytest
from torch.distributed.pipelining import schedules

from lct_fast.planner import orders

KINDS = {"F": orders.FORWARD, "B": orders.BACKWARD, "I": orders.INPUT, "W": orders.WEIGHT}
BY_NAME = {s.name: s for s in orders.SCHEDULES}
TORCH = {
    "interleaved 1F1B": schedules.ScheduleInterleaved1F1B,
    "ZB1P": schedules.ScheduleInterleavedZeroBubble,
    "ZBV": schedules.ScheduleZBVZeroBubble,
    "DualPipeV": schedules.ScheduleDualPipeV,
}


def _torch_order(name: str, rank: int, workers: int, m: int) -> list[tuple[int, int, int]]:
    """(kind, chunk, microbatch) of every action, out of torch's own class."""
    cls: Any = TORCH[name]
    made = cls.__new__(cls)
    made.pp_group_size, made._n_microbatches = workers, m
    made.n_local_stages = BY_NAME[name].chunks
    made._num_stages = made.num_stages = workers * made.n_local_stages
    made.number_of_rounds = max(1, m // workers)
    made.microbatches_per_round = m // made.number_of_rounds
    found = []
    for action in made._calculate_single_rank_operations(rank):
        for a in () if action is None else action.sub_actions or (action,):
            # The first chunk of a worker lies in the first half of the stages.
            kind = KINDS[a.computation_type.value]
            found.append((kind, int(a.stage_index >= workers), a.microbatch_index))
    return found


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize(("workers", "m"), [(2, 4), (4, 8), (4, 12), (3, 9), (4, 4), (8, 16), (4, 3), (5, 2)])
def test_orders_are_torchs(name: str, workers: int, m: int) -> None:
    schedule = BY_NAME[name]
    if schedule.fits(workers, m):
        assert name in ("DualPipeV", "interleaved 1F1B")
        return
    for rank in range(workers):
        codes = schedule.order(rank, workers, m)
        mine = zip(codes // orders.CHUNKS, codes % orders.CHUNKS, orders.microbatches(codes), strict=True)
        assert [tuple(map(int, op)) for op in mine] == _torch_order(name, rank, workers, m)


@pytest.mark.parametrize("schedule", orders.SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize(("workers", "m"), [(1, 4), (4, 16), (7, 28), (16, 32), (16, 5)])
def test_every_microbatch_is_done_once(schedule: orders.Schedule, workers: int, m: int) -> None:
    if schedule.name == "DualPipeV" and m < 2 * workers:
        assert schedule.fits(workers, m) == f"needs {2 * workers} microbatches or more"
        return
    assert schedule.fits(workers, m) is None
    for rank in range(workers):
        codes = schedule.order(rank, workers, m)
        counts = np.bincount(codes, minlength=4 * orders.CHUNKS).reshape(4, orders.CHUNKS)
        forward, whole, inputs, weights = counts[:, : schedule.chunks]
        assert (forward == m).all() and (whole + inputs == m).all() and (weights == inputs).all()


def test_one_forward_one_backward() -> None:
    f, b = orders.F, orders.B
    order = BY_NAME["1F1B"].order
    assert order(0, 3, 4).tolist() == [f, f, f, b, f, b, b, b]
    assert order(2, 3, 4).tolist() == [f, b, f, b, f, b, f, b]
    assert BY_NAME["GPipe"].order(1, 3, 2).tolist() == [f, f, b, b]
