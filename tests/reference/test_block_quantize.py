"""What block_quantize promises, on its definition; and the definition against a second one, value by value."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lct_fast.reference.block_quantize import BITS, LARGEST_SCALE, block_dequantize, block_quantize
from tests.ops.block_quantize_case import BLOCKS, DTYPES, KINDS, make

FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def back(x: Tensor, kind: str, block: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return block_dequantize(*block_quantize(x, kind, block), x.numel(), kind, block, dtype)


def by_hand(x: list[float], kind: str) -> tuple[float, list[float]]:
    """Scale and decoded values of one block, in Python's arithmetic and by search for the nearest code."""
    bits = BITS[kind]
    unsigned = bits < 8 and all(v >= 0 for v in x)
    if kind == "fp8":
        levels = sorted(set(FP8[FP8.isfinite()].tolist()))
    else:
        most = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
        levels = [float(k) for k in range(0 if unsigned else -most, most + 1)]
    exact = max(map(abs, x)) / max(levels)
    # bfloat16 keeps 8 bits of the number.
    unit = 2.0 ** (math.frexp(exact)[1] - 8)
    scale = round(exact / unit) * unit
    return (-scale if unsigned else scale), [scale * min(levels, key=lambda k: abs(k - v / scale)) for v in x]


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_code_and_rounded_scale(kind: str) -> None:
    for signed in (False, True):
        x = make(64 * 5, torch.float32, signed=signed)
        payload, scales = block_quantize(x, kind, 64)
        values = block_dequantize(payload, scales, x.numel(), kind, 64, torch.float32)
        for b in range(5):
            scale, expected = by_hand(x[64 * b : 64 * b + 64].tolist(), kind)
            assert float(scales[b]) == scale
            assert values[64 * b : 64 * b + 64].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
def test_an_error_is_at_most_half_a_step(kind: str, block: int, dtype: torch.dtype) -> None:
    for signed in (False, True):
        x = make(7 * 256 + 3, dtype, signed=signed)
        _, scales = block_quantize(x, kind, block)
        step = scales.double().abs().repeat_interleave(block)[: x.numel()]
        error = (back(x, kind, block).double() - x.double()).abs()
        # 1 / scale and the product with it are rounded: 2^-23 of the code altogether.
        assert bool((error <= step * (0.5 + 2.0**-23 * 2 ** BITS[kind])).all())


