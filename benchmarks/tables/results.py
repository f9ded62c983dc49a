"""The folder of result files, as the functions that make tables see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MissingResult(FileNotFoundError):
    """A result file that a table is made from is not there."""


class Results:
    """``folder`` with ``NAME.json`` files; ``used`` is what was read of it, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: list[str] = []

    def __call__(self, name: str) -> dict[str, Any]:
        """The content of ``NAME.json``. Raises `MissingResult`, and ValueError for a trial of the code."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            raise MissingResult(
                f"{path} is not there: expected a committed result file; benchmarks/README.md has its command"
            )
        if path.name not in self.used:
            self.used.append(path.name)
        content: dict[str, Any] = json.loads(path.read_text())
        if content.get("tiny"):
            raise ValueError("it says that it is a trial of the code, and its figures mean nothing")
        return content
