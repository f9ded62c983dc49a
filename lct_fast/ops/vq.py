"""vq: vectors coded as the index of the nearest word of a codebook, decoded, and the codebook's update.

The formulas are in `lct_fast.reference.vq`, the kernels' contract in csrc/include/lct/vq.h. Online vector
quantisation of what crosses a cut is from arXiv 2106.06401. This file holds the ops themselves: schema,
checks, shapes and backends.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from lct_fast import _native
from lct_fast.ops import available
from lct_fast.ops.backend import Backend, Op
from lct_fast.ops.register import register
from lct_fast.reference import vq as reference

_NATIVE_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# A code fits 16 bits, and an index of a word a float exactly.
MAX_CODEWORDS = 65536
MAX_CANDIDATES = reference.CHUNK

Encoded = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class VQEncoding(NamedTuple):
    """What `vq_encode` returns."""

    codes: Tensor
    counts: Tensor
    sums: Tensor
    squared_error: Tensor
    candidates: Tensor
    candidate_scores: Tensor
    flag: Tensor


class VQState(NamedTuple):
    """Moving averages behind a codebook: of counts [G, K] and of sums [G, K, D], float32."""

    counts: Tensor
    sums: Tensor


def vq_encode(x: Tensor, codebook: Tensor, candidates: int = 16) -> VQEncoding:
    """Code every vector of x as its nearest word, and count and sum what each word was chosen for, in one pass.

    Row n of x is G vectors of D columns; vector (n, g) has the code argmin_k |x_ng - codebook_gk|^2, ties to
    the lowest k. Codes are packed: code n * G + g takes bits [i b, (i + 1) b), b = ceil(log2 K), least
    significant first, in one flat stream. No matrix of distances is ever stored.

    A vector that holds a NaN or an Inf, or whose squared error overflows, has code 0, sets `flag`, and is
    left out of everything else. Sums are fp32, made over chunks of 4096 rows and added up in order: the same
    bits on every run, and for rows that are split at multiples of 4096 and whose chunks are added up in order.

    Nothing is differentiable here: x is detached.

    Args:
        x: [N, G * D] float32, float16 or bfloat16 (float64 on backend `reference`). N may be 0.
        codebook: [G, K, D] float32 (float64 for float64 x), 2 <= K <= 65536.
        candidates: R, 0 to 4096: how many vectors a group to put forward for the revival of unused words.

    Tensors that are not contiguous are copied first.

    Returns:
        VQEncoding(codes [ceil(N G b / 8)] uint8, counts [G, K] int64, sums [G, K, D], squared_error [] (the
        sum over all vectors), candidates [G, R, D], candidate_scores [G, R] float32, flag [] bool); floats
        are float32 (float64 for float64 x). Candidate r of a group is drawn from the rows n with
        (n mod 4096) mod R = r, each with a probability proportional to its squared error, as k-means++ does
        (a fixed hash decides, see `lct_fast.reference.vq.candidate_scores`). Where no such row has an error
        above 0 it is NaN, with score 0. Encodings of parts of the rows merge: add counts, sums and errors,
        and keep of each slot the candidate with the larger score.

    Raises:
        ValueError: a shape or number does not fit.
        TypeError: a dtype does not fit.
        BackendError: the backend asked for cannot run here.
    """
    return VQEncoding(*_vq_encode(x.detach(), codebook.detach(), candidates))


@overload
def vq_decode(
    codes: Tensor,
    codebook: Tensor,
    rows: int,
    dtype: torch.dtype | None = None,
    return_flag: Literal[False] = False,
) -> Tensor: ...


@overload
def vq_decode(
    codes: Tensor,
    codebook: Tensor,
    rows: int,
    dtype: torch.dtype | None = None,
    *,
    return_flag: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def vq_decode(
    codes: Tensor,
    codebook: Tensor,
    rows: int,
    dtype: torch.dtype | None = None,
    return_flag: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The words that `codes` stand for.

    Args:
        codes: [ceil(rows G b / 8)] uint8, as `vq_encode` packs them.
        codebook: [G, K, D] float32 (or float64, on backend `reference`), the one that coded them.
        rows: N.
        dtype: of the result: float32, float16 or bfloat16; None is the codebook's. Words are rounded to it.
        return_flag: also return whether some code was K or more, as damage on the wire can make it. Such a
            code is read as K - 1 in any case; nothing is read out of bounds.

    Returns:
        x [rows, G * D], or (x, flag [] bool).

    Raises:
        ValueError, TypeError, BackendError: as `vq_encode`.
    """
    x, flag = _vq_decode(codes, codebook.detach(), rows, codebook.dtype if dtype is None else dtype)
    return (x, flag) if return_flag else x


