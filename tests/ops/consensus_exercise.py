"""Runs consensus over awkward sizes while memory is watched: by guard pages, or compute-sanitizer.

    python -m tests.ops.consensus_exercise BACKEND DEVICE

Prints each case before it runs, so that the last line names the one that faulted.
"""

import faulthandler
import sys

import torch

from lct_fast import ops
from tests.ladder import GuardPages
from tests.ops.consensus_case import BETA, DTYPES, ETA, Case, check, make

# Each leaves another number of values in the last vector.
SHAPES = ((1, 1), (2, 3), (3, 8), (1, 15), (2, 16), (3, 31), (1, 519), (2, 1027))


def main(backend: str, device: str) -> None:
    faulthandler.enable()
    with ops.use_backend(backend):
        for side in ("after", "before") if device == "cpu" else ("after",):
            for shape in SHAPES:
                for multipliers in (True, False):
                    for name, dtype in DTYPES.items():
                        print(side, shape, "al" if multipliers else "penalty", name, flush=True)
                        run(make(shape, dtype, multipliers=multipliers), side, device)


def run(case: Case, side: str, device: str) -> None:
    check(case, device)
    if device != "cpu":
        return
    pages = GuardPages(side)
    kappa = None if case.kappa is None else pages.copy(case.kappa)
    placed = Case(pages.copy(case.lambda_), kappa, pages.copy(case.p), pages.copy(case.x))
    with pages.allocating():
        got = ops.consensus_adjoint(placed.x, placed.lambda_, placed.kappa, BETA)
        after = ops.consensus_update(placed.lambda_, placed.kappa, placed.p, placed.x, BETA, ETA)
    assert all(bool(t.isfinite().all()) for t in (got.loss, got.p, after.lambda_))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2])
