"""Inputs of critic_head, what they must give in float64, and the check against it."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lct_fast import ops
from tests.ladder import assert_rule

# (rows, depth, classes): why.
SHAPES = {
    (1, 1, 1): "the smallest; one class has softmax 1 and no gradient",
    (1, 3, 2): "one row, fewer columns than any vector is wide",
    (5, 1, 2): "one column",
    (33, 3, 10): "one row past 32",
    (17, 128, 10): "the head of a 10-class network; a power of two deep",
    (67, 513, 10): "one column past 512, rows past 64 by 3",
    (130, 20, 100): "100 classes, rows past 128 by 2",
    (9, 13, 1000): "1000 classes, few rows",
    (64, 64, 16): "nothing left over at any block size",
    (1027, 5, 3): "many blocks of rows, so partial sums are folded",
}

# (h, weight), the mixed ones as autocast gives them.
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16),
    "bf16-f32": (torch.bfloat16, torch.float32),
    "f16-f32": (torch.float16, torch.float32),
    "f32-bf16": (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class Case:
    h: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    scale: Tensor
    row_scale: Tensor | None
    activation: str = "none"
    ignore_index: int = -100

    def run(self) -> ops.CriticHead:
        return ops.critic_head(*self.arguments())

    def wgrad(self, dlogits: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        assert self.row_scale is not None
        return ops.critic_head_wgrad(self.h, dlogits, self.row_scale, self.activation, dtype)

    def exact(self) -> ops.CriticHead:
        """By autograd in float64, from these very inputs."""
        return self._by_autograd(torch.float64, self.weight, self.bias)

    def plain(self) -> ops.CriticHead:
        """By autograd in float32, operands rounded to h's dtype as by autocast, results rounded once."""
        dtype = self.h.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        out = self._by_autograd(torch.float32, self.weight.to(dtype), bias)
        out = out._replace(dlogits=out.dlogits.to(dtype), dh=out.dh.to(dtype))
        if out.dweight is None or out.dbias is None:
            return out
        return out._replace(dweight=out.dweight.to(self.weight.dtype), dbias=out.dbias.to(self.weight.dtype))

    def _by_autograd(self, dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> ops.CriticHead:
        h = self.h.to(dtype, copy=True).requires_grad_()
        weight = weight.to(dtype, copy=True).requires_grad_()
        bias = (weight.new_zeros(len(weight)) if bias is None else bias.to(dtype, copy=True)).requires_grad_()
        logits = linear(h.relu() if self.activation == "relu" else h, weight, bias)
        bad = ((self.target < 0) | (self.target >= len(weight))) & (self.target != self.ignore_index)
        # cross_entropy takes no bad label: one that it ignores has the gradients asked for, but loss 0.
        target = torch.where(bad, self.ignore_index, self.target)
        loss = cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="none")

        def gradients(factor: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad((loss * factor).sum(), of, retain_graph=True)

        (dlogits,) = gradients(torch.ones_like(loss), logits)
        (dh,) = gradients(self.scale.to(dtype), h)
        wgrads = (None, None) if self.row_scale is None else gradients(self.row_scale.to(dtype), weight, bias)
        return ops.CriticHead(loss.detach().masked_fill(bad, float("nan")), dlogits, dh, *wgrads)

    def to(self, device: str) -> "Case":
        moved: list[Any] = [x.to(device) if isinstance(x, Tensor) else x for x in self.arguments()]
        return Case(*moved)

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def terms(self) -> dict[str, float]:
        """The largest sum of absolute terms behind a value of each output, finite ones only."""
        h, weight = self.h.double(), self.weight.double()
        a = h.relu() if self.activation == "relu" else h
        bias = torch.zeros_like(weight[:, 0]) if self.bias is None else self.bias.double()
        logits = _largest(a.abs() @ weight.abs().T + bias.abs())
        dlogits = self.exact().dlogits.abs()
        factor = dlogits if self.row_scale is None else self.row_scale.double().abs()[:, None] * dlogits
        return {
            "loss": logits,
            # exp turns an error of a logit into the same error relative to the softmax.
            "dlogits": logits * _largest(dlogits),
            "dh": _largest(self.scale.double() * (dlogits @ weight.abs())),
            "dweight": _largest(factor.T @ a.abs()),
            "dbias": _largest(factor.sum(0)),
        }


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def make(
    rows: int,
    depth: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
    bias: bool = True,
    activation: str = "none",
    with_row_scale: bool = True,
) -> Case:
    """Logits of order 1, so the softmax is neither flat nor saturated; row_scale of both signs and zero."""
    draw = torch.Generator().manual_seed(rows * 7919 + depth * 31 + classes)
    weight_dtype = weight_dtype or dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    sign = torch.randint(-1, 2, (rows,), generator=draw)
    return Case(
        h=normal(rows, depth).to(device, dtype),
        weight=(normal(classes, depth) / math.sqrt(depth)).to(device, weight_dtype),
        bias=normal(classes).to(device, weight_dtype) if bias else None,
        target=torch.randint(0, classes, (rows,), generator=draw).to(device),
        scale=torch.tensor(1 / max(rows, 1), device=device),
        row_scale=(sign / max(rows, 1)).float().to(device) if with_row_scale else None,
        activation=activation,
    )


def check(case: Case, out: ops.CriticHead) -> None:
    """Every output of `case` within the error rule."""
    exact, plain, terms = case.exact(), case.plain(), case.terms()
    eps = torch.finfo(case.h.dtype).eps
    fine = torch.finfo(torch.float32).eps
    assert_rule("loss", out.loss, plain.loss, exact.loss, fine, terms["loss"])
    assert_rule("dlogits", out.dlogits, plain.dlogits, exact.dlogits, eps, terms["dlogits"])
    assert_rule("dh", out.dh, plain.dh, exact.dh, eps, terms["dh"])
    assert out.loss.dtype == torch.float32
    assert out.dlogits.dtype == out.dh.dtype == case.h.dtype
    if case.row_scale is None:
        assert out.dweight is None and out.dbias is None
        return
    assert out.dweight is not None and out.dbias is not None
    assert out.dweight.dtype == out.dbias.dtype == case.weight.dtype
    check_wgrad(case, out.dweight, out.dbias)


def check_wgrad(case: Case, dweight: Tensor, dbias: Tensor) -> None:
    """Both weight gradients of `case` within the error rule, whatever dtype they come in."""
    exact, plain, terms = case.exact(), case.plain(), case.terms()
    assert exact.dweight is not None and exact.dbias is not None
    assert plain.dweight is not None and plain.dbias is not None
    eps = max(torch.finfo(case.h.dtype).eps, torch.finfo(dweight.dtype).eps)
    assert_rule("dweight", dweight, plain.dweight, exact.dweight, eps, terms["dweight"])
    assert_rule("dbias", dbias, plain.dbias, exact.dbias, eps, terms["dbias"])
