"""Where a step's time and bytes go."""

from __future__ import annotations

import json
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

# A critic's own forward, backward and update, everything plain back-propagation would not do.
_CRITIC_SPANS = ("critic", "critic update")


class Meter:
    """Times named spans of each group and counts bytes.

    Host clock: on a CUDA device spans are the time to launch, so shares of time are only given for CPU runs.

    Args:
        groups: number of groups.
        trace_steps: how many of the first steps (after the very first, which warms up) the trace keeps.
    """

    def __init__(self, groups: int, trace_steps: int = 20) -> None:
        self.groups = groups
        self.trace_steps = trace_steps
        self.steps = 0
        self.samples = 0
        self.wire_bytes = 0
        self.raw_bytes = 0
        self.feedback_bytes = 0
        self.busy: dict[str, float] = defaultdict(float)
        self.step_seconds: deque[float] = deque(maxlen=1000)
        self._events: list[dict[str, object]] = []
        self._origin = time.perf_counter()

    @contextmanager
    def span(self, group: int, name: str) -> Iterator[None]:
        """Charges the time inside to ``name`` of group ``group`` (from 0)."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            # The last group's head is the network's own.
            own = name if group < self.groups - 1 or name not in _CRITIC_SPANS else "head"
            self.busy[own] += end - start
            if 0 < self.steps <= self.trace_steps:
                self._events.append(
                    {
                        "name": own,
                        "cat": "group",
                        "ph": "X",
                        "pid": 0,
                        "tid": group + 1,
                        "ts": round((start - self._origin) * 1e6, 1),
                        "dur": round((end - start) * 1e6, 1),
                        "args": {"batch": self.steps},
                    }
                )

    @contextmanager
    def step(self, samples: int) -> Iterator[None]:
        """One batch of ``samples``."""
        start = time.perf_counter()
        yield
        self.step_seconds.append(time.perf_counter() - start)
        self.steps += 1
        self.samples += samples

    def critic_tax(self) -> float | None:
        """Share of busy time spent in critics; None before the first step."""
        total = sum(self.busy.values())
        return sum(self.busy[s] for s in _CRITIC_SPANS) / total if total else None

    def step_seconds_median(self) -> float | None:
        """Median seconds of the last 1,000 steps."""
        return median(self.step_seconds) if self.step_seconds else None

    def per_sample(self, count: int) -> float:
        """``count`` divided by the samples seen."""
        return count / self.samples if self.samples else 0.0

    def write_trace(self, path: Path) -> None:
        """Writes the spans as a Chrome trace (opens in Perfetto): one process, one row a group."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": k + 1, "args": {"name": f"group {k + 1}"}}
            for k in range(self.groups)
        ]
        path.write_text(json.dumps({"traceEvents": [*names, *self._events], "displayTimeUnit": "ms"}))
