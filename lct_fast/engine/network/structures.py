"""Structural optimisation: every exit is a smaller network; which is the smallest that will do (arXiv 2102.01963)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from lct_fast.engine.network.exits import Progressive, accuracy
from lct_fast.engine.network.group import Group, exit_module, parameter_count
from lct_fast.models.macs import macs

# Seconds that one exit is timed for, and calls at the least.
_TIMED = 0.3
_CALLS = 20


@dataclass(frozen=True, slots=True)
class Structure:
    """An exit as a network of its own: groups 1..exit and the head on the last of them.

    Attributes:
        exit: its number, from 1.
        accuracy: fraction of the samples it classifies rightly.
        parameters: trainable ones.
        macs: multiply-accumulates of one sample's forward pass.
        latency: seconds a forward pass takes here, (20th percentile, median, 80th percentile).
    """

    exit: int
    accuracy: float
    parameters: int
    macs: int
    latency: tuple[float, float, float]


def structures(
    groups: Sequence[Group], logits: Sequence[Tensor], labels: Tensor, rows: int = 1
) -> list[Structure]:
    """Every exit of a trained network, from the smallest.

    Args:
        groups: what ``split`` returned, trained; their modes are kept.
        logits: of every exit on some samples [N, V], as ``collect`` gives them.
        labels: of these samples.
        rows: samples in the batch whose forward pass is timed.

    Raises:
        ValueError: rows < 1.
    """
    if rows < 1:
        raise ValueError(f"latency is measured on batches of 1 or more, got {rows}")
    x = groups[0].cut.example[:1]
    x = x.expand(rows, *x.shape[1:]).contiguous()
    found = []
    for (k, _), z in zip(_exits(groups), logits, strict=True):
        module = exit_module(list(groups), k)
        cost = macs(module, tuple(x.shape[1:]), x.dtype)
        found.append(Structure(k, accuracy(z, labels), parameter_count(module), cost, latency(module, x)))
    return found


@torch.no_grad()
def latency(module: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """Seconds of ``module(x)`` in evaluation mode, (20th percentile, median, 80th percentile); its mode is kept."""
    mode = module.training
    seconds: list[float] = []
    module.eval()
    try:
        begun = time.perf_counter()
        while len(seconds) < _CALLS or time.perf_counter() - begun < _TIMED:
            start = time.perf_counter()
            module(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            seconds.append(time.perf_counter() - start)
    finally:
        module.train(mode)
    # The first calls warm up.
    fifths = quantiles(seconds[_CALLS // 4 :], n=5)
    return fifths[0], median(seconds[_CALLS // 4 :]), fifths[3]


def smallest(
    found: Sequence[Structure], under_macs: int | None = None, min_accuracy: float | None = None
) -> Structure:
    """The exit of fewest MACs that reaches ``min_accuracy``; without it, the most accurate of those within the limit.

    Args:
        found: exits, as ``structures`` gives them.
        under_macs: most multiply-accumulates of a sample.
        min_accuracy: least accuracy, a fraction.

    Raises:
        ValueError: no exit is small and accurate enough; says which come closest.
    """
    fits = [s for s in found if under_macs is None or s.macs <= under_macs]
    if not fits:
        least = min(found, key=lambda s: s.macs)
        raise ValueError(
            f"no exit has {under_macs:,} MACs or fewer: the smallest, exit {least.exit}, has {least.macs:,}"
        )
    if min_accuracy is None:
        return max(fits, key=lambda s: (s.accuracy, -s.macs))
    good = [s for s in fits if s.accuracy >= min_accuracy]
    if not good:
        best = max(fits, key=lambda s: s.accuracy)
        within = "" if under_macs is None else f" within {under_macs:,} MACs"
        raise ValueError(
            f"no exit reaches an accuracy of {min_accuracy:.2%}{within}: the best, exit {best.exit}, has "
            f"{best.accuracy:.2%}"
        )
    return min(good, key=lambda s: s.macs)


def progressive_macs(groups: Sequence[Group], result: Progressive) -> float:
    """MACs a sample takes on average in progressive inference, the heads it passes on its way included."""
    example = groups[0].cut.example
    passed, total = 0, 0.0
    for (k, group), share in zip(_exits(groups), result.leaving, strict=True):
        cost = passed + macs(exit_module(list(groups), k), tuple(example.shape[1:]), example.dtype)
        total += share * cost
        # The head of an exit that was not taken is paid for all the same.
        passed += 0 if group.last else macs(group.critic, group.shape)
    return total


def _exits(groups: Sequence[Group]) -> list[tuple[int, Group]]:
    """Groups that have a head, with their numbers."""
    return [(k, group) for k, group in enumerate(groups, 1) if group.has_exit]
