"""Runs the sections of a check one after another: a time budget, a JSON file each, one table at the end.

A section is a function of a `Context` that returns what it found as a dict. One that raises is recorded
with its error, and the next one goes on.
"""

import json
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Status of a command that ran out of time.
CUT = 124


class SectionFailed(Exception):
    """A section came to a verdict, and it is bad; `found` is recorded with the message."""

    def __init__(self, message: str, found: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.found = found or {}


@dataclass
class Context:
    """Where results go and how long there is."""

    out: Path
    budget_s: float
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def left(self) -> float:
        """Seconds left of the budget."""
        return self.budget_s - (self.clock() - self.started)

    def part(self, share: float) -> "Context":
        """The same place with a share of the time that is left."""
        return Context(self.out, share * self.left(), self.clock)


@dataclass(frozen=True)
class Section:
    name: str
    about: str
    run: Callable[[Context], dict[str, Any]]
    # Started only with this much of the budget left: less than this tells nothing.
    least_s: float = 5.0


def run_sections(sections: Sequence[Section], context: Context) -> int:
    """Run them in order; 0 if all ran and passed, else 1."""
    context.out.mkdir(parents=True, exist_ok=True)
    records = []
    for section in sections:
        print(f"== {section.name}: {section.about} ({context.left():.0f} s left)", flush=True)
        record = _run_one(section, context)
        records.append(record)
        _write(context.out / f"{section.name}.json", record)
    _write(context.out / "summary.json", records)
    print(table(records), flush=True)
    return 0 if all(record["status"] == "passed" for record in records) else 1


def _run_one(section: Section, context: Context) -> dict[str, Any]:
    record: dict[str, Any] = {
        "section": section.name,
        "status": "not run",
        "seconds": 0.0,
        "error": "",
        "found": {},
    }
    if context.left() < section.least_s:
        record["error"] = (
            f"{max(context.left(), 0):.0f} s left of {context.budget_s:.0f}; give a larger --budget"
        )
        return record
    begin = context.clock()
    try:
        record["found"] = section.run(context)
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

    Status CUT: it ran out of time.
    """
    path = context.out / log
    with path.open("w") as file:
        try:
            status = subprocess.run(
                list(command),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                timeout=context.left(),
            ).returncode
        except subprocess.TimeoutExpired:
            status = CUT
    return status, path.read_text(errors="replace")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, default=str) + "\n")
