"""group_linear in Triton: a linear layer, its activation and its linear critic's logits, and their gradients.

    pre     = x weight^T + bias                            fp32
    h       = act(pre)                                     none | relu | gelu (with erf); rounded
    logits  = h critic_weight^T + critic_bias              of h as rounded
    slope   = gelu'(pre)                                   only where it is asked for

    g       = dh + dlogits critic_weight                   either may be absent
    dpre    = g | g where not (h <= 0), else 0 | g * slope
    dbias   = sum_n dpre_n                                 before dpre is rounded

* `_forward_kernel` is a matrix product whose programs take one block of rows and a run of tiles of outputs. A tile
  of h is activated and stored from registers and multiplied by its columns of critic_weight there, so h is never
  read back. One program takes all tiles where there are rows enough to fill a device; else runs are shorter, and
  each writes a share of the logits.
* `_backward_kernel` makes dpre from dh, dlogits or both, and the sums of a chunk of rows for dbias.
* `_fold_kernel` adds up shares, in order. What a share covers is a function of the shapes alone and nothing is added
  atomically: the bits are the same on every run and for any grid.

dx and the weights' gradients are plain matrix products of dpre and dlogits, and torch's.

Dots take their operands in x's dtype, as autocast does, and sum in fp32. fp32 dots multiply in fp32 ("ieee"), never
in tf32. Gradients come in x's dtype as they are and are not scaled on the way, so fp16 needs no lifting.
"""

# Kernel parameters have their types from the launch.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from typing import NamedTuple, ParamSpec

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

P = ParamSpec("P")

# Read where triton reads it: when the kernels below are decorated.
INTERPRETED = knobs.runtime.interpret
DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}

# The logits of a block of rows are held beside a tile of h.
MAX_CLASSES = 64
# Offsets inside a tile are 32-bit.
MAX_SIDE = 1 << 20


class Tile(NamedTuple):
    """Blocks of one launch (rows, outputs, inputs), warps a program, stages of its loads."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles of the forward: of large products, by what follows them in registers, and of small products."""

    light: Tile  # none or relu, no logits
    heavy: Tile  # gelu or logits
    small: Tile


# By major compute capability and bytes an element; none spills, whatever the activation and the classes, and shared
# memory stays under the 99 KB of the smaller chips. sm_90 and sm_100 multiply 64 rows a warp group at the least and
# like deeper blocks; chips of other generations take sm_80's.
_FP32 = Tiles(Tile(64, 64, 16, 8, 3), Tile(32, 64, 16, 8, 3), Tile(32, 32, 32, 4, 3))
_DEEP = Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 4))
FORWARD = {
    8: {2: Tiles(Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 4)), 4: _FP32},
    9: {2: _DEEP, 4: _FP32},
    10: {2: _DEEP, 4: _FP32},
}
# Rows that do not start on 16 bytes are loaded in small pieces, and their addresses fill the registers: smaller tiles
# where inputs or outputs are no multiple of 16.
UNEVEN = {2: Tile(64, 64, 32, 8, 3), 4: Tile(32, 32, 16, 4, 3)}
# The backward is elementwise but for a dot over the classes; even outputs, then uneven. Inputs are unused.
BACKWARD = {
    2: (Tile(64, 64, 0, 4, 3), Tile(32, 64, 0, 8, 3)),
    4: (Tile(32, 64, 0, 8, 3), Tile(16, 64, 0, 8, 3)),
}
# [shares, elements] of one step of the fold, and its warps.
FOLD = (32, 64, 4)

# Programs that fill a device: with fewer, tiles get smaller, then runs of tiles shorter.
PROGRAMS = 128
# Chunks of rows in the backward get longer rather than more numerous than this.
BACKWARD_PROGRAMS = 1024


@triton.jit
def _gelu(pre):
    """gelu and its derivative."""
    probability = 0.5 + 0.5 * tl.erf(pre * 0.7071067811865476)
    return pre * probability, probability + pre * (0.3989422804014327 * tl.exp(-0.5 * pre * pre))


