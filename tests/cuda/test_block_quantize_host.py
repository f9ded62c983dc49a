"""csrc/cuda/block_quantize.cu run on the host, under sanitizers: the reference's bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lct_fast.reference import block_quantize as reference
from tests.cuda.host_build import CSRC, HERE, build, check
from tests.ladder import assert_same_bits
from tests.ops.block_quantize_case import BLOCKS, DTYPES, KINDS, make, scale_ties

# Sizes: why.
SIZES = {
    1: "one value",
    33: "a vector of 8 values and one; a warp mostly behind the end",
    259: "a last vector of 3 values: nibbles and pairs of bits left over",
    2048: "exactly one block of threads",
    4100: "three blocks of threads, the last with half a vector",
}
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        tmp_path_factory.mktemp("host"),
        HERE / "block_quantize_host.cpp",
        CSRC / "cuda" / "block_quantize.cu",
    )


def raw(x: Tensor) -> bytes:
    return bytes(x.contiguous().view(torch.uint8).tolist())


def run(program: Path, what: str, data: bytes, words: tuple[int, ...]) -> Tensor:
    source, target = program.with_name("in"), program.with_name("out")
    source.write_bytes(data)
    check(program, what, source, target, *words)
    return torch.frombuffer(bytearray(target.read_bytes()), dtype=torch.uint8)


def compare(program: Path, x: Tensor, kind: str, block: int, offset: int) -> None:
    words = (x.numel(), block, KINDS.index(kind), NUMBERS[x.dtype], offset)
    payload, scales = reference.block_quantize(x, kind, block)
    got = run(program, "quantize", raw(x), words)
    assert_same_bits("payload", got[: payload.numel()], payload)
    assert_same_bits("scales", got[payload.numel() :].clone().view(torch.bfloat16), scales)
    values = reference.block_dequantize(payload, scales, x.numel(), kind, block, x.dtype)
    back = run(program, "dequantize", raw(payload) + raw(scales), words)
    assert_same_bits("values", back.view(x.dtype), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_same_bits(program: Path, size: int, kind: str) -> None:
    for turn, dtype in enumerate(DTYPES.values()):
        for offset in (0, 1, 2):
            block = BLOCKS[(turn + offset + size) % 4]
            x = make(size, dtype, signed=(turn + offset) % 2 == 0, seed=turn)
            compare(program, x, kind, block, offset)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_of_special_values(program: Path, kind: str, block: int) -> None:
    for seed, dtype in enumerate(DTYPES.values()):
        compare(program, make(3700, dtype, signed=seed == 1, seed=seed, special=True), kind, block, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_round_half_to_even(program: Path, kind: str) -> None:
    for signed in (False, True):
        compare(program, scale_ties(kind, signed=signed), kind, 32, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_decode(program: Path, kind: str) -> None:
    size = 64 * 41 + 5
    payload = torch.arange(size, dtype=torch.int32).mul(37).to(torch.uint8)
    payload = payload[: -(-size * reference.BITS[kind] // 8)]
    exponents = torch.tensor([0, 0x0D80, 0x3F80, 0x3FC1, 0x7E00, 0x7F7F, 0x7F80, 0x7FC1], dtype=torch.int32)
    scales = torch.cat([exponents, exponents | 0x8000]).repeat(3)[:42].to(torch.int16).view(torch.bfloat16)
    for dtype, number in NUMBERS.items():
        words = (size, 64, KINDS.index(kind), number, 0)
        got = run(program, "dequantize", raw(payload) + raw(scales), words).view(dtype)
        expected = reference.block_dequantize(payload, scales, size, kind, 64, dtype)
        assert_same_bits("values", got, expected)


def test_launch(program: Path) -> None:
    check(program, "launch")
