"""Windows of a text: parallel streams, so that each row of a batch continues the same row of the batch before."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .batches import mix
from .errors import DataError


class Windows:
    """Iterates over a text, epoch by epoch, in ``batch_size`` streams that are read side by side.

    ids: [characters], integers; moved to ``device`` once, here. The text is cut into ``batch_size`` stretches of one
    length; batch i of an epoch holds the i-th window of each, so row n of batch i goes on where row n of batch i - 1
    ended, and a recurrent state can too. Targets are the same characters one further on.

    shift: each epoch begins at an offset of its own, below ``window``, so that windows end elsewhere in each; it is a
    pure function of (seed, epoch). Without it the text begins at its first character. drop_last: leave out a last
    window that is shorter than the others (always with ``shift``, where all epochs have as many batches). Up to
    ``batch_size`` characters at the text's end, and with ``shift`` up to a window a stream, are left out of an epoch.

    As in ``Batches``, ``epoch(e, start=i)`` gives exactly the tail of ``epoch(e)``.

    Raises DataError for a text that is too short, ValueError for other arguments.
    """

    def __init__(
        self,
        ids: Tensor,
        batch_size: int,
        window: int,
        *,
        seed: int = 0,
        shift: bool = True,
        drop_last: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if ids.dim() != 1 or ids.is_floating_point():
            raise ValueError(f"ids: expected integers [characters], got {ids.dtype} {list(ids.shape)}")
        self.batch_size, self.window, self.seed, self.shift = batch_size, window, seed, shift
        self.device = torch.device(device)
        self.ids = ids.to(self.device)
        whole = shift or drop_last
        # Of each stream; one character more has to follow, as a target.
        length = (len(ids) - 1 - (window - 1) * shift) // batch_size
        self.length = length // window * window if whole else length
        if self.length < 1:
            least = batch_size * (window if whole else 1) + 1 + (window - 1) * shift
            raise DataError(
                f"Windows: expected {least} characters or more for {batch_size} streams"
                f"{f' of windows of {window}' if whole else ''}, got {len(ids)}; lower the batch size or the window, "
                f"or use a longer text"
            )

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-self.length // self.window)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (batch_index, x int64 [batch_size, T], y int64 [batch_size, T]) from batch ``start`` to the end of
        epoch ``epoch``; T is ``window``, less in the last batch unless it is dropped.

        Raises ValueError for a negative epoch or start.
        """
        if epoch < 0 or start < 0:
            raise ValueError(f"epoch, start: expected 0 or more, got {epoch} and {start}")
        return self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        first = self.offset(epoch)
        span = self.batch_size * self.length
        x, y = (self.ids[first + k : first + k + span].view(self.batch_size, -1) for k in (0, 1))
        for index in range(start, len(self)):
            place = slice(index * self.window, min((index + 1) * self.window, self.length))
            yield index, x[:, place].long(), y[:, place].long()

    def offset(self, epoch: int) -> int:
        """The character that an epoch begins with."""
        if not self.shift:
            return 0
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        return int(torch.randint(self.window, (), generator=generator))
