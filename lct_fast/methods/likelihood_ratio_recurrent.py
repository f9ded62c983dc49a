"""One-layer RNN (tanh), LSTM and GRU, step by step, with noise on their gates' pre-activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(slots=True)
class Unrolled:
    """What passed through the layer: x [M, T, I], the state before each step h [M, T, H]; GRU: its reset gates.

    ``shape`` [M, T, gates * H] is that of the pre-activations.
    """

    x: Tensor
    h: Tensor
    reset: Tensor | None
    shape: torch.Size


def recurrent_layer(module: nn.Module) -> nn.RNNBase | None:
    """The module, if it is a recurrent layer that can be run here."""
    if not isinstance(module, nn.RNN | nn.LSTM | nn.GRU):
        return None
    plain = module.num_layers == 1 and not module.bidirectional and not module.proj_size
    return module if plain and (not isinstance(module, nn.RNN) or module.nonlinearity == "tanh") else None


def pre_activations(layer: Any, run: Unrolled) -> Tensor:
    """[M, T, gates * H] of all steps, each from the state that was before it; no step leads to another here."""
    bias_ih, bias_hh = (layer.bias_ih_l0, layer.bias_hh_l0) if layer.bias else (None, None)
    given = F.linear(run.x, layer.weight_ih_l0, bias_ih)
    return _joined(given, F.linear(run.h, layer.weight_hh_l0, bias_hh), run.reset)


def _joined(given: Tensor, state: Tensor, reset: Tensor | None) -> Tensor:
    """Parts from the input and from the state: their sum, but for the GRU's last gate, where reset gates the state."""
    if reset is None:
        return given + state
    gates, new = state.split([2 * reset.shape[-1], reset.shape[-1]], -1)
    return given + torch.cat([gates, reset * new], -1)


def unroll(layer: Any, inputs: tuple[Any, ...], add: Callable[[Tensor], Tensor]) -> tuple[Any, Unrolled]:
    """The layer's result, as it returns it, with noise; and what its gradient needs.

    Args:
        layer: for which ``recurrent_layer`` is not None.
        inputs: as given to it: x, and maybe the first state.
        add: puts noise on [M, T, gates * H].
    """
    x = inputs[0] if layer.batch_first else inputs[0].transpose(0, 1)
    first = inputs[1] if len(inputs) > 1 else None
    lstm = isinstance(layer, nn.LSTM)
    h = _state(first[0] if lstm and first is not None else first, x, layer.hidden_size)
    c = _state(first[1] if lstm and first is not None else None, x, layer.hidden_size)
    bias_ih, bias_hh = (layer.bias_ih_l0, layer.bias_hh_l0) if layer.bias else (None, None)
    # Noise on the part that comes from the input is noise on the sum: the rest is added to it step by step.
    given = add(F.linear(x, layer.weight_ih_l0, bias_ih))
    outputs, states, resets = [], [], []
    for t in range(x.shape[1]):
        states.append(h)
        state = F.linear(h, layer.weight_hh_l0, bias_hh)
        if isinstance(layer, nn.GRU):
            reset, update = (
                (given[:, t, : 2 * layer.hidden_size] + state[:, : 2 * layer.hidden_size])
                .sigmoid()
                .chunk(2, -1)
            )
            resets.append(reset)
            new = (given[:, t, 2 * layer.hidden_size :] + reset * state[:, 2 * layer.hidden_size :]).tanh()
            h = new + update * (h - new)
        elif lstm:
            i, f, g, o = (given[:, t] + state).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            h = (given[:, t] + state).tanh()
        outputs.append(h)
    reset_gates = torch.stack(resets, 1) if resets else None
    run = Unrolled(x, torch.stack(states, 1), reset_gates, given.shape)
    out = torch.stack(outputs, 1 if layer.batch_first else 0)
    return (out, (h[None], c[None]) if lstm else h[None]), run


def _state(given: Tensor | None, x: Tensor, size: int) -> Tensor:
    return x.new_zeros(len(x), size) if given is None else given[0]
