"""The error rule refuses what is wrong and says how far the rest is off."""

import pytest
import torch
from torch import Tensor

from lct_fast.bench.rule import Expected, WrongOutput, against, judge

EXACT = torch.tensor([1.0, -4.0], dtype=torch.float64)


def expected(plain_error: float = 0.0, eps: float = 0.01, terms: float = 0.0) -> Expected:
    return Expected(EXACT, EXACT.float() + plain_error, eps, terms)


@pytest.mark.parametrize(
    ("off", "given", "slack", "allowed"),
    [
        (0.03, expected(), 1.0, 0.04),
        (0.03, expected(plain_error=0.25, eps=0.0), 1.0, 0.5),
        (0.03, expected(), 8.0, 0.32),
        (0.03, expected(eps=0.0, terms=1e6), 1.0, 4 * 2.0**-23 * 1e6),
    ],
)
def test_each_part_of_what_is_allowed(off: float, given: Expected, slack: float, allowed: float) -> None:
    found = judge("y", EXACT + torch.tensor([off, 0.0]), given, slack)
    assert found.error == pytest.approx(off / 4) and found.of_rule == pytest.approx(off / allowed)
    with pytest.raises(WrongOutput, match="y is off by"):
        judge("y", EXACT + torch.tensor([1.01 * allowed, 0.0]), given, slack)


@pytest.mark.parametrize(
    ("got", "says"),
    [
        (torch.tensor([1.0]), r"y is \[1\], expected \[2\]"),
        (torch.tensor([float("nan"), -4.0]), "off by nan"),
    ],
)
def test_shapes_and_nan(got: Tensor, says: str) -> None:
    with pytest.raises(WrongOutput, match=says):
        judge("y", got, expected())


def test_exactness_where_nothing_is_allowed() -> None:
    given = Expected(EXACT, EXACT, 0.0)
    assert judge("y", EXACT, given) == (0.0, 0.0)
    with pytest.raises(WrongOutput):
        judge("y", EXACT + 1e-12, given)


def test_the_worst_output_counts_and_none_is_refused() -> None:
    check = against({"a": expected(), "b": expected()})
    found = check({"a": EXACT, "b": EXACT + torch.tensor([0.02, 0.0])}, 1.0)
    assert found.of_rule == pytest.approx(0.5)
    with pytest.raises(WrongOutput, match="no output"):
        check({}, 1.0)
