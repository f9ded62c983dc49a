"""A run's folder: config.yaml, metrics.jsonl, summary.json, trace.json, curves.png, checkpoints/; of a text its
vocabulary.json too."""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lct_fast.cli.config import Config, ConfigError, read_yaml, resolve, write_yaml
from lct_fast.engine.schedules.schedule import PIPELINED_DELAY
from lct_fast.report import tensorboard

# Options that may change when a run goes on. They change no bit of it, but for the last two: on another machine
# sums may be taken in another order.
_FREE = {
    *("schedule", "start_timeout", "step_timeout", "diagnose", "checkpoint_every"),
    *("device", "threads"),
}


# Seconds in which the processes of a run whose launcher was killed end on their own.
_PATIENCE = 10.0


class RunFolder:
    """Writes a run's records; opening checks that it may be written, before any work."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self._writer: Any = None
        self._lock: Any = None

    def lock(self, patience: float | None = None) -> None:
        """Keeps other runs from writing here until ``unlock`` or the end of this process.

        A lock of the operating system on a file: between machines it holds as far as the file system passes it on.

        Args:
            patience: seconds to wait for a run that is ending; default 10.

        Raises:
            ConfigError: another run writes here; names its process.
        """
        try:
            self._lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise ConfigError(f"cannot write the run folder {self.path}: {error.strerror}") from None
        deadline = time.monotonic() + (_PATIENCE if patience is None else patience)
        while not self._try_lock():
            if time.monotonic() >= deadline:
                self._lock.seek(0)
                holder = self._lock.read().strip() or "another process"
                raise ConfigError(
                    f"{self.path} is being written by {holder}: end it first, or choose another --out"
                )
            time.sleep(0.1)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            # A file system that knows no locks.
            return True
        return True

    def unlock(self) -> None:
        """Lets other runs write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def create(self, config: Config) -> None:
        """A new run; refuses a folder that already holds one."""
        if (self.path / "config.yaml").exists():
            raise ConfigError(
                f"{self.path} already holds a run: add --resume to go on with it, or choose another --out"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock(patience=0.0)
            write_yaml(config, self.path / "config.yaml")
            self.metrics.write_text("")
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {self.path}: {error.strerror}; choose another --out"
            ) from None

    def write_vocabulary(self, vocabulary: list[str]) -> None:
        """Keeps what the ids of a text stand for."""
        file = self.path / "vocabulary.json"
        with _named(file):
            file.write_text(json.dumps(vocabulary) + "\n")

    def vocabulary(self) -> list[str] | None:
        """What the ids of the run's text stand for; None where there is no run, or none on a text."""
        file = self.path / "vocabulary.json"
        try:
            return json.loads(file.read_text()) if file.exists() else None
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {file}: {error}; it is needed to read the run's text") from None

    def reopen(self, given: dict[str, Any]) -> Config:
        """The options of the run that is here; those given must agree with them."""
        if not (self.path / "config.yaml").is_file():
            raise ConfigError(f"--resume: {self.path} holds no run (no config.yaml); check --out")
        if not os.access(self.path, os.W_OK):
            raise ConfigError(f"cannot write the run folder {self.path}: Permission denied")
        stored = resolve(read_yaml(self.path / "config.yaml"))
        wanted = resolve(given)
        for key in given.keys() & _FREE:
            setattr(stored, key, getattr(wanted, key))
        if stored.schedule == "pipelined" and stored.feedback_delay < 1:
            if stored.method == "local-critic":
                raise ConfigError(
                    f"--resume: this run has --feedback-delay 0, and --schedule pipelined needs 1 or more: go on with "
                    f"--schedule lockstep, or start a new run with --feedback-delay {PIPELINED_DELAY}"
                )
            stored.feedback_delay = PIPELINED_DELAY
        for key in given.keys() - _FREE:
            # "auto" stands for what was chosen when the run began.
            if key == "codec" and "auto" in wanted.codec:
                continue
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
            # Readings of gradients and codebooks are all written at the end.
            if record["kind"] not in ("diagnosis", "codebook") and record["step"] <= (
                batch if record["kind"] == "epoch" else step
            ):
                kept.append(line + "\n")
        self.metrics.write_text("".join(kept))

    def log(self, record: dict[str, Any]) -> None:
        """Appends one record to metrics.jsonl (and TensorBoard, if installed)."""
        with _named(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(_finite(record)) + "\n")
        if self._writer is not None:
            tensorboard.log(self._writer, record)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, whole or not at all."""
        partial = self.path / ".summary.json"
        with _named(self.summary):
            partial.write_text(json.dumps(_finite(summary), indent=2) + "\n")
            os.replace(partial, self.summary)

    def close(self) -> None:
        """Flushes what is still in memory."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error while a file is written says which."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _finite(value: Any) -> Any:
    """NaN and Inf as null: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value
