"""What critics cost beside their groups, counted."""

import torch
from torch import nn

import lct_fast as lct
from lct_fast.cli.costs import critic_mac_share
from tests.engine import nets


class _DependsOnValues(nn.Module):
    """Asks for a value, which the meta device does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.abs().max() >= 0)


def test_multiply_accumulates_over_those_of_the_group() -> None:
    example = torch.zeros(4, 1, 8, 8)
    groups = lct.split(
        nets.perceptron(), example_input=example, critic="linear", split_points=["unit2", "unit4"]
    )
    # Linear layers 64 x 24; 24 x 24, twice; each with a critic of 24 x 5.
    assert critic_mac_share(groups) == [24 * 5 / (64 * 24), 24 * 5 / (2 * 24 * 24)]
    assert critic_mac_share(groups[-1:]) == []


def test_what_cannot_be_counted_is_none() -> None:
    tokens = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(32, 5))
    ids = torch.zeros(4, 4, dtype=torch.int64)
    assert critic_mac_share(lct.split(tokens, example_input=ids, critic="linear", split_points=["2"])) is None
    odd = nn.Sequential(_DependsOnValues(), nn.Linear(8, 8), nn.Linear(8, 5))
    groups = lct.split(odd, example_input=torch.zeros(4, 8), critic="linear", split_points=["2"])
    assert critic_mac_share(groups) is None
