"""critic_head in Triton: a linear layer, softmax cross-entropy and their gradients.

    a        = act(h)                                      none | relu
    logits   = a weight^T + bias                           fp32
    loss_n   = logsumexp(logits_n) - logits_n[target_n]
    dlogits  = softmax(logits) - onehot(target)            subtracted in fp32, then rounded; never scaled
    dh       = scale * (dlogits weight) * act'(h)          scaled in fp32, then rounded
    dweight  = sum_n row_scale_n * dlogits_n (x) a_n       only with row_scale
    dbias    = sum_n row_scale_n * dlogits_n

While there are few classes the work is bound by memory: h is read, dh is written, the rest is small. So

* `_resident_kernel` (rows short enough to stay in registers) reads h once. One program walks the row blocks
  of its chunk with the weight tile at hand, and keeps its share of dweight in registers until the end.
* `_tiled_kernel` (long rows) walks the depth twice, for the logits and for dh. It holds few rows at a time,
  so that the second walk can find them in L2. With up to 16 classes it also writes its rows' share of
  dweight.
* `_wgrad_kernel` makes the shares of dweight from stored dlogits: for a row_scale that arrives later, and
  for the shapes whose shares would be more bytes than reading h again.
* `_fold_kernel` adds the shares, in order.

A share belongs to a fixed chunk of rows, a function of the shapes alone, and nothing is added atomically:
the bits are the same on every run and for any grid.

Dots take their operands in h's dtype, as autocast does: weight and the fp32 dlogits are rounded to it, sums
are fp32. Rounding dlogits costs dh about what rounding dh itself does, and plain torch rounds there too.
fp16 has too few exponents for it, though: a confident row's dlogits, or a row_scale that holds 1/N, would
underflow. There the operand is lifted by a power of two (and row_scale divided by its block's largest),
which is taken out again in fp32. fp32 dots multiply in fp32 ("ieee"), never in tf32.

A row that does not count (ignored, or a bad label) adds nothing to dweight and has zero dh, whatever its h
or weight hold.
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

# A block's logits are held in registers: 16 rows of all classes at the least.
MAX_CLASSES = 1024
# Offsets inside a block of rows are 32-bit.
MAX_DEPTH = 1 << 20


class Tile(NamedTuple):
    """Blocks of one launch (rows and columns of h, classes), warps a program, stages of its loads."""

    rows: int
    depth: int
    classes: int
    warps: int
    stages: int


# By bytes an element of h. The first tile that holds the shape is taken; the tiled kernel holds any depth,
# the weight gradient any depth and class count. One table serves sm_80, sm_90 and sm_100: no tile spills,
# and shared memory stays under the 99 KB of the smaller sm_8x chips (but for the last fp32 tile).
RESIDENT = {
    2: (
        Tile(32, 64, 16, 4, 3),
        Tile(32, 128, 16, 4, 3),
        Tile(32, 256, 16, 8, 3),
        Tile(16, 512, 16, 8, 3),
        Tile(32, 128, 32, 8, 3),
        Tile(16, 256, 32, 8, 3),
        Tile(16, 128, 64, 8, 3),
    ),
    4: (Tile(16, 128, 16, 4, 2), Tile(16, 256, 16, 8, 2), Tile(32, 64, 64, 8, 2)),
}
TILED = {
    2: (
        Tile(64, 128, 16, 8, 4),
        Tile(64, 64, 64, 8, 4),
        Tile(64, 64, 128, 8, 3),
        Tile(32, 64, 256, 8, 2),
        Tile(16, 64, 512, 8, 1),
        Tile(16, 16, 1024, 8, 1),
    ),
    4: (
        Tile(64, 32, 16, 4, 3),
        Tile(32, 32, 64, 4, 3),
        Tile(32, 32, 128, 8, 3),
        Tile(16, 16, 256, 8, 3),
        Tile(16, 16, 512, 8, 2),
        Tile(16, 16, 1024, 16, 1),
    ),
}
WGRAD = {
    2: (Tile(64, 64, 16, 4, 4), Tile(64, 64, 64, 4, 3), Tile(32, 128, 128, 8, 3)),
    4: (Tile(32, 64, 16, 4, 3), Tile(32, 64, 64, 8, 3)),
}
# Chips with 99 KB of shared memory for a block: too little for the last fp32 tile.
SMALL_CHIPS = {(8, 6), (8, 9), (12, 0), (12, 1)}
# [chunks, elements] of one step of the fold, and its warps.
FOLD = (32, 64, 4)

# A tiled launch writes one share of dweight a row block; with more classes than this the shares outweigh
# reading h again.
SHARE_CLASSES = 16
# Chunks of rows get longer rather than more numerous than this: programs for any chip, yet few shares.
PROGRAMS = 512
# Power of two by which an fp16 dot operand is lifted; |dlogits| <= 1, so it cannot overflow.
LIFT = 1024.0


@triton.jit
def _activate(x, RELU: tl.constexpr):
    # Not tl.maximum, which would turn a NaN into zero.
    return tl.where(x <= 0, 0.0, x) if RELU else x


@triton.jit
def _cross_entropy(logits, label, live, column, classes, ignore_index):
    """Loss [R], fp32 dlogits [R, V] and which rows count [R]; the columns of logits end at `classes`."""
    inside = (column < classes)[None, :]
    logits = tl.where(inside, logits, float("-inf"))
    shifted = logits - tl.max(logits, 1)[:, None]
    power = tl.exp(shifted)
    total = tl.sum(power, 1)
    hit = column[None, :] == label[:, None]
    counts = live & (label >= 0) & (label < classes) & (label != ignore_index)
    loss = tl.log(total) - tl.sum(tl.where(hit, shifted, 0.0), 1)
    loss = tl.where(counts, loss, tl.where(label == ignore_index, 0.0, float("nan")))
    delta = power / total[:, None] - tl.where(hit, 1.0, 0.0)
    return loss, tl.where(counts[:, None] & inside, delta, 0.0), counts


@triton.jit
def _scaled_operand(delta, row_scale, LIFT: tl.constexpr):
    """row_scale * delta as operand * factor: an operand that survives fp16, and a factor in fp32."""
    if LIFT == 1:
        operand = delta * row_scale[:, None]
        factor = 1.0
    else:
        top = tl.max(tl.abs(row_scale), 0)
        top = tl.where(top > 0, top, 1.0)
        operand = delta * (row_scale / top * LIFT)[:, None]
        factor = top / LIFT
    return operand, factor


@triton.jit(do_not_specialize=["rows", "blocks", "ignore_index"])
def _resident_kernel(
    h,  # [rows, depth]
    weight,  # [classes, depth]
    bias,  # [classes], unread without HAS_BIAS
    target,  # [rows] int64
    scale,  # [] fp32
    row_scale,  # [rows] fp32, unread without WGRAD
    loss,  # [rows] fp32
    dlogits,  # [rows, classes]
    dh,  # [rows, depth]
    shares,  # [chunks, pitch] fp32: dweight [classes, depth], then dbias [classes]; unread without WGRAD
    rows,
    depth,
    classes,
    ignore_index,
    blocks,
    pitch,
    RELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WGRAD: tl.constexpr,
    DOT: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """All of critic_head for one chunk of `blocks` row blocks; depth <= BLOCK_DEPTH, h is read once."""
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_DEPTH)
    column = tl.arange(0, BLOCK_CLASSES)
    in_depth = (k < depth)[None, :]
    in_classes = column < classes

    tile = column[:, None] * depth + k[None, :]
    tile_mask = in_classes[:, None] & in_depth
    w = tl.load(weight + tile, mask=tile_mask, other=0.0).to(tl.float32).to(DOT)
    if HAS_BIAS:
        shift = tl.load(bias + column, mask=in_classes, other=0.0).to(tl.float32)
    dh_scale = tl.load(scale) / LIFT
    if WGRAD:
        dweight = tl.zeros((BLOCK_CLASSES, BLOCK_DEPTH), tl.float32)
        dbias = tl.zeros((BLOCK_CLASSES,), tl.float32)

    for block in range(blocks):
        first = (chunk * blocks + block) * BLOCK_ROWS
        live = row < rows - first
        here = row[:, None] * depth + k[None, :]
        mask = live[:, None] & in_depth
        x = tl.load(h + first * depth + here, mask=mask, other=0.0).to(tl.float32)
        label = tl.load(target + first + row, mask=live, other=-1)
        a = _activate(x, RELU)

        logits = tl.dot(a.to(DOT), tl.trans(w), input_precision="ieee")
        if HAS_BIAS:
            logits += shift[None, :]
        row_loss, delta, counts = _cross_entropy(logits, label, live, column, classes, ignore_index)
        tl.store(loss + first + row, row_loss, mask=live)
        tl.store(
            dlogits + first * classes + row[:, None] * classes + column[None, :],
            delta.to(dlogits.dtype.element_ty),
            mask=live[:, None] & in_classes[None, :],
        )

        grad = tl.dot((delta * LIFT).to(DOT), w, input_precision="ieee") * dh_scale
        # A row that does not count is zero even where weight holds a NaN.
        keep = counts[:, None] & (x > 0) if RELU else counts[:, None]
        tl.store(dh + first * depth + here, tl.where(keep, grad, 0.0).to(dh.dtype.element_ty), mask=mask)

        if WGRAD:
            factors = tl.load(row_scale + first + row, mask=live, other=0.0)
            operand, factor = _scaled_operand(delta, factors, LIFT)
            a = tl.where(counts[:, None], a, 0.0)
            dweight += tl.dot(tl.trans(operand.to(DOT)), a.to(DOT), input_precision="ieee") * factor
            dbias += tl.sum(delta * factors[:, None], 0)

    if WGRAD:
        share = shares + chunk * pitch
        tl.store(share + tile, dweight, mask=tile_mask)
        tl.store(share + classes * depth + column, dbias, mask=in_classes)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _tiled_kernel(
    h,  # [rows, depth]
    weight,  # [classes, depth]
    bias,  # [classes], unread without HAS_BIAS
    target,  # [rows] int64
    scale,  # [] fp32
    row_scale,  # [rows] fp32, unread without WGRAD
    loss,  # [rows] fp32
    dlogits,  # [rows, classes]
    dh,  # [rows, depth]
    shares,  # [row blocks, pitch] fp32: dweight [classes, depth], then dbias [classes]; unread without WGRAD
    rows,
    depth,
    classes,
    ignore_index,
    pitch,
    RELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WGRAD: tl.constexpr,
    DOT: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """All of critic_head for one row block of any depth: one walk for the logits, one for dh."""
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_CLASSES)
    live = row < rows - first
    in_classes = column < classes
    h_rows = h + first * depth
    dh_rows = dh + first * depth

    logits = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        k = start + tl.arange(0, BLOCK_DEPTH)
        in_depth = (k < depth)[None, :]
        here = row[:, None] * depth + k[None, :]
        tile = column[:, None] * depth + k[None, :]
        x = tl.load(h_rows + here, mask=live[:, None] & in_depth, other=0.0).to(tl.float32)
        w = tl.load(weight + tile, mask=in_classes[:, None] & in_depth, other=0.0).to(tl.float32)
        a = _activate(x, RELU)
        logits = tl.dot(a.to(DOT), tl.trans(w.to(DOT)), logits, input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias + column, mask=in_classes, other=0.0).to(tl.float32)[None, :]

    label = tl.load(target + first + row, mask=live, other=-1)
    row_loss, delta, counts = _cross_entropy(logits, label, live, column, classes, ignore_index)
    tl.store(loss + first + row, row_loss, mask=live)
    tl.store(
        dlogits + first * classes + row[:, None] * classes + column[None, :],
        delta.to(dlogits.dtype.element_ty),
        mask=live[:, None] & in_classes[None, :],
    )

    dh_scale = tl.load(scale) / LIFT
    dh_operand = (delta * LIFT).to(DOT)
    if WGRAD:
        share = shares + block * pitch
        factors = tl.load(row_scale + first + row, mask=live, other=0.0)
        operand, factor = _scaled_operand(delta, factors, LIFT)
        dweight_operand = tl.trans(operand.to(DOT))
        tl.store(share + classes * depth + column, tl.sum(delta * factors[:, None], 0), mask=in_classes)

    for start in range(0, depth, BLOCK_DEPTH):
        k = start + tl.arange(0, BLOCK_DEPTH)
        in_depth = (k < depth)[None, :]
        here = row[:, None] * depth + k[None, :]
        mask = live[:, None] & in_depth
        tile = column[:, None] * depth + k[None, :]
        tile_mask = in_classes[:, None] & in_depth
        w = tl.load(weight + tile, mask=tile_mask, other=0.0).to(tl.float32)
        grad = tl.dot(dh_operand, w.to(DOT), input_precision="ieee") * dh_scale
        # A row that does not count is zero even where weight holds a NaN.
        keep = counts[:, None]
        if RELU or WGRAD:
            x = tl.load(h_rows + here, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            keep = keep & (x > 0)
        tl.store(dh_rows + here, tl.where(keep, grad, 0.0).to(dh.dtype.element_ty), mask=mask)
        if WGRAD:
            a = tl.where(counts[:, None], _activate(x, RELU), 0.0)
            dweight = tl.dot(dweight_operand, a.to(DOT), input_precision="ieee") * factor
            tl.store(share + tile, dweight, mask=tile_mask)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _wgrad_kernel(
    h,  # [rows, depth]
    dlogits,  # [rows, classes]
    row_scale,  # [rows] fp32
    shares,  # [chunks, pitch] fp32: dweight [classes, depth], then dbias [classes]
    rows,
    depth,
    classes,
    blocks,
    pitch,
    RELU: tl.constexpr,
    DOT: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """One chunk's share of one [BLOCK_CLASSES, BLOCK_DEPTH] tile of dweight, and of dbias."""
    chunk = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    column = tl.program_id(2) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    row = tl.arange(0, BLOCK_ROWS)
    in_depth = k < depth
    in_classes = column < classes

    dweight = tl.zeros((BLOCK_CLASSES, BLOCK_DEPTH), tl.float32)
    dbias = tl.zeros((BLOCK_CLASSES,), tl.float32)
    for block in range(blocks):
        first = (chunk * blocks + block) * BLOCK_ROWS
        live = row < rows - first
        x = tl.load(
            h + first * depth + row[:, None] * depth + k[None, :],
            mask=live[:, None] & in_depth[None, :],
            other=0.0,
        ).to(tl.float32)
        delta = tl.load(
            dlogits + first * classes + row[:, None] * classes + column[None, :],
            mask=live[:, None] & in_classes[None, :],
            other=0.0,
        ).to(tl.float32)
        factors = tl.load(row_scale + first + row, mask=live, other=0.0)
        operand, factor = _scaled_operand(delta, factors, LIFT)
        # All zeros is a row that was left out: its h may hold anything.
        counts = tl.sum((delta != 0).to(tl.int32), 1) > 0
        a = tl.where(counts[:, None], _activate(x, RELU), 0.0)
        dweight += tl.dot(tl.trans(operand.to(DOT)), a.to(DOT), input_precision="ieee") * factor
        dbias += tl.sum(delta * factors[:, None], 0)

    share = shares + chunk * pitch
    tl.store(
        share + column[:, None] * depth + k[None, :], dweight, mask=in_classes[:, None] & in_depth[None, :]
    )
    if tl.program_id(1) == 0:
        tl.store(share + classes * depth + column, dbias, mask=in_classes)