@triton.jit(do_not_specialize=["rows", "tiles"])
def _forward_kernel(
    x,  # [rows, inputs]
    weight,  # [outputs, inputs], x's dtype
    bias,  # [outputs], unread without HAS_BIAS
    critic_weight,  # [classes, outputs], x's dtype; unread without CRITIC
    critic_bias,  # [classes], unread without HAS_CRITIC_BIAS
    h,  # [rows, outputs]
    slope,  # [rows, outputs], untouched without KEEP
    logits,  # [rows, classes], or fp32 shares [runs, rows, classes]; untouched without CRITIC
    rows,
    inputs,
    outputs,
    classes,
    tiles,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    CRITIC: tl.constexpr,
    HAS_CRITIC_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """h of one block of rows and a run of `tiles` tiles of outputs, and those outputs' share of the logits."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    run = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK_OUTPUTS)
    label = tl.arange(0, BLOCK_CLASSES)
    live = row < rows - first
    x_rows = x + first * inputs

    if CRITIC:
        share = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), tl.float32)
    for tile in range(tiles):
        begin = (run * tiles + tile) * BLOCK_OUTPUTS
        in_outputs = lane < outputs - begin
        w_rows = weight + begin * inputs
        pre = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        for start in range(0, inputs, BLOCK_INPUTS):
            k = start + tl.arange(0, BLOCK_INPUTS)
            in_inputs = (k < inputs)[None, :]
            a = tl.load(
                x_rows + row[:, None] * inputs + k[None, :], mask=live[:, None] & in_inputs, other=0.0
            )
            w = tl.load(
                w_rows + lane[:, None] * inputs + k[None, :], mask=in_outputs[:, None] & in_inputs, other=0.0
            )
            pre = tl.dot(a.to(DOT), tl.trans(w.to(DOT)), pre, input_precision="ieee")
        if HAS_BIAS:
            pre += tl.load(bias + begin + lane, mask=in_outputs, other=0.0).to(tl.float32)[None, :]

        corner = first * outputs + begin
        here = row[:, None] * outputs + lane[None, :]
        mask = live[:, None] & in_outputs[None, :]
        value = pre
        if ACTIVATION == 1:
            # Not tl.maximum, which would turn a NaN into zero.
            value = tl.where(pre <= 0, 0.0, pre)
        if ACTIVATION == 2:
            value, derivative = _gelu(pre)
            if KEEP:
                tl.store(slope + corner + here, derivative.to(slope.dtype.element_ty), mask=mask)
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + corner + here, rounded, mask=mask)
        if CRITIC:
            c = tl.load(
                critic_weight + begin + label[:, None] * outputs + lane[None, :],
                mask=(label < classes)[:, None] & in_outputs[None, :],
                other=0.0,
            )
            share = tl.dot(rounded.to(DOT), tl.trans(c.to(DOT)), share, input_precision="ieee")

    if CRITIC:
        if HAS_CRITIC_BIAS:
            share += tl.load(critic_bias + label, mask=label < classes, other=0.0).to(tl.float32)[None, :]
        tl.store(
            logits + (run * rows + first) * classes + row[:, None] * classes + label[None, :],
            share.to(logits.dtype.element_ty),
            mask=live[:, None] & (label < classes)[None, :],
        )


@triton.jit(do_not_specialize=["rows", "blocks"])
def _backward_kernel(
    dh,  # [rows, outputs], unread without HAS_DH
    dlogits,  # [rows, classes], unread without CRITIC
    critic_weight,  # [classes, outputs], x's dtype; unread without CRITIC
    gate,  # [rows, outputs]: h for relu, slope for gelu; else unread
    dpre,  # [rows, outputs]
    shares,  # [chunks, outputs] fp32
    rows,
    outputs,
    classes,
    blocks,
    ACTIVATION: tl.constexpr,
    HAS_DH: tl.constexpr,
    CRITIC: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """dpre of one chunk of `blocks` row blocks and one tile of outputs, and its sums over rows."""
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    row = tl.arange(0, BLOCK_ROWS)
    label = tl.arange(0, BLOCK_CLASSES)
    in_outputs = column < outputs
    in_classes = label < classes
    if CRITIC:
        c = tl.load(
            critic_weight + label[:, None] * outputs + column[None, :],
            mask=in_classes[:, None] & in_outputs[None, :],
            other=0.0,
        )

    total = tl.zeros((BLOCK_OUTPUTS,), tl.float32)
    for block in range(blocks):
        first = (chunk * blocks + block) * BLOCK_ROWS
        live = row < rows - first
        corner = first * outputs
        here = row[:, None] * outputs + column[None, :]
        mask = live[:, None] & in_outputs[None, :]
        g = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        if CRITIC:
            delta = tl.load(
                dlogits + first * classes + row[:, None] * classes + label[None, :],
                mask=live[:, None] & in_classes[None, :],
                other=0.0,
            )
            g = tl.dot(delta.to(DOT), c.to(DOT), g, input_precision="ieee")
        if HAS_DH:
            g += tl.load(dh + corner + here, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION == 1:
            # NaN passes the gradient on, as in torch's relu.
            g = tl.where(tl.load(gate + corner + here, mask=mask, other=0.0).to(tl.float32) <= 0, 0.0, g)
        if ACTIVATION == 2:
            g *= tl.load(gate + corner + here, mask=mask, other=0.0).to(tl.float32)
        tl.store(dpre + corner + here, g.to(dpre.dtype.element_ty), mask=mask)
        total += tl.sum(g, 0)
    tl.store(shares + chunk * outputs + column, total, mask=in_outputs)


@triton.jit(do_not_specialize=["count", "size"])
def _fold_kernel(
    shares,  # [count, size] fp32
    bias,  # [period], unread without HAS_BIAS
    out,  # [size]
    count,
    size,
    period,
    HAS_BIAS: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sum of the shares, BLOCK_SHARES at a time, in order, and bias over and over."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK_SHARES):
        share = start + tl.arange(0, BLOCK_SHARES)
        here = share.to(tl.int64)[:, None] * size + element[None, :]
        total += tl.sum(tl.load(shares + here, mask=(share < count)[:, None] & inside[None, :], other=0.0), 0)
    if HAS_BIAS:
        total += tl.load(bias + element % period, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)


def why_not(x: Tensor, weight: Tensor, classes: int = 0) -> str:
    """Why these tensors are beyond the kernels, or "" when they are not."""
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in DOT_TYPES:
            return f"the triton kernels take float32, float16 or bfloat16; {name} is {tensor.dtype}"
    if classes > MAX_CLASSES:
        return f"the triton kernels take up to {MAX_CLASSES} classes; critic_weight has {classes}"
    if max(weight.shape) > MAX_SIDE:
        return f"the triton kernels take up to {MAX_SIDE} inputs and outputs; weight is {list(weight.shape)}"
    if x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 0):
            return f"the triton kernels need compute capability 8.0 or later; {x.device} has {capability}"
    elif not INTERPRETED:
        return f"the triton kernels need CUDA tensors, or TRITON_INTERPRET=1 at import; x is on {x.device}"
    return ""


def forward_tile(
    rows: int, inputs: int, outputs: int, heavy: bool, element_size: int, capability: int
) -> Tile:
    """Tile of the forward launch on a device of this major compute capability; heavy: with gelu or logits."""
    if inputs % 16 or outputs % 16:
        return UNEVEN[element_size]
    tiles = FORWARD.get(capability, FORWARD[8])[element_size]
    large = tiles.heavy if heavy else tiles.light
    programs = triton.cdiv(rows, large.rows) * triton.cdiv(outputs, large.outputs)
    return large if programs >= PROGRAMS else tiles.small


def backward_tile(outputs: int, element_size: int) -> Tile:
    """Tile of the backward launch."""
    even, uneven = BACKWARD[element_size]
    return uneven if outputs % 16 else even


def class_block(classes: int) -> int:
    """Classes of a block: a power of two that a dot takes."""
    return max(16, triton.next_power_of_2(classes))


def _as_on_a_device(entry: Callable[P, None]) -> Callable[P, None]:
    """NaN and Inf are data to a kernel; numpy, under the interpreter, would warn of them."""
    return np.errstate(all="ignore")(entry) if INTERPRETED else entry


def _dot(x: Tensor) -> tl.dtype:
    # The interpreter has no bf16 arithmetic: there the operands are widened.
    return DOT_TYPES[torch.float32 if INTERPRETED and x.dtype == torch.bfloat16 else x.dtype]


def _launch(tile: Tile) -> dict[str, int | bool]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _fold(shares: Tensor, bias: Tensor | None, out: Tensor, period: int) -> None:
    block_shares, block, warps = FOLD
    _fold_kernel[(triton.cdiv(out.numel(), block),)](
        shares,
        out if bias is None else bias,
        out,
        shares.shape[0],
        out.numel(),
        period,
        HAS_BIAS=bias is not None,
        BLOCK_SHARES=block_shares,
        BLOCK=block,
        num_warps=warps,
        num_stages=2,
        enable_fp_fusion=True,
    )


@_as_on_a_device
def group_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    critic_weight: Tensor | None,
    critic_bias: Tensor | None,
    h: Tensor,
    logits: Tensor | None,
    slope: Tensor | None,
) -> None:
    """Write h, logits and the activation's derivative into the given tensors.

    Allocates the shares of the logits, and weights in x's dtype where they have another. The current device is x's.
    Nothing waits for the device.

    Args:
        x: [N, I] fp32, fp16 or bf16, N >= 1, dense row-major like every other tensor.
        weight: [O, I] fp32, fp16 or bf16.
        bias: [O], any of those, or None.
        activation: "none", "relu" or "gelu".
        critic_weight: [V, O], any of those, V <= 64, or None.
        critic_bias: [V], any of those, or None.
        h: [N, O] in x's dtype, written.
        logits: [N, V] in x's dtype, written; None without critic_weight.
        slope: [N, O] in x's dtype, written for "gelu", or None.

    Raises:
        ValueError: shapes, dtypes or a device beyond the kernels, in the words of `why_not`.
    """
    classes = 0 if critic_weight is None else critic_weight.shape[0]
    reason = why_not(x, weight, classes)
    if reason:
        raise ValueError(f"{reason}; choose another backend")
    rows, inputs = x.shape
    outputs = weight.shape[0]
    capability = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 8
    heavy = logits is not None or activation == "gelu"
    tile = forward_tile(rows, inputs, outputs, heavy, x.element_size(), capability)
    row_blocks, tiles = triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs)
    # Without logits, which want long runs, a run is one tile.
    run_tiles = 1 if logits is None else triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, row_blocks)))
    runs = triton.cdiv(tiles, run_tiles)
    shares = None
    if logits is not None and runs > 1:
        shares = torch.empty(runs, rows * classes, dtype=torch.float32, device=x.device)
    # Once rather than in every program, and loads can then go straight to shared memory.
    weight = weight.to(x.dtype)
    _forward_kernel[(row_blocks, runs)](
        x,
        weight,
        weight if bias is None else bias,
        weight if critic_weight is None else critic_weight.to(x.dtype),
        weight if critic_bias is None else critic_bias,
        h,
        h if slope is None else slope,
        h if logits is None else logits if shares is None else shares,
        rows,
        inputs,
        outputs,
        classes,
        run_tiles,
        ACTIVATION=ACTIVATIONS[activation],
        HAS_BIAS=bias is not None,
        KEEP=slope is not None,
        CRITIC=logits is not None,
        HAS_CRITIC_BIAS=critic_bias is not None and shares is None,
        DOT=_dot(x),
        BLOCK_ROWS=tile.rows,
        BLOCK_OUTPUTS=tile.outputs,
        BLOCK_INPUTS=tile.inputs,
        BLOCK_CLASSES=class_block(classes),
        **_launch(tile),
    )
    if logits is not None and shares is not None:
        _fold(shares, critic_bias, logits, classes)


@_as_on_a_device
def group_linear_backward(
    dh: Tensor | None,
    dlogits: Tensor | None,
    critic_weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
    dpre: Tensor,
    dbias: Tensor,
) -> None:
    """Write the gradients with respect to pre and bias; dh or dlogits may be None, not both.

    Allocates the chunks' sums, and critic_weight in dpre's dtype where it has another. The current device is dpre's.

    Args:
        dh: [N, O] in dpre's dtype, dense row-major like every other tensor, or None.
        dlogits: [N, V] in dpre's dtype, V <= 64, or None.
        critic_weight: [V, O] fp32, fp16 or bf16; needed with dlogits.
        gate: [N, O] in dpre's dtype, h for "relu" and the slope for "gelu".
        activation: "none", "relu" or "gelu".
        dpre: [N, O] fp32, fp16 or bf16, N >= 1, written.
        dbias: [O] fp32, written.

    Raises:
        ValueError: shapes, dtypes or a device beyond the kernels, in the words of `why_not`.
    """
    classes = 0 if dlogits is None else dlogits.shape[1]
    reason = why_not(dpre, dpre if critic_weight is None else critic_weight, classes)
    if reason:
        raise ValueError(f"{reason}; choose another backend")
    rows, outputs = dpre.shape
    tile = backward_tile(outputs, dpre.element_size())
    row_blocks, tiles = triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs)
    blocks = max(1, triton.cdiv(row_blocks * tiles, BACKWARD_PROGRAMS))
    chunks = triton.cdiv(row_blocks, blocks)
    shares = torch.empty(chunks, outputs, dtype=torch.float32, device=dpre.device)
    _backward_kernel[(chunks, tiles)](
        dpre if dh is None else dh,
        dpre if dlogits is None else dlogits,
        dpre if critic_weight is None else critic_weight.to(dpre.dtype),
        dpre if gate is None else gate,
        dpre,
        shares,
        rows,
        outputs,
        classes,
        blocks,
        ACTIVATION=ACTIVATIONS[activation],
        HAS_DH=dh is not None,
        CRITIC=dlogits is not None,
        DOT=_dot(dpre),
        BLOCK_ROWS=tile.rows,
        BLOCK_OUTPUTS=tile.outputs,
        BLOCK_CLASSES=class_block(classes),
        **_launch(tile),
    )
    _fold(shares, None, dbias, outputs)
