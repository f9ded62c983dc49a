"""Asynchronous over processes: nobody waits for a slow group, nothing but batches is lost, and all end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lct_fast as lct
from lct_fast.engine import checkpoint
from tests.engine import nets
from tests.engine.pipelined_cases import run_processes

STEPS = 12


def _trainer(**options: Any) -> lct.Trainer:
    count = dist.get_world_size()
    return lct.Trainer(
        nets.groups(lct.Greedy(), count), lct.Greedy(), schedule="async", **{"steps": STEPS} | options
    )


def test_x(threads: None, tmp_path: Path) -> None:
    print(run_processes(_run, 3))
    assert 0


def _run() -> Any:
    trainer = _trainer()
    b = nets.batches(20)
    out = []
    if trainer.first:
        i = 0
        while not trainer.finished:
            s = trainer.step(*b[i % 20])
            i += 1
        trainer.flush()
        trainer.evaluate(b)
        trainer.stop()
        out.append(i)
    else:
        for e in trainer.events():
            out.append(e.batch if isinstance(e, lct.Stats) else e)
    return out, trainer.meter.replay()
