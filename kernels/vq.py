"""vq_encode in Triton: the nearest word of every vector by products of matrices, for vectors of 16 to 256 columns.

    score(n, g, k) = |c_gk|^2 / 2 - x_ng . c_gk
    code(n, g)     = argmin_k score                   ties to the lowest k
    error(n, g)    = |x_ng - c_g,code|^2              in fp32, from differences
    counts_gk, sums_gk: how many x_ng have code k, and their sum

Rows go through in waves of whole chunks of CHUNK rows, so that the workspace has a size that N does not change.
The kernels of a wave, in order:

* `_search_kernel`: a block of rows of one group against all words, tile by tile, with a running minimum; then
  the errors. `_words_kernel` has prepared the words, once a call.
* `_pack_kernel`: the codes as one stream of bits.
* `_bucket_kernel`: of every chunk, the rows of each run of words, in their order.
* `_sums_kernel`: a chunk's sums over one such run, as products of one-hot matrices with the rows listed for it.
* `_error_kernel` and `_race_kernel`: a chunk's error, and the winner of every candidate slot in it.
* `_fold_kernel` and `_candidates_kernel`: chunks are added up, one after the other; the best candidate stays.

Nothing is added atomically, and a chunk's numbers depend on its rows alone: the bits are the same on every run,
and those of chunks encoded by themselves and added up.

The arithmetic of the search. fp32 x is multiplied in fp32 ("ieee", never tf32). fp16 and bf16 x go to the tensor
cores as fp16: fp16 as it is, bf16 times a power of two that brings the row's largest element to [2^14, 2^15), which
loses nothing but what is 2^-39 of that element. A word is brought to the same range and split into two fp16
numbers, high + low, which leaves 2^-22 of each of its elements, or 2^-39 of its largest. Products of fp16 are exact
in fp32, sums are fp32, so a score is off by 2^-22 |x| |c| beside what any sum in fp32 loses.
"""

# Kernel parameters have their types from the launch.
# mypy: disable-error-code="no-untyped-def"

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

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

# Below 16 columns a product of matrices is mostly padding; above 256 a row block no longer fits.
MIN_DEPTH, MAX_DEPTH = 16, 256
# Codes are int16 on the way, groups a dimension of grids.
MAX_CODEWORDS, MAX_GROUPS = 4096, 65535
# Rows whose sums start from zero: the contract's.
CHUNK = 4096


class Tile(NamedTuple):
    """Blocks of one launch: the depth they hold, rows and words a step, warps a program, stages of its loads."""

    depth: int
    rows: int
    words: int
    warps: int
    stages: int


# By capability and by bytes an element of x; the first tile that holds the depth is taken. Two programs of the
# larger tiles share a multiprocessor of sm_90, so that one's minimum runs beside the other's products.
SEARCH = {
    80: {
        2: (Tile(32, 128, 64, 4, 3), Tile(128, 64, 64, 4, 2), Tile(256, 64, 32, 4, 2)),
        4: (Tile(256, 64, 32, 8, 2),),
    },
    90: {
        2: (Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 4, 2), Tile(256, 128, 64, 8, 2)),
        4: (Tile(256, 64, 64, 8, 2),),
    },
    100: {
        2: (Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 4, 2), Tile(256, 128, 64, 8, 2)),
        4: (Tile(256, 64, 64, 8, 2),),
    },
}
# sm_120 has neither the shared memory nor the instructions of sm_90 and sm_100.
SEARCH[120] = SEARCH[80]
# Columns of one step of an fp32 product, and of the errors.
SLICE = 32
# The sums, by bytes an element of x: `words` is a run, `depth` the columns of one program (the last tile's for
# any more). One table for every capability.
SUMS = {
    2: (Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 8, 2)),
    4: (Tile(64, 32, 32, 4, 2), Tile(128, 32, 32, 8, 2)),
}
# Elements of one program of the fold; chunks whose loads are in flight together.
FOLD = (256, 16)
# Codes of one program of the packing: whole bytes for any number of bits.
PACKED = 512
# [rows, slots] of one step of the race, slots at the most.
RACE = (1024, 64)
# Chunks times groups of a wave, and bytes of partial sums in it; but at least WAVE_LEAST chunks.
WAVE, WAVE_BYTES, WAVE_LEAST = 1024, 64 * 2**20, 8


