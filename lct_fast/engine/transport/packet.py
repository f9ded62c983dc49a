"""What travels over a link: a header of 64-bit words and a body that holds the tensors it describes.

Word   meaning
0      magic number with the format's version
1      kind
2      batch number; for a mark, the last batch trained before it
3      value: a mark's code, or the bits of a float64
4      time it was put into the link, nanoseconds on the first group's clock
5      bytes of the body
6      number of tensors
7      CRC-32 of the codec's name, 0 where nothing is coded
8      version of the codec's state
9      number of tensors that the codec made, the first ones
10     1 if the body is checked, else 0
11     sum of the body's 64-bit words, modulo 2^64
12     CRC-32 of all other words of the header
13...  14 words: dtype, dimensions, 6 sizes, 6 strides (in elements) of what was coded
27...  the same per tensor
Each tensor starts at a multiple of 64 bytes in the body. Strides travel because kernels choose by layout. A sum sees
every damaged word, at the speed of memory; it does not see words that change places.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from lct_fast.codecs import Encoded, Layout, dense
from lct_fast.engine.errors import PacketError

MAGIC = 0x6C63745F_0004
MAX_TENSORS = 6
MAX_DIMENSIONS = 6
MAX_BYTES = 1 << 40
_PER_TENSOR = 2 + 2 * MAX_DIMENSIONS
_CHECKED, _SUM, _CRC = 10, 11, 12
_LAYOUT = 13
_FIXED = _LAYOUT + _PER_TENSOR
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
    SERIAL = 9
    SEQUENCE = 10


@dataclass(slots=True)
class Packet:
    """One message. ``sent`` and ``arrived`` are seconds on the first group's clock.

    ``coded`` holds what a codec made of a tensor; its tensors come before ``tensors`` in the body. ``codec`` is the
    number of its name.
    """

    kind: Kind
    batch: int
    tensors: Sequence[Tensor] = ()
    value: int = 0
    coded: Encoded | None = None
    codec: int = 0
    sent: float = 0.0
    arrived: float = 0.0


def float_bits(value: float) -> int:
    """A float64 as the word that carries it."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def bits_float(word: int) -> float:
    """The float64 a word carries."""
    return struct.unpack("<d", struct.pack("<q", word))[0]


def codec_number(name: str) -> int:
    """The number that stands for a codec's name, never 0."""
    return zlib.crc32(name.encode()) | 1 << 32


def contents(packet: Packet) -> tuple[Tensor, ...]:
    """All tensors of the body, in order."""
    return (*(packet.coded.tensors if packet.coded is not None else ()), *packet.tensors)


def body_bytes(packet: Packet) -> int:
    """Bytes of the packet's body."""
    return sum(_padded(t.nbytes) for t in contents(packet))


def write(packet: Packet, header: Tensor, body: Tensor) -> None:
    """Fills ``header`` (int64 [WORDS], host) and ``body`` (uint8, at least ``body_bytes``) from a packet; see ``seal``.

    Raises:
        PacketError: a tensor that is not dense, of an unknown type, or of too many dimensions.
    """
    tensors, coded = contents(packet), packet.coded
    if len(tensors) > MAX_TENSORS:
        raise PacketError(f"a packet carries at most {MAX_TENSORS} tensors, got {len(tensors)}")
    words = [MAGIC, packet.kind, packet.batch, packet.value, 0, body_bytes(packet), len(tensors)]
    if coded is None:
        words += [0] * (_FIXED - len(words))
    else:
        words += [packet.codec, coded.version, len(coded.tensors), 0, 0, 0, *_described(coded.layout)]
    offset = 0
    for t in tensors:
        if t.dtype not in DTYPES or t.dim() > MAX_DIMENSIONS or dense(t) is not t:
            raise PacketError(
                f"cannot send a tensor of {t.dtype}, {t.dim()} dimensions, strides {t.stride()}: expected one of "
                f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, at most {MAX_DIMENSIONS}, dense"
            )
        words += _described(Layout(tuple(t.shape), t.stride(), t.dtype))
        _view(body, offset, t.dtype, t.shape, t.stride()).copy_(t)
        offset += _padded(t.numel() * t.element_size())
    words += [0] * (WORDS - len(words))
    header.copy_(torch.tensor(words, dtype=torch.int64))


def seal(header: Tensor, body: Tensor, seconds: float, checksum: bool) -> None:
    """Completes a header: the time at which the packet was put into the link, and what its consumer checks.

    With ``checksum`` the body is summed; on a CUDA device the calling thread waits for that.
    """
    header[4] = round(seconds * 1e9)
    if checksum:
        header[_CHECKED], header[_SUM] = 1, _sum(body[: int(header[5])])
    header[_CRC] = _crc(header)