def test_fp8s_error_is_half_a_unit_of_the_value() -> None:
    x = make(64 * 40, torch.float32, signed=True)
    _, scales = block_quantize(x, "fp8", 64)
    step = scales.double().repeat_interleave(64)
    error = (back(x, "fp8").double() - x.double()).abs()
    # 3 bits of mantissa, and steps of 2^-9 below 2^-6; one part in 2^20 for what fp32 rounds.
    allowed = torch.maximum(x.double().abs() * 2.0**-4, step * 2.0**-10) * (1 + 2.0**-20)
    # The largest value of a block may lie above 448 scales, by the rounding of the scale.
    assert bool((error <= allowed).all())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_decoded_is_coded_the_same_again(kind: str, block: int) -> None:
    for seed, signed in itertools.product(range(8), (False, True)):
        x = make(50 * block + 17, torch.float32, signed=signed, seed=seed)
        payload, scales = block_quantize(x, kind, block)
        values = block_dequantize(payload, scales, x.numel(), kind, block, torch.float32)
        again, scales_again = block_quantize(values, kind, block)
        # A block whose values below zero have all become zero is coded unsigned from then on.
        turned = (scales > 0) & (scales_again < 0)
        if kind in ("int8", "fp8"):
            assert not turned.any()
        turned_values = turned.repeat_interleave(block)[: x.numel()]
        assert not (values[turned_values] < 0).any()
        assert torch.equal(scales[~turned], scales_again[~turned])
        bits = BITS[kind]
        same = (payload == again)[: 50 * block * bits // 8].view(50, -1).all(1)
        assert bool((same | turned[:50]).all())
        values_again = block_dequantize(again, scales_again, x.numel(), kind, block, torch.float32)
        third = block_quantize(values_again, kind, block)
        assert torch.equal(third[0], again) and torch.equal(third[1], scales_again)


@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
def test_the_largest_of_a_block_has_the_largest_code(kind: str) -> None:
    """So for every scale's rounding: the mantissas of 8 bits and ties between them."""
    bits = BITS[kind]
    x = torch.zeros(2048, 32)
    x[:, 5] = 1 + torch.arange(2048) / 2048
    for signed, most in ((False, 2**bits - 1 if bits < 8 else 127), (True, 2 ** (bits - 1) - 1)):
        x[:, 6] = -0.01 if signed else 0.01
        _, scales = block_quantize(x.flatten(), kind, 32)
        code = back(x.flatten(), kind, 32).view(-1, 32)[:, 5] / scales.float().abs()
        assert bool((code == most).all())


def test_bits_of_the_payload() -> None:
    x = torch.zeros(35)
    x[:4] = torch.tensor([7.0, -7.0, 1.0, -2.0])
    x[32:] = torch.tensor([15.0, 1.0, 2.0])
    payload, scales = block_quantize(x, "int4", 32)
    assert payload.tolist() == [0x97, 0xE1, *[0] * 14, 0x1F, 0x02]
    assert scales.tolist() == [1.0, -1.0]

    payload, scales = block_quantize(torch.tensor([3.0, 0.0, 1.0, 2.0, 3.0]), "int2", 32)
    assert payload.tolist() == [0b10_01_00_11, 0b11] and scales.tolist() == [-1.0]
    payload, scales = block_quantize(torch.tensor([-1.0, 0.0, 1.0, 0.4, -0.6]), "int2", 32)
    assert payload.tolist() == [0b00_01_00_11, 0b11] and scales.tolist() == [1.0]
    payload, scales = block_quantize(torch.tensor([-127.0, 126.0, 0.0, -1.0]), "int8", 32)
    assert payload.tolist() == [0x81, 126, 0, 0xFF] and scales.tolist() == [1.0]
    payload, scales = block_quantize(torch.tensor([448.0, -448.0, 0.0, 1.0, -(2.0**-9)]), "fp8", 32)
    assert payload.tolist() == [0x7E, 0xFE, 0, 0x38, 0x81] and scales.tolist() == [1.0]


def test_halves_go_to_the_even_code() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0])
    assert back(x, "int8").tolist() == [0, 2, 2, 0, -2, -2, 126, 127]
    # Unsigned up to 15, then with steps of 2 above 16 in fp8: 17 and 19 lie halfway.
    assert back(torch.tensor([0.5, 1.5, 13.5, 14.5, 15.0]), "int4").tolist() == [0, 2, 14, 14, 15]
    assert back(torch.tensor([17.0, 19.0, -17.0, 448.0]), "fp8").tolist() == [16, 20, -16, 448]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros(kind: str) -> None:
    x = torch.zeros(70)
    x[3] = -0.0
    payload, scales = block_quantize(x, kind, 64)
    assert not payload.any() and not scales.view(torch.int16).any()
    assert not back(x, kind).view(torch.int32).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_is_not_finite(kind: str, bad: float) -> None:
    x = make(64 * 3 + 5, torch.float32, signed=True)
    good_payload, good_scales = block_quantize(x, kind, 64)
    x[64 + 9] = bad
    payload, scales = block_quantize(x, kind, 64)
    assert scales.isnan().tolist() == [False, True, False, False]
    assert scales.view(torch.int16)[1] == 0x7FC0
    size = 64 * BITS[kind] // 8
    assert not payload[size : 2 * size].any()
    others = [0, 2, 3]
    assert torch.equal(scales[others], good_scales[others])
    assert torch.equal(payload[:size], good_payload[:size])
    assert torch.equal(payload[2 * size :], good_payload[2 * size :])
    values = back(x, kind)
    assert bool(values[64:128].isnan().all()) and not values[:64].isnan().any()
    assert not values[128:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_ends_of_the_range(kind: str, dtype: torch.dtype) -> None:
    """No finite value becomes Inf or NaN, however large; one that is too small becomes zero."""
    largest = torch.finfo(dtype).max
    for x in ([largest], [largest, -largest], [largest, -largest / 2, 0.0]):
        values = back(torch.tensor(x, dtype=dtype), kind, dtype=dtype)
        assert bool(values.isfinite().all())
        if kind != "int2" or dtype == torch.float16:
            torch.testing.assert_close(values[0], torch.tensor(largest, dtype=dtype), rtol=2**-8, atol=0)
    small = torch.tensor([2.0**-100, -(2.0**-101)])
    assert not back(small, kind).any() or kind == "int2"
    assert bool(back(torch.tensor([2.0**-80, -(2.0**-90)]), kind)[0] > 0)
    assert not back(torch.tensor([2.0**-140]), kind).any()


def test_int2_saturates_where_its_inverse_would_be_subnormal() -> None:
    payload, scales = block_quantize(torch.tensor([3e38, -1e30]), "int2", 32)
    assert scales.item() == LARGEST_SCALE and payload.tolist() == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_no_values(kind: str) -> None:
    payload, scales = block_quantize(torch.zeros(0), kind, 64)
    assert payload.shape == scales.shape == (0,)
    assert back(torch.zeros(0), kind).shape == (0,)


def test_unsigned_codes_halve_the_error_of_relu_outputs() -> None:
    """The reason for them: signed codes of such a block leave half of the levels unused."""
    x = make(64 * 200, torch.float32, signed=False).view(-1, 64)
    # One value far too small to matter makes a block signed.
    x[:, 0] = 0.0
    signed = x.clone()
    signed[:, 0] = -(2.0**-90)
    for kind in ("int4", "int2"):
        error = float((back(x.flatten(), kind).view_as(x) - x).norm())
        assert error < 0.52 * float((back(signed.flatten(), kind).view_as(x) - x).norm())
