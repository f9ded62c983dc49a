"""consensus_adjoint and consensus_update as torch operators: opcheck, compilation, no gradient."""

import pytest
import torch
from torch import Tensor

from lct_fast import ops
from tests.ladder import Place, assert_same_bits
from tests.ops.consensus_case import BETA, ETA, PLACES, make

CHECKED = dict.fromkeys(
    ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"), "SUCCESS"
)


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("multipliers", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(where: Place, multipliers: bool, requires_grad: bool) -> None:
    with ops.use_backend(where.backend):
        case = make((7, 3, 11), torch.float32, multipliers=multipliers).to(where.device)
        x = case.x.requires_grad_(requires_grad)
        adjoint, update = torch.ops.lct.consensus_adjoint.default, torch.ops.lct.consensus_update.default
        assert torch.library.opcheck(adjoint, (x, case.lambda_, case.kappa, BETA)) == CHECKED
        arguments = (case.lambda_, case.kappa, case.p, x, BETA, ETA)
        assert torch.library.opcheck(update, arguments) == CHECKED


def test_results_carry_no_gradient() -> None:
    case = make((3, 9), torch.float32, multipliers=True)
    x = case.x.requires_grad_()
    loss, p = ops.consensus_adjoint(x * 2, case.lambda_, case.kappa, BETA)
    after = ops.consensus_update(case.lambda_, case.kappa, p, x * 2, BETA, ETA)
    assert after.kappa is not None
    assert not any(t.requires_grad for t in (loss, p, after.lambda_, after.kappa))
    # What depends on x otherwise keeps its gradient.
    (p * x).sum().backward()
    assert x.grad is not None
    assert_same_bits("gradient", x.grad, p)


def step(x: Tensor, lambda_: Tensor, kappa: Tensor | None, p_in: Tensor) -> tuple[Tensor, ...]:
    loss, p = ops.consensus_adjoint(x, lambda_, kappa, BETA)
    after = ops.consensus_update(lambda_, kappa, p_in, x, BETA, ETA)
    return loss, p + 1, after.lambda_, after.lambda_ if after.kappa is None else after.kappa


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_compiles_into_one_graph(where: Place, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with ops.use_backend(where.backend):
        for rows in (21, 34):
            for multipliers in (True, False):
                case = make((rows, 6), torch.float32, multipliers=multipliers).to(where.device)
                arguments = (case.x, case.lambda_, case.kappa, case.p)
                for a, b in zip(step(*arguments), compiled(*arguments), strict=True):
                    assert_same_bits("compiled", a, b)


# torch's own: inductor imports modules that use what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_keeps_the_ops() -> None:
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    case = make((13, 10), torch.float32, multipliers=True)
    compiled = torch.compile(step, fullgraph=True)
    arguments = (case.x, case.lambda_, case.kappa, case.p)
    for a, b in zip(step(*arguments), compiled(*arguments), strict=True):
        assert_same_bits("compiled", a, b)


def test_meta_tensors_give_shapes() -> None:
    x = torch.ones(7, 4, 5, device="meta", dtype=torch.float16)
    state = torch.ones(7, 4, 5, device="meta")
    loss, p = ops.consensus_adjoint(x, state, None, BETA)
    assert loss.shape == (7,) and loss.dtype == torch.float32 and p.shape == x.shape and p.dtype == x.dtype
    after = ops.consensus_update(state, state, x, x, BETA, ETA)
    assert after.kappa is not None and after.kappa.shape == after.lambda_.shape == x.shape
    assert after.lambda_.is_meta and after.lambda_.dtype == torch.float32
