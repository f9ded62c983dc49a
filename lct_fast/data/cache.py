"""Decode once: keep a set of images as one safetensors file and find it again by what it was made from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .errors import reason
from .image_data import ImageData

_log = logging.getLogger("lct_fast.data")
# Raised with any change to what a cached file holds or how images are decoded.
_FORMAT = 1
_TENSORS = ("train_images", "train_labels", "test_images", "test_labels", "mean", "std")


@dataclass(frozen=True)
class Source:
    """A set of images that is not decoded yet: its kind, where it is, the files and options that define it,
    how to read it.
    """

    kind: str
    path: Path
    files: list[Path]
    options: dict[str, int | None]
    read: Callable[[], ImageData]


def default_folder() -> Path:
    """$LCT_CACHE, or ~/.cache/lct_fast."""
    return Path(os.environ.get("LCT_CACHE") or Path.home() / ".cache" / "lct_fast")


def read_through(source: Source, folder: Path | None) -> ImageData:
    """The decoded set, from the cache if it is there, else decoded and put there.

    A cached file that is damaged is decoded again; a cache folder that cannot be written costs a warning, not
    the data.
    """
    path = cached_file(source, folder or default_folder())
    if path.exists():
        try:
            return _load(path)
        # Damage shows as whatever safetensors, json or the checks of ImageData make of it.
        except Exception as error:
            _log.warning("%s: damaged cache (%s), decoding again", path, reason(error))
    data = source.read()
    try:
        _save(data, path)
    except OSError as error:
        _log.warning(
            "%s: cannot write the cache (%s); the next run decodes again", path, error.strerror or error
        )
    return data


def cached_file(source: Source, folder: Path) -> Path:
    """Where the set belongs: named by kind and by a hash of the sources' absolute paths, sizes and times, and
    the options.
    """
    stats = [(os.path.abspath(file), file.stat()) for file in sorted(source.files)]
    described = [_FORMAT, source.kind, os.path.abspath(source.path), source.options]
    described.append([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return folder.expanduser() / f"{source.kind}-{digest[:16]}.safetensors"


def _save(data: ImageData, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {name: getattr(data, name).contiguous() for name in _TENSORS}
    about = {
        "name": data.name,
        "classes": data.classes,
        "sources": data.sources,
        "checksum": _checksum(tensors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own per writer: the ranks of one run may decode the same set at once.
    temporary = path.with_name(f"{path.stem}-{secrets.token_hex(6)}.part")
    try:
        save_file(tensors, temporary, {"lct_fast": json.dumps(about)})
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        # Gone already when all went well; left over when the disk is full or the user interrupts.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _load(path: Path) -> ImageData:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["lct_fast"])
        tensors = {name: file.get_tensor(name) for name in _TENSORS}
    if _checksum(tensors) != about["checksum"]:
        raise ValueError("checksum differs")
    return ImageData(name=about["name"], classes=about["classes"], sources=tuple(about["sources"]), **tensors)


def _checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in _TENSORS:
        value = zlib.crc32(tensors[name].numpy().data, value)
    return value
