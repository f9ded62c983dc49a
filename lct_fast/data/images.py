"""``images:PATH``: any tree of labelled images, in a folder or in an archive."""

from __future__ import annotations

from pathlib import Path

import torch

from .archives import Listing, read_archive, strip_root
from .cache import Source
from .decode import decode_all
from .errors import DataError
from .image_data import ImageData, make, stratified_split
from .trees import is_image_name, is_split_name, labels_of, list_folder, make_tree

_SPLIT_SEED = 20240602


def locate(path: Path, size: int | None) -> Source:
    """The source of ``images:PATH``: a tree of images in a folder or in an archive.

    size: side in pixels to which every image is resized (shorter side, bilinear with antialiasing) and
    centre-cropped; None: all images must have one size already. Raises DataError where there is nothing to
    read.
    """
    if not path.exists():
        raise DataError(
            f"images: expected a folder or an archive, got {path}, which does not exist; check the path"
        )
    options = {"size": size}
    if path.is_dir():
        listing = list_folder(path)
        files = [content for content in listing.files.values() if isinstance(content, Path)]
        return Source("images", path, files, options, lambda: _build(path, listing, size))
    return Source(
        "images",
        path,
        [path],
        options,
        lambda: _build(path, strip_root(read_archive(path, is_image_name), is_split_name), size),
    )


def _build(path: Path, listing: Listing, size: int | None) -> ImageData:
    what = f"images:{path}"
    tree = make_tree(what, listing)
    entries = tree.train + (tree.test or [])
    images = decode_all(entries, what, size=size, hint="give a side in pixels: images:PATH?size=64")
    labels = labels_of(entries)
    if tree.test is not None:
        train, test = torch.arange(len(tree.train)), torch.arange(len(tree.train), len(entries))
    else:
        counts = torch.bincount(labels)
        if int(counts.min()) < 2:
            lonely = tree.classes[int(counts.argmin())]
            raise DataError(
                f"{what}: expected two or more images per class to split them 90/10, got one in {lonely}; "
                "add images or give train/ and test/ folders"
            )
        train, test = stratified_split(labels, max(1, round(len(entries) / 10)), _SPLIT_SEED)
    return make(
        path.resolve().name,
        images[train],
        labels[train],
        images[test],
        labels[test],
        tree.classes,
        (str(path),),
    )
