"""Metrics as TensorBoard scalars, where TensorBoard is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lct_fast.report.run import number

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# They say when a record was taken, not what was measured.
_POSITION = ("step", "epoch", "seconds")


def maybe_writer(run_dir: Path) -> SummaryWriter | None:
    """A writer of event files under ``run_dir/tensorboard``, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(log_dir=str(Path(run_dir) / "tensorboard"))


def log(writer: SummaryWriter | None, record: Mapping[str, Any]) -> None:
    """Write one record of metrics.jsonl, placed at its ``step``; nothing without a writer or a step."""
    step = number(record.get("step"))
    if writer is None or step is None:
        return
    for tag, value in scalars(record).items():
        writer.add_scalar(tag, value, int(step))


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by tag: ``lr``, and for a list ``loss/1``, ``loss/2``, ...; NaN is left out."""
    tags: dict[str, float] = {}
    for key, value in record.items():
        if key in _POSITION:
            continue
        items = (
            [(f"{key}/{i}", x) for i, x in enumerate(value, 1)] if isinstance(value, list) else [(key, value)]
        )
        for tag, item in items:
            if (x := number(item)) is not None:
                tags[tag] = x
    return tags
