"""critic_head as a torch operator: opcheck, gradcheck, compilation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lct_fast import ops
from tests.ladder import Place, assert_same_bits
from tests.ops.critic_head_case import Case, make

CHECKED = dict.fromkeys(
    ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"), "SUCCESS"
)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("with_row_scale", [True, False])
def test_opcheck(place: Place, with_row_scale: bool, requires_grad: bool) -> None:
    case = make(7, 5, 4, device=place.device, activation="relu", with_row_scale=with_row_scale)
    case = replace(
        case, h=case.h.requires_grad_(requires_grad), weight=case.weight.requires_grad_(requires_grad)
    )
    result = torch.library.opcheck(torch.ops.lct.critic_head.default, case.arguments())
    assert result == CHECKED


def test_opcheck_wgrad(place: Place) -> None:
    case = make(7, 5, 4, torch.bfloat16, device=place.device)
    dlogits = case.run().dlogits
    result = torch.library.opcheck(
        torch.ops.lct.critic_head_wgrad.default,
        (case.h, dlogits, case.row_scale, "relu"),
        {"dtype": torch.float32},
    )
    assert result == CHECKED


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(activation: str, with_bias: bool) -> None:
    case = make(6, 3, 4, torch.float64, bias=with_bias, activation=activation)
    target = case.target.clone()
    target[1] = -100

    def loss(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.critic_head(h, weight, bias, target, case.scale, None, activation).loss

    leaves = [x.requires_grad_() for x in (case.h, case.weight, case.bias) if x is not None]
    assert torch.autograd.gradcheck(loss, leaves)


def test_float64_runs_on_the_reference_with_float64_factors() -> None:
    case = make(6, 3, 4, torch.float64)
    case = replace(case, scale=case.scale.double() / 3, row_scale=torch.rand(6, dtype=torch.float64))
    out = case.run()
    assert all(x is not None and x.dtype == torch.float64 for x in out)
    for x in case.wgrad(out.dlogits):
        assert x.dtype == torch.float64


def test_a_second_derivative_is_refused() -> None:
    case = make(6, 3, 4, torch.float64)
    loss = replace(case, h=case.h.requires_grad_()).run().loss.sum()
    with pytest.raises(RuntimeError, match="differentiable once.*use torch.nn.functional"):
        torch.autograd.grad(loss, case.h, create_graph=True)


def step(case: Case, h: Tensor, weight: Tensor) -> tuple[Tensor, ops.CriticHead]:
    out = replace(case, h=h * 2, weight=weight).run()
    return out.loss.sum() + 1, out


def run_step(run: object, case: Case) -> list[Tensor]:
    h, weight = (x.detach().clone().requires_grad_() for x in (case.h, case.weight))
    total, out = run(case, h, weight)  # type: ignore[operator]
    total.backward()
    assert h.grad is not None and weight.grad is not None
    return [total, *(x for x in out if x is not None), h.grad, weight.grad]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(place: Place, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (21, 34):
        case = make(rows, 6, 10, device=place.device, activation="relu")
        for a, b in zip(run_step(step, case), run_step(compiled, case), strict=True):
            assert_same_bits("compiled", a, b)


# torch's own: inductor imports modules that use what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_keeps_the_op(threads: None) -> None:
    """The generated code around the op hands it what eager hands it."""
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    case = make(21, 6, 10, activation="relu")
    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(run_step(step, case), run_step(compiled, case), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_graph_follows_the_choice_of_backend() -> None:
    torch.compiler.reset()
    case = make(21, 6, 10)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(h: Tensor) -> Tensor:
        return replace(case, h=h).run().loss

    run(case.h)
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="'cuda'"):
        run(case.h)


def test_a_choice_reaches_the_backward(place: Place) -> None:
    """Weight gradients through autograd use the same backend: same bits as the op called by hand."""
    case = make(300, 6, 10, device=place.device)
    weight = case.weight.clone().requires_grad_()
    out = replace(case, weight=weight).run()
    assert case.row_scale is not None
    (out.loss * case.row_scale).sum().backward()
    assert weight.grad is not None
    assert_same_bits("dweight", weight.grad, case.wgrad(out.dlogits)[0])


def test_meta_tensors_give_shapes() -> None:
    case = make(7, 5, 4)
    names = ("h", "weight", "bias", "target", "scale", "row_scale")
    out = replace(case, **{name: getattr(case, name).to("meta") for name in names}).run()
    assert [x.shape for x in out if x is not None] == [(7,), (7, 4), (7, 5), (4, 5), (4,)]
    assert all(x is not None and x.is_meta for x in out)
