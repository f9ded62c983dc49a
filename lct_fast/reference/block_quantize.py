"""block_quantize in plain torch: narrow codes with one scale a block, and back.

    scale = bf16(max|x| / most)              most: the largest code, 448 for fp8
    code  = round(x / scale)                 to the nearest, half to even, within [-most, most]
    x'    = code * scale

Everything is float32. Every operation rounds once and to the nearest, and the code is a product with 1 / scale,
so any backend that does the same has the same bits. The codes:

    kind   bits   most                 codes of a block without values below zero
    int8   8      127                  the same
    int4   4      7                    0 to 15
    int2   2      1                    0 to 3
    fp8    8      448, float8_e4m3fn   the same

The second column of codes is what ReLU outputs meet; such a block is marked by the sign of its scale. int8 has no
need of it, and a scale of 8 bits could not tell 255 steps apart.
"""

import torch
from torch import Tensor

BITS = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}
# Neither scales nor their inverses are subnormal in between.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-100, 2.0**126

_NAN = {
    torch.float32: (torch.int32, 0x7FC00000),
    torch.float16: (torch.int16, 0x7E00),
    torch.bfloat16: (torch.int16, 0x7FC0),
}


def block_quantize(x: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of x.

    Args:
        x: [n] float32, float16 or bfloat16.
        kind: "int8", "int4", "int2" or "fp8".
        block: values that share a scale.

    Returns:
        payload [ceil(n * bits / 8)] uint8: value i takes bits [i * b, (i + 1) * b), least significant first, unused
        bits are 0; scales [ceil(n / block)] bfloat16, NaN for a block that holds a NaN or an Inf, negative for a
        block whose codes are unsigned.
    """
    count, bits = x.numel(), BITS[kind]
    blocks = -(-count // block)
    values = torch.zeros(blocks * block, dtype=torch.float32, device=x.device)
    values[:count] = x
    values = values.view(blocks, block)
    top = values.abs().amax(1)
    finite = top.isfinite()

    unsigned = (values >= 0).all(1) if bits < 8 else torch.zeros_like(finite)
    most = torch.where(unsigned, 2.0**bits - 1, 448.0 if kind == "fp8" else 2.0 ** (bits - 1) - 1)
    scale = (top / most).to(torch.bfloat16).float().clamp(max=LARGEST_SCALE)
    scale = torch.where(scale < SMALLEST_SCALE, 0.0, scale)
    coded = (finite & (scale > 0))[:, None]
    inverse = 1 / torch.where(coded[:, 0], scale, 1.0)

    y = torch.where(coded, values, 0.0) * inverse[:, None]
    y = torch.minimum(torch.maximum(y, -most[:, None]), most[:, None])
    codes = y.to(torch.float8_e4m3fn).view(torch.uint8).int() if kind == "fp8" else y.round().int()
    signed = torch.where(unsigned & (scale > 0), -scale, scale)
    scales = _with_nan(torch.where(finite, signed, 0.0).to(torch.bfloat16), ~finite)
    return _pack(codes, bits)[: -(-count * bits // 8)].clone(), scales


def block_dequantize(
    payload: Tensor, scales: Tensor, size: int, kind: str, block: int, dtype: torch.dtype
) -> Tensor:
    """The values that `block_quantize` put into payload and scales.

    Args:
        payload, scales, kind, block: as it returned them and was given.
        size: n.
        dtype: of the result: float32, float16 or bfloat16. What it cannot hold becomes its largest number.

    Returns:
        [n]. NaN where the block's scale is not finite or the code is fp8's NaN.
    """
    bits, blocks = BITS[kind], scales.numel()
    packed = torch.zeros(blocks * block * bits // 8, dtype=torch.uint8, device=payload.device)
    packed[: payload.numel()] = payload
    scale = scales.float()[:, None]
    if kind == "fp8":
        code = packed.view(torch.float8_e4m3fn).float().view(blocks, block)
    else:
        whole = _unpack(packed, bits).view(blocks, block)
        half = 2 ** (bits - 1)
        signed = (whole ^ half) - half
        unsigned = scale.signbit() if bits < 8 else torch.zeros_like(scale, dtype=torch.bool)
        code = torch.where(unsigned, whole, signed).float()
        scale = torch.where(unsigned, -scale, scale)
    largest = torch.finfo(dtype).max
    x = (code * scale).clamp(-largest, largest)
    finite = scale.isfinite() & code.isfinite()
    return _with_nan(torch.where(finite, x, 0.0).to(dtype), ~finite).flatten()[:size].clone()


def _with_nan(x: Tensor, where: Tensor) -> Tensor:
    """x with the quiet NaN in places: which bits a conversion gives for NaN depends on the machine."""
    bits, nan = _NAN[x.dtype]
    return torch.where(where, torch.full((), nan, dtype=bits, device=x.device), x.view(bits)).view(x.dtype)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[...] int32 of `bits` bits each as bytes, the first one lowest."""
    each = 8 // bits
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=codes.device)
    parts = (codes.reshape(-1, each) & (2**bits - 1)) << shifts
    return parts.sum(1).to(torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes as [bytes * 8 / bits] int32, unsigned."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device)
    return ((packed.int()[:, None] >> shifts) & (2**bits - 1)).flatten()
