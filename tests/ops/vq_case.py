"""Inputs of vq, what they must give in float64, and the checks against it."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.reference import vq as reference
from tests.ladder import PLACES, Place, assert_rule, assert_same_bits

VQ_PLACES = [p for p in PLACES if p.backend in ops.backends("vq_decode")]
# Every backend that all of vq has, on every device that this machine has.
everywhere = pytest.mark.parametrize("place", VQ_PLACES, ids=str, indirect=True)
# Every backend that encodes: triton does nothing else.
ENCODE_PLACES = [p for p in PLACES if p.backend in ops.backends("vq_encode")]
encoders = pytest.mark.parametrize("place", ENCODE_PLACES, ids=str, indirect=True)

# (rows, groups, codewords, depth): why.
SHAPES = {
    (1, 1, 2, 1): "the smallest",
    (1, 3, 5, 7): "one row; codes of three bits, the stream ends in the middle of a byte",
    (63, 2, 3, 2): "one row short of a block; two words share a byte's bits with the next row",
    (65, 1, 255, 5): "one row past a block; one word short of a byte",
    (130, 5, 257, 4): "codes of nine bits over five groups",
    (66, 3, 200, 4): "codes of a byte over three groups",
    (513, 2, 16, 12): "one row past a run of 512",
    (70, 1, 4096, 3): "many words, few rows: most are never chosen",
    (67, 1, 6, 128): "as many words as one register tile, deep",
    (4099, 2, 13, 8): "a chunk and three rows",
    (1030, 1, 1024, 64): "wide and many: a product of matrices, almost",
    (40, 1, 65536, 1): "as many words as there may be",
}
# The same for backend triton, from 16 columns to 256.
DEEP_SHAPES = {
    (1, 1, 2, 16): "the smallest",
    (65, 3, 13, 17): "one column past 16; codes of four bits over three groups",
    (129, 2, 257, 32): "one row past two blocks, one word past whole tiles; codes of nine bits",
    (4099, 1, 7, 20): "a chunk and three rows; codes of three bits",
    (66, 1, 520, 64): "many tiles of words, many runs of the sums",
    (67, 1, 6, 128): "deep, and less than a tile of words",
    (70, 2, 130, 96): "a depth between two blocks",
    (33, 2, 100, 256): "the deepest",
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Case:
    x: Tensor
    codebook: Tensor
    candidates: int = 16

    def run(self) -> ops.VQEncoding:
        return ops.vq_encode(self.x, self.codebook, self.candidates)

    def numbers(self, codes: Tensor) -> Tensor:
        """[N, G] from packed codes."""
        groups, codewords, _ = self.codebook.shape
        bits, rows = reference.bits_of(codewords), self.x.shape[0]
        return reference.unpack(codes, bits, rows * groups).view(rows, groups)

    def vectors(self) -> Tensor:
        """[G, N, D] float64."""
        groups, _, depth = self.codebook.shape
        return self.x.double().view(-1, groups, depth).transpose(0, 1)


def make(
    rows: int,
    groups: int,
    codewords: int,
    depth: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    candidates: int = 16,
) -> Case:
    """Vectors and words from one distribution, shifted off zero so that scores cancel somewhat."""
    draw = torch.Generator().manual_seed(rows * 7919 + codewords * 31 + depth)
    x = (torch.randn(rows, groups * depth, generator=draw) + 0.5).to(dtype)
    codebook = torch.randn(groups, codewords, depth, generator=draw) + 0.5
    return Case(x.to(device), codebook.to(device), candidates)


def fit(place: Place, case: Case) -> Case:
    """The case, with columns of zeros after each vector's where the backend takes none so short."""
    groups, _, depth = case.codebook.shape
    short = max(0, 16 - depth) if place.backend == "triton" else 0
    x = torch.nn.functional.pad(case.x.view(-1, groups, depth), (0, short)).flatten(1)
    return replace(case, x=x, codebook=torch.nn.functional.pad(case.codebook, (0, short)))