@triton.jit
def _lift(largest):
    """The power of two that brings `largest` to [2^14, 2^15), and its inverse; both at most 2^100."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 41)
    power = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return power, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["codewords"])
def _words_kernel(
    codebook,  # [groups, codewords, depth] fp32
    words,  # [groups, padded, BLOCK_DEPTH] fp32, or with SPLIT [2, groups, padded, BLOCK_DEPTH] fp16: high, low
    half_norm,  # [groups, padded] fp32
    unlift,  # [groups, padded] fp32: what a product with high + low is to be multiplied by
    codewords,
    depth,
    padded,
    SPLIT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """BLOCK_WORDS words, made ready. One that is not finite, and padding, gets zeros and a half norm of Inf."""
    group = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    d = tl.arange(0, BLOCK_DEPTH)
    exists = k < codewords
    c = tl.load(
        codebook + (group * codewords + k)[:, None] * depth + d[None, :],
        mask=exists[:, None] & (d < depth)[None, :],
        other=0.0,
    )
    half = tl.sum(c * c, 1) * 0.5
    usable = (half < float("inf")) & exists
    c = tl.where(usable[:, None], c, 0.0)
    index = group * padded + k
    inverse = tl.full((BLOCK_WORDS,), 1.0, tl.float32)
    out = words + index[:, None] * BLOCK_DEPTH + d[None, :]
    if SPLIT:
        power, inverse = _lift(tl.max(tl.abs(c), 1))
        c *= power[:, None]
        high = c.to(tl.float16)
        low = (c - high.to(tl.float32)).to(tl.float16)
        tl.store(out, high)
        tl.store(out + tl.num_programs(1).to(tl.int64) * padded * BLOCK_DEPTH, low)
    else:
        tl.store(out, c)
    tl.store(half_norm + index, tl.where(usable, half, float("inf")))
    tl.store(unlift + index, inverse)


@triton.jit(do_not_specialize=["rows", "groups", "codewords"])
def _search_kernel(
    x,  # [rows, groups * depth]
    codebook,  # [groups, codewords, depth] fp32
    words,  # as _words_kernel wrote them
    half_norm,  # [groups, padded] fp32
    unlift,  # [groups, padded] fp32
    codes,  # [groups, rows] int16: -1 where the error is not finite
    errors,  # [groups, rows] fp32: NaN likewise
    rows,
    groups,
    codewords,
    depth,
    padded,
    SPLIT: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Codes and errors of one group of BLOCK_ROWS rows."""
    group = tl.program_id(0) % groups
    first = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WORDS)
    live = row < rows - first
    pitch = groups.to(tl.int64) * depth
    x_rows = x + first * pitch + group * depth + row.to(tl.int64)[:, None] * pitch
    word = group.to(tl.int64) * padded
    part = groups.to(tl.int64) * padded * BLOCK_DEPTH

    if SPLIT:
        d = tl.arange(0, BLOCK_DEPTH)
        a = tl.load(x_rows + d[None, :], mask=live[:, None] & (d < depth)[None, :], other=0.0)
        if LIFT:
            wide = a.to(tl.float32)
            power, inverse = _lift(tl.max(tl.abs(wide), 1))
            a = (wide * power[:, None]).to(tl.float16)

    best = tl.full((BLOCK_ROWS,), float("inf"), tl.float32)
    code = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start in range(0, padded, BLOCK_WORDS):
        if SPLIT:
            tile = words + (word + start + column)[:, None] * BLOCK_DEPTH + d[None, :]
            # The small terms first: the sum keeps more of them.
            product = tl.dot(a, tl.trans(tl.load(tile + part)))
            product = tl.dot(a, tl.trans(tl.load(tile)), product)
            product = product * tl.load(unlift + word + start + column)[None, :]
            if LIFT:
                product = product * inverse[:, None]
        else:
            product = tl.zeros((BLOCK_ROWS, BLOCK_WORDS), tl.float32)
            for begin in range(0, BLOCK_DEPTH, SLICE):
                e = begin + tl.arange(0, SLICE)
                a = tl.load(x_rows + e[None, :], mask=live[:, None] & (e < depth)[None, :], other=0.0)
                tile = words + (word + start + column)[:, None] * BLOCK_DEPTH + e[None, :]
                product = tl.dot(a, tl.trans(tl.load(tile)), product, input_precision="ieee")
        score = tl.load(half_norm + word + start + column)[None, :] - product
        least = tl.min(score, 1)
        where = tl.min(tl.where(score == least[:, None], column[None, :], BLOCK_WORDS), 1)
        # Strictly: ties stay with the lower index, and a NaN takes nothing.
        better = least < best
        best = tl.where(better, least, best)
        code = tl.where(better, start + where, code)

    error = tl.zeros((BLOCK_ROWS,), tl.float32)
    nearest = codebook + (group.to(tl.int64) * codewords + code)[:, None] * depth
    for begin in range(0, BLOCK_DEPTH, SLICE):
        e = begin + tl.arange(0, SLICE)
        mask = live[:, None] & (e < depth)[None, :]
        apart = tl.load(x_rows + e[None, :], mask=mask, other=0.0).to(tl.float32)
        apart -= tl.load(nearest + e[None, :], mask=mask, other=0.0)
        error += tl.sum(apart * apart, 1)
    finite = error < float("inf")
    here = group.to(tl.int64) * rows + first + row
    tl.store(codes + here, tl.where(finite, code, -1).to(tl.int16), mask=live)
    tl.store(errors + here, tl.where(finite, error, float("nan")), mask=live)


