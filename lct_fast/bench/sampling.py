"""Times of contenders that take turns, with caches flushed before each."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from lct_fast.bench import machine
from lct_fast.bench.case import Contender
from lct_fast.bench.machine import Watch

# Attempts a sample before the machine is called busy.
ATTEMPTS = 4


class Percentiles(NamedTuple):
    """Of a sample of times, in microseconds."""

    p20: float
    p50: float
    p80: float
    samples: int


class Sample(NamedTuple):
    """Microseconds, and whether no other program took a core meanwhile."""

    us: float
    undisturbed: bool = True


def percentiles(times: Sequence[float | Sample]) -> Percentiles:
    """p20, median and p80. Raises ValueError for fewer than two times."""
    if len(times) < 2:
        raise ValueError(f"percentiles need at least 2 samples, got {len(times)}")
    us = [each.us if isinstance(each, Sample) else each for each in times]
    cuts = statistics.quantiles(us, n=10, method="inclusive")
    return Percentiles(cuts[1], statistics.median(us), cuts[7], len(us))


def turns(count: int, rounds: int) -> Iterator[int]:
    """A B C, B C A, ...: `rounds` times each of `count`."""
    return ((i + k) % count for i in range(rounds) for k in range(count))


def _progress(order: Sequence[int], about: str) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        # A GPU machine may have little more than torch.
        return order
    return tqdm(order, desc=about, leave=False, disable=None)


class Sampler:
    """Takes samples on a device, "cpu" or "cuda", and watches who else uses the machine meanwhile."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.watch = Watch()
        size = 1 << 26
        if device == "cuda":
            # The flush also keeps the device busy while the host enqueues, so that no launch gap is timed.
            size = max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 1 << 28)
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def take(
        self, contenders: Sequence[Contender], runs: Sequence[Callable[[], Any]], samples: int, about: str
    ) -> list[list[Sample]]:
        """`samples` times of each contender, by `runs[i]`, which is its `run` or a graph of it."""
        order = list(turns(len(contenders), samples))
        bar = _progress(order, about)
        found: list[list[Sample]] = [[] for _ in contenders]
        with self.watch:
            if self.device == "cuda":
                events = [(i, self._on_device(contenders[i], runs[i])) for i in bar]
                torch.cuda.synchronize()
                for i, (begin, end) in events:
                    found[i].append(Sample(begin.elapsed_time(end) * 1e3))
            else:
                for i in bar:
                    found[i].append(self._on_host(contenders[i], runs[i]))
        return found

    def _prepare(self, contender: Contender) -> None:
        if contender.reset:
            contender.reset()
        self._flush.zero_()

    def _on_host(self, contender: Contender, run: Callable[[], Any]) -> Sample:
        for _ in range(ATTEMPTS):
            self._prepare(contender)
            before = machine.preempted()
            begin = time.perf_counter()
            run()
            took = (time.perf_counter() - begin) * 1e6
            if machine.preempted() == before:
                return Sample(took)
        return Sample(took, undisturbed=False)

    def _on_device(
        self, contender: Contender, run: Callable[[], Any]
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._prepare(contender)
        begin.record()
        run()
        end.record()
        return begin, end
