"""Compiles the Triton kernels of critic_head ahead of time and prints what came out, a line of JSON each.

    python -m tests.kernels.critic_head_aot [--few] CAPABILITY DTYPE...        90 bf16 fp32

To be run without TRITON_INTERPRET, which replaces the kernels when they are imported. Needs no device.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton.language as tl

from lct_fast.kernels import critic_head as kernels
from tests.kernels.aot import compile_kernel

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
FLOATS = ["scale", "row_scale", "loss", "shares"]
# As the launcher sees them when the depth is a multiple of 16: the usual case, with 16-byte accesses.
MULTIPLES_OF_16 = ["depth", "pitch", "dweight_size"]


def argument_type(name: str, dtype: str) -> str:
    if name in FLOATS:
        return "*fp32"
    if name in ("h", "weight", "bias", "dlogits", "dh", "dweight", "dbias"):
        return f"*{dtype}"
    return "*i64" if name == "target" else "i32"


def configurations(dtype: str, few: bool) -> Iterator[tuple[str, kernels.Tile, dict[str, Any]]]:
    """Every launch of the tables (few: the first and last of each), all flags set: they only add work."""
    size = 4 if dtype == "fp32" else 2
    flags = {"RELU": True, "HAS_BIAS": True}
    for tile in ends(kernels.RESIDENT[size], few):
        yield "_resident_kernel", tile, {**flags, "WGRAD": True}
    for tile in ends(kernels.TILED[size], few):
        yield "_tiled_kernel", tile, {**flags, "WGRAD": tile.classes <= kernels.SHARE_CLASSES}
    for tile in ends(kernels.WGRAD[size], few):
        yield "_wgrad_kernel", tile, {"RELU": True}


def build(
    name: str, constants: dict[str, Any], dtype: str, capability: int, warps: int, stages: int
) -> dict[str, Any]:
    kernel = getattr(kernels, name)
    signature = {
        arg: "constexpr" if arg in constants else argument_type(arg, dtype) for arg in kernel.arg_names
    }
    found, _ = compile_kernel(kernel, signature, constants, MULTIPLES_OF_16, capability, warps, stages)
    return found


def ends(table: tuple[kernels.Tile, ...], few: bool) -> tuple[kernels.Tile, ...]:
    return (table[0], table[-1]) if few else table


def main(capability: int, dtypes: list[str], few: bool) -> None:
    for dtype in dtypes:
        size = 4 if dtype == "fp32" else 2
        for name, tile, flags in configurations(dtype, few):
            constants = {
                **flags,
                "DOT": TYPES[dtype],
                "LIFT": kernels.LIFT if dtype == "fp16" else 1.0,
                "BLOCK_ROWS": tile.rows,
                "BLOCK_DEPTH": tile.depth,
                "BLOCK_CLASSES": tile.classes,
            }
            built = build(name, constants, dtype, capability, tile.warps, tile.stages)
            report(name, tuple(tile), dtype, capability, built, needs_tensor_cores=size == 2)
        block_chunks, block, warps = kernels.FOLD
        constants = {"HAS_BIAS": True, "BLOCK_CHUNKS": block_chunks, "BLOCK": block}
        built = build("_fold_kernel", constants, dtype, capability, warps, stages=2)
        report("_fold_kernel", kernels.FOLD, dtype, capability, built, needs_tensor_cores=False)


def report(
    name: str,
    tile: tuple[int, ...],
    dtype: str,
    capability: int,
    built: dict[str, Any],
    needs_tensor_cores: bool,
) -> None:
    line = {"kernel": name, "tile": tile, "dtype": dtype, "capability": capability, **built}
    print(json.dumps({**line, "needs_tensor_cores": needs_tensor_cores}), flush=True)


if __name__ == "__main__":
    few = "--few" in sys.argv
    main(int(sys.argv[1 + few]), sys.argv[2 + few :], few)
