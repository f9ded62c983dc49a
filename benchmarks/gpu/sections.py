"""Runs the sections of a check one after another: a time budget, a JSON file each, one table at the end.

A section is a function of a `Context` that returns what it found as a dict. One that raises is recorded
with its error, and the next one goes on. A file is whole or absent, so that a run that is killed loses only the
section it was in.
"""

import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Status of a command that ran out of time.
CUT = 124
# Process groups of the commands under way.
_groups: set[int] = set()


class SectionFailed(Exception):
    """A section came to a verdict, and it is bad; `found` is recorded with the message."""

    def __init__(self, message: str, found: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.found = found or {}


@dataclass
class Context:
    """Where results go and how long there is.

    fake: the CPU stands in for the device. data: images to train on, as `lct-fast train --data` has them. facts: what
    every record begins with, such as the device.
    """

    out: Path
    budget_s: float
    clock: Callable[[], float] = time.monotonic
    fake: bool = False
    data: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def left(self) -> float:
        """Seconds left of the budget."""
        return self.budget_s - (self.clock() - self.started)

    def within(self, seconds: float) -> "Context":
        """The same place with this much time, or what is left where that is less."""
        return replace(self, budget_s=min(seconds, self.left()))


@dataclass(frozen=True)
class Section:
    """One of a check.

    least_s: started only with this much of the budget left, as less tells nothing. weight: its part of the time left,
    among its own weight and those of the sections behind it. lacks: what it would need and was not given, or "".
    """

    name: str
    about: str
    run: Callable[[Context], dict[str, Any]]
    least_s: float = 5.0
    weight: float = 1.0
    lacks: Callable[[Context], str] = lambda context: ""


def run_sections(sections: Sequence[Section], context: Context) -> int:
    """Run them in order; 0 if all passed, or were skipped for something that was not given; else 1.

    A section gets its share of the time left; what it does not use goes to those behind it. One that does not run is
    named in the summary with the reason, and an earlier record of it stays.
    """
    context.out.mkdir(parents=True, exist_ok=True)
    records = []
    for i, section in enumerate(sections):
        share = section.weight / sum(each.weight for each in sections[i:])
        part = context.within(max(section.least_s, share * context.left()))
        print(
            f"== {section.name}: {section.about} ({part.left():.0f} s of {context.left():.0f} s)", flush=True
        )
        record = _run_one(section, context, part)
        records.append(record)
        if record["status"] in ("passed", "failed"):
            write(context.out / f"{section.name}.json", record)
        write(context.out / "summary.json", records)
    print(table(records), flush=True)
    return 0 if all(record["status"] in ("passed", "skipped") for record in records) else 1


def _run_one(section: Section, context: Context, part: Context) -> dict[str, Any]:
    record: dict[str, Any] = {
        "section": section.name,
        **context.facts,
        "fake": context.fake,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "status": "not run",
        "seconds": 0.0,
        "error": "",
        "found": {},
    }
    lacking = section.lacks(context)
    if lacking:
        record.update(status="skipped", error=lacking)
        return record
    if context.left() < section.least_s:
        record["error"] = (
            f"{max(context.left(), 0):.0f} s left of {context.budget_s:.0f}; give a larger --budget"
        )
        return record
    begin = context.clock()
    # Killed in here, it must not leave the record of an earlier run to be taken for its own.
    (context.out / f"{section.name}.json").unlink(missing_ok=True)
    try:
        record["found"] = section.run(part)
        record["status"] = "passed"
    except SectionFailed as failure:
        record.update(status="failed", error=str(failure), found=failure.found)
    except Exception as error:
        traceback.print_exc()
        record.update(status="failed", error=f"{type(error).__name__}: {error}")
    record["seconds"] = round(context.clock() - begin, 2)
    return record


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A line a section: name, status, seconds, and what it has to say."""
    width = max([len(r["section"]) for r in records], default=0)
    lines = []
    for r in records:
        said = r["error"] or r["found"].get("line", "")
        first = said.strip().splitlines()[0][:150] if said.strip() else ""
        lines.append(f"{r['section']:{width}}  {r['status']:7}  {r['seconds']:8.1f} s  {first}".rstrip())
    return "\n".join(lines)


def call(
    command: Sequence[str], context: Context, log: str, env: Mapping[str, str], cwd: Path
) -> tuple[int, str]:
    """Run a command within the budget; its output goes to the log file and its status and text come back.

    Status CUT: it ran out of time. No process that it started outlives it, however this call ends.
    """
    path = context.out / log
    with path.open("w") as file:
        process = subprocess.Popen(
            list(command), stdout=file, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd, process_group=0
        )
        _groups.add(process.pid)
        try:
            status = process.wait(timeout=max(context.left(), 0))
        except subprocess.TimeoutExpired:
            status = CUT
        finally:
            _end(process.pid)
            process.wait()
            _groups.discard(process.pid)
    return status, path.read_text(errors="replace")


def end_commands() -> None:
    """Kills every command under way and all that they started."""
    for group in list(_groups):
        _end(group)


def _end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def write(path: Path, value: Any) -> None:
    """JSON into a file that is whole or absent at any time."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(partial, path)
