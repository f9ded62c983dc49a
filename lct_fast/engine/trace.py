"""The first ticks of a run as a Chrome trace, which Perfetto opens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lct_fast.engine.meter import GroupMeter

# In the order they stand under their group.
ROWS = ("compute", "send", "receive", "send feedback", "receive feedback")


def write_trace(path: Path, meters: Sequence[GroupMeter], offsets: Sequence[float] | None = None) -> None:
    """Writes the spans of every group: a process in the trace is a group, its rows are ``ROWS``.

    Args:
        path: file to write.
        meters: one a group, in order.
        offsets: seconds that each group's clock is ahead of the first group's; None where they share one.
    """
    shift = offsets or [0.0] * len(meters)
    starts = [e.start - s for meter, s in zip(meters, shift, strict=True) for e in meter.events]
    origin = min(starts, default=0.0)
    events: list[dict[str, Any]] = []
    for meter, ahead in zip(meters, shift, strict=True):
        process = meter.index + 1
        events.append(_name("process_name", process, None, f"group {process}"))
        for row in sorted({e.row for e in meter.events}, key=ROWS.index):
            name = f"group {process}" if row == "compute" else f"group {process} {row}"
            events.append(_name("thread_name", process, _thread(process, row), name))
        for e in meter.events:
            events.append(
                {
                    "name": e.name,
                    "cat": "group",
                    "ph": "X",
                    "pid": process,
                    "tid": _thread(process, e.row),
                    # To the nanosecond: rounded more, neighbours would overlap.
                    "ts": round((e.start - ahead - origin) * 1e6, 3),
                    "dur": round((e.end - e.start) * 1e6, 3),
                    "args": {"batch": e.batch},
                }
            )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _thread(process: int, row: str) -> int:
    """A thread's number, unique in the trace; 0 would be the idle task."""
    return process * 10 + ROWS.index(row)


def _name(kind: str, process: int, thread: int | None, name: str) -> dict[str, Any]:
    event: dict[str, Any] = {"name": kind, "ph": "M", "pid": process, "args": {"name": name}}
    return event if thread is None else event | {"tid": thread}
