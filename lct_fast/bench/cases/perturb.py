"""perturb and score against the same formula in torch."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.bench.case import DTYPES, Bench, Case, Outputs, Place, generator, normal, ours, plain_torch
from lct_fast.bench.rule import Accuracy, Expected, WrongOutput, judge
from lct_fast.reference import perturb as reference

SEED = 2024
FORM = {"rows": None, "channels": None, "inner": None, "copies": None, "dtype": DTYPES}
SHAPES = {
    "cpu": ("64,32,64,32,f32", "64,512,1,32,f32", "64,32,64,32,bf16"),
    "cuda": ("128,64,1024,32,f32", "128,512,1,32,f32", "128,64,1024,32,bf16"),
}
# Of one value: ten rounds of two products and four other operations on a counter of four, then the normal's rational.
OPERATIONS = 10 * 6 // 4 + 40


def _check(name: str, exact: Tensor, plain: Tensor, eps: float) -> Callable[..., Accuracy]:
    def check(outputs: Mapping[str, Tensor], slack: float) -> Accuracy:
        """Ours has the reference's bits; the compiler may fuse what the reference rounds."""
        got = outputs[name]
        if slack == 1.0 and not torch.equal(got, plain):
            raise WrongOutput("its bits are not the reference's")
        return judge(name, got, Expected(exact, plain, eps), slack)

    return check


def _perturb(place: Place, rows: int, channels: int, inner: int, copies: int, dtype: str) -> Case:
    draw = generator(place)
    z = normal(draw, rows, channels, inner).to(DTYPES[dtype])
    sigma = normal(draw, channels).abs() + 0.1
    given = (z, sigma, SEED, 0, True, copies)
    plain = reference.perturb(*given)
    eps = reference.normals(plain.shape, SEED, 0, True, z.device).double()
    exact = z.double().repeat(copies, 1, 1) + sigma.double()[:, None] * eps

    def step(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(*given)

    def outputs(out: Tensor) -> Outputs:
        return {"noisy": out}

    contenders = [
        *ours(place, ("perturb",), lambda: ops.perturb(*given), outputs),
        *plain_torch(place, reference.perturb, step, outputs),
    ]
    check = _check("noisy", exact, plain, torch.finfo(z.dtype).eps)
    return Case(contenders, check, z.nbytes + plain.nbytes, OPERATIONS * plain.numel())


def _score(place: Place, rows: int, channels: int, inner: int, copies: int, dtype: str) -> Case:
    draw = generator(place)
    loss, sigma = normal(draw, copies * rows), normal(draw, channels).abs() + 0.1
    shape = (copies * rows, channels, inner)
    given = (loss, sigma, SEED, 0, shape, True, None, DTYPES[dtype])
    plain = reference.score(*given)
    eps = reference.normals(shape, SEED, 0, True, loss.device).double()
    exact = loss.double()[:, None, None] / (len(loss) * sigma.double()[:, None]) * eps

    def step(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(*given)

    def outputs(out: Tensor) -> Outputs:
        return {"error": out}

    contenders = [
        *ours(place, ("score",), lambda: ops.score(*given), outputs),
        *plain_torch(place, reference.score, step, outputs),
    ]
    check = _check("error", exact, plain, torch.finfo(plain.dtype).eps)
    return Case(contenders, check, loss.nbytes + plain.nbytes, OPERATIONS * plain.numel())


BENCHES = (
    Bench("perturb", ("perturb",), FORM, SHAPES, "6,5,3,2,f32", _perturb),
    Bench("score", ("score",), FORM, SHAPES, "6,5,3,2,f32", _score),
)
