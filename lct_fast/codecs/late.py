"""A number that a device computes and the host reads later, without making it wait."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """A 0-dim tensor on its way to the host.

    Args:
        number: on any device; it is copied behind the work that makes it.
    """

    def __init__(self, number: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = number
        if number.is_cuda:
            self._host = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(number.device))

    def value(self) -> float:
        """The number; waits only if it has not arrived yet."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)
