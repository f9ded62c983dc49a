"""Inputs of block_quantize that meet every branch of it."""

import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.reference import block_quantize as reference
from tests.ladder import PLACES as ALL_PLACES
from tests.ladder import assert_same_bits

# No Triton kernels: this is work on bits.
PLACES = tuple(place for place in ALL_PLACES if place.backend != "triton")
KINDS = ("int8", "int4", "int2", "fp8")
BLOCKS = (32, 64, 128, 256)
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# Sizes: why.
SIZES = {
    0: "nothing",
    1: "one value, one code in a byte",
    31: "one short of any block",
    33: "a block of 32 and one value",
    255: "the last nibble of a byte is unused; one short of the largest block",
    256: "whole blocks of every size",
    1027: "a short block of 3 values",
    40003: "two tasks of the CPU kernels and a short block",
}


def make(
    size: int, dtype: torch.dtype, *, signed: bool, seed: int = 0, special: bool = False, device: str = "cpu"
) -> Tensor:
    """[size] values whose blocks differ in magnitude; without sign half of them are zeros, as after ReLU.

    With `special`, runs of 256 hold NaN, Inf, -0, the ends of float32's range, subnormals, or halves.
    """
    draw = torch.Generator().manual_seed(size * 31 + seed)
    x = torch.randn(size, generator=draw)
    x = x * 2.0 ** torch.randint(-6, 7, (-(-size // 32),), generator=draw).repeat_interleave(32)[:size]
    x = x if signed else x.relu()
    if special and size:
        kinds = (
            torch.tensor([float("nan")]),
            torch.tensor([float("inf"), 1.0]),
            torch.tensor([-float("inf"), 0.0]),
            torch.tensor([-0.0]),
            torch.tensor([0.0, -0.0, 2.0**-149]),
            torch.tensor([1.0, -0.0, 0.3]),
            torch.tensor([3.4e38, -3.4e38, 1.0]),
            torch.tensor([3.4e38, 1e38, 1.0]),
            torch.tensor([2.0**-100, 2.0**-107, 0.9 * 2.0**-101]),
            torch.tensor([2.0**-100 * 15, -(2.0**-101)]),
            torch.arange(-127.0, 128.0) + 0.5,
            torch.arange(0.0, 16.0) - 0.5,
            448 * 2.0 ** -torch.arange(0.0, 24.0) * 1.0625,
            torch.tensor([-1.0, -(2.0**-140)]),
        )
        for i, run in enumerate(kinds):
            start = (i * 256 + seed * 64) % size
            part = run.repeat(256)[: min(256, size - start)]
            x[start : start + len(part)] = part
    return x.to(dtype).to(device)


def scale_ties(kind: str, *, signed: bool) -> Tensor:
    """[128 * 32] float32: the scale of each block of 32 lies halfway between two of bfloat16."""
    bits = reference.BITS[kind]
    most = 448 if kind == "fp8" else 2 ** (bits - 1) - 1 if signed or bits == 8 else 2**bits - 1
    x = torch.rand(128, 32, generator=torch.Generator().manual_seed(3))
    x[:, 9] = most * (1 + (2 * torch.arange(128) + 1) / 256)
    x[:, 10] = -0.5 if signed else 0.0
    return x.flatten()


def check(x: Tensor, kind: str, block: int, out_dtype: torch.dtype) -> None:
    """Both ops, on the backend in force, have the reference's bits."""
    flat = x.cpu().reshape(-1)
    payload, scales = reference.block_quantize(flat, kind, block)
    got = ops.block_quantize(x, kind, block)
    assert_same_bits("payload", got.payload.cpu(), payload)
    assert_same_bits("scales", got.scales.cpu(), scales)
    values = reference.block_dequantize(payload, scales, flat.numel(), kind, block, out_dtype)
    out = ops.block_dequantize(got.payload, got.scales, x.numel(), kind, block, out_dtype)
    assert_same_bits("values", out.cpu(), values)