@triton.jit(do_not_specialize=["rows", "groups"])
def _pack_kernel(
    codes,  # [groups, rows] int16
    stream,  # [ceil(rows * groups * BITS / 8)] uint8
    rows,
    groups,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """BLOCK codes, a multiple of 8, in BLOCK * BITS / 8 whole bytes; BLOCK_BYTES is no less."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    first_row = first // groups
    beside = (first % groups).to(tl.int32)
    count = tl.minimum(rows * groups.to(tl.int64) - first, BLOCK).to(tl.int32)
    byte = tl.arange(0, BLOCK_BYTES)
    value = tl.zeros((BLOCK_BYTES,), tl.int32)
    for bit in tl.static_range(8):
        position = byte * 8 + bit
        number = position // BITS
        index = beside + number
        here = (index % groups).to(tl.int64) * rows + first_row + index // groups
        code = tl.load(codes + here, mask=number < count, other=0).to(tl.int32)
        value += ((tl.maximum(code, 0) >> (position % BITS)) & 1) << bit
    out = stream + tl.program_id(0).to(tl.int64) * (BLOCK * BITS // 8)
    tl.store(out + byte, value.to(tl.uint8), mask=byte < (count * BITS + 7) // 8)


@triton.jit(do_not_specialize=["rows", "runs"])
def _bucket_kernel(
    codes,  # [groups, rows] int16
    order,  # [groups, rows] int32: by chunk and run of words, (code in the run) * CHUNK + row in the chunk
    starts,  # [chunks, groups, runs + 1] int32: where in the chunk's part of `order` each run starts
    rows,
    runs,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The rows of one group of a chunk by the run of WORDS words that their codes are in, else in order."""
    chunk, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, CHUNK)
    base = group * rows + chunk * CHUNK
    code = tl.load(codes + base + row, mask=row < rows - chunk * CHUNK, other=-1).to(tl.int32)
    bounds = starts + (chunk * tl.num_programs(1) + group) * (runs + 1)
    start = 0
    for run in range(runs):
        here = (code >= run * WORDS) & (code < run * WORDS + WORDS)
        one = here.to(tl.int32)
        place = start + tl.cumsum(one, 0) - 1
        tl.store(order + base + place, (code - run * WORDS) * CHUNK + row, mask=here)
        tl.store(bounds + run, start)
        start += tl.sum(one, 0)
    tl.store(bounds + runs, start)


