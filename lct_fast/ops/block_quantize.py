"""block_quantize: int8, int4, int2 or fp8 codes with one scale a block of values, and back.

The formula is in `lct_fast.reference.block_quantize`, the kernels' contract in
csrc/include/lct/block_quantize.h. This file holds the ops themselves: schema, checks, shapes and backends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lct_fast import _native
from lct_fast.ops import available
from lct_fast.ops.backend import Backend, Op
from lct_fast.ops.register import register
from lct_fast.reference import block_quantize as reference

_NATIVE_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NATIVE_KIND = {"int8": 0, "int4": 1, "int2": 2, "fp8": 3}
_BLOCKS = (32, 64, 128, 256)


class BlockQuantized(NamedTuple):
    """What `block_quantize` returns: payload uint8 [ceil(n * bits / 8)], scales bfloat16 [ceil(n / block)]."""

    payload: Tensor
    scales: Tensor


def block_quantize(x: Tensor, kind: str = "int8", block: int = 64) -> BlockQuantized:
    """Narrow codes of x, a run of `block` values sharing a scale.

    scale = bf16(max|x| / most), code = round(x / scale), to the nearest with half to even; most is 127 for int8,
    7 for int4, 1 for int2, 448 for fp8 (float8_e4m3fn). A block of int4 or int2 without values below zero, as ReLU
    leaves them, takes unsigned codes up to 15 or 3 instead and is marked by a negative scale. A value costs the
    code's bits and 16 / block: 8.25, 4.25, 2.25, 8.25 bits with blocks of 64.

    The error of an integer code is at most half a step, |scale| / 2. A block with a NaN or an Inf gets scale NaN
    and decodes to NaN altogether: `scales.isnan().any()` is the flag. A block whose scale would be below 2^-100
    decodes to zeros; a scale stays at 2^126, where int2 saturates. Every backend gives the same bits.

    Values are taken in the order in which they lie in memory, so a channels-last x is coded as it is; x that is not
    dense is copied row by row first. The results carry no gradient.

    Args:
        x: any shape, float32, float16 or bfloat16. May be empty.
        kind: "int8", "int4", "int2" or "fp8".
        block: 32, 64, 128 or 256; the last one may be short.

    Returns:
        BlockQuantized(payload, scales): codes in one stream of bits, value i at bits [i * b, (i + 1) * b), least
        significant first, unused bits 0.

    Raises:
        ValueError: an unknown kind or block.
        TypeError: a dtype does not fit.
        BackendError: the backend asked for cannot run here.
    """
    return BlockQuantized(*_block_quantize(x, kind, block))


def block_dequantize(
    payload: Tensor,
    scales: Tensor,
    size: int,
    kind: str = "int8",
    block: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values that `block_quantize` coded, each code times its block's scale, rounded once to `dtype`.

    Quantized again with the same kind and block, a float32 result gives the same payload and scales; only a block
    of int4 or int2 whose values below zero have all been rounded to zero gets unsigned codes then. For x of any dense
    shape: `block_dequantize(...).as_strided(x.shape, x.stride())`.

    Args:
        payload: uint8 [ceil(size * bits / 8)].
        scales: bfloat16 [ceil(size / block)].
        size: values.
        kind, block: as they were given to `block_quantize`.
        dtype: float32, float16 or bfloat16. What is beyond its largest number becomes that.

    Returns:
        [size] in `dtype`, NaN where the block's scale is not finite.

    Raises:
        ValueError, TypeError, BackendError: as `block_quantize`; sizes that do not belong together.
    """
    return _block_dequantize(payload, scales, size, kind, block, dtype)


def _check_code(kind: str, block: int) -> None:
    if kind not in _NATIVE_KIND:
        raise ValueError(f"kind must be one of {', '.join(_NATIVE_KIND)}, got '{kind}'")
    if block not in _BLOCKS:
        raise ValueError(f"block must be one of {', '.join(map(str, _BLOCKS))} values, got {block}")


def _check_quantize(x: Tensor, kind: str, block: int) -> None:
    _check_code(kind, block)
    if x.dtype not in _NATIVE_DTYPE:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}; cast it")


