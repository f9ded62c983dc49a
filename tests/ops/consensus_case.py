"""Inputs of consensus that meet every branch of it, and how far its results may be from float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.reference import consensus as reference
from tests.ladder import PLACES as ALL_PLACES
from tests.ladder import assert_rule

# No Triton kernels: this is elementwise work and a sum.
PLACES = tuple(place for place in ALL_PLACES if place.backend != "triton")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
BETA, ETA = 0.3, 0.7

# Shapes: why.
SHAPES = {
    (0, 5): "no rows",
    (3, 0): "rows of nothing",
    (1, 1): "one value",
    (3, 15): "one short of a vector",
    (2, 33): "two vectors and one value",
    (5, 512): "exactly one chunk of the CPU's sums, two turns of a block of threads",
    (2, 3, 13, 14): "feature maps; a chunk and a short vector",
    (130, 300): "two tasks of the CPU kernels",
    (1, 40_001): "one long row; two tasks of the update",
}


@dataclass
class Case:
    """A state and what the layers gave: lambda, kappa (or None), p at lambda, and x."""

    lambda_: Tensor
    kappa: Tensor | None
    p: Tensor
    x: Tensor

    def to(self, device: str) -> "Case":
        kappa = None if self.kappa is None else self.kappa.to(device)
        return Case(self.lambda_.to(device), kappa, self.p.to(device), self.x.to(device))


def make(shape: tuple[int, ...], dtype: torch.dtype, *, multipliers: bool, seed: int = 0) -> Case:
    draw = torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))
    x, p, offset, kappa = (torch.randn(shape, generator=draw) for _ in range(4))
    x = x.to(dtype)
    return Case(x.float() + 0.5 * offset, 0.1 * kappa if multipliers else None, p.to(dtype), x)


def check(case: Case, device: str) -> None:
    """Both ops, on the backend in force, are as near to float64 as plain torch in the same precision."""
    eps = EPS[case.x.dtype]
    here = case.to(device)
    rows = (len(case.x), -1) if case.x.numel() else (len(case.x), 0)
    x, lambda_ = case.x.reshape(rows), case.lambda_.reshape(rows)
    kappa = None if case.kappa is None else case.kappa.reshape(rows)
    wide = None if kappa is None else kappa.double()

    exact = reference.consensus_adjoint(x.double(), lambda_.double(), wide, BETA)
    plain = reference.consensus_adjoint(x, lambda_, kappa, BETA)
    got = ops.consensus_adjoint(here.x, here.lambda_, here.kappa, BETA)
    assert got.loss.dtype == torch.float32 and got.p.dtype == case.x.dtype and got.p.shape == case.x.shape
    d = lambda_.double() - x.double()
    terms = 0.5 * BETA * d.square() + (0 if wide is None else (wide * d).abs())
    assert_rule(
        "loss", got.loss, plain[0], exact[0], 2.0**-23, float(terms.sum(1).amax()) if terms.numel() else 0
    )
    assert_rule("p", got.p.cpu().reshape(rows), plain[1], exact[1], eps)

    wide = None if case.kappa is None else case.kappa.double()
    args = (case.p, case.x, BETA, ETA)
    exact_update = reference.consensus_update(
        case.lambda_.double(), wide, case.p.double(), case.x.double(), BETA, ETA
    )
    plain_update = reference.consensus_update(case.lambda_, case.kappa, *args)
    updated = ops.consensus_update(here.lambda_, here.kappa, here.p, here.x, BETA, ETA)
    assert_rule("lambda", updated.lambda_, plain_update[0], exact_update[0], 2.0**-23)
    if case.kappa is None:
        assert updated.kappa is None
        return
    assert updated.kappa is not None and plain_update[1] is not None and exact_update[1] is not None
    assert_rule("kappa", updated.kappa, plain_update[1], exact_update[1], 2.0**-23, 1.0)
