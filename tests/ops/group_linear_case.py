"""Inputs of group_linear, what they must give in float64, and the check against it."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu

from lct_fast import ops
from tests.ladder import Place, assert_rule

# (rows, inputs, outputs, classes): why; 0 classes is a layer without a critic.
SHAPES = {
    (1, 1, 1, 1): "the smallest",
    (1, 3, 5, 2): "one row, less than a vector in every direction",
    (5, 1, 40, 0): "one input, no critic",
    (33, 20, 17, 10): "one output past a vector, rows past 32 by 1",
    (67, 64, 64, 16): "whole vectors; rows past 64 by 3",
    (13, 300, 70, 63): "inputs past 256, the most classes that are fused",
    (100, 31, 513, 17): "outputs past two blocks of 256, rows past 96",
    (9, 24, 30, 64): "the first class count that is not fused",
    (600, 7, 19, 3): "many blocks of rows, so that dbias is folded",
}
# (x, weight, critic_weight), the mixed ones as autocast gives them.
DTYPES = {
    "f32": (torch.float32,) * 3,
    "bf16": (torch.bfloat16,) * 3,
    "f16": (torch.float16,) * 3,
    "bf16-f32": (torch.bfloat16, torch.float32, torch.float32),
    "f16-f32-f16": (torch.float16, torch.float32, torch.float16),
    "f32-bf16": (torch.float32, torch.bfloat16, torch.bfloat16),
}
ACTIVATIONS = ("none", "relu", "gelu")
# Which of dh and dlogits there are.
GRADIENTS = ("h", "logits", "both")

_LEAVES = ("x", "weight", "bias", "critic_weight", "critic_bias")


@dataclass(frozen=True)
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str
    critic_weight: Tensor | None
    critic_bias: Tensor | None
    dh: Tensor | None
    dlogits: Tensor | None

    def run(self) -> dict[str, Tensor]:
        """Every output and gradient of the op."""
        leaves = self._leaves(None)
        given = {name: leaves.get(name) for name in ("bias", "critic_weight", "critic_bias")}
        out = ops.group_linear(leaves["x"], leaves["weight"], activation=self.activation, **given)
        return self._with_gradients(out.h, out.logits, leaves)

    def exact(self) -> dict[str, Tensor]:
        """By autograd in float64, from these very inputs."""
        return self._by_torch(torch.float64, None)

    def plain(self) -> dict[str, Tensor]:
        """By autograd in float32 from operands in x's dtype, as autocast has them; h and results rounded."""
        out = self._by_torch(torch.float32, self.x.dtype)
        return {name: value.to(self.dtype_of(name)) for name, value in out.items()}

    def dtype_of(self, name: str) -> torch.dtype:
        source = getattr(self, name[1:]) if name.startswith("d") else self.x
        return source.dtype

    def _leaves(self, dtype: torch.dtype | None, rounding: torch.dtype | None = None) -> dict[str, Tensor]:
        present = {name: getattr(self, name) for name in _LEAVES if getattr(self, name) is not None}
        if rounding is not None:
            present = {name: value.to(rounding) for name, value in present.items()}
        return {
            name: (value if dtype is None else value.cpu().to(dtype)).detach().clone().requires_grad_()
            for name, value in present.items()
        }

    def _by_torch(self, dtype: torch.dtype, rounding: torch.dtype | None) -> dict[str, Tensor]:
        leaves = self._leaves(dtype, rounding)
        pre = linear(leaves["x"], leaves["weight"], leaves.get("bias"))
        h = {"none": pre, "relu": relu(pre), "gelu": gelu(pre)}[self.activation]
        seen = h if rounding is None else h + (h.to(rounding).to(dtype) - h).detach()
        logits = None
        if "critic_weight" in leaves:
            logits = linear(seen, leaves["critic_weight"], leaves.get("critic_bias"))
        return self._with_gradients(h, logits, leaves)

    def _with_gradients(
        self, h: Tensor, logits: Tensor | None, leaves: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        outputs, given = [], []
        if self.dh is not None:
            outputs.append(h)
            given.append(self.dh.to(h))
        if self.dlogits is not None and logits is not None:
            outputs.append(logits)
            given.append(self.dlogits.to(logits))
        reached = leaves if self.dlogits is not None else {n: leaves[n] for n in _LEAVES[:3] if n in leaves}
        got = torch.autograd.grad(outputs, list(reached.values()), given)
        found = {"h": h.detach()}
        if logits is not None:
            found["logits"] = logits.detach()
        return {**found, **{f"d{name}": g for name, g in zip(reached, got, strict=True)}}

    def nearest_pre(self, rounding: torch.dtype | None) -> float:
        """How near pre comes to 0."""
        leaves = self._leaves(torch.float64, rounding)
        return float(linear(leaves["x"], leaves["weight"], leaves.get("bias")).detach().abs().min())

    def to(self, device: str) -> "Case":
        present: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: x.to(device) for name, x in present.items() if isinstance(x, Tensor)}
        return replace(self, **{**present, **moved})

    def terms(self) -> dict[str, float]:
        """The largest sum of absolute terms behind a value of each output."""
        leaves = {name: t.detach().abs() for name, t in self._leaves(torch.float64).items()}
        x, weight = leaves["x"], leaves["weight"]
        zero = torch.zeros((), dtype=torch.float64)
        h = x @ weight.T + leaves.get("bias", zero)
        g = zero if self.dh is None else self.dh.cpu().double().abs()
        sums: dict[str, Tensor] = {"h": h}
        if "critic_weight" in leaves:
            sums["logits"] = h @ leaves["critic_weight"].T + leaves.get("critic_bias", zero)
        if self.dlogits is not None:
            dlogits = self.dlogits.cpu().double().abs()
            g = g + dlogits @ leaves["critic_weight"]
            sums |= {"dcritic_weight": dlogits.T @ h, "dcritic_bias": dlogits.sum(0)}
        # No derivative of an activation is above 1.13.
        g = 1.13 * g
        sums |= {"dx": g @ weight, "dweight": g.T @ x, "dbias": g.sum(0)}
        return {name: _largest(value) for name, value in sums.items()}


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def make(
    rows: int,
    inputs: int,
    outputs: int,
    classes: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = DTYPES["f32"],
    activation: str = "relu",
    gradients: str = "both",
    device: str = "cpu",
    bias: bool = True,
) -> Case:
    """Numbers of order 1, and no pre so near 0 that rounding decides whether relu passes it."""
    dtype, weight_dtype, critic_dtype = dtypes
    for seed in range(1000):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, draw: torch.Generator = draw) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        critic = classes > 0
        with_dh = gradients != "logits" or not critic
        with_dlogits = gradients != "h" and critic
        case = Case(
            x=normal(rows, inputs).to(device, dtype),
            weight=(normal(outputs, inputs) / math.sqrt(inputs)).to(device, weight_dtype),
            # Exact in x's dtype too: only weight is rounded to it by some kernels, and all of them by autocast.
            bias=normal(outputs).to(dtype).to(device, weight_dtype) if bias else None,
            activation=activation,
            critic_weight=(normal(classes, outputs) / math.sqrt(outputs)).to(device, critic_dtype)
            if critic
            else None,
            critic_bias=normal(classes).to(device, critic_dtype) if critic and bias else None,
            dh=normal(rows, outputs).to(device, dtype) if with_dh else None,
            dlogits=normal(rows, classes).to(device, dtype) if with_dlogits else None,
        )
        # Some kernels round the operands to x's dtype first, some do not.
        if activation != "relu" or min(case.nearest_pre(None), case.nearest_pre(dtype)) > 2e-6:
            return case
    raise AssertionError("no seed keeps every pre away from 0")


def check(case: Case, out: dict[str, Tensor], place: Place | None = None) -> None:
    """Every output and gradient of `case` within the error rule and in its dtype, and none that should be absent."""
    exact, plain, terms = case.exact(), case.plain(), case.terms()
    assert set(out) == set(exact)
    coarse = torch.finfo(case.x.dtype).eps
    if place == Place("triton", "cpu") and case.x.dtype == torch.bfloat16:
        # Triton's interpreter rounds to bf16 towards zero: up to a whole unit in the last place, not half of one.
        coarse *= 2
    for name, value in out.items():
        assert value.dtype == case.dtype_of(name), name
        eps = max(coarse, torch.finfo(value.dtype).eps)
        assert_rule(name, value, plain[name], exact[name], eps, terms[name])