@triton.jit(do_not_specialize=["chunks"])
def _fold_kernel(
    shares,  # [chunks, pitch] fp32: dweight [dweight_size], then dbias [classes]
    dweight,  # [dweight_size]
    dbias,  # [classes], untouched without HAS_BIAS
    chunks,
    dweight_size,
    classes,
    pitch,
    HAS_BIAS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dweight and dbias = the sum of the chunks' shares, BLOCK_CHUNKS at a time, in order."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = dweight_size + classes
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        here = chunk.to(tl.int64)[:, None] * pitch + element[None, :]
        part = tl.load(shares + here, mask=(chunk < chunks)[:, None] & (element < size)[None, :], other=0.0)
        total += tl.sum(part, 0)
    tl.store(dweight + element, total.to(dweight.dtype.element_ty), mask=element < dweight_size)
    if HAS_BIAS:
        tl.store(
            dbias + (element - dweight_size),
            total.to(dbias.dtype.element_ty),
            mask=(element >= dweight_size) & (element < size),
        )


def why_not(h: Tensor, weight: Tensor) -> str:
    """Why these tensors are beyond the kernels, or "" when they are not."""
    classes, depth = weight.shape
    for name, tensor in (("h", h), ("weight", weight)):
        if tensor.dtype not in DOT_TYPES:
            return f"the triton kernels take float32, float16 or bfloat16; {name} is {tensor.dtype}"
    if classes > MAX_CLASSES:
        return f"the triton kernels take up to {MAX_CLASSES} classes; weight has {classes}"
    if depth > MAX_DEPTH:
        return f"the triton kernels take a depth of up to {MAX_DEPTH}; weight has {depth}"
    if h.is_cuda:
        capability = torch.cuda.get_device_capability(h.device)
        if capability < (8, 0):
            return f"the triton kernels need compute capability 8.0 or later; {h.device} has {capability}"
        if capability in SMALL_CHIPS and h.element_size() == 4 and classes > 512:
            return f"float32 h with {classes} classes needs more shared memory than {h.device} has"
    elif not INTERPRETED:
        return f"the triton kernels need CUDA tensors, or TRITON_INTERPRET=1 at import; h is on {h.device}"
    return ""


def forward_tile(depth: int, classes: int, element_size: int) -> tuple[Tile, bool]:
    """Tile of the forward launch, and whether a whole row of h stays in registers (the resident kernel)."""
    # Rows that do not start on 16 bytes are loaded in small pieces, and their addresses fill the registers.
    for tile in RESIDENT[element_size] if depth % 16 == 0 else ():
        if depth <= tile.depth and classes <= tile.classes:
            return tile, True
    return next(tile for tile in TILED[element_size] if classes <= tile.classes), False


def wgrad_tile(classes: int, element_size: int) -> Tile:
    """Tile of the weight gradient's launch."""
    tiles = WGRAD[element_size]
    return next((tile for tile in tiles if classes <= tile.classes), tiles[-1])


def _as_on_a_device(entry: Callable[P, None]) -> Callable[P, None]:
    """NaN and Inf are data to a kernel; numpy, under the interpreter, would warn of them."""
    return np.errstate(all="ignore")(entry) if INTERPRETED else entry


def _require(h: Tensor, weight: Tensor) -> None:
    reason = why_not(h, weight)
    if reason:
        raise ValueError(f"{reason}; choose another backend")


def _dot(h: Tensor) -> dict[str, object]:
    # The interpreter has no bf16 arithmetic: there the operands are left in fp32.
    dot = torch.float32 if INTERPRETED and h.dtype == torch.bfloat16 else h.dtype
    return {"DOT": DOT_TYPES[dot], "LIFT": LIFT if dot == torch.float16 else 1.0}


def _launch(tile: Tile) -> dict[str, int | bool]:
    return {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_DEPTH": tile.depth,
        "BLOCK_CLASSES": tile.classes,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def _shares(chunks: int, depth: int, classes: int, device: torch.device) -> Tensor:
    # Rows of whole 16-byte words, so that shares are read and written in those.
    return torch.empty(chunks, triton.cdiv(classes * (depth + 1), 4) * 4, dtype=torch.float32, device=device)


def _fold(shares: Tensor, dweight: Tensor, dbias: Tensor | None) -> None:
    block_chunks, block, warps = FOLD
    classes, depth = dweight.shape
    _fold_kernel[(triton.cdiv(classes * (depth + 1), block),)](
        shares,
        dweight,
        dweight if dbias is None else dbias,
        shares.shape[0],
        classes * depth,
        classes,
        shares.shape[1],
        HAS_BIAS=dbias is not None,
        BLOCK_CHUNKS=block_chunks,
        BLOCK=block,
        num_warps=warps,
        num_stages=2,
        enable_fp_fusion=True,
    )


@_as_on_a_device
def critic_head(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    activation: str,
    ignore_index: int,
    loss: Tensor,
    dlogits: Tensor,
    dh: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Write the head's loss and gradients into the given tensors; allocates torch workspace only.

    The current device is h's. Nothing waits for the device.

    Args:
        h: [N, D] fp32, fp16 or bf16, dense row-major like every other tensor.
        weight: [V, D] fp32, fp16 or bf16; dots run in h's dtype.
        bias: [V] in weight's dtype, or None.
        target: [N] int64.
        scale: 0-dim fp32; multiplies dh.
        row_scale: [N] fp32, or None to leave dweight and dbias alone.
        activation: "none" or "relu".
        ignore_index: label of the rows to leave out.
        loss: [N] fp32, written.
        dlogits: [N, V] in h's dtype, written.
        dh: [N, D] in h's dtype, written.
        dweight: [V, D] in weight's dtype, written when row_scale is given.
        dbias: [V] in weight's dtype or None, written when row_scale is given.

    Raises:
        ValueError: shapes, dtypes or a device beyond the kernels, in the words of `why_not`.
    """
    _require(h, weight)
    rows, depth = h.shape
    classes = weight.shape[0]
    tile, resident = forward_tile(depth, classes, h.element_size())
    row_blocks = triton.cdiv(rows, tile.rows)
    blocks = max(1, triton.cdiv(row_blocks, PROGRAMS)) if resident else 1
    chunks = triton.cdiv(row_blocks, blocks)
    shares_here = row_scale is not None and (resident or classes <= SHARE_CLASSES)
    shares = _shares(chunks, depth, classes, h.device) if shares_here else loss
    pitch = shares.shape[1] if shares_here else 0
    inputs = (h, weight, weight if bias is None else bias, target, scale)
    factors = loss if row_scale is None else row_scale
    outputs = (loss, dlogits, dh, shares)
    flags = {"RELU": activation == "relu", "HAS_BIAS": bias is not None, "WGRAD": shares_here}
    options = {**flags, **_dot(h), **_launch(tile)}
    if rows and resident:
        _resident_kernel[(chunks,)](
            *inputs, factors, *outputs, rows, depth, classes, ignore_index, blocks, pitch, **options
        )
    elif rows:
        _tiled_kernel[(chunks,)](
            *inputs, factors, *outputs, rows, depth, classes, ignore_index, pitch, **options
        )
    if row_scale is not None and dweight is not None:
        if shares_here:
            _fold(shares, dweight, dbias)
        else:
            _wgrad(h, dlogits, row_scale, activation, dweight, dbias)


def _wgrad(
    h: Tensor, dlogits: Tensor, row_scale: Tensor, activation: str, dweight: Tensor, dbias: Tensor | None
) -> None:
    rows, depth = h.shape
    classes = dlogits.shape[1]
    tile = wgrad_tile(classes, h.element_size())
    row_blocks = triton.cdiv(rows, tile.rows)
    depth_tiles, class_tiles = triton.cdiv(depth, tile.depth), triton.cdiv(classes, tile.classes)
    blocks = max(1, triton.cdiv(row_blocks * depth_tiles * class_tiles, PROGRAMS))
    chunks = triton.cdiv(row_blocks, blocks)
    shares = _shares(chunks, depth, classes, h.device)
    if rows:
        _wgrad_kernel[(chunks, depth_tiles, class_tiles)](
            h,
            dlogits,
            row_scale,
            shares,
            rows,
            depth,
            classes,
            blocks,
            shares.shape[1],
            RELU=activation == "relu",
            **_dot(h),
            **_launch(tile),
        )
    _fold(shares, dweight, dbias)


@_as_on_a_device
def critic_head_wgrad(
    h: Tensor, dlogits: Tensor, row_scale: Tensor, activation: str, dweight: Tensor, dbias: Tensor | None
) -> None:
    """Write the weight gradients for a row_scale that came later; allocates torch workspace only.

    Args:
        h: [N, D] fp32, fp16 or bf16, as given to `critic_head`.
        dlogits: [N, V] in h's dtype, as `critic_head` wrote it.
        row_scale: [N] fp32; the whole factor of each row.
        activation: "none" or "relu".
        dweight: [V, D] fp32, fp16 or bf16, written.
        dbias: [V] in dweight's dtype or None, written.

    Raises:
        ValueError: shapes, dtypes or a device beyond the kernels, in the words of `why_not`.
    """
    _require(h, dweight)
    _wgrad(h, dlogits, row_scale, activation, dweight, dbias)
