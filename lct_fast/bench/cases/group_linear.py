"""group_linear forward and backward: a linear layer, its activation and its linear critic's logits."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu

from lct_fast import ops
from lct_fast.bench.case import DTYPES, Bench, Case, Outputs, Place, generator, normal, ours, plain_torch
from lct_fast.bench.rule import FINE, Expected, against

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "relu": relu, "gelu": gelu}
FORM = {
    "rows": None,
    "inputs": None,
    "outputs": None,
    "classes": None,
    "activation": ACTIVATIONS,
    "dtype": DTYPES,
}
SHAPES = {
    "cpu": (
        "4096,512,512,10,relu,f32",
        "16384,64,64,10,relu,f32",
        "4096,512,512,10,gelu,f32",
        "4096,512,512,10,relu,bf16",
        "256,1024,1024,10,relu,f32",
        "4096,512,512,100,relu,f32",
    ),
    "cuda": (
        "65536,512,512,10,relu,bf16",
        "65536,1024,1024,10,gelu,bf16",
        "65536,128,128,10,relu,bf16",
        "4096,1024,1024,10,relu,bf16",
        "65536,512,512,10,relu,f32",
    ),
}
NAMES = ("h", "logits", "dx", "dweight", "dbias", "dcritic_weight", "dcritic_bias")


class Inputs:
    """Layer and critic with weights of order 1/sqrt(fan in), and the critic's gradient at the logits."""

    def __init__(
        self, place: Place, rows: int, inputs: int, outputs: int, classes: int, activation: str, dtype: str
    ) -> None:
        draw, self.dtype, self.activation = generator(place), DTYPES[dtype], activation
        layer = (normal(draw, outputs, inputs) / math.sqrt(inputs), normal(draw, outputs))
        critic = (normal(draw, classes, outputs) / math.sqrt(outputs), normal(draw, classes))
        x = _away_from_zero(normal(draw, rows, inputs).to(self.dtype), *(t.to(self.dtype) for t in layer))
        self.tensors = (x, *(t.to(self.dtype) for t in (*layer, *critic)))
        self.dlogits = (normal(draw, rows, classes) / rows).to(self.dtype)
        self.arithmetic = torch.float32 if self.dtype == torch.float32 else torch.bfloat16
        # Forward, dx and dweight; the critic's three products.
        self.flops = 6 * rows * outputs * (inputs + classes)
        # x is read for h and for dweight, h written and read, dx written.
        self.traffic = (3 * x.numel() + 2 * rows * outputs) * x.element_size()

    def step(self, function: Callable[..., Any], dtype: torch.dtype | None = None) -> Callable[[], Outputs]:
        """Forward, and backward from the logits alone, as a critic gives it."""
        leaves = [t.to(dtype or t.dtype, copy=True).requires_grad_() for t in self.tensors]
        dlogits = self.dlogits.to(dtype or self.dtype)

        def run() -> Outputs:
            h, logits = function(*leaves)
            gradients = torch.autograd.grad(logits, leaves, dlogits)
            return dict(zip(NAMES, (h.detach(), logits.detach(), *gradients), strict=True))

        return run

    def plain(
        self, x: Tensor, weight: Tensor, bias: Tensor, critic: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = ACTIVATIONS[self.activation](linear(x, weight, bias))
        return h, linear(h, critic, shift)

    def fused(
        self, x: Tensor, weight: Tensor, bias: Tensor, critic: Tensor, shift: Tensor
    ) -> ops.GroupLinear:
        return ops.group_linear(x, weight, bias, self.activation, critic, shift)

    def expected(self) -> dict[str, Expected]:
        exact, plain = self.step(self.plain, torch.float64)(), self.step(self.plain)()
        eps = max(torch.finfo(self.dtype).eps, 8 * FINE)
        return {name: Expected(exact[name], plain[name], eps) for name in NAMES}


def _away_from_zero(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x with no pre-activation near 0: there rounding decides whether relu passes a gradient."""
    for _ in range(50):
        pre = linear(x.double(), weight.double(), bias.double())
        near = (pre.abs() < 1e-5).any(1)
        if not bool(near.any()):
            return x
        x[near] *= 1.01
    raise RuntimeError("some pre-activation stays near 0")


def _same(out: Outputs) -> Outputs:
    return out


def _build(place: Place, **fields: Any) -> Case:
    inputs = Inputs(place, **fields)
    contenders = [
        *ours(place, ("group_linear",), inputs.step(inputs.fused), _same),
        *plain_torch(place, inputs.plain, inputs.step, _same),
    ]
    return Case(contenders, against(inputs.expected()), inputs.traffic, inputs.flops, inputs.arithmetic)


BENCHES = (
    Bench(
        name="group_linear",
        covers=("group_linear", "group_linear_backward"),
        form=FORM,
        shapes=SHAPES,
        tiny="8,6,5,3,relu,f32",
        build=_build,
    ),
)