@triton.jit(do_not_specialize=["groups", "codewords", "runs"])
def _sums_kernel(
    x,  # [rows, groups * depth]
    order,  # [groups, rows] int32, of _bucket_kernel
    starts,  # [chunks, groups, runs + 1] int32
    sums,  # [chunks, groups, codewords, depth] fp32
    counts,  # [chunks, groups, codewords] int32
    rows,
    groups,
    codewords,
    depth,
    runs,
    DOT: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Sums and counts of one run of words in one group of a chunk, BLOCK_DEPTH columns."""
    place = tl.program_id(0).to(tl.int64)
    chunk, group = place // groups, place % groups
    run = tl.program_id(1)
    d = tl.program_id(2) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    in_depth = (d < depth)[None, :]
    word = tl.arange(0, WORDS)
    lane = tl.arange(0, BLOCK_ROWS)
    pitch = groups.to(tl.int64) * depth
    x_chunk = x + chunk * CHUNK * pitch + group * depth + d[None, :]
    listed = order + group * rows + chunk * CHUNK
    begin = tl.load(starts + place * (runs + 1) + run)
    end = tl.load(starts + place * (runs + 1) + run + 1)

    total = tl.zeros((WORDS, BLOCK_DEPTH), tl.float32)
    count = tl.zeros((WORDS,), tl.int32)
    for at in range(begin, end, BLOCK_ROWS):
        inside = at + lane < end
        key = tl.load(listed + at + lane, mask=inside, other=0)
        row = (key % CHUNK).to(tl.int64)
        value = tl.load(x_chunk + row[:, None] * pitch, mask=inside[:, None] & in_depth, other=0.0)
        value = value.to(DOT)
        chosen = (word[:, None] == (key // CHUNK)[None, :]) & inside[None, :]
        # Minus, twice: a sum with plus would be made inside the tensor cores, which round towards zero.
        minus = tl.where(chosen, -1.0, 0.0).to(DOT)
        total -= tl.dot(minus, value, input_precision="ieee")
        count += tl.sum(chosen.to(tl.int32), 1)
    k = run * WORDS + word
    here = place * codewords + k
    tl.store(sums + here[:, None] * depth + d[None, :], total, mask=(k < codewords)[:, None] & in_depth)
    if tl.program_id(2) == 0:
        tl.store(counts + here, count, mask=k < codewords)


@triton.jit(do_not_specialize=["rows", "groups"])
def _error_kernel(
    errors,  # [groups, rows] fp32
    chunk_errors,  # [chunks] fp32
    flag,  # [] uint8, 0 beforehand
    rows,
    groups,
    CHUNK: tl.constexpr,
):
    """One chunk's error over all groups; the flag where there is a NaN."""
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, CHUNK)
    live = row < rows - chunk * CHUNK
    here = errors + chunk * CHUNK + row
    total = tl.zeros((CHUNK,), tl.float32)
    bad = tl.zeros((CHUNK,), tl.int32)
    for _ in range(groups):
        error = tl.load(here, mask=live, other=0.0)
        bad |= (error != error).to(tl.int32)
        total += tl.where(error == error, error, 0.0)
        here += rows
    tl.store(chunk_errors + chunk, tl.sum(total, 0))
    # Whoever writes, writes the same.
    tl.store(flag, 1, mask=tl.max(bad, 0) > 0)


