"""bn_relu_pool in Triton: batch norm, ReLU and average pooling over a grid of windows, and their gradients.

    rstd_c   = 1 / sqrt(var_c + eps)
    z        = (x - mean_c) * (gamma_c * rstd_c) + beta_c
    y        = relu(z)
    pooled_w = mean of relu(z) over window w               in fp32, then rounded
    moments  = means over window w of active, and of active * xhat; active is not (z <= 0)

    g        = active * (dy + dpooled_w / area)            never in memory
    dbeta_c  = sum g,  dgamma_c = sum g * xhat
    dx       = gamma * rstd * (g - dbeta / M - xhat * dgamma / M)

All work is bound by memory. Its unit is a pair of a window and a channel; a program takes a tile of pairs x
elements of a window, in either memory format, so that every sum over a window stays in one program:

* `_statistics_kernel` writes each pair's mean and centred square, made in registers; `_fold_statistics_kernel`
  merges a channel's pairs. No difference of large squares is taken.
* `_output_kernel` reads x again and writes y, pooled and moments.
* `_terms_kernel`, with dy only, sums g and g * xhat over each pair. Without dy these sums are dpooled times
  moments, so x is not read. `_fold_gradients_kernel` adds up a channel's pairs.
* `_dx_kernel` reads x (and dy) and writes dx.

Everything is fp32 and folded in an order that the shapes fix: the bits are the same on every run.
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

# Offsets inside a sample are 32-bit.
MAX_SAMPLE = 1 << 31


class Tile(NamedTuple):
    """Pairs of a window and a channel, elements of a window a step, warps a program."""

    pairs: int
    elements: int
    warps: int


# One table serves sm_80, sm_90 and sm_100: 8 or 16 elements a thread. Windows whose width is not a power of two
# take an address each, 64-bit; small ones, with fewer elements, have room for those without spilling.
# Contiguous maps, by the elements of a window: the first tile that holds one, else the last, in steps.
FIRST = (
    Tile(256, 1, 4),
    Tile(256, 4, 4),
    Tile(64, 16, 4),
    Tile(16, 64, 4),
    Tile(8, 256, 4),
    Tile(2, 1024, 4),
    Tile(1, 2048, 4),
)
# channels_last, by channels: the first tile that holds them, else the last. Pairs are channels of one window.
LAST = (Tile(16, 128, 4), Tile(32, 64, 4), Tile(64, 32, 4))
# Pairs of one step of a fold, and its warps.
FOLD = (1024, 4)


@triton.jit
def _pairs(
    channels,
    height,
    width,
    pool,
    rows,
    total,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Of this program's pairs: first element [P], channel [P], index in [N, C, P, P] [P], which exist [P]."""
    lane = tl.arange(0, PAIRS)
    first = tl.program_id(0).to(tl.int64)
    windows = pool * pool
    if CHANNELS_LAST:
        channel = tl.program_id(1) * PAIRS + lane
        sample = first // windows
        window = first % windows
        corner = (sample * height + window // pool * rows) * width + window % pool * COLUMNS
        start = corner * channels + channel
        index = (sample * channels + channel) * windows + window
        exists = channel < channels
    else:
        index = first * PAIRS + lane
        plane = index // windows
        window = index % windows
        channel = plane % channels
        start = (plane * height + window // pool * rows) * width + window % pool * COLUMNS
        exists = index < total
    return start, channel, index, exists


@triton.jit
def _elements(
    begin, channels, width, rows, COLUMNS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr
):
    """Offsets [E] from the first of a window's elements, from number `begin` on, and which exist [E]."""
    element = begin + tl.arange(0, ELEMENTS)
    offset = element // COLUMNS * width + element % COLUMNS
    if CHANNELS_LAST:
        offset = offset * channels
    return offset, element < rows * COLUMNS


@triton.jit
def _channel(mean, var, gamma, beta, channel, exists, eps):
    """mean, rstd, scale = gamma * rstd and beta of each pair."""
    rstd = 1.0 / tl.sqrt_rn(tl.load(var + channel, mask=exists, other=1.0) + eps)
    scale = tl.load(gamma + channel, mask=exists, other=0.0).to(tl.float32) * rstd
    shift = tl.load(beta + channel, mask=exists, other=0.0).to(tl.float32)
    return tl.load(mean + channel, mask=exists, other=0.0), rstd, scale, shift


@triton.jit
def _preactivation(centred, scale, shift):
    # One rounding, stated: forward and backward have to agree on the sign.
    return tl.fma(
        centred,
        tl.broadcast_to(scale[:, None], centred.shape),
        tl.broadcast_to(shift[:, None], centred.shape),
    )


@triton.jit(do_not_specialize=["pool", "rows", "total"])
def _statistics_kernel(
    x,  # [N, C, H, W] in either format
    partials,  # [2, N, C, P, P] fp32: mean less the channel's first element, sum of squares about the mean
    channels,
    height,
    width,
    pool,
    rows,
    total,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PAIRS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Mean and centred square of every pair."""
    start, channel, index, exists = _pairs(
        channels, height, width, pool, rows, total, COLUMNS, CHANNELS_LAST, PAIRS
    )
    # Far from 0 fp32 has few digits left for a mean: from here on it is a difference from some element.
    origin = x + channel.to(tl.int64) * (1 if CHANNELS_LAST else height * width)
    shift = tl.load(origin, mask=exists, other=0.0).to(tl.float32)[:, None]
    mean = tl.zeros((PAIRS,), tl.float32)
    square = tl.zeros((PAIRS,), tl.float32)
    area = rows * COLUMNS
    for begin in range(0, area, ELEMENTS):
        offset, inside = _elements(begin, channels, width, rows, COLUMNS, CHANNELS_LAST, ELEMENTS)
        mask = exists[:, None] & inside[None, :]
        value = tl.load(x + start[:, None] + offset[None, :], mask=mask, other=0.0).to(tl.float32)
        before = begin * 1.0
        here = tl.minimum(area - begin, ELEMENTS) * 1.0
        value = tl.where(mask, value - shift, 0.0)
        step = tl.sum(value, 1) / here
        centred = tl.where(mask, value - step[:, None], 0.0)
        # Chan's merge of two runs.
        apart = step - mean
        share = here / (before + here)
        mean += apart * share
        square += tl.sum(centred * centred, 1) + apart * apart * (before * share)
    tl.store(partials + index, mean, mask=exists)
    tl.store(partials + total + index, square, mask=exists)


@triton.jit(do_not_specialize=["pairs", "windows", "total", "stride", "area"])
def _fold_statistics_kernel(
    x,  # [N, C, H, W] in either format
    partials,  # [2, N, C, P, P] fp32
    mean,  # [C] fp32
    var,  # [C] fp32
    channels,
    windows,
    pairs,
    total,
    stride,  # from one channel to the next in x
    area,  # fp32
    BLOCK: tl.constexpr,
):
    """Mean and biased variance of one channel from its `pairs` pairs of `area` elements each."""
    channel = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, pairs, BLOCK):
        k = begin + lane
        index = (k // windows).to(tl.int64) * (channels * windows) + channel * windows + k % windows
        sums += tl.load(partials + index, mask=k < pairs, other=0.0)
    middle = tl.sum(sums, 0) / pairs
    sums = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, pairs, BLOCK):
        k = begin + lane
        index = (k // windows).to(tl.int64) * (channels * windows) + channel * windows + k % windows
        apart = tl.load(partials + index, mask=k < pairs, other=0.0) - middle
        square = tl.load(partials + total + index, mask=k < pairs, other=0.0)
        sums += tl.where(k < pairs, square + area * apart * apart, 0.0)
    tl.store(mean + channel, tl.load(x + channel * stride).to(tl.float32) + middle)
    tl.store(var + channel, tl.sum(sums, 0) / (pairs * area))


@triton.jit(do_not_specialize=["pool", "rows", "total", "eps"])
def _output_kernel(
    x,  # [N, C, H, W] in either format
    gamma,  # [C]
    beta,  # [C]
    mean,  # [C] fp32
    var,  # [C] fp32
    y,  # as x
    pooled,  # [N, C, P, P]
    moments,  # [2, N, C, P, P] fp32
    channels,
    height,
    width,
    pool,
    rows,
    total,
    eps,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PAIRS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """y, pooled and moments of every pair."""
    start, channel, index, exists = _pairs(
        channels, height, width, pool, rows, total, COLUMNS, CHANNELS_LAST, PAIRS
    )
    middle, rstd, scale, shift = _channel(mean, var, gamma, beta, channel, exists, eps)
    value_sum = tl.zeros((PAIRS,), tl.float32)
    count = tl.zeros((PAIRS,), tl.float32)
    moment = tl.zeros((PAIRS,), tl.float32)
    area = rows * COLUMNS
    for begin in range(0, area, ELEMENTS):
        offset, inside = _elements(begin, channels, width, rows, COLUMNS, CHANNELS_LAST, ELEMENTS)
        mask = exists[:, None] & inside[None, :]
        here = start[:, None] + offset[None, :]
        centred = tl.load(x + here, mask=mask, other=0.0).to(tl.float32) - middle[:, None]
        z = _preactivation(centred, scale, shift)
        # Not tl.maximum, which would turn a NaN into zero.
        value = tl.where(z <= 0, 0.0, z)
        tl.store(y + here, value.to(y.dtype.element_ty), mask=mask)
        silent = (z <= 0) | (mask == 0)
        value_sum += tl.sum(tl.where(mask, value, 0.0), 1)
        count += tl.sum(tl.where(silent, 0.0, 1.0), 1)
        moment += tl.sum(tl.where(silent, 0.0, centred), 1)
    tl.store(pooled + index, (value_sum / area).to(pooled.dtype.element_ty), mask=exists)
    tl.store(moments + index, count / area, mask=exists)
    tl.store(moments + total + index, moment * rstd / area, mask=exists)


@triton.jit(do_not_specialize=["pool", "rows", "total", "eps"])
def _terms_kernel(
    dy,  # as x
    dpooled,  # [N, C, P, P]
    x,  # [N, C, H, W] in either format
    gamma,  # [C]
    beta,  # [C]
    mean,  # [C] fp32
    var,  # [C] fp32
    terms,  # [2, N, C, P, P] fp32: sums of g and of g * xhat
    channels,
    height,
    width,
    pool,
    rows,
    total,
    eps,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PAIRS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """What every pair adds to dbeta and dgamma, where y has a gradient of its own."""
    start, channel, index, exists = _pairs(
        channels, height, width, pool, rows, total, COLUMNS, CHANNELS_LAST, PAIRS
    )
    middle, rstd, scale, shift = _channel(mean, var, gamma, beta, channel, exists, eps)
    area = rows * COLUMNS
    spread = tl.load(dpooled + index, mask=exists, other=0.0).to(tl.float32) / area
    total_g = tl.zeros((PAIRS,), tl.float32)
    moment = tl.zeros((PAIRS,), tl.float32)
    for begin in range(0, area, ELEMENTS):
        offset, inside = _elements(begin, channels, width, rows, COLUMNS, CHANNELS_LAST, ELEMENTS)
        mask = exists[:, None] & inside[None, :]
        here = start[:, None] + offset[None, :]
        centred = tl.load(x + here, mask=mask, other=0.0).to(tl.float32) - middle[:, None]
        g = tl.load(dy + here, mask=mask, other=0.0).to(tl.float32) + spread[:, None]
        silent = (_preactivation(centred, scale, shift) <= 0) | (mask == 0)
        total_g += tl.sum(tl.where(silent, 0.0, g), 1)
        moment += tl.sum(tl.where(silent, 0.0, g * centred), 1)
    tl.store(terms + index, total_g, mask=exists)
    tl.store(terms + total + index, moment * rstd, mask=exists)


@triton.jit(do_not_specialize=["pairs", "windows", "total"])
def _fold_gradients_kernel(
    terms,  # [2, N, C, P, P] fp32: moments, or the sums of _terms_kernel
    dpooled,  # [N, C, P, P], unread with SUMMED
    dgamma,  # [C] fp32
    dbeta,  # [C] fp32
    channels,
    windows,
    pairs,
    total,
    SUMMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgamma and dbeta of one channel from its `pairs` pairs."""
    channel = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, pairs, BLOCK):
        k = begin + lane
        index = (k // windows).to(tl.int64) * (channels * windows) + channel * windows + k % windows
        sum_here = tl.load(terms + index, mask=k < pairs, other=0.0)
        moment_here = tl.load(terms + total + index, mask=k < pairs, other=0.0)
        if not SUMMED:
            factor = tl.load(dpooled + index, mask=k < pairs, other=0.0).to(tl.float32)
            sum_here = factor * sum_here
            moment_here = factor * moment_here
        sums += sum_here
        moments += moment_here
    tl.store(dbeta + channel, tl.sum(sums, 0))
    tl.store(dgamma + channel, tl.sum(moments, 0))


@triton.jit(do_not_specialize=["pool", "rows", "total", "eps", "count"])
def _dx_kernel(
    dy,  # as x, unread without HAS_DY
    dpooled,  # [N, C, P, P]
    x,  # [N, C, H, W] in either format
    gamma,  # [C]
    beta,  # [C]
    mean,  # [C] fp32
    var,  # [C] fp32
    dgamma,  # [C] fp32, unread without BATCH
    dbeta,  # [C] fp32, likewise
    dx,  # as x
    channels,
    height,
    width,
    pool,
    rows,
    total,
    eps,
    count,  # N H W, fp32
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_DY: tl.constexpr,
    BATCH: tl.constexpr,
    PAIRS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """dx of every pair."""
    start, channel, index, exists = _pairs(
        channels, height, width, pool, rows, total, COLUMNS, CHANNELS_LAST, PAIRS
    )
    middle, rstd, scale, shift = _channel(mean, var, gamma, beta, channel, exists, eps)
    area = rows * COLUMNS
    spread = tl.load(dpooled + index, mask=exists, other=0.0).to(tl.float32) / area
    if BATCH:
        share = scale / count
        slope = -share * rstd * tl.load(dgamma + channel, mask=exists, other=0.0)
        level = -share * tl.load(dbeta + channel, mask=exists, other=0.0)
    for begin in range(0, area, ELEMENTS):
        offset, inside = _elements(begin, channels, width, rows, COLUMNS, CHANNELS_LAST, ELEMENTS)
        mask = exists[:, None] & inside[None, :]
        here = start[:, None] + offset[None, :]
        centred = tl.load(x + here, mask=mask, other=0.0).to(tl.float32) - middle[:, None]
        g = tl.broadcast_to(spread[:, None], centred.shape)
        if HAS_DY:
            g += tl.load(dy + here, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(_preactivation(centred, scale, shift) <= 0, 0.0, g * scale[:, None])
        if BATCH:
            g += centred * slope[:, None] + level[:, None]
        tl.store(dx + here, g.to(dx.dtype.element_ty), mask=mask)


def tile_of(area: int, channels: int, channels_last: bool) -> Tile:
    """Tile for windows of `area` elements."""
    if channels_last:
        tile = next((tile for tile in LAST if channels <= tile.pairs), LAST[-1])
        return tile._replace(elements=min(tile.elements, triton.next_power_of_2(area)))
    return next((tile for tile in FIRST if area <= tile.elements), FIRST[-1])


def _as_on_a_device(entry: Callable[P, None]) -> Callable[P, None]:
    """NaN and Inf are data to a kernel; numpy, under the interpreter, would warn of them."""
    return np.errstate(all="ignore")(entry) if INTERPRETED else entry


class _Launch:
    """Grid, sizes and options of the kernels over pairs, and of the folds."""

    def __init__(self, x: Tensor, pool: int, channels_last: bool) -> None:
        samples, channels, height, width = x.shape
        if channels * height * width >= MAX_SAMPLE:
            raise ValueError(
                f"a sample may have up to {MAX_SAMPLE - 1} elements, got {list(x.shape)}; choose another backend"
            )
        rows, columns = height // pool, width // pool
        tile = tile_of(rows * columns, channels, channels_last)
        self.windows = pool * pool
        self.pairs = samples * self.windows
        self.total = self.pairs * channels
        self.area = rows * columns
        self.channels = channels
        self.sizes = (channels, height, width, pool, rows, self.total)
        self.grid = (
            (self.pairs, triton.cdiv(channels, tile.pairs))
            if channels_last
            else (triton.cdiv(self.total, tile.pairs),)
        )
        self.options = {
            "COLUMNS": columns,
            "CHANNELS_LAST": channels_last,
            "PAIRS": tile.pairs,
            "ELEMENTS": tile.elements,
            "num_warps": tile.warps,
            "num_stages": 2,
            "enable_fp_fusion": True,
        }
        self.fold_sizes = (channels, self.windows, self.pairs, self.total)
        self.fold_options = {
            "BLOCK": FOLD[0],
            "num_warps": FOLD[1],
            "num_stages": 2,
            "enable_fp_fusion": True,
        }


@_as_on_a_device
def bn_relu_pool(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    given: bool,
    eps: float,
    y: Tensor,
    pooled: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    *,
    channels_last: bool,
) -> None:
    """Write y, pooled and moments, and unless they are given the mean and variance of the batch.

    The current device is x's. Nothing waits for the device; torch workspace only.

    Args:
        x: [N, C, H, W] fp32, fp16 or bf16, N at least 1, dense in memory as [N, H, W, C] with
            channels_last, else as its shape.
        gamma, beta: [C], dense.
        given: whether mean and var are read rather than written.
        eps: added to the variance.
        y: like x, written.
        pooled: [N, C, P, P] in x's dtype, written.
        mean, var: [C] fp32.
        moments: [2, N, C, P, P] fp32, written.

    Raises:
        ValueError: a sample of 2^31 elements or more.
    """
    launch = _Launch(x, pooled.shape[2], channels_last)
    if not given:
        # The space of moments, which the last kernel writes, serves the first two.
        _statistics_kernel[launch.grid](x, moments, *launch.sizes, **launch.options)
        _fold_statistics_kernel[(launch.channels,)](
            x,
            moments,
            mean,
            var,
            *launch.fold_sizes,
            1 if channels_last else x.shape[2] * x.shape[3],
            float(launch.area),
            **launch.fold_options,
        )
    _output_kernel[launch.grid](
        x, gamma, beta, mean, var, y, pooled, moments, *launch.sizes, eps, **launch.options
    )


@_as_on_a_device
def bn_relu_pool_backward(
    dy: Tensor | None,
    dpooled: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    batch_statistics: bool,
    eps: float,
    dx: Tensor,
    dgamma: Tensor,
    dbeta: Tensor,
    *,
    channels_last: bool,
) -> None:
    """Write dx, dgamma and dbeta.

    Args:
        dy: like x, or None.
        dpooled: [N, C, P, P] in x's dtype, dense.
        x, gamma, beta, mean, var, moments, eps: as in `bn_relu_pool`, moments as it wrote them.
        batch_statistics: whether mean and var came from x.
        dx: like x, written.
        dgamma, dbeta: [C] fp32, written.

    Raises:
        ValueError: a sample of 2^31 elements or more.
    """
    launch = _Launch(x, dpooled.shape[2], channels_last)
    terms = moments
    if dy is not None:
        terms = torch.empty_like(moments)
        _terms_kernel[launch.grid](
            dy, dpooled, x, gamma, beta, mean, var, terms, *launch.sizes, eps, **launch.options
        )
    _fold_gradients_kernel[(launch.channels,)](
        terms, dpooled, dgamma, dbeta, *launch.fold_sizes, SUMMED=dy is not None, **launch.fold_options
    )
    _dx_kernel[launch.grid](
        x if dy is None else dy,
        dpooled,
        x,
        gamma,
        beta,
        mean,
        var,
        dgamma,
        dbeta,
        dx,
        *launch.sizes,
        eps,
        float(launch.pairs * launch.area),
        HAS_DY=dy is not None,
        BATCH=batch_statistics,
        **launch.options,
    )
