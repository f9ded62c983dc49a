"""Packets carry shape, layout and type exactly; one that is wrong in any field is refused, never read out of bounds."""

import pytest
import torch
from torch import Tensor

from lct_fast.codecs import Encoded, Layout, dense
from lct_fast.engine import PacketError
from lct_fast.engine.transport import packet
from lct_fast.engine.transport.packet import Kind, Packet

TENSORS = {
    "contiguous": torch.randn(3, 5, 2, 7),
    "channels last": torch.randn(3, 5, 2, 7).to(memory_format=torch.channels_last),
    "transposed": torch.randn(4, 6).t(),
    "bf16, odd bytes": torch.randn(3, 7).bfloat16(),
    "labels": torch.randint(0, 9, (11,)),
    "one value": torch.tensor(2.5, dtype=torch.float64),
    "no rows": torch.empty(0, 4),
    "size one": torch.randn(1, 8, 1, 1).to(memory_format=torch.channels_last),
    "codes": torch.randint(0, 255, (13,), dtype=torch.uint8),
}


def _written(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    header = torch.full((packet.WORDS,), -1)
    # Longer than needed, and poisoned: what is read must have been written.
    body = torch.full((packet.body_bytes(Packet(Kind.TRAIN, 41, tensors)) + 640,), 0xFF, dtype=torch.uint8)
    packet.write(Packet(Kind.TRAIN, 41, tensors, value=3), header, body)
    packet.seal(header, body, 12.25, checksum=False)
    return header, body


def _read_with(header: Tensor, body: Tensor, word: int, value: int) -> Packet:
    """What is read when a word is wrong and the header's sum is not."""
    header[word] = value
    packet.seal(header, body, 12.25, checksum=False)
    return packet.read(header, body)


@pytest.mark.parametrize("name", list(TENSORS))
def test_what_is_read_is_what_was_written(name: str) -> None:
    tensor = TENSORS[name]
    header, body = _written(tensor, torch.arange(5))
    got = packet.read(header, body)
    assert (got.kind, got.batch, got.value, got.sent) == (Kind.TRAIN, 41, 3, 12.25)
    assert torch.equal(got.tensors[0], tensor) and torch.equal(got.tensors[1], torch.arange(5))
    assert got.tensors[0].dtype == tensor.dtype and got.tensors[0].stride() == tensor.stride()
    assert (
        got.tensors[0].data_ptr() % 4 == 0 and got.tensors[0].untyped_storage().data_ptr() == body.data_ptr()
    )


@pytest.mark.parametrize("value", [0.1, -0.0, float("inf"), 1e-310])
def test_a_float_survives_as_a_word(value: float) -> None:
    assert str(packet.bits_float(packet.float_bits(value))) == str(value)


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 17, "expected format"),
        (1, 0, f"packet kind: expected 1..{max(Kind)}, got 0"),
        (1, 99, "packet kind"),
        (5, -1, "packet size"),
        (5, 1 << 60, "packet size"),
        (5, 64, "needs 128 bytes, 64 are left"),
        (6, 7, "packet tensors: expected 0..6, got 7"),
        (6, -1, "packet tensors"),
        (5, 65, "a multiple of 64, got 65"),
        (10, 2, "packet checked: expected 0 or 1, got 2"),
        (27, 10, "dtype 10"),
        (27, 1, "needs 256 bytes, 128 are left"),
        (28, 7, "of 7"),
        (29, 1 << 40, "is larger than|needs"),
        (29, -4, "not a dense tensor"),
        (35, 9, "not a dense tensor"),
        (36, 0, "not a dense tensor"),
        (36, -7, "not a dense tensor"),
    ],
)
def test_a_wrong_field_is_named(word: int, value: int, message: str) -> None:
    header, body = _written(torch.randn(4, 7))
    assert header[29] == 4 and header[35] == 7 and header[36] == 1
    with pytest.raises(PacketError, match=message):
        _read_with(header, body, word, value)