@triton.jit(do_not_specialize=["chunks", "size"])
def _fold_kernel(
    parts,  # [chunks, size] fp32 or int32
    total,  # [size] fp32 or int64
    chunks,
    size,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """total += the chunks' parts, one chunk after the other."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    value = tl.load(total + element, mask=inside, other=0)
    for start in range(0, chunks, TOGETHER):
        # Unrolled, so that the loads do not wait for each other. A chunk past the last adds 0.
        for step in tl.static_range(TOGETHER):
            chunk = start + step
            here = parts + tl.cast(chunk, tl.int64) * size + element
            value += tl.load(here, mask=element < tl.where(chunk < chunks, size, 0), other=0)
    tl.store(total + element, value, mask=inside)


@triton.jit(do_not_specialize=["rows", "slots"])
def _race_kernel(
    errors,  # [groups, rows] fp32
    scores,  # [chunks, groups, slots] fp32
    winners,  # [chunks, groups, slots] int32: a row of the wave
    rows,
    slots,
    CHUNK: tl.constexpr,
    BLOCK_TURNS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """The row with the largest score, ties to the first, of BLOCK_SLOTS slots in one group of a chunk."""
    chunk, group = tl.program_id(0), tl.program_id(1)
    slot = tl.program_id(2) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    count = tl.minimum(rows - chunk * CHUNK, CHUNK)
    base = errors + tl.cast(group, tl.int64) * rows + chunk * CHUNK
    best = tl.zeros((BLOCK_SLOTS,), tl.float32)
    winner = tl.zeros((BLOCK_SLOTS,), tl.int32)
    for start in range(0, tl.cdiv(count, slots), BLOCK_TURNS):
        turn = start + tl.arange(0, BLOCK_TURNS)
        place = turn[:, None] * slots + slot[None, :]
        mask = (slot < slots)[None, :] & (place < count)
        error = tl.load(base + place, mask=mask, other=0.0)
        error = tl.where(error == error, error, 0.0)
        # The finalizer of MurmurHash3, as in the reference.
        h = error.to(tl.uint32, bitcast=True) ^ (place.to(tl.uint32) * 0x9E3779B1)
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        h = h ^ (h >> 16)
        score = tl.div_rn(error, ((h >> 8) | 1).to(tl.float32))
        largest = tl.max(score, 0)
        at = tl.min(tl.where(score == largest[None, :], place, CHUNK), 0)
        better = largest > best
        best = tl.where(better, largest, best)
        winner = tl.where(better, chunk * CHUNK + at, winner)
    here = (chunk * tl.num_programs(1) + group).to(tl.int64) * slots + slot
    tl.store(scores + here, best, mask=slot < slots)
    tl.store(winners + here, winner, mask=slot < slots)


@triton.jit(do_not_specialize=["chunks", "groups", "slots"])
def _candidates_kernel(
    x,  # [rows, groups * depth]
    scores,  # [chunks, groups, slots] fp32
    winners,  # [chunks, groups, slots] int32
    candidates,  # [groups, slots, depth] fp32
    candidate_scores,  # [groups, slots] fp32
    chunks,
    groups,
    slots,
    depth,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One slot of one group: the best of the wave's chunks, ties to the first, where it beats what is there."""
    index = tl.program_id(0).to(tl.int64)
    size = groups.to(tl.int64) * slots
    before = tl.load(candidate_scores + index)
    best = before
    winner = 0
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        score = tl.load(scores + chunk * size + index, mask=chunk < chunks, other=0.0)
        largest = tl.max(score, 0)
        at = tl.min(tl.where(score == largest, chunk, chunks), 0)
        better = largest > best
        best = tl.where(better, largest, best)
        winner = tl.where(better, at, winner)
    taken = best > before
    row = tl.load(winners + winner * size + index, mask=taken, other=0).to(tl.int64)
    d = tl.arange(0, BLOCK_DEPTH)
    mask = d < tl.where(taken, depth, 0)
    vector = tl.load(x + row * groups * depth + index // slots * depth + d, mask=mask, other=0.0)
    tl.store(candidates + index * depth + d, vector.to(tl.float32), mask=mask)
    tl.store(candidate_scores + index, best, mask=taken)


def why_not(x: Tensor, codebook: Tensor) -> str:
    """Why these tensors are beyond the kernels, or "" when they are not."""
    groups, codewords, depth = codebook.shape
    if x.dtype not in DOT_TYPES:
        return f"the triton kernels take float32, float16 or bfloat16; x is {x.dtype}"
    if not MIN_DEPTH <= depth <= MAX_DEPTH:
        return f"the triton kernels take vectors of {MIN_DEPTH} to {MAX_DEPTH} columns; codebook has {depth}"
    if codewords > MAX_CODEWORDS:
        return f"the triton kernels take up to {MAX_CODEWORDS} words a group; codebook has {codewords}"
    if groups > MAX_GROUPS:
        return f"the triton kernels take up to {MAX_GROUPS} groups; codebook has {groups}"
    if x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 0):
            return f"the triton kernels need compute capability 8.0 or later; {x.device} has {capability}"
    elif not INTERPRETED:
        return f"the triton kernels need CUDA tensors, or TRITON_INTERPRET=1 at import; x is on {x.device}"
    return ""


def search_tile(depth: int, codewords: int, element_size: int, capability: int) -> Tile:
    """Tile of the search: the table's, with no more words a step than there are."""
    # Rows that do not start on 16 bytes are loaded in small pieces, whose addresses fit the smallest blocks only.
    family = max(each for each in SEARCH if each <= capability) if depth % 16 == 0 else 80
    table = SEARCH[family][element_size]
    tile = next(tile for tile in table if depth <= tile.depth)
    return tile._replace(words=min(tile.words, max(16, triton.next_power_of_2(codewords))))


def sums_tile(depth: int, element_size: int) -> Tile:
    """Tile of the sums, no deeper than the vectors."""
    table = SUMS[element_size]
    tile = next((tile for tile in table if depth <= tile.depth), table[-1])
    return tile._replace(depth=min(tile.depth, triton.next_power_of_2(depth)))


def wave_chunks(chunks: int, groups: int, codewords: int, depth: int) -> int:
    """Chunks of a wave, of `chunks` in all: enough to fill a device, few enough for a bounded workspace."""
    by_sums = WAVE_BYTES // (4 * groups * codewords * depth)
    return min(chunks, max(WAVE_LEAST, min(WAVE // groups, by_sums)))


def _as_on_a_device(entry: Callable[P, None]) -> Callable[P, None]:
    """NaN and Inf are data to a kernel; numpy, under the interpreter, would warn of them."""
    if not INTERPRETED:
        return entry

    @functools.wraps(entry)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> None:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            entry(*args, **kwargs)

    return quiet


def _launch(warps: int, stages: int = 1) -> dict[str, Any]:
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


class _Encoder:
    """Shapes, prepared words and the workspace of one call."""

    def __init__(self, x: Tensor, codebook: Tensor, slots: int) -> None:
        self.codebook, self.slots = codebook, slots
        self.groups, self.codewords, self.depth = codebook.shape
        self.size = x.element_size()
        major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
        self.search_tile = search_tile(self.depth, self.codewords, self.size, 10 * major + minor)
        self.block_depth = triton.next_power_of_2(self.depth)
        self.sums_tile = sums_tile(self.depth, self.size)
        self.runs = triton.cdiv(self.codewords, self.sums_tile.words)
        self.chunks = wave_chunks(triton.cdiv(x.shape[0], CHUNK), *codebook.shape)
        rows = min(x.shape[0], self.chunks * CHUNK)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        groups, chunks, codewords = self.groups, self.chunks, self.codewords
        self.codes = empty(groups, rows, dtype=torch.int16)
        self.errors = empty(groups, rows, dtype=torch.float32)
        self.order = empty(groups, rows, dtype=torch.int32)
        self.starts = empty(chunks, groups, self.runs + 1, dtype=torch.int32)
        self.sums = empty(chunks, groups, codewords, self.depth, dtype=torch.float32)
        self.counts = empty(chunks, groups, codewords, dtype=torch.int32)
        self.chunk_errors = empty(chunks, dtype=torch.float32)
        self.scores = empty(chunks, groups, slots, dtype=torch.float32)
        self.winners = empty(chunks, groups, slots, dtype=torch.int32)
        self.split = self.size == 2
        self.padded = triton.cdiv(codewords, self.search_tile.words) * self.search_tile.words
        parts, kind = (2, torch.float16) if self.split else (1, torch.float32)
        self.words = empty(parts, groups, self.padded, self.block_depth, dtype=kind)
        self.half_norm = empty(groups, self.padded, dtype=torch.float32)
        self.unlift = empty(groups, self.padded, dtype=torch.float32)

    def prepare(self) -> None:
        # Padded to whole tiles, whose words are a multiple of 16.
        _words_kernel[(self.padded // 16, self.groups)](
            self.codebook,
            self.words,
            self.half_norm,
            self.unlift,
            self.codewords,
            self.depth,
            self.padded,
            SPLIT=self.split,
            BLOCK_WORDS=16,
            BLOCK_DEPTH=self.block_depth,
            **_launch(4),
        )

    def search(self, x: Tensor) -> None:
        tile = self.search_tile
        _search_kernel[(triton.cdiv(x.shape[0], tile.rows) * self.groups,)](
            x,
            self.codebook,
            self.words,
            self.half_norm,
            self.unlift,
            self.codes,
            self.errors,
            x.shape[0],
            self.groups,
            self.codewords,
            self.depth,
            self.padded,
            SPLIT=self.split,
            LIFT=x.dtype == torch.bfloat16,
            BLOCK_DEPTH=self.block_depth,
            BLOCK_ROWS=tile.rows,
            BLOCK_WORDS=tile.words,
            SLICE=min(SLICE, self.block_depth),
            **_launch(tile.warps, tile.stages),
        )

    def pack(self, rows: int, stream: Tensor) -> None:
        bits = (self.codewords - 1).bit_length()
        _pack_kernel[(triton.cdiv(rows * self.groups, PACKED),)](
            self.codes,
            stream,
            rows,
            self.groups,
            BITS=bits,
            BLOCK=PACKED,
            BLOCK_BYTES=triton.next_power_of_2(PACKED * bits // 8),
            **_launch(4),
        )

    def sum(self, x: Tensor, sums: Tensor, counts: Tensor) -> None:
        rows, chunks = x.shape[0], triton.cdiv(x.shape[0], CHUNK)
        tile = self.sums_tile
        _bucket_kernel[(chunks, self.groups)](
            self.codes, self.order, self.starts, rows, self.runs, WORDS=tile.words, CHUNK=CHUNK, **_launch(8)
        )
        # The interpreter has no bf16 arithmetic: there the operands are left in fp32.
        dot = torch.float32 if INTERPRETED and x.dtype == torch.bfloat16 else x.dtype
        _sums_kernel[(chunks * self.groups, self.runs, self.block_depth // tile.depth)](
            x,
            self.order,
            self.starts,
            self.sums,
            self.counts,
            rows,
            self.groups,
            self.codewords,
            self.depth,
            self.runs,
            DOT=DOT_TYPES[dot],
            WORDS=tile.words,
            CHUNK=CHUNK,
            BLOCK_ROWS=tile.rows,
            BLOCK_DEPTH=tile.depth,
            **_launch(tile.warps, tile.stages),
        )
        _fold(self.sums, sums, chunks)
        _fold(self.counts, counts, chunks)

    def add_errors(self, rows: int, squared_error: Tensor, flag: Tensor) -> None:
        chunks = triton.cdiv(rows, CHUNK)
        _error_kernel[(chunks,)](
            self.errors, self.chunk_errors, flag, rows, self.groups, CHUNK=CHUNK, **_launch(8)
        )
        _fold(self.chunk_errors, squared_error, chunks)

    def race(self, x: Tensor, candidates: Tensor, candidate_scores: Tensor) -> None:
        rows, chunks = x.shape[0], triton.cdiv(x.shape[0], CHUNK)
        elements, most = RACE
        slots = min(most, triton.next_power_of_2(self.slots))
        _race_kernel[(chunks, self.groups, triton.cdiv(self.slots, slots))](
            self.errors,
            self.scores,
            self.winners,
            rows,
            self.slots,
            CHUNK=CHUNK,
            BLOCK_TURNS=elements // slots,
            BLOCK_SLOTS=slots,
            **_launch(4),
        )
        _candidates_kernel[(self.groups * self.slots,)](
            x,
            self.scores,
            self.winners,
            candidates,
            candidate_scores,
            chunks,
            self.groups,
            self.slots,
            self.depth,
            BLOCK=256,
            BLOCK_DEPTH=self.block_depth,
            **_launch(1),
        )


def _fold(parts: Tensor, total: Tensor, chunks: int) -> None:
    block, together = FOLD
    size = total.numel()
    _fold_kernel[(triton.cdiv(size, block),)](
        parts, total, chunks, size, BLOCK=block, TOGETHER=together, **_launch(4)
    )


@_as_on_a_device
def vq_encode(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    counts: Tensor,
    sums: Tensor,
    squared_error: Tensor,
    candidates: Tensor,
    candidate_scores: Tensor,
    flag: Tensor,
) -> None:
    """Write the encoding of x into the given tensors; allocates torch workspace only.

    The current device is x's. Nothing waits for the device.

    Args:
        x: [N, G * D] fp32, fp16 or bf16, N at least 1, dense row-major like every other tensor.
        codebook: [G, K, D] fp32, D from MIN_DEPTH to MAX_DEPTH, K up to MAX_CODEWORDS.
        codes: [ceil(N G b / 8)] uint8, written.
        counts: [G, K] int64, written.
        sums: [G, K, D] fp32, written.
        squared_error: [] fp32, written.
        candidates: [G, R, D] fp32, written.
        candidate_scores: [G, R] fp32, written.
        flag: [] bool, written.

    Raises:
        ValueError: shapes, dtypes or a device beyond the kernels, in the words of `why_not`.
    """
    reason = why_not(x, codebook)
    if reason:
        raise ValueError(f"{reason}; choose another backend")
    for each in (counts, sums, squared_error, candidate_scores, flag):
        each.zero_()
    candidates.fill_(float("nan"))
    encoder = _Encoder(x, codebook, candidates.shape[1])
    encoder.prepare()
    bytes_a_chunk = CHUNK * encoder.groups * (encoder.codewords - 1).bit_length() // 8
    for chunk in range(0, triton.cdiv(x.shape[0], CHUNK), encoder.chunks):
        part = x[chunk * CHUNK : (chunk + encoder.chunks) * CHUNK]
        encoder.search(part)
        encoder.pack(part.shape[0], codes[chunk * bytes_a_chunk :])
        encoder.sum(part, sums, counts)
        encoder.add_errors(part.shape[0], squared_error, flag.view(torch.uint8))
        if encoder.slots:
            encoder.race(part, candidates, candidate_scores)
