"""What a step tells its caller."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lct_fast.engine.exits import Evaluation


@dataclass(slots=True)
class Stats:
    """What one step did. ``losses`` [K] is the mean loss of each exit, on the device; ``.tolist()`` waits for it.

    ``batch`` is the batch that has been through all groups. Pipelined in one process it lags behind the one given to
    ``step``, and is -1 while the pipeline fills. Losses not known in this process are NaN, and after a serial step
    (``Hybrid``) all but the last exit's.
    """

    batch: int
    losses: Tensor
    wire_bytes: int
    in_flight: int


@dataclass(slots=True)
class Mark:
    """A mark in the stream, behind batch ``batch``; what ``code`` means is the user's."""

    batch: int
    code: int


Event = Stats | Mark | Evaluation
