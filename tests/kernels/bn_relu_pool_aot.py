"""Compiles the Triton kernels of bn_relu_pool ahead of time and prints what came out, a line of JSON each.

    python -m tests.kernels.bn_relu_pool_aot [--few] CAPABILITY DTYPE...        90 bf16 fp32

To be run without TRITON_INTERPRET, which replaces the kernels when they are imported. Needs no device.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from lct_fast.kernels import bn_relu_pool as kernels
from tests.kernels.aot import compile_kernel

POINTERS = ("x", "y", "dy", "dx", "pooled", "dpooled")
SUMS = ("mean", "var", "moments", "partials", "terms", "dgamma", "dbeta", "gamma", "beta")
FLOATS = ("eps", "count", "area")
# As the launcher sees them for a usual map: 16-byte accesses.
MULTIPLES_OF_16 = ("channels", "height", "width")
# Columns of a window: a map of 32, 2 a side; then one that no vector divides.
COLUMNS = (16, 7)


def argument_type(name: str, dtype: str) -> str:
    if name in POINTERS:
        return f"*{dtype}"
    if name in SUMS:
        return "*fp32"
    return "fp32" if name in FLOATS else "i32"


def configurations(few: bool) -> Iterator[tuple[str, kernels.Tile, dict[str, Any]]]:
    """Every launch of the tables (few: the middle of each), all flags set: they only add work."""
    tables = (kernels.FIRST[3:5], kernels.LAST[-1:]) if few else (kernels.FIRST, kernels.LAST)
    tiles = [(tile, last) for table, last in zip(tables, (False, True), strict=True) for tile in table]
    for tile, channels_last in tiles:
        # Small windows are where a width that no vector divides costs most registers.
        for columns in COLUMNS if tile.elements in (16, 64) and not few else COLUMNS[:1]:
            constants = {
                "COLUMNS": columns,
                "CHANNELS_LAST": channels_last,
                "PAIRS": tile.pairs,
                "ELEMENTS": tile.elements,
            }
            for name in ("_statistics_kernel", "_output_kernel", "_terms_kernel"):
                yield name, tile, constants
            yield "_dx_kernel", tile, {**constants, "HAS_DY": True, "BATCH": True}
    block, warps = kernels.FOLD
    yield "_fold_statistics_kernel", kernels.Tile(block, 1, warps), {"BLOCK": block}
    yield "_fold_gradients_kernel", kernels.Tile(block, 1, warps), {"BLOCK": block, "SUMMED": False}


def build(name: str, constants: dict[str, Any], dtype: str, capability: int, warps: int) -> dict[str, Any]:
    kernel = getattr(kernels, name)
    signature = {
        arg: "constexpr" if arg in constants else argument_type(arg, dtype) for arg in kernel.arg_names
    }
    found, ptx = compile_kernel(kernel, signature, constants, MULTIPLES_OF_16, capability, warps, 2)
    found["approximate"] = bool(re.search(r"\b(sqrt|rsqrt)\.approx", ptx))
    # Bytes of the widest access to global memory.
    found["widest"] = max(
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    )
    return found


def main(capability: int, dtypes: list[str], few: bool) -> None:
    for dtype in dtypes:
        for name, tile, constants in configurations(few):
            line = {
                "kernel": name,
                "tile": tuple(tile),
                "columns": constants.get("COLUMNS", 0),
                "channels_last": constants.get("CHANNELS_LAST", False),
                "dtype": dtype,
                "capability": capability,
            }
            print(json.dumps({**line, **build(name, constants, dtype, capability, tile.warps)}), flush=True)


if __name__ == "__main__":
    few = "--few" in sys.argv
    main(int(sys.argv[1 + few]), sys.argv[2 + few :], few)