def vq_state(codebook: Tensor, count: float = 1.0) -> VQState:
    """The state from which updates keep `codebook` as it is: every word chosen `count` times, by itself."""
    _check_codebook(codebook)
    words = codebook.detach()
    return VQState(words.new_full(words.shape[:2], count), words * count)


def vq_update(
    codebook: Tensor,
    state: VQState,
    counts: Tensor,
    sums: Tensor,
    candidates: Tensor,
    decay: float = 0.99,
    eps: float = 1e-5,
    revive_below: float = 0.0,
) -> None:
    """Move codebook and state towards what a batch chose, in place and without waiting for a device.

    n <- decay n + (1 - decay) counts and m <- decay m + (1 - decay) sums; with N = sum_k n_k a word becomes
    m_k / s_k, s_k = (n_k + eps) / (N + K eps) * N. The j-th word with n below `revive_below` then takes the
    j-th candidate that is finite, while there are any, and its state with it: n = max(N / K, revive_below),
    m = n * candidate (arXiv 2106.06401 for the averages; the revival is ours). A group whose N is 0 keeps
    its words.

    Args:
        codebook: [G, K, D] float32, contiguous.
        state: counts n [G, K] and sums m [G, K, D], float32, contiguous; `vq_state` makes the first one.
        counts: [G, K] int64 and sums: [G, K, D] float32, of `vq_encode`, or added up over replicas.
        candidates: [G, R, D] float32, R may be 0.
        decay: in [0, 1].
        eps: of the Laplace smoothing, at least 0.
        revive_below: count of a batch under which a word is taken for unused; 0 revives none.

    All float64 together on backend `reference`.

    Raises:
        ValueError, TypeError, BackendError: as `vq_encode`.
    """
    _vq_update(
        codebook.detach(),
        state.counts.detach(),
        state.sums.detach(),
        counts,
        sums,
        candidates,
        decay,
        eps,
        revive_below,
    )


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _check_device(name: str, x: Tensor, other: str, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and {other} on {device}; move {name} with .to('{device}')")


def _check_codebook(codebook: Tensor) -> None:
    if codebook.dim() != 3 or 0 in codebook.shape:
        raise ValueError(f"codebook must be [G, K, D], none of them 0, got {_shape(codebook)}")
    if not 2 <= codebook.shape[1] <= MAX_CODEWORDS:
        raise ValueError(
            f"codebook must have 2 to {MAX_CODEWORDS} words a group, got K = {codebook.shape[1]} in "
            f"{_shape(codebook)}; use more groups of fewer words"
        )
    if codebook.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"codebook must be float32 (float64 for float64 x), got {codebook.dtype}; use codebook.float()"
        )


def _check_encode(x: Tensor, codebook: Tensor, candidates: int) -> None:
    _check_codebook(codebook)
    groups, _, depth = codebook.shape
    if x.dim() != 2:
        raise ValueError(f"x must be [N, C], got {_shape(x)}; bring channels last and flatten the rest")
    if x.shape[1] != groups * depth:
        raise ValueError(
            f"x must be [N, {groups * depth}] to fit codebook {_shape(codebook)} (C = G * D), got {_shape(x)}"
        )
    if x.dtype not in _NATIVE_DTYPE and x.dtype != torch.float64:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}; cast it")
    if (x.dtype == torch.float64) != (codebook.dtype == torch.float64):
        raise TypeError(
            f"float64 x and codebook go together, got x {x.dtype}, codebook {codebook.dtype}; cast"
        )
    if not 0 <= candidates <= MAX_CANDIDATES:
        raise ValueError(f"candidates must be 0 to {MAX_CANDIDATES}, got {candidates}")
    _check_device("codebook", codebook, "x", x.device)


