"""Inputs of perturb and score that meet every branch of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.reference import perturb as reference
from tests.ladder import PLACES as ALL_PLACES
from tests.ladder import assert_same_bits

# No Triton kernels: this is elementwise work.
PLACES = tuple(place for place in ALL_PLACES if place.backend != "triton")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SEED = 0x7ABC_DEF0_1234_5678

# z's shape, copies: why.
SHAPES = {
    ((0, 3), 2): "no rows",
    ((4, 0), 1): "no channels",
    ((3,), 2): "rows alone",
    ((1, 1), 1): "one value",
    ((2, 5), 1): "runs of one value to a channel",
    ((3, 4, 7), 2): "copies whose end falls inside a vector",
    ((2, 3, 4, 4), 4): "an image of whole vectors",
    ((6, 1, 130), 3): "one channel; longer than half a chunk",
    ((8, 33, 67), 2): "two tasks of the CPU kernels, and rows that end inside chunks",
}
# Where noise starts: at a counter, inside one, past 32 bits of counters.
OFFSETS = (0, 1, 3, 6, 2**34 - 1, 2**61 + 2)


@dataclass(frozen=True)
class Given:
    """Arguments of one call of each op."""

    z: Tensor
    sigma: Tensor
    loss: Tensor
    offset: int
    antithetic: bool
    copies: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.copies * self.z.shape[0], *self.z.shape[1:])


def make(
    shape: tuple[int, ...],
    copies: int,
    dtype: torch.dtype,
    *,
    offset: int = 0,
    antithetic: bool = False,
    device: str = "cpu",
) -> Given:
    """sigma is 0-dim at every second offset, else one for each channel."""
    draw = torch.Generator().manual_seed(len(shape) + copies)
    z = torch.randn(shape, generator=draw).to(dtype)
    channels = shape[1] if len(shape) > 1 else 1
    sigma = torch.rand(channels, generator=draw) + 0.01
    sigma = torch.tensor(0.3) if offset % 2 else sigma
    loss = torch.randn(copies * shape[0], generator=draw)
    return Given(z.to(device), sigma.to(device), loss.to(device), offset, antithetic, copies)


def check(given: Given, out_dtype: torch.dtype) -> None:
    """Both ops, on the backend in force, have the reference's bits."""
    noise = (SEED, given.offset)
    got = ops.perturb(given.z, given.sigma, *noise, given.antithetic, given.copies)
    z, sigma, loss = given.z.cpu(), given.sigma.cpu(), given.loss.cpu()
    expected = reference.perturb(z, sigma, *noise, given.antithetic, given.copies)
    assert_same_bits("perturb", got.cpu(), expected)
    for total in (None, 1000):
        out = ops.score(given.loss, given.sigma, *noise, given.shape, given.antithetic, total, out_dtype)
        expected = reference.score(loss, sigma, *noise, given.shape, given.antithetic, total, out_dtype)
        assert_same_bits("score", out.cpu(), expected)
