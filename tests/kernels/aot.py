"""Triton kernels compiled for GPUs that are not there, and what came out of it."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Compilers that keep less in registers; 3.6.0 was tried, and what it spills is in the pages of the ops.
OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
ROOT = Path(__file__).parents[2]


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: Collection[str],
    capability: int,
    warps: int,
    stages: int,
) -> tuple[dict[str, Any], str]:
    """What came out, and the PTX.

    Args:
        signature: the type of every argument, "constexpr" for constants.
        aligned: arguments known to be multiples of 16; pointers always are.
    """
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in aligned
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    ptx = compiled.asm["ptx"]
    registers, stack, local = _resources(compiled.asm["cubin"])
    found = {
        "registers": registers,
        # Bytes a thread; where nothing indexes local memory, these are spills.
        "stack": stack + local,
        "shared": compiled.metadata.shared,
        "tensor_cores": [op for op in ("wgmma", "tcgen05.mma", "mma.sync") if op in ptx],
        "f64": ".f64" in ptx,
        "tf32": "tf32" in ptx,
        "atomics": bool(re.search(r"\b(atom|red)\.", ptx)),
    }
    return found, ptx


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local memory, in bytes a thread."""
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


def compile_tables(program: str, runs: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The rows that a program of this folder prints, run once with each of these arguments, two at a time.

    In processes of their own, without the interpreter that other tests use.
    """

    def run(arguments: Sequence[str]) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", f"tests.kernels.{program}", *arguments],
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        return [row for part in pool.map(run, runs) for row in part]
