"""critic_head, forward and every gradient, per backend, against eager torch. For pytest-benchmark:

    python -m pytest benchmarks/bench_critic_head.py --benchmark-group-by=param:shape

Not collected by the default test command. Each result is checked before it is timed. On a device each call
is synchronised, so launches count; benchmarks/gpu.py measures with graphs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks.gpu_critic_head import DTYPES, make
from lct_fast import ops
from tests.ops.critic_head_case import Case, check

# (rows, depth, classes): why.
SHAPES = {
    (128, 128, 10): "one batch of a small network: the cost of the call itself",
    (4096, 512, 10): "a large batch, few classes: bound by memory",
    (4096, 512, 100): "the same with CIFAR-100's classes",
    (1024, 1024, 1000): "ImageNet's classes: bound by arithmetic",
}


def _places() -> list[tuple[str, str]]:
    if torch.cuda.is_available():
        return [(name, "cuda") for name in ("eager", "reference", "triton", "cuda")]
    return [(name, "cpu") for name in ("eager", "reference", "cpu")]


def _eager(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [x.detach().clone().requires_grad_() for x in (case.h, case.weight, case.bias) if x is not None]

    def run() -> tuple[Tensor, ...]:
        loss = cross_entropy(linear(*leaves), case.target)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return run


def _ours(case: Case, backend: str) -> Callable[[], ops.CriticHead]:
    with ops.use_backend(backend):
        check(case, case.run())
    return case.run


@pytest.mark.parametrize("place", _places(), ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(
    benchmark: Any, shape: tuple[int, int, int], dtype: str, place: tuple[str, str]
) -> None:
    backend, device = place
    case = make(*shape, DTYPES[dtype], device)
    run = _eager(case) if backend == "eager" else _ours(case, backend)

    def call() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    with ops.use_backend("reference" if backend == "eager" else backend):
        benchmark(call)
