"""group_linear as a torch operator: opcheck, gradcheck, compilation."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lct_fast import ops
from tests.ladder import Place, assert_same_bits
from tests.ops.group_linear_case import ACTIVATIONS, DTYPES, Case, make
from tests.ops.places import place_of

place = place_of("group_linear")
CHECKED = dict.fromkeys(
    ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"), "SUCCESS"
)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("classes", [0, 4])
def test_opcheck(place: Place, classes: int, activation: str, requires_grad: bool) -> None:
    case = make(7, 5, 6, classes, activation=activation, device=place.device)
    tensors = (case.x, case.weight, case.bias, case.critic_weight, case.critic_bias)
    x, weight, bias, critic, shift = (None if t is None else t.requires_grad_(requires_grad) for t in tensors)
    arguments = (x, weight, bias, activation, critic, shift, activation == "gelu")
    assert torch.library.opcheck(torch.ops.lct.group_linear.default, arguments) == CHECKED


@pytest.mark.parametrize("gradients", ["h", "logits", "both"])
def test_opcheck_backward(place: Place, gradients: str) -> None:
    case = make(7, 5, 6, 4, DTYPES["bf16"], "gelu", gradients, place.device)
    gate = torch.rand(7, 6).to(place.device, torch.bfloat16)
    arguments = (case.dh, case.dlogits, case.critic_weight, gate, "gelu")
    assert torch.library.opcheck(torch.ops.lct.group_linear_backward.default, arguments) == CHECKED


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [0, 4, 65])
def test_gradcheck(classes: int, bias: bool, activation: str) -> None:
    case = make(3, 4, 5, classes, (torch.float64,) * 3, activation, bias=bias)
    given = (case.x, case.weight, case.bias, case.critic_weight, case.critic_bias)
    leaves = [t.requires_grad_() for t in given if t is not None]

    def run(*present: Tensor) -> tuple[Tensor, ...]:
        rest = iter(present)
        x, weight, shift, critic, critic_shift = (None if t is None else next(rest) for t in given)
        out = ops.group_linear(x, weight, shift, activation, critic, critic_shift)  # type: ignore[arg-type]
        return tuple(t for t in out if t is not None)

    assert torch.autograd.gradcheck(run, leaves)
    if classes:
        assert torch.autograd.gradcheck(lambda *t: run(*t)[1], leaves)


def test_a_second_derivative_is_refused() -> None:
    case = make(3, 4, 5, 2, (torch.float64,) * 3)
    x = case.x.requires_grad_()
    h = ops.group_linear(x, case.weight, case.bias, "relu").h
    with pytest.raises(RuntimeError, match="differentiable once.*use torch.nn.functional"):
        torch.autograd.grad(h.sum(), x, create_graph=True)


def step(case: Case, leaves: list[Tensor]) -> Tensor:
    x, weight, bias, critic, shift = leaves
    out = ops.group_linear(x * 2, weight, bias, case.activation, critic, shift)
    assert out.logits is not None and case.dh is not None and case.dlogits is not None
    return (out.h * case.dh).sum() + (out.logits * case.dlogits).sum()


def run_step(run: object, case: Case) -> list[Tensor]:
    given = (case.x, case.weight, case.bias, case.critic_weight, case.critic_bias)
    leaves = [t.detach().clone().requires_grad_() for t in given if t is not None]
    total = run(case, leaves)  # type: ignore[operator]
    total.backward()
    return [total.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("classes", [10, 64])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(place: Place, dynamic: bool, classes: int, activation: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (21, 34):
        case = make(rows, 6, 9, classes, activation=activation, device=place.device)
        expected = run_step(step, case)
        assert len(expected) == 6
        for a, b in zip(expected, run_step(compiled, case), strict=True):
            assert_same_bits("compiled", a, b)


# torch's own: inductor imports modules that use what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_keeps_the_op(threads: None) -> None:
    """The generated code around the op hands it what eager hands it."""
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    case = make(21, 6, 9, 10, activation="gelu")
    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(run_step(step, case), run_step(compiled, case), strict=True):
        torch.testing.assert_close(a, b)


def test_a_choice_reaches_the_backward() -> None:
    case = make(21, 6, 9, 10)
    x = case.x.clone().requires_grad_()
    h = ops.group_linear(x, case.weight, case.bias, "relu").h
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="group_linear_backward.*'cuda'"):
        h.sum().backward()


@pytest.mark.parametrize("classes", [10, 64])
def test_meta_tensors_give_shapes(classes: int) -> None:
    case = make(3, 6, 9, classes).to("meta")
    out = ops.group_linear(case.x, case.weight, case.bias, "gelu", case.critic_weight, case.critic_bias)
    assert out.logits is not None and out.h.is_meta and out.logits.is_meta
    assert out.h.shape == (3, 9) and out.logits.shape == (3, classes)
    assert ops.group_linear(case.x, case.weight, None).logits is None


class Kept(TorchDispatchMode):
    """Notes for each call of the op whether it was to keep gelu's derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is torch.ops.lct.group_linear.default:
            self.seen.append(args[-1])
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_gelus_derivative_is_kept_only_for_a_backward() -> None:
    """Inference, and training of nothing, pay no memory for it."""
    case = make(5, 6, 9, 0, activation="gelu")
    weight = case.weight.clone().requires_grad_()
    with Kept() as kept:
        ops.group_linear(case.x, case.weight, case.bias, "gelu")
        ops.group_linear(case.x, weight, case.bias, "gelu")
        ops.group_linear(case.x, weight, case.bias, "relu")
        with torch.no_grad():
            ops.group_linear(case.x, weight, case.bias, "gelu")
    assert kept.seen == [False, True, False, False]


def test_under_autocast_it_is_given_what_autocast_gives() -> None:
    """The op casts nothing by itself: x in bf16 and fp32 parameters is the mixed case, in and out."""
    case = make(21, 6, 9, 10, DTYPES["bf16-f32"])
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.group_linear(case.x, case.weight, case.bias, "relu", case.critic_weight, case.critic_bias)
    assert out.logits is not None and out.h.dtype == out.logits.dtype == torch.bfloat16
    assert_same_bits("h", out.h, case.run()["h"])
