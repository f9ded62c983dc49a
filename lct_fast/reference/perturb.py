"""perturb and score in plain torch: normal noise added to values, and a loss times the same noise.

    perturb   z + sigma * eps
    score     loss / (N * sigma) * eps

eps comes from words of Philox4x32-10 (Salmon et al., SC 2011): word i of the stream `seed` is word i mod 4 of
counter {i / 4, 0, 0} and key `seed`. A word gives u = ((word >> 9) + 0.5) * 2^-23, and u the normal by Wichura's
rational PPND7 for the inverse of its distribution (Applied Statistics 37, 1988, algorithm AS 241). The logarithm that
the tails take is a series: libraries and devices round their own ones differently.

Everything is float32, and every operation is a product, a sum, a quotient or a root, rounded once and to the nearest,
so any backend that does the same has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85

# sqrt(1/2): mantissas are taken from there to sqrt(2).
_ROOT_HALF = 0x3F3504F3
_LOG_2 = 0.69314718
# Beyond this tail the rational in the root of the logarithm is used: PPND7's 0.5 - 0.425.
_TAIL = 0.075


def perturb(
    z: Tensor, sigma: Tensor, seed: int, offset: int, antithetic: bool = False, copies: int = 1
) -> Tensor:
    """z + sigma * eps, for `copies` of z one behind the other.

    Args:
        z: [N, O, ...] or [N]. sigma: [O] or 0-dim, float32.
        seed, offset: noise starts with word `offset` of the stream `seed`; every value takes one.
        antithetic: the second half of the rows has -eps of the first half.
        copies: rows of the result are copies * N.

    Returns:
        [copies * N, O, ...] in the dtype of z.
    """
    shape = (copies * z.shape[0], *z.shape[1:])
    eps = normals(shape, seed, offset, antithetic, z.device)
    wide = z.float().repeat(copies, *(1 for _ in shape[1:]))
    return (wide + _by_channel(sigma, len(shape)) * eps).to(z.dtype)


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
    """loss / (total * sigma) * eps, the eps that `perturb` adds.

    Args:
        loss: [N] float32. sigma: as in `perturb`.
        shape: [N, O, ...], that of the noise.
        total: rows of the mean, if this is a part of them; default N.
        dtype: of the result.
    """
    rows = torch.tensor(len(loss) if total is None else total, dtype=torch.float32, device=loss.device)
    eps = normals(shape, seed, offset, antithetic, loss.device)
    row = loss.float().view(-1, *(1 for _ in shape[1:]))
    return (row / (rows * _by_channel(sigma, len(shape))) * eps).to(dtype)


def _by_channel(sigma: Tensor, dims: int) -> Tensor:
    return sigma.view(-1, *(1 for _ in range(dims - 2))) if sigma.dim() else sigma


def normals(
    shape: Sequence[int], seed: int, offset: int, antithetic: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """eps of the given shape, float32."""
    size = torch.Size(shape).numel()
    count = size // 2 if antithetic else size
    eps = normal(words(seed, offset, count, device))
    return (torch.cat([eps, -eps]) if antithetic else eps).view(*shape)


def words(seed: int, offset: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Words [offset, offset + count) of the stream `seed`: int64 [count] of 32 bits each."""
    first, skip = offset // 4, offset % 4
    counters = torch.arange(first, first + -(-(skip + count) // 4), device=device)
    zero = torch.zeros_like(counters)
    four = philox((counters & _LOW, (counters >> 32) & _LOW, zero, zero), (seed & _LOW, (seed >> 32) & _LOW))
    return torch.stack(four, 1).flatten()[skip : skip + count]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words for each counter, in int64 of which 32 bits are used."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        upper_a, lower_a = _multiply(_MULTIPLIERS[0], a)
        upper_c, lower_c = _multiply(_MULTIPLIERS[1], c)
        a, b, c, d = upper_c ^ b ^ low, lower_c, upper_a ^ d ^ high, lower_a
        low, high = (low + _KEY_STEPS[0]) & _LOW, (high + _KEY_STEPS[1]) & _LOW
    return a, b, c, d


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of a product of 32 bits each, by halves of x: int64 is one bit short of it."""
    lower = factor * (x & 0xFFFF)
    upper = factor * (x >> 16) + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF


def normal(word: Tensor) -> Tensor:
    """The standard normal value of each word, float32."""
    return quantile(((word >> 9).float() + 0.5) * 2.0**-23)


def quantile(u: Tensor) -> Tensor:
    """The inverse of the normal distribution's function at u, float32 within [2^-24, 1 - 2^-24].

    The relative error is below 1e-6.
    """
    q = u - 0.5
    r = 0.180625 - q * q
    above = ((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179
    below = ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0
    middle = q * above / below

    p = 0.5 - q.abs()
    bits = p.view(torch.int32)
    exponent = (bits - _ROOT_HALF) >> 23
    mantissa = (bits - (exponent << 23)).view(torch.float32)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    s2 = s * s
    series = (((0.11111111 * s2 + 0.14285715) * s2 + 0.2) * s2 + 0.33333334) * s2 + 1.0
    minus_log = (-exponent).float() * _LOG_2 - (s + s) * series
    # torch's root of float32 is not always the nearest float; that of float64 is, once rounded.
    t = minus_log.double().sqrt().float() - 1.6
    above = ((0.17023821103 * t + 1.3067284816) * t + 2.7568153900) * t + 1.4234372777
    below = (0.12021132975 * t + 0.73700164250) * t + 1.0
    return torch.where(p > _TAIL, middle, (above / below).copysign(q))
