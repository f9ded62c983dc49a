"""Runs group_linear over awkward shapes while memory is watched: by guard pages, or compute-sanitizer.

    python -m tests.ops.group_linear_exercise BACKEND DEVICE [--few]

Prints each case before it runs, so that the last line names the one that faulted. Exit status 1 where a
result is wrong.
"""

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from unittest import mock

import torch
from torch import Tensor

from lct_fast import _native, ops
from tests.ladder import GuardPages, Place
from tests.ops.group_linear_case import ACTIVATIONS, DTYPES, GRADIENTS, Case, check, make

# (rows, inputs, outputs, classes): each ends in the middle of a block in every direction.
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 2), (35, 19, 33, 10), (5, 270, 18, 63), (101, 3, 519, 17), (7, 9, 11, 0)]
FEW = [(35, 19, 33, 10), (101, 3, 519, 17)]


@contextmanager
def surroundings(case: Case, side: str) -> Iterator[Case]:
    """On the host, all that the op reads and writes lies against guard pages."""
    if case.x.is_cuda:
        yield case
        return
    pages = GuardPages(side)
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    copies = {name: pages.copy(t) for name, t in tensors.items() if isinstance(t, Tensor)}
    with pages.allocating(), mock.patch.object(torch.Tensor, "clone", lambda x: x):
        yield replace(case, **copies)


def cases(few: bool) -> Iterator[tuple[str, Case]]:
    turn = 0
    for shape in FEW if few else SHAPES:
        for name in ("f32", "bf16") if few else DTYPES:
            for activation in ACTIVATIONS:
                turn += 1
                gradients = GRADIENTS[turn // 2 % 3]
                case = make(*shape, DTYPES[name], activation, gradients, bias=turn % 4 != 0)
                yield f"{shape} {name} {activation} {gradients}", case


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
                    with surroundings(case.to(device), side) as placed:
                        out = placed.run()
                    # Checked on the host: a device that is watched runs the op alone.
                    check(case, {key: x.cpu() for key, x in out.items()}, Place(backend, device))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], "--few" in sys.argv[3:])
