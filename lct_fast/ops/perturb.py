"""perturb and score: normal noise on values, and a loss times the same noise, which is made again and never stored.

The formula is in `lct_fast.reference.perturb`, the kernels' contract in csrc/include/lct/perturb.h. This file holds the
ops themselves: schema, checks, shapes and backends.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lct_fast import _native
from lct_fast.ops import available
from lct_fast.ops.backend import Backend, Op
from lct_fast.ops.register import register
from lct_fast.reference import perturb as reference

_NATIVE_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_LAST = 2**63 - 1


def perturb(
    z: Tensor, sigma: Tensor, seed: int, offset: int = 0, antithetic: bool = False, copies: int = 1
) -> Tensor:
    """z + sigma * eps with standard normal eps, for `copies` of z one behind the other.

    Value i of the result, in row-major order, takes number offset + i of the stream `seed`, so any part of the noise
    can be made alone, and every backend gives the same bits: Philox4x32-10 words through a rational for the inverse of
    the normal distribution, |eps| < 5.3 in steps of 2^-23 of probability. The result carries no gradient.

    Args:
        z: [N, O, ...] or [N], float32, float16 or bfloat16. May be empty.
        sigma: [O] or 0-dim, float32.
        seed: number of the stream, 0 <= seed < 2^63.
        offset: number of the first value, >= 0; another call's noise starts size (antithetic: size / 2) behind it.
        antithetic: row r of the second half of the result has exactly -eps of row r of the first; copies * N is even.
        copies: rows of the result are copies * N, row r made from row r mod N of z.

    Returns:
        [copies * N, O, ...], dense and row-major, in the dtype of z.

    Raises:
        ValueError: sizes that do not belong together, or a number out of range.
        TypeError: a dtype does not fit.
        BackendError: the backend asked for cannot run here.
    """
    out: Tensor = _perturb(z, sigma, seed, offset, antithetic, copies)
    return out


def score(
    loss: Tensor,
    sigma: Tensor,
    seed: int,
    offset: int,
    shape: Sequence[int],
    antithetic: bool = False,
    total: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """loss / (N * sigma) * eps, the likelihood-ratio error at a perturbed value (arXiv 2305.08960).

    eps is what `perturb` added with the same seed, offset, shape and `antithetic`. What a layer's backward would get as
    the gradient at its output, this stands in for: torch's weight gradients do the rest.

    Args:
        loss: [N] float32, of each row; a baseline already taken off.
        sigma: [O] or 0-dim, float32, above 0.
        seed, offset, antithetic: as in `perturb`.
        shape: [N, O, ...], that of `perturb`'s result.
        total: N of the mean, where these rows are a part of them; default the rows here.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        `shape` in `dtype`.

    Raises:
        ValueError, TypeError, BackendError: as `perturb`.
    """
    total = len(loss) if total is None and loss.dim() else total
    out: Tensor = _score(loss, sigma, seed, offset, list(shape), antithetic, total or 1, dtype)
    return out


def _check_noise(shape: Sequence[int], sigma: Tensor, seed: int, offset: int, antithetic: bool) -> None:
    if sigma.dtype != torch.float32:
        raise TypeError(f"sigma must be float32, got {sigma.dtype}; cast it")
    channels = shape[1] if len(shape) > 1 else 1
    if sigma.dim() > 1 or (sigma.dim() == 1 and sigma.shape[0] != channels):
        raise ValueError(
            f"sigma must be 0-dim or [{channels}], one for each channel, got {list(sigma.shape)}; reshape it"
        )
    for name, value in (("seed", seed), ("offset", offset)):
        if not 0 <= value <= _LAST:
            raise ValueError(f"{name} must be within 0 .. 2^63 - 1, got {value}")
    if antithetic and shape[0] % 2:
        raise ValueError(
            f"antithetic noise comes in pairs: expected an even number of rows, got {shape[0]}; use more copies"
        )


def _check(z: Tensor, sigma: Tensor, seed: int, offset: int, antithetic: bool, copies: int) -> None:
    if z.dim() < 1:
        raise ValueError("z must be [N, O, ...] or [N], got a 0-dim tensor; give it a dimension of rows")
    if z.dtype not in _NATIVE_DTYPE:
        raise TypeError(f"z must be float32, float16 or bfloat16, got {z.dtype}; cast it")
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    _check_device("z", z, sigma)
    _check_noise((copies * z.shape[0], *z.shape[1:]), sigma, seed, offset, antithetic)


def _check_score(
    loss: Tensor,
    sigma: Tensor,
    seed: int,
    offset: int,
    shape: Sequence[int],
    antithetic: bool,
    total: int,
    dtype: torch.dtype,
) -> None:
    if loss.dtype != torch.float32:
        raise TypeError(f"loss must be float32, got {loss.dtype}; cast it")
    if loss.dim() != 1 or not shape or loss.shape[0] != shape[0]:
        raise ValueError(
            f"loss must be [N], one for each row of shape [N, O, ...], got {list(loss.shape)} and {list(shape)}"
        )
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    if dtype not in _NATIVE_DTYPE:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}; cast the result")
    _check_device("loss", loss, sigma)
    _check_noise(shape, sigma, seed, offset, antithetic)


def _check_device(name: str, x: Tensor, sigma: Tensor) -> None:
    if sigma.device != x.device:
        raise ValueError(
            f"sigma is on {sigma.device} and {name} on {x.device}; move it with .to({name}.device)"
        )


def _run(z: Tensor, sigma: Tensor, seed: int, offset: int, antithetic: bool, copies: int) -> Tensor:
    _check(z, sigma, seed, offset, antithetic, copies)
    run: Callable[..., Tensor] = _PERTURB.resolve(z.device.type, z.dtype)
    if z.numel() == 0:
        return _fake(z, sigma, seed, offset, antithetic, copies)
    return run(z.detach().contiguous(), sigma.detach().contiguous(), seed, offset, antithetic, copies)


def _run_score(
    loss: Tensor,
    sigma: Tensor,
    seed: int,
    offset: int,
    shape: Sequence[int],
    antithetic: bool,
    total: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_score(loss, sigma, seed, offset, shape, antithetic, total, dtype)
    run: Callable[..., Tensor] = _SCORE.resolve(loss.device.type, dtype)
    if torch.Size(shape).numel() == 0:
        return _fake_score(loss, sigma, seed, offset, shape, antithetic, total, dtype)
    return run(
        loss.detach().contiguous(), sigma.detach().contiguous(), seed, offset, shape, antithetic, total, dtype
    )


def _fake(z: Tensor, sigma: Tensor, seed: int, offset: int, antithetic: bool, copies: int) -> Tensor:
    _check(z, sigma, seed, offset, antithetic, copies)
    return z.new_empty((copies * z.shape[0], *z.shape[1:]))


def _fake_score(
    loss: Tensor,
    sigma: Tensor,
    seed: int,
    offset: int,
    shape: Sequence[int],
    antithetic: bool,
    total: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_score(loss, sigma, seed, offset, shape, antithetic, total, dtype)
    return loss.new_empty(tuple(shape), dtype=dtype)


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(output)
    ctx.set_materialize_grads(False)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, *_: Any) -> tuple[None, ...]:
    return (None,) * ctx.inputs


def _native_perturb(
    z: Tensor, sigma: Tensor, seed: int, offset: int, antithetic: bool, copies: int
) -> Tensor:
    native: Any = _native.load()
    out = _fake(z, sigma, seed, offset, antithetic, copies)
    call = native.perturb_cuda if z.is_cuda else native.perturb_cpu
    call(
        z.data_ptr(),
        sigma.data_ptr(),
        out.data_ptr(),
        *_sizes(out.shape),
        copies,
        sigma.numel(),
        seed,
        offset,
        antithetic,
        _NATIVE_DTYPE[z.dtype],
        *_where(z),
    )
    return out


def _native_score(
    loss: Tensor,
    sigma: Tensor,
    seed: int,
    offset: int,
    shape: Sequence[int],
    antithetic: bool,
    total: int,
    dtype: torch.dtype,
) -> Tensor:
    native: Any = _native.load()
    out = _fake_score(loss, sigma, seed, offset, shape, antithetic, total, dtype)
    call = native.score_cuda if loss.is_cuda else native.score_cpu
    call(
        loss.data_ptr(),
        sigma.data_ptr(),
        out.data_ptr(),
        *_sizes(out.shape),
        total,
        sigma.numel(),
        seed,
        offset,
        antithetic,
        _NATIVE_DTYPE[dtype],
        *_where(loss),
    )
    return out


def _sizes(shape: torch.Size) -> tuple[int, int, int]:
    """Rows, channels, and values of a channel in a row."""
    return shape[0], shape[1] if len(shape) > 1 else 1, shape[2:].numel()


def _where(x: Tensor) -> tuple[int, ...]:
    """Device and stream, or the number of threads."""
    if not x.is_cuda:
        return (torch.get_num_threads(),)
    index = x.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda",)}

_PERTURB = Op(
    "perturb",
    {
        "reference": Backend(reference.perturb, available.always),
        "cpu": Backend(_native_perturb, available.cpu),
        "cuda": Backend(_native_perturb, available.cuda),
    },
    _PREFERENCE,
)
_SCORE = Op(
    "score",
    {
        "reference": Backend(reference.score, available.always),
        "cpu": Backend(_native_score, available.cpu),
        "cuda": Backend(_native_score, available.cuda),
    },
    _PREFERENCE,
)

_perturb = register(
    "perturb(Tensor z, Tensor sigma, SymInt seed, SymInt offset, bool antithetic, SymInt copies) -> Tensor",
    _run,
    _fake,
    _no_gradient,
    _backward,
)
_score = register(
    "score(Tensor loss, Tensor sigma, SymInt seed, SymInt offset, SymInt[] shape, bool antithetic, SymInt total, "
    "ScalarType dtype) -> Tensor",
    _run_score,
    _fake_score,
    _no_gradient,
    _backward,
)


def normal_quantile(u: Tensor) -> Tensor:
    """The inverse of the normal distribution's function, as `perturb` has it: plain torch, the same bits everywhere.

    Args:
        u: float32 of any shape, within [2^-24, 1 - 2^-24].

    Returns:
        float32 of u's shape; the relative error is below 1e-6.

    Raises:
        TypeError: u is not float32.
    """
    if u.dtype != torch.float32:
        raise TypeError(f"u must be float32, got {u.dtype}; cast it")
    return reference.quantile(u)
