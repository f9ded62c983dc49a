"""Read tar and zip archives into memory; nothing is extracted onto the disk."""

from __future__ import annotations

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .errors import DataError, reason

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".zip")
# Above the largest file of the known archives, the 154 MB training pickle of CIFAR-100.
_MAX_MEMBER = 256 * 2**20
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,  # an encrypted zip, or (NotImplementedError) an unknown compression
    ValueError,
)


@dataclass
class Listing:
    """Files and folders by slash-separated name below some root. A file is its bytes or where they are."""

    files: dict[str, bytes | Path] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)


def is_archive_name(path: Path) -> bool:
    """Whether the name ends like an archive that `read_archive` knows."""
    return path.name.lower().endswith(SUFFIXES)


def read_archive(path: Path, wanted: Callable[[str], bool]) -> Listing:
    """The members that ``wanted`` admits, as bytes, and all folders of a tar (gz, xz, bz2) or zip archive.

    The format is told from the content. Hidden files are left out. Raises DataError for a file that is no
    archive, is corrupt or cut short, or has an unsafe member: an absolute name, "..", a link, a device, more
    than 256 MiB.
    """
    listing = Listing()
    try:
        members = _zip_members(path, wanted) if zipfile.is_zipfile(path) else _tar_members(path, wanted)
        for name, content in members:
            if content is None:
                listing.folders.add(name)
            elif name in listing.files:
                raise DataError(f"{path}: expected each name once, got {name} twice; pack the archive again")
            else:
                listing.files[name] = content
    except DataError:
        raise
    except _BROKEN as error:
        raise DataError(
            f"{path}: expected a whole tar (gz, xz, bz2) or zip archive, got one that cannot be read "
            f"({reason(error)}); fetch or copy it again"
        ) from None
    return listing


def read_archives(paths: list[Path], wanted: Callable[[str], bool]) -> list[Listing]:
    """`read_archive` for several files at once, with a progress bar; results in the order of ``paths``."""
    from tqdm import tqdm

    pool = ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1))
    try:
        tasks = [pool.submit(read_archive, path, wanted) for path in paths]
        return [task.result() for task in tqdm(tasks, desc="reading", unit="file", disable=None)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def strip_root(listing: Listing, keep: Callable[[str], bool]) -> Listing:
    """Drop leading folders that everything shares, up to one whose name ``keep`` admits."""
    while True:
        heads = {name.split("/", 1)[0] for name in listing.files}
        if len(heads) != 1 or any("/" not in name for name in listing.files):
            return listing
        head = heads.pop()
        if keep(head):
            return listing
        prefix = head + "/"
        listing = Listing(
            {name.removeprefix(prefix): content for name, content in listing.files.items()},
            {name.removeprefix(prefix) for name in listing.folders if name.startswith(prefix)},
        )


def hidden(name: str) -> bool:
    """Whether a part of the name marks it as no data: dot files, and the resource forks that macOS packs."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _safe_name(path: Path, raw: str) -> str:
    name = raw.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")):
        raise DataError(
            f"{path}: expected names inside the archive, got {raw!r}; don't use an archive that reaches "
            "outside itself"
        )
    return "/".join(parts)


def _check_size(path: Path, name: str, size: int) -> None:
    if size > _MAX_MEMBER:
        raise DataError(
            f"{path}: expected files of at most {_MAX_MEMBER >> 20} MiB, got {name} of {size >> 20} MiB; "
            "unpack the archive and give the folder"
        )


def _tar_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None]]:
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            name = _safe_name(path, member.name)
            if not name or hidden(name):
                continue
            if member.isdir():
                yield name, None
                continue
            if not member.isreg():
                raise DataError(
                    f"{path}: expected plain files, got a link or device {name}; pack it with tar -h"
                )
            if wanted(name):
                _check_size(path, name, member.size)
                stream = tar.extractfile(member)
                if stream is not None:
                    yield name, stream.read()
        _check_end(path, tar)


def _check_end(path: Path, tar: tarfile.TarFile) -> None:
    """tarfile takes a cut between two members, or a damaged header, for the end: look for the end mark."""
    stream: IO[bytes] | None = tar.fileobj  # type: ignore[assignment]
    if stream is None:
        return
    stream.seek(tar.offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) != tarfile.BLOCKSIZE or any(block):
        raise DataError(
            f"{path}: expected a whole tar archive, got one with no end mark after {tar.offset} bytes; "
            "it was cut short or damaged: fetch or copy it again"
        )
    # Reading on to the end makes gzip, xz and bz2 compare their checksums.
    while stream.read(1 << 20):
        pass


def _zip_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = _safe_name(path, member.filename)
            if not name or hidden(name):
                continue
            if member.is_dir():
                yield name, None
            elif wanted(name):
                _check_size(path, name, member.file_size)
                yield name, archive.read(member)
