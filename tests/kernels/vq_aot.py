"""Compiles the Triton kernels of vq ahead of time and prints what came out, a line of JSON each.

    python -m tests.kernels.vq_aot [--few] CAPABILITY DTYPE...        90 bf16 fp32

To be run without TRITON_INTERPRET, which replaces the kernels when they are imported. Needs no device.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from lct_fast.kernels import vq as kernels
from tests.kernels.aot import compile_kernel

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
POINTERS = {
    "codes": "*i16",
    "order": "*i32",
    "starts": "*i32",
    "winners": "*i32",
    "stream": "*u8",
    "flag": "*u8",
    **dict.fromkeys(("codebook", "half_norm", "unlift", "errors", "chunk_errors"), "*fp32"),
    **dict.fromkeys(("sums", "scores", "candidates", "candidate_scores"), "*fp32"),
}
# Every tile; and depths between them that are no multiple of 16, whose rows are not read 16 bytes at a time.
DEPTHS, FEW_DEPTHS, ODD_DEPTHS = (16, 32, 64, 128, 256), (64, 128), (31, 63, 127, 255)


def argument_type(kernel: str, name: str, dtype: str) -> str:
    if name == "x":
        return f"*{dtype}"
    if name == "words":
        return "*fp32" if dtype == "fp32" else "*fp16"
    if kernel == "_fold_kernel" and name in ("parts", "total"):
        return "*fp32"
    if kernel == "_sums_kernel" and name == "counts":
        return "*i32"
    return POINTERS.get(name, "i32")


def products(
    dtype: str, capability: int, depths: tuple[int, ...], most_codewords: tuple[int, ...]
) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    """The search and the sums."""
    size = 4 if dtype == "fp32" else 2
    for depth in depths:
        block_depth = triton.next_power_of_2(depth)
        for codewords in most_codewords:
            tile = kernels.search_tile(depth, codewords, size, capability)
            constants = {
                "SPLIT": size == 2,
                "LIFT": dtype == "bf16",
                "BLOCK_DEPTH": block_depth,
                "BLOCK_ROWS": tile.rows,
                "BLOCK_WORDS": tile.words,
                "SLICE": min(kernels.SLICE, block_depth),
            }
            yield "_search_kernel", constants, tile.warps, tile.stages
        tile = kernels.sums_tile(depth, size)
        constants = {
            "DOT": TYPES[dtype],
            "WORDS": tile.words,
            "CHUNK": kernels.CHUNK,
            "BLOCK_ROWS": tile.rows,
            "BLOCK_DEPTH": tile.depth,
        }
        if block_depth == tile.depth:
            yield "_sums_kernel", constants, tile.warps, tile.stages


def others(size: int) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    """The kernels without products, which are the same at every depth."""
    words = kernels.SUMS[size][0].words
    split = {"SPLIT": size == 2, "BLOCK_WORDS": 16}
    yield "_words_kernel", {**split, "BLOCK_DEPTH": 256}, 4, 1
    for bits in (1, 7, 12):
        size = triton.next_power_of_2(kernels.PACKED * bits // 8)
        yield "_pack_kernel", {"BITS": bits, "BLOCK": kernels.PACKED, "BLOCK_BYTES": size}, 4, 1
    yield "_bucket_kernel", {"WORDS": words, "CHUNK": kernels.CHUNK}, 8, 1
    yield "_error_kernel", {"CHUNK": kernels.CHUNK}, 8, 1
    yield "_fold_kernel", {"BLOCK": kernels.FOLD[0], "TOGETHER": kernels.FOLD[1]}, 4, 1
    for slots in (1, 16, 64):
        blocks = {"BLOCK_TURNS": kernels.RACE[0] // slots, "BLOCK_SLOTS": slots}
        yield "_race_kernel", {"CHUNK": kernels.CHUNK, **blocks}, 4, 1
    yield "_candidates_kernel", {"BLOCK": 256, "BLOCK_DEPTH": 256}, 1, 1


def build(
    name: str,
    constants: dict[str, Any],
    dtype: str,
    capability: int,
    warps: int,
    stages: int,
    whole: bool,
) -> dict[str, Any]:
    """Compiled as for a depth that is a multiple of 16, unless not `whole`."""
    kernel = getattr(kernels, name)
    signature = {
        arg: "constexpr" if arg in constants else argument_type(name, arg, dtype) for arg in kernel.arg_names
    }
    aligned = ("padded", "depth") if whole else ("padded",)
    found, ptx = compile_kernel(kernel, signature, constants, aligned, capability, warps, stages)
    # fp32 subtractions a thread, two to an instruction of sm_100.
    pairs = re.findall(r"\bsub\.(?:rn\.)?f32(x2)?\b", ptx)
    found["subtractions"] = sum(2 if pair else 1 for pair in pairs)
    found["approximate_division"] = bool(re.search(r"\bdiv\.(full|approx)", ptx))
    return found


def main(capability: int, dtypes: list[str], few: bool) -> None:
    for dtype in dtypes:
        size = 4 if dtype == "fp32" else 2
        whole = [
            *products(dtype, capability, FEW_DEPTHS if few else DEPTHS, (1024,) if few else (16, 1024)),
            *([] if few else others(size)),
        ]
        odd = [] if few else products(dtype, capability, ODD_DEPTHS, (1024,))
        for launch, is_whole in (*((each, True) for each in whole), *((each, False) for each in odd)):
            name, constants, warps, stages = launch
            built = build(name, constants, dtype, capability, warps, stages, is_whole)
            line = {
                "kernel": name,
                "constants": {key: value for key, value in constants.items() if key != "DOT"},
                "warps": warps,
                "stages": stages,
                "dtype": dtype,
                "whole": is_whole,
                "capability": capability,
            }
            print(json.dumps({**line, **built}), flush=True)


if __name__ == "__main__":
    few = "--few" in sys.argv
    main(int(sys.argv[1 + few]), sys.argv[2 + few :], few)
