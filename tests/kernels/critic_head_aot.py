"""Compiles the Triton kernels of critic_head ahead of time and prints what came out, a line of JSON each.

    python -m tests.kernels.critic_head_aot [--few] CAPABILITY DTYPE...        90 bf16 fp32

To be run without TRITON_INTERPRET, which replaces the kernels when they are imported. Needs no device.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lct_fast.kernels import critic_head as kernels

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
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, (arg, kind) in enumerate(signature.items())
        if kind.startswith("*") or arg in MULTIPLES_OF_16
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    ptx = compiled.asm["ptx"]
    registers, stack, local = resources(compiled.asm["cubin"])
    return {
        "registers": registers,
        # Bytes a thread; where nothing indexes local memory, these are spills.
        "stack": stack + local,
        "shared": compiled.metadata.shared,
        "tensor_cores": [op for op in ("wgmma", "tcgen05.mma", "mma.sync") if op in ptx],
        "f64": ".f64" in ptx,
        "tf32": "tf32" in ptx,
        "atomics": bool(re.search(r"\b(atom|red)\.", ptx)),
    }


def resources(cubin: bytes) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


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
