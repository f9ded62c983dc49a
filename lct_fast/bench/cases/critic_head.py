"""critic_head, every gradient in one call, and critic_head_wgrad, the weights' gradients that come later."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lct_fast import ops
from lct_fast.bench.case import (
    DTYPES,
    Bench,
    Case,
    Contender,
    Outputs,
    Place,
    generator,
    normal,
    ours,
    plain_torch,
)
from lct_fast.bench.rivals import installed
from lct_fast.bench.rule import FINE, Expected, against
from lct_fast.reference import critic_head as reference

FORM = {"rows": None, "depth": None, "classes": None, "dtype": DTYPES}
SHAPES = {
    "cpu": (
        "65536,128,10,f32",
        "8192,512,100,f32",
        "65536,128,10,bf16",
        "256,512,10,f32",
        "128,8192,10,f32",
        "2048,2048,1000,f32",
    ),
    "cuda": (
        "65536,128,10,bf16",
        "65536,512,100,bf16",
        "65536,512,1000,bf16",
        "4096,2048,10,bf16",
        "256,512,10,bf16",
        "65536,2048,10,bf16",
        "65536,128,10,f32",
        "4096,512,1000,bf16",
        "16384,512,100,f32",
        "256,128,100,bf16",
        "16384,2048,128,bf16",
        "16384,1024,200,bf16",
        "256,2048,1000,bf16",
        "4096,512,10,f32",
        "65536,2048,100,bf16",
        "65536,2048,1000,bf16",
        "16384,512,1000,f32",
        "256,128,10,f32",
    ),
}
Step = Callable[[], tuple[Tensor, ...]]


class Inputs:
    """A greedy step: every row counts 1/N. Weights of order 1/sqrt(D), or softmax/N is full of denormals."""

    def __init__(self, place: Place, rows: int, depth: int, classes: int, dtype: str) -> None:
        draw, self.dtype = generator(place), DTYPES[dtype]
        self.h = normal(draw, rows, depth).to(self.dtype)
        self.weight = (normal(draw, classes, depth) / math.sqrt(depth)).to(self.dtype)
        self.bias = normal(draw, classes).to(self.dtype)
        self.target = torch.randint(0, classes, (rows,), generator=draw, device=place.device)
        self.scale = torch.tensor(1 / rows, device=place.device)
        self.row_scale = torch.full((rows,), 1 / rows, device=place.device)
        # How operations of a product are counted, and in which arithmetic torch would do it.
        self.flops = 2 * rows * depth * classes
        self.arithmetic = torch.float32 if self.dtype == torch.float32 else torch.bfloat16

    def given(self) -> tuple[Any, ...]:
        return self.h, self.weight, self.bias, self.target, self.scale, self.row_scale

    def expected(self) -> dict[str, Expected]:
        """All outputs in float64, in float32 rounded once, and the sums behind them."""
        exact = reference.critic_head(*(x.double() if x.is_floating_point() else x for x in self.given()))
        plain = reference.critic_head(*self.given())
        a, w = self.h.double().abs(), self.weight.double().abs()
        dlogits = exact[1].abs()
        factor = self.row_scale.double()[:, None] * dlogits
        logits = float((a @ w.T + self.bias.double().abs()).max())
        terms = {
            "loss": logits,
            # exp turns an error of a logit into the same error relative to the softmax.
            "dlogits": logits * float(dlogits.max()),
            "dh": float((self.scale.double() * (dlogits @ w)).max()),
            "dweight": float((factor.T @ a).max()),
            "dbias": float(factor.sum(0).max()),
        }
        eps = torch.finfo(self.dtype).eps
        found = {
            name: Expected(e, p, FINE if name == "loss" else eps, terms[name])
            for name, e, p in zip(ops.CriticHead._fields, exact, plain, strict=True)
            if e is not None and p is not None
        }
        found["mean_loss"] = Expected(exact[0].mean(), plain[0].mean(), eps, logits)
        return found


def _mean_loss(h: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(linear(h, weight, bias), target)


def _gradients(out: tuple[Tensor, ...]) -> Outputs:
    return dict(zip(("mean_loss", "dh", "dweight", "dbias"), out, strict=True))


def _head(place: Place, rows: int, depth: int, classes: int, dtype: str) -> Case:
    inputs = Inputs(place, rows, depth, classes, dtype)
    leaves = [x.clone().requires_grad_() for x in (inputs.h, inputs.weight, inputs.bias)]

    def step(loss_of: Callable[..., Tensor]) -> Step:
        def run() -> tuple[Tensor, ...]:
            loss = loss_of(*leaves, inputs.target)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        return run

    contenders = [
        *ours(place, ("critic_head",), lambda: ops.critic_head(*inputs.given()), lambda out: out._asdict()),
        *plain_torch(place, _mean_loss, step, _gradients),
        *_rivals(place, step),
    ]
    elements = 2 * rows * depth + rows * classes + 2 * classes * depth + 2 * classes
    traffic = elements * inputs.h.element_size() + rows * (8 + 4 + 4)
    return Case(contenders, against(inputs.expected()), traffic, 3 * inputs.flops, inputs.arithmetic)


def _rivals(place: Place, step: Callable[[Callable[..., Tensor]], Step]) -> Iterator[Contender]:
    if not place.rivals or place.device != "cuda":
        return
    if installed("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        yield Contender(
            "liger-kernel",
            step(lambda h, w, b, t: liger(w, h, t, b)),
            _gradients,
            # It counts labels on the host.
            graphs=False,
            package="liger-kernel",
        )
    if installed("quack"):
        from quack.linear_cross_entropy import linear_cross_entropy_func

        yield Contender("quack-kernels", step(linear_cross_entropy_func), _gradients, package="quack-kernels")


def _weight_gradients(h: Tensor, dlogits: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    factor = row_scale[:, None] * dlogits
    return factor.to(h.dtype).T @ h, factor.sum(0)


def _wgrad(place: Place, rows: int, depth: int, classes: int, dtype: str) -> Case:
    inputs = Inputs(place, rows, depth, classes, dtype)
    h, row_scale = inputs.h, inputs.row_scale
    dlogits = reference.critic_head(*inputs.given())[1]

    def outputs(out: tuple[Tensor, Tensor]) -> Outputs:
        return {"dweight": out[0], "dbias": out[1]}

    def step(function: Callable[..., tuple[Tensor, Tensor]]) -> Step:
        return lambda: function(h, dlogits, row_scale)

    exact = reference.critic_head_wgrad(h.double(), dlogits.double(), row_scale.double())
    plain = reference.critic_head_wgrad(h, dlogits, row_scale)
    factor = row_scale.double()[:, None] * dlogits.double().abs()
    terms = (float((factor.T @ h.double().abs()).max()), float(factor.sum(0).max()))
    eps = torch.finfo(h.dtype).eps
    expected = {
        name: Expected(exact[i], plain[i], eps, terms[i]) for i, name in enumerate(("dweight", "dbias"))
    }
    contenders = [
        *ours(place, ("critic_head_wgrad",), lambda: ops.critic_head_wgrad(h, dlogits, row_scale), outputs),
        *plain_torch(place, _weight_gradients, step, outputs),
    ]
    traffic = h.nbytes + dlogits.nbytes + row_scale.nbytes + 4 * classes * (depth + 1)
    return Case(contenders, against(expected), traffic, inputs.flops, inputs.arithmetic)


BENCHES = (
    Bench(
        name="critic_head",
        covers=("critic_head",),
        form=FORM,
        shapes=SHAPES,
        tiny="32,8,10,f32",
        build=_head,
        rivals={"cuda": ("liger_kernel", "quack")},
    ),
    Bench(
        name="critic_head_wgrad",
        covers=("critic_head_wgrad",),
        form=FORM,
        shapes={
            "cpu": ("65536,128,10,f32", "8192,512,100,f32", "65536,128,10,bf16"),
            "cuda": ("65536,128,10,bf16", "65536,512,100,bf16", "65536,512,1000,bf16", "65536,128,10,f32"),
        },
        tiny="32,8,10,f32",
        build=_wgrad,
    ),
)
