"""Input that does not fit is refused, eagerly and when traced: what was expected, what came, what to do."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lct_fast import _native, ops

ADJOINT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "float64": (
        {"x": torch.ones(2, 3).double()},
        TypeError,
        "x must be float32, float16 or bfloat16.*cast it",
    ),
    "no dimensions": ({"x": torch.ones(())}, ValueError, r"x must be \[N, ...\]"),
    "a short state": (
        {"lambda_next": torch.ones(2, 3).half()},
        TypeError,
        "lambda_next must be float32, which small steps need, got torch.float16",
    ),
    "another shape": (
        {"kappa": torch.ones(2, 4)},
        ValueError,
        r"kappa must be \[2, 3\] as x is, got \[2, 4\]",
    ),
    "another device": (
        {"lambda_next": torch.ones(2, 3, device="meta")},
        ValueError,
        "lambda_next is on meta",
    ),
    "beta 0": ({"beta": 0.0}, ValueError, "beta must be a positive number, got 0.0"),
    "beta NaN": ({"beta": float("nan")}, ValueError, "beta must be a positive number, got nan"),
}
UPDATE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another dtype": (
        {"x_prev": torch.ones(2, 3).bfloat16()},
        TypeError,
        "x_prev must be torch.float32 as p is, got torch.bfloat16",
    ),
    "a short state": ({"kappa": torch.ones(2, 3).bfloat16()}, TypeError, "kappa must be float32"),
    "another shape": ({"lambda_": torch.ones(3, 2)}, ValueError, r"lambda must be \[2, 3\] as p is"),
    "eta below 0": ({"eta": -1.0}, ValueError, "eta must be a positive number, got -1.0"),
    "eta infinite": ({"eta": float("inf")}, ValueError, "eta must be a positive number, got inf"),
}


def arguments(*names: str) -> dict[str, Any]:
    numbers = {"beta": 0.5, "eta": 0.1}
    return {name: numbers[name] if name in numbers else torch.ones(2, 3) for name in names}


@pytest.mark.parametrize("what", ADJOINT)
def test_adjoint(what: str) -> None:
    change, kind, message = ADJOINT[what]
    with pytest.raises(kind, match=message):
        ops.consensus_adjoint(**(arguments("x", "lambda_next", "kappa", "beta") | change))


@pytest.mark.parametrize("what", UPDATE)
def test_update(what: str) -> None:
    change, kind, message = UPDATE[what]
    with pytest.raises(kind, match=message):
        ops.consensus_update(**(arguments("lambda_", "kappa", "p", "x_prev", "beta", "eta") | change))


def test_refused_when_traced_too() -> None:
    with FakeTensorMode():
        x = torch.ones(2, 3)
        with pytest.raises(ValueError, match=r"kappa must be \[2, 3\]"):
            ops.consensus_adjoint(x, x, torch.ones(2, 4), 0.5)
        with pytest.raises(ValueError, match="eta must be"):
            ops.consensus_update(x, None, x, x, 0.5, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": -1}, "rows >= 0, got -1"),
        ({"depth": -2}, "depth >= 0, got -2"),
        ({"dtype": 3}, "dtype must be 0"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_the_native_module_refuses_numbers_that_fit_no_tensor(change: dict[str, int], message: str) -> None:
    native: Any = _native.load()
    numbers = dict.fromkeys(("x", "lambda_next", "kappa", "loss", "p", "rows", "depth", "dtype"), 0)
    numbers |= {"beta": 1, "threads": 1}
    with pytest.raises(ValueError, match=message):
        native.consensus_adjoint_cpu(**(numbers | change))


def test_the_native_update_refuses_a_size_below_zero() -> None:
    native: Any = _native.load()
    names = ("lambda_", "kappa", "p", "x_prev", "lambda_out", "kappa_out", "dtype")
    with pytest.raises(ValueError, match="size >= 0, got -1"):
        native.consensus_update_cpu(**dict.fromkeys(names, 0), size=-1, beta=1, eta=1, threads=1)


def test_the_backend_asked_for_says_why_it_cannot_run() -> None:
    x = torch.ones(2, 3)
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match=r"consensus_adjoint.*on 'cpu'"):
        ops.consensus_adjoint(x, x, None, 0.5)
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="has reference, cpu, cuda"):
        ops.consensus_update(x, None, x, x, 0.5, 0.5)
