"""Trees of images, ``train/<class>/*`` and ``test/<class>/*``: which files are there, and what they are
labelled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .archives import Listing, hidden
from .errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SPLITS = ("train", "test", "val")


@dataclass(frozen=True)
class Entry:
    """One encoded image: its class, its name in the tree, and its bytes or where they are."""

    label: int
    name: str
    content: bytes | Path


@dataclass(frozen=True)
class Tree:
    """Encoded images by split. test is None where the tree has no split folders."""

    classes: list[str]
    train: list[Entry]
    test: list[Entry] | None


def is_image_name(name: str) -> bool:
    """Whether the name ends like an image that the loader takes."""
    return name.lower().endswith(EXTENSIONS)


def is_split_name(name: str) -> bool:
    """Whether a folder of this name holds a split."""
    return name in _SPLITS


def list_folder(root: Path) -> Listing:
    """Image files and folders of a tree on disk: its split folders if it has any, else all class folders."""
    listing = Listing()
    splits = [name for name in _SPLITS if (root / name).is_dir()]
    for top in [root / name for name in splits] or [root]:
        for folder, subfolders, names in os.walk(top, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if not hidden(name))
            base = Path(folder).relative_to(root).as_posix()
            prefix = "" if base == "." else base + "/"
            listing.folders.update(prefix + name for name in subfolders)
            for name in names:
                if is_image_name(name) and not hidden(name):
                    listing.files[prefix + name] = Path(folder) / name
    listing.folders.update(splits)
    return listing


def make_tree(what: str, listing: Listing, classes: list[str] | None = None) -> Tree:
    """Sort a listing into splits and classes; ``classes`` fixes the class folders and the order of labels.

    Without it, labels follow the sorted names of the folders under train/ (or under the root). ``test/`` is
    taken before ``val/``. Images may lie deeper than the class folder. Raises DataError for a missing split,
    a class without images in a split, class folders that differ from what is expected, an image outside a
    class folder, and fewer than two classes.
    """
    if not listing.files:
        raise DataError(
            f"{what}: expected images ({', '.join(EXTENSIONS)}) in train/<class>/, got none; check the path "
            f"and the layout"
        )
    tops = {name.split("/", 1)[0] for name in (*listing.files, *listing.folders)}
    if not tops & set(_SPLITS):
        names, train = _split_entries(what, "", listing, classes)
        return Tree(names, train, None)
    test_split = "test" if "test" in tops else "val"
    for split in ("train", test_split):
        if split not in tops:
            wanted = "train/" if split == "train" else "test/ (or val/)"
            raise DataError(
                f"{what}: expected a folder {wanted}, got {', '.join(sorted(tops))}; add the missing split"
            )
    names, train = _split_entries(what, "train/", listing, classes)
    _, test = _split_entries(what, f"{test_split}/", listing, names)
    return Tree(names, train, test)


def _split_entries(
    what: str, prefix: str, listing: Listing, classes: list[str] | None
) -> tuple[list[str], list[Entry]]:
    """Class names and entries, sorted by class and name, of the files below ``prefix``."""
    found = {
        name[len(prefix) :].split("/", 1)[0]
        for name in listing.folders
        if name.startswith(prefix) and name != prefix[:-1]
    }
    by_class: dict[str, list[str]] = {name: [] for name in found}
    for name in listing.files:
        if not name.startswith(prefix):
            continue
        label_name, slash, _ = name[len(prefix) :].partition("/")
        if not slash:
            raise DataError(
                f"{what}: expected {prefix}<class>/<image>, got an image outside a class folder, {name}; "
                f"move it into one"
            )
        by_class.setdefault(label_name, []).append(name)
    names = sorted(by_class) if classes is None else classes
    if set(by_class) != set(names):
        missing = _some(set(names) - set(by_class))
        extra = _some(set(by_class) - set(names))
        raise DataError(
            f"{what}: expected the {len(names)} class folders {_some(names)} in {prefix or 'the root'}, got "
            f"{f'none of {missing}' if missing else ''}{' and ' if missing and extra else ''}"
            f"{f'also {extra}' if extra else ''}; rename, add or remove folders"
        )
    empty = _some(name for name in names if not by_class[name])
    if empty:
        raise DataError(
            f"{what}: expected images ({', '.join(EXTENSIONS)}) in every class folder, got none in "
            f"{prefix}: {empty}; "
            "add images or remove the folder"
        )
    if len(names) < 2:
        raise DataError(
            f"{what}: expected two or more class folders, got {_some(names)}; give one folder per class"
        )
    return names, [
        Entry(label, name, listing.files[name])
        for label, key in enumerate(names)
        for name in sorted(by_class[key])
    ]


def _some(names: Iterable[str]) -> str:
    """A few of the names, in order, for a message of one line."""
    ordered = sorted(names) if isinstance(names, set) else list(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def labels_of(entries: list[Entry]) -> Tensor:
    """int64 [N]."""
    return torch.tensor([entry.label for entry in entries], dtype=torch.int64)
