"""bn_relu_pool forward and backward, alone, and as a group's end: with the critic_head behind it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, batch_norm, cross_entropy, linear, relu

from lct_fast import ops
from lct_fast.bench.case import DTYPES, Bench, Case, Outputs, Place, generator, normal, ours, plain_torch
from lct_fast.bench.rule import FINE, Expected, against

CLASSES = 10
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
FORM = {
    "batch": None,
    "channels": None,
    "height": None,
    "width": None,
    "pool": None,
    "dtype": DTYPES,
    "format": FORMATS,
}
SHAPES = {
    "cpu": (
        "128,64,32,32,2,f32,first",
        "128,64,32,32,2,f32,last",
        "128,64,32,32,4,f32,first",
        "128,128,16,16,2,f32,first",
        "128,128,16,16,2,f32,last",
        "128,256,8,8,2,f32,first",
        "128,64,32,32,2,bf16,first",
        "128,64,32,32,2,bf16,last",
    ),
    "cuda": (
        "512,64,32,32,2,bf16,last",
        "512,64,32,32,2,bf16,first",
        "512,256,8,8,2,bf16,last",
        "512,128,16,16,4,bf16,last",
        "128,64,32,32,2,bf16,last",
        "512,64,32,32,2,f32,first",
    ),
}
GRADIENTS = ("dx", "dgamma", "dbeta", "dweight", "dbias")


class Inputs:
    """x, the layer's and the head's parameters, labels, and a gradient at pooled."""

    def __init__(
        self,
        place: Place,
        batch: int,
        channels: int,
        height: int,
        width: int,
        pool: int,
        dtype: str,
        format: str,
    ) -> None:
        if height % pool or width % pool:
            raise ValueError(f"pool has to divide height and width, got {pool} for {height} x {width}")
        draw, self.pool, self.dtype = generator(place), pool, DTYPES[dtype]
        x = normal(draw, batch, channels, height, width).to(self.dtype)
        gamma, beta = normal(draw, channels), normal(draw, channels)
        self.x = _away_from_zero(x, gamma, beta).contiguous(memory_format=FORMATS[format])
        features = channels * pool * pool
        self.parameters = (gamma, beta)
        self.head = (normal(draw, CLASSES, features) / features**0.5, normal(draw, CLASSES))
        self.target = torch.randint(0, CLASSES, (batch,), generator=draw, device=place.device)
        self.dpooled = (normal(draw, batch, channels, pool, pool) / batch).to(self.dtype)
        # Statistics 3 operations a value, affine, ReLU and pool 4, backward 6.
        self.flops = 13 * x.numel()
        # x is read for y, with a channel in cache, and again for dx.
        self.traffic = 4 * x.nbytes + 2 * self.dpooled.nbytes

    def leaves(self, with_head: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
        tensors = (self.x, *self.parameters, *(self.head if with_head else ()))
        return [t.to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]

    def statistics(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        gamma = self.parameters[0]
        return torch.zeros_like(gamma, dtype=dtype), torch.ones_like(gamma, dtype=dtype)

    def step(
        self,
        function: Callable[..., tuple[Tensor, Tensor]],
        with_head: bool,
        dtype: torch.dtype | None = None,
    ) -> Callable[[], dict[str, Tensor]]:
        """Forward and every gradient by autograd: of the mean loss, or of pooled with its gradient given."""
        leaves, statistics = self.leaves(with_head, dtype), self.statistics(dtype or torch.float32)
        name = "loss" if with_head else "pooled"
        gradient = None if with_head else self.dpooled.to(dtype or self.dtype)

        def run() -> dict[str, Tensor]:
            out, y = function(*leaves, *statistics, self.target, self.pool)
            gradients = torch.autograd.grad(out, leaves, gradient)
            return {name: out.detach(), "y": y, **dict(zip(GRADIENTS, gradients, strict=False))}

        return run

    def expected(
        self, function: Callable[..., tuple[Tensor, Tensor]], with_head: bool
    ) -> dict[str, Expected]:
        exact, plain = self.step(function, with_head, torch.float64)(), self.step(function, with_head)()
        coarse = max(torch.finfo(self.dtype).eps, 8 * FINE)
        summed = ("dgamma", "dbeta", "loss") if self.dtype == torch.float32 else ()
        return {
            # The head's gradients are made from pooled, which is rounded.
            name: Expected(exact[name], plain[name], 2 * (FINE if name in summed else coarse))
            for name in exact
        }


def _away_from_zero(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """x with no z near 0: there rounding decides what is active, and no two programs have the same gradient."""
    for _ in range(20):
        near = batch_norm(x.double(), None, None, gamma.double(), beta.double(), True).abs() < 1e-5
        if not bool(near.any()):
            return x
        x[near] += 0.03
    raise RuntimeError("some z stays near 0")


def _pooled(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, target: Tensor, pool: int
) -> tuple[Tensor, Tensor]:
    y = relu(batch_norm(x, mean, var, gamma, beta, True))
    return avg_pool2d(y, (x.shape[2] // pool, x.shape[3] // pool)), y.detach()


def _loss(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    target: Tensor,
    pool: int,
) -> tuple[Tensor, Tensor]:
    pooled, y = _pooled(x, gamma, beta, mean, var, target, pool)
    return cross_entropy(linear(pooled.flatten(1).to(weight.dtype), weight, bias), target), y


def _same(out: Mapping[str, Tensor]) -> Outputs:
    return out


def _alone(place: Place, **fields: Any) -> Case:
    inputs = Inputs(place, **fields)
    x, gamma, beta = inputs.leaves(with_head=False)
    statistics = inputs.statistics()

    def run() -> dict[str, Tensor]:
        out = ops.bn_relu_pool(x, gamma, beta, *statistics, pool=inputs.pool)
        gradients = torch.autograd.grad(out.pooled, (x, gamma, beta), inputs.dpooled)
        found = {"pooled": out.pooled.detach(), "y": out.y.detach()}
        return found | dict(zip(GRADIENTS, gradients, strict=False))

    return _case(place, inputs, ("bn_relu_pool", "bn_relu_pool_backward"), run, _pooled)


def _with_head(place: Place, **fields: Any) -> Case:
    inputs = Inputs(place, **fields)
    x, gamma, beta = inputs.leaves(with_head=False)
    statistics, rows = inputs.statistics(), len(inputs.target)
    scale = torch.tensor(1 / rows, device=place.device)
    row_scale = torch.full((rows,), 1 / rows, device=place.device)

    def reset() -> None:
        with torch.no_grad():
            x.copy_(inputs.x)

    def run() -> dict[str, Tensor]:
        # As in a group, where x is a convolution's output and nobody else's.
        out = ops.bn_relu_pool(x, gamma, beta, *statistics, pool=inputs.pool, reuse_input=True)
        features = out.pooled.detach().flatten(1)
        head = ops.critic_head(features, *inputs.head, inputs.target, scale, row_scale)
        gradients = torch.autograd.grad(out.pooled, (x, gamma, beta), head.dh.view_as(out.pooled))
        found = {"loss": head.loss.mean(), "y": out.y.detach()}
        assert head.dweight is not None and head.dbias is not None
        return found | dict(zip(GRADIENTS, (*gradients, head.dweight, head.dbias), strict=True))

    names = ("bn_relu_pool", "bn_relu_pool_backward", "critic_head")
    return _case(place, inputs, names, run, _loss, reset)


def _case(
    place: Place,
    inputs: Inputs,
    names: tuple[str, ...],
    run: Callable[[], dict[str, Tensor]],
    function: Callable[..., tuple[Tensor, Tensor]],
    reset: Callable[[], None] | None = None,
) -> Case:
    with_head = function is _loss

    def step(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        return inputs.step(forward, with_head)

    contenders = [
        *ours(place, names, run, _same, reset),
        # The compiler adds up a channel's gradients one after another.
        *plain_torch(place, function, step, _same, slack=256.0),
    ]
    flops, traffic = inputs.flops, inputs.traffic
    if with_head:
        flops += 6 * inputs.head[0].numel() * len(inputs.target)
        traffic += 2 * sum(t.nbytes for t in inputs.head)
    return Case(contenders, against(inputs.expected(function, with_head)), traffic, flops)


BENCHES = (
    Bench(
        name="bn_relu_pool",
        covers=("bn_relu_pool", "bn_relu_pool_backward"),
        form=FORM,
        shapes=SHAPES,
        tiny="4,3,4,4,2,f32,last",
        build=_alone,
    ),
    Bench(
        name="bn_relu_pool_critic_head",
        covers=("bn_relu_pool", "bn_relu_pool_backward", "critic_head"),
        form=FORM,
        shapes=SHAPES,
        tiny="4,3,4,4,2,f32,first",
        build=_with_head,
    ),
)
