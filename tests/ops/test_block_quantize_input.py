"""Input that does not fit is refused, eagerly and when traced: what was expected, what came, what to do."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lct_fast import _native, ops

QUANTIZE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown kind": ({"kind": "int3"}, ValueError, "one of int8, int4, int2, fp8, got 'int3'"),
    "block of 48": ({"block": 48}, ValueError, "one of 32, 64, 128, 256 values, got 48"),
    "block of 0": ({"block": 0}, ValueError, "got 0"),
    "float64": (
        {"x": torch.ones(3).double()},
        TypeError,
        "float32, float16 or bfloat16, got torch.float64; cast",
    ),
    "integers": ({"x": torch.ones(3).int()}, TypeError, "got torch.int32; cast"),
}
DEQUANTIZE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown kind": ({"kind": "int3"}, ValueError, "one of int8, int4, int2, fp8, got 'int3'"),
    "block of 16": ({"block": 16}, ValueError, "one of 32, 64, 128, 256 values, got 16"),
    "size below zero": ({"size": -1}, ValueError, "size must be at least 0, got -1"),
    "payload of floats": (
        {"payload": torch.ones(50)},
        TypeError,
        "payload must be torch.uint8, got torch.float32; pass it as",
    ),
    "scales of fp32": (
        {"scales": torch.ones(2)},
        TypeError,
        "scales must be torch.bfloat16, got torch.float32; pass it as",
    ),
    "payload too short": (
        {"payload": torch.ones(49, dtype=torch.uint8)},
        ValueError,
        r"payload must be \[50\] for 99 values of int4 in blocks of 64, got \[49\]",
    ),
    "payload too long": ({"payload": torch.ones(51, dtype=torch.uint8)}, ValueError, r"got \[51\]"),
    "payload of 2 dimensions": (
        {"payload": torch.ones(50, 1, dtype=torch.uint8)},
        ValueError,
        r"got \[50, 1\]",
    ),
    "too few scales": (
        {"scales": torch.ones(1).bfloat16()},
        ValueError,
        r"scales must be \[2\] for 99 values of int4 in blocks of 64, got \[1\]",
    ),
    "another device": (
        {"scales": torch.ones(2).bfloat16().to("meta")},
        ValueError,
        r"scales are on meta and payload on cpu; move them with .to\(payload.device\)",
    ),
    "float64 out": ({"dtype": torch.float64}, TypeError, "float32, float16 or bfloat16, got torch.float64"),
}


def good() -> dict[str, Any]:
    return {
        "payload": torch.ones(50, dtype=torch.uint8),
        "scales": torch.ones(2).bfloat16(),
        "size": 99,
        "kind": "int4",
        "block": 64,
        "dtype": torch.float32,
    }


def traced(arguments: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    return {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize_refuses(name: str) -> None:
    change, error, message = QUANTIZE[name]
    arguments = {"x": torch.ones(99), "kind": "int4", "block": 64} | change
    with pytest.raises(error, match=message):
        ops.block_quantize(**arguments)
    with FakeTensorMode() as mode, pytest.raises(error, match=message):
        ops.block_quantize(**traced(arguments, mode))


@pytest.mark.parametrize("name", DEQUANTIZE)
def test_dequantize_refuses(name: str) -> None:
    assert ops.block_dequantize(**good()).shape == (99,)
    change, error, message = DEQUANTIZE[name]
    arguments = good() | change
    with pytest.raises(error, match=message):
        ops.block_dequantize(**arguments)
    with FakeTensorMode() as mode, pytest.raises(error, match=message):
        ops.block_dequantize(**traced(arguments, mode))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": -1}, "size >= 0, got -1"),
        ({"block": 16}, "block must be 32, 64, 128 or 256, got 16"),
        ({"block": 96}, "got 96"),
        ({"block": 512}, "got 512"),
        ({"kind": 4}, "kind must be 0"),
        ({"kind": -1}, "kind must be 0"),
        ({"dtype": 3}, "dtype must be 0"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_the_native_module_refuses_numbers_that_fit_no_tensor(change: dict[str, int], message: str) -> None:
    native: Any = _native.load()
    numbers = {"x": 0, "payload": 0, "scales": 0, "size": 0, "block": 64, "kind": 0, "dtype": 0, "threads": 1}
    numbers |= change
    for call in (native.block_quantize_cpu, native.block_dequantize_cpu):
        with pytest.raises(ValueError, match=message):
            call(**numbers)


def test_the_backend_asked_for_says_why_it_cannot_run() -> None:
    x = torch.ones(3)
    with (
        ops.use_backend("cuda"),
        pytest.raises(ops.BackendError, match=r"block_quantize.*on 'cpu'; move them with .cuda\(\)"),
    ):
        ops.block_quantize(x)
    with (
        ops.use_backend("triton"),
        pytest.raises(ops.BackendError, match="no such backend for this op, which has reference, cpu, cuda"),
    ):
        ops.block_quantize(x)
