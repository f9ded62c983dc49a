"""A run's folder: config.yaml, metrics.jsonl, summary.json, trace.json, curves.png, checkpoints/."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lct_fast.cli.config import Config, ConfigError, read_yaml, resolve, write_yaml
from lct_fast.report import tensorboard


class RunFolder:
    """Writes a run's records; opening checks that it may be written, before any work."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self._writer: Any = None

    def create(self, config: Config) -> None:
        """A new run; refuses a folder that already holds one."""
        if (self.path / "config.yaml").exists():
            raise ConfigError(
                f"{self.path} already holds a run: add --resume to go on with it, or choose another --out"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_yaml(config, self.path / "config.yaml")
            self.metrics.write_text("")
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {self.path}: {error.strerror}; choose another --out"
            ) from None

    def reopen(self, given: dict[str, Any]) -> Config:
        """The options of the run that is here; those given must agree with them."""
        if not (self.path / "config.yaml").is_file():
            raise ConfigError(f"--resume: {self.path} holds no run (no config.yaml); check --out")
        if not os.access(self.path, os.W_OK):
            raise ConfigError(f"cannot write the run folder {self.path}: Permission denied")
        stored = resolve(read_yaml(self.path / "config.yaml"))
        wanted = resolve(given)
        for key in given:
            if given[key] is not None and getattr(wanted, key) != getattr(stored, key):
                raise ConfigError(
                    f"--resume: {key} is {getattr(stored, key)!r} in {self.path / 'config.yaml'}, but "
                    f"{getattr(wanted, key)!r} was given; leave it out or start a new run"
                )
        return stored

    def open(self, step: int, batch: int) -> None:
        """Begins to write: metrics that a resumed run will write again go.

        Args:
            step: batches of the last group; intervals up to there stay.
            batch: batches of the first group; epochs up to there stay. Another number only if groups go at their own
                pace.
        """
        self._writer = tensorboard.maybe_writer(self.path)
        kept = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["step"] <= (batch if record["kind"] == "epoch" else step):
                kept.append(line + "\n")
        self.metrics.write_text("".join(kept))

    def log(self, record: dict[str, Any]) -> None:
        """Appends one record to metrics.jsonl (and TensorBoard, if installed)."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(_finite(record)) + "\n")
        if self._writer is not None:
            tensorboard.log(self._writer, record)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, whole or not at all."""
        partial = self.path / ".summary.json"
        partial.write_text(json.dumps(_finite(summary), indent=2) + "\n")
        os.replace(partial, self.summary)

    def close(self) -> None:
        """Flushes what is still in memory."""
        if self._writer is not None:
            self._writer.close()


def _finite(value: Any) -> Any:
    """NaN and Inf as null: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value
