"""group_linear in plain torch: a group's linear layer, its activation and its linear critic's logits.

    pre     = x weight^T + bias
    h       = act(pre)                               none | relu | gelu = pre Phi(pre), with erf
    logits  = h critic_weight^T + critic_bias        of h as rounded: what the next group is given
    slope   = gelu'(pre)                             kept for the backward of gelu

    g       = dh + dlogits critic_weight             either may be absent
    dpre    = g | g where not (h <= 0), else 0 | g * slope
    dbias   = sum_n dpre_n                           before dpre is rounded

The rest of the backward is plain matrix products: dx = dpre weight, dweight = dpre^T x, dcritic_weight =
dlogits^T h, dcritic_bias = sum_n dlogits_n.

Everything is computed in float32 (float64 for float64 input) and rounded once, on output. Works on any device.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    accumulator = _accumulator(x.dtype)
    return linear(x.to(accumulator), weight.to(accumulator), None if bias is None else bias.to(accumulator))


def _gelu(pre: Tensor) -> tuple[Tensor, Tensor]:
    """gelu and its derivative."""
    probability = 0.5 * torch.erfc(pre * -math.sqrt(0.5))
    density = torch.exp(-0.5 * pre * pre) / math.sqrt(2 * math.pi)
    return pre * probability, probability + pre * density


def group_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    critic_weight: Tensor | None = None,
    critic_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A linear layer, its activation, and the logits of a linear critic on top.

    Args:
        x: [N, I].
        weight: [O, I].
        bias: [O] or None.
        activation: "none", "relu" or "gelu" (with erf).
        critic_weight: [V, O] or None.
        critic_bias: [V] or None.

    Returns:
        h [N, O], logits [N, V] (None without critic_weight), and the activation's derivative [N, O], in x's dtype.
    """
    pre = _linear(x, weight, bias)
    if activation == "relu":
        h, slope = pre.relu(), (~(pre <= 0)).to(pre.dtype)
    elif activation == "gelu":
        h, slope = _gelu(pre)
    else:
        h, slope = pre, torch.ones_like(pre)
    h = h.to(x.dtype)
    logits = None if critic_weight is None else _linear(h, critic_weight, critic_bias).to(x.dtype)
    return h, logits, slope.to(x.dtype)


def group_linear_backward(
    dh: Tensor | None,
    dlogits: Tensor | None,
    critic_weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to pre and bias; dh or dlogits may be None, not both.

    Args:
        dh: [N, O] or None.
        dlogits: [N, V] or None.
        critic_weight: [V, O], needed with dlogits.
        gate: [N, O], h for "relu", the slope for "gelu".
        activation: "none", "relu" or "gelu".

    Returns:
        dpre [N, O] in the gradients' dtype, dbias [O] in float32 (float64 for float64).
    """
    given = dh if dh is not None else dlogits
    if given is None:
        raise ValueError("expected dh or dlogits, got neither; pass one")
    accumulator = _accumulator(given.dtype)
    if dlogits is None or critic_weight is None:
        g = given.to(accumulator)
    else:
        g = dlogits.to(accumulator) @ critic_weight.to(accumulator)
        g = g if dh is None else g + dh.to(accumulator)
    if activation == "relu" and gate is not None:
        g = torch.where(gate <= 0, 0.0, g)
    elif activation == "gelu" and gate is not None:
        g = g * gate.to(accumulator)
    return g.to(given.dtype), g.sum(0)
