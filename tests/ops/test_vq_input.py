"""What vq refuses, and what it says then."""

from typing import Any

import pytest
import torch

from lct_fast import ops

X, BOOK = torch.zeros(7, 6), torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("error", "x", "codebook", "candidates", "message"),
    [
        (ValueError, X.view(7, 2, 3), BOOK, 1, r"x must be \[N, C\], got \[7, 2, 3\]; .*flatten"),
        (ValueError, X[:, :5], BOOK, 1, r"x must be \[N, 6\] to fit codebook \[2, 5, 3\].*got \[7, 5\]"),
        (ValueError, X, BOOK[0], 1, r"codebook must be \[G, K, D\]"),
        (ValueError, X, BOOK[:, :1], 1, "2 to 65536 words a group, got K = 1"),
        (ValueError, X[:, :1], torch.zeros(1, 65537, 1), 1, "got K = 65537.*more groups"),
        (ValueError, X, BOOK[:0], 1, "none of them 0"),
        (ValueError, X, BOOK, -1, "candidates must be 0 to 4096, got -1"),
        (ValueError, X, BOOK, 4097, "got 4097"),
        (TypeError, X.long(), BOOK, 1, "x must be float32.*got torch.int64"),
        (TypeError, X, BOOK.half(), 1, r"got torch.float16; use codebook.float\(\)"),
        (TypeError, X.double(), BOOK, 1, "float64 x and codebook go together"),
        (
            ValueError,
            X,
            BOOK.to("meta"),
            1,
            r"codebook is on meta and x on cpu; move codebook with .to\('cpu'\)",
        ),
    ],
)
def test_encode(error: type[Exception], x: Any, codebook: Any, candidates: int, message: str) -> None:
    with pytest.raises(error, match=message):
        ops.vq_encode(x, codebook, candidates)


CODES = torch.zeros(6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "codes", "rows", "dtype", "message"),
    [
        (ValueError, CODES[:5], 7, None, r"codes must be \[6\] for 7 rows of 2 codes of 3 bits, got \[5\]"),
        (ValueError, CODES.view(2, 3), 7, None, r"got \[2, 3\]"),
        (ValueError, CODES, -1, None, "rows must be at least 0, got -1"),
        (TypeError, CODES.int(), 7, None, "codes must be uint8"),
        (TypeError, CODES, 7, torch.int8, "dtype must be float32, float16 or bfloat16, got torch.int8"),
        (TypeError, CODES, 7, torch.float64, "got torch.float64 for codebook torch.float32"),
        (ValueError, CODES.to("meta"), 7, None, "codes is on meta and codebook on cpu"),
    ],
)
def test_decode(error: type[Exception], codes: Any, rows: int, dtype: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ops.vq_decode(codes, BOOK, rows, dtype)


N, M = torch.zeros(2, 5), torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"state": ops.VQState(N[:, :4], M)}, r"state.counts must be \[2, 5\]"),
        (ValueError, {"state": ops.VQState(N, M[:1])}, r"state.sums must be \[2, 5, 3\]"),
        (ValueError, {"counts": N[0].long()}, r"counts must be \[2, 5\].*got \[5\]"),
        (TypeError, {"counts": N}, "counts must be torch.int64, got torch.float32"),
        (TypeError, {"sums": M.half()}, "sums must be torch.float32"),
        (ValueError, {"candidates": M[:1]}, r"candidates must be \[G, R, D\] to fit codebook \[2, 5, 3\]"),
        (ValueError, {"candidates": M[0]}, r"candidates must be \[G, R, D\]"),
        (
            ValueError,
            {"codebook": BOOK.mT.contiguous().mT},
            "codebook is updated in place and must be contiguous",
        ),
        (ValueError, {"state": ops.VQState(N.T.contiguous().T, M)}, "state.counts is updated in place"),
        (ValueError, {"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        (ValueError, {"decay": float("nan")}, "got nan"),
        (ValueError, {"eps": -1.0}, "eps and revive_below must be at least 0"),
        (ValueError, {"revive_below": float("nan")}, "eps and revive_below must be at least 0"),
    ],
)
def test_update(error: type[Exception], change: dict[str, Any], message: str) -> None:
    given = {"codebook": BOOK, "state": ops.VQState(N, M), "counts": N.long(), "sums": M, "candidates": M}
    with pytest.raises(error, match=message):
        ops.vq_update(**{**given, **change})


def test_float64_runs_on_the_reference() -> None:
    x, codebook = torch.randn(7, 6).double(), torch.randn(2, 5, 3).double()
    out = ops.vq_encode(x, codebook)
    assert out.sums.dtype == out.candidates.dtype == out.squared_error.dtype == torch.float64
    assert ops.vq_decode(out.codes, codebook, 7).dtype == torch.float64
    state = ops.vq_state(codebook)
    ops.vq_update(codebook, state, out.counts, out.sums, out.candidates)
    assert state.counts.dtype == torch.float64
    with ops.use_backend("cpu"), pytest.raises(ops.BackendError, match="got torch.float64"):
        ops.vq_encode(x, codebook)
