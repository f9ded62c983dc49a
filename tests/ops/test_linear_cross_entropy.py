"""The head of a vocabulary: libraries are called as they want to be, and the methods get what they need of it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lct_fast as lct
from lct_fast import ops
from lct_fast.methods import Objective, objective
from tests.engine import nets

# The package's attribute of this name is the function.
HEAD = sys.modules["lct_fast.ops.linear_cross_entropy"]
why_not_quack = HEAD.why_not_quack


def _case(rows: int, depth: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(rows, depth, generator=draw)
    weight = torch.randn(classes, depth, generator=draw) / depth**0.5
    bias = torch.randn(classes, generator=draw)
    target = torch.randint(classes, (rows,), generator=draw)
    target[1] = -100
    return h.to(dtype), weight.to(dtype), bias.to(dtype), target


# More rows than columns go in chunks, fewer at once; a vocabulary and a few classes.
@pytest.mark.parametrize(("rows", "depth", "classes"), [(24, 16, 32768), (8, 16, 40000), (33, 8, 50)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_linear_and_cross_entropy(
    rows: int, depth: int, classes: int, with_bias: bool, reduction: str, dtype: torch.dtype, tolerance: float
) -> None:
    h, weight, bias, target = _case(rows, depth, classes, dtype)
    results = []
    for wide in (False, True):
        inputs = [
            t.double() if wide else t.clone() for t in ((h, weight, bias) if with_bias else (h, weight))
        ]
        leaves = [t.requires_grad_() for t in inputs]
        if wide:
            loss = F.cross_entropy(F.linear(*leaves), target, reduction=reduction)
        else:
            loss = ops.linear_cross_entropy(
                leaves[0], leaves[1], leaves[2] if with_bias else None, target, -100, reduction
            )
        factor = torch.linspace(0.5, 2, rows) if reduction == "none" else torch.tensor(0.3)
        results.append([loss, *torch.autograd.grad(loss, leaves, factor.to(loss.dtype))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            got.double(), expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max())
        )
    assert reduction == "sum" or results[0][0][1] == 0


def test_weights_are_cast_to_the_rows_dtype() -> None:
    h, weight, bias, target = _case(8, 16, 60, torch.float32)
    weight.requires_grad_()
    loss = ops.linear_cross_entropy(h.bfloat16(), weight, bias, target)
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="'none' or 'sum', got 'mean'"):
        ops.linear_cross_entropy(*_case(4, 8, 10, torch.float32), reduction="mean")


def test_before_torch_had_it_plain_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(24, 16, 300, torch.float32)
    expected = ops.linear_cross_entropy(*case)
    if hasattr(F, "linear_cross_entropy"):
        monkeypatch.delattr(F, "linear_cross_entropy")
    torch.testing.assert_close(ops.linear_cross_entropy(*case), expected)


def _on_device(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Any:
    return SimpleNamespace(is_cuda=True, device="cuda", dtype=dtype, shape=shape)


def test_quack_is_taken_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = _on_device((64, 128)), _on_device((32768, 128))
    monkeypatch.setattr(HEAD, "find_spec", lambda name: None)
    assert "not installed" in why_not_quack(h, weight, None, "sum")
    monkeypatch.setattr(HEAD, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute capability 9" in why_not_quack(h, weight, None, "sum")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_quack(h, weight, None, "sum") == ""
    assert "bias" in why_not_quack(h, weight, torch.zeros(1), "sum")
    assert "sums" in why_not_quack(h, weight, None, "none")
    assert "multiples of 8" in why_not_quack(_on_device((63, 128)), weight, None, "sum")
    assert "multiples of 8" in why_not_quack(h, _on_device((32769, 128)), None, "sum")
    assert "got torch.float32" in why_not_quack(_on_device((64, 128), torch.float32), weight, None, "sum")
    assert "compute capability 9" in why_not_quack(torch.zeros(8, 8), weight, None, "sum")


def test_quack_is_called_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Any] = {}

    def chunked_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
        called.update(options, x=x, weight=weight, target=target)
        return x.sum()

    module = ModuleType("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy = chunked_linear_cross_entropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    monkeypatch.setattr(HEAD, "why_not_quack", lambda *_: "")
    h, weight, _, target = _case(8, 16, 64, torch.float32)
    assert torch.equal(ops.linear_cross_entropy(h, weight, None, target, 7, "sum"), h.sum())
    assert called["x"] is h and called["target"] is target and torch.equal(called["weight"], weight)
    assert (called["ignore_index"], called["reduction"]) == (7, "sum")


@pytest.mark.parametrize("method", [lct.Greedy, lct.LocalCritic])
@pytest.mark.parametrize("critic", ["pooled_linear", "conv_fc:filters=4"])
def test_a_network_trains_as_with_the_small_head(
    method: type[lct.Method], critic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is large lowered to four classes, in float64; the critic's weights have not moved when its signs come."""
    states, losses = [], []
    batches = [(x.double(), torch.where(torch.rand(16) < 0.2, -1, y)) for x, y in nets.batches(4)]
    for large in (1 << 40, 4):
        monkeypatch.setattr(objective, "LARGE", large)
        groups = nets.groups(method(), critic=critic)
        for group in groups:
            group.double()
        trainer = lct.Trainer(groups, method(), ignore_index=-1)
        losses.append(torch.stack([trainer.step(x, y).losses for x, y in batches]))
        trainer.flush()
        states.append(nets.state(trainer))
    torch.testing.assert_close(losses[1].double(), losses[0].double(), rtol=1e-5, atol=0.0)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_without_each_row_every_row_has_the_mean() -> None:
    h, weight, bias, target = _case(8, 16, 32768, torch.float32)
    head = nn.Linear(16, 32768)
    head.load_state_dict({"weight": weight, "bias": bias})
    aim = Objective()
    scale = aim.scale(target)
    rows, mean = (
        aim(head, h, target, scale, with_weight_gradient=True, each_row=each) for each in (True, False)
    )
    assert rows.dlogits is None and mean.dlogits is None
    assert rows.loss.unique().numel() == 8 and mean.loss.unique().numel() == 1
    torch.testing.assert_close(mean.loss.sum(), rows.loss.sum())
    for a, b in zip((mean.du, mean.dweight, mean.dbias), (rows.du, rows.dweight, rows.dbias), strict=True):
        torch.testing.assert_close(a, b)


def test_late_gradients_with_relu_are_those_of_the_weighted_rows() -> None:
    u, weight, bias, target = _case(8, 16, 32768, torch.float64)
    head = nn.Linear(16, 32768).double()
    head.load_state_dict({"weight": weight, "bias": bias})
    row_scale = torch.tensor([1, -1, 0, 1, -1, 1, 1, -1]) / 8
    got = Objective().late_weight_gradient(head, u, target, row_scale, "relu")
    loss = F.cross_entropy(head(u.relu()), target, reduction="none")
    expected = torch.autograd.grad(loss, [head.weight, head.bias], row_scale.double())
    for a, b in zip(got, expected, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)
