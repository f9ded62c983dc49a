"""Metrics as scalars, through a stand-in: TensorBoard itself is optional."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lct_fast.report.tensorboard import log, maybe_writer, scalars

MODULE = "torch.utils.tensorboard"


class Writer:
    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written.append((tag, value, step))


RECORD: dict[str, Any] = {
    "kind": "epoch",
    "step": 40,
    "epoch": 2,
    "seconds": 1.5,
    "test_loss": [0.5, None, 0.25],
    "test_accuracy": 0.9,
    "lr": float("nan"),
    "note": "x",
    "of a later version": {"a": 1},
}


def test_scalars() -> None:
    assert scalars(RECORD) == {"test_loss/1": 0.5, "test_loss/3": 0.25, "test_accuracy": 0.9}


def test_log() -> None:
    writer: Any = Writer("")
    log(writer, RECORD)
    assert writer.written == [("test_loss/1", 0.5, 40), ("test_loss/3", 0.25, 40), ("test_accuracy", 0.9, 40)]
    log(writer, {"kind": "note", "lr": 0.1})
    assert len(writer.written) == 3
    log(None, RECORD)


def test_writer_where_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module: Any = ModuleType(MODULE)
    module.SummaryWriter = lambda log_dir: SimpleNamespace(log_dir=log_dir)
    monkeypatch.setitem(sys.modules, MODULE, module)
    writer = maybe_writer(tmp_path)
    assert writer is not None and writer.log_dir == str(tmp_path / "tensorboard")


def test_no_writer_where_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    assert maybe_writer(tmp_path) is None
