"""Runs perturb and score over awkward sizes while memory is watched: by guard pages, or compute-sanitizer.

    python -m tests.ops.perturb_exercise BACKEND DEVICE

Prints each case before it runs, so that the last line names the one that faulted. Exit status 1 where a
result is wrong.
"""

import dataclasses
import faulthandler
import sys

import torch

from lct_fast import ops
from tests.ladder import GuardPages
from tests.ops.perturb_case import DTYPES, OFFSETS, SHAPES, Given, check, make


def main(backend: str, device: str) -> None:
    faulthandler.enable()
    with ops.use_backend(backend):
        for side in ("after", "before") if device == "cpu" else ("after",):
            for turn, (shape, copies) in enumerate(SHAPES):
                for name, dtype in DTYPES.items():
                    print(side, shape, copies, name, flush=True)
                    antithetic = turn % 2 == 0 and copies * shape[0] % 2 == 0
                    offset = OFFSETS[(turn + len(name)) % len(OFFSETS)]
                    given = make(shape, copies, dtype, offset=offset, antithetic=antithetic, device=device)
                    run(given, dtype, side, device)


def run(given: Given, dtype: torch.dtype, side: str, device: str) -> None:
    if device != "cpu":
        check(given, dtype)
        return
    pages = GuardPages(side)
    placed = dataclasses.replace(
        given, z=pages.copy(given.z), sigma=pages.copy(given.sigma), loss=pages.copy(given.loss)
    )
    with pages.allocating():
        check(placed, dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2])
