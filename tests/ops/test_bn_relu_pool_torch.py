"""bn_relu_pool as a torch operator: opcheck, gradcheck, compilation."""

from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

from lct_fast import ops
from tests.ladder import Place, assert_same_bits
from tests.ops.bn_relu_pool_case import FORMATS, Case, make
from tests.ops.places import place_of

place = place_of("bn_relu_pool")
CHECKED = dict.fromkeys(
    ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"), "SUCCESS"
)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(place: Place, training: bool, requires_grad: bool, layout: str) -> None:
    case = make(3, 5, 4, 6, 2, layout=layout, device=place.device)
    given = (None, None) if training else (case.running_mean, case.running_var)
    leaves = (t.requires_grad_(requires_grad) for t in (case.x, case.gamma, case.beta))
    arguments = (*leaves, *given, case.eps, case.pool, False)
    assert torch.library.opcheck(torch.ops.lct.bn_relu_pool.default, arguments) == CHECKED


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("with_dy", [True, False])
def test_opcheck_backward(place: Place, with_dy: bool, layout: str) -> None:
    case = make(3, 5, 4, 6, 2, torch.bfloat16, layout, place.device, with_dy=with_dy)
    leaves = (case.x, case.gamma, case.beta)
    out = torch.ops.lct.bn_relu_pool.default(*leaves, None, None, case.eps, case.pool, False)
    arguments = (case.dy, case.dpooled, *leaves, *out[2:], True, case.eps)
    for op in (torch.ops.lct.bn_relu_pool_backward, torch.ops.lct.bn_relu_pool_backward_):
        assert torch.library.opcheck(op.default, arguments) == CHECKED


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("through", ["y", "pooled", "both"])
def test_gradcheck(through: str, training: bool, layout: str) -> None:
    case = make(3, 2, 4, 6, 2, torch.float64, layout, parameters=torch.float64)

    def run(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        statistics = (case.running_mean.clone(), case.running_var.clone())
        out = ops.bn_relu_pool(x, gamma, beta, *statistics, training, pool=case.pool)
        return {"y": (out.y,), "pooled": (out.pooled,), "both": (out.y, out.pooled)}[through]

    leaves = [t.requires_grad_() for t in (case.x, case.gamma, case.beta)]
    assert torch.autograd.gradcheck(run, leaves)


def test_a_second_derivative_is_refused() -> None:
    case = make(3, 2, 4, 6, 2, torch.float64, parameters=torch.float64)
    x = case.x.requires_grad_()
    pooled = ops.bn_relu_pool(x, case.gamma, case.beta, pool=2).pooled
    with pytest.raises(RuntimeError, match="differentiable once.*use torch.nn.functional"):
        torch.autograd.grad(pooled.sum(), x, create_graph=True)


def test_mean_and_var_carry_no_gradient() -> None:
    case = make(3, 2, 4, 6, 2)
    out = ops.bn_relu_pool(case.x.requires_grad_(), case.gamma, case.beta, pool=2)
    assert [t.requires_grad for t in out] == [True, True, False, False]


def step(case: Case, leaves: list[Tensor], running: list[Tensor]) -> Tensor:
    x, gamma, beta = leaves
    out = ops.bn_relu_pool(x * 2, gamma, beta, *running, pool=case.pool, reuse_input=case.reuse_input)
    return (out.pooled * case.dpooled).sum() + (out.y * case.dy).sum()


def run_step(run: object, case: Case) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.gamma, case.beta)]
    running = [case.running_mean.clone(), case.running_var.clone()]
    total = run(case, leaves, running)  # type: ignore[operator]
    total.backward()
    return [total.detach(), *running, *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
def test_compiles_into_one_graph(place: Place, reuse: bool, dynamic: bool, layout: str) -> None:
    """The update of the running statistics in place included; dx has memory of its own there."""
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for samples in (3, 5):
        case = make(samples, 6, 4, 6, 2, layout=layout, device=place.device, with_dy=True)
        case = replace(case, reuse_input=reuse)
        expected = run_step(step, case)
        assert len(expected) == 6 and not torch.equal(expected[1], case.running_mean)
        for a, b in zip(expected, run_step(compiled, case), strict=True):
            assert_same_bits("compiled", a, b)


def test_a_traced_backward_never_writes_over_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.11 traces a backward without saying that it compiles."""
    targets: list[str] = []

    def noted(graph: fx.GraphModule, _: object) -> object:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    case = make(3, 6, 4, 6, 2, with_dy=True)
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=noted))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    run_step(compiled, replace(case, reuse_input=True))
    assert "lct.bn_relu_pool_backward.default" in targets
    assert "lct.bn_relu_pool_backward_.default" not in targets
    assert not any("auto_functionalized" in name for name in targets)


# torch's own: inductor imports modules that use what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_keeps_the_op(threads: None) -> None:
    """The generated code around the op hands it what eager hands it."""
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    case = make(3, 6, 4, 6, 2, with_dy=True)
    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(run_step(step, case), run_step(compiled, case), strict=True):
        torch.testing.assert_close(a, b)


def test_a_choice_reaches_the_backward() -> None:
    case = make(3, 6, 4, 6, 2)
    x = case.x.clone().requires_grad_()
    out = ops.bn_relu_pool(x, case.gamma, case.beta, pool=2)
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="bn_relu_pool_backward.*'cuda'"):
        out.pooled.sum().backward()


def test_meta_tensors_give_shapes() -> None:
    case = make(3, 6, 4, 6, 2, layout="last")
    names = ("x", "gamma", "beta", "running_mean", "running_var")
    x, *rest = (getattr(case, name).to("meta") for name in names)
    out = ops.bn_relu_pool(x, *rest, pool=2)
    assert [list(t.shape) for t in out] == [[3, 6, 4, 6], [3, 6, 2, 2], [6], [6]]
    assert all(t.is_meta for t in out)
    assert out.y.stride() == case.x.stride()


def test_a_frozen_backbone() -> None:
    """Only gamma needs a gradient: x gets none, and nothing else breaks."""
    case = make(3, 6, 4, 6, 2)
    gamma = case.gamma.clone().requires_grad_()
    out = ops.bn_relu_pool(case.x, gamma, case.beta, pool=2)
    (dgamma,) = torch.autograd.grad(out.pooled, gamma, case.dpooled)
    assert_same_bits("dgamma", dgamma, replace(case).run()["dgamma"])
