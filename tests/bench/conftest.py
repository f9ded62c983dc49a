"""Benchmarks that end at once: no compiler, a small roofline, one thread."""

import pytest
import torch

from lct_fast.bench import roofline


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """What is compiled is eager here, which is as right and takes no seconds to compile."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(roofline.SIZES, "cpu", (1 << 20, 64))
