"""The order in which each worker of a pipeline schedule does its work.

An order is a row of codes ``kind * CHUNKS + chunk``; microbatches are taken in turn, so codes say all. Sources: GPipe
arXiv 1811.06965; 1F1B arXiv 1806.03377; interleaved arXiv 2104.04473; zero bubble (ZB1P, ZBV) arXiv 2401.10241;
DualPipeV, DeepSeek's DualPipe (arXiv 2412.19437) cut in half. Orders are those of torch.distributed.pipelining; a test
compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int16]

# Most chunks of layers on one worker.
CHUNKS = 2
FORWARD, BACKWARD, INPUT, WEIGHT = range(4)
NOTHING = -1


def _codes(kind: int, chunk: int = 0) -> int:
    return kind * CHUNKS + chunk


F, B, I, W = (_codes(kind) for kind in range(4))  # noqa: E741 (the schedules' own letter for input gradients)
F1, B1, I1, W1 = (_codes(kind, 1) for kind in range(4))


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule.

    Attributes:
        name: as it is known.
        chunks: runs of layers on each worker.
        vee: whether the second chunk runs back from the last worker to the first, not again from the first.
        order: (worker, workers, microbatches) -> codes.
        fits: (workers, microbatches) -> why it can't be used, or None.
    """

    name: str
    chunks: int
    vee: bool
    order: Callable[[int, int, int], Codes]
    fits: Callable[[int, int], str | None] = lambda workers, microbatches: None


def _phases(*phases: tuple[Sequence[int], int]) -> Codes:
    """Each phase is a pattern and how often it is repeated."""
    return np.concatenate([np.tile(np.asarray(p, np.int16), max(n, 0)) for p, n in phases])


def microbatches(codes: Codes) -> NDArray[np.int32]:
    """The microbatch of each entry: forward and backward passes of a chunk take them in turn, and a weight gradient is
    of the microbatch whose input gradient was made without it."""
    numbers = np.zeros(len(codes), np.int32)
    kinds = codes // CHUNKS
    for chunk in range(CHUNKS):
        mine = codes % CHUNKS == chunk
        for taken in (mine & (kinds == FORWARD), mine & ((kinds == BACKWARD) | (kinds == INPUT))):
            numbers[taken] = np.arange(taken.sum())
        weights, inputs = mine & (kinds == WEIGHT), mine & (kinds == INPUT)
        numbers[weights] = numbers[inputs][: weights.sum()]
    return numbers


def _gpipe(rank: int, workers: int, m: int) -> Codes:
    return _phases(([F], m), ([B], m))


def _one_f_one_b(rank: int, workers: int, m: int) -> Codes:
    ahead = min(m, workers - rank)
    return _phases(([F], ahead), ([B, F], m - ahead), ([B], ahead))


def _interleaved(rank: int, workers: int, m: int) -> Codes:
    rounds = max(1, m // workers)
    turn = m // rounds
    forward = np.tile(np.repeat(np.asarray([F, F1], np.int16), turn), rounds)
    backward = np.tile(np.repeat(np.asarray([B1, B], np.int16), turn), rounds)
    ahead = min(turn + 2 * (workers - 1 - rank), 2 * m)
    both = np.empty(2 * (2 * m - ahead), np.int16)
    both[::2], both[1::2] = forward[ahead:], backward[: 2 * m - ahead]
    return np.concatenate([forward[:ahead], both, backward[2 * m - ahead :]])


def _zb1p(rank: int, workers: int, m: int) -> Codes:
    ahead = min(m, workers - 1 - rank)
    # Weight gradients come ``rank`` input gradients late: that is the memory of 1F1B.
    parts = []
    for j in range(m):
        parts += [F, I] if j < m - ahead else [I]
        if j >= rank:
            parts.append(W)
    return _phases(([F], ahead), (parts, 1), ([W], min(rank, m)))


def _zbv(rank: int, workers: int, m: int) -> Codes:
    # Fewer microbatches than fill the pipeline: the schedule of as many as do, without those that are not there.
    full = max(2 * workers - 1, m)
    behind = workers - rank
    ahead = 2 * behind - 1 + rank
    # Both chunks' forward passes end together: chunk 0's stop earlier, as it started earlier.
    stable = full - rank - behind
    forward = full - ahead
    codes = _phases(
        ([F], 2 * behind - 1),
        ([F1, F], rank),
        ([F1, I1, W1], behind),
        ([F, I, W, F1, I1, W1], forward),
        ([I, W, F1, I1, W1], stable - forward),
        ([I, I1], rank),
    )
    inputs, inputs1 = full - behind, full
    weights, weights1 = stable, behind + stable
    tail = _phases(([I, W], full - inputs), ([W1], inputs1 - weights1), ([W], full - weights - behind))
    whole = np.concatenate([codes, tail])
    return whole[microbatches(whole) < m]


def _dualpipev(rank: int, workers: int, m: int) -> Codes:
    behind = workers - 1 - rank
    pending: list[int] = []
    codes: list[int] = [F] * (2 * behind) + [F, F1] * (rank + 1)

    def backward(chunk: int, split: bool) -> None:
        codes.append(_codes(INPUT if split else BACKWARD, chunk))
        if split:
            pending.append(_codes(WEIGHT, chunk))

    def weight() -> None:
        if pending:
            codes.append(pending.pop(0))

    for _ in range(behind):
        backward(1, True)
        weight()
        codes.append(F1)
    codes += [F, B1, F1, B] * (m - 2 * workers + rank + 1)
    codes += [B1, F1, B] * behind
    split = False
    for i in range(rank + 1):
        half = i == (rank + 1) // 2
        split |= half and rank % 2 == 1
        backward(1, split)
        split |= half and rank % 2 == 0
        backward(0, split)
    for _ in range(behind):
        weight()
        backward(0, split)
    for _ in range(rank + 1):
        weight()
    return np.asarray(codes, np.int16)


def _rounds(workers: int, m: int) -> str | None:
    if m % max(1, m // workers):
        return f"{m} microbatches do not divide into rounds of {workers} workers"
    return None


def _twice(workers: int, m: int) -> str | None:
    return None if m >= 2 * workers else f"needs {2 * workers} microbatches or more"


SCHEDULES = (
    Schedule("GPipe", 1, False, _gpipe),
    Schedule("1F1B", 1, False, _one_f_one_b),
    Schedule("interleaved 1F1B", 2, False, _interleaved, _rounds),
    Schedule("ZB1P", 1, False, _zb1p),
    Schedule("ZBV", 2, True, _zbv),
    Schedule("DualPipeV", 2, True, _dualpipev, _twice),
)
