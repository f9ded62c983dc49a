"""Input of perturb and score that does not fit is refused before anything runs, in one line that says what to do."""

from typing import Any

import pytest
import torch

from lct_fast import ops

ONE = torch.ones(())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"z": torch.ones(())}, r"z must be \[N, O, \.\.\.\] or \[N\], got a 0-dim"),
        (
            {"z": torch.ones(4, 3, dtype=torch.float64)},
            "z must be float32, float16 or bfloat16, got torch.float64",
        ),
        ({"sigma": torch.ones((), dtype=torch.float64)}, "sigma must be float32, got torch.float64"),
        ({"sigma": torch.ones(4)}, r"sigma must be 0-dim or \[3\], one for each channel, got \[4\]"),
        ({"sigma": torch.ones(3, 1)}, r"sigma must be 0-dim or \[3\]"),
        ({"sigma": torch.ones((), device="meta")}, "sigma is on meta and z on cpu"),
        ({"seed": -1}, r"seed must be within 0 \.\. 2\^63 - 1, got -1"),
        ({"offset": -1}, "offset must be within 0"),
        ({"copies": 0}, "copies must be at least 1, got 0"),
        ({"antithetic": True, "z": torch.ones(3, 3)}, "expected an even number of rows, got 3"),
    ],
)
def test_perturb_refuses(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"z": torch.ones(4, 3), "sigma": ONE, "seed": 1} | changed
    with pytest.raises((ValueError, TypeError), match=message):
        ops.perturb(**given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": torch.ones(4, dtype=torch.bfloat16)}, "loss must be float32, got torch.bfloat16"),
        ({"loss": torch.ones(5)}, r"loss must be \[N\], one for each row of shape .* got \[5\] and \[4, 3\]"),
        ({"loss": torch.ones(())}, r"loss must be \[N\]"),
        ({"shape": ()}, r"loss must be \[N\]"),
        ({"total": -2}, "total must be at least 1, got -2"),
        ({"dtype": torch.int32}, "dtype must be float32, float16 or bfloat16, got torch.int32"),
        ({"sigma": torch.ones(4)}, r"sigma must be 0-dim or \[3\]"),
        ({"sigma": torch.ones((), device="meta")}, "sigma is on meta and loss on cpu"),
        ({"antithetic": True, "loss": torch.ones(3), "shape": (3, 3)}, "even number of rows, got 3"),
    ],
)
def test_score_refuses(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "loss": torch.ones(4),
        "sigma": ONE,
        "seed": 1,
        "offset": 0,
        "shape": (4, 3),
    } | changed
    with pytest.raises((ValueError, TypeError), match=message):
        ops.score(**given)


def test_a_backend_that_cannot_run_says_so() -> None:
    with (
        ops.use_backend("triton"),
        pytest.raises(ops.BackendError, match="perturb cannot run on backend 'triton'"),
    ):
        ops.perturb(torch.ones(2, 2), ONE, 1)
