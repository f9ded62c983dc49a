"""What a step tells its caller."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lct_fast.engine.cuda import streams
from lct_fast.engine.network.exits import Evaluation


class Stats:
    """What one step did.

    ``batch`` is the batch that has been through all groups. Pipelined in one process it lags behind the one given to
    ``step``, and is -1 while the pipeline fills. ``wire_bytes``: sent forward in this step. ``in_flight``: batches on
    their way.

    Args:
        made: where and after which event ``losses`` are there; None if they may be read at once.
    """

    __slots__ = ("_losses", "_made", "batch", "in_flight", "wire_bytes")

    def __init__(
        self,
        batch: int,
        losses: Tensor,
        wire_bytes: int,
        in_flight: int,
        made: tuple[streams.Device, streams.Event] | None = None,
    ) -> None:
        self.batch, self.wire_bytes, self.in_flight = batch, wire_bytes, in_flight
        self._losses, self._made = losses, made

    @property
    def losses(self) -> Tensor:
        """[K], the mean loss of each exit, on the device; NaN where it is not known in this process, and after a serial
        step (``Hybrid``) for all but the last.

        The current stream then waits for the last group, so ask when you need them; ``.tolist()`` makes the host wait.
        """
        if self._made is not None:
            device, event = self._made
            stream = device.current()
            device.wait(stream, event)
            device.keep(self._losses, stream)
            self._made = None
        return self._losses

    def __repr__(self) -> str:
        return f"Stats(batch={self.batch}, wire_bytes={self.wire_bytes}, in_flight={self.in_flight})"


@dataclass(slots=True)
class Mark:
    """A mark in the stream, behind batch ``batch``; what ``code`` means is the user's."""

    batch: int
    code: int


Event = Stats | Mark | Evaluation
