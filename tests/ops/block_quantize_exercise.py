"""Runs block_quantize over awkward sizes while memory is watched: by guard pages, or compute-sanitizer.

    python -m tests.ops.block_quantize_exercise BACKEND DEVICE

Prints each case before it runs, so that the last line names the one that faulted. Exit status 1 where a
result is wrong.
"""

import faulthandler
import sys

import torch

from lct_fast import ops
from lct_fast.reference import block_quantize as reference
from tests.ladder import GuardPages, assert_same_bits
from tests.ops.block_quantize_case import BLOCKS, DTYPES, KINDS, make

# Each leaves another number of values in the last vector, byte and block.
SIZES = (1, 3, 8, 31, 32, 65, 130, 255, 256, 519, 1027)


def main(backend: str, device: str) -> None:
    faulthandler.enable()
    with ops.use_backend(backend):
        for side in ("after", "before") if device == "cpu" else ("after",):
            for index, size in enumerate(SIZES):
                for kind in KINDS:
                    for name, dtype in DTYPES.items():
                        block = BLOCKS[(index + len(name)) % 4]
                        print(side, size, kind, name, block, flush=True)
                        run(make(size, dtype, signed=index % 2 == 0), kind, block, side, device)


def run(x: torch.Tensor, kind: str, block: int, side: str, device: str) -> None:
    payload, scales = reference.block_quantize(x, kind, block)
    values = reference.block_dequantize(payload, scales, x.numel(), kind, block, x.dtype)
    if device == "cpu":
        pages = GuardPages(side)
        placed = pages.copy(x)
        with pages.allocating():
            got = ops.block_quantize(placed, kind, block)
            out = ops.block_dequantize(*got, x.numel(), kind, block, x.dtype)
    else:
        got = ops.block_quantize(x.to(device), kind, block)
        out = ops.block_dequantize(*got, x.numel(), kind, block, x.dtype)
    assert_same_bits("payload", got.payload.cpu(), payload)
    assert_same_bits("scales", got.scales.cpu(), scales)
    assert_same_bits("values", out.cpu(), values)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2])
