"""What a forward pass costs, counted without running it."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def macs(module: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype | None = None) -> int:
    """Multiply-accumulates of one sample's forward pass: convolutions, linear layers, matrix products.

    Norms, activations, pooling and biases are not counted. The pass runs on the meta device with the module's
    parameters and buffers replaced, so nothing is computed and the module is not changed.

    Args:
        module: any module that runs on the meta device (no branching on tensor values).
        input_shape: shape of its input without the batch, e.g. (3, 32, 32).
        dtype: of its input; by default that of its parameters.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # Two rows, because batch norm in training mode refuses one row of a 1x1 map.
    rows = 2
    tensors = dict(chain(module.named_parameters(), module.named_buffers()))
    ghosts = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    dtype = dtype or next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    x = torch.zeros(rows, *input_shape, dtype=dtype, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, ghosts, (x,))
    flops: int = counter.get_total_flops()
    return flops // (2 * rows)
