"""Timing on a device or the host: contenders interleaved, caches cold, a roofline from the same run."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]


class Percentiles(NamedTuple):
    """Of a sample of times, in microseconds."""

    p20: float
    p50: float
    p80: float
    samples: int


def percentiles(times: list[float]) -> Percentiles:
    if len(times) < 2:
        raise ValueError(f"percentiles need at least 2 samples, got {len(times)}")
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return Percentiles(cuts[1], statistics.median(times), cuts[7], len(times))


class Replay(NamedTuple):
    """Something to time, and what it writes."""

    run: Run
    out: Any


def ready(run: Run, device: str) -> Replay:
    """Warmed up, and on a device captured into a CUDA graph."""
    if device != "cuda":
        run()
        return Replay(run, run())
    # Capture wants what is lazy (compilation, handles, workspaces) done on a side stream before it.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    graph.replay()
    torch.cuda.synchronize()
    return Replay(graph.replay, out)


def interleaved(contenders: Mapping[str, Run], samples: int, device: str) -> dict[str, Percentiles]:
    """Time each contender `samples` times, in turns (A B C, B C A, ...), with caches flushed before each."""
    names = list(contenders)
    turns = [(i + k) % len(names) for i in range(samples) for k in range(len(names))]
    take = _device_times if device == "cuda" else _host_times
    times: dict[str, list[float]] = {name: [] for name in names}
    for name, us in take([(names[turn], contenders[names[turn]]) for turn in turns]):
        times[name].append(us)
    return {name: percentiles(taken) for name, taken in times.items()}


def _device_times(turns: list[tuple[str, Run]]) -> list[tuple[str, float]]:
    # The flush also keeps the device busy while the host enqueues, so that no launch gap is timed.
    flush = torch.empty(max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 1 << 28), dtype=torch.int8)
    flush = flush.cuda()
    events = []
    for name, run in turns:
        begin, end = _event(), _event()
        flush.zero_()
        begin.record()
        run()
        end.record()
        events.append((name, begin, end))
    torch.cuda.synchronize()
    return [(name, begin.elapsed_time(end) * 1e3) for name, begin, end in events]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _host_times(turns: list[tuple[str, Run]]) -> list[tuple[str, float]]:
    flush = torch.empty(1 << 26, dtype=torch.int8)
    taken = []
    for name, run in turns:
        flush.zero_()
        begin = time.perf_counter()
        run()
        taken.append((name, (time.perf_counter() - begin) * 1e6))
    return taken


@dataclass(frozen=True)
class Roofline:
    """What this machine reaches: bytes a second, read and written, and operations a second by dtype."""

    bytes_per_s: float
    flops_per_s: Mapping[torch.dtype, float]

    def least_us(self, traffic: float, flops: float, dtype: torch.dtype) -> float:
        """The time that neither memory nor arithmetic allows to undercut."""
        return max(traffic / self.bytes_per_s, flops / self.flops_per_s[dtype]) * 1e6


def roofline(
    device: str, dtypes: tuple[torch.dtype, ...], size: int = 8192, copied: int = 1 << 30
) -> Roofline:
    """Measure a copy of `copied` bytes and a product of `size` square matrices in each dtype."""
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    contenders: dict[str, Replay] = {"copy": ready(lambda: target.copy_(source), device)}
    for dtype in dtypes:
        a = torch.randn(size, size, device=device).to(dtype)
        contenders[str(dtype)] = ready(lambda a=a: a @ a, device)  # type: ignore[misc]
    took = {
        name: interleaved({name: replay.run}, 10, device)[name].p50 for name, replay in contenders.items()
    }
    return Roofline(
        2 * copied / took["copy"] * 1e6,
        {dtype: 2 * size**3 / took[str(dtype)] * 1e6 for dtype in dtypes},
    )