@pytest.mark.parametrize("checksum", [True, False])
def test_every_flipped_bit_is_seen(checksum: bool) -> None:
    header, body = _written(torch.randn(4, 7), torch.arange(3))
    packet.seal(header, body, 12.25, checksum)
    size = int(header[5])
    bits = header.view(torch.uint8)
    for bit in range(packet.WORDS * 64):
        bits[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PacketError):
            packet.read(header, body)
        bits[bit // 8] ^= 1 << bit % 8
    for bit in range(size * 8):
        body[bit // 8] ^= 1 << bit % 8
        if checksum:
            with pytest.raises(PacketError, match="packet body of batch 41: its sum is"):
                packet.read(header, body)
        else:
            packet.read(header, body)
        body[bit // 8] ^= 1 << bit % 8
    # What lies behind the body is nobody's.
    body[size] ^= 1
    packet.read(header, body)


def test_a_negative_stride_is_refused_where_it_would_not_matter() -> None:
    header, body = _written(torch.randn(1, 8))
    assert header[29] == 1
    with pytest.raises(PacketError, match="not a dense tensor"):
        _read_with(header, body, 35, -8)


CODED = Encoded(
    (torch.arange(6, dtype=torch.uint8), torch.ones(3)), Layout((4, 2), (1, 4), torch.bfloat16), 12
)


def _coded() -> tuple[Tensor, Tensor]:
    message = Packet(Kind.TRAIN, 5, (torch.arange(4),), coded=CODED, codec=packet.codec_number("vq:4,2"))
    header, body = torch.zeros(packet.WORDS, dtype=torch.int64), torch.zeros(1024, dtype=torch.uint8)
    packet.write(message, header, body)
    packet.seal(header, body, 0.0, checksum=False)
    return header, body


def test_what_a_codec_made_travels_with_what_it_stands_for() -> None:
    got = packet.read(*_coded())
    assert got.codec == packet.codec_number("vq:4,2") != packet.codec_number("vq:4,3")
    assert got.coded is not None
    assert (got.coded.layout, got.coded.version) == (CODED.layout, 12)
    assert len(got.coded.tensors) == 2 and len(got.tensors) == 1
    assert all(torch.equal(a, b) for a, b in zip(got.coded.tensors, CODED.tensors, strict=True))
    assert torch.equal(got.tensors[0], torch.arange(4))
    plain = packet.read(*_written(torch.ones(2)))
    assert plain.coded is None and plain.codec == 0


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (9, 0, "coded tensors: expected 1..3, got 0"),
        (9, 4, "coded tensors: expected 1..3, got 4"),
        (13, 8, "layout: expected a floating point type, got torch.int64"),
        (13, -1, "layout: expected a dtype"),
        (14, 7, "layout: expected a dtype 0..9 of 0..6 dimensions"),
        (15, 5, "layout: shape .* is not a dense tensor"),
        (15, 1 << 62, "layout: shape .* is larger than"),
        (21, 0, "layout: shape .* is not a dense tensor"),
    ],
)
def test_a_wrong_field_of_what_was_coded_is_named(word: int, value: int, message: str) -> None:
    header, body = _coded()
    with pytest.raises(PacketError, match=message):
        _read_with(header, body, word, value)


def test_a_body_that_is_too_short_is_refused() -> None:
    header, body = _written(torch.randn(4, 7))
    with pytest.raises(PacketError, match="expected at most 127 bytes, got 128"):
        packet.read(header, body[:127])


def test_what_cannot_travel_is_refused_before_it_does() -> None:
    header, body = torch.zeros(packet.WORDS, dtype=torch.int64), torch.zeros(4096, dtype=torch.uint8)
    for tensors, message in [
        ([torch.zeros(4, 4)[:, ::2]], "strides"),
        ([torch.zeros(3, dtype=torch.complex64)], "complex64"),
        ([torch.zeros(1, 1, 1, 1, 1, 1, 1)], "7 dimensions"),
        ([torch.zeros(1)] * 7, "at most 6 tensors, got 7"),
    ]:
        with pytest.raises(PacketError, match=message):
            packet.write(Packet(Kind.TRAIN, 0, tensors), header, body)
    assert dense(torch.zeros(4, 4)[:, ::2]).is_contiguous()
    whole = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert dense(whole) is whole