def _check_decode(codes: Tensor, codebook: Tensor, rows: int, dtype: torch.dtype) -> None:
    _check_codebook(codebook)
    if rows < 0:
        raise ValueError(f"rows must be at least 0, got {rows}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, packed as vq_encode returns them, got {codes.dtype}")
    groups, codewords, _ = codebook.shape
    size = reference.bytes_of(rows, groups, codewords)
    if codes.dim() != 1 or codes.shape[0] != size:
        raise ValueError(
            f"codes must be [{size}] for {rows} rows of {groups} codes of {reference.bits_of(codewords)} bits, "
            f"got {_shape(codes)}; pass the rows and the codebook that were encoded"
        )
    if dtype not in _NATIVE_DTYPE and not dtype == codebook.dtype == torch.float64:
        raise TypeError(
            f"dtype must be float32, float16 or bfloat16, got {dtype} for codebook {codebook.dtype}"
        )
    _check_device("codes", codes, "codebook", codebook.device)


def _check_update(
    codebook: Tensor,
    state_counts: Tensor,
    state_sums: Tensor,
    counts: Tensor,
    sums: Tensor,
    candidates: Tensor,
    decay: float,
    eps: float,
    revive_below: float,
) -> None:
    _check_codebook(codebook)
    groups, codewords, depth = codebook.shape
    slots = candidates.shape[1] if candidates.dim() == 3 else 0
    shapes = {
        "state.counts": (state_counts, (groups, codewords), codebook.dtype),
        "state.sums": (state_sums, (groups, codewords, depth), codebook.dtype),
        "counts": (counts, (groups, codewords), torch.int64),
        "sums": (sums, (groups, codewords, depth), codebook.dtype),
        "candidates": (candidates, (groups, slots, depth), codebook.dtype),
    }
    for name, (x, shape, dtype) in shapes.items():
        if x.shape != shape:
            wanted = "[G, R, D]" if name == "candidates" else str(list(shape))
            raise ValueError(f"{name} must be {wanted} to fit codebook {_shape(codebook)}, got {_shape(x)}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {x.dtype}; cast it")
        _check_device(name, x, "codebook", codebook.device)
    for name, x in (("codebook", codebook), ("state.counts", state_counts), ("state.sums", state_sums)):
        if not x.is_contiguous():
            raise ValueError(f"{name} is updated in place and must be contiguous, got strides {x.stride()}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    if not (eps >= 0 and revive_below >= 0):
        raise ValueError(f"eps and revive_below must be at least 0, got {eps} and {revive_below}")


def _empty_encoding(x: Tensor, codebook: Tensor, candidates: int) -> Encoded:
    groups, codewords, depth = codebook.shape
    return (
        x.new_empty(reference.bytes_of(x.shape[0], groups, codewords), dtype=torch.uint8),
        codebook.new_empty((groups, codewords), dtype=torch.int64),
        codebook.new_empty((groups, codewords, depth)),
        codebook.new_empty(()),
        codebook.new_empty((groups, candidates, depth)),
        codebook.new_empty((groups, candidates), dtype=torch.float32),
        x.new_empty((), dtype=torch.bool),
    )


def _run_encode(x: Tensor, codebook: Tensor, candidates: int) -> Encoded:
    _check_encode(x, codebook, candidates)
    _, codewords, depth = codebook.shape
    run: Callable[..., Encoded] = _ENCODE.resolve(x.device.type, x.dtype, codewords, depth)
    if x.shape[0] == 0:
        # Kernels get no null pointers.
        return reference.vq_encode(x, codebook, candidates)
    return run(x.contiguous(), codebook.contiguous(), candidates)


def _fake_encode(x: Tensor, codebook: Tensor, candidates: int) -> Encoded:
    _check_encode(x, codebook, candidates)
    return _empty_encoding(x, codebook, candidates)


def _run_decode(codes: Tensor, codebook: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_decode(codes, codebook, rows, dtype)
    run: Callable[..., tuple[Tensor, Tensor]] = _DECODE.resolve(
        codes.device.type, codebook.dtype, codebook.shape[1]
    )
    if rows == 0:
        return _empty_decoded(codebook, 0, dtype)[0], codes.new_zeros((), dtype=torch.bool)
    return run(codes.contiguous(), codebook.contiguous(), rows, dtype)


def _fake_decode(codes: Tensor, codebook: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_decode(codes, codebook, rows, dtype)
    return _empty_decoded(codebook, rows, dtype)


def _empty_decoded(codebook: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    groups, _, depth = codebook.shape
    return (
        codebook.new_empty((rows, groups * depth), dtype=dtype),
        codebook.new_empty((), dtype=torch.bool),
    )


def _run_update(
    codebook: Tensor,
    state_counts: Tensor,
    state_sums: Tensor,
    counts: Tensor,
    sums: Tensor,
    candidates: Tensor,
    decay: float,
    eps: float,
    revive_below: float,
) -> None:
    _check_update(codebook, state_counts, state_sums, counts, sums, candidates, decay, eps, revive_below)
    run: Callable[..., None] = _UPDATE.resolve(codebook.device.type, codebook.dtype, codebook.shape[1])
    run(
        codebook,
        state_counts,
        state_sums,
        counts.contiguous(),
        sums.contiguous(),
        candidates.contiguous(),
        decay,
        eps,
        revive_below,
    )


def _fake_update(
    codebook: Tensor,
    state_counts: Tensor,
    state_sums: Tensor,
    counts: Tensor,
    sums: Tensor,
    candidates: Tensor,
    decay: float,
    eps: float,
    revive_below: float,
) -> None:
    _check_update(codebook, state_counts, state_sums, counts, sums, candidates, decay, eps, revive_below)


def _native_encode(x: Tensor, codebook: Tensor, candidates: int) -> Encoded:
    native: Any = _native.load()
    out = _empty_encoding(x, codebook, candidates)
    sizes = (x.shape[0], *codebook.shape, candidates, _NATIVE_DTYPE[x.dtype])
    threads = torch.get_num_threads()
    workspace = x.new_empty(native.vq_encode_cpu_workspace(*sizes, threads), dtype=torch.uint8)
    native.vq_encode_cpu(
        x.data_ptr(),
        codebook.data_ptr(),
        *(each.data_ptr() for each in out),
        workspace.data_ptr(),
        *sizes,
        threads,
    )
    return out


def _native_decode(codes: Tensor, codebook: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    native: Any = _native.load()
    out = x, flag = _empty_decoded(codebook, rows, dtype)
    sizes = (rows, *codebook.shape, _NATIVE_DTYPE[dtype])
    workspace = codes.new_empty(native.vq_decode_cpu_workspace(*sizes), dtype=torch.uint8)
    native.vq_decode_cpu(
        codes.data_ptr(),
        codebook.data_ptr(),
        x.data_ptr(),
        flag.data_ptr(),
        workspace.data_ptr(),
        *sizes,
        torch.get_num_threads(),
    )
    return out


def _native_update(
    codebook: Tensor,
    state_counts: Tensor,
    state_sums: Tensor,
    counts: Tensor,
    sums: Tensor,
    candidates: Tensor,
    decay: float,
    eps: float,
    revive_below: float,
) -> None:
    native: Any = _native.load()
    native.vq_update_cpu(
        codebook.data_ptr(),
        state_counts.data_ptr(),
        state_sums.data_ptr(),
        counts.data_ptr(),
        sums.data_ptr(),
        candidates.data_ptr(),
        *codebook.shape,
        candidates.shape[1],
        decay,
        eps,
        revive_below,
        torch.get_num_threads(),
    )


def _where(x: Tensor) -> tuple[int, int]:
    """Device and stream."""
    index = x.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


def _cuda_encode(x: Tensor, codebook: Tensor, candidates: int) -> Encoded:
    native: Any = _native.load()
    out = _empty_encoding(x, codebook, candidates)
    sizes = (x.shape[0], *codebook.shape, candidates)
    workspace = x.new_empty(native.vq_encode_cuda_workspace(*sizes), dtype=torch.uint8)
    native.vq_encode_cuda(
        x.data_ptr(),
        codebook.data_ptr(),
        *(each.data_ptr() for each in out),
        workspace.data_ptr(),
        workspace.numel(),
        *sizes,
        _NATIVE_DTYPE[x.dtype],
        *_where(x),
    )
    return out


def _cuda_decode(codes: Tensor, codebook: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    native: Any = _native.load()
    out = x, flag = _empty_decoded(codebook, rows, dtype)
    native.vq_decode_cuda(
        codes.data_ptr(),
        codebook.data_ptr(),
        x.data_ptr(),
        flag.data_ptr(),
        rows,
        *codebook.shape,
        _NATIVE_DTYPE[dtype],
        *_where(codes),
    )
    return out


def _cuda_update(
    codebook: Tensor,
    state_counts: Tensor,
    state_sums: Tensor,
    counts: Tensor,
    sums: Tensor,
    candidates: Tensor,
    decay: float,
    eps: float,
    revive_below: float,
) -> None:
    native: Any = _native.load()
    size = native.vq_update_cuda_workspace(*codebook.shape[:2])
    workspace = codebook.new_empty(size, dtype=torch.uint8)
    native.vq_update_cuda(
        codebook.data_ptr(),
        state_counts.data_ptr(),
        state_sums.data_ptr(),
        counts.data_ptr(),
        sums.data_ptr(),
        candidates.data_ptr(),
        workspace.data_ptr(),
        *codebook.shape,
        candidates.shape[1],
        decay,
        eps,
        revive_below,
        *_where(codebook),
    )


def _triton_encode(x: Tensor, codebook: Tensor, candidates: int) -> Encoded:
    from lct_fast.kernels import vq as kernels

    out = _empty_encoding(x, codebook, candidates)
    with torch.cuda.device(x.get_device()):
        kernels.vq_encode(x, codebook, *out)
    return out


_KERNEL_DTYPES = frozenset(_NATIVE_DTYPE)
_WORDS = frozenset({torch.float32})
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda",)}
# Products of matrices pay from 32 columns on. Decoding and updating multiply nothing: no triton there.
_ENCODE_PREFERENCE = {**_PREFERENCE, "cuda": ("triton", "cuda")}
_TRITON_CODEWORDS, _TRITON_DEPTHS, _TRITON_BEST = 4096, range(16, 257), range(32, 257)

_ENCODE = Op(
    "vq_encode",
    {
        "reference": Backend(reference.vq_encode, available.always),
        "cpu": Backend(_native_encode, available.cpu, _KERNEL_DTYPES),
        "triton": Backend(
            _triton_encode,
            available.triton,
            _KERNEL_DTYPES,
            _TRITON_CODEWORDS,
            _TRITON_DEPTHS,
            _TRITON_BEST,
        ),
        "cuda": Backend(_cuda_encode, available.cuda, _KERNEL_DTYPES),
    },
    _ENCODE_PREFERENCE,
)
_DECODE = Op(
    "vq_decode",
    {
        "reference": Backend(reference.vq_decode, available.always),
        "cpu": Backend(_native_decode, available.cpu, _WORDS),
        "cuda": Backend(_cuda_decode, available.cuda, _WORDS),
    },
    _PREFERENCE,
)
_UPDATE = Op(
    "vq_update",
    {
        "reference": Backend(reference.vq_update, available.always),
        "cpu": Backend(_native_update, available.cpu, _WORDS),
        "cuda": Backend(_cuda_update, available.cuda, _WORDS),
    },
    _PREFERENCE,
)

_vq_encode = register(
    "vq_encode(Tensor x, Tensor codebook, int candidates) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_encode,
    _fake_encode,
)
_vq_decode = register(
    "vq_decode(Tensor codes, Tensor codebook, SymInt rows, ScalarType dtype) -> (Tensor, Tensor)",
    _run_decode,
    _fake_decode,
)
_vq_update = register(
    "vq_update(Tensor(a!) codebook, Tensor(b!) state_counts, Tensor(c!) state_sums, Tensor counts, "
    "Tensor sums, Tensor candidates, float decay, float eps, float revive_below) -> ()",
    _run_update,
    _fake_update,
)
