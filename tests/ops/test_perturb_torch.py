"""perturb and score as torch operators: opcheck, compilation, no gradient."""

import pytest
import torch
from torch import Tensor

from lct_fast import ops
from tests.ladder import Place, assert_same_bits
from tests.ops.perturb_case import PLACES

CHECKED = dict.fromkeys(
    ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"), "SUCCESS"
)


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(where: Place, requires_grad: bool) -> None:
    with ops.use_backend(where.backend):
        z = torch.randn(6, 5, 3, device=where.device, requires_grad=requires_grad)
        sigma = torch.rand(5, device=where.device, requires_grad=requires_grad)
        loss = torch.randn(12, device=where.device, requires_grad=requires_grad)
        assert torch.library.opcheck(torch.ops.lct.perturb.default, (z, sigma, 7, 3, True, 2)) == CHECKED
        arguments = (loss, sigma, 7, 3, [12, 5, 3], True, 12, torch.bfloat16)
        assert torch.library.opcheck(torch.ops.lct.score.default, arguments) == CHECKED


def test_results_carry_no_gradient() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    sigma = torch.ones(3, requires_grad=True)
    noisy = ops.perturb(z * 2, sigma, 1)
    error = ops.score(torch.ones(4, requires_grad=True), sigma, 1, 0, (4, 3))
    assert not noisy.requires_grad and not error.requires_grad
    # What depends on z otherwise keeps its gradient.
    (noisy * z).sum().backward()
    assert z.grad is not None
    assert_same_bits("gradient", z.grad, noisy)


def there_and_back(z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    noisy = ops.perturb(z * 2, sigma, 11, 5, True, 2)
    return noisy, ops.score(noisy[:, 0, 0], sigma, 11, 5, noisy.shape, True) + 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_compiles_into_one_graph(where: Place, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    sigma = torch.rand(6, device=where.device)
    with ops.use_backend(where.backend):
        for rows in (21, 34):
            z = torch.randn(rows, 6, 3, device=where.device)
            for a, b in zip(there_and_back(z, sigma), compiled(z, sigma), strict=True):
                assert_same_bits("compiled", a, b)


# torch's own: inductor imports modules that use what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_keeps_the_ops() -> None:
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    z, sigma = torch.randn(13, 6, 1), torch.rand(6)
    compiled = torch.compile(there_and_back, fullgraph=True)
    for a, b in zip(there_and_back(z, sigma), compiled(z, sigma), strict=True):
        assert_same_bits("compiled", a, b)


def test_meta_tensors_give_shapes() -> None:
    z = torch.ones(7, 19, 2, device="meta", dtype=torch.float16)
    sigma = torch.ones((), device="meta")
    noisy = ops.perturb(z, sigma, 1, copies=4)
    assert noisy.shape == (28, 19, 2) and noisy.dtype == torch.float16 and noisy.is_meta
    error = ops.score(torch.ones(28, device="meta"), sigma, 1, 0, noisy.shape, dtype=torch.bfloat16)
    assert error.shape == (28, 19, 2) and error.dtype == torch.bfloat16 and error.is_meta


def test_sizes_beyond_32_bits_have_shapes() -> None:
    z = torch.ones(1, device="meta").expand(1 << 17, 1 << 17)
    assert ops.perturb(z, torch.ones((), device="meta"), 1, copies=8).shape == (1 << 20, 1 << 17)
