"""The ladder's own tools notice what they are there to notice."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ladder import GuardPages, assert_rule, assert_same_bits

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("side", "offset"), [("after", 12), ("before", -4)])
def test_a_read_next_to_guarded_memory_faults(side: str, offset: int) -> None:
    code = (
        "import ctypes, torch; from tests.ladder import GuardPages\n"
        f"x = GuardPages({side!r}).copy(torch.arange(3.0))\n"
        "assert x.tolist() == [0, 1, 2]\n"
        "print('reading', flush=True)\n"
        f"ctypes.c_float.from_address(x.data_ptr() + {offset}).value"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "reading\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_guarded_memory_starts_poisoned(dtype: torch.dtype) -> None:
    with GuardPages("after").allocating():
        for x in (torch.empty(3, 2, dtype=dtype), torch.zeros(1, dtype=dtype).new_empty((3, 2))):
            assert x.shape == (3, 2) and bool(x.isnan().all())


def test_poisoned_memory(poisoned: None) -> None:
    assert bool(torch.empty(1000).isnan().all())
    assert bool(torch.empty(400, dtype=torch.uint8).view(torch.float32).isnan().all())


def test_the_error_rule_bounds_by_plain_torch_and_eps() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = exact + torch.tensor([0.1, 0.0])
    assert_rule("x", exact + 0.2, plain, exact, eps=0.01)
    with pytest.raises(AssertionError, match="2 x 1.000e-01 .* 1.0e-02 x 2.000e"):
        assert_rule("x", exact + 0.23, plain, exact, eps=0.01)
    # 4.8e-7 of the terms that cancelled
    assert_rule("x", exact + 0.23, plain, exact, eps=0.01, terms=1e5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_the_error_rule_sees_what_is_not_finite(wrong: float) -> None:
    exact = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    assert_rule("x", exact, exact, exact, eps=0.0)
    with pytest.raises(AssertionError, match="not finite at"):
        assert_rule("x", torch.tensor([wrong, float("nan")]), exact, exact, eps=1.0)
    with pytest.raises(AssertionError, match="NaN or Inf differ"):
        assert_rule("x", torch.tensor([1.0, 1.0]), exact, exact, eps=1.0)


def test_same_bits_tells_zeros_apart() -> None:
    assert_same_bits("x", torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(AssertionError, match="1 of 1 values differ"):
        assert_same_bits("x", torch.tensor([0.0]), torch.tensor([-0.0]))
