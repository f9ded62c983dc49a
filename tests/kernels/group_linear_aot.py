"""Compiles the Triton kernels of group_linear ahead of time and prints what came out, a line of JSON each.

    python -m tests.kernels.group_linear_aot [--few] CAPABILITY DTYPE...        90 bf16 fp32

To be run without TRITON_INTERPRET, which replaces the kernels when they are imported. Needs no device.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lct_fast.kernels import group_linear as kernels
from tests.kernels.critic_head_aot import TYPES, resources

# As the launcher sees them for usual layers: 16-byte accesses.
MULTIPLES_OF_16 = ("inputs", "outputs")
TENSOR_CORES = ("wgmma", "tcgen05.mma", "mma.sync")


def argument_type(name: str, dtype: str, shares: bool) -> str:
    if name == "shares" or (name == "logits" and shares) or (name == "out" and not shares):
        return "*fp32"
    pointers = ("x", "weight", "bias", "critic_weight", "critic_bias", "h", "slope", "logits")
    pointers += ("dh", "dlogits", "gate", "dpre", "out")
    return f"*{dtype}" if name in pointers else "i32"


def blocks(tile: kernels.Tile) -> dict[str, int]:
    return {"BLOCK_ROWS": tile.rows, "BLOCK_OUTPUTS": tile.outputs, "BLOCK_INPUTS": tile.inputs}


def configurations(
    capability: int, dtype: str, few: bool
) -> Iterator[tuple[str, tuple[int, ...], dict[str, Any], bool]]:
    """Every launch of the tables with gelu, its derivative and every bias, which only add work.

    Kernel, tile, constants, and whether logits are shares; class blocks of 16, 32 and 64 (few: 64).
    """
    size = 4 if dtype == "fp32" else 2
    light, heavy, small = kernels.FORWARD[capability // 10][size]
    gelu = {"ACTIVATION": 2, "KEEP": True, "HAS_BIAS": True, "DOT": TYPES[dtype]}
    relu = {**gelu, "ACTIVATION": 1, "KEEP": False}
    plain = {"CRITIC": False, "HAS_CRITIC_BIAS": False, "BLOCK_CLASSES": 16}
    yield "_forward_kernel", tuple(light), {**relu, **plain, **blocks(light)}, False
    for tile in (heavy, small):
        yield "_forward_kernel", tuple(tile), {**gelu, **plain, **blocks(tile)}, False
        for classes in (64,) if few else (16, 32, 64):
            for shares in (False,) if few else (False, True):
                logits = {"CRITIC": True, "HAS_CRITIC_BIAS": not shares, "BLOCK_CLASSES": classes}
                yield "_forward_kernel", tuple(tile), {**gelu, **logits, **blocks(tile)}, shares
    tile = kernels.BACKWARD[size]
    sides = {"BLOCK_ROWS": tile.rows, "BLOCK_OUTPUTS": tile.outputs, "DOT": TYPES[dtype], "HAS_DH": True}
    for activation in (1, 2):
        for classes in (0, 64):
            flags = {"ACTIVATION": activation, "CRITIC": classes > 0, "BLOCK_CLASSES": max(classes, 16)}
            yield "_backward_kernel", tuple(tile), {**flags, **sides}, False
    block_shares, block, warps = kernels.FOLD
    constants = {"BLOCK_SHARES": block_shares, "BLOCK": block}
    for to_logits in (True, False):
        yield (
            "_fold_kernel",
            (block_shares, block, 0, warps, 2),
            {**constants, "HAS_BIAS": to_logits},
            to_logits,
        )


def build(
    name: str, constants: dict[str, Any], dtype: str, capability: int, shares: bool, warps: int, stages: int
) -> dict[str, Any]:
    kernel = getattr(kernels, name)
    signature = {
        arg: "constexpr" if arg in constants else argument_type(arg, dtype, shares)
        for arg in kernel.arg_names
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
        "tensor_cores": [op for op in TENSOR_CORES if op in ptx],
        "asynchronous": "cp.async" in ptx,
        "f64": ".f64" in ptx,
        "tf32": "tf32" in ptx,
        "atomics": bool(re.search(r"\b(atom|red)\.", ptx)),
    }


def main(capability: int, dtypes: list[str], few: bool) -> None:
    for dtype in dtypes:
        for name, tile, constants, shares in configurations(capability, dtype, few):
            warps, stages = tile[-2:]
            line = {
                "kernel": name,
                "tile": tile,
                "classes": constants["BLOCK_CLASSES"] if constants.get("CRITIC") else 0,
                "activation": constants.get("ACTIVATION", 0),
                "dtype": dtype,
                "capability": capability,
                **build(name, constants, dtype, capability, shares, warps, stages),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    few = "--few" in sys.argv
    main(int(sys.argv[1 + few]), sys.argv[2 + few :], few)
