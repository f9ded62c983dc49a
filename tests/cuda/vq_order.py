"""The order in which backend `cuda` of vq adds up sums and errors, in plain torch."""

import torch
from torch import Tensor

from lct_fast import ops
from tests.ladder import assert_same_bits
from tests.ops.vq_case import Case

CHUNK, RUN, BLOCK = 4096, 512, 32


def sum_of_pairs(rows: list[Tensor]) -> Tensor:
    """Neighbours first; one that has none waits for the next round."""
    while len(rows) > 1:
        pairs = [a + b for a, b in zip(rows[::2], rows[1::2], strict=False)]
        rows = pairs + rows[len(pairs) * 2 :]
    return rows[0]


def sums_in_order(case: Case, code: Tensor, good: Tensor) -> Tensor:
    """Blocks of 32 rows by trees of pairs, runs of blocks, chunks of runs and the total in order."""
    groups, codewords, depth = case.codebook.shape
    x = case.x.float().view(-1, groups, depth)
    total = torch.zeros(groups, codewords, depth)
    for chunk in range(0, len(x), CHUNK):
        chunk_sums = torch.zeros_like(total)
        for start in range(chunk, min(chunk + CHUNK, len(x)), RUN):
            run_sums = torch.zeros_like(total)
            for first in range(start, min(start + RUN, len(x)), BLOCK):
                for group in range(groups):
                    of_word: dict[int, list[Tensor]] = {}
                    for row in range(first, min(first + BLOCK, len(x))):
                        if good[row, group]:
                            of_word.setdefault(int(code[row, group]), []).append(x[row, group])
                    for word, rows in of_word.items():
                        run_sums[group, word] += sum_of_pairs(rows)
            chunk_sums += run_sums
        total += chunk_sums
    return total


def lanes_summed(x: Tensor) -> Tensor:
    """[..., 32] by a tree of halves."""
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]


def in_order(x: Tensor, dim: int) -> Tensor:
    total = torch.zeros_like(x.select(dim, 0))
    for part in x.unbind(dim):
        total = total + part
    return total


def errors_of(case: Case, code: Tensor) -> Tensor:
    """[N, G]: fused steps from the first column on. Doubles hold a product exactly."""
    groups, _, depth = case.codebook.shape
    words = case.codebook[torch.arange(groups), code]
    difference = (case.x.float().view(words.shape) - words).double()
    error = torch.zeros(code.shape)
    for d in range(depth):
        error = (error.double() + difference[..., d].square()).float()
    return error


def error_in_order(errors: Tensor) -> Tensor:
    """Threads over their four rows, lanes by trees, warps; then runs and groups of a chunk over lanes; chunks."""
    groups = errors.shape[1]
    padded = torch.nn.functional.pad(errors, (0, 0, 0, -len(errors) % CHUNK))
    by_thread = in_order(padded.view(-1, 4, 4, 32, groups), 2)
    runs = in_order(lanes_summed(by_thread.transpose(2, 3)), 1)
    of_chunk = runs.view(len(padded) // CHUNK, -1)
    of_chunk = torch.nn.functional.pad(of_chunk, (0, -of_chunk.shape[1] % BLOCK))
    chunks = lanes_summed(in_order(of_chunk.view(len(of_chunk), -1, BLOCK), 1))
    return in_order(chunks, 0)


def check_order(case: Case, out: ops.VQEncoding) -> None:
    """sums, squared_error and flag of an encoding on the host, bit for bit, given its codes."""
    code = case.numbers(out.codes)
    errors = errors_of(case, code)
    good = errors.isfinite()
    assert bool(out.flag) == (not good.all())
    assert_same_bits("sums", out.sums, sums_in_order(case, code, good))
    error = error_in_order(torch.where(good, errors, 0))
    assert_same_bits("squared_error", out.squared_error, error)
