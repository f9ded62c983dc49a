"""Decode images with Pillow, in threads."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import DataError, reason
from .trees import Entry

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_TASK = 256
# By content, whatever the name says; Pillow would also try formats that start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_GRAY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")


def decode_all(
    entries: list[Entry], what: str, *, size: int | None, hint: str, colour: bool = False
) -> Tensor:
    """Decode in as many threads as there are CPUs, with a progress bar: uint8 [N, C, H, W].

    C is 1 where every image is gray and ``colour`` is False, else 3: gray images are repeated, transparency
    is dropped. Raises DataError, for the first in order, where an image cannot be decoded, has more than 8
    bits a channel, or differs in size from the first (``hint`` says what to do then).
    """
    from tqdm import tqdm

    first = decode(read_entry(entries[0]), entries[0].name, size)
    out = torch.empty(len(entries), 3, first.shape[0], first.shape[1], dtype=torch.uint8)
    target = out.numpy()

    def work(start: int) -> tuple[int, bool]:
        any_colour = False
        part = entries[start : start + _TASK]
        for index, entry in enumerate(part, start):
            pixels = decode(read_entry(entry), entry.name, size)
            if pixels.shape[:2] != first.shape[:2]:
                raise DataError(
                    f"{what}: expected images of one size, got {first.shape[1]}x{first.shape[0]} in "
                    f"{entries[0].name} and {pixels.shape[1]}x{pixels.shape[0]} in {entry.name}; {hint}"
                )
            any_colour |= pixels.ndim == 3
            target[index] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
        return len(part), any_colour

    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        tasks = [pool.submit(work, start) for start in range(0, len(entries), _TASK)]
        with tqdm(total=len(entries), desc="decoding", unit="image", disable=None) as bar:
            for task in tasks:
                count, any_colour = task.result()
                colour |= any_colour
                bar.update(count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return out if colour else out[:, :1].contiguous()


def decode(content: bytes, name: str, size: int | None) -> np.ndarray:
    """One image as uint8, [H, W] if it is gray, else [H, W, 3]; with ``size``, resized and centre-cropped.

    The first frame of an animation; an orientation in EXIF is not applied. Raises DataError.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            mode = image.mode
            if mode in _GRAY_MODES:
                plain = image.convert("L")
            elif mode in _COLOUR_MODES:
                plain = image.convert("RGB")
            else:
                plain = None
    except UnidentifiedImageError:
        raise _undecodable(name, content, f"not {', '.join(_FORMATS)}") from None
    # Decoders raise whatever their format calls for (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        raise _undecodable(name, content, reason(error)) from None
    if plain is None:
        raise DataError(
            f"{name}: expected 8 bits a channel, got an image of mode {mode}; convert it to 8-bit gray or RGB"
        )
    if size is not None and plain.size != (size, size):
        plain = _resize_crop(plain, size)
    return np.asarray(plain)


def _undecodable(name: str, content: bytes, why: str) -> DataError:
    return DataError(
        f"{name}: expected an image, got {len(content)} bytes that cannot be decoded ({why}); "
        "replace or remove it"
    )


def _resize_crop(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to ``size`` (bilinear, which antialiases in Pillow), then the centre square."""
    from PIL.Image import Resampling

    width, height = image.size
    short = min(width, height)
    width, height = max(size, round(width * size / short)), max(size, round(height * size / short))
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Resampling.BILINEAR).crop((left, top, left + size, top + size))


def encoding(content: bytes) -> str:
    """What became of the pixels, by the first bytes: "lossless", "JPEG" or "lossy WebP"."""
    if content.startswith(b"\xff\xd8"):
        return "JPEG"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "lossy WebP" if _webp_lossy(content) else "lossless"
    return "lossless"


def _webp_lossy(content: bytes) -> bool:
    """Whether the image chunk is VP8 (lossy), not VP8L; an extended file has other chunks before it."""
    position = 12
    while position + 8 <= len(content):
        kind = content[position : position + 4]
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8 "
        length = int.from_bytes(content[position + 4 : position + 8], "little")
        position += 8 + length + length % 2
    return False


def read_entry(entry: Entry) -> bytes:
    """The encoded image."""
    return entry.content if isinstance(entry.content, bytes) else entry.content.read_bytes()
