"""Batches of images: seeded order and augmentation, made on the training device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from .errors import DataError
from .image_data import check_split

_PAD = 4
_SHIFTS = 2 * _PAD + 1
AUGMENTATIONS = ("none", "crop_flip")


class Batches:
    """Iterates over a set of images, epoch by epoch.

    images: uint8 [N, C, H, W]; labels: int64 [N]. Both are moved to ``device`` once, here. mean, std: per
    channel, [C], of images / 255. augment: "none", or "crop_flip" (zero-pad by 4 pixels, crop at random to
    the old size, mirror every other image on average). augmented: which batches are, by their number over all epochs;
    None for all. classes: if given, labels must be in [0, classes).

    Order and augmentation are pure functions of (seed, epoch, batch index) for a given set and batch size:
    one CPU generator per epoch draws the permutation, then one integer per position in it. So ``epoch(e,
    start=i)`` gives exactly the tail of ``epoch(e)``, and no device, thread count or earlier epoch changes
    what is drawn.

    Raises DataError for images or labels of another shape, dtype or range, ValueError for other arguments.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: Tensor | Sequence[float],
        std: Tensor | Sequence[float],
        seed: int = 0,
        shuffle: bool = True,
        augment: str = "none",
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        classes: int | None = None,
        augmented: Callable[[int], bool] | None = None,
    ) -> None:
        check_split("Batches", images, labels, classes)
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment: expected one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        if drop_last and batch_size > images.shape[0]:
            raise DataError(
                f"Batches: expected at least one full batch of {batch_size}, got {images.shape[0]} images; "
                "lower the batch size or set drop_last=False"
            )
        channels = images.shape[1]
        mean_tensor = torch.as_tensor(mean, dtype=torch.float32).flatten()
        std_tensor = torch.as_tensor(std, dtype=torch.float32).flatten()
        if (
            mean_tensor.shape[0] != channels
            or std_tensor.shape[0] != channels
            or not bool((std_tensor > 0).all())
        ):
            raise ValueError(
                f"mean, std: expected {channels} values each, std above 0, got {mean_tensor.tolist()} and "
                f"{std_tensor.tolist()}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.augment = augment
        self._augmented = augmented
        self._order: tuple[int, Tensor] | None = None
        self.drop_last = drop_last
        self.device = torch.device(device)
        self.images = images.to(self.device).contiguous()
        self.labels = labels.to(self.device)
        # (x / 255 - mean) / std as one product and one difference
        self._scale = (1.0 / (255.0 * std_tensor)).view(1, channels, 1, 1).to(self.device)
        self._shift = (mean_tensor / std_tensor).view(1, channels, 1, 1).to(self.device)
        self._rows = torch.arange(images.shape[2], device=self.device)
        self._columns = torch.arange(images.shape[3], device=self.device)

    def __len__(self) -> int:
        """Batches per epoch."""
        count = self.images.shape[0]
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (batch_index, x float32 [B, C, H, W], y int64 [B]) from batch ``start`` to the end of epoch
        ``epoch``.

        The last batch is smaller unless ``drop_last``. Raises ValueError for a negative epoch or start.
        """
        if epoch < 0 or start < 0:
            raise ValueError(f"epoch, start: expected 0 or more, got {epoch} and {start}")
        return self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        order, codes = self.draws(epoch)
        # One transfer an epoch: a copy per batch from pageable memory would stall a GPU every step.
        order = order.to(self.device)
        codes = None if codes is None else codes.to(self.device)
        for index in range(start, len(self)):
            window = slice(index * self.batch_size, (index + 1) * self.batch_size)
            chosen = order[window]
            raw = self.images.index_select(0, chosen)
            if codes is not None and self._augments(epoch * len(self) + index):
                raw = self._crop_flip(raw, codes[window])
            x = raw.float().mul_(self._scale).sub_(self._shift)
            yield index, x, self.labels.index_select(0, chosen)

    def samples(self, epoch: int, index: int) -> Tensor:
        """Which images batch ``index`` of epoch ``epoch`` holds: int64 [B], on the CPU."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.draws(epoch)[0]
        return self._order[1][index * self.batch_size : (index + 1) * self.batch_size]

    def _augments(self, number: int) -> bool:
        return self._augmented is None or self._augmented(number)

    def draws(self, epoch: int) -> tuple[Tensor, Tensor | None]:
        """The epoch's random numbers, on the CPU: order int64 [N] and, with augmentation, a code int64 [N]
        per position.

        A code is (dy * 9 + dx) * 2 + flip with dy, dx in 0..8: the crop's upper left corner in the padded
        image.
        """
        count = self.images.shape[0]
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        if self.augment == "none":
            return order, None
        return order, torch.randint(0, _SHIFTS * _SHIFTS * 2, (count,), generator=generator)

    def _crop_flip(self, raw: Tensor, codes: Tensor) -> Tensor:
        """raw uint8 [B, C, H, W], codes int64 [B] -> uint8 [B, C, H, W]; the padding is black."""
        batch, channels, height, width = raw.shape
        flip = codes % 2
        dx = codes // 2 % _SHIFTS
        dy = codes // (2 * _SHIFTS)
        padded = functional.pad(raw, (_PAD, _PAD, _PAD, _PAD))
        # Mirroring the cropped image is reading its columns from the right.
        columns = torch.where(flip[:, None] == 1, width - 1 - self._columns, self._columns) + dx[:, None]
        rows = self._rows + dy[:, None]
        pixels = rows[:, :, None] * (width + 2 * _PAD) + columns[:, None, :]
        pixels = pixels.view(batch, 1, height * width).expand(batch, channels, height * width)
        return padded.view(batch, channels, -1).gather(2, pixels).view(batch, channels, height, width)


def mix(seed: int, epoch: int) -> int:
    """A generator seed from two integers; hashed, so that (1, 0) and (0, 1) have nothing in common."""
    # Four bytes: torch's CPU generator keeps 32 bits of the seed.
    digest = hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
