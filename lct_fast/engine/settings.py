"""What every group of a run shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lct_fast.engine.hybrid import Hybrid
from lct_fast.methods import Method, Objective
from lct_fast.methods.method import OptimizerFactory

SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True, slots=True)
class Settings:
    """What every group of a run shares; see ``Trainer`` for the meaning of each."""

    method: Method
    objective: Objective
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None = None
    feedback_delay: int = 0
    accumulate: int = 1
    clip_norm: float | None = None
    autocast: torch.dtype | None = None
    compile: bool = False
    memory_format: torch.memory_format = torch.preserve_format
    checksum: bool | None = None
    hybrid: Hybrid | None = None
    diagnose: int = 0
