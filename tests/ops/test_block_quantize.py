"""block_quantize and block_dequantize on every backend of this machine: the reference's bits."""

import pytest
import torch
from torch import Tensor

from lct_fast import _native, ops
from lct_fast.reference import block_quantize as reference
from tests.ladder import Place, assert_same_bits
from tests.ops.block_quantize_case import BLOCKS, DTYPES, KINDS, PLACES, SIZES, check, make, scale_ties


@pytest.fixture(params=PLACES, ids=str)
def where(request: pytest.FixtureRequest) -> Place:
    """A backend of these ops on a device."""
    place: Place = request.param
    return place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_same_bits(where: Place, size: int, kind: str, dtype: str) -> None:
    names = list(DTYPES)
    with ops.use_backend(where.backend):
        for turn, block in enumerate(BLOCKS):
            x = make(size, DTYPES[dtype], signed=turn % 2 == 0, seed=turn, device=where.device)
            check(x, kind, block, DTYPES[names[(names.index(dtype) + turn) % 3]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_of_special_values(where: Place, kind: str, block: int, dtype: str) -> None:
    """NaN, Inf, zeros of both signs, ends of the range, ties, in whole blocks and parts of one."""
    with ops.use_backend(where.backend):
        for seed in range(4):
            x = make(14 * 256 + 9, DTYPES[dtype], signed=seed % 2 == 0, seed=seed, special=True)
            check(x.to(where.device), kind, block, DTYPES[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_scales_round_half_to_even(where: Place, kind: str) -> None:
    """Division by `most` is exact there; a product with its inverse would fall to either side."""
    with ops.use_backend(where.backend):
        for signed in (False, True):
            x = scale_ties(kind, signed=signed)
            check(x.to(where.device), kind, 32, torch.float32)
            scales = ops.block_quantize(x.to(where.device), kind, 32).scales.float().abs().cpu()
            assert scales.tolist() == [1 + 2 * ((k + 1) // 2) / 128 for k in range(128)]


def every_float(step: int) -> Tensor:
    """Finite floats of all exponents from 2^-20 to 2^9, of one sign, some on ties of fp8."""
    bits = torch.arange(0x35800000, 0x44000000, step, dtype=torch.int32)
    return torch.cat([bits, bits & ~0x7FFFF, (bits & ~0x7FFFF) | 1]).view(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_over_the_whole_range_of_codes(where: Place, kind: str) -> None:
    values = every_float(100_003)
    for sign in (1.0, -1.0):
        x = torch.cat(
            [values[: len(values) // 31 * 31].view(-1, 31), torch.full((len(values) // 31, 1), 448.0)], 1
        )
        x[:, :31] *= sign
        if kind != "fp8":
            x = x / 4
        with ops.use_backend(where.backend):
            check(x.flatten().to(where.device), kind, 32, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_decode(where: Place, kind: str, dtype: str) -> None:
    """Codes and scales that block_quantize never gives: every byte, scales of any bits down to 2^-100."""
    draw = torch.Generator().manual_seed(7)
    size = 256 * 40 + 13
    payload = torch.randint(
        0, 256, (-(-size * reference.BITS[kind] // 8),), generator=draw, dtype=torch.uint8
    )
    scales = torch.randint(0, 1 << 15, (-(-size // 64),), generator=draw, dtype=torch.int32)
    scales = torch.where(scales >> 7 < 27, scales + (27 << 7), scales)
    sign = torch.randint(0, 2, scales.shape, generator=draw, dtype=torch.int32) << 15
    scales[::9] = 0x7F80
    scales[1::9] = 0x7FFF
    scales[2::9] = 0
    scales = (scales | sign).to(torch.int16).view(torch.bfloat16)
    expected = reference.block_dequantize(payload, scales, size, kind, 64, DTYPES[dtype])
    with ops.use_backend(where.backend):
        out = ops.block_dequantize(
            payload.to(where.device), scales.to(where.device), size, kind, 64, DTYPES[dtype]
        )
    assert_same_bits("values", out.cpu(), expected)


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("threads", [1, 3])
def test_instruction_sets_and_thread_counts(level: str, threads: int) -> None:
    native = _native.load()
    assert native is not None, _native.why_absent()
    if level not in native.simd_levels():
        pytest.skip(f"this CPU has no {level}")
    torch.set_num_threads(threads)
    native.set_simd(level)
    try:
        with ops.use_backend("cpu"):
            for kind in KINDS:
                for turn, block in enumerate(BLOCKS):
                    for dtype in DTYPES.values():
                        x = make(70_001, dtype, signed=turn % 2 == 0, seed=turn, special=True)
                        check(x, kind, block, dtype)
                x = every_float(400_009) / 4
                check(x[: len(x) // 32 * 32], kind, 32, torch.float32)
                check(-x[: len(x) // 32 * 32], kind, 32, torch.float32)
    finally:
        native.set_simd(None)


@pytest.mark.parametrize("ftz", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_flushing_subnormals_changes_no_bit(kind: str, ftz: bool) -> None:
    """Scales, inverses and codes are never subnormal, so neither mode of the processor matters."""
    values = torch.cat([every_float(500_009) * 2.0 ** float(e) for e in (-110, -92, 100, 118)])
    values = torch.cat(
        [values, values * torch.tensor([1.0, -1.0]).repeat(len(values) // 2 + 1)[: len(values)]]
    )
    values = values[values.isfinite() & (values.abs() >= 2.0**-126)]
    payload, scales = reference.block_quantize(values, kind, 64)
    before = reference.block_dequantize(payload, scales, len(values), kind, 64, torch.float32)
    torch.set_flush_denormal(ftz)
    try:
        with ops.use_backend("cpu"):
            got = ops.block_quantize(values, kind, 64)
            out = ops.block_dequantize(*got, len(values), kind, 64)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits("payload", got.payload, payload)
    assert_same_bits("scales", got.scales, scales)
    assert_same_bits("values", out, before)


def test_values_are_taken_as_they_lie_in_memory(where: Place) -> None:
    x = make(2 * 6 * 5 * 7, torch.float32, signed=True, device=where.device).view(2, 6, 5, 7)
    last = x.to(memory_format=torch.channels_last)
    with ops.use_backend(where.backend):
        flat = ops.block_quantize(last.permute(0, 2, 3, 1).reshape(-1), "int4", 32)
        got = ops.block_quantize(last, "int4", 32)
        assert_same_bits("payload", got.payload, flat.payload)
        assert_same_bits("scales", got.scales, flat.scales)
        values = ops.block_dequantize(*got, x.numel(), "int4", 32).as_strided(last.shape, last.stride())
        step = float(got.scales.float().abs().max())
        assert bool(((values - last).abs() <= 0.51 * step).all())
        # Not dense: copied row by row.
        gaps = ops.block_quantize(x[:, :, ::2], "int4", 32)
        rows = ops.block_quantize(x[:, :, ::2].contiguous(), "int4", 32)
        assert_same_bits("payload with gaps", gaps.payload, rows.payload)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_values_that_start_anywhere(where: Place, offset: int) -> None:
    """A view into the middle of memory: aligned to its element alone."""
    with ops.use_backend(where.backend):
        for kind in KINDS:
            for dtype in DTYPES.values():
                x = make(777 + offset, dtype, signed=True, device=where.device)[offset:]
                check(x, kind, 64, dtype)
                got = ops.block_quantize(x, kind, 64)
                moved = torch.cat([got.payload.new_zeros(offset), got.payload])[offset:]
                values = ops.block_dequantize(moved, got.scales, 777, kind, 64)
                assert_same_bits("values", values, ops.block_dequantize(*got, 777, kind, 64))


def test_bits_a_value() -> None:
    x = make(64 * 1024, torch.float32, signed=True)
    for kind, bits in (("int8", 8.25), ("int4", 4.25), ("int2", 2.25), ("fp8", 8.25)):
        payload, scales = ops.block_quantize(x, kind)
        assert 8 * (payload.nbytes + scales.nbytes) == bits * x.numel()


def test_every_op_has_its_backends() -> None:
    for name in ("block_quantize", "block_dequantize"):
        found = ops.backends(name)
        assert list(found) == ["reference", "cpu", "cuda"]
        assert found["reference"] == found["cpu"] == "available"
