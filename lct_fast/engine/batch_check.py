"""Refuses a batch that cannot be trained on, before anything is changed by it."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lct_fast.codecs.late import Late
from lct_fast.engine.cuda.gate import LATE
from lct_fast.engine.errors import NonFiniteError
from lct_fast.methods import Objective

# What is wrong with a batch, as a number that a device can tell.
_INPUT, _LABEL, _SOFT = 1, 2, 3


class BatchCheck:
    """Shapes, labels and finiteness of batches.

    What lies on the host is refused at once. What lies on a device is flagged there, so that the host need not wait:
    the groups leave such a batch out, and the error comes two batches later.

    Args:
        late: flag also what lies on the host; for tests.
        target_dims: of integer labels, 1 for [N], 2 for [N, T].
    """

    def __init__(
        self, num_classes: int, objective: Objective, late: bool = False, target_dims: int = 1
    ) -> None:
        self.num_classes, self.objective, self.late = num_classes, objective, late
        self.target_dims = target_dims
        self._flags: deque[tuple[int, Late]] = deque()

    def __call__(
        self, x: Tensor, y: Tensor, batch: int, at_once: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Checks a batch; with ``at_once`` the host waits for the answer.

        Returns:
            The labels, those out of range replaced by the ignored one; and 0-dim fp32, 1 where the batch is refused, on
            the batch's device, None if that is known to be not so.

        Raises:
            ValueError: shapes or labels that do not fit. NonFiniteError: NaN or Inf in the input or in soft labels.
        """
        self.check()
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise ValueError(
                f"expected tensors, inputs and targets, got {type(x).__name__} and {type(y).__name__}"
            )
        if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
            raise ValueError(
                f"expected inputs and targets of one batch, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if len(x) == 0:
            raise ValueError("expected at least one sample in the batch, got none")
        codes = []
        # Before group 1 runs: its batch norm would take a bad input into its running statistics.
        if x.is_floating_point():
            bad = ~torch.isfinite(x).all()
            if self._waits(x, at_once):
                if bool(bad):
                    raise NonFiniteError(_message(_INPUT, batch, self.num_classes, self.objective))
            else:
                codes.append(bad * _INPUT)
        if self.objective.loss is None:
            y, code = self._labels(x, y, batch, at_once)
            if code is not None:
                codes.append(code)
        if not codes:
            return y, None
        code = torch.stack([c.to(codes[0].device) for c in codes]).amax()
        self._flags.append((batch, Late(code)))
        return y, (code > 0).float()

    def check(self, late: int = LATE) -> None:
        """Reads the flags that have ``late - 1`` or more behind them.

        Raises:
            ValueError, NonFiniteError: as a call; the batch is named.
        """
        while self._flags and len(self._flags) >= late:
            batch, flag = self._flags.popleft()
            code = int(flag.value())
            if code:
                kind = ValueError if code == _LABEL else NonFiniteError
                raise kind(_message(code, batch, self.num_classes, self.objective))

    def evaluated(self, x: Tensor, y: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """A batch that is evaluated, labels on the host checked: out of range they would end the process.

        Raises:
            ValueError: shapes or labels that do not fit.
        """
        if len(x) != len(y):
            raise ValueError(
                f"expected inputs and targets of one batch, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if self.objective.loss is None and not y.is_cuda and not y.is_floating_point():
            self._labels(x, y, batch, at_once=True)
        return x, y

    def _labels(self, x: Tensor, y: Tensor, batch: int, at_once: bool) -> tuple[Tensor, Tensor | None]:
        if y.is_floating_point():
            if y.dim() != 2 or y.shape[1] != self.num_classes:
                raise ValueError(f"soft labels: expected [{len(x)}, {self.num_classes}], got {list(y.shape)}")
            bad = ~torch.isfinite(y).all()
            if not self._waits(y, at_once):
                return y, bad * _SOFT
            if bool(bad):
                raise NonFiniteError(_message(_SOFT, batch, self.num_classes, self.objective))
            return y, None
        if y.dtype != torch.int64 or y.dim() != self.target_dims:
            tokens = ", T" * (self.target_dims - 1)
            raise ValueError(
                f"labels: expected int64 [{len(x)}{tokens}], got {str(y.dtype).removeprefix('torch.')} {list(y.shape)}"
            )
        ignored = self.objective.ignore_index
        bad = (y != ignored) & ((y < 0) | (y >= self.num_classes))
        if not self._waits(y, at_once):
            # A label out of range would end the whole process, where a loss indexes with it.
            return y.masked_fill(bad, ignored), bad.any() * _LABEL
        if bool(bad.any()):
            raise ValueError(
                _message(_LABEL, batch, self.num_classes, self.objective, f", got {int(y[bad][0])}")
            )
        return y, None

    def _waits(self, t: Tensor, at_once: bool) -> bool:
        return at_once or not (t.is_cuda or self.late)


def _message(code: int, batch: int, num_classes: int, objective: Objective, got: str = "") -> str:
    if code != _LABEL:
        what = "input" if code == _INPUT else "target"
        return f"the {what} of batch {batch} holds NaN or Inf: nothing was updated by it; clean the data"
    return (
        f"label out of range at batch {batch}: expected 0..{num_classes - 1} or {objective.ignore_index} "
        f"(ignored){got}; nothing was updated by it"
    )
