"""A run folder as written by the trainer, read with tolerance for runs that are still in progress."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILES = ("config.yaml", "metrics.jsonl", "summary.json")

Curve = list[tuple[float, float | None]]


@dataclass(frozen=True)
class LossCurves:
    """Loss per exit: ``name`` of the recorded loss, the ``unit`` of x, and one curve an exit."""

    name: str
    unit: str
    curves: list[Curve]


@dataclass
class Run:
    """What a run folder holds so far.

    ``epochs``, ``intervals``, ``diagnoses`` and ``codebooks`` are the lines of metrics.jsonl by kind, in order; of a
    step recorded twice (a resumed run) the later line. ``summary`` is empty until the run ends. ``notes`` says what
    could not be read.
    """

    path: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    intervals: list[dict[str, Any]] = field(default_factory=list)
    diagnoses: list[dict[str, Any]] = field(default_factory=list)
    codebooks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def finished(self) -> bool:
        """Whether the run has written its summary."""
        return bool(self.summary)

    def value(self, key: str) -> Any:
        """``key`` of the summary, or of the config while there is no summary; None where neither has it."""
        value = self.summary.get(key)
        return self.config.get(key) if value is None else value

    def exit_accuracy(self) -> list[float | None]:
        """Test accuracy of every exit, 0..1, first to last; the last epoch's while there is no summary."""
        for record in (self.summary, *reversed(self.epochs)):
            for key in ("exit_test_accuracy", "test_accuracy"):
                values = numbers(record.get(key))
                if any(value is not None for value in values):
                    return values
        return []

    def curves(self, key: str, kind: str = "epoch") -> list[Curve]:
        """Values of ``key``, one curve an exit, group or cut; over epochs for kind "epoch", steps for the others."""
        unit = "epoch" if kind == "epoch" else "step"
        records = {
            "epoch": self.epochs,
            "interval": self.intervals,
            "diagnosis": self.diagnoses,
            "codebook": self.codebooks,
        }[kind]
        rows = [(float(record[unit]), numbers(record.get(key))) for record in records]
        exits = max((len(values) for _, values in rows), default=0)
        return [[(x, values[k] if k < len(values) else None) for x, values in rows] for k in range(exits)]

    def accuracy_curves(self) -> list[Curve]:
        """Test accuracy, 0..1, over epochs, one curve an exit."""
        curves = self.curves("exit_test_accuracy")
        return curves if _drawable(curves) else self.curves("test_accuracy")

    def loss_curves(self) -> LossCurves:
        """Test loss over epochs, of a text in bits; train loss where there is none; before the first epoch the
        intervals'.
        """
        bits = self.curves("exit_bits_per_character")
        if _drawable(bits):
            return LossCurves("test bits per character", "epoch", bits)
        test, train = self.curves("test_loss"), self.curves("train_loss")
        if _drawable(test):
            return LossCurves("test loss", "epoch", test)
        if _drawable(train):
            return LossCurves("train loss", "epoch", train)
        return LossCurves("train loss", "step", self.curves("loss", "interval"))

    def readings(self, key: str, kind: str) -> list[Curve]:
        """``key`` of what was read of the groups' gradients ("diagnosis") or of codebooks ("codebook"), over steps, one
        curve a group or cut; empty if nothing was.
        """
        curves = self.curves(key, kind)
        return curves if _drawable(curves) else []


def exit_name(k: int, exits: int) -> str:
    """What exit ``k``, from 1, is called: the only one of a run is the network itself."""
    return "network" if exits == 1 else f"exit {k}"


def read_run(path: Path | str) -> Run:
    """Read a run folder; the run may still be in progress.

    Raises ValueError, one line, for a folder that is not a run's.
    """
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing there"
        raise ValueError(
            f"{path}: expected a run folder, found {found}; give the folder that training wrote (--out)"
        )
    if not any((path / name).is_file() for name in FILES):
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{path}: expected a run folder with one of {', '.join(FILES)}, found {held}; "
            "give the folder that training wrote (--out)"
        )
    run = Run(path)
    _read_config(run)
    _read_summary(run)
    _read_metrics(run)
    return run


def number(value: Any) -> float | None:
    """``value`` as a float; None for what is no number or cannot be drawn (NaN, infinite, beyond 1e100)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -1e100 < value < 1e100 else None


def numbers(value: Any) -> list[float | None]:
    """A list of numbers from a list, or from one number; empty for anything else."""
    if isinstance(value, list):
        return [number(item) for item in value]
    return [number(value)] if isinstance(value, int | float) else []


def _drawable(curves: Sequence[Curve]) -> bool:
    return any(y is not None for curve in curves for _, y in curve)


def _text(path: Path) -> str:
    # A line cut short may end inside a character.
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""


def _read_config(run: Run) -> None:
    import yaml

    run.config_text = _text(run.path / "config.yaml")
    try:
        config = yaml.safe_load(run.config_text)
    except (yaml.YAMLError, ValueError, RecursionError):
        config = run.config_text
    if isinstance(config, dict):
        run.config = config
    elif config is not None:
        run.notes.append("config.yaml is not a mapping of options; it is shown as it stands")


def _read_summary(run: Run) -> None:
    text = _text(run.path / "summary.json")
    if text:
        summary = _parse(text)
        if summary is None:
            run.notes.append("summary.json is not a JSON object; it was left out")
        else:
            run.summary = summary


def _read_metrics(run: Run) -> None:
    epochs: dict[float, dict[str, Any]] = {}
    intervals: dict[float, dict[str, Any]] = {}
    diagnoses: dict[float, dict[str, Any]] = {}
    codebooks: dict[float, dict[str, Any]] = {}
    unread = 0
    for line in _text(run.path / "metrics.jsonl").split("\n"):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            unread += 1
            continue
        kinds = (
            ("epoch", "epoch", epochs),
            ("interval", "step", intervals),
            ("diagnosis", "step", diagnoses),
            ("codebook", "step", codebooks),
        )
        for kind, unit, into in kinds:
            at = number(record.get(unit))
            if record.get("kind") == kind and at is not None:
                into[at] = record
    run.epochs = [epochs[at] for at in sorted(epochs)]
    run.intervals = [intervals[at] for at in sorted(intervals)]
    run.diagnoses = [diagnoses[at] for at in sorted(diagnoses)]
    run.codebooks = [codebooks[at] for at in sorted(codebooks)]
    if unread:
        lines = "1 line" if unread == 1 else f"{unread} lines"
        run.notes.append(f"{lines} of metrics.jsonl could not be read (cut short?) and were left out")


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
