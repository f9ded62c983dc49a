"""Runs critic_head over awkward shapes while memory is watched: by guard pages, or compute-sanitizer.

    python -m tests.ops.critic_head_exercise BACKEND DEVICE [--few]

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
FEW = [(33, 19, 10), (130, 64, 17), (19, 7, 100)]


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


def cases(few: bool) -> Iterator[tuple[str, Case]]:
    for index, shape in enumerate(FEW if few else SHAPES):
        for name in ("f32", "bf16") if few else DTYPES:
            dtype, weight_dtype = DTYPES[name]
            case = make(
                *shape, dtype, weight_dtype, bias=index % 2 == 0, activation=("relu", "none")[index % 2]
            )
            target = case.target.clone()
            target[-1] = 2**40
            yield f"{shape} {name}", replace(case, target=target)
            yield f"{shape} {name} without row_scale", replace(case, row_scale=None)


def main(backend: str, device: str, few: bool) -> None:
    faulthandler.enable()
    sides = ("after",) if device == "cuda" else ("after", "before")
    with ops.use_backend(backend):
        for side in sides:
            # Masks are wrong at the far end far more often than at the near one.
            for name, case in cases(few or side == "before"):
                print(side, name, flush=True)
                with surroundings(case.to(device), side) as placed:
                    out = placed.run()
                    if placed.row_scale is not None:
                        dweight, dbias = placed.wgrad(out.dlogits)
                # Checked on the host: a device that is watched runs the op alone.
                check(case, ops.CriticHead(*(None if x is None else x.cpu() for x in out)))
                if case.row_scale is not None:
                    check_wgrad(case, dweight, dbias)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], "--few" in sys.argv[3:])