def read_size(header: Tensor) -> int:
    """Bytes of the body that follows ``header``.

    Raises:
        PacketError: not a header of this format.
    """
    if int(header[0]) != MAGIC:
        raise PacketError(
            f"packet: expected format {MAGIC:#x}, got {int(header[0]):#x}; do all processes run the same version?"
        )
    crc = _crc(header)
    if int(header[_CRC]) != crc:
        raise PacketError(
            f"packet header: its CRC-32 is {crc:#x}, expected {int(header[_CRC]):#x}: it was damaged on its way"
        )
    size = int(header[5])
    if not 0 <= size <= MAX_BYTES or size % _ALIGN:
        raise PacketError(f"packet size: expected 0..{MAX_BYTES} bytes, a multiple of {_ALIGN}, got {size}")
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
    if words[_CHECKED] not in (0, 1):
        raise PacketError(f"packet checked: expected 0 or 1, got {words[_CHECKED]}")
    if words[_CHECKED] and words[_SUM] != (found := _sum(body[:size])):
        raise PacketError(
            f"packet body of batch {words[2]}: its sum is {found}, expected {words[_SUM]}: it was damaged on its way"
        )
    if not 0 <= words[6] <= MAX_TENSORS:
        raise PacketError(f"packet tensors: expected 0..{MAX_TENSORS}, got {words[6]}")
    tensors: list[Tensor] = []
    offset = 0
    for i in range(words[6]):
        layout = _layout(f"tensor {i}", words, _FIXED + i * _PER_TENSOR)
        room = _padded(layout.size * layout.dtype.itemsize)
        if offset + room > size:
            raise PacketError(
                f"packet tensor {i}: shape {list(layout.shape)} needs {room} bytes, {size - offset} are left of {size}"
            )
        tensors.append(_view(body, offset, layout.dtype, layout.shape, layout.stride))
        offset += room
    packet = Packet(Kind(words[1]), words[2], tensors, words[3], sent=words[4] / 1e9)
    if words[7]:
        _take_coded(packet, words)
    return packet


def _sum(body: Tensor) -> int:
    return int(body.view(torch.int64).sum())


def _crc(header: Tensor) -> int:
    data = header.numpy().tobytes()
    return zlib.crc32(data[8 * _CRC + 8 :], zlib.crc32(data[: 8 * _CRC]))


def _take_coded(packet: Packet, words: list[int]) -> None:
    """Sets apart the tensors that a codec made."""
    count = words[9]
    if not 1 <= count <= len(packet.tensors):
        raise PacketError(f"packet coded tensors: expected 1..{len(packet.tensors)}, got {count}")
    layout = _layout("layout", words, _LAYOUT)
    if not layout.dtype.is_floating_point:
        raise PacketError(f"packet layout: expected a floating point type, got {layout.dtype}")
    packet.codec = words[7]
    packet.coded = Encoded(tuple(packet.tensors[:count]), layout, words[8])
    packet.tensors = packet.tensors[count:]


def _described(layout: Layout) -> list[int]:
    pad = [0] * (MAX_DIMENSIONS - len(layout.shape))
    dtype = DTYPES.index(layout.dtype)
    return [dtype, len(layout.shape), *layout.shape, *pad, *layout.stride, *pad]


def _layout(what: str, words: list[int], first: int) -> Layout:
    """The layout of a dense tensor at a place of the header."""
    part = words[first : first + _PER_TENSOR]
    if not 0 <= part[0] < len(DTYPES) or not 0 <= part[1] <= MAX_DIMENSIONS:
        raise PacketError(
            f"packet {what}: expected a dtype 0..{len(DTYPES) - 1} of 0..{MAX_DIMENSIONS} dimensions, got "
            f"dtype {part[0]} of {part[1]}"
        )
    shape = part[2 : 2 + part[1]]
    stride = part[2 + MAX_DIMENSIONS : 2 + MAX_DIMENSIONS + part[1]]
    _check_dense(what, shape, stride)
    return Layout(tuple(shape), tuple(stride), DTYPES[part[0]])


def _check_dense(what: str, shape: list[int], stride: list[int]) -> None:
    whole = 1
    for size in shape:
        whole *= max(size, 1)
    if whole > MAX_BYTES:
        raise PacketError(f"packet {what}: shape {shape} is larger than {MAX_BYTES} values")
    count = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: (pair[1], pair[0])):
        if size < 0 or step < 0 or (size > 1 and count and step != count):
            raise PacketError(f"packet {what}: shape {shape} with strides {stride} is not a dense tensor")
        count *= size


def _view(
    body: Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]
) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return body[offset : offset + count * dtype.itemsize].view(dtype).as_strided(tuple(shape), tuple(stride))


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
