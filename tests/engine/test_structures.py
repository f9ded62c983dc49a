"""Exits as networks of their own: what they cost, and which one is chosen."""

import pytest
import torch
from torch import nn

import lct_fast as lct
from lct_fast.engine.network.exits import Progressive, collect, progressive
from lct_fast.engine.network.structures import Structure, latency, progressive_macs, smallest, structures

FOUND = [
    Structure(1, 0.80, 10, 100, (0.0, 0.0, 0.0)),
    Structure(2, 0.95, 20, 200, (0.0, 0.0, 0.0)),
    Structure(3, 0.93, 30, 300, (0.0, 0.0, 0.0)),
    Structure(4, 0.97, 40, 400, (0.0, 0.0, 0.0)),
]


def _groups() -> list[lct.Group]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return lct.split(net, 3, torch.zeros(2, 6), critic="linear", split_points=["2", "4"])


def test_costs_are_those_of_the_layers() -> None:
    groups, x = _groups(), torch.randn(40, 6)
    y = torch.arange(40) % 3
    logits, labels = collect(groups, [(x, y)])
    found = structures(groups, logits, labels, rows=2)
    assert [s.exit for s in found] == [1, 2, 3]
    assert [s.macs for s in found] == [6 * 5 + 5 * 3, 6 * 5 + 5 * 4 + 4 * 3, 6 * 5 + 5 * 4 + 4 * 3]
    assert [s.parameters for s in found] == [35 + 18, 35 + 24 + 15, 35 + 24 + 15]
    assert [s.accuracy for s in found] == [float((z.argmax(1) == y).double().mean()) for z in logits]
    assert all(0 < s.latency[0] <= s.latency[1] <= s.latency[2] for s in found)
    with pytest.raises(ValueError, match="batches of 1 or more, got 0"):
        structures(groups, logits, labels, rows=0)


def test_timing_keeps_the_mode() -> None:
    seen = []

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.training)
            return x

    layer = Layer()
    latency(layer, torch.zeros(1, 1))
    assert layer.training and not any(seen) and len(seen) >= 20


@pytest.mark.parametrize(
    ("under_macs", "min_accuracy", "exit"),
    [
        (None, 0.9, 2),
        (None, 0.96, 4),
        (250, None, 2),
        (350, None, 2),
        (None, None, 4),
        (400, 0.93, 2),
        (100, 0.8, 1),
    ],
)
def test_the_smallest_that_will_do(under_macs: int | None, min_accuracy: float | None, exit: int) -> None:
    assert smallest(FOUND, under_macs, min_accuracy).exit == exit
    assert smallest(FOUND[::-1], under_macs, min_accuracy).exit == exit


def test_the_cheaper_of_equals() -> None:
    equal = [Structure(k, 0.9, 10, 100 * k, (0.0, 0.0, 0.0)) for k in (1, 2)]
    assert smallest(equal, 500).exit == smallest(equal, 500, 0.9).exit == 1


@pytest.mark.parametrize(
    ("under_macs", "min_accuracy", "message"),
    [
        (99, None, r"no exit has 99 MACs or fewer: the smallest, exit 1, has 100"),
        (None, 0.98, r"no exit reaches an accuracy of 98.00%: the best, exit 4, has 97.00%"),
        (350, 0.96, r"no exit reaches an accuracy of 96.00% within 350 MACs: the best, exit 2, has 95.00%"),
    ],
)
def test_what_no_exit_meets(under_macs: int | None, min_accuracy: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smallest(FOUND, under_macs, min_accuracy)


def test_heads_that_were_passed_are_paid_for() -> None:
    groups = _groups()
    first, second, whole = 30 + 15, 30 + 20 + 12, 30 + 20 + 12
    expected = 0.5 * first + 0.25 * (15 + second) + 0.25 * (15 + 12 + whole)
    assert progressive_macs(groups, Progressive(0.9, 1.0, [0.5, 0.25, 0.25])) == expected
    logits, labels = collect(groups, [(torch.randn(8, 6), torch.zeros(8, dtype=torch.int64))])
    assert progressive_macs(groups, progressive(logits, labels, 1e-6)) == first
