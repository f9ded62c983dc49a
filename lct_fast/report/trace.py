"""The first steps of a run's Chrome trace, as rows of spans."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lct_fast.report.run import number

# First match wins: "critic backward" is the critic's.
KINDS = {
    "critic": ("critic",),
    "optimiser": ("optimi", "update"),
    "backward": ("backward",),
    "forward": ("forward",),
    "transfer": ("send", "recv", "receive", "copy", "transfer", "encode", "decode", "link"),
}
# A larger trace belongs in a trace viewer; reading it here would take seconds and gigabytes.
LARGEST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Span:
    """One span: its ``row`` (the group), ``name``, ``kind`` (of KINDS or "other"); times in seconds."""

    row: str
    name: str
    kind: str
    start: float
    seconds: float
    step: int | None


def read_trace(path: Path, steps: int = 3, limit: int = 300) -> list[Span]:
    """Spans of the first ``steps`` steps in order of time, at most ``limit``; time counts from the first.

    Reads complete events ("ph": "X") of a Chrome trace, an object or a bare list. The row is ``args.group``
    where an event has it, else the name of its thread. ``args.step`` or ``args.batch`` says which step an
    event belongs to; a trace without it gives its first ``limit`` spans.

    Raises ValueError, one line, for a file that is too large or no trace.
    """
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        raise ValueError(
            f"{path.name} has {size / 2**20:.0f} MiB, at most 64 are drawn here; open it in a trace viewer"
        )
    try:
        trace = json.loads(path.read_bytes().decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        raise ValueError(
            f"{path.name} could not be read: expected JSON of a Chrome trace (cut short?)"
        ) from None
    events = trace.get("traceEvents") if isinstance(trace, dict) else trace
    if not isinstance(events, list):
        raise ValueError(f"{path.name} could not be read: expected a list of events under traceEvents")
    events = [event for event in events if isinstance(event, dict)]
    threads = {
        (str(event.get("pid")), str(event.get("tid"))): str(_args(event).get("name"))
        for event in events
        if event.get("ph") == "M" and event.get("name") == "thread_name"
    }
    spans = [span for event in events if (span := _span(event, threads)) is not None]
    spans.sort(key=lambda span: (span.start, span.row))
    first = sorted({span.step for span in spans if span.step is not None})[:steps]
    if first:
        spans = [span for span in spans if span.step in first]
    spans = spans[:limit]
    origin = spans[0].start if spans else 0.0
    return [Span(s.row, s.name, s.kind, s.start - origin, s.seconds, s.step) for s in spans]


def rows(spans: list[Span]) -> list[str]:
    """The rows of ``spans``, "group 2" before "group 10"."""
    return sorted({span.row for span in spans}, key=_natural)


def _natural(text: str) -> list[tuple[bool, int, str]]:
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _args(event: dict[str, Any]) -> dict[str, Any]:
    args = event.get("args")
    return args if isinstance(args, dict) else {}


def _span(event: dict[str, Any], threads: dict[tuple[str, str], str]) -> Span | None:
    start, length = number(event.get("ts")), number(event.get("dur"))
    if event.get("ph") != "X" or start is None or length is None or length < 0:
        return None
    args = _args(event)
    thread = (str(event.get("pid")), str(event.get("tid")))
    group = args.get("group")
    row = threads.get(thread, f"thread {thread[1]}") if group is None else f"group {group}"
    name = str(event.get("name", ""))
    lower = name.lower()
    kind = next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "other")
    step = number(args.get("step", args.get("batch")))
    # Chrome traces count microseconds.
    return Span(row, name, kind, start * 1e-6, length * 1e-6, None if step is None else int(step))
