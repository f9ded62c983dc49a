"""What a group's gradient is like, noted every few batches. Reading it changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lct_fast.engine.hybrid import Hybrid
from lct_fast.engine.meter import GroupMeter


class Diagnosis:
    """Reads the gradients of one group between its backward pass and its update.

    A reading is [batch, norm, cosine]: the norm of the group's own gradient (the theorem of arXiv 2102.01963 is about
    its limit), and the cosine of the angle between it and the true gradient where that was given, else None. Norms and
    cosines are over all parameters as one vector, before clipping; None where not finite, a cosine also where either
    vector is zero.

    Args:
        parameters: the group's part of the network: its layers', in the last group the output's too. No critic's.
        every: batches from one reading to the next. Where updates take several batches, the updates with such a batch
            among theirs are read.
        accumulate: batches to an update.
        hybrid: updates with a serial batch are left out, as their gradient is no local one.
        meter: gets the readings.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        every: int,
        accumulate: int,
        hybrid: Hybrid | None,
        meter: GroupMeter,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.every, self.accumulate, self.hybrid, self.meter = every, accumulate, hybrid, meter
        self._true: list[Tensor] = []
        self._batches = 0

    def wants(self, batch: int) -> bool:
        """Whether the update that ``batch`` is a part of is read."""
        first = batch // self.accumulate * self.accumulate
        last = first + self.accumulate - 1
        if last // self.every * self.every < first:
            return False
        return self.hybrid is None or not any(map(self.hybrid.is_serial, range(first, last + 1)))

    def add_true(self, gradients: Sequence[Tensor]) -> None:
        """The true gradient of a batch, one tensor a parameter; those of an update's batches add up, as only their
        direction counts."""
        self._true = (
            [a + b for a, b in zip(self._true, gradients, strict=True)] if self._true else list(gradients)
        )
        self._batches += 1

    def read(self, batch: int) -> None:
        """Notes the gradients of the update that ``batch`` ends, if they are wanted."""
        true, batches = self._true, self._batches
        self._true, self._batches = [], 0
        if not self.wants(batch):
            return
        own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        norm = math.sqrt(_dot(own, own))
        cosine = None
        # Of an update that began before a checkpoint only a part is known.
        if batches == self.accumulate:
            cosine = _finite(_dot(own, true) / (norm * math.sqrt(_dot(true, true)) or math.nan))
        self.meter.readings.append([batch, _finite(norm), cosine])


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def rows(readings: Sequence[Sequence[Sequence[Any]]]) -> list[dict[str, Any]]:
    """Readings of all groups, a row a batch: ``batch``, ``gradient_norm`` and ``gradient_cosine``, one value a group.

    None where a group has not read that batch.
    """
    known = [{batch: (norm, cosine) for batch, norm, cosine in of_group} for of_group in readings]
    table = []
    for batch in sorted({batch for of_group in known for batch in of_group}):
        values = [of_group.get(batch, (None, None)) for of_group in known]
        norms, cosines = zip(*values, strict=True)
        table.append({"batch": batch, "gradient_norm": list(norms), "gradient_cosine": list(cosines)})
    return table


def late_means(table: Sequence[dict[str, Any]], key: str) -> list[float | None]:
    """Per group, the mean of ``key`` over the last quarter of the rows, of those that know it."""
    late = table[len(table) * 3 // 4 :]
    columns = zip(*(row[key] for row in late), strict=True)
    return [_mean([v for v in column if v is not None]) for column in columns]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
