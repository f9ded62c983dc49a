"""A set of labelled images in memory, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import DataError

_LIMIT_SEED = 20240601
_CHUNK = 4096


@dataclass(frozen=True)
class ImageData:
    """Labelled images with a train and a test split.

    name: what to call the set in a table. train_images, test_images: uint8 [N, C, H, W]. train_labels,
    test_labels: int64 [N], in [0, len(classes)). classes: a name per label. mean, std: float32 [C], over all
    pixels of ``train_images / 255`` (population standard deviation, 1 where a channel is constant). sources:
    the files it came from.

    Raises DataError where shapes, dtypes or labels don't fit together.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    mean: Tensor
    std: Tensor
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            check_split(f"{self.name}, {split} split", images, labels, len(self.classes))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise DataError(
                f"{self.name}: expected train and test images of one shape, got "
                f"{list(self.train_images.shape[1:])} and "
                f"{list(self.test_images.shape[1:])}; resize one of them"
            )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        return int(self.train_images.shape[1])

    @property
    def image_size(self) -> int:
        """Height of the images in pixels (all sets here are square unless the user's images are not)."""
        return int(self.train_images.shape[2])


def make(
    name: str,
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    classes: list[str],
    sources: tuple[str, ...] = (),
) -> ImageData:
    """An ImageData whose mean and std are measured on ``train_images``."""
    mean, std = channel_statistics(train_images)
    return ImageData(name, train_images, train_labels, test_images, test_labels, classes, mean, std, sources)


def check_split(what: str, images: Tensor, labels: Tensor, num_classes: int | None) -> None:
    """Raise DataError unless images are uint8 [N >= 1, C, H, W] and labels int64 [N] in [0, num_classes)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
        raise DataError(
            f"{what}: expected uint8 images [N, C, H, W] with at least one image, got {images.dtype} "
            f"{list(images.shape)}; convert them first"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{what}: expected int64 labels [{images.shape[0]}], got {labels.dtype} {list(labels.shape)}; "
            "give one label per image"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        allowed = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
        raise DataError(
            f"{what}: expected labels {allowed}, got {low}..{high}; check the label file or the class list"
        )


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation, float32 [C], of uint8 images [N, C, H, W] divided by 255.

    Summed exactly in integers, so the result doesn't depend on the thread count.
    """
    channels = images.shape[1]
    total = torch.zeros(channels, dtype=torch.int64)
    squares = torch.zeros(channels, dtype=torch.int64)
    for start in range(0, images.shape[0], _CHUNK):
        wide = images[start : start + _CHUNK].cpu().int()
        total += wide.sum(dim=(0, 2, 3))
        squares += wide.square_().sum(dim=(0, 2, 3))
    count = images.numel() // channels
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp_min_(0).sqrt_()
    std = torch.where(std > 0, std / 255, torch.ones_like(std))
    return (mean / 255).float(), std.float()


def take(data: ImageData, limit: int) -> ImageData:
    """The same set with ``limit`` training images (all of them if it has fewer); the test split stays whole.

    Every class is shuffled with a fixed seed and the classes are dealt out in turn, so class counts differ by
    at most one while classes last, and a smaller limit gives a subset of a larger one. mean and std are
    measured again.
    """
    if limit < 1:
        raise DataError(
            f"limit: expected 1 or more training images, got {limit}; leave it out to take them all"
        )
    count = data.train_labels.shape[0]
    if limit >= count:
        return data
    chosen = dealt_order(data.train_labels, _LIMIT_SEED)[:limit]
    images, labels = data.train_images[chosen], data.train_labels[chosen]
    mean, std = channel_statistics(images)
    return replace(data, train_images=images, train_labels=labels, mean=mean, std=std)


def dealt_order(labels: Tensor, seed: int) -> Tensor:
    """Indices int64 [N]: a seeded shuffle in which the classes take turns (the order within a turn is random
    too).
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(labels.shape[0], generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    turn = torch.empty_like(shuffled)
    turn[by_class] = torch.arange(labels.shape[0]) - starts[labels[by_class]]
    return shuffled[torch.argsort(turn[shuffled], stable=True)]


def stratified_split(labels: Tensor, test_count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(train, test) indices, each ascending; ``test_count`` test images are shared out over the classes.

    Shares are in proportion, rounded by largest remainder; a class of two or more gives at least one, so
    with many small classes there are more than ``test_count``.
    """
    total = labels.shape[0]
    counts = torch.bincount(labels)
    exact = counts.double() * test_count / total
    share = exact.floor().long()
    remainder = (exact - share).masked_fill(counts == 0, -1.0)
    for index in torch.argsort(remainder, descending=True, stable=True)[
        : test_count - int(share.sum())
    ].tolist():
        share[index] += 1
    short = (share == 0) & (counts > 1)
    share[short] = 1
    generator = torch.Generator().manual_seed(seed)
    is_test = torch.zeros(total, dtype=torch.bool)
    for label, wanted in enumerate(share.tolist()):
        members = torch.nonzero(labels == label).flatten()
        is_test[members[torch.randperm(members.shape[0], generator=generator)[:wanted]]] = True
    return torch.nonzero(~is_test).flatten(), torch.nonzero(is_test).flatten()
