"""What travels over a link: a header of 64-bit words and a body that holds the tensors it describes.

Word   meaning
0      magic number with the format's version
1      kind
2      batch number; for a mark, the last batch trained before it
3      value: a mark's code, or the bits of a float64
4      time it was put into the link, nanoseconds on the first group's clock
5      bytes of the body
6      number of tensors
7...   per tensor 14 words: dtype, dimensions, 6 sizes, 6 strides (in elements)
Each tensor starts at a multiple of 64 bytes in the body. Strides travel because kernels choose by layout.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from lct_fast.engine.errors import PacketError

MAGIC = 0x6C63745F_0001
MAX_TENSORS = 4
MAX_DIMENSIONS = 6
MAX_BYTES = 1 << 40
_FIXED = 7
_PER_TENSOR = 2 + 2 * MAX_DIMENSIONS
WORDS = _FIXED + MAX_TENSORS * _PER_TENSOR
_ALIGN = 64
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)


class Kind(IntEnum):
    """What a packet asks of the group that gets it."""

    TRAIN = 1
    EVALUATE = 2
    EVALUATED = 3
    MARK = 4
    LEARNING_RATE = 5
    FLUSH = 6
    STOP = 7
    FEEDBACK = 8


@dataclass(slots=True)
class Packet:
    """One message. ``sent`` and ``arrived`` are seconds on the first group's clock."""

    kind: Kind
    batch: int
    tensors: Sequence[Tensor] = ()
    value: int = 0
    sent: float = 0.0
    arrived: float = 0.0


def float_bits(value: float) -> int:
    """A float64 as the word that carries it."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def bits_float(word: int) -> float:
    """The float64 a word carries."""
    return struct.unpack("<d", struct.pack("<q", word))[0]


def dense(t: Tensor) -> Tensor:
    """``t`` if its elements fill one run of memory in some order of dimensions, else a contiguous copy."""
    return t if torch.ops.aten.is_non_overlapping_and_dense(t) else t.contiguous()


def body_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the body that holds ``tensors``."""
    return sum(_padded(t.numel() * t.element_size()) for t in tensors)


def write(packet: Packet, header: Tensor, body: Tensor) -> None:
    """Fills ``header`` (int64 [WORDS], host) and ``body`` (uint8, at least ``body_bytes``) from a packet.

    Raises:
        PacketError: a tensor that is not dense, of an unknown type, or of too many dimensions.
    """
    if len(packet.tensors) > MAX_TENSORS:
        raise PacketError(f"a packet carries at most {MAX_TENSORS} tensors, got {len(packet.tensors)}")
    words = [
        MAGIC,
        packet.kind,
        packet.batch,
        packet.value,
        0,
        body_bytes(packet.tensors),
        len(packet.tensors),
    ]
    offset = 0
    for t in packet.tensors:
        if t.dtype not in DTYPES or t.dim() > MAX_DIMENSIONS or dense(t) is not t:
            raise PacketError(
                f"cannot send a tensor of {t.dtype}, {t.dim()} dimensions, strides {t.stride()}: expected one of "
                f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, at most {MAX_DIMENSIONS}, dense"
            )
        pad = [0] * (MAX_DIMENSIONS - t.dim())
        words += [DTYPES.index(t.dtype), t.dim(), *t.shape, *pad, *t.stride(), *pad]
        _view(body, offset, t.dtype, t.shape, t.stride()).copy_(t)
        offset += _padded(t.numel() * t.element_size())
    words += [0] * (WORDS - len(words))
    header.copy_(torch.tensor(words, dtype=torch.int64))


def stamp(header: Tensor, seconds: float) -> None:
    """Sets the time at which the packet was put into the link."""
    header[4] = round(seconds * 1e9)


def read_size(header: Tensor) -> int:
    """Bytes of the body that follows ``header``.

    Raises:
        PacketError: not a header of this format.
    """
    if int(header[0]) != MAGIC:
        raise PacketError(
            f"packet: expected format {MAGIC:#x}, got {int(header[0]):#x}; do all processes run the same version?"
        )
    size = int(header[5])
    if not 0 <= size <= MAX_BYTES:
        raise PacketError(f"packet size: expected 0..{MAX_BYTES} bytes, got {size}")
    return size


def read(header: Tensor, body: Tensor) -> Packet:
    """The packet in ``header`` and ``body``; its tensors are views of ``body``.

    Raises:
        PacketError: names the field that is wrong; nothing out of the body's bounds is read.
    """
    size = read_size(header)
    words = header.tolist()
    if words[1] not in Kind.__members__.values():
        raise PacketError(f"packet kind: expected 1..{max(Kind)}, got {words[1]}")
    if size > body.numel():
        raise PacketError(f"packet size: expected at most {body.numel()} bytes, got {size}")
    if not 0 <= words[6] <= MAX_TENSORS:
        raise PacketError(f"packet tensors: expected 0..{MAX_TENSORS}, got {words[6]}")
    tensors, offset = [], 0
    for i in range(words[6]):
        part = words[_FIXED + i * _PER_TENSOR : _FIXED + (i + 1) * _PER_TENSOR]
        if not 0 <= part[0] < len(DTYPES) or not 0 <= part[1] <= MAX_DIMENSIONS:
            raise PacketError(
                f"packet tensor {i}: expected a dtype 0..{len(DTYPES) - 1} of 0..{MAX_DIMENSIONS} dimensions, got "
                f"dtype {part[0]} of {part[1]}"
            )
        dtype = DTYPES[part[0]]
        shape = part[2 : 2 + part[1]]
        stride = part[2 + MAX_DIMENSIONS : 2 + MAX_DIMENSIONS + part[1]]
        count = _dense_count(i, shape, stride)
        room = _padded(count * dtype.itemsize)
        if offset + room > size:
            raise PacketError(
                f"packet tensor {i}: shape {shape} needs {room} bytes, {size - offset} are left of {size}"
            )
        tensors.append(_view(body, offset, dtype, shape, stride))
        offset += room
    return Packet(Kind(words[1]), words[2], tensors, words[3], words[4] / 1e9)


def _dense_count(i: int, shape: list[int], stride: list[int]) -> int:
    """Elements of a dense tensor of this shape and these strides."""
    count = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: (pair[1], pair[0])):
        if size < 0 or (size > 1 and count and step != count):
            raise PacketError(f"packet tensor {i}: shape {shape} with strides {stride} is not a dense tensor")
        count *= size
    return count


def _view(
    body: Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]
) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return body[offset : offset + count * dtype.itemsize].view(dtype).as_strided(tuple(shape), tuple(stride))


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
