"""CIFAR-10 and CIFAR-100 in every form they are handed round in; labels come out the same from each."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from .archives import Listing, is_archive_name, read_archives, strip_root
from .cache import Source
from .cifar_classes import CIFAR10_CLASSES, CIFAR100_CLASSES
from .cifar_pickle import read_pickle
from .decode import decode_all, encoding, read_entry
from .errors import DataError
from .image_data import ImageData, make
from .trees import is_image_name, is_split_name, labels_of, list_folder, make_tree

_TRAIN_COUNT, _TEST_COUNT = 50_000, 10_000
_SIDE = 32
# Archives of this rank or more are trees, of which there may be several.
_SHARDS = 2
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Form:
    """What one of the two sets is called and made of."""

    title: str
    classes: list[str]
    # Begins the names of this set's archives, and of no other's.
    archive_name: re.Pattern[str]
    # Bytes before the pixels of a binary record; the last of them is the label.
    label_bytes: int
    # Key of the labels in the python files.
    label_key: bytes
    # The original files of either split; the binary ones have .bin after the name.
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    # Folders that the original archives extract to.
    folders: tuple[str, ...]
    download: str

    @property
    def python_files(self) -> tuple[str, ...]:
        return self.train_files + self.test_files

    @property
    def binary_files(self) -> tuple[str, ...]:
        return tuple(name + ".bin" for name in self.python_files)


_FORMS = {
    "cifar10": _Form(
        "CIFAR-10",
        CIFAR10_CLASSES,
        re.compile(r"cifar[-_]?10(?!\d)", re.IGNORECASE),
        1,
        b"labels",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        ("test_batch",),
        ("cifar-10-batches-py", "cifar-10-batches-bin"),
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    "cifar100": _Form(
        "CIFAR-100",
        CIFAR100_CLASSES,
        re.compile(r"cifar[-_]?100(?!\d)", re.IGNORECASE),
        2,
        b"fine_labels",
        ("train",),
        ("test",),
        ("cifar-100-python", "cifar-100-binary"),
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
}


def locate(name: str, path: Path) -> Source:
    """The source of ``cifar10:PATH`` or ``cifar100:PATH``.

    PATH: the original python or binary archive or the folder that it extracts to (or the folder that holds
    that one); a tree of images train/<class>/* and test/<class>/*; an archive of such a tree; or a folder of
    archives whose names begin with the set's name and whose contents are joined. Raises DataError where there
    is nothing of the kind.
    """
    form = _FORMS[name]
    if not path.exists():
        raise DataError(
            f"{name}: expected a folder or an archive, got {path}, which does not exist; check the path or "
            f"fetch {form.download}"
        )
    if not path.is_dir():
        return Source(name, path, [path], {}, lambda: _read_archives(name, path, [path], []))
    for folder in (path, *(path / sub for sub in form.folders)):
        for wanted in (form.python_files, form.binary_files):
            files = [folder / file for file in wanted]
            present = [file for file in files if file.is_file()]
            if present:
                listing = Listing({file.name: file for file in present})
                return Source(name, path, present, {}, partial(_read_original, name, listing, str(folder)))
    if any((path / split).is_dir() for split in ("train", "test", "val")):
        listing = list_folder(path)
        files = [content for content in listing.files.values() if isinstance(content, Path)]
        return Source(name, path, files, {}, lambda: _read_tree(name, path, [listing], (str(path),)))
    taken, left = choose_archives(name, path)
    if len(taken) > 1 and _rank(name, taken[0]) < _SHARDS:
        raise DataError(
            f"{name}: expected one original archive in {path}, got {', '.join(file.name for file in taken)}; "
            "give the path of one of them"
        )
    if not taken:
        raise DataError(
            f"{name}: expected the original files ({form.python_files[0]}, {form.binary_files[0]}), train/ "
            f"and test/ folders, or archives named {name}* in {path}, got none of them; check the path or "
            f"fetch {form.download}"
        )
    return Source(name, path, taken, {}, lambda: _read_archives(name, path, taken, left))


def choose_archives(name: str, folder: Path) -> tuple[list[Path], list[Path]]:
    """(taken, left out) among the folder's archives of this set, each sorted by name.

    In order of preference: the original python archive, the original binary one, all that don't have "jpg" or
    "jpeg" in the name (shards are joined), all that do.
    """
    pattern = _FORMS[name].archive_name
    found = sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and is_archive_name(file) and pattern.match(file.name)
    )
    best = min((_rank(name, file) for file in found), default=0)
    taken = [file for file in found if _rank(name, file) == best]
    return taken, [file for file in found if file not in taken]


def _rank(name: str, file: Path) -> int:
    """Preference among archives of one set, the lowest first."""
    rest = file.name.lower()[len(name) :]
    if "python" in rest:
        return 0
    if "binary" in rest:
        return 1
    return _SHARDS + 1 if "jpg" in rest or "jpeg" in rest else _SHARDS


def _read_archives(name: str, path: Path, taken: list[Path], left: list[Path]) -> ImageData:
    from tqdm import tqdm

    form = _FORMS[name]
    if len(taken) > 1 or left:
        also = f" (left out: {', '.join(file.name for file in left)})" if left else ""
        tqdm.write(
            f"{name}: reading {', '.join(file.name for file in taken)} in {path}{also}", file=sys.stderr
        )
    originals = set(form.python_files + form.binary_files)

    def wanted(member: str) -> bool:
        return is_image_name(member) or PurePosixPath(member).name in originals

    listings = read_archives(taken, wanted)
    sources = tuple(str(file) for file in taken)
    named = [
        {PurePosixPath(member).name: content for member, content in listing.files.items()}
        for listing in listings
    ]
    if len(listings) == 1 and originals & set(named[0]):
        return _read_original(name, Listing(named[0]), str(taken[0]))
    if not any(named):
        raise DataError(
            f"{name}: expected {form.python_files[0]}, {form.binary_files[0]} or train/<class>/ images in "
            f"{path}, got none of them; check that it is {form.title}"
        )
    return _read_tree(name, path, [strip_root(listing, is_split_name) for listing in listings], sources)


def _read_tree(name: str, path: Path, listings: list[Listing], sources: tuple[str, ...]) -> ImageData:
    form = _FORMS[name]
    what = f"{name}:{path}"
    joined = Listing()
    for listing, source in zip(listings, sources, strict=True):
        twice = next((file for file in listing.files if file in joined.files), None)
        if twice is not None:
            raise DataError(
                f"{what}: expected every image once, got {twice} from {Path(source).name} and another "
                "archive; give the path of one of them, or move one away"
            )
        joined.files.update(listing.files)
        joined.folders.update(listing.folders)
    tree = make_tree(what, joined, form.classes)
    if tree.test is None:
        raise DataError(
            f"{what}: expected train/<class>/ and test/<class>/, got class folders alone; add the test split"
        )
    entries = tree.train + tree.test
    images = decode_all(
        entries, what, size=None, hint=f"{form.title} is {_SIDE}x{_SIDE}; use images:PATH", colour=True
    )
    if images.shape[2:] != (_SIDE, _SIDE):
        raise DataError(
            f"{what}: expected {_SIDE}x{_SIDE} images, got {images.shape[3]}x{images.shape[2]}; use "
            "images:PATH for other data"
        )
    lossy = sorted({encoding(read_entry(entry)) for entry in entries} - {"lossless"})
    count = len(tree.train)
    labels = labels_of(entries)
    return _finish(
        form,
        images[:count],
        labels[:count],
        images[count:],
        labels[count:],
        sources,
        f" ({', '.join(lossy)})" if lossy else "",
    )


def _read_original(name: str, listing: Listing, where: str) -> ImageData:
    form = _FORMS[name]
    python = any(file in listing.files for file in form.python_files)
    suffix = "" if python else ".bin"
    splits: list[Tensor] = []
    for files in (form.train_files, form.test_files):
        parts = []
        for file in files:
            content = listing.files.get(file + suffix)
            if content is None:
                raise DataError(
                    f"{name}: expected {file + suffix} in {where}, got only "
                    f"{', '.join(sorted(listing.files))}; fetch {form.download} again"
                )
            raw = content if isinstance(content, bytes) else content.read_bytes()
            what = f"{where}/{file + suffix}"
            parts.append(_python_rows(raw, what, form) if python else _binary_rows(raw, what, form))
        splits += [torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])]
    for split, labels in (("train", splits[1]), ("test", splits[3])):
        counts = torch.bincount(labels, minlength=len(form.classes))
        if int(counts.min()) == 0:
            missing = form.classes[int(counts.argmin())]
            raise DataError(
                f"{name}: expected images of every class in {where}, got none of {missing} in {split}; "
                "fetch it again"
            )
    return _finish(form, splits[0], splits[1], splits[2], splits[3], (where,), "")


def _python_rows(raw: bytes, what: str, form: _Form) -> tuple[Tensor, Tensor]:
    pixels, labels = read_pickle(raw, what, form.label_key, _PIXELS)
    return pixels.view(-1, 3, _SIDE, _SIDE), _checked(labels, what, form)


def _binary_rows(raw: bytes, what: str, form: _Form) -> tuple[Tensor, Tensor]:
    record = form.label_bytes + _PIXELS
    if not raw or len(raw) % record:
        raise DataError(
            f"{what}: expected records of {record} bytes, got {len(raw)} bytes; it was cut short: fetch it "
            "again"
        )
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, record)
    labels = rows[:, form.label_bytes - 1].long()
    return rows[:, form.label_bytes :].reshape(-1, 3, _SIDE, _SIDE), _checked(labels, what, form)


def _checked(labels: Tensor, what: str, form: _Form) -> Tensor:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(form.classes):
        raise DataError(
            f"{what}: expected labels 0..{len(form.classes) - 1}, got {low}..{high}; it is no {form.title} "
            "file"
        )
    return labels


def _finish(
    form: _Form,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    sources: tuple[str, ...],
    note: str,
) -> ImageData:
    """Name the set for what it is: lossy images and missing ones are part of the name that tables print."""
    name = form.title + note
    if (train.shape[0], test.shape[0]) != (_TRAIN_COUNT, _TEST_COUNT):
        name += f" [{train.shape[0]:,} + {test.shape[0]:,} of {_TRAIN_COUNT:,} + {_TEST_COUNT:,} images]"
    return make(name, train, train_labels, test, test_labels, form.classes, sources)
