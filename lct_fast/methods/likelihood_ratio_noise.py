"""Where the noise of likelihood-ratio training comes from: made again from a seed, or points that fill space evenly.

Copies of a batch are folded into its rows, copy by copy: row c * B + b is sample b of copy c. With antithetic pairs the
second half of the copies has the negatives of the first.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from lct_fast import ops

SAMPLING = ("random", "sobol", "halton")


class Noise(Protocol):
    """One draw of eps for the rows of one chunk of copies; the same each time it is asked."""

    def add(self, z: Tensor, sigma: Tensor, copies: int = 1) -> Tensor:
        """z [M, ...] repeated ``copies`` times, plus sigma (0-dim) * eps."""
        ...

    def error(self, loss: Tensor, sigma: Tensor, shape: torch.Size, total: int) -> Tensor:
        """loss [M] / (total * sigma) * eps, of the given shape [M, ...], in float32: it is summed over copies."""
        ...


class RandomNoise:
    """Independent normals, made again from (seed, offset) wherever they are needed: nothing is stored."""

    def __init__(self, seed: int, offset: int, antithetic: bool) -> None:
        self.seed, self.offset, self.antithetic = seed, offset, antithetic

    def add(self, z: Tensor, sigma: Tensor, copies: int = 1) -> Tensor:
        return ops.perturb(z, sigma, self.seed, self.offset, self.antithetic, copies)

    def error(self, loss: Tensor, sigma: Tensor, shape: torch.Size, total: int) -> Tensor:
        return ops.score(loss, sigma, self.seed, self.offset, shape, self.antithetic, total)


class EvenNoise:
    """Points of a Sobol or Halton sequence through the inverse of the normal distribution; kept in memory.

    Copy c of every sample takes point ``first`` + c, moved around the unit cube by a shift that each sample draws for
    itself (Cranley and Patterson 1976). So a sample's copies are spread evenly, samples are independent, and each value
    alone is uniform: the estimate stays unbiased.

    Args:
        kind: "sobol" or "halton".
        seed: of the shifts; the same for all chunks of a batch, which have different ``first``.
        first: number of the first point.
        copies: in this chunk.
        antithetic: as above; the second half takes no points.
    """

    def __init__(self, kind: str, seed: int, first: int, copies: int, antithetic: bool) -> None:
        self.kind, self.seed, self.first = kind, seed, first
        self.copies, self.antithetic = copies, antithetic
        self._eps: Tensor | None = None

    def add(self, z: Tensor, sigma: Tensor, copies: int = 1) -> Tensor:
        wide = z.repeat(copies, *(1 for _ in z.shape[1:]))
        return (wide + sigma * self._values(wide.shape, z.device)).to(z.dtype)

    def error(self, loss: Tensor, sigma: Tensor, shape: torch.Size, total: int) -> Tensor:
        row = (loss / (total * sigma)).view(-1, *(1 for _ in shape[1:]))
        return row * self._values(shape, loss.device)

    def _values(self, shape: torch.Size, device: torch.device) -> Tensor:
        if self._eps is None:
            count = self.copies // 2 if self.antithetic else self.copies
            samples, features = shape[0] // self.copies, shape[1:].numel()
            points = _points(self.kind, self.first, count, features).to(device)
            shift = torch.Generator().manual_seed(self.seed)
            moved = points[:, None] + torch.rand(samples, features, generator=shift).to(device)
            # Cells of float32 that the quantile takes: their middle is never 0 or 1.
            cells = ((moved % 1.0) * 2.0**23).floor().clamp(max=2**23 - 1)
            eps = ops.normal_quantile((cells + 0.5) * 2.0**-23)
            self._eps = torch.cat([eps, -eps]) if self.antithetic else eps
        return self._eps.view(shape)


def _points(kind: str, first: int, count: int, dimensions: int) -> Tensor:
    """[count, dimensions] in [0, 1), points number ``first`` on."""
    if dimensions > SobolEngine.MAXDIM:
        raise ValueError(
            f"sampling {kind!r} has at most {SobolEngine.MAXDIM} values a sample to disturb in one place, got "
            f"{dimensions}: use sampling='random'"
        )
    if kind == "sobol":
        engine = SobolEngine(dimensions)
        # Point 0 is the origin; the shift makes it as good as any.
        return engine.fast_forward(first).draw(count) if first else engine.draw(count)
    return torch.stack([_radical_inverse(first + 1, count, base) for base in _primes(dimensions)], 1)


def _radical_inverse(first: int, count: int, base: int) -> Tensor:
    """[count]: the digits of first, first + 1, ... in ``base``, mirrored behind the point."""
    number = torch.arange(first, first + count, dtype=torch.float64)
    result, weight = torch.zeros(count, dtype=torch.float64), 1.0 / base
    while bool((number > 0).any()):
        result += weight * (number % base)
        number = (number / base).floor()
        weight /= base
    return result.float().clamp(max=1 - 2**-24)


@cache
def _primes(count: int) -> tuple[int, ...]:
    """The first ``count`` primes."""
    # The n-th prime is below n (log n + log log n) for n >= 6, which 1.3 n log2(n) exceeds.
    limit = max(15, int(1.3 * count * count.bit_length()))
    sieve = torch.ones(limit + 1, dtype=torch.bool)
    sieve[:2] = False
    for i in range(2, int(limit**0.5) + 1):
        if sieve[i]:
            sieve[i * i :: i] = False
    return tuple(sieve.nonzero()[:count, 0].tolist())
