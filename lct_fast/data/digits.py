"""scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the package."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import DataError
from .image_data import ImageData, make, stratified_split

_SPLIT_SEED = 1797
_TEST_COUNT = 360


FOLDS = 5


def load_digits(fold: int | None = None) -> ImageData:
    """1,437 training and 360 test images, uint8 [N, 1, 8, 8], split by a fixed stratified shuffle.

    fold: 0 to 4, to test on that fifth of all images instead (359 or 360 of them); the five fifths are disjoint.

    Pixels keep scikit-learn's exact values 0..16; they are not stretched to 0..255. ``mean`` and ``std`` are
    measured on the same scale (/255), so a normalised batch comes out the same either way.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DataError(
            f"digits: expected scikit-learn, got {error}; install it (pip install scikit-learn)"
        ) from None
    raw = load()
    images = torch.from_numpy(raw.images).to(torch.uint8).unsqueeze(1).contiguous()
    labels = torch.from_numpy(raw.target).to(torch.int64)
    if fold is None:
        train, test = stratified_split(labels, _TEST_COUNT, _SPLIT_SEED)
    else:
        train, test = _fold(labels, fold)
    classes = [str(digit) for digit in range(10)]
    return make(
        "digits", images[train], labels[train], images[test], labels[test], classes, ("scikit-learn",)
    )


def _fold(labels: Tensor, fold: int) -> tuple[Tensor, Tensor]:
    """Indices for training and for testing: of each class, every fifth image of a fixed shuffle."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    by_class = order[labels[order].argsort(stable=True)]
    test = torch.arange(len(labels)) % FOLDS == fold
    return by_class[~test].sort().values, by_class[test].sort().values
