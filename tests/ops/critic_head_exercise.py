"""Runs critic_head over awkward shapes while memory is watched: by guard pages, or compute-sanitizer.

    python -m tests.ops.critic_head_exercise BACKEND DEVICE

Prints each case before it runs, so that the last line names the one that faulted. Exit status 1 where a
result is wrong.
"""

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from lct_fast import ops
from tests.ladder import GuardPages
from tests.ops.critic_head_case import DTYPES, Case, check, check_wgrad, make

# (rows, depth, classes): each ends in the middle of a block in every direction.
SHAPES = [(1, 1, 1), (3, 5, 2), (33, 19, 10), (5, 513, 3), (19, 7, 100), (2, 3, 1000), (130, 64, 17)]


def guarded(case: Case, pages: GuardPages) -> Case:
    """The case with every input flush against a guard page."""
    copies = {
        name: pages.copy(x)
        for name in ("h", "weight", "bias", "target", "scale", "row_scale")
        for x in (getattr(case, name),)
        if x is not None
    }
    return replace(case, **copies)


@contextmanager
def surroundings(case: Case, side: str) -> Iterator[Case]:
    """On the host, all that the op reads and writes lies against guard pages."""
    if case.h.is_cuda:
        yield case
        return
    pages = GuardPages(side)
    with pages.allocating():
        yield guarded(case, pages)


def cases(device: str) -> Iterator[tuple[str, Case]]:
    for index, shape in enumerate(SHAPES):
        for name, (dtype, weight_dtype) in DTYPES.items():
            case = make(*shape, dtype, weight_dtype, device, index % 2 == 0, ("relu", "none")[index % 2])
            target = case.target.clone()
            target[-1] = 2**40
            yield f"{shape} {name}", replace(case, target=target)
            yield f"{shape} {name} without row_scale", replace(case, row_scale=None)


def main(backend: str, device: str) -> None:
    faulthandler.enable()
    sides = ("after",) if device == "cuda" else ("after", "before")
    with ops.use_backend(backend):
        for side in sides:
            for name, case in cases(device):
                print(side, name, flush=True)
                with surroundings(case, side) as placed:
                    out = placed.run()
                    if placed.row_scale is not None:
                        dweight, dbias = placed.wgrad(out.dlogits)
                check(case, out)
                if case.row_scale is not None:
                    check_wgrad(case, dweight, dbias)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:])
