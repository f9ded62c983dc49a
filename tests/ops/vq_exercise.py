"""Runs vq over awkward shapes while memory is watched: by guard pages, or compute-sanitizer.

    python -m tests.ops.vq_exercise BACKEND DEVICE [--few]

Prints each case before it runs, so that the last line names the one that faulted. Exit status 1 where a
result is wrong.
"""

import faulthandler
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from lct_fast import ops
from tests.ladder import GuardPages
from tests.ops.vq_case import DTYPES, Case, check, make

# (rows, groups, codewords, depth, candidates): each ends in the middle of a block, a vector and a byte.
SHAPES = [
    (1, 1, 2, 1, 1),
    (3, 3, 5, 7, 16),
    (65, 2, 3, 2, 0),
    (131, 1, 255, 4, 3),
    (515, 5, 257, 8, 16),
    (1027, 1, 300, 20, 16),
    (67, 2, 13, 130, 5),
    (9, 1, 4096, 3, 2),
    (4097, 1, 16, 4, 16),
    (321, 2, 50, 30, 3),
]
FEW = [(65, 2, 3, 2, 0), (515, 5, 257, 8, 16), (321, 2, 50, 30, 3), (67, 2, 13, 130, 5)]
# Of backend triton, which takes from 16 columns to 256 and only encodes.
DEEP = [
    (1, 1, 2, 16, 1),
    (3, 3, 5, 17, 16),
    (131, 1, 255, 48, 3),
    (35, 2, 13, 256, 0),
    (4097, 1, 16, 16, 16),
    (67, 2, 13, 130, 5),
]
DEEP_FEW = [(131, 3, 3, 20, 0), (67, 2, 13, 130, 5)]


def exercise(
    shape: tuple[int, int, int, int, int], dtype: str, device: str, pages: GuardPages | None, whole: bool
) -> None:
    """Encodes, and if `whole` decodes and updates too."""
    case = make(*shape[:4], DTYPES[dtype], device, shape[4])

    def placed(x: torch.Tensor) -> torch.Tensor:
        return x if pages is None else pages.copy(x)

    with pages.allocating() if pages else nullcontext():
        x, codebook = placed(case.x), placed(case.codebook)
        out = ops.vq_encode(x, codebook, case.candidates)
    # Checked on the host, outside: a device that is watched runs the ops alone.
    check(case, ops.VQEncoding(*(each.cpu() for each in out)))
    if whole:
        exercise_others(case, out, placed, pages)


def exercise_others(
    case: Case, out: ops.VQEncoding, placed: Callable[[Tensor], Tensor], pages: GuardPages | None
) -> None:
    rows, (groups, _, _) = len(case.x), case.codebook.shape
    with pages.allocating() if pages else nullcontext():
        codebook, codes = placed(case.codebook), placed(out.codes)
        decoded = [ops.vq_decode(codes, codebook, rows, each) for each in DTYPES.values()]
        state = ops.VQState(*map(placed, ops.vq_state(codebook)))
        ops.vq_update(
            codebook,
            state,
            placed(out.counts),
            placed(out.sums),
            placed(out.candidates),
            revive_below=1.0,
        )
    code = case.numbers(out.codes.cpu())
    for got in decoded:
        words = case.codebook.cpu()[torch.arange(groups), code].to(got.dtype)
        assert torch.equal(got.cpu(), words.view(got.shape))
    assert not bool(
        torch.cat([codebook.flatten(), state.counts.flatten(), state.sums.flatten()]).isnan().any()
    )


def without_words(codewords: int, depth: int, device: str, pages: GuardPages | None) -> None:
    """No word can be chosen, and none beside the codebook may be read for want of one."""
    case = make(70, 1, codewords, depth, torch.float32, device)
    x, codebook = case.x, torch.full_like(case.codebook, float("nan"))
    with pages.allocating() if pages else nullcontext():
        if pages:
            x, codebook = pages.copy(x), pages.copy(codebook)
        out = ops.vq_encode(x, codebook)
    assert bool(out.flag) and not out.codes.any() and not out.counts.any()


def main(backend: str, device: str, few: bool) -> None:
    faulthandler.enable()
    sides = ("",) if device == "cuda" else ("after", "before")
    deep = backend == "triton"
    shapes, fewer = (DEEP, DEEP_FEW) if deep else (SHAPES, FEW)
    with ops.use_backend(backend):
        for side in sides:
            for codewords in (2, 6):
                print(side, codewords, "without words", flush=True)
                without_words(codewords, 16 if deep else 4, device, GuardPages(side) if side else None)
            # A read is wrong at the far end far more often than at the near one.
            for shape in fewer if few or side == "before" else shapes:
                for dtype in DTYPES:
                    print(side, shape, dtype, flush=True)
                    exercise(shape, dtype, device, GuardPages(side) if side else None, whole=not deep)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], "--few" in sys.argv[3:])