def _check_dequantize(
    payload: Tensor, scales: Tensor, size: int, kind: str, block: int, dtype: torch.dtype
) -> None:
    _check_code(kind, block)
    if size < 0:
        raise ValueError(f"size must be at least 0, got {size}; pass the number of values quantized")
    for name, x, wanted in (("payload", payload, torch.uint8), ("scales", scales, torch.bfloat16)):
        if x.dtype != wanted:
            raise TypeError(f"{name} must be {wanted}, got {x.dtype}; pass it as block_quantize returned it")
    for name, x, length in (
        ("payload", payload, _bytes(size, kind)),
        ("scales", scales, _blocks(size, block)),
    ):
        if x.dim() != 1 or x.shape[0] != length:
            raise ValueError(
                f"{name} must be [{length}] for {size} values of {kind} in blocks of {block}, got {list(x.shape)}"
            )
    if scales.device != payload.device:
        raise ValueError(
            f"scales are on {scales.device} and payload on {payload.device}; move them with .to(payload.device)"
        )
    if dtype not in _NATIVE_DTYPE:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}; cast the result")


def _bytes(size: int, kind: str) -> int:
    return (size * reference.BITS[kind] + 7) // 8


def _blocks(size: int, block: int) -> int:
    return (size + block - 1) // block


def _flat(x: Tensor) -> Tensor:
    """x as [n], in memory order where it is dense."""
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        return x.as_strided((x.numel(),), (1,))
    return x.contiguous().view(-1)


def _run(x: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    _check_quantize(x, kind, block)
    run: Callable[..., tuple[Tensor, Tensor]] = _QUANTIZE.resolve(x.device.type, x.dtype)
    if x.numel() == 0:
        return _fake(x, kind, block)
    return run(_flat(x.detach()), kind, block)


def _run_back(
    payload: Tensor, scales: Tensor, size: int, kind: str, block: int, dtype: torch.dtype
) -> Tensor:
    _check_dequantize(payload, scales, size, kind, block, dtype)
    run: Callable[..., Tensor] = _DEQUANTIZE.resolve(payload.device.type, dtype)
    if size == 0:
        return payload.new_empty(0, dtype=dtype)
    return run(payload.contiguous(), scales.detach().contiguous(), size, kind, block, dtype)


def _fake(x: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    _check_quantize(x, kind, block)
    return (
        x.new_empty(_bytes(x.numel(), kind), dtype=torch.uint8),
        x.new_empty(_blocks(x.numel(), block), dtype=torch.bfloat16),
    )


def _fake_back(
    payload: Tensor, scales: Tensor, size: int, kind: str, block: int, dtype: torch.dtype
) -> Tensor:
    _check_dequantize(payload, scales, size, kind, block, dtype)
    return payload.new_empty(size, dtype=dtype)


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
    ctx.set_materialize_grads(False)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, *_: Any) -> tuple[None, ...]:
    return (None,) * ctx.inputs


def _native_quantize(x: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    native: Any = _native.load()
    out = payload, scales = _fake(x, kind, block)
    call = native.block_quantize_cuda if x.is_cuda else native.block_quantize_cpu
    call(
        x.data_ptr(),
        payload.data_ptr(),
        scales.data_ptr(),
        x.numel(),
        block,
        _NATIVE_KIND[kind],
        _NATIVE_DTYPE[x.dtype],
        *_where(x),
    )
    return out


def _native_dequantize(
    payload: Tensor, scales: Tensor, size: int, kind: str, block: int, dtype: torch.dtype
) -> Tensor:
    native: Any = _native.load()
    x = payload.new_empty(size, dtype=dtype)
    call = native.block_dequantize_cuda if x.is_cuda else native.block_dequantize_cpu
    call(
        payload.data_ptr(),
        scales.data_ptr(),
        x.data_ptr(),
        size,
        block,
        _NATIVE_KIND[kind],
        _NATIVE_DTYPE[dtype],
        *_where(x),
    )
    return x


def _where(x: Tensor) -> tuple[int, ...]:
    """Device and stream, or the number of threads."""
    if not x.is_cuda:
        return (torch.get_num_threads(),)
    index = x.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda",)}

_QUANTIZE = Op(
    "block_quantize",
    {
        "reference": Backend(reference.block_quantize, available.always),
        "cpu": Backend(_native_quantize, available.cpu),
        "cuda": Backend(_native_quantize, available.cuda),
    },
    _PREFERENCE,
)
_DEQUANTIZE = Op(
    "block_dequantize",
    {
        "reference": Backend(reference.block_dequantize, available.always),
        "cpu": Backend(_native_dequantize, available.cpu),
        "cuda": Backend(_native_dequantize, available.cuda),
    },
    _PREFERENCE,
)

_block_quantize = register(
    "block_quantize(Tensor x, str kind, int block) -> (Tensor, Tensor)", _run, _fake, _no_gradient, _backward
)
_block_dequantize = register(
    "block_dequantize(Tensor payload, Tensor scales, SymInt size, str kind, int block, ScalarType dtype) "
    "-> Tensor",
    _run_back,
    _fake_back,
    _no_gradient,
    _backward,
)
