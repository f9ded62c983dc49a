"""Compiles the Triton kernels of group_linear ahead of time and prints what came out, a line of JSON each.

    python -m tests.kernels.group_linear_aot [--few] CAPABILITY DTYPE...        90 bf16 fp32

To be run without TRITON_INTERPRET, which replaces the kernels when they are imported. Needs no device.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lct_fast.kernels import group_linear as kernels
from tests.kernels.aot import compile_kernel
from tests.kernels.critic_head_aot import TYPES

# As the launcher sees them for even layers: 16-byte accesses.
SIDES = ("inputs", "outputs")


def argument_type(name: str, dtype: str, shares: bool) -> str:
    if name == "shares" or (name == "logits" and shares) or (name == "out" and not shares):
        return "*fp32"
    pointers = ("x", "weight", "bias", "critic_weight", "critic_bias", "h", "slope", "logits")
    pointers += ("dh", "dlogits", "gate", "dpre", "out")
    return f"*{dtype}" if name in pointers else "i32"


@dataclass(frozen=True)
class Launch:
    """A kernel as one entry of the tables launches it; shares: logits are shares, even: sides divide by 16."""

    kernel: str
    tile: tuple[int, ...]
    constants: dict[str, Any]
    shares: bool = False
    even: bool = True


def forward(
    tile: kernels.Tile, dtype: str, activation: int, classes: int, shares: bool, even: bool
) -> Launch:
    """Every bias there can be, and with gelu (activation 2) its derivative: they only add work."""
    constants = {
        "ACTIVATION": activation,
        "HAS_BIAS": True,
        "KEEP": activation == 2,
        "CRITIC": classes > 0,
        "HAS_CRITIC_BIAS": classes > 0 and not shares,
        "DOT": TYPES[dtype],
        "BLOCK_ROWS": tile.rows,
        "BLOCK_OUTPUTS": tile.outputs,
        "BLOCK_INPUTS": tile.inputs,
        "BLOCK_CLASSES": max(classes, 16),
    }
    return Launch("_forward_kernel", tuple(tile), constants, shares, even)


def backward(tile: kernels.Tile, dtype: str, activation: int, classes: int, even: bool) -> Launch:
    constants = {
        "ACTIVATION": activation,
        "HAS_DH": True,
        "CRITIC": classes > 0,
        "DOT": TYPES[dtype],
        "BLOCK_ROWS": tile.rows,
        "BLOCK_OUTPUTS": tile.outputs,
        "BLOCK_CLASSES": max(classes, 16),
    }
    return Launch("_backward_kernel", tuple(tile), constants, False, even)


def launches(capability: int, dtype: str, few: bool) -> Iterator[Launch]:
    """Every launch of the tables, with class blocks of 16, 32 and 64 (few: 64)."""
    size = 4 if dtype == "fp32" else 2
    light, heavy, small = kernels.FORWARD[capability // 10][size]
    yield forward(light, dtype, 1, 0, False, even=True)
    for tile, even in ((heavy, True), (small, True), (kernels.UNEVEN[size], False)):
        yield forward(tile, dtype, 2, 0, False, even)
        for classes in (64,) if few else (16, 32, 64):
            for shares in (False,) if few else (False, True):
                yield forward(tile, dtype, 2, classes, shares, even)
    for tile, even in zip(kernels.BACKWARD[size], (True, False), strict=True):
        for activation in (1, 2):
            for classes in (0, 64):
                yield backward(tile, dtype, activation, classes, even)
    block_shares, block, warps = kernels.FOLD
    for to_logits in (True, False):
        constants = {"BLOCK_SHARES": block_shares, "BLOCK": block, "HAS_BIAS": to_logits}
        yield Launch("_fold_kernel", (block_shares, block, 0, warps, 2), constants, to_logits)


def build(launch: Launch, dtype: str, capability: int) -> dict[str, Any]:
    kernel = getattr(kernels, launch.kernel)
    signature = {
        arg: "constexpr" if arg in launch.constants else argument_type(arg, dtype, launch.shares)
        for arg in kernel.arg_names
    }
    warps, stages = launch.tile[-2:]
    aligned = SIDES if launch.even else ()
    found, ptx = compile_kernel(kernel, signature, launch.constants, aligned, capability, warps, stages)
    found["asynchronous"] = "cp.async" in ptx
    return found


def main(capability: int, dtypes: list[str], few: bool) -> None:
    for dtype in dtypes:
        for launch in launches(capability, dtype, few):
            line = {
                "kernel": launch.kernel,
                "tile": launch.tile,
                "even": launch.even,
                "classes": launch.constants["BLOCK_CLASSES"] if launch.constants.get("CRITIC") else 0,
                "activation": launch.constants.get("ACTIVATION", 0),
                "dtype": dtype,
                "capability": capability,
                **build(launch, dtype, capability),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    few = "--few" in sys.argv
    main(int(sys.argv[1 + few]), sys.argv[2 + few :], few)
