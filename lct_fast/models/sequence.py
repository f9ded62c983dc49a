"""Character models: token ids [N, T] in, logits [N, T, vocabulary] out, in units that a cut never splits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lct_fast.models.recurrent import RecurrentLayer
from lct_fast.models.transformer import Block, PositionedEmbedding

LAYERS = 4


def _recurrent(
    kind: str, vocabulary: int, window: int, *, layers: int = LAYERS, hidden: int = 256
) -> nn.Sequential:
    """``layers`` recurrent layers of ``hidden`` units on an embedding of that size, then linear.

    Args:
        kind: "lstm" or "gru".
        vocabulary: number of token ids.
        window: tokens of a training window; the model takes any.
    """
    _at_least_one(layers=layers, hidden=hidden)
    net: OrderedDict[str, nn.Module] = OrderedDict(embed=nn.Embedding(vocabulary, hidden))
    for i in range(1, layers + 1):
        net[f"{kind}{i}"] = RecurrentLayer(kind, hidden, hidden)
    net["head"] = nn.Linear(hidden, vocabulary)
    return nn.Sequential(net)


def char_transformer(
    vocabulary: int, window: int, *, layers: int = LAYERS, width: int = 128, heads: int = 4
) -> nn.Sequential:
    """``layers`` pre-norm blocks of ``width`` with causal attention, layer norm, linear; learned positions.

    Args:
        vocabulary: number of token ids.
        window: the most tokens a row may have.
    """
    _at_least_one(layers=layers, width=width, heads=heads)
    if width % heads:
        raise ValueError(f"heads must divide width, got width={width}, heads={heads}")
    net: OrderedDict[str, nn.Module] = OrderedDict(embed=PositionedEmbedding(vocabulary, width, window))
    for i in range(1, layers + 1):
        net[f"block{i}"] = Block(width, heads)
    net["norm"] = nn.LayerNorm(width)
    net["head"] = nn.Linear(width, vocabulary)
    return nn.Sequential(net)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def init_head(net: nn.Sequential) -> None:
    """Variance 1 / fan_in in the head; all other layers keep torch's own, which suit gates and norms."""
    head = net[-1]
    assert isinstance(head, nn.Linear)
    torch.nn.init.kaiming_normal_(head.weight, nonlinearity="linear")
    torch.nn.init.zeros_(head.bias)


MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "char_gru": partial(_recurrent, "gru"),
    "char_lstm": partial(_recurrent, "lstm"),
    "char_transformer": char_transformer,
}
# What the units that a cut stands before are called.
UNITS = {"char_gru": "gru", "char_lstm": "lstm", "char_transformer": "block"}


def even_splits(name: str, layers: int, groups: int) -> list[str] | None:
    """Names of the units that start groups 2..``groups``, layers shared out evenly; None if there are too few."""
    if groups > layers:
        return None
    return [f"{UNITS[name]}{k * layers // groups + 1}" for k in range(1, groups)]
