"""block_quantize and block_dequantize against the same formula in torch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.bench.case import DTYPES, Bench, Case, Outputs, Place, generator, normal, ours, plain_torch
from lct_fast.bench.rule import Accuracy, Expected, WrongOutput, judge
from lct_fast.reference import block_quantize as reference

BLOCK = 64
FORM = {"size": None, "kind": tuple(reference.BITS), "dtype": DTYPES}
SHAPES = {
    "cpu": (
        "16777216,int8,f32",
        "16777216,int4,f32",
        "16777216,int2,f32",
        "16777216,fp8,f32",
        "16777216,int4,bf16",
        "262144,int4,f32",
    ),
    "cuda": (
        "67108864,int8,bf16",
        "67108864,int4,bf16",
        "67108864,int2,bf16",
        "67108864,fp8,bf16",
        "67108864,int4,f32",
        "1048576,int4,bf16",
    ),
}
Encoded = tuple[Tensor, Tensor]


class Inputs:
    """Half zeros, as after ReLU, and what the reference makes of them; its decoding is exact in float32."""

    def __init__(self, place: Place, size: int, kind: str, dtype: str) -> None:
        self.size, self.kind, self.dtype = size, kind, DTYPES[dtype]
        self.x = normal(generator(place), size).relu_().to(self.dtype)
        self.codes = reference.block_quantize(self.x, kind, BLOCK)
        # Largest value, scale and its inverse, product, rounding and limits.
        self.flops = 5 * size
        self.traffic = self.x.nbytes + sum(t.nbytes for t in self.codes)

    def decoded(self, codes: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        return reference.block_dequantize(*codes, self.size, self.kind, BLOCK, dtype)


def _bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def _quantize(place: Place, size: int, kind: str, dtype: str) -> Case:
    inputs = Inputs(place, size, kind, dtype)
    x = inputs.x

    def check(outputs: Mapping[str, Tensor], slack: float) -> Accuracy:
        """Ours has the reference's bits; the compiler fuses what the reference rounds, so its codes may differ."""
        payload, scales = outputs["payload"], outputs["scales"]
        same = torch.equal(payload, inputs.codes[0]) and torch.equal(_bits(scales), _bits(inputs.codes[1]))
        if slack == 1.0 and not same:
            raise WrongOutput("its bits are not the reference's")
        # 2 max|plain - exact|, and nothing beyond.
        return judge(
            "decoded",
            inputs.decoded((payload, scales)),
            Expected(x, inputs.decoded(inputs.codes), 0.0),
            slack,
        )

    def outputs(out: Encoded) -> Outputs:
        return {"payload": out[0], "scales": out[1]}

    def step(function: Callable[..., Encoded]) -> Callable[[], Encoded]:
        return lambda: function(x, kind, BLOCK)

    contenders = [
        *ours(place, ("block_quantize",), lambda: ops.block_quantize(x, kind, BLOCK), outputs),
        *plain_torch(place, reference.block_quantize, step, outputs),
    ]
    return Case(contenders, check, inputs.traffic, inputs.flops)


def _dequantize(place: Place, size: int, kind: str, dtype: str) -> Case:
    inputs = Inputs(place, size, kind, dtype)
    given = (*inputs.codes, size, kind, BLOCK, inputs.dtype)
    exact, values = inputs.decoded(inputs.codes), inputs.decoded(inputs.codes, inputs.dtype)

    def check(outputs: Mapping[str, Tensor], slack: float) -> Accuracy:
        if not torch.equal(_bits(outputs["x"]), _bits(values)):
            raise WrongOutput("its values are not the reference's")
        return judge("x", outputs["x"], Expected(exact, values, 0.0), slack)

    def step(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(*given)

    def outputs(out: Any) -> Outputs:
        return {"x": out}

    contenders = [
        *ours(place, ("block_dequantize",), lambda: ops.block_dequantize(*given), outputs),
        *plain_torch(place, reference.block_dequantize, step, outputs),
    ]
    return Case(contenders, check, inputs.traffic, inputs.size)


BENCHES = (
    Bench("block_quantize", ("block_quantize",), FORM, SHAPES, "1027,int4,f32", _quantize),
    Bench("block_dequantize", ("block_dequantize",), FORM, SHAPES, "1027,int4,bf16", _dequantize),
)
