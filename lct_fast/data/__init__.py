"""Data sets of labelled images: scikit-learn's digits, CIFAR-10 and -100, and any tree of images; and texts.

`load` gives a set of images as uint8 tensors, decoded once and cached; `Batches` iterates over it on the training
device. `load_text` gives a text as ids of its characters; `Windows` iterates over it.
"""

from __future__ import annotations

import re
from pathlib import Path

from .batches import Batches
from .errors import DataError
from .image_data import ImageData, take
from .text import TextData, load_text
from .windows import Windows

__all__ = [
    "Batches",
    "DataError",
    "ImageData",
    "TextData",
    "Windows",
    "load",
    "load_text",
    "names",
    "text_path",
]

_FORMS = {
    "digits": "digits or digits:fold=0 (to 4)",
    "cifar10": "cifar10:PATH",
    "cifar100": "cifar100:PATH",
    "images": "images:PATH or images:PATH?size=64",
    "text": "text:FILE",
}


def names() -> list[str]:
    """What can stand before the colon in a data spec."""
    return list(_FORMS)


def text_path(spec: str) -> Path | None:
    """The file of "text:FILE"; None for the spec of a set of images.

    Raises DataError where the file is missing in ``spec``.
    """
    name, _, rest = spec.partition(":")
    if name != "text":
        return None
    if not rest:
        raise DataError(f"data: expected {_FORMS[name]}, got {spec!r}; say where the data is")
    return Path(rest).expanduser()


def load(spec: str, cache: Path | None = None, limit: int | None = None) -> ImageData:
    """The set of images that ``spec`` names, in memory.

    spec: "digits", "digits:fold=0" to 4 (tested on that fifth), "cifar10:PATH", "cifar100:PATH", "images:PATH",
    "images:PATH?size=64". PATH is a folder or an archive (see docs/data.md). cache: folder for decoded sets; None:
    $LCT_CACHE, else ~/.cache/lct_fast. limit: this many training images, balanced over the classes after a fixed
    shuffle; the test split stays whole.

    Raises DataError, one line, for an unknown name, a wrong path, or files that are missing, corrupt or not
    as expected.
    """
    if text_path(spec) is not None:
        raise DataError(
            f"data: expected a set of images, got {spec!r}; a text is read by data.load_text(FILE)"
        )
    name, path, size = _parse(spec)
    if path is None:
        from .digits import load_digits

        data = load_digits(_fold(spec))
    else:
        data = _read(name, path, size, cache)
    return data if limit is None else take(data, limit)


def _read(name: str, path: Path, size: int | None, cache: Path | None) -> ImageData:
    from . import cifar, images
    from .cache import read_through

    try:
        source = images.locate(path, size) if name == "images" else cifar.locate(name, path)
        return read_through(source, cache)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: expected to read it, got {error.strerror or error}; check the file"
        ) from None


def _fold(spec: str) -> int | None:
    """ "digits:fold=3" -> 3, "digits" -> None."""
    from .digits import FOLDS

    _, colon, rest = spec.partition(":")
    if not colon:
        return None
    number = rest.removeprefix("fold=")
    if not rest.startswith("fold=") or not number.isdecimal() or int(number) >= FOLDS:
        raise DataError(f"data: expected digits or digits:fold=0 to digits:fold={FOLDS - 1}, got {spec!r}")
    return int(number)


def _parse(spec: str) -> tuple[str, Path | None, int | None]:
    """ "name:PATH?size=S" -> (name, PATH, S)."""
    name, colon, rest = spec.partition(":")
    if name not in _FORMS:
        raise DataError(
            f"data: expected one of {', '.join(_FORMS.values())}, got {spec!r}; choose one of them"
        )
    if name == "digits":
        return name, None, None
    size = None
    option = re.search(r"\?(\w+)=([^/?]*)$", rest)
    if option:
        key, value = option.groups()
        if name != "images" or key != "size" or not value.isdecimal() or int(value) < 1:
            raise DataError(
                f"data: expected the one option size=PIXELS, with images only, got {spec!r}; correct it"
            )
        rest, size = rest[: option.start()], int(value)
    if not rest:
        raise DataError(f"data: expected {_FORMS[name]}, got {spec!r}; say where the data is")
    return name, Path(rest).expanduser(), size
