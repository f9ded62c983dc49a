"""Where each result file was measured, as far as it says so itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables.markdown import table


def _found(content: Any, key: str) -> list[Any]:
    """Values of ``key`` in the head of a file, of its machine, its runs and the runs of its parts, each once."""
    if not isinstance(content, dict):
        return []
    values = [content[key]] if key in content else []
    for part in ("machine", "costs_from", "runs", "drills", "screen", "seeds", "finals"):
        inner = content.get(part, [])
        for each in inner if isinstance(inner, list) else [inner]:
            values += _found(each, key)
    return list(dict.fromkeys(v if not isinstance(v, dict) else json.dumps(v) for v in values))


def _torch(content: Any) -> str:
    found = [json.loads(v).get("torch", "") for v in _found(content, "versions")] + _found(content, "torch")
    return ", ".join(dict.fromkeys(v for v in found if v))


def _quiet(content: dict[str, Any]) -> str:
    if "quiet" in content:
        share = f"{100 * content['foreign_cpu_share']:.1f} %"
        return f"yes, {share}" if content["quiet"] else f"no, {share}"
    shares = _found(content, "foreign_cpu_share")
    if shares:
        return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} % a run"
    return "not recorded"


def files(folder: Path, uses: Mapping[str, Sequence[str]]) -> str:
    """A row a result file; ``uses`` are the tables and plots made from each."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        devices = [str(d).partition(",")[0] for d in _found(content, "device")]
        commits = _found(content, "commit")
        rows.append(
            [
                f"`{path.name}`",
                ", ".join(dict.fromkeys(devices)) or "not recorded",
                _torch(content) or "not recorded",
                ", ".join(commits[:2]) + (f" and {len(commits) - 2} more" if len(commits) > 2 else ""),
                _quiet(content),
                ", ".join(uses.get(path.name, ())) or "none",
            ]
        )
    head = ["file", "device", "torch", "commit", "quiet; other programs' share of the machine"]
    return table([*head, "tables and plots made from it"], rows)
