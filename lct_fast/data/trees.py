"""Trees of images, ``train/<class>/*`` and ``test/<class>/*``: which files there are, and their labels."""

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
    seen: set[tuple[int, int]] = set()
    for top in [root / name for name in splits] or [root]:
        # Class folders are often links; a link to a folder above would be walked over and over.
        for folder, subfolders, names in os.walk(top, followlinks=True, onerror=_raise):
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not hidden(name))
            base = Path(folder).relative_to(root).as_posix()
            prefix = "" if base == "." else base + "/"
            listing.folders.update(prefix + name for name in subfolders)
            for name in names:
                if is_image_name(name) and not hidden(name):
                    listing.files[prefix + name] = Path(folder) / name
    listing.folders.update(splits)
    return listing


def _raise(error: OSError) -> None:
    raise error


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
            "and the layout"
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
    found = {name[len(prefix) :].split("/", 1)[0] for name in listing.folders if name.startswith(prefix)}
    by_class: dict[str, list[str]] = {name: [] for name in found}
    for name in listing.files:
        if not name.startswith(prefix):
            continue
        label_name, slash, _ = name[len(prefix) :].partition("/")
        if not slash:
            raise DataError(
                f"{what}: expected {prefix}<class>/<image>, got an image outside a class folder, {name}; "
                "move it into one"
            )
        by_class.setdefault(label_name, []).append(name)
    names = sorted(by_class) if classes is None else classes
    if set(by_class) != set(names):
        missing, extra = set(names) - set(by_class), set(by_class) - set(names)
        raise DataError(
            f"{what}: expected the {len(names)} class folders {_some(names)} in {prefix or 'the root'}, "
            f"missing {_some(missing)}, unexpected {_some(extra)}; rename, add or remove folders"
        )
    empty = [name for name in names if not by_class[name]]
    if empty:
        raise DataError(
            f"{what}: expected images ({', '.join(EXTENSIONS)}) in every class folder, got none in "
            f"{prefix}: {_some(empty)}; add images or remove the folder"
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
    if not ordered:
        return "none"
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def labels_of(entries: list[Entry]) -> Tensor:
    """int64 [N]."""
    return torch.tensor([entry.label for entry in entries], dtype=torch.int64)
