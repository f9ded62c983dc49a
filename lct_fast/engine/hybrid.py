"""The serial-parallel hybrid: a share of the batches trained by ordinary back-propagation through all groups."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hybrid:
    """A schedule whose batches come in periods of ``period``, the last ``block`` of each *serial*.

    A serial batch trains the whole network end to end from the loss of its own output, by the optimisers that the
    groups have anyway; critics stand still. This is the correction phase of arXiv 2009.01462 as a schedule that any
    method with groups can use. With a gain r from running groups at once, the whole run gains
    1 / (q + (1 - q) / r) at a share q.

    Args:
        serial: wanted share q of serial batches, 0 <= q < 1; 0 is never. ``share`` is the one that whole batches allow.
        schedule: of all other batches, "lockstep" or "pipelined".
        block: serial batches in a row; a pipeline drains before them and fills again afterwards.
        microbatches: equal parts that a serial batch is cut into, so that processes can work at once. Gradients
            are summed over them; batch norm takes its statistics from each.

    Raises:
        ValueError: an argument out of range, in one line.
    """

    serial: float = 0.1
    schedule: str = "lockstep"
    block: int = 16
    microbatches: int = 1

    def __post_init__(self) -> None:
        number = isinstance(self.serial, int | float) and not isinstance(self.serial, bool)
        if not number or not 0 <= self.serial < 1:
            raise ValueError(f"serial: expected a share 0 <= q < 1, got {self.serial!r}")
        if self.schedule not in ("lockstep", "pipelined"):
            raise ValueError(f"schedule of a Hybrid: expected lockstep or pipelined, got {self.schedule!r}")
        for name in ("block", "microbatches"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.serial and self.period == self.block:
            raise ValueError(
                f"serial={self.serial} in blocks of {self.block} leaves no other batches: use a smaller share or "
                f"larger blocks"
            )

    @property
    def period(self) -> int:
        """Batches from the end of one block to the end of the next; 0 where there are none."""
        return round(self.block / self.serial) if self.serial else 0

    @property
    def share(self) -> float:
        """Serial batches over all batches of a period."""
        return self.block / self.period if self.serial else 0.0

    def is_serial(self, batch: int) -> bool:
        """Whether batch number ``batch`` is serial. It depends on nothing else, so all processes agree."""
        return bool(self.serial) and batch % self.period >= self.period - self.block

    def check_rows(self, rows: int) -> None:
        """Refuses a batch of ``rows`` samples that does not divide into the microbatches."""
        if self.serial and rows % self.microbatches:
            raise ValueError(
                f"a batch of {rows} samples cannot be cut into {self.microbatches} equal microbatches: use a "
                f"batch size that is a multiple, and drop incomplete batches"
            )
