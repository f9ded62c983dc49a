"""A run's Chrome trace, as rows of spans, and the steps of it that are worth a look."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lct_fast.report.run import number

# First match wins: "critic backward" is the critic's. The last group's head stands where a critic would.
KINDS = {
    "wait": ("wait",),
    "critic": ("critic", "head"),
    "optimiser": ("optimi", "update"),
    "backward": ("backward",),
    "forward": ("forward",),
    "coding": ("encode", "decode", "pack"),
    "transfer": ("send", "recv", "receive", "copy", "transfer", "link"),
}
# A larger trace belongs in a trace viewer; reading it here would take seconds and gigabytes.
LARGEST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Span:
    """One span: its ``row`` (a group, or what a group does beside), ``name``, ``kind`` (of KINDS or "other"); times in
    seconds."""

    row: str
    name: str
    kind: str
    start: float
    seconds: float
    step: int | None

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True)
class Excerpt:
    """Some steps of a trace: ``spans`` cut off at 0 and ``seconds``; ``steps`` are the first and last one of row
    ``of``, None where the spans name none."""

    spans: list[Span]
    seconds: float
    steps: tuple[int, int] | None = None
    of: str = ""


@dataclass(frozen=True)
class Idle:
    """How long a row worked and waited within an excerpt, in seconds.

    ``gaps`` are the times, (start, end), in which nothing is recorded at all; ``waits`` are the others by name.
    """

    row: str
    busy: float
    waits: dict[str, float]
    gaps: list[tuple[float, float]]

    @property
    def between(self) -> float:
        """Seconds in which nothing is recorded."""
        return sum(end - start for start, end in self.gaps)

    @property
    def share(self) -> float:
        """The bubble: the part of the time, 0..1, in which the row did no work."""
        idle = sum(self.waits.values()) + self.between
        return idle / (self.busy + idle) if idle else 0.0


def read_trace(path: Path) -> list[Span]:
    """All spans in order of time, which counts from the first.

    Reads complete events ("ph": "X") of a Chrome trace, an object or a bare list. The row is ``args.group``
    where an event has it, else the name of its thread. ``args.step`` or ``args.batch`` says which step an
    event belongs to.

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
    origin = spans[0].start if spans else 0.0
    return [replace(span, start=span.start - origin) for span in spans]


def excerpt(spans: Sequence[Span], steps: int = 4, limit: int = 300) -> Excerpt:
    """Up to ``steps`` whole steps in which every row is at work, in at most ``limit`` spans.

    A step lasts from where the last row begins a batch to where it begins the next. Only the later half is looked at,
    as a pipeline has to fill first; of all runs of so many steps there the one of median length is taken, so that none
    with an evaluation in it is. In a trace too short for one step, or without steps, all spans are taken, the longest
    ``limit``.
    """
    main = [row for row, _ in lanes(rows(spans))]
    if main:
        starts = _step_starts(spans, main)
        starts = starts[(len(starts) - 1) // 2 :]
        for count in range(min(steps, len(starts) - 1), 0, -1):
            runs = sorted(zip(starts, starts[count:], strict=False), key=lambda run: run[1][1] - run[0][1])
            (first, begin), (last, end) = runs[(len(runs) - 1) // 2]
            inside = _cut(spans, begin, end)
            if len(inside) <= limit:
                return Excerpt(inside, end - begin, (first, last - 1), main[-1])
    known = sorted({span.step for span in spans if span.step is not None})
    longest = sorted(spans, key=lambda span: -span.seconds)[:limit]
    return Excerpt(
        sorted(longest, key=lambda span: (span.start, span.row)),
        max((span.end for span in spans), default=0.0),
        (known[0], known[-1]) if known else None,
    )


def idle(spans: Sequence[Span], row: str, seconds: float) -> Idle:
    """What ``row`` did and did not between 0 and ``seconds``. Spans that overlap count once."""
    waits: dict[str, float] = {}
    gaps: list[tuple[float, float]] = []
    busy = at = 0.0
    for span in sorted((s for s in spans if s.row == row), key=lambda s: s.start):
        start, end = max(at, span.start), min(seconds, span.end)
        if span.start > at:
            gaps.append((at, span.start))
        if end <= start:
            continue
        if span.kind == "wait":
            waits[span.name] = waits.get(span.name, 0.0) + end - start
        else:
            busy += end - start
        at = end
    if at < seconds:
        gaps.append((at, seconds))
    return Idle(row, busy, waits, gaps)


def rows(spans: Sequence[Span]) -> list[str]:
    """The rows of ``spans``, "group 2" before "group 10"."""
    return sorted({span.row for span in spans}, key=_natural)


def lanes(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Rows with those that belong to them: "group 1 send" is a lane of "group 1"."""
    found: list[tuple[str, list[str]]] = []
    for name in names:
        if found and name.startswith(f"{found[-1][0]} "):
            found[-1][1].append(name)
        else:
            found.append((name, []))
    return found


def _step_starts(spans: Sequence[Span], main: Sequence[str]) -> list[tuple[int, float]]:
    """Where the last row begins its batches while all rows are recorded: (step, seconds), in order."""
    of_row = {row: [span for span in spans if span.row == row] for row in main}
    begin = max(group[0].start for group in of_row.values())
    end = min(max(span.end for span in group) for group in of_row.values())
    starts: dict[int, float] = {}
    for span in of_row[main[-1]]:
        # What is left to do for an earlier batch may come after the next one has begun.
        if span.step is not None and span.step > max(starts, default=-1):
            starts[span.step] = span.start
    return [(step, at) for step, at in starts.items() if begin <= at <= end]


def _cut(spans: Sequence[Span], begin: float, end: float) -> list[Span]:
    """The spans between two times, counted from the first of these, cut off at both."""
    inside = []
    for span in spans:
        start, stop = max(begin, span.start), min(end, span.end)
        # Of neighbours that differ by rounding only one is inside.
        if stop - start > 1e-9:
            inside.append(replace(span, start=start - begin, seconds=stop - start))
    return inside


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
