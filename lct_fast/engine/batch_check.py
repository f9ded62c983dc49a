"""Refuses a batch that cannot be trained on, before anything is changed by it."""

from __future__ import annotations

import torch
from torch import Tensor

from lct_fast.engine.errors import NonFiniteError
from lct_fast.methods import Objective


def check_batch(x: Tensor, y: Tensor, batch: int, num_classes: int, objective: Objective) -> None:
    """Shapes, labels and finiteness of a batch.

    Raises:
        ValueError: shapes or labels that do not fit. NonFiniteError: NaN or Inf in the input.
    """
    if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
        raise ValueError(
            f"expected inputs and targets of one batch, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if len(x) == 0:
        raise ValueError("expected at least one sample in the batch, got none")
    # Before group 1 runs: its batch norm would take a bad input into its running statistics.
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            f"the input of batch {batch} holds NaN or Inf: nothing was updated; clean the data"
        )
    if objective.loss is not None:
        return
    if y.is_floating_point():
        if y.dim() != 2 or y.shape[1] != num_classes:
            raise ValueError(f"soft labels: expected [{len(x)}, {num_classes}], got {list(y.shape)}")
    elif y.dtype != torch.int64 or y.dim() != 1:
        raise ValueError(
            f"labels: expected int64 [{len(x)}], got {str(y.dtype).removeprefix('torch.')} {list(y.shape)}"
        )
    else:
        bad = (y != objective.ignore_index) & ((y < 0) | (y >= num_classes))
        if bool(bad.any()):
            raise ValueError(
                f"label out of range at batch {batch}: expected 0..{num_classes - 1} or "
                f"{objective.ignore_index} (ignored), got {int(y[bad][0])}; nothing was updated"
            )