def check(case: Case, out: ops.VQEncoding) -> None:
    """Codes by excess distance, everything else given the codes; for inputs that are finite."""
    case = Case(case.x.cpu(), case.codebook.cpu(), case.candidates)
    out = ops.VQEncoding(*(each.cpu() for each in out))
    groups, codewords, depth = case.codebook.shape
    rows = case.x.shape[0]
    assert out.codes.dtype == torch.uint8 and out.counts.dtype == torch.int64
    assert out.sums.shape == case.codebook.shape and out.flag.dtype == torch.bool
    assert not bool(out.flag)
    code = case.numbers(out.codes)
    repacked = reference.pack(code.flatten(), reference.bits_of(codewords))
    assert torch.equal(out.codes, repacked), "bits beyond the last code are not zero, or the size is wrong"
    assert int(code.max()) < codewords
    for group in range(groups):
        check_group(case, out, group, code[:, group])
    check_candidates(case, out, code)
    assert out.counts.shape == (groups, codewords) and int(out.counts.sum()) == rows * groups


def check_group(case: Case, out: ops.VQEncoding, group: int, code: Tensor) -> None:
    x, words = case.vectors()[group], case.codebook[group].double()
    codewords = len(words)
    excess = _excess(x, words, code)
    score = case.codebook[group].square().sum(1) / 2 - x.float() @ case.codebook[group].T
    plain = _excess(x, words, score.argmin(1))
    terms = float((words.square().sum(1) / 2 + x.abs() @ words.abs().T).amax())
    allowed = 2 * plain + 8 * torch.finfo(torch.float32).eps * terms
    assert excess <= allowed, (
        f"group {group}: a word farther than the nearest by {excess:.2e} > {allowed:.2e}"
    )

    counts = torch.bincount(code, minlength=codewords)
    assert torch.equal(out.counts[group], counts)
    zeros = torch.zeros_like(words)
    exact = zeros.index_add(0, code, x)
    sums = zeros.float().index_add(0, code, x.float())
    size = float(zeros.index_add(0, code, x.abs()).amax())
    assert_rule("sums", out.sums[group], sums, exact, torch.finfo(torch.float32).eps, size)
    assert not out.sums[group][counts == 0].any()


def check_candidates(case: Case, out: ops.VQEncoding, code: Tensor) -> None:
    """The error by the rule; each candidate is a vector of its slot, and there is one where an error is not 0."""
    groups, _, depth = case.codebook.shape
    rows, slots = case.x.shape[0], case.candidates
    words = case.codebook[torch.arange(groups), code].transpose(0, 1)
    x = case.vectors()
    exact = (x - words.double()).square().sum(2)
    plain = (x.float() - words).square().sum(2)
    eps = torch.finfo(torch.float32).eps
    assert_rule("squared_error", out.squared_error, plain.sum(), exact.sum(), 4 * eps, float(exact.sum()))
    assert out.candidates.shape == (groups, slots, depth)
    assert out.candidate_scores.shape == (groups, slots) and out.candidate_scores.dtype == torch.float32
    slot = torch.arange(rows) % reference.CHUNK % slots if slots else torch.arange(0)
    for group in range(groups):
        for r in range(slots):
            members = slot == r
            score, vector = float(out.candidate_scores[group, r]), out.candidates[group, r]
            if not exact[group][members].any():
                assert score == 0 and bool(vector.isnan().all())
                continue
            same = (x[group][members] == vector.double()).all(1)
            assert bool(same.any()), f"candidate {group}, {r} is no vector of its slot"
            # An error divided by an odd number below 2^24.
            ratio = float(exact[group][members][same].amax()) / score
            assert 0.999 < ratio < 2**24


def _excess(x: Tensor, words: Tensor, code: Tensor) -> float:
    """How much farther than the nearest word the chosen one is, at most: difference of squared distances."""
    worst = 0.0
    for first in range(0, len(x), 256):
        part = x[first : first + 256]
        distance = (part[:, None] - words).square().sum(2)
        chosen = distance.gather(1, code[first : first + 256, None])[:, 0]
        worst = max(worst, float((chosen - distance.amin(1)).amax()))
    return worst


def assert_equal_encodings(a: ops.VQEncoding, b: ops.VQEncoding, what: str = "") -> None:
    for name, left, right in zip(ops.VQEncoding._fields, a, b, strict=True):
        if left.dtype == torch.bool:
            left, right = left.byte(), right.byte()
        assert_same_bits(f"{name} {what}".strip(), left, right)
