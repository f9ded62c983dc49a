"""Runs bn_relu_pool over awkward shapes while memory is watched: by guard pages, or compute-sanitizer.

    python -m tests.ops.bn_relu_pool_exercise BACKEND DEVICE [--few]

Prints each case before it runs, so that the last line names the one that faulted. Exit status 1 where a
result is wrong.
"""

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from lct_fast import _native, ops
from tests.ladder import GuardPages
from tests.ops.bn_relu_pool_case import DTYPES, FORMATS, Case, check, make

# (N, C, H, W, pool): each ends in the middle of a vector in both formats.
SHAPES = [(2, 1, 1, 1, 1), (3, 19, 6, 10, 2), (2, 5, 72, 70, 2), (2, 35, 4, 4, 2), (70, 3, 7, 9, 1)]
FEW = [(3, 19, 6, 10, 2), (2, 35, 4, 4, 2)]


def guarded(case: Case, pages: GuardPages) -> Case:
    """The case with every input flush against a guard page, in its memory format."""

    def copied(x: Tensor) -> Tensor:
        if x.dim() == 4 and not x.is_contiguous():
            return pages.copy(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return pages.copy(x)

    names = ("x", "gamma", "beta", "running_mean", "running_var", "dpooled", "dy")
    tensors = {name: getattr(case, name) for name in names}
    return replace(case, **{name: copied(x) for name, x in tensors.items() if x is not None})


@contextmanager
def surroundings(case: Case, side: str) -> Iterator[Case]:
    """On the host, all that the op reads and writes lies against guard pages."""
    if case.x.is_cuda:
        yield case
        return
    pages = GuardPages(side)
    with pages.allocating(), mock.patch.object(torch.Tensor, "clone", lambda x: x):
        yield guarded(case, pages)


def cases(few: bool) -> Iterator[tuple[str, Case]]:
    for shape in FEW if few else SHAPES:
        for name in ("f32", "bf16") if few else DTYPES:
            for layout in FORMATS:
                for training, with_dy in ((True, False), (True, True), (False, True)):
                    case = make(*shape, DTYPES[name], layout, training=training, with_dy=with_dy)
                    yield f"{shape} {name} {layout} training={training} dy={with_dy}", case


def main(backend: str, device: str, few: bool) -> None:
    faulthandler.enable()
    sides = ("after",) if device == "cuda" else ("after", "before")
    native = _native.load() if backend == "cpu" else None
    levels = native.simd_levels() if native is not None else [None]
    with ops.use_backend(backend):
        for side in sides:
            # Masks are wrong at the far end far more often than at the near one.
            for name, case in cases(few or side == "before"):
                for level in levels:
                    if native is not None:
                        native.set_simd(level)
                    print(side, name, level or "", flush=True)
                    unwatched = case.to(device)
                    with surroundings(unwatched, side) as placed:
                        out = placed.run()
                    # Checked on the host: a device that is watched runs the op alone.
                    check(case, {key: x.cpu() for key, x in out.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], "--few" in sys.argv[3:])
