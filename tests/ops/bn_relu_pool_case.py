"""Inputs of bn_relu_pool, what they must give in float64, and the check against it."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, batch_norm, relu

from lct_fast import ops
from tests.ladder import assert_rule

# (N, C, H, W, pool): why.
SHAPES = {
    (2, 1, 1, 1, 1): "the smallest that has a variance",
    (5, 40, 1, 1, 1): "one pixel: both formats are one, channels end in the middle of a vector",
    (2, 3, 5, 7, 1): "odd sides, fewer channels than any vector is wide, one window",
    (3, 17, 6, 4, 2): "H != W, one channel past 16, windows of 3 x 2",
    (2, 64, 8, 8, 4): "whole vectors of channels, windows of 2 x 2",
    (9, 33, 4, 4, 4): "windows of one pixel",
    (1, 5, 16, 72, 8): "one sample, 72 columns: whole vectors and half a one",
    (2, 2, 72, 70, 2): "a plane of more than one chunk, windows of 35 columns",
    (70, 4, 8, 8, 1): "more samples than a chunk has: partial sums are folded",
}
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
OUTPUTS = ("y", "pooled", "mean", "var", "running_mean", "running_var")
GRADIENTS = ("dx", "dgamma", "dbeta")


@dataclass(frozen=True)
class Case:
    x: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    dpooled: Tensor
    dy: Tensor | None
    training: bool
    pool: int
    momentum: float = 0.1
    eps: float = 1e-5
    reuse_input: bool = False

    def run(self) -> dict[str, Tensor]:
        """Every output and gradient of the op; the case's own running statistics stay as they are."""
        running_mean, running_var = self.running_mean.clone(), self.running_var.clone()
        x, gamma, beta = (t.detach().clone().requires_grad_() for t in (self.x, self.gamma, self.beta))
        # What may be written over is no leaf.
        given = x.clone() if self.reuse_input else x
        statistics = (running_mean, running_var, self.training, self.momentum, self.eps)
        out = ops.bn_relu_pool(given, gamma, beta, *statistics, self.pool, self.reuse_input)
        return {
            **{name: t.detach() for name, t in out._asdict().items()},
            "running_mean": running_mean,
            "running_var": running_var,
            **self._gradients(out.y, out.pooled, (x, gamma, beta)),
            "x afterwards": given.detach(),
        }

    def _gradients(self, y: Tensor, pooled: Tensor, leaves: tuple[Tensor, ...]) -> dict[str, Tensor]:
        outputs, given = [pooled], [self.dpooled.to(pooled.dtype)]
        if self.dy is not None:
            outputs.append(y)
            given.append(self.dy.to(y.dtype))
        return dict(zip(GRADIENTS, torch.autograd.grad(outputs, leaves, given), strict=True))

    def exact(self) -> dict[str, Tensor]:
        """By autograd in float64, from these very inputs."""
        return self._by_torch(torch.float64)

    def plain(self) -> dict[str, Tensor]:
        """By torch in float32, rounded once at the end."""
        out = self._by_torch(torch.float32)
        return {name: t.to(self.x.dtype) if name in ("y", "pooled", "dx") else t for name, t in out.items()}

    def _by_torch(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x, gamma, beta = (t.detach().cpu().to(dtype, copy=True).requires_grad_() for t in self._inputs())
        mean, var = (t.cpu().to(dtype, copy=True) for t in (self.running_mean, self.running_var))
        z = batch_norm(x, mean, var, gamma, beta, self.training, self.momentum, self.eps)
        y = relu(z)
        pooled = avg_pool2d(y, (x.shape[2] // self.pool, x.shape[3] // self.pool))
        statistics = {"mean": mean, "var": var}
        if self.training:
            plane = x.detach().transpose(0, 1).flatten(1)
            statistics = {"mean": plane.mean(1), "var": plane.var(1, correction=0)}
        host = replace(self, dpooled=self.dpooled.cpu(), dy=None if self.dy is None else self.dy.cpu())
        return {
            "y": y.detach(),
            "pooled": pooled.detach(),
            **statistics,
            "running_mean": mean,
            "running_var": var,
            **host._gradients(y, pooled, (x, gamma, beta)),
        }

    def preactivation(self) -> Tensor:
        """z in float64."""
        x, gamma, beta = (t.detach().cpu().double() for t in self._inputs())
        mean, var = (t.cpu().double() for t in (self.running_mean, self.running_var))
        return batch_norm(x, mean, var, gamma, beta, self.training, 0.0, self.eps)

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.gamma, self.beta

    def to(self, device: str) -> "Case":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})

    def terms(self, exact: dict[str, Tensor]) -> dict[str, float]:
        """The largest sum of absolute terms behind a value of each output."""
        x, gamma, beta = (t.detach().cpu().double() for t in self._inputs())
        rstd = (exact["var"] + self.eps).rsqrt()
        size = _channels(x.abs())
        xhat = (x - _by_channel(exact["mean"])) * _by_channel(rstd)
        window = (x.shape[2] // self.pool, x.shape[3] // self.pool)
        g = self.dpooled.cpu().double().abs() / (window[0] * window[1])
        g = g.repeat_interleave(window[0], 2).repeat_interleave(window[1], 3)
        if self.dy is not None:
            g = g + self.dy.cpu().double().abs()
        g = torch.where(exact["y"] > 0, g, 0.0)
        count = x.shape[0] * x.shape[2] * x.shape[3]
        total, moment = g.sum((0, 2, 3)), (g * _by_channel(size * rstd)).sum((0, 2, 3))
        factor = gamma.abs() * rstd
        spread = _by_channel(total) + xhat.abs() * _by_channel(moment) if self.training else 0.0
        y = _largest(size * factor + beta.abs())
        return {
            "y": y,
            "pooled": y,
            "mean": _largest(size),
            "var": _largest(exact["var"]),
            "running_mean": _largest(size) + _largest(self.running_mean.cpu()),
            "running_var": _largest(exact["var"]) + _largest(self.running_var.cpu()),
            "dx": _largest((g + spread / count) * _by_channel(factor)),
            "dgamma": _largest(moment),
            "dbeta": _largest(total),
        }


def _by_channel(x: Tensor) -> Tensor:
    return x[None, :, None, None]


def _channels(x: Tensor) -> Tensor:
    return x.amax((0, 2, 3))


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def make(
    samples: int,
    channels: int,
    height: int,
    width: int,
    pool: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "first",
    device: str = "cpu",
    training: bool = True,
    with_dy: bool = False,
    parameters: torch.dtype = torch.float32,
) -> Case:
    """Means of order 1, and no z so near 0 that rounding decides whether it counts as active."""
    for seed in range(1000):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, draw: torch.Generator = draw) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        format_ = FORMATS[layout]
        x = (2 * normal(samples, channels, height, width) + normal(1, channels, 1, 1)).to(dtype)
        dy = normal(samples, channels, height, width).to(dtype)
        case = Case(
            x=x.to(device).contiguous(memory_format=format_),
            gamma=normal(channels).to(device, parameters),
            beta=normal(channels).to(device, parameters),
            running_mean=normal(channels).to(device, parameters),
            running_var=(normal(channels).square() + 0.5).to(device, parameters),
            dpooled=normal(samples, channels, pool, pool).to(device, dtype),
            dy=dy.to(device).contiguous(memory_format=format_) if with_dy else None,
            training=training,
            pool=pool,
        )
        if samples * height * width < 2 or float(case.preactivation().abs().min()) > 3e-6:
            return case
    raise AssertionError("no seed keeps every z away from 0")


def check(case: Case, out: dict[str, Tensor]) -> None:
    """Every output and gradient of `case` within the error rule, in its dtype and memory format."""
    exact, plain = case.exact(), case.plain()
    terms = case.terms(exact)
    coarse = torch.finfo(case.x.dtype).eps
    fine = torch.finfo(torch.float32).eps
    for name in (*OUTPUTS, *GRADIENTS):
        eps = coarse if name in ("y", "pooled", "dx") else fine
        if name.startswith("running"):
            eps = torch.finfo(case.running_mean.dtype).eps
        if name in ("dgamma", "dbeta"):
            eps = torch.finfo(case.gamma.dtype).eps
        assert_rule(name, out[name], plain[name], exact[name], eps, terms[name])
    for name in ("y", "pooled", "dx"):
        assert out[name].dtype == case.x.dtype, name
    assert out["mean"].dtype == out["var"].dtype == torch.float32
    assert out["dgamma"].dtype == case.gamma.dtype and out["dbeta"].dtype == case.beta.dtype
    last = case.x.is_contiguous(memory_format=torch.channels_last)
    for name in ("y", "dx"):
        assert out[name].is_contiguous(memory_format=torch.channels_last) or not last, name
        assert out[name].is_contiguous() or not case.x.is_contiguous(), name
    assert out["pooled"].is_contiguous()
