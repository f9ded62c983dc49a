"""Tiny sets in every form that the loaders read, made from one array of pixels."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

Tree = dict[str, bytes]

_PILLOW = {"png": "PNG", "bmp": "BMP", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}


def pixels(count: int, side: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise, uint8 [count, side, side, channels] ([count, side, side] for one channel)."""
    shape = (count, side, side, channels) if channels > 1 else (count, side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image: np.ndarray, extension: str = "png", **options: object) -> bytes:
    """One image file; WebP is lossless unless told otherwise."""
    buffer = io.BytesIO()
    if extension == "webp":
        options = {"lossless": True, "exact": True, **options}
    Image.fromarray(image).save(buffer, _PILLOW[extension], **options)
    return buffer.getvalue()


def labelled(classes: int, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(images [N, 32, 32, 3], labels [N]) sorted by label, the order in which trees are read."""
    return pixels(classes * per_class, seed=seed), np.repeat(np.arange(classes), per_class)


def tree(
    splits: dict[str, tuple[np.ndarray, np.ndarray]],
    classes: list[str],
    extension: str = "png",
    **options: object,
) -> Tree:
    """Files by name, ``split/class/0001.ext``."""
    return {
        f"{split}/{classes[label]}/{index:04d}.{extension}": encode(image, extension, **options)
        for split, (images, labels) in splits.items()
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    }


def write_folder(root: Path, files: Tree) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, files: Tree, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, files: Tree) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_archive(path: Path, files: Tree) -> Path:
    """The kind follows from the ending."""
    if path.suffix == ".zip":
        return write_zip(path, files)
    compression = {".tar": "", ".gz": "gz", ".xz": "xz", ".bz2": "bz2"}[path.suffix]
    return write_tar(path, files, f"w:{compression}")


def rows(images: np.ndarray) -> np.ndarray:
    """[N, 32, 32, 3] -> [N, 3072], channels first as CIFAR keeps them."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def cifar_python(
    fine: bool, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> Tree:
    """The original pickles: five training batches for CIFAR-10, one file a split for CIFAR-100."""
    key = b"fine_labels" if fine else b"labels"
    prefix = "cifar-100-python/" if fine else "cifar-10-batches-py/"

    def dump(images: np.ndarray, labels: np.ndarray) -> bytes:
        content = {b"data": rows(images), key: [int(label) for label in labels], b"batch_label": b"made up"}
        if fine:
            content[b"coarse_labels"] = [0] * len(labels)
        return pickle.dumps(content, 2)

    if fine:
        return {prefix + "train": dump(*train), prefix + "test": dump(*test), prefix + "meta": b"not read"}
    files = {
        f"{prefix}data_batch_{n + 1}": dump(train[0][part], train[1][part]) for n, part in _fifths(train)
    }
    return {**files, prefix + "test_batch": dump(*test), prefix + "batches.meta": b"not read"}


def cifar_binary(
    fine: bool, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> Tree:
    """The original records: label (coarse label first for CIFAR-100), then 3072 bytes."""
    prefix = "cifar-100-binary/" if fine else "cifar-10-batches-bin/"

    def dump(images: np.ndarray, labels: np.ndarray) -> bytes:
        head = labels.astype(np.uint8)[:, None]
        if fine:
            head = np.concatenate([np.full_like(head, 7), head], 1)
        return np.concatenate([head, rows(images)], 1).tobytes()

    if fine:
        return {prefix + "train.bin": dump(*train), prefix + "test.bin": dump(*test)}
    files = {
        f"{prefix}data_batch_{n + 1}.bin": dump(train[0][part], train[1][part]) for n, part in _fifths(train)
    }
    return {**files, prefix + "test_batch.bin": dump(*test)}


def _fifths(train: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, slice]]:
    count = len(train[1])
    return [(n, slice(n * count // 5, (n + 1) * count // 5)) for n in range(5)]
