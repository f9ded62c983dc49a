"""How far an output may be from float64 before it is called wrong."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

FINE = torch.finfo(torch.float32).eps


class WrongOutput(Exception):
    """An output is farther from float64 than the rule allows; the message says which and how far."""


class Accuracy(NamedTuple):
    """The largest error of some outputs, each relative to its largest value, and relative to what is allowed."""

    error: float
    of_rule: float


class Expected(NamedTuple):
    """What an output is held against.

    exact: in float64. plain: from plain torch in the precision of the inputs. eps: of the coarsest format that an
    operand or the result has. terms: the largest sum of absolute terms behind a value, where they cancel.
    """

    exact: Tensor
    plain: Tensor
    eps: float
    terms: float = 0.0


Check = Callable[[Mapping[str, Tensor], float], Accuracy]


def judge(name: str, got: Tensor, expected: Expected, slack: float = 1.0) -> Accuracy:
    """The error rule: max|got - exact| <= 2 max|plain - exact| + slack eps max|exact| + 4 fp32 eps terms.

    Args:
        slack: last places that are allowed: 1 for kernels of ours, more for a rival, which has to be right, not as
            exact as ours are held to be.

    Raises:
        WrongOutput: the shape differs, a value is not finite, or the error is larger.
    """
    exact = expected.exact.double()
    if got.shape != exact.shape:
        raise WrongOutput(f"{name} is {list(got.shape)}, expected {list(exact.shape)}")
    if exact.numel() == 0:
        return Accuracy(0.0, 0.0)
    size = float(exact.abs().max())
    error = float((got.double() - exact).abs().max())
    plain = float((expected.plain.double() - exact).abs().max())
    allowed = 2 * plain + slack * expected.eps * size + 4 * FINE * expected.terms
    # Written so that NaN is refused.
    if not error <= allowed:
        raise WrongOutput(f"{name} is off by {error:.2e} from float64, and {allowed:.2e} is allowed")
    return Accuracy(error / size if size else error, error / allowed if allowed else 0.0)


def worst(found: list[Accuracy]) -> Accuracy:
    """The largest of each kind. Raises WrongOutput where nothing was compared."""
    if not found:
        raise WrongOutput("no output was compared with float64")
    return Accuracy(max(each.error for each in found), max(each.of_rule for each in found))


def against(expected: Mapping[str, Expected]) -> Check:
    """A check of whichever of these outputs a contender has."""

    def check(outputs: Mapping[str, Tensor], slack: float) -> Accuracy:
        return worst([judge(name, got, expected[name], slack) for name, got in outputs.items()])

    return check
