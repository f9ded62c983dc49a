"""linear_cross_entropy: the head of a vocabulary, by libraries that were made for it.

From 32,768 classes on, logits and their gradient no longer pay as tensors, and others have solved that: QuACK where
it is installed and fits, else torch. Both go through the rows in chunks. `critic_head` is for fewer classes.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Classes from which on the head goes here.
LARGE = 32768


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "none",
) -> Tensor:
    """Cross-entropy of h weight^T + bias against class indices, differentiable in h, weight and bias.

    Args:
        h: [N, D] float32, float16, bfloat16 or float64.
        weight: [V, D]; it and bias are cast to h's dtype, as under autocast.
        bias: [V] or None.
        target: [N] int64, 0..V - 1 or ignore_index. Another label is an error on the host and undefined on a device.
        ignore_index: label whose rows have loss 0 and no gradient.
        reduction: "none" for the loss of each row [N], or "sum". QuACK makes sums only.

    Raises:
        ValueError: another reduction. RuntimeError: from torch, shapes that do not fit.
    """
    if reduction not in ("none", "sum"):
        raise ValueError(f"reduction must be 'none' or 'sum', got '{reduction}'")
    weight = weight.to(h.dtype)
    bias = None if bias is None else bias.to(h.dtype)
    if not why_not_quack(h, weight, bias, reduction):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        total: Tensor = chunked_linear_cross_entropy(
            h, weight, target, ignore_index=ignore_index, reduction=reduction
        )
        return total
    if not hasattr(F, "linear_cross_entropy"):
        # Before torch 2.13: all logits at once.
        logits = F.linear(h, weight, bias)
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
    # torch's own advice for when chunks pay.
    options: Any = torch.nn.LinearCrossEntropyOptions() if h.shape[0] >= h.shape[1] else None
    loss: Tensor = F.linear_cross_entropy(
        h,
        weight,
        target,
        linear_bias=bias,
        reduction=reduction,
        ignore_index=ignore_index,
        options=options,
    )
    return loss


def why_not_quack(h: Tensor, weight: Tensor, bias: Tensor | None, reduction: str) -> str:
    """Why QuACK cannot compute this, or ""."""
    if find_spec("quack") is None:
        return "quack-kernels is not installed; `pip install quack-kernels` on a machine with a Hopper GPU or newer"
    if not h.is_cuda or torch.cuda.get_device_capability(h.device)[0] < 9:
        return "it takes tensors on a device of compute capability 9 or more"
    if h.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {h.dtype}"
    if bias is not None:
        return "it takes no bias"
    if reduction != "sum":
        return "it gives sums, not a loss for each row"
    if any(size % 8 for size in (*h.shape, *weight.shape)):
        return f"sizes must be multiples of 8, got h {list(h.shape)}, weight {list(weight.shape)}"
    return ""
