"""block_quantize and block_dequantize as torch operators: opcheck, compilation, no gradient."""

import pytest
import torch
from torch import Tensor

from lct_fast import ops
from tests.ladder import Place, assert_same_bits
from tests.ops.block_quantize_case import KINDS, PLACES, make

CHECKED = dict.fromkeys(
    ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"), "SUCCESS"
)


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(where: Place, requires_grad: bool) -> None:
    with ops.use_backend(where.backend):
        x = make(7 * 31, torch.float32, signed=True, device=where.device).view(7, 31)
        x.requires_grad_(requires_grad)
        assert torch.library.opcheck(torch.ops.lct.block_quantize.default, (x, "int4", 32)) == CHECKED
        payload, scales = ops.block_quantize(x, "int4", 32)
        arguments = (payload, scales.requires_grad_(requires_grad), 217, "int4", 32, torch.bfloat16)
        assert torch.library.opcheck(torch.ops.lct.block_dequantize.default, arguments) == CHECKED


def test_results_carry_no_gradient() -> None:
    x = make(99, torch.float32, signed=True).requires_grad_()
    payload, scales = ops.block_quantize(x * 2)
    values = ops.block_dequantize(payload, scales, 99)
    assert not scales.requires_grad and not values.requires_grad
    # What depends on x otherwise keeps its gradient.
    (values * x).sum().backward()
    assert x.grad is not None
    assert_same_bits("gradient", x.grad, values)


def there_and_back(x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    payload, scales = ops.block_quantize(x * 2, kind, 32)
    values = ops.block_dequantize(payload, scales, x.numel(), kind, 32, torch.bfloat16)
    return payload, scales, values.view_as(x) + 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_compiles_into_one_graph(where: Place, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with ops.use_backend(where.backend):
        for rows in (21, 34):
            x = make(rows * 6, torch.float32, signed=True, device=where.device).view(rows, 6)
            for kind in KINDS:
                for a, b in zip(there_and_back(x, kind), compiled(x, kind), strict=True):
                    assert_same_bits("compiled", a, b)


# torch's own: inductor imports modules that use what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_keeps_the_ops() -> None:
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    x = make(130, torch.float32, signed=True).view(13, 10)
    compiled = torch.compile(there_and_back, fullgraph=True)
    for a, b in zip(there_and_back(x, "int2"), compiled(x, "int2"), strict=True):
        assert_same_bits("compiled", a, b)


def test_meta_tensors_give_shapes() -> None:
    payload, scales = ops.block_quantize(torch.ones(7, 19, device="meta", dtype=torch.float16), "int2", 128)
    assert payload.shape == (34,) and scales.shape == (2,) and payload.is_meta and scales.is_meta
    values = ops.block_dequantize(payload, scales, 133, "int2", 128, torch.float16)
    assert values.shape == (133,) and values.dtype == torch.float16 and values.is_meta


def test_sizes_beyond_32_bits_have_shapes() -> None:
    x = torch.ones(1, device="meta").expand(1 << 17, 1 << 17)
    payload, scales = ops.block_quantize(x, "int8", 256)
    assert payload.shape == (1 << 34,) and scales.shape == (1 << 26,)
