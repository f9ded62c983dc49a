"""consensus_adjoint and consensus_update against the same formulas in torch."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lct_fast import ops
from lct_fast.bench.case import DTYPES, Bench, Case, Outputs, Place, generator, normal, ours, plain_torch
from lct_fast.bench.rule import FINE, Expected, against
from lct_fast.reference import consensus as reference

BETA, ETA = 0.01, 20.0
KINDS = ("penalty", "al")
FORM = {"rows": None, "depth": None, "kind": KINDS, "dtype": DTYPES}
SHAPES = {
    "cpu": (
        "128,16384,penalty,f32",
        "128,16384,al,f32",
        "128,16384,al,bf16",
        "64,1024,al,f32",
    ),
    "cuda": (
        "512,16384,penalty,bf16",
        "512,16384,al,bf16",
        "512,16384,al,f32",
        "64,1024,al,bf16",
    ),
}
EPS = {"f32": FINE, "f16": 2.0**-10, "bf16": 2.0**-7}


class Inputs:
    """x and p as layers give them; lambda and kappa as they are kept."""

    def __init__(self, place: Place, rows: int, depth: int, kind: str, dtype: str) -> None:
        draw = generator(place)
        self.x, self.p = (normal(draw, rows, depth).to(DTYPES[dtype]) for _ in range(2))
        self.lambda_ = self.x.float() + 0.1 * normal(draw, rows, depth)
        self.kappa = 0.1 * normal(draw, rows, depth) if kind == "al" else None
        self.eps = EPS[dtype]

    @property
    def wide_kappa(self) -> Tensor | None:
        return None if self.kappa is None else self.kappa.double()

    @property
    def kept(self) -> int:
        """Bytes of lambda and kappa."""
        return self.lambda_.nbytes + (0 if self.kappa is None else self.kappa.nbytes)


def _adjoint(place: Place, rows: int, depth: int, kind: str, dtype: str) -> Case:
    inputs = Inputs(place, rows, depth, kind, dtype)
    given = (inputs.x, inputs.lambda_, inputs.kappa, BETA)
    exact = reference.consensus_adjoint(inputs.x.double(), inputs.lambda_.double(), inputs.wide_kappa, BETA)
    plain = reference.consensus_adjoint(*given)
    d = inputs.lambda_.double() - inputs.x.double()
    terms = 0.5 * BETA * d.square() + (0 if inputs.wide_kappa is None else (inputs.wide_kappa * d).abs())
    check = against(
        {
            "loss": Expected(exact[0], plain[0], FINE, float(terms.sum(1).amax())),
            "p": Expected(exact[1], plain[1], inputs.eps),
        }
    )

    def step(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: function(*given)

    def outputs(out: Any) -> Outputs:
        return {"loss": out[0], "p": out[1]}

    contenders = [
        *ours(place, ("consensus_adjoint",), lambda: ops.consensus_adjoint(*given), outputs),
        *plain_torch(place, reference.consensus_adjoint, step, outputs),
    ]
    traffic = 2 * inputs.x.nbytes + inputs.kept + 4 * rows
    return Case(contenders, check, traffic, 7 * rows * depth)


def _update(place: Place, rows: int, depth: int, kind: str, dtype: str) -> Case:
    inputs = Inputs(place, rows, depth, kind, dtype)
    given = (inputs.lambda_, inputs.kappa, inputs.p, inputs.x, BETA, ETA)
    wide = (inputs.lambda_.double(), inputs.wide_kappa, inputs.p.double(), inputs.x.double(), BETA, ETA)
    exact, plain = reference.consensus_update(*wide), reference.consensus_update(*given)
    expected = {"lambda": Expected(exact[0], plain[0], FINE)}
    if exact[1] is not None and plain[1] is not None:
        expected["kappa"] = Expected(exact[1], plain[1], FINE, float(exact[0].abs().amax()))

    def step(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: function(*given)

    def outputs(out: Any) -> Outputs:
        return {"lambda": out[0]} if out[1] is None else {"lambda": out[0], "kappa": out[1]}

    contenders = [
        *ours(place, ("consensus_update",), lambda: ops.consensus_update(*given), outputs),
        *plain_torch(place, reference.consensus_update, step, outputs),
    ]
    return Case(contenders, against(expected), 2 * inputs.x.nbytes + 2 * inputs.kept, 9 * rows * depth)


BENCHES = (
    Bench("consensus_adjoint", ("consensus_adjoint",), FORM, SHAPES, "7,131,al,f32", _adjoint),
    Bench("consensus_update", ("consensus_update",), FORM, SHAPES, "7,131,al,bf16", _update),
)
