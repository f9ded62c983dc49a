"""How equal the halves of `benchmarks.pipeline` are, and what the critic costs: CPU time of one thread."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.pipeline.local import LocalGroup
from benchmarks.pipeline.model import Task
from benchmarks.pipeline.rivals import Setting


class Balance(NamedTuple):
    """Seconds of CPU a batch: each group with its update, and group 1 without its critic."""

    group1: float
    group2: float
    group1_bare: float

    @property
    def imbalance(self) -> float:
        """By how much the faster group undercuts the slower, as a share of the slower."""
        return abs(self.group1 - self.group2) / max(self.group1, self.group2)

    @property
    def critic_tax(self) -> float:
        """Share of both groups' busy time that the critic takes; not below 0, where noise would put it."""
        return max(self.group1 - self.group1_bare, 0.0) / (self.group1 + self.group2)


def medians(parts: list[Callable[[], object]], samples: int) -> list[float]:
    """Median CPU seconds of each, in turns; the first turn warms up."""
    taken: list[list[float]] = [[] for _ in parts]
    for turn in range(samples + 1):
        for times, part in zip(taken, parts, strict=True):
            begin = time.process_time()
            part()
            if turn:
                times.append(time.process_time() - begin)
    return [statistics.median(times) for times in taken]


def measure(task: Task, setting: Setting, samples: int) -> Balance:
    """Both groups of ``setting``, in turns in this process."""
    first, second, bare = (LocalGroup(task, setting, k) for k in (0, 1, 0))
    x, y = task.data(setting.format)[0]
    h = task.states(setting.format)[0]
    # Any dense gradient at the cut costs the same.
    gradient = torch.randn_like(h) / h.numel()

    def layers_only() -> None:
        bare.group.layers(x).backward(gradient)
        bare.optimizer.step()
        bare.optimizer.zero_grad()

    return Balance(*medians([lambda: first.step(x, y), lambda: second.step(h, y), layers_only], samples))
